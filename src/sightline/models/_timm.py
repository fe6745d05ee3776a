"""timm. Networks by name, with timm's weights and the normalization and size that timm recorded in them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sightline.models._files import is_weights, pour
from sightline.models._wrapping import needing, parted, wrapped
from sightline.registry import unknown

if TYPE_CHECKING:
    from torch import nn

    from sightline.classifier import Classifier


def from_timm(name: str, settings: Mapping[str, Any], default: Mapping[str, Any]) -> "Classifier":
    """Return the network called `name`; `weights` is "DEFAULT", "none" or a file, the rest goes to timm.

    Raises:
        ImportError: timm is not installed.
        LookupError: no such network or weights.
        FileNotFoundError, ValueError: a file of weights that is not there or does not fit.
        ConnectionError: weights that cannot be downloaded; the message says what to do.
    """
    with needing("timm", f"timm:{name}"):
        import timm

    from sightline.models._mini_resnet import seeded

    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        raise LookupError(unknown(plain, timm.list_models(), "timm model"))
    tags = [one.partition(".")[2] for one in timm.list_pretrained(plain + "*") if one.partition(".")[0] == plain]
    if tag and tag not in tags:
        raise LookupError(unknown(tag, tags, f"weights of {plain}"))
    wrapping, rest = parted(settings)
    weights = str(rest.pop("weights", "DEFAULT"))
    if not is_weights(weights) and weights not in ("DEFAULT", "none"):
        raise LookupError(f"no weights of {plain} called {weights!r}; write timm:{plain}.TAG, of {', '.join(tags)}")
    if weights == "DEFAULT" and not tags:
        raise LookupError(f"timm has no weights of {plain}; take random ones: timm:{plain}?weights=none")
    with seeded(int(rest.pop("seed", 0))):
        model = pretrained(name, rest) if weights == "DEFAULT" else timm.create_model(name, **rest)
    if is_weights(weights):
        pour(model, weights)
    known = weights == "DEFAULT" and "num_classes" not in rest
    names = {"classes": classes} if known and (classes := names_of(model)) else {}
    return wrapped(model, wrapping, {**names, **default})


def pretrained(name: str, settings: Mapping[str, Any]) -> "nn.Module":
    """Return a network with timm's weights.

    Raises:
        ConnectionError: they cannot be downloaded; the message says what to do.
    """
    import timm

    from sightline.models._hub import prompt

    try:
        with prompt():
            model: nn.Module = timm.create_model(name, pretrained=True, **settings)
    except ConnectionError as error:
        raise ConnectionError(
            f"cannot download the weights of {name} ({error}); give a local file: timm:{name}?weights=FILE.safetensors "
            f"(or .pth), or take random weights: timm:{name}?weights=none"
        ) from error
    return model


def names_of(model: "nn.Module") -> tuple[str, ...]:
    """Return the names of the classes of ImageNet that timm's weights know; none for others."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    info: Any = ImageNetInfo(subset) if subset else None
    return tuple(info.index_to_description(index) for index in range(info.num_classes())) if info else ()
