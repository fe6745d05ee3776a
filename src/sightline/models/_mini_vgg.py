"""MiniVGG. A plain convolutional network with batch norm, 1.2 M parameters, for studies that go layer by layer.

After Simonyan, Zisserman: Very deep convolutional networks for large-scale image recognition. ICLR 2015. *Differs:*
five blocks of two convolutions; global average pooling and one linear layer in place of three.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from sightline.classifier import Classifier, wrap
from sightline.models._mini_resnet import CENTERED, conv, initialize, seeded
from sightline.types import Images, Logits


class MiniVGG(nn.Module):
    """Five blocks (conv, BN, ReLU, conv, BN, ReLU, max pool) in one indexable `features`, then a linear layer.

    The taps are the last ReLU of each block, before its pool, at 1, 1/2, 1/4, 1/8 and 1/16 of the input.

    Raises:
        ValueError: not five widths.
    """

    taps: ClassVar[tuple[str, ...]] = ("features.5", "features.12", "features.19", "features.26", "features.33")

    def __init__(
        self,
        classes: int = 20,
        *,
        channels: int = 3,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
    ) -> None:
        super().__init__()
        if len(widths) != 5:
            raise ValueError(f"expected five widths, one a block, got {tuple(widths)}")
        widths_in = (channels, *widths[:-1])
        self.features = nn.Sequential(
            *(layer for pair in zip(widths_in, widths, strict=True) for layer in block(*pair))
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], classes)
        self.apply(initialize)

    def forward(self, x: Images) -> Logits:
        """Return logits (b, classes); height and width of `x` are at least 32."""
        logits: Tensor = self.head(self.avgpool(self.features(x)).flatten(1))
        return logits


def block(width_in: int, width_out: int) -> tuple[nn.Module, ...]:
    """Return the seven layers of one block."""
    first = (conv(width_in, width_out), nn.BatchNorm2d(width_out), nn.ReLU())
    second = (conv(width_out, width_out), nn.BatchNorm2d(width_out), nn.ReLU())
    return (*first, *second, nn.MaxPool2d(2))


def mini_vgg(
    classes: int = 20,
    *,
    channels: int = 3,
    widths: Sequence[int] = (16, 32, 64, 128, 256),
    size: int = 64,
    layer: str | None = None,
    seed: int = 0,
) -> Classifier:
    """Return a classifier over a MiniVGG with random weights."""
    with seeded(seed):
        model = MiniVGG(classes, channels=channels, widths=widths)
    return wrap(model, layer=layer, normalization=CENTERED, size=size)
