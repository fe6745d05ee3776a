"""Galleries: the papers' tables of pictures, cell by cell against slow forms, and the command that draws them."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sightline import gallery, viz
from sightline.classifier import Classifier, UnsuitedError
from sightline.cli._gallery import command, eraser, titled
from sightline.data import Sample, collate
from sightline.erase import color
from sightline.protocols._cues import Cues
from sightline.runs import Choice

H, W, N = 24, 32, 3
MODEL, DATA = "mini_resnet?classes=20", "creatures?count=6"


class Darkness(nn.Module):
    """Five classes that cut the mean of the image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Identity()

    def forward(self, x):
        return -(self.stem(x).mean((1, 2, 3))[:, None] - torch.linspace(0, 0.5, 5, dtype=x.dtype)).abs()


def by_class(classifier, x, y, /):
    """A bright rectangle on a slope; its left side is at the class's number."""
    maps = torch.linspace(0, 0.01, W, dtype=x.dtype).expand(len(x), 1, H, W).clone()
    for one, label in zip(maps, y.tolist(), strict=True):
        one[:, 6:18, 4 + 2 * label : 20] = 1
    return maps


def nothing(classifier, x, y=None, /):
    return torch.zeros(len(x), 1, 6, 8, dtype=x.dtype)


def broken(classifier, x, y, /):
    maps = by_class(classifier, x, y)
    maps[1] = torch.nan
    return maps


@pytest.fixture
def classifier():
    return Classifier(Darkness(), "stem", size=(H, W))


