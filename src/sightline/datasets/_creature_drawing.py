"""The drawing of creatures: parts are unions of tapered capsules, shaded like cushions, their edges anti-aliased.

A creature is a tuple of pieces, back to front; a piece is one part in the canonical pose: facing right, length 1, y
down. `trace` turns pieces and pose into layers of signed distances, `own` writes who is in front at which pixel,
`paint` puts coats on the layers. Canvases are (h, w, 3) float32 in [0, 1].
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
"""Floats of single precision."""
Window = tuple[slice, slice]
Cone = tuple[float, float, float, float, float, float]
"""A tapered capsule: x, y and radius of its start, then of its end."""

COLORS = ("coral", "amber", "leaf", "sky", "indigo", "plum")
PATTERNS = ("solid", "stripes", "dots")
TEXTURES = ("clouds", "streaks", "columns", "pebbles")
_PAIRED = ("leg", "wing", "eye")
REGIONS = (
    "head", "back", "belly", "breast", "tail", "left leg", "right leg", "left wing", "right wing", "mark",
)  # fmt: skip
"""What a pixel of a creature may show, in the order of the owner codes."""
SIDED = {
    flip: {
        f"{side} {part}": f"{own} {part}" for side, own in zip(("near", "far"), sides, strict=True) for part in _PAIRED
    }
    for flip, sides in ((False, ("right", "left")), (True, ("left", "right")))
}
"""Near and far as left and right: who faces the viewer's right (not flipped) shows the right side."""


def _color(*levels: int) -> Array:
    return np.array(levels, np.float32) / np.float32(255)


PALETTE = (
    _color(232, 85, 78), _color(247, 183, 51), _color(88, 172, 98),
    _color(84, 182, 224), _color(74, 84, 178), _color(176, 92, 172),
)  # fmt: skip
CREAM, NIGHT, HORN = _color(255, 246, 224), _color(38, 30, 44), _color(214, 150, 84)

PERIOD = 0.12
"""Period of the stripes in creature lengths, but at least `FINEST` pixels."""
FINEST = 4.0
MARK = 1 / 6
"""Width of the mark in creature lengths."""
_HALO = 0.1
"""Reach of the soft shadow in creature lengths."""
_LIGHT = (-0.421, -0.661, 0.621)
"""Unit vector to the light: right, down, to the viewer."""
_DOT_INK, _DOT_LEVEL = (0.3, 0.34, 0.38, 0.42, 0.46, 0.5), (0.524, 0.297, 0.09, -0.097, -0.266, -0.417)
"""Shares of the plane above a level, and those levels, of cos p + 2 cos(p / 2) cos(q): three waves at 60 degrees."""


@dataclass(frozen=True)
class Piece:
    """One part in the canonical pose; what lies on it is clipped by it and does not swing."""

    region: str
    cones: tuple[Cone, ...]
    blend: float = 0.0
    """Radius over which the capsules melt together; 0 keeps their creases."""
    grain: float = 0.0
    """Direction across the stripes, degrees."""
    swing: float = 0.0
    """Largest random turn about the start of the first capsule, degrees."""
    coat: str = ""
    """Name of its coat where that is not its part's."""
    inner: tuple["Piece", ...] = ()
    keypoints: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True)
class Pose:
    """Where a creature stands: center and length in pixels, angle in radians, mirrored or not."""

    x: float
    y: float
    length: float
    angle: float = 0.0
    flip: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """A piece in its window of the canvas: canonical coordinates, and signed distance, negative inside."""

    piece: Piece
    window: Window
    u: Array
    v: Array
    f: Array
    inner: tuple["Layer", ...]


@dataclass(frozen=True, eq=False)
class Coat:
    """Color and pattern of a part; cream stripes or dots cover a share `ink` of it."""

    color: Array
    pattern: int = 0
    ink: float = 0.42


def _leg(cones: Sequence[Cone], x: float, y: float) -> tuple[Cone, ...]:
    return tuple((a + x, b + y, r, c + x, d + y, s) for a, b, r, c, d, s in cones)


