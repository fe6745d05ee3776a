"""CALM's objectives and trainer: every step again by `.backward()` and a plain optimizer."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import nn

from sightline.classifier import UnsuitedError, wrap
from sightline.classifier_training import ClassifierConfig
from sightline.data import Sample, collate
from sightline.explainers._calm import surgery
from sightline.explainers._calm_training import (
    CalmConfig,
    CalmTrainer,
    em,
    groups,
    last_stage,
    ml,
    posterior,
    train_calm,
)
from sightline.models import MiniResNet
from sightline.models._gap import inception_v3_gap, resnet50_gap, vgg16_gap
from sightline.models._mini_vgg import mini_vgg

BRIEF = {"objective": "em", "epochs": 2, "batch": 4, "augment": "none", "lr": 0.01, "lag": 3}
OBJECTIVES = (("ml", "current"), ("em", "current"), ("em", "lagged"), ("em", "ema"))

every_objective = pytest.mark.parametrize(("objective", "teacher"), OBJECTIVES)


class Toy:
    """Noise with a bright top (class 0) or a bright bottom (class 1)."""

    classes = ("top", "bottom")

    def __init__(self, count=12, side=16):
        self.count, self.side = count, side

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = 0.4 * torch.rand(3, self.side, self.side, generator=torch.Generator().manual_seed(index))
        half = self.side // 2
        image[:, slice(0, half) if index % 2 == 0 else slice(half, None)] += 0.5
        return Sample(f"toy{index}", image, index % 2)


def small(seed=0, drop=0.0, **settings):
    """A CALM network of two classes with batch norm, 4 x 4 cells; its parts are "0" (conv), "1" (norm), "3" (conv)."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        act = nn.Sequential(nn.ReLU(), nn.Dropout(drop)) if drop else nn.ReLU()
        body = [nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), act, nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU()]
        model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    return surgery(wrap(model, layer="4", normalization="none", size=16), **settings)


def configured(**changes):
    return CalmConfig(**{**BRIEF, "slow": ("0", "1"), **changes})


def batch_of(*indices):
    return collate([Toy()[index] for index in indices])


def random_joint(seed=0):
    log_joint = torch.randn(3, 4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return log_joint - log_joint.logsumexp((1, 2, 3), keepdim=True), torch.tensor([2, 0, 3])


# the objectives --------------------------------------------------------------------------------------------------


def test_the_objectives_are_their_sums():
    log_joint, y = random_joint()
    q = posterior(log_joint, y)
    likelihood, bound = 0.0, 0.0
    for n in range(3):
        p = log_joint[n, y[n]].exp()
        total = sum(float(p[i, j]) for i in range(2) for j in range(5))
        likelihood -= math.log(total) / 3
        for i in range(2):
            for j in range(5):
                share = float(p[i, j]) / total
                assert float(q[n, i, j]) == pytest.approx(share, abs=1e-14)
                bound -= share * math.log(float(p[i, j])) / 3
    assert float(ml(log_joint, y)) == pytest.approx(likelihood, abs=1e-12)
    assert float(em(log_joint, q, y)) == pytest.approx(bound, abs=1e-12)


def test_no_gradient_passes_the_posterior():
    log_joint, y = random_joint()
    assert not posterior(log_joint.requires_grad_(), y).requires_grad


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_em_is_never_below_ml_and_touches_it_less_the_entropy(seed):
    log_joint, y = random_joint(seed)
    q = posterior(log_joint, y)
    entropy = -(q * q.log()).sum((1, 2)).mean()
    assert float(em(log_joint, q, y)) == pytest.approx(float(ml(log_joint, y) + entropy), abs=1e-10)
    other = posterior(random_joint(seed + 1)[0], y)
    assert float(em(log_joint, other, y) + (other * other.log()).sum((1, 2)).mean()) >= float(ml(log_joint, y)) - 1e-12


def slopes(model, loss):
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("detach", [False, True])
def test_with_the_present_posterior_em_has_the_gradient_of_ml(activation, detach):
    """Fisher's identity; an older posterior does not have it."""
    classifier, batch = small(activation=activation, detach=detach), batch_of(0, 1, 2)
    model = classifier.model.double().train()
    model.attention.bias.data.fill_(0.1)
    log_joint = model.joint(batch.x.double())
    by_ml = slopes(model, ml(model.joint(batch.x.double()), batch.y))
    by_em = slopes(model, em(log_joint, posterior(log_joint, batch.y), batch.y))
    assert by_ml.abs().max() > 0.01
    torch.testing.assert_close(by_em, by_ml, rtol=0, atol=1e-6)
    torch.testing.assert_close(by_em, by_ml, rtol=1e-9, atol=1e-12)
    older = copy.deepcopy(model)
    older.attention.weight.data.mul_(-3)
    log_joint = model.joint(batch.x.double())
    lagged = slopes(model, em(log_joint, posterior(older.joint(batch.x.double()), batch.y), batch.y))
    assert (lagged - by_ml).abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["softplus", "relu"])
