"""CASM's mapping: which layers its decoder reads, the decoder by loops, the losses by loops, the known answers."""

import copy
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightline.classifier import Method, UnsuitedError, wrap
from sightline.explainers._casm import Casm, Decoder, classifier_loss, entropy, mapping_loss
from sightline.explainers._saved import load_casm, save_casm
from sightline.explainers._taps import Tap, find_taps, halvings
from sightline.layers import channels_first
from sightline.models._mini_resnet import mini_resnet
from sightline.models._mini_vgg import mini_vgg
from sightline.models._mini_vit import mini_vit
from sightline.runs import Choice


def torchvision_network(name):
    import torchvision.models

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        if name == "vgg11_bn":  # its three linear layers have 120 million weights, and no part here
            layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
            return nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
        return getattr(torchvision.models, name)(weights=None)


CODE = {
    "resnet18": ("maxpool 64 4 raw", "layer1 64 4", "layer2 128 8", "layer3 256 16", "layer4 512 32"),
    "resnet50": ("maxpool 64 4 raw", "layer1 256 4", "layer2 512 8", "layer3 1024 16", "layer4 2048 32"),
    "vgg11_bn": ("0.3 64 2 raw", "0.6 128 2", "0.13 256 4", "0.20 512 8", "0.27 512 16"),
    "densenet121": (
        *("features.pool0 64 4 raw", "features.transition1.conv 128 4", "features.transition2.conv 256 8"),
        *("features.transition3.conv 512 16", "features 1024 32"),
    ),
    "mobilenet_v3_small": (
        *("features.0 16 2 raw", "features.2.block.0 72 4", "features.4.block.0 96 8", "features.9.block.0 288 16"),
        "features 576 32",
    ),
    "efficientnet_b0": (
        *("features.0 32 2 raw", "features.2.0.block.0 96 2", "features.3.0.block.0 144 4"),
        *("features.4.0.block.0 240 8", "features.6.0.block.0 672 16", "features 1280 32"),
    ),
    "convnext_tiny": (
        *("features.0 96 4 raw", "features.2.0 96 4", "features.4.0 192 8", "features.6.0 384 16", "features 768 32"),
    ),
}
"""What the decoder reads of networks of torchvision at 64 pixels: name, channels, pixels a cell."""

PAPER = {
    "resnet50": ("relu 64 2", "layer1 256 4", "layer2 512 8", "layer3 1024 16", "layer4 2048 32"),
    "vgg11_bn": ("0.2 64 1", "0.6 128 2", "0.13 256 4", "0.20 512 8", "0.27 512 16"),
    "densenet121": ("features.relu0 64 2", *CODE["densenet121"][1:]),
    "mobilenet_v3_small": ("features.0 16 2", *CODE["mobilenet_v3_small"][1:]),
    "convnext_tiny": CODE["convnext_tiny"][1:],
}


def told(taps):
    return tuple(f"{tap.name} {tap.channels} {tap.stride}{' raw' if tap.raw else ''}" for tap in taps)


@pytest.mark.parametrize("name", CODE)
def test_the_taps_of_any_convolutional_network_are_found(name):
    classifier = wrap(torchvision_network(name), normalization="none", size=64)
    assert told(find_taps(classifier)) == CODE[name]
    if name in PAPER:
        assert told(find_taps(classifier, "paper")) == PAPER[name]


def test_the_taps_of_the_small_networks():
    stages = "layer2 64 4", "layer3 128 8", "layer4 256 16"
    assert told(find_taps(mini_resnet())) == ("stem 32 2 raw", "layer1 32 2", *stages)
    assert told(find_taps(mini_resnet(), "paper")) == ("layer1 32 2", *stages)
    behind = "features.12 32 2", "features.19 64 4", "features.26 128 8", "features.33 256 16"
    assert told(find_taps(mini_vgg())) == ("features.6 16 2 raw", *behind)
    assert told(find_taps(mini_vgg(), "paper")) == ("features.5 16 1", *behind)


