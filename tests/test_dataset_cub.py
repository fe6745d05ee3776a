import gzip
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sightline.data import Dataset, batches
from sightline.datasets._cub import cub_crops
from sightline.datasets._cub_full import cub, cub_v2
from sightline.images import ImageError, read

DATA = Path(__file__).parents[2] / "shared" / "data"
SMALL, WIDE = (80, 30, 120, 70), (20, 10, 180, 90)
"""Boxes in pictures of 200 x 100."""
MOVED = {
    "direct": ((20, 15, 30, 35), (5, 5, 45, 45)),
    "crop": ((15, 15, 35, 35), (-15, 5, 65, 45)),
    "crop256": ((13.6, 13.1, 36.4, 35.9), (-20.6, 1.7, 70.6, 47.3)),
}
"""Where they are at size 50: squashed by 1/4 and 1/2; halved and 25 cut off; to 114 x 57, 32 and 4 cut off."""


def picture(path: Path, box: tuple[int, ...] = SMALL, *, mode: str = "RGB", value: int = 255) -> Path:
    """White (or of `value`) where the box is, else black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((100, 200), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = value
    settings = {"quality": 98, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(pixels).convert(mode).save(path, **settings)
    return path


def birds(home: Path, *, outlines: Path | None = None) -> Path:
    """Classes 2 and 5 with four frames each, ids 10, 20, ...; odd ones are for training; every other box is wide.

    Part p lies at the box's upper left corner for p = 1, at its lower right for p = 2; part 3 is invisible.
    """
    names = ("images", "image_class_labels", "train_test_split", "bounding_boxes", "parts/part_locs")
    lists: dict[str, list[str]] = {name: [] for name in names}
    lists["classes"] = [f"{number} {number:03d}.Bird_{number}" for number in range(1, 11)]
    for n in range(8):
        number, i, box = (2, 5)[n // 4], 10 * (n + 1), (SMALL, WIDE)[n // 2 % 2]
        x0, y0, x1, y1 = box
        name = f"{number:03d}.Bird_{number}/Bird_{i}"
        picture(home / "images" / f"{name}.jpg", box)
        if outlines is not None:
            picture(outlines / f"{name}.png", box, mode="L", value=(51, 255)[n % 2])
        lists["images"].append(f"{i} {name}.jpg")
        lists["image_class_labels"].append(f"{i} {number}")
        lists["train_test_split"].append(f"{i} {n % 2}")
        lists["bounding_boxes"].append(f"{i} {x0:.1f} {y0:.1f} {x1 - x0:.1f} {y1 - y0:.1f}")
        lists["parts/part_locs"] += [f"{i} 1 {x0} {y0} 1", f"{i} 2 {x1} {y1} 1", f"{i} 3 0.0 0.0 0"]
    (home / "parts").mkdir()
    (home / "attributes").mkdir()
    for name, lines in lists.items():
        (home / f"{name}.txt").write_text("\n".join(lines) + "\n")
    table = np.random.default_rng(0).uniform(0, 100, (10, 312)).round(4)
    np.savetxt(home / "attributes" / "class_attribute_labels_continuous.txt", table, fmt="%.4f")
    return home


@pytest.fixture
def root(tmp_path):
    return birds(tmp_path / "CUB_200_2011", outlines=tmp_path / "segmentations")


def tight(inside: torch.Tensor) -> torch.Tensor:
    rows, columns = (inside.any(axis).nonzero().flatten() for axis in (1, 0))
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


# full frames ---------------------------------------------------------------------------------------------------------


def test_labels_classes_and_splits(root, tmp_path):
    test, train = cub(root, size=8), cub(tmp_path, "train", size=8)
    assert isinstance(test, Dataset)
    assert test.classes == train.classes == ("002.Bird_2", "005.Bird_5")
    assert [sample.label for sample in test] == [sample.label for sample in train] == [0, 0, 1, 1]
    assert [sample.id for sample in test][:3] == [
        f"00{c}.Bird_{c}/Bird_{i}.jpg" for c, i in ((2, 10), (2, 30), (5, 50))
    ]
    assert not set(test.files) & set(train.files)
    assert test.skipped == {}
    assert all(sample.size == (100, 200) and sample.instances is None for sample in test)
    assert all(sample.box_labels is None for sample in test)


@pytest.mark.parametrize("resize", MOVED)
def test_picture_box_mask_and_parts_move_together(root, resize):
    small, wide = cub(root, size=50, resize=resize)[0], cub(root, size=50, resize=resize)[1]
    for sample, box in ((small, MOVED[resize][0]), (wide, MOVED[resize][1])):
        torch.testing.assert_close(sample.boxes, torch.tensor([box]).float())
        seen = torch.tensor(box).clamp(0, 50)
        bright, inside = sample.image.mean(0) > 0.5, sample.mask == sample.label + 1
        assert sample.mask.shape == (50, 50)
        assert set(sample.mask.unique().tolist()) == {0, sample.label + 1}
        assert (tight(bright) - seen).abs().max() < 0.75
        assert (tight(inside) - seen).abs().max() < 1
        assert (bright ^ inside).float().mean() < 0.06
        corners = torch.tensor(box).reshape(2, 2)
        for corner, point in zip(corners, sample.keypoints, strict=False):
            visible = bool(((corner >= 0) & (corner <= 50)).all())
            torch.testing.assert_close(point, torch.tensor([*corner.tolist(), 1.0]) * visible)
        assert sample.keypoints.shape == (15, 3)
        assert not sample.keypoints[2:].any()
    assert wide.keypoints[:, 2].sum() == (2 if resize == "direct" else 0)


def test_any_annotators_bird_is_bird(root):
    faint, strong = cub(root, size=(100, 200))[0], cub(root, "train", size=(100, 200))[0]
    for sample in (faint, strong):
        x0, y0, x1, y1 = SMALL
        expected = torch.zeros(100, 200, dtype=torch.long)
        expected[y0:y1, x0:x1] = 1
        assert torch.equal(sample.mask, expected)
        assert sample.boxes.tolist() == [list(SMALL)]


def test_attributes_are_the_classes_shares(root):
    table = np.loadtxt(root / "attributes" / "class_attribute_labels_continuous.txt")
    data = cub(root, size=8)
    for sample in data:
        row = torch.tensor(table[(1, 4)[sample.label]] / 100, dtype=torch.float32)
        torch.testing.assert_close(sample.attributes, row)


def test_segmentations_may_lie_inside_elsewhere_or_nowhere(root, tmp_path):
    shutil.move(tmp_path / "segmentations", root / "segmentations")
    assert cub(root, size=8)[0].mask.max() == 1
    shutil.move(root / "segmentations", tmp_path / "masks")
    data = cub(root, size=8)
    assert data[0].mask is None
    assert data.skipped == {}
    assert cub(root, size=8, segmentations=tmp_path / "masks")[2].mask.max() == 2
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*; expected segmentations/<class>/picture\.png"):
        cub(root, segmentations=tmp_path / "nowhere")


def test_frames_without_segmentation_are_skipped(root, tmp_path):
    (tmp_path / "segmentations" / "002.Bird_2" / "Bird_10.png").unlink()
    data = cub(root, size=8)
    assert len(data) == 3
    assert "there is no segmentation" in data.skipped["002.Bird_2/Bird_10.jpg"]
    whole = cub(root, size=(100, 200), segmentations=tmp_path / "segmentations")
    assert [sample.boxes.tolist()[0] for sample in whole] == [list(WIDE), list(SMALL), list(WIDE)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none of the 4 images can be used; the first: there is no segmentation"):
        cub(root, segmentations=tmp_path / "empty")


def test_first_classes_and_count(root):
    assert cub(root, classes=1, size=8).classes == ("002.Bird_2",)
    assert [sample.label for sample in cub(root, count=2, size=8)] == [0, 1]
    with pytest.raises(ValueError, match="there are 2 classes, got 3; ask for 1 to 2"):
        cub(root, classes=3)
    with pytest.raises(ValueError, match="there are 4 images, got 5"):
        cub(root, count=5)


def test_broken_frames_are_skipped_and_the_rest_stays_in_step(root, tmp_path):
    whole = cub(root, size=8)
    path = root / "images" / whole.files[0]
    path.write_bytes(b"")
    (root / "images" / whole.files[2]).unlink()
    rest = cub(root, size=8)
    assert rest.skipped.keys() == {whole.files[0], whole.files[2]}
    for ours, theirs in zip(rest, [whole[1], whole[3]], strict=True):
        assert (ours.id, ours.label) == (theirs.id, theirs.label)
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.keypoints, theirs.keypoints)
        assert torch.equal(ours.mask, theirs.mask)
    with pytest.raises(ImageError, match=r"is empty \(0 bytes\); check='decode' skips such files"):
        _ = cub(root, size=8, check="none")[0]
    (tmp_path / "segmentations" / rest.files[0]).with_suffix(".png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"Bird_30\.png is no image"):
        _ = rest[0]


def test_frames_stack_into_batches_and_pickle(root):
    data = pickle.loads(pickle.dumps(cub(root, size=8)))
    assert [batch.x.shape[0] for batch in batches(data, 3)] == [3, 1]
    assert data[-1].id == data[3].id
    with pytest.raises(IndexError):
        _ = data[4]


def test_errors(root, tmp_path):
    with pytest.raises(LookupError, match="no split of CUB called 'val'; known: test, train"):
        cub(root, "val")
    with pytest.raises(LookupError, match="no resize policy called"):
        cub(root, resize="squash")
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder .*nowhere; expected root \(or root/CUB_200_2011\)"
    ):
        cub(tmp_path / "nowhere")
    for name, content, text in (
        ("bounding_boxes.txt", "10 1 2 3\n", r"bounding_boxes\.txt is damaged; expected image, x, y, width, height"),
        ("bounding_boxes.txt", "10 1 2 3 four\n", r"bounding_boxes\.txt is damaged: .* expected a table of numbers"),
        ("bounding_boxes.txt", "10 1 2 3 4\n", "is damaged: no box of image 30"),
        ("images.txt", "10\n", r"images\.txt is damaged: .*; expected lines of two words"),
        ("parts/part_locs.txt", "10 16 1 1 1\n", r"part_locs\.txt is damaged; expected image, part"),
    ):
        before = (root / name).read_text()
        (root / name).write_text(content)
        with pytest.raises(ValueError, match=text):
            cub(root)
        (root / name).write_text(before)
    (root / "bounding_boxes.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no bounding_boxes\.txt in .*; expected root \(or root/CUB_200_2011\)"
    ):
        cub(root)


# CUBV2 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def v2(tmp_path):
    home = tmp_path / "dataset"
    names = {"001.Black_Bird/11.jpg": (0, SMALL), "001.Black_Bird/12.jpg": (0, WIDE), "003.Red_Bird/13.jpg": (2, SMALL)}
    for name, (_, box) in names.items():
        picture(home / name, box)
    lists = tmp_path / "metadata" / "CUB" / "val"
    lists.mkdir(parents=True)
    (lists / "image_ids.txt").write_text("".join(f"{name}\n" for name in names))
    (lists / "class_labels.txt").write_text("".join(f"{name},{label}\n" for name, (label, _) in names.items()))
    (lists / "image_sizes.txt").write_text("".join(f"{name},200,100\n" for name in names))
    lines = (f"{name},{','.join(map(str, box))}\n" for name, (_, box) in names.items())
    (lists / "localization.txt").write_text("".join(lines))
    return home


@pytest.mark.parametrize("resize", MOVED)
@pytest.mark.parametrize("below", [".", "CUB", "CUBV2"])
def test_cub_v2_has_the_boxes_of_its_lists(v2, tmp_path, resize, below):
    if below != ".":
        v2.rename(tmp_path / "images")
        v2.mkdir()
        (tmp_path / "images").rename(v2 / below)
    data = cub_v2(v2, size=50, resize=resize)
    assert isinstance(data, Dataset)
    assert data.classes == ("001.Black_Bird", "1", "003.Red_Bird")
    assert [(sample.id[-6:], sample.label) for sample in data] == [("11.jpg", 0), ("12.jpg", 0), ("13.jpg", 2)]
    for sample, box in zip(data, (MOVED[resize][index] for index in (0, 1, 0)), strict=True):
        torch.testing.assert_close(sample.boxes, torch.tensor([box]).float())
        assert (tight(sample.image.mean(0) > 0.5) - sample.boxes[0].clamp(0, 50)).abs().max() < 0.75
        assert sample.size == (100, 200)
    assert data[-1].id == pickle.loads(pickle.dumps(data))[2].id


def test_cub_v2_count_and_broken_files(v2):
    assert [sample.id[-6:] for sample in cub_v2(v2, count=2, size=8)] == ["11.jpg", "12.jpg"]
    (v2 / "001.Black_Bird" / "11.jpg").write_bytes(b"")
    data = cub_v2(v2, size=8)
    assert len(data) == 2
    assert "is empty" in data.skipped["001.Black_Bird/11.jpg"]
    with pytest.raises(ValueError, match="there are 3 images, got 4"):
        cub_v2(v2, count=4)


def test_cub_v2_errors(v2, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*; expected root/<class folder>"):
        cub_v2(tmp_path / "nowhere")
    lists = tmp_path / "metadata" / "CUB" / "val"
    for name, content, text in (
        ("localization.txt", "001.Black_Bird/11.jpg,1,2,3,4\n", r"is damaged: no line for 001\.Black_Bird/12\.jpg"),
        ("localization.txt", "001.Black_Bird/11.jpg,1,2\n", r"expected lines image,x0,y0,x1,y1"),
        ("class_labels.txt", "001.Black_Bird/11.jpg,0\n", r"no line for 001\.Black_Bird/12\.jpg"),
        ("image_ids.txt", "\n", "there are no images to choose from"),
    ):
        before = (lists / name).read_text()
        (lists / name).write_text(content)
        with pytest.raises(ValueError, match=text):
            cub_v2(v2)
        (lists / name).write_text(before)
    shutil.rmtree(v2)
    v2.mkdir()
    with pytest.raises(ValueError, match=r"none of the 3 images in .* can be used; the first: there is no file"):
        cub_v2(v2)
    (tmp_path / "metadata").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no CUB/val/image_ids\.txt in .*; expected the WSOL benchmark's"):
        cub_v2(v2)


# real birds ----------------------------------------------------------------------------------------------------------


def shared() -> Path:
    if not (DATA / "CUB_200_2011").is_dir():
        pytest.skip("../shared/data/CUB_200_2011 is absent")
    return DATA / "CUB_200_2011"


def test_the_shared_crops_read_as_frames_that_are_all_bird():
    data, crops = cub(shared(), count=20, size=64), cub_crops(shared(), count=20, size=64, check="header")
    assert data.files == crops.files
    assert data.classes == crops.classes
    for frame, crop in zip(data, crops, strict=True):
        assert frame.label == crop.label
        torch.testing.assert_close(frame.boxes, torch.tensor([[0.0, 0, 64, 64]]))
        torch.testing.assert_close(frame.image, crop.image, rtol=0, atol=1e-6)
        torch.testing.assert_close(frame.keypoints, crop.keypoints, rtol=0, atol=1e-4)


def test_official_boxes_and_parts_of_whole_frames_agree_with_the_crops(tmp_path):
    """Frames are made again from crops: each is put back at its official box in an empty picture of its size."""
    home, full = tmp_path / "CUB_200_2011", shared() / "full"
    crops = cub_crops(shared(), count=5, size=64, check="header")
    shutil.copytree(full, home)
    (home / "parts").mkdir()
    (home / "parts" / "part_locs.txt").write_bytes(gzip.decompress((home / "part_locs.txt.gz").read_bytes()))
    (home / "attributes").symlink_to(shared() / "attributes")
    shutil.copy(shared() / "classes.txt", home)
    kept = {line.split()[1]: line for line in (home / "images.txt").read_text().splitlines()}
    (home / "images.txt").write_text("".join(kept[file] + "\n" for file in crops.files))
    source = {
        line.split()[0]: line.split()[1:] for line in (shared() / "crop_source_boxes.txt").read_text().splitlines()
    }
    for file in crops.files:
        x, y, w, h, width, height = (round(float(word)) for word in source[kept[file].split()[0]])
        frame = Image.new("RGB", (width, height))
        with Image.open(shared() / "images" / file) as crop:
            frame.paste(crop.resize((w, h)), (x, y))
        (home / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        frame.save(home / "images" / file, quality=98)
    for frame, crop in zip(cub(home, size=224), crops, strict=True):
        box, seen = frame.boxes[0], crop.keypoints[:, 2] > 0
        assert frame.id == crop.id
        assert (tight(frame.image.amax(0) > 0.06) - box).abs().max() < 3
        inside = box[:2] + crop.keypoints[seen, :2] / 64 * (box[2:] - box[:2])
        torch.testing.assert_close(frame.keypoints[seen, :2], inside, rtol=0, atol=0.1)
        assert torch.equal(frame.keypoints[:, 2] > 0, seen)
    assert read(home / "images" / crops.files[0]).shape[1:] == cub(home)[0].size
