"""Segmentation: every pixel counted by hand, one threshold after the other."""

import importlib.util
import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline import running
from sightline.backgrounds import basic, labels_at, resolve_of
from sightline.classifier import wrap
from sightline.data import Sample
from sightline.datasets import creatures
from sightline.evaluation import Maps
from sightline.explainers._segmenter import MiniSeg, Segmenter
from sightline.maps import by_maximum
from sightline.methods import rise, segmenter
from sightline.methods._cam import cam
from sightline.methods._grad_cam import grad_cam
from sightline.metrics._segmentation import (
    REGIONS,
    confusion,
    fg_precision,
    four_regions,
    mean_iou,
    recall_on,
    regions,
    share,
)
from sightline.protocols._segmentation import THRESHOLDS, segmentation
from sightline.running import Relabeled
from sightline.runs import Choice, Spec

H, W, K = 24, 32, 5
PERCENT = ("miou", *(f"{name}{end}" for name in ("fg_precision", "dr_recall", "ndr_recall") for end in ("", "_micro")))


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def painted(seed=0, classes=(0, 2, 4), border=True):
    """A mask of rectangles of the classes, with a border that is ignored."""
    mask = torch.zeros(H, W, dtype=torch.long)
    for n, label in enumerate(classes):
        top, left = 3 + 6 * n + seed % 3, 2 + 7 * n
        mask[top : top + 7, left : left + 9] = label + 1
    if border:
        mask[:1], mask[:, -2:] = 255, 255
    return mask


def sample(n, mask, **fields):
    return Sample(f"s{n}", noise(3, H, W, seed=100 + n), mask=mask, **fields)


def given_maps(table):
    """A method that finds the map of an image and class in a table, by the image's first pixel."""

    def method(classifier, x, y=None):
        return torch.stack([table[float(image[0, 0, 0]), label] for image, label in zip(x, y.tolist(), strict=True)])

    return method


def table_of(samples, make):
    return {(float(one.image[0, 0, 0]), label): make(n, label) for n, one in enumerate(samples) for label in range(K)}


def classes_of(one):
    there = {int(v) - 1 for v in one.mask.flatten().tolist() if v not in (0, 255)}
    if one.labels is not None:
        return there, {k for k, v in enumerate(one.labels.tolist()) if v > 0}
    return there, there if one.label is None else {one.label}


def normalized(raw):
    up = torch.nn.functional.interpolate(raw[None].double(), (H, W), mode="bilinear", align_corners=False)[0, 0]
    top = max(v for row in up.tolist() for v in row)
    return [[v / top if top > 0 else 0.0 for v in row] for row in up.tolist()]


def by_hand(samples, maps, cams, threshold, tau_cam=0.25, tau_sm=0.15):
    """All numbers at one threshold, pixel by pixel."""
    matrix = [[0] * (K + 1) for _ in range(K + 1)]
    hits, sizes = {}, {}
    four = dict.fromkeys(REGIONS, 0)
    for one in samples:
        key = float(one.image[0, 0, 0])
        there, competing = classes_of(one)
        S = {k: normalized(maps[key, k]) for k in there | competing}
        C = {k: normalized(cams[key, k]) for k in there | competing}
        for r in range(H):
            for c in range(W):
                true = int(one.mask[r, c])
                if true == 255:
                    continue
                said, height = 0, threshold
                for k in sorted(competing):
                    if S[k][r][c] > height:
                        said, height = k + 1, S[k][r][c]
                matrix[true][said] += 1
                if true > 0:
                    found = "dr" if C[true - 1][r][c] >= tau_cam else "ndr"
                    high = "hsr" if S[true - 1][r][c] >= tau_sm else "lsr"
                    four[f"{high}_{found}"] += 1
                    sizes[found, true] = sizes.get((found, true), 0) + 1
                    hits[found, true] = hits.get((found, true), 0) + (said == true)
    ious = []
    for k in range(K + 1):
        union = sum(matrix[k]) + sum(row[k] for row in matrix) - matrix[k][k]
        ious += [100 * matrix[k][k] / union] if union else []
    predicted = {k: sum(row[k] for row in matrix) for k in range(1, K + 1)}
    right = {k: matrix[k][k] for k in range(1, K + 1)}
    precisions = [100 * right[k] / predicted[k] for k in predicted if predicted[k]]
    numbers = {"miou": mean(ious), "fg_precision": mean(precisions)}
    numbers["fg_precision_micro"] = ratio(sum(right.values()), sum(predicted.values()))
    for region in ("dr", "ndr"):
        keys = [key for key in sizes if key[0] == region]
        numbers[f"{region}_recall"] = mean([100 * hits[key] / sizes[key] for key in keys])
        numbers[f"{region}_recall_micro"] = ratio(sum(hits[k] for k in keys), sum(sizes[k] for k in keys))
    numbers |= {name: ratio(count, sum(four.values())) for name, count in four.items()}
    return numbers


def mean(values):
    return sum(values) / len(values) if values else math.nan


def ratio(part, whole):
    return 100 * part / whole if whole else math.nan


def same(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 1e-9}
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (found, expected))
    torch.testing.assert_close(a, b, equal_nan=True, **tolerance)


@pytest.fixture
def scenes():
    """One image of three classes, one with labels that leave out and add a class, one of a single class."""
    several = torch.tensor([1, 0, 1, 0, 1])
    other = torch.tensor([1, 1, 0, 0, 0])
    return [
        sample(0, painted(0), labels=several),
        sample(1, painted(1, (0, 3)), labels=other),
        sample(2, painted(2, (4,), border=False), label=4),
    ]


