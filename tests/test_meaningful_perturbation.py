"""Meaningful perturbation: one image at a time, with matrices, loops and Adam written out, against the batch."""

import importlib
import inspect
import math
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sightline.classifier import Classifier, logit, probability, wrap
from sightline.data import Sample, collate
from sightline.erase import noise
from sightline.evaluation import measure
from sightline.maps import degenerate
from sightline.methods import layer_perturbation, meaningful_perturbation
from sightline.metrics import METRICS

module = importlib.import_module("sightline.methods._meaningful_perturbation")
masks = importlib.import_module("sightline.methods._mask")

SMALL = {"cells": 6, "smooth": 1.5, "steps": 5}


@pytest.fixture
def y():
    return torch.tensor([3, 0, 4])


@pytest.fixture(autouse=True)
def loud():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@cache
def blurring(n, sigma):
    """The matrix that smooths a line of n pixels, reflected at its ends without repeating the last."""
    B, reach = torch.zeros(n, n, dtype=torch.float64), math.ceil(4 * sigma)
    weights = {d: math.exp(-(d**2) / (2 * sigma**2)) if sigma else 1.0 for d in range(-reach, reach + 1)}
    for v in range(n):
        for d, weight in weights.items():
            u = abs(v + d) % (2 * (n - 1))
            B[v, min(u, 2 * (n - 1) - u)] += weight / sum(weights.values())
    return B