class Nested(nn.Module):
    """Everything inside one module; a shortcut past the second scale's last convolution; a branch to nowhere."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU())
        self.inner = nn.Conv2d(5, 5, 3, padding=1)
        self.idle = nn.Conv2d(5, 9, 3, padding=1)
        self.down = nn.Conv2d(5, 6, 3, 2, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        a = self.body(x)
        b = self.inner(a)
        self.idle(a)
        c = self.down(a + b)
        return self.head(c.mean((2, 3)))


def test_only_maps_through_which_everything_passes_are_read(seeded):
    classifier = wrap(seeded(Nested), normalization="none", size=32)
    assert told(find_taps(classifier, "paper")) == ("body.1 4 2", "body 5 4", "down 6 8")
    assert told(find_taps(classifier)) == ("body.0 4 2 raw", "body.1 4 2", "body 5 4", "down 6 8")


class Shared(nn.Module):
    """One ReLU for all layers: only its last output can be read under its name."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1)
        self.relu, self.head = nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.relu(self.conv2(self.relu(self.conv1(x)))).mean((2, 3)))


def test_of_a_module_that_runs_twice_the_last_output_is_read(seeded):
    classifier = wrap(seeded(Shared), normalization="none", size=32)
    assert told(find_taps(classifier, "paper")) == ("conv1 4 2", "relu 5 4")


def test_an_entry_that_is_the_last_of_its_scale_is_read_once(pooled):
    assert told(find_taps(pooled)) == ("stem 8 2 raw", "last 6 4")
    assert told(find_taps(pooled, "paper")) == ("stem 8 2", "last 6 4")


def test_finding_taps_leaves_no_trace(pooled, trace, plain):
    changed = trace(pooled.model)
    find_taps(pooled)
    assert changed() == []


@pytest.mark.parametrize("taps", ["code", "paper"])
def test_a_network_without_scales_is_refused_with_an_alternative(taps, tokens):
    for classifier in (tokens, mini_vit()):
        with pytest.raises(UnsuitedError, match=r"two or more scales .* has 1 on .* such as resnet50 .* such as rise"):
            find_taps(classifier, taps)


def test_unknown_taps_are_refused(pooled, plain):
    with pytest.raises(ValueError, match=r"expected taps 'code' .* or 'paper' .*, got 'both'"):
        find_taps(pooled, "both")


def test_scales_are_powers_of_two():
    assert [halvings((224, 224), grid) for grid in ((224, 224), (112, 112), (111, 111), (7, 7))] == [0, 1, 1, 5]
    assert halvings((299, 299), (149, 149)) == halvings((299, 299), (147, 147)) == 1
    assert halvings((24, 32), (3, 4)) == 3


