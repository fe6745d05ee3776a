"""Segmenters: the networks by their formulas, the map whose arg max is the softmax's, classes, files."""

import json
import math
import os
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sightline import models
from sightline.classifier import UnsuitedError, wrap
from sightline.data import Sample
from sightline.explainers._saved import load_segmenter, segmenter, segmenters
from sightline.explainers._segmenter import MiniSeg, Segmenter, log_odds, lraspp, mini_seg
from sightline.runs import Choice

SMALL = {"widths": [4, 6, 8, 10], "width": 5, "size": 32}


class Linear(nn.Module):
    """One 1x1 convolution: the logits of a pixel are a linear function of its color."""

    def __init__(self, outputs=4):
        super().__init__()
        self.convolution = nn.Conv2d(3, outputs, 1)

    def forward(self, x):
        return {"out": self.convolution(x)}


def linear(seeded, outputs=4, **settings):
    """A segmenter that gives logits by hand, in float64."""
    model = Segmenter(seeded(Linear, outputs, seed=2), outputs - 1).eval()
    wrapped = wrap(model, layer="network.convolution", normalization=((0.4, 0.5, 0.6), (0.2, 0.3, 0.1)), size=(6, 5))
    return replace(wrapped, **settings)


def slow_odds(classifier, x):
    """log p_c - log p_0, pixel by pixel."""
    convolution = classifier.model.network.convolution
    W, b = convolution.weight.detach().flatten(1).tolist(), convolution.bias.tolist()
    found = torch.zeros(len(x), len(b) - 1, *x.shape[2:], dtype=torch.float64)
    for n, i, j in ((n, i, j) for n in range(len(x)) for i in range(x.shape[2]) for j in range(x.shape[3])):
        z = [(float(x[n, c, i, j]) - classifier.mean[c]) / classifier.std[c] for c in range(3)]
        powers = [
            math.exp(sum(w * v for w, v in zip(row, z, strict=True)) + bias) for row, bias in zip(W, b, strict=True)
        ]
        p = [power / sum(powers) for power in powers]
        for label in range(len(p) - 1):
            found[n, label, i, j] = math.log(p[label + 1]) - math.log(p[0])
    return found


@pytest.fixture
def images():
    return torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def stage(sequence, a):
    """A convolution, batch norm with running statistics, ReLU."""
    convolution, norm = sequence[0], sequence[1]
    side = convolution.weight.shape[-1] // 2
    z = F.conv2d(a, convolution.weight, stride=convolution.stride, padding=side)
    columns = (None, slice(None), None, None)
    normal = (z - norm.running_mean[columns]) / (norm.running_var[columns] + norm.eps).sqrt()
    return (normal * norm.weight[columns] + norm.bias[columns]).clamp(min=0)


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_a_mini_seg_is_its_formula(size, seeded):
    net = seeded(MiniSeg, 4, widths=(4, 6, 8, 10), width=5, seed=9)
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    A = {2: net.layer1(stage(net.stem, x))}
    A[4] = net.layer2(A[2])
    A[8] = net.layer3(A[4])
    A[16] = net.layer4(A[8])
    assert [A[s].shape[2:] for s in A] == [tuple(math.ceil(side / s) for side in size) for s in A]

    def up(a, like):
        return F.interpolate(a, like.shape[2:], mode="bilinear", align_corners=False)

    D = stage(net.reduce[3], A[16])
    for place, s in ((2, 8), (1, 4), (0, 2)):
        own = stage(net.reduce[place], A[s])
        D = stage(net.merge[place], own + up(D, own))
    last = stage(net.join, torch.cat([up(D, x), stage(net.fine, x)], 1))
    there = A[16].mean((2, 3)) @ net.present.weight.T + net.present.bias
    expected = F.conv2d(last, net.head.weight, net.head.bias) + there[:, :, None, None]
    assert expected.shape == (2, 4, *size)
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)


def test_the_default_mini_seg_has_three_quarters_of_a_million_parameters():
    assert sum(parameter.numel() for parameter in mini_seg().model.parameters()) == 751522


@pytest.mark.parametrize("side", [64, 97, 200])
def test_images_of_any_size_get_maps_of_that_size(side):
    found = mini_seg(3)
    x = torch.rand(1, 3, side, side + 13)
    assert log_odds(found, x).shape == (1, 3, side, side + 13)
    assert found(x).shape == (1, 3)


