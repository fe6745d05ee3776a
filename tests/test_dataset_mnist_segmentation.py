import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sightline.data import Dataset, batches
from sightline.datasets._mnist import mnist
from sightline.datasets._mnist_segmentation import mnist_segmentation

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def root(tmp_path):
    """Five digits whose ink is faint and strong; the last one is blank."""
    pixels = np.random.default_rng(0).choice([0, 0, 1, 127, 255], (5, 28, 28)).astype(np.uint8)
    pixels[4] = 0
    for prefix in ("train", "t10k"):
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(5, dtype=np.uint8) + 5)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (tmp_path / f"{prefix}-{name}-ubyte").write_bytes(head + array.tobytes())
    return tmp_path


@pytest.mark.parametrize("size", [(128, 128), (28, 28), (56, 84), (31, 40), (14, 28)])
def test_every_pixel_is_the_nearest_one_and_all_ink_counts(root, size):
    data, plain = mnist_segmentation(root, size=size), mnist(root)
    for index, sample in enumerate(data):
        pixels = plain.pixels[index]
        for y in range(size[0]):
            source = pixels[int((y + 0.5) * 28 / size[0])]
            row = source[((torch.arange(size[1]) + 0.5) * 28 / size[1]).long()]
            torch.testing.assert_close(sample.image[0, y], row / 255, rtol=0, atol=1e-7)
            assert sample.mask[y].tolist() == [(index + 6) * (value > 0) for value in row.tolist()]
        assert torch.equal(sample.image[0], sample.image[2])
        assert (sample.id, sample.label, sample.size) == (f"test/{index:05d}", index + 5, (28, 28))


def test_defaults_and_fields(root):
    data = mnist_segmentation(root, "train")
    assert isinstance(data, Dataset)
    assert len(data) == 5
    assert data.classes == tuple("0123456789")
    assert data.skipped == {}
    assert data[0].image.shape == (3, 128, 128)
    assert data[0].mask.shape == (128, 128)
    assert data[0].id == "train/00000"
    assert not data[4].mask.any()
    assert data[-1].id == data[4].id
    assert data[0].boxes is None
    with pytest.raises(IndexError, match="there are 5 digits, got index 5"):
        _ = data[5]
    with pytest.raises(IndexError, match="got index -6"):
        _ = data[-6]


def test_data_sets_stack_into_batches_and_pickle(root):
    data = pickle.loads(pickle.dumps(mnist_segmentation(root, size=16, count=3)))
    assert [batch.x.shape[0] for batch in batches(data, 2)] == [2, 1]


def test_errors(root, tmp_path):
    with pytest.raises(LookupError, match="no split of MNIST called 'tset'; did you mean test"):
        mnist_segmentation(root, "tset")
    with pytest.raises(ValueError, match="there are 5 images, got 6"):
        mnist_segmentation(root, count=6)
    with pytest.raises(ValueError, match="positive side"):
        mnist_segmentation(root, size=0)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; expected root"):
        mnist_segmentation(tmp_path / "nowhere")
    (root / "t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte is damaged"):
        mnist_segmentation(root)


def test_the_shared_digits():
    if not (DATA / "MNIST").is_dir():
        pytest.skip("../shared/data/MNIST is absent")
    data = mnist_segmentation(DATA, count=50)
    plain = mnist(DATA, count=50)
    for sample, pixels in zip(data, plain.pixels, strict=True):
        assert torch.equal(sample.mask > 0, sample.image[0] > 0)
        assert set(sample.mask.unique().tolist()) == {0, sample.label + 1}
        assert abs((sample.mask > 0).float().mean() - (pixels > 0).float().mean()) < 0.02
    assert len(mnist_segmentation(DATA, "train")) == 60_000
