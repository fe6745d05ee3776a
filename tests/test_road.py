"""ROAD: removed pixels imputed by plain relaxation, images that are linear in position, and Quantus' imputation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from sightline.classifier import Classifier
from sightline.data import Sample, collate
from sightline.erase import mix, noisy_linear
from sightline.evaluation import measure
from sightline.metrics import Case, road

REFERENCE = json.loads((Path(__file__).parent / "data" / "quantus.json").read_text())
H, W = 12, 16
NEIGHBORS = {(i, j): 1 / 6 if 0 in (i, j) else 1 / 12 for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)}


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(classifier, x, saliency, y=None):
    with torch.no_grad():
        logits = classifier(x)
    y = logits.argmax(1) if y is None else y
    batch = collate([Sample(f"i{i}", image, int(label)) for i, (image, label) in enumerate(zip(x, y, strict=True))])
    return Case(classifier, x, y, saliency, saliency, classifier, batch, logits)


def relaxed(plane, kept, rounds=6000):
    """Replace removed pixels by the weighted mean of their neighbors, again and again."""
    h, w = kept.shape
    u = [[float(plane[i, j]) if kept[i, j] else 0.5 for j in range(w)] for i in range(h)]
    removed = [(i, j) for i in range(h) for j in range(w) if not kept[i, j]]
    for _ in range(rounds):
        change = 0.0
        for i, j in removed:
            near = [(i + di, j + dj, v) for (di, dj), v in NEIGHBORS.items() if 0 <= i + di < h and 0 <= j + dj < w]
            mean = sum(v * u[a][b] for a, b, v in near) / sum(v for _, _, v in near)
            change, u[i][j] = max(change, abs(mean - u[i][j])), mean
        if change < 1e-13:
            break
    return u


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
def test_each_removed_pixel_is_the_weighted_mean_of_its_neighbors(share):
    x, kept = noise(2, 3, 7, 9), (noise(2, 1, 7, 9, seed=1) > share).double()
    found = noisy_linear(x, kept, noise=0.0)
    for n in range(2):
        for c in range(3):
            expected = torch.tensor(relaxed(x[n, c], kept[n, 0]), dtype=torch.float64)
            torch.testing.assert_close(found[n, c], expected, rtol=0, atol=1e-8)


def test_an_image_that_is_linear_in_position_is_imputed_exactly_inside():
    rows, columns = torch.meshgrid(torch.arange(30.0).double(), torch.arange(40.0).double(), indexing="ij")
    x = torch.stack([0.1 + 0.01 * rows + 0.015 * columns, 0.9 - 0.02 * rows, 0.02 * columns])[None]
    kept = torch.ones(1, 1, 30, 40).double()
    kept[:, :, 1:-1, 1:-1] = (noise(28, 38) > 0.9).double()
    torch.testing.assert_close(noisy_linear(x, kept, noise=0.0), x, rtol=0, atol=1e-10)
    kept[:, :, 1:-1, 1:-1] = 0
    torch.testing.assert_close(noisy_linear(x, kept, noise=0.0), x, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(arrays(np.bool_, (2, 1, 5, 6)), st.integers(0, 9))
def test_imputed_values_stay_between_those_kept_and_batches_do_not_matter(kept, seed):
    x, mask = noise(2, 3, 5, 6, seed=seed), torch.from_numpy(kept).double()
    found = noisy_linear(x, mask, noise=0.0)
    for n in range(2):
        torch.testing.assert_close(noisy_linear(x[n : n + 1], mask[n : n + 1], noise=0.0)[0], found[n])
        if kept[n].any():
            shown = x[n, :, kept[n, 0]]
            assert (found[n] <= shown.amax(1)[:, None, None] + 1e-9).all()
            assert (found[n] >= shown.amin(1)[:, None, None] - 1e-9).all()
            assert torch.equal(found[n, :, kept[n, 0]], shown), "what is kept is not touched"


def test_noise_is_small_gaussian_seeded_and_the_same_for_every_image():
    x, kept = torch.full((2, 3, 60, 60), 0.5), torch.zeros(2, 1, 60, 60)
    kept[:, :, 0] = 1
    found = noisy_linear(x, kept) - 0.5
    assert (found[:, :, 0] == 0).all()
    assert found[:, :, 1:].std().item() == pytest.approx(0.01, rel=0.05)
    assert found[:, :, 1:].mean().item() == pytest.approx(0, abs=5e-4)
    torch.testing.assert_close(found[0], found[1])
    assert torch.equal(noisy_linear(x, kept), noisy_linear(x, kept, seed=0))
    assert not torch.equal(noisy_linear(x, kept), noisy_linear(x, kept, seed=1))
    assert noisy_linear(x, kept).dtype == torch.float32
    doubled = noisy_linear(x.double(), kept.double(), noise=0.02) - 0.5
    torch.testing.assert_close(doubled, 2 * (noisy_linear(x.double(), kept.double()) - 0.5), rtol=0, atol=1e-12)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    noisy_linear(noise(1, 3, 4, 4), torch.zeros(1, 1, 4, 4).double())
    assert torch.equal(torch.get_rng_state(), state)


def test_all_or_nothing_removed():
    x = noise(1, 3, 6, 5)
    assert torch.equal(noisy_linear(x, torch.ones(1, 1, 6, 5).double()), x)
    empty = noisy_linear(x, torch.zeros(1, 1, 6, 5).double(), noise=0.0)
    torch.testing.assert_close(empty, x.mean((2, 3), keepdim=True).expand_as(x))
    dot = noise(1, 3, 1, 1)
    torch.testing.assert_close(noisy_linear(dot, torch.zeros(1, 1, 1, 1).double(), noise=0.0), dot)
    for size in ((1, 9), (9, 1)):
        line, kept = noise(1, 1, *size), torch.ones(1, 1, *size).double()
        kept.view(-1)[1:-1] = 0
        ends = line.flatten()[0], line.flatten()[-1]
        expected = torch.linspace(ends[0].item(), ends[1].item(), 9, dtype=torch.float64).view_as(line)
        torch.testing.assert_close(noisy_linear(line, kept, noise=0.0), expected, rtol=0, atol=1e-10)


def test_it_is_an_eraser():
    x, kept = noise(2, 3, H, W), (noise(2, 1, H, W, seed=1) > 0.5).double()
    torch.testing.assert_close(mix(x, kept, noisy_linear), noisy_linear(x, kept))
    soft = torch.where(kept > 0, 0.51, 0.5)
    assert torch.equal(noisy_linear(x, soft), noisy_linear(x, kept)), "kept is what is above a half"


def slow(classifier, image, saliency, label, share, sign, noise_, seed):
    values = saliency.flatten().tolist()
    order = sorted(range(H * W), key=lambda p: (-sign * values[p], p))
    kept = torch.ones(H * W).double()
    for p in order[: round(share * H * W)]:
        kept[p] = 0
    seen = noisy_linear(image[None], kept.view(1, 1, H, W), noise=noise_, seed=seed)
    with torch.no_grad():
        return 100.0 * (int(classifier(seen)[0].argmax()) == label)


@pytest.mark.parametrize("order", ["most", "least"])
def test_slow_loop_over_images_and_shares(curved, order):
    x, saliency, y = noise(6, 3, H, W), noise(6, 1, H, W, seed=1).mul(6).floor() / 6, torch.arange(6) % 5
    shares, settings = (0.13, 0.5, 0.9), {"noise": 0.05, "seed": 4}
    y = torch.where(torch.arange(6) < 4, case(curved, x, saliency).y, y)
    measured = road(shares=shares, order=order, **settings)
    found = measured(case(curved, x, saliency, y))
    for i in range(6):
        expected = [
            slow(curved, x[i], saliency[i, 0], int(y[i]), k, 1 if order == "most" else -1, 0.05, 4) for k in shares
        ]
        assert found[i].tolist() == expected
        assert measured.finish(found[i]).item() == pytest.approx(sum(expected) / 3)
    assert measured.higher_is_better == (order == "least")
    assert measured.axis == shares
    assert measured.scored == "label"
    assert 0 < found.mean() < 100


class Bright(nn.Module):
    """Class 1 where the brightest pixel is above a half, class 0 elsewhere."""

    def forward(self, x):
        top = x.amax((1, 2, 3))
        return torch.stack([0.5 - top, top - 0.5], 1)


def test_a_map_that_finds_the_only_cue_is_best_both_ways():
    """The bright pixel is the first to go (and its neighbors do not give it away) or the last."""
    x, saliency = torch.zeros(1, 3, H, W), torch.zeros(1, 1, H, W).double()
    x[:, :, 4, 5], saliency[:, :, 4, 5] = 1, 1
    one = case(Classifier(Bright(), "", size=(H, W)), x, saliency, torch.tensor([1]))
    assert (road()(one) == 0).all()
    assert (road(order="least")(one) == 100).all()


@settings(deadline=None, max_examples=8)
@given(chunk=st.integers(1, 40), order=st.sampled_from(["most", "least"]))
def test_batch_order_and_chunk_do_not_matter(classifiers, chunk, order):
    x, saliency = noise(4, 3, H, W), noise(4, 1, H, W, seed=1)
    settings = {"shares": (0.2, 0.6), "order": order}
    together = road(**settings)(case(classifiers["curved"], x, saliency))
    turned = road(**settings, chunk=chunk)(case(classifiers["curved"], x.flip(0), saliency.flip(0)))
    assert torch.equal(turned.flip(0), together)
    assert set(together.unique().tolist()) <= {0.0, 100.0}


def test_through_measure_there_is_a_curve_and_its_mean(curved):
    x, saliency = noise(4, 3, 24, 32), noise(4, 1, 24, 32, seed=1)
    batch = collate([Sample(f"i{i}", image, i) for i, image in enumerate(x)])
    found = measure(lambda c, x, y=None: saliency, curved, [batch], {"road": road(shares=[0.5, 1.0])}).scores[0]
    assert found.axis == (0.5, 1.0)
    assert found.value == pytest.approx(sum(found.curve) / 2)
    assert len(found.per_image) == 4


def test_what_is_wrong_is_said(plain):
    for shares in ((), (0.0,), (0.1, 1.5)):
        with pytest.raises(ValueError, match=r"expected shares in \(0, 1\], at least one, and chunk >= 1, got shares="):
            road(shares=shares)
    with pytest.raises(ValueError, match=r"expected noise >= 0, got -0\.1"):
        road(noise=-0.1)
    with pytest.raises(ValueError, match="expected order='most' or order='least', got 'morf'"):
        road(order="morf")
    with pytest.raises(ValueError, match="expected scored='label'"):
        road(scored="second")


# Quantus


def test_quantus_imputes_the_same_values():
    x = torch.from_numpy(np.random.default_rng(1).random((6, 1, 24, 24)).astype(np.float32))[:1]
    a = np.random.default_rng(2).random((6, 1, 24, 24)).astype(np.float32)[0]
    order = np.argsort(-a.ravel(), kind="stable")
    for share, values in REFERENCE["noisy_linear_imputation"].items():
        kept = torch.ones(576)
        kept[torch.from_numpy(order[: round(float(share) * 576)])] = 0
        found = noisy_linear(x.double(), kept.view(1, 1, 24, 24).double(), noise=0.0)
        torch.testing.assert_close(found[0, 0], torch.tensor(values).double().view(24, 24), rtol=0, atol=1e-6)


class Tiny(nn.Module):
    """The network of `benchmarks/quantus_values.py`, by its recipe."""

    def __init__(self, channels, size):
        super().__init__()
        rng = np.random.default_rng(0)
        self.size = size
        self.conv, self.head = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(4 * size * size, 3, bias=False)
        for values in (self.conv.weight, self.conv.bias, self.head.weight):
            values.data = torch.from_numpy(rng.standard_normal(tuple(values.shape)).astype(np.float32))

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1)) / (2 * self.size)


def rows(channels):
    return [row for row in REFERENCE["rows"] if row["metric"] == "ROAD" and row["channels"] == channels]


def test_quantus_counts_the_same_accuracy_on_gray_images():
    x = torch.from_numpy(np.random.default_rng(1).random((6, 1, 24, 24)).astype(np.float32))
    a = torch.from_numpy(np.random.default_rng(2).random((6, 1, 24, 24)).astype(np.float32))
    one = case(Classifier(Tiny(1, 24), "conv", size=(24, 24), channels=1), x, a)
    row = next(row for row in rows(1) if row["settings"]["noise"] == 0)
    found = road(shares=(0.1, 0.3, 0.5, 0.7, 0.9), noise=0.0)(one).mean(0)
    assert found.tolist() == pytest.approx([100 * row["values"][str(k)] for k in (10, 30, 50, 70, 90)])
    assert found.min() < 100


def test_quantus_cannot_remove_pixels_of_color_images():
    """It sorts all channels' copies of the map, and looks up their places among the pixels of one channel."""
    assert "out of bounds for axis 0 with size 576" in rows(3)[0]["raised"]
