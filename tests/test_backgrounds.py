"""Backgrounds: every resolve again in slow loops, and labels pixel by pixel."""

import importlib.util
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.segmentation import felzenszwalb

from sightline.backgrounds import (
    RESOLVES,
    basic,
    confident,
    crf,
    labels_at,
    refined_labels,
    resolve_of,
    smooth,
    superpixel,
)
from sightline.runs import Choice, describe

H, W = 17, 23
CRF = importlib.util.find_spec("pydensecrf") is not None
needs_crf = pytest.mark.skipif(not CRF, reason="a dense CRF needs pydensecrf2, which is not installed")
HERE = [name for name in RESOLVES if CRF or name != "crf"]


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found, expected, atol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=atol)


def blocks(channels=3, side=8):
    """An image of four blocks of one color each, two rows of two."""
    image = torch.zeros(channels, 2 * side, 2 * side, dtype=torch.float64)
    for n, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = n / 3
    return image


# Basic


def test_basic_leaves_the_maps():
    maps = noise(2, H, W)
    assert basic(noise(3, H, W), maps) is maps


# Smooth


def smoothed_by_hand(one, size, sigma):
    """The sum over the window of Gaussian weights times what lies there, mirrored at the border."""
    reach, (h, w) = size // 2, one.shape
    weights = {(r, c): math.exp(-(r * r + c * c) / (2 * sigma**2)) for r in span(reach) for c in span(reach)}
    total, out = sum(weights.values()), torch.zeros(h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            near = (weight * float(one[mirrored(y + r, h), mirrored(x + c, w)]) for (r, c), weight in weights.items())
            out[y, x] = sum(near) / total
    return out


def span(reach):
    return range(-reach, reach + 1)


def mirrored(place, length):
    while not 0 <= place < length:
        place = -place if place < 0 else 2 * (length - 1) - place
    return place


@pytest.mark.parametrize(("size", "sigma"), [(13, 5.0), (5, 1.5), (1, 3.0)])
def test_smooth_is_a_weighted_sum_over_a_window(size, sigma):
    maps = noise(2, 9, 11) - 0.2
    expected = torch.stack([smoothed_by_hand(one, size, sigma) for one in maps])
    same(smooth(noise(3, 9, 11), maps, size=size, sigma=sigma, renormalize=False), expected)
    same(smooth(noise(3, 9, 11), maps, size=size, sigma=sigma), expected / expected.amax((1, 2), keepdim=True))


def test_the_default_window_is_thirteen_pixels_of_sigma_five():
    maps = noise(2, 30, 40)
    found = smooth(noise(3, 30, 40), maps, renormalize=False)
    for one, raw in zip(found, maps, strict=True):
        whole = ndimage.gaussian_filter(raw.numpy(), 5, radius=6, mode="mirror")
        other = ndimage.gaussian_filter(raw.numpy(), 5, radius=6, mode="nearest")
        same(one, whole)
        same(one[6:-6, 6:-6], other[6:-6, 6:-6])
        assert not torch.allclose(one, torch.from_numpy(other), rtol=0, atol=1e-6)


def test_a_sigma_of_zero_smooths_nothing():
    maps = noise(2, H, W)
    assert torch.equal(smooth(noise(3, H, W), maps, sigma=0.0, renormalize=False), maps)


def test_a_map_without_positive_values_becomes_zero_by_its_maximum():
    maps = torch.stack([torch.zeros(H, W), -torch.ones(H, W)]).double()
    assert torch.equal(smooth(noise(3, H, W), maps), torch.zeros_like(maps))
    assert torch.equal(superpixel(noise(3, H, W), maps, renormalize=True), torch.zeros_like(maps))


# Superpixel


def by_superpixel(image, maps, **numbers):
    found = felzenszwalb(image.permute(1, 2, 0).numpy(), channel_axis=-1, **numbers)
    out = torch.zeros_like(maps)
    for n, one in enumerate(maps):
        for place in set(found.flatten().tolist()):
            values = [float(one[r, c]) for r in range(H) for c in range(W) if found[r, c] == place]
            for r in range(H):
                for c in range(W):
                    if found[r, c] == place:
                        out[n, r, c] = math.fsum(values) / len(values)
    return out, len(set(found.flatten().tolist()))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("numbers", [{}, {"scale": 30.0, "min_size": 5}, {"scale": 10.0, "sigma": 0.0, "min_size": 3}])
def test_a_pixel_gets_the_mean_of_its_superpixel(channels, numbers):
    image, maps = noise(channels, H, W, seed=3), noise(3, H, W) - 0.3
    expected, count = by_superpixel(image, maps, **{"scale": 100.0, "sigma": 0.5, "min_size": 50, **numbers})
    assert count > 1
    same(superpixel(image, maps, **numbers), expected)
    same(superpixel(image, maps, renormalize=True, **numbers), expected / expected.amax((1, 2), keepdim=True))


def test_superpixels_of_one_pixel_are_basic():
    image, maps = noise(3, H, W), noise(3, H, W)
    found = superpixel(image, maps, scale=1e-9, sigma=0.0, min_size=0)
    assert torch.equal(found, basic(image, maps))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_one_color_is_one_superpixel(channels):
    maps = noise(2, H, W)
    found = superpixel(torch.full((channels, H, W), 0.4), maps)
    same(found, maps.mean((1, 2), keepdim=True).expand_as(maps))


def test_superpixels_are_the_blocks_of_an_image():
    maps = noise(1, 16, 16)
    found = superpixel(blocks(), maps, sigma=0.0)
    for rows in (slice(0, 8), slice(8, 16)):
        for columns in (slice(0, 8), slice(8, 16)):
            same(found[0, rows, columns], maps[0, rows, columns].mean().expand(8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HERE)
def test_kind_and_shape_stay_also_without_a_map(name, dtype):
    for n in (0, 1, 3):
        maps = noise(n, H, W).to(dtype)
        found = RESOLVES[name](noise(3, H, W).to(dtype), maps)
        assert found.shape == maps.shape
        assert found.dtype == dtype
        assert bool(found.isfinite().all())


# Dense CRF


class Field:
    """What stands in for the library's field: it notes what it is given and says what its energies say."""

    made = None

    def __init__(self, width, height, labels):
        self.shape, self.calls = (labels, height, width), {}
        Field.made = self

    def setUnaryEnergy(self, energy):  # noqa: N802
        self.energy = energy

    def addPairwiseGaussian(self, **settings):  # noqa: N802
        self.calls["gaussian"] = settings

    def addPairwiseBilateral(self, **settings):  # noqa: N802
        self.calls["bilateral"] = settings

    def inference(self, iterations):
        self.calls["iterations"] = iterations
        return list(np.exp(-self.energy))


@pytest.fixture
def field(crf_library):
    crf_library(Field)


def test_the_field_gets_labels_as_energies_and_the_image_in_bytes(field):
    image, maps = noise(3, H, W, seed=1), noise(2, H, W)
    found = crf(image, maps, threshold=0.6)
    labels, made = labels_at(maps, (0, 1), 0.6), Field.made
    assert made.shape == (3, H, W)
    assert made.energy.dtype == np.float32
    assert made.energy.flags["C_CONTIGUOUS"]
    for k in range(3):
        for p, label in enumerate(labels.flatten().tolist()):
            assert made.energy[k, p] == pytest.approx(-math.log(0.7 if label == k else 0.3 / 2), rel=1e-6)
    assert made.calls["gaussian"] == {"sxy": 3, "compat": 3}
    bilateral = made.calls["bilateral"]
    pixels = bilateral.pop("rgbim")
    assert bilateral == {"sxy": 50, "srgb": 5, "compat": 10}
    assert made.calls["iterations"] == 10
    assert (pixels.dtype, pixels.shape, pixels.flags["C_CONTIGUOUS"]) == (np.uint8, (H, W, 3), True)
    for r, c, k in ((0, 0, 0), (3, 5, 1), (H - 1, W - 1, 2)):
        assert pixels[r, c, k] == round(255 * float(image[k, r, c]))
    assert torch.equal(found, torch.stack([labels == 1, labels == 2]).double())


def spread(seen, image, maps, *, threshold):
    """A refinement that no threshold undoes: labels, one pixel further to the right the higher the threshold."""
    seen.append(threshold)
    labels = labels_at(maps, range(len(maps)), threshold).roll(round(10 * threshold), 1)
    return torch.stack([labels == n + 1 for n in range(len(maps))]).double()


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.5), (0.3, 0.3)])
def test_each_threshold_has_a_refinement_of_its_own(low, high):
    """Joined as IRN joins them, pixel by pixel."""
    image, maps, classes, seen = noise(3, H, W), noise(2, H, W, seed=1), (4, 11), []
    found = refined_labels(image, maps, classes, low=low, high=high, refine=partial(spread, seen))
    assert seen == sorted({low, high})
    background, foreground = (labels_at(spread([], image, maps, threshold=t), classes, 0.5) for t in (low, high))
    expected = torch.zeros(H, W, dtype=torch.long)
    for r in range(H):
        for c in range(W):
            bg, fg = int(background[r, c]), int(foreground[r, c])
            expected[r, c] = fg if fg else 255 if bg else 0
    assert torch.equal(found, expected)
    assert (low < high) == bool((found == 255).any())