def test_the_decoder_of_resnet50_has_249153_parameters_and_its_masks_blocks_of_4_by_4():
    classifier = wrap(torchvision_network("resnet50"), normalization="imagenet")
    casm = Casm(classifier)
    assert sum(parameter.numel() for parameter in casm.decoder.parameters()) == 249_153
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    m = casm(classifier, x)
    assert m.shape == (1, 1, 224, 224)
    cells = m[:, :, ::4, ::4]
    assert torch.equal(m, cells.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert not torch.equal(cells[:, :, 1:], cells[:, :, :-1])


def linear_position(n, old, new):
    """Where the center of cell n of `new` lies among the centers of `old` cells: two neighbors and a weight."""
    at = min(max((n + 0.5) * old / new - 0.5, 0), old - 1)
    low = int(at)
    return low, min(low + 1, old - 1), at - low


def slow_bilinear(A, size):
    channels, rows, columns = A.shape
    B = torch.zeros(channels, *size, dtype=A.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            (t, b, v), (left, r, u) = linear_position(i, rows, size[0]), linear_position(j, columns, size[1])
            top, bottom = (1 - u) * A[:, t, left] + u * A[:, t, r], (1 - u) * A[:, b, left] + u * A[:, b, r]
            B[:, i, j] = (1 - v) * top + v * bottom
    return B


def slow_decoder(decoder, features):
    """One image's mask, cell by cell."""
    parts = []
    for reduce, A in zip(decoder.reduce, features, strict=True):
        if not isinstance(reduce, nn.Identity):
            convolution, norm, _ = reduce
            A = torch.einsum("oc,cij->oij", convolution.weight[:, :, 0, 0], A)
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            A = ((A - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
        parts.append(slow_bilinear(A, features[0].shape[1:]))
    H = F.pad(torch.cat(parts), (1, 1, 1, 1))
    weight, bias = decoder.last.weight[0], decoder.last.bias[0]
    rows, columns = features[0].shape[1:]
    z = [[(weight * H[:, i : i + 3, j : j + 3]).sum() + bias for j in range(columns)] for i in range(rows)]
    return torch.stack([torch.stack(row) for row in z]).sigmoid()


@pytest.mark.parametrize("raw", [True, False])
def test_the_decoder_is_its_formula_cell_by_cell(raw, seeded):
    taps = [Tap("a", 2, 1, channels_first, raw), Tap("b", 3, 2, channels_first, False)]
    decoder = seeded(Decoder, taps, width=4)
    randomness = torch.Generator().manual_seed(3)
    features = [torch.randn(2, c, *s, generator=randomness, dtype=torch.float64) for c, s in ((2, (5, 6)), (3, (3, 3)))]
    with torch.no_grad():
        m = decoder(features)
        for n in range(2):
            assert torch.allclose(m[n, 0], slow_decoder(decoder, [A[n] for A in features]), atol=1e-12)


def test_weights_are_drawn_as_the_program_does_and_norms_start_at_one_and_zero():
    taps = [Tap("a", 200, 1, channels_first, True), Tap("b", 300, 2, channels_first, False)]
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        decoder = Decoder(taps)
    decoder.requires_grad_(False)
    convolution, norm, _ = decoder.reduce[1]
    assert convolution.bias is None
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.03)
    assert decoder.last.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert decoder.last.bias is not None
    assert bool((norm.weight == 1).all() and (norm.bias == 0).all())


def test_the_seed_alone_says_which_weights_and_the_random_state_stays(pooled, trace, plain):
    changed = trace(pooled.model)
    states = [Casm(pooled, seed=seed).decoder.state_dict() for seed in (0, 0, 1)]
    assert changed() == []
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["last.weight"], states[2]["last.weight"])


def test_a_casm_is_a_method_that_looks_at_the_images_alone(pooled, curved, x, trace, plain):
    casm = Casm(copy.deepcopy(pooled))
    casm.train()
    changed, inside = trace(pooled.model, x), trace(casm)
    m = casm(pooled, x)
    assert changed() == []
    assert inside() == []
    assert isinstance(casm, Method)
    assert m.shape == (3, 1, 24, 32)
    assert not m.requires_grad
    assert bool((m >= 0).all() and (m <= 1).all())
    assert torch.equal(m, casm(curved, x, torch.tensor([0, 1, 2])))
    assert torch.equal(m, m[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))
    for n in range(3):
        assert torch.allclose(m[n : n + 1], casm(pooled, x[n : n + 1]), atol=1e-12)


def test_a_casm_normalizes_as_its_encoder_wants_it(pooled, x):
    casm = Casm(pooled)
    with torch.no_grad():
        a = pooled.model.stem(pooled.normalize(x))
        slow = casm.eval().decoder([a, pooled.model.last(a.clone())])
    assert torch.equal(casm(pooled, x), F.interpolate(slow, (24, 32), mode="nearest"))


def test_a_casm_takes_images_whose_size_no_cell_divides(pooled, x):
    assert Casm(pooled)(pooled, x[:, :, :21, :27]).shape == (3, 1, 21, 27)


def test_a_casm_runs_its_encoder_once(pooled, x):
    casm, calls = Casm(pooled), []
    casm.encoder.register_forward_hook(lambda *_: calls.append(1))
    casm(pooled, x)
    assert calls == [1]


def test_a_casm_is_saved_and_copied_whole(pooled, x):
    casm = Casm(pooled, taps="paper")
    m = casm(pooled, x)
    assert torch.equal(pickle.loads(pickle.dumps(casm))(pooled, x), m)
    twin = copy.deepcopy(casm)
    assert twin.encoder is twin.classifier.model is not casm.encoder
    other = Casm(wrap(type(pooled.model)().double(), normalization=(pooled.mean, pooled.std)), taps="paper", seed=5)
    assert not torch.equal(other(pooled, x), m)
    other.load_state_dict(casm.state_dict())
    assert torch.equal(other(pooled, x), m)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: x[:, :1], r"expected images of shape \(b, 3, h, w\), got \(3, 1, 24, 32\)"),
        (lambda x: x[:0], "expected at least one image"),
        (lambda x: x / 0, "NaN or infinity"),
    ],
)
def test_wrong_images_are_refused(bad, message, pooled, x, plain):
    with pytest.raises(ValueError, match=message):
        Casm(pooled)(pooled, bad(x))


