"""Pictures. Saliency as color, over the photo, on contact sheets, as PNG.

Nothing here scales a map: `maps.resize` and `maps.unit` are steps of their own. Colors come from matplotlib's tables.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from sightline.maps import degenerate
from sightline.registry import unknown

ROUNDING = 1e-4
"""How far a value may leave [0, 1] and still count as rounding."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a gray picture (ITU-R BT.601)."""

INK, PAPER, VOID = (32, 34, 38), (255, 255, 255), (238, 239, 241)
"""Colors of a contact sheet: its text, its ground, a cell without a picture."""

HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colors of curves that differ for every eye (Okabe and Ito 2008)."""

MARKS = "osD^vP*"
"""Marks of curves, in the same order."""

PANELS = 3
"""How many panels stand side by side."""

SCATTER_DPI = 100
"""Dots per inch at which scatter plots are set."""

SMALL = 96
"""Side in pixels below which a scatter plot is points alone."""

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
Line: TypeAlias = tuple[str, tuple[float, float, float] | None]
"""A line of a caption, and the color of the square before it."""


def colorize(saliency: Float[Tensor, "*b i j"], *, cmap: str = "inferno") -> Float[Tensor, "*_b i j"]:
    """Turn maps in [0, 1] into colors: (h, w) into (3, h, w), (b, 1, h, w) into (b, 3, h, w).

    Raises:
        LookupError: matplotlib has no such color map.
        ValueError: a value outside [0, 1] or not finite, or another shape.
    """
    if saliency.ndim not in (2, 4) or (saliency.ndim == 4 and saliency.shape[1] != 1):
        raise ValueError(f"expected maps of shape (h, w) or (b, 1, h, w), got {tuple(saliency.shape)}")
    _check_unit(saliency, "saliency", "scale it with maps.unit")
    index = (saliency.clamp(0, 1) * 255).round().long()
    colors = _table(cmap).to(saliency)[index]
    return colors.permute(2, 0, 1) if saliency.ndim == 2 else colors[:, 0].permute(0, 3, 1, 2)


def overlay(
    image: Float[Tensor, "ch h w"],
    saliency: Float[Tensor, "i j"],
    *,
    alpha: float = 0.8,
    fade: float = 0.5,
    cmap: str = "inferno",
) -> Float[Tensor, "3 h w"]:
    """Lay a map s in [0, 1] over an image x in [0, 1] so that the unimportant shows the photo, darker and grayer.

    w = s^0.7, p = x + fade (1 - w) (luma(x) / 2 - x), out = (1 - alpha w) p + alpha w color(s).

    Raises:
        LookupError: matplotlib has no such color map.
        ValueError: another size than the image's, a map that says nothing (constant, all zero, not finite), or values
            outside [0, 1].
    """
    x = _rgb(image)
    _check_map(saliency, x)
    return _blend(x, colorize(saliency, cmap=cmap), saliency.clamp(0, 1), alpha=alpha, fade=fade)


def overlay_signed(
    image: Float[Tensor, "ch h w"],
    saliency: Float[Tensor, "i j"],
    *,
    alpha: float = 0.8,
    fade: float = 0.3,
    cmap: str = "bwr",
) -> Float[Tensor, "3 h w"]:
    """Lay a signed map s of any range over an image in [0, 1]: red speaks for the class, blue against it.

    t = s / max |s|; as in `overlay`, with |t| for the weight and color((1 + t) / 2): 0 shows the photo.

    Raises:
        LookupError: matplotlib has no such color map.
        ValueError: another size than the image's, a map that says nothing (constant, all zero, not finite), or an image
            outside [0, 1].
    """
    x = _rgb(image)
    _check_map(saliency, x)
    t = saliency / saliency.abs().max()
    return _blend(x, colorize((1 + t) / 2, cmap=cmap), t.abs(), alpha=alpha, fade=fade)


def outline(
    image: Float[Tensor, "ch h w"],
    region: Bool[Tensor, "i j"],
    *,
    color: tuple[float, float, float],
    width: int = 2,
) -> Float[Tensor, "3 h w"]:
    """Draw the border of a region over an image in [0, 1], inside the region and along the image's own edge.

    Raises:
        ValueError: a region of another size than the image's, a width below one, or an image outside [0, 1].
    """
    x = _rgb(image)
    if region.shape != x.shape[1:]:
        raise ValueError(f"expected a region of {tuple(x.shape[1:])} pixels, got {tuple(region.shape)}")
    if width < 1:
        raise ValueError(f"expected a line of at least one pixel, got width={width}")
    outside = F.pad((~region).to(x)[None, None], (width,) * 4, value=1.0)
    near = F.max_pool2d(outside, 2 * width + 1, stride=1)[0, 0] > 0
    return torch.where(region & near, x.new_tensor(color).view(3, 1, 1), x)


def palette() -> Float[Tensor, "256 3"]:
    """Return the colors of Pascal VOC's label maps in [0, 1]: 0 black, 255 cream.

    The bits of a label go in turn to red, green and blue, the lowest ones to the highest places.
    """
    labels = torch.arange(256)
    places = [(labels[:, None] >> (3 * place + torch.arange(3)) & 1) << (7 - place) for place in range(3)]
    return torch.stack(places).sum(0) / 255


def painted(
    image: Float[Tensor, "ch h w"],
    labels: Int[Tensor, "i j"],
    colors: Float[Tensor, "k 3"],
    *,
    alpha: float = 0.8,
    fade: float = 0.5,
) -> Float[Tensor, "3 h w"]:
    """Paint every pixel of an image in [0, 1] in the color of its label; label 0 shows the photo, darker and grayer.

    Raises:
        ValueError: labels of another size than the image's or without a color, or an image outside [0, 1].
    """
    x = _rgb(image)
    if labels.shape != x.shape[1:]:
        raise ValueError(f"expected labels of {tuple(x.shape[1:])} pixels, got {tuple(labels.shape)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(colors):
        given = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"expected labels in 0..{len(colors) - 1}, one a color, got {given}")
    return _blend(x, colors.to(x)[labels].permute(2, 0, 1), (labels > 0).to(x), alpha=alpha, fade=fade)


def scatter(
    x: Float[Tensor, " n"],
    y: Float[Tensor, " n"],
    colors: Float[Tensor, "n 3"],
    *,
    axes: tuple[str, str] = ("", ""),
    side: int = 224,
) -> Float[Tensor, "3 side side"]:
    """Draw points (x, y) in their colors, and the lines x = 0 and y = 0, in a square picture of `side` pixels.

    `axes` are the names of the horizontal and the vertical one; pictures below `SMALL` pixels have no room for them
    and for numbers. The more points, the smaller they are.

    Raises:
        ValueError: no point, or one that is not finite.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not len(x) or not bool(x.isfinite().all() and y.isfinite().all()):
        raise ValueError(f"expected points with finite coordinates, got {len(x)} of which some are none")
    font = 72 * max(9, side // 20) / SCATTER_DPI
    figure = Figure(figsize=(side / SCATTER_DPI, side / SCATTER_DPI), dpi=SCATTER_DPI, layout="constrained")
    place = figure.subplots()
    ink = [value / 255 for value in INK]
    place.axvline(0, color=ink, linewidth=0.8, zorder=3)
    place.axhline(0, color=ink, linewidth=0.8, zorder=3)
    size = min(16.0, max(1.0, 4000 / len(x))) * side / 224
    place.scatter(x.tolist(), y.tolist(), s=size, c=colors.tolist(), alpha=0.6, linewidths=0, zorder=2)
    for one, name in zip((place.xaxis, place.yaxis), axes, strict=True):
        one.set_major_locator(MaxNLocator(3))
        one.set_label_text(name, fontsize=font, color=ink)
        one.labelpad = 1
        one.get_offset_text().set_fontsize(0.8 * font)
    place.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    place.tick_params(labelsize=0.85 * font, length=2, pad=1, colors=ink)
    place.spines[["top", "right"]].set_visible(False)
    if side < SMALL:
        place.set_axis_off()
    return _read(figure)[:, :side, :side]


def to_pil(image: Float[Tensor, "ch h w"]) -> Image.Image:
    """Turn an image in [0, 1] into an 8-bit RGB picture.

    Raises:
        ValueError: neither one nor three channels, or values outside [0, 1].
    """
    pixels = (_rgb(image).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))


