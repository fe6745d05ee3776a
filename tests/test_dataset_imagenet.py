import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sightline.data import Dataset, batches
from sightline.datasets._imagenet import imagenet, imagenet_v2
from sightline.images import ImageError

DATA = Path(__file__).parents[2] / "shared" / "data"
TENCH, SHARK, HEN = "n01440764", "n01484850", "n01514859"
SMALL, WIDE = (80, 30, 120, 70), (20, 10, 180, 90)
"""Boxes in pictures of 200 x 100."""
MOVED = {
    "direct": ((20, 15, 30, 35), (5, 5, 45, 45)),
    "crop": ((15, 15, 35, 35), (-15, 5, 65, 45)),
    "crop256": ((13.6, 13.1, 36.4, 35.9), (-20.6, 1.7, 70.6, 47.3)),
}
"""Where they are at size 50: squashed by 1/4 and 1/2; halved and 25 cut off; to 114 x 57, 32 and 4 cut off."""


def picture(path: Path, box: tuple[int, ...] = SMALL, *, size: tuple[int, int] = (100, 200), exif: int = 1) -> Path:
    """White where the box is, else black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((*size, 3), np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 255
    tags = Image.Exif()
    tags[274] = exif
    Image.fromarray(pixels).save(path, "JPEG", quality=98, subsampling=0, exif=tags)
    return path


def xml(path: Path, wnid: str, *boxes: tuple[int, ...], size: tuple[int, int] = (100, 200), names=()) -> Path:
    """An ILSVRC annotation of half-open boxes: coordinates from 0, the last pixel inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    things = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c - 1}</xmax><ymax>{d - 1}</ymax></bndbox></object>"
        for name, (a, b, c, d) in zip(names or [wnid] * len(boxes), boxes, strict=True)
    )
    path.write_text(
        f"<annotation><folder>val</folder><filename>{path.stem}</filename>"
        f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>{things}</annotation>"
    )
    return path


def number(n: int) -> str:
    return f"ILSVRC2012_val_{n:08d}"


@pytest.fixture
def root(tmp_path):
    """Two classes in folders, annotated; one picture has two boxes, the training split one annotated picture of two."""
    home = tmp_path / "imagenet"
    for n, wnid, boxes in ((1, SHARK, (SMALL,)), (2, TENCH, (SMALL, WIDE)), (3, TENCH, (WIDE,))):
        picture(home / "val" / wnid / f"{number(n)}.JPEG", boxes[0])
        xml(home / "Annotations" / "CLS-LOC" / "val" / f"{number(n)}.xml", wnid, *boxes)
    picture(home / "val" / "spare" / "x.JPEG")
    for n in (7, 8):
        picture(home / "train" / TENCH / f"{TENCH}_{n}.JPEG")
    xml(home / "Annotations" / "CLS-LOC" / "train" / TENCH / f"{TENCH}_8.xml", TENCH, SMALL)
    return home


