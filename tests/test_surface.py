"""The public surface, word for word: a change here is a change for every user, and belongs into the changelog."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import sightline

PACKAGE = {
    "explain": "(model, images, target=None, method='grad_cam', *, normalization=None, layer=None, "
    "resize_policy='direct', **settings)",
    "Explanation": "(names, images, photos, saliency, raw, labels, scores, classes, signed, problems, spec)",
    "wrap": "(model, *, layer=None, normalization=None, size=None, classes=())",
    "Classifier": "(model, layer, score=logit, to_grid=channels_first, mean=(0.0,), std=(1.0,), size=(224, 224), "
    "channels=3, classes=())",
    "measure": "(method, classifier, batches, metrics, *, explain='scored', report=None)",
    "run": "(spec, *, on=None, folder=None, report=None)",
    "Spec": "(model, data, method, metrics, explain='scored', layer=None, images=0, batch=16, seed=0)",
    "Run": "(spec, scores, arguments, provenance, classes=(), skipped=<factory>, pictures=<factory>)",
}

METHODS = {
    "gradient": "(classifier, x, y=None, /, *, score=logit)",
    "input_x_gradient": "(classifier, x, y=None, /, *, score=logit)",
    "cam": "(classifier, x, y=None, /)",
    "grad_cam": "(classifier, x, y=None, /, *, score=logit)",
    "grad_cam_pp": "(classifier, x, y=None, /, *, score=logit)",
    "x_grad_cam": "(classifier, x, y=None, /, *, score=logit)",
    "layer_cam": "(classifier, x, y=None, /, *, score=logit)",
    "hires_cam": "(classifier, x, y=None, /, *, score=logit)",
    "score_cam": "(classifier, x, y=None, /, *, score=logit, erase='black', mode='bilinear', chunk=64)",
    "ablation_cam": "(classifier, x, y=None, /, *, score=logit, chunk=256)",
    "opti_cam": "(classifier, x, y=None, /, *, objective='mask', normalization='range', score=logit, steps=100, "
    "lr=0.1, tolerance=1e-10, start='constant', keep_best=False, erase='black')",
    "fake_cam": "(classifier, x, y=None, /)",
    "center": "(classifier, x, y=None, /, *, sigma=0.25)",
    "random": "(classifier, x, y=None, /, *, cells=7, seed=0)",
    "edge": "(classifier, x, y=None, /)",
}

FUNCTIONS = {
    "classifier": {
        "logit": "(logits, y)",
        "probability": "(logits, y)",
        "log_probability": "(logits, y)",
        "sigmoid": "(logits, y)",
        "margin": "(against)",
        "total": "(classes)",
        "Classifier.__call__": "(self, x)",
        "Classifier.labels": "(self, x, y)",
        "Classifier.at": "(self, layer)",
        "Classifier.scores": "(self, x, y, score=None)",
        "Classifier.gradient": "(self, x, y, score=None)",
        "Classifier.features": "(self, x)",
        "Classifier.features_and_logits": "(self, x)",
        "Classifier.features_and_gradient": "(self, x, y, score=None)",
        "Classifier.logits_with": "(self, x, features)",
        "Method.__call__": "(self, classifier, x, y=None, /)",
    },
    "methods": {"per_class": "(method)"},
    "hooks": {
        "frozen": "(model)",
        "capture": "(model, layers)",
        "cut": "(model, layer)",
        "edit": "(model, layer, change)",
        "submodule": "(model, name)",
    },
    "maps": {
        "resize": "(maps, size, mode='bilinear')",
        "unit": "(saliency)",
        "degenerate": "(saliency)",
        "blur": "(x, sigma, *, padding='reflect', radius=None)",
        "binarize": "(saliency, threshold)",
        "components": "(mask, *, connectivity=4)",
        "largest": "(mask, *, connectivity=4)",
        "box": "(mask)",
    },
    "erase": {
        "black": "(x, saliency)",
        "color": "(x, saliency, *, mean)",
        "blur": "(x, saliency, *, sigma=10.0, padding='reflect', radius=None, around=(0.0,))",
        "noise": "(x, saliency, *, seed=0)",
        "telea": "(x, saliency, *, radius=3.0, keep=0.5)",
        "resolve": "(choice, mean)",
        "mix": "(x, mask, erase)",
    },
    "data": {"collate": "(samples)", "batches": "(dataset, size, indices=None)"},
}

NAMES = {
    "methods.METHODS": list(METHODS),
    "metrics.METRICS": ["average_drop", "average_increase", "average_gain", "insertion", "deletion", "mass"],
    "models.MODELS": ["creatures", "mini_resnet", "mini_vgg", "mini_vit"],
    "datasets.DATASETS": ["creatures", "folder", "mnist", "cub_crops"],
    "erase.ERASERS": ["black", "blur", "noise", "telea"],
    "classifier.SCORES": ["logit", "log_probability", "probability", "sigmoid"],
}

MODULES = ["classifier", "data", "datasets", "erase", "images", "maps", "methods", "metrics", "models", "report"]
MODULES += ["runs", "training", "viz"]


class Word:
    """A default that is a function, by its name."""

    def __init__(self, function):
        self.function = function

    def __repr__(self):
        return self.function.__name__


def signature(thing):
    """Return a signature without its annotations."""
    plain = []
    for parameter in inspect.signature(thing).parameters.values():
        default = Word(parameter.default) if inspect.isfunction(parameter.default) else parameter.default
        plain.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(inspect.Signature(plain))


def test_the_package_offers_these_names_and_no_other():
    assert sightline.__all__ == [*PACKAGE, "__version__"]
    assert {name: signature(getattr(sightline, name)) for name in PACKAGE} == PACKAGE


def test_methods_offer_these_names_and_no_other():
    methods = sightline.methods
    assert [name for name in methods.__all__ if name in METHODS] == list(METHODS)
    assert {name: signature(getattr(methods, name)) for name in METHODS} == METHODS


def reach(module, name):
    thing = importlib.import_module(f"sightline.{module}")
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize("module", FUNCTIONS)
def test_the_functions_of_the_core(module):
    assert {name: signature(reach(module, name)) for name in FUNCTIONS[module]} == FUNCTIONS[module]


@pytest.mark.parametrize("catalogue", NAMES)
def test_the_names_of_the_catalogues(catalogue):
    assert list(reach(*catalogue.split("."))) == NAMES[catalogue]


def test_modules_are_attributes_and_unknown_names_are_none():
    assert sorted({*dir(sightline)} - {*sightline.__all__}) == MODULES
    assert all(getattr(sightline, name).__name__ == f"sightline.{name}" for name in MODULES)
    with pytest.raises(AttributeError, match="module 'sightline' has no attribute 'explian'"):
        _ = sightline.explian


@pytest.mark.parametrize("module", ["sightline", "sightline.methods", "sightline.metrics", "sightline.datasets"])
def test_what_is_lazy_is_also_said_to_type_checkers(module):
    """Each lazy name stands under TYPE_CHECKING as `name as name`, and leads to the same thing."""
    package = importlib.import_module(module)
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    said = {
        alias.asname: node.module
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assigned = {ast.unparse(node.target) for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert {*package.__all__} - defined - assigned - {"__version__"} == said.keys()
    for name, home in said.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name)


def test_the_version_is_the_project_s():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{sightline.__version__}"\n' in text
