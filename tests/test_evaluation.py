"""From maps to numbers: whose map is made, how often, what is noted, and that batches and their order do not matter."""

import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightline.classifier import Classifier
from sightline.data import Batch, Sample, collate
from sightline.evaluation import EXPLAIN, Log, Maps, measure
from sightline.methods import grad_cam
from sightline.metrics import Measure, average_drop, average_gain, deletion, insertion

H, W, K = 4, 8, 4


class Columns(nn.Module):
    """Four classes: the mean of each quarter of the columns, times five. Nothing is random."""

    def __init__(self):
        super().__init__()
        self.look = nn.Identity()
        self.anchor = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        x = self.look(x)
        return 5 * torch.stack([part.mean((1, 2, 3)) for part in x.chunk(K, 3)], 1) + self.anchor


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Softplus())
        self.head = nn.Linear(6, K)

    def forward(self, x):
        return 6 * self.head(self.last(x).mean((2, 3)))


class Recorder:
    """A method that notes whom it is asked about; its map depends on the image and on the class."""

    def __init__(self, wait=0.0):
        self.calls, self.wait = [], wait

    def __call__(self, classifier, x, y=None, /):
        time.sleep(self.wait)
        self.calls.append(y.tolist())
        return x.mean(1, keepdim=True) + y.view(-1, 1, 1, 1) * torch.linspace(0, 1, W, dtype=x.dtype)


@pytest.fixture
def columns():
    return Classifier(Columns(), "look", size=(H, W))


@pytest.fixture
def small():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Classifier(Small().double(), "last", mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25), size=(H, W))


