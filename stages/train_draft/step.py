"""One optimiser step: a global batch, each cell's share of the loss added up before the optimiser moves.

Denominators come first: anchors, labels and weights are known before any forward, so every cell divides by the whole
batch's and the shares add up to one loss, however the batch is cut.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.drafts import Blocks, Draft, Knobs, metrics_of
from pipeline.errors import ProofError, RoomError
from pipeline.runs.recipe import TrainSection
from pipeline.tensors import out_of_memory
from stages.train_draft.loader import AnyCell, Batch, Stream
from stages.train_draft.optimizer import AdamW, Muon, lr_factor


@dataclass(frozen=True)
class Shares:
    """What the cells of a batch add up to: the loss, and numerators, denominators and metric sums of its terms."""

    loss: float
    terms: dict[str, Tensor]
    dens: dict[str, Tensor]
    sums: dict[str, Tensor]


class Precision:
    """The arithmetic of the forward: float32, or bfloat16 by autocast over float32 weights."""

    def __init__(self, dtype: str, device: str | torch.device):
        self.kind, self.wanted = torch.device(device).type, dtype == "bfloat16"

    def __call__(self):
        return torch.autocast(self.kind, torch.bfloat16, enabled=self.wanted)


def add(sums: dict[str, Tensor], share: dict[str, Tensor]) -> None:
    for name, value in share.items():
        sums[name] = sums[name] + value if name in sums else value


def backward(
    draft: Draft,
    cells: Iterable[tuple[AnyCell, Blocks]],
    knobs: Knobs,
    precision: Precision,
    metrics: bool,
    blocks: list[Blocks] | None = None,
    at_once: int | None = None,
) -> Shares:
    """Add the gradient of a global batch's loss to the draft's: one cell after the other, `at_once` blocks of each.

    `blocks` are those of all cells, for cells that can be gone over but once.
    """
    device = draft.fc.weight.device
    dens, terms, sums = {}, {}, {}
    for laid in [laid for _, laid in cells] if blocks is None else blocks:
        add(dens, draft.denominators(laid))
    dens = {name: value.to(device) for name, value in dens.items()}
    total = torch.zeros((), dtype=torch.float64, device=device)
    for cell, laid in cells:
        there = cell.to(device)
        for part in [laid] if at_once is None else laid.split(at_once):
            with precision():
                loss = draft.loss(there, part.to(device), knobs, dens, metrics)
            loss.total.backward()
            total += loss.total.detach()
            add(terms, loss.terms)
            add(sums, loss.sums)
    return Shares(float(total), terms, dens, sums)


class Trainer:
    """A draft, its optimiser and what a step needs. `step(batch)` moves both once.

    at_once: blocks of a cell that are computed together. None: all, until the device's memory is too small for them.
    """

    def __init__(self, draft: Draft, optimizer: AdamW | Muon, stream: Stream, train: TrainSection):
        self.draft, self.optimizer, self.stream, self.train = draft, optimizer, stream, train
        self.precision = Precision(train.dtype, draft.fc.weight.device)
        self.at_once: int | None = None

    def step(self, batch: Batch) -> dict | None:
        """Move the draft by one batch; return the line of metrics when this step logs one.

        Raises ProofError naming step and samples when the loss or its gradient is not finite; the draft is then still
        that of the step before.
        """
        train, done = self.train, batch.step + 1
        logs = done % train.log_every == 0 or done in (1, train.steps)
        knobs = self.draft.schedule(batch.step, train.steps)
        lr = train.lr * lr_factor(batch.step, train.steps, train.warmup, train.schedule)
        shares = self._shares(batch, knobs, logs)
        norm = float(torch.nn.utils.clip_grad_norm_(self.draft.parameters(), train.clip))
        if not (math.isfinite(shares.loss) and math.isfinite(norm)):
            raise ProofError(self._blame(batch, knobs, shares.loss, norm))
        self.optimizer.step(lr)
        if not logs:
            return None
        # The names say what they are: accept_len_tf is teacher-forced, never the accept length of decoding.
        figures = metrics_of(shares.sums, shares.terms, shares.dens)
        return {
            "step": done,
            "epoch": batch.epoch,
            "loss": shares.loss,
            **({"lambda_base": knobs.lambda_base} if "base" in self.draft.kinds(knobs) else {}),
            "lr": lr,
            "grad_norm": norm,
            **figures,
        }

    def _shares(self, batch: Batch, knobs: Knobs, logs: bool) -> Shares:
        """Fill the gradients. A device without memory for a cell's blocks computes them in smaller parts, for good.

        RoomError when one block alone does not fit.
        """
        cells = batch.cells
        while True:
            self.optimizer.zero_grad()
            try:
                return backward(self.draft, cells, knobs, self.precision, logs, batch.blocks, self.at_once)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                cause = str(error).strip().split("\n")[0][:160]
            most = min(self.at_once or sys.maxsize, max(len(blocks.anchors_N) for blocks in batch.blocks))
            if most == 1:
                raise RoomError(
                    f"a cell of {self.train.context} rows does not fit on the device with a single block ({cause}); "
                    "lower train.context, or use a larger device"
                )
            self.at_once = -(-most // 2)  # out of the handler: the failed forward's memory hangs on its exception
            if self.draft.fc.weight.device.type == "cuda":
                torch.cuda.empty_cache()
            cells = self.stream.batch(batch.step).cells  # those read ahead can be gone over but once

    def _blame(self, batch: Batch, knobs: Knobs, loss: float, norm: float) -> str:
        """Say which samples of the batch alone give a loss or gradient that is not finite."""
        found = []
        for name, laid in zip(batch.names, self.stream.batch(batch.step, alone=True).cells, strict=True):
            self.optimizer.zero_grad()
            alone = backward(self.draft, [laid], knobs, self.precision, metrics=False).loss
            squares = sum(float(weight.grad.norm()) for weight in self.draft.parameters() if weight.grad is not None)
            if not (math.isfinite(alone) and math.isfinite(squares)):
                found.append(name)
        if len(found) == len(batch.names) > 1:
            cause = "every sample of the batch does it alone, so the draft itself has diverged: lower train.lr"
        elif found:
            cause = f"alone, these samples do it: {', '.join(found)}; see `pipeline inspect` and `pipeline verify`"
        else:
            cause = f"no sample does it alone: lower train.lr; the batch was {', '.join(batch.names)}"
        return f"step {batch.step + 1}: loss {loss:g}, gradient norm {norm:g}; {cause}. The last checkpoint is intact."
