"""Selectivity: the masking metrics over powers of the map, each power by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.data import Sample, collate
from sightline.evaluation import measure
from sightline.metrics import Case, average_drop, average_gain, average_increase, selectivity

EXPONENTS = (0.01, 0.05, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
OF = {"average_drop": average_drop, "average_increase": average_increase, "average_gain": average_gain}


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(classifier, x, saliency, y=None):
    y = torch.arange(len(x)) if y is None else y
    batch = collate([Sample(f"i{i}", image, 0) for i, image in enumerate(x)])
    with torch.no_grad():
        return Case(classifier, x, y, saliency, saliency, classifier, batch, classifier(x))


def slow(of, classifier, image, saliency, label, alpha):
    with torch.no_grad():
        seen = image.clone()
        for c in range(3):
            for i in range(image.shape[1]):
                for j in range(image.shape[2]):
                    seen[c, i, j] = float(image[c, i, j]) * float(saliency[0, i, j]) ** alpha
        p, o = (float(classifier(one[None]).softmax(1)[0, label]) for one in (image, seen))
    return {
        "average_drop": 100 * max(p - o, 0) / p,
        "average_increase": 100.0 * (o > p),
        "average_gain": 100 * max(o - p, 0) / (1 - p),
    }[of]


@pytest.mark.parametrize("of", OF)
def test_slow_loop_over_all_powers(curved, of):
    x, saliency = noise(2, 3, 12, 16), noise(2, 1, 12, 16, seed=1)
    measured = selectivity(of=of, exponents=(0.3, 1.0, 4.0))
    found = measured(case(curved, x, saliency))
    for i in range(2):
        expected = [slow(of, curved, x[i], saliency[i], i, alpha) for alpha in (0.3, 1.0, 4.0)]
        assert found[i].tolist() == pytest.approx(expected, abs=1e-9)
        assert measured.finish(found[i]).item() == pytest.approx(sum(expected) / 3, abs=1e-9)
    assert measured.axis == (0.3, 1.0, 4.0)
    assert measured.curve(found[0]).tolist() == found[0].tolist()


@pytest.mark.parametrize("of", OF)
def test_each_place_of_the_curve_is_the_plain_metric_at_that_power(curved, of):
    one = case(curved, noise(3, 3, 24, 32), noise(3, 1, 24, 32, seed=1))
    plain = torch.cat([OF[of](exponent=alpha)(one) for alpha in EXPONENTS], 1)
    assert torch.equal(selectivity(of=of)(one), plain)
    assert selectivity(of=of).axis == EXPONENTS
    assert selectivity(of=of).higher_is_better == OF[of]().higher_is_better
    assert selectivity(of=of).scored == "label"


def test_the_same_masked_images_serve_all_three(pooled):
    calls = []

    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pooled.model

        def forward(self, x):
            calls.append(len(x))
            return self.inner(x)

    classifier = type(pooled)(Counted(), "inner.last", mean=pooled.mean, std=pooled.std, size=(24, 32))
    one = case(classifier, noise(2, 3, 24, 32), noise(2, 1, 24, 32, seed=1))
    calls.clear()
    for of in OF:
        selectivity(of=of)(one)
    assert calls == [2] * 10


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 100), of=st.sampled_from(sorted(OF)), erase=st.sampled_from(["black", "mean", "blur"]))
def test_percent_and_not_a_matter_of_the_batch(classifiers, seed, of, erase):
    x, saliency = noise(3, 3, 24, 32, seed=seed), noise(3, 1, 24, 32, seed=seed + 1)
    measured = selectivity(of=of, erase=erase, exponents=(0.1, 1.0, 5.0))
    together = measured(case(classifiers["curved"], x, saliency))
    assert ((together >= 0) & (together <= 100)).all()
    for i in range(3):
        alone = measured(case(classifiers["curved"], x[i : i + 1], saliency[i : i + 1], torch.tensor([i])))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)


def test_maps_of_zeros_and_ones_have_no_powers(curved):
    x = noise(2, 3, 24, 32)
    hard = (noise(2, 1, 24, 32, seed=1) > 0.5).double()
    found = selectivity()(case(curved, x, hard))
    torch.testing.assert_close(found, found[:, :1].expand_as(found), rtol=0, atol=1e-9)
    for of in OF:
        assert (selectivity(of=of)(case(curved, x, torch.ones_like(hard))) == 0).all(), "the identity map"


def test_through_measure_there_is_a_curve_and_its_mean(pooled):
    x, saliency = noise(4, 3, 24, 32), noise(4, 1, 24, 32, seed=1)
    batch = collate([Sample(f"i{i}", image, i) for i, image in enumerate(x)])
    found = measure(lambda c, x, y=None: saliency, pooled, [batch], {"s": selectivity(exponents=[1.0, 2.0])}).scores[0]
    assert found.axis == (1.0, 2.0)
    assert len(found.curve) == 2
    assert found.value == pytest.approx(sum(found.curve) / 2)
    assert len(found.per_image) == 4


def test_what_is_wrong_is_said(plain):
    with pytest.raises(LookupError, match="no metric called 'average_drops'; did you mean average_drop"):
        selectivity(of="average_drops")
    with pytest.raises(ValueError, match=r"expected exponents > 0, at least one, got \(\)"):
        selectivity(exponents=())
    with pytest.raises(ValueError, match=r"expected exponents > 0, at least one, got \(1.0, 0.0\)"):
        selectivity(exponents=(1.0, 0.0))
    with pytest.raises(ValueError, match="expected scored='label'"):
        selectivity(scored="second")
