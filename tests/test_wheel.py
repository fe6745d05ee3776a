"""The wheel: what lies in it, and that it works where the source tree is not."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "sightline"
WEIGHTS = PACKAGE / "weights" / "creatures.safetensors"

SCRIPT = """
import json, sys
import sightline
made = sightline.explain("creatures", sys.argv[1])
files = [path.name for path in made.save(sys.argv[2])]
print(json.dumps([sightline.__file__, sightline.__version__, made.label(), made.spec["model"], files]))
"""


def ran(*command, **settings):
    """Run a command; show what it says if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    ran(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Install the wheel into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", folder)
    ran(sys.executable, "-m", "pip", "install", *options, wheel)
    return folder


def installed(site, cwd, *arguments):
    """Run Python somewhere else, with the installed package before the source tree."""
    return ran(sys.executable, *arguments, cwd=cwd, env={**os.environ, "PYTHONPATH": str(site)})


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"sightline/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*") if path.is_file()}
    wanted = {name for name in sources if "__pycache__" not in name}
    assert {"sightline/py.typed", "sightline/report.html.jinja", "sightline/runs.py"} <= wanted
    package = {name for name in names if name.startswith("sightline/")}
    assert package == wanted
    others = {name.split("/")[0] for name in names - package}
    assert len(others) == 1, others
    assert next(iter(others)).endswith(".dist-info")
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_weights_are_in_the_wheel(wheel):
    if not WEIGHTS.exists():
        pytest.skip("the embedded weights are not in the source tree")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sightline/weights/creatures.safetensors", "sightline/weights/creatures.json"} <= set(names)
    assert zipfile.ZipFile(wheel).read("sightline/weights/creatures.safetensors") == WEIGHTS.read_bytes()


def test_no_data_of_others_is_in_the_wheel(wheel):
    endings = {Path(name).suffix for name in zipfile.ZipFile(wheel).namelist()}
    assert not endings & {".jpg", ".jpeg", ".png", ".gz", ".npy", ".pt", ".pth", ".mat", ".xml"}
    assert wheel.stat().st_size < 5_000_000


def test_the_installed_package_is_another_one(site, tmp_path):
    file = installed(site, tmp_path, "-c", "import sightline; print(sightline.__file__)").strip()
    assert Path(file) == site / "sightline" / "__init__.py"


def test_the_command_line_of_the_installed_package(site, tmp_path):
    assert "explain" in installed(site, tmp_path, "-m", "sightline", "--help")


def test_the_installed_package_explains_a_photo_with_the_embedded_weights(site, tmp_path):
    if not WEIGHTS.exists():
        pytest.skip("the embedded weights are not in the source tree")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    told = installed(site, tmp_path, "-c", SCRIPT, tmp_path / "photo.png", tmp_path / "out")
    file, version, label, model, files = json.loads(told)
    assert Path(file).parent == site / "sightline"
    assert f"sightline-{version}.dist-info" in {path.name for path in site.iterdir()}
    assert model == "creatures"
    assert label in json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))["classes"]
    assert files == [f"photo-grad_cam.{end}" for end in ("png", "npy", "json")]
    assert Image.open(tmp_path / "out" / "photo-grad_cam.png").size == (120, 90)
    said = json.loads((tmp_path / "out" / "photo-grad_cam.json").read_text(encoding="utf-8"))
    assert said["class"] == label
    assert said["problem"] is None