def test_an_lraspp_is_torchvisions_and_has_a_background():
    found = lraspp(3, size=64)
    x = torch.rand(2, 3, 48, 70)
    with torch.no_grad():
        l = found.model.network(found.normalize(x))["out"]  # noqa: E741
    assert l.shape == (2, 4, 48, 70)
    assert torch.equal(log_odds(found, x), l[:, 1:] - l[:, :1])
    assert found.mean == (0.485, 0.456, 0.406)
    assert torch.equal(
        lraspp(3, size=64).model.network.backbone["0"][0].weight, found.model.network.backbone["0"][0].weight
    )


def test_weights_that_cannot_be_downloaded_and_unknown_ones(monkeypatch, plain):
    import torchvision

    def offline(*_, **settings):
        assert settings["weights_backbone"].name == "IMAGENET1K_V2"
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models.segmentation, "lraspp_mobilenet_v3_large", offline)
    with pytest.raises(
        ConnectionError, match=r"lraspp's backbone \(no route\); put mobilenet_v3_large-.*\.pth into .*weights=none"
    ):
        lraspp(weights="default")
    with pytest.raises(LookupError, match="no weights of lraspp's backbone called 'defalt'; did you mean DEFAULT"):
        lraspp(weights="defalt")


@pytest.mark.parametrize("classes", [0, 1, 255])
def test_masks_hold_254_classes_and_one_is_no_choice(classes, plain):
    with pytest.raises(ValueError, match=f"expected 2 to 254 classes besides the background, got {classes}"):
        Segmenter(nn.Identity(), classes)
    with pytest.raises(ValueError, match="expected four widths"):
        MiniSeg(3, widths=(1, 2, 3))


def test_the_seed_alone_says_which_weights_and_the_random_state_stays():
    before = torch.get_rng_state()
    first, second, other = (mini_seg(2, **SMALL, seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["network.head.weight"], other["network.head.weight"])


def test_the_map_is_the_log_odds_against_the_background_pixel_by_pixel(seeded, images):
    own = linear(seeded)
    S = slow_odds(own, images)
    torch.testing.assert_close(log_odds(own, images), S, rtol=1e-9, atol=1e-9)
    y = torch.tensor([2, 0, 1])
    expected = torch.stack([S[n, label] for n, label in enumerate(y.tolist())])[:, None]
    torch.testing.assert_close(segmenter(own, images, y), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own(images), S.flatten(2).max(2).values, rtol=1e-9, atol=1e-9)
    assert torch.equal(segmenter(own, images), segmenter(own, images, own(images).argmax(1)))


def test_at_threshold_zero_the_maps_are_the_arg_max_of_the_softmax(seeded, images):
    own = linear(seeded)
    with torch.no_grad():
        winners = own.model.pixels(own.normalize(images)).softmax(1).argmax(1)
    assert len(set(winners.flatten().tolist())) > 2
    maps = torch.cat([segmenter(own, images, torch.full((3,), label)) for label in range(3)], 1)
    value, label = maps.max(1)
    assert torch.equal(torch.where(value > 0, label + 1, 0), winners)


def test_the_image_shows_a_class_where_it_beats_the_background_somewhere(seeded, images):
    own = linear(seeded)
    own.model.network.convolution.bias.data[0] += 1.0
    with torch.no_grad():
        l = own.model.pixels(own.normalize(images))  # noqa: E741
    beats = (l[:, 1:] > l[:, :1]).flatten(2).any(2)
    assert beats.any()
    assert not beats.all()
    assert torch.equal(own(images) > 0, beats)


def test_several_classes_cost_one_pass(seeded, images):
    own = linear(seeded)
    classes = torch.tensor([[2, 0], [1, 1], [0, 2]])
    calls = []
    own.model.network.register_forward_hook(lambda *_: calls.append(1))
    found = segmenters(own, images, classes)
    assert len(calls) == 1
    assert torch.equal(found, torch.cat([segmenter(own, images, column) for column in classes.unbind(1)], 1))
    with pytest.raises(ValueError, match=r"label 3 is outside 0\.\.2"):
        segmenters(own, images, torch.tensor([[0, 3]] * 3))


def test_a_segmenter_leaves_no_trace_and_no_batch_norm_learns(trace, plain):
    own = mini_seg(2, **SMALL)
    own.model.train()
    own.model.double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    changed = trace(own.model, x)
    found = segmenter(own, x, torch.tensor([0, 1]))
    assert not changed()
    assert own.model.training
    assert not found.requires_grad
    torch.testing.assert_close(found[1:], segmenter(own, x[1:], torch.tensor([1])), rtol=1e-9, atol=1e-9)


def test_other_networks_are_refused(pooled, x, plain):
    with pytest.raises(UnsuitedError, match="Pooled is no segmenter; train one with sightline train segmenter"):
        segmenter(pooled, x)
    with pytest.raises(UnsuitedError, match="Pooled is no segmenter"):
        segmenters(pooled, x, torch.tensor([[0]] * 3))


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (torch.zeros(1, 3, 6, 5, dtype=torch.int64), TypeError, "expected images as a float tensor"),
        (torch.zeros(1, 1, 6, 5), ValueError, r"expected images of shape \(b, 3, h, w\)"),
        (torch.full((1, 3, 6, 5), math.nan), ValueError, "NaN or infinity"),
    ],
)
def test_wrong_images_are_refused(bad, error, text, seeded, plain):
    with pytest.raises(error, match=text):
        segmenter(linear(seeded), bad)


