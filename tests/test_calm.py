"""CALM's network and maps: every formula again by loops in float64, and what the paper promises of them."""

import copy
import io
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightline import models
from sightline.classifier import UnsuitedError, wrap
from sightline.explainers._calm import EPS, Calm, calm, log_relu, log_softplus, surgery
from sightline.explainers._finer import finer
from sightline.maps import resize
from sightline.methods import ablation_cam, cam, contrast, grad_cam, gradient, integrated_gradients, over, per_class
from sightline.methods._calm import (
    calm_attribution,
    calm_class_given_location,
    calm_location_given_class,
    calm_saliency,
)
from sightline.models import MiniResNet, MiniVGG
from sightline.runs import Choice

ALL = (calm_attribution, calm_saliency, calm_class_given_location, calm_location_given_class)
OF_A_CLASS = (calm_attribution, calm_class_given_location, calm_location_given_class)
EXACT = {"rtol": 0, "atol": 1e-12}

both = pytest.mark.parametrize("activation", ["softplus", "relu"])


@pytest.fixture(params=["softplus", "relu"])
def made(request, pooled):
    """A CALM network of five classes over `pooled`, on maps of 6 x 8 cells, whose attention is of both signs."""
    classifier = surgery(pooled, activation=request.param, seed=3)
    classifier.model.attention.bias.data.fill_(-0.2)
    return classifier


@pytest.fixture
def y():
    return torch.tensor([3, 0, 4])


def joint_of(classifier, x):
    with torch.no_grad():
        return classifier.model.joint(classifier.normalize(x))


def test_the_joint_is_the_softmax_over_classes_times_the_share_of_the_attention(made, x):
    model = copy.deepcopy(made.model).requires_grad_(False)
    A = made.features(x)
    found = joint_of(made, x).exp()
    act = (lambda a: math.log1p(math.exp(a))) if model.activation == "softplus" else (lambda a: max(a, 0.0) + EPS)
    assert found.shape == (3, 5, 6, 8)
    for b in range(3):
        cells = [(i, j) for i in range(6) for j in range(8)]
        s = {z: act(float(model.attention.weight[0, :, 0, 0] @ A[b, :, *z] + model.attention.bias[0])) for z in cells}
        for z in cells:
            f = [float(model.classes.weight[k, :, 0, 0] @ A[b, :, *z] + model.classes.bias[k]) for k in range(5)]
            for k in range(5):
                g = math.exp(f[k]) / sum(map(math.exp, f))
                assert float(found[b, k, *z]) == pytest.approx(g * s[z] / sum(s.values()), rel=1e-10)


def test_logits_are_log_probabilities(made, x):
    logits = made(x)
    torch.testing.assert_close(logits, joint_of(made, x).exp().sum((2, 3)).log(), **EXACT)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(3, dtype=x.dtype), **EXACT)
    torch.testing.assert_close(logits.softmax(1), logits.exp(), **EXACT)


def test_the_maps_are_the_probabilities_of_the_joint(made, x, y):
    p = joint_of(made, x).exp()
    for n, label in enumerate(y):
        of_label = p[n, label]
        expected = (of_label, p[n].sum(0), of_label / p[n].sum(0), of_label / of_label.sum())
        for method, one in zip(ALL, expected, strict=True):
            torch.testing.assert_close(method(made, x, y)[n, 0], one, **EXACT)


def test_without_a_label_the_predicted_class_is_explained(made, x):
    for method in ALL:
        assert torch.equal(method(made, x), method(made, x, made(x).argmax(1)))


def test_the_maps_are_normalized_as_probabilities_are(made, x, y):
    one = torch.ones(3, dtype=x.dtype)
    torch.testing.assert_close(calm_attribution(made, x, y).sum((1, 2, 3)), made(x).exp()[torch.arange(3), y], **EXACT)
    torch.testing.assert_close(calm_saliency(made, x, y).sum((1, 2, 3)), one, **EXACT)
    torch.testing.assert_close(calm_location_given_class(made, x, y).sum((1, 2, 3)), one, **EXACT)
    every = torch.arange(5).expand(3, 5)
    g = per_class(calm_class_given_location)(made, x, every).sum(1)
    torch.testing.assert_close(g, torch.ones_like(g), **EXACT)