def test_a_detached_normalizer_only_pushes_the_attention_up(activation):
    """With its own gradient the attention goes down where the class is not, and the scale of a ReLU stays free."""
    batch, found = batch_of(0, 1, 2, 3), {}
    for detach in (True, False):
        model = small(activation=activation, detach=detach, seed=1).model.double().eval()
        model.attention.bias.data.fill_(2.0)  # positive attention everywhere
        kept = []
        handle = model.attention.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        loss = ml(model.joint(batch.x.double()), batch.y)
        handle.remove()
        assert kept[0].min() > 0
        (found[detach],) = torch.autograd.grad(loss, kept[0])
    assert (found[True] < 0).all()
    assert (found[False] < 0).any()
    assert (found[False] > 0).any()
    assert found[True].norm() > 2 * found[False].norm()


def test_dead_attention_trains_without_nan():
    classifier = small(activation="relu")
    classifier.model.attention.bias.data.fill_(-100.0)
    history = train_calm(classifier, Toy(), configured(), accelerator="cpu")
    assert all(math.isfinite(value) for one in history for value in one.values())
    assert history[-1]["spread"] == pytest.approx(1.0, abs=1e-5)


# the trainer -----------------------------------------------------------------------------------------------------


def started(classifier, config):
    trainer = CalmTrainer(classifier, config)
    trainer.setup(Fabric(accelerator="cpu", devices=1))
    trainer.epoch(0, 3)
    return trainer


def slow_training(classifier, config, batches):
    """The same steps with .backward(), by the paper's words."""
    model = copy.deepcopy(classifier.model).train()
    older = copy.deepcopy(model)
    slow = [p for name, p in model.named_parameters() if name.startswith(("trunk.0.", "trunk.1."))]
    fast = [p for name, p in model.named_parameters() if not name.startswith(("trunk.0.", "trunk.1."))]
    optimizer = torch.optim.SGD(
        [{"params": slow, "lr": config.lr}, {"params": fast, "lr": 10 * config.lr}],
        momentum=0.9,
        weight_decay=1e-4,
        nesterov=True,
    )
    losses = []
    for n, batch in enumerate(batches):
        if config.teacher == "lagged" and n % config.lag == 0:
            older = copy.deepcopy(model)
        joint = model.joint(batch.x)[torch.arange(len(batch)), batch.y].flatten(1)
        if config.objective == "ml":
            loss = -joint.exp().sum(1).log().mean()
        else:
            teacher = copy.deepcopy(model if config.teacher == "current" else older)
            with torch.no_grad():
                p = teacher.joint(batch.x)[torch.arange(len(batch)), batch.y].flatten(1).exp()
            loss = -((p / p.sum(1, keepdim=True)) * joint).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if config.teacher == "ema":
            for old, new in zip(older.parameters(), model.parameters(), strict=True):
                old.data = config.decay_teacher * old.data + (1 - config.decay_teacher) * new.data
    return model, older, losses


