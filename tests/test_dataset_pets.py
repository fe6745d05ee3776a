import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sightline.data import batches
from sightline.datasets import pets
from sightline.datasets._pets import BREEDS, CATS
from sightline.images import ImageError

DATA = Path(__file__).parents[2] / "shared" / "data"
POLICIES = ("direct", "crop", "crop256")
CLASS_IDS = {"Abyssinian": (1, 1), "american_bulldog": (2, 2), "Bengal": (6, 1), "yorkshire_terrier": (37, 2)}


def needs(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"../shared/data/{name} is absent")
    return DATA / name


def animal(home, name, box, *, split="test", size=(40, 60), head=None):
    """Add a white rectangle with a border of two pixels around it."""
    for folder in ("images", "annotations/trimaps", "annotations/xmls"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    x0, y0, x1, y1 = box
    image, trimap = np.zeros((*size, 3), np.uint8), np.full(size, 2, np.uint8)
    image[y0:y1, x0:x1] = 255
    trimap[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = 3
    trimap[y0:y1, x0:x1] = 1
    Image.fromarray(image).save(home / "images" / f"{name}.jpg", quality=100)
    Image.fromarray(trimap).save(home / "annotations" / "trimaps" / f"{name}.png")
    if head:
        edges = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), head, strict=True))
        text = f"<annotation><object><name>cat</name><bndbox>{edges}</bndbox></object></annotation>"
        (home / "annotations" / "xmls" / f"{name}.xml").write_text(text)
    number, species = CLASS_IDS[name.rsplit("_", 1)[0]]
    with (home / "annotations" / f"{split}.txt").open("a") as file:
        file.write(f"{name} {number} {species} 1\n")
    return home


@pytest.fixture
def home(tmp_path):
    for number, name in enumerate(["Bengal_7", "Abyssinian_1", "american_bulldog_30", "yorkshire_terrier_2"]):
        animal(tmp_path, name, (10 + number, 8, 40, 30))
    return tmp_path


def tight(region):
    rows, columns = np.nonzero(np.asarray(region))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_breeds_are_the_37_in_torchvisions_spelling():
    assert len(set(BREEDS)) == 37
    assert len(CATS) == 12
    assert set(BREEDS) > CATS
    lines = (needs("oxford-iiit-pet") / "annotations" / "full_lists" / "trainval.txt").read_text().splitlines()
    for name, number, species, _ in map(str.split, lines):
        breed = " ".join(part.title() for part in name.rsplit("_", 1)[0].split("_"))
        assert BREEDS[int(number) - 1] == breed
        assert (breed in CATS) == (species == "1")


def test_an_animal_is_read_as_it_was_drawn(home):
    data = pets(home, size=(40, 60))
    assert (data.classes, data.skipped, len(data)) == (BREEDS, {}, 4)
    assert data.groups == tuple("Cat" if breed in CATS else "Dog" for breed in BREEDS)
    assert [sample.id for sample in data] == [f"{n}.jpg" for n in ("Bengal_7", "Abyssinian_1", "american_bulldog_30",
                                                                  "yorkshire_terrier_2")]  # fmt: skip
    assert [sample.label for sample in data] == [5, 0, 1, 36]
    sample = data[0]
    expected = np.zeros((40, 60), int)
    expected[6:32, 8:42] = 255
    expected[8:30, 10:40] = 6
    assert np.array_equal(sample.mask.numpy(), expected)
    assert sample.boxes.tolist() == sample.boxes_of(5).tolist() == [[8, 6, 42, 32]]
    assert sample.size == (40, 60)
    assert sample.box_labels is None


def test_kinds_of_boxes(tmp_path):
    animal(tmp_path, "Bengal_7", (10, 8, 40, 30), split="trainval", head=(13, 9, 20, 15))
    animal(tmp_path, "Bengal_8", (10, 8, 40, 30), split="trainval")
    boxes = {
        kind: pets(tmp_path, "trainval", boxes=kind, size=(40, 60))[0].boxes
        for kind in ("trimap", "foreground", "head")
    }
    assert boxes["trimap"].tolist() == [[8, 6, 42, 32]]
    assert boxes["foreground"].tolist() == [[10, 8, 40, 30]]
    assert boxes["head"].tolist() == [[12, 8, 20, 15]]
    without = pets(tmp_path, "trainval", boxes="none", size=(40, 60))
    assert without[0].boxes is None
    assert len(without) == 2
    heads = pets(tmp_path, "trainval", boxes="head", size=8)
    assert heads.files == ("Bengal_7.jpg",)
    assert "Bengal_8.xml; boxes='trimap' needs no head box" in heads.skipped["Bengal_8.jpg"]
    with pytest.raises(ValueError, match="head boxes exist for the split 'trainval' only; read that, or ask for"):
        pets(tmp_path, "test", boxes="head")
    (tmp_path / "annotations" / "xmls" / "Bengal_7.xml").write_text("<annotation><obj")
    with pytest.raises(ValueError, match=r"none of the 2 images has a head box; the first: .*Bengal_7\.xml is damaged"):
        pets(tmp_path, "trainval", boxes="head")


