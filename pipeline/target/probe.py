"""The probe: before a shard exists, what its files say is compared by value with an ordinary forward of the target.

Wrong layers, a lost or doubled norm, a wrong head and dead buffers train well, and show only in production as an accept
length of 1. By value and not by argmax: an RMS norm is a positive scale, so an argmax is often right without it, and no
argmax sees an auxiliary layer that is off by one.

    P rows of a prefix   D hidden size   V vocabulary
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.cache.codecs import PROBE_ALLOWANCE
from pipeline.cache.codecs.int8 import as_states
from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.layout import layer_of
from pipeline.cache.samples import ShardPlan
from pipeline.errors import ProofError
from pipeline.target.head import TargetHead
from pipeline.target.model import final_norm

ROWS = 128  # of a prefix, at most
SAMPLES = 2
SCORED_ROWS = 16  # of `final`, where a prompt is longer than ROWS
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative Frobenius error

Read = Callable[[str, int], np.ndarray]


def probe(
    model: PreTrainedModel,
    head: TargetHead,
    shard: ShardPlan,
    columns: Sequence[ColumnSpec],
    refused: set[int],
    read: Read,
    slack: float = 0.0,
) -> dict[str, dict]:
    """Compare two samples' prefixes as stored (`read(column, row)`) with `model(ids)`; return facts for each column.

    `head` is the one that was stored. `slack` is added to every bound, for states that another engine computed. Raises
    ProofError naming what does not fit and what would fit better.
    """
    device = next(model.parameters()).device
    worst = dict.fromkeys((spec.name for spec in columns), 0.0)
    rows = probe_rows(shard, refused)
    for row in rows:
        prefix = prefix_length(shard, row)
        ids_P = torch.from_numpy(shard.ids(row)[:prefix].astype(np.int64)).to(device)
        with torch.no_grad():
            truth = model(ids_P[None], output_hidden_states=True, use_cache=False)
        entries = [entry[0] for entry in truth.hidden_states]
        check_embedding(head, ids_P, entries[0])
        for spec in columns:
            kept = stored_rows(shard, row, spec.keeps)
            inside = torch.from_numpy(kept[kept < prefix]).to(device)
            stored = as_states(read(spec.name, row))[: len(inside)].to(device)
            promise = PROBE_ALLOWANCE.get(spec.codec, 0.0) + slack
            layer = layer_of(spec.name)
            if layer is not None:
                error = check_layer(stored, entries, layer, promise)
            else:
                error = check_final(stored, entries[-1][inside], final_norm(model), promise)
                error = max(error, check_logits(stored, head, truth.logits[0, inside], promise))
            worst[spec.name] = max(worst[spec.name], error)
    return {name: {"samples": rows, "error": float(f"{error:.2e}")} for name, error in worst.items()}


def probe_rows(shard: ShardPlan, refused: set[int]) -> list[int]:
    """Return the samples to look at: of those whose replies begin soonest, up to the bound, the first by id."""
    usable = [row for row in range(len(shard)) if row not in refused]
    names = shard.sample_ids
    starts = {row: max(ROWS, int(np.argmax(shard.mask(row)))) for row in usable}
    return sorted(usable, key=lambda row: (starts[row], *names[row].tolist()))[:SAMPLES]


def prefix_length(shard: ShardPlan, row: int) -> int:
    """Return the rows of a sample's prefix: ROWS, and more only where a long prompt would leave no `final` in it.

    Never the whole sample: a target that sees what stands behind a token gives other states without it, and is caught.
    """
    first = int(np.argmax(shard.mask(row)))
    return min(int(shard.lengths[row]) - 1, max(ROWS, first + SCORED_ROWS if first >= ROWS else 0))


def relative(found: Tensor, truth: Tensor) -> float:
    """Return the Frobenius norm of the difference relative to the truth's, in fp64."""
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm().clamp_min(1e-30))


