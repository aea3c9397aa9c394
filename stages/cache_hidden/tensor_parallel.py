"""One worker of several ranks, started by torchrun with `--tensor-parallel N`: each rank holds a part of every layer.

The group's first rank leads: it does all that a worker does, alone. The others follow: they wait for its orders and run
the same forward at the same time, since in it all ranks exchange sums. So tokens, not decisions, are what ranks share,
and nothing of a capture depends on the number of ranks but the rounding of those sums.

A rank that fails ends its group, with one line (see pipeline/torchrun.py).

    B samples   T positions
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from pipeline import torchrun
from pipeline.errors import RoomError, UsageError
from pipeline.target.config import load_config, loader_class
from pipeline.target.files import find_target
from pipeline.target.head import TargetHead
from pipeline.target.loading import load_target
from pipeline.target.model import decoder, head_of
from pipeline.target.several_devices import check_ranks, input_device
from pipeline.target.weights import target_digest
from pipeline.tensors import out_of_memory
from stages.cache_hidden.settings import CaptureSettings
from stages.cache_hidden.shard_assignment import Worker

IN_A_FORWARD = timedelta(minutes=30)  # a rank that does not answer for so long is lost
FOR_AN_ORDER = timedelta(days=30)  # the leader plans a corpus, waits for a lock or for the disk


@dataclass(frozen=True)
class Load:
    """An order: load the target with this digest in this dtype."""

    dtype: str
    digest: str


@dataclass(frozen=True)
class Forward:
    """An order: call the model ("model") or its decoder ("decoder") with these arguments, tensors on the CPU."""

    module: str
    kernel: str | None
    args: tuple
    kwargs: dict[str, Any]


class Group:
    """The ranks of one worker: a context manager on each, inside which the leader works and the others `follow`.

    model, revision: the target as the command names it, loaded by `load` on every rank.
    Leaving it raises RoomError on one rank where another is lost, and ends the others.
    """

    def __init__(self, worker: Worker, model: str, revision: str | None, device: str):
        self.leads, self._worker = worker.rank == 0, worker
        self._model, self._revision, self._device = model, revision, device
        self._inside = False  # of what all ranks do together, where the others hear no orders

    def __enter__(self) -> "Group":
        backend = "gloo"
        if self._device.startswith("cuda"):
            torch.cuda.set_device((self._worker.local or 0) % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        name = f"worker-{self._worker.number}"
        store = torchrun.join(backend, self._worker.rank, self._worker.ranks, name, IN_A_FORWARD)
        lost = RoomError(
            f"{self._worker}: one of its {self._worker.ranks} ranks has gone or does not answer, killed perhaps "
            "for want of memory; shards that are finished are kept, and the same command goes on from there"
        )
        self._errors = torchrun.one_error(store, lost)
        self._errors.__enter__()
        self._orders = dist.new_group(backend="gloo", timeout=FOR_AN_ORDER)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace) -> None:
        if error is None or (self.leads and not self._inside and not torchrun.lost_rank(error)):
            with contextlib.suppress(RuntimeError):  # a rank is lost, whose work is done
                self._order(None)
        if error is None:
            dist.destroy_process_group()
        self._errors.__exit__(kind, error, trace)

    def _order(self, order: Load | Forward | None) -> None:
        """Send an order to all other ranks; None: the work is done. Does nothing where this rank follows."""
        if self.leads:
            dist.broadcast_object_list([order], src=0, group=self._orders)

    def check(self) -> None:
        """Raise UsageError where the ranks cannot share the target, or lack devices for it, before any work."""
        _check_devices(self._device, int(os.environ.get("LOCAL_WORLD_SIZE", self._worker.ranks)))
        folder = find_target(self._model, self._revision)
        config = load_config(folder, self._model)
        check_ranks(folder, loader_class(config, self._model), config, self._worker.ranks)

    def follow(self) -> None:
        """Carry out the leader's orders until its work is done."""
        model = None
        while True:
            received: list[Load | Forward | None] = [None]
            dist.broadcast_object_list(received, src=0, group=self._orders)
            order = received[0]
            if order is None:
                return
            if isinstance(order, Load):
                model, _ = self._load(order)
            else:
                self._run(model, order)

    def load(self, settings: CaptureSettings) -> tuple[PreTrainedModel, TargetHead]:
        """Load the target on all ranks; return the leader's part of it and the whole head.

        What the leader then calls of the model, or of its decoder, every rank calls.
        """
        order = Load(settings.dtype, settings.identity.target.digest)
        self._order(order)
        model, head = self._load(order)
        for name, module in (("model", model), ("decoder", decoder(model))):
            module.forward = partial(self._forward, model, name, module.forward)
        return model, head

    def _load(self, order: Load) -> tuple[PreTrainedModel, TargetHead]:
        folder = find_target(self._model, self._revision)
        if target_digest(folder) != order.digest:
            raise UsageError(f"{folder} is another target here than on the worker's first rank; fetch it again")
        self._inside = True
        model = load_target(str(folder), device=self._device, dtype=order.dtype, ranks=self._worker.ranks)
        head = head_of(model)
        self._inside = False
        return model, head

    def _forward(self, model: PreTrainedModel, name: str, forward: Callable, *args, **kwargs):
        """Have all ranks run a forward, the leader by its own `forward`."""
        if self._inside:  # the model calls its decoder
            return forward(*args, **kwargs)
        order = Forward(name, model.config._attn_implementation, _moved(args, "cpu"), _moved(kwargs, "cpu"))
        self._order(order)
        return self._together(forward, *args, **kwargs)

    @torch.no_grad()
    def _run(self, model: PreTrainedModel, order: Forward) -> None:
        if order.kernel != model.config._attn_implementation:
            model.set_attn_implementation(order.kernel)
        module, device = (model if order.module == "model" else decoder(model)), input_device(model)
        self._together(module, *_moved(order.args, device), **_moved(order.kwargs, device))

    def _together(self, forward: Callable, *args, **kwargs):
        """Run a forward of all ranks. RoomError where this one lacks memory: the others cannot be called back."""
        self._inside = True
        try:
            output = forward(*args, **kwargs)
        except RuntimeError as error:
            if torchrun.lost_rank(error):
                raise
            raise RoomError(
                f"rank {self._worker.rank} of {self._worker}'s {self._worker.ranks} has no memory for a micro-batch "
                f"({out_of_memory(error)}); take more ranks with --tensor-parallel, or for a new cache fewer "
                "--batch-tokens"
            ) from error
        self._inside = False
        return output


def _check_devices(device: str, ranks: int) -> None:
    """Raise UsageError where transformers would share the target among other devices than `device`, or too few.

    ranks: of this machine; it gives each the GPU of its local number.
    """
    found = torch.accelerator.current_accelerator()
    kind = "cpu" if found is None else found.type
    if torch.device(device).type != kind:
        raise UsageError(
            f"--tensor-parallel on {device}: transformers shares a target among the {kind} devices that torch sees; "
            "leave out --device, or hide them (CUDA_VISIBLE_DEVICES=)"
        )
    if kind == "cuda" and torch.cuda.device_count() < ranks:
        raise UsageError(
            f"--tensor-parallel: torchrun started {ranks} ranks here, on {torch.cuda.device_count()} GPUs; a rank "
            "takes one, pass a smaller --nproc-per-node"
        )


def _moved(value: Any, device: torch.device | str) -> Any:
    """Return the arguments of a forward with every tensor on a device."""
    if isinstance(value, dict):
        return {name: _moved(inner, device) for name, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(inner, device) for inner in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value
