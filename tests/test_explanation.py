"""The one line: what it takes, what it gives, what it writes and what it says when something is wrong."""

import base64
import io
import json
import re
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sightline
from sightline import explain, viz
from sightline.classifier import probability, wrap
from sightline.explanation import LONGEST
from sightline.images import ImageError, fit, read
from sightline.maps import resize, unit
from sightline.methods import METHODS, cam, grad_cam, input_x_gradient, opti_cam

H, W = 24, 32
CLASSES = ("newt", "pip", "wren", "wryneck")
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)


class Small(nn.Module):
    image_size = (H, W)

    def __init__(self, channels=3):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, 6, 3, 2, 1), nn.Softplus())
        self.last = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.Softplus())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.pool(self.last(self.first(x))).flatten(1))


def network(channels=3):
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        model = Small(channels)
    model.head.weight.data *= 6
    return model


@pytest.fixture
def classifier():
    return wrap(network(), normalization=(MEAN, STD), classes=CLASSES)


def pixels(height=30, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# What goes in


def test_every_form_of_a_picture_gives_the_same_map(classifier, photo):
    array = pixels()
    x = fit(torch.from_numpy(array).permute(2, 0, 1) / 255, (H, W), "direct")[None]
    expected = grad_cam(classifier, x, classifier.labels(x, None))
    forms = {
        "path": photo,
        "text": str(photo),
        "picture": Image.fromarray(array),
        "8-bit array": array,
        "float array": array / 255,
        "float32 array, channels first": (array / np.float32(255)).transpose(2, 0, 1),
        "8-bit tensor": torch.from_numpy(array).permute(2, 0, 1),
        "list": [photo],
        "one-image array": array[None],
    }
    for form, image in forms.items():
        made = explain(classifier, image)
        assert torch.allclose(made.raw, expected, atol=1e-5), form
        assert made.names == (("photo.png",) if form in ("path", "text", "list") else ("image-0",)), form
        assert made.photos[0].shape == (3, 30, 50), form


def test_jpeg(classifier, tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "a.jpg", quality=95)
    made = explain(classifier, tmp_path / "a.jpg")
    assert torch.allclose(made.images, fit(read(tmp_path / "a.jpg"), (H, W), "direct")[None], atol=1e-6)
    assert made.names == ("a.jpg",)


@pytest.mark.parametrize("size", [(H, W), (40, 56)])
def test_float_tensors_are_taken_as_they_are(classifier, size):
    x = noise(3, 3, *size)
    y = classifier.labels(x, None)
    expected = grad_cam(classifier, x, y)
    for given, count in ((x, 3), (x[0], 1), ([x[0], x[1]], 2), (tuple(x), 3), (x[:1], 1)):
        made = explain(classifier, given)
        assert len(made) == count
        assert torch.equal(made.images, x[:count])
        assert torch.allclose(made.raw, expected[:count], atol=1e-6)
        assert made.saliency.shape == (count, 1, *size)
        assert made.labels.tolist() == y[:count].tolist()
        assert made.names == tuple(f"image-{i}" for i in range(count))


def test_a_list_may_mix(classifier, photo):
    made = explain(classifier, [photo, Image.fromarray(pixels(20, 20)), pixels(9, 70)])
    assert made.names == ("photo.png", "image-1", "image-2")
    assert [tuple(shown.shape[1:]) for shown in made.photos] == [(30, 50), (20, 20), (9, 70)]
    for i, image in enumerate((photo, pixels(20, 20), pixels(9, 70))):
        assert torch.allclose(explain(classifier, image).raw, made.raw[i : i + 1], atol=1e-6)


def test_resize_policy(classifier, photo):
    squashed, cropped = (explain(classifier, photo, resize_policy=policy) for policy in ("direct", "crop"))
    assert torch.equal(cropped.images[0], fit(read(photo), (H, W), "crop"))
    assert torch.equal(cropped.photos[0], cropped.images[0]), "what was cut away is not drawn on"
    assert not torch.equal(squashed.images, cropped.images)
    assert (squashed.spec["resize"], cropped.spec["resize"]) == ("direct", "crop")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "expected at least one image, got none"),
        (torch.rand(0, 3, H, W), ValueError, "expected at least one image, got none"),
        ([torch.rand(3, 8, 8), torch.rand(3, 9, 9)], ValueError, r"of one shape, got .*3, 8, 8.*; explain them one by"),
        (torch.full((3, H, W), 128.0), ValueError, r"expected images in \[0, 1\], got .*; divide by 255"),
        (torch.full((3, H, W), -1.0), ValueError, "undo the normalization"),
        (torch.full((3, H, W), float("nan")), ValueError, "the images hold NaN or infinity"),
        (torch.zeros(3, 0, 5), ValueError, "expected at least one image, got an empty batch"),
        (torch.zeros(5, H, W), ValueError, r"got shape \(5, 24, 32\)"),
        (np.full((H, W, 3), 2.0), ValueError, "divide by 255"),
        (7, TypeError, "expected an image as path, Pillow picture, numpy array or tensor, got int"),
    ],
)
def test_images_that_do_not_fit(classifier, images, error, message, plain):
    with pytest.raises(error, match=message):
        explain(classifier, images)


