"""Fuzz: images, labels, layers, settings and specifications of every kind, two thousand and more of them.

Each outcome is a right answer, checked against a slow derivation, or one of our errors: of a kind that the docstrings
name, raised by a `raise` of ours, with a message that says something. Anything else is a defect.
"""

import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import sightline
from sightline.classifier import Classifier, UnsuitedError, wrap
from sightline.evaluation import EXPLAIN, measure
from sightline.explanation import Explanation, explain
from sightline.images import ImageError
from sightline.running import named, run
from sightline.runs import Choice, Run, Spec, read_specs

pytestmark = pytest.mark.usefixtures("plain")

HOME = Path(sightline.__file__).parent
OURS = (LookupError, TypeError, ValueError, FileNotFoundError, OSError, UnsuitedError, ImageError)
MODES = ("RGB", "L", "RGBA", "P", "CMYK", "1", "I;16", "LA", "F", "HSV")


def fuzzed(cases):
    """So many cases, the same ones each time."""
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
        ],
    )


def outcome(work):
    """Return what comes out, or None where one of our errors does.

    Any other error fails the test.
    """
    try:
        return work()
    except Exception as error:
        if wrong := defect(error):
            pytest.fail(wrong)
        return None


def defect(error):
    """Say what is wrong with an error, if anything is."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{last.filename}:{last.lineno}: {last.line}\n{type(error).__name__}: {error}"
    if type(error) not in OURS:
        return f"{type(error).__name__} is none of our errors, from {place}"
    if not Path(last.filename).is_relative_to(HOME) or not (last.line or "").startswith("raise"):
        return f"not raised by us, but at {place}"
    return f"says too little: {place}" if len(str(error)) < 20 else ""


def mostly(good, bad):
    """Draw what fits four times of five."""
    return st.sampled_from([good] * 4 + [bad]).flatmap(lambda one: one)


# Images


def tensors():
    side = st.integers(4, 40)
    shapes = mostly(
        st.one_of(st.tuples(st.just(3), side, side), st.tuples(st.integers(1, 3), st.just(3), side, side)),
        st.one_of(
            st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(0, 40), st.integers(0, 40)),
            st.tuples(st.sampled_from([1, 4]), side, side),
            st.lists(st.integers(0, 5), max_size=5).map(tuple),
        ),
    )
    others = [torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64]
    kinds = mostly(st.just(torch.float32), st.sampled_from(others))
    ranges = mostly(st.sampled_from([(0.0, 1.0), (0.2, 0.7)]), st.sampled_from([(0.0, 255.0), (-2.0, 2.0), (0.5, 0.5)]))
    holes = mostly(st.none(), st.sampled_from([None, torch.nan, torch.inf]))
    return st.builds(filled, shapes, kinds, ranges, holes, st.integers(0, 9))


def filled(shape, kind, span, hole, seed):
    low, high = span
    values = low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    if hole is not None and values.numel():
        values.view(-1)[0] = hole
    return values.to(kind)


def arrays():
    return tensors().filter(lambda one: one.dtype != torch.bfloat16).map(lambda one: one.numpy()).flatmap(turned)


def turned(array):
    """As it is, with the channels last, or of a kind that torch does not have."""
    last = np.moveaxis(array, 0, -1) if array.ndim > 1 else array
    kinds = [array, last] if np.iscomplexobj(array) else [array, last, array.astype("U1"), array.astype(object)]
    return st.sampled_from([array, last, *kinds])


def pictures():
    return st.builds(picture, st.sampled_from(MODES), st.integers(1, 70), st.integers(1, 70))


def picture(mode, w, h):
    return sixteen(w, h) if mode == "I;16" else Image.effect_noise((w, h), 60).convert("L").convert(mode)


def sixteen(w, h):
    return Image.fromarray(np.arange(w * h, dtype=np.uint16).reshape(h, w) * 7)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths to pictures, to what is none, and to nothing."""
    folder = tmp_path_factory.mktemp("files")
    Image.effect_noise((30, 20), 50).save(folder / "gray.png")
    Image.effect_noise((30, 20), 50).convert("RGB").save(folder / "color.jpg")
    (folder / "cut.png").write_bytes((folder / "gray.png").read_bytes()[:200])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.jpg").write_bytes(b"")
    found = [*sorted(folder.iterdir()), folder, folder / "absent.png", folder / "gray.png" / "inside.png"]
    return [*found, *map(str, found)]


JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4))


def things(files):
    good = st.one_of(tensors(), arrays(), pictures(), st.sampled_from(files))
    single = mostly(good, st.one_of(JUNK, st.dictionaries(JUNK, JUNK, max_size=1)))
    return mostly(good, st.one_of(st.lists(single, max_size=3), st.lists(pictures(), min_size=1, max_size=3)))


def labels():
    numbers = st.one_of(st.integers(-3, 9), st.integers())
    words = st.one_of(st.sampled_from(["²", "", "-1", "Newt"]), st.text(max_size=5))
    inside = st.lists(st.one_of(numbers, words, st.floats(), st.booleans(), st.none()), max_size=3)
    kinds = st.sampled_from([torch.long, torch.int32, torch.uint8, torch.float32, torch.bool])
    several = st.builds(lambda v, k: torch.tensor(v).to(k), st.lists(st.integers(0, 6), max_size=3), kinds)
    scalar = st.builds(lambda v, k: torch.tensor(v).to(k), st.integers(0, 4), kinds)
    good = st.one_of(st.none(), st.integers(0, 4), st.sampled_from(["newt", "wren", "3", "0"]), scalar)
    bad = st.one_of(numbers, words, inside, inside.map(tuple), several, several.map(lambda one: one.numpy()), JUNK)
    return mostly(good, bad)


CHEAP = {
    "grad_cam": (),
    "cam": (),
    "gradient": ("score",),
    "eigen_cam": (),
    "layer_cam": (),
    "smooth(gradient)": ("samples", "noise", "seed"),
    "opti_cam": ("steps", "lr", "objective", "normalization", "erase", "start"),
    "occlusion": ("size", "grid", "erase", "chunk"),
    "rise": ("samples", "cells", "p", "erase", "seed"),
    "random": ("seed", "cells"),
}
"""Methods that take milliseconds, with some of their settings."""

NAMES = ["black", "mean", "blur", "rise", "mask", "diff", "range", "probability", "grad_cam", "none"]
TABLES = [{"name": "blur", "sigma": 2.0}, {"name": "noise"}, {"sigma": 1}, [1, 2], [], float("nan"), None, True]
VALUES = st.one_of(st.integers(-2, 6), st.floats(-1, 4), st.sampled_from(NAMES), st.sampled_from(TABLES))
SMALL = {"rise": {"samples": 8}, "opti_cam": {"steps": 2}, "occlusion": {"grid": 3}, "smooth(gradient)": {"samples": 2}}


@st.composite
def asked(draw):
    """Draw a method, mostly a real one, with few settings, mostly its own."""
    name = draw(mostly(st.sampled_from(list(CHEAP)), st.text(max_size=9)))
    own = CHEAP.get(name, ())
    strange = st.text(st.characters(codec="ascii"), max_size=6)
    keys = mostly(st.sampled_from(own), strange) if own else strange
    bound = draw(st.dictionaries(keys, VALUES, max_size=2 if own else draw(st.sampled_from([0, 0, 1]))))
    return name, {**SMALL.get(name, {}), **bound}


@pytest.fixture(scope="module")
def subject(networks, seeded):
    model = seeded(networks.pooled, seed=3, dtype=torch.float32)
    return wrap(model, layer="last", normalization="none", size=(24, 32), classes=("newt", "wren", "pip", "3", "owl"))


def right(made, classifier, target):
    """Check an explanation against what the network itself says."""
    assert isinstance(made, Explanation)
    x, y = made.images, made.labels
    with torch.no_grad():
        logits = classifier.model(x.float())
    assert x.dtype.is_floating_point
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert len(made) == len(x) == len(made.names) == len(set(made.names)) == len(made.photos) == len(made.problems)
    assert torch.allclose(made.scores, logits.double().softmax(1)[range(len(x)), y], atol=1e-6)
    if target is None:
        assert torch.equal(y, logits.argmax(1))
    elif isinstance(target, str):
        number = classifier.classes.index(target) if target in classifier.classes else int(target)
        assert y.tolist() == [number] * len(x)
    elif isinstance(target, int):
        assert y.tolist() == [target] * len(x)
    assert made.saliency.shape == (len(x), 1, *x.shape[2:])
    assert bool(made.saliency.isfinite().all())
    assert 0 <= float(made.saliency.min()) <= float(made.saliency.max()) <= 1
    for raw, problem in zip(made.raw, made.problems, strict=True):
        assert (problem is None) == (bool(raw.isfinite().all()) and float(raw.min()) < float(raw.max()))