@pytest.fixture
def tables(scenes):
    return tuple(
        table_of(scenes, lambda n, k, s=s: noise(1, 6, 8, seed=s + 10 * n + k) - 0.15 - 2 * (k == 3 and n == 1))
        for s in (1000, 2000)
    )


def test_the_sweep_is_the_slow_loop_over_thresholds(curved, scenes, tables):
    thresholds = (0.01, 0.1, 0.3, 0.5, 0.77)
    maps, cams = (given_maps(table) for table in tables)
    found = segmentation(maps, curved, scenes, by=cams, thresholds=thresholds)
    expected = [by_hand(scenes, *tables, t) for t in thresholds]
    for name in PERCENT:
        same(found[name].curve, [one[name] for one in expected])
        assert found[name].axis == thresholds
        assert found[name].higher_is_better is True
    best = max(range(5), key=lambda i: expected[i]["miou"])
    same([found[name].value for name in PERCENT], [expected[best][name] for name in PERCENT])
    same([found[name].value for name in REGIONS], [expected[0][name] for name in REGIONS])
    assert found["threshold"].value == thresholds[best]
    assert {found[name].higher_is_better for name in (*REGIONS, "threshold")} == {None}
    assert {one.count for one in found.values()} == {3}


def test_other_levels_of_the_regions_count(curved, scenes, tables):
    maps, cams = (given_maps(table) for table in tables)
    found = segmentation(maps, curved, scenes, by=cams, thresholds=(0.2,), tau_cam=0.6, tau_sm=0.4)
    expected = by_hand(scenes, *tables, 0.2, 0.6, 0.4)
    same([found[name].value for name in (*PERCENT, *REGIONS)], [expected[name] for name in (*PERCENT, *REGIONS)])
    assert all(one.curve == one.axis == () for one in found.values())


def test_a_given_threshold_is_the_one_that_counts(curved, scenes, tables):
    maps, cams = (given_maps(table) for table in tables)
    swept = segmentation(maps, curved, scenes, by=cams)
    for i, threshold in ((4, 0.05), (39, 0.4)):
        fixed = segmentation(maps, curved, scenes, by=cams, threshold=threshold)
        assert fixed["threshold"].value == threshold == swept["miou"].axis[i]
        same([fixed[name].value for name in PERCENT], [swept[name].curve[i] for name in PERCENT])


def test_thresholds_run_from_one_to_fifty_hundredths():
    assert list(THRESHOLDS) == [round(0.01 * n, 2) for n in range(1, 51)]


@settings(max_examples=5, deadline=None)
@given(batch=st.integers(1, 5), order=st.permutations(range(3)))
def test_neither_batch_nor_order_matter(classifiers, batch, order):
    samples = [sample(0, painted(0)), sample(1, painted(1, (0, 3)), label=0), sample(2, painted(2, (4,)))]
    whole = segmentation(grad_cam, classifiers["curved"], samples, batch=3)
    parts = segmentation(Maps(grad_cam), classifiers["curved"], [samples[i] for i in order], batch=batch)
    for name, one in whole.items():
        same((one.value, *one.curve), (parts[name].value, *parts[name].curve))


def perfect(samples):
    return given_maps(table_of(samples, lambda n, k: (samples[n].mask == k + 1)[None].double()))


def test_the_truth_as_prediction_has_all_recalls_and_precision(curved, scenes):
    samples = [replace(one, labels=None, label=None) for one in scenes]
    found = segmentation(perfect(samples), curved, samples)
    for name in PERCENT:
        assert found[name].value == 100, name
        assert set(found[name].curve) == {100}, name
    assert found["threshold"].value == 0.01


def test_the_scale_of_the_head_leaves_the_cam_as_it_is(pooled, scenes):
    samples = [replace(one, labels=None) for one in scenes[:2]]
    before = segmentation(cam, pooled, samples)
    with torch.no_grad():
        pooled.model.head.weight *= torch.tensor([3.0, 0.2, 7.0, 1.5, 0.6])[:, None]
    after = segmentation(cam, pooled, samples)
    for name in (*PERCENT, *REGIONS):
        same(after[name].value, before[name].value)


def test_a_cam_recalls_what_it_defines(pooled):
    samples = [sample(n, painted(n, (k,))) for n, k in enumerate((0, 2, 3))]
    found = segmentation(cam, pooled, samples, thresholds=(0.05, 0.2, 0.2499, 0.26, 0.4))
    assert found["dr_recall"].curve[:3] == (100, 100, 100)
    assert found["dr_recall"].curve[3] <= 100
    assert found["ndr_recall"].curve[3:] == (0, 0)
    assert found["ndr_recall"].curve[0] > 0


def test_the_cam_defines_what_is_found_and_grad_cam_where_there_is_none(curved, pooled, scenes):
    maps = given_maps(table_of(scenes, lambda n, k: noise(1, 6, 8, seed=k)))
    for classifier, definition, other in ((pooled, cam, grad_cam), (curved, grad_cam, maps)):
        chosen, named, wrong = (segmentation(maps, classifier, scenes, by=by) for by in (None, definition, other))
        names = (*PERCENT, *REGIONS)
        same([chosen[name].value for name in names], [named[name].value for name in names])
        assert chosen["ndr_recall"].value != wrong["ndr_recall"].value


