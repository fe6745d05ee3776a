"""Variable occlusion. Fong and Vedaldi, Meaningful perturbation, ICCV 2017, supplement, section 4."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.classifier import Classifier, check_labels, logit
from sightline.erase import Eraser
from sightline.maps import scale
from sightline.methods._occlusion import behind
from sightline.types import Images, Labels, Saliency, Score


@dataclass(frozen=True)
class Discs:
    """Where objects lie and how large they are, in pixels of an image of `side` x `side`.

    log area ~ N(area_mu, area_sigma^2), center y ~ N(y_mu, y_sigma^2), center x uniform over the width. A disc has the
    object's area: R = sqrt(area / pi).
    """

    area_mu: float
    area_sigma: float
    y_mu: float
    y_sigma: float
    side: float = 224.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: not finite, a negative deviation, or a side that is not above zero.
        """
        numbers = self.area_mu, self.area_sigma, self.y_mu, self.y_sigma, self.side
        if not all(map(math.isfinite, numbers)) or min(self.area_sigma, self.y_sigma) < 0 or self.side <= 0:
            raise ValueError(f"expected finite numbers, deviations >= 0 and side > 0, got {self}")


COCO = Discs(area_mu=7.5060, area_sigma=1.2848, y_mu=116.0759, y_sigma=47.5054)
"""Fitted by the authors on 8000 images of COCO (100 a class) at 224 x 224; the median radius is 24 pixels."""


def variable_occlusion(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    discs: int = 784,
    distribution: Discs = COCO,
    soften: float = 10.0,
    share: float = 0.1,
    score: Score = logit,
    erase: Eraser = "blur",
    seed: int = 0,
    chunk: int = 64,
) -> Saliency:
    """Return the smallest of the discs that hide the score best, as a cone: 1 at its center, 0 from its radius R on.

    Of `discs` random discs, the `share` behind which the score is lowest; of these, the one with the smallest radius.
    S(u) = max(0, 1 - |u - c| / R), so that the map's `peak` is the center c, the paper's point, and S >= t the disc of
    radius (1 - t) R. (b, 1, h, w), in [0, 1]. See `smallest_disc` for the settings, errors and what differs.

    Costs `discs` + 1 forwards an image, `chunk` hidden images at a time.

    *Differs:* the paper takes the point alone and has no map.
    """
    found = smallest_disc(
        classifier,
        x,
        y,
        discs=discs,
        distribution=distribution,
        soften=soften,
        share=share,
        score=score,
        erase=erase,
        seed=seed,
        chunk=chunk,
    )
    away = distance(found, (x.shape[2], x.shape[3]))
    return (1 - away / found[:, 2].view(-1, 1, 1)).clamp(min=0)[:, None].to(x.dtype)


def smallest_disc(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    discs: int = 784,
    distribution: Discs = COCO,
    soften: float = 10.0,
    share: float = 0.1,
    score: Score = logit,
    erase: Eraser = "blur",
    seed: int = 0,
    chunk: int = 64,
) -> Float[Tensor, "b 3"]:
    """Return x, y and radius, in pixels, of the smallest of the discs that hide the score best; x, y is the point.

    Discs are drawn from `distribution` (see `draw`) with `seed`, the same for every image of a size, and their edges
    softened by a Gaussian of `soften` pixels of a 224 x 224 image, scaled by sqrt(h w) / 224 to others. `score` is the
    logit, as in all of the supplement's baselines; what is hidden shows `erase`. In float64; (j + 0.5, i + 0.5) is the
    center of the pixel in row i and column j, as for `maps.peak`.

    *Differs:* centers are brought into the image and to the nearest pixel center.

    Raises:
        ValueError: fewer than one disc, a share outside (0, 1], a negative softening, or a chunk below one.
        LookupError: an unknown eraser.
    """
    if discs < 1 or not 0 < share <= 1 or soften < 0 or chunk < 1:
        raise ValueError(
            "expected discs >= 1, share in (0, 1], soften >= 0 and chunk >= 1, "
            f"got discs={discs}, share={share}, soften={soften}, chunk={chunk}"
        )
    with torch.no_grad():
        y = check_labels(classifier(x), y)
        size = (x.shape[2], x.shape[3])
        drawn, sigma = draw(distribution, discs, size, seed=seed).to(x.device), soften * scale(size)

        def masks(numbers: Tensor) -> Saliency:
            return soft(drawn[numbers].to(x.dtype), size, sigma)

        s = behind(classifier, x, y, discs, masks, score=score, erase=erase, chunk=chunk)
        return drawn[smallest(s, drawn[:, 2], share)]


def smallest(s: Float[Tensor, "n b"], radius: Float[Tensor, " n"], share: float) -> Int[Tensor, " b"]:
    """Return the number of the smallest disc among the `share` (at least one) with the lowest scores of each image."""
    lowest = s.argsort(dim=0, stable=True)[: max(1, round(share * len(s)))]
    return lowest.gather(0, radius[lowest].argmin(0, keepdim=True))[0]


