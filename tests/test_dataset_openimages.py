import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sightline.data import Dataset, batches
from sightline.datasets._openimages import openimages30k
from sightline.datasets._wsol import marked
from sightline.images import ImageError

BIRD, FISH = "01226z", "0138tl"
SMALL = (80, 30, 120, 70)
"""A box in pictures of 200 x 100."""
MOVED = {"direct": (20, 15, 30, 35), "crop": (15, 15, 35, 35), "crop256": (13.6, 13.1, 36.4, 35.9)}
"""Where it is at size 50: squashed by 1/4 and 1/2; halved and 25 cut off; to 114 x 57, 32 and 4 cut off."""


def plane(path: Path, *boxes: tuple[int, ...], size: tuple[int, int] = (100, 200), value: int = 255) -> Path:
    """A mask file, its boxes given in a picture of 200 x 100."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size, np.uint8)
    for x0, y0, x1, y1 in boxes:
        sy, sx = size[0] / 100, size[1] / 200
        pixels[int(y0 * sy) : int(y1 * sy), int(x0 * sx) : int(x1 * sx)] = value
    Image.fromarray(pixels).save(path)
    return path


def picture(path: Path, box: tuple[int, ...] = SMALL) -> Path:
    """White where the box is, else black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(pixels).save(path, "JPEG", quality=98, subsampling=0)
    return path


def lists(home: Path, labels: dict[str, int], lines: list[str] | None) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    (home / "image_ids.txt").write_text("".join(f"{name}\n" for name in labels))
    (home / "class_labels.txt").write_text("".join(f"{name},{label}\n" for name, label in labels.items()))
    if lines is not None:
        (home / "localization.txt").write_text("".join(f"{line}\n" for line in lines))
    return home


@pytest.fixture
def root(tmp_path):
    """The benchmark's layout: `a` has two masks and an ignore region, `b` one of another size, `c` no ignore region."""
    home = tmp_path / "dataset"
    images = home / "OpenImages"
    a, b, c = (f"test/{folder}/{name}" for folder, name in ((BIRD, "a"), (BIRD, "b"), (FISH, "c")))
    for name in (a, b, c):
        picture(images / f"{name}.jpg")
    plane(images / f"{a}_m1.png", (80, 30, 100, 70))
    plane(images / f"{a}_m2.png", (100, 30, 120, 70))
    plane(images / f"{a}_ignore.png", (60, 30, 100, 70))
    plane(images / f"{b}_m1.png", SMALL, size=(50, 100))
    plane(images / f"{b}_ignore.png", size=(50, 100))
    plane(images / f"{c}_m1.png", SMALL, value=1)
    lines = [
        f"{a}.jpg,{a}_m1.png,{a}_ignore.png",
        f"{a}.jpg,{a}_m2.png,",
        f"{b}.jpg,{b}_m1.png,{b}_ignore.png",
        f"{c}.jpg,{c}_m1.png,",
    ]
    lists(tmp_path / "metadata/OpenImages/test", {f"{a}.jpg": 0, f"{b}.jpg": 0, f"{c}.jpg": 1}, lines)
    picture(images / "train" / BIRD / "t.jpg")
    lists(tmp_path / "metadata/OpenImages/train", {f"train/{BIRD}/t.jpg": 0}, None)
    return home


def tight(inside: torch.Tensor) -> torch.Tensor:
    rows, columns = (inside.any(axis).nonzero().flatten() for axis in (1, 0))
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def test_images_labels_and_classes(root):
    data = openimages30k(root, size=8)
    assert isinstance(data, Dataset)
    assert data.files == (f"test/{BIRD}/a.jpg", f"test/{BIRD}/b.jpg", f"test/{FISH}/c.jpg")
    assert [sample.label for sample in data] == [0, 0, 1]
    assert data.classes == (BIRD, FISH)
    assert data.skipped == {}
    assert all(sample.size == (100, 200) and sample.boxes is None for sample in data)
    again = pickle.loads(pickle.dumps(data))
    assert [batch.x.shape[0] for batch in batches(again, 2)] == [2, 1]
    with pytest.raises(IndexError):
        _ = again[3]


def test_masks_are_united_and_lie_over_what_is_ignored(root):
    mask = openimages30k(root, size=(100, 200))[0].mask
    expected = torch.zeros(100, 200, dtype=torch.long)
    expected[30:70, 60:80] = 255
    expected[30:70, 80:120] = 1
    assert torch.equal(mask, expected)
    sample = openimages30k(root, size=(100, 200))[0]
    inside, counts = sample.region_of(0)
    assert inside.sum() == 40 * 40
    assert (~counts).sum() == 40 * 20


@pytest.mark.parametrize("resize", MOVED)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_picture_and_mask_move_together(root, resize, index):
    sample = openimages30k(root, size=50, resize=resize)[index]
    assert sample.mask.shape == (50, 50)
    inside = sample.mask == sample.label + 1
    assert set(sample.mask.unique().tolist()) <= {0, 255, sample.label + 1}
    bright = sample.image.mean(0) > 0.5
    assert (tight(inside) - torch.tensor(MOVED[resize])).abs().max() < 1
    assert (tight(bright) - tight(inside)).abs().max() <= 1
    assert (bright ^ inside).float().mean() < 0.03


