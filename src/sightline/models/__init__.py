"""Models. From one line of text to a classifier, and from a classifier to a file; nothing is imported before its use.

`name?key=value&key=value` is the only grammar: `creatures`, `mini_resnet?classes=10&seed=1`, `torchvision:resnet50`,
`timm:vit_small_patch16_224`, `hf:microsoft/resnet-18`, `weights.safetensors`, `torchvision:resnet18?weights=net.pth`,
`python:package.module:factory?depth=3&normalization=imagenet`, which runs that module's code.

A file of weights has a manifest beside it, `weights.json`, which sightline writes, or a hand:

    {"model": "timm:resnet18?num_classes=2", "classes": ["cat", "dog"], "normalization": "imagenet", "size": 224}

Only `model` has to be there, `normalization` (or `mean` and `std`) where the model does not know it, and `layer` and
`sha256` may be. Files come from anywhere, so code that a manifest names, `python:` or `trust_remote_code`, is refused
unless the user allows it in the model's own name: `weights.safetensors?code=run`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from sightline.kinds import bound, check
from sightline.registry import find
from sightline.registry import load as _load
from sightline.runs import Choice

if TYPE_CHECKING:
    from sightline.classifier import Classifier
    from sightline.models._mini_resnet import MiniResNet as MiniResNet
    from sightline.models._mini_resnet import mini_resnet as mini_resnet
    from sightline.models._mini_vgg import MiniVGG as MiniVGG
    from sightline.models._mini_vgg import mini_vgg as mini_vgg
    from sightline.models._mini_vit import MiniViT as MiniViT
    from sightline.models._mini_vit import mini_vit as mini_vit

EMBEDDED = Path(__file__).parents[1] / "weights" / "creatures.safetensors"
EMBEDDED_CALM = EMBEDDED.with_name("creatures-calm.safetensors")

Held = Literal["classifier", "calm", "segmenter", "casm"]
"""What a file of weights may hold."""


@dataclass(frozen=True)
class Entry:
    """A classifier of the catalogue; calling it builds one."""

    load: str
    """Where its function is: `package.module:name`."""
    summary: str
    kind: Held = "classifier"

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
        "creatures_calm": Entry(
            "sightline.models:creatures_calm", "an embedded CALM network, trained on creatures", "calm"
        ),
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
            "segmenter",
        ),
        "lraspp": Entry(
            "sightline.explainers._segmenter:lraspp",
            "a segmenter: torchvision's LR-ASPP over MobileNetV3-Large",
            "segmenter",
        ),
        "calm": Entry(
            "sightline.explainers._calm:calm",
            "a CALM network over any other (backbone=), its two new layers random",
            "calm",
        ),
        "none": Entry("sightline.models:none", "no network: maps from files, judged by annotations alone"),
    }
)
"""Name -> classifier."""

FORMS: Mapping[str, str] = MappingProxyType(
    {
        "torchvision:NAME": "any classification network of torchvision, with its weights, ?weights=none&seed=0 or "
        "?weights=FILE.pth",
        "timm:NAME": "any network of timm (pip install sightline[timm]), with its weights, ?weights=none&seed=0 or "
        "?weights=FILE.safetensors",
        "hf:NAME": "an image classifier of transformers (pip install sightline[hf]), from the hub or a FOLDER, with "
        "its processor's normalization",
        "FILE.safetensors": "weights with a manifest FILE.json, as sightline writes it, or as short as "
        '{"model": "timm:resnet18"}; also FILE.pt and FILE.pth',
        "python:MODULE:NAME": "your own function or network, also from the current folder: its code is run; "
        "?normalization=imagenet|none, layer= and size= say how to wrap it, the rest is its arguments",
    }
)
"""What else `load` reads -> what it is."""

_LIBRARIES = {
    "torchvision": "sightline.models._torchvision:from_torchvision",
    "timm": "sightline.models._timm:from_timm",
    "hf": "sightline.models._huggingface:from_huggingface",
    "python": "sightline.models._python:from_python",
}
"""Name before the colon -> who reads what follows it."""

_THEIRS = ("torchvision:", "timm:", "hf:")
"""How the names of networks begin that come with weights of their own."""

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

    A name that begins with `python:` runs code, and so does `trust_remote_code` of Hugging Face; a file of weights runs
    none, unless its name ends in `?code=run`.

    Raises:
        LookupError: no such model or setting; the message names the nearest ones.
        ValueError, TypeError: a text, a setting, a file or a network that does not fit; a file whose manifest names
            code.
        OSError: a file that is not there, or weights that cannot be downloaded.
    """
    return _loaded(Choice.parse(model) if isinstance(model, str) else model, {})


