"""Sanity checks: what becomes of a map when the network's parameters, or its labels, do."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightline.classifier import wrap
from sightline.data import Sample
from sightline.evaluation import Maps
from sightline.maps import resize
from sightline.methods._edge import edge
from sightline.methods._grad_cam import grad_cam
from sightline.methods._gradient import gradient
from sightline.metrics._similarity import hog_spearman, spearman, ssim
from sightline.models import MiniResNet, MiniVGG, MiniViT
from sightline.protocols._label_permutation import label_permutation
from sightline.protocols._randomization import (
    PARTS,
    blocks,
    groups_of,
    randomization,
    randomized,
    reinitialized,
    tensors,
)


def image(n, shape=(3, 24, 32)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def several(count=4):
    return [Sample(f"s{n}", image(n), label=(2 * n) % 5) for n in range(count)]


def weighted(classifier, x, y=None):
    """A signed map that sees the network's parameters, the image and the class."""
    total = sum(p.double().sum() for p in classifier.model.parameters())
    chosen = torch.zeros(len(x)) if y is None else y
    phase = total + chosen.double()
    return (x.mean(1, keepdim=True) * 20 + phase.view(-1, 1, 1, 1)).sin()[:, :, ::2, ::2]


def four(a, b):
    return [spearman(a, b), spearman(a, b, absolute=True), ssim(a, b), hog_spearman(a, b)]


def up(raw, size=(24, 32)):
    return resize(raw.double(), size)[0, 0]


def close(found, expected, atol=1e-9):
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (found, expected))
    torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)


def numbers(scores):
    return {name: (one.value, *one.per_image, *one.curve) for name, one in scores.items()}


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_the_numbers_are_those_of_each_image_at_each_stage(curved, mode):
    samples = several()
    found = randomization(weighted, curved, samples, mode=mode, stages=3, seed=5)
    fresh = reinitialized(curved.model, 5)
    others = list(randomized(curved, fresh, groups_of(curved.model, 3), mode))
    table = []
    for one in samples:
        x, y = one.image[None], torch.tensor([one.label])
        original = up(weighted(curved, x, y))
        table.append([four(original, up(weighted(other, x, y))) for other in others])
    assert [len(table), len(table[0])] == [4, 3]
    for i, part in enumerate(PARTS):
        stages = [[row[s][i] for row in table] for s in range(3)]
        last = stages[2] if mode == "cascading" else [sum(column) / 3 for column in zip(*stages, strict=True)]
        close(found[part].per_image, last)
        close(found[part].value, sum(last) / 4)
        close(found[part].curve, [1.0, *(sum(stage) / 4 for stage in stages)])
        assert found[part].axis == (0.0, 1.0, 2.0, 3.0)
        assert found[part].higher_is_better is False
        assert found[part].count == 4


def test_the_edge_detector_sees_no_network(curved, tokens, x):
    for classifier in (curved, tokens):
        samples = [Sample(f"s{n}", one, label=n) for n, one in enumerate(x)]
        for scores in (
            randomization(edge, classifier, samples),
            label_permutation(edge, curved, samples, permuted=tokens),
        ):
            for one in scores.values():
                close([one.value, *one.per_image, *one.curve], [1.0] * (1 + 3 + len(one.curve)), atol=1e-12)


def test_the_gradients_see_it(curved, seeded, networks):
    for method in (grad_cam, gradient):
        found = randomization(method, curved, several(), stages=2)
        assert all(one.value < 0.9 for one in found.values())
        assert found["ssim"].curve[0] == 1
    other = replace(curved, model=seeded(networks.curved, seed=77))
    assert all(one.value < 0.9 for one in label_permutation(gradient, curved, several(), permuted=other).values())


def test_the_permuted_network_explains_the_same_class(curved, seeded, networks):
    other = replace(curved, model=seeded(networks.curved, seed=8))
    found = label_permutation(weighted, curved, several(), permuted=other, batch=3)
    by_prediction = label_permutation(weighted, curved, several(), permuted=other, scored="predicted")
    table, predicted = [], []
    for one in several():
        x = one.image[None]
        for rows, y in ((table, torch.tensor([one.label])), (predicted, curved(x).argmax(1))):
            rows.append(four(up(weighted(curved, x, y)), up(weighted(other, x, y))))
    for i, part in enumerate(PARTS):
        close(found[part].per_image, [row[i] for row in table])
        close(by_prediction[part].per_image, [row[i] for row in predicted])
        close(found[part].value, sum(row[i] for row in table) / 4)
        assert (found[part].curve, found[part].axis) == ((), ())
    itself = label_permutation(weighted, curved, several(), permuted=copy.deepcopy(curved))
    close([one.value for one in itself.values()], [1.0] * 4, atol=1e-12)


@settings(max_examples=4, deadline=None)
@given(batch=st.integers(1, 5), order=st.permutations(range(4)))
def test_neither_batch_nor_order_matter(classifiers, batch, order):
    curved, samples = classifiers["curved"], several()
    whole = randomization(gradient, curved, samples, stages=2, batch=4)
    parts = randomization(Maps(gradient), curved, [samples[i] for i in order], stages=2, batch=batch)
    for part in PARTS:
        close([whole[part].per_image[i] for i in order], parts[part].per_image)
        close(whole[part].curve, parts[part].curve)


