"""Images. Files, pictures and arrays as float tensors in [0, 1], and the named ways of bringing them to a size.

Everything becomes float32 first and is resized afterwards, with PyTorch's antialiased bilinear filter, so nothing is
rounded to 8 bits a second time. *Differs:* torchvision's usual evaluation resizes 8-bit pictures with Pillow; the two
agree within two gray levels. Transparent pixels are shown over white, as on a page.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from sightline.registry import unknown

Size: TypeAlias = tuple[int, int]
"""Height and width in pixels."""

PIXELS = 178_956_970
"""The largest picture that is decoded unless asked otherwise: Pillow's own limit."""

ROUNDING = 1e-4
"""How far a value may leave [0, 1] and still count as rounding."""


class ImageError(ValueError):
    """A file or picture that cannot be decoded; the message names it and says why."""


def read(path: str | PathLike[str], *, pixels: int = PIXELS) -> Float[Tensor, "3 h w"]:
    """Decode an image file to RGB in [0, 1], upright.

    EXIF orientation is applied (unreadable EXIF data counts as upright), of an animation the first frame is taken,
    16-bit gray is divided by 65535. Pillow reads 16-bit color in 8 bits, and repairs damage inside JPEG data silently.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: empty, truncated or corrupt, no image, a folder, or more than `pixels` pixels.
    """
    try:
        with _opened(Path(path), pixels) as picture:
            return _of_array(_array(picture))
    except (ImageError, FileNotFoundError):
        raise
    except Exception as error:  # on damaged data Pillow's decoders raise nearly anything
        raise ImageError(f"{path} cannot be decoded: {_reason(error)}") from error


def probe(path: str | PathLike[str], *, pixels: int = PIXELS) -> Size:
    """Read a file's header alone: height and width as stored, before any turning.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: what is wrong can be seen without decoding.
    """
    with _opened(Path(path), pixels) as picture:
        return picture.height, picture.width


def as_image(thing: object) -> Float[Tensor, "3 h w"]:
    """Take a path, Pillow picture, numpy array or tensor as one RGB image in [0, 1].

    Arrays: `(h, w)`, `(h, w, 1 | 3 | 4)` or else `(1 | 3 | 4, h, w)`; tensors: `(h, w)` or `(1 | 3 | 4, h, w)`.
    Values: uint8 (divided by 255), uint16 (by 65535), bool, or float in [0, 1]. Four channels are RGB and opacity.

    Raises:
        TypeError: another kind of thing, or another dtype.
        ValueError: a wrong shape, values outside [0, 1], NaN or infinity.
        ImageError, FileNotFoundError: the file or picture cannot be decoded.
    """
    match thing:
        case str() | PathLike():
            return read(thing)
        case Image.Image():
            return _of_picture(thing)
        case np.ndarray():
            return _of_array(thing)
        case Tensor():
            return _rgb(_unit(thing))
        case _:
            kind = type(thing).__name__
            raise TypeError(f"expected an image as path, Pillow picture, numpy array or tensor, got {kind}")


def fit(image: Float[Tensor, "ch h w"], size: int | Size, policy: str) -> Float[Tensor, "ch i j"]:
    """Resize with a policy of `POLICIES` (antialiased bilinear), then cut out the center of that size.

    `size` is height and width, or the side of a square; values stay in [0, 1].

    Raises:
        LookupError: no such policy.
        ValueError: a size below one pixel, or so thin an image that it would be scaled to over `PIXELS` pixels.
    """
    wanted, source = as_size(size), (image.shape[-2], image.shape[-1])
    scaled, (top, left) = plan(source, wanted, policy)
    if scaled[0] * scaled[1] > PIXELS:
        raise ValueError(f"{source} would be scaled to {scaled} for {policy!r}, over {PIXELS} pixels; use 'direct'")
    if scaled != source:
        image = interpolate(image[None], scaled, mode="bilinear", antialias=True)[0].clamp(0, 1)
    return image[:, top : top + wanted[0], left : left + wanted[1]]


def fit_points(points: Float[Tensor, "n 2"], source: Size, size: int | Size, policy: str) -> Float[Tensor, "n 2"]:
    """Move points `x y` of an image of size `source` to where `fit` brings them; they may land outside.

    Raises:
        LookupError: no such policy.
        ValueError: a size below one pixel.
    """
    (h, w), (top, left) = plan(source, as_size(size), policy)
    return points * points.new_tensor([w / source[1], h / source[0]]) - points.new_tensor([left, top])


def as_size(size: int | Size) -> Size:
    """Read a side or a pair as height and width.

    Raises:
        ValueError: a size below one pixel.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"a size is a positive side or (height, width) in pixels, got {size}")
    return height, width


def _direct(source: Size, size: Size) -> Size:
    """Squash to exactly `size`, whatever the picture's shape."""
    return size