@pytest.mark.parametrize("r", [2, 4, 8])
def test_enlarged_bilinearly_the_attribution_sums_to_the_square_of_the_factor(made, x, y, r):
    enlarged = resize(calm_attribution(made, x, y), (6 * r, 8 * r))
    p = made(x).exp()[torch.arange(3), y]
    torch.testing.assert_close(enlarged.sum((1, 2, 3)), r**2 * p, rtol=0, atol=1e-10)


def test_the_counterfactual_is_antisymmetric(made, x):
    a, b = torch.full((3,), 1), torch.full((3,), 4)
    there, back = contrast(calm_attribution, 4)(made, x, a), contrast(calm_attribution, 1)(made, x, b)
    assert torch.equal(there, -back)
    torch.testing.assert_close(there, calm_attribution(made, x, a) - calm_attribution(made, x, b), **EXACT)
    assert there.min() < 0 < there.max()
    assert not contrast(calm_attribution, 1)(made, x, a).any()


def test_over_all_classes_the_attribution_is_the_saliency(made, x, y):
    torch.testing.assert_close(over(calm_attribution, range(5))(made, x, y), calm_saliency(made, x), **EXACT)
    two = over(calm_attribution, {3: [3, 1]})(made, x[:1], y[:1])
    torch.testing.assert_close(two[0, 0], joint_of(made, x)[0, [1, 3]].exp().sum(0), **EXACT)


@pytest.mark.parametrize("method", OF_A_CLASS)
def test_several_classes_take_one_forward(made, x, method):
    calls = []
    handle = made.model.trunk.stem.register_forward_hook(lambda *_: calls.append(1))
    classes = torch.tensor([[0, 3], [2, 2], [1, 4]])
    maps = per_class(method)(made, x, classes)
    handle.remove()
    assert len(calls) == 1
    for n in range(2):
        torch.testing.assert_close(maps[:, n : n + 1], method(made, x, classes[:, n]), **EXACT)


@pytest.mark.parametrize("method", ALL)
def test_an_image_does_not_know_its_batch_and_nothing_is_left_behind(made, x, y, method, trace, plain):
    made.model.train()
    changed = trace(made.model, x, y)
    together = method(made, x, y)
    assert changed() == []
    assert not together.requires_grad
    for n in range(3):
        torch.testing.assert_close(together[n : n + 1], method(made, x[n : n + 1], y[n : n + 1]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ALL)
def test_what_does_not_fit_is_an_error(pooled, made, x, method, plain):
    with pytest.raises(UnsuitedError, match=r"Pooled does not; train one with `sightline train calm`, or use cam"):
        method(pooled, x, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"label 5 is outside 0\.\.4"):
        method(made, x, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match="NaN"):
        method(made, x.where(x < 0.9, math.nan), torch.tensor([0, 1, 2]))


# the axioms ------------------------------------------------------------------------------------------------------


def test_a_constant_added_to_all_class_maps_changes_nothing(made, x, y):
    """Implementation invariance: here the constant even differs from cell to cell."""
    before, p = [method(made, x, y) for method in ALL], made(x)
    made.model.classes.bias.data.add_(3.0)
    made.model.classes.weight.data.add_(torch.linspace(-1, 1, 6, dtype=x.dtype).view(1, 6, 1, 1))
    torch.testing.assert_close(made(x), p, rtol=0, atol=1e-10)
    for method, one in zip(ALL, before, strict=True):
        torch.testing.assert_close(method(made, x, y), one, rtol=0, atol=1e-10)


def test_cam_breaks_what_calm_keeps(pooled, x, y):
    """f -> f + C: p stays, CAM over its maximum does not; and its sum is not p."""

    def by_max(classifier):
        f = cam(classifier, x, y).relu()
        return f / f.amax((2, 3), keepdim=True)

    before, p = by_max(pooled), pooled(x).softmax(1)
    changed = copy.deepcopy(pooled)
    changed.model.head.weight.data.add_(torch.linspace(0, 1, 6, dtype=x.dtype))
    torch.testing.assert_close(changed(x).softmax(1), p, **EXACT)
    assert (by_max(changed) - before).abs().max() > 0.1
    assert ((before.sum((1, 2, 3)) - p[torch.arange(3), y]).abs() > 0.1).all()


# numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logarithm_of_softplus_neither_underflows_nor_loses_its_gradient(dtype):
    a = torch.tensor([-1e4, -200.0, -16.001, -15.999, -1.0, 0.0, 30.0, 1e4], dtype=dtype, requires_grad=True)
    found = log_softplus(a)
    (slope,) = torch.autograd.grad(found.sum(), a)
    for value, z, d in zip(a.tolist(), found.tolist(), slope.tolist(), strict=True):
        soft = value if value > 40 else math.log1p(math.exp(value))
        expected = value if soft < 1e-40 else math.log(soft)
        assert z == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-12, abs=1e-12)
        assert d == pytest.approx(1.0 if value < -100 else 1 / (1 + math.exp(-value)) / soft, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-700, 700), min_size=1, max_size=5))
