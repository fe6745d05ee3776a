import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sightline import models
from sightline.classifier import UnsuitedError
from sightline.cli import main
from sightline.explainers import Casm, load_casm
from sightline.learning import LEARNERS, learn
from sightline.methods import METHODS
from sightline.recipes import Recipe
from sightline.runs import Choice, Run
from sightline.settings import method_of
from sightline.training import logged

COLORS = {"blue": (30, 30, 220), "green": (30, 200, 40), "red": (220, 30, 30)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Colored noise in folders, one a class."""
    root, noise = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, color in COLORS.items():
        (root / name).mkdir()
        for index in range(6):
            pixels = np.clip(np.array(color) + noise.normal(0, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return f"folder?root={root}"


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A classifier of the colors in a file."""
    out = tmp_path_factory.mktemp("trained")
    settings = {"epochs": 4, "batch": 6, "warmup": 0.0}
    return learn("classifier", Recipe.of({"data": data, "model": "mini_resnet?size=32", "settings": settings}), out)


@pytest.fixture
def x():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def recipe(data, trained, **entries):
    return Recipe.of({"data": data, "model": str(trained), **entries})


CASM = {"epochs": 2, "batch": 6, "fraction": 1.0, "thinning": "L2", "cap": 2}
CALM = {"epochs": 2, "batch": 6, "finer": 1}


def test_a_casm_is_learned_saved_and_used_as_a_method(data, trained, tmp_path, x):
    path = learn("casm", recipe(data, trained, settings=CASM, test=data, select="area"), tmp_path)
    classifier, mapping = models.load(str(trained)), load_casm(path)
    assert isinstance(mapping, Casm)
    mask = mapping(classifier, x)
    assert mask.shape == (2, 1, 32, 32)
    assert torch.equal(method_of(Choice(str(path)))(classifier, x), mask)
    assert torch.equal(method_of(Choice("casm", {"weights": str(path)}))(models.load("mini_vgg?size=32"), x), mask)
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["encoder"] == {"name": "mini_resnet", "size": 32, "classes": 3}
    assert manifest["extra"]["test"]["area"] > 0
    assert len(manifest["extra"]["history"]) == 2
    assert manifest["extra"]["config"]["thinning"] == "L2"


def test_a_calm_is_learned_saved_and_used_as_a_model(data, trained, tmp_path, x):
    path = learn("calm", recipe(data, trained, settings=CALM, test=data), tmp_path)
    classifier = models.load(str(path))
    assert classifier.classes == ("blue", "green", "red")
    saliency = METHODS["calm_attribution"](classifier, x, torch.tensor([0, 2]))
    assert saliency.shape == (2, 1, 4, 4)
    p = classifier(x).exp()
    torch.testing.assert_close(saliency.sum((1, 2, 3)), p[[0, 1], [0, 2]])
    assert 0 <= json.loads(path.with_suffix(".json").read_text())["extra"]["test"]["accuracy"] <= 1
    with pytest.raises(UnsuitedError, match="train one with `sightline train calm`"):
        METHODS["calm_attribution"](models.load(str(trained)), x)


def test_the_recipe_of_a_file_is_how_its_network_is_built(trained):
    assert models.recipe(str(trained)) == Choice("mini_resnet", {"size": 32, "classes": 3})
    assert models.recipe("creatures") == Choice("mini_resnet", {"classes": 20})
    assert models.recipe("torchvision:resnet18") == Choice("torchvision:resnet18", {"weights": "none"})


def test_trials_select_the_learning_rate_on_other_images(data, trained, tmp_path):
    told = recipe(data, trained, settings=CALM, trials=3, low=1e-4, high=1e-1, val=data, select="accuracy")
    path = learn("calm", told, tmp_path)
    extra = json.loads(path.with_suffix(".json").read_text())["extra"]
    rates, scores = extra["search"]["trials"]["rates"], extra["search"]["trials"]["scores"]
    assert len(rates) == len(scores) == 3
    assert extra["config"]["lr"] == rates[scores.index(max(scores))]
    assert len(list((tmp_path / "trials").iterdir())) == 3
    before = path.stat().st_mtime_ns
    assert learn("calm", told, tmp_path).read_bytes() == path.read_bytes()
    assert path.stat().st_mtime_ns >= before


def test_a_folder_belongs_to_one_training(data, trained, tmp_path):
    told = recipe(data, trained, settings={"epochs": 1, "batch": 6})
    path = learn("calm", told, tmp_path)
    before = path.read_bytes()
    assert learn("calm", told.changed(test=Choice.parse(data)), tmp_path).read_bytes() == before
    for other in (told.changed(seed=1), told.changed(data=Choice.parse("creatures?count=4"))):
        with pytest.raises(ValueError, match=r"belongs to another training: .* delete it, or take another --out"):
            learn("calm", other, tmp_path)
    with pytest.raises(ValueError, match="kind was calm and is casm"):
        learn("casm", told, tmp_path)
    assert path.read_bytes() == before


def test_a_folder_in_which_nothing_began_is_free(data, trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file nowhere"):
        learn("calm", recipe(data, "nowhere.safetensors"), tmp_path)
    assert learn("calm", recipe(data, trained, settings={"epochs": 1, "batch": 6}), tmp_path).exists()


def test_other_weights_to_start_from_make_another_training(data, tmp_path):
    files = []
    for seed in (0, 1):
        told = {"data": data, "model": "mini_resnet?size=32", "seed": seed, "settings": {"epochs": 1, "batch": 6}}
        files.append(learn("classifier", Recipe.of(told), tmp_path / str(seed)))
    told = recipe(data, files[0], settings={"epochs": 1, "batch": 6})
    learn("calm", told, tmp_path / "calm")
    for suffix in (".safetensors", ".json"):
        files[0].with_suffix(suffix).write_bytes(files[1].with_suffix(suffix).read_bytes())
    with pytest.raises(ValueError, match="weights was"):
        learn("calm", told, tmp_path / "calm")


def test_a_trained_classifier_learns_on_and_gets_a_new_head_where_the_classes_are_others(data, trained, tmp_path, x):
    settings = {"epochs": 1, "batch": 6, "lr": 1e-6}
    path = learn("classifier", recipe(data, trained, settings=settings), tmp_path / "same")
    weights = [dict(models.load(str(file)).model.named_parameters()) for file in (path, trained)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-3)
    other = recipe("creatures?count=12&size=64", trained, settings=settings)
    path = learn("classifier", other, tmp_path / "other")
    assert models.load(str(path))(x).shape == (2, 20)


@pytest.mark.parametrize("model", ["creatures_calm", "none", "calm"])
def test_what_is_no_plain_classifier_is_not_trained_as_one(data, tmp_path, model):
    with pytest.raises(ValueError, match="is no network that `train classifier` can train"):
        learn("classifier", Recipe.of({"data": data, "model": model}), tmp_path)


def test_a_calm_at_another_layer_is_found_again(data, trained, tmp_path, x):
    told = recipe(data, f"{trained}?layer=layer3", settings={"epochs": 1, "batch": 6})
    path = learn("calm", told, tmp_path)
    assert METHODS["calm_attribution"](models.load(str(path)), x).shape == (2, 1, 4, 4)
    assert models.load(str(path)).layer == "trunk.layer3"


def test_a_nameless_network_of_other_classes_is_told(data, tmp_path):
    with pytest.raises(ValueError, match="has 3 classes and the network 20, without names"):
        learn("casm", Recipe.of({"data": data, "model": "mini_resnet?size=32", "settings": CASM}), tmp_path)


def test_trials_need_a_better_side(data, trained, tmp_path):
    told = recipe(data, trained, settings=CASM, trials=2, val=data)
    with pytest.raises(ValueError, match=r"area\?of=raw has none; choose --select"):
        learn("casm", told, tmp_path)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"thining": "F"}, LookupError, "no setting called 'thining'; did you mean thinning"),
        ({"thinning": "M"}, ValueError, "expected thinning F, L, FL or L with a period"),
        ({"lr": "fast"}, TypeError, "lr: expected a number, got 'fast'"),
    ],
)
def test_wrong_settings_are_told_before_any_work(tmp_path, settings, kind, message):
    with pytest.raises(kind, match=message):
        learn("casm", Recipe.of({"data": "nothing", "model": "nothing", "settings": settings}), tmp_path)


