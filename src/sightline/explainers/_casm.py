"""CASM. Zolna, Geras, Cho: Classifier-agnostic saliency map extraction. CVIU 2020, https://arxiv.org/abs/1805.08249

A network from images alone to masks that show all that any classifier could use. Its encoder is a classifier's body,
its decoder reads feature maps of five scales. As a method it ignores the classifier and the label it is given.

After the authors' program, which made the paper's numbers; *Differs:* marks where the paper's text reads otherwise.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.classifier import Classifier, check_images, read_logits
from sightline.explainers._taps import Tap, Taps, find_taps
from sightline.hooks import capture, frozen
from sightline.maps import resize
from sightline.training import own_randomness
from sightline.types import Images, Labels, Logits, Saliency, Values

Objective: TypeAlias = Literal["entropy", "classification"]


def mapping_loss(
    logits: Logits, masked: Logits, y: Labels, *, m: Saliency, lam: float, score: Objective = "entropy"
) -> Tensor:
    """Return what the mapping minimizes: -S(m, f') with the L1 norm where the mask still has to win (section 3).

    With B images, p the softmax of f' on the masked-out image, and m_i the mean of a mask over its pixels:

        c_i = 1[argmax f(x_i) = y_i],   w_i = 1[argmax f'((1 - m) x_i) != y_i],   n_i = c_i w_i
        loss = lam/B sum_i n_i m_i + 1/B sum_i c_i sum_k p_ik log p_ik              score="entropy"
        loss = lam/B sum_i n_i m_i - 1/B sum_i CE(f'((1 - m) x_i), y_i)             score="classification"

    So only images count whose clean prediction is right (all of them in the second term of "classification"), and the
    norm acts only where clean and masked predictions disagree. The program writes the first term as
    -lam/B sum_i ReLU(n_i - m_i), which is less by the constant lam/B sum_i n_i and has the same gradient.

    *Differs:* the paper's L1 norm is a sum over pixels; its lambdas (of the program) are for the mean.

    Args:
        logits: (b, k) of the current classifier f on the clean images, before its update.
        masked: (b, k) of the drawn classifier f' on the masked-out images.
        y: (b,) labels.
        m: (b, 1, i, j) masks in [0, 1].
        lam: the regularization coefficient.
        score: what confuses: the entropy of the prediction, or its cross entropy (adversarial).
    """
    c, w = (logits.argmax(1) == y).to(m.dtype), (masked.argmax(1) != y).to(m.dtype)
    n, area = c * w, m.mean((1, 2, 3))
    if score == "classification":
        return lam * (n * area).mean() - F.cross_entropy(masked, y)
    return lam * (n * area).mean() - (c * entropy(masked)).mean()


def entropy(logits: Logits) -> Values:
    """Return the Shannon entropy of the softmax in nats: H = -sum_k p_k log p_k."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def classifier_loss(logits: Logits, masked: Logits | None, y: Labels) -> Tensor:
    """Return what the classifier minimizes, equation (8): L = (CE(f((1 - m) x), y) + CE(f(x), y)) / 2.

    Where a classifier of the past saw the masked-out images (None), it is CE(f(x), y) alone.
    """
    clean = F.cross_entropy(logits, y)
    return clean if masked is None else (F.cross_entropy(masked, y) + clean) / 2


class Decoder(nn.Module):
    """From the encoder's feature maps to a mask: sigmoid(conv3x3([resize(ReLU(BN(conv1x1(A)))) for each A])).

    Every map gets `width` channels but the raw one, which stays as it is; all are brought to the first one's size
    (bilinear, align_corners=False). Weights of convolutions are drawn from N(0, sqrt(2 / (k k C_out))).
    """

    def __init__(self, taps: Sequence[Tap], *, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.reduce = nn.ModuleList(nn.Identity() if tap.raw else reduction(tap.channels, width) for tap in taps)
        self.last = nn.Conv2d(sum(tap.channels if tap.raw else width for tap in taps), 1, 3, padding=1)
        self.apply(initialize)

    def forward(self, features: Sequence[Tensor]) -> Saliency:
        """Return masks in (0, 1) of the first map's size; `features` are (b, c, i, j), each with its own c, i, j."""
        size = features[0].shape[2], features[0].shape[3]
        H = [reduce(A) for reduce, A in zip(self.reduce, features, strict=True)]
        W = torch.split(self.last.weight, [h.shape[1] for h in H], 1)
        z = torch.stack([resize(at_each_offset(h, w), size) for h, w in zip(H, W, strict=True)]).sum(0)
        return shifted(z, self.last.bias).sigmoid()


def at_each_offset(h: Tensor, w: Tensor) -> Tensor:
    """Return what each of a convolution's k x k offsets reads, (b, k k, i, j), from a map and w (1, c, k, k).

    Mixing channels and resizing commute: k k channels are resized instead of c.
    """
    return F.conv2d(h, w[0].flatten(1).t()[:, :, None, None])


def shifted(z: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sum of the offsets' maps, each moved to where the convolution reads it, zero outside."""
    k = math.isqrt(z.shape[1])
    here = torch.eye(k * k, dtype=z.dtype, device=z.device).view(1, k * k, k, k)
    return F.conv2d(z, here, bias, padding=k // 2)


def reduction(channels: int, width: int) -> nn.Sequential:
    """Return what brings a feature map to `width` channels."""
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def initialize(module: nn.Module) -> None:
    """Draw a convolution's weights; what else there is starts as torch has it: batch norms with weight 1, bias 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))


class Casm(nn.Module):
    """A trained saliency mapping: `casm(classifier, x)` is a method that looks at the images alone.

    Owns its encoder, the given classifier's own network, and a decoder with weights from `seed`. Everything that
    changes is in `state_dict`.

    Raises:
        UnsuitedError: the network has fewer than two spatial scales.
        ValueError: unknown taps.
    """

    def __init__(self, classifier: Classifier, *, taps: Taps = "code", width: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.taps = find_taps(classifier, taps)
        self.classifier, self.encoder = classifier, classifier.model
        with own_randomness(torch.device("cpu")):
            torch.default_generator.manual_seed(seed)
            decoder = Decoder(self.taps, width=width)
        self.decoder = decoder.to(next(iter(classifier.model.parameters())))

    def forward(self, classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
        """Return masks (b, 1, h, w) in [0, 1], whatever the classifier and the label; one forward pass of the encoder.

        Raises:
            TypeError, ValueError: images of a wrong kind, not of the encoder's channels, or not finite.
        """
        check_images(x, self.classifier.channels)
        with torch.no_grad(), frozen(self):
            return self.mask(x)

    def mask(self, x: Images) -> Saliency:
        """Return masks (b, 1, h, w) in [0, 1], differentiable, in the mode in which the modules are."""
        return self.decode(read(self.classifier, self.taps, x)[0], x)

    def decode(self, features: Sequence[Tensor], x: Images) -> Saliency:
        """Return masks of the images' size from the encoder's features, enlarged by the nearest cell."""
        m: Tensor = self.decoder(features)
        return resize(m.to(x.dtype), (x.shape[2], x.shape[3]), "nearest")


def read(classifier: Classifier, taps: Sequence[Tap], x: Images) -> tuple[list[Tensor], Logits]:
    """Return the taps' maps and the logits of one forward pass, in the mode in which the network is.

    The maps are copies: an update of the weights or an in-place ReLU behind the tap does not reach them.
    """
    with capture(classifier.model, [tap.name for tap in taps]) as found:
        logits = predict(classifier, x)
    return [tap.to_grid(found[tap.name], x) for tap in taps], logits


def predict(classifier: Classifier, x: Images) -> Logits:
    """Return the logits in the mode in which the network is; one output counts as two classes, (0, z)."""
    z = read_logits(classifier.model(classifier.normalize(x))).to(x.dtype)
    return torch.cat([torch.zeros_like(z), z], 1) if z.shape[1] == 1 else z
