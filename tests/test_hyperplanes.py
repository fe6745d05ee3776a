"""Hyperplanes: the signed distances, pixel by pixel against slow forms, and the paper's identities (SPEC 9)."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sightline.classifier import Classifier, UnsuitedError, wrap
from sightline.hyperplanes import signed_distances
from sightline.metrics._segmentation import four_regions

H, W, B = 9, 12, 3


class Net(nn.Module):
    """Two convolutions with ReLU, global average pooling and a linear head, in float64."""

    def __init__(self, kernel=3, stride=1, classes=4, bias=0.1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, kernel, padding=kernel // 2), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(5, 6, kernel, stride, padding=kernel // 2), nn.ReLU())
        self.head = nn.Linear(6, classes)
        nn.init.constant_(self.last[0].bias, bias)
        self.double()

    def forward(self, x):
        return self.head(self.last(self.stem(x)).mean((2, 3)))


def classifier_of(*, seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return wrap(Net(**settings), layer="last", normalization="none", size=(H, W))


@pytest.fixture
def x():
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pooled(net):
    return lambda x: net.model.last(net.model.stem(x)).mean((2, 3))


def bilinear(grid, size):
    """Sample a grid at pixel centers, cell by cell."""
    (i, j), (h, w) = grid.shape, size
    out = torch.zeros(h, w, dtype=grid.dtype)
    for p in range(h):
        for q in range(w):
            v = min(max((p + 0.5) * i / h - 0.5, 0), i - 1)
            u = min(max((q + 0.5) * j / w - 0.5, 0), j - 1)
            top, left = int(v), int(u)
            low, right = min(top + 1, i - 1), min(left + 1, j - 1)
            a, b = v - top, u - left
            above = (1 - b) * grid[top, left] + b * grid[top, right]
            below = (1 - b) * grid[low, left] + b * grid[low, right]
            out[p, q] = (1 - a) * above + a * below
    return out


@pytest.mark.parametrize("stride", [1, 2])
def test_distances_are_those_of_the_two_hyperplanes(x, stride):
    net = classifier_of(stride=stride)
    y = torch.tensor([0, 3, 1])
    found = signed_distances(net, x, y, tau_cam=0.3, tau_sm=0.2)
    for n in range(B):
        w = net.model.head.weight.detach()[y[n]]
        A = net.model.last(net.model.stem(x[n : n + 1])).detach()[0]
        up = torch.stack([bilinear(one, (H, W)) for one in A])
        jacobian = torch.autograd.functional.jacobian(
            lambda one: net.model.last(net.model.stem(one)).mean((2, 3)), x[n : n + 1]
        )
        a = jacobian[0, :, 0]
        Z = max(float(w @ up[:, p, q]) for p in range(H) for q in range(W))
        Z_sm = max(float((w @ a[:, c, p, q]).abs()) for c in range(3) for p in range(H) for q in range(W))
        assert Z_sm > 0
        for p in range(H):
            for q in range(W):
                cam = float(w @ up[:, p, q]) / Z if Z > 0 else 0.0
                sm = max(float((w @ a[:, c, p, q]).abs()) for c in range(3)) / Z_sm
                assert float(found.cam[n, 0, p, q]) == pytest.approx(cam, abs=1e-9)
                assert float(found.saliency[n, 0, p, q]) == pytest.approx(sm, abs=1e-9)
                d_cam = (cam - 0.3) / (float(w.norm()) / (Z if Z > 0 else 1.0))
                d_sm = (sm - 0.2) / (float(w.norm()) / Z_sm)
                assert float(found.d_cam[n, 0, p, q]) == pytest.approx(d_cam, abs=1e-9)
                assert float(found.d_sm[n, 0, p, q]) == pytest.approx(d_sm, abs=1e-9)
                region = {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[cam >= 0.3, sm >= 0.2]
                assert int(found.regions[n, p, q]) == region


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("taus", [(0.25, 0.15), (0.5, 0.5), (1.0, 1.0)])
def test_a_distance_is_not_negative_exactly_where_the_map_reaches_the_threshold(x, seed, taus):
    found = signed_distances(classifier_of(seed=seed), x.float(), tau_cam=taus[0], tau_sm=taus[1])
    assert torch.equal(found.d_cam >= 0, found.cam >= taus[0])
    assert torch.equal(found.d_sm >= 0, found.saliency >= taus[1])
    for n in range(B):
        inside = torch.ones(H, W, dtype=torch.bool)
        shares = four_regions(found.cam[n, 0], found.saliency[n, 0], inside, *taus)
        assert torch.allclose(100 * found.regions[n].flatten().bincount(minlength=4) / (H * W), shares.float())


def test_scaling_the_weights_of_a_class_leaves_both_maps_and_the_distances(x):
    net, times = classifier_of(), classifier_of()
    times.model.head.weight.data[2] *= 8
    times.model.head.bias.data[2] += 5
    a, b = (signed_distances(one, x, torch.tensor([2, 2, 2])) for one in (net, times))
    assert (a.cam.amax((1, 2, 3)) == 1).any()
    for name in ("cam", "saliency", "d_cam", "d_sm", "regions"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-12), name


def test_a_cam_without_positive_values_finds_nothing(x):
    net = classifier_of()
    net.model.head.weight.data[1] = -net.model.head.weight.data[1].abs()
    found = signed_distances(net, x, torch.tensor([1, 1, 1]))
    assert (found.cam == 0).all()
    length = float(net.model.head.weight.detach()[1].norm())
    assert torch.allclose(found.d_cam, torch.tensor(-0.25 / length, dtype=torch.float64))
    assert set(found.regions.unique().tolist()) <= {2, 3}
    assert (found.d_sm >= 0).any()


def test_a_class_without_weights_is_infinitely_far(x):
    net = classifier_of(classes=1)
    found = signed_distances(net, x, torch.tensor([0, 1, 1]))
    assert (found.d_cam[0] == -torch.inf).all()
    assert (found.d_sm[0] == -torch.inf).all()
    assert (found.regions[0] == 3).all()
    assert found.d_sm[1:].isfinite().all()


def test_with_kernels_of_one_pixel_the_saliency_stays_where_the_features_do(x):
    net = classifier_of(kernel=1, bias=-0.2, seed=0)
    A = net.features(x)
    dead = (A == 0).all(1)
    assert 0.1 < float(dead.float().mean()) < 0.9, "the net has both"
    found = signed_distances(net, x, torch.tensor([0, 1, 2]))
    assert (found.saliency[:, 0][dead] == 0).all()
    assert (found.cam[:, 0][dead] == 0).all()
    wide = classifier_of(kernel=3, bias=-0.05, seed=2)
    beside = (wide.features(x) == 0).all(1)
    assert (signed_distances(wide, x, torch.tensor([0, 1, 2])).saliency[:, 0][beside] > 0).any()


def test_the_predicted_class_is_the_default(x):
    net = classifier_of()
    y = net(x).argmax(1)
    assert torch.equal(signed_distances(net, x).d_cam, signed_distances(net, x, y).d_cam)


def test_a_network_without_a_linear_head_is_refused(x):
    net = classifier_of()
    with pytest.raises(UnsuitedError, match="cam needs global average pooling and one linear layer"):
        signed_distances(replace(net, layer="stem"), x)


@pytest.mark.parametrize("name", ["tau_cam", "tau_sm"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.5])
def test_a_threshold_is_a_share_of_the_maximum(x, name, value):
    with pytest.raises(ValueError, match=rf"expected {name} in \(0, 1\], a share of the map's maximum, got {value}"):
        signed_distances(classifier_of(), x, **{name: value})


def test_nothing_is_left_behind(x):
    net: Classifier = classifier_of()
    net.model.train()
    before = x.clone(), torch.get_rng_state()
    signed_distances(net, x)
    assert net.model.training
    assert all(p.requires_grad and p.grad is None for p in net.model.parameters())
    assert torch.equal(x, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
