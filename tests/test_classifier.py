import math
from collections import OrderedDict, namedtuple
from dataclasses import FrozenInstanceError, dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sightline.classifier import (
    IMAGENET,
    SCORES,
    Classifier,
    check_labels,
    check_range,
    log_probability,
    logit,
    margin,
    probability,
    sigmoid,
    total,
    wrap,
)
from sightline.methods import cam, grad_cam

SIZE = (24, 32)


def around(model, **settings) -> Classifier:
    return wrap(model, **{"normalization": "none", "size": SIZE, **settings})


def test_the_classifier_normalizes_and_freezes(pooled, x):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (pooled.mean, pooled.std))
    expected = pooled.model.eval()((x - mean) / std)
    pooled.model.train()
    torch.testing.assert_close(pooled(x), expected, rtol=0, atol=1e-12)
    assert pooled.model.training
    assert not pooled(x).requires_grad


def test_logits_are_differentiable_with_respect_to_the_images(pooled, x):
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pooled.scores(leaf, torch.tensor([0, 1, 2])).sum(), leaf)
    assert torch.equal(gradient, pooled.gradient(x, torch.tensor([0, 1, 2])))
    step = torch.zeros_like(x)
    step[0, 1, 5, 6] = 1e-6
    with torch.no_grad():
        slope = (pooled(x + step) - pooled(x - step))[0, 0] / 2e-6
    assert gradient[0, 1, 5, 6].item() == pytest.approx(slope.item(), abs=1e-7)


def test_images_are_brought_to_the_network_s_precision(seeded, networks, x):
    classifier = around(seeded(networks.pooled, dtype=torch.float32))
    assert classifier(x).dtype == torch.float32
    assert classifier.gradient(x, None).dtype == torch.float64


def test_the_scores_are_their_formulas():
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.5, -1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([2, 1])
    for row, label, i in (([1.0, 2.0, 4.0], 2, 0), ([0.5, -1.0, 0.0], 1, 1)):
        p = math.exp(row[label]) / sum(map(math.exp, row))
        assert logit(logits, y)[i] == row[label]
        assert probability(logits, y)[i].item() == pytest.approx(p)
        assert log_probability(logits, y)[i].item() == pytest.approx(math.log(p))
        assert sigmoid(logits, y)[i].item() == pytest.approx(1 / (1 + math.exp(-row[label])))
        assert margin(0)(logits, y)[i] == row[label] - row[0]
        assert total([0, 2])(logits, y)[i] == row[0] + row[2]
    assert {
        "logit": logit,
        "probability": probability,
        "log_probability": log_probability,
        "sigmoid": sigmoid,
    } == SCORES


def test_the_classifier_s_score_counts_only_where_none_is_given(pooled, x):
    y = torch.tensor([0, 1, 2])
    other = replace(pooled, score=probability)
    assert torch.equal(other.scores(x, y), probability(pooled(x), y))
    assert torch.equal(other.scores(x, y, logit), logit(pooled(x), y))
    assert torch.equal(other.gradient(x, y), pooled.gradient(x, y, probability))


