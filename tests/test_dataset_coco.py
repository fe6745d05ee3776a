import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as outlines

from sightline.data import batches
from sightline.datasets import coco
from sightline.images import ImageError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools

DATA = Path(__file__).parents[2] / "shared" / "data"
POLICIES = ("direct", "crop", "crop256")
CATEGORIES = {90: "toothbrush", 1: "person", 3: "car"}
PERSON, CAR, BRUSH = range(3)
"""Classes in the order of the numbers 1, 3, 90."""


def needs(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"../shared/data/{name} is absent")
    return DATA / name


def polygon(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def run_lengths(x0, y0, x1, y1, size):
    """Counts of pixels, column by column, that are out, in, out, ..."""
    plane = np.zeros(size, int)
    plane[y0:y1, x0:x1] = 1
    flat = plane.flatten(order="F")
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
    counts = np.diff(edges).tolist()
    return {"counts": counts if flat[0] == 0 else [0, *counts], "size": list(size)}


def thing(category, x0, y0, x1, y1, shape="polygon", size=(40, 60), **more):
    forms = {
        "polygon": lambda: polygon(x0, y0, x1, y1),
        "counts": lambda: run_lengths(x0, y0, x1, y1, size),
        "packed": lambda: _packed(run_lengths(x0, y0, x1, y1, size)),
        "none": list,
    }
    row = {"category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0, "area": (x1 - x0) * (y1 - y0)}
    return row | {"segmentation": forms[shape]()} | more


def _packed(counts):
    packed = outlines.frPyObjects(counts, *counts["size"])
    return packed | {"counts": packed["counts"].decode()}


def tree(root, images, *, split="val2017", size=(40, 60), folder=""):
    """Write images (name -> rows); what is no crowd is white on black."""
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in CATEGORIES.items()]}
    (root / folder / split).mkdir(parents=True)
    for index, (name, rows) in enumerate(images.items()):
        pixels = np.zeros((*size, 3), np.uint8)
        for row in rows:
            x, y, w, h = row["bbox"]
            pixels[y : y + h, x : x + w] = 0 if row["iscrowd"] else 255
            content["annotations"].append(row | {"id": len(content["annotations"]), "image_id": 700 - index})
        Image.fromarray(pixels).save(root / folder / split / name, quality=100)
        content["images"].append({"id": 700 - index, "file_name": name, "height": size[0], "width": size[1]})
    return write(root, content, split)


def write(root, content, split="val2017"):
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def content_of(root, split="val2017"):
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def tight(region):
    rows, columns = np.nonzero(np.asarray(region))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("shape", ["polygon", "counts", "packed"])
@pytest.mark.parametrize("reverse", [False, True])
def test_an_image_is_read_as_it_was_drawn(tmp_path, shape, reverse):
    rows = [thing(3, 4, 6, 44, 36, shape), thing(90, 10, 10, 20, 20, shape), thing(1, 50, 0, 60, 10, shape)]
    tree(tmp_path, {"a.jpg": rows[::-1] if reverse else rows})
    data = coco(tmp_path, size=(40, 60))
    (sample,) = data
    assert (data.classes, data.skipped, len(data)) == (("person", "car", "toothbrush"), {}, 1)
    assert (sample.id, sample.label, sample.size) == ("a.jpg", CAR, (40, 60))
    assert sample.labels.tolist() == [1, 1, 1]
    order = [PERSON, BRUSH, CAR] if reverse else [CAR, BRUSH, PERSON]
    assert sample.box_labels.tolist() == order
    assert sample.boxes_of(CAR).tolist() == [[4, 6, 44, 36]]
    assert sample.boxes_of(BRUSH).tolist() == [[10, 10, 20, 20]]
    mask, numbers = np.zeros((40, 60), int), np.zeros((40, 60), int)
    for label, (x0, y0, x1, y1) in ((CAR, (4, 6, 44, 36)), (BRUSH, (10, 10, 20, 20)), (PERSON, (50, 0, 60, 10))):
        mask[y0:y1, x0:x1], numbers[y0:y1, x0:x1] = label + 1, order.index(label) + 1
    assert np.array_equal(sample.mask.numpy(), mask)
    assert np.array_equal(sample.instances.numpy(), numbers)
    assert sample.difficult is None


