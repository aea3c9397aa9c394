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

The LM head is fused with its loss, a chunk of blocks at a time, the gradient computed in the forward (`HeadLoss`).
Logits over the vocabulary are the largest tensors of training: they exist for one chunk only, and are overwritten with
their gradient there. So the head costs two matrix products, where checkpointing costs three. Corrected logits are one
concatenated linear, [W_head | W_out] [h ; z]; base and corrected loss share the chunk's logits and the target's own.

    N blocks   n blocks of a chunk   S slots   X slots of a chunk   D hidden size   F states kept   V vocabulary
    U rank of a correction
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.target.head import TargetHead
from pipeline.tensors import at_least_float32

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

    def soft_labels(self, part: slice, head: TargetHead) -> SoftLabels | None:
        """Return the target's distribution at a chunk's slots, None where no distance reads it."""
        if not self.reads & {"kl", "accept"}:
            return None
        log_p_NSV = head.logits(self.target_states.states(part)).log_softmax(-1)
        if "kl" not in self.reads:
            return SoftLabels(log_p_NSV.exp_(), None)
        p_NSV = log_p_NSV.exp()
        return SoftLabels(p_NSV, log_p_NSV.mul_(p_NSV).sum(-1))

    def add_chunk(
        self, kind: str, part: slice, logits_NSV: Tensor, want_grad: bool, soft: SoftLabels | None = None
    ) -> Tensor | None:
        """Add one chunk's loss; return the gradient of `total()` with respect to its logits."""
        labels_NS = self.labels_NS[part]
        if self.metrics:
            self._record_predictions(kind, labels_NS, logits_NSV, soft)
        distances, q_NSV = self._measure(logits_NSV.log_softmax(-1), labels_NS, soft)
        weights_NS = self.weigh(part, distances["ce"]).to(q_NSV.dtype)
        self._record(kind, {"weights": weights_NS, **distances})
        distance_grads: dict[str, Tensor] = {}
        for name, scale in self.scales[kind].items():
            value_NS, slopes = OBJECTIVES[self.name][name].value_and_slopes(distances)
            key = term_name(kind, name)
            self.numerators[key] = self.numerators.get(key, 0) + (weights_NS * value_NS).sum()
            for distance, slope in slopes.items():
                distance_grads[distance] = distance_grads.get(distance, 0) + weights_NS * scale * slope
        if not want_grad:
            return None
        q_NSV = q_NSV.exp_() if soft is None else q_NSV
        return _gradient(q_NSV, labels_NS, soft, distance_grads)

    def _measure(self, log_q_NSV: Tensor, labels_NS: Tensor, soft: SoftLabels | None) -> tuple[dict, Tensor]:
        """Return the distances [n, S] that are read, and log q [n, S, V], or q in its place with soft labels."""
        distances = {"ce": -log_q_NSV.gather(-1, labels_NS[..., None])[..., 0]}
        if soft is None:
            return distances, log_q_NSV
        if "kl" in self.reads:
            # Not vecdot, which autocast would compute in bfloat16.
            distances["kl"] = soft.negentropy_NS - (soft.p_NSV * log_q_NSV).sum(-1)
        q_NSV = log_q_NSV.exp_()
        if "accept" in self.reads:
            distances["accept"] = torch.minimum(soft.p_NSV, q_NSV).sum(-1).clamp(max=1)
        return distances, q_NSV

    def _record_predictions(self, kind: str, labels_NS: Tensor, logits_NSV: Tensor, soft: SoftLabels | None) -> None:
        choice_NS = logits_NSV.argmax(-1)
        values = {"correct": choice_NS == labels_NS}
        if soft is not None:
            top = soft.p_NSV.max(-1)
            values |= {"agree": choice_NS == top.indices, "teacher_top1": top.values}
            values["draft_top1"] = torch.exp(logits_NSV.amax(-1) - logits_NSV.logsumexp(-1))
        self._record(kind, values)

    def _record(self, kind: str, values: dict[str, Tensor]) -> None:
        for name, value_NS in values.items():
            self.per_slot.setdefault(term_name(kind, name), []).append(value_NS)

    def total(self) -> Tensor:
        """Return the loss so far: the sum over kinds and terms of scale * numerator."""
        scales = {term_name(kind, part): scale for kind, parts in self.scales.items() for part, scale in parts.items()}
        return sum(scales[key] * numerator for key, numerator in self.numerators.items())


