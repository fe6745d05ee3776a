"""The gradient family, each derived again slowly, and what captum and pytorch-grad-cam make of it."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from sightline import methods
from sightline.classifier import UnsuitedError, log_probability, wrap
from sightline.maps import unit
from sightline.methods import METHODS
from sightline.methods._full_grad import full_gradient
from sightline.models import MiniResNet, MiniVGG

SIZE = (24, 32)


def captum():
    return pytest.importorskip("captum.attr", reason="captum is not installed")


def grad_cams():
    return pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam or what it needs is not installed")


@pytest.fixture
def y():
    return torch.tensor([3, 0, 2])


def bare(model, layer=None, size=SIZE):
    """Give the network the images as they are, as the peers do."""
    return wrap(model, layer=layer, normalization="none", size=size)


def same(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# --- guided backpropagation and the deconvolutional network ---------------------------------------------------------


def dropped(function, **settings):
    """Rectify in place and forget what the function returned."""

    def run(t):
        function(t, **settings)
        return t

    return run


RELUS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu by name": lambda t: F.relu(input=t),
    "F.relu in place": dropped(F.relu, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": dropped(torch.relu_),
    "Tensor.relu": lambda t: t.relu(),
    "Tensor.relu_": dropped(lambda t: t.relu_()),
}

RELU6S = {
    "module": nn.ReLU6(),
    "module in place": nn.ReLU6(inplace=True),
    "F.relu6": F.relu6,
    "F.hardtanh": lambda t: F.hardtanh(t, min_val=0.0, max_val=6.0),
    "F.hardtanh_": dropped(F.hardtanh_, min_val=0.0, max_val=6.0),
}


class Small(nn.Module):
    """Two convolutions, both rectified by `relu`, the mean over the image and one linear layer."""

    def __init__(self, relu, gain=1.0):
        super().__init__()
        self.relu, self.gain = relu, gain
        self.one, self.two, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.relu(self.two(self.relu(self.gain * self.one(x)))).mean((2, 3)))


def by_hand(model, x, y, *, active, top=float("inf")):
    """Derive the rule for Small, layer by layer."""
    with torch.no_grad():
        z1 = model.gain * model.one(x)
        a1 = z1.clamp(0, top)
        z2 = model.two(a1)
        R = (model.head.weight[y] / z2[0, 0].numel())[:, :, None, None].expand_as(z2)
        for z, conv, below, gain in ((z2, model.two, a1, 1.0), (z1, model.one, x, model.gain)):
            passes = ((z > 0) & (z < top)) if active else torch.ones_like(z)
            R = R.clamp(min=0) * passes
            R = gain * torch.nn.grad.conv2d_input(below.shape, conv.weight, R, conv.stride, conv.padding)
    return R.abs().amax(1, keepdim=True)


@pytest.mark.parametrize(("name", "active"), [("guided_backprop", True), ("deconvnet", False)])
@pytest.mark.parametrize("relu", RELUS)
def test_every_relu_is_rectified(name, active, relu, seeded, x, y):
    model = seeded(Small, RELUS[relu], seed=2)
    saliency = METHODS[name](bare(model), x, y)
    same(saliency, by_hand(model, x, y, active=active))
    assert (saliency - methods.gradient(bare(model), x, y)).abs().max() > 1e-3 * saliency.max()


@pytest.mark.parametrize(("name", "active"), [("guided_backprop", True), ("deconvnet", False)])
@pytest.mark.parametrize("relu", RELU6S)
def test_relu6_is_a_relu_with_a_ceiling(name, active, relu, seeded, x, y):
    model = seeded(Small, RELU6S[relu], gain=30.0, seed=2)
    assert (model.gain * model.one(x) > 6).any()
    same(METHODS[name](bare(model), x, y), by_hand(model, x, y, active=active, top=6.0))


class Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z * (z > 0)

    @staticmethod
    def backward(ctx, R):
        return R * (R > 0) * (ctx.saved_tensors[0] > 0)


class Deconvolved(Guided):
    @staticmethod
    def backward(ctx, R):
        return R * (R > 0)


RULES = {"guided_backprop": Guided, "deconvnet": Deconvolved}

ZOO = {
    "googlenet": partial(torchvision.models.googlenet, weights=None, init_weights=False, num_classes=4),
    "inception_v3": partial(torchvision.models.inception_v3, weights=None, init_weights=False, num_classes=4),
    "resnet18": partial(torchvision.models.resnet18, num_classes=4),
}
"""The first two call F.relu, the last one modules in place before and behind a sum in place."""


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("network", ZOO)
def test_functional_relus_of_torchvision_are_caught(name, network, seeded, monkeypatch):
    side = 75 if network == "inception_v3" else 40
    classifier, y = bare(seeded(ZOO[network], seed=3), size=(side, side)), torch.tensor([2])
    x = torch.rand(1, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    saliency, gradient = METHODS[name](classifier, x, y), methods.gradient(classifier, x, y)
    monkeypatch.setattr(F, "relu", lambda z, inplace=False: RULES[name].apply(z))
    same(saliency, methods.gradient(classifier, x, y), 1e-9 * float(saliency.max()))
    assert (saliency - gradient).abs().max() > 0.1 * gradient.max()


class Reused(nn.Module):
    """A rectified map that two layers read, and a sum in place between two ReLUs in place."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.one, self.two, self.three = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        if not self.in_place:
            a = torch.relu(self.one(x))
            return torch.relu(self.two(a) + self.three(a)).mean((2, 3))
        a = self.one(x)
        a.relu_()
        b = self.two(a)
        b += self.three(a)
        F.relu(b, inplace=True)
        return b.mean((2, 3))