def test_equal_maps_give_the_pixel_to_the_first_class_and_a_map_at_the_threshold_to_the_background(curved):
    samples = [sample(0, painted(0, (1, 3), border=False))]
    maps = given_maps(table_of(samples, lambda n, k: torch.ones(1, H, W, dtype=torch.float64)))
    found = segmentation(maps, curved, samples, by=maps, thresholds=(0.5, 1.0))
    one, two = (int((samples[0].mask == k).sum()) for k in (2, 4))
    assert found["dr_recall"].curve == (50.0, 0.0)
    same(found["fg_precision_micro"].curve, (100 * one / (H * W), math.nan))
    same(found["miou"].curve[0], (100 * one / (H * W)) / 3)
    same(found["miou"].curve[1], 100 * (H * W - one - two) / (H * W) / 3)


@pytest.mark.parametrize("level", [0.01, 0.1, 0.7])
def test_thresholds_are_read_in_double_precision(curved, level):
    samples = [sample(0, painted(0, (1,), border=False))]
    maps = given_maps(table_of(samples, lambda n, k: torch.full((1, H, W), level, dtype=torch.float64)))
    found = segmentation(maps, curved, samples, normalize="none", threshold=level)
    assert math.isnan(found["fg_precision"].value)
    below = segmentation(maps, curved, samples, normalize="none", threshold=level * (1 - 1e-12))
    assert below["dr_recall"].value == 100


def test_what_compete_are_labels_else_the_label_else_the_mask(curved):
    mask = painted(0, (1, 3), border=False)
    seen = []

    def method(classifier, x, y=None):
        seen.extend(y.tolist())
        return torch.stack([(mask == k + 1)[None].double() for k in y.tolist()])

    for fields, competing in (
        ({}, {1, 3}),
        ({"label": 3}, {3}),
        ({"label": 3, "labels": torch.tensor([0, 1, 0, 1, 0])}, {1, 3}),
        ({"labels": torch.zeros(K, dtype=torch.long)}, set()),
    ):
        found = segmentation(method, curved, [sample(0, mask, **fields)], by=method, threshold=0.3)
        assert found["dr_recall"].value == 50 * len(competing)
        assert math.isnan(found["fg_precision"].value) == (not competing)
        assert found["hsr_dr"].value == 100
    assert set(seen) == {1, 3}


def test_normalizations(curved):
    samples = [sample(0, painted(0, (1,), border=False))]
    raw = noise(1, H, W, seed=5) * 3 + 1
    maps = given_maps(table_of(samples, lambda n, k: raw))
    for normalize, expected in (
        ("max", raw / raw.max()),
        ("unit", (raw - raw.min()) / (raw.max() - raw.min())),
        ("none", raw),
    ):
        levels = (0.3, 0.45, 0.9, 2.0 if normalize == "none" else 1.0)
        found = segmentation(maps, curved, samples, normalize=normalize, thresholds=levels)
        inside = samples[0].mask == 2
        for i, threshold in enumerate(levels):
            predicted = expected[0] > threshold
            share_right = ratio(int((predicted & inside).sum()), int(predicted.sum()))
            same(found["fg_precision_micro"].curve[i], share_right)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"threshold": 2.0}, r"expected a threshold in \[0, 1\], a share of a map's maximum, got 2\.0"),
        ({"thresholds": (-0.1, 0.3), "normalize": "unit"}, r"in \[0, 1\], a share of a map's maximum, got -0\.1"),
        ({"tau_cam": 2.0}, r"expected tau_cam in \(0, 1\], a share of the map's maximum, got 2\.0"),
        ({"tau_sm": 0.0}, r"expected tau_sm in \(0, 1\]"),
    ],
)
def test_shares_of_a_maximum_lie_between_none_and_all(curved, scenes, wrong, told):
    with pytest.raises(ValueError, match=told):
        segmentation(cam, curved, scenes, **wrong)


def test_what_the_cam_finds_is_defined_by_its_maximum_whatever_the_method_s_normalization(curved, scenes, tables):
    maps, cams = (given_maps(table) for table in tables)
    larger = given_maps({key: 10 * value for key, value in tables[1].items()})
    for normalize in ("unit", "none"):
        one, two = (segmentation(maps, curved, scenes, by=by, normalize=normalize) for by in (cams, larger))
        names = (*PERCENT, *REGIONS)
        same([one[name].value for name in names], [two[name].value for name in names])
    by_maximum = segmentation(maps, curved, scenes, by=cams)
    assert one["hsr_dr"].value + one["lsr_dr"].value == pytest.approx(
        by_maximum["hsr_dr"].value + by_maximum["lsr_dr"].value
    )


def test_a_constant_map_has_no_range(curved):
    samples = [sample(0, painted(0, (1,), border=False))]
    maps = given_maps(table_of(samples, lambda n, k: torch.full((1, 5, 3), 0.7, dtype=torch.float64)))
    found = segmentation(maps, curved, samples, normalize="unit")
    assert set(found["ndr_recall"].curve) == {0.0}
    assert math.isnan(found["fg_precision"].value)


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf])
def test_a_map_that_says_nothing_finds_nothing(curved, value):
    samples = [sample(0, painted(0, (1,), border=False))]
    flat = given_maps(table_of(samples, lambda n, k: torch.full((1, 3, 4), value, dtype=torch.float64)))
    found = segmentation(flat, curved, samples, by=flat)
    covered = int((samples[0].mask == 2).sum())
    assert math.isnan(found["fg_precision"].value)
    assert math.isnan(found["dr_recall"].value)
    assert found["ndr_recall"].value == 0
    assert found["lsr_ndr"].value == 100
    same(found["miou"].value, 100 * (H * W - covered) / (H * W) / 2)


