"""sightline. Shows where an image classifier looks, and measures whether the picture is true."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sightline.classifier import Classifier as Classifier
    from sightline.classifier import wrap as wrap
    from sightline.evaluation import measure as measure
    from sightline.explanation import Explanation as Explanation
    from sightline.explanation import explain as explain
    from sightline.running import run as run
    from sightline.runs import Run as Run
    from sightline.runs import Spec as Spec

_PUBLIC = {
    "explain": "sightline.explanation",
    "Explanation": "sightline.explanation",
    "wrap": "sightline.classifier",
    "Classifier": "sightline.classifier",
    "measure": "sightline.evaluation",
    "run": "sightline.running",
    "Spec": "sightline.runs",
    "Run": "sightline.runs",
}
_CATALOGUES = ("datasets", "explainers", "methods", "metrics", "models", "protocols")
_MODULES = (
    *("backgrounds", "classifier", "data", "erase", "gallery", "hyperplanes", "images", "interchange", "learning"),
    *("maps", "recipes", "report", "runs", "segmenting", "study", "supersets", "training", "viz", "windows"),
    *_CATALOGUES,
)

__version__ = "0.1.0"
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"sightline.{name}")
    raise AttributeError(f"module 'sightline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
