"""CASM's training: each step against a slow one with `.backward()`, the history, the thinnings, resuming, the area."""

import copy
import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sightline.classifier import wrap
from sightline.classifier_training import ClassifierConfig, train
from sightline.data import Sample, collate
from sightline.explainers._casm_training import (
    CASM_CODE,
    CASM_PAPER,
    LAMBDAS,
    CasmConfig,
    CasmTrainer,
    History,
    kept,
    train_casm,
)
from sightline.processes import fabric_of, wait
from sightline.training import Trainer, fit

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


class Two(nn.Module):
    """Two scales with batch norm; `maps` gives the taps by hand."""

    def __init__(self, classes=3, drop=0.0):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(5, 7, 3, 2, 1), nn.BatchNorm2d(7), nn.ReLU())
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(7, classes)

    def maps(self, x):
        a = self.stem(x)
        b = self.last(a)
        return [a, b], self.head(self.drop(b.mean((2, 3))))

    def forward(self, x):
        return self.maps(x)[1]


class Colors:
    """Images of noise, brighter in one channel, at a random quarter: the label says which."""

    def __init__(self, count=24, dtype=torch.float32):
        randomness = torch.Generator().manual_seed(1)
        self.samples = []
        for n in range(count):
            image = 0.5 * torch.rand(3, 8, 8, generator=randomness)
            i, j = (4 * int(v) for v in torch.randint(2, (2,), generator=randomness))
            image[n % 3, i : i + 4, j : j + 4] += 0.5
            self.samples.append(Sample(f"{n}", image.to(dtype), n % 3))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def two(seeded, dtype=torch.float64, **settings):
    return wrap(
        seeded(Two, seed=3, dtype=dtype, **settings), normalization=(MEAN.tolist(), STD.tolist()), size=8, layer="last"
    )


def quick(**settings):
    start = {"epochs": 1, "batch": 8, "fraction": 1.0, "augment": "none"}
    return CasmConfig(**{**start, **settings})


def prepared(classifier, config):
    trainer = CasmTrainer(classifier, config)
    trainer.setup(fabric_of("cpu", "32-true"))
    trainer.epoch(0, 10)
    return trainer


