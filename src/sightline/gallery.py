"""Galleries. The papers' tables of pictures: images in columns, what methods make of them in rows.

Zolna, Geras and Cho, Classifier-agnostic saliency map extraction, CVIU 2020, figure 2 and the appendix (`masks`).
Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021, figures 1, 4 and 7 (`pairs`), 3
and 8 to 10 (`maps`).
Maruf, Daw, Dutta, Bu and Karpatne, Beyond discriminative regions: saliency maps as alternatives to CAMs for weakly
supervised semantic segmentation, 2023, figures 1 and 4 (`regions`), 5 (`segments`), 6 and 7 (`stacked`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from sightline import viz
from sightline.backgrounds import Resolve, basic, labels_at
from sightline.classifier import Classifier, Method
from sightline.data import Batch, Indexed, Sample
from sightline.erase import Eraser
from sightline.evaluation import Maps, Subject, checked_batch
from sightline.explanation import laid
from sightline.hyperplanes import signed_distances
from sightline.maps import degenerate, resize
from sightline.metrics import Case, Scored
from sightline.metrics._localization import Rule as BoxRule
from sightline.metrics._localization import check, in_pixels, overlaps, predicted
from sightline.metrics._segmentation import REGIONS
from sightline.protocols._cue_localization import NORMALIZED, ROUNDING
from sightline.protocols._cues import Cues
from sightline.protocols._multi_classifier_accuracy import RULES, Rule, shown
from sightline.protocols._segmentation import NORMALIZERS, Scene, check_threshold
from sightline.protocols._segmentation import explained as class_maps
from sightline.registry import chosen
from sightline.settings import signed
from sightline.types import Images, Saliency

Truth: TypeAlias = Literal["none", "boxes", "mask"]
Picture: TypeAlias = Float[Tensor, "3 _h _w"]
Color: TypeAlias = tuple[float, float, float]

LEAST, MOST = 112, 224
"""Side of a cell in pixels, at least and at most."""

TRUE: Color = (0.0, 0.78, 0.93)
"""The color of what is true."""

FOUND: Color = (1.0, 0.42, 0.0)
"""The color of a method's box."""

REGION_COLORS: tuple[Color, ...] = ((0.84, 0.37, 0.0), (0.94, 0.89, 0.26), (0.0, 0.45, 0.7), (0.5, 0.8, 1.0))
"""Colors of the four regions, apart for every eye: warm where the CAM is high, dark where the saliency is."""

REGION_NAMES = tuple(name.upper().replace("_", "-") for name in REGIONS)

COLORS = torch.tensor([(0.0, 0.0, 0.0), *REGION_COLORS])
"""Those of labels: 0 for what is outside."""

PALE = 0.75
"""How far what does not count fades to white."""


@dataclass(frozen=True, eq=False)
class Explained:
    """One method's maps of the images of a gallery; `problems` says, by image, why a map shows nothing."""

    title: str
    case: Case
    signed: bool = False
    problems: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, eq=False)
class Row:
    """A picture an image, None where there is none; `captions` stand below them."""

    title: str
    pictures: tuple[Picture | None, ...]
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Block:
    """Rows that belong together."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures in blocks of rows, named above and at the left; `numbers` are what stands below them, by method.

    `keys` are the beginnings of lines in captions that explain a color.
    """

    columns: tuple[str, ...]
    blocks: tuple[Block, ...]
    numbers: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    keys: Mapping[str, Color] = field(default_factory=dict[str, Color])

    def sheet(self, *, gap: int = 6) -> Image.Image:
        """Draw the gallery, every picture in its own size."""
        rows = [row for block in self.blocks for row in block.rows]
        cell = max(max(one.shape[1:]) for row in rows for one in row.pictures if one is not None)
        is_blocked = len(self.blocks) > 1 or any(block.title for block in self.blocks)
        return viz.grid(
            [row.pictures for row in rows],
            columns=self.columns,
            titles=[row.title for row in rows],
            captions=[row.captions for row in rows] if any(row.captions for row in rows) else (),
            blocks=[(block.title, len(block.rows)) for block in self.blocks] if is_blocked else (),
            keys=self.keys,
            cell=cell,
            gap=gap,
        )

    def turned(self) -> "Gallery":
        """Return the gallery with its rows in columns: an image a row."""
        rows = [(block.title, row) for block in self.blocks for row in block.rows]
        across = [
            Row(name, tuple(row.pictures[i] for _, row in rows), captions_of([row for _, row in rows], i))
            for i, name in enumerate(self.columns)
        ]
        columns = tuple("\n".join(filter(None, (block, row.title))) for block, row in rows)
        return Gallery(columns, (Block("", tuple(across)),), self.numbers, self.keys)


