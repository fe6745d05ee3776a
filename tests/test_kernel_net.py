"""Kernel net: what the paper says of the network with which it shows contribution windows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sightline.hyperplanes import signed_distances
from sightline.models._kernel_net import KernelNet, kernel_net
from sightline.windows import measured_windows, window


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_forward_pass_is_convolutions_relu_a_mean_and_a_linear_layer(kernel):
    classifier = kernel_net(kernel=kernel, channels=6, layers=4, classes=7, size=20)
    model = classifier.model.double()
    x = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = x
    convolutions = [one for one in model.modules() if isinstance(one, nn.Conv2d)]
    assert len(convolutions) == 4
    assert [one.in_channels for one in convolutions] == [3, 6, 6, 6]
    for one in convolutions:
        r = kernel // 2
        a = F.conv2d(F.pad(a, (r, r, r, r)), one.weight, one.bias).clamp(min=0)
        assert a.shape == (2, 6, 20, 28)
    assert torch.allclose(classifier(x), a.mean((2, 3)) @ model.head.weight.T + model.head.bias)
    assert classifier.layer == "layer4"
    assert torch.allclose(classifier.features(x), a)
    assert not any(isinstance(one, nn.BatchNorm2d) for one in model.modules())


def test_the_defaults_are_five_layers_of_32_channels_at_128_pixels():
    classifier = kernel_net()
    assert (classifier.size, classifier.layer, classifier.channels) == ((128, 128), "layer5", 3)
    assert [tuple(one.weight.shape) for one in classifier.model.modules() if isinstance(one, nn.Conv2d)] == [
        (32, 3, 3, 3),
        *[(32, 32, 3, 3)] * 4,
    ]
    assert classifier.model.head.out_features == 10


def test_black_is_zero_and_dead_before_training_and_without_biases_after_it():
    for bias, dead in ((True, False), (False, True)):
        classifier = kernel_net(size=16, channels=4, bias=bias)
        assert (classifier.features(torch.zeros(1, 3, 16, 16)) == 0).all()
        assert (classifier.features(torch.ones(1, 3, 16, 16)) > 0).any()
        with torch.no_grad():
            for parameter in classifier.model.parameters():
                parameter += 0.1
        assert bool((classifier.features(torch.zeros(1, 3, 16, 16)) == 0).all()) is dead


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_windows_grow_with_the_layers(kernel):
    found = measured_windows(kernel_net(kernel=kernel, channels=8, size=20))
    assert [one.layer for one in found] == [f"layer{n}" for n in range(1, 6)]
    for depth, one in enumerate(found, 1):
        assert one.cells == one.pixels == (window([(kernel, 1)] * depth),) * 2


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_pixel_whose_window_reaches_nothing_active_has_no_gradient(kernel):
    classifier = kernel_net(kernel=kernel, channels=5, layers=2, size=24, seed=1)
    classifier.model.double()
    for one in classifier.model.modules():
        if isinstance(one, nn.Conv2d):
            nn.init.constant_(one.bias, -0.05)
    x = torch.zeros(1, 3, 24, 24, dtype=torch.float64)
    x[:, :, 10:14, 9:12] = 1
    active = (classifier.features(x) != 0).any(1)
    side = window([(kernel, 1)] * 2)
    near = F.max_pool2d(active.double()[None], side, 1, side // 2)[0] > 0
    assert 0 < float(near.double().mean()) < 1
    found = signed_distances(classifier, x, torch.tensor([3]))
    assert (found.saliency[:, 0][~near] == 0).all()
    assert (found.cam[:, 0][~active] == 0).all()
    assert (found.saliency > 0).any()
    if kernel == 1:
        assert (found.saliency[:, 0][~active] == 0).all()


def test_the_seed_decides_and_leaves_the_random_state():
    state = torch.get_rng_state()
    a, b, c = (kernel_net(size=16, channels=4, seed=seed).model.head.weight for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kernel", [0, 2, 4, -1])
def test_a_kernel_has_a_middle(kernel):
    with pytest.raises(ValueError, match=f"expected an odd kernel, .*, got {kernel}"):
        kernel_net(kernel=kernel)


@pytest.mark.parametrize("settings", [{"channels": 0}, {"layers": 0}])
def test_there_is_at_least_one_channel_and_one_layer(settings):
    with pytest.raises(ValueError, match="expected at least one channel and one layer"):
        KernelNet(**settings)