def enlarging(n, cells, how):
    """The matrix that takes `cells` cells to n pixels."""
    N = torch.zeros(n, cells, dtype=torch.float64)
    for v in range(n):
        if how == "nearest":
            N[v, v * cells // n] = 1
            continue
        place = min(max((v + 0.5) * cells / n - 0.5, 0), cells - 1)
        low = int(place)
        N[v, low] += 1 - (place - low)
        N[v, min(low + 1, cells - 1)] += place - low
    return N


def roughness(m, beta, norm):
    total = 0
    for i in range(m.shape[0]):
        for j in range(m.shape[1]):
            dy = m[i + 1, j] - m[i, j] if i + 1 < m.shape[0] else m[i, j] * 0
            dx = m[i, j + 1] - m[i, j] if j + 1 < m.shape[1] else m[i, j] * 0
            if norm == "anisotropic":
                total = total + dy.abs() ** beta + dx.abs() ** beta
            elif dy != 0 or dx != 0:
                total = total + (dy**2 + dx**2) ** (beta / 2)
    return total


class Adam:
    def __init__(self, lr):
        self.lr, self.t, self.first, self.second = lr, 0, 0.0, 0.0

    def step(self, m, g):
        self.t += 1
        self.first, self.second = 0.9 * self.first + 0.1 * g, 0.999 * self.second + 0.001 * g**2
        move = (self.first / (1 - 0.9**self.t)) / ((self.second / (1 - 0.999**self.t)).sqrt() + 1e-8)
        return (m - self.lr * move).clamp(0, 1)


def smoothed(image, sigma):
    B = [blurring(n, sigma) for n in image.shape[-2:]]
    return B[0] @ image @ B[1].T


def removed(image, erase, classifier):
    return {
        "blur": lambda: smoothed(image, 10.0),
        "mean": lambda: torch.tensor(classifier.mean, dtype=image.dtype)[:, None, None].expand_as(image),
        "black": lambda: torch.zeros_like(image),
        "noise": lambda: torch.rand(image.shape, generator=torch.Generator().manual_seed(0)).to(image),
    }[erase]()


def blurs(image):
    return [image if k == 0 else smoothed(image, 20 * k / 7) for k in range(8)]


def shown(image, M, blend):
    """Perturb one image pixel by pixel."""
    levels = [image, smoothed(image, 10.0)] if blend == "mix" else blurs(image)
    seen, n = torch.empty_like(image), len(levels) - 1
    for v in range(image.shape[1]):
        for u in range(image.shape[2]):
            t = (1 - M[v, u].item()) * n
            k = min(int(t), n - 1)
            seen[:, v, u] = (k + 1 - t) * levels[k][:, v, u] + (t - k) * levels[k + 1][:, v, u]
    return seen


def by_hand(
    classifier,
    image,
    classes,
    m,
    *,
    steps=5,
    cells=6,
    smooth=1.5,
    game="deletion",
    erase="blur",
    blend="mix",
    upsample="nearest",
    blur_grad="exact",
    jitter=0,
    l1=1e-4,
    tv=1e-2,
    beta=3.0,
    tv_norm="isotropic",
    lr=0.1,
    seed=0,
    read=lambda p, z, c: p[c],
):
    """Return the importance of one image's pixels, and the mask it comes from."""
    (h, w), sign = image.shape[1:], 1 if game == "deletion" else -1
    N, B = [enlarging(n, cells, upsample) for n in (h, w)], [blurring(n, smooth) for n in (h, w)]
    big = F.interpolate(image[None], (h + jitter, w + jitter), mode="bilinear")[0] if jitter else image
    generator, adam = torch.Generator().manual_seed(seed), Adam(lr)
    levels = [big, removed(big, erase, classifier)] if blend == "mix" else blurs(big)
    for _ in range(steps):
        v, u = torch.randint(max(jitter, 1), (2,), generator=generator).tolist()
        M = (B[0] @ N[0] @ m @ N[1].T @ B[1].T).requires_grad_()
        t = (1 - M) * (len(levels) - 1)
        seen = sum((1 - (t - k).abs()).clamp(min=0) * level[:, v : v + h, u : u + w] for k, level in enumerate(levels))
        z = classifier.model(classifier.normalize(seen[None]))[0]
        p = torch.exp(z) / torch.exp(z).sum()
        (G,) = torch.autograd.grad(sum(read(p, z, c) for c in classes), M)
        G = B[0].T @ G @ B[1] if blur_grad == "exact" else G
        leaf = m.clone().requires_grad_()
        size = (1 - leaf).sum() if game == "deletion" else leaf.sum()
        rough = roughness(leaf, beta, tv_norm)
        (R,) = torch.autograd.grad(l1 * size + tv * rough, leaf)
        m = adam.step(m, sign * (N[0].T @ G @ N[1]) + R)
    M = B[0] @ N[0] @ m @ N[1].T @ B[1].T
    return (1 - M if game == "deletion" else M).detach(), m


def assert_by_hand(classifier, x, classes, m=None, score=probability, start="half", **settings):
    m = torch.full((6, 6), 0.5, dtype=torch.float64) if m is None else m
    expected = [by_hand(classifier, x[n], classes[n], m, **settings) for n in range(len(x))]
    slow = {name: value for name, value in settings.items() if name != "read"}
    call = {**SMALL, "jitter": 0, "start": start, "score": score, **slow}
    S = meaningful_perturbation(classifier, x, torch.tensor([c[0] for c in classes]), **call)
    torch.testing.assert_close(S[:, 0], torch.stack([S for S, _ in expected]), rtol=0, atol=1e-9)
    assert all((m - found).abs().max() > 0.01 for _, found in expected)


OPTIONS = [
    {},
    {"game": "preservation"},
    {"tv_norm": "anisotropic"},
    {"tv_norm": "anisotropic", "beta": 1.0, "l1": 1e-2},
    {"beta": 1.0},
    {"beta": 2.0, "tv": 0.3},
    {"upsample": "bilinear"},
    {"blur_grad": "straight_through"},
    {"blur_grad": "straight_through", "upsample": "bilinear", "game": "preservation"},
    {"smooth": 0.0},
    {"erase": "mean"},
    {"erase": "black", "game": "preservation"},
    {"erase": "noise"},
    {"jitter": 4},
    {"jitter": 3, "seed": 5, "erase": "noise"},
    {"l1": 0.05, "lr": 0.02, "steps": 8},
    {"blend": "pyramid"},
    {"blend": "pyramid", "jitter": 4, "game": "preservation", "steps": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_optimization_is_that_of_the_paper(options, curved, x, y):
    assert_by_hand(curved, x, [[c] for c in y.tolist()], **options)


@pytest.mark.parametrize("game", ["deletion", "preservation"])
def test_several_classes_are_summed_and_are_those_of_the_clean_image(game, curved, x, y):
    order = curved(x).argsort(dim=1, descending=True)
    assert_by_hand(curved, x, order[:, :1].tolist(), game=game)
    for k in (2, 4):
        expected = [by_hand(curved, x[n], order[n, :k].tolist(), torch.full((6, 6), 0.5).double())[0] for n in range(3)]
        for labels in (y, None):
            S = meaningful_perturbation(curved, x, labels, classes=k, jitter=0, start="half", **SMALL)
            torch.testing.assert_close(S[:, 0], torch.stack(expected), rtol=0, atol=1e-9)


def test_a_label_is_checked_even_where_it_does_not_count(curved, x, plain):
    for method in (meaningful_perturbation, layer_perturbation):
        with pytest.raises(ValueError, match=r"label 9 is outside 0\.\.4"):
            method(curved, x, torch.tensor([9, 0, 0]), classes=2)


def test_the_score_is_the_probability_unless_another_is_given(curved, x, y):
    classes = [[c] for c in y.tolist()]
    assert_by_hand(curved, x, classes, score=logit, read=lambda p, z, c: z[c])
    assert inspect.signature(meaningful_perturbation).parameters["score"].default is probability


def test_the_defaults_are_the_papers():
    defaults = {name: p.default for name, p in inspect.signature(meaningful_perturbation).parameters.items()}
    paper = {"steps": 300, "lr": 0.1, "l1": 1e-4, "tv": 1e-2, "beta": 3.0, "cells": 28, "smooth": 5.0, "jitter": 4}
    choices = {"game": "deletion", "erase": "blur", "start": "circle", "tv_norm": "isotropic", "upsample": "nearest"}
    assert {**defaults, **paper, **choices, "blur_grad": "exact", "classes": 1, "blend": "mix"} == defaults
    assert dict(module.LOCALIZATION) == {"classes": 5, "l1": 1e-3, "beta": 2.0}


def test_every_setting_changes_the_map(curved, x, y):
    base = {**SMALL, "start": "half", "steps": 3}
    changes = [{name: value} for options in OPTIONS for name, value in options.items()]
    changes += [{"jitter": 0}, {"score": logit}, {"start": "random"}, {"cells": 5}, {"steps": 4}, {"classes": 2}]
    maps = [meaningful_perturbation(curved, x, y, **base)]
    for change in changes:
        if change in ({"jitter": 4}, {"steps": 3}):
            continue
        maps.append(meaningful_perturbation(curved, x, y, **{**base, **change}))
        assert (maps[0] - maps[-1]).abs().max() > 1e-7, change


@pytest.mark.parametrize("norm", ["isotropic", "anisotropic"])
@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0, 3.0])
def test_total_variation_with_loops(norm, beta):
    m = torch.rand(3, 1, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    m[2, 0, 1:4, 2:6] = 0.25
    m.requires_grad_()
    values = masks.total_variation(m, beta, norm)
    expected = torch.stack([roughness(one[0], beta, norm) for one in m])
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
    (found,), (slow,) = (torch.autograd.grad(v.sum(), m) for v in (values, expected))
    torch.testing.assert_close(found, slow, rtol=1e-9, atol=1e-12)


def test_total_variation_of_known_masks():
    flat = torch.full((2, 1, 4, 5), 0.3, dtype=torch.float64, requires_grad=True)
    for norm in ("isotropic", "anisotropic"):
        for beta in (1.0, 1.5, 2.0, 3.0):
            values = masks.total_variation(flat, beta, norm)
            assert values.tolist() == [0, 0]
            assert torch.autograd.grad(values.sum(), flat)[0].abs().max() == 0
    m = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    squares = m.diff(dim=2).square().sum((1, 2, 3)) + m.diff(dim=3).square().sum((1, 2, 3))
    torch.testing.assert_close(masks.total_variation(m, 2.0), squares)
    step = torch.tensor([[[[0.0, 0.0], [0.0, 3.0]]]])
    corner = torch.tensor([[[[0.0, 3.0], [4.0, 0.0]]]])
    assert masks.total_variation(step, 3.0).tolist() == [54]
    assert masks.total_variation(corner, 3.0).tolist() == [125 + 27 + 64]
    assert masks.total_variation(corner, 3.0, "anisotropic").tolist() == [27 + 64 + 27 + 64]


class Disc(nn.Module):
    """One output: how bright a disc is."""

    def __init__(self, side=32, radius=8.0, k=20.0, t=0.5):
        super().__init__()
        rows, columns = (torch.arange(side, dtype=torch.float64) - side * share for share in (0.4, 0.55))
        self.register_buffer("inside", (torch.hypot(rows[:, None], columns) < radius).double())
        self.k, self.t = k, t

    def forward(self, x):
        return self.k * ((x.mean(1) * self.inside).sum((1, 2)) / self.inside.sum() - self.t)[:, None]

    def image(self):
        return (0.1 + 0.8 * self.inside).expand(1, 3, -1, -1).clone()


@pytest.mark.parametrize(
    ("game", "l1", "start"),
    [("deletion", 1e-4, "circle"), ("deletion", 1e-4, "half"), ("preservation", 1e-3, "circle")],
)
def test_the_mask_recovers_the_disc_that_the_score_reads(game, l1, start):
    model = Disc()
    S = meaningful_perturbation(
        Classifier(model, ""),
        model.image(),
        torch.tensor([1]),
        game=game,
        erase="black",
        l1=l1,
        start=start,
        smooth=2.5,
    )
    found, disc = S[0, 0] >= 0.5, model.inside > 0
    assert (found & disc).sum() / (found | disc).sum() > 0.8
    assert S[0, 0][disc].mean() > 0.7 > 0.2 > S[0, 0][~disc].mean()


def test_where_the_mask_costs_too_much_nothing_is_perturbed():
    model = Disc()
    for game in ("deletion", "preservation"):
        with pytest.warns(RuntimeWarning, match="image 0 of 1 ended all zero; nothing is worth a perturbation"):
            S = meaningful_perturbation(
                Classifier(model, ""),
                model.image(),
                torch.tensor([1]),
                game=game,
                erase="black",
                l1=10.0,
                steps=15,
                start="half",
            )
        assert S.abs().max() == 0


def test_without_jitter_the_seed_counts_only_for_a_random_start(curved, x, y):
    def run(**settings):
        return meaningful_perturbation(curved, x, y, **{**SMALL, "start": "half", **settings})

    assert torch.equal(run(jitter=0, seed=1), run(jitter=0, seed=2))
    assert not torch.equal(run(jitter=4, seed=1), run(jitter=4, seed=2))
    assert torch.equal(run(jitter=4, seed=1), run(jitter=4, seed=1))
    assert not torch.equal(run(jitter=0, start="random", seed=1), run(jitter=0, start="random", seed=2))


def test_the_image_moves_by_all_offsets_and_the_mask_stays(pooled, x, y):
    seen = []
    pooled.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with pytest.warns(RuntimeWarning, match="all zero"):
        meaningful_perturbation(pooled, x, y, start="ones", steps=70, lr=1e-9, jitter=4)
    big = pooled.normalize(F.interpolate(x, (28, 36), mode="bilinear"))
    crops = {(v, u): big[:, :, v : v + 24, u : u + 32] for v in range(5) for u in range(5)}
    found = [[place for place, crop in crops.items() if torch.allclose(one, crop, atol=1e-5)] for one in seen[1:]]
    assert {place for (place,) in found} == {(v, u) for v in range(4) for u in range(4)}


def test_the_filling_moves_with_the_image(pooled, x, y):
    seen = []
    pooled.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    meaningful_perturbation(pooled, x, y, start="zeros", steps=30, lr=1e-9, jitter=4)
    big = pooled.normalize(torch.stack([smoothed(one, 10.0) for one in F.interpolate(x, (28, 36), mode="bilinear")]))
    for one in seen[1:]:
        crops = (big[:, :, v : v + 24, u : u + 32] for v in range(4) for u in range(4))
        assert sum(torch.allclose(one, crop, atol=1e-6) for crop in crops) == 1


def test_noise_is_the_same_for_every_image(pooled, x, y):
    seen = []
    pooled.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    meaningful_perturbation(pooled, x, y, start="zeros", steps=2, lr=1e-9, erase="noise", jitter=0)
    expected = pooled.normalize(noise(x, x[:, :1]))
    torch.testing.assert_close(seen[1], expected, atol=1e-6, rtol=0)
    assert torch.equal(expected[0], expected[2])


STARTS = {"half": 0.5, "zeros": 0.0, "ones": 1.0}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("game", ["deletion", "preservation"])
def test_constant_starts(start, game, curved, x, y):
    m = torch.full((6, 6), STARTS[start], dtype=torch.float64)
    first = meaningful_perturbation(curved, x, y, game=game, start=start, **{**SMALL, "steps": 1, "lr": 1e-7})
    importance = 1 - STARTS[start] if game == "deletion" else STARTS[start]
    assert (first - importance).abs().max() < 2e-7
    if start == "half":
        assert_by_hand(curved, x, [[c] for c in y.tolist()], m, game=game, start=start)


def test_at_the_border_the_penalty_still_pushes_outwards(curved, x, y):
    """|1 - m| is 1 - m on [0, 1]: where the score asks for less than l1, a mask of one stays at one."""
    with pytest.warns(RuntimeWarning, match="ended all zero"):
        S = meaningful_perturbation(curved, x, y, start="ones", l1=5.0, **SMALL)
    assert S.abs().max() == 0


def test_a_random_start_is_uniform_and_the_same_for_every_image(curved, x, y):
    m = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(3))[0].double()
    assert_by_hand(curved, x, [[c] for c in y.tolist()], m, start="random", seed=3)


@cache
def slow_discs(size):
    scale, middle = math.hypot(*size) / math.hypot(224, 224), ((size[0] - 1) / 2, (size[1] - 1) / 2)
    hard = torch.zeros(36, *size, dtype=torch.float64)
    for n in range(36):
        for v in range(size[0]):
            for u in range(size[1]):
                hard[n, v, u] = math.dist((v, u), middle) < 5 * n * scale
    return hard


def slow_circle(p, size, game, share=0.99):
    """Return the number of the smallest disc that decides one image's game; None where no disc does."""
    keep, hard = game == "preservation", slow_discs(size)
    orig, full = p(torch.ones_like(hard[0])), p(torch.zeros_like(hard[0]))
    if orig == full:
        return None, hard
    for n, D in enumerate(hard):
        left = (p(D if keep else 1 - D) - full) / (orig - full)
        if (left >= share) if keep else (left < 1 - share):
            return n, hard
    return None, hard


@pytest.mark.parametrize("game", ["deletion", "preservation"])
def test_the_circle_to_start_from_with_loops(game, curved, x):
    found = set()
    for label in (0, 3):
        y = torch.full((3,), label)
        S = meaningful_perturbation(curved, x, y, game=game, lr=1e-7, steps=1, cells=8, smooth=0.0, chunk=7)
        for image, saliency in zip(x, S, strict=True):
            fill = smoothed(image, 10.0)

            def p(M, image=image, fill=fill, label=label):
                return curved(M * image[None] + (1 - M) * fill).softmax(1)[0, label].item()

            n, hard = slow_circle(p, (24, 32), game)
            soft = smoothed(hard[n], 10.0 * math.hypot(24, 32) / math.hypot(224, 224))
            expected = torch.tensor([[soft[v * 3, u * 4] for u in range(8)] for v in range(8)])
            enlarged = enlarging(24, 8, "nearest") @ expected.double() @ enlarging(32, 8, "nearest").T
            torch.testing.assert_close(saliency[0], enlarged, rtol=0, atol=2e-7)
            found.add(n)
    assert len(found) > 2


class Middle(nn.Module):
    """One output that grows with the brightness of a disc in the middle, of radius 60 if the image had 224 pixels."""

    def __init__(self, side=112, radius=30.0):
        super().__init__()
        line = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
        self.register_buffer("inside", (torch.hypot(line[:, None], line) < radius).double())

    def forward(self, x):
        return ((x.mean(1) * self.inside).sum((1, 2)) / self.inside.sum() * 4 - 2)[:, None]


def radii_of(classifier, x, game, chunk=64):
    """Return the radius of the hard disc that is chosen for each image."""
    search = masks.Search(game, 1, 0.1, 0.0, 0.0, 2.0, "isotropic", "circle", 0, chunk)
    y, size = torch.ones(len(x), dtype=torch.long), (x.shape[2], x.shape[3])
    chosen = []

    def softened(disc, *_, **__):
        chosen.append(disc)
        return disc

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "blur", softened)
        m = search.begin(lambda M, i: probability(classifier(M * x[i]), y[i]), x.new_zeros(len(x), 1, *size), size)
    assert torch.equal(m, search.turn(chosen[0]))
    return (chosen[0].sum((1, 2, 3)) / math.pi).sqrt().round().tolist()


