"""Objectives: losses of a draft's logits against the label, the target's own distribution, or both; and the metrics
of teacher-forced predictions, as sums that add up over cells and ranks and are divided at the very end.

q is the draft's softmax at a slot, y the label there, and p the target's softmax, from its final state at the row
before the label. All in float32 or wider. A slot has three distances:

    ce = -log q_y      kl = sum_v p_v log(p_v / q_v)      accept = sum_v min(p_v, q_v)

`accept` is the probability that rejection sampling keeps a token drawn from q (Leviathan et al., arXiv:2211.17192,
corollary 3.6), and 1 - accept the total variation. Every objective is a function of the three, so its gradient with
respect to the logits x follows from theirs:

    d ce / d x = q - 1_y      d kl / d x = q - p      d accept / d x = q (b - sum_v q_v b_v),  b = [q < p], 1/2 if equal

    ce         ce
    kl         kl: forward KL to the target, as Model-Optimizer and speculators distil block drafts
    tv         1 - accept (DistillSpec, arXiv:2310.08461)
    lk-alpha   -log accept (LK losses, arXiv:2602.23881)
    lk-hybrid  w kl + (1 - w) (1 - accept), w = exp(-3 accept) of each slot, without gradient (the same; slot by slot
               and with 3 as in speculators' `lk_hybrid`, where SpecForge's EAGLE-3 takes w of the batch's mean)
    dspark     alpha_ce ce + alpha_l1 sum_v |q_v - p_v|, the latter 2 (1 - accept) (DSpark, arXiv:2607.05147)

    N blocks   n blocks of a chunk   S slots   X slots of a chunk   D hidden size   F states kept   V vocabulary
    U rank of a correction
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.drafts.fused import compiles, cross_entropy, overwrite_with_gradient
from pipeline.target.head import TargetHead
from pipeline.tensors import at_least_float32

if TYPE_CHECKING:
    from pipeline.drafts.head_loss import ChunkMemory

ETA = 3.0  # of lk-hybrid: the paper's best
# Metrics that are means over scored slots, and what is recorded of each slot for them. accept_prob: as rejection
# sampling has it.
MEANS = {"accept_prob": "accept", "teacher_agreement": "agree"}
MEANS |= {"teacher_top1": "teacher_top1", "draft_top1": "draft_top1"}


@dataclass(frozen=True)
class LossTerm:
    """One term of an objective, a function of a slot's distances.

    reads: the distances it depends on. value_and_slopes: from the distances [n, S] to the term's value [n, S] and its
    derivative with respect to each of them. weight: its weight, unless the config has a field alpha_NAME for it.
    """

    reads: tuple[str, ...]
    value_and_slopes: Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, Tensor | float]]]
    weight: float = 1.0


def _negative_log(distances: dict[str, Tensor]) -> tuple[Tensor, dict]:
    # In float32 a fresh draft over 150,000 tokens has 1e-5 here: any floor but the smallest number would stop it.
    accept_NS = distances["accept"].clamp(min=torch.finfo(distances["accept"].dtype).tiny)
    return -accept_NS.log(), {"accept": -1 / accept_NS}


def _hybrid(distances: dict[str, Tensor]) -> tuple[Tensor, dict]:
    share_NS = torch.exp(-ETA * distances["accept"])
    value_NS = share_NS * distances["kl"] + (1 - share_NS) * (1 - distances["accept"])
    return value_NS, {"kl": share_NS, "accept": share_NS - 1}


CE = LossTerm(("ce",), lambda distances: (distances["ce"], {"ce": 1.0}))
L1 = LossTerm(("accept",), lambda distances: (2 * (1 - distances["accept"]), {"accept": -2.0}), weight=0.9)
# Adding an objective is one entry: its terms by name, "" where there is only one.
OBJECTIVES: dict[str, dict[str, LossTerm]] = {
    "ce": {"": CE},
    "kl": {"": LossTerm(("kl",), lambda distances: (distances["kl"], {"kl": 1.0}))},
    "tv": {"": LossTerm(("accept",), lambda distances: (1 - distances["accept"], {"accept": -1.0}))},
    "lk-alpha": {"": LossTerm(("accept",), _negative_log)},
    "lk-hybrid": {"": LossTerm(("kl", "accept"), _hybrid)},
    "dspark": {"ce": replace(CE, weight=0.1), "l1": L1},
}


def term_name(kind: str, part: str) -> str:
    """Return a term's name in the metrics: the kind of logits for a single term, else the term's own, prefixed."""
    if not part:
        return kind
    return part if kind == "final" else f"{kind}_{part}"


@dataclass(frozen=True)
class TargetStates:
    """The target's final states. A loss that reads a missing one is NaN."""

    final_FD: Tensor
    at_NS: Tensor  # each slot's index in final_FD, -1 where it is missing

    def states(self, part: slice) -> Tensor:
        """Return the states [n, S, D] of a chunk's slots."""
        at_NS = self.at_NS[part]
        return self.final_FD[at_NS.clamp(min=0)].masked_fill((at_NS < 0)[..., None], float("nan"))


