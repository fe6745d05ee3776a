"""Multi-classifier accuracy: other networks on what the map shows and hides, image by image in plain Python."""

import copy
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightline.classifier import Classifier
from sightline.data import Sample
from sightline.evaluation import Maps
from sightline.maps import resize, unit
from sightline.metrics._localization import matched_area
from sightline.protocols import PROTOCOLS
from sightline.protocols._multi_classifier_accuracy import PARTS, multi_classifier_accuracy

H, W, N = 24, 32, 7


class Darkness(nn.Module):
    """Five classes that cut the mean of a region of the image, so that masking changes what is predicted."""

    def __init__(self, rows, gain=8.0):
        super().__init__()
        self.rows, self.gain, self.stem = rows, gain, nn.Identity()

    def forward(self, x):
        mean = self.stem(x)[:, :, self.rows].mean((1, 2, 3))[:, None]
        return -self.gain * (mean - torch.linspace(0, 0.5, 5, dtype=x.dtype)).abs()


def judge(rows, size=(H, W), classes=()):
    return Classifier(Darkness(rows), "stem", size=size, classes=classes)


@pytest.fixture
def judges():
    return [judge(slice(0, 12)), judge(slice(6, 24)), judge(slice(0, 24, 2))]


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(N, 3, H, W, generator=generator, dtype=torch.float64)
    images = images * torch.linspace(0.3, 1, N, dtype=torch.float64)[:, None, None, None]
    return [Sample(f"s{i}", image, label=(i + 1) // 2) for i, image in enumerate(images)]


@pytest.fixture
def classifier():
    return judge(slice(0, 24))


def method(classifier, x, y=None, /):
    """Give maps of 6 x 8 cells that depend on the image and the class."""
    turned = torch.stack([image.roll(int(label), -1) for image, label in zip(x, y, strict=True)])
    return resize(turned.mean(1, keepdim=True), (6, 8)) ** 3


def painted(image, hole, radius=3.0):
    pixels = np.ascontiguousarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    filled = cv2.inpaint(pixels, hole.byte().numpy(), radius, cv2.INPAINT_TELEA)
    found = torch.from_numpy(filled).permute(2, 0, 1).to(image) / 255
    return torch.where(hole, found, image)


def by_hand(judges, samples, mask_of, size=None, fill=0.0, radius=3.0):
    hits = {part: [] for part in PARTS}
    for i, sample in enumerate(samples):
        x, b = sample.image, mask_of(i, sample)
        out = torch.where(b, torch.full_like(x, fill), x)
        seen = {
            "clean": x,
            "masked_in": torch.where(b, x, torch.full_like(x, fill)),
            "masked_out": out,
            "inpainted": painted(out, b, radius) if bool((~b).any()) else out,
        }
        for part, image in seen.items():
            images = [resize(image[None], other.size) if size else image[None] for other in judges]
            found = [int(other(one)[0].argmax()) == sample.label for other, one in zip(judges, images, strict=True)]
            hits[part].append(found)
    return hits


def strongest(i, sample):
    """Mark as many of the highest pixels as the map's mean says, and of those equal to the next one none."""
    S = unit(resize(method(None, sample.image[None], [sample.label]), (H, W)))[0, 0]
    values = sorted(S.flatten().tolist(), reverse=True)
    return values[round(float(S.mean()) * H * W)] < S


def check(found, hits):
    for part, score in found.items():
        count, judges = len(hits[part]), len(hits[part][0])
        images = [100 * sum(row) / judges for row in hits[part]]
        columns = [100 * sum(column) / count for column in zip(*hits[part], strict=True)]
        assert score.metric.name == part
        assert score.per_image == pytest.approx(images)
        assert score.curve == pytest.approx(columns)
        assert score.axis == tuple(float(n) for n in range(1, judges + 1))
        assert score.value == pytest.approx(math.fsum(images) / count)
        assert score.count == count


def test_each_part_is_the_accuracy_of_each_other_classifier(classifier, judges, samples):
    found = multi_classifier_accuracy(method, classifier, samples, classifiers=judges)
    hits = by_hand(judges, samples, strongest)
    check(found, hits)
    assert len({(score.curve, score.per_image) for score in found.values()}) == 4
    assert len(set(found["clean"].curve)) > 1


def test_the_printed_rule_keeps_what_reaches_the_mean(classifier, judges, samples):
    def reaching(i, sample):
        S = unit(resize(method(None, sample.image[None], [sample.label]), (H, W)))[0, 0]
        return math.fsum(S.flatten().tolist()) / S.numel() <= S

    found = multi_classifier_accuracy(method, classifier, samples, classifiers=judges, rule="mean")
    check(found, by_hand(judges, samples, reaching))


def test_the_erased_part_shows_the_filling_and_the_radius_counts(classifier, judges, samples):
    gray = replace(classifier, mean=(0.35,))
    found = multi_classifier_accuracy(method, gray, samples, classifiers=judges, erase="mean", radius=5.0)
    check(found, by_hand(judges, samples, strongest, fill=0.35, radius=5.0))


def test_a_soft_mask_is_the_map_itself(classifier, judges, samples):
    found = multi_classifier_accuracy(method, classifier, samples, classifiers=judges, rule="soft")
    for part, turn in (("masked_in", lambda S: S), ("masked_out", lambda S: 1 - S)):
        hits = []
        for sample in samples:
            S = unit(resize(method(None, sample.image[None], [sample.label]), (H, W)))
            hits.append([int(other(turn(S) * sample.image).argmax()) == sample.label for other in judges])
        assert found[part].per_image == pytest.approx([100 * sum(row) / 3 for row in hits])


def watching(seen):
    """Return a classifier that keeps what it is shown."""
    other = judge(slice(0, 24))
    other.model.register_forward_hook(lambda module, given, out: seen.append(given[0].clone()))
    return other


def shown(classifier, samples, by=method, **arguments):
    """Return what a classifier sees of all samples, part by part."""
    seen = []
    multi_classifier_accuracy(by, classifier, samples, classifiers=[watching(seen)], batch=100, **arguments)
    return dict(zip(PARTS, seen, strict=True))


def test_inpainting_paints_the_hole_and_nothing_else(classifier, samples):
    seen = shown(classifier, samples)
    for i, sample in enumerate(samples):
        hole = strongest(i, sample)
        torch.testing.assert_close(seen["masked_in"][i], torch.where(hole, sample.image, 0))
        assert torch.equal(seen["inpainted"][i][:, ~hole], sample.image[:, ~hole])
        torch.testing.assert_close(seen["inpainted"][i], painted(seen["masked_out"][i], hole))
        assert float(seen["inpainted"][i][:, hole].mean()) > 0.05


def test_controls_take_the_place_of_the_map_and_make_none(classifier, judges, samples):
    def never(classifier, x, y=None, /):
        raise AssertionError

    everywhere, nowhere = torch.ones(H, W, dtype=torch.bool), torch.zeros(H, W, dtype=torch.bool)
    for mask, b in (("ones", everywhere), ("zeros", nowhere)):
        found = multi_classifier_accuracy(never, classifier, samples, classifiers=judges, mask=mask)
        check(found, by_hand(judges, samples, lambda i, sample, b=b: b))
    ones = multi_classifier_accuracy(never, classifier, samples, classifiers=judges, mask="ones")
    assert ones["masked_in"].value == ones["clean"].value
    assert ones["inpainted"] == replace(ones["masked_out"], metric=ones["inpainted"].metric)
    zeros = multi_classifier_accuracy(never, classifier, samples, classifiers=judges, mask="zeros")
    assert zeros["masked_in"].value == ones["masked_out"].value
    assert zeros["masked_out"].value == zeros["inpainted"].value == zeros["clean"].value


@pytest.mark.parametrize(("mask", "cell"), [("random", 1), ("random_coarse", 4)])
def test_random_masks_are_drawn_image_after_image(classifier, judges, samples, mask, cell):
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.rand(H // cell, W // cell, generator=generator) < 0.5 for _ in samples]
    masks = [torch.tensor([[bool(one[r // cell, c // cell]) for c in range(W)] for r in range(H)]) for one in drawn]
    for batch in (2, 100):
        found = multi_classifier_accuracy(
            method, classifier, samples, classifiers=judges, mask=mask, seed=5, batch=batch
        )
        check(found, by_hand(judges, samples, lambda i, sample: masks[i]))
    share = torch.stack(masks).double().mean()
    assert 0.4 < float(share) < 0.6
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(
        shown(classifier, samples, mask=mask)["clean"], shown(classifier, samples, mask=mask, seed=1)["masked_in"]
    )


def test_coarse_cells_may_not_divide_the_image(classifier):
    odd = [
        Sample("a", torch.rand(3, 7, 3, dtype=torch.float64), label=0),
        Sample("b", torch.rand(3, 7, 3).double(), label=1),
    ]
    tiny = [Sample("a", torch.rand(3, 1, 1, dtype=torch.float64), label=0)]
    for few in (odd, tiny):
        whole = [Classifier(Darkness(slice(0, 24)), "stem", size=(7, 3))]
        found = multi_classifier_accuracy(method, whole[0], few, classifiers=whole, mask="random_coarse")
        assert found["clean"].count == len(few)


def test_a_classifier_of_another_size_gets_the_masked_images_resized(classifier, samples):
    others = [judge(slice(0, 12)), judge(slice(0, 8), size=(16, 16))]
    found = multi_classifier_accuracy(method, classifier, samples, classifiers=others)
    check(found, by_hand(others, samples, strongest, size=True))
    seen = []
    small = replace(watching(seen), size=(12, 16))
    multi_classifier_accuracy(method, classifier, samples, classifiers=[small])
    assert {tuple(images.shape[2:]) for images in seen} == {(12, 16)}


@settings(max_examples=8, deadline=None)
@given(batch=st.integers(1, 9), order=st.permutations(range(N)))
def test_neither_batch_nor_order_matters(batch, order):
    generator = torch.Generator().manual_seed(3)
    samples = [Sample(f"s{i}", torch.rand(3, H, W, generator=generator).double(), label=i % 4) for i in range(N)]
    classifier, judges = judge(slice(0, 24)), [judge(slice(0, 12)), judge(slice(6, 24))]
    whole = multi_classifier_accuracy(method, classifier, samples, classifiers=judges)
    turned = multi_classifier_accuracy(method, classifier, [samples[i] for i in order], classifiers=judges, batch=batch)
    for part in PARTS:
        assert [turned[part].per_image[order.index(i)] for i in range(N)] == list(whole[part].per_image)
        assert turned[part].value == pytest.approx(whole[part].value)
        assert 0 <= whole[part].value <= 100


def test_the_map_is_of_the_label_and_made_once(classifier, judges, samples):
    asked = []

    def counting(classifier, x, y=None, /):
        asked.extend(y.tolist())
        return method(classifier, x, y)

    kept = Maps(counting)
    first = multi_classifier_accuracy(kept, classifier, samples, classifiers=judges, batch=3)
    assert asked == [sample.label for sample in samples]
    assert multi_classifier_accuracy(kept, classifier, samples, classifiers=judges, batch=3) == first
    assert len(asked) == N


@pytest.mark.parametrize("rule", ["matched_area", "mean", "soft"])
def test_a_map_that_says_nothing_shows_and_hides_nothing(classifier, judges, samples, rule):
    zeros = multi_classifier_accuracy(method, classifier, samples, classifiers=judges, mask="zeros")
    for value in (math.nan, 0.0, 2.0):
        silent = lambda classifier, x, y, value=value: torch.full_like(x[:, :1], value)  # noqa: E731
        assert multi_classifier_accuracy(silent, classifier, samples, classifiers=judges, rule=rule) == zeros


def test_a_mask_of_the_methods_own_is_not_scaled_on_demand(classifier, judges, samples):
    def half(classifier, x, y=None, /):
        return unit(method(classifier, x, y)) / 2

    seen = shown(classifier, samples, normalize=False, by=half)
    for i, sample in enumerate(samples):
        S = resize(half(None, sample.image[None], [sample.label]), (H, W))
        share = float((seen["masked_in"][i] > 0).all(0).double().mean())
        assert share == pytest.approx(float(S.mean()), abs=1.5 / S.numel())
    with pytest.raises(ValueError, match="normalize=False expects maps in"):
        shown(classifier, samples, normalize=False, by=lambda *a: 3 * half(*a))


def test_the_parts_are_those_of_the_catalogue(classifier, judges, samples):
    found = multi_classifier_accuracy(method, classifier, samples, classifiers=judges)
    assert dict(PROTOCOLS["multi_classifier_accuracy"].parts) == PARTS
    assert {part: score.higher_is_better for part, score in found.items()} == PARTS


def test_the_rule_is_that_of_the_localization_metrics():
    S = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    b = matched_area(S)
    assert ((b.double().mean((1, 2, 3)) - S.double().mean((1, 2, 3))).abs() < 1 / 81).all()


def test_it_leaves_no_trace(classifier, judges, samples, trace, plain):
    changed = [trace(other.model, samples[0].image) for other in (classifier, *judges)]
    multi_classifier_accuracy(method, classifier, samples, classifiers=judges, mask="random")
    multi_classifier_accuracy(method, classifier, samples, classifiers=judges)
    assert [one() for one in changed] == [[]] * 4


def test_what_is_wrong_is_said(classifier, judges, samples, plain):
    def run(*others, on=classifier, of=samples, **arguments):
        return multi_classifier_accuracy(method, on, of, classifiers=list(others), **arguments)

    with pytest.raises(ValueError, match="expected at least one other classifier, got none"):
        run()
    with pytest.raises(LookupError, match="no mask called 'randoms'; did you mean random"):
        run(*judges, mask="randoms")
    with pytest.raises(LookupError, match="no rule called 'matched'; did you mean matched_area"):
        run(*judges, rule="matched")
    with pytest.raises(ValueError, match=r"expected radius > 0 pixels, got 0\.0"):
        run(*judges, radius=0.0)
    with pytest.raises(ValueError, match="no image was measured"):
        run(*judges, of=[])
    named = replace(classifier, classes=tuple("abcde"))
    with pytest.raises(ValueError, match=r"classifier 2 does not number the classes as the explained one: 'c' and 'd'"):
        run(judges[0], replace(judges[1], classes=tuple("abdce")), on=named)
    with pytest.raises(ValueError, match="does not number the classes as the explained one: 5 and 6 of them"):
        run(replace(judges[1], classes=tuple("abcdef")), on=named)
    assert run(replace(judges[1], classes=tuple("abcde")), on=named)["clean"].count == N
    three = copy.deepcopy(judges[0])
    three.model.register_forward_hook(lambda module, given, out: out[:, :3])
    with pytest.raises(
        ValueError, match="expected classifiers of the same 5 classes as the explained one, got one of 3"
    ):
        run(judges[0], three)
    with pytest.raises(ValueError, match="needs the label, and 's2' has none"):
        run(*judges, of=[*samples[:2], replace(samples[2], label=None)])