def draw(distribution: Discs, count: int, size: tuple[int, int], *, seed: int = 0) -> Float[Tensor, "n 3"]:
    """Return x, y and radius of random discs for images of `size` = (height, width), in pixels.

    Areas scale with the image's area, y with its height; x is uniform over its width. Centers are clamped to the image
    and lie on pixel centers. From a generator of its own on the CPU, in float64.
    """
    (h, w), generator = size, torch.Generator().manual_seed(seed)
    area, down = torch.randn(2, count, generator=generator, dtype=torch.float64)
    across = torch.rand(count, generator=generator, dtype=torch.float64) * w
    A = (distribution.area_mu + distribution.area_sigma * area).exp()
    R = (A / math.pi).sqrt() * scale(size, distribution.side)
    down = (distribution.y_mu + distribution.y_sigma * down) * h / distribution.side
    return torch.stack([across.floor().clamp(0, w - 1) + 0.5, down.floor().clamp(0, h - 1) + 0.5, R], 1)


def soft(discs: Float[Tensor, "n 3"], size: tuple[int, int], sigma: float) -> Float[Tensor, "n 1 h w"]:
    """Return the masks of discs (x, y, radius), 1 inside, with edges softened by a Gaussian of `sigma` pixels.

    A disc goes on beyond the border, so the border softens nothing.
    """
    reach = math.ceil(4 * sigma)
    hard = (distance(discs, size, reach) <= discs[:, 2].view(-1, 1, 1)).to(discs.dtype)
    down, across = (smoothing(n, sigma, reach, discs) for n in size)
    return (down @ hard @ across.T)[:, None]


def smoothing(length: int, sigma: float, reach: int, like: Tensor) -> Float[Tensor, "_n _m"]:
    """Return the matrix that smooths a line of `length` pixels, given with `reach` more on each side.

    The Gaussian of `maps.blur`; for large kernels a product of matrices is many times faster than a convolution.
    """
    to, of = (torch.arange(n, device=like.device) for n in (length, length + 2 * reach))
    away = of - reach - to[:, None]
    weights = torch.exp(-0.5 * (away.to(like.dtype) / (sigma or 1.0)) ** 2) * (away.abs() <= reach)
    return weights / weights.sum(1, keepdim=True)


def distance(discs: Float[Tensor, "n 3"], size: tuple[int, int], margin: int = 0) -> Float[Tensor, "n _h _w"]:
    """Return how far each pixel's center is from the disc's; `margin` adds pixels around the image."""
    rows, columns = (torch.arange(-margin, n + margin, device=discs.device) + 0.5 for n in size)
    down, across = rows - discs[:, 1, None], columns - discs[:, 0, None]
    return torch.hypot(down[:, :, None], across[:, None, :])


def fit(areas: Float[Tensor, " n"], heights: Float[Tensor, " n"], *, side: float = 224.0) -> Discs:
    """Fit the distribution of discs to annotated images: maximum likelihood, expressed at `side` x `side` pixels.

    One number each an image and class: `areas`, the mean area of the class's instances as a share of the image, and
    `heights`, the mean center y as a share of its height; `of_boxes` and `of_instances` give both.

    Raises:
        ValueError: fewer than two images, lists of different lengths, or shares outside (0, 1] (areas) and [0, 1].
    """
    if len(areas) != len(heights) or len(areas) < 2:
        raise ValueError(f"expected areas and heights of at least two images, got {len(areas)} and {len(heights)}")
    areas, heights = areas.double(), heights.double()
    if not bool(((areas > 0) & (areas <= 1) & (heights >= 0) & (heights <= 1)).all()):
        raise ValueError("expected areas in (0, 1] and heights in [0, 1]; divide pixels by the image's area and height")
    logs, centers = (areas * side**2).log(), heights * side
    spreads = float(logs.std(correction=0)), float(centers.std(correction=0))
    return Discs(float(logs.mean()), spreads[0], float(centers.mean()), spreads[1], side)


def of_boxes(boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Float[Tensor, "2"]:
    """Return the mean area and mean center y of one image's boxes, as shares of an image of `size` = (height, width).

    Raises:
        ValueError: no box.
    """
    if len(boxes) == 0:
        raise ValueError("expected at least one box, got none; leave out images without objects")
    x0, y0, x1, y1 = boxes.double().unbind(1)
    return torch.stack([((x1 - x0) * (y1 - y0)).mean() / (size[0] * size[1]), (y0 + y1).mean() / (2 * size[0])])


def of_instances(instances: Int[Tensor, "h w"]) -> Float[Tensor, "2"]:
    """Return the mean area and mean center y of one image's instances, as shares of the image.

    An instance is a number of its own in the mask, 0 is background and 255 is ignored; its center is its centroid.

    Raises:
        ValueError: no instance.
    """
    height, width = instances.shape
    numbers = [int(number) for number in torch.unique(instances) if number not in (0, 255)]
    if not numbers:
        raise ValueError("expected at least one instance, got none; leave out images without objects")
    rows = [(instances == number).nonzero()[:, 0].double() + 0.5 for number in numbers]
    area = sum(len(row) for row in rows) / (len(rows) * height * width)
    return torch.tensor([area, float(torch.stack([row.mean() for row in rows]).mean()) / height], dtype=torch.float64)
