"""Training steps on fake CUDA tensors at the width of an 8B target: devices, waits, dtypes, determinism, memory.

Run as a process of its own, which takes the CPU build of torch for one with a GPU: see `fake_accelerator.py`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.drafts import draft_config
from stages.train_draft.memory import Fit, StepMemory, step_memory

SCRIPT = Path(__file__).parents[1] / "fake_accelerator.py"
SMALLER = "1024,anchors=64,num_hidden_layers=2"  # the same operations, in seconds
LOSSES = [
    f"dflash:{SMALLER}",
    f"domino:{SMALLER}",
    f"dspark:{SMALLER}",
    f"dflash:{SMALLER},optimizer=muon",
    f"domino:{SMALLER},weighting=dpace,objective=dspark",
    f"dspark:{SMALLER},objective=lk-hybrid,markov_head_type=rnn",
]
IN_PARTS = f"domino:{SMALLER},at_once=16"
LONG = "domino:32768,anchors=64,num_hidden_layers=1"  # a cell whose ids are more than CUDA copies aside
SPARING = [f"{loss},layers=recomputed,embedding=host" for loss in LOSSES[:3]]
PLAIN = [f"{loss},kernels=plain" for loss in LOSSES]
LOADS = ("load:,codec=raw", "load:,codec=int8")
WITHOUT = ("copies-for-compute", "compute-for-copies", "thread-for-copies")
ON_CPU = [f"{loss},device=cpu" for loss in PLAIN]

# What torch documents as having no deterministic form on CUDA, as far as a draft could meet it.
NONDETERMINISTIC = re.compile(r"cumsum|put_|histc|bincount|median|nll_loss.*|_ctc_loss.*|_embedding_bag.*|resize_")
# Autocast runs these in float16 on CUDA whatever it is asked for.
IN_FLOAT16 = re.compile(r".*rnn.*|.*gru.*|.*lstm.*")

# Copies to the device, and into reused memory on a CPU; the sum of the weights, the host's; what SiLU's gradient is
# composed of where CUDA is fake.
COMPOSED = {"_to_copy", "copy_", "sum", "sigmoid", "mul", "sub_", "fill_"}

MASKED = "_scaled_dot_product_efficient_attention_backward"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def records() -> dict[str, dict]:
    """The record of each step by its name."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *LOSSES, *PLAIN, *SPARING, IN_PARTS, LONG, *ON_CPU, "int8", "int6", *LOADS]
    command += [f"{LOADS[0]},without={wait}" for wait in WITHOUT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(command[2:], map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("loss", [*LOSSES, *PLAIN, LONG])
def test_a_step_waits_for_the_device_twice_and_an_evaluation_never(records, loss):
    """For the gradient's norm and the loss, which decide whether the weights may change. Copies to the device are
    counted, too: none of them may wait for what is queued there."""
    assert records[loss]["waits"] == {"step.py:step": 2}
    assert records[loss]["evaluation_waits"] == {}


@pytest.mark.parametrize("loss", SPARING)
def test_an_embedding_on_the_host_is_waited_for_only_in_evaluations(records, loss):
    assert records[loss]["waits"] == {"step.py:step": 2} and records[loss]["races"] == {}
    assert records[loss]["evaluation_waits"].keys() == {"host_embedding.py:__call__"}


@pytest.mark.parametrize("codec", ["int8", "int6"])
def test_a_lossy_codec_decodes_without_a_wait_and_encodes_with_one_for_the_number_of_outliers(codec, records):
    assert records[codec]["waits"] == {"scaled_groups.py:encode": 1}


@pytest.mark.parametrize("load", LOADS)
def test_the_next_cell_is_copied_from_pinned_memory_meanwhile_and_only_the_loaders_thread_waits_for_copies(
    records, load
):
    """Nothing is read before it is copied, and no memory, of host or device, is written again before it was read."""
    record = records[load]
    assert record["waits"] == {} and record["pinned"] == [True] and record["places"] == ["cuda"]
    assert record["cells"] == record["ahead"] > 10
    assert record["events"].keys() == {"loader.py:wait_for_copies"}
    assert record["events"]["loader.py:wait_for_copies"] > 5
    assert record["races"] == {} and {*record["order"]} == {
        "copying waits for computing",
        "event after copying",
        "computing waits for an event after copying",
        "prefetch waits for copying",
    }


@pytest.mark.parametrize(
    ("without", "race"),
    [("copies-for-compute", "reused"), ("compute-for-copies", "read"), ("thread-for-copies", "overwritten")],
)
def test_every_wait_of_the_copies_is_needed(records, without, race):
    found = records[f"{LOADS[0]},without={without}"]
    assert found["races"].get(race, 0) > 5 and found["ahead"] > 10


@pytest.mark.parametrize("loss", [*LOSSES, *PLAIN, LONG])
def test_a_step_reads_nothing_before_it_is_there(records, loss):
    assert records[loss]["races"] == {}


@pytest.mark.parametrize("loss", PLAIN)
def test_autocast_takes_the_dtypes_on_a_gpu_that_it_takes_on_a_cpu(records, loss):
    def dtypes(record: dict) -> dict[str, set]:
        found: dict[str, set] = {}
        for name, kinds, _ in record["operations"]:
            found.setdefault(name, set()).add(tuple(kind for kind in kinds if "float" in kind))
        return found

    on_gpu, on_cpu = dtypes(records[loss]), dtypes(records[f"{loss},device=cpu"])
    shared = on_gpu.keys() & on_cpu.keys() - COMPOSED
    assert len(shared) > 30
    assert {name: on_gpu[name] for name in shared} == {name: on_cpu[name] for name in shared}
    assert not any("float16" in kinds for name in on_gpu for kinds in on_gpu[name])


@pytest.mark.parametrize("loss", LOSSES + PLAIN)
def test_no_operation_of_a_step_is_without_a_deterministic_form_or_in_float16(records, loss):
    names = {name for name, *_ in records[loss]["operations"]}
    assert ({"mm", "flex_attention_backward"} if loss in LOSSES else {"mm", MASKED}) <= names
    assert [name for name in names if NONDETERMINISTIC.fullmatch(name) or IN_FLOAT16.fullmatch(name)] == []


@pytest.mark.parametrize(
    ("loss", "at_once"), [(LOSSES[1], 64), (IN_PARTS, 16), (LOSSES[2], 64), (PLAIN[1], 64), (PLAIN[2], 64)]
)
def test_a_step_on_a_gpu_has_the_live_bytes_that_are_planned(records, loss, at_once):
    planned, record = planned_memory(records[loss]), records[loss]
    assert abs(planned.static / 2**30 / record["static_gib"] - 1) < 0.01
    assert abs(planned.peak(Fit(at_once)) / 2**30 / record["peak_gib"] - 1) < 0.15


@pytest.mark.parametrize("loss", SPARING)
def test_recomputed_layers_and_an_embedding_on_the_host_spare_the_bytes_that_are_planned(records, loss):
    planned, record = planned_memory(records[loss]), records[loss]
    sparing = Fit(64, recomputes_layers=True, embedding_on_host=True)
    assert abs((planned.static - planned.embedding) / 2**30 / record["static_gib"] - 1) < 0.01
    assert abs(planned.peak(sparing) / 2**30 / record["peak_gib"] - 1) < 0.15
    assert planned.peak(sparing) < planned.peak(Fit(64)) - planned.embedding


def planned_memory(record: dict) -> StepMemory:
    train = SimpleNamespace(context=1024, cell_anchors=64, dtype="bfloat16", optimizer="adamw", lr=1e-3)
    config = draft_config(**record["config"])
    return step_memory(config, train, torch.bfloat16, tied=False, compiled=record["kernels"] == "compiled")
