"""CALM, the maps. Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021.

Probabilities of a network with a hidden cue location z, at its own resolution, never normalized.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import Classifier, UnsuitedError, check_images, check_labels
from sightline.hooks import frozen
from sightline.types import Images, Labels, Logits, Saliency


@runtime_checkable
class Joint(Protocol):
    """A network that knows where the cue of each class is."""

    def joint(self, x: Images, /) -> Float[Tensor, "b k i j"]:
        """Return log p(y, z | x) of normalized images."""
        ...


def calm_attribution(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
    """Return how probable it is that the image shows the class and its cue lies here.

    S_z = p(y, z | x) = g_yz h_z, (b, 1, i, j) at the layer's resolution, in [0, 1]; the cells sum to p(y | x). One
    forward. `contrast(calm_attribution, other)` is the paper's counterfactual, `over(calm_attribution, classes)` its
    map of a superset.

    Raises:
        UnsuitedError: not a CALM network.
    """
    joint = log_joint(classifier, x)
    return of_classes(joint, check_labels(marginal(joint), y)[:, None]).exp()


def calm_saliency(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
    """Return how probable it is that the cue lies here, whatever the class.

    S_z = p(z | x) = sum_y p(y, z | x) = h_z, (b, 1, i, j), in [0, 1]; the cells sum to one. One forward.

    Raises:
        UnsuitedError: not a CALM network.
    """
    joint = log_joint(classifier, x)
    check_labels(marginal(joint), y)
    return joint.logsumexp(1, keepdim=True).exp()


def calm_class_given_location(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
    """Return how probable the class is, should the cue lie here.

    S_z = p(y | x, z) = g_yz, (b, 1, i, j), in [0, 1]; at every cell the classes sum to one. One forward.

    Raises:
        UnsuitedError: not a CALM network.
    """
    joint = log_joint(classifier, x)
    y = check_labels(marginal(joint), y)
    return of_classes(given_location(joint), y[:, None]).exp()


def calm_location_given_class(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
    """Return how probable it is that the cue lies here, should the image show the class.

    S_z = p(z | x, y) = p(y, z | x) / p(y | x), (b, 1, i, j), in [0, 1]; the cells sum to one. One forward.

    Raises:
        UnsuitedError: not a CALM network.
    """
    joint = log_joint(classifier, x)
    y = check_labels(marginal(joint), y)
    return of_classes(given_class(joint), y[:, None]).exp()


def calm_attributions(classifier: Classifier, x: Images, classes: Int[Tensor, "b n"]) -> Float[Tensor, "b n _i _j"]:
    """Return `calm_attribution` of several classes of each image, of one forward pass."""
    joint = log_joint(classifier, x)
    return of_classes(joint, classes).exp()


def calm_classes_given_location(
    classifier: Classifier, x: Images, classes: Int[Tensor, "b n"]
) -> Float[Tensor, "b n _i _j"]:
    """Return `calm_class_given_location` of several classes of each image, of one forward pass."""
    return of_classes(given_location(log_joint(classifier, x)), classes).exp()


def calm_locations_given_class(
    classifier: Classifier, x: Images, classes: Int[Tensor, "b n"]
) -> Float[Tensor, "b n _i _j"]:
    """Return `calm_location_given_class` of several classes of each image, of one forward pass."""
    return of_classes(given_class(log_joint(classifier, x)), classes).exp()


def log_joint(classifier: Classifier, x: Images) -> Float[Tensor, "b k i j"]:
    """Return log p(y, z | x) of images in [0, 1].

    Raises:
        UnsuitedError: not a CALM network.
        TypeError, ValueError: images of a wrong kind or shape, not finite.
    """
    model = classifier.model
    if not isinstance(model, Joint):
        raise UnsuitedError(
            f"CALM's maps need a network that gives p(y, z | x), which {type(model).__name__} does not; train one with "
            "`sightline train calm`, or use cam or grad_cam"
        )
    check_images(x, classifier.channels)
    with torch.no_grad(), frozen(model):
        return model.joint(classifier.normalize(x))


def marginal(joint: Float[Tensor, "b k i j"]) -> Logits:
    """Return log p(y | x)."""
    return joint.logsumexp((2, 3))


def given_location(joint: Float[Tensor, "b k i j"]) -> Float[Tensor, "b k i j"]:
    """Return log p(y | x, z)."""
    return joint.log_softmax(1)


def given_class(joint: Float[Tensor, "b k i j"]) -> Float[Tensor, "b k i j"]:
    """Return log p(z | x, y)."""
    return joint - marginal(joint)[..., None, None]


def of_classes(maps: Float[Tensor, "b k i j"], classes: Int[Tensor, "b n"]) -> Float[Tensor, "b n i j"]:
    """Return the maps of the classes of each image.

    Raises:
        ValueError: a class that the network does not have.
    """
    rows = torch.stack([check_labels(maps[:, :, 0, 0], column) for column in classes.unbind(1)], 1)
    return maps.gather(1, rows[..., None, None].expand(-1, -1, *maps.shape[2:]))
