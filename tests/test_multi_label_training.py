import math
from dataclasses import replace
from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import nn

from sightline.classifier import wrap
from sightline.classifier_training import (
    AUGMENTATIONS,
    IRN,
    ClassifierConfig,
    ClassifierTrainer,
    Permuted,
    augmentation,
    average_precision,
    frozen_names,
    learning_rate,
    mean_average_precision,
    multi_hot,
    train,
)
from sightline.data import Sample, collate
from sightline.models import MiniResNet
from sightline.training import CHECKPOINT

CONFIG = ClassifierConfig(
    epochs=3,
    batch=4,
    loss="soft_margin",
    lr=0.05,
    head_lr=10.0,
    schedule="poly",
    warmup=0.5,
    augment="rescale+flip+binary_mask?keep=0.8",
)


def made(number):
    return torch.Generator().manual_seed(number)


class Lights:
    """Noise with a light at any of three places: the places are the classes, and an image may show all or none."""

    def __init__(self, count=24):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = 0.4 * torch.rand(3, 16, 16, generator=made(index))
        labels = torch.tensor([index >> place & 1 for place in range(3)])
        for place in range(3):
            image[place, 4:12, 4:12] += 0.6 * labels[place]
        return Sample(f"lights{index}", image, labels=labels)


class Stemmed(nn.Module):
    """The names of a ResNet, with batch norms and dropout."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.layer4 = nn.Sequential(nn.Conv2d(6, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.drop(self.layer4(self.bn1(self.conv1(x)).relu()).mean((2, 3))))


def small(classes=3):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return wrap(Stemmed(classes), layer="layer4", normalization=((0.3,), (0.5,)), size=16)


def ready(config, classifier=None):
    trainer = ClassifierTrainer(classifier or small(), config)
    trainer.classifier.model.drop.p = 0.0
    trainer.setup(Fabric(accelerator="cpu", devices=1))
    trainer.epoch(0, 3)
    return trainer


def logits_of(trainer, x):
    with torch.no_grad():
        return trainer.classifier.model(trainer.classifier.normalize(x))


def sigma(value):
    return 1 / (1 + math.exp(-value))


def slow_loss(logits, truth):
    """The mean over images of -1/k sum_c [y_c log sigma(s_c) + (1 - y_c) log sigma(-s_c)]."""
    total = 0.0
    for row, shown in zip(logits.tolist(), truth.tolist(), strict=True):
        inside = (math.log(sigma(s)) if y else math.log(sigma(-s)) for s, y in zip(row, shown, strict=True))
        total -= sum(inside) / len(row)
    return total / len(logits)


def tensors(state, path=""):
    """All tensors of nested dictionaries and lists, by path."""
    if isinstance(state, torch.Tensor):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {key: value for k, item in items for key, value in tensors(item, f"{path}/{k}").items()}


def assert_same(a, b):
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert len(left) > 5
    assert not [name for name in left if not torch.equal(left[name], right[name])]


# the loss


def test_the_loss_and_the_accuracy_are_means_over_images_and_classes():
    trainer = ready(ClassifierConfig(loss="soft_margin", augment="none"))
    batch = collate([Lights()[n] for n in (0, 3, 5, 6, 7)])
    logits, truth = logits_of(trainer, batch.x), torch.stack([sample.labels for sample in batch.samples])
    found = trainer.step(batch, 1.0)
    assert float(found["loss"]) == pytest.approx(slow_loss(logits, truth), rel=1e-5)
    right = [(s > 0) == (y == 1) for s, y in zip(logits.flatten(), truth.flatten(), strict=True)]
    assert float(found["accuracy"]) == pytest.approx(sum(map(bool, right)) / 15)
    assert 0 < sum(map(bool, right)) < 15


def test_one_label_counts_where_there_are_no_others():
    trainer = ready(ClassifierConfig(loss="soft_margin", augment="none"))
    image = torch.rand(3, 3, 16, 16, generator=made(1))
    several = torch.tensor([1, 1, 0])
    batch = collate([Sample("a", image[0], 2), Sample("b", image[1], 0, several), Sample("c", image[2], None, several)])
    logits = logits_of(trainer, batch.x)
    truth = torch.tensor([[0, 0, 1], [1, 1, 0], [1, 1, 0]])
    assert torch.equal(multi_hot(batch, logits, "this"), truth)
    assert float(trainer.step(batch, 1.0)["loss"]) == pytest.approx(slow_loss(logits, truth), rel=1e-5)


@pytest.mark.parametrize(
    ("sample", "told"),
    [
        (Sample("b", torch.rand(3, 16, 16)), "training a classifier needs a label for every image; 'b' has none"),
        (Sample("b", torch.rand(3, 16, 16), 3), r"label 3 is outside 0\.\.2: the network has 3 classes"),
        (
            Sample("b", torch.rand(3, 16, 16), 0, torch.tensor([1, 0])),
            r"expected the labels of 'b' to be 0 or 1 for each of the network's 3 classes, got \[1, 0\]",
        ),
        (Sample("b", torch.rand(3, 16, 16), 0, torch.tensor([1, 0, 255])), r"to be 0 or 1 .*, got \[1, 0, 255\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(sample, told):
    trainer = ready(ClassifierConfig(loss="soft_margin", augment="none"))
    with pytest.raises(ValueError, match=told):
        trainer.step(collate([Lights()[0], sample]), 1.0)


def test_a_single_output_is_refused():
    trainer = ready(ClassifierConfig(loss="soft_margin", augment="none"), small(1))
    told = "several labels an image needs an output for each class, and the network has a single one; use loss='cross"
    with pytest.raises(ValueError, match=told):
        trainer.step(collate([Sample("a", torch.rand(3, 16, 16), 1), Sample("b", torch.rand(3, 16, 16), 0)]), 1.0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"loss": "hinge"}, "^expected loss to be one of cross_entropy, soft_margin, got 'hinge'$"),
        (
            {"loss": "soft_margin", "label_smoothing": 0.1},
            "^label_smoothing=0.1 softens one label an image, and soft_ma",
        ),
        ({"head_lr": 0.0}, "^expected head_lr > 0, got head_lr=0.0$"),
        ({"power": 0.0}, "^expected power > 0, got power=0.0$"),
        ({"schedule": "polly"}, "^expected schedule to be one of cosine, step, constant, poly, got 'polly'$"),
    ],
)
def test_settings_that_make_no_sense(wrong, told):
    with pytest.raises(ValueError, match=told):
        ClassifierConfig(**wrong)


def test_mixed_images_learn_the_labels_of_both():
    batch, seen = collate([Lights()[n] for n in (1, 2, 4, 6)]), []
    trainer = ready(ClassifierConfig(loss="soft_margin", augment="none", regularizer="cutmix"))
    handle = trainer.classifier.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        found = trainer.step(batch, 1.0)
        handle.remove()
        torch.manual_seed(3)
        torch.rand(())
        clean = ready(ClassifierConfig(loss="soft_margin", augment="none")).classifier
        x, places = clean.normalize(batch.x), torch.arange(4)
        torch.manual_seed(3)
        with trainer.regularizer(clean, x, places) as (mixed, ((share, own), (rest, others))):
            logits = clean.model(mixed)
    assert torch.equal(seen[0], mixed)
    assert torch.equal(own, places)
    assert sorted(others.tolist()) == [0, 1, 2, 3] != others.tolist()
    assert 0 < share < 1
    truth = torch.stack([sample.labels for sample in batch.samples])
    expected = share * slow_loss(logits, truth) + rest * slow_loss(logits, truth[others])
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-5)
    expected = sum(
        part * float(((logits > 0).long() == truth[whose]).double().mean())
        for part, whose in ((share, own), (rest, others))
    )
    assert float(found["accuracy"]) == pytest.approx(expected)


@pytest.mark.parametrize("regularizer", ["has?grid=2", "adl"])
def test_what_mixes_no_labels_works_as_it_is(regularizer):
    history = train(small(), Lights(8), replace(CONFIG, epochs=1, regularizer=regularizer), accelerator="cpu")
    assert 0 < history[0]["loss"] < 2


def test_a_multi_label_network_learns_where_the_lights_are():
    classifier = small()
    config = ClassifierConfig(epochs=12, batch=8, loss="soft_margin", lr=0.3, augment="flip", warmup=0.0)
    history = train(classifier, Lights(64), config, accelerator="cpu")
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["accuracy"] > 0.9
    assert mean_average_precision(classifier, Lights(64), batch=24) > 0.95


def test_a_small_network_learns_scenes_of_creatures():
    from sightline.datasets import creatures
    from sightline.training import remember

    scenes = remember(creatures("train", variant="scenes", count=32, size=64))
    assert any(int(scenes[n].labels.sum()) > 1 for n in range(32))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = MiniResNet(20, widths=(8, 8, 16, 16))
    classifier = wrap(model, layer="layer4", normalization=((0.5,), (0.25,)), size=64)
    before = mean_average_precision(classifier, scenes)
    config = ClassifierConfig(epochs=12, batch=16, loss="soft_margin", lr=0.3, warmup=0.0, augment="none")
    history = train(classifier, scenes, config, accelerator="cpu")
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert mean_average_precision(classifier, scenes) > before


def test_permuted_images_have_all_labels_of_another_one():
    config, lights = replace(CONFIG, epochs=1, permute=5), Lights(9)
    permuted = Permuted(lights, 5)
    assert all(torch.equal(permuted[n].labels, lights[permuted.others[n]].labels) for n in range(9))
    inside, outside = small(), small()
    train(inside, lights, config, accelerator="cpu")
    train(outside, permuted, replace(config, permute=None), accelerator="cpu")
    assert_same(inside.model.state_dict(), outside.model.state_dict())


# rates


@pytest.mark.parametrize("loss", ["cross_entropy", "soft_margin"])
def test_the_head_takes_steps_of_its_own_size(loss):
    batch = collate([Sample(str(n), Lights()[n].image, n % 3) for n in range(6)])
    moves = []
    for factor in (1.0, 10.0):
        plain = {"momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "schedule": "constant", "augment": "none"}
        trainer = ready(ClassifierConfig(lr=0.01, head_lr=factor, loss=loss, **plain))
        start = {name: p.detach().double().clone() for name, p in trainer.classifier.model.named_parameters()}
        trainer.step(batch, 1.0)
        moved = trainer.classifier.model.named_parameters()
        moves.append({name: p.detach().double() - start[name] for name, p in moved})
        assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.01, 0.01 * factor])
    once, tenfold = moves
    assert float(once["fc.weight"].abs().max()) > 1e-4
    for name, move in once.items():
        factor = 10 if name.startswith("fc.") else 1
        assert torch.allclose(tenfold[name], factor * move, rtol=1e-3, atol=3e-8), name


def test_the_head_has_its_factor_at_every_step_and_with_adamw():
    config = ClassifierConfig(epochs=1, lr=0.1, head_lr=3.0, schedule="poly", warmup=1.0, optimizer="adamw")
    trainer, batch = ready(config), collate([Sample(str(n), Lights()[n].image, n % 3) for n in range(4)])
    for n in range(3):
        trainer.step(batch, 1.0)
        rest, head = (group["lr"] for group in trainer.optimizer.param_groups)
        assert rest == learning_rate(config, n, 3)
        assert head == 3.0 * rest
    names = {id(p): name for name, p in trainer.classifier.model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups]
    assert groups[1] == {"fc.weight", "fc.bias"}
    assert groups[0] | groups[1] == set(names.values())


def test_a_network_without_a_head_is_refused_only_where_its_rate_is_another_one():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.only(x).mean((2, 3))

    classifier = wrap(Bare(), layer="only", normalization="none", size=16)
    assert ClassifierTrainer(classifier, ClassifierConfig()).head == ""
    with pytest.raises(ValueError, match="found no last linear layer in Bare"):
        ClassifierTrainer(classifier, ClassifierConfig(head_lr=10.0))


def test_poly_by_hand():
    config = ClassifierConfig(epochs=5, lr=0.1, schedule="poly", warmup=0.0)
    rates = [learning_rate(config, n, 2) for n in range(10)]
    assert rates[0] == 0.1
    assert rates[5] == pytest.approx(0.1 * 0.5**0.9)
    assert rates == pytest.approx([0.1 * (1 - n / 10) ** 0.9 for n in range(10)])
    assert config.power == 0.9
    line = replace(config, power=1.0, warmup=1.0)
    assert [learning_rate(line, n, 2) for n in (0, 1, 2, 6, 9)] == pytest.approx([0.05, 0.1, 0.1, 0.05, 0.0125])
    staged = ClassifierConfig(epochs=4, lr=1.0, lr_all=0.1, freeze_epochs=2, warmup=0.0, schedule="poly", power=2.0)
    assert [learning_rate(staged, n, 1) for n in range(4)] == pytest.approx([1.0, 0.25, 0.1, 0.025])


# a training that was killed


def test_a_resumed_training_has_the_bits_of_an_uninterrupted_one(tmp_path):
    def die(progress):
        if (progress.epoch, progress.step) == (1, 5):
            raise OSError("the machine died")

    with pytest.raises(OSError, match="the machine died"):
        train(small(), Lights(), CONFIG, out=tmp_path / "killed", every=3, report=die, accelerator="cpu")
    left = torch.load(tmp_path / "killed" / CHECKPOINT, weights_only=True)["at"]
    assert (left["epoch"], left["step"]) == (1, 3)
    resumed, whole = small(), small()
    history = train(resumed, Lights(), CONFIG, out=tmp_path / "killed", every=3, accelerator="cpu")
    assert history == train(whole, Lights(), CONFIG, out=tmp_path / "whole", every=3, accelerator="cpu")
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    a, b = (torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("killed", "whole"))
    assert_same(a, b)
    assert [group["factor"] for group in a["trainer"]["optimizer"]["param_groups"]] == [1.0, 10.0]
    with pytest.raises(ValueError, match=r"head_lr was 10.0 and is 5.0; use its settings"):
        train(small(), Lights(), replace(CONFIG, head_lr=5.0), out=tmp_path / "whole", accelerator="cpu")


# augmentations


def test_names_may_have_settings():
    image = torch.rand(3, 16, 24, generator=made(0))
    text = "rescale?low=0.5&high=2+flip+zoom?smallest=0.9+binary_mask?keep=1+gaussian_noise?noise=0"
    chain, draws, expected = augmentation(text), made(4), image
    for name, values in (
        ("rescale", {"low": 0.5, "high": 2.0}),
        ("flip", {}),
        ("zoom", {"smallest": 0.9}),
        ("binary_mask", {"keep": 1.0}),
        ("gaussian_noise", {"noise": 0.0}),
    ):
        expected = AUGMENTATIONS[name](expected, draws, **values)
    assert torch.equal(chain(image, made(4)), expected)
    assert not torch.equal(augmentation("zoom")(image, made(4)), augmentation("zoom?smallest=0.9")(image, made(4)))
    assert ClassifierConfig(augment=text).augment == text


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("binary_musk", LookupError, "no augmentation called 'binary_musk'; did you mean binary_mask"),
        ("binary_musk?keep=0.5", LookupError, "no augmentation called 'binary_musk'; did you mean binary_mask"),
        ("flip+none", LookupError, "no augmentation called 'none'"),
        ("rescale?lo=0.5", LookupError, "rescale: no setting called 'lo'; did you mean low"),
        ("flip?image=1", LookupError, "flip: no setting called 'image'; known: none"),
        ("binary_mask?keep=most", TypeError, "binary_mask: keep: expected a number, got 'most'"),
        ("binary_mask?keep=1.5", ValueError, r"binary_mask: expected keep in \[0, 1\], .* got keep=1.5"),
        ("gaussian_noise?noise=-1", ValueError, "gaussian_noise: expected noise >= 0, .* got noise=-1.0"),
        ("rescale?low=2", ValueError, "rescale: expected factors 0 < low <= high, got low=2.0, high=1.25"),
        ("rescale?low=0", ValueError, "got low=0.0, high=1.25"),
        ("zoom?smallest=0", ValueError, r"zoom: expected smallest in \(0, 1\], a share of the area, got smallest=0.0"),
        ("zoom?smallest", ValueError, r"expected name\?key=value&key=value, got 'zoom\?smallest'"),
    ],
)
def test_what_makes_no_sense_is_said_when_the_configuration_is_made(text, error, told):
    with pytest.raises(error, match=told):
        ClassifierConfig(augment=text)


@pytest.mark.parametrize("name", ["rescale", "binary_mask", "gaussian_noise"])
def test_augmentations_draw_from_their_generator_alone_and_leave_the_image(name):
    image = torch.rand(3, 12, 20, generator=made(0))
    before, state = image.clone(), torch.get_rng_state()
    results = [AUGMENTATIONS[name](image, made(n)) for n in (7, 7, 8)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(image, before)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert all(result.shape == image.shape and result.dtype == image.dtype for result in results)


def test_a_binary_mask_takes_pixels_and_all_their_colors():
    image = 0.2 + 0.8 * torch.rand(3, 100, 100, generator=made(0))
    found = AUGMENTATIONS["binary_mask"](image, made(1))
    kept = found[0] != 0
    assert torch.equal(found, torch.where(kept, image, torch.zeros(())))
    assert float(kept.double().mean()) == pytest.approx(0.9, abs=5 * math.sqrt(0.9 * 0.1 / 1e4))
    half = AUGMENTATIONS["binary_mask"](image, made(1), keep=0.5)[0] != 0
    assert float(half.double().mean()) == pytest.approx(0.5, abs=0.025)
    neighbors = half[:, 1:].double() * half[:, :-1].double()
    assert float(neighbors.mean()) == pytest.approx(0.25, abs=0.025)
    assert torch.equal(AUGMENTATIONS["binary_mask"](image, made(1), keep=1.0), image)
    assert not AUGMENTATIONS["binary_mask"](image, made(1), keep=0.0).any()


def test_gaussian_noise_has_its_deviation_and_is_not_clamped():
    image = torch.rand(3, 100, 100, generator=made(0))
    for noise in (0.15, 0.4):
        eps = (AUGMENTATIONS["gaussian_noise"](image, made(1), noise=noise) - image).double()
        assert float(eps.mean()) == pytest.approx(0, abs=5 * noise / math.sqrt(3e4))
        assert float(eps.std()) == pytest.approx(noise, rel=0.03)
        within = float((eps.abs() < noise).double().mean())
        assert within == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.02)
        assert abs(float((eps[0] * eps[1]).mean())) < 0.05 * noise**2
    found = AUGMENTATIONS["gaussian_noise"](image, made(1))
    assert torch.equal(found, AUGMENTATIONS["gaussian_noise"](image, made(1), noise=0.15))
    assert found.min() < -0.1
    assert found.max() > 1.1


def test_training_takes_values_outside_the_range():
    augment = "rescale+flip+gaussian_noise?noise=0.5"
    history = train(small(), Lights(), replace(CONFIG, epochs=2, augment=augment), accelerator="cpu")
    assert all(math.isfinite(one["loss"]) for one in history)
    reached = augmentation(augment)(Lights()[3].image, made(0))
    assert reached.min() < 0


def placed(found, height, width):
    """The corner of the white rectangle of a rescaled white image; None where it is not one of this size."""
    white = (found[0] > 0.9).nonzero()
    (top, left), (bottom, right) = white.min(0).values.tolist(), white.max(0).values.tolist()
    assert (bottom - top + 1, right - left + 1) == (height, width)
    assert len(white) == height * width
    return top, left


def test_a_smaller_image_lies_anywhere_on_its_mean_color():
    image = torch.rand(3, 8, 12, generator=made(0)) * torch.tensor([0.2, 0.5, 1.0]).view(3, 1, 1)
    corners = set()
    for n in range(200):
        found = AUGMENTATIONS["rescale"](image, made(n), low=0.5, high=0.5)
        mean = torch.stack([torch.full((8, 12), float(channel.mean())) for channel in image])
        inside = ((found - mean).abs() > 1e-6).any(0).nonzero()
        (top, left), (bottom, right) = inside.min(0).values.tolist(), inside.max(0).values.tolist()
        assert (bottom - top + 1, right - left + 1) == (4, 6)
        small = nn.functional.interpolate(image[None], size=(4, 6), mode="bilinear", antialias=True)[0]
        assert torch.allclose(found[:, top : top + 4, left : left + 6], small, atol=1e-6)
        corners.add((top, left))
    assert corners == {(top, left) for top in range(5) for left in range(7)}


def test_a_larger_image_is_cropped_anywhere():
    image = torch.rand(3, 8, 6, generator=made(0))
    large = nn.functional.interpolate(image[None], size=(12, 9), mode="bilinear", antialias=True)[0]
    windows = {(top, left): large[:, top : top + 8, left : left + 6] for top in range(5) for left in range(4)}
    met = set()
    for n in range(200):
        found = AUGMENTATIONS["rescale"](image, made(n), low=1.5, high=1.5)
        met |= {corner for corner, window in windows.items() if torch.allclose(found, window, atol=1e-6)}
    assert met == windows.keys()
    assert torch.allclose(AUGMENTATIONS["rescale"](image, made(0), low=1.0, high=1.0), image, atol=1e-6)


def test_the_factor_is_uniform_between_its_ends():
    """A line across the whole width of a wide image tells by its slope how much larger that has become."""
    line = (torch.arange(400) / 399).expand(3, 8, 400)
    factors = []
    for n in range(300):
        found = AUGMENTATIONS["rescale"](line, made(n))[0]
        row = found[(found - found.mean()).abs().sum(1).argmax()]
        slopes = row.diff()
        factors.append(1 / 399 / float(slopes[slopes > 1e-4].median()))
    assert 0.61 < min(factors) < 0.65
    assert 1.22 < max(factors) < 1.27
    assert sum(factors) / 300 == pytest.approx((0.625 + 1.25) / 2, abs=0.04)
    assert sum(factor < 1 for factor in factors) / 300 == pytest.approx(0.375 / 0.625, abs=0.1)


def test_a_rescaled_image_stays_in_range():
    for image in (torch.ones(3, 7, 5), torch.zeros(3, 7, 5), torch.rand(3, 7, 5).round()):
        for n in range(30):
            found = AUGMENTATIONS["rescale"](image, made(n))
            assert found.min() >= 0
            assert found.max() <= 1
            assert found.shape == image.shape
    assert AUGMENTATIONS["rescale"](torch.rand(1, 1, 1), made(0), low=0.1, high=0.1).shape == (1, 1, 1)


# mean average precision


def slow_average_precision(scores, positive):
    """Walk down the ranking, one distinct score after the other, and add precision times the recall that it gains."""
    found, above, right = 0.0, 0, 0
    for score in sorted(set(scores), reverse=True):
        here = [p for s, p in zip(scores, positive, strict=True) if s == score]
        above, right = above + len(here), right + sum(here)
        found += sum(here) / sum(positive) * right / above
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=12))
def test_average_precision_is_the_slow_one_whatever_the_order_and_the_ties(pairs):
    scores, positive = [float(s) / 4 for s, _ in pairs], [p for _, p in pairs]
    if not any(positive):
        with pytest.raises(ValueError, match=f"at least one positive, got none among {len(pairs)} scores"):
            average_precision(torch.tensor(scores), torch.tensor(positive))
        return
    found = average_precision(torch.tensor(scores), torch.tensor(positive))
    assert found == pytest.approx(slow_average_precision(scores, positive), abs=1e-12)
    assert 0 < found <= 1
    back = average_precision(torch.tensor(scores[::-1]), torch.tensor(positive[::-1]))
    assert back == pytest.approx(found, abs=1e-12)


def test_average_precision_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert average_precision(scores, torch.tensor([True, False, True, False])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(scores, torch.tensor([True, True, False, False])) == 1.0
    assert average_precision(scores, torch.tensor([False, False, False, True])) == 0.25
    assert average_precision(torch.zeros(4), torch.tensor([False, True, False, False])) == 0.25


def test_average_precision_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    for n in range(20):
        scores = torch.randn(50, generator=made(n))
        scores = scores.round(decimals=1) if n % 2 else scores
        positive = torch.rand(50, generator=made(100 + n)) < 0.3
        expected = metrics.average_precision_score(positive.numpy(), scores.numpy())
        assert average_precision(scores, positive) == pytest.approx(float(expected), abs=1e-12)


class Read(nn.Module):
    """Logits are the colors of the first pixel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.conv.weight.data = torch.eye(3).view(3, 3, 1, 1)

    def forward(self, x):
        return self.conv(x)[:, :, 0, 0]


