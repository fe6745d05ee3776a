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
    "guided_backprop": "(classifier, x, y=None, /, *, score=logit)",
    "deconvnet": "(classifier, x, y=None, /, *, score=logit)",
    "smooth_grad": "(classifier, x, y=None, /, *, samples=50, noise=0.15, seed=0, score=logit, relative_to='input', "
    "chunk=16)",
    "var_grad": "(classifier, x, y=None, /, *, samples=50, noise=0.15, seed=0, score=logit, relative_to='input', "
    "chunk=16)",
    "smooth_grad_squared": "(classifier, x, y=None, /, *, samples=50, noise=0.15, seed=0, score=logit, "
    "relative_to='input', chunk=16)",
    "integrated_gradients": "(classifier, x, y=None, /, *, steps=50, erase='black', score=logit, chunk=16)",
    "calm_integrated_gradients": "(classifier, x, y=None, /, *, steps=50, erase='mean', score=logit, chunk=16)",
    "full_grad": "(classifier, x, y=None, /, *, score=logit, rescale='layer')",
    "excitation_backprop": "(classifier, x, y=None, /)",
    "contrastive_excitation_backprop": "(classifier, x, y=None, /, *, contrast=None)",
    "cam": "(classifier, x, y=None, /)",
    "grad_cam": "(classifier, x, y=None, /, *, score=logit)",
    "grad_cam_pp": "(classifier, x, y=None, /, *, score=logit)",
    "x_grad_cam": "(classifier, x, y=None, /, *, score=logit)",
    "layer_cam": "(classifier, x, y=None, /, *, score=logit)",
    "hires_cam": "(classifier, x, y=None, /, *, score=logit)",
    "eigen_cam": "(classifier, x, y=None, /, *, center=False)",
    "guided_grad_cam": "(classifier, x, y=None, /, *, score=logit)",
    "score_cam": "(classifier, x, y=None, /, *, score=logit, erase='black', mode='bilinear', chunk=64)",
    "ablation_cam": "(classifier, x, y=None, /, *, score=logit, chunk=256)",
    "opti_cam": "(classifier, x, y=None, /, *, objective='mask', normalization='range', score=logit, steps=100, "
    "lr=0.1, tolerance=1e-10, start='constant', keep_best=False, erase='black')",
    "meaningful_perturbation": "(classifier, x, y=None, /, *, game='deletion', score=probability, classes=1, "
    "erase='blur', blend='mix', cells=28, upsample='nearest', smooth=5.0, blur_grad='exact', jitter=4, l1=0.0001, "
    "tv=0.01, beta=3.0, tv_norm='isotropic', start='circle', steps=300, lr=0.1, seed=0, chunk=64)",
    "layer_perturbation": "(classifier, x, y=None, /, *, game='deletion', score=probability, classes=1, l1=None, "
    "tv=None, beta=3.0, tv_norm='isotropic', start='circle', steps=300, lr=0.1, seed=0, chunk=64)",
    "extremal_perturbation": "(classifier, x, y=None, /, *, game='preservation', areas=(0.1,), score=logit, "
    "erase='blur', blend='pyramid', step=7, sigma=21.0, weight=300.0, growth=1.0035, flip=True, steps=800, lr=0.01, "
    "momentum=0.9, smooth=0.0, chunk=16)",
    "occlusion": "(classifier, x, y=None, /, *, size=35.0, grid=28, shape='square', soften=10.0, score=logit, "
    "erase='mean', chunk=64)",
    "variable_occlusion": "(classifier, x, y=None, /, *, discs=784, distribution=Discs(area_mu=7.506, "
    "area_sigma=1.2848, y_mu=116.0759, y_sigma=47.5054, side=224.0), soften=10.0, share=0.1, score=logit, "
    "erase='blur', seed=0, chunk=64)",
    "rise": "(classifier, x, y=None, /, *, samples=6000, cells=8, p=0.1, score=probability, erase='black', seed=0, "
    "chunk=64)",
    "lime": "(classifier, x, y=None, /, *, samples=1000, score=probability, erase='black', kernel_size=4.0, "
    "max_dist=200.0, ratio=0.2, width=0.25, alpha=1.0, seed=0, chunk=64)",
    "gradient_shap": "(classifier, x, y=None, /, *, samples=20, score=logit, erase='black', baseline_noise=0.15, "
    "noise=0.0, seed=0)",
    "raw_attention": "(classifier, x, y=None, /)",
    "rollout": "(classifier, x, y=None, /, *, fusion='mean', discard=0.0, start=0)",
    "transformer_attribution": "(classifier, x, y=None, /, *, score=logit)",
    "generic_attention": "(classifier, x, y=None, /, *, score=logit)",
    "fake_cam": "(classifier, x, y=None, /)",
    "center": "(classifier, x, y=None, /, *, sigma=0.25)",
    "random": "(classifier, x, y=None, /, *, cells=7, seed=0)",
    "edge": "(classifier, x, y=None, /)",
}