@pytest.mark.parametrize("name", RULES)
def test_a_map_that_is_read_twice_and_changed_in_place_is_rectified_once(name, seeded, monkeypatch, x, y):
    maps = [METHODS[name](bare(seeded(Reused, in_place, seed=1)), x, y) for in_place in (True, False)]
    same(*maps)
    monkeypatch.setattr(torch, "relu", RULES[name].apply)
    same(maps[0], methods.gradient(bare(seeded(Reused, False, seed=1)), x, y))


@pytest.mark.parametrize("name", [*RULES, "guided_grad_cam"])
def test_a_network_without_relus_is_an_error(name, tokens, seeded, x):
    message = "Tokens calls no ReLU .* nothing to rectify; use gradient, smooth_grad or integrated_gradients"
    with pytest.raises(UnsuitedError, match=message):
        METHODS[name](tokens, x)
    with pytest.raises(UnsuitedError, match="Small calls no ReLU"):
        METHODS[name](bare(seeded(Small, nn.Hardtanh()), "two"), x)


def test_a_relu_off_the_path_does_not_count(seeded, x):
    class Aside(Small):
        def forward(self, x):
            torch.relu(x.detach())
            return super().forward(x)

    with pytest.raises(UnsuitedError, match="calls no ReLU on the way"):
        methods.guided_backprop(bare(seeded(Aside, torch.tanh)), x)


def test_captum_s_guided_backprop_agrees_where_the_relus_are_modules(curved, seeded, x, y):
    class Modules(Small):
        def __init__(self):
            super().__init__(None)
            self.first, self.second = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.head(self.second(self.two(self.first(self.one(x)))).mean((2, 3)))

    model = seeded(Modules, seed=2)
    for ours, theirs in (("guided_backprop", "GuidedBackprop"), ("deconvnet", "Deconvolution")):
        peer = getattr(captum(), theirs)(model).attribute(x.clone().requires_grad_(), target=y).detach()
        same(METHODS[ours](bare(model), x, y), peer.abs().amax(1, keepdim=True))
    peer = captum().GuidedGradCam(model, model.two)
    expected = peer.attribute(x.clone().requires_grad_(), target=y, interpolate_mode="bilinear").detach()
    same(methods.guided_grad_cam(bare(model, "two"), x, y), expected.abs().amax(1, keepdim=True))


