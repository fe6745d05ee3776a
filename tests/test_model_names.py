"""Models by name: libraries, files with a manifest written by hand, and what is said where something is missing."""

import hashlib
import json
import socket
import sys
from time import monotonic

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sightline import models
from sightline.explainers import Casm, load_casm, save_casm
from sightline.learning import CLAIM, LEARNERS, claim
from sightline.methods import METHODS
from sightline.models import FORMS
from sightline.models._files import checksums, meanings
from sightline.models._hub import answers, prompt
from sightline.models._huggingface import normalization_of
from sightline.recipes import Recipe
from sightline.running import finished, run
from sightline.runs import Choice, Spec
from sightline.settings import method_of

SMALL = "torchvision:shufflenet_v2_x0_5?weights=none&num_classes=3&seed=2&size=64"


def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def state():
    """A network of torchvision with trained-looking buffers, and its state."""
    model = models.load(SMALL).model
    for value in model.buffers():
        if value.is_floating_point():
            value.data += 0.1 * torch.rand(value.shape, generator=torch.Generator().manual_seed(1))
    return model, model.state_dict()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No name is resolved, and nothing was downloaded before."""
    constants = pytest.importorskip("huggingface_hub").constants

    def refuse(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return constants


def same(one, other, size=64):
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return torch.equal(one(x), other(x))


def test_a_state_dict_of_one_s_own_fills_a_network_of_torchvision(state, tmp_path):
    tensors = state[1]
    counted = {name for name in tensors if name.endswith("num_batches_tracked")}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "b.pth")
    torch.save(
        {"epoch": 7, "state_dict": {f"module.{name}": value for name, value in tensors.items()}}, tmp_path / "c.pt"
    )
    torch.save({name: value for name, value in tensors.items() if name not in counted}, tmp_path / "d.pth")
    assert counted
    for file in ("a.safetensors", "b.pth", "c.pt", "d.pth"):
        loaded = models.load(f"torchvision:shufflenet_v2_x0_5?num_classes=3&size=64&weights={tmp_path / file}")
        assert loaded.mean == (0.485, 0.456, 0.406)
        assert all(torch.equal(loaded.model.state_dict()[name], tensors[name]) for name in tensors.keys() - counted)


def test_a_file_of_weights_that_does_not_fit_lists_what_is_wrong(state, tmp_path):
    _, tensors = state
    tensors = dict(tensors)
    del tensors["fc.bias"]
    tensors |= {"extra.weight": torch.zeros(2), "conv1.0.weight": torch.zeros(2, 3, 3, 3)}
    torch.save(tensors, tmp_path / "net.pth")
    told = (
        r"net\.pth does not fit ShuffleNetV2: missing: fc\.bias; unexpected: extra\.weight; "
        r"of another shape: conv1\.0\.weight$"
    )
    with pytest.raises(ValueError, match=told):
        models.load(f"torchvision:shufflenet_v2_x0_5?num_classes=3&weights={tmp_path / 'net.pth'}")
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.pth; weights= takes the path of a state dict"):
        models.load("torchvision:shufflenet_v2_x0_5?weights=nowhere.pth")


class Bomb:
    """Runs code when it is read."""

    def __reduce__(self):
        return (sys.exit, (3,))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"a": Bomb()}, r"net\.pt is no file of weights alone; write torch\.save\(network\.state_dict\(\), \.\.\.\)"),
        ([1, 2], r"net\.pt holds no state dict; write torch\.save"),
        ({"epoch": 3}, r"net\.pt holds no state dict; write torch\.save"),
    ],
)
def test_a_pickle_of_more_than_tensors_is_not_run(content, told, tmp_path):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=told):
        models.load(f"torchvision:shufflenet_v2_x0_5?weights={tmp_path / 'net.pt'}")


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "net.pth").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"net\.pth is no file of weights alone"):
        models.load(f"torchvision:shufflenet_v2_x0_5?weights={tmp_path / 'net.pth'}")


def test_the_gap_networks_take_a_file_of_their_trunk(tmp_path):
    import torchvision

    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        theirs = torchvision.models.resnet50(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "trunk.pth")
    loaded = models.load(f"resnet50_gap?classes=4&size=64&weights={tmp_path / 'trunk.pth'}")
    assert torch.equal(loaded.model.layer3[1].conv2.weight, theirs.layer3[1].conv2.weight)
    assert loaded(torch.rand(1, 3, 64, 64)).shape == (1, 4)


# manifests -----------------------------------------------------------------------------------------------------------


def written(folder, tensors, *, suffix=".pth", **manifest):
    path = folder / f"net{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_manifest_by_hand_needs_the_model_alone(suffix, state, tmp_path):
    model, tensors = state
    path = written(tmp_path, tensors, suffix=suffix, model="torchvision:shufflenet_v2_x0_5?num_classes=3")
    loaded = models.load(str(path))
    assert (loaded.size, loaded.layer, loaded.classes) == ((224, 224), "conv5", ())
    assert torch.equal(loaded.model.fc.weight, model.fc.weight)
    assert same(loaded, models.load(f"{SMALL.replace('weights=none', f'weights={path}')}"))
    assert models.recipe(str(path)) == Choice("torchvision:shufflenet_v2_x0_5", {"num_classes": 3})
    assert models.load(f"{path}?layer=stage4").layer == "stage4"


def test_a_manifest_by_hand_may_say_classes_normalization_size_and_layer(state, tmp_path):
    _, tensors = state
    said = {"classes": ["cat", "dog", "owl"], "normalization": [[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]], "size": [64, 96]}
    model = {"name": "torchvision:shufflenet_v2_x0_5", "num_classes": 3}
    loaded = models.load(str(written(tmp_path, tensors, model=model, layer="stage3", **said)))
    assert loaded.classes == ("cat", "dog", "owl")
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert (loaded.size, loaded.layer) == ((64, 96), "stage3")
    same_values = models.load(str(written(tmp_path, tensors, model=model, mean=[0.5], std=[0.25], size=64)))
    assert (same_values.mean, same_values.std, same_values.size) == ((0.5,), (0.25,), (64, 64))
    named = models.load(str(written(tmp_path, tensors, model=model, normalization="none")))
    assert (named.mean, named.std) == ((0.0,), (1.0,))


FACTORY = """
from torch import nn
from sightline.classifier import wrap

