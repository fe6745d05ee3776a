"""SmoothGrad, VarGrad and SmoothGrad-Squared: slow copies one by one, the peer library on the same noise, errors."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from sightline.classifier import log_probability, probability, wrap
from sightline.methods import gradient, smooth_grad, smooth_grad_squared, var_grad
from sightline.methods._smooth import smooth
from sightline.runs import arguments

THREE = [smooth_grad, var_grad, smooth_grad_squared]


@pytest.fixture
def y():
    return torch.tensor([3, 0, 4])


def draws(samples, shape=(3, 24, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).double() for _ in range(samples)]


def slow_maps(classifier, x, y, sigmas, noise):
    """Return the maps of noisy copies, image by image, copy by copy, from the network alone."""
    mean = torch.tensor(classifier.mean, dtype=x.dtype).view(1, -1, 1, 1)
    std = torch.tensor(classifier.std, dtype=x.dtype).view(1, -1, 1, 1)
    every = []
    for image, label, sigma in zip(x, y.tolist(), sigmas, strict=True):
        maps = []
        for e in noise:
            leaf = (image + sigma * e)[None].requires_grad_()
            classifier.model((leaf - mean) / std)[0, label].backward()
            maps.append(leaf.grad[0].abs().max(0).values)
        every.append(torch.stack(maps))
    return torch.stack(every)


def test_the_three_moments_of_the_maps_of_noisy_copies(pooled, x, y):
    maps = slow_maps(pooled, x, y, [0.2] * 3, draws(5, seed=4))
    settings = {"samples": 5, "noise": 0.2, "seed": 4}
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    close(smooth_grad(pooled, x, y, **settings)[:, 0], sum(maps.unbind(1)) / 5)
    close(smooth_grad_squared(pooled, x, y, **settings)[:, 0], (maps**2).sum(1) / 5)
    close(var_grad(pooled, x, y, **settings)[:, 0], ((maps - maps.mean(1, keepdim=True)) ** 2).sum(1) / 5)


def test_the_noise_is_15_percent_of_the_range_of_all_inputs_and_there_are_50_copies(pooled, x, y):
    maps = slow_maps(pooled, x[:1] / 3, y[:1], [0.15], draws(50))
    torch.testing.assert_close(smooth_grad(pooled, x[:1] / 3, y[:1])[:, 0], maps.mean(1), rtol=1e-9, atol=1e-12)


def test_the_noise_may_be_relative_to_each_images_own_range(pooled, x, y):
    x = x * torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64).view(-1, 1, 1, 1)
    sigmas = [0.3 * float(image.max() - image.min()) for image in x]
    maps = slow_maps(pooled, x, y, sigmas, draws(4))
    found = smooth_grad(pooled, x, y, samples=4, noise=0.3, relative_to="image")
    torch.testing.assert_close(found[:, 0], maps.mean(1), rtol=1e-9, atol=1e-12)


def test_as_in_the_code_of_calm_the_noise_may_be_added_to_the_normalized_image(pooled, x, y):
    """Sigma = (max - min) / 4 of the normalized image, and 50 maps there; the colors' deviations differ."""
    expected, variances = [], []
    mean, std = (torch.tensor(v, dtype=x.dtype).view(3, 1, 1) for v in (pooled.mean, pooled.std))
    for image, label in zip(x, y.tolist(), strict=True):
        normalized = (image - mean) / std
        sigma = float(normalized.max() - normalized.min()) / 4
        maps = []
        for e in draws(50):
            leaf = image.clone().requires_grad_()
            pooled.model(((leaf - mean) / std + sigma * e)[None])[0, label].backward()
            maps.append(leaf.grad.abs().max(0).values)
        expected.append(torch.stack(maps).mean(0))
        variances.append(torch.stack(maps).var(0, correction=0))
    settings = {"noise": 0.25, "relative_to": "normalized"}
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    close(smooth_grad(pooled, x, y, **settings)[:, 0], torch.stack(expected))
    close(var_grad(pooled, x, y, **settings)[:, 0], torch.stack(variances))


def test_without_noise_the_map_is_the_gradients(pooled, curved, x, y):
    for classifier in (pooled, curved):
        expected = gradient(classifier, x, y)
        assert torch.equal(smooth_grad(classifier, x, y, samples=3, noise=0.0), expected)
        assert torch.equal(smooth_grad_squared(classifier, x, y, samples=3, noise=0.0), expected**2)
        assert not var_grad(classifier, x, y, samples=3, noise=0.0).any()


