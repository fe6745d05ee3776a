import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from sightline.maps import binarize, blur, box, components, degenerate, largest, resize, scaled, unit


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(*rows):
    return torch.tensor([[character == "#" for character in row] for row in rows])


def slow_bilinear(image, h, w, corners):
    """Resample one image (i, j) pixel by pixel."""
    i, j = image.shape
    result = torch.zeros(h, w, dtype=image.dtype)
    for row in range(h):
        for column in range(w):
            down = row * (i - 1) / (h - 1) if corners else max((row + 0.5) * i / h - 0.5, 0)
            across = column * (j - 1) / (w - 1) if corners else max((column + 0.5) * j / w - 0.5, 0)
            top, left = min(int(down), i - 1), min(int(across), j - 1)
            bottom, right = min(top + 1, i - 1), min(left + 1, j - 1)
            a, b = down - top, across - left
            upper = (1 - b) * image[top, left] + b * image[top, right]
            lower = (1 - b) * image[bottom, left] + b * image[bottom, right]
            result[row, column] = (1 - a) * upper + a * lower
    return result


@pytest.mark.parametrize(("mode", "corners"), [("bilinear", False), ("bilinear_corners", True)])
@pytest.mark.parametrize("size", [(9, 11), (3, 8)])
def test_bilinear_resizing_is_its_formula(mode, corners, size):
    maps = rand(2, 2, 4, 5)
    result = resize(maps, size, mode)
    torch.testing.assert_close(result[1, 0], slow_bilinear(maps[1, 0], *size, corners), rtol=0, atol=1e-12)
    expected = F.interpolate(maps, size, mode="bilinear", align_corners=corners)
    assert torch.equal(result, expected)


def test_bilinear_without_corners_is_the_default_and_nothing_changes_at_the_same_size():
    maps = rand(2, 1, 4, 5)
    assert torch.equal(resize(maps, (9, 11)), resize(maps, (9, 11), "bilinear"))
    assert not torch.equal(resize(maps, (9, 11)), resize(maps, (9, 11), "bilinear_corners"))
    assert resize(maps, (4, 5)) is maps


def test_nearest_repeats_cells():
    maps = rand(1, 1, 2, 3)
    assert torch.equal(resize(maps, (4, 9), "nearest"), maps.repeat_interleave(2, 2).repeat_interleave(3, 3))


def test_bicubic_overshoots_and_bilinear_does_not():
    step = torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]]])
    cubic = resize(step, (1, 40), "bicubic")
    assert cubic.max() > 1.01
    assert cubic.min() < -0.01
    assert resize(step, (1, 40)).min() == 0
    assert resize(step, (1, 40)).max() == 1
    torch.testing.assert_close(cubic, F.interpolate(step, (1, 40), mode="bicubic", align_corners=False))


def test_unit_is_range_normalization_of_each_channel():
    maps = 5 * rand(2, 3, 4, 5) - 2
    for b in range(2):
        for c in range(3):
            values = maps[b, c].flatten().tolist()
            expected = [(value - min(values)) / (max(values) - min(values)) for value in values]
            assert unit(maps)[b, c].flatten().tolist() == pytest.approx(expected, abs=1e-15)
    assert unit(maps).amin((2, 3)).eq(0).all()
    assert unit(maps).amax((2, 3)).eq(1).all()


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30, 1e-40])
def test_unit_of_a_constant_is_zero_and_has_a_finite_gradient(value):
    maps = torch.full((1, 1, 2, 3), value, requires_grad=True)
    result = unit(maps)
    assert not result.any()
    (gradient,) = torch.autograd.grad((result * torch.arange(6.0).view(1, 1, 2, 3)).sum(), maps)
    assert gradient.isfinite().all()


def test_unit_is_differentiable_through_minimum_and_maximum():
    maps = rand(2, 1, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(unit, (maps,))
    weights = rand(1, 1, 3, 4, seed=2)
    (gradient,) = torch.autograd.grad((unit(maps) * weights).sum(), maps)
    low, high = maps[0].flatten().argmin(), maps[0].flatten().argmax()
    assert abs(gradient[0].flatten()[low]) > 1e-3
    assert abs(gradient[0].flatten()[high]) > 1e-3


def test_degenerate_maps_are_named():
    maps = torch.stack(
        [torch.zeros(2, 3), torch.ones(2, 3), torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3)]
    )
    maps[3, 0, 0] = torch.nan
    assert degenerate(maps[:, None]) == ["all zero", "constant", None, "not finite"]


