"""Raw attention. Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021; Vaswani et al., NeurIPS 2017."""

from sightline.classifier import Classifier, check_labels
from sightline.hooks import differentiable, frozen
from sightline.methods._attention import read
from sightline.types import Images, Labels, Saliency


def raw_attention(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
    """Return what the class token attends to in the last block.

    S = (mean_h A^B)_class, the class token's row of the last block's attention, its patches on their grid. The label is
    checked and changes nothing. Networks that read several tokens (class and distillation, or the mean of the patches
    without any class token): the mean of their rows. (b, 1, i, j), in [0, 1], on the grid of the patches. One forward.

    Raises:
        UnsuitedError: a network without attention of all tokens to all tokens.
    """
    with differentiable(), frozen(classifier.model):
        seen = read(classifier, x)
        check_labels(seen.logits, y)
        return seen.on_grid(seen.blocks[-1].mean(1), x)