@every_objective
def test_a_step_is_the_papers(objective, teacher):
    config = configured(objective=objective, teacher=teacher, decay_teacher=0.7)
    classifier = small()
    classifier.model.double()
    batches = [batch_of(0, 1, 2), batch_of(3, 4), batch_of(5, 6, 7, 8), batch_of(1, 2), batch_of(9, 3)]
    batches = [type(one)(one.ids, one.x.double(), one.y, one.samples) for one in batches]
    model, older, losses = slow_training(classifier, config, batches)
    trainer = started(classifier, config)
    found = [trainer.step(batch, 1.0) for batch in batches]
    assert [float(one["loss"]) for one in found] == pytest.approx(losses, abs=1e-10)
    for (name, one), again in zip(classifier.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, again, rtol=0, atol=1e-10, msg=name)
    assert (trainer.teacher is None) == (objective == "ml" or teacher == "current")
    if trainer.teacher is not None:
        for one, again in zip(trainer.teacher.parameters(), older.parameters(), strict=True):
            torch.testing.assert_close(one, again, rtol=0, atol=1e-10)


def weights_after(config, **settings):
    classifier = small(**settings)
    train_calm(classifier, Toy(), config, accelerator="cpu")
    return torch.cat([value.flatten().double() for value in classifier.model.state_dict().values()])


def test_em_of_the_present_is_ml_and_em_of_the_past_is_not():
    by_ml = weights_after(configured(objective="ml"))
    torch.testing.assert_close(weights_after(configured(teacher="current")), by_ml, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights_after(configured(teacher="lagged", lag=1)), by_ml, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights_after(configured(teacher="ema", decay_teacher=0.0)), by_ml, rtol=0, atol=1e-5)
    assert (weights_after(configured(teacher="lagged", lag=6)) - by_ml).abs().max() > 1e-3
    assert (weights_after(configured(teacher="ema")) - by_ml).abs().max() > 1e-3


def test_a_teacher_of_no_age_gives_the_gradient_of_ml_also_with_dropout():
    """Teacher and network drop the same; what follows in the step draws as if there were no teacher."""
    steps, ends = {}, {}
    for name, changes in (
        ("ml", {"objective": "ml"}),
        ("young", {"teacher": "lagged", "lag": 1}),
        ("ema", {"teacher": "ema", "decay_teacher": 0.0}),
    ):
        trainer = started(small(drop=0.5), configured(**changes, lr=0.1))
        with torch.random.fork_rng([]):
            torch.manual_seed(4)
            for n in range(3):
                trainer.step(batch_of(n, n + 1, n + 2), 1.0)
            ends[name] = torch.rand(())
        steps[name] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    start = torch.cat([p.detach().flatten() for p in small(drop=0.5).model.parameters()])
    assert (steps["ml"] - start).abs().max() > 0.01
    for name in ("young", "ema"):
        torch.testing.assert_close(steps[name], steps["ml"], rtol=0, atol=1e-5)
        assert ends[name] == ends["ml"]


def test_the_metrics_say_what_they_say():
    trainer = started(small(), configured(teacher="current"))
    batch = batch_of(0, 1, 2)
    with torch.no_grad():
        p = copy.deepcopy(trainer.model).joint(batch.x).exp()
    found = {name: float(value) for name, value in trainer.step(batch, 1.0).items()}
    of_label = p[torch.arange(3), batch.y]
    h = p.sum(1).flatten(1)
    assert set(found) == {"loss", "nll", "accuracy", "spread"}
    assert found["nll"] == pytest.approx(float(-of_label.sum((1, 2)).log().mean()), abs=1e-5)
    assert found["accuracy"] == pytest.approx(float((p.sum((2, 3)).argmax(1) == batch.y).float().mean()))
    assert found["spread"] == pytest.approx(float((-(h * h.log()).sum(1)).exp().mean()) / 16, abs=1e-5)


def test_what_is_fast_learns_by_default_at_a_tenth_of_the_classifiers_rate():
    assert CalmConfig().ratio * CalmConfig().lr == pytest.approx(ClassifierConfig().lr / 10)
    assert (CalmConfig().epochs, CalmConfig().batch, CalmConfig().ratio) == (40, 64, 10)
    assert (CalmConfig().objective, CalmConfig().teacher) == ("ml", "lagged")


