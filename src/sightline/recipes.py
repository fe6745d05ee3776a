"""Recipes. What a training is told, as plain data: a TOML file that can be written out, edited and run again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from sightline.kinds import entries
from sightline.runs import Choice, read_toml, without_none, write_text


@dataclass(frozen=True)
class Recipe:
    """One training: from which network and which images, with which seed and settings.

    `test` is measured after the training; `half` stores the weights in 16 bits. `settings` are those of the
    configuration of what is trained. With `trials` > 0 that many learning rates are tried, drawn log-uniformly between
    `low` and `high`, and the one with the best `select` on `val` is taken: "accuracy", "mean_average_precision" or a
    metric of the maps; None is the accuracy, for what classifies, the area of masks, or a segmenter's mean IoU.
    """

    data: Choice
    model: Choice
    test: Choice | None = None
    seed: int = 0
    half: bool = False
    trials: int = 0
    low: float = 1e-5
    high: float = 0.1
    val: Choice | None = None
    select: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.trials < 0 or not 0 < self.low <= self.high:
            raise ValueError(
                f"expected trials >= 0 and 0 < low <= high, got trials={self.trials}, low={self.low}, high={self.high}"
            )
        if self.trials and self.val is None:
            raise ValueError("trials are compared on images that nobody learns from: say which with val, --val")

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Recipe":
        """Read a table.

        Raises:
            LookupError: an entry that no recipe has.
            TypeError, ValueError: a value of another kind, or out of range.
        """
        entries(cls, table, "recipe")
        chosen = {name: Choice.of(table[name]) for name in ("data", "model", "test", "val") if name in table}
        numbers = {name: float(table[name]) for name in ("low", "high") if name in table}
        return cls(**{**table, **chosen, **numbers})

    @classmethod
    def read(cls, path: Path | str, **defaults: Any) -> "Recipe":
        """Read a TOML file; entries that it lacks are the defaults.

        Raises:
            FileNotFoundError: no such file.
            LookupError, TypeError, ValueError: not TOML, or no recipe; the message names the file.
        """
        table = read_toml(path)
        try:
            return cls.of({**defaults, **table})
        except (LookupError, TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error.args[0] if error.args else error}") from error

    def changed(self, **entries: Any) -> "Recipe":
        """Return the recipe with other entries; those that are None stay, settings are added to."""
        given = {name: value for name, value in entries.items() if value is not None}
        if "settings" in given:
            given["settings"] = {**self.settings, **given["settings"]}
        return replace(self, **given)

    def plain(self) -> dict[str, Any]:
        """Return what TOML holds; entries that are None are left out."""
        table = {**asdict(self), "settings": dict(self.settings)}
        for name in ("data", "model", "test", "val"):
            choice: Choice | None = getattr(self, name)
            table[name] = None if choice is None else choice.plain()
        found: dict[str, Any] = without_none(table)
        return found

    def write(self, path: Path | str, command: str, settings: Mapping[str, Any]) -> Path:
        """Write the recipe as TOML for editing, with all settings that it leaves at their defaults.

        Raises:
            ValueError: there is such a file already.
        """
        if Path(path).exists():
            raise ValueError(f"{path} is there already, perhaps edited; delete it, or take another name")
        full = {**settings, **self.settings}
        unset = [name for name, value in full.items() if value is None]
        note = f"# Not set, and so left to their defaults: {', '.join(unset)}.\n" if unset else ""
        head = f"# {command} --spec {Path(path).name} --out DIR\n{note}\n"
        return write_text(path, head + tomli_w.dumps(without_none({**self.plain(), "settings": full})))
