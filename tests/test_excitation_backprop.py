"""Excitation backprop, walked down again in slow loops."""

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from sightline import methods
from sightline.classifier import UnsuitedError, wrap
from sightline.methods import METHODS
from sightline.models import MiniResNet, MiniVGG

SIZE = (6, 8)


def bare(model, layer, size=SIZE):
    return wrap(model, layer=layer, normalization="none", size=size)


def same(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture
def x():
    return torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.fixture
def y():
    return torch.tensor([3, 1])


# --- the slow walk: vectors, dense matrices, loops ------------------------------------------------------------------


def dense(function, shape):
    """Return the matrix of an affine function of maps of this shape, without its constant."""
    size = torch.Size(shape).numel()
    with torch.no_grad():
        columns = function(torch.eye(size, dtype=torch.float64).view(size, *shape))
        return (columns - function(torch.zeros(1, *shape, dtype=torch.float64))).flatten(1).T


def descend(P, a, W):
    """Return the probabilities of the inputs a of units with weights W and probabilities P."""
    P, a, W, shape = P.flatten().tolist(), a.flatten().tolist(), W.clamp(min=0).tolist(), a.shape
    found = [0.0] * len(a)
    for p, row in zip(P, W, strict=True):
        total = sum(a_j * w for a_j, w in zip(a, row, strict=True))
        if total > 0:
            for j, (a_j, w) in enumerate(zip(a, row, strict=True)):
                found[j] += p * a_j * w / total
    return torch.tensor(found, dtype=torch.float64).view(shape)


def split(P, a, b):
    """Return the shares of two summands."""
    a, b = a.clamp(min=0), b.clamp(min=0)
    total = torch.where(a + b > 0, a + b, 1)
    return P * a / total, P * b / total


class Plain(nn.Module):
    """A rectified stem, then convolution with batch norm, ReLU, maximum pooling, mean and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.average, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        a = self.pool(self.relu(self.norm(self.conv(self.stem(x)))))
        return self.head(self.drop(self.average(a).flatten(1)))


@pytest.fixture
def plain_network(seeded):
    model = seeded(Plain, seed=5)
    with torch.no_grad():
        model.norm.weight[1] *= -1
    return model


def plain_walk(model, a, P):
    """Walk from the probabilities of what the head reads to those of the stem's output, for one image."""
    with torch.no_grad():
        z = model.norm(model.conv(a[None]))[0]
        b, winners = F.max_pool2d(z.relu()[None], 2, return_indices=True)
        P = descend(P, b[0], dense(lambda t: model.average(t).flatten(1), b.shape[1:]))
        up = torch.zeros(4, z[0].numel(), dtype=torch.float64)
        for k in range(4):
            for p, winner in zip(P[k].flatten(), winners[0, k].flatten(), strict=True):
                up[k, winner] += p
        return descend(up, a, dense(lambda t: model.norm(model.conv(t)), a.shape))


def pooled_of(model, a):
    with torch.no_grad():
        return model.average(model.pool(model.norm(model.conv(a[None])).relu())).flatten()


def test_two_layers_are_walked_down(plain_network, x, y):
    classifier = bare(plain_network, "stem")
    A, saliency = classifier.features(x), methods.excitation_backprop(classifier, x, y)
    for c in range(2):
        top = torch.zeros(4, dtype=torch.float64).index_fill(0, y[c], 1)
        P = descend(top, pooled_of(plain_network, A[c]), plain_network.head.weight.detach())
        same(saliency[c, 0], plain_walk(plain_network, A[c], P).sum(0))
    same(saliency.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("contrast", [None, "average", "drop", "pool", "relu", "stem"])
def test_the_contrastive_walk_is_the_difference_of_two(contrast, plain_network, x, y):
    """The paper's contrast lies right below the classes; the walk is linear in it, so a lower one gives the same."""
    classifier = bare(plain_network, "stem")
    A, saliency = classifier.features(x), methods.contrastive_excitation_backprop(classifier, x, y, contrast=contrast)
    for c in range(2):
        top = torch.zeros(4, dtype=torch.float64).index_fill(0, y[c], 1)
        b, W = pooled_of(plain_network, A[c]), plain_network.head.weight.detach()
        difference = descend(top, b, W) - descend(top, b, -W)
        assert abs(float(difference.sum())) < 1e-9
        same(saliency[c, 0], plain_walk(plain_network, A[c], difference).sum(0).relu())
    assert (saliency == 0).any()


def test_an_explained_layer_before_its_relu_gets_what_the_relu_gets(plain_network, x, y):
    for name in ("excitation_backprop", "contrastive_excitation_backprop"):
        before, behind = (METHODS[name](bare(plain_network, layer), x, y) for layer in ("norm", "relu"))
        same(before, behind)


class Residual(nn.Module):
    """A residual block: two convolutions beside a shortcut, added by `plus`."""

    def __init__(self, plus, projected):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU())
        self.one, self.two, self.plus = nn.Conv2d(3, 2, 3, 1, 1), nn.Conv2d(2, 3, 1), plus
        self.norm1, self.norm2 = nn.BatchNorm2d(2), nn.BatchNorm2d(3)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) if projected else nn.Identity()
        self.head = nn.Linear(3 * SIZE[0] * SIZE[1], 4)

    def summands(self, a):
        return self.norm2(self.two(self.norm1(self.one(a)).relu())), self.shortcut(a)

    def forward(self, x):
        return self.head(self.plus(*self.summands(self.stem(x))).relu().flatten(1))