def test_the_rates_fall_every_thirty_epochs_and_keep_their_ratio():
    trainer = CalmTrainer(small(), CalmConfig(slow=("0",)))
    trainer.setup(Fabric(accelerator="cpu", devices=1))
    for epoch, factor in ((0, 1.0), (29, 1.0), (30, 0.1), (39, 0.1), (60, 0.01)):
        trainer.epoch(epoch, 5)
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates == pytest.approx([5e-4 * factor, 5e-3 * factor])
    assert all(group["momentum"] == 0.9 and group["nesterov"] for group in trainer.optimizer.param_groups)
    assert all(group["weight_decay"] == 1e-4 for group in trainer.optimizer.param_groups)


class StopError(Exception):
    pass


@every_objective
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, objective, teacher):
    config = configured(objective=objective, teacher=teacher, lag=4, epochs=3, augment="flip+crop")
    whole, stopped, resumed = small(), small(), small(seed=1)
    history = train_calm(whole, Toy(), config, accelerator="cpu")

    def stop(progress):
        if (progress.epoch, progress.step) == (1, 3):
            raise StopError

    with pytest.raises(StopError):
        train_calm(stopped, Toy(), config, out=tmp_path, every=1, report=stop, accelerator="cpu")
    assert train_calm(resumed, Toy(), config, out=tmp_path, accelerator="cpu") == history
    states = [one.model.state_dict() for one in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("teacher", ["lagged", "ema"])
def test_the_teacher_survives_a_checkpoint_bit_by_bit(tmp_path, teacher):
    config = configured(teacher=teacher, lag=2)
    trainer = started(small(), config)
    for n in range(3):
        trainer.step(batch_of(n, n + 1), 1.0)
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    before = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    trainer.step(batch_of(4, 5), 1.0)
    trainer.step(batch_of(6, 7), 1.0)
    loaded = started(small(seed=9), config)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(before[name], value) for name, value in loaded.teacher.state_dict().items())
    assert any(not torch.equal(before[name], value) for name, value in loaded.model.state_dict().items())
    assert loaded.done == 3
    loaded.step(batch_of(4, 5), 1.0)
    loaded.step(batch_of(6, 7), 1.0)
    for ours, theirs in ((loaded.model, trainer.model), (loaded.teacher, trainer.teacher)):
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_a_checkpoint_of_another_objective_or_attention_does_not_fit(tmp_path):
    train_calm(small(), Toy(), configured(), out=tmp_path, accelerator="cpu")
    with pytest.raises(ValueError, match="teacher was 'lagged' and is 'ema'"):
        train_calm(small(), Toy(), configured(teacher="ema"), out=tmp_path, accelerator="cpu")
    with pytest.raises(ValueError, match="activation was 'softplus' and is 'relu', detach was False and is True"):
        train_calm(small(activation="relu", detach=True), Toy(), configured(), out=tmp_path, accelerator="cpu")


def test_training_learns_and_leaves_the_network_as_it_was_otherwise():
    classifier = small()
    classifier.model.trunk[0].weight.requires_grad_(False)
    kept = classifier.model.trunk[0].weight.clone()
    state = torch.get_rng_state()
    history = train_calm(classifier, Toy(24), configured(epochs=8, lr=0.02, lag=4), accelerator="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert history[-1]["nll"] < 0.5 * history[0]["nll"]
    assert history[-1]["accuracy"] > 0.99
    assert not any(module.training for module in classifier.model.modules())
    assert torch.equal(classifier.model.trunk[0].weight, kept)
    assert not classifier.model.trunk[0].weight.requires_grad
    assert all(p.requires_grad for name, p in classifier.model.named_parameters() if name != "trunk.0.weight")
    assert all(p.grad is None for p in classifier.model.parameters())


# parameter groups ------------------------------------------------------------------------------------------------


def slow_names(classifier, **changes):
    model = classifier.model
    slow, fast = groups(model, CalmConfig(**changes))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {id(one) for one in slow} | {id(one) for one in fast} == set(names)
    assert not {id(one) for one in slow} & {id(one) for one in fast}
    return {names[id(one)] for one in slow}


@pytest.fixture(scope="module")
def resnet():
    from torchvision.models.resnet import BasicBlock, ResNet

    with torch.random.fork_rng([]):
        model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=3)
    return surgery(wrap(model, layer="layer4", normalization="imagenet", size=64))


