import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sightline.data import batches
from sightline.datasets import voc
from sightline.datasets._voc import CLASSES, plane, things
from sightline.images import ImageError

DATA = Path(__file__).parents[2] / "shared" / "data"
CAR, CAT, COW = (CLASSES.index(name) for name in ("car", "cat", "cow"))
POLICIES = ("direct", "crop", "crop256")


def needs(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"../shared/data/{name} is absent")
    return DATA / name


def object_of(name, box, difficult=None):
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>{name}</name>{flag}<bndbox>{corners}</bndbox>{part}</object>"


class Devkit:
    """A development kit that grows by one scene at a time: rectangles on black, each of a class."""

    def __init__(self, root, year="2012", *, xml=True, instances=True):
        self.home, self.xml, self.instances = root / "VOCdevkit" / f"VOC{year}", xml, instances
        self.folders = {name: self.home / name for name in ("JPEGImages", "SegmentationClass")}
        self.folders |= {"SegmentationObject": self.home / "SegmentationObject"} if instances else {}
        self.folders |= {"Annotations": self.home / "Annotations"} if xml else {}
        for folder in (*self.folders.values(), *(self.home / "ImageSets" / f for f in ("Segmentation", "Main"))):
            folder.mkdir(parents=True, exist_ok=True)

    def scene(self, name, rectangles, *, split="val", size=(40, 60), void=()):
        """Add rectangles (class, x0, y0, x1, y1, difficult), half-open, and void ones."""
        image, mask, numbers = (np.zeros(size, np.uint8) for _ in range(3))
        for number, (label, x0, y0, x1, y1, _) in enumerate(rectangles, start=1):
            area = slice(y0, y1), slice(x0, x1)
            image[area], mask[area], numbers[area] = 255, label + 1, number
        for x0, y0, x1, y1 in void:
            mask[y0:y1, x0:x1] = numbers[y0:y1, x0:x1] = 255
        Image.fromarray(np.repeat(image[:, :, None], 3, 2)).save(self.home / "JPEGImages" / f"{name}.jpg", quality=100)
        for folder, plane_of in (("SegmentationClass", mask), ("SegmentationObject", numbers)):
            if folder in self.folders:
                picture = Image.fromarray(plane_of, "P")
                picture.putpalette([value * 37 % 256 for value in range(768)])
                picture.save(self.home / folder / f"{name}.png")
        if self.xml:
            objects = [
                object_of(CLASSES[label], (x0 + 1, y0 + 1, x1, y1), int(hard))
                for label, x0, y0, x1, y1, hard in rectangles
            ]
            text = f"<annotation><filename>{name}.jpg</filename>{''.join(objects)}</annotation>"
            (self.home / "Annotations" / f"{name}.xml").write_text(text)
        for folder in ("Segmentation", "Main"):
            with (self.home / "ImageSets" / folder / f"{split}.txt").open("a") as file:
                file.write(f"{name}\n")
        return self


def tight(region):
    rows, columns = np.nonzero(np.asarray(region))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def hull(boxes):
    return [*boxes[:, :2].min(0).values.tolist(), *boxes[:, 2:].max(0).values.tolist()]


@pytest.mark.parametrize("xml", [True, False])
def test_a_segmentation_is_read_as_it_was_drawn(tmp_path, xml):
    kit = Devkit(tmp_path, xml=xml)
    kit.scene("a", [(CAR, 4, 6, 24, 16, 0), (CAT, 30, 10, 50, 36, 1)], void=[(0, 0, 2, 40)])
    data = voc(tmp_path, size=(40, 60))
    (sample,) = data
    assert (len(data), data.classes, data.skipped) == (1, CLASSES, {})
    assert (sample.id, sample.label, sample.size) == ("a.jpg", CAT, (40, 60))
    assert sample.labels.nonzero().flatten().tolist() == [CAR, CAT]
    torch.testing.assert_close(sample.boxes, torch.tensor([[4.0, 6, 24, 16], [30, 10, 50, 36]]))
    assert sample.box_labels.tolist() == [CAR, CAT]
    assert sample.difficult.tolist() == [False, xml]
    expected, numbers = np.zeros((40, 60), int), np.zeros((40, 60), int)
    for plane_of, values in ((expected, (CAR + 1, CAT + 1)), (numbers, (1, 2))):
        plane_of[6:16, 4:24], plane_of[10:36, 30:50], plane_of[:, :2] = (*values, 255)
    assert np.array_equal(sample.mask.numpy(), expected)
    assert np.array_equal(sample.instances.numpy(), numbers)
    region, counted = sample.region_of(CAT)
    assert int(region.sum()) == 20 * 26
    assert int((~counted).sum()) == 80


