"""The ratio of parts, keypoint by keypoint and pixel by pixel."""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightline.classifier import wrap
from sightline.data import Sample
from sightline.datasets import creatures
from sightline.maps import unit
from sightline.protocols import part_ratio

H, W, K = 24, 32, 5
NAMES = ("left eye", "left foot", "right eye", "tail")
EYES, FEET = ("left eye", "right eye"), ("left foot",)


@pytest.fixture(scope="module")
def classifier(classifiers):
    return classifiers["pooled"]


def image(number, points, label=1):
    """An image that says in its first pixel which one it is."""
    x = torch.zeros(3, H, W, dtype=torch.float64)
    x[0, 0, 0] = number / 1000
    return Sample(f"image-{number}", x, label=label, keypoints=torch.tensor(points, dtype=torch.float32).reshape(-1, 3))


def shows(maps):
    """The method that gives image n the n-th map."""

    def method(classifier, x, y):
        return torch.stack([maps[round(float(one[0, 0, 0]) * 1000)] for one in x])

    return method


def shown(maps, samples, classifier, **settings):
    settings = {"names": NAMES, "numerator": EYES, "denominator": FEET, "least": 1, **settings}
    return part_ratio(shows(maps), classifier, samples, **settings)


def slow_intensities(values, points, window):
    """Mean of the window around every visible keypoint in the image, as far as it is in the image."""
    found = []
    for x, y, visible in points:
        if visible and 0 <= x <= W and 0 <= y <= H:
            column, row = min(math.floor(x), W - 1), min(math.floor(y), H - 1)
            reach = window // 2
            near = [
                values[r][c]
                for r in range(row - reach, row + reach + 1)
                for c in range(column - reach, column + reach + 1)
                if 0 <= r < H and 0 <= c < W
            ]
            found.append(sum(near) / len(near))
    return found


def slow_classes(samples, maps, window, least):
    """Class -> mean intensity of the eyes, of the feet."""
    kept = {}
    for one in samples:
        values = maps[int(one.id[6:])][0].tolist()
        points = [tuple(row) for row in one.keypoints.tolist()]
        eyes = slow_intensities(values, [p for i, p in enumerate(points) if i % 4 in (0, 2)], window)
        feet = slow_intensities(values, [p for i, p in enumerate(points) if i % 4 == 1], window)
        if eyes and feet:
            kept.setdefault(one.label, []).append((eyes, feet))
    return {
        label: tuple(fmean(v for image in images for v in image[side]) for side in (0, 1))
        for label, images in sorted(kept.items())
        if len(images) >= least
    }


def random_scene(seed, n=24):
    generator = torch.Generator().manual_seed(seed)
    maps = {i: unit(torch.rand(1, 1, H, W, generator=generator, dtype=torch.float64))[0] for i in range(n)}
    samples = []
    for i in range(n):
        blocks = 1 + i % 2
        points = torch.rand(4 * blocks, 3, generator=generator) * torch.tensor([W + 6.0, H + 6.0, 1.0]) - 3
        points[:, 2] = torch.rand(4 * blocks, generator=generator) > 0.4
        samples.append(image(i, points.tolist(), label=int(torch.randint(K, (1,), generator=generator))))
    return samples, maps


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3, 5, 31]), st.integers(1, 4), st.integers(1, 24), st.booleans())
def test_the_ratio_is_that_of_the_classes_mean_intensities(classifier, seed, window, least, batch, as_mask):
    samples, maps = random_scene(seed)
    classes = slow_classes(samples, maps, window, least)
    groups = {"one": [0, 1, 2], "two": [3], "three": [4, 0]}
    settings_ = {"window": window, "least": least, "batch": batch, "as_mask": as_mask, "groups": groups}
    if not classes:
        with pytest.raises(ValueError, match=f"no class has {least} images"):
            shown(maps, samples, classifier, **settings_)
        return
    found = shown(maps, samples, classifier, **settings_)
    ratios = {label: (1 - feet) / (1 - eyes) if as_mask else eyes / feet for label, (eyes, feet) in classes.items()}
    for end, group in (("", range(K)), *((f".{name}", group) for name, group in groups.items())):
        of = [ratios[label] for label in classes if label in group]
        assert found[f"ratio{end}"].value == pytest.approx(fmean(of) if of else math.nan, nan_ok=True)
        error = stdev(of) / math.sqrt(len(of)) if len(of) > 1 else math.nan
        assert found[f"ratio_standard_error{end}"].value == pytest.approx(error, nan_ok=True)
    for part, values in (
        ("ratio", list(ratios.values())),
        ("numerator", [eyes for eyes, _ in classes.values()]),
        ("denominator", [feet for _, feet in classes.values()]),
    ):
        assert found[part].curve == pytest.approx(values)
        assert found[part].axis == tuple(map(float, classes))
        assert found[part].value == pytest.approx(fmean(values))
        assert found[part].higher_is_better is None
    assert {score.metric.name for score in found.values()} == set(found)