def test_the_circles_radius_is_in_pixels_of_224_and_monotone_in_the_threshold(monkeypatch):
    classifier, x = Classifier(Middle(), ""), torch.ones(1, 3, 112, 112, dtype=torch.float64)
    found = {}
    for share in (0.5, 0.8, 0.99):
        monkeypatch.setattr(masks, "DECIDED", share)
        found[share] = [radii_of(classifier, x, game)[0] for game in ("deletion", "preservation")]
    assert found[0.99] == [30, 30]
    assert found[0.5][0] < found[0.8][0] < found[0.99][0]
    assert found[0.5][1] < found[0.8][1] < found[0.99][1]


def test_where_perturbing_everything_changes_nothing_everything_is_perturbed_first(pooled, x, y):
    """A constant image is its own blur: p_orig = p_full, and no division by zero."""
    gray = torch.full_like(x, 0.4)
    gray[1] = x[1]

    def color(x, _):
        return torch.full_like(x, 0.4)

    for game, start, erase in (
        ("deletion", 1.0, color),
        ("preservation", 0.0, color),
        ("deletion", 1.0, "blur"),
        ("preservation", 0.0, "blur"),
    ):
        with pytest.warns(RuntimeWarning) as caught:
            S = meaningful_perturbation(
                pooled, gray, y, game=game, erase=erase, steps=1, lr=1e-12, jitter=0, cells=6, smooth=1.0
            )
        assert [str(one.message).split(" ended")[0][-12:] for one in caught] == ["image 0 of 3", "image 2 of 3"]
        assert (S[[0, 2]] - start).abs().max() < 1e-9
        assert S[1].max() > 0.5