class Slow:
    """The algorithm with a `.backward()` for each loss; batch by batch, in normalized space, taps by hand."""

    def __init__(self, classifier, config):
        c, self.config = config, config
        self.f = copy.deepcopy(classifier.model).train(c.thinning != "F")
        self.first = copy.deepcopy(classifier.model).eval()
        self.encoder = self.f if c.encoder == "shared" else copy.deepcopy(classifier.model).train()
        self.decoder = CasmTrainer(classifier, config).casm.decoder.train()
        learned = [*self.decoder.parameters(), *(self.encoder.parameters() if c.encoder == "separate" else ())]
        self.adam = torch.optim.Adam(learned, c.lr_mapping, weight_decay=c.weight_decay)
        self.sgd = torch.optim.SGD(self.f.parameters(), c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
        self.learned = learned

    def mapping_loss(self, logits, masked, y, m):
        total = 0.0
        for i in range(len(y)):
            c = int(logits[i].argmax() == y[i])
            n = c * int(masked[i].argmax() != y[i])
            log_p = masked[i] - masked[i].logsumexp(0)
            total = total - self.config.start * torch.relu(n - m[i].mean())
            total = total + (log_p[y[i]] if self.config.score == "classification" else c * (log_p.exp() * log_p).sum())
        return total / len(y)

    def forget(self):
        for parameter in [*self.learned, *self.f.parameters(), *self.first.parameters()]:
            parameter.grad = None

    def descend(self, loss):
        self.forget()
        loss.backward(retain_graph=True)
        return [parameter.grad for parameter in self.f.parameters()]

    def take(self, gradients):
        for parameter, gradient in zip(self.f.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.sgd.step()

    def step(self, x, y, current):
        z = (x - MEAN.view(-1, 1, 1).double()) / STD.view(-1, 1, 1).double()
        maps, logits = self.f.maps(z)
        maps = [A.detach().clone() for A in maps] if self.config.encoder == "shared" else self.encoder.maps(z)[0]
        m = F.interpolate(self.decoder(maps), x.shape[2:], mode="nearest")
        learns, sequential = self.config.thinning != "F", self.config.update == "sequential"
        if learns and sequential:
            self.take(self.descend(F.cross_entropy(logits, y)))
        masked = (self.f if current else self.first)((1 - m) * z)
        self.forget()
        self.mapping_loss(logits, masked, y, m).backward(retain_graph=True)
        ascent = [p.grad for p in self.learned]  # none for the head of an encoder of its own, which stays as it is
        norm = math.sqrt(sum(float(g.square().sum()) for g in ascent if g is not None))
        ascent = [None if g is None else g * min(1, self.config.clip / (norm + 1e-6)) for g in ascent]
        if learns and sequential and current:
            self.take(self.descend(F.cross_entropy(masked, y)))
        if learns and not sequential:
            clean = F.cross_entropy(logits, y)
            self.take(self.descend((clean + F.cross_entropy(masked, y)) / 2 if current else clean))
        self.forget()
        for parameter, gradient in zip(self.learned, ascent, strict=True):
            parameter.grad = gradient
        self.adam.step()


def assert_close(ours, slow):
    a, b = ours.state_dict(), slow.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.allclose(value, b[name], rtol=1e-9, atol=1e-10), name


STEPS = [
    (update, draw, encoder, score)
    for update in ("joint", "sequential")
    for draw in (1.0, 0.0)
    for encoder in ("shared", "separate")
    for score in ("entropy", "classification")
]


@pytest.mark.parametrize(("update", "draw", "encoder", "score"), STEPS)
def test_three_steps_are_those_of_a_slow_training_with_backward(update, draw, encoder, score, seeded):
    """The current classifier is always drawn, or always the first one, from which it has moved away."""
    classifier = two(seeded)
    rates = {"lr": 0.1, "lr_mapping": 0.02, "weight_decay": 0.01, "lam": 3.0, "clip": 0.05}
    config = quick(thinning="L100", draw=draw, update=update, encoder=encoder, score=score, **rates)
    ours, slow, data = prepared(classifier, config), Slow(classifier, config), Colors(dtype=torch.float64)
    for step in range(3):
        batch = collate(data.samples[8 * step : 8 * step + 8])
        before = copy.deepcopy(slow.f), copy.deepcopy(slow.decoder)
        ours.step(batch, 1.0)
        slow.step(batch.x, batch.y, draw == 1.0)
        assert any(not torch.equal(a, b) for a, b in zip(before[0].parameters(), slow.f.parameters(), strict=True))
        assert any(
            not torch.equal(a, b) for a, b in zip(before[1].parameters(), slow.decoder.parameters(), strict=True)
        )
    assert_close(ours.classifier.model, slow.f)
    assert_close(ours.casm.decoder, slow.decoder)
    assert_close(ours.casm.encoder, slow.encoder)


@pytest.mark.parametrize("encoder", ["shared", "separate"])
def test_with_f_the_classifier_stays_bit_for_bit_in_evaluation_mode_and_the_mapping_learns(encoder, seeded):
    classifier = two(seeded)
    config = quick(thinning="F", encoder=encoder)
    ours, slow, data = prepared(classifier, config), Slow(classifier, config), Colors(dtype=torch.float64)
    for step in range(3):
        batch = collate(data.samples[8 * step : 8 * step + 8])
        metrics = ours.step(batch, 1.0)
        slow.step(batch.x, batch.y, current=True)
        assert torch.equal(metrics["loss"], metrics["mapping_loss"])
        assert metrics["history"] == 0
    assert_close(ours.casm, nn.ModuleDict({"encoder": slow.encoder, "decoder": slow.decoder}))
    for name, value in ours.classifier.model.state_dict().items():
        assert torch.equal(value, classifier.model.state_dict()[name])
    assert not ours.classifier.model.training


def test_modes_of_the_networks(seeded):
    shared, separate, fixed = (
        prepared(two(seeded), quick(thinning=thinning, encoder=encoder))
        for thinning, encoder in (("L2", "shared"), ("L2", "separate"), ("F", "shared"))
    )
    for trainer in (shared, separate, fixed):
        assert trainer.casm.decoder.training
        assert not trainer.past.model.training
        assert not any(parameter.requires_grad for parameter in trainer.past.model.parameters())
    assert shared.casm.encoder is shared.classifier.model
    assert shared.classifier.model.training
    assert separate.casm.encoder is not separate.classifier.model
    assert separate.casm.encoder.training
    assert separate.classifier.model.training
    assert not fixed.casm.encoder.training
    assert len(shared.mapping) == len(list(shared.casm.decoder.parameters()))
    assert len(separate.mapping) == len(list(separate.casm.parameters()))


def test_metrics_say_what_happened(seeded):
    trainer = prepared(two(seeded), quick(thinning="L2", draw=1.0))
    assert isinstance(trainer, Trainer)
    f, decoder = copy.deepcopy(trainer.classifier.model), copy.deepcopy(trainer.casm.decoder)
    batch = collate(Colors(dtype=torch.float64).samples[:8])
    metrics = trainer.step(batch, 1.0)
    z = trainer.classifier.normalize(batch.x)
    maps, logits = f.maps(z)
    m = F.interpolate(decoder(maps), (8, 8), mode="nearest")
    masked = f((1 - m) * z)
    y = batch.y
    assert metrics["loss"].item() == pytest.approx(
        (F.cross_entropy(logits, y) + F.cross_entropy(masked, y)).item() / 2, abs=1e-9
    )
    assert metrics["area"].item() == pytest.approx(m.mean().item())
    assert metrics["accuracy"].item() == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert metrics["accuracy_masked"].item() == pytest.approx((masked.argmax(1) == y).float().mean().item())
    assert metrics["lambda"].item() == 10
    assert metrics["history"].item() == 1
    assert not any(value.requires_grad for value in metrics.values())
    past = prepared(two(seeded), quick(thinning="L2", draw=0.0)).step(batch, 1.0)
    assert past["loss"].item() == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-9)


def test_a_network_of_one_output_is_trained_as_two_classes(seeded):
    trainer = prepared(two(seeded, classes=1), quick())
    samples = [replace(sample, label=sample.label % 2) for sample in Colors(dtype=torch.float64).samples[:8]]
    assert trainer.step(collate(samples), 1.0)["loss"].isfinite()


def test_which_steps_keep_the_classifier():
    assert [[step for step in range(250) if kept(name, step)] for name in ("F", "L", "FL", "L100", "L1000")] == [
        *([], [], [0]),
        *([0, 100, 200], [0]),
    ]


@pytest.mark.parametrize(
    ("thinning", "sizes"),
    [("F", [0] * 5), ("L", [0] * 5), ("FL", [1] * 5), ("L2", [1, 1, 2, 2, 2]), ("L1", [1, 2, 2, 2, 2])],
)
def test_the_thinnings_keep_the_classifier_as_it_was_before_the_step(thinning, sizes, seeded):
    classifier = two(seeded)
    trainer = prepared(classifier, quick(thinning=thinning, cap=2, draw=1.0))
    batch = collate(Colors(dtype=torch.float64).samples[:8])
    assert [int(trainer.step(batch, 1.0)["history"]) for _ in sizes] == sizes
    if thinning == "FL":
        (first,) = trainer.history.states
        assert all(torch.equal(first[name], value) for name, value in classifier.model.state_dict().items())
        assert not torch.equal(first["head.weight"], trainer.classifier.model.head.weight)


def test_what_is_kept_does_not_follow_the_network():
    model, history = nn.BatchNorm1d(2), History(3)
    history.keep(model)
    with torch.no_grad():
        model.weight.add_(1)
    model(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    history.keep(model)
    assert history.states[0]["weight"].tolist() == [1, 1]
    assert history.states[0]["num_batches_tracked"] == 0
    assert history.states[1]["weight"].tolist() == [2, 2]


@pytest.fixture
def own_randomness():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


def numbered(n):
    return nn.ParameterDict({"n": nn.Parameter(torch.tensor(float(n)))})


def test_a_full_history_forgets_a_random_member(own_randomness):
    history, places = History(30), []
    for n in range(3000):
        before = [state["n"] for state in history.states]
        history.keep(numbered(n))
        assert len(history.states) == min(n + 1, 30)
        places += [at for at, old in enumerate(before) if history.states[at]["n"] is not old]
    assert len(places) == 2970
    assert all(60 < places.count(at) < 140 for at in range(30))


def test_the_current_classifier_is_drawn_half_of_the_time_and_those_of_the_past_alike(own_randomness):
    history = History(4)
    assert {history.draw(0.0) for _ in range(5)} == {None}
    for n in range(4):
        history.keep(numbered(n))
    drawn = [None if state is None else int(state["n"]) for state in (history.draw(0.5) for _ in range(10000))]
    assert drawn.count(None) / 10000 == pytest.approx(0.5, abs=0.02)
    assert all(drawn.count(n) / 10000 == pytest.approx(0.125, abs=0.015) for n in range(4))
    assert None not in {history.draw(0.0) and 1 for _ in range(50)}
    assert {history.draw(1.0) for _ in range(50)} == {None}


def test_both_rates_fall_every_twenty_epochs(seeded):
    trainer = prepared(two(seeded), CasmConfig(lr=0.5, lr_mapping=0.2))
    rates = []
    for epoch in (0, 19, 20, 39, 40, 59):
        trainer.epoch(epoch, 10)
        rates.append((trainer.descent.param_groups[0]["lr"], trainer.ascent.param_groups[0]["lr"]))
    falls = (1, 1, 0.1, 0.1, 0.01, 0.01)
    assert rates == [(pytest.approx(0.5 * fall), pytest.approx(0.2 * fall)) for fall in falls]


def test_the_defaults_are_those_of_the_program():
    c = CasmConfig()
    assert (c.epochs, c.batch, c.fraction, c.thinning, c.cap, c.draw, c.score) == (
        60,
        128,
        0.2,
        "L100",
        30,
        0.5,
        "entropy",
    )
    assert (c.lr, c.momentum, c.weight_decay, c.lr_mapping, c.decay, c.decay_every, c.clip) == (
        *(1e-3, 0.9, 1e-4, 1e-3, 0.1, 20, 10.0),
    )
    assert (c.erase, c.taps, c.encoder, c.update) == ("mean", "code", "shared", "joint")


def differing(config):
    return {name: value for name, value in vars(config).items() if value != getattr(CasmConfig(), name)}


def test_program_and_paper_differ_from_the_defaults_as_they_say():
    assert differing(CASM_CODE) == {"update": "sequential", "augment": "resized_crop+flip"}
    assert differing(CASM_PAPER) == {"epochs": 70, "decay": 1.0, "taps": "paper", "augment": "resized_crop+flip"}


def test_the_paper_has_constant_rates(seeded):
    trainer = prepared(two(seeded), replace(CASM_PAPER, lr=0.5, lr_mapping=0.2))
    for epoch in (0, 20, 69):
        trainer.epoch(epoch, 10)
        assert trainer.descent.param_groups[0]["lr"] == 0.5
        assert trainer.ascent.param_groups[0]["lr"] == 0.2


def test_noise_that_fills_is_the_same_for_all_images_of_all_steps(seeded):
    erase, x = CasmTrainer(two(seeded), quick(erase="noise")).erase, torch.rand(3, 3, 8, 8)
    first, later = (erase(images, torch.zeros(len(images), 1, 8, 8)) for images in (x, x[:2] + 1))
    assert all(torch.equal(one, first[0]) for one in (*first, *later))


@pytest.mark.parametrize(
    ("thinning", "entropy", "adversarial"),
    [("F", 2.5, 9), ("L", 14, 18), ("FL", 7.5, 11), ("L100", 10, 17), ("L1000", 10, 17), ("L7", 10, 17)],
)
def test_lambda_starts_at_the_programs_value(thinning, entropy, adversarial):
    assert CasmConfig(thinning=thinning).start == entropy
    assert CasmConfig(thinning=thinning, score="classification").start == adversarial
    assert CasmConfig(thinning=thinning, lam=3.25).start == 3.25
    assert thinning not in LAMBDAS or LAMBDAS[thinning] == {"entropy": entropy, "classification": adversarial}


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            {"thinning": "L0"},
            ValueError,
            "expected thinning F, L, FL or L with a period of steps, such as L100, got 'L0'",
        ),
        ({"thinning": "100"}, ValueError, "expected thinning"),
        ({"score": "loss"}, ValueError, "expected score to be one of entropy, classification, got 'loss'"),
        ({"encoder": "both"}, ValueError, "expected encoder to be one of shared, separate"),
        ({"taps": "all"}, ValueError, "expected taps to be one of code, paper"),
        ({"update": "late"}, ValueError, "expected update to be one of joint, sequential"),
        ({"precision": "16"}, ValueError, "expected precision to be one of 32-true"),
        ({"cap": 0}, ValueError, "^expected cap >= 1, got cap=0$"),
        ({"fraction": 0.0}, ValueError, r"^expected fraction in \(0, 1\], got fraction=0.0$"),
        ({"lr": -1.0}, ValueError, "^expected lr > 0, got lr=-1.0$"),
        ({"lr_mapping": math.nan}, ValueError, "^expected lr_mapping > 0, got lr_mapping=nan$"),
        ({"decay": 0.0}, ValueError, "^expected decay > 0, got decay=0.0$"),
        ({"momentum": -0.1}, ValueError, "^expected momentum >= 0, got momentum=-0.1$"),
        ({"draw": 1.5}, ValueError, r"^expected draw in \[0, 1\], got draw=1.5$"),
        ({"area": 1.0}, ValueError, r"^expected area in \(0, 1\), got area=1.0$"),
        ({"lam": -1.0}, ValueError, "^expected lam >= 0, got lam=-1.0$"),
        ({"lam": 0.0, "area": 0.4}, ValueError, "^expected lam > 0 where area is given, got lam=0.0, area=0.4$"),
        ({"erase": "blak"}, LookupError, "did you mean black"),
        ({"augment": "flop"}, LookupError, "did you mean flip"),
    ],
)
def test_wrong_settings_are_refused_with_what_was_expected(wrong, kind, message, plain):
    with pytest.raises(kind, match=message):
        CasmConfig(**wrong)