def test_masks_may_be_of_any_kind(root):
    path = root / "OpenImages" / "test" / FISH / "c_m1.png"
    before = openimages30k(root, size=50)[2].mask
    gray = Image.open(path)
    clear = Image.merge("LA", (gray, Image.new("L", gray.size, 0)))
    for picture in (gray.point(lambda v: 255 * v).convert("1"), gray.convert("RGB"), clear):
        picture.save(path)
        assert torch.equal(openimages30k(root, size=50)[2].mask, before)


def test_a_mask_of_another_size_is_brought_to_the_images_by_the_nearest_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2, (3, 7), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    mask = marked(tmp_path / "mask.png", (5, 4))
    expected = [[bool(pixels[int((y + 0.5) * 3 / 5), int((x + 0.5) * 7 / 4)]) for x in range(4)] for y in range(5)]
    assert mask.tolist() == expected


def test_the_training_split_has_no_masks(root):
    data = openimages30k(root, "train", size=8)
    assert (data[0].id, data[0].label, data[0].mask) == (f"train/{BIRD}/t.jpg", 0, None)


def test_masks_and_lists_may_lie_elsewhere(root, tmp_path):
    for file in (root / "OpenImages").rglob("*.png"):
        target = tmp_path / "masks" / file.relative_to(root / "OpenImages")
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    with pytest.raises(ValueError, match="none of the 3 images can be used; the first: there is no mask"):
        openimages30k(root)
    assert openimages30k(root, masks=tmp_path / "masks", size=8)[2].mask.max() == 2
    (tmp_path / "around").mkdir()
    (tmp_path / "masks").rename(tmp_path / "around" / "OpenImages")
    for metadata in (tmp_path / "metadata", tmp_path / "metadata/OpenImages", tmp_path / "metadata/OpenImages/test"):
        assert len(openimages30k(root / "OpenImages", masks=tmp_path / "around", metadata=metadata, size=8)) == 3
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; expected root/OpenImages"):
        openimages30k(root, masks=tmp_path / "nowhere")


def test_what_lacks_a_mask_is_skipped(root, tmp_path):
    (root / "OpenImages" / "test" / BIRD / "b_m1.png").unlink()
    path = tmp_path / "metadata/OpenImages/test/localization.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "/c.jpg" not in line))
    data = openimages30k(root, size=8)
    assert data.files == (f"test/{BIRD}/a.jpg",)
    assert "there is no mask" in data.skipped[f"test/{BIRD}/b.jpg"]
    assert "is not in" in data.skipped[f"test/{FISH}/c.jpg"]
    assert data.classes == (BIRD, FISH)


def test_count_and_broken_files(root):
    assert [sample.id[-5:] for sample in openimages30k(root, count=2, size=8)] == ["a.jpg", "b.jpg"]
    with pytest.raises(ValueError, match="there are 3 images, got 4"):
        openimages30k(root, count=4)
    path = root / "OpenImages" / "test" / BIRD / "b.jpg"
    path.write_bytes(b"nothing")
    data = openimages30k(root, size=8)
    assert len(data) == 2
    assert "is no image" in data.skipped[f"test/{BIRD}/b.jpg"]
    (path.parent / "a_m2.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"a_m2\.png is empty \(0 bytes\)$"):
        _ = data[0]
    whole = (path.parent / "a_m1.png").read_bytes()
    (path.parent / "a_m2.png").write_bytes(whole[:60])
    with pytest.raises(ImageError, match=r"a_m2\.png cannot be (decoded|opened)"):
        _ = data[0]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("class_labels.txt", "x.jpg,0\n", r"class_labels\.txt is damaged: no line for test/01226z/a\.jpg"),
        ("class_labels.txt", "x.jpg,bird\n", "damaged: 'bird'; expected lines image,label"),
        ("class_labels.txt", "x.jpg,-1\n", "damaged: '-1'; expected lines image,label"),
        ("class_labels.txt", "x.jpg\n", r"damaged: 'x\.jpg'; expected lines image,label"),
        ("class_labels.txt", None, r"no class_labels\.txt in .*; expected it among the WSOL benchmark's metadata"),
        ("localization.txt", "x.jpg,mask.png\n", r"damaged: 'x\.jpg,mask\.png'; expected lines image,mask,mask of"),
        ("localization.txt", "x.jpg,,ignore.png\n", "expected lines image,mask,mask of"),
        ("localization.txt", None, r"no localization\.txt in"),
        ("image_ids.txt", "", "there are no images to choose from"),
    ],
)
def test_damaged_lists_are_named(root, tmp_path, name, content, text):
    path = tmp_path / "metadata/OpenImages/test" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        openimages30k(root)


def test_wrong_names_and_folders(root, tmp_path):
    with pytest.raises(LookupError, match="no split of OpenImages30k called 'tset'; did you mean test"):
        openimages30k(root, "tset")
    with pytest.raises(LookupError, match="no resize policy called 'squash'"):
        openimages30k(root, resize="squash")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; expected root/OpenImages"):
        openimages30k(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no folder val in .*; expected root/OpenImages"):
        openimages30k(root, "val")
    with pytest.raises(FileNotFoundError, match=r"no OpenImages/test/image_ids\.txt in .*; expected the WSOL"):
        openimages30k(root, metadata=root)
