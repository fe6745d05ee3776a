"""The public surface, word for word: a change here is a change for every user, and belongs into the changelog."""

import ast
import importlib
import inspect
from functools import partial
from pathlib import Path
from types import FunctionType

import pytest

import sightline
from sightline.runs import describe

PACKAGE = {
    "explain": "(model, images, target=None, method='grad_cam', *, normalization=None, layer=None, "
    "resize_policy='direct', **settings)",
    "Explanation": "(names, images, photos, saliency, raw, labels, scores, classes, signed, problems, spec)",
    "wrap": "(model, *, layer=None, normalization=None, size=None, classes=())",
    "Classifier": "(model, layer, score=logit, to_grid=channels_first, mean=(0.0,), std=(1.0,), size=(224, 224), "
    "channels=3, classes=())",
    "measure": "(method, classifier, batches, metrics, *, explain='scored', report=None)",
    "run": "(spec, *, on=None, folder=None, keep=None, pieces=None, fabric=None, report=None)",
    "Spec": "(model, data, method, metrics, explain='scored', layer=None, fast=None, images=0, batch=16, seed=0)",
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
    "score_cam": "(classifier, x, y=None, /, *, score=logit, erase='black', mode='bilinear', chunk=None)",
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
    "calm_attribution": "(classifier, x, y=None, /)",
    "calm_saliency": "(classifier, x, y=None, /)",
    "calm_class_given_location": "(classifier, x, y=None, /)",
    "calm_location_given_class": "(classifier, x, y=None, /)",
    "casm": "(classifier, x, y=None, /, *, weights='creatures')",
    "segmenter": "(classifier, x, y=None, /, *, weights=None)",
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
    "disc_patch": "(method, *, samples=50, patch=16, unit='pixels', alpha=0.4, by=cam, classes='all', "
    "reduce='mean', seed=0, weight=None, erase='black', chunk=16)",
    "random_crop": "(method, *, samples=140, scale=(0.1, 1.0), seed=0, norm='coverage', weight=sigmoid, chunk=16)",
    "disc_crop": "(method, *, samples=50, beta=0.7, scale=(0.1, 1.0), by=cam, classes='all', reduce='mean', seed=0, "
    "norm='coverage', weight=sigmoid, chunk=16)",
    "flip_and_scale": "(method, *, scales=(1.0, 0.5, 1.5, 2.0), flip=True, positive=False, mode='bilinear', chunk=16)",
    "over": "(method, classes, *, normalize='none', reduce='sum')",
    "contrast": "(method, against, *, normalize='none')",
    "mean": "(*methods, normalize='unit')",
    "product": "(*methods, normalize='none')",
}