def iadd(a, b):
    a += b
    return a


def dropped(a, b):
    a.add_(b)
    return a


SUMS = {
    "+": lambda a, b: a + b,
    "turned": lambda a, b: b + a,
    "+=": iadd,
    "add": lambda a, b: a.add(b),
    "add_": dropped,
    "torch.add": torch.add,
    "by name": lambda a, b: torch.add(input=a, other=b),
    "sum": lambda a, b: sum([a, b]),
    "constant": lambda a, b: (a + b) + 0.0,
}


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("plus", SUMS)
def test_a_residual_block_is_walked_down(plus, projected, seeded, x, y):
    model = seeded(Residual, SUMS[plus], projected, seed=2)
    classifier = bare(model, "stem")
    A, saliency = classifier.features(x), methods.excitation_backprop(classifier, x, y)
    for c in range(2):
        a, top = A[c], torch.zeros(4, dtype=torch.float64).index_fill(0, y[c], 1)
        with torch.no_grad():
            residual, shortcut = model.summands(a[None])
            inner = model.norm1(model.one(a[None])).relu()[0]
            P = descend(top, (residual + shortcut).relu(), model.head.weight.detach())
            left, right = split(P, residual, shortcut)
        inside = descend(left, inner, dense(lambda t: model.norm2(model.two(t)), inner.shape))
        found = descend(inside, a, dense(lambda t: model.norm1(model.one(t)), a.shape))
        found = found + (descend(right, a, dense(model.shortcut, a.shape)) if projected else right[0])
        same(saliency[c, 0], found.sum(0))


def test_a_scaled_summand_takes_a_scaled_share(seeded, x, y):
    for alpha in (2.0, -1.0):
        model = seeded(Residual, lambda a, b, alpha=alpha: torch.add(a, b, alpha=alpha), False, seed=2)
        scaled = seeded(Residual, SUMS["+"], True, seed=2)
        scaled.load_state_dict(model.state_dict(), strict=False)
        nn.init.dirac_(scaled.shortcut[0].weight)
        with torch.no_grad():
            scaled.shortcut[0].weight *= alpha
            scaled.shortcut[0].bias.zero_()
        scaled.shortcut[1] = nn.Identity()
        same(*(methods.excitation_backprop(bare(m, "stem"), x, y) for m in (model, scaled)))


def test_a_contrast_map_is_read_before_it_is_changed_in_place(seeded, x, y):
    maps = []
    for plus in ("+", "+="):
        classifier = bare(seeded(Residual, SUMS[plus], False, seed=2), "stem")
        maps.append(methods.contrastive_excitation_backprop(classifier, x, y, contrast="norm2"))
    assert maps[0].any()
    same(*maps)


def test_a_convolution_that_was_changed_in_place_is_no_part_of_a_batch_norm(seeded, x, y):
    class Between(Plain):
        def forward(self, x):
            a = self.conv(self.stem(x))
            a = self.relu(a) if self.relu.inplace else a.relu()
            return self.head(self.norm(a).relu().mean((2, 3)))

    models = [seeded(Between, seed=5) for _ in range(2)]
    models[0].relu.inplace = False
    same(*(methods.excitation_backprop(bare(model, "stem"), x, y) for model in models))


