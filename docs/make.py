"""Write the reference of every public module as HTML into out/docs, from the docstrings (pdoc)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = ("datasets", "methods", "metrics", "models")


def main() -> None:
    """Run pdoc over the modules: the package itself is lazy and would show nothing."""
    source = Path(__file__).parents[1] / "src" / "sightline"
    out = Path("out/docs")
    shutil.rmtree(out, ignore_errors=True)
    names = sorted(f"sightline.{name}" for name in (*PACKAGES, *(path.stem for path in source.glob("[a-z]*.py"))))
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--output-directory", str(out), *names]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    print(out / "index.html")


if __name__ == "__main__":
    main()