def captions_of(rows: Sequence[Row], i: int) -> tuple[str, ...]:
    """Return what stands below the i-th picture of each row; none where nothing stands below any."""
    found = tuple(row.captions[i] if row.captions else "" for row in rows)
    return found if any(found) else ()


def explained(
    title: str, method: Method, classifier: Classifier, batch: Batch, *, explain: Scored = "label"
) -> Explained:
    """Explain the images of a gallery.

    Raises:
        TypeError, ValueError: images, labels or maps that do not fit; see `evaluation.measure`.
    """
    maps = Maps.of_method(method)
    subject = Subject(maps, classifier, checked_batch(batch, classifier))
    case = subject.case(explain, explain, subject.label(explain))
    reasons = zip(batch.ids, degenerate(subject.map(explain)), strict=True)
    return Explained(title, case, signed(maps.method), {name: reason for name, reason in reasons if reason})


def maps(
    methods: Sequence[Explained], columns: Sequence[str], *, truth: Truth = "none", side: int | None = None
) -> Gallery:
    """Draw the images and each method's maps over them; `truth` outlines the class's true boxes or its true pixels.

    A map that shows nothing leaves its cell gray, and the caption says why. `side` is that of a cell in pixels.

    Raises:
        ValueError: no method, or a truth that an image does not have.
    """
    case = first(methods)
    photos = enlarged(case.x, side)
    outlined = [tracer(case, i, truth) for i in range(len(photos))]
    rows = [Row("image", tuple(trace(photo) for trace, photo in zip(outlined, photos, strict=True)))]
    for one in methods:
        reasons = [one.problems.get(name, "") for name in case.batch.ids]
        cells = [
            None if reason else trace(laid(photo, raw, signed=one.signed))
            for trace, photo, raw, reason in zip(outlined, photos, one.case.raw, reasons, strict=True)
        ]
        rows.append(Row(one.title, tuple(cells), tuple(reasons) if any(reasons) else ()))
    return Gallery(tuple(columns), (Block("", tuple(rows)),))


def masks(
    methods: Sequence[Explained],
    columns: Sequence[str],
    *,
    rule: Rule = "matched_area",
    normalize: bool = True,
    erase: Eraser = "black",
    radius: float = 3.0,
    side: int | None = None,
) -> Gallery:
    """Draw what is left of the images: clean, masked in, masked out and inpainted, a block a method.

    As in `multi_classifier_accuracy`: b, the mask that the rule makes of the map at the image's resolution in [0, 1],
    keeps b x + (1 - b) erase, hides (1 - b) x + b erase, and the hole is painted over after Telea (`radius` pixels).
    A map that shows nothing shows and hides nothing.

    Raises:
        LookupError: an unknown rule.
        ValueError: no method, or with normalize=False a map outside [0, 1].
    """
    photos, binarize = enlarged(first(methods).x, side), chosen(rule, RULES, "rule")
    size = max(photos[0].shape[1:])
    blocks: list[Block] = []
    for one in methods:
        b = binarize(in_pixels(one.case, normalize=normalize)).to(one.case.x.dtype)
        seen = shown(one.case, b, erase, radius)
        rows = (Row(part.replace("_", " "), enlarged(x.clamp(0, 1), size)) for part, x in seen.items())
        blocks.append(Block(one.title, tuple(rows)))
    return Gallery(tuple(columns), tuple(blocks))


