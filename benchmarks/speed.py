"""The goals of speed, on ResNet-50 and ViT-S: ours as it is, `speed.fast` exact and in bfloat16, and the peers.

Every time is the least of several runs. "One forward" is float32, channels-last, inference mode. Forwards and backwards
are counted by hooks, in images; a backward counts where it comes back to the first convolution. The floor is as many
forwards. Peers get the network as users have it. Score-CAM runs on a layer of 64 channels: its cost is one forward a
channel. Opti-CAM is a step, against the loop as users write it. Writes JSON and a table after every row, and goes on
where it was left; `--page` writes docs/speed.md from the JSON of this script and of `metrics.py`:

    .venv/bin/python benchmarks/speed.py --page docs/speed.md
"""

import argparse
import copy
import ctypes
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from methods import Normalized, peers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sightline
from sightline.classifier import Classifier, UnsuitedError
from sightline.maps import unit
from sightline.methods import METHODS
from sightline.speed import Prepared, fast

HERE = Path(__file__).parent
PEERS = ("captum", "pytorch-grad-cam", "torch-cam")
PACKAGES = ("torch", "torchvision", "timm", "captum", "grad-cam", "torchcam", "sightline")
FAMILY = ("grad_cam", "grad_cam_pp", "x_grad_cam", "layer_cam", "hires_cam")
LONG = 5.0
"""Seconds from which one run is enough."""
STEPS = 4
"""Steps of Opti-CAM from the difference of which one step's time follows."""


@dataclass(frozen=True)
class Row:
    """One method on one network."""

    network: str
    method: str
    batch: int = 4
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    layer: str | None = None

    @property
    def key(self) -> str:
        """The name of the row in the JSON."""
        return f"{self.network} {self.method}"


def rows() -> list[Row]:
    """Return all rows, the goals' first."""
    several = {"samples": 4}, {"steps": 4}
    found = [Row("resnet50", "score_cam", 1, {}, "relu")]
    for network in ("resnet50", "vit_small_patch16_224"):
        found += [Row(network, "opti_cam", 8)]
        found += [Row(network, name) for name in FAMILY]
        found += [Row(network, name) for name in ("gradient", "guided_backprop")]
        found += [Row(network, "smooth_grad", 1, several[0]), Row(network, "integrated_gradients", 1, several[1])]
    return [*found, Row("resnet50", "full_grad", 1)]


def built(name: str, device: str) -> nn.Module:
    """Return a network with random weights."""
    torch.manual_seed(0)
    if name.startswith("vit"):
        model = timm.create_model(name)
        for norm in model.modules():
            if isinstance(norm, nn.LayerNorm):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
    else:
        model = torchvision.models.get_model(name, weights=None)
    return model.eval().to(device)


def tokens(output: Tensor) -> Tensor:
    """Lay the tokens of a ViT on the image, for pytorch-grad-cam."""
    side = int((output.shape[1] - 1) ** 0.5)
    return output[:, 1:].transpose(1, 2).reshape(len(output), -1, side, side)


@dataclass(frozen=True)
class Clock:
    """How times are taken: which clock, how often, on what."""

    processor: bool
    repeats: int
    device: str

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the least time of several runs, after one more; of a long one, the only."""
        times: list[float] = []
        for _ in range(self.repeats + 1):
            start = self.now()
            work()
            times.append(self.now() - start)
            if times[0] > LONG:
                return times[0]
        return min(times[1:])

    def now(self) -> float:
        """Return the time when all that was asked for is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.processor else time.perf_counter()

    def peak(self, work: Callable[[], object]) -> float | None:
        """Return the megabytes that a run needs at most beyond what there was; None where nothing tells."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            work()
            return (resident("VmHWM") - before) / 2**10
        except (OSError, AttributeError):
            return None


def resident(name: str) -> float:
    """Return a line of what the kernel says of this process, in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1])