def test_without_a_map_all_is_background(field):
    assert not refined_labels(noise(3, H, W), noise(0, H, W), (), low=0.1, high=0.2).any()


@needs_crf
def test_two_fields_are_those_of_irn():
    """Of the very library, with IRN's numbers: `crf_inference_label` and `cam_to_ir_label`, written again."""
    from pydensecrf.densecrf import DenseCRF2D

    image, maps, classes = blocks(), noise(2, 16, 16, seed=4).float(), (3, 9)
    maps[0, :8, 8:] += 0.3
    pixels = np.ascontiguousarray((255 * image).round().byte().permute(1, 2, 0).numpy())
    keys, found = np.array([0, 4, 10]), []
    for t in (0.8, 0.4):
        rough = np.argmax(np.concatenate([np.full((1, 16, 16), t, np.float32), maps.numpy()]), 0)
        energy = np.full((3, 256), -np.log(0.3 / 2), np.float32)
        energy[rough.ravel(), np.arange(256)] = -np.log(0.7)
        made = DenseCRF2D(16, 16, 3)
        made.setUnaryEnergy(energy)
        made.addPairwiseGaussian(sxy=3, compat=3)
        made.addPairwiseBilateral(sxy=50, srgb=5, rgbim=pixels, compat=10)
        found.append(keys[np.argmax(np.array(made.inference(10)), 0).reshape(16, 16)])
    expected = found[0].copy()
    expected[found[0] == 0] = 255
    expected[found[0] + found[1] == 0] = 0
    assert np.array_equal(refined_labels(image, maps, classes, low=0.4, high=0.8).numpy(), expected)
    assert 255 in expected