@dataclass(frozen=True)
class SoftLabels:
    """The target's distribution (soft labels) at the slots of one chunk."""

    p_NSV: Tensor
    negentropy_NS: Tensor | None  # sum of p log p, where kl is computed


@dataclass(frozen=True)
class Measured:
    """What a chunk's loss and gradient are made of: the distances [n, S] that are read, and the draft's softmax, or the
    logarithm of its sum."""

    distances: dict[str, Tensor]
    q_NSV: Tensor | None = None
    log_sum_NS: Tensor | None = None


@dataclass
class Objective:
    """The loss of one or more kinds of logits against the same labels and target states, accumulated over chunks.

    weigh: (slice of the blocks, ce [n, S]) -> weights [n, S], fixed or from the draft's own confidence. scales: for
    each kind of logits and each term, weight / global denominator. record_accept: record `accept` also where the
    objective does not read it. After the chunks, `numerators` holds sum(weight * value) of each term, and
    `slot_values()` returns what was recorded for every slot.
    """

    labels_NS: Tensor
    weigh: Callable[[slice, Tensor], Tensor]
    scales: dict[str, dict[str, float | Tensor]]
    name: str = "ce"
    target_states: TargetStates | None = None
    record_accept: bool = False
    metrics: bool = False
    numerators: dict[str, Tensor] = field(default_factory=dict)
    per_slot: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def reads(self) -> set[str]:
        """The distances that must be computed."""
        parts = {part for scales in self.scales.values() for part in scales}
        wanted = {distance for part in parts for distance in OBJECTIVES[self.name][part].reads}
        soft = self.target_states is not None and (self.record_accept or self.metrics)
        return wanted | ({"accept"} if soft else set())

    def slot_values(self) -> dict[str, Tensor]:
        """Return what was recorded for every slot, [N, S] each."""
        return {name: torch.cat(parts) for name, parts in self.per_slot.items()}

    def soft_labels(self, part: slice, head: TargetHead, memory: "ChunkMemory") -> SoftLabels | None:
        """Return the target's distribution at a chunk's slots, None where no distance reads it."""
        if not self.reads & {"kl", "accept"}:
            return None
        logits_NSV = head.logits(self.target_states.states(part))
        p_NSV = memory.take("p", logits_NSV.shape)
        if "kl" not in self.reads:
            return SoftLabels(torch.softmax(logits_NSV, -1, out=p_NSV), None)
        log_p_NSV = logits_NSV.log_softmax(-1)
        torch.exp(log_p_NSV, out=p_NSV)
        return SoftLabels(p_NSV, log_p_NSV.mul_(p_NSV).sum(-1))

    def measure(
        self, kind: str, part: slice, logits_NSV: Tensor, memory: "ChunkMemory", soft: SoftLabels | None = None
    ) -> Measured:
        """Return one chunk's distances [n, S], those that are read, and q [n, S, V], which may overwrite the logits.

        With compiled kernels cross-entropy alone needs no q: its gradient is computed from the logits.
        """
        labels_NS = self.labels_NS[part]
        if self.metrics:
            self._record_predictions(kind, labels_NS, logits_NSV, soft)
        if self.reads == {"ce"} and compiles(logits_NSV.device):
            ce_NS, log_sum_NS = cross_entropy(logits_NSV, labels_NS)
            return Measured({"ce": ce_NS}, log_sum_NS=log_sum_NS)
        label_NS1 = labels_NS[..., None]
        if "kl" in self.reads:
            log_q_NSV = memory.softmax(logits_NSV, torch.log_softmax)
            # Not vecdot, which autocast would compute in bfloat16.
            product_NSV = torch.mul(soft.p_NSV, log_q_NSV, out=memory.take("product", logits_NSV.shape))
            distances = {"ce": -log_q_NSV.gather(-1, label_NS1)[..., 0]}
            distances["kl"] = soft.negentropy_NS - product_NSV.sum(-1)
            q_NSV = log_q_NSV.exp_()
        else:
            # -log q_y by way of the likeliest token: a q_y below the smallest number has a logarithm, too.
            wide = at_least_float32(logits_NSV.dtype)
            below_NS = logits_NSV.amax(-1).to(wide) - logits_NSV.gather(-1, label_NS1)[..., 0].to(wide)
            q_NSV = memory.softmax(logits_NSV)
            distances = {"ce": below_NS - q_NSV.amax(-1).log()}
        if "accept" in self.reads:
            least_NSV = torch.minimum(soft.p_NSV, q_NSV, out=memory.take("product", q_NSV.shape))
            distances["accept"] = least_NSV.sum(-1).clamp(max=1)
        return Measured(distances, q_NSV)

    def add_chunk(
        self,
        kind: str,
        part: slice,
        logits_NSV: Tensor,
        measured: Measured,
        memory: "ChunkMemory",
        soft: SoftLabels | None = None,
        want_grad: bool = True,
    ) -> None:
        """Add one chunk's loss, of what `measure` returned, and overwrite the logits with the gradient of `total()`."""
        labels_NS, distances = self.labels_NS[part], measured.distances
        weights_NS = self.weigh(part, distances["ce"]).to(distances["ce"].dtype)
        self._record(kind, {"weights": weights_NS, **distances})
        distance_grads: dict[str, Tensor] = {}
        for name, scale in self.scales[kind].items():
            value_NS, slopes = OBJECTIVES[self.name][name].value_and_slopes(distances)
            key = term_name(kind, name)
            self.numerators[key] = self.numerators.get(key, 0) + (weights_NS * value_NS).sum()
            for distance, slope in slopes.items():
                distance_grads[distance] = distance_grads.get(distance, 0) + weights_NS * scale * slope
        if not want_grad:
            return
        if measured.log_sum_NS is not None:
            overwrite_with_gradient(logits_NSV, labels_NS, measured.log_sum_NS, distance_grads["ce"])
        else:
            _write_gradient(logits_NSV, measured.q_NSV, labels_NS, soft, distance_grads, memory)

    def _record_predictions(self, kind: str, labels_NS: Tensor, logits_NSV: Tensor, soft: SoftLabels | None) -> None:
        choice_NS = logits_NSV.argmax(-1)
        values = {"correct": choice_NS == labels_NS}
        if soft is not None:
            top, wide_NSV = soft.p_NSV.max(-1), logits_NSV.to(soft.p_NSV.dtype)
            values |= {"agree": choice_NS == top.indices, "teacher_top1": top.values}
            values["draft_top1"] = torch.exp(wide_NSV.amax(-1) - wide_NSV.logsumexp(-1))
        self._record(kind, values)

    def _record(self, kind: str, values: dict[str, Tensor]) -> None:
        for name, value_NS in values.items():
            self.per_slot.setdefault(term_name(kind, name), []).append(value_NS)

    def total(self) -> Tensor:
        """Return the loss so far: the sum over kinds and terms of scale * numerator."""
        scales = {term_name(kind, part): scale for kind, parts in self.scales.items() for part, scale in parts.items()}
        return sum(scales[key] * numerator for key, numerator in self.numerators.items())


