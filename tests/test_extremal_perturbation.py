"""Extremal perturbation: known answers on a disc, its formulas re-derived by loops, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sightline import erase
from sightline.classifier import Classifier, probability
from sightline.maps import blur, scale
from sightline.methods import _extremal_perturbation as ep
from sightline.methods import _pyramid

SIZE, STEP, SIGMA = 32, 4, 6.0


def method(classifier, x, y=None, *, step=7, sigma=21.0, **settings):
    """Run with lengths in pixels of the image."""
    s = scale(tuple(x.shape[2:]))
    return ep.extremal_perturbation(classifier, x, y, step=round(step / s), sigma=sigma / s, **settings)


class Disc(nn.Module):
    """The score of class 0 is the mean brightness in a disc; of class 1, its negative."""

    def __init__(self, center=(11, 20), radius=8, gain=10.0):
        super().__init__()
        rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        inside = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 <= radius**2
        self.register_buffer("inside", inside.double())
        self.gain = gain

    def forward(self, x):
        z = self.gain * (x.mean(1) * self.inside).sum((1, 2)) / self.inside.sum()
        return torch.stack([z, -z], 1)


@pytest.fixture
def disc():
    return Classifier(Disc(), "")


@pytest.fixture
def bright(disc):
    return (0.1 + 0.8 * disc.model.inside).expand(1, 3, -1, -1).clone()


FINE = {"step": 2, "sigma": 4.0, "flip": False, "lr": 0.03}
"""About as many cells on the disc as the defaults have at 224 pixels."""


@pytest.mark.parametrize("game", ["preservation", "deletion", "hybrid"])
@pytest.mark.parametrize(("blend", "filling"), [("mix", "black"), ("pyramid", "blur")])
def test_the_mask_of_a_small_area_lies_in_the_disc(disc, bright, game, blend, filling):
    y = torch.tensor([0])
    M = method(disc, bright, y, game=game, areas=(0.12,), blend=blend, erase=filling, steps=100, **FINE)
    inside = float((M * disc.model.inside).sum() / M.sum())
    assert inside > 0.75
    assert M.max() > 0.95
    assert 0 <= M.min() < 0.01


@pytest.mark.parametrize("area", [0.06, 0.12, 0.2])
def test_the_mask_has_its_area(disc, bright, area):
    M = method(disc, bright, areas=(area,), blend="mix", erase="black", steps=150, **FINE)
    assert float(M.mean()) == pytest.approx(area, abs=0.03)
    assert float((M > 0.5).double().mean()) == pytest.approx(area, abs=0.03)
    assert float(((M - ep.template(M, torch.tensor([area]).double())) ** 2).mean()) < 0.02


def test_a_weak_score_does_not_end_at_the_border():
    weak = Classifier(Disc(gain=3.0), "")
    x = (0.1 + 0.8 * weak.model.inside).expand(1, 3, -1, -1).clone()
    M = method(weak, x, torch.tensor([0]), areas=(0.12,), blend="mix", erase="black", steps=100, **FINE)
    assert float((M * weak.model.inside).sum() / M.sum()) > 0.8


def test_a_mask_that_ends_flat_is_named(disc, bright):
    x = torch.cat([torch.zeros_like(bright), bright])
    with pytest.warns(RuntimeWarning, match=r"the mask of area 0\.12 of image 0 of 2 ended flat") as caught:
        M = ep.extremal_perturbation(disc, x, areas=(0.12,), blend="mix", erase="black", steps=150, **FINE)
    assert len(caught) == 1
    assert float(M[0].max() - M[0].min()) <= ep.TIE
    assert float(M[1].max() - M[1].min()) > 0.5


def test_several_areas_are_the_sum_of_single_ones_for_every_image(curved, x):
    y, areas = torch.tensor([3, 0, 4]), (0.05, 0.2, 0.4)
    settings = {"step": STEP, "sigma": SIGMA, "steps": 6}
    together = method(curved, x, y, areas=areas, **settings)
    alone = sum(method(curved, x, y, areas=(area,), **settings) for area in areas)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
    for chunk in (1, 2, 4):
        torch.testing.assert_close(method(curved, x, y, areas=areas, chunk=chunk, **settings), together)
    assert together.shape == (3, 1, 24, 32)
    assert together.min() >= 0
    assert together.max() <= 3


def smooth_maximum_by_loops(m, step, sigma, h, w):
    r, (i, j) = 1 + math.ceil(sigma / step), m.shape
    top, left = (i * step - h) // 2, (j * step - w) // 2
    M = torch.zeros(h, w, dtype=m.dtype)
    for row in range(h):
        for column in range(w):
            u, z = (row + top, column + left), []
            for a in range(u[0] // step - r, u[0] // step + r + 1):
                for b in range(u[1] // step - r, u[1] // step + r + 1):
                    v = a * step + (step - 1) / 2, b * step + (step - 1) / 2
                    k = math.exp(-2 * max(0, math.dist(u, v) / sigma - 0.5) ** 2)
                    z.append(k * float(m[a, b]) if 0 <= a < i and 0 <= b < j else 0.0)
            weights = [math.exp(20 * one) for one in z]
            M[row, column] = sum(one * weight for one, weight in zip(z, weights, strict=True)) / sum(weights)
    return M


@pytest.mark.parametrize(
    ("step", "sigma", "h", "w"), [(4, 6.0, 12, 16), (3, 5.0, 10, 11), (1, 1.0, 4, 3), (7, 3.0, 9, 8)]
)
def test_the_smooth_maximum_is_that_of_its_definition(step, sigma, h, w):
    generator = torch.Generator().manual_seed(0)
    m = torch.rand(2, 1, math.ceil(h / step), math.ceil(w / step), generator=generator, dtype=torch.float64)
    M = ep.smooth_maximum(m, ep.kernel(step, sigma), (h, w))
    for one, expected in zip(M[:, 0], m[:, 0], strict=True):
        torch.testing.assert_close(one, smooth_maximum_by_loops(expected, step, sigma, h, w))


def test_one_cell_alone_is_drawn_as_the_kernel():
    m = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    m[0, 0, 4, 4] = 1
    M = ep.smooth_maximum(m, ep.kernel(3, 7.0), (27, 27))[0, 0]
    assert M[13, 13] == pytest.approx(1, abs=1e-6)
    assert M[13, 16] == pytest.approx(1, abs=1e-6)  # 3 / 7 < 1/2: still on the plateau
    assert M[13, 13] > M[13, 18] > M[13, 20] > M[13, 23]
    torch.testing.assert_close(M, M.T)
    torch.testing.assert_close(M, M.flip(0))


def test_the_template_is_that_of_the_sorted_mask():
    generator = torch.Generator().manual_seed(1)
    M = torch.stack([torch.randperm(200, generator=generator) for _ in range(3)]).double().view(3, 1, 10, 20)
    areas = torch.tensor([0.05, 0.31, 0.9]).double()
    T = ep.template(M, areas)
    for mask, one, area in zip(M, T, areas.tolist(), strict=True):
        reference = torch.ones(200, dtype=torch.float64)
        reference[: 200 - round(200 * area)] = 0
        torch.testing.assert_close((mask - one).square().sum(), (mask.flatten().sort()[0] - reference).square().sum())


def test_pixels_of_equal_rank_share_the_ones():
    M = torch.tensor([0.9, 0.5, 0.51, 0.1, 0.505, 0.0, 0.495, 0.1, 0.1, 0.1], dtype=torch.float64).view(1, 1, 2, 5)
    T = ep.template(M, torch.tensor([0.3]).double()).flatten()
    torch.testing.assert_close(T, torch.tensor([1, 0.5, 0.5, 0, 0.5, 0, 0.5, 0, 0, 0]).double())
    T = ep.template(torch.ones(1, 1, 4, 4).double(), torch.tensor([0.25]).double())
    torch.testing.assert_close(T, torch.full((1, 1, 4, 4), 0.25).double())


def ascent_by_hand(classifier, x, label, area, game, steps, flip, levels):
    """One image, one area: the equation, differentiated by autograd, with the optimizer's recursion written out."""
    h, w = x.shape[2:]
    k = ep.kernel(STEP, SIGMA)
    m = torch.ones(1, 1, math.ceil(h / STEP), math.ceil(w / STEP), dtype=torch.float64)
    velocity, weight = None, 300.0
    for t in range(steps):
        m.requires_grad_()
        M = ep.smooth_maximum(m, k, (h, w))

        def f(mask, t=t):
            seen = _pyramid.between(levels, mask)
            return classifier(seen.flip(3) if flip and t % 2 == 0 else seen)[0, label]

        F = {"preservation": lambda: f(M), "deletion": lambda: -f(1 - M), "hybrid": lambda: f(M) - f(1 - M)}[game]()  # noqa: B023
        penalty = (M - ep.template(M, torch.tensor([area]).double())).square().mean()
        (gradient,) = torch.autograd.grad(F - weight * penalty, m)
        velocity = gradient if velocity is None else 0.9 * velocity + 0.1 * gradient
        m = (m + 0.01 * velocity).clamp(0, 1).detach()
        weight *= 1.0035
    return ep.smooth_maximum(m, k, (h, w))


