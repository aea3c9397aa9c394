"""What a fake GPU counts: operations and their estimated time, live bytes, and each wait of the host for the device.

torch computes shapes, dtypes and devices of fake CUDA tensors; `fake_accelerator.py` makes a CPU build believe in the
device. Pinned memory stands here; streams and events, and what they order, in `fake_streams.py`. The host waits

- for a value: `.item()`, `float()`, `bool()`, `nonzero()`;
- for a copy to the host, unless it is asked not to and the host's memory is pinned;
- for a copy to the device that does not say non_blocking, or of more than 64 KB of pageable memory;
- for an event.

Each is counted by the innermost function of this project that it happens in, the loader's thread included.
"""

import re
import sys
import weakref
from collections import Counter
from pathlib import Path

import fake_streams
import torch
import torch.nn.functional as F
from fake_streams import Stream, current_stream, on_stream, order
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from stages.train_draft.memory import LiveBytes

ROOT = Path(__file__).parents[1]
PEAK, WIDE_PEAK, BANDWIDTH, LAUNCH = 0.7 * 989e12, 60e12, 0.8 * 3.35e12, 5e-6  # of an H100: FLOP/s, FLOP/s, B/s, s
STAGED = 64 << 10  # bytes of pageable memory that CUDA copies aside and does not wait for

# Compiled kernels that sum over rows too long to be kept, or over two dimensions, and one that overwrites its input.
READ_TWICE = {"cross_entropy", "_norm_gradients", "_rotated_norm_gradients", "overwrite_with_gradient"}

# Operations that only view their input, or allocate: nothing is launched.
FREE = re.compile(
    "view|_unsafe_view|reshape|expand|transpose|t|permute|slice|split|split_with_sizes|unsqueeze|squeeze|select|unbind|"
    "as_strided|detach|alias|chunk|lift_fresh|_reshape_alias|empty|empty_like|empty_strided|new_empty"
)

pinned: dict[int, range] = {}  # storages of page-locked memory, and their addresses
events: Counter = Counter()  # places where the host waited for an event


class Meter(LiveBytes):
    """Counts what operations on one device do, and what is live there."""

    def __init__(self, device: str):
        super().__init__(device)
        self.reset()

    def reset(self) -> None:
        self.launches, self.bytes, self.flop, self.seconds, self.peak = 0, 0, 0, 0.0, self.live
        self.operations: Counter = Counter()  # (name, dtypes of the results)
        self.waits: Counter = Counter()  # places where the host waits for the device
        self.copies: Counter = Counter()  # places of copies to the host

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.split("::")[1], kwargs or {}
        if self.paused:
            return function(*args, **kwargs)
        if name == "_local_scalar_dense":
            if args[0].device.type == self.device:
                self.waits[_caller()] += 1
                order.host_waited(current_stream().name)
            return 1.0
        if name == "nonzero":  # how many there are is a value: none
            self.waits[_caller()] += args[0].device.type == self.device != "cpu"
            return torch.empty(0, args[0].dim(), dtype=torch.long, device=args[0].device)
        if name == "_to_copy" and args[0].device.type != self.device == getattr(kwargs.get("device"), "type", None):
            # As the operation does, but for a tensor of one value: torch would copy that in fact.
            results = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
            self.note(results)
        else:
            results = super().__torch_dispatch__(function, types, args, kwargs)
        outs = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        ins = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if self.device != "cpu" and name in ("_to_copy", "copy_"):
            source, copy = (args[1] if name == "copy_" else args[0]), outs[0]
            self._note_copy(source, copy, kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
        self._note_order(name, ins, outs)
        if not FREE.fullmatch(name) and any(tensor.device.type == self.device for tensor in outs):
            self._count(function, name, args, kwargs, ins, outs, results)
        return results

    def _note_order(self, name: str, ins: list[torch.Tensor], outs: list[torch.Tensor]) -> None:
        """Note what memory an operation on the device reads and writes."""
        stream = current_stream().name
        if self.device == "cpu" or not any(tensor.device.type == self.device for tensor in (*ins, *outs)):
            return
        for tensor in outs:
            if tensor.device.type == self.device:
                order.allocated(stream, tensor.untyped_storage())
        if not FREE.fullmatch(name):
            written = [memory_of(out) for out in outs if out.device.type == self.device]
            order.ran(stream, [*map(memory_of, ins)], written)

    def _note_copy(self, source: torch.Tensor, copy: torch.Tensor, asynchronous: bool) -> None:
        there, here = (tensor.device.type == self.device for tensor in (source, copy))
        if there == here:
            return
        host = copy if there else source
        small = here and source.untyped_storage().nbytes() <= STAGED
        self.waits[_caller()] += not (asynchronous and (small or is_pinned(host)))
        self.copies[_caller()] += there

    def one_kernel(self, name: str, compute, *args, flop: int = 0):
        results = super().one_kernel(name, compute, *args)
        outs = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        ins = [leaf for leaf in args if isinstance(leaf, torch.Tensor)]
        moved = sum(map(_touched, ins)) * (2 if name in READ_TWICE else 1) + sum(map(_touched, outs))
        self._add(name, outs or ins, moved, flop)
        return results

    def _count(self, function, name, args, kwargs, ins, outs, results) -> None:
        moved = _picked(name, args, outs) or sum(map(_touched, ins)) + sum(map(_touched, outs))
        self._add(name, outs, moved, self._flop(function, name, args, kwargs, results))

    def _add(self, name: str, outs: list[torch.Tensor], moved: int, flop: int) -> None:
        narrow = outs[0].dtype in (torch.bfloat16, torch.float16)
        self.launches, self.bytes, self.flop = self.launches + 1, self.bytes + moved, self.flop + flop
        self.seconds += max(LAUNCH, flop / (PEAK if narrow else WIDE_PEAK), moved / BANDWIDTH)
        self.operations[name, tuple(str(tensor.dtype).removeprefix("torch.") for tensor in outs)] += 1

    def _flop(self, function, name, args, kwargs, results) -> int:
        if name == "_scaled_dot_product_flash_attention":  # torch's formula has no shared keys, and no causal half
            (N, heads, queries, width), keys = args[0].shape, args[1].shape[2]
            return 4 * N * heads * queries * keys * width // (2 if args[4:5] == (True,) else 1)
        formula = flop_registry.get(function.overloadpacket)
        return formula(*args, **kwargs, out_val=results) if formula else 0

    def receipt(self) -> dict:
        """What was counted since `reset`, as a record's entries."""
        return {
            "peak_gib": round(self.peak / 2**30, 3),
            "launches": self.launches,
            "tflop": round(self.flop / 1e12, 1),
            "moved_gb": round(self.bytes / 1e9),
            "roofline_ms": round(1e3 * self.seconds),
            "share_of_peak": round(self.flop / 989e12 / max(self.seconds, LAUNCH), 3),
            "waits": dict(+self.waits),
        }


def _picked(name: str, args: tuple, outs: list[torch.Tensor]) -> int:
    """Bytes of an operation that touches only the entries that an index names, in and out; 0 for any other."""
    if name == "gather":
        return 2 * _touched(outs[0]) + _touched(args[2])
    if name in ("scatter_add_", "scatter_"):
        return 2 * args[2].numel() * outs[0].element_size() + _touched(args[2])
    if name == "embedding":
        return 2 * _touched(outs[0]) + _touched(args[1])
    return 0


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; what is expanded counts once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def _caller() -> str:
    """File and function of the package that the operation was called from."""
    frame = sys._getframe(2)
    while frame and not frame.f_code.co_filename.startswith((f"{ROOT}/pipeline", f"{ROOT}/stages")):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}" if frame else "elsewhere"


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Take a CPU tensor's memory for pinned."""
    storage = tensor.untyped_storage()
    key = storage._cdata
    start = 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    pinned[key] = range(start, start + storage.nbytes() if start else 0)
    weakref.finalize(storage, pinned.pop, key, None)
    return tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    if tensor.untyped_storage()._cdata in pinned:
        return True
    return not isinstance(tensor, FakeTensor) and is_pinned_at(tensor.data_ptr())


