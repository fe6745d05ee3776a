"""Any network: the layer and the grid of sixty and more, and networks of other channels, outputs and precisions."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import sightline
from sightline.classifier import sigmoid, wrap
from sightline.data import Batch, Sample, collate
from sightline.evaluation import measure
from sightline.methods import METHODS
from sightline.metrics import METRICS

DOCS = Path(__file__).parents[1] / "docs"

if not (DOCS / "networks.py").exists():
    pytest.skip("docs are not in a source distribution", allow_module_level=True)

SMALL = {"hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 96}


@pytest.fixture(scope="module")
def networks():
    spec = importlib.util.spec_from_file_location("networks", DOCS / "networks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["networks"] = module
    spec.loader.exec_module(module)
    return module


CASES = [
    ("torchvision", "shufflenet_v2_x0_5", {}, 160, "conv5", "5 x 5 map", "any"),
    ("torchvision", "regnet_x_400mf", {}, 128, "trunk_output", "4 x 4 map", "any"),
    (
        "timm",
        "vit_tiny_patch16_224",
        {"depth": 2, "img_size": 80},
        None,
        "blocks.1.norm1",
        "5 x 5 tokens behind 1",
        "built for it",
    ),
    (
        "timm",
        "vit_tiny_patch16_224",
        {"depth": 2, "dynamic_img_size": True, "img_size": 80},
        None,
        "blocks.1.norm1",
        "5 x 5 tokens behind 1",
        "any",
    ),
    (
        "timm",
        "deit_tiny_distilled_patch16_224",
        {"depth": 2, "img_size": 80},
        None,
        "blocks.1.norm1",
        "5 x 5 tokens behind 2",
        "built for it",
    ),
    ("timm", "mobilenetv4_conv_small_035", {}, 160, "blocks", "5 x 5 map", "any"),
    ("timm", "resmlp_12_224", {"img_size": 80}, None, "norm", "5 x 5 tokens", "built for it"),
    ("timm", "levit_128s", {"img_size": 224}, None, "stages", "4 x 4 tokens", "built for it"),
    ("timm", "xcit_nano_12_p16_224", {"depth": 2}, 80, "cls_attn_blocks.1.norm1", "5 x 5 tokens behind 1", "any"),
    (
        "transformers",
        "ViT",
        {**SMALL, "num_hidden_layers": 2, "image_size": 80},
        None,
        "vit.layers.1.layernorm_before",
        "5 x 5 tokens behind 1",
        "built for it",
    ),
    (
        "transformers",
        "Dinov2WithRegisters",
        {"hidden_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 70, "patch_size": 14},
        None,
        "dinov2_with_registers.layernorm",
        "5 x 5 tokens behind 5",
        "any",
    ),
    (
        "transformers",
        "Swin",
        {"embed_dim": 24, "depths": [1, 1, 1, 1], "image_size": 160, "window_size": 5},
        None,
        "swin.layernorm",
        "5 x 5 tokens",
        "any",
    ),
    (
        "transformers",
        "ResNet",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
        160,
        "resnet.encoder.stages.3",
        "5 x 5 map",
        "any",
    ),
    (
        "transformers",
        "ConvNext",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
        160,
        "convnext.encoder.stages.3",
        "5 x 5 map",
        "any",
    ),
]


@pytest.mark.parametrize(
    ("library", "name", "settings", "size", "layer", "grid", "oblong"), CASES, ids=lambda v: str(v)[:24]
)
def test_the_layer_and_the_grid_are_found(library, name, settings, size, layer, grid, oblong, networks):
    pytest.importorskip(library)
    found = networks.outcome(networks.Network(library, name, settings, size))
    assert (found.error, found.layer, found.grid) == ("", layer, grid)
    assert (found.local, found.varies, found.oblong) == (True, True, oblong)


def test_a_wrong_grid_is_not_local(networks):
    network = networks.Network("torchvision", "shufflenet_v2_x0_5", {}, 160)
    classifier = networks.built(network)
    networks.damped(classifier.model)
    assert networks.is_local(classifier)
    for wrong in (
        lambda output, x: output.transpose(2, 3),
        lambda output, x: output.flip(3),
        lambda output, x: output.roll(2, 2),
    ):
        assert not networks.is_local(replace(classifier, to_grid=wrong))


def test_the_page_lists_sixty_networks_and_nearly_all_work(networks):
    text = (DOCS / "networks.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| t")]
    listed = [(row[0].removeprefix("| "), row[1].strip("`")) for row in rows]
    assert listed == [(one.library, one.name) for one in networks.NETWORKS], "run docs/networks.py"
    assert len({*listed}) == len(listed) >= 60
    working = sum(row[-2:] == ["yes", "yes |"] for row in rows)
    assert working >= 0.95 * len(listed)
    assert f"{len(listed)} networks" in text
    assert f"{working} work ({working / len(listed):.0%})" in text


def test_the_page_says_yes_no_and_why_not(networks):
    good = networks.Network("timm", "one")
    outcomes = [
        networks.Outcome(good, "norm", "2 x 2 map", "any", True, True),
        networks.Outcome(good, "norm", "2 x 2 map", "no", False, True),
        networks.Outcome(good, error="it cannot"),
    ]
    text = networks.page(outcomes)
    assert "3 networks" in text
    assert "1 work (33%)" in text
    assert "| timm | `one` | `norm` | 2 x 2 map | any | yes | yes |" in text
    assert "| timm | `one` | `norm` | 2 x 2 map | no | no | yes |" in text
    assert "| timm | `one` | it cannot | | | | |" in text


# other channels, outputs and precisions ------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution network of so many channels and outputs."""

    def __init__(self, channels=3, outputs=4):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def made(kind, seeded):
    """Return a classifier of that kind."""
    model = seeded(Net, **KINDS[kind][0], dtype=KINDS[kind][1])
    classifier = wrap(model, normalization=((0.4,), (0.3,)), size=(24, 32))
    return replace(classifier, score=sigmoid) if kind == "multi-label" else classifier


