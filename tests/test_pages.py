"""The pages of methods and metrics say what the code says: made again, they are the ones that lie in docs."""

import importlib.util
import sys
from pathlib import Path

import pytest

from sightline.methods import COMBINATORS, METHODS
from sightline.metrics import METRICS
from sightline.protocols import PROTOCOLS
from sightline.runs import Choice

DOCS = Path(__file__).parents[1] / "docs"
NAMES = [*METHODS, *COMBINATORS]
JUDGES = [*METRICS, *PROTOCOLS]

if not (DOCS / "pages.py").exists():
    pytest.skip("docs are not in a source distribution", allow_module_level=True)


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pages"] = module
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_page_a_picture_and_advice_and_nothing_else_has(pages):
    assert sorted(pages.TEXTS) == sorted(NAMES)
    assert all(text.keys() == {"use", "avoid"} for text in pages.TEXTS.values())
    assert sorted(path.stem for path in (DOCS / "methods").glob("*.md")) == sorted([*NAMES, "README"])
    assert sorted(path.stem for path in (DOCS / "methods").glob("*.jpg")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_current(name, pages):
    written = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert written == pages.page(name), "run docs/pages.py"


def test_the_index_is_current(pages):
    assert (DOCS / "methods" / "README.md").read_text(encoding="utf-8") == pages.index()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_page_shows_can_be_asked_for(name, pages):
    assert callable(pages.method_of(pages.example(name)))
    assert callable(pages.method_of(Choice.parse(pages.command(name))))


def test_every_metric_and_protocol_has_a_page_and_its_texts_and_nothing_else_has(pages):
    assert sorted(pages.JUDGES) == sorted(JUDGES)
    assert all(text.keys() == {"range", "variants", "pitfalls", "elsewhere"} for text in pages.JUDGES.values())
    assert all(all(text.values()) for text in pages.JUDGES.values())
    assert sorted(path.stem for path in (DOCS / "metrics").glob("*.md")) == sorted([*JUDGES, "README"])


@pytest.mark.parametrize("name", JUDGES)
def test_the_page_of_a_metric_is_current(name, pages):
    written = (DOCS / "metrics" / f"{name}.md").read_text(encoding="utf-8")
    assert written == pages.judge_page(name), "run docs/pages.py"


def test_the_index_of_metrics_is_current(pages):
    assert (DOCS / "metrics" / "README.md").read_text(encoding="utf-8") == pages.judge_index()
