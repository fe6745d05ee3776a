"""Tables and the page: runs made by hand, no torch."""

import csv as reader
import html
import importlib.resources
import json
import math
import random
import re
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.latex import escaped
from sightline.report import report, write
from sightline.runs import Choice, Run, Score, Scores, Spec
from sightline.table import NOTHING, across, csv, digits, fixed, labels, latex, markdown, tables

IDS = tuple(f"img_{i}" for i in range(8))
UP, DOWN = "insertion", "deletion"


def run(
    method: str | Mapping[str, Any] = "grad_cam",
    numbers: Mapping[str, Sequence[float]] | None = None,
    *,
    curves: Mapping[str, Sequence[float]] | None = None,
    arguments: Mapping[str, Any] | None = None,
    model: str = "net",
    data: str | Mapping[str, Any] = "birds",
    ids: Sequence[str] = IDS,
    pictures: Mapping[str, Mapping[str, str]] | None = None,
    layer: str | None = None,
    seed: int = 0,
    seconds: float = 2.0,
) -> Run:
    """Fabricate a run; numbers are one an image and metric."""
    numbers = numbers or {UP: [0.5 + 0.01 * i for i in range(len(ids))], DOWN: [0.25] * len(ids)}
    scores = tuple(
        Score(Choice(name), fmean(values), name != DOWN, tuple(values), tuple((curves or {}).get(name, ())))
        for name, values in numbers.items()
    )
    metrics = tuple(score.metric for score in scores)
    spec = Spec(Choice.of(model), Choice.of(data), Choice.of(method), metrics, layer=layer, seed=seed)
    predicted = (1, *[0] * (len(ids) - 1))
    kept = Scores(scores, tuple(ids), (0,) * len(ids), predicted, (0.875,) * len(ids), seconds)
    provenance = {"versions": {"sightline": "0.1.0"}, "machine": "Linux", "created": "yesterday"}
    return Run(spec, kept, arguments or {}, provenance, ("finch", "wren"), pictures=pictures or {})


def flat(value: float, metric: str = UP) -> dict[str, list[float]]:
    return {metric: [value] * len(IDS)}


