"""Search. The learning rate of weakly supervised localization, drawn and selected on held-out images.

Choe et al., Evaluating weakly supervised object localization methods right, CVPR 2020: 30 log-uniform draws, the best
on the validation split, reported once on the test split.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sightline.runs import write_text
from sightline.training import generator

TRIALS = "trials.json"


@dataclass(frozen=True)
class Trials:
    """The learning rates that were tried, and what each scored; NaN where the training came to nothing.

    Raises:
        ValueError: not one score a rate.
    """

    rates: tuple[float, ...]
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.scores):
            raise ValueError(f"expected one score a rate, got {len(self.scores)} for {len(self.rates)} rates")

    @property
    def best(self) -> float:
        """The rate of the highest score, the first of several.

        Raises:
            ValueError: no trial came to anything.
        """
        finite = [n for n, score in enumerate(self.scores) if math.isfinite(score)]
        if not finite:
            raise ValueError(f"none of {len(self.rates)} trials gave a finite score; lower the rates (low=, high=)")
        return self.rates[max(finite, key=lambda n: self.scores[n])]


def search(
    run: Callable[[float], float],
    *,
    trials: int = 30,
    low: float = 1e-5,
    high: float = 1e-1,
    seed: int = 0,
    out: Path | str | None = None,
) -> Trials:
    """Return what `run` scores at `trials` learning rates, higher being better.

    lr = low (high / low)^u, u uniform in [0, 1). A trial that raises `FloatingPointError`, or scores no finite number,
    came to nothing. With `out` finished trials are kept in `out/trials.json` and not run again; `trials` may grow from
    one call to the next. The paper prints [5^-5, 5^-1], taken for 10^-5 and 10^-1.

    Raises:
        ValueError: numbers out of range, or an `out` that is broken or belongs to another search.
    """
    if trials < 1 or not 0 < low <= high:
        raise ValueError(f"expected trials >= 1 and 0 < low <= high, got trials={trials}, low={low}, high={high}")
    settings = {"low": low, "high": high, "seed": seed}
    rates, folder = draws(trials, low, high, seed), None if out is None else Path(out)
    scores = finished(folder, settings)[:trials]
    for rate in rates[len(scores) :]:
        scores.append(score(run, rate))
        if folder is not None:
            write(folder, settings, rates, scores)
    return Trials(rates, tuple(scores))


def draws(trials: int, low: float, high: float, seed: int) -> tuple[float, ...]:
    """Return learning rates; the first ones do not depend on how many there are."""
    randomness = generator("search", seed)
    drawn: list[float] = torch.rand(trials, generator=randomness, dtype=torch.float64).tolist()
    return tuple(low * (high / low) ** u for u in drawn)


def score(run: Callable[[float], float], rate: float) -> float:
    """Return what one trial scores, NaN where it came to nothing."""
    try:
        found = float(run(rate))
    except FloatingPointError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def write(folder: Path, settings: Mapping[str, Any], rates: tuple[float, ...], scores: list[float]) -> None:
    """Write the finished trials, atomically."""
    pairs = zip(rates, scores, strict=False)
    done = [{"lr": rate, "score": value if math.isfinite(value) else None} for rate, value in pairs]
    write_text(folder / TRIALS, json.dumps({"settings": dict(settings), "trials": done}, indent=1) + "\n")


def finished(folder: Path | None, settings: Mapping[str, Any]) -> list[float]:
    """Return the scores of the trials that a folder keeps.

    Raises:
        ValueError: a broken file, or one of another search.
    """
    if folder is None or not (path := folder / TRIALS).exists():
        return []
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        made, scores = table["settings"], [one["score"] for one in table["trials"]]
        found = [math.nan if one is None else float(one) for one in scores]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no list of trials of ours ({error!r}); delete it") from error
    if made != settings:
        raise ValueError(f"{path} belongs to a search with {made}, not {dict(settings)}; use another folder")
    return found