METRICS = {
    "average_drop": "(*, erase='black', exponent=1.0, region='map', on='boxes', scored='label')",
    "average_increase": "(*, erase='black', exponent=1.0, region='map', on='boxes', scored='label')",
    "average_gain": "(*, erase='black', exponent=1.0, region='map', on='boxes', scored='label')",
    "insertion": "(*, steps=224, erase='rise', ties='row_major', score=probability, scored='predicted', seed=0, "
    "chunk=None)",
    "deletion": "(*, steps=224, erase='mean', ties='row_major', score=probability, scored='predicted', seed=0, "
    "chunk=None)",
    "mass": "(*, on='object', radius=0.06696428571428571)",
    "coverage": "(*, instance=None, normalize=True)",
    "minimality": "(*, level=0.9, steps=100, erase='blur', score=probability, scored='label', chunk=64)",
    "representativeness": "(*, steps=20, smooth=10.0, erase='blur', score=probability, scored='label', chunk=64)",
    "localization_error": "(*, rule='matched_area', alpha=1.0, iou=0.5, strict=True, area='unclipped', normalize=True)",
    "official_metric": "(*, rule='matched_area', alpha=1.0, iou=0.5, strict=True, area='unclipped', normalize=True)",
    "f1": "(*, area='unclipped', normalize=True)",
    "localization_error_continuous": "(*, rule='mean', alpha=1.0, area='unclipped', normalize=True)",
    "official_metric_continuous": "(*, rule='mean', alpha=1.0, area='unclipped', normalize=True)",
    "f1_union": "(*, area='unclipped', normalize=True)",
    "box_accuracy": "(*, threshold=0.2, iou=0.5, regions='largest', protocol='official', resize='bicubic', "
    "connectivity=8)",
    "max_box_accuracy": "(*, iou=0.5, thresholds=1000, protocol='official', resize='bicubic', connectivity=8)",
    "max_box_accuracy_v2": "(*, iou=(0.3, 0.5, 0.7), thresholds=1000, regions='all', protocol='official', "
    "resize='bicubic', connectivity=8)",
    "pxap": "(*, bins=1000, resize='bicubic', exact=False)",
    "pointing_game": "(*, tolerance=15.0, ties='mean', on='mask', subset='all', average='class', strict=True, "
    "resize='bilinear', scored='label')",
    "energy_pointing_game": "(*, on='boxes', coverage=1.0, scored='label')",
    "saliency_metric": "(*, p_on='crop', rule='mean', alpha=1.0, least=0.05, scored='label')",
    "aopc": "(*, patch=14, steps=10, erase='black', order='most', score=probability, scored='predicted', "
    "reduce='steps', chunk=64)",
    "selectivity": "(*, of='average_drop', exponents=(0.01, 0.05, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0), "
    "erase='black', scored='label')",
    "road": "(*, shares=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), order='most', noise=0.01, scored='label', "
    "seed=0, chunk=64)",
    "remove_and_classify": "(*, shares=(0.1, 0.3, 0.5, 0.7, 0.9), erase=blur(sigma=15.0, radius=15), relative=True, "
    "scored='label', seed=0, chunk=64)",
    "max_sensitivity": "(*, samples=10, radius=0.2, of='raw', relative=True, clamp=False, scored='predicted', seed=0)",
    "infidelity": "(*, perturbation='noisy_baseline', samples=1000, noise=0.2, sides=(0.03571428571428571, "
    "0.35714285714285715), multiplied=False, erase='black', score=logit, normalize=True, scored='label', seed=0, "
    "chunk=64)",
    "adcc": "(*, erase='black', average='image', scored='predicted')",
    "coherency": "(*, erase='black', scored='predicted')",
    "complexity": "(*, scored='predicted')",
    "total_variation": "(*, reduce='sum', of='saliency')",
    "entropy": "(*, sides='one', of='saliency')",
    "area": "(*, of='saliency')",
    "area_deviation": "(*, over='data', of='saliency')",
    "dead_cells": "(*, of='image')",
}

PROTOCOLS = {
    "multi_classifier_accuracy": "(method, classifier, samples, /, *, classifiers, mask='map', rule='matched_area', "
    "normalize=True, erase='black', radius=3.0, seed=0, batch=16)",
    "weak_localization": "(method, classifier, samples, /, *, held_out, iou=0.5, inclusive=True, batch=16)",
    "cue_localization": "(method, classifier, samples, /, *, masks='auto', pairs=None, distances=(1, 2, 3), "
    "limit=None, mapping='substring', segmentation=True, normalize='max', rescale='none', blur=0.0, bins=0, "
    "spacing='linear', drop_below=0.0, reset=True, batch=16)",
    "superset_depth": "(method, classifier, samples, /, *, hierarchy, nodes=None, "
    "measure='max_box_accuracy_v2', normalize='none', batch=16)",
    "part_ratio": "(method, classifier, samples, /, *, numerator, denominator, names=None, groups=None, window=5, "
    "least=11, of='saliency', as_mask=False, batch=16)",
    "randomization": "(method, classifier, samples, /, *, mode='cascading', stages=5, scored='label', seed=0, "
    "batch=16)",
    "label_permutation": "(method, classifier, samples, /, *, permuted, scored='label', batch=16)",
    "segmentation": "(method, classifier, samples, /, *, thresholds=(0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, "
    "0.09, 0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17, 0.18, 0.19, 0.2, 0.21, 0.22, 0.23, 0.24, 0.25, 0.26, "
    "0.27, 0.28, 0.29, 0.3, 0.31, 0.32, 0.33, 0.34, 0.35, 0.36, 0.37, 0.38, 0.39, 0.4, 0.41, 0.42, 0.43, 0.44, "
    "0.45, 0.46, 0.47, 0.48, 0.49, 0.5), threshold=None, normalize='max', resolve='basic', compete='present', "
    "regions='cam', by=None, reference=None, tau_cam=0.25, tau_sm=0.15, batch=16)",
    "discriminative_truth": "(method, classifier, samples, /, *, tau_cam=0.25, batch=16)",
}

