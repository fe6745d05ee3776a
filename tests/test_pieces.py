"""Pieces: whatever the number of processes, and after kill -9, the numbers are those of one uninterrupted process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sightline import running
from sightline.classifier import UnsuitedError
from sightline.datasets import creatures
from sightline.methods import METHODS, Entry
from sightline.pieces import CLAIM, MOST, Pieces, cut, forget, maps_in, packed_parts, unpacked_parts
from sightline.processes import agreed, fabric_of
from sightline.running import run
from sightline.runs import Choice, Run, Score, Spec

TABLE = {
    "model": {"name": "mini_resnet", "classes": 20},
    "data": {"name": "creatures", "count": 7},
    "method": "grad_cam",
    "metrics": ["average_drop", "pointing_game", "cue_localization", {"name": "segmentation", "threshold": 0.3}],
    "batch": 2,
}


def spec(**changes):
    return Spec.of({**TABLE, **changes})


def numbers(made):
    return replace(made.scores, seconds=0.0)


@given(st.integers(0, 10_000), st.integers(1, 50))
def test_pieces_are_whole_batches_of_consecutive_images(count, batch):
    parts = list(cut(count, batch))
    assert [i for part in parts for i in part] == list(range(count))
    assert len(parts) <= MOST
    assert all(len(part) % batch == 0 for part in parts[:-1])
    assert count > batch * MOST or all(len(part) <= batch for part in parts)


@pytest.fixture(scope="module")
def alone():
    return run(spec())


@pytest.mark.parametrize("world", [2, 3])
def test_processes_do_not_matter(world, alone, tmp_path):
    asked = spec()
    for rank in reversed(range(world)):
        done(asked, tmp_path, rank, world, "explain")
    for rank in reversed(range(world)):
        done(asked, tmp_path, rank, world, "judge")
    method, judges = running.named(asked)
    work = running.Work(asked, running.scene(asked), running.Maps(method), judges, 7, None, lambda *told: None)
    assert replace(work.scores(Pieces(tmp_path, {})), seconds=0.0) == numbers(alone)


def done(asked, folder, rank, world, phase):
    """Do what one process does, with objects of its own."""
    method, judges = running.named(asked)
    work = running.Work(asked, running.scene(asked), running.Maps(method), judges, 7, None, lambda *told: None)
    getattr(work, phase)(Pieces(folder, {}), rank, world)


def silent(classifier, x, y=None, /):
    """Say nothing of even classes."""
    return torch.where((y % 2 == 0).view(-1, 1, 1, 1), 0.0, x.mean(1, keepdim=True))


SILENT = {
    "data": {"name": "creatures", "count": 7, "variant": "scenes"},
    "method": "silent",
    "metrics": [
        "average_drop",
        {"name": "insertion", "steps": 2, "scored": "predicted"},
        "segmentation",
        {"name": "superset_depth", "hierarchy": "creatures", "nodes": list(creatures(count=1).classes)},
        {"name": "weak_localization", "held_out": {"name": "creatures", "count": 4, "split": "val"}},
    ],
}


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [0, 1], [2], [0, 2]])
def test_maps_that_show_nothing_are_listed_whoever_asks_for_them(chosen, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "silent", Entry(f"{__name__}:silent", ""))
    asked = spec(**{**SILENT, "metrics": [SILENT["metrics"][i] for i in chosen]})
    alone = run(asked)
    on = running.scene(asked)
    expected, names = {}, on.dataset.classes
    for index in range(7):
        one = on.samples[index]
        predicted = int(on.classifier(one.image[None]).argmax())
        there = {int(value) - 1 for value in one.mask.unique()} - {-1, 254}
        of_metric = [{one.label}, {predicted}, there, {*range(20)}, {one.label}]
        classes = set().union(*(of_metric[i] for i in chosen))
        if nothing := ", ".join(names[label] for label in sorted(classes) if label % 2 == 0):
            expected[one.id] = f"all zero ({nothing})" if len(classes) > 1 else "all zero"
    held_out = {name for name in alone.scores.degenerate if "-val-" in name}
    assert {name: said for name, said in alone.scores.degenerate.items() if name not in held_out} == expected
    assert bool(held_out) == (4 in chosen)
    content = alone.write(tmp_path / "alone.json").read_bytes()
    for world in (2, 3):
        for phase in ("explain", "judge"):
            for rank in reversed(range(world)):
                done(asked, tmp_path / str(world), rank, world, phase)
        method, judges = running.named(asked)
        work = running.Work(asked, on, running.Maps(method), judges, 7, None, lambda *told: None)
        scores = replace(work.scores(Pieces(tmp_path / str(world), {})), seconds=alone.scores.seconds)
        assert replace(alone, scores=scores).write(tmp_path / "several.json").read_bytes() == content


def test_a_resumed_run_lists_what_shows_nothing_as_before(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "silent", Entry(f"{__name__}:silent", ""))
    asked = spec(**SILENT)
    expected = run(asked).scores.degenerate
    run(asked, pieces=tmp_path)
    for name in ("images-0001", "images-0003", "segmentation"):
        (tmp_path / name).unlink()
    assert run(asked, pieces=tmp_path).scores.degenerate == expected
    assert len(expected) > 7


def test_pieces_of_another_form_are_not_used(tmp_path):
    Pieces(tmp_path, {"a": 1})["one"] = b"1"
    assert "one" in Pieces(tmp_path, {"a": 1})
    (tmp_path / CLAIM).write_text(json.dumps({"a": 1}, indent=1) + "\n")
    assert "one" not in Pieces(tmp_path, {"a": 1})


def test_protocols_find_the_maps_that_others_made(tmp_path, monkeypatch):
    held_out = {"name": "creatures", "count": 4, "split": "val"}
    asked, made, calls = spec(metrics=["average_drop", {"name": "weak_localization", "held_out": held_out}]), [], []
    for rank in range(2):
        done(asked, tmp_path, rank, 2, "explain")
    for part in sorted(tmp_path.glob("images-*")):
        made += [name for name, _ in maps_in(part.read_bytes())]
    assert len(set(made)) == 7
    original = running.Maps.made

    def counted(self, classifier, batch, y, new):
        calls.extend(batch.ids)
        return original(self, classifier, batch, y, new)

    monkeypatch.setattr(running.Maps, "made", counted)
    done(spec(metrics=["average_drop", {"name": "weak_localization", "held_out": held_out}]), tmp_path, 0, 2, "judge")
    assert len(calls) >= 4
    assert all("-val-" in name for name in calls[:4])


def test_a_run_that_failed_goes_on_from_its_pieces(alone, tmp_path, monkeypatch):
    calls, measured = [], running.measured

    def failing(maps, classifier, parts, *args, start, **named):
        calls.append(start)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return measured(maps, classifier, parts, *args, start=start, **named)

    monkeypatch.setattr(running, "measured", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        run(spec(), pieces=tmp_path / "pieces")
    assert numbers(run(spec(), pieces=tmp_path / "pieces")) == numbers(alone)
    assert calls == [0, 2, 4, 4, 6]
    forget(tmp_path / "pieces")
    assert not (tmp_path / "pieces").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other things than pieces; give a folder of their own"):
        run(spec(), pieces=tmp_path)
    forget(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_pieces_of_another_specification_are_not_used(alone, tmp_path):
    run(spec(method="gradient"), pieces=tmp_path)
    assert json.loads((tmp_path / CLAIM).read_text())["spec"]["method"] == "gradient"
    assert numbers(run(spec(), pieces=tmp_path)) == numbers(alone)


def test_several_processes_need_a_folder(monkeypatch):
    fabric = fabric_of("cpu")
    monkeypatch.setattr(type(fabric), "world_size", 3)
    with pytest.raises(ValueError, match="3 processes need pieces=, a folder that all of them see"):
        run(spec(), fabric=fabric)


def test_an_accelerator_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=r"accelerator 'cuda' cannot be used here: .*; take auto or cpu"):
        fabric_of("cuda")


def test_the_network_goes_to_the_device_of_the_fabric(monkeypatch):
    fabric = fabric_of("cpu")
    monkeypatch.setattr(type(fabric), "device", torch.device("meta"))
    assert running.scene(spec(), fabric=fabric).classifier.device.type == "meta"


def test_what_one_process_says_all_say():
    def unsuited():
        raise UnsuitedError("no convolution")

    with pytest.raises(UnsuitedError, match=r"^no convolution$"):
        agreed(unsuited)
    agreed(lambda: None)


def test_scores_of_protocols_survive_the_file():
    score = Score(Choice("mean", {"a": 1}), float("nan"), None, (0.1, 1 / 3), (float("inf"),), (2.0,), 3)
    shown = {"one": {0: None, 12: "all zero"}}
    found, seconds, again = unpacked_parts(packed_parts({"p(a=1)": {"part": score}}, 0.1, shown))
    assert repr(found) == repr({"p(a=1)": {"part": score}})
    assert (seconds, again) == (0.1, shown)


SLOW = """
import os, sys, time
from pathlib import Path
from sightline import evaluation
from sightline.__main__ import main
Path(__file__).with_suffix(f".{{os.getpid()}}").touch()
made = evaluation.Maps.made
def slow(self, *args):
    time.sleep({seconds})
    return made(self, *args)