def test_files_that_do_not_fit(classifier, photo, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.png"):
        explain(classifier, tmp_path / "none.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"empty\.png is empty"):
        explain(classifier, tmp_path / "empty.png")
    with pytest.raises(LookupError, match="no resize policy called 'crp'; did you mean crop"):
        explain(classifier, photo, resize_policy="crp")


# The network


def test_a_bare_network_says_how_it_wants_its_images():
    x, model = noise(2, 3, H, W), network()
    with pytest.raises(ValueError, match="how does Small want its images normalized\\? Pass normalization='imagenet'"):
        explain(model, x)
    made = explain(model, x, normalization=(MEAN, STD))
    assert torch.equal(made.raw, explain(wrap(model, normalization=(MEAN, STD)), x).raw)
    assert (made.spec["model"], made.spec["mean"], made.spec["layer"]) == ("Small", list(MEAN), "last")
    assert not torch.allclose(made.raw, explain(model, x, normalization="none").raw)


def test_a_classifier_has_its_own_normalization(classifier):
    with pytest.raises(ValueError, match="this classifier has its own; a method's setting of that name goes with the"):
        explain(classifier, noise(3, H, W), normalization="none")
    method = partial(opti_cam, normalization="max", steps=2)
    made = explain(classifier, noise(3, H, W), method=method, lr=0.2)
    assert made.spec["method"] == "opti_cam"
    assert made.spec["arguments"].items() >= {"normalization": "max", "steps": 2, "lr": 0.2, "erase": "black"}.items()


def test_a_model_by_name():
    made = explain("mini_resnet?classes=4", noise(3, 64, 64))
    assert made.spec["model"] == "mini_resnet?classes=4"
    assert made.spec["layer"] == "layer4"
    assert made.raw.shape == (1, 1, 4, 4)
    with pytest.raises(LookupError, match="no model called 'mini_resnt'; did you mean mini_resnet"):
        explain("mini_resnt", noise(3, 64, 64))


def test_layer_by_name_or_module(classifier):
    x = noise(1, 3, H, W)
    expected = grad_cam(classifier.at("first"), x, classifier.labels(x, None))
    for layer in ("first", classifier.model.first):
        made = explain(classifier, x, layer=layer)
        assert torch.equal(made.raw, expected)
        assert made.spec["layer"] == "first"
    bare = explain(classifier.model, x, normalization=(MEAN, STD), layer="first")
    assert torch.equal(bare.raw, expected)
    with pytest.raises(LookupError, match="no layer called 'frist'; did you mean first"):
        explain(classifier, x, layer="frist")


def test_a_gray_network_sees_colors_as_luma(photo):
    gray = wrap(network(1), normalization="none")
    made = explain(gray, photo)
    color = fit(read(photo), (H, W), "direct")
    assert made.images.shape == (1, 1, H, W)
    assert torch.allclose(made.images[0, 0], 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2], atol=1e-6)
    assert made.photos[0].shape == (3, 30, 50)
    assert made.overlay().shape == (3, 30, 50)
    x = noise(1, 20, 28)
    as_it_is = explain(gray, x)
    assert torch.equal(as_it_is.images[0], x)
    assert as_it_is.overlay().shape == (3, 20, 28)


# The class


def test_targets(classifier):
    x = noise(3, 3, H, W)
    logits = classifier(x)
    for target, labels in (
        (None, logits.argmax(1).tolist()),
        (2, [2, 2, 2]),
        ("pip", [1, 1, 1]),
        ("3", [3, 3, 3]),
        ([0, 1, 2], [0, 1, 2]),
        (("wren", 0, "1"), [2, 0, 1]),
        (torch.tensor([3, 2, 1]), [3, 2, 1]),
    ):
        made = explain(classifier, x, target)
        assert made.labels.tolist() == labels
        assert [made.label(i) for i in range(3)] == [CLASSES[label] for label in labels]
        assert torch.allclose(made.scores, probability(logits.double(), torch.tensor(labels)))
        assert torch.allclose(made.raw, grad_cam(classifier, x, torch.tensor(labels)))
    unnamed = wrap(network(), normalization="none")
    assert explain(unnamed, x[0], 2).label() == "2"


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("wrne", LookupError, "no class called 'wrne'; did you mean wren"),
        (["pip", "newtt", 0], LookupError, "no class called 'newtt'; did you mean newt"),
        ("--3", LookupError, "no class called '--3'"),
        ("²", LookupError, "no class called '²'"),
        (4, ValueError, r"label 4 is outside 0\.\.3: the network has 4 classes"),
        ("-1", ValueError, r"label -1 is outside 0\.\.3"),
        ([0, 1], ValueError, r"expected 3 labels, one an image, got shape \(2,\)"),
        (1.5, TypeError, "expected integer labels, got torch.float32"),
    ],
)
def test_wrong_targets(classifier, target, error, message, plain):
    with pytest.raises(error, match=message):
        explain(classifier, noise(3, 3, H, W), target)


