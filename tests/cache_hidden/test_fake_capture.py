"""A capture's micro-batch on a fake GPU, at the shape of Qwen3-8B and of the bundled target: devices, waits, copies,
memory. Run as a process of its own: see `fake_accelerator.py`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "fake_accelerator.py"
RAW, INT8 = "capture:8192,codec=raw", "capture:8192,codec=int8"
SMALL_RAW, SMALL_INT8 = f"{RAW},target=bundled", f"{INT8},target=bundled"
CAPTURES = (RAW, INT8, SMALL_RAW, SMALL_INT8)
COLUMNS = 6
PARAMETERS = 8_190_735_360  # of Qwen3-8B

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def records() -> dict[str, dict]:
    command = [sys.executable, str(SCRIPT), *CAPTURES]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CAPTURES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_capture_waits_for_the_device_only_where_it_must(records, capture):
    """Whatever waits, in full; operations between devices are errors by themselves.

    run_decoder: transformers asks whether the positions are those of packed sequences, before the first layer.
    encode: how many outliers a column has decides how much memory they take; once a column.
    wait: the writer's thread, once a batch, before it reads the copies.
    """
    by_codec = {"raw": {}, "int8": {"scaled_groups.py:encode": COLUMNS}}
    assert records[capture]["waits"] == {"model.py:run_decoder": 1} | by_codec[records[capture]["codec"]]
    assert records[capture]["events"] == {"pack.py:wait": 1}


@pytest.mark.parametrize("capture", CAPTURES)
def test_everything_is_copied_once_a_batch_on_a_stream_that_waits_for_the_forward(records, capture):
    """A column's rows, its codes, scales and outliers in int8 and then the exact rows of all certified samples, too;
    its largest magnitudes; and the scores of tokens."""
    a_column = {"raw": 1, "int8": 4}[records[capture]["codec"]]
    assert records[capture]["copies"] == COLUMNS * (a_column + 1) + 1
    assert records[capture]["places"] == ["cpu"]
    assert records[capture]["order"] == [
        "copying waits for computing",
        "memory kept for copying",
        "event after copying",
    ]


def test_embedding_and_head_are_in_memory_once(records):
    """Of engine, probe and packer together; the bundled target's are one matrix."""
    assert {name: record["storages_of_head"] for name, record in records.items()} == {
        RAW: 2,
        INT8: 2,
        SMALL_RAW: 1,
        SMALL_INT8: 1,
    }


@pytest.mark.parametrize("capture", [RAW, INT8])
def test_a_batch_takes_little_beyond_the_weights_of_the_target(records, capture):
    record = records[capture]
    assert abs(record["weights_gib"] - 2 * PARAMETERS / 2**30) < 0.01
    assert record["weights_gib"] < record["peak_gib"] < record["weights_gib"] + 1.6
    names = {name for name, *_ in record["operations"]}
    assert "_scaled_dot_product_flash_attention" in names, "without a mask, which would take another kernel"
    assert record["tflop"] > 2 * 8184 * (PARAMETERS - 2 * 151_936 * 4096) / 1e12
