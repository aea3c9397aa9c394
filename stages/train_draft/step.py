"""One optimiser step: gradients accumulated over the cells (packed micro-batches) of a global batch, then an update.

Anchors, labels and weights are known before any forward, so the loss's denominators are summed over the whole batch
first. Every cell divides by them and the losses add up to that of the batch, however it is cut into cells.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.drafts import Blocks, Draft, ScheduleValues, metrics_of
from pipeline.errors import ProofError, RoomError
from pipeline.runs.recipe import TrainSection
from pipeline.tensors import is_out_of_memory
from stages.train_draft.loader import AnyCell, Batch, BatchLoader
from stages.train_draft.optimizer import AdamW, Muon, lr_factor


@dataclass(frozen=True)
class BatchLoss:
    """Sums over the cells of a batch: the loss, each term's numerator and denominator, and the metrics' sums."""

    loss: float
    terms: dict[str, Tensor]
    dens: dict[str, Tensor]
    sums: dict[str, Tensor]


class Precision:
    """A context manager for the forward's precision: float32, or bfloat16 by autocast over float32 weights."""

    def __init__(self, dtype: str, device: str | torch.device):
        self.kind, self.wanted = torch.device(device).type, dtype == "bfloat16"

    def __call__(self):
        return torch.autocast(self.kind, torch.bfloat16, enabled=self.wanted)


def add_into(sums: dict[str, Tensor], share: dict[str, Tensor]) -> None:
    for name, value in share.items():
        sums[name] = sums[name] + value if name in sums else value


def backward(
    draft: Draft,
    cells: Iterable[tuple[AnyCell, Blocks]],
    scheduled: ScheduleValues,
    precision: Precision,
    metrics: bool,
    blocks: list[Blocks] | None = None,
    blocks_per_pass: int | None = None,
) -> BatchLoss:
    """Add the gradient of a global batch's loss to the draft's weights, one cell after the other.

    blocks: those of all cells, needed where `cells` can be iterated only once. blocks_per_pass: how many blocks of a
    cell go through forward and backward together (None: all).
    """
    device = draft.fc.weight.device
    dens, terms, sums = {}, {}, {}
    for cell_blocks in [cell_blocks for _, cell_blocks in cells] if blocks is None else blocks:
        add_into(dens, draft.denominators(cell_blocks))
    dens = {name: value.to(device) for name, value in dens.items()}
    total = torch.zeros((), dtype=torch.float64, device=device)
    for cell, cell_blocks in cells:
        on_device = cell.to(device)
        for part in [cell_blocks] if blocks_per_pass is None else cell_blocks.split(blocks_per_pass):
            with precision():
                loss = draft.loss(on_device, part.to(device), scheduled, dens, metrics)
            loss.total.backward()
            total += loss.total.detach()
            add_into(terms, loss.terms)
            add_into(sums, loss.sums)
    return BatchLoss(float(total), terms, dens, sums)


class Trainer:
    """Updates a draft by one global batch: `step(batch)`.

    blocks_per_pass: blocks of a cell that are computed together; None: all of them, until the device runs out of
    memory.
    """

    def __init__(self, draft: Draft, optimizer: AdamW | Muon, loader: BatchLoader, train: TrainSection):
        self.draft, self.optimizer, self.loader, self.train = draft, optimizer, loader, train
        self.precision = Precision(train.dtype, draft.fc.weight.device)
        self.blocks_per_pass: int | None = None

    def step(self, batch: Batch) -> dict | None:
        """Update the draft by one batch; return its metrics when this step is to be logged, else None.

        Raises ProofError naming step and samples when the loss or its gradient is not finite; the weights are then
        still those of the step before. Raises RoomError when a single block does not fit on the device.
        """
        train, done = self.train, batch.step + 1
        logs = done % train.log_every == 0 or done in (1, train.steps)
        scheduled = self.draft.schedule(batch.step, train.steps)
        lr = train.lr * lr_factor(batch.step, train.steps, train.warmup, train.schedule)
        result = self._backward(batch, scheduled, logs)
        norm = float(torch.nn.utils.clip_grad_norm_(self.draft.parameters(), train.clip))
        if not (math.isfinite(result.loss) and math.isfinite(norm)):
            raise ProofError(self._nonfinite_message(batch, scheduled, result.loss, norm))
        self.optimizer.step(lr)
        if not logs:
            return None
        # accept_len_tf is teacher-forced: it is not the accept length of decoding.
        figures = metrics_of(result.sums, result.terms, result.dens)
        return {
            "step": done,
            "epoch": batch.epoch,
            "loss": result.loss,
            **({"lambda_base": scheduled.lambda_base} if "base" in self.draft.logit_kinds(scheduled) else {}),
            "lr": lr,
            "grad_norm": norm,
            **figures,
        }

    def _backward(self, batch: Batch, scheduled: ScheduleValues, logs: bool) -> BatchLoss:
        """Compute the gradients of a batch. Out of memory halves `blocks_per_pass`, for the rest of the run.

        Raises RoomError when one block alone does not fit.
        """
        cells = batch.cells
        while True:
            self.optimizer.zero_grad()
            try:
                return backward(self.draft, cells, scheduled, self.precision, logs, batch.blocks, self.blocks_per_pass)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                cause = str(error).strip().split("\n")[0][:160]
            most = min(self.blocks_per_pass or sys.maxsize, max(len(blocks.anchors_N) for blocks in batch.blocks))
            if most == 1:
                raise RoomError(
                    f"a cell of {self.train.context} rows does not fit on the device with a single block ({cause}); "
                    "lower train.context, or use a larger device"
                )
            # Outside the except clause: the exception keeps the failed forward's tensors alive.
            self.blocks_per_pass = -(-most // 2)
            if self.draft.fc.weight.device.type == "cuda":
                torch.cuda.empty_cache()
            cells = self.loader.batch(batch.step).cells  # prefetched cells can be iterated only once

    def _nonfinite_message(self, batch: Batch, scheduled: ScheduleValues, loss: float, norm: float) -> str:
        """Return the error message, naming the samples whose own loss or gradient is not finite."""
        culprits = []
        for name, cell in zip(batch.names, self.loader.batch(batch.step, alone=True).cells, strict=True):
            self.optimizer.zero_grad()
            sample_loss = backward(self.draft, [cell], scheduled, self.precision, metrics=False).loss
            norms = sum(float(weight.grad.norm()) for weight in self.draft.parameters() if weight.grad is not None)
            if not (math.isfinite(sample_loss) and math.isfinite(norms)):
                culprits.append(name)
        if len(culprits) == len(batch.names) > 1:
            cause = "every sample of the batch does it alone, so the draft itself has diverged: lower train.lr"
        elif culprits:
            cause = f"alone, these samples do it: {', '.join(culprits)}; see `pipeline inspect` and `pipeline verify`"
        else:
            cause = f"no sample does it alone: lower train.lr; the batch was {', '.join(batch.names)}"
        return f"step {batch.step + 1}: loss {loss:g}, gradient norm {norm:g}; {cause}. The last checkpoint is intact."