def net(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))

def ready():
    return wrap(net(), normalization="none", size=32)
"""


@pytest.mark.parametrize("factory", ["net?width=4", "ready"])
def test_a_manifest_may_name_code_of_one_s_own_where_the_user_says_so(factory, tmp_path, monkeypatch):
    (tmp_path / "mine_by_name.py").write_text(FACTORY)
    sys.modules.pop("mine_by_name", None)
    monkeypatch.chdir(tmp_path)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    said = {"model": f"python:mine_by_name:{factory}", "normalization": "imagenet", "size": 40, "classes": ["a", "b"]}
    path = written(tmp_path, network.state_dict(), **said)
    with pytest.raises(ValueError, match=r"net\.pth names python:mine_by_name:\w+, which would run code of whoever"):
        models.load(str(path))
    assert "mine_by_name" not in sys.modules
    loaded = models.load(f"{path}?code=run")
    assert torch.equal(loaded.model[4].weight, network[4].weight)
    assert (loaded.mean[0], loaded.size, loaded.classes) == (0.485, (40, 40), ("a", "b"))
    del said["normalization"]
    path = written(tmp_path, network.state_dict(), **said)
    if factory == "ready":
        assert models.load(f"{path}?code=run").mean == (0.0,)
    else:
        with pytest.raises(ValueError, match="how does Sequential want its images normalized"):
            models.load(f"{path}?code=run")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """Code that leaves a mark when it is run."""
    (tmp_path / "trap_by_name.py").write_text("from pathlib import Path\nPath('sprung').touch()\nnet = print\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "trap_by_name", raising=False)
    return tmp_path / "sprung"


TRAPS = [
    "python:trap_by_name:net",
    {"name": "python:trap_by_name:net", "sep": " "},
    "calm?backbone=python:trap_by_name:net",
    {"name": "calm", "backbone": {"name": "python:trap_by_name:net"}},
    'calm?backbone={name = "\\u0070ython:trap_by_name:net"}',
    "mini_seg?weights=inner.pth?code=run",
    {"name": "calm", "backbone": "inner.pth"},
    {"name": "calm", "backbone": "inner.pth?code=run"},
    {"name": "hf:./folder", "trust_remote_code": True},
]


@pytest.mark.parametrize("model", TRAPS, ids=range(len(TRAPS)))
def test_code_in_a_manifest_is_refused_wherever_it_stands(model, trap, tmp_path):
    if "hf:" in str(model):
        transformers()
    inner = written(tmp_path, {}, model="python:trap_by_name:net", normalization="none")
    for suffix in (".pth", ".json"):
        inner.with_suffix(suffix).rename(tmp_path / f"inner{suffix}")
    path = written(tmp_path, {}, model=model)
    told = "would run code of whoever wrote it; if you trust that code, allow it: |does not fit"
    with pytest.raises(ValueError, match=told) as caught:
        models.load(str(path))
    assert not trap.exists()
    assert "\n" not in str(caught.value)
    if "mini_seg" not in str(model):  # whose weights are those of the file: nobody reads the other one
        assert "does not fit" not in str(caught.value)


def test_code_in_a_file_that_another_names_is_run_where_both_are_allowed_it(trap, tmp_path):
    inner = written(tmp_path, {}, model="python:trap_by_name:net")
    for suffix in (".pth", ".json"):
        inner.with_suffix(suffix).rename(tmp_path / f"inner{suffix}")
    path = written(tmp_path, {}, model={"name": "calm", "backbone": "inner.pth"})
    with pytest.raises(ValueError, match=r"allow it: inner\.pth\?code=run$"):
        models.load(f"{path}?code=run")
    assert not trap.exists()
    written(tmp_path, {}, model={"name": "calm", "backbone": "inner.pth?code=run"})
    with pytest.raises(TypeError, match="python:trap_by_name:net gave NoneType"):
        models.load(f"{path}?code=run")
    assert trap.exists()


def test_the_word_for_it_is_one(tmp_path):
    path = written(tmp_path, {}, model="mini_vgg")
    for load in (models.load, load_casm, lambda text: method_of(Choice.parse(text))):
        with pytest.raises(LookupError, match=r"code: no choice called 'yes'; known: refuse, run"):
            load(f"{path.with_suffix('.safetensors')}?code=yes")


def test_code_in_the_manifest_of_a_casm_is_refused_too(trap, tmp_path):
    encoder = models.load("mini_resnet?classes=3&size=32&widths=[4,4,4,8]")
    path = save_casm(Casm(encoder, width=4), tmp_path / "m.safetensors", encoder=Choice("python:trap_by_name:net"))
    x = torch.rand(1, 3, 32, 32)
    for text in (str(path), f"casm?weights={path}"):
        with pytest.raises(
            ValueError, match=r"m\.safetensors names python:trap_by_name:net, .*m\.safetensors\?code=run"
        ):
            method_of(Choice.parse(text))(encoder, x)
    assert not trap.exists()
    with pytest.raises(TypeError, match="python:trap_by_name:net gave NoneType"):
        method_of(Choice.parse(f"{path}?code=run"))(encoder, x)
    assert trap.exists()


def test_a_casm_of_code_of_one_s_own_is_used_where_the_user_says_so(tmp_path, monkeypatch):
    made = "from sightline import models\n\ndef net():\n    return models.load('mini_resnet?classes=3&size=32')\n"
    (tmp_path / "encoder_by_name.py").write_text(made)
    monkeypatch.chdir(tmp_path)
    mapping = Casm(models.load("mini_resnet?classes=3&size=32"), width=4).eval()
    save_casm(mapping, tmp_path / "m.safetensors", encoder=Choice("python:encoder_by_name:net"))
    x = torch.rand(1, 3, 32, 32)
    for text in ("m.safetensors?code=run", "casm?weights=m.safetensors?code=run"):
        assert torch.equal(method_of(Choice.parse(text))(mapping.classifier, x), mapping(mapping.classifier, x))


def test_what_a_training_has_written_of_one_s_own_code_is_judged_by_it(tmp_path, monkeypatch):
    made = "from sightline import models\n\ndef net():\n    return models.load('mini_vgg?classes=3&size=32')\n"
    (tmp_path / "trained_by_name.py").write_text(made)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(Choice("creatures"), Choice("python:trained_by_name:net"))
    loaded = models.load(recipe.model)
    path = models.save(loaded, tmp_path / "net.safetensors", model=recipe.model)
    for kind in ("classifier", "calm", "segmenter"):
        assert same(LEARNERS[kind].judged(path, recipe)[1], loaded, 32)
    path = save_casm(Casm(loaded, width=4), tmp_path / "m.safetensors", encoder=recipe.model)
    assert isinstance(LEARNERS["casm"].judged(path, recipe)[0], Casm)


def test_a_manifest_that_leads_back_to_its_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, {}, model={"name": "calm", "backbone": "./net.pth"})
    with pytest.raises(ValueError, match=r"the manifest of .*net\.pth names a network that is built from .* itself"):
        models.load("net.pth")


@pytest.mark.parametrize(
    ("said", "error", "told"),
    [
        ({"normalisation": "none"}, ValueError, r"net\.json: no entry called 'normalisation'; did you mean normaliz"),
        ({"classes": ["a", "b"]}, ValueError, "got 2 class names for 3 classes"),
        ({"sha256": "0"}, ValueError, r"net\.json describes other weights than .*net\.pth: the checksums differ"),
        ({"layer": "stage9"}, LookupError, "no layer called 'stage9'; did you mean stage"),
        ({"normalization": "imagnet"}, ValueError, "no normalization called 'imagnet'"),
        ({"model": "torchvision:shufflenet"}, LookupError, "no torchvision model called 'shufflenet'; did you mean"),
        ({"model": 3}, TypeError, r"net\.json: model: expected text or a table, got 3"),
        ({"model": {"num_classes": 3}}, ValueError, r"net\.json: model: expected a table with a name"),
        (
            {"model": "net.pth"},
            ValueError,
            r"net\.json: model: expected the network of .*, got 'net\.pth'",
        ),
        ({"model": "net.pt?layer=a"}, ValueError, r"net\.json: model: expected the network .*, got 'net\.pt'"),
        ({"layer": 3}, TypeError, r"net\.json: layer: expected text, got 3"),
        ({"layer": None}, TypeError, r"net\.json: layer: expected text, got None"),
        ({"mean": [0.5]}, ValueError, r"net\.json: mean says nothing alone; write both mean and std, or normalization"),
        ({"std": [0.5]}, ValueError, r"net\.json: std says nothing alone"),
        ({"mean": [0.5], "std": [1], "normalization": "none"}, ValueError, r"net\.json: says normalization and also"),
        ({"mean": "abc", "std": [0.5]}, TypeError, r"net\.json: mean: expected a list, got 'abc'"),
        ({"mean": ["a"], "std": [0.5]}, ValueError, r"net\.json: mean and std: expected two lists, .*, got \[\['a'\]"),
        ({"mean": [0.5], "std": [0]}, ValueError, r"net\.json: mean and std: expected two lists, means and positive"),
        ({"mean": [0.5], "std": [1, 1, 1]}, ValueError, r"net\.json: mean and std: expected two lists"),
        ({"mean": [float("nan")], "std": [1]}, ValueError, r"net\.json: mean and std: expected two lists"),
        ({"mean": [], "std": []}, ValueError, r"net\.json: mean and std: expected two lists"),
        ({"normalization": [[0.5]]}, ValueError, r"net\.json: normalization: expected two lists"),
        ({"normalization": [0.5, 0.5]}, ValueError, r"net\.json: normalization: expected two lists"),
        ({"size": "224"}, TypeError, r"net\.json: size: expected a whole number or a list, got '224'"),
        ({"size": "64"}, TypeError, r"net\.json: size: expected a whole number or a list, got '64'"),
        ({"size": True}, TypeError, r"net\.json: size: expected a whole number or a list, got True"),
        ({"size": -4}, ValueError, r"net\.json: size: expected a side or \[height, width\] in pixels, got -4"),
        ({"size": [1, 2, 3]}, ValueError, r"net\.json: size: expected a side or .*, got \[1, 2, 3\]"),
        ({"size": [64, 0]}, ValueError, r"net\.json: size: expected a side or .*, got \[64, 0\]"),
        ({"size": [64.5, 64]}, ValueError, r"net\.json: size: expected a side or .*, got \[64.5, 64\]"),
        ({"classes": "abc"}, TypeError, r"net\.json: classes: expected a list, got 'abc'"),
        ({"classes": ["a", 2, "c"]}, ValueError, r"net\.json: classes: expected a list of names, got 2 among them"),
        ({"floats": "double"}, LookupError, r"net\.json: floats: no choice called 'double'; known: as stored"),
    ],
)
def test_a_manifest_that_is_wrong_says_where(said, error, told, state, tmp_path):
    full = {"model": "torchvision:shufflenet_v2_x0_5?num_classes=3", "size": 64, **said}
    with pytest.raises(error, match=told):
        models.load(str(written(tmp_path, state[1], **full)))


def test_names_of_classes_are_counted_for_our_own_networks_too(tmp_path):
    tensors = models.load("mini_resnet?classes=3").model.state_dict()
    path = written(tmp_path, tensors, model="mini_resnet?classes=3", classes=["a", "b"])
    with pytest.raises(ValueError, match=r"net\.pth has 3 classes and its manifest 2 names of classes"):
        models.load(str(path))


def test_a_file_without_a_manifest_says_both_ways(tmp_path):
    torch.save({}, tmp_path / "net.pth")
    told = r'net\.json; .*: \{"model": "torchvision:resnet18"\}; or .*: torchvision:resnet18\?weights=.*net\.pth$'
    with pytest.raises(FileNotFoundError, match=told):
        models.load(str(tmp_path / "net.pth"))


def test_checksums_are_of_the_manifest_or_of_the_file_wherever_it_is_named(state, tmp_path):
    path = written(tmp_path, state[1], model="mini_vgg")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for plain in (str(path), {"model": f"torchvision:resnet18?weights={path}&seed=1"}, [{"weights": str(path)}]):
        assert checksums(plain) == {str(path): digest}
    path.with_suffix(".json").write_text(json.dumps({"model": "mini_vgg", "sha256": "7"}))
    assert checksums(f"{path}?layer=a") == {str(path): "7"}
    path.unlink()
    assert checksums(["resnet18", str(path), 3, None]) == {}


def test_a_meaning_is_what_the_manifest_says_of_the_network(state, tmp_path):
    said = {"model": "mini_vgg", "normalization": "none", "size": 64, "layer": "a", "classes": ["b"]}
    path = written(tmp_path, state[1], **said)
    (before,) = meanings({"model": [f"{path}?layer=a"]}).values()
    for more in ({}, {"extra": {"test": 3}}, {"provenance": {}, "sha256": "7"}):
        turned = dict(reversed({**said, **more}.items()))
        assert meanings(str(written(tmp_path, state[1], **turned))) == {str(path): before}
    for other in ({"model": "mini_vit"}, {"normalization": "imagenet"}, {"size": 65}, {"layer": "b"}, {"classes": []}):
        assert meanings(str(written(tmp_path, state[1], **{**said, **other}))) != {str(path): before}
    path.with_suffix(".json").unlink()
    assert meanings([str(path), "mini_vgg", 3]) == {}


def test_a_run_is_finished_as_long_as_the_manifest_says_the_same(tmp_path):
    tensors = models.load("mini_vgg?classes=20").model.state_dict()
    path = written(tmp_path, tensors, model="mini_vgg?classes=20", normalization="none")
    asked = Spec.of({"model": str(path), "data": "creatures?count=1", "method": "edge", "metrics": ["average_drop"]})
    kept = run(asked).write(tmp_path / "run.json")
    assert finished(asked, kept) is not None
    written(tmp_path, tensors, model="mini_vgg?classes=20", normalization="none", extra={"test": 0.5})
    assert finished(asked, kept) is not None
    written(tmp_path, tensors, model="mini_vgg?classes=20", normalization="imagenet")
    assert finished(asked, kept) is None
    older = json.loads(kept.read_text())
    del older["arguments"]["manifests"]
    kept.write_text(json.dumps(older))
    assert finished(asked, kept) is not None
    written(tmp_path, models.load("mini_vgg?classes=20&seed=1").model.state_dict(), model="mini_vgg?classes=20")
    assert finished(asked, kept) is None


def test_a_training_goes_on_as_long_as_the_manifest_it_starts_from_says_the_same(state, tmp_path):
    path = written(tmp_path, state[1], model="mini_vgg", normalization="none")
    recipe, out = Recipe(Choice("creatures"), Choice(str(path))), tmp_path / "out"
    claim("calm", recipe, out)
    (out / "checkpoint.pt").touch()
    written(tmp_path, state[1], model="mini_vgg", normalization="none", extra={"test": 0.5})
    claim("calm", recipe, out)
    written(tmp_path, state[1], model="mini_vgg", normalization="imagenet")
    with pytest.raises(ValueError, match=r"belongs to another training: manifests was .* and is .*; delete"):
        claim("calm", recipe, out)
    older = json.loads((out / CLAIM).read_text())
    del older["manifests"]
    (out / CLAIM).write_text(json.dumps(older))
    claim("calm", recipe, out)
    with pytest.raises(ValueError, match="kind was calm and is casm; delete it"):
        claim("casm", recipe, out)


# what a file is -------------------------------------------------------------------------------------------------------


CREATURES = models.EMBEDDED
CASM = CREATURES.with_name("creatures-casm.safetensors")


@pytest.mark.parametrize(
    ("read", "file", "told"),
    [
        ("method", CREATURES, "no manifest of a method: it is that of a classifier; use it as --model FILE"),
        (
            "method",
            models.EMBEDDED_CALM,
            "a method: it is that of a CALM network; use it as --model FILE --method calm_attribution",
        ),
        ("model", CASM, "no manifest of a classifier: it is that of a CASM mask; use it as --method FILE"),
        ("recipe", CASM, "no manifest of a classifier: it is that of a CASM mask; use it as --method FILE"),
        ("casm", CREATURES, "a CASM mapping: it is that of a classifier; use it as --model FILE"),
    ],
)
def test_a_file_of_another_kind_is_told_by_its_manifest(read, file, told):
    reader = {
        "method": lambda path: method_of(Choice(str(path))),
        "model": lambda path: models.load(str(path)),
        "recipe": lambda path: models.recipe(str(path)),
        "casm": load_casm,
    }[read]
    with pytest.raises(ValueError, match="is no manifest of") as caught:
        reader(file)
    assert str(caught.value).endswith(told.replace("FILE", str(file)))


@pytest.mark.parametrize(
    ("model", "method"),
    [("mini_seg?classes=3", "segmenter"), ({"name": "lraspp"}, "segmenter"), ("python:mine:net", "segmenter")],
)
def test_a_file_that_may_hold_a_segmenter_is_one_s_method(model, method, tmp_path):
    path = written(tmp_path, {}, suffix=".safetensors", model=model)
    for code in ("", "?code=run"):
        assert method_of(Choice.parse(f"{path}{code}")).keywords == {"weights": f"{path}{code}"}
        assert method_of(Choice.parse(f"{path}{code}")).func is METHODS[method].method


@pytest.mark.parametrize("model", ["torchvision:resnet18?num_classes=2", "timm:resnet18", "hf:a/b", "mini_resnet"])
def test_a_classifier_of_any_library_is_no_method(model, tmp_path):
    path = written(tmp_path, {}, suffix=".safetensors", model=model)
    with pytest.raises(ValueError, match=r"it is that of a classifier; use it as --model .*net\.safetensors$"):
        method_of(Choice(str(path)))


# python ---------------------------------------------------------------------------------------------------------------


MINE = """
from torch import nn