def test_class_names_of_a_network_without_any():
    with pytest.raises(LookupError, match="the classifier has no class names, so 'pip' is none; give the class by its"):
        explain(wrap(network(), normalization="none"), noise(3, H, W), "pip")


# The method


def test_settings_reach_the_method(classifier):
    x = noise(2, 3, H, W)
    made = explain(classifier, x, 1, "opti_cam", steps=3, score="probability")
    expected = opti_cam(classifier, x, torch.tensor([1, 1]), steps=3, score=probability)
    assert torch.equal(made.raw, expected)
    assert made.spec["arguments"]["steps"] == 3
    assert made.spec["arguments"]["score"] == "probability"
    with pytest.raises(LookupError, match="opti_cam: no setting called 'stesp'; did you mean steps"):
        explain(classifier, x, 1, "opti_cam", stesp=3)
    with pytest.raises(LookupError, match="no method called 'grad_cma'; did you mean"):
        explain(classifier, x, 1, "grad_cma")


def mine(classifier, x, y=None, /, *, power: float = 1.0):
    return classifier.features(x).sum(1, keepdim=True) ** power


class Learned(nn.Module):
    def forward(self, classifier, x, y=None):
        return x.mean(1, keepdim=True)


def test_any_function_is_a_method(classifier, tmp_path):
    x = noise(1, 3, H, W)
    made = explain(classifier, x, method=mine, power=2.0)
    assert torch.equal(made.raw, mine(classifier, x, power=2.0))
    assert made.spec["method"] == "mine"
    assert made.spec["arguments"] == {"power": 2.0}
    for method, name in (
        (partial(mine, power=3.0), "mine"),
        (Learned(), "Learned"),
        (METHODS["grad_cam"], "grad_cam"),
        (lambda c, x, y: x.amax(1, keepdim=True), "lambda"),
    ):
        other = explain(classifier, x, method=method)
        assert other.spec["method"] == name
        assert [path.name for path in other.save(tmp_path)] == [
            f"image-0-{name}.{end}" for end in ("png", "npy", "json")
        ]
    assert explain(classifier, x, method=partial(mine, power=3.0), power=2.0).spec["arguments"] == {"power": 2.0}


def test_maps_of_methods_are_signed_under_any_name(classifier):
    x = noise(1, 3, H, W)

    def cam(classifier, x, y=None, /):
        return mine(classifier, x)

    assert explain(classifier, x, method="cam").signed
    assert explain(classifier, x, method=METHODS["cam"]).signed
    assert explain(classifier, x, method=partial(input_x_gradient)).signed
    assert not explain(classifier, x, method=cam).signed, "a function of one's own that is called so"
    assert not explain(classifier, x, method=grad_cam).signed


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda x: x.mean(1), ValueError, r"shape \(1, 24, 32\); expected \(1, 1, height, width\)"),
        (lambda x: x.mean(1).numpy(), TypeError, "the method returned ndarray; expected maps as a float tensor"),
    ],
)
def test_a_method_must_return_maps(classifier, returned, error, message, plain):
    with pytest.raises(error, match=message):
        explain(classifier, noise(1, 3, H, W), method=lambda c, x, y: returned(x))


