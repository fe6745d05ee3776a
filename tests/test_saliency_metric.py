"""The saliency metric: box, crop and logarithms by hand."""

import math
from collections import deque
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sightline.classifier import Classifier, wrap
from sightline.data import Sample, collate
from sightline.evaluation import measure
from sightline.maps import unit
from sightline.metrics import Case, saliency_metric

H, W = 8, 10


class Red(nn.Module):
    """Two classes; the logit of the second one is four times the mean red."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        red = 4 * x[:, 0].mean((1, 2)) + 0 * self.first(x).mean((1, 2, 3))
        return torch.stack([torch.zeros_like(red), red], 1)


RED = Classifier(Red().double(), "first", mean=(0.0,), std=(1.0,), size=(H, W))


def case(x, raw, y=1, network=RED):
    batch = collate([Sample(str(i), one, label=y) for i, one in enumerate(x)])
    with torch.no_grad():
        logits = network(x)
    return Case(network, x, batch.y, unit(raw), raw, network, batch, logits)


def image(red):
    return torch.stack([torch.as_tensor(red, dtype=torch.float64)] + [torch.zeros(H, W, dtype=torch.float64)] * 2)[None]


def score(x, raw, y=1, **settings):
    return saliency_metric(**settings)(case(x, raw, y))[:, 0].tolist()


def slow_box(values, alpha=1.0):
    """Flood the cells at or above the mean, and take the region with the most."""
    mean = sum(map(sum, values)) / (len(values) * len(values[0]))
    left = {(r, c) for r, row in enumerate(values) for c, v in enumerate(row) if v >= alpha * mean}
    best = []
    for start in sorted(left):
        region, queue = [], deque([start])
        while queue:
            r, c = queue.popleft()
            if (r, c) in left:
                left.remove((r, c))
                region.append((r, c))
                queue += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
        best = region if len(region) > len(best) else best
    if not best:
        return 0, 0, len(values[0]), len(values)
    rows, columns = zip(*best, strict=True)
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def log_softmax(red):
    return 4 * red - math.log(1 + math.exp(4 * red))


def test_a_small_box_that_keeps_the_class_is_worth_its_area():
    red, raw = torch.zeros(H, W), torch.zeros(1, 1, H, W, dtype=torch.float64)
    red[2:5, 3:7] = 1
    raw[0, 0, 2:5, 3:7] = 1
    raw[0, 0, 7, 0] = 1  # a smaller region far away, touching nothing
    raw[0, 0, 5, 7] = 1  # and one that touches by a corner alone
    x, area = image(red), math.log(12 / 80)
    assert score(x, raw) == pytest.approx([area - log_softmax(1.0)], abs=1e-12)
    assert score(x, raw, p_on="image") == pytest.approx([area - log_softmax(12 / 80)], abs=1e-12)
    assert score(x, raw, y=0) == pytest.approx([area - (log_softmax(1.0) - 4)], abs=1e-12)


def test_the_area_is_at_least_a_twentieth_and_the_box_still_small():
    red, raw = torch.zeros(H, W), torch.zeros(1, 1, H, W, dtype=torch.float64)
    red[2, 3] = raw[0, 0, 2, 3] = 1
    assert score(image(red), raw) == pytest.approx([math.log(0.05) - log_softmax(1.0)], abs=1e-12)
    assert score(image(red), raw, least=0.5) == pytest.approx([math.log(0.5) - log_softmax(1.0)], abs=1e-12)
    assert score(image(red), raw, least=0.001) == pytest.approx([math.log(1 / 80) - log_softmax(1.0)], abs=1e-12)


def test_a_map_that_shows_nothing_boxes_the_whole_image():
    x = torch.rand(1, 3, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = [-log_softmax(float(x[0, 0].mean()))]
    flat = torch.full((1, 1, H, W), 0.4, dtype=torch.float64)
    for settings_ in ({}, {"p_on": "image"}, {"rule": "value", "alpha": 0.5}, {"rule": "energy", "alpha": 0.5}):
        assert score(x, flat, **settings_) == pytest.approx(whole, abs=1e-12)
    lonely = torch.rand(1, 1, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert score(x, lonely, alpha=50.0) == pytest.approx(whole, abs=1e-12), "nothing is left"
    assert score(x, lonely, rule="energy", alpha=0.0) == pytest.approx(whole, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0, 1.5]))
def test_the_box_is_that_of_the_largest_region_and_its_crop_is_scored(seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, H, W, generator=generator, dtype=torch.float64)
    raw = torch.rand(2, 1, H, W, generator=generator, dtype=torch.float64).square()
    expected = []
    for one, values in zip(x, unit(raw), strict=True):
        x0, y0, x1, y1 = slow_box(values[0].tolist(), alpha)
        crop = F.interpolate(one[None, :, y0:y1, x0:x1], (H, W), mode="bilinear", align_corners=False)
        area = (x1 - x0) * (y1 - y0) / (H * W)
        expected.append(math.log(max(0.05, area)) - log_softmax(float(crop[0, 0].mean())))
    assert score(x, raw, alpha=alpha) == pytest.approx(expected, abs=1e-9)
    assert [score(x[i : i + 1], raw[i : i + 1], alpha=alpha)[0] for i in (0, 1)] == pytest.approx(expected, abs=1e-9)
    assert min(expected) >= math.log(0.05)


def test_a_class_without_any_probability_has_a_finite_number():
    x = torch.ones(1, 3, H, W, dtype=torch.float64)
    loud = Classifier(nn.Sequential(RED.model, Times(500.0)), "0.first", mean=(0.0,), std=(1.0,), size=(H, W))
    found = saliency_metric()(case(x, torch.rand(1, 1, H, W).double(), 0, loud))
    assert math.isfinite(float(found))
    assert float(found) > 1900


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_the_predicted_class_can_be_scored(pooled, x):
    def red(classifier, images, y):
        return F.avg_pool2d(images[:, :1], 8)

    batch = collate([Sample(str(i), one, label=0) for i, one in enumerate(x)])
    metrics = {"label": saliency_metric(), "predicted": saliency_metric(scored="predicted")}
    scores = measure(red, pooled, [batch], metrics)
    predicted = replace(batch, y=torch.tensor(scores.predicted))
    again = measure(red, pooled, [predicted], {"label": saliency_metric()})
    assert scores["predicted"].per_image == pytest.approx(again["label"].per_image, abs=1e-12)
    assert scores["label"].per_image != pytest.approx(again["label"].per_image, abs=1e-3)
    assert scores["label"].higher_is_better is False


def test_an_image_of_one_pixel_is_its_own_box():
    tiny = wrap(nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), normalization="none", size=8)
    x = torch.rand(2, 3, 1, 1)
    found = saliency_metric()(case(x, torch.rand(2, 1, 1, 1), 3, tiny))[:, 0]
    torch.testing.assert_close(found, -tiny(x).double().log_softmax(1)[:, 3].detach())


def test_what_is_wrong_is_said(plain):
    with pytest.raises(LookupError, match="no input of the probability called 'crops'; did you mean crop"):
        saliency_metric(p_on="crops")
    with pytest.raises(LookupError, match="no threshold rule called 'median'"):
        saliency_metric(rule="median")
    with pytest.raises(ValueError, match=r"expected alpha in \[0, 1\] for rule 'value', got 2"):
        saliency_metric(rule="value", alpha=2.0)
    for least in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"expected least in \(0, 1\], a share of the image, got"):
            saliency_metric(least=least)
    with pytest.raises(ValueError, match="expected scored='label'"):
        saliency_metric(scored="second")
