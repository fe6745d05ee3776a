"""Studies: the order of steps, what is done for each of several values, and what is shown of it."""

import json
import math
import re
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from PIL import Image

from sightline.runs import Choice, Run, Score, Scores, Spec
from sightline.study import Study, conduct, curve, numbers, ordered, panels, record, shown, step, titles, winner

HEAD = "seeds = [0, 1]\n"

NETS = """
[[train]]
values = [1, 3]
name = "net-{value}"
kind = "classifier"
model = "mini_resnet?size=32"
settings = { epochs = "{value}", augment = "none" }
"""

SWEEP = """
[[evaluate]]
name = "areas"
values = [1, 3]
axis = "epochs"
shown = ["area"]
model = "{net-{value}}"
data = "creatures?count=4"
metrics = ["area", "entropy"]
[evaluate.rows]
"CAM" = { method = "cam" }
"gradient" = { method = "gradient" }
"""

CHAIN = """
[[train]]
name = "last"
kind = "casm"
model = "{first}"

[[train]]
name = "first"
kind = "classifier"

[[evaluate]]
name = "areas"
model = "{first}"
data = "creatures?count=4"
metrics = ["area"]
[evaluate.rows]
"CASM" = { method = "{last}" }
"""


def study(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(HEAD + text)
    return Study.read(path)


def done(study, values):
    """Runs as `conduct` returns them, with made-up numbers: values[row][seed][metric]."""
    found = {}
    for one in study.evaluations:
        found[one.name] = {row: [run(seed) for seed in values[row]] for row in one.rows}
    return found


def run(metrics):
    scores = tuple(Score(Choice(name), value, True) for name, value in metrics.items())
    choice = Choice("x")
    return Run(
        Spec(choice, choice, choice, (choice,)), Scores(scores, ("a",), (0,), (0,), (1.0,), 1.0), {}, {}, (), {}, {}
    )


def test_a_step_with_values_is_one_for_each_and_its_settings_keep_their_kind(tmp_path):
    read = study(tmp_path, NETS + SWEEP)
    assert [one.name for one in read.steps] == ["net-1", "net-3"]
    assert [one.table["settings"]["epochs"] for one in read.steps] == [1, 3]
    areas = read.evaluations[0]
    assert list(areas.rows) == ["CAM, epochs 1", "CAM, epochs 3", "gradient, epochs 1", "gradient, epochs 3"]
    assert areas.rows["CAM, epochs 3"]["model"] == "{net-3}"
    assert areas.sweep.curves["CAM"] == ((1.0, "CAM, epochs 1"), (3.0, "CAM, epochs 3"))


def test_steps_come_after_those_that_they_name(tmp_path):
    assert [one.name for one in study(tmp_path, CHAIN).steps] == ["first", "last"]


def test_steps_that_name_nothing_stay_in_order():
    steps = [step({"name": name, "kind": "classifier"}, "train") for name in "cab"]
    assert [one.name for one in ordered(steps)] == ["c", "a", "b"]


def test_steps_that_wait_for_each_other_are_told(tmp_path):
    circle = CHAIN.replace('kind = "classifier"', 'kind = "classifier"\nmodel = "{last}"')
    with pytest.raises(ValueError, match="first, last wait for each other"):
        study(tmp_path, circle)


def test_a_place_that_no_step_fills_is_told(tmp_path):
    with pytest.raises(LookupError, match="no place to fill called 'frist'; did you mean first"):
        study(tmp_path, CHAIN.replace('model = "{first}"\ndata', 'model = "{frist}"\ndata'))


@pytest.mark.parametrize("values", ['["a"]', "[]"])
def test_curves_are_drawn_over_numbers(tmp_path, values):
    with pytest.raises(ValueError, match="drawn over numbers"):
        study(tmp_path, NETS + SWEEP.replace("values = [1, 3]", f"values = {values}"))


def test_a_step_without_what_it_needs_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"a \[\[segment\]\] lacks name"):
        study(tmp_path, '[[segment]]\nmodel = "creatures"\n')


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"CASM" =', '"CASM++" = { method = "cam" }\n"CASM" =', "the rows 'CASM++' and 'CASM' would lie in one place"),
        ('name = "last"', 'name = "first+"', "the steps 'first+' and 'first' would lie in one place, 'first'"),
        ('"areas"', '"areas"\nvalues = 3', "expected values = [...] of 'areas', got 3"),
        ('kind = "casm"', 'kind = "casm"\nvalues = 3', "expected values = [...] of 'last', got 3"),
        ("[[evaluate]]", "[evaluate]", "study.toml: [[evaluate]], got {'name': 'areas'"),
        ("seeds = [0, 1]", "seeds = 3", "study.toml: seeds = [0, 1], got 3"),
    ],
)
def test_what_is_no_study_is_told(tmp_path, old, new, told):
    (tmp_path / "study.toml").write_text((HEAD + CHAIN).replace(old, new).replace("{last}", "{first}"))
    with pytest.raises((TypeError, ValueError)) as caught:
        Study.read(tmp_path / "study.toml")
    assert told in str(caught.value)


