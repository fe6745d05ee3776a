"""Box accuracy and PxAP against the published scheme, written plainly: seconds an image, and that the numbers agree.

The scheme of Choe et al. (CVPR 2020), from its description: 1,000 thresholds an image, for each the contours, a box
each and its overlaps; for PxAP two histograms over 1,000 thresholds an image. Both sides get the same prepared maps of
224 x 224. Times are processor seconds of one thread, the best of several runs.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/_boxes.py
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sightline.metrics._box_accuracy import Search, best_overlaps, evenly
from sightline.metrics._pxap import histogram_average_precision, histograms

SIZE = 224
BOXES = np.array([[40.0, 60.0, 140.0, 180.0], [100.0, 20.0, 120.0, 40.0]])
Floats = NDArray[np.float64]
Maps = NDArray[np.float32]


def cam(cells: int, seed: int) -> Maps:
    """Return a smooth map: random cells, resized bicubically."""
    generator = torch.Generator().manual_seed(seed)
    return unit(F.interpolate(torch.rand(1, 1, cells, cells, generator=generator), (SIZE, SIZE), mode="bicubic")[0, 0])


def gradient(seed: int) -> Maps:
    """Return a map as noisy as a gradient."""
    return unit(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).abs())


def unit(s: Tensor) -> Maps:
    """Scale a map to [0, 1]."""
    scaled: Maps = ((s - s.min()) / (s.max() - s.min())).numpy()
    return scaled


KINDS: dict[str, Callable[[int], Maps]] = {
    "CAM of 7 x 7": lambda seed: cam(7, seed),
    "CAM of 14 x 14": lambda seed: cam(14, seed),
    "gradient-like noise": gradient,
}


def published_overlaps(s: Maps, B: Floats, *, several: bool) -> Floats:
    """Return the best overlap at each of 1,000 thresholds, as the published scheme finds it."""
    h, w = s.shape
    image, boxes, counts = (s * 255).astype(np.uint8), list[NDArray[Any]](), list[int]()
    for eta in np.arange(0, 1, 0.001):
        marked = cv2.threshold(image, int(eta * np.max(image)), 255, cv2.THRESH_BINARY)[1]
        contours: Any = cv2.findContours(marked, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        if not several:
            contours = [max(contours, key=cv2.contourArea)]
        corners = [(x, y, min(x + a, w - 1), min(y + b, h - 1)) for x, y, a, b in map(cv2.boundingRect, contours)]
        boxes.append(np.array(corners))
        counts.append(len(corners))
    best = inclusive(np.concatenate(boxes), np.trunc(B)).max(1)
    return np.array([part.max() for part in np.split(best, np.cumsum(counts)[:-1])])


def inclusive(P: NDArray[Any], B: Floats) -> Floats:
    """Return the overlaps of boxes whose last pixels belong to them."""
    across = np.maximum(0, np.minimum(P[:, None, 2], B[None, :, 2]) - np.maximum(P[:, None, 0], B[None, :, 0]) + 1)
    down = np.maximum(0, np.minimum(P[:, None, 3], B[None, :, 3]) - np.maximum(P[:, None, 1], B[None, :, 1]) + 1)
    sizes = [(A[:, 2] - A[:, 0] + 1) * (A[:, 3] - A[:, 1] + 1) for A in (P, B)]
    overlap: Floats = across * down / (sizes[0][:, None] + sizes[1][None] - across * down)
    return overlap


def published_precision(maps: list[Maps], truth: list[NDArray[np.bool_]]) -> float:
    """Return PxAP of maps as the published scheme finds it, in [0, 1]."""
    edges = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])
    right, wrong = np.zeros(1002), np.zeros(1002)
    for s, inside in zip(maps, truth, strict=True):
        right += np.histogram(s[inside], edges)[0]
        wrong += np.histogram(s[~inside], edges)[0]
    hits, errors = right[::-1].cumsum(), wrong[::-1].cumsum()
    found = hits + errors > 0
    precision, recall = hits[found] / (hits + errors)[found], hits[found] / hits[-1]
    return float((precision[1:] * np.diff(recall)).sum() + precision[0] * recall[0])


def precision(s: Tensor, inside: Tensor) -> float:
    """Return PxAP of maps as `pxap` does, in [0, 1]."""
    positives, negatives = histograms(s, inside, torch.ones_like(inside), 1000).sum(0).chunk(2)
    return float(histogram_average_precision(positives, negatives))


def seconds(call: Callable[[], object], runs: int) -> float:
    """Return the least processor time of several runs.

    A batch of images comes and goes first, as in every evaluation: memory of maps then stays with the process.
    """
    torch.rand(16, 3, SIZE, SIZE)
    call()
    times: list[float] = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def box_accuracy(runs: int = 20) -> list[dict[str, Any]]:
    """Time the boxes of all thresholds of one map, ours against the published scheme."""
    rows: list[dict[str, Any]] = []
    for kind, make in KINDS.items():
        s, again = make(1), 1 if "noise" in kind else 5
        for several in (True, False):
            search = Search(evenly(1000), "all" if several else "largest", "official", "bicubic", 8)
            same = np.array_equal(best_overlaps(s, BOXES, search), published_overlaps(s, BOXES, several=several))
            ours = seconds(partial(best_overlaps, s, BOXES, search), again * runs // 5)
            theirs = seconds(partial(published_overlaps, s, BOXES, several=several), again)
            name = "MaxBoxAccV2" if several else "MaxBoxAcc"
            rows.append({"metric": name, "maps": kind, "seconds": ours, "published": theirs, "equal": same})
    return rows


def pxap(images: int = 16, runs: int = 20) -> list[dict[str, Any]]:
    """Time PxAP of some maps, ours against the published scheme; seconds are those of an image."""
    rows: list[dict[str, Any]] = []
    for kind, make in KINDS.items():
        maps = [make(seed) for seed in range(images)]
        s = torch.stack([torch.from_numpy(one) for one in maps])[:, None]
        inside = torch.rand(s[:, 0].shape, generator=torch.Generator().manual_seed(9)) < s[:, 0] / 2
        ours, published = partial(precision, s, inside), partial(published_precision, maps, list(inside.numpy()))
        same = bool(np.isclose(ours(), published(), rtol=0, atol=1e-12))
        mine, theirs = seconds(ours, runs) / images, seconds(published, runs) / images
        rows.append({"metric": "PxAP", "maps": kind, "seconds": mine, "published": theirs, "equal": same})
    return rows


def main() -> None:
    """Print all rows."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for row in [*box_accuracy(), *pxap()]:
        ratio = row["published"] / row["seconds"]
        print(
            f"{row['metric']:12} {row['maps']:20} {1e3 * row['seconds']:9.2f} ms {1e3 * row['published']:9.1f} ms "
            f"{ratio:6.1f} x  {'equal' if row['equal'] else 'DIFFERENT'}"
        )


if __name__ == "__main__":
    main()
