"""Minimality and representativeness: slow loops over one image, known answers, guards."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from sightline import erase as fillings
from sightline.classifier import Classifier, logit, probability
from sightline.data import Sample, collate
from sightline.evaluation import measure
from sightline.maps import blur
from sightline.methods import grad_cam
from sightline.metrics import METRICS, Case, minimality, representativeness
from sightline.metrics._minimality import normalized, outside
from sightline.metrics._representativeness import deletion_curve

H, W = 12, 16


class Spot(nn.Module):
    """Class 0 leads by the brightness of a rectangle, 12 where it is white and -12 where it is black."""

    def __init__(self, x0=4, y0=3, x1=10, y1=7):
        super().__init__()
        self.rows, self.columns, self.sizes = slice(y0, y1), slice(x0, x1), []

    def forward(self, x):
        self.sizes.append(len(x))
        z = 24 * x[:, :, self.rows, self.columns].mean((1, 2, 3)) - 12
        return torch.stack([z, torch.zeros_like(z)], 1)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(classifier, x, saliency, y=None):
    y = torch.zeros(len(x), dtype=torch.long) if y is None else y
    batch = collate([Sample(f"i{i}", image, 0) for i, image in enumerate(x)])
    with torch.no_grad():
        return Case(classifier, x, y, saliency, saliency, grad_cam, batch, classifier(x))


def spot():
    return Classifier(Spot(), "", size=(H, W))


def white(count=1):
    return torch.ones(count, 3, H, W, dtype=torch.float64)


def rectangle(x0, y0, x1, y1):
    saliency = torch.zeros(1, 1, H, W, dtype=torch.float64)
    saliency[..., y0:y1, x0:x1] = 1
    return saliency


def read(classifier, image, label, score=probability):
    with torch.no_grad():
        return float(score(classifier(image[None]).double(), torch.tensor([label])))


def slow_minimality(classifier, image, saliency, label, level, filling, steps=100, score=probability):
    """Erase box after box, pixel by pixel."""
    h, w = saliency.shape
    rows = saliency.tolist()
    values = [v for row in rows for v in row]
    whole, erased = read(classifier, image, label, score), read(classifier, filling, label, score)
    best = 1.0
    for step in range(steps):
        low = min(values)
        bound = step / steps * (max(values) - low)
        kept = [(i, j) for i in range(h) for j in range(w) if rows[i][j] - low >= bound]
        (y0, x0), (y1, x1) = (tuple(f(axis) for axis in zip(*kept, strict=True)) for f in (min, max))
        seen = image.clone()
        for i in range(y0, y1 + 1):
            for j in range(x0, x1 + 1):
                seen[:, i, j] = filling[:, i, j]
        left = (read(classifier, seen, label, score) - erased) / (whole - erased)
        if whole > erased and 1 - left >= level:
            best = min(best, (y1 - y0 + 1) * (x1 - x0 + 1) / (h * w))
    return best


def slow_curve(classifier, image, saliency, label, filling, steps, sigma, score=probability):
    """Delete where the paper's mask is below alpha."""
    smoothed = blur(saliency[None, None], sigma)[0, 0]
    scaled = (smoothed - smoothed.min()) / (smoothed.max() - smoothed.min())
    mask = 1 - scaled
    whole, erased = read(classifier, image, label, score), read(classifier, filling, label, score)
    curve = []
    for step in range(steps):
        seen = image.clone()
        for i in range(image.shape[1]):
            for j in range(image.shape[2]):
                if float(mask[i, j]) < step / steps:
                    seen[:, i, j] = filling[:, i, j]
        curve.append((read(classifier, seen, label, score) - erased) / (whole - erased) if whole > erased else 1.0)
    return curve


@pytest.fixture
def sure(curved):
    """A network whose probabilities move."""
    with torch.no_grad():
        curved.model.head.weight *= 30
    return curved


@pytest.fixture
def shown(sure, x):
    """Images with smooth maps, scored for the class whose probability blurring lowers most."""
    saliency = blur(noise(3, 1, 24, 32, seed=5), 3.0)
    low, high = saliency.amin((2, 3), keepdim=True), saliency.amax((2, 3), keepdim=True)
    with torch.no_grad():
        lost = sure(x).softmax(1) - sure(fillings.blur(x, saliency)).softmax(1)
    return case(sure, x, (saliency - low) / (high - low), lost.argmax(1))