def test_what_other_methods_explain_is_the_last_stage():
    from sightline.methods import grad_cam

    for own, cells in ((mini_seg(3, **SMALL), (2, 2)), (lraspp(3, size=64), (4, 4))):
        x = torch.rand(1, 3, *own.size)
        assert grad_cam(own, x).shape[2:] == cells


def written(path, seed=4, classes=("a", "b", "c")):
    """A segmenter in a file."""
    own = replace(mini_seg(3, **SMALL, seed=seed), classes=classes, mean=(0.3,))
    with torch.no_grad():
        own.model.network.join[1].running_mean.uniform_(-0.1, 0.1)
    models.save(own, path, model=Choice("mini_seg", {**SMALL, "classes": 3}), extra={"images": 7})
    return own


def test_a_file_gives_the_segmenter_back(tmp_path):
    own = written(tmp_path / "s.safetensors")
    for loaded in (load_segmenter(tmp_path / "s.safetensors"), models.load(str(tmp_path / "s.safetensors"))):
        assert (loaded.mean, loaded.std, loaded.size) == (own.mean, own.std, (32, 32))
        assert (loaded.classes, loaded.layer) == (own.classes, "network.layer4")
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(log_odds(loaded, x), log_odds(own, x))
    table = json.loads((tmp_path / "s.json").read_text())
    assert (table["model"]["name"], table["extra"]) == ("mini_seg", {"images": 7})


def test_an_lraspp_with_weights_is_built_without_them_from_its_file(tmp_path, monkeypatch):
    own = lraspp(2, size=64, seed=5)
    models.save(
        own, tmp_path / "l.safetensors", model=Choice("lraspp", {"classes": 2, "size": 64, "weights": "default"})
    )
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(log_odds(load_segmenter(tmp_path / "l.safetensors"), x), log_odds(own, x))


def test_with_weights_the_classifier_only_names_the_class(tmp_path, pooled, x):
    path = tmp_path / "s.safetensors"
    own = written(path)
    method = partial(segmenter, weights=str(path))
    S = log_odds(own, x.float())
    for y in (torch.tensor([2, 0, 1]), None):
        labels = pooled(x.float()).argmax(1) if y is None else y
        if labels.max() < 3:
            assert torch.equal(method(pooled, x.float(), y)[:, 0], S[torch.arange(3), labels])
    classes = torch.tensor([[2, 0], [1, 1], [0, 2]])
    together = segmenters(pooled, x.float(), classes, weights=str(path))
    assert torch.equal(together, torch.cat([method(pooled, x.float(), column) for column in classes.unbind(1)], 1))
    assert method(pooled, x, torch.tensor([0, 1, 2])).dtype == torch.float64