def _gradient(q_NSV: Tensor, labels_NS: Tensor, soft: SoftLabels | None, distance_grads: dict[str, Tensor]) -> Tensor:
    """Return the sum over distances of distance_grads [n, S] * gradient of the distance by the logits. Overwrites q."""
    toward_q = [distance_grads[distance] for distance in ("ce", "kl") if distance in distance_grads]
    if "accept" in distance_grads:
        # b from {0, 1}, not the sign from {-1, 1}: its mean under q is small at first and would cancel. Not
        # torch.heaviside: on a CPU it takes longer than the head's multiplication at width 256, this an eighth of that.
        gain_NSV = (soft.p_NSV - q_NSV).sign_().add_(1).mul_(0.5)
        gain_NSV.sub_((q_NSV * gain_NSV).sum(-1, keepdim=True)).mul_(distance_grads["accept"][..., None])
        if toward_q:
            gain_NSV.add_(sum(toward_q)[..., None])
        grad_NSV = gain_NSV.mul_(q_NSV)
    else:
        grad_NSV = q_NSV.mul_(sum(toward_q)[..., None])
    if "kl" in distance_grads:
        grad_NSV.addcmul_(soft.p_NSV, distance_grads["kl"][..., None], value=-1)
    if "ce" in distance_grads:
        grad_NSV.scatter_add_(-1, labels_NS[..., None], -distance_grads["ce"][..., None])
    return grad_NSV


class HeadLoss(torch.autograd.Function):
    """The total loss (scalar) of the head's logits; its gradients are computed when `apply` returns.

        HeadLoss.apply(hidden_NSD, z_NSU, out_VU, target, objective, blocks)

    The objective scores the kinds of logits that it has scales for, after the soft cap: "base" = head(hidden) and
    "final" = [head | W_out] [hidden ; z]. Without a correction (z and W_out None) final is head(hidden). The target's
    weights get no gradient. blocks: how many blocks have their logits in memory at once.
    """

    @staticmethod
    def forward(ctx, hidden_NSD, z_NSU, out_VU, target: TargetHead, objective: Objective, blocks: int) -> Tensor:
        dtype, corrected = target.head_VD.dtype, z_NSU is not None
        want_grad = any(ctx.needs_input_grad[:2])  # not W_out's, which is a parameter also where nothing is learned
        d_hidden = torch.empty_like(hidden_NSD) if want_grad else None
        d_z = torch.empty_like(z_NSU) if want_grad and corrected else None
        d_out = torch.zeros_like(out_VU, dtype=at_least_float32(out_VU.dtype)) if d_z is not None else None
        head_out_VU = out_VU.to(dtype) if corrected else None
        for first in range(0, len(hidden_NSD), blocks):
            part = slice(first, first + blocks)
            shape = hidden_NSD[part].shape[:2]
            raw = {"base": hidden_NSD[part].flatten(0, 1).to(dtype) @ target.head_VD.T}  # [X, V] each
            z_XU = z_NSU[part].flatten(0, 1).to(dtype) if corrected else None
            raw["final"] = torch.addmm(raw["base"], z_XU, head_out_VU.T) if corrected else raw["base"]
            soft, d_raw = objective.soft_labels(part, target), {}
            for kind in [kind for kind in raw if kind in objective.scales]:
                logits_NSV = target.cap(raw[kind].to(at_least_float32(raw[kind].dtype))).unflatten(0, shape)
                d_NSV = objective.add_chunk(kind, part, logits_NSV, want_grad, soft)
                if want_grad:
                    if target.logit_softcap is not None:
                        d_NSV = d_NSV * (1 - (logits_NSV / target.logit_softcap) ** 2)
                    d_raw[kind] = d_NSV.flatten(0, 1).to(raw[kind].dtype)
                del logits_NSV, d_NSV
            if want_grad:
                d_sum_XV = d_raw["base"] + d_raw["final"] if "base" in d_raw else d_raw["final"]
                d_hidden[part] = (d_sum_XV @ target.head_VD).unflatten(0, shape)
                del d_sum_XV
            if d_z is not None:
                d_z[part] = (d_raw["final"] @ head_out_VU).unflatten(0, shape)
                d_out += d_raw["final"].T @ z_XU
            del raw, soft, d_raw  # before the next chunk's are made
        ctx.save_for_backward(d_hidden, d_z, None if d_out is None else d_out.to(out_VU.dtype))
        return objective.total()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grads = (None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return *grads, None, None, None


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
