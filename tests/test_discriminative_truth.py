"""Discriminative truth: every pixel counted by hand."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from sightline.classifier import wrap
from sightline.datasets import creatures
from sightline.evaluation import Maps
from sightline.methods._cam import cam
from sightline.protocols._discriminative_truth import discriminative_truth
from sightline.protocols._segmentation import segmentation
from sightline.running import Relabeled

NAMES = ("precision", "recall", "iou", "base")
SIDES = {"legs": ("left leg", "right leg"), "wings": ("left wing", "right wing")}


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Doubles:
    """Creatures in float64, as the small networks want them; `change` is done to each."""

    dataset: object
    change: object = None

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        one = self.dataset[index]
        one = replace(one, image=one.image.double())
        return one if self.change is None else self.change(one)


def random_maps(classifier, x, y=None):
    """Maps that are told apart by image and class."""
    seeds = [int(1e6 * float(image.sum())) % 9973 + 31 * label for image, label in zip(x, y.tolist(), strict=True)]
    return torch.stack([noise(1, 16, 16, seed=seed) - 0.6 for seed in seeds])


def named_parts(source, label):
    return [side for part in source.cues(label) for side in SIDES.get(part, (part,))]


def true_parts(source, one, label):
    """The pixels of a class's own parts, one by one."""
    out, parts = torch.zeros(one.mask.shape, dtype=torch.bool), named_parts(source, label)
    shown, mask = [one.parts[name].tolist() for name in parts], one.mask.tolist()
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[r, c] = any(part[r][c] for part in shown) and mask[r][c] == label + 1
    return out


def perfect(source, samples, elsewhere=0.0):
    """A method whose map is one on the true part and `elsewhere` on the rest."""
    known = {float(samples[n].image.sum()): samples[n] for n in range(len(samples))}

    def method(classifier, x, y=None):
        pairs = zip(x, y.tolist(), strict=True)
        shown = [true_parts(source, known[float(image.sum())], label) for image, label in pairs]
        return torch.stack([torch.where(one, 1.0, elsewhere)[None].double() for one in shown])

    return method


def by_hand(source, samples, method, tau):
    counts = {}
    for n in range(len(samples)):
        one = samples[n]
        for label in sorted({int(v) - 1 for v in one.mask.flatten().tolist()} - {-1, 254}):
            raw = method(None, one.image[None], torch.tensor([label]))
            up = torch.nn.functional.interpolate(raw, one.mask.shape, mode="bilinear")[0, 0]
            top, true = float(up.max()), true_parts(source, one, label)
            row = counts.setdefault(label, [0, 0, 0, 0])
            for r in range(up.shape[0]):
                for c in range(up.shape[1]):
                    if int(one.mask[r, c]) == label + 1:
                        found = top > 0 and float(up[r, c]) / top >= tau
                        for i, what in enumerate((found and bool(true[r, c]), found, bool(true[r, c]), True)):
                            row[i] += what
    return counts


def shares(both, found, true, whole):
    return [ratio(both, found), ratio(both, true), ratio(both, found + true - both), ratio(true, whole)]


def ratio(part, whole):
    return 100 * part / whole if whole else math.nan


def numbers(counts):
    pooled = shares(*(sum(row[i] for row in counts.values()) for i in range(4)))
    each = [shares(*row) for row in counts.values()]
    kept = [[row[i] for row in each if not math.isnan(row[i])] for i in range(4)]
    macro = [sum(values) / len(values) if values else math.nan for values in kept]
    return dict(zip([*NAMES, *(f"{name}_macro" for name in NAMES)], [*pooled, *macro], strict=True))


def same(found, expected):
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (found, expected))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9, equal_nan=True)


@pytest.fixture
def twenty(seeded, networks):
    return wrap(seeded(networks.pooled, classes=20, seed=3), layer="last", normalization="none", size=(64, 64))


@pytest.mark.parametrize(("variant", "tau"), [("scenes", 0.25), ("mark", 0.6), ("two_copies", 0.05)])
def test_regions_are_counted_pixel_by_pixel(twenty, variant, tau):
    source = creatures("test", count=3, variant=variant, seed=4)
    samples = Doubles(source)
    found = discriminative_truth(random_maps, twenty, samples, tau_cam=tau, batch=2)
    expected = numbers(by_hand(source, samples, random_maps, tau))
    assert list(found) == list(expected)
    same([one.value for one in found.values()], list(expected.values()))
    assert 0 < found["base"].value < 100
    assert {name: one.higher_is_better for name, one in found.items()} == {
        **dict.fromkeys(("precision", "recall", "iou", "precision_macro", "recall_macro", "iou_macro"), True),
        **dict.fromkeys(("base", "base_macro")),
    }
    assert {one.count for one in found.values()} == {3}
    assert [one.metric.name for one in found.values()] == list(found)


