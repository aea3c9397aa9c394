"""Does the suite pass on a Python, with the oldest or the newest versions that pyproject.toml allows?

    python tests/bench/versions.py PYTHON [--oldest] [--folder FOLDER] [-- PYTEST ARGUMENTS]

Makes a virtual environment of that Python, installs this project with each `>=` as `==` (--oldest) or without a pin,
and runs pytest; prints a row of docs/compatibility.md. A second call of one folder installs nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = ("torch", "transformers", "datasets", "pyarrow", "zarr", "click", "pydantic", "numpy")


def lower_bounds(project: dict) -> list[str]:
    """Return the requirements of a project and of its extras, each at its lower bound."""
    stated = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    return sorted({one.replace(">=", "==") for one in stated if ">=" in one})


def install(python: str, folder: Path, oldest: bool) -> Path:
    """Make the environment, and return its Python."""
    inside = folder / "bin/python"
    if (folder / "installed").exists():
        return inside
    subprocess.run([python, "-m", "venv", folder], check=True)
    pins = []
    if oldest:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        (folder / "constraints.txt").write_text("\n".join(lower_bounds(project)) + "\n")
        pins = ["--constraint", folder / "constraints.txt"]
    subprocess.run([inside, "-m", "pip", "install", "--quiet", *pins, "--editable", f"{ROOT}[dev]"], check=True)
    (folder / "installed").touch()
    return inside


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("python", help="such as python3.13")
    parser.add_argument("--oldest", action="store_true")
    parser.add_argument("--folder", type=Path, help="of the environment")
    parser.add_argument("rest", nargs="*", metavar="PYTEST ARGUMENTS")
    chosen = parser.parse_intermixed_args()
    name = f"{Path(chosen.python).name}-{'oldest' if chosen.oldest else 'newest'}"
    python = install(chosen.python, chosen.folder or ROOT / "build/versions" / name, chosen.oldest)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True).stdout
    versions = {one["name"].lower(): one["version"] for one in json.loads(listed)}
    words = ["-n", "2", "--dist", "worksteal", "-q", "-p", "no:cacheprovider", *chosen.rest]
    tests = subprocess.Popen(
        [python, "-m", "pytest", *words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE
    )
    last = ""
    for line in tests.stdout:
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
        last = line.decode().strip("= \n") or last
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    cells = [version, *(versions.get(name, "-") for name in SHOWN), re.sub(r" in .*", "", last)]
    print(f"| Python | {' | '.join(SHOWN)} | tests |\n| {' | '.join(cells)} |")
    return tests.wait()


if __name__ == "__main__":
    sys.exit(main())
