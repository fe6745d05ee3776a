"""GAP networks. VGG-16, Inception v3 and ResNet-50 that end in a class convolution and global average pooling.

After Zhou et al., Learning deep features for discriminative localization, CVPR 2016; in the form of Choe et al.,
Evaluating weakly supervised object localization methods right, CVPR 2020, and Kim et al., CALM, ICCV 2021: the class
logits are the means of maps with 28 x 28 cells for an image of 224 pixels, `large=False` 14 x 14.

Each is one `nn.Sequential` of torchvision's own layers under torchvision's names, then `head`, the 1x1 class
convolution. Only the trunk takes weights, else it is drawn as He et al.; the layers behind it start Xavier-uniform with
zero bias.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sightline.classifier import Classifier, Normalization, wrap
from sightline.models._files import is_weights
from sightline.models._mini_resnet import initialize, seeded
from sightline.models._torchvision import network
from sightline.types import Features

WIDE = 1024
"""Channels of the convolution behind the trunks of VGG and Inception."""


def vgg16_gap(
    classes: int = 1000,
    *,
    large: bool = True,
    weights: str = "none",
    size: int = 224,
    layer: str = "relu",
    seed: int = 0,
) -> Classifier:
    """Return VGG-GAP: the convolutions of VGG-16 without the last pool (`large`: the last two), conv 3x3, ReLU, head.

    `weights` is "none", the name of torchvision's weights of VGG-16, or a file of such weights.

    Raises:
        LookupError: unknown weights or layer.
        ConnectionError: weights that cannot be downloaded.
    """
    with seeded(seed):
        network, normalization = from_torchvision("vgg16", weights, {"init_weights": False})
        pools = ("23", "30") if large else ("30",)
        features = [(n, m) for n, m in network.get_submodule("features").named_children() if n not in pools]
        model = with_head({"features": nn.Sequential(OrderedDict(features)), **widened(512)}, WIDE, classes)
    return wrap(model, layer=layer, normalization=normalization, size=size)


def inception_v3_gap(
    classes: int = 1000,
    *,
    large: bool = True,
    weights: str = "none",
    size: int = 224,
    layer: str = "relu",
    seed: int = 0,
) -> Classifier:
    """Return Inception v3 up to `Mixed_6e`, conv 3x3, ReLU, head; `large`: without the stride of `Mixed_6a`.

    `weights` is "none", the name of torchvision's weights of Inception v3, or a file of such weights; images are scaled
    to [-1, 1] for all.

    *Differs:* every convolution and pool of the stem and of `Mixed_6a` is padded by one, so that the cells are eighths
    (sixteenths) of the image; unpadded, as in the network itself, 224 pixels give 25 cells (12 with the stride).

    Raises:
        LookupError: unknown weights or layer.
        ConnectionError: weights that cannot be downloaded.
    """
    with seeded(seed):
        network, _ = from_torchvision("inception_v3", weights, {"init_weights": False})
        layers = dict(network.named_children())
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_4a_3x3"):
            convolution(network, f"{name}.conv").padding = (1, 1)
        layers.update({name: nn.MaxPool2d(3, stride=2, padding=1) for name in ("maxpool1", "maxpool2")})
        layers["Mixed_6a"] = Reduction(network.get_submodule("Mixed_6a"), stride=1 if large else 2)
        names = list(layers)
        trunk = {n: layers[n] for n in names[: names.index("Mixed_6e") + 1]}
        model = with_head({**trunk, **widened(768)}, WIDE, classes)
    return wrap(model, layer=layer, normalization=((0.5,) * 3, (0.5,) * 3), size=size)


def resnet50_gap(
    classes: int = 1000,
    *,
    large: bool = True,
    weights: str = "none",
    size: int = 224,
    layer: str = "layer4",
    seed: int = 0,
) -> Classifier:
    """Return ResNet-50 without the stride of `layer4` (`large`: nor that of `layer3`), not dilated, and head.

    `weights` is "none", the name of torchvision's weights of ResNet-50, or a file of such weights.

    Raises:
        LookupError: unknown weights or layer.
        ConnectionError: weights that cannot be downloaded.
    """
    with seeded(seed):
        network, normalization = from_torchvision("resnet50", weights)
        for stage in ("layer3", "layer4") if large else ("layer4",):
            convolution(network, f"{stage}.0.conv2").stride = (1, 1)
            convolution(network, f"{stage}.0.downsample.0").stride = (1, 1)
        trunk = {n: m for n, m in network.named_children() if n not in ("avgpool", "fc")}
        model = with_head(trunk, 2048, classes)
    return wrap(model, layer=layer, normalization=normalization, size=size)


class Reduction(nn.Module):
    """`Mixed_6a` of Inception v3, padded: a convolution, a chain of three and a max pool, side by side."""

    def __init__(self, block: nn.Module, *, stride: int) -> None:
        super().__init__()
        for name in ("branch3x3.conv", "branch3x3dbl_3.conv"):
            last = convolution(block, name)
            last.stride, last.padding = (stride, stride), (1, 1)
        self.branch3x3 = block.get_submodule("branch3x3")
        self.branch3x3dbl = nn.Sequential(*(block.get_submodule(f"branch3x3dbl_{n}") for n in (1, 2, 3)))
        self.branch_pool = nn.MaxPool2d(3, stride, padding=1)

    def forward(self, x: Features) -> Tensor:
        """Return (b, 768, i, j) of (b, 288, i * stride, j * stride)."""
        return torch.cat([self.branch3x3(x), self.branch3x3dbl(x), self.branch_pool(x)], 1)


def widened(channels: int) -> dict[str, nn.Module]:
    """Return a 3x3 convolution to `WIDE` channels and its ReLU."""
    return {"conv": fresh(nn.Conv2d(channels, WIDE, 3, padding=1)), "relu": nn.ReLU()}


def with_head(trunk: Mapping[str, nn.Module], channels: int, classes: int) -> nn.Sequential:
    """Return the trunk, the class convolution and global average pooling in a row."""
    pool = {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict({**trunk, "head": fresh(nn.Conv2d(channels, classes, 1)), **pool}))


def fresh(layer: nn.Conv2d) -> nn.Conv2d:
    """Draw the weights of a new convolution Xavier-uniform, and set its bias to zero."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def convolution(model: nn.Module, name: str) -> nn.Conv2d:
    """Return the convolution called `name`."""
    return cast("nn.Conv2d", model.get_submodule(name))


def from_torchvision(
    name: str, weights: str, untrained: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Normalization]:
    """Return a network of torchvision and the normalization of its weights; `untrained` are settings without weights.

    Raises:
        LookupError: unknown weights.
        FileNotFoundError, ValueError: a file of weights that is not there or does not fit.
        ConnectionError: weights that cannot be downloaded; the message says what to do.
    """
    own = weights == "none" or is_weights(weights)
    model, theirs = network(name, weights, (untrained or {}) if own else {}, text=f"{name}_gap")
    if theirs is None:
        return model.apply(initialize) if weights == "none" else model, "imagenet"
    recipe = theirs.transforms()
    return model, (recipe.mean, recipe.std)