def test_a_trimap_without_an_animal_has_no_box(tmp_path):
    animal(tmp_path, "Bengal_7", (10, 8, 40, 30))
    Image.fromarray(np.full((40, 60), 2, np.uint8)).save(tmp_path / "annotations" / "trimaps" / "Bengal_7.png")
    sample = pets(tmp_path, size=8)[0]
    assert sample.boxes.shape == (0, 4)
    assert sample.mask.unique().tolist() == [0]


@pytest.mark.parametrize("boxes", ["foreground", "head"])
@pytest.mark.parametrize("resize", POLICIES)
@pytest.mark.parametrize("size", [(56, 56), (80, 120), (30, 70)])
def test_image_box_and_mask_move_together(tmp_path, resize, size, boxes):
    animal(tmp_path, "Bengal_7", (30, 20, 66, 44), split="trainval", size=(64, 96), head=(31, 21, 66, 44))
    sample = pets(tmp_path, "trainval", size=size, resize=resize, boxes=boxes)[0]
    assert sample.image.shape[1:] == sample.mask.shape == size
    (box,) = sample.boxes.tolist()
    inside = np.clip(box, 0, [size[1], size[0], size[1], size[0]])
    for region in (sample.image[0] > 0.5, sample.mask == 6):
        assert np.abs(tight(region) - inside).max() <= 1


def test_at_scale_one_boxes_reach_outside_the_crop(tmp_path):
    animal(tmp_path, "Bengal_7", (0, 20, 66, 44), size=(64, 96))
    sample = pets(tmp_path, size=56, resize="crop256", boxes="foreground")[0]
    assert sample.boxes.tolist() == [[-20, 16, 46, 40]]
    assert tight(sample.mask == 6) == [0, 16, 46, 40]


def test_species(home):
    data = pets(home, task="species", size=(40, 60))
    assert data.classes == data.groups == ("Cat", "Dog")
    assert [sample.label for sample in data] == [0, 0, 1, 1]
    assert [sample.mask.unique().tolist() for sample in data] == [[0, 1, 255]] * 2 + [[0, 2, 255]] * 2
    assert len(pets(home, task="species", breeds=["Bengal"], size=8)) == 1


def test_chosen_breeds_are_numbered_in_their_order(home):
    data = pets(home, breeds=["Yorkshire Terrier", "Bengal", "Beagle"], size=8)
    assert data.classes == ("Yorkshire Terrier", "Bengal", "Beagle")
    assert data.groups == ("Dog", "Cat", "Dog")
    assert [(sample.id, sample.label) for sample in data] == [("Bengal_7.jpg", 1), ("yorkshire_terrier_2.jpg", 0)]
    assert data[0].mask.max() == 255
    assert 2 in data[0].mask
    with pytest.raises(LookupError, match="no breed called 'bengal'; did you mean Bengal"):
        pets(home, breeds=["bengal"])
    for wrong in ([], ["Bengal", "Bengal"], "Bengal"):
        with pytest.raises(ValueError, match="expected a list of different breeds, got"):
            pets(home, breeds=wrong)
    with pytest.raises(ValueError, match=r"no image of Beagle in .*test\.txt"):
        pets(home, breeds=["Beagle"])


def test_rebuilt_trimaps_are_left_out_before_anything_is_counted(home):
    table = home / "annotations" / "provenance.csv"
    table.write_text("image,trimap_source\nBengal_7,polygon\nAbyssinian_1,official\nyorkshire_terrier_2,polygon\n")
    data = pets(home, size=8)
    assert data.files == ("Abyssinian_1.jpg", "american_bulldog_30.jpg")
    reason = "2 of 4 images are left out, their trimaps are not official; official=False takes them"
    assert data.skipped == {"annotations/provenance.csv": reason}
    assert len(pets(home, size=8, count=2)) == 2
    whole = pets(home, size=8, official=False)
    assert (len(whole), whole.skipped) == (4, {})
    assert pets(home, size=8, breeds=["Abyssinian"]).skipped == {}
    with pytest.raises(ValueError, match=r"none of the 1 trimaps is official by .*; official=False takes them"):
        pets(home, breeds=["Bengal"])
    table.write_text("picture,source\nBengal_7,polygon\n")
    with pytest.raises(ValueError, match=r"provenance\.csv is damaged: .*expected columns image and trimap_source"):
        pets(home)


