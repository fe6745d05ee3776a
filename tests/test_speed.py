"""The fast classifier gives the plain one's answers, whoever looks inside it, and leaves the plain one alone."""

import copy
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from sightline import hooks
from sightline.attention import Kept, attention, keeps
from sightline.classifier import UnsuitedError, wrap
from sightline.maps import unit
from sightline.memory import at_once
from sightline.methods import METHODS
from sightline.models import MiniResNet, MiniVGG, MiniViT
from sightline.speed import Passing, Prepared, fast, folded, packable, same

SIDE = 32

NETWORKS = {
    "resnet": lambda: MiniResNet(7, widths=(8, 8, 16, 24)),
    "vgg": lambda: MiniVGG(7, widths=(8, 8, 16, 24, 32)),
    "vit": lambda: MiniViT(7, dim=48, depth=3, patch=4, size=SIDE),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=7),
    "densenet": lambda: timm.create_model("densenet121", block_config=(2, 2), growth_rate=8, num_classes=7),
}

PACKS = packable(torch.zeros(1))
"""Whether this machine has oneDNN."""

MAPS = ("cam", "grad_cam", "grad_cam_pp", "score_cam", "ablation_cam", "eigen_cam", "gradient", "opti_cam")


def network_of(seeded, name, seed=2, dtype=torch.float32):
    """Build a network whose norms are such as those of a trained one: they fit what they read."""
    model = seeded(NETWORKS[name], seed=seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for norm in model.modules():
            if isinstance(norm, nn.LayerNorm):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, -0.5, 0.5)
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        nn.init.normal_(head(model).weight, std=0.2)
    x = torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        model.train()(x)
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def made(seeded):
    """Network and type -> the plain classifier and the exact one."""
    found = {}

    def of(name, dtype=torch.float32):
        if (name, dtype) not in found:
            classifier = wrap(
                network_of(seeded, name, dtype=dtype), normalization=((0.45, 0.5, 0.55), (0.25, 0.3, 0.2)), size=SIDE
            )
            found[name, dtype] = classifier, fast(classifier)
        return found[name, dtype]

    return of


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=["exact", "bf16"])
def precision(request):
    return request.param


def head(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def prepared(classifier):
    """Return the new forwards by the names of their modules."""
    modules = classifier.model.named_modules()
    return {name: one for name, module in modules if isinstance(one := vars(module).get("forward"), Prepared)}


def apart(found, expected):
    """Return the largest difference in units of the largest number."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-12))


def likeness(found, expected):
    return float(torch.corrcoef(torch.stack([found.flatten().double(), expected.flatten().double()]))[0, 1])


def explained(name, classifier, x):
    """Return maps; Opti-CAM's from 0 to 1, since their scale is that of rounding errors in dead channels."""
    entry = METHODS[name]
    maps = entry.method(classifier, x, torch.tensor([2, 0, 5])[: len(x)], **entry.quick)
    return unit(maps) if name == "opti_cam" else maps


# what is prepared


@pytest.mark.parametrize(("network", "norms"), [("resnet", 12), ("vgg", 10), ("vit", 0), ("efficientnet", 13)])
def test_every_batch_norm_behind_a_convolution_is_folded(network, norms, made):
    model = made(network)[1].model
    total = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    passing = sum(isinstance(vars(module).get("forward"), Passing) for module in model.modules())
    assert passing == total == norms


def test_a_densenet_folds_only_the_norms_that_read_a_convolution_alone(made):
    names = [name for name, one in prepared(made("densenet")[1]).items() if one.norm is not None]
    assert "features.conv0" in names
    assert "features.denseblock1.denselayer1.conv1" in names
    assert not any(name.endswith(("conv2", "transition1.conv")) for name in names)


def test_a_folded_weight_is_the_convolution_with_the_norm_behind_it(seeded):
    conv, norm = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    w, b = folded(conv, norm, torch.float64)
    for k in range(4):
        scale = norm.weight[k] / (norm.running_var[k] + norm.eps).sqrt()
        assert torch.allclose(w[k], conv.weight[k] * scale, rtol=1e-14, atol=0)
        assert torch.isclose(b[k], (conv.bias[k] - norm.running_mean[k]) * scale + norm.bias[k], rtol=1e-13, atol=0)


class Awkward(nn.Module):
    """Convolutions whose norm must not be folded, and one whose norm may."""

    def __init__(self):
        super().__init__()
        self.twice, self.twice_norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.shared, self.shared_norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.boxed, self.boxed_norm = nn.Sequential(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)
        self.edged, self.edged_norm = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)
        self.batch, self.batch_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.bent, self.bent_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.good, self.good_norm = nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)
        self.fine, self.fine_norm = nn.Conv2d(6, 6, 3, 2), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 7)

    def forward(self, x):
        x = self.twice_norm(self.twice(self.twice_norm(self.twice(x))))
        z = self.shared(x)
        x = self.shared_norm(z) + z.detach().abs()
        x = self.boxed_norm(self.boxed(x))
        x = self.edged_norm(self.edged(x))
        x = self.batch_norm(self.batch(x))
        x = self.bent_norm(self.bent(x).relu_())
        x = self.fine_norm(self.fine(self.good_norm(self.good(x)).relu()))
        return self.head(x.relu().mean((2, 3)))