@pytest.mark.parametrize("game", ["preservation", "deletion", "hybrid"])
@pytest.mark.parametrize("flip", [True, False])
def test_the_ascent_is_that_of_the_equation(curved, x, game, flip):
    y = torch.tensor([3, 0, 4])
    M = method(curved, x, y, game=game, areas=(0.3,), flip=flip, steps=8, step=STEP, sigma=SIGMA)
    for i in range(3):
        levels = pyramid_by_loops(x[i : i + 1], 8, 20.0)
        expected = ascent_by_hand(curved, x[i : i + 1], y[i], 0.3, game, 8, flip, levels)
        torch.testing.assert_close(M[i : i + 1], expected, rtol=0, atol=1e-9)


def test_the_score_and_the_filling_are_what_is_asked_for(curved, x):
    y, settings = torch.tensor([3, 0, 4]), {"areas": (0.3,), "steps": 4, "step": STEP, "sigma": SIGMA}
    default = method(curved, x, y, **settings)
    assert not torch.allclose(method(curved, x, y, score=probability, **settings), default)
    black = method(curved, x, y, blend="mix", erase="black", **settings)
    assert not torch.allclose(black, default)
    torch.testing.assert_close(black, method(curved, x, y, blend="mix", erase=erase.black, **settings))
    weighted = method(curved, x, y, score=lambda logits, y: 3 * logits.gather(1, y[:, None])[:, 0], **settings)
    assert not torch.allclose(weighted, default)


