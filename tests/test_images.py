import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from sightline.images import POLICIES, ImageError, as_image, fit, fit_points, probe, read

DATA = Path(__file__).parents[2] / "shared" / "data"
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)


def saved(picture: Image.Image, path: Path, **settings) -> Path:
    picture.save(path, **settings)
    return path


def of(array: np.ndarray) -> Tensor:
    """The slow way: every pixel of an 8-bit array divided by 255, gray repeated."""
    planes = [array, array, array] if array.ndim == 2 else [array[..., c] for c in range(3)]
    return torch.tensor(np.stack([plane.astype(np.float64) / 255 for plane in planes]), dtype=torch.float32)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and ends where its data would begin."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT"


# reading -------------------------------------------------------------------------------------------------------------


def test_rgb_is_read_exactly(tmp_path):
    image = read(saved(Image.fromarray(PHOTO), tmp_path / "a.png"))
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, of(PHOTO), rtol=0, atol=1e-7)
    torch.testing.assert_close(read(str(tmp_path / "a.png")), image, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_gray_and_bits_are_repeated(tmp_path, mode):
    picture = Image.fromarray(PHOTO).convert(mode)
    image = read(saved(picture, tmp_path / "a.png"))
    torch.testing.assert_close(image, of(np.array(picture.convert("L"))), rtol=0, atol=1e-7)
    assert image.unique().numel() == (2 if mode == "1" else image[0].unique().numel())


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, suffix):
    gray = np.array([[0, 255, 256, 1000], [32768, 40000, 65534, 65535]], dtype=np.uint16)
    image = read(saved(Image.fromarray(gray), tmp_path / f"a.{suffix}"))
    torch.testing.assert_close(image[1], torch.tensor(gray / 65535, dtype=torch.float32), rtol=0, atol=1e-7)


def test_big_endian_16_bit_tiff(tmp_path):
    gray = np.array([[0, 258], [513, 65535]], dtype=np.uint16)
    tags = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 1), (278, 3, 1, 2), (279, 4, 1, 8)]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, n) + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, n, value in tags
    )
    body = b"MM\x00*" + struct.pack(">I", 16) + gray.astype(">u2").tobytes()
    (tmp_path / "a.tif").write_bytes(body + struct.pack(">H", len(tags)) + entries + bytes(4))
    expected = torch.tensor(gray / 65535, dtype=torch.float32)
    torch.testing.assert_close(read(tmp_path / "a.tif")[0], expected, rtol=0, atol=1e-7)


def test_32_bit_gray_within_16_bits_is_read_and_beyond_refused(tmp_path):
    narrow = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert read(saved(narrow, tmp_path / "a.tif"))[0].tolist() == [[0, 1]]
    wide = saved(Image.fromarray(np.array([[0, 65536]], dtype=np.int32)), tmp_path / "b.tif")
    with pytest.raises(ImageError, match=r"b\.tif cannot be decoded: 32-bit gray from 0 to 65536; scale it"):
        read(wide)


def test_float_tiff_is_taken_in_0_1_only(tmp_path):
    inside = Image.fromarray(np.array([[0, 0.25, 1]], dtype=np.float32))
    assert read(saved(inside, tmp_path / "a.tif"))[2].tolist() == [[0, 0.25, 1]]
    outside = saved(Image.fromarray(np.array([[0, 255.0]], dtype=np.float32)), tmp_path / "b.tif")
    with pytest.raises(ImageError, match=r"b\.tif .* divide by 255"):
        read(outside)


def test_cmyk_jpeg(tmp_path):
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image = read(saved(ink, tmp_path / "a.jpg", quality=100))
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor([1.0, 0, 0]), rtol=0, atol=0.03)


def test_palette(tmp_path):
    picture = Image.fromarray(PHOTO).quantize(8)
    image = read(saved(picture, tmp_path / "a.png"))
    torch.testing.assert_close(image, of(np.array(picture.convert("RGB"))), rtol=0, atol=1e-7)


