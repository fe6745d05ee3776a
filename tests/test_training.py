import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn

from sightline.classifier import wrap
from sightline.classifier_training import (
    AUGMENTATIONS,
    RULES,
    ClassifierConfig,
    ClassifierTrainer,
    Permuted,
    accuracy,
    augmentation,
    expect,
    head_name,
    learning_rate,
    replace_head,
    train,
)
from sightline.data import Sample, collate
from sightline.models import MiniResNet
from sightline.training import CHECKPOINT, Progress, few_images, fit, remember, update

CONFIG = ClassifierConfig(epochs=3, batch=4, lr=0.05, warmup=0.5, augment="flip+crop+jitter")


class Toy:
    """Noise with a bright top (class 0) or a bright bottom (class 1)."""

    classes = ("top", "bottom")

    def __init__(self, count=24, side=16):
        self.count, self.side, self.reads = count, side, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        image = 0.4 * torch.rand(3, self.side, self.side, generator=torch.Generator().manual_seed(index))
        half = self.side // 2
        image[:, slice(0, half) if index % 2 == 0 else slice(half, None)] += 0.5
        return Sample(f"toy{index}", image, index % 2)


class Flat(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def small(outputs=2, seed=0):
    """A network with batch norm and dropout, whose conv sees where the light is through its position."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, outputs))
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *head)
    return wrap(model, layer="2", normalization="none", size=16)


class Recorder:
    """A trainer that learns nothing and keeps what it saw."""

    def __init__(self, loss=lambda step: 0.0):
        self.settings = {"kind": "recorder"}
        self.loss, self.seen, self.epochs, self.place = loss, [], [], -1

    def setup(self, fabric): ...

    def epoch(self, number, steps):
        self.place = number
        self.epochs.append((number, steps))

    def step(self, batch, share):
        self.seen += [(self.place, name, image) for name, image in zip(batch.ids, batch.x, strict=True)]
        self.noise = torch.rand(3)
        return {"loss": torch.tensor(float(self.loss(len(self.seen))))}

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


def killed(out):
    """Train and die in the middle of the second epoch; runs in a process of its own."""

    def report(progress):
        if (progress.epoch, progress.step) == (1, 5):
            os.kill(os.getpid(), signal.SIGKILL)

    train(small(), Toy(), CONFIG, out=out, every=3, report=report, accelerator="cpu")


def tensors(state, path=""):
    """All tensors of nested dictionaries and lists, by path."""
    if isinstance(state, torch.Tensor):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {key: value for k, item in items for key, value in tensors(item, f"{path}/{k}").items()}


def checkpoint(folder):
    return torch.load(Path(folder) / CHECKPOINT, weights_only=True)


def assert_same(a, b):
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert len(left) > 5
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def test_resume_after_kill_9_gives_the_bits_of_an_uninterrupted_run(tmp_path):
    code = "import sys, test_training; test_training.killed(sys.argv[1])"
    arguments = [sys.executable, "-c", code, str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run(arguments, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = checkpoint(tmp_path / "killed")["at"]
    assert (left["epoch"], left["step"]) == (1, 3)
    resumed, whole = small(), small()
    history = train(resumed, Toy(), CONFIG, out=tmp_path / "killed", every=3, accelerator="cpu")
    assert history == train(whole, Toy(), CONFIG, out=tmp_path / "whole", every=3, accelerator="cpu")
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    assert_same(checkpoint(tmp_path / "killed"), checkpoint(tmp_path / "whole"))


def test_two_runs_of_one_seed_are_equal_and_the_seed_counts():
    first, second, third = small(), small(), small()
    train(first, Toy(), CONFIG, seed=1, accelerator="cpu")
    torch.rand(5)
    train(second, Toy(), CONFIG, seed=1, accelerator="cpu")
    train(third, Toy(), CONFIG, seed=2, accelerator="cpu")
    assert_same(first.model.state_dict(), second.model.state_dict())
    assert not torch.equal(first.model[0].weight, third.model[0].weight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_then_takes_its_usual_course(tmp_path, number):
    met = []
    before = signal.signal(number, lambda *_: met.append(number))

    def report(progress):
        if (progress.epoch, progress.step) == (0, 2):
            os.kill(os.getpid(), number)
            assert not met

    stopped, whole = small(), small()
    try:
        with pytest.raises(KeyboardInterrupt, match=f"stopped by signal {int(number)}"):
            train(stopped, Toy(), CONFIG, out=tmp_path, report=report, accelerator="cpu")
        assert met == [number]
        os.kill(os.getpid(), number)
        assert met == [number, number]
    finally:
        signal.signal(number, before)
    left = checkpoint(tmp_path)["at"]
    assert (left["epoch"], left["step"]) == (0, 2)
    train(stopped, Toy(), CONFIG, out=tmp_path, accelerator="cpu")
    train(whole, Toy(), CONFIG, accelerator="cpu")
    assert_same(stopped.model.state_dict(), whole.model.state_dict())


def test_ctrl_c_is_a_keyboard_interrupt_and_a_second_one_is_not_held_back(tmp_path):
    seen = []

    def report(progress):
        seen.append(progress.step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        fit(Recorder(), Toy(), epochs=1, batch=4, out=tmp_path, report=report, accelerator="cpu")
    assert seen == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_runs_outside_the_main_thread():
    recorder = Recorder()
    thread = threading.Thread(target=lambda: fit(recorder, Toy(), epochs=1, batch=4, accelerator="cpu"))
    thread.start()
    thread.join()
    assert len(recorder.seen) == 24


def test_the_global_random_state_is_left_alone_but_drives_the_steps():
    torch.rand(11)
    before, drawn = torch.get_rng_state(), np.random.get_state()[1].copy()
    recorder, again = Recorder(), Recorder()
    fit(recorder, Toy(), epochs=1, batch=4, augment=augmentation("crop"), accelerator="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == drawn).all()
    torch.rand(7)
    fit(again, Toy(), epochs=1, batch=4, accelerator="cpu")
    assert torch.equal(recorder.noise, again.noise)


def test_order_and_augmentation_depend_on_seed_epoch_and_index_alone():
    runs = []
    for batch, seed in ((4, 3), (7, 3), (4, 4)):
        recorder = Recorder()
        fit(recorder, Toy(), epochs=2, batch=batch, seed=seed, augment=augmentation("crop+flip"), accelerator="cpu")
        runs.append(recorder)
    fours, sevens, other = runs
    assert fours.epochs == [(0, 6), (1, 6)]
    assert sevens.epochs == [(0, 4), (1, 4)]
    assert [seen[:2] for seen in fours.seen] == [seen[:2] for seen in sevens.seen]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(fours.seen, sevens.seen, strict=True))
    names = [[name for epoch, name, _ in fours.seen if epoch == number] for number in (0, 1)]
    assert sorted(names[0]) == sorted(names[1]) == sorted(f"toy{n}" for n in range(24))
    assert names[0] != names[1]
    assert names[0] != [name for epoch, name, _ in other.seen if epoch == 0]
    images = [{name: image for epoch, name, image in fours.seen if epoch == number} for number in (0, 1)]
    assert any(not torch.equal(images[0][name], images[1][name]) for name in names[0])


def test_progress_and_history(capfd):
    told = []
    loss = lambda seen: seen  # noqa: E731
    history = fit(Recorder(loss), Toy(10), epochs=2, batch=4, report=told.append, accelerator="cpu")
    assert [(p.epoch, p.epochs, p.step, p.steps) for p in told] == [(e, 2, s, 3) for e in (0, 1) for s in (1, 2, 3)]
    assert told[1] == Progress(0, 2, 2, 3, {"loss": 8.0})
    assert history == (
        {"loss": pytest.approx((4 * 4 + 4 * 8 + 2 * 10) / 10)},
        {"loss": pytest.approx((4 * 14 + 4 * 18 + 2 * 20) / 10)},
    )
    assert capfd.readouterr() == ("", "")


def test_a_finished_training_is_not_trained_again(tmp_path):
    first = fit(Recorder(lambda seen: seen), Toy(), epochs=2, batch=8, out=tmp_path, accelerator="cpu")
    idle = Recorder()
    assert fit(idle, Toy(), epochs=2, batch=8, out=tmp_path, accelerator="cpu") == first
    assert idle.seen == []
    fit(idle, Toy(), epochs=2, batch=8, out=tmp_path, resume=False, accelerator="cpu")
    assert len(idle.seen) == 48


def test_a_loss_that_is_not_finite_stops_and_names_the_images(tmp_path):
    def loss(seen):
        return math.nan if seen > 8 else 1.0

    recorder = Recorder(loss)
    with pytest.raises(FloatingPointError, match=r"epoch 0, step 2: loss = nan; its images are listed in .*nonfinite"):
        fit(recorder, Toy(), epochs=1, batch=4, every=1, out=tmp_path, accelerator="cpu")
    table = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (table["epoch"], table["step"], table["metrics"]) == (0, 2, {"loss": "nan"})
    assert table["ids"] == [name for _, name, _ in recorder.seen[8:12]]
    assert checkpoint(tmp_path)["at"]["step"] == 2
    with pytest.raises(FloatingPointError, match=r"images are toy\d+, toy\d+, toy\d+, toy\d+; lower the learning rate"):
        fit(Recorder(loss), Toy(), epochs=1, batch=4, accelerator="cpu")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_step_that_ruins_the_weights_is_blamed_and_never_saved(tmp_path, optimizer):
    settings = {"batch": 4, "warmup": 0.0, "augment": "none", "optimizer": optimizer}
    good, bad = ClassifierConfig(epochs=1, **settings), ClassifierConfig(epochs=1, lr=1e37, **settings)
    told = r"epoch 0, step 0: norm of the weights = inf; its images are listed in"
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=told):
            train(small(), Toy(), bad, out=tmp_path, every=1, accelerator="cpu")
        table = json.loads((tmp_path / "nonfinite.json").read_text())
        assert (table["step"], table["metrics"]) == (0, {"norm of the weights": "inf"})
        assert not (tmp_path / CHECKPOINT).exists()
    recorder = Recorder()
    fit(recorder, Toy(), epochs=1, batch=4, accelerator="cpu")
    assert table["ids"] == [name for _, name, _ in recorder.seen[:4]]
    assert math.isfinite(train(small(), Toy(), good, out=tmp_path / "good", accelerator="cpu")[0]["loss"])


class Steep(nn.Module):
    """Logits that are finite on every image, but whose gradient is not on one."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.bad = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2), False

    def forward(self, x):
        a = self.conv(x)
        zero = (a * float(self.bad)).sum((1, 2, 3)) * 0
        return self.head(a.mean((2, 3))) + (zero.sqrt() if self.bad else zero)[:, None] * 0


def test_a_gradient_that_is_not_finite_is_blamed_before_the_step_is_taken(tmp_path):
    classifier = wrap(Steep(), layer="conv", normalization="none", size=16)
    before = []

    def report(progress):
        classifier.model.bad = progress.step == 2
        before[:] = [parameter.detach().clone() for parameter in classifier.model.parameters()]

    config = ClassifierConfig(epochs=1, batch=4, augment="none")
    with pytest.raises(FloatingPointError, match=r"epoch 0, step 2: norm of the gradient = nan; its images"):
        train(classifier, Toy(), config, out=tmp_path, every=1, report=report, accelerator="cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, classifier.model.parameters(), strict=True))
    assert checkpoint(tmp_path)["at"]["step"] == 2


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_of_update_is_that_of_the_optimizer_to_the_last_bit(clip):
    rows = [torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    ours, plain = ([nn.Parameter(rows[0].clone()), nn.Parameter(rows[1].clone())] for _ in range(2))
    update(torch.optim.SGD(ours, 0.1, 0.9), ours, [rows[2].clone(), None], clip=clip)
    plain[0].grad = rows[2].clone()
    if clip is not None:
        plain[0].grad *= clip / (rows[2].norm() + 1e-6)
    torch.optim.SGD(plain, 0.1, 0.9).step()
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    assert ours[0].grad is None


@pytest.mark.parametrize(("fraction", "seen"), [(0.07, 7), (0.2, 20), (0.071, 8), (1e-9, 1), (1.0, 100)])
def test_a_fraction_is_what_it_reads(fraction, seen):
    recorder = Recorder()
    fit(recorder, Toy(100, side=1), epochs=1, batch=50, fraction=fraction, accelerator="cpu")
    assert len(recorder.seen) == seen


def cells():
    """A network with a batch norm of 1 x 1 features."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    return wrap(model.append(nn.Flatten()).append(nn.Linear(4, 2)), layer="1", normalization="none", size=16)


def test_a_last_batch_of_one_image_is_told_where_a_batch_norm_cannot_learn_from_it():
    config = ClassifierConfig(epochs=1, batch=8, augment="none")
    told = r"cannot learn from a single image, and 25 images by batch=8 leave a step of 1; take batch=7"
    with pytest.raises(ValueError, match=told):
        train(cells(), Toy(25), config, accelerator="cpu")
    assert len(train(cells(), Toy(25), replace(config, batch=7), accelerator="cpu")) == 1
    with pytest.raises(ValueError, match="1 images by batch=8 leave a step of 1; take more images"):
        train(cells(), Toy(1), config, accelerator="cpu")
    with pytest.raises(ValueError, match="something else"), few_images(25, 8, 1):
        raise ValueError("something else")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_batch_that_is_advised_leaves_no_process_a_single_image(processes):
    for seen in range(1, 40):
        for batch in range(1, 12):
            with pytest.raises(ValueError, match="cannot learn") as told, few_images(seen, batch, processes):
                raise ValueError("Expected more than 1 value per channel when training")
            advice = re.search(r"take batch=(\d+)$", str(told.value))
            sizes = range(1, seen + 1) if advice is None else [int(advice[1])]
            steps = [[len(range(start, min(start + size, seen))) for start in range(0, seen, size)] for size in sizes]
            shares = [min(len(range(rank, n, processes)) for n in each for rank in range(processes)) for each in steps]
            assert (max(shares) < 2) is (advice is None)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(small(), Toy(), CONFIG, out=tmp_path, accelerator="cpu")
    with pytest.raises(ValueError, match=r"another training: seed was 0 and is 1; use its settings, another folder"):
        train(small(), Toy(), CONFIG, seed=1, out=tmp_path, accelerator="cpu")
    with pytest.raises(ValueError, match=r"images was 24 and is 20"):
        train(small(), Toy(20), CONFIG, out=tmp_path, accelerator="cpu")
    with pytest.raises(ValueError, match=r"model was 'Sequential \w+' and is 'Sequential \w+'"):
        train(small(outputs=3), Toy(), CONFIG, out=tmp_path, accelerator="cpu")
    with pytest.raises(ValueError, match=r"lr was 0.05 and is 0.1"):
        train(small(), Toy(), ClassifierConfig(**{**vars(CONFIG), "lr": 0.1}), out=tmp_path, accelerator="cpu")
    whole = (tmp_path / CHECKPOINT).read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"something else"):
        (tmp_path / CHECKPOINT).write_bytes(broken)
        with pytest.raises(ValueError, match=r"is no checkpoint of ours .*delete it, or pass resume=False"):
            train(small(), Toy(), CONFIG, out=tmp_path, accelerator="cpu")


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch": 0}, {"every": 0}, {"fraction": 0.0}, {"fraction": 1.1}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="precision to be one of 32-true, bf16-mixed, got '16-mixed'"):
        fit(Recorder(), Toy(), epochs=1, batch=4, precision="16-mixed")
    with pytest.raises(ValueError, match="expected epochs, batch and every >= 1, fraction in"):
        fit(Recorder(), Toy(), **{"epochs": 1, "batch": 4, **wrong})
    with pytest.raises(ValueError, match="and 0 images"):
        fit(Recorder(), Toy(0), epochs=1, batch=4)


def test_a_small_network_learns_the_toy():
    classifier = small()
    config = ClassifierConfig(epochs=8, batch=8, lr=0.1, augment="flip")
    history = train(classifier, Toy(64), config, accelerator="cpu")
    assert history[-1]["loss"] < history[0]["loss"]
    assert accuracy(classifier, Toy(64)) == 1.0
    assert not classifier.model.training


def test_adamw_and_bfloat16_learn_too():
    classifier = small()
    config = ClassifierConfig(epochs=8, batch=8, lr=0.01, optimizer="adamw", augment="none", precision="bf16-mixed")
    train(classifier, Toy(64), config, accelerator="cpu")
    assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    assert accuracy(classifier, Toy(64)) > 0.95


def test_the_first_stage_moves_the_head_alone():
    classifier, states = small(), []
    config = ClassifierConfig(epochs=2, batch=8, lr=0.1, lr_all=0.02, freeze_epochs=1, augment="none", warmup=0.0)

    def report(progress):
        states.append({name: value.clone() for name, value in classifier.model.state_dict().items()})

    start = {name: value.clone() for name, value in classifier.model.state_dict().items()}
    train(classifier, Toy(), config, report=report, accelerator="cpu")
    after_first, after_second = states[2], states[5]
    head = {"6.weight", "6.bias"}
    same = {name for name in start if torch.equal(start[name], after_first[name])}
    assert same == start.keys() - head
    assert not any(torch.equal(after_first[name], after_second[name]) for name in start)
    assert all(parameter.requires_grad for parameter in classifier.model.parameters())


def test_an_interrupted_first_stage_leaves_no_flags_behind(tmp_path):
    config = ClassifierConfig(epochs=2, batch=8, lr=0.1, freeze_epochs=1)

    def stop(progress):
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stopped, whole = small(), small()
    with pytest.raises(KeyboardInterrupt):
        train(stopped, Toy(), config, out=tmp_path, report=stop, accelerator="cpu")
    assert all(parameter.requires_grad for parameter in stopped.model.parameters())
    assert not stopped.model.training
    train(stopped, Toy(), config, out=tmp_path, accelerator="cpu")
    train(whole, Toy(), config, accelerator="cpu")
    assert_same(stopped.model.state_dict(), whole.model.state_dict())


def test_frozen_layers_by_name_and_parameters_that_were_frozen_before():
    classifier = wrap(MiniResNet(2, widths=(4, 4, 4, 8)), layer="layer4", normalization="none", size=32)
    classifier.model.layer4.conv2.weight.requires_grad_(False)
    config = ClassifierConfig(epochs=2, batch=8, freeze=("stem", "layer1"), freeze_epochs=1, augment="none")
    trainer = ClassifierTrainer(classifier, config)
    trainer.setup(Fabric(accelerator="cpu", devices=1))
    trainer.epoch(0, 3)
    assert not classifier.model.stem[1].training
    assert classifier.model.layer2.bn1.training
    asleep = {name for name, parameter in classifier.model.named_parameters() if not parameter.requires_grad}
    below = {name for name, _ in classifier.model.named_parameters() if name.split(".")[0] in ("stem", "layer1")}
    assert asleep == below | {"layer4.conv2.weight"}
    trainer.epoch(1, 3)
    asleep = {name for name, parameter in classifier.model.named_parameters() if not parameter.requires_grad}
    assert asleep == {"layer4.conv2.weight"}
    with pytest.raises(LookupError, match="no layer called 'layr1'; did you mean layer1"):
        ClassifierTrainer(classifier, ClassifierConfig(freeze=("layr1",), freeze_epochs=1))


def one_step(config, outputs=2):
    """The trainer's first loss on a fixed batch, and the logits that it saw."""
    classifier = small(outputs)
    classifier.model[5].p = 0.0
    batch = collate([Toy()[n] for n in range(6)])
    trainer = ClassifierTrainer(classifier, config)
    trainer.setup(Fabric(accelerator="cpu", devices=1))
    trainer.epoch(0, 1)
    with torch.no_grad():
        logits = classifier.model(batch.x)
    return float(trainer.step(batch, 1.0)["loss"]), logits, batch.y


def test_label_smoothing_is_cross_entropy_with_softened_targets():
    loss, logits, y = one_step(ClassifierConfig(label_smoothing=0.2), outputs=5)
    expected = 0.0
    for row, label in zip(logits.double(), y.tolist(), strict=True):
        target = torch.full((5,), 0.2 / 5, dtype=torch.double)
        target[label] += 0.8
        log_p = row - row.exp().sum().log()
        expected -= float((target * log_p).sum()) / len(y)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_one_output_is_trained_as_two_classes():
    loss, logits, y = one_step(ClassifierConfig(), outputs=1)
    assert loss == pytest.approx(float(F.binary_cross_entropy_with_logits(logits[:, 0], y.float())), rel=1e-5)


def test_labels_are_checked():
    trainer = ClassifierTrainer(small(), ClassifierConfig(augment="none"))
    trainer.setup(Fabric(accelerator="cpu", devices=1))
    trainer.epoch(0, 1)
    image = torch.rand(3, 16, 16)
    with pytest.raises(ValueError, match="needs a label for every image; 'b' has none"):
        trainer.step(collate([Sample("a", image, 1), Sample("b", image)]), 1.0)
    with pytest.raises(ValueError, match=r"label 2 is outside 0\.\.1: the network has 2 classes"):
        trainer.step(collate([Sample("a", image, 2), Sample("b", image, 0)]), 1.0)


def test_the_state_is_a_copy():
    classifier = small()
    trainer = ClassifierTrainer(classifier, CONFIG)
    trainer.setup(Fabric(accelerator="cpu", devices=1))
    trainer.epoch(0, 6)
    batch = collate([Toy()[n] for n in range(4)])
    trainer.step(batch, 1.0)
    kept = tensors(trainer.state_dict())
    before = {name: value.clone() for name, value in kept.items()}
    trainer.step(batch, 1.0)
    after = tensors(trainer.state_dict())
    assert sum("momentum_buffer" in name for name in kept) == 6
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    assert not any(torch.equal(kept[name], after[name]) for name in kept)


def test_the_cosine_with_warm_up_by_hand():
    config = ClassifierConfig(epochs=3, lr=2.0, warmup=1.0, schedule="cosine")
    rates = [learning_rate(config, step, 4) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[8] == pytest.approx(1.0)
    assert rates[6] == pytest.approx(1 + math.sqrt(0.5))
    assert 0 < rates[11] < 0.1


def test_steps_constants_and_the_second_stage_by_hand():
    steps = ClassifierConfig(epochs=6, lr=1.0, warmup=0.0, schedule="step", decay=0.1, decay_every=2)
    assert [learning_rate(steps, n, 2) for n in (0, 3, 4, 7, 8)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    staged = ClassifierConfig(epochs=4, lr=1.0, lr_all=0.1, freeze_epochs=1, warmup=0.0, schedule="constant")
    assert [learning_rate(staged, n, 2) for n in range(8)] == [1.0] * 2 + [0.1] * 6
    cosine = ClassifierConfig(epochs=4, lr=1.0, lr_all=0.1, freeze_epochs=2, warmup=0.0, schedule="cosine")
    expected = [1.0, 0.5, 0.1, 0.05]
    assert [learning_rate(cosine, n, 1) for n in range(4)] == pytest.approx(expected)
    same = ClassifierConfig(epochs=4, lr=1.0, freeze_epochs=2, warmup=0.0, schedule="constant")
    assert learning_rate(same, 3, 1) == 1.0


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"optimizer": "adam"}, ValueError, "expected optimizer to be one of sgd, adamw, got 'adam'"),
        ({"schedule": "linear"}, ValueError, "expected schedule to be one of cosine, step, constant"),
        ({"epochs": 0}, ValueError, "^expected epochs >= 1, got epochs=0$"),
        ({"lr": -1.0}, ValueError, "^expected lr > 0, got lr=-1.0$"),
        ({"lr_all": 0.0, "freeze_epochs": 1}, ValueError, "^expected lr_all > 0, got lr_all=0.0$"),
        ({"warmup": -1.0}, ValueError, "^expected warmup >= 0, got warmup=-1.0$"),
        ({"label_smoothing": 1.0}, ValueError, r"^expected label_smoothing in \[0, 1\), got label_smoothing=1.0$"),
        (
            {"freeze_epochs": 30},
            ValueError,
            r"expected freeze_epochs in 0\.\.epochs, got freeze_epochs=30 of epochs=20",
        ),
        ({"lr_all": 0.1}, ValueError, "need freeze_epochs >= 1"),
        ({"augment": "flipp"}, LookupError, "no augmentation called 'flipp'; did you mean flip"),
    ],
)
def test_settings_that_make_no_sense(settings, error, text):
    with pytest.raises(error, match=text):
        ClassifierConfig(**settings)


def test_a_new_head_and_where_it_sits():
    from torchvision.models import mobilenet_v3_small, resnet18, vgg11, vit_b_16

    for build, name in ((resnet18, "fc"), (mobilenet_v3_small, "classifier.3")):
        before = torch.get_rng_state()
        model = build()
        drawn = torch.get_rng_state()
        assert not torch.equal(before, drawn)
        assert head_name(model) == name
        assert replace_head(model, 7, seed=3) is model
        assert torch.equal(torch.get_rng_state(), drawn)
        assert model.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 7)
        head = model.get_submodule(name)
        assert head.out_features == 7
        assert 0.008 < float(head.weight.detach().std()) < 0.012
        assert not head.bias.any()
    with torch.device("meta"):
        assert head_name(vgg11()) == "classifier.6"
        assert head_name(vit_b_16()) == "heads.head"
    convolution = replace_head(MiniResNet(20, head="conv", widths=(4, 4, 4, 8)), 3)
    assert convolution(torch.rand(1, 3, 32, 32)).shape == (1, 3)
    assert replace_head(nn.Sequential(nn.Conv2d(3, 4, 3), Flat(), nn.Linear(4, 2)), 6)[2].out_features == 6
    with pytest.raises(ValueError, match="found no last linear layer in Sequential: looked in fc, classifier, head"):
        replace_head(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 2)
    with pytest.raises(ValueError, match="expected at least one class, got 0"):
        replace_head(MiniResNet(), 0)


