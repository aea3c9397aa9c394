"""A capture's micro-batch on a fake GPU, at the shape of Qwen3-8B and of the bundled target: devices, waits, copies,
memory. Run as a process of its own: see `fake_accelerator.py`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_capture import QWEN3_8B
from transformers import AutoModelForCausalLM, Qwen3Config

from pipeline.cache.columns import ColumnSpec
from pipeline.cache.schema import Identity
from stages.cache_hidden.device_memory import CaptureMemory, capture_memory
from stages.cache_hidden.settings import CaptureSettings

SCRIPT = Path(__file__).parents[1] / "fake_accelerator.py"
RAW, INT8 = "capture:8192,codec=raw", "capture:8192,codec=int8"
SHORT_INT8 = "capture:4096,codec=int8"
SMALL_RAW, SMALL_INT8 = f"{RAW},target=bundled", f"{INT8},target=bundled"
CAPTURES = (RAW, INT8, SMALL_RAW, SMALL_INT8)
COLUMNS = 6
PARAMETERS = 8_190_735_360  # of Qwen3-8B

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def records() -> dict[str, dict]:
    command = [sys.executable, str(SCRIPT), *CAPTURES, SHORT_INT8]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip((*CAPTURES, SHORT_INT8), map(json.loads, done.stdout.splitlines()), strict=True))


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
    assert {name: records[name]["storages_of_head"] for name in CAPTURES} == {
        RAW: 2,
        INT8: 2,
        SMALL_RAW: 1,
        SMALL_INT8: 1,
    }


def planned_memory(record: dict, folder: Path) -> CaptureMemory:
    """Return what a plan says of the capture that was counted; the target's files have headers, and holes."""
    config = Qwen3Config(**QWEN3_8B, dtype="bfloat16", architectures=["Qwen3ForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    header, end = {}, 0
    for name, weight in weights.items():
        begin, end = end, end + weight.nbytes
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    columns = [ColumnSpec(f"aux.{layer}", "bfloat16", 4096, record["codec"]) for layer in range(COLUMNS - 1)]
    columns.append(ColumnSpec("final", "bfloat16", 4096, record["codec"], "needed"))
    chosen = {"engine": "transformers", "dtype": "bfloat16", "batch_tokens": record["padded_tokens"]}
    identity = Identity.model_validate({"capture": chosen})
    return capture_memory(CaptureSettings(str(folder), folder, identity, tuple(columns)), longest=2048)


@pytest.mark.parametrize("capture", [RAW, INT8, SHORT_INT8])
def test_a_plan_says_what_a_capture_takes_of_a_device(records, tmp_path, capture):
    """Of what is beside the weights within 15 %, too: of all bytes, weights alone are more than nine tenths."""
    record = records[capture]
    planned = planned_memory(record, tmp_path)
    weights, peak = (record[name] * 2**30 for name in ("weights_gib", "peak_gib"))
    assert planned.weights == 2 * PARAMETERS
    assert planned.device == pytest.approx(peak, rel=0.01)
    assert planned.tokens * planned.a_token == pytest.approx(peak - weights, rel=0.15)


@pytest.mark.parametrize("capture", [RAW, INT8])
def test_a_batch_takes_little_beyond_the_weights_of_the_target(records, capture):
    record = records[capture]
    assert abs(record["weights_gib"] - 2 * PARAMETERS / 2**30) < 0.01
    assert record["weights_gib"] < record["peak_gib"] < record["weights_gib"] + 1.6
    names = {name for name, *_ in record["operations"]}
    assert "_scaled_dot_product_flash_attention" in names, "without a mask, which would take another kernel"
    assert record["tflop"] > 2 * 8184 * (PARAMETERS - 2 * 151_936 * 4096) / 1e12
