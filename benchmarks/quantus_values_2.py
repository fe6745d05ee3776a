"""Quantus's Max-Sensitivity and Infidelity on a tiny network, for tests/test_max_sensitivity.py and test_infidelity.py.

Quantus pulls opencv-python over the headless one, so it runs in an environment of its own; its values are committed:

    python -m venv quantus-env && quantus-env/bin/pip install quantus torch torchvision
    quantus-env/bin/python benchmarks/quantus_values_2.py tests/data/quantus_faithful2.json
"""

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import quantus
import torch
from torch import Tensor, nn

Array: TypeAlias = np.ndarray[Any, Any]

SHAPE, CLASSES, HIDDEN, LABELS = (2, 3, 8, 8), 3, 5, (1, 2)
SAMPLES, RADIUS = 10, 0.2
FREQUENCIES = {"images": 1.7, "first": 0.9, "second": 2.3}


def wave(shape: Sequence[int], frequency: float) -> Array:
    """Return sin(frequency n), n = 1, 2, ..., in an array of a shape."""
    return np.sin(frequency * np.arange(1, np.prod(shape) + 1)).reshape(shape)


class Tiny(nn.Module):
    """Logits = second @ tanh(first @ pixels)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.from_numpy(wave((HIDDEN, 3 * 8 * 8), FREQUENCIES["first"]) / 8))
        self.second = nn.Parameter(torch.from_numpy(wave((CLASSES, HIDDEN), FREQUENCIES["second"])))

    def forward(self, x: Tensor) -> Tensor:
        return (x.double().flatten(1) @ self.first.T).tanh() @ self.second.T


def explain(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> Array:
    """Return the gradient's mean over the colors, as (b, 1, h, w)."""
    x = torch.as_tensor(np.asarray(inputs), dtype=torch.float64).requires_grad_()
    logits = model(x).gather(1, torch.as_tensor(targets)[:, None])
    return torch.autograd.grad(logits.sum(), x)[0].mean(1, keepdim=True).numpy()


def shared_noise() -> Callable[..., Array]:
    """Return Quantus's perturbation with one noise for all images, drawn as sightline draws it."""
    generator = torch.Generator().manual_seed(0)

    def perturb(arr: Array, indices: Any = None, **_: Any) -> Array:
        noise = RADIUS * (2 * torch.rand(SHAPE[1:], generator=generator, dtype=torch.float64) - 1)
        return arr + noise.flatten().numpy()

    return perturb


def max_sensitivity(
    model: nn.Module, x: Array, y: Array, a: Array, explained: Callable[..., Array] = explain, **settings: Any
) -> Sequence[float]:
    """Run Quantus's metric, numpy seeded."""
    np.random.seed(0)
    metric = quantus.MaxSensitivity(nr_samples=SAMPLES, disable_warnings=True, **settings)
    return metric(model=model, x_batch=x, y_batch=y, a_batch=a, explain_func=explained, channel_first=True)


def infidelity(model: nn.Module, x: Array, y: Array, a: Array, side: int, repeats: int = 1) -> Sequence[float]:
    """Run Quantus's metric."""
    metric = quantus.Infidelity(perturb_patch_sizes=[side], n_perturb_samples=repeats, disable_warnings=True)
    return metric(model=model, x_batch=x, y_batch=y, a_batch=a, channel_first=True)


def plain(values: Sequence[float]) -> list[float | None]:
    """Return numbers as JSON has them: None for what is not a number."""
    return [float(value) if np.isfinite(value) else None for value in values]


def main() -> None:
    """Write the file that is named on the command line."""
    warnings.simplefilter("ignore")
    model, y = Tiny().eval(), np.array(LABELS)
    x = (wave(SHAPE, FREQUENCIES["images"]) + 1) / 2
    a = explain(model, x, y)
    zero = np.stack([np.zeros_like(a[0]), a[1]])
    values = {
        "max_sensitivity": max_sensitivity(model, x, y, a, perturb_func=shared_noise()),
        "max_sensitivity, noise of its own": max_sensitivity(model, x, y, a, lower_bound=RADIUS),
        "max_sensitivity, second image alone": max_sensitivity(model, x[1:], y[1:], a[1:], lower_bound=RADIUS),
        "max_sensitivity, first map zero": max_sensitivity(
            model, x, y, zero, explained=lambda *_, **__: zero, lower_bound=RADIUS
        ),
        "infidelity, whole image": infidelity(model, x, y, a, side=8),
        "infidelity, patches of 4": infidelity(model, x, y, a, side=4),
        "infidelity, patches of 4, ten times": infidelity(model, x, y, a, side=4, repeats=10),
    }
    table = {
        "made by": "benchmarks/quantus_values_2.py",
        "versions": {name: version(name) for name in ("quantus", "torch", "numpy")},
        "network": "logits = second @ tanh(first @ pixels); images = (wave + 1) / 2; first = wave / 8; second = wave",
        "wave": "sin(frequency n), n = 1, 2, ..., in row-major order",
        "shapes": {"images": SHAPE, "first": (HIDDEN, 3 * 8 * 8), "second": (CLASSES, HIDDEN)},
        "frequencies": FREQUENCIES,
        "labels": LABELS,
        "map": "mean over the colors of the label's logit's gradient",
        "samples": SAMPLES,
        "radius": RADIUS,
        "values": {name: plain(found) for name, found in values.items()},
    }
    Path(sys.argv[1]).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
