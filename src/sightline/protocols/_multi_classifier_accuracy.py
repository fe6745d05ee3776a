"""Multi-classifier accuracy. Zolna, Geras and Cho, Classifier-agnostic saliency map extraction, CVIU 2020; the holes
are painted over after Telea, 2004.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, Method
from sightline.data import Indexed, Sample, batches
from sightline.erase import Eraser, mix, resolve, telea
from sightline.evaluation import cases
from sightline.maps import resize, threshold
from sightline.metrics import Case
from sightline.metrics._localization import in_pixels, matched_area
from sightline.registry import chosen
from sightline.runs import Choice, Score
from sightline.types import Images, Labels, Saliency

Mask: TypeAlias = Literal["map", "random", "random_coarse", "zeros", "ones"]
Rule: TypeAlias = Literal["matched_area", "mean", "soft"]
Make: TypeAlias = Callable[[Case, torch.Generator], Saliency]

CELL = 4
"""Side of a coarse cell in pixels: 56 x 56 cells at 224 x 224."""

PARTS: Mapping[str, bool | None] = {"clean": None, "masked_in": True, "masked_out": False, "inpainted": False}
"""What the classifiers see -> whether higher accuracy is better."""


def multi_classifier_accuracy(
    method: Method,
    classifier: Classifier,
    samples: Indexed[Sample],
    /,
    *,
    classifiers: Sequence[Classifier],
    mask: Mask = "map",
    rule: Rule = "matched_area",
    normalize: bool = True,
    erase: Eraser = "black",
    radius: float = 3.0,
    seed: int = 0,
    batch: int = 16,
) -> dict[str, Score]:
    """Measure how well other classifiers do on what the map shows, and on what it hides; top-1 accuracy in percent.

    With b the mask that a rule makes of S, the map of the label for `classifier`, the `classifiers` see

        clean        x
        masked_in    b x + (1 - b) erase        higher is better
        masked_out   (1 - b) x + b erase        lower is better
        inpainted    masked_out with the hole painted over from what is around it (`radius` pixels); lower is better

    A map that is true for all classifiers hides what even inpainting cannot bring back. The value is the mean over
    images and classifiers, `per_image` the percentage of the classifiers that are right, the curve has each
    classifier's accuracy, in their order. Whether `classifier` is among them is the caller's choice.

    `rule` on S at the input's resolution, scaled to [0, 1] (normalize=False: as it is, and it must lie there; a learned
    mask's mean is its area): "matched_area", the strongest pixels, mean(S) of the area, as in CASM's code; "mean",
    S >= mean(S) and S > 0, the printed formula; "soft", b = S. A map that is zero everywhere shows and hides nothing.
    `mask` takes controls in place of the map, and no map is made: "random", Bernoulli(.5) at each pixel;
    "random_coarse", in cells of 4 pixels (56 x 56 at 224); "zeros" and "ones". Random masks are drawn image after
    image, in the order of the data set.

    A classifier whose `size` is not that of `classifier` gets the masked images resized to its own (bilinear).
    Inpainting works on 8-bit colors, in the hole alone; where all is masked out nothing can be painted from, and the
    erased image stays. Under "soft" the hole is where S >= .5, painted with the weight S.

    *Differs:* CASM inpaints the whole picture in 8 bits, and its own maps are not scaled. `erase` is black in [0, 1],
    as in its evaluation.

    Raises:
        LookupError: an unknown mask or rule.
        ValueError: no classifier, classes that differ in number or in name, a radius not above zero, no sample, one
            without a label, or a map outside [0, 1] that is not to be normalized.
    """
    of_map: Make = partial(binarized, binarize=chosen(rule, RULES, "rule"), normalize=normalize)
    make = chosen(mask, {"map": of_map, **CONTROLS}, "mask")
    if radius <= 0:
        raise ValueError(f"expected radius > 0 pixels, got {radius}")
    check_classifiers(classifier, classifiers)
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    generator, explain = torch.Generator().manual_seed(seed), method if mask == "map" else nothing
    for case in cases(explain, classifier, batches(samples, batch), explain="label", scored="label"):
        for part, images in shown(case, make(case, generator), erase, radius).items():
            found[part].append(right(images, case, classifiers))
    if not found["clean"]:
        raise ValueError("no image was measured; the data set is empty")
    return {part: summed(part, torch.cat(found[part])) for part in PARTS}


def shown(case: Case, b: Saliency, erase: Eraser, radius: float) -> dict[str, Images]:
    """Return what the classifiers see, part by part."""
    fill = resolve(erase, case.classifier.mean)
    out = mix(case.x, 1 - b, fill)
    inpainted = mix(out, 1 - b, partial(telea, radius=radius))
    return {"clean": case.x, "masked_in": mix(case.x, b, fill), "masked_out": out, "inpainted": inpainted}


def right(images: Images, case: Case, classifiers: Sequence[Classifier]) -> Float[Tensor, "b n"]:
    """Return 1 for each image and classifier that predicts the label, else 0."""
    return torch.stack([predicted(images, case, other) == case.y.cpu() for other in classifiers], 1).double()


def predicted(images: Images, case: Case, other: Classifier) -> Labels:
    """Return the class that another classifier predicts, on images of its own size.

    Raises:
        ValueError: another number of classes than the explained classifier has.
    """
    seen = images if other.size == case.classifier.size else resize(images, other.size)
    with torch.no_grad():
        logits = other(seen.to(other.device))
    if logits.shape[1] != case.logits.shape[1]:
        raise ValueError(
            f"expected classifiers of the same {case.logits.shape[1]} classes as the explained one, "
            f"got one of {logits.shape[1]}"
        )
    return logits.argmax(1).cpu()


def summed(part: str, hits: Float[Tensor, "b n"]) -> Score:
    """Return the accuracy of one part, in percent, over images and classifiers, and of each classifier."""
    one, axis = 100 * hits.mean(1), tuple(float(number + 1) for number in range(hits.shape[1]))
    curve = tuple((100 * hits.mean(0)).tolist())
    return Score(Choice(part), float(one.mean()), PARTS[part], tuple(one.tolist()), curve, axis, len(hits))


def check_classifiers(classifier: Classifier, classifiers: Sequence[Classifier]) -> None:
    """Check that there are classifiers, and that their classes are those of the explained one, where both have names.

    Raises:
        ValueError: none, or classes that differ.
    """
    if not classifiers:
        raise ValueError("expected at least one other classifier, got none; pass classifiers=[...]")
    for number, other in enumerate(classifiers, 1):
        if classifier.classes and other.classes and classifier.classes != other.classes:
            pairs = zip(classifier.classes, other.classes, strict=False)
            differ = next((f"{a!r} and {b!r}" for a, b in pairs if a != b), None)
            lengths = f"{len(classifier.classes)} and {len(other.classes)} of them"
            raise ValueError(
                f"classifier {number} does not number the classes as the explained one: {differ or lengths}; "
                "pass classifiers of the same classes in the same order"
            )


def nothing(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
    """Return maps that say nothing."""
    return torch.zeros_like(x[:, :1])


def binarized(
    case: Case, generator: torch.Generator, *, binarize: Callable[[Saliency], Tensor], normalize: bool
) -> Saliency:
    """Return the mask that a rule makes of the maps."""
    return binarize(in_pixels(case, normalize=normalize)).to(case.x.dtype)


def random(case: Case, generator: torch.Generator, *, cell: int = 1) -> Saliency:
    """Return masks of which each cell is there or not with even chances, image after image."""
    size = (case.x.shape[2], case.x.shape[3])
    cells = tuple(max(1, round(side / cell)) for side in size)
    draws = [torch.rand(cells, generator=generator) < 0.5 for _ in case.x]
    return resize(torch.stack(draws)[:, None].to(torch.float32), size, "nearest").to(case.x)


def constant(case: Case, generator: torch.Generator, *, value: float) -> Saliency:
    """Return masks of one value."""
    return torch.full_like(case.x[:, :1], value)


def above_mean(saliency: Saliency) -> Tensor:
    """Mark the pixels at or above each map's mean, where they are above zero."""
    return threshold(saliency, 1.0, "mean") & (saliency > 0)


def soft(saliency: Saliency) -> Saliency:
    """Return the maps as they are."""
    return saliency


RULES: Mapping[str, Callable[[Saliency], Tensor]] = {"matched_area": matched_area, "mean": above_mean, "soft": soft}

CONTROLS: Mapping[str, Make] = {
    "random": random,
    "random_coarse": partial(random, cell=CELL),
    "zeros": partial(constant, value=0.0),
    "ones": partial(constant, value=1.0),
}
