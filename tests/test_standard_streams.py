"""Readers that go away, terminals that are closed: the work is done, and the exit code is the command's own."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest
from cache_maker import flip

from pipeline.runs import checkpoint

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STEPS = 12
SETS = ("train.batch=4", "train.anchors=6", "draft.block_size=4", "train.log_every=1", f"train.steps={STEPS}")
SETS += ("train.save_every=5", "train.eval_every=100", "draft.method=dflash")


@pytest.fixture(scope="module")
def damaged(tiny_cache, tmp_path_factory):
    cache = shutil.copytree(tiny_cache, tmp_path_factory.mktemp("damaged") / "cache")
    flip(cache / "shards/000001/aux.3.arrow", 900)
    return cache


def shell(line: str, *arguments) -> tuple[list[int], str, str]:
    """Run a line of bash in which `$P` is the program; its exit codes in a pipe's order, what it printed and said."""
    quoted = f'{line}; echo "${{PIPESTATUS[@]}}" >&9'
    read, write = os.pipe()
    environment = ENVIRONMENT | {"P": f"{sys.executable} -m pipeline", "LC_ALL": "C.UTF-8"}
    command = ["bash", "-c", f"exec 9>&{write}; {quoted}", "bash", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, pass_fds=[write])
    os.close(write)
    codes = os.fdopen(read).read()
    return [int(code) for code in codes.split()], done.stdout, done.stderr


ENDS = ("| head -1", "| true", ">&-", "2>&-", ">&- 2>&- <&-", "2>&1 | true")
COMMANDS = {
    "--help": (0, ENDS),
    "inspect $1": (0, ENDS[:1]),
    "inspect $1 --sample 0": (0, ENDS[1:3]),
    "verify $1": (0, ENDS[1:2]),
    "verify $2": (4, ENDS),
    "train-draft --cach x": (2, ENDS[2:]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_with_its_own_code_whoever_reads_it(command, tiny_cache, damaged):
    code, ends = COMMANDS[command]
    for line in ends:
        codes, _, said = shell(f"$P {command} {line}", tiny_cache, damaged)
        assert codes[0] == code and "Traceback" not in said and "Exception" not in said, (line, said)
        assert said.count("\n") <= 1 and bool(said) == (code != 0 and "2>" not in line), (line, said)


def test_an_error_line_does_not_land_in_what_a_closed_stream_left_free(tiny_cache, damaged, tmp_path):
    """With standard error closed, the next file that is opened would be number 2."""
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    assert shell("$P verify $1 >&- 2>&-", damaged)[0] == [4]
    assert {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_that_the_disk_does_not_hold_is_said(tiny_cache, damaged):
    codes, _, said = shell("$P inspect $1 --json > /dev/full", tiny_cache)
    assert (
        codes == [5] and said.startswith("error: standard output: No space left on device; ") and said.count("\n") == 1
    )
    assert shell("$P verify $1 > /dev/full", damaged)[0] == [4]


def training(cache: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "pipeline", "train-draft", "--cache", str(cache), "--out", str(out)]
    return [*command, "--device", "cpu", *(word for entry in SETS for word in ("--set", entry))]


@pytest.fixture(scope="module")
def straight(tiny_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    subprocess.run(training(tiny_cache, out), cwd=ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    return out


def check_same(run: Path, straight: Path) -> None:
    for name in ("metrics.jsonl", "done.json", f"checkpoints/step-{STEPS:08d}/draft.safetensors"):
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name


@pytest.mark.parametrize("line", ["| head -1", "2>&1 | true", ">&- 2>&- <&-", "> /dev/full"])
def test_a_training_whose_reader_goes_away_goes_on(tiny_cache, straight, tmp_path, line):
    words = " ".join(training(tiny_cache, tmp_path / "run")[3:])
    codes, _, said = shell(f"$P {words} {line}")
    assert codes[0] == (5 if "full" in line else 0) and "Traceback" not in said
    check_same(tmp_path / "run", straight)


def until(there, process) -> None:
    for _ in range(3000):
        if there() or process.poll() is not None:
            return
        time.sleep(0.01)


def slowly() -> dict:
    """An environment in which each step takes a moment more, so that a signal comes in the middle."""
    code = (
        "import time, stages.train_draft.step as t\n"
        "step = t.Trainer.step\n"
        "t.Trainer.step = lambda *given: (time.sleep(0.15), step(*given))[1]\n"
    )
    return {"SLOW": code}


RUN_SLOWLY = "import os, sys; exec(os.environ['SLOW']); from pipeline.cli import main; main(sys.argv[1:])"


def slow(cache: Path, out: Path) -> list[str]:
    return [sys.executable, "-c", RUN_SLOWLY, *training(cache, out)[3:]]


def test_a_terminal_that_is_closed_has_the_training_saved_and_the_same_command_goes_on(tiny_cache, straight, tmp_path):
    ours, theirs = pty.openpty()

    def on_the_terminal():
        os.setsid()
        ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        slow(tiny_cache, tmp_path / "run"),
        cwd=ROOT,
        env=ENVIRONMENT | slowly(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=on_the_terminal,
    )
    os.close(theirs)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    os.close(ours)  # the window is gone: the kernel sends SIGHUP, and writing is an error from now on
    assert process.wait(60) == 129
    assert len(checkpoint.steps(tmp_path / "run")) > 0 and not (tmp_path / "run/done.json").exists()
    subprocess.run(training(tiny_cache, tmp_path / "run"), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    check_same(tmp_path / "run", straight)


@pytest.mark.parametrize("ignored", [False, True], ids=["heeded", "under nohup"])
def test_sighup_saves_as_sigterm_does_and_is_ignored_where_it_was(tiny_cache, straight, tmp_path, ignored):
    process = subprocess.Popen(
        slow(tiny_cache, tmp_path / "run"),
        cwd=ROOT,
        env=ENVIRONMENT | slowly(),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (0 if ignored else 129), said
    assert ("saved in" in said) == (not ignored)
    if not ignored:
        subprocess.run(
            training(tiny_cache, tmp_path / "run"), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True
        )
    check_same(tmp_path / "run", straight)