def test_a_norm_is_not_folded_where_that_is_not_safe(seeded, images, precision):
    model = seeded(Awkward, dtype=torch.float32)
    model.batch_norm.running_mean = model.batch_norm.running_var = None
    classifier = wrap(model, layer="fine_norm", normalization="none", size=SIDE)
    quick = fast(classifier, precision=precision)
    assert [name for name, one in prepared(quick).items() if one.norm is not None] == ["fine"]
    assert apart(quick(images), classifier(images)) < {"exact": 1e-5, "bf16": 3e-2}[precision]


class Odd(nn.Module):
    """A convolution whose weight is made by a hook, and a head that is no linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3, padding=1)), nn.BatchNorm2d(4)
        self.head = nn.Bilinear(4, 4, 3)

    def forward(self, x):
        z = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(z, z)


def test_a_network_of_odd_layers_stays_as_it_is(seeded, images):
    classifier = wrap(seeded(Odd, dtype=torch.float32), normalization="none", size=SIDE)
    quick = fast(classifier)
    assert prepared(quick) == {}
    assert apart(quick(images), classifier(images)) < 1e-5


@pytest.mark.skipif(not PACKS, reason="no oneDNN here")
def test_packed_weights_are_used_forth_and_back(made, images):
    quick = copy.deepcopy(made("resnet")[1])
    quick(images)
    layers = prepared(quick).values()
    assert all(set(one.ready) == {("forth", torch.float32)} for one in layers)
    quick.gradient(images, None)
    assert all(set(one.ready) == {("forth", torch.float32), ("back", torch.float32)} for one in layers)


# same answers


@pytest.mark.parametrize("network", NETWORKS)
def test_exact_logits_and_features_agree_to_rounding(network, made, images):
    plain, quick = made(network)
    assert apart(quick(images), plain(images)) < 1e-5
    assert apart(quick.features(images), plain.features(images)) < 1e-5


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("network", ["resnet", "vgg", "vit"])
def test_exact_maps_agree_to_one_in_ten_thousand(network, name, made, images):
    plain, quick = made(network)
    try:
        expected = explained(name, plain, images)
    except UnsuitedError:
        with pytest.raises(UnsuitedError):
            explained(name, quick, images)
        return
    assert apart(explained(name, quick, images), expected) < 1e-4


@pytest.mark.parametrize("network", ["resnet", "vit"])
def test_every_method_agrees_in_float64(network, made, images):
    plain, quick = made(network, torch.float64)
    x = images[:2].double()
    compared = 0
    for name, entry in METHODS.items():
        if {"CALM", "segmenter"} & set(entry.needs) or name in ("lime", "gradient_shap"):
            continue
        try:
            expected = explained(name, plain, x)
        except UnsuitedError as error:
            with pytest.raises(UnsuitedError, match=str(error)[:20]):
                explained(name, quick, x)
            continue
        compared += 1
        assert apart(explained(name, quick, x), expected) < 1e-9, name
    assert compared > 20


@pytest.mark.parametrize("network", NETWORKS)
def test_bfloat16_is_near_and_comes_out_in_float32(network, made, images):
    plain, quick = made(network)[0], fast(made(network)[0], precision="bf16")
    for found, expected in ((quick(images), plain(images)), (quick.features(images), plain.features(images))):
        assert found.dtype == torch.float32
        assert 0 < apart(found, expected) < 0.05
    map_ = explained("hires_cam", quick, images)
    assert map_.dtype == torch.float32
    assert likeness(map_, explained("hires_cam", plain, images)) > 0.98


@pytest.mark.parametrize("name", ["score_cam", "ablation_cam", "opti_cam", "layer_cam", "gradient"])
@pytest.mark.parametrize("network", ["resnet", "vit"])
def test_bfloat16_maps_look_the_same(network, name, made, images):
    plain, quick = made(network)[0], fast(made(network)[0], precision="bf16")
    found = explained(name, quick, images)
    assert found.dtype == torch.float32
    assert likeness(found, explained(name, plain, images)) > (0.9 if name in ("gradient", "opti_cam") else 0.98)


@pytest.mark.parametrize("name", ["full_grad", "guided_backprop", "excitation_backprop", "deconvnet"])
@pytest.mark.parametrize("network", ["resnet", "vgg"])
def test_who_replaces_functions_gets_the_network_as_it_was(network, name, made, images, precision):
    plain = made(network)[0]
    quick = fast(plain, precision=precision)
    quick(images)
    try:
        expected = explained(name, plain, images)
    except UnsuitedError:
        return
    assert apart(explained(name, quick, images), expected) < 1e-4


def test_attention_is_read_in_full_precision(made, images):
    plain = made("vit")[0]
    quick = fast(plain, precision="bf16")
    expected = explained("transformer_attribution", plain, images)
    assert apart(explained("transformer_attribution", quick, images), expected) < 1e-3


def heads(tokens, *, keys=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (tokens, keys or tokens, keys or tokens)
    return [torch.randn(2, size, 3, 16, generator=generator).transpose(1, 2).bfloat16() for size in sizes]


def answers(f, inputs, **settings):
    """Return the output and the gradients of its square's sum."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    output = f(*leaves, **settings)
    return output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)


