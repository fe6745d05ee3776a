"""How the house is built: imports point one way, heavy libraries stay where they belong, functions are described."""

import ast
import builtins
import dis
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sightline"

CORE = {"types", "hooks", "maps", "erase", "classifier", "registry"}
CATALOGUES = {"methods", "metrics", "models", "datasets", "protocols"}

ALLOWED = {
    "types": set(),
    "registry": set(),
    "kinds": {"registry"},
    "memory": set(),
    "runs": {"kinds"},
    "data": {"types"},
    "hooks": {"registry"},
    "layers": {"types", "hooks"},
    "classifier": {"types", "hooks", "layers"},
    "maps": {"types"},
    "erase": {"types", "maps", "registry"},
    "images": {"types", "registry"},
    "viz": {"types", "maps", "registry"},
    "settings": {"classifier", "erase", "kinds", "methods", "registry", "runs"},
    "methods": CORE | {"layers", "memory", "supersets", "explainers"},
    "metrics": CORE | {"data", "memory"},
    "attention": {"hooks"},
    "speed": {"attention", "classifier", "hooks", "types"},
    "models": {"types", "hooks", "classifier", "kinds", "registry", "runs"},
    "datasets": {"types", "data", "images", "registry"},
    "processes": {"classifier"},
    "pieces": {"classifier", "evaluation", "metrics", "processes", "runs"},
    "training": {"data", "processes", "runs"},
    "classifier_training": {
        *("types", "hooks", "classifier", "data", "kinds", "registry", "runs", "training", "wsol_training"),
    },
    "recipes": {"kinds", "runs"},
    "backgrounds": {"kinds", "maps", "registry", "runs"},
    "wsol_training": {"types", "hooks", "classifier", "kinds", "runs"},
    "supersets": {"registry", "runs"},
    "explainers": CORE
    | {"backgrounds", "layers", "data", "interchange", "runs", "models", "processes", "training"}
    | {"classifier_training"},
    "learning": {
        *("classifier", "data", "evaluation", "explainers", "interchange", "methods", "metrics", "models"),
        *("processes", "protocols", "recipes", "registry", "running", "runs", "settings", "training"),
        "classifier_training",
    },
    "hyperplanes": {"types", "classifier", "maps", "methods"},
    "windows": {"types", "classifier", "hooks", "layers"},
    "segmenting": {
        *("backgrounds", "classifier", "data", "evaluation", "images", "interchange", "kinds", "maps", "methods"),
        *("metrics", "models", "protocols", "registry", "running", "runs", "settings", "types", "viz"),
    },
    "study": {
        "latex",
        "learning",
        "pieces",
        "processes",
        "protocols",
        "recipes",
        "registry",
        "running",
        "runs",
        "segmenting",
        "training",
        "viz",
    },
    "protocols": CORE | {"backgrounds", "data", "metrics", "methods", "evaluation", "runs", "supersets"},
    "interchange": {"types", "classifier", "data", "images", "maps", "registry", "runs", "viz"},
    "accumulate": {"metrics"},
    "evaluation": {"types", "classifier", "maps", "data", "metrics", "accumulate", "runs"},
    "explanation": {
        *(CORE | {"images", "viz", "interchange", "evaluation", "kinds", "methods", "metrics", "models", "runs"}),
        "settings",
    },
    "running": {
        *(CORE | CATALOGUES),
        *("data", "images", "viz", "interchange", "evaluation", "explanation", "pieces", "processes", "runs"),
        *("settings", "speed"),
    },
    "gallery": {
        *("types", "backgrounds", "classifier", "data", "erase", "hyperplanes", "maps", "registry", "settings", "viz"),
        *("evaluation", "explanation", "metrics", "protocols"),
    },
    "latex": set(),
    "table": {"latex", "runs", "methods"},
    "report": {"methods", "metrics", "protocols", "runs", "table"},
    "cli": {
        *(
            CATALOGUES
            | {"classifier", "registry", "data", "erase", "images", "viz", "explanation", "gallery", "running"}
        ),
        *("runs", "settings", "table", "report", "learning", "recipes", "study", "training", "memory"),
        *("backgrounds", "pieces", "processes", "segmenting", "windows"),
    },
    "__main__": {"cli"},
    "__init__": {"classifier", "evaluation", "explanation", "running", "runs"},
}
"""Module or sub-package -> those of ours that it may import, wherever in its files."""

