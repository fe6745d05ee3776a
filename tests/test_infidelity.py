"""Infidelity: how far a map is from telling what perturbations do, re-derived draw by draw, and beside captum and
Quantus."""

import json
import math
from collections import Counter
from pathlib import Path

import captum.metrics
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightline.classifier import Classifier, probability, wrap
from sightline.data import Sample, collate
from sightline.evaluation import finite, measure
from sightline.maps import blur, resize, unit
from sightline.methods import grad_cam, input_x_gradient
from sightline.metrics import Case, infidelity
from sightline.metrics._infidelity import squares

REFERENCE = json.loads((Path(__file__).parent / "data" / "quantus_faithful2.json").read_text(encoding="utf-8"))
Y = torch.tensor([2, 0, 4])
FEW = 12


def case_of(classifier, method, x, y):
    batch = collate(
        [Sample(str(i), image, label=int(label)) for i, (image, label) in enumerate(zip(x, y, strict=True))]
    )
    raw = finite(method(classifier, x, y))
    saliency = unit(resize(raw, (x.shape[2], x.shape[3])))
    with torch.no_grad():
        return Case(classifier, x, y, saliency, raw, method, batch, classifier(x))


def summed_gradient(classifier, x, y=None, /):
    return classifier.gradient(x, y).sum(1, keepdim=True)


def zero(classifier, x, y=None, /):
    return torch.zeros_like(x[:, :1])


def perturbed(image, way, samples, *, noise=0.2, sides=(1 / 28, 10 / 28), multiplied=False, filling=None, seed=0):
    """Yield x - I and I, one draw after the other."""
    generator = torch.Generator().manual_seed(seed)
    filling = torch.zeros_like(image) if filling is None else filling
    if way == "square":
        for top, left, side in squares((image.shape[1], image.shape[2]), sides, samples, seed):
            seen, inside = image.clone(), torch.zeros_like(image[:1])
            for row in range(top, top + side):
                for column in range(left, left + side):
                    seen[:, row, column] = filling[:, row, column]
                    inside[0, row, column] = 1
            yield seen, inside if multiplied else image - seen
        return
    for _ in range(samples):
        e = torch.randn(image.shape, generator=generator, dtype=torch.float64)
        seen = image - noise * e if way == "gaussian" else (filling + noise * e).clamp(0, 1)
        yield seen, image - seen


def by_hand(case, way, samples, *, score=lambda logits, y: logits[y], normalize=True, fill=None, **given):
    found = []
    for image, raw, label in zip(case.x, case.raw, case.y.tolist(), strict=True):
        phi = resize(raw[None], (image.shape[1], image.shape[2]))[0]
        filling = None if fill is None else fill(image[None])[0]
        whole, told, fell = float(score(case.classifier(image[None])[0], label)), [], []
        for seen, weight in perturbed(image, way, samples, filling=filling, **given):
            told.append(math.fsum((weight * phi).flatten().tolist()))
            fell.append(whole - float(score(case.classifier(seen[None])[0], label)))
        beta = math.fsum(a * b for a, b in zip(told, fell, strict=True)) / math.fsum(a * a for a in told)
        beta = beta if normalize else 1.0
        found.append(math.fsum((beta * a - b) ** 2 for a, b in zip(told, fell, strict=True)) / samples)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("way", ["noisy_baseline", "gaussian", "square"])
@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_mean_square_of_what_the_map_does_not_tell(curved, x, way, normalize):
    for method in (summed_gradient, grad_cam):
        case = case_of(curved, method, x, Y)
        found = infidelity(perturbation=way, samples=FEW, normalize=normalize)(case)[:, 0]
        torch.testing.assert_close(found, by_hand(case, way, FEW, normalize=normalize), rtol=1e-7, atol=1e-12)


