"""The sweep: every method on networks of six kinds, with the arguments for smoke runs."""

from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

from sightline.classifier import UnsuitedError, wrap
from sightline.methods import COMBINATORS, METHODS
from sightline.models import MiniResNet, MiniVGG, MiniViT

SIDE = 64


def swin():
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=SIDE, window_size=4, embed_dim=24, num_classes=7)


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=SIDE, embed_dim=48, depth=3, num_classes=7)


NETWORKS = {
    "mini_resnet": lambda: MiniResNet(7, widths=(8, 8, 16, 24)),
    "mini_vgg": lambda: MiniVGG(7, widths=(8, 8, 16, 24, 32)),
    "mini_vit": lambda: MiniViT(7, dim=48, depth=3),
    "torchvision_resnet": lambda: torchvision.models.resnet18(num_classes=7),
    "timm_vit": vit,
    "timm_swin": swin,
}

LAYERS = {"torchvision_resnet": "layer2", "timm_swin": "layers.2"}
"""Network -> another layer than the last one, which has 2 x 2 cells only."""

LACKS = {
    "mini_resnet": {"CALM", "segmenter", "attention"},
    "mini_vgg": {"CALM", "segmenter", "attention", "linear head"},
    "mini_vit": {"CALM", "segmenter", "ReLU", "plain CNN", "convolutions", "linear head"},
    "torchvision_resnet": {"CALM", "segmenter", "attention", "linear head"},
    "timm_vit": {"CALM", "segmenter", "ReLU", "plain CNN", "convolutions", "linear head"},
    "timm_swin": {"CALM", "segmenter", "attention", "ReLU", "plain CNN", "convolutions", "linear head"},
}
"""Network -> what it does not offer, in the words of `Entry.needs`."""


def trained(model):
    """Give layer norms and the head weights that differ as those of trained networks do."""
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(head.weight, std=2 / head.in_features**0.5)


@pytest.fixture(scope="module")
def classifiers():
    made = {}
    with torch.random.fork_rng([]):
        for seed, (name, build) in enumerate(NETWORKS.items()):
            torch.manual_seed(seed)
            model = build().eval()
            trained(model)
            made[name] = wrap(model, normalization="imagenet", size=SIDE, layer=LAYERS.get(name))
    return made


@pytest.fixture(scope="module")
def images():
    coarse = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_every_network(name, network, classifiers, images):
    entry, classifier = METHODS[name], classifiers[network]
    method = partial(entry.method, **entry.quick)
    if LACKS[network] & {*entry.needs}:
        with pytest.raises(UnsuitedError) as caught:
            method(classifier, images)
        assert any(other in str(caught.value) for other in METHODS if other != name)
        return
    first, second = classifier(images).topk(2).indices.unbind(1)
    maps = [method(classifier, images, y) for y in (first, second)]
    for saliency in maps:
        assert saliency.shape[:2] == (2, 1)
        assert saliency.isfinite().all()
        assert all(one.max() > one.min() for one in saliency)
    if entry.class_specific:
        assert not torch.allclose(*maps, rtol=1e-4, atol=1e-7 * float(maps[0].abs().max()))
    else:
        assert torch.equal(*maps)


@pytest.mark.parametrize("network", ["mini_resnet", "mini_vit"])
@pytest.mark.parametrize("name", COMBINATORS)
def test_every_combinator(name, network, classifiers, images):
    entry, classifier = COMBINATORS[name], classifiers[network]
    methods = ["gradient"] if entry.takes == "one" else ["gradient", "edge"]
    by = {"by": "grad_cam"} if name.startswith("disc") and network == "mini_vit" else {}  # cam needs a linear head
    saliency = entry.combinator(*methods, **entry.quick, **by)(classifier, images, torch.tensor([0, 2]))
    assert saliency.shape[:2] == (2, 1)
    assert saliency.isfinite().all()
    assert all(one.max() > one.min() for one in saliency)