def test_the_sum_may_be_smoothed(curved, x):
    settings = {"areas": (0.1, 0.3), "steps": 4, "step": STEP, "sigma": SIGMA}
    raw = method(curved, x, **settings)
    torch.testing.assert_close(method(curved, x, smooth=0.09, **settings), blur(raw, 0.09 * 24, padding="zeros"))


def test_the_pointing_settings_are_settings(curved, x):
    for setting in ep.POINTING.values():
        S = method(curved, x[:1], steps=1, step=8, sigma=8.0, **setting)
        assert S.shape == (1, 1, 24, 32)


def pyramid_by_loops(x, levels, sigma):
    """Each level from the definition: a Gaussian of ceil(4 sigma) pixels to each side, borders mirrored."""

    def mirrored(index, length):
        index %= 2 * (length - 1)
        return min(index, 2 * (length - 1) - index)

    def smoothed(line, s):
        reach = math.ceil(4 * s)
        kernel = torch.tensor([math.exp(-(d**2) / (2 * s**2)) for d in range(-reach, reach + 1)], dtype=line.dtype)
        n = line.shape[-1]
        taps = torch.tensor([[mirrored(u + d, n) for d in range(-reach, reach + 1)] for u in range(n)])
        return (line[..., taps] * kernel).sum(-1) / kernel.sum()

    found = [x]
    for level in range(1, levels):
        s = sigma * level / (levels - 1)
        found.append(smoothed(smoothed(x, s).transpose(2, 3), s).transpose(2, 3))
    return torch.stack(found, 1)


def test_the_pyramid_blurs_in_equal_steps(x):
    torch.testing.assert_close(_pyramid.pyramid(x), pyramid_by_loops(x, 8, 20.0))
    torch.testing.assert_close(_pyramid.pyramid(x, 3, 5.0), pyramid_by_loops(x, 3, 5.0))


