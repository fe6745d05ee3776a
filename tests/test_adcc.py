"""ADCC, coherency and complexity, pixel by pixel in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from sightline.data import Sample, collate
from sightline.evaluation import finite, measure
from sightline.maps import resize, unit
from sightline.methods import grad_cam, gradient
from sightline.metrics import Case, adcc, average_drop, coherency, complexity
from sightline.metrics._adcc import harmonic

Y = torch.tensor([2, 0, 4])


def case_of(classifier, method, x, y):
    batch = collate(
        [Sample(str(i), image, label=int(label)) for i, (image, label) in enumerate(zip(x, y, strict=True))]
    )
    raw = finite(method(classifier, x, y))
    saliency = unit(resize(raw, (x.shape[2], x.shape[3])))
    with torch.no_grad():
        return Case(classifier, x, y, saliency, raw, method, batch, classifier(x))


def parts_by_hand(classifier, method, image, label, fill=0.0):
    x, y = image[None], torch.tensor([label])
    size = (image.shape[1], image.shape[2])
    S = unit(resize(method(classifier, x, y), size))
    seen = S * x + (1 - S) * fill
    again = resize(method(classifier, seen, y), size)
    coh = (pearsonr(S.flatten().tolist(), again.flatten().tolist()).statistic + 1) / 2
    com = math.fsum(S.flatten().tolist()) / S.numel()
    p, o = (float(classifier(images).softmax(1)[0, label]) for images in (x, seen))
    return coh, com, max(0.0, p - o) / p


def mean_of_three(coh, com, ad):
    return 0.0 if 0 in (coh, 1 - com, 1 - ad) else 300 / (1 / coh + 1 / (1 - com) + 1 / (1 - ad))


def maps(*found):
    """Return a method that gives these maps at its calls."""
    left = list(found)
    return lambda classifier, x, y=None, /: left.pop(0).expand(len(x), -1, -1, -1).clone()


@pytest.mark.parametrize("method", [gradient, grad_cam], ids=["gradient", "grad_cam"])
def test_each_part_and_their_harmonic_mean_are_the_papers(curved, x, method):
    case = case_of(curved, method, x, Y)
    expected = [parts_by_hand(curved, method, image, label) for image, label in zip(x, Y.tolist(), strict=True)]
    for one, numbers in (
        (coherency(), [100 * coh for coh, _, _ in expected]),
        (complexity(), [100 * com for _, com, _ in expected]),
        (average_drop(scored="predicted"), [100 * ad for _, _, ad in expected]),
        (adcc(), [mean_of_three(*parts) for parts in expected]),
    ):
        torch.testing.assert_close(one(case)[:, 0], torch.tensor(numbers, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_what_is_hidden_shows_the_filling(curved, x):
    curved = type(curved)(**{**vars(curved), "mean": (0.3,), "std": (1.0,)})
    case, expected = case_of(curved, gradient, x, Y), []
    for image, label in zip(x, Y.tolist(), strict=True):
        expected.append(parts_by_hand(curved, gradient, image, label, fill=0.3))
    numbers = torch.tensor([mean_of_three(*parts) for parts in expected], dtype=torch.float64)
    torch.testing.assert_close(adcc(erase="mean")(case)[:, 0], numbers, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(adcc()(case)[:, 0], numbers, rtol=1e-4)
    again = coherency(erase="mean")(case)[:, 0]
    torch.testing.assert_close(again, torch.tensor([100 * coh for coh, _, _ in expected], dtype=torch.float64))


def test_the_two_means_are_the_mean_of_numbers_and_the_number_of_means(curved, x):
    samples = [Sample(str(i), image, label=int(y)) for i, (image, y) in enumerate(zip(x, Y, strict=True))]
    predicted = curved(x).argmax(1).tolist()
    parts = [parts_by_hand(curved, gradient, image, label) for image, label in zip(x, predicted, strict=True)]
    metrics = {"image": adcc(), "means": adcc(average="means")}
    scores = measure(gradient, curved, [collate(samples[:2]), collate(samples[2:])], metrics)
    numbers = [mean_of_three(*part) for part in parts]
    assert scores["image"].per_image == pytest.approx(numbers)
    assert scores["image"].value == pytest.approx(math.fsum(numbers) / 3)
    assert scores["means"].value == pytest.approx(
        mean_of_three(*(math.fsum(part) / 3 for part in zip(*parts, strict=True)))
    )
    assert scores["means"].per_image == ()
    assert scores["image"].value != pytest.approx(scores["means"].value)


def test_the_class_is_the_predicted_one_and_the_label_on_demand(curved, x):
    asked = []

    def watching(classifier, images, y=None, /):
        asked.append(y.tolist())
        return gradient(classifier, images, y)

    samples = [Sample(str(i), image, label=3) for i, image in enumerate(x)]
    measure(
        watching, curved, [collate(samples)], {"adcc": adcc(), "coherency": coherency(), "complexity": complexity()}
    )
    assert asked == [curved(x).argmax(1).tolist()] * 2
    asked.clear()
    measure(watching, curved, [collate(samples)], {"adcc": adcc(scored="label")})
    assert asked == [[3, 3, 3]] * 2


def test_a_map_that_stays_or_turns_about_has_the_extremes(pooled, x):
    one = torch.rand(1, 1, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for second, expected in ((one, 100.0), (3 * one + 7, 100.0), (-one, 0.0), (one.flip(0), 100.0)):
        found = coherency()(case_of(pooled, maps(one, second), x, Y))
        torch.testing.assert_close(found, torch.full((3, 1), expected, dtype=torch.float64), rtol=0, atol=1e-9)
    assert adcc()(case_of(pooled, maps(one, -one), x, Y)).abs().max() < 1e-9


def test_uncorrelated_maps_are_half_coherent(pooled, x):
    rows, columns = torch.meshgrid(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), indexing="ij")
    case = case_of(pooled, maps(rows[None, None].double(), columns[None, None].double()), x, Y)
    torch.testing.assert_close(coherency()(case), torch.full((3, 1), 50.0, dtype=torch.float64))


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0, math.nan, math.inf])
def test_a_map_that_says_nothing_is_not_coherent(pooled, x, value):
    one = torch.rand(1, 1, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    flat = torch.full((1, 1, 6, 8), value, dtype=torch.float64)
    for first, second in ((one, flat), (flat, one), (flat, flat)):
        case = case_of(pooled, maps(first, second), x, Y)
        assert coherency()(case).tolist() == [[0.0]] * 3
        assert adcc()(case).tolist() == [[0.0]] * 3
    whole = resize(flat, (24, 32), "nearest")
    assert complexity()(case_of(pooled, maps(whole), x, Y)).tolist() == [[0.0]] * 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_it_lies_in_its_range_below_three_times_its_least_part(parts):
    found = float(harmonic(torch.tensor(parts, dtype=torch.float64)))
    coh, com, ad = parts
    assert 0 <= found <= 100 + 1e-9
    assert found <= 300 * min(coh, 1 - com, 1 - ad) + 1e-9
    assert found == pytest.approx(mean_of_three(*parts))


def test_one_part_at_its_worst_is_zero_and_all_at_their_best_a_hundred():
    worst = torch.tensor([[0.0, 0.2, 0.2], [0.5, 1.0, 0.2], [0.5, 0.2, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    assert harmonic(worst).tolist() == [0.0] * 4
    assert harmonic(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(100)
    assert harmonic(torch.tensor([0.8, 0.5, 0.2])) == pytest.approx(300 / (1.25 + 2 + 1.25))


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(1e-3, 1e3), offset=st.floats(-5, 5))
def test_neither_scale_nor_offset_of_the_map_matters(classifiers, scale, offset):
    x = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y, curved = torch.tensor([0, 1]), classifiers["curved"]
    plain = case_of(curved, gradient, x, y)
    moved = case_of(curved, lambda *a: scale * gradient(*a) + offset, x, y)
    for one in (adcc(), coherency(), complexity()):
        torch.testing.assert_close(one(plain), one(moved), rtol=1e-6, atol=1e-6)


def test_it_depends_on_neither_batch_nor_order(curved, x):
    for one in (adcc(), coherency(), complexity(), adcc(average="means")):
        whole = one(case_of(curved, grad_cam, x, Y))
        alone = torch.cat([one(case_of(curved, grad_cam, x[i : i + 1], Y[i : i + 1])) for i in range(3)])
        torch.testing.assert_close(alone, whole, rtol=0, atol=1e-9)
        turned = one(case_of(curved, grad_cam, x.flip(0), Y.flip(0))).flip(0)
        torch.testing.assert_close(turned, whole, rtol=0, atol=1e-9)


def test_what_is_wrong_is_said(plain):
    with pytest.raises(LookupError, match="no average called 'mean'; did you mean means"):
        adcc(average="mean")
    for metric in (adcc, coherency, complexity):
        with pytest.raises(ValueError, match="expected scored='label' or scored='predicted', got 'second'"):
            metric(scored="second")
