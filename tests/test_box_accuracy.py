"""Box accuracy: the published evaluation re-derived threshold by threshold, and the exact one pixel by pixel."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sightline.accumulate import Accumulate
from sightline.data import Sample, batches, collate
from sightline.evaluation import measure
from sightline.metrics import Case
from sightline.metrics._box_accuracy import Search, best_overlaps, box_accuracy, max_box_accuracy, max_box_accuracy_v2

ETAS = np.arange(0, 1, 0.001)


def published(s, boxes, *, several, etas=ETAS):
    """The best overlap at each of 1,000 thresholds, by tracing the contours at each (once where cuts are equal)."""
    image, known = (s * 255).astype(np.uint8), {}
    cuts = [int(eta * image.max()) for eta in etas]
    for cut in set(cuts):
        found = set(traced(image, cut, several=several))
        known[cut] = max(inclusive(p, tuple(int(v) for v in b)) for p in found for b in boxes)
    return np.array([known[cut] for cut in cuts])


def traced(image, cut, *, several):
    h, w = image.shape
    _, marked = cv2.threshold(image, cut, 255, cv2.THRESH_BINARY)
    contours = cv2.findContours(marked, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if not contours:
        return [(0, 0, 0, 0)]
    found = [cv2.boundingRect(c) for c in (contours if several else [max(contours, key=cv2.contourArea)])]
    return [(x, y, min(x + width, w - 1), min(y + height, h - 1)) for x, y, width, height in found]


def inclusive(p, b):
    across = max(0, min(p[2], b[2]) - max(p[0], b[0]) + 1)
    down = max(0, min(p[3], b[3]) - max(p[1], b[1]) + 1)
    sizes = [max(0, one[2] - one[0] + 1) * max(0, one[3] - one[1] + 1) for one in (p, b)]
    return across * down / (sum(sizes) - across * down)


def half_open(p, b):
    inside = max(0, min(p[2], b[2]) - max(p[0], b[0])) * max(0, min(p[3], b[3]) - max(p[1], b[1]))
    union = sum(max(0, one[2] - one[0]) * max(0, one[3] - one[1]) for one in (p, b)) - inside
    return inside / union if union > 0 else 0


def regions_by_hand(marked, connectivity):
    seen, regions = set(), []
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0)] + [(1, 1), (1, -1), (-1, 1), (-1, -1)] * (connectivity == 8)
    for r in range(len(marked)):
        for c in range(len(marked[0])):
            if not marked[r][c] or (r, c) in seen:
                continue
            region, border = [], [(r, c)]
            seen.add((r, c))
            while border:
                y, x = border.pop()
                region.append((y, x))
                for v, u in ((y + dy, x + dx) for dy, dx in steps):
                    if 0 <= v < len(marked) and 0 <= u < len(marked[0]) and marked[v][u] and (v, u) not in seen:
                        seen.add((v, u))
                        border.append((v, u))
            regions.append(region)
    return regions


def exact(s, boxes, etas, *, several, connectivity=8):
    best = []
    for eta in etas:
        regions = regions_by_hand((s > eta * s.max()).tolist(), connectivity)
        if not several and regions:
            regions = [max(regions, key=len)]
        found = []
        for region in regions:
            ys, xs = [y for y, _ in region], [x for _, x in region]
            found.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
        best.append(max((half_open(p, b) for p in found for b in boxes), default=0))
    return np.array(best)


def scaled(s):
    s = s - s.min()
    return s / s.max() if s.max() > 0 else s


def drawn(kind, seed, h=40, w=48):
    g = torch.Generator().manual_seed(seed)
    if kind == "constant":
        return np.zeros((h, w), np.float32)
    if kind == "noise":
        return scaled(torch.randn(h, w, generator=g).abs().numpy())
    if kind == "rings":
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        return scaled((torch.sin(((x - 20) ** 2 + (y - 18) ** 2).float().sqrt() * (0.8 + seed % 3)) + 0.01 * x).numpy())
    if kind == "lines":
        s = torch.zeros(h, w)
        for _ in range(8):
            s[:, int(torch.randint(w, (), generator=g))] += torch.rand((), generator=g)
            s[int(torch.randint(h, (), generator=g))] += torch.rand((), generator=g)
        return scaled(s.numpy())
    mode = {"smooth": "bicubic", "blocks": "nearest"}[kind]
    settings_ = {} if mode == "nearest" else {"align_corners": False}
    return scaled(F.interpolate(torch.rand(1, 1, 7, 7, generator=g), (h, w), mode=mode, **settings_)[0, 0].numpy())


BOXES = np.array([[5.7, 4.2, 30.9, 33.3], [20.0, 2.0, 47.0, 12.0], [10.5, 25.0, 14.0, 28.0]])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["smooth", "blocks", "noise", "rings", "lines", "constant"])
def test_the_official_protocol_is_the_published_one_at_every_threshold(kind, seed):
    s = drawn(kind, seed, 36, 44)
    for boxes in (BOXES, BOXES[2:]):
        for regions in ("all", "largest"):
            search = Search(tuple(ETAS.tolist()), regions, "official", "bicubic", 8)
            expected = published(s, boxes, several=regions == "all")
            assert np.array_equal(best_overlaps(s, boxes, search), expected)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([1, 2, 4, 255]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_small_maps_of_all_shapes_are_as_published(h, w, seed, values, several):
    g = torch.Generator().manual_seed(seed)
    s = scaled(torch.randint(0, values + 1, (h, w), generator=g).float().numpy())
    boxes = (torch.rand(2, 4, generator=g) * 10).double().numpy()
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
    search = Search(tuple(ETAS.tolist()), "all" if several else "largest", "official", "bicubic", 8)
    assert np.array_equal(best_overlaps(s, boxes, search), published(s, boxes, several=several))


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 5, 1000]),
    st.booleans(),
    st.sampled_from([4, 8]),
)
@settings(max_examples=60, deadline=None)
def test_the_exact_protocol_is_that_of_loops_over_pixels(h, w, seed, values, several, connectivity):
    g = torch.Generator().manual_seed(seed)
    s = scaled(torch.randint(0, values + 1, (h, w), generator=g).double().numpy())
    boxes = (torch.rand(2, 4, generator=g) * 12 - 2).double().numpy()
    etas = tuple((np.arange(20) / 20).tolist())
    search = Search(etas, "all" if several else "largest", "exact", "bicubic", connectivity)
    expected = exact(s, boxes, etas, several=several, connectivity=connectivity)
    np.testing.assert_allclose(best_overlaps(s, boxes, search), expected, rtol=0, atol=1e-12)


def sample(boxes, name="a", size=(40, 48)):
    boxes = torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4)
    return Sample(name, torch.zeros(3, *size), label=2, boxes=boxes)


def case(classifier, samples, raw):
    batch = collate(samples)
    return Case(classifier, batch.x, batch.y, raw, raw, classifier, batch, torch.zeros(len(samples), 5))


def value(one, *cases):
    sums = Accumulate(one)
    for i, each in enumerate(cases):
        sums.update(one(each), torch.arange(len(each.x)) + 100 * i)
    mean = sums.compute()[0].reshape(-1)
    return float(sums.finished(mean)), mean


def dataset(kinds=("smooth", "noise", "blocks", "rings"), count=6):
    g = torch.Generator().manual_seed(1)
    raw = torch.stack([torch.from_numpy(drawn(kinds[i % len(kinds)], i))[None] for i in range(count)])
    corners = [[3.0, 4.0, 30.0, 35.0], [10.0, 2.0, 40.0, 30.0], [20.0, 20.0, 44.0, 38.0]]
    boxes = [
        [corners[int(torch.randint(3, (), generator=g))], [5.0, 5.0, 12.0, 14.0]][: 1 + i % 2] for i in range(count)
    ]
    return [sample(b, str(i)) for i, b in enumerate(boxes)], raw


@pytest.mark.parametrize("several", [True, False])
def test_one_threshold_is_chosen_for_the_whole_data_set(pooled, several):
    samples, raw = dataset()
    overlap = np.stack(
        [published(one[0].numpy(), s.boxes.numpy(), several=several) for s, one in zip(samples, raw, strict=True)]
    )
    share = {delta: (overlap >= delta).mean(0) for delta in (0.3, 0.5, 0.7)}
    whole = case(pooled, samples, raw)
    metric = max_box_accuracy_v2(regions="all" if several else "largest")
    found, mean = value(metric, whole)
    assert found == pytest.approx(100 * np.mean([share[delta].max() for delta in share]))
    assert found < 100 * np.mean([(overlap >= delta).max(1).mean() for delta in share])
    np.testing.assert_allclose(metric.curve(mean).numpy(), 100 * np.mean(list(share.values()), 0), atol=1e-9)
    np.testing.assert_allclose(metric.axis, ETAS, atol=1e-12)
    if not several:
        found, mean = value(max_box_accuracy(), whole)
        assert found == pytest.approx(100 * share[0.5].max())
        np.testing.assert_allclose(max_box_accuracy().curve(mean).numpy(), 100 * share[0.5], atol=1e-9)
    for threshold in (0.2, 0.55):
        single = box_accuracy(threshold=threshold, iou=0.3, regions="all" if several else "largest")
        assert value(single, whole)[0] == pytest.approx(100 * share[0.3][round(1000 * threshold)])


def test_the_defaults_are_those_of_the_papers(pooled):
    samples, raw = dataset()
    whole = case(pooled, samples, raw)
    same = {"protocol": "official", "resize": "bicubic", "connectivity": 8}
    assert value(max_box_accuracy(), whole)[0] == value(max_box_accuracy(iou=0.5, thresholds=1000, **same), whole)[0]
    v2 = max_box_accuracy_v2(iou=[0.3, 0.5, 0.7], thresholds=1000, regions="all", **same)
    assert value(max_box_accuracy_v2(), whole)[0] == value(v2, whole)[0]
    one = box_accuracy(threshold=0.2, iou=0.5, regions="largest", **same)
    assert torch.equal(box_accuracy()(whole), one(whole))


@pytest.mark.parametrize("protocol", ["official", "exact"])
def test_a_map_made_of_the_box_itself_has_a_hundred(pooled, protocol):
    boxes = [[3, 4, 30, 35], [0, 0, 20, 10], [20, 20, 21, 21], [10, 2, 40, 30]]
    raw = torch.zeros(4, 1, 40, 48)
    for one, (x0, y0, x1, y1) in zip(raw, boxes, strict=True):
        one[0, y0:y1, x0:x1] = 1
    whole = case(pooled, [sample([b], str(i)) for i, b in enumerate(boxes)], raw)
    assert value(max_box_accuracy_v2(protocol=protocol), whole)[0] == 100
    assert value(max_box_accuracy(protocol=protocol, iou=1.0), whole)[0] == 100
    assert value(box_accuracy(protocol=protocol, iou=1.0), whole)[0] == 100


def test_holes_have_boxes_in_the_official_protocol_alone(pooled):
    raw = torch.zeros(1, 1, 40, 48)
    raw[..., 5:35, 5:40] = 1
    raw[..., 15:20, 15:25] = 0
    whole = case(pooled, [sample([[14, 14, 26, 21]])], raw)
    assert value(max_box_accuracy_v2(iou=(1.0,)), whole)[0] == 100
    assert value(max_box_accuracy_v2(iou=(1.0,), protocol="exact"), whole)[0] == 0
    assert value(max_box_accuracy(iou=0.3), whole)[0] == 0


def test_connectivity_four_keeps_diagonal_neighbors_apart(pooled):
    raw = torch.zeros(1, 1, 40, 48)
    raw[..., 0:10, 0:10] = 1
    raw[..., 10:30, 10:30] = 1
    whole = case(pooled, [sample([[10, 10, 30, 30]])], raw)
    for connectivity, expected in ((4, 100), (8, 0)):
        for metric in (max_box_accuracy, box_accuracy):
            assert value(metric(iou=0.9, protocol="exact", connectivity=connectivity), whole)[0] == expected


@pytest.mark.parametrize("protocol", ["official", "exact"])
def test_edge_cases_have_the_value_that_is_documented(pooled, protocol):
    flat = torch.zeros(1, 1, 40, 48)
    for boxes in ([[3, 4, 30, 35]], [[-9, -9, -2, -2]], [[60, 3, 90, 9]]):
        for raw in (flat, torch.full_like(flat, 2.0)):
            one = case(pooled, [sample(boxes)], raw)
            for metric in (max_box_accuracy, max_box_accuracy_v2, box_accuracy):
                assert value(metric(protocol=protocol), one)[0] == 0
    peak = flat.clone()
    peak[..., 5, 5] = 1
    for boxes in ([[8, 8, 8, 8]], [[60, 3, 90, 9]]):
        assert value(max_box_accuracy_v2(protocol=protocol), case(pooled, [sample(boxes)], peak))[0] == 0
    tiny = case(pooled, [sample([[0, 0, 1, 1]], size=(1, 1))], torch.ones(1, 1, 1, 1))
    found = value(max_box_accuracy(protocol=protocol, iou=0.2), tiny)[0]
    assert found == (100 if protocol == "official" else 0)


@pytest.mark.parametrize("protocol", ["official", "exact"])
def test_images_without_a_box_of_the_label_do_not_count(pooled, protocol):
    samples, raw = dataset()
    for metric in (max_box_accuracy, max_box_accuracy_v2, box_accuracy):
        one = metric(protocol=protocol)
        bare = [samples[0], replace(samples[1], boxes=torch.zeros(0, 4)), *samples[2:4]]
        numbers = one(case(pooled, bare, raw[:4]))
        assert numbers.isnan().all(1).tolist() == [False, True, False, False]
        assert not numbers[[0, 2, 3]].isnan().any()
        kept = value(one, case(pooled, [bare[i] for i in (0, 2, 3)], raw[[0, 2, 3]]))[0]
        assert value(one, case(pooled, bare, raw[:4]))[0] == pytest.approx(kept)
        assert math.isnan(value(one, case(pooled, bare[1:2], raw[1:2]))[0])


def test_the_map_is_resized_as_asked(pooled):
    raw = torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(2))
    one = sample([[3, 4, 30, 35]])
    for mode in ("bicubic", "bilinear"):
        s = scaled(F.interpolate(raw, (40, 48), mode=mode, align_corners=False)[0, 0].numpy())
        share = (published(s, one.boxes.numpy(), several=True) >= 0.5).astype(float)
        numbers = max_box_accuracy_v2(iou=(0.5,), resize=mode)(case(pooled, [one], raw))
        np.testing.assert_array_equal(numbers[0].numpy(), 100 * share)


def test_maps_in_half_precision_are_scored_in_single(pooled):
    samples, raw = dataset()
    for dtype in (torch.bfloat16, torch.float16):
        low = raw.to(dtype)
        assert torch.equal(
            box_accuracy()(case(pooled, samples, low)), box_accuracy()(case(pooled, samples, low.float()))
        )


@given(st.permutations(range(5)), st.integers(1, 4), st.sampled_from(["official", "exact"]))
@settings(max_examples=8, deadline=None)
def test_neither_order_nor_batches_change_the_number(classifiers, order, first, protocol):
    network = classifiers["pooled"]
    samples, raw = dataset(count=5)
    for metric in (
        max_box_accuracy(protocol=protocol, thresholds=50),
        max_box_accuracy_v2(protocol=protocol, thresholds=50),
    ):
        whole, _ = value(metric, case(network, samples, raw))
        parts = [case(network, [samples[i] for i in some], raw[list(some)]) for some in (order[:first], order[first:])]
        assert value(metric, *parts)[0] == pytest.approx(whole, abs=1e-9)
        assert 0 <= whole <= 100


@given(st.integers(0, 10**6), st.sampled_from(["smooth", "noise", "blocks"]))
@settings(max_examples=10, deadline=None)
def test_a_lower_overlap_and_more_regions_are_never_harder(seed, kind):
    s = drawn(kind, seed, 16, 20)
    etas = tuple((np.arange(50) / 50).tolist())
    boxes = BOXES[:1] / 3
    most, largest = (best_overlaps(s, boxes, Search(etas, r, "exact", "bicubic", 8)) for r in ("all", "largest"))
    assert (most >= largest).all()
    assert ((most >= 0) & (most <= 1)).all()
    for eta in (0, 7, 30):
        alone = best_overlaps(s, boxes, Search(etas[eta : eta + 1], "all", "exact", "bicubic", 8))
        assert alone[0] == most[eta]


def test_it_runs_through_the_evaluation_with_maps_that_are_not_finite(pooled):
    image = torch.rand(3, 40, 48, dtype=torch.float64)
    samples = [replace(one, image=image) for one in dataset()[0]]

    def method(classifier, x, y):
        return torch.full((len(x), 1, 5, 6), torch.nan)

    metrics = {"box_accuracy": box_accuracy(), "v1": max_box_accuracy(), "v2": max_box_accuracy_v2()}
    scores = measure(method, pooled, batches(samples, 4), metrics).scores
    assert [(s.value, s.count, len(s.curve), len(s.axis)) for s in scores] == [(0, 6, 0, 0)] + [(0, 6, 1000, 1000)] * 2


def test_large_noise_is_as_published():
    s = drawn("noise", 3, 200, 320)
    search = Search((0.1, 0.3, 0.6), "all", "official", "bicubic", 8)
    expected = published(s, BOXES, several=True, etas=search.thresholds)
    assert np.array_equal(best_overlaps(s, BOXES, search), expected)


def test_what_is_wrong_is_said(pooled, plain):
    for metric in (box_accuracy, max_box_accuracy, max_box_accuracy_v2):
        with pytest.raises(LookupError, match="no protocol called 'wsol'; known: exact, official"):
            metric(protocol="wsol")
        with pytest.raises(LookupError, match="no resize called 'cubic'"):
            metric(resize="cubic")
        with pytest.raises(ValueError, match="connectivity 8, or 4 with protocol='exact', got 4 with 'official'"):
            metric(connectivity=4)
        with pytest.raises(ValueError, match="connectivity 8, or 4 with protocol='exact', got 6 with 'exact'"):
            metric(connectivity=6, protocol="exact")
        one = case(pooled, [Sample("a", torch.zeros(3, 4, 4), label=2)], torch.rand(1, 1, 4, 4))
        with pytest.raises(ValueError, match=f"^{metric.__name__} needs boxes or a mask, and 'a' has neither"):
            metric()(one)
    for metric in (box_accuracy, max_box_accuracy_v2):
        with pytest.raises(LookupError, match="no regions called 'biggest'"):
            metric(regions="biggest")
    for threshold in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"expected a threshold in \[0, 1\), a share of the maximum, got "):
            box_accuracy(threshold=threshold)
    with pytest.raises(ValueError, match=r"expected overlaps in \[0, 1\], at least one, got iou=1\.5"):
        max_box_accuracy(iou=1.5)
    with pytest.raises(ValueError, match="at least one, got iou=none"):
        max_box_accuracy_v2(iou=())
    for metric in (max_box_accuracy, max_box_accuracy_v2):
        with pytest.raises(ValueError, match="expected at least one threshold, got thresholds=0"):
            metric(thresholds=0)
        with pytest.raises(ValueError, match="expected 1 to 10000 thresholds, got 10001"):
            metric(thresholds=10_001)
