"""Explanations. The one line: a network and images in; maps that draw, save and show themselves out."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from sightline import images as pictures
from sightline import viz
from sightline.classifier import Classifier, Method, Normalization, check_range, probability, wrap
from sightline.evaluation import device, finite
from sightline.maps import degenerate, resize, unit
from sightline.methods import METHODS
from sightline.models import load as load_model
from sightline.registry import find, unknown
from sightline.runs import arguments, provenance, write_bytes, write_text
from sightline.settings import bind
from sightline.types import Images, Labels, Saliency, Values

Target: TypeAlias = int | str | Sequence[int | str] | Tensor | None

LONGEST = 1024
"""Longer side, in pixels, of the picture that an overlay is drawn on."""


@dataclass(frozen=True, eq=False)
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
        photo = self.photos[index]
        size = (photo.shape[1], photo.shape[2])
        shown = resize((self.raw if self.signed else self.saliency)[index : index + 1].float().cpu(), size)[0, 0]
        return viz.overlay_signed(photo, shown) if self.signed else viz.overlay(photo, shown.clamp(0, 1))

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
            stem = Path(folder) / f"{Path(name).stem}-{self.spec['method']}"
            if self.problems[index] is None:
                written.append(write_bytes(stem.with_name(stem.name + ".png"), viz.png(self.overlay(index))))
            written.append(write_bytes(stem.with_name(stem.name + ".npy"), npy(self.raw[index, 0])))
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
        shown = f"<img style='max-width:320px' alt='{self.spec['method']}' src='data:image/png;base64,{data}'>"
        return f"<figure style='margin:0'>{shown}<figcaption>{told}</figcaption></figure>"


def explain(
    model: nn.Module | Classifier | str,
    images: Any,
    target: Target = None,
    method: str | Method = "grad_cam",
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
        method: the name of a method, or any function `(classifier, x, y) -> saliency`.
        normalization: how a bare network wants its images: `"imagenet"`, `"none"` or (mean, std).
        layer: the layer to explain, by name or as a module; by default the last one that lies on the image.
        resize_policy: `"direct"` squashes a picture to the classifier's size, `"crop"` takes its center.
        **settings: the method's own, e.g. `steps=50`.

    Raises:
        LookupError: no such method, setting, class, layer or model; the message names the nearest ones.
        TypeError, ValueError: an image, label, layer or setting that does not fit; the message says what would.
        OSError: a file that is not there.
    """
    classifier = prepared(model, normalization, layer)
    function = bind(find(method, METHODS, "methods").method, settings) if isinstance(method, str) else method
    if settings and not isinstance(method, str):
        function = bind(method, settings)
    names, photos, x = opened(images, classifier, resize_policy)
    check_range(x)
    y = wanted(target, classifier, x)
    raw = function(classifier, x, y).detach()
    with torch.no_grad():
        scores = probability(classifier(x), y)
    name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
    spec = {
        "method": name,
        "arguments": arguments(function),
        "model": type(classifier.model).__name__ if not isinstance(model, str) else model,
        "layer": classifier.layer,
        "mean": classifier.mean,
        "std": classifier.std,
        "size": list(x.shape[2:]),
        "resize": resize_policy,
        **provenance(),
    }
    return Explanation(
        names,
        x,
        photos,
        unit(resize(finite(raw), (x.shape[2], x.shape[3]))),
        raw,
        y,
        scores,
        classifier.classes,
        isinstance(method, str) and find(method, METHODS, "methods").signed,
        tuple(degenerate(raw)),
        spec,
    )


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
        raise ValueError("normalization belongs to a bare network; this classifier has its own")
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
    x = torch.stack([x for _, x in ready]).to(device(classifier))
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
    return photo, x if classifier.channels == 3 else gray(x)


def gray(image: Float[Tensor, "3 h w"]) -> Float[Tensor, "1 h w"]:
    """Return the luma of a color image (ITU-R BT.601), for networks with one channel."""
    return (image * image.new_tensor(viz.LUMA).view(3, 1, 1)).sum(0, keepdim=True).clamp(0, 1)


def shrunk(image: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 _h _w"]:
    """Return the photo with its longer side at most `LONGEST` pixels."""
    h, w = image.shape[1:]
    scale = min(1.0, LONGEST / max(h, w))
    return image if scale == 1 else pictures.fit(image, (max(1, round(h * scale)), max(1, round(w * scale))), "direct")


def unique(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names, numbered where two files share one."""
    stems = [Path(name).stem for name in names]
    return tuple(f"{i}-{name}" if stems.count(Path(name).stem) > 1 else name for i, name in enumerate(names))


def wanted(target: Target, classifier: Classifier, x: Images) -> Labels:
    """Return the label of each image.

    Raises:
        LookupError: no class of that name.
        ValueError, TypeError: see `Classifier.labels`.
    """
    if isinstance(target, str):
        return classifier.labels(x, number(target, classifier.classes))
    if isinstance(target, Sequence):
        return classifier.labels(
            x, [number(one, classifier.classes) if isinstance(one, str) else one for one in target]
        )
    return classifier.labels(x, target)


def number(name: str, classes: Sequence[str]) -> int:
    """Return the number of the class called `name`, or of a number written as text.

    Raises:
        LookupError: no such class.
    """
    if name in classes:
        return list(classes).index(name)
    if name.lstrip("-").isdigit():
        return int(name)
    if not classes:
        raise LookupError(f"the classifier has no class names, so {name!r} is none; give the class by its number")
    raise LookupError(unknown(name, classes, "class"))


def npy(raw: Tensor) -> bytes:
    """Return a map as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, raw.float().cpu().numpy())
    return buffer.getvalue()