_BIRD_LEG: tuple[Cone, ...] = ((0.0, 0.0, 0.05, 0.005, 0.15, 0.036), (0.005, 0.165, 0.03, 0.085, 0.175, 0.028))
_NEWT_LEG: tuple[Cone, ...] = ((0.0, 0.0, 0.062, -0.03, 0.12, 0.048), (-0.03, 0.125, 0.042, 0.055, 0.145, 0.038))


def _fan(x: float, y: float, radius: float, *tips: tuple[float, float, float]) -> tuple[Cone, ...]:
    return tuple((x, y, radius, *tip) for tip in tips)


def _disc(x: float, y: float, radius: float, coat: str) -> Piece:
    return Piece("head", ((x, y, radius, x, y, radius),), coat=coat)


def _eye(x: float, y: float, radius: float) -> tuple[Piece, ...]:
    return (
        _disc(x, y, 1.28 * radius, "white"),
        _disc(x + 0.006, y, radius, "pupil"),
        _disc(x + 0.02, y - 0.02, 0.34 * radius, "white"),
    )


def _mark(x: float, y: float) -> Piece:
    lower = Piece("mark", ((x - 0.1, y + 0.1, 0.1, x + 0.1, y + 0.1, 0.1),), coat="mark lower")
    disc = replace(_disc(x, y, MARK / 2, "mark upper"), region="mark", inner=(lower,))
    return replace(disc, keypoints=(("mark", x, y),))


def _winged() -> tuple[Piece, ...]:
    back = Piece("back", ((-0.4, -0.12, 0.19, -0.08, -0.14, 0.19), (-0.08, -0.14, 0.19, 0.3, -0.26, 0.16)), grain=60.0)
    breast = Piece("breast", ((0.31, -0.02, 0.17, 0.26, 0.2, 0.17),), grain=80.0, keypoints=(("breast", 0.22, 0.11),))
    return (
        Piece("far wing", _fan(0.1, -0.1, 0.07, (0.0, -0.41, 0.05), (0.09, -0.41, 0.045), (-0.08, -0.35, 0.05)),
              grain=90.0, swing=8.0, keypoints=(("far wing", 0.0, -0.37),)),
        Piece("far leg", _leg(_BIRD_LEG, 0.13, 0.23), grain=90.0, swing=14.0, keypoints=(("far leg", 0.134, 0.36),)),
        Piece("tail", _fan(-0.25, 0.03, 0.07, (-0.43, -0.13, 0.052), (-0.445, -0.03, 0.055), (-0.43, 0.07, 0.05)),
              grain=10.0, swing=10.0, keypoints=(("tail", -0.41, -0.03),)),
        Piece("near leg", _leg(_BIRD_LEG, -0.04, 0.25), grain=90.0, swing=14.0,
              keypoints=(("near leg", -0.036, 0.38),)),
        Piece("belly", ((-0.14, 0.04, 0.2, 0.1, 0.05, 0.235),), inner=(breast, back),
              keypoints=(("belly", -0.04, 0.17), ("back", -0.2, -0.04))),
        Piece("head", ((0.4, -0.19, 0.05, 0.475, -0.165, 0.02),), coat="beak", keypoints=(("beak", 0.47, -0.165),)),
        Piece("head", ((0.25, -0.2, 0.165, 0.27, -0.195, 0.165), (0.17, -0.35, 0.035, 0.1, -0.41, 0.015)),
              blend=0.06, grain=45.0, inner=_eye(0.335, -0.225, 0.043),
              keypoints=(("crown", 0.24, -0.33), ("forehead", 0.36, -0.3), ("nape", 0.13, -0.2),
                         ("throat", 0.3, -0.07), ("near eye", 0.335, -0.225), ("far eye", 0.335, -0.225))),
        Piece("near wing", _fan(0.03, -0.02, 0.075, (-0.17, -0.39, 0.05), (-0.26, -0.3, 0.052), (-0.28, -0.19, 0.048)),
              grain=40.0, swing=8.0, keypoints=(("near wing", -0.17, -0.22),)),
    )  # fmt: skip


