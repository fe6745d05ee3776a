from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn

from sightline.classifier import UnsuitedError, wrap
from sightline.classifier_training import ClassifierConfig, ClassifierTrainer, train
from sightline.data import Sample, collate
from sightline.wsol_training import (
    REGULARIZERS,
    AttentionDropout,
    CutMix,
    HideAndSeek,
    Part,
    Plain,
    attended,
    attention_dropout,
    cutmix,
    hide,
    regularizer,
    weighted,
)

TEXTS = ["has?grid=2", "cutmix", "cutmix?alpha=0.4&probability=0.5", "adl", "adl?layers=0+2&threshold=0.8&drop=0.5"]


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


class Toy:
    """Noise with a bright top (class 0) or a bright bottom (class 1)."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        image = 0.4 * torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))
        image[:, slice(0, 8) if index % 2 == 0 else slice(8, None)] += 0.5
        return Sample(f"toy{index}", image, index % 2)


def small(outputs=2):
    """A network without dropout; normalization does something."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, outputs))
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *head)
    return wrap(model, layer="2", normalization=((0.3, 0.4, 0.5), (0.2, 0.2, 0.4)), size=16)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


# hide-and-seek


def test_cells_are_hidden_or_kept_whole():
    x = torch.rand(5, 3, 10, 7) + 1
    before = x.clone()
    hidden = hide(x, grid=3, drop=0.5)
    assert torch.equal(x, before)
    rasters = set()
    for n in range(5):
        state = {}
        for row in range(10):
            for column in range(7):
                pixel = hidden[n, :, row, column]
                kept = torch.equal(pixel, x[n, :, row, column])
                assert kept or torch.equal(pixel, torch.zeros(3))
                cell = next(
                    (i, j)
                    for i in range(3)
                    for j in range(3)
                    if i <= row * 3 / 10 < i + 1 and j <= column * 3 / 7 < j + 1
                )
                assert state.setdefault(cell, kept) == kept
        assert len(state) == 9
        rasters.add(tuple(sorted(state.items())))
    assert len(rasters) > 1


@pytest.mark.parametrize("drop", [0.0, 0.2, 0.5])
def test_each_cell_of_each_image_is_hidden_with_the_probability(drop):
    hidden = hide(torch.ones(500, 1, 8, 8), grid=4, drop=drop) == 0
    cells = hidden[:, 0, ::2, ::2].double()
    assert float(cells.mean()) == pytest.approx(drop, abs=0.02)
    assert float((cells.mean(0) - drop).abs().max()) < 0.09
    apart = torch.corrcoef(cells.flatten(1).T)[0, 1:] if drop else torch.zeros(1)
    assert float(apart.abs().max()) < 0.2


