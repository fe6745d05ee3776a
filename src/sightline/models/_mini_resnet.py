"""MiniResNet. A residual network of 0.65 M parameters for images of 64 pixels.

After He, Zhang, Ren, Sun: Deep residual learning for image recognition. CVPR 2016. *Differs:* one block a stage, whose
first convolution keeps the width of its input; a 3x3 stem without pooling.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from sightline.classifier import Classifier, wrap
from sightline.types import Features, Images, Logits

CENTERED = (0.5,), (0.25,)
"""Mean and standard deviation for networks that start from random weights, whatever their channels."""


class MiniResNet(nn.Module):
    """Stem and four stages at 1/2, 1/2, 1/4, 1/8, 1/16 of the input, global average pooling, one linear layer.

    `last_stride=1` keeps the last stage at 1/8: maps of twice the side. `head="linear"` pools, then maps to classes;
    `head="conv"` maps every cell to classes by a 1x1 convolution, then pools; `head="flat"` maps all cells of images of
    `size` pixels at once, without pooling, and so knows left from right. The output of every tap is after its ReLU.

    Raises:
        ValueError: a stride or a head that does not exist, or not four widths.
    """

    taps: ClassVar[tuple[str, ...]] = ("stem", "layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        classes: int = 20,
        *,
        channels: int = 3,
        widths: Sequence[int] = (32, 64, 128, 256),
        last_stride: int = 2,
        head: str = "linear",
        size: int = 64,
    ) -> None:
        super().__init__()
        if last_stride not in (1, 2):
            raise ValueError(f"expected last_stride 1 or 2, got {last_stride}")
        if head not in ("linear", "conv", "flat"):
            raise ValueError(f"expected head 'linear', 'conv' or 'flat', got {head!r}")
        if len(widths) != 4:
            raise ValueError(f"expected four widths, one a stage, got {tuple(widths)}")
        a, b, c, d = widths
        self.stem = nn.Sequential(conv(channels, a, stride=2), nn.BatchNorm2d(a), nn.ReLU())
        self.layer1 = Block(a, a, stride=1)
        self.layer2 = Block(a, b, stride=2)
        self.layer3 = Block(b, c, stride=2)
        self.layer4 = Block(c, d, stride=last_stride)
        cells = math.ceil(size / (8 * last_stride)) ** 2 if head == "flat" else 1
        self.avgpool: nn.Module = nn.Identity() if head == "flat" else nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(d, classes, 1) if head == "conv" else nn.Linear(d * cells, classes)
        self.apply(initialize)

    def forward(self, x: Images) -> Logits:
        """Return logits (b, classes)."""
        a = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        convolves = isinstance(self.head, nn.Conv2d)
        logits: Tensor = self.avgpool(self.head(a)) if convolves else self.head(self.avgpool(a).flatten(1))
        return logits.flatten(1)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is projected where stride or width change."""

    def __init__(self, width_in: int, width_out: int, *, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width_in, width_in, stride=stride), nn.BatchNorm2d(width_in)
        self.conv2, self.bn2 = conv(width_in, width_out), nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            projection = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width_out))
        self.relu = nn.ReLU()
        self.relu_out = nn.ReLU()

    def forward(self, x: Features) -> Tensor:
        """Return relu(shortcut(x) + residual(x)), (b, width_out, i / stride, j / stride)."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        a: Tensor = self.relu_out(residual + self.shortcut(x))
        return a


def conv(width_in: int, width_out: int, *, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias: a batch norm follows."""
    return nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)


def initialize(module: nn.Module) -> None:
    """Draw a convolution's weights as He et al. (fan out, ReLU), channels last in memory, and set its bias to zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mini_resnet(
    classes: int = 20,
    *,
    channels: int = 3,
    widths: Sequence[int] = (32, 64, 128, 256),
    last_stride: int = 2,
    head: str = "linear",
    size: int = 64,
    layer: str = "layer4",
    seed: int = 0,
) -> Classifier:
    """Return a classifier over a MiniResNet with random weights."""
    with seeded(seed):
        model = MiniResNet(classes, channels=channels, widths=widths, last_stride=last_stride, head=head, size=size)
    return wrap(model, layer=layer, normalization=CENTERED, size=size)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw the weights of new modules on the CPU from `seed`, and give the global random state back."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        yield
