"""Peaks, the three threshold rules and their boxes: hand-made maps, and slow loops over one map."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sightline.maps import box, boxes, peak, scale, threshold

RULES = ("value", "energy", "mean")

HAND = [
    [0.0, 1.0, 2.0, 1.0],
    [1.0, 4.0, 8.0, 1.0],
    [0.0, 2.0, 6.0, 2.0],
    [0.0, 0.0, 3.0, 1.0],
]
"""Sums to 32, mean 2."""


def maps(*rows):
    return torch.tensor(rows, dtype=torch.float64).view(1, 1, len(rows), -1)


def marks(*rows):
    return torch.tensor([[[[character == "#" for character in row] for row in rows]]])


def slow_threshold(rows, alpha, rule):
    """Return one map's kept cells as nested lists."""
    cells = [(value, i, j) for i, row in enumerate(rows) for j, value in enumerate(row)]
    values = [value for value, _, _ in cells]
    if rule == "value":
        bound = alpha * (max(values) - min(values))
        return [[value - min(values) >= bound for value in row] for row in rows]
    if rule == "mean":
        return [[value >= alpha * (sum(values) / len(values)) for value in row] for row in rows]
    kept, sum_so_far = [[False] * len(row) for row in rows], 0.0
    total = 0.0
    for value, _, _ in sorted(cells, key=lambda cell: -cell[0]):
        total += value
    for value, i, j in sorted(cells, key=lambda cell: -cell[0]):  # stable: equal cells in row-major order
        sum_so_far += value
        if not sum_so_far < alpha * total:
            break
        kept[i][j] = True
    return kept