def striped(*orders):
    """Make one image an order of classes, the most probable first."""
    images = []
    for i, order in enumerate(orders):
        image = 0.05 * torch.rand(3, H, W, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for place, label in enumerate(order):
            image[:, :, 2 * label : 2 * label + 2] += 0.9 - 0.25 * place
        images.append(image)
    return images


def batch(images, labels, first=0):
    return collate(
        [Sample(f"i{first + i}", image, label) for i, (image, label) in enumerate(zip(images, labels, strict=True))]
    )


def noise(count):
    return list(torch.rand(count, 3, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def scored(label="label"):
    """Return a metric: the map's mean, and a hundred times the class that is scored."""
    return Measure(lambda case: 100 * case.y.double() + case.saliency.mean((1, 2, 3)), True, label)


ORDERS, LABELS = ((2, 0, 3, 1), (1, 3, 0, 2), (0, 1, 2, 3)), (2, 0, 0)


# Whose map


@pytest.mark.parametrize(
    ("explain", "asked"),
    [
        ("label", [2, 0, 0]),
        ("predicted", [2, 1, 0]),
        ("second", [0, 3, 1]),
        ("least", [1, 2, 3]),
    ],
)
@pytest.mark.parametrize("of", ["label", "predicted"])
def test_explain_says_whose_map_and_the_metric_what_is_scored(columns, explain, asked, of):
    method = Recorder()
    one = Measure(lambda case: case.y.double(), True, of)
    scores = measure(method, columns, [batch(striped(*ORDERS), LABELS)], {"class": one}, explain=explain)
    assert method.calls == [asked]
    assert scores["class"].per_image == {"label": (2, 0, 0), "predicted": (2, 1, 0)}[of]


def test_every_choice_is_tried():
    assert set(EXPLAIN) == {"scored", "label", "predicted", "second", "least"}


def test_scored_makes_a_map_for_each_metrics_own_class_once(columns):
    method, metrics = Recorder(), {"a": scored("label"), "b": scored("predicted"), "c": scored("label")}
    measure(method, columns, [batch(striped(*ORDERS), LABELS)], metrics)
    assert method.calls == [[2, 0, 0], [1]], "the second image alone has two classes to explain"
    method = Recorder()
    measure(method, columns, [batch(striped(*ORDERS), (2, 1, 0))], metrics)
    assert method.calls == [[2, 1, 0]]


@pytest.mark.parametrize("explain", ["label", "predicted"])
def test_one_kind_of_map_serves_all_metrics(columns, explain):
    method, metrics = Recorder(), {"a": scored("label"), "b": scored("predicted")}
    measure(method, columns, [batch(striped(*ORDERS), LABELS)], metrics, explain=explain)
    assert method.calls == [[2, 0, 0] if explain == "label" else [2, 1, 0]]


def test_two_metrics_score_two_classes_with_the_right_maps(columns):
    images, seen = striped(*ORDERS), {}

    def keep(name, label):
        def score(case):
            seen[name] = case.y.tolist(), case.saliency, case.raw
            return case.y.double()

        return Measure(score, True, label)

    both = {name: keep(name, name) for name in ("predicted", "label")}
    measure(Recorder(), columns, [batch(images, LABELS)], both)
    for name, labels in (("label", [2, 0, 0]), ("predicted", [2, 1, 0])):
        y, saliency, raw = seen[name]
        expected = Recorder()(columns, torch.stack(images), torch.tensor(labels))
        low, high = (bound((2, 3), keepdim=True) for bound in (expected.amin, expected.amax))
        assert y == labels
        assert torch.equal(raw, expected)
        assert torch.allclose(saliency, (expected - low) / (high - low), atol=1e-15)


def test_equal_logits_still_have_a_second_and_a_least_class(columns):
    flat = [torch.full((3, H, W), 0.5, dtype=torch.float64)]
    asked = {}
    for explain in ("predicted", "second", "least"):
        method = Recorder()
        scores = measure(method, columns, [batch(flat, [0])], {"a": scored()}, explain=explain)
        asked[explain] = method.calls[0][0]
        assert scores.predicted == (asked["predicted"],)
    assert asked == {"predicted": 0, "second": 1, "least": 3}


# What is noted


def test_ids_labels_predictions_time_and_progress(columns):
    batches = [batch(striped(*ORDERS[:2]), LABELS[:2]), batch(striped(ORDERS[2]), [None], first=2)]
    told, method = [], Recorder(wait=0.01)
    metrics = {"a": scored("predicted")}
    scores = measure(method, columns, batches, metrics, report=told.append)
    assert scores.ids == ("i0", "i1", "i2")
    assert scores.labels == (2, 0, None)
    assert scores.predicted == (2, 1, 0)
    assert scores.accuracy == 0.5
    logits = columns(torch.stack(striped(*ORDERS[:2])))
    assert scores.probability[:2] == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-15)
    assert scores.seconds >= 0.02
    assert told == [2, 3]
    assert [score.metric.name for score in scores.scores] == ["a"]
    with pytest.raises(LookupError, match="no score called 'b'; there are \\['a'\\]"):
        scores["b"]


def test_curve_and_value_agree(small):
    metrics = {"insertion": insertion(steps=6), "deletion": deletion(steps=6), "drop": average_drop()}
    scores = measure(grad_cam, small, [batch(noise(5), [0, 1, 2, 3, 0])], metrics)
    for name in ("insertion", "deletion"):
        score = scores[name]
        assert len(score.curve) == 7
        assert score.value == pytest.approx(sum(score.per_image) / 5, abs=1e-12)
        assert score.value == pytest.approx((sum(score.curve) - (score.curve[0] + score.curve[-1]) / 2) / 6, abs=1e-12)
    assert (scores["insertion"].higher_is_better, scores["deletion"].higher_is_better) == (True, False)
    assert scores["drop"].curve == ()
    assert scores["drop"].value == pytest.approx(sum(scores["drop"].per_image) / 5, abs=1e-12)


def test_one_image_alone(small):
    scores = measure(grad_cam, small, [batch(noise(1), [0])], {"insertion": insertion(steps=3), "drop": average_drop()})
    assert [len(score.per_image) for score in scores.scores] == [1, 1]
    assert scores["drop"].value == scores["drop"].per_image[0]


def test_a_map_that_shows_nothing_is_listed_and_scored_as_zero_everywhere(columns):
    flat = {0: 0.0, 1: 0.7, 2: math.nan, 3: math.inf}

    def method(classifier, x, y=None, /):
        saliency = x.mean(1, keepdim=True)
        for i, value in flat.items():
            saliency[i] = value
        saliency[2, 0, 0, 0], saliency[3, 0, 1:] = 1, 0
        return saliency

    def zero(classifier, x, y=None, /):
        return torch.zeros_like(x[:, :1])

    metrics = {"drop": average_drop(), "insertion": insertion(steps=4), "mean": scored()}
    images = [batch(striped(*ORDERS, ORDERS[0], ORDERS[1]), [0] * 5)]
    scores, nothing = (measure(one, columns, images, metrics, explain="label") for one in (method, zero))
    assert scores.degenerate == {"i0": "all zero", "i1": "constant", "i2": "not finite", "i3": "not finite"}
    for name in metrics:
        assert scores[name].per_image[:4] == nothing[name].per_image[:4]
        assert scores[name].per_image[4] != nothing[name].per_image[4]
        assert all(map(math.isfinite, scores[name].per_image))


def silent(classes, value=0.0):
    """A method whose maps of some classes show nothing."""

    def method(classifier, x, y=None, /):
        flat = torch.tensor([label in classes for label in y.tolist()]).view(-1, 1, 1, 1)
        return torch.where(flat, value, x.mean(1, keepdim=True))

    return method


def test_the_class_of_a_map_that_shows_nothing_is_said_where_an_image_is_explained_for_several(columns):
    images, metrics = [batch(striped(*ORDERS), LABELS)], {"a": scored("label"), "b": scored("predicted")}
    named = replace(columns, classes=("cat", "dog", "emu", "fox"))
    assert measure(silent({0, 1, 2}), named, images, metrics).degenerate == {
        "i0": "all zero",
        "i1": "all zero (cat, dog)",
        "i2": "all zero",
    }
    assert measure(silent({1}, 0.3), named, images, metrics).degenerate == {"i1": "constant (dog)"}
    assert measure(silent({1}), columns, images, metrics).degenerate == {"i1": "all zero (class 1)"}
    assert measure(silent({1}), columns, images, {"a": scored("predicted")}).degenerate == {"i1": "all zero"}


def test_maps_are_noted_while_they_are_asked_for_and_of_one_classifier(small):
    x = torch.rand(3, 3, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, maps = collate([Sample(f"i{i}", image, 0) for i, image in enumerate(x)]), Maps(silent({2}))
    maps.of(small, one, torch.tensor([0, 1, 2]))
    with maps.noted(small) as found:
        maps.of(small, one, torch.tensor([2, 1, 2]))  # two of them are in memory
        with maps.noted(replace(small)) as others:
            maps.of(small, one, torch.tensor([1, 2, 1]))
        for y in ([1, 1, 0], [0, 0, 1], [3, 2, 3]):
            maps.of(small, one, torch.tensor(y))
    maps.of(small, one, torch.tensor([2, 2, 2]))
    assert others == {}
    assert found == {
        "i0": {2: "all zero", 1: None},
        "i1": {1: None, 0: None, 2: "all zero"},
        "i2": {2: "all zero", 0: None},
    }


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4)), max_size=12), st.randoms(use_true_random=False))
def test_neither_order_nor_parts_change_what_is_said(asked, random):
    nothing = {0: "all zero", 3: "constant", 4: "all zero"}

    def told(parts):
        log = Log()
        for part in parts:
            shown = Log()
            for name, label in part:
                shown.show({name: {label: nothing.get(label)}})
            log.add(shown)
        return log.degenerate(("cat", "dog", "emu", "fox"))

    mixed = random.sample(asked, len(asked))
    assert told([asked]) == told([mixed[:3], mixed[3:]])
    for name in "ab":
        classes = {label for one, label in asked if one == name}
        said = told([asked]).get(name, "")
        assert said.count("(") == (len({nothing[k] for k in classes & {*nothing}}) if len(classes) > 1 else 0)
        assert ("class 4" in said) == (4 in classes and len(classes) > 1)
        assert bool(said) == bool(classes & {*nothing})


