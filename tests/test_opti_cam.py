"""Opti-CAM: one image at a time, with Adam written out, against the batch; and what the paper says must hold."""

import importlib
import inspect
import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.classifier import log_probability, logit, probability, wrap
from sightline.erase import color
from sightline.maps import resize, unit
from sightline.methods import opti_cam

module = importlib.import_module("sightline.methods._opti_cam")

NORMALIZED = {
    "range": lambda a: (a - a.min()) / (a.max() - a.min()),
    "detached range": lambda a: (a - a.min().detach()) / (a.max() - a.min()).detach(),
    "max": lambda a: a / a.max(),
    "sigmoid": lambda a: 1 / (1 + torch.exp(-a)),
}

SELECTED = {
    logit: lambda z, c: z[c],
    probability: lambda z, c: torch.exp(z[c]) / torch.exp(z).sum(),
    log_probability: lambda z, c: z[c] - torch.log(torch.exp(z).sum()),
}


@dataclass
class Climb:
    """What happened to one image: the map of every step, its objective, and the gradient that followed."""

    maps: list[Tensor] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


def one_step(classifier, image, c, A, u, objective, normalization, score, filling):
    """Return map and objective of one u."""
    weights = torch.exp(u) / torch.exp(u).sum()
    s = sum(weights[k] * A[k] for k in range(len(u)))
    m = NORMALIZED[normalization](F.interpolate(s[None, None], image.shape[1:], mode="bilinear", align_corners=False))

    def g(mask):
        masked = mask * image + (1 - mask) * filling
        return SELECTED[score](classifier.model(classifier.normalize(masked))[0], c)

    p, o, q = g(torch.ones_like(m)).detach(), g(m), g(1 - m)
    return s, {"mask": o, "diff": -(p - o).abs(), "io_mask": o - q, "io_diff": -(p - o).abs() + (p - q).abs()}[
        objective
    ]


def by_hand(
    classifier,
    image,
    c,
    *,
    steps=5,
    lr=0.1,
    objective="mask",
    normalization="range",
    score=logit,
    filling=0.0,
    u=None,
    tolerance=1e-10,
):
    """Climb with Adam (beta .9 and .999, epsilon 1e-8), for one image."""
    A = classifier.features(image[None])[0]
    u = torch.full((len(A),), 0.5, dtype=torch.float64) if u is None else u.clone()
    first, second, climb = torch.zeros_like(u), torch.zeros_like(u), Climb()
    for t in range(1, steps + 2):
        leaf = u.clone().requires_grad_()
        s, value = one_step(classifier, image, c, A, leaf, objective, normalization, score, filling)
        (g,) = torch.autograd.grad(value, leaf)
        climb.maps.append(s.detach())
        climb.values.append(value.item())
        climb.gradients.append(g)
        if t > 1 and abs(climb.values[-1] - climb.values[-2]) < tolerance:
            break
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        u = u + lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return climb


def assert_same(saliency, climbs, atol=1e-9):
    expected = torch.stack([climb.maps[-1] for climb in climbs])[:, None]
    torch.testing.assert_close(saliency, expected, rtol=0, atol=atol)
    assert all((climb.maps[-1] - climb.maps[0]).abs().max() > 1e-4 for climb in climbs)


@pytest.fixture
def y():
    return torch.tensor([3, 0, 4])


def watch(classifier):
    """Note the logits of every forward pass."""
    passes = []
    classifier.model.register_forward_hook(lambda _, __, output: passes.append(output.detach()))
    return passes


@pytest.mark.parametrize("objective", ["mask", "diff", "io_mask", "io_diff"])
@pytest.mark.parametrize("normalization", ["range", "max", "sigmoid"])
def test_objectives_and_normalizations(objective, normalization, curved, x, y):
    settings = {"objective": objective, "normalization": normalization, "steps": 4}
    climbs = [by_hand(curved, x[n], int(y[n]), **settings) for n in range(3)]
    assert_same(opti_cam(curved, x, y, **settings), climbs)


def test_the_normalizations_of_maps_of_either_sign():
    maps = torch.tensor([[[[-4.0, -2.0, -1.0]]], [[[-1.0, 1.0, 2.0]]], [[[0.0, 0.0, 0.0]]]], dtype=torch.float64)
    n = module.NORMALIZATIONS
    assert n["range"](maps).flatten(1).tolist() == [[0, 2 / 3, 1], [0, 2 / 3, 1], [0, 0, 0]]
    assert n["max"](maps).flatten(1).tolist() == [[4, 2, 1], [-0.5, 0.5, 1], [0, 0, 0]]
    assert n["sigmoid"](maps)[1].flatten().tolist() == pytest.approx([1 / (1 + math.exp(-a)) for a in (-1, 1, 2)])


