"""Gates of `make gpu-check` on a GPU that is not there: `python tests/fake_accelerator.py gpu-check`.

Nothing has a value here, so what a gate finds means nothing; that it runs to its end, on operations of one device each,
is what is shown, and that what delays copies takes no wait away. What trains or captures is left out: it needs values.
"""

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fake_accelerator
import torch
from bench import gpu_check
from bench.step import Step
from fake_device import Meter
from fake_loading import load
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

import pipeline.drafts
from pipeline.drafts import Blocks, Cell, DraftConfig, lay_blocks, pack
from stages.train_draft.memory import faked

GIB = 1 << 30
FACTS = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * GIB, major=9, minor=0)


class FakeStep(Step):
    """A step whose blocks are laid from values, and then have none."""

    def __init__(self, *args):
        with _disable_current_modes():
            super().__init__(*args)
        self.cell, self.blocks = faked(self.cell), faked(self.blocks)
        self.to("cpu")  # and so have its weights


def moved(module: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """Do as `module.to(device)`: a fake tensor has no data to exchange for others."""
    for part in module.modules():
        for kept, made in ((part._parameters, torch.nn.Parameter), (part._buffers, torch.Tensor.detach)):
            for name, there in kept.items():
                if there is not None:
                    kept[name] = made(torch.empty(there.shape, dtype=there.dtype, device=device))
    return module


def packed(samples, names, **named) -> Cell:
    with _disable_current_modes():
        return pack(samples, names, **named)


def laid(cell: Cell, anchors_N: torch.Tensor, config: DraftConfig) -> Blocks:
    """Lay as many blocks, at anchors that have values."""
    with _disable_current_modes():
        return lay_blocks(cell, torch.arange(len(anchors_N)) + len(cell.ids_R) // 4, config)


def fake_facts() -> None:
    """Let torch's Python side answer what a driver would, and sleep in no time."""
    torch.cuda.get_device_properties, torch.cuda.get_device_name = lambda *_: FACTS, lambda *_: FACTS.name
    torch.cuda.max_memory_allocated = torch.cuda.memory_reserved = lambda *_: GIB
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_per_process_memory_fraction", "_sleep"):
        setattr(torch.cuda, name, lambda *_: None)


def gpu_check_gates() -> dict:
    """Return by gate "ok", or how it ended; the report's first lines; and the races of late copies."""
    fake_facts()
    gpu_check.Step, gpu_check.ROUNDS, torch.nn.Module.to = FakeStep, 1, moved
    pipeline.drafts.pack, pipeline.drafts.lay_blocks = packed, laid
    fake_accelerator.ANCHORS = 32  # the flagship's own step, which takes long, is what the harness counts elsewhere
    fake_accelerator.settings = partial(fake_accelerator.settings, width=512, vocabulary=4096)
    torch.equal = lambda a, b: a.shape == b.shape and a.device == b.device
    check, ended = gpu_check.Check("cuda", Path()), {}
    limits = {"loss of a step": None, "loss of a step within a limit": lambda static: 0.5 * static / FACTS.total_memory}
    gates: dict[str, Callable] = {"gru": check.gru, "step": check.step, "bfloat16": check.bfloat16}
    gates |= {name: lambda limit=limit: check.loss_of_a_step(limit) for name, limit in limits.items()}
    gates |= {"lossy": check.lossy, "speed": check.speed}
    for name, gate in gates.items():
        with FakeTensorMode(allow_non_fake_inputs=True), Meter("cuda"):
            try:
                gate()
                ended[name] = "ok"
            except Exception as error:  # the others are still to be asked
                traceback.print_exc()
                ended[name] = f"{type(error).__name__}: {error}"
    with gpu_check.everything_late():
        late = load("int8")
    machine = gpu_check.machine(torch.device("cuda"))
    return {"ended": ended, "machine": machine, "races": late["races"], "cells": late["cells"]}
