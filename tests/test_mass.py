"""Mass: the share of a map on what it should lie on, each pixel added by hand."""

import math
from dataclasses import replace

import pytest
import torch

from sightline.data import Sample, collate
from sightline.metrics import Case
from sightline.metrics import mass as mass_of

H, W = 6, 8
SALIENCY = torch.rand(2, 1, H, W, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def samples():
    mask = torch.zeros(H, W, dtype=torch.long)
    mask[1:4, 2:5], mask[0, 0], mask[5] = 3, 1, 255
    points = torch.tensor([[2.0, 3.0, 1.0], [6.5, 1.5, 1.0], [0.0, 0.0, 0.0]])
    one = Sample("a", torch.zeros(3, H, W), label=2, mask=mask, cue=mask == 1, keypoints=points)
    return one, replace(one, id="b", label=0)


def case(pooled, samples, raw):
    batch = collate(samples)
    return Case(pooled, batch.x, batch.y, raw, raw, pooled, batch, torch.zeros(2, 5))


def by_hand(raw, inside, counted):
    values = {(r, c): max(0.0, float(raw[0, r, c])) for r in range(H) for c in range(W)}
    low, high = min(values.values()), max(values.values())
    scaled = {place: (value - low) / (high - low) for place, value in values.items()}
    whole = sum(value for place, value in scaled.items() if counted(*place))
    return 100 * sum(value for place, value in scaled.items() if inside(*place)) / whole


def near(points, radius):
    return lambda r, c: any(math.hypot(c + 0.5 - x, r + 0.5 - y) < radius * H for x, y in points)


@pytest.mark.parametrize("raw", [SALIENCY, SALIENCY - 0.4], ids=["positive", "signed"])
def test_the_mass_is_the_share_of_the_positive_map(pooled, samples, raw):
    mask, points = samples[0].mask, [(2.0, 3.0), (6.5, 1.5)]
    for settings, inside in (
        ({}, lambda label: lambda r, c: mask[r, c] == label + 1),
        ({"on": "cue"}, lambda label: lambda r, c: mask[r, c] == 1),
        ({"on": "points", "radius": 0.25}, lambda label: near(points, 0.25)),
    ):
        found = mass_of(**settings)(case(pooled, samples, raw))[:, 0]
        counted = (lambda r, c: mask[r, c] != 255) if not settings else (lambda r, c: True)
        expected = [by_hand(raw[i], inside(label), counted) for i, label in enumerate((2, 0))]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_map_that_says_nothing_has_no_mass(pooled, samples):
    for raw in (torch.zeros_like(SALIENCY), -SALIENCY, torch.full_like(SALIENCY, torch.nan)):
        assert mass_of()(case(pooled, samples, raw)).tolist() == [[0.0], [0.0]]


def test_a_map_on_the_object_alone_has_all_its_mass_there(pooled, samples):
    raw = torch.stack([(samples[0].mask == label + 1)[None].double() for label in (2, 0)])
    assert mass_of()(case(pooled, samples, raw)).tolist() == [[100.0], [100.0]]


def test_points_that_are_not_visible_catch_nothing(pooled, samples):
    hidden = [replace(one, keypoints=one.keypoints * 0) for one in samples]
    assert mass_of(on="points")(case(pooled, hidden, SALIENCY)).tolist() == [[0.0], [0.0]]


def test_what_is_wrong_is_said(pooled, samples, plain):
    with pytest.raises(LookupError, match="no target called 'objects'; did you mean object"):
        mass_of(on="objects")
    with pytest.raises(ValueError, match="expected radius > 0 shorter sides, got 0"):
        mass_of(on="points", radius=0.0)
    for field, on in (("mask", "object"), ("cue", "cue"), ("keypoints", "points")):
        bare = [replace(one, **{field: None}) for one in samples]
        with pytest.raises(ValueError, match=rf"mass\(on='{on}'\) needs .*'a'"):
            mass_of(on=on)(case(pooled, bare, SALIENCY))