def test_an_image_without_a_map_does_not_count(curved):
    samples = several()

    def method(classifier, x, y=None):
        raw = weighted(classifier, x, y)
        changed = classifier.model is not curved.model
        raw = raw[:, :, :5, :3].clone()
        raw[(y == 2) & changed] = 0.7  # which enlarged to 24 x 32 is not constant any more
        raw[(y == 4) & (not changed)] = math.nan
        raw[(y == 1) & changed] = math.inf
        return raw

    found = randomization(method, curved, samples, stages=1)
    rest = randomization(method, curved, [one for one in samples if one.label not in (1, 2, 4)], stages=1)
    for part in PARTS:
        assert [math.isnan(v) for v in found[part].per_image] == [False, True, True, True]
        assert found[part].count == 1
        close(found[part].value, rest[part].value)
        close(found[part].curve, rest[part].curve)
    nothing = randomization(lambda c, x, y=None: torch.zeros(len(x), 1, 2, 2), curved, samples, stages=1)
    assert all(math.isnan(one.value) and one.count == 0 for one in nothing.values())
    assert nothing["ssim"].curve[0] == 1


def test_nothing_of_the_original_changes(pooled, trace, x, plain):
    pooled.model.train()
    pooled.model.head.weight.requires_grad_(False)
    samples = [Sample(f"s{n}", one, label=n) for n, one in enumerate(x)]
    changed = trace(pooled.model, x)
    first = numbers(randomization(gradient, pooled, samples, seed=3))
    assert changed() == []
    assert numbers(randomization(gradient, pooled, samples, seed=3)) == first
    assert numbers(randomization(gradient, pooled, samples, seed=4)) != first


def test_a_cascade_keeps_what_it_has_drawn_and_ends_random(pooled):
    model = pooled.model
    fresh, groups = reinitialized(model, 0), groups_of(model, 3)
    a, b = tensors(model), tensors(fresh)
    for mode in ("cascading", "independent"):
        for stage, other in enumerate(randomized(pooled, fresh, groups, mode)):
            replaced = set().union(*groups[0 if mode == "cascading" else stage : stage + 1])
            for name, tensor in tensors(other.model).items():
                assert torch.equal(tensor, b[name] if name in replaced else a[name]), (mode, stage, name)
            assert (other.layer, other.mean, other.std, other.size) == (pooled.layer, pooled.mean, pooled.std, (24, 32))
    assert set().union(*groups) == set(a)
    assert sum(map(len, groups)) == len(a)


def test_every_kind_of_parameter_is_drawn_anew(tokens):
    class Gain(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 4, 3)
            self.gain = nn.Parameter(torch.rand(4))

    tied = nn.Linear(4, 4)
    others = [nn.MultiheadAttention(4, 2), tied, tied, nn.GroupNorm(2, 4), nn.PReLU(4)]
    model = nn.Sequential(Gain(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), *others)
    for each in (model, tokens.model):
        for parameter in each.parameters():
            nn.init.normal_(parameter, 0.3)
        fresh = reinitialized(each)
        assert fresh is not each
        same = [name for name, p in each.named_parameters() if torch.equal(p, fresh.get_parameter(name))]
        assert same == []
    assert fresh.norm.weight.tolist() == [1.0] * 12
    assert reinitialized(model)[3] is not model[3]
    again = reinitialized(model)
    assert again[3] is again[4]
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in reinitialized(model).named_parameters())


def test_raw_parameters_keep_mean_and_deviation_and_a_constant_stays():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.scale = nn.Parameter(5 + 0.1 * torch.randn(5000)), nn.Parameter(torch.full((3,), 0.7))

    model = Raw()
    fresh = reinitialized(model)
    assert abs(float(fresh.token.detach().mean()) - 5) < 0.01
    assert 0.09 < float(fresh.token.detach().std()) < 0.11
    assert abs(float(torch.corrcoef(torch.stack([fresh.token, model.token]).detach())[0, 1])) < 0.1
    close(fresh.scale.tolist(), [0.7] * 3, atol=1e-6)


def test_a_batch_norm_forgets_its_statistics(pooled):
    fresh = reinitialized(pooled.model)
    assert fresh.stem[1].running_mean.abs().max() == 0
    assert fresh.stem[1].running_var.tolist() == [1.0] * 8


def test_the_seed_of_a_training_gives_no_start_back():
    """With plain manual_seed(n) a network made under the seed n would be drawn once more as it was."""
    for seed in range(5):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 40))
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        fresh = reinitialized(model, seed)
        for name, parameter in model.named_parameters():
            if parameter.numel() > 100:
                pair = torch.stack([parameter.detach().flatten(), fresh.get_parameter(name).detach().flatten()])
                assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.3