def test_images_need_labels_that_the_network_has(seeded):
    trainer = prepared(two(seeded), quick())
    samples = Colors(dtype=torch.float64).samples[:4]
    with pytest.raises(ValueError, match="training CASM needs a label for every image; '1' has none"):
        trainer.step(collate([samples[0], replace(samples[1], label=None)]), 1.0)
    with pytest.raises(ValueError, match=re.escape("label 9 is outside 0..2")):
        trainer.step(collate([samples[0], replace(samples[1], label=9)]), 1.0)


def test_training_leaves_the_given_network_and_the_random_state_alone(seeded, trace, plain):
    classifier = two(seeded, dtype=torch.float32)
    changed, seen = trace(classifier.model), []
    casm, history = train_casm(classifier, Colors(), quick(epochs=2), report=seen.append, accelerator="cpu")
    assert changed() == []
    assert len(history) == 2
    assert len(seen) == 6
    assert set(history[0]) == {
        *("loss", "mapping_loss", "area", "accuracy", "accuracy_masked", "lambda", "history"),
    }
    assert not any(module.training for module in casm.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in casm.parameters())
    assert casm(classifier, collate(Colors().samples[:2]).x).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("settings", [{"precision": "bf16-mixed"}, {"taps": "paper"}, {"erase": "blur"}])
