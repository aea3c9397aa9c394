"""How much device memory a training step needs, known before anything is loaded.

A step runs on fake tensors, which have shapes and dtypes and no values, while live bytes are counted: seconds on a CPU,
whatever the size of the draft. Its most live bytes are the largest of several phases', each linear in the number of
blocks that are computed together: so between measured numbers a straight line is never too low.

What each means spares of a five-layer Domino draft, 3,072 rows, bfloat16, in GiB by this count:

    target                      Qwen3-8B   Qwen3-14B   Qwen3-32B
    a whole step                    26.5        41.0        56.5
    in two parts, in four       2.4, 3.6    3.2, 4.7    4.3, 6.5
    layers computed again            4.6         6.4         9.0
    the embedding on the host        1.2         1.5         1.5
    moments on the host              8.2        13.7        19.6
    moments in 8 bits                6.2        10.3        14.7   not built
    bfloat16 weights, gradients      4.1         6.9         9.8   not built

The last two are arithmetic, 6 and 4 bytes a parameter, and change the results. 8 bits spare less than the host does;
bfloat16 weights, with float32 masters on the host, would be what lets 24 GiB hold a draft of Qwen3-32B, whose
weights and gradients take 19.6 GiB in float32.

    R rows of a cell
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import product

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.cache.atomic import size_text
from pipeline.drafts import DRAFTS, DraftConfig, fused, lay_blocks, pack
from pipeline.drafts.backbone import Backbone
from pipeline.drafts.fused import Kernels, use_kernels
from pipeline.matrix_products import torchs_own_products
from pipeline.runs.recipe import TrainSection
from pipeline.target.head import NEWEST, TargetHead, chunk_blocks
from stages.train_draft.optimizers import make_optimizer

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
    """What of a step a device has memory for. at_once: blocks computed together, 0 for none. moments_on_host,
    embedding_on_host: whether AdamW's moments and the target's embedding have to lie there. recomputes_layers: whether
    gradients compute the draft's layers again."""

    at_once: int
    moments_on_host: bool = False
    recomputes_layers: bool = False
    embedding_on_host: bool = False

    def over(self, fits: Sequence["Fit"]) -> "Fit":
        """Return what fits on all of several devices."""
        every = [self, *fits]
        means = {name: any(getattr(fit, name) for fit in every) for name in MEANS}
        return Fit(min(fit.at_once for fit in every), **means)