@pytest.mark.parametrize(("padding", "mode"), [("reflect", "mirror"), ("replicate", "nearest"), ("zeros", "constant")])
@pytest.mark.parametrize("sigma", [0.6, 2.0])
def test_blur_is_a_gaussian_of_scipy(padding, mode, sigma):
    x = rand(2, 3, 13, 17)
    result = blur(x, sigma, padding=padding)
    for b in range(2):
        for c in range(3):
            expected = ndimage.gaussian_filter(x[b, c].numpy(), sigma, mode=mode, radius=math.ceil(4 * sigma))
            np.testing.assert_allclose(result[b, c], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["reflect", "replicate"])
@pytest.mark.parametrize("shape", [(4, 5), (1, 1), (2, 1)])
def test_a_huge_sigma_on_a_tiny_image(padding, shape):
    x = rand(1, 2, *shape)
    result = blur(x, 50.0, padding=padding)
    assert result.shape == x.shape
    assert result.isfinite().all()
    mode = "mirror" if padding == "reflect" else "nearest"
    expected = ndimage.gaussian_filter(x[0, 0].numpy(), 50.0, mode=mode, radius=200)
    np.testing.assert_allclose(result[0, 0], expected, rtol=0, atol=1e-9)


def test_the_kernel_sums_to_one_and_has_its_radius():
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    spread = blur(point, 3.0)
    assert spread.sum().item() == pytest.approx(1)
    assert box(spread[0, 0] > 0) == (8, 8, 33, 33)
    assert box(blur(point, 5.0, radius=5)[0, 0] > 0) == (15, 15, 26, 26)
    assert (spread[0, 0, 20, 21] / spread[0, 0, 20, 20]).item() == pytest.approx(math.exp(-1 / 18))
    ones = torch.ones(1, 2, 9, 9, dtype=torch.float64)
    for padding in ("reflect", "replicate"):
        torch.testing.assert_close(blur(ones, 2.0, padding=padding), ones)
    assert blur(ones, 2.0, padding="zeros")[0, 0, 0, 0] < 0.5


def test_blur_without_sigma_and_with_a_negative_one():
    x = rand(1, 1, 3, 3)
    assert blur(x, 0.0) is x
    with pytest.raises(ValueError, match=r"expected sigma >= 0 pixels, got -1\.0"):
        blur(x, -1.0)


def test_binarize_marks_cells_at_or_above_each_threshold():
    maps = torch.tensor([[[[0.0, 0.5, 1.0]]], [[[0.0, 0.5, 1.0]]]])
    marked = binarize(maps, torch.tensor([0.5, 0.6]))
    assert marked.flatten(1).tolist() == [[False, True, True], [False, False, True]]


SPOTS = mask("##...", "..#.#", "..#.#", ".....", "###..")


def flood(spots, diagonal):
    """Count connected regions by walking them."""
    left, regions = {tuple(cell) for cell in spots.nonzero().tolist()}, []
    around = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0) and (diagonal or 0 in (a, b))]
    while left:
        front = [left.pop()]
        region = set(front)
        while front:
            row, column = front.pop()
            near = {(row + a, column + b) for a, b in around} & left
            left -= near
            region |= near
            front += near
        regions.append(frozenset(region))
    return set(regions)


@pytest.mark.parametrize(("connectivity", "count"), [(4, 4), (8, 3)])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_components_are_the_regions_that_a_walk_finds(connectivity, count, seed):
    spots = SPOTS if seed is None else rand(9, 11, seed=seed) > 0.6
    labels, found = components(spots, connectivity=connectivity)
    regions = {frozenset(map(tuple, (labels == n).nonzero().tolist())) for n in range(1, found + 1)}
    assert regions == flood(spots, connectivity == 8)
    assert found == len(regions)
    assert torch.equal(labels > 0, spots)
    assert seed is not None or found == count


def test_the_largest_region_and_of_equal_ones_the_first():
    assert torch.equal(largest(SPOTS), mask(".....", ".....", ".....", ".....", "###.."))
    assert torch.equal(largest(SPOTS, connectivity=8), mask("##...", "..#..", "..#..", ".....", "....."))
    assert torch.equal(largest(SPOTS[:4]), mask("##...", ".....", ".....", "....."))
    assert not largest(torch.zeros(3, 4, dtype=torch.bool)).any()


def test_the_box_is_tight_and_half_open():
    assert box(mask(".....", "..#..", "...#.", ".....")) == (2, 1, 4, 3)
    assert box(mask("#")) == (0, 0, 1, 1)
    assert box(torch.ones(3, 5, dtype=torch.bool)) == (0, 0, 5, 3)
    assert box(torch.zeros(3, 5, dtype=torch.bool)) == (0, 0, 0, 0)


def test_scaling_makes_a_constant_map_zero_and_not_its_rounding_errors():
    constant = torch.full((1, 1, 2, 2), 0.7)
    assert scaled(constant, (7, 9)).abs().max() == 0
    assert scaled(constant.double() * 0 + 0.3, (24, 32)).abs().max() == 0
    varied = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scaled(varied, (6, 5)), unit(resize(varied, (6, 5))))