number = 3
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

def bad(width=1):
    raise RuntimeError("no\\nway")

def good(width=1):
    return net

def key():
    return {}["a"]

def missing():
    raise LookupError("said as it is")
"""


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("number", TypeError, r"is of kind int; expected a network, or a function that gives one$"),
        ("net?width=3", TypeError, r"is a network already and takes no width$"),
        ("net?width=3&depth=2&size=8", TypeError, r"is a network already and takes no width and no depth$"),
        ("bad", ValueError, r"failed in .*mine_that_fails\.py, line 8: RuntimeError: no$"),
        ("key", ValueError, r"failed in .*mine_that_fails\.py, line 14: KeyError: 'a'$"),
        ("good?widht=3", ValueError, r"failed: TypeError: good\(\) got an unexpected keyword argument 'widht'.*$"),
    ],
)
def test_what_is_wrong_with_a_reference_is_said_in_a_line_with_its_name(name, error, told, tmp_path, monkeypatch):
    (tmp_path / "mine_that_fails.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=f"^python:mine_that_fails:{name.partition('?')[0]} {told}") as caught:
        models.load(f"python:mine_that_fails:{name}")
    assert "\n" not in str(caught.value)


def test_what_a_function_says_of_a_name_and_a_module_that_fails(tmp_path, monkeypatch):
    (tmp_path / "mine_that_fails.py").write_text(MINE)
    (tmp_path / "broken_by_name.py").write_text("import json\n\njson.loads('{')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LookupError, match=r"^said as it is$"):
        models.load("python:mine_that_fails:missing")
    with pytest.raises(ValueError, match=r"^python:broken_by_name:net failed in .*broken_by_name\.py, line 3: JSON"):
        models.load("python:broken_by_name:net")


# bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16, torch.float16, torch.float32])
def test_floats_come_back_with_as_many_bits_as_they_were_saved_with(precision, tmp_path):
    made = models.load("mini_vgg?classes=3&size=32")
    made.model.to(precision)
    model = Choice("mini_vgg", {"classes": 3, "size": 32})
    path = models.save(made, tmp_path / "net.safetensors", model=model)
    assert ("floats" in json.loads(path.with_suffix(".json").read_text())) == (precision != torch.float32)
    loaded = models.load(str(path)).model.state_dict()
    for name, value in made.model.state_dict().items():
        assert loaded[name].dtype == value.dtype, name
        assert torch.equal(loaded[name], value)
    half = models.load(str(models.save(made, tmp_path / "half.safetensors", model=model, half=True)))
    assert {value.dtype for value in half.model.parameters()} == {torch.float32}


def test_floats_of_several_kinds_come_back_as_they_were(tmp_path):
    made = models.load("mini_vgg?classes=3&size=32")
    made.model.head.double()
    path = models.save(made, tmp_path / "net.safetensors", model=Choice("mini_vgg", {"classes": 3, "size": 32}))
    loaded, own = (one.state_dict() for one in (models.load(str(path)).model, made.model))
    assert {name: value.dtype for name, value in loaded.items()} == {name: value.dtype for name, value in own.items()}


# timm ----------------------------------------------------------------------------------------------------------------


def test_timm_by_name_brings_its_own_normalization_and_size():
    timm()
    before = torch.get_rng_state()
    one, again, other = (
        models.load(f"timm:vit_tiny_patch16_224?weights=none&num_classes=4&depth=2&img_size=64&seed={seed}")
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert (one.mean, one.std, one.layer) == ((0.5,) * 3, (0.5,) * 3, "blocks.1.norm1")
    assert same(one, again)
    assert not same(one, other)
    assert models.load("timm:mobilenetv4_conv_small_035?weights=none").size == (224, 224)
    wide = models.load("timm:vit_tiny_patch16_224?weights=none&depth=1&dynamic_img_size=true&size=64x96&num_classes=2")
    assert wide.features(torch.rand(1, 3, 64, 96)).shape[2:] == (4, 6)


def test_timm_weights_come_through_timm_with_the_names_of_imagenet(monkeypatch):
    builder = pytest.importorskip("timm.models._builder")
    theirs = timm().create_model("test_resnet", num_classes=1000)
    asked = []

    def download(where, *_, **__):
        asked.append(where)
        return theirs.state_dict()

    monkeypatch.setattr("sightline.models._hub.answers", lambda url: True)
    monkeypatch.setattr(builder, "load_state_dict_from_hf", download)
    loaded = models.load("timm:test_resnet")
    assert len(asked) == 1
    assert torch.equal(
        loaded.model.fc.weight if hasattr(loaded.model, "fc") else loaded.model.head.fc.weight,
        theirs.fc.weight if hasattr(theirs, "fc") else theirs.head.fc.weight,
    )
    assert len(loaded.classes) == 1000
    assert loaded.classes[0].startswith("tench")
    assert models.load("timm:test_resnet?num_classes=3").classes == ()


def test_timm_takes_a_file_and_a_manifest(tmp_path):
    made = timm().create_model("test_resnet", num_classes=3)
    path = written(tmp_path, made.state_dict(), model="timm:test_resnet?num_classes=3", classes=["a", "b", "c"])
    by_manifest = models.load(str(path))
    assert by_manifest.classes == ("a", "b", "c")
    assert same(by_manifest, models.load(f"timm:test_resnet?num_classes=3&weights={path}"))
    saved = models.save(by_manifest, tmp_path / "own.safetensors", model=models.recipe(str(path)))
    assert same(models.load(str(saved)), by_manifest)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("timm:resnt18", "no timm model called 'resnt18'; did you mean resnet18"),
        ("timm:resnet18.a9_in1k", "no weights of resnet18 called 'a9_in1k'; did you mean a3_in1k"),
        ("timm:resnet18?weights=V1", r"no weights of resnet18 called 'V1'; write timm:resnet18\.TAG, of a1_in1k"),
    ],
)
def test_names_that_timm_does_not_know(text, told):
    timm()
    with pytest.raises(LookupError, match=told):
        models.load(text)


def test_timm_without_a_head_is_an_error():
    timm()
    with pytest.raises(ValueError, match="VisionTransformer has no classification head; build it with num_classes=k"):
        models.load("timm:vit_tiny_patch16_224?weights=none&num_classes=0&depth=1")


# Hugging Face --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A small ViT with names and a processor, as `save_pretrained` writes it; and the network."""
    library, where = transformers(), tmp_path / "vit"
    config = library.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        id2label={0: "cat", 1: "dog", 2: "owl"},
    )
    model = library.ViTForImageClassification(config).eval()
    model.save_pretrained(where)
    processor = library.ViTImageProcessor(
        size={"height": 64, "width": 64}, image_mean=[0.4, 0.5, 0.6], image_std=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(where)
    return where, model, processor


def test_a_folder_of_hugging_face_is_seen_as_its_processor_says(folder, capfd):
    where, model, processor = folder
    capfd.readouterr()
    loaded = models.load(f"hf:{where}")
    assert capfd.readouterr() == ("", "")
    assert loaded.classes == ("cat", "dog", "owl")
    assert (loaded.layer, loaded.size) == ("vit.layers.1.layernorm_before", (64, 64))
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    theirs = torch.as_tensor(np.asarray(processor(images=picture, return_tensors="np")["pixel_values"]))
    x = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(loaded.normalize(x), theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded(x), model(theirs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"rescale_offset": True, "rescale_factor": 1 / 127.5}, {"do_normalize": False}]
)
def test_rescaling_and_normalizing_are_one_shift_and_scale(settings):
    library = transformers()
    processor = library.EfficientNetImageProcessor(do_resize=False, include_top=False, **settings)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    theirs = torch.as_tensor(np.asarray(processor(images=picture, return_tensors="np")["pixel_values"])).double()
    mean, std = (torch.tensor(v).double().view(1, -1, 1, 1) for v in normalization_of(processor.to_dict()))
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 255
    torch.testing.assert_close(((x - mean) / std).expand_as(theirs), theirs, rtol=0, atol=1e-4)


