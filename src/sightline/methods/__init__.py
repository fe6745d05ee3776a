"""Methods. Every post-hoc explainer by name, loaded when first used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sightline.methods._combinators import COMBINATORS as COMBINATORS
from sightline.methods._combinators import Combinator as Combinator
from sightline.registry import load

if TYPE_CHECKING:
    from sightline.classifier import Classifier, Method
    from sightline.explainers._saved import casm as casm
    from sightline.explainers._saved import segmenter as segmenter
    from sightline.methods._ablation_cam import ablation_cam as ablation_cam
    from sightline.methods._binary_mask import binary_mask as binary_mask
    from sightline.methods._calm import calm_attribution as calm_attribution
    from sightline.methods._calm import calm_class_given_location as calm_class_given_location
    from sightline.methods._calm import calm_location_given_class as calm_location_given_class
    from sightline.methods._calm import calm_saliency as calm_saliency
    from sightline.methods._calm_integrated_gradients import calm_integrated_gradients as calm_integrated_gradients
    from sightline.methods._cam import cam as cam
    from sightline.methods._center import center as center
    from sightline.methods._contrast import contrast as contrast
    from sightline.methods._crops import disc_crop as disc_crop
    from sightline.methods._crops import random_crop as random_crop
    from sightline.methods._deconvnet import deconvnet as deconvnet
    from sightline.methods._edge import edge as edge
    from sightline.methods._eigen_cam import eigen_cam as eigen_cam
    from sightline.methods._excitation_backprop import (
        contrastive_excitation_backprop as contrastive_excitation_backprop,
    )
    from sightline.methods._excitation_backprop import excitation_backprop as excitation_backprop
    from sightline.methods._extremal_perturbation import POINTING as POINTING
    from sightline.methods._extremal_perturbation import extremal_perturbation as extremal_perturbation
    from sightline.methods._fake_cam import fake_cam as fake_cam
    from sightline.methods._flip_and_scale import flip_and_scale as flip_and_scale
    from sightline.methods._full_grad import full_grad as full_grad
    from sightline.methods._generic_attention import generic_attention as generic_attention
    from sightline.methods._grad_cam import grad_cam as grad_cam
    from sightline.methods._grad_cam_pp import grad_cam_pp as grad_cam_pp
    from sightline.methods._gradient import gradient as gradient
    from sightline.methods._gradient_shap import gradient_shap as gradient_shap
    from sightline.methods._guided_backprop import guided_backprop as guided_backprop
    from sightline.methods._guided_grad_cam import guided_grad_cam as guided_grad_cam
    from sightline.methods._hires_cam import hires_cam as hires_cam
    from sightline.methods._input_x_gradient import input_x_gradient as input_x_gradient
    from sightline.methods._integrated_gradients import integrated_gradients as integrated_gradients
    from sightline.methods._layer_cam import layer_cam as layer_cam
    from sightline.methods._lime import lime as lime
    from sightline.methods._mean import mean as mean
    from sightline.methods._meaningful_perturbation import LAYERS as LAYERS
    from sightline.methods._meaningful_perturbation import LOCALIZATION as LOCALIZATION
    from sightline.methods._meaningful_perturbation import layer_perturbation as layer_perturbation
    from sightline.methods._meaningful_perturbation import meaningful_perturbation as meaningful_perturbation
    from sightline.methods._occlusion import occlusion as occlusion
    from sightline.methods._opti_cam import opti_cam as opti_cam
    from sightline.methods._over import over as over
    from sightline.methods._patches import disc_patch as disc_patch
    from sightline.methods._patches import random_patch as random_patch
    from sightline.methods._per_class import per_class as per_class
    from sightline.methods._product import product as product
    from sightline.methods._random import random as random
    from sightline.methods._raw_attention import raw_attention as raw_attention
    from sightline.methods._rise import rise as rise
    from sightline.methods._rollout import rollout as rollout
    from sightline.methods._score_cam import score_cam as score_cam
    from sightline.methods._smooth import smooth as smooth
    from sightline.methods._smooth_grad import smooth_grad as smooth_grad
    from sightline.methods._smooth_grad import smooth_grad_squared as smooth_grad_squared
    from sightline.methods._smooth_grad import var_grad as var_grad
    from sightline.methods._transformer_attribution import transformer_attribution as transformer_attribution
    from sightline.methods._variable_occlusion import Discs as Discs
    from sightline.methods._variable_occlusion import smallest_disc as smallest_disc
    from sightline.methods._variable_occlusion import variable_occlusion as variable_occlusion
    from sightline.methods._x_grad_cam import x_grad_cam as x_grad_cam
    from sightline.types import Images, Labels, Saliency


@dataclass(frozen=True, eq=False)
class Entry:
    """What is known of a method without importing it; called, it is the method with its defaults.

    `needs`: what the classifier must offer. `cost`: passes through the network an image. `class_specific`: the label
    changes the map. `signed`: values below zero speak against the class. `quick`: arguments for smoke runs. `control`:
    knows nothing of the classifier and belongs in every table.
    """

    load: str
    summary: str
    paper: str = ""
    needs: tuple[str, ...] = ()
    cost: str = "none"
    class_specific: bool = True
    signed: bool = False
    control: bool = False
    quick: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def method(self) -> "Method":
        """The function itself."""
        found: Method = load(self.load)
        return found

    def __call__(self, classifier: "Classifier", x: "Images", y: "Labels | None" = None, /) -> "Saliency":
        """Explain with the paper's defaults."""
        return self.method(classifier, x, y)


