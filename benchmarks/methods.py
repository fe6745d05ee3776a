"""Every method against the peers that have it, in one run: seconds, and ratios to one forward pass.

`exact` is fp32 on the classifier as `wrap` makes it; `fast` is the same call on `speed.fast(precision="bf16")`, with
the correlation of its map with the exact one. (`speed.py` beside this file measures goals, on larger networks.) One
forward is fp32, channels-last, inference mode. Costly methods run with the same reduced settings here and in the peers
(the column says which). Writes JSON and a table:

    .venv/bin/python benchmarks/methods.py --network resnet18 --batch 2 --out benchmarks/methods
"""

import argparse
import copy
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import captum.attr
import pytorch_grad_cam
import torch
import torchcam.methods
import torchvision
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

import sightline
from sightline import speed
from sightline.classifier import Classifier
from sightline.methods import METHODS

REDUCED: Mapping[str, Mapping[str, Any]] = {
    "smooth_grad": {"samples": 8},
    "var_grad": {"samples": 8},
    "smooth_grad_squared": {"samples": 8},
    "integrated_gradients": {"steps": 8},
    "calm_integrated_gradients": {"steps": 8},
    "occlusion": {"size": 32.0, "grid": 7},
    "variable_occlusion": {"discs": 49},
    "rise": {"samples": 64},
    "lime": {"samples": 32},
    "gradient_shap": {"samples": 8},
    "opti_cam": {"steps": 10},
    "meaningful_perturbation": {"steps": 10, "start": "half"},
    "layer_perturbation": {"steps": 10},
    "extremal_perturbation": {"steps": 10},
}
"""What is set lower than the default, so that the whole run takes minutes."""

CAPTUM = {
    "gradient": ("Saliency", {}),
    "input_x_gradient": ("InputXGradient", {}),
    "guided_backprop": ("GuidedBackprop", {}),
    "deconvnet": ("Deconvolution", {}),
    "integrated_gradients": ("IntegratedGradients", {"n_steps": 8}),
    "occlusion": ("Occlusion", {"sliding_window_shapes": (3, 32, 32), "strides": (3, 32, 32)}),
}
NOISE = {"smooth_grad": "smoothgrad", "var_grad": "vargrad", "smooth_grad_squared": "smoothgrad_sq"}
GRAD_CAM = {
    "grad_cam": "GradCAM",
    "grad_cam_pp": "GradCAMPlusPlus",
    "x_grad_cam": "XGradCAM",
    "layer_cam": "LayerCAM",
    "hires_cam": "HiResCAM",
    "eigen_cam": "EigenCAM",
    "full_grad": "FullGrad",
    "score_cam": "ScoreCAM",
    "ablation_cam": "AblationCAM",
}
TORCH_CAM = {
    "cam": "CAM",
    "grad_cam": "GradCAM",
    "grad_cam_pp": "GradCAMpp",
    "x_grad_cam": "XGradCAM",
    "layer_cam": "LayerCAM",
    "score_cam": "ScoreCAM",
}


class Normalized(nn.Module):
    """The network with ImageNet's normalization in front: what the peers are given."""

    def __init__(self, model: nn.Module, classifier: Classifier) -> None:
        super().__init__()
        self.model, self.classifier = model, classifier

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(self.classifier.normalize(x))
        return logits


def peers(
    name: str,
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    y: Tensor,
    reshape: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Callable[[], object]]:
    """Return what the other libraries call this method, ready to run; `reshape` lays tokens on the image."""
    works: dict[str, Callable[[], object]] = {}
    if name in CAPTUM:
        kind, settings = CAPTUM[name]
        explainer = getattr(captum.attr, kind)(model)
        works["captum"] = lambda: explainer.attribute(x.clone().requires_grad_(), target=y, **settings)
    if name in NOISE:
        noisy = captum.attr.NoiseTunnel(captum.attr.Saliency(model))
        works["captum"] = lambda: noisy.attribute(
            x.clone().requires_grad_(), target=y, nt_type=NOISE[name], nt_samples=8, stdevs=0.15
        )
    if name == "grad_cam":
        layered = captum.attr.LayerGradCam(model, layer)
        works["captum"] = lambda: layered.attribute(x, y)
    if name == "guided_grad_cam":
        guided = captum.attr.GuidedGradCam(model, layer)
        works["captum"] = lambda: guided.attribute(x.clone().requires_grad_(), y)
    if name in GRAD_CAM:
        targets = [ClassifierOutputTarget(int(label)) for label in y]
        works["pytorch-grad-cam"] = lambda: grad_cam_peer(GRAD_CAM[name], model, layer, x, targets, reshape)
    if name in TORCH_CAM:
        works["torch-cam"] = lambda: torch_cam_peer(TORCH_CAM[name], model, layer, x, y)
    return works


