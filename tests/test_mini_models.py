import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from sightline import models
from sightline.classifier import Classifier
from sightline.hooks import capture
from sightline.models import MODELS, MiniResNet, MiniVGG, MiniViT
from sightline.runs import Choice


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def taps(model, x):
    with torch.no_grad(), capture(model.eval(), list(model.taps)) as found:
        logits = model(x)
    return logits, found


@pytest.fixture
def x():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_mini_resnet_taps_are_positive_maps_at_the_stated_strides(x):
    logits, found = taps(MiniResNet(7), x)
    assert logits.shape == (2, 7)
    shapes = [(32, 32, 48), (32, 32, 48), (64, 16, 24), (128, 8, 12), (256, 4, 6)]
    assert [tuple(found[name].shape[1:]) for name in MiniResNet.taps] == shapes
    for name in MiniResNet.taps:
        assert float(found[name].min()) == 0
        assert float(found[name].max()) > 0


def test_mini_resnet_has_the_stated_size():
    convolutions = 3 * 32 * 9
    for a, b in ((32, 32), (32, 64), (64, 128), (128, 256)):
        convolutions += 9 * a * a + 9 * a * b + (a * b if a != b else 0)
    norms = 2 * (32 + (32 + 32) + (32 + 2 * 64) + (64 + 2 * 128) + (128 + 2 * 256))
    assert count(MiniResNet()) == convolutions + norms + 256 * 20 + 20 == 650_484
    halves = {name: value.contiguous() for name, value in MiniResNet().half().state_dict().items()}
    assert 1.2e6 < len(safetensors.torch.save(halves)) < 1.4e6


def test_the_last_stride_doubles_the_last_map_only(x):
    torch.manual_seed(0)
    narrow = MiniResNet()
    wide = MiniResNet(last_stride=1)
    wide.load_state_dict(narrow.state_dict())
    _, coarse = taps(narrow, x)
    _, fine = taps(wide, x)
    assert fine["layer4"].shape[2:] == (8, 12)
    assert all(torch.equal(fine[name], coarse[name]) for name in MiniResNet.taps[:-1])


def test_both_heads_are_one_function(x):
    linear, convolution = MiniResNet(5), MiniResNet(5, head="conv")
    state = linear.state_dict()
    state["head.weight"] = state["head.weight"][:, :, None, None]
    convolution.load_state_dict(state)
    assert torch.allclose(linear.eval()(x), convolution.eval()(x), atol=1e-6)
    _, found = taps(convolution, x)
    maps = convolution.head(found["layer4"])
    assert maps.shape == (2, 5, 4, 6)
    assert torch.allclose(maps.mean((2, 3)), convolution(x), atol=1e-6)


def test_wrong_parts_of_the_small_networks():
    with pytest.raises(ValueError, match="expected last_stride 1 or 2, got 4"):
        MiniResNet(last_stride=4)
    with pytest.raises(ValueError, match="expected head 'linear', 'conv' or 'flat', got 'calm'"):
        models.load("mini_resnet?head=calm")
    with pytest.raises(ValueError, match=r"four widths, one a stage, got \(8, 8\)"):
        MiniResNet(widths=(8, 8))
    with pytest.raises(ValueError, match=r"five widths, one a block, got \(8, 8\)"):
        MiniVGG(widths=(8, 8))
    with pytest.raises(ValueError, match="width that 3 heads divide, got 64"):
        MiniViT(dim=64)


def test_mini_vgg_taps_lie_before_the_pools(x):
    model = MiniVGG(4)
    logits, found = taps(model, x)
    assert logits.shape == (2, 4)
    assert [tuple(found[name].shape[2:]) for name in model.taps] == [(64, 96), (32, 48), (16, 24), (8, 12), (4, 6)]
    assert all(isinstance(model.get_submodule(name), nn.ReLU) for name in model.taps)
    assert all(isinstance(model.features[index], nn.MaxPool2d) for index in range(6, 35, 7))
    assert len(model.features) == 35
    assert 1.1e6 < count(model) < 1.3e6