def test_labels_are_checked_and_predicted(pooled, x):
    predicted = pooled(x).argmax(1)
    assert torch.equal(pooled.labels(x, None), predicted)
    assert pooled.labels(x, 3).tolist() == [3, 3, 3]
    assert pooled.labels(x, [1, 2, 3]).tolist() == [1, 2, 3]
    assert pooled.labels(x, torch.tensor([1, 2, 3], dtype=torch.int32)).dtype == torch.long


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (5, ValueError, r"label 5 is outside 0\.\.4: the network has 5 classes"),
        ([0, 1, -1], ValueError, r"label -1 is outside 0\.\.4"),
        ([0, 1], ValueError, r"expected 3 labels, one an image, got shape \(2,\)"),
        (torch.zeros(3, 1, dtype=torch.long), ValueError, r"expected 3 labels, one an image, got shape \(3, 1\)"),
        ([0.5, 1, 2], TypeError, "expected integer labels, got torch.float32"),
        ([True, False, True], TypeError, "expected integer labels, got torch.bool"),
    ],
)
def test_a_wrong_label_is_an_error(y, error, message, pooled, x, plain):
    with pytest.raises(error, match=message):
        pooled.labels(x, y)
    with pytest.raises(error, match=message):
        check_labels(pooled(x), y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[:0], ValueError, r"expected at least one image, got an empty batch of shape \(0, 3, 24, 32\)"),
        (lambda x: x[0], ValueError, r"expected images of shape \(b, 3, h, w\), got \(3, 24, 32\)"),
        (lambda x: x[:, :2], ValueError, r"expected images of shape \(b, 3, h, w\), got \(3, 2, 24, 32\)"),
        (lambda x: (255 * x).byte(), TypeError, r"expected images as a float tensor in \[0, 1\], got torch.uint8"),
        (lambda x: x.numpy(), TypeError, r"expected images as a float tensor in \[0, 1\], got ndarray"),
        (lambda x: x.log().log(), ValueError, r"the images hold NaN or infinity; expected values in \[0, 1\]"),
        (lambda x: x / 0, ValueError, "the images hold NaN or infinity"),
    ],
)
def test_wrong_images_are_an_error(change, error, message, pooled, x, plain):
    for read in (pooled, pooled.features, lambda x: pooled.labels(x, 0), lambda x: pooled.scores(x, None)):
        with pytest.raises(error, match=message):
            read(change(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: 255 * x, r"expected images in \[0, 1\], got values from 0\.\d* to 25\d(\.\d)?; divide by 255"),
        (lambda x: 4 * x - 2, r"got values from -\S* to \S*; undo the normalization: the classifier normalizes itself"),
        (lambda x: 1.2 * x, r"expected images in \[0, 1\], got values from \S* to 1\.\d*; undo the normalization"),
    ],
)
def test_images_outside_0_to_1_are_an_error(change, message, x):
    with pytest.raises(ValueError, match=message):
        check_range(change(x))
    check_range(x.round())


class Answer(nn.Module):
    """A convolution whose pooled output `answer` turns into whatever a network may return."""

    def __init__(self, answer, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 3, padding=1)
        self.answer = answer

    def forward(self, x):
        return self.answer(self.conv(x).mean((2, 3)))


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class Mapping(OrderedDict):
    """Like the outputs of Hugging Face: a mapping with its keys as attributes, whose first entry is a loss."""

    def __getattr__(self, name):
        return self[name]


Named = namedtuple("Named", ["logits", "aux"])


@pytest.mark.parametrize(
    "answer",
    [
        lambda z: z,
        lambda z: (z, z[:1]),
        lambda z: [z, "rest"],
        lambda z: {"out": z},
        lambda z: Output(z, z.sum(1)),
        lambda z: Mapping(loss=z.sum(), logits=z),
        lambda z: Named(aux=z[:, :1], logits=z),
    ],
    ids=["tensor", "tuple", "list", "dict", "dataclass", "mapping", "namedtuple"],
)
def test_logits_are_read_from_every_kind_of_output(answer, seeded, x):
    model = seeded(Answer, answer)
    classifier = around(model, layer="conv")
    torch.testing.assert_close(classifier(x), model.conv(x).mean((2, 3)), rtol=0, atol=1e-12)
    label = torch.tensor([1, 0, 2])
    expected = model.conv(x)[range(3), label][:, None].relu() / (24 * 32)
    torch.testing.assert_close(grad_cam(classifier, x, label), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda z: z[:, 0], ValueError, r"Answer returned shape \(2,\) for 2 images; expected \(2, classes\)"),
        (lambda z: z[:1], ValueError, r"Answer returned shape \(1, 4\) for 2 images; expected \(2, classes\)"),
        (lambda z: z[:, :, None], ValueError, r"Answer returned shape \(2, 4, 1\) for 2 images"),
        (lambda z: z / 0, ValueError, "Answer returned logits that are not finite; check its weights"),
        (lambda z: "text", TypeError, r"the network returned str without logits; expected a tensor \(b, k\)"),
        (lambda z: {"out": None}, TypeError, "the network returned dict without logits"),
    ],
)
def test_an_output_that_is_no_logits_is_an_error(answer, error, message, seeded, plain):
    with pytest.raises(error, match=message):
        around(seeded(Answer, answer))


def test_one_output_counts_as_two_classes(seeded, networks, x):
    model = seeded(networks.pooled, classes=1)
    classifier = around(model)
    z = model(x)
    assert torch.equal(classifier(x), torch.cat([torch.zeros_like(z), z], 1))
    assert torch.equal(classifier.labels(x, None), (z[:, 0] > 0).long())
    positive = cam(classifier, x, torch.tensor([1, 1, 1]))
    assert torch.equal(positive, torch.einsum("k,bkij->bij", model.head.weight[0], classifier.features(x))[:, None])
    assert not cam(classifier, x, torch.tensor([0, 0, 0])).any()
    with pytest.raises(ValueError, match=r"label 2 is outside 0\.\.1"):
        classifier.labels(x, 2)
    assert around(model, classes=["no", "yes"]).classes == ("no", "yes")