def test_what_is_hidden_has_the_mean_color():
    classifier = small()
    hidden = hide(classifier.normalize(torch.rand(4, 3, 16, 16)), grid=2, drop=0.5)
    colors = hidden * torch.tensor(classifier.std).view(3, 1, 1) + torch.tensor(classifier.mean).view(3, 1, 1)
    gone = (hidden == 0).all(1)
    assert gone.any()
    assert torch.allclose(colors.permute(0, 2, 3, 1)[gone], torch.tensor([0.3, 0.4, 0.5]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_image_hides_the_same_cells_whichever_process_has_it(world):
    x, rasters = torch.rand(7, 3, 8, 8) + 1, []
    torch.manual_seed(3)
    whole = hide(x, grid=4, drop=0.5)
    for rank in range(world):
        torch.manual_seed(3)
        part = hide(x[rank::world], grid=4, drop=0.5, part=Part(rank, world))
        assert torch.equal(part, whole[rank::world])
        rasters += [tuple((image[0] == 0).flatten().tolist()) for image in part]
    assert len(set(rasters)) == 7


# CutMix


def slow_cutmix(x, y, alpha):
    """The same draws, and loops over pixels."""
    b, _, h, w = x.shape
    lam = float(torch.distributions.Beta(alpha, alpha).sample())
    center_row, center_column = float(torch.rand(())) * h, float(torch.rand(())) * w
    partner = torch.randperm(b).tolist()
    half_height, half_width = h * (1 - lam) ** 0.5 / 2, w * (1 - lam) ** 0.5 / 2
    mixed, inside = x.clone(), 0
    for row in range(h):
        for column in range(w):
            down = round(center_row - half_height) <= row < round(center_row + half_height)
            across = round(center_column - half_width) <= column < round(center_column + half_width)
            if down and across:
                inside += 1
                for n in range(b):
                    mixed[n, :, row, column] = x[partner[n], :, row, column]
    return mixed, torch.tensor([int(y[p]) for p in partner]), 1 - inside / (h * w)


@pytest.mark.parametrize("seed", range(12))
def test_cutmix_by_loops(seed):
    x, y = torch.rand(4, 3, 9, 12), torch.arange(4)
    before = x.clone()
    torch.manual_seed(seed)
    mixed, other, share = cutmix(x, y, alpha=0.7)
    assert torch.equal(x, before)
    torch.manual_seed(seed)
    expected = slow_cutmix(x, y, 0.7)
    assert torch.equal(mixed, expected[0])
    assert torch.equal(other, expected[1])
    assert share == pytest.approx(expected[2], abs=1e-12)
    assert 0 <= share <= 1


def test_the_share_is_the_area_that_is_left_and_labels_are_the_partners():
    y = torch.arange(6)
    x = y.view(6, 1, 1, 1).expand(6, 1, 20, 16).float()
    for _ in range(50):
        mixed, other, share = cutmix(x, y)
        own = (mixed == x).double().mean((1, 2, 3))
        moved = other != y
        assert torch.allclose(own[moved], torch.full_like(own[moved], share))
        pasted = [set(image.unique().tolist()) <= {int(a), int(b)} for image, a, b in zip(mixed, y, other, strict=True)]
        assert all(pasted)
        assert sorted(other.tolist()) == y.tolist()


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 1 / 2 - 1 / 5 + 1 / 48), (1e4, (0.5**0.5 - 1 / 8) ** 2)])
def test_boxes_have_the_expected_area(alpha, expected):
    # a box of side s around a uniform center keeps s - s^2 / 4 of it inside [0, 1], in each direction
    x, y = torch.zeros(1, 1, 200, 200), torch.zeros(1, dtype=torch.long)
    areas = torch.tensor([1 - cutmix(x, y, alpha=alpha)[2] for _ in range(3000)])
    assert float(areas.mean()) == pytest.approx(expected, abs=0.015)


def test_processes_have_the_same_box_and_partners_of_their_own():
    x, y, shares = torch.rand(7, 3, 12, 12), torch.arange(7), []
    for rank in range(2):
        torch.manual_seed(8)
        _, other, share = cutmix(x[rank::2], y[rank::2])
        assert sorted(other.tolist()) == y[rank::2].tolist()
        shares.append(share)
    assert 0 < shares[0] < 1
    assert shares[0] == shares[1]


def test_cutmix_is_applied_in_its_share_of_the_steps():
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    apply, classifier, count = CutMix(probability=0.3), small(), 0
    for _ in range(600):
        with apply(classifier, x, y) as (seen, targets):
            count += len(targets) == 2
            assert len(targets) == 2 or torch.equal(seen, x)
    assert count / 600 == pytest.approx(0.3, abs=0.06)


def test_the_mixed_loss_is_cross_entropy_with_mixed_targets():
    logits, y, other = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 1, 3, 0, 2])
    mixture = 0.3 * F.one_hot(y, 4).double() + 0.7 * F.one_hot(other, 4).double()
    for smoothing in (0.0, 0.2):
        loss = weighted(((0.3, y), (0.7, other)), lambda t, s=smoothing: F.cross_entropy(logits, t, label_smoothing=s))
        assert float(loss) == pytest.approx(
            float(F.cross_entropy(logits, mixture, label_smoothing=smoothing)), abs=1e-12
        )


# attention dropout