def counted(
    network: nn.Module, work: Callable[[], object], clock: Clock, *, batch: int
) -> tuple[tuple[float, float], float | None]:
    """Return how many forwards and full backwards an image takes, and the memory."""
    count = {"forward": 0.0, "backward": 0.0}

    def back(gradient: Tensor) -> None:
        count["backward"] += len(gradient)

    def enter(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(back)

    def leave(_: nn.Module, __: Any, output: Tensor) -> None:
        count["forward"] += len(output)

    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    handles = first.register_forward_hook(enter), network.register_forward_hook(leave)
    try:
        memory = clock.peak(work)
    finally:
        for handle in handles:
            handle.remove()
    return (count["forward"] / batch, count["backward"] / batch), memory


def naive(model: nn.Module, A: Tensor, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Run Opti-CAM as users write it: parameters ask for gradients, plain memory, `backward()`."""
    u = torch.full(A.shape[:2], 0.5, device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([u], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        S = (u.softmax(1)[:, :, None, None] * A).sum(1, keepdim=True)
        mask = unit(F.interpolate(S, x.shape[2:], mode="bilinear", align_corners=False))
        loss = -model(x * mask).gather(1, y[:, None]).sum()
        loss.backward()
        optimizer.step()
    return u.detach()


def measured(row: Row, clock: Clock) -> dict[str, Any]:
    """Return the times, counts, memory and differences of one row."""
    model = built(row.network, clock.device)
    normalization = "imagenet" if row.network.startswith("resnet") else None
    plain = sightline.wrap(model, normalization=normalization, layer=row.layer)
    quick = {"as it is": plain, "exact": fast(plain), "fast": fast(plain, precision="bf16")}
    x = torch.rand(row.batch, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(clock.device)
    y = torch.arange(row.batch, device=clock.device)
    step = row.method == "opti_cam"
    found: dict[str, Any] = {"network": row.network, "method": row.method, "batch": row.batch}
    found |= {"settings": dict(row.settings), "layer": plain.layer, "forward": forward(model, plain, x, clock)}

    def ours(classifier: Classifier, **more: Any) -> Tensor:
        return METHODS[row.method].method(classifier, x, y, **{**row.settings, **more})

    def spent(work: Callable[..., object]) -> float:
        """Return the time of a call; of a step where that is asked."""
        if not step:
            return clock.seconds(work)
        return (clock.seconds(partial(work, steps=1 + STEPS)) - clock.seconds(partial(work, steps=1))) / STEPS

    extra = {"steps": 2} if step else {}
    try:
        maps = {name: ours(one, **extra) for name, one in quick.items()}
    except UnsuitedError as error:
        return {**found, "unsuited": str(error)}
    found["seconds"] = {name: spent(partial(ours, one)) for name, one in quick.items()}
    both = {
        name: counted(one.model, partial(ours, one, **extra), clock, batch=row.batch) for name, one in quick.items()
    }
    found["counts"] = both["as it is"][0]
    found["memory"] = {name: memory for name, (_, memory) in both.items()}
    maps = {name: unit(map_) for name, map_ in maps.items()} if step else maps
    found["apart"] = {name: apart(maps[name], maps["as it is"]) for name in ("exact", "fast")}
    found["likeness"] = {name: likeness(maps[name], maps["as it is"]) for name in ("exact", "fast")}
    found["peers"] = others(row, model, plain, x, y, clock, spent)
    return found


def others(
    row: Row,
    model: nn.Module,
    plain: Classifier,
    x: Tensor,
    y: Tensor,
    clock: Clock,
    spent: Callable[[Callable[..., object]], float],
) -> dict[str, Any]:
    """Return time, counts and memory of the peers, or what they raised."""
    wrapped = Normalized(model, plain).eval()
    layer = wrapped.model.get_submodule(plain.layer)
    reshape = tokens if row.network.startswith("vit") else None
    works: dict[str, Callable[..., object]] = dict(peers(row.method, wrapped, layer, x, y, reshape))
    if row.method == "opti_cam":
        works["naive loop"] = partial(naive, wrapped, plain.features(x), x, y)
    found: dict[str, Any] = {}
    for name, work in works.items():
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            once = partial(work, steps=2) if row.method == "opti_cam" else work
            counts, memory = counted(model, once, clock, batch=row.batch)
            found[name] = {"counts": counts, "seconds": spent(work), "memory": memory}
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        model.zero_grad(set_to_none=True)
    return found


def forward(model: nn.Module, plain: Classifier, x: Tensor, clock: Clock) -> float:
    """Return the time of one forward: float32, channels-last, inference mode."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    z = plain.normalize(x).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        return clock.seconds(lambda: last(z))


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def likeness(found: Tensor, expected: Tensor) -> float:
    """Return the correlation of two sets of maps."""
    return float(torch.corrcoef(torch.stack([found.flatten().double(), expected.flatten().double()]))[0, 1])


def limits(clock: Clock) -> dict[str, float]:
    """Return the rate of matrix products on this machine, and what ResNet-50 asks for, in GFLOP."""
    layer = Prepared(nn.Linear(2048, 2048, bias=False).requires_grad_(False).to(clock.device))
    a = torch.rand(2048, 2048, device=clock.device)
    spent = {str(dtype).removeprefix("torch."): clock.seconds(partial(product, layer, a, dtype)) for dtype in DTYPES}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built("resnet50", "cpu")(torch.rand(1, 3, 224, 224))
    operations = counter.get_total_flops() / 1e9
    return {**{name: 2 * 2.048**3 / seconds for name, seconds in spent.items()}, "resnet50": operations}


def product(layer: Prepared, a: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply two matrices in a precision."""
    with torch.autocast(a.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return layer(a.to(dtype))


DTYPES = (torch.float32, torch.bfloat16)


def about(clock: Clock) -> dict[str, Any]:
    """Return what the numbers depend on."""
    cpu = Path("/proc/cpuinfo").read_text().split("model name", 1)[-1].split("\n")[0].strip(" \t:")
    return {
        "machine": torch.cuda.get_device_name() if clock.device == "cuda" else f"{platform.machine()}, {cpu}",
        "device": clock.device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "processor time" if clock.processor else "wall time",
        "versions": {name: version(name) for name in PACKAGES},
    }


def goals(found: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return what was asked for: text, goal, and what came out."""
    lines: list[tuple[str, str, float]] = []
    done = [one for one in found.values() if "seconds" in one]
    for one in done:
        times, peer = one["seconds"], one["peers"]
        if one["method"] in FAMILY:
            lines.append(
                (f"{one['network']}: {one['method']}, exact, forwards", "<= 1.2", times["exact"] / one["forward"])
            )
        if one["method"] == "opti_cam":
            for kind, goal in (("exact", "<= .6"), ("fast", "<= .3")):
                share = times[kind] / peer["naive loop"]["seconds"]
                lines.append((f"{one['network']}: Opti-CAM step, {kind}, of the naive step", goal, share))
        if one["method"] == "score_cam":
            for name in ("pytorch-grad-cam", "torch-cam"):
                for kind, goal in (("exact", ">= 2"), ("fast", ">= 4")):
                    if isinstance(peer.get(name), dict):
                        gain = peer[name]["seconds"] / times[kind]
                        lines.append((f"{one['network']}: Score-CAM, {kind}, times {name}", goal, gain))
    for one in metrics.get("rows", []):
        if one["metric"] in ("deletion, exact", "deletion, fast"):
            goal = ">= 2.5" if one["metric"].endswith("exact") else ">= 5"
            lines.append((f"{one['maps']}: {one['metric']}, times Quantus", goal, one["ratio"]))
    return lines


def reached(goal: str, value: float) -> bool:
    """Tell whether a number is as asked."""
    sign, number = goal.split()
    return value <= float(number) if sign == "<=" else value >= float(number)


def page(data: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Return everything in Markdown."""
    told, limit = data["about"], data["limits"]
    versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    floor = {name: limit["resnet50"] / limit[name] for name in ("float32", "bfloat16")}
    lines = [
        "# Speed",
        "Written by `benchmarks/speed.py`: random weights, images of 224 x 224. As it is: `wrap(model)`; exact: "
        '`speed.fast(classifier)`; fast: `speed.fast(classifier, precision="bf16")`. Times are in forwards of as many '
        "images; one forward is float32, channels-last, inference mode. In parentheses: forwards and full backwards an "
        "image, counted. Opti-CAM is one step, and its counts and memory are those of two.",
        f"{told['machine']}; {told['cores']} cores, {told['threads']} threads, {told['clock']}; {versions}.",
        f"Matrix products run at {limit['float32']:.0f} GFLOP/s in float32 here, {limit['bfloat16']:.0f} in bfloat16. "
        f"ResNet-50 takes {limit['resnet50']:.1f} GFLOP an image: no way to run it needs less than "
        f"{1e3 * floor['float32']:.0f} ms, or {1e3 * floor['bfloat16']:.0f} ms in bfloat16.",
        "## Goals",
        "\n".join(
            ["| what | goal | measured | reached |", "| :-- | --: | --: | :-- |"]
            + [
                f"| {what} | {goal} | {value:.2f} | {'yes' if reached(goal, value) else 'no'} |"
                for what, goal, value in goals(data["rows"], metrics)
            ]
        ),
    ]
    for network in dict.fromkeys(one["network"] for one in data["rows"].values()):
        lines += [f"## {network}", table([one for one in data["rows"].values() if one["network"] == network])]
    return "\n\n".join(lines) + "\n"


def table(found: list[Mapping[str, Any]]) -> str:
    """Return the rows of one network."""
    head = [
        "method",
        "images",
        "forwards + backwards",
        "as it is",
        "exact",
        "fast",
        *PEERS,
        "naive loop",
        "exact / floor",
    ]
    head += ["exact differs by", "fast: r", "MB as it is, exact, fast, peers"]
    lines = [f"| {' | '.join(head)} |", f"| :-- |{' --: |' * (len(head) - 1)}"]
    for one in found:
        if "unsuited" in one:
            lines.append(f"| {one['method']} | {one['batch']} | not for this network |{' |' * (len(head) - 3)}")
            continue
        unit_, counts = one["forward"], one["counts"]
        if one["method"] == "opti_cam":
            counts = [1, 1]
        settings = "".join(f", {name}={value}" for name, value in one["settings"].items())
        cells = [f"{one['method']}{settings}", str(one["batch"]), f"{counts[0]:.3g} + {counts[1]:.3g}"]
        cells += [f"{one['seconds'][kind] / unit_:.2f}" for kind in ("as it is", "exact", "fast")]
        cells += [shown(one["peers"].get(name), unit_) for name in (*PEERS, "naive loop")]
        cells += [f"{one['seconds']['exact'] / unit_ / sum(counts):.2f}"]
        cells += [f"{one['apart']['exact']:.0e}", f"{one['likeness']['fast']:.3f}"]
        used = [*one["memory"].values(), *(peer["memory"] for peer in one["peers"].values() if isinstance(peer, dict))]
        cells.append(", ".join("?" if one is None else f"{one:.0f}" for one in used))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(peer: Mapping[str, Any] | str | None, one: float) -> str:
    """Return a peer's time in forwards, with how many it takes, or what it raised."""
    if peer is None or isinstance(peer, str):
        return "" if peer is None else peer.split(":")[0]
    return f"{peer['seconds'] / one:.2f} ({peer['counts'][0]:.3g} + {peer['counts'][1]:.3g})"


def main() -> None:
    """Measure what is missing, and write it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("out/benchmarks/speed"))
    options.add_argument("--page", type=Path, help="write a page of the JSON here")
    options.add_argument("--metrics", type=Path, default=HERE / "metrics.json", help="the JSON of metrics.py")
    options.add_argument("--only", action="append", help="rows whose name holds this text")
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--batch", type=int, help="as many images in every row")
    options.add_argument("--processor-time", action="store_true", help="for a machine with other work; one thread")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = options.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    clock = Clock(given.processor_time, given.repeats, given.device)
    file, told = given.out.with_suffix(".json"), about(clock)
    file.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if data.get("about") != told:
        data = {"about": told, "limits": limits(clock), "rows": {}}
    metrics = json.loads(given.metrics.read_text()) if given.metrics.exists() else {}
    for row in rows():
        if row.key in data["rows"] or (given.only and not any(text in row.key for text in given.only)):
            continue
        start = time.perf_counter()
        one = Row(row.network, row.method, given.batch or row.batch, row.settings, row.layer)
        data["rows"][row.key] = measured(one, clock)
        file.write_text(json.dumps(data, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(page(data, metrics))
        print(f"{row.key}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if given.page:
        given.page.write_text(page(data, metrics))
    print(page(data, metrics))


if __name__ == "__main__":
    main()
