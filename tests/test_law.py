"""The law: what holds for every method, whatever it computes."""

import copy
import inspect
import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from sightline.classifier import Classifier, check_labels, wrap
from sightline.explainers import Segmenter, surgery
from sightline.methods import METHODS, Entry
from sightline.models import MiniResNet

LACKS = {
    "pooled": {"attention", "CALM", "segmenter"},
    "curved": {"attention", "CALM", "segmenter", "linear head", "plain CNN", "convolutions"},
    "mini": {"attention", "CALM", "segmenter"},
}
"""Network -> what it does not offer."""

SPECIAL = {"attention": "tokens", "CALM": "latent", "segmenter": "spatial"}
"""What few networks offer -> one that does."""

IMAGES_ALONE = {"casm"}
"""Methods that look at the images alone, and yet are no controls."""


def special(entry):
    return next((network for need, network in SPECIAL.items() if need in entry.needs), None)


METHOD_AND_NETWORK = [
    (name, network)
    for name, entry in METHODS.items()
    for network in ([special(entry)] if special(entry) else LACKS)
    if not LACKS.get(network, set()) & {*entry.needs}
]

every_method = pytest.mark.parametrize("name", METHODS)
every_pair = pytest.mark.parametrize(("name", "network"), METHOD_AND_NETWORK)


@pytest.fixture(scope="module")
def original(seeded):
    model = seeded(MiniResNet, 5, widths=(8, 8, 12, 16), seed=4, dtype=torch.float32)
    model.head.weight.data.mul_(0.05)  # so that no probability is exactly one
    return wrap(model, layer="layer4", normalization=((0.5,), (0.25,)), size=(24, 32))


@pytest.fixture
def mini(original):
    return copy.deepcopy(original)


@pytest.fixture
def classifier(request, network):
    return request.getfixturevalue(network)


@pytest.fixture
def y():
    return torch.tensor([3, 0, 4])


@pytest.fixture
def fitting(request, name):
    """A small network that offers what the method needs."""
    return request.getfixturevalue(special(METHODS[name]) or "pooled")


@pytest.fixture
def latent(pooled):
    return surgery(pooled, seed=3)


class Pixels(nn.Module):
    """Logits of five classes and the background at every pixel."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.head = nn.Conv2d(3, 8, 5, padding=2), nn.Identity(), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        return self.head(self.drop(self.first(x).relu()))


@pytest.fixture
def spatial(seeded):
    return wrap(Segmenter(seeded(Pixels, seed=3), 5), layer="network.first", normalization="none", size=(24, 32))


def body(classifier):
    """The network that runs: of a CALM its trunk, of a segmenter what is inside."""
    model = classifier.model
    return model.network if isinstance(model, Segmenter) else getattr(model, "trunk", model)


def inside(classifier, network):
    """A classifier like another one, around another network."""
    if isinstance(classifier.model, Segmenter):
        return replace(classifier, model=Segmenter(network, classifier.model.classes))
    other = replace(classifier, model=network)
    return other if body(classifier) is classifier.model else surgery(replace(other, layer="last"))


def quick(name):
    return partial(METHODS[name].method, **METHODS[name].quick)


def fit(classifier, x):
    """Give images in the network's precision."""
    return x.to(next(classifier.model.parameters()).dtype)


@every_pair
def test_the_map_is_finite_raw_and_of_one_channel(name, classifier, x, y):
    saliency = quick(name)(classifier, fit(classifier, x), y)
    assert saliency.shape[:2] == (3, 1)
    assert saliency.dtype == fit(classifier, x).dtype
    assert saliency.isfinite().all()
    assert not saliency.requires_grad
    assert all(one.max() > one.min() for one in saliency)


@every_pair
def test_the_map_is_the_same_again(name, classifier, x, y):
    x = fit(classifier, x)
    once = quick(name)(classifier, x, y)
    torch.manual_seed(1)
    assert torch.equal(once, quick(name)(classifier, x, y))


@every_pair
def test_no_trace_is_left(name, classifier, x, y, trace, plain):
    model, x = classifier.model, fit(classifier, x)
    model.requires_grad_(True).train()
    next(model.children()).eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    body(classifier).head.register_forward_hook(lambda *_: None)
    changed = trace(model, x, y)
    quick(name)(classifier, x, y)
    assert changed() == []