def a_case(seed, b=6, k=3):
    randomness = torch.Generator().manual_seed(seed)
    logits, masked = (2 * torch.randn(b, k, generator=randomness, dtype=torch.float64) for _ in range(2))
    m = torch.rand(b, 1, 4, 5, generator=randomness, dtype=torch.float64)
    return logits, masked, torch.randint(k, (b,), generator=randomness), m


def slow_mapping_loss(logits, masked, y, m, lam, score):
    """The loss as in the paper's algorithm, image by image, with the program's ReLU."""
    b, total = len(y), 0.0
    for i in range(b):
        clean_right = logits[i].tolist().index(max(logits[i].tolist())) == int(y[i])
        fooled = masked[i].tolist().index(max(masked[i].tolist())) != int(y[i])
        n = 1.0 if clean_right and fooled else 0.0
        total = total - lam * torch.relu(n - m[i].mean()) / b
        p = masked[i].exp() / masked[i].exp().sum()
        if score == "classification":
            total = total + p[y[i]].log() / b
        elif clean_right:
            total = total + sum(p[k] * p[k].log() for k in range(len(p))) / b
    return total


def confused(logits, masked, y):
    return (logits.argmax(1) == y) & (masked.argmax(1) != y)


@pytest.mark.parametrize("score", ["entropy", "classification"])
@pytest.mark.parametrize("seed", range(4))
def test_the_mapping_loss_is_the_programs_but_for_a_constant_and_has_its_gradient(score, seed):
    logits, masked, y, m = a_case(seed)
    m.requires_grad_()
    masked.requires_grad_()
    ours = mapping_loss(logits, masked, y, m=m, lam=7.5, score=score)
    slow = slow_mapping_loss(logits, masked, y, m, 7.5, score)
    constant = 7.5 * confused(logits, masked, y).double().mean()
    assert ours.item() == pytest.approx((slow + constant).item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (m, masked)), torch.autograd.grad(slow, (m, masked)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_the_four_cases_of_an_image():
    """Right or wrong on the clean image, right or wrong on the masked one: which of both terms it feels."""
    y = torch.zeros(4, dtype=torch.long)
    logits = torch.tensor([[2.0, 0], [2, 0], [0, 2], [0, 2]], dtype=torch.float64)
    masked = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]], dtype=torch.float64, requires_grad=True)
    m = torch.full((4, 1, 2, 2), 0.3, dtype=torch.float64, requires_grad=True)
    loss = mapping_loss(logits, masked, y, m=m, lam=10.0)
    areas, confusions = torch.autograd.grad(loss, (m, masked))
    assert areas.abs().sum((1, 2, 3)).bool().tolist() == [False, True, False, False]
    assert confusions.abs().sum(1).bool().tolist() == [True, True, False, False]
    assert torch.allclose(areas[1], torch.tensor(10 / 4 / 4, dtype=torch.float64))
    adversarial = mapping_loss(logits, masked, y, m=m, lam=10.0, score="classification")
    assert torch.autograd.grad(adversarial, masked)[0].abs().sum(1).bool().all()


