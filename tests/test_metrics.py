"""Average drop, increase and gain, insertion and deletion: known answers, identities, and slow loops over one image."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from torch import nn

from sightline import metrics
from sightline.classifier import Classifier, logit
from sightline.data import Sample, collate
from sightline.erase import black, resolve
from sightline.evaluation import measure
from sightline.methods import fake_cam, grad_cam
from sightline.metrics import METRICS, Case, average_drop, average_gain, average_increase, deletion, insertion
from sightline.metrics._average import drop, gain, increase
from sightline.metrics._insertion import area, rank, revealed
from sightline.runs import arguments
from sightline.settings import bind

H, W, K = 6, 8, 3
MEAN, STD = (0.45, 0.5, 0.55), (0.25, 0.3, 0.2)


class Small(nn.Module):
    """Two convolutions, pooling, a linear head that is sure of itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(5, 4, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(4, K)

    def forward(self, x):
        return 8 * self.head(self.last(self.first(x)).mean((2, 3)))


class Brightness(nn.Module):
    """Class 0 has the probability that is the image's mean."""

    def forward(self, x):
        v = x.mean((1, 2, 3))
        return torch.stack([v.log(), (1 - v).log()], 1)


class Gap(nn.Module):
    """Class 0 leads by forty times the image's mean."""

    def forward(self, x):
        return torch.stack([40 * x.mean((1, 2, 3)), torch.zeros(len(x))], 1)


class Calls(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.sizes = inner, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.inner(x)


def small(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Classifier(Small().double(), "last", mean=MEAN, std=STD, size=(H, W))


def linear(weights=None, outputs=1):
    layer = nn.Linear(3 * H * W, outputs, bias=False).double()
    values = noise(outputs, 3 * H * W, seed=5) - 0.3 if weights is None else weights
    layer.weight.data = values
    return Classifier(nn.Sequential(nn.Flatten(), layer), "0", size=(H, W))


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(classifier, x, saliency, y=None):
    y = torch.zeros(len(x), dtype=torch.long) if y is None else y
    batch = collate([Sample(f"i{i}", image, 0) for i, image in enumerate(x)])
    with torch.no_grad():
        return Case(classifier, x, y, saliency, saliency, grad_cam, batch, classifier(x))


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# Average drop, increase, gain


def test_hand_example():
    p, o = f64(0.2, 0.9, 0.5), f64(0.6, 0.3, 0.5)
    assert round(drop(p, o).mean().item(), 1) == 22.2
    assert round(increase(p, o).mean().item(), 1) == 33.3
    assert round(gain(p, o).mean().item(), 1) == 16.7


def test_hand_example_through_a_network():
    p, keep = f64(0.2, 0.9, 0.5), f64(0.5, 1 / 3, 1)
    x, saliency = (v.view(3, 1, 1, 1).expand(3, channels, 2, 2) for v, channels in ((p, 3), (keep, 1)))
    one = case(Classifier(Brightness(), ""), x, saliency)

    def far_end(x, saliency):
        return (x < 0.5).to(x)

    assert average_drop(erase=far_end)(one).flatten().tolist() == pytest.approx([0, 200 / 3, 0])
    assert average_increase(erase=far_end)(one).flatten().tolist() == [100, 0, 0]
    assert average_gain(erase=far_end)(one).flatten().tolist() == pytest.approx([50, 0, 0])


def test_guards():
    assert drop(f64(0, 0), f64(0, 0.5)).tolist() == [0, 0]
    assert gain(f64(1, 1), f64(1, 0.5)).tolist() == [0, 0]
    assert gain(f64(0), f64(0)).tolist() == [0]
    assert drop(f64(1), f64(0)).tolist() == [100]


@pytest.mark.parametrize("k", [10, 24, 30, 49])
def test_double_precision_where_float32_sees_one(k):
    p, o = 1 - 2.0**-k, 1 - 2.0 ** -(k + 3)
    exact = 100 * (Fraction(o) - Fraction(p)) / (1 - Fraction(p))
    assert gain(f64(p), f64(o)).item() == exact == 87.5
    p, o = 2.0**-k, 2.0 ** -(k + 2)
    assert drop(f64(p), f64(o)).item() == 100 * (Fraction(p) - Fraction(o)) / Fraction(p) == 75


def test_gain_of_a_float32_network_that_is_nearly_sure():
    x, saliency = torch.full((1, 3, 4, 4), 0.5), torch.full((1, 1, 4, 4), 0.5)
    one = case(Classifier(Gap(), ""), x, saliency)
    assert one.logits.softmax(1)[0, 0] == 1, "float32 sees nothing left to gain"
    p, o = (1 / (1 + (-Decimal(gap)).exp()) for gap in (20, 30))
    white = average_gain(erase=lambda x, saliency: torch.ones_like(x))
    assert white(one).item() == pytest.approx(float(100 * (o - p) / (1 - p)), rel=1e-6)


@pytest.mark.parametrize("erase", ["black", "mean", "blur", "noise", "rise"])
def test_identity_mask_changes_nothing(erase):
    one = case(small(), noise(3, 3, H, W), torch.ones(3, 1, H, W, dtype=torch.float64))
    for metric in (average_drop, average_increase, average_gain):
        assert metric(erase=erase)(one).flatten().tolist() == [0, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 1024), st.integers(0, 1024)), min_size=1))
