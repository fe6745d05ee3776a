"""torchvision. Classification networks by name, with torchvision's weights and their own transforms."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sightline.models._files import is_weights, pour
from sightline.models._wrapping import parted, wrapped
from sightline.registry import unknown

if TYPE_CHECKING:
    from torch import nn

    from sightline.classifier import Classifier

SCALING = ("googlenet", "inception_v3")
"""Networks that torchvision builds otherwise for its weights: they bring ImageNet's normalization to another."""


def from_torchvision(name: str, settings: Mapping[str, Any], default: Mapping[str, Any]) -> "Classifier":
    """Return the network called `name`; `weights` is a name, "none" or a file, the rest goes to torchvision.

    Raises:
        LookupError: no such network or weights.
        ConnectionError: weights that cannot be downloaded.
    """
    from torchvision import models as zoo

    from sightline.models._mini_resnet import seeded

    names = zoo.list_models(module=zoo)
    if name not in names:
        raise LookupError(unknown(name, names, "torchvision model"))
    wrapping, rest = parted(settings)
    wanted = str(rest.pop("weights", "DEFAULT"))
    with seeded(int(rest.pop("seed", 0))):
        model, weights = network(name, wanted, rest, text=f"torchvision:{name}")
    if weights is None:
        return wrapped(model, wrapping, {"normalization": "imagenet", "size": 224, **default})
    recipe = weights.transforms()
    own = {"normalization": (recipe.mean, recipe.std), "size": recipe.crop_size[0]}
    names = weights.meta["categories"]
    classes = {} if rest.get("num_classes", len(names)) != len(names) else {"classes": names}
    return wrapped(model, wrapping, {**own, **classes, **default})


def network(name: str, weights: str, settings: Mapping[str, Any], *, text: str) -> tuple["nn.Module", Any]:
    """Return a network of torchvision, and its weights as torchvision describes them: None for others than its own.

    `text` is what the user wrote, for the error.

    Raises:
        LookupError: no such weights.
        FileNotFoundError, ValueError: a file of weights that is not there or does not fit.
        ConnectionError: weights that cannot be downloaded; the message says what to do.
    """
    from torchvision import models as zoo

    known = zoo.get_model_weights(name)
    if weights == "none":
        return zoo.get_model(name, weights=None, **settings), None
    if is_weights(weights):
        scaling = {"transform_input": True} if name in SCALING else {}
        model = zoo.get_model(name, weights=None, **{**scaling, **settings})
        return pour(model, weights), None
    if weights not in known.__members__:
        raise LookupError(unknown(weights, [*known.__members__, "none"], f"weights of {name}"))
    try:
        return zoo.get_model(name, weights=known[weights], progress=False, **settings), known[weights]
    except OSError as error:
        raise ConnectionError(no_download(name, known[weights].url, error, text=text)) from error


def no_download(name: str, url: str, error: OSError, *, text: str) -> str:
    """Say what to do without a network, in one line."""
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return (
        f"cannot download the weights of {name} ({error}); put {url.rpartition('/')[2]} into {folder}, give a local "
        f"file: {text}?weights=FILE.pth, or take random weights: {text}?weights=none"
    )