def test_what_is_ignored_counts_nowhere(curved, scenes, tables):
    maps = given_maps({**tables[0], **table_of([sample(9, painted())], lambda n, k: noise(1, 6, 8))})
    blank = sample(9, torch.full((H, W), 255, dtype=torch.long), label=1)
    plain = segmentation(maps, curved, scenes, by=maps)
    more = segmentation(maps, curved, [*scenes, blank], by=maps)
    assert {name: one.value for name, one in more.items()} == {name: one.value for name, one in plain.items()}
    assert more["miou"].count == 3
    alone = segmentation(maps, curved, [blank], by=maps)
    assert all(math.isnan(one.value) for one in alone.values())
    assert alone["miou"].count == 0


def test_background_alone_is_background(curved):
    maps = given_maps({})
    found = segmentation(maps, curved, [sample(0, torch.zeros(H, W, dtype=torch.long))], by=maps)
    assert found["miou"].value == 100
    assert math.isnan(found["dr_recall"].value)


def test_what_is_wrong_is_said(curved, scenes, tables, plain):
    maps = given_maps(tables[0])
    bare = replace(scenes[1], mask=None)
    with pytest.raises(ValueError, match="segmentation needs a mask, and 's1' has none"):
        segmentation(maps, curved, [scenes[0], bare], by=maps)
    with pytest.raises(ValueError, match=r"the mask of 's1' is \(12, 32\) pixels, its image \(24, 32\)"):
        segmentation(maps, curved, [replace(bare, mask=painted()[:12])], by=maps)
    with pytest.raises(ValueError, match=r"'s1' shows class 5, and the network has classes 0\.\.4"):
        segmentation(maps, curved, [replace(bare, mask=torch.full((H, W), 6))], by=maps)
    with pytest.raises(ValueError, match=r"'s1' shows class 7, and"):
        segmentation(
            maps, curved, [replace(bare, mask=painted(), labels=torch.ones(8).long() * (torch.arange(8) == 7))]
        )
    for thresholds in ((), (0.3, 0.3), (0.3, 0.2), (0.1, math.nan)):
        with pytest.raises(ValueError, match="expected thresholds that increase, at least one, got"):
            segmentation(maps, curved, scenes, thresholds=thresholds)
    with pytest.raises(LookupError, match="no normalization called 'maximum'; did you mean max"):
        segmentation(maps, curved, scenes, normalize="maximum")
    with pytest.raises(ValueError, match="no image was measured"):
        segmentation(maps, curved, [])


# Background resolve

RESOLVED = ["basic", "smooth", "smooth?size=5&sigma=1.5&renormalize=false", "superpixel?scale=20&min_size=9"]
CRF = ["crf?threshold=0.2"] if importlib.util.find_spec("pydensecrf") else []


def by_labels(samples, maps, cams, threshold, resolve, everyone=False, tau_cam=0.25):
    """All four numbers from the label maps of one threshold."""
    matrix, said, true, region = torch.zeros(K + 1, K + 1).long(), [], [], []
    for one in samples:
        key = float(one.image[0, 0, 0])
        there, competing = classes_of(one)
        competing = sorted(range(K) if everyone else competing)
        S = torch.tensor([normalized(maps[key, k]) for k in competing], dtype=torch.float64).view(-1, H, W)
        predicted = labels_at(resolve(one.image, S), competing, threshold)
        matrix += confusion(predicted, one.mask, K + 1)
        found = torch.zeros(H, W, dtype=torch.bool)
        for k in there:
            found |= (one.mask == k + 1) & (torch.tensor(normalized(cams[key, k])) >= tau_cam)
        said, true, region = [*said, predicted], [*true, one.mask], [*region, found]
    predicted, truth, found = torch.stack(said), torch.stack(true), torch.stack(region)
    numbers = {"miou": mean_iou(matrix)}
    for end, average in (("", "macro"), ("_micro", "micro")):
        numbers[f"fg_precision{end}"] = fg_precision(matrix, average)
        numbers[f"dr_recall{end}"] = recall_on(found, predicted, truth, K + 1, average)
        numbers[f"ndr_recall{end}"] = recall_on(~found, predicted, truth, K + 1, average)
    return numbers


@pytest.mark.parametrize("compete", ["present", "all"])
@pytest.mark.parametrize("resolve", [*RESOLVED, *CRF])
def test_the_sweep_is_the_label_maps_of_each_threshold(curved, scenes, tables, resolve, compete):
    thresholds = (0.01, 0.1, 0.3, 0.5, 0.77)
    maps, cams = (given_maps(table) for table in tables)
    settings = {"by": cams, "thresholds": thresholds, "compete": compete}
    found = segmentation(maps, curved, scenes, resolve=resolve, **settings)
    expected = [by_labels(scenes, *tables, t, resolve_of(resolve), compete == "all") for t in thresholds]
    for name in PERCENT:
        same(found[name].curve, [one[name] for one in expected])
    unresolved = segmentation(maps, curved, scenes, **settings)
    same([found[name].value for name in REGIONS], [unresolved[name].value for name in REGIONS])
    if resolve != "basic":
        assert found["miou"].curve != unresolved["miou"].curve


