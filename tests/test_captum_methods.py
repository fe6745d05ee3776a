"""LIME and GradientSHAP: planted answers, the methods by hand with the same draws, and no trace in random states."""

import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sightline.classifier import Classifier, logit, probability
from sightline.methods import _lime, gradient_shap, lime
from sightline.methods._gradient_shap import baselines

pytest.importorskip("captum", reason="captum is not installed")

METHODS = [(lime, {"samples": 20}), (gradient_shap, {"samples": 3})]
every_method = pytest.mark.parametrize(("method", "settings"), METHODS, ids=["lime", "gradient_shap"])


class Linear(nn.Module):
    """Logit 0 is a weighted sum of the pixels plus a constant."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        z = (x * self.weight).sum((1, 2, 3)) + 2
        return torch.stack([z, -z], 1)


@pytest.fixture
def tiles():
    """An image of 3 x 4 tiles of 8 pixels, each of one color far from its neighbors', and the tile of every pixel."""
    colors = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.2, 0.2, 0.95], [0.9, 0.9, 0.2]], dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(24) // 8, torch.arange(32) // 8, indexing="ij")
    return colors[(columns + 2 * rows) % 4].permute(2, 0, 1)[None].contiguous(), rows * 4 + columns


@pytest.fixture
def tiled(monkeypatch, tiles):
    """Superpixels that are the tiles."""
    monkeypatch.setattr(_lime, "superpixels", lambda *_: tiles[1])


def planted(tiles):
    """A linear network of which tile t contributes t - 4."""
    x, numbers = tiles
    weight = torch.zeros(3, 24, 32, dtype=torch.float64)
    for tile in range(12):
        inside = numbers == tile
        weight[:, inside] = (tile - 4) / x[0][:, inside].sum()
    return Classifier(Linear(weight), "")


def test_lime_recovers_what_each_superpixel_contributes(tiles, tiled):
    S = lime(planted(tiles), tiles[0], torch.tensor([0]), score=logit, alpha=1e-6, samples=200)
    torch.testing.assert_close(S[0, 0], (tiles[1] - 4).double(), rtol=0, atol=1e-3)
    S = lime(planted(tiles), tiles[0], torch.tensor([1]), score=logit, alpha=1e-6, samples=200)
    torch.testing.assert_close(S[0, 0], (4 - tiles[1]).double(), rtol=0, atol=1e-3)


def test_lime_finds_the_planted_superpixel_with_its_defaults(tiles):
    x, numbers = tiles
    weight = torch.zeros(3, 24, 32, dtype=torch.float64)
    weight[:, numbers == 6] = 0.05
    S = lime(Classifier(Linear(weight), ""), x, torch.tensor([0]), score=logit)
    found = S[0, 0] > 0.5 * S.max()
    assert (found & (numbers == 6)).sum() / (found | (numbers == 6)).sum() > 0.7