def test_weights_of_hugging_face_are_its_own_random_or_of_a_file(folder, tmp_path):
    where, model, _ = folder
    pretrained = models.load(f"hf:{where}")
    one, again, other = (models.load(f"hf:{where}?weights=none&seed={seed}") for seed in (1, 1, 2))
    assert same(one, again)
    assert not same(one, other)
    assert not same(one, pretrained)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    for file in (where / "model.safetensors", tmp_path / "own.pth"):  # on disk, names are those of transformers 4
        assert same(models.load(f"hf:{where}?weights={file}"), pretrained)
    state = {name: value for name, value in model.state_dict().items() if name != "classifier.bias"}
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"does not fit ViTForImageClassification: missing: classifier\.bias; unexpec"):
        models.load(f"hf:{where}?weights={tmp_path / 'bad.pth'}")
    with pytest.raises(ValueError, match=r"of another shape: classifier\.bias, classifier\.weight$"):
        models.load(f"hf:{where}?num_classes=5&weights={tmp_path / 'own.pth'}")


def test_a_folder_that_lacks_tensors_is_an_error(folder):
    where, model, _ = folder
    model.save_pretrained(where, state_dict={n: v for n, v in model.state_dict().items() if n != "classifier.bias"})
    with pytest.raises(ValueError, match=r"vit does not fit ViTForImageClassification: missing: classifier\.bias$"):
        models.load(f"hf:{where}")


