"""The pointing games, point by point and pixel by pixel."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from sightline.accumulate import Accumulate
from sightline.classifier import wrap
from sightline.data import Sample, collate
from sightline.evaluation import finite, summed
from sightline.maps import resize, unit
from sightline.metrics import Case, energy_pointing_game, pointing_game
from sightline.runs import Choice

H, W, K = 7, 9, 5
NETWORK = wrap(nn.Sequential(nn.Conv2d(3, K, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), normalization="none", size=8)
"""A case has one; the games do not ask it."""


def maps(*rows):
    return torch.tensor(rows, dtype=torch.float64).view(1, 1, len(rows), -1)


def points(*places, size=(H, W)):
    """A map that is zero but for ones at (row, column)."""
    found = torch.zeros(1, 1, *size, dtype=torch.float64)
    for row, column in places:
        found[0, 0, row, column] = 1
    return found


def sample(name="a", label=2, region=(slice(1, 4), slice(2, 5)), size=(H, W), **more):
    """Class 2 on some pixels, class 0 on one, the last row ignored."""
    mask = torch.zeros(size, dtype=torch.long)
    mask[region], mask[0, 0], mask[-1] = 3, 1, 255
    return Sample(name, torch.zeros(3, *size), label=label, mask=mask, **more)


def case(samples, raw, classes=K):
    batch = collate(samples)
    raw = finite(raw)
    seen = unit(resize(raw, (batch.x.shape[2], batch.x.shape[3])))
    logits = torch.zeros(len(samples), classes)
    return Case(NETWORK, batch.x, batch.y, seen, raw, NETWORK, batch, logits)


def played(samples, raw, **settings):
    """One number an image: 100, 0 or NaN."""
    return pointing_game(average="image", **settings)(case(samples, raw))[:, 0].tolist()


def summed_up(measure, cases):
    sums, done = Accumulate(measure), 0
    for one in cases:
        sums.update(measure(one), torch.arange(done, done + len(one.x)))
        done += len(one.x)
    return summed(Choice("game"), sums)


def slow_hit(values, region, tolerance, ties, strict=True):
    """Look at every pixel of the region from every point."""
    top = max(max(row) for row in values)
    ties_at = [(r + 0.5, c + 0.5) for r, row in enumerate(values) for c, v in enumerate(row) if v == top]
    mean = tuple(sum(one) / len(ties_at) for one in zip(*ties_at, strict=True))
    chosen = {"mean": [mean], "first": ties_at[:1], "any": ties_at}[ties]
    for y, x in chosen:
        for r, row in enumerate(region):
            for c, is_in in enumerate(row):
                squared = (r + 0.5 - y) ** 2 + (c + 0.5 - x) ** 2
                near = squared < tolerance**2 if strict else squared <= tolerance**2
                if is_in and (near or (math.floor(y), math.floor(x)) == (r, c)):
                    return True
    return False


@settings(max_examples=120, deadline=None)
@given(
    arrays("int64", (4, 6), elements=st.integers(0, 4)),
    arrays("bool", (4, 6), elements=st.booleans()),
    st.sampled_from([0.0, 0.4, 0.75, 1.0, 1.5, 2.0, math.sqrt(2), 5.0, 40.0]),
    st.sampled_from(["mean", "first", "any"]),
    st.booleans(),
)
def test_a_hit_is_a_point_whose_disc_meets_the_region(values, region, tolerance, ties, strict):
    mask = torch.from_numpy(region).long() * 3
    one = Sample("a", torch.zeros(3, 4, 6), label=2, mask=mask)
    found = played([one], torch.from_numpy(values).double()[None, None], tolerance=tolerance, ties=ties, strict=strict)
    expected = 100.0 * slow_hit(values.tolist(), region.tolist(), tolerance, ties, strict)
    assert found == [expected] if region.any() else math.isnan(found[0])


def test_the_disc_is_open_or_closed():
    corner = points((0, 8))  # three columns right of the region, one row above it
    away = math.hypot(4, 1)
    assert played([sample()], corner, tolerance=away) == [0.0]
    assert played([sample()], corner, tolerance=away, strict=False) == [100.0]
    assert played([sample()], corner, tolerance=away + 1e-6) == [100.0]
    assert played([sample()], corner, tolerance=away, strict=False, ties="any") == [100.0]
    assert played([sample()], corner, tolerance=away, ties="any") == [0.0]


def test_without_tolerance_the_points_own_pixel_counts():
    for place, hit in (((1, 2), 100.0), ((3, 4), 100.0), ((0, 2), 0.0), ((1, 1), 0.0), ((4, 4), 0.0), ((3, 5), 0.0)):
        for ties in ("mean", "first", "any"):
            assert played([sample()], points(place), tolerance=0.0, ties=ties) == [hit], (place, ties)


def test_a_point_between_pixels_is_as_near_to_the_one_before():
    between = points((2, 4), (2, 5))  # the region ends with column 4, the point's own pixel is column 5
    for tolerance, hit in ((0.0, 0.0), (0.5, 0.0), (0.75, 100.0)):
        assert played([sample()], between, tolerance=tolerance) == [hit]
    assert played([sample()], between, tolerance=0.5, strict=False) == [100.0]


def test_ties_are_averaged_the_first_one_or_any():
    around, right = points((0, 3), (4, 3)), points((2, 3), (6, 8))
    assert [played([sample()], around, tolerance=0.0, ties=ties) for ties in ("mean", "first", "any")] == [
        [100.0], [0.0], [0.0]
    ]  # fmt: skip
    assert [played([sample()], right, tolerance=0.0, ties=ties) for ties in ("mean", "first", "any")] == [
        [0.0], [100.0], [100.0]
    ]  # fmt: skip
    left = points((0, 0), (2, 3))
    assert [played([sample()], left, tolerance=0.0, ties=ties) for ties in ("first", "any")] == [[0.0], [100.0]]


def test_a_constant_map_points_at_the_middle_the_corner_or_everywhere():
    flat = torch.full((1, 1, H, W), 0.3, dtype=torch.float64)
    middle, corner = (sample(region=region) for region in ((slice(3, 4), slice(4, 5)), (slice(1, 2), slice(0, 1))))
    for raw in (flat, torch.full_like(flat, torch.nan)):
        assert played([middle], raw, tolerance=0.0) == [100.0]
        assert played([corner], raw, tolerance=0.0) == [0.0]
        assert played([corner], raw, tolerance=0.0, ties="first") == [0.0]
        assert played([corner], raw, tolerance=1.1, ties="first") == [100.0]
        assert played([corner], raw, tolerance=0.0, ties="any") == [100.0]


def test_a_plateau_stays_one_where_the_map_is_enlarged():
    raw = torch.tensor([[0.1, 0.2, 0.1], [0.2, 0.3, 0.7], [0.1, 0.7, 0.7]])[None, None]  # float32, the corner cell ties
    size = (22, 31)
    shown = resize(raw.double(), size)[0, 0]
    ties = (shown > 0.7 - 1e-6).nonzero().double() + 0.5
    assert len(ties) > (shown == shown.max()).sum(), "rounding must break the ties, or this tests nothing"
    y, x = ties.mean(0).tolist()
    region = (slice(math.floor(y), math.floor(y) + 1), slice(math.floor(x), math.floor(x) + 1))
    assert played([sample(region=region, size=size)], raw, tolerance=0.0) == [100.0]


def test_the_map_is_resized_as_asked():
    raw = maps([0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.9, 0.0], [0.0, 0.8, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0])
    found = set()
    for mode in ("nearest", "bilinear", "bilinear_corners", "bicubic"):
        shown = resize(raw, (15, 13), mode)[0, 0]
        row, column = divmod(int(shown.argmax()), 13)
        assert shown.flatten().topk(2).values.diff() != 0 or mode == "nearest"
        region = (slice(row, row + 1), slice(column, column + 1))
        first = played([sample(region=region, size=(15, 13))], raw, tolerance=0.0, resize=mode, ties="first")
        assert first == [100.0]
        found.add((row, column))
    assert len(found) > 1, "the modes must differ, or this tests nothing"


def test_boxes_are_their_pixels():
    boxes = torch.tensor([[1.4, 2.6, 3.5, 5.2], [6.0, -3.0, 20.0, 1.0], [0.0, 0.0, 9.0, 9.0]])
    one = sample(boxes=boxes, box_labels=torch.tensor([2, 2, 4]))
    hit = {(r, c) for r in range(H) for c in range(W) if played(
        [one], points((r, c)), on="boxes", tolerance=0.0) == [100.0]}  # fmt: skip
    assert hit == {(3, 1), (3, 2), (4, 1), (4, 2), (0, 6), (0, 7), (0, 8)}


def test_boxes_come_from_the_mask_where_there_are_none():
    assert played([sample()], points((2, 2)), on="boxes", tolerance=0.0) == [100.0]
    hollow = sample(region=(torch.tensor([1, 3]), torch.tensor([2, 4])))
    assert played([hollow], points((2, 3)), on="boxes", tolerance=0.0) == [100.0]
    assert played([hollow], points((2, 3)), tolerance=0.0) == [0.0]


def test_an_image_without_the_class_does_not_count_and_one_whose_box_is_cropped_away_is_missed():
    nothing = sample(boxes=torch.zeros(0, 4))
    other = sample(boxes=torch.tensor([[0.0, 0.0, 3.0, 3.0]]), box_labels=torch.tensor([4]))
    away = sample(boxes=torch.tensor([[20.0, 0.0, 30.0, 3.0]]))
    thin = sample(boxes=torch.tensor([[2.0, 1.0, 2.0, 4.0]]))
    flat = torch.ones(4, 1, H, W, dtype=torch.float64)
    found = played([nothing, other, away, thin], flat, on="boxes", ties="any", tolerance=100.0)
    assert [math.isnan(value) for value in found] == [True, True, False, False]
    assert found[2:] == [0.0, 0.0]
    absent, ignored = sample(label=3), replace(sample(), mask=torch.full((H, W), 255))
    assert all(math.isnan(value) for value in played([absent, ignored], flat[:2]))


def test_ignored_pixels_are_no_part_of_the_object():
    whole = replace(sample(), mask=torch.full((H, W), 3).index_fill(0, torch.tensor([2]), 255))
    assert played([whole], points((2, 3)), tolerance=0.0) == [0.0]
    assert played([whole], points((2, 3)), tolerance=1.1) == [100.0]


def test_boxes_that_are_all_difficult_do_not_count():
    boxes, of = torch.tensor([[0.0, 0.0, 3.0, 3.0]] * 3), torch.tensor([2, 2, 1])
    for hard, counts in (([True, True, False], False), ([True, False, True], True), ([False, False, True], True)):
        one = sample(boxes=boxes, box_labels=of, difficult=torch.tensor(hard))
        found = played([one], points((1, 1)), on="boxes")
        assert math.isnan(found[0]) is not counts, hard
        assert played([one], points((2, 2))) == [100.0], "the mask knows nothing of it"
    alone = sample(boxes=boxes, difficult=torch.tensor([True] * 3))
    assert math.isnan(played([alone], points((1, 1)), on="boxes")[0])
    none = sample(boxes=boxes[:0], box_labels=of[:0], difficult=torch.zeros(0, dtype=torch.bool))
    assert math.isnan(played([none], points((1, 1)), on="boxes")[0])


def shape(rows, columns, label=2, others=()):
    mask = torch.zeros(10, 10, dtype=torch.long)
    for value, row in others:
        mask[row] = value
    mask[:rows, :columns] = 3
    return Sample("a", torch.zeros(3, 10, 10), label=label, mask=mask)


@pytest.mark.parametrize(
    ("one", "plays", "total"),
    [
        (shape(4, 6, others=[(1, 9)]), True, False),  # 24 of 100, and 10 of another class
        (shape(5, 5, others=[(1, 9)]), False, False),  # 25 is not below a quarter
        (shape(4, 6), False, False),  # nothing else is there
        (shape(4, 6, others=[(255, 9)]), False, False),  # what is ignored is no class
        (shape(2, 6, others=[(1, 9)]), True, True),  # 12 + 10
        (shape(2, 7, others=[(1, 9), (255, 8)]), True, True),  # 14 + 10: what is ignored has no area
        (replace(shape(4, 6), labels=torch.tensor([0, 0, 1, 0, 1])), True, True),  # the labels know more
        (replace(shape(4, 6, others=[(1, 9)]), labels=torch.tensor([0, 0, 1, 0, -1])), False, False),
    ],
)
def test_difficult_images_show_small_objects_and_another_class(one, plays, total):
    raw = points((0, 0), size=(10, 10))
    for subset, expected in (("all", True), ("difficult", plays), ("difficult_total", total)):
        assert math.isnan(played([one], raw, subset=subset)[0]) is not expected


def test_boxes_too_are_small_in_sum_and_within_the_image():
    def boxed(*boxes, of=None):
        corners = torch.tensor(boxes, dtype=torch.float32)
        return Sample("a", torch.zeros(3, 10, 10), label=2, boxes=corners, box_labels=of and torch.tensor(of))

    raw, small, other = points((0, 0), size=(10, 10)), [0.0, 0.0, 4.0, 3.0], [8.0, 8.0, 9.0, 9.0]
    wide = [0.0, 0.0, 100.0, 1.0]
    for one, plays, total in (
        (boxed(small, small, other, of=[2, 2, 1]), True, False),  # 24, with the other 25
        (boxed(small, other, of=[2, 1]), True, True),
        (boxed(small, small, [0.0, 9.0, 1.0, 10.0], other, of=[2, 2, 2, 1]), False, False),  # 25
        (boxed(small, small), False, False),
        (boxed(wide, other, of=[2, 1]), True, True),  # 10 in the image
        (boxed([20.0, 20.0, 40.0, 40.0], other, of=[2, 1]), True, True),  # 0 in the image
    ):
        for subset, expected in (("difficult", plays), ("difficult_total", total)):
            assert math.isnan(played([one], raw, on="boxes", subset=subset)[0]) is not expected


def test_the_accuracy_is_averaged_over_classes_and_the_hits_of_images_are_kept():
    regions = [(slice(r, r + 1), slice(0, 4)) for r in (1, 2, 3, 4)]
    samples = [sample(str(i), region=region) for i, region in enumerate(regions)]
    samples += [sample("4", label=0), sample("5", label=3)]  # class 0 is at (0, 0); class 3 nowhere
    raw = points((2, 1)).expand(6, 1, H, W)
    hits = [0.0, 100.0, 0.0, 0.0, 0.0, math.nan]
    assert played(samples, raw, tolerance=0.0)[:5] == hits[:5]
    raw = torch.cat([raw[:4], points((0, 0)), raw[5:]])
    by_class = summed_up(pointing_game(tolerance=0.0), [case(samples[:3], raw[:3]), case(samples[3:], raw[3:])])
    by_image = summed_up(pointing_game(tolerance=0.0, average="image"), [case(samples, raw)])
    assert (by_class.value, by_class.count) == ((25.0 + 100.0) / 2, 5)
    assert (by_image.value, by_image.count) == (2 / 5 * 100.0, 5)
    assert str(by_class.per_image) == str(by_image.per_image) == "(0.0, 100.0, 0.0, 0.0, 100.0, nan)"
    assert by_class.higher_is_better is True


def test_where_no_image_counts_the_accuracy_is_not_a_number():
    for average in ("class", "image"):
        score = summed_up(pointing_game(average=average), [case([sample(label=3)], points((0, 0)))])
        assert math.isnan(score.value)
        assert score.count == 0


def test_random_points_hit_as_often_as_the_object_is_large():
    generator, n = torch.Generator().manual_seed(1), 3000
    raw = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    one = Sample("a", torch.zeros(3, 8, 8), label=2, mask=torch.zeros(8, 8, dtype=torch.long))
    one.mask[2:5, 1:6] = 3
    boxed = replace(one, boxes=torch.tensor([[1.0, 2.0, 6.0, 5.0]]))
    share, deviation = 100 * 15 / 64, 100 * math.sqrt(15 / 64 * 49 / 64 / n)
    for on in ("mask", "boxes"):
        for ties in ("mean", "first", "any"):
            found = summed_up(pointing_game(tolerance=0.0, on=on, ties=ties), [case([boxed] * n, raw)])
            assert abs(found.value - share) < 4 * deviation
    assert abs(summed_up(energy_pointing_game(), [case([boxed] * n, raw)]).value - share) < 0.5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from(["mean", "first", "any"]))
def test_games_depend_neither_on_the_batch_nor_on_a_positive_scale(seed, size, ties):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-2, 4, (6, 1, 3, 4), generator=generator).double()
    samples = [sample(str(i), label=int(i % 3)) for i in range(6)]
    for measure in (pointing_game(ties=ties, tolerance=1.5), energy_pointing_game(on="mask")):
        whole = summed_up(measure, [case(samples, raw)])
        parts = [case(samples[i : i + size], 4 * raw[i : i + size]) for i in range(0, 6, size)]
        found = summed_up(measure, parts)
        torch.testing.assert_close(found.value, whole.value, rtol=0, atol=1e-9, equal_nan=True)
        torch.testing.assert_close(
            torch.tensor(found.per_image), torch.tensor(whole.per_image), rtol=0, atol=1e-9, equal_nan=True
        )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 6), st.floats(0, 6))
def test_a_larger_disc_misses_nothing_that_a_smaller_one_hits(seed, one, other):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 9, (4, 1, H, W), generator=generator).double()
    samples = [sample(str(i)) for i in range(4)]
    for ties in ("mean", "any"):
        less, more = (played(samples, raw, tolerance=t, ties=ties) for t in sorted((one, other)))
        assert all(a <= b for a, b in zip(less, more, strict=True))


def energy(samples, raw, **settings):
    return energy_pointing_game(**settings)(case(samples, raw))[:, 0].tolist()


def test_the_energy_is_what_lies_in_the_boxes():
    raw = torch.rand(1, 1, H, W, generator=torch.Generator().manual_seed(4), dtype=torch.float64) - 0.5
    low, high = float(raw.min()), float(raw.max())
    values = [[(float(v) - low) / (high - low) for v in row] for row in raw[0, 0]]
    boxes = torch.tensor([[1.0, 1.0, 4.0, 4.0], [3.0, 2.0, 6.0, 5.0], [0.0, 0.0, 9.0, 9.0]])
    one = sample(boxes=boxes, box_labels=torch.tensor([2, 2, 4]))

    def share(is_in, counts=lambda r, c: True):
        places = [(r, c) for r in range(H) for c in range(W) if counts(r, c)]
        return 100 * sum(values[r][c] for r, c in places if is_in(r, c)) / sum(values[r][c] for r, c in places)

    union = share(lambda r, c: (1 <= r < 4 and 1 <= c < 4) or (2 <= r < 5 and 3 <= c < 6))
    assert energy([one], raw) == pytest.approx([union], abs=1e-9)
    mask = one.mask
    of_mask = share(lambda r, c: mask[r, c] == 3, lambda r, c: mask[r, c] != 255)
    assert energy([one], raw, on="mask") == pytest.approx([of_mask], abs=1e-9)
    assert energy([replace(one, boxes=None, box_labels=None)], raw) == pytest.approx(
        [share(lambda r, c: 1 <= r < 4 and 2 <= c < 5)], abs=1e-9
    )


def test_a_map_that_shows_nothing_has_no_energy_and_one_in_the_box_has_all():
    for raw in (torch.zeros(1, 1, 2, 2), torch.full((1, 1, H, W), 0.7), torch.full((1, 1, 2, 2), torch.nan)):
        assert energy([sample()], raw) == [0.0]
    inside = points((1, 2), (3, 4))
    assert energy([sample()], inside) == energy([sample()], inside, on="mask") == [100.0]
    everything = sample(boxes=torch.tensor([[-5.0, -5.0, 50.0, 50.0]]))
    assert energy([everything], torch.rand(1, 1, H, W).double()) == [100.0]
    away = sample(boxes=torch.tensor([[20.0, 0.0, 30.0, 3.0], [2.0, 1.0, 2.0, 4.0]]))
    assert energy([away], inside) == [0.0]
    assert all(math.isnan(one) for one in energy([sample(boxes=torch.zeros(0, 4))], inside))
    assert all(math.isnan(one) for one in energy([replace(sample(), mask=torch.full((H, W), 255))], inside, on="mask"))


def test_objects_that_cover_too_much_do_not_count():
    raw = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def counts(one, **settings):
        return not math.isnan(energy([one], raw, **settings)[0])

    half = Sample("a", torch.zeros(3, 10, 10), label=2, boxes=torch.tensor([[0.0, 0.0, 10.0, 5.0]] * 2))
    more = replace(half, boxes=torch.tensor([[0.0, 0.0, 10.0, 5.0], [0.0, 4.0, 1.0, 6.0]]))
    assert counts(half, coverage=0.5)
    assert not counts(more, coverage=0.5)
    assert counts(more)
    assert counts(replace(half, boxes=torch.tensor([[0.0, -50.0, 10.0, 5.0]])), coverage=0.5)
    full = Sample("a", torch.zeros(3, 10, 10), label=2, mask=torch.full((10, 10), 3))
    assert counts(full, on="mask")
    assert not counts(full, on="mask", coverage=0.99)
    full.mask[:6] = 255
    full.mask[6:8] = 0
    assert counts(full, on="mask", coverage=0.5), "20 of the 40 pixels that count"
    assert not counts(full, on="mask", coverage=0.49)


def test_one_pixel_is_an_image():
    one = Sample("a", torch.zeros(3, 1, 1), label=2, mask=torch.full((1, 1), 3))
    raw = torch.full((1, 1, 1, 1), 0.5)
    for ties in ("mean", "first", "any"):
        assert played([one], raw, ties=ties) == played([one], raw, ties=ties, tolerance=0.0) == [100.0]
    assert energy([one], raw) == [0.0], "a constant map"


def test_the_class_that_is_scored_counts_and_not_the_label():
    both = case([sample(label=0)], points((2, 3)))
    predicted = replace(both, y=torch.tensor([2]))
    assert pointing_game(tolerance=0.0, average="image")(both).tolist() == [[0.0]]
    assert pointing_game(tolerance=0.0, average="image", scored="predicted")(predicted).tolist() == [[100.0]]
    assert pointing_game(scored="predicted").scored == energy_pointing_game(scored="predicted").scored == "predicted"


def test_what_is_wrong_is_said(plain):
    for setting, value, said in (
        ("ties", "average", "no tie rule called 'average'; known: any, first, mean"),
        ("on", "box", "no region called 'box'; did you mean boxes"),
        ("subset", "hard", "no subset called 'hard'"),
        ("average", "classes", "no average called 'classes'; did you mean class"),
    ):
        with pytest.raises(LookupError, match=said):
            pointing_game(**{setting: value})
    for tolerance in (-1.0, math.nan):
        with pytest.raises(ValueError, match="expected tolerance >= 0 pixels, got"):
            pointing_game(tolerance=tolerance)
    for coverage in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"expected coverage in \(0, 1\], a share of the image, got"):
            energy_pointing_game(coverage=coverage)
    with pytest.raises(LookupError, match="no region called 'cue'"):
        energy_pointing_game(on="cue")
    for game in (pointing_game, energy_pointing_game):
        with pytest.raises(ValueError, match="expected scored='label' or scored='predicted', got 'least'"):
            game(scored="least")
        bare, boxed = replace(sample("bare"), mask=None), replace(sample("b"), mask=None, boxes=torch.zeros(1, 4))
        said = rf"{game.__name__}\(on='boxes'\) needs boxes, and 'bare' has none"
        with pytest.raises(ValueError, match=said):
            game(on="boxes")(case([bare], points((0, 0))))
        said = rf"{game.__name__}\(on='mask'\) needs a mask, and 'b' has none; try on='boxes'"
        with pytest.raises(ValueError, match=said):
            game(on="mask")(case([boxed], points((0, 0))))
