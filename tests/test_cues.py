"""Cues: class pairs from attributes and masks from keypoints, each set and each distance by hand."""

import math
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.data import Sample
from sightline.datasets import PARTS as ROWS
from sightline.datasets import creatures, cub_crops
from sightline.datasets._creatures import KEYPOINTS as CREATURES_ROWS
from sightline.datasets._creatures import PARTS as CREATURES_PARTS
from sightline.protocols._cues import (
    KEYPOINTS,
    PARTS,
    attribute_names,
    cues_of,
    part_of,
    points,
    regions,
    traits,
    union,
)

CUB = Path(__file__).parents[2] / "shared" / "data" / "CUB_200_2011"
needs_cub = pytest.mark.skipif(not CUB.is_dir(), reason="CUB-200-2011 is not here")
NAMES = ("has_bill_shape::cone", "has_wing_color::red", "has_leg_color::red", "has_size::large", "has_wing_shape::long")
OWNERS = ("head", "wings", "legs", None, "wings")


def keypoints(**places):
    """Fifteen rows; a name that is not given is invisible."""
    table = torch.zeros(15, 3)
    for name, (x, y) in places.items():
        table[ROWS.index(name.replace("_", " "))] = torch.tensor([x, y, 1.0])
    return table


# Attributes


@pytest.mark.parametrize(
    ("name", "substring", "clean"),
    [
        ("has_bill_shape::curved_(up_or_down)", "head", "head"),
        ("has_forehead_color::blue", "head", "head"),
        ("has_head_pattern::eyering", "head", "head"),
        ("has_throat_color::black", "head", "head"),
        ("has_under_tail_color::blue", "tail", "tail"),
        ("has_tail_shape::forked_tail", "tail", "tail"),
        ("has_back_pattern::solid", "back", "back"),
        ("has_wing_shape::long-wings", "wings", "wings"),
        ("has_leg_color::brown", "legs", "legs"),
        ("has_shape::long-legged-like", "legs", None),
        ("has_shape::duck-like", None, None),
        ("has_upperparts_color::blue", None, None),
        ("has_size::large_(16_-_32_in)", None, None),
    ],
)
def test_an_attribute_finds_its_part_by_a_word_of_its_name(name, substring, clean):
    assert (part_of(name), part_of(name, "clean")) == (substring, clean)


def test_an_unknown_mapping_is_said(plain):
    with pytest.raises(LookupError, match="no mapping of attributes called 'substrings'; did you mean substring"):
        part_of("has_size::large", "substrings")


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=5, max_size=5), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_classes_differ_in_the_parts_of_the_symmetric_difference(shares):
    found = traits(torch.tensor(shares), NAMES)
    own = [{name for name, share in zip(NAMES, row, strict=True) if share >= 0.5} for row in shares]
    by_distance = {d: [] for d in range(8)}
    for a, b in combinations(range(len(shares)), 2):
        apart = {OWNERS[NAMES.index(name)] for name in own[a] ^ own[b]} - {None}
        assert found.differing(a, b) == found.differing(b, a) == tuple(part for part in PARTS if part in apart)
        by_distance[len(apart)].append((a, b))
    assert {d: found.close_pairs(d) for d in range(8)} == by_distance


def test_half_of_the_annotators_are_enough():
    percent = torch.tensor([[50.0], [49.9], [50.1]]) / 100
    found = traits(percent, ["has_back_color::red"])
    assert [found.differing(0, other) for other in (1, 2)] == [("back",), ()]


def test_names_and_classes_that_do_not_fit_are_said(plain):
    with pytest.raises(ValueError, match="expected a name for each of 2 attributes, got 1 names"):
        traits(torch.zeros(3, 2), ["has_back_color::red"])
    with pytest.raises(ValueError, match="there are classes 0 to 2, got 1 and 3"):
        traits(torch.zeros(3, 1), ["has_back_color::red"]).differing(1, 3)


@needs_cub
@pytest.mark.parametrize("mapping", ["substring", "clean"])
def test_cub_has_the_published_numbers_of_pairs(mapping):
    table = np.loadtxt(CUB / "attributes/class_attribute_labels_continuous.txt") / 100
    found = traits(torch.from_numpy(table).float(), attribute_names(CUB), mapping)
    assert [len(found.close_pairs(d)) for d in (1, 2, 3)] == [31, 64, 96]


@needs_cub
def test_the_crops_have_fewer_pairs():
    found = cues_of(cub_crops(CUB, count=8, check="none"))
    assert [len(found.classes.close_pairs(d)) for d in (1, 2, 3)] == [1, 9, 16]
    assert found.painted is None
    assert found.labels is None


