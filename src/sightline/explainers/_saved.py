"""Saved. CASM's mapping in a file and back, and as a method by name.

Zolna, Geras, Cho: Classifier-agnostic saliency map extraction. CVIU 2020, https://arxiv.org/abs/1805.08249
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sightline import models
from sightline.classifier import Classifier
from sightline.explainers._casm import Casm
from sightline.models._files import fill, read, write
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
    mapping = remembered(path, path.stat().st_mtime_ns if path.exists() else 0, precision).to(x.device)
    return mapping.forward(classifier, x, y)


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

    Raises:
        FileNotFoundError: the file or its manifest is not there.
        ValueError: another kind of file, or weights that do not fit.
    """
    manifest, content = read(path, SAVED, kind="CASM mapping")
    built = models.load(models.recipe(Choice.of(manifest["encoder"])))
    (h, w), mean, std = manifest["size"], tuple(manifest["mean"]), tuple(manifest["std"])
    encoder = replace(built, mean=mean, std=std, size=(h, w))
    mapping = Casm(encoder, taps=manifest["taps"], width=manifest.get("width", 64))
    fill(mapping, content, path)
    return mapping.eval()