@pytest.fixture(scope="module")
def mini():
    model = MiniResNet(3, widths=(4, 4, 4, 4))
    return surgery(wrap(model, layer="layer4", normalization="none", size=32))


PUBLISHED = "conv1", "layer1", "layer2", "layer3"


def test_the_stem_and_three_stages_of_resnet18_are_slow(resnet):
    slow = slow_names(resnet)
    parts = ("trunk.conv1.", "trunk.bn1.", "trunk.layer1.", "trunk.layer2.", "trunk.layer3.")
    assert slow == {name for name, _ in resnet.model.named_parameters() if name.startswith(parts)}
    assert slow - slow_names(resnet, slow=PUBLISHED) == {"trunk.bn1.weight", "trunk.bn1.bias"}
    assert not slow_names(resnet, slow=PUBLISHED) - slow


def test_by_substring_the_first_convolutions_of_layer4_are_slow_too(resnet):
    """As the published code groups them."""
    more = slow_names(resnet, slow=PUBLISHED, match="substring") - slow_names(resnet, slow=PUBLISHED)
    assert more == {"trunk.layer4.0.conv1.weight", "trunk.layer4.1.conv1.weight"}


def test_the_groups_of_mini_resnet_by_both_rules(mini):
    parts = ("trunk.stem.", "trunk.layer1.", "trunk.layer2.", "trunk.layer3.")
    by_prefix = {name for name, _ in mini.model.named_parameters() if name.startswith(parts)}
    before = ("stem", "conv1", "layer1", "layer2", "layer3", "features")
    assert slow_names(mini) == slow_names(mini, slow=before) == by_prefix
    assert slow_names(mini, slow=before, match="substring") == by_prefix | {"trunk.layer4.conv1.weight"}
    assert slow_names(mini, slow=("layer4.conv1",)) == {"trunk.layer4.conv1.weight"}


def fast_parts(classifier):
    """What of the trunk is fast by default, by the parts that hold it; everything else of it is slow."""
    names, slow = {name for name, _ in classifier.model.named_parameters()}, slow_names(classifier)
    fast = names - slow
    branches = {name for name in names if name.startswith(("classes.", "attention."))}
    assert branches <= fast
    return {name.rpartition(".")[0].removeprefix("trunk.") for name in fast - branches}


def without_drawing(make):
    """A network of the torchvision zoo, with weights of no interest."""
    with torch.random.fork_rng([]):
        return make()


def test_the_last_stage_of_other_networks_is_fast():
    from torchvision.models import DenseNet

    assert fast_parts(surgery(mini_vgg(3, widths=(4, 4, 4, 4, 4)))) == {"features.31", "features.32"}
    dense = without_drawing(lambda: DenseNet(4, (1, 1, 2), num_init_features=8, num_classes=3))
    parts = fast_parts(surgery(wrap(dense, layer="features", normalization="none", size=64)))
    assert {part.split(".")[1] for part in parts} == {"denseblock3", "norm5"}
    assert len([part for part in parts if "denselayer" in part]) == 8
    middle = surgery(wrap(MiniResNet(3, widths=(4, 4, 4, 4)), layer="layer3", normalization="none", size=32))
    assert {part.split(".")[0] for part in fast_parts(middle)} == {"layer3"}