@needs_cub
def test_the_mappings_part_ways_at_one_attribute_of_cub():
    names = attribute_names(CUB)
    assert len(names) == 312
    assert [name for name in names if part_of(name) != part_of(name, "clean")] == ["has_shape::long-legged-like"]


def test_the_names_of_attributes_may_lie_in_three_places(tmp_path, plain):
    root = tmp_path / "CUB_200_2011"
    (root / "attributes").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no attributes.txt in .*CUB_200_2011.* names the 312 attributes"):
        attribute_names(root)
    for place, name in ((tmp_path, "beside"), (root / "attributes", "inside"), (root, "own")):
        (place / "attributes.txt").write_text(f"1 {name}\n2 other\n\n")
        assert attribute_names(root) == (name, "other")
    for damaged in ("1 a b\n", "2 a\n", "a\n"):
        (root / "attributes.txt").write_text(damaged)
        with pytest.raises(ValueError, match=r"attributes.txt is damaged; expected lines of a number, counted from 1"):
            attribute_names(root)


# Keypoints


def test_rows_and_parts_are_those_of_the_data_sets():
    assert tuple(KEYPOINTS) == ROWS == CREATURES_ROWS
    assert PARTS == CREATURES_PARTS
    assert set(KEYPOINTS.values()) == set(PARTS)


def test_two_keypoints_divide_the_image_into_half_planes():
    found = regions(keypoints(back=(2.0, 3.0), tail=(6.0, 3.0)), (6, 8))
    left = (torch.arange(8) < 4).expand(6, 8)
    assert found.keys() == {"back", "tail"}
    assert torch.equal(found["back"], left)
    assert torch.equal(found["tail"], ~left)


def test_a_pixel_is_where_its_center_is():
    found = regions(keypoints(back=(0.0, 1.0), tail=(4.9, 1.0)), (2, 5))
    assert found["back"][0].tolist() == [True, True, False, False, False]  # 2.45 lies left of the center at 2.5
    found = regions(keypoints(back=(1.0, 0.0), tail=(1.0, 4.9)), (5, 2))
    assert found["back"][:, 0].tolist() == [True, True, False, False, False]


def test_of_points_equally_near_the_first_part_counts():
    found = regions(keypoints(tail=(1.5, 0.5), belly=(3.5, 0.5)), (1, 5))
    assert found["belly"][0].tolist() == [False, False, True, True, True]
    same = regions(keypoints(left_eye=(2.0, 2.0), tail=(2.0, 2.0)), (3, 3))
    assert same["head"].all()
    assert not same["tail"].any()