@settings(max_examples=15, deadline=None)
@given(lam=st.floats(0, 50), seed=st.integers(0, 99))
def test_the_norm_is_lambda_times_the_mean_mask_where_all_images_confuse(lam, seed):
    _, _, _, m = a_case(seed)
    y = torch.zeros(6, dtype=torch.long)
    logits, masked = torch.tensor([[1.0, 0]] * 6).double(), torch.tensor([[0, 1.0]] * 6).double()
    without = mapping_loss(logits, masked, y, m=m, lam=0.0)
    assert float(mapping_loss(logits, masked, y, m=m, lam=lam) - without) == pytest.approx(lam * float(m.mean()))


def test_truth_values_are_counted_as_numbers():
    """On current PyTorch the program's (bool + bool).eq(2) is never true, and its lambda without effect."""
    yes = torch.tensor([True])
    assert not bool((yes + yes).eq(2))
    logits, masked, y, m = a_case(0)
    assert bool(confused(logits, masked, y).any())
    low, high = (mapping_loss(logits, masked, y, m=m, lam=lam) for lam in (0.0, 10.0))
    assert float(high) > float(low)


@pytest.mark.parametrize("score", ["entropy", "classification"])
def test_through_a_network_a_misclassified_image_moves_nothing_and_a_recognized_one_feels_no_norm(score, pooled, x):
    """Batch norms in evaluation mode: else images know of each other."""
    casm = Casm(pooled)
    casm.eval()
    logits = pooled(x)
    wrong = (logits.argmax(1) + 1) % 5
    m = casm.mask(x)
    masked = pooled((1 - m) * x)

    def gradient(y, lam):
        loss = mapping_loss(logits, masked, y, m=m, lam=lam, score=score)
        found = torch.autograd.grad(loss, list(casm.decoder.parameters()), retain_graph=True)
        return torch.cat([one.flatten() for one in found])

    assert bool(gradient(wrong, 10.0).any()) == (score == "classification")
    recognized = torch.where(masked.argmax(1) == logits.argmax(1), logits.argmax(1), wrong)
    assert torch.equal(gradient(recognized, 10.0), gradient(recognized, 0.0))
    assert bool(gradient(logits.argmax(1), 0.0).any())


def test_the_entropy_of_sure_and_of_unsure_predictions():
    assert torch.allclose(entropy(torch.zeros(2, 7)), torch.tensor(7.0).log())
    assert float(entropy(torch.tensor([[1e4, 0.0]]))) == 0
    p = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    assert float(entropy(p.log() + 3)) == pytest.approx(-sum(float(q) * math.log(float(q)) for q in p[0]))


def test_the_classifier_learns_from_clean_and_masked_images_alike():
    logits, masked, y, _ = a_case(2)

    def cross_entropy(z):
        return -sum(math.log(math.exp(z[i, y[i]]) / sum(math.exp(v) for v in z[i])) for i in range(6)) / 6

    both = (cross_entropy(logits) + cross_entropy(masked)) / 2
    assert float(classifier_loss(logits, masked, y)) == pytest.approx(both)
    assert float(classifier_loss(logits, None, y)) == pytest.approx(cross_entropy(logits))


@pytest.mark.parametrize(("width", "taps"), [(16, "code"), (64, "paper")])
def test_a_file_gives_the_mapping_back_whatever_its_width(width, taps, tmp_path):
    settings = {"classes": 3, "widths": [4, 4, 6, 8], "size": 32}
    classifier = mini_resnet(**settings)
    mapping = Casm(classifier, width=width, taps=taps, seed=5)
    path = save_casm(mapping, tmp_path / "m.safetensors", encoder=Choice("mini_resnet", settings))
    loaded = load_casm(path)
    assert loaded.decoder.width == width
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(classifier, x), mapping(classifier, x))


def test_a_file_from_before_widths_were_written_has_that_of_64(tmp_path):
    path = save_casm(Casm(mini_resnet()), tmp_path / "m.safetensors", encoder=Choice("mini_resnet"))
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest.pop("width") == 64
    path.with_suffix(".json").write_text(json.dumps(manifest))
    assert load_casm(path).decoder.width == 64
