"""How much device memory a training step needs, known before anything is loaded.

A step runs on fake tensors, which have shapes and dtypes and no values, while live bytes are counted: seconds on a CPU,
whatever the size of the draft. Its most live bytes are the largest of several phases', each linear in the number of
blocks that are computed together: so between measured numbers a straight line is never too low.

    R rows of a cell
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.cache.atomic import size_text
from pipeline.drafts import DRAFTS, DraftConfig, fused, lay_blocks, pack
from pipeline.drafts.fused import Kernels, use_kernels
from pipeline.runs.recipe import TrainSection
from pipeline.target.head import NEWEST, TargetHead, chunk_blocks
from stages.train_draft.step import make_optimizer

GRANULE = 512  # bytes of device memory that torch's allocator rounds up to
USABLE = 0.875  # of a device: the rest is CUDA's context, the libraries' workspaces, and gaps between tensors


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors on one kind of device that operations made and nobody has freed."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device, self.live, self.peak, self.paused = device, 0, 0, False
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if self.paused:
            return results
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return results

    def one_kernel(self, name: str, compute: Callable, *args, flop: int = 0):
        """Return `compute(*args)`, counted as one kernel: nothing in between is ever in memory."""
        self.paused = True
        results = compute(*args)
        self.paused = False
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return results

    def kernels(self, entries: int = 0) -> Kernels:
        """Return kernels that compute nothing but shapes. entries: of queries x keys in flex attention."""
        return Kernels(
            self.device,
            lambda function: partial(self.one_kernel, function.__name__, function),
            lambda q, k, v, mask: FakeFlex.apply(q, k, v, entries, self),
        )

    def note(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage as live until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == self.device and key not in self._known:
            size = -(-storage.nbytes() // GRANULE) * GRANULE
            self._known[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._known.pop(key, None)


class FakeFlex(torch.autograd.Function):
    """Flex attention [A, Q, E] of q [A, Q, E] and k, v [G, L, E], without values."""

    @staticmethod
    def forward(ctx, q, k, v, entries: int, memory: LiveBytes):
        def compute(q, k, v):
            return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)

        out, sums = memory.one_kernel("flex_attention", compute, q, k, v, flop=4 * q.shape[-1] * len(q) * entries)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.given = entries, memory
        return out

    @staticmethod
    def backward(ctx, grad):
        (q, k, v, out, sums), (entries, memory) = ctx.saved_tensors, ctx.given
        along = memory.one_kernel("flex_attention_delta", lambda out, grad: torch.empty_like(sums), out, grad)

        def compute(q, k, v, *_):
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

        flop = 10 * q.shape[-1] * len(q) * entries
        given = q, k, v, grad, sums, along
        return *memory.one_kernel("flex_attention_backward", compute, *given, flop=flop), None, None


@dataclass(frozen=True)
class Fit:
    """What of a step a device has memory for. at_once: blocks computed together, 0 for none. moments_on_host: whether
    AdamW's moments have to lie there."""

    at_once: int
    moments_on_host: bool = False


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on one device.

    static: weights, moments, the target's embedding and head. moments: of these, what can lie on the host. peaks: the
    most live bytes while the gradients are there, by the number of blocks computed together.
    """

    parameters: int
    static: int
    moments: int
    peaks: dict[int, int]

    @property
    def gradients(self) -> int:
        return 4 * self.parameters

    @property
    def blocks(self) -> int:
        """The blocks of a whole cell."""
        return max(self.peaks)

    def peak(self, fit: Fit) -> int:
        """Return the most bytes that are live in a step."""
        whole = np.interp(fit.at_once, list(self.peaks), list(self.peaks.values()))
        return int(whole) - fit.moments_on_host * self.moments

    def fit(self, device_bytes: int) -> Fit:
        """Return how a device of this size computes a step: whole; or in parts, of a quarter of the blocks at least; or
        with the moments on the host, whose copies cost a second or two a step, in the largest parts that fit."""
        here, there = (Fit(self._most_blocks(device_bytes, on_host), on_host) for on_host in (False, self.moments > 0))
        return here if 4 * here.at_once >= self.blocks or here.at_once == there.at_once else there

    def _most_blocks(self, device_bytes: int, on_host: bool) -> int:
        counts = range(self.blocks, 0, -1)
        return next((count for count in counts if self.peak(Fit(count, on_host)) <= USABLE * device_bytes), 0)


def step_memory(
    config: DraftConfig, train: TrainSection, head: torch.dtype, tied: bool, compiled: bool = True
) -> StepMemory:
    """Return the memory of a step on cells of `train.context` rows and `train.cell_anchors` blocks.

    head: dtype of the target's embedding and LM head, which are one tensor if `tied`. compiled: with compiled kernels,
    as on a GPU where they can be. The draft's weights and the optimiser's states are float32.
    """
    counts = sorted({1, -(-train.cell_anchors // 4), train.cell_anchors})
    measured = {blocks: _measure(config, train, head, tied, blocks, compiled) for blocks in counts}
    parameters, static, moments, _ = measured[1]
    on_host = moments if train.optimizer == "adamw" else 0
    return StepMemory(parameters, static, on_host, {blocks: peak for blocks, (*_, peak) in measured.items()})


def _measure(
    config: DraftConfig, train: TrainSection, head: torch.dtype, tied: bool, blocks: int, compiled: bool
) -> tuple[int, int, int, int]:
    """Return the number of parameters, the bytes live before a step, those of moments, and the most of a step."""
    cell = pack([FakeRows(train.context, config)], ["fake"], final=config.needs_final_states)
    laid = lay_blocks(cell, torch.linspace(train.context // 4, train.context - 2, blocks).long(), config)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        LiveBytes() as memory,
        kernels_used(memory.kernels() if compiled else None),
    ):
        weights_VD = torch.empty(config.vocab_size, config.hidden_size, dtype=head)
        draft = DRAFTS[config.method](config, TargetHead(weights_VD, weights_VD if tied else weights_VD.clone()))
        draft.train().blocks_per_chunk = lambda hidden_NSD: chunk_blocks(
            hidden_NSD.shape[1], config.proposable, "cuda", NEWEST
        )
        before = memory.live
        optimizer = make_optimizer(train.optimizer, draft)
        static = memory.live
        cell, laid = faked(cell), faked(laid)
        for _ in range(2):  # the second finds gradients, as all cells and parts of a step but the first do
            memory.peak = memory.live
            with torch.autocast("cpu", torch.bfloat16, enabled=train.dtype == "bfloat16"):
                loss = draft.loss(cell, laid, draft.schedule(1, 2), draft.denominators(laid), metrics=True)
            loss.total.backward()
        optimizer.step(train.lr)
        return sum(weight.numel() for weight in draft.parameters()), static, static - before, memory.peak


@contextlib.contextmanager
def kernels_used(kernels: Kernels | None) -> Iterator[None]:
    """Use these kernels within the block."""
    before = fused.kernels
    use_kernels(kernels)
    try:
        yield
    finally:
        use_kernels(before)


class FakeRows:
    """A sample of R rows, three quarters of them supervised; its states have no memory."""

    def __init__(self, rows: int, config: DraftConfig):
        shape = rows, config.hidden_size
        self.ids, self.mask = torch.zeros(rows, dtype=torch.long), torch.arange(rows) >= rows // 4
        self.aux = torch.empty(len(config.target_layer_ids), *shape, dtype=torch.bfloat16, device="meta")
        self.final, self.final_rows = torch.empty(*shape, dtype=torch.bfloat16, device="meta"), torch.arange(rows)


def faked(record):
    """Return a record with fake CPU tensors in place of its tensors."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return replace(
        record,
        **{
            name: torch.empty(value.shape, dtype=value.dtype)
            for name, value in values.items()
            if torch.is_tensor(value)
        },
    )


