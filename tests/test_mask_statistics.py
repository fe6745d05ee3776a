"""Statistics of maps, pixel by pixel."""

import math
from statistics import pstdev, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import nn

from sightline.accumulate import Accumulate
from sightline.classifier import wrap
from sightline.data import Sample, collate
from sightline.evaluation import finite, summed
from sightline.maps import resize, unit
from sightline.metrics import Case, area, area_deviation, entropy, total_variation
from sightline.runs import Choice

NETWORK = wrap(nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), normalization="none", size=8)
"""A case has one; the statistics do not ask it."""

METRICS = (total_variation, entropy, area, area_deviation)


def case(raw, size=None, start=0):
    size = size or (raw.shape[2], raw.shape[3])
    batch = collate([Sample(str(start + i), torch.zeros(3, *size), label=0) for i in range(len(raw))])
    raw = finite(raw)
    return Case(NETWORK, batch.x, batch.y, unit(resize(raw, size)), raw, NETWORK, batch, torch.zeros(len(raw), 5))


def numbers(measure, raw, size=None):
    return measure(case(raw, size))[:, 0].tolist()


def summed_up(measure, cases):
    sums, done = Accumulate(measure), 0
    for one in cases:
        sums.update(measure(one), torch.arange(done, done + len(one.x)))
        done += len(one.x)
    return summed(Choice("statistic"), sums)


def slow(values):
    """Total variation (sum, mean), entropy (one-sided, both), and mean of one map."""
    h, w = len(values), len(values[0])
    across = [(values[r][c + 1] - values[r][c]) ** 2 for r in range(h) for c in range(w - 1)]
    down = [(values[r + 1][c] - values[r][c]) ** 2 for r in range(h - 1) for c in range(w)]
    pixels = [v for row in values for v in row]
    one = -sum(m * math.log2(m) for m in pixels if 0 < m < 1) / (h * w)
    both = one - sum((1 - m) * math.log2(1 - m) for m in pixels if 0 < m < 1) / (h * w)
    mean = sum(across) / max(1, len(across)) + sum(down) / max(1, len(down))
    return sum(across) + sum(down), mean, one, both, 100 * sum(pixels) / (h * w)


STATISTICS = (
    lambda of: total_variation(of=of),
    lambda of: total_variation(reduce="mean", of=of),
    lambda of: entropy(of=of),
    lambda of: entropy(sides="both", of=of),
    lambda of: area(of=of),
)


@settings(max_examples=40, deadline=None)
@given(
    arrays(
        "float64",
        array_shapes(min_dims=2, max_dims=2, max_side=5),
        elements=st.integers(0, 64).map(lambda n: n / 64),
    )
)
def test_statistics_are_those_of_the_pixels(values):
    raw = torch.from_numpy(values)[None, None]
    for i, make in enumerate(STATISTICS):
        assert numbers(make("raw"), raw) == pytest.approx([slow(values.tolist())[i]], abs=1e-9)
        scaled = unit(raw)[0, 0].tolist()
        assert numbers(make("saliency"), 3 * raw - 1) == pytest.approx([slow(scaled)[i]], abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_statistics_keep_their_bounds(seed):
    raw = torch.rand(3, 1, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = [numbers(make("saliency"), raw) for make in STATISTICS]
    for row, top in zip(found, (31, 2, math.log2(math.e) / math.e, 1, 100), strict=True):
        assert all(0 <= value <= top + 1e-12 for value in row)
    flipped = [numbers(make("saliency"), 1 - raw) for make in STATISTICS]
    for i in (0, 1, 3):
        assert flipped[i] == pytest.approx(found[i], abs=1e-9), "what is not salient is as regular, and as decided"
    assert flipped[4] == pytest.approx([100 - value for value in found[4]], abs=1e-9)


def test_a_constant_map_does_not_vary_and_a_binary_one_is_decided():
    for value in (0.0, 0.5, 1.0):
        flat = torch.full((1, 1, 4, 6), value, dtype=torch.float64)
        for reduce in ("sum", "mean"):
            assert numbers(total_variation(reduce=reduce, of="raw"), flat) == [0.0]
        assert numbers(area(of="raw"), flat) == [100 * value]
        assert numbers(area(), flat) == [0.0], "scaled, a constant map is zero"
    binary = (torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    for sides in ("one", "both"):
        assert numbers(entropy(sides=sides), binary) == numbers(entropy(sides=sides, of="raw"), binary) == [0.0, 0.0]
    half, third = (torch.full((1, 1, 2, 2), value, dtype=torch.float64) for value in (0.5, 1 / math.e))
    assert numbers(entropy(sides="both", of="raw"), half) == [1.0]
    assert numbers(entropy(of="raw"), half) == [0.5]
    assert numbers(entropy(of="raw"), third) == pytest.approx([math.log2(math.e) / math.e])


def test_a_board_of_single_pixels_varies_most():
    board = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])[None, None]
    assert numbers(total_variation(), board) == [7.0]
    assert numbers(total_variation(reduce="mean"), board) == [2.0]
    stripes = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])[None, None]
    assert numbers(total_variation(), stripes) == [4.0]
    assert numbers(total_variation(reduce="mean"), stripes) == [1.0]
    line = torch.tensor([[0.0, 1.0, 1.0, 0.0]])[None, None]
    assert numbers(total_variation(reduce="mean"), line) == pytest.approx([2 / 3])
    assert numbers(total_variation(reduce="mean"), line.mT) == pytest.approx([2 / 3])


