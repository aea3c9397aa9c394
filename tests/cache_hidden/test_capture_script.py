"""The script that runs in vLLM's Python, as far as it can be tested without vLLM: what it imports, what it asks, and
how it waits for files that come a step behind."""

import ast
import fcntl
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.cache_hidden.inside_vllm import capture_script

FOLDER = Path(capture_script.__file__).parent
ALLOWED = {"torch", "vllm", "engine_side", "capture_connector"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_what_runs_inside_imports_nothing_else_of_this_project(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    assert names - sys.stdlib_module_names <= ALLOWED


class Engine:
    """Finishes every sample in its first step, and writes one file in each step after it, as vLLM does: the lock is
    there, and held, before anybody hears of the file."""

    def __init__(self, folder: Path, forgets: str = ""):
        self.folder, self.forgets, self.added, self.steps = folder, forgets, [], 0
        self.locks: dict[str, int] = {}

    def add_request(self, name: str, prompt: dict, sampling) -> None:
        self.added.append((name, prompt["prompt_token_ids"]))

    def has_unfinished_requests(self) -> bool:
        return self.steps == 0

    def step(self) -> list:
        self.steps += 1
        if self.steps > 1:
            for name in [*self.locks][:1]:
                (self.folder / name).write_bytes(b"states")
                os.close(self.locks.pop(name))
            return []
        outputs = []
        for name, _ in reversed(self.added):
            file = self.folder / f"{name}.safetensors"
            if name != self.forgets:
                self.locks[file.name] = os.open(f"{file}.lock", os.O_CREAT | os.O_WRONLY)
                fcntl.flock(self.locks[file.name], fcntl.LOCK_EX)
            outputs.append(SimpleNamespace(request_id=name, finished=True, kv_transfer_params=given(file)))
        return outputs


def given(file: Path) -> dict:
    return {"hidden_states_path": str(file)}


@pytest.fixture
def sampling(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **given: given))


def test_files_that_come_steps_behind_are_waited_for(tmp_path, sampling):
    engine = Engine(tmp_path)
    files = capture_script.compute(engine, [[1, 2], [3], [4, 5, 6]], 7)
    assert [Path(file).name for file in files] == [f"7.{index}.safetensors" for index in range(3)]
    assert engine.added == [("7.0", [1, 2]), ("7.1", [3]), ("7.2", [4, 5, 6])]
    assert all(Path(file).read_bytes() == b"states" for file in files)
    assert not [*tmp_path.glob("*.lock")] and engine.steps >= 4


def test_a_file_that_never_comes_is_told_in_time(tmp_path, sampling, monkeypatch):
    monkeypatch.setattr(capture_script, "WRITING_S", 0.2)
    files = capture_script.compute(Engine(tmp_path, forgets="0.1"), [[1], [2], [3]], 0)
    assert [file is not None for file in files] == [True, False, True]


def test_a_file_is_not_read_while_it_is_written(tmp_path):
    file = tmp_path / "a.safetensors"
    lock = os.open(f"{file}.lock", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert not capture_script.is_written(str(file))
    file.write_bytes(b"half")
    assert not capture_script.is_written(str(file))
    threading.Timer(0.1, os.close, [lock]).start()
    until = time.monotonic() + 10
    while not capture_script.is_written(str(file)):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert not Path(f"{file}.lock").exists()
    assert capture_script.is_written(str(file))  # and for a writer without locks