@pytest.mark.filterwarnings("ignore")
@fuzzed(700)
@given(data=st.data())
def test_any_image_and_any_label(data, subject, files):
    images, target = data.draw(things(files)), data.draw(labels())
    made = outcome(lambda: explain(subject, images, target, "grad_cam"))
    if made is not None:
        right(made, subject, target)


@pytest.mark.filterwarnings("ignore")
@fuzzed(500)
@given(data=st.data())
def test_any_method_and_any_setting(data, subject):
    name, bound = data.draw(asked())
    image, target = data.draw(tensors()), data.draw(st.one_of(st.none(), st.integers(0, 4)))
    made = outcome(lambda: explain(subject, image, target, Choice(name, bound)))
    if made is not None:
        right(made, subject, target)


# Networks and layers


@st.composite
def networks_of_layers(draw):
    """Draw a small convolutional network; some cannot work."""
    channels, parts = 3, []
    for kind in draw(st.lists(st.sampled_from(["conv", "conv", "relu", "norm", "pool", "drop", "same"]), max_size=5)):
        if kind == "conv":
            width, side, stride = draw(st.tuples(st.integers(1, 6), st.sampled_from([1, 3, 5]), st.integers(1, 3)))
            parts.append(nn.Conv2d(channels, width, side, stride, side // 2))
            channels = width
        else:
            others = {"relu": nn.ReLU(inplace=True), "norm": nn.BatchNorm2d(channels), "pool": nn.MaxPool2d(2)}
            parts.append({**others, "drop": nn.Dropout2d(), "same": nn.Identity()}[kind])
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, draw(st.integers(1, 4)))]
    bad = [[], head[:1], head[:2], head[1:], [nn.Flatten(), *head]]
    return nn.Sequential(*parts, *draw(mostly(st.just(head), st.sampled_from(bad))))


LAYERS = mostly(st.none(), st.one_of(st.integers(0, 6).map(str), st.text(max_size=4), st.builds(nn.ReLU)))
PAIRS = [((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)), ((0.5, 0.5), (0.2, 0.2)), ("a", "b"), (0.5, 0.2), (), 3, "", "caffe", None]
NUMBERS = st.tuples(st.floats(-1, 2), st.floats(-1, 2)).map(lambda pair: ([pair[0]], [pair[1]]))
NORMALIZATIONS = mostly(st.sampled_from(["imagenet", "none"]), st.one_of(st.sampled_from(PAIRS), NUMBERS))
SIDES = st.integers(6, 24)
SIZES = mostly(st.one_of(SIDES, st.tuples(SIDES, SIDES)), st.sampled_from([0, -3, (0, 5), 1, (2, 9), (1, 1)]))
CLASSES = mostly(st.just([]), st.lists(st.text(max_size=2), max_size=4))


@pytest.mark.filterwarnings("ignore")
@fuzzed(500)
@given(networks_of_layers(), LAYERS, NORMALIZATIONS, SIZES, CLASSES)
def test_any_network_and_any_layer(model, layer, normalization, size, classes):
    torch.manual_seed(0)
    made = outcome(lambda: wrap(model, layer=layer, normalization=normalization, size=size, classes=classes))
    if made is None:
        return
    assert isinstance(made, Classifier)
    x = torch.rand(2, 3, *made.size)
    model.eval()
    with torch.no_grad():
        plain = model((x - torch.tensor(made.mean).view(-1, 1, 1)) / torch.tensor(made.std).view(-1, 1, 1))
    plain = torch.cat([torch.zeros_like(plain), plain], 1) if plain.shape[1] == 1 else plain
    assert torch.allclose(made(x), plain, atol=1e-5)
    A, G = made.features_and_gradient(x, None)
    assert A.shape == G.shape
    assert A.shape[0] == 2
    assert A[0, 0].numel() > 1
    assert bool(G.isfinite().all())


# Specifications