def _entry(name: str, summary: str, **rest: Any) -> Entry:
    return Entry(f"sightline.methods._{name}:{name}", summary, **rest)


def _calm(name: str, summary: str, **rest: Any) -> Entry:
    load = f"sightline.methods._calm:{name}"
    return Entry(load, summary, "Kim et al. 2021", needs=("CALM",), cost="1 forward", **rest)


METHODS: Mapping[str, Entry] = {
    "gradient": _entry(
        "gradient",
        "the largest absolute derivative over the colors",
        paper="Simonyan et al. 2014",
        needs=("gradients",),
        cost="1 forward, 1 backward",
    ),
    "input_x_gradient": _entry(
        "input_x_gradient",
        "each pixel's first-order share in the score",
        paper="Shrikumar et al. 2016",
        needs=("gradients",),
        cost="1 forward, 1 backward",
        signed=True,
    ),
    "guided_backprop": _entry(
        "guided_backprop",
        "the gradient through positive derivatives of active units alone",
        paper="Springenberg et al. 2015",
        needs=("gradients", "ReLU"),
        cost="1 forward, 1 backward",
    ),
    "deconvnet": _entry(
        "deconvnet",
        "the gradient through positive derivatives alone",
        paper="Zeiler and Fergus 2014",
        needs=("gradients", "ReLU"),
        cost="1 forward, 1 backward",
    ),
    "smooth_grad": _entry(
        "smooth_grad",
        "the mean gradient map of noisy copies",
        paper="Smilkov et al. 2017",
        needs=("gradients",),
        cost="51 forwards, 50 backwards",
        quick={"samples": 3},
    ),
    "var_grad": Entry(
        "sightline.methods._smooth_grad:var_grad",
        "the variance of the gradient maps of noisy copies",
        paper="Adebayo et al. 2018",
        needs=("gradients",),
        cost="51 forwards, 50 backwards",
        quick={"samples": 3},
    ),
    "smooth_grad_squared": Entry(
        "sightline.methods._smooth_grad:smooth_grad_squared",
        "the mean square of the gradient maps of noisy copies",
        paper="Hooker et al. 2019",
        needs=("gradients",),
        cost="51 forwards, 50 backwards",
        quick={"samples": 3},
    ),
    "integrated_gradients": _entry(
        "integrated_gradients",
        "each pixel's share in the score's rise from a baseline",
        paper="Sundararajan et al. 2017",
        needs=("gradients",),
        cost="50 forwards, 50 backwards",
        signed=True,
        quick={"steps": 4},
    ),
    "calm_integrated_gradients": _entry(
        "calm_integrated_gradients",
        "the gradient maps on the way from the mean color, added up",
        paper="Kim et al. 2021 (official code)",
        needs=("gradients",),
        cost="51 forwards, 51 backwards",
        quick={"steps": 4},
    ),
    "full_grad": _entry(
        "full_grad",
        "the shares of the input and of every bias in the score",
        paper="Srinivas and Fleuret 2019",
        needs=("gradients", "convolutions"),
        cost="1 forward, 1 backward",
    ),
    "excitation_backprop": _entry(
        "excitation_backprop",
        "the probability that a top-down walk passes here",
        paper="Zhang et al. 2016",
        needs=("layer", "gradients", "plain CNN"),
        cost="1 forward, 1 backward",
    ),
    "contrastive_excitation_backprop": Entry(
        "sightline.methods._excitation_backprop:contrastive_excitation_backprop",
        "excitation backprop for the class minus that against it",
        paper="Zhang et al. 2016",
        needs=("layer", "gradients", "plain CNN"),
        cost="1 forward, 3 backwards",
    ),
    "cam": _entry(
        "cam",
        "features weighted by the linear head",
        paper="Zhou et al. 2016",
        needs=("layer", "linear head"),
        cost="1 forward",
        signed=True,
    ),
    "grad_cam": _entry(
        "grad_cam",
        "features weighted by their mean gradients",
        paper="Selvaraju et al. 2017",
        needs=("layer", "gradients"),
        cost="1 forward",
    ),
    "grad_cam_pp": _entry(
        "grad_cam_pp",
        "features weighted by their positive gradients",
        paper="Chattopadhay et al. 2018",
        needs=("layer", "gradients"),
        cost="1 forward",
    ),
    "x_grad_cam": _entry(
        "x_grad_cam",
        "features weighted by activation-weighted gradients",
        paper="Fu et al. 2020",
        needs=("layer", "gradients"),
        cost="1 forward",
    ),
    "layer_cam": _entry(
        "layer_cam",
        "features weighted cell by cell with positive gradients",
        paper="Jiang et al. 2021",
        needs=("layer", "gradients"),
        cost="1 forward",
    ),
    "hires_cam": _entry(
        "hires_cam",
        "features times gradients",
        paper="Draelos and Carin 2020",
        needs=("layer", "gradients"),
        cost="1 forward",
    ),
    "eigen_cam": _entry(
        "eigen_cam",
        "the first principal component of the features",
        paper="Muhammad and Yeasin 2020",
        needs=("layer",),
        cost="1 forward",
        class_specific=False,
    ),
    "guided_grad_cam": _entry(
        "guided_grad_cam",
        "guided backprop where Grad-CAM looks",
        paper="Selvaraju et al. 2017",
        needs=("layer", "gradients", "ReLU"),
        cost="2 forwards, 1 backward",
    ),
    "score_cam": _entry(
        "score_cam",
        "features weighted by the image's score through each",
        paper="Wang et al. 2020",
        needs=("layer",),
        cost="1 forward a channel",
    ),
    "ablation_cam": _entry(
        "ablation_cam",
        "features weighted by what the score loses without each",
        paper="Desai and Ramaswamy 2020",
        needs=("layer",),
        cost="1 forward, the head once a channel",
    ),
    "opti_cam": _entry(
        "opti_cam",
        "features mixed so that the masked image scores highest",
        paper="Zhang et al. 2024",
        needs=("layer", "gradients"),
        cost="100 forwards, 100 backwards",
        quick={"steps": 5},
    ),
    "meaningful_perturbation": _entry(
        "meaningful_perturbation",
        "the smallest smooth mask whose blurring destroys the score",
        paper="Fong and Vedaldi 2017",
        needs=("gradients",),
        cost="337 forwards, 300 backwards",
        quick={"steps": 3, "cells": 6, "smooth": 1.0},
    ),
    "layer_perturbation": Entry(
        "sightline.methods._meaningful_perturbation:layer_perturbation",
        "the smallest mask on a layer that destroys the score",
        paper="Fong and Vedaldi 2017, supplement",
        needs=("layer", "gradients"),
        cost="337 forwards, 300 backwards from the layer on",
        quick={"steps": 3},
    ),
    "extremal_perturbation": _entry(
        "extremal_perturbation",
        "the mask of a given area that preserves the score most",
        paper="Fong et al. 2019",
        needs=("gradients",),
        cost="800 forwards, 800 backwards an area",
        quick={"steps": 3, "areas": (0.1, 0.3), "step": 32},
    ),
    "occlusion": _entry(
        "occlusion",
        "what the score loses behind a sliding patch",
        paper="Zeiler and Fergus 2014",
        cost="784 forwards",
        signed=True,
        quick={"grid": 5, "size": 60.0},
    ),
    "variable_occlusion": _entry(
        "variable_occlusion",
        "the smallest of the discs that hide the score best",
        paper="Fong and Vedaldi 2017, supplement",
        cost="784 forwards",
        quick={"discs": 100},
    ),
    "rise": _entry(
        "rise",
        "random masks weighted by the score behind them",
        paper="Petsiuk et al. 2018",
        cost="6000 forwards",
        quick={"samples": 20, "p": 0.5},
    ),
    "lime": _entry(
        "lime",
        "a linear model of the score on superpixels",
        paper="Ribeiro et al. 2016",
        needs=("captum",),
        cost="1000 forwards",
        signed=True,
        quick={"samples": 30},
    ),
    "gradient_shap": _entry(
        "gradient_shap",
        "expected gradients times the difference to random baselines",
        paper="Lundberg and Lee 2017",
        needs=("gradients", "captum"),
        cost="20 forwards, 20 backwards",
        signed=True,
        quick={"samples": 4},
    ),
    "raw_attention": _entry(
        "raw_attention",
        "the class token's attention in the last block",
        paper="Dosovitskiy et al. 2021",
        needs=("attention",),
        cost="1 forward",
        class_specific=False,
    ),
    "rollout": _entry(
        "rollout",
        "attention multiplied through the blocks",
        paper="Abnar and Zuidema 2020",
        needs=("attention",),
        cost="1 forward",
        class_specific=False,
    ),
    "transformer_attribution": _entry(
        "transformer_attribution",
        "gradient times relevance of the attention, rolled out",
        paper="Chefer et al. 2021a",
        needs=("attention", "gradients"),
        cost="1 forward, 2 backwards",
    ),
    "generic_attention": _entry(
        "generic_attention",
        "gradient times attention, rolled out",
        paper="Chefer et al. 2021b",
        needs=("attention", "gradients"),
        cost="1 forward, 1 backward",
    ),
    "calm_attribution": _calm(
        "calm_attribution", "how probable it is that the image shows the class and its cue lies here"
    ),
    "calm_saliency": _calm(
        "calm_saliency", "how probable it is that the cue lies here, whatever the class", class_specific=False
    ),
    "calm_class_given_location": _calm(
        "calm_class_given_location", "how probable the class is, should the cue lie here"
    ),
    "calm_location_given_class": _calm(
        "calm_location_given_class", "how probable it is that the cue lies here, should the image show the class"
    ),
    "casm": Entry(
        "sightline.explainers._saved:casm",
        "all that any classifier could use, by a network that learned to hide it from many",
        "Zolna et al. 2020",
        cost="1 forward of its own network",
        class_specific=False,
    ),
    "segmenter": Entry(
        "sightline.explainers._saved:segmenter",
        "how much more probable the class is than the background, by a network trained on masks or pseudo labels",
        "Ahn et al. 2019",
        needs=("segmenter",),
        cost="1 forward",
        signed=True,
    ),
    "fake_cam": _entry(
        "fake_cam",
        "control: everything but one pixel",
        paper="Poppi et al. 2021",
        class_specific=False,
        control=True,
    ),
    "center": _entry(
        "center",
        "control: a bell in the middle",
        class_specific=False,
        control=True,
    ),
    "random": _entry(
        "random",
        "control: noise",
        class_specific=False,
        control=True,
    ),
    "edge": _entry(
        "edge",
        "control: an edge detector",
        paper="Adebayo et al. 2018",
        class_specific=False,
        control=True,
    ),
}

_MORE: Mapping[str, str] = {
    "per_class": "sightline.methods._per_class:per_class",
    "smallest_disc": "sightline.methods._variable_occlusion:smallest_disc",
    "Discs": "sightline.methods._variable_occlusion:Discs",
    "LAYERS": "sightline.methods._meaningful_perturbation:LAYERS",
    "LOCALIZATION": "sightline.methods._meaningful_perturbation:LOCALIZATION",
    "POINTING": "sightline.methods._extremal_perturbation:POINTING",
}
"""What goes with the methods: points, distributions and the papers' settings."""

__all__ = ["COMBINATORS", "METHODS", "Combinator", "Entry", *_MORE, *METHODS, *COMBINATORS]


def __getattr__(name: str) -> Any:
    if name in METHODS:
        return METHODS[name].method
    if name in COMBINATORS:
        return COMBINATORS[name].combinator
    if name in _MORE:
        return load(_MORE[name])
    raise AttributeError(f"module 'sightline.methods' has no attribute {name!r}")