@pytest.mark.parametrize("score", [logit, probability, log_probability])
def test_selectors(score, pooled, x, y):
    climbs = [by_hand(pooled, x[n], int(y[n]), score=score, steps=8) for n in range(3)]
    assert_same(opti_cam(pooled, x, y, score=score, steps=8), climbs)


def test_the_selectors_and_choices_change_the_map(curved, x, y):
    maps = [opti_cam(curved, x, y, steps=4)]
    changes = (
        {"score": probability},
        {"objective": "diff"},
        {"objective": "io_mask"},
        {"objective": "io_diff"},
        {"normalization": "max"},
        {"normalization": "sigmoid"},
        {"erase": "mean"},
        {"start": "grad_cam"},
        {"lr": 0.2},
        {"steps": 5},
    )
    maps += [opti_cam(curved, x, y, **{"steps": 4, **change}) for change in changes]
    for one in range(len(maps)):
        for other in range(one):
            assert (maps[one] - maps[other]).abs().max() > 1e-6, (one, other)


def test_the_paper_s_defaults():
    parameters = list(inspect.signature(opti_cam).parameters.values())[3:]
    assert {parameter.name: parameter.default for parameter in parameters} == {
        "score": logit,
        "objective": "mask",
        "normalization": "range",
        "steps": 100,
        "lr": 0.1,
        "tolerance": 1e-10,
        "start": "constant",
        "keep_best": False,
        "erase": "black",
    }


@pytest.mark.parametrize("layer", ["stem", "stem.1", "last"])
def test_any_layer(layer, pooled, x, y):
    chosen = pooled.at(layer)
    climbs = [by_hand(chosen, x[n], int(y[n]), steps=4) for n in range(3)]
    assert_same(opti_cam(chosen, x, y, steps=4), climbs)


def test_tokens_with_negative_features(tokens, x, y):
    A = tokens.features(x)
    assert (A < 0).any()
    saliency = opti_cam(tokens, x, y, steps=6)
    assert saliency.shape == (3, 1, 3, 4)
    assert_same(saliency, [by_hand(tokens, x[n], int(y[n]), steps=6) for n in range(3)])
    mask = unit(resize(saliency, (24, 32)))
    assert mask.amin((1, 2, 3)).tolist() == [0, 0, 0]
    assert mask.amax((1, 2, 3)).tolist() == [1, 1, 1]
    clipped = replace(tokens, to_grid=lambda output, x: tokens.to_grid(output, x).relu())
    assert (opti_cam(clipped, x, y, steps=6) - saliency).abs().max() > 1e-3