@pytest.mark.parametrize("settings", [{}, {"scale": 0.3}, {"dropout_p": 0.0, "is_causal": False}])
@pytest.mark.parametrize("keys", [None, 5])
def test_attention_that_keeps_its_weights_is_as_near_as_torchs(keys, settings):
    q, k, v = heads(11, keys=keys)
    Q, K, V = (one.double().requires_grad_() for one in (q, k, v))
    weights = (Q @ K.mT * settings.get("scale", 16**-0.5)).softmax(-1)
    output = weights @ V
    expected = (output.detach(), *torch.autograd.grad(output.square().sum(), (Q, K, V)))
    assert keeps(*(one.clone().requires_grad_() for one in (q, k, v)))
    for found, right in zip(answers(attention, (q, k, v), **settings), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - right).norm() <= 0.01 * right.norm()


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"attn_mask": torch.ones(11, 11, dtype=torch.bool).tril()}, 11),
        ({"is_causal": True}, 11),
        ({}, 513),
    ],
)
def test_other_attention_is_torchs(settings, tokens, monkeypatch):
    monkeypatch.setattr(Kept, "forward", None)
    inputs = heads(tokens)
    expected = answers(F.scaled_dot_product_attention, inputs, **settings)
    for found, right in zip(answers(attention, inputs, **settings), expected, strict=True):
        assert torch.equal(found, right)


def test_attention_is_called_by_keyword_too():
    q, k, v = heads(11)
    expected = answers(attention, (q, k, v))

    def by_name(*leaves):
        return attention(value=leaves[2], query=leaves[0], key=leaves[1], scale=0.25)

    for found, right in zip(answers(by_name, (q, k, v)), expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("network", ["resnet", "vit"])
def test_in_float64_bfloat16_folds_alone(network, made, images):
    plain = made(network, torch.float64)[0]
    quick, x = fast(plain, precision="bf16"), images.double()
    assert apart(quick(x), plain(x)) < 1e-12
    assert apart(quick.gradient(x, None), plain.gradient(x, None)) < 1e-9


def test_without_a_gradient_or_in_float32_attention_is_torchs(monkeypatch):
    monkeypatch.setattr(Kept, "forward", None)
    inputs = heads(11)
    with torch.no_grad():
        assert torch.equal(attention(*inputs), F.scaled_dot_product_attention(*inputs))
    wide = [one.float() for one in inputs]
    for found, right in zip(answers(attention, wide), answers(F.scaled_dot_product_attention, wide), strict=True):
        assert torch.equal(found, right)


@pytest.mark.skipif(not PACKS, reason="this machine has no oneDNN")
def test_a_transformer_in_bfloat16_keeps_its_attention_on_the_way_to_a_gradient(seeded, images, monkeypatch):
    settings = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
    network = seeded(lambda: timm.models.VisionTransformer(**settings), dtype=torch.float32)
    plain, runs, kept = wrap(network, normalization="none"), [], Kept.forward
    monkeypatch.setattr(Kept, "forward", lambda ctx, *args: runs.append(1) or kept(ctx, *args))
    quick = fast(plain, precision="bf16")
    quick(images)
    fast(plain).gradient(images, None)
    explained("transformer_attribution", quick, images)
    with hooks.substituted({}):
        quick.gradient(images, None)
    assert runs == []
    found = quick.gradient(images, None)
    assert len(runs) == 3
    assert likeness(found, plain.gradient(images, None)) > 0.99


def test_an_exact_map_does_not_depend_on_its_batch(made, images):
    x = images.double()
    for network in ("resnet", "vit"):
        quick = made(network, torch.float64)[1]
        for name in ("grad_cam", "opti_cam", "gradient"):
            together, alone = explained(name, quick, x), explained(name, quick, x[:1])
            assert apart(together[:1], alone) < 1e-9


def test_a_network_under_autocast_of_its_user_runs_in_that_precision(made, images):
    plain, quick = made("resnet")
    with torch.autocast("cpu", torch.bfloat16):
        found = quick(images)
    assert 1e-5 < apart(found, plain(images)) < 0.05


# layers


@pytest.mark.parametrize("network", ["resnet", "vgg", "vit"])
def test_every_layer_means_what_it_meant(network, made, images):
    plain, quick = made(network)
    for name, module in plain.model.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.LayerNorm):
            with hooks.capture(plain.model, [name]) as expected, hooks.capture(quick.model, [name]) as found:
                plain(images)
                quick(images)
            assert apart(found[name], expected[name]) < 1e-5, name


