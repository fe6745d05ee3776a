"""AOPC: patches erased one by one in plain loops, a linear model by hand, and what Quantus makes of the same images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from sightline.classifier import Classifier, logit, probability
from sightline.data import Sample, collate
from sightline.erase import resolve
from sightline.evaluation import measure
from sightline.metrics import Case
from sightline.metrics._aopc import aopc, ordered
from sightline.metrics._insertion import deletion

REFERENCE = json.loads((Path(__file__).parent / "data" / "quantus.json").read_text())


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(classifier, x, saliency, y=None):
    y = torch.zeros(len(x), dtype=torch.long) if y is None else y
    batch = collate([Sample(f"i{i}", image, 0) for i, image in enumerate(x)])
    with torch.no_grad():
        return Case(classifier, x, y, saliency, saliency, classifier, batch, classifier(x))


def linear(h, w, seed=5):
    layer = nn.Linear(3 * h * w, 2, bias=False).double()
    layer.weight.data = noise(2, 3 * h * w, seed=seed) - 0.4
    return Classifier(nn.Sequential(nn.Flatten(), layer), "0", size=(h, w))


def slow(classifier, image, saliency, label, side, steps, fill, *, sign=1, score=probability, corner=(0, 0)):
    """Erase patch after patch; the grid starts at `corner`."""
    h, w = saliency.shape
    sums = {}
    for r in range(h):
        for c in range(w):
            place = (r - corner[0]) // side, (c - corner[1]) // side
            sums[place] = sums.get(place, 0.0) + float(saliency[r, c])
    order = sorted(sums, key=lambda place: (-sign * sums[place], place))
    read = lambda one: float(score(classifier(one[None]).double(), torch.tensor([label]))[0])  # noqa: E731
    seen, drops = image.clone(), []
    for place in order[:steps]:
        for r in range(h):
            for c in range(w):
                if ((r - corner[0]) // side, (c - corner[1]) // side) == place:
                    seen[:, r, c] = fill[:, r, c]
        drops.append(read(image) - read(seen))
    return drops


@pytest.mark.parametrize("order", ["most", "least"])
@pytest.mark.parametrize("erase", ["black", "mean", "blur", "noise"])
@pytest.mark.parametrize("size", [(24, 32), (22, 27)])
def test_slow_loop_erases_patch_after_patch(pooled, erase, order, size):
    x, saliency, y = noise(2, 3, *size), noise(2, 1, *size, seed=1), torch.tensor([3, 1])
    side = round(40 * (size[0] * size[1]) ** 0.5 / 224)
    measured = aopc(patch=40, steps=7, erase=erase, order=order)
    found = measured(case(pooled, x, saliency, y))
    fill = resolve(erase, pooled.mean)(x, saliency)
    with torch.no_grad():
        for i in range(2):
            expected = slow(
                pooled, x[i], saliency[i, 0], int(y[i]), side, 7, fill[i], sign=1 if order == "most" else -1
            )
            assert found[i].tolist() == pytest.approx(expected, abs=1e-9)
            assert measured.finish(found[i]).item() == pytest.approx(sum(expected) / 7, abs=1e-9)
    assert measured.higher_is_better == (order == "most")


def test_a_linear_model_by_hand():
    """Four patches hold the contributions 4, 1, 3, 2: the most salient first drops 4, 7, 9, 10 in all."""
    layer = nn.Linear(16, 2, bias=False).double()
    parts = torch.tensor([[4.0, 1.0], [3.0, 2.0]], dtype=torch.float64)
    spread = parts.repeat_interleave(2, 0).repeat_interleave(2, 1)
    layer.weight.data = torch.stack([spread.flatten() / 4, torch.zeros(16).double()])
    classifier = Classifier(nn.Sequential(nn.Flatten(), layer), "0", size=(4, 4), channels=1)
    one = case(classifier, torch.ones(1, 1, 4, 4).double(), spread[None, None] / 4)
    most = aopc(patch=112, steps=4, score=logit)
    assert most(one).tolist() == [[4.0, 7.0, 9.0, 10.0]]
    assert most.finish(most(one)).tolist() == [7.5]
    assert most.curve(most(one)[0]).tolist() == [4.0, 7.0, 9.0, 10.0]
    assert most.axis == (1.0, 2.0, 3.0, 4.0)
    samek = aopc(patch=112, steps=4, score=logit, reduce="steps_and_image")
    assert samek.finish(samek(one)).tolist() == [6.0]
    assert aopc(patch=112, steps=4, score=logit, order="least")(one).tolist() == [[1.0, 3.0, 6.0, 10.0]]


def test_the_patch_is_a_share_of_the_image():
    for size in (32, 64, 224, 448):
        places = ordered(noise(1, 1, size, size), 14, 10, "most")
        assert places.unique().tolist() == list(range(256)), "16 x 16 patches at every size"
    assert ordered(noise(1, 1, 8, 8), 1, 10, "most").unique().tolist() == list(range(64)), "never below a pixel"


def test_a_patch_that_the_border_cuts_off_sums_over_fewer_pixels():
    places = ordered(torch.ones(1, 1, 5, 5).double(), 90, 4, "most")[0, 0]  # 2 x 2 pixels, 9 patches
    whole, edge = {0, 1, 2, 3}, {4, 5, 6, 7}
    assert set(places[:4, :4].flatten().tolist()) == whole
    assert {*places[:4, 4].tolist(), *places[4, :4].tolist()} == edge
    assert places[4, 4] == 8
    assert places[0].tolist() == [0, 0, 1, 1, 4], "equal sums go in row-major order"


def test_telea_sees_all_patches_of_a_step_removed_at_once(pooled):
    x, saliency = noise(1, 3, 24, 32), noise(1, 1, 24, 32, seed=1)
    seen = []

    def eraser(images, mask):
        seen.append(mask)
        return torch.zeros_like(images)

    found = aopc(patch=36, steps=5, erase=eraser)(case(pooled, x, saliency))
    assert [int((mask == 0).sum()) for mask in torch.cat(seen)] == [16, 32, 48, 64, 80], "patches of 4 x 4 pixels"
    torch.testing.assert_close(found, aopc(patch=36, steps=5)(case(pooled, x, saliency)), rtol=0, atol=1e-12)
    assert aopc(patch=40, steps=5, erase="telea")(case(pooled, x, saliency)).isfinite().all()


MAPS = arrays(np.float64, (3, 1, 24, 32), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@settings(deadline=None, max_examples=15)
@given(values=MAPS, chunk=st.integers(1, 30), order=st.sampled_from(["most", "least"]))
def test_numbers_are_bounded_and_do_not_depend_on_batch_or_chunk(classifiers, values, chunk, order):
    x, y, saliency = noise(3, 3, 24, 32), torch.tensor([0, 4, 2]), torch.from_numpy(values)
    found = aopc(patch=40, steps=4, order=order)(case(classifiers["curved"], x, saliency, y))
    assert (found.abs() <= 1).all()
    again = aopc(patch=40, steps=4, order=order, chunk=chunk)(
        case(classifiers["curved"], x.flip(0), saliency.flip(0), y.flip(0))
    )
    torch.testing.assert_close(again.flip(0), found, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=15)
@given(MAPS)
def test_of_a_linear_function_the_own_map_drops_most(values):
    classifier, x = linear(24, 32), noise(1, 3, 24, 32)
    own = (classifier.model[1].weight[0].detach().view(1, 3, 24, 32) * x).sum(1, keepdim=True)
    own = own - own.min()
    settings = {"patch": 36, "steps": 6, "score": logit}  # 4 x 4: all patches are whole, so the shift does not matter
    best = aopc(**settings)(case(classifier, x, own))
    other = aopc(**settings)(case(classifier, x, torch.from_numpy(values[:1])))
    assert (best >= other - 1e-9).all()


def test_all_the_patches_are_the_whole_image(pooled):
    x, saliency = noise(2, 3, 24, 32), noise(2, 1, 24, 32, seed=1)
    one = case(pooled, x, saliency)
    found = aopc(patch=56, steps=20)(one)  # 7 x 7 pixels: 4 x 5 patches
    empty = probability(pooled(torch.zeros_like(x)), one.y)
    torch.testing.assert_close(found[:, -1], (one.probability() - empty).detach(), rtol=0, atol=1e-9)


def test_through_measure_the_predicted_class_counts(pooled):
    x, saliency = noise(4, 3, 24, 32), noise(4, 1, 24, 32, seed=1)
    batch = collate([Sample(f"i{i}", image) for i, image in enumerate(x)])
    scores = measure(lambda c, x, y=None: saliency, pooled, [batch], {"aopc": aopc(patch=40, steps=5)}).scores[0]
    found = aopc(patch=40, steps=5)(case(pooled, x, saliency, pooled(x).argmax(1)))
    assert scores.value == pytest.approx(found.mean().item(), abs=1e-12)
    assert len(scores.per_image) == 4
    assert scores.curve == pytest.approx(found.mean(0).tolist())
    assert scores.axis == (1.0, 2.0, 3.0, 4.0, 5.0)


def test_what_is_wrong_is_said(pooled, plain):
    with pytest.raises(ValueError, match="expected patch >= 1, steps >= 1 and chunk >= 1, got patch=0, steps=10"):
        aopc(patch=0)
    with pytest.raises(ValueError, match="got patch=14, steps=0"):
        aopc(steps=0)
    with pytest.raises(ValueError, match="chunk=0"):
        aopc(chunk=0)
    with pytest.raises(ValueError, match="expected order='most' or order='least', got 'morf'"):
        aopc(order="morf")
    with pytest.raises(ValueError, match="expected reduce='steps' or reduce='steps_and_image', got 'mean'"):
        aopc(reduce="mean")
    with pytest.raises(ValueError, match="expected scored='label'"):
        aopc(scored="second")
    small = case(pooled, noise(1, 3, 24, 32), noise(1, 1, 24, 32))
    with pytest.raises(
        ValueError, match="has 6 patches of 12 x 12, fewer than steps=10; take fewer steps or a patch below 100"
    ):
        aopc(patch=100)(small)
    dot = case(linear(1, 1), noise(1, 3, 1, 1), noise(1, 1, 1, 1))
    with pytest.raises(ValueError, match="an image of 1 x 1 has 1 patches"):
        aopc()(dot)
    assert aopc(steps=1)(dot).shape == (1, 1)


# Quantus


class Tiny(nn.Module):
    """The network of `benchmarks/quantus_values.py`, by its recipe."""

    def __init__(self, channels, size):
        super().__init__()
        rng = np.random.default_rng(0)
        self.size = size
        self.conv, self.head = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(4 * size * size, 3, bias=False)
        for values in (self.conv.weight, self.conv.bias, self.head.weight):
            values.data = torch.from_numpy(rng.standard_normal(tuple(values.shape)).astype(np.float32))

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1)) / (2 * self.size)


def rebuilt(channels, size, zero):
    x = torch.from_numpy(np.random.default_rng(1).random((6, channels, size, size)).astype(np.float32))
    a = torch.from_numpy(np.random.default_rng(2).random((6, 1, size, size)).astype(np.float32))
    if zero:
        x[:, :, 0, 0] = 0
    classifier = Classifier(Tiny(channels, size), "conv", size=(size, size), channels=channels)
    with torch.no_grad():
        return case(classifier, x, a, classifier(x).argmax(1))


def reference(name, channels, size, zero, **wanted):
    rows = [
        row
        for row in REFERENCE["rows"]
        if (row["metric"], row["channels"], row["size"], row["zero"]) == (name, channels, size, zero)
        and wanted.items() <= row["settings"].items()
    ]
    return rows[0]


def close(found, expected, atol=2e-5):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


@pytest.mark.parametrize(("order", "theirs"), [("most", "morf"), ("least", "lerf")])
def test_quantus_agrees_where_the_patches_fill_an_image_with_a_zero(order, theirs):
    row = reference("RegionPerturbation", 3, 24, True, order=theirs)
    close(aopc(patch=37, order=order)(rebuilt(3, 24, True)), row["values"])


def test_what_quantus_calls_black_is_the_darkest_value_of_the_image():
    one, row = rebuilt(3, 24, False), reference("RegionPerturbation", 3, 24, False)
    darkest = lambda x, saliency: x.amin((1, 2, 3), keepdim=True).expand_as(x)  # noqa: E731
    close(aopc(patch=37, erase=darkest)(one), row["values"])
    assert (aopc(patch=37)(one) - torch.tensor(row["values"])).abs().max() > 1e-4


def test_quantus_centers_a_grid_that_does_not_fill_the_image():
    one, row = rebuilt(3, 22, True), reference("RegionPerturbation", 3, 22, True)
    black = torch.zeros(3, 22, 22)
    with torch.no_grad():
        for corner, agrees in (((-1, -1), True), ((0, 0), False)):
            drops = slow(one.classifier, one.x[0], one.saliency[0, 0], int(one.y[0]), 4, 10, black, corner=corner)
            assert (np.abs(np.subtract(drops, row["values"][0])).max() < 2e-5) == agrees


def test_pixel_flipping_agrees_with_deletion_where_its_steps_hold_whole_pixels():
    for channels, features in ((1, 16), (3, 48)):
        row = reference("PixelFlipping", channels, 24, True, features_in_step=features)
        close(deletion(steps=36, erase="black")(rebuilt(channels, 24, True))[:, 1:], row["values"])


def test_pixel_flipping_counts_the_channels_of_a_pixel_one_by_one():
    """So 16 features are 5 pixels and a channel of a sixth: every third step alone is a step in pixels."""
    row = reference("PixelFlipping", 3, 24, True, features_in_step=16)
    assert len(row["values"][0]) == 108
    close(deletion(steps=36, erase="black")(rebuilt(3, 24, True))[:, 1:], [one[2::3] for one in row["values"]])


def test_the_area_of_pixel_flipping_needs_an_older_numpy():
    assert "trapz" in reference("PixelFlipping", 1, 24, True, return_auc_per_sample=True)["raised"]
