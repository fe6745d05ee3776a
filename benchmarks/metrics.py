"""The metrics against published schemes and Quantus, in one run: seconds, ratios, and that the values are equal.

Box accuracy and PxAP against the published scheme (`_boxes.py`), one thread. With Quantus installed, in an environment
of its own (it pulls another OpenCV): insertion and deletion against its pixel flipping, and the pointing game. `exact`
and `fast` are `speed.fast` in float32 and bfloat16. Writes JSON and a table:

    .venv/bin/python benchmarks/metrics.py --out benchmarks/metrics
    pip install quantus . && python benchmarks/metrics.py --network resnet50 --out benchmarks/metrics
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import _boxes
import numpy as np
import torch

import sightline
from sightline.classifier import Classifier, probability
from sightline.data import Sample, collate
from sightline.metrics import Case, pointing_game
from sightline.metrics._insertion import rank, revealed
from sightline.speed import fast

SIDE = 192
"""Pixel flipping takes whole pixels of three colors only where its step divides the pixels: not at 224."""

GOALS = {"MaxBoxAccV2": 10, "PxAP": 5, "pointing game": 5, "deletion, exact": 2.5, "deletion, fast": 5}


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the least wall time of several runs."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def row(metric: str, maps: str, ours: float, theirs: float, equal: bool | float) -> dict[str, Any]:
    """Return one line of the table."""
    return {"metric": metric, "maps": maps, "seconds": ours, "peer": theirs, "ratio": theirs / ours, "equal": equal}


def boxes() -> list[dict[str, Any]]:
    """Time box accuracy and PxAP on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = [*_boxes.box_accuracy(), *_boxes.pxap()]
    torch.set_num_threads(threads)
    return [row(one["metric"], one["maps"], one["seconds"], one["published"], one["equal"]) for one in found]


def deletion(network: str, steps: int, chunk: int | None) -> list[dict[str, Any]]:
    """Time a deletion game of one image against pixel flipping: seconds a step."""
    import quantus

    torch.manual_seed(0)
    plain = built(network)
    side = 96 if network == "mini_resnet" else SIDE
    classifier = sightline.wrap(plain, normalization="none", size=(side, side))
    exact, low = fast(classifier), fast(classifier, precision="bf16")
    x, a, y = torch.rand(1, 3, side, side), torch.rand(1, 1, side, side), torch.tensor([3])
    x[:, :, 0, 0] = 0.0  # Quantus' black is the darkest value of the image
    places, black = rank(a), torch.zeros_like(x)
    flipping = quantus.PixelFlipping(features_in_step=3 * side * side // steps, disable_warnings=True)

    def ours(classifier: Classifier) -> Any:
        with torch.inference_mode():
            only = range(1, steps + 1)
            curve = revealed(classifier, x, black, y, places, steps=steps, score=probability, chunk=chunk, only=only)
        return curve.numpy()

    def theirs() -> Any:
        return np.asarray(flipping(plain, x.numpy(), y.numpy(), a.numpy()))

    kinds = {"as it is": classifier, "exact": exact, "fast": low}
    peer = seconds(theirs) / steps
    on = f"{network} at {side}, a step"
    return [
        row(
            f"deletion, {kind}",
            on,
            seconds(partial(ours, one)) / steps,
            peer,
            float(np.abs(ours(one) - theirs()).max()),
        )
        for kind, one in kinds.items()
    ]


def built(network: str) -> torch.nn.Module:
    """Return a network with random weights whose probabilities differ from image to image."""
    if network == "mini_resnet":
        from sightline.models import MiniResNet

        model: torch.nn.Module = MiniResNet(20)
    else:
        import torchvision

        model = torchvision.models.get_model(network, weights=None)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight *= 20
    return model.eval()


def pointing(images: int) -> list[dict[str, Any]]:
    """Time the pointing game on given maps: seconds an image."""
    import quantus

    generator = torch.Generator().manual_seed(0)
    x, a = torch.rand(images, 3, 224, 224, generator=generator), torch.rand(images, 1, 224, 224, generator=generator)
    inside = torch.rand(images, 224, 224, generator=generator) > 0.5
    samples = [Sample(f"i{i}", x[i], 0, mask=inside[i].long()) for i in range(images)]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 224 * 224, 2))
    one = pointing_game(tolerance=0.0, ties="any", average="image")
    y = torch.zeros(images, dtype=torch.long)
    logits = torch.zeros(images, 2)

    def ours() -> torch.Tensor:
        return one(Case(Classifier(model, "0"), x, y, a, a, lambda *_: a, collate(samples), logits))[:, 0] / 100

    game = quantus.PointingGame(disable_warnings=True)

    def theirs() -> Any:
        return np.asarray(game(model, x.numpy(), y.numpy(), a.numpy(), s_batch=inside[:, None].numpy()))

    same = bool(np.array_equal(ours().numpy() > 0, theirs().astype(bool)))
    return [row("pointing game", f"{images} maps of 224 x 224", seconds(ours) / images, seconds(theirs) / images, same)]


def installed(package: str) -> str:
    """Return the version of a package, or that it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the rows in Markdown."""
    told = ", ".join(f"{key} {value}" for key, value in about.items())
    lines = ["# Metrics against their peers", "", f"{told}.", ""]
    lines += [
        "| metric | on | ours, ms | peer, ms | ratio | goal | equal values |",
        "| :-- | :-- | --: | --: | --: | --: | :-- |",
    ]
    for one in rows:
        equal = one["equal"] if isinstance(one["equal"], bool) else f"up to {one['equal']:.1e}"
        times = f"{1e3 * one['seconds']:.2f} | {1e3 * one['peer']:.2f} | {one['ratio']:.1f}"
        lines.append(f"| {one['metric']} | {one['maps']} | {times} | {GOALS.get(one['metric'], '')} | {equal} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what can run here, and write it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--network", nargs="+", default=["resnet50", "resnet18", "mini_resnet"])
    options.add_argument("--steps", type=int, default=24)
    options.add_argument("--chunk", type=int, help="as many images at a time; as the device likes by default")
    options.add_argument("--images", type=int, default=16)
    options.add_argument("--out", type=Path, default=Path("out/benchmarks/metrics"))
    given = options.parse_args()
    rows = boxes()
    if installed("quantus") != "missing":
        rows += [line for name in given.network for line in deletion(name, given.steps, given.chunk)]
        rows += pointing(given.images)
    packages = ("torch", "numpy", "opencv-python-headless", "quantus")
    about = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()}
    about |= {name: installed(name) for name in packages}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(rows, about))
    print(table(rows, about))


if __name__ == "__main__":
    main()