def boxes(
    methods: Sequence[Explained],
    columns: Sequence[str],
    *,
    rule: BoxRule = "matched_area",
    normalize: bool = True,
    side: int | None = None,
) -> Gallery:
    """Draw the true boxes of the class, and below each method's box with its IoU with the true one that fits best.

    A method's box is that of `localization_error`: the tightest one around the largest region of the map's mask. Where
    nothing is marked there is no box, and where there is no true box no IoU.

    Raises:
        LookupError: an unknown rule.
        ValueError: no method, an image without boxes and mask, or with normalize=False a map outside [0, 1].
    """
    check(rule, 1.0, "unclipped")
    case = first(methods)
    asked = [tracer(case, i, "boxes") for i in range(len(case.x))]
    truths = tuple(trace(photo) for trace, photo in zip(asked, enlarged(case.x, side), strict=True))
    rows, numbers = [Row("true boxes", truths)], dict[str, tuple[float, ...]]()
    for one in methods:
        B = predicted(in_pixels(one.case, normalize=normalize), rule, 1.0).cpu()
        found = overlaps(one.case, ASKING, rule, 1.0, "unclipped", normalize=normalize).tolist()
        size = (case.x.shape[2], case.x.shape[3])
        cells = tuple(boxed(photo, box[None], size, FOUND) for photo, box in zip(truths, B, strict=True))
        rows.append(Row(one.title, cells, tuple(map(overlap, found))))
        numbers[one.title] = tuple(found)
    return Gallery(tuple(columns), (Block("", tuple(rows)),), numbers)


def pairs(
    methods: Sequence[Explained],
    columns: Sequence[str],
    *,
    against: int,
    name: str,
    cues: Cues | None = None,
    normalize: bool = True,
    side: int | None = None,
) -> Gallery:
    """Draw what tells the class of each image from another one: both maps and their difference, a block a method.

    The maps are scaled to [S]_+ / max S and subtracted at their own resolution, as in `cue_localization`
    (normalize=False: as they are); red speaks for the image's class, blue for the other, whose `name` is that of a row.
    `cues` know where the two differ: those pixels stay, and all else is pale.

    Raises:
        ValueError: no method, or an image of the other class itself.
    """
    case = first(methods)
    photos, own = enlarged(case.x, side), explained_labels(case)
    if against in own:
        raise ValueError(
            f"{case.batch.ids[own.index(against)]!r} is itself explained for class {name!r}; "
            "take images of other classes, or compare with another one"
        )
    top = [Row("image", photos)]
    if cues is not None:
        top.append(Row("true difference", tuple(differing(case, cues, against, photos))))
    scale = NORMALIZED["max" if normalize else "none"]
    blocks = [contrasted(one, photos, against, name, scale) for one in methods]
    return Gallery(tuple(columns), (Block("", tuple(top)), *blocks))


def regions(
    one: Explained, columns: Sequence[str], *, tau_cam: float = 0.25, tau_sm: float = 0.15, side: int | None = None
) -> Gallery:
    """Draw what CAM and saliency find of the true object: image, CAM, saliency, four regions, signed distances.

    Whatever the method, CAM and saliency are those of the network for the class that is explained. The regions are
    drawn on the class's true pixels, their shares stand below; the last row has a point for each of these pixels, at
    its distances from the two hyperplanes (`hyperplanes.signed_distances`): right of the line is DR, above it HSR.

    Raises:
        UnsuitedError: a network without global average pooling and one linear layer.
        ValueError: an image without a mask, or a threshold outside (0, 1].
    """
    case, y = one.case, explained_labels(one.case)
    photos = enlarged(case.x, wide_side_of(max(case.x.shape[2:])) if side is None else side)
    found = signed_distances(case.classifier, case.x, case.y.new_tensor(y), tau_cam=tau_cam, tau_sm=tau_sm)
    each = zip(found.regions.cpu(), case.batch.samples, y, strict=True)
    numbers = [torch.where(inside_of(sample, label), R + 1, 0) for R, sample, label in each]
    painted = (viz.painted(photo, grown(R, photo), COLORS) for photo, R in zip(photos, numbers, strict=True))
    points = zip(photos, numbers, found.d_cam.cpu(), found.d_sm.cpu(), strict=True)
    rows = (
        Row("image", photos),
        drawn("CAM", photos, found.cam.clamp(min=0), False),
        drawn("saliency", photos, found.saliency, False),
        Row("regions of the object", tuple(painted), tuple(map(shares, numbers))),
        Row("distances to the hyperplanes", tuple(plotted(*each) for each in points)),
    )
    return Gallery(tuple(columns), (Block("", rows),), keys=dict(zip(REGION_NAMES, REGION_COLORS, strict=True)))


def inside_of(sample: Sample, label: int) -> Bool[Tensor, "h w"]:
    """Return the true pixels of a class.

    Raises:
        ValueError: no mask.
    """
    region = sample.region_of(label)
    if region is None:
        raise ValueError(f"{sample.id!r} has no mask, and the regions are those of the true object")
    return region[0]