def test_the_true_part_is_all_right_and_the_whole_object_is_the_base(twenty):
    source = creatures("test", count=3, variant="scenes", only=range(1, 8))
    samples = Doubles(source)
    found = discriminative_truth(perfect(source, samples), twenty, samples)
    assert [found[name].value for name in ("precision", "recall", "iou")] == [100.0] * 3
    assert 0 < found["base"].value < 40
    whole = discriminative_truth(perfect(source, samples, elsewhere=0.5), twenty, samples)
    assert whole["recall"].value == 100
    for end in ("", "_macro"):
        same([whole[f"precision{end}"].value, whole[f"iou{end}"].value], [found[f"base{end}"].value] * 2)


def test_a_class_that_differs_in_every_part_is_all_true(twenty):
    """A change in any part of a common creature makes another one."""
    found = discriminative_truth(random_maps, twenty, Doubles(creatures("test", count=2, only=(0, 10))))
    assert found["base"].value == found["precision"].value == 100
    assert found["recall"].value < 100


def test_a_default_threshold_is_a_quarter_and_scale_does_not_matter(twenty):
    samples = Doubles(creatures("test", count=3))
    plain = discriminative_truth(random_maps, twenty, samples)
    for settings, method in (
        ({"tau_cam": 0.25}, random_maps),
        ({}, lambda classifier, x, y=None: 16 * random_maps(classifier, x, y)),
        ({"batch": 1}, Maps(random_maps)),
    ):
        found = discriminative_truth(method, twenty, samples, **settings)
        assert {name: one.value for name, one in found.items()} == {name: one.value for name, one in plain.items()}


def test_it_is_about_the_regions_of_the_segmentation_protocol(twenty):
    """Pixels where a CAM and the truth agree, from the four regions of a method that is itself the truth."""
    source = creatures("test", count=3, variant="scenes", only=range(1, 8))
    samples = Doubles(source)
    found = discriminative_truth(cam, twenty, samples)
    four = segmentation(perfect(source, samples), twenty, samples, by=cam, tau_sm=0.5, threshold=0.5)
    both, found_only, true_only, neither = (four[name].value for name in ("hsr_dr", "lsr_dr", "hsr_ndr", "lsr_ndr"))
    same(sum((both, found_only, true_only, neither)), 100.0)
    expected = shares(both, both + found_only, both + true_only, 100)
    same([found[name].value for name in NAMES], expected)
    swapped = segmentation(cam, twenty, samples, regions="cue", tau_sm=0.25, threshold=0.5)
    same(swapped["hsr_dr"].value, both)
    same(swapped["lsr_dr"].value, true_only)
    same(swapped["hsr_ndr"].value, found_only)


def test_other_numbers_of_the_classes_and_ignored_pixels(twenty):
    source = creatures("test", count=3, variant="scenes", seed=1)
    numbers_of = tuple((3 * n + 4) % 20 for n in range(20))

    def renumbered(classifier, x, y=None):
        return random_maps(classifier, x, torch.tensor([numbers_of.index(label) for label in y.tolist()]))

    plain = discriminative_truth(random_maps, twenty, Doubles(source))
    moved = discriminative_truth(renumbered, twenty, Doubles(Relabeled(source, numbers_of, 20)))
    same([one.value for one in moved.values()], [one.value for one in plain.values()])

    def half(one):
        mask = one.mask.clone()
        mask[:, ::2] = 255
        return replace(one, mask=mask)

    halved = Doubles(source, half)
    found = discriminative_truth(random_maps, twenty, halved)
    same([one.value for one in found.values()], list(numbers(by_hand(source, halved, random_maps, 0.25)).values()))


def test_nothing_is_nan_and_no_map_finds_nothing(twenty):
    source = creatures("test", count=2)
    for value in (0.0, math.nan):
        found = discriminative_truth(
            lambda classifier, x, y=None, value=value: torch.full((len(x), 1, 4, 4), value, dtype=torch.float64),
            twenty,
            Doubles(source),
        )
        assert math.isnan(found["precision"].value)
        assert (found["recall"].value, found["iou"].value) == (0, 0)
    for value, count in ((0, 2), (255, 0)):
        empty = Doubles(source, lambda one, value=value: replace(one, mask=torch.full_like(one.mask, value)))
        found = discriminative_truth(random_maps, twenty, empty)
        assert all(math.isnan(one.value) for one in found.values())
        assert found["iou"].count == count


def test_what_is_wrong_is_said(twenty, curved, plain):
    source = creatures("test", count=1)
    with pytest.raises(ValueError, match="only creatures know which pixels truly tell a class from others, and list"):
        discriminative_truth(random_maps, twenty, [Doubles(source)[0]])
    with pytest.raises(ValueError, match="segmentation needs a mask, and 'creatures-plain-test-00000-s0' has none"):
        discriminative_truth(random_maps, twenty, Doubles(source, lambda one: replace(one, mask=None)))
    with pytest.raises(ValueError, match="needs a mask and parts, and 'creatures-plain-test-00000-s0' lacks one"):
        discriminative_truth(random_maps, twenty, Doubles(source, lambda one: replace(one, parts={})))
    with pytest.raises(ValueError, match=r"shows class 7, and the network has classes 0\.\.4"):
        discriminative_truth(random_maps, curved, Doubles(creatures("test", count=1, only=(7,))))
    with pytest.raises(ValueError, match="no image was measured"):
        discriminative_truth(random_maps, twenty, Doubles(creatures("test", count=0)))