def test_captum_s_guided_backprop_is_the_plain_gradient_where_they_are_functions(seeded, x, y):
    model = seeded(Small, F.relu, seed=2)
    peer = captum().GuidedBackprop(model).attribute(x.clone().requires_grad_(), target=y).detach()
    same(peer.abs().amax(1, keepdim=True), methods.gradient(bare(model), x, y))
    right = methods.guided_backprop(bare(model), x, y)
    assert (peer.abs().amax(1, keepdim=True) - right).abs().max() > 0.1 * right.max()


def test_guided_grad_cam_is_guided_backprop_where_grad_cam_looks(pooled, x, y):
    L = F.interpolate(methods.grad_cam(pooled, x, y), SIZE, mode="bilinear", align_corners=False)
    same(methods.guided_grad_cam(pooled, x, y), methods.guided_backprop(pooled, x, y) * L)


# --- integrated gradients -------------------------------------------------------------------------------------------


def plain_gradient(classifier, x, y, c):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(classifier(leaf)[c, y], leaf)[0][c]


def points_of(x, origin, alphas):
    return [origin + alpha * (x - origin) for alpha in alphas]


@pytest.mark.parametrize("erase", ["black", "mean", "blur"])
def test_integrated_gradients_are_the_mean_gradient_on_the_path(erase, curved, x, y):
    fillings = {"black": torch.zeros_like(x), "mean": x.new_tensor(curved.mean).view(1, 3, 1, 1).expand_as(x)}
    origin = fillings[erase] if erase in fillings else methods._integrated_gradients.baseline(curved, x, erase)
    saliency = methods.integrated_gradients(curved, x, y, steps=5, erase=erase)
    for c in range(3):
        rows = [plain_gradient(curved, point, y[c], c) for point in points_of(x, origin, [0.2, 0.4, 0.6, 0.8, 1.0])]
        same(saliency[c, 0], ((x - origin)[c] * sum(rows) / 5).sum(0))


def test_integrated_gradients_are_complete(curved, x, y):
    def missing(steps, erase):
        origin = methods._integrated_gradients.baseline(curved, x, erase)
        rise = curved.scores(x, y) - curved.scores(origin, y)
        saliency = methods.integrated_gradients(curved, x, y, steps=steps, erase=erase, chunk=64)
        return (saliency.sum((1, 2, 3)) - rise).abs().max() / rise.abs().max()

    for erase in ("black", "mean"):
        few, many = missing(20, erase), missing(200, erase)
        assert many < 0.01
        assert many < few / 5


def test_integrated_gradients_of_a_linear_network_are_exact(seeded, x):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    classifier, y = wrap(seeded(Linear), normalization=((0.4,), (0.2,)), size=SIZE), torch.tensor([1, 2, 3])
    saliency = methods.integrated_gradients(classifier, x, y, steps=1)
    same(saliency.sum((1, 2, 3)), classifier.scores(x, y) - classifier.scores(0 * x, y))
    same(saliency, methods.input_x_gradient(classifier, x, y))


def test_calm_integrated_gradients_are_a_sum_of_maps_from_the_mean_color(curved, x, y):
    origin = x.new_tensor(curved.mean).view(1, 3, 1, 1)
    saliency = methods.calm_integrated_gradients(curved, x, y, steps=4)
    for c in range(3):
        points = points_of(x, origin, [0, 0.25, 0.5, 0.75, 1])
        same(saliency[c, 0], sum(plain_gradient(curved, point, y[c], c).abs().amax(0) for point in points) / 4)
    black = methods.calm_integrated_gradients(curved, x, y, steps=4, erase="black")
    assert (black - saliency).abs().max() > 1e-3 * saliency.max()