def test_a_gray_image_has_three_equal_colors(field):
    image = noise(1, H, W)
    crf(image, noise(1, H, W))
    pixels = Field.made.calls["bilateral"]["rgbim"]
    assert (pixels[..., :1] == pixels).all()
    assert pixels[2, 3, 1] == round(255 * float(image[0, 2, 3]))


def test_numbers_of_the_field_are_settings(field):
    crf(
        noise(3, H, W),
        noise(1, H, W),
        confidence=0.9,
        iterations=2,
        near=1.0,
        near_weight=2.0,
        far=30.0,
        color=13.0,
        far_weight=4.0,
    )
    calls = Field.made.calls
    assert calls["gaussian"] == {"sxy": 1, "compat": 2}
    assert {key: value for key, value in calls["bilateral"].items() if key != "rgbim"} == {
        "sxy": 30,
        "srgb": 13,
        "compat": 4,
    }
    assert calls["iterations"] == 2
    assert sorted(set(np.exp(-Field.made.energy).round(6).flatten().tolist())) == pytest.approx([0.1, 0.9])


def test_without_the_library_a_field_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    for ask in (lambda: crf(noise(3, H, W), noise(1, H, W)), lambda: resolve_of("crf")):
        with pytest.raises(ValueError, match=r"needs pydensecrf2: pip install 'sightline\[crf\]'"):
            ask()


