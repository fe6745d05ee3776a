"""The command line as its user meets it: real arguments, exit codes, files, one helpful sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sightline.cli import main
from sightline.runs import Run

MODEL = "mini_resnet?classes=20"
DATA = "creatures?count=6"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command line here; return exit code, output and messages."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_help_names_every_command_and_imports_no_torch():
    probe = (
        "import sys\nfrom sightline.cli import main\n"
        "try: main({arguments})\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    for arguments in (["--help"], ["evaluate", "--help"], ["list", "methods"]):
        code = probe.format(arguments=arguments)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False"
        if arguments == ["--help"]:
            assert all(name in done.stdout for name in ("list", "explain", "evaluate", "train", "report"))


def test_list_shows_every_method_and_metric(capsys: pytest.CaptureFixture[str]):
    from sightline.methods import METHODS
    from sightline.metrics import METRICS

    code, out, _ = call(capsys, "list")
    assert code == 0
    assert all(name in out for name in [*METHODS, *METRICS, "creatures", "mnist", "mini_vit"])
    assert "average_drop" not in call(capsys, "list", "methods")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["explain", "nofile.png"], "no picture nofile.png"),
        (["explain", "PHOTO", "--method", "grad_can"], "no method called 'grad_can'; did you mean grad_cam"),
        (["explain", "PHOTO", "--model", MODEL, "--target", "20"], "label 20 is outside 0..19"),
        (
            ["explain", "PHOTO", "--method", "opti_cam", "--set", "stps=3"],
            "no setting called 'stps'; did you mean steps?",
        ),
        (
            ["explain", "PHOTO", "--method", "opti_cam", "--set", "steps=many"],
            "steps: expected a whole number, got 'many'",
        ),
        (["explain", "PHOTO", "--set", "steps"], "expected --set key=value, got 'steps'"),
        (["explain", "PHOTO", "--model", MODEL, "--layer", "layer5"], "did you mean layer4"),
        (["explain", "PHOTO", "--model", MODEL, "--resize", "stretch"], "stretch"),
        (["explain"], "Missing argument 'IMAGE...'; see `sightline explain --help`"),
        (["evaluate", "--metric", "insertin"], "no metric called 'insertin'; did you mean insertion"),
        (["evaluate", "--data", "creatures?split=tset", "--model", MODEL], "did you mean test?"),
        (["evaluate", "--data", "mnist", "--model", MODEL], "mnist needs root="),
        (["evaluate", "nospec.toml"], "no file nospec.toml"),
        (["evaluate", "--images", "-3"], "-3 is not in the range x>=0; see `sightline evaluate --help`"),
        (["report", "EMPTY"], "no run in"),
        (
            ["train", "classifier", "--data", "creaturs", "--out", "x"],
            "no dataset called 'creaturs'; did you mean creatures",
        ),
        (["nonsense"], "No such command 'nonsense'; see `sightline --help`"),
    ],
)
def test_bad_arguments_exit_with_two_and_one_sentence(
    capsys: pytest.CaptureFixture[str],
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"PHOTO": str(photo), "EMPTY": str(tmp_path / "empty")}
    code, _, err = call(capsys, *[places.get(argument, argument) for argument in arguments])
    assert code == 2
    said = [line for line in err.splitlines() if line.startswith("sightline: ")]
    assert len(said) == 1
    assert sentence in said[0]
    assert "Traceback" not in err


def test_explain_writes_overlay_map_record_and_sheet(capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path):
    out = tmp_path / "out"
    options = ["--model", MODEL, "--method", "grad_cam", "--method", "opti_cam?steps=2", "--target", "3", "--out", out]
    code, told, _ = call(capsys, "explain", photo, *options)
    assert code == 0
    record = json.loads((out / "photo-opti_cam.json").read_text())
    assert record["label"] == 3
    assert record["arguments"]["steps"] == 2
    assert record["arguments"]["erase"] == "black"
    assert (record["layer"], record["size"], record["resize"]) == ("layer4", [64, 64], "direct")
    assert record["model"] == MODEL
    assert f"{record['probability']:.1%}" in told
    assert np.load(out / "photo-opti_cam.npy").shape == (4, 4)
    assert Image.open(out / "photo-opti_cam.png").size == (60, 40)
    assert (out / "sheet.png").exists()


def test_one_method_with_several_settings_does_not_overwrite_its_own_maps(
    capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path
):
    methods = ["--method", "rise?samples=2", "--method", "rise?samples=3", "--method", "cam"]
    code, told, _ = call(capsys, "explain", photo, "--model", MODEL, *methods, "--out", tmp_path / "out")
    assert code == 0
    kept = [json.loads((tmp_path / f"out/rise-samples-{n}/photo-rise.json").read_text()) for n in (2, 3)]
    assert [record["arguments"]["samples"] for record in kept] == [2, 3]
    assert (tmp_path / "out/photo-cam.json").exists()
    assert "rise(samples=2)" in told


def test_a_sheet_of_many_methods_goes_on_below(capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path):
    methods = [part for n in range(1, 11) for part in ("--method", f"smooth(cam)?samples={n}")]
    assert call(capsys, "explain", photo, "--model", MODEL, *methods, "--out", tmp_path)[0] == 0
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width < 7 * 168
    assert height > 2 * 168


def test_combinators_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str]):
    code, told, _ = call(capsys, "list", "combinators")
    assert code == 0
    assert all(name in told for name in ("smooth", "over", "classes=", "against="))


def test_pictures_that_share_a_name_do_not_overwrite_each_other(
    capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path
):
    other = tmp_path / "other" / photo.name
    other.parent.mkdir()
    Image.new("RGB", (30, 30), (200, 10, 10)).save(other)
    code, _, _ = call(capsys, "explain", photo, other, "--model", MODEL, "--method", "edge", "--out", tmp_path / "out")
    assert code == 0
    assert sorted(path.parent.name for path in (tmp_path / "out").rglob("photo-edge.json")) == ["0", "1"]


def test_a_setting_that_explain_has_too_belongs_to_the_method(
    capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path
):
    method = "opti_cam?steps=1&normalization=sigmoid"
    code, _, err = call(capsys, "explain", photo, "--model", MODEL, "--method", method, "--out", tmp_path / "out")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "photo-opti_cam.json").read_text())
    assert record["arguments"]["normalization"] == "sigmoid"


def test_broken_pictures_are_skipped_and_counted(capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    code, out, err = call(capsys, "explain", tmp_path, "--model", MODEL, "--out", tmp_path / "out")
    assert code == 0
    assert "2 skipped" in out
    assert "broken.jpg" in err
    assert "empty.png" in err
    assert (tmp_path / "out" / "photo-grad_cam.png").exists()


def test_only_broken_pictures_are_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    code, _, err = call(capsys, "explain", tmp_path / "broken.jpg", "--model", MODEL, "--out", tmp_path / "out")
    assert code == 2
    assert "none of the 1 pictures could be read" in err


def evaluate(capsys: pytest.CaptureFixture[str], out: Path, *more: object) -> tuple[int, str, str]:
    chosen = ["--method", "grad_cam", "--method", "center", "--metric", "average_gain", "--metric", "insertion?steps=4"]
    return call(capsys, "evaluate", "--model", MODEL, "--data", DATA, *chosen, "--out", out, *more)


def test_evaluate_writes_runs_tables_and_a_page_and_keeps_what_is_done(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    out = tmp_path / "out"
    code, told, _ = evaluate(capsys, out)
    assert code == 0
    assert "insertion(steps=4)" in told
    made = Run.read(out / "grad_cam.json")
    assert len(made.scores.ids) == 6
    assert made.arguments["metrics"]["insertion(steps=4)"]["erase"] == "rise"
    assert f"{made.scores['insertion'].value:.6f}"[:6] in (out / "table.csv").read_text()
    assert (out / "table.md").read_text().count("\n| ") >= 3
    assert all((out / files["image"]).exists() for files in made.pictures.values())

    before = (out / "grad_cam.json").stat().st_mtime_ns
    _, _, err = evaluate(capsys, out)
    assert err.count("kept") == 2
    assert (out / "grad_cam.json").stat().st_mtime_ns == before
    _, _, err = evaluate(capsys, out, "--again")
    assert "kept" not in err

    code, told, _ = call(capsys, "report", out, "--out", tmp_path / "page.html", "--title", "A title")
    assert code == 0
    page = (tmp_path / "page.html").read_text()
    assert told.strip() == str(tmp_path / "page.html")
    assert "A title" in page
    assert "grad_cam" in page


def test_evaluate_reads_a_specification_and_options_win(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    spec = tmp_path / "spec.toml"
    spec.write_text(
        f'model = "{MODEL}"\ndata = {{name = "creatures", count = 4}}\nmethod = ["center", "edge"]\n'
        'metrics = [{name = "deletion", steps = 2}]\nbatch = 2\n'
    )
    code, _, _ = call(capsys, "evaluate", spec, "--images", 3, "--out", tmp_path / "out")
    assert code == 0
    made = Run.read(tmp_path / "out" / "edge.json")
    assert (made.spec.images, made.spec.batch, len(made.scores.ids)) == (3, 2, 3)
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.json")) == ["center", "edge"]


def test_ctrl_c_keeps_what_was_finished(tmp_path: Path):
    """The first method finishes at once, the second would take minutes; Ctrl-C in between leaves the first."""
    out = tmp_path / "out"
    slow = "opti_cam?steps=100000"
    command = [sys.executable, "-m", "sightline", "evaluate", "--model", MODEL, "--data", DATA, "--out", str(out)]
    command += ["--method", "center", "--method", slow, "--metric", "average_gain"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (out / "center.json").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "what was finished is kept" in err
    assert Run.read(out / "center.json").scores.ids
    assert not list(out.glob("opti_cam*.json"))


def test_train_evaluate_and_explain_with_the_trained_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, photo: Path
):
    colors = {"red": (220, 30, 30), "blue": (30, 30, 220)}
    noise = np.random.default_rng(0)
    for name, color in colors.items():
        for index in range(12):
            pixels = np.clip(np.array(color) + noise.normal(0, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
            folder = tmp_path / "data" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    data = f"folder?root={tmp_path / 'data'}"
    small = ["--model", "mini_resnet?size=32", "--epochs", "4", "--set", "batch=8", "--set", "warmup=0"]
    options = ["--test", data, "--out", tmp_path / "net", *small]
    code, told, err = call(capsys, "train", "classifier", "--data", data, *options)
    assert code == 0, err
    manifest = json.loads((tmp_path / "net" / "classifier.json").read_text())
    assert manifest["classes"] == ["blue", "red"]
    assert manifest["extra"]["test"]["accuracy"] == 1.0
    assert "accuracy 100.00%" in told
    weights = tmp_path / "net" / "classifier.safetensors"
    code, told, _ = call(capsys, "explain", photo, "--model", weights, "--target", "red", "--out", tmp_path / "out")
    assert code == 0
    assert "red" in told
    code, _, _ = call(
        capsys, "evaluate", "--model", weights, "--data", data, "--metric", "average_drop", "--out", tmp_path / "e"
    )
    assert Run.read(tmp_path / "e" / "grad_cam.json").scores.accuracy == 1.0


def test_debug_shows_the_traceback(photo: Path):
    command = [sys.executable, "-m", "sightline", "explain", str(photo), "--method", "grad_can"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SIGHTLINE_DEBUG": "1"})
    assert "Traceback" in done.stderr


def test_evaluate_averages_over_several_models(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    spec, out = tmp_path / "spec.toml", tmp_path / "out"
    spec.write_text(
        'model = ["mini_vgg?classes=20&seed=1", "mini_vgg?classes=20&seed=2"]\nmethod = ["center", "gradient"]\n'
        'data = {name = "creatures", count = 2}\nmetrics = [{name = "mass", on = "cue"}]\nbatch = 2\n'
    )
    code, told, _ = call(capsys, "evaluate", spec, "--out", out)
    assert code == 0
    assert "2 classifiers on creatures(count=2)" in told
    values = [Run.read(out / f"model-{i}" / "gradient.json").scores["mass"].value for i in (1, 2)]
    assert f"{sum(values) / 2:.3f}" in (out / "table.md").read_text()
    code, _, _ = call(capsys, "report", out, "--out", tmp_path / "page.html")
    assert code == 0
    assert "seed=2" in (tmp_path / "page.html").read_text()


def test_scenes_of_models_with_methods_of_their_own_get_a_table_each(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    spec, out = tmp_path / "spec.toml", tmp_path / "out"
    spec.write_text(
        'data = "creatures?count=2"\nmetrics = ["area"]\nbatch = 2\n'
        '[[scene]]\nmodel = "mini_vgg?classes=20"\nmethod = ["center", "gradient"]\n'
        '[[scene]]\nmodel = "mini_resnet"\nmethod = "cam"\n'
    )
    code, _, err = call(capsys, "evaluate", spec, "--out", out)
    assert code == 0, err
    assert (out / "table.md").read_text().count("###") == 2
    assert sorted(path.name for path in out.rglob("*.json")) == ["cam.json", "center.json", "gradient.json"]


def test_scenes_are_data_sets_of_one_specification_with_a_folder_each(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    spec, out = tmp_path / "spec.toml", tmp_path / "out"
    spec.write_text(
        'model = "mini_vgg?classes=20"\nmethod = ["center", "gradient"]\nmetrics = ["area"]\nbatch = 2\n'
        '[[scene]]\ndata = "creatures?count=2"\n'
        '[[scene]]\ndata = "creatures?count=2&variant=small"\nmetrics = ["area", "pxap"]\n'
    )
    code, told, _ = call(capsys, "evaluate", spec, "--out", out)
    assert code == 0
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.json")) == [
        *("creatures-1/center.json", "creatures-1/gradient.json"),
        *("creatures-2/center.json", "creatures-2/gradient.json"),
    ]
    assert (out / "table.md").read_text().count("###") == 2
    assert "pxap" in told
    code, _, _ = call(capsys, "report", out, "--out", tmp_path / "page.html")
    assert code == 0
    assert (tmp_path / "page.html").read_text().count("<h3>Scores</h3>") == 2


def test_maps_of_another_tool_are_scored(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    kept, out = tmp_path / "maps", tmp_path / "out"
    ours = ("evaluate", "--data", "creatures?count=2", "--metric", "pxap", "--explain", "label")
    assert call(capsys, *ours, "--method", "gradient", "--keep", kept, "--out", tmp_path / "first")[0] == 0
    code, told, _ = call(capsys, *ours, "--maps", kept / "gradient", "--model", "none?size=64&classes=20", "--out", out)
    assert code == 0
    assert "there is no classifier to ask" in " ".join(told.split())
    first, second = (json.loads(next(folder.glob("*.json")).read_text()) for folder in (tmp_path / "first", out))
    assert first["scores"]["scores"][0]["value"] == pytest.approx(second["scores"]["scores"][0]["value"], abs=1e-4)