DATASETS = {
    "creatures": "(split='test', *, count=None, size=64, variant='plain', seed=0, rho=0.95, only=None)",
    "folder": "(root, *, size=224, resize='direct', labels=True, count=None, check='decode')",
    "mnist": "(root, split='test', *, size=28, count=None)",
    "cub_crops": "(root, split='test', *, classes=None, size=224, resize='direct', count=None, check='decode')",
    "mnist_segmentation": "(root, split='test', *, size=128, count=None)",
    "imagenet": "(root, split='val', *, boxes='xml', annotations=None, metadata=None, origin=0, exclude=None, "
    "classes=None, size=224, resize='direct', count=None, check='header')",
    "imagenet_v2": "(root, *, boxes='wsol', metadata=None, size=224, resize='direct', count=None, check='header')",
    "cub": "(root, split='test', *, classes=None, segmentations=None, size=224, resize='direct', count=None, "
    "check='header')",
    "cub_v2": "(root, *, metadata=None, size=224, resize='direct', count=None, check='header')",
    "openimages30k": "(root, split='test', *, masks=None, metadata=None, size=224, resize='direct', count=None, "
    "check='header')",
    "voc": "(root, split='val', *, year='2012', task='segmentation', listing=None, masks='SegmentationClass', "
    "size=224, resize='direct', count=None, check='decode')",
    "coco": "(root, split='val', *, year='2017', annotations=None, crowd='ignore', unlabeled=False, size=224, "
    "resize='direct', count=None, check='decode')",
    "pets": "(root, split='test', *, task='breed', breeds=None, boxes='trimap', official=True, size=224, "
    "resize='direct', count=None, check='decode')",
    "kvasir": "(root, split='test', *, listing=None, seed=0, size=224, resize='direct', count=None, check='decode')",
    "chest_xray": "(root, split='test', *, size=224, resize='direct', count=None, check='decode')",
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
        "Classifier.read": "(self, output, count)",
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
        "seen": "(model, x, read)",
        "substituted": "(substitutes)",
    },
    "maps": {
        "resize": "(maps, size, mode='bilinear')",
        "unit": "(saliency)",
        "degenerate": "(saliency)",
        "blur": "(x, sigma, *, padding='reflect', radius=None)",
        "scale": "(size, side=224.0)",
        "scaled": "(saliency, size, mode='bilinear')",
        "by_maximum": "(maps)",
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
    "explainers": {
        "Casm.mask": "(self, x)",
        "casm": "(classifier, x, y=None, /, *, weights='creatures')",
        "save_casm": "(mapping, path, *, encoder, extra=None, half=False)",
        "load_casm": "(path)",
        "train_casm": "(classifier, dataset, config, *, seed=0, out=None, every=200, resume=True, report=None, "
        "accelerator='auto')",
        "calm": "(backbone='mini_resnet', *, finer=0, activation='softplus', detach=False, size=None, seed=0)",
        "surgery": "(classifier, *, finer=0, activation='softplus', detach=False, seed=0)",
        "finer": "(classifier, stages)",
        "train_calm": "(classifier, dataset, config, *, seed=0, out=None, every=200, resume=True, report=None, "
        "accelerator='auto')",
        "search": "(run, *, trials=30, low=1e-05, high=0.1, seed=0, out=None)",
        "segmenter": "(classifier, x, y=None, /, *, weights=None)",
        "train_segmenter": "(classifier, dataset, config, *, seed=0, out=None, every=200, resume=True, report=None, "
        "accelerator='auto')",
    },
    "metrics": METRICS,
    "protocols": {"fit_discs": "(samples)", **PROTOCOLS},
    "datasets": DATASETS,
    "interchange": {
        "write_map": "(path, saliency)",
        "read_map": "(path)",
        "write_irn": "(path, cams, *, pickled=False)",
        "read_irn": "(path, *, pickled=False)",
        "write_labels": "(path, labels)",
        "read_labels": "(path)",
        "write_overlay": "(path, image, saliency)",
        "write_coco": "(path, detections)",
        "read_coco": "(path)",
        "encoded": "(mask)",
        "decoded": "(code)",
        "stored": "(root, *, form='auto', pickled=False, resize='input')",
        "of_captum": "(attribute, *, reduce='sum')",
        "for_quantus": "(method)",
    },
    "supersets": {
        "partition": "(hierarchy, listed, classes)",
        "imagenet": "(is_a, wnids)",
        "levels": "(hierarchy, classes)",
        "members": "(name, classes, count=None)",
        "hierarchy_of": "(given, classes)",
    },
    "learning": {
        "learn": "(kind, recipe, out, *, fresh=True, report=None)",
        "configured": "(kind, recipe)",
    },
    "backgrounds": {
        "basic": "(image, maps, /)",
        "smooth": "(image, maps, /, *, size=13, sigma=5.0, renormalize=True)",
        "superpixel": "(image, maps, /, *, scale=100.0, sigma=0.5, min_size=50, renormalize=False)",
        "crf": "(image, maps, /, *, threshold=0.3, iterations=10, confidence=0.7, near=3.0, near_weight=3.0, far=50.0, "
        "color=5.0, far_weight=10.0)",
        "resolve_of": "(what, *, divided=True)",
        "labels_at": "(maps, classes, low, high=None)",
    },
    "hyperplanes": {"signed_distances": "(classifier, x, y=None, *, tau_cam=0.25, tau_sm=0.15)"},
    "windows": {
        "window": "(layers)",
        "window_in_cells": "(layers)",
        "measured_windows": "(classifier, *, layers=None, seed=0, tries=8)",
    },
    "segmenting": {"segment": "(spec, out, *, report=None)"},
    "study": {
        "conduct": "(study, out, *, seeds=None, told=None)",
        "markdown": "(study, runs)",
        "record": "(study, runs, out)",
    },
    "training": {
        "fit": "(trainer, dataset, *, epochs, batch, seed=0, out=None, every=200, augment=None, resume=True, "
        "report=None, precision='32-true', accelerator='auto', fraction=1.0)",
        "gradients": "(fabric, loss, parameters, share, *, retain=False)",
        "update": "(optimizer, parameters, gradients, *, clip=None)",
        "averaged": "(fabric, value, share)",
        "remember": "(dataset, *, most=4294967296, masks=False)",
        "logged": "(folder, kind)",
    },
    "models": {
        "load": "(model)",
        "save": "(classifier, path, *, model, extra=None, half=False)",
        "recipe": "(model)",
    },
    "data": {"collate": "(samples)", "batches": "(dataset, size, indices=None)"},
}