def test_a_resolve_sees_each_image_and_the_maps_that_compete(curved, scenes, tables):
    seen = []

    def resolve(image, maps):
        seen.append((image, maps))
        return maps

    found = segmentation(given_maps(tables[0]), curved, scenes, resolve=resolve, by=given_maps(tables[1]), batch=2)
    assert len(seen) == len(scenes)
    for one, (image, maps) in zip(scenes, seen, strict=True):
        key = float(one.image[0, 0, 0])
        assert torch.equal(image, one.image)
        expected = [normalized(tables[0][key, k]) for k in sorted(classes_of(one)[1])]
        torch.testing.assert_close(maps, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    plain = segmentation(given_maps(tables[0]), curved, scenes, resolve=basic, by=given_maps(tables[1]))
    assert found["miou"].curve == plain["miou"].curve


def test_nothing_is_resolved_where_nothing_competes(curved):
    def resolve(image, maps):
        raise AssertionError

    one = sample(0, painted(0, (1, 3)), labels=torch.zeros(K, dtype=torch.long))
    maps = given_maps(table_of([one], lambda n, k: noise(1, 6, 8, seed=k)))
    assert segmentation(maps, curved, [one], by=maps, resolve=resolve)["dr_recall"].value == 0


@pytest.mark.parametrize("resolve", [*RESOLVED, *CRF])
def test_the_scale_of_the_maps_changes_nothing(curved, scenes, tables, resolve):
    maps, cams = (given_maps(table) for table in tables)
    larger = given_maps({key: 8 * value for key, value in tables[0].items()})
    one, two = (segmentation(each, curved, scenes, by=cams, resolve=resolve) for each in (maps, larger))
    assert {name: score.curve for name, score in one.items()} == {name: score.curve for name, score in two.items()}


@pytest.mark.parametrize("resolve", ["smooth", "superpixel?min_size=9"])
def test_neither_batch_nor_order_matter_to_a_resolve(curved, scenes, tables, resolve):
    maps, cams = (given_maps(table) for table in tables)
    whole = segmentation(maps, curved, scenes, by=cams, resolve=resolve)
    parts = segmentation(maps, curved, scenes[::-1], by=cams, resolve=resolve, batch=1)
    for name, one in whole.items():
        same((one.value, *one.curve), (parts[name].value, *parts[name].curve))


# All classes compete


def test_a_segmenter_is_the_argument_of_its_maximum(curved, scenes):
    """Its map of a class is log p_class - log p_background: at the threshold 0, without image labels."""
    logits = {float(one.image[0, 0, 0]): 2 * noise(K + 1, H, W, seed=n) for n, one in enumerate(scenes)}

    def segmenter(classifier, x, y=None):
        p = torch.stack([logits[float(image[0, 0, 0])].log_softmax(0) for image in x])
        return torch.stack([one[None, label + 1] - one[:1] for one, label in zip(p, y.tolist(), strict=True)])

    found = segmentation(segmenter, curved, scenes, by=segmenter, compete="all", normalize="none", threshold=0.0)
    matrix = sum(confusion(logits[float(one.image[0, 0, 0])].argmax(0), one.mask, K + 1) for one in scenes)
    same(found["miou"].value, mean_iou(matrix))
    same(found["fg_precision"].value, fg_precision(matrix))
    assert found["threshold"].value == 0
    swept = segmentation(
        segmenter, curved, scenes, by=segmenter, compete="all", normalize="none", thresholds=(-1.0, -0.3, 0.0, 0.4)
    )
    for i, threshold in enumerate((-1.0, -0.3, 0.0, 0.4)):
        matrix = torch.zeros(K + 1, K + 1).long()
        for one in scenes:
            p = logits[float(one.image[0, 0, 0])]
            matrix += confusion(labels_at(p[1:] - p[:1], range(K), threshold), one.mask, K + 1)
        same(swept["miou"].curve[i], mean_iou(matrix))


def test_that_all_compete_is_that_all_are_labels(curved, scenes, tables):
    maps, cams = (given_maps(table) for table in tables)
    labeled = [replace(one, labels=torch.ones(K, dtype=torch.long)) for one in scenes]
    everyone = segmentation(maps, curved, scenes, by=cams, compete="all")
    named = segmentation(maps, curved, labeled, by=cams)
    assert {name: one.curve for name, one in everyone.items()} == {name: one.curve for name, one in named.items()}
    assert everyone["miou"].curve != segmentation(maps, curved, scenes, by=cams)["miou"].curve


def test_a_cam_is_asked_about_the_classes_in_the_mask_alone(curved, scenes, tables):
    seen = []

    def by(classifier, x, y=None):
        seen.extend(zip((float(image[0, 0, 0]) for image in x), y.tolist(), strict=True))
        return given_maps(tables[1])(classifier, x, y)

    segmentation(given_maps(tables[0]), curved, scenes, by=by, compete="all")
    assert seen == [(float(one.image[0, 0, 0]), k) for one in scenes for k in sorted(classes_of(one)[0])]


# What defines the discriminative region


def test_a_reference_defines_what_is_found(curved, pooled, scenes, tables):
    maps = given_maps(tables[0])
    for by, of_reference in ((None, cam), (grad_cam, grad_cam)):

        def elsewhere(classifier, x, y=None, of_reference=of_reference):
            return of_reference(pooled, x, y)

        found = segmentation(maps, curved, scenes, by=by, reference=pooled)
        expected = segmentation(maps, curved, scenes, by=elsewhere)
        own = segmentation(maps, curved, scenes, by=by)
        names = (*PERCENT, *REGIONS)
        same([found[name].value for name in names], [expected[name].value for name in names])
        assert found["miou"].curve == own["miou"].curve
        assert found["dr_recall"].curve != own["dr_recall"].curve


def test_a_reference_that_is_the_classifier_changes_nothing(pooled, scenes, tables):
    one, two = (segmentation(given_maps(tables[0]), pooled, scenes, reference=each) for each in (None, pooled))
    assert {name: score.value for name, score in one.items()} == {name: score.value for name, score in two.items()}


@pytest.fixture
def twenty(seeded, networks):
    return wrap(seeded(networks.curved, classes=20, seed=3), layer="last", normalization="none", size=(64, 64))


@dataclass(frozen=True)
class Doubles:
    """Creatures in float64, as the small networks want them."""

    dataset: object
    classes: tuple = ()
    skipped: tuple = ()

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        one = self.dataset[index]
        return replace(one, image=one.image.double())


SIDES = {"legs": ("left leg", "right leg"), "wings": ("left wing", "right wing")}


def random_maps(classifier, x, y=None):
    """Maps that are told apart by image and class."""
    seeds = [int(1e6 * float(image.sum())) % 9973 + 31 * label for image, label in zip(x, y.tolist(), strict=True)]
    return torch.stack([noise(1, 16, 16, seed=seed) - 0.1 for seed in seeds])


def test_true_parts_define_what_is_found(twenty):
    source = creatures("test", count=5, variant="scenes", seed=2)
    samples = Doubles(source)
    found = segmentation(random_maps, twenty, samples, regions="cue", thresholds=(0.2, 0.6), batch=2)
    hits, sizes, four = ([{}, {}], {}, dict.fromkeys(REGIONS, 0))
    for n in range(5):
        one = samples[n]
        present = sorted({int(v) - 1 for v in one.mask.flatten().tolist()} - {-1})
        labels = torch.tensor(present)
        maps = random_maps(twenty, one.image.expand(len(labels), -1, -1, -1), labels)
        S = torch.nn.functional.interpolate(maps, (64, 64), mode="bilinear")[:, 0]
        S = S / S.amax((1, 2), keepdim=True)
        said = [labels_at(S, present, t) for t in (0.2, 0.6)]
        for k, s in zip(present, S, strict=True):
            names = [side for part in source.cues(k) for side in SIDES.get(part, (part,))]
            for r in range(64):
                for c in range(64):
                    if one.mask[r, c] == k + 1:
                        region = "dr" if any(one.parts[name][r, c] for name in names) else "ndr"
                        sizes[region, k] = sizes.get((region, k), 0) + 1
                        four[f"{'hsr' if s[r, c] >= 0.15 else 'lsr'}_{region}"] += 1
                        for i in (0, 1):
                            hit = int(said[i][r, c]) == k + 1
                            hits[i][region, k] = hits[i].get((region, k), 0) + hit
    for region in ("dr", "ndr"):
        keys = [key for key in sizes if key[0] == region]
        assert len(keys) > 2
        same(found[f"{region}_recall"].curve, [mean([100 * hits[i][k] / sizes[k] for k in keys]) for i in (0, 1)])
        total = sum(sizes[k] for k in keys)
        same(found[f"{region}_recall_micro"].curve, [100 * sum(hits[i][k] for k in keys) / total for i in (0, 1)])
    same([found[name].value for name in REGIONS], [100 * n / sum(four.values()) for n in four.values()])
    named = segmentation(random_maps, twenty, samples, thresholds=(0.2, 0.6))
    assert found["miou"].curve == named["miou"].curve


def test_true_parts_are_found_under_other_numbers_of_the_classes(twenty):
    source = creatures("test", count=4, variant="scenes", seed=5)
    once, again = tuple((7 * n + 3) % 20 for n in range(20)), (*range(5, 20), 4, 3, 2, 1, 0)

    def renumbered(*steps):
        def method(classifier, x, y=None):
            labels = y.tolist()
            for numbers in reversed(steps):
                labels = [numbers.index(label) for label in labels]
            return random_maps(classifier, x, torch.tensor(labels))

        return method

    plain = segmentation(random_maps, twenty, Doubles(source), regions="cue")
    one = Relabeled(source, once, 20)
    moved = segmentation(renumbered(once), twenty, Doubles(one), regions="cue")
    two = Relabeled(Doubles(one), again, 20)
    twice = segmentation(renumbered(once, again), twenty, two, regions="cue")
    for name in ("dr_recall", "ndr_recall", "dr_recall_micro", "ndr_recall_micro", *REGIONS):
        same([plain[name].value] * 2, [moved[name].value, twice[name].value])


def test_the_truth_has_all_recalls_on_true_parts_whoever_competes(twenty):
    samples = Doubles(creatures("test", count=3, variant="scenes"))
    masks = {float(samples[n].image.sum()): samples[n].mask for n in range(3)}

    def truth(classifier, x, y=None):
        pairs = zip(x, y.tolist(), strict=True)
        return torch.stack([(masks[float(image.sum())] == label + 1)[None].double() for image, label in pairs])

    for compete in ("present", "all"):
        found = segmentation(truth, twenty, samples, regions="cue", compete=compete)
        assert {found[name].value for name in PERCENT} == {100.0}
        assert found["hsr_dr"].value + found["hsr_ndr"].value == pytest.approx(100)


def test_what_is_wrong_with_the_new_settings_is_said(curved, pooled, twenty, scenes, tables, plain):
    maps = given_maps(tables[0])
    with pytest.raises(LookupError, match="no choice of competing classes called 'every'; known: all, present"):
        segmentation(maps, curved, scenes, compete="every")
    with pytest.raises(LookupError, match="no choice of regions called 'cues'; did you mean cue"):
        segmentation(maps, curved, scenes, regions="cues")
    with pytest.raises(LookupError, match="no background resolve called 'super'; did you mean superpixel"):
        segmentation(maps, curved, scenes, resolve="super")
    with pytest.raises(LookupError, match="smooth: no setting called 'width'"):
        segmentation(maps, curved, scenes, resolve={"name": "smooth", "width": 3})
    with pytest.raises(ValueError, match="the network has 5 classes and the reference 20; take one that was trained"):
        segmentation(maps, curved, scenes, reference=twenty)
    names, others = tuple("abcde"), tuple("abdce")
    named, other = replace(curved, classes=names), replace(pooled, classes=others)
    with pytest.raises(ValueError, match="class 2 is 'c' for the network and 'd' for the reference"):
        segmentation(maps, named, scenes, reference=other)
    for defined in ({"by": cam}, {"reference": pooled}):
        with pytest.raises(ValueError, match=r"regions='cue' are the data set's own, no CAM's; leave out by= and ref"):
            segmentation(maps, curved, scenes, regions="cue", **defined)
    with pytest.raises(
        ValueError, match=r"only creatures know which pixels truly tell .* and list knows none; take cr"
    ):
        segmentation(maps, curved, scenes, regions="cue")
    bare = Doubles(creatures("test", count=1))
    partless = replace(bare[0], parts={})

    class Partless(Doubles):
        def __getitem__(self, index):
            return partless

    with pytest.raises(ValueError, match="needs a mask and parts, and 'creatures-plain-test-00000-s0' lacks one"):
        segmentation(random_maps, twenty, Partless(creatures("test", count=1)), regions="cue")


# What it costs


def one_class_at_a_time(method):
    """The same method, not known to explain several classes of one pass."""

    def alone(classifier, x, y=None, /):
        return method(classifier, x, y)

    return alone


@pytest.fixture
def passes(pooled):
    """How many images went through the network."""
    counts = []
    handle = pooled.model.register_forward_hook(lambda _, __, logits: counts.append(len(logits)))
    yield counts
    handle.remove()


RISE = partial(rise, samples=6, seed=1)


@pytest.mark.parametrize("compete", ["present", "all"])
@pytest.mark.parametrize("method", [cam, partial(cam), RISE, segmenter])
def test_all_classes_of_one_pass_are_those_of_a_pass_each(pooled, scenes, method, compete):
    classifier = pooled
    if method is segmenter:
        network = Segmenter(MiniSeg(K + 1, widths=(4, 4, 6, 8), width=4), K).double().eval()
        classifier = wrap(network, layer="network.layer4", normalization="none", size=(H, W))
    samples = [*scenes, sample(3, torch.zeros(H, W, dtype=torch.long))]
    for batch in (1, 3, 9):
        asked = {"compete": compete, "batch": batch}
        found = segmentation(method, classifier, samples, **asked)
        expected = segmentation(one_class_at_a_time(method), classifier, samples, **asked)
        for name, one in expected.items():
            same((found[name].value, *found[name].curve), (one.value, *one.curve), rtol=0, atol=1e-9)


@pytest.mark.parametrize("compete", ["present", "all"])
def test_a_method_that_can_explains_all_classes_of_one_pass(pooled, passes, scenes, compete):
    samples = [*scenes, sample(3, painted(0, (1, 2)))]
    images, count, pairs = 4, 1, sum(len(classes_of(one)[0]) for one in samples)
    for method, by, reference, expected in (
        (cam, None, None, images),
        (partial(cam), cam, pooled, images),
        (cam, None, replace(pooled), 2 * images + count),
        (RISE, None, None, images * (1 + 6) + images),
        (RISE, grad_cam, None, images * (1 + 6) + pairs),
    ):
        passes.clear()
        segmentation(method, pooled, samples, by=by, reference=reference, compete=compete, batch=3)
        assert sum(passes) == expected + count, (method, by)
    passes.clear()
    alone = one_class_at_a_time(cam)
    segmentation(alone, pooled, samples, by=alone, compete=compete, batch=3)
    assert sum(passes) >= pairs + count


def test_a_reference_of_the_same_text_is_the_explained_network(monkeypatch):
    loaded, load = [], running.models.load
    monkeypatch.setattr(running.models, "load", lambda choice: (loaded.append(choice), load(choice))[1])
    model = {"name": "mini_resnet", "classes": 20}
    data = {"name": "creatures", "count": 3, "variant": "scenes"}
    table = {"model": model, "data": data, "method": "cam"}
    found = []
    for reference, count in ((None, 1), (model, 1), ({**model, "seed": 0}, 2)):
        loaded.clear()
        settings = {} if reference is None else {"reference": reference}
        asked = Spec.of({**table, "metrics": [{"name": "segmentation", **settings}]})
        found.append([one.value for one in running.run(asked).scores.scores])
        assert len(loaded) == count
    assert repr(found[0]) == repr(found[1]) == repr(found[2])
    loaded.clear()
    asked = Spec.of({**table, "layer": "layer3", "metrics": [{"name": "segmentation", "reference": model}]})
    running.run(replace(asked, method=Choice("grad_cam")))
    assert len(loaded) == 2


def test_maps_in_memory_are_not_made_again_by_a_pass_for_all(pooled, passes, scenes):
    maps = Maps(cam)
    fresh = segmentation(cam, pooled, scenes, batch=2)
    segmentation(maps, pooled, scenes[:2], batch=2)
    assert maps.seconds > 0
    passes.clear()
    found = segmentation(maps, pooled, scenes, batch=2)
    assert sum(passes) == 1 + 1, "the third image, and the one that tells how many classes there are"
    for name, one in fresh.items():
        same((found[name].value, *found[name].curve), (one.value, *one.curve))


def test_a_network_without_a_cam_is_asked_for_one_once(curved, scenes):
    calls = []
    handle = curved.model.register_forward_hook(lambda _, __, logits: calls.append(len(logits)))
    maps = given_maps(table_of(scenes, lambda n, k: noise(1, 6, 8, seed=k)))
    segmentation(maps, curved, scenes, batch=1)
    handle.remove()
    classes = sum(len(classes_of(one)[0]) for one in scenes)
    assert sum(calls) == 1 + 1 + classes, "classes, CAM that is not there, Grad-CAM of each class"


# Metrics


def test_a_confusion_matrix_by_hand():
    truth = torch.tensor([[0, 1, 2, 255], [1, 1, 2, 0]])
    predicted = torch.tensor([[0, 1, 1, 3], [2, 1, 2, 1]])
    matrix = confusion(predicted, truth, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    same(mean_iou(matrix), 100 * (1 / 2 + 2 / 5 + 1 / 3) / 3)
    same(fg_precision(matrix), 100 * (2 / 4 + 1 / 2) / 2)
    same(fg_precision(matrix, "micro"), 100 * 3 / 6)
    assert confusion((99 * truth).to(torch.int16), (99 * truth).to(torch.int16), 400, ignore=99 * 255)[198, 198] == 2


def test_pixels_of_a_region_by_hand():
    truth = torch.tensor([0, 1, 1, 1, 2, 2, 3, 255])
    predicted = torch.tensor([1, 1, 1, 0, 2, 1, 1, 1])
    region = torch.tensor([True, True, True, True, True, True, False, True])
    same(recall_on(region, predicted, truth, 4), 100 * (2 / 3 + 1 / 2) / 2)
    same(recall_on(region, predicted, truth, 4, "micro"), 100 * 3 / 5)
    assert math.isnan(recall_on(torch.zeros(8, dtype=torch.bool), predicted, truth, 4))
    assert recall_on(region, truth % 255, truth, 4) == 100


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tau_cam=st.floats(-0.2, 1.2), tau_sm=st.floats(-0.2, 1.2))
def test_the_four_regions_are_a_partition(seed, tau_cam, tau_sm):
    C, S = noise(5, 7, seed=seed), noise(5, 7, seed=seed + 1)
    inside = noise(5, 7, seed=seed + 2) < 0.6
    counts = regions(C, S, inside, tau_cam, tau_sm).tolist()
    expected = [0, 0, 0, 0]
    for c, s, there in zip(C.flatten().tolist(), S.flatten().tolist(), inside.flatten().tolist(), strict=True):
        if there:
            expected[(0 if c >= tau_cam else 2) + (0 if s >= tau_sm else 1)] += 1
    assert counts == expected
    assert sum(counts) == int(inside.sum())
    assert counts[0] + counts[1] == int(C[inside].ge(tau_cam).sum())
    if sum(counts):
        same(four_regions(C, S, inside, tau_cam, tau_sm).tolist(), [100 * n / sum(counts) for n in counts])
        same(float(four_regions(C, S, inside, tau_cam, tau_sm).sum()), 100.0)


def test_regions_at_their_borders_and_of_nothing():
    edge = torch.tensor([0.25, 0.2499, 0.25, 0.0]), torch.tensor([0.15, 0.15, 0.1499, 0.0])
    assert regions(*edge, torch.ones(4, dtype=torch.bool)).tolist() == [1, 1, 1, 1]
    assert four_regions(*edge, torch.zeros(4, dtype=torch.bool)).isnan().all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 6))