def test_the_head_is_one_point_and_legs_and_wings_are_two():
    owners, places = points(
        keypoints(beak=(0, 2), nape=(4, 6), left_leg=(1, 1), right_leg=(2, 2), right_wing=(3, 3), back=(5, 5))
    )
    assert owners == ("head", "back", "legs", "legs", "wings")
    assert places.tolist() == [[2.0, 4.0], [5.0, 5.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


def test_nothing_visible_gives_no_region():
    assert regions(torch.zeros(15, 3), (4, 4)) == {}
    assert union({}, ["head"]) is None
    only = regions(keypoints(back=(1, 1)), (4, 4))
    assert union(only, ["tail", "head"]) is None
    assert union(only, ["tail", "back"]).all()


def nearest_by_hand(table, names, size):
    """Go through every pixel and every point."""
    found = []
    for start in range(0, len(table), len(names)):
        block = list(zip(names, table[start : start + len(names)].tolist(), strict=True))
        for part in (*PARTS, *dict.fromkeys(name for name in names if name not in KEYPOINTS)):
            own = [(x, y) for name, (x, y, v) in block if v > 0 and KEYPOINTS.get(name, name) == part]
            if part == "head" and own:
                own = [(sum(x for x, _ in own) / len(own), sum(y for _, y in own) / len(own))]
            found += [(part, x, y) for x, y in own]
    owners = []
    for row in range(size[0]):
        for column in range(size[1]):
            best, owner = math.inf, None
            for part, x, y in found:
                distance = (column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2
                if distance < best:
                    best, owner = distance, part
            owners.append(owner)
    return owners


@given(st.integers(0, 2**31), st.sampled_from([1, 2]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_pixel_belongs_to_its_nearest_point(seed, blocks, marked):
    g = torch.Generator().manual_seed(seed)
    names = (*KEYPOINTS, "mark") if marked else tuple(KEYPOINTS)
    table = torch.rand(blocks * len(names), 3, generator=g) * torch.tensor([9.0, 7.0, 1.0])
    table[:, 2] = (table[:, 2] < 0.4).float()
    found = regions(table, (7, 9), names)
    expected = nearest_by_hand(table, names, (7, 9))
    assert found.keys() >= set(expected) - {None}
    assert found or set(expected) == {None}
    for part, pixels in found.items():
        assert pixels.flatten().tolist() == [owner == part for owner in expected]
    if found:
        assert (torch.stack(list(found.values())).sum(0) == 1).all()


def test_keypoints_in_broken_blocks_are_said(plain):
    with pytest.raises(ValueError, match="expected blocks of 15 keypoints, got 16 keypoints"):
        regions(torch.zeros(16, 3), (4, 4))


# Data sets


@dataclass(frozen=True)
class Wrapped:
    samples: object


@dataclass(frozen=True)
class Renamed:
    source: object
    numbers: tuple
    classes: int = 40


def test_the_data_set_is_found_through_what_wraps_it():
    data = creatures(count=20)
    assert cues_of(data).classes is data
    found = cues_of(Wrapped(Renamed(Wrapped(data), tuple(range(19, -1, -1)))))
    assert found.classes is data
    assert found.painted is data
    assert [found.label(number) for number in (0, 5)] == [19, 14]
    twice = cues_of(Renamed(Renamed(data, tuple(range(1, 21))), tuple(range(0, 42, 2))))
    assert [twice.label(number) for number in (0, 5)] == [2, 12]


def test_data_sets_that_do_not_know_their_parts_are_refused(plain):
    with pytest.raises(ValueError, match="and list knows none; use creatures, cub or cub_crops"):
        cues_of([])
    with pytest.raises(ValueError, match="and list knows none"):
        cues_of(Wrapped([1]))


@pytest.mark.parametrize("variant", ["plain", "scenes", "mark"])
def test_exact_masks_are_the_data_set_s_own_in_any_numbering(variant):
    data = creatures(count=6, variant=variant)
    numbers = tuple(reversed(range(20)))
    renamed = cues_of(Renamed(data, numbers)).marking("auto", True)
    own = cues_of(data).marking("exact", False)
    translate = torch.tensor([0, *(number + 1 for number in numbers)])
    for index in range(6):
        sample = data[index]
        other = (sample.label + 3) % 20
        expected = data.difference_mask(sample, sample.label, other)
        relabeled = replace(sample, label=numbers[sample.label], mask=translate[sample.mask])
        for found in (own(sample), renamed(relabeled)):
            pixels = found(sample.label, other)
            assert torch.equal(pixels, expected) if expected.any() else pixels is None


def test_keypoint_masks_lie_on_the_animal_and_near_the_exact_ones():
    data = creatures(count=20)
    cues = cues_of(data)
    ratios = []
    for index in range(20):
        sample = data[index]
        for a, b in data.close_pairs(2)[::4]:
            if sample.label in (a, b):
                whole, inside = (cues.marking("keypoints", on)(sample)(a, b) for on in (False, True))
                if whole is None:
                    assert inside is None
                    continue
                assert torch.equal(inside, whole & (sample.mask == sample.label + 1))
                exact = cues.marking("exact", True)(sample)(a, b)
                ratios.append(float((inside & exact).sum() / (inside | exact).sum()))
    assert len(ratios) > 10
    assert 0.45 < sum(ratios) / len(ratios) < 0.95


def test_what_a_sample_or_a_data_set_lacks_is_said(plain):
    data = creatures(count=1)
    cues = cues_of(data)
    bare = Sample("bare", torch.zeros(3, 4, 4), label=0)
    with pytest.raises(ValueError, match="masks='keypoints' need keypoints, and 'bare' has none; CUB and creatures"):
        cues.marking("keypoints", True)(bare)
    with pytest.raises(LookupError, match="no kind of masks called 'exactly'; did you mean exact"):
        cues.marking("exactly", True)
    with pytest.raises(ValueError, match="only creatures know the exact pixels of a cue; use masks='keypoints'"):
        replace(cues, painted=None).marking("exact", True)


def test_without_a_mask_the_keypoints_alone_decide():
    data = creatures(count=1)
    sample = replace(data[0], mask=None)
    whole, inside = (cues_of(data).marking("keypoints", on)(sample)(0, 1) for on in (False, True))
    assert torch.equal(whole, inside)
