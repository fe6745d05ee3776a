"""Every method once more, slowly: plain loops over channels and cells of a network that is split by hand."""

import math
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sightline.classifier import log_probability, logit, probability, sigmoid, wrap
from sightline.methods import (
    METHODS,
    ablation_cam,
    cam,
    center,
    edge,
    fake_cam,
    grad_cam,
    grad_cam_pp,
    gradient,
    hires_cam,
    input_x_gradient,
    layer_cam,
    per_class,
    random,
    score_cam,
    x_grad_cam,
)
from sightline.models import MiniResNet

GRADIENT_CAMS = (grad_cam, grad_cam_pp, x_grad_cam, layer_cam, hires_cam)

close = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def y():
    return torch.tensor([3, 0, 4])


@pytest.fixture
def parts(curved, x, y):
    """Features and gradients of the split network as nested lists: [image][channel][row][column]."""
    a = curved.model.last(curved.normalize(x)).detach().requires_grad_()
    (g,) = torch.autograd.grad(curved.model.behind(a)[range(3), y].sum(), a)
    return a.tolist(), g.tolist()


def cells(channels):
    return [(i, j) for i in range(len(channels[0])) for j in range(len(channels[0][0]))]


def weighted(A, weight):
    """Return ReLU(sum_k weight(b, k, i, j) A^k_ij) for each image b."""
    maps = []
    for b, channels in enumerate(A):
        rows, columns = len(channels[0]), len(channels[0][0])
        one = torch.zeros(rows, columns, dtype=torch.float64)
        for i, j in cells(channels):
            one[i, j] = max(sum(weight(b, k, i, j) * channels[k][i][j] for k in range(len(channels))), 0)
        maps.append(one)
    return torch.stack(maps)[:, None]


def assert_meaningful(saliency):
    assert all(one.max() > 1e-6 for one in saliency)


def test_grad_cam(curved, x, y, parts):
    A, G = parts

    @cache
    def weight(b, k):
        return sum(G[b][k][r][c] for r, c in cells(A[b])) / len(cells(A[b]))

    expected = weighted(A, lambda b, k, i, j: weight(b, k))
    assert_meaningful(expected)
    torch.testing.assert_close(grad_cam(curved, x, y), expected, **close)


def test_grad_cam_pp_in_its_uncancelled_form(curved, x, y, parts):
    A, G = parts

    @cache
    def mass(b, k):
        return sum(A[b][k][r][c] for r, c in cells(A[b]))

    def share(b, k, i, j):
        g = G[b][k][i][j]
        return g**2 / (2 * g**2 + mass(b, k) * g**3) if g != 0 else 0

    @cache
    def weight(b, k):
        return sum(share(b, k, r, c) * max(G[b][k][r][c], 0) for r, c in cells(A[b]))

    expected = weighted(A, lambda b, k, i, j: weight(b, k))
    assert_meaningful(expected)
    torch.testing.assert_close(grad_cam_pp(curved, x, y), expected, **close)


def test_x_grad_cam(curved, x, y, parts):
    A, G = parts

    @cache
    def weight(b, k):
        mass = sum(A[b][k][r][c] for r, c in cells(A[b]))
        return sum(G[b][k][r][c] * A[b][k][r][c] for r, c in cells(A[b])) / mass if mass else 0

    expected = weighted(A, lambda b, k, i, j: weight(b, k))
    assert_meaningful(expected)
    torch.testing.assert_close(x_grad_cam(curved, x, y), expected, **close)


def test_layer_cam(curved, x, y, parts):
    A, G = parts
    expected = weighted(A, lambda b, k, i, j: max(G[b][k][i][j], 0))
    assert_meaningful(expected)
    torch.testing.assert_close(layer_cam(curved, x, y), expected, **close)


def test_hires_cam(curved, x, y, parts):
    A, G = parts
    expected = weighted(A, lambda b, k, i, j: G[b][k][i][j])
    assert_meaningful(expected)
    torch.testing.assert_close(hires_cam(curved, x, y), expected, **close)


def test_the_five_gradient_cams_differ_where_gradients_do(curved, x, y):
    maps = [method(curved, x, y) for method in GRADIENT_CAMS]
    for one in range(5):
        for other in range(one):
            assert (maps[one] - maps[other]).abs().max() > 1e-4 * maps[one].abs().max()