def grown(labels: Int[Tensor, "h w"], photo: Picture) -> Int[Tensor, "_h _w"]:
    """Return labels at the photo's resolution."""
    return resize(labels[None, None].float(), (photo.shape[1], photo.shape[2]), "nearest")[0, 0].long()


def shares(numbers: Int[Tensor, "h w"]) -> str:
    """Return the shares of the regions 1 to 4 among all that are not 0, as a caption."""
    counts = numbers.flatten().bincount(minlength=5)[1:].double()
    if not counts.any():
        return "no object"
    each = (100 * counts / counts.sum()).tolist()
    return "\n".join(f"{name} {share:.0f} %" for name, share in zip(REGION_NAMES, each, strict=True))


def plotted(
    photo: Picture, numbers: Int[Tensor, "h w"], d_cam: Float[Tensor, "1 h w"], d_sm: Float[Tensor, "1 h w"]
) -> Picture | None:
    """Return the object's pixels by their distances from the hyperplanes; None where there are none."""
    inside = numbers > 0
    x, y = d_cam[0][inside], d_sm[0][inside]
    if not len(x) or not bool(x.isfinite().all()):
        return None
    return viz.scatter(x, y, COLORS[numbers[inside]], axes=("CAM", "saliency"), side=max(photo.shape[1:]))


def segments(
    methods: Sequence[Explained],
    columns: Sequence[str],
    *,
    names: Sequence[str] = (),
    resolves: Mapping[str, Resolve] | None = None,
    threshold: float = 0.15,
    normalize: bool = True,
    side: int | None = None,
) -> Gallery:
    """Draw label maps over the images in Pascal VOC's colors: the true one, and one a method and background resolve.

    As in the protocol `segmentation`: of each class that is known to be in the image a map is made and divided by its
    maximum (normalize=False: as it is), resolved, and where none exceeds the threshold the pixel is background, which
    shows the photo. `names` are those of the classes.

    Raises:
        ValueError: no method, a threshold outside [0, 1] of divided maps, an image without a mask, or a class that the
            network does not have.
    """
    check_threshold("max" if normalize else "none", threshold)
    case, chosen = first(methods), resolves or {"basic": basic}
    photos = enlarged(case.x, side)
    scenes = [Scene.of(sample, case.logits.shape[1]) for sample in case.batch.samples]
    truth = tuple(labeled(photo, scene.mask) for photo, scene in zip(photos, scenes, strict=True))
    listed = {number: names[number] if names else str(number) for scene in scenes for number in scene.there}
    rows = [Row("image", photos)]
    rows.append(Row("truth", truth, tuple("\n".join(listed[number] for number in scene.there) for scene in scenes)))
    for one in methods:
        maps = class_maps(
            Maps.of_method(one.case.method), case.classifier, case.batch, [s.competing for s in scenes], len(scenes)
        )
        for title, resolve in chosen.items():
            each = zip(photos, scenes, case.x, map(NORMALIZERS["max" if normalize else "none"], maps), strict=True)
            cells = (labeled(p, labels_at(resolve(x, S), s.competing, threshold)) for p, s, x, S in each)
            rows.append(Row(f"{one.title}\n{title}" if len(chosen) > 1 else one.title, tuple(cells)))
    keys = {name: color_of(number) for number, name in listed.items()}
    return Gallery(tuple(columns), (Block("", tuple(rows)),), keys=keys)


def color_of(label: int) -> Color:
    """Return the color of a class."""
    r, g, b = viz.palette()[label + 1].tolist()
    return r, g, b


def labeled(photo: Picture, labels: Int[Tensor, "h w"]) -> Picture:
    """Return the photo with every pixel in the color of its label."""
    return viz.painted(photo, grown(labels.cpu(), photo), viz.palette())


def stacked(galleries: Mapping[str, Gallery]) -> Gallery:
    """Set galleries of the same images below each other, by the names of their networks.

    Rows that are the same in all of them (the images) stand once, in a block of their own above.

    Raises:
        ValueError: no gallery, or other columns.
    """
    if not galleries or len({one.columns for one in galleries.values()}) > 1:
        raise ValueError(f"expected galleries of the same images, got {[one.columns for one in galleries.values()]}")
    top, *others = galleries.values()
    everywhere = [row for block in top.blocks for row in block.rows if all(has(one, row) for one in others)]
    blocks = [Block("", tuple(everywhere))] if everywhere else []
    for name, one in galleries.items():
        for block in one.blocks:
            rows = tuple(row for row in block.rows if not any(same(row, other) for other in everywhere))
            blocks += [Block("\n".join(filter(None, (name, block.title))), rows)] if rows else []
    numbers = {f"{name}: {title}": each for name, one in galleries.items() for title, each in one.numbers.items()}
    keys = {key: color for one in galleries.values() for key, color in one.keys.items()}
    return Gallery(top.columns, tuple(blocks), numbers, keys)