def memory_lines(memory: StepMemory, rows: int, device_bytes: int | None) -> list[str]:
    """Return in words what a step takes and, of a device of this size, what fits."""
    blocks, whole = memory.blocks, memory.peak(Fit(memory.blocks))
    lines = [
        f"{memory.parameters / 1e9:.3f} B parameters; a step of {rows:,} rows and {blocks:,} blocks needs "
        f"{size_text(whole)}: weights, moments and the target's head {size_text(memory.static)}, gradients "
        f"{size_text(memory.gradients)}, the rest {size_text(whole - memory.static - memory.gradients)}"
    ]
    if device_bytes is None:
        return lines
    fit, size = memory.fit(device_bytes), f"a device of {size_text(device_bytes)}"
    if not fit.at_once:
        least, remedy = (
            size_text(memory.peak(Fit(1, memory.moments > 0))),
            "lower train.context or draft.num_hidden_layers",
        )
        return [*lines, f"IT DOES NOT FIT {size}: {least} with a single block; {remedy}"]
    if fit == Fit(blocks):
        return [*lines, f"it fits {size}"]
    parts, host = -(-blocks // fit.at_once), ", its moments on the host" * fit.moments_on_host
    how = f"in {parts} parts" if parts > 1 else "whole"
    return [*lines, f"{size} computes it {how}{host}, with {size_text(memory.peak(fit))}: the same loss"]