def test_a_new_head_has_no_names(folder):
    where, model, _ = folder
    loaded = models.load(f"hf:{where}?num_classes=5")
    assert loaded.classes == ()
    assert loaded(torch.rand(1, 3, 64, 64)).shape == (1, 5)
    assert torch.equal(loaded.model.vit.embeddings.cls_token, model.vit.embeddings.cls_token)


def test_a_manifest_may_name_a_folder_of_hugging_face(folder, tmp_path):
    where, _, _ = folder
    loaded = models.load(f"hf:{where}")
    path = models.save(loaded, tmp_path / "own.safetensors", model=Choice(f"hf:{where}"))
    again = models.load(str(path))
    assert (again.classes, again.mean) == (loaded.classes, loaded.mean)
    assert same(again, loaded)


def test_a_folder_without_a_processor_asks_for_the_normalization(folder):
    where, _, _ = folder
    (where / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"how does ViTForImageClassification want .*\(image_mean, image_std\)"):
        models.load(f"hf:{where}")
    assert models.load(f"hf:{where}?normalization=none").mean == (0.0,)


def test_colors_in_another_order_are_an_error(folder):
    where, _, _ = folder
    path = where / "preprocessor_config.json"
    said = {"do_flip_channel_order": True, "image_processor_type": "MobileViTImageProcessor"}
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="wants blue, green, red; build the network yourself"):
        models.load(f"hf:{where}")


