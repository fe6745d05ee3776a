"""Random. A control: what a map scores that knows nothing of the image."""

import torch

from sightline.classifier import Classifier
from sightline.types import Images, Labels, Saliency


def random(classifier: Classifier, x: Images, y: Labels | None = None, /, *, cells: int = 7, seed: int = 0) -> Saliency:
    """Return uniform noise on a grid of `cells` x `cells`, the same for every image; (b, 1, cells, cells) in [0, 1).

    Raises:
        ValueError: fewer than two cells a side.
    """
    if cells < 2:
        raise ValueError(f"expected at least two cells a side, got {cells}")
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 1, cells, cells, generator=generator).to(x).expand(len(x), -1, -1, -1)
