"""Maps over ever larger supersets, against the maps of each level measured one by one, and by hand."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from sightline.classifier import wrap
from sightline.data import Sample, batches
from sightline.evaluation import Maps, measure
from sightline.methods import cam, grad_cam, over, rise
from sightline.metrics import Measure, max_box_accuracy, max_box_accuracy_v2, pxap
from sightline.protocols._superset_depth import superset_depth
from sightline.supersets import Hierarchy, hierarchy_of, levels

NAMES = ("common pip", "common newt", "carnival pip", "orchid newt", "midnight pip")
DEEP = {"0": "a", "2": "a", "a": "pip", "4": "pip", "pip": "any", "1": "newt", "3": "newt", "newt": "any"}
SIZE = (24, 32)
FEW = partial(max_box_accuracy_v2, thresholds=40)


@pytest.fixture
def classifier(pooled):
    return replace(pooled, classes=NAMES)


def sample(number, label, *, mask=True):
    """An image of noise with one box of its label, and the mask of that box."""
    generator = torch.Generator().manual_seed(number)
    x0, y0, w, h = (int(torch.randint(*r, (), generator=generator)) for r in ((0, 16), (0, 12), (6, 16), (5, 12)))
    plane = torch.zeros(SIZE, dtype=torch.long)
    plane[y0 : y0 + h, x0 : x0 + w] = label + 1
    plane[0] = 255
    boxes = torch.tensor([[x0, y0, x0 + w, y0 + h]]).float()
    image = torch.rand(3, *SIZE, generator=generator, dtype=torch.float64)
    return Sample(f"image-{number}", image, label=label, boxes=boxes, mask=plane if mask else None)


@pytest.fixture(scope="module")
def samples():
    return [sample(i, label) for i, label in enumerate((3, 0, 1, 4, 2, 0, 3, 3, 1))]


def slow(method, classifier, samples, sets, judge, **settings):
    """The value at each level: `over` with its classes, measured like any method."""
    made = (over(method, level, **settings) for level in sets)
    return [measure(one, classifier, batches(samples, 2), {"it": judge})["it"].value for one in made]


@pytest.mark.parametrize(
    ("method", "normalize", "judge"),
    [
        (cam, "none", FEW),
        (cam, "unit", partial(pxap, bins=50)),
        (grad_cam, "unit", FEW),
        (partial(rise, samples=6), "none", partial(pxap, bins=50)),
    ],
    ids=["cam", "cam-unit", "grad_cam-unit", "rise"],
)
def test_every_level_has_the_value_of_over_its_classes(classifier, samples, method, normalize, judge):
    """Levels of classes that reach the root early and late, in batches that cut through the classes."""
    hierarchy = Hierarchy.of(DEEP)
    sets = levels(hierarchy, tuple("01234"))
    assert [sets[d][1] for d in range(4)] == [(1,), (1, 3), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)]
    assert [sets[d][0] for d in range(4)] == [(0,), (0, 2), (0, 2, 4), (0, 1, 2, 3, 4)]
    expected = slow(method, classifier, samples, sets, judge(), normalize=normalize)
    found = superset_depth(method, classifier, samples, hierarchy=DEEP, measure=judge(), normalize=normalize, batch=4)
    assert found["best"].curve == pytest.approx(expected, abs=1e-9)
    assert found["best"].axis == (0, 1, 2, 3)
    assert found["self"].value == found["best"].curve[0]
    assert found["all"].value == found["best"].curve[-1]
    assert found["best"].value == max(found["best"].curve)
    assert found["best_depth"].value == found["best"].curve.index(found["best"].value)
    assert len(set(expected)) > 1, "else the test shows nothing"


def test_class_parts_are_those_of_every_class_measured_on_its_own_images(classifier, samples):
    sets = levels(hierarchy_of("creatures", NAMES), NAMES)
    found = superset_depth(cam, classifier, samples, hierarchy="creatures", measure=FEW())
    own = {c: slow(cam, classifier, [s for s in samples if s.label == c], sets, FEW()) for c in range(5)}
    depth = [own[s.label].index(max(own[s.label])) for s in samples]
    assert found["class_depth"].per_image == tuple(depth)
    assert found["class_depth"].value == pytest.approx(sum(depth) / 9)
    assert found["class_depth"].curve == pytest.approx([100 * depth.count(d) / 9 for d in range(3)])
    assert found["class_best"].value == pytest.approx(sum(max(own[s.label]) for s in samples) / 9)
    assert found["class_best"].curve == pytest.approx([sum(own[s.label][d] for s in samples) / 9 for d in range(3)])
    assert len(set(depth)) > 1, "else the test shows nothing"


class Painted(nn.Module):
    """Class c is what is seen in stripe c of the image: its CAM is known."""

    def __init__(self):
        super().__init__()
        self.body = nn.Identity()
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight.data = torch.eye(3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def painted(spots, box, label=0):
    """An image whose color c is light in the places of spots[c], at 16 x 16."""
    image = torch.zeros(3, 16, 16)
    for c, (x0, y0, x1, y1) in enumerate(spots):
        image[c, y0:y1, x0:x1] = 1
    return Sample(f"{label}-{box}", image, label=label, boxes=torch.tensor([box]).float())


@pytest.fixture(scope="module")
def colors():
    return wrap(Painted(), layer="body", normalization="none", size=16, classes=("red", "green", "blue"))


TREE = {"red": "warm", "green": "warm", "warm": "color", "blue": "color"}


def test_the_box_of_an_object_of_two_halves_is_that_of_its_superset(colors):
    """Red sees the left half, green the right one, blue the ground: the superset of both halves has the box, all is
    too much; for blue, whose superset is all at once, it is itself."""
    left, right, ground = (2, 2, 6, 10), (6, 2, 10, 10), (0, 12, 16, 16)
    samples = [
        painted((left, right, ground), [2, 2, 10, 10], 0),
        painted((left, right, ground), [2, 2, 10, 10], 1),
        painted((left, right, ground), [0, 12, 16, 16], 2),
    ]
    judge = max_box_accuracy(iou=0.9, protocol="exact", resize="bilinear")
    found = superset_depth(cam, colors, samples[:2], hierarchy=TREE, measure=judge, batch=1)
    assert found["best"].curve == (0, 100, 0 if found["all"].value == 0 else 100)
    assert found["best_depth"].value == 1
    several = superset_depth(cam, colors, samples, hierarchy=TREE, measure=judge)
    assert several["class_depth"].per_image == (1, 1, 0)
    assert several["class_depth"].curve == pytest.approx((100 / 3, 200 / 3, 0))
    assert several["class_best"].value == 100
    assert several["self"].value == pytest.approx(100 / 3)
    assert [several[part].count for part in several] == [3] * 6


def test_scores_say_which_direction_is_better(classifier, samples):
    found = superset_depth(cam, classifier, samples[:3], hierarchy="creatures", measure=FEW())
    better = {part: score.higher_is_better for part, score in found.items()}
    assert better == {
        "self": True, "all": True, "best": True, "best_depth": None, "class_best": True, "class_depth": None
    }  # fmt: skip
    assert {part: score.metric.name for part, score in found.items()} == {part: part for part in found}
    lower = replace(FEW(), higher_is_better=False)
    turned = superset_depth(cam, classifier, samples[:3], hierarchy="creatures", measure=lower)
    assert turned["best"].value == min(found["best"].curve)
    assert turned["best_depth"].value == found["best"].curve.index(min(found["best"].curve))


def test_measures_by_name_are_those_with_their_defaults(classifier, samples):
    for name, judge in (("max_box_accuracy", max_box_accuracy()), ("pxap", pxap())):
        by_name = superset_depth(cam, classifier, samples[:3], hierarchy="creatures", measure=name)
        assert by_name == superset_depth(cam, classifier, samples[:3], hierarchy="creatures", measure=judge)
    assert superset_depth(cam, classifier, samples[:3], hierarchy="creatures") == superset_depth(
        cam, classifier, samples[:3], hierarchy="creatures", measure=max_box_accuracy_v2()
    )


def test_batches_do_not_matter(classifier, samples):
    one, all_ = (superset_depth(cam, classifier, samples, hierarchy=DEEP, measure=FEW(), batch=b) for b in (1, 9))
    for part in one:
        assert one[part].value == pytest.approx(all_[part].value, abs=1e-9)
        assert one[part].per_image == all_[part].per_image


def test_cam_takes_two_forwards_a_batch_however_many_levels(classifier, samples):
    """One for the logits, one for the maps of all classes."""
    passes = []
    handle = classifier.model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    superset_depth(cam, classifier, samples, hierarchy=DEEP, measure=FEW(), batch=5)
    handle.remove()
    assert passes == [5, 5, 4, 4]


def test_every_class_is_explained_once_an_image_and_the_time_is_taken(classifier, samples):
    seen = []

    def method(classifier, x, y):
        seen.extend(zip(x[:, 0, 0, 0].tolist(), y.tolist(), strict=True))
        return grad_cam(classifier, x, y)

    maps = Maps(method)
    superset_depth(maps, classifier, samples, hierarchy=DEEP, measure=FEW(), batch=4)
    assert len(seen) == len(set(seen)) == 9 * 5
    assert maps.seconds > 0


class Stored:
    """Maps known by the names of their images."""

    def __call__(self, classifier, x, y=None, /):
        raise AssertionError

    def of(self, ids, y, size):
        return torch.stack([grown(*one) for one in zip(ids, y.tolist(), strict=True)])


def grown(name, label):
    return torch.rand(1, 6, 8, generator=torch.Generator().manual_seed(100 * label + int(name[6:])))


def test_stored_maps_are_asked_for_by_name(classifier, samples):
    found = superset_depth(Stored(), classifier, samples, hierarchy="creatures", measure=FEW())

    def shown(classifier, x, y):
        places = [next(s.id for s in samples if torch.equal(s.image, one)) for one in x]
        return torch.stack([grown(*one) for one in zip(places, y.tolist(), strict=True)])

    assert found == superset_depth(shown, classifier, samples, hierarchy="creatures", measure=FEW())


BRIGHTNESS = Measure(lambda case: case.raw.flatten(1).mean(1), True)


@pytest.mark.parametrize("judge", [FEW(), BRIGHTNESS], ids=["boxes", "brightness"])
def test_a_map_that_is_not_finite_scores_as_nothing(classifier, samples, judge):
    """As in `measure`: the one class spoils its supersets, not the others."""

    def method(classifier, x, y):
        return torch.where((y == 3).view(-1, 1, 1, 1), torch.nan, cam(classifier, x, y))

    sets = levels(hierarchy_of("creatures", NAMES), NAMES)
    found = superset_depth(method, classifier, samples, hierarchy="creatures", measure=judge)
    assert found["best"].curve == pytest.approx(slow(method, classifier, samples, sets, judge))
    assert found["best"].curve[0] != found["best"].curve[2]
    assert found["best"].count == 9


def test_a_measure_of_one_number_an_image_is_taken_too(classifier, samples):
    sets = levels(hierarchy_of("creatures", NAMES), NAMES)
    found = superset_depth(cam, classifier, samples, hierarchy="creatures", measure=BRIGHTNESS)
    assert found["best"].curve == pytest.approx(slow(cam, classifier, samples, sets, BRIGHTNESS))


def test_an_image_without_a_box_of_its_label_does_not_count(classifier, samples):
    lost = replace(samples[0], id="lost", boxes=torch.zeros(0, 4))
    found = superset_depth(cam, classifier, [lost, *samples], hierarchy="creatures", measure=FEW())
    without = superset_depth(cam, classifier, samples, hierarchy="creatures", measure=FEW())
    assert math.isnan(found["class_depth"].per_image[0])
    assert found["class_depth"].per_image[1:] == without["class_depth"].per_image
    assert {part: one.value for part, one in found.items()} == {part: one.value for part, one in without.items()}
    assert found["best"].count == found["class_best"].count == 9


def test_a_class_whose_images_have_no_pixel_of_it_has_no_depth(classifier, samples):
    """Its pixels count for the others' precision all the same."""
    bare = replace(samples[2], mask=torch.zeros(SIZE, dtype=torch.long))
    found = superset_depth(cam, classifier, [bare, *samples[:2]], hierarchy="creatures", measure="pxap")
    assert math.isnan(found["class_depth"].per_image[0])
    assert (found["best"].count, found["class_depth"].count) == (3, 2)
    assert sum(found["class_depth"].curve) == pytest.approx(100)
    alone = superset_depth(cam, classifier, [bare], hierarchy="creatures", measure="pxap")
    assert all(math.isnan(alone[part].value) for part in ("self", "all", "best", "class_best", "class_depth"))