HOMES = {
    "torchvision": {"models", "datasets", "images", "explainers"},
    "timm": {"models", "datasets", "images"},
    "transformers": {"models", "datasets", "images"},
    "torchmetrics": {"accumulate"},
    "lightning_fabric": {"processes", "running", "training", "classifier_training", "explainers", "cli"},
    "matplotlib": {"viz"},
    "captum": {"methods"},
    "pycocotools": {"datasets", "interchange"},
    "click": {"cli"},
    "rich": {"cli"},
}
"""Library -> the only modules of ours that may import it."""

INSIDE_FUNCTIONS = {"torchvision", "timm", "transformers", "captum", "lightning_fabric", "pycocotools"}

CLICK = {"list_commands", "get_command"}
"""Methods that click calls by these names."""

WITHOUT_TORCH = (
    "recipes",
    "supersets",
    "registry",
    "kinds",
    "runs",
    "latex",
    "table",
    "report",
    "methods",
    "metrics",
    "protocols",
    "models",
    "datasets",
    "cli",
    "__init__",
)


@dataclass(frozen=True)
class Import:
    """One import statement: what, and whether it runs when the file is read."""

    name: str
    deferred: bool
    typing_only: bool


@dataclass(frozen=True)
class File:
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def unit(self):
        return self.path.relative_to(SOURCE).parts[0].removesuffix(".py")

    @property
    def name(self):
        parts = self.path.relative_to(SOURCE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module if node.module != "sightline" else f"sightline.{alias.name}" for alias in node.names]


def walk(node, deferred=False, typing_only=False):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom | ast.Import):
            for name in imported(child):
                yield Import(name, deferred, typing_only)
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checked = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield from walk(child, deferred or function, typing_only or checked)


@cache
def files():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    return tuple(File(path, tree, tuple(walk(tree))) for path, tree in trees.items())


def ours(one):
    """Yield the units of ours that a file imports."""
    for item in one.imports:
        root, _, rest = item.name.partition(".")
        if root == "sightline" and rest.partition(".")[0] != one.unit:
            yield rest.partition(".")[0]


def test_every_module_has_its_row():
    assert {one.unit for one in files()} == set(ALLOWED), "a new module needs a row in ALLOWED, a gone one needs none"


@pytest.mark.parametrize("unit", ALLOWED)
def test_imports_point_one_way(unit):
    found = {target for one in files() if one.unit == unit for target in ours(one)}
    assert found <= ALLOWED[unit]


def test_the_table_itself_has_no_circle():
    order = []
    while left := [unit for unit in ALLOWED if unit not in order]:
        ready = [unit for unit in left if ALLOWED[unit] <= set(order)]
        assert ready, f"a circle among {left}"
        order += ready


def test_methods_and_metrics_do_not_know_each_other_and_nobody_knows_the_command_line():
    assert "metrics" not in ALLOWED["methods"]
    assert "methods" not in ALLOWED["metrics"]
    assert [unit for unit, targets in ALLOWED.items() if "cli" in targets] == ["__main__"]
    knowing = {unit for unit, targets in ALLOWED.items() if len(targets & CATALOGUES) > 1}
    assert knowing == {"protocols", "explanation", "gallery", "learning", "running", "segmenting", "report", "cli"}


def test_the_package_imports_by_absolute_names():
    relative = [one.name for one in files() for n in ast.walk(one.tree) if isinstance(n, ast.ImportFrom) and n.level]
    assert relative == []


def test_heavy_libraries_stay_at_home():
    for one in files():
        for item in one.imports:
            root = item.name.partition(".")[0]
            assert root not in HOMES or one.unit in HOMES[root], f"{one.name} imports {root}"
            assert root not in INSIDE_FUNCTIONS or item.deferred or item.typing_only, (
                f"{one.name} imports {root} on top"
            )


