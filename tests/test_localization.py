"""Localization: boxes, overlaps and sums re-derived pixel by pixel."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.data import Sample, batches, collate
from sightline.evaluation import measure
from sightline.metrics import Case
from sightline.metrics._localization import (
    disjoint,
    f1,
    f1_union,
    localization_error,
    localization_error_continuous,
    matched_area,
    official_metric,
    official_metric_continuous,
)

H, W = 10, 12
ALL = (
    localization_error,
    official_metric,
    f1,
    localization_error_continuous,
    official_metric_continuous,
    f1_union,
)


def sample(boxes, name="a", label=2, size=(H, W)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Sample(name, torch.zeros(3, *size), label=label, boxes=boxes)


def case(classifier, samples, raw, predicted=2, saliency=None):
    batch = collate(samples)
    logits = torch.nn.functional.one_hot(torch.full((len(samples),), predicted), 5).double()
    return Case(classifier, batch.x, batch.y, raw if saliency is None else saliency, raw, classifier, batch, logits)


def maps(seed, count=1, size=(H, W)):
    raw = torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
    return (raw - low) / (high - low)


def marked_by_hand(m, rule, alpha=1.0):
    values = sorted(v for row in m for v in row)
    n, mean = len(values), sum(values) / len(values)
    if rule == "mean":
        return [[v >= alpha * mean and v > 0 for v in row] for row in m]
    kept = math.floor(n * mean + 0.5)
    t = values[n - kept - 1] if kept < n else 0.0
    t = min(max(t, 1e-6), 1 - 1e-6)
    return [[v > t for v in row] for row in m]


def box_by_hand(b):
    seen, best = set(), []
    for r, row in enumerate(b):
        for c, on in enumerate(row):
            if not on or (r, c) in seen:
                continue
            region, border = [], [(r, c)]
            seen.add((r, c))
            while border:
                y, x = border.pop()
                region.append((y, x))
                for v, u in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                    if 0 <= v < len(b) and 0 <= u < len(row) and b[v][u] and (v, u) not in seen:
                        seen.add((v, u))
                        border.append((v, u))
            best = max(best, region, key=len)
    if not best:
        return 0, 0, 0, 0
    ys, xs = [y for y, _ in best], [x for _, x in best]
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


def cut(b, size=(H, W)):
    x0, y0, x1, y1 = b
    return max(0, x0), max(0, y0), min(size[1], x1), min(size[0], y1)


def area_of(b):
    return max(0, b[2] - b[0]) * max(0, b[3] - b[1])


def iou_by_hand(p, b, area):
    inside = area_of((max(p[0], b[0]), max(p[1], b[1]), min(p[2], b[2]), min(p[3], b[3])))
    union = area_of(p) + area_of(b if area == "unclipped" else cut(b)) - inside
    return inside / union if union > 0 else 0.0


def f1_by_hand(m, boxes, area):
    """Of the union of whole-pixel boxes, counted pixel by pixel far beyond the image."""
    inside, size = 0.0, 0
    for r in range(-10, 31):
        for c in range(-10, 31):
            if not any(b[0] <= c < b[2] and b[1] <= r < b[3] for b in boxes):
                continue
            seen = 0 <= r < len(m) and 0 <= c < len(m[0])
            inside += m[r][c] if seen else 0
            size += 1 if seen or area == "unclipped" else 0
    whole = sum(map(sum, m))
    p, r = (inside / whole if whole else 0), (inside / size if size else 0)
    return 200 * p * r / (p + r) if p + r else 0.0


BOXES = (
    [[2, 3, 9, 8]],
    [[0, 0, 12, 10]],
    [[1, 1, 4, 4], [3, 2, 9, 9]],
    [[-6, -3, 7, 6]],
    [[5, 4, 30, 30], [0, 0, 2, 2]],
    [[-9, -9, -1, -1]],
    [[3, 3, 3, 8]],
)


@pytest.mark.parametrize("area", ["unclipped", "clipped"])
@pytest.mark.parametrize("rule", ["matched_area", "mean"])
@pytest.mark.parametrize("boxes", BOXES)
def test_every_number_is_that_of_loops_over_pixels(pooled, boxes, rule, area):
    for seed in range(4):
        raw = maps(seed) ** 3
        if seed > 1:
            raw[:, :, 3:8, 2:9] = raw[:, :, 3:8, 2:9] ** 0.1
        m = raw[0, 0].tolist()
        overlap = max(iou_by_hand(box_by_hand(marked_by_hand(m, rule)), b, area) for b in boxes)
        for predicted in (2, 3):
            one = case(pooled, [sample(boxes)], raw, predicted)
            right = predicted == 2
            settings_ = {"rule": rule, "area": area}
            for metric, expected in (
                (localization_error(iou=0.4, **settings_), 100 * (overlap <= 0.4)),
                (official_metric(iou=0.4, **settings_), 100 * (overlap <= 0.4 or not right)),
                (localization_error_continuous(**settings_), 100 * (1 - overlap)),
                (official_metric_continuous(**settings_), 100 * (1 - overlap * right)),
                (f1(area=area), max(f1_by_hand(m, [b], area) for b in boxes)),
                (f1_union(area=area), f1_by_hand(m, boxes, area)),
            ):
                assert float(metric(one)) == pytest.approx(expected, abs=1e-9)


def test_the_defaults_are_those_of_the_papers(pooled):
    raw = maps(0) ** 2
    one = case(pooled, [sample([[-3, 2, 9, 8]])], raw)
    for metric, rule in ((localization_error, "matched_area"), (localization_error_continuous, "mean")):
        assert float(metric()(one)) == float(metric(rule=rule, area="unclipped", alpha=1.0)(one))
    values = {float(localization_error_continuous(rule=rule)(one)) for rule in ("matched_area", "mean")}
    assert len(values) == 2


def test_the_overlap_must_be_above_a_half_unless_it_may_be_at_it(pooled):
    raw = torch.zeros(1, 1, H, W, dtype=torch.float64)
    raw[:, :, 2:6, 1:5] = 1
    one = case(pooled, [sample([[1, 2, 5, 10]])], raw)
    assert float(localization_error_continuous()(one)) == 50
    assert float(localization_error()(one)) == 100
    assert float(localization_error(strict=False)(one)) == 0
    assert float(localization_error(iou=0.49)(one)) == 0


def test_a_perfect_map_makes_no_error(pooled):
    raw = torch.zeros(1, 1, H, W, dtype=torch.float64)
    raw[:, :, 2:6, 1:7] = 1
    one = case(pooled, [sample([[1, 2, 7, 6], [8, 8, 10, 10]])], raw)
    assert [float(metric()(one)) for metric in ALL[:5]] == [0, 0, 100, 0, 0]
    assert float(f1_union()(one)) == pytest.approx(200 * 24 / (24 + 28))


def test_om_is_le_where_all_predictions_are_right_and_a_hundred_where_all_are_wrong(pooled):
    samples = [sample([[2, 3, 9, 8]], str(i)) for i in range(4)]
    raw = maps(1, 4) ** 6
    raw[:2, :, 3:8, 2:9] = 1
    for om, le in ((official_metric, localization_error), (official_metric_continuous, localization_error_continuous)):
        right, wrong = (case(pooled, samples, raw, predicted) for predicted in (2, 0))
        assert torch.equal(om()(right), le()(right))
        assert om()(wrong).flatten().tolist() == [100] * 4
        assert 0 < float(le()(right).mean()) < 100


def test_alpha_moves_the_threshold_of_the_mean_rule(pooled):
    raw = maps(3)
    one = case(pooled, [sample([[2, 3, 9, 8]])], raw)
    for alpha in (0.5, 1.9):
        p = box_by_hand(marked_by_hand(raw[0, 0].tolist(), "mean", alpha))
        found = float(localization_error_continuous(alpha=alpha)(one))
        assert found == pytest.approx(100 * (1 - iou_by_hand(p, (2, 3, 9, 8), "unclipped")))


def test_a_map_that_marks_nothing_hits_nothing(pooled):
    raw = torch.zeros(1, 1, H, W, dtype=torch.float64)
    for boxes in ([[0, 0, 12, 10]], [[0, 0, 1, 1]], [[0, 0, 0, 0]]):
        one = case(pooled, [sample(boxes)], raw)
        for rule in ("matched_area", "mean"):
            assert float(localization_error_continuous(rule=rule)(one)) == 100
            assert float(localization_error(rule=rule)(one)) == 100
            assert float(official_metric(rule=rule)(one)) == 100
        assert float(f1()(one)) == float(f1_union()(one)) == 0
    assert float(localization_error(iou=0.0)(case(pooled, [sample([[0, 0, 12, 10]])], raw))) == 100


def test_boxes_outside_or_without_area_are_missed(pooled):
    raw = torch.ones(1, 1, H, W, dtype=torch.float64)
    raw[..., 0, 0] = 0
    for boxes in ([[-9, -9, -1, -1]], [[12, 0, 20, 5]], [[3, 3, 3, 8]], [[6, 6, 4, 4]]):
        one = case(pooled, [sample(boxes)], raw)
        assert [float(metric()(one)) for metric in ALL] == [100, 100, 0, 100, 100, 0]


def test_an_image_without_a_box_of_its_label_does_not_count(pooled):
    samples = [sample([[2, 3, 9, 8]]), sample([], "b"), sample([[2, 3, 9, 8]], "c")]
    samples[2] = replace(samples[2], box_labels=torch.tensor([4]))
    for metric in ALL:
        assert metric()(case(pooled, samples, maps(0, 3))).isnan().flatten().tolist() == [False, True, True]


def test_a_mask_gives_the_box_where_there_are_no_boxes(pooled):
    mask = torch.zeros(H, W, dtype=torch.long)
    mask[3:8, 2:9], mask[0, 0] = 3, 1
    one = Sample("a", torch.zeros(3, H, W), label=2, mask=mask)
    for metric in ALL:
        raw = maps(2)
        assert torch.equal(metric()(case(pooled, [one], raw)), metric()(case(pooled, [sample([[2, 3, 9, 8]])], raw)))


def test_a_box_that_cuts_pixels_takes_its_share_of_them(pooled):
    raw = maps(4)
    x0, y0, x1, y1 = box = 1.25, 2.5, 6.75, 7.0
    inside = sum(
        float(raw[0, 0, r, c]) * max(0, min(r + 1, y1) - max(r, y0)) * max(0, min(c + 1, x1) - max(c, x0))
        for r in range(H)
        for c in range(W)
    )
    expected = 200 * inside / (float(raw.sum()) + (x1 - x0) * (y1 - y0))
    one = case(pooled, [sample([box])], raw)
    assert float(f1()(one)) == pytest.approx(expected, abs=1e-9)
    assert float(f1_union()(one)) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(*[st.integers(-3, 9)] * 4), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_union_is_cut_into_boxes_that_do_not_overlap(boxes):
    found = disjoint(torch.tensor(boxes, dtype=torch.float64)).tolist()
    for r in range(-3, 9):
        for c in range(-3, 9):
            covered = any(b[0] <= c < b[2] and b[1] <= r < b[3] for b in boxes)
            assert sum(b[0] <= c < b[2] and b[1] <= r < b[3] for b in found) == covered


@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0.05, 8))
@settings(max_examples=60, deadline=None)
def test_the_matched_area_is_the_mean(seed, side, power):
    m = torch.rand(3, 1, side, side + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** power
    b = matched_area(m)
    n = side * (side + 1)
    slack = (m < 1e-6).sum((1, 2, 3)) + (m > 1 - 1e-6).sum((1, 2, 3))
    assert bool(((b.sum((1, 2, 3)) - n * m.sum((1, 2, 3)) / n).abs() < 1 + slack).all())
    for one, mask in zip(m[:, 0], b[:, 0], strict=True):
        assert mask.tolist() == marked_by_hand(one.tolist(), "matched_area")
        assert not mask.any() or not (~mask).any() or one[mask].min() > one[~mask].max()
    assert torch.equal(torch.cat([matched_area(one[None]) for one in m]), b)


def test_the_matched_area_leaves_ties_out_and_keeps_ones():
    m = torch.tensor([0.5, 0.5, 0.5, 0.5]).view(1, 1, 2, 2)
    assert not matched_area(m).any()
    assert matched_area(torch.ones(1, 1, 2, 2)).all()
    assert not matched_area(torch.zeros(1, 1, 2, 2)).any()
    assert matched_area(torch.tensor([1.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2)).flatten().tolist() == [True] * 3 + [False]
    assert matched_area(torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 2, 2)).sum() == 2


def test_the_method_s_own_values_count_where_nothing_is_normalized(pooled):
    raw = 0.6 + 0.3 * maps(5)
    unit = (raw - raw.amin()) / (raw.amax() - raw.amin())
    one = case(pooled, [sample([[2, 3, 9, 8]])], raw, saliency=unit)
    assert float(f1(normalize=False)(one)) == pytest.approx(f1_by_hand(raw[0, 0].tolist(), [[2, 3, 9, 8]], "unclipped"))
    assert float(f1()(one)) == pytest.approx(f1_by_hand(unit[0, 0].tolist(), [[2, 3, 9, 8]], "unclipped"))
    for metric in (localization_error_continuous, official_metric_continuous):
        p = box_by_hand(marked_by_hand(raw[0, 0].tolist(), "matched_area"))
        found = float(metric(rule="matched_area", normalize=False)(one))
        assert found == pytest.approx(100 * (1 - iou_by_hand(p, (2, 3, 9, 8), "unclipped")))
        p = box_by_hand(marked_by_hand(unit[0, 0].tolist(), "matched_area"))
        found = float(metric(rule="matched_area")(one))
        assert found == pytest.approx(100 * (1 - iou_by_hand(p, (2, 3, 9, 8), "unclipped")))
    for metric in ALL:
        with pytest.raises(ValueError, match=r"maps in \[0, 1\], and that of 'a' lies in \[0\.1, 1\.4\]"):
            metric(normalize=False)(case(pooled, [sample([[2, 3, 9, 8]])], raw - 0.5 + unit, saliency=unit))


@given(st.integers(0, 10**6), st.permutations(range(5)), st.integers(1, 4))
@settings(max_examples=6, deadline=None)
def test_neither_order_nor_batches_change_a_number_and_all_lie_between_0_and_100(classifiers, seed, order, first):
    g = torch.Generator().manual_seed(seed)
    boxes = [(torch.rand(2, 4, generator=g) * 14 - 2).round(decimals=1).tolist() for _ in range(5)]
    samples, raw = [sample(b, str(i)) for i, b in enumerate(boxes)], maps(seed, 5)
    for metric in ALL:
        whole = metric()(case(classifiers["pooled"], samples, raw))
        assert bool(((whole >= 0) & (whole <= 100 + 1e-9)).all())
        parts = [
            metric()(case(classifiers["pooled"], [samples[i] for i in some], raw[list(some)]))
            for some in (order[:first], order[first:])
        ]
        torch.testing.assert_close(torch.cat(parts), whole[list(order)], rtol=0, atol=1e-9)


def test_it_runs_through_the_evaluation_with_maps_that_are_not_finite(pooled):
    image = torch.rand(3, H, W, dtype=torch.float64)
    samples = [replace(sample([[1, 1, 9, 8]], str(i)), image=image) for i in range(3)]

    def method(classifier, x, y):
        return torch.full((len(x), 1, 3, 4), torch.nan)

    scores = measure(method, pooled, batches(samples, 2), {m.__name__: m() for m in ALL}).scores
    assert {s.metric.name: s.value for s in scores} == {
        "localization_error": 100,
        "official_metric": 100,
        "f1": 0,
        "localization_error_continuous": 100,
        "official_metric_continuous": 100,
        "f1_union": 0,
    }


def test_a_single_pixel_and_a_large_image(pooled):
    one = case(pooled, [sample([[0, 0, 1, 1]], size=(1, 1))], torch.ones(1, 1, 1, 1, dtype=torch.float64))
    assert [float(metric()(one)) for metric in ALL] == [0, 0, 100, 0, 0, 100]
    raw = torch.zeros(1, 1, 700, 900, dtype=torch.float64)
    raw[:, :, 100:600, 200:800] = 1
    large = case(pooled, [sample([[200, 100, 800, 600]], size=(700, 900))], raw)
    assert [float(metric()(large)) for metric in ALL] == [0, 0, 100, 0, 0, 100]


def test_what_is_wrong_is_said(pooled, plain):
    for metric in (localization_error, official_metric, localization_error_continuous, official_metric_continuous):
        with pytest.raises(LookupError, match="no rule called 'matched'; did you mean matched_area"):
            metric(rule="matched")
        with pytest.raises(ValueError, match="expected alpha > 0, got 0"):
            metric(rule="mean", alpha=0.0)
        with pytest.raises(ValueError, match=r"alpha=2\.0 belongs to rule='mean', and the rule is 'matched_area'"):
            metric(rule="matched_area", alpha=2.0)
    for metric in (localization_error, official_metric):
        with pytest.raises(ValueError, match=r"expected iou in \[0, 1\], got 1.5"):
            metric(iou=1.5)
    bare = Sample("a", torch.zeros(3, H, W), label=2)
    for metric in ALL:
        with pytest.raises(LookupError, match="no area called 'cut'; known: clipped, unclipped"):
            metric(area="cut")
        with pytest.raises(ValueError, match=f"^{metric.__name__} needs boxes or a mask, and 'a' has neither"):
            metric()(case(pooled, [bare], maps(0)))
