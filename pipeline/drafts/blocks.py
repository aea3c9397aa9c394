"""Cells (packed micro-batches) and blocks (the prediction problems that a draft is trained on).

A cell is one packed micro-batch: a few samples end to end, without padding. A block is S slots laid from an anchor, a
known token, all predicted at once: one pass of the target pays for N such problems.

    M documents   R rows of a cell   T rows of a sample   K layers   D hidden size   N blocks   S slots
    F rows that keep the target's final state
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from pipeline.drafts.config import DraftConfig
from pipeline.errors import DataError
from pipeline.tensors import copied_without_wait

if TYPE_CHECKING:
    from pipeline.cache import Sample

QUERIES_A_GROUP = 128


class _Movable:
    """A dataclass of tensors and other facts."""

    def to(self, device: torch.device | str) -> Self:
        """Return a copy with every tensor, and every other value that has a method `to`, on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        movable = {name: value for name, value in values.items() if hasattr(value, "to")}
        movable |= {
            name: copied_without_wait(value, device) for name, value in movable.items() if torch.is_tensor(value)
        }
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in movable.items()})


@dataclass(frozen=True)
class Cell(_Movable):
    """One packed micro-batch: samples end to end. Document m has rows starts_M[m] .. starts_M[m] + lengths_M[m] - 1.

    The target's final states are present only for losses that read them (`DraftConfig.needs_final_states`).
    """

    ids_R: Tensor  # int64
    mask_R: Tensor  # bool: tokens to learn
    pos_R: Tensor  # int64: the row's position in its sample, also where the cell has only a window of it
    doc_R: Tensor  # int64: index of the document
    starts_M: Tensor  # int64
    lengths_M: Tensor  # int64
    aux_KRD: Tensor
    names: tuple[str, ...]  # sample ids in hex, for error messages
    final_FD: Tensor | None = None  # in the rows' order
    final_at_R: Tensor | None = None  # int64: the row's index in final_FD, -1 where it has none


@dataclass(frozen=True)
class Group:
    """Consecutive blocks first .. last - 1 of one document, and the context that any of them attends to: the
    document's rows 0 .. rows - 1."""

    first: int
    last: int
    document: int
    rows: int


@dataclass(frozen=True)
class Blocks(_Movable):
    """N blocks over one cell, all known before any forward, and so are the loss's denominators."""

    anchors_N: Tensor  # int64: rows of the cell
    starts_N: Tensor  # int64: first row of the anchor's document
    doc_N: Tensor  # int64
    input_ids_NS: Tensor  # int64: the backbone's input, the anchor's token, then mask tokens
    positions_NS: Tensor  # int64: true positions, anchor + slot
    labels_NS: Tensor  # int64
    prev_NS: Tensor  # int64: the true token at anchor + slot, which a causal head reads
    scored_NS: Tensor  # bool
    weights_NS: Tensor  # float32: `scored` times the decay
    final_row_NS: Tensor  # int64: the row whose final state predicts the label, one before it; 0 if not scored
    groups: tuple[Group, ...]
    lengths: tuple[int, ...]  # rows of each document

    def split(self, count: int | None) -> list["Blocks"]:
        """Split into parts of at most `count` blocks (None: one part). Blocks do not attend to one another, so the
        losses add up."""
        if count is None:
            return [self]
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        of_blocks = {name: value.split(count) for name, value in values.items() if torch.is_tensor(value)}
        parts = []
        for rows in zip(*of_blocks.values(), strict=True):
            part = replace(self, **dict(zip(of_blocks, rows, strict=True)))
            anchors = (part.anchors_N - part.starts_N).tolist()
            parts.append(replace(part, groups=group_blocks(anchors, part.doc_N.tolist(), self.labels_NS.shape[1])))
        return parts


def pack(
    samples: Sequence["Sample"], names: Sequence[str], offsets: Sequence[int] | None = None, final: bool = False
) -> Cell:
    """Pack samples end to end into a cell, without padding, with their final states if `final`.

    samples: of each is read ids [T], mask [T], aux [K, T, D]; if `final` also final [F, D] and final_rows [F]. offsets:
    the position in its sample of each one's first row (default 0).
    """
    offsets = [0] * len(samples) if offsets is None else offsets
    assert samples and len(samples) == len(names) == len(offsets), f"{len(samples)} samples, {len(names)} names"
    lengths_M = torch.tensor([len(sample.ids) for sample in samples])
    starts_M, final_at_R = lengths_M.cumsum(0) - lengths_M, None
    if final:
        firsts = zip(samples, starts_M.tolist(), strict=True)
        rows_F = torch.cat([sample.final_rows.long() + first for sample, first in firsts])
        final_at_R = torch.full((int(lengths_M.sum()),), -1)
        final_at_R[rows_F] = torch.arange(len(rows_F))
    return Cell(
        ids_R=torch.cat([sample.ids for sample in samples]).long(),
        mask_R=torch.cat([sample.mask for sample in samples]).bool(),
        pos_R=torch.cat([torch.arange(len(s.ids)) + first for s, first in zip(samples, offsets, strict=True)]),
        doc_R=torch.repeat_interleave(torch.arange(len(samples)), lengths_M),
        starts_M=starts_M,
        lengths_M=lengths_M,
        aux_KRD=torch.cat([sample.aux for sample in samples], dim=1),
        names=tuple(names),
        final_FD=torch.cat([sample.final for sample in samples]) if final else None,
        final_at_R=final_at_R,
    )