def run(*arguments):
    main([str(one) for one in arguments])


def test_the_command_line_copies_a_recipe_and_trains_from_it(data, trained, tmp_path, capsys):
    spec, out = tmp_path / "mine.toml", tmp_path / "out"
    options = [token for key, value in CASM.items() for token in ("--set", f"{key}={value}")]
    run("train", "casm", "--data", data, "--model", trained, *options, "--copy", spec)
    assert "wrote" in capsys.readouterr().out
    assert re.search('thinning = "L2"', spec.read_text())
    run("train", "casm", "--spec", spec, "--epochs", "1", "--out", out, "--track", "csv")
    assert "use it as --method" in capsys.readouterr().out
    lines = (out / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + 3
    assert {"loss", "area", "accuracy", "lambda", "step"} <= {*lines[0].split(",")}
    photo = next(Path(data.partition("=")[2]).rglob("*.png"))
    run("explain", photo, "--model", trained, "--method", out / "casm.safetensors", "--out", tmp_path / "maps")
    assert list((tmp_path / "maps").glob("*.png"))


def test_a_gray_network_is_trained_and_evaluated_on_colors(data, tmp_path, capsys):
    options = ["--data", data, "--epochs", "1", "--set", "batch=6", "--out"]
    run("train", "classifier", "--model", "mini_resnet?size=32&channels=1", "--test", data, *options, tmp_path / "net")
    net = tmp_path / "net" / "classifier.safetensors"
    assert models.load(str(net)).channels == 1
    run("train", "casm", "--model", net, "--set", "fraction=1", *options, tmp_path / "casm")
    run("train", "calm", "--model", net, *options, tmp_path / "calm")
    methods = ["--method", "grad_cam", "--method", tmp_path / "casm" / "casm.safetensors"]
    metrics = ["--metric", "deletion?steps=2", "--metric", "average_drop"]
    run("evaluate", "--model", net, "--data", data, *methods, *metrics, "--out", tmp_path / "runs")
    made = Run.read(tmp_path / "runs" / "grad_cam.json")
    assert len(made.scores.ids) == 18
    assert (tmp_path / "runs" / next(iter(made.pictures.values()))["overlay"]).exists()
    capsys.readouterr()


@pytest.mark.parametrize(
    "command",
    [
        ["train", "classifier", "--model", "mini_resnet?size=32&channels=2", "--epochs", "1"],
        ["evaluate", "--model", "mini_resnet?size=32&channels=2&classes=3", "--metric", "average_drop"],
    ],
)
def test_a_network_of_two_channels_is_refused_in_one_line(data, tmp_path, capsys, command):
    with pytest.raises(SystemExit) as ended:
        run(*command, "--data", data, "--out", tmp_path)
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip()
    assert "0.png has 3 channels and the network reads 2" in told
    assert "\n" not in told


def test_tensorboard_gets_the_metrics(data, trained, tmp_path):
    options = [token for key, value in CALM.items() for token in ("--set", f"{key}={value}")]
    run("train", "calm", "--data", data, "--model", trained, *options, "--out", tmp_path, "--track", "tensorboard")
    assert list((tmp_path / "logs" / "version_0").glob("events.*"))


def test_a_missing_tensorboard_is_told(monkeypatch, tmp_path):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'tensorboard'")

    monkeypatch.setattr("lightning_fabric.loggers.tensorboard.TensorBoardLogger.__init__", missing)
    told = r"pip install 'sightline\[tensorboard\]', or take csv"
    with pytest.raises(ValueError, match=told), logged(tmp_path, "tensorboard"):
        pass


def test_a_missing_folder_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        run("train", "casm", "--data", "creatures?count=2")
    assert ended.value.code == 2
    assert "--out" in capsys.readouterr().err


STUDY = """
title = "Colors"
seeds = [0, 1]
[[train]]
name = "net"
kind = "classifier"
data = "DATA"
model = "mini_resnet?size=32"
settings = {epochs = 2, batch = 6}
[[train]]
name = "L2"
kind = "casm"
data = "DATA"
model = "{net}"
settings = {epochs = 1, batch = 6, thinning = "L2"}
[[evaluate]]
name = "areas"
data = "DATA"
model = "{net}"
metrics = ["area", {name = "entropy", of = "raw"}, {name = "entropy", of = "saliency"}]
rows = {"CASM" = {method = "{L2}"}, "Grad-CAM" = {method = "grad_cam", metrics = ["area"]}}
"""


def test_a_study_trains_evaluates_and_writes_one_table(data, tmp_path, capsys):
    spec, out = tmp_path / "study.toml", tmp_path / "out"
    spec.write_text(STUDY.replace("DATA", data))
    run("study", spec, "--out", out)
    table = (out / "table.md").read_text()
    assert "# Colors" in table
    assert "over 2 seeds" in table
    assert re.search(r"\| CASM \| .* ± .* \|", table)
    runs = [Run.read(out / "runs" / "areas" / "CASM" / f"seed-{seed}.json") for seed in (0, 1)]
    values = [one.scores["area"].value for one in runs]
    found = json.loads((out / "numbers.json").read_text())["evaluations"]["areas"]["CASM"]
    assert found["metrics"]["area"] == values
    assert found["metrics"].keys() == {"area", "entropy(of=raw)", "entropy(of=saliency)"}
    assert found["specs"][1]["method"].endswith("seed-1/casm.safetensors")
    assert values[0] != values[1]
    again = ("table.md", "table.tex", "numbers.json")
    made = [path for path in out.rglob("*") if path.is_file() and path.name not in again]
    times = {path: path.stat().st_mtime_ns for path in made}
    run("study", spec, "--out", out)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert (out / "table.md").read_text() == table
    run("study", spec, "--out", out, "--seed", "1")
    assert (out / "table.md").read_text() == table


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('model = "{net}"', 'model = "{nit}"', "no place to fill called 'nit'; did you mean net"),
        ('"grad_cam"', '"grad_can"', "did you mean grad_cam"),
        ('kind = "casm"', 'kind = "kasm"', "did you mean casm"),
        ("seeds", "sedes", "no entry of a study called 'sedes'"),
        ("[0, 1]", "[0, 0]", "different whole numbers as seeds"),
        ('name = "L2"', 'name = "seed"', "which stands for the seed; rename it"),
        ("thinning = ", "finer = 'two', thinning = ", "no setting called 'finer'"),
        ('name = "L2"', 'name = "net"', "has 'net' twice"),
        ("batch = 6, thinning", "batches = 6, thinning", "did you mean batch"),
    ],
)
def test_a_wrong_study_is_told_before_any_work(tmp_path, capsys, old, new, message):
    spec = tmp_path / "study.toml"
    spec.write_text(STUDY.replace("DATA", "creatures").replace(old, new))
    with pytest.raises(SystemExit) as ended:
        run("study", spec, "--out", tmp_path / "out")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


