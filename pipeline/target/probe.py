"""The probe: before a shard is committed, its stored states are compared with an ordinary forward of the target.

Whatever engine computed them, the truth is a reference: the target as Hugging Face runs it, a sample at a time.

With wrong layers, a missing or doubled norm, a wrong head or stale buffers, training runs well, and only serving shows
an accept length of 1. Compared by value, not by argmax: an RMS norm is a positive scale, so the argmax is often right
without it, and no argmax detects an auxiliary layer that is off by one.

    P rows of a prefix   D hidden size   V vocabulary
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.cache.codecs import CODECS
from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.layout import layer_of
from pipeline.cache.samples import ShardPlan
from pipeline.errors import ProofError
from pipeline.target.head import TargetHead
from pipeline.target.model import final_norm
from pipeline.tensors import as_states

ROWS = 128  # of a prefix, mostly
SAMPLES = 2
SCORED_ROWS = 16  # of `final`, where a prompt is longer than ROWS
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative Frobenius error

ReadRows = Callable[[str, int], np.ndarray]


class ReferenceTarget:
    """The target as Hugging Face runs it: one sample, no padding, no hooks but those of its own `hidden_states`."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.norm = model, final_norm(model)
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def run(self, ids_P: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the entries of `hidden_states`, [P, D] each, and the logits [P, V] of the first tokens of a sample.

        Entry i + 1 is layer i; the last entry is `final`, after the norm.
        """
        output = self.model(ids_P[None], output_hidden_states=True, use_cache=False)
        return [entry_1PD[0] for entry_1PD in output.hidden_states], output.logits[0]


def probe(
    reference: ReferenceTarget,
    head: TargetHead,
    shard: ShardPlan,
    columns: Sequence[ColumnSpec],
    refused: set[int],
    read: ReadRows,
    slack: float = 0.0,
) -> dict[str, dict]:
    """Compare two stored prefixes (`read(column, sample)`) with the reference; return facts for each column.

    head: the stored one. refused: samples to skip. slack: is added to every bound, for states of another engine.
    Raises ProofError naming what does not fit and what would fit better.
    """
    worst = dict.fromkeys((spec.name for spec in columns), 0.0)
    samples = probe_samples(shard, refused)
    for sample in samples:
        prefix = prefix_length(shard, sample)
        ids_P = torch.from_numpy(shard.ids(sample)[:prefix].astype(np.int64)).to(reference.device)
        entries, logits_PV = reference.run(ids_P)
        check_embedding(head, ids_P, entries[0])
        for spec in columns:
            kept = stored_rows(shard, sample, spec.keeps)
            inside = torch.from_numpy(kept[kept < prefix]).to(reference.device)
            stored = as_states(read(spec.name, sample))[: len(inside)].to(reference.device)
            tolerance = CODECS[spec.codec].probe_allowance + slack
            layer = layer_of(spec.name)
            if layer is not None:
                error = check_layer(stored, entries, layer, tolerance)
            else:
                error = check_final(stored, entries[-1][inside], reference.norm, tolerance)
                error = max(error, check_logits(stored, head, logits_PV[inside], tolerance))
            worst[spec.name] = max(worst[spec.name], error)
    return {name: {"samples": samples, "error": float(f"{error:.2e}")} for name, error in worst.items()}


def probe_samples(shard: ShardPlan, refused: set[int]) -> list[int]:
    """Return the samples to compare: the first SAMPLES by start of the reply (counted from ROWS on), then by id."""
    usable = [sample for sample in range(len(shard)) if sample not in refused]
    names = shard.sample_ids
    starts = {sample: max(ROWS, int(np.argmax(shard.mask(sample)))) for sample in usable}
    return sorted(usable, key=lambda sample: (starts[sample], *names[sample].tolist()))[:SAMPLES]


def prefix_length(shard: ShardPlan, sample: int) -> int:
    """Return the length of a sample's prefix: ROWS, or more where a long prompt would leave no `final` row in it.

    Never the whole sample: a target that attends to later tokens gives other states without them, which shows here.
    """
    first = int(np.argmax(shard.mask(sample)))
    return min(int(shard.lengths[sample]) - 1, max(ROWS, first + SCORED_ROWS if first >= ROWS else 0))


def relative_error(computed: Tensor, truth: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of `truth`, in fp64."""
    computed, truth = computed.double(), truth.double()
    return float((computed - truth).norm() / truth.norm().clamp_min(1e-30))


def check_layer(stored_PD: Tensor, entries: Sequence[Tensor], layer: int, tolerance: float = 0.0) -> float:
    """Return the error of a stored layer against entry layer + 1 of `hidden_states`, which must be the closest entry.

    tolerance: what the column's codec, or another engine's rounding, may add. Raises ProofError.
    """
    bound, right = BOUNDS[stored_PD.dtype] + tolerance, layer + 1
    beside = [entry for entry in (layer, right, right + 1) if 0 <= entry < len(entries)]
    errors = {entry: relative_error(stored_PD, entries[entry]) for entry in beside}
    if errors[right] <= bound and errors[right] <= min(errors.values()):  # alike where a layer passes its input on
        return errors[right]
    errors = {entry: relative_error(stored_PD, entries[entry]) for entry in range(len(entries))}
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
    """Return the error of the stored embedding, scale included, against the input of layer 0. Raises ProofError."""
    found_PD = head.embed(ids_P)
    error, bound = relative_error(found_PD, entry_PD), BOUNDS[entry_PD.dtype]
    if error <= bound:
        return error
    scale = float((found_PD.double() * entry_PD.double()).sum() / found_PD.double().square().sum())
    scaled = relative_error(found_PD.double() * scale, entry_PD)
    hint = (
        f"{scale:.4g} times it would fit" if scaled <= bound else "no scale of it fits: is more added to it, or normed?"
    )
    raise ProofError(
        f"probe: the stored embedding (scale {head.embed_scale:g}) differs from what enters layer 0 by {error:.1e}, "
        f"at most {bound:.0e} is right; {hint}; this target needs its embedding read otherwise"
    )


def check_final(stored_RD: Tensor, truth_RD: Tensor, norm: nn.Module | None, tolerance: float = 0.0) -> float:
    """Return the error of stored `final` rows against the last, normed entry of `hidden_states`. Raises ProofError."""
    error, bound = relative_error(stored_RD, truth_RD), BOUNDS[stored_RD.dtype] + tolerance
    if error <= bound:
        return error
    hint = "neither a missing nor a doubled norm explains it"
    if norm is not None and relative_error(norm(stored_RD), truth_RD) <= bound:
        hint = "the last norm is missing"
    elif norm is not None and relative_error(stored_RD, norm(truth_RD)) <= bound:
        hint = "the last norm is applied twice"
    raise ProofError(
        f"probe: what is stored as `final` differs from what the LM head reads by {error:.1e}, at most {bound:.0e} "
        f"is right; {hint}; nothing of this shard was kept"
    )


def check_logits(stored_RD: Tensor, head: TargetHead, truth_RV: Tensor, tolerance: float = 0.0) -> float:
    """Return the error of the stored head's logits on stored `final` rows against the target's own. Raises ProofError.

    The argmax must be equal, too, wherever the gap of the two largest exceeds the largest difference measured.
    """
    found_RV, truth_RV, bound = head.logits(stored_RD), truth_RV.float(), BOUNDS[stored_RD.dtype] + tolerance
    error = relative_error(found_RV, truth_RV)
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
