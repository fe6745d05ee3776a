"""Agreement with captum, pytorch-grad-cam and torch-cam where they are right, and what they get wrong elsewhere.

pytorch-grad-cam is not always installed (it asks for another build of OpenCV); its values on one small network, whose
weights are a formula, are therefore kept here, compared with ours always and with the package where it can be imported.
"""

import pytest
import torch
from torch import nn

from sightline import methods
from sightline.classifier import Classifier, wrap
from sightline.maps import resize, unit

SIZE = (24, 32)


def captum():
    return pytest.importorskip("captum.attr", reason="captum is not installed")


def grad_cams():
    return pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam or what it needs is not installed")


@pytest.fixture
def y():
    return torch.tensor([3, 0, 4])


@pytest.fixture
def unnormalized(curved):
    """The peers see the network, not the classifier: here it gets the images as they are."""
    return wrap(curved.model, layer="last", normalization="none", size=SIZE)


def logit_times(scale):
    return lambda logits, y: scale * logits.gather(1, y[:, None])[:, 0]


class Scaled(nn.Module):
    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        return self.scale * self.model(x)


def peer_map(name, classifier, x, y, *, scale=1, full=False):
    """Return a map of pytorch-grad-cam: scaled to [0, 1] on the layer's grid, or `full` at the input's size."""
    package = grad_cams()
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer = dict(classifier.model.named_modules())[classifier.layer]
    i, j = classifier.features(x).shape[2:]
    with getattr(package, name)(Scaled(classifier.model, scale).eval(), [layer]) as peer:
        if not full:
            peer.get_target_width_height = lambda _: (j, i)
        return torch.from_numpy(peer(x.clone(), targets=[ClassifierOutputTarget(int(c)) for c in y]))[:, None]


GRAD_CAMS = {
    "GradCAM": ("grad_cam", {}),
    "XGradCAM": ("x_grad_cam", {}),
    "LayerCAM": ("layer_cam", {}),
    "HiResCAM": ("hires_cam", {}),
    "ScoreCAM": ("score_cam", {"mode": "bilinear_corners"}),
    "AblationCAM": ("ablation_cam", {}),
}


def ours(peer, classifier, x, y, **settings):
    name, arguments = {**GRAD_CAMS, "GradCAMPlusPlus": ("grad_cam_pp", {})}[peer]
    return getattr(methods, name)(classifier, x, y, **arguments, **settings)


@pytest.mark.parametrize("peer", GRAD_CAMS)
def test_pytorch_grad_cam_agrees(peer, unnormalized, x, y):
    """On the layer's grid, and after its own resizing (bilinear, then the range once more)."""
    saliency = unit(ours(peer, unnormalized, x, y))
    assert saliency.amax((1, 2, 3)).sum() >= 2
    torch.testing.assert_close(peer_map(peer, unnormalized, x, y).double(), saliency, rtol=0, atol=1e-5)
    resized = unit(resize(saliency, SIZE))
    torch.testing.assert_close(peer_map(peer, unnormalized, x, y, full=True).double(), resized, rtol=0, atol=1e-5)


def test_pytorch_grad_cam_pp_agrees_where_its_epsilon_is_small(unnormalized, x, y):
    score = logit_times(1e4)
    saliency = unit(ours("GradCAMPlusPlus", unnormalized, x, y, score=score))
    peer = peer_map("GradCAMPlusPlus", unnormalized, x, y, scale=1e4).double()
    torch.testing.assert_close(peer, saliency, rtol=0, atol=1e-5)


def test_pytorch_grad_cam_pp_is_wrong_where_its_epsilon_is_not(unnormalized, x, y):
    """Its denominator is 2 G^2 + (sum A) G^3 + 1e-6, and G^2 is of that order: the weights change."""
    A, G = unnormalized.features_and_gradient(x, y)

    def formula(epsilon):
        denominator = 2 * G**2 + A.sum((2, 3), keepdim=True) * G**3 + epsilon
        w = (G**2 / denominator * G.relu()).sum((2, 3), keepdim=True)
        return unit((w * A).sum(1, keepdim=True).relu())

    peer = peer_map("GradCAMPlusPlus", unnormalized, x, y).double()
    torch.testing.assert_close(peer, formula(1e-6), rtol=0, atol=1e-5)
    torch.testing.assert_close(unit(ours("GradCAMPlusPlus", unnormalized, x, y)), formula(0), rtol=0, atol=1e-9)
    assert (peer - formula(0)).abs().max() > 1e-2