def slow_attention(A, threshold):
    """Loops over images and cells; None asks for the importance map."""
    A = A.detach()
    out = torch.empty_like(A)
    for n in range(len(A)):
        M = [[sum(float(v) for v in A[n, :, i, j]) / A.shape[1] for j in range(A.shape[3])] for i in range(A.shape[2])]
        peak = max(max(row) for row in M)
        for i in range(A.shape[2]):
            for j in range(A.shape[3]):
                if threshold is None:
                    factor = 1 / (1 + torch.tensor(-M[i][j]).double().exp())
                else:
                    factor = 1.0 if M[i][j] < threshold * peak else 0.0
                out[n, :, i, j] = A[n, :, i, j] * factor
    return out


@pytest.mark.parametrize("threshold", [None, 0.9, 0.5])
def test_attention_by_loops(threshold):
    A = torch.randn(3, 4, 5, 6).double().relu()
    found = attended(A, layer="a", threshold=threshold)
    assert torch.allclose(found, slow_attention(A, threshold), atol=1e-12)
    assert threshold is None or ((found == 0) & (A > 0)).any()


def test_the_importance_map_is_learned_through():
    A = torch.randn(1, 2, 2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: attended(a, layer="a", threshold=None), A)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.relu = nn.ReLU()
        self.flat = nn.Flatten()

    def forward(self, x):
        return self.flat(self.relu(self.b(self.a(x))))


def test_layers_are_masked_in_the_forward_pass_and_free_afterwards():
    model, x = Twice().double(), torch.rand(2, 3, 8, 8).double()
    plain = model(x)
    with attention_dropout(model, ["a", "relu"], threshold=0.8, drop=1.0):
        masked = model(x)
    with attention_dropout(model, ["a"], drop=0.0):
        weighed = model(x)
    a = slow_attention(model.a(x), 0.8)
    assert torch.allclose(masked, slow_attention(model.b(a).relu(), 0.8).flatten(1))
    assert torch.allclose(weighed, model.b(slow_attention(model.a(x), None)).relu().flatten(1))
    assert torch.equal(model(x), plain)
    assert hooks(model) == 0


def test_each_layer_draws_once_a_step_with_the_probability():
    model, x = Twice(), torch.rand(2, 3, 6, 6)
    with torch.no_grad():
        a = model.a(x)
        kinds = {}
        for first, first_threshold in (("mask", 0.9), ("map", None)):
            one = attended(a, layer="a", threshold=first_threshold)
            for second, second_threshold in (("mask", 0.9), ("map", None)):
                kinds[first, second] = attended(model.b(one), layer="b", threshold=second_threshold).relu().flatten(1)
        counts = dict.fromkeys(kinds, 0)
        for _ in range(400):
            with attention_dropout(model, ["a", "b"], drop=0.75):
                out, again = model(x), model(x)
            assert torch.equal(out, again)
            counts[next(kind for kind, value in kinds.items() if torch.allclose(out, value, atol=1e-6))] += 1
    for (first, second), count in counts.items():
        expected = (0.75 if first == "mask" else 0.25) * (0.75 if second == "mask" else 0.25)
        assert count / 400 == pytest.approx(expected, abs=0.08)


def test_no_hook_stays_after_an_error():
    model, x = Twice(), torch.rand(1, 3, 8, 8)
    refused = pytest.raises(LookupError, match="no layer called 'rel'; did you mean relu")
    with refused, attention_dropout(model, ["a", "rel"]):
        pass
    assert hooks(model) == 0
    told = r"needs maps \(b, c, i, j\), and layer 'flat' gives shape \(1, 80\); name convolutional layers: adl\?layers="
    with pytest.raises(UnsuitedError, match=told), attention_dropout(model, ["a", "flat"]):
        model(x)
    assert hooks(model) == 0


# what a configuration says


