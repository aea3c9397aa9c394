"""One optimiser step, from top to bottom: schedule, denominators, forward and backward of each cell (packed
micro-batch), clipping, update.

Anchors, labels and weights are known before any forward, so the loss's denominators are summed over the whole batch
first. Every cell divides by them and the losses add up to that of the batch, however it is cut into cells, and
whichever of several ranks computes a cell.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.drafts import Blocks, Cell, Draft, metrics_of
from pipeline.errors import ProofError, RoomError
from pipeline.tensors import free_cached_memory, out_of_memory, refuse_out_of_memory
from stages.train_draft.batches import Batch
from stages.train_draft.loader import CPU, BatchLoader
from stages.train_draft.optimizers import AdamW
from stages.train_draft.ranks import Ranks
from stages.train_draft.sharding import empty_pass, whole_tensor

WSD_TAIL, WSD_FLOOR = 0.2, 0.1


def lr_factor(step: int, total_steps: int, warmup: float, schedule: str) -> float:
    """Return the learning rate of `step` (0 to total_steps - 1) as a fraction of its peak.

    Linear warmup over W = int(warmup * total_steps) steps, (step + 1) / W; then `cosine` decays to 0, and `wsd`
    (warmup-stable-decay) stays at 1 until the last fifth, which decays linearly to a tenth.
    """
    rise = int(warmup * total_steps)
    if step < rise:
        return (step + 1) / rise
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / (total_steps - rise)))
    tail = int(WSD_TAIL * total_steps)
    into = step - (total_steps - tail)
    return 1.0 if into < 0 else 1 - (1 - WSD_FLOOR) * into / tail


@dataclass
class BatchLoss:
    """Sums over the cells of a batch: the loss, each term's numerator and denominator, and the metrics' sums."""

    total: Tensor
    dens: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def over(self, ranks: Ranks) -> "BatchLoss":
        """Return the sums over the cells of all ranks."""
        named = {("", "total"): self.total}
        named |= {(part, name): value for part in ("terms", "sums") for name, value in getattr(self, part).items()}
        found = ranks.sum(named)
        terms, sums = ({name: found[part, name] for name in getattr(self, part)} for part in ("terms", "sums"))
        return BatchLoss(found["", "total"], self.dens, terms, sums)


class Trainer:
    """Updates a draft by one global batch: `step(batch, cells)`.

    blocks_per_pass: blocks of a cell that are computed together; None: all of them, until the device runs out of
    memory. A checkpoint holds it, since the sums of a loss in parts differ in their last digits. ranks: those that
    compute the batch's cells together, all of which take the same step.
    """

    def __init__(self, draft: Draft, optimizer: AdamW, loader: BatchLoader, ranks: Ranks | None = None):
        self.draft, self.optimizer, self.loader, self.train = draft, optimizer, loader, loader.sampler.train
        self.device = draft.device
        self.ranks = ranks or Ranks(self.device)
        self.blocks_per_pass: int | None = None

    def step(self, batch: Batch, cells: Iterable[Cell]) -> dict | None:
        """Update the draft by one batch; return its metrics when this step is to be logged, else None.

        cells: this rank's, with their states. Raises ProofError naming step and samples when the loss or its gradient
        is not finite; the weights are then still those of the step before. Raises RoomError when a single block does
        not fit on the device, or sharded ranks cannot repeat a step.
        """
        train, draft, done = self.train, self.draft, batch.step + 1
        logs = done % train.log_every == 0 or done in (1, train.steps)
        scheduled = draft.schedule(batch.step, train.steps)
        lr = train.lr * lr_factor(batch.step, train.steps, train.warmup, train.schedule)

        loss, own_blocks = None, batch.blocks[self.ranks.rank :: self.ranks.size]
        while loss is None:
            self.draft.zero_grad()
            cause = "on another rank"
            try:
                loss = self.add_gradients(cells, own_blocks, scheduled, logs, self._passes(batch))
            except RuntimeError as error:
                cause = out_of_memory(error)
                if self.ranks.sharded:
                    raise RoomError(self._sharded_message(cause)) from error
            if self.ranks.any(
                loss is None
            ):  # not in the except clause: the exception keeps the forward's tensors alive
                loss = None
                self._halve_blocks(batch, cause)
                cells = self.loader.read_all(batch)

        self.ranks.sum_gradients(draft.parameters())
        with (
            draft.clock.phase("optimizer"),
            refuse_out_of_memory("the gradient's norm", "lower train.context, or use a larger device"),
        ):
            norm = float(whole_tensor(torch.nn.utils.clip_grad_norm_(draft.parameters(), train.clip)))
        loss = loss.over(self.ranks)
        if not (math.isfinite(loss.total) and math.isfinite(norm)):
            raise ProofError(self._nonfinite_message(batch, scheduled, float(loss.total), norm))
        with (
            draft.clock.phase("optimizer"),
            refuse_out_of_memory("the optimiser's step", "use a larger device, or make the draft smaller"),
        ):
            self.optimizer.step(lr)
        if not logs:
            return None
        return {
            "step": done,
            "epoch": batch.epoch,
            "loss": float(loss.total),
            **scheduled,
            "lr": lr,
            "grad_norm": norm,
            # accept_len_tf is teacher-forced: it is not the accept length of decoding.
            **metrics_of(loss.sums, loss.terms, loss.dens),
        }

    def add_gradients(
        self,
        cells: Iterable[Cell],
        blocks: Sequence[Blocks],
        scheduled: dict[str, float],
        metrics: bool,
        passes: int = 0,
    ) -> BatchLoss:
        """Add the gradient of these cells' part of a global batch's loss to the weights' gradients, one cell after the
        other; return their part of the loss, its denominators those of the batch.

        blocks: those of each cell, all known before any cell is read. passes: forwards at least; those that the cells
        do not need add nothing.
        """
        dens = {}
        for of_cell in blocks or [replace(empty_pass(self.draft.config, CPU)[1], lengths=())]:  # then all are 0
            _add_into(dens, self.draft.denominators(of_cell))
        dens = {name: value.to(self.device, non_blocking=True) for name, value in self.ranks.sum(dens).items()}
        batch = BatchLoss(torch.zeros((), dtype=torch.float64, device=self.device), dens)
        for cell, part in self._parts(cells, blocks, passes):
            bfloat16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.dtype == "bfloat16")
            with self.draft.clock.phase("forward"), bfloat16:
                loss = self.draft.loss(cell, part, scheduled, dens, metrics)
            with self.draft.clock.phase("backward"):
                loss.total.backward()
            batch.total += loss.total.detach()
            _add_into(batch.terms, loss.terms)
            _add_into(batch.sums, loss.sums)
        return batch

    def _parts(self, cells: Iterable[Cell], blocks: Sequence[Blocks], passes: int) -> Iterator[tuple[Cell, Blocks]]:
        """Yield each cell and the blocks of it to compute together, on the device; in all `passes` pairs at least."""
        for cell, of_cell in zip(cells, blocks, strict=True):
            on_device = cell.to(self.device)
            for part in of_cell.split(self.blocks_per_pass):
                passes -= 1
                with self.draft.target.embedding(self.draft.embedded_ids(part)):
                    yield on_device, part.to(self.device)
        for _ in range(passes):
            yield empty_pass(self.draft.config, self.device)

    def _passes(self, batch: Batch) -> int:
        """Return how many forwards this rank makes at least: if sharded as many as the rank with most cells, else one,
        of which every rank knows the names of the metrics."""
        if not self.ranks.sharded:
            return 1
        most = self.blocks_per_pass or sys.maxsize
        counts = [-(-len(blocks.anchors_N) // most) for blocks in batch.blocks]
        return max(sum(counts[rank :: self.ranks.size]) for rank in range(self.ranks.size))

    def _halve_blocks(self, batch: Batch, cause: str) -> None:
        """Have half as many blocks of a cell computed together, for the rest of the run. RoomError when it was one."""
        most = min(self.blocks_per_pass or sys.maxsize, max(len(blocks.anchors_N) for blocks in batch.blocks))
        if most == 1:
            raise RoomError(
                f"a cell of {self.train.context} rows does not fit on the device with a single block ({cause}); "
                "lower train.context, or use a larger device"
            )
        self.blocks_per_pass = -(-most // 2)
        free_cached_memory(self.device)

    def _sharded_message(self, cause: str) -> str:
        """Return the error message: the other ranks wait within this pass for what this one has no memory for."""
        return (
            f"rank {self.ranks.rank} has no memory for a pass of {self.blocks_per_pass or 'all'} blocks ({cause}), and "
            "sharded ranks cannot repeat it; lower train.context or train.cell_anchors, or take more devices"
        )

    def _nonfinite_message(self, batch: Batch, scheduled: dict[str, float], loss: float, norm: float) -> str:
        """Return the error message, naming the samples whose own loss or gradient is not finite."""
        culprits, alone = [], self.loader.sampler.batch(batch.step, alone=True)
        for number, (name, blocks) in enumerate(zip(batch.names, alone.blocks, strict=True)):
            self.draft.zero_grad()
            # Every rank computes every sample, together where they are sharded.
            total = self.add_gradients([self.loader.read(alone, number)], [blocks], scheduled, metrics=False).total
            grads = [weight.grad for weight in self.draft.parameters() if weight.grad is not None]
            norms = sum(float(whole_tensor(grad.norm())) for grad in grads)
            if not (math.isfinite(total) and math.isfinite(norms)):
                culprits.append(name)
        if len(culprits) == len(batch.names) > 1:
            cause = "every sample of the batch does it alone, so the draft itself has diverged: lower train.lr"
        elif culprits:
            cause = f"alone, these samples do it: {', '.join(culprits)}; see `pipeline inspect` and `pipeline verify`"
        else:
            cause = f"no sample does it alone: lower train.lr; the batch was {', '.join(batch.names)}"
        return f"step {batch.step + 1}: loss {loss:g}, gradient norm {norm:g}; {cause}. The last checkpoint is intact."


def _add_into(sums: dict[str, Tensor], share: dict[str, Tensor]) -> None:
    for name, value in share.items():
        sums[name] = sums[name] + value if name in sums else value
