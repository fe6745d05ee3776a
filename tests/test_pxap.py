"""PxAP: the published histograms re-derived image by image, and the exact average precision by loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.accumulate import Accumulate
from sightline.data import Sample, batches, collate
from sightline.evaluation import measure
from sightline.metrics import Case
from sightline.metrics._pxap import average_precision, histogram_average_precision, pxap

H, W = 12, 16


def made(seed, count=4, size=(H, W)):
    g = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 4, (count, *size), generator=g)
    masks[torch.rand(count, *size, generator=g) < 0.1] = 255
    return [Sample(str(i), torch.zeros(3, *size), label=i % 3, mask=masks[i]) for i in range(count)]


def case(samples, raw, pooled):
    batch = collate(samples)
    return Case(pooled, batch.x, batch.y, raw, raw, pooled, batch, torch.zeros(len(samples), 5))


def value(one, *given):
    sums = Accumulate(one)
    start = 0
    for case in given:
        sums.update(one(case), torch.arange(start, start + len(case.x)))
        start += len(case.x)
    mean, kept, *_ = sums.compute()
    mean = mean.reshape(-1)
    return float(one.finish(kept) if one.state == "pool" and len(kept) else sums.finished(mean)), mean


def published(samples, maps):
    """Histograms of positives and negatives over 1,000 thresholds, image by image, as the WSOL evaluation has them."""
    edges = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])
    right, wrong = np.zeros(1002), np.zeros(1002)
    for sample, one in zip(samples, maps, strict=True):
        one = one.numpy()
        one = one - one.min()
        one = one / one.max() if one.max() > 0 else one
        mask = sample.mask.numpy()
        right += np.histogram(one[mask == sample.label + 1], edges)[0]
        wrong += np.histogram(one[(mask != sample.label + 1) & (mask != 255)], edges)[0]
    hits, errors = right[::-1].cumsum(), wrong[::-1].cumsum()
    with np.errstate(invalid="ignore"):
        precision, recall = hits / (hits + errors), hits / hits[-1]
    found = (hits + errors) != 0
    return 100 * (precision[1:] * np.diff(recall))[found[1:]].sum()


def by_loops(scores, truth):
    total, last = 0.0, 0
    for cut in sorted(set(scores), reverse=True):
        found = [t for s, t in zip(scores, truth, strict=True) if s >= cut]
        total += sum(found) / len(found) * (sum(found) - last)
        last = sum(found)
    return total / last


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_the_histogram_form_is_the_published_one(pooled, dtype, seed):
    samples = made(seed)
    raw = torch.rand(4, 1, H, W, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    raw[0] = (raw[0] * 8).round() / 8
    found, _ = value(pxap(), case(samples, raw, pooled))
    assert found == pytest.approx(published(samples, raw[:, 0]), abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_form_steps_at_every_distinct_score(pooled, seed):
    samples = made(seed)
    raw = torch.randint(0, 9, (4, 1, H, W), generator=torch.Generator().manual_seed(seed)).double()
    found, _ = value(pxap(exact=True), case(samples, raw, pooled))
    scores, truth = [], []
    for sample, one in zip(samples, raw[:, 0], strict=True):
        low, high = float(one.min()), float(one.max())
        for r in range(H):
            for c in range(W):
                if int(sample.mask[r, c]) != 255:
                    scores.append((float(one[r, c]) - low) / (high - low))
                    truth.append(int(sample.mask[r, c]) == sample.label + 1)
    assert found == pytest.approx(100 * by_loops(scores, truth), abs=1e-9)


def test_many_bins_come_near_the_exact_number(pooled):
    samples = made(5)
    raw = torch.rand(4, 1, H, W, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    exact, _ = value(pxap(exact=True), case(samples, raw, pooled))
    coarse, fine = (abs(value(pxap(bins=n), case(samples, raw, pooled))[0] - exact) for n in (5, 100_000))
    assert fine < 1e-2 < coarse


@pytest.mark.parametrize("exact", [False, True])
def test_a_map_that_separates_has_a_hundred_and_a_constant_one_the_base_rate(pooled, exact):
    samples = made(1)
    inside = torch.stack([s.mask == s.label + 1 for s in samples])
    counted = torch.stack([s.mask != 255 for s in samples])
    assert value(pxap(exact=exact), case(samples, inside[:, None].double(), pooled))[0] == pytest.approx(100)
    rate = 100 * float((inside & counted).sum() / counted.sum())
    for raw in (torch.zeros(4, 1, H, W), torch.full((4, 1, H, W), 3.0)):
        assert value(pxap(exact=exact), case(samples, raw, pooled))[0] == pytest.approx(rate)


@pytest.mark.parametrize("exact", [False, True])
def test_ignored_pixels_do_not_count(pooled, exact):
    samples, raw = made(2), torch.rand(4, 1, H, W, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    raw[:, :, 0, 0], raw[:, :, 0, 1] = 0, 1
    for one in samples:
        one.mask[0, :2] = 0
    changed = torch.where(torch.stack([s.mask == 255 for s in samples])[:, None], 1 - raw, raw)
    assert value(pxap(exact=exact), case(samples, raw, pooled))[0] == pytest.approx(
        value(pxap(exact=exact), case(samples, changed, pooled))[0], abs=1e-12
    )


@pytest.mark.parametrize("exact", [False, True])
def test_an_image_of_ignored_pixels_alone_does_not_count(pooled, exact):
    samples, raw = made(3), torch.rand(4, 1, H, W, generator=torch.Generator().manual_seed(3))
    samples[1] = replace(samples[1], mask=torch.full((H, W), 255))
    numbers = pxap(exact=exact)(case(samples, raw, pooled))
    assert numbers.isnan().any(1).tolist() == [False, True, False, False]
    left = [samples[i] for i in (0, 2, 3)]
    whole, _ = value(pxap(exact=exact), case(samples, raw, pooled))
    assert whole == pytest.approx(value(pxap(exact=exact), case(left, raw[[0, 2, 3]], pooled))[0], abs=1e-12)
    alone = case([samples[1]], raw[1:2], pooled)
    assert math.isnan(value(pxap(exact=exact), alone)[0])


@pytest.mark.parametrize("exact", [False, True])
def test_without_any_pixel_of_a_label_there_is_no_number(pooled, exact):
    samples = [replace(one, mask=torch.zeros(H, W, dtype=torch.long)) for one in made(0)]
    assert math.isnan(value(pxap(exact=exact), case(samples, torch.rand(4, 1, H, W), pooled))[0])


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30), st.randoms())
@settings(max_examples=60, deadline=None)
def test_average_precision_is_that_of_loops_whatever_the_order(pairs, random):
    scores, truth = [float(s) / 7 for s, _ in pairs], [t for _, t in pairs]
    found = average_precision(torch.tensor(scores), torch.tensor(truth))
    if not any(truth):
        assert math.isnan(found)
        return
    assert found == pytest.approx(by_loops(scores, truth), abs=1e-12)
    assert 0 < found <= 1
    random.shuffle(pairs)
    other = average_precision(torch.tensor([float(s) / 7 for s, _ in pairs]), torch.tensor([t for _, t in pairs]))
    assert other == found
    positives = torch.tensor([sum(t for s, t in pairs if s == k) for k in range(7)], dtype=torch.float64)
    negatives = torch.tensor([sum(not t for s, t in pairs if s == k) for k in range(7)], dtype=torch.float64)
    assert float(histogram_average_precision(positives, negatives)) == pytest.approx(found, abs=1e-12)
    assert float(histogram_average_precision(positives / 3, negatives / 3)) == pytest.approx(found, abs=1e-12)


def test_average_precision_by_hand():
    assert average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True])) == pytest.approx(5 / 6)
    assert average_precision(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, False, True])) == pytest.approx(7 / 12)
    assert math.isnan(average_precision(torch.tensor([1.0, math.nan]), torch.tensor([True, False])))
    assert math.isnan(average_precision(torch.zeros(0), torch.zeros(0, dtype=torch.bool)))


@given(st.integers(0, 10**6), st.permutations(range(5)), st.integers(1, 4), st.booleans())
@settings(max_examples=20, deadline=None)
def test_neither_order_nor_batches_change_the_number(classifiers, seed, order, first, exact):
    network = classifiers["pooled"]
    samples, raw = made(seed, 5, (4, 5)), torch.rand(5, 1, 4, 5, generator=torch.Generator().manual_seed(seed))
    whole, _ = value(pxap(exact=exact), case(samples, raw, network))
    shuffled = [samples[i] for i in order]
    split, _ = value(
        pxap(exact=exact),
        case(shuffled[:first], raw[list(order[:first])], network),
        case(shuffled[first:], raw[list(order[first:])], network),
    )
    assert whole == pytest.approx(split, abs=1e-9, nan_ok=True)
    assert math.isnan(whole) or 0 < whole <= 100


def test_the_map_is_resized_as_asked(pooled):
    samples, raw = made(0), torch.rand(4, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    for mode in ("bicubic", "bilinear"):
        shown = torch.nn.functional.interpolate(raw, (H, W), mode=mode, align_corners=False)
        found, _ = value(pxap(resize=mode), case(samples, raw, pooled))
        assert found == pytest.approx(published(samples, shown[:, 0]), abs=1e-9)


def test_the_curve_is_the_precision_where_each_recall_is_first_reached(pooled):
    samples, raw = made(4), torch.rand(4, 1, H, W, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    one = pxap(bins=50)
    found, mean = value(one, case(samples, raw, pooled))
    curve = one.curve(mean)
    positives, negatives = mean.tolist()[:51], mean.tolist()[51:]
    for i, precision in enumerate(curve.tolist()):
        hits = errors = 0.0
        for p, n in zip(reversed(positives), reversed(negatives), strict=True):
            hits, errors = hits + p, errors + n
            if hits > 0 and hits / sum(positives) >= i / 100 - 1e-9:
                break
        assert precision == pytest.approx(hits / (hits + errors), abs=1e-9)
    assert len(curve) == 101
    assert abs(100 * float(curve.mean()) - found) < 3


def test_it_runs_through_the_evaluation(pooled):
    samples = [replace(one, image=torch.rand(3, H, W, dtype=torch.float64)) for one in made(6)]
    raw = torch.rand(4, 1, H, W, generator=torch.Generator().manual_seed(6))
    places = {id(one.image): i for i, one in enumerate(samples)}

    def method(classifier, x, y):
        return torch.stack(
            [raw[next(i for s, i in ((s, places[id(s.image)]) for s in samples) if s.image.equal(one))] for one in x]
        )

    for exact in (False, True):
        scores = measure(method, pooled, batches(samples, 3), {"pxap": pxap(exact=exact)}).scores[0]
        assert scores.value == pytest.approx(value(pxap(exact=exact), case(samples, raw, pooled))[0], abs=1e-9)
        assert (scores.count, scores.per_image, len(scores.curve)) == (4, (), 0 if exact else 101)


@pytest.mark.parametrize("exact", [False, True])
def test_a_single_pixel_is_an_image_too(pooled, exact):
    one = Sample("a", torch.zeros(3, 1, 1), label=0, mask=torch.ones(1, 1, dtype=torch.long))
    two = replace(one, id="b", mask=torch.zeros(1, 1, dtype=torch.long))
    assert value(pxap(exact=exact), case([one, two], torch.rand(2, 1, 1, 1), pooled))[0] == 50


def test_what_is_wrong_is_said(pooled, plain):
    with pytest.raises(LookupError, match="no resize called 'cubic'; did you mean bicubic"):
        pxap(resize="cubic")
    with pytest.raises(ValueError, match="expected bins >= 1, got 0"):
        pxap(bins=0)
    bare = [replace(one, mask=None) for one in made(0)]
    for exact in (False, True):
        with pytest.raises(ValueError, match="pxap needs a mask, and '0' has none"):
            pxap(exact=exact)(case(bare, torch.rand(4, 1, H, W), pooled))