# Batches and their order


def test_batches_and_their_order_do_not_matter(small):
    images, labels = noise(7), [0, 1, 2, 3, 0, 1, 2]
    metrics = {
        "drop": average_drop(scored="predicted"),
        "gain": average_gain(),
        "insertion": insertion(steps=5),
        "deletion": deletion(steps=5, scored="label"),
    }

    def run(order, size):
        samples = [Sample(f"i{i}", images[i], labels[i]) for i in order]
        scores = measure(grad_cam, small, (collate(samples[i : i + size]) for i in range(0, 7, size)), metrics)
        kept = {name: dict(zip(scores.ids, scores[name].per_image, strict=True)) for name in metrics}
        return {name: [kept[name][f"i{i}"] for i in range(7)] + [scores[name].value] for name in metrics}

    whole = run(range(7), 7)
    for order, size in ((range(7), 1), (range(7), 3), ((4, 2, 6, 0, 5, 1, 3), 2)):
        for name, values in run(order, size).items():
            assert values == pytest.approx(whole[name], abs=1e-9)
    assert all(max(values) - min(values) > 1e-3 for values in whole.values()), "the images differ"


def test_float32_images_meet_double_networks(small):
    images = [image.float() for image in noise(3)]
    scores = measure(grad_cam, small, [batch(images, [0, 1, 2])], {"drop": average_drop(), "in": insertion(steps=3)})
    double = measure(grad_cam, small, [batch(noise(3), [0, 1, 2])], {"drop": average_drop(), "in": insertion(steps=3)})
    for name in ("drop", "in"):
        assert scores[name].value == pytest.approx(double[name].value, rel=1e-4)