NETWORK = """
import torch
from torch import nn
from sightline.classifier import wrap

def build(num_classes=3):
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    return wrap(model, layer="5", normalization="none", size=32)
"""


def start(folder, processes, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*launcher, "sightline", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_casm_goes_on_bit_for_bit(data, trained, tmp_path):
    settings = {**CASM, "epochs": 8, "encoder": "separate"}
    options = [token for key, value in settings.items() for token in ("--set", f"{key}={value}")]
    common = ["train", "casm", "--data", data, "--model", trained, *options, "--out"]
    process = start(tmp_path, 1, *common, tmp_path / "killed")
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "casm.safetensors").exists()
    for name in ("killed", "whole"):
        run(*common, tmp_path / name)
    killed, whole = ((tmp_path / name / "casm.safetensors").read_bytes() for name in ("killed", "whole"))
    assert killed == whole


@pytest.mark.parametrize(("kind", "settings"), [("classifier", ()), ("calm", ("--set", "finer=1"))])
def test_two_processes_give_the_loss_curve_of_one(data, tmp_path, kind, settings):
    (tmp_path / "net.py").write_text(NETWORK)
    common = ["--data", data, "--model", "python:net:build", "--set", "batch=7", *settings, "--epochs", "3"]
    outs = {count: tmp_path / f"processes-{count}" for count in (1, 2)}
    started = [start(tmp_path, count, "train", kind, *common, "--out", out) for count, out in outs.items()]
    for process in started:
        told, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert told.count("use it as --model") == 1
    manifests = [json.loads((out / f"{kind}.json").read_text()) for out in outs.values()]
    curves = [[one["loss"] for one in manifest["extra"]["history"]] for manifest in manifests]
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[0][0] != pytest.approx(curves[0][2], abs=1e-3)


