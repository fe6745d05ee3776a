"""Draw the picture of the README: three creatures, six methods, one map a cell."""

from pathlib import Path

import torch

import sightline
from sightline import viz
from sightline.datasets import creatures
from sightline.models import load

METHODS = ("gradient", "grad_cam", "layer_cam", "score_cam", "ablation_cam", "opti_cam")
SHOWN = (3, 11, 46)


def main() -> None:
    """Write docs/sightline.png."""
    classifier, dataset = load("creatures"), creatures("test", size=64)
    large = creatures("test", size=224)
    rows, titles = [], []
    for index in SHOWN:
        x = dataset[index].image[None]
        maps = [sightline.explain(classifier, x, method=name) for name in METHODS]
        photo = large[index].image
        shown = [torch.nn.functional.interpolate(one.saliency, photo.shape[1:], mode="bilinear")[0, 0] for one in maps]
        rows.append([photo, *(viz.overlay(photo, saliency.clamp(0, 1)) for saliency in shown)])
        titles.append(f"{maps[0].label()}\n{float(maps[0].scores[0]):.0%}")
    sheet = viz.grid(rows, columns=["image", *METHODS], titles=titles)
    Path("docs/sightline.png").write_bytes(viz.png(sheet))


if __name__ == "__main__":
    main()