def test_a_network_with_one_channel(seeded):
    behind = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), *behind))
    classifier = around(model, normalization=((0.1,), (0.3,)))
    assert (classifier.channels, classifier.mean, classifier.layer) == (1, (0.1,), "1")
    assert classifier(torch.rand(2, 1, 24, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"expected images of shape \(b, 1, h, w\), got \(2, 3, 24, 32\)"):
        classifier(torch.rand(2, 3, 24, 32))
    with pytest.raises(ValueError, match="expected a mean and a positive std of 1 channels"):
        around(model, normalization="imagenet")


def test_normalization_is_said_recorded_or_an_error(seeded, networks, plain):
    model = seeded(networks.pooled)
    assert (wrap(model, normalization="imagenet", size=SIZE).mean, IMAGENET[1]) == (IMAGENET[0], (0.229, 0.224, 0.225))
    assert around(model, normalization=([0.5], [0.25])).std == (0.25,)
    assert around(model).mean == (0.0,)
    for choice, error, message in (
        (None, ValueError, r"how does Pooled want its images normalized\? Pass normalization='imagenet'"),
        ("imagnet", ValueError, r"no normalization called 'imagnet'; use 'imagenet', 'none' or \(mean, std\)"),
        (((0.5, 0.5), (1.0, 1.0)), ValueError, "expected a mean and a positive std of 3 channels, got"),
        (((0.5,), (1.0, 1.0, 1.0)), ValueError, "expected a mean and a positive std of 3 channels"),
        (((0.5,), (0.0,)), ValueError, r"expected a mean and a positive std of 3 channels, got \(0.5,\) and \(0.0,\)"),
        ((0.5, 0.25), TypeError, r"expected normalization=\(mean, std\), one number a channel each, got \(0.5, 0.25\)"),
        (0.5, TypeError, r"expected normalization=\(mean, std\)"),
    ):
        with pytest.raises(error, match=message):
            wrap(model, normalization=choice, size=SIZE)
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 40, 48)}
    recorded = wrap(model)
    assert (recorded.mean, recorded.std, recorded.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (40, 48))
    assert wrap(model, normalization="none", size=32).mean == (0.0,)


def test_the_size_is_what_the_network_says(seeded, networks):
    model = seeded(networks.pooled)
    assert wrap(model, normalization="none").size == (224, 224)
    model.image_size = 40
    assert wrap(model, normalization="none").size == (40, 40)
    assert wrap(model, normalization="none", size=(24, 32)).size == (24, 32)
    del model.image_size
    model.config = type("Config", (), {"image_size": (32, 48)})()
    assert wrap(model, normalization="none").size == (32, 48)


