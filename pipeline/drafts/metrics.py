"""Metrics of teacher-forced guesses, as sums that add up over cells and ranks and are divided at the very end.

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


def slot_sums(noted: dict[str, Tensor], scored_NS: Tensor) -> dict[str, Tensor]:
    """Additive sums, float64, of what an objective noted of each slot [N, S].

    `scored_S`, `blocks` (with a scored slot); for each kind of logits, "final" with bare names and "base" with the
    prefix `base_`, `correct_S`, `ce_S` and `accept`, which sums over blocks 1 + the scored slots before the first
    wrong one; unscored slots are neutral, and the 1 is the target's own token. Against the target's distribution also
    `chance` (of `accept`, as rejection sampling has it), `tau` and the sums of MEANS.
    """
    counts_N = scored_NS.any(-1)
    sums = {"scored_S": scored_NS.double().sum(0), "blocks": counts_N.double().sum()}
    for prefix in ("", "base_"):
        if prefix + "correct" in noted:
            correct_NS = noted[prefix + "correct"]
            right_NS = correct_NS & scored_NS
            reached_NS = (correct_NS | ~scored_NS).long().cumprod(-1).bool() & scored_NS
            sums[prefix + "correct_S"] = right_NS.double().sum(0)
            sums[prefix + "accept"] = (reached_NS.double().sum(-1) + counts_N.double()).sum()
        if prefix + "ce" in noted:
            sums[prefix + "ce_S"] = (noted[prefix + "ce"].double() * scored_NS).sum(0)
    if "accept" in noted:
        sums |= {"chance": (noted["accept"].double() * scored_NS).sum(), "tau": _tau(noted["accept"], scored_NS)}
    for name in ("agree", "teacher_top1", "draft_top1"):
        if name in noted:
            sums[name] = (noted[name].double() * scored_NS).sum()
    return sums


def _tau(accept_NS: Tensor, scored_NS: Tensor) -> Tensor:
    """Sum over blocks of 1 + the expected number of proposals kept, were each drawn from the draft's distribution."""
    reach_NS = torch.where(scored_NS, accept_NS.double(), 1.0).cumprod(-1)
    return (reach_NS * scored_NS).sum() + scored_NS.any(-1).sum()


def confidence_sums(logits_NS: Tensor, accept_NS: Tensor, weights_NS: Tensor) -> dict[str, Tensor]:
    """`confidence_error`: how far the confidence head is from the probability it is to tell, weighted as its loss is
    (SpecForge and DeepSpec do), and `confidence_weight`, the weights' sum."""
    error_NS = (logits_NS.sigmoid() - accept_NS).abs().double()
    return {"confidence_error": (error_NS * weights_NS).sum(), "confidence_weight": weights_NS.double().sum()}


def metrics_of(
    sums: dict[str, Tensor], terms: dict[str, Tensor], dens: dict[str, Tensor | float]
) -> dict[str, float | list[float]]:
    """Divide summed figures: `<term>_loss`, `accuracy`, `accept_len_tf`, `slot_accuracy`, `slot_ce` and their `base_`
    twins; `tau_probabilistic`, `confidence_abs_error` and the figures of MEANS.

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
    found = {figure: name for figure, name in MEANS.items() if name in sums}
    return figures | {figure: float(sums[name]) / max(float(scored_S.sum()), 1.0) for figure, name in found.items()}
