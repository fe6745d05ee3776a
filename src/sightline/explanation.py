"""Explanations. The one line: a network and images in; maps that draw, save and show themselves out."""

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sightline import images as pictures
from sightline import viz
from sightline.classifier import (
    Classifier,
    Method,
    Normalization,
    check_images,
    check_labels,
    check_range,
    probability,
    wrap,
)
from sightline.evaluation import checked
from sightline.interchange import npy
from sightline.kinds import unbound
from sightline.maps import degenerate, resize, unit
from sightline.methods import Entry
from sightline.metrics import finite
from sightline.models import load as load_model
from sightline.registry import unknown
from sightline.runs import Choice, arguments, file_name, provenance, write_bytes, write_text
from sightline.settings import bind, method_of, signed
from sightline.types import Images, Labels, Saliency, Values

Target: TypeAlias = int | str | Sequence[int | str] | Tensor | None

LONGEST = 1024
"""Longer side, in pixels, of the picture that an overlay is drawn on."""


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Maps of one method for one or several images.

    `saliency` is in [0, 1] at the input's resolution, `raw` as the method gave it; `labels` is the class that is
    explained and `scores` its probability. `problems` says, image by image, why a map shows nothing (None: it does).
    """

    names: tuple[str, ...]
    images: Images
    photos: tuple[Tensor, ...]
    saliency: Saliency
    raw: Saliency
    labels: Labels
    scores: Values
    classes: tuple[str, ...]
    signed: bool
    problems: tuple[str | None, ...]
    spec: dict[str, Any]

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        told = [f"{name}: {self.label(i)} {float(self.scores[i]):.1%}" for i, name in enumerate(self.names)]
        return f"Explanation by {self.spec['method']} of {', '.join(told)}"

    def label(self, index: int = 0) -> str:
        """Return the name of the explained class, its number where it has no name."""
        number = int(self.labels[index])
        return self.classes[number] if self.classes else str(number)

    def overlay(self, index: int = 0) -> Float[Tensor, "3 _h _w"]:
        """Return the map over the photo, in the photo's own shape.

        Raises:
            ValueError: the map shows nothing; the message says why.
        """
        if self.problems[index] is not None:
            raise ValueError(f"the map of {self.names[index]} is {self.problems[index]}: there is nothing to draw")
        return laid(self.photos[index], self.raw[index], signed=self.signed)

    def picture(self, index: int = 0) -> Image.Image:
        """Return the overlay as a Pillow image.

        Raises:
            ValueError: the map shows nothing.
        """
        return viz.to_pil(self.overlay(index))

    def save(self, folder: Path | str) -> list[Path]:
        """Write NAME-METHOD.png (overlay), .npy (raw map) and .json (specification, class, score); return the paths.

        A map that shows nothing gets no picture; its JSON says why.
        """
        written: list[Path] = []
        for index, name in enumerate(self.names):
            stem = Path(folder) / f"{Path(name).stem}-{file_name(self.spec['method'])}"
            if self.problems[index] is None:
                written.append(write_bytes(stem.with_name(stem.name + ".png"), viz.png(self.overlay(index))))
            written.append(
                write_bytes(stem.with_name(stem.name + ".npy"), npy(self.raw[index, 0].float().cpu().numpy()))
            )
            text = json.dumps(self.record(index), indent=1, sort_keys=True) + "\n"
            written.append(write_text(stem.with_name(stem.name + ".json"), text))
        return written

    def record(self, index: int) -> dict[str, Any]:
        """Return what is known of one map: image, class, score and everything that determines it."""
        said = {"image": self.names[index], "label": int(self.labels[index]), "class": self.label(index)}
        return {**said, "probability": float(self.scores[index]), "problem": self.problems[index], **self.spec}

    def _repr_html_(self) -> str:
        cells = "".join(self.cell(index) for index in range(len(self)))
        return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{cells}</div>'

    def cell(self, index: int) -> str:
        """Return one map as HTML, for notebooks."""
        told = f"{html.escape(self.names[index])}: {html.escape(self.label(index))}, {float(self.scores[index]):.1%}"
        problem = self.problems[index]
        if problem is not None:
            return f"<figure style='margin:0'><p>The map is {problem}.</p><figcaption>{told}</figcaption></figure>"
        data = base64.b64encode(viz.png(self.overlay(index))).decode()
        method = html.escape(self.spec["method"])
        shown = f"<img style='max-width:320px' alt='{method}' src='data:image/png;base64,{data}'>"
        return f"<figure style='margin:0'>{shown}<figcaption>{told}</figcaption></figure>"


def explain(
    model: nn.Module | Classifier | str,
    images: Any,
    target: Target = None,
    method: str | Choice | Method = "grad_cam",
    *,
    normalization: Normalization | None = None,
    layer: str | nn.Module | None = None,
    resize_policy: str = "direct",
    **settings: Any,
) -> Explanation:
    """Explain a classifier's decisions on one or several images.

    Args:
        model: a network, a `Classifier` (see `wrap`) or the name of one (`"torchvision:resnet50"`).
        images: a path, a Pillow image, an array or a tensor, or a list of them. Paths, pictures and arrays are resized
            to the classifier's size; float tensors (3, h, w) or (b, 3, h, w) in [0, 1] are taken as they are.
        target: the class to explain, by number or name, one for all or one an image; by default the predicted one.
        method: the name of a method, of methods combined (`"smooth(gradient)"`), or any function
            `(classifier, x, y) -> saliency`.
        normalization: how a bare network wants its images: `"imagenet"`, `"none"` or (mean, std).
        layer: the layer to explain, by name or as a module; by default the last one that lies on the image.
        resize_policy: `"direct"` squashes a picture to the classifier's size, `"crop"` takes its center.
        **settings: the method's own, e.g. `steps=50`.

    Raises:
        LookupError: no such method, setting, class, layer or model; the message names the nearest ones.
        TypeError, ValueError: an image, label, layer, setting or map that does not fit; the message says what would.
        OSError: a file that is not there.
    """
    classifier = prepared(model, normalization, layer)
    name, function = chosen(method, settings)
    names, photos, x = opened(images, classifier, resize_policy)
    check_images(x, classifier.channels)
    check_range(x)
    with torch.no_grad():
        logits = classifier(x)
    y = check_labels(logits, wanted(target, classifier.classes))
    raw = checked(function(classifier, x, y), len(x))
    saliency = unit(resize(finite(raw), (x.shape[2], x.shape[3])))
    scores, problems = probability(logits.double(), y), tuple(degenerate(raw))
    spec = {"method": name, "arguments": arguments(function), "resize": resize_policy, **seen(model, classifier, x)}
    return Explanation(names, x, photos, saliency, raw, y, scores, classifier.classes, signed(function), problems, spec)


def seen(model: nn.Module | Classifier | str, classifier: Classifier, x: Images) -> dict[str, Any]:
    """Return how the images were seen: network, layer, normalization, size and versions."""
    return {
        "model": model if isinstance(model, str) else type(classifier.model).__name__,
        "layer": classifier.layer,
        "mean": list(classifier.mean),
        "std": list(classifier.std),
        "size": list(x.shape[2:]),
        **provenance(),
    }


def chosen(method: str | Choice | Method, settings: Mapping[str, Any]) -> tuple[str, Callable[..., Any]]:
    """Return a method's name, and the method with its settings.

    Raises:
        LookupError, TypeError: no such method or setting, or a setting that does not fit.
    """
    if isinstance(method, str | Choice):
        given = Choice.of(method)
        return given.name, method_of(Choice(given.name, {**given.settings, **settings}))
    function: Callable[..., Any] = method.method if isinstance(method, Entry) else method
    inner = unbound(function)
    return getattr(inner, "__name__", type(inner).__name__).strip("<>"), bind(function, settings)


def prepared(
    model: nn.Module | Classifier | str, normalization: Normalization | None, layer: str | nn.Module | None
) -> Classifier:
    """Return the classifier that is meant, at the layer that is asked for.

    Raises:
        ValueError: a normalization for a classifier that has its own.
    """
    if isinstance(model, str):
        model = load_model(model)
    if not isinstance(model, Classifier):
        return wrap(model, normalization=normalization, layer=layer)
    if normalization is not None:
        raise ValueError(
            "normalization= says how a bare network wants its images, and this classifier has its own; a method's "
            "setting of that name goes with the method: functools.partial(opti_cam, normalization=...)"
        )
    return model if layer is None else model.at(layer)


def opened(images: Any, classifier: Classifier, policy: str) -> tuple[tuple[str, ...], tuple[Tensor, ...], Images]:
    """Return names, photos to draw on, and the input batch on the classifier's device.

    Raises:
        ValueError: no image, or tensors of different sizes.
    """
    several = isinstance(images, list | tuple) or (isinstance(images, Tensor | np.ndarray) and images.ndim == 4)
    things = list(images) if several else [images]
    if not things:
        raise ValueError("expected at least one image, got none")
    names = tuple(Path(thing).name if isinstance(thing, str | Path) else f"image-{i}" for i, thing in enumerate(things))
    ready = [one(thing, classifier, policy) for thing in things]
    shapes = {tuple(x.shape) for _, x in ready}
    if len(shapes) > 1:
        raise ValueError(f"expected tensors of one shape, got {sorted(shapes)}; explain them one by one")
    x = torch.stack([x for _, x in ready]).to(classifier.device)
    return unique(names), tuple(photo for photo, _ in ready), x


def one(thing: Any, classifier: Classifier, policy: str) -> tuple[Tensor, Tensor]:
    """Return the photo to draw on and the input of one image."""
    if (
        isinstance(thing, Tensor)
        and thing.is_floating_point()
        and thing.ndim == 3
        and len(thing) == classifier.channels
    ):
        return thing.detach().float().cpu(), thing.detach()
    image = pictures.as_image(thing)
    x = pictures.fit(image, classifier.size, policy)
    photo = shrunk(image) if policy == "direct" else x
    return photo, in_channels(x, classifier.channels)


def in_channels(image: Float[Tensor, "_ch h w"], channels: int, name: str = "the image") -> Float[Tensor, "_out h w"]:
    """Return an image in the channels that a network reads: colors become luma where it reads one.

    Raises:
        ValueError: any other count than the network's.
    """
    if len(image) == channels:
        return image
    if (len(image), channels) == (3, 1):
        return gray(image)
    raise ValueError(
        f"{name} has {len(image)} channels and the network reads {channels}; only colors for a network of one channel "
        "are converted, to gray; take a network of 1 or 3 channels, or data that fits this one"
    )


def gray(image: Float[Tensor, "3 h w"]) -> Float[Tensor, "1 h w"]:
    """Return the luma of a color image (ITU-R BT.601), for networks with one channel."""
    return (image * image.new_tensor(viz.LUMA).view(3, 1, 1)).sum(0, keepdim=True).clamp(0, 1)


def shrunk(image: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 _h _w"]:
    """Return the photo with its longer side at most `LONGEST` pixels."""
    h, w = image.shape[1:]
    scale = min(1.0, LONGEST / max(h, w))
    return image if scale == 1 else pictures.fit(image, (max(1, round(h * scale)), max(1, round(w * scale))), "direct")


def unique(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names; all are numbered where two files would be written under one."""
    stems = {Path(name).stem for name in names}
    return names if len(stems) == len(names) else tuple(f"{i}-{name}" for i, name in enumerate(names))