def _write_gradient(
    out_NSV: Tensor,
    q_NSV: Tensor,
    labels_NS: Tensor,
    soft: SoftLabels | None,
    distance_grads: dict[str, Tensor],
    memory: "ChunkMemory",
) -> None:
    """Write the sum over distances of distance_grads [n, S] * gradient of the distance by the logits. Overwrites q."""
    label_NS1 = labels_NS[..., None]
    of_NS1 = {distance: grad_NS[..., None] for distance, grad_NS in distance_grads.items()}
    if of_NS1.keys() == {"ce"}:
        label_grad_NS1 = of_NS1["ce"] * (q_NSV.gather(-1, label_NS1) - 1)
        memory.multiply(q_NSV, of_NS1["ce"], out_NSV)
        # Not scatter_: on a CPU it converts all of a bfloat16 tensor there and back.
        of_slot_X = torch.arange(labels_NS.numel(), device=labels_NS.device)
        out_NSV.view(-1, out_NSV.shape[-1])[of_slot_X, labels_NS.flatten()] = label_grad_NS1.flatten().to(out_NSV.dtype)
        return
    along_NS1, grad_NSV = sum(of_NS1[distance] for distance in ("ce", "kl") if distance in of_NS1), q_NSV
    if "accept" in of_NS1:
        # 2 b from {0, 1, 2}, not the sign from {-1, 0, 1}: its mean under q is small at first and would cancel. Not
        # torch.heaviside: on a CPU it takes longer than the head's multiplication at width 256, this an eighth of that.
        gain_NSV = torch.sub(soft.p_NSV, q_NSV, out=memory.take("product", q_NSV.shape)).sign_().add_(1).mul_(q_NSV)
        along_NS1 = along_NS1 - of_NS1["accept"] / 2 * gain_NSV.sum(-1, keepdim=True)
        grad_NSV = gain_NSV.mul_(of_NS1["accept"] / 2).addcmul_(q_NSV, along_NS1)
    else:
        q_NSV.mul_(along_NS1)
    if "kl" in of_NS1:
        grad_NSV.addcmul_(soft.p_NSV, of_NS1["kl"], value=-1)
    if "ce" in of_NS1:
        grad_NSV.scatter_add_(-1, label_NS1, -of_NS1["ce"])
    out_NSV.copy_(grad_NSV)