def test_other_settings_train_too(settings, seeded, plain):
    classifier = two(seeded, dtype=torch.float32)
    config = quick(thinning="L1", score="classification", **settings)
    casm, (metrics,) = train_casm(classifier, Colors(), config, accelerator="cpu")
    assert 0 < metrics["area"] < 1
    assert casm(classifier, collate(Colors().samples[:2]).x).dtype == torch.float32


def test_an_epoch_sees_a_fraction_of_the_images(seeded):
    seen = []
    classifier = two(seeded, dtype=torch.float32)
    train_casm(classifier, Colors(), quick(epochs=2, fraction=0.5, batch=4), report=seen.append, accelerator="cpu")
    assert [(p.epoch, p.step, p.steps) for p in seen] == [(e, s, 3) for e in (0, 1) for s in (1, 2, 3)]


def test_seeds_say_how_it_ends(seeded):
    classifier = two(seeded, dtype=torch.float32)
    ends = [
        train_casm(classifier, Colors(), quick(), seed=seed, accelerator="cpu")[0].state_dict() for seed in (0, 0, 1)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["decoder.last.weight"], ends[2]["decoder.last.weight"])


@pytest.mark.parametrize("encoder", ["shared", "separate"])
def test_an_interrupted_training_ends_with_the_bits_of_an_uninterrupted_one(encoder, seeded, tmp_path):
    """Dropout, a history that overflows, and a lambda that moves."""
    classifier = two(seeded, dtype=torch.float32, drop=0.3)
    config = quick(epochs=4, batch=5, thinning="L2", cap=3, area=0.3, encoder=encoder, augment="flip", decay_every=2)

    def train(out, report=None):
        return train_casm(classifier, Colors(), config, out=out, every=2, report=report, accelerator="cpu")

    def interrupt(at, progress):
        if (progress.epoch, progress.step) == at:
            raise KeyboardInterrupt

    whole, history = train(tmp_path / "whole")
    for at in ((0, 1), (1, 4), (2, 3)):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", partial(interrupt, at))
    parts, again = train(tmp_path / "parts")
    assert again == history
    assert history[0]["lambda"] != history[-1]["lambda"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    one, other = (torch.load(tmp_path / name / "checkpoint.pt")["trainer"] for name in ("whole", "parts"))
    assert len(one["history"]) == len(other["history"]) == 3
    for a, b in zip(one["history"], other["history"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert one["lambda"] == other["lambda"] != 10


class Cut(CasmTrainer):
    """A trainer that dies before its fifth step."""

    def step(self, batch, share):
        if self.done == 4:
            raise KeyboardInterrupt
        return super().step(batch, share)


def whole_and_resumed(folder):
    """Train twice, once with an interruption; the first of the processes that run this writes what came out."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        classifier = wrap(Two(), normalization=(MEAN.tolist(), STD.tolist()), size=8, layer="last")
    config = quick(epochs=3, thinning="L1", draw=0.2, cap=3)
    numbers = {"epochs": config.epochs, "batch": config.batch, "every": 1, "accelerator": "cpu"}
    trainers = CasmTrainer(classifier, config), Cut(classifier, config), CasmTrainer(classifier, config)
    curves = []
    for trainer, name in zip(trainers, ("whole", "cut", "cut"), strict=True):
        with suppress(KeyboardInterrupt):
            curves.append(fit(trainer, Colors(), out=Path(folder) / name, **numbers))
        wait()
    states = [one.state_dict() for one in (trainers[0], trainers[2])]
    torch.save({"curves": curves, "states": states}, Path(folder) / f"rank-{trainers[0].fabric.global_rank}.pt")


def test_in_two_processes_an_interrupted_training_is_the_uninterrupted_one_and_both_keep_one_history(tmp_path):
    command = f"from test_casm_training import whole_and_resumed; whole_and_resumed({str(tmp_path)!r})"
    (tmp_path / "both.py").write_text(command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launcher, tmp_path / "both.py"], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for found in ranks:
        assert len(found["curves"]) == 2
        assert found["curves"][0] == found["curves"][1]
    (whole, resumed), (other, _) = (found["states"] for found in ranks)
    for name in ("classifier", "casm"):
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=0)
    assert len(whole["history"]) == 3
    torch.testing.assert_close(resumed["history"], whole["history"], rtol=0, atol=0)
    torch.testing.assert_close(other["history"], whole["history"], rtol=0, atol=0)
    assert not torch.equal(other["classifier"]["stem.1.running_mean"], whole["classifier"]["stem.1.running_mean"])


def test_a_checkpoint_of_other_settings_is_refused(seeded, tmp_path):
    classifier = two(seeded, dtype=torch.float32)
    train_casm(classifier, Colors(), quick(), out=tmp_path, accelerator="cpu")
    with pytest.raises(ValueError, match="thinning was 'L100' and is 'L'"):
        train_casm(classifier, Colors(), quick(thinning="L"), out=tmp_path, accelerator="cpu")


def test_the_state_is_a_copy(seeded):
    trainer = prepared(two(seeded), quick(thinning="L1"))
    batch = collate(Colors(dtype=torch.float64).samples[:8])
    trainer.step(batch, 1.0)
    state = trainer.state_dict()
    before = copy.deepcopy(state)
    trainer.step(batch, 1.0)

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return all(same(a[name], b[name]) for name in a)
        return all(map(same, a, b)) if isinstance(a, list) else a == b

    assert same(state, before)
    assert len(state["history"]) == 1


def test_lambda_follows_the_area_step_by_step(seeded):
    trainer = CasmTrainer(two(seeded), quick(area=0.5))
    assert trainer.follow(torch.tensor(0.9)) == 10
    assert trainer.lam == pytest.approx(10 * math.exp(0.1 * 0.4))
    trainer.follow(torch.tensor(0.1))
    assert trainer.lam == pytest.approx(10)
    for area, end in ((1.0, 1000.0), (0.0, 0.1)):
        for _ in range(300):
            trainer.follow(torch.tensor(area))
        assert trainer.lam == pytest.approx(end)
    fixed = CasmTrainer(two(seeded), quick())
    fixed.follow(torch.tensor(0.9))
    assert fixed.lam == 10


def test_lambda_brings_masks_that_answer_to_it_to_the_area_asked_for(seeded):
    """An area that goes a twentieth of its way to 1 / (1 + lambda / 10) in each step."""
    for asked in (0.2, 0.7):
        trainer, area = CasmTrainer(two(seeded), quick(area=asked)), 0.5
        for _ in range(2000):
            trainer.follow(torch.tensor(area))
            area += (1 / (1 + trainer.lam / 10) - area) / 20
        assert area == pytest.approx(asked, abs=1e-3)


def test_a_small_training_goes_towards_the_area_asked_for(seeded, plain):
    """A few steps of the way; that it ends there is shown above."""
    classifier, data = two(seeded, dtype=torch.float32), Colors()
    train(classifier, data, ClassifierConfig(epochs=60, batch=24, augment="none", lr=0.1), accelerator="cpu")
    small, large = (
        train_casm(
            classifier,
            data,
            quick(epochs=80, batch=24, area=asked, lr_mapping=0.02, thinning="L10", decay_every=100),
            seed=3,
            accelerator="cpu",
        )[1]
        for asked in (0.05, 0.6)
    )
    assert small[0]["area"] == large[0]["area"]
    assert small[-1]["area"] + 0.05 < large[-1]["area"]
    assert small[-1]["lambda"] > 10 > large[-1]["lambda"]
