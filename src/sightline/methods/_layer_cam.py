"""Layer-CAM. Jiang, Zhang, Hou, Cheng and Wei, LayerCAM, IEEE TIP 2021."""

from sightline.classifier import Classifier, logit
from sightline.types import Images, Labels, Saliency, Score


def layer_cam(classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit) -> Saliency:
    """Return the features weighted cell by cell with their positive gradients.

    S = ReLU(sum_k ReLU(G^k) A^k) (eqs 5 to 7); (b, 1, i, j), non-negative, at the layer's resolution. One forward.
    """
    A, G = classifier.features_and_gradient(x, y, score)
    return (G.relu() * A).sum(1, keepdim=True).relu()
