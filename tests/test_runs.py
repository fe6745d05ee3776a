"""Specifications and runs: TOML in, JSON out, atomic files, and no torch."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import stdev

import pytest
import tomli_w

from sightline import runs
from sightline.runs import (
    Choice,
    Run,
    Score,
    Scores,
    Spec,
    arguments,
    describe,
    provenance,
    read_specs,
    read_value,
    split,
    write_bytes,
    write_text,
)

TABLE = {
    "model": {"name": "mini_resnet", "classes": 4},
    "data": {"name": "folder", "root": "pictures"},
    "method": {"name": "opti_cam", "steps": 50, "erase": {"name": "blur", "sigma": 3.0}},
    "metrics": ["average_drop", {"name": "insertion", "steps": 32}],
}
FULL = {**TABLE, "explain": "label", "layer": "layer3", "images": 100, "batch": 8, "seed": 3}


def written(path, table):
    path.write_text(tomli_w.dumps(table))
    return path


def scored(values=(1.0, 2.0, 4.0), metric="average_drop"):
    return Score(Choice(metric), sum(values) / max(len(values), 1), False, tuple(values))


def run(**changes):
    scores = Scores(
        (scored(), Score(Choice("insertion", {"steps": 2}), 0.5, True, (0.25, 0.75), (0.1, 0.5, 0.9))),
        ("a", "ü", "c"),
        (1, None, 0),
        (1, 1, 2),
        (0.5, 0.625, 0.75),
        1.5,
        {"c": "all zero"},
    )
    known = {
        "arguments": {"method": {"steps": 50, "erase": "blur(sigma=3.0)"}, "model": {"mean": [0.5]}},
        "provenance": provenance(),
        "classes": ("x", "y", "z"),
        "skipped": {"bad.jpg": "empty"},
        "pictures": {"a": {"image": "p/0.jpg"}},
    }
    return Run(Spec.of(FULL), scores, **{**known, **changes})


# Choices and specifications


def test_choice_reads_what_toml_says():
    assert Choice.of("cam") == Choice("cam", {})
    assert Choice.of({"name": "opti_cam", "steps": 5}) == Choice("opti_cam", {"steps": 5})
    assert Choice.of(Choice("cam")) == Choice("cam")
    assert (str(Choice("a", {"b": 1, "c": "d"})), str(Choice("a"))) == ("a(b=1, c=d)", "a")
    assert (Choice("a").plain(), Choice("a", {"b": 1}).plain()) == ("a", {"name": "a", "b": 1})
    with pytest.raises(ValueError, match=r"expected a table with a name, got \{'steps': 5\}; write \{name = "):
        Choice.of({"steps": 5})
    with pytest.raises(TypeError, match="expected a name or a table with a name, got 5"):
        Choice.of(5)


@pytest.mark.parametrize("table", [TABLE, FULL])
def test_spec_goes_through_toml(tmp_path, table):
    spec = Spec.of(table)
    assert read_specs(written(tmp_path / "a.toml", spec.plain())) == (spec,)
    assert read_specs(str(written(tmp_path / "b.toml", table))) == (spec,)
    assert spec.method.settings["erase"] == {"name": "blur", "sigma": 3.0}


def test_spec_defaults():
    spec = Spec.of(TABLE)
    assert (spec.explain, spec.layer, spec.images, spec.batch, spec.seed) == ("scored", None, 0, 16, 0)
    assert Spec.of(FULL).plain() == FULL
    assert "layer" not in spec.plain()


def test_a_list_of_methods_is_a_specification_each(tmp_path):
    specs = read_specs(written(tmp_path / "a.toml", {**FULL, "method": ["cam", {"name": "opti_cam", "steps": 5}]}))
    assert [spec.method for spec in specs] == [Choice("cam"), Choice("opti_cam", {"steps": 5})]
    assert specs[0].plain() | {"method": ""} == specs[1].plain() | {"method": ""}
    with pytest.raises(ValueError, match=r"a\.toml lists no method; expected at least one"):
        read_specs(written(tmp_path / "a.toml", {**FULL, "method": []}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metric": "cam"}, LookupError, "no entry of a specification called 'metric'; did you mean metrics"),
        ({"metrics": "average_drop"}, TypeError, "metrics: expected a list, got 'average_drop'"),
        ({"metrics": 5}, TypeError, "metrics: expected a list, got 5"),
        ({"metrics": [5]}, TypeError, "expected a name or a table with a name, got 5"),
        ({"model": 5}, TypeError, "expected a name or a table with a name, got 5"),
        ({"batch": 0}, ValueError, "expected batch >= 1 and images >= 0, got batch=0, images=100"),
        ({"images": -1}, ValueError, "expected batch >= 1 and images >= 0, got batch=8, images=-1"),
        ({"images": "all"}, TypeError, "images: expected a whole number, got 'all'"),
        ({"images": 2.5}, TypeError, "images: expected a whole number, got 2.5"),
        ({"batch": True}, TypeError, "batch: expected a whole number, got True"),
        ({"seed": "x"}, TypeError, "seed: expected a whole number, got 'x'"),
        ({"seed": None}, TypeError, "seed: expected a whole number, got None"),
        ({"explain": 2}, TypeError, "explain: expected text, got 2"),
        ({"layer": 4}, TypeError, "layer: expected text or None, got 4"),
    ],
)
def test_wrong_specifications(change, error, message):
    with pytest.raises(error) as caught:
        Spec.of({**FULL, **change})
    assert str(caught.value).startswith(message)


def test_missing_entries():
    with pytest.raises(ValueError, match="the specification lacks data, metrics"):
        Spec.of({"model": "creatures", "method": "cam"})


def test_files_that_are_no_specification(tmp_path):
    for content in (b"model = ", b"\xff\xfe\x00model"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.toml is not TOML: "):
            read_specs(tmp_path / "bad.toml")
    with pytest.raises(FileNotFoundError):
        read_specs(tmp_path / "none.toml")


# Runs


def test_run_goes_through_json(tmp_path):
    kept = run()
    path = kept.write(tmp_path / "new" / "run.json")
    assert Run.read(path) == kept
    again = Run.read(str(path)).write(tmp_path / "again.json")
    assert again.read_bytes() == path.read_bytes()
    assert json.loads(path.read_text(encoding="utf-8"))["spec"] == FULL


def test_a_run_of_objects_is_still_written(tmp_path):
    def own(logits, y):
        return logits[:, 0]

    spec = Spec.of({**FULL, "method": Choice("cam", {"score": own, "erase": partial(own, y=2)})})
    path = Run(spec, run().scores, {}, {}).write(tmp_path / "run.json")
    assert Run.read(path).spec.method.settings == {"score": "own", "erase": "own(y=2)"}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "{}", '{"scores": 3}', '{"scores": {"scores": []}}', '{"scores": []}']
)
def test_files_that_are_no_run(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json is not a run: .*; runs are written by `sightline evaluate`"):
        Run.read(tmp_path / "a.json")


def test_runs_of_other_versions_are_refused(tmp_path):
    table = json.loads(run().write(tmp_path / "a.json").read_text(encoding="utf-8"))
    (tmp_path / "a.json").write_text(json.dumps({**table, "color": 1}))
    with pytest.raises(ValueError, match=r"a\.json is not a run: .*color"):
        Run.read(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        Run.read(tmp_path / "b.json")


def test_half_width_by_hand():
    assert scored((1.0, 2.0, 4.0)).half_width == pytest.approx(1.96 * ((16 / 9 + 1 / 9 + 25 / 9) / 2 / 3) ** 0.5)
    assert scored((5.0, 5.0)).half_width == 0
    values = tuple(float(i % 7) for i in range(100))
    assert scored(values).half_width == pytest.approx(0.196 * stdev(values))
    assert scored((3.0,)).half_width is None
    assert scored(()).half_width is None


def test_scores_by_name_and_accuracy():
    scores = run().scores
    assert scores["insertion"].value == 0.5
    with pytest.raises(LookupError, match=r"no score called 'deletion'; there are \['average_drop', 'insertion'\]"):
        scores["deletion"]
    assert scores.accuracy == 0.5, "one label of two is right; the third image has none"
    assert Scores((), ("a",), (None,), (1,), (0.5,), 0.0).accuracy is None


def test_of_several_classes_the_predicted_one_has_to_be_among_them():
    scores = Scores((), ("a", "b", "c"), (3, 3, 3), (1, 3, 1), (0.5,) * 3, 0.0, among=(True, False, None))
    assert scores.right == (True, False, False)
    assert scores.accuracy == pytest.approx(1 / 3)


# What is recorded


def plain(x, y=None, /, *, steps=100, rate: float = 0.1, mode=("a", "b")):
    return x


def reader(root, split="test", *, size=64):
    return root


def test_arguments_are_recorded_in_full():
    assert arguments(plain) == {"steps": 100, "rate": 0.1, "mode": ["a", "b"]}
    assert arguments(partial(plain, steps=5)) == {"steps": 5, "rate": 0.1, "mode": ["a", "b"]}
    assert arguments(partial(partial(plain, steps=5), rate=1)) == {"steps": 5, "rate": 1, "mode": ["a", "b"]}
    assert arguments(partial(reader, root=Path("here"))) == {"root": "here", "split": "test", "size": 64}


def test_descriptions_are_json():
    value = {"a": (1, 2.5, True, None), 3: [Path("p"), plain], "b": partial(plain, rate=2, mode=partial(plain))}
    told = describe(value)
    assert told == {"a": [1, 2.5, True, None], "3": ["p", "plain"], "b": "plain(rate=2, mode=plain())"}
    assert json.loads(json.dumps(told)) == told


def test_provenance(monkeypatch):
    monkeypatch.setattr(runs, "PACKAGES", ("numpy", "not-a-package-of-anybody"))
    import numpy

    found = provenance()
    assert found["versions"] == {"numpy": numpy.__version__, "not-a-package-of-anybody": "not installed"}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cores"] == os.cpu_count()
    assert set(found) == {"versions", "python", "machine", "cores"}


# Files


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    assert write_text(path, "ä\n") == path
    assert path.read_bytes() == "ä\n".encode()
    write_bytes(str(path), b"b")
    assert path.read_bytes() == b"b"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, error, broken):
    path = write_text(tmp_path / "a.txt", "old")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(*((os, "fsync") if broken == "fsync" else (Path, "replace")), fail)
    with pytest.raises(type(error)):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_files_may_be_read_by_others(tmp_path):
    before = os.umask(0o027)
    try:
        assert write_text(tmp_path / "a.txt", "x").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_plain_data_needs_no_torch():
    code = "import sys, sightline, sightline.runs, sightline.registry, sightline.table; sightline.Spec, sightline.Run"
    heavy = "torch", "torchvision", "torchmetrics", "numpy", "PIL", "matplotlib"
    told = f"{code}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_grammar():
    assert Choice.parse("a") == Choice("a")
    assert Choice.parse("a?b=1&c=2.5&d=true&e=none&f=x=y") == Choice(
        "a", {"b": 1, "c": 2.5, "d": True, "e": "none", "f": "x=y"}
    )
    assert Choice.parse("folder?root=my (old) pictures?") == Choice("folder", {"root": "my (old) pictures?"})
    assert Choice.parse("smooth(gradient?a=1&b=2)?samples=5") == Choice("smooth(gradient?a=1&b=2)", {"samples": 5})
    assert Choice.parse("a?b=(c?d=1&e=(f?g=2&h=3))&i=4") == Choice("a", {"b": "c?d=1&e=(f?g=2&h=3)", "i": 4})
    assert Choice.parse("c?d=1&e=(f?g=2&h=3)") == Choice("c", {"d": 1, "e": "f?g=2&h=3"})
    assert Choice.parse("over(cam)?classes=[1, 3]") == Choice("over(cam)", {"classes": [1, 3]})
    assert Choice.parse("a?b={3 = [1]}") == Choice("a", {"b": {"3": [1]}})
    assert Choice.of("opti_cam?steps=5") == Choice("opti_cam", {"steps": 5})
    with pytest.raises(ValueError, match=r"cannot read '\[1, ': .*; write \[1, 2\] or"):
        Choice.parse("a?b=[1, ")
    assert split("mean(a,b),c", ",") == ["mean(a,b)", "c"]
    for wrong in ("", "?a=1", "a?b", "a?=1"):
        with pytest.raises(ValueError, match="expected name\\?key=value&key=value, got"):
            Choice.parse(wrong)


def test_lists_of_models_and_methods_give_every_pair(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text('model = ["a", "b"]\ndata = "c"\nmethod = ["d", "e"]\nmetrics = ["f"]\n')
    assert [(s.model.name, s.method.name) for s in runs.read_specs(path)] == [
        ("a", "d"),
        ("a", "e"),
        ("b", "d"),
        ("b", "e"),
    ]
    path.write_text('model = []\ndata = "c"\nmethod = ["d", "e"]\nmetrics = ["f"]\n')
    with pytest.raises(ValueError, match="lists no model; expected at least one"):
        runs.read_specs(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-7", -7),
        ("007", "007"),
        ("+7", "+7"),
        ("1_0", "1_0"),
        ("0.5", 0.5),
        ("1e-3", 0.001),
        ("true", True),
        ("(7)", "7"),
        ("(a)/(b)", "(a)/(b)"),
        ("(a", "(a"),
        ("((a)", "((a)"),
        ("((a))", "(a)"),
        ("a", "a"),
    ],
)
def test_a_value_is_read_as_it_is_written(text, value):
    found = read_value(text)
    assert (found, type(found)) == (value, type(value))


def test_odd_parentheses_are_letters():
    assert Choice.parse("folder?root=/my(pics&resize=crop").settings == {"root": "/my(pics", "resize": "crop"}
    assert Choice.parse("folder?root=a)b(c&resize=crop").settings == {"root": "a)b(c", "resize": "crop"}
    assert Choice.parse('x?b=["("]&c=1').settings == {"b": ["("], "c": 1}