@pytest.mark.parametrize("erase", ["blur", "black", "noise"])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_minimality_is_slow_loops(erase, level, shown):
    found = minimality(level=level, erase=erase, steps=30)(shown)[:, 0]
    filling = fillings.ERASERS[erase](shown.x, shown.saliency)
    for n in range(3):
        one = shown.x[n], shown.saliency[n, 0], int(shown.y[n]), level, filling[n], 30
        assert found[n].item() == pytest.approx(slow_minimality(shown.classifier, *one), abs=1e-12)
    if erase == "blur":
        assert found.min() < 1


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95, 0.99, 1.0])
def test_a_map_of_the_evidence_needs_its_own_box(level):
    one = case(spot(), white(), rectangle(4, 3, 10, 7))
    assert minimality(level=level, erase="black")(one).item() == 24 / (H * W)


def test_a_map_beside_the_evidence_needs_the_whole_image():
    one = case(spot(), white(), rectangle(0, 8, 3, 11))
    assert minimality(erase="black")(one).item() == 1


def test_a_box_around_far_off_peaks_is_larger():
    one = case(spot(), white(), rectangle(4, 3, 10, 7).maximum(rectangle(15, 11, 16, 12)))
    assert minimality(erase="black")(one).item() == (16 - 4) * (12 - 3) / (H * W)


def test_the_peak_that_is_enough_counts_and_higher_levels_never_need_less(shown):
    saliency = 0.5 * rectangle(2, 1, 14, 11) + 0.5 * rectangle(4, 3, 10, 7)
    assert minimality(erase="black")(case(spot(), white(), saliency)).item() == 24 / (H * W)
    areas = [minimality(level=level)(shown) for level in (0.3, 0.6, 0.8, 0.9, 0.99)]
    assert all(bool((a <= b).all()) for a, b in pairwise(areas))
    assert bool((areas[0] < areas[-1]).any())


def test_a_score_that_has_nothing_to_lose_needs_the_whole_image():
    black, gray = torch.zeros_like(white()), 0.5 * white()
    assert minimality(erase="black")(case(spot(), black, rectangle(4, 3, 10, 7))).item() == 1
    rises = minimality(erase=lambda x, saliency: torch.ones_like(x))
    assert rises(case(spot(), gray, rectangle(4, 3, 10, 7))).item() == 1
    assert representativeness(erase="black")(case(spot(), black, rectangle(4, 3, 10, 7))).tolist() == [[1.0] * 20]


def test_normalized_scores():
    p = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.2, 0.2], [0.3, 0.4, 0.5]]).double()
    start, end = torch.tensor([0.9, 0.2, 0.3]).double(), torch.tensor([0.1, 0.2, 0.5]).double()
    expected = torch.tensor([[1, 0.5, 0], [1, 1, 1], [1, 1, 1]]).double()
    torch.testing.assert_close(normalized(p, start, end), expected)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_map_is_the_whole_image_and_deletes_nothing(value):
    one = case(spot(), white(), torch.full((1, 1, H, W), value, dtype=torch.float64))
    assert minimality(erase="black")(one).item() == 1
    torch.testing.assert_close(representativeness(erase="black")(one), torch.ones(1, 20).double())


def test_equal_boxes_are_scored_once_and_levels_share_the_work():
    classifier = spot()
    one = case(classifier, white(2), torch.cat([rectangle(4, 3, 10, 7), rectangle(0, 0, 5, 5)]))
    classifier.model.sizes.clear()
    for level in (0.8, 0.9, 0.95, 0.99):
        minimality(level=level, erase="black")(one)
    assert sum(classifier.model.sizes) == 2 * 2 + 2, "two boxes an image, and the wholly erased images"


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("metric", [minimality, representativeness])
def test_chunks_bound_the_batch_and_change_nothing(metric, chunk, shown):
    sizes = []
    handle = shown.classifier.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    found = metric(chunk=chunk)(shown)
    handle.remove()
    torch.testing.assert_close(found, metric()(shown), rtol=0, atol=1e-9)
    assert max(sizes) <= max(chunk, 3), "the wholly erased images are one batch"


@pytest.mark.parametrize("metric", [minimality, representativeness])
def test_an_image_does_not_depend_on_its_batch_and_maps_count_up_to_scale(metric, shown):
    together = metric()(shown)
    for n in range(3):
        i = slice(n, n + 1)
        alone = metric()(case(shown.classifier, shown.x[i], shown.saliency[i], shown.y[i]))
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-9)
    half = metric()(case(shown.classifier, shown.x, 0.5 * shown.saliency + 0.25, shown.y))
    torch.testing.assert_close(half, together, rtol=0, atol=1e-9)