def png(color: int) -> bytes:
    """Make a picture of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (1).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    pixel = zlib.compress(bytes([0, color]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")


def pictured(folder: Path, method: str, *, shade: int = 0, ids: Sequence[str] = IDS) -> dict[str, dict[str, str]]:
    """Write a picture and an overlay an image; return what `Run.pictures` says."""
    for i, name in enumerate(ids):
        (folder / f"{name}.png").write_bytes(png(i))
        (folder / f"{method}_{name}.png").write_bytes(png(100 + shade + i))
    return {name: {"image": f"{name}.png", "overlay": f"{method}_{name}.png"} for name in ids}


def page(runs: Sequence[Run], root: Path = Path(), **settings: Any) -> str:
    return report(runs, roots=[root] * len(runs), **settings)


def best(runs: Sequence[Run]) -> list[list[str]]:
    """Return the labels marked in each column of the one table."""
    (table,) = tables(runs)
    return [[row.label for row in table.rows if row.cells[i].best] for i in range(len(table.columns))]


def texts(source: str, pattern: str) -> list[str]:
    """Return what matches, without tags and entities."""
    found = re.findall(pattern, source, re.DOTALL)
    return [" ".join(html.unescape(re.sub(r"<[^>]*>", "", text)).split()) for text in found]


# The best value


def test_best_follows_the_direction_of_the_metric():
    low = run("low", {UP: [0.1] * 8, DOWN: [0.1] * 8})
    high = run("high", {UP: [0.9] * 8, DOWN: [0.9] * 8})
    assert best([low, high]) == [["high"], ["low"]]
    assert best([high, low]) == [["high"], ["low"]]


@pytest.mark.parametrize("control", ["fake_cam", "center", "random", "edge"])
def test_controls_never_compete_and_stand_last(control: str):
    runs = [run(control, flat(0.99)), run("cam", flat(0.4)), run("grad_cam", flat(0.6))]
    assert best(runs) == [["grad_cam"]]
    (table,) = tables(runs)
    assert [row.label for row in table.rows] == ["cam", "grad_cam", control]
    assert [row.index for row in table.rows] == [1, 2, 0]
    assert [row.control for row in table.rows] == [False, False, True]


def test_what_is_equal_as_shown_is_equally_good():
    spread = [0.3, 0.7] * 4
    near = [value + 1e-9 for value in spread]
    assert best([run("a", {UP: spread}), run("b", {UP: near}), run("c", flat(0.2))]) == [["a", "b"]]


def test_nothing_is_best_without_a_contest():
    assert best([run("a", flat(0.4))]) == [[]]
    assert best([run("a", flat(0.4)), run("b", flat(0.4))]) == [[]]
    assert best([run("a", flat(0.4)), run("center", flat(0.3))]) == [[]]


def test_what_is_not_a_number_is_not_the_best():
    runs = [run("a", flat(math.nan)), run("b", flat(0.4)), run("c", flat(0.3)), run("d", flat(math.inf))]
    assert best(runs) == [["b"]]
    (table,) = tables(runs)
    assert table.rows[0].cells[0].text == NOTHING
    assert [row.cells[0].half_width for row in table.rows] == ["", "0.000", "0.000", ""]
    assert f"| a | {NOTHING} |" in markdown(tables(runs))


def test_a_metric_that_a_run_lacks_leaves_its_cell_empty():
    runs = [run("a", flat(0.4)), run("b", {UP: [0.5] * 8, DOWN: [0.2] * 8}), run("c", {DOWN: [0.3] * 8})]
    (table,) = tables(runs)
    assert [column.label for column in table.columns] == [UP, DOWN]
    assert [[cell.text for cell in row.cells] for row in table.rows] == [
        ["0.400", NOTHING],
        ["0.500", "0.200"],
        [NOTHING, "0.300"],
    ]
    assert best(runs) == [["b"], ["b"]]


def test_metrics_with_other_settings_are_other_columns():
    a, b = run("a", flat(0.4)), run("b", flat(0.5))
    other = replace(b.scores.scores[0], metric=Choice(UP, {"steps": 32}))
    (table,) = tables([a, replace(b, scores=replace(b.scores, scores=(other,)))])
    assert [column.label for column in table.columns] == [UP, "insertion(steps=32)"]


# Numbers


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0])
def test_a_column_shows_two_digits_of_its_half_width(scale: float):
    values = [scale * (5 + (i % 3)) for i in range(8)]
    (table,) = tables([run("a", {UP: values}), run("b", {UP: values[::-1]})])
    half_width = 1.96 * stdev(values) / math.sqrt(len(values))
    shown = table.rows[0].cells[0]
    assert float(shown.half_width) == pytest.approx(half_width, rel=0.05)
    assert len(shown.half_width.replace(".", "").lstrip("0")) == 2
    assert float(shown.text) == pytest.approx(fmean(values), abs=half_width / 10)


def test_half_width_of_the_page_is_the_normal_approximation():
    values = [0.11, 0.52, 0.93, 0.34, 0.75, 0.26, 0.67, 0.48]
    half_width = 1.96 * (sum((v - sum(values) / 8) ** 2 for v in values) / 7) ** 0.5 / 8**0.5
    assert texts(page([run("a", {UP: values})]), r'<td class="width">(.*?)</td>') == [f"± {half_width:.2f}"]


@pytest.mark.parametrize(
    ("values", "widths", "expected"),
    [
        ([0.612, 0.5], [], 3),
        ([61.2, 3.456], [], 1),
        ([612.0], [], 0),
        ([0.0123], [None], 4),
        ([0.0, 0.0], [0.0], 0),
        ([math.nan], [math.nan], 0),
        ([61.2], [3.4, 0.2, 12.0], 1),
        ([0.6], [0.0234], 3),
    ],
)
def test_digits(values: list[float], widths: list[float | None], expected: int):
    assert digits(values, widths) == expected


@pytest.mark.parametrize(
    ("value", "decimals", "expected"),
    [
        (0.0456, 2, "0.05"),
        (-0.001, 2, "0.00"),
        (-1.25, 1, "\N{MINUS SIGN}1.2"),
        (12.5, 0, "12"),
        (math.nan, 2, NOTHING),
    ],
)
def test_fixed(value: float, decimals: int, expected: str):
    assert fixed(value, decimals) == expected


def test_seconds_are_those_of_an_image():
    slow, quick = run("slow", seconds=8 * 1.234), run("quick", seconds=8 * 0.01)
    assert [row.seconds for row in tables([slow, quick])[0].rows] == ["1.234", "0.010"]
    assert [row.seconds for row in tables([slow, run("center", seconds=8e-5)])[0].rows] == ["1.234", "< 0.001"]


# Names and groups


def test_a_method_that_comes_twice_is_named_by_what_differs():
    given = run({"name": "opti_cam", "steps": 20}, arguments={"method": {"steps": 20, "lr": 0.1}})
    default = run("opti_cam", arguments={"method": {"steps": 100, "lr": 0.1}})
    assert labels([given, default, run("cam")]) == ["opti_cam(steps=20)", "opti_cam(steps=100)", "cam"]
    assert labels([default, default]) == ["opti_cam", "opti_cam #2"]
    own = run("cam", arguments={"method": {}, "model": {"layer": "stage4"}})
    assert labels([run("cam", layer="stage3"), own]) == ["cam(layer=stage3)", "cam(layer=stage4)"]
    flat_arguments = replace(default, arguments={"steps": 100})
    assert labels([given, flat_arguments])[1] == "opti_cam(steps=100)"
    assert labels([run("cam", layer="stage3"), run("cam", layer="stage4")]) == [
        "cam(layer=stage3)",
        "cam(layer=stage4)",
    ]


def test_settings_that_are_given_are_shown_also_without_a_namesake():
    made = run({"name": "opti_cam", "steps": 20, "erase": {"name": "blur", "sigma": 5.0}})
    assert labels([made]) == ["opti_cam(erase=blur(sigma=5), steps=20)"]
    first, second = texts(page([made, made]), r'<tr>\s*<th scope="row">(.*?)</th>')
    assert (first, second) == ("opti_cam erase=blur(sigma=5), steps=20", "opti_cam erase=blur(sigma=5), steps=20 #2")
    assert texts(page([run("cam"), run("cam")]), r'<tr>\s*<th scope="row">(.*?)</th>') == ["cam", "cam #2"]


@pytest.mark.parametrize(
    ("other", "reason", "heading"),
    [
        (run("b", data={"name": "birds", "split": "test"}), "data", "net on birds(split=test)"),
        (run("b", model="vgg"), "model", "vgg on birds"),
        (run("b", seed=1), "seed", "net on birds, seed 1"),
        (run("b", ids=IDS[:5]), "image set", "net on birds, image set no. 2"),
    ],
)
def test_runs_that_differ_in_more_than_the_method_are_never_mixed(other: Run, reason: str, heading: str):
    runs = [run("a"), other, run("c")]
    found = tables(runs)
    assert [[row.label for row in table.rows] for table in found] == [["a", "c"], ["b"]]
    assert found[1].heading == heading
    source = page(runs)
    (warning,) = texts(source, r'<p class="warning".*?>(.*?)</p>')
    assert f"differ in more than the method: {reason}" in warning
    assert source.count('<table class="numbers">') == 2
    assert heading in texts(source, r"<h2>(.*?)</h2>")
    assert markdown(tables(runs)).count("| method |") == 2


def test_other_predictions_are_another_model():
    changed = run("b")
    changed = replace(changed, scores=replace(changed.scores, predicted=(0,) * 8))
    assert [table.heading for table in tables([run("a"), changed])] == [
        "net on birds, predictions no. 1",
        "net on birds, predictions no. 2",
    ]


def test_one_table_carries_no_warning():
    assert 'class="warning"' not in page([run("a"), run("b")])


@pytest.mark.parametrize("make", [tables, across, csv, page])
def test_no_runs_is_an_error(make):
    with pytest.raises(ValueError, match="there are no runs to show, expected at least one; `sightline evaluate`"):
        make([])


# Markdown and CSV


def test_markdown_shows_numbers_marks_and_controls():
    numbers = {UP: [0.4, 0.8] * 4, DOWN: [0.1, 0.3] * 4}
    worse = {UP: [0.2, 0.6] * 4, DOWN: [0.2, 0.4] * 4}
    lines = markdown(tables([run("cam", numbers), run("a|b", worse), run("center", numbers)])).splitlines()
    widths = [1.96 * stdev(numbers[metric]) / 8**0.5 for metric in (UP, DOWN)]
    assert lines[0] == "### net on birds"
    assert "2 methods and 1 control explain net on 8 images of birds; it classifies 87.5 % of them" in lines[2]
    assert lines[4] == "| method | insertion ↑ | deletion ↓ | s/image |"
    assert lines[6] == f"| cam | **0.60 ± {widths[0]:.2f}** | **0.200 ± {widths[1]:.3f}** | 0.25 |"
    assert lines[7].startswith("| a\\|b | 0.40 ± ")
    assert lines[8] == "| *controls* |  |  |  |"
    assert lines[9].startswith("| center | 0.60 ± ")


def test_latex_has_the_cells_of_markdown():
    numbers = {UP: [0.4, 0.8] * 4, DOWN: [0.1, 0.3] * 4}
    worse = {UP: [0.2, 0.6] * 4, DOWN: [0.2, 0.4] * 4}
    drawn = tables([run("cam", numbers), run("a_b%", worse), run("center", numbers)])
    width = 1.96 * stdev(numbers[UP]) / 8**0.5
    lines = latex(drawn).splitlines()
    assert lines[:2] == [r"\begin{table}", r"\centering"]
    assert lines[2].startswith(r"\caption{net on birds. 2 methods and 1 control explain net on 8 images of birds; ")
    assert r"87.5 \% of them" in lines[2]
    assert lines[3:6] == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"method & insertion $\uparrow$ & deletion $\downarrow$ & s/image \\",
    ]
    assert lines[6] == lines[9] == r"\midrule"
    assert lines[7].startswith(rf"cam & \textbf{{0.60 $\pm$ {width:.2f}}} & \textbf{{0.200 ")
    assert lines[8].startswith(r"a\_b\% & 0.40 $\pm$ ")
    assert lines[10].startswith("center & 0.60 ")
    assert lines[11:] == [r"\bottomrule", r"\end{tabular}", r"\end{table}"]


def test_a_turned_table_is_turned_in_latex_too():
    numbers = {f"m{i}": [0.1 * i] * 8 for i in range(12)}
    text = latex(tables([run("cam", numbers), run("center", numbers)]))
    assert r"metric & cam &  & center \\" in text
    assert text.count(r"\midrule") == 1
    assert len(re.findall(r"^m\d+ .*&  &.*$", text, re.MULTILINE)) == 12


@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Z"])))
def test_no_letter_of_a_name_is_a_command(text):
    found = re.sub(r"\\text\w+\{\}|\$\\(?:uparrow|downarrow|pm|times)\$|\$[<>|-]\$|\\[&%$#_{}]", "", escaped(text))
    assert not set("\\&%$#_{}~^<>|") & set(found)
    assert all(letter in escaped(text) for letter in text if letter.isalnum())


def test_csv_keeps_of_the_metrics_arguments_those_of_its_line():
    said = {"method": {"steps": 3}, "metrics": {UP: {"steps": 16}, DOWN: {"steps": 32}}}
    rows = list(reader.DictReader(StringIO(csv([run(arguments=said)]))))
    assert [json.loads(row["arguments"]) for row in rows] == [
        {"method": {"steps": 3}, "metrics": {"steps": 16}},
        {"method": {"steps": 3}, "metrics": {"steps": 32}},
    ]


def test_a_page_of_hundreds_of_images_stays_below_ten_megabytes(tmp_path):
    ids = tuple(f"img_{i}" for i in range(300))
    noise = random.Random(0)
    for i, name in enumerate(ids):
        for kind in ("image", "cam", "gradient"):
            (tmp_path / f"{kind}_{name}.jpg").write_bytes(b"\xff\xd8\xff" + bytes([i % 251]) + noise.randbytes(12_000))
    runs = [
        run(method, {UP: [i / 300 for i in range(300)]}, ids=ids, pictures={
            name: {"image": f"image_{name}.jpg", "overlay": f"{method}_{name}.jpg"} for name in ids
        })
        for method in ("cam", "gradient")
    ]  # fmt: skip
    source = page(runs, tmp_path, images=300)
    assert 5_000_000 < len(source.encode()) < 10_000_000
    (shown,) = re.findall(r"The first (\d+) of 300 images with pictures", source)
    assert 100 < int(shown) < 200
    assert len(page(runs, tmp_path).encode()) < 1_500_000


def many(folder, methods, datasets, size):
    """Fabricate runs of many methods on many data sets, each image and map a picture of its own."""
    noise = random.Random(0)

    def jpeg(name):
        (folder / name).write_bytes(b"\xff\xd8\xff" + noise.randbytes(size))
        return name

    images = {name: jpeg(f"{name}.jpg") for name in IDS}
    return [
        run(f"m{i}", {UP: [i + j / 8 for j in range(8)]}, data=f"data-{k}", pictures={
            name: {"image": images[name], "overlay": jpeg(f"{k}-{i}-{name}.jpg")} for name in IDS
        })
        for k in range(datasets) for i in range(methods)
    ]  # fmt: skip


def test_best_and_worst_cases_of_many_methods_stay_in_the_room_of_the_page(tmp_path):
    source = page(many(tmp_path, methods=41, datasets=6, size=6_000), tmp_path)
    assert 5_000_000 < len(source.encode()) < 10_000_000
    told = re.findall(r"There is room for the pictures of the first (\d+) of 41 methods", source)
    assert len(told) == 6
    assert 10 < int(told[0]) < 41
    assert len(re.findall(r"The first [1-8] of 8 images with pictures", source)) == 6
    cards = re.findall(r"<article>(.*?)</article>", source, re.DOTALL)
    assert len(cards) == 6 * 41
    for i, card in enumerate(cards):
        assert len(texts(card, r"<b>(.*?)</b>")) == 6
        assert card.count('<span class="pic p') == (6 if i % 41 < int(told[0]) else 0)


def test_a_page_without_room_for_a_single_picture_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sightline.report.ROOM", 1_000)
    source = page(many(tmp_path, methods=2, datasets=1, size=6_000), tmp_path)
    assert "url(data:" not in source
    assert "There is room for the pictures of none of 2 methods." in source
    assert "None of 8 images with pictures is shown; a report of fewer runs has room for them." in source
    assert notes(source) == []


def test_csv_keeps_full_precision_and_one_line_a_run_and_metric():
    values = [1 / 3, 2 / 7, 0.123456789012345, *[math.pi / 10] * 5]
    made = [run({"name": "cam", "k": 2}, {UP: values}, arguments={"method": {"k": 2}}), run("b", layer="top")]
    rows = list(reader.DictReader(StringIO(csv(made))))
    assert [(row["method"], row["metric"]) for row in rows] == [("cam(k=2)", UP), ("b", UP), ("b", DOWN)]
    first = rows[0]
    assert float(first["value"]) == fmean(values)
    assert float(first["half_width"]) == 1.96 * stdev(values) / 8**0.5
    assert json.loads(first["arguments"]) == {"method": {"k": 2}}
    assert (first["n"], first["higher_is_better"], first["seconds"]) == ("8", "true", "2.0")
    assert (first["model"], first["data"], first["layer"]) == ("net", "birds", "")
    assert (rows[2]["higher_is_better"], rows[2]["layer"]) == ("false", "top")


def test_csv_leaves_an_unknown_half_width_empty():
    single = run("a", {UP: [0.5]}, ids=IDS[:1])
    (row,) = reader.DictReader(StringIO(csv([single])))
    assert row["half_width"] == ""
    assert tables([single])[0].rows[0].cells[0].half_width == ""


# The page


class Nesting(HTMLParser):
    """Check that every element is closed in turn."""

    void = frozenset({"meta", "line", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(source: str) -> Nesting:
    nesting = Nesting()
    nesting.feed(source)
    assert nesting.open == []
    return nesting


def full(folder: Path) -> list[Run]:
    curves = {UP: [0.0, 0.4, 0.9], DOWN: [0.9, 0.2, 0.0]}
    made = [run(name, curves=curves, pictures=pictured(folder, name)) for name in ("cam", "grad_cam", "center")]
    made[0] = replace(made[0], skipped={"bad.png": "truncated"})
    return made


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path):
    source = page(full(tmp_path), tmp_path)
    nesting = parsed(source)
    tags = {tag for tag, _ in nesting.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not [attrs for _, attrs in nesting.seen if {"src", "href", "action", "onclick"} & set(attrs)]
    addresses = re.findall(r"url\((.*?)\)", source)
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "@import" not in source
    assert "http" not in source


def test_parts_come_in_order(tmp_path: Path):
    source = page(full(tmp_path), tmp_path, title="My title")
    assert texts(source, r"<h1>(.*?)</h1>") == ["My title"]
    assert texts(source, r"<h3>(.*?)</h3>") == ["Scores", "Curves", "Images", "Best and worst cases", "Provenance"]
    (lead,) = texts(source, r'<p class="lead">(.*?)</p>')
    assert lead == "2 methods and 1 control explain net on 8 images of birds; it classifies 87.5 % of them correctly."


def test_the_table_of_the_page_marks_the_best_and_sets_controls_apart():
    runs = [run("cam", flat(0.4)), run("center", flat(0.9)), run("grad_cam", flat(0.6))]
    source = page(runs)
    assert texts(source, r'<td class="value best">(.*?)</td>') == ["0.600"]
    control = source[source.index('<tbody class="control">') :]
    assert "center" in control[: control.index("</tbody>")]
    assert "cam</span>" not in control[: control.index("</tbody>")].replace("center</span>", "")
    (title,) = re.findall(r'<abbr title="(.*?)">', source)
    assert title.startswith("insertion: area under the probability while the most salient pixels are put in")
    assert title.endswith("larger is better")
    assert "insertion ↑" in texts(source, r"<thead>(.*?)</thead>")[0].replace("\xa0", " ")


def test_same_runs_give_the_same_bytes(tmp_path: Path):
    runs = full(tmp_path)
    paths = [made.write(tmp_path / f"{i}.json") for i, made in enumerate(runs)]
    first = write(paths, tmp_path / "a.html").read_bytes()
    assert write(paths, tmp_path / "b.html").read_bytes() == first
    assert page(runs, tmp_path).encode() == first
    turned = [
        replace(
            made,
            pictures=dict(reversed(made.pictures.items())),
            provenance=dict(reversed(made.provenance.items())),
        )
        for made in runs
    ]
    assert page(turned, tmp_path).encode() == first
    assert str(tmp_path).encode() not in first


def test_names_are_escaped(tmp_path: Path):
    nasty = "<script>alert('&')</script>\"x"
    (tmp_path / "a.png").write_bytes(png(1))
    pictures = {nasty: {"image": "a.png", "overlay": "a.png"}}
    made = run({"name": nasty, "k": nasty}, ids=(nasty, "b", "c"), data=nasty, pictures=pictures)
    made = replace(made, classes=(nasty, nasty), skipped={nasty: nasty}, arguments={nasty: nasty})
    source = page([made], tmp_path, title=nasty)
    assert "script" not in {tag for tag, _ in parsed(source).seen}
    assert html.escape(nasty, quote=False)[:20] in source
    assert nasty in texts(source, r"<h1>(.*?)</h1>")[0]


def test_the_specification_can_be_copied_out(tmp_path: Path):
    made = run({"name": "opti_cam", "steps": 20}, data={"name": "birds", "root": "<here>"}, layer="top")
    (block,) = re.findall(r"<pre>(.*?)</pre>", page([made]), re.DOTALL)
    assert Spec.of(tomllib.loads(html.unescape(block))) == made.spec


def test_provenance_lists_all_arguments_and_versions():
    made = run("opti_cam", arguments={"method": {"lr": 0.1, "erase": None}, "metrics": {"insertion": {"steps": 224}}})
    source = page([made])
    facts = list(zip(texts(source, r"<dt>(.*?)</dt>"), texts(source, r"<dd>(.*?)</dd>"), strict=True))
    for fact in [
        ("method.erase", "None"),
        ("method.lr", "0.1"),
        ("metrics.insertion.steps", "224"),
        ("versions.sightline", "0.1.0"),
        ("created", "yesterday"),
        ("seconds of the maps", "2.0"),
    ]:
        assert fact in facts


def points(source: str) -> list[list[tuple[float, float]]]:
    drawn = re.findall(r'<polyline[^>]* points="(.*?)"', source)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in drawn]


def test_curves_run_from_axis_to_axis_at_the_heights_of_their_values():
    insertion, deletion = [0.05, 0.3, 0.61, 0.72, 0.81], [0.81, 0.4, 0.13]
    source = page([run("cam", curves={UP: insertion, DOWN: deletion})])
    chart = source[source.index('<svg class="chart"') : source.index("</svg>", source.index('<svg class="chart"'))]
    ticks = re.findall(r'<text x="[\d.]+" y="([\d.]+)" dy=".35em" text-anchor="end">([\d.]+)</text>', chart)
    heights = {float(text): float(y) for y, text in ticks}
    assert sorted(heights) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    (left, right) = (float(re.findall(rf'<text x="([\d.]+)"[^>]*>{text}</text>', chart)[0]) for text in ("0", "1"))
    for line, curve in zip(points(source), (insertion, deletion), strict=True):
        assert len(line) == len(curve)
        for i, ((x, y), value) in enumerate(zip(line, curve, strict=True)):
            assert x == pytest.approx(left + i / (len(curve) - 1) * (right - left), abs=0.01)
            assert y == pytest.approx(heights[0.0] + value * (heights[1.0] - heights[0.0]), abs=0.01)
    assert line[0][0] == left
    assert line[-1][0] == right
    assert "fraction of pixels inserted" in source
    assert "fraction of pixels deleted" in source


def test_controls_are_drawn_below_in_gray_and_every_method_in_its_color():
    curve = {UP: [0.1, 0.9]}
    source = page([run(name, flat(0.5), curves=curve) for name in ("center", "cam", "grad_cam")])
    drawn = re.findall(r'<polyline class="line (\w+)".*?<title>(.*?)</title>', source)
    assert drawn == [("g0", "center"), ("k0", "cam"), ("k1", "grad_cam")]
    assert re.search(r"\.g0 { stroke: var\(--gray\);[^}]*stroke-dasharray", source)
    assert texts(source, r'<li class="key \w+">(.*?)</li>') == ["cam", "grad_cam", "center"]


def test_more_methods_than_colors_start_again():
    runs = [run(f"m{i}", flat(i / 20), curves={UP: [0.1, 0.9]}) for i in range(14)]
    drawn = re.findall(r'<polyline class="line (\w+)"', page(runs))
    assert drawn == [f"k{i % 12}" for i in range(14)]


def test_without_curves_there_is_no_chart():
    assert "<polyline" not in page([run("a"), run("b", curves={UP: [0.5]})])
    assert "<h3>Curves" not in page([run("a")])


def test_gallery_shows_image_label_prediction_and_number(tmp_path: Path):
    made = full(tmp_path)
    source = page(made, tmp_path, images=2)
    assert "The first 2 of 8 images with pictures." in source
    rows = texts(source, r'<tr>\s*<th scope="row"><span class="pic.*?</tr>')
    gallery = source[source.index('<table class="gallery"') :]
    gallery = gallery[: gallery.index("</table>")]
    assert len(rows) == 2
    assert [row.replace("\xa0", " ") for row in rows] == [
        "wren 88 % ✗label: finchimg_0 0.500 0.500 0.500",
        "finch 88 % ✓img_1 0.510 0.510 0.510",
    ]
    assert re.findall(r'aria-label="(.*?)"', gallery)[:4] == [
        "img_0",
        "cam on img_0",
        "grad_cam on img_0",
        "center on img_0",
    ]


def test_each_picture_is_embedded_once(tmp_path: Path):
    source = page(full(tmp_path), tmp_path)
    uris = re.findall(r"url\((data:.*?)\)", source)
    assert len(uris) == len(set(uris)) == 16
    used = set(re.findall(r'class="pic (p\w+)"', source))
    defined = set(re.findall(r"^\.(p[0-9a-f]+) {", source, re.MULTILINE))
    assert used == defined


def notes(source: str) -> list[tuple[str, ...]]:
    found = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", source)
    return [tuple(map(html.unescape, note)) for note in found]


def test_what_is_missing_is_shown_and_listed(tmp_path: Path):
    made = full(tmp_path)
    (tmp_path / "cam_img_1.png").unlink()
    (tmp_path / "grad_cam_img_2.png").write_text("<svg onload=alert(1)>")
    made[2] = replace(
        made[2],
        scores=replace(made[2].scores, degenerate={"img_3": "all zero"}),
        pictures={**made[2].pictures, "img_3": {"image": "img_3.png"}, "img_4": {"image": "img_4.png"}},
    )
    source = page(made, tmp_path)
    assert notes(source) == [
        ("map that says nothing", "img_3", "all zero", "center"),
        ("missing picture", "img_1", "cam_img_1.png cannot be read", "cam"),
        ("missing picture", "img_2", "grad_cam_img_2.png is neither PNG nor JPEG", "grad_cam"),
        ("missing picture", "img_4", "not saved", "center"),
        ("skipped file", "bad.png", "truncated", "cam"),
    ]
    placeholders = texts(source, r'<span class="pic none"[^>]*>(.*?)</span>')
    assert set(placeholders) == {"all zero", "not saved", *(note[2] for note in notes(source)[1:3])}


def test_the_page_reads_no_file_outside_the_folder_of_its_run(tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(png(7))
    inside = tmp_path / "run"
    inside.mkdir()
    for path in ("../secret.png", str(tmp_path / "secret.png")):
        source = page([run("a", pictures={"img_0": {"image": path, "overlay": path}})], inside)
        assert "lies outside the run" in source
        assert "url(data:" not in source


def ranked(source: str) -> list[tuple[str, list[str]]]:
    strips = re.findall(r'<div class="strip"><p>(\w+)</p>(.*?)</div>', source, re.DOTALL)
    return [(word, texts(strip, r"<figcaption.*?>(.*?)</figcaption>")) for word, strip in strips]


def test_best_and_worst_follow_the_metric(tmp_path: Path):
    values = [0.1, 0.9, 0.4, 0.7, 0.2, 0.8, 0.3, 0.6]
    pictures = pictured(tmp_path, "cam")
    up = page([run("cam", {DOWN: values[::-1], UP: values}, pictures=pictures)], tmp_path)
    assert ranked(up) == [
        ("best", ["0.900 img_1", "0.800 img_5", "0.700 img_3"]),
        ("worst", ["0.100 img_0", "0.200 img_4", "0.300 img_6"]),
    ]
    down = page([run("cam", {DOWN: values}, pictures=pictures)], tmp_path)
    assert [word for word, _ in ranked(down)] == ["best", "worst"]
    assert [name for _, name in ranked(down)] == [strip for _, strip in reversed(ranked(up))]


def test_no_image_is_among_the_best_and_the_worst():
    values = {UP: [0.3, 0.1, 0.2]}
    assert ranked(page([run("cam", values, ids=IDS[:3])])) == [("best", ["0.300 img_0"]), ("worst", ["0.100 img_1"])]
    assert ranked(page([run("cam", {UP: [0.3]}, ids=IDS[:1])])) == []


def test_cases_come_from_images_with_pictures(tmp_path: Path):
    values = {UP: [0.1 * i for i in range(8)]}
    source = page([run("cam", values, pictures=pictured(tmp_path, "cam", ids=IDS[2:4]))], tmp_path)
    assert ranked(source) == [("best", ["0.300 img_3"]), ("worst", ["0.200 img_2"])]


def test_write_reads_runs_beside_their_pictures(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pictures = pictured(tmp_path / name, "cam", shade=10 * (name == "b"))
        run(name, pictures=pictures).write(tmp_path / name / "run.json")
    out = tmp_path / "new" / "report.html"
    assert write([tmp_path / "a" / "run.json", tmp_path / "b" / "run.json"], out, title="Both") == out
    source = out.read_text(encoding="utf-8")
    assert texts(source, r"<h1>(.*?)</h1>") == ["Both"]
    assert len(re.findall(r"url\(data:", source)) == 24
    assert list(out.parent.iterdir()) == [out]


def test_write_refuses_what_is_no_run(tmp_path: Path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not a run"):
        write([tmp_path / "x.json"], tmp_path / "out.html")
    with pytest.raises(FileNotFoundError):
        write([tmp_path / "none.json"], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_every_run_needs_its_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="expected one folder a run, got 1 folders for 2 runs"):
        report([run("a"), run("b")], roots=[tmp_path])


def test_the_template_lies_in_the_package():
    assert importlib.resources.files("sightline").joinpath("report.html.jinja").is_file()


def test_the_report_needs_no_torch():
    code = "import sys, sightline.report, sightline.table; print('torch' in sys.modules, 'PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_table_across_classifiers_shows_means_and_deviations():
    runs = [
        run(method, flat(value), model=model)
        for model, shift in (("a", 0), ("b", 4), ("c", 5))
        for method, value in (("cam", 10.0 + shift), ("grad_cam", 12.0), ("center", 50.0))
    ]
    table = across(runs)
    assert table.heading == "3 classifiers on birds"
    cells = {row.label: (row.cells[0].text, row.cells[0].half_width, row.cells[0].best) for row in table.rows}
    assert cells == {
        "cam": ("13.0", f"{stdev([10, 14, 15]):.1f}", True),
        "grad_cam": ("12.0", "0.0", False),
        "center": ("50.0", "0.0", False),
    }
    text = markdown([table])
    assert "2 methods and 1 control explain a and b and c on 8 images of birds; they classify 87.5 and 87.5" in text
    assert "± the standard deviation over the classifiers" in text


def test_only_like_runs_are_averaged_across_classifiers():
    with pytest.raises(ValueError, match="runs that differ in data cannot be averaged over classifiers"):
        across([run("cam", model="a"), run("cam", model="b", data="cats")])
    with pytest.raises(ValueError, match="every classifier needs a run of every method, and b lacks grad_cam"):
        across([run("cam", model="a"), run("grad_cam", model="a"), run("cam", model="b")])


def test_a_combinator_keeps_its_methods_apart_from_its_settings():
    combined = run({"name": "smooth(gradient?score=probability)", "samples": 5})
    assert labels([combined]) == ["smooth(gradient?score=probability)[samples=5]"]
    assert ">samples=5<" in page([combined, run("center")])


def test_metrics_of_one_name_show_their_settings_in_the_page():
    score = Score(Choice("mass", {"on": "cue"}), 1.0, True, (1.0,) * len(IDS))
    one = run("cam", flat(2.0, "mass"))
    both = replace(one, scores=replace(one.scores, scores=(*one.scores.scores, score)))
    assert ">on=cue<" in page([both]).split("</thead>")[0]