def png(image: Float[Tensor, "ch h w"] | Image.Image) -> bytes:
    """Encode an image as PNG, without a time stamp: the same image, the same bytes.

    Raises:
        ValueError: as in `to_pil`.
    """
    return _encode(image, "PNG", optimize=True)


def jpeg(image: Float[Tensor, "ch h w"] | Image.Image, *, quality: int = 90) -> bytes:
    """Encode an image as JPEG with full color resolution, for thumbnails: about a quarter of a PNG's size.

    Raises:
        ValueError: as in `to_pil`.
    """
    return _encode(image, "JPEG", quality=quality, subsampling=0, optimize=True)


def grid(
    rows: Sequence[Sequence[Float[Tensor, "_ch _h _w"] | None]],
    *,
    columns: Sequence[str] = (),
    titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    blocks: Sequence[tuple[str, int]] = (),
    keys: Mapping[str, tuple[float, float, float]] | None = None,
    cell: int = 160,
    gap: int = 8,
) -> Image.Image:
    """Draw a contact sheet: one line of pictures a row, `columns` above them and row `titles` at their left.

    Pictures are fitted into square cells of `cell` pixels, `gap` pixels apart; None leaves its cell gray. `captions`
    has a line of texts a row, one below each picture, and may leave a row's empty. `blocks` are names of so many rows
    each, from the top: blocks stand apart, with their names upright at the far left. `keys` are beginnings of lines in
    captions, before which a square of a color in [0, 1] stands: the legend.

    Raises:
        ValueError: no picture, rows of different lengths, not one title a row and column, captions that are not those
            of the rows, or blocks of another number of rows.
    """
    width = _check_sheet(rows, columns, titles)
    _check_groups(rows, captions, blocks)
    texts = [*columns, *titles, *(text for line in captions for text in line), *(name for name, _ in blocks)]
    font = _font(texts, max(12, cell // 11))
    above, left = [_wrap(name, cell, font) for name in columns], [_wrap(name, cell, font) for name in titles]
    below = [[_keyed(text, keys or {}, cell, font) for text in line] for line in captions] or [[] for _ in rows]
    heights = [
        cell + (_height([[text for text, _ in each] for each in line], font) + gap if line else 0) for line in below
    ]
    apart = dict.fromkeys(accumulate(count for _, count in blocks), 2 * gap)
    top = gap + _height(above, font) + (gap if columns else 0)
    tops = [*accumulate((height + gap + apart.get(j, 0) for j, height in enumerate(heights[:-1], 1)), initial=top)]
    spines = _spines(blocks, tops, heights, font)
    spine = max((one.width for one, _ in spines), default=0)
    edge = gap + (spine + gap if spine else 0)
    side, step = edge + _width(left, font) + (gap if titles else 0), cell + gap
    sheet = Image.new("RGB", (side + step * width, tops[-1] + heights[-1] + gap), PAPER)
    for one, middle in spines:
        sheet.paste(INK, (gap + spine - one.width, middle - one.height // 2), one)
    _write(sheet, above, [(side + i * step + cell // 2, top - gap) for i in range(width)], font, "md")
    _write(sheet, left, [(edge, start + cell // 2) for start in tops], font, "lm")
    for start, row, lines in zip(tops, rows, below, strict=True):
        for i, image in enumerate(row):
            _paste(sheet, image, (side + i * step, start), cell)
        for i, each in enumerate(lines):
            _caption(sheet, each, (side + i * step + cell // 2, start + cell + gap // 2), font)
    return sheet


@dataclass(frozen=True)
class Curve:
    """Values y at points x of an axis, with the half-width of a band around each."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    spread: tuple[float, ...]


def curves(panels: Mapping[str, Mapping[str, Curve]], axis: str) -> Image.Image:
    """Draw named curves over a common axis, a panel each metric, the names once.

    Raises:
        ValueError: no panel.
    """
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("expected at least one panel of curves, got none")
    columns = min(len(panels), PANELS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows + 0.4), dpi=110, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, (title, each) in zip(places, panels.items(), strict=False):
        place.set_title(title, fontsize=10)
        place.set_xlabel(axis, fontsize=9)
        place.tick_params(labelsize=8)
        place.spines[["top", "right"]].set_visible(False)
        for (name, one), color, mark in zip(each.items(), cycle(HUES), cycle(MARKS)):
            low = [y - s for y, s in zip(one.y, one.spread, strict=True)]
            high = [y + s for y, s in zip(one.y, one.spread, strict=True)]
            place.fill_between(one.x, low, high, color=color, alpha=0.18, linewidth=0)
            place.plot(one.x, one.y, color=color, marker=mark, markersize=4, linewidth=1.6, label=name)
    for place in places[len(panels) :]:
        place.set_visible(False)
    handles, names = places[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False, fontsize=9)
    file = BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")


def _encode(image: Tensor | Image.Image, form: str, **options: int) -> bytes:
    file = BytesIO()
    (image if isinstance(image, Image.Image) else to_pil(image)).save(file, form, **options)
    return file.getvalue()


def _read(figure: Any) -> Float[Tensor, "3 h w"]:
    """Return a figure as an image in [0, 1]."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1) / 255


def _rgb(image: Tensor) -> Tensor:
    """Check an image and repeat gray."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected one image (3, h, w) or (1, h, w), got {tuple(image.shape)}")
    _check_unit(image, "image", "undo the normalization or divide by 255")
    return image.expand(3, -1, -1)


def _check_unit(values: Tensor, what: str, remedy: str) -> None:
    """Refuse what is not finite or outside [0, 1]."""
    if not values.isfinite().all():
        raise ValueError(f"the {what} is not finite: NaN or infinity cannot be drawn")
    low, high = values.min().item(), values.max().item()
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(f"expected the {what} in [0, 1], got {low:g} to {high:g}; {remedy}")


def _check_map(saliency: Tensor, image: Tensor) -> None:
    """Refuse a map of another size, and one that shows nothing."""
    if saliency.shape != image.shape[1:]:
        shapes = f"{tuple(saliency.shape)} over an image of {tuple(image.shape[1:])}"
        raise ValueError(f"the map has another size, {shapes} pixels; bring it there with maps.resize")
    if reason := degenerate(saliency[None, None])[0]:
        raise ValueError(f"the map is {reason}: it says nothing about where, so it is not drawn; report it instead")


def _table(cmap: str) -> Float[Tensor, "256 3"]:
    """Return the 256 colors of one of matplotlib's maps."""
    if cmap not in matplotlib.colormaps:
        raise LookupError(unknown(cmap, matplotlib.colormaps, "color map"))
    return torch.from_numpy(matplotlib.colormaps[cmap](np.linspace(0, 1, 256))[:, :3])


def _blend(x: Tensor, color: Tensor, strength: Tensor, *, alpha: float, fade: float) -> Tensor:
    """Mix photo and color by strength in [0, 1]; the weak parts of the photo fade."""
    weight = strength**0.7
    luma = (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(0)
    photo = x + fade * (1 - weight) * (luma / 2 - x)
    return photo + alpha * weight * (color - photo)


def _check_sheet(rows: Sequence[Sequence[object]], columns: Sequence[str], titles: Sequence[str]) -> int:
    """Check that a sheet is rectangular and fully titled; return its width in cells."""
    widths = {len(row) for row in rows}
    if not widths or widths == {0}:
        raise ValueError("a contact sheet needs at least one picture, got none")
    if len(widths) > 1:
        raise ValueError(f"expected rows of one length, got {[len(row) for row in rows]}; fill gaps with None")
    width = widths.pop()
    if columns and len(columns) != width:
        raise ValueError(f"expected {width} column titles, got {len(columns)}")
    if titles and len(titles) != len(rows):
        raise ValueError(f"expected {len(rows)} row titles, got {len(titles)}")
    return width


def _check_groups(
    rows: Sequence[Sequence[object]], captions: Sequence[Sequence[str]], blocks: Sequence[tuple[str, int]]
) -> None:
    """Check that captions and blocks are those of the rows."""
    if captions and [len(line) or len(rows[0]) for line in captions] != [len(row) for row in rows]:
        raise ValueError(
            f"expected {len(rows)} rows of {len(rows[0])} captions or none, got {[len(line) for line in captions]}"
        )
    counts = [count for _, count in blocks]
    if blocks and (min(counts) < 1 or sum(counts) != len(rows)):
        raise ValueError(f"expected blocks of {len(rows)} rows in all, got {counts}")


def _font(texts: Sequence[str], size: int) -> Font:
    """Return Pillow's own font or, where a text has letters that it lacks (é, ж), DejaVu Sans, matplotlib's."""
    plain = ImageFont.load_default(size)

    def drawn(letter: str) -> bytes:
        image = Image.new("L", (2 * size, 2 * size))
        ImageDraw.Draw(image).text((0, 0), letter, 255, plain)
        return image.tobytes()

    box = drawn("\uffff")
    if all(drawn(letter) != box for letter in {*"".join(texts)}):
        return plain
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Break a title into lines that fit, between words and parts of words; a longer part breaks anywhere."""
    lines: list[str] = []
    for part in text.split("\n"):
        lines.append("")
        for word in re.split(r"(?<=[ _/,-])|(?=[(?])", part):
            for piece in [word] if font.getlength(word.rstrip()) <= width else word:
                if lines[-1] and font.getlength((lines[-1] + piece).rstrip()) > width:
                    lines.append("")
                lines[-1] += piece
    return [line.rstrip() for line in lines]


def _spines(
    blocks: Sequence[tuple[str, int]], tops: Sequence[int], heights: Sequence[int], font: Font
) -> list[tuple[Image.Image, int]]:
    """Return the names of the blocks, written upwards, and the middles of their rows."""
    drawn: list[tuple[Image.Image, int]] = []
    ends = list(accumulate(count for _, count in blocks))
    for (name, count), end in zip(blocks, ends, strict=True):
        start, stop = tops[end - count], tops[end - 1] + heights[end - 1]
        lines = _wrap(name, stop - start, font) if name else []
        text = Image.new("L", (_width([lines], font), _height([lines], font)))
        ImageDraw.Draw(text).text((text.width / 2, 0), "\n".join(lines), 255, font, anchor="ma", align="center")
        drawn.append((text.transpose(Image.Transpose.ROTATE_90), (start + stop) // 2))
    return drawn


def _write(
    sheet: Image.Image,
    titles: Sequence[Sequence[str]],
    places: Sequence[tuple[int, int]],
    font: Font,
    anchor: str,
) -> None:
    """Write titles at their places; without titles, nothing."""
    draw = ImageDraw.Draw(sheet)
    for lines, place in zip(titles, places, strict=False):
        draw.text(place, "\n".join(lines), INK, font, anchor=anchor, align="left" if anchor[0] == "l" else "center")


def _keyed(text: str, keys: Mapping[str, tuple[float, float, float]], width: int, font: Font) -> list[Line]:
    """Break a caption into lines that fit, each with the color of the square before it, where it has one."""
    lines: list[Line] = []
    for part in text.split("\n"):
        named = max((key for key in keys if part == key or part.startswith(f"{key} ")), key=len, default=None)
        room = width if named is None else width - _chip(font)
        first, *rest = _wrap(part, room, font)
        lines += [(first, None if named is None else keys[named]), *((one, None) for one in rest)]
    return lines


def _chip(font: Font) -> int:
    """Return how much room the square before a line takes: as wide as lines stand apart."""
    return _height([["x", "x"]], font) - _height([["x"]], font)


def _caption(sheet: Image.Image, lines: Sequence[Line], place: tuple[int, int], font: Font) -> None:
    """Write a caption below its place, centered; lines with squares before them start together."""
    draw = ImageDraw.Draw(sheet)
    text = "\n".join(one for one, _ in lines)
    if all(color is None for _, color in lines):
        draw.text(place, text, INK, font, anchor="ma", align="center")
        return
    chip = _chip(font)
    left = place[0] - (_width([[one for one, _ in lines]], font) + chip) // 2
    draw.multiline_text((left + chip, place[1]), text, INK, font, anchor="la")
    for number, (_, color) in enumerate(lines):
        if color is not None:
            top = place[1] + number * chip + chip // 6
            fill = tuple(round(255 * value) for value in color)
            draw.rectangle((left, top, left + 2 * chip // 3, top + 2 * chip // 3), fill=fill)


def _height(titles: Sequence[Sequence[str]], font: Font) -> int:
    """Return the height of the tallest title."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return max((round(draw.textbbox((0, 0), "\n".join(lines), font=font)[3]) for lines in titles), default=0)


def _width(titles: Sequence[Sequence[str]], font: Font) -> int:
    """Return the width of the widest line."""
    return max((round(font.getlength(line)) for lines in titles for line in lines), default=0)


def _paste(sheet: Image.Image, image: Tensor | None, corner: tuple[int, int], cell: int) -> None:
    """Fit a picture into the middle of its cell."""
    if image is None:
        sheet.paste(VOID, (*corner, corner[0] + cell, corner[1] + cell))
        return
    picture = to_pil(image)
    scale = cell / max(picture.size)
    fitted = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    sheet.paste(fitted, (corner[0] + (cell - fitted.width) // 2, corner[1] + (cell - fitted.height) // 2))