def _finned() -> tuple[Piece, ...]:
    back = Piece("back", ((-0.45, -0.08, 0.17, -0.08, -0.13, 0.2), (-0.08, -0.13, 0.2, 0.3, -0.26, 0.17)), grain=15.0)
    breast = Piece("breast", ((0.28, 0.0, 0.17, 0.25, 0.2, 0.17),), grain=80.0, keypoints=(("breast", 0.17, 0.2),))
    smile = ((0.375, 0.01, 0.011, 0.415, 0.028, 0.011), (0.415, 0.028, 0.011, 0.47, 0.0, 0.011))
    return (
        Piece("far wing", _fan(0.02, -0.13, 0.06, (-0.22, -0.34, 0.035), (-0.1, -0.39, 0.035), (0.03, -0.38, 0.035)),
              blend=0.1, grain=10.0, swing=8.0, keypoints=(("far wing", -0.08, -0.31),)),
        Piece("far leg", _leg(_NEWT_LEG, 0.15, 0.22), grain=90.0, swing=14.0, keypoints=(("far leg", 0.13, 0.32),)),
        Piece("tail", ((-0.26, 0.0, 0.07, -0.36, 0.0, 0.055), *_fan(-0.36, 0.0, 0.055, (-0.455, -0.18, 0.04),
                       (-0.455, 0.18, 0.04))), blend=0.1, swing=10.0, keypoints=(("tail", -0.4, 0.0),)),
        Piece("belly", ((-0.18, 0.03, 0.175, 0.08, 0.05, 0.245),), inner=(breast, back),
              keypoints=(("belly", -0.14, 0.13), ("back", -0.14, -0.06))),
        Piece("near leg", _leg(_NEWT_LEG, -0.06, 0.22), grain=90.0, swing=14.0, keypoints=(("near leg", -0.08, 0.32),)),
        Piece("head", ((0.27, -0.11, 0.185, 0.32, -0.05, 0.16),), grain=45.0,
              inner=(*_eye(0.35, -0.14, 0.045), Piece("head", smile, coat="pupil")),
              keypoints=(("beak", 0.465, -0.03), ("crown", 0.26, -0.25), ("forehead", 0.4, -0.22),
                         ("nape", 0.13, -0.14), ("throat", 0.3, 0.08), ("near eye", 0.35, -0.14),
                         ("far eye", 0.35, -0.14))),
        Piece("near wing", _fan(0.08, 0.05, 0.055, (-0.09, 0.02, 0.035), (-0.09, 0.1, 0.035), (-0.02, 0.16, 0.035)),
              blend=0.08, grain=35.0, swing=8.0, keypoints=(("near wing", -0.03, 0.08),)),
    )  # fmt: skip


PLANS: Mapping[str, tuple[Piece, ...]] = {"winged": _winged(), "finned": _finned()}