@pytest.mark.parametrize(
    ("build", "fast"), [(vgg16_gap, {"conv"}), (inception_v3_gap, {"conv"}), (resnet50_gap, {"layer4"})]
)
def test_the_last_stage_of_gap_networks_is_fast(build, fast):
    """The head, a part behind the layer here, is gone in a CALM network."""
    network = build(3, size=64)
    last = last_stage(network.model, network.layer)
    weighted = {name.split(".")[0] for name, _ in network.model.named_parameters()}
    assert weighted & set(last) == {*fast, "head"}


def test_a_trunk_of_one_layer_is_slow_and_a_frozen_one_leaves_the_branches_fast():
    one = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    single = surgery(wrap(one, layer="0", normalization="none", size=16))
    assert slow_names(single) == {"trunk.0.weight", "trunk.0.bias"}
    whole = small()
    everything = {f"trunk.{name}" for name, _ in whole.model.trunk.named_parameters()}
    assert slow_names(whole, slow=("0", "1", "3")) == everything
    whole.model.trunk.requires_grad_(False)
    before = {name: value.clone() for name, value in whole.model.named_parameters()}
    train_calm(whole, Toy(), CalmConfig(**BRIEF), accelerator="cpu")
    moved = {name for name, value in whole.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"classes.weight", "classes.bias", "attention.weight", "attention.bias"}
    whole.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the network learns"):
        CalmTrainer(whole, CalmConfig())


def test_a_group_that_is_empty_is_an_error_that_names_the_parts(mini, plain):
    told = "the parts of the trunk are stem, layer1, layer2, layer3, layer4"
    with pytest.raises(ValueError, match=rf"slow=\('conv',\) \(match='prefix'\) finds no parameter; {told}"):
        CalmTrainer(mini, CalmConfig(slow=("conv",)))
    with pytest.raises(ValueError, match=rf"finds every parameter; {told}"):
        CalmTrainer(mini, CalmConfig(slow=("trunk", "classes", "attention"), match="substring"))


# errors ----------------------------------------------------------------------------------------------------------


def test_settings_out_of_range_are_errors(plain):
    for rule, wrong in (
        (">= 1", {"epochs": 0, "batch": -1, "lag": 0, "decay_every": 0}),
        ("> 0", {"lr": 0.0, "ratio": -1.0, "decay": 0.0}),
        (">= 0", {"weight_decay": -1.0}),
        ("in (0, 1)", {"momentum": 1.0}),
        ("in [0, 1)", {"decay_teacher": 1.0}),
    ):
        for name, value in wrong.items():
            with pytest.raises(ValueError, match=rf"^expected {name} {re.escape(rule)}, got {name}={value}$"):
                CalmConfig(**{name: value})
    with pytest.raises(LookupError, match=r"no objective called 'mle'; did you mean ml"):
        CalmConfig(objective="mle")
    with pytest.raises(LookupError, match="no teacher called 'lag'; did you mean lagged"):
        CalmConfig(teacher="lag")
    with pytest.raises(LookupError, match="no match called 'regex'"):
        CalmConfig(match="regex")
    with pytest.raises(LookupError, match="no augmentation called 'flop'"):
        CalmConfig(augment="flop")


def test_what_cannot_be_trained_is_an_error(pooled, plain):
    with pytest.raises(UnsuitedError, match=r"expected a CALM network, got Pooled; .*explainers\.surgery"):
        train_calm(pooled, Toy(), configured(), accelerator="cpu")
    trainer = started(small(), configured())
    image = torch.rand(3, 16, 16)
    with pytest.raises(ValueError, match="training CALM needs a label for every image; 'b' has none"):
        trainer.step(collate([Sample("a", image, 0), Sample("b", image)]), 1.0)
    with pytest.raises(ValueError, match=r"label 2 is outside 0\.\.1"):
        trainer.step(collate([Sample("a", image, 2)]), 1.0)


def test_under_bf16_the_probabilities_stay_in_32_bits():
    trainer = CalmTrainer(small(), configured(precision="bf16-mixed"))
    trainer.setup(Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"))
    trainer.epoch(0, 1)
    found = trainer.step(batch_of(0, 1, 2), 1.0)
    assert found["loss"].dtype == torch.float32
    assert F.relu(found["loss"]) > 0