def test_every_setting_counts(curved, x):
    case = case_of(curved, summed_gradient, x, Y)
    softmax = lambda logits, y: logits.softmax(0)[y]  # noqa: E731
    for way, arguments, likewise in (
        ("gaussian", {"noise": 0.05}, {"noise": 0.05}),
        ("noisy_baseline", {"noise": 0.4}, {"noise": 0.4}),
        ("noisy_baseline", {"seed": 3}, {"seed": 3}),
        ("noisy_baseline", {"erase": "blur"}, {"fill": lambda image: blur(image, 10.0)}),
        ("square", {"erase": "blur"}, {"fill": lambda image: blur(image, 10.0)}),
        ("square", {"sides": (0.2, 0.6), "seed": 2}, {"sides": (0.2, 0.6), "seed": 2}),
        ("square", {"multiplied": True}, {"multiplied": True}),
        ("square", {"score": probability}, {"score": softmax}),
    ):
        found = infidelity(perturbation=way, samples=FEW, **arguments)(case)[:, 0]
        torch.testing.assert_close(found, by_hand(case, way, FEW, **likewise), rtol=1e-7, atol=1e-12)
        assert not torch.allclose(found, infidelity(perturbation=way, samples=FEW)(case)[:, 0], rtol=1e-6, atol=0)


def linear(channels):
    with torch.random.fork_rng([]):
        torch.manual_seed(channels)
        model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(channels * 30, 5).double())
    return Classifier(model, "0", mean=(0.4,), std=(0.3,), size=(5, 6), channels=channels)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    way=st.sampled_from(["noisy_baseline", "gaussian", "square"]),
    normalize=st.booleans(),
    noise=st.floats(0.01, 2),
)
def test_the_gradient_of_a_linear_gray_network_tells_all(seed, way, normalize, noise):
    x = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    case = case_of(linear(1), summed_gradient, x, torch.tensor([1, 4]))
    one = infidelity(perturbation=way, samples=5, normalize=normalize, noise=noise, seed=seed, sides=(0.2, 1.0))
    assert float(one(case).abs().max()) < 1e-20
    broken = case_of(linear(1), lambda *a: summed_gradient(*a).flip(2), x, torch.tensor([1, 4]))
    assert float(one(broken).min()) > 1e-9


def test_input_x_gradient_of_a_linear_color_network_tells_all_about_black_squares():
    x = torch.rand(3, 3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    case = case_of(linear(3), input_x_gradient, x, Y)
    for normalize in (True, False):
        one = infidelity(perturbation="square", samples=20, multiplied=True, sides=(0.2, 1.0), normalize=normalize)
        assert float(one(case).abs().max()) < 1e-20
    apart = infidelity(perturbation="square", samples=20, sides=(0.2, 1.0))(case)
    assert float(apart.min()) > 1e-6


@settings(max_examples=10, deadline=None)
@given(factor=st.floats(1e-3, 1e3), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 99))
def test_no_scale_and_no_sign_matters_once_the_map_is_scaled_best(classifiers, factor, sign, seed):
    x = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    one, y = infidelity(samples=6, seed=seed), torch.tensor([1, 3])
    curved = classifiers["curved"]
    found = one(case_of(curved, summed_gradient, x, y))
    scaled = one(case_of(curved, lambda *a: sign * factor * summed_gradient(*a), x, y))
    nothing = one(case_of(curved, zero, x, y))
    torch.testing.assert_close(found, scaled, rtol=1e-7, atol=1e-15)
    assert bool(((found >= 0) & (found <= nothing * (1 + 1e-12))).all())
    unscaled = infidelity(samples=6, seed=seed, normalize=False)(case_of(curved, summed_gradient, x, y))
    assert bool((found <= unscaled * (1 + 1e-12)).all())


def test_a_map_that_says_nothing_leaves_all_of_the_fall(curved, x):
    case = case_of(curved, zero, x, Y)
    fell = [
        [float((curved(image[None]) - curved(seen[None]))[0, y]) for seen, _ in perturbed(image, "gaussian", FEW)]
        for image, y in zip(x, Y.tolist(), strict=True)
    ]
    expected = torch.tensor([math.fsum(one**2 for one in row) / FEW for row in fell], dtype=torch.float64)
    broken = case_of(curved, lambda *a: zero(*a) * torch.nan, x, Y)
    for normalize in (True, False):
        one = infidelity(perturbation="gaussian", samples=FEW, normalize=normalize)
        torch.testing.assert_close(one(case)[:, 0], expected)
        torch.testing.assert_close(one(broken)[:, 0], expected)