@pytest.mark.parametrize("xml", [True, False])
@pytest.mark.parametrize("resize", POLICIES)
@pytest.mark.parametrize("size", [(56, 56), (80, 120), (30, 70)])
def test_image_boxes_mask_and_instances_move_together(tmp_path, resize, size, xml):
    Devkit(tmp_path, xml=xml).scene("a", [(COW, 30, 20, 66, 44, 0)], size=(64, 96))
    sample = voc(tmp_path, size=size, resize=resize)[0]
    assert sample.image.shape[1:] == sample.mask.shape == sample.instances.shape == size
    (box,) = sample.boxes_of(COW).tolist()
    inside = np.clip(box, 0, [size[1], size[0], size[1], size[0]])
    for region in (sample.image[0] > 0.5, sample.mask == COW + 1, sample.instances == 1):
        assert np.abs(tight(region) - inside).max() <= 1


def test_at_scale_one_the_crop_is_exact_and_boxes_reach_outside(tmp_path):
    Devkit(tmp_path).scene("a", [(COW, 0, 20, 66, 44, 0)], size=(64, 96))
    sample = voc(tmp_path, size=56, resize="crop256")[0]
    assert sample.boxes.tolist() == [[-20, 16, 46, 40]]
    assert tight(sample.mask == COW + 1) == tight(sample.image[0] > 0.5) == [0, 16, 46, 40]


def test_detection_takes_labels_from_boxes_and_has_no_mask(tmp_path):
    kit = Devkit(tmp_path, "2007")
    kit.scene("a", [(CAR, 0, 0, 60, 30, 1), (CAT, 2, 2, 12, 12, 0), (COW, 20, 2, 40, 10, 0)], split="test")
    kit.scene("b", [(CAR, 0, 0, 10, 10, 1), (CAT, 2, 2, 32, 32, 1)], split="test")
    first, second = voc(tmp_path, "test", year=2007, task="detection", size=(40, 60))
    assert (first.label, second.label) == (COW, CAT)
    assert first.labels.nonzero().flatten().tolist() == [CAR, CAT, COW]
    assert first.difficult.tolist() == [True, False, False]
    assert first.boxes_of(CAT).tolist() == [[2, 2, 12, 12]]
    assert first.boxes_of(0).shape == (0, 4)
    assert first.mask is None
    assert first.instances is None


def test_boxes_are_counted_from_one_inclusive_and_parts_are_no_objects(tmp_path):
    path = tmp_path / "a.xml"
    whole = "<annotation>{}</annotation>"
    path.write_text(whole.format(object_of("dog", (1, 1, 1, 1)) + object_of("cat", ("5.5", "2", "7.25", "9"), 1)))
    assert things(path) == (("dog", (0, 0, 1, 1), False), ("cat", (4.5, 1, 7.25, 9), True))


def test_without_xml_and_instances_boxes_come_from_the_mask_alone(tmp_path):
    Devkit(tmp_path, xml=False, instances=False).scene("a", [(CAR, 4, 6, 24, 16, 0), (CAR, 30, 6, 34, 10, 0)])
    sample = voc(tmp_path, size=(40, 60))[0]
    assert sample.boxes is None
    assert sample.box_labels is None
    assert sample.difficult is None
    assert sample.instances is None
    assert sample.boxes_of(CAR).tolist() == [[4, 6, 34, 16]]