def test_transparency_is_shown_over_white(tmp_path):
    color, alpha = PHOTO.astype(np.float64) / 255, RNG.integers(0, 256, (12, 17), dtype=np.uint8)
    rgba = Image.fromarray(np.dstack([PHOTO, alpha]))
    weight = alpha[..., None] / 255
    expected = torch.tensor((color * weight + 1 - weight).transpose(2, 0, 1), dtype=torch.float32)
    torch.testing.assert_close(read(saved(rgba, tmp_path / "a.png")), expected, rtol=0, atol=1e-6)
    gray = Image.fromarray(np.dstack([PHOTO[..., 0], alpha]))
    assert gray.mode == "LA"
    for channel in read(saved(gray, tmp_path / "b.png")):
        torch.testing.assert_close(channel, expected[0], rtol=0, atol=1e-6)


def test_transparent_palette_entry_is_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    image = read(saved(picture, tmp_path / "a.png", transparency=0))
    assert image.permute(1, 2, 0).tolist() == [[[1, 1, 1], [0, 0, 1]]]


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_animation_gives_its_first_frame(tmp_path, suffix):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    image = read(saved(red, tmp_path / f"a.{suffix}", save_all=True, append_images=[blue]))
    assert image[:, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(PHOTO), tmp_path / "a.png", exif=exif)
    turned = {  # what the camera did, undone by hand on (h, w, 3)
        1: PHOTO,
        2: PHOTO[:, ::-1],
        3: PHOTO[::-1, ::-1],
        4: PHOTO[::-1],
        5: PHOTO.transpose(1, 0, 2),
        6: PHOTO.transpose(1, 0, 2)[:, ::-1],
        7: PHOTO.transpose(1, 0, 2)[::-1, ::-1],
        8: PHOTO.transpose(1, 0, 2)[::-1],
    }[orientation]
    torch.testing.assert_close(read(path), of(turned), rtol=0, atol=1e-7)
    assert probe(path) == (12, 17)
    with Image.open(path) as picture:
        torch.testing.assert_close(as_image(picture), of(turned), rtol=0, atol=1e-7)
        assert np.array_equal(np.array(ImageOps.exif_transpose(picture)), turned)


def test_unreadable_exif_counts_as_upright(tmp_path):
    path = saved(Image.fromarray(PHOTO), tmp_path / "a.png", exif=b"Exif\x00\x00 nonsense of some length")
    torch.testing.assert_close(read(path), of(PHOTO), rtol=0, atol=1e-7)


# broken files --------------------------------------------------------------------------------------------------------


def broken(kind: str, path: Path) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG" if "jpg" in kind else "PNG")
    whole = buffer.getvalue()
    content = {
        "empty": b"",
        "text": b"this is no image, whatever its name says",
        "truncated jpg": whole[: len(whole) // 2],
        "truncated png": whole[: len(whole) // 2],
        "header of png": whole[:33],
        "corrupt png": whole[:400] + bytes(300) + whole[700:],
        "corrupt header": whole[:12] + b"XXXX" + whole[16:],
    }[kind]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", r"is empty \(0 bytes\)"),
        ("text", "is no image in a format that Pillow knows"),
        ("truncated jpg", "cannot be decoded: .*truncated"),
        ("truncated png", "cannot be decoded: .*truncated"),
        ("header of png", "is no image"),
        ("corrupt png", "cannot be decoded: "),
        ("corrupt header", "is no image .* or its header is corrupt"),
    ],
)
def test_broken_files_are_named(tmp_path, kind, reason):
    with pytest.raises(ImageError, match=rf"bad\.png {reason}") as caught:
        read(broken(kind, tmp_path / "bad.png"))
    assert "\n" not in str(caught.value)


def test_too_large_a_picture_is_refused_before_decoding(tmp_path):
    path = saved(Image.fromarray(PHOTO), tmp_path / "a.png")
    assert read(path, pixels=12 * 17).shape == (3, 12, 17)
    for function in (read, probe):
        with pytest.raises(ImageError, match=r"a\.png is too large: 204 pixels, allowed are 203 \(pixels="):
            function(path, pixels=12 * 17 - 1)