@pytest.mark.parametrize("way", ["noisy_baseline", "gaussian", "square"])
def test_it_depends_on_neither_batch_nor_order_nor_chunk(curved, x, way):
    one = infidelity(perturbation=way, samples=FEW)
    whole = one(case_of(curved, summed_gradient, x, Y))
    parts = [one(case_of(curved, summed_gradient, x[i : i + 1], Y[i : i + 1])) for i in range(3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-9)
    turned = one(case_of(curved, summed_gradient, x.flip(0), Y.flip(0))).flip(0)
    torch.testing.assert_close(turned, whole, rtol=0, atol=1e-9)
    for chunk in (1, 5, 1000):
        found = infidelity(perturbation=way, samples=FEW, chunk=chunk)(case_of(curved, summed_gradient, x, Y))
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)


def test_no_more_images_than_a_chunk_are_scored_at_once(curved, x):
    sizes = []
    curved.model.register_forward_hook(lambda module, given, out: sizes.append(len(given[0])))
    case = case_of(curved, zero, x, Y)
    for chunk, expected in ((7, [6] * 6), (2, [3] * FEW), (64, [36])):
        sizes.clear()
        infidelity(samples=FEW, chunk=chunk)(case)
        assert sizes == expected


def test_every_square_is_equally_likely_and_inside():
    size, sides = (4, 6), (0.5, 0.75)
    possible = [(t, s, n) for n in (2, 3) for t in range(4 - n + 1) for s in range(6 - n + 1)]
    counts = Counter(squares(size, sides, 23 * 400, 0))
    assert set(counts) == set(possible)
    assert len(possible) == 15 + 8
    assert all(300 < count < 500 for count in counts.values())


def test_squares_have_the_sides_of_the_paper_and_at_least_a_pixel():
    assert {side for _, _, side in squares((28, 28), (1 / 28, 10 / 28), 5000, 0)} == set(range(1, 11))
    assert {side for _, _, side in squares((224, 300), (1 / 28, 10 / 28), 3000, 0)} == set(range(8, 81))
    assert squares((1, 1), (1 / 28, 10 / 28), 3, 0) == [(0, 0, 1)] * 3


def test_the_label_is_scored_by_default_and_the_prediction_on_demand(curved, x):
    samples = [Sample(str(i), image, label=int(y)) for i, (image, y) in enumerate(zip(x, Y, strict=True))]
    batch, predicted = collate(samples), curved(x).argmax(1)
    for settled, y in (({}, Y), ({"scored": "predicted"}, predicted)):
        one = infidelity(samples=FEW, **settled)
        score = measure(summed_gradient, curved, [batch], {"infidelity": one})["infidelity"]
        expected = one(case_of(curved, summed_gradient, x, y))[:, 0]
        torch.testing.assert_close(torch.tensor(score.per_image, dtype=torch.float64), expected)
        assert score.value == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize("normalize", [True, False])