def lime_by_hand(classifier, x, label, score, *, samples, seed, width, alpha, filling, segments):
    count = int(segments.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    Z = torch.cat([torch.randint(2, (1, count), generator=generator) for _ in range(samples)]).double()
    f, pi = [], []
    for z in Z:
        shown = z[segments]
        f.append(score(classifier((shown * x + (1 - shown) * filling)[None]), label[None]).item())
        cosine = z.sum() / (z.norm() * np.sqrt(count)) if z.any() else torch.zeros(())
        pi.append(np.sqrt(np.exp(-((1 - float(cosine)) ** 2) / width**2)))
    f, root = np.array(f), np.sqrt(np.array(pi))[:, None]
    design = np.concatenate([Z.numpy(), np.ones((samples, 1))], 1) * root
    ridge = np.concatenate([np.sqrt(alpha) * np.eye(count), np.zeros((count, 1))], 1)
    both = np.concatenate([design, ridge]), np.concatenate([f * root[:, 0], np.zeros(count)])
    w = np.linalg.lstsq(*both, rcond=None)[0][:-1]
    return torch.from_numpy(w)[segments]


@pytest.mark.parametrize(("score", "erase", "width"), [(probability, "black", 0.25), (logit, "mean", 0.4)])
def test_lime_is_the_ridge_regression_of_its_definition(curved, x, score, erase, width):
    y = torch.tensor([3, 0, 4])
    settings = {"samples": 60, "seed": 2, "width": width, "alpha": 0.3}
    S = lime(curved, x, y, score=score, erase=erase, chunk=7, **settings)
    filling = torch.zeros(3, 1, 1) if erase == "black" else torch.tensor(curved.mean).view(3, 1, 1)
    for i in range(3):
        segments = _lime.superpixels(x[i], 4.0, 200.0, 0.2)
        expected = lime_by_hand(curved, x[i], y[i], score, filling=filling.double(), segments=segments, **settings)
        torch.testing.assert_close(S[i, 0], expected, rtol=1e-4, atol=1e-5)


def test_lime_agrees_with_the_ridge_of_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(2, (40, 6), generator=generator).double()
    f, pi = torch.rand(2, 40, generator=generator, dtype=torch.float64)
    theirs = linear.Ridge(alpha=0.7).fit(z.numpy(), f.numpy(), sample_weight=pi.numpy()).coef_
    torch.testing.assert_close(_lime.ridge(z, f, pi, 0.7), torch.from_numpy(theirs))


def test_superpixels_are_many_at_every_size_and_gray_images_have_them_too(x):
    big = torch.nn.functional.interpolate(x[:1], (96, 128), mode="bicubic")[0].clamp(0, 1)
    for image in (x[0], big, x[0, :1]):
        found = _lime.superpixels(image, 4.0, 200.0, 0.2)
        assert found.shape == image.shape[1:]
        assert 8 < len(found.unique()) == int(found.max()) + 1 < 120
    assert torch.equal(
        _lime.superpixels(x[0, :1], 4.0, 200.0, 0.2), _lime.superpixels(x[0, :1].expand(3, -1, -1), 4.0, 200.0, 0.2)
    )


def test_superpixels_are_those_of_scikit_image_with_lengths_that_scale(x):
    segmentation = pytest.importorskip("skimage.segmentation")
    image = torch.nn.functional.interpolate(x[:1], (80, 100), mode="bicubic")[0].clamp(0, 1)
    pixel = (80 * 100) ** 0.5 / 224
    settings = {"kernel_size": 4 * pixel, "max_dist": 30 * pixel, "ratio": 0.4, "rng": 0}
    theirs = segmentation.quickshift(image.permute(1, 2, 0).numpy(), **settings)
    assert np.array_equal(_lime.superpixels(image, 4.0, 30.0, 0.4).numpy(), theirs)


def test_lime_evaluates_a_chunk_at_a_time(curved, x):
    y, sizes = torch.tensor([3, 0, 4]), []
    expected = lime(curved, x, y, samples=20)
    curved.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    torch.testing.assert_close(lime(curved, x, y, samples=20, chunk=8), expected, rtol=0, atol=1e-6)
    assert sizes == [3] + 3 * [8, 8, 4]


def test_a_single_superpixel_gives_a_constant_map(curved, x, monkeypatch):
    monkeypatch.setattr(_lime, "superpixels", lambda image, *_: torch.zeros(image.shape[1:], dtype=torch.long))
    S = lime(curved, x, samples=20)
    assert all(len(one.unique()) == 1 for one in S)
    assert (S != 0).all()


def test_gradient_shap_shares_out_the_score_of_a_linear_network(x):
    weight = torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    classifier = Classifier(Linear(weight), "")
    S = gradient_shap(classifier, x, torch.tensor([0, 0, 1]), baseline_noise=0.0)
    rise = classifier(x)[range(3), [0, 0, 1]] - classifier(torch.zeros_like(x))[range(3), [0, 0, 1]]
    torch.testing.assert_close(S.sum((1, 2, 3)), rise.detach())
    torch.testing.assert_close(S[:, 0], (x * weight).sum(1) * torch.tensor([1.0, 1, -1]).view(3, 1, 1))
    noisy = gradient_shap(classifier, x, torch.tensor([0, 0, 1]), samples=400, seed=1)
    spread = 0.15 * float(weight.norm()) / 400**0.5
    assert float((noisy.sum((1, 2, 3)) - rise).abs().max()) < 4 * spread


def test_gradient_shap_shares_out_the_score_on_average(curved, x):
    y = torch.tensor([3, 0, 4])
    S = gradient_shap(curved, x, y, samples=1500, baseline_noise=0.0)
    rise = (curved(x) - curved(torch.zeros_like(x)))[range(3), y].detach()
    torch.testing.assert_close(S.sum((1, 2, 3)), rise, rtol=0.05, atol=0.02)


def shap_by_hand(classifier, x, label, *, samples, baseline_noise, noise, seed, filling):
    """With captum's own order of draws: noise, then baselines, then coefficients."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    noisy = x.expand(samples, -1, -1, -1) + torch.normal(0, torch.full((samples, *x.shape), noise))
    generator = torch.Generator().manual_seed(seed)
    noises = torch.randn(samples, *x.shape, generator=generator, dtype=torch.float64)
    distribution = torch.cat([filling.expand_as(noises), filling + baseline_noise * noises])
    chosen = distribution[np.random.choice(2 * samples, samples).tolist()]
    a = torch.tensor(np.random.uniform(0, 1, samples)).view(-1, 1, 1, 1)
    total = torch.zeros_like(x)
    for one, base, weight in zip(noisy, chosen, a, strict=True):
        leaf = (base + weight * (one - base)).detach()[None].requires_grad_()
        (gradient,) = torch.autograd.grad(classifier(leaf)[0, label], leaf)
        total += (one - base) * gradient[0]
    return total.sum(0) / samples


@pytest.mark.parametrize(("erase", "noise"), [("black", 0.0), ("mean", 0.2)])
def test_gradient_shap_is_its_definition_with_the_same_draws(curved, x, erase, noise):
    y, settings = torch.tensor([3, 0, 4]), {"samples": 6, "baseline_noise": 0.3, "noise": noise, "seed": 5}
    S = gradient_shap(curved, x, y, erase=erase, **settings)
    filling = torch.zeros(3, 1, 1) if erase == "black" else torch.tensor(curved.mean).view(3, 1, 1)
    with torch.random.fork_rng():
        for i in range(3):
            expected = shap_by_hand(curved, x[i], y[i], filling=filling.double().expand(3, 24, 32), **settings)
            torch.testing.assert_close(S[i, 0], expected, rtol=1e-6, atol=1e-9)


def test_half_of_the_baselines_are_the_filling_itself():
    filled = torch.full((3, 4, 5), 0.4, dtype=torch.float64)
    found = baselines(filled, 200, 0.15, 0)
    assert torch.equal(found[:200], filled.expand(200, -1, -1, -1))
    assert float((found[200:] - filled).std()) == pytest.approx(0.15, rel=0.05)
    assert torch.equal(found, baselines(filled, 200, 0.15, 0))
    assert not torch.equal(found, baselines(filled, 200, 0.15, 1))


@every_method
def test_a_seed_decides(curved, x, method, settings):
    y = torch.tensor([3, 0, 4])
    once = method(curved, x, y, seed=1, **settings)
    assert torch.equal(once, method(curved, x, y, seed=1, **settings))
    assert not torch.allclose(once, method(curved, x, y, seed=2, **settings))
    assert method(curved, x, y, seed=2**40, **settings).isfinite().all()


@every_method
def test_the_global_random_states_stay_and_do_not_matter(curved, x, method, settings, plain):
    y, maps = torch.tensor([3, 0, 4]), []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        maps.append(method(curved, x, y, **settings))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert torch.equal(*maps)


@every_method
def test_the_score_is_what_captum_sees(curved, x, method, settings):
    y = torch.tensor([3, 0, 4])
    one = method(curved, x, y, score=logit, **settings)
    double = method(curved, x, y, score=lambda logits, y: 2 * logit(logits, y), **settings)
    torch.testing.assert_close(double, 2 * one, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one, method(curved, x, y, score=probability, **settings))


@every_method
def test_nothing_is_printed_or_warned_of(curved, x, method, settings, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(curved, x, **settings)
        method(curved, x[:1].float(), **settings)
    assert capfd.readouterr() == ("", "")


@every_method
def test_without_captum_the_message_says_what_to_install(curved, x, method, settings, monkeypatch):
    for name in [name for name in sys.modules if name == "captum" or name.startswith("captum.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'{method.__name__} is run by captum: pip install "sightline\[captum\]"'):
        method(curved, x, **settings)


def test_captum_is_imported_only_when_called():
    code = "import sys; from sightline.methods import lime, gradient_shap; assert 'captum' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (lime, {"samples": 0}, "expected samples and chunk >= 1, got samples=0, chunk=64"),
        (lime, {"chunk": 0}, "chunk=0"),
        (lime, {"width": 0.0}, r"expected kernel_size, max_dist, width and alpha > 0, got .*width=0\.0"),
        (lime, {"alpha": -1.0}, r"alpha=-1\.0"),
        (lime, {"kernel_size": 0.0}, r"kernel_size=0\.0"),
        (lime, {"ratio": 1.5}, r"expected ratio in \[0, 1\], how much color counts against place, got 1\.5"),
        (lime, {"erase": "telea"}, "this erase fills from what the mask keeps"),
        (gradient_shap, {"samples": 0}, "expected samples >= 1, baseline_noise and noise >= 0, got samples=0"),
        (gradient_shap, {"baseline_noise": -0.1}, r"baseline_noise=-0\.1"),
        (gradient_shap, {"noise": -0.1}, r"noise=-0\.1"),
        (gradient_shap, {"erase": "telea"}, "this erase fills from what the mask keeps"),
    ],
)
def test_wrong_settings_are_an_error(curved, x, method, settings, message, plain):
    with pytest.raises(ValueError, match=message):
        method(curved, x, **settings)
