"""Hugging Face. Image classifiers of transformers from the hub or a folder, normalized as their processor says."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sightline.models._files import check_fit, is_weights, opened
from sightline.models._manifests import check_code
from sightline.models._wrapping import needing, parted, wrapped

if TYPE_CHECKING:
    from torch import nn

    from sightline.classifier import Classifier

HEAD = "ForImageClassification"

TOLD = {"missing": "missing_keys", "unexpected": "unexpected_keys", "of another shape": "mismatched_keys"}
"""What does not fit -> what transformers calls it."""


def from_huggingface(name: str, settings: Mapping[str, Any], default: Mapping[str, Any]) -> "Classifier":
    """Return the classifier of a folder or of the hub; `weights` is "DEFAULT", "none" or a file.

    The rest of the settings goes to its configuration; `num_classes` is its `num_labels`.

    Raises:
        ImportError: transformers is not installed.
        LookupError: no such weights.
        FileNotFoundError, ValueError: a file of weights that is not there or does not fit, or no image classifier;
            `trust_remote_code` in a manifest.
        ConnectionError: it cannot be downloaded; the message says what to do.
    """
    with needing("hf", f"hf:{name}"):
        from transformers import AutoConfig

    from sightline.models._hub import prompt
    from sightline.models._mini_resnet import seeded

    wrapping, rest = parted(settings)
    if rest.get("trust_remote_code"):
        check_code(f"hf:{name} with trust_remote_code")
    weights, seed = str(rest.pop("weights", "DEFAULT")), int(rest.pop("seed", 0))
    if not is_weights(weights) and weights not in ("DEFAULT", "none"):
        raise LookupError(f"no weights of {name} called {weights!r}; write DEFAULT, none or a file")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"no folder {name}; give one that holds config.json, or a name of the hub, OWNER/NAME")
    if "num_classes" in rest:
        rest["num_labels"] = rest.pop("num_classes")
    try:
        with prompt(), silent(), seeded(seed):
            config = AutoConfig.from_pretrained(name, **rest)
            check_head(config, name, fresh=weights != "DEFAULT" or "num_labels" in rest)
            own = seen_by(name)
            model = built(name, config, weights, fresh="num_labels" in rest)
    except ConnectionError as error:
        if Path(name).is_dir():
            raise FileNotFoundError(f"{name} lacks a file: {str(error.__cause__).splitlines()[0]}") from error
        raise ConnectionError(
            f"cannot download {name} ({error}); give a local folder of it, with config.json, model.safetensors and "
            "preprocessor_config.json: hf:FOLDER"
        ) from error
    return wrapped(model, wrapping, {**own, **default})


def built(name: str, config: Any, weights: str, *, fresh: bool) -> "nn.Module":
    """Return the network of a configuration with its weights, random ones, or those of a file, by transformers' names.

    Raises:
        FileNotFoundError, ValueError: a file that is not there or does not fit.
    """
    from transformers import AutoModelForImageClassification

    auto: Any = AutoModelForImageClassification
    settings = {"config": config, "output_loading_info": True}
    if weights == "none":
        made, wrong = auto.from_config(config), {}
    elif weights == "DEFAULT":
        made, told = auto.from_pretrained(name, ignore_mismatched_sizes=fresh, **settings)
        wrong = {} if fresh else {"missing": sorted(told["missing_keys"])}
    else:
        kind = type(auto.from_config(config))
        made, told = kind.from_pretrained(None, state_dict=opened(weights), ignore_mismatched_sizes=True, **settings)
        wrong = {why: sorted(one if isinstance(one, str) else one[0] for one in told[k]) for why, k in TOLD.items()}
    network: nn.Module = made
    check_fit(network, weights if is_weights(weights) else name, wrong)
    return network.eval()


@contextmanager
def silent() -> Iterator[None]:
    """Let transformers neither draw bars nor report, as long as we are inside."""
    from transformers import utils

    logging: Any = utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_head(config: Any, name: str, *, fresh: bool) -> None:
    """Check that these are the weights of an image classifier, or that it may have a `fresh` head.

    Raises:
        ValueError: it is another kind of network, or one without a head.
    """
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as KNOWN

    if type(config) not in KNOWN:
        raise ValueError(f"{name} is of kind {config.model_type!r}, which transformers offers no image classifier of")
    built = getattr(config, "architectures", None) or []
    if built and not fresh and config.model_type != "timm_wrapper" and not any(HEAD in one for one in built):
        raise ValueError(
            f"{name} has no classification head ({', '.join(built)}); take those of a ...{HEAD}, or "
            "?num_classes=k for a random head"
        )


def seen_by(name: str) -> dict[str, Any]:
    """Return normalization and size as the image processor of a network says them; nothing where it has none.

    Raises:
        ValueError: a processor that does more to colors than to shift and scale them.
    """
    from transformers import AutoImageProcessor

    auto: Any = AutoImageProcessor
    try:
        processor = auto.from_pretrained(name)
    except (OSError, ValueError):
        return {}
    said = processor.to_dict()
    if said.get("do_flip_channel_order"):
        raise ValueError(
            f"{name} wants blue, green, red; build the network yourself, reorder the channels in a module of your own "
            "before it, and wrap that"
        )
    size = said.get("crop_size") if said.get("do_center_crop") else said.get("size")
    return {"normalization": normalization_of(said), **size_of(size or {})}


def normalization_of(said: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation for images in [0, 1] of a processor for bytes: rescaled, then normalized."""
    scale = 255 * (said.get("rescale_factor") or 1 / 255) if said.get("do_rescale", True) else 255.0
    shift = 1.0 if said.get("rescale_offset") else 0.0
    mean, std = ([0.0], [1.0]) if not said.get("do_normalize") else (said["image_mean"], said["image_std"])
    return [(m + shift) / scale for m in mean], [s / scale for s in std]


def size_of(said: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the size of the images that a processor gives."""
    if "height" in said:
        return {"size": (said["height"], said["width"])}
    return {"size": (said["shortest_edge"], said["shortest_edge"])} if "shortest_edge" in said else {}