def test_the_mean_is_over_the_classes_that_are_there():
    classifier = wrap(Read(), layer="conv", normalization="none", size=4)
    colors = torch.tensor([[0.9, 0.1, 0.3], [0.5, 0.2, 0.9], [0.1, 0.3, 0.4], [0.4, 0.4, 0.1], [0.2, 0.8, 0.2]])
    truth = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    samples = [
        Sample(str(n), color.view(3, 1, 1).expand(3, 4, 4), labels=labels)
        for n, (color, labels) in enumerate(zip(colors, truth, strict=True))
    ]
    samples[4] = replace(samples[4], labels=None, label=1)
    expected = [slow_average_precision(colors[:, c].tolist(), truth[:, c].tolist()) for c in (0, 1)]
    for batch in (1, 2, 64):
        found = mean_average_precision(classifier, samples, batch=batch)
        assert found == pytest.approx(sum(expected) / 2, abs=1e-12)
    assert expected[0] != expected[1]
    assert mean_average_precision(classifier, [replace(samples[3], labels=None, label=2)]) == 1.0


def test_what_has_no_average_precision_is_said():
    classifier = small()
    with pytest.raises(ValueError, match="mean average precision needs at least one image, got none"):
        mean_average_precision(classifier, [])
    nothing = [Lights()[0], Lights()[8]]
    with pytest.raises(ValueError, match="needs an image that shows a class; none of 2 does"):
        mean_average_precision(classifier, nothing)
    with pytest.raises(ValueError, match="mean average precision needs a label for every image; 'x' has none"):
        mean_average_precision(classifier, [Lights()[1], Sample("x", torch.rand(3, 16, 16))])
    with pytest.raises(ValueError, match="the labels of 'x' to be 0 or 1 for each of the network's 3 classes"):
        mean_average_precision(classifier, [Sample("x", torch.rand(3, 16, 16), labels=torch.tensor([1]))])


