"""The specifications that come with the project can be read, and say what they are said to say."""

from pathlib import Path

import pytest

from sightline.classifier_training import IRN
from sightline.explainers import CASM_CODE, CASM_PAPER
from sightline.learning import configured
from sightline.recipes import Recipe
from sightline.running import named
from sightline.runs import read_specs, read_toml
from sightline.study import Study

ROOT = Path(__file__).parents[1]
RECIPES = {"irn": ("classifier", IRN), "casm-code": ("casm", CASM_CODE), "casm-paper": ("casm", CASM_PAPER)}
FILES = sorted(path for folder in ("examples", "results") for path in (ROOT / folder).glob("*.toml"))


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in RECIPES], ids=lambda path: path.stem)
def test_a_specification_can_be_read(path, plain):
    if "seeds" in read_toml(path):
        assert Study.read(path).steps or Study.read(path).evaluations
        return
    specs = read_specs(path)
    assert specs
    for spec in specs:
        named(spec)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_paper_s(name):
    kind, config = RECIPES[name]
    assert configured(kind, Recipe.read(ROOT / "examples" / f"{name}.toml")) == config


@pytest.mark.parametrize("name", ["wsss-voc12", "wsss-coco14"])
def test_the_large_studies_train_as_irn(name):
    for step in Study.read(ROOT / "results" / f"{name}.toml").steps:
        settings = {**step.table["settings"], "augment": "rescale+flip"}
        assert configured(step.kind, Recipe.of({"data": "voc", "model": "mini_resnet", "settings": settings})) == IRN
