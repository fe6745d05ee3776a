"""Localization. How well the box around a map, or the map itself, meets the true boxes; in two papers' forms.

Zolna, Geras and Cho, Classifier-agnostic saliency map extraction, CVIU 2020: thresholded, the box that fits best.
Zhang et al., Opti-CAM, CVIU 2024, appendix B.1: continuous, the union of the boxes.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sightline.maps import box, largest, resize, threshold
from sightline.metrics._measure import Case, Measure
from sightline.registry import unknown
from sightline.types import Saliency, Values

Rule: TypeAlias = Literal["matched_area", "mean"]
Area: TypeAlias = Literal["unclipped", "clipped"]
Boxes: TypeAlias = Float[Tensor, "n 4"]
Size: TypeAlias = tuple[int, int]


def localization_error(
    *,
    rule: Rule = "matched_area",
    alpha: float = 1.0,
    iou: float = 0.5,
    strict: bool = True,
    area: Area = "unclipped",
    normalize: bool = True,
) -> Measure:
    """Measure LE = mean 100 (1 - 1[max_B IoU(B, B_p) > iou]), in percent, lower is better (CASM, 3.2).

    B are the label's boxes; B_p is the tightest box around the largest 4-connected region of the map's mask, of equal
    ones the first in row-major order. The mask is `matched_area(m)` (CASM's code and numbers), or with rule="mean" its
    printed form {m >= alpha mean m, m > 0}. `strict=False` takes an overlap of exactly `iou` as a hit.

    m is the map at the image's resolution, scaled to [0, 1]; with normalize=False the method's own values, which must
    lie in [0, 1] then: a learned mask's mean is its area, and scaling changes it.

    Boxes may reach beyond the image. Their whole area counts in the union (area="unclipped": CASM scores a crop, where
    a hit may become impossible), or what is left in the image ("clipped"). A box wholly outside or without area has an
    overlap of 0, and so has a map that marks nothing (all zero or constant, or not finite). A box that cuts a pixel
    takes its share of it. An image without a box of its label does not count.

    *Differs:* the printed rule marks all of a map that is zero everywhere; here it marks nothing, as the code does.

    Raises:
        LookupError: an unknown rule or area.
        ValueError: `iou` outside [0, 1], alpha not above zero or set for another rule than "mean", an image without
            boxes, or a map outside [0, 1] that is not to be normalized.
    """
    check(rule, alpha, area)
    check_iou(iou)

    def score(case: Case) -> Tensor:
        overlap = overlaps(case, "localization_error", rule, alpha, area, normalize=normalize)
        return error(hits(overlap, iou, strict=strict))

    return Measure(score, higher_is_better=False)


def official_metric(
    *,
    rule: Rule = "matched_area",
    alpha: float = 1.0,
    iou: float = 0.5,
    strict: bool = True,
    area: Area = "unclipped",
    normalize: bool = True,
) -> Measure:
    """Measure OM = mean 100 (1 - 1[max_B IoU(B, B_p) > iou] 1[top-1 class = label]), in percent, lower is better.

    The metric of the ImageNet challenge: `localization_error`, and an error wherever the classifier errs (CASM, 3.2).
    The map is that of the label unless `measure` is told otherwise.

    Raises:
        LookupError, ValueError: as `localization_error`.
    """
    check(rule, alpha, area)
    check_iou(iou)

    def score(case: Case) -> Tensor:
        overlap = overlaps(case, "official_metric", rule, alpha, area, normalize=normalize)
        return error(hits(overlap, iou, strict=strict) * correct(case))

    return Measure(score, higher_is_better=False)


def f1(*, area: Area = "unclipped", normalize: bool = True) -> Measure:
    """Measure 100 max_B 2 P R / (P + R), in percent, higher is better: the map itself against the box that fits best.

        P = sum_B m / sum m,   R = sum_B m / |B|   (CASM, section 3.2)

    m, |B| and what does not count are as in `localization_error`; nothing is binarized. A map that is zero everywhere
    has P = R = 0, a box wholly outside or without area R = P = 0, and F1 is 0 where both are.

    Raises:
        LookupError: an unknown area.
        ValueError: an image without boxes, or a map outside [0, 1] that is not to be normalized.
    """
    check("mean", 1.0, area)

    def score(case: Case) -> Tensor:
        return over_images(case, "f1", lambda m, _, B: best_f1(m, B, area), normalize=normalize)

    return Measure(score, higher_is_better=True)


def localization_error_continuous(
    *, rule: Rule = "mean", alpha: float = 1.0, area: Area = "unclipped", normalize: bool = True
) -> Measure:
    """Measure LE = mean 100 (1 - max_B IoU(B, B_p)), in percent, lower is better (Opti-CAM, eq B.2, as printed).

    The settings are those of `localization_error`. The paper's numbers fit the thresholded form on a center crop, not
    this one.

    Raises:
        LookupError, ValueError: as `localization_error`.
    """
    check(rule, alpha, area)

    def score(case: Case) -> Tensor:
        return error(overlaps(case, "localization_error_continuous", rule, alpha, area, normalize=normalize))

    return Measure(score, higher_is_better=False)


def official_metric_continuous(
    *, rule: Rule = "mean", alpha: float = 1.0, area: Area = "unclipped", normalize: bool = True
) -> Measure:
    """Measure OM = mean 100 (1 - max_B IoU(B, B_p) 1[top-1 class = label]), in percent, lower is better (eq B.1).

    Opti-CAM's printed form; see `localization_error_continuous`.

    Raises:
        LookupError, ValueError: as `localization_error`.
    """
    check(rule, alpha, area)

    def score(case: Case) -> Tensor:
        overlap = overlaps(case, "official_metric_continuous", rule, alpha, area, normalize=normalize)
        return error(overlap * correct(case))

    return Measure(score, higher_is_better=False)


def f1_union(*, area: Area = "unclipped", normalize: bool = True) -> Measure:
    """Measure 100 2 P R / (P + R), in percent, higher is better: the map itself against the union U of the boxes.

        P = sum_U S / sum S,   R = sum_U S / |U|   (Opti-CAM, eqs B.3 and B.4, as printed)

    Where boxes overlap, their common part counts once. Otherwise as `f1`.

    Raises:
        LookupError, ValueError: as `f1`.
    """
    check("mean", 1.0, area)

    def score(case: Case) -> Tensor:
        return over_images(case, "f1_union", lambda S, _, B: union_f1(S, B, area), normalize=normalize)

    return Measure(score, higher_is_better=True)


def matched_area(saliency: Saliency) -> Bool[Tensor, "b 1 i j"]:
    """Mark the highest cells of each map, as many as its mean says: area(b) = mean(m), for a map in [0, 1].

    b = 1[m > t], t the (n - round(n mean m))-th lowest of the n cells, clamped to [1e-6, 1 - 1e-6] (CASM's code). So
    |area(b) - mean(m)| < 1/n, unless cells are equal at t, which are all left out, or lie within 1e-6 of 0 or 1, which
    are never marked and always. A map that is zero everywhere marks nothing.
    """
    flat = saliency.flatten(1)
    n = flat.shape[1]
    marked = (flat.double().mean(1) * n).round().long().clamp(0, n)
    ordered = flat.sort(1).values
    t = ordered.gather(1, (n - 1 - marked).clamp(min=0)[:, None])
    t = torch.where(marked[:, None] < n, t, torch.zeros_like(t)).clamp(1e-6, 1 - 1e-6)
    return (flat > t).view(saliency.shape)


def overlaps(case: Case, metric: str, rule: Rule, alpha: float, area: Area, *, normalize: bool) -> Values:
    """Return max_B IoU(B, B_p) of each image; NaN where there is no box of the label."""

    def best(_: Tensor, Bp: Tensor, B: Tensor) -> Tensor:
        size = (case.x.shape[2], case.x.shape[3])
        return intersections_over_unions(Bp, B, size, area).max()

    return over_images(case, metric, best, normalize=normalize, rule=rule, alpha=alpha)


def over_images(
    case: Case,
    metric: str,
    one: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    normalize: bool,
    rule: Rule | None = None,
    alpha: float = 1.0,
) -> Values:
    """Return `one` of each image's map, predicted box (empty without a rule) and true boxes; NaN without true boxes."""
    m = in_pixels(case, normalize=normalize)
    if rule is None:
        found = m.new_zeros(len(m), 4)
    else:
        found = case.once(("box", rule, alpha, normalize), lambda: predicted(m, rule, alpha))
    each = zip(m[:, 0], found, [case.boxes(i, metric).to(m.device) for i in range(len(m))], strict=True)
    numbers = [one(shown, Bp, B) if len(B) else m.new_tensor(torch.nan) for shown, Bp, B in each]
    return torch.stack(numbers)


def in_pixels(case: Case, *, normalize: bool) -> Saliency:
    """Return the maps at the image's resolution in float64, in [0, 1].

    Raises:
        ValueError: a map outside [0, 1] that is not to be normalized.
    """
    if normalize:
        return case.saliency.double()
    m = resize(case.raw, (case.x.shape[2], case.x.shape[3])).double()
    for sample, low, high in zip(case.batch.samples, m.amin((1, 2, 3)), m.amax((1, 2, 3)), strict=True):
        if low < 0 or high > 1:
            raise ValueError(
                f"normalize=False expects maps in [0, 1], and that of {sample.id!r} lies in [{low:g}, {high:g}]; "
                "leave normalize=True"
            )
    return m


def predicted(m: Saliency, rule: Rule, alpha: float) -> Float[Tensor, "b 4"]:
    """Return the tightest half-open box around the largest region that each map marks; all zero where it marks none."""
    marked = matched_area(m) if rule == "matched_area" else threshold(m, alpha, "mean") & (m > 0)
    return m.new_tensor([box(largest(one)) for one in marked[:, 0].cpu()])


def intersections_over_unions(Bp: Float[Tensor, " 4"], B: Boxes, size: Size, area: Area) -> Float[Tensor, " n"]:
    """Return the overlap of one box with each of several; 0 where the union has no area."""
    inside = areas(torch.cat([torch.maximum(Bp[:2], B[:, :2]), torch.minimum(Bp[2:], B[:, 2:])], 1))
    union = areas(Bp[None]) + areas(counted(B, size, area)) - inside
    return inside / torch.where(union > 0, union, 1)


def best_f1(m: Float[Tensor, "h w"], B: Boxes, area: Area) -> Tensor:
    """Return the highest F1 of a map over the boxes."""
    return 100 * harmonic(masses(m, B), m.sum(), areas(counted(B, (m.shape[0], m.shape[1]), area))).max()


def union_f1(S: Float[Tensor, "h w"], B: Boxes, area: Area) -> Tensor:
    """Return the F1 of a map on the union of the boxes."""
    U = disjoint(counted(B, (S.shape[0], S.shape[1]), area))
    return 100 * harmonic(masses(S, U).sum(), S.sum(), areas(U).sum())


def harmonic(inside: Tensor, whole: Tensor, size: Tensor) -> Tensor:
    """Return 2 P R / (P + R) with P = inside / whole and R = inside / size, which is 2 inside / (whole + size)."""
    total = whole + size
    return 2 * inside / torch.where(total > 0, total, 1)


def masses(m: Float[Tensor, "h w"], B: Boxes) -> Float[Tensor, " n"]:
    """Return the sum of the map inside each box; a pixel that is cut counts with the share that lies inside."""
    x0, y0, x1, y1 = B.unbind(1)
    rows, columns = covered(y0, y1, m.shape[0]), covered(x0, x1, m.shape[1])
    return ((rows @ m) * columns).sum(1)


def covered(start: Tensor, end: Tensor, count: int) -> Float[Tensor, "n count"]:
    """Return which share of each of `count` unit cells lies between start and end."""
    cells = torch.arange(count, dtype=start.dtype, device=start.device)
    return (torch.minimum(end[:, None], cells + 1) - torch.maximum(start[:, None], cells)).clamp(min=0)


def counted(B: Boxes, size: Size, area: Area) -> Boxes:
    """Return the boxes as they are, or cut off at the image's border."""
    if area == "unclipped":
        return B
    height, width = size
    return B.clamp(min=0).minimum(B.new_tensor([width, height, width, height]))


def areas(B: Boxes) -> Float[Tensor, " n"]:
    """Return the area of each box; 0 where it ends before it starts."""
    return (B[:, 2:] - B[:, :2]).clamp(min=0).prod(1)


def disjoint(B: Boxes) -> Float[Tensor, "m 4"]:
    """Return boxes that do not overlap and have the same union: the covered cells of the grid of all borders."""
    xs, ys = (torch.unique(B[:, axis::2]) for axis in (0, 1))
    x0, y0, x1, y1 = B[:, :, None].unbind(1)
    columns = ((xs[:-1] >= x0) & (xs[1:] <= x1)).double()
    rows = ((ys[:-1] >= y0) & (ys[1:] <= y1)).double()
    i, j = (rows.T @ columns > 0).nonzero().unbind(1)
    return torch.stack([xs[j], ys[i], xs[j + 1], ys[i + 1]], 1)


def hits(overlap: Values, iou: float, *, strict: bool) -> Values:
    """Return 1 where the overlap is above `iou` (or at it, unless strict) and 0 elsewhere; NaN stays."""
    hit = (overlap > iou if strict else overlap >= iou).to(overlap.dtype)
    return torch.where(overlap.isnan(), overlap, hit)


def correct(case: Case) -> Values:
    """Return 1 where the most probable class is the label and 0 elsewhere; of equal ones the first counts."""
    top = case.predicted()
    return (top == case.y).double()


def error(success: Values) -> Values:
    """Return 100 (1 - success)."""
    return 100 * (1 - success)


def check(rule: str, alpha: float, area: str) -> None:
    """Check the settings that all of these metrics share.

    Raises:
        LookupError: an unknown rule or area.
        ValueError: an alpha not above zero, or one that the rule does not use.
    """
    if rule not in ("matched_area", "mean"):
        raise LookupError(unknown(rule, ("matched_area", "mean"), "rule"))
    if area not in ("unclipped", "clipped"):
        raise LookupError(unknown(area, ("unclipped", "clipped"), "area"))
    if not alpha > 0:
        raise ValueError(f"expected alpha > 0, got {alpha}")
    if rule != "mean" and alpha != 1:
        raise ValueError(f"alpha={alpha} belongs to rule='mean', and the rule is {rule!r}; leave it or change the rule")


def check_iou(iou: float) -> None:
    """Check the overlap that makes a hit.

    Raises:
        ValueError: outside [0, 1].
    """
    if not 0 <= iou <= 1:
        raise ValueError(f"expected iou in [0, 1], got {iou}")
