"""Similarity: ranks, windows and histograms counted by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.metrics._similarity import Traits, alike, hog_spearman, spearman, ssim


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ranks(values):
    """One plus how many are smaller, plus half of how many others are equal."""
    return [1 + sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def correlation(a, b):
    n = len(a)
    ma, mb = sum(a) / n, sum(b) / n
    top = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.sampled_from([3, 10, 10**9]))
def test_spearman_is_the_correlation_of_ranks_with_ties_shared(seed, steps):
    a, b = ((noise(5, 6, seed=seed + n) * steps).round() / steps - 0.4 for n in (0, 1))
    for absolute in (False, True):
        x, y = ([abs(v) if absolute else v for v in one.flatten().tolist()] for one in (a, b))
        found = spearman(a, b, absolute=absolute)
        assert found == pytest.approx(correlation(ranks(x), ranks(y)), abs=1e-12)
        assert -1 - 1e-12 <= found <= 1 + 1e-12
        assert found == pytest.approx(spearman(b, a, absolute=absolute), abs=1e-12)


def test_a_map_is_like_itself_and_ranks_see_no_monotone_change():
    a, b = noise(60, 50) - 0.5, noise(60, 50, seed=1) - 0.5
    for like in (spearman, ssim, hog_spearman):
        assert like(a, a) == pytest.approx(1, abs=1e-12)
        assert like(a, b) < 0.5
        assert like(3 * a + 2, b) == pytest.approx(like(a, b), abs=1e-9)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, -a, absolute=True) == pytest.approx(1)
    assert spearman(a, (5 * b).exp()) == pytest.approx(spearman(a, b), abs=1e-12)


def structure(a, b, side=11, window=11):
    """SSIM with Gaussian weights, one window after the other, those that lie inside."""
    sigma, reach, near = 1.5, 5, (side - 1) // 2
    h, w = len(a), len(a[0])
    line = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)]
    line = [v / sum(line) for v in line]
    scale = window**2 / (window**2 - 1)

    def at(image, r, c):
        r, c = (v if 0 <= v < n else -1 - v if v < 0 else 2 * n - 1 - v for v, n in ((r, h), (c, w)))
        return image[r][c]

    total = []
    for r in range(near, h - near):
        for c in range(near, w - near):
            moments = [0.0] * 5
            for i in range(-reach, reach + 1):
                for j in range(-reach, reach + 1):
                    g, x, y = line[i + reach] * line[j + reach], at(a, r + i, c + j), at(b, r + i, c + j)
                    moments = [m + g * v for m, v in zip(moments, (x, y, x * x, y * y, x * y), strict=True)]
            mx, my, xx, yy, xy = moments
            vx, vy, vxy = scale * (xx - mx * mx), scale * (yy - my * my), scale * (xy - mx * my)
            c1, c2 = 0.01**2, 0.03**2
            total.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return sum(total) / len(total)


def scaled(one):
    low, high = float(one.min()), float(one.max())
    return [[(v - low) / (high - low) for v in row] for row in one.tolist()]


@pytest.mark.parametrize(("shape", "side"), [((13, 12), 11), ((8, 9), 7), ((7, 20), 7)])
def test_ssim_is_the_mean_over_windows(shape, side):
    a, b = noise(*shape) * 4 - 1, noise(*shape, seed=1)
    b = b + a / 3
    assert ssim(a, b) == pytest.approx(structure(scaled(a), scaled(b), side, side), abs=1e-9)


def histograms(image, cell):
    """HOG: gradients by central differences, 9 orientations a cell, blocks of 3 x 3 with clipped L2 norms."""
    h, w = len(image), len(image[0])
    rows, columns = h // cell, w // cell
    cells = [[[0.0] * 9 for _ in range(columns)] for _ in range(rows)]
    for r in range(rows * cell):
        for c in range(columns * cell):
            dy = image[r + 1][c] - image[r - 1][c] if 0 < r < h - 1 else 0.0
            dx = image[r][c + 1] - image[r][c - 1] if 0 < c < w - 1 else 0.0
            angle = math.degrees(math.atan2(dy, dx)) % 180
            cells[r // cell][c // cell][min(int(angle // 20), 8)] += math.hypot(dx, dy) / cell**2
    found = []
    for r in range(rows - 2):
        for c in range(columns - 2):
            block = [v for i in range(3) for j in range(3) for v in cells[r + i][c + j]]
            norm = math.sqrt(sum(v * v for v in block) + 1e-10)
            block = [min(v / norm, 0.2) for v in block]
            norm = math.sqrt(sum(v * v for v in block) + 1e-10)
            found += [v / norm for v in block]
    return found


@pytest.mark.parametrize(("shape", "cell"), [((64, 50), 16), ((28, 30), 9), ((6, 31), 2)])
def test_histograms_of_gradients_are_ranked(shape, cell):
    a, b = noise(*shape), noise(*shape, seed=1)
    b = b + a
    expected = correlation(*(ranks(histograms(scaled(one), cell)) for one in (a, b)))
    assert hog_spearman(a, b) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 2.5, math.nan, math.inf])
def test_a_map_that_says_nothing(value):
    a, flat = noise(50, 50), torch.full((50, 50), value, dtype=torch.float64)
    assert math.isnan(spearman(a, flat))
    assert math.isnan(spearman(flat, flat))
    assert math.isnan(hog_spearman(flat, a))
    if math.isfinite(value):
        assert ssim(a, flat) == pytest.approx(ssim(a, 0 * flat))
        assert ssim(flat, flat) == 1
    else:
        assert math.isnan(ssim(a, flat))
    one = a.clone()
    one[3, 4] = math.inf
    assert all(math.isnan(like(a, one)) for like in (spearman, ssim, hog_spearman))
    signs = torch.where(a > 0.5, 1.0, -1.0)
    assert math.isnan(spearman(a, signs, absolute=True))
    assert not math.isnan(spearman(a, signs))


def test_the_smallest_maps():
    for shape in ((1, 1), (2, 40), (40, 2)):
        assert math.isnan(ssim(noise(*shape), noise(*shape, seed=1)))
        assert math.isnan(hog_spearman(noise(*shape), noise(*shape, seed=1)))
    assert math.isnan(spearman(noise(1, 1), noise(1, 1)))
    assert spearman(noise(1, 2), noise(1, 2)) == pytest.approx(1)
    assert math.isfinite(ssim(noise(3, 3), noise(3, 3, seed=1)))
    assert math.isfinite(hog_spearman(noise(3, 3), noise(3, 3, seed=1)))


def test_single_precision_is_read_as_double():
    a, b = noise(40, 40), noise(40, 40, seed=1)
    for like in (spearman, ssim, hog_spearman):
        assert like(a.float(), b.float()) == pytest.approx(like(a.float().double(), b.float().double()), abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_traits_compare_as_the_functions_do(shift):
    a, b = noise(40, 50) - shift, noise(40, 50, seed=1) - shift
    one, two = Traits.of(a), Traits.of(b)
    assert alike(one, two) == (spearman(a, b), spearman(a, b, absolute=True), ssim(a, b), hog_spearman(a, b))
    assert alike(one, one) == pytest.approx((1, 1, 1, 1), abs=1e-12)
    for nothing in (torch.full((4, 4), 2.0), torch.tensor([[0.0, math.nan]]), torch.tensor([[0.0, -math.inf]])):
        assert Traits.of(nothing) is None
    assert all(map(math.isnan, (*alike(None, one), *alike(one, None), *alike(None, None))))