def _cover(source: Size, size: Size) -> Size:
    """Keep the shape and cover `size` as tightly as possible: for a square, the short side becomes its side."""
    (H, W), (h, w) = source, size
    return (h, h * W // H) if h * W >= w * H else (w * H // W, w)


def _cover256(source: Size, size: Size) -> Size:
    """Cover 256/224 of `size`, the margin of torchvision's usual evaluation."""
    return _cover(source, (round(size[0] * 256 / 224), round(size[1] * 256 / 224)))


POLICIES: Mapping[str, Callable[[Size, Size], Size]] = MappingProxyType(
    {"direct": _direct, "crop": _cover, "crop256": _cover256}
)
"""Resize policy -> (picture's size, wanted size) -> size to scale to, of which the center is then cut out."""


def plan(source: Size, size: Size, policy: str) -> tuple[Size, Size]:
    """Return the size to scale to and the upper left corner of the center."""
    if policy not in POLICIES:
        raise LookupError(unknown(policy, POLICIES, "resize policy"))
    scaled = POLICIES[policy](source, size)
    return scaled, (round((scaled[0] - size[0]) / 2), round((scaled[1] - size[1]) / 2))


def _opened(path: Path, pixels: int) -> Image.Image:
    """Open a file without decoding it; Pillow's warning about large pictures reaches the caller."""
    _check_file(path)
    try:
        picture = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large: {error} PIL.Image.MAX_IMAGE_PIXELS sets that limit") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is no image in a format that Pillow knows, or its header is corrupt") from error
    except Exception as error:  # a damaged header, or no permission
        raise ImageError(f"{path} cannot be opened: {_reason(error)}") from error
    count = picture.width * picture.height
    if count > pixels:
        picture.close()
        raise ImageError(f"{path} is too large: {count} pixels, allowed are {pixels} (pixels=...)")
    return picture


def _check_file(path: Path) -> None:
    """Refuse what is not a file with something in it."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        parent = next(folder for folder in path.absolute().parents if folder.is_dir())
        raise FileNotFoundError(f"there is no file {path}; the path exists up to the folder {parent}") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be opened: {_reason(error)}") from error
    if not S_ISREG(status.st_mode):
        raise ImageError(f"{path} is a {'folder' if S_ISDIR(status.st_mode) else 'device'}; expected an image file")
    if status.st_size == 0:
        raise ImageError(f"{path} is empty (0 bytes)")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _of_picture(picture: Image.Image) -> Float[Tensor, "3 h w"]:
    """Convert a picture that somebody else has opened."""
    try:
        array = _array(picture)
    except Exception as error:  # as in `read`
        name = getattr(picture, "filename", "") or f"the {picture.mode} picture"
        raise ImageError(f"{name} cannot be decoded: {_reason(error)}") from error
    return _of_array(array)


def _array(picture: Image.Image) -> NDArray[Any]:
    """Decode to RGB or RGBA in 8 bits, or to gray with its full depth."""
    picture.load()
    picture = _upright(picture)
    if picture.mode == "I":
        return _sixteen_bits(np.array(picture))
    if picture.mode == "F" or picture.mode.startswith("I;16"):
        return np.array(picture)
    return np.array(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))


def _upright(picture: Image.Image) -> Image.Image:
    """Turn as the EXIF data says, if it can be read."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged metadata is no reason to refuse a picture
        return picture


def _sixteen_bits(gray: NDArray[Any]) -> NDArray[np.uint16]:
    """Narrow Pillow's 32-bit gray, in which some 16-bit files arrive."""
    if gray.min() < 0 or gray.max() > 65535:
        raise ValueError(f"32-bit gray from {gray.min()} to {gray.max()}; scale it to [0, 1] and pass it as an array")
    return gray.astype(np.uint16)


def _of_array(array: NDArray[Any]) -> Float[Tensor, "3 h w"]:
    """Bring channels to the front, values to [0, 1] and colors to RGB."""
    if array.dtype.kind not in "buif":
        raise TypeError(_dtype_message(array.dtype))
    if array.ndim == 3 and array.shape[2] in (1, 3, 4):
        array = array.transpose(2, 0, 1)
    native = array.astype(array.dtype.newbyteorder("="))
    return _rgb(_unit(torch.from_numpy(np.ascontiguousarray(native))))


def _unit(values: Tensor) -> Tensor:
    """Scale integers to [0, 1] by their range; check floats."""
    if values.numel() == 0:
        raise ValueError(f"expected an image, got no pixels: shape {tuple(values.shape)}")
    if values.dtype in (torch.uint8, torch.uint16):
        return values.float() / torch.iinfo(values.dtype).max
    if values.dtype == torch.bool:
        return values.float()
    if not values.is_floating_point():
        raise TypeError(_dtype_message(values.dtype))
    _check_range(values)
    return values.float().clamp(0, 1)


def _check_range(values: Tensor) -> None:
    """Refuse floats outside [0, 1]."""
    low, high = values.min().item(), values.max().item()
    if not values.isfinite().all():
        raise ValueError("expected finite values in [0, 1], got NaN or infinity")
    if low < -ROUNDING:
        raise ValueError(f"expected values in [0, 1], got {low:g} to {high:g}; undo the normalization")
    if high > 1 + ROUNDING:
        raise ValueError(
            f"expected values in [0, 1], got {low:g} to {high:g}; divide by 255 (8 bits) or 65535 (16 bits)"
        )


def _dtype_message(dtype: object) -> str:
    return f"expected uint8, uint16, bool or float in [0, 1], got {dtype}; convert the image to one of them"


def _rgb(planes: Tensor) -> Float[Tensor, "3 h w"]:
    """Repeat gray, show transparent colors over white."""
    planes = planes[None] if planes.ndim == 2 else planes
    match tuple(planes.shape):
        case (3, _, _):
            return planes
        case (1, _, _):
            return planes.repeat(3, 1, 1)
        case (4, _, _):
            return planes[:3] * planes[3:] + (1 - planes[3:])
        case shape:
            raise ValueError(
                f"expected one image (3, h, w), (1, h, w) or (h, w), got shape {shape}{_shape_hint(shape)}"
            )


def _shape_hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 4:
        return "; a batch: pass its images one by one"
    if len(shape) == 3 and shape[2] in (1, 3, 4):
        return "; channels come first: permute(2, 0, 1)"
    return ""
