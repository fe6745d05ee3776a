"""Geometry. An image and its annotations move together, through torchvision's transforms on `tv_tensors`.

Annotated images are read as their pixels are stored, without EXIF turning: annotators and benchmarks saw them so.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sightline.images import ImageError, Size, as_image, as_size, fit, plan, probe


@dataclass(frozen=True, eq=False)
class Moved:
    """An image and its annotations after a resize policy, in pixels of the new image."""

    image: Float[Tensor, "ch h w"]
    boxes: Float[Tensor, "n 4"] | None
    mask: Int[Tensor, "h w"] | None
    instances: Int[Tensor, "h w"] | None
    keypoints: Float[Tensor, "p 3"] | None


def moved(
    image: Float[Tensor, "ch _i _j"],
    size: int | Size,
    resize: str,
    *,
    boxes: Float[Tensor, "n 4"] | None = None,
    mask: Int[Tensor, "_i _j"] | None = None,
    instances: Int[Tensor, "_i _j"] | None = None,
    keypoints: Float[Tensor, "p 3"] | None = None,
) -> Moved:
    """Bring an image and its annotations to `size` with a policy of `sightline.images.POLICIES`.

    Boxes (half-open x0 y0 x1 y1) are scaled and shifted but not clipped: what a crop cuts off lies outside the image.
    Masks go by nearest neighbor. Keypoints `x y visible` that are invisible or cut away become 0 0 0.

    Raises:
        LookupError: no such policy.
        ValueError: a size below one pixel.
    """
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    source, wanted = (image.shape[1], image.shape[2]), as_size(size)
    scaled, (top, left) = plan(source, wanted, resize)

    def shifted(thing: Tensor) -> Tensor:
        sized = F.resize(thing, list(scaled), interpolation=InterpolationMode.NEAREST_EXACT)
        cut: Tensor = F.crop(sized, top, left, *wanted).as_subclass(Tensor)
        return cut

    def labels(plane: Tensor | None) -> Tensor | None:
        return None if plane is None else shifted(plane[None])[0]  # a tv_tensors.Mask is resized off by half a pixel

    corners = keypoints_moved = None
    if boxes is not None:
        corners = shifted(
            tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
                boxes.float().reshape(-1, 4),
                format="XYXY",
                canvas_size=source,
                clamping_mode=None,  # pyright: ignore[reportArgumentType]
            )
        )
    if keypoints is not None:
        xy = shifted(tv_tensors.KeyPoints(keypoints[:, :2].float(), canvas_size=source))  # pyright: ignore
        inside = ((xy >= 0) & (xy <= xy.new_tensor([wanted[1], wanted[0]]))).all(1)
        seen = (keypoints[:, 2:] > 0) & inside[:, None]
        keypoints_moved = torch.cat([xy, torch.ones_like(xy[:, :1])], 1) * seen
    return Moved(fit(image, wanted, resize), corners, labels(mask), labels(instances), keypoints_moved)


def stored(path: Path) -> Float[Tensor, "3 h w"]:
    """Decode an image as RGB in [0, 1], as its pixels are stored, and say how to pass over it if that fails.

    Raises:
        ImageError, FileNotFoundError: the file is broken or gone.
    """
    try:
        return as_image(pixels(path, "RGB"))
    except ImageError as error:
        raise ImageError(f"{error}; check='decode' skips such files") from error


def pixels(path: Path, mode: str) -> NDArray[np.uint8]:
    """Decode a file with Pillow to a mode of 8 bits, turning nothing."""
    probe(path)
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert(mode))
    except Exception as error:  # on damaged data Pillow's decoders raise nearly anything
        raise ImageError(f"{path} cannot be decoded: {str(error) or type(error).__name__}") from error