def has(gallery: Gallery, row: Row) -> bool:
    """Tell whether a row is in a gallery."""
    return any(same(row, other) for block in gallery.blocks for other in block.rows)


def same(a: Row, b: Row) -> bool:
    """Tell whether two rows show the same under the same title."""
    pictures = zip(a.pictures, b.pictures, strict=True)
    return (a.title, a.captions) == (b.title, b.captions) and all(
        x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pictures
    )


def contrasted(
    one: Explained, photos: Sequence[Picture], against: int, name: str, scale: Callable[[Tensor], Tensor]
) -> Block:
    """Return the maps of both classes and their difference; what is rounding is no difference."""
    own = one.case.raw
    others = replace(one.case, explained=torch.full_like(one.case.y, against)).explain(one.case.x)
    a, b = scale(own), scale(others)
    noise = ROUNDING * torch.maximum(a.abs(), b.abs()).amax((2, 3), keepdim=True)
    apart = torch.where((a - b).abs() > noise, a - b, 0)
    listed = (("own class", own, one.signed), (name, others, one.signed), ("difference", apart, True))
    return Block(one.title, tuple(drawn(title, photos, raw, is_signed) for title, raw, is_signed in listed))


def drawn(title: str, photos: Sequence[Picture], raw: Saliency, is_signed: bool) -> Row:
    """Return maps over the photos; gray, with the reason below, where a map shows nothing."""
    reasons = [reason or "" for reason in degenerate(raw)]
    each = zip(photos, raw, reasons, strict=True)
    cells = [None if reason else laid(photo, one, signed=is_signed) for photo, one, reason in each]
    return Row(title, tuple(cells), tuple(reasons) if any(reasons) else ())


def differing(case: Case, cues: Cues, against: int, photos: Sequence[Picture]) -> Iterator[Picture | None]:
    """Yield the photos with all but the parts that tell the two classes apart pale; None where none shows."""
    numbers = list(range(len(photos))) if cues.labels is None else list(cues.labels)
    marking = cues.marking("auto", segmentation=True)
    for sample, label, photo in zip(case.batch.samples, explained_labels(case), photos, strict=True):
        pair = [one if cues.labels is None else numbers.index(one) for one in (label, against)]
        cue = marking(sample)(pair[0], pair[1])
        yield None if cue is None else spotted(photo, cue)


def spotted(photo: Picture, region: Bool[Tensor, "h w"]) -> Picture:
    """Return the photo with all but a region pale."""
    inside = region_in(photo, region)
    return viz.outline(torch.where(inside, photo, photo + PALE * (1 - photo)), inside, color=TRUE)


ASKING = "the gallery"


def first(methods: Sequence[Explained]) -> Case:
    """Return the first method's case.

    Raises:
        ValueError: no method.
    """
    if not methods:
        raise ValueError("a gallery needs at least one method, got none")
    return methods[0].case


def explained_labels(case: Case) -> list[int]:
    """Return the class that each map is of."""
    labels: list[int] = (case.y if case.explained is None else case.explained).tolist()
    return labels


def side_of(longest: int) -> int:
    """Return the side of a cell for images of so many pixels: the least whole multiple that is large enough."""
    return min(MOST, longest * math.ceil(LEAST / longest))