def test_captum_agrees_where_it_gets_the_same_perturbations(curved, x, normalize):
    case = case_of(curved, summed_gradient, x, Y)
    noise = torch.stack([weight for _, weight in perturbed(x[0], "gaussian", FEW)])

    def perturb(images):  # each image FEW times in a row
        I = noise.repeat(len(images) // FEW, 1, 1, 1)  # noqa: E741
        return I, images - I

    told = case.raw.expand_as(x).contiguous()
    expected = captum.metrics.infidelity(curved, perturb, x, told, target=Y, n_perturb_samples=FEW, normalize=normalize)
    found = infidelity(perturbation="gaussian", samples=FEW, normalize=normalize)(case)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


def test_captum_divides_by_the_image_where_a_map_has_it_in_it_and_counts_it_once_a_color(curved, x):
    case = case_of(curved, input_x_gradient, x, Y)
    drawn = list(perturbed(x[0], "square", FEW, sides=(0.3, 0.5), multiplied=True))
    inside = torch.stack([weight for _, weight in drawn])

    @captum.metrics.infidelity_perturb_func_decorator(multiply_by_inputs=True)
    def perturb(images):
        return images * (1 - inside.repeat(len(images) // FEW, 1, 1, 1))

    shared = (case.raw / 3).expand_as(x).contiguous()
    expected = captum.metrics.infidelity(curved, perturb, x, shared, target=Y, n_perturb_samples=FEW)
    one = infidelity(perturbation="square", samples=FEW, sides=(0.3, 0.5), multiplied=True, normalize=False)
    torch.testing.assert_close(one(case)[:, 0], expected, rtol=1e-7, atol=1e-12)


def wave(shape, frequency):
    return torch.sin(frequency * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).reshape(shape)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        shapes, frequencies = REFERENCE["shapes"], REFERENCE["frequencies"]
        self.first = nn.Parameter(wave(shapes["first"], frequencies["first"]) / 8)
        self.second = nn.Parameter(wave(shapes["second"], frequencies["second"]))
        self.stem = nn.Identity()

    def forward(self, x):
        return (self.stem(x).flatten(1) @ self.first.T).tanh() @ self.second.T


@pytest.fixture
def shared():
    classifier = wrap(Tiny(), layer="stem", normalization="none", size=(8, 8))
    x = (wave(REFERENCE["shapes"]["images"], REFERENCE["frequencies"]["images"]) + 1) / 2
    return case_of(classifier, lambda *a: summed_gradient(*a) / 3, x, torch.tensor(REFERENCE["labels"]))


def test_quantus_agrees_where_one_patch_is_the_whole_image(shared):
    expected = torch.tensor(REFERENCE["values"]["infidelity, whole image"], dtype=torch.float64)
    found = infidelity(perturbation="square", samples=1, sides=(1.0, 1.0), normalize=False)(shared)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)  # Quantus scores in single precision


def test_quantus_leaves_every_patch_black_while_it_goes_on_to_the_next(shared):
    def error(black):
        fell = shared.logits - shared.classifier(shared.x * (1 - black))
        told = (shared.x * black * shared.raw).sum((1, 2, 3))
        return (told - fell[torch.arange(2), shared.y]).square()

    corners = [(0, 0), (0, 4), (4, 0), (4, 4)]
    patches = torch.zeros(4, 1, 8, 8, dtype=torch.float64)
    for patch, (top, left) in zip(patches, corners, strict=True):
        patch[:, top : top + 4, left : left + 4] = 1
    alone = torch.stack([error(patch) for patch in patches]).mean(0)
    together = torch.stack([error(patch) for patch in patches.cumsum(0)]).mean(0)
    found = torch.tensor(REFERENCE["values"]["infidelity, patches of 4"], dtype=torch.float64)
    torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-7)
    assert bool(((found - alone).abs() > 0.01).all())


def test_quantus_samples_do_not_sample():
    values = REFERENCE["values"]
    assert values["infidelity, patches of 4"] == values["infidelity, patches of 4, ten times"]


def test_what_is_wrong_is_said(plain):
    for wrong in ({"samples": 0}, {"noise": 0.0}, {"chunk": 0}):
        with pytest.raises(ValueError, match="expected samples >= 1, noise > 0 and chunk >= 1, got samples="):
            infidelity(**wrong)
    for sides in ((0.0, 0.5), (0.6, 0.5), (0.5, 1.1), (0.5,)):
        with pytest.raises(ValueError, match="expected two sides, 0 < smallest <= largest <= 1"):
            infidelity(sides=sides)
    with pytest.raises(ValueError, match="multiplied=True needs perturbation='square'"):
        infidelity(multiplied=True)
    with pytest.raises(LookupError, match="no perturbation called 'squares'; did you mean square"):
        infidelity(perturbation="squares")
    with pytest.raises(ValueError, match="expected scored='label' or scored='predicted', got 'least'"):
        infidelity(scored="least")
