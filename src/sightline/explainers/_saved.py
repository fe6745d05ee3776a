"""Saved. CASM's mapping in a file and back, and as a method by name; segmenters from files, as methods.

Zolna, Geras, Cho: Classifier-agnostic saliency map extraction. CVIU 2020, https://arxiv.org/abs/1805.08249
Ahn, Cho, Kwak: Weakly supervised learning of instance segmentation with inter-pixel relations. CVPR 2019,
https://arxiv.org/abs/1904.05044
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline import models
from sightline.classifier import Classifier, UnsuitedError, check_labels
from sightline.explainers._casm import Casm
from sightline.explainers._segmenter import log_odds, segmenter_of
from sightline.models._files import fill, manifest_of, read, use, write
from sightline.models._manifests import building, named
from sightline.registry import unknown
from sightline.runs import Choice
from sightline.types import Images, Labels, Saliency

EMBEDDED = Path(__file__).parents[1] / "weights" / "creatures-casm.safetensors"

SAVED = ("encoder", "taps", "mean", "std", "size")
"""What the manifest of every mapping says; without a `width` it is the 64 of older ones."""


def casm(classifier: Classifier, x: Images, y: Labels | None = None, /, *, weights: str = "creatures") -> Saliency:
    """Return the mask of a trained mapping m, whatever the classifier and the label: m(x) in [0, 1], (b, 1, h, w).

    m maximizes E_f[S(m, f)] over classifiers f, S the entropy of f on the masked-out image (1 - m) x less lambda times
    the area (sections 2 and 3): it shows what any classifier could use. One forward pass of the mapping's own encoder.
    `weights` is a file of `sightline train casm`, or "creatures", trained on the images of that name.

    Raises:
        FileNotFoundError, ValueError: no such file, or not what `save_casm` writes; images of other channels.
    """
    path = EMBEDDED if weights == "creatures" else Path(weights)
    precision = x.dtype if x.is_floating_point() else torch.float32
    mapping = remembered(path, changed(path), precision).to(x.device)
    return mapping.forward(classifier, x, y)


def segmenter(classifier: Classifier, x: Images, y: Labels | None = None, /, *, weights: str | None = None) -> Saliency:
    """Return how much more probable the class is than the background, pixel by pixel, by a trained segmenter.

    S = log p_y - log p_0, (b, 1, h, w) at the input's resolution, signed. No class is above 0 exactly where the
    background is the most probable one of all, and elsewhere the most probable class has the largest S; so without
    normalization, at the threshold 0 and with all classes competing, the label map is the arg max of the softmax. One
    forward pass of the segmenter.

    `weights` is a file of `sightline train segmenter`; the classifier then says only which class it predicts and how
    its classes are called: they meet the segmenter's by their names, where both have names, else by their numbers.
    Without it the classifier is the segmenter.

    Raises:
        UnsuitedError: no weights, and a classifier that is no segmenter.
        FileNotFoundError, ValueError: no such file, or not of a segmenter; a class that it does not have.
    """
    own = source(classifier, weights, x)
    S = log_odds(own, x)
    y = check_labels(S.amax((2, 3)), y) if own is classifier else renumbered(own, classifier, classifier.labels(x, y))
    return of_classes(S, y[:, None])


def segmenters(
    classifier: Classifier, x: Images, classes: Int[Tensor, "b n"], *, weights: str | None = None
) -> Float[Tensor, "b n h w"]:
    """Return `segmenter` of several classes of each image, of one forward pass.

    Raises:
        UnsuitedError, FileNotFoundError, ValueError: as `segmenter`.
    """
    own = source(classifier, weights, x)
    S = log_odds(own, x)
    logits = S.amax((2, 3)) if own is classifier else classifier(x)
    columns = [renumbered(own, classifier, check_labels(logits, column)) for column in classes.unbind(1)]
    return of_classes(S, torch.stack(columns, 1))


def source(classifier: Classifier, weights: str | None, x: Images) -> Classifier:
    """Return the segmenter in a file, in the images' precision and where they are; without one the classifier."""
    if weights is None:
        return classifier
    path = Path(weights)
    precision = x.dtype if x.is_floating_point() else torch.float32
    own = remembered_segmenter(path, changed(path), precision)
    return replace(own, model=own.model.to(x.device))