def test_accuracy_counts():
    classifier = small()
    nn.init.zeros_(classifier.model[6].weight)
    classifier.model[6].bias.data = torch.tensor([1.0, 0.0])
    assert accuracy(classifier, Toy(5), batch=2) == 3 / 5
    with pytest.raises(ValueError, match="needs a label for every image"):
        accuracy(classifier, [Sample("x", torch.rand(3, 16, 16))])
    with pytest.raises(ValueError, match="at least one image"):
        accuracy(classifier, [])


def test_remembered_samples_are_read_once_and_equal():
    toy = Toy(6)
    eight = [Sample("e", torch.arange(192).view(3, 8, 8).to(torch.uint8) / 255, 1, boxes=torch.rand(1, 4))]
    kept = remember(toy)
    assert len(kept) == 6
    for _ in range(2):
        for n in range(6):
            sample, fresh = kept[n], Toy(6)[n]
            assert (sample.id, sample.label) == (fresh.id, fresh.label)
            assert torch.equal(sample.image, fresh.image)
    assert toy.reads == 6
    exact = remember(eight)
    assert torch.equal(exact[0].image, eight[0].image)
    assert exact.kept[0][1].dtype == torch.uint8
    assert kept.kept[0][1].dtype == torch.float32
    assert exact[0].boxes is None