def wide_side_of(longest: int) -> int:
    """Return the side of a wide cell for images of so many pixels: the largest whole multiple that fits."""
    return longest * (MOST // longest) if longest < MOST else MOST


def enlarged(x: Images, side: int | None = None) -> tuple[Picture, ...]:
    """Return images in color, their longer side `side` pixels (bicubic), by default as `side_of` says."""
    longest = max(x.shape[2:])
    scale = (side_of(longest) if side is None else side) / longest
    size = [max(1, round(scale * one)) for one in x.shape[2:]]
    photos = interpolate(x.detach().float().cpu(), size, mode="bicubic", antialias=True).clamp(0, 1)
    return tuple(photos.expand(-1, 3, -1, -1))


def tracer(case: Case, i: int, truth: Truth) -> Callable[[Picture], Picture]:
    """Return the function that outlines what is true of the i-th image's class.

    Raises:
        ValueError: the image does not have it.
    """
    size = (case.x.shape[2], case.x.shape[3])
    if truth == "boxes":
        B = case.boxes(i, ASKING)
        return lambda photo: boxed(photo, B, size, TRUE)
    if truth == "none":
        return lambda photo: photo
    sample = case.batch.samples[i]
    region = sample.region_of(int(case.y[i]))
    if region is None:
        raise ValueError(f"{sample.id!r} has no mask to outline; leave the truth out, or ask for its boxes")
    return lambda photo: viz.outline(photo, region_in(photo, region[0]), color=TRUE)


def boxed(photo: Picture, B: Float[Tensor, "n 4"], size: tuple[int, int], color: Color) -> Picture:
    """Outline boxes that are in pixels of an image of `size` = (height, width); what lies outside is cut off."""
    h, w = photo.shape[1:]
    for x0, y0, x1, y1 in (B.double() * B.new_tensor([w / size[1], h / size[0]] * 2).double()).round().long().tolist():
        region = torch.zeros(h, w, dtype=torch.bool)
        region[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)] = True
        photo = viz.outline(photo, region, color=color)
    return photo


def region_in(photo: Picture, region: Bool[Tensor, "h w"]) -> Bool[Tensor, "_h _w"]:
    """Return a region at the photo's resolution, its border smooth."""
    return resize(region[None, None].float(), (photo.shape[1], photo.shape[2]))[0, 0] > 0.5


def overlap(value: float) -> str:
    """Return an IoU as a caption."""
    return "no true box" if math.isnan(value) else f"IoU {value:.2f}"


def headings(samples: Sequence[Sample], names: Sequence[str]) -> tuple[str, ...]:
    """Return the heading of each image: what its id has that the others have not, and the name of its class."""
    each = zip(shortened([sample.id for sample in samples]), names, strict=True)
    return tuple("\n".join(filter(None, pair)) for pair in each)


def shortened(ids: Sequence[str]) -> list[str]:
    """Return ids without the words that all of them begin or end with; of one alone the last word that is a number."""
    split = [words(one) for one in ids]
    if len(split) == 1:
        numbered = [word for word in split[0] if word.isdecimal()]
        return [numbered[-1] if numbered else ids[0]]
    start = alike(split)
    end = alike([one[start:][::-1] for one in split])
    return ["-".join(one[start : len(one) - end]) for one in split]


def words(text: str) -> list[str]:
    """Return the parts of an id between hyphens, underscores and slashes."""
    return text.replace("_", "-").replace("/", "-").split("-")


def alike(lists: Sequence[Sequence[str]]) -> int:
    """Return how many words all lists begin with, one less where a list would be used up."""
    least = min(map(len, lists))
    same = next((i for i in range(least) if len({one[i] for one in lists}) > 1), least)
    return min(same, least - 1)


def consecutive(
    samples: Indexed[Sample], count: int, groups: Sequence[frozenset[int] | None], *, start: int = 0
) -> list[list[int]]:
    """Return where the first `count` samples of each group of labels are, from `start` on; None stands for all labels.

    Reads no more samples than it must.

    Raises:
        ValueError: a count below one, or a start outside the data set.
    """
    if count < 1:
        raise ValueError(f"expected at least one image, got {count}")
    if not 0 <= start < len(samples):
        raise ValueError(f"the data set has images 0 to {len(samples) - 1}, got start={start}")
    found: list[list[int]] = [[] for _ in groups]
    for index in range(start, len(samples)):
        waiting = [i for i, one in enumerate(found) if len(one) < count]
        if not waiting:
            break
        label = None if all(groups[i] is None for i in waiting) else samples[index].label
        for i in waiting:
            group = groups[i]
            if group is None or label in group:
                found[i].append(index)
    return found


def drawn_classes(classes: Sequence[int], count: int, seed: int) -> list[int]:
    """Return so many classes drawn at random, in order.

    Raises:
        ValueError: more than there are, or none.
    """
    if not 1 <= count <= len(classes):
        raise ValueError(f"expected 1 to {len(classes)} random classes, got {count}")
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    return sorted(classes[i] for i in order[:count].tolist())