@pytest.mark.parametrize("name", ["integrated_gradients", "calm_integrated_gradients"])
def test_a_chunk_changes_only_the_number_of_forwards(name, curved, x, y):
    method = partial(METHODS[name].method, steps=6)
    expected = method(curved, x, y)
    sizes = []
    curved.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    points = 6 if name == "integrated_gradients" else 7
    for chunk, largest in ((1, 3), (7, 6), (1000, 3 * points - 3)):
        sizes.clear()
        same(method(curved, x, y, chunk=chunk), expected)
        assert max(sizes) == largest
        assert sum(sizes) == 3 * points
    sizes.clear()
    method(curved, x)
    assert sum(sizes) == 3 * points


@pytest.mark.parametrize("name", ["integrated_gradients", "calm_integrated_gradients"])
def test_a_path_needs_a_step(name, curved, x):
    for settings in ({"steps": 0}, {"chunk": 0}):
        with pytest.raises(ValueError, match="expected steps >= 1 and chunk >= 1 images at a time, got steps="):
            METHODS[name].method(curved, x, **settings)


def test_another_score_is_integrated(curved, x, y):
    saliency = methods.integrated_gradients(curved, x, y, steps=300, score=log_probability, chunk=64)
    rise = curved.scores(x, y, log_probability) - curved.scores(0 * x, y, log_probability)
    torch.testing.assert_close(saliency.sum((1, 2, 3)), rise.detach(), rtol=0.02, atol=1e-4)


def test_captum_s_integrated_gradients_agree(curved, x, y):
    peer = captum().IntegratedGradients(bare(curved.model).model)
    for settings, n in (({"method": "riemann_right"}, 7), ({"method": "riemann_right"}, 50)):
        expected = peer.attribute(x, target=y, n_steps=n, **settings).sum(1, keepdim=True).detach()
        same(methods.integrated_gradients(bare(curved.model), x, y, steps=n), expected, 1e-7)


# --- Eigen-CAM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [False, True])
def test_eigen_cam_is_the_first_singular_vector(center, curved, x):
    features, saliency = curved.features(x), methods.eigen_cam(curved, x, center=center)
    for A, S in zip(features.numpy(), saliency[:, 0].numpy(), strict=True):
        rows = A.reshape(A.shape[0], -1).T
        rows = rows - rows.mean(0) if center else rows
        projection = rows @ np.linalg.svd(rows)[2][0]
        peak = projection[np.abs(projection).argmax()]
        assert np.allclose(np.maximum(projection * np.sign(peak), 0), S.ravel(), rtol=0, atol=1e-9)
        assert np.isclose(S.max(), np.abs(projection).max())


def test_eigen_cam_of_rectified_features_keeps_their_energy(curved, x):
    """Without centering the ReLU cuts nothing off, and no other direction holds more of the features."""
    A, S = curved.features(x), methods.eigen_cam(curved, x)
    energy = torch.linalg.matrix_norm(A.flatten(2), 2)
    same(S.flatten(1).norm(dim=1), energy)


def test_eigen_cam_does_not_depend_on_the_sign_of_a_singular_vector(curved, x, monkeypatch):
    expected = methods.eigen_cam(curved, x, center=True)
    svd = torch.linalg.svd

    def negated(*args, **kwargs):
        U, D, V = svd(*args, **kwargs)
        return torch.return_types.linalg_svd((-U, D, -V))

    monkeypatch.setattr(torch.linalg, "svd", negated)
    assert torch.equal(methods.eigen_cam(curved, x, center=True), expected)


def test_eigen_cam_of_half_precision_features(curved, x):
    half = bare(curved.model.bfloat16(), "last")
    saliency = methods.eigen_cam(half, x)
    assert saliency.dtype == torch.bfloat16
    assert (saliency > 0).any()


