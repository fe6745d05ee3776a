"""Training segmenters: the loss by loops, image and mask moving together, resuming, pseudo labels."""

import copy
import json
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from PIL import Image
from torch import nn

from sightline.classifier import UnsuitedError, wrap
from sightline.classifier_training import AUGMENTATIONS, augmentation
from sightline.data import Sample, collate
from sightline.datasets import creatures, folder
from sightline.explainers import _segmenter_training
from sightline.explainers._segmenter import Segmenter, log_odds, mini_seg
from sightline.explainers._segmenter_training import (
    COLORING,
    MOVING,
    Pseudo,
    SegmenterConfig,
    SegmenterTrainer,
    joint,
    learning_rate,
    pixel_accuracy,
    pixel_loss,
    train_segmenter,
)
from sightline.interchange import write_labels
from sightline.running import Relabeled
from sightline.training import Joint, Trainer, fit, remember
from sightline.viz import to_pil

TINY = {"widths": (4, 6, 8, 10), "width": 5, "size": 32}


class Toy:
    """Noise with a bright rectangle, red (class 0) or blue (class 1); one row of the mask is ignored."""

    def __init__(self, count=12, side=16):
        self.samples = []
        randomness = torch.Generator().manual_seed(1)
        for n in range(count):
            image = 0.3 * torch.rand(3, side, side, generator=randomness)
            mask = torch.zeros(side, side, dtype=torch.long)
            i, j = (int(v) for v in torch.randint(side // 2, (2,), generator=randomness))
            mask[i : i + 7, j : j + 6] = n % 2 + 1
            image[2 * (n % 2)][mask > 0] += 0.6
            mask[n % side] = 255
            self.samples.append(Sample(f"toy/{n}", image, n % 2, mask=mask))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def tiny(seed=0):
    return mini_seg(2, **TINY, seed=seed)


def quick(**settings):
    return SegmenterConfig(**{"epochs": 2, "batch": 5, "augment": "none", **settings})


def prepared(classifier, config):
    trainer = SegmenterTrainer(classifier, config)
    trainer.setup(Fabric(accelerator="cpu", devices=1))
    trainer.epoch(0, 10)
    return trainer


def case(seed=0):
    """Logits of three images, and masks with ignored pixels; in the last one nothing counts."""
    randomness = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, 5, 6, generator=randomness, dtype=torch.float64)
    masks = torch.randint(4, (3, 5, 6), generator=randomness)
    masks[0, :2], masks[1, 4, 4], masks[2] = 255, 255, 255
    return logits, masks


def slow_means(logits, masks, of):
    total = 0.0
    for l, mask in zip(logits, masks, strict=True):  # noqa: E741
        values = []
        for i in range(mask.shape[0]):
            for j in range(mask.shape[1]):
                if mask[i, j] != 255:
                    values.append(of([float(v) for v in l[:, i, j]], int(mask[i, j])))
        total += sum(values) / len(values) if values else 0.0
    return total / len(logits)


def cross_entropy(row, label):
    return math.log(sum(math.exp(v) for v in row)) - row[label]


def right(row, label):
    return float(row.index(max(row)) == label)


def test_the_loss_is_the_mean_over_images_of_their_means_over_pixels():
    logits, masks = case()
    assert float(pixel_loss(logits, masks)) == pytest.approx(slow_means(logits, masks, cross_entropy), rel=1e-12)
    assert float(pixel_accuracy(logits, masks)) == pytest.approx(slow_means(logits, masks, right), rel=1e-12)
    assert float(pixel_loss(logits, masks)) != pytest.approx(float(F.cross_entropy(logits, masks, ignore_index=255)))


def test_parts_weighed_by_their_share_of_the_images_give_the_whole_loss():
    logits, masks = case()
    parts = pixel_loss(logits[:1], masks[:1]) / 3 + 2 * pixel_loss(logits[1:], masks[1:]) / 3
    assert float(parts) == pytest.approx(float(pixel_loss(logits, masks)), rel=1e-12)


def test_ignored_pixels_have_no_gradient_and_all_others_have():
    logits, masks = case()
    G = torch.autograd.grad(pixel_loss(logits.requires_grad_(), masks), logits)[0]
    assert torch.equal((G != 0).all(1), masks != 255)
    assert torch.equal((G != 0).any(1), masks != 255)


def marked(h=16, w=12):
    """A sample whose mask can be read from its image: red says the row, green the column."""
    mask = torch.arange(h * w).view(h, w) % 251
    image = torch.stack([(mask // 16) / 16, (mask % 16) / 16, torch.zeros(h, w)])
    return Sample("m", image, 3, torch.tensor([0, 1]), mask=mask, boxes=torch.zeros(1, 4))


def decoded(image):
    return (image[0] * 16).round().long() * 16 + (image[1] * 16).round().long()


@pytest.mark.parametrize("names", ["flip", "crop", "flip+crop", "crop+flip"])
def test_image_and_mask_move_together_pixel_by_pixel(names):
    sample, found = marked(), []
    for n in range(20):
        moved = joint(names).move(sample, torch.Generator().manual_seed(n))
        assert torch.equal(decoded(moved.image), moved.mask)
        assert torch.equal(moved.image, by_hand(sample.image, names, n))
        found.append(tuple(moved.mask.flatten().tolist()))
        assert (moved.id, moved.label, moved.labels is sample.labels, moved.boxes) == ("m", 3, True, None)
    assert len(set(found)) > 1
    assert found[0] == tuple(joint(names).move(sample, torch.Generator().manual_seed(0)).mask.flatten().tolist())


def by_hand(image, names, seed):
    """The image alone, as a classifier's training moves it."""
    randomness = torch.Generator().manual_seed(seed)
    for name in names.split("+"):
        image = AUGMENTATIONS[name](image, randomness)
    return image


def test_a_zoomed_mask_is_the_nearest_of_the_zoomed_image():
    side = 32
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack([rows / (side - 1), columns / (side - 1), torch.zeros(side, side)])
    sizes = set()
    for n in range(20):
        moved = joint("zoom").move(
            Sample("z", image, mask=8 * (rows // 4) + columns // 4), torch.Generator().manual_seed(n)
        )
        i, j = moved.image[0] * (side - 1), moved.image[1] * (side - 1)
        clear = ((i + 0.5) % 4 > 0.01) & ((j + 0.5) % 4 > 0.01)
        expected = 8 * (i.round() // 4) + j.round() // 4
        assert clear.float().mean() > 0.5
        assert torch.equal(moved.mask[clear], expected[clear].long())
        sizes.add(len(moved.mask.unique()))
    assert len(sizes) > 3


def test_colors_change_without_the_mask_and_keep_the_randomness_of_what_follows():
    sample = marked()
    for n in range(20):
        one = joint("jitter+flip").move(sample, torch.Generator().manual_seed(n))
        assert torch.equal(one.image, by_hand(sample.image, "jitter+flip", n))
        flipped = torch.equal(one.mask, sample.mask.flip(-1))
        assert flipped or torch.equal(one.mask, sample.mask)
        plain = by_hand(sample.image, "jitter", n)
        assert torch.equal(one.image, plain.flip(-1) if flipped else plain)


def test_augmentations_that_no_mask_can_follow_are_refused(plain):
    assert {*MOVING, *COLORING} <= {*AUGMENTATIONS}
    assert not {*MOVING} & {*COLORING}
    assert joint("none") is None
    with pytest.raises(LookupError, match="no augmentation called 'flipp'; did you mean flip"):
        joint("flipp")
    for name in {*AUGMENTATIONS} - {*MOVING, *COLORING}:
        with pytest.raises(ValueError, match=f"masks cannot follow augment={name}; take some of flip, crop, zoom"):
            SegmenterConfig(augment=f"flip+{name}")


class Shot(nn.Module):
    """One 3x3 convolution."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.convolution(x)


def shot(seeded):
    return wrap(Segmenter(seeded(Shot, seed=1), 2), layer="network.convolution", normalization=((0.4,), (0.3,)), size=8)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_three_steps_are_those_of_a_slow_training_with_backward(optimizer, seeded):
    classifier = shot(seeded)
    slow = copy.deepcopy(classifier.model.network)
    config = quick(optimizer=optimizer, lr=0.1, weight_decay=0.02, epochs=3, warmup=0.0)
    trainer = prepared(classifier, config)
    assert isinstance(trainer, Trainer)
    descent = (
        torch.optim.SGD(slow.parameters(), 1.0, 0.9, weight_decay=0.02)
        if optimizer == "sgd"
        else torch.optim.AdamW(slow.parameters(), 1.0, weight_decay=0.02)
    )
    toy = Toy(side=8)
    for step in range(3):
        samples = [replace(toy[n], image=toy[n].image.double()) for n in range(4 * step, 4 * step + 4)]
        told = trainer.step(collate(samples), 1.0)
        logits = slow((torch.stack([one.image for one in samples]) - 0.4) / 0.3)
        losses = [
            F.cross_entropy(z[None], one.mask[None], ignore_index=255) for z, one in zip(logits, samples, strict=True)
        ]
        loss = sum(losses) / 4
        descent.zero_grad()
        loss.backward()
        descent.param_groups[0]["lr"] = 0.1 * (1 - step / 30) ** 0.9
        descent.step()
        assert float(told["loss"]) == pytest.approx(float(loss.detach()), rel=1e-9)
    for ours, theirs in zip(classifier.model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_rates_by_hand():
    poly = SegmenterConfig(epochs=2, lr=2.0, power=0.5)
    assert [learning_rate(poly, n, 2) for n in range(4)] == pytest.approx([2 * math.sqrt(1 - n / 4) for n in range(4)])
    warm = SegmenterConfig(epochs=3, lr=1.0, warmup=1.0, schedule="cosine")
    expected = [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert [learning_rate(warm, n, 2) for n in range(6)] == pytest.approx(expected)
    assert [learning_rate(SegmenterConfig(epochs=2, lr=0.3, schedule="constant"), n, 2) for n in range(4)] == [0.3] * 4
    assert learning_rate(SegmenterConfig(epochs=1, lr=1.0, warmup=9.0), 1, 2) == 1.0


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"optimizer": "adam"}, ValueError, "expected optimizer to be one of adamw, sgd, got 'adam'"),
        ({"schedule": "step"}, ValueError, "expected schedule to be one of poly, cosine, constant, got 'step'"),
        ({"precision": "16"}, ValueError, "expected precision to be one of"),
        ({"epochs": 0}, ValueError, "expected epochs >= 1, got epochs=0"),
        ({"batch": 0}, ValueError, "expected batch >= 1, got batch=0"),
        ({"lr": 0.0}, ValueError, "expected lr > 0, got lr=0.0"),
        ({"power": 0.0}, ValueError, "expected power > 0"),
        ({"warmup": -1.0}, ValueError, "expected warmup >= 0"),
        ({"weight_decay": -1.0}, ValueError, "expected weight_decay >= 0"),
        ({"momentum": -1.0}, ValueError, "expected momentum >= 0"),
        ({"augment": "zom"}, LookupError, "no augmentation called 'zom'; did you mean zoom"),
    ],
)
def test_wrong_settings_are_refused(wrong, error, text, plain):
    with pytest.raises(error, match=text):
        SegmenterConfig(**wrong)


def test_an_interrupted_training_ends_with_the_bits_of_an_uninterrupted_one(tmp_path):
    config = quick(epochs=3, augment="flip+zoom+jitter", warmup=0.5)

    def interrupt(at, progress):
        if (progress.epoch, progress.step) == at:
            raise KeyboardInterrupt

    whole, other = tiny(), tiny()
    run = partial(train_segmenter, dataset=Toy(), config=config, every=2, accelerator="cpu")
    history = run(whole, out=tmp_path / "whole")
    for at in ((0, 1), (1, 2), (2, 3)):
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), out=tmp_path / "parts", report=partial(interrupt, at))
    parts = tiny(seed=3)
    assert run(parts, out=tmp_path / "parts") == history
    run(other, seed=1)
    ends = [one.model.state_dict() for one in (whole, parts, other)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["network.head.weight"], ends[2]["network.head.weight"])
    assert not whole.model.training
    assert set(history[0]) == {"loss", "pixel_accuracy"}
    settings = torch.load(tmp_path / "whole" / "checkpoint.pt")["settings"]
    assert settings["augment"] == "flip+zoom+jitter"
    with pytest.raises(ValueError, match=r"lr was 0\.002 and is 0\.1"):
        train_segmenter(tiny(), Toy(), replace(config, lr=0.1), out=tmp_path / "whole", accelerator="cpu")


def test_the_state_is_a_copy():
    trainer = prepared(tiny(), quick())
    batch = collate(Toy().samples[:4])
    trainer.step(batch, 1.0)
    state = trainer.state_dict()
    before = copy.deepcopy(state["model"])
    trainer.step(batch, 1.0)
    assert all(torch.equal(state["model"][name], before[name]) for name in before)
    assert (state["done"], trainer.done) == (1, 2)
    assert not torch.equal(before["network.head.bias"], trainer.model.state_dict()["network.head.bias"])


def test_a_small_one_learns_four_scenes_by_heart():
    """The mean IoU of the classes that are there, background too, is above .9."""
    large = creatures("val", variant="scenes", size=64, count=4)
    scenes = [Sample(s.id, F.avg_pool2d(s.image, 2), mask=s.mask[::2, ::2]) for s in map(large.__getitem__, range(4))]
    config = SegmenterConfig(epochs=90, batch=4, lr=1e-2, augment="none")
    classifier = mini_seg(20, widths=(8, 16, 24, 32), width=24, size=32)
    history = train_segmenter(classifier, remember(scenes, masks=True), config, accelerator="cpu")
    assert history[-1]["loss"] < history[0]["loss"] / 10
    S = log_odds(classifier, torch.stack([scenes[n].image for n in range(4)]))
    value, label = S.max(1)
    found, true = torch.where(value > 0, label + 1, 0), torch.stack([scenes[n].mask for n in range(4)])
    counts = true != 255
    shares = []
    for one in true[counts].unique().tolist():
        a, b = (found == one) & counts, true == one
        shares.append(int((a & b).sum()) / int((a | b).sum()))
    assert len(shares) > 3
    assert sum(shares) / len(shares) > 0.9


def test_masks_are_needed_and_checked(plain):
    trainer, image = prepared(tiny(), quick()), torch.rand(3, 16, 16)
    mask = torch.zeros(16, 16, dtype=torch.long)
    ours = Sample("a", image, mask=mask)
    for sample, text in (
        (Sample("b", image), "needs a mask for every image; 'b' has none; take data with masks, or pseudo labels"),
        (Sample("b", image, mask=mask[:8]), "the mask of 'b' is (8, 16) pixels, its image (16, 16); resize both"),
        (Sample("b", image, mask=mask + 3), "the mask of 'b' holds 3; the segmenter has 2 classes, which are 1 to 2"),
        (Sample("b", image, mask=mask - 1), "the mask of 'b' holds -1"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            trainer.step(collate([ours, sample]), 1.0)
    with pytest.raises(ValueError, match="needs a mask for every image; 'b' has none"):
        joint("flip").move(Sample("b", image), torch.Generator())
    assert {"loss", "pixel_accuracy"} == set(trainer.step(collate([ours, replace(ours, mask=mask + 255)]), 1.0))


def test_other_networks_are_refused(pooled, plain):
    with pytest.raises(UnsuitedError, match="Pooled is no segmenter"):
        train_segmenter(pooled, Toy(), quick())


def test_pseudo_labels_may_leave_out_the_ending_of_a_picture(tmp_path, plain):
    toy = [replace(Toy()[n], id=f"red/{n}.png") for n in range(3)]
    write_labels(tmp_path / "red" / "0.png", toy[0].mask)
    write_labels(tmp_path / "red" / "1.png.png", toy[1].mask)
    pseudo = Pseudo(toy, tmp_path)
    assert torch.equal(pseudo[0].mask, toy[0].mask)
    assert torch.equal(pseudo[1].mask, toy[1].mask)
    with pytest.raises(FileNotFoundError, match=r"no label map .*red/2\.png\.png or .*red/2\.png for image"):
        pseudo[2]


@pytest.mark.parametrize("inner", ["", "labels"])
def test_pseudo_labels_take_the_place_of_masks(inner, tmp_path):
    toy, folder = [replace(one, size=(48, 80)) for one in Toy(4).samples], tmp_path / inner
    for n in range(3):
        large = torch.full((48, 80), 1)
        large[1::3, 2::5] = toy[n].mask.flip(0)
        write_labels(folder / f"toy/{n}.png", large)
    pseudo = Pseudo(toy, tmp_path)
    assert len(pseudo) == 4
    for n in range(3):
        assert torch.equal(pseudo[n].mask, toy[n].mask.flip(0))
        assert torch.equal(pseudo[n].image, toy[n].image)
        assert (pseudo[n].id, pseudo[n].label) == (f"toy/{n}", n % 2)
    text = "toy/3.png for image 'toy/3': the folder holds 3 for 4 images; make them with sightline segment"
    with pytest.raises(FileNotFoundError, match=re.escape(text)):
        pseudo[3]
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing; expected one of label maps"):
        Pseudo(toy, tmp_path / "nothing")
    Image.new("RGB", (4, 4)).save(folder / "toy/3.png")
    with pytest.raises(ValueError, match="holds colors, not labels"):
        pseudo[3]


def named(folder, *names):
    """Say in a folder what the values of its label maps mean."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "segment.json").write_text(json.dumps({"names": ["background", *names]}))


@pytest.mark.parametrize("given", ["", "labels"])
def test_classes_of_pseudo_labels_meet_by_their_names(given, tmp_path):
    toy = Toy(2)
    values = torch.tensor([[0, 1, 2, 3, 255, 2]]).repeat_interleave(3, 1)[:, :16].expand(16, 16)
    for sample in toy.samples:
        write_labels(tmp_path / "labels" / f"{sample.id}.png", values)
    named(tmp_path, "newt", "pip", "crane")
    order = ("crane", "newt", "pip", "heron")
    theirs = {0: 0, 1: 2, 2: 3, 3: 1, 255: 255}
    expected = torch.tensor([[theirs[value] for value in row] for row in values.tolist()])
    assert torch.equal(Pseudo(toy, tmp_path / given, order)[1].mask, expected)
    assert torch.equal(Pseudo(toy, tmp_path / given, ("newt", "pip", "crane"))[1].mask, values)
    assert torch.equal(Pseudo(toy, tmp_path / given)[1].mask, values)
    text = r"holds 3, which segment.json calls 'crane', and the segmenter has no such class: .*'crane'.* newt, pip"
    with pytest.raises(ValueError, match=text):
        Pseudo(toy, tmp_path / given, ("newt", "pip"))[0]
    with pytest.raises(ValueError, match=r"'crane', .*: two classes are called so"):
        Pseudo(toy, tmp_path / given, ("newt", "pip", "crane", "crane"))[0]
    named(tmp_path, "pip", "newt")
    with pytest.raises(ValueError, match=r"toy/0\.png holds 3, for which segment\.json has no name"):
        Pseudo(toy, tmp_path / given, order)[0]
    (tmp_path / "segment.json").write_text("[")
    with pytest.raises(ValueError, match=r"segment\.json does not say what label maps mean"):
        Pseudo(toy, tmp_path / given, order)


def test_label_maps_that_nobody_names_keep_their_numbers(tmp_path):
    toy = Toy(1)
    write_labels(tmp_path / "toy" / "0.png", toy[0].mask)
    assert torch.equal(Pseudo(toy, tmp_path, ("red", "blue"))[0].mask, toy[0].mask)
    named(tmp_path)
    assert torch.equal(Pseudo(toy, tmp_path, ("red", "blue"))[0].mask, toy[0].mask)
    named(tmp_path.parent, "blue", "red")
    (tmp_path / "segment.json").unlink()
    assert torch.equal(Pseudo(toy, tmp_path, ("red", "blue"))[0].mask, toy[0].mask)
    (tmp_path.parent / "segment.json").unlink()


def test_a_segmenter_learns_the_same_from_labels_in_another_order(tmp_path):
    """The data calls red 0 and blue 1, the labels blue 1 and red 2."""
    toy = Toy(7)
    swapped = torch.full((256,), 255)
    swapped[:3] = torch.tensor([0, 2, 1])
    for sample in toy.samples:
        write_labels(tmp_path / "labels" / f"{sample.id}.png", swapped[sample.mask])
    named(tmp_path, "blue", "red")
    found, expected = (replace(tiny(), classes=("red", "blue")) for _ in range(2))
    bare = [replace(sample, mask=None) for sample in toy.samples]
    train_segmenter(found, bare, quick(labels=str(tmp_path)), accelerator="cpu")
    train_segmenter(expected, toy, quick(), accelerator="cpu")
    for ours, theirs in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("policy", ["direct", "crop", "crop256"])
@pytest.mark.parametrize("wide", [True, False])
def test_label_maps_of_original_pictures_go_where_the_pictures_go(policy, wide, tmp_path):
    """The picture shows its own labels as gray values, in blocks: what the label map says is what the picture shows."""
    labels = torch.zeros(64, 144, dtype=torch.long)
    for row in range(4):
        for column in range(9):
            labels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 9 * row + column + 1
    labels = labels if wide else labels.T.contiguous()
    to_pil((labels / 64.0).expand(3, -1, -1)).save(mkdir(tmp_path / "pictures") / "a.png")
    write_labels(tmp_path / "labels" / "a.png", labels)
    pictures = folder(tmp_path / "pictures", size=32, resize=policy)
    sample = Pseudo(pictures, tmp_path / "labels")[0]
    shown = (sample.image[0] * 64).round().long()
    assert sample.mask.shape == (32, 32)
    assert (sample.mask == shown).float().mean() > (0.6 if policy == "direct" else 0.8)
    assert {*sample.mask.unique().tolist()} <= {*labels.unique().tolist()}
    again = Pseudo(wrapped(pictures), tmp_path / "labels")[0]
    assert torch.equal(again.mask, sample.mask)
    write_labels(tmp_path / "labels" / "a.png", shown.clamp(max=36))
    assert torch.equal(Pseudo(pictures, tmp_path / "labels")[0].mask, shown.clamp(max=36))


def mkdir(path):
    path.mkdir()
    return path


def wrapped(pictures):
    """A data set in another one, as where classes are given other numbers."""
    return Relabeled(pictures, (), 0)


@pytest.mark.parametrize(("size", "told"), [((64, 144), "(64, 144)"), (None, "of unknown size")])
def test_label_maps_of_another_size_are_refused(size, told, tmp_path):
    write_labels(tmp_path / "a.png", torch.zeros(40, 90, dtype=torch.long))
    text = f"a.png is (40, 90) pixels, its image (32, 32), the original picture {told}; make labels of one of these"
    with pytest.raises(ValueError, match=re.escape(text)):
        Pseudo([Sample("a", torch.rand(3, 32, 32), size=size)], tmp_path)[0]


def test_pseudo_labels_are_read_once(tmp_path, monkeypatch):
    toy, reads = Toy(4), []
    for sample in toy.samples:
        write_labels(tmp_path / f"{sample.id}.png", sample.mask)
    read = _segmenter_training.read_labels
    monkeypatch.setattr(_segmenter_training, "read_labels", lambda file: [reads.append(file.name), read(file)][1])
    train_segmenter(tiny(), toy, quick(epochs=3, labels=str(tmp_path)), accelerator="cpu")
    assert sorted(reads) == [f"{n}.png" for n in range(4)]


def test_a_training_on_pseudo_labels_is_one_on_masks_that_are_equal(tmp_path):
    toy = Toy()
    for sample in toy.samples:
        write_labels(tmp_path / "labels" / f"{sample.id}.png", sample.mask)
    ours, theirs = tiny(), tiny()
    bare = [replace(sample, mask=None) for sample in toy.samples]
    config = quick(augment="flip")
    found = train_segmenter(ours, bare, replace(config, labels=str(tmp_path)), accelerator="cpu")
    assert found == train_segmenter(theirs, toy, config, accelerator="cpu")
    with pytest.raises(ValueError, match="needs a mask for every image"):
        train_segmenter(tiny(), bare, config, accelerator="cpu")


def test_a_joint_augmentation_has_a_type():
    assert isinstance(joint("flip"), Joint)


class Watcher:
    """A trainer that learns nothing and keeps the samples that it saw."""

    def __init__(self):
        self.settings, self.seen = {"kind": "watcher"}, []

    def setup(self, fabric): ...

    def epoch(self, number, steps): ...

    def step(self, batch, share):
        self.seen += batch.samples
        return {"loss": torch.tensor(0.0)}

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


def shift(sample, randomness, *, by):
    steps = int(torch.randint(by, (), generator=randomness))
    return Sample(sample.id, sample.image.roll(steps, 1), sample.label, mask=sample.mask.roll(steps, 0))


def recorded(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["settings"]["augment"]


def test_an_augmentation_of_whole_samples_depends_on_seed_epoch_and_index_alone(tmp_path):
    toy, runs = Toy(), []
    for batch in (4, 7):
        watcher = Watcher()
        fit(watcher, toy, epochs=2, batch=batch, augment=Joint(partial(shift, by=16)), accelerator="cpu")
        runs.append(watcher.seen)
    for one, other in zip(*runs, strict=True):
        assert one.id == other.id
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.mask, other.mask)
    moved = [one for one in runs[0] if not torch.equal(one.mask, toy[int(one.id[4:])].mask)]
    assert len(moved) > 12
    fit(Watcher(), toy, epochs=1, batch=8, augment=Joint(partial(shift, by=16)), out=tmp_path, accelerator="cpu")
    assert recorded(tmp_path) == "shift(by=16)"


def test_an_augmentation_of_images_alone_drops_the_mask_and_is_recorded_as_ever(tmp_path):
    watcher = Watcher()
    fit(watcher, Toy(), epochs=1, batch=8, augment=augmentation("flip+crop"), out=tmp_path, accelerator="cpu")
    assert recorded(tmp_path) == "augmented(names=['flip', 'crop'])"
    assert [one.mask for one in watcher.seen] == [None] * 12


def test_masks_are_remembered_where_asked_in_8_bits():
    image, reads = torch.rand(3, 4, 4), []
    full = torch.full((4, 4), 1)
    masks = [255 * full, torch.arange(16).view(4, 4), 256 * full, -full, None]

    class Masked:
        def __len__(self):
            return len(masks)

        def __getitem__(self, index):
            reads.append(index)
            return Sample(f"m{index}", image, index, mask=masks[index], boxes=torch.rand(1, 4))

    kept, without = remember(Masked(), masks=True), remember(Masked())
    for _ in range(2):
        for n in range(4):
            assert torch.equal(kept[n].mask, masks[n])
            assert kept[n].mask.dtype == torch.long
            assert kept[n].boxes is None
            assert without[n].mask is None
        assert kept[4].mask is None
    assert sorted(reads) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    packed = [kept.kept[n][4] for n in range(5)]
    assert [None if one is None else one.dtype for one in packed] == [torch.uint8] * 2 + [torch.long] * 2 + [None]
    assert kept.left == 2**32 - 5 * image.nbytes - 2 * 16 - 2 * 16 * 8
    small = remember(Masked(), most=image.nbytes + 15, masks=True)
    assert torch.equal(small[0].mask, masks[0])
    assert small.kept == {}
