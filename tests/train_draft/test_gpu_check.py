"""`make gpu-check` on a GPU that is not there: what only a GPU asks for runs to its end. See `fake_gpu_check.py`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "fake_accelerator.py"
GATES = ["gru", "step", "bfloat16", "loss of a step", "loss of a step within a limit", "lossy", "speed"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def record() -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "gpu-check"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_gate_that_computes_on_a_device_runs_to_its_end(record):
    assert record["ended"] == dict.fromkeys(GATES, "ok")


def test_the_report_says_what_the_device_is(record):
    assert record["machine"][0].startswith("NVIDIA H100 80GB HBM3, 80 GiB, sm_90, of 1 here; driver ")


def test_a_busy_device_delays_copies_and_takes_no_wait_away(record):
    """A copy that waited on its own stream for itself would overtake what is computed with the memory it writes to."""
    assert record["cells"] > 10 and record["races"] == {}
