"""RISE: the same draws by loops, its expectation, and that chunks change nothing."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from sightline.classifier import Classifier, logit
from sightline.methods import rise
from sightline.methods._rise import Masks


def bilinear(grid, height, width, row, column):
    """A grid enlarged to height x width, at one pixel: cell centers, the border repeated."""
    s = len(grid)
    v, u = (row + 0.5) * s / height - 0.5, (column + 0.5) * s / width - 0.5
    v, u = min(max(v, 0), s - 1), min(max(u, 0), s - 1)
    a, b = min(int(v), s - 2), min(int(u), s - 2)
    top = (1 - (u - b)) * grid[a][b] + (u - b) * grid[a][b + 1]
    low = (1 - (u - b)) * grid[a + 1][b] + (u - b) * grid[a + 1][b + 1]
    return (1 - (v - a)) * top + (v - a) * low


def mask_by_loops(grid, start, h, w):
    s = len(grid)
    height, width = (s + 1) * math.ceil(h / s), (s + 1) * math.ceil(w / s)
    rows = [
        [bilinear(grid, height, width, row + start[0], column + start[1]) for column in range(w)] for row in range(h)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def masks_by_loops(h, w, samples, cells, p, seed):
    generator = torch.Generator().manual_seed(seed)
    grids = (torch.rand(samples, 1, cells, cells, generator=generator) < p).double()[:, 0].tolist()
    places = torch.rand(samples, 2, generator=generator).tolist()
    down, across = math.ceil(h / cells), math.ceil(w / cells)
    starts = [(int(v * down), int(u * across)) for v, u in places]
    return torch.stack([mask_by_loops(grid, start, h, w) for grid, start in zip(grids, starts, strict=True)])


@pytest.mark.parametrize(("h", "w", "cells"), [(24, 32, 8), (10, 13, 4), (9, 7, 2)])
def test_the_masks_are_those_of_the_definition(h, w, cells):
    found = torch.cat(list(Masks(samples=9, cells=cells, p=0.4, seed=3, chunk=4)((h, w))))[:, 0]
    torch.testing.assert_close(found.double(), masks_by_loops(h, w, 9, cells, 0.4, 3), rtol=0, atol=1e-6)


def test_the_enlarged_grids_are_those_of_the_official_code_but_at_their_edge():
    """Half a cell wide: there scikit-image mirrors, about the outer cells' centers."""
    transform = pytest.importorskip("skimage.transform")
    grid = (torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    theirs = transform.resize(grid.numpy(), (45, 45), order=1, mode="reflect", anti_aliasing=False)
    ours = mask_by_loops(grid.tolist(), (3, 3), 39, 39)
    np.testing.assert_allclose(ours.numpy(), theirs[3:42, 3:42], atol=1e-12)


def test_every_pixel_is_kept_with_probability_p():
    masks = torch.cat(list(Masks(samples=6000, cells=4, p=0.3, seed=0, chunk=500)((12, 16))))
    assert masks.min() == 0
    assert float(masks.max()) == pytest.approx(1)
    assert float((masks.mean((0, 1)) - 0.3).abs().max()) < 5 * 0.5 / math.sqrt(6000)


@pytest.mark.parametrize("erase", ["black", "mean", "blur"])
def test_the_map_is_that_of_a_slow_loop(curved, x, erase):
    from sightline.erase import resolve

    y = torch.tensor([3, 0, 4])
    S = rise(curved, x, y, samples=12, cells=4, p=0.4, erase=erase, seed=5, chunk=5)
    masks = masks_by_loops(24, 32, 12, 4, 0.4, 5)
    filling = resolve(erase, curved.mean)(x, masks[:3, None])
    for i in range(3):
        total = torch.zeros(24, 32, dtype=torch.float64)
        for M in masks:
            seen = M * x[i] + (1 - M) * filling[i]
            total += curved(seen[None]).softmax(1)[0, y[i]].detach() * M
        torch.testing.assert_close(S[i, 0], total / (12 * 0.4), rtol=0, atol=1e-6)


class Linear(nn.Module):
    """Logit 0 is a weighted sum of the pixels."""

    def __init__(self, h, w):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float64))

    def forward(self, x):
        z = (x.mean(1) * self.weight).sum((1, 2))
        return torch.stack([z, -z], 1)


def test_the_map_is_its_expectation_up_to_noise():
    """All 16 grids of 2 x 2 cells with their probabilities, and all 9 offsets: exact expectation, and deviation."""
    h, w, p, samples = 6, 5, 0.4, 20000
    classifier = Classifier(Linear(h, w), "")
    x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, square = torch.zeros(2, h, w, dtype=torch.float64)
    for bits in itertools.product((0.0, 1.0), repeat=4):
        chance = math.prod(p if bit else 1 - p for bit in bits) / 9
        for start in itertools.product(range(3), range(3)):
            M = mask_by_loops([bits[:2], bits[2:]], start, h, w)
            one = (M * x[0].mean(0) * classifier.model.weight.detach()).sum() * M / p
            mean, square = mean + chance * one, square + chance * one**2
    S = rise(classifier, x, torch.tensor([0]), samples=samples, cells=2, p=p, score=logit, chunk=5000)[0, 0]
    z = (S - mean) / ((square - mean**2) / samples).sqrt()
    assert float(z.abs().max()) < 4.5
    assert float(S.sub(mean).abs().max()) < 0.05 * float(mean.abs().max())


def test_everything_kept_gives_the_score_everywhere(curved, x):
    S = rise(curved, x, torch.tensor([3, 0, 4]), samples=7, p=1.0)
    expected = curved(x).softmax(1)[range(3), [3, 0, 4]].detach()
    torch.testing.assert_close(S, expected.view(3, 1, 1, 1).expand_as(S))


def test_a_chunk_changes_nothing_and_a_seed_does(curved, x):
    y = torch.tensor([3, 0, 4])
    expected = rise(curved, x, y, samples=50, chunk=64)
    for chunk in (1, 7, 50):
        torch.testing.assert_close(rise(curved, x, y, samples=50, chunk=chunk), expected, rtol=0, atol=1e-9)
    assert not torch.allclose(rise(curved, x, y, samples=50, seed=1), expected)
    sizes = []
    curved.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    rise(curved, x, y, samples=50, chunk=7)
    assert sizes == [3] + 7 * [7, 7, 7] + [1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({"samples": 0}, "samples=0, cells=8, chunk=64, p=0.1"),
        ({"cells": 0}, "cells=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"p": 0.0}, r"p=0\.0"),
        ({"p": 1.1}, r"p=1\.1"),
    ],
)
def test_wrong_settings_are_an_error(curved, x, settings, given, plain):
    with pytest.raises(ValueError, match=rf"expected samples, cells, chunk >= 1 and p in \(0, 1\], got .*{given}"):
        rise(curved, x, **settings)


def test_an_unknown_erase_is_an_error(curved, x):
    with pytest.raises(LookupError, match="no eraser called 'blakc'; did you mean black"):
        rise(curved, x, erase="blakc")
