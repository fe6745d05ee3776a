"""Galleries of Maruf et al.: regions and distances, label maps, several networks; and the drawings they need."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sightline import gallery, viz
from sightline.classifier import UnsuitedError, wrap
from sightline.cli._gallery import command
from sightline.data import Sample, collate
from sightline.gallery import Block, Gallery, Row
from sightline.hyperplanes import signed_distances
from sightline.maps import unit
from sightline.methods import cam, gradient

H, W, N = 24, 32, 3
COLUMNS = ("0\nred", "1\ngreen", "2\nblue")
NAMES = ("red", "green", "blue", "gray")
REGIONS = ("HSR-DR", "LSR-DR", "HSR-NDR", "LSR-NDR")
DATA = "creatures?count=4&variant=scenes"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Sequential(nn.Conv2d(3, 6, 5, 2, 2), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.last(x).mean((2, 3)))


@pytest.fixture
def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return wrap(Net(), normalization="none", size=(H, W))


@pytest.fixture
def samples():
    images = torch.rand(N, 3, H, W, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(H, W, dtype=torch.long)
    mask[2:10, 3:15] = 1
    mask[12:20, 10:30] = 2
    mask[22:] = 255
    masks = [mask, mask, torch.where(mask == 2, 3, mask)]
    return [Sample(f"set-{i}-a", x, label=i, mask=m) for i, (x, m) in enumerate(zip(images, masks, strict=True))]


@pytest.fixture
def told(classifier, samples):
    def tell(method=gradient, title="method", explain="label", chosen=samples):
        return gallery.explained(title, method, classifier, collate(chosen), explain=explain)

    return tell


def near(a, b, tolerance=1e-5):
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=tolerance)


def test_regions_are_painted_on_the_object_and_their_shares_stand_below(told, classifier, samples):
    made = gallery.regions(told(), COLUMNS, tau_cam=0.6, tau_sm=0.4, side=W)
    image, _, saliency, painted, distances = made.blocks[0].rows
    titles = ["image", "CAM", "saliency", "regions of the object", "distances to the hyperplanes"]
    assert [row.title for row in made.blocks[0].rows] == titles
    assert tuple(made.keys) == REGIONS
    x, y = torch.stack([one.image for one in samples]), torch.tensor([0, 1, 2])
    planes = signed_distances(classifier, x, y, tau_cam=0.6, tau_sm=0.4)
    CAM, SM = cam(classifier, x, y), gradient(classifier, x, y)
    CAM = nn.functional.interpolate(CAM.double(), (H, W), mode="bilinear")
    for i, sample in enumerate(samples):
        assert near(image.pictures[i], sample.image, 1e-4)
        assert near(saliency.pictures[i], viz.overlay(sample.image, unit(SM[i : i + 1])[0, 0]), 1e-4)
        counts = [0, 0, 0, 0]
        for p in range(H):
            for q in range(W):
                inside = int(sample.mask[p, q]) == i + 1
                dr = CAM[i].max() > 0 and CAM[i, 0, p, q] / CAM[i].max() >= 0.6
                hsr = SM[i, 0, p, q] / SM[i].max() >= 0.4
                region = (0 if hsr else 1) if dr else (2 if hsr else 3)
                counts[region] += inside
                labels = torch.full((H, W), region + 1 if inside else 0)
                colors = torch.tensor([(0.0, 0.0, 0.0), *gallery.REGION_COLORS])
                assert near(painted.pictures[i][:, p, q], viz.painted(sample.image, labels, colors)[:, p, q], 1e-4)
        total = sum(counts)
        assert total == 96 if i == 0 else total == 160
        expected = [f"{name} {100 * count / total:.0f} %" for name, count in zip(REGIONS, counts, strict=True)]
        assert painted.captions[i].split("\n") == expected
        assert distances.pictures[i].shape == (3, W, W)
        assert (planes.regions[i][sample.mask == i + 1].bincount(minlength=4) == torch.tensor(counts)).all()
    assert len({tuple(caption.split("\n")) for caption in painted.captions}) > 1


def test_regions_without_an_object_say_so_and_without_a_mask_are_refused(told, samples):
    gone = [replace(samples[0], label=3), *samples[1:]]
    made = gallery.regions(told(chosen=gone), COLUMNS, side=W)
    painted, distances = made.blocks[0].rows[3:]
    assert painted.captions[0] == "no object"
    assert distances.pictures[0] is None
    assert distances.pictures[1] is not None
    with pytest.raises(ValueError, match="'set-0-a' has no mask, and the regions are those of the true object"):
        gallery.regions(told(chosen=[replace(samples[0], mask=None), *samples[1:]]), COLUMNS)


def test_a_wide_cell_is_a_whole_multiple():
    assert [gallery.wide_side_of(n) for n in (28, 64, 128, 200, 224, 500)] == [224, 192, 128, 200, 224, 224]


def by_class(classifier, x, y=None, /):
    """A slope to the right for class 0, to the left for the others."""
    slope = torch.linspace(0, 2, W).expand(len(x), 1, H, W)
    return torch.stack([one if label == 0 else one.flip(-1) for one, label in zip(slope, y.tolist(), strict=True)])


def test_label_maps_take_the_class_of_the_largest_map(told, samples):
    multi = [replace(one, label=None, labels=(torch.arange(4) < 2).long()) for one in samples[:2]]
    made = gallery.segments(
        [told(by_class, explain="predicted", chosen=multi)], COLUMNS[:2], names=NAMES, threshold=0.7, side=W
    )
    image, truth, labels = made.blocks[0].rows
    assert (image.title, truth.title, labels.title) == ("image", "truth", "method")
    assert truth.captions == ("red\ngreen", "red\ngreen")
    assert near(truth.pictures[0], viz.painted(multi[0].image, multi[0].mask, viz.palette()), 1e-4)
    slope = torch.linspace(0, 1, W)
    for q in range(W):
        right, left = float(slope[q]), float(slope[W - 1 - q])
        label = 0 if max(right, left) <= 0.7 else 1 if right >= left else 2
        column = viz.painted(multi[1].image, torch.full((H, W), label), viz.palette())[:, :, q]
        assert near(labels.pictures[1][:, :, q], column, 1e-4)
    assert made.keys == {"red": pytest.approx((128 / 255, 0, 0)), "green": pytest.approx((0, 128 / 255, 0))}


def test_each_resolve_has_a_row_and_unscaled_maps_their_own_threshold(told, samples):
    seen = []

    def all_of_it(image, maps):
        seen.append((image, maps))
        return torch.ones_like(maps)

    chosen = [replace(one, label=0) for one in samples]
    explained = told(by_class, "slope", chosen=chosen)
    resolves = {"one": all_of_it, "two": lambda image, maps: maps}
    rows = (
        gallery.segments([explained], COLUMNS, resolves=resolves, threshold=1.5, normalize=False, side=W).blocks[0].rows
    )
    assert [row.title for row in rows[2:]] == ["slope\none", "slope\ntwo"]
    assert near(seen[1][0], samples[1].image)
    assert float(seen[1][1].max()) == 2
    assert len(seen[1][1]) == 1, "the label alone competes"
    assert rows[1].captions == ("0\n1", "0\n1", "0\n2"), "classes without a name are numbers"
    assert near(rows[2].pictures[0], viz.painted(samples[0].image, torch.zeros(H, W).long(), viz.palette()), 1e-4)
    right = (torch.linspace(0, 2, W) > 1.5).long().expand(H, W)
    assert near(rows[3].pictures[0], viz.painted(samples[0].image, right, viz.palette()), 1e-4)


def test_an_image_without_a_mask_has_no_true_labels(told, samples):
    with pytest.raises(ValueError, match="segmentation needs a mask, and 'set-0-a' has none"):
        gallery.segments([told(chosen=[replace(samples[0], mask=None)])], COLUMNS[:1])
    with pytest.raises(ValueError, match="a gallery needs at least one method"):
        gallery.segments([], COLUMNS)


def gray(value):
    return torch.full((3, 4, 4), value)


def test_galleries_of_several_networks_stand_below_each_other_and_what_they_share_once():
    shared = Row("image", (gray(0.1), None))
    one, two = (Row("map", (gray(value), gray(value))) for value in (0.2, 0.3))
    a = Gallery(("x", "y"), (Block("", (shared, one)),), {"map": (1.0,)}, {"dog": (1.0, 0.0, 0.0)})
    b = Gallery(
        ("x", "y"), (Block("", (Row("image", (gray(0.1), None)), two)),), {"map": (2.0,)}, {"cat": (0.0, 1.0, 0.0)}
    )
    made = gallery.stacked({"A": a, "B": b})
    assert [(block.title, [row.title for row in block.rows]) for block in made.blocks] == [
        ("", ["image"]),
        ("A", ["map"]),
        ("B", ["map"]),
    ]
    assert torch.equal(made.blocks[2].rows[0].pictures[0], gray(0.3))
    assert made.numbers == {"A: map": (1.0,), "B: map": (2.0,)}
    assert set(made.keys) == {"dog", "cat"}
    c = Gallery(("x", "y"), (Block("m", (Row("image", (gray(0.5), None)), two)),))
    apart = gallery.stacked({"A": a, "C": c})
    assert [(block.title, len(block.rows)) for block in apart.blocks] == [("A", 2), ("C\nm", 2)]
    with pytest.raises(ValueError, match="expected galleries of the same images"):
        gallery.stacked({"A": a, "B": replace(b, columns=("x", "z"))})


def test_the_palette_is_that_of_pascal_voc():
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        3: (128, 128, 0),
        7: (128, 128, 128),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    colors = (255 * viz.palette()).round().long()
    assert {label: tuple(colors[label].tolist()) for label in known} == known
    assert len({tuple(one) for one in colors.tolist()}) == 256


def test_painting_keeps_the_photo_where_nothing_is_labeled():
    x = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(4, 5, dtype=torch.long)
    labels[1, 2] = 2
    made = viz.painted(x, labels, torch.tensor([(0.0, 0, 0), (1, 1, 1), (1, 0, 0)]), alpha=0.75, fade=0.5)
    for p in range(4):
        for q in range(5):
            luma = 0.299 * x[0, p, q] + 0.587 * x[1, p, q] + 0.114 * x[2, p, q]
            paint = 0.25 * x[:, p, q] + 0.75 * torch.tensor([1.0, 0, 0])
            dark = x[:, p, q] + 0.5 * (luma / 2 - x[:, p, q])
            assert near(made[:, p, q], paint if (p, q) == (1, 2) else dark)
    with pytest.raises(ValueError, match=r"expected labels of \(4, 5\) pixels, got \(5, 4\)"):
        viz.painted(x, labels.T, viz.palette())
    with pytest.raises(ValueError, match=r"expected labels in 0\.\.1, one a color, got 0 to 2"):
        viz.painted(x, labels, viz.palette()[:2])


def test_a_scatter_plot_has_its_points_where_they_belong():
    x, y = torch.tensor([-1.0, 1.0, 1.0]), torch.tensor([-1.0, 1.0, -1.0])
    colors = torch.tensor([(1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)])
    made = viz.scatter(x, y, colors, axes=("a", "b"), side=160)
    assert made.shape == (3, 160, 160)
    assert 0 <= float(made.min()) <= float(made.max()) == 1
    places = []
    for channel in range(3):
        others = [one for one in range(3) if one != channel]
        spot = (made[channel] - made[others].amax(0)) > 0.3
        rows, columns = spot.nonzero().double().mean(0).tolist()
        places.append((rows, columns))
    red, green, blue = places
    assert red[1] < green[1] - 40
    assert abs(green[1] - blue[1]) < 3
    assert green[0] < red[0] - 40
    assert abs(red[0] - blue[0]) < 3
    assert torch.equal(made, viz.scatter(x, y, colors, axes=("a", "b"), side=160))
    with pytest.raises(ValueError, match="expected points with finite coordinates"):
        viz.scatter(x[:0], y[:0], colors[:0])
    with pytest.raises(ValueError, match="expected points with finite coordinates"):
        viz.scatter(x / 0 * 0, y, colors)


def test_a_caption_has_the_color_that_it_explains():
    rows, captions = [[gray(0.5), gray(0.5)]], [["dog 3 %\ndogfish", "cat"]]
    keys = {"dog": (1.0, 0.0, 0.0), "dogfish": (0.0, 1.0, 0.0)}
    plain = viz.grid(rows, captions=captions, cell=160)
    made = viz.grid(rows, captions=captions, keys=keys, cell=160)
    assert made.size == plain.size
    pixels = [tuple(one) for one in np.asarray(made).reshape(-1, 3).tolist()]
    assert min(pixels.count((255, 0, 0)), pixels.count((0, 255, 0))) > 20
    assert pixels.count((255, 0, 0)) == pixels.count((0, 255, 0))
    red, green = (
        [i // made.width for i, one in enumerate(pixels) if one == color] for color in ((255, 0, 0), (0, 255, 0))
    )
    assert max(red) < min(green)
    right = (made.width // 2, 0, made.width, made.height)
    assert made.crop(right).tobytes() == plain.crop(right).tobytes()


def call(*arguments):
    command([str(one) for one in ("--data", DATA, *arguments)], standalone_mode=False)


def test_the_command_draws_regions_of_the_network_itself(tmp_path):
    call("--show", "regions", "--images", 2, "--tau-cam", 0.4, "--out", tmp_path / "a.png")
    told = json.loads((tmp_path / "a.json").read_text())
    assert (told["show"], told["tau_cam"], told["tau_sm"], told["threshold"]) == ("regions", 0.4, 0.15, None)
    assert list(told["methods"]) == ["gradient"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.height > 5 * 192


def test_the_command_draws_label_maps(tmp_path):
    resolves = ["--resolve", "basic", "--resolve", "smooth?sigma=2"]
    call(
        "--show", "segments", "--images", 2, "--method", "cam", *resolves, "--threshold", 0, "--out", tmp_path / "a.png"
    )
    told = json.loads((tmp_path / "a.json").read_text())
    assert (told["resolve"], told["threshold"]) == (["basic", "smooth?sigma=2"], 0)
    assert [one["explained"] for one in told["images"]] == [None, None]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.height > 4 * 128


def test_several_models_have_a_block_each(tmp_path):
    models = ["--model", "creatures", "--model", "mini_resnet?classes=20", "--model-name", "org", "--model-name", "new"]
    call(*models, "--images", 2, "--method", "cam", "--method", "calm_attribution", "--out", tmp_path / "a.png")
    told = json.loads((tmp_path / "a.json").read_text())
    assert set(told["models"]) == {"org", "new"}
    assert told["models"]["new"]["model"] == {"name": "mini_resnet", "classes": 20}
    assert list(told["models"]["org"]["methods"]) == ["cam"]
    assert list(told["models"]["org"]["skipped"]) == ["calm_attribution"]
    with Image.open(tmp_path / "a.png") as picture:
        assert 3 * 128 < picture.height < 4 * 128, "the images stand once"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--show", "regions", "--method", "cam"], "leave --method out"),
        (["--show", "regions", "--tau-sm", "0"], "expected tau_sm in (0, 1], a share of the map's maximum, got 0.0"),
        (["--threshold", "0"], "--threshold belongs to --show segments, and this is --show maps"),
        (["--tau-cam", "0.1"], "--tau-cam belongs to --show regions, and this is --show maps"),
        (["--show", "segments", "--resolve", "smoth"], "no background resolve called 'smoth'; did you mean smooth"),
        (
            ["--model", "creatures", "--model", "creatures"],
            "two models are called 'creatures'; tell them apart with --model-name",
        ),
        (["--model-name", "a", "--model-name", "b"], "expected a --model-name for each of 1 models, got 2"),
        (
            ["--model", "creatures", "--model", "mini_resnet?classes=20", "--explain", "predicted"],
            "of several models each may predict another class",
        ),
    ],
)
def test_errors_teach(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((LookupError, ValueError), match=re.escape(sentence)):
        call(*arguments)
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_regions_need_a_linear_head(tmp_path):
    with pytest.raises(UnsuitedError, match="cam needs global average pooling"):
        call("--model", "mini_vgg?classes=20", "--show", "regions", "--images", 1, "--out", tmp_path / "a.png")
