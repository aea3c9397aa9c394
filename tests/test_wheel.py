"""What is installed: the wheel, built here from the files that git would check out, and from the sdist."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pipeline", "stages", "configs", "data", "tests")
RECIPES = ("demo", "dflash", "domino", "dspark", "sweep")
BUNDLED = {"chats.jsonl": "data/chats.jsonl"} | {f"{name}.toml": f"configs/{name}.toml" for name in RECIPES}
BUNDLED |= {f"tiny-qwen3/{path.name}": f"data/tiny-qwen3/{path.name}" for path in ROOT.glob("data/tiny-qwen3/*")}


def build(what: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist without the network."""
    out.mkdir()
    code = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.iterdir())


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheel of a checkout, and that of its sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "results")
    for name in SOURCES:
        there = ROOT / name
        copy = shutil.copytree if there.is_dir() else shutil.copy
        copy(there, source / name, **({"symlinks": True, "ignore": skip} if there.is_dir() else {}))
    sdist = build("sdist", source, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    unpacked = next((folder / "unpacked").iterdir())
    return [zipfile.ZipFile(build("wheel", place, folder / f"of-{place.name}")) for place in (source, unpacked)]


@pytest.mark.parametrize("number", [0, 1], ids=["checkout", "sdist"])
def test_a_wheel_holds_the_code_and_what_is_bundled_and_nothing_else(number, wheels):
    names = {name for name in wheels[number].namelist() if ".dist-info/" not in name}
    code = {path.relative_to(ROOT).as_posix() for top in ("pipeline", "stages") for path in ROOT.glob(f"{top}/**/*.py")}
    page = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pipeline/report_page").glob("page.*")
        if path.suffix != ".py"
    }
    assert names == code | page | {f"pipeline/bundled/{name}" for name in BUNDLED}
    for name, place in BUNDLED.items():
        assert wheels[number].read(f"pipeline/bundled/{name}") == (ROOT / place).read_bytes()


@pytest.mark.parametrize("number", [0, 1], ids=["checkout", "sdist"])
def test_a_wheel_says_its_licence_and_shows_the_readme(number, wheels):
    found = {Path(name).name: name for name in wheels[number].namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheels[number].read(found["METADATA"]).decode())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().lstrip().startswith("# draft-pipeline") and "LICENSE" in found
    assert "pipeline = pipeline.cli:main" in wheels[number].read(found["entry_points.txt"]).decode()


def test_what_is_bundled_works_from_the_wheel_alone(wheels, tmp_path):
    wheels[0].extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path[:] = [{str(tmp_path / 'site')!r}] + sys.path\n"
        "import pipeline; from pipeline.cli import main; print(pipeline.__file__)\n"
        "main(['plan', '--model', 'tiny-qwen3', '--max-samples', '3', '--out', 'cache'])\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(str(tmp_path / "site")), done.stderr
    assert "heldout 3" in done.stdout, done.stdout