@pytest.mark.parametrize("metric", [minimality, representativeness])
def test_a_filling_made_once_is_that_made_every_time(metric, shown):
    for name in ("black", "blur", "noise"):
        torch.testing.assert_close(
            metric(erase=name)(shown), metric(erase=fillings.ERASERS[name])(shown), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("metric", [minimality, representativeness])
def test_a_filling_that_looks_at_the_mask_gets_what_is_kept(metric):
    kept = []

    def look(x, saliency):
        kept.append(saliency)
        return torch.zeros_like(x)

    chosen = {"smooth": 0.0} if metric is representativeness else {}
    one = case(spot(), white(), rectangle(4, 3, 10, 7))
    torch.testing.assert_close(metric(erase=look, **chosen)(one), metric(erase="black", **chosen)(one))
    outside_of_it = 1 - rectangle(4, 3, 10, 7)
    assert any(bool((mask == outside_of_it).all()) for masks in kept for mask in masks)


def test_the_pixels_outside_of_half_open_boxes():
    found = outside(torch.tensor([[1, 0, 3, 2], [0, 0, 4, 3]]), (3, 4))
    assert found[0, 0].int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    assert not found[1].any()


# Representativeness


@pytest.mark.parametrize("erase", ["blur", "mean", "noise"])
def test_the_deletion_curve_is_slow_loops(erase, shown):
    sigma = 10 * math.sqrt(24 * 32) / 224
    curve = deletion_curve(shown, erase=erase)
    filling = fillings.resolve(erase, shown.classifier.mean)(shown.x, shown.saliency)
    for n in range(3):
        one = shown.x[n], shown.saliency[n, 0], int(shown.y[n]), filling[n]
        expected = slow_curve(shown.classifier, *one, 20, sigma)
        torch.testing.assert_close(curve[n], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    metric = representativeness(erase=erase)
    torch.testing.assert_close(metric(shown), curve.clamp(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(metric.finish(metric(shown)), curve.clamp(0, 1).mean(1))


def test_the_curve_falls_where_the_evidence_goes_first():
    metric = partial(representativeness, erase="black", smooth=0.0)
    curve = metric()(case(spot(), white(), rectangle(4, 3, 10, 7)))[0]
    assert curve[0] == pytest.approx(1)
    assert curve[1:].abs().max() < 1e-9
    against = metric()(case(spot(), white(), 1 - rectangle(4, 3, 10, 7)))[0]
    torch.testing.assert_close(against, torch.ones(20).double())


def test_deletion_goes_from_the_peak_down():
    ramp = torch.linspace(0, 1, W, dtype=torch.float64).expand(1, 1, H, W)
    gray = Classifier(Spot(0, 0, W, H), "", size=(H, W))
    curve = deletion_curve(case(gray, white(), ramp), erase="black", smooth=0.0, score=logit, steps=15)[0]
    kept = [sum(1 - j / (W - 1) >= step / 15 for j in range(W)) / W for step in range(15)]
    torch.testing.assert_close(curve, torch.tensor(kept).double(), rtol=0, atol=1 / W + 1e-9)
    assert bool((curve.diff() <= 0).all())
    assert curve[-1] < 0.2


def test_both_are_metrics_of_the_catalogue(pooled, x):
    assert METRICS["minimality"].metric is minimality
    assert METRICS["representativeness"].metric is representativeness
    for name, metric in (("minimality", minimality()), ("representativeness", representativeness())):
        assert METRICS[name].higher_is_better == metric.higher_is_better is False
        assert metric.scored == "label"
    assert representativeness().width == 20
    assert bool(METRICS["representativeness"].axis)
    batch = collate([Sample(f"i{i}", image, i) for i, image in enumerate(x)])
    metrics = {"minimality": minimality(steps=5), "representativeness": representativeness(steps=4)}
    scores = measure(grad_cam, pooled, [batch], metrics)
    area, left = scores.scores
    assert len(area.per_image) == len(left.per_image) == 3
    assert len(left.curve) == 4
    assert left.value == pytest.approx(sum(left.curve) / 4)
    assert all(0 < one <= 1 for one in (*area.per_image, *left.per_image))


@pytest.mark.parametrize(
    ("metric", "chosen", "message"),
    [
        (minimality, {"level": 0.0}, r"expected level in \(0, 1\], .*, got level=0.0"),
        (minimality, {"level": 90.0}, "got level=90.0"),
        (minimality, {"steps": 0}, "steps=0"),
        (minimality, {"chunk": 0}, "chunk=0"),
        (minimality, {"scored": "both"}, "expected scored='label' or scored='predicted', got 'both'"),
        (representativeness, {"steps": 0}, "expected steps >= 1, .*, got steps=0"),
        (representativeness, {"smooth": -1.0}, "smooth=-1.0"),
        (representativeness, {"chunk": 0}, "chunk=0"),
        (representativeness, {"scored": "both"}, "got 'both'"),
    ],
)
def test_wrong_settings_are_errors(metric, chosen, message, plain):
    with pytest.raises(ValueError, match=message):
        metric(**chosen)
