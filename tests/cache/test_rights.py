"""Without the right to write every command ends with 5, in one line; what it cannot write it does not begin."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import conversations, save_target, write_jsonl

from pipeline.cli import main
from stages.cache_hidden.run import run as capture
from stages.cache_hidden.settings import CaptureOptions

NOBODY = 65534


@contextmanager
def as_nobody(folder: Path):
    """Be a user who may read all under a folder and write nothing there."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


@pytest.fixture(scope="module")
def place():
    """A folder of /tmp that anybody may read: a target, chats, more chats, a cache, and one that lacks a column."""
    folder = Path(tempfile.mkdtemp(prefix="rights-"))
    save_target(folder / "target")
    corpus = write_jsonl(folder / "chats.jsonl", conversations(6))
    write_jsonl(folder / "more.jsonl", conversations(9)[6:])
    capture(str(folder / "target"), str(corpus), folder / "cache", options=CaptureOptions(layers="1", max_length=128))
    shutil.copytree(folder / "cache", folder / "lost")
    (folder / "lost" / "shards" / "000001" / "aux.1.json").unlink()
    (folder / "empty").mkdir()
    yield folder
    shutil.rmtree(folder)


TARGET, CHATS = ("--model", "{place}/target"), ("--corpus", "{place}/chats.jsonl")
COMMANDS = {
    "recode": ("recode", "{place}/cache", "--codec", "zstd"),
    "recode to int8": ("recode", "{place}/cache", "--codec", "int8"),
    "another layer": (
        "cache-hidden",
        *TARGET,
        "--corpus",
        "{place}/chats.jsonl",
        "--out",
        "{place}/cache",
        "--layers",
        "3",
    ),
    "append": ("cache-hidden", *TARGET, "--corpus", "{place}/more.jsonl", "--out", "{place}/cache", "--append"),
    "a plan": ("plan", *TARGET, *CHATS, "--out", "{place}/empty/cache"),
    "repair": ("verify", "{place}/lost", "--repair", *TARGET),
    "train-draft": ("train-draft", "--cache", "{place}/cache", "--out", "{place}/empty/run", "--set", "train.steps=1"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_may_not_write_ends_with_5(name, place, capfd):
    with as_nobody(place), pytest.raises(SystemExit) as left:
        main([word.format(place=place) for word in COMMANDS[name]])
    lines = capfd.readouterr().err.strip().splitlines()
    assert left.value.code == 5, lines
    assert lines[-1].startswith("error: ") and "Permission denied" in lines[-1]
    assert not any("Traceback" in line or "bug:" in line for line in lines)


@pytest.mark.parametrize("command", [("verify", "{place}/cache"), ("inspect", "{place}/cache")])
def test_whoever_may_only_read_may_read(command, place):
    with as_nobody(place):
        main([word.format(place=place) for word in command])
