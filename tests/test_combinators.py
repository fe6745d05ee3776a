"""Combinators: slow copies one by one with the same draws, identities, the law, records and errors."""

import json
import math
import pickle
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sightline import models
from sightline.classifier import Method, UnsuitedError, logit, probability, sigmoid, wrap
from sightline.datasets import DATASETS
from sightline.hooks import edit, substituted
from sightline.maps import unit
from sightline.methods import METHODS, cam, grad_cam, gradient, hires_cam, input_x_gradient, layer_cam, score_cam
from sightline.methods._binary_mask import binary_mask
from sightline.methods._combinators import COMBINATORS
from sightline.methods._contrast import contrast
from sightline.methods._crops import cam_scores, disc_crop, random_crop
from sightline.methods._flip_and_scale import flip_and_scale
from sightline.methods._mean import mean
from sightline.methods._over import over
from sightline.methods._patches import disc_patch, random_patch
from sightline.methods._product import product
from sightline.methods._smooth import smooth
from sightline.runs import arguments
from sightline.settings import bind

CLOSE = {"rtol": 1e-9, "atol": 1e-12}

close = partial(torch.testing.assert_close, **CLOSE)

every = pytest.mark.parametrize("name", COMBINATORS)
networks_and_methods = pytest.mark.parametrize(
    ("network", "method"),
    [("pooled", cam), ("curved", gradient), ("curved", grad_cam), ("tokens", hires_cam)],
)


def quick(name, *methods):
    entry = COMBINATORS[name]
    inside = methods or ((gradient,) if entry.takes == "one" else (gradient, grad_cam))
    return partial(entry.combinator, **entry.quick)(*inside)


@pytest.fixture
def y():
    return torch.tensor([3, 0, 4])


@pytest.fixture
def classifier(request, network):
    return request.getfixturevalue(network)


def one(method, classifier, image, label):
    """Return the map of one image, without its batch."""
    return method(classifier, image[None], torch.tensor([label]))[0]


def looped(classifier, x, y, copies, method, weight=lambda logits, y: torch.ones(1, dtype=torch.float64)):
    """Return the mean of the weighted maps of every image's copies, one by one."""
    found = []
    for i, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
        maps = []
        for copy in copies(i, image):
            with torch.no_grad():
                w = weight(classifier(copy[None]), torch.tensor([label]))
            maps.append(w * one(method, classifier, copy, label))
        found.append(sum(maps) / len(maps))
    return torch.stack(found)


# Noise and masks


@networks_and_methods
def test_smooth_is_the_mean_over_noisy_copies(classifier, method, x, y):
    generator = torch.Generator().manual_seed(2)
    noise = [torch.randn(3, 24, 32, generator=generator).double() for _ in range(4)]
    expected = looped(classifier, x, y, lambda i, image: [image + 0.3 * e for e in noise], method)
    close(smooth(method, samples=4, noise=0.3, seed=2)(classifier, x, y), expected)


@networks_and_methods
@pytest.mark.parametrize(("erase", "filling"), [("black", 0.0), ("mean", None)])
def test_binary_mask_is_the_mean_over_copies_without_some_pixels(classifier, method, erase, filling, x, y):
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(24, 32, generator=generator) < 0.7 for _ in range(4)]
    color = torch.tensor(classifier.mean if filling is None else [filling] * 3, dtype=x.dtype).view(3, 1, 1)

    def copies(i, image):
        for mask in masks:
            copy = image.clone()
            for row, column in (~mask).nonzero().tolist():
                copy[:, row, column] = color[:, 0, 0]
            yield copy

    expected = looped(classifier, x, y, copies, method)
    close(binary_mask(method, samples=4, keep=0.7, seed=1, erase=erase)(classifier, x, y), expected)