MEANS = ("moments_on_host", "recomputes_layers", "embedding_on_host")


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on one device.

    static: weights, moments, the target's embedding and head. moments, embedding: of these, what can lie on the host.
    peaks: the most live bytes while the gradients are there, by the number of blocks computed together. recompute:
    measures the same where gradients compute the layers again; None: they cannot.
    """

    parameters: int
    static: int
    moments: int
    peaks: dict[int, int]
    embedding: int = 0
    recompute: Callable[[], dict[int, int]] | None = None

    @cached_property
    def recomputed_peaks(self) -> dict[int, int]:
        return self.recompute()

    @property
    def gradients(self) -> int:
        return 4 * self.parameters

    @property
    def blocks(self) -> int:
        """The blocks of a whole cell."""
        return max(self.peaks)

    def peak(self, fit: Fit) -> int:
        """Return the most bytes that are live in a step."""
        peaks = self.recomputed_peaks if fit.recomputes_layers else self.peaks
        whole = np.interp(fit.at_once, list(peaks), list(peaks.values()))
        return int(whole) - fit.moments_on_host * self.moments - fit.embedding_on_host * self.embedding

    def fit(self, device_bytes: int) -> Fit:
        """Return how a device of this size computes a step, the fastest first: whole; in two parts; with its layers
        computed again, in four parts at most; the same with the moments on the host, whose copies cost a second or two
        a step; and what is left, in as many parts as it takes. The embedding goes to the host, where that costs next to
        nothing, before anything slower is done."""
        again = self.recompute is not None
        hosts, levels = [False, True][: 1 + (self.moments > 0)], [(1, False), (2 if again else 4, False)]
        levels += [(1, True), (4, True)] * again
        for on_host, (parts, recomputes), embedding in product(
            hosts, levels, [False, True][: 1 + (self.embedding > 0)]
        ):
            fit = self._largest(device_bytes, Fit(self.blocks, on_host, recomputes, embedding))
            if parts * fit.at_once >= self.blocks:
                return fit
        return self._largest(device_bytes, self.smallest)

    @property
    def smallest(self) -> Fit:
        """A step of one block, with every means there is."""
        return Fit(1, self.moments > 0, self.recompute is not None, self.embedding > 0)

    def _largest(self, device_bytes: int, fit: Fit) -> Fit:
        counts = range(self.blocks, 0, -1)
        fits = (replace(fit, at_once=count) for count in counts)
        usable = USABLE * device_bytes
        return next((fit for fit in fits if self.peak(fit) <= usable), replace(fit, at_once=0))


def step_memory(
    config: DraftConfig, train: TrainSection, head: torch.dtype, tied: bool, compiled: bool = True
) -> StepMemory:
    """Return the memory of a step on cells of `train.context` rows and `train.cell_anchors` blocks.

    head: dtype of the target's embedding and LM head, which are one tensor if `tied`. compiled: with compiled kernels,
    as on a GPU where they can be. The draft's weights and the optimiser's states are float32.
    """
    counts = sorted({1, -(-train.cell_anchors // 4), train.cell_anchors})

    def measured(recomputes: bool) -> dict[int, tuple[int, int, int, int]]:
        return {blocks: _measure(config, train, head, tied, blocks, compiled, recomputes) for blocks in counts}

    def peaks(found: dict[int, tuple[int, int, int, int]]) -> dict[int, int]:
        return {blocks: peak for blocks, (*_, peak) in found.items()}

    kept = measured(recomputes=False)
    parameters, static, moments, _ = kept[1]
    on_host = moments if train.optimizer == "adamw" else 0
    embedding = 0 if tied else config.vocab_size * config.hidden_size * head.itemsize
    again = (lambda: peaks(measured(recomputes=True))) if issubclass(DRAFTS[config.method], Backbone) else None
    return StepMemory(parameters, static, on_host, peaks(kept), embedding, again)


def _measure(
    config: DraftConfig,
    train: TrainSection,
    head: torch.dtype,
    tied: bool,
    blocks: int,
    compiled: bool,
    recomputes: bool = False,
) -> tuple[int, int, int, int]:
    """Return the number of parameters, the bytes live before a step, those of moments, and the most of a step."""
    cell = pack([FakeRows(train.context, config)], ["fake"], final=config.needs_final_states)
    laid = lay_blocks(cell, torch.linspace(train.context // 4, train.context - 2, blocks).long(), config)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        LiveBytes() as memory,
        kernels_used(memory.kernels() if compiled else None),
        torchs_own_products(),
    ):
        weights_VD = torch.empty(config.vocab_size, config.hidden_size, dtype=head)
        draft = DRAFTS[config.method](config, TargetHead(weights_VD, weights_VD if tied else weights_VD.clone()))
        draft.recomputes_layers = recomputes
        draft.train().blocks_per_chunk = lambda hidden_NSD: chunk_blocks(
            hidden_NSD.shape[1], config.proposable, "cuda", NEWEST
        )
        before = memory.live
        optimizer = make_optimizer(train.optimizer, draft)
        static = memory.live
        cell, ahead, laid = faked(cell), faked(cell), faked(laid)  # the next cell is copied meanwhile
        for _ in range(2):  # the second finds gradients, as all cells and parts of a step but the first do
            memory.peak = memory.live
            with torch.autocast("cpu", torch.bfloat16, enabled=train.dtype == "bfloat16"):
                loss = draft.loss(cell, laid, draft.schedule(1, 2), draft.denominators(laid), metrics=True)
            loss.total.backward()
        optimizer.step(train.lr)
        del ahead
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
        least, remedy = size_text(memory.peak(memory.smallest)), "lower train.context or draft.num_hidden_layers"
        return [*lines, f"IT DOES NOT FIT {size}: {least} with a single block{means_text(memory.smallest)}; {remedy}"]
    if fit == Fit(blocks):
        return [*lines, f"it fits {size}"]
    parts = -(-blocks // fit.at_once)
    how = f"in {parts} parts" if parts > 1 else "whole"
    return [*lines, f"{size} computes it {how}{means_text(fit)}, with {size_text(memory.peak(fit))}: the same loss"]


def means_text(fit: Fit) -> str:
    """Return in words what is done beside parts."""
    return (
        ", its layers again for their gradient" * fit.recomputes_layers
        + ", the target's embedding on the host" * fit.embedding_on_host
        + ", its moments on the host" * fit.moments_on_host
    )