def test_dead_channels_weigh_nothing(curved, x, y):
    """Where a channel is zero everywhere, no division by its sum must show."""
    with torch.no_grad():
        curved.model.last[1].weight[:2] = 0
        curved.model.last[1].bias[:2] = -1
    assert not curved.features(x)[:, :2].any()
    for method in (*GRADIENT_CAMS, ablation_cam, score_cam):
        assert method(curved, x, y).isfinite().all()


def test_cam(pooled, x, y):
    features = pooled.model.last(pooled.model.stem(pooled.normalize(x)))
    w, b = pooled.model.head.weight.detach(), pooled.model.head.bias.detach()
    expected = torch.zeros(3, 1, 6, 8, dtype=torch.float64)
    for n in range(3):
        for k in range(6):
            for i in range(6):
                for j in range(8):
                    expected[n, 0, i, j] += w[y[n], k].item() * features[n, k, i, j].item()
    found = cam(pooled, x, y)
    torch.testing.assert_close(found, expected, **close)
    assert (found < 0).any()
    torch.testing.assert_close(found.mean((1, 2, 3)) + b[y], pooled(x)[range(3), y], **close)


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_cam_of_a_linear_and_of_a_convolutional_head(head, seeded, x, y):
    model = seeded(MiniResNet, 5, widths=(4, 4, 6, 8), head=head)
    classifier = wrap(model, layer="layer4", normalization="none", size=(24, 32))
    maps = F.conv2d(classifier.features(x), model.head.weight.view(5, 8, 1, 1))
    torch.testing.assert_close(cam(classifier, x, y), maps[range(3), y][:, None], **close)


def test_cam_without_its_head_is_an_error(curved, pooled, x, plain):
    message = "cam needs global average pooling and one linear layer behind '{}', which {} does not have; grad_cam is"
    for classifier, layer, name in ((curved, "last", "Curved"), (pooled.at("stem"), "stem", "Pooled")):
        with pytest.raises(ValueError, match=message.format(layer, name)):
            cam(classifier, x)


def full_pass(classifier, x, y, score):
    with torch.no_grad():
        return score(classifier.model(classifier.normalize(x)), y)


@pytest.mark.parametrize("score", [logit, probability])
def test_score_cam(curved, x, y, score):
    expected = torch.zeros(3, 1, 12, 16, dtype=torch.float64)
    A = curved.model.last(curved.normalize(x)).detach()
    for n in range(3):
        image, label = x[n : n + 1], y[n : n + 1]
        baseline = full_pass(curved, torch.zeros_like(image), label, score).item()
        gains = []
        for k in range(6):
            mask = F.interpolate(A[n : n + 1, k : k + 1], (24, 32), mode="bilinear", align_corners=False)
            low, high = mask.min().item(), mask.max().item()
            mask = (mask - low) / (high - low) if high > low else torch.zeros_like(mask)
            gains.append(full_pass(curved, image * mask, label, score).item() - baseline)
        shares = [math.exp(gain) / sum(math.exp(other) for other in gains) for gain in gains]
        expected[n, 0] = sum(share * A[n, k] for k, share in enumerate(shares)).clamp(min=0)
    assert_meaningful(expected)
    torch.testing.assert_close(score_cam(curved, x, y, score=score), expected, **close)


def test_score_cam_by_chunks_with_corners_and_other_fillings(curved, x, y):
    whole = score_cam(curved, x, y)
    for chunk in (1, 4, 100):
        torch.testing.assert_close(score_cam(curved, x, y, chunk=chunk), whole, **close)
    for change in ({"mode": "bilinear_corners"}, {"mode": "nearest"}, {"erase": "mean"}, {"erase": "blur"}):
        assert (score_cam(curved, x, y, **change) - whole).abs().max() > 1e-6
    with pytest.raises(ValueError, match="expected chunk >= 1 masked images at a time, got 0"):
        score_cam(curved, x, y, chunk=0)
    with pytest.raises(LookupError, match="no eraser called 'blakc'; did you mean black"):
        score_cam(curved, x, y, erase="blakc")