SCORED = """
[[evaluate]]
name = "areas"
model = "creatures"
data = "creatures?count=4"
metrics = ["area"]
[evaluate.rows]
"CAM" = { method = "cam" }
"""

LABELS = """
[[segment]]
name = "labels"
model = "creatures"
data = "creatures?variant=scenes&count=8"
method = "cam"

[[evaluate]]
name = "areas"
model = "creatures"
data = "creatures?variant=scenes&count=8"
metrics = ["area"]
[evaluate.rows]
"label maps" = { method = "maps?root={labels}/labels&form=labels" }
"""


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('method = "camm"', "no method called 'camm'; did you mean cam"),
        ('method = "cam"\nclasses = "al"', "no choice of classes called 'al'"),
        ('method = "cam"\nresolve = "smooth?sgma=1"', "smooth: no setting called 'sgma'; did you mean sigma"),
    ],
)
def test_how_labels_are_made_is_checked_before_any_work(tmp_path, line, told):
    with pytest.raises((LookupError, ValueError)) as caught:
        study(tmp_path, LABELS.replace('method = "cam"', line, 1))
    assert told in str(caught.value)


def test_a_study_scores_the_labels_that_it_writes(tmp_path):
    assert [one.name for one in study(tmp_path, LABELS).steps] == ["labels"]


def test_labels_are_written_before_what_learns_from_them(tmp_path):
    text = """
[[train]]
name = "seg"
kind = "segmenter"
data = "creatures?variant=scenes&count=8"
settings = { labels = "{labels}" }

[[segment]]
name = "labels"
model = "{net}"
data = "creatures?variant=scenes&count=8"
method = "cam"
threshold = 0.3

[[train]]
name = "net"
kind = "classifier"
"""
    read = study(tmp_path, text)
    assert [one.name for one in read.steps] == ["net", "labels", "seg"]
    assert read.steps[1].target(tmp_path, 1) == tmp_path / "segment" / "labels" / "seed-1"
    assert read.steps[2].target(tmp_path, 1) == tmp_path / "train" / "seg" / "seed-1" / "segmenter.safetensors"


def test_what_another_process_finishes_meanwhile_counts(tmp_path, monkeypatch):
    read, files, asked = study(tmp_path, SCORED), {}, []
    theirs, ours = run({"area": 1.0}), run({"area": 2.0})

    def evaluated(spec, path, label, tell):
        asked.append(path.stem)
        files[path.with_name("seed-0.json")] = theirs
        return ours

    monkeypatch.setattr("sightline.study.evaluated", evaluated)
    monkeypatch.setattr("sightline.study.finished", lambda spec, path: files.get(path))
    assert conduct(read, tmp_path, seeds=[1]) == {"areas": {"CAM": [theirs, ours]}}
    assert asked == ["seed-1"]


def test_numbers_are_means_and_deviations_over_the_seeds():
    found = numbers([run({"area": 1.0, "mass": 5.0}), run({"area": 4.0, "mass": 5.0})])
    assert found["area"].mean == 2.5
    assert found["area"].deviation == pytest.approx(math.sqrt(4.5))
    assert found["mass"].deviation == 0
    assert numbers([run({"area": 1.0})])["area"].deviation is None


def test_a_seed_without_a_number_does_not_count():
    nan = math.nan
    found = numbers(
        [run({"a": nan, "b": nan, "c": 5.0}), run({"a": 1.0, "b": nan, "c": nan}), run({"a": 4.0, "b": nan, "c": nan})]
    )
    assert (found["a"].mean, found["a"].count) == (2.5, 2)
    assert found["a"].deviation == pytest.approx(math.sqrt(4.5))
    assert math.isnan(found["b"].mean)
    assert (found["b"].deviation, found["b"].count) == (None, 0)
    assert (found["c"].mean, found["c"].deviation, found["c"].count) == (5.0, None, 1)
    assert [shown(found[name], None)[0] for name in "abc"] == ["2.5 ± 2.1 (2 of 3 seeds)", "nan", "5 (1 of 3 seeds)"]


@pytest.mark.parametrize("order", list(permutations((math.nan, 1.0, 3.0))))
def test_what_is_no_number_wins_nowhere(order):
    for higher, best in ((True, 3.0), (False, 1.0)):
        column = [replace(numbers([run({"a": value})])["a"], higher_is_better=higher) for value in order]
        assert winner(column).mean == best
        assert winner([one for one in column if one.mean != best]) is None, (
            "one number alone is not the best of several"
        )
    assert winner([replace(one, higher_is_better=None) for one in column]) is None


def test_equal_means_are_equally_good_and_rounding_is_no_deviation():
    pairs = (79.42, 79.42 + 2e-14), (1.0, 3.0)
    rows = [numbers([run({"a": first}), run({"a": second})])["a"] for first, second in pairs]
    assert [shown(one, None)[0] for one in rows] == ["79.42 ± 0", "2 ± 1.4"]
    twins = [numbers([run({"a": value})])["a"] for value in (79.42, 79.42 + 2e-14, 1.0)]
    best = winner([replace(one, higher_is_better=True) for one in twins])
    assert [shown(one, best)[1] for one in twins] == [True, True, False]
    assert [shown(one, twins[0])[1] for one in twins] == [True, True, False]