def test_pytorch_grad_cam_reads_features_that_an_in_place_relu_has_changed(pooled, x, y):
    """The layer is the batch norm before an in-place ReLU: the peer weights what the ReLU left."""
    classifier = wrap(pooled.model, layer="last.1", normalization="none", size=SIZE)
    A, G = classifier.features_and_gradient(x, y)
    w = G.mean((2, 3), keepdim=True)
    assert (A < 0).any()
    right, wrong = (unit((w * a).sum(1, keepdim=True).relu()) for a in (A, A.relu()))
    torch.testing.assert_close(unit(methods.grad_cam(classifier, x, y)), right, rtol=0, atol=1e-9)
    peer = peer_map("GradCAM", classifier, x, y).double()
    torch.testing.assert_close(peer, wrong, rtol=0, atol=1e-5)
    assert (right - wrong).abs().max() > 1e-2


def test_pytorch_grad_cam_s_ablation_is_no_zero_where_features_are_negative(pooled, x, y):
    """It sets a channel to the smallest feature minus 1e7 unless the smallest is zero; the paper sets it to zero."""
    classifier = pooled.at("last.0")
    saliency = unit(methods.ablation_cam(classifier, x, y))
    assert (classifier.features(x) < 0).any()
    assert (peer_map("AblationCAM", classifier, x, y).double() - saliency).abs().max() > 1e-2


def test_pytorch_grad_cam_leaves_a_trace_and_we_do_not(unnormalized, x, y, trace, plain):
    model = unnormalized.model
    model.train()
    changed = trace(model)
    methods.grad_cam(unnormalized, x, y)
    assert changed() == []
    peer_map("GradCAM", unnormalized, x, y)
    assert {"training", "grad"} <= set(changed())


def test_captum_s_layer_grad_cam_agrees(unnormalized, x, y):
    peer = captum().LayerGradCam(unnormalized.model, unnormalized.model.last)
    saliency = methods.grad_cam(unnormalized, x, y)
    expected = peer.attribute(x, target=y, relu_attributions=True).detach()
    torch.testing.assert_close(saliency, expected, rtol=0, atol=1e-5)
    resized = captum().LayerAttribution.interpolate(expected, SIZE, interpolate_mode="bilinear")
    torch.testing.assert_close(resize(saliency, SIZE), resized, rtol=0, atol=1e-5)


def test_captum_s_saliency_and_input_x_gradient_agree(unnormalized, x, y):
    leaf = x.clone().requires_grad_()
    saliency = captum().Saliency(unnormalized.model).attribute(leaf, target=y).amax(1, keepdim=True)
    torch.testing.assert_close(methods.gradient(unnormalized, x, y), saliency, rtol=0, atol=1e-5)
    product = captum().InputXGradient(unnormalized.model).attribute(leaf, target=y).sum(1, keepdim=True).detach()
    torch.testing.assert_close(methods.input_x_gradient(unnormalized, x, y), product, rtol=0, atol=1e-5)


class Formula(nn.Module):
    """A network whose weights are sines, the same everywhere and always."""

    def __init__(self):
        super().__init__()
        self.last = nn.Sequential(nn.Conv2d(3, 5, 5, 4, 2), nn.ReLU())
        self.top = nn.Sequential(nn.Conv2d(5, 6, 3, 1, 1), nn.Tanh(), nn.Conv2d(6, 4, 1))
        self.double()
        with torch.no_grad():
            for n, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.sin((1.7 + n) * torch.arange(parameter.numel()) + n).view(parameter.shape) / 2)

    def forward(self, x):
        return 100 * self.top(self.last(x)).square().mean((2, 3))