@pytest.mark.parametrize("network", ["pooled", "curved", "tokens"])
def test_ablation_cam_with_full_passes(network, request, x, y):
    classifier = request.getfixturevalue(network)
    model, layer = classifier.model, dict(classifier.model.named_modules())[classifier.layer]
    A = classifier.features(x)
    expected = torch.zeros_like(A[:, :1])
    for n in range(3):
        whole = full_pass(classifier, x[n : n + 1], y[n : n + 1], logit).item()
        for k in range(A.shape[1]):

            def without(_, __, output, k=k):
                output = output.clone()
                if network == "tokens":
                    output[:, 1:, k] = 0
                else:
                    output[:, k] = 0
                return output

            handle = layer.register_forward_hook(without)
            ablated = full_pass(classifier, x[n : n + 1], y[n : n + 1], logit).item()
            handle.remove()
            expected[n, 0] += (whole - ablated) / whole * A[n, k]
    expected = expected.clamp(min=0)
    assert expected.max() > 1e-6
    torch.testing.assert_close(ablation_cam(classifier, x, y), expected, **close)
    torch.testing.assert_close(ablation_cam(classifier, x, y, chunk=4), expected, **close)
    assert model.training is False


def test_ablation_cam_of_a_score_of_zero_and_a_wrong_chunk(pooled, x, y):
    with torch.no_grad():
        pooled.model.head.weight[0] = 0
        pooled.model.head.bias[0] = 0
    assert not ablation_cam(pooled, x, torch.zeros_like(y)).any()
    with pytest.raises(ValueError, match="expected chunk >= 1 channels at a time, got 0"):
        ablation_cam(pooled, x, y, chunk=0)


def test_gradient_and_input_x_gradient_by_finite_differences(curved, x, y):
    largest, product = gradient(curved, x, y), input_x_gradient(curved, x, y)
    assert largest.shape == product.shape == (3, 1, 24, 32)
    for n, i, j in ((0, 0, 0), (1, 11, 30), (2, 23, 16)):
        slopes = []
        for c in range(3):
            step = torch.zeros_like(x)
            step[n, c, i, j] = 1e-6
            difference = full_pass(curved, x + step, y, logit) - full_pass(curved, x - step, y, logit)
            slopes.append(difference[n].item() / 2e-6)
        assert largest[n, 0, i, j].item() == pytest.approx(max(map(abs, slopes)), rel=1e-5, abs=1e-9)
        total = sum(slope * x[n, c, i, j].item() for c, slope in enumerate(slopes))
        assert product[n, 0, i, j].item() == pytest.approx(total, rel=1e-5, abs=1e-9)


def test_input_x_gradient_of_a_network_without_bias_adds_up_to_the_logit(x, y):
    """A piecewise linear network through the origin: the shares of all pixels make the score."""
    layers = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(6, 5, 3, 2, 1, bias=False)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    classifier = wrap(model, normalization="none", size=(24, 32))
    total = input_x_gradient(classifier, x, y).sum((1, 2, 3))
    torch.testing.assert_close(total, classifier(x)[range(3), y], **close)


@pytest.mark.parametrize("method", [gradient, input_x_gradient, *GRADIENT_CAMS, score_cam, ablation_cam])
def test_the_score_is_an_argument_and_the_logit_its_default(method, curved, x, y):
    """The paper's read-out of all of these is the logit, whatever score the classifier carries."""
    expected = method(curved, x, y)
    assert torch.equal(method(replace(curved, score=sigmoid), x, y), expected)
    assert torch.equal(method(curved, x, y, score=logit), expected)
    assert not torch.allclose(method(curved, x, y, score=log_probability), expected, rtol=1e-3, atol=1e-9)


def test_where_pooling_and_a_linear_layer_follow_four_methods_are_one(pooled, x):
    """Opti-CAM, Table 1: the rows of Grad-CAM, XGrad-CAM and HiRes-CAM are equal; CAM is theirs up to 1 / (h w)."""
    assert (pooled.features(x).sum((2, 3)) > 0).all()
    assert all(cam(pooled, x, torch.full((3,), label)).amax() > 1e-3 for label in range(5))
    for label in range(5):
        y = torch.full((3,), label)
        expected = cam(pooled, x, y).relu() / (6 * 8)
        for method in (grad_cam, hires_cam, x_grad_cam):
            torch.testing.assert_close(method(pooled, x, y), expected, rtol=0, atol=1e-12)


