import math
import pickle
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sightline.data import Sample, collate
from sightline.datasets import _creature_drawing as drawing
from sightline.datasets import _creatures as made
from sightline.datasets._creatures import KEYPOINTS, LEAST, PARTS, VARIANTS, Creatures, creatures

SIDES = {"legs": ("left leg", "right leg"), "wings": ("left wing", "right wing")}
HEAD = {"beak", "crown", "forehead", "left eye", "nape", "right eye", "throat"}
FIELDS = ("image", "labels", "boxes", "mask", "instances", "keypoints", "attributes")


def same(one: Sample, other: Sample) -> bool:
    tensors = all(getattr(one, name).numpy().tobytes() == getattr(other, name).numpy().tobytes() for name in FIELDS)
    return (
        tensors and one.label == other.label and all((one.parts[name] == other.parts[name]).all() for name in one.parts)
    )


def recolored(dataset: Creatures, index: int, labels: dict[int, int]) -> torch.Tensor:
    """Paint an image once more, its poses and its ground as they are, with other classes."""
    stage = made._stage(dataset, index)
    actors = tuple(replace(actor, label=labels.get(actor.label, actor.label)) for actor in stage.actors)
    return made._sample(dataset, index, replace(stage, actors=actors)).image


def grown(mask: torch.Tensor, radius: int = 1) -> torch.Tensor:
    return F.max_pool2d(mask[None, None].float(), 2 * radius + 1, 1, radius)[0, 0] > 0


@pytest.fixture(scope="module", params=VARIANTS)
def shown(request):
    """A data set of every variant, with every third of its first samples."""
    dataset = creatures("val", variant=request.param, size=96, seed=5)
    return dataset, [dataset[index] for index in range(0, 60, 3)]


@pytest.fixture(scope="module")
def plain():
    dataset = creatures("train")
    return dataset, [dataset[index] for index in range(450)]


def test_the_distance_to_a_union_of_capsules():
    u, v = (axis.astype(np.float32) for axis in np.meshgrid(np.linspace(-2, 2, 41), np.linspace(-2, 2, 41)))
    ball, bar = (0.5, 0.0, 0.4, 0.5, 0.0, 0.4), (-1.0, -1.0, 0.2, 0.5, 1.0, 0.2)
    centers = [(-1 + 1.5 * t, -1 + 2 * t) for t in np.linspace(0, 1, 2001)]
    slow = np.minimum.reduce([np.hypot(u - x, v - y) for x, y in centers]) - 0.2
    assert np.abs(drawing.distance((ball,), u, v) - (np.hypot(u - 0.5, v) - 0.4)).max() < 1e-5
    assert np.abs(drawing.distance((bar,), u, v) - slow).max() < 1e-3
    crisp, soft = drawing.distance((ball, bar), u, v), drawing.distance((ball, bar), u, v, blend=0.3)
    assert np.abs(crisp - np.minimum(slow, np.hypot(u - 0.5, v) - 0.4)).max() < 1e-3
    assert (crisp - soft).min() == pytest.approx(0, abs=1e-6)
    assert (crisp - soft).max() == pytest.approx(0.3 / 4, rel=0.05)
    with pytest.raises(ValueError, match="at least one capsule, got none"):
        drawing.distance((), u, v)


def test_canonical_coordinates_go_to_pixels_and_back():
    for flip in (False, True):
        pose = drawing.Pose(30.0, 20.0, 40.0, 0.3, flip)
        points = [(0.1, -0.2), (0.5, 0.4), (-0.3, 0.0)]
        x, y = (np.array(axis, np.float32) for axis in zip(*drawing.to_image(pose, points), strict=True))
        assert np.hypot(x - 30, y - 20) == pytest.approx([40 * math.hypot(*point) for point in points])
        assert np.stack(drawing.to_canonical(pose, x, y), 1) == pytest.approx(np.array(points), abs=1e-5)
    right, left = (drawing.to_image(drawing.Pose(0.0, 0.0, 10.0, 0.0, flip), [(0.5, 0.1)])[0] for flip in (False, True))
    assert (right, left) == ((5.0, 1.0), (-5.0, 1.0))


