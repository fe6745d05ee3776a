"""The box study: the masking metrics on the map inside and outside an object's boxes, pixel by pixel."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.data import Sample, collate
from sightline.evaluation import measure
from sightline.metrics import Case, average_drop, average_gain, average_increase
from sightline.metrics._average import covered
from sightline.runs import arguments

H, W = 12, 16
METRICS = (average_drop, average_increase, average_gain)
REGIONS = ("map", "map_in_box", "map_outside_box", "box", "outside_box")
BOXES = torch.tensor([[2.0, 1.0, 7.5, 6.0], [6.0, 4.4, 30.0, 9.0], [-5.0, -5.0, 1.0, 1.0]])


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(name, image, label=0, **known):
    return Sample(name, image, label, **known)


def case(classifier, samples, saliency, y=None):
    x = torch.stack([one.image for one in samples])
    y = torch.zeros(len(x), dtype=torch.long) if y is None else y
    with torch.no_grad():
        return Case(classifier, x, y, saliency, saliency, classifier, collate(samples), classifier(x))


def in_boxes(i, j, boxes):
    return any(x0 <= j + 0.5 < x1 and y0 <= i + 0.5 < y1 for x0, y0, x1, y1 in boxes.tolist())


def slow(metric, classifier, image, saliency, label, region, inside, outside, alpha=1.0):
    """The definition, pixel by pixel; `inside` and `outside` tell of a pixel (row, column)."""
    seen = image.clone()
    for i in range(H):
        for j in range(W):
            s = float(saliency[0, i, j]) ** alpha
            m = {
                "map": s,
                "map_in_box": s * inside(i, j),
                "map_outside_box": s * outside(i, j),
                "box": float(inside(i, j)),
                "outside_box": float(outside(i, j)),
            }[region]
            seen[:, i, j] = image[:, i, j] * m
    with torch.no_grad():
        p, o = (float(classifier(one[None]).softmax(1)[0, label]) for one in (image, seen))
    if metric is average_drop:
        return 100 * max(p - o, 0) / p
    return 100.0 * (o > p) if metric is average_increase else 100 * max(o - p, 0) / (1 - p)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("region", REGIONS)
def test_slow_loop_over_the_pixels_of_each_region(curved, metric, region):
    image, saliency = noise(1, 3, H, W), noise(1, 1, H, W, seed=1)
    mask = torch.zeros(H, W, dtype=torch.long)
    mask[2:8, 3:9], mask[0, :4], mask[9:] = 3, 1, 255
    one = case(curved, [sample("a", image[0], 2, boxes=BOXES, mask=mask)], saliency, torch.tensor([2]))
    by_boxes = lambda i, j: in_boxes(i, j, BOXES)  # noqa: E731
    by_mask = lambda i, j: int(mask[i, j]) == 3  # noqa: E731
    sides = {
        "boxes": (by_boxes, lambda i, j: not by_boxes(i, j)),
        "mask": (by_mask, lambda i, j: not by_mask(i, j) and int(mask[i, j]) != 255),
    }
    for on, (inside, outside) in sides.items():
        for alpha in (1.0, 2.5):
            expected = slow(metric, curved, image[0], saliency[0], 2, region, inside, outside, alpha)
            found = metric(region=region, on=on, exponent=alpha)(one)
            assert found.item() == pytest.approx(expected, abs=1e-9)
            assert found.dtype == torch.float64


def test_the_whole_image_as_a_box_is_the_identity_map(curved):
    x, saliency = noise(2, 3, H, W), noise(2, 1, H, W, seed=1)
    whole = torch.tensor([[0.0, 0.0, W, H]])
    one = case(curved, [sample(f"i{i}", image, boxes=whole) for i, image in enumerate(x)], saliency)
    for metric in METRICS:
        assert metric(region="box")(one).tolist() == [[0.0], [0.0]]
        assert metric()(replace(one, saliency=torch.ones_like(saliency), memory={})).tolist() == [[0.0], [0.0]]
        assert torch.equal(metric(region="map_in_box")(one), metric()(one))


def test_fake_cams_parts_are_the_box_and_its_complement(curved):
    """Table 5: Fake-CAM's B and S has the numbers of the box itself."""
    x = noise(2, 3, H, W)
    one = case(curved, [sample(f"i{i}", image, boxes=BOXES[:2]) for i, image in enumerate(x)], torch.ones(2, 1, H, W))
    for metric in METRICS:
        for part, alone in (("map_in_box", "box"), ("map_outside_box", "outside_box")):
            assert metric(region=part)(one).tolist() == metric(region=alone)(one).tolist()


def test_the_boxes_are_those_of_the_scored_class(curved):
    image, saliency = noise(1, 3, H, W), noise(1, 1, H, W, seed=1)
    both = sample("a", image[0], boxes=BOXES[:2], box_labels=torch.tensor([2, 4]))
    for label, box in ((2, BOXES[:1]), (4, BOXES[1:2])):
        alone = case(curved, [sample("a", image[0], label, boxes=box)], saliency, torch.tensor([label]))
        found = average_drop(region="box")(case(curved, [both], saliency, torch.tensor([label])))
        assert torch.equal(found, average_drop(region="box")(alone))
    absent = average_drop(region="box")(case(curved, [both], saliency, torch.tensor([3])))
    assert absent.isnan().all()


