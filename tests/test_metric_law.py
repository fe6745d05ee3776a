"""The law of metrics: one set of tests over every entry of METRICS.

The numbers depend neither on the batches, nor on the order, nor on the number of processes; a map that shows nothing is
scored; the classifier, the images and the global random state are as before.
"""

import copy
import math
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from sightline.classifier import wrap
from sightline.data import batches
from sightline.datasets import creatures
from sightline.evaluation import Maps, measure, measured
from sightline.metrics import METRICS
from sightline.pieces import cut, joined, packed
from sightline.runs import Choice

NAMES = list(METRICS)
COUNT = 7

QUICK = {
    "insertion": {"steps": 8},
    "deletion": {"steps": 8, "ties": "random"},
    "mass": {"on": "object"},
    "minimality": {"steps": 5},
    "representativeness": {"steps": 4},
    "max_sensitivity": {"samples": 2},
    "infidelity": {"samples": 5},
    "road": {"shares": [0.3, 0.8]},
    "aopc": {"steps": 4},
    "pointing_game": {"tolerance": 3.0},
}
"""Settings that make a metric cheap enough for the law."""


def look(classifier, x, y=None, /):
    """A method whose maps depend on the image and the class, and have no ties."""
    cells = torch.nn.functional.adaptive_avg_pool2d(x, 8)
    weights = torch.stack([1 + y.to(x.dtype), 2 - 0.1 * y, 0.5 * y + 1], 1)[:, :, None, None]
    return (cells * weights).sum(1, keepdim=True).sin()


@pytest.fixture(scope="module")
def scene(networks, seeded):
    """Samples that have every annotation, and a network that is right about some of them."""
    dataset = creatures("test", count=COUNT, variant="scenes", seed=3)
    samples = [dataset[i] for i in range(COUNT)]
    samples = [copy.copy(one) for one in samples]
    for one in samples:
        object.__setattr__(one, "image", one.image.double())
    model = seeded(networks.pooled, classes=20, seed=7)
    return wrap(model, layer="last", normalization="imagenet", size=64), samples


def scored(name, scene, size=3, order=None, method=look):
    classifier, samples = scene
    chosen = samples if order is None else [samples[i] for i in order]
    one = METRICS[name](**QUICK.get(name, {}))
    return measure(method, classifier, batches(chosen, size), {name: one}, explain="scored").scores[0]


def same(a, b, tolerance=1e-9):
    return (math.isnan(a) and math.isnan(b)) or a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def known(scene):
    return {name: scored(name, scene) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_number_is_one_and_says_its_direction(name, known):
    found = known[name]
    assert math.isfinite(found.value)
    assert found.higher_is_better is METRICS[name].higher_is_better
    assert 0 < found.count <= COUNT
    assert len(found.curve) == 0 or METRICS[name].axis
    assert not found.axis or len(found.axis) == len(found.curve)


@pytest.mark.parametrize("name", NAMES)
def test_batches_do_not_matter(name, scene, known):
    for size in (1, COUNT):
        found = scored(name, scene, size)
        assert same(found.value, known[name].value)
        assert found.count == known[name].count
        assert all(same(a, b) for a, b in zip(found.per_image, known[name].per_image, strict=True))
        assert all(same(a, b) for a, b in zip(found.curve, known[name].curve, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_order_does_not_matter(name, scene, known):
    order = [3, 0, 6, 2, 5, 1, 4]
    found = scored(name, scene, order=order)
    assert same(found.value, known[name].value)
    if found.per_image:
        assert all(same(a, known[name].per_image[i]) for a, i in zip(found.per_image, order, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_bytes_and_leaves_no_trace(name, scene, known):
    classifier, samples = scene
    before = copy.deepcopy(classifier.model.state_dict())
    images = [one.image.clone() for one in samples]
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    again = scored(name, scene)
    assert pickle.dumps((again.value, again.per_image, again.curve)) == pickle.dumps(
        (known[name].value, known[name].per_image, known[name].curve)
    )
    assert all(torch.equal(value, before[key]) for key, value in classifier.model.state_dict().items())
    assert all(torch.equal(one.image, image) for one, image in zip(samples, images, strict=True))
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert not classifier.model.training


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 0.7])
def test_a_map_that_shows_nothing_is_scored(name, value, scene):
    def nothing(classifier, x, y=None, /):
        return torch.full((len(x), 1, 4, 4), value, dtype=x.dtype)

    found = scored(name, scene, method=nothing)
    assert not math.isinf(found.value)
    if not math.isfinite(value):
        assert same(found.value, scored(name, scene, method=lambda c, x, y=None, /: x.new_zeros(len(x), 1, 4, 4)).value)


@pytest.fixture(scope="module")
def met(scene):
    """All metrics of images in pieces that several processes measured, each with maps and sums of its own."""
    classifier, samples = scene
    metrics = {name: METRICS[name](**QUICK.get(name, {})) for name in NAMES}

    def part(piece):
        mine = batches(samples, 2, piece)
        return packed(measured(Maps(look), classifier, mine, metrics, "scored", start=piece.start), {})

    found = {piece: part(piece) for piece in reversed(list(cut(COUNT, 2)))}
    scores = joined((found[piece] for piece in cut(COUNT, 2)), metrics, classifier).scores()
    return {score.metric.name: score for score in scores.scores}


@pytest.mark.parametrize("name", NAMES)
def test_processes_do_not_matter(name, met, scene):
    assert pickle.dumps(met[name]) == pickle.dumps(replace(scored(name, scene, 2), metric=Choice(name)))