def test_augmentations_keep_shape_and_range_and_use_their_generator_alone():
    image = torch.rand(3, 24, 16, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    for name in (*AUGMENTATIONS, "zoom+flip+crop+jitter"):
        vary = augmentation(name)
        results = [vary(image, torch.Generator().manual_seed(n)) for n in range(40)]
        assert all(result.shape == image.shape for result in results)
        clamped = name != "gaussian_noise"
        assert clamped == all(float(result.min()) >= 0 and float(result.max()) <= 1 for result in results)
        assert torch.equal(results[7], vary(image, torch.Generator().manual_seed(7)))
        assert any(not torch.equal(results[0], result) for result in results)
    assert torch.equal(torch.get_rng_state(), state)
    assert augmentation("none") is None


def test_flip_and_crop_by_hand():
    image = torch.arange(3 * 16 * 8, dtype=torch.float32).view(3, 16, 8) / 400
    flips = [AUGMENTATIONS["flip"](image, torch.Generator().manual_seed(n)) for n in range(100)]
    mirrored = sum(torch.equal(result, image.flip(2)) for result in flips)
    assert mirrored + sum(torch.equal(result, image) for result in flips) == 100
    assert 30 < mirrored < 70
    shifts = set()
    rows = [abs(n) if n < 16 else 30 - n for n in range(-2, 18)]
    columns = [abs(n) if n < 8 else 14 - n for n in range(-1, 9)]
    padded = image[:, rows][:, :, columns]
    for n in range(100):
        result = AUGMENTATIONS["crop"](image, torch.Generator().manual_seed(n))
        windows = ((t, s) for t in range(5) for s in range(3))
        shifts.add(next(w for w in windows if torch.equal(result, padded[:, w[0] : w[0] + 16, w[1] : w[1] + 8])))
    assert len(shifts) == 15


def test_permuted_labels_are_those_of_other_images_for_good():
    toy = Toy(25)
    permuted = Permuted(toy, 3)
    assert len(permuted) == 25
    assert sorted(permuted.others) == list(range(25))
    assert all(other != n for n, other in enumerate(permuted.others))
    for n in range(25):
        sample, own = permuted[n], toy[n]
        assert (sample.id, sample.label) == (own.id, toy[permuted.others[n]].label)
        assert torch.equal(sample.image, own.image)
    assert Permuted(toy, 3).others == permuted.others != Permuted(toy, 4).others
    multi = [Sample(f"m{n}", torch.rand(3, 8, 8), n, torch.eye(4, dtype=torch.long)[n]) for n in range(4)]
    assert all(int(one.labels.argmax()) == one.label for one in (Permuted(multi)[n] for n in range(4)))
    assert Permuted(Toy(1)).others == [0]


def test_a_training_on_permuted_labels_learns_them_and_is_another_one(tmp_path):
    config = ClassifierConfig(epochs=2, batch=8, lr=0.1, augment="none", permute=5)
    inside, outside = small(), small()
    train(inside, Toy(), config, out=tmp_path, accelerator="cpu")
    train(outside, Permuted(Toy(), 5), ClassifierConfig(**{**vars(config), "permute": None}), accelerator="cpu")
    assert_same(inside.model.state_dict(), outside.model.state_dict())
    assert checkpoint(tmp_path)["settings"]["permute"] == 5
    with pytest.raises(ValueError, match="permute was 5 and is None"):
        train(small(), Toy(), ClassifierConfig(**{**vars(config), "permute": None}), out=tmp_path, accelerator="cpu")
    plain = small()
    train(plain, Toy(), ClassifierConfig(**{**vars(config), "permute": None}), accelerator="cpu")
    assert not torch.equal(plain.model[6].weight, inside.model[6].weight)


def test_permute_is_a_setting_of_the_command_line():
    from sightline.cli._options import pairs
    from sightline.settings import bind

    assert bind(ClassifierConfig, pairs(("permute=0", "lr=0.1")))().permute == 0
    assert bind(ClassifierConfig, pairs(("lr=0.1",)))().permute is None
    with pytest.raises(TypeError, match="permute: expected a whole number or None, got 'yes'"):
        bind(ClassifierConfig, pairs(("permute=yes",)))


def test_zoom_and_resized_crop_take_their_share_of_the_area():
    rows, columns = torch.meshgrid(torch.arange(80) / 79, torch.arange(120) / 119, indexing="ij")
    image = torch.stack([rows, columns, torch.zeros(80, 120)])
    for name, smallest in (("zoom", 0.35), ("resized_crop", 0.08)):
        sides = []
        for n in range(300):
            found = AUGMENTATIONS[name](image, torch.Generator().manual_seed(n))
            height = float(found[0, 60, 60] - found[0, 20, 60]) / 40 * 79
            width = float(found[1, 40, 90] - found[1, 40, 30]) / 60 * 119
            sides.append((height, width))
        areas = [height * width for height, width in sides]
        assert smallest - 0.01 < min(areas) < smallest + 0.05
        assert max(areas) <= 1.001
        inside = [width / height for height, width in sides if max(height, width) < 0.99]
        assert 0.72 < min(inside) < 0.78
        assert 1.28 < max(inside) < 1.38
        assert sum(areas) / 300 == pytest.approx((1 + smallest) / 2, abs=0.05)
    whole = torch.rand(3, 2, 2)
    assert AUGMENTATIONS["resized_crop"](whole, torch.Generator().manual_seed(1)).shape == (3, 2, 2)


def test_the_right_half_becomes_noise():
    image = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0))
    found = [AUGMENTATIONS["left_half"](image, torch.Generator().manual_seed(n)) for n in (1, 1, 2)]
    assert all(torch.equal(one[..., :4], image[..., :4]) for one in found)
    assert torch.equal(found[0], found[1])
    assert float((found[0][..., 4:] - found[2][..., 4:]).abs().min()) > 0
    assert float((found[0][..., 4:] - image[..., 4:]).abs().min()) > 0
    assert found[0].min() >= 0
    assert found[0].max() <= 1


def test_rules_are_what_they_read_and_none_keeps_them_all():
    from types import SimpleNamespace

    kept = {
        ">= 1": [1, 2],
        ">= 0": [0, 1],
        "> 0": [0.1, 5],
        "in [0, 1]": [0, 0.5, 1],
        "in [0, 1)": [0, 0.5],
        "in (0, 1]": [0.5, 1],
        "in (0, 1)": [0.5],
    }
    broken = {
        ">= 1": [0, 0.9],
        ">= 0": [-0.1],
        "> 0": [0, -1],
        "in [0, 1]": [-0.1, 1.1],
        "in [0, 1)": [-0.1, 1],
        "in (0, 1]": [0, 1.1],
        "in (0, 1)": [0, 1],
    }
    assert kept.keys() == broken.keys() == RULES.keys()
    for rule in RULES:
        for value in (*kept[rule], None):
            expect(SimpleNamespace(a=0.5, b=value), rule, "b")
        for value in (*broken[rule], math.nan):
            with pytest.raises(ValueError, match=f"^{re.escape(f'expected b {rule}, got b={value}')}$"):
                expect(SimpleNamespace(a=kept[rule][0], b=value), rule, "a", "b")