class Sized(nn.Module):
    """Runs on images of 32 x 32 alone, and says so in one of the usual ways."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 3, 2, 1), how
        self.head = nn.Linear(4 * 16 * 16, 5)

    def forward(self, x):
        if self.how is not None and x.shape[-1] != 32:
            raise self.how("32 expected")
        return self.head(self.conv(x).flatten(1))


@pytest.mark.parametrize("how", [None, AssertionError, RuntimeError, IndexError])
def test_a_network_that_cannot_run_at_the_size_is_an_error(how, seeded, trace, plain):
    model = seeded(Sized, how).train()
    changed = trace(model)
    with pytest.raises(ValueError, match=r"Sized cannot run on 224 x 224 images: .*; pass size=\(height, width\)"):
        wrap(model, normalization="none")
    assert changed() == []
    assert wrap(model, normalization="none", size=32).layer == "conv"


def test_what_is_no_classifier_is_an_error(seeded, networks, plain):
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function; pass the network itself"):
        wrap(lambda x: x, normalization="none")
    headless = seeded(networks.pooled)
    headless.num_classes = 0
    with pytest.raises(ValueError, match="Pooled has no classification head; build it with num_classes=k"):
        wrap(headless, normalization="none")
    with pytest.raises(ValueError, match="got 3 class names for 5 classes"):
        around(seeded(networks.pooled), classes=["a", "b", "c"])


def test_a_layer_that_does_not_run_on_these_images_is_an_error(pooled, x):
    pooled.model.unused = nn.Conv2d(3, 3, 1)
    lost = replace(pooled, layer="unused")
    for read in (lost.features, lambda x: lost.features_and_gradient(x, None)):
        with pytest.raises(ValueError, match=r"layer 'unused' did not run in the forward pass; choose another"):
            read(x)


def test_features_and_gradient_agree_with_a_split_network(curved, x):
    y = torch.tensor([4, 0, 1])
    A, G = curved.features_and_gradient(x, y)
    a = curved.model.last(curved.normalize(x)).detach().requires_grad_()
    (expected,) = torch.autograd.grad(curved.model.behind(a)[range(3), y].sum(), a)
    torch.testing.assert_close(A, a, rtol=0, atol=1e-12)
    torch.testing.assert_close(G, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(curved.features(x), a, rtol=0, atol=1e-12)
    features, logits = curved.features_and_logits(x)
    assert torch.equal(features, curved.features(x))
    assert torch.equal(logits, curved(x))


def test_tokens_come_on_their_grid_without_the_class_token(tokens, x):
    y = torch.tensor([0, 1, 2])
    A, G = tokens.features_and_gradient(x, y)
    model, t = tokens.model, tokens.normalize(x)
    seen = model.norm1(torch.cat([model.others.expand(3, -1, -1), model.embed(t).flatten(2).mT], 1))
    assert A.shape == G.shape == (3, 12, 3, 4)
    for i in range(3):
        for j in range(4):
            torch.testing.assert_close(A[:, :, i, j], seen[:, 1 + 4 * i + j], rtol=0, atol=1e-12)
    step = torch.zeros(3, 12, 3, 4, dtype=torch.float64)
    step[1, 5, 2, 1] = 1e-5
    plus, minus = (tokens.logits_with(x[1:2], (A + sign * step)[1:2])[0, 1] for sign in (1, -1))
    assert G[1, 5, 2, 1].item() == pytest.approx(((plus - minus) / 2e-5).item(), rel=1e-5)


def test_logits_with_other_features(tokens, curved, x):
    for classifier in (tokens, curved):
        features = classifier.features(x)
        torch.testing.assert_close(classifier.logits_with(x[:1], features[:1]), classifier(x[:1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(curved.logits_with(x[:1], curved.features(x)), curved(x), rtol=0, atol=1e-12)


class Joined(nn.Module):
    """Joins a layer with one before it, in a way that wants equal batches; its ReLU runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        a = self.relu(self.first(x))
        return self.head(torch.cat([a, self.relu(self.second(a))], 1).square().mean((2, 3)))


@pytest.mark.parametrize("layer", ["second", "relu"])
def test_logits_with_other_features_of_a_layer_that_is_joined_or_runs_twice(layer, seeded, x, trace, plain):
    model = seeded(Joined)
    classifier = around(model, layer=layer)
    changed = trace(model, x)
    features = torch.randn(6, 4, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = classifier.logits_with(x[:1], features)
    for n, one in enumerate(features):
        a = model.first(x[:1]).relu()
        b = one[None].relu() if layer == "second" else one[None]
        expected = model.head(torch.cat([a, b], 1).square().mean((2, 3)))
        torch.testing.assert_close(logits[n : n + 1], expected, rtol=0, atol=1e-12)
    assert changed() == []


def test_a_module_that_runs_twice_counts_its_last_call(seeded, x):
    model = seeded(Joined)
    classifier = around(model, layer="relu")
    a = model.first(x).relu()
    last = model.second(a).relu()
    torch.testing.assert_close(classifier.features(x), last, rtol=0, atol=1e-12)
    A, G = classifier.features_and_gradient(x, torch.tensor([0, 1, 2]))
    expected = 2 * last / (12 * 16) * model.head.weight[:3, 4:][:, :, None, None]
    torch.testing.assert_close(A, last, rtol=0, atol=1e-12)
    torch.testing.assert_close(G, expected, rtol=0, atol=1e-12)


def test_an_in_place_relu_behind_the_layer_changes_neither_features_nor_gradient(seeded, x):
    model = seeded(Joined)
    classifier = around(model, layer="second")
    A, G = classifier.features_and_gradient(x, torch.tensor([0, 1, 2]))
    before = model.second(model.first(x).relu())
    assert (before < 0).any()
    torch.testing.assert_close(A, before, rtol=0, atol=1e-12)
    torch.testing.assert_close(classifier.features(x), before, rtol=0, atol=1e-12)
    assert not G[before < 0].any()
    assert G[before > 0].all()


def test_a_classifier_is_frozen(pooled):
    with pytest.raises(FrozenInstanceError):
        pooled.layer = "stem"


def test_labels_of_numpy(pooled, x):
    assert pooled.labels(x, torch.from_numpy(np.array([1, 2, 3]))).tolist() == [1, 2, 3]