MINI = ("mini_resnet", "mini_vgg", "mini_vit", "kernel_net")
GAP = ("resnet50_gap", "vgg16_gap", "inception_v3_gap")

NAMES = {
    "methods.METHODS": list(METHODS),
    "methods.COMBINATORS": list(COMBINATORS),
    "metrics.METRICS": list(METRICS),
    "protocols.PROTOCOLS": list(PROTOCOLS),
    "models.MODELS": ["creatures", "creatures_calm", *MINI, *GAP, "mini_seg", "lraspp", "calm", "none"],
    "datasets.DATASETS": list(DATASETS),
    "erase.ERASERS": ["black", "blur", "noise", "telea", "noisy_linear"],
    "classifier.SCORES": ["logit", "log_probability", "probability", "sigmoid"],
}

MODULES = ["classifier", "data", "datasets", "erase", "images", "interchange", "maps", "methods", "metrics", "models"]
MODULES += [
    "backgrounds",
    "explainers",
    "gallery",
    "hyperplanes",
    "learning",
    "protocols",
    "recipes",
    "report",
    "runs",
    "segmenting",
    "study",
    "supersets",
    "training",
    "viz",
    "windows",
]


WORDS = (FunctionType, partial)


class Word:
    """A default that is a function, by its name, with its settings where it has some."""

    def __init__(self, function):
        self.function = function

    def __repr__(self):
        return describe(self.function)


def signature(thing):
    """Return a signature without its annotations."""
    plain = []
    for parameter in inspect.signature(thing).parameters.values():
        default = Word(parameter.default) if isinstance(parameter.default, WORDS) else parameter.default
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
    assert sorted({*dir(sightline)} - {*sightline.__all__}) == sorted(MODULES)
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