# IRN


def test_irn_is_the_recipe_of_its_program():
    assert (IRN.loss, IRN.epochs, IRN.batch, IRN.optimizer) == ("soft_margin", 5, 16, "sgd")
    assert (IRN.lr, IRN.head_lr, IRN.momentum, IRN.weight_decay) == (0.1, 10.0, 0.0, 1e-4)
    steps = 661
    rates = [learning_rate(IRN, n, steps) for n in (0, 1, 1000, 5 * steps - 1)]
    assert rates == pytest.approx([0.1 * (1 - n / (5 * steps)) ** 0.9 for n in (0, 1, 1000, 5 * steps - 1)])
    assert all(
        signature(AUGMENTATIONS["rescale"]).parameters[k].default == v / 512 for k, v in (("low", 320), ("high", 640))
    )


def test_irn_never_moves_the_stem():
    classifier = small()
    start = {name: value.clone() for name, value in classifier.model.state_dict().items()}
    train(classifier, Lights(), replace(IRN, batch=8), accelerator="cpu")
    same = {name for name, value in classifier.model.state_dict().items() if torch.equal(value, start[name])}
    stem = {name for name in start if name.split(".")[0] in ("conv1", "bn1")}
    assert len(stem) == 7
    assert same == stem
    assert all(parameter.requires_grad for parameter in classifier.model.parameters())


def test_irn_finds_the_stem_and_the_head_of_a_resnet():
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = resnet50()
    names = frozen_names(model, IRN.freeze)
    assert {name.split(".")[0] for name in names} == {"conv1", "bn1"}
    more = replace(IRN, freeze=(*IRN.freeze, "layer1", "layer2"))
    assert "layer2.3.bn3" in frozen_names(model, more.freeze)