def slow_attention(module, x):
    """Attention with a loop over images, heads and tokens."""
    out = torch.empty_like(x)
    width = x.shape[2] // module.heads
    for n, tokens in enumerate(x):
        q, k, v = module.qkv(tokens).split(x.shape[2], dim=1)
        rows = []
        for head in range(module.heads):
            part = slice(head * width, (head + 1) * width)
            for token in range(len(tokens)):
                scores = torch.stack([(q[token, part] * key).sum() / width**0.5 for key in k[:, part]])
                weights = scores.exp() / scores.exp().sum()
                rows.append((weights[:, None] * v[:, part]).sum(0))
        heads = torch.stack(rows).view(module.heads, len(tokens), width)
        out[n] = module.project(heads.transpose(0, 1).reshape(len(tokens), -1))
    return out


def test_attention_is_the_formula_and_hooks_see_its_matrix():
    torch.manual_seed(0)
    module = MiniViT(dim=12).double().blocks[0].attention
    nn.init.normal_(module.qkv.weight)
    x = torch.randn(2, 5, 12, dtype=torch.double)
    with torch.no_grad(), capture(module, ["probabilities"]) as found:
        fast = module(x)
        assert torch.allclose(fast, slow_attention(module, x), atol=1e-12)
    assert found["probabilities"].shape == (2, 3, 5, 5)
    assert torch.allclose(found["probabilities"].sum(-1), torch.ones(2, 3, 5, dtype=torch.double))


def test_mini_vit_takes_other_and_oblong_sizes(x):
    model = MiniViT(9, depth=2)
    logits, found = taps(model, x)
    assert logits.shape == (2, 9)
    assert found["blocks.1.norm1"].shape == (2, 1 + 8 * 12, 192)
    with pytest.raises(ValueError, match=r"height and width divisible by 8, got \(64, 90\); resize"):
        model(x[..., :90])
    assert 2.6e6 < count(MiniViT()) < 2.8e6
    assert MiniViT().taps == tuple(f"blocks.{n}.norm1" for n in range(6))
    assert isinstance(model.patch_embed, nn.Conv2d)
    assert model.patch_embed.kernel_size == model.patch_embed.stride == (8, 8)


