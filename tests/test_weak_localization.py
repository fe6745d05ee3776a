"""Weak localization: hand-made maps, and every rule, box and overlap in slow loops."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.data import Sample
from sightline.evaluation import Maps
from sightline.maps import boxes, threshold
from sightline.protocols import weak_localization
from sightline.protocols._weak_localization import ALPHAS, cut_boxes, overlap

H, W = 24, 32
RULES = ("value", "energy", "mean")


def image(number, boxes=None, label=1, **more):
    """An image that says in its first pixel which one it is."""
    x = torch.zeros(3, H, W, dtype=torch.float64)
    x[0, 0, 0] = number / 1000
    corners = None if boxes is None else torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Sample(f"image-{number}", x, label=label, boxes=corners, **more)


def shows(maps):
    """The method that gives image n the n-th map."""

    def method(classifier, x, y):
        return torch.stack([maps[round(float(one[0, 0, 0]) * 1000)] for one in x])

    return method


def grid(*rows):
    return torch.tensor(rows, dtype=torch.float64)[None]


def slow_kept(values, alpha, rule):
    cells = [v for row in values for v in row]
    if rule == "value":
        return [[v - min(cells) >= alpha * (max(cells) - min(cells)) for v in row] for row in values]
    if rule == "mean":
        return [[v >= alpha * (sum(cells) / len(cells)) for v in row] for row in values]
    order = sorted(range(len(cells)), key=lambda i: -cells[i])
    total = sum(cells[i] for i in order)
    kept, so_far = set(), 0.0
    for i in order:
        so_far += cells[i]
        if so_far >= alpha * total:
            break
        kept.add(i)
    return [[r * len(row) + c in kept for c, _ in enumerate(row)] for r, row in enumerate(values)]


def slow_box(kept, height, width):
    i, j = len(kept), len(kept[0])
    places = [(r, c) for r in range(height) for c in range(width) if kept[r * i // height][c * j // width]]
    if not places:
        return 0, 0, width, height
    rows, columns = zip(*places, strict=True)
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def slow_iou(a, b):
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, across) * max(0, down)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def slow_missed(values, true, rule, alpha, iou, inclusive):
    if inclusive:
        true = [(math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)) for x0, y0, x1, y1 in true]
    found = slow_box(slow_kept(values, alpha, rule), H, W)
    return not any(slow_iou(found, one) >= iou for one in true)


def random_scene(seed, n):
    """Coarse random maps and boxes, so that rules tie and overlaps differ."""
    generator = torch.Generator().manual_seed(seed)
    maps = {i: torch.randint(0, 9, (1, 3, 4), generator=generator).double().square() for i in range(n)}
    samples = []
    for i in range(n):
        start = torch.rand(2, 2, generator=generator) * torch.tensor([20.0, 12.0])
        size = torch.rand(2, 2, generator=generator) * torch.tensor([24.0, 18.0]) + 1
        samples.append(image(i, torch.cat([start, start + size], 1).tolist()[: 1 + i % 2]))
    return samples, maps


@pytest.fixture(scope="module")
def classifier(classifiers):
    return classifiers["pooled"]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.5, 0.9]), st.booleans(), st.integers(1, 9))
def test_the_threshold_that_is_best_elsewhere_is_applied(classifier, seed, iou, inclusive, batch):
    samples, maps = random_scene(seed, 9)
    tuned, tested = samples[:5], samples[5:]
    found = weak_localization(
        shows(maps), classifier, tested, held_out=tuned, iou=iou, inclusive=inclusive, batch=batch
    )
    assert list(found) == [f"{rule}{end}" for rule in RULES for end in ("", "_alpha")]
    for rule in RULES:

        def missed(some, alpha, rule=rule):
            return [
                100.0 * slow_missed(maps[int(one.id[6:])][0].tolist(), one.boxes.tolist(), rule, alpha, iou, inclusive)
                for one in some
            ]

        curve = [sum(missed(tuned, alpha)) / 5 for alpha in ALPHAS[rule]]
        alpha = ALPHAS[rule][curve.index(min(curve))]
        expected = missed(tested, alpha)
        score = found[rule]
        assert score.curve == pytest.approx(curve)
        assert score.axis == ALPHAS[rule]
        assert found[f"{rule}_alpha"].value == alpha
        assert score.per_image == tuple(expected)
        assert score.value == pytest.approx(sum(expected) / 4)
        assert (score.count, score.higher_is_better, score.metric.name) == (4, False, rule)
        assert found[f"{rule}_alpha"].higher_is_better is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(3, 4), (1, 1), (6, 8), (24, 32), (50, 41)]), st.booleans())
def test_all_thresholds_at_once_are_those_of_maps(seed, shape, signed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.rand(3, 1, *shape, generator=generator, dtype=torch.float64) - 0.95 * signed
    h[1] = h[1].mul(4).round()
    h[2] = 0.5
    for rule in RULES:
        slow = torch.stack([boxes(threshold(h, alpha, rule), (H, W)) for alpha in ALPHAS[rule]], 1)
        torch.testing.assert_close(cut_boxes(h, rule, (H, W)), slow.double(), rtol=0, atol=0)


def test_the_grids_are_the_papers():
    assert ALPHAS["value"] == ALPHAS["energy"] == pytest.approx([0.05 * i for i in range(20)])
    assert ALPHAS["mean"] == pytest.approx([0.5 * i for i in range(21)])
    assert (0.15 in ALPHAS["value"], 0.95 in ALPHAS["value"], 10.0 in ALPHAS["mean"]) == (True, True, True)


HAND = grid([0, 1, 2, 1], [1, 4, 8, 1], [0, 2, 6, 2], [0, 0, 3, 1])
"""Sums to 32, mean 2; a cell is 8 x 6 pixels."""


def test_boxes_of_a_map_made_by_hand():
    found = {rule: cut_boxes(HAND[None], rule, (H, W))[0].tolist() for rule in RULES}
    whole = [0, 0, 32, 24]
    assert found["value"][0] == whole
    assert found["value"][10] == [8, 6, 24, 18], "4, 8 and 6 reach 4"
    assert found["value"][11] == [16, 6, 24, 18], "8 and 6 reach 4.4"
    assert found["value"][19] == [16, 6, 24, 12]
    assert found["energy"][0] == found["energy"][5] == whole, "the first cell alone would cross"
    assert found["energy"][6] == [16, 6, 24, 12], "8 < 9.6 <= 14"
    assert found["energy"][9] == [16, 6, 24, 18], "14 < 14.4 <= 18"
    assert found["energy"][12] == [8, 6, 24, 18], "18 < 19.2 <= 21"
    assert found["mean"][0] == whole
    assert found["mean"][2] == [8, 0, 32, 24], "at least 2: not the first column"
    assert found["mean"][4] == [8, 6, 24, 18]
    assert found["mean"][20] == whole, "nothing is left"


def test_all_that_is_left_is_boxed_not_its_largest_part(classifier):
    far = grid([9, 9, 0, 0], [9, 9, 0, 0], [0, 0, 0, 0], [0, 0, 0, 9])
    tuned = image(0, [0, 0, 32, 24])
    for true, error in (([0, 0, 16, 12], 100.0), ([0, 0, 32, 24], 0.0)):
        found = weak_localization(shows({0: far, 1: far}), classifier, [image(1, true)], held_out=[tuned])
        assert [found[rule].value for rule in RULES] == [error] * 3


def test_the_map_is_that_of_the_label_whatever_is_predicted(classifier):
    samples = [image(i, [8, 6, 24, 18], label=i) for i in range(4)]

    def method(classifier, x, y):
        assert y.tolist() == [round(float(one[0, 0, 0]) * 1000) for one in x]
        return HAND.expand(len(x), 1, 4, 4)

    assert weak_localization(method, classifier, samples[:2], held_out=samples[2:])["value"].value == 0.0


def test_held_out_images_without_boxes_choose_nothing(classifier):
    maps = dict.fromkeys(range(3), HAND)
    tuned = [image(0, [8, 6, 24, 18]), image(2, [])]
    found = weak_localization(shows(maps), classifier, [image(1, [8, 6, 24, 18])], held_out=tuned)["value"]
    assert min(found.curve) == found.value == 0.0
    assert max(found.curve) == 100.0


def test_equal_errors_take_the_smallest_threshold(classifier):
    found = weak_localization(
        shows({0: HAND, 1: HAND}), classifier, [image(1, [0, 0, 32, 24])], held_out=[image(0, [16, 6, 24, 18])]
    )
    assert found["value_alpha"].value == 0.4, "8, 6 and 4: half of the box is right"
    assert found["energy_alpha"].value == 0.3, "8 alone: half of the box too"
    assert found["mean_alpha"].value == 2.0, "4 and more; 3 and more would be a third"
    assert all(found[rule].value == 100.0 for rule in RULES)


def test_half_an_overlap_is_enough(classifier):
    top = torch.zeros(1, H, W, dtype=torch.float64)
    top[0, 4:14, 5:15] = 1
    maps = dict.fromkeys(range(3), top)
    tuned = image(0, [5, 4, 15, 14])
    for true, error in (([5, 4, 15, 9], 0.0), ([5, 4, 15, 8.9], 0.0), ([5, 4, 14.9, 9], 0.0), ([5, 4, 14, 9], 100.0)):
        found = weak_localization(shows(maps), classifier, [image(1, true)], held_out=[tuned])
        assert found["value"].value == error, true
        exact = weak_localization(shows(maps), classifier, [image(1, true)], held_out=[tuned], inclusive=False)
        assert exact["value"].value == (0.0 if true == [5, 4, 15, 9] else 100.0), true
    strict = weak_localization(shows(maps), classifier, [image(1, [5, 4, 15, 9])], held_out=[tuned], iou=0.51)
    assert strict["value"].value == 100.0


def test_any_box_of_the_label_will_do_and_those_of_others_will_not(classifier):
    maps = dict.fromkeys(range(5), HAND)
    right, wrong = [8.0, 6.0, 24.0, 18.0], [0.0, 0.0, 2.0, 2.0]
    tuned = image(0, [right])
    samples = [
        image(1, [wrong, right]),
        image(2, [wrong, right], box_labels=torch.tensor([1, 2])),
        image(3, [right], label=4, box_labels=torch.tensor([1])),
        image(4, []),
    ]
    found = weak_localization(shows(maps), classifier, samples, held_out=[tuned])["value"]
    assert str(found.per_image) == "(0.0, 100.0, nan, nan)"
    assert (found.value, found.count) == (50.0, 2)


def test_boxes_that_cannot_be_seen_are_missed_and_crops_keep_their_area(classifier):
    maps = {i: torch.ones(1, 2, 2, dtype=torch.float64) for i in range(6)}
    tuned = image(0, [0, 0, 32, 24])
    samples = [
        image(1, [40, 0, 60, 20]),
        image(2, [3, 3, 3, 9]),
        image(3, [0, 0, 0, 0]),
        image(4, [-32, 0, 32, 24]),
        image(5, [-33, 0, 32, 24]),
    ]
    for inclusive in (True, False):
        found = weak_localization(shows(maps), classifier, samples, held_out=[tuned], inclusive=inclusive)["value"]
        assert found.per_image == (100.0, 100.0, 100.0, 0.0, 100.0)


def test_maps_that_show_nothing_box_the_whole_image(classifier):
    maps = {0: HAND} | {i: torch.full((1, 4, 4), value).double() for i, value in ((1, 0.0), (2, 0.7), (3, math.nan))}
    samples = [image(i, [0, 0, 32, 24]) for i in (1, 2, 3)]
    found = weak_localization(shows(maps), classifier, samples, held_out=[image(0, [0, 0, 32, 24])])
    assert all(found[rule].value == 0.0 for rule in RULES)


def test_boxes_come_from_the_mask_where_there_are_none(classifier):
    mask = torch.zeros(H, W, dtype=torch.long)
    mask[6:18, 8:24] = 2
    found = weak_localization(
        shows({0: HAND, 1: HAND}), classifier, [image(1, mask=mask)], held_out=[image(0, [8, 6, 24, 18])]
    )
    assert [found[rule].value for rule in RULES] == [0.0, 0.0, 0.0]


def test_no_image_of_the_test_that_counts_is_no_number(classifier):
    found = weak_localization(
        shows({0: HAND, 1: HAND}), classifier, [image(1, [])], held_out=[image(0, [8, 6, 24, 18])]
    )
    assert math.isnan(found["value"].value)
    assert found["value"].count == 0
    empty = weak_localization(shows({0: HAND}), classifier, [], held_out=[image(0, [8, 6, 24, 18])])
    assert math.isnan(empty["mean"].value)


def test_no_map_is_made_twice(classifier):
    made = []

    def method(classifier, x, y):
        made.append(len(x))
        return HAND.expand(len(x), 1, 4, 4)

    samples = [image(i, [8, 6, 24, 18]) for i in range(8)]
    maps = Maps(method)
    for _ in range(2):
        weak_localization(maps, classifier, samples[:4], held_out=samples[4:], batch=3)
    assert sum(made) == 8


def test_overlaps_are_symmetric_and_bounded():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(20, 2, 2, generator=generator, dtype=torch.float64).mul(10).sort(dim=1).values.view(20, 4)
    corners[0, 2:] = corners[0, :2]
    found = overlap(corners, corners)
    torch.testing.assert_close(found, found.T)
    slow = [[slow_iou(a, b) for b in corners.tolist()] for a in corners.tolist()]
    torch.testing.assert_close(found, torch.tensor(slow, dtype=torch.float64))
    assert found.diagonal().tolist() == pytest.approx([0.0] + [1.0] * 19)


def test_what_is_wrong_is_said(classifier, plain):
    maps, one, other = dict.fromkeys(range(3), HAND), image(0, [0, 0, 9, 9]), image(1, [0, 0, 9, 9])
    for iou in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"expected iou in \(0, 1\], got"):
            weak_localization(shows(maps), classifier, [one], held_out=[other], iou=iou)
    with pytest.raises(ValueError, match="'image-0' is in samples and in held_out; choose the thresholds on other"):
        weak_localization(shows(maps), classifier, [one], held_out=[other, one])
    namesake = replace(other, id=one.id)
    weak_localization(shows(maps), classifier, [one], held_out=[namesake])
    for lacking, held in (([image(2)], [one]), ([one], [image(2)])):
        with pytest.raises(
            ValueError, match="weak_localization needs boxes, and 'image-2' has neither boxes nor a mask"
        ):
            weak_localization(shows(maps), classifier, lacking, held_out=held)
    for held in ([], [image(2, [])]):
        with pytest.raises(ValueError, match="no image of held_out has a box of its label; there is nothing to choose"):
            weak_localization(shows(maps), classifier, [one], held_out=held)
    with pytest.raises(ValueError, match="a batch holds at least one image"):
        weak_localization(shows(maps), classifier, [one], held_out=[other], batch=0)