def test_an_infinite_number_has_no_deviation():
    found = numbers([run({"a": math.inf}), run({"a": 1.0})])["a"]
    assert (found.mean, found.deviation) == (math.inf, None)
    assert shown(found, None)[0] == "inf"


def test_tables_tell_how_many_seeds_count(tmp_path):
    read = study(tmp_path, CHAIN.replace('"CASM" =', '"x" = { method = "cam" }\n"y" = { method = "cam" }\n"CASM" ='))
    values = {"x": [math.nan, math.nan], "y": [2.0, math.nan], "CASM": [1.0, 1.5]}
    runs = done(read, {row: [{"area": value} for value in both] for row, both in values.items()})
    lines = record(read, runs, tmp_path).read_text().splitlines()
    assert lines[-3:] == ["| x | nan |", "| y | **2 (1 of 2 seeds)** |", "| CASM | 1.25 ± 0.35 |"]
    latex = (tmp_path / "table.tex").read_text()
    for row in (r"x & nan \\", r"y & \textbf{2 (1 of 2 seeds)} \\", r"CASM & 1.25 $\pm$ 0.35 \\"):
        assert f"{row}\n" in latex
    text = (tmp_path / "numbers.json").read_text()
    assert "NaN" not in text
    found = json.loads(text)["evaluations"]["areas"]
    assert {row: one["metrics"]["area"] for row, one in found.items()} == {
        "x": [None, None],
        "y": [2.0, None],
        "CASM": [1.0, 1.5],
    }


def test_metrics_of_one_name_are_told_apart_by_what_differs():
    a, b = {"reference": "net-0", "resolve": "smooth"}, {"reference": "net-0"}
    assert titles([Choice("miou", b), Choice("miou", a), Choice("area", {"of": "raw"})]) == [
        "miou",
        "miou(resolve=smooth)",
        "area",
    ]


def test_the_table_has_what_is_shown_and_the_numbers_have_all(tmp_path):
    read = study(tmp_path, NETS + SWEEP)
    rows = read.evaluations[0].rows
    values = {row: [{"area": float(i + seed), "entropy": 9.0} for seed in (0, 1)] for i, row in enumerate(rows)}
    text = record(read, done(read, values), tmp_path / "out").read_text()
    assert "area ↑" in text
    assert "entropy" not in text
    assert "entropy" in (tmp_path / "out" / "numbers.json").read_text()
    picture = Image.open(tmp_path / "out" / "areas.png")
    assert picture.width > 200
    assert len(picture.getcolors(1 << 24)) > 10


def test_a_curve_has_the_values_that_are_done(tmp_path):
    read = study(tmp_path, NETS + SWEEP)
    sweep = read.evaluations[0].sweep
    found = {
        "CAM, epochs 1": numbers([run({"area": 1.0}), run({"area": 3.0})]),
        "gradient, epochs 1": numbers([run({"area": 7.0})]),
        "gradient, epochs 3": numbers([run({"area": 8.0})]),
    }
    drawn = panels(sweep, ("area",), found)["area"]
    assert drawn["CAM"].x == (1.0,)
    assert drawn["CAM"].y == (2.0,)
    assert drawn["CAM"].spread == (pytest.approx(math.sqrt(2)),)
    assert drawn["gradient"].y == (7.0, 8.0)
    assert drawn["gradient"].spread == (0.0, 0.0)
    assert curve("mass", sweep.curves["CAM"], found).x == ()
    found["CAM, epochs 3"] = numbers([run({"area": math.nan})])
    assert panels(sweep, ("area",), found)["area"]["CAM"].x == (1.0,)


def test_a_metric_to_show_that_no_row_has_is_told(tmp_path):
    for name in ("aera", "area(of=raw)"):
        with pytest.raises(LookupError, match=rf"no metric to show called '{re.escape(name)}'; did you mean area"):
            study(tmp_path, NETS + SWEEP.replace('shown = ["area"]', f'shown = ["{name}"]'))


def test_what_data_names_is_told_when_it_is_there(tmp_path):
    text = SCORED.replace('metrics = ["area"]', 'metrics = ["segmentation"]\nshown = ["segmentation.newts"]')
    read = study(tmp_path, text)
    with pytest.raises(LookupError, match=r"no metric to show called 'segmentation\.newts'; did you mean"):
        record(read, done(read, {"CAM": [{"segmentation.newt": 1.0}]}), tmp_path / "out")


def test_the_same_numbers_draw_the_same_bytes(tmp_path):
    read = study(tmp_path, NETS + SWEEP)
    values = {row: [{"area": float(i)}] for i, row in enumerate(read.evaluations[0].rows)}
    for name in ("a", "b"):
        torch.rand(1)
        record(read, done(read, values), tmp_path / name)
    assert (tmp_path / "a" / "areas.png").read_bytes() == (tmp_path / "b" / "areas.png").read_bytes()
