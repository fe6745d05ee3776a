"""What Quantus gives for a tiny network: reference values for `tests/data/quantus.json`.

Quantus stays out of the project's environment. Run in one of its own; the tests rebuild the inputs by the recipe that
stands in the file:

    quantus-env/bin/python benchmarks/quantus_values.py --out tests/data/quantus.json
"""

import argparse
import json
import logging
import random
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import quantus
import torch
from torch import Tensor, nn

RECIPE = {
    "generator": "numpy.random.default_rng(seed), drawn in this order, float64 then rounded to float32",
    "weights": "seed 0: conv (4, ch, 3, 3) and its bias (4,), head (3, 4 size size), all standard normal",
    "network": "conv 3x3 with padding 1, ReLU, flattened, head without bias, divided by 2 size; logits of 3 classes",
    "images": "seed 1: uniform (6, ch, size, size); `zero`: pixel (0, 0) of every channel set to 0",
    "maps": "seed 2: uniform (6, 1, size, size)",
    "labels": "those that the network predicts",
}


class Tiny(nn.Module):
    """A convolution and a linear head on all of its pixels."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.size = size
        self.conv, self.head = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(4 * size * size, 3, bias=False)
        for values in (self.conv.weight, self.conv.bias, self.head.weight):
            values.data = torch.from_numpy(rng.standard_normal(tuple(values.shape)).astype(np.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.conv(x).relu().flatten(1)) / (2 * self.size)
        return logits


def inputs(channels: int, size: int, zero: bool) -> dict[str, Any]:
    """Return the arguments that all metrics take."""
    x = np.random.default_rng(1).random((6, channels, size, size)).astype(np.float32)
    a = np.random.default_rng(2).random((6, 1, size, size)).astype(np.float32)
    if zero:
        x[:, :, 0, 0] = 0
    model = Tiny(channels, size).eval()
    with torch.no_grad():
        y = model(torch.from_numpy(x)).argmax(1).numpy()
    return {"model": model, "x_batch": x, "y_batch": y, "a_batch": a}


def gradients(model: nn.Module, inputs: Any, targets: Any, **settings: Any) -> Any:
    """Return the largest absolute gradient over the channels."""
    x = torch.as_tensor(inputs, dtype=torch.float32).requires_grad_()
    logits = model(x)
    index = torch.as_tensor(np.asarray(targets)).long()
    (gradient,) = torch.autograd.grad(logits.gather(1, index[:, None]).sum(), x)
    return gradient.abs().amax(1, keepdim=True).numpy()


def values(name: str, channels: int, size: int, zero: bool, settings: dict[str, Any], extra: Any = None) -> Any:
    """Return one metric's numbers, or what it raised."""
    np.random.seed(0)
    random.seed(0)
    torch.manual_seed(0)
    about = {"metric": name, "channels": channels, "size": size, "zero": zero, "settings": settings}
    try:
        metric = getattr(quantus, name)(**settings, disable_warnings=True)
        found = metric(**inputs(channels, size, zero), **(extra or {}))
    except Exception as error:
        return {**about, "raised": f"{type(error).__name__}: {str(error)[:120]}"}
    return {**about, "values": plain(found)}


def plain(value: Any) -> Any:
    """Return arrays and numpy numbers as lists and floats."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    return float(value) if isinstance(value, np.number | np.bool_ | bool) else value


def masks(channels: int, size: int) -> dict[str, Any]:
    """Return a box of the object for the pointing game."""
    s = np.zeros((6, 1, size, size), dtype=bool)
    s[:3, 0, 4:20, 4:20], s[3:, 0, :6, :6] = True, True
    return {"s_batch": s}


def main() -> None:
    """Write the values of all metrics."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("tests/data/quantus.json"))
    given = options.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    explain = {"explain_func": gradients}
    rows = [
        values("PixelFlipping", 1, 24, True, {"features_in_step": 16}),
        values("PixelFlipping", 1, 24, True, {"features_in_step": 16, "return_auc_per_sample": True}),
        values("PixelFlipping", 1, 24, False, {"features_in_step": 16}),
        values("PixelFlipping", 3, 24, True, {"features_in_step": 48}),
        values("PixelFlipping", 3, 24, True, {"features_in_step": 16}),
        *(
            values("RegionPerturbation", 3, 24, True, {"patch_size": 4, "regions_evaluation": 10, "order": order})
            for order in ("morf", "lerf")
        ),
        values("RegionPerturbation", 3, 24, False, {"patch_size": 4, "regions_evaluation": 10}),
        values("RegionPerturbation", 3, 22, True, {"patch_size": 4, "regions_evaluation": 10}),
        values("ROAD", 1, 24, False, {"percentages": [10, 30, 50, 70, 90], "noise": 0.0}),
        values("ROAD", 1, 24, False, {"percentages": [10, 30, 50, 70, 90], "noise": 0.01}),
        values("ROAD", 3, 24, False, {"percentages": [10, 30, 50, 70, 90], "noise": 0.0}),
        values("PointingGame", 3, 24, False, {}, masks(3, 24)),
        values("MaxSensitivity", 3, 24, False, {"nr_samples": 10, "lower_bound": 0.2}, explain),
        values("Infidelity", 3, 24, False, {"perturb_patch_sizes": [4], "n_perturb_samples": 10}, explain),
    ]
    fill = quantus.functions.perturb_func.noisy_linear_imputation
    image, map_ = inputs(1, 24, False)["x_batch"][0], inputs(1, 24, False)["a_batch"][0]
    order = np.argsort(-map_.ravel(), kind="stable")
    imputed = {
        str(share): plain(fill(arr=image.copy(), indices=order[: round(share * 576)], noise=0.0)[0])
        for share in (0.1, 0.5, 0.9)
    }
    written = {
        "quantus": version("quantus"),
        "torch": torch.__version__,
        "recipe": RECIPE,
        "rows": rows,
        "noisy_linear_imputation": imputed,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(written) + "\n")
    for row in rows:
        print(
            row["metric"],
            row["channels"],
            row["size"],
            row["settings"],
            str(row.get("values", row.get("raised")))[:200],
        )


if __name__ == "__main__":
    main()
