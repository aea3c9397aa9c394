"""Whole training steps on a GPU that is not there: `python tests/fake_accelerator.py METHOD[:ROWS[,KEY=VALUE...]] ...`.

A step has two cells, of which the second finds gradients in place. KEY: device, optimizer, dtype, moments and embedding
(device or host), layers (kept or recomputed), kernels (compiled or plain), anchors (of a cell), at_once (blocks
computed together), or an option of the draft. METHOD `int8`, `int6` is that codec instead, `capture:TOKENS` a
micro-batch of a capture (KEY: codec, dtype, target), `load` the loader's way to the device, and `gpu-check` gates of
that command.

torch computes shapes, dtypes and devices of fake CUDA tensors, and no values; `fake_cuda.cpp`, compiled in a second or
two, makes a CPU build believe in the device. So a step at the width of an 8B target shows here what it would on a GPU:
operations between devices (an error), waits of the host for the device, dtypes under autocast, and how much memory is
live. Each line is a JSON record, and also the estimate of a roofline: operations, floating point, bytes moved.

An estimate, not a measurement: every operation takes the longest of its arithmetic (70 % of the peak), its bytes (80 %
of the bandwidth) and a launch. Set by hand: a value that the host reads is 1; a compiled kernel is one launch that
touches its results and its inputs, some of these twice; flex attention is one that multiplies the tiles of its mask,
and its gradient two; plain attention is the memory-efficient kernel, which torch takes under a mask.

    N blocks   S slots   D hidden size   V vocabulary
"""

# ruff: noqa: E402  the library before torch