def test_what_is_no_classifier_of_hugging_face(folder, tmp_path):
    library, (where, model, _) = transformers(), folder
    library.ViTModel(model.config).save_pretrained(tmp_path / "headless")
    with pytest.raises(
        ValueError, match=r"headless has no classification head \(ViTModel\); take those of a \.\.\.ForIm"
    ):
        models.load(f"hf:{tmp_path / 'headless'}")
    headed = models.load(f"hf:{tmp_path / 'headless'}?num_classes=2&normalization=none")
    assert headed(torch.rand(1, 3, 64, 64)).shape == (1, 2)
    library.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"bert is of kind 'bert', which transformers offers no image classifier of"):
        models.load(f"hf:{tmp_path / 'bert'}")
    (where / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"vit lacks a file: .*model\.safetensors"):
        models.load(f"hf:{where}")
    with pytest.raises(FileNotFoundError, match=r"no folder \./nowhere; give one that holds config\.json"):
        models.load("hf:./nowhere")
    with pytest.raises(LookupError, match=r"no weights of .*vit called 'V1'; write DEFAULT, none or a file"):
        models.load(f"hf:{where}?weights=V1")


# without a network, without a library --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "timm:vit_tiny_patch16_224",
            r"cannot download the weights of vit_tiny_patch16_224 \(huggingface\.co does not answer\); give a local "
            r"file: timm:vit_tiny_patch16_224\?weights=FILE\.safetensors \(or \.pth\), or take random weights: "
            r"timm:vit_tiny_patch16_224\?weights=none$",
        ),
        (
            "hf:google/vit-base-patch16-224",
            r"cannot download google/vit-base-patch16-224 \(huggingface\.co does not answer\); give a local folder of "
            r"it, with config\.json, model\.safetensors and preprocessor_config\.json: hf:FOLDER$",
        ),
        (
            "torchvision:resnet18",
            r"cannot download the weights of resnet18 \(.*not known.*\); put resnet18-\w+\.pth into .*checkpoints, "
            r"give a local file: torchvision:resnet18\?weights=FILE\.pth, or take random weights: torchvision:resnet18"
            r"\?weights=none$",
        ),
    ],
)
def test_without_a_network_one_line_says_what_to_do_at_once(text, told, offline):
    pytest.importorskip({"timm": "timm", "hf": "transformers"}.get(text.partition(":")[0], "torchvision"))
    start = monotonic()
    with pytest.raises(ConnectionError, match=told) as caught:
        models.load(text)
    assert monotonic() - start < 15
    assert "\n" not in str(caught.value)
    assert offline.HF_HUB_OFFLINE is False