def lists(home: Path, names: dict[str, tuple[int, list[tuple[int, ...]]]], size: tuple[int, int] = (100, 200)) -> Path:
    """The WSOL benchmark's lists."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "image_ids.txt").write_text("".join(f"{name}\n" for name in names))
    (home / "class_labels.txt").write_text("".join(f"{name},{label}\n" for name, (label, _) in names.items()))
    (home / "image_sizes.txt").write_text("".join(f"{name},{size[1]},{size[0]}\n" for name in names))
    lines = (f"{name},{','.join(map(str, box))}\n" for name, (_, boxes) in names.items() for box in boxes)
    (home / "localization.txt").write_text("".join(lines))
    return home


def bright(image: torch.Tensor) -> torch.Tensor:
    """The box of what is white."""
    rows, columns = ((image.mean(0) > 0.5).any(axis).nonzero().flatten() for axis in (1, 0))
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


# ImageNet with XML ---------------------------------------------------------------------------------------------------


def test_folders_by_wnid_have_sorted_labels(root):
    data = imagenet(root)
    assert isinstance(data, Dataset)
    assert data.classes == (TENCH, SHARK)
    assert data.files == (f"{TENCH}/{number(2)}.JPEG", f"{TENCH}/{number(3)}.JPEG", f"{SHARK}/{number(1)}.JPEG")
    assert [sample.label for sample in data] == [0, 0, 1]
    assert [sample.id for sample in data] == list(data.files)
    assert data.skipped == {}
    assert all(sample.size == (100, 200) and sample.image.shape == (3, 224, 224) for sample in data)
    assert all(sample.mask is None and sample.box_labels is None for sample in data)


@pytest.mark.parametrize("resize", MOVED)
def test_picture_and_boxes_move_together(root, resize):
    one, two, _ = (imagenet(root, size=50, resize=resize)[index] for index in (2, 0, 1))
    small, wide = (torch.tensor(box, dtype=torch.float32) for box in MOVED[resize])
    torch.testing.assert_close(one.boxes, small[None])
    torch.testing.assert_close(two.boxes, torch.stack([small, wide]))
    assert (bright(one.image) - one.boxes[0]).abs().max() < 0.75


def test_coordinates_count_from_0_and_include_the_last_pixel(root):
    path = root / "Annotations" / "CLS-LOC" / "val" / f"{number(1)}.xml"
    xml(path, SHARK, (0, 0, 200, 100))
    assert "<xmax>199</xmax><ymax>99</ymax>" in path.read_text()
    assert imagenet(root, size=(100, 200))[2].boxes.tolist() == [[0, 0, 200, 100]]
    assert imagenet(root, size=(100, 200), origin=1)[2].boxes.tolist() == [[-1, -1, 199, 99]]
    with pytest.raises(ValueError, match="number 0 or 1, got origin=2"):
        imagenet(root, origin=2)


def test_corners_in_the_wrong_order_are_put_right(root):
    x0, y0, x1, y1 = SMALL
    path = root / "Annotations" / "CLS-LOC" / "val" / f"{number(1)}.xml"
    xml(path, SHARK, (x1 - 1, y0, x0 + 1, y1))
    assert imagenet(root, size=(100, 200))[2].boxes.tolist() == [list(SMALL)]


def test_boxes_follow_a_file_of_another_size(root):
    picture(root / "val" / SHARK / f"{number(1)}.JPEG", (20, 15, 30, 35), size=(50, 50))
    sample = imagenet(root, size=(50, 50))[2]
    assert sample.size == (50, 50)
    assert sample.boxes.tolist() == [[20, 15, 30, 35]]
    path = root / "Annotations" / "CLS-LOC" / "val" / f"{number(1)}.xml"
    path.write_text(path.read_text().replace("<width>200</width>", "<width>0</width>"))
    assert imagenet(root, size=(50, 50))[2].boxes.tolist() == [list(SMALL)]


def test_pictures_are_read_as_stored_like_their_boxes(root):
    picture(root / "val" / SHARK / f"{number(1)}.JPEG", SMALL, exif=6)
    sample = imagenet(root, size=(100, 200))[2]
    assert sample.size == (100, 200)
    assert (bright(sample.image) - sample.boxes[0]).abs().max() < 0.75


def test_objects_of_other_classes_keep_their_names(root):
    path = root / "Annotations" / "CLS-LOC" / "val" / f"{number(1)}.xml"
    xml(path, SHARK, SMALL, WIDE, SMALL, names=(SHARK, TENCH, HEN))
    sample = imagenet(root, size=(100, 200))[2]
    assert sample.box_labels.tolist() == [1, 0, -1]
    assert sample.boxes_of(1).tolist() == [list(SMALL)]
    assert sample.boxes_of(0).tolist() == [list(WIDE)]


def test_an_annotation_without_objects_says_there_is_no_box(root):
    xml(root / "Annotations" / "CLS-LOC" / "val" / f"{number(1)}.xml", SHARK)
    sample = imagenet(root)[2]
    assert sample.boxes.shape == (0, 4)
    assert sample.boxes_of(1).shape == (0, 4)


def test_images_without_annotation_are_skipped_if_boxes_are_wanted(root):
    data = imagenet(root, "train")
    assert data.files == (f"{TENCH}/{TENCH}_8.JPEG",)
    assert data.skipped.keys() == {f"{TENCH}/{TENCH}_7.JPEG"}
    assert "is without XML file in" in data.skipped[f"{TENCH}/{TENCH}_7.JPEG"]
    assert data[0].boxes.shape == (1, 4)
    bare = imagenet(root, "train", boxes="none")
    assert len(bare) == 2
    assert bare[0].boxes is None
    assert bare.skipped == {}


def test_annotations_may_lie_elsewhere(root, tmp_path):
    moved = root / "Annotations" / "CLS-LOC" / "val"
    moved.rename(tmp_path / "bbox")
    with pytest.raises(FileNotFoundError, match=r"no folder Annotations/CLS-LOC/val in .*; expected root/val"):
        imagenet(root)
    assert imagenet(root, annotations=tmp_path / "bbox")[2].boxes.shape == (1, 4)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*; expected annotations/picture\.xml"):
        imagenet(root, annotations=tmp_path / "nowhere")
    for file in (tmp_path / "bbox").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"none of the 3 images can be used; the first: .* is without XML file"):
        imagenet(root, annotations=tmp_path / "bbox")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<annotation><object>", r"is damaged: no element found"),
        ("<annotation><object><bndbox/></object></annotation>", "is damaged: no bndbox/xmin in an object"),
        (
            "<annotation><object><name>n</name><bndbox><xmin>a</xmin></bndbox></object></annotation>",
            "could not convert",
        ),
        ("", "is damaged"),
    ],
)
def test_a_damaged_annotation_is_named(root, content, text):
    (root / "Annotations" / "CLS-LOC" / "val" / f"{number(1)}.xml").write_text(content)
    with pytest.raises(ValueError, match=rf"{number(1)}\.xml .*{text}"):
        _ = imagenet(root)[2]


# which images --------------------------------------------------------------------------------------------------------


def test_classes_of_a_classifier_give_its_numbers(root):
    data = imagenet(root, classes=[HEN, SHARK, TENCH])
    assert data.classes == (HEN, SHARK, TENCH)
    assert [sample.label for sample in data] == [2, 2, 1]
    assert [sample.label for sample in imagenet(root, classes=(SHARK,))] == [0]
    assert imagenet(root, classes=1).classes == (TENCH,)
    assert len(imagenet(root, classes=1)) == 2
    for wrong in (3, [HEN], [TENCH, TENCH], TENCH):
        with pytest.raises(ValueError, match=r"there are (2 classes, got 3|n01440764 to n01484850, got)"):
            imagenet(root, classes=wrong)


def test_excluded_images_are_passed_over(root, tmp_path):
    path = tmp_path / "blacklist.txt"
    path.write_text(f"3\n{number(1)}.JPEG\n17\n")
    data = imagenet(root, exclude=path)
    assert [Path(file).stem for file in data.files] == [number(2)]
    assert data.classes == (TENCH, SHARK)
    assert all("is excluded by" in reason for reason in data.skipped.values())
    assert len(data.skipped) == 2
    with pytest.raises(FileNotFoundError, match=r"no file .*; expected the numbers of validation images"):
        imagenet(root, exclude=tmp_path / "none.txt")


def test_count_spreads_over_the_classes_and_batches_stack(root):
    data = imagenet(root, count=2, size=8)
    assert [Path(file).stem for file in data.files] == [number(2), number(3)]
    with pytest.raises(ValueError, match="there are 3 images, got 4"):
        imagenet(root, count=4)
    again = pickle.loads(pickle.dumps(imagenet(root, size=8)))
    assert [batch.y.tolist() for batch in batches(again, 2)] == [[0, 0], [1]]
    assert again[-1].id == again[2].id
    with pytest.raises(IndexError):
        _ = again[3]


def test_broken_images_are_skipped_or_named(root):
    path = root / "val" / SHARK / f"{number(1)}.JPEG"
    whole = path.read_bytes()
    path.write_bytes(b"")
    data = imagenet(root)
    assert len(data) == 2
    assert "is empty (0 bytes)" in data.skipped[f"{SHARK}/{number(1)}.JPEG"]
    assert data.classes == (TENCH, SHARK)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"cannot be decoded: .*truncated.*; check='decode' skips such files"):
        _ = imagenet(root)[2]
    assert "truncated" in imagenet(root, check="decode").skipped[f"{SHARK}/{number(1)}.JPEG"]


def test_wrong_names_are_named(root, tmp_path):
    with pytest.raises(LookupError, match="no split of ImageNet called 'vall'; did you mean val"):
        imagenet(root, "vall")
    with pytest.raises(LookupError, match="no kind of boxes called 'wsoll'; did you mean wsol"):
        imagenet(root, boxes="wsoll")
    with pytest.raises(LookupError, match="no resize policy called 'croop'"):
        imagenet(root, resize="croop")
    with pytest.raises(LookupError, match="no check called"):
        imagenet(root, check="all")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; expected root/val/<wnid>"):
        imagenet(tmp_path / "nowhere")
    (tmp_path / "empty" / "val").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no image in .*; expected root/val/<wnid>"):
        imagenet(tmp_path / "empty", boxes="none")
    with pytest.raises(FileNotFoundError, match=r"no folder train in .*; expected root/val/<wnid>"):
        imagenet(tmp_path / "empty", "train")


# Kaggle and WSOL -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kaggle(tmp_path):
    """Kaggle's layout, whose validation images lie flat."""
    home = tmp_path / "kaggle"
    for n, wnid in ((1, SHARK), (2, TENCH), (3, SHARK)):
        picture(home / "ILSVRC/Data/CLS-LOC/val" / f"{number(n)}.JPEG")
        xml(home / "ILSVRC/Annotations/CLS-LOC/val" / f"{number(n)}.xml", wnid, SMALL)
    rows = [f"{number(n)},{wnid} 80 30 119 69 " for n, wnid in ((3, SHARK), (1, SHARK), (2, TENCH), (9, HEN))]
    (home / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    return home


@pytest.mark.parametrize("below", [".", "ILSVRC"])
def test_kaggles_flat_images_get_their_class_from_its_list(kaggle, below):
    data = imagenet(kaggle / below, size=(100, 200))
    assert data.classes == (TENCH, SHARK, HEN)
    assert data.files == tuple(f"{number(n)}.JPEG" for n in (1, 2, 3))
    assert [sample.label for sample in data] == [1, 0, 1]
    assert all(sample.boxes.tolist() == [list(SMALL)] for sample in data)


def test_or_from_the_annotations(kaggle):
    (kaggle / "LOC_val_solution.csv").unlink()
    xml(kaggle / "ILSVRC/Annotations/CLS-LOC/val" / f"{number(3)}.xml", SHARK)
    data = imagenet(kaggle, boxes="none")
    assert data.classes == (TENCH, SHARK)
    assert [sample.label for sample in data] == [1, 0]
    assert data.skipped == {f"{number(3)}.JPEG": f"{number(3)}.JPEG is without class in the lists"}


def test_flat_images_without_any_list_are_refused(kaggle):
    (kaggle / "LOC_val_solution.csv").unlink()
    (kaggle / "ILSVRC/Annotations").rename(kaggle / "gone")
    with pytest.raises(FileNotFoundError, match=r"no LOC_val_solution\.csv in .*; expected root/val/<wnid>"):
        imagenet(kaggle, boxes="none")
    (kaggle / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{number(1)},tench\n")
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv is damaged: '.*,tench'; expected lines image,wnid"):
        imagenet(kaggle, boxes="none")
    (kaggle / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n")
    with pytest.raises(ValueError, match=r"none of the 3 images can be used; the first: .* is without class"):
        imagenet(kaggle, boxes="none")


@pytest.mark.parametrize("flat", [True, False])
def test_wsol_boxes_are_taken_as_they_are(tmp_path, flat):
    folder = "" if flat else TENCH
    for n in (1, 2, 3):
        picture(tmp_path / "ILSVRC" / "val" / folder / f"{number(n)}.JPEG")
    names = {f"val/{number(1)}.JPEG": (65, [SMALL, WIDE]), f"val/{number(2)}.JPEG": (9, [WIDE])}
    lists(tmp_path / "metadata" / "ILSVRC" / "test", names)
    data = imagenet(tmp_path / "ILSVRC", boxes="wsol", size=50, resize="crop")
    assert len(data) == 2
    assert len(data.skipped) == 1
    torch.testing.assert_close(data[0].boxes, torch.tensor(MOVED["crop"]).float())
    torch.testing.assert_close(data[1].boxes, torch.tensor(MOVED["crop"][1:]).float())
    assert data.classes == (("9", "65") if flat else (TENCH,))
    assert pickle.loads(pickle.dumps(data))[0].boxes.tolist() == data[0].boxes.tolist()
    with pytest.raises(FileNotFoundError, match=r"no ILSVRC/test/image_ids\.txt in .*; expected the WSOL benchmark's"):
        imagenet(tmp_path / "ILSVRC", boxes="wsol", metadata=tmp_path / "ILSVRC")


def test_wsol_boxes_follow_a_file_of_another_size(tmp_path):
    picture(tmp_path / "val" / TENCH / f"{number(1)}.JPEG", (40, 15, 60, 35), size=(50, 100))
    lists(tmp_path / "lists", {f"val/{number(1)}.JPEG": (0, [SMALL])})
    data = imagenet(tmp_path, boxes="wsol", metadata=tmp_path / "lists", size=(50, 100))
    assert data[0].boxes.tolist() == [[40, 15, 60, 35]]
    (tmp_path / "lists" / "image_sizes.txt").unlink()
    data = imagenet(tmp_path, boxes="wsol", metadata=tmp_path / "lists", size=(50, 100))
    assert data[0].boxes.tolist() == [list(SMALL)]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("localization.txt", "val/x.JPEG,1,2,3\n", r"damaged: 'val/x\.JPEG,1,2,3'; expected lines image,x0,y0,x1,y1"),
        ("localization.txt", "val/x.JPEG,1,2,3,four\n", "damaged: 'four'; expected lines image,x0"),
        ("image_sizes.txt", "val/x.JPEG,200\n", "expected lines image,width,height"),
        ("localization.txt", None, r"no localization\.txt in .*; expected it among the WSOL benchmark's metadata"),
    ],
)
def test_damaged_wsol_lists_are_named(tmp_path, name, content, text):
    picture(tmp_path / "val" / TENCH / f"{number(1)}.JPEG")
    home = lists(tmp_path / "metadata" / "ILSVRC" / "test", {f"val/{number(1)}.JPEG": (0, [SMALL])})
    (home / name).unlink() if content is None else (home / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        imagenet(tmp_path, boxes="wsol")


# ImageNetV2 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def v2(tmp_path):
    home = tmp_path / "v2"
    for name in ("10/0.jpeg", "2/0.jpeg", "2/1.jpeg", "999/0.jpeg"):
        picture(home / name)
    (home / "1000").mkdir()
    names = {"val2/10/0.jpeg": (10, [SMALL]), "val2/2/0.jpeg": (2, [WIDE, SMALL]), "val2/2/9.jpeg": (2, [SMALL])}
    lists(tmp_path / "metadata" / "ILSVRC" / "val", names)
    return home


@pytest.mark.parametrize("where", [".", "val2", "imagenetv2-threshold0.7-format-val"])
def test_imagenet_v2_has_the_numbers_of_its_folders(v2, tmp_path, where):
    if where != ".":
        v2.rename(tmp_path / "images")
        v2.mkdir()
        (tmp_path / "images").rename(v2 / where)
    data = imagenet_v2(v2, boxes="none", size=8)
    assert data.classes == tuple(str(number) for number in range(1000))
    assert data.files == ("2/0.jpeg", "2/1.jpeg", "10/0.jpeg", "999/0.jpeg")
    assert [sample.label for sample in data] == [2, 2, 10, 999]
    assert all(sample.boxes is None for sample in data)


@pytest.mark.parametrize("resize", MOVED)
def test_imagenet_v2_has_the_boxes_of_wsol(v2, resize):
    data = imagenet_v2(v2, size=50, resize=resize)
    assert data.files == ("2/0.jpeg", "10/0.jpeg")
    assert data.skipped.keys() == {"2/1.jpeg", "999/0.jpeg"}
    small, wide = (torch.tensor(box, dtype=torch.float32) for box in MOVED[resize])
    torch.testing.assert_close(data[0].boxes, torch.stack([wide, small]))
    torch.testing.assert_close(data[1].boxes, small[None])
    assert (bright(data[1].image) - small).abs().max() < 0.75


def test_imagenet_v2_errors(v2, tmp_path):
    with pytest.raises(LookupError, match="no kind of boxes called 'xml'; known: none, wsol"):
        imagenet_v2(v2, boxes="xml")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*; expected root/<class number"):
        imagenet_v2(tmp_path / "nowhere")
    for name in ("a", "b"):
        (tmp_path / "both" / f"imagenetv2-{name}").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds several variants; give one of them: imagenetv2-a, imagenetv2-b"):
        imagenet_v2(tmp_path / "both")
    (tmp_path / "bare" / "3").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no image in .*; expected root/<class number"):
        imagenet_v2(tmp_path / "bare")
    (tmp_path / "metadata").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no ILSVRC/val/image_ids\.txt in .*; expected the WSOL benchmark's"):
        imagenet_v2(v2)
    assert len(imagenet_v2(v2, metadata=tmp_path / "gone" / "ILSVRC")) == 2


# real pictures -------------------------------------------------------------------------------------------------------


def test_the_shared_sample_reads_as_a_split(tmp_path):
    if not (DATA / "imagenet-sample").is_dir():
        pytest.skip("../shared/data/imagenet-sample is absent")
    (tmp_path / "val").symlink_to(DATA / "imagenet-sample")
    data = imagenet(tmp_path, boxes="none", size=64, resize="crop")
    assert len(data) == len(data.classes) == 700
    assert data.skipped == {}
    with (DATA / "imagenet-sample" / "classes.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    known = {int(row["index"]): row["wnid"] for row in rows}
    numbered = imagenet(tmp_path, boxes="none", classes=[known.get(n, f"absent {n}") for n in range(1000)], count=7)
    assert [(s.label, s.id) for s in numbered] == [(int(row["index"]), row["path"]) for row in rows[::100]]
    assert data[0].size == (256, 341)