def method_in(weights: str) -> str:
    """Return the method whose weights a file holds, by its manifest; a file that is not there yet is CASM's.

    Raises:
        LookupError, TypeError: a setting of the file that it does not have.
        ValueError: no manifest, or that of a network that is no method; the message says how it is used.
    """
    path, _ = named(weights)
    beside = path.with_suffix(".json")
    if not beside.exists():
        return "casm"
    manifest = manifest_of(beside, kind="method")
    kind = models.held(manifest)
    if kind in ("classifier", "calm"):
        raise ValueError(f"{beside} is no manifest of a method: {use(manifest, path)}")
    return "casm" if kind == "casm" else "segmenter"


def changed(path: Path) -> int:
    """Return when a file, or the one in `FILE?code=run`, was written last; 0 where there is none."""
    file, _ = named(path)
    return file.stat().st_mtime_ns if file.exists() else 0


def renumbered(own: Classifier, classifier: Classifier, y: Labels) -> Labels:
    """Return the segmenter's numbers of a classifier's classes.

    Raises:
        ValueError: a class that the segmenter does not have.
    """
    count = segmenter_of(own).classes
    if not own.classes or not classifier.classes or own.classes == classifier.classes:
        if wrong := [label for label in y.tolist() if label >= count]:
            raise ValueError(f"label {wrong[0]} is outside 0..{count - 1}: the segmenter has {count} classes")
        return y
    names = [classifier.classes[label] for label in y.tolist()]
    if missing := [name for name in names if name not in own.classes]:
        raise ValueError(f"the segmenter has another set of classes: {unknown(missing[0], own.classes, 'class')}")
    return torch.tensor([own.classes.index(name) for name in names], device=y.device)


def of_classes(S: Float[Tensor, "b k h w"], classes: Int[Tensor, "b n"]) -> Float[Tensor, "b n h w"]:
    """Return the maps of these classes of each image."""
    return S.gather(1, classes[:, :, None, None].expand(-1, -1, *S.shape[2:]))


@lru_cache(maxsize=2)
def remembered_segmenter(path: Path, changed: int, precision: torch.dtype) -> Classifier:
    """Return the segmenter of a file in a precision, read once as long as the file stays the same."""
    own = load_segmenter(path)
    return replace(own, model=own.model.to(precision))


def load_segmenter(path: Path | str) -> Classifier:
    """Return the segmenter of a file, on the CPU, in evaluation mode; `models.save` writes one, as any network.

    Raises:
        FileNotFoundError: the file or its manifest is not there.
        ValueError: another kind of file, or weights that do not fit.
    """
    loaded = models.load(Choice(str(path), {}))
    try:
        segmenter_of(loaded)
    except UnsuitedError as error:
        raise ValueError(f"{path} holds no segmenter: {error}") from error
    return loaded


@lru_cache(maxsize=2)
def remembered(path: Path, changed: int, precision: torch.dtype) -> Casm:
    """Return the mapping of a file in a precision, read once as long as the file stays the same."""
    return load_casm(path).to(precision)


def save_casm(
    mapping: Casm, path: Path | str, *, encoder: Choice, extra: Mapping[str, Any] | None = None, half: bool = False
) -> Path:
    """Write a mapping as safetensors with a manifest in JSON beside it, each atomically; return the path.

    `encoder` says how to build its encoder without weights; `extra` is kept in the manifest. `half` stores floats in 16
    bits; they load as 32 bits.

    Raises:
        ValueError: a path that is no .safetensors, or weights that 16 bits cannot hold.
    """
    own = mapping.classifier
    manifest = {
        "encoder": encoder.plain(),
        "taps": "code" if mapping.taps[0].raw else "paper",
        "width": mapping.decoder.width,
        "mean": own.mean,
        "std": own.std,
        "size": own.size,
        "extra": dict(extra or {}),
    }
    return write(mapping, path, manifest, half=half)


def load_casm(path: Path | str) -> Casm:
    """Return the mapping of a file that `save_casm` wrote, on the CPU, in evaluation mode.

    `FILE?code=run` allows code that the manifest names as its encoder (see `models`).

    Raises:
        FileNotFoundError: the file or its manifest is not there.
        ValueError: another kind of file, weights that do not fit, or code in the manifest.
    """
    file, code = named(path)
    manifest, content = read(file, SAVED, kind="CASM mapping")
    with building(file, code):
        built = models.load(models.recipe(Choice.of(manifest["encoder"])))
    (h, w), mean, std = manifest["size"], tuple(manifest["mean"]), tuple(manifest["std"])
    encoder = replace(built, mean=mean, std=std, size=(h, w))
    mapping = Casm(encoder, taps=manifest["taps"], width=manifest.get("width", 64))
    fill(mapping, content, file)
    return mapping.eval()
