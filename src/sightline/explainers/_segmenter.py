"""Segmenter. A network that was trained on masks, full ones or pseudo labels, and explains as any method does.

The last stage of weakly supervised segmentation: pseudo labels in place of masks, as in IRN (Ahn, Cho and Kwak, CVPR
2019); Maruf et al., Beyond discriminative regions, 2023, say what the pseudo labels are worth.

It gives k + 1 logits a pixel, channel 0 the background. Two networks: `mini_seg`, ours, and torchvision's `lraspp`
(Howard et al., Searching for MobileNetV3, ICCV 2019). Each comes as a `Classifier`, so that it is saved, loaded, judged
and explained as every other network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline import models
from sightline.classifier import Classifier, UnsuitedError, check_images, read_logits, wrap
from sightline.hooks import frozen
from sightline.maps import resize
from sightline.models._mini_resnet import CENTERED, Block, conv, initialize, seeded
from sightline.registry import unknown
from sightline.types import Features, Images, Logits


class Segmenter(nn.Module):
    """A network from normalized images to k + 1 logits a pixel, and the classifier that follows from it.

    With l the logits of a pixel and p their softmax, the map of class c is

        S_c = l_c - l_0 = log p_c - log p_0

    so that no class is above 0 exactly where the background is the most probable one, and everywhere else the largest
    of them is that of the most probable class. The image's logit of class c is the largest S_c of its pixels: above 0
    exactly where c beats the background somewhere.

    Raises:
        ValueError: fewer than two classes, or more than the 254 that masks can hold.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        if not 2 <= classes <= 254:
            raise ValueError(f"expected 2 to 254 classes besides the background, got {classes}")
        self.network, self.classes = network, classes

    def pixels(self, x: Images) -> Float[Tensor, "b _n h w"]:
        """Return l, (b, k + 1, h, w), of normalized images at their own resolution, in the mode of the network."""
        size = x.shape[2], x.shape[3]
        return resize(read_logits(self.network(x)), size)

    def log_odds(self, x: Images) -> Float[Tensor, "b k h w"]:
        """Return S, (b, k, h, w), of normalized images."""
        logits = self.pixels(x)
        return logits[:, 1:] - logits[:, :1]

    def forward(self, x: Images) -> Logits:
        """Return max S_c over the pixels, (b, k), of normalized images."""
        return self.log_odds(x).amax((2, 3))


def segmenter_of(classifier: Classifier) -> Segmenter:
    """Return the segmenter that a classifier's network is.

    Raises:
        UnsuitedError: it is none.
    """
    if not isinstance(classifier.model, Segmenter):
        raise UnsuitedError(
            f"{type(classifier.model).__name__} is no segmenter; train one with sightline train segmenter and give it "
            "as the model, or its file as weights=; grad_cam needs none"
        )
    return classifier.model


def log_odds(classifier: Classifier, x: Images) -> Float[Tensor, "b k h w"]:
    """Return log p_c - log p_0 of every class at every pixel, (b, k, h, w), of a classifier that is a segmenter.

    Raises:
        UnsuitedError: it is none.
        TypeError, ValueError: images of a wrong kind, of other channels, or not finite.
    """
    model = segmenter_of(classifier)
    check_images(x, classifier.channels)
    with torch.no_grad(), frozen(model):
        return model.log_odds(classifier.normalize(x)).to(x.dtype)


class MiniSeg(nn.Module):
    """MiniResNet's stem and stages, and a decoder that brings them back to the image's size.

    With A_1 a convolution of the image, A_2, A_4, A_8, A_16 the stages at those strides, r a 1x1 convolution to `width`
    channels, m and h 3x3 ones, each with batch norm and ReLU, and up the bilinear resize to the next stage's size:

        D_16 = r(A_16),   D_s = m(r(A_s) + up(D_2s)),   l = conv1x1(h([up(D_2), A_1])) + W mean A_16 + b

    W and b say what is in the image, the rest where: a classifier's head, but for the background.

    What makes logits starts with weights of a standard deviation of 0.01: all classes alike.

    Raises:
        ValueError: not four widths.
    """

    def __init__(
        self, outputs: int, *, channels: int = 3, widths: Sequence[int] = (32, 64, 128, 256), width: int = 48
    ) -> None:
        super().__init__()
        if len(widths) != 4:
            raise ValueError(f"expected four widths, one a stage, got {tuple(widths)}")
        a, b, c, d = widths
        self.fine = normed(conv(channels, FINE))
        self.stem = normed(conv(channels, a, stride=2))
        self.layer1 = Block(a, a, stride=1)
        self.layer2 = Block(a, b, stride=2)
        self.layer3 = Block(b, c, stride=2)
        self.layer4 = Block(c, d, stride=2)
        self.reduce = nn.ModuleList(normed(nn.Conv2d(one, width, 1, bias=False)) for one in widths)
        self.merge = nn.ModuleList(normed(conv(width, width)) for _ in range(3))
        self.join = normed(conv(width + FINE, LAST))
        self.head = nn.Conv2d(LAST, outputs, 1)
        self.present = nn.Linear(d, outputs)
        self.apply(initialize)
        nn.init.normal_(self.head.weight, 0.0, 0.01)
        nn.init.normal_(self.present.weight, 0.0, 0.01)

    def forward(self, x: Images) -> Tensor:
        """Return logits (b, outputs, h, w)."""
        A = [self.layer1(self.stem(x))]
        for stage in (self.layer2, self.layer3, self.layer4):
            A.append(stage(A[-1]))
        D: Tensor = self.reduce[3](A[3])
        for place in (2, 1, 0):
            own: Tensor = self.reduce[place](A[place])
            D = self.merge[place](own + enlarged(D, own))
        where: Tensor = self.head(self.join(torch.cat([enlarged(D, x), self.fine(x)], 1)))
        what: Tensor = self.present(A[3].mean((2, 3)))
        return where + what[:, :, None, None]