@needs_crf
def test_a_field_follows_the_colors_and_takes_away_specks():
    image = blocks(side=12)
    truth = torch.zeros(24, 24, dtype=torch.bool)
    truth[:12, 12:] = True
    rough = torch.zeros(24, 24, dtype=torch.bool)
    rough[:10, 13:] = True
    rough[18, 4] = True
    found = crf(image, rough[None].double())
    assert set(found.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(found[0].bool(), truth)


@needs_crf
def test_a_field_without_an_iteration_gives_the_labels_at_its_threshold():
    maps = noise(3, H, W)
    for threshold in (0.3, 0.8):
        found = crf(noise(3, H, W, seed=1), maps, threshold=threshold, iterations=0)
        for any_level in (0.01, 0.5, 0.99):
            assert torch.equal(labels_at(found, (4, 5, 9), any_level), labels_at(maps, (4, 5, 9), threshold))


@needs_crf
def test_a_field_gives_the_same_again_and_one_label_at_most():
    image, maps = noise(3, H, W), noise(3, H, W, seed=1)
    found = crf(image, maps)
    assert torch.equal(found, crf(image, maps))
    assert float(found.sum(0).max()) <= 1


@needs_crf
@pytest.mark.parametrize(("weight", "flooded"), [(5.0, False), (6.0, True)])
def test_one_step_of_the_mean_field_by_hand(weight, flooded):
    """With widths far beyond the image every pixel hears the mean of all others, twice: in place and in color."""
    maps = torch.zeros(1, 4, 5)
    maps[0, :, :3] = 1
    found = crf(torch.zeros(3, 4, 5), maps, iterations=1, near=1e4, near_weight=weight, far=1e4, far_weight=weight)
    q = torch.where(maps[0] > 0.3, 0.7, 0.3).double()
    logit = (q / (1 - q)).log() + 2 * weight * (q.mean() - (1 - q).mean())
    assert torch.equal(found[0].bool(), logit > 0)
    assert bool(found.all()) == flooded


# Labels


def labeled_by_hand(maps, classes, low, high):
    out = torch.zeros(maps.shape[1:], dtype=torch.long)
    for r in range(maps.shape[1]):
        for c in range(maps.shape[2]):
            best, said = -math.inf, 0
            for one, label in zip(maps, classes, strict=True):
                if float(one[r, c]) > best:
                    best, said = float(one[r, c]), label + 1
            out[r, c] = said if best > high else 255 if best > low else 0
    return out


LEVELS = st.sampled_from([-1.0, 0.0, 0.2, 0.4, 0.4000001, 0.8])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(0, 3), levels=st.tuples(LEVELS, LEVELS).map(sorted))
def test_labels_pixel_by_pixel(seed, n, levels):
    maps = (5 * noise(n, 4, 6, seed=seed)).floor() / 5 - (seed % 2)
    classes, (low, high) = (7, 0, 253)[:n], levels
    found = labels_at(maps, classes, low, high)
    assert torch.equal(found, labeled_by_hand(maps, classes, low, high))
    assert torch.equal(labels_at(maps, classes, low), labeled_by_hand(maps, classes, low, low))
    assert found.dtype == torch.long
    assert torch.equal(found, confident(labels_at(maps, classes, low), labels_at(maps, classes, high)))


def test_labels_are_the_argument_of_the_maximum_over_a_constant_plane():
    """As IRN writes it."""
    maps, classes = noise(3, H, W), (2, 5, 11)
    keys = np.array([0, *(label + 1 for label in classes)])
    foreground, background = (
        keys[np.pad(maps.numpy(), ((1, 0), (0, 0), (0, 0)), constant_values=level).argmax(0)] for level in (0.9, 0.6)
    )
    expected = foreground.copy()
    expected[foreground == 0] = 255
    expected[background + foreground == 0] = 0
    assert np.array_equal(labels_at(maps, classes, 0.6, 0.9).numpy(), expected)
    assert {0, 255, 3, 6, 12} == set(expected.flatten().tolist())


def test_of_equal_maps_the_first_class_counts_and_a_map_at_the_threshold_is_background():
    maps = torch.full((2, 1, 3), 0.5)
    assert labels_at(maps, (4, 1), 0.4).tolist() == [[5, 5, 5]]
    assert labels_at(maps, (4, 1), 0.5).tolist() == [[0, 0, 0]]
    assert labels_at(maps, (4, 1), 0.4, 0.5).tolist() == [[255, 255, 255]]
    assert labels_at(maps[:0], (), 0.5).tolist() == [[0, 0, 0]]


