"""What runs inside vLLM's own Python: it computes the states of micro-batches, and leaves each sample's in a file.

`PYTHON capture_script.py REQUEST.json`, started by `stages/cache_hidden/vllm_engine.py`, whose docstring has the
protocol. Imports nothing of this project but `pipeline/inside_engine/` and what lies beside it.

    T tokens of a sample   K layers   D hidden size
"""

import contextlib
import difflib
import fcntl
import json
import os
import queue
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path

from engine_side import VLLM_ENVIRONMENT, end_with_parent, end_workers, fail, import_vllm, report

KNOWN = "0.32.0"
# In this process the engine takes a step when it is told to, and all samples that were added take part in it. A sample
# may be as long as the target's positions, and vLLM wants one more for the token that nobody asks for.
FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
SPARE = 2  # positions beyond the longest sample; with fewer vLLM leaves out the step that stores the states
WRITING_S = 60.0  # for the files of a micro-batch, after its last step
POLL_S = 0.002


def check(request: dict, version: str) -> None:
    """End where this vLLM cannot do what is asked, before it loads anything."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    try:
        import capture_connector  # noqa: F401
        from vllm.v1.spec_decode import extract_hidden_states  # noqa: F401
    except (ImportError, AttributeError) as error:
        fail("usage", f"{version} cannot extract hidden states ({error}); {KNOWN} can: pass --python of such a one")
    known = [field.name for field in fields(EngineArgs)]
    for name in request["options"]:
        if name not in known:
            near = "".join(f"; did you mean {each}?" for each in difflib.get_close_matches(name, known, 1))
            fail("usage", f"--engine-option {name}: {version} has no such option{near}")
    device = current_platform.device_type
    if request["device"] not in ("cpu", device):
        fail(
            "usage",
            f"{version} computes on {device}, and the capture is to be on {request['device']}; pass --device cpu, or "
            f"--python of a vLLM for {request['device']}",
        )


def start(request: dict, version: str):
    """Start the engine; return it, and what more there is to tell of it: the layers it extracts, the target's class."""
    from vllm import LLM
    from vllm.platforms import current_platform

    target = {
        "model": request["target"],
        "dtype": request["dtype"],
        "max_model_len": request["longest"] + SPARE,
        "skip_tokenizer_init": True,
        "seed": 0,
        **request["options"],
    }
    layers = [*request["layers"]]
    name, of_hugging_face, overrides = class_of(target, version)
    if of_hugging_face:  # of it vLLM has what leaves a layer, and no embedding
        if 0 in request["needed"]:
            fail("usage", f"{version} runs this target by {name}, without a layer -1; leave that out of --layers")
        layers = [layer for layer in layers if layer]
    room = "kv_cache_memory_bytes" if current_platform.is_cpu() else "gpu_memory_utilization"
    given = {
        "enforce_eager": True,  # nothing is compiled for so few steps
        "max_num_seqs": request["sequences"],
        "max_num_batched_tokens": request["tokens"] + request["sequences"],
        **({room: request[room]} if request[room] else {}),
    }
    states = {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
        },
        "kv_transfer_config": {
            "kv_connector": "CaptureConnector",
            "kv_connector_module_path": "capture_connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": request["out"]},
        },
        "enable_prefix_caching": False,  # of a prefix that is cached no states are computed (vllm-project/vllm#44485)
    }
    return LLM(**{**given, **target, **overrides, **states}), {"layers": layers, "model_class": name}


def check_pipeline(target: dict, config, version: str) -> None:
    """End where layers are to be on several devices and this vLLM extracts no states so, whatever the target."""
    divided = target.get("pipeline_parallel_size", 1) > 1
    if divided and not config.registry.is_pp_supported_model(["ExtractHiddenStatesModel"], config):
        fail(
            "usage",
            f"--engine-option pipeline_parallel_size: {version} extracts hidden states without it only; share the "
            "target with tensor_parallel_size",
        )


def class_of(target: dict, version: str) -> tuple[str, bool, dict]:
    """Return the class by which vLLM runs a target, whether that is Hugging Face's, and the options that have it so.

    Many classes of vLLM's own tell no states (in 0.32.0 those of Gemma 2 and 3, say). Hugging Face's then does, run by
    vLLM's general one.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.interfaces import supports_eagle3

    config = EngineArgs(**target).create_model_config()
    check_pipeline(target, config, version)
    general = config._get_transformers_backend_cls()
    kind, name = config.registry.resolve_model_cls(config.architectures, config)
    if supports_eagle3(kind):
        return name, name == general, {}
    return general, True, {"hf_overrides": {"architectures": [general]}}


def compute(engine, samples: list[list[int]], number: int) -> list[str | None]:
    """Compute the states of a micro-batch; return each sample's file, None where there is none."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    for index, ids in enumerate(samples):
        engine.add_request(f"{number}.{index}", {"prompt_token_ids": ids}, sampling)
    files: list[str | None] = [None] * len(samples)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                index = int(output.request_id.partition(".")[2])
                files[index] = (output.kv_transfer_params or {}).get("hidden_states_path")
    until = time.monotonic() + WRITING_S
    return [wait_for(engine, file, until) for file in files]


def wait_for(engine, file: str | None, until: float) -> str | None:
    """Return a file once it is written, None where that takes too long.

    vLLM hands a finished sample to its writer in the next step, which need not have a sample of its own.
    """
    while file is not None and not is_written(file):
        if time.monotonic() > until:
            return None
        engine.step()
        time.sleep(POLL_S)
    return file


def is_written(file: str) -> bool:
    """Return whether a file is there and its writer has let go of the lock beside it, which is then removed."""
    lock = f"{file}.lock"
    try:
        with open(lock) as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if not os.path.exists(file):
                return False
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return os.path.exists(file)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(lock)
    return True


def main(path: str) -> None:
    request = json.loads(Path(path).read_text())
    for name, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.update(FORCED)
    if request["visible_device"] is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = request["visible_device"]
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    end_with_parent(asked.put, lambda: shutil.rmtree(request["out"], ignore_errors=True))
    version = import_vllm()
    check(request, version)
    import torch
    from vllm.platforms import current_platform

    llm, facts = start(request, version)
    engine, device = llm.llm_engine, current_platform.device_type
    report(stage="ready", engine=version, torch=torch.__version__, device=device, **facts)
    number = 0
    while samples := json.loads(asked.get())["samples"]:
        report(stage="computing")
        report(stage="computed", files=compute(engine, samples, number))
        number += 1
    end_workers()


if __name__ == "__main__":
    main(sys.argv[1])