def test_where_pooling_and_a_linear_layer_follow_the_others_have_closed_forms(pooled, x, y):
    A, w = pooled.features(x), pooled.model.head.weight[y][:, :, None, None]
    z, n = pooled(x)[range(3), y], 6 * 8
    layer = (w.relu() / n * A).sum(1, keepdim=True)
    torch.testing.assert_close(layer_cam(pooled, x, y), layer, **close)
    mass = A.sum((2, 3), keepdim=True)
    torch.testing.assert_close(
        grad_cam_pp(pooled, x, y), (w.relu() / (2 + mass * w / n) * A).sum(1, keepdim=True).relu(), **close
    )
    lost = w * A.mean((2, 3), keepdim=True) / z.view(3, 1, 1, 1)
    torch.testing.assert_close(ablation_cam(pooled, x, y), (lost * A).sum(1, keepdim=True).relu(), **close)


def test_grad_cam_pp_scales_with_the_score_as_its_formula_does(pooled, x, y):
    """No epsilon hides in it: with tiny gradients the share becomes 1/2, and the map that of half the positive sum."""
    A, G = pooled.features_and_gradient(x, y)
    with torch.no_grad():
        pooled.model.head.weight *= 1e-9
        pooled.model.head.bias *= 1e-9
    expected = (0.5e-9 * G.relu().sum((2, 3), keepdim=True) * A).sum(1, keepdim=True)
    torch.testing.assert_close(grad_cam_pp(pooled, x, y), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [METHODS["grad_cam"], METHODS["cam"], partial(score_cam, chunk=3)])
def test_entries_and_partials_are_methods_too(method, pooled, x):
    classes = torch.tensor([[0, 3], [4, 1], [2, 2]])
    maps = per_class(method)(pooled, x, classes)
    for n in range(2):
        torch.testing.assert_close(maps[:, n : n + 1], method(pooled, x, classes[:, n]), **close)


def test_fake_cam_says_nothing(pooled, x):
    saliency = fake_cam(pooled, x)
    assert saliency.shape == (3, 1, 24, 32)
    assert saliency[:, 0, 0, 0].tolist() == [0, 0, 0]
    assert saliency.sum().item() == 3 * (24 * 32 - 1)


def test_center_is_a_bell_in_the_middle(pooled, x):
    saliency = center(pooled, x, sigma=0.3)
    for i, j in ((0, 0), (11, 15), (5, 30)):
        down, across = ((i + 0.5) / 24 - 0.5) / 0.3, ((j + 0.5) / 32 - 0.5) / 0.3
        expected = math.exp(-(down**2 + across**2) / 2)
        assert saliency[:, 0, i, j].tolist() == pytest.approx([expected] * 3, rel=1e-6)
    torch.testing.assert_close(saliency, saliency.flip(2, 3), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="expected sigma > 0, a share of the side, got 0"):
        center(pooled, x, sigma=0.0)


def test_random_follows_its_seed_alone(pooled, x):
    saliency = random(pooled, x)
    assert saliency.shape == (3, 1, 7, 7)
    assert torch.equal(saliency[0], saliency[2])
    assert 0 <= saliency.min() < saliency.max() < 1
    assert torch.equal(saliency[:1], random(pooled, x[1:2]))
    assert not torch.equal(saliency, random(pooled, x, seed=1))
    assert random(pooled, x, cells=3).shape == (3, 1, 3, 3)
    with pytest.raises(ValueError, match="expected at least two cells a side, got 1"):
        random(pooled, x, cells=1)


def test_edge_is_sobel_s_length(pooled, x):
    saliency = edge(pooled, x)
    gray = x[1].mean(0)
    for i, j in ((5, 7), (20, 30), (0, 0), (23, 31)):
        down = across = 0.0
        for a, row in zip((-1, 0, 1), ((1, 2, 1), (0, 0, 0), (-1, -2, -1)), strict=True):
            for b, value in zip((-1, 0, 1), row, strict=True):
                r, c = min(max(i + a, 0), 23), min(max(j + b, 0), 31)
                down += value * gray[r, c].item()
                r, c = min(max(i + b, 0), 23), min(max(j + a, 0), 31)
                across += value * gray[r, c].item()
        assert saliency[1, 0, i, j].item() == pytest.approx(math.hypot(down, across), abs=1e-12)
    assert edge(pooled, torch.full_like(x, 0.3)).max() < 1e-15