class Branches(nn.Module):
    """Branches that are concatenated, average pooling of features and of a convolution, and a batch norm on its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU())
        self.one, self.two = nn.Conv2d(3, 2, 3, 1, 1), nn.Conv2d(3, 2, 1)
        self.norm, self.head = nn.BatchNorm2d(7), nn.Linear(7, 4)

    def branches(self, a):
        return self.one(a).relu(), F.avg_pool2d(self.two(a), 3, 1, 1).relu(), F.avg_pool2d(a, 3, 1, 1)

    def forward(self, x):
        return self.head(self.norm(torch.cat(self.branches(self.stem(x)), 1)).relu().mean((2, 3)))


def test_branches_are_walked_down(seeded, x, y):
    model = seeded(Branches, seed=4)
    with torch.no_grad():
        model.norm.weight[::3] *= -1
    classifier = bare(model, "stem")
    A, saliency = classifier.features(x), methods.excitation_backprop(classifier, x, y)
    for c in range(2):
        a, top = A[c], torch.zeros(4, dtype=torch.float64).index_fill(0, y[c], 1)
        with torch.no_grad():
            both = torch.cat(model.branches(a[None]), 1)
            b = model.norm(both).relu()
        P = descend(top, b.mean((2, 3)), model.head.weight.detach())
        P = descend(P, b[0], dense(lambda t: t.mean((2, 3)), b.shape[1:]))
        P = descend(P, both[0], dense(model.norm, both.shape[1:]))
        parts = P[:2], P[2:4], P[4:]
        layers = model.one, lambda t: F.avg_pool2d(model.two(t), 3, 1, 1), lambda t: F.avg_pool2d(t, 3, 1, 1)
        found = sum(descend(part, a, dense(layer, a.shape)) for part, layer in zip(parts, layers, strict=True))
        same(saliency[c, 0], found.sum(0))


def test_a_convolution_that_is_pooled_into_logits_is_one_unit(seeded, x, y):
    """Class maps of either sign are no activations: convolution and pooling together read the features below."""
    model = seeded(MiniResNet, 4, widths=(3, 3, 4, 5), head="conv", seed=3)
    classifier = bare(model, "layer4", (64, 96))
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    A, w = classifier.features(x), model.head.weight.detach()[y, :, 0, 0][:, :, None, None]

    def shares(w):
        found = A * w.clamp(min=0)
        return found / found.sum((1, 2, 3), keepdim=True)

    same(methods.excitation_backprop(classifier, x, y), shares(w).sum(1, keepdim=True))
    difference = (shares(w) - shares(-w)).sum(1, keepdim=True).relu()
    same(methods.contrastive_excitation_backprop(classifier, x, y), difference)


def test_relu6_passes_above_its_ceiling(seeded, x, y):
    model = seeded(Plain, seed=5)
    model.relu, model.norm = nn.ReLU6(), nn.BatchNorm2d(4).double().eval()
    with torch.no_grad():
        model.norm.weight *= 40
    assert (model.norm(model.conv(model.stem(x))) > 6).any()
    saliency = methods.excitation_backprop(bare(model, "stem"), x, y)
    same(saliency.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))


# --- networks -------------------------------------------------------------------------------------------------------


def vgg(norm):
    """Build a VGG of torchvision's layers, of which the linear ones are small."""
    model = nn.Sequential()
    model.features = torchvision.models.vgg.make_layers([4, "M", 6, "M", 8, 8, "M"], batch_norm=norm)
    model.avgpool, model.flatten = nn.AdaptiveAvgPool2d(3), nn.Flatten()
    linear = (nn.Linear(72, 20), nn.ReLU(inplace=True), nn.Dropout())
    model.classifier = nn.Sequential(*linear, nn.Linear(20, 4))
    return model


NETWORKS = {
    "mini_vgg": (lambda: MiniVGG(4, widths=(4, 4, 4, 6, 8)), ("features.5", "features.33"), 32),
    "mini_resnet": (lambda: MiniResNet(4, widths=(4, 4, 6, 8)), ("stem", "layer2", "layer4"), 64),
    "vgg": (lambda: vgg(norm=False), ("features.2", "features.10"), 32),
    "vgg_bn": (lambda: vgg(norm=True), ("features.3", "features.14"), 32),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=4), ("maxpool", "layer2", "layer4"), 64),
    "googlenet": (
        lambda: torchvision.models.googlenet(num_classes=4, weights=None, init_weights=False),
        ("maxpool2", "inception5b"),
        64,
    ),
}


def network(name, seeded):
    make, layers, size = NETWORKS[name]
    return seeded(make, seed=1, dtype=torch.float32), layers, size


def without_biases(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_every_walk_arrives(name, seeded):
    """Nothing is made on the way, and nothing is lost but at units that are active by their bias alone."""
    model, layers, size = network(name, seeded)
    x, y = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 3])
    for layer in layers:
        classifier = replace_layer(model, layer, size)
        saliency = methods.excitation_backprop(classifier, x, y)
        assert (saliency >= 0).all()
        assert ((saliency.sum((1, 2, 3)) > 0.97) & (saliency.sum((1, 2, 3)) < 1.0001)).all()
        contrastive = methods.contrastive_excitation_backprop(classifier, x, y)
        assert (contrastive >= 0).all()
        assert ((contrastive.sum((1, 2, 3)) > 0) & (contrastive.sum((1, 2, 3)) < 1)).all()
        assert not torch.allclose(contrastive[:, 0], saliency[:, 0], atol=1e-4)
    without_biases(model)
    for layer in layers:
        saliency = methods.excitation_backprop(replace_layer(model, layer, size), x, y)
        torch.testing.assert_close(saliency.sum((1, 2, 3)), torch.ones(2), rtol=0, atol=1e-4)