def slow_box(kept, h, w):
    """Resize by nearest neighbor and walk over all pixels."""
    i, j = len(kept), len(kept[0])
    found = [(r, c) for r in range(h) for c in range(w) if kept[r * i // h][c * j // w]]
    if not found:
        return [0, 0, w, h]
    rows, columns = zip(*found, strict=True)
    return [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


@pytest.mark.parametrize(
    ("rule", "alpha", "expected", "corners"),
    [
        ("value", 0.5, marks("....", ".##.", "..#.", "...."), [1, 1, 3, 3]),
        ("value", 0.25, marks("..#.", ".##.", ".###", "..#."), [1, 0, 4, 4]),
        ("value", 0.0, marks("####", "####", "####", "####"), [0, 0, 4, 4]),
        ("value", 1.0, marks("....", "..#.", "....", "...."), [2, 1, 3, 2]),
        ("energy", 0.5, marks("....", "..#.", "..#.", "...."), [2, 1, 3, 3]),
        ("energy", 18 / 32, marks("....", "..#.", "..#.", "...."), [2, 1, 3, 3]),
        ("energy", 18.1 / 32, marks("....", ".##.", "..#.", "...."), [1, 1, 3, 3]),
        ("energy", 0.25, marks("....", "....", "....", "...."), [0, 0, 4, 4]),
        ("energy", 0.0, marks("....", "....", "....", "...."), [0, 0, 4, 4]),
        ("energy", 1.0, marks(".###", "####", ".###", "..#."), [0, 0, 4, 4]),
        ("mean", 1.0, marks("..#.", ".##.", ".###", "..#."), [1, 0, 4, 4]),
        ("mean", 3.0, marks("....", "..#.", "..#.", "...."), [2, 1, 3, 3]),
        ("mean", 4.5, marks("....", "....", "....", "...."), [0, 0, 4, 4]),
        ("mean", 0.0, marks("####", "####", "####", "####"), [0, 0, 4, 4]),
    ],
)
def test_rules_and_boxes_of_a_hand_made_map(rule, alpha, expected, corners):
    kept = threshold(maps(*HAND), alpha, rule)
    assert torch.equal(kept, expected)
    assert boxes(kept, (4, 4)).tolist() == [corners]


def test_energy_cuts_a_tie_in_row_major_order():
    assert torch.equal(threshold(maps([1, 2, 2], [2, 2, 1]), 0.65, "energy"), marks(".##", "#.."))
    flat = threshold(torch.ones(2, 1, 3, 3), 0.5, "energy")
    assert torch.equal(flat, marks("###", "#..", "...").expand(2, 1, 3, 3))


def test_energy_of_a_map_with_negative_values_ends_at_the_first_crossing():
    assert torch.equal(threshold(maps([5, 3, -4], [1, 0, -1]), 0.9, "energy"), marks("...", "..."))
    assert torch.equal(threshold(maps([3, 3, 0], [-1, 0, -1]), 0.9, "energy"), marks("#..", "..."))
    assert not threshold(maps([1, -5]), 0.5, "energy").any(), "not the lowest cell alone"


def test_value_is_the_default_and_ignores_offset_and_scale():
    saliency = torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = threshold(saliency, 0.375, "value")
    assert torch.equal(threshold(saliency, 0.375), expected)
    assert torch.equal(threshold(4 * saliency - 8, 0.375), expected)
    for rule in ("energy", "mean"):
        assert torch.equal(threshold(4 * saliency, 0.375, rule), threshold(saliency, 0.375, rule))
        assert not torch.equal(threshold(saliency + 8, 0.375, rule), threshold(saliency, 0.375, rule))


grids = st.integers(1, 5).flatmap(
    lambda i: st.integers(1, 5).flatmap(lambda j: arrays("float64", (3, i, j), elements=st.integers(0, 6)))
)


@settings(max_examples=60)
@given(grids, st.integers(0, 20), st.sampled_from(RULES), st.sampled_from([(1, 1), (4, 6), (7, 5), (10, 3)]))
def test_a_batch_is_its_maps_one_by_one(values, step, rule, size):
    alpha = step / 20 * (2.5 if rule == "mean" else 1)
    kept = threshold(torch.from_numpy(values)[:, None], alpha, rule)
    found = boxes(kept, size)
    for n, rows in enumerate(values.tolist()):
        expected = slow_threshold(rows, alpha, rule)
        assert kept[n, 0].tolist() == expected
        assert found[n].tolist() == slow_box(expected, *size)


@settings(max_examples=30)
@given(grids, st.sampled_from(RULES))
def test_more_alpha_keeps_less_by_value_and_mean_and_more_by_energy(values, rule):
    saliency = torch.from_numpy(values)[:, None]
    kept = [threshold(saliency, step / 10, rule) for step in range(11)]
    for small, large in zip(kept[1:], kept[:-1], strict=True):
        few, many = (large, small) if rule == "energy" else (small, large)
        assert bool((many | ~few).all())


def test_boxes_take_far_off_cells_in_and_half_open_corners():
    kept = marks("#....", ".....", "...#.")
    assert boxes(kept, (3, 5)).tolist() == [[0, 0, 4, 3]]
    assert boxes(kept, (6, 10)).tolist() == [[0, 0, 8, 6]]
    assert tuple(boxes(kept, (3, 5))[0].int().tolist()) == box(kept[0, 0])


def test_boxes_of_empty_masks_are_the_whole_image_and_leave_the_others_alone():
    kept = torch.cat([marks("..", ".."), marks("..", "#."), marks("..", "..")])
    assert boxes(kept, (6, 4)).tolist() == [[0, 0, 4, 6], [0, 3, 2, 6], [0, 0, 4, 6]]


def test_a_constant_map_is_kept_whole_by_value_and_a_broken_one_not_at_all():
    assert threshold(torch.zeros(1, 1, 2, 2), 0.9).all()
    broken = torch.full((1, 1, 2, 2), math.nan)
    for rule in RULES:
        assert boxes(threshold(broken, 0.5, rule), (4, 4)).tolist() == [[0, 0, 4, 4]]


@pytest.mark.parametrize(
    ("alpha", "rule", "error", "message"),
    [
        (0.5, "median", LookupError, "no threshold rule called 'median'; known: energy, mean, value"),
        (1.1, "value", ValueError, r"expected alpha in \[0, 1\] for rule 'value', got 1.1"),
        (-0.1, "energy", ValueError, r"expected alpha in \[0, 1\] for rule 'energy', got -0.1"),
        (-0.1, "mean", ValueError, "expected alpha >= 0 for rule 'mean', got -0.1"),
        (math.nan, "mean", ValueError, "got nan"),
    ],
)
def test_wrong_rules_and_shares_are_errors(alpha, rule, error, message, plain):
    with pytest.raises(error, match=message):
        threshold(maps(*HAND), alpha, rule)


# Peaks


def test_the_peak_is_the_center_of_the_highest_cell():
    assert peak(maps(*HAND)).tolist() == [[2.5, 1.5]]
    assert peak(maps([0, 1], [0, 0], [0, 0])).tolist() == [[1.5, 0.5]]


def test_cells_that_share_the_maximum_are_averaged():
    assert peak(maps([7, 0, 7], [0, 0, 0])).tolist() == [[1.5, 0.5]], "the middle is in neither"
    assert peak(maps([0, 7, 7], [0, 0, 7], [0, 0, 0])).tolist() == [[13 / 6, 5 / 6]]
    assert peak(torch.zeros(1, 1, 4, 6)).tolist() == [[3, 2]]


@settings(max_examples=40)
@given(grids)
def test_peaks_of_a_batch_are_those_of_slow_loops(values):
    found = peak(torch.from_numpy(values)[:, None])
    for n, rows in enumerate(values.tolist()):
        top = max(map(max, rows))
        at = [(j + 0.5, i + 0.5) for i, row in enumerate(rows) for j, value in enumerate(row) if value == top]
        expected = [sum(c) / len(at) for c in zip(*at, strict=True)]
        assert found[n].tolist() == pytest.approx(expected, abs=1e-12)


def test_peaks_scale_with_the_map():
    saliency = maps(*HAND)
    finer = saliency.repeat_interleave(3, 2).repeat_interleave(5, 3)
    assert peak(finer).tolist() == [[2.5 * 5, 1.5 * 3]]


def test_a_map_with_nan_has_no_peak_and_half_precision_does_not_round_it():
    assert peak(maps([0, math.nan])).isnan().all()
    wide = torch.zeros(1, 1, 3, 4097, dtype=torch.bfloat16)
    wide[0, 0, 1, 4095] = 1
    assert peak(wide).tolist() == [[4095.5, 1.5]]


def test_lengths_scale_with_the_root_of_the_area():
    assert scale((224, 224)) == 1
    assert scale((112, 448)) == 1
    assert scale((448, 448)) == 2
    assert scale((64, 64), side=32.0) == 2