KINDS = {
    "gray": ({"channels": 1}, torch.float32),
    "one logit": ({"outputs": 1}, torch.float32),
    "multi-label": ({"outputs": 6}, torch.float32),
    "float64": ({}, torch.float64),
    "bfloat16": ({}, torch.bfloat16),
    "gray, one logit, bfloat16": ({"channels": 1, "outputs": 1}, torch.bfloat16),
}


@pytest.mark.parametrize("method", ["grad_cam", "gradient", "opti_cam", "integrated_gradients", "rise"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_is_explained(kind, method, seeded):
    classifier = made(kind, seeded)
    settings = {"opti_cam": {"steps": 3}, "integrated_gradients": {"steps": 4}, "rise": {"samples": 8}}.get(method, {})
    x = torch.rand(2, classifier.channels, 24, 32, generator=torch.Generator().manual_seed(0))
    told = sightline.explain(classifier, x, target=1, method=method, **settings)
    assert told.saliency.shape == (2, 1, 24, 32)
    assert told.saliency.isfinite().all()
    assert told.labels.tolist() == [1, 1]
    assert all(problem is None for problem in told.problems)
    probability = classifier(x).double().softmax(1)[:, 1]
    assert told.scores.tolist() == pytest.approx(probability.tolist())
    assert told.picture(0).size == (32, 24)
    assert classifier(x).dtype == KINDS[kind][1]


def batch(classifier):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(classifier.channels, 24, 32, generator=generator) for _ in range(2)]
    return collate([Sample(f"s{n}", image, n % 2) for n, image in enumerate(images)])


@pytest.mark.parametrize("metric", ["insertion", "average_drop"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_is_judged(kind, metric, seeded):
    classifier = made(kind, seeded)
    found = batch(classifier)
    assert isinstance(found, Batch)
    scores = measure(METHODS["grad_cam"], classifier, [found], {metric: METRICS[metric]()})
    assert len(scores.scores) >= 1
    assert all(0 <= float(score.value) <= 100 for score in scores.scores)


def test_a_gray_network_explains_a_color_picture(seeded):
    from PIL import Image

    told = sightline.explain(made("gray", seeded), Image.new("RGB", (40, 30), (200, 30, 90)))
    assert told.images.shape == (1, 1, 24, 32)
    luma = (0.299 * 200 + 0.587 * 30 + 0.114 * 90) / 255
    assert told.images.mean().item() == pytest.approx(luma, abs=2e-3)


def test_a_gray_network_of_timm_asks_for_its_normalization():
    pytest.importorskip("timm")
    from sightline import models

    with pytest.raises(ValueError, match="expected a mean and a positive std of 1 channels"):
        models.load("timm:test_resnet?weights=none&in_chans=1")
    loaded = models.load("timm:test_resnet?weights=none&in_chans=1&num_classes=2&normalization=[[0.5],[0.5]]")
    assert loaded.channels == 1
    assert loaded(torch.rand(1, 1, *loaded.size)).shape == (1, 2)


def test_the_image_shape_of_the_error_is_clear():
    with pytest.raises(ValueError, match=r"expected images of shape \(b, 1, h, w\), got \(1, 3, 24, 32\)"):
        wrap(Net(1), normalization="none", size=(24, 32))(torch.rand(1, 3, 24, 32))


# Hugging Face --------------------------------------------------------------------------------------------------------


def small_vit(**settings):
    library = pytest.importorskip("transformers")
    config = library.ViTConfig(**SMALL, num_hidden_layers=1, image_size=32, patch_size=8, **settings)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return library.ViTForImageClassification(config).eval()


def test_names_of_classes_come_from_the_configuration_but_not_numbers_of_labels():
    named = wrap(small_vit(id2label={0: "cat", 1: "dog"}), normalization="none")
    assert (named.classes, named.size) == (("cat", "dog"), (32, 32))
    assert wrap(small_vit(num_labels=3), normalization="none").classes == ()
    assert wrap(small_vit(num_labels=2), normalization="none", classes=["a", "b"]).classes == ("a", "b")
    told = sightline.explain(named, torch.rand(1, 3, 32, 32), target="dog")
    assert told.label() == "dog"


def test_a_network_without_a_head_is_an_error_that_says_so():
    library = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"without logits: it has no classification head; build it with one"):
        wrap(library.ViTModel(small_vit().config), normalization="none")
    with pytest.raises(ValueError, match="ViTForImageClassification has no classification head"):
        wrap(small_vit(num_labels=0), normalization="none")


def test_a_size_that_hugging_face_refuses_is_our_error():
    with pytest.raises(ValueError, match=r"ViTForImageClassification cannot run on 32 x 48 images: .*; pass size="):
        wrap(small_vit(), normalization="none", size=(32, 48))
    with pytest.raises(ValueError, match=r"how does ViTFor.* processor's \(image_mean, image_std\)$"):
        wrap(small_vit())