def test_nodes_name_the_classes_in_the_hierarchy(classifier, samples):
    plain_names = replace(classifier, classes=("a", "b", "c", "d", "e"))
    found = superset_depth(cam, plain_names, samples, hierarchy="creatures", nodes=NAMES, measure=FEW())
    assert found == superset_depth(cam, classifier, samples, hierarchy="creatures", measure=FEW())
    numbered = {str(i): ("pip", "newt")[i % 2] for i in range(5)} | {"pip": "any", "newt": "any"}
    nameless = replace(classifier, classes=())
    assert found == superset_depth(cam, nameless, samples, hierarchy=numbered, measure=FEW())


def test_nothing_is_left_behind(classifier, samples, trace, plain):
    changed = trace(classifier.model, *(one.image for one in samples))
    superset_depth(cam, classifier, samples, hierarchy=DEEP, measure=FEW())
    assert changed() == []


def test_what_is_wrong_is_said(classifier, samples, plain):
    run = partial(superset_depth, cam, classifier, samples, hierarchy="creatures", measure=FEW())
    with pytest.raises(LookupError, match="no measure called 'pxAP'; did you mean pxap"):
        run(measure="pxAP")
    with pytest.raises(LookupError, match="no normalization called 'l2'"):
        run(normalize="l2")
    with pytest.raises(LookupError, match="no hierarchy called 'creature'; did you mean creatures"):
        run(hierarchy="creature")
    with pytest.raises(LookupError, match="no node of the hierarchy called 'common pip'"):
        run(hierarchy={"a": "b"})
    with pytest.raises(ValueError, match="expected a node for each of 5 classes, got 2; pass nodes= in their order"):
        run(nodes=("common pip", "common newt"))
    with pytest.raises(ValueError, match="expected a measure that keeps means, got one that pools"):
        run(measure=pxap(exact=True))
    with pytest.raises(ValueError, match="no image was measured; the data set is empty"):
        superset_depth(cam, classifier, [], hierarchy="creatures")
    with pytest.raises(ValueError, match="no image counts; the measure needs boxes or masks"):
        superset_depth(cam, classifier, [replace(samples[0], boxes=torch.zeros(0, 4))], hierarchy="creatures")
    with pytest.raises(ValueError, match="pxap needs a mask, and 'image-1' has none"):
        superset_depth(cam, classifier, [sample(1, 0, mask=False)], hierarchy="creatures", measure="pxap")
    with pytest.raises(ValueError, match="superset_depth needs the label, and 'image-0' has none"):
        superset_depth(cam, classifier, [replace(samples[0], label=None)], hierarchy="creatures")
    with pytest.raises(ValueError, match="'creatures' goes by the names of the classes, and this classifier has none"):
        superset_depth(cam, replace(classifier, classes=()), samples, hierarchy="creatures")
