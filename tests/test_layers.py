import copy
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import Permute, SqueezeExcitation

from sightline.classifier import wrap
from sightline.layers import Tokens, Unpatched, alike, channels_first, channels_last, passive, tokens
from sightline.models import MiniResNet, MiniVGG, MiniViT

CLASSES = 7
zoo = torchvision.models


def local(model):
    """Let each cell see mostly its own patch: the middle of each kernel counts most, gates pass everything alike.

    Layers, strides and grids stay; only weights change, so that few images show where a cell looks.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.stride != module.kernel_size:
            taps = torch.full(module.kernel_size, 0.3)
            taps[module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 1
            module.weight.data *= taps
        if isinstance(module, SqueezeExcitation):
            module.fc2.weight.data.zero_()
    return model


NETWORKS = {
    "resnet18": (lambda: zoo.resnet18(num_classes=CLASSES), "layer4", (128, 224), 32),
    "resnet50": (lambda: zoo.resnet50(num_classes=CLASSES), "layer4", (128, 224), 32),
    "vgg16_bn": (lambda: zoo.vgg16_bn(num_classes=CLASSES, init_weights=False), "features.42", (64, 112), 16),
    "densenet121": (lambda: zoo.densenet121(num_classes=CLASSES), "features", (128, 224), 32),
    "mobilenet_v3_small": (lambda: zoo.mobilenet_v3_small(num_classes=CLASSES), "features", (128, 224), 32),
    "efficientnet_b0": (lambda: zoo.efficientnet_b0(num_classes=CLASSES), "features", (128, 224), 32),
    "convnext_tiny": (lambda: zoo.convnext_tiny(num_classes=CLASSES), "features", (128, 224), 32),
    "vit_b_16": (
        lambda: zoo.vit_b_16(num_classes=CLASSES, image_size=96),
        "encoder.layers.encoder_layer_11.ln_1",
        (96, 96),
        16,
    ),
    "swin_t": (lambda: zoo.swin_t(num_classes=CLASSES), "permute", (128, 224), 32),
    "MiniResNet": (lambda: MiniResNet(CLASSES), "layer4", (64, 112), 16),
    "MiniResNet, last stride 1": (lambda: MiniResNet(CLASSES, last_stride=1), "layer4", (32, 56), 8),
    "MiniVGG": (lambda: MiniVGG(CLASSES), "features.33", (64, 112), 16),
    "MiniViT": (lambda: MiniViT(CLASSES), "blocks.5.norm1", (32, 56), 8),
}


def changes(classifier, x, row, column, patch):
    """Return, cell by cell, how much the features change when a square of the image does.

    Its side is one and a half cells: it holds the middle of two by two cells, wherever in a cell the strides put it.
    """
    rows, columns = (slice(first * patch, first * patch + 3 * patch // 2) for first in (row, column))
    changed = x.clone()
    changed[:, :, rows, columns] = 1 - changed[:, :, rows, columns]
    return (classifier.features(changed) - classifier.features(x)).abs().sum((0, 1))


def assert_grid_is_right(classifier, patch):
    """Change one patch of the image: the cells that change most lie there; in three corners, so that no transposed,
    scrambled or shifted grid passes."""
    h, w = classifier.size
    x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(5))
    i, j = classifier.features(x).shape[2:]
    assert (i, j) == (h // patch, w // patch)
    for row, column in ((0, j - 2), (i - 2, 0), (i // 2, j // 3)):
        change = changes(classifier, x, row, column, patch)
        inside = torch.zeros(i, j, dtype=torch.bool)
        inside[row : row + 2, column : column + 2] = True
        assert inside.flatten()[change.argmax()], (row, column, change)
        assert change[inside].mean() > 1.2 * change[~inside].mean()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_layer_on_the_image_is_found_and_its_grid_is_right(name, seeded):
    make, layer, size, patch = NETWORKS[name]
    model = seeded(lambda: local(make()), seed=1, dtype=torch.float32)
    classifier = wrap(model, normalization="imagenet", size=None if size[0] == size[1] else size)
    assert classifier.layer == layer
    assert classifier.size == size
    assert classifier(torch.zeros(1, 3, *size)).shape == (1, CLASSES)
    assert_grid_is_right(classifier, patch)


def timm_model(name, **settings):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(name, num_classes=CLASSES, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "layer", "prefix"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2}, "blocks.1.norm1", 2),
        ("vit_tiny_patch16_224", {"img_size": (64, 96), "depth": 2}, "blocks.1.norm1", 1),
        ("vit_small_patch14_reg4_dinov2", {"img_size": (56, 84), "depth": 2}, "blocks.1.norm1", 5),
    ],
)
def test_tokens_before_the_patches_are_dropped(name, settings, layer, prefix, seeded):
    model = seeded(lambda: timm_model(name, **settings))
    classifier = wrap(model, size=settings["img_size"])
    assert classifier.mean == pytest.approx(model.pretrained_cfg["mean"])
    assert (classifier.layer, classifier.to_grid.prefix) == (layer, prefix)
    assert_grid_is_right(classifier, classifier.to_grid.patch[0])


def test_swin_of_timm_has_its_channels_last(seeded):
    model = seeded(
        lambda: timm_model("swin_tiny_patch4_window7_224", img_size=(64, 96), depths=(1, 1, 1, 1), window_size=2)
    )
    classifier = wrap(model, size=(64, 96))
    assert classifier.to_grid is channels_last
    assert_grid_is_right(classifier, 32)


def test_tokens_and_their_grid_are_a_round_trip():
    x = torch.zeros(2, 3, 24, 40)
    grid = torch.rand(2, 6, 3, 5)
    others = torch.rand(2, 4, 6)
    output = torch.stack(
        [torch.cat([others[b], torch.stack([grid[b, :, i, j] for i in range(3) for j in range(5)])]) for b in range(2)]
    )
    assert torch.equal(Tokens(4, (8, 8))(output, x), grid)


@pytest.mark.parametrize(("size", "cells"), [((24, 40), (3, 5)), ((20, 33), (3, 5)), ((17, 34), (3, 5))])
def test_a_patch_that_the_image_fills_in_part_counts_where_it_is_padded(size, cells):
    x, (i, j) = torch.zeros(1, 3, *size), cells
    found = tokens(i * j, x, [(8, 8)])
    assert found.cells(x) == cells
    assert found.padded == (size != (24, 40))
    output = torch.arange(float(i * j)).view(1, i * j, 1)
    assert torch.equal(found(output, x)[0, 0], output.view(i, j))


def test_as_few_tokens_as_possible_lie_before_the_patches():
    x = torch.zeros(1, 3, 64, 96)
    assert tokens(6, x, [(8, 8)]) == Tokens(0, (32, 32))
    assert tokens(24, x, [(8, 8)]) == Tokens(0, (16, 16))
    assert tokens(27, x, [(8, 8)]) == Tokens(3, (16, 16))
    assert tokens(8 * 12 + 17, x, [(8, 8)]) is None
    assert tokens(3 * 3 + 4, torch.zeros(1, 3, 50, 50), [(16, 16)]) == Tokens(4, (16, 16))
    assert tokens(4 * 4 + 1, torch.zeros(1, 3, 50, 50), [(16, 16)]) == Tokens(1, (16, 16), padded=True)


@pytest.mark.parametrize(
    ("size", "prefix", "cells"),
    [((64, 64), 0, (4, 4)), ((64, 96), 1, (6, 9)), ((96, 64), 2, (9, 6)), ((40, 90), 0, (3, 7))],
)
def test_tokens_of_no_known_patch_have_the_shape_of_the_image(size, prefix, cells):
    i, j = cells
    output = torch.rand(2, prefix + i * j, 5)
    grid = Unpatched(prefix)(output, torch.zeros(2, 3, *size))
    assert grid.shape == (2, 5, i, j)
    assert torch.equal(grid[1, :, 1, 2], output[1, prefix + j + 2])


class Merged(nn.Module):
    """Overlapping convolutions, then tokens, halved twice without any convolution: no stride says the patch."""

    def __init__(self, named):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 7, 4, 3)
        self.proj = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12) if named else nn.Identity()
        self.affine = nn.Linear(12, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        t = self.proj(self.stem(x)[:, :, ::4, ::4].flatten(2).transpose(1, 2))
        return self.head(self.affine(self.norm(t)).mean(1))


@pytest.mark.parametrize(("named", "layer"), [(True, "norm"), (False, "affine")])
def test_tokens_without_patches_are_found_and_the_last_norm_where_there_is_one(named, layer, seeded):
    found = wrap(seeded(Merged, named), normalization="none", size=(80, 112))
    assert (found.layer, found.to_grid) == (layer, Unpatched(0))
    assert found.features(torch.rand(1, 3, 80, 112)).shape == (1, 12, 5, 7)


class Several(nn.Module):
    """Its trunk gives the map and the pooled features: the head reads the second alone."""

    def __init__(self):
        super().__init__()
        self.trunk = Both()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.trunk(x)["pooled"])


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, 4)

    def forward(self, x):
        last = self.conv(x)
        return {"last": last, "pooled": last.mean((2, 3))}


def test_a_module_that_gives_several_tensors_is_not_taken_where_another_gives_the_map_alone(seeded):
    found = wrap(seeded(Several), normalization="none", size=32)
    assert found.layer == "trunk.conv"
    assert found.features_and_gradient(torch.rand(1, 3, 32, 32), None)[1].any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, True) for name in ("MaxPool2d", "AdaptiveAvgPool2d", "AvgPool2dSame", "Pooling", "GlobalPool")),
        *((name, True) for name in ("Dropout2d", "Softmax", "Flatten", "LPPool2d")),
        *((name, False) for name in ("PoolFormerGroupNorm", "PoolFormerLayer", "Conv2d", "PoolingVisionTransformer")),
    ],
)
def test_what_only_pools_is_told_by_how_its_name_ends(name, expected):
    assert passive(type(name, (nn.Module,), {})()) is expected


def test_channels_first_and_last():
    x, output = torch.zeros(1, 3, 8, 12), torch.rand(1, 2, 3, 5)
    assert torch.equal(channels_first(output, x), output)
    assert channels_last(output, x)[0, 4, 1, 2] == output[0, 1, 2, 4]


@pytest.mark.parametrize(
    ("cells", "size", "expected"),
    [((7, 7), (224, 224), True), ((6, 10), (96, 160), True), ((10, 6), (96, 160), False), ((3, 4), (75, 100), True)],
)
def test_a_grid_has_the_shape_of_the_image(cells, size, expected):
    assert alike(*cells, torch.zeros(1, 3, *size)) is expected
    assert not alike(size[0] + 1, size[1] + 1, torch.zeros(1, 3, *size))


def test_a_layer_may_be_a_module_or_a_dotted_name(pooled, x):
    stem = pooled.model.stem
    for given, name in (("stem.2", "stem.2"), (stem[2], "stem.2"), ("stem", "stem"), (stem, "stem")):
        found = wrap(pooled.model, layer=given, normalization="none", size=(24, 32))
        assert found.layer == pooled.at(given).layer == name
        assert torch.equal(found.features(x), stem(x))
        assert torch.equal(pooled.at(given).features(x), stem(pooled.normalize(x)))
    assert pooled.layer == "last"


def test_a_layer_with_two_names_is_found_by_either(pooled, x):
    pooled.model.alias = pooled.model.stem
    assert pooled.at("alias").layer == "stem"
    assert torch.equal(pooled.at("alias").features(x), pooled.at("stem").features(x))


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (
            "pool",
            ValueError,
            r"layer 'pool' gives one cell, shape \(2, 6, 1, 1\): it lies behind the pooling; use 'last'",
        ),
        ("head", ValueError, r"layer 'head' gives shape \(2, 5\), which is no map of more than one cell; use 'last'"),
        ("unused", ValueError, "layer 'unused' did not run in the forward pass; use 'last'"),
        ("stemm", LookupError, "no layer called 'stemm'; did you mean stem"),
    ],
)
def test_an_unusable_layer_is_an_error_that_names_a_better_one(layer, error, message, pooled):
    pooled.model.unused = nn.Conv2d(3, 3, 1)
    for choose in (
        lambda: wrap(pooled.model, layer=layer, normalization="none", size=(24, 32)),
        lambda: pooled.at(layer),
    ):
        with pytest.raises(error, match=message):
            choose()


def test_the_last_call_of_a_layer_says_where_it_lies(pooled):
    """A ReLU that runs on the map and once more behind the pooling."""
    pooled.model.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), pooled.model.stem[2])
    with pytest.raises(ValueError, match=r"'stem\.2' gives shape \(2, 6\), which is no map of more than one cell"):
        pooled.at("stem.2")


def test_a_layer_whose_cells_reach_no_logit_is_an_error(seeded, networks):
    model = seeded(networks.tokens, seed=3)
    with pytest.raises(ValueError, match="'norm' gets no gradient: its cells do not reach the logits; use 'norm1'"):
        wrap(model, layer="norm", normalization="none", size=(24, 32))
    vit = seeded(lambda: zoo.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=CLASSES))
    with pytest.raises(ValueError, match=r"'encoder' gets no gradient: .*'encoder\.layers\.encoder_layer_1\.ln_1'"):
        wrap(vit, layer="encoder", normalization="none")


def test_a_module_of_another_network_is_an_error(pooled):
    with pytest.raises(LookupError, match="the layer Sequential is not inside Pooled"):
        pooled.at(copy.deepcopy(pooled.model).stem)


def test_a_network_without_a_map_is_an_error():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    with pytest.raises(ValueError, match="Sequential has no layer whose output lies on the image"):
        wrap(model, normalization="none", size=8)


def test_a_zero_head_hides_no_layer(seeded, networks):
    model = seeded(networks.pooled, seed=1)
    nn.init.zeros_(model.head.weight)
    assert wrap(model, normalization="none", size=(24, 32)).layer == "last"


def test_a_pool_that_ends_the_features_is_passed_over(seeded):
    model = seeded(MiniVGG, CLASSES, widths=(4, 4, 4, 4, 4))
    found = wrap(model, normalization="none", size=(64, 96))
    assert found.layer == "features.33"
    assert found.features(torch.rand(1, 3, 64, 96)).shape == (1, 4, 4, 6)
    assert found.at("features").features(torch.rand(1, 3, 64, 96)).shape == (1, 4, 2, 3)


def test_a_layer_of_one_cell_is_passed_over(seeded):
    model = seeded(MiniResNet, CLASSES, widths=(4, 4, 4, 4))
    assert wrap(model, normalization="none", size=16).layer == "layer3"
    assert wrap(model, normalization="none", size=32).layer == "layer4"


class ChannelsLast(nn.Module):
    """Ends with its channels last, as many as the map has columns."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.permute = Permute([0, 2, 3, 1])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.permute(self.conv(x))).mean((1, 2)))


def test_a_layer_norm_says_where_the_channels_are(seeded):
    classifier = wrap(seeded(ChannelsLast), normalization="none", size=32)
    assert classifier.layer == "norm"
    assert classifier.to_grid is channels_last


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_wrapping_works_in_every_gradient_mode_and_leaves_no_trace(mode, pooled, trace, plain):
    pooled.model.requires_grad_(True).train()
    changed = trace(pooled.model)
    with mode():
        assert wrap(pooled.model, normalization="none", size=(24, 32)).layer == "last"
        assert pooled.at("stem").layer == "stem"
        with pytest.raises(ValueError, match="use 'last'"):
            pooled.at("pool")
    assert changed() == []


def test_the_grid_follows_the_size_of_the_image(tokens):
    for h, w in ((24, 32), (32, 24), (16, 64)):
        assert tokens.features(torch.rand(2, 3, h, w)).shape == (2, 12, h // 8, w // 8)


def test_another_grid_can_be_given_by_hand(pooled, x):
    mirrored = replace(pooled, to_grid=lambda output, x: output.flip(3))
    assert torch.equal(mirrored.features(x), pooled.features(x).flip(3))