# Pictures


def test_saliency_is_the_raw_map_at_the_inputs_size(classifier):
    made = explain(classifier, noise(2, 3, H, W))
    assert made.raw.shape == (2, 1, 6, 8)
    assert torch.equal(made.saliency, unit(resize(made.raw, (H, W))))
    assert made.saliency.amin() == 0
    assert made.saliency.amax() == 1


def test_overlay_at_the_inputs_size(classifier):
    x = noise(2, 3, H, W)
    for method in ("grad_cam", "cam"):
        made = explain(classifier, x, method=method)
        for i in range(2):
            big = resize(made.raw[i : i + 1], (H, W))
            drawn = viz.overlay_signed(x[i], big[0, 0]) if made.signed else viz.overlay(x[i], unit(big)[0, 0])
            assert torch.allclose(made.overlay(i), drawn, atol=1e-5)
            assert made.picture(i).size == (W, H)


@pytest.mark.parametrize(("height", "width"), [(30, 50), (100, 12), (9, 7)])
@pytest.mark.parametrize("method", ["grad_cam", "fake_cam", "input_x_gradient"])
def test_overlay_has_the_photos_own_shape(classifier, height, width, method):
    image = Image.fromarray(pixels(height, width))
    made = explain(classifier, image, method=method)
    assert made.picture().size == (width, height)


def test_large_photos_are_drawn_smaller(classifier):
    made = explain(classifier, pixels(20, 2048))
    assert made.photos[0].shape == (3, 10, LONGEST)
    assert made.overlay().shape == (3, 10, LONGEST)


# What comes out


def test_save(classifier, photo, tmp_path):
    made = explain(classifier, [photo, pixels(20, 20)], ["pip", 0], "opti_cam", steps=2, erase="mean")
    written = made.save(tmp_path / "out" / "deep")
    names = [f"{stem}-opti_cam.{end}" for stem in ("photo", "image-1") for end in ("png", "npy", "json")]
    assert [path.name for path in written] == names
    assert sorted(names) == sorted(path.name for path in (tmp_path / "out" / "deep").iterdir())
    for i, size in ((0, (50, 30)), (1, (20, 20))):
        png, npy, text = written[3 * i : 3 * i + 3]
        assert np.array_equal(np.load(npy), made.raw[i, 0].numpy())
        assert np.array_equal(np.asarray(Image.open(png)), np.asarray(made.picture(i)))
        assert Image.open(png).size == size
        said = json.loads(text.read_text(encoding="utf-8"))
        assert said["image"] == ("photo.png", "image-1")[i]
        assert (said["label"], said["class"]) == ((1, "pip"), (0, "newt"))[i]
        assert said["probability"] == pytest.approx(made.scores[i].item())
        assert said["problem"] is None
        assert said["method"] == "opti_cam"
        assert said["arguments"] == made.spec["arguments"]
        assert said["arguments"].items() >= {"steps": 2, "erase": "mean", "lr": 0.1, "objective": "mask"}.items()
        assert (said["layer"], said["size"], said["resize"]) == ("last", [H, W], "direct")
        assert (said["mean"], said["std"]) == (list(MEAN), list(STD))
        assert said["versions"]["torch"] == version("torch")
        assert said["versions"]["sightline"] == sightline.__version__


def test_files_of_one_name_are_kept_apart(classifier, tmp_path):
    paths = [tmp_path / "a" / "cat.png", tmp_path / "b" / "cat.png", tmp_path / "b" / "0-cat.png"]
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(seed=i)).save(path)
    made = explain(classifier, paths)
    assert made.names == ("0-cat.png", "1-cat.png", "2-0-cat.png")
    written = made.save(tmp_path / "out")
    assert len(set(written)) == len(list((tmp_path / "out").iterdir())) == 9
    for i in range(3):
        assert np.array_equal(np.load(written[3 * i + 1]), made.raw[i, 0].numpy())
    other = explain(classifier, [tmp_path / "a" / "cat.png", tmp_path / "b" / "0-cat.png"])
    assert other.names == ("cat.png", "0-cat.png")