def at_once(name):
    """Return what is imported, directly or not, when the module called `name` is read."""
    known = {one.name: one for one in files()}
    seen, left = set(), [name, "sightline"]
    while left:
        current = left.pop()
        if current in seen:
            continue
        seen.add(current)
        parents = [current.rpartition(".")[0]] if current.startswith("sightline.") else []
        items = known[current].imports if current in known else ()
        left += parents + [item.name for item in items if not item.deferred and not item.typing_only]
    return seen


@pytest.mark.parametrize("unit", WITHOUT_TORCH)
def test_what_needs_no_torch_imports_none(unit):
    found = at_once("sightline" if unit == "__init__" else f"sightline.{unit}")
    assert not {name.partition(".")[0] for name in found} & {"torch", *HOMES} - {"click", "rich"}


def test_the_check_above_sees_an_import_through_others():
    assert "torch" in at_once("sightline.evaluation")
    assert {"torch", "sightline.types"} <= at_once("sightline.methods._opti_cam")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout


def test_torch_is_not_loaded_by_names_tables_reports_and_help():
    """As the interpreter sees it, not only the text."""
    modules = [f"sightline.{unit}" for unit in WITHOUT_TORCH if unit != "__init__"]
    help_without_torch = """
import runpy, sys
sys.argv = ["sightline", "--help"]
try:
    runpy.run_module("sightline", run_name="__main__")
except SystemExit as stop:
    assert not stop.code
"""
    code = (
        f"import sightline, {', '.join(modules)}\nsightline.methods.METHODS['grad_cam'].summary\n{help_without_torch}"
    )
    output = run(f"{code}\nprint(sorted({{'torch', 'torchvision', 'matplotlib', 'cv2'}} & set(sys.modules)))")
    assert "Usage:" in output
    assert output.strip().splitlines()[-1] == "[]"


def functions(one):
    """Yield the functions and methods that a reader meets: not nested ones, stubs of protocols, names with _."""
    for node in one.tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            protocol = any("Protocol" in ast.unparse(base) for base in node.bases)
            hidden = CLICK | {inner.name for inner in node.body if protocol and isinstance(inner, ast.FunctionDef)}
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_") and inner.name not in hidden:
                    yield f"{node.name}.{inner.name}", inner


def parameters(function):
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [argument for argument in every if argument is not None and argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("one", files(), ids=lambda one: one.name)
def test_functions_are_annotated_and_documented(one):
    assert ast.get_docstring(one.tree), f"{one.name} has no docstring"
    for name, function in functions(one):
        bare = [argument.arg for argument in parameters(function) if argument.annotation is None]
        assert not bare, f"{one.name}.{name} leaves {bare} without annotation"
        assert function.returns is not None, f"{one.name}.{name} does not say what it returns"
        assert ast.get_docstring(function), f"{one.name}.{name} has no docstring"


@pytest.mark.parametrize("one", files(), ids=lambda one: one.name)
def test_the_words_of_the_house(one):
    """No bare assert, no left-overs, none of the names that say nothing."""
    assert not [node.lineno for node in ast.walk(one.tree) if isinstance(node, ast.Assert)]
    text = one.path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    definitions = [node for node in ast.walk(one.tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names = {one.path.stem, *(node.name for node in definitions)} - CLICK
    forbidden = re.compile(r"^_?(get_|compute_)|(^|_)(utils?|common|helpers?|base|managers?)($|_)", re.IGNORECASE)
    assert not {name for name in names if forbidden.search(name)}


def test_functions_are_short():
    """Half of them under ten lines, nine in ten under 35; docstrings count."""
    spans = [node for one in files() for node in ast.walk(one.tree) if isinstance(node, ast.FunctionDef)]
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in spans)
    assert lengths[len(lengths) // 2] < 10
    assert lengths[len(lengths) * 9 // 10] < 35


def codes(code):
    """Yield a code object and those inside it."""
    yield code
    for inner in code.co_consts:
        if hasattr(inner, "co_code"):
            yield from codes(inner)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__main__.py"],
    ids=lambda path: str(path.relative_to(SOURCE)),
)
def test_every_global_name_is_there(path):
    """The tools cannot tell: jaxtyping's shapes are names to them, and so undefined names are allowed."""
    name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    known = {*vars(importlib.import_module(name)), *vars(builtins)}
    whole = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    asked = {i.argval for code in codes(whole) for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    assert asked <= known, sorted(asked - known)
