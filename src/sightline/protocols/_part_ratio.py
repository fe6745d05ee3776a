"""Part ratio. How much more salient some parts of an animal are than others, class by class.

Fong and Vedaldi, Interpretable explanations of black boxes by meaningful perturbation, ICCV 2017, supplement, 7.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sightline.classifier import Classifier, Method
from sightline.data import Indexed, Sample, batches, layers
from sightline.evaluation import cases
from sightline.maps import resize
from sightline.metrics import Case
from sightline.registry import chosen, unknown
from sightline.runs import Choice, Score

Of: TypeAlias = Literal["saliency", "raw"]
Side: TypeAlias = tuple[int, ...]
"""Rows of a keypoint block."""


def part_ratio(
    method: Method,
    classifier: Classifier,
    samples: Indexed[Sample],
    /,
    *,
    numerator: Sequence[str],
    denominator: Sequence[str],
    names: Sequence[str] | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    window: int = 5,
    least: int = 11,
    of: Of = "saliency",
    as_mask: bool = False,
    batch: int = 16,
) -> dict[str, Score]:
    """Return how many times as salient the numerator's parts are as the denominator's; neither good nor bad.

    The intensity at a keypoint is the mean of the label's map over the `window` x `window` pixels around its own, as
    far as they are in the image. I(c, P) is the mean intensity over all visible keypoints of the parts P in the images
    of class c that show at least one of either set; a class counts with at least `least` such images.

        r(c) = I(c, numerator) / I(c, denominator),   ratio = mean of r over the classes, +- stdev(r) / sqrt(classes)

    The map is at the image's resolution; `of`: "saliency", scaled to [0, 1], or "raw", the method's own values, which
    should not be negative. The paper prints feet / eyes of a deletion mask m = 1 - s, where salient is low: `as_mask`
    gives (1 - I(c, denominator)) / (1 - I(c, numerator)), so numerator = the eyes and above 1 = more salient, as here.

    `numerator` and `denominator` name keypoints, without any in common. `names`: what the rows of `Sample.keypoints`
    are, by default `samples.keypoint_names`; where an image has several blocks of them, all are taken to be of the
    label. `groups`: name -> classes, by default those of each name in `samples.groups` (one name a class).

    Parts: "ratio" and "ratio_standard_error" over all classes, "ratio.<group>" and "ratio_standard_error.<group>" over
    those of a group; "numerator" and "denominator", the mean of I over the classes. The curves of "ratio", "numerator"
    and "denominator" are those of the classes that count, over the number of the class. A class whose divisor is zero
    has no ratio; a mean over no class is NaN, and so is the error of fewer than two. `count` is the number of images.

    *Differs:* the paper takes mask and keypoints at the size of the original picture, here at the classifier's input.

    Raises:
        LookupError: a keypoint of no such name, or an unknown `of`.
        ValueError: no names, an empty or shared part, an even window, `least` below one, keypoints that are none or do
            not fit the names, a group of classes that the classifier does not have, or no class that counts.
    """
    if window < 1 or window % 2 == 0 or least < 1:
        raise ValueError(f"expected an odd window and least >= 1, got window={window}, least={least}")
    chosen(of, dict.fromkeys(("saliency", "raw")), "map")
    named: tuple[str, ...] = tuple(told(samples, "keypoint_names", ()) if names is None else names)
    sides = parts(named, numerator), parts(named, denominator)
    if common := set(sides[0]) & set(sides[1]):
        raise ValueError(f"numerator and denominator share {named[min(common)]!r}; name each keypoint once")
    found, classes = list[Tensor](), 0
    for case in cases(method, classifier, batches(samples, batch), explain="label", scored="label"):
        classes = case.logits.shape[1]
        found += intensities(case, sides, len(named), window, of)
    grouped = members(told(samples, "groups", {}) if groups is None else groups, classes)
    images, means = by_class(found, classes, least)
    over, under = (1 - means[1], 1 - means[0]) if as_mask else (means[0], means[1])
    r = torch.where(under == 0, torch.nan, over / under)
    return {score.metric.name: score for score in scores(r, means, images, grouped)}


def told(samples: object, name: str, otherwise: Any) -> Any:
    """Return what the data set behind the samples says of itself; not where its classes have other numbers."""
    known = list(layers(samples))
    if name == "groups" and any(hasattr(one, "numbers") for one in known):
        return otherwise
    return next((getattr(one, name) for one in known if hasattr(one, name)), otherwise)


def parts(names: tuple[str, ...], wanted: Sequence[str]) -> Side:
    """Return the rows of the keypoints of one side.

    Raises:
        LookupError: no such keypoint.
        ValueError: no names are known, or none is wanted.
    """
    if not names:
        raise ValueError("these samples do not name their keypoints; pass names=, one a row of Sample.keypoints")
    listed = [wanted] if isinstance(wanted, str) else list(wanted)
    if not listed:
        raise ValueError(f"expected at least one keypoint in numerator and denominator; there are {', '.join(names)}")
    if missing := [name for name in listed if name not in names]:
        raise LookupError(unknown(missing[0], names, "keypoint"))
    return tuple(sorted({names.index(name) for name in listed}))


def members(groups: Mapping[str, Sequence[int]] | Sequence[str], classes: int) -> dict[str, list[int]]:
    """Return the classes of each group, of a mapping or of one name a class.

    Raises:
        ValueError: a class that the classifier does not have.
    """
    if not isinstance(groups, Mapping):
        groups = {name: [i for i, one in enumerate(groups) if one == name] for name in groups}
    for name, group in groups.items():
        if wrong := [label for label in group if not 0 <= label < classes]:
            raise ValueError(f"group {name!r} has class {wrong[0]}, outside 0..{classes - 1}; pass groups=")
    return {name: list(group) for name, group in groups.items()}


def intensities(case: Case, sides: tuple[Side, Side], rows: int, window: int, of: Of) -> Iterator[Float[Tensor, "5"]]:
    """Yield label, and sum and number of intensities of either side, of each image that shows both."""
    size = (case.x.shape[2], case.x.shape[3])
    S = case.saliency.double() if of == "saliency" else resize(case.raw.double(), size)
    around = F.avg_pool2d(S, window, 1, window // 2, count_include_pad=False)[:, 0].cpu()
    for sample, label, values in zip(case.batch.samples, case.y.tolist(), around, strict=True):
        points = sample.keypoints
        if points is None or len(points) % rows:
            said = "none" if points is None else len(points)
            raise ValueError(
                f"part_ratio needs keypoints in blocks of {rows}, their names, and {sample.id!r} has {said}"
            )
        blocks = points.reshape(len(points) // rows, rows, 3)
        one, other = (at(values, blocks[:, list(side)].flatten(0, 1)) for side in sides)
        if len(one) and len(other):
            sums = [float(one.sum()), len(one), float(other.sum()), len(other)]
            yield torch.tensor([label, *sums], dtype=torch.float64)


def at(values: Float[Tensor, "h w"], points: Float[Tensor, "p 3"]) -> Float[Tensor, " _v"]:
    """Return the values at the pixels of the points that are visible and in the image, its far edges included."""
    height, width = values.shape
    x, y, visible = points.unbind(1)
    inside = (visible > 0) & (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    column, row = x[inside].long().clamp(max=width - 1), y[inside].long().clamp(max=height - 1)
    return values[row, column]


def by_class(
    found: Sequence[Float[Tensor, "5"]], classes: int, least: int
) -> tuple[Int[Tensor, " k"], Float[Tensor, "2 k"]]:
    """Return how many images each class has, and its mean intensities on both sides; NaN where they are too few.

    Raises:
        ValueError: no class has enough.
    """
    rows = torch.stack(list(found)) if found else torch.zeros(0, 5).double()
    labels = rows[:, 0].long()
    images = labels.bincount(minlength=classes)
    if not bool((images >= least).any()):
        most = int(images.max()) if classes else 0
        raise ValueError(
            f"no class has {least} images that show keypoints of both sides, the most is {most}; lower least=, or give "
            "more images"
        )
    one, many, other, more = torch.zeros(classes, 4).double().index_add(0, labels, rows[:, 1:]).unbind(1)
    return images, torch.where(images >= least, torch.stack([one / many, other / more]), torch.nan)


def scores(
    r: Float[Tensor, " k"], means: Float[Tensor, "2 k"], images: Int[Tensor, " k"], groups: Mapping[str, Sequence[int]]
) -> Iterator[Score]:
    """Yield every part."""
    counted = (~means[0].isnan()).nonzero().flatten()
    axis = tuple(map(float, counted.tolist()))
    for part, values in (("ratio", r), ("numerator", means[0]), ("denominator", means[1])):
        curve = tuple(values[counted].tolist())
        yield Score(Choice(part), float(values.nanmean()), None, (), curve, axis, int(images[counted].sum()))
    yield Score(Choice("ratio_standard_error"), standard_error(r), None, count=int(images[counted].sum()))
    for name, group in groups.items():
        chosen = torch.tensor([label for label in counted.tolist() if label in group], dtype=torch.long)
        mean, count = float(r[chosen].nanmean()), int(images[chosen].sum())
        yield Score(Choice(f"ratio.{name}"), mean, None, count=count)
        yield Score(Choice(f"ratio_standard_error.{name}"), standard_error(r[chosen]), None, count=count)


def standard_error(values: Float[Tensor, " n"]) -> float:
    """Return the standard error of the mean, those that are NaN left out; NaN of fewer than two."""
    known = values[~values.isnan()]
    return float(known.std() / math.sqrt(len(known))) if len(known) > 1 else math.nan
