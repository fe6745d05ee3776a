"""Models. From one line of text to a classifier, and from a classifier to a file; nothing is imported before its use.

`name?key=value&key=value` is the only grammar: `creatures`, `mini_resnet?classes=10&seed=1`, `torchvision:resnet50`,
`weights.safetensors`, `python:package.module:factory?depth=3&normalization=imagenet`.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sightline.registry import find, unknown
from sightline.registry import load as _load
from sightline.runs import Choice

if TYPE_CHECKING:
    from torch import nn

    from sightline.classifier import Classifier
    from sightline.models._mini_resnet import MiniResNet as MiniResNet
    from sightline.models._mini_resnet import mini_resnet as mini_resnet
    from sightline.models._mini_vgg import MiniVGG as MiniVGG
    from sightline.models._mini_vgg import mini_vgg as mini_vgg
    from sightline.models._mini_vit import MiniViT as MiniViT
    from sightline.models._mini_vit import mini_vit as mini_vit

_SAVED = ("model", "layer", "mean", "std", "size", "classes")
"""What the manifest of a classifier says."""

EMBEDDED = Path(__file__).parents[1] / "weights" / "creatures.safetensors"
EMBEDDED_CALM = EMBEDDED.with_name("creatures-calm.safetensors")


@dataclass(frozen=True)
class Entry:
    """A classifier of the catalogue; calling it builds one."""

    load: str
    """Where its function is: `package.module:name`."""
    summary: str

    @property
    def builder(self) -> "Callable[..., Classifier]":
        """The function itself."""
        found: Callable[..., Classifier] = _load(self.load)
        return found

    def __call__(self, **settings: Any) -> "Classifier":
        """Import the function and call it.

        Raises:
            LookupError: a setting that it does not have.
        """
        classifier: Classifier = call(self.builder, settings)
        return classifier


MODELS: Mapping[str, Entry] = MappingProxyType(
    {
        "creatures": Entry("sightline.models:creatures", "the embedded default: a MiniResNet trained on creatures"),
        "creatures_calm": Entry("sightline.models:creatures_calm", "an embedded CALM network, trained on creatures"),
        "mini_resnet": Entry(
            "sightline.models._mini_resnet:mini_resnet", "four residual stages, 0.65 M parameters, random weights"
        ),
        "mini_vgg": Entry("sightline.models._mini_vgg:mini_vgg", "five plain blocks, 1.2 M parameters, random weights"),
        "mini_vit": Entry(
            "sightline.models._mini_vit:mini_vit", "six transformer blocks, 2.7 M parameters, random weights"
        ),
        "kernel_net": Entry(
            "sightline.models._kernel_net:kernel_net", "five convolutions of one kernel, stride 1, random weights"
        ),
        "resnet50_gap": Entry(
            "sightline.models._gap:resnet50_gap", "ResNet-50 without the last two strides: maps of 28 x 28 at 224"
        ),
        "vgg16_gap": Entry(
            "sightline.models._gap:vgg16_gap", "VGG-16 with a class convolution and average pooling, 28 x 28"
        ),
        "inception_v3_gap": Entry(
            "sightline.models._gap:inception_v3_gap", "Inception v3 up to Mixed_6e with the same end, 28 x 28"
        ),
        "mini_seg": Entry(
            "sightline.explainers._segmenter:mini_seg",
            "a segmenter over a MiniResNet, random weights or weights=CLASSIFIER",
        ),
        "lraspp": Entry(
            "sightline.explainers._segmenter:lraspp", "a segmenter: torchvision's LR-ASPP over MobileNetV3-Large"
        ),
        "calm": Entry(
            "sightline.explainers._calm:calm", "a CALM network over any other (backbone=), its two new layers random"
        ),
        "none": Entry("sightline.models:none", "no network: maps from files, judged by annotations alone"),
    }
)
"""Name -> classifier."""

FORMS: Mapping[str, str] = MappingProxyType(
    {
        "torchvision:NAME": "any classification network of torchvision, with its weights or ?weights=none&seed=0",
        "FILE.safetensors": "weights written by `save`, with their manifest FILE.json",
        "python:MODULE:NAME": "your own function or network, also from the current folder; "
        "?normalization=imagenet|none, layer= and size= say how to wrap it, the rest is its arguments",
    }
)
"""What else `load` reads -> what it is."""

_HOMES = {
    "MiniResNet": "sightline.models._mini_resnet:MiniResNet",
    "MiniVGG": "sightline.models._mini_vgg:MiniVGG",
    "MiniViT": "sightline.models._mini_vit:MiniViT",
    "mini_resnet": "sightline.models._mini_resnet:mini_resnet",
    "mini_vgg": "sightline.models._mini_vgg:mini_vgg",
    "mini_vit": "sightline.models._mini_vit:mini_vit",
}

__all__ = [
    "MODELS",
    "FORMS",
    "Entry",
    "load",
    "save",
    "recipe",
    "creatures",
    "creatures_calm",
    "MiniResNet",
    "MiniVGG",
    "MiniViT",
    "mini_resnet",
    "mini_vgg",
    "mini_vit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(_HOMES[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(model: str | Choice) -> "Classifier":
    """Return the classifier that a line of text (see the module), or a name with settings, stands for.

    Raises:
        LookupError: no such model or setting; the message names the nearest ones.
        ValueError, TypeError: a text, a setting, a file or a network that does not fit.
        OSError: a file that is not there, or weights that cannot be downloaded.
    """
    given = Choice.parse(model) if isinstance(model, str) else model
    named = Choice.parse(given.name)
    settings = {**named.settings, **given.settings}
    if "layer" in settings:
        settings["layer"] = str(settings["layer"])
    kind, _, rest = named.name.partition(":")
    if named.name.endswith(".safetensors"):
        described: Classifier = call(_from_file, {"path": named.name, **settings})
        return described
    if kind == "torchvision":
        return _from_torchvision(rest, settings)
    if kind == "python":
        return _from_python(rest, settings)
    try:
        entry = find(named.name, MODELS, "models")
    except LookupError as error:
        raise LookupError(f"{error}; or {', '.join(FORMS)}") from error
    return entry(**settings)


def call(function: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """Call a function with settings by name.

    Raises:
        LookupError: a setting that it does not have.
    """
    known = inspect.signature(function).parameters
    for name in settings:
        if name not in known:
            raise LookupError(unknown(name, known, f"setting of {function.__name__.removeprefix('_')}"))
    return function(**settings)


def creatures(*, layer: str | None = None) -> "Classifier":
    """Return the embedded default: a MiniResNet for the 20 classes of creatures at 64 pixels.

    Raises:
        FileNotFoundError: this installation lacks its weights.
    """
    return _embedded(EMBEDDED, "classifier --data creatures --model mini_resnet", layer)


def creatures_calm(*, layer: str | None = None) -> "Classifier":
    """Return the embedded CALM network: maps of 8 x 8 cells for the 20 classes of creatures at 64 pixels.

    Raises:
        FileNotFoundError: this installation lacks its weights.
    """
    return _embedded(EMBEDDED_CALM, "calm --data creatures", layer)


def _embedded(path: Path, training: str, layer: str | None) -> "Classifier":
    """Return a network whose weights come with the package."""
    if not path.exists():
        raise FileNotFoundError(
            f"the embedded weights {path} are missing; install sightline again, or train a network of your own: "
            f"sightline train {training}"
        )
    return _from_file(path, layer=layer)


def none(*, size: int | list[int] = 224, classes: int = 1000) -> "Classifier":
    """Return a stand-in without a network, for metrics that look at maps and annotations alone.

    `size` is the images' side, or height and width; `classes` how many classes the labels may have.
    """
    from sightline.classifier import Absent, Classifier

    h, w = (size, size) if isinstance(size, int) else size
    return Classifier(Absent(classes), "none", size=(h, w))


def save(
    classifier: "Classifier",
    path: Path | str,
    *,
    model: Choice,
    extra: Mapping[str, Any] | None = None,
    half: bool = False,
) -> Path:
    """Write the weights as safetensors, and beside them a manifest in JSON; each atomically.

    `model` says how to build the network (without its weights); `extra` is kept in the manifest: recipe, accuracy.
    `half` stores floats in 16 bits; they load as 32 bits.

    Raises:
        ValueError: a path that is no .safetensors, or weights that 16 bits cannot hold.
    """
    from sightline.models._files import write

    manifest = {
        "model": model.plain(),
        "layer": classifier.layer,
        "mean": classifier.mean,
        "std": classifier.std,
        "size": classifier.size,
        "classes": classifier.classes,
        "extra": dict(extra or {}),
    }
    return write(classifier.model, path, manifest, half=half)


def recipe(model: str | Choice) -> Choice:
    """Return how to build a model's network again, without its weights: of a file what its manifest says.

    Raises:
        FileNotFoundError, ValueError: a file that is not there, or no manifest.
    """
    from sightline.models._files import read

    given = Choice.parse(model) if isinstance(model, str) else model
    embedded = {"creatures": EMBEDDED, "creatures_calm": EMBEDDED_CALM}.get(given.name)
    given = given if embedded is None else Choice(str(embedded), given.settings)
    if given.name.endswith(".safetensors"):
        return Choice.of(read(given.name, _SAVED, kind="classifier")[0]["model"])
    return _untrained(given)


def _from_file(path: Path | str, *, layer: str | None = None) -> "Classifier":
    from sightline.models._files import fill, read

    manifest, content = read(path, _SAVED, kind="classifier")
    built = load(_untrained(Choice.of(manifest["model"])))
    fill(built.model, content, path)
    h, w = manifest["size"]
    mean, std, classes = (tuple(manifest[name]) for name in ("mean", "std", "classes"))
    described = replace(built, mean=mean, std=std, size=(h, w), classes=classes)
    wanted = layer or manifest["layer"]
    return described if wanted == built.layer else described.at(wanted)


def _untrained(choice: Choice) -> Choice:
    """Say that a network comes without the weights that its library has: those of the file follow."""
    theirs = choice.name.startswith("torchvision:") or "weights" in choice.settings
    return Choice(choice.name, {**choice.settings, "weights": "none"}) if theirs else choice


def _wrapped(model: "nn.Module", settings: Mapping[str, Any], default: Mapping[str, Any]) -> "Classifier":
    """Wrap with the settings that say how, of which `size` may be "224x160"."""
    from sightline.classifier import wrap

    chosen = {**default, **settings}
    if isinstance(size := chosen.get("size"), str):
        sides = size.split("x")
        if len(sides) != 2 or not all(side.isdigit() for side in sides):
            raise ValueError(f"expected size=224 or size=HEIGHTxWIDTH, got {size!r}")
        chosen["size"] = int(sides[0]), int(sides[1])
    if isinstance(chosen.get("size"), list):
        chosen["size"] = tuple(chosen["size"])
    return wrap(model, **chosen)


def _split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the settings of `wrap` from those of the network."""
    wrapping = ("layer", "size", "normalization")
    return {k: v for k, v in settings.items() if k in wrapping}, {
        k: v for k, v in settings.items() if k not in wrapping
    }


