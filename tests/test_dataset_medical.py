import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sightline.data import batches
from sightline.datasets import chest_xray, kvasir
from sightline.datasets._medical import KVASIR
from sightline.images import ImageError


def picture(path, value=0, size=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def endoscopies(home, per_class=16):
    for label, name in enumerate(KVASIR):
        for number in range(per_class):
            picture(home / name / f"{number:03d}.jpg", 20 * label)
    return home


def x_rays(home):
    for split, number in (("train", 3), ("val", 1), ("test", 2)):
        for name, value in (("NORMAL", 200), ("PNEUMONIA", 90)):
            for index in range(number):
                path = home / split / name / f"{name}-{index}.jpeg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((12, 16), value, np.uint8)).save(path)
    return home


# Kvasir --------------------------------------------------------------------------------------------------------------


def test_the_splits_of_kvasir_are_stratified_apart_and_whole(tmp_path):
    home = endoscopies(tmp_path / "kvasir-dataset-v2")
    splits = {split: kvasir(tmp_path, split, size=8, check="none") for split in ("train", "val", "test")}
    for split, number in (("train", 12), ("val", 2), ("test", 2)):
        assert Counter(splits[split].labels) == dict.fromkeys(range(8), number)
        assert splits[split].classes == KVASIR
        assert splits[split].skipped == {}
    files = [file for split in splits.values() for file in split.files]
    assert len(files) == len(set(files)) == 8 * 16
    assert kvasir(home, size=8).files == splits["test"].files


def test_the_split_of_kvasir_depends_on_the_seed_and_the_names_alone(tmp_path):
    from hashlib import sha256

    home = endoscopies(tmp_path)
    ours = kvasir(home, size=8, seed=3).files
    names = [f"polyps/{number:03d}.jpg" for number in range(16)]
    expected = sorted(sorted(names, key=lambda name: sha256(f"3/{name}".encode()).hexdigest())[:2])
    assert [file for file in ours if file.startswith("polyps/")] == expected
    assert kvasir(home, size=8, seed=3).files == ours
    assert kvasir(home, size=8, seed=4).files != ours


def test_a_class_whose_number_is_no_multiple_of_eight_trains_on_the_rest(tmp_path):
    home = endoscopies(tmp_path, 11)
    for split, number in (("train", 9), ("val", 1), ("test", 1)):
        assert Counter(kvasir(home, split, check="none").labels) == dict.fromkeys(range(8), number)


def test_samples_of_kvasir(tmp_path):
    home = endoscopies(tmp_path)
    data = pickle.loads(pickle.dumps(kvasir(home, size=(8, 10), count=8)))
    assert [sample.label for sample in data] == list(range(8))
    for sample in data:
        assert sample.id.startswith(f"{KVASIR[sample.label]}/")
        assert sample.image.shape == (3, 8, 10)
        assert sample.size == (12, 16)
        assert abs(sample.image.mean().item() * 255 - 20 * sample.label) < 3
        assert sample.boxes is None
        assert sample.mask is None
    assert [len(batch) for batch in batches(data, 3)] == [3, 3, 2]


def test_a_list_of_ones_own_replaces_the_split(tmp_path):
    home = endoscopies(tmp_path / "data")
    path = tmp_path / "list.txt"
    path.write_text("polyps/003.jpg\n\nesophagitis/001.jpg\npolyps/003.jpg\n")
    data = kvasir(home, listing=path, size=8)
    assert [(sample.id, sample.label) for sample in data] == [("polyps/003.jpg", 6), ("esophagitis/001.jpg", 2)]
    path.write_text("polyps/999.jpg\n")
    with pytest.raises(ValueError, match=r"list\.txt names polyps/999\.jpg, which is not in .*; write class/file\.jpg"):
        kvasir(home, listing=path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"list\.txt is damaged: "):
        kvasir(home, listing=path)
    path.write_text("")
    with pytest.raises(ValueError, match="there are no images to choose from"):
        kvasir(home, listing=path)
    with pytest.raises(FileNotFoundError, match=r"there is no list .*other\.txt; expected lines like polyps/picture"):
        kvasir(home, listing=tmp_path / "other.txt")


def test_broken_images_of_kvasir_leave_the_splits_as_they_are(tmp_path):
    home = endoscopies(tmp_path)
    before = kvasir(home, size=8)
    (home / before.files[0]).write_bytes(b"")
    after = kvasir(home, size=8)
    assert after.files == before.files[1:]
    assert after.labels == before.labels[1:]
    assert "is empty (0 bytes)" in after.skipped[before.files[0]]
    with pytest.raises(ImageError, match="check='decode' skips such files"):
        _ = kvasir(home, size=8, check="none")[0]


def test_errors_of_kvasir(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; expected root/kvasir-dataset-v2"):
        kvasir(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no dyed-lifted-polyps in .*; expected root/kvasir-dataset-v2"):
        kvasir(tmp_path)
    home = endoscopies(tmp_path, 8)
    for settings, text in (
        ({"split": "tset"}, "no split of Kvasir called 'tset'; did you mean test"),
        ({"resize": "croop"}, "no resize policy called"),
        ({"check": "headers"}, "no check called"),
    ):
        with pytest.raises(LookupError, match=text):
            kvasir(home, **settings)
    with pytest.raises(ValueError, match="there are 8 images, got 9"):
        kvasir(home, count=9)
    with pytest.raises(ValueError, match="positive side"):
        kvasir(home, size=0)
    picture(home / "barretts" / "1.jpg")
    with pytest.raises(FileNotFoundError, match=r"no class barretts belongs in .*; expected root"):
        kvasir(home)


# chest X-rays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [".", "chest_xray", "chest_xray/chest_xray"])
def test_chest_x_rays_are_read_from_their_splits(tmp_path, where):
    x_rays(tmp_path / where)
    for split, number in (("train", 3), ("val", 1), ("test", 2)):
        data = chest_xray(tmp_path, split, size=8)
        assert data.classes == ("NORMAL", "PNEUMONIA")
        assert Counter(data.labels) == {0: number, 1: number}
        assert data.skipped == {}
    sample = data[2]
    assert (sample.id, sample.label, sample.size) == ("PNEUMONIA/PNEUMONIA-0.jpeg", 1, (12, 16))
    assert sample.image.shape == (3, 8, 8)
    assert abs(sample.image.mean().item() * 255 - 90) < 2
    assert sample.boxes is None
    assert chest_xray(tmp_path, size=8, count=2).files == ("NORMAL/NORMAL-0.jpeg", "PNEUMONIA/PNEUMONIA-0.jpeg")


def test_errors_of_the_chest_x_rays(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; expected root/chest_xray"):
        chest_xray(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no test in .*; expected root/chest_xray"):
        chest_xray(tmp_path)
    home = x_rays(tmp_path)
    (home / "test" / "NORMAL" / "NORMAL-0.jpeg").write_bytes(b"")
    assert list(chest_xray(home, size=8).skipped) == ["NORMAL/NORMAL-0.jpeg"]
    with pytest.raises(LookupError, match="no split of the chest X-rays called 'validation'"):
        chest_xray(home, "validation")
    with pytest.raises(LookupError, match="no check called 'headers'"):
        chest_xray(home, check="headers")
    (home / "val" / "NORMAL").rename(home / "val" / "NORMALE")
    with pytest.raises(FileNotFoundError, match=r"no NORMAL in .*val; expected root"):
        chest_xray(home, "val")
    picture(home / "train" / "COVID" / "1.jpeg")
    with pytest.raises(FileNotFoundError, match=r"no class COVID belongs in .*train; expected root"):
        chest_xray(home, "train")