@pytest.mark.parametrize(
    "made",
    [
        partial(smooth, samples=3, noise=0.0),
        partial(binary_mask, samples=3, keep=1.0),
        partial(random_patch, samples=3, drop=0.0),
        partial(disc_patch, samples=3, alpha=0.0, by=grad_cam),
        partial(flip_and_scale, scales=(1.0,), flip=False),
        partial(over, classes=lambda label: [label]),
        partial(over, classes={}),
        partial(mean, normalize="none"),
        product,
    ],
)
@networks_and_methods
def test_what_changes_nothing_gives_the_method_itself(classifier, method, made, x, y):
    found, expected = made(method)(classifier, x, y), method(classifier, x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_everything_may_be_masked(pooled, x, y):
    black = gradient(pooled, torch.zeros_like(x), y)
    close(binary_mask(gradient, samples=2, keep=0.0)(pooled, x, y), black)
    close(random_patch(gradient, samples=2, drop=1.0)(pooled, x, y), black)


def test_a_pixel_stays_with_probability_keep(pooled, x, y):
    seen = []
    binary_mask(lambda c, x, y=None, /: seen.append(x) or x[:, :1], samples=30)(pooled, torch.ones_like(x), y)
    shares = torch.cat(seen)
    assert 0.89 < float(shares.mean()) < 0.91
    assert torch.equal(shares.amax(1), shares.amin(1)), "all colors together"


# Patches


def tiled(size, patch, unit):
    """Return rows and columns of pixels of each patch: [(y0, y1, x0, x1)] row by row."""
    if unit == "pixels":
        edges = [[*range(0, length, patch), length] for length in size]
    else:
        edges = [[math.ceil(k * length / patch) for k in range(patch + 1)] for length in size]
    rows, columns = ([*pairwise(e)] for e in edges)
    return [(*row, *column) for row in rows for column in columns]


@networks_and_methods
@pytest.mark.parametrize(("patch", "unit"), [(8, "pixels"), (7, "pixels"), (5, "cells")])
def test_random_patch_is_the_mean_over_copies_without_some_patches(classifier, method, patch, unit, x, y):
    places = tiled((24, 32), patch, unit)
    generator = torch.Generator().manual_seed(3)
    dropped = [torch.rand(len(places), generator=generator) < 0.4 for _ in range(4)]
    assert all(d.any() for d in dropped)

    def copies(i, image):
        for which in dropped:
            copy = image.clone()
            for n in which.nonzero()[:, 0].tolist():
                y0, y1, x0, x1 = places[n]
                copy[:, y0:y1, x0:x1] = 0
            yield copy

    settings = {"samples": 4, "patch": patch, "unit": unit, "drop": 0.4, "seed": 3}
    close(random_patch(method, **settings)(classifier, x, y), looped(classifier, x, y, copies, method))
    close(
        random_patch(method, **settings, weight="sigmoid")(classifier, x, y),
        looped(classifier, x, y, copies, method, sigmoid),
    )


def slow_scores(classifier, image, by, classes, label):
    """Return the largest of the classes' maps on the image, divided by its maximum."""
    maps = [one(by, classifier, image, c)[0] for c in ([label] if classes == "label" else range(5))]
    if classes == "each":
        maps = [m / m.max() if m.max() > 0 else torch.zeros_like(m) for m in maps]
    most = torch.stack(maps).max(0).values
    most = F.interpolate(most[None, None], (24, 32), mode="bilinear")[0, 0]
    return (most / most.max()).clamp(min=0) if most.max() > 0 else torch.zeros_like(most)


@pytest.mark.parametrize("classes", ["all", "each", "label"])
def test_the_score_of_a_pixel_is_the_largest_of_the_classes_maps_and_1_at_the_peak(pooled, classes, x, y):
    labels, S = cam_scores(pooled, x, y, cam, classes)
    assert torch.equal(labels, y)
    images = zip(x, y.tolist(), strict=True)
    close(S[:, 0], torch.stack([slow_scores(pooled, image, cam, classes, label) for image, label in images]))
    assert (S.amax((2, 3)) == 1).all()


def slow_region(scores, reduce):
    """Return the score of a crop or patch from those of its pixels, one by one."""
    values = [value for line in scores.tolist() for value in line]
    return max(values) if reduce == "max" else math.fsum(values) / len(values)


readings = pytest.mark.parametrize(
    ("network", "by", "classes", "reduce"),
    [
        ("pooled", cam, "all", "mean"),
        ("curved", grad_cam, "all", "mean"),
        ("pooled", cam, "each", "max"),
        ("pooled", cam, "label", "mean"),
        ("pooled", cam, "label", "max"),
    ],
)


@readings
@pytest.mark.parametrize(("patch", "unit"), [(8, "pixels"), (7, "pixels"), (5, "cells")])
def test_disc_patch_erases_what_the_maps_of_the_classes_show(classifier, by, classes, reduce, patch, unit, x, y):
    places = tiled((24, 32), patch, unit)
    generator = torch.Generator().manual_seed(5)
    draws = [torch.rand(len(places), generator=generator).tolist() for _ in range(6)]
    scores = [slow_scores(classifier, image, by, classes, label) for image, label in zip(x, y.tolist(), strict=True)]
    erased = []

    def copies(i, image):
        for draw in draws:
            copy = image.clone()
            for u, (y0, y1, x0, x1) in zip(draw, places, strict=True):
                if u < 0.9 * slow_region(scores[i][y0:y1, x0:x1], reduce):
                    copy[:, y0:y1, x0:x1] = 0
                    erased.append(i)
            yield copy

    expected = looped(classifier, x, y, copies, gradient)
    assert {0, 1, 2} == set(erased)
    assert len(erased) < 3 * 6 * len(places)
    settings = {"patch": patch, "unit": unit, "by": by, "classes": classes, "reduce": reduce}
    close(disc_patch(gradient, samples=6, alpha=0.9, seed=5, **settings)(classifier, x, y), expected)


@pytest.mark.parametrize("size", [(24, 32), (48, 64)])
def test_a_patch_is_of_pixels_of_the_input_whatever_its_size(pooled, size, x, y):
    seen = []
    made = random_patch(lambda c, x, y=None, /: seen.append(x) or x[:, :1], samples=40, patch=8, drop=0.5)
    made(pooled, torch.ones(1, 3, *size, dtype=x.dtype), y[:1])
    changes = torch.cat(seen)[:, 0].diff(dim=2).ne(0).any(0).any(0).nonzero()[:, 0] + 1
    assert changes.tolist() == [*range(8, size[1], 8)]


# Crops


def slow_boxes(samples, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for share, down, across in torch.rand(samples, 3, generator=generator, dtype=torch.float64).tolist():
        area = scale[0] + (scale[1] - scale[0]) * share
        h, w = round(math.sqrt(area) * 24), round(math.sqrt(area) * 32)
        found.append((math.floor(down * (25 - h)), math.floor(across * (33 - w)), h, w))
    return found, torch.rand(samples, generator=generator).tolist()


def slow_crops(classifier, x, y, method, places, *, weight, norm, counts=lambda i, n, place: True):
    found = []
    for i, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
        total, cover = torch.zeros(24, 32, dtype=x.dtype), torch.zeros(24, 32, dtype=x.dtype)
        for n, (top, left, h, w) in enumerate(places):
            if not counts(i, n, (top, left, h, w)):
                continue
            crop = image[:, top : top + h, left : left + w]
            crop = F.interpolate(crop[None], (24, 32), mode="bilinear")[0]
            with torch.no_grad():
                share = 1.0 if weight is None else float(weight(classifier(crop[None]), torch.tensor([label])))
            small = F.interpolate(one(method, classifier, crop, label)[None], (h, w), mode="bilinear")[0, 0]
            total[top : top + h, left : left + w] += share * small
            cover[top : top + h, left : left + w] += share
        found.append(total / len(places) if norm == "n" else torch.where(cover > 0, total / cover, 0))
    return torch.stack(found)[:, None]


@networks_and_methods
def test_random_crop_puts_the_maps_of_crops_back_in_place(classifier, method, x, y):
    places, _ = slow_boxes(4, (0.1, 0.5), 6)
    for norm, weight in (("coverage", sigmoid), ("n", sigmoid), ("coverage", None)):
        expected = slow_crops(classifier, x, y, method, places, weight=weight, norm=norm)
        made = random_crop(method, samples=4, scale=(0.1, 0.5), seed=6, norm=norm, weight=weight)
        close(made(classifier, x, y), expected)


def passes(classifier, work):
    """Return how many images the network gets while `work` is done."""
    counts = []
    handle = classifier.model.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    work()
    handle.remove()
    return sum(counts)


def test_the_weights_of_crops_cost_nothing_where_the_method_passes_over_them(pooled, x, y):
    noisy = smooth(gradient, samples=2)
    for method, each in ((gradient, 1), (noisy, 1 + 2), (grad_cam, 1 + 1)):
        made = random_crop(method, samples=4)
        assert passes(pooled, partial(made, pooled, x, y)) == (1 + 4 * each) * len(x)


def blind(classifier, x, y=None, /):
    """Explain by a network whose layer shows nothing."""
    with edit(classifier.model, classifier.layer, torch.zeros_like):
        return classifier(x)[:, :1, None, None].expand(-1, 1, 24, 32).abs() + x[:, :1]


def replaced(classifier, x, y=None, /):
    """Explain by a network with another ReLU."""
    with substituted({F.relu: lambda z, inplace=False: F.softplus(z)}):
        return classifier(x)[:, :1, None, None].expand(-1, 1, 24, 32).abs() + x[:, :1]


@pytest.mark.parametrize("method", [blind, replaced])
def test_weights_are_the_networks_whatever_the_method_does_to_it(pooled, method, x, y):
    places, _ = slow_boxes(4, (0.1, 0.5), 6)
    expected = slow_crops(pooled, x, y, method, places, weight=sigmoid, norm="coverage")
    close(random_crop(method, samples=4, scale=(0.1, 0.5), seed=6)(pooled, x, y), expected)


@networks_and_methods
def test_one_whole_crop_of_weight_one_gives_the_method_itself(classifier, method, x, y):
    whole = F.interpolate(method(classifier, x, y), (24, 32), mode="bilinear")
    for norm in ("coverage", "n"):
        made = random_crop(method, samples=1, scale=(1.0, 1.0), weight=None, norm=norm)
        assert torch.equal(made(classifier, x, y), whole)
        made = disc_crop(method, samples=1, scale=(1.0, 1.0), weight=None, norm=norm, beta=2.0, by=grad_cam)
        assert torch.equal(made(classifier, x, y), whole)
    close(random_crop(method, samples=3, scale=(1.0, 1.0))(classifier, x, y), whole)


def test_crops_lie_in_the_image_and_cover_what_is_asked_for(pooled, x, y):
    areas, corners = [], []
    for seed in range(40):
        places, _ = slow_boxes(20, (0.1, 1.0), seed)
        for top, left, h, w in places:
            assert top >= 0
            assert left >= 0
            assert top + h <= 24
            assert left + w <= 32
            assert abs(w / h - 32 / 24) < 0.12
            areas.append(h * w / 768)
            corners.append((top, left))
    assert min(areas) == pytest.approx(0.1, abs=0.02)
    assert max(areas) == pytest.approx(1.0, abs=0.01)
    assert sum(areas) / len(areas) == pytest.approx(0.55, abs=0.03)
    ramp = torch.arange(24 * 32, dtype=x.dtype).view(1, 1, 24, 32).expand(3, 3, -1, -1) / 768
    back = random_crop(lambda c, x, y=None, /: x[:, :1], samples=8, scale=(0.3, 0.6))(pooled, ramp, y)
    seen = back > 0
    torch.testing.assert_close(back[seen], ramp[:, :1][seen], rtol=0, atol=0.05)
    assert 0.5 < float(seen.double().mean()) <= 1


def test_the_printed_sum_prefers_the_center_and_coverage_does_not(pooled, x, y):
    flat = {
        norm: random_crop(lambda c, x, y=None, /: torch.ones_like(x[:, :1]), samples=60, norm=norm, weight=None)
        for norm in ("coverage", "n")
    }
    divided, printed = (flat[norm](pooled, x, y)[0, 0] for norm in ("coverage", "n"))
    assert ((divided - 1).abs() < 1e-12).logical_or(divided == 0).all()
    assert printed[12, 16] > 2 * printed[0, 0]


@readings
def test_disc_crop_takes_crops_with_the_probability_that_the_maps_leave(classifier, by, classes, reduce, x, y):
    places, draws = slow_boxes(14, (0.1, 0.6), 3)
    beta = 1.4 if reduce == "max" else 0.9
    scores = [slow_scores(classifier, image, by, classes, label) for image, label in zip(x, y.tolist(), strict=True)]
    taken = set()

    def counts(i, n, place):
        top, left, h, w = place
        if draws[n] >= max(0.0, beta - slow_region(scores[i][top : top + h, left : left + w], reduce)):
            return False
        taken.add((i, n))
        return True

    for norm in ("coverage", "n"):
        expected = slow_crops(classifier, x, y, gradient, places, weight=sigmoid, norm=norm, counts=counts)
        settings = {"by": by, "classes": classes, "reduce": reduce, "norm": norm, "chunk": 7}
        made = disc_crop(gradient, samples=14, beta=beta, scale=(0.1, 0.6), seed=3, **settings)
        close(made(classifier, x, y), expected)
    assert {i for i, _ in taken} == {0, 1, 2}
    assert len(taken) < 3 * 14


def test_disc_crop_with_a_large_beta_is_random_crop(pooled, x, y):
    settings = {"samples": 9, "seed": 4}
    everything = disc_crop(gradient, beta=2.0, **settings)(pooled, x, y)
    assert torch.equal(everything, random_crop(gradient, **settings)(pooled, x, y))


@pytest.fixture(scope="module")
def scenes():
    found = DATASETS["creatures"](variant="scenes", split="test", count=6)
    return torch.stack([found[i].image for i in range(6)]), torch.tensor([found[i].label for i in range(6)])


def test_at_the_defaults_crops_count_in_scenes_of_creatures(scenes):
    counted = crops_that_count(scenes, disc_crop)
    assert min(counted) >= 3
    assert max(counted) <= 25


def test_by_the_largest_pixel_of_each_class_no_crop_counts_in_scenes_of_creatures(scenes):
    assert crops_that_count(scenes, partial(disc_crop, classes="each", reduce="max")) == [0] * 6


def crops_that_count(scenes, made):
    """Return how many crops of each image a method is asked to explain."""
    asked = []
    spy = made(lambda c, x, y=None, /: asked.append(len(x)) or x[:, :1])
    counted = []
    for image, label in zip(*scenes, strict=True):
        asked.clear()
        spy(models.load("creatures"), image[None], label[None])
        counted.append(sum(asked))
    return counted


def test_classes_that_the_network_hardly_sees_hardly_count_by_one_maximum(scenes):
    classifier = models.load("creatures")
    S = {name: cam_scores(classifier, *scenes, cam, name)[1] for name in ("all", "each", "label")}
    assert (S["each"].mean((1, 2, 3)) > 1.15 * S["all"].mean((1, 2, 3))).all()
    assert float(S["label"].mean()) < float(S["all"].mean())


def test_disc_crop_by_the_largest_pixel_never_takes_a_crop_that_holds_the_peak(pooled, x, y):
    """S_cam = 1 there, so p = ReLU(beta - 1) = 0; what no crop covers is zero."""
    settings = {"samples": 400, "scale": (0.01, 0.1), "classes": "label", "reduce": "max", "weight": None}
    made = disc_crop(lambda c, x, y=None, /: torch.ones_like(x[:, :1]), **settings)
    covered = made(pooled, x, y)[:, 0] > 0
    for image, label, seen in zip(x, y.tolist(), covered, strict=True):
        score = slow_scores(pooled, image, cam, "label", label)
        assert not seen[score == 1].any()
        assert not seen[score >= 0.7].any()
        assert seen.any()


def test_where_no_crop_counts_the_map_is_zero(pooled, x, y):
    """The printed sum over nothing; `measure` and `explain` report it as all zero."""
    for norm in ("coverage", "n"):
        assert not disc_crop(gradient, scale=(1.0, 1.0), reduce="max", norm=norm)(pooled, x, y).any()
        assert not disc_crop(gradient, samples=5, beta=0.0, norm=norm)(pooled, x, y).any()


def test_crops_that_do_not_count_cost_nothing(pooled, x, y):
    asked = []
    made = disc_crop(lambda c, x, y=None, /: asked.append(len(x)) or x[:, :1], samples=20, beta=0.0)
    made(pooled, x, y)
    assert asked == []


@pytest.mark.parametrize("made", [disc_crop, disc_patch])
def test_where_cam_is_not_defined_the_error_names_grad_cam_which_works(made, curved, x, y):
    with pytest.raises(ValueError, match=r"cam needs global average pooling .* grad_cam is its generalization"):
        made(gradient, samples=2)(curved, x, y)
    assert made(gradient, samples=6, by="grad_cam")(curved, x, y).isfinite().all()


# Flips and scales


@networks_and_methods
def test_flip_and_scale_is_the_mean_of_the_maps_turned_back(classifier, method, x, y):
    scales = (1.0, 0.5, 2.0)
    native = tuple(method(classifier, x, y).shape[-2:])
    size = tuple(min(2 * n, limit) for n, limit in zip(native, (24, 32), strict=True))
    expected = []
    for image, label in zip(x, y.tolist(), strict=True):
        maps = []
        for scale in scales:
            copy = F.interpolate(image[None], (int(24 * scale), int(32 * scale)), mode="bilinear")[0]
            for mirrored in (False, True):
                there = copy.flip(2) if mirrored else copy
                back = one(method, classifier, there, label)
                back = back.flip(2) if mirrored else back
                maps.append(F.interpolate(back[None], size, mode="bilinear")[0])
        expected.append(sum(maps) / 6)
    close(flip_and_scale(method, scales=scales)(classifier, x, y), torch.stack(expected))


def test_a_mirrored_image_has_the_mirrored_map(pooled, x, y):
    made = flip_and_scale(cam, scales=(1.0, 2.0))
    close(made(pooled, x.flip(3), y), made(pooled, x, y).flip(3))


def test_negative_values_may_be_cut_off_before_the_mean(pooled, x, y):
    settings = {"scales": (1.0,), "mode": "bicubic"}
    both = torch.stack([cam(pooled, x, y), cam(pooled, x.flip(3), y).flip(3)])
    assert (both < 0).any()
    close(flip_and_scale(cam, **settings, positive=True)(pooled, x, y), both.relu().mean(0))
    close(flip_and_scale(cam, **settings)(pooled, x, y), both.mean(0))


class Fixed(nn.Module):
    """A network of one input size."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, 1, 1)
        self.head = nn.Linear(4 * 8 * 8, 3)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def test_a_network_of_one_size_takes_one_scale_only(seeded):
    classifier = wrap(seeded(Fixed), layer="body", normalization="none", size=8)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"Fixed cannot be explained on 4 x 4 images \(scale 0.5\).*scales=\(1.0,\)"):
        flip_and_scale(gradient)(classifier, x)
    assert flip_and_scale(gradient, scales=(1.0,))(classifier, x).isfinite().all()


def test_a_method_that_does_not_suit_says_so_at_any_scale(seeded):
    def picky(classifier, x, y=None, /):
        raise UnsuitedError("no attention here")

    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    classifier = wrap(seeded(Fixed), layer="body", normalization="none", size=8)
    with pytest.raises(UnsuitedError, match=r"^no attention here$"):
        flip_and_scale(picky, scales=(0.5, 1.0))(classifier, x)


# Several classes


@networks_and_methods
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("normalize", ["none", "unit", "max"])
def test_over_is_the_sum_of_the_classes_maps(classifier, method, reduce, normalize, x, y):
    sets = {3: (3, 1), 0: (4, 0, 2)}
    expected = []
    for image, label in zip(x, y.tolist(), strict=True):
        maps = [one(method, classifier, image, c) for c in sets.get(label, (label,))]
        if normalize == "unit":
            maps = [(m - m.min()) / (m.max() - m.min()) if m.max() > m.min() else 0 * m for m in maps]
        if normalize == "max":
            maps = [m / m.max() if m.max() > 0 else 0 * m for m in maps]
        expected.append(sum(maps) / (len(maps) if reduce == "mean" else 1))
    close(over(method, sets, normalize=normalize, reduce=reduce)(classifier, x, y), torch.stack(expected))


def test_over_all_classes_is_the_sum_whatever_the_label(pooled, x, y):
    everything = over(cam, lambda label: range(5))
    total = sum(cam(pooled, x, torch.full((3,), c)) for c in range(5))
    close(everything(pooled, x, y), total)
    close(everything(pooled, x), total)
    close(over(cam, dict.fromkeys(range(5), range(5)))(pooled, x, y), total)


def test_over_takes_one_forward_for_all_classes_where_the_method_does(pooled, x, y):
    passes = []
    pooled.model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    over(cam, lambda label: range(5))(pooled, x, y)
    assert passes == [3, 3]
    passes.clear()
    over(grad_cam, {3: (3, 1), 0: (4, 0, 2)})(pooled, x, y)
    assert sum(passes) == 3 + 2 + 3 + 1, "one for the labels, one a class, none in vain"


@networks_and_methods
def test_contrast_is_the_difference_of_two_maps(classifier, method, x, y):
    against = {3: 1, 0: 2, 4: 0}
    expected = torch.stack(
        [
            one(method, classifier, image, label) - one(method, classifier, image, against[label])
            for image, label in zip(x, y.tolist(), strict=True)
        ]
    )
    close(contrast(method, against)(classifier, x, y), expected)
    close(contrast(method, against.__getitem__)(classifier, x, y), expected)


def test_contrast_may_normalize_each_map_first(pooled, x, y):
    ours, others = cam(pooled, x, y), cam(pooled, x, torch.ones(3, dtype=torch.long))
    close(contrast(cam, 1, normalize="unit")(pooled, x, y), unit(ours) - unit(others))
    highs = [m.amax((2, 3), keepdim=True) for m in (ours, others)]
    divided = [torch.where(h > 0, m / h, 0) for m, h in zip((ours, others), highs, strict=True)]
    close(contrast(cam, 1, normalize="max")(pooled, x, y), divided[0] - divided[1])


@pytest.mark.parametrize("normalize", ["none", "unit", "max"])
def test_contrast_is_antisymmetric(pooled, x, normalize):
    there = contrast(grad_cam, 2, normalize=normalize)(pooled, x, torch.full((3,), 4))
    back = contrast(grad_cam, 4, normalize=normalize)(pooled, x, torch.full((3,), 2))
    close(there, -back)
    assert there.any()
    assert not contrast(grad_cam, 2)(pooled, x, torch.full((3,), 2)).any()


def test_the_contrast_of_cam_is_cam_of_the_difference_of_the_heads_rows(pooled, x, y):
    A, w = pooled.features(x), pooled.model.head.weight.detach()
    expected = torch.einsum("bk,bkij->bij", w[y] - w[1], A)[:, None]
    close(contrast(cam, 1)(pooled, x, y), expected)


# Several methods


@pytest.mark.parametrize("normalize", ["none", "unit", "max"])
def test_mean_and_product_meet_on_the_larger_grid(pooled, x, y, normalize):
    methods = (grad_cam, gradient, hires_cam)
    maps = [F.interpolate(m(pooled, x, y), (24, 32), mode="bilinear") for m in methods]
    if normalize == "unit":
        maps = [unit(m) for m in maps]
    if normalize == "max":
        maps = [torch.stack([each / each.max() for each in m]) for m in maps]
    close(mean(*methods, normalize=normalize)(pooled, x, y), (maps[0] + maps[1] + maps[2]) / 3)
    close(product(*methods, normalize=normalize)(pooled, x, y), maps[0] * maps[1] * maps[2])


def test_methods_of_one_grid_keep_it(pooled, x, y):
    found = mean(grad_cam, layer_cam)(pooled, x, y)
    assert found.shape == (3, 1, 6, 8)
    close(found, (unit(grad_cam(pooled, x, y)) + unit(layer_cam(pooled, x, y))) / 2)


def test_the_defaults_are_a_mean_of_unit_maps_and_a_product_of_raw_ones(pooled, x, y):
    close(mean(gradient)(pooled, x, y), unit(gradient(pooled, x, y)))
    close(product(gradient)(pooled, x, y), gradient(pooled, x, y))


def test_a_product_with_ones_is_the_method_itself(pooled, x, y):
    def ones(classifier, x, y=None, /):
        return x.new_ones(len(x), 1, 2, 2)

    assert torch.equal(product(cam, ones)(pooled, x, y), cam(pooled, x, y))


def test_a_map_without_a_positive_value_says_nothing_when_it_is_divided_by_its_maximum(pooled, x, y):
    def negative(classifier, x, y=None, /):
        return -x[:, :1] - 1

    assert torch.equal(mean(negative, normalize="max")(pooled, x, y), torch.zeros_like(x[:, :1]))


# Nested


def test_combinators_take_combinators(pooled, x, y):
    noisy = partial(smooth, samples=2, noise=0.1)
    nested = random_crop(noisy(gradient), samples=3, seed=1)(pooled, x, y)
    places, _ = slow_boxes(3, (0.1, 1.0), 1)
    close(nested, slow_crops(pooled, x, y, noisy(gradient), places, weight=sigmoid, norm="coverage"))
    total = over(contrast(smooth(cam, samples=2), 1), {3: (3, 2)})(pooled, x[:1], y[:1])
    smoothed = smooth(cam, samples=2)
    expected = sum(smoothed(pooled, x[:1], torch.tensor([c])) for c in (3, 2)) - 2 * smoothed(
        pooled, x[:1], torch.tensor([1])
    )
    close(total, expected)
    assert mean(smooth(gradient, samples=2), product(grad_cam, "score_cam"))(pooled, x, y).shape == (3, 1, 24, 32)


# The law


@every
def test_the_map_is_finite_of_one_channel_and_the_same_again(name, pooled, x, y):
    saliency = quick(name)(pooled, x, y)
    assert saliency.shape == (3, 1, 24, 32)
    assert saliency.dtype == x.dtype
    assert saliency.isfinite().all()
    assert not saliency.requires_grad
    torch.manual_seed(1)
    assert torch.equal(saliency, quick(name)(pooled, x, y))


@every
@pytest.mark.parametrize("inner", [gradient, grad_cam])
def test_a_map_does_not_depend_on_its_batch_nor_on_the_chunk(name, inner, pooled, curved, x, y):
    methods = (inner,) if COMBINATORS[name].takes == "one" else (inner, layer_cam)
    made = quick(name, *methods)
    for classifier in (pooled,) if "by" in made.keywords else (pooled, curved):
        together = made(classifier, x, y)
        for i in range(3):
            alone = made(classifier, x[i : i + 1], y[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-9)
        backwards = made(classifier, x.flip(0), y.flip(0)).flip(0)
        torch.testing.assert_close(together, backwards, rtol=0, atol=1e-9)
        for chunk in (1, 7) if "chunk" in made.keywords else ():
            torch.testing.assert_close(partial(made, chunk=chunk)(classifier, x, y), together, rtol=0, atol=1e-9)


@every
def test_no_trace_is_left(name, pooled, x, y, trace, plain):
    pooled.model.requires_grad_(True).train()
    next(pooled.model.children()).eval()
    x.requires_grad_()
    changed = trace(pooled.model, x, y)
    saliency = quick(name)(pooled, x, y)
    assert changed() == []
    assert not saliency.requires_grad
    if name not in ("over", "contrast", "mean", "product"):
        assert not quick(name, lambda c, x, y=None, /: x[:, :1])(pooled, x, y).requires_grad
    with pytest.raises(RuntimeError, match="the method fails"):
        quick(name, *[failing] * (2 if COMBINATORS[name].takes == "many" else 1))(pooled, x, y)
    assert changed() == []


def failing(classifier, x, y=None, /):
    raise RuntimeError("the method fails")


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_gradient_mode_of_the_caller_changes_nothing(name, mode, pooled, x, y):
    expected = quick(name)(pooled, x, y)
    with mode():
        assert torch.equal(quick(name)(pooled, x, y), expected)
        assert torch.equal(quick(name)(pooled, x.clone(), y.clone()), expected)
        assert quick(name)(pooled, x.clone()).isfinite().all()


@every
def test_images_and_network_may_differ_in_precision(name, pooled, x, y, plain):
    for inner in (gradient, grad_cam):
        methods = (inner,) if COMBINATORS[name].takes == "one" else (inner, layer_cam)
        pooled.model.double()
        expected = quick(name, *methods)(pooled, x, y)
        near = {"rtol": 1e-3, "atol": 1e-4, "check_dtype": False}
        torch.testing.assert_close(quick(name, *methods)(pooled, x.float(), y), expected, **near)
        pooled.model.float()
        torch.testing.assert_close(quick(name, *methods)(pooled, x, y), expected, **near)


@every
def test_no_label_means_the_class_that_is_predicted_on_the_clean_image(name, pooled, x):
    with torch.no_grad():
        predicted = pooled(x).argmax(1)
    assert torch.equal(quick(name)(pooled, x), quick(name)(pooled, x, predicted))


@pytest.mark.parametrize(
    "made",
    [
        partial(smooth, samples=4, noise=3.0),
        partial(binary_mask, samples=4, keep=0.1),
        partial(random_patch, samples=4, drop=0.8, patch=4),
        partial(random_crop, samples=6),
        partial(flip_and_scale, scales=(0.3, 2.0)),
    ],
)
def test_the_class_stays_where_copies_are_predicted_otherwise(made, pooled, x):
    asked, predicted = [], []

    def spy(classifier, x, y=None, /):
        asked.append(y)
        with torch.no_grad():
            predicted.append(classifier(x).argmax(1))
        return x[:, :1]

    with torch.no_grad():
        clean = pooled(x).argmax(1)
    made(spy)(pooled, x)
    assert all(torch.equal(y, clean.repeat(len(y) // 3)) for y in asked)
    assert any(not torch.equal(y, p) for y, p in zip(asked, predicted, strict=True))


@every
def test_a_wrong_label_or_image_is_an_error(name, pooled, x, plain):
    for images, y, error, message in (
        (x, torch.tensor([0, 5, 1]), ValueError, r"label 5 is outside 0\.\.4: the network has 5 classes"),
        (x, torch.tensor([0, 1]), ValueError, r"expected 3 labels, one an image, got shape \(2,\)"),
        (x, torch.tensor([0.0, 1.0, 2.0]), TypeError, "expected integer labels, got torch.float32"),
        ((x * 255).byte(), None, TypeError, r"expected images as a float tensor in \[0, 1\], got torch.uint8"),
        (x[:0], None, ValueError, "expected at least one image, got an empty batch"),
    ):
        with pytest.raises(error, match=message):
            quick(name)(pooled, images, y)


@pytest.mark.parametrize("name", ["smooth", "binary_mask", "random_patch", "disc_patch", "random_crop", "disc_crop"])
def test_the_seed_counts_and_the_global_one_does_not(name, pooled, x, y):
    made = quick(name)
    usual = made(pooled, x, y)
    torch.manual_seed(99)
    assert torch.equal(made(pooled, x, y), usual)
    assert not torch.allclose(partial(made, seed=1)(pooled, x, y), usual)


@pytest.mark.parametrize("name", ["smooth", "binary_mask", "random_patch", "random_crop"])
def test_the_copies_of_every_image_are_changed_alike(name, pooled, x, y):
    same = x[:1].expand(3, -1, -1, -1)
    maps = quick(name)(pooled, same, torch.tensor([2, 2, 2]))
    torch.testing.assert_close(maps, maps[:1].expand(3, -1, -1, -1), rtol=0, atol=1e-12)


# Records and the catalogue


@every
def test_a_record_holds_every_setting_as_plain_data(name, pooled):
    made = quick(name)
    record = arguments(made)
    assert json.loads(json.dumps(record)) == record
    assert made.func.__name__ == name
    assert record.get("method", "gradient(score=logit)") == "gradient(score=logit)"
    assert record.get("methods", ["gradient(score=logit)"])[0] == "gradient(score=logit)"
    given = {**arguments(COMBINATORS[name].combinator), **json.loads(json.dumps(COMBINATORS[name].quick))}
    assert {key: record[key] for key in given if key not in ("method", "by")} == {
        key: value for key, value in given.items() if key not in ("method", "by")
    }


def test_the_record_of_nested_methods_is_complete():
    assert arguments(smooth(gradient, samples=5)) == {
        "method": "gradient(score=logit)",
        "samples": 5,
        "noise": 0.15,
        "seed": 0,
        "moment": "mean",
        "relative_to": "input",
        "chunk": 16,
    }
    record = arguments(disc_crop(over(partial(grad_cam, score=probability), {1: (1, 2)}), weight="logit"))
    assert record["method"] == (
        "over(method=grad_cam(score=probability), classes={'1': [1, 2]}, normalize=none, reduce=sum)"
    )
    assert (record["by"], record["weight"], record["classes"]) == ("cam", "logit", "all")
    assert arguments(mean("cam", METHODS["opti_cam"]))["methods"][1].startswith("opti_cam(objective=mask, ")


@every
def test_a_made_method_is_a_method_takes_settings_and_travels(name, pooled, x, y):
    made = quick(name)
    assert isinstance(made, Method)
    assert torch.equal(pickle.loads(pickle.dumps(made))(pooled, x, y), made(pooled, x, y))
    if "samples" in made.keywords:
        assert arguments(bind(made, {"samples": 2}))["samples"] == 2
        assert arguments(bind(COMBINATORS[name].combinator, {"samples": 2})("gradient"))["samples"] == 2
    with pytest.raises(LookupError, match="no setting called 'sample'"):
        bind(made, {"sample": 2})


def test_methods_and_weights_may_be_named(pooled, x, y):
    settings = {"samples": 2, "scale": (0.2, 0.5)}
    named = random_crop("gradient", **settings, weight="probability")(pooled, x, y)
    assert torch.equal(named, random_crop(gradient, **settings, weight=probability)(pooled, x, y))
    assert torch.equal(named, random_crop(METHODS["gradient"], **settings, weight=probability)(pooled, x, y))
    with pytest.raises(LookupError, match="no method called 'gradientt'; did you mean gradient"):
        smooth("gradientt")
    with pytest.raises(LookupError, match="no score called 'sigmoids'; did you mean sigmoid"):
        random_crop(gradient, weight="sigmoids")


@every
def test_an_entry_says_what_its_combinator_is(name):
    import inspect
    import sys

    entry, function = COMBINATORS[name], COMBINATORS[name].combinator
    assert function.__name__ == name
    assert (function.__doc__ or "").startswith("Return ")
    parameters = list(inspect.signature(function).parameters.values())
    many = parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
    assert entry.takes == ("many" if many else "one")
    assert tuple(p.name for p in parameters[1:] if p.default is p.empty) == entry.needs
    assert set(entry.quick) <= {p.name for p in parameters}
    documented = sys.modules[function.__module__].__doc__
    assert all(word in documented for word in entry.paper.replace(" et al.", "").split())


@every
def test_signed_is_what_the_entry_says(name, pooled, x):
    maps = torch.cat([quick(name)(pooled, x, torch.full((3,), label)) for label in range(5) if label != 1])
    assert bool((maps < 0).any()) == COMBINATORS[name].signed


def test_the_weights_of_the_papers_number_of_copies():
    recorded = {name: arguments(COMBINATORS[name].combinator) for name in COMBINATORS}
    samples = {name: record["samples"] for name, record in recorded.items() if "samples" in record}
    assert samples == {**dict.fromkeys(samples, 50), "random_crop": 140}
    assert (recorded["smooth"]["noise"], recorded["binary_mask"]["keep"]) == (0.15, 0.9)
    assert (recorded["random_patch"]["patch"], recorded["random_patch"]["drop"]) == (16, 0.1)
    assert (recorded["disc_patch"]["alpha"], recorded["disc_crop"]["beta"]) == (0.4, 0.7)
    assert recorded["random_crop"]["scale"] == recorded["disc_crop"]["scale"] == [0.1, 1.0]
    assert {name: record["weight"] for name, record in recorded.items() if "weight" in record} == {
        "random_patch": None,
        "disc_patch": None,
        "random_crop": "sigmoid",
        "disc_crop": "sigmoid",
    }


# Errors


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (partial(smooth, samples=0), ValueError, "expected samples >= 1 and chunk >= 1, got samples=0, chunk=16"),
        (partial(binary_mask, chunk=0), ValueError, "got samples=50, chunk=0"),
        (partial(smooth, moment="median"), LookupError, "no moment called 'median'"),
        (partial(binary_mask, keep=1.5), ValueError, r"expected keep in \[0, 1\], .* got 1.5"),
        (partial(binary_mask, erase="blak"), LookupError, "no eraser called 'blak'; did you mean black"),
        (partial(random_patch, drop=-0.1), ValueError, r"expected drop in \[0, 1\], .* got -0.1"),
        (partial(random_patch, patch=0), ValueError, "expected patches of at least one pixel, got patch=0 pixels"),
        (partial(random_patch, patch=25, unit="cells"), ValueError, "got patch=25 cells for 24 x 32 images"),
        (partial(random_patch, unit="cell"), LookupError, "no unit called 'cell'; did you mean cells"),
        (partial(random_patch, samples=0), ValueError, "expected samples >= 1"),
        (partial(disc_patch, alpha=1.5), ValueError, r"expected alpha in \[0, 1\], .* got 1.5"),
        (partial(disc_patch, classes="every"), LookupError, "no choice of classes called 'every'"),
        (partial(random_crop, scale=(0.0, 1.0)), ValueError, r"expected a scale .* in \(0, 1\], got \(0.0, 1.0\)"),
        (partial(random_crop, scale=(0.5, 0.2)), ValueError, "expected a scale"),
        (partial(random_crop, scale=(0.5, 1.2)), ValueError, "expected a scale"),
        (partial(random_crop, norm="N"), LookupError, "no norm called 'N'"),
        (partial(random_crop, weight=lambda z, y: z[:, 0] * 0 - 1.0), ValueError, "expected weights >= 0, got -1"),
        (partial(disc_patch, reduce="maximum"), LookupError, "no reduction called 'maximum'"),
        (partial(disc_crop, reduce="sum"), LookupError, "no reduction called 'sum'"),
        (partial(disc_crop, classes="one"), LookupError, "no choice of classes called 'one'"),
        (partial(disc_crop, beta=-1.0), ValueError, "expected beta >= 0, got -1.0"),
        (partial(flip_and_scale, scales=()), ValueError, r"expected one or more scales above zero, got \(\)"),
        (partial(flip_and_scale, scales=(1.0, -0.5)), ValueError, "expected one or more scales above zero"),
        (partial(over, classes=lambda label: []), ValueError, "expected one or more classes for label 3, got none"),
        (partial(over, classes={3: (3, 5)}), ValueError, r"label 5 is outside 0\.\.4"),
        (partial(over, classes={}, normalize="l2"), LookupError, "no normalization called 'l2'"),
        (partial(over, classes={}, reduce="max"), LookupError, "no reduction called 'max'"),
        (partial(contrast, against=5), ValueError, r"label 5 is outside 0\.\.4"),
        (partial(contrast, against={0: 1, 3: 2}), LookupError, r"no class for label 4; it knows \[0, 3\]"),
        (partial(mean, normalize="l2"), LookupError, "no normalization called 'l2'"),
    ],
)
def test_wrong_settings_are_errors(made, error, message, pooled, x, y, plain):
    asked = []

    def spy(classifier, x, y=None, /):
        asked.append(len(x))
        return x[:, :1]

    with pytest.raises(error, match=message):
        made(spy)(pooled, x, y)
    assert asked == [] or "weights" in message


@pytest.mark.parametrize("made", [mean, product])
def test_no_method_at_all_is_an_error(made):
    with pytest.raises(ValueError, match="expected one or more methods, got none"):
        made()


def test_signed_scores_weigh_where_they_are_positive_only(pooled, x, y):
    with pytest.raises(ValueError, match=r"expected weights >= 0, got -.*; use 'sigmoid', 'probability' or None"):
        random_crop(gradient, weight=lambda logits, y: logit(logits, y) - 100)(pooled, x, y)


def test_methods_without_gradients_are_combined_too(pooled, x, y):
    assert smooth(partial(score_cam, chunk=4), samples=2)(pooled, x, y).shape == (3, 1, 6, 8)
    assert (smooth(input_x_gradient, samples=2)(pooled, x, y) < 0).any()


def test_the_same_classes_may_be_given_for_every_image(pooled, x):
    several = over(grad_cam, [0, 2, 3])(pooled, x, torch.tensor([1, 2, 4]))
    assert torch.equal(several, over(grad_cam, lambda label: (0, 2, 3))(pooled, x, torch.tensor([1, 2, 4])))