def grad_cam_peer(
    kind: str,
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    targets: list[Any],
    reshape: Callable[[Tensor], Tensor] | None,
) -> object:
    """Run pytorch-grad-cam."""
    with getattr(pytorch_grad_cam, kind)(model, [layer], reshape_transform=reshape) as peer:
        peer.batch_size = 32
        return peer(x.clone(), targets)


def torch_cam_peer(kind: str, model: nn.Module, layer: nn.Module, x: Tensor, y: Tensor) -> object:
    """Run torch-cam."""
    extra = {"fc_layer": "model.fc"} if kind == "CAM" else {}
    with getattr(torchcam.methods, kind)(model, layer, **extra) as peer:
        return peer(y.tolist(), model(x.clone().requires_grad_()))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the fastest of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def likeness(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two sets of maps."""
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def main() -> None:
    """Time every method that suits the network, here and elsewhere."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--network", default="resnet18")
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--method", action="append", help="only these")
    options.add_argument("--out", type=Path, default=Path("out/benchmarks/methods"))
    given = options.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model = torchvision.models.get_model(given.network, weights=None).eval()
    classifier = sightline.wrap(model, normalization="imagenet")
    x, y = torch.rand(given.batch, 3, 224, 224), torch.arange(given.batch)
    wrapped = Normalized(model, classifier).eval()
    layer = wrapped.model.get_submodule(classifier.layer)
    fast = speed.fast(classifier, precision="bf16")
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward() -> None:
        with torch.inference_mode():
            last(x.contiguous(memory_format=torch.channels_last))

    forward()
    one = seconds(forward, 5)
    rows: list[dict[str, Any]] = []
    for name, entry in METHODS.items():
        if "attention" in entry.needs or entry.control or (given.method and name not in given.method):
            continue
        settings = REDUCED.get(name, {})
        rows.append(timed(name, settings, classifier, fast, wrapped, layer, x, y, given.repeats))
        print(line(rows[-1], one), flush=True)
    about = {
        "network": given.network,
        "batch": given.batch,
        "forward": one,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {p: version(p) for p in ("torch", "torchvision", "captum", "grad-cam", "torchcam", "sightline")},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(rows, one, about))


def timed(
    name: str,
    settings: Mapping[str, Any],
    classifier: Classifier,
    fast: Classifier,
    wrapped: nn.Module,
    layer: nn.Module,
    x: Tensor,
    y: Tensor,
    repeats: int,
) -> dict[str, Any]:
    """Return the times of one method in all columns."""
    method = METHODS[name].method

    def exact() -> Tensor:
        return method(classifier, x, y, **settings)

    def quick() -> Tensor:
        return method(fast, x, y, **settings)

    row: dict[str, Any] = {"method": name, "settings": dict(settings)}
    row["likeness"] = likeness(exact(), quick())
    row["exact"], row["fast"] = seconds(exact, repeats), seconds(quick, repeats)
    row["peers"] = {}
    for peer, work in peers(name, wrapped, layer, x, y).items():
        try:
            row["peers"][peer] = seconds(work, repeats)
        except Exception as error:
            row["peers"][peer] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return row


def line(row: Mapping[str, Any], one: float) -> str:
    """Return a row as text, in forwards."""
    others = {peer: shown(value, one) for peer, value in row["peers"].items()}
    return f"{row['method']:32} exact {row['exact'] / one:8.2f}  fast {row['fast'] / one:8.2f}  {others}"


def shown(value: float | str, one: float) -> str:
    """Return a time in forwards, or why there is none."""
    return value if isinstance(value, str) else f"{value / one:.2f}"


def table(rows: list[dict[str, Any]], one: float, about: Mapping[str, Any]) -> str:
    """Return all rows in Markdown."""
    names = ("captum", "pytorch-grad-cam", "torch-cam")
    head = (
        f"{about['network']}, {about['batch']} images of 224 x 224, random weights, {about['threads']} threads; "
        f"one forward takes {one:.3f} s. All columns in forwards; `r`: correlation of the fast map with the exact one."
    )
    lines = [head, "", f"| method | settings | exact | fast | r | {' | '.join(names)} |"]
    lines.append("| :-- | :-- | --: | --: | --: | --: | --: | --: |")
    for row in rows:
        settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items())
        others = " | ".join(shown(row["peers"][peer], one) if peer in row["peers"] else "" for peer in names)
        own = f"{row['exact'] / one:.2f} | {row['fast'] / one:.2f} | {row['likeness']:.3f}"
        lines.append(f"| {row['method']} | {settings} | {own} | {others} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