def test_texts_are_settings():
    assert regularizer("none") == Plain()
    assert regularizer("has") == HideAndSeek(grid=4, drop=0.5)
    assert regularizer("has?grid=7&drop=0") == HideAndSeek(7, 0.0)
    assert regularizer("cutmix?alpha=2") == CutMix(2.0, 1.0)
    assert regularizer("adl?layers=layer3+layer4&drop=1") == AttentionDropout("layer3+layer4", 0.9, 1.0)
    assert regularizer("adl?layers=2") == AttentionDropout("2", 0.9, 0.75)
    assert list(REGULARIZERS) == ["none", "has", "cutmix", "adl"]


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("cutmx", LookupError, "no regularizer called 'cutmx'; did you mean cutmix"),
        ("none?drop=1", LookupError, "none: no setting called 'drop'; known: none"),
        ("has?girds=3", LookupError, "has: no setting called 'girds'; did you mean grid"),
        ("has?grid=2.5", TypeError, "has: grid: expected a whole number, got 2.5"),
        ("has?drop=much", TypeError, "has: drop: expected a number, got 'much'"),
        ("has?drop=true", TypeError, "has: drop: expected a number, got True"),
        (
            "has?grid=0",
            ValueError,
            r"has: expected grid >= 1 cells a side, .* got grid=0, drop=0.5; .*has\?grid=4&drop=0.5",
        ),
        ("has?drop=1", ValueError, "each hidden with 0 <= drop < 1, got grid=4, drop=1.0"),
        (
            "cutmix?alpha=0",
            ValueError,
            r"cutmix: expected alpha > 0 .* got alpha=0.0, probability=1.0; .*cutmix\?alpha=1",
        ),
        ("cutmix?probability=1.1", ValueError, r"probability in \[0, 1\], got alpha=1.0, probability=1.1"),
        (
            "adl?threshold=90",
            ValueError,
            r"adl: expected threshold and drop in \[0, 1\], got threshold=90.0, drop=0.75; ",
        ),
        ("adl?drop=-1", ValueError, "got threshold=0.9, drop=-1.0"),
        ("has?grid", ValueError, r"expected name\?key=value&key=value, got 'has\?grid'"),
    ],
)
def test_what_makes_no_sense_is_said_when_the_configuration_is_made(text, error, told):
    with pytest.raises(error, match=told):
        ClassifierConfig(regularizer=text)


# training


def trainer_of(text, outputs=2, **settings):
    classifier = small(outputs)
    trainer = ClassifierTrainer(classifier, ClassifierConfig(regularizer=text, warmup=0.0, **settings))
    trainer.setup(Fabric(accelerator="cpu", devices=1))
    trainer.epoch(0, 1)
    return classifier, trainer, collate([Toy()[n] for n in range(6)])


def test_a_step_learns_from_hidden_images():
    classifier, trainer, batch = trainer_of("has?grid=3&drop=0.4")
    x = classifier.normalize(batch.x)
    torch.manual_seed(5)
    logits = classifier.model(hide(x, grid=3, drop=0.4))
    torch.manual_seed(5)
    found = trainer.step(batch, 1.0)
    assert float(found["loss"]) == pytest.approx(F.cross_entropy(logits, batch.y).item(), rel=1e-6)
    assert float(found["accuracy"]) == pytest.approx(float((logits.argmax(1) == batch.y).float().mean()))
    assert float(found["loss"]) != pytest.approx(F.cross_entropy(classifier.model(x), batch.y).item(), rel=1e-3)


@pytest.mark.parametrize("outputs", [1, 5])
def test_a_step_learns_both_labels_of_mixed_images(outputs):
    classifier, trainer, batch = trainer_of(
        "cutmix?alpha=3", outputs, label_smoothing=0.1, weight_decay=0.0, schedule="constant"
    )
    batch.y[:] = torch.tensor([0, 1, 1, 0, 0, 1])
    weight = classifier.model[5].weight.detach().clone()
    torch.manual_seed(2)
    torch.rand(())
    mixed, other, share = cutmix(classifier.normalize(batch.x), batch.y, alpha=3.0)
    assert 0.1 < share < 0.9
    assert not torch.equal(other, batch.y)
    logits = classifier.model(mixed)
    logits = torch.cat([torch.zeros(6, 1), logits], 1) if outputs == 1 else logits
    losses = [F.cross_entropy(logits, y, label_smoothing=0.1) for y in (batch.y, other)]
    expected = share * losses[0] + (1 - share) * losses[1]
    (gradient,) = torch.autograd.grad(expected, classifier.model[5].weight)
    torch.manual_seed(2)
    found = trainer.step(batch, 1.0)
    hits = [float((logits.argmax(1) == y).float().mean()) for y in (batch.y, other)]
    assert float(found["loss"]) == pytest.approx(expected.item(), rel=1e-5)
    assert float(found["accuracy"]) == pytest.approx(share * hits[0] + (1 - share) * hits[1], rel=1e-5)
    assert torch.allclose(classifier.model[5].weight, weight - 0.05 * gradient, atol=1e-6)


