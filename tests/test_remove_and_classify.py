"""Remove and classify: every image and share by hand, and ratios of accuracies."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightline.classifier import Classifier
from sightline.data import Sample, collate
from sightline.erase import resolve
from sightline.evaluation import measure
from sightline.metrics import Case, remove_and_classify
from sightline.metrics._remove_and_classify import BLUR
from sightline.runs import arguments
from sightline.settings import bind

H, W = 12, 16


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(classifier, x, saliency, y=None):
    with torch.no_grad():
        logits = classifier(x)
    y = logits.argmax(1) if y is None else y
    batch = collate([Sample(f"i{i}", image, int(label)) for i, (image, label) in enumerate(zip(x, y, strict=True))])
    return Case(classifier, x, y, saliency, saliency, classifier, batch, logits)


class Bright(nn.Module):
    """Class 1 where the brightest pixel is above a half, class 0 elsewhere."""

    def forward(self, x):
        top = x.amax((1, 2, 3))
        return torch.stack([0.5 - top, top - 0.5], 1)


BRIGHT = Classifier(Bright(), "", size=(H, W))


def slow(classifier, image, order, label, share, fill):
    seen = image.clone()
    for i in order[: round(share * H * W)]:
        seen[:, i // W, i % W] = fill[:, i // W, i % W]
    with torch.no_grad():
        return float(int(classifier(seen[None])[0].argmax()) == label)


@pytest.mark.parametrize("erase", [BLUR, "black", "mean", "noise"])
def test_slow_loop_over_images_and_shares(curved, erase):
    x, saliency, y = noise(6, 3, H, W), noise(6, 1, H, W, seed=1).mul(6).floor() / 6, torch.tensor([0, 1, 2, 3, 4, 0])
    shares = (0.13, 0.5, 0.9)
    one = case(curved, x, saliency)
    y = torch.where(torch.arange(6) < 4, one.y, y)
    one = case(curved, x, saliency, y)
    found = remove_and_classify(shares=shares, erase=erase, seed=3)(one)
    fill = resolve(erase, curved.mean)(x, saliency)
    places = torch.randperm(H * W, generator=torch.Generator().manual_seed(3)).tolist()
    random = sorted(range(H * W), key=lambda i: places[i])
    for i in range(6):
        values = saliency[i, 0].flatten().tolist()
        salient = sorted(range(H * W), key=lambda p: (-values[p], p))
        expected = [slow(curved, x[i], order, int(y[i]), k, fill[i]) for order in (salient, random) for k in shares]
        assert found[i].tolist() == expected
    assert 0 < found.mean() < 1


def test_hand_example():
    """Of two images with one bright pixel each, the map finds the one and misses the other."""
    x, saliency = torch.zeros(2, 3, H, W), torch.zeros(2, 1, H, W)
    x[:, :, 4, 5] = 1
    saliency[0, 0, 4, 5] = 1
    one = case(BRIGHT, x, saliency.double(), torch.tensor([1, 1]))
    measured = remove_and_classify(shares=(0.01, 0.02), erase="black", seed=0)
    found = measured(one)
    assert found[:, :2].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    place = int(torch.randperm(H * W, generator=torch.Generator().manual_seed(0))[4 * W + 5])
    kept = [float(place >= round(k * H * W)) for k in (0.01, 0.02)]
    assert found[:, 2:].tolist() == [kept, kept]
    assert measured.finish(torch.tensor([0.5, 0.2, 1.0, 0.5])).item() == pytest.approx((0.5 + 0.4) / 2)
    assert measured.curve(torch.tensor([0.5, 0.2, 1.0, 0.5])).tolist() == pytest.approx([0.5, 0.4])


def test_a_share_at_which_no_random_image_is_right_is_left_out():
    measured = remove_and_classify(shares=(0.1, 0.9))
    numbers = torch.tensor([0.6, 0.1, 0.8, 0.0])
    assert math.isnan(measured.curve(numbers)[1])
    assert measured.finish(numbers).item() == pytest.approx(0.75)
    assert measured.finish(torch.zeros(4)).isnan()
    assert measured.finish(torch.full((4,), torch.nan)).isnan(), "no image counts"


def test_a_random_map_is_as_good_as_random_pixels(curved):
    """R_k of random maps is about one, on images whose class hangs on their pixels."""
    x, saliency = noise(200, 3, H, W, seed=4), noise(200, 1, H, W, seed=5)
    measured = remove_and_classify(shares=(0.3, 0.5, 0.7), erase="noise")
    found = measured(case(curved, x, saliency)).mean(0)
    assert found.min() < 0.999, "something changes"
    assert measured.curve(found).tolist() == pytest.approx([1.0] * 3, abs=0.15)


def test_relative_false_gives_the_plain_accuracy(curved):
    x, saliency = noise(5, 3, H, W), noise(5, 1, H, W, seed=1)
    one = case(curved, x, saliency)
    both, plain = remove_and_classify(), remove_and_classify(relative=False)
    assert (both.width, plain.width) == (10, 5)
    assert torch.equal(both(one)[:, :5], plain(one))
    accuracy = plain(one).mean(0)
    assert plain.curve(accuracy).tolist() == accuracy.tolist()
    assert plain.finish(accuracy).item() == pytest.approx(accuracy.mean().item())
    assert both.state == plain.state == "mean"
    assert both.axis == plain.axis == (0.1, 0.3, 0.5, 0.7, 0.9)
    assert (both.higher_is_better, both.scored) == (False, "label")


def test_all_pixels_leave_the_filling_alone(curved):
    x = noise(3, 3, H, W)
    found = remove_and_classify(shares=(1.0,), erase="black")(case(curved, x, noise(3, 1, H, W, seed=1)))
    empty = int(curved(torch.zeros_like(x[:1])).argmax())
    assert found.tolist() == [[float(int(y) == empty)] * 2 for y in case(curved, x, x[:, :1]).y]


@settings(deadline=None, max_examples=10)
@given(chunk=st.integers(1, 40), seed=st.integers(0, 5))
def test_batch_order_and_chunk_do_not_matter(classifiers, chunk, seed):
    x, saliency = noise(4, 3, H, W), noise(4, 1, H, W, seed=1)
    settings = {"shares": (0.2, 0.6), "erase": "black", "seed": seed}
    together = remove_and_classify(**settings)(case(classifiers["curved"], x, saliency))
    turned = remove_and_classify(**settings, chunk=chunk)(case(classifiers["curved"], x.flip(0), saliency.flip(0)))
    assert torch.equal(turned.flip(0), together)


def test_the_seed_draws_other_pixels():
    x = torch.zeros(1, 3, H, W)
    x[:, :, 4, 5] = 1
    one = case(BRIGHT, x, torch.zeros(1, 1, H, W).double(), torch.tensor([1]))
    found = [remove_and_classify(shares=(0.5,), erase="black", seed=seed)(one)[0, 1].item() for seed in range(40)]
    assert 0.2 < sum(found) / 40 < 0.8
    assert found[7] == remove_and_classify(shares=(0.5,), erase="black", seed=7)(one)[0, 1].item()


def test_the_blur_is_that_of_the_official_code():
    assert BLUR.keywords == {"sigma": 15.0, "radius": 15}
    assert arguments(remove_and_classify)["erase"] == "blur(sigma=15.0, radius=15)"
    table = bind(remove_and_classify, {"erase": {"name": "blur", "sigma": 15, "radius": 15}, "shares": [0.1]})
    x = noise(1, 3, 20, 24)
    assert torch.equal(table.keywords["erase"](x, x[:, :1]), BLUR(x, x[:, :1]))


def test_through_measure_the_ratio_is_of_the_means_over_all_images(curved):
    x, saliency = noise(6, 3, 24, 32), noise(6, 1, 24, 32, seed=1)
    y = case(curved, x, saliency).y
    rows = [Sample(f"i{i}", image, int(y[i])) for i, image in enumerate(x)]
    maps = {image.sum().item(): saliency[i] for i, image in enumerate(x)}
    method = lambda c, x, y=None: torch.stack([maps[image.sum().item()] for image in x])  # noqa: E731
    settings = {"shares": (0.3, 0.7), "erase": "noise"}
    batches = [collate(rows[:2]), collate(rows[2:])]
    found = measure(method, curved, batches, {"r": remove_and_classify(**settings)}).scores[0]
    numbers = remove_and_classify(**settings)(case(curved, x, saliency)).mean(0)
    assert found.curve == pytest.approx((numbers[:2] / numbers[2:]).tolist())
    assert found.value == pytest.approx(sum(found.curve) / 2)
    assert found.per_image == ()
    assert found.count == 6


def test_what_is_wrong_is_said(plain):
    for shares in ((), (0.0,), (0.1, 1.5)):
        with pytest.raises(ValueError, match=r"expected shares in \(0, 1\], at least one, and chunk >= 1, got shares="):
            remove_and_classify(shares=shares)
    with pytest.raises(ValueError, match="chunk=0"):
        remove_and_classify(chunk=0)
    with pytest.raises(ValueError, match="expected scored='label'"):
        remove_and_classify(scored="second")