def test_pytorch_grad_cam_s_eigen_cam_is_the_centered_one_of_either_sign(curved, x):
    classifier = bare(curved.model, "last")
    with grad_cams().EigenCAM(classifier.model, [classifier.model.last]) as peer:
        peer.get_target_width_height = lambda _: (16, 12)
        found = torch.from_numpy(peer(x.clone(), targets=None))[:, None].double()
    A = classifier.features(x).flatten(2)
    rows = (A - A.mean(2, keepdim=True)).transpose(1, 2)
    v = torch.linalg.svd(rows).Vh[:, 0]
    for c in range(3):
        ours = methods.eigen_cam(classifier, x[c : c + 1], center=True)
        other = (-(rows[c] @ v[c]) * torch.sign((rows[c] @ v[c])[(rows[c] @ v[c]).abs().argmax()])).relu()
        distances = [(unit(m.view(1, 1, 12, 16))[0] - found[c]).abs().max() for m in (ours, other)]
        assert min(distances) < 1e-5


# --- FullGrad -------------------------------------------------------------------------------------------------------


class Bent(nn.Module):
    """Every activation and norm that leaves something of its tangent."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, 2, 1)
        self.three, self.head = nn.Linear(8, 6), nn.Linear(6, 4)
        self.bends = nn.ModuleList([nn.ReLU6(inplace=True), nn.Hardtanh(-0.2, 0.3), nn.ELU(), nn.SELU(), nn.CELU()])
        self.bends.extend([nn.GELU(), nn.SiLU(inplace=True), nn.Mish(), nn.Softplus(), nn.Hardswish()])
        self.bends.extend([nn.Hardsigmoid(), nn.Tanh(), nn.Sigmoid(), nn.LeakyReLU()])

    def forward(self, x):
        a = 20 * self.one(x)
        b = torch.cat([bend(a.clone()) for bend in self.bends], 1)
        a = self.norm(F.max_pool2d(b.unflatten(1, (-1, 8)).sum(1), 2))
        return self.head(self.three(self.two(a).tanh().mean((2, 3))).sigmoid())


COMPLETE = {
    "mini_resnet": lambda: MiniResNet(4, widths=(4, 4, 6, 8)),
    "mini_vgg": lambda: MiniVGG(4, widths=(4, 4, 4, 6, 8)),
    "bent": Bent,
    "small": lambda: Small(nn.ReLU(inplace=True)),
    "resnet18": ZOO["resnet18"],
    "mobilenet": lambda: torchvision.models.mobilenet_v2(num_classes=4, width_mult=0.25),
}


@pytest.mark.parametrize("network", COMPLETE)
def test_the_full_gradient_sums_to_the_score(network, seeded, y):
    """With biases, statistics and a normalization that all matter."""
    model = seeded(COMPLETE[network], seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.3 * torch.sin(torch.arange(parameter.numel()))
    classifier = wrap(model, normalization=((0.45, 0.5, 0.55), (0.25, 0.3, 0.2)), size=(64, 64))
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parts = full_gradient(classifier, x, y[:2])
    scores = classifier.scores(x, y[:2]).detach()
    same(parts.total(), scores, 1e-6 * float(1 + scores.abs().max()))
    rest = sum(part.flatten(1).sum(1) for part in (parts.image, *parts.maps))
    assert (rest - scores).abs().max() > 1e-3


def test_a_bias_s_shares_sum_to_bias_times_derivative(seeded, x, y):
    model = seeded(Small, nn.ReLU(inplace=True), seed=1)
    parts = full_gradient(bare(model), x[:1], y[:1])
    biases = [model.two.bias, model.one.bias, model.head.bias]
    gradients = torch.autograd.grad(model(x[:1])[0, y[0]], biases)
    expected = [(g * b).detach() for g, b in zip(gradients, biases, strict=True)]
    for share, of_bias in zip((*parts.maps, *parts.rest), expected, strict=True):
        same(share[0].reshape(len(of_bias), -1).sum(1), of_bias)


@pytest.mark.parametrize("rescale", ["channel", "layer", "none"])
def test_full_grad_lays_the_shares_over_each_other(rescale, pooled, x, y):
    def psi(maps):
        maps = maps.abs()
        if rescale == "none":
            return maps
        if rescale == "layer":
            return (maps - maps.min()) / (maps.max() - maps.min())
        return torch.stack([(one - one.min()) / max(float(one.max() - one.min()), 1e-300) for one in maps])

    parts = full_gradient(pooled, x, y)
    for c in range(3):
        expected = 0
        for part in (parts.image, *parts.maps):
            up = F.interpolate(psi(part[c])[None], SIZE, mode="bilinear", align_corners=False)
            expected = expected + up.sum(1, keepdim=True)
        same(methods.full_grad(pooled, x, y, rescale=rescale)[c : c + 1], expected)


def test_full_grad_on_tokens_is_an_error(tokens, x, seeded):
    message = "full_grad lays convolutional biases over the image.* a layer norm .*use input_x_gradient"
    with pytest.raises(UnsuitedError, match=message):
        methods.full_grad(tokens, x)

    class Cells(Small):
        def forward(self, x):
            return self.head(self.two(self.one(x)).flatten(2).transpose(1, 2)).mean(1)

    with pytest.raises(UnsuitedError, match="a linear layer has biases that it cannot place"):
        methods.full_grad(bare(seeded(Cells, None)), x)

    class Batch(Small):
        def forward(self, x):
            return super().forward(F.batch_norm(x, None, None, training=True))

    with pytest.raises(UnsuitedError, match="a batch norm without running statistics"):
        methods.full_grad(bare(seeded(Batch, F.relu)), x)


def test_an_unknown_rescale_is_an_error(pooled, x, plain):
    with pytest.raises(LookupError, match="no rescale called 'chanel'; did you mean channel"):
        methods.full_grad(pooled, x, rescale="chanel")


class Three(nn.Module):
    """Three convolutions with biases; scores so high that the peer's 1e-7 is nothing."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.two, self.three = nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.head = nn.Linear(6, 4)

    def last(self, a):
        return self.three(a)

    def forward(self, x):
        a = self.norm(self.one(x)).relu()
        return 1e5 * self.head(self.last(self.two(a).relu()).relu().mean((2, 3)))


