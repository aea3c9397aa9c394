"""One optimiser step, from top to bottom: schedule, denominators, forward and backward of each cell (packed
micro-batch), clipping, update.

Anchors, labels and weights are known before any forward, so the loss's denominators are summed over the whole batch
first. Every cell divides by them and the losses add up to that of the batch, however it is cut into cells.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.drafts import Blocks, Cell, Draft, metrics_of
from pipeline.errors import ProofError, RoomError, first_line
from pipeline.runs.recipe import TrainSection
from pipeline.tensors import is_out_of_memory
from stages.train_draft.loader import Batch, BatchLoader
from stages.train_draft.optimizer import AdamW

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


class Trainer:
    """Updates a draft by one global batch: `step(batch, cells)`.

    blocks_per_pass: blocks of a cell that are computed together; None: all of them, until the device runs out of
    memory.
    """

    def __init__(self, draft: Draft, optimizer: AdamW, loader: BatchLoader, train: TrainSection):
        self.draft, self.optimizer, self.loader, self.train = draft, optimizer, loader, train
        self.device = draft.device
        self.blocks_per_pass: int | None = None

    def step(self, batch: Batch, cells: Iterable[Cell]) -> dict | None:
        """Update the draft by one batch; return its metrics when this step is to be logged, else None.

        cells: the batch's, with their states. Raises ProofError naming step and samples when the loss or its gradient
        is not finite; the weights are then still those of the step before. Raises RoomError when a single block does
        not fit on the device.
        """
        train, draft, done = self.train, self.draft, batch.step + 1
        logs = done % train.log_every == 0 or done in (1, train.steps)
        scheduled = draft.schedule(batch.step, train.steps)
        lr = train.lr * lr_factor(batch.step, train.steps, train.warmup, train.schedule)

        loss = None
        while loss is None:
            self.optimizer.zero_grad()
            try:
                loss = self.add_gradients(cells, batch.blocks, scheduled, logs)
            except RuntimeError as error:
                cause = _out_of_memory(error)
            if loss is None:  # outside the except clause: the exception keeps the failed forward's tensors alive
                self._halve_blocks(batch, cause)
                cells = self.loader.read_all(batch)

        norm = float(torch.nn.utils.clip_grad_norm_(draft.parameters(), train.clip))
        if not (math.isfinite(loss.total) and math.isfinite(norm)):
            raise ProofError(self._nonfinite_message(batch, scheduled, float(loss.total), norm))
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
        self, cells: Iterable[Cell], blocks: Sequence[Blocks], scheduled: dict[str, float], metrics: bool
    ) -> BatchLoss:
        """Add the gradient of a global batch's loss to the weights' gradients, one cell after the other.

        blocks: those of each cell, all known before any cell is read.
        """
        dens = {}
        for of_cell in blocks:
            _add_into(dens, self.draft.denominators(of_cell))
        dens = {name: value.to(self.device) for name, value in dens.items()}
        batch = BatchLoss(torch.zeros((), dtype=torch.float64, device=self.device), dens)
        for cell, of_cell in zip(cells, blocks, strict=True):
            on_device = cell.to(self.device)
            for part in of_cell.split(self.blocks_per_pass):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.dtype == "bfloat16"):
                    loss = self.draft.loss(on_device, part.to(self.device), scheduled, dens, metrics)
                loss.total.backward()
                batch.total += loss.total.detach()
                _add_into(batch.terms, loss.terms)
                _add_into(batch.sums, loss.sums)
        return batch

    def _halve_blocks(self, batch: Batch, cause: str) -> None:
        """Have half as many blocks of a cell computed together, for the rest of the run. RoomError when it was one."""
        most = min(self.blocks_per_pass or sys.maxsize, max(len(blocks.anchors_N) for blocks in batch.blocks))
        if most == 1:
            raise RoomError(
                f"a cell of {self.train.context} rows does not fit on the device with a single block ({cause}); "
                "lower train.context, or use a larger device"
            )
        self.blocks_per_pass = -(-most // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _nonfinite_message(self, batch: Batch, scheduled: dict[str, float], loss: float, norm: float) -> str:
        """Return the error message, naming the samples whose own loss or gradient is not finite."""
        culprits, alone = [], self.loader.batch(batch.step, alone=True)
        for name, cell, blocks in zip(batch.names, self.loader.read_all(alone), alone.blocks, strict=True):
            self.optimizer.zero_grad()
            total = self.add_gradients([cell], [blocks], scheduled, metrics=False).total
            norms = sum(float(weight.grad.norm()) for weight in self.draft.parameters() if weight.grad is not None)
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


def _out_of_memory(error: RuntimeError) -> str:
    """Return the text of an out-of-memory error; any other is raised again."""
    if not is_out_of_memory(error):
        raise error
    return first_line(error)
