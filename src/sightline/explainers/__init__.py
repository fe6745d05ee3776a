"""Explainers. What is learned before it explains: CASM, a network from images to masks; CALM, a classifier whose maps
come with its answer; segmenters, which learn from masks or pseudo labels. Each has a module, its loss as pure
functions, a frozen configuration and a trainer.
"""

from typing import TYPE_CHECKING, Any

from sightline.registry import load

if TYPE_CHECKING:
    from sightline.explainers._calm import Calm as Calm
    from sightline.explainers._calm import calm as calm
    from sightline.explainers._calm import surgery as surgery
    from sightline.explainers._calm_training import CalmConfig as CalmConfig
    from sightline.explainers._calm_training import train_calm as train_calm
    from sightline.explainers._casm import Casm as Casm
    from sightline.explainers._casm_training import CASM_CODE as CASM_CODE
    from sightline.explainers._casm_training import CASM_PAPER as CASM_PAPER
    from sightline.explainers._casm_training import CasmConfig as CasmConfig
    from sightline.explainers._casm_training import train_casm as train_casm
    from sightline.explainers._finer import finer as finer
    from sightline.explainers._saved import casm as casm
    from sightline.explainers._saved import load_casm as load_casm
    from sightline.explainers._saved import save_casm as save_casm
    from sightline.explainers._saved import segmenter as segmenter
    from sightline.explainers._search import search as search
    from sightline.explainers._segmenter import Segmenter as Segmenter
    from sightline.explainers._segmenter_training import SegmenterConfig as SegmenterConfig
    from sightline.explainers._segmenter_training import train_segmenter as train_segmenter

_HOMES = {
    "Casm": "_casm",
    "CasmConfig": "_casm_training",
    "CASM_CODE": "_casm_training",
    "CASM_PAPER": "_casm_training",
    "train_casm": "_casm_training",
    "casm": "_saved",
    "save_casm": "_saved",
    "load_casm": "_saved",
    "Calm": "_calm",
    "calm": "_calm",
    "surgery": "_calm",
    "finer": "_finer",
    "CalmConfig": "_calm_training",
    "train_calm": "_calm_training",
    "search": "_search",
    "Segmenter": "_segmenter",
    "segmenter": "_saved",
    "SegmenterConfig": "_segmenter_training",
    "train_segmenter": "_segmenter_training",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return load(f"sightline.explainers.{_HOMES[name]}:{name}")
    raise AttributeError(f"module 'sightline.explainers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
