"""Which engine runs the target for a capture, where its Python is, and what it is told beside: without torch.

--engine vllm --python V/bin/python --engine-option tensor_parallel_size=2
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cache.schema import CaptureRules
from pipeline.engine_process import check_python, find_python
from pipeline.errors import UsageError
from pipeline.nearest_name import did_you_mean

HUGGING_FACE = "transformers"
IN_PROCESSES = ("vllm",)  # engines that are processes of their own
NAMES = (HUGGING_FACE, *IN_PROCESSES)

# What an engine in a process may be told. These say where and in how much memory it runs: as with our own devices and
# ranks, a cache may go on with others, and only the rounding of sums follows from them.
PLACEMENT = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "enable_expert_parallel",
    "distributed_executor_backend",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "cpu_offload_gb",
    "load_format",
)
# These decide what it computes, so they are part of what a cache is.
ARITHMETIC = (
    "quantization",
    "kv_cache_dtype",
    "attention_backend",
    "moe_backend",
    "language_model_only",
    "enforce_eager",
)
DECIDED = {
    "dtype": "--dtype",
    "max_model_len": "--max-length",
    "max_num_batched_tokens": "--batch-tokens",
    "model": "--model",
    "revision": "--revision",
}


@dataclass(frozen=True)
class ChosenEngine:
    """The engine of a capture. python: of its process, None: by default. options: all that it is told."""

    name: str = HUGGING_FACE
    python: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict:
        """The entries of the identity's `capture`: its name, and the options that its states depend on."""
        bound = {name: value for name, value in sorted(self.options.items()) if name in ARITHMETIC}
        return {"engine": self.name, **({"engine_options": bound} if bound else {})}

    @property
    def options_text(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in sorted(self.options.items()))

    def check(self) -> None:
        """Find the Python of an engine that has one, before anything is loaded. UsageError."""
        if self.name in IN_PROCESSES:
            check_python(self.found_python, self.name)

    @property
    def found_python(self) -> Path:
        return find_python(self.python)


def choose_engine(name: str | None, python: Path | None, options: str | None, cached: CaptureRules) -> ChosenEngine:
    """Return the engine that the options name; what they leave open is as in the cache, else Hugging Face's.

    options: see `parse_options`. UsageError where they do not go together.
    """
    chosen = name or (cached.engine if cached.engine in NAMES else HUGGING_FACE)
    given = parse_options(options)
    if chosen not in IN_PROCESSES:
        if python or given:
            named = "--python" if python else "--engine-option"
            raise UsageError(f"{named} is for an engine in a process of its own; pass --engine {IN_PROCESSES[0]} too")
        return ChosenEngine(chosen)
    if not given.keys() & {*ARITHMETIC} and chosen == cached.engine:
        given |= cached.engine_options or {}
    return ChosenEngine(chosen, python, given)


def shares_itself(name: str, ranks: int) -> str:
    """Return why ranks of torchrun cannot share the target of an engine in a process, and what to do."""
    return (
        f"--tensor-parallel shares a target that Hugging Face runs, and {name} shares one by itself; start one "
        f"process, with --engine-option tensor_parallel_size={ranks}"
    )


def parse_options(text: str | None) -> dict[str, Any]:
    """Return options given as KEY=VALUE, one a line. A value that is JSON is taken as such, else as text.

    UsageError for what is no pair, for one given twice, and for what is not passed on.
    """
    found: dict[str, Any] = {}
    known = PLACEMENT + ARITHMETIC
    for pair in (text or "").splitlines():
        name, equals, value = pair.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not (equals and name.isidentifier()):
            raise UsageError(f"--engine-option {pair}: wanted KEY=VALUE, such as tensor_parallel_size=2")
        if name in found:
            raise UsageError(f"--engine-option {name} is given twice; leave one out")
        if name not in known:
            remedy = f"; pass {DECIDED[name]}" if name in DECIDED else did_you_mean(name, known)
            raise UsageError(f"--engine-option {name} is not passed on{remedy or '; these are: ' + ', '.join(known)}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