def tops(model, stages=5):
    """The first one or two parts of the names in each stage."""
    return [
        sorted({name.rpartition(".")[0].split(".")[0] or name for name in group}) for group in groups_of(model, stages)
    ]


def test_the_stages_of_known_networks():
    from torchvision.models import densenet121, resnet18, vgg11, vit_b_16

    with torch.device("meta"):
        residual = [["fc"], ["layer4"], ["layer3"], ["layer2"], ["bn1", "conv1", "layer1"]]
        assert tops(resnet18()) == residual
        deep = groups_of(vgg11(), 5)
        assert {name.rpartition(".")[0] for name in deep[0]} == {"classifier.0", "classifier.3", "classifier.6"}
        assert {name.rpartition(".")[0] for name in deep[1]} == {"features.18"}
        assert "features.0.weight" in deep[4]
        dense = groups_of(densenet121(), 5)
        assert {".".join(name.split(".")[:2]) for name in dense[3]} == {"features.denseblock2", "features.transition1"}
        attention = groups_of(vit_b_16(), 5)
        assert {"heads.head.weight", "encoder.ln.bias"} < attention[0]
        assert {"class_token", "encoder.pos_embedding", "conv_proj.weight"} < attention[4]
        assert {name.split(".")[2] for name in attention[1]} == {f"encoder_layer_{n}" for n in (8, 9, 10)}
    assert tops(MiniResNet()) == [["head"], ["layer4"], ["layer3"], ["layer2"], ["layer1", "stem"]]
    for model in (MiniResNet(), MiniVGG(), MiniViT()):
        groups = groups_of(model, 5)
        assert len(groups) == 5
        assert all(groups)
        assert sorted(name for group in groups for name in group) == sorted(tensors(model))


def test_small_networks_have_fewer_stages(pooled):
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), 5) == ["0", "2"]
    assert [sorted(g) for g in groups_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 5)] == [
        ["1.bias", "1.weight"],
        ["0.bias", "0.weight"],
    ]
    assert groups_of(nn.Linear(2, 2), 5) == [frozenset({"weight", "bias"})]
    assert blocks(pooled.model, 3) == ["stem", "last", "head"]
    assert blocks(pooled.model, 5) == ["stem.0", "stem.1", "last.0", "last.1", "head"]
    assert len(groups_of(pooled.model, 1)) == 1


def test_stages_by_name(pooled):
    head, rest = groups_of(pooled.model, ["head", ["last", "stem.0"]])
    assert head == {"head.weight", "head.bias"}
    assert {name.rpartition(".")[0] for name in rest} == {"last.0", "last.1", "stem.0"}
    found = randomization(weighted, pooled, several(2), stages=["head", ["last", "stem.0"]])
    assert len(found["hog"].curve) == 3


def test_what_is_wrong_is_said(pooled, plain):
    samples = several(2)
    for stages, error, text in (
        (0, ValueError, "expected at least one stage, got 0"),
        ([], ValueError, r"expected a number of stages or a list of layers' names, got \[\]"),
        ("head", ValueError, "expected a number of stages or a list of layers' names, got 'head'"),
        (["haed"], LookupError, "no layer with parameters called 'haed'; did you mean head"),
        ([["head", "pool"]], LookupError, "no layer with parameters called 'pool'"),
    ):
        with pytest.raises(error, match=text):
            randomization(weighted, pooled, samples, stages=stages)
    with pytest.raises(LookupError, match="no mode called 'cascade'; did you mean cascading"):
        randomization(weighted, pooled, samples, mode="cascade")
    with pytest.raises(ValueError, match="has no parameters that could be drawn anew"):
        groups_of(nn.ReLU(), 5)
    with pytest.raises(ValueError, match="'s0' has none"):
        randomization(weighted, pooled, [replace(samples[0], label=None)])
    for run in (
        lambda: randomization(weighted, pooled, []),
        lambda: label_permutation(weighted, pooled, [], permuted=pooled),
    ):
        with pytest.raises(ValueError, match="no image was measured"):
            run()
    for wrong in (
        lambda c, x, y=None: weighted(c, x, y)[0],
        lambda c, x, y=None: weighted(c, x, y)[: 2 if c is pooled else 1],
    ):
        with pytest.raises(ValueError, match="maps of shape"):
            randomization(wrong, pooled, samples)


def test_the_predicted_class_needs_no_label(pooled):
    bare = [replace(one, label=None) for one in several(2)]
    found = randomization(weighted, pooled, bare, scored="predicted", stages=2)
    labeled = [replace(one, label=int(pooled(one.image[None]).argmax())) for one in bare]
    assert numbers(found) == numbers(randomization(weighted, pooled, labeled, stages=2))


def test_a_class_that_the_permuted_network_lacks_is_said(pooled, seeded, networks, plain):
    fewer = wrap(seeded(networks.pooled, 6, 2), layer="last", normalization="none", size=(24, 32))
    with pytest.raises(ValueError, match=r"label 4 is outside 0\.\.1"):
        label_permutation(grad_cam, pooled, several(4)[2:3], permuted=fewer)