def wanted(target: Target, classes: Sequence[str]) -> int | Sequence[int] | Tensor | None:
    """Return the classes that are asked for by their numbers.

    Raises:
        LookupError: no class of that name.
    """
    if isinstance(target, str):
        return number(target, classes)
    if isinstance(target, Sequence):
        return [number(one, classes) if isinstance(one, str) else one for one in target]
    return target


def number(name: str, classes: Sequence[str]) -> int:
    """Return the number of the class called `name`, or of a number written as text.

    Raises:
        LookupError: no such class.
    """
    if name in classes:
        return list(classes).index(name)
    if name.removeprefix("-").isdecimal():
        return int(name)
    if not classes:
        raise LookupError(f"the classifier has no class names, so {name!r} is none; give the class by its number")
    raise LookupError(unknown(name, classes, "class"))


def laid(photo: Float[Tensor, "ch h w"], raw: Float[Tensor, "1 i j"], *, signed: bool) -> Float[Tensor, "3 h w"]:
    """Lay a raw map over a photo: brought to its size (bilinear, averaging where that is smaller), scaled, colored.

    Raises:
        ValueError: a map that shows nothing.
    """
    size = (photo.shape[1], photo.shape[2])
    shown = interpolate(raw[None].float().cpu(), size, mode="bilinear", antialias=True)
    return viz.overlay_signed(photo, shown[0, 0]) if signed else viz.overlay(photo, unit(shown)[0, 0])