def test_the_void_has_no_box_in_either_plane(tmp_path):
    kit = Devkit(tmp_path, xml=False).scene("a", [(CAR, 4, 6, 24, 16, 0), (CAT, 30, 6, 34, 10, 0)])
    path = kit.home / "SegmentationClass" / "a.png"
    mask = np.array(Image.open(path))
    mask[:, 30:] = 255
    Image.fromarray(mask).save(path)
    path = kit.home / "SegmentationObject" / "a.png"
    numbers = np.array(Image.open(path))
    numbers[14:16] = 255
    Image.fromarray(numbers).save(path)
    sample = voc(tmp_path, size=(40, 60))[0]
    assert sample.boxes.tolist() == [[4, 6, 24, 14]]
    assert sample.box_labels.tolist() == [CAR]


@pytest.mark.parametrize("where", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_root_may_be_any_of_three_folders(tmp_path, where):
    Devkit(tmp_path).scene("a", [(CAR, 4, 6, 24, 16, 0)])
    assert voc(tmp_path / where, size=8)[0].label == CAR


def test_lists_of_ones_own_may_name_masks(tmp_path):
    kit = Devkit(tmp_path)
    for name, label in (("a", CAR), ("b", CAT), ("c", COW)):
        kit.scene(name, [(label, 4, 6, 24, 16, 0)])
    augmented = kit.home / "SegmentationClassAug"
    augmented.mkdir()
    Image.fromarray(np.full((40, 60), 3, np.uint8)).save(augmented / "c.png")
    (tmp_path / "mine.txt").write_text("/JPEGImages/c.jpg /SegmentationClassAug/c.png\n\n/JPEGImages/a.jpg\n")
    data = voc(tmp_path, listing=tmp_path / "mine.txt", size=8)
    assert [(sample.id, sample.label) for sample in data] == [("c.jpg", 2), ("a.jpg", CAR)]
    (kit.home / "ImageSets" / "Segmentation" / "aug.txt").write_text("c\n")
    assert [s.label for s in voc(tmp_path, listing="aug.txt", masks="SegmentationClassAug", size=8)] == [2]
    assert [s.label for s in voc(tmp_path, listing="aug.txt", size=8)] == [COW]


def test_count_and_batches_and_pickles(tmp_path):
    kit = Devkit(tmp_path)
    for number in range(5):
        kit.scene(str(number), [(number, 4, 6, 24, 16, 0)])
    data = pickle.loads(pickle.dumps(voc(tmp_path, size=8)))
    assert [batch.y.tolist() for batch in batches(data, 2)] == [[0, 1], [2, 3], [4]]
    assert voc(tmp_path, size=8, count=2).files == ("0.jpg", "2.jpg")
    assert data[-1].id == "4.jpg"
    with pytest.raises(IndexError):
        _ = data[5]
    with pytest.raises(ValueError, match="there are 5 images, got 6"):
        voc(tmp_path, count=6)


@pytest.fixture
def damaged(tmp_path):
    """One good scene and one of every kind of damage."""
    kit = Devkit(tmp_path)
    names = (
        "good",
        "image",
        "gone",
        "mask",
        "lost",
        "color",
        "strange",
        "void",
        "small",
        "xml",
        "class",
        "box",
        "bare",
    )
    for name in names:
        kit.scene(name, [(CAR, 4, 6, 24, 16, 0)])
    folder = kit.home / "SegmentationClass"
    (kit.home / "JPEGImages" / "image.jpg").write_bytes(b"")
    (kit.home / "JPEGImages" / "gone.jpg").unlink()
    (folder / "mask.png").write_bytes((folder / "good.png").read_bytes()[:-40])
    (folder / "lost.png").unlink()
    Image.new("RGB", (60, 40)).save(folder / "color.png")
    for name, size, value in (("strange", (40, 60), 21), ("void", (40, 60), 255), ("small", (20, 30), 1)):
        Image.fromarray(np.full(size, value, np.uint8)).save(folder / f"{name}.png")
    (kit.home / "Annotations" / "xml.xml").write_text("<annotation><object>")
    for name, text in (("class", object_of("unicorn", (1, 1, 2, 2))), ("box", object_of("car", (9, 1, 2, 2)))):
        (kit.home / "Annotations" / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")
    (kit.home / "Annotations" / "bare.xml").write_text("<annotation><object><name>car</name></object></annotation>")
    return tmp_path


def test_damaged_scenes_are_skipped_with_their_reasons(damaged):
    data = voc(damaged, size=8)
    reasons = {
        "image.jpg": "image.jpg is empty (0 bytes)",
        "gone.jpg": "there is no file",
        "mask.jpg": "mask.png cannot be decoded",
        "lost.jpg": "there is no file",
        "color.jpg": "color.png is a picture in mode RGB; expected a palette or gray PNG of numbers",
        "strange.jpg": "strange.png has the number 21; expected 0 to 20, and 255",
        "void.jpg": "void.png shows no object",
        "small.jpg": "small.png is 20 x 30, its image 40 x 60; both must have one size",
        "xml.jpg": "xml.xml is damaged: ",
        "class.jpg": "class.xml is damaged: no class of VOC called 'unicorn'",
        "box.jpg": "box.xml is damaged: box 9 1 2 2; expected objects with name and bndbox",
        "bare.jpg": "bare.xml is damaged: could not convert string to float",
    }
    assert data.files == ("good.jpg",)
    assert data[0].label == CAR
    assert data.skipped.keys() == reasons.keys()
    for file, reason in reasons.items():
        assert reason in data.skipped[file]


def test_what_slips_through_is_named_when_asked_for(damaged):
    data = voc(damaged, size=8, check="none")
    assert set(data.skipped) == {"xml.jpg", "class.jpg", "box.jpg", "bare.jpg"}
    for name in ("image", "mask", "color", "strange", "void"):
        with pytest.raises(ImageError, match=rf"{name}\..*; check='decode' skips such files"):
            _ = data[data.files.index(f"{name}.jpg")]
    with pytest.raises(FileNotFoundError, match=r"there is no file .*lost\.png"):
        _ = data[data.files.index("lost.jpg")]
    header = voc(damaged, size=8, check="header")
    assert {"image.jpg", "gone.jpg", "lost.jpg"} <= set(header.skipped)
    assert "void.jpg" in header.files


def test_nothing_usable_is_an_error(tmp_path):
    kit = Devkit(tmp_path).scene("a", [(CAR, 4, 6, 24, 16, 0)])
    Image.new("L", (60, 40)).save(kit.home / "SegmentationClass" / "a.png")
    with pytest.raises(ValueError, match=r"none of the 1 masks of .* can be used; the first: .*a\.png shows no object"):
        voc(tmp_path)
    (kit.home / "Annotations" / "a.xml").write_text("<annotation/>")
    with pytest.raises(ValueError, match=r"none of the 1 files in .*Annotations can be used; .*a\.xml lists no object"):
        voc(tmp_path, task="detection")
    (kit.home / "ImageSets" / "Segmentation" / "val.txt").write_text("")
    with pytest.raises(ValueError, match="there are no images to choose from"):
        voc(tmp_path)


def test_unknown_names(tmp_path):
    Devkit(tmp_path).scene("a", [(CAR, 4, 6, 24, 16, 0)])
    for settings, text in (
        ({"split": "vall"}, "no split of VOC called 'vall'; did you mean val"),
        ({"year": "2013"}, "no year of VOC called '2013'"),
        ({"task": "detect"}, "no task of VOC called 'detect'; did you mean detection"),
        ({"resize": "croop"}, "no resize policy called"),
        ({"check": "headers"}, "no check called"),
    ):
        with pytest.raises(LookupError, match=text):
            voc(tmp_path, **settings)


def test_missing_folders_and_lists_say_how_they_must_look(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; expected root/VOCdevkit"):
        voc(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no VOC2012/JPEGImages in .*; expected root/VOCdevkit"):
        voc(tmp_path)
    kit = Devkit(tmp_path, xml=False).scene("a", [(CAR, 4, 6, 24, 16, 0)])
    with pytest.raises(FileNotFoundError, match=r"no train\.txt in .*Segmentation \(lists there: val\.txt\); expected"):
        voc(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"no Annotations in .*VOC2012; expected"):
        voc(tmp_path, task="detection")
    (kit.home / "SegmentationClass").rename(kit.home / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no SegmentationClass in .*VOC2012; expected"):
        voc(tmp_path)
    (kit.home / "ImageSets" / "Segmentation" / "val.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"val\.txt is damaged: "):
        voc(tmp_path)


def test_the_lists_masks_and_boxes_are_torchvisions(tmp_path):
    from torchvision.datasets import VOCDetection, VOCSegmentation

    kit = Devkit(tmp_path)
    for number in range(3):
        kit.scene(str(number), [(number, 4, 6, 24 + number, 16, 0), (CAT, 30, 6, 40, 10, 1)])
    ours = voc(tmp_path, size=(40, 60))
    segmented, detected = (theirs(str(tmp_path), image_set="val") for theirs in (VOCSegmentation, VOCDetection))
    assert [Path(path).name for path in segmented.images] == list(ours.files)
    for sample, (image, mask), (_, tree) in zip(ours, segmented, detected, strict=True):
        assert np.array_equal(sample.mask.numpy(), np.array(mask))
        assert np.abs(sample.image.permute(1, 2, 0).numpy() * 255 - np.array(image)).max() < 1e-3
        for box, row in zip(sample.boxes.tolist(), tree["annotation"]["object"], strict=True):
            corners = [float(row["bndbox"][edge]) for edge in ("xmin", "ymin", "xmax", "ymax")]
            assert box == [corners[0] - 1, corners[1] - 1, *corners[2:]]


def test_a_plane_is_read_as_numbers_not_colors(tmp_path):
    picture = Image.fromarray(np.array([[0, 7], [255, 3]], np.uint8), "P")
    picture.putpalette([9] * 768)
    picture.save(tmp_path / "a.png")
    assert plane(tmp_path / "a.png", (2, 2)).tolist() == [[0, 7], [255, 3]]


@pytest.mark.parametrize(("split", "length"), [("train", 77), ("val", 78)])
def test_coco_in_the_layout_of_voc(split, length):
    from torchvision.datasets import VOCSegmentation

    root = needs("coco128-voc")
    data, theirs = voc(root, split, size=96), VOCSegmentation(str(root), image_set=split)
    assert len(data) == length
    assert data.skipped == {}
    assert [Path(path).name for path in theirs.images] == list(data.files)
    for index in range(0, length, 5):
        sample, mask = data[index], np.array(theirs[index][1])
        present = sorted(set(mask.flatten().tolist()) - {0, 255})
        assert (sample.labels.nonzero().flatten() + 1).tolist() == present
        assert sample.labels[sample.label] == 1
        assert (mask == sample.label + 1).sum() == max((mask == value).sum() for value in present)
        assert set(sample.box_labels.tolist()) == {value - 1 for value in present}
        numbers = [n for n in sample.instances.unique().tolist() if n not in (0, 255)]
        assert len(numbers) <= len(sample.boxes)
        for label in present:
            seen = sample.mask == label
            assert tight(mask == label) == hull(replace(data, size=mask.shape)[index].boxes_of(label - 1))
            if seen.any():  # nearest neighbor drops what is thinner than a pixel, so the hull may be larger
                box, outer = tight(seen), hull(sample.boxes_of(label - 1))
                assert (np.subtract(box, outer) * [1, 1, -1, -1]).min() >= -1