def test_the_hub_is_asked_once_and_what_it_was_comes_back(monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    seen = []

    def fail():
        seen.append(constants.HF_HUB_OFFLINE)
        raise FileNotFoundError("gone\nand more")

    for listens in (True, False):
        monkeypatch.setattr("sightline.models._hub.answers", lambda url, listens=listens: listens)
        with pytest.raises(ConnectionError, match="gone$" if listens else "does not answer$"), prompt():
            fail()
    assert seen == [False, True]
    assert constants.HF_HUB_OFFLINE is False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sightline.models._hub.answers", lambda url: pytest.fail("asked although told not to"))
    with prompt():
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE


def test_somebody_who_listens_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert answers(f"http://127.0.0.1:{port}")
    assert not answers(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("text", "library", "extra"), [("timm:resnet18", "timm", "timm"), ("hf:a/b", "transformers", "hf")]
)
def test_a_library_that_is_missing_is_named_with_its_extra(text, library, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'{text} needs .*: pip install "sightline\[{extra}\]"'):
        models.load(text)


def test_the_forms_say_what_is_read_and_what_is_run():
    assert list(FORMS) == ["torchvision:NAME", "timm:NAME", "hf:NAME", "FILE.safetensors", "python:MODULE:NAME"]
    assert "its code is run" in FORMS["python:MODULE:NAME"]
    with pytest.raises(LookupError, match=r"no model called 'rsnet'; .*; or torchvision:NAME, timm:NAME, hf:NAME"):
        models.load("rsnet")


def test_settings_of_other_kinds_are_refused():
    with pytest.raises(TypeError, match="none: size: expected a whole number or a list, got 'abc'"):
        models.load("none?size=abc")


def test_a_normalization_may_be_written_in_the_text():
    loaded = models.load("torchvision:shufflenet_v2_x0_5?weights=none&size=64&normalization=[[0.5],[0.25]]")
    assert (loaded.mean, loaded.std) == ((0.5,), (0.25,))