def test_nothing_is_left_behind(small, trace, plain):
    images = batch(noise(3), [0, 1, 2])
    small.model.train()
    changed = trace(small.model, images.x)
    measure(grad_cam, small, [images], {"drop": average_drop(), "insertion": insertion(steps=3, ties="random")})
    assert changed() == []


def test_inference_mode(small):
    metrics, images = {"drop": average_drop(), "in": insertion(steps=3)}, batch(noise(3), [0, 1, 2])
    expected = measure(grad_cam, small, [images], metrics)
    with torch.inference_mode():
        found = measure(grad_cam, small, [images], metrics)
    assert [score.value for score in found.scores] == [score.value for score in expected.scores]


# Errors


def test_a_metric_of_the_label_needs_one(columns):
    images = [batch(striped(*ORDERS), (2, None, 0))]
    with pytest.raises(ValueError, match="drop needs the label, and 'i1' has none; explain what is predicted"):
        measure(Recorder(), columns, images, {"drop": average_drop()})
    with pytest.raises(ValueError, match="the map needs the label, and 'i1' has none"):
        measure(Recorder(), columns, images, {"in": insertion()}, explain="label")
    assert measure(Recorder(), columns, images, {"in": insertion(steps=2)}).labels == (2, None, 0)


def test_labels_outside_the_classes(columns):
    with pytest.raises(ValueError, match=r"label 4 is outside 0\.\.3: the network has 4 classes"):
        measure(Recorder(), columns, [batch(striped(ORDERS[0]), [4])], {"drop": average_drop()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, "expected images in \\[0, 1\\], got values from .*; divide by 255"),
        (lambda x: x * 4 - 2, "undo the normalization"),
        (lambda x: x / 0 - x / 0, "the images hold NaN or infinity"),
        (lambda x: x[:, :1], "expected images of shape \\(b, 3, h, w\\), got \\(3, 1, 4, 8\\)"),
        (lambda x: x[:0], "expected at least one image, got an empty batch"),
    ],
)
def test_images_must_be_fit_to_score(columns, change, message, plain):
    given = batch(striped(*ORDERS), LABELS)
    with pytest.raises(ValueError, match=message):
        measure(Recorder(), columns, [Batch(given.ids, change(given.x), given.y, given.samples)], {"a": scored()})


