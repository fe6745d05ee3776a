"""Center. A control: people put things in the middle."""

import torch

from sightline.classifier import Classifier
from sightline.types import Images, Labels, Saliency


def center(classifier: Classifier, x: Images, y: Labels | None = None, /, *, sigma: float = 0.25) -> Saliency:
    """Return a Gaussian around the middle of the image, `sigma` in shares of each side; (b, 1, h, w) in (0, 1].

    Raises:
        ValueError: sigma not above zero.
    """
    if sigma <= 0:
        raise ValueError(f"expected sigma > 0, a share of the side, got {sigma}")
    down, across = (((torch.arange(n) + 0.5) / n - 0.5) / sigma for n in x.shape[2:])
    bell = torch.exp(-(down[:, None] ** 2 + across[None] ** 2) / 2)
    return bell.to(x).expand(len(x), 1, -1, -1)