class Bomb(nn.Module):
    """Passes its input on until the fuse has burnt; then fails, on the way forward or back."""

    class Error(Exception):
        pass

    def __init__(self, fuse, backward):
        super().__init__()
        self.fuse, self.backward = fuse, backward

    def forward(self, a):
        self.fuse -= 1
        if self.fuse >= 0:
            return a
        if not self.backward:
            raise self.Error("the network fails")
        a = a.clone()
        if a.requires_grad:
            a.register_hook(self.fail)
        return a

    def fail(self, gradient):
        raise self.Error("the backward pass fails")


FAILURES = [
    (name, fuse, backward)
    for name, entry in METHODS.items()
    for fuse, backward in ((0, False), (1, False), (0, True))
    if not entry.control
    and name not in IMAGES_ALONE
    and (fuse == 0 or name in ("score_cam", "ablation_cam", "opti_cam"))
    and (not backward or "gradients" in entry.needs)
]


@pytest.mark.parametrize(("name", "fuse", "backward"), FAILURES)
def test_no_trace_is_left_after_an_error_in_the_network(name, fuse, backward, fitting, x, y, trace, plain):
    body(fitting).drop = Bomb(fuse, backward)
    fitting.model.train()
    changed = trace(fitting.model, x, y)
    with pytest.raises(Bomb.Error):
        quick(name)(fitting, x, y)
    assert changed() == []


@every_method
def test_no_trace_is_left_after_an_unknown_layer(name, fitting, x, y, trace, plain):
    fitting.model.train()
    lost = replace(fitting, layer="lats")
    changed = trace(fitting.model, x, y)
    if "layer" in METHODS[name].needs:
        with pytest.raises(LookupError, match="no layer called 'lats'; did you mean"):
            quick(name)(lost, x, y)
    else:
        assert torch.equal(quick(name)(lost, x, y), quick(name)(fitting, x, y))
    assert changed() == []


@every_pair
def test_training_mode_changes_nothing(name, classifier, x, y):
    x = fit(classifier, x)
    expected = quick(name)(classifier, x, y)
    classifier.model.train()
    assert torch.equal(quick(name)(classifier, x, y), expected)


@every_pair
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_gradient_mode_of_the_caller_changes_nothing(name, classifier, mode, x, y):
    x = fit(classifier, x)
    expected = quick(name)(classifier, x, y)
    with mode():
        inside = quick(name)(classifier, x, y)
        own = quick(name)(classifier, x.clone(), y.clone())
        predicted = quick(name)(classifier, x.clone())
    assert torch.equal(inside, expected)
    assert torch.equal(own, expected)
    assert predicted.isfinite().all()


@every_pair
def test_images_that_require_a_gradient_are_only_read(name, classifier, x, y):
    x = fit(classifier, x)
    expected = quick(name)(classifier, x, y)
    leaf = x.clone().requires_grad_()
    saliency = quick(name)(classifier, leaf, y)
    assert torch.equal(saliency, expected)
    assert not saliency.requires_grad
    assert leaf.grad is None


@every_method
def test_images_and_network_may_differ_in_precision(name, fitting, x, y, plain):
    expected = quick(name)(fitting, x, y)
    torch.testing.assert_close(quick(name)(fitting, x.float(), y), expected, rtol=1e-3, atol=1e-4, check_dtype=False)
    half = replace(fitting, model=fitting.model.float())
    torch.testing.assert_close(quick(name)(half, x, y), expected, rtol=1e-3, atol=1e-4, check_dtype=False)


@every_pair
def test_no_label_means_the_predicted_class(name, classifier, x):
    x = fit(classifier, x)
    with torch.no_grad():
        predicted = classifier(x).argmax(1)
    assert torch.equal(quick(name)(classifier, x), quick(name)(classifier, x, predicted))


@pytest.mark.parametrize(("name", "network"), [pair for pair in METHOD_AND_NETWORK if "mini" not in pair])
def test_a_map_does_not_depend_on_its_batch(name, classifier, x, y):
    """In float64: in float32 the rounding of a batch differs, and iterations amplify it."""
    together = quick(name)(classifier, x, y)
    for i in range(3):
        alone = quick(name)(classifier, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-9)
    backwards = quick(name)(classifier, x.flip(0), y.flip(0)).flip(0)
    torch.testing.assert_close(together, backwards, rtol=0, atol=1e-9)


