"""Fewer steps for Opti-CAM: other rules of ascent against the paper's, in steps, AG, AD and AI.

A rule is Adam with its rate, its two betas and a schedule. A step is a forward and a backward of the network on the
masked image; the forward that gives the features is not counted (every rule has it), the start at Grad-CAM's weights
counts as a step. AG, AD and AI are those of `sightline.metrics` at the last step: what they mask with is what the
objective masks with. The rules were chosen on other images than these (`CHOSEN`; creatures: the split `val`). Goes on
where it was left, row by row; writes JSON and a table:

    .venv/bin/python benchmarks/opti_cam_steps.py --out benchmarks/opti_cam_steps
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from sightline import models
from sightline.classifier import Classifier, logit, probability
from sightline.data import Batch, batches
from sightline.erase import mix, resolve
from sightline.hooks import differentiable, frozen
from sightline.maps import resize, unit
from sightline.methods._opti_cam import Start, combine, initial
from sightline.metrics._average import drop, gain, increase
from sightline.running import reader_of
from sightline.runs import Choice, provenance, write_text

DATA: Mapping[str, Choice] = {
    "mnist": Choice("mnist", {"root": "../shared/data/MNIST", "split": "test"}),
    "creatures": Choice("creatures", {"split": "test"}),
    "cub": Choice("cub_crops", {"root": "../shared/data/CUB_200_2011", "split": "test", "classes": 20}),
}
CHOSEN: Mapping[str, tuple[int, ...]] = {"mnist": (48, 64), "creatures": (), "cub": (32,)}
"""How many evenly spaced images the rules were chosen on, where they come from the same split."""
IMAGES = 48
"""How many images of each data set."""
SEEDS = (0, 1, 2)
BATCH = 16
MEASURES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"AG": gain, "AD": drop, "AI": increase}


@dataclass(frozen=True)
class Rule:
    """Adam's settings; `falling` halves the time at full rate and then falls linearly to zero."""

    steps: int = 100
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    falling: bool = False
    start: Start = "constant"

    def rate(self, t: int) -> float:
        """Return the rate of step t, from 0."""
        return self.lr * min(1.0, 2 * (1 - t / self.steps)) if self.falling else self.lr

    @property
    def passes(self) -> int:
        """Return forwards and backwards an image, the start at Grad-CAM's weights included."""
        return self.steps + (self.start == "grad_cam")


RULES: Mapping[str, Rule] = {
    "paper": Rule(),
    "paper, 40 steps": Rule(steps=40),
    "falling": Rule(40, 0.35, (0.3, 0.5), falling=True),
    "falling, grad_cam": Rule(39, 0.35, (0.3, 0.5), falling=True, start="grad_cam"),
}


def climbed(classifier: Classifier, batch: Batch, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return the probability of each image and, under the rule's last map, of the masked image."""
    x, y = batch.x, batch.y
    if y is None:
        raise ValueError("the images have no labels")
    black, (b1, b2) = resolve("black", classifier.mean), rule.betas
    with differentiable(), frozen(classifier.model):
        A, logits = classifier.features_and_logits(x)
        u = initial(classifier, x, y, A, rule.start, logit)
        m, v = torch.zeros_like(u), torch.zeros_like(u)

        def masked(u: Tensor) -> Tensor:
            return classifier(mix(x, unit(resize(combine(u, A), (x.shape[2], x.shape[3]))), black))

        for t in range(rule.steps):
            leaf = u.clone().requires_grad_()
            (g,) = torch.autograd.grad(logit(masked(leaf), y).sum(), leaf)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.square()
            u = u + rule.rate(t) * (m / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + 1e-8)
        return probability(logits.double(), y).detach(), probability(masked(u).double(), y).detach()


def shares(data: str, length: int) -> list[int]:
    """Return the places of the images: evenly spaced among those on which nothing was chosen."""
    taken = {i * length // n for n in CHOSEN[data] for i in range(n)}
    free = [i for i in range(length) if i not in taken]
    return [free[i * len(free) // IMAGES] for i in range(IMAGES)]


def row(data: str, seed: int, rule: Rule) -> dict[str, Any]:
    """Return what one rule reaches on one network, image by image."""
    own = data == "creatures" and seed == 0
    classifier = models.load("creatures" if own else f"out/{data}-{seed}/classifier.safetensors")
    dataset = reader_of(DATA[data], classifier)()
    started = time.process_time()
    found = [climbed(classifier, batch, rule) for batch in batches(dataset, BATCH, shares(data, len(dataset)))]
    p, o = (torch.cat(parts) for parts in zip(*found, strict=True))
    values = {name: [round(value, 4) for value in measure(p, o).tolist()] for name, measure in MEASURES.items()}
    return {"rule": asdict(rule), "passes": rule.passes, "seconds": time.process_time() - started, "images": values}


def lines(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Return the table: means over images, and the difference from the paper's rule with its standard error."""
    yield "| data | network | rule | steps | AG | AD | AI | AG - paper's | AD - paper's | AI - paper's |"
    yield "| :-- | :-- | :-- | --: | --: | --: | --: | --: | --: | --: |"
    for data in DATA:
        for seeds, network in (*(((seed,), str(seed)) for seed in SEEDS), (SEEDS, "all")):
            for rule in RULES:
                keys = [f"{data}/{seed}/" for seed in seeds]
                if not all(key + one in rows for key in keys for one in (rule, "paper")):
                    continue
                cells = [f"{mean(pooled(rows, keys, rule, name)):.2f}" for name in MEASURES]
                cells += [difference(rows, keys, rule, name) if rule != "paper" else "" for name in MEASURES]
                yield f"| {data} | {network} | {rule} | {RULES[rule].passes} | {' | '.join(cells)} |"


def pooled(rows: Mapping[str, Mapping[str, Any]], keys: list[str], rule: str, name: str) -> list[float]:
    """Return one measure of all images of several networks."""
    return [value for key in keys for value in rows[key + rule]["images"][name]]


def difference(rows: Mapping[str, Mapping[str, Any]], keys: list[str], rule: str, name: str) -> str:
    """Return the mean difference from the paper's rule, image by image, and its standard error."""
    both = zip(pooled(rows, keys, rule, name), pooled(rows, keys, "paper", name), strict=True)
    differences = [one - other for one, other in both]
    return f"{mean(differences):+.2f} ± {stdev(differences) / math.sqrt(len(differences)):.2f}"


def main() -> None:
    """Run every row that is not there yet, and write the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("out/benchmarks/opti_cam_steps"))
    options.add_argument("--data", action="append", choices=DATA, help="only these")
    options.add_argument("--seed", action="append", type=int, choices=SEEDS, help="only these")
    given = options.parse_args()
    file = given.out.with_suffix(".json")
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    for data in given.data or DATA:
        for seed in given.seed or SEEDS:
            for name, rule in RULES.items():
                if (key := f"{data}/{seed}/{name}") in rows:
                    continue
                rows[key] = row(data, seed, rule)
                print(key, {one: round(mean(values), 2) for one, values in rows[key]["images"].items()}, flush=True)
                about = {**provenance(), "threads": torch.get_num_threads()}
                write_text(file, json.dumps({**about, "rows": rows}) + "\n")
    write_text(given.out.with_suffix(".md"), "\n".join(lines(rows)) + "\n")


if __name__ == "__main__":
    main()