def spots(eye, foot):
    """A map with a bright eye at the left and a foot at the right, on a ground of zero with a one in the corner."""
    m = torch.zeros(1, H, W, dtype=torch.float64)
    m[0, :8, :8], m[0, 16:, 24:], m[0, 0, 31] = eye, foot, 1.0
    return m


AT = [[4.0, 4.0, 1.0], [28.0, 20.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_the_papers_ratio_is_that_of_the_mask_that_deletes(classifier):
    maps = {0: spots(0.75, 0.5)}
    found = shown(maps, [image(0, AT)], classifier)
    assert (found["ratio"].value, found["numerator"].value, found["denominator"].value) == (1.5, 0.75, 0.5)
    as_mask = shown(maps, [image(0, AT)], classifier, as_mask=True)
    assert as_mask["ratio"].value == 2.0, "(1 - .5) / (1 - .75): low is salient there"
    assert (as_mask["numerator"].value, as_mask["denominator"].value) == (0.75, 0.5)
    swapped = shown(maps, [image(0, AT)], classifier, numerator=FEET, denominator=EYES)
    assert swapped["ratio"].value == pytest.approx(1 / 1.5)


def test_the_map_is_that_of_the_label_whatever_is_predicted(classifier):
    def method(classifier, x, y):
        assert y.tolist() == [round(float(one[0, 0, 0]) * 1000) for one in x]
        return torch.stack([spots(0.75, 0.5)] * len(x))

    found = part_ratio(
        method,
        classifier,
        [image(i, AT, label=i) for i in range(5)],
        names=NAMES,
        numerator=EYES,
        denominator=FEET,
        least=1,
    )
    assert found["ratio"].curve == (1.5,) * 5


def test_windows_end_where_the_image_does(classifier):
    m = torch.zeros(1, H, W, dtype=torch.float64)
    m[0, :2, :2], m[0, 23, 31] = 0.5, 1.0
    corner = [[0.9, 0.9, 1.0], [32.0, 24.0, 1.0], [1.0, 0.0, 1.0], [5.0, 5.0, 1.0]]
    found = shown({0: m}, [image(0, corner)], classifier, window=3)
    assert found["numerator"].value == pytest.approx((0.5 + 2 * 0.5 * 2 / 6) / 2), "2 x 2 pixels, and 2 of 2 x 3"
    assert found["denominator"].value == pytest.approx(1 / 4), "the far corner is the last pixel's"
    single = shown({0: m}, [image(0, corner)], classifier, window=1)
    assert (single["numerator"].value, single["denominator"].value) == (0.5, 1.0)


def test_what_is_not_visible_or_outside_does_not_count(classifier):
    maps = {i: spots(0.75, 0.5) for i in range(4)}
    away = [[4.0, 4.0, 1.0], [28.0, 20.0, 1.0], [-0.1, 4.0, 1.0], [0.0, 0.0, 0.0]]
    no_foot = [[30.0, 2.0, 1.0], [28.0, 20.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    samples = [image(0, away), image(1, no_foot), image(2, []), image(3, AT, label=2)]
    found = shown(maps, samples, classifier)
    assert found["ratio"].curve == (1.5, 1.5)
    assert found["ratio"].axis == (1.0, 2.0)
    assert found["ratio"].count == 2, "images that show both"


def test_classes_with_too_few_images_do_not_count(classifier):
    maps = {i: spots(0.75, 0.5 if i < 11 else 0.25) for i in range(21)}
    samples = [image(i, AT, label=1 if i < 11 else 2) for i in range(21)]
    found = part_ratio(shows(maps), classifier, samples, names=NAMES, numerator=EYES, denominator=FEET)
    assert (found["ratio"].axis, found["ratio"].value, found["ratio"].count) == ((1.0,), 1.5, 11)
    assert math.isnan(found["ratio_standard_error"].value)
    both = shown(maps, samples, classifier, least=10, groups={"a": [2], "none": [0, 4]})
    assert both["ratio"].value == (1.5 + 3.0) / 2
    assert both["ratio_standard_error"].value == pytest.approx(0.75)
    assert (both["ratio.a"].value, both["ratio.a"].count) == (3.0, 10)
    assert math.isnan(both["ratio.none"].value)
    assert both["ratio.none"].count == 0


def test_a_class_whose_divisor_is_zero_has_no_ratio(classifier):
    maps = {0: spots(0.75, 0.0), 1: spots(1.0, 0.5), 2: spots(0.75, 0.5)}
    samples = [image(i, AT, label=i) for i in range(3)]
    found = shown(maps, samples, classifier)
    assert str(found["ratio"].curve) == "(nan, 2.0, 1.5)"
    assert found["ratio"].value == 1.75
    assert found["ratio_standard_error"].value == pytest.approx(0.25)
    assert found["denominator"].value == pytest.approx(1 / 3)
    assert str(shown(maps, samples, classifier, as_mask=True)["ratio"].curve) == "(4.0, nan, 2.0)"


def test_maps_are_scaled_unless_they_are_taken_raw(classifier):
    raw = 10 * spots(0.75, 0.5) + 10
    assert shown({0: raw}, [image(0, AT)], classifier)["ratio"].value == pytest.approx(1.5)
    assert shown({0: raw}, [image(0, AT)], classifier, of="raw")["ratio"].value == pytest.approx(17.5 / 15)
    small = torch.tensor([[0.5, 1.0], [0.0, 0.25]], dtype=torch.float64)[None]
    corners = [[2.0, 2.0, 1.0], [29.0, 21.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert shown({0: small}, [image(0, corners)], classifier, of="raw")["ratio"].value == pytest.approx(2.0)
    for nothing in (torch.zeros(1, 2, 2), torch.full((1, 2, 2), math.nan)):
        found = shown({0: nothing.double()}, [image(0, AT)], classifier)
        assert math.isnan(found["ratio"].value)
        assert found["numerator"].value == 0


@dataclass(frozen=True)
class Named:
    samples: tuple
    keypoint_names: tuple = NAMES
    groups: tuple = ("bird", "dog", "bird", "dog", "fish")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_names_and_groups_come_from_the_data_where_they_are_not_given(classifier):
    maps = {i: spots(0.75, 0.75 / (i + 1)) for i in range(4)}
    data = Named(tuple(image(i, AT, label=i) for i in range(4)))
    found = part_ratio(shows(maps), classifier, data, numerator="left eye", denominator="left foot", least=1)
    assert {name: round(found[name].value, 9) for name in ("ratio", "ratio.bird", "ratio.dog")} == {
        "ratio": 2.5, "ratio.bird": 2.0, "ratio.dog": 3.0
    }  # fmt: skip
    assert math.isnan(found["ratio.fish"].value)
    given = part_ratio(
        shows(maps),
        classifier,
        data,
        names=["a", "b", "c", "d"],
        groups={},
        numerator=["a"],
        denominator=["b"],
        least=1,
    )
    assert list(given) == ["ratio", "numerator", "denominator", "ratio_standard_error"]
    assert given["ratio"].value == found["ratio"].value


def test_creatures_bring_their_names_and_body_plans():
    data = creatures(size=64, count=6, variant="mark")
    network = nn.Sequential(nn.Conv2d(3, 20, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    kept = [data[index] for index in range(6)]

    def method(classifier, x, y):
        of = [next(one for one in kept if torch.equal(one.image, image)).parts for image in x]
        return torch.stack([(parts["head"] + 0.25 * ~parts["head"]).float()[None] for parts in of])

    found = part_ratio(
        method,
        wrap(network, normalization="none", size=64),
        data,
        numerator=["mark"],
        denominator=["left leg", "right leg"],
        least=1,
        of="raw",
    )
    assert set(found) >= {"ratio", "ratio.winged", "ratio_standard_error.winged"}
    assert found["ratio"].value == found["ratio.winged"].value > 2


def test_what_is_wrong_is_said(classifier, plain):
    maps, samples = {0: spots(0.75, 0.5)}, [image(0, AT)]
    for wrong in ({"window": 4}, {"window": 0}, {"window": -1}, {"least": 0}):
        with pytest.raises(ValueError, match="expected an odd window and least >= 1, got window="):
            shown(maps, samples, classifier, **wrong)
    with pytest.raises(LookupError, match="no map called 'maps'"):
        shown(maps, samples, classifier, of="maps")
    with pytest.raises(LookupError, match="no keypoint called 'left eyes'; did you mean left eye"):
        shown(maps, samples, classifier, numerator=["left eyes"])
    with pytest.raises(ValueError, match="expected at least one keypoint in numerator and denominator; there are left"):
        shown(maps, samples, classifier, denominator=[])
    with pytest.raises(ValueError, match="numerator and denominator share 'right eye'"):
        shown(maps, samples, classifier, denominator=["left foot", "right eye"])
    with pytest.raises(ValueError, match="these samples do not name their keypoints; pass names="):
        shown(maps, samples, classifier, names=None)
    with pytest.raises(ValueError, match=r"group 'b' has class 5, outside 0\.\.4; pass groups="):
        shown(maps, samples, classifier, groups={"a": [4], "b": [0, 5]})
    said = "no class has 2 images that show keypoints of both sides, the most is 1; lower least="
    with pytest.raises(ValueError, match=said):
        shown(maps, samples, classifier, least=2)
    with pytest.raises(ValueError, match=r"no class has 1 images .* the most is 0"):
        shown(maps, [], classifier, groups={})
    for points, said in ((None, "none"), (AT[:3], "3")):
        bare = Sample("bare", samples[0].image, label=1, keypoints=None if points is None else torch.tensor(points))
        with pytest.raises(ValueError, match=f"part_ratio needs keypoints in blocks of 4, .*'bare' has {said}"):
            shown(maps, [bare], classifier)