def check_layer(stored_PD: Tensor, entries: Sequence[Tensor], layer: int, promise: float = 0.0) -> float:
    """Return the error of a stored layer against entry layer + 1 of `hidden_states`, which must be the nearest.

    `promise` is what the column's codec, or another engine's rounding, may add.
    """
    bound, right = BOUNDS[stored_PD.dtype] + promise, layer + 1
    beside = [entry for entry in (layer, right, right + 1) if 0 <= entry < len(entries)]
    errors = {entry: relative(stored_PD, entries[entry]) for entry in beside}
    if errors[right] <= bound and errors[right] <= min(errors.values()):  # alike where a layer passes its input on
        return errors[right]
    errors = {entry: relative(stored_PD, entries[entry]) for entry in range(len(entries))}
    best = min(errors, key=errors.get)
    if best == right or errors[best] > bound:
        hint = "no other layer fits: a norm, a scale or an order is wrong"
    elif best == len(entries) - 1:
        hint = f"the last layer after the norm fits better ({errors[best]:.1e})"
    else:
        hint = f"layer {best - 1} fits better ({errors[best]:.1e})"
    raise ProofError(
        f"probe: what is stored as layer {layer} differs from the target's layer {layer} by {errors[right]:.1e}, "
        f"at most {bound:.0e} is right; {hint}; nothing of this shard was kept"
    )


def check_embedding(head: TargetHead, ids_P: Tensor, entry_PD: Tensor) -> float:
    """Return the error of the stored embedding, scale included, against what enters layer 0."""
    found_PD = head.embed(ids_P)
    error, bound = relative(found_PD, entry_PD), BOUNDS[entry_PD.dtype]
    if error <= bound:
        return error
    scale = float((found_PD.double() * entry_PD.double()).sum() / found_PD.double().square().sum())
    scaled = relative(found_PD.double() * scale, entry_PD)
    hint = (
        f"{scale:.4g} times it would fit" if scaled <= bound else "no scale of it fits: is more added to it, or normed?"
    )
    raise ProofError(
        f"probe: the stored embedding (scale {head.embed_scale:g}) differs from what enters layer 0 by {error:.1e}, "
        f"at most {bound:.0e} is right; {hint}; this target needs its embedding read otherwise"
    )


def check_final(stored_RD: Tensor, truth_RD: Tensor, norm: nn.Module | None, promise: float = 0.0) -> float:
    """Return the error of stored `final` rows against the last entry of `hidden_states`, which is normed."""
    error, bound = relative(stored_RD, truth_RD), BOUNDS[stored_RD.dtype] + promise
    if error <= bound:
        return error
    hint = "neither a missing nor a doubled norm explains it"
    if norm is not None and relative(norm(stored_RD), truth_RD) <= bound:
        hint = "the last norm is missing"
    elif norm is not None and relative(stored_RD, norm(truth_RD)) <= bound:
        hint = "the last norm is applied twice"
    raise ProofError(
        f"probe: what is stored as `final` differs from what the LM head reads by {error:.1e}, at most {bound:.0e} "
        f"is right; {hint}; nothing of this shard was kept"
    )


def check_logits(stored_RD: Tensor, head: TargetHead, truth_RV: Tensor, promise: float = 0.0) -> float:
    """Return the error of the stored head's logits on stored `final` rows against the target's own logits.

    Their argmax must be equal, too, wherever the gap of the two best exceeds the largest difference measured.
    """
    found_RV, truth_RV, bound = head.logits(stored_RD), truth_RV.float(), BOUNDS[stored_RD.dtype] + promise
    error = relative(found_RV, truth_RV)
    gap_R = truth_RV.topk(2, dim=-1).values.diff(dim=-1).abs()[:, 0]
    clear_R = gap_R > (found_RV - truth_RV).abs().max()
    flipped = int((clear_R & (found_RV.argmax(-1) != truth_RV.argmax(-1))).sum())
    if error <= bound and not flipped:
        return error
    raise ProofError(
        f"probe: the stored LM head gives logits that differ from the target's by {error:.1e}, at most {bound:.0e} "
        f"is right ({flipped} clear argmaxes differ), though `final` itself fits: the head is transposed, permuted, "
        "scaled or capped otherwise, or a norm stands before it; nothing of this shard was kept"
    )
