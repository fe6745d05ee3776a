"""Grad-CAM against its peers, in one run: ResNet-50, 224 x 224, random weights.

Prints seconds, and ratios to one forward pass (fp32, inference mode). Run with `make bench`.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable

import torch
import torchvision
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

import sightline
from sightline.methods import grad_cam


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the fastest of several runs, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Time Grad-CAM here, in captum and in pytorch-grad-cam."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    model = torchvision.models.resnet50(weights=None).eval()
    classifier = sightline.wrap(model, normalization="imagenet")
    x, y = torch.rand(given.batch, 3, 224, 224), torch.zeros(given.batch, dtype=torch.long)

    def forward() -> object:
        with torch.inference_mode():
            return model(x)

    peer = GradCAM(model, [model.layer4])
    targets = [ClassifierOutputTarget(0)] * given.batch
    captum = LayerGradCam(model, model.layer4)
    works: dict[str, Callable[[], object]] = {
        "one forward": forward,
        "sightline": lambda: grad_cam(classifier, x, y),
        "captum": lambda: captum.attribute(x, y),
        "pytorch-grad-cam": lambda: peer(x, targets),
    }
    times = {name: seconds(work, given.repeats) for name, work in works.items()}
    for name, spent in times.items():
        print(f"{name:18} {spent:7.3f} s  {spent / times['one forward']:5.2f} forwards")
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(json.dumps({"batch": given.batch, "seconds": times, **about}))


if __name__ == "__main__":
    main()