FINE, LAST = 16, 24
"""Channels of a MiniSeg at the image's own resolution: of what reads the image, and before the logits."""


def normed(convolution: nn.Conv2d) -> nn.Sequential:
    """Return a convolution with batch norm and ReLU."""
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())


def enlarged(a: Features, like: Tensor) -> Tensor:
    """Resize features to the size of others (bilinear)."""
    return resize(a, (like.shape[2], like.shape[3]))


def mini_seg(
    classes: int = 20,
    *,
    weights: str = "none",
    channels: int = 3,
    widths: Sequence[int] = (32, 64, 128, 256),
    width: int = 48,
    size: int = 64,
    layer: str = "network.layer4",
    seed: int = 0,
) -> Classifier:
    """Return a segmenter over a MiniSeg, for images of 32 pixels and more.

    `weights` is "none", random ones, or the MiniResNet whose stem, stages and head (where it has as many classes) it
    starts from: the file of a trained classifier, or "creatures". `widths` are the encoder's channels, `width` the
    decoder's. `layer` is what other methods explain.

    Raises:
        LookupError, ValueError, OSError: weights that are not there, or of another network.
    """
    with seeded(seed):
        network = MiniSeg(classes + 1, channels=channels, widths=widths, width=width)
    if weights != "none":
        begin(network, weights)
    return wrap(Segmenter(network, classes).eval(), layer=layer, normalization=CENTERED, size=size)


def begin(network: MiniSeg, weights: str) -> None:
    """Take over the stem and the stages of a MiniResNet, and its head where that has as many classes.

    Raises:
        LookupError, ValueError, OSError: no such model, or another network than that.
    """
    theirs, own = models.load(weights).model.state_dict(), network.state_dict()
    names = [name for name in own if name.startswith(("stem.", "layer"))]
    if other := [name for name in names if name not in theirs or theirs[name].shape != own[name].shape]:
        raise ValueError(
            f"{weights} is no MiniResNet of these widths and channels ({other[0]} does not fit); train one with "
            "sightline train classifier --model mini_resnet"
        )
    network.load_state_dict({**own, **{name: theirs[name] for name in names}})
    head = theirs.get("head.weight")
    if head is not None and head.shape == network.present.weight[1:].shape:
        with torch.no_grad():
            network.present.weight[1:], network.present.bias[1:] = head, theirs["head.bias"]


def lraspp(
    classes: int = 20, *, weights: str = "none", size: int = 224, layer: str = "network.backbone.16", seed: int = 0
) -> Classifier:
    """Return a segmenter over LR-ASPP with a MobileNetV3-Large, of torchvision.

    `weights` is "none" or the name of torchvision's ImageNet weights of the backbone, such as "default". Those of the
    whole network, which were trained on masks, are not offered: nobody could say then what pseudo labels taught.

    Raises:
        LookupError: unknown weights.
        ConnectionError: weights that cannot be downloaded; the message says what to do.
    """
    from torchvision.models import MobileNet_V3_Large_Weights as Known
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    name = weights.upper()
    if name not in (*Known.__members__, "NONE"):
        raise LookupError(unknown(weights, [*Known.__members__, "none"], "weights of lraspp's backbone"))
    chosen = None if name == "NONE" else Known[name]
    try:
        with seeded(seed):
            network = lraspp_mobilenet_v3_large(
                weights=None, weights_backbone=chosen, progress=False, num_classes=classes + 1
            )
    except OSError as error:
        folder, url = Path(torch.hub.get_dir()) / "checkpoints", cast("Known", chosen).url
        raise ConnectionError(
            f"cannot download the weights of lraspp's backbone ({error}); put {url.rpartition('/')[2]} into {folder}, "
            "or take random weights: lraspp?weights=none"
        ) from error
    return wrap(Segmenter(network, classes).eval(), layer=layer, normalization="imagenet", size=size)