evaluation.Maps.made = slow
main()
"""

COMMAND = ("evaluate", "--model", "mini_resnet?classes=20", "--data", "creatures?count=7", "--batch", "2")
METRICS = ("insertion?steps=4", "pointing_game", "cue_localization")


def start(script, processes, out):
    """Start a script that is the command line, several by `torchrun`; its output goes to a file beside the script."""
    several = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    launcher = (sys.executable, *(several if processes > 1 else ()))
    asked = [option for metric in METRICS for option in ("--metric", metric)]
    with script.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [*launcher, str(script), *COMMAND, *asked, "--method", "grad_cam", "--out", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )


def kill(launcher, script):
    """End a launcher and its workers at once."""
    launcher.kill()
    launcher.wait(60)
    for path in script.parent.glob(f"{script.stem}.[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.suffix[1:]), signal.SIGKILL)


def test_killed_and_resumed_by_two_processes_gives_the_numbers_of_one(tmp_path):
    out, scripts = tmp_path / "out", {}
    for name, seconds in (("slow", 3), ("plain", 0)):
        scripts[name] = tmp_path / f"{name}.py"
        scripts[name].write_text(SLOW.format(seconds=seconds))
    waiting = out / "grad_cam-pieces"
    first, limit = start(scripts["slow"], 1, out), time.monotonic() + 120
    while not list(waiting.glob("images-*")):
        said = scripts["slow"].with_suffix(".log").read_text()
        assert first.poll() is None, said
        assert time.monotonic() < limit, said
        time.sleep(0.05)
    kill(first, scripts["slow"])
    assert 0 < len(list(waiting.glob("images-*"))) < 4
    assert start(scripts["plain"], 2, out).wait(120) == 0, scripts["plain"].with_suffix(".log").read_text()
    assert numbers(Run.read(out / "grad_cam.json")) == numbers(
        run(spec(metrics=[Choice.parse(one) for one in METRICS]))
    )
    assert not waiting.exists()
    assert (out / "table.md").exists()