def test_two_processes_train_one_casm(data, trained, tmp_path):
    options = [token for key, value in CASM.items() for token in ("--set", f"{key}={value}")]
    command = ["train", "casm", "--data", data, "--model", trained, *options, "--out", tmp_path / "out"]
    told, err = (process := start(tmp_path, 2, *command)).communicate(timeout=120)
    assert process.returncode == 0, err
    assert told.count("use it as --method") == 1
    history = json.loads((tmp_path / "out" / "casm.json").read_text())["extra"]["history"]
    assert [one["history"] for one in history] == [pytest.approx(4 / 3), 2]
    mask = load_casm(tmp_path / "out" / "casm.safetensors")(models.load(str(trained)), torch.rand(2, 3, 32, 32))
    assert 0 <= mask.min() < mask.max() <= 1


def test_two_processes_try_learning_rates_measure_and_keep_track(data, trained, tmp_path):
    options = ["--data", data, "--model", trained, "--epochs", "1", "--set", "batch=6", "--out", tmp_path / "out"]
    search = ["--trials", "2", "--val", data, "--test", data, "--select", "deletion?steps=4", "--track", "csv"]
    process = start(tmp_path, 2, "train", "calm", *options, *search)
    told, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    extra = json.loads((tmp_path / "out" / "calm.json").read_text())["extra"]
    assert len(extra["search"]["trials"]["scores"]) == 2
    assert extra["test"]["deletion?steps=4"] > 0
    assert "deletion?steps=4" in told
    assert (tmp_path / "out" / "logs" / "version_0" / "metrics.csv").exists()


@pytest.mark.parametrize("kind", LEARNERS)
def test_the_help_of_a_training_names_its_own_defaults(kind, capsys):
    main(["train", kind, "--help"])
    told = "".join(capsys.readouterr().out.split())
    assert f"[default:{LEARNERS[kind].model}]" in told
    assert f"[default:{LEARNERS[kind].select}]" in told