def replace_layer(model, layer, size):
    """Explain a pooling too, which `wrap` refuses: the paper's GoogLeNet layer is one."""
    return replace(wrap(model, normalization="imagenet", size=size), layer=layer)


def test_googlenet_as_in_the_paper(seeded):
    """Signal at pool2/3x3_s2, contrast at pool5/7x7_s1."""
    model, _, size = network("googlenet", seeded)
    classifier = replace_layer(model.double(), "maxpool2", size)
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.tensor([1])
    paper = methods.contrastive_excitation_backprop(classifier, x, y, contrast="avgpool")
    same(methods.contrastive_excitation_backprop(classifier, x, y), paper)
    assert paper.shape == (1, 1, 8, 8)


# --- errors ---------------------------------------------------------------------------------------------------------

BOTH = ("excitation_backprop", "contrastive_excitation_backprop")


@pytest.mark.parametrize("name", BOTH)
def test_a_function_without_a_rule_is_an_error(name, tokens, curved, seeded):
    x = torch.rand(1, 3, 24, 32, dtype=torch.float64)
    for classifier, call in (
        (tokens, r"Tokens calls torch\.nn\.functional\.multi_head_attention_forward"),
        (curved, r"behind layer 'last' Curved calls torch\.tanh"),
        (bare(seeded(Residual, lambda a, b: a * b, False), "stem"), r"Residual calls torch\.Tensor\.mul"),
        (bare(seeded(Residual, lambda a, b: a + F.hardtanh(b), False), "stem"), "hardtanh with a negative floor"),
        (
            bare(seeded(Residual, lambda a, b: F.batch_norm(b, None, None, training=True), False), "stem"),
            "a batch norm",
        ),
    ):
        images = x[:, :, :6, :8] if classifier.size == SIZE else x
        with pytest.raises(UnsuitedError, match=f"has rules for .*{call}.*or use grad_cam, opti_cam or score_cam"):
            METHODS[name](classifier, images)


@pytest.mark.parametrize("name", BOTH)
def test_features_below_zero_are_an_error(name, seeded, x):
    """The walk takes activations for rates: they are never negative."""

    class Signed(Plain):
        def forward(self, x):
            return self.head(self.conv(self.stem(x) - 0.3).mean((2, 3)))

    class Twice(Plain):
        def forward(self, x):
            return self.head(self.conv(self.norm(self.conv(self.stem(x)))[:, :3]).mean((2, 3)))

    with pytest.raises(UnsuitedError, match=r"Signed calls torch\.(Tensor\.)?sub"):
        METHODS[name](bare(seeded(Signed, seed=1), "stem"), x)
    with pytest.raises(UnsuitedError, match=r"Twice calls torch\S*conv2d on negative features; explain a later layer"):
        METHODS[name](bare(seeded(Twice, seed=1), "stem"), x)
    with pytest.raises(UnsuitedError, match=r"Plain calls torch\.nn\.functional\.batch_norm on negative features"):
        METHODS[name](bare(seeded(Plain, seed=1), "conv"), x)


def test_a_contrast_layer_lies_between(plain_network, x, plain):
    classifier = bare(plain_network, "relu")
    for contrast in ("stem", "head", "conv"):
        message = f"the contrast layer '{contrast}' does not lie between layer 'relu' and the last linear layer"
        with pytest.raises(ValueError, match=message):
            methods.contrastive_excitation_backprop(classifier, x, contrast=contrast)
    with pytest.raises(LookupError, match="no layer called 'averge'; did you mean average"):
        methods.contrastive_excitation_backprop(classifier, x, contrast="averge")


def test_a_contrast_needs_weights_to_negate(seeded, x):
    class Maps(Plain):
        def forward(self, x):
            return self.pool(self.stem(x)).mean((2, 3))

    with pytest.raises(UnsuitedError, match="no linear layer or convolution lies behind layer 'stem'"):
        methods.contrastive_excitation_backprop(bare(seeded(Maps), "stem"), x)
    assert (methods.excitation_backprop(bare(seeded(Maps), "stem"), x) >= 0).all()


@pytest.mark.parametrize("name", BOTH)
def test_one_forward_is_run(name, plain_network, x):
    classifier, passes = bare(plain_network, "stem"), []
    plain_network.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    METHODS[name](classifier, x)
    assert passes == [2]