@pytest.mark.parametrize("resize", POLICIES)
@pytest.mark.parametrize("size", [(56, 56), (80, 120), (30, 70)])
def test_image_box_mask_and_instances_move_together(tmp_path, resize, size):
    tree(tmp_path, {"a.jpg": [thing(3, 30, 20, 66, 44)]}, size=(64, 96))
    sample = coco(tmp_path, size=size, resize=resize)[0]
    assert sample.image.shape[1:] == sample.mask.shape == sample.instances.shape == size
    (box,) = sample.boxes.tolist()
    inside = np.clip(box, 0, [size[1], size[0], size[1], size[0]])
    for region in (sample.image[0] > 0.5, sample.mask == CAR + 1, sample.instances == 1):
        assert np.abs(tight(region) - inside).max() <= 1


def test_at_scale_one_boxes_reach_outside_the_crop(tmp_path):
    tree(tmp_path, {"a.jpg": [thing(3, 0, 20, 66, 44)]}, size=(64, 96))
    sample = coco(tmp_path, size=56, resize="crop256")[0]
    assert sample.boxes.tolist() == [[-20, 16, 46, 40]]
    assert tight(sample.mask == CAR + 1) == [0, 16, 46, 40]


def test_the_label_has_the_largest_area_together(tmp_path):
    small = [thing(1, 10 * i, 0, 10 * i + 10, 20) for i in range(3)]
    tree(tmp_path, {"a.jpg": [thing(3, 0, 20, 25, 40), *small], "b.jpg": [thing(3, 0, 0, 5, 5), thing(1, 5, 0, 10, 5)]})
    assert [(s.id, s.label) for s in coco(tmp_path, size=8)] == [("b.jpg", PERSON), ("a.jpg", PERSON)]


def test_crowds_are_ignored_or_objects(tmp_path):
    crowd = thing(1, 0, 0, 30, 40, "counts", iscrowd=1)
    tree(tmp_path, {"a.jpg": [thing(3, 20, 0, 40, 40), crowd], "b.jpg": [crowd]})
    (ignored,) = data = coco(tmp_path, size=(40, 60))
    expected = np.zeros((40, 60), int)
    expected[:, :30], expected[:, 20:40] = 255, CAR + 1
    assert np.array_equal(ignored.mask.numpy(), expected)
    assert np.array_equal(ignored.instances.numpy(), np.where(expected == CAR + 1, 1, expected))
    assert (ignored.label, ignored.labels.tolist(), ignored.box_labels.tolist()) == (CAR, [1, 1, 0], [CAR])
    assert ignored.boxes_of(PERSON).shape == (0, 4)
    text = "1 of 2 images show no object and are left out; unlabeled=True keeps them"
    assert data.skipped == {"instances_val2017.json": text}
    alone, both = coco(tmp_path, size=(40, 60), crowd="object")
    assert (alone.label, both.label) == (PERSON, PERSON)
    assert both.box_labels.tolist() == [CAR, PERSON]
    assert both.mask.unique().tolist() == [0, PERSON + 1, CAR + 1]
    assert set(both.mask[:, 20:40].unique().tolist()) == {CAR + 1}


def test_images_without_objects_are_left_out_before_anything_is_counted(tmp_path):
    tree(tmp_path, {"a.jpg": [], "b.jpg": [thing(3, 4, 6, 24, 16)], "c.jpg": [], "d.jpg": [thing(1, 4, 6, 24, 16)]})
    data = coco(tmp_path, size=8, count=2)
    assert [sample.id for sample in data] == ["d.jpg", "b.jpg"]
    assert data.skipped["instances_val2017.json"].startswith("2 of 4 images show no object")
    kept = coco(tmp_path, size=8, unlabeled=True)
    assert [sample.label for sample in kept] == [PERSON, None, CAR, None]
    assert kept.skipped == {}
    assert kept[1].labels.tolist() == [0, 0, 0]
    assert kept[1].boxes.shape == (0, 4)
    assert kept[1].mask.unique().tolist() == [0]
    assert next(batches(kept, 4)).y is None