class Hidden(Three):
    """The same, its last convolution called as a function."""

    def last(self, a):
        return F.conv2d(a, self.three.weight, self.three.bias, padding=1)


def peer_full_grad(model, x, y):
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with grad_cams().FullGrad(model, []) as peer:
        return torch.from_numpy(peer(x.clone(), targets=[ClassifierOutputTarget(int(c)) for c in y]))[:, None].double()


def test_pytorch_grad_cam_s_full_grad_scales_every_channel(seeded, x, y):
    """So the size of a bias does not count there: shares of one everywhere would give the same map."""
    classifier = bare(seeded(Three, seed=2))
    peer, ours = peer_full_grad(classifier.model, x, y), methods.full_grad(classifier, x, y)
    same(unit(methods.full_grad(classifier, x, y, rescale="channel")), peer, 1e-4)
    assert (unit(ours) - peer).abs().max() > 0.01


def test_a_bias_that_no_module_adds_counts(seeded, x, y):
    module, function = bare(seeded(Three, seed=2)), bare(seeded(Hidden, seed=2))
    same(methods.full_grad(module, x, y), methods.full_grad(function, x, y))


# --- errors and costs -----------------------------------------------------------------------------------------------

FORWARDS = {
    "guided_backprop": 1,
    "deconvnet": 1,
    "guided_grad_cam": 2,
    "integrated_gradients": 50,
    "calm_integrated_gradients": 51,
    "eigen_cam": 1,
    "full_grad": 1,
}


@pytest.mark.parametrize("name", FORWARDS)
def test_the_cost_is_counted(name, pooled, x):
    passes = []
    pooled.model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    METHODS[name](pooled, x)
    assert sum(passes) == FORWARDS[name] * len(x)
    assert re.match(rf"{FORWARDS[name]} forwards?\b", METHODS[name].cost)


def test_eigen_cam_checks_a_label_that_it_does_not_need(curved, x, plain):
    with pytest.raises(ValueError, match="label 9 is outside"):
        methods.eigen_cam(curved, x, torch.tensor([0, 9, 1]))