def test_gain_and_drop_swap_under_complement(pairs):
    p, o = (f64(*column) / 1024 for column in zip(*pairs, strict=True))
    assert torch.equal(gain(p, o), drop(1 - p, 1 - o))
    assert torch.equal(drop(p, o), gain(1 - p, 1 - o))
    for values in (drop(p, o), gain(p, o)):
        assert 0 <= values.min() <= values.max() <= 100
    assert torch.equal(increase(p, o), 100.0 * (gain(p, o) > 0))


@pytest.mark.parametrize("seed", range(4))
def test_fake_cam_loses_and_gains_nearly_nothing(seed):
    classifier, x = small(seed), noise(4, 3, 48, 48, seed=seed)
    one = case(classifier, x, fake_cam(classifier, x), classifier.labels(x, None))
    nothing = case(classifier, x, torch.zeros(4, 1, 48, 48, dtype=torch.float64), classifier.labels(x, None))
    fake, empty = (average_drop()(each).mean() + average_gain()(each).mean() for each in (one, nothing))
    assert fake < 1
    assert empty > 20 * fake, "this network notices masking"


def slow_map(raw):
    """Upsample one (i, j) map to (H, W) bilinearly, pixel centers aligned, borders repeated; scale to [0, 1]."""
    rows, columns = len(raw), len(raw[0])
    big = [[0.0] * W for _ in range(H)]
    for r in range(H):
        for c in range(W):
            v = min(max((r + 0.5) * rows / H - 0.5, 0), rows - 1)
            u = min(max((c + 0.5) * columns / W - 0.5, 0), columns - 1)
            top, left = math.floor(v), math.floor(u)
            below, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            a, b = v - top, u - left
            upper = (1 - b) * raw[top][left] + b * raw[top][right]
            lower = (1 - b) * raw[below][left] + b * raw[below][right]
            big[r][c] = (1 - a) * upper + a * lower
    low, high = min(map(min, big)), max(map(max, big))
    return [[(v - low) / (high - low) for v in line] for line in big]


def slow_probabilities(classifier, images, label):
    """Normalize by hand, run the bare network, take a softmax in plain Python."""
    z = torch.stack([torch.stack([(image[k] - MEAN[k]) / STD[k] for k in range(3)]) for image in images])
    with torch.no_grad():
        rows = classifier.model(z).tolist()
    return [math.exp(logits[label]) / sum(map(math.exp, logits)) for logits in rows]


def mixed(classifier, x, y=None, /):
    """Return Grad-CAM without its ReLU: no map is empty."""
    A, G = classifier.features_and_gradient(x, y)
    return (G.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True)


@pytest.mark.parametrize("exponent", [1.0, 0.5, 3.0])
def test_slow_loop_over_the_whole_path(exponent):
    classifier, x, labels = small(3), noise(3, 3, H, W, seed=8), [2, 0, 1]
    batch = collate([Sample(f"i{i}", x[i], labels[i]) for i in range(3)])
    chosen = {
        "AD": average_drop(exponent=exponent),
        "AI": average_increase(exponent=exponent),
        "AG": average_gain(exponent=exponent),
    }
    scores = measure(mixed, classifier, [batch], chosen)
    for i, label in enumerate(labels):
        raw = mixed(classifier, x[i : i + 1], torch.tensor([label]))
        mask = slow_map(raw[0, 0].tolist())
        masked = x[i].clone()
        for r in range(H):
            for c in range(W):
                masked[:, r, c] *= mask[r][c] ** exponent
        p, o = slow_probabilities(classifier, [x[i], masked], label)
        assert abs(p - o) > 1e-3, "the example tells something"
        assert scores["AD"].per_image[i] == pytest.approx(100 * max(p - o, 0) / p, abs=1e-9)
        assert scores["AI"].per_image[i] == 100 * (o > p)
        assert scores["AG"].per_image[i] == pytest.approx(100 * max(o - p, 0) / (1 - p), abs=1e-9)