def test_cells_are_at_most_one_a_pixel(curved, x, y):
    big = meaningful_perturbation(curved, x, y, start="half", steps=2, smooth=0.0, cells=1000)
    own = meaningful_perturbation(curved, x, y, start="half", steps=2, smooth=0.0, cells=32)
    assert torch.equal(big, own)
    few = meaningful_perturbation(curved, x, y, start="half", steps=2, smooth=0.0, cells=4)
    assert all(len(one.unique()) <= 16 for one in few)


def test_between_two_levels_is_the_mix_and_between_eight_the_pyramid(curved, x):
    M = torch.rand(3, 1, 24, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    M[0, 0, 0, :9] = torch.linspace(0, 1, 9)
    M[0, 0, 1, :8] = torch.arange(8) / 7
    pairs = module.levels_of("mix", "blur", curved.mean)(x)
    eight = module.levels_of("pyramid", "blur", curved.mean)(x)
    assert pairs.shape == (3, 2, 3, 24, 32)
    assert eight.shape == (3, 8, 3, 24, 32)
    for levels, blend in ((pairs, "mix"), (eight, "pyramid")):
        expected = torch.stack([shown(x[n], M[n, 0], blend) for n in range(3)])
        torch.testing.assert_close(module.between(levels, M), expected)
        for value, end in ((1.0, levels[:, 0]), (0.0, levels[:, -1])):
            flat = torch.full_like(M, value, requires_grad=True)
            assert torch.equal(module.between(levels, flat), end)
            (slope,) = torch.autograd.grad(module.between(levels, flat).sum(), flat)
            assert (slope != 0).all()


def test_a_chunk_changes_nothing(curved, x, y):
    for method in (meaningful_perturbation, layer_perturbation):
        maps = [method(curved, x, y, steps=2, chunk=chunk) for chunk in (5, 1000)]
        assert all((one - maps[0]).abs().max() < 1e-9 for one in maps)


class Sharp(nn.Module):
    """The root of a brightness that counts above .3: of darker images the gradient is infinite times zero."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 2, 3)
        self.head = nn.Linear(2, 5)

    def forward(self, x):
        bright = x.mean((1, 2, 3))
        root = (bright * (bright > 0.3)).sqrt()
        return self.head(self.body(x).square().mean((2, 3))) + root[:, None] * torch.arange(5).to(x)


@pytest.mark.parametrize("steps", [1, 4])
def test_an_image_whose_mask_diverges_is_named_and_does_not_touch_the_others(steps, seeded, x, y):
    classifier = wrap(seeded(Sharp, seed=3), layer="body", normalization="none", size=(24, 32))
    bright = x + 0.2 * (1 - x)
    mixed = bright.clone()
    mixed[1] *= 0.2
    settings = {"start": "half", "steps": steps, "cells": 6}
    expected = meaningful_perturbation(classifier, bright, y, **settings)
    with pytest.warns(RuntimeWarning) as caught:
        S = meaningful_perturbation(classifier, mixed, y, **settings)
    (message,) = (str(one.message) for one in caught)
    assert message == (
        "meaningful perturbation: the mask of image 1 of 3 ended not finite; its optimization diverged: try a smaller "
        "lr or another start"
    )
    assert caught[0].category is RuntimeWarning
    assert S[1].isnan().all()
    assert torch.equal(S[[0, 2]], expected[[0, 2]])
    with pytest.warns(RuntimeWarning, match="image 0 of 1"):
        assert meaningful_perturbation(classifier, mixed[1:2], y[1:2], **settings).isnan().all()


def test_a_measurement_lists_masks_that_show_nothing(seeded, x):
    classifier = wrap(seeded(Sharp, seed=3), layer="body", normalization="none", size=(24, 32))
    mixed = x + 0.2 * (1 - x)
    mixed[1] *= 0.2

    def method(classifier, x, y=None, /):
        return meaningful_perturbation(classifier, x, y, start="half", steps=2, cells=6)

    samples = tuple(Sample(id=str(n), image=image, label=n) for n, image in enumerate(mixed))
    with pytest.warns(RuntimeWarning, match="not finite"):
        scores = measure(method, classifier, [collate(samples)], {"average_drop": METRICS["average_drop"]()})
    assert scores.degenerate == {"1": "not finite"}


def test_a_constant_mask_gives_an_exactly_constant_map(pooled, x, y):
    """The smoothing alone would leave rounding, which a color scale would show as a picture."""
    for game, start, value in (("deletion", "zeros", 1.0), ("preservation", "ones", 1.0), ("deletion", "ones", 0.0)):
        reason = "constant; no place differs" if value else "all zero; nothing is worth"
        with pytest.warns(RuntimeWarning, match=f"the mask of image . of 3 ended {reason}"):
            S = meaningful_perturbation(pooled, x, y, game=game, start=start, steps=1, lr=1e-30)
        assert (value == S).all()
        assert degenerate(S) == ["constant" if value else "all zero"] * 3


ERRORS = [
    ({"steps": 0}, "expected steps >= 1 and lr > 0, got steps=0, lr=0.1"),
    ({"lr": 0.0}, "expected steps >= 1 and lr > 0, got steps=300, lr=0.0"),
    ({"l1": -1.0}, "expected l1 >= 0, tv >= 0 and beta >= 1, got l1=-1.0"),
    ({"tv": -1.0}, "expected l1 >= 0, tv >= 0 and beta >= 1, got l1=.*, tv=-1.0"),
    ({"tv": math.nan}, "tv=nan"),
    ({"beta": 0.5}, "expected l1 >= 0, tv >= 0 and beta >= 1, got .* beta=0.5"),
    ({"chunk": 0}, "expected chunk >= 1 masked images at a time, got 0"),
    ({"classes": 0}, "expected classes >= 1 whose scores are summed, got 0"),
    ({"classes": 5}, "expected classes below the network's 5, got 5; their sum never moves"),
]

PIXEL_ERRORS = [
    ({"cells": 1}, "expected cells >= 2, smooth >= 0 and jitter >= 0 pixels, got cells=1"),
    ({"smooth": -1.0}, "expected cells >= 2, smooth >= 0 and jitter >= 0 pixels, got .*smooth=-1.0"),
    ({"jitter": -1}, "expected cells >= 2, smooth >= 0 and jitter >= 0 pixels, got .*jitter=-1"),
    ({"erase": "telea"}, "fills from what the mask keeps.*use 'blur', 'mean', 'noise' or 'black'"),
    (
        {"blend": "pyramid", "erase": "mean"},
        "blurs by itself: leave erase='blur', or pass blend='mix', got erase='mean'",
    ),
]


@pytest.mark.parametrize(("settings", "message"), ERRORS, ids=str)
def test_bad_settings_are_errors(settings, message, pooled, x, y, plain):
    for method in (meaningful_perturbation, layer_perturbation):
        with pytest.raises(ValueError, match=message):
            method(pooled, x, y, **settings)


@pytest.mark.parametrize(("settings", "message"), PIXEL_ERRORS, ids=str)
def test_bad_settings_of_the_image_are_errors(settings, message, pooled, x, y, plain):
    with pytest.raises(ValueError, match=message):
        meaningful_perturbation(pooled, x, y, **settings)


def test_unknown_choices_are_errors(pooled, x, y, plain):
    for settings, message in (
        ({"game": "deletions"}, "no game called 'deletions'; did you mean deletion"),
        ({"start": "circles"}, "no start called 'circles'; did you mean circle"),
        ({"tv_norm": "isotropi"}, "no variation called 'isotropi'; did you mean isotropic or anisotropic"),
    ):
        for method in (meaningful_perturbation, layer_perturbation):
            with pytest.raises(LookupError, match=message):
                method(pooled, x, y, **settings)
    for settings, message in (
        ({"upsample": "linear"}, "no upsample called 'linear'; did you mean bilinear"),
        ({"blur_grad": "exat"}, "no blur_grad called 'exat'; did you mean exact"),
        ({"blend": "mixed"}, "no blend called 'mixed'; did you mean mix"),
        ({"erase": "blurr"}, "no eraser called 'blurr'; did you mean blur"),
    ):
        with pytest.raises(LookupError, match=message):
            meaningful_perturbation(pooled, x, y, **settings)


def layer_by_hand(behind, A, c, m, *, steps=4, game="deletion", l1=1e-2, tv=1e-2, beta=3.0, tv_norm="isotropic"):
    """Return the importance of one image's cells; `behind` gives the logits of the features (c, i, j)."""
    sign, adam = 1 if game == "deletion" else -1, Adam(0.1)
    for _ in range(steps):
        leaf = m.clone().requires_grad_()
        p = behind(leaf * A).softmax(0)[c]
        size = (1 - leaf).sum() if game == "deletion" else leaf.sum()
        rough = roughness(leaf, beta, tv_norm)
        (g,) = torch.autograd.grad(sign * p + l1 * size + tv * rough, leaf)
        m = adam.step(m, g)
    return 1 - m if game == "deletion" else m


@pytest.mark.parametrize("options", [{}, {"game": "preservation"}, {"tv_norm": "anisotropic", "beta": 2.0}], ids=str)
def test_masks_on_a_layer_are_those_of_the_paper(options, curved, x, y):
    A, half = curved.features(x), torch.full((12, 16), 0.5, dtype=torch.float64)
    S = layer_perturbation(curved, x, y, start="half", steps=4, l1=1e-2, tv=1e-2, **options)
    for n in range(3):
        expected = layer_by_hand(lambda a: curved.model.behind(a[None])[0], A[n], y[n], half, **options)
        torch.testing.assert_close(S[n, 0], expected, rtol=0, atol=1e-9)
        assert (expected - half).abs().max() > 0.01


def test_masks_on_tokens_leave_the_class_token_alone(tokens, x, y):
    half = torch.full((3, 4), 0.5, dtype=torch.float64)
    model, A = tokens.model, tokens.features(x)
    S = layer_perturbation(tokens, x, y, start="half", steps=4, l1=1e-2, tv=1e-2)
    for n in range(3):
        with torch.no_grad():
            patches = model.embed(tokens.normalize(x[n : n + 1])).flatten(2).transpose(1, 2)
            t = torch.cat([model.others, patches], 1)
            first = model.norm1(t)[:, :1]

        def behind(a, t=t, first=first):
            a = torch.cat([first, a.flatten(1).T[None]], 1)
            b = t + model.attention(a, a, a, need_weights=False)[0]
            b = b + model.mlp(model.norm2(b))
            return model.head(model.norm(b)[:, 0])[0]

        torch.testing.assert_close(behind(A[n]), tokens(x[n : n + 1])[0])
        expected = layer_by_hand(behind, A[n], y[n], half)
        torch.testing.assert_close(S[n, 0], expected, rtol=0, atol=1e-9)
        assert (expected - half).abs().max() > 0.01


class Planted(nn.Module):
    """The last layer's brightest class reads one cell alone."""

    def __init__(self, cell=(2, 5)):
        super().__init__()
        self.last = nn.Conv2d(3, 4, 4, 4)
        self.cell = cell

    def forward(self, x):
        a = self.last(x).square().sum(1)
        z = a[:, self.cell[0], self.cell[1]]
        return torch.stack([0.1 * a.mean((1, 2)), 5 + 3 * z], 1)


@pytest.mark.parametrize(
    ("game", "start"), [("deletion", "circle"), ("deletion", "random"), ("preservation", "circle")]
)
def test_a_mask_on_a_layer_recovers_the_planted_cell(game, start, seeded, x):
    model = seeded(Planted, seed=5)
    classifier = Classifier(model, "last")
    S = layer_perturbation(
        classifier, x, torch.tensor([1, 1, 1]), game=game, start=start, score=logit, l1=0.02, tv=0.0, steps=60, lr=0.2
    )
    expected = torch.zeros(3, 1, 6, 8, dtype=torch.float64)
    expected[:, :, 2, 5] = 1
    torch.testing.assert_close(S, expected, rtol=0, atol=0.02)


class Twice(nn.Module):
    """A layer that runs twice, the second time on what the first gave."""

    def __init__(self):
        super().__init__()
        self.last, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.last(self.last(x).tanh()).square().mean((2, 3)))


