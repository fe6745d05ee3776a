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
from sightline.models import FORMS
from sightline.models._files import checksums
from sightline.models._hub import answers, prompt
from sightline.models._huggingface import normalization_of
from sightline.runs import Choice

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
def test_a_manifest_may_name_code_of_one_s_own(factory, tmp_path, monkeypatch):
    (tmp_path / "mine_by_name.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    said = {"model": f"python:mine_by_name:{factory}", "normalization": "imagenet", "size": 40, "classes": ["a", "b"]}
    loaded = models.load(str(written(tmp_path, network.state_dict(), **said)))
    assert torch.equal(loaded.model[4].weight, network[4].weight)
    assert (loaded.mean[0], loaded.size, loaded.classes) == (0.485, (40, 40), ("a", "b"))
    del said["normalization"]
    path = written(tmp_path, network.state_dict(), **said)
    if factory == "ready":
        assert models.load(str(path)).mean == (0.0,)
    else:
        with pytest.raises(ValueError, match="how does Sequential want its images normalized"):
            models.load(str(path))


@pytest.mark.parametrize(
    ("said", "error", "told"),
    [
        ({"normalisation": "none"}, ValueError, r"net\.json: no entry called 'normalisation'; did you mean normaliz"),
        ({"classes": ["a", "b"]}, ValueError, "got 2 class names for 3 classes"),
        ({"sha256": "0"}, ValueError, r"net\.json describes other weights than .*net\.pth: the checksums differ"),
        ({"layer": "stage9"}, LookupError, "no layer called 'stage9'; did you mean stage"),
        ({"normalization": "imagnet"}, ValueError, "no normalization called 'imagnet'"),
        ({"model": "torchvision:shufflenet"}, LookupError, "no torchvision model called 'shufflenet'; did you mean"),
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


def test_a_normalization_may_be_written_in_the_text():
    loaded = models.load("torchvision:shufflenet_v2_x0_5?weights=none&size=64&normalization=[[0.5],[0.25]]")
    assert (loaded.mean, loaded.std) == ((0.5,), (0.25,))