def test_patch_tokens_lie_row_by_row_with_their_positions(x):
    model = MiniViT(depth=1)
    square = x[..., :64]
    tokens = model.tokens(square)
    for row, column in ((0, 0), (2, 5), (7, 1)):
        patch = square[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        alone = model.patch_embed(patch)[:, :, 0, 0] + model.positions[:, :, row, column]
        assert torch.allclose(tokens[:, 1 + 8 * row + column], alone, atol=1e-5)
    assert torch.equal(tokens[:, :1], model.class_token.expand(2, 1, -1))
    ramp = torch.linspace(0, 1, 8).expand(8, 8)
    model.positions.data[:] = ramp
    model.patch_embed.weight.data.zero_()
    wide = model.tokens(x)[0, 1:, 0].view(8, 12)
    assert torch.allclose(wide[:, 0], wide[0, 0].expand(8))
    assert (wide.diff(dim=1) > 0).all()


@pytest.mark.parametrize("name", ["mini_resnet", "mini_vgg", "mini_vit"])
def test_the_seed_makes_the_network_and_nothing_else_changes(name):
    before = torch.get_rng_state()
    one, same, other = (models.load(f"{name}?classes=3&seed={seed}") for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(one.model.state_dict().values(), same.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(one(x), same(x))
    assert one(x).shape == (2, 3)
    assert not torch.allclose(one(x), other(x), atol=1e-3)
    assert one.size == (64, 64)
    assert one.layer == {"mini_resnet": "layer4", "mini_vgg": "features.33", "mini_vit": "blocks.5.norm1"}[name]


def test_a_name_with_settings_is_the_same_as_its_text():
    text = models.load("mini_resnet?classes=4&last_stride=1&channels=1&layer=layer3&size=32")
    table = models.load(
        Choice("mini_resnet?classes=4", {"last_stride": 1, "channels": 1, "layer": "layer3", "size": 32})
    )
    x = torch.rand(1, 1, 32, 32)
    for classifier in (text, table):
        assert (classifier.layer, classifier.channels, classifier.size) == ("layer3", 1, (32, 32))
        assert classifier(x).shape == (1, 4)
    assert torch.equal(text(x), table(x))


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("mini_resnt", LookupError, "no model called 'mini_resnt'; did you mean mini_resnet.*or torchvision:NAME"),
        ("mini_vgg?clases=3", LookupError, "mini_vgg: no setting called 'clases'; did you mean classes"),
        ("mini_resnet?layer=layr4", LookupError, "no layer called 'layr4'; did you mean layer4"),
        ("torchvision:resnet5", LookupError, "no torchvision model called 'resnet5'; did you mean resnet50"),
        ("torchvision:resnet18?weights=V3", LookupError, "no weights of resnet18 called 'V3'; known: DEFAULT"),
        ("nowhere.safetensors", FileNotFoundError, r"no file nowhere\.safetensors; give the path"),
        ("python:nowhere:net", LookupError, "cannot load 'nowhere:net': No module named 'nowhere'"),
        ("python:json:dumps?obj=1", TypeError, "gave str; expected a torch.nn.Module or a Classifier"),
    ],
)
def test_what_cannot_be_loaded_says_why(text, error, told):
    with pytest.raises(error, match=told):
        models.load(text)


def test_torchvision_without_weights_is_wrapped_as_imagenet():
    classifier = models.load("torchvision:resnet18?weights=none&num_classes=6&seed=2&size=64x96")
    assert classifier.mean == (0.485, 0.456, 0.406)
    assert (classifier.layer, classifier.size) == ("layer4", (64, 96))
    assert classifier(torch.rand(1, 3, 64, 96)).shape == (1, 6)
    again = models.load("torchvision:resnet18?weights=none&num_classes=6&seed=2&size=64")
    assert torch.equal(classifier.model.fc.weight, again.model.fc.weight)
    with pytest.raises(ValueError, match=r"expected size=224 or size=HEIGHTxWIDTH, got '64by96'"):
        models.load("torchvision:resnet18?weights=none&size=64by96")


def test_torchvision_weights_bring_their_recipe_and_names(monkeypatch):
    import torchvision

    built = []

    def build(name, *, weights, progress, **rest):
        built.append((name, weights))
        return torchvision.models.resnet18(weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", build)
    classifier = models.load("torchvision:resnet18?weights=IMAGENET1K_V1")
    assert built == [("resnet18", torchvision.models.ResNet18_Weights.IMAGENET1K_V1)]
    assert (classifier.std, classifier.size) == ((0.229, 0.224, 0.225), (224, 224))
    assert classifier.classes[0] == "tench"
    assert len(classifier.classes) == 1000


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise ConnectionRefusedError("no network here")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    told = (
        r"cannot download the weights of resnet18 \(no network here\); put resnet18-\w+\.pth into .*checkpoints, give "
    )
    with pytest.raises(ConnectionError, match=told + r".*torchvision:resnet18\?weights=none$") as caught:
        models.load("torchvision:resnet18")
    assert "\n" not in str(caught.value)


FACTORY = """
from torch import nn
from sightline.classifier import wrap

def net(width=4, classes=2):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), *head)

def ready():
    return wrap(net(), layer="1", normalization="none", size=32)

made = net(5)
"""


def test_a_network_of_ones_own_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "mine_for_a_test.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    path, state = list(sys.path), torch.get_rng_state()
    text = "python:mine_for_a_test:net?width=6&classes=3&normalization=imagenet&size=40x32&layer=0"
    classifier = models.load(text)
    assert sys.path == path
    assert torch.equal(torch.get_rng_state(), state)
    assert (classifier.layer, classifier.size, classifier.mean[0]) == ("0", (40, 32), 0.485)
    assert classifier(torch.rand(1, 3, 40, 32)).shape == (1, 3)
    assert torch.equal(classifier.model[0].weight, models.load(text).model[0].weight)
    assert models.load("python:mine_for_a_test:made?normalization=none").model[0].out_channels == 5
    assert models.load("python:mine_for_a_test:ready?layer=0").layer == "0"
    with pytest.raises(ValueError, match="gives a Classifier, which has its own normalization"):
        models.load("python:mine_for_a_test:ready?normalization=none")
    with pytest.raises(ValueError, match="how does Sequential want its images normalized"):
        models.load("python:mine_for_a_test:net")


@pytest.fixture
def saved(tmp_path):
    """A classifier with trained-looking buffers, and the path of its file."""
    classifier = models.load("mini_resnet?classes=3&seed=5&last_stride=1")
    for value in classifier.model.buffers():
        if value.is_floating_point():
            value.data += 0.1 * torch.rand(value.shape, generator=torch.Generator().manual_seed(1))
    classifier = replace(classifier, classes=("a", "b", "c"), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).at("layer3")
    choice = Choice("mini_resnet", {"classes": 3, "last_stride": 1})
    path = models.save(classifier, tmp_path / "net.safetensors", model=choice, extra={"accuracy": 0.9})
    return classifier, path


def test_saved_and_loaded_is_the_same_classifier(saved):
    classifier, path = saved
    loaded = models.load(str(path))
    assert isinstance(loaded, Classifier)
    for name in ("layer", "mean", "std", "size", "channels", "classes"):
        assert getattr(loaded, name) == getattr(classifier, name)
    assert loaded.model.state_dict().keys() == classifier.model.state_dict().keys()
    pairs = zip(loaded.model.state_dict().values(), classifier.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(x), classifier(x))
    assert loaded.features(x).shape == (2, 128, 8, 8)
    assert models.load(f"{path}?layer=layer4").layer == "layer4"
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["extra"] == {"accuracy": 0.9}
    assert manifest["provenance"]["versions"]["torch"]
    assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_half_the_bits_come_back_as_floats(saved, tmp_path):
    classifier, path = saved
    model = Choice("mini_resnet", {"classes": 3, "last_stride": 1})
    small = models.save(classifier, tmp_path / "half.safetensors", model=model, half=True)
    assert small.stat().st_size < 0.52 * path.stat().st_size
    loaded = models.load(str(small))
    for name, value in classifier.model.state_dict().items():
        found = loaded.model.state_dict()[name]
        assert found.dtype == value.dtype
        assert torch.equal(found, value.half().to(value.dtype))
    classifier.model.head.bias.data[0] = 1e6
    with pytest.raises(ValueError, match=r"16 bits cannot hold the values of head\.bias; save with half=False"):
        models.save(classifier, tmp_path / "big.safetensors", model=model, half=True)
    assert not (tmp_path / "big.safetensors").exists()


def test_torchvision_weights_come_from_the_file(tmp_path):
    text = "torchvision:squeezenet1_1?weights=none&num_classes=2&seed=3&size=64"
    classifier = models.load(text)
    choice = Choice("torchvision:squeezenet1_1", {"num_classes": 2, "size": 64})
    loaded = models.load(str(models.save(classifier, tmp_path / "s.safetensors", model=choice)))
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(x), classifier(x))


def rewrite(path, **changes):
    manifest = path.with_suffix(".json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


def test_files_that_do_not_fit_say_what_is_wrong(saved, tmp_path):
    _, path = saved
    rewrite(path, model={"name": "mini_resnet", "classes": 4, "last_stride": 1, "head": "conv"})
    with pytest.raises(ValueError, match=r"does not fit MiniResNet: of another shape: head\.weight, head\.bias$"):
        models.load(str(path))
    rewrite(path, model={"name": "mini_vit", "depth": 1})
    with pytest.raises(
        ValueError, match=r"does not fit MiniViT: missing: class_token, .*; unexpected: .*stem\.0\.weight"
    ):
        models.load(str(path))
    rewrite(path, sha256="0")
    with pytest.raises(ValueError, match=r"net\.json describes other weights than .*the checksums differ"):
        models.load(str(path))
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(ValueError, match=r"net\.json is no manifest of a classifier: it holds no table"):
        models.load(str(path))
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match=r"net\.json is no manifest of a classifier: it lacks model"):
        models.load(str(path))
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"net\.json is no manifest of a classifier: Expecting"):
        models.load(str(path))
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*net\.json; it says which network the weights belong to"):
        models.load(str(path))
    with pytest.raises(ValueError, match=r"expected a path that ends in \.safetensors, got .*net\.pt"):
        models.save(models.load("mini_vgg"), tmp_path / "net.pt", model=Choice("mini_vgg"))


