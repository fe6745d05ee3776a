"""Kernel net. Plain convolutions of one kernel and ReLU, for the study of contribution windows.

Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions: saliency maps as alternatives to CAMs for weakly
supervised semantic segmentation, 2023, appendix B.1.1. *Differs:* channels and normalization are not in the paper;
here 32, and none: black enters as zero, which is what the padding is. It stays zero without biases alone.
"""

from torch import Tensor, nn

from sightline.classifier import Classifier, wrap
from sightline.models._mini_resnet import initialize, seeded
from sightline.types import Images, Logits


class KernelNet(nn.Module):
    """`layers` convolutions of stride 1 that keep the image's size, each with ReLU, average pooling, a linear layer.

    `layer1`, `layer2` ... end in their ReLU, so a cell in which nothing is active is exactly zero in all channels. The
    contribution window of layer l has the side 1 + l (kernel - 1). With `bias=False` (of the convolutions) a cell whose
    window is black is such a cell, which the paper takes for granted; with biases it is what training makes of them.

    Raises:
        ValueError: an even kernel, or a number below one.
    """

    def __init__(
        self, classes: int = 10, *, kernel: int = 3, channels: int = 32, layers: int = 5, bias: bool = True
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"expected an odd kernel, with a middle and the same padding on all sides, got {kernel}")
        if channels < 1 or layers < 1:
            raise ValueError(f"expected at least one channel and one layer, got channels={channels}, layers={layers}")
        self.taps: tuple[str, ...] = tuple(f"layer{number}" for number in range(1, layers + 1))
        for name, width in zip(self.taps, (3, *[channels] * (layers - 1)), strict=True):
            convolution = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=bias)
            self.add_module(name, nn.Sequential(convolution, nn.ReLU()))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)
        self.apply(initialize)

    def forward(self, x: Images) -> Logits:
        """Return logits (b, classes)."""
        a: Tensor = x
        for name in self.taps:
            a = self.get_submodule(name)(a)
        logits: Tensor = self.head(self.avgpool(a).flatten(1))
        return logits


def kernel_net(
    *,
    kernel: int = 3,
    channels: int = 32,
    layers: int = 5,
    bias: bool = True,
    classes: int = 10,
    size: int = 128,
    layer: str | None = None,
    seed: int = 0,
) -> Classifier:
    """Return a classifier over a KernelNet with random weights, explained at its last ReLU.

    Raises:
        ValueError: an even kernel, or a number below one.
    """
    with seeded(seed):
        model = KernelNet(classes, kernel=kernel, channels=channels, layers=layers, bias=bias)
    return wrap(model, layer=layer, normalization="none", size=size)