import ctypes
import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def build(folder: Path) -> Path:
    """Compile `fake_cuda.cpp` against the installed torch; return the library."""
    from importlib.util import find_spec

    torch_folder = Path(find_spec("torch").origin).parent
    include, lib, out = torch_folder / "include", torch_folder / "lib", folder / "fake_cuda.so"
    headers = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    libraries = [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    command = ["g++", "-O0", "-std=c++20", "-fPIC", "-shared", *headers, str(ROOT / "tests/fake_cuda.cpp")]
    subprocess.run([*command, "-o", str(out), *libraries], check=True, capture_output=True, text=True)
    return out


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        ctypes.CDLL(str(build(Path(scratch))), mode=ctypes.RTLD_GLOBAL)  # before torch is loaded, which looks once

import torch
from fake_device import Meter, pin, pretend
from fake_loading import each_once_the_next_is_read, load
from fake_streams import order
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.codec import Calibration
from pipeline.drafts import DRAFTS, Blocks, Draft, draft_config, flex, fused, lay_blocks, pack
from pipeline.matrix_products import torchs_own_products
from pipeline.target import host_embedding
from pipeline.target.head import TargetHead
from stages.train_draft.batches import Batch
from stages.train_draft.loader import Prefetcher
from stages.train_draft.memory import FakeRows, faked
from stages.train_draft.optimizers import make_optimizer
from stages.train_draft.step import Trainer

WIDTH, VOCABULARY, LAYERS, BLOCK, ANCHORS = 4096, 151_936, 5, 16, 512  # Qwen3-8B and a published draft of it
USUAL = {"device": "cuda", "kernels": "compiled", "optimizer": "adamw", "dtype": "bfloat16", "moments": "device"}
USUAL |= {"layers": "kept", "embedding": "device"}
OWN = {
    "dflash": {"shift_label": False},
    "domino": {"shift_label": True, "pure_draft_prefix_len": 1, "emb_dim": 256, "gru_hidden_dim": 1024},
    "dspark": {"shift_label": True, "markov_rank": 256, "block_size": 7, "gamma": 4.0},
}


def settings(method: str, width: int = WIDTH, vocabulary: int = VOCABULARY, **changes) -> dict:
    return {
        "method": method,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": width // 128,
        "num_key_value_heads": width // 512,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "rope_theta": 1e6,
        "max_position_embeddings": 40_960,
        "num_target_layers": 36,
        "target_layer_ids": (1, 9, 17, 25, 33),
        "block_size": BLOCK,
        "mask_token_id": vocabulary - 1,
        "gamma": 7.0,
        **OWN[method],
        **changes,
    }


@dataclass(frozen=True)
class CutBlocks(Blocks):
    """Blocks whose parts were cut before they became fake: groups of blocks are made from values."""

    parts: tuple[Blocks, ...] = ()

    def split(self, count: int | None) -> list[Blocks]:
        return list(self.parts)


class FakeTraining:
    """A trainer with one batch of one cell, all of it fake, on `device`, which computes `at_once` blocks together."""

    def __init__(
        self, method: str, rows: int, device: str, anchors: int = ANCHORS, at_once: int | None = None, **changes
    ):
        self.config = draft_config(**settings(method, **changes))
        cell = pack([FakeRows(rows, self.config)], ["s"], final=self.config.needs_final_states)
        span = rows - rows // 4 - 2
        anchors_N = torch.arange(anchors) * (span // anchors) + rows // 4
        blocks, self.device = lay_blocks(cell, anchors_N, self.config), device
        cut = blocks.split(at_once)
        self.mode, self.meter = FakeTensorMode(allow_non_fake_inputs=True), Meter(device)
        with self.mode:
            parts = tuple(map(faked, cut))
            self.cell, whole = faked(cell), faked(blocks)
            for states in (self.cell.aux_KRD, self.cell.final_FD):  # as the loader reads them
                states is None or pin(states)
        self.entries = mean_entries(cut)
        self.blocks = CutBlocks(**{field.name: getattr(whole, field.name) for field in fields(whole)}, parts=parts)

    def prepare(self, optimizer: str, dtype: str, moments: str, layers: str, embedding: str) -> Trainer:
        head_type = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        shape = self.config.vocab_size, self.config.hidden_size
        head = TargetHead(*(torch.empty(*shape, dtype=head_type, device=self.device) for _ in range(2)))
        if embedding == "host":
            # these have no values: as many as there can be, all distinct
            host_embedding.distinct = lambda ids: torch.empty(sum(map(torch.numel, ids)), dtype=torch.long)
            head = head.with_embedding_on_host()
        with torch.device(self.device):
            draft = DRAFTS[self.config.method](self.config, head)
        draft.recomputes_layers = layers == "recomputed"
        train = SimpleNamespace(steps=1000, log_every=10, lr=1e-3, warmup=0.0, schedule="wsd", clip=1.0, dtype=dtype)
        train.echo = 1
        chosen = make_optimizer(optimizer, draft, moments == "host")
        return Trainer(draft.train(), chosen, SimpleNamespace(sampler=SimpleNamespace(train=train)))

    def batches(self, train: SimpleNamespace) -> Prefetcher:
        """Return batches of two cells, which go to the device as in a training."""

        def batch(step: int) -> Batch:
            return Batch(step, 0, [self.cell] * 2, [self.blocks] * 2, [[]] * 2, ["s"])

        sampler = SimpleNamespace(batch=batch, train=train)
        read = SimpleNamespace(read=lambda *_: self.cell, size=len, numbers=lambda _: range(2), sampler=sampler)
        return Prefetcher(read, 1, 5, torch.device(self.device))

    def measure(self, kernels: str, optimizer: str, dtype: str, moments: str, layers: str, embedding: str) -> dict:
        """Return the record of the second step, which finds gradients and moments in place."""
        order.reset()
        fused.use_kernels(self.meter.kernels(self.entries) if kernels == "compiled" else None)
        with self.mode, self.meter as meter:
            trainer = self.prepare(optimizer, dtype, moments, layers, embedding)
            static = meter.live
            batches = self.batches(trainer.train)
            for batch, cells in itertools.islice(batches, 2):
                meter.reset()
                trainer.step(batch, each_once_the_next_is_read(cells, batches))
            batches.close()
            record = self._record(meter, static)
            meter.reset()
            self._evaluate(trainer.draft.eval())
        others = {"kernels": kernels, "optimizer": optimizer, "dtype": dtype}
        return record | {"evaluation_waits": dict(+meter.waits)} | others

    @torch.no_grad()
    def _evaluate(self, draft: Draft) -> None:
        """Propose as an evaluation does, but for reading the tokens, which have no values here."""
        cell, blocks = self.cell.to(self.device), self.blocks.to(self.device)
        draft.rollout(draft.hidden(cell, blocks), cell.ids_R[blocks.anchors_N])

    def _record(self, meter: Meter, static: int) -> dict:
        return {
            "method": self.config.method,
            "config": self.config.model_dump(exclude_none=True),
            "device": self.device,
            "static_gib": round(static / 2**30, 2),
            "races": dict(+order.races),
            **meter.receipt(),
            "operations": sorted([name, list(dtypes), count] for (name, dtypes), count in meter.operations.items()),
        }


def mean_entries(parts: list[Blocks]) -> int:
    """Return how many entries of queries x keys flex attention computes in a part, on a full layer."""
    masks = [flex.FlexAttention(part, {None}).masks[None] for part in parts]
    tiles = [int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) for mask in masks]
    return flex.TILE**2 * sum(tiles) // len(tiles)


def codec_on(device: str, name: str) -> dict:
    """Encode and decode states there, with a calibration that is there; return the waits of the host."""
    import numpy as np

    codec, mode, meter = CODECS[name], FakeTensorMode(allow_non_fake_inputs=True), Meter(device)
    calibration = Calibration(np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
    with mode, meter:
        states_RD = torch.empty(256, WIDTH, dtype=torch.bfloat16, device=device)
        calibration.on(states_RD.device)
        meter.reset()
        codes = codec.encode(states_RD, calibration)[:2]
        codec.decode(codes, calibration, torch.empty_like(states_RD))
    return {"codec": name, "device": device, "waits": dict(+meter.waits)}


def main() -> None:
    pretend()
    for named in sys.argv[1:]:
        what, _, rest = named.partition(":")
        rows, _, others = rest.partition(",")
        chosen = dict(pair.split("=") for pair in others.split(",") if pair)
        if what in CODECS:
            print(json.dumps(codec_on("cuda", what)))
            continue
        if what == "capture":
            from fake_capture import capture

            print(json.dumps(capture(chosen.pop("codec", "raw"), int(rows or 8192), **chosen)), flush=True)
            continue
        if what == "gpu-check":
            from fake_gpu_check import gpu_check_gates

            print(json.dumps(gpu_check_gates()), flush=True)
            continue
        if what == "load":
            print(json.dumps(load(chosen.pop("codec", "raw"), chosen.get("without"))), flush=True)
            continue
        device, *training = (chosen.pop(key, usual) for key, usual in USUAL.items())
        changes = {key: int(value) if value.isdecimal() else value for key, value in chosen.items()}
        print(json.dumps(FakeTraining(what, int(rows or 3072), device, **changes).measure(*training)), flush=True)


if __name__ == "__main__":
    with torchs_own_products():  # also of a step that stays on the CPU, which is compared
        main()
