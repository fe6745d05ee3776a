import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from sightline import erase
from sightline.erase import ERASERS, black, blur, color, mix, noise, resolve, telea

MEAN = (0.2, 0.4, 0.6)


@pytest.fixture
def image():
    return torch.rand(2, 3, 12, 15, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saliency():
    return torch.rand(2, 1, 12, 15, generator=torch.Generator().manual_seed(2))


def test_black_and_color_fill_with_one_color(image, saliency):
    assert not black(image, saliency).any()
    filling = color(image, saliency, mean=MEAN)
    assert filling.shape == image.shape
    assert all(filling[:, c].eq(torch.tensor(MEAN[c])).all() for c in range(3))
    assert color(image, saliency, mean=(0.5,)).eq(0.5).all()
    with pytest.raises(ValueError, match=r"expected a color of 3 channels, got \(0.1, 0.2\)"):
        color(image, saliency, mean=(0.1, 0.2))


def test_the_mean_color_is_zero_in_normalized_space(pooled, x):
    filling = resolve("mean", pooled.mean)(x, x[:, :1])
    assert pooled.normalize(filling).abs().max() < 1e-15


def test_blur_fills_with_the_smoothed_image(image, saliency):
    filling = blur(image, saliency, sigma=2.0)
    expected = ndimage.gaussian_filter(image[1, 2].double().numpy(), 2.0, mode="mirror", radius=8)
    np.testing.assert_allclose(filling[1, 2], expected, rtol=0, atol=1e-6)
    assert torch.equal(blur(image, saliency), blur(image, saliency, sigma=10.0, padding="reflect"))


def test_rise_blurs_with_zero_padding_in_normalized_space(image, saliency):
    """RISE's substrate: 11 x 11 Gaussian, sigma 5, zeros around the normalized image."""
    filling = resolve("rise", MEAN)(image, saliency)
    offsets = np.arange(-5, 6)
    kernel = np.exp(-(offsets**2) / 50)
    kernel /= kernel.sum()
    for c in range(3):
        normalized = (image[0, c].double().numpy() - MEAN[c]) / 0.3
        smooth = ndimage.convolve(normalized, np.outer(kernel, kernel), mode="constant")
        np.testing.assert_allclose(filling[0, c], smooth * 0.3 + MEAN[c], rtol=0, atol=1e-6)


def test_noise_is_the_same_for_every_image_and_follows_its_seed(image, saliency):
    state = torch.get_rng_state()
    filling = noise(image, saliency)
    assert torch.equal(filling[0], filling[1])
    assert torch.equal(filling[:1], noise(image[1:], saliency[1:]))
    assert filling.min() >= 0
    assert filling.max() < 1
    assert filling.std() > 0.2
    assert not torch.equal(filling, noise(image, saliency, seed=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_telea_is_opencv_s_inpainting_of_what_is_not_kept(image, saliency):
    filling = telea(image, saliency, radius=3.0)
    for n in range(2):
        pixels = (image[n] * 255).round().byte().permute(1, 2, 0).numpy().copy()
        hole = (saliency[n, 0] <= 0.5).byte().numpy()
        expected = cv2.inpaint(pixels, hole, 3.0, cv2.INPAINT_TELEA)
        np.testing.assert_array_equal((filling[n] * 255).round().byte().permute(1, 2, 0), expected)
    kept = (saliency > 0.5).expand_as(image)
    assert (filling - image)[kept].abs().max() <= 0.5 / 255 + 1e-6
    assert (filling - image)[~kept].abs().max() > 0.1


def test_telea_keeps_what_is_above_its_threshold(image, saliency):
    half = torch.where(saliency > 0.8, 1.0, 0.5)
    for keep, bound in ((0.5, 0.8), (0.9, 0.8), (0.4, -1.0)):
        kept = (saliency > bound).expand_as(image)
        change = (telea(image, half, keep=keep) - image).abs()
        assert change[kept].max() <= 0.5 / 255 + 1e-6
        assert kept.all() or change[~kept].max() > 0.1


def test_telea_with_nothing_kept_all_kept_and_one_channel(image, saliency):
    for level in (0.0, 1.0):
        filling = telea(image, torch.full_like(saliency, level))
        assert (filling - image).abs().max() <= 0.5 / 255 + 1e-6
    gray = telea(image[:, :1], saliency)
    expected = cv2.inpaint(
        (image[0, 0] * 255).round().byte().numpy(), (saliency[0, 0] <= 0.5).byte().numpy(), 3.0, cv2.INPAINT_TELEA
    )
    np.testing.assert_array_equal((gray[0, 0] * 255).round().byte(), expected)


@pytest.mark.parametrize("name", [*ERASERS, "mean", "rise"])
def test_fillings_depend_on_no_other_image_and_leave_the_input_alone(name, image, saliency):
    erase = resolve(name, MEAN)
    before = image.clone(), saliency.clone()
    together = erase(image, saliency)
    assert together.shape == image.shape
    assert together.dtype == image.dtype
    torch.testing.assert_close(together[1:], erase(image[1:], saliency[1:]), rtol=0, atol=1e-6)
    assert torch.equal(image, before[0])
    assert torch.equal(saliency, before[1])


@pytest.mark.parametrize("name", [*ERASERS, "mean", "rise"])
def test_mix_keeps_where_the_mask_is_one_and_fills_where_it_is_zero(name, image, saliency):
    erase = resolve(name, MEAN)
    assert torch.equal(mix(image, torch.ones_like(saliency), erase), image)
    hidden = torch.zeros_like(saliency)
    torch.testing.assert_close(mix(image, hidden, erase), erase(image, hidden))
    for b, c, row, column in ((0, 0, 0, 0), (1, 2, 7, 9)):
        m = saliency[b, 0, row, column]
        expected = m * image[b, c, row, column] + (1 - m) * erase(image, saliency)[b, c, row, column]
        torch.testing.assert_close(mix(image, saliency, erase)[b, c, row, column], expected)


def test_an_eraser_by_name_or_as_a_function(image, saliency):
    def half(x, saliency):
        return 0.5 * x

    assert resolve(half, MEAN) is half
    assert resolve("black", MEAN) is black
    assert torch.equal(resolve("mean", MEAN)(image, saliency), color(image, saliency, mean=MEAN))
    with pytest.raises(LookupError, match="no eraser called 'blak'; did you mean black"):
        resolve("blak", MEAN)


@pytest.mark.parametrize("choice", ["black", "mean", "blur", "noise", "rise"])
def test_a_filling_of_the_image_alone_is_made_once_an_image(choice):
    generator = torch.Generator().manual_seed(1)
    x, m = (torch.rand(3, c, 12, 12, generator=generator, dtype=torch.float64) for c in (3, 1))
    i = torch.tensor([2, 0, 2])
    expected = erase.resolve(choice, (0.1, 0.2, 0.3))(x[i], m[i])
    found = erase.filler(x, choice, (0.1, 0.2, 0.3))(i)(x[i], m[i])
    assert torch.allclose(found, expected.expand_as(found), rtol=0, atol=1e-12)


def test_a_filling_that_looks_at_the_mask_is_made_of_each_mask():
    x, m = torch.rand(2, 3, 12, 12), (torch.rand(2, 1, 12, 12) > 0.5).float()
    of = erase.filler(x, "telea", (0.0,))
    assert torch.equal(of(torch.tensor([1]))(x[1:], m[1:]), erase.telea(x[1:], m[1:]))