def test_the_logarithm_of_softplus_grows_and_is_smooth(values):
    a = torch.tensor(sorted(values), dtype=torch.float64, requires_grad=True)
    found = log_softplus(a)
    (slope,) = torch.autograd.grad(found.sum(), a)
    assert (found.diff() >= 0).all()
    assert ((slope > 0) & (slope <= 1)).all()


@both
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_or_huge_attention_never_gives_nan(pooled, x, activation, detach, dtype):
    made = surgery(pooled, activation=activation, detach=detach)
    made.model.to(dtype)
    for bias in (-1e4, -200.0, 1e4):
        made.model.attention.bias.data.fill_(bias)
        made.model.zero_grad()
        logits = made.model(made.normalize(x))
        logits[:, 0].sum().backward()
        assert logits.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in made.model.parameters())
    made.model.attention.bias.data.fill_(-1e4)
    h = calm_saliency(made, x)
    if activation == "relu":
        torch.testing.assert_close(h, torch.full_like(h, 1 / 48))
    assert log_relu(torch.tensor([-3.0])).item() == pytest.approx(math.log(EPS))


def test_half_precision_counts_in_32_bits(pooled, x):
    made = surgery(pooled)
    made.model.to(torch.bfloat16)
    assert made(x).dtype == torch.float32
    assert calm_attribution(made, x).sum().item() == pytest.approx(made(x).exp().amax(1).sum().item(), rel=1e-6)


# the network -----------------------------------------------------------------------------------------------------


def test_surgery_keeps_the_trunk_and_leaves_the_classifier_alone(pooled, x, trace, plain):
    changed = trace(pooled.model)
    made = surgery(pooled, seed=5)
    assert changed() == []
    assert made.layer == "trunk.last"
    assert (made.mean, made.std, made.size, made.classes) == (pooled.mean, pooled.std, pooled.size, pooled.classes)
    assert torch.equal(made.features(x), pooled.features(x))
    names = set(made.model.state_dict())
    kept = {f"trunk.{name}" for name in pooled.model.state_dict() if not name.startswith("head.")}
    assert names == kept | {f"{part}.{name}" for part in ("classes", "attention") for name in ("weight", "bias")}
    assert not any(module.training for module in made.model.modules())
    assert made.model.classes.weight.dtype == torch.float64
    with pytest.raises(UnsuitedError, match="a CALM network already"):
        surgery(made)


