"""Metrics of teacher-forced predictions, as sums that add up over cells and ranks and are divided at the very end.

N blocks   S slots
"""

import torch
from torch import Tensor

# Means over scored slots: the figure's name -> the sum's.
MEANS = {
    "accept_prob": "chance",
    "teacher_agreement": "agree",
    "teacher_top1": "teacher_top1",
    "draft_top1": "draft_top1",
}


def slot_sums(per_slot: dict[str, Tensor], scored_NS: Tensor) -> dict[str, Tensor]:
    """Return additive sums, float64, of what an objective recorded for each slot [N, S].

    `scored_S`, `blocks` (those with a scored slot); for each kind of logits, "final" without a prefix and "base" with
    the prefix `base_`, `correct_S`, `ce_S` and `accept`, which sums over blocks 1 + the scored slots before the first
    wrong one; unscored slots are skipped, and the 1 is the target's own token. Against the target's distribution also
    `chance` (of acceptance, as rejection sampling has it), `tau` and the sums of MEANS.
    """
    counts_N = scored_NS.any(-1)
    sums = {"scored_S": scored_NS.double().sum(0), "blocks": counts_N.double().sum()}
    for prefix in ("", "base_"):
        if prefix + "correct" in per_slot:
            correct_NS = per_slot[prefix + "correct"]
            right_NS = correct_NS & scored_NS
            reached_NS = (correct_NS | ~scored_NS).long().cumprod(-1).bool() & scored_NS
            sums[prefix + "correct_S"] = right_NS.double().sum(0)
            sums[prefix + "accept"] = (reached_NS.double().sum(-1) + counts_N.double()).sum()
        if prefix + "ce" in per_slot:
            sums[prefix + "ce_S"] = (per_slot[prefix + "ce"].double() * scored_NS).sum(0)
    if "accept" in per_slot:
        sums |= {"chance": (per_slot["accept"].double() * scored_NS).sum(), "tau": _tau(per_slot["accept"], scored_NS)}
    for name in ("agree", "teacher_top1", "draft_top1"):
        if name in per_slot:
            sums[name] = (per_slot[name].double() * scored_NS).sum()
    return sums


def _tau(accept_NS: Tensor, scored_NS: Tensor) -> Tensor:
    """Return the sum over blocks of 1 + the expected number of accepted proposals, were each sampled from the draft."""
    reach_NS = torch.where(scored_NS, accept_NS.double(), 1.0).cumprod(-1)
    return (reach_NS * scored_NS).sum() + scored_NS.any(-1).sum()


def confidence_sums(logits_NS: Tensor, accept_NS: Tensor, weights_NS: Tensor) -> dict[str, Tensor]:
    """Return `confidence_error`, the absolute error of the confidence head weighted as its loss is (as SpecForge and
    DeepSpec do), and `confidence_weight`, the weights' sum."""
    error_NS = (logits_NS.sigmoid() - accept_NS).abs().double()
    return {"confidence_error": (error_NS * weights_NS).sum(), "confidence_weight": weights_NS.double().sum()}


def metrics_of(
    sums: dict[str, Tensor], terms: dict[str, Tensor], dens: dict[str, Tensor | float]
) -> dict[str, float | list[float]]:
    """Return the metrics from summed figures: `<term>_loss`, `accuracy`, `accept_len_tf`, `slot_accuracy`, `slot_ce`,
    the last four also of the base logits with the prefix `base_`; `tau_probabilistic`, `confidence_abs_error` and the
    figures of MEANS.

    Teacher-forced: not the accept length of decoding, which `evaluation/accept_length.py` measures. A figure without a
    scored slot is 0.
    """
    figures: dict[str, float | list[float]] = {f"{name}_loss": float(terms[name] / dens[name]) for name in terms}
    if not sums:
        return figures
    scored_S, blocks = sums["scored_S"].cpu(), max(float(sums["blocks"]), 1.0)
    for prefix in ("", "base_"):
        if prefix + "correct_S" in sums:
            correct_S = sums[prefix + "correct_S"].cpu()
            figures[prefix + "accuracy"] = float(correct_S.sum() / scored_S.sum().clamp(min=1))
            figures[prefix + "accept_len_tf"] = float(sums[prefix + "accept"]) / blocks
            figures[prefix + "slot_accuracy"] = (correct_S / scored_S.clamp(min=1)).tolist()
        if prefix + "ce_S" in sums:
            figures[prefix + "slot_ce"] = (sums[prefix + "ce_S"].cpu() / scored_S.clamp(min=1)).tolist()
    if "tau" in sums:
        figures["tau_probabilistic"] = float(sums["tau"]) / blocks
    if "confidence_error" in sums:
        weight = float(sums["confidence_weight"])
        figures["confidence_abs_error"] = float(sums["confidence_error"]) / weight if weight else 0.0
    means = {figure: name for figure, name in MEANS.items() if name in sums}
    return figures | {figure: float(sums[name]) / max(float(scored_S.sum()), 1.0) for figure, name in means.items()}