@every_pair
def test_the_label_changes_the_map_where_the_entry_says_so(name, classifier, x):
    x = fit(classifier, x)
    maps = [quick(name)(classifier, x, torch.full((3,), label)) for label in range(3)]
    differ = [not torch.allclose(maps[0], other, rtol=1e-4, atol=1e-6) for other in maps[1:]]
    assert all(differ) if METHODS[name].class_specific else not any(differ)


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if entry.class_specific])
def test_a_wrong_label_is_an_error(name, fitting, x, plain):
    method = quick(name)
    for y, error, message in (
        (torch.tensor([0, 5, 1]), ValueError, r"label 5 is outside 0\.\.4: the network has 5 classes"),
        (torch.tensor([0, -1, 1]), ValueError, r"label -1 is outside 0\.\.4"),
        (torch.tensor([0, 1]), ValueError, r"expected 3 labels, one an image, got shape \(2,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "expected integer labels, got torch.float32"),
    ):
        with pytest.raises(error, match=message):
            method(fitting, x, y)


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if not entry.control])
def test_wrong_images_are_an_error(name, fitting, x, plain):
    method = quick(name)
    for images, error, message in (
        ((x * 255).byte(), TypeError, r"expected images as a float tensor in \[0, 1\], got torch.uint8"),
        (x[:, :1], ValueError, r"expected images of shape \(b, 3, h, w\), got \(3, 1, 24, 32\)"),
        (x[0], ValueError, r"expected images of shape \(b, 3, h, w\), got \(3, 24, 32\)"),
        (x[:0], ValueError, "expected at least one image, got an empty batch"),
        (torch.where(x > 0.9, torch.nan, x), ValueError, "the images hold NaN or infinity"),
    ):
        with pytest.raises(error, match=message):
            method(fitting, images)


@every_pair
def test_the_sign_is_what_the_entry_says(name, classifier, x):
    maps = torch.cat([quick(name)(classifier, fit(classifier, x), torch.full((3,), y)) for y in range(3)])
    assert bool((maps < 0).any()) == METHODS[name].signed


@every_method
def test_controls_know_nothing_of_the_classifier_and_all_others_do(name, fitting, x, y, seeded):
    other = inside(fitting, seeded(type(body(fitting)), seed=9))
    equal = torch.equal(quick(name)(fitting, x, y), quick(name)(other, x, y))
    assert equal == (METHODS[name].control or name in IMAGES_ALONE)
    assert not (METHODS[name].control and (METHODS[name].class_specific or METHODS[name].needs))