def test_another_layer_can_be_explained_even_a_folded_convolution(made, images):
    plain, quick = made("resnet", torch.float64)
    x = images.double()
    convolutions = [name for name, one in prepared(quick).items() if one.norm is not None][-3:]
    for name in convolutions:
        expected = explained("grad_cam", plain.at(name), x)
        assert apart(explained("grad_cam", quick.at(name), x), expected) < 1e-9
        assert apart(explained("opti_cam", fast(plain.at(name)), x), explained("opti_cam", plain.at(name), x)) < 1e-9


def test_the_chosen_layer_and_all_else_that_is_known_stays(made):
    plain, quick = made("resnet")
    assert replace(quick, model=plain.model).__dict__ == plain.__dict__
    assert [name for name, _ in quick.model.named_modules()] == [name for name, _ in plain.model.named_modules()]
    assert list(quick.model.state_dict()) == list(plain.model.state_dict())


# state


def test_the_network_itself_is_left_alone(seeded, trace, images, plain):
    model = seeded(NETWORKS["resnet"], dtype=torch.float32).train()
    classifier = wrap(model, normalization="none", size=SIDE)
    changed = trace(model, images)
    quick = fast(classifier, precision="bf16")
    quick.gradient(images, None)
    assert changed() == []
    assert not any(parameter.requires_grad for parameter in quick.model.parameters())
    assert not any(module.training for module in quick.model.modules())


def test_a_fast_classifier_can_be_pickled_and_copied(made, images, precision):
    quick = fast(made("resnet")[0], precision=precision)
    expected = quick(images)
    for again in (pickle.loads(pickle.dumps(quick)), copy.deepcopy(quick), fast(quick, precision=precision)):
        assert torch.equal(again(images), expected)
        assert sum(one.norm is not None for one in prepared(again).values()) == 12
        with torch.no_grad():
            head(again.model).weight.zero_()
        assert not torch.equal(again(images), expected)
    assert torch.equal(quick(images), expected)


def test_new_weights_are_noticed(made, seeded, images):
    quick = copy.deepcopy(made("resnet")[1])
    quick.gradient(images, None)
    other = network_of(seeded, "resnet", seed=9)
    quick.model.load_state_dict(other.state_dict())
    expected = replace(quick, model=other)
    assert apart(quick(images), expected(images)) < 1e-5
    assert apart(quick.gradient(images, None), expected.gradient(images, None)) < 1e-4


def test_weights_that_are_replaced_again_and_again_are_noticed(images):
    quick = fast(
        wrap(
            nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            layer="0",
            normalization="none",
            size=SIDE,
        )
    )
    conv = quick.model[0]
    for seed in range(12):
        for some in (2 * seed, 2 * seed + 1):
            conv.weight = nn.Parameter(torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(some)))
        expected = nn.functional.conv2d(quick.normalize(images), conv.weight, conv.bias).mean((2, 3))
        assert apart(quick(images), expected) < 1e-5, seed


def test_a_new_eps_is_noticed(made, seeded, images):
    plain, quick = (copy.deepcopy(one) for one in made("resnet"))
    for one in (plain, quick):
        one(images)
        for norm in one.model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = 0.1
    assert apart(quick(images), plain(images)) < 1e-5