@pytest.mark.parametrize("constant", [0.0, -3.0, 40.0])
def test_any_constant_start_is_the_same(constant, curved, x, y, monkeypatch):
    expected = opti_cam(curved, x, y, steps=8)
    monkeypatch.setattr(module, "START", constant)
    torch.testing.assert_close(opti_cam(curved, x, y, steps=8), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("normalization", ["range", "max"])
def test_rescaled_features_give_the_rescaled_map(normalization, curved, x, y):
    expected = opti_cam(curved, x, y, steps=8, normalization=normalization)
    larger = replace(curved, to_grid=lambda output, x: 37 * output)
    saliency = opti_cam(larger, x, y, steps=8, normalization=normalization)
    torch.testing.assert_close(saliency / 37, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(unit(saliency), unit(expected), rtol=0, atol=1e-7)


def test_the_sigmoid_knows_no_scale(curved, x, y):
    larger = replace(curved, to_grid=lambda output, x: 37 * output)
    one, other = (opti_cam(network, x, y, steps=8, normalization="sigmoid") for network in (curved, larger))
    assert (unit(one) - unit(other)).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [{}, {"start": "grad_cam"}, {"objective": "io_diff"}])
def test_one_channel_leaves_no_choice(settings, seeded, networks, x, y):
    classifier = wrap(seeded(networks.curved, features=1, seed=2), layer="last", normalization="none", size=(24, 32))
    A = classifier.features(x)
    for steps in (1, 7):
        assert torch.equal(opti_cam(classifier, x, y, steps=steps, **settings), A)
    assert unit(resize(A, (24, 32))).amax() == 1


@pytest.mark.parametrize("network", ["pooled", "curved", "tokens"])
def test_the_objective_rises(network, request, x, y):
    classifier = request.getfixturevalue(network)
    passes = watch(classifier)
    opti_cam(classifier, x, y, steps=60)
    values = torch.stack([logits[range(3), y] for logits in passes[1:]])
    assert len(values) == 60
    assert (values[-1] > values[0]).all()
    changes = values.diff(dim=0)
    assert (changes.mean(0) > 0).all()
    assert (changes > 0).double().mean() > 0.6


def test_features_are_computed_once_and_each_step_is_one_pass(pooled, x, y):
    passes = watch(pooled)
    opti_cam(pooled, x, y, steps=5)
    assert [len(logits) for logits in passes] == [3] * 6
    passes.clear()
    opti_cam(pooled, x, y, steps=5, objective="io_mask")
    assert [len(logits) for logits in passes] == [3] * 11


def test_images_that_have_converged_leave_the_batch(curved, x, y):
    climbs = [by_hand(curved, x[n], int(y[n]), steps=99, tolerance=1e-3) for n in range(3)]
    lengths = [len(climb.values) for climb in climbs]
    assert len(set(lengths)) == 3
    assert max(lengths) < 100
    passes = watch(curved)
    saliency = opti_cam(curved, x, y, tolerance=1e-3)
    sizes = [len(logits) for logits in passes[1:]]
    assert sizes == [sum(length > t for length in lengths) for t in range(max(lengths))]
    assert_same(saliency, climbs, atol=1e-8)
    for n in range(3):
        alone = opti_cam(curved, x[n : n + 1], y[n : n + 1], tolerance=1e-3)
        torch.testing.assert_close(alone, saliency[n : n + 1], rtol=0, atol=1e-8)


def test_the_tolerance_is_exact(curved, x, y):
    """An image leaves at the first step whose change is below the tolerance, with the u that it had."""
    values = by_hand(curved, x[0], 3, steps=40, tolerance=0.0).values
    changes = [abs(now - before) for before, now in pairwise(values)]
    stop = next(t for t in range(5, 40) if changes[t] < min(changes[:t]))

    def steps(tolerance):
        passes = watch(curved)
        opti_cam(curved, x[:1], y[:1], steps=40, tolerance=tolerance)
        return len(passes) - 1

    assert steps(changes[stop] * 1.0001) == stop + 2
    assert steps(changes[stop] * 0.9999) > stop + 2


def test_without_a_tolerance_every_step_is_taken(pooled, x, y):
    """Where nothing changes, any tolerance above zero stops at the second step."""
    pooled.model.head.weight.data.zero_()
    for tolerance, steps in ((0.0, 7), (1e-10, 2)):
        passes = watch(pooled)
        opti_cam(pooled, x, y, steps=7, tolerance=tolerance)
        assert len(passes) == 1 + steps


def test_keep_best_returns_the_best_u_seen(curved, x, y):
    settings = {"lr": 3.0, "steps": 12}
    climbs = [by_hand(curved, x[n], int(y[n]), tolerance=0.0, **settings) for n in range(3)]
    best = [max(range(12), key=climb.values.__getitem__) for climb in climbs]
    assert any(0 < step < 11 for step in best)
    saliency = opti_cam(curved, x, y, keep_best=True, **settings)
    expected = torch.stack([climb.maps[step] for climb, step in zip(climbs, best, strict=True)])[:, None]
    torch.testing.assert_close(saliency, expected, rtol=0, atol=1e-8)
    assert (opti_cam(curved, x, y, **settings) - saliency).abs().max() > 1e-3


def test_a_start_at_grad_cam_s_weights(curved, x, y):
    _, G = curved.features_and_gradient(x, y)
    w = G.mean((2, 3))
    starts = [row / (row - row.mean()).square().mean().sqrt() for row in w]
    climbs = [by_hand(curved, x[n], int(y[n]), steps=5, u=starts[n]) for n in range(3)]
    assert_same(opti_cam(curved, x, y, steps=5, start="grad_cam"), climbs)
    resting = opti_cam(curved, x, y, steps=1, lr=1e-12, start="grad_cam")
    first = torch.einsum("bk,bkij->bij", torch.stack(starts).softmax(1), curved.features(x))[:, None]
    torch.testing.assert_close(resting, first, rtol=0, atol=1e-9)


def test_what_hides_is_black_unless_said(curved, x, y):
    black = opti_cam(curved, x, y, steps=4)
    assert torch.equal(opti_cam(curved, x, y, steps=4, erase="black"), black)
    filling = torch.tensor(curved.mean, dtype=torch.float64).view(3, 1, 1)
    climbs = [by_hand(curved, x[n], int(y[n]), steps=4, filling=filling) for n in range(3)]
    mean = opti_cam(curved, x, y, steps=4, erase="mean")
    assert_same(mean, climbs)
    assert torch.equal(opti_cam(curved, x, y, steps=4, erase=lambda x, m: color(x, m, mean=curved.mean)), mean)
    assert (mean - black).abs().max() > 1e-4


def test_the_gradient_flows_through_minimum_and_maximum(curved, x, y):
    climb = by_hand(curved, x[0], 3, steps=3)
    A, u = curved.features(x[:1])[0], torch.full((6,), 0.5, dtype=torch.float64)
    for k in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[k] = 1e-6
        ahead, behind = (
            one_step(curved, x[0], 3, A, u + sign * step, "mask", "range", logit, 0.0)[1].item() for sign in (1, -1)
        )
        assert climb.gradients[0][k].item() == pytest.approx((ahead - behind) / 2e-6, rel=1e-4, abs=1e-8)
    detached = by_hand(curved, x[0], 3, steps=3, normalization="detached range")
    saliency = opti_cam(curved, x[:1], y[:1], steps=3)[0, 0]
    assert (saliency - climb.maps[-1]).abs().max() < 1e-9
    assert (saliency - detached.maps[-1]).abs().max() > 1e-4


def test_a_constant_map_is_finite(curved, x, y):
    """n(constant) = 0, so the mask is black and no gradient comes back: the weights stay equal."""
    flat = replace(curved, to_grid=lambda output, x: torch.ones_like(output))
    ones = torch.ones(3, 1, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(opti_cam(flat, x, y, steps=3), ones, rtol=0, atol=1e-15)
    zero = replace(curved, to_grid=lambda output, x: torch.zeros_like(output))
    for normalization in ("range", "max", "sigmoid"):
        assert not opti_cam(zero, x, y, steps=3, normalization=normalization).any()


def test_features_that_cancel_out_at_the_start_are_an_error(seeded, networks, x, y):
    """An untrained layer norm: with equal weights its channels sum to zero, and n would blow rounding up to a mask."""
    classifier = wrap(seeded(networks.tokens, trained=False), layer="norm1", normalization="none", size=(24, 32))
    assert classifier.features(x).mean(1).abs().max() < 1e-12
    with pytest.raises(ValueError, match=r"the channels of layer 'norm1' cancel out at the start .*start='grad_cam'"):
        opti_cam(classifier, x, y)
    starts = classifier.features_and_gradient(x, y)[1].mean((2, 3))
    starts = starts / starts.std(1, correction=0, keepdim=True)
    climbs = [by_hand(classifier, x[n], int(y[n]), steps=4, u=starts[n]) for n in range(3)]
    assert_same(opti_cam(classifier, x, y, steps=4, start="grad_cam"), climbs)


@pytest.mark.parametrize("start", ["constant", "grad_cam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_half_precision(dtype, start, curved, x, y):
    expected = opti_cam(curved, x, y, steps=3, start=start)
    half = replace(curved, model=curved.model.to(dtype))
    found = opti_cam(half, x.to(dtype), y, steps=3, start=start)
    torch.testing.assert_close(found, expected.float(), rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, ValueError, r"expected steps >= 1 and lr > 0, got steps=0, lr=0\.1"),
        ({"lr": 0.0}, ValueError, r"expected steps >= 1 and lr > 0, got steps=100, lr=0\.0"),
        ({"objective": "maks"}, LookupError, "no objective called 'maks'; did you mean mask"),
        ({"normalization": "min"}, LookupError, "no normalization called 'min'; known: max, range, sigmoid"),
        ({"start": "gradcam"}, LookupError, "no start called 'gradcam'; did you mean grad_cam"),
        ({"erase": "blakc"}, LookupError, "no eraser called 'blakc'; did you mean black"),
    ],
)
def test_wrong_settings_are_errors(settings, error, message, curved, x, y, plain):
    with pytest.raises(error, match=message):
        opti_cam(curved, x, y, **settings)
