"""CAM. Zhou et al., Learning deep features for discriminative localization, CVPR 2016."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.classifier import Classifier, UnsuitedError, check_labels
from sightline.types import Features, Images, Labels, Logits, Saliency


def cam(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
    """Return the features weighted by the class's row of the linear head.

    S = sum_k w_ck A^k, (b, 1, i, j), signed (no ReLU in the definition), at the layer's resolution. One forward.

    Raises:
        UnsuitedError: the layer is not followed by global average pooling and one linear layer alone.
    """
    A, logits = classifier.features_and_logits(x)
    w = head(classifier, A, logits)[check_labels(logits, y)]
    return torch.einsum("bk,bkij->bij", w, A)[:, None]


def cams(classifier: Classifier, x: Images, classes: Int[Tensor, "b n"]) -> Float[Tensor, "b n _i _j"]:
    """Return the CAM of several classes of each image, of one forward pass.

    Raises:
        UnsuitedError, ValueError: as `cam`, or a class that the network does not have.
    """
    A, logits = classifier.features_and_logits(x)
    rows = [check_labels(logits, column) for column in classes.unbind(1)]
    w = head(classifier, A, logits)[torch.stack(rows, 1)]
    return torch.einsum("bnk,bkij->bnij", w, A)


def head(classifier: Classifier, A: Features, logits: Logits) -> Tensor:
    """Return the (classes, channels) weights W for which logits = W mean(A) + bias, as this very batch shows.

    Raises:
        UnsuitedError: there is no such linear layer.
    """
    for weight, bias in linear_layers(classifier.model):
        if weight.shape[1] == A.shape[1] and len(weight) in (1, logits.shape[1]) and bool(weight.any()):
            again = F.linear(A.mean((2, 3)), weight, bias)
            if torch.allclose(again, logits[:, -len(weight) :], rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
                return torch.cat([torch.zeros_like(weight), weight]) if len(weight) < logits.shape[1] else weight
    raise UnsuitedError(
        f"cam needs global average pooling and one linear layer behind {classifier.layer!r}, which "
        f"{type(classifier.model).__name__} does not have; grad_cam is its generalization to any network"
    )


def linear_layers(model: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield weight and bias of the linear layers and 1x1 convolutions, the last one first."""
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Linear):
            yield module.weight.detach(), module.bias
        elif isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
            yield module.weight.detach().flatten(1), module.bias
