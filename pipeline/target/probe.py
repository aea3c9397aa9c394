"""The probe: before a shard is committed, its stored states are compared with an ordinary forward of the target.

Whatever engine computed them, the truth is a reference: the target as Hugging Face runs it, a sample at a time.

With wrong layers, a missing or doubled norm, a wrong head or stale buffers, training runs well, and only serving shows
an accept length of 1. Compared by value, not by argmax: an RMS norm is a positive scale, so the argmax is often right
without it, and no argmax detects an auxiliary layer that is off by one.

Two right forwards of a deep target in bfloat16 differ by more than those of a shallow one. So where an error is above
the usual bound, the reference runs the same tokens once more with its sums in another order, and the bound is a
multiple of the difference found; what is stored must then still be nearest to what it claims to be. So it is in float32
for a target that quantises activations by what else is in the batch.

    P rows of a prefix   D hidden size   V vocabulary
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.cache.codecs import CODECS
from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.layout import layer_of
from pipeline.cache.samples import ShardPlan
from pipeline.errors import ProofError
from pipeline.target.head import TargetHead
from pipeline.target.model import final_norm
from pipeline.target.several_devices import input_device
from pipeline.tensors import as_states

ROWS = 128  # of a prefix, mostly
SAMPLES = 2
SCORED_ROWS = 16  # of `final`, where a prompt is longer than ROWS
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative Frobenius error
NOISE_FACTOR = 2  # a bound above these, in differences between two right forwards
WIDEST = 0.15  # the widest bound: neighbouring layers of a deep target differ by as little. More is no noise
WORST_ROW = 0.5  # relative error of one row where the bound is widened; a stale row has about 1.4

ReadRows = Callable[[str, int], np.ndarray]


class ReferenceTarget:
    """The target as Hugging Face runs it: one sample, no padding, no hooks but those of its own `hidden_states`.

    What it returns is on the device of the target's inputs, also where the target is spread over several.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.device, norm = model, input_device(model), final_norm(model)
        self.norm = norm and (lambda rows_RD: norm(rows_RD).to(rows_RD.device))

    @torch.no_grad()
    def run(self, ids_P: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the entries of `hidden_states`, [P, D] each, and the logits [P, V] of the first tokens of a sample.

        Entry i + 1 is layer i; the last entry is `final`, after the norm.
        """
        output = self.model(ids_P[None], output_hidden_states=True, use_cache=False)
        return [entry_1PD[0].to(self.device) for entry_1PD in output.hidden_states], output.logits[0].to(self.device)

    @torch.no_grad()
    def noise(self, ids_P: Tensor, entries: Sequence[Tensor]) -> list[float]:
        """Return by how much each entry differs from `entries`, which `run` gave, when sums are taken in another order.

        In two ways, of which the larger counts: in a padded batch of two, and by another attention kernel. One alone
        may happen to use the same kernels as `run`, on a CPU mostly.
        """
        P, pads = len(ids_P), ids_P[:1].repeat(8)
        ids_2T = torch.stack([torch.cat([ids_P, pads]), torch.cat([ids_P.flip(0), pads])])
        mask_2T = (torch.arange(P + len(pads), device=self.device) < P).long().expand(2, -1)
        batch = self.model(ids_2T, attention_mask=mask_2T, output_hidden_states=True, use_cache=False).hidden_states
        firsts = [entry_2TD[0, :P].to(self.device) for entry_2TD in batch]
        found = [relative_error(first, alone) for first, alone in zip(firsts, entries, strict=True)]
        kernel = self.model.config._attn_implementation
        if kernel is None:
            return found
        try:
            self.model.set_attn_implementation("sdpa" if kernel == "eager" else "eager")
            other, _ = self.run(ids_P)
        except (ValueError, ImportError, NotImplementedError):  # it has one kernel only
            return found
        finally:
            self.model.set_attn_implementation(kernel)
        return [max(pair) for pair in zip(found, map(relative_error, other, entries), strict=True)]


class Bounds:
    """What errors are right for one prefix: the usual bounds, or, where one is exceeded, those by measured noise."""

    def __init__(self, reference: ReferenceTarget, ids_P: Tensor, entries: Sequence[Tensor]):
        self._noise = lru_cache(1)(lambda: reference.noise(ids_P, entries))

    def of(self, entry: int, stored: Tensor, truth: Tensor, tolerance: float) -> float:
        """Return the largest right error of what is stored of an entry of `hidden_states`; truth: its right values.

        Wider than usual only where the usual bound is exceeded, and neither by size, which noise hardly changes, nor by
        a few rows alone, which are then other rows. tolerance: what a column's codec, or another engine's rounding, may
        add.
        """
        usual = BOUNDS[stored.dtype] + tolerance
        stored, truth = stored.double(), truth.double()
        size = float((stored * truth).sum() / truth.square().sum().clamp_min(1e-30))
        worst = float(((stored - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-30)).max())
        if relative_error(stored, truth) <= usual or worst > WORST_ROW:
            return usual
        noise = self._noise()[entry]
        if abs(size - 1) > max(usual, min(noise, BOUNDS[torch.bfloat16])):
            return usual
        by_noise = NOISE_FACTOR * noise + tolerance
        return by_noise if usual < by_noise <= WIDEST else usual


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
        bounds = Bounds(reference, ids_P, entries)
        check_embedding(head, ids_P, entries[0])
        for spec in columns:
            kept = stored_rows(shard, sample, spec.keeps)
            inside = torch.from_numpy(kept[kept < prefix]).to(reference.device)
            stored = as_states(read(spec.name, sample))[: len(inside)].to(reference.device)
            tolerance = CODECS[spec.codec].probe_allowance + slack
            layer = layer_of(spec.name)
            if layer is not None:
                error = check_layer(stored, entries, layer, bounds, tolerance)
            else:
                error = check_final(stored, entries[-1][inside], reference.norm, bounds, tolerance)
                check_logits(head, entries[-1][inside], logits_PV[inside])
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


def check_layer(
    stored_PD: Tensor, entries: Sequence[Tensor], layer: int, bounds: Bounds, tolerance: float = 0.0
) -> float:
    """Return the error of a stored layer against entry layer + 1 of `hidden_states`, which must be the closest entry.

    tolerance: as of `Bounds.of`. Raises ProofError.
    """
    right = layer + 1
    beside = [entry for entry in (layer, right, right + 1) if 0 <= entry < len(entries)]
    errors = {entry: relative_error(stored_PD, entries[entry]) for entry in beside}
    bound = bounds.of(right, stored_PD, entries[right], tolerance)
    if errors[right] <= bound and errors[right] <= min(errors.values()):  # alike where a layer passes its input on
        return errors[right]
    errors = {entry: relative_error(stored_PD, entries[entry]) for entry in range(len(entries))}
    best = min(errors, key=errors.get)
    if best == right or errors[best] > bounds.of(best, stored_PD, entries[best], tolerance):
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


def check_final(
    stored_RD: Tensor, truth_RD: Tensor, norm: Callable | None, bounds: Bounds, tolerance: float = 0.0
) -> float:
    """Return the error of stored `final` rows against the last, normed entry of `hidden_states`. Raises ProofError.

    Within a bound that was widened they must still be nearer to it than if they lacked the norm or had it twice.
    """
    error = relative_error(stored_RD, truth_RD)
    bound = bounds.of(-1, stored_RD, truth_RD, tolerance)
    if error <= BOUNDS[stored_RD.dtype] + tolerance:
        return error
    wrong = {"neither a missing nor a doubled norm explains it": error}
    if norm is not None:
        wrong["the last norm is missing"] = relative_error(norm(stored_RD), truth_RD)
        wrong["the last norm is applied twice"] = relative_error(stored_RD, norm(truth_RD))
    hint = min(wrong, key=wrong.get)
    if error <= bound and wrong[hint] == error:
        return error
    raise ProofError(
        f"probe: what is stored as `final` differs from what the LM head reads by {error:.1e}, at most {bound:.0e} "
        f"is right; {hint}; nothing of this shard was kept"
    )


def check_logits(head: TargetHead, final_RD: Tensor, truth_RV: Tensor) -> float:
    """Return the error of the stored head's logits on the reference's own `final` against its logits.

    On these the head alone can be wrong, however much noise there is in what was stored. The argmax must be equal, too,
    wherever the gap of the two largest exceeds the largest difference measured. Raises ProofError.
    """
    found_RV, truth_RV, bound = head.logits(final_RD), truth_RV.float(), BOUNDS[final_RD.dtype]
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