def test_integer_images(columns, plain):
    given = batch(striped(*ORDERS), LABELS)
    with pytest.raises(TypeError, match=r"expected images as a float tensor in \[0, 1\], got torch\.uint8"):
        measure(Recorder(), columns, [Batch(given.ids, given.x.byte(), given.y, given.samples)], {"a": scored()})


@pytest.mark.filterwarnings("error")
def test_no_metric_no_batch_no_such_class(columns, plain):
    with pytest.raises(ValueError, match="expected at least one metric, got none"):
        measure(Recorder(), columns, [], {})
    with pytest.raises(ValueError, match="no image was measured; the data set is empty"):
        measure(Recorder(), columns, [], {"drop": average_drop()})
    with pytest.raises(ValueError, match="scored, label, predicted, second, least, got 'first'"):
        measure(Recorder(), columns, [], {"drop": average_drop()}, explain="first")


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda x: x.mean(1), ValueError, "shape \\(3, 4, 8\\); expected \\(3, 1, height, width\\)"),
        (lambda x: x, ValueError, "shape \\(3, 3, 4, 8\\)"),
        (lambda x: x[:1, :1], ValueError, "shape \\(1, 1, 4, 8\\)"),
        (lambda x: x[:, :1].numpy(), TypeError, "the method returned ndarray; expected maps as a float tensor"),
        (lambda x: x[:, :1].long(), TypeError, "the method returned torch.int64"),
        (lambda x: None, TypeError, "the method returned NoneType"),
    ],
)
def test_a_method_must_return_maps(columns, returned, error, message, plain):
    def method(classifier, x, y=None, /):
        return returned(x)

    with pytest.raises(error, match=message):
        measure(method, columns, [batch(striped(*ORDERS), LABELS)], {"drop": average_drop()})


def test_maps_are_made_once_for_each_image_and_class(small):
    calls = []

    def method(classifier, x, y=None, /):
        calls.append(y.tolist())
        return x[:, :1] * y.view(-1, 1, 1, 1)

    x = torch.rand(3, 3, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, two = (collate([Sample(f"i{i}", image, 0) for i, image in enumerate(images)]) for images in (x, x.flip(0)))
    maps = Maps(method)
    first = maps.of(small, one, torch.tensor([0, 1, 2]))
    again = maps.of(small, one, torch.tensor([0, 2, 2]))
    assert calls == [[0, 1, 2], [2]]
    assert torch.equal(again[[0, 2]], first[[0, 2]])
    maps.of(small, two, torch.tensor([0, 1, 2]))  # other images of the same names: only the middle one is the same
    assert calls[2:] == [[0, 2]]
    assert maps.seconds > 0
    assert torch.equal(maps(small, x, torch.tensor([1, 1, 1])), x[:, :1])


def test_maps_forget_the_oldest_when_there_is_no_room(small):
    calls = []

    def method(classifier, x, y=None, /):
        calls.append(len(x))
        return x[:, :1]

    samples = [Sample(f"i{i}", torch.full((3, 4, 8), i / 10, dtype=torch.float64), 0) for i in range(9)]
    maps = Maps(method, room=1)
    for sample in samples:
        maps.of(small, collate([sample]), torch.tensor([0]))
    maps.of(small, collate(samples[-1:]), torch.tensor([0]))
    assert len(calls) == 9
    maps.of(small, collate(samples[:1]), torch.tensor([0]))
    assert len(calls) == 10
    assert len(maps.memory) == 4