def test_count_batches_and_pickles(home):
    data = pickle.loads(pickle.dumps(pets(home, size=8)))
    assert [batch.y.tolist() for batch in batches(data, 3)] == [[5, 0, 1], [36]]
    assert pets(home, size=8, count=2).files == ("Bengal_7.jpg", "american_bulldog_30.jpg")
    with pytest.raises(ValueError, match="there are 4 images, got 0; ask for 1 to 4"):
        pets(home, count=0)
    with pytest.raises(IndexError):
        _ = data[4]


def test_broken_images_and_trimaps_are_skipped(home):
    trimaps = home / "annotations" / "trimaps"
    (home / "images" / "Bengal_7.jpg").write_bytes(b"no image")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(trimaps / "Abyssinian_1.png")
    Image.fromarray(np.ones((60, 40), np.uint8)).save(trimaps / "american_bulldog_30.png")
    data = pets(home, size=8)
    assert data.files == ("yorkshire_terrier_2.jpg",)
    for file, reason in (
        ("Bengal_7.jpg", "is no image"),
        ("Abyssinian_1.jpg", "has the number 0; expected 1 animal, 2 behind it, 3 border"),
        ("american_bulldog_30.jpg", "is 60 x 40, its image 40 x 60; both must have one size"),
    ):
        assert reason in data.skipped[file]
    trusted = pets(home, size=8, check="none")
    for index in range(3):
        with pytest.raises(ImageError, match="check='decode' skips such files"):
            _ = trusted[index]
    (trimaps / "yorkshire_terrier_2.png").unlink()
    with pytest.raises(ValueError, match=r"none of the 3 masks of .* can be used; the first: "):
        pets(home)


def test_errors(home):
    for settings, text in (
        ({"split": "val"}, "no split of Pets called 'val'"),
        ({"task": "bread"}, "no task of Pets called 'bread'; did you mean breed"),
        ({"boxes": "heads"}, "no kind of box called 'heads'; did you mean head"),
        ({"resize": "croop"}, "no resize policy called"),
        ({"check": "headers"}, "no check called"),
    ):
        with pytest.raises(LookupError, match=text):
            pets(home, **settings)
    with pytest.raises(FileNotFoundError, match=r"no annotations/trainval\.txt in .*; expected root \(or root/oxford"):
        pets(home, "trainval")
    path = home / "annotations" / "test.txt"
    for text in ("Bengal_7 2 1 2\n", "Bengal_7 6 2 2\n", "Bengal_7 6\n", "Lion_7 6 1 2\n", "Bengal_7 six 1 2\n"):
        path.write_text("# a comment\n" + text)
        with pytest.raises(ValueError, match=r"test\.txt is damaged: .*; expected lines 'Breed_1 breed species rank'"):
            pets(home)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; expected root"):
        pets(home / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no images in .*annotations; expected root"):
        pets(home / "annotations")


def test_root_may_lie_around(tmp_path):
    animal(tmp_path / "oxford-iiit-pet", "Bengal_7", (10, 8, 40, 30))
    assert len(pets(tmp_path, size=8)) == 1


def test_the_test_split_of_the_shared_data_is_torchvisions():
    from torchvision.datasets import OxfordIIITPet

    root = needs("oxford-iiit-pet")
    data = pets(root, size=64, check="header")
    theirs = OxfordIIITPet(str(root.parent), "test", target_types=["category", "segmentation"])
    assert Counter(data.labels) == {0: 98, 5: 100, 1: 100}
    assert data.skipped == {}
    for index in range(0, 298, 37):
        sample, (_, (label, trimap)) = data[index], theirs[index]
        assert sample.label == label
        width, height = trimap.size
        box = tight(np.array(trimap) != 2)
        expected = torch.tensor(box) * torch.tensor([64 / width, 64 / height] * 2)
        torch.testing.assert_close(sample.boxes[0], expected.float())
        assert set(sample.mask.unique().tolist()) <= {0, label + 1, 255}


def test_the_trainval_split_of_the_shared_data_says_what_is_rebuilt():
    root = needs("oxford-iiit-pet")
    data = pets(root, "trainval", size=32, check="none")
    assert Counter(data.labels) == {0: 100, 1: 100, 5: 100}
    assert next(iter(data.skipped.values())).startswith("340 of 640 images are left out")
    whole = pets(root, "trainval", size=32, check="none", official=False, boxes="head")
    assert len(whole) == 636
    assert set(whole.labels) == set(range(37))
    sample = whole[10]
    assert sample.boxes.shape == (1, 4)
    assert 0 <= sample.boxes.min() < sample.boxes.max() <= 32