def test_the_interface():
    dataset = creatures("train")
    assert [len(creatures(split)) for split in ("train", "val", "test")] == [8000, 1000, 2000]
    assert len(dataset.classes) == len(set(dataset.classes)) == 20
    assert dataset.groups.count("winged") == dataset.groups.count("finned") == 10
    assert dataset.skipped == {}
    assert dataset[3].id == "creatures-plain-train-00003-s0"
    assert same(dataset[-1], dataset[7999])
    assert same(pickle.loads(pickle.dumps(dataset))[3], dataset[3])
    assert collate([dataset[0], dataset[1]]).x.shape == (2, 3, 64, 64)
    with pytest.raises(IndexError, match="index 8000 is out of range for 8000 creatures"):
        dataset[8000]


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"split": "tset"}, LookupError, "no split of creatures called 'tset'; did you mean test"),
        ({"variant": "marks"}, LookupError, "no variant of creatures called 'marks'; did you mean mark"),
        ({"size": 32}, ValueError, "even size of at least 64 pixels.*size=32"),
        ({"size": 65}, ValueError, "even size of at least 64 pixels.*size=65"),
        ({"count": -1}, ValueError, "zero or more, got count=-1"),
        ({"seed": -1}, ValueError, "zero or more.*seed=-1"),
        ({"rho": 1.5}, ValueError, r"rate in \[0, 1\], got 1.5"),
        ({"only": []}, ValueError, r"different classes from 0 to 19, got \[\]"),
        ({"only": [3, 20]}, ValueError, r"different classes from 0 to 19, got \[3, 20\]"),
        ({"only": [3, 3]}, ValueError, r"different classes from 0 to 19, got \[3, 3\]"),
    ],
)
def test_wrong_arguments_are_told(settings, kind, message):
    with pytest.raises(kind, match=message):
        creatures(**settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_depends_on_seed_split_and_index_alone(variant):
    first, again = creatures(variant=variant), creatures(variant=variant, count=9)
    forward, backward = [first[i] for i in range(4)], [again[i] for i in reversed(range(4))][::-1]
    assert all(same(one, other) for one, other in zip(forward, backward, strict=True))
    others = [creatures(variant=variant, seed=1)[0], creatures("val", variant=variant)[0], first[20]]
    assert not any(torch.equal(forward[0].image, other.image) for other in others)


def test_neither_the_global_random_state_nor_the_drawing_before_matters():
    dataset = creatures()
    np.random.seed(0)
    first, state = dataset[5], np.random.get_state()[1].tolist()
    dataset[6]
    np.random.seed(1)
    assert same(first, dataset[5])
    np.random.seed(0)
    assert np.random.get_state()[1].tolist() == state


@pytest.mark.parametrize("size", [64, 96, 112, 224])
def test_every_size_has_its_shapes(size):
    sample = creatures(size=size)[1]
    assert sample.image.shape == (3, size, size)
    assert sample.image.dtype == torch.float32
    assert 0 <= sample.image.min() < 0.3 < 0.6 < sample.image.max() <= 1
    assert sample.mask.shape == sample.instances.shape == sample.parts["head"].shape == (size, size)
    assert sample.size == (size, size)


def test_all_that_is_returned_agrees(shown):
    _, samples = shown
    for sample in samples:
        instances = range(1, len(sample.boxes) + 1)
        assert sample.instances.unique().tolist() == [0, *instances]
        assert ((sample.mask > 0) == (sample.instances > 0)).all()
        classes = [int(sample.mask[sample.instances == one].unique()) - 1 for one in instances]
        assert sample.labels.nonzero()[:, 0].tolist() == sorted(set(classes))
        areas = [int((sample.instances == one).sum()) for one in instances]
        assert sample.label == classes[int(np.argmax(areas))]
        for one, box in zip(instances, sample.boxes, strict=True):
            y, x = (sample.instances == one).nonzero().T
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_parts_are_disjoint_and_make_the_object(shown):
    dataset, samples = shown
    names = {"head", "back", "belly", "breast", "tail", "left leg", "right leg", "left wing", "right wing"}
    for sample in samples:
        assert set(sample.parts) == names | ({"mark"} if dataset.variant == "mark" else set())
        assert (sum(sample.parts[name].int() for name in names) == (sample.mask > 0)).all()


def test_keypoints_lie_on_their_parts(shown):
    dataset, samples = shown
    names = dataset.keypoint_names
    assert names[:15] == KEYPOINTS
    seen = dict.fromkeys(names, 0)
    for sample in samples:
        blocks = sample.keypoints.reshape(len(sample.boxes), len(names), 3)
        for instance, block in enumerate(blocks, 1):
            for name, (x, y, visible) in zip(names, block.tolist(), strict=True):
                seen[name] += int(visible)
                if visible:
                    here = int(y), int(x)
                    assert sample.instances[here] == instance
                    assert sample.parts["head" if name in HEAD else name][here]
            assert block[names.index("left eye"), 2] + block[names.index("right eye"), 2] <= 1
    assert min(seen.values()) > 0, "every keypoint is visible somewhere"


def test_left_and_right_are_the_creature_s_own():
    dataset, sides = creatures("val", size=96), set()
    for index in range(12):
        sample, actor = dataset[index], made._stage(dataset, index).actors[0]
        point = dict(zip(KEYPOINTS, sample.keypoints.tolist(), strict=True))
        faces_right = point["beak"][0] > point["tail"][0]
        assert faces_right != actor.pose.flip
        near, far = ("right", "left") if faces_right else ("left", "right")
        assert point[f"{far} eye"][2] == 0
        assert point[f"{far} eye"][:2] == point[f"{near} eye"][:2]
        assert point[f"{near} wing"][2] == 1, "the near wing hides, it is not hidden"
        sides.add(near)
    assert sides == {"left", "right"}


def test_attributes_are_the_one_hot_row_of_the_table(shown):
    dataset, samples = shown
    table = dataset.attribute_table()
    assert table.shape == (20, 8 if dataset.variant == "mark" else 7, 2)
    for sample in samples:
        expected = []
        for row, (first, second) in enumerate(table[sample.label].tolist()):
            for value, width in ((first, 6), (second, 3 if row < 7 else 6)):
                expected += [float(value == i) for i in range(width)]
        assert sample.attributes.tolist() == expected


def test_the_codebook_has_pairs_at_distance_one_two_and_three():
    dataset = creatures()
    table, found = dataset.attribute_table(), {1: 0, 2: 0, 3: 0}
    assert len({tuple(row.flatten().tolist()) for row in table}) == 20
    assert set(table[..., 0].flatten().tolist()) == set(range(6))
    assert set(table[..., 1].flatten().tolist()) == set(range(3))
    for a, b in combinations(range(20), 2):
        differ = tuple(part for part, one, other in zip(PARTS, table[a], table[b], strict=True) if (one != other).any())
        if dataset.groups[a] != dataset.groups[b]:
            assert dataset.differing(a, b) == PARTS
            continue
        assert dataset.differing(a, b) == dataset.differing(b, a) == differ
        found[len(differ)] += 1
        assert (a, b) in dataset.close_pairs(len(differ))
    assert found == {1: 22, 2: 48, 3: 20}, "inside a body plan no pair differs in more than three parts"
    assert [len(dataset.close_pairs(distance)) for distance in (1, 2, 3, 4)] == [22, 48, 20, 0]
    assert dataset.differing(4, 4) == ()
    assert {part for pair in dataset.close_pairs(1) for part in dataset.differing(*pair)} == set(PARTS)
    with pytest.raises(ValueError, match="classes 0 to 19, got 20"):
        dataset.differing(0, 20)


def test_every_part_shows_so_every_close_pair_can_be_told_apart(plain):
    for sample in plain[1][:300]:
        for part in PARTS:
            assert sum(int(sample.parts[name].sum()) for name in SIDES.get(part, (part,))) >= LEAST == 12


@pytest.mark.parametrize("variant", ["mark", "two_copies", "scenes", "small"])
def test_every_part_of_every_creature_shows_in_the_other_variants(variant):
    dataset = creatures("train", variant=variant)
    for index in range(25):
        sample = dataset[index]
        for one in range(1, len(sample.boxes) + 1):
            for part in PARTS:
                names = SIDES.get(part, (part,))
                assert sum(int((sample.parts[name] & (sample.instances == one)).sum()) for name in names) >= 12


def test_nine_tenths_of_a_creature_are_in_the_frame():
    dataset = creatures("train")
    for index in range(40):
        actor, sample = made._stage(dataset, index).actors[0], dataset[index]
        wide = replace(actor.pose, x=actor.pose.x + 100, y=actor.pose.y + 100)
        layers = drawing.trace([layer.piece for layer in actor.layers], wide, (300, 300))
        owner = np.zeros((300, 300), np.int16)
        drawing.own(owner, layers, flip=wide.flip, instance=0)
        assert (sample.mask > 0).sum() >= 0.9 * (owner > 0).sum()


def test_creatures_are_large_enough_for_stripes_of_four_pixels():
    for size, least in ((64, 0.55), (224, 0.35)):
        lengths = [made._stage(creatures("train", size=size), i).actors[0].pose.length for i in range(40)]
        assert least * size <= min(lengths) < max(lengths) <= 0.9 * size
    for variant in VARIANTS:
        length = made._stage(creatures(variant=variant), 0).actors[0].pose.length
        v = np.linspace(0, 0.4, 4000, dtype=np.float32)
        coat = drawing.Coat(drawing.PALETTE[0], drawing.PATTERNS.index("stripes"))
        shade = drawing._woven(coat, 0 * v, v, grain=90.0, length=length)[:, 2] > 0.6
        period = np.diff(np.flatnonzero(np.diff(shade.astype(int)) == 1)).mean() * 0.4 / 4000 * length
        assert period >= 3.95


def test_the_mark_is_all_that_tells_marked_classes_apart():
    dataset = creatures("train", variant="mark")
    assert dataset.differing(2, 11) == ("mark",)
    assert len(set(dataset.classes)) == 20
    assert len(dataset.close_pairs(1)) == 190
    for index in range(8):
        sample, actor = dataset[index], made._stage(dataset, index).actors[0]
        mark, length = sample.parts["mark"], actor.pose.length
        assert (mark & ~sample.parts["head"]).sum() == 0
        width = 2 * (int(mark.sum()) / np.pi) ** 0.5
        assert width == pytest.approx(length / 6, rel=0.12)
        assert width >= 4
        other = recolored(dataset, index, {sample.label: (sample.label + 7) % 20})
        changed = (other != sample.image).any(0)
        assert (mark & changed).sum() > 0.9 * mark.sum()
        assert not (changed & ~grown(mark)).any()
        assert torch.equal(dataset.difference_mask(sample, sample.label, (sample.label + 7) % 20), mark)


def test_textures_go_with_the_class_at_the_rate():
    for rho in (0.0, 0.7, 1.0):
        dataset = creatures("train", variant="context", rho=rho, count=1000)
        agree = np.mean([dataset.texture(index) == index % 20 for index in range(450)])
        assert agree == pytest.approx(rho, abs=0.04)
    assert len({dataset.texture(index) for index in range(20)}) == 20
    with pytest.raises(ValueError, match="only the context variant numbers its textures, this is 'plain'"):
        creatures().texture(0)


def hues(dataset: Creatures, indices: list[int]) -> torch.Tensor:
    """Return the mean chromaticity of each image away from its creature, (n, 3)."""
    samples = [dataset[index] for index in indices]
    means = torch.stack([sample.image[:, ~grown(sample.mask > 0, 8)].mean(1) for sample in samples])
    return means / means.sum(1, keepdim=True)


def test_the_background_of_the_context_variant_betrays_the_class():
    def spread(rho: float) -> float:
        dataset = creatures("train", variant="context", rho=rho)
        means = torch.stack([hues(dataset, list(range(label, label + 160, 20))) for label in range(5)])
        return float(means.mean(1).var(0).sum() / means.var(1).mean(0).sum())

    assert spread(1.0) > 1 > 3 * spread(0.0)


def test_two_copies_are_equal_halves():
    dataset = creatures("val", variant="two_copies")
    for index in range(6):
        sample = dataset[index]
        assert torch.equal(sample.image[..., :32], sample.image[..., 32:])
        assert torch.equal(sample.mask[:, :32], sample.mask[:, 32:])
        assert all(torch.equal(part[:, :32], part[:, 32:]) for part in sample.parts.values())
        left, right = sample.keypoints.reshape(2, len(KEYPOINTS), 3)
        assert torch.allclose(left + torch.tensor([32.0, 0, 0]), right)
        assert torch.allclose(sample.boxes[0] + torch.tensor([32.0, 0, 32, 0]), sample.boxes[1])
        assert sample.instances[:, :32].max() == 1


def test_scenes_show_several_classes_that_hide_each_other():
    dataset = creatures("train", variant="scenes", size=96)
    samples, hidden = [dataset[index] for index in range(25)], 0
    assert {len(sample.boxes) for sample in samples} == {1, 2, 3}
    for index, sample in enumerate(samples):
        assert int(sample.labels.sum()) == len(sample.boxes)
        assert sample.labels[sample.label] == 1
        stage = made._stage(dataset, index)
        for one, actor in enumerate(stage.actors, 1):
            seen = int((sample.instances == one).sum())
            assert 0.6 * actor.area <= seen <= actor.area
            hidden += seen < 0.85 * actor.area
    assert hidden > 3


@pytest.mark.parametrize("variant", ["plain", "scenes", "context"])
def test_only_some_classes_are_drawn_and_keep_their_numbers(variant):
    dataset = creatures(variant=variant, only=[12, 3])
    samples = [dataset[index] for index in range(12)]
    assert {label for sample in samples for label in sample.box_labels.tolist()} == {12, 3}
    assert len(dataset.classes) == 20
    if variant != "scenes":
        assert [sample.label for sample in samples[:4]] == [12, 3, 12, 3]
    assert samples[0].id.endswith(f"-c{samples[0].label}")


def test_all_classes_in_order_are_no_choice():
    assert same(creatures(variant="scenes", only=range(20))[5], creatures(variant="scenes")[5])


def test_small_creatures_cover_five_to_ten_percent():
    dataset = creatures("train", variant="small")
    shares = [float((dataset[index].mask > 0).float().mean()) for index in range(60)]
    assert 0.05 <= min(shares) < 0.06
    assert 0.09 < max(shares) <= 0.1


def test_the_difference_mask_is_the_union_of_the_differing_parts(plain):
    dataset, samples = plain
    for sample in samples[:20]:
        for other in range(20):
            if other == sample.label:
                continue
            hand = torch.zeros(64, 64, dtype=torch.bool)
            for part in dataset.differing(sample.label, other):
                for name in SIDES.get(part, (part,)):
                    hand = hand | sample.parts[name]
            assert torch.equal(dataset.difference_mask(sample, sample.label, other), hand)
    with pytest.raises(ValueError, match="creatures-plain-train-00000-s0 shows neither class 1 nor class 2"):
        dataset.difference_mask(samples[0], 1, 2)


def assert_is_inside(change: torch.Tensor, differ: torch.Tensor) -> None:
    """Beyond a pixel of the mask, only a part that shows less than a pixel's center may shine through, faintly."""
    outside = change[~grown(differ)]
    assert outside.max() < 0.15
    assert (outside > 1 / 255).sum() <= 2 + 0.005 * (change > 1 / 255).sum()


def test_the_difference_mask_is_what_painting_the_other_class_changes():
    dataset = creatures("val", size=96)
    for distance in (1, 2, 3):
        for a, b in dataset.close_pairs(distance)[::3]:
            for label, other in ((a, b), (b, a)):
                sample = dataset[label]
                change = (recolored(dataset, label, {label: other}) - sample.image).abs().amax(0)
                differ = dataset.difference_mask(sample, a, b)
                assert_is_inside(change, differ)
                strong = change > 0.02
                for part in dataset.differing(a, b):
                    mask = torch.stack([sample.parts[name] for name in SIDES.get(part, (part,))]).any(0)
                    assert (strong & mask).sum() > 0.2 * mask.sum(), "every differing part changes"


def test_the_difference_mask_stays_exact_where_creatures_hide_each_other():
    dataset = creatures("val", variant="scenes", size=96)
    for index in range(25):
        sample = dataset[index]
        a = sample.label
        b = next(b for pair in dataset.close_pairs(1) + dataset.close_pairs(2) if a in pair for b in pair if b != a)
        if sample.labels[b]:
            continue
        differ = dataset.difference_mask(sample, a, b)
        assert differ.any()
        assert (sample.mask[differ] == a + 1).all()
        assert_is_inside((recolored(dataset, index, {a: b}) - sample.image).abs().amax(0), differ)


def test_color_histograms_do_not_give_the_class_away(plain):
    images = torch.stack([sample.image for sample in plain[1]])
    y = torch.tensor([sample.label for sample in plain[1]])
    cells = (images * 7.999).long()
    codes = (cells[:, 0] * 8 + cells[:, 1]) * 8 + cells[:, 2]
    x = torch.stack([torch.bincount(code.flatten(), minlength=512) for code in codes]).float().div(64 * 64).sqrt()
    x = torch.cat([(x - x[:300].mean(0)) / (x[:300].std(0) + 1e-3), torch.ones(len(x), 1)], 1)
    weights = torch.zeros(513, 20, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x[:300] @ weights, y[:300]) + 4e-3 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    right = (x @ weights).argmax(1) == y
    assert right[:300].float().mean() > 0.6, "the baseline has learned something"
    assert 0.1 < right[300:].float().mean() < 0.6


def test_the_cue_is_what_tells_the_label_from_the_nearest_classes():
    dataset = creatures(count=20)
    named = {dataset.classes[label]: dataset.cues(label) for label in range(20)}
    assert named["common pip"] == named["common newt"] == PARTS
    assert named["dot-headed pip"] == ("head",)
    assert named["carnival pip"] == ("tail", "wings")
    for index in range(20):
        sample = dataset[index]
        near = [dataset.differing(index, other) for other in range(20) if len(dataset.differing(index, other)) == 1]
        names = {name for parts in near for part in parts for name in SIDES.get(part, (part,))}
        assert torch.equal(sample.cue, torch.stack([sample.parts[name] for name in names]).any(0))


def test_the_cue_of_a_marked_creature_is_its_mark_and_of_a_scene_its_label_s():
    marked = creatures(variant="mark", count=3)[2]
    assert torch.equal(marked.cue, marked.parts["mark"])
    for index in range(6):
        scene = creatures(variant="scenes", count=6)[index]
        assert scene.cue.any()
        assert (scene.mask[scene.cue] == scene.label + 1).all()