def test_decompression_bomb(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(30_000, 30_000))
    with pytest.raises(ImageError, match=r"bomb\.png is too large: .*900000000 pixels.*MAX_IMAGE_PIXELS"):
        read(path)
    path.write_bytes(png_header(10_000, 10_000))  # Pillow only warns; an error where the caller made warnings errors
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=r"bomb\.png cannot be opened: Image size \(100000000"):
            read(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no file .*c\.png; the path exists up to the folder {tmp_path}$"):
        read(tmp_path / "b" / "c.png")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        probe(tmp_path / "a.txt" / "c.png")
    with pytest.raises(ImageError, match=f"{tmp_path} is a folder; expected an image file"):
        read(tmp_path)


def test_image_error_is_a_value_error():
    assert issubclass(ImageError, ValueError)


def test_pillow_is_left_as_it_was(tmp_path):
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    read(saved(Image.fromarray(PHOTO), tmp_path / "a.png"), pixels=10**12)
    for kind in ("empty", "truncated jpg", "corrupt png"):
        with pytest.raises(ImageError):
            read(broken(kind, tmp_path / "bad.png"))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


# other things as images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thing",
    [
        PHOTO,
        PHOTO.transpose(2, 0, 1),
        PHOTO[::-1][::-1],
        PHOTO / 255,
        (PHOTO / 255).astype(np.float32),
        PHOTO.astype(np.uint16) * 257,
        (PHOTO.astype(np.uint16) * 257).astype(">u2"),
        np.dstack([PHOTO, np.full((12, 17), 255, np.uint8)]),
        Image.fromarray(PHOTO),
        torch.from_numpy(PHOTO).permute(2, 0, 1),
        torch.from_numpy(PHOTO).permute(2, 0, 1).double() / 255,
    ],
    ids=lambda thing: f"{type(thing).__name__} {getattr(thing, 'dtype', '')} {getattr(thing, 'shape', '')}",
)
def test_every_kind_gives_the_same_image(thing):
    image = as_image(thing)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, of(PHOTO), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "thing",
    [PHOTO[..., 0], PHOTO[..., :1], PHOTO[None, ..., 0], torch.from_numpy(PHOTO[..., 0])[None]],
    ids=["h w", "h w 1", "1 h w", "tensor"],
)
def test_gray_things_are_repeated(thing):
    torch.testing.assert_close(as_image(thing), of(PHOTO[..., 0]), rtol=0, atol=1e-7)


def test_path_bool_and_opacity(tmp_path):
    path = saved(Image.fromarray(PHOTO), tmp_path / "a.png")
    for thing in (path, str(path)):
        torch.testing.assert_close(as_image(thing), of(PHOTO), rtol=0, atol=1e-7)
    assert as_image(np.eye(2, dtype=bool))[0].tolist() == [[1, 0], [0, 1]]
    assert as_image(np.array([[[0.5, 0.5, 0.5, 0.0]]])).flatten().tolist() == [1, 1, 1]


def test_an_array_is_not_changed_nor_shared():
    array = PHOTO.transpose(2, 0, 1) / 255
    as_image(array).zero_()
    assert np.array_equal(array, PHOTO.transpose(2, 0, 1) / 255)


@pytest.mark.parametrize(
    ("thing", "error", "text"),
    [
        (3.5, TypeError, "expected an image as path, Pillow picture, numpy array or tensor, got float"),
        (None, TypeError, "got NoneType"),
        (PHOTO.astype(np.int64), TypeError, "expected uint8, uint16, bool or float .* got torch.int64"),
        (torch.zeros(3, 2, 2, dtype=torch.int32), TypeError, "got torch.int32"),
        (np.array([["a"]]), TypeError, "got <U1"),
        (PHOTO.astype(np.float32), ValueError, r"expected values in \[0, 1\], got .* divide by 255"),
        ((PHOTO / 255 - 0.485) / 0.229, ValueError, r"expected values in \[0, 1\], got -2.* undo the normalization"),
        (np.array([[0, np.nan]]), ValueError, "NaN or infinity"),
        (torch.full((3, 2, 2), torch.inf), ValueError, "NaN or infinity"),
        (torch.rand(1, 3, 4, 4), ValueError, "a batch: pass its images one by one"),
        (torch.rand(6, 5, 3), ValueError, r"channels come first: permute\(2, 0, 1\)"),
        (np.zeros((5, 6, 7)), ValueError, r"got shape \(5, 6, 7\)"),
        (torch.rand(3), ValueError, r"got shape \(3,\)"),
        (np.zeros((0, 4, 3)), ValueError, "no pixels"),
    ],
)
def test_what_is_no_image_is_explained(thing, error, text):
    with pytest.raises(error, match=text):
        as_image(thing)


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path):
    with (
        Image.open(broken("truncated png", tmp_path / "bad.png")) as picture,
        pytest.raises(ImageError, match=r"bad\.png"),
    ):
        as_image(picture)


# sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 401), (401, 300), (120, 97), (224, 224), (256, 333)])
def test_policies_are_torchvisions(shape):
    from torchvision.transforms import v2

    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    theirs = {
        "direct": v2.Resize((224, 224), antialias=True),
        "crop": v2.Compose([v2.Resize(224, antialias=True), v2.CenterCrop(224)]),
        "crop256": v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)]),
    }
    assert theirs.keys() == POLICIES.keys()
    for policy, transform in theirs.items():
        torch.testing.assert_close(fit(image, 224, policy), transform(image), rtol=0, atol=2e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(5, 90), (90, 5), (33, 64), (7, 7), (1, 1)])
def test_every_policy_gives_the_size(policy, shape):
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    fitted = fit(image, (16, 24), policy)
    assert fitted.shape == (3, 16, 24)
    assert fitted.min() >= 0
    assert fitted.max() <= 1


def test_crop_keeps_the_middle_and_the_shape():
    image = torch.zeros(1, 10, 30)
    image[:, :, 10:20] = 1
    assert fit(image, 10, "crop").eq(1).all()
    assert fit(image, 20, "crop")[:, :, 1:-1].gt(0.5).all()
    assert fit(image, 30, "direct").mean().item() == pytest.approx(1 / 3, abs=0.01)


def test_an_image_of_the_right_size_is_left_alone():
    image = torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(fit(image, (8, 9), "direct"), image)
    assert torch.equal(fit(image, (8, 9), "crop"), image)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (50, 50)])
def test_points_move_with_their_pixels(policy, shape):
    """A soft dot is drawn, the image is resized, and the dot's center of mass must be where the point went."""
    y, x = torch.meshgrid(torch.arange(shape[0]) + 0.5, torch.arange(shape[1]) + 0.5, indexing="ij")
    center = torch.tensor([[shape[1] * 0.5 + 4, shape[0] * 0.5 - 3]])
    dot = torch.exp(-((x - center[0, 0]) ** 2 + (y - center[0, 1]) ** 2) / 8)
    fitted = fit(dot[None], (80, 64), policy)[0]
    y, x = torch.meshgrid(torch.arange(80) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    mass = torch.stack([(x * fitted).sum(), (y * fitted).sum()]) / fitted.sum()
    torch.testing.assert_close(fit_points(center, shape, (80, 64), policy)[0], mass, rtol=0, atol=0.05)


def test_points_by_hand():
    points = torch.tensor([[0.0, 0], [227, 227], [113.5, 22.7]])
    moved = fit_points(points, (227, 227), (100, 200), "direct")
    torch.testing.assert_close(moved, torch.tensor([[0.0, 0], [200, 100], [100, 10]]))
    moved = fit_points(torch.tensor([[15.0, 5.0]]), (10, 30), 20, "crop")  # doubled, then 20 pixels cut off on the left
    assert moved.tolist() == [[10, 10]]


def test_sizes_and_policies_that_do_not_exist():
    image = torch.zeros(3, 4, 4)
    with pytest.raises(LookupError, match="no resize policy called 'crop255'; did you mean crop256"):
        fit(image, 4, "crop255")
    with pytest.raises(LookupError, match="no resize policy called 'zzz'; known: crop, crop256, direct"):
        fit_points(torch.zeros(1, 2), (4, 4), 4, "zzz")
    with pytest.raises(ValueError, match=r"a size is a positive side .* got \(0, 4\)"):
        fit(image, (0, 4), "direct")


def test_a_thread_of_an_image_is_refused_before_memory_runs_out():
    thread = torch.zeros(3, 1, 4000)
    with pytest.raises(ValueError, match=r"\(1, 4000\) would be scaled to \(224, 896000\) for 'crop', .* use 'direct'"):
        fit(thread, 224, "crop")
    assert fit(thread, 224, "direct").shape == (3, 224, 224)


def test_close_to_torchvisions_8_bit_evaluation():
    """The two orders, float first or 8 bits first, differ by rounding: at most two gray levels on a photograph."""
    from torchvision.transforms import v2

    photos = sorted((DATA / "imagenet-sample").glob("*/*.JPEG"))[:3]
    if not photos:
        pytest.skip("../shared/data/imagenet-sample is absent")
    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    for photo in photos:
        with Image.open(photo) as picture:
            theirs = usual(picture.convert("RGB"))
        assert (fit(read(photo), 224, "crop256") - theirs).abs().max() <= 2 / 255
