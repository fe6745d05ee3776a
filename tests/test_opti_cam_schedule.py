"""Opti-CAM's falling rate: Adam with short memory, written out for one image at a time."""

import importlib
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from sightline.methods import opti_cam
from sightline.settings import bind

module = importlib.import_module("sightline.methods._opti_cam")


def by_hand(classifier, image, c, *, steps, u=None):
    """Climb with Adam: beta .3 and .5, epsilon 1e-8, .35 for half of the steps, then linearly to zero."""
    A = classifier.features(image[None])[0]
    u = torch.full((len(A),), 0.5, dtype=torch.float64) if u is None else u.clone()
    first, second = torch.zeros_like(u), torch.zeros_like(u)
    for t in range(steps):
        leaf = u.clone().requires_grad_()
        w = torch.exp(leaf) / torch.exp(leaf).sum()
        s = sum(w[k] * A[k] for k in range(len(u)))
        m = F.interpolate(s[None, None], image.shape[1:], mode="bilinear", align_corners=False)
        m = (m - m.min()) / (m.max() - m.min())
        (g,) = torch.autograd.grad(classifier.model(classifier.normalize(m * image))[0, c], leaf)
        rate = 0.35 if 2 * t <= steps else 0.35 * float(Fraction(2 * (steps - t), steps))
        first, second = 0.3 * first + 0.7 * g, 0.5 * second + 0.5 * g**2
        u = u + rate * (first / (1 - 0.3 ** (t + 1))) / ((second / (1 - 0.5 ** (t + 1))).sqrt() + 1e-8)
    w = torch.exp(u) / torch.exp(u).sum()
    return sum(w[k] * A[k] for k in range(len(u)))


@pytest.fixture
def y():
    return torch.tensor([3, 0, 4])


@pytest.mark.parametrize("steps", [1, 2, 7, 8])
def test_the_falling_rate_is_adam_with_short_memory(steps, curved, x, y):
    expected = torch.stack([by_hand(curved, x[n], int(y[n]), steps=steps) for n in range(3)])[:, None]
    found = opti_cam(curved, x, y, steps=steps, lr="falling")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (found - opti_cam(curved, x, y, steps=steps, lr=0.35)).abs().max() > (1e-6 if steps > 1 else -1)


def test_the_falling_rate_from_grad_cam_s_weights(tokens, x, y):
    w = tokens.features_and_gradient(x, y)[1].mean((2, 3))
    starts = w / w.std(1, correction=0, keepdim=True)
    expected = torch.stack([by_hand(tokens, x[n], int(y[n]), steps=6, u=starts[n]) for n in range(3)])[:, None]
    found = opti_cam(tokens, x, y, steps=6, lr="falling", start="grad_cam")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_rates():
    rate, betas = module.RATES["falling"]
    assert betas == (0.3, 0.5)
    assert [rate(t / 4) for t in range(4)] == pytest.approx([0.35, 0.35, 0.35, 0.175])
    assert rate(0.75) == pytest.approx(0.175)
    assert rate(1.0) == 0


def test_a_map_does_not_depend_on_its_batch(curved, x, y):
    together = opti_cam(curved, x, y, steps=8, lr="falling")
    for n in range(3):
        alone = opti_cam(curved, x[n : n + 1], y[n : n + 1], steps=8, lr="falling")
        torch.testing.assert_close(alone, together[n : n + 1], rtol=0, atol=1e-9)


def test_rescaled_features_give_the_rescaled_map(curved, x, y):
    larger = replace(curved, to_grid=lambda output, x: 37 * output)
    expected = opti_cam(curved, x, y, steps=8, lr="falling")
    torch.testing.assert_close(opti_cam(larger, x, y, steps=8, lr="falling") / 37, expected, rtol=0, atol=1e-8)


def test_it_comes_by_its_name_and_an_unknown_one_is_an_error(curved, x, y, plain):
    named = bind(opti_cam, {"lr": "falling", "steps": 2})
    assert torch.equal(named(curved, x, y), opti_cam(curved, x, y, steps=2, lr="falling"))
    with pytest.raises(LookupError, match="no lr called 'faling'; did you mean falling"):
        opti_cam(curved, x, y, lr="faling")
    with pytest.raises(ValueError, match=r"expected steps >= 1 and lr > 0, got steps=0, lr=falling"):
        opti_cam(curved, x, y, steps=0, lr="falling")
