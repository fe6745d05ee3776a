"""Pieces. An evaluation in pieces, each done once, by any process, and kept until all are there.

A piece is a few consecutive batches, or the protocols of one name. Which images it has depends on their number and
the batch alone, pieces are added up in their order, and protocols begin with the maps of all of them: so any number of
processes gives the same bits, and so does an evaluation that was killed and goes on from the pieces that it finds.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from sightline.classifier import Classifier
from sightline.evaluation import Log, Shown, Tally
from sightline.metrics import Measure
from sightline.processes import first, wait
from sightline.runs import Score, describe, strict, write_bytes, write_text

MOST = 1024
"""How many pieces of images there are at most."""

CLAIM, MAP = "claim.json", "map/"
"""What a folder belongs to, and how the names of maps begin in a piece."""

FORM = 3
"""How pieces are written, as a part of the claim: those of another form are not read."""


def cut(count: int, batch: int) -> Iterator[range]:
    """Cut images into pieces of consecutive whole batches, at most `MOST`, the last one shorter."""
    step = batch * max(1, -(-count // (batch * MOST)))
    return (range(start, min(start + step, count)) for start in range(0, count, step))


class Pieces:
    """Pieces by name: in memory, or files of a folder that all processes see and that belongs to one `claim`.

    A folder of another claim is emptied. All processes have to make it at the same time.

    Raises:
        ValueError: a folder that holds something else.
    """

    def __init__(self, folder: Path | None, claim: Mapping[str, Any]) -> None:
        self.folder = folder
        self.memory: dict[str, bytes] = {}
        if folder is None:
            return
        text = json.dumps(strict({"form": FORM, **claim}), indent=1, sort_keys=True, default=describe) + "\n"
        kept = folder / CLAIM
        if first() and folder.exists() and not kept.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds other things than pieces; give a folder of their own, which is emptied")
        if first() and not (kept.exists() and kept.read_text(encoding="utf-8") == text):
            shutil.rmtree(folder, ignore_errors=True)
            write_text(kept, text)
        wait()

    def __contains__(self, name: str) -> bool:
        """Tell whether a piece is done."""
        return name in self.memory if self.folder is None else (self.folder / name).exists()

    def __getitem__(self, name: str) -> bytes:
        """Return a piece that is done."""
        return self.memory[name] if self.folder is None else (self.folder / name).read_bytes()

    def __setitem__(self, name: str, content: bytes) -> None:
        """Keep a piece; a file is whole or not there."""
        if self.folder is None:
            self.memory[name] = content
        else:
            write_bytes(self.folder / name, content)


def forget(folder: Path) -> None:
    """Delete a folder of pieces, if it is there, when what they gave is written."""
    if first() and (folder / CLAIM).exists():
        shutil.rmtree(folder, ignore_errors=True)


Held: TypeAlias = Mapping[tuple[str, int], Tensor]
"""Maps by image and class."""


def packed(tally: Tally, maps: Held) -> bytes:
    """Return a tally and the maps that were made for it as safetensors, its notes as JSON among them."""
    from safetensors.torch import save

    sums = {f"{part}/{name}": held for name, one in tally.sums.items() for part, held in one.held().items()}
    kept = {f"{MAP}{label}/{name}": one.cpu().contiguous() for (name, label), one in maps.items()}
    notes = json.dumps({"log": asdict(tally.log), "seconds": tally.seconds})
    return save({**sums, **kept}, metadata={"notes": notes})


def unpacked(content: bytes) -> tuple[Log, float, Mapping[str, Mapping[str, Tensor]]]:
    """Return the notes, the seconds and what each metric held."""
    from safetensors.torch import load

    size = int.from_bytes(content[:8], "little")
    notes = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["notes"])
    held: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load(content).items():
        if not key.startswith(MAP):
            part, _, name = key.partition("/")
            held.setdefault(name, {})[part] = tensor
    return Log(**{**notes["log"], "shown": shown_of(notes["log"]["shown"])}), float(notes["seconds"]), held


def shown_of(table: Mapping[str, Mapping[str, str | None]]) -> Shown:
    """Return what maps show from JSON, where the numbers of classes are text."""
    return {name: {int(label): reason for label, reason in one.items()} for name, one in table.items()}


def maps_in(content: bytes) -> Held:
    """Return the maps of a piece, in the order of the images' names."""
    from safetensors.torch import load

    found: dict[tuple[str, int], Tensor] = {}
    for key, tensor in sorted(load(content).items()):
        if key.startswith(MAP):
            label, _, name = key.removeprefix(MAP).partition("/")
            found[name, int(label)] = tensor
    return found


def joined(pieces: Iterable[bytes], metrics: Mapping[str, Measure], classifier: Classifier) -> Tally:
    """Return the sum of tallies, in their order."""
    total = Tally.empty(metrics, classifier)
    for content in pieces:
        log, seconds, held = unpacked(content)
        total.log.add(log)
        total.seconds += seconds
        for name, one in total.sums.items():
            one.add({part: tensor.to(classifier.device) for part, tensor in held[name].items()})
    return total


def packed_parts(found: Mapping[str, Mapping[str, Score]], seconds: float, shown: Shown) -> bytes:
    """Return what protocols gave, by their texts and parts, and what the maps show, as JSON."""
    table = {
        text: {part: {**asdict(score), "metric": score.metric.plain()} for part, score in parts.items()}
        for text, parts in found.items()
    }
    return json.dumps({"found": strict(table), "seconds": seconds, "shown": shown}, default=describe).encode()


def unpacked_parts(content: bytes) -> tuple[dict[str, dict[str, Score]], float, Shown]:
    """Return what protocols gave, by their texts and parts, their seconds, and what the maps show."""
    table = json.loads(content)
    found = {text: {part: Score.of(score) for part, score in parts.items()} for text, parts in table["found"].items()}
    return found, float(table["seconds"]), shown_of(table["shown"])
