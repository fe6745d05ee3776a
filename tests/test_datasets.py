import gzip
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sightline import datasets
from sightline.data import Sample, batches
from sightline.datasets import DATASETS, PARTS, _folder, cub_crops, folder, mnist
from sightline.images import ImageError
from sightline.registry import find

DATA = Path(__file__).parents[2] / "shared" / "data"


def needs(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"../shared/data/{name} is absent")
    return DATA / name


def picture(path: Path, *, seed: int = 0, size: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# the catalogue -------------------------------------------------------------------------------------------------------


def test_importing_the_catalogue_imports_no_torch():
    code = (
        "import sys, sightline.datasets as d; list(d.DATASETS); dir(d); d.DATASETS['folder'].summary;"
        "print([m for m in ('torch', 'torchvision', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_entries_are_called_like_their_readers(tmp_path):
    picture(tmp_path / "a" / "1.png")
    entry = find("folder", DATASETS, "datasets")
    assert entry.needs_root
    assert entry(tmp_path, size=8)[0].image.shape == (3, 8, 8)
    with pytest.raises(LookupError, match="no dataset called 'mnst'; did you mean mnist"):
        find("mnst", DATASETS, "datasets")


def test_names_are_reached_through_the_package():
    assert set(datasets.__all__) == {"DATASETS", "PARTS", "Entry", *DATASETS}
    assert set(datasets.__all__) <= set(dir(datasets))
    assert datasets.cub_crops is cub_crops
    with pytest.raises(AttributeError, match="no attribute 'image_net'"):
        _ = datasets.image_net


def test_every_entry_says_what_it_is():
    for entry in DATASETS.values():
        assert entry.summary
        assert entry.licence
        module, name = entry.load.split(":")
        assert module.startswith("sightline.datasets._")
        assert name in DATASETS


@pytest.mark.parametrize("name", [name for name, entry in DATASETS.items() if entry.needs_root])
def test_a_missing_root_says_how_it_must_look(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; expected root"):
        DATASETS[name](tmp_path / "nowhere")


@pytest.mark.parametrize("name", [name for name, entry in DATASETS.items() if entry.needs_root])
def test_an_empty_root_says_how_it_must_look(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .* in .*; expected "):
        DATASETS[name](tmp_path)


# folders -------------------------------------------------------------------------------------------------------------


def test_folder_has_the_order_and_labels_of_image_folder(tmp_path):
    from torchvision.datasets import ImageFolder

    for seed, name in enumerate(
        ["zebra/b.png", "zebra/a.jpg", "ant/sub/c.PNG", "ant/d.bmp", "bee/e.webp", "bee/f.tif"]
    ):
        picture(tmp_path / name, seed=seed)
    (tmp_path / "bee" / "notes.txt").write_text("not an image")
    ours, theirs = folder(tmp_path, size=(8, 10)), ImageFolder(str(tmp_path))
    assert list(ours.classes) == theirs.classes == ["ant", "bee", "zebra"]
    assert [(str(tmp_path / sample.id), sample.label) for sample in ours] == theirs.samples
    assert all(sample.image.shape == (3, 8, 10) and sample.size == (20, 30) for sample in ours)
    assert len(ours) == 6
    assert ours.skipped == {}


def test_a_sample_is_the_picture(tmp_path):
    path = picture(tmp_path / "a" / "1.png")
    sample = folder(tmp_path, size=(20, 30))[0]
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert isinstance(sample, Sample)
    assert sample.id == "a/1.png"
    torch.testing.assert_close(sample.image, pixels / 255, rtol=0, atol=1e-7)


def test_flat_and_nested_folders_without_classes(tmp_path):
    picture(tmp_path / "b.png")
    picture(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    flat = folder(tmp_path, size=8)
    assert [sample.id for sample in flat] == ["a.png", "b.png"]
    assert [sample.label for sample in flat] == [None, None]
    assert flat.classes == ()
    picture(tmp_path / "2024" / "c.png")
    nested = folder(tmp_path, size=8, labels=False)
    assert [sample.id for sample in nested] == ["a.png", "b.png", "2024/c.png"]
    assert nested.classes == ()
    classed = folder(tmp_path, size=8)
    assert [sample.id for sample in classed] == ["2024/c.png"]
    assert classed.classes == ("2024", "empty")
    assert set(classed.skipped) == {"a.png", "b.png"}
    assert "beside the class folders; labels=false reads it" in classed.skipped["a.png"]


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    picture(tmp_path / "a" / "1.png")
    for name in (".ipynb_checkpoints/1.png", "__MACOSX/a/1.png", "a/.1.png", "a/.thumbs/1.png"):
        picture(tmp_path / name)
    files = folder(tmp_path, size=8)
    assert files.classes == ("a",)
    assert files.files == ("a/1.png",)
    assert files.skipped == {}


@pytest.fixture
def mixed(tmp_path):
    """Three good pictures of odd kinds, and one file of every broken kind."""
    home = tmp_path / "mixed"
    Image.new("CMYK", (9, 9)).save(picture(home / "good" / "cmyk.jpg"))
    Image.new("I;16", (9, 9), 500).save(home / "good" / "sixteen.png")
    Image.new("P", (9, 9)).save(home / "good" / "palette.png")
    bad = home / "bad"
    bad.mkdir()
    (bad / "empty.jpg").touch()
    (bad / "text.png").write_text("no image")
    for suffix in ("jpg", "png"):
        whole = picture(bad / f"truncated.{suffix}", size=(64, 64)).read_bytes()
        (bad / f"truncated.{suffix}").write_bytes(whole[: len(whole) // 2])
    (bad / "corrupt.png").write_bytes(whole[:400] + bytes(300) + whole[700:])
    head = b"IHDR" + struct.pack(">II", 50_000, 50_000) + whole[24:29]
    (bad / "huge.png").write_bytes(whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:])
    (bad / "dangling.png").symlink_to(home / "nowhere.png")
    (bad / "f.png").mkdir()
    picture(bad / "f.png" / "inside.png")
    return home


def test_broken_files_are_skipped_and_counted(mixed):
    files = folder(mixed, size=8)
    assert files.classes == ("bad", "good")
    assert files.files == ("bad/f.png/inside.png", "good/cmyk.jpg", "good/palette.png", "good/sixteen.png")
    assert [sample.label for sample in files] == [0, 1, 1, 1]
    reasons = {
        "bad/empty.jpg": "is empty (0 bytes)",
        "bad/text.png": "is no image",
        "bad/truncated.jpg": "truncated",
        "bad/truncated.png": "truncated",
        "bad/corrupt.png": "cannot be decoded",
        "bad/huge.png": "too large",
        "bad/dangling.png": "there is no file",
    }
    assert files.skipped.keys() == reasons.keys()
    for file, reason in reasons.items():
        assert reason in files.skipped[file]
        assert file in files.skipped[file]


@pytest.mark.parametrize("check", ["header", "none"])
def test_what_slips_through_is_named_when_asked_for(mixed, check):
    files = folder(mixed, size=8, check=check)
    seen = {"bad/empty.jpg", "bad/text.png", "bad/huge.png", "bad/dangling.png"} if check == "header" else set()
    assert files.skipped.keys() == seen
    index = files.files.index("bad/truncated.png")
    with pytest.raises(ImageError, match=r"truncated\.png cannot be decoded: .*; check='decode' skips such files"):
        _ = files[index]
    assert files[len(files) - 1].id == "good/sixteen.png"


def test_a_folder_of_broken_files_only(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"none of the 2 images in .* can be used; the first: .*a\.png is empty"):
        folder(tmp_path)


@pytest.mark.parametrize("check", ["decode", "header"])
def test_files_are_looked_at_a_part_at_a_time(tmp_path, monkeypatch, check):
    for number in range(7):
        picture(tmp_path / f"{number}.png", seed=number)
    for broken in (2, 5):
        (tmp_path / f"{broken}.png").write_bytes(b"")
    asked = []

    class Noting(ThreadPoolExecutor):
        def map(self, function, listed):
            asked.append(len(listed))
            return super().map(function, listed)

    monkeypatch.setattr(_folder, "ThreadPoolExecutor", Noting)
    monkeypatch.setattr(_folder, "AT_ONCE", 3)
    files = folder(tmp_path, size=8, check=check)
    assert asked == [3, 3, 1]
    assert files.files == ("0.png", "1.png", "3.png", "4.png", "6.png")
    assert {name: reason.split(": ")[-1] for name, reason in files.skipped.items()} == {
        name: f"{tmp_path / name} is empty (0 bytes)" for name in ("2.png", "5.png")
    }


def test_files_that_are_trusted_cost_nothing(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(_folder, "ThreadPoolExecutor", None)
    assert folder(tmp_path, size=8, check="none").files == ("a.png",)


def test_count_spreads_evenly(tmp_path):
    for number in range(10):
        picture(tmp_path / str(number % 2) / f"{number}.png", seed=number)
    files = folder(tmp_path, size=8, count=4, check="none")
    assert files.files == ("0/0.png", "0/4.png", "1/1.png", "1/5.png")
    assert files.classes == ("0", "1")
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"there are 10 images, got {count}; ask for 1 to 10"):
            folder(tmp_path, count=count)


def test_resize_policies_and_wrong_names(tmp_path):
    picture(tmp_path / "a.png")
    assert not torch.equal(folder(tmp_path, size=8)[0].image, folder(tmp_path, size=8, resize="crop")[0].image)
    with pytest.raises(LookupError, match="no resize policy called 'croop'; did you mean crop"):
        folder(tmp_path, resize="croop")
    with pytest.raises(LookupError, match="no check called 'headers'; did you mean header"):
        folder(tmp_path, check="headers")
    with pytest.raises(ValueError, match="positive side"):
        folder(tmp_path, size=0)


def test_data_sets_stack_into_batches_and_pickle(tmp_path):
    for number in range(5):
        picture(tmp_path / "a" / f"{number}.png", seed=number, size=(10 + number, 20))
    files = pickle.loads(pickle.dumps(folder(tmp_path, size=8)))
    assert [batch.x.shape[0] for batch in batches(files, 2)] == [2, 2, 1]
    assert files[-1].id == "a/4.png"
    with pytest.raises(IndexError):
        _ = files[5]


def test_imagenet_sample():
    files = folder(needs("imagenet-sample"), check="header", resize="crop", size=64)
    assert len(files) == len(files.classes) == 700
    assert files.skipped == {}
    sample = files[0]
    assert (sample.id, sample.label, sample.size) == ("n01440764/n01440764_tench.JPEG", 0, (256, 341))


# MNIST ---------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def digits(folder: Path, *, packed: bool) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(7, dtype=np.uint8) + 3)):
            content = idx(array)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return pixels


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("where", ["MNIST/raw", "raw", "."])
def test_mnist_is_read_packed_and_unpacked(tmp_path, packed, where):
    pixels = digits(tmp_path / where, packed=packed)
    data = mnist(tmp_path, "train")
    assert len(data) == 7
    assert data.classes == tuple("0123456789")
    assert data.skipped == {}
    for number, sample in enumerate(data):
        assert (sample.id, sample.label, sample.size) == (f"train/{number:05d}", number + 3, (28, 28))
        for channel in sample.image:
            torch.testing.assert_close(channel, torch.tensor(pixels[number] / 255).float(), rtol=0, atol=1e-7)
        assert np.array_equal(sample.mask.numpy(), np.where(pixels[number] > 127, number + 4, 0))


def test_mnist_is_torchvisions(tmp_path):
    from torchvision.datasets import MNIST

    digits(tmp_path / "MNIST" / "raw", packed=False)
    theirs, ours = MNIST(str(tmp_path), train=False), mnist(tmp_path)
    assert [sample.label for sample in ours] == theirs.targets.tolist()
    assert torch.equal(ours.pixels, theirs.data)


def test_mnist_size_and_count(tmp_path):
    digits(tmp_path, packed=True)
    data = mnist(tmp_path, size=(56, 40), count=2)
    assert len(data) == 2
    assert data[-1].image.shape == (3, 56, 40)
    assert data[-1].mask.shape == (56, 40)
    assert set(data[-1].mask.unique().tolist()) == {0, 5}
    assert data[-1].id == data[1].id
    assert torch.equal(data[1].mask > 0, data[1].image[0] > 0.5)
    with pytest.raises(IndexError, match="there are 2 digits, got index 2"):
        _ = data[2]
    with pytest.raises(ValueError, match="there are 7 images, got 8"):
        mnist(tmp_path, count=8)


def test_mnist_errors(tmp_path):
    digits(tmp_path, packed=True)
    with pytest.raises(LookupError, match="no split of MNIST called 'tset'; did you mean test"):
        mnist(tmp_path, "tset")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for broken in (whole[:-100], b"no gzip at all", gzip.compress(b"\0\0\x08\x03"), gzip.compress(b""), b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged: .*fetch it again"):
            mnist(tmp_path)
    path.write_bytes(gzip.compress(idx(np.zeros((6, 28, 28), np.uint8))))
    with pytest.raises(ValueError, match="holds 6 images but 7 labels of 'test'"):
        mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no t10k-labels-idx1-ubyte in .*; expected root/MNIST/raw"):
        mnist(tmp_path)


def test_mnist_of_the_shared_data():
    data = mnist(needs("MNIST").parent)
    assert len(data) == 10_000
    assert data.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data[0].image.mean() < 0.3
    assert len(mnist(DATA / "MNIST", "train")) == 60_000


# CUB -----------------------------------------------------------------------------------------------------------------


def birds(home: Path) -> Path:
    """Classes 2, 5 and 9 with four crops each, image ids 10, 20, ...; odd ids of a class are for training."""
    lists = {name: [] for name in ("images", "image_class_labels", "train_test_split", "parts/part_locs", "classes")}
    for number in range(1, 11):
        lists["classes"].append(f"{number} {number:03d}.Bird_{number}")
    for n in range(12):
        number, i = (2, 5, 9)[n // 4], 10 * (n + 1)
        name = f"{number:03d}.Bird_{number}/Bird_{i}.jpg"
        picture(home / "images" / name, seed=n, size=(50, 40))
        lists["images"].append(f"{i} {name}")
        lists["image_class_labels"].append(f"{i} {number}")
        lists["train_test_split"].append(f"{i} {n % 2}")
        for part in range(1, 16):
            seen = (n + part) % 3 > 0
            lists["parts/part_locs"].append(
                f"{i} {part} " + (f"{2.5 * part} {3.0 * part + n / 4} 1" if seen else "0 0 0")
            )
    table = np.random.default_rng(0).uniform(0, 100, (10, 312)).round(4)
    (home / "parts").mkdir()
    (home / "attributes").mkdir()
    for name, lines in lists.items():
        (home / f"{name}.txt").write_text("\n".join(lines) + "\n")
    np.savetxt(home / "attributes" / "class_attribute_labels_continuous.txt", table, fmt="%.4f")
    return home


def test_cub_labels_classes_and_splits(tmp_path):
    home = birds(tmp_path / "CUB_200_2011")
    test, train = cub_crops(home, size=8), cub_crops(tmp_path, "train", size=8)
    assert test.classes == train.classes == ("002.Bird_2", "005.Bird_5", "009.Bird_9")
    assert [sample.label for sample in test] == [sample.label for sample in train] == [0, 0, 1, 1, 2, 2]
    assert [sample.id for sample in test][:3] == [f"{c}.Bird_{c[-1]}/Bird_{i}.jpg" for c, i in
                                                  (("002", 10), ("002", 30), ("005", 50))]  # fmt: skip
    assert not {sample.id for sample in test} & {sample.id for sample in train}
    assert all(sample.boxes is None and sample.size == (50, 40) for sample in test)


def test_cub_keypoints_and_attributes_by_hand(tmp_path):
    home = birds(tmp_path)
    table = np.loadtxt(home / "attributes" / "class_attribute_labels_continuous.txt")
    data = cub_crops(home, "train", size=(100, 20))
    for index, sample in enumerate(data):
        n = 2 * index + 1
        expected = [
            [2.5 * part * 20 / 40, (3 * part + n / 4) * 100 / 50, 1] if (n + part) % 3 > 0 else [0, 0, 0]
            for part in range(1, 16)
        ]
        torch.testing.assert_close(sample.keypoints, torch.tensor(expected))
        assert sample.attributes.shape == (312,)
        row = torch.tensor(table[(1, 4, 8)[sample.label]] / 100, dtype=torch.float32)
        torch.testing.assert_close(sample.attributes, row)


def test_cub_keypoints_that_are_cut_away_are_invisible(tmp_path):
    """Crops of 50 x 40 become 25 x 20, of which rows 2 to 21 stay (2.5 is rounded to even)."""
    sample = cub_crops(birds(tmp_path), size=20, resize="crop")[0]
    for part, point in enumerate(sample.keypoints.tolist(), start=1):
        x, y = 2.5 * part / 2, 3 * part / 2 - 2
        inside = part % 3 > 0 and 0 <= y <= 20
        assert point == pytest.approx([x, y, 1] if inside else [0, 0, 0])
    assert 0 < sample.keypoints[:, 2].sum() < 10


def test_cub_first_classes_and_count(tmp_path):
    home = birds(tmp_path)
    two = cub_crops(home, classes=2, size=8)
    assert two.classes == ("002.Bird_2", "005.Bird_5")
    assert [sample.label for sample in two] == [0, 0, 1, 1]
    assert [sample.label for sample in cub_crops(home, count=3, size=8)] == [0, 1, 2]
    with pytest.raises(ValueError, match="there are 3 classes, got 4; ask for 1 to 3"):
        cub_crops(home, classes=4)
    with pytest.raises(ValueError, match="there are 6 images, got 7"):
        cub_crops(home, count=7)


def test_cub_skips_broken_crops_and_keeps_the_rest_in_step(tmp_path):
    home = birds(tmp_path)
    whole = cub_crops(home, size=8)
    (home / "images" / whole.files[1]).write_bytes(b"")
    (home / "images" / whole.files[2]).unlink()
    rest = cub_crops(home, size=8)
    assert rest.skipped.keys() == {whole.files[1], whole.files[2]}
    assert rest.files == (whole.files[0], *whole.files[3:])
    for ours, theirs in zip(rest, [whole[index] for index in (0, 3, 4, 5)], strict=True):
        assert (ours.id, ours.label) == (theirs.id, theirs.label)
        assert torch.equal(ours.keypoints, theirs.keypoints)
        assert torch.equal(ours.attributes, theirs.attributes)
    with pytest.raises(ImageError, match=r"is empty \(0 bytes\); check='decode' skips such files"):
        _ = cub_crops(home, size=8, check="none")[1]


def test_cub_errors(tmp_path):
    home = birds(tmp_path)
    with pytest.raises(LookupError, match="no split of CUB called 'val'; known: test, train"):
        cub_crops(home, "val")
    with pytest.raises(LookupError, match="no resize policy called"):
        cub_crops(home, resize="squash")
    for name, content, text in (
        ("parts/part_locs.txt", "10 16 1 1 1\n", "part_locs.txt is damaged; expected image, part"),
        ("parts/part_locs.txt", "10 one 1 1 1\n", "part_locs.txt is damaged: .* expected a table of numbers"),
        ("attributes/class_attribute_labels_continuous.txt", "1 2\n3 4\n", "damaged: 2 rows for class number 9"),
        ("image_class_labels.txt", "10 2\n", "images.txt are missing in its other lists"),
        (
            "image_class_labels.txt",
            "10 two\n",
            "image_class_labels.txt is damaged: .*; expected lines of two words",
        ),
        ("classes.txt", "2 002.Bird_2\n", "classes.txt is damaged: no class number 5"),
        ("images.txt", "10\n", "images.txt is damaged: .*; expected lines of two words"),
    ):
        before = (home / name).read_text()
        (home / name).write_text(content)
        with pytest.raises(ValueError, match=text):
            cub_crops(home)
        (home / name).write_text(before)
    shutil.rmtree(home / "parts")
    with pytest.raises(
        FileNotFoundError, match=r"no parts/part_locs\.txt in .*; expected root \(or root/CUB_200_2011\)"
    ):
        cub_crops(home)


@pytest.mark.parametrize(("split", "length"), [("train", 2999), ("test", 2903)])
def test_cub_of_the_shared_data(split, length):
    home = needs("CUB_200_2011")
    data = cub_crops(home, split, size=64, check="header")
    assert len(data) == length
    assert data.skipped == {}
    assert len(data.classes) == 100
    assert set(data.labels) == set(range(100))
    assert data.attributes.shape == (100, 312)
    assert 0 <= data.attributes.min() < data.attributes.max() <= 1
    assert 0 <= data.keypoints[..., :2].min() < data.keypoints[..., :2].max() <= 227
    sample = data[length // 2]
    seen = sample.keypoints[:, 2] > 0
    assert sample.image.shape == (3, 64, 64)
    assert sample.size == (227, 227)
    assert 0 < seen.sum() <= 15
    torch.testing.assert_close(
        sample.keypoints[seen], data.keypoints[length // 2][seen] * torch.tensor([64 / 227] * 2 + [1])
    )


def test_part_names_are_the_official_ones():
    lines = (needs("CUB_200_2011") / "parts" / "parts.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == list(PARTS)
