"""The processes (ranks) that train one draft together: `Ranks`, of one process or of those that torchrun started.

Every rank has the whole batch laid out and computes the cells j with j mod R = its number; losses, metrics and
gradients are sums over cells, so they are summed over ranks, too. What decides how a run goes on (a signal, no memory,
which checkpoint) is agreed on, so that all ranks do the same. Rank 0 alone writes and prints.

Sums of a few numbers, and JSON values, go over gloo on the host; gradients over the device's own backend, in buckets of
one order: torch's `DistributedDataParallel` makes its buckets anew after its first backward, so that a resumed run's
last digits would differ, and it averages.

    R ranks
"""

import atexit
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from pipeline import torchrun
from pipeline.errors import PipelineError, UsageError
from pipeline.standard_streams import check_standard_output
from pipeline.tensors import find_device
from pipeline.torchrun import STOP_SIGNALS, leave, one_error
from stages.train_draft.stop import GracefulStop

BUCKET_BYTES = 64 << 20
FOLDER_WAIT_S = 20.0  # for a network file system to show a new file
LOST = (
    "a process of this run ended without a word (killed, out of memory, or its machine is gone); the same command goes "
    "on from the newest checkpoint, and `torchrun --max-restarts N` does so by itself"
)


class Ranks:
    """One process: nothing is exchanged. `ProcessGroup` is several."""

    rank, size, sharded = 0, 1, False

    def __init__(self, device: torch.device):
        self.device = device
        self.stop: GracefulStop | None = None  # the signals of this rank, once they are recorded

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    @property
    def signal(self) -> int | None:
        """The number of the stop signal that came to any rank, as of the last sum: the same on all of them."""
        return self.stop.received if self.stop else None

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over all ranks, which give the same names and shapes, in float64."""
        return dict(values)

    def sum_gradients(self, weights: Iterable[Tensor]) -> None:
        """Sum the gradients over all ranks in place."""

    def gather(self, value) -> list:
        """Return the values (JSON) of all ranks, by rank."""
        return [value]

    def of_first(self, value):
        """Return the value (JSON) of rank 0."""
        return self.gather(value if self.first else None)[0]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return flag

    def wait(self) -> None:
        """Wait for all ranks, and learn of stop signals."""
        self.sum({})

    def wait_for(self, path: Path) -> None:
        """Wait until rank 0 has come here. Raises UsageError where this rank does not see the file it has written."""

    def check_same_weights(self, draft: nn.Module) -> None:
        """Raise UsageError where ranks begin with other weights."""

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Raise UsageError, naming the first fact in which ranks differ."""
        every = self.gather(dict(facts))
        for name, (rank, other) in ((name, pair) for name in facts for pair in enumerate(every)):
            if other[name] != every[0][name]:
                raise UsageError(
                    f"rank {rank} has the {name} {other[name]}, rank 0 {every[0][name]}; start every rank with the "
                    "same command, on a cache and a run folder that all machines share"
                )


class ProcessGroup(Ranks):
    """Several processes, joined by the variables that torchrun sets; each has still to take its device.

    Raises UsageError for a process that cannot be reached.
    """

    def __init__(self, environment: Mapping[str, str]):
        import torch.distributed as dist

        super().__init__(torch.device("cpu"))
        number = partial(torchrun.number, {"LOCAL_WORLD_SIZE": "1"} | dict(environment))
        self.rank, self.size, self.local = map(number, torchrun.VARIABLES[:3])
        backend = "gloo"
        if torch.cuda.is_available():
            # NCCL refuses two ranks on one GPU.
            backend = f"cpu:gloo,cuda:{'nccl' if number('LOCAL_WORLD_SIZE') <= torch.cuda.device_count() else 'gloo'}"
        self.store = torchrun.join(backend, self.rank, self.size)
        self._dist, self._signal = dist, None

    def take_device(self, named: str | None) -> None:
        """Take the device that --device names; of GPUs, the one of this rank's number on its machine. Raises UsageError
        for the name of one of several."""
        self.device = own_device(named, self.local)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @property
    def signal(self) -> int | None:
        return self._signal

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `Ranks.sum`, in one all-reduce. The stop signals that have come to any rank travel with it."""
        received = self.stop.received if self.stop else None
        signals = torch.tensor([float(number == received) for number in STOP_SIGNALS], dtype=torch.float64)
        parts = [value.detach().double().flatten() for value in values.values()]
        flat = torch.cat([signals, torch.cat(parts).cpu()]) if parts else signals.clone()
        self._dist.all_reduce(flat)
        came, *found = flat.split([len(signals), *map(len, parts)])
        self._signal = next((int(number) for number, count in zip(STOP_SIGNALS, came, strict=True) if count), None)
        pairs = zip(values.items(), found, strict=True)
        return {name: part.view(value.shape).to(value.device) for (name, value), part in pairs}

    def sum_gradients(self, weights: Iterable[Tensor]) -> None:
        """As `Ranks.sum_gradients`; those of sharded weights are summed already, by their backward."""
        if self.sharded:
            return
        for bucket in _buckets([weight.grad for weight in weights]):
            flat = torch.cat([grad.flatten() for grad in bucket])
            self._dist.all_reduce(flat)
            parts = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket, strict=True)])

    def gather(self, value) -> list:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        self._dist.all_gather(sizes, torch.tensor([len(data)]))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty_like(padded) for _ in sizes]
        self._dist.all_gather(found, padded)
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(found, sizes, strict=True)]

    def any(self, flag: bool) -> bool:
        return bool(self.sum({"flag": torch.tensor(float(flag))})["flag"])

    def wait_for(self, path: Path) -> None:
        self.wait()
        until = time.monotonic() + FOLDER_WAIT_S
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.1)
        self.check_same({"view of the run": f"with {path}" if path.exists() else f"without {path}"})

    def check_same_weights(self, draft: nn.Module) -> None:
        digest = xxhash.xxh3_128()
        for _, tensor in sorted(draft.state_dict().items()):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self.check_same({"checksum of the initial weights": digest.hexdigest()})


def own_device(named: str | None, local: int) -> torch.device:
    """Return the device of the process of number `local` on its machine. Raises UsageError for a single GPU's name."""
    device = find_device(named)
    if device.index is not None:
        raise UsageError(
            f"--device {named} is one device for several ranks; pass --device {device.type}, or leave it out"
        )
    return torch.device("cuda", local % torch.cuda.device_count()) if device.type == "cuda" else device


def _buckets(grads: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the gradients in their order, in lists of about BUCKET_BYTES, each of one dtype."""
    bucket: list[Tensor] = []
    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or sum(held.nbytes for held in bucket) >= BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket


@contextlib.contextmanager
def joined(device: str | None, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, if it started several, and have one of them print.

    An error ends all of them, with one line: that of the first rank that met one. The others, which then miss it, end
    with its exit code.
    """
    if not torchrun.several(environment):
        yield Ranks(find_device(device))
        return
    ranks = ProcessGroup(environment)
    with one_error(ranks.store, PipelineError(LOST)):
        ranks.take_device(device)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if ranks.first else nowhere):
            yield ranks
            check_standard_output()
    atexit.register(leave, 0)