def test_mean_square_is_variance_plus_squared_mean(curved, x, y):
    mean, variance, square = (
        method(curved, x, y, samples=6) for method in (smooth_grad, var_grad, smooth_grad_squared)
    )
    torch.testing.assert_close(square, variance + mean**2, rtol=1e-9, atol=1e-12)


def test_a_variance_is_never_negative_in_single_precision(pooled, x, y):
    pooled.model.float()
    for noise in (0.0, 1e-7, 1e-4):
        assert (var_grad(pooled, x.float(), y, samples=9, noise=noise) >= 0).all()


@pytest.mark.parametrize("method", THREE)
def test_the_score_is_the_one_that_is_asked_for(method, curved, x, y):
    for score in (probability, log_probability):
        name = {smooth_grad: "mean", var_grad: "variance", smooth_grad_squared: "square"}[method]
        expected = smooth(partial(gradient, score=score), samples=3, moment=name)(curved, x, y)
        found = method(curved, x, y, samples=3, score=score)
        assert torch.equal(found, expected)
        assert not torch.allclose(found, method(curved, x, y, samples=3))


@pytest.mark.parametrize("method", THREE)
def test_every_setting_counts_but_the_chunk(method, curved, x, y):
    usual = method(curved, x, y, samples=5)
    for chunk in (1, 4, 7, 1000):
        torch.testing.assert_close(method(curved, x, y, samples=5, chunk=chunk), usual, rtol=1e-12, atol=1e-12)
    for other in ({"samples": 4}, {"noise": 0.2}, {"seed": 1}, {"relative_to": "normalized"}):
        assert not torch.allclose(method(curved, x, y, **{"samples": 5, **other}), usual)


def test_the_first_noise_of_many_samples_is_that_of_few(curved, x, y):
    """Curves over the number of samples extend each other."""
    one, two = (smooth_grad(curved, x, y, samples=n) for n in (1, 2))
    second = slow_maps(curved, x, y, [0.15] * 3, draws(2)[1:])
    torch.testing.assert_close(two[:, 0], (one[:, 0] + second[:, 0]) / 2, rtol=1e-9, atol=1e-12)


class Gray(nn.Module):
    """One color: the largest derivative over the colors is the derivative, as captum has it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.Softplus(), nn.Conv2d(4, 4, 3, 2, 1), nn.Softplus())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x).square().mean((2, 3)))


@pytest.mark.parametrize(
    ("method", "kind"), [(smooth_grad, "smoothgrad"), (var_grad, "vargrad"), (smooth_grad_squared, "smoothgrad_sq")]
)
def test_captum_agrees_on_the_same_noise(method, kind, seeded, monkeypatch):
    attr = pytest.importorskip("captum.attr")
    classifier = wrap(seeded(Gray, seed=2), layer="body", normalization="none", size=(12, 16))
    x = torch.rand(2, 1, 12, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([2, 0])
    same = torch.stack(draws(6, (1, 12, 16))).repeat(2, 1, 1, 1)  # image by image, as captum lays its copies out
    monkeypatch.setattr(torch, "normal", lambda mean, std: same * std)
    tunnel = attr.NoiseTunnel(attr.Saliency(classifier.model))
    theirs = tunnel.attribute(x, nt_type=kind, nt_samples=6, stdevs=0.2, target=y, abs=True)
    ours = method(classifier, x, y, samples=6, noise=0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


def test_the_classifier_is_asked_once_a_copy_and_once_for_the_class(pooled, x, y):
    passes = []
    pooled.model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    smooth_grad(pooled, x, y, samples=4, chunk=6)
    assert passes == [3, 6, 6]
    passes.clear()
    smooth_grad(pooled, x, y)
    assert sum(passes) == 51 * 3


@pytest.mark.parametrize("method", THREE)
def test_wrong_settings_are_errors(method, pooled, x, y, plain):
    for settings, error, message in (
        ({"samples": 0}, ValueError, "expected samples >= 1 and chunk >= 1, got samples=0, chunk=16"),
        ({"chunk": 0}, ValueError, "got samples=50, chunk=0"),
        ({"noise": -0.1}, ValueError, "expected noise >= 0, a standard deviation, got -0.1"),
        ({"noise": math.nan}, ValueError, "expected noise >= 0"),
        ({"relative_to": "images"}, LookupError, "no range called 'images'; did you mean image"),
    ):
        with pytest.raises(error, match=message):
            method(pooled, x, y, **settings)


def test_a_record_is_complete():
    assert arguments(smooth_grad) == {
        "samples": 50,
        "noise": 0.15,
        "seed": 0,
        "score": "logit",
        "relative_to": "input",
        "chunk": 16,
    }