TABLE = {
    "model": {"name": "mini_resnet", "classes": 20},
    "data": {"name": "creatures", "count": 2},
    "method": "gradient",
    "metrics": ["average_drop"],
    "images": 2,
}

PARTS = {
    "model": ["mini_resnet?classes=20", "mini_resnet?classes=twenty", "mini_resnet", "resnet", "x.safetensors", {}],
    "data": [
        "creatures?count=1",
        "creatures?count=0",
        "creatures?cont=3",
        "folder",
        "folder?root=nowhere",
        {"count": 3},
    ],
    "method": ["grad_cam", "center", "smooth(gradient)?samples=2", "smooth(", "smooth()", "grad_cam(x)", "cam?layer=3"],
    "metrics": [
        ["insertion?steps=2"],
        ["insertion?steps=0"],
        ["pointing_game", "pointing_game"],
        ["pxap", "f1?threshold=2"],
        ["weak_localization"],
        ["segmentation?threshold=0.5"],
        [{"name": "mass", "on": "cue"}],
        [],
        "average_drop",
        [3],
        [{"steps": 3}],
    ],
    "explain": ["label", "second", "least", "first", 3],
    "layer": ["layer3", "layer9", "", 4],
    "images": [1, 0, -1, 2.0, "2"],
    "batch": [1, 7, 0, True],
    "seed": [1, -1, 2**40, "0"],
    "erase": ["black"],
}

WORDS = st.one_of(JUNK, st.lists(JUNK, max_size=2), st.dictionaries(st.text(max_size=4), JUNK, max_size=2))


@st.composite
def specifications(draw):
    """Draw a specification that differs from a good one in one to three entries."""
    table = dict(TABLE)
    for key in draw(st.lists(st.sampled_from(list(PARTS)), min_size=1, max_size=3, unique=True)):
        change = draw(st.sampled_from(["part", "part", "part", "junk", "gone"]))
        if change == "gone":
            table.pop(key, None)
        else:
            table[key] = draw(st.sampled_from(PARTS[key]) if change == "part" else WORDS)
    return table


@pytest.mark.filterwarnings("ignore")
@fuzzed(300)
@given(specifications())
@example(TABLE)
def test_any_specification(table):
    spec = outcome(lambda: Spec.of(table))
    if spec is None or outcome(lambda: named(spec)) is None:
        return
    assert Spec.of(spec.plain()) == spec
    made = outcome(lambda: run(spec))
    if made is None:
        return
    assert isinstance(made, Run)
    assert len(made.scores.ids) == min(spec.images or 2, spec.data.settings["count"])
    assert {score.metric.name.partition(".")[0] for score in made.scores.scores} == {one.name for one in spec.metrics}
    for score in made.scores.scores:
        assert score.metric.name != "average_drop" or 0 <= score.value <= 100


@fuzzed(200)
@given(text=st.text(st.sampled_from('[]{}="abmodel\n .#123,') | st.characters(codec="utf-8"), max_size=40))
def test_any_file_of_specifications(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("specs") / "spec.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome(lambda: read_specs(path))


@fuzzed(300)
@given(st.text(st.sampled_from("?&=()[]{}.,abc12 ") | st.characters(), max_size=20))
def test_any_text_of_a_choice(text):
    made = outcome(lambda: Choice.parse(text))
    if made is not None:
        assert text.startswith(made.name)
        assert Choice.of(made.plain()) == made or "?" in made.name


# Evaluation


@pytest.mark.filterwarnings("ignore")
@fuzzed(200)
@given(
    x=tensors(),
    kind=mostly(st.sampled_from(EXPLAIN), st.sampled_from(["best", ""])),
    label=mostly(st.integers(0, 4), st.integers(-2, 6)),
)
def test_any_batch_is_measured_or_refused(x, kind, label, subject):
    from sightline.data import Batch, Sample
    from sightline.methods import gradient
    from sightline.metrics import average_drop

    samples = [Sample(str(i), image, label) for i, image in enumerate(x)] if x.ndim == 4 else []
    assume(samples)
    batch = Batch(tuple(one.id for one in samples), x, torch.tensor([label] * len(x)), tuple(samples))
    made = outcome(lambda: measure(gradient, subject, [batch], {"drop": average_drop()}, explain=kind))
    if made is not None:
        assert 0 <= made.scores[0].value <= 100
        assert made.ids == batch.ids