def test_a_file_that_is_no_safetensors(saved):
    _, path = saved
    path.write_bytes(b"weights")
    rewrite(path, sha256=hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(ValueError, match=r"net\.safetensors is no safetensors file"):
        models.load(str(path))


def test_the_embedded_default(monkeypatch):
    monkeypatch.setattr(models, "EMBEDDED", Path("nowhere.safetensors"))
    with pytest.raises(
        FileNotFoundError, match=r"embedded weights nowhere\.safetensors are missing; install sightline"
    ):
        models.load("creatures")


def test_the_embedded_default_is_what_it_says():
    if not models.EMBEDDED.exists():
        pytest.skip("the embedded weights have not been trained yet")
    classifier = models.load("creatures")
    assert len(classifier.classes) == 20
    assert classifier(torch.rand(1, 3, 64, 64)).shape == (1, 20)
    assert models.EMBEDDED.stat().st_size < 1.6e6


def test_a_flat_head_knows_left_from_right_and_a_pooled_one_does_not():
    x = torch.zeros(1, 3, 64, 64)
    x[..., 16:48, 16:32] = torch.rand(3, 32, 16, generator=torch.Generator().manual_seed(0))
    difference = {}
    for head in ("flat", "linear"):
        classifier = models.load(f"mini_resnet?head={head}&classes=4")
        logits = classifier(torch.cat([x, x.roll(16, 3)]))
        difference[head] = float((logits[0] - logits[1]).abs().max() / logits.abs().max())
    assert difference["flat"] > 0.2 > difference["linear"]


@pytest.mark.parametrize(("size", "stride", "cells"), [(64, 2, 16), (96, 1, 144), (72, 2, 25)])
def test_a_flat_head_reads_every_cell(size, stride, cells):
    classifier = models.load(f"mini_resnet?head=flat&size={size}&last_stride={stride}&classes=4")
    assert classifier.model.head.in_features == 256 * cells
    assert classifier(torch.rand(1, 3, size, size)).shape == (1, 4)


def test_the_catalogue_names_what_it_builds():
    gap = ["resnet50_gap", "vgg16_gap", "inception_v3_gap"]
    mini = ["mini_resnet", "mini_vgg", "mini_vit", "kernel_net"]
    assert list(MODELS) == ["creatures", "creatures_calm", *mini, *gap, "mini_seg", "lraspp", "calm", "none"]
    assert all(entry.summary for entry in MODELS.values())
    assert isinstance(MODELS["mini_vit"](depth=1).model, MiniViT)
    assert set(models.__all__) <= set(dir(models))
    with pytest.raises(AttributeError, match="no attribute 'mini_mlp'"):
        models.mini_mlp  # noqa: B018