class Detached(nn.Module):
    """A network that passes no gradient on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @torch.no_grad()
    def forward(self, x):
        return self.inner(x)


KIND = {"CALM", "segmenter"}
"""What is no part of a network, but the network itself."""


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if not KIND & {*entry.needs}])
def test_gradients_are_needed_where_the_entry_says_so(name, fitting, x, y, trace, plain):
    blind = replace(fitting, model=Detached(fitting.model), layer=f"inner.{fitting.layer}")
    changed = trace(blind.model, x, y)
    if "gradients" in METHODS[name].needs:
        with pytest.raises(ValueError, match=r"gets no gradient: it does not reach .* such as score_cam"):
            quick(name)(blind, x, y)
    else:
        assert torch.equal(quick(name)(blind, x, y), quick(name)(fitting, x, y))
    assert changed() == []


COSTS = {
    "none": lambda images, channels: 0,
    "1 forward": lambda images, channels: images,
    "1 forward of its own network": lambda images, channels: 0,
    "1 forward, 1 backward": lambda images, channels: images,
    "1 forward a channel": lambda images, channels: images * (1 + channels),
    "100 forwards, 100 backwards": lambda images, channels: images * 101,
    "337 forwards, 300 backwards": lambda images, channels: images * 337,
    "337 forwards, 300 backwards from the layer on": lambda images, channels: images * 337,
    "800 forwards, 800 backwards an area": lambda images, channels: images * 801,
    "6000 forwards": lambda images, channels: images * 6001,
    "1000 forwards": lambda images, channels: images * 1001,
    "20 forwards, 20 backwards": lambda images, channels: images * 21,
    "784 forwards": lambda images, channels: images * 785,
    "1 forward, 3 backwards": lambda images, channels: images,
    "2 forwards, 1 backward": lambda images, channels: images * 2,
    "50 forwards, 50 backwards": lambda images, channels: images * 50,
    "51 forwards, 50 backwards": lambda images, channels: images * 51,
    "51 forwards, 51 backwards": lambda images, channels: images * 51,
    "1 forward, 2 backwards": lambda images, channels: images,
}


@every_method
def test_the_cost_is_what_the_entry_says(name, fitting, x, y):
    passes = []
    body(fitting).register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    METHODS[name](fitting, x, y)
    if METHODS[name].cost == "1 forward, the head once a channel":
        heads = []
        fitting.model.head.register_forward_pre_hook(lambda _, args: heads.append(len(args[0])))
        METHODS[name](fitting, x, y)
        assert sum(passes) <= 2 * 3 * len(x)
        assert sum(heads) == len(x) * (2 + 6)
    else:
        assert sum(passes) == COSTS[METHODS[name].cost](len(x), 6)


@every_method
def test_an_entry_called_is_its_method_with_the_defaults(name, fitting, x, y):
    entry, settings = METHODS[name], inspect.signature(METHODS[name].method).parameters
    assert entry.method is getattr(sys.modules["sightline.methods"], name)
    assert set(entry.quick) <= set(settings)
    if not entry.quick:
        assert torch.equal(entry(fitting, x, y), entry.method(fitting, x, y))


@every_method
def test_hyper_parameters_are_keywords_with_defaults(name):
    parameters = list(inspect.signature(METHODS[name].method).parameters.values())
    assert [p.name for p in parameters[:3]] == ["classifier", "x", "y"]
    assert {p.kind for p in parameters[:3]} == {inspect.Parameter.POSITIONAL_ONLY}
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not p.empty for p in parameters[3:])


@every_method
def test_the_module_names_the_paper_and_the_function_says_what_it_returns(name):
    entry, method = METHODS[name], METHODS[name].method
    module = sys.modules[method.__module__].__doc__ or ""
    assert (method.__doc__ or "").startswith("Return ")
    assert "(b, 1, " in (method.__doc__ or "")
    assert bool(entry.paper) == bool(re.search(r"\b(19|20)\d\d\b", module))
    for word in re.findall(r"[A-Z]\w+", entry.paper):
        assert word in module
    assert "control" in (entry.summary + module).lower() or not entry.control


def test_an_entry_is_frozen_and_unknown_names_are_no_attributes():
    with pytest.raises(AttributeError):
        METHODS["cam"].summary = "another"  # type: ignore[misc]
    with pytest.raises(AttributeError, match="no attribute 'grad_camm'"):
        _ = sys.modules["sightline.methods"].grad_camm
    assert all(isinstance(entry, Entry) and entry.summary for entry in METHODS.values())


def test_labels_are_copied_and_moved_to_the_logits(pooled, x):
    y = torch.tensor([1, 2, 3], dtype=torch.int32)
    labels = check_labels(pooled(x), y)
    assert labels.dtype == torch.long
    labels += 1
    assert y.tolist() == [1, 2, 3]


def test_a_recomputed_forward_pass_still_evaluates(seeded, networks, x, y, trace, plain):
    """Gradient checkpointing runs layers again during the backward pass: in evaluation mode too."""

    class Recomputed(networks.pooled):
        def forward(self, x):
            inner = torch.utils.checkpoint.checkpoint(self.last, self.stem(x), use_reentrant=False)
            return self.head(self.drop(self.pool(inner).flatten(1)))

    model = seeded(Recomputed, seed=1)
    expected = quick("gradient")(wrap(model, normalization="none", size=(24, 32)), x, y)
    model.train()
    classifier: Classifier = wrap(model, layer="stem", normalization="none", size=(24, 32))
    changed = trace(model, x, y)
    assert torch.equal(quick("gradient")(classifier, x, y), expected)
    for name in ("grad_cam", "opti_cam"):
        assert quick(name)(classifier, x, y).isfinite().all()
    assert changed() == []