def eligible_anchors(mask_T: Tensor) -> Tensor:
    """Return which rows of one sample may be anchors, bool [T]: supervised rows whose next row is supervised too. A
    block may run past the sample's end."""
    mask_T = mask_T.bool()
    eligible_T = torch.zeros_like(mask_T)
    eligible_T[:-1] = mask_T[:-1] & mask_T[1:]
    return eligible_T


def lay_blocks(cell: Cell, anchors_N: Tensor, config: DraftConfig) -> Blocks:
    """Return one block for each anchor row. Labels and prefixes never leave the anchor's document.

    Same-position labels: slot k predicts token anchor + k, and slot 0 (the anchor itself) is never scored.
    Next-position: anchor + k + 1, all slots. A gap in the loss mask unscores the slots after it where the method says
    so. Raises DataError where the cell has final states, but not the one that a scored slot is to learn from.
    """
    device = cell.ids_R.device
    anchors_N = anchors_N.to(device).long()
    doc_N = cell.doc_R[anchors_N]
    starts_N = cell.starts_M[doc_N]
    last_N1 = (starts_N + cell.lengths_M[doc_N] - 1)[:, None]
    slots_S = torch.arange(config.block_size, device=device)
    token_NS = anchors_N[:, None] + slots_S
    label_NS = token_NS + int(config.shift_label)
    safe_NS = torch.minimum(label_NS, last_N1)

    scored_NS = (label_NS <= last_N1) & cell.mask_R[safe_NS] & (slots_S >= config.first_slot)
    if config.scores_up_to_gap:
        scored_NS = scored_NS.long().cumprod(-1).bool()
    final_row_NS = torch.where(scored_NS, label_NS - 1, 0)
    _check_final_rows(cell, final_row_NS, scored_NS)
    input_ids_NS = torch.full_like(token_NS, config.mask_token_id)
    input_ids_NS[:, 0] = cell.ids_R[anchors_N]
    return Blocks(
        anchors_N=anchors_N,
        starts_N=starts_N,
        doc_N=doc_N,
        input_ids_NS=input_ids_NS,
        positions_NS=cell.pos_R[anchors_N][:, None] + slots_S,
        labels_NS=cell.ids_R[safe_NS],
        prev_NS=cell.ids_R[torch.minimum(token_NS, last_N1)],
        scored_NS=scored_NS,
        weights_NS=scored_NS * slot_decay(config).to(device),
        final_row_NS=final_row_NS,
        groups=group_blocks((anchors_N - starts_N).tolist(), doc_N.tolist(), config.block_size),
        lengths=tuple(cell.lengths_M.tolist()),
    )


def group_blocks(
    anchors: Sequence[int], documents: Sequence[int], slots: int, queries: int = QUERIES_A_GROUP
) -> tuple[Group, ...]:
    """Group consecutive blocks of one document, at most `queries` slots together.

    anchors: rows within their documents, in any order; ascending is fastest, since then few keys are masked.
    """
    most = max(1, queries // slots)
    groups: list[Group] = []
    for block, (anchor, document) in enumerate(zip(anchors, documents, strict=True)):
        last = groups[-1] if groups else None
        if last and last.document == document and last.last - last.first < most:
            groups[-1] = Group(last.first, block + 1, document, max(last.rows, anchor))
        else:
            groups.append(Group(block, block + 1, document, anchor))
    return tuple(groups)


def _check_final_rows(cell: Cell, final_row_NS: Tensor, scored_NS: Tensor) -> None:
    if cell.final_at_R is None:
        return
    missing_NS = scored_NS & (cell.final_at_R[final_row_NS] < 0)
    if missing_NS.any():
        row = int(final_row_NS[missing_NS][0])
        document = int(cell.doc_R[row])
        raise DataError(
            f"sample {cell.names[document]} keeps no final state of row {row - int(cell.starts_M[document])}, though "
            'the next token is to be learned; capture the column `final` again, or set draft.objective = "ce"'
        )


def slot_decay(config: DraftConfig) -> Tensor:
    """Return the weight [S] by distance from the first proposal, exp(-distance / gamma); ones without a gamma.

    D-PACE weights by the draft's own confidence instead and ignores gamma.
    """
    if config.gamma is None or config.weighting != "decay":
        return torch.ones(config.block_size)
    distance_S = (torch.arange(config.block_size, dtype=torch.float32) - config.first_slot).clamp(min=0)
    return torch.exp(-distance_S / config.gamma)


def dpace_weights(ce_NS: Tensor, scored_NS: Tensor, alpha: float, kind: str) -> Tensor:
    """Return weights [N, S] by the draft's own confidence (D-PACE, arXiv:2605.18810), without gradient.

    The probability P_k of reaching slot k is the product of the smoothed confidences up to it; unscored slots do not
    change it and have weight 0. kind: "dpace" (P_k times continuation value), or either factor alone.
    """
    confidence_NS = (1 - alpha) * torch.exp(-ce_NS.detach()) + alpha
    reach_NS = torch.where(scored_NS, confidence_NS, 1.0).cumprod(-1)
    # Sums over the slots from each on. Not cumsum, which on CUDA has no deterministic form for floats.
    slots_S = torch.arange(ce_NS.shape[-1], device=ce_NS.device)
    rest_NS = torch.where(slots_S >= slots_S[:, None], (reach_NS * scored_NS)[:, None], 0).sum(-1)
    if kind == "dpace":
        return rest_NS * scored_NS
    if kind == "dpace-cumulative-confidence-only":
        return reach_NS * scored_NS
    assert kind == "dpace-continuation-value-only", kind
    return rest_NS / reach_NS.clamp(min=torch.finfo(reach_NS.dtype).tiny) * scored_NS