def test_the_new_weights_are_xavier_uniform_and_their_seeds_own(pooled):
    state = torch.get_rng_state()
    first, again, other = (surgery(pooled, seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.classes.weight, again.classes.weight)
    assert torch.equal(first.attention.weight, again.attention.weight)
    assert not torch.equal(first.classes.weight, other.classes.weight)
    for layer, outputs in ((first.classes, 5), (first.attention, 1)):
        bound = math.sqrt(6 / (6 + outputs))
        assert 0.5 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_the_layer_passes_on_zeros_and_its_gradient_comes_back(made, x, y):
    """What a method sees at the layer is what the two convolutions read."""
    A, G = made.features_and_gradient(x, y)
    leaf = A.clone().requires_grad_()
    model = made.model
    log_s = {"softplus": log_softplus, "relu": log_relu}[model.activation](model.attention(leaf))
    joint = model.classes(leaf).log_softmax(1) + log_s - log_s.logsumexp((2, 3), keepdim=True)
    values = joint.logsumexp((2, 3))[torch.arange(3), y]
    (expected,) = torch.autograd.grad(values.sum(), leaf)
    torch.testing.assert_close(G, expected, **EXACT)
    behind = []
    with torch.no_grad():
        handle = model.trunk.pool.register_forward_hook(lambda _, inputs, __: behind.append(inputs[0]))
        made(x)
        handle.remove()
    assert not behind[0].any()


@pytest.mark.parametrize("method", [grad_cam, gradient, partial(integrated_gradients, steps=4), ablation_cam])
def test_methods_for_any_network_work_on_it(made, x, y, method, trace, plain):
    changed = trace(made.model, x)
    saliency = method(made, x, y)
    assert changed() == []
    assert saliency.isfinite().all()
    assert (saliency.amax((1, 2, 3)) > saliency.amin((1, 2, 3))).all()


def test_it_is_probed_wrapped_copied_and_stored_like_any_network(made, x):
    assert made.at("trunk.last.1").layer == "trunk.last.1"
    assert wrap(made.model, layer="trunk.last", normalization="none", size=(24, 32)).layer == "trunk.last"
    with pytest.raises(ValueError, match=r"gets no gradient: its cells do not reach the logits; use '\w+'"):
        made.at("trunk.pool")
    copied = copy.deepcopy(made)
    assert torch.equal(copied(x), made(x))
    copied.model.classes.weight.data.zero_()
    assert not torch.equal(copied(x), made(x))
    content = io.BytesIO()
    torch.save(made.model.state_dict(), content)
    content.seek(0)
    copied.model.load_state_dict(torch.load(content, weights_only=True))
    assert torch.equal(copied(x), made(x))


def test_it_is_saved_and_loaded(tmp_path):
    settings = {"backbone": {"name": "mini_resnet", "classes": 3, "widths": [4, 4, 6, 8]}, "finer": 1, "detach": True}
    made = calm(**settings, seed=4)
    for parameter in made.model.parameters():
        parameter.data.add_(0.01)
    path = models.save(
        replace(made, classes=("a", "b", "c")),
        tmp_path / "calm.safetensors",
        model=Choice("calm", settings),
    )
    loaded = models.load(str(path))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert loaded.layer == "trunk.layer4"
    assert loaded.classes == ("a", "b", "c")
    assert loaded.model.detach
    assert torch.equal(loaded(x), made(x))


def test_calm_takes_size_and_weights_from_its_backbone():
    made = calm("mini_resnet?classes=4&seed=2", size=32, activation="relu")
    plain = models.load("mini_resnet?classes=4&seed=2&size=32")
    assert made.size == (32, 32)
    assert made.model.activation == "relu"
    assert torch.equal(made.model.trunk.stem[0].weight, plain.model.stem[0].weight)
    assert made(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_one_output_makes_two_classes(networks, seeded, x):
    one = wrap(seeded(networks.pooled, classes=1), layer="last", normalization="none", size=(24, 32))
    assert surgery(one)(x).shape == (3, 2)


def test_layers_that_keep_channels_last_or_tokens_are_put_on_the_grid(tokens, x):
    from torchvision.models import SwinTransformer

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        swin = SwinTransformer([4, 4], 8, [1, 1], [1, 2], [2, 2], num_classes=3)
    classifier = wrap(swin, layer="norm", normalization="none", size=(32, 48))
    made = surgery(classifier)
    x32 = torch.rand(2, 3, 32, 48)
    assert calm_attribution(made, x32).shape == (2, 1, 4, 6)
    torch.testing.assert_close(calm_attribution(made, x32).sum((1, 2, 3)), made(x32).amax(1).exp())
    assert made.features(x32).shape == (2, 16, 4, 6)
    with pytest.raises(UnsuitedError, match="Tokens cannot run without what follows 'norm1'"):
        surgery(tokens)


class Inplace(nn.Module):
    """As DenseNet: what follows the layer changes its output in place."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(3, 6, 3, 4, 1)
        self.head = nn.Sequential(nn.Sequential(nn.Linear(6, 4)))

    def forward(self, x):
        return self.head(nn.functional.relu(self.last(x), inplace=True).mean((2, 3)))


def test_what_follows_the_layer_cannot_change_it(seeded, x):
    made = surgery(wrap(seeded(Inplace), layer="last", normalization="none", size=(24, 32)))
    assert [name for name, _ in made.model.trunk.named_modules()] == ["", "last", "head"]
    A = made.features(x)
    assert A.min() < 0
    f = made.model.classes(A).log_softmax(1)
    with torch.no_grad():
        torch.testing.assert_close(made.model.joint(x).log_softmax(1), f, **EXACT)
    made.model(x).sum().backward()
    assert made.model.trunk.last.weight.grad.any()


def test_names_that_do_not_exist_are_errors(pooled, plain):
    with pytest.raises(LookupError, match="no activation called 'softmax'; did you mean softplus"):
        surgery(pooled, activation="softmax")
    with pytest.raises(LookupError, match="no layer called 'lost'"):
        Calm(pooled.model, "lost", channels=6, classes=5)


# finer maps ------------------------------------------------------------------------------------------------------


def cells(classifier):
    return tuple(classifier.features(torch.zeros(1, classifier.channels, *classifier.size)).shape[2:])


def mini(model, size, layer):
    return wrap(model, layer=layer, normalization="none", size=size)


@pytest.mark.parametrize("stages", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_each_stage_doubles_the_side_and_no_weight_changes(seeded, name, stages, trace, plain):
    make, layer = (MiniResNet, "layer4") if name == "resnet" else (MiniVGG, "features.33")
    widths = (4,) * (4 if name == "resnet" else 5)
    classifier = mini(seeded(make, 3, widths=widths, dtype=torch.float32), 32, layer)
    changed = trace(classifier.model)
    larger = finer(classifier, stages)
    assert changed() == []
    assert cells(larger) == (2 * 2**stages, 2 * 2**stages)
    old, new = (one.model.state_dict() for one in (classifier, larger))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_stride_changes_in_the_main_path_and_the_projection_without_dilation(seeded):
    larger = finer(mini(seeded(MiniResNet, 3, widths=(4, 4, 4, 4), dtype=torch.float32), 32, "layer4"), 1).model
    assert larger.layer4.conv1.stride == larger.layer4.shortcut[0].stride == (1, 1)
    assert larger.layer3.conv1.stride == larger.layer3.shortcut[0].stride == (2, 2)
    assert all(one.dilation == (1, 1) for one in larger.modules() if isinstance(one, nn.Conv2d))


def test_a_pooling_without_overlap_goes_and_the_one_behind_the_layer_stays(seeded):
    larger = finer(mini(seeded(MiniVGG, 3, widths=(4,) * 5, dtype=torch.float32), 32, "features.33"), 1).model
    kinds = [type(larger.features[n]).__name__ for n in (6, 13, 20, 27, 34)]
    assert kinds == ["MaxPool2d", "MaxPool2d", "MaxPool2d", "Identity", "MaxPool2d"]


@pytest.mark.parametrize(
    ("name", "size", "before", "after"),
    [
        ("resnet18", 64, 2, {1: 4, 2: 8, 3: 16}),
        ("vgg11_bn", 32, 2, {1: 4, 2: 8}),
        ("densenet121", 64, 2, {1: 4, 2: 8}),
        ("mobilenet_v3_small", 64, 2, {1: 4, 2: 8}),
        ("googlenet", 96, 3, {1: 6, 2: 10}),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_networks_of_torchvision_grow_without_being_known(name, size, before, after):
    from torchvision.models import get_model

    layer = {"vgg11_bn": "features.27", "resnet18": "layer4", "googlenet": "inception5b"}.get(name, "features")
    settings = {"init_weights": False} if name in ("vgg11_bn", "googlenet") else {}
    with torch.random.fork_rng([]):
        model = get_model(name, num_classes=4, **settings).eval()
        if name == "vgg11_bn":
            model.classifier = nn.Linear(512 * 49, 4)
    classifier = wrap(model, layer=layer, normalization="imagenet", size=size)
    assert cells(classifier) == (before, before)
    for stages, side in after.items():
        assert cells(finer(classifier, stages)) == (side, side)


def test_bottlenecks_at_224_give_the_papers_28_cells():
    """ResNet-50 with one block a stage: the stride is in its 3x3 convolutions and its projections."""
    from torchvision.models.resnet import Bottleneck, ResNet

    with torch.random.fork_rng([]):
        model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=4, width_per_group=8)
    classifier = wrap(model, layer="layer4", normalization="imagenet", size=224)
    made = surgery(classifier, finer=2)
    assert cells(made) == (28, 28)
    blocks = [made.model.trunk.layer2[0], made.model.trunk.layer3[0], made.model.trunk.layer4[0]]
    assert [block.conv2.stride[0] for block in blocks] == [2, 1, 1]
    assert [block.downsample[0].stride[0] for block in blocks] == [2, 1, 1]


class Sliced(nn.Module):
    """Halves its map once by a convolution, and once in a way that no module shows."""

    def __init__(self, pool):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, 2, 1)
        self.pool = pool
        self.two = nn.Conv2d(4, 4, 3, 1, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        a = self.pool(self.one(x))
        return self.head(self.two(a).mean((2, 3)))


class Doubled(nn.Module):
    def forward(self, x):
        return x[..., ::2, ::2]


def test_an_overlapping_pooling_gets_stride_one():
    classifier = mini(Sliced(nn.MaxPool2d(3, 2, 1)).eval(), 16, "two")
    larger = finer(classifier, 1)
    assert (cells(classifier), cells(larger)) == ((4, 4), (8, 8))
    assert larger.model.pool.stride == (1, 1)
    assert classifier.model.pool.stride == 2


def test_networks_whose_maps_cannot_grow_are_errors(tokens):
    classifier = mini(Sliced(Doubled()).eval(), 16, "two")
    with pytest.raises(ValueError, match=r"Sliced has 1 halvings before layer 'two' .*to 8x8\); expected finer=0..1"):
        finer(classifier, 2)
    with pytest.raises(ValueError, match=r"Tokens has 0 halvings before layer 'norm1' .*to none\)"):
        finer(tokens, 1)
    with pytest.raises(ValueError, match="expected finer >= 0"):
        finer(classifier, -1)


class Constant(Sliced):
    """Whatever comes, its last map has 4 x 4 cells."""

    def forward(self, x):
        a = nn.functional.adaptive_avg_pool2d(self.pool(self.one(x)), 4)
        return self.head(self.two(a).mean((2, 3)))


class Joined(Sliced):
    """Adds a half that a function makes to one that a module makes."""

    def forward(self, x):
        a = self.pool(self.one(x))
        return self.head(self.two(a + nn.functional.max_pool2d(x, 4)[:, :1]).mean((2, 3)))


def test_a_map_that_does_not_grow_or_a_network_that_does_not_run_is_an_error():
    pool = nn.AvgPool2d(2)
    with pytest.raises(ValueError, match=r"gives a map of 4x4 after 4x4, expected 2 times the side"):
        finer(mini(Constant(pool).eval(), 16, "two"), 1)
    with pytest.raises(ValueError, match=r"Joined with its last 1 halvings left out cannot run"):
        finer(mini(Joined(pool).eval(), 16, "two"), 1)