def slot_sums(per_slot: dict[str, Tensor], scored_NS: Tensor) -> dict[str, Tensor]:
    """Return additive sums, float64, of what an objective recorded for each slot [N, S].

    `scored_S`, `blocks` (those with a scored slot); for each kind of logits, "final" without a prefix and "base" with
    the prefix `base_`, `correct_S`, `ce_S` and `accept`, which sums over blocks 1 + the scored slots before the first
    wrong one; unscored slots are skipped, and the 1 is the target's own token. Against the target's distribution also
    the sums of MEANS and `tau`, which sums over blocks 1 + the expected number of accepted proposals, were each sampled
    from the draft.
    """
    blocks = scored_NS.any(-1).double().sum()
    sums = {"scored_S": scored_NS.double().sum(0), "blocks": blocks}
    for prefix in ("", "base_"):
        if prefix + "correct" in per_slot:
            correct_NS = per_slot[prefix + "correct"]
            reached_NS = (correct_NS | ~scored_NS).long().cumprod(-1).bool() & scored_NS
            sums[prefix + "correct_S"] = (correct_NS & scored_NS).double().sum(0)
            sums[prefix + "accept"] = reached_NS.double().sum() + blocks
        if prefix + "ce" in per_slot:
            sums[prefix + "ce_S"] = (per_slot[prefix + "ce"].double() * scored_NS).sum(0)
    if "accept" in per_slot:
        reach_NS = torch.where(scored_NS, per_slot["accept"].double(), 1.0).cumprod(-1)
        sums["tau"] = (reach_NS * scored_NS).sum() + blocks
    means = {figure: name for figure, name in MEANS.items() if name in per_slot}
    return sums | {figure: (per_slot[name].double() * scored_NS).sum() for figure, name in means.items()}


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
    scored = max(float(scored_S.sum()), 1.0)
    return figures | {figure: float(sums[figure]) / scored for figure in MEANS if figure in sums}