def test_of_a_layer_that_runs_twice_the_last_output_is_masked(seeded, x):
    model = seeded(Twice, seed=2)
    classifier, x = Classifier(model, "last"), x[:, :, :6, :8]
    y = torch.tensor([1, 0, 3])
    S = layer_perturbation(classifier, x, y, start="half", steps=4, l1=1e-2, tv=1e-2)
    for n in range(3):
        A = model.last(model.last(x[n : n + 1]).tanh())[0].detach()
        behind = lambda a: model.head(a.square().mean((1, 2)))  # noqa: E731
        expected = layer_by_hand(behind, A, y[n], torch.full((6, 8), 0.5, dtype=torch.float64))
        torch.testing.assert_close(S[n, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("game", ["deletion", "preservation"])
def test_the_circle_on_a_layer_is_that_of_the_image_scaled_to_the_grid(game, curved, x, y):
    S = layer_perturbation(curved, x, y, game=game, steps=1, lr=1e-7)
    A = curved.features(x)
    for n in range(3):

        def p(M, n=n):
            return curved.model.behind((M * A[n])[None]).softmax(1)[0, y[n]].item()

        r, hard = slow_circle(p, (12, 16), game)
        expected = smoothed(hard[r], 10.0 * math.hypot(12, 16) / math.hypot(224, 224))
        torch.testing.assert_close(S[n, 0], expected, rtol=0, atol=2e-7)


def test_several_classes_on_a_layer(curved, x, y):
    top = curved(x).argsort(dim=1, descending=True)[:, :2]
    settings = {"start": "half", "steps": 3, "l1": 1e-2, "tv": 1e-2}

    def both(logits, _):
        return logits.softmax(1).gather(1, top[: len(logits)]).sum(1)

    expected = layer_perturbation(curved, x, y, score=both, **settings)
    torch.testing.assert_close(layer_perturbation(curved, x, y, classes=2, **settings), expected)


def test_the_penalties_of_a_layer_are_the_papers_for_its_size(curved, x, y):
    usual = module.usual_penalties
    for layers in module.LAYERS.values():
        for side, l1, tv in layers.values():
            assert usual((side, side)) == (l1, tv)
    assert usual((112, 112)) == (5e-5, 1e-2)
    assert usual((28, 28)) == usual((56, 56)) == (1e-4, 1e-2)
    assert usual((80, 80)) == (5e-5, 1e-2)
    assert usual((14, 14)) == usual((16, 12)) == (5e-3, 1e-2)
    assert usual((7, 7)) == usual((1, 1)) == (1e-2, 1e-3)
    assert [len(layers) for layers in module.LAYERS.values()] == [5, 5]
    S = layer_perturbation(curved, x, y, start="half", steps=4)
    assert torch.equal(S, layer_perturbation(curved, x, y, start="half", steps=4, l1=5e-3, tv=1e-2))
    assert not torch.equal(S, layer_perturbation(curved, x, y, start="half", steps=4, l1=0.0))
    assert not torch.equal(S, layer_perturbation(curved, x, y, start="half", steps=4, tv=0.0))


def test_the_layers_of_the_paper_are_those_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    for name, layers in module.LAYERS.items():
        with torch.device("meta"):
            features = getattr(torchvision.models, name)(weights=None).features
            a = torch.zeros(1, 3, 224, 224)
            sides = {f"features.{n}": (a := layer(a)).shape[2] for n, layer in enumerate(features)}
        assert {layer: side for layer, (side, _, _) in layers.items()} == {layer: sides[layer] for layer in layers}


def test_a_layer_that_does_not_run_is_an_error(pooled, x, plain):
    pooled.model.idle = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="layer 'idle' did not run"):
        layer_perturbation(replace(pooled, layer="idle"), x)


def test_precision_and_channels(seeded, x):
    model = seeded(
        nn.Sequential, nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    classifier = Classifier(model.float(), "0", channels=1)
    for method in (meaningful_perturbation, layer_perturbation):
        assert method(classifier, x[:, :1].float(), steps=2).dtype == torch.float32
        assert method(classifier, x[:, :1], steps=2).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [meaningful_perturbation, layer_perturbation])
def test_masks_of_half_precision_images_are_in_single_precision(method, dtype, curved, x, y):
    half, classifier = x.to(dtype), replace(curved, model=curved.model.float())
    torch.testing.assert_close(method(classifier, half, y, steps=5), method(classifier, half.float(), y, steps=5))