def test_numbers_of_a_matrix_are_percent_and_all_of_it_on_the_diagonal_is_100(seed, classes):
    truth = (noise(40, seed=seed) * classes).long()
    predicted = (noise(40, seed=seed + 1) * classes).long()
    matrix = confusion(predicted, truth, classes)
    assert int(matrix.sum()) == 40
    for number in (mean_iou(matrix), fg_precision(matrix), fg_precision(matrix, "micro")):
        assert math.isnan(number) or 0 <= number <= 100
    assert mean_iou(confusion(truth, truth, classes)) == 100


def test_maps_are_divided_by_their_maximum():
    maps = torch.tensor([[[1.0, -2.0], [4.0, 0.0]], [[-1.0, -2.0], [-4.0, -3.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert by_maximum(maps).tolist() == [[[0.25, -0.5], [1.0, 0.0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]


def test_wrong_classes_and_averages_are_said(plain):
    one = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"expected classes in 0\.\.1 in the prediction, got 0 to 2"):
        confusion(torch.tensor([0, 2]), one, 2)
    with pytest.raises(ValueError, match=r"expected classes in 0\.\.1 in the truth, got -1 to 0"):
        confusion(one, torch.tensor([0, -1]), 2)
    with pytest.raises(ValueError, match="expected average='macro' or average='micro', got 'mean'"):
        share(one, one, "mean")
    assert math.isnan(mean_iou(confusion(one, torch.tensor([255, 255]), 2)))