def _from_torchvision(name: str, settings: Mapping[str, Any]) -> "Classifier":
    from torchvision import models as zoo

    from sightline.models._mini_resnet import seeded

    names = zoo.list_models(module=zoo)
    if name not in names:
        raise LookupError(unknown(name, names, "torchvision model"))
    wrapping, rest = _split(settings)
    known = zoo.get_model_weights(name)
    wanted = str(rest.pop("weights", "DEFAULT"))
    if wanted not in (*known.__members__, "none"):
        raise LookupError(unknown(wanted, [*known.__members__, "none"], f"weights of {name}"))
    weights = None if wanted == "none" else known[wanted]
    try:
        with seeded(int(rest.pop("seed", 0))):
            model = zoo.get_model(name, weights=weights, progress=False, **rest)
    except OSError as error:
        raise ConnectionError(_no_download(name, weights.url if weights else "", error)) from error
    if weights is None:
        return _wrapped(model, wrapping, {"normalization": "imagenet", "size": 224})
    recipe = weights.transforms()
    default = {"normalization": (recipe.mean, recipe.std), "size": recipe.crop_size[0]}
    return _wrapped(model, wrapping, {**default, "classes": weights.meta["categories"]})


def _no_download(name: str, url: str, error: OSError) -> str:
    """Say what to do without a network, in one line."""
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return (
        f"cannot download the weights of {name} ({error}); put {url.rpartition('/')[2]} into {folder}, give a local "
        f"FILE.safetensors, or take random weights: torchvision:{name}?weights=none"
    )


def _from_python(reference: str, settings: Mapping[str, Any]) -> "Classifier":
    from torch import nn

    from sightline.classifier import Classifier
    from sightline.models._mini_resnet import seeded

    wrapping, rest = _split(settings)
    with importable(Path.cwd()), seeded(0):
        found = _load(reference)
    with importable(Path.cwd()), seeded(0):
        made = found if isinstance(found, nn.Module | Classifier) and not rest else found(**rest)
    if isinstance(made, nn.Module):
        return _wrapped(made, wrapping, {})
    if not isinstance(made, Classifier):
        raise TypeError(f"python:{reference} gave {type(made).__name__}; expected a torch.nn.Module or a Classifier")
    if fixed := [name for name in wrapping if name != "layer"]:
        raise ValueError(f"python:{reference} gives a Classifier, which has its own {' and '.join(fixed)}")
    return made.at(wrapping["layer"]) if "layer" in wrapping else made


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Import from a folder, too, while inside."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