@pytest.mark.parametrize("layers", ["", "0+2"])
def test_a_step_drops_attention_at_the_layer_that_is_explained_or_at_those_named(layers):
    classifier, trainer, batch = trainer_of(f"adl?drop=1&threshold=0.7{'&layers=' * bool(layers)}{layers}")
    model, z = classifier.model, classifier.normalize(batch.x)
    for n, module in enumerate(model):
        z = module(z)
        z = attended(z, layer=str(n), threshold=0.7) if n == 2 or str(n) in layers else z
    logits = z
    found = trainer.step(batch, 1.0)
    assert float(found["loss"]) == pytest.approx(F.cross_entropy(logits, batch.y).item(), rel=1e-5)
    assert hooks(model) == 0


class OneOf:
    """What a trainer sees of Fabric in one of several processes; the others add nothing to its sums."""

    device = torch.device("cpu")

    def __init__(self, rank, world):
        self.global_rank, self.world_size = rank, world

    def to_device(self, module):
        return module

    def autocast(self):
        return nullcontext()

    def all_reduce(self, values, reduce_op):
        return values


@pytest.mark.parametrize("text", ["has?grid=3", "adl?layers=0&threshold=0.7&drop=0.5"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_loss_of_a_step_is_the_same_in_several_processes(text, world):
    losses = {}
    for processes in (1, world):
        total = 0.0
        for rank in range(processes):
            with torch.random.fork_rng([]):
                torch.manual_seed(7)
                body = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)]
                classifier = wrap(nn.Sequential(*body), layer="1", normalization="none", size=16)
            trainer = ClassifierTrainer(classifier, ClassifierConfig(regularizer=text))
            trainer.setup(OneOf(rank, processes))
            trainer.epoch(0, 1)
            batch = collate([Toy()[n] for n in range(7)][rank::processes])
            share = len(batch) / 7
            torch.manual_seed(11)
            total += share * float(trainer.step(batch, share)["loss"])
        losses[processes] = total
    assert losses[world] == pytest.approx(losses[1], abs=1e-6)


def test_an_unknown_label_is_found_behind_every_regularizer():
    for text in ("none", *TEXTS):
        classifier, trainer, batch = trainer_of(text)
        batch.y[3] = 2
        with pytest.raises(ValueError, match=r"label 2 is outside 0\.\.1: the network has 2 classes"):
            trainer.step(batch, 1.0)
        assert hooks(classifier.model) == 0


def stop(progress):
    if (progress.epoch, progress.step) == (1, 3):
        raise InterruptedError


def trained(text, out=None, report=None):
    classifier = small()
    config = ClassifierConfig(epochs=3, batch=4, lr=0.05, warmup=0.5, augment="resized_crop+flip", regularizer=text)
    history = train(classifier, Toy(), config, out=out, every=2, report=report, accelerator="cpu")
    return classifier, history


@pytest.mark.parametrize("text", TEXTS)
def test_training_is_deterministic_resumable_and_leaves_the_network_alone(text, tmp_path):
    whole, history = trained(text)
    with pytest.raises(InterruptedError):
        trained(text, tmp_path, stop)
    resumed, again = trained(text, tmp_path)
    plain, _ = trained("none")
    states = [classifier.model.state_dict() for classifier in (whole, resumed, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])
    assert history == again
    assert history[-1]["loss"] < history[0]["loss"] or "cutmix" in text
    assert hooks(whole.model) == 0
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(whole(x), whole.model.eval()(whole.normalize(x)))
    with pytest.raises(ValueError, match=r"regularizer was .* and is 'none'"):
        trained("none", tmp_path)


def test_the_regularizer_is_a_setting_of_the_command_line():
    from sightline.cli._options import pairs
    from sightline.settings import bind

    made = bind(ClassifierConfig, pairs(("regularizer=cutmix?alpha=0.5&probability=0.9", "lr=0.1")))()
    assert made.regularizer == "cutmix?alpha=0.5&probability=0.9"
    assert regularizer(made.regularizer) == CutMix(0.5, 0.9)