def is_pinned_at(address: int) -> bool:
    """Whether an address lies in pinned memory: numpy makes storages of its own."""
    return any(address in part for part in [*pinned.values()])


def memory_of(tensor: torch.Tensor) -> object:
    """Return what stands for a tensor's memory: where pinned memory begins, else its storage."""
    storage = tensor.untyped_storage()._cdata
    if tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor):
        starts = (("pinned", part.start) for part in [*pinned.values()] if tensor.data_ptr() in part)
        return next(starts, storage)
    return storage


class Event(fake_streams.Event):
    """One whose waits are counted, by the function that waits."""

    def synchronize(self) -> None:
        super().synchronize()
        events[_caller()] += 1


def masked_attention(q, k, v, attn_mask=None, is_causal=False, **_):
    """torch's attention as CUDA computes it. Under a mask: as numbers, padded to 16 keys, by the memory-efficient
    kernel. Without one, in half precision: by flash attention, whose queries may share keys."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (part.to(torch.get_autocast_dtype(q.device.type)) for part in (q, k, v))
    if is_causal and q.dtype == torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    bias = None
    if attn_mask is not None:
        keys = attn_mask.shape[-1]
        bias = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device)
        bias = F.pad(bias.masked_fill_(attn_mask.logical_not(), float("-inf")), (0, -keys % 16))[..., :keys]
        bias = bias.expand(*q.shape[:3], keys)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, bias, torch.is_grad_enabled())[0]


def pretend() -> None:
    """Let torch's Python side take the fake device for granted, and attention be the kernels of CUDA."""
    import torch.cuda.amp.common
    import torch.utils._device

    empty = torch.empty
    torch.utils._device._device_constructors()  # remembers the functions that heed `with torch.device(...)`

    def pinnable_empty(*shape, pin_memory=False, **options):
        made = empty(*shape, **options)
        return pin(made) if pin_memory else made

    def pinned_copy(tensor, *_):
        made = pin(tensor.clone())  # torch gives its memory to nobody else while it is copied from
        weakref.finalize(made.untyped_storage(), order.accesses.pop, memory_of(made), None)
        return made

    torch.empty, torch.Tensor.pin_memory = pinnable_empty, pinned_copy
    torch.Tensor.is_pinned = lambda tensor, *_: is_pinned(tensor)
    torch.Tensor.record_stream = lambda tensor, stream: order.keep(memory_of(tensor), stream)
    torch.cuda.Stream, torch.cuda.Event = Stream, Event
    torch.cuda.current_stream, torch.cuda.stream = current_stream, on_stream
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    F.scaled_dot_product_attention = masked_attention