def test_small_exponents_show_everything():
    one = case(small(), noise(3, 3, H, W), 0.2 + 0.8 * noise(3, 1, H, W, seed=1))
    drops = [average_drop(exponent=e)(one).mean().item() for e in (1e-9, 1.0)]
    assert drops[0] < 1e-6 < drops[1]


def test_the_filling_is_what_erase_says():
    classifier, x, saliency = small(), noise(2, 3, H, W), noise(2, 1, H, W, seed=1)
    one, mean = case(classifier, x, saliency), torch.tensor(MEAN, dtype=torch.float64).view(1, 3, 1, 1)
    seen = saliency * x + (1 - saliency) * mean
    p, o = (torch.tensor(slow_probabilities(classifier, images, 0), dtype=torch.float64) for images in (x, seen))
    by_name, by_function = average_drop(erase="mean")(one), average_drop(erase=resolve("mean", MEAN))(one)
    assert torch.equal(by_name, by_function)
    assert torch.allclose(by_name[:, 0], drop(p, o), atol=1e-9)
    assert not torch.allclose(by_name, average_drop()(one), atol=1e-3)
    assert torch.equal(average_drop()(one), average_drop(erase=black)(one))


def test_settings_are_recorded():
    rest = {"region": "map", "on": "boxes", "scored": "label"}
    assert arguments(METRICS["average_gain"].metric) == {"erase": "black", "exponent": 1.0, **rest}
    bound = bind(METRICS["average_gain"].metric, {"erase": {"name": "blur", "sigma": 3.0}, "exponent": 2})
    assert arguments(bound) == {"erase": "blur(sigma=3.0)", "exponent": 2, **rest}
    assert arguments(METRICS["insertion"].metric)["erase"] == "rise"
    assert arguments(METRICS["deletion"].metric)["erase"] == "mean"


def test_the_masked_image_is_seen_once_for_all_three():
    inner = small()
    classifier = Classifier(Calls(inner.model), "inner.last", mean=MEAN, std=STD)
    one = case(classifier, noise(2, 3, H, W), noise(2, 1, H, W, seed=1))
    classifier.model.sizes.clear()
    for metric in (average_drop, average_increase, average_gain):
        metric()(one)
    assert classifier.model.sizes == [2]
    average_drop(exponent=2.0)(one)
    average_drop(erase="mean")(one)
    assert classifier.model.sizes == [2, 2, 2]


@pytest.mark.parametrize("exponent", [0.0, -1.0])
def test_exponent_must_be_positive(exponent):
    with pytest.raises(ValueError, match=f"expected exponent > 0, got {exponent}"):
        average_drop(exponent=exponent)


@pytest.mark.parametrize("name", [name for name in METRICS if "scored" in arguments(METRICS[name].metric)])
def test_scored_class_must_be_known(name, plain):
    with pytest.raises(ValueError, match="expected scored='label' or scored='predicted', got 'top'"):
        METRICS[name](scored="top")


# Insertion and deletion