@pytest.fixture
def samples():
    images = torch.rand(N, 3, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    box = torch.tensor([[4.0, 6.0, 20.0, 18.0]])
    boxes = [box, box + torch.tensor([4.0, 0, 8, 0]), torch.zeros(0, 4)]
    mask = torch.zeros(H, W, dtype=torch.long)
    mask[2:10, 3:15] = 1
    masks = [mask, 2 * mask, 3 * mask]
    each = zip(images, boxes, masks, strict=True)
    return [Sample(f"set-{i}-a", x, label=i, boxes=B, mask=m) for i, (x, B, m) in enumerate(each)]


@pytest.fixture
def told(classifier, samples):
    """Explain the samples with a method."""

    def tell(method, title="method", explain="label"):
        return gallery.explained(title, method, classifier, collate(samples), explain=explain)

    return tell


COLUMNS = ("0\nred", "1\ngreen", "2\nblue")


def near(picture, image, tolerance=1e-6):
    return torch.allclose(picture.double(), image.double(), atol=tolerance)


def test_masks_have_a_block_a_method_and_four_rows_a_block(told):
    made = gallery.masks([told(by_class, "one"), told(nothing, "two")], COLUMNS, side=W)
    assert made.columns == COLUMNS
    assert [block.title for block in made.blocks] == ["one", "two"]
    for block in made.blocks:
        assert [row.title for row in block.rows] == ["clean", "masked in", "masked out", "inpainted"]
        assert all(one.shape == (3, H, W) for row in block.rows for one in row.pictures)


def test_masked_in_and_masked_out_are_together_the_image_under_black(told, samples):
    made = gallery.masks([told(by_class)], COLUMNS, side=W)
    clean, inside, outside, inpainted = (row.pictures for row in made.blocks[0].rows)
    for i, sample in enumerate(samples):
        shown = torch.zeros(H, W, dtype=torch.bool)
        shown[6:18, 4 + 2 * i : 20] = True
        raw = by_class(None, sample.image[None], torch.tensor([i]))
        left = round(float(raw.mean()) * H * W) - int(shown.sum())
        assert left == 3, "besides the rectangle, so many of the slope's pixels"
        assert near(clean[i], sample.image)
        assert near(inside[i] + outside[i], sample.image)
        assert near(inside[i][:, shown], sample.image[:, shown])
        assert (inside[i].sum(0) > 0)[~shown].sum() == 0, "equal pixels at the threshold are all left out"
        assert near(inpainted[i][:, ~shown], sample.image[:, ~shown], 1 / 255)
        assert (inpainted[i][:, shown].sum(0) > 0).all()


def test_a_color_takes_the_place_of_what_is_hidden(told):
    made = gallery.masks([told(nothing)], COLUMNS, erase=eraser("color?mean=0.35"), side=W)
    assert all(near(one, torch.full((3, H, W), 0.35)) for one in made.blocks[0].rows[1].pictures)


def test_a_soft_mask_weighs_and_unscaled_maps_must_lie_in_the_range(told, samples):
    half, triple = (told(lambda c, x, y, /, factor=factor: factor * by_class(c, x, y)) for factor in (0.5, 3.0))
    made = gallery.masks([half], COLUMNS, rule="soft", normalize=False, side=W)
    inside = made.blocks[0].rows[1].pictures[0]
    assert near(inside[:, 6:18, 4:20], samples[0].image[:, 6:18, 4:20] / 2)
    with pytest.raises(ValueError, match=r"that of 'set-0-a' lies in \[0, 3\]"):
        gallery.masks([triple], COLUMNS, normalize=False)


def test_maps_lie_over_the_images_and_one_that_shows_nothing_says_why(told, samples):
    made = gallery.maps([told(by_class, "good"), told(broken, "bad")], COLUMNS, side=W)
    image, good, bad = made.blocks[0].rows
    assert (image.title, good.title, bad.title) == ("image", "good", "bad")
    assert all(near(one, sample.image) for one, sample in zip(image.pictures, samples, strict=True))
    expected = viz.overlay(
        samples[2].image.float(), by_class(None, samples[2].image[None], torch.tensor([2]))[0, 0].float()
    )
    assert near(good.pictures[2], expected, 1e-4)
    assert good.captions == ()
    assert bad.pictures[1] is None
    assert bad.captions == ("", "not finite", "")


@pytest.mark.parametrize(("truth", "inner", "edge"), [("boxes", (6, 4, 18, 20), 2), ("mask", (2, 3, 10, 15), 2)])
def test_the_truth_is_outlined(told, truth, inner, edge):
    made = gallery.maps([told(by_class)], COLUMNS, truth=truth, side=4 * W)
    picture = made.blocks[0].rows[1].pictures[0]
    top, left, bottom, right = (4 * side for side in inner)
    line = torch.tensor(gallery.TRUE)
    for row in (top, top + edge - 1, bottom - edge, bottom - 1):
        assert near(picture[:, row, left + 8 : right - 8], line[:, None].expand(3, right - left - 16))
    for row in (top - 1, top + edge, bottom - edge - 1, bottom):
        assert not near(picture[:, row, left + 8 : right - 8], line[:, None].expand(3, right - left - 16))
    plain = gallery.maps([told(by_class)], COLUMNS, side=4 * W).blocks[0].rows[1].pictures[0]
    assert near(picture[:, :top], plain[:, :top])


def test_boxes_stand_where_they_are_and_the_overlap_is_below(told):
    made = gallery.boxes([told(by_class, "one"), told(nothing, "none")], COLUMNS, side=4 * W)
    true, one, none = made.blocks[0].rows
    assert true.title == "true boxes"
    # box 4..20 is the true one; 6..20 lies in 8..28 but for two columns; the third image has no true box
    assert made.numbers["one"][:2] == pytest.approx((1.0, 12 * 12 / (12 * 14 + 12 * 20 - 12 * 12)))
    assert one.captions == ("IoU 1.00", "IoU 0.55", "no true box")
    assert none.captions == ("IoU 0.00", "IoU 0.00", "no true box")
    found = torch.tensor(gallery.FOUND)
    first, second, third = one.pictures
    for picture, x0 in ((first, 4), (second, 6), (third, 8)):
        assert near(picture[:, 24:72, 4 * x0 : 4 * x0 + 2], found[:, None, None].expand(3, 48, 2)), "the left side"
        assert near(picture[:, 24:72, 78:80], found[:, None, None].expand(3, 48, 2)), "the right side"
    assert near(second[:, 30, 110:112], torch.tensor(gallery.TRUE)[:, None].expand(3, 2)), "the right side of 8..28"
    assert all(near(a, b) for a, b in zip(none.pictures, true.pictures, strict=True)), "nothing found, nothing drawn"


def test_a_box_beyond_the_image_is_cut_off_and_an_empty_one_is_not_drawn():
    photo = torch.ones(3, 8, 10)
    drawn = gallery.boxed(photo, torch.tensor([[-3.0, 2.0, 4.0, 20.0], [5.0, 5.0, 5.0, 5.0]]), (8, 10), (0.0, 0.0, 0.0))
    dark = drawn.sum(0) == 0
    assert dark[2:8, :4].sum() == dark.sum() == 6 * 4 - 0


def backwards(classifier, x, y, /):
    return by_class(classifier, x, 4 - y)


@pytest.mark.parametrize(("method", "sign"), [(by_class, 1), (backwards, -1)])
def test_pairs_show_both_maps_and_their_difference(told, samples, method, sign):
    one = told(method, "one")
    made = gallery.pairs([one], COLUMNS, against=4, name="black", side=W)
    top, block = made.blocks
    assert [row.title for row in top.rows] == ["image"]
    assert (block.title, [row.title for row in block.rows]) == ("one", ["own class", "black", "difference"])
    for i, sample in enumerate(samples):
        own, other = (method(None, sample.image[None], torch.tensor([label]))[0, 0] for label in (i, 4))
        apart = torch.zeros(H, W, dtype=torch.float64)
        for row in range(H):
            for column in range(W):
                apart[row, column] = own[row, column] / 1 - other[row, column] / 1
        assert sign * apart[10, 9 if sign > 0 else 5] > 0.9
        expected = viz.overlay_signed(sample.image.float(), apart.float())
        assert near(block.rows[2].pictures[i], expected, 1e-4)


def test_raw_maps_are_subtracted_unscaled(told, samples):
    def lower(classifier, x, y, /):
        return torch.where(y.view(-1, 1, 1, 1) == 4, 0.5, 1.0) * by_class(classifier, x, torch.zeros_like(y))

    scaled = gallery.pairs([told(lower)], COLUMNS, against=4, name="black", side=W)
    assert scaled.blocks[1].rows[2].pictures == (None, None, None), "scaled, both maps are the same"
    raw = gallery.pairs([told(lower)], COLUMNS, against=4, name="black", normalize=False, side=W)
    expected = viz.overlay_signed(
        samples[0].image.float(), by_class(None, samples[0].image[None], torch.tensor([0]))[0, 0].float()
    )
    assert near(raw.blocks[1].rows[2].pictures[0], expected, 1e-4)


def test_maps_that_know_no_class_differ_by_nothing(told):
    made = gallery.pairs([told(lambda c, x, y, /: x.mean(1, keepdim=True))], COLUMNS, against=4, name="black")
    row = made.blocks[1].rows[2]
    assert row.pictures == (None, None, None)
    assert row.captions == ("all zero", "all zero", "all zero")


def test_an_image_is_not_compared_with_its_own_class(told):
    with pytest.raises(ValueError, match="'set-1-a' is itself explained for class 'green'; take images of other"):
        gallery.pairs([told(by_class)], COLUMNS, against=1, name="green")


@dataclass(frozen=True)
class Painting:
    """Classes 10 + k differ in the rows from k on."""

    def differing(self, a, b, /):
        return ("head",)

    def close_pairs(self, distance, /):
        return []

    def difference_mask(self, sample, a, b, /):
        mask = torch.zeros(H, W, dtype=torch.bool)
        if a != 2:
            mask[10 * a : 10 * a + 8, b : b + 20] = True
        return mask


@pytest.mark.parametrize("labels", [None, (1, 0, 2, 3, 4)])
def test_the_true_difference_stays_and_all_else_is_pale(told, samples, labels):
    cues = Cues(Painting(), Painting(), ("back",), labels)
    made = gallery.pairs([told(by_class)], COLUMNS, against=4, name="black", cues=cues, side=W)
    truth = made.blocks[0].rows[1]
    assert truth.title == "true difference"
    for i in (0, 1):
        number = i if labels is None else 1 - i
        inside = truth.pictures[i][:, 10 * number + 2 : 10 * number + 6, 6:22]
        assert near(inside, samples[i].image[:, 10 * number + 2 : 10 * number + 6, 6:22])
        outside = 1 - 0.25 * (1 - samples[i].image[:, :, 26:])
        assert near(truth.pictures[i][:, :, 26:], outside)
    assert truth.pictures[2] is None


def test_the_predicted_class_is_explained_where_that_is_asked(told, classifier, samples):
    case = told(by_class, explain="predicted").case
    logits = classifier(torch.stack([one.image for one in samples]))
    assert gallery.explained_labels(case) == logits.argmax(1).tolist() != [0, 1, 2]


def test_a_gallery_needs_a_method_and_a_truth_that_is_there(classifier, samples):
    with pytest.raises(ValueError, match="needs at least one method"):
        gallery.maps([], COLUMNS)
    bare = collate([Sample("bare", samples[0].image, label=0)])
    one = gallery.explained("method", by_class, classifier, bare)
    with pytest.raises(ValueError, match="'bare' has no mask to outline"):
        gallery.maps([one], ["bare"], truth="mask")
    with pytest.raises(ValueError, match="the gallery needs boxes or a mask, and 'bare' has neither"):
        gallery.boxes([one], ["bare"])


@pytest.mark.usefixtures("plain")
def test_a_rule_is_one_of_those_known(told):
    with pytest.raises(LookupError, match="no rule called 'soft'"):
        gallery.boxes([told(by_class)], COLUMNS, rule="soft")
    with pytest.raises(LookupError, match="no rule called 'hard'"):
        gallery.masks([told(by_class)], COLUMNS, rule="hard")


def test_the_sheet_holds_every_cell_and_turned_its_rows_are_columns(told):
    made = gallery.maps([told(by_class, "one"), told(broken, "two")], COLUMNS, side=64)
    sheet, turned = made.sheet(gap=6), made.turned()
    assert sheet.width > 3 * 64 + 4 * 6
    assert sheet.height > 3 * 64 + 4 * 6
    assert turned.columns == ("image", "one", "two")
    rows = turned.blocks[0].rows
    assert [row.title for row in rows] == list(COLUMNS)
    assert rows[1].pictures[2] is None
    assert [row.captions for row in rows] == [(), ("", "", "not finite"), ()]
    assert all(row.pictures[1] is made.blocks[0].rows[1].pictures[i] for i, row in enumerate(rows))
    assert gallery.masks([told(by_class, "one")], COLUMNS).turned().columns[1] == "one\nmasked in"


@pytest.mark.parametrize(
    ("longest", "side"), [(28, 112), (32, 128), (64, 128), (96, 192), (112, 112), (224, 224), (500, 224)]
)
def test_small_images_are_enlarged_by_whole_numbers(longest, side):
    assert gallery.side_of(longest) == side
    photo = gallery.enlarged(torch.rand(1, 1, longest // 2, longest))[0]
    assert photo.shape == (3, side // 2, side)
    assert (photo[0] == photo[2]).all()


@pytest.mark.parametrize(
    ("ids", "short"),
    [
        (["creatures-plain-test-00003-s0", "creatures-plain-test-00012-s0"], ["00003", "00012"]),
        (["creatures-plain-test-00003-s0"], ["00003"]),
        (["val/cat/1", "val/dog/1"], ["cat", "dog"]),
        (["photo"], ["photo"]),
        (["a", "a_b"], ["a", "a-b"]),
        (["same", "same"], ["same", "same"]),
    ],
)
def test_ids_are_shortened_to_what_tells_them_apart(ids, short):
    assert gallery.shortened(ids) == short


class Reading:
    """Labels as samples, and which were read."""

    def __init__(self, *labels):
        self.labels, self.read = labels, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index, /):
        self.read.append(index)
        return Sample(str(index), torch.zeros(3, 1, 1), label=self.labels[index])


def test_consecutive_images_of_each_group_are_found_and_no_more_is_read():
    samples = Reading(0, 1, 0, 2, 1, 0, 1, 0)
    groups = [frozenset({0}), frozenset({1, 2})]
    assert gallery.consecutive(samples, 2, groups) == [[0, 2], [1, 3]]
    assert samples.read == [0, 1, 2, 3]
    assert gallery.consecutive(Reading(0, 1, 0), 2, groups, start=1) == [[2], [1]]
    untouched = Reading(0, 1, 0, 2)
    assert gallery.consecutive(untouched, 2, [None], start=1) == [[1, 2]]
    assert untouched.read == []
    with pytest.raises(ValueError, match="the data set has images 0 to 3, got start=4"):
        gallery.consecutive(untouched, 2, [None], start=4)
    with pytest.raises(ValueError, match="at least one image, got 0"):
        gallery.consecutive(untouched, 0, [None])


def test_random_classes_follow_the_seed():
    state = torch.get_rng_state()
    listed = gallery.drawn_classes(range(20), 16, 3)
    assert listed == sorted(set(listed))
    assert len(listed) == 16
    assert listed == gallery.drawn_classes(range(20), 16, 3)
    assert listed != gallery.drawn_classes(range(20), 16, 4)
    assert (torch.get_rng_state() == state).all()
    with pytest.raises(ValueError, match="expected 1 to 3 random classes, got 4"):
        gallery.drawn_classes(range(3), 4, 0)


def call(*arguments):
    command([str(one) for one in ("--model", MODEL, *arguments)], standalone_mode=False)


@pytest.mark.parametrize(
    "show", [["maps"], ["masks", "--erase", "color?mean=0.35"], ["boxes"], ["pairs", "--against", 9]]
)
def test_the_command_writes_a_picture_and_all_that_determines_it(tmp_path, capsys, show):
    arguments = ["--data", DATA, "--images", 2, "--start", 1, "--method", "grad_cam", "--show", *show]
    call(*arguments, "--method", "calm_attribution", "--out", tmp_path / "a.png")
    assert "skipped calm_attribution: CALM's maps need a network" in capsys.readouterr().err
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 2 * 128
        assert np.asarray(picture.convert("L")).max() == 255
    told = json.loads((tmp_path / "a.json").read_text())
    assert [one["index"] for one in told["images"]] == [1, 2]
    assert [one["id"] for one in told["images"]] == ["creatures-plain-test-00001-s0", "creatures-plain-test-00002-s0"]
    assert [one["explained"] for one in told["images"]] == ["dot-headed pip", "amber-backed pip"]
    assert told["methods"]["grad_cam"]["arguments"] == {"score": "logit"}
    assert list(told["skipped"]) == ["calm_attribution"]
    assert told["arguments"]["data"]["split"] == "test"
    assert told["model"] == {"name": "mini_resnet", "classes": 20}
    assert torch.__version__.startswith(told["versions"]["torch"])
    assert told["show"] == show[0]
    assert told["erase"] == ("color?mean=0.35" if show[0] == "masks" else None)
    assert told["rule"] == ("matched_area" if show[0] in ("masks", "boxes") else None)
    assert ("iou" in told["methods"]["grad_cam"]) == (show[0] == "boxes")
    call(*arguments, "--method", "calm_attribution", "--out", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_each_random_class_gets_a_picture_of_its_own(tmp_path, capsys):
    data = ["--data", "creatures?count=40", "--images", 2, "--out", tmp_path / "c.png"]
    call(*data, "--random-classes", 2, "--seed", 1, "--method", "edge", "--name", "Sobel")
    pages = sorted(tmp_path.glob("*.png"))
    assert len(pages) == 2
    for page in pages:
        told = json.loads(page.with_suffix(".json").read_text())
        name = page.stem.removeprefix("c-").replace("-pip", " pip").replace("-newt", " newt")
        assert {one["explained"] for one in told["images"]} == {name}
        assert len(told["images"]) == 2
        assert told["methods"]["Sobel"]["method"] == "edge"


def test_images_of_one_class_may_be_fewer(tmp_path, capsys):
    call("--data", DATA, "--class", "common pip", "--class", 3, "--method", "edge", "--out", tmp_path / "a.png")
    assert "only 2 of 7 images are there" in capsys.readouterr().err
    assert [one["index"] for one in json.loads((tmp_path / "a.json").read_text())["images"]] == [0, 3]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--class", "orchid newt"], "no image of class orchid newt among images 0 to 5"),
        (["--class", "orchid nwt"], "no class called 'orchid nwt'; did you mean orchid newt"),
        (["--class", "20"], "there are classes 0 to 19, got 20"),
        (["--start", "6"], "the data set has images 0 to 5, got start=6"),
        (["--method", "grad_can"], "no method called 'grad_can'; did you mean grad_cam"),
        (["--method", "edge", "--method", "edge"], "two methods are called 'edge'; tell them apart with --name"),
        (["--name", "a", "--name", "b"], "expected a --name for each of 1 methods, got 2"),
        (["--show", "pairs"], "--show pairs needs --against"),
        (["--show", "pairs", "--against", "moon newt"], "no class called 'moon newt'"),
        (["--show", "masks", "--truth", "mask"], "--truth belongs to --show maps, and this is --show masks"),
        (["--as-is"], "--as-is belongs to --show masks or boxes or pairs or segments, and this is"),
        (["--show", "masks", "--as-is", "--method", "edge"], "--as-is takes maps in [0, 1], and those of edge lie in"),
        (["--show", "boxes", "--rule", "soft"], "--rule soft marks no region that a box could go around"),
        (["--show", "masks", "--erase", "blak"], "no eraser called 'blak'; did you mean black"),
        (["--show", "masks", "--erase", "color"], "expected a color in [0, 1], color?mean=0.35"),
        (["--show", "masks", "--erase", "color?mean=35"], "expected a color in [0, 1]"),
        (["--class", "3", "--random-classes", "2"], "give one of them"),
        (["--random-classes", "21"], "expected 1 to 20 random classes, got 21"),
        (["--random-classes", "20", "--show", "pairs", "--against", "3"], "expected 1 to 19 random classes, got 20"),
        (["--out", "picture.jpg"], "the picture is a PNG, got --out picture.jpg"),
    ],
)
def test_errors_teach(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((LookupError, ValueError)) as error:
        call("--data", DATA, *arguments)
    assert sentence in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_method_that_does_not_suit_is_an_error_where_it_is_the_only_one(tmp_path):
    with pytest.raises(UnsuitedError, match="CALM's maps need a network"):
        call("--data", DATA, "--method", "calm_attribution", "--out", tmp_path / "a.png")


def test_files_are_called_by_the_parts_of_their_paths_that_matter():
    files = [Choice("runs/L/casm.safetensors"), Choice("runs/F/casm.safetensors"), Choice("opti_cam", {"steps": 5})]
    assert titled(files, ()) == ("L/casm", "F/casm", "opti_cam(steps=5)")
    assert titled(files[:1], ()) == ("casm",)
    assert titled(files, ("a", "b", "c")) == ("a", "b", "c")


def test_a_color_is_one_number_or_one_a_channel():
    x = torch.rand(1, 3, 2, 2)
    for text, mean in (("color?mean=0.35", (0.35,)), ("color?mean=[0, 0.5, 1]", (0.0, 0.5, 1.0))):
        fill = eraser(text)
        assert not isinstance(fill, str)
        assert torch.equal(fill(x, x[:, :1]), color(x, x[:, :1], mean=mean))
    assert eraser("black") == "black"
