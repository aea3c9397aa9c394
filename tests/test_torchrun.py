"""Ranks that torchrun starts: those that meet, those that cannot, and the one line that their errors end with."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline import torchrun
from pipeline.errors import CacheError, PipelineError, RoomError, UsageError

ROOT = Path(__file__).parent.parent
SET = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def ends(monkeypatch):
    """With which codes processes end, in place of ending this one."""
    codes = []
    monkeypatch.setattr(torchrun, "leave", codes.append)
    monkeypatch.setattr(torchrun, "_chosen", False)
    monkeypatch.setattr(atexit, "register", lambda leave, code: leave(code))
    before = {number: signal.getsignal(number) for number in torchrun.STOP_SIGNALS}
    yield codes
    for number, handler in before.items():
        signal.signal(number, handler)


def raised(store, error: BaseException):
    with torchrun.one_error(store, PipelineError("a rank is lost")):
        raise error


def test_one_of_several_ranks_is_told_by_all_of_torchruns_variables():
    assert torchrun.several(SET)
    assert not torchrun.several(SET | {"WORLD_SIZE": "1"}) and not torchrun.several({"WORLD_SIZE": "2"})
    for missing in torchrun.VARIABLES[2:]:
        with pytest.raises(UsageError, match=f"WORLD_SIZE = 2 in the environment, and no {missing}; start the ranks"):
            torchrun.several({name: value for name, value in SET.items() if name != missing})
    with pytest.raises(UsageError, match="RANK = 2 in the environment: wanted less than WORLD_SIZE = 2"):
        torchrun.several(SET | {"RANK": "2"})
    with pytest.raises(UsageError, match="WORLD_SIZE = 'x' in the environment: wanted a number"):
        torchrun.several(SET | {"WORLD_SIZE": "x"})


def test_the_first_error_is_raised_and_all_others_end_with_its_code(ends):
    store, lost = dist.HashStore(), RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(CacheError, match="damaged"):
        raised(store, CacheError("damaged"))
    assert torchrun.speaks({"LOCAL_RANK": "1"}) and ends == [4]
    for error in (lost, SystemExit(143), RoomError("a second one")):
        with pytest.raises((PipelineError, SystemExit)):  # where `leave` does not end the process
            raised(store, error)
        assert not torchrun.speaks({"LOCAL_RANK": "1"})
    assert ends[1::2] == [4, 4, 5]


def test_a_rank_that_is_lost_without_a_word_is_named_once(ends):
    store = dist.HashStore()
    with pytest.raises(PipelineError, match=r"a rank is lost \(gloo: Connection closed by peer\)"):
        raised(store, RuntimeError("gloo: Connection closed by peer"))
    assert ends == [1] and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_what_all_ranks_of_a_machine_hear_the_first_of_them_says():
    for local, count in (("0", 1), ("1", 0)):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "train-draft", "--nonsense"], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, **SET, "LOCAL_RANK": local},
        )  # fmt: skip
        assert done.returncode == 2 and done.stderr.count("No such option") == count


def test_a_signal_ends_a_rank_that_waits_for_the_others_to_start():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        environment = {**os.environ, **SET, "MASTER_PORT": str(free.getsockname()[1]), "PYTHONPATH": str(ROOT)}
    code = "from pipeline.torchrun import join; import torch.distributed; print('in', flush=True); join('gloo', 1, 2)"
    rank = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert rank.stdout.readline() == b"in\n"
    time.sleep(0.5)
    rank.terminate()
    assert rank.wait(10) == -signal.SIGTERM
    rank.stdout.close()


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (UsageError("x"), 2), (MemoryError(), 5), (ValueError(), 1)],
)
def test_a_rank_that_prints_nothing_ends_with_the_code_of_its_error(error, code):
    assert torchrun.exit_code(error) == code
