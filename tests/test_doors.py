"""Every path that a user names, and every kind of thing that may lie there: one line, the exit code, and no waiting."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from reports import evaluation

from pipeline.cli import main
from stages.train_draft.run import run as train

SETS = ("train.batch=4", "train.anchors=6", "draft.block_size=4", "train.steps=1", "draft.method=dflash")
PATIENCE_S = 90  # what waits, waits for ever; a command on a busy machine does not


def large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 42)


KINDS = {
    "nothing": lambda path: None,
    "a pipe": os.mkfifo,
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": Path.mkdir,
    "an empty file": Path.touch,
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00" * 40),
    "deep JSON": lambda path: path.write_text('{"a": ' * 100_000),
    "JSON deep, but whole": lambda path: path.write_text('{"a": ' * 700 + "1" + "}" * 700),
    "deep TOML": lambda path: path.write_text("a = " + "[" * 100_000),
    "a large file": large,
}


@pytest.fixture(scope="module")
def trained(tiny_cache, tmp_path_factory):
    """A run and its export."""
    from pipeline.published.export import export

    folder = tmp_path_factory.mktemp("doors")
    train(tiny_cache, None, SETS, folder / "run", "cpu")
    export(folder / "run", folder / "draft")
    return folder


@pytest.fixture
def ends(capfd, monkeypatch, tmp_path):
    """Run a command line, which must not wait; return its exit code and its one complaint on standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> tuple[int, str]:
        capfd.readouterr()
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{arguments} waits"))
        signal.alarm(PATIENCE_S)
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            signal.alarm(0)
        complaints = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error:", "bug:"))]
        assert len(complaints) == (code != 0) and len("".join(complaints)) < 1500, complaints
        return code or 0, complaints[0] if complaints else ""

    return run


# What a path is named for, and the exit codes that are right where no such thing lies there.
DOORS = {
    "inspect X": (2, 4),
    "verify X": (2, 4),
    "recode X --codec zstd": (2, 4),
    "train-draft --cache X": (2, 4),
    "train-draft X --cache CACHE": (2,),
    "train-draft --init-from X --cache CACHE --set draft.method=dflash": (2, 4),
    "sweep X --cache CACHE": (2,),
    "evaluate --draft X": (2, 4),
    "evaluate --draft RUN --cache X": (2, 4),
    "evaluate --draft RUN --prompts X --model TARGET": (2, 3),
    "evaluate --draft RUN --plain X --model TARGET --count 1 --max-new 2": (2,),
    "export --draft X --out out": (2, 4),
    "check-export X": (1, 2),
    "doctor X": (2,),
    "doctor RUN --cache X": (2, 4),
    "doctor RUN --target X": (2,),
    "doctor RUN --export X": (2,),
    "serve-check X": (2,),
    "report X": (2,),
    "report REPORT --against X": (2,),
    "import-cache X --model TARGET": (2, 3, 4),
}
FINE = {
    "evaluate --draft RUN --plain X --model TARGET --count 1 --max-new 2": ("nothing",),  # it is made
    "train-draft X --cache CACHE": ("an empty file",),  # a recipe that states nothing
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", DOORS)
def test_a_path_that_is_something_else_ends_in_one_line(door, kind, ends, trained, tiny_cache, tiny_target, tmp_path):
    there = tmp_path / "there"
    KINDS[kind](there)
    report = write_report(trained)
    names = {"X": there, "CACHE": tiny_cache, "RUN": trained / "run", "TARGET": tiny_target, "REPORT": report}
    code, line = ends(*(names.get(word, word) for word in door.split()))
    fine = kind in FINE.get(door, ())
    assert code == 0 if fine else code in DOORS[door], (code, line)
    assert code == 0 or there.name in line, line


def write_report(folder: Path) -> Path:
    return evaluation(folder / "report.json", "domino", 0, 600, [("sql", [2, 2])])


# Inside a folder that is otherwise sound.
INSIDE = {
    "CACHE": ("cache.json", "plan/000000.json", "plan/000000.arrow", "target/manifest.json", "target/config.json"),
    "RUN": ("run.json", "recipe.toml", "checkpoints/step-00000001/state.json"),
    "DRAFT": ("config.json", "model.safetensors", "probe.tensors"),
}
INSIDE["CACHE"] += ("index.json", "shards/000000/aux.3.json", "shards/000000/samples.arrow", "target/tokenizer.json")
INSIDE["RUN"] += ("checkpoints/step-00000001/draft.safetensors", "checkpoints/step-00000001/config.json")
USES = {
    "CACHE": (
        "inspect CACHE",
        "doctor CACHE",
        "inspect CACHE --sample 0",
        "train-draft --cache CACHE --set draft.method=dflash",
    ),
    "RUN": ("evaluate --draft RUN --model TARGET --count 1 --max-new 2", "export --draft RUN --out out", "doctor RUN"),
    "DRAFT": ("check-export DRAFT", "train-draft --init-from DRAFT --cache CACHE --set draft.block_size=4"),
}
BAD = ("a pipe", "/dev/zero", "a folder", "deep JSON", "JSON deep, but whole", "a large file")


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize(("whole", "name"), [(whole, name) for whole, names in INSIDE.items() for name in names])
def test_a_file_of_a_folder_that_is_something_else_ends_in_one_line(
    whole, name, kind, ends, trained, tiny_cache, tiny_target, tmp_path
):
    names = {"CACHE": tiny_cache, "RUN": trained / "run", "TARGET": tiny_target, "DRAFT": trained / "draft"}
    names[whole] = Path(shutil.copytree(names[whole], tmp_path / "copy"))
    (names[whole] / name).unlink()
    KINDS[kind](names[whole] / name)
    codes = []
    for command in (*USES[whole], *["verify CACHE"] * (whole == "CACHE")):
        sets = [word for entry in SETS for word in ("--set", entry)] * command.startswith("train")
        code, line = ends(*(names.get(word, word) for word in command.split()), *sets)
        codes.append(code)
        assert code in (0, 1, 2, 4, 5) and not line.startswith("bug"), (command, code, line)
    assert any(codes) or name in ("index.json", "probe.tensors"), codes
