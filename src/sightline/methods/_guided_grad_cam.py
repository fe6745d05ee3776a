"""Guided Grad-CAM. Selvaraju, Cogswell, Das, Vedantam, Parikh and Batra, Grad-CAM, ICCV 2017, section 3.2."""

from sightline.classifier import Classifier, logit
from sightline.maps import resize
from sightline.methods._grad_cam import grad_cam
from sightline.methods._guided_backprop import guided_backprop
from sightline.types import Images, Labels, Saliency, Score


def guided_grad_cam(classifier: Classifier, x: Images, y: Labels | None = None, /, *, score: Score = logit) -> Saliency:
    """Return guided backpropagation, pixel by pixel times Grad-CAM brought to the input's size.

    S = max_ch |R_ch up(L)| = max_ch |R_ch| up(L), R the guided gradient, L >= 0 the Grad-CAM of the classifier's layer
    with the network's own gradients, up bilinear; (b, 1, h, w), non-negative. Two forwards, of which one goes back to
    the image.

    *Differs:* Selvaraju et al. show the three colors of R up(L); the map is reduced as that of `gradient`.

    Raises:
        UnsuitedError: no ReLU ran, or no gradient came back.
    """
    L = grad_cam(classifier, x, y, score=score)
    R = guided_backprop(classifier, x, y, score=score)
    return R * resize(L, (x.shape[2], x.shape[3])).to(R.dtype)
