"""Cue localization: every pair's pixels pooled and ranked by hand, one at a time."""

import math
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.data import Sample
from sightline.datasets import creatures, cub_crops
from sightline.evaluation import Maps
from sightline.protocols import PROTOCOLS
from sightline.protocols import cue_localization as cue_localization_of
from sightline.protocols._cue_localization import grouped
from sightline.protocols._cues import cues_of
from sightline.settings import bind

CUB = Path(__file__).parents[2] / "shared" / "data" / "CUB_200_2011"
H, W, ROWS, COLUMNS = 6, 8, 3, 4
PARTS = ("head", "back", "tail")
CODES = ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 1))
"""What the three parts of four classes look like."""
PAIRS = {"one": [(0, 1), (1, 2)], "two": [(0, 2), (0, 3), (2, 3)], "three": [(1, 3)]}
RAW = torch.rand(8, 4, ROWS, COLUMNS, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 - 0.7
NAMES = ("back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape",
         "right eye", "right leg", "right wing", "tail", "throat")  # fmt: skip


@dataclass(frozen=True)
class Birds:
    """Images of four classes, two each; the part of a pixel is its column."""

    order: tuple = (0, 1, 2, 3, 4, 5, 6, 7)
    hidden: tuple = ()
    masked: bool = True
    painted: bool = True

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        number = self.order[index]
        mask = torch.zeros(H, W, dtype=torch.long)
        mask[1:5, 1:7] = number // 2 + 1
        parts = {p: (mask > 0) & (torch.arange(W) // 2 == i) & (p not in self.hidden) for i, p in enumerate(PARTS)}
        points = torch.zeros(15, 3)
        for part, row, x in (("head", "crown", 1.5), ("back", "back", 4.0), ("tail", "tail", 6.0)):
            points[NAMES.index(row)] = torch.tensor([x, 3.0, float(part not in self.hidden)])
        return Sample(
            str(number),
            torch.full((3, H, W), number / 10),
            label=number // 2,
            mask=mask if self.masked else None,
            parts=parts,
            keypoints=points,
        )

    def differing(self, a, b):
        return tuple(part for part, x, y in zip(PARTS, CODES[a], CODES[b], strict=True) if x != y)

    def close_pairs(self, distance):
        pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
        return [pair for pair in pairs if len(self.differing(*pair)) == distance]

    def difference_mask(self, sample, a, b):
        return torch.stack([sample.parts[part] for part in self.differing(a, b)]).any(0)


def looking_up(maps):
    """A method whose map of an image and a class stands in a table."""

    def method(classifier, x, y):
        rows = (x[:, 0, 0, 0] * 10).round().long()
        return maps[rows, y][:, None].clone()

    return method


@pytest.fixture
def cue_localization(pooled):
    def run(method, samples, **settings):
        return cue_localization_of(method, pooled, samples, **settings)

    return run


def up(raw):
    """Bilinear, pixel centers, twice as large: by hand."""
    out = [[0.0] * W for _ in range(H)]
    for row in range(H):
        for column in range(W):
            r, c = (
                min(max((v + 0.5) * s - 0.5, 0), n - 1)
                for v, s, n in ((row, ROWS / H, ROWS), (column, COLUMNS / W, COLUMNS))
            )
            r0, c0 = int(r), int(c)
            r1, c1 = min(r0 + 1, ROWS - 1), min(c0 + 1, COLUMNS - 1)
            top = raw[r0][c0] * (1 - (c - c0)) + raw[r0][c1] * (c - c0)
            low = raw[r1][c0] * (1 - (c - c0)) + raw[r1][c1] * (c - c0)
            out[row][column] = top * (1 - (r - r0)) + low * (r - r0)
    return out


def normalized(raw, how):
    flat = [v for row in raw for v in row]
    low, high = min(flat), max(flat)
    if how == "max":
        return [[max(v, 0) / high if high > 0 else 0.0 for v in row] for row in raw]
    if how == "unit":
        return [[(v - low) / (high - low) if high > low else 0.0 for v in row] for row in raw]
    return [[min(max(v, 0), 1) if how == "clip" else v for v in row] for row in raw]


def pixels_of(data, pair, maps, normalize="max", rescale="none"):
    """The pooled (score, is cue) of a pair."""
    found = []
    for index in range(len(data)):
        sample = data[index]
        if sample.label not in pair:
            continue
        cue = data.difference_mask(sample, *pair)
        if not cue.any():
            continue
        a, b = (normalized(maps[int(sample.id)][label].tolist(), normalize) for label in pair)
        scores = up([[x - y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)])
        scores = normalized([[abs(v) for v in row] for row in scores], rescale)
        found += [(round(scores[r][c], 12), bool(cue[r, c])) for r in range(H) for c in range(W)]
    return found


def ap_by_hand(pixels):
    """Threshold after threshold, the highest first, counting everything anew."""
    positives = sum(truth for _, truth in pixels)
    if not positives:
        return math.nan
    total = recall = 0.0
    for threshold in sorted({score for score, _ in pixels}, reverse=True):
        above = [truth for score, truth in pixels if score >= threshold]
        total += sum(above) / len(above) * (sum(above) / positives - recall)
        recall = sum(above) / positives
    return 100 * total


def mean(values):
    return sum(values) / len(values)


def close(value):
    return pytest.approx(value, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("rescale", ["none", "max", "unit", "clip"])
@pytest.mark.parametrize("normalize", ["none", "max", "unit"])
def test_the_average_precision_of_each_pair_is_that_of_its_pooled_pixels(cue_localization, normalize, rescale):
    data = Birds()
    found = cue_localization(looking_up(RAW), data, normalize=normalize, rescale=rescale)
    expected = {
        part: [ap_by_hand(pixels_of(data, pair, RAW, normalize, rescale)) for pair in pairs]
        for part, pairs in PAIRS.items()
    }
    assert list(found) == ["one", "two", "three", "mean"] == list(PROTOCOLS["cue_localization"].parts)
    for part, values in expected.items():
        assert found[part].curve == close(values)
        assert found[part].value == close(mean(values))
        assert (found[part].count, found[part].higher_is_better, found[part].per_image) == (len(values), True, ())
        assert (found[part].metric.name, found[part].axis) == (part, ())
    everything = [value for values in expected.values() for value in values]
    assert found["mean"].curve == close(everything)
    assert found["mean"].value == close(mean(everything))
    assert found["mean"].count == 6


def test_maps_that_differ_on_the_cue_alone_are_perfect(pooled):
    data = creatures(count=20)
    worn = data.attribute_table()
    ids = {data[i].id: data[i] for i in range(20)}
    images = {float(sample.image.sum()): sample for sample in ids.values()}
    sides = {"legs": ("left leg", "right leg"), "wings": ("left wing", "right wing")}

    def method(classifier, x, y):
        maps = torch.zeros(len(x), 1, 64, 64)
        for image, label, one in zip(x, y.tolist(), maps, strict=True):
            sample = images[float(image.sum())]
            for part, (color, pattern) in zip(data.parts, worn[label].tolist(), strict=True):
                for name in sides.get(part, (part,)):
                    one[0][sample.parts[name]] = 1.0 + color * 3 + pattern
        return maps

    found = cue_localization_of(method, pooled, data, normalize="none", limit=3)
    assert [found[part].value for part in ("one", "two", "three", "mean")] == close([100.0] * 4)
    assert [found[part].count for part in ("one", "two", "three", "mean")] == [3, 3, 3, 9]


def test_maps_that_do_not_depend_on_the_class_have_the_share_of_the_cue(cue_localization):
    data = Birds()
    same = RAW[:, :1].expand(8, 4, ROWS, COLUMNS)
    noisy = same + 1e-8 * RAW
    for maps, rescale in (
        (same, "none"),
        (noisy, "none"),
        (noisy, "unit"),
        (torch.ones_like(RAW), "none"),
        (torch.full_like(RAW, torch.nan), "unit"),
    ):
        found = cue_localization(looking_up(maps), data, rescale=rescale)
        for part, pairs in PAIRS.items():
            shares = [100 * mean([truth for _, truth in pixels_of(data, pair, RAW)]) for pair in pairs]
            assert found[part].curve == close(shares)


def test_a_map_that_is_not_finite_counts_as_zero(cue_localization):
    broken, zero = RAW.clone(), RAW.clone()
    broken[0, 1, 1, 1], zero[0, 1] = torch.inf, 0
    found, expected = (cue_localization(looking_up(maps), Birds())["mean"].curve for maps in (broken, zero))
    assert found == close(expected)


def test_pairs_are_pairs_either_way_round(cue_localization):
    found = cue_localization(looking_up(RAW), Birds(), pairs=[[1, 0], [3, 1], [0, 2]])
    turned = cue_localization(looking_up(RAW), Birds(), pairs=[[0, 1], [1, 3], [2, 0]])
    whole = cue_localization(looking_up(RAW), Birds())
    assert found == turned
    assert [found[part].curve[0] for part in PAIRS] == [whole[part].curve[0] for part in PAIRS]
    assert [found[part].count for part in (*PAIRS, "mean")] == [1, 1, 1, 3]


def test_counts_that_are_never_reset_hold_all_pairs_before(cue_localization):
    data = Birds()
    pixels, expected = [], []
    for pair in (pair for pairs in PAIRS.values() for pair in pairs):
        pixels += pixels_of(data, pair, RAW)
        expected.append(ap_by_hand(pixels))
    found = cue_localization(looking_up(RAW), data, reset=False)
    assert found["mean"].curve == close(expected)
    assert found["three"].curve == close(expected[-1:])
    binned = cue_localization(looking_up(RAW), data, reset=False, bins=20_000)
    assert binned["mean"].curve == pytest.approx(expected, abs=0.1)
    assert found["one"].curve[0] == close(cue_localization(looking_up(RAW), data)["one"].curve[0])


def sparse():
    maps = torch.zeros_like(RAW)
    maps[:, 1, 0, 0] = 1.0
    maps[:, 2, 2, 3] = 1.0
    return maps


def test_dropping_zeros_inflates_and_an_edge_at_zero_recovers_them(cue_localization):
    data = Birds()
    for bins, spacing in ((0, "linear"), (1000, "linear"), (1000, "log")):
        settings = {"bins": bins, "spacing": spacing, "pairs": [(0, 1)]}
        kept = cue_localization(looking_up(sparse()), data, **settings)["one"].value
        dropped = cue_localization(looking_up(sparse()), data, drop_below=1e-7, **settings)["one"].value
        pixels = pixels_of(data, (0, 1), sparse())
        assert kept == pytest.approx(ap_by_hand(pixels), abs=0.5)
        assert dropped == pytest.approx(ap_by_hand([one for one in pixels if one[0] >= 1e-7]), abs=0.5)
        assert dropped > kept + 5


@pytest.mark.parametrize("spacing", ["linear", "log"])
def test_bins_count_what_lies_between_their_edges(cue_localization, spacing):
    bins = 7
    edges = [k / bins if spacing == "linear" else 10 ** (7 * (k / bins - 1)) for k in range(1, bins + 1)]
    found = cue_localization(looking_up(RAW), Birds(), bins=bins, spacing=spacing, normalize="unit")
    for part, pairs in PAIRS.items():
        for pair, value in zip(pairs, found[part].curve, strict=True):
            pixels = pixels_of(Birds(), pair, RAW, "unit")
            assert value == close(ap_by_hand([(sum(edge <= s for edge in edges), truth) for s, truth in pixels]))


def test_a_score_on_an_edge_lies_in_the_bin_above(cue_localization):
    maps = torch.zeros(8, 4, H, W, dtype=torch.float64)
    for index in range(8):
        maps[index, 1] = torch.where(Birds()[index].parts["head"], 0.5, 0.4)
    found = cue_localization(looking_up(maps), Birds(), pairs=[(0, 1)], normalize="none", bins=2)
    assert found["one"].value == close(100)


def test_many_bins_are_as_good_as_all_scores(cue_localization):
    exact = cue_localization(looking_up(RAW), Birds())["mean"].curve
    for spacing in ("linear", "log"):
        binned = cue_localization(looking_up(RAW), Birds(), bins=20_000, spacing=spacing)["mean"].curve
        assert binned == pytest.approx(exact, abs=0.3)


def test_scores_beyond_the_bins_are_refused(cue_localization, plain):
    with pytest.raises(ValueError, match=r"a difference of \d+\.\d+ lies outside \[0, 1\], which the bins divide; use"):
        cue_localization(looking_up(RAW * 10), Birds(), bins=1000, normalize="none")
    assert cue_localization(looking_up(RAW * 10), Birds(), bins=1000, normalize="none", rescale="clip")["one"].count


@given(st.permutations(range(8)), st.integers(1, 20), st.sampled_from([0, 50]))
@settings(max_examples=5, deadline=None)
def test_neither_batches_nor_the_order_of_images_matter(classifiers, order, batch, bins):
    run = lambda data, batch: cue_localization_of(  # noqa: E731
        looking_up(RAW), classifiers["pooled"], data, bins=bins, blur=0.1, batch=batch
    )
    found, expected = run(Birds(tuple(order)), batch), run(Birds(), 16)
    for part in expected:
        assert found[part].curve == pytest.approx(expected[part].curve, abs=1e-9)
        assert 0 <= found[part].value <= 100


def test_every_map_is_made_once(cue_localization):
    asked = Counter()

    def method(classifier, x, y):
        asked.update(zip((x[:, 0, 0, 0] * 10).round().long().tolist(), y.tolist(), strict=True))
        return looking_up(RAW)(classifier, x, y)

    maps = Maps(method)
    cue_localization(maps, Birds())
    assert asked == Counter({(image, label): 1 for image in range(8) for label in range(4)})
    cue_localization(maps, Birds(), masks="keypoints")
    assert set(asked.values()) == {1}
    asked.clear()
    cue_localization(Maps(method, room=0), Birds(), batch=1)
    assert set(asked.values()) == {1}


def test_images_without_a_visible_cue_are_skipped(cue_localization):
    data = Birds(hidden=("head",))
    found = cue_localization(looking_up(RAW), data)
    assert math.isnan(found["one"].curve[0])
    assert found["one"].count == 1
    assert found["one"].value == found["one"].curve[1]
    assert found["two"].curve == close([ap_by_hand(pixels_of(data, pair, RAW)) for pair in PAIRS["two"]])
    blind = cue_localization(looking_up(RAW), Birds(hidden=PARTS))
    assert math.isnan(blind["mean"].value)
    assert blind["mean"].count == 0
    unreset = cue_localization(looking_up(RAW), data, reset=False)
    assert math.isnan(unreset["one"].curve[0])
    assert unreset["one"].curve[1] == close(found["one"].curve[1])


def test_one_class_of_a_pair_is_enough_and_none_is_none(cue_localization):
    data = Birds((0, 1, 2))
    found = cue_localization(looking_up(RAW), data)
    for part, pairs in PAIRS.items():
        assert found[part].curve == close([ap_by_hand(pixels_of(data, pair, RAW)) for pair in pairs])
    assert [found[part].count for part in (*PAIRS, "mean")] == [2, 2, 1, 5]
    empty = cue_localization(looking_up(RAW), Birds(()))
    assert [score.count for score in empty.values()] == [0, 0, 0, 0]


def test_distances_and_limit_choose_the_pairs(cue_localization):
    found = cue_localization(looking_up(RAW), Birds(), distances=[2])
    assert [len(found[part].curve) for part in (*PAIRS, "mean")] == [0, 3, 0, 3]
    assert math.isnan(found["one"].value)
    assert found["mean"].value == found["two"].value
    whole = found["two"].curve
    for limit, kept in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 1, 2])):
        some = cue_localization(looking_up(RAW), Birds(), distances=[2], limit=limit)["two"].curve
        assert some == tuple(whole[index] for index in kept)


def test_a_limit_takes_pairs_from_everywhere():
    data = creatures(count=1)
    pairs = data.close_pairs(2)
    assert len(pairs) == 48
    assert grouped(cues_of(data), (2, 1), 5)[2] == [pairs[index] for index in (0, 9, 19, 28, 38)]


def test_distant_pairs_have_a_name_of_their_own(pooled):
    data = creatures(count=20)
    method = lambda classifier, x, y: torch.rand(len(x), 1, 8, 8, generator=torch.Generator().manual_seed(1))  # noqa: E731
    found = cue_localization_of(method, pooled, data, pairs=[[0, 10], [0, 1]])
    assert list(found) == ["one", "two", "three", "seven", "mean"]
    assert (found["seven"].count, found["mean"].count) == (1, 2)


def test_maps_are_blurred_by_a_share_of_their_side(cue_localization):
    from sightline.maps import blur

    smooth = blur(RAW, 0.2 * math.sqrt(ROWS * COLUMNS))
    found = cue_localization(looking_up(RAW), Birds(), blur=0.2)
    assert found["mean"].curve == close(cue_localization(looking_up(smooth), Birds())["mean"].curve)


def test_ignored_pixels_are_neither_right_nor_wrong(cue_localization):
    @dataclass(frozen=True)
    class Ignoring(Birds):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            mask = sample.mask.clone()
            mask[:, 4] = 255
            return replace(sample, mask=mask)

    found = cue_localization(looking_up(RAW), Ignoring(), pairs=[(0, 2)])["two"].value
    pixels = [one for k, one in enumerate(pixels_of(Birds(), (0, 2), RAW)) if k % W != 4]
    assert found == close(ap_by_hand(pixels))


@dataclass(frozen=True)
class Renamed:
    """What `running.Relabeled` does: labels and masks in the classifier's numbers."""

    source: Birds
    numbers: tuple = (2, 0, 3, 1)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        sample = self.source[index]
        mask = torch.tensor([0, *(number + 1 for number in self.numbers)])[sample.mask]
        return replace(sample, label=self.numbers[sample.label], mask=mask)


@pytest.mark.parametrize("masks", ["exact", "keypoints"])
def test_other_numbers_of_the_classes_change_nothing(cue_localization, masks):
    maps = torch.empty_like(RAW)
    maps[:, list(Renamed.numbers)] = RAW
    found = cue_localization(looking_up(maps), Renamed(Birds()), masks=masks)
    assert found["mean"].curve == close(cue_localization(looking_up(RAW), Birds(), masks=masks)["mean"].curve)


def test_other_numbers_on_creatures(pooled):
    data = creatures(count=20)
    numbers = tuple(reversed(range(20)))
    renamed = Renamed(data, numbers)

    def method(turned):
        def explain(classifier, x, y):
            return torch.stack(
                [
                    image[:1, ::4, ::4] * (1 + (numbers[label] if turned else label))
                    for image, label in zip(x, y.tolist(), strict=True)
                ]
            )

        return explain

    found = cue_localization_of(method(True), pooled, renamed, normalize="none", limit=2)
    assert found == cue_localization_of(method(False), pooled, data, normalize="none", limit=2)


def test_keypoint_masks_are_cut_to_the_animal_or_it_is_said(cue_localization):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = cue_localization(looking_up(RAW), Birds(), masks="keypoints")
        whole = cue_localization(looking_up(RAW), Birds(), masks="keypoints", segmentation=False)
        same = cue_localization(looking_up(RAW), Birds(masked=False), masks="keypoints", segmentation=False)
    assert inside["one"].curve != close(whole["one"].curve)
    assert whole["mean"].curve == close(same["mean"].curve)
    with pytest.warns(RuntimeWarning, match="8 of 8 images have no segmentation: .* segmentation=False says"):
        bare = cue_localization(looking_up(RAW), Birds(masked=False), masks="keypoints")
    assert bare["mean"].curve == close(whole["mean"].curve)
    x = torch.arange(W) + 0.5
    head = ((x - 1.5).abs() <= (x - 4).abs()).expand(H, W)
    for region, found in ((head, whole), (head & (Birds()[0].mask > 0), inside)):
        pixels = pixels_of(Birds(), (0, 1), RAW)
        truth = region.flatten().tolist() * (len(pixels) // (H * W))
        pixels = [(score, one) for (score, _), one in zip(pixels, truth, strict=True)]
        assert found["one"].curve[0] == close(ap_by_hand(pixels))


@pytest.mark.skipif(not CUB.is_dir(), reason="CUB-200-2011 is not here")
def test_crops_of_birds_are_measured_on_keypoints(pooled):
    data = cub_crops(CUB, count=100, size=32, check="none")
    asked = []

    def method(classifier, x, y):
        asked.extend(y.tolist())
        return x.mean(1, keepdim=True)[:, :, ::4, ::4] * (1 + y.view(-1, 1, 1, 1) % 3)

    with pytest.warns(RuntimeWarning, match="100 of 100 images have no segmentation"):
        found = cue_localization_of(method, pooled, data, normalize="none")
    assert [len(found[part].curve) for part in PAIRS] == [1, 9, 16]
    assert found["mean"].count > 10
    assert 0 < found["mean"].value < 100
    assert set(asked) <= set(range(100))
    with pytest.raises(ValueError, match="only creatures know the exact pixels"):
        cue_localization_of(method, pooled, data, masks="exact")


def test_settings_may_be_plain_data():
    table = {"distances": [1, 2], "pairs": [[0, 1]], "limit": 3, "blur": 1 / 28, "bins": 10, "masks": "exact"}
    assert bind(cue_localization_of, table).keywords == table
    with pytest.raises(LookupError, match="normalize: no choice called 'maximum'"):
        bind(cue_localization_of, {"normalize": "maximum"})


def test_what_is_wrong_is_said(cue_localization, plain):
    method = looking_up(RAW)
    unlabeled = [replace(Birds()[0], label=None)]
    data = type("Data", (Birds,), {"__getitem__": lambda self, index: unlabeled[0]})()
    for settings_, kind, text in (
        ({"distances": []}, ValueError, r"expected distances from 1 to 8 differing parts, got \[\]"),
        ({"distances": [0]}, ValueError, r"expected distances from 1 to 8 differing parts, got \[0\]"),
        ({"distances": [9]}, ValueError, r"got \[9\]"),
        ({"limit": 0}, ValueError, "expected limit >= 1 pairs of each distance, or None for all, got 0"),
        ({"blur": -1.0}, ValueError, "expected blur, bins and drop_below >= 0, got -1.0, 0 and 0.0"),
        ({"bins": -1}, ValueError, "got 0.0, -1 and 0.0"),
        ({"drop_below": -1.0}, ValueError, "got 0.0, 0 and -1.0"),
        ({"normalize": "units"}, LookupError, "no normalization called 'units'; did you mean unit"),
        ({"rescale": "clips"}, LookupError, "no rescaling called 'clips'; did you mean clip"),
        ({"spacing": "logs"}, LookupError, "no spacing called 'logs'; did you mean log"),
        ({"masks": "exactly"}, LookupError, "no kind of masks called 'exactly'"),
        ({"pairs": [[0]]}, ValueError, r"expected pairs of two classes, got \[0\]"),
        ({"pairs": [[1, 1]]}, ValueError, "classes 1 and 1 differ in no part, so nothing tells them apart"),
        ({"pairs": [[0, 1], [1, 0]]}, ValueError, r"the pair \[0, 1\] is listed twice"),
        ({"batch": 0}, ValueError, "a batch holds at least one image, got size=0"),
    ):
        with pytest.raises(kind, match=text):
            cue_localization(method, Birds(), **settings_)
    with pytest.raises(ValueError, match="goes by the classes of the images, and '0' has no label"):
        cue_localization(method, data)
    with pytest.raises(ValueError, match="list knows none; use creatures, cub or cub_crops"):
        cue_localization(method, [Birds()[0]])