def slow_curve(classifier, start, end, saliency, label, steps):
    """Play one image's game pixel by pixel: equal pixels in row-major order."""
    order = sorted(range(H * W), key=lambda i: (-saliency[i // W][i % W], i))
    images = []
    for step in range(steps + 1):
        image = start.clone()
        for i in order[: step * H * W // steps]:
            image[:, i // W, i % W] = end[:, i // W, i % W]
        images.append(image)
    return slow_probabilities(classifier, images, label)


@pytest.mark.parametrize("steps", [1, 7, H * W, 60])
def test_slow_loop_of_both_games(steps):
    classifier, x, saliency, label = small(1), noise(1, 3, H, W), noise(1, 1, H, W, seed=1).mul(5).floor() / 5, 2
    one = case(classifier, x, saliency, torch.tensor([label]))
    blurred = resolve("rise", MEAN)(x, saliency)[0]
    gray = torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1).expand(3, H, W)
    for metric, start, end in ((insertion, blurred, x[0]), (deletion, x[0], gray)):
        expected = slow_curve(classifier, start, end, saliency[0, 0].tolist(), label, steps)
        game = metric(steps=steps)
        found = game(one)
        assert found.shape == (1, steps + 1)
        assert found.dtype == torch.float64
        assert found[0].tolist() == pytest.approx(expected, abs=1e-9)
        by_hand = (sum(expected) - expected[0] / 2 - expected[-1] / 2) / steps
        assert game.finish(found[0]).item() == pytest.approx(by_hand, abs=1e-9)


def test_defaults_are_those_of_rise():
    assert arguments(insertion) | {"erase": ""} == arguments(deletion) | {"erase": ""}
    assert insertion().width == 225
    assert (insertion().scored, deletion().scored) == ("predicted", "predicted")
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(224 * 224, 2, bias=False)), "0", channels=1)
    classifier.model[1].weight.data = torch.tensor([[1.0], [0.0]]).expand(2, 224 * 224).contiguous()
    start, end = torch.zeros(1, 1, 224, 224), torch.ones(1, 1, 224, 224)
    places = rank(torch.rand(1, 1, 224, 224, generator=torch.Generator().manual_seed(0)))
    shown = revealed(classifier, start, end, torch.zeros(1, dtype=torch.long), places, steps=224, score=logit)
    assert shown[0].tolist() == [224 * i for i in range(225)]


def test_area_is_the_normalized_trapezoid():
    assert area(f64(0, 0.5, 1, 0.5)).item() == (0.25 + 0.75 + 0.75) / 3
    assert area(f64(0.2, 0.6)).item() == pytest.approx(0.4)
    assert area(torch.stack([f64(1, 1, 1), f64(0, 0, 1)])).tolist() == [1, 0.25]
    assert area(f64(0.3, 0.9, 0.1, 0.7)).item() == pytest.approx(np.trapezoid([0.3, 0.9, 0.1, 0.7], dx=1 / 3))


def test_ties_go_in_row_major_order():
    assert rank(torch.full((1, 1, 3, 4), 0.7)).tolist() == [list(range(12))]
    saliency = torch.tensor([[1.0, 2.0, 1.0], [2.0, 0.0, -0.0]]).view(1, 1, 2, 3)
    assert rank(saliency).tolist() == [[2, 0, 3, 1, 4, 5]]


@given(arrays(np.int64, (2, 1, 4, 5), elements=st.integers(0, 3)), st.integers(0, 5))
def test_random_ties_shuffle_equal_pixels_only(values, seed):
    saliency = torch.from_numpy(values).double()
    places = rank(saliency, "random", seed)
    assert torch.equal(places, rank(saliency, "random", seed))
    assert torch.equal(places[0], rank(saliency[:1], "random", seed)[0]), "an image's order does not depend on others"
    assert places.sort().values.tolist() == [list(range(20))] * 2
    ordered = saliency.flatten(1).gather(1, places.argsort())
    assert (ordered.diff(dim=1) <= 0).all()


def test_random_ties_depend_on_the_seed():
    flat = torch.zeros(1, 1, 6, 6)
    orders = {tuple(rank(flat, "random", seed)[0].tolist()) for seed in range(20)}
    assert len(orders) == 20
    firsts = torch.stack([rank(flat, "random", seed)[0] for seed in range(300)]).double()
    assert firsts[:, 0].mean() == pytest.approx(17.5, abs=2), "the first pixel comes at any place"
    one = case(small(), noise(2, 3, H, W), torch.zeros(2, 1, H, W, dtype=torch.float64))
    a, b, c = (insertion(steps=6, ties="random", seed=seed)(one) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.allclose(a[:, 1:-1], c[:, 1:-1])
    assert torch.equal(a[:, -1], c[:, -1])


MAPS = arrays(np.float64, (1, 1, H, W), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))


@settings(deadline=None, max_examples=30)
@given(MAPS, st.integers(1, 60))
def test_linear_function_is_shared_between_the_games(values, steps):
    """For a linear f and zero as substrate of both games, insertion_i + deletion_i = f(x) at every step."""
    classifier, x = linear(outputs=2), noise(1, 3, H, W)
    one = case(classifier, x, torch.from_numpy(values))
    games = [metric(steps=steps, erase="black", score=logit)(one) for metric in (insertion, deletion)]
    assert torch.allclose(games[0] + games[1], one.logits[:, :1].expand(1, steps + 1), atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(MAPS)
def test_monotone_function_gives_monotone_curves(values):
    """More of a bright image never lowers a sum with weights above zero, and its own map is the best one."""
    weights = noise(2, 3 * H * W, seed=2)
    classifier, x = linear(weights), noise(1, 3, H, W)
    own = (weights[0].view(1, 3, H, W) * x).sum(1, keepdim=True)
    settings = {"steps": 12, "erase": "black", "score": logit}
    other, best = (
        [metric(**settings)(case(classifier, x, saliency)) for metric in (insertion, deletion)]
        for saliency in (torch.from_numpy(values), own / own.max())
    )
    assert (other[0].diff() >= -1e-12).all()
    assert (other[1].diff() <= 1e-12).all()
    assert (best[0] >= other[0] - 1e-12).all()
    assert (best[1] <= other[1] + 1e-12).all()


@pytest.mark.parametrize("metric", [insertion, deletion])
def test_batch_and_chunk_do_not_matter(metric):
    classifier, x, saliency = small(2), noise(3, 3, H, W), noise(3, 1, H, W, seed=1)
    y = torch.tensor([0, 2, 1])
    together = metric(steps=9)(case(classifier, x, saliency, y))
    for chunk in (3, 11, 1000):
        assert torch.allclose(metric(steps=9, chunk=chunk)(case(classifier, x, saliency, y)), together, atol=1e-12)
    for i in range(3):
        alone = metric(steps=9)(case(classifier, x[i : i + 1], saliency[i : i + 1], y[i : i + 1]))
        assert torch.allclose(alone[0], together[i], atol=1e-12)


def test_chunk_bounds_what_the_network_sees_at_once():
    classifier = Classifier(Calls(small().model), "inner.last", mean=MEAN, std=STD)
    one = case(classifier, noise(3, 3, H, W), noise(3, 1, H, W, seed=1))
    classifier.model.sizes.clear()
    insertion(steps=9, chunk=8)(one)
    assert classifier.model.sizes == [8, 8, 8, 3]


@pytest.mark.parametrize("erase", ["black", "mean", "blur", "noise", "rise"])
def test_games_start_and_end_at_image_and_substrate(erase):
    classifier, x, saliency = small(), noise(2, 3, H, W), noise(2, 1, H, W, seed=1)
    one = case(classifier, x, saliency)
    substrate = resolve(erase, MEAN)(x, saliency)
    image, empty = (slow_probabilities(classifier, pictures, 0) for pictures in (x, substrate))
    into, out = insertion(steps=4, erase=erase)(one), deletion(steps=4, erase=erase)(one)
    assert into[:, 0].tolist() == out[:, -1].tolist() == pytest.approx(empty, abs=1e-12)
    assert into[:, -1].tolist() == out[:, 0].tolist() == pytest.approx(image, abs=1e-12)


def test_rise_substrate_is_a_zero_padded_blur_in_normalized_space():
    x = noise(1, 3, 20, 24)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 5.0**2))
    kernel = np.outer(line, line) / line.sum() ** 2
    assert kernel.shape == (11, 11)
    expected = np.empty((3, 20, 24))
    for k in range(3):
        z = (x[0, k].numpy() - MEAN[k]) / STD[k]
        expected[k] = ndimage.convolve(z, kernel, mode="constant", cval=0.0) * STD[k] + MEAN[k]
    found = resolve("rise", MEAN)(x, x[:, :1])[0].numpy()
    assert np.abs(found - expected).max() < 1e-12


@pytest.mark.parametrize("metric", [insertion, deletion])
@pytest.mark.parametrize(("setting", "value"), [("steps", 0), ("chunk", 0)])
def test_games_need_a_step_and_a_chunk(metric, setting, value):
    with pytest.raises(ValueError, match=f"expected steps >= 1 and chunk >= 1, got .*{setting}={value}"):
        metric(**{setting: value})


def test_tie_rule_must_be_known(plain):
    with pytest.raises(ValueError, match="expected ties='row_major' or ties='random', got 'column'"):
        rank(torch.zeros(1, 1, 2, 2), "column")


# The catalogue


@pytest.mark.parametrize("name", METRICS)
def test_catalogue_and_measures_agree(name):
    entry = METRICS[name]
    assert entry.higher_is_better == entry().higher_is_better
    assert entry.metric is getattr(metrics, name)
    assert entry.summary
    assert entry.paper


def test_metrics_are_found_by_attribute_only_if_they_exist():
    assert metrics.Case is Case
    with pytest.raises(AttributeError, match="has no attribute 'accuracy'"):
        metrics.accuracy  # noqa: B018


def test_a_measure_gives_doubles_without_graph():
    classifier, x = small(), noise(2, 3, H, W).requires_grad_()
    for name in ("average_drop", "average_increase", "average_gain", "insertion", "deletion", "minimality"):
        few = {"steps": 5} if METRICS[name]().width > 1 else {}
        found = METRICS[name](**few)(case(classifier, x, noise(2, 1, H, W, seed=1)))
        assert found.dtype == torch.float64
        assert not found.requires_grad
        assert found.shape == (2, METRICS[name](**few).width)