def test_classes_meet_by_their_names_where_both_have_names(tmp_path, pooled, x, plain):
    path = tmp_path / "s.safetensors"
    S = log_odds(written(path), x.float())
    named = replace(pooled, classes=("c", "d", "a", "b", "e"))
    found = segmenter(named, x.float(), torch.tensor([0, 2, 3]), weights=str(path))
    assert torch.equal(found[:, 0], S[torch.arange(3), torch.tensor([2, 0, 1])])
    with pytest.raises(ValueError, match="the segmenter has another set of classes: no class called 'd'"):
        segmenter(named, x.float(), torch.tensor([0, 1, 3]), weights=str(path))
    with pytest.raises(ValueError, match=r"label 4 is outside 0\.\.2: the segmenter has 3 classes"):
        segmenter(pooled, x.float(), torch.tensor([0, 4, 1]), weights=str(path))


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path, pooled, x, monkeypatch):
    path, reads = tmp_path / "s.safetensors", []
    first = written(path)
    load = models.load
    monkeypatch.setattr(models, "load", lambda choice: (reads.append(choice.name), load(choice))[1])
    y = torch.tensor([0, 1, 2])
    for _ in range(3):
        found = segmenter(pooled, x.float(), y, weights=str(path))
    assert reads.count(str(path)) == 1
    assert torch.equal(found, segmenter(first, x.float(), y))
    second = written(path, seed=6)
    os.utime(path, ns=(1, 1))
    assert torch.equal(segmenter(pooled, x.float(), y, weights=str(path)), segmenter(second, x.float(), y))


def test_other_files_are_refused(tmp_path, pooled, x, plain):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.safetensors"):
        segmenter(pooled, x, weights=str(tmp_path / "nothing.safetensors"))
    other = tmp_path / "other.safetensors"
    models.save(
        models.load("mini_resnet?classes=3&size=32"), other, model=Choice("mini_resnet", {"classes": 3, "size": 32})
    )
    with pytest.raises(ValueError, match=re.escape(f"{other} holds no segmenter: MiniResNet is no segmenter")):
        segmenter(pooled, x, weights=str(other))


def test_the_protocol_scores_a_perfect_segmenter_with_a_hundred(seeded):
    """Colors are classes; all classes compete, nothing is normalized, the threshold is 0."""
    from inspect import signature

    from sightline.protocols import segmentation

    known = signature(segmentation).parameters
    if "compete" not in known:
        pytest.skip("the protocol cannot let all classes compete yet")
    own = replace(linear(seeded), mean=(0.0,), std=(1.0,))
    weight = torch.cat([torch.zeros(1, 3), 10 * torch.eye(3)]).double()
    own.model.network.convolution.weight.data = weight[:, :, None, None]
    own.model.network.convolution.bias.data = torch.tensor([5.0, 0, 0, 0]).double()
    mask = torch.randint(4, (6, 5), generator=torch.Generator().manual_seed(2))
    image = torch.stack([(mask == label + 1).double() for label in range(3)])
    samples = [Sample("a", image, 0, mask=mask)]
    found = segmentation(segmenter, own, samples, compete="all", normalize="none", thresholds=(0.0,), by=segmenter)
    assert found["miou"].value == pytest.approx(100)


def test_a_mini_seg_starts_from_a_classifier(tmp_path):
    classifier = models.mini_resnet(classes=4, widths=(8, 8, 12, 16), size=32, seed=5)
    settings = {"classes": 4, "widths": [8, 8, 12, 16], "size": 32}
    path = models.save(classifier, tmp_path / "net.safetensors", model=Choice("mini_resnet", settings))
    built = mini_seg(3, weights=str(path), widths=(8, 8, 12, 16), width=8, size=32).model.network
    plain = mini_seg(3, widths=(8, 8, 12, 16), width=8, size=32).model.network
    whole = mini_seg(4, weights=str(path), widths=(8, 8, 12, 16), width=8, size=32).model.network
    theirs = classifier.model.state_dict()
    assert torch.equal(whole.present.weight[1:], theirs["head.weight"])
    assert torch.equal(whole.present.bias[1:], theirs["head.bias"])
    for name, value in built.state_dict().items():
        begun = name.startswith(("stem.", "layer1", "layer2", "layer3", "layer4"))
        assert torch.equal(value, theirs[name] if begun else plain.state_dict()[name]), name
    with pytest.raises(
        ValueError, match=r"is no MiniResNet of these widths and channels \(stem\.0\.weight does not fit"
    ):
        mini_seg(3, weights=str(path))
