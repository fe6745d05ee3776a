"""Dead cells: counted cell by cell, on hand-made features and masks."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sightline import models
from sightline.classifier import Classifier, UnsuitedError
from sightline.data import Sample, collate
from sightline.evaluation import measure
from sightline.metrics._dead_cells import dead_cells
from sightline.models._kernel_net import kernel_net

H, W = 8, 12


class Given(nn.Module):
    """Features that are the image's channels, each 2 x 2 pixels summed, behind a ReLU."""

    def __init__(self, side):
        super().__init__()
        self.side, self.last = side, nn.ReLU()

    def forward(self, x):
        a = self.last(nn.functional.avg_pool2d(x, self.side) - 0.5)
        return a.mean((2, 3))


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, H, W, generator=generator)
    images = torch.where(torch.rand(3, 1, H, W, generator=generator) < 0.5, images, 0)
    mask = torch.zeros(H, W, dtype=torch.long)
    mask[1:5, 2:9], mask[6:, 3:7], mask[0, :4] = 2, 3, 255
    masks = mask, torch.where(mask == 2, 3, mask), torch.zeros_like(mask)
    return [Sample(f"image {n}", x, label=1, mask=m) for n, (x, m) in enumerate(zip(images, masks, strict=True))]


def flat(classifier, x, y=None, /):
    return x[:, :1]


def scored(classifier, samples, **settings):
    return measure(flat, classifier, [collate(samples)], {"dead_cells": dead_cells(**settings)}).scores[0]


@pytest.mark.parametrize("of", ["image", "object", "background"])
@pytest.mark.parametrize("side", [1, 2, 4])
def test_every_cell_is_counted(samples, of, side):
    classifier = Classifier(Given(side), "last", size=(H, W))
    found = scored(classifier, samples, of=of)
    expected = []
    for sample in samples:
        dead = whole = 0
        for i in range(H // side):
            for j in range(W // side):
                value = int(sample.mask[math.floor((i + 0.5) * side), math.floor((j + 0.5) * side)])
                if {"image": True, "object": value == 2, "background": value == 0}[of]:
                    cell = sample.image[:, side * i : side * (i + 1), side * j : side * (j + 1)].mean((1, 2))
                    whole += 1
                    dead += bool((cell <= 0.5).all())
        expected.append(100 * dead / whole if whole else math.nan)
    assert found.per_image == pytest.approx(expected, nan_ok=True)
    there = [one for one in expected if not math.isnan(one)]
    assert found.value == pytest.approx(sum(there) / len(there))
    assert found.count == len(there) == {"image": 3, "object": 1, "background": 3}[of]
    assert found.higher_is_better is None


def test_black_images_are_dead_in_a_network_without_biases():
    classifier = kernel_net(size=8, channels=4)
    black = Sample("black", torch.zeros(3, 8, 8), label=0)
    white = replace(black, id="white", image=torch.ones(3, 8, 8))
    found = scored(classifier, [black, white])
    assert found.per_image[0] == 100
    assert found.per_image[1] < 100


def test_errors_teach(samples):
    classifier = Classifier(Given(1), "last", size=(H, W))
    with pytest.raises(LookupError, match="no part of the image called 'objects'; did you mean object"):
        inspect.unwrap(dead_cells)(of="objects")
    bare = [replace(samples[0], mask=None)]
    with pytest.raises(ValueError, match=r"dead_cells\(of='object'\) needs a mask and a label, and 'image 0' lacks"):
        scored(classifier, bare, of="object")
    with pytest.raises(ValueError, match=r"dead_cells\(of='background'\) needs a mask, and 'image 0' has none"):
        scored(classifier, bare, of="background")
    with pytest.raises(UnsuitedError, match="there is none"):
        scored(models.load("none?size=8"), [Sample("tiny", torch.rand(3, 8, 8), label=1)])
