"""The distributions of variable occlusion, fitted on samples, against each object measured by hand."""

import math
from dataclasses import replace
from statistics import fmean, pstdev

import pytest
import torch

from sightline.data import Sample
from sightline.datasets import creatures
from sightline.methods._variable_occlusion import draw
from sightline.protocols import fit_discs


def by_hand(samples):
    areas, rows = [], []
    for sample in samples:
        h, w = sample.mask.shape
        for label in set(sample.mask.flatten().tolist()) - {0, 255}:
            of_class = [
                (sample.mask == label) & (sample.instances == i) for i in range(1, int(sample.instances.max()) + 1)
            ]
            sizes = [int(one.sum()) / (h * w) for one in of_class if one.any()]
            places = []
            for one in of_class:
                if one.any():
                    places.append(fmean(row + 0.5 for row, _ in one.nonzero().tolist()) / h)
            areas.append(math.log(fmean(sizes) * 224**2))
            rows.append(fmean(places) * 224)
    return fmean(areas), pstdev(areas), fmean(rows), pstdev(rows)


def test_masks_of_scenes_give_the_distribution_of_their_objects():
    samples = [creatures(variant="scenes", count=6)[i] for i in range(6)]
    found = fit_discs(samples)
    mu, sigma, y_mu, y_sigma = by_hand(samples)
    expected = pytest.approx((mu, sigma, y_mu, y_sigma), rel=1e-9)
    assert (found.area_mu, found.area_sigma, found.y_mu, found.y_sigma) == expected
    radius = draw(found, 200, (64, 64))[:, 2]
    assert 3 < radius.median() < 32


def test_boxes_serve_where_there_is_no_mask():
    boxes = [torch.tensor([[0.0, 0.0, 10.0, 10.0], [10.0, 10.0, 20.0, 30.0]]), torch.tensor([[5.0, 5.0, 9.0, 15.0]])]
    samples = [Sample(str(i), torch.zeros(3, 32, 32), boxes=box) for i, box in enumerate(boxes)]
    bare = Sample("bare", torch.zeros(3, 32, 32))
    found = fit_discs([*samples, bare])
    areas = [150 / 32**2, 40 / 32**2]
    rows = [(5 + 20) / 2 / 32, 10 / 32]
    assert found.area_mu == pytest.approx(fmean(math.log(a * 224**2) for a in areas), abs=1e-4)
    assert found.y_mu == pytest.approx(fmean(rows) * 224, abs=1e-3)


def test_too_few_objects_are_an_error(plain):
    sample = creatures(count=1)[0]
    with pytest.raises(ValueError, match="expected at least two annotated objects, got 1"):
        fit_discs([sample, replace(sample, mask=None, boxes=None)])


@pytest.mark.parametrize("number", [0, 255])
def test_a_class_without_instances_counts_as_one(number):
    mask, instances = torch.zeros(2, 20, 10, dtype=torch.long)
    mask[2:6, 1:6], mask[10:20, :4] = 1, 2
    instances[2:6, 1:6], instances[10:20, :4] = 1, number
    found = fit_discs([Sample("", torch.zeros(3, 20, 10), mask=mask, instances=instances)])
    areas, rows = [math.log(pixels / 200 * 224**2) for pixels in (20, 40)], [4 / 20 * 224, 15 / 20 * 224]
    expected = pytest.approx((fmean(areas), pstdev(areas), fmean(rows), pstdev(rows)), rel=1e-9)
    assert (found.area_mu, found.area_sigma, found.y_mu, found.y_sigma) == expected