def test_objects_without_outlines_give_boxes_alone(tmp_path):
    rows = [thing(3, 4, 6, 24, 16, "none"), thing(1, 30, 6, 40, 16)]
    del rows[0]["area"]
    tree(tmp_path, {"a.jpg": rows})
    sample = coco(tmp_path, size=(40, 60))[0]
    assert sample.mask is None
    assert sample.instances is None
    assert sample.boxes.tolist() == [[4, 6, 24, 16], [30, 6, 40, 16]]
    assert sample.label == CAR


def test_polygons_are_united_and_too_short_ones_dropped(tmp_path):
    two = [*polygon(0, 0, 10, 10), [50, 30, 9, 9], *polygon(20, 20, 30, 30)]
    rows = [thing(3, 0, 0, 30, 30) | {"segmentation": two}, thing(1, 0, 0, 2, 2) | {"segmentation": [[1, 1, 2, 2]]}]
    tree(tmp_path, {"a.jpg": rows})
    sample = coco(tmp_path, size=(40, 60))[0]
    expected = np.zeros((40, 60), int)
    expected[:10, :10] = expected[20:30, 20:30] = CAR + 1
    assert np.array_equal(sample.mask.numpy(), expected)


def test_more_objects_than_a_plane_has_numbers_leave_out_255(tmp_path):
    rows = [thing(3, i % 60, i // 60, i % 60 + 1, i // 60 + 1, "counts") for i in range(300)]
    tree(tmp_path, {"a.jpg": rows})
    sample = coco(tmp_path, size=(40, 60))[0]
    numbers = sample.instances.flatten()[:300].tolist()
    assert numbers == [*range(1, 255), *range(256, 302)]


def test_years_splits_folders_and_lists(tmp_path):
    tree(tmp_path, {"COCO_train2014_1.jpg": [thing(3, 4, 6, 24, 16)]}, split="train2014", folder="images")
    assert coco(tmp_path, "train", year=2014, size=8)[0].id == "COCO_train2014_1.jpg"
    (tmp_path / "annotations" / "instances_train2014.json").rename(tmp_path / "mine.json")
    assert len(coco(tmp_path, "train", year="2014", annotations=tmp_path / "mine.json", size=8)) == 1
    with pytest.raises(
        FileNotFoundError, match=r"no instances_train2014\.json in .*annotations; expected root/<split>"
    ):
        coco(tmp_path, "train", year="2014")
    with pytest.raises(FileNotFoundError, match=r"no val2017 in .*; expected root/<split><year>"):
        coco(tmp_path, annotations=tmp_path / "mine.json")


def test_batches_pickles_and_silence(tmp_path, capsys):
    tree(tmp_path, {f"{n}.jpg": [thing((1, 3, 90)[n % 3], 4, 6, 24, 16)] for n in range(5)})
    data = pickle.loads(pickle.dumps(coco(tmp_path, size=8)))
    assert [batch.y.tolist() for batch in batches(data, 2)] == [[1, 0], [2, 1], [0]]
    assert [sample.id for sample in coco(tmp_path, size=8, count=2)] == ["4.jpg", "2.jpg"]
    with pytest.raises(ValueError, match="there are 5 images, got 6"):
        coco(tmp_path, count=6)
    with pytest.raises(IndexError):
        _ = data[5]
    assert capsys.readouterr() == ("", "")


def test_broken_images_are_skipped(tmp_path):
    tree(tmp_path, {f"{n}.jpg": [thing(3, 4, 6, 24, 16)] for n in range(3)})
    (tmp_path / "val2017" / "0.jpg").write_bytes(b"")
    (tmp_path / "val2017" / "1.jpg").unlink()
    data = coco(tmp_path, size=8)
    assert [sample.id for sample in data] == ["2.jpg"]
    assert "is empty (0 bytes)" in data.skipped["0.jpg"]
    assert "there is no file" in data.skipped["1.jpg"]
    with pytest.raises(ImageError, match="check='decode' skips such files"):
        _ = coco(tmp_path, size=8, check="none")[2]


def test_images_and_outlines_of_another_size_are_errors(tmp_path):
    tree(tmp_path, {"a.jpg": [thing(3, 4, 6, 24, 16)], "b.jpg": [thing(3, 4, 6, 24, 16, "counts", (20, 30))]})
    Image.new("RGB", (30, 20)).save(tmp_path / "val2017" / "a.jpg")
    data = coco(tmp_path, size=8)
    with pytest.raises(ValueError, match=r"an outline of .*b\.jpg is .*20, 30.*, its image .*40, 60"):
        _ = data[0]
    with pytest.raises(ValueError, match=r"a\.jpg is 20 x 30, by its annotations 40 x 60; fetch the original images"):
        _ = data[1]


@pytest.mark.parametrize("shape", [{"size": [40, 60]}, {"counts": ["a"], "size": [40, 60]}, [["x"] * 8], "text"])
def test_damaged_outlines_are_named_when_asked_for(tmp_path, shape):
    tree(tmp_path, {"a.jpg": [thing(3, 4, 6, 24, 16) | {"segmentation": shape}]})
    data = coco(tmp_path, size=8)
    with pytest.raises(ValueError, match=r"an outline of .*a\.jpg is damaged: .*; fetch the annotations again"):
        _ = data[0]


def test_damaged_lists(tmp_path):
    tree(tmp_path, {"a.jpg": [thing(3, 4, 6, 24, 16)]})
    whole = content_of(tmp_path)
    row = whole["annotations"][0]
    for content, text in (
        (json.dumps(whole)[:-20], "is damaged: "),
        ("[]", "is damaged: list indices"),
        ({"images": [], "categories": []}, "is damaged: no 'annotations'; expected images, annotations and categories"),
        (whole | {"annotations": [row | {"category_id": 2}]}, "is damaged: category 2 of an annotation is not listed"),
        (whole | {"annotations": [row | {"bbox": [1, 2]}]}, "is damaged: not enough values"),
        (whole | {"annotations": [row | {"bbox": None}]}, "is damaged: "),
        (whole | {"images": [{"id": 1, "file_name": "a.jpg"}]}, "is damaged: no 'height'"),
        (whole | {"categories": [{"id": i, "name": str(i)} for i in range(255)]}, "has 255 classes; a mask holds 254"),
        (whole | {"images": []}, "there are no images to choose from"),
    ):
        write(tmp_path, content)
        with pytest.raises(ValueError, match=text):
            coco(tmp_path)
    write(tmp_path, whole | {"annotations": [row, row | {"image_id": 12345}]})
    assert len(coco(tmp_path, size=8)) == 1


def test_unknown_names_and_folders(tmp_path):
    tree(tmp_path, {"a.jpg": [thing(3, 4, 6, 24, 16)]})
    for settings, text in (
        ({"split": "test"}, "no split of COCO called 'test'"),
        ({"year": "2015"}, "no year of COCO called '2015'"),
        ({"crowd": "ignored"}, "no treatment of crowds called 'ignored'; did you mean ignore"),
        ({"resize": "croop"}, "no resize policy called"),
        ({"check": "headers"}, "no check called"),
    ):
        with pytest.raises(LookupError, match=text):
            coco(tmp_path, **settings)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; expected root/<split>"):
        coco(tmp_path / "nowhere")


def test_without_pycocotools_the_message_says_what_to_install(tmp_path, monkeypatch):
    tree(tmp_path, {"a.jpg": [thing(3, 4, 6, 24, 16)]})
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r'COCO is read by pycocotools: pip install "sightline\[coco\]"'):
        coco(tmp_path)


def test_torchvision_reads_the_same_boxes_and_pycocotools_the_same_masks(tmp_path):
    from torchvision.datasets import CocoDetection

    rows = [thing(3, 4, 6, 44, 36), thing(90, 10, 10, 20, 20, "counts"), thing(1, 50, 0, 60, 10, "packed")]
    tree(tmp_path, {"a.jpg": rows, "b.jpg": rows[1:]})
    theirs = CocoDetection(str(tmp_path / "val2017"), str(tmp_path / "annotations" / "instances_val2017.json"))
    for sample, (image, annotations) in zip(coco(tmp_path, size=(40, 60)), theirs, strict=True):
        assert np.abs(sample.image.permute(1, 2, 0).numpy() * 255 - np.array(image)).max() < 1e-3
        for (x0, y0, x1, y1), row in zip(sample.boxes.tolist(), annotations, strict=True):
            assert [x0, y0, x1 - x0, y1 - y0] == row["bbox"]
            drawn = theirs.coco.annToMask(row)
            seen = sample.mask == sample.box_labels[sample.boxes.tolist().index([x0, y0, x1, y1])] + 1
            assert (seen.numpy() <= drawn).all()


def converted(source, root, count):
    """Write panoptic segments of things as COCO instances, and link their images."""
    panoptic = source / "panoptic_segmentation" / "annotations"
    content = json.loads((panoptic / "panoptic_val2017.json").read_text())
    things = {row["id"]: row["name"] for row in content["categories"] if row["isthing"]}
    sizes = {row["id"]: row for row in content["images"]}
    made = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in things.items()]}
    (root / "val2017").mkdir()
    for one in content["annotations"][:count]:
        name = Path(one["file_name"]).with_suffix(".jpg").name
        (root / "val2017" / name).symlink_to(source / "images" / "val2017" / name)
        row = sizes[one["image_id"]]
        made["images"].append({k: row[k] for k in ("id", "height", "width")} | {"file_name": name})
        colors = np.array(Image.open(panoptic / "panoptic_val2017" / one["file_name"])).astype(int)
        numbers = colors @ [1, 256, 65536]
        for segment in one["segments_info"]:
            if segment["category_id"] in things:
                packed = outlines.encode(np.asfortranarray((numbers == segment["id"]).astype(np.uint8)))
                shape = {"counts": packed["counts"].decode(), "size": [int(side) for side in packed["size"]]}
                made["annotations"].append(segment | {"image_id": one["image_id"], "segmentation": shape})
    return write(root, made), made