def test_bfloat16_may_be_off_by_its_own_rounding_alone():
    y = torch.linspace(-1, 1, 64)
    assert same((y + 1e-6).bfloat16(), y.bfloat16())
    assert not same((0.9 * y).bfloat16(), y.bfloat16())


def test_a_network_moved_to_another_precision_follows(made, images):
    plain, quick = made("resnet")
    double = replace(quick, model=copy.deepcopy(quick.model).double())
    expected = replace(plain, model=copy.deepcopy(plain.model).double())
    assert apart(double(images.double()), expected(images.double())) < 1e-12


def test_a_norm_in_training_counts_its_batch(made, images):
    plain, quick = (copy.deepcopy(one) for one in made("resnet"))
    for one in (plain, quick):
        one.model.train()
    x = plain.normalize(images)
    assert apart(quick.model(x), plain.model(x)) < 1e-5


def test_an_unknown_precision_is_an_error(made, plain):
    with pytest.raises(ValueError, match="expected precision='exact' or precision='bf16', got 'fp8'"):
        fast(made("resnet")[0], precision="fp8")


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "dilation", "groups"),
    [
        ((9, 7), 3, 2, 1, 1, 1),
        ((8, 8), 4, 4, 0, 1, 1),
        ((9, 11), 4, 4, 0, 1, 1),
        ((9, 8), 3, 1, 2, 2, 2),
        ((7, 10), 5, 2, 2, 1, 4),
    ],
)
@pytest.mark.skipif(not PACKS, reason="no oneDNN here")
def test_a_packed_convolution_is_the_convolution_forth_and_back(shape, kernel, stride, padding, dilation, groups):
    generator = torch.Generator().manual_seed(3)
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups).requires_grad_(False)
    x = torch.rand(2, 4, *shape, generator=generator)
    leaf = x.clone().requires_grad_()
    expected = F.conv2d(leaf, conv.weight, conv.bias, stride, padding, dilation, groups)
    g = torch.rand(expected.shape, generator=generator)
    (gradient,) = torch.autograd.grad(expected, leaf, g)
    layer = Prepared(conv)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        with torch.no_grad():
            assert apart(layer.forth(x.to(dtype)), expected) < near
            assert apart(layer.back(g.to(dtype), x.shape), gradient) < near


# what the methods do with it


class Forwards:
    """How many images a network was given."""

    def __init__(self, model):
        self.count, self.largest = 0, 0
        model.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        self.count += len(output)
        self.largest = max(self.largest, len(output))


def test_score_cam_asks_once_for_channels_that_are_the_same_everywhere(pooled, x):
    with torch.no_grad():
        pooled.model.last[1].weight[:3] = 0
        pooled.model.last[1].bias[:2], pooled.model.last[1].bias[2] = -1, 0.7
    A, y = pooled.features(x), torch.tensor([1, 0, 3])
    u = torch.zeros(A.shape[:2], dtype=x.dtype)
    for i in range(3):
        for k in range(A.shape[1]):
            up = F.interpolate(A[i : i + 1, k : k + 1], x.shape[2:], mode="bilinear")
            flat = bool((A[i, k] == A[i, k, 0, 0]).all())
            mask = torch.zeros_like(up) if flat else (up - up.min()) / (up.max() - up.min())
            u[i, k] = pooled(x[i : i + 1] * mask)[0, y[i]]
    expected = (u.softmax(1)[:, :, None, None] * A).sum(1, keepdim=True).relu()
    seen = Forwards(pooled.model)
    assert torch.allclose(METHODS["score_cam"].method(pooled, x, y), expected, rtol=1e-12)
    channels = [int((A[i].amax((1, 2)) > A[i].amin((1, 2))).sum()) for i in range(3)]
    assert max(channels) <= 3
    assert seen.count == len(x) + sum(channels) + 3


@pytest.mark.parametrize(("chunk", "largest"), [(None, 12), (2, 2)])
def test_insertion_and_score_cam_put_no_more_images_through_than_the_device_likes(chunk, largest, pooled, x):
    settings = {} if chunk is None else {"chunk": chunk}
    seen = Forwards(pooled.model)
    METHODS["score_cam"].method(pooled, x[:2], None, **settings)
    assert seen.largest == largest
    assert METHODS["score_cam"].method(pooled, x[:2], None, chunk=5).shape == (2, 1, 6, 8)


def test_a_cpu_likes_few_large_images_and_many_small_ones():
    assert [at_once(side, side, "cpu") for side in (1024, 448, 224, 112, 32)] == [4, 4, 8, 32, 64]
    assert at_once(1024, 1024, "cuda") == 64