def marked(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Put the mark on the back of a winged creature's head."""
    wears = [piece.region == "head" and not piece.coat for piece in pieces]
    return tuple(
        replace(piece, inner=(_mark(0.195, -0.2), *piece.inner)) if is_head else piece
        for piece, is_head in zip(pieces, wears, strict=True)
    )


def posed(pieces: Sequence[Piece], turns: Sequence[float]) -> tuple[Piece, ...]:
    """Turn every piece and its keypoints about the start of its first capsule (radians)."""
    return tuple(_turned(piece, turn) for piece, turn in zip(pieces, turns, strict=True))


def _turned(piece: Piece, turn: float) -> Piece:
    (x, y), c, s = piece.cones[0][:2], math.cos(turn), math.sin(turn)
    a, b = x - c * x + s * y, y - s * x - c * y
    cones = tuple(
        (a + c * u - s * v, b + s * u + c * v, r, a + c * p - s * q, b + s * p + c * q, t)
        for u, v, r, p, q, t in piece.cones
    )
    points = tuple((name, a + c * u - s * v, b + s * u + c * v) for name, u, v in piece.keypoints)
    return replace(piece, cones=cones, keypoints=points)


def to_image(pose: Pose, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Map canonical points to pixels."""
    c, s, side = math.cos(pose.angle) * pose.length, math.sin(pose.angle) * pose.length, -1 if pose.flip else 1
    return [(pose.x + c * side * u - s * v, pose.y + s * side * u + c * v) for u, v in points]


def to_canonical(pose: Pose, x: Array, y: Array) -> tuple[Array, Array]:
    """Map pixels to canonical coordinates."""
    c, s = math.cos(pose.angle) / pose.length, math.sin(pose.angle) / pose.length
    p, q = x - pose.x, y - pose.y
    return (c * p + s * q) * (-1 if pose.flip else 1), c * q - s * p


def landmarks(pieces: Sequence[Piece], pose: Pose) -> dict[str, tuple[float, float, str]]:
    """Return each keypoint in pixels, and the region in front where it is seen ("" for the far eye, which never is)."""
    points = [point for piece in pieces for part in (piece, *piece.inner) for point in part.keypoints]
    places = to_image(pose, [(u, v) for _, u, v in points])
    found = {}
    for (name, _, _), place in zip(points, places, strict=True):
        side = SIDED[pose.flip].get(name, name)
        found[side] = (*place, "" if name == "far eye" else side if side in REGIONS else "head")
    return found


def distance(cones: Sequence[Cone], u: Array, v: Array, *, blend: float = 0.0) -> Array:
    """Return the signed distance to a union of tapered capsules, negative inside.

    f = min_i |p - a_i - t_i (b_i - a_i)| - (1 - t_i) r_i - t_i s_i for ends a_i, b_i and radii r_i, s_i, where
    t_i = clip((p - a_i).(b_i - a_i) / |b_i - a_i|^2, 0, 1). With `blend` k > 0 the minimum of f and g is
    min(f, g) - h^2 / 4k, h = max(k - |f - g|, 0).
    """
    f: Array | None = None
    for x, y, r, x1, y1, s in cones:
        dx, dy, p, q = x1 - x, y1 - y, u - x, v - y
        t = ((p * dx + q * dy) / max(dx * dx + dy * dy, 1e-9)).clip(0, 1)
        g: Array = np.hypot(p - t * dx, q - t * dy) - (r + t * (s - r))
        melt = 0 if f is None or blend == 0 else np.maximum(blend - np.abs(f - g), 0) ** 2 / (4 * blend)
        f = g if f is None else np.minimum(f, g) - melt
    if f is None:
        raise ValueError("a shape needs at least one capsule, got none")
    return f


def trace(pieces: Sequence[Piece], pose: Pose, shape: tuple[int, int]) -> tuple[Layer, ...]:
    """Return the layers of a creature on a canvas of (h, w) pixels, back to front."""
    layers = []
    for piece in pieces:
        rows, columns = window = _window(piece, pose, shape)
        x = np.arange(columns.start, columns.stop, dtype=np.float32)[None] + 0.5
        y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5
        layers.append(_measured(piece, window, *to_canonical(pose, x, y)))
    return tuple(layers)


def _measured(piece: Piece, window: Window, u: Array, v: Array) -> Layer:
    inner = tuple(_measured(child, window, u, v) for child in piece.inner)
    return Layer(piece, window, u, v, distance(piece.cones, u, v, blend=piece.blend), inner)


def _window(piece: Piece, pose: Pose, shape: tuple[int, int]) -> Window:
    """Return the rows and columns of the canvas that a piece and its shadow may touch."""
    ends = [end for cone in piece.cones for end in (cone[:3], cone[3:])]
    reach = np.array([(radius + _HALO) * pose.length + 2 for _, _, radius in ends])[:, None]
    places = np.array(to_image(pose, [(u, v) for u, v, _ in ends]))
    limits = (shape[1], shape[0])
    left, top = np.floor((places - reach).min(0)).astype(int).clip(0, limits).tolist()
    right, bottom = np.ceil((places + reach).max(0)).astype(int).clip(0, limits).tolist()
    return slice(top, bottom), slice(left, right)


def own(owner: NDArray[np.int16], layers: Sequence[Layer], *, flip: bool, instance: int) -> None:
    """Write who is in front at each pixel center: 1 + instance * len(REGIONS) + region; 0 stays where nobody is."""
    for layer in layers:
        _claim(owner[layer.window], layer, layer.f <= 0, flip=flip, first=1 + instance * len(REGIONS))


def _claim(view: NDArray[np.int16], layer: Layer, inside: NDArray[np.bool_], *, flip: bool, first: int) -> None:
    view[inside] = first + REGIONS.index(SIDED[flip].get(layer.piece.region, layer.piece.region))
    for child in layer.inner:
        if child.piece.region != layer.piece.region:
            _claim(view, child, inside & (child.f <= 0), flip=flip, first=first)


def paint(canvas: Array, layers: Sequence[Layer], coats: Mapping[str, Coat], length: float) -> None:
    """Draw layers over the canvas, each with a soft shadow around it; `length` is the creature's, in pixels.

    The shadow depends on the shapes alone, so a pixel shows the coat of the part that owns its center, and along an
    edge a share of what lies next to it or under it.
    """
    for layer in layers:
        view, shadow = canvas[layer.window], (1 - layer.f / _HALO).clip(0, 1)
        view *= (1 - 0.34 * shadow * shadow)[..., None]
        near = layer.f * length < 0.5
        if near.any():
            cover = (0.5 - layer.f[near] * length).clip(0, 1)[:, None]
            view[near] = (1 - cover) * view[near] + cover * _lit(_skin(layer, near, coats, length), layer, near, length)


def _skin(layer: Layer, near: NDArray[np.bool_], coats: Mapping[str, Coat], length: float) -> Array:
    """Return the unshaded colors of a piece and of all that lies on it, (n, 3) for the n pixels near it."""
    part = layer.piece.region.removeprefix("near ").removeprefix("far ")
    coat = coats[layer.piece.coat or {"leg": "legs", "wing": "wings"}.get(part, part)]
    skin = _woven(coat, layer.u[near], layer.v[near], grain=layer.piece.grain, length=length)
    for child in layer.inner:
        cover = (0.5 - child.f[near] * length).clip(0, 1)[:, None]
        skin = (1 - cover) * skin + cover * _skin(child, near, coats, length)
    return skin


def _woven(coat: Coat, u: Array, v: Array, *, grain: float, length: float) -> Array:
    """Return a coat's color and pattern; dots are a hexagonal sum of three cosines above a level."""
    if PATTERNS[coat.pattern] == "solid":
        return np.broadcast_to(coat.color, (*u.shape, 3))
    period, angle = max(PERIOD, FINEST / length), math.radians(grain)
    x, y = (2 * math.pi / period * weight for weight in (math.cos(angle), math.sin(angle)))
    p = x * u + y * v
    if PATTERNS[coat.pattern] == "stripes":
        wave, steepness = np.cos(p) - math.cos(math.pi * coat.ink), 1
    else:
        q = (x * v - y * u) * (3**0.5 / 2)
        level = float(np.interp(coat.ink, _DOT_INK, _DOT_LEVEL))
        wave, steepness = np.cos(p) + 2 * np.cos(p / 2) * np.cos(q) - level, 2
    ink = (0.5 + wave * (period * length / (2 * math.pi * steepness))).clip(0, 1)[..., None]
    return coat.color + ink * 0.82 * (CREAM - coat.color)


def _lit(skin: Array, layer: Layer, near: NDArray[np.bool_], length: float) -> Array:
    """Shade a piece as a cushion lit from the upper left, with a gleam and a dark line along its edge."""
    f, (slope_x, slope_y) = layer.f[near], _slopes(layer.f, near, length)
    t = (1 + f / max(-float(f.min()), 0.02)).clip(0, 1) ** 2
    x, y, z = _LIGHT
    facing = ((slope_x * x + slope_y * y) * t + np.sqrt(1 - np.minimum(t * t, 1)) * z).clip(-0.3, 2)
    line = (0.5 + max(0.55, 0.014 * length) + f * length).clip(0, 1)
    shade = (0.7 + 0.46 * facing) * (1 - 0.6 * line)
    gleam = 0.22 * ((facing - 0.9) * 10).clip(0, 1) ** 2 * (1 - line)
    lit: Array = (skin * shade[:, None] + gleam[:, None]).clip(0, 1)
    return lit


def _slopes(f: Array, near: NDArray[np.bool_], length: float) -> tuple[Array, Array]:
    """Return the gradient of f in canonical units, along x and y; zero on the window's rim."""
    x, y = np.zeros_like(f), np.zeros_like(f)
    x[:, 1:-1] = (f[:, 2:] - f[:, :-2]) * (length / 2)
    y[1:-1] = (f[2:] - f[:-2]) * (length / 2)
    return x[near], y[near]


def backdrop(rng: np.random.Generator, shape: tuple[int, int], *, texture: int, hue: float) -> Array:
    """Return four octaves of blurred noise between three neighboring colors, lighter above; (h, w, 3)."""
    cells = ((3, 3), (7, 2), (2, 7), (5, 5))[texture]
    mixing, relief = fractal(rng, shape, cells), fractal(rng, shape, cells)
    if TEXTURES[texture] == "pebbles":
        mixing, relief = 1 - 2 * np.abs(mixing), 0.8 - 2 * np.abs(relief)
    low, mid, high = (_muted(rng, hue + turn) for turn in (-0.07, 0.0, 0.09))
    t = (2 / (1 + np.exp(-3 * mixing)))[..., None]
    color = low + np.minimum(t, 1) * (mid - low) + np.maximum(t - 1, 0) * (high - mid)
    slope = np.linspace(0.08, -0.08, shape[0], dtype=np.float32)[:, None]
    return (color * (1 + 0.17 * relief + slope)[..., None]).clip(0, 1)


def _muted(rng: np.random.Generator, hue: float) -> Array:
    """Return a color of low saturation and middle brightness; `hue` 1 is the whole wheel."""
    saturation, value = rng.uniform(0.12, 0.42), rng.uniform(0.42, 0.78)
    wheel = np.clip(np.abs((hue * 6 + np.array((0.0, 4.0, 2.0))) % 6 - 3) - 1, 0, 1)
    return np.asarray(value * (1 - saturation * (1 - wheel)), np.float32)


def fractal(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int], *, octaves: int = 4) -> Array:
    """Return smooth noise of mean zero: `cells` bumps down and across, each octave twice as fine and half as high."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        tall, wide = cells[0] << octave, cells[1] << octave
        (top, s), (left, t) = _corners(shape[0], tall), _corners(shape[1], wide)
        grid = rng.standard_normal((tall + 1, wide + 1), np.float32) * 0.5**octave
        rows = grid[top] + s[:, None] * (grid[top + 1] - grid[top])
        start = rows[:, left]
        total += start + t * (rows[:, left + 1] - start)
    return total


@lru_cache(maxsize=64)
def _corners(pixels: int, cells: int) -> tuple[NDArray[np.intp], Array]:
    """Return for every pixel the corner before it and its smoothed way to the next one, in [0, 1]."""
    at = (np.arange(pixels) + 0.5) * cells / pixels
    t = (at % 1).astype(np.float32)
    return at.astype(np.intp), t * t * (3 - 2 * t)


def litter(rng: np.random.Generator, canvas: Array, *, number: int, length: float, margin: int) -> None:
    """Paint pebbles and leaves in the creatures' own colors and patterns; `length` is that of a creature."""
    height, width = canvas.shape[:2]
    for _ in range(number):
        ends = rng.uniform((-0.2, -0.2, 0.04), (0.2, 0.2, 0.12), (int(rng.integers(1, 4)), 3)).tolist()
        cones = _fan(0.0, 0.0, rng.uniform(0.08, 0.15), *((u, v, radius) for u, v, radius in ends))
        thing = Piece("litter", cones, blend=0.06, grain=rng.uniform(0, 180))
        x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
        layers = trace((thing,), Pose(x, y, length), (height, width))
        coat = Coat(PALETTE[rng.integers(len(PALETTE))], int(rng.integers(len(PATTERNS))), rng.uniform(0.34, 0.48))
        paint(canvas, layers, {"litter": coat}, length)