def test_a_map_that_is_not_finite_is_zero():
    raw = torch.full((1, 1, 2, 2), torch.nan)
    for make in STATISTICS:
        assert numbers(make("saliency"), raw) == numbers(make("raw"), raw) == [0.0]


def test_the_raw_map_is_seen_at_the_images_resolution_and_not_scaled():
    raw = torch.tensor([[0.25, 0.75], [0.5, 0.75]], dtype=torch.float64)[None, None]
    shown = resize(raw, (6, 5))
    for i, make in enumerate(STATISTICS):
        expected = slow(shown[0, 0].tolist())[i]
        assert numbers(make("raw"), raw, (6, 5)) == pytest.approx([expected], abs=1e-9)
        assert numbers(make("saliency"), raw, (6, 5)) != pytest.approx([expected], abs=1e-3)


def areas(seed, n=7):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(n, 1, 3, 4, generator=generator, dtype=torch.float64)
    return raw * torch.rand(n, 1, 1, 1, generator=generator, dtype=torch.float64), generator


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7))
def test_the_deviation_is_that_of_all_images_whatever_the_batches(seed, size):
    raw, generator = areas(seed)
    means = [100 * float(one.mean()) for one in raw]
    order = torch.randperm(7, generator=generator)
    shuffled = raw[order]
    parts = [case(shuffled[i : i + size], start=i) for i in range(0, 7, size)]
    found = summed_up(area_deviation(of="raw"), parts)
    assert found.value == pytest.approx(pstdev(means), abs=1e-9)
    assert (found.count, found.per_image, found.higher_is_better) == (7, (), None)


def test_maps_of_one_size_do_not_deviate():
    raw = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    assert summed_up(area_deviation(of="raw"), [case(raw)]).value == pytest.approx(0, abs=1e-5)
    assert summed_up(area_deviation(of="raw"), [case(raw.expand(30, 1, 4, 4))] * 3).value == pytest.approx(0, abs=1e-5)


def test_the_deviation_of_batches_is_averaged_over_the_images():
    raw, _ = areas(3)
    means = [100 * float(one.mean()) for one in raw]
    measure = area_deviation(over="batch", of="raw")
    found = summed_up(measure, [case(raw[:4]), case(raw[4:6]), case(raw[6:])])
    assert found.value == pytest.approx((4 * stdev(means[:4]) + 2 * stdev(means[4:6])) / 6, abs=1e-9)
    assert (found.count, found.per_image) == (6, ()), "one image alone does not deviate"
    assert math.isnan(summed_up(measure, [case(raw[6:])]).value)


def test_the_mean_over_the_data_set_is_reported():
    raw, _ = areas(5)
    for i, make in enumerate(STATISTICS):
        expected = [slow(one[0].tolist())[i] for one in raw]
        found = summed_up(make("raw"), [case(raw[:3]), case(raw[3:])])
        assert found.value == pytest.approx(sum(expected) / 7, abs=1e-9)
        assert found.per_image == pytest.approx(expected, abs=1e-9)
        assert found.higher_is_better is None


def test_what_is_wrong_is_said(plain):
    raw = torch.tensor([[0.0, 1.0]])[None, None].repeat(2, 1, 1, 1)
    for make in METRICS:
        with pytest.raises(LookupError, match="no map called 'maps'"):
            make(of="maps")
        for low, high in ((-0.5, 1.0), (0.0, 1.25)):
            wrong = raw.clone()
            wrong[1, 0, 0] = torch.tensor([low, high])
            said = rf"{make.__name__}\(of='raw'\) needs maps in .0, 1., and that of '1' goes from {low:g} to {high:g};"
            with pytest.raises(ValueError, match=said):
                make(of="raw")(case(wrong))
    with pytest.raises(LookupError, match="no reduction called 'total'"):
        total_variation(reduce="total")
    with pytest.raises(LookupError, match="no entropy called 'two'; known: both, one"):
        entropy(sides="two")
    with pytest.raises(LookupError, match="no range called 'batches'; did you mean batch"):
        area_deviation(over="batches")