def formula():
    x = (1 + torch.sin(0.7 * torch.arange(3 * 12 * 16, dtype=torch.float64) ** 1.3).view(1, 3, 12, 16)) / 2
    classifier: Classifier = wrap(Formula(), layer="last", normalization="none", size=(12, 16))
    return classifier, x, torch.tensor([2])


REFERENCE = {
    "GradCAM": [0.120477, 0.0, 0.0, 1.0, 0.198558, 0.0, 0.0, 0.108359, 0.0, 0.180937, 0.0, 0.0],
    "XGradCAM": [0.0, 0.0, 0.0, 0.0, 0.138566, 0.058294, 0.775185, 0.38599, 0.144026, 0.0, 0.0, 1.0],
    "LayerCAM": [0.0, 0.199879, 0.0, 0.10031, 0.0, 0.13664, 0.168824, 0.176595, 0.043744, 0.0, 0.348265, 1.0],
    "HiResCAM": [0.0, 0.188111, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.342311, 1.0],
    "ScoreCAM": [
        0.010324,
        0.330017,
        0.734825,
        0.453196,
        0.210622,
        0.352981,
        0.696027,
        0.582714,
        0.049933,
        0.0,
        0.319868,
        1.0,
    ],
    "AblationCAM": [0.0, 0.0, 0.0, 0.0, 0.059456, 0.214517, 0.819635, 0.261204, 0.139942, 0.0, 0.0, 1.0],
    "GradCAMPlusPlus": [
        0.019194,
        0.554827,
        0.857769,
        0.399911,
        0.183378,
        0.48778,
        0.716689,
        0.535678,
        0.052682,
        0.0,
        0.442708,
        1.0,
    ],
}


@pytest.mark.parametrize("peer", [*GRAD_CAMS, "GradCAMPlusPlus"])
def test_the_kept_values_of_pytorch_grad_cam_agree(peer):
    """pytorch-grad-cam 1.5.5, on the layer's 3 x 4 grid."""
    saliency = unit(ours(peer, *formula())).flatten()
    assert saliency.tolist() == pytest.approx(REFERENCE[peer], abs=1e-5)


@pytest.mark.parametrize("peer", [*GRAD_CAMS, "GradCAMPlusPlus"])
def test_the_kept_values_are_those_of_pytorch_grad_cam(peer):
    assert peer_map(peer, *formula()).flatten().tolist() == pytest.approx(REFERENCE[peer], abs=2e-6)


TORCH_CAMS = {"GradCAM": "grad_cam", "XGradCAM": "x_grad_cam", "LayerCAM": "layer_cam"}


def torch_cam(name, classifier, x, y, **settings):
    """Return a raw map of torch-cam on the layer's grid."""
    package = pytest.importorskip("torchcam.methods", reason="torch-cam is not installed")
    with getattr(package, name)(classifier.model, classifier.layer, **settings) as peer:
        maps = peer(y.tolist(), classifier.model(x.clone().requires_grad_()), normalized=False)
    return maps[0][:, None]


@pytest.mark.parametrize("peer", TORCH_CAMS)
def test_torch_cam_agrees(peer, unnormalized, x, y):
    saliency = getattr(methods, TORCH_CAMS[peer])(unnormalized, x, y)
    assert saliency.amax() > 0
    expected = torch_cam(peer, unnormalized, x, y)
    if peer == "XGradCAM":  # its denominator has an epsilon
        torch.testing.assert_close(unit(expected), unit(saliency), rtol=0, atol=1e-4)
    else:
        torch.testing.assert_close(expected, saliency, rtol=1e-9, atol=1e-12)


def test_torch_cam_agrees_on_cam(pooled, x, y):
    classifier = wrap(pooled.model, layer="last", normalization="none", size=SIZE)
    expected = torch_cam("CAM", classifier, x, y, fc_layer="head")
    torch.testing.assert_close(expected, methods.cam(classifier, x, y), rtol=1e-9, atol=1e-12)
