"""Metrics of teacher-forced guesses, as sums that add up over cells and ranks and are divided at the very end.

N blocks   S slots
"""

import torch
from torch import Tensor


def slot_sums(correct: dict[str, Tensor], scored_NS: Tensor) -> dict[str, Tensor]:
    """Additive sums, float64: `scored_S`, `blocks` (with a scored slot), and for each kind `correct_S` and `accept`.

    correct: kind -> whether the argmax was right [N, S]; the kind "final" has bare names, "base" the prefix `base_`.
    accept sums over blocks 1 + the scored slots before the first wrong one; unscored slots are neutral,
    and the 1 is the target's own token.
    """
    counts_N = scored_NS.any(-1)
    sums = {"scored_S": scored_NS.double().sum(0), "blocks": counts_N.double().sum()}
    for kind, correct_NS in correct.items():
        prefix = "" if kind == "final" else f"{kind}_"
        right_NS = correct_NS & scored_NS
        reached_NS = (correct_NS | ~scored_NS).long().cumprod(-1).bool() & scored_NS
        sums[prefix + "correct_S"] = right_NS.double().sum(0)
        sums[prefix + "accept"] = (reached_NS.double().sum(-1) + counts_N.double()).sum()
    return sums


def metrics_of(
    sums: dict[str, Tensor], terms: dict[str, Tensor], dens: dict[str, Tensor | float]
) -> dict[str, float | list[float]]:
    """Divide summed figures: `<term>_loss`, `accuracy`, `accept_len_tf`, `slot_accuracy`, and their `base_` twins.

    Teacher-forced: not the accept length of decoding, which `pipeline/accept.py` measures. A figure without a scored
    slot is 0.
    """
    figures: dict[str, float | list[float]] = {f"{name}_loss": float(terms[name] / dens[name]) for name in terms}
    if not sums:
        return figures
    scored_S, blocks = sums["scored_S"].cpu(), float(sums["blocks"])
    for prefix in ("", "base_"):
        if prefix + "correct_S" in sums:
            correct_S = sums[prefix + "correct_S"].cpu()
            figures[prefix + "accuracy"] = float(correct_S.sum() / scored_S.sum().clamp(min=1))
            figures[prefix + "accept_len_tf"] = float(sums[prefix + "accept"]) / max(blocks, 1.0)
            figures[prefix + "slot_accuracy"] = (correct_S / torch.clamp(scored_S, min=1)).tolist()
    return figures
