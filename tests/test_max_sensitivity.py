"""Max-sensitivity: how far small noise moves a map, re-derived draw by draw, and beside captum and Quantus."""

import json
import math
from pathlib import Path

import captum.metrics
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.classifier import wrap
from sightline.data import Sample, collate
from sightline.evaluation import finite, measure
from sightline.maps import resize, unit
from sightline.methods import grad_cam, gradient
from sightline.metrics import Case, max_sensitivity

REFERENCE = json.loads((Path(__file__).parent / "data" / "quantus_faithful2.json").read_text(encoding="utf-8"))


def case_of(classifier, method, x, y):
    batch = collate(
        [Sample(str(i), image, label=int(label)) for i, (image, label) in enumerate(zip(x, y, strict=True))]
    )
    raw = finite(method(classifier, x, y))
    saliency = unit(resize(raw, (x.shape[2], x.shape[3])))
    with torch.no_grad():
        return Case(classifier, x, y, saliency, raw, method, batch, classifier(x))


def draws(shape, samples, radius, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [radius * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) for _ in range(samples)]


def frobenius(values):
    return math.sqrt(math.fsum(float(value) ** 2 for value in values.flatten()))


def by_hand(classifier, method, x, y, *, samples=10, radius=0.2, seed=0, read=lambda maps: maps, low=-9.0, high=9.0):
    found = []
    for i in range(len(x)):
        clean = read(method(classifier, x[i : i + 1], y[i : i + 1]))
        changes = []
        for d in draws(x.shape[1:], samples, radius, seed):
            noisy = read(method(classifier, (x[i : i + 1] + d).clamp(low, high), y[i : i + 1]))
            changes.append(frobenius(noisy - clean) / frobenius(clean))
        found.append(max(changes))
    return torch.tensor(found, dtype=torch.float64)


def pixels(classifier, x, y=None, /):
    return x.mean(1, keepdim=True)


@pytest.mark.parametrize("method", [gradient, grad_cam], ids=["gradient", "grad_cam"])
def test_it_is_the_largest_relative_change_over_the_draws(curved, x, method):
    y = torch.tensor([2, 0, 4])
    for arguments, likewise in (
        ({}, {}),
        ({"samples": 3, "radius": 0.05, "seed": 5}, {"samples": 3, "radius": 0.05, "seed": 5}),
        ({"of": "unit"}, {"read": unit}),
        ({"clamp": True}, {"low": 0.0, "high": 1.0}),
    ):
        found = max_sensitivity(**arguments)(case_of(curved, method, x, y))[:, 0]
        torch.testing.assert_close(found, by_hand(curved, method, x, y, **likewise), rtol=1e-9, atol=1e-12)


def test_the_absolute_change_is_the_relative_one_times_the_size(curved, x):
    case = case_of(curved, gradient, x, torch.tensor([2, 0, 4]))
    sizes = torch.tensor([[frobenius(one)] for one in case.raw], dtype=torch.float64)
    absolute = max_sensitivity(relative=False)(case)
    torch.testing.assert_close(absolute, max_sensitivity()(case) * sizes)


def test_the_map_that_is_the_image_moves_as_the_noise_does(pooled, x):
    found = max_sensitivity(samples=4, relative=False)(case_of(pooled, pixels, x, torch.tensor([0, 1, 2])))
    largest = max(frobenius(d.mean(0)) for d in draws(x.shape[1:], 4, 0.2))
    torch.testing.assert_close(found[:, 0], torch.full((3,), largest, dtype=torch.float64))


def test_images_leave_the_range_unless_they_are_clamped(pooled, x):
    seen = []

    def watching(classifier, images, y=None, /):
        seen.append((float(images.min()), float(images.max())))
        return pixels(classifier, images)

    case = case_of(pooled, watching, x, torch.tensor([0, 1, 2]))
    seen.clear()
    max_sensitivity(samples=2)(case)
    assert len(seen) == 2
    assert all(low < 0 and high > 1 for low, high in seen)
    seen.clear()
    max_sensitivity(samples=2, clamp=True)(case)
    assert all(low == 0 and high == 1 for low, high in seen)


def test_the_class_is_that_of_the_clean_image(pooled, x):
    asked = []

    def watching(classifier, images, y=None, /):
        asked.append(y.tolist())
        return pixels(classifier, images)

    samples = [Sample(str(i), image, label=0) for i, image in enumerate(x)]
    scores = measure(watching, pooled, [collate(samples)], {"max_sensitivity": max_sensitivity(samples=3)})
    assert asked == [pooled(x).argmax(1).tolist()] * 4
    assert list(scores.predicted) == asked[0]


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-3, 1e3), offset=st.floats(-5, 5), power=st.integers(1, 6))
def test_neither_scale_nor_offset_of_a_map_matters_once_it_is_scaled(classifiers, scale, offset, power):
    x = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(power), dtype=torch.float64)
    y = torch.tensor([0, 1])

    def changed(classifier, images, labels=None, /):
        return scale * pixels(classifier, images) + offset

    plain, moved = (case_of(classifiers["pooled"], method, x, y) for method in (pixels, changed))
    assert bool((max_sensitivity()(plain) >= 0).all())
    torch.testing.assert_close(max_sensitivity(of="unit")(plain), max_sensitivity(of="unit")(moved), rtol=1e-7, atol=0)