EMPTY = {
    "no box": torch.zeros(0, 4),
    "no area": torch.tensor([[3.0, 3.0, 3.0, 9.0]]),
    "outside": torch.tensor([[W + 1.0, 0.0, W + 9.0, H]]),
    "between two centers": torch.tensor([[3.6, 0.0, 4.4, 9.0]]),
}


@pytest.mark.parametrize("boxes", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("region", REGIONS[1:])
def test_an_image_without_a_pixel_in_its_boxes_does_not_count(curved, boxes, region):
    x, saliency = noise(2, 3, H, W), noise(2, 1, H, W, seed=1)
    samples = [sample("empty", x[0], boxes=boxes), sample("full", x[1], boxes=BOXES)]
    for metric in METRICS:
        found = metric(region=region)(case(curved, samples, saliency))
        assert found[0].isnan().all()
        torch.testing.assert_close(found[1:], metric(region=region)(case(curved, samples[1:], saliency[1:])))
    assert not metric()(case(curved, samples, saliency)).isnan().any(), "the map itself asks for no box"
    score = measure(lambda c, x, y=None: saliency, curved, [collate(samples)], {"a": average_drop(region=region)})
    assert score.scores[0].count == 1


def test_an_image_whose_mask_lacks_the_class_does_not_count(curved):
    image, saliency = noise(1, 3, H, W)[0], noise(1, 1, H, W, seed=1)
    for value in (0, 255, 5):
        one = case(curved, [sample("a", image, mask=torch.full((H, W), value))], saliency)
        for metric in METRICS:
            assert metric(region="box", on="mask")(one).isnan().all()


def test_where_only_a_mask_is_known_its_box_is_the_box(curved):
    image, saliency = noise(1, 3, H, W)[0], noise(1, 1, H, W, seed=1)
    mask = torch.zeros(H, W, dtype=torch.long)
    mask[2, 3], mask[5, 8] = 1, 1
    found = average_drop(region="box")(case(curved, [sample("a", image, mask=mask)], saliency))
    box = torch.tensor([[3.0, 2.0, 9.0, 6.0]])
    assert torch.equal(found, average_drop(region="box")(case(curved, [sample("a", image, boxes=box)], saliency)))
    assert not torch.equal(
        found, average_drop(region="box", on="mask")(case(curved, [sample("a", image, mask=mask)], saliency))
    )


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(*[st.floats(-4, 20, width=32)] * 4), max_size=4))
def test_a_pixel_is_covered_if_its_center_lies_in_a_half_open_box(found):
    boxes = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
    expected = [[in_boxes(i, j, boxes) for j in range(W)] for i in range(H)]
    assert covered(boxes, (H, W)).tolist() == expected


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 99), region=st.sampled_from(REGIONS), metric=st.sampled_from(METRICS))
def test_percent_and_not_a_matter_of_the_batch(classifiers, seed, region, metric):
    x, saliency = noise(3, 3, H, W, seed=seed), noise(3, 1, H, W, seed=seed + 1)
    samples = [sample(f"i{i}", image, boxes=BOXES[i : i + 2]) for i, image in enumerate(x)]
    together = metric(region=region)(case(classifiers["curved"], samples, saliency))
    assert ((together >= 0) & (together <= 100)).all()
    for i in range(3):
        alone = metric(region=region)(case(classifiers["curved"], samples[i : i + 1], saliency[i : i + 1]))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)


def test_the_three_metrics_share_each_masked_image(curved):
    one = case(curved, [sample("a", noise(1, 3, H, W)[0], boxes=BOXES)], noise(1, 1, H, W, seed=1))
    for metric in METRICS:
        for region in REGIONS:
            metric(region=region)(one)
    assert len(one.memory) == len(REGIONS)


def test_settings_are_recorded():
    expected = {"erase": "black", "exponent": 1.0, "region": "map", "on": "boxes", "scored": "label"}
    for metric in METRICS:
        assert arguments(metric) == expected


def test_what_is_wrong_is_said(curved, plain):
    for metric in METRICS:
        with pytest.raises(LookupError, match="no region called 'boxes'; did you mean box"):
            metric(region="boxes")
        with pytest.raises(LookupError, match="no annotation called 'masks'; did you mean mask"):
            metric(on="masks")
        bare = case(curved, [sample("a", noise(1, 3, H, W)[0])], noise(1, 1, H, W))
        with pytest.raises(ValueError, match="a region of on='boxes' needs boxes, and 'a' has none; use region='map'"):
            metric(region="box")(bare)
        with pytest.raises(ValueError, match="a region of on='mask' needs a mask, and 'a' has none; use on='boxes'"):
            metric(region="box", on="mask")(bare)
