"""The masking metrics against torch-cam and pytorch-grad-cam: equal where they are right, pinned where they are not."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sightline.classifier import Classifier, probability
from sightline.data import Sample, batches, collate
from sightline.erase import mix, resolve
from sightline.evaluation import measure
from sightline.maps import resize, unit
from sightline.methods import grad_cam
from sightline.metrics import Case, average_drop, average_increase, deletion, insertion, pointing_game
from sightline.metrics._average import drop

torchcam = pytest.importorskip("torchcam")
gradcam = pytest.importorskip("pytorch_grad_cam")


@pytest.fixture
def samples():
    x = torch.rand(5, 3, 24, 32, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return [Sample(f"i{i}", image, i % 5) for i, image in enumerate(x)]


def scores(classifier, samples, **metrics):
    found = measure(grad_cam, classifier, batches(samples, 2), metrics)
    return {name: found[name].value for name in metrics}


def normalized(classifier, samples):
    return classifier.normalize(torch.stack([sample.image for sample in samples]))


@pytest.fixture
def extractor(pooled):
    from torchcam.methods import GradCAM

    with GradCAM(pooled.model, target_layer="last") as made:
        yield made


def test_torch_cam_s_drop_and_increase_are_of_another_map(pooled, samples, extractor):
    """Given a softmax it explains the probability, not the logit, and scales the map before it is enlarged.

    The formulas are ours with the mean color.
    """
    from torchcam.metrics import ClassificationMetric

    theirs = ClassificationMetric(extractor, partial(torch.softmax, dim=-1))
    for one in normalized(pooled, samples):
        theirs.update(one[None])
    x = torch.stack([sample.image for sample in samples])
    y = pooled.labels(x, None)
    mask = resize(unit(grad_cam(pooled, x, y, score=probability)), (24, 32))
    with torch.no_grad():
        p, o = (probability(pooled(one), y) for one in (x, mix(x, mask, resolve("mean", pooled.mean))))
    assert theirs.summary()["avg_drop"] == pytest.approx((drop(p, o) / 100).mean().item(), abs=1e-6)
    assert theirs.summary()["conf_increase"] == pytest.approx((o > p).double().mean().item(), abs=1e-12)
    settings = {"erase": "mean", "scored": "predicted"}
    ours = scores(pooled, samples, drop=average_drop(**settings), rise=average_increase(**settings))
    assert ours["drop"] / 100 != pytest.approx(theirs.summary()["avg_drop"], rel=0.01)


def test_torch_cam_without_a_softmax_takes_shares_of_logits(pooled, samples, extractor):
    """A share of a logit means nothing: a constant added to all logits changes it, and no probability."""
    from torchcam.metrics import ClassificationMetric

    drops = []
    for shift in (0.0, 5.0):
        with torch.no_grad():
            pooled.model.head.bias += shift
        theirs = ClassificationMetric(extractor)
        theirs.update(normalized(pooled, samples))
        drops.append(
            (theirs.summary()["avg_drop"], scores(pooled, samples, drop=average_drop(scored="predicted"))["drop"])
        )
    assert abs(drops[0][0] - drops[1][0]) > 0.05
    assert drops[0][1] == pytest.approx(drops[1][1], rel=1e-9)


def test_torch_cam_s_insertion_and_deletion_are_ours_on_its_substrate(pooled, samples, extractor):
    from torchcam.metrics import DeletionInsertionMetric

    theirs = DeletionInsertionMetric(extractor, partial(torch.softmax, dim=-1), steps=16)
    theirs.update(normalized(pooled, samples))
    settings = {"erase": "mean", "steps": 16}
    ours = scores(pooled, samples, up=insertion(**settings), down=deletion(**settings))
    summary = theirs.summary()
    names = {name: next(key for key in summary if key.startswith(name)) for name in ("insertion", "deletion")}
    assert summary[names["insertion"]] == pytest.approx(ours["up"], abs=2e-3)
    assert summary[names["deletion"]] == pytest.approx(ours["down"], abs=2e-3)


def test_pytorch_grad_cam_s_drop_is_no_share(pooled, samples):
    """Its DropInConfidence is [p - o]_+ itself; the metric divides by p."""
    from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    x = torch.stack([sample.image for sample in samples])
    y = pooled.labels(x, None)
    maps = torch.nn.functional.interpolate(grad_cam(pooled, x, y), (24, 32), mode="bilinear")
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    maps = (maps - low) / (high - low)
    theirs = DropInConfidence()(
        pooled.normalize(x),
        maps[:, 0].numpy(),
        [ClassifierOutputSoftmaxTarget(int(label)) for label in y],
        pooled.model,
    )
    with torch.no_grad():
        p = probability(pooled(x), y).numpy()
    shares = measure(grad_cam, pooled, batches(samples, 5), {"drop": average_drop(erase="mean", scored="predicted")})
    assert np.asarray(theirs) / p == pytest.approx(np.array(shares["drop"].per_image) / 100, abs=1e-5)
    assert np.mean(theirs) < 0.5 * shares["drop"].value / 100


def test_pytorch_grad_cam_s_imputation_is_ours():
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    from sightline.erase import noisy_linear

    x = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(2))
    kept = (torch.rand(1, 1, 9, 11, generator=torch.Generator().manual_seed(3)) > 0.6).float()
    theirs = NoisyLinearImputer(noise=0.0)(x[0], kept[0, 0])
    ours = kept * x + (1 - kept) * noisy_linear(x, kept, noise=0.0)
    torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-6)


def test_quantus_plays_the_game_of_single_pixels():
    """Its committed values (benchmarks/quantus_values.py): no tolerance, and no classes."""
    reference = json.loads((Path(__file__).parent / "data" / "quantus.json").read_text())
    theirs = next(row["values"] for row in reference["rows"] if row["metric"] == "PointingGame")
    a = torch.from_numpy(np.random.default_rng(2).uniform(size=(6, 1, 24, 24)).astype(np.float32))
    mask = torch.zeros(6, 24, 24, dtype=torch.long)
    mask[:3, 4:20, 4:20], mask[3:, :6, :6] = 1, 1
    samples = [Sample(f"i{i}", torch.zeros(3, 24, 24), 0, mask=mask[i]) for i in range(6)]
    logits = torch.zeros(6, 2)
    case = Case(
        Classifier(nn.Identity(), ""),
        torch.zeros(6, 3, 24, 24),
        logits[:, 0].long(),
        a,
        a,
        grad_cam,
        collate(samples),
        logits,
    )
    ours = pointing_game(tolerance=0.0, ties="any", average="image")(case)
    assert (ours[:, 0] / 100).tolist() == theirs