def test_more_draws_never_lower_it(curved, x):
    case = case_of(curved, gradient, x, torch.tensor([2, 0, 4]))
    found = torch.cat([max_sensitivity(samples=n)(case) for n in (1, 2, 5, 10)], 1)
    assert bool((found.diff(dim=1) >= 0).all())
    assert bool((found[:, -1] > found[:, 0]).any())


def test_it_depends_on_neither_batch_nor_order(curved, x):
    y, one = torch.tensor([2, 0, 4]), max_sensitivity(samples=3)
    whole = one(case_of(curved, gradient, x, y))
    alone = torch.cat([one(case_of(curved, gradient, x[i : i + 1], y[i : i + 1])) for i in range(3)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-9)
    turned = one(case_of(curved, gradient, x.flip(0), y.flip(0))).flip(0)
    torch.testing.assert_close(turned, whole, rtol=0, atol=1e-9)


def test_a_map_without_a_size_has_zero_if_nothing_moves_it_and_one_else(pooled, x):
    def zero(classifier, images, y=None, /):
        return torch.zeros_like(images[:, :1])

    def outside(classifier, images, y=None, /):
        return (images - 1).clamp(min=0).sum(1, keepdim=True)

    def broken(classifier, images, y=None, /):
        return pixels(classifier, images) * torch.where(images.amin() < 0, torch.nan, 1.0)

    y = torch.tensor([0, 1, 2])
    for reading in ("raw", "unit"):
        assert max_sensitivity(of=reading)(case_of(pooled, zero, x, y)).tolist() == [[0.0]] * 3
        assert max_sensitivity(of=reading)(case_of(pooled, outside, x, y)).tolist() == [[1.0]] * 3
    assert max_sensitivity()(case_of(pooled, broken, x, y)).tolist() == [[1.0]] * 3


def test_a_method_that_needs_gradients_gets_them(pooled, x):
    def foreign(classifier, images, y=None, /):
        leaf = images.detach().requires_grad_()
        return torch.autograd.grad(classifier(leaf).square().sum(), leaf)[0].sum(1, keepdim=True)

    found = max_sensitivity(samples=2)(case_of(pooled, foreign, x, torch.tensor([0, 1, 2])))
    assert bool((found > 0).all())


def test_an_image_of_one_pixel_has_a_number(pooled):
    x = torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64)
    largest = max(abs(float(d.mean())) for d in draws((3, 1, 1), 10, 0.2))
    found = max_sensitivity()(case_of(pooled, pixels, x, torch.tensor([1])))
    torch.testing.assert_close(found, torch.full((1, 1), largest / 0.5, dtype=torch.float64))


def test_captum_agrees_where_it_gets_the_same_noise(curved, x):
    y, noise = torch.tensor([2, 0, 4]), torch.stack(draws(x.shape[1:], 10, 0.2))

    def perturb(images):  # each image ten times in a row
        return images + noise.repeat(len(images) // 10, 1, 1, 1)

    def explain(images, target):
        return (gradient(curved, images[0] if isinstance(images, tuple) else images, target),)

    expected = captum.metrics.sensitivity_max(explain, x, perturb, n_perturb_samples=10, target=y)
    torch.testing.assert_close(max_sensitivity()(case_of(curved, gradient, x, y))[:, 0], expected)


def wave(shape, frequency):
    return torch.sin(frequency * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).reshape(shape)


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        shapes, frequencies = REFERENCE["shapes"], REFERENCE["frequencies"]
        self.first = torch.nn.Parameter(wave(shapes["first"], frequencies["first"]) / 8)
        self.second = torch.nn.Parameter(wave(shapes["second"], frequencies["second"]))
        self.stem = torch.nn.Identity()

    def forward(self, x):
        return (self.stem(x).flatten(1) @ self.first.T).tanh() @ self.second.T


def mean_gradient(classifier, x, y=None, /):
    return classifier.gradient(x, y).mean(1, keepdim=True)


@pytest.fixture
def shared():
    classifier = wrap(Tiny(), layer="stem", normalization="none", size=(8, 8))
    x = (wave(REFERENCE["shapes"]["images"], REFERENCE["frequencies"]["images"]) + 1) / 2
    return case_of(classifier, mean_gradient, x, torch.tensor(REFERENCE["labels"]))


def test_quantus_agrees_where_it_gets_the_same_noise(shared):
    expected = torch.tensor(REFERENCE["values"]["max_sensitivity"], dtype=torch.float64)
    torch.testing.assert_close(max_sensitivity()(shared)[:, 0], expected, rtol=1e-5, atol=0)


def test_quantus_own_noise_differs_from_image_to_image_so_its_numbers_depend_on_the_batch():
    values = REFERENCE["values"]
    together, alone = values["max_sensitivity, noise of its own"][1], values["max_sensitivity, second image alone"][0]
    assert abs(together - alone) > 0.01


def test_quantus_has_no_number_for_a_zero_map():
    assert REFERENCE["values"]["max_sensitivity, first map zero"] == [None, 0.0]


def test_what_is_wrong_is_said(plain):
    with pytest.raises(ValueError, match=r"expected samples >= 1 and radius > 0, got samples=0, radius=0\.2"):
        max_sensitivity(samples=0)
    with pytest.raises(ValueError, match="expected samples >= 1 and radius > 0, got samples=10, radius=0"):
        max_sensitivity(radius=0.0)
    with pytest.raises(LookupError, match="no reading of the map called 'units'; did you mean unit"):
        max_sensitivity(of="units")
    with pytest.raises(ValueError, match="expected scored='label' or scored='predicted', got 'second'"):
        max_sensitivity(scored="second")