def _loaded(given: Choice, default: Mapping[str, Any]) -> "Classifier":
    """Load; `default` says how to wrap a network that comes without it."""
    from sightline.models._files import is_weights

    named = Choice.parse(given.name)
    settings = {**named.settings, **given.settings}
    if "layer" in settings:
        settings["layer"] = str(settings["layer"])
    kind, _, rest = named.name.partition(":")
    if is_weights(named.name):
        described: Classifier = call(_from_file, {"path": named.name, **settings})
        return described
    if kind in _LIBRARIES:
        build: Callable[..., Classifier] = _load(_LIBRARIES[kind])
        return build(rest, settings, default)
    try:
        entry = find(named.name, MODELS, "models")
    except LookupError as error:
        raise LookupError(f"{error}; or {', '.join(FORMS)}") from error
    return entry(**settings)


def call(function: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """Call a function with settings by name.

    Raises:
        LookupError: a setting that it does not have.
        TypeError: a value of another kind than the annotated one.
    """
    return bound(function, settings, function.__name__.removeprefix("_"))()


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
    Floats load with as many bits as they have here. `half` stores them in 16 bits; then they load as 32 bits.

    Raises:
        ValueError: a path that is no .safetensors, or weights that 16 bits cannot hold.
    """
    from sightline.models._files import in_32_bits, write

    manifest = {
        "model": model.plain(),
        "layer": classifier.layer,
        "mean": classifier.mean,
        "std": classifier.std,
        "size": classifier.size,
        "classes": classifier.classes,
        "extra": dict(extra or {}),
        **({} if half or in_32_bits(classifier.model) else {"floats": "as stored"}),
    }
    return write(classifier.model, path, manifest, half=half)


def recipe(model: str | Choice) -> Choice:
    """Return how to build a model's network again, without its weights: of a file what its manifest says.

    Nothing is built yet: whoever loads what is returned runs the code that it names.

    Raises:
        FileNotFoundError, LookupError, TypeError, ValueError: a file that is not there, or whose manifest does not fit.
    """
    from sightline.models._files import is_weights

    given = Choice.parse(model) if isinstance(model, str) else model
    embedded = {"creatures": EMBEDDED, "creatures_calm": EMBEDDED_CALM}.get(given.name)
    given = given if embedded is None else Choice(str(embedded), given.settings)
    if is_weights(given.name):
        return Choice.of(_read(given.name)[0]["model"])
    return _untrained(given)


def held(manifest: Mapping[str, Any]) -> Held | None:
    """Return what a file holds by its manifest; None where only building it would tell.

    Raises:
        ValueError, TypeError: a model that is no name.
    """
    if "encoder" in manifest:
        return "casm"
    name = Choice.parse(Choice.of(manifest["model"]).name).name if "model" in manifest else ""
    if name in MODELS:
        return MODELS[name].kind
    return "classifier" if name.startswith(_THEIRS) else None


def _read(path: Path | str) -> tuple[dict[str, Any], bytes]:
    """Return the manifest of a classifier's file, checked, and the weights' bytes."""
    from sightline.models._files import read
    from sightline.models._manifests import check_entries

    manifest, content = read(path, ("model",), kind="classifier")
    check_entries(manifest, Path(path).with_suffix(".json"))
    return manifest, content


def _from_file(path: Path | str, *, layer: str | None = None, code: Any = "refuse") -> "Classifier":
    from sightline.classifier import classes_of, normalization_of
    from sightline.models._files import fill
    from sightline.models._manifests import Code, building, said_in

    check(f"{path}: code", code, Code)
    manifest, content = _read(path)
    said = said_in(manifest, Path(path).with_suffix(".json"))
    with building(Path(path), code):
        built = _loaded(_untrained(Choice.of(manifest["model"])), said)
    fill(built.model, content, path, as_stored="floats" in manifest)
    if "normalization" in said:
        mean, std = normalization_of(built.model, said["normalization"], built.channels)
        built = replace(built, mean=mean, std=std)
    h, w = said.get("size", built.size)
    described = replace(built, size=(h, w), classes=tuple(said.get("classes", built.classes)))
    if described.classes and "sha256" not in manifest and len(described.classes) != (count := classes_of(described)):
        raise ValueError(f"{path} has {count} classes and its manifest {len(described.classes)} names of classes")
    wanted = layer or manifest.get("layer", built.layer)
    return described if wanted == built.layer else described.at(wanted)


def _untrained(choice: Choice) -> Choice:
    """Say that a network comes without the weights that its library has: those of the file follow."""
    theirs = choice.name.startswith(_THEIRS) or "weights" in choice.settings
    return Choice(choice.name, {**choice.settings, "weights": "none"}) if theirs else choice