def test_images_of_the_shared_data_in_the_official_layout(tmp_path):
    root, made = converted(needs("coco128"), tmp_path, 12)
    names = {row["id"]: row["name"] for row in made["categories"]}
    data = coco(root, size=96, crowd="object")
    assert len(data.classes) == 80
    assert (data.classes[0], data.classes[-1]) == ("person", "toothbrush")
    assert len(data) >= 8
    for index, sample in enumerate(data):
        (image,) = (row for row in made["images"] if row["file_name"] == sample.id)
        rows = [row for row in made["annotations"] if row["image_id"] == image["id"]]
        scale = torch.tensor([96 / image["width"], 96 / image["height"]] * 2)
        expected = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows)]) * scale
        torch.testing.assert_close(sample.boxes, expected)
        whole = replace(data, size=sample.size)[index]
        for label in set(whole.box_labels.tolist()):
            region = whole.mask == label + 1
            assert 0 < region.sum() <= sum(r["area"] for r in rows if data.classes[label] == names[r["category_id"]])
        assert sample.labels.sum() == len({row["category_id"] for row in rows})
        for number, box in enumerate(sample.boxes.tolist(), start=1):
            seen = sample.instances == number
            if seen.any():  # nearest neighbor drops what is thinner than a pixel, so the box may be larger
                assert (np.subtract(tight(seen), box) * [1, 1, -1, -1]).min() >= -1
                assert sample.mask[seen].unique().tolist() == [int(sample.box_labels[number - 1]) + 1]