def test_what_is_wrong_with_labels_is_said(plain):
    maps = noise(2, 2, 2)
    with pytest.raises(ValueError, match=r"expected low <= high, got low=0\.3, high=0\.05"):
        labels_at(maps, (0, 1), 0.3, 0.05)
    with pytest.raises(ValueError, match="expected low <= high, got low=nan"):
        labels_at(maps, (0, 1), math.nan)
    with pytest.raises(ValueError, match="masks hold classes 0 to 253, as 1 to 254, got class 254"):
        labels_at(maps, (0, 254), 0.3)
    with pytest.raises(ValueError, match="got class -1"):
        labels_at(maps, (-1, 4), 0.3)
    with pytest.raises(ValueError, match=r"expected a class for each of 2 maps, got \[3\]"):
        labels_at(maps, (3,), 0.3)


# Names


@pytest.mark.parametrize("what", ["smooth", "superpixel?min_size=9", "basic", {"name": "smooth", "sigma": 2.0}])
def test_maps_that_were_not_divided_stay_so(what):
    image, maps = noise(3, H, W), 7 * noise(2, H, W)
    found = resolve_of(what, divided=False)(image, maps)
    name, settings = Choice.of(what).name, Choice.of(what).settings
    raw = {} if name == "basic" else {"renormalize": False}
    same(found, RESOLVES[name](image, maps, **settings, **raw))
    assert float(found.amax()) > 1.5
    if name != "basic":
        asked = Choice(name, {**settings, "renormalize": True}).plain()
        assert float(resolve_of(asked, divided=False)(image, maps).amax()) == 1


def test_a_resolve_is_found_by_its_name_and_settings():
    assert resolve_of("basic") is basic
    assert resolve_of(smooth) is smooth
    for what in ("smooth?sigma=3&renormalize=false", {"name": "smooth", "sigma": 3, "renormalize": False}):
        found = resolve_of(what)
        assert isinstance(found, partial)
        assert (found.func, found.keywords) == (smooth, {"sigma": 3.0, "renormalize": False})
        assert type(found.keywords["sigma"]) is float
        assert describe(found) == "smooth(sigma=3.0, renormalize=False)"
    maps = noise(2, H, W)
    image = noise(3, H, W)
    same(resolve_of("superpixel?min_size=9")(image, maps), superpixel(image, maps, min_size=9))
    assert list(RESOLVES) == ["basic", "smooth", "superpixel", "crf"]


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("smoth", LookupError, "no background resolve called 'smoth'; did you mean smooth"),
        ("smooth?sigmas=3", LookupError, "smooth: no setting called 'sigmas'; did you mean sigma"),
        ("smooth?image=3", LookupError, "smooth: no setting called 'image'"),
        ("basic?sigma=3", LookupError, "basic: no setting called 'sigma'; known: none"),
        ("smooth?size=12", ValueError, "smooth: expected a window of an odd size of at least 1 pixel, got size=12"),
        ("smooth?size=-1", ValueError, "got size=-1"),
        ("smooth?sigma=-1", ValueError, r"smooth: expected sigma >= 0 pixels, got sigma=-1\.0"),
        ("smooth?sigma=nan", ValueError, "got sigma=nan"),
        ("smooth?size=5.0", TypeError, r"smooth: size: expected a whole number, got 5\.0"),
        ("smooth?sigma=wide", TypeError, "smooth: sigma: expected a number, got 'wide'"),
        ("smooth?sigma=true", TypeError, "smooth: sigma: expected a number, got True"),
        ("smooth?renormalize=1", TypeError, "smooth: renormalize: expected true or false, got 1"),
        ("superpixel?scale=0", ValueError, r"superpixel: expected scale > 0, .* got scale=0\.0, sigma=0\.5"),
        ("superpixel?sigma=-1", ValueError, r"got scale=100\.0, sigma=-1\.0"),
        ("superpixel?min_size=-1", ValueError, "min_size=-1"),
        ("crf?confidence=1", ValueError, "crf: expected iterations >= 0 and 0 < confidence < 1, got iterations=10"),
        ("crf?iterations=-1", ValueError, "got iterations=-1"),
        ("crf?color=0", ValueError, r"crf: expected widths and weights above 0, got {'color': 0\.0}"),
        ({"sigma": 3}, ValueError, "expected a table with a name"),
        (3, TypeError, "expected a name or a table with a name, got 3"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(what, error, text, plain):
    with pytest.raises(error, match=text):
        resolve_of(what)