def flat(value):
    def method(classifier, x, y=None, /):
        saliency = classifier.features(x).sum(1, keepdim=True)
        saliency[0] = value
        return saliency

    return method


@pytest.mark.parametrize(("value", "problem"), [(0.0, "all zero"), (0.5, "constant"), (float("nan"), "not finite")])
def test_a_map_that_shows_nothing_is_said_not_drawn(classifier, tmp_path, value, problem):
    made = explain(classifier, noise(2, 3, H, W), 1, flat(value))
    assert made.problems == (problem, None)
    assert made.saliency[0].abs().sum() == 0
    with pytest.raises(ValueError, match=f"the map of image-0 is {problem}: there is nothing to draw"):
        made.overlay(0)
    with pytest.raises(ValueError, match=f"is {problem}"):
        made.picture(0)
    assert made.overlay(1).shape == (3, H, W)
    written = [path.name for path in made.save(tmp_path)]
    assert written == [
        f"image-{i}-method.{end}" for i, end in ((0, "npy"), (0, "json"), (1, "png"), (1, "npy"), (1, "json"))
    ]
    assert json.loads((tmp_path / "image-0-method.json").read_text())["problem"] == problem
    assert json.loads((tmp_path / "image-1-method.json").read_text())["problem"] is None
    page = made._repr_html_()
    assert f"The map is {problem}." in page
    assert page.count("<img") == 1


def test_notebooks_show_it(tmp_path):
    named = wrap(network(), normalization="none", classes=("<b>", "a&b", "c", "d"))
    Image.fromarray(pixels()).save(tmp_path / "<i>&.png")

    def method(classifier, x, y=None, /):
        return mine(classifier, x)

    method.__name__ = "it's"
    made = explain(named, tmp_path / "<i>&.png", 0, method)
    page = made._repr_html_()
    assert "<i>" not in page
    assert "<b>" not in page
    assert f"&lt;i&gt;&amp;.png: &lt;b&gt;, {made.scores[0].item():.1%}" in page
    assert "alt='it&#x27;s'" in page
    (data,) = re.findall("<img [^>]*src='data:image/png;base64,([^']+)'>", page)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(shown, np.asarray(made.picture()))


# Leave no trace


def test_nothing_is_left_behind(classifier, trace, plain):
    x = noise(2, 3, H, W)
    classifier.model.train()
    changed = trace(classifier.model, x)
    for method in ("grad_cam", "opti_cam", "random"):
        explain(classifier, x, [1, 2], method)._repr_html_()
    with pytest.raises(ValueError, match="outside"):
        explain(classifier, x, 9)
    assert changed() == []


def test_gradients_of_the_caller_stay_out(classifier):
    x = noise(1, 3, H, W).requires_grad_()
    made = explain(classifier, x, method=mine)
    for tensor in (made.images, made.raw, made.saliency, made.scores, made.overlay()):
        assert not tensor.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("method", ["grad_cam", "gradient", "opti_cam", "score_cam"])
def test_inference_mode(classifier, photo, method):
    expected = explain(classifier, photo, method=method)
    with torch.inference_mode():
        found = explain(classifier, photo, method=method)
    assert torch.equal(found.raw, expected.raw)
    assert found.labels.tolist() == expected.labels.tolist()


def test_maps_do_not_depend_on_their_batch():
    double = wrap(network().double(), normalization="none")
    x = noise(3, 3, H, W).double()
    together = explain(double, x, [0, 1, 2])
    for i in range(3):
        alone = explain(double, x[i], i)
        assert torch.allclose(alone.raw[0], together.raw[i], atol=1e-9)
        assert alone.scores.item() == pytest.approx(together.scores[i].item(), abs=1e-9)


def test_the_public_name_is_this_one():
    assert sightline.explain is explain
    assert cam is METHODS["cam"].method


def test_an_explanation_says_in_one_line_what_it_is(classifier, x):
    made = explain(classifier, x[:2], [1, 0], "grad_cam")
    assert re.fullmatch(r"Explanation by grad_cam of image-0: \S+ [\d.]+%, image-1: \S+ [\d.]+%", repr(made))