COMBINATORS = {
    "smooth": "(method, *, samples=50, noise=0.15, seed=0, moment='mean', relative_to='input', chunk=16)",
    "binary_mask": "(method, *, samples=50, keep=0.9, seed=0, erase='black', chunk=16)",
    "random_patch": "(method, *, samples=50, patch=16, unit='pixels', drop=0.1, seed=0, weight=None, erase='black', "
    "chunk=16)",
    "disc_patch": "(method, *, samples=50, patch=16, unit='pixels', alpha=0.4, by=cam, classes='all', seed=0, "
    "weight=None, erase='black', chunk=16)",
    "random_crop": "(method, *, samples=140, scale=(0.1, 1.0), seed=0, norm='coverage', weight=sigmoid, chunk=16)",
    "disc_crop": "(method, *, samples=50, beta=0.7, scale=(0.1, 1.0), by=cam, classes='all', seed=0, norm='coverage', "
    "weight=sigmoid, chunk=16)",
    "flip_and_scale": "(method, *, scales=(1.0, 0.5, 1.5, 2.0), flip=True, positive=False, mode='bilinear', chunk=16)",
    "over": "(method, classes, *, normalize='none', reduce='sum')",
    "contrast": "(method, against, *, normalize='none')",
    "mean": "(*methods, normalize='unit')",
    "product": "(*methods, normalize='none')",
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
    "methods": {
        "per_class": "(method)",
        "smallest_disc": METHODS["variable_occlusion"],
    },
    "hooks": {
        "frozen": "(model)",
        "capture": "(model, layers)",
        "cut": "(model, layer)",
        "edit": "(model, layer, change)",
        "submodule": "(model, name)",
        "substituted": "(substitutes)",
    },
    "maps": {
        "resize": "(maps, size, mode='bilinear')",
        "unit": "(saliency)",
        "degenerate": "(saliency)",
        "blur": "(x, sigma, *, padding='reflect', radius=None)",
        "scale": "(size, side=224.0)",
        "peak": "(saliency)",
        "threshold": "(saliency, alpha, rule='value')",
        "boxes": "(mask, size)",
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
        "filler": "(x, choice, mean)",
        "mix": "(x, mask, erase)",
    },
    "protocols": {"fit_discs": "(samples)"},
    "data": {"collate": "(samples)", "batches": "(dataset, size, indices=None)"},
}

NAMES = {
    "methods.METHODS": list(METHODS),
    "methods.COMBINATORS": list(COMBINATORS),
    "metrics.METRICS": [
        *("average_drop", "average_increase", "average_gain", "insertion", "deletion"),
        *("mass", "minimality", "representativeness"),
    ],
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
    assert {name: signature(getattr(methods, name)) for name in methods.COMBINATORS} == COMBINATORS
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


@pytest.mark.parametrize(
    "module", ["sightline", "sightline.methods", "sightline.metrics", "sightline.datasets", "sightline.protocols"]
)
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
    at_once = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assigned = {ast.unparse(node.target) for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert {*package.__all__} - defined - assigned - at_once - {"__version__"} == said.keys()
    for name, home in said.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name)


def test_the_version_is_the_project_s():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{sightline.__version__}"\n' in text
