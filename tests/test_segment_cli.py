"""`sightline segment` as its user meets it: exit codes, what is said, torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sightline import cli
from sightline.datasets import DATASETS
from sightline.interchange import read_labels
from sightline.viz import to_pil

SCENES = "creatures?variant=scenes&count=6"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    samples = DATASETS["creatures"](variant="scenes", count=3)
    for index in range(3):
        to_pil(samples[index].image).resize((70, 60)).save(root / f"{index}.png")
    return root


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command line here; return exit code, output and messages."""
    code = 0
    try:
        cli.main(["segment", *map(str, arguments)])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_it_tells_what_came_out_and_where(capsys, tmp_path):
    out = tmp_path / "out"
    code, said, err = call(capsys, "--data", SCENES, "--images", 3, "--threshold", "0.1,0.3", "--irn", "--out", out)
    assert code == 0, err
    manifest = json.loads((out / "manifest.json").read_text())
    assert said.startswith("3 images, 0 skipped: ")
    for kind, share in manifest["shares"].items():
        assert f"{100 * share:.1f}% {kind}" in said
    assert "images/s in a process; labels, manifest.json, timing.json and contact.png are in" in said
    assert (out / "contact.png").exists()
    assert len(list((out / "irn").iterdir())) == 3
    claim = json.loads((out / "segment.json").read_text())
    assert (claim["method"], claim["model"], claim["threshold"]) == ("cam", "creatures", [0.1, 0.3])
    assert claim["irn"] == "npy"


@pytest.mark.parametrize(
    ("given", "ending"), [(["--irn"], ".npy"), (["--irn", "npz"], ".npz"), (["--irn=npy"], ".npy")]
)
def test_irn_s_dictionaries_come_in_both_forms(capsys, tmp_path, given, ending):
    code, _, err = call(capsys, "--data", SCENES, "--images", 1, *given, "--out", tmp_path / "out")
    assert code == 0, err
    assert [path.suffix for path in (tmp_path / "out" / "irn").iterdir()] == [ending]


def test_skipped_pictures_are_told(capsys, tmp_path, pictures):
    (pictures / "1.png").write_bytes(b"\x89PNG broken")
    data = ["--data", f"folder?root={pictures}", "--classes", "predicted?above=0.5"]
    code, said, err = call(capsys, *data, "--out", tmp_path / "out")
    assert code == 0, err
    assert said.startswith("2 images, 1 skipped: ")
    assert "skipped 1.png: " in err
    assert read_labels(tmp_path / "out" / "labels" / "0.png").shape == (60, 70)


def test_of_many_skipped_pictures_the_first_ones_are_named(capsys, tmp_path, pictures):
    for index in range(10, 25):
        (pictures / f"{index}.png").write_bytes(b"no picture")
    data = ["--data", f"folder?root={pictures}", "--classes", "top", "--size", "input"]
    code, said, err = call(capsys, *data, "--out", tmp_path / "out")
    assert code == 0, err
    assert said.startswith("3 images, 15 skipped: ")
    assert [line.split(":")[0] for line in err.strip().splitlines()] == [
        *(f"skipped {index}.png" for index in range(10, 20)),
        "skipped 5 more, which manifest.json names",
    ]


def test_a_file_says_it_all_and_options_win(capsys, tmp_path):
    spec = tmp_path / "spec.toml"
    spec.write_text(
        f'model = "creatures"\ndata = "{SCENES}"\nmethod = "smooth(gradient)"\n'
        'resolve = {name = "smooth", sigma = 3}\n'
        "threshold = 0.4\nimages = 2\nbatch = 1\n"
    )
    options = ["--spec", spec, "--threshold", 0.25, "--set", "samples=2", "--size", "input", "--seed", 4]
    code, _, err = call(capsys, *options, "--out", tmp_path / "out")
    assert code == 0, err
    claim = json.loads((tmp_path / "out" / "segment.json").read_text())
    assert claim["method"] == {"name": "smooth(gradient)", "samples": 2}
    assert claim["resolve"] == {"name": "smooth", "sigma": 3}
    assert (claim["threshold"], claim["images"], claim["batch"], claim["seed"]) == (0.25, 2, 1, 4)
    assert claim["size"] == "input"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--threshold", "0.4,0.1"], "low <= high"),
        (["--threshold", "high"], "a number or a list"),
        (["--method", "grad_camm"], "grad_cam"),
        (["--resolve", "superpixels"], "superpixel"),
        (["--classes", "labelled"], "labels"),
        (["--size", "big"], "size"),
        (["--normalize", "most"], "normalization"),
        (["--data", "folder"], "folder needs root="),
        (["--model", "no_such"], "no_such"),
        (["--batch", "0"], "--batch"),
        (["--irn", "np"], "'np' is not one of 'npy', 'npz'"),
        (["--resolve", "crf?threshold=0.2"], "leave out crf?threshold="),
        (["--spec", "nowhere.toml"], "no file nowhere.toml"),
        (["--set", "samples"], "--set key=value"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(capsys, tmp_path, options, told):
    code, said, err = call(capsys, "--data", SCENES, *options, "--out", tmp_path / "out")
    assert (code, said) == (2, "")
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "labels").exists()


def test_it_needs_a_folder(capsys):
    code, _, err = call(capsys, "--data", SCENES)
    assert code == 2
    assert "--out" in err


def test_a_folder_of_another_segmenting_is_left_alone(capsys, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert call(capsys, "--data", SCENES, "--images", 1, *out)[0] == 0
    code, _, err = call(capsys, "--data", SCENES, "--images", 1, "--threshold", 0.5, *out)
    assert code == 2
    assert "threshold was 0.3 and is 0.5" in err


def test_a_process_that_is_not_the_last_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--data", SCENES, "--batch", 2, "--out", tmp_path / "out"]
    code, said, err = call(capsys, *options)
    assert (code, said) == (0, "")
    assert err == f"this process is done; the last one to finish writes {tmp_path / 'out' / 'manifest.json'}\n"
    monkeypatch.setenv("RANK", "0")
    code, said, _ = call(capsys, *options)
    assert code == 0
    assert said.startswith("6 images, 0 skipped")


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom sightline import cli\ntry:\n    cli.main(['segment', '--help'])\n"
        "except SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "torchrun" in done.stdout
    assert "--normalize none --threshold 0" in " ".join(done.stdout.split())


def test_torchrun_writes_the_bytes_of_one_process(capsys, tmp_path):
    options = ["--data", SCENES, "--batch", "1", "--resolve", "superpixel?min_size=10", "--irn", "--out"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "sightline", "segment", *options, str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    assert 1 <= done.stdout.count("6 images, 0 skipped") <= 2
    assert call(capsys, *options, tmp_path / "one")[0] == 0
    found = {name: contents(tmp_path / name) for name in ("one", "two")}
    assert found["one"] == found["two"]
    assert len(found["one"]) == 6 + 6 + 3
    assert sorted(path.name for path in (tmp_path / "two" / "done").iterdir()) == ["0.jsonl", "1.jsonl"]
    with Image.open(tmp_path / "two" / "labels" / "creatures-scenes-test-00000-s0.png") as picture:
        assert picture.mode == "P"


def contents(out: Path) -> dict[str, bytes]:
    """All files with their bytes, but for what tells of time and processes."""
    files = [path for path in out.rglob("*") if path.is_file() and path.parent.name != "done"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.name != "timing.json"}
