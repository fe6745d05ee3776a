"""Generic attention explainability. Chefer, Gur and Wolf, Generic attention-model explainability, ICCV 2021."""

from sightline.classifier import Classifier, check_labels, logit
from sightline.hooks import differentiable, frozen
from sightline.methods._attention import read, rolled_out
from sightline.types import Images, Labels, Saliency, Score


def generic_attention(
    classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit
) -> Saliency:
    """Return what the class token gets of each patch through attention that raises the score.

    R = I before the first block, then R <- R + A' R block by block (eq 6), A' = mean_h ReLU(G * A) (eq 5), G = dy_c/dA;
    S = R_class, its patches on their grid: gradient times attention, rolled out. Networks that read several tokens
    (class and distillation, or the mean of the patches): the mean of their rows of R - I. (b, 1, i, j), non-negative,
    on the grid of the patches. One forward, one backward.

    Raises:
        UnsuitedError: a network without attention of all tokens to all tokens, or one that passes no gradient on.
    """
    with differentiable(), frozen(classifier.model):
        seen = read(classifier, x)
        G = seen.gradients(score(seen.logits, check_labels(seen.logits, y)))
        return seen.on_grid(rolled_out((g * A).relu().mean(1) for g, A in zip(G, seen.blocks, strict=True)), x)