def test_a_mask_chooses_the_height_in_the_pyramid(x):
    levels = _pyramid.pyramid(x, 5, 8.0)
    M = torch.rand(3, 1, 24, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    M[0, 0, 0, :5] = torch.tensor([0, 0.25, 0.5, 0.75, 1.0])
    seen = _pyramid.between(levels, M)
    for b, row, column in [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 0, 4), (1, 3, 7), (2, 23, 31), (1, 11, 5)]:
        height = 4 * (1 - float(M[b, 0, row, column]))
        low = min(int(height), 3)
        colors = levels[b, :, :, row, column]
        expected = (1 - (height - low)) * colors[low] + (height - low) * colors[low + 1]
        torch.testing.assert_close(seen[b, :, row, column], expected)
    torch.testing.assert_close(_pyramid.between(levels, torch.ones_like(M)), x)
    torch.testing.assert_close(_pyramid.between(levels, torch.zeros_like(M)), levels[:, -1])


def test_of_two_levels_the_blend_is_the_mix(x):
    M = torch.rand(3, 1, 24, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for name in ("black", "mean", "blur", "noise"):
        filling = erase.resolve(name, (0.4, 0.5, 0.6))
        levels = _pyramid.levels_of("mix", name, (0.4, 0.5, 0.6))(x)
        torch.testing.assert_close(_pyramid.between(levels, M), erase.mix(x, M, filling))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"areas": ()}, ValueError, r"expected at least one area between 0 and 1, a share of the image, got \(\)"),
        ({"areas": (0.1, 1.0)}, ValueError, r"between 0 and 1, a share of the image, got \(0\.1, 1\.0\)"),
        ({"step": 0}, ValueError, "expected step, steps, chunk >= 1, got step=0, steps=800, chunk=16"),
        ({"steps": 0}, ValueError, "got step=57, steps=0"),
        ({"chunk": 0}, ValueError, "chunk=0"),
        ({"sigma": 0.0}, ValueError, r"expected sigma, weight, growth, lr > 0, got sigma=0\.0"),
        ({"lr": math.nan}, ValueError, "lr=nan"),
        ({"momentum": 1.0}, ValueError, r"expected momentum in \[0, 1\) and smooth >= 0, got momentum=1\.0"),
        ({"smooth": -0.1}, ValueError, r"smooth=-0\.1"),
        ({"game": "preserve"}, LookupError, "no game called 'preserve'; did you mean preservation"),
        ({"blend": "mixx"}, LookupError, "no blend called 'mixx'; did you mean mix"),
        ({"erase": "black"}, ValueError, "blend='pyramid' blurs by itself: leave erase='blur', or pass blend='mix'"),
        ({"blend": "mix", "erase": "telea"}, ValueError, "this erase fills from what the mask keeps"),
        ({"blend": "mix", "erase": "blakc"}, LookupError, "no eraser called 'blakc'; did you mean black"),
    ],
)
def test_wrong_settings_are_an_error(curved, x, settings, error, message, plain):
    with pytest.raises(error, match=message):
        method(curved, x, **settings)


def test_a_pyramid_of_nothing_is_an_error(x, plain):
    for levels, sigma in ((1, 20.0), (8, 0.0)):
        with pytest.raises(ValueError, match=r"expected levels >= 2 and sigma > 0 pixels, got levels="):
            _pyramid.pyramid(x, levels, sigma)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_of_half_precision_images_are_in_single_precision(curved, x, dtype):
    half, classifier = x.to(dtype), replace(curved, model=curved.model.float())
    settings = {"steps": 5, "step": 4, "sigma": 6.0}
    torch.testing.assert_close(method(classifier, half, **settings), method(classifier, half.float(), **settings))


def test_lengths_are_those_of_224_pixels(disc, bright):
    y, settings = torch.tensor([0]), {"areas": (0.12,), "steps": 3}
    by_default = ep.extremal_perturbation(disc, bright, y, **settings)
    assert torch.equal(by_default, method(disc, bright, y, step=1, sigma=3.0, **settings))


def test_masks_under_autocast_are_those_without(disc, bright):
    single = Classifier(disc.model.float(), "")
    settings = {"areas": (0.12,), "steps": 3, "step": 2, "sigma": 4.0}
    expected = method(single, bright.float(), torch.tensor([0]), **settings)
    with torch.autocast("cpu", torch.bfloat16):
        found = method(single, bright.float(), torch.tensor([0]), **settings)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02)
