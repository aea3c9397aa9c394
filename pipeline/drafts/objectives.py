"""What a draft's logits are pulled to: the label, the target's own distribution, or both.

q is the draft's softmax at a slot, y the label there, and p the target's softmax: its head on the final state it had at
the row before the label. All in float32 at least. A slot has three distances:

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

    N blocks   n blocks of a chunk   S slots   D hidden size   F states kept   V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.drafts.config import DraftConfig
from pipeline.target.head import TargetHead

ETA = 3.0  # of lk-hybrid: the paper's best


@dataclass(frozen=True)
class Formula:
    """One term of an objective: the distances it reads; from them its value [n, S] and its slope by each of them."""

    reads: tuple[str, ...]
    of: Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, Tensor | float]]]


def _negative_log(distances: dict[str, Tensor]) -> tuple[Tensor, dict]:
    # In float32 a fresh draft over 150,000 tokens has 1e-5 here: any floor but the smallest number would stop it.
    accept_NS = distances["accept"].clamp(min=torch.finfo(distances["accept"].dtype).tiny)
    return -accept_NS.log(), {"accept": -1 / accept_NS}


def _hybrid(distances: dict[str, Tensor]) -> tuple[Tensor, dict]:
    share_NS = torch.exp(-ETA * distances["accept"])
    value_NS = share_NS * distances["kl"] + (1 - share_NS) * (1 - distances["accept"])
    return value_NS, {"kl": share_NS, "accept": share_NS - 1}


CE = Formula(("ce",), lambda distances: (distances["ce"], {"ce": 1.0}))
L1 = Formula(("accept",), lambda distances: (2 * (1 - distances["accept"]), {"accept": -2.0}))
OBJECTIVES: dict[str, dict[str, Formula]] = {
    "ce": {"": CE},
    "kl": {"": Formula(("kl",), lambda distances: (distances["kl"], {"kl": 1.0}))},
    "tv": {"": Formula(("accept",), lambda distances: (1 - distances["accept"], {"accept": -1.0}))},
    "lk-alpha": {"": Formula(("accept",), _negative_log)},
    "lk-hybrid": {"": Formula(("kl", "accept"), _hybrid)},
    "dspark": {"ce": CE, "l1": L1},
}


def parts_of(config: DraftConfig) -> dict[str, float]:
    """The terms of the configured objective that weigh something, with their weights."""
    if config.objective != "dspark":
        return {"": 1.0}
    return {name: weight for name, weight in {"ce": config.alpha_ce, "l1": config.alpha_l1}.items() if weight}


def term(kind: str, part: str) -> str:
    """The name of a term in logs: the kind of logits where it has one term only, else the term, as metrics name it."""
    if not part:
        return kind
    return part if kind == "final" else f"{kind}_{part}"


@dataclass(frozen=True)
class Teacher:
    """Where the target's final state of each slot is. at_NS: -1 where it is missing, which makes the loss NaN."""

    final_FD: Tensor
    at_NS: Tensor

    def states(self, part: slice) -> Tensor:
        at_NS = self.at_NS[part]
        return self.final_FD[at_NS.clamp(min=0)].masked_fill((at_NS < 0)[..., None], float("nan"))


@dataclass(frozen=True)
class Soft:
    """The target's distribution at the slots of one chunk."""

    p_NSV: Tensor
    negentropy_NS: Tensor | None  # sum of p log p, where kl is wanted


@dataclass
class Objective:
    """The losses of one or more kinds of logits against the same labels and the same teacher, added up over chunks.

    weigh: (blocks of the chunk, ce) -> weights [n, S], from outside or by the draft's own confidence.
    scales: for each kind of logits and each term of the objective, weight / global denominator. accepts: note
    `accept` also where the objective does not read it. After the chunks, `numerators` holds sum(weight * value) for
    each term, and `slots()` returns what was noted of every slot.
    """

    labels_NS: Tensor
    weigh: Callable[[slice, Tensor], Tensor]
    scales: dict[str, dict[str, float | Tensor]]
    name: str = "ce"
    teacher: Teacher | None = None
    accepts: bool = False
    metrics: bool = False
    numerators: dict[str, Tensor] = field(default_factory=dict)
    noted: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def reads(self) -> set[str]:
        """The distances that are computed."""
        parts = {part for scales in self.scales.values() for part in scales}
        wanted = {distance for part in parts for distance in OBJECTIVES[self.name][part].reads}
        soft = self.teacher is not None and (self.accepts or self.metrics)
        return wanted | ({"accept"} if soft else set())

    def slots(self) -> dict[str, Tensor]:
        """What was noted of every slot, [N, S] each."""
        return {name: torch.cat(parts) for name, parts in self.noted.items()}

    def soft(self, part: slice, head: TargetHead) -> Soft | None:
        """The target's distribution at a chunk's slots, where it is read."""
        if not self.reads & {"kl", "accept"}:
            return None
        log_p_NSV = head.logits(self.teacher.states(part)).log_softmax(-1)
        if "kl" not in self.reads:
            return Soft(log_p_NSV.exp_(), None)
        p_NSV = log_p_NSV.exp()
        return Soft(p_NSV, log_p_NSV.mul_(p_NSV).sum(-1))

    def chunk(
        self, kind: str, part: slice, logits_NSV: Tensor, want_grad: bool, soft: Soft | None = None
    ) -> Tensor | None:
        """Add one chunk; return the gradient of the scaled sum with respect to its logits."""
        labels_NS = self.labels_NS[part]
        if self.metrics:
            self._note_choices(kind, labels_NS, logits_NSV, soft)
        distances, q_NSV = self._measure(logits_NSV, labels_NS, soft)
        weights_NS = self.weigh(part, distances["ce"]).to(q_NSV.dtype)
        self._note(kind, {"weights": weights_NS, **distances})
        pulls: dict[str, Tensor] = {}
        for name, scale in self.scales[kind].items():
            value_NS, slopes = OBJECTIVES[self.name][name].of(distances)
            key = term(kind, name)
            self.numerators[key] = self.numerators.get(key, 0) + (weights_NS * value_NS).sum()
            for distance, slope in slopes.items():
                pulls[distance] = pulls.get(distance, 0) + weights_NS * scale * slope
        if not want_grad:
            return None
        q_NSV = q_NSV.exp_() if soft is None else q_NSV
        return _gradient(q_NSV, labels_NS, soft, pulls)

    def _measure(self, logits_NSV: Tensor, labels_NS: Tensor, soft: Soft | None) -> tuple[dict[str, Tensor], Tensor]:
        """The distances wanted; and log q, which with a teacher has become q."""
        log_q_NSV = logits_NSV.log_softmax(-1)
        distances = {"ce": -log_q_NSV.gather(-1, labels_NS[..., None])[..., 0]}
        if soft is None:
            return distances, log_q_NSV
        if "kl" in self.reads:
            # No vecdot: autocast would take it in bfloat16.
            distances["kl"] = soft.negentropy_NS - (soft.p_NSV * log_q_NSV).sum(-1)
        q_NSV = log_q_NSV.exp_()
        if "accept" in self.reads:
            distances["accept"] = torch.minimum(soft.p_NSV, q_NSV).sum(-1).clamp(max=1)
        return distances, q_NSV

    def _note_choices(self, kind: str, labels_NS: Tensor, logits_NSV: Tensor, soft: Soft | None) -> None:
        choice_NS = logits_NSV.argmax(-1)
        found = {"correct": choice_NS == labels_NS}
        if soft is not None:
            teacher = soft.p_NSV.max(-1)
            found |= {"agree": choice_NS == teacher.indices, "teacher_top1": teacher.values}
            found["draft_top1"] = torch.exp(logits_NSV.amax(-1) - logits_NSV.logsumexp(-1))
        self._note(kind, found)

    def _note(self, kind: str, found: dict[str, Tensor]) -> None:
        for name, value_NS in found.items():
            self.noted.setdefault(term(kind, name), []).append(value_NS)

    def total(self) -> Tensor:
        """Sum over kinds and terms of scale * numerator."""
        scales = {term(kind, part): scale for kind, parts in self.scales.items() for part, scale in parts.items()}
        return sum(scales[key] * numerator for key, numerator in self.numerators.items())


def _gradient(q_NSV: Tensor, labels_NS: Tensor, soft: Soft | None, pulls: dict[str, Tensor]) -> Tensor:
    """Sum of pull [n, S] * gradient of each distance with respect to the logits. Overwrites q."""
    toward_q = [pulls[distance] for distance in ("ce", "kl") if distance in pulls]
    if "accept" in pulls:
        # b from {0, 1}, not the sign from {-1, 1}: its mean under q is small at first and would cancel. Not
        # torch.heaviside: on a CPU it takes longer than the head's multiplication at width 256, this an eighth of that.
        gain_NSV = (soft.p_NSV - q_NSV).sign_().add_(1).mul_(0.5)
        gain_NSV.sub_((q_NSV * gain_NSV).sum(-1, keepdim=True)).mul_(pulls["accept"][..., None])
        if toward_q:
            gain_NSV.add_(sum(toward_q)[..., None])
        grad_NSV = gain_NSV.mul_(q_NSV)
    else:
        grad_NSV = q_NSV.mul_(sum(toward_q)[..., None])
    if "kl" in pulls:
        grad_NSV.addcmul_(soft.p_NSV, pulls["kl"][..., None], value=-1)
    if "ce" in pulls:
        grad_NSV.scatter_add_(-1, labels_NS[..., None], -pulls["ce"][..., None])
    return grad_NSV


def dpace_weights(ce_NS: Tensor, scored_NS: Tensor, alpha: float, kind: str) -> Tensor:
    """Weights [N, S] by the draft's own confidence (D-PACE, arXiv:2605.18810), without gradient, for any objective.

    The chance P_k of reaching slot k is the product of the smoothed probabilities up to it; unscored slots are
    neutral there and weigh nothing. kind: "dpace" (chance times continuation value), or either factor alone.
    """
    confidence_NS = (1 - alpha) * torch.exp(-ce_NS.detach()) + alpha
    reach_NS = torch.where(scored_NS, confidence_NS, 1.0).cumprod(-1)
    ahead_NS = (reach_NS * scored_NS).flip(-1).cumsum(-1).flip(-1)
    if kind == "dpace":
        return ahead_NS * scored_NS
    if kind == "dpace-cumulative-confidence-only":
        return reach_NS * scored_NS
    assert kind == "dpace-continuation-value-only", kind
    return ahead_NS / reach_NS.clamp(min=torch.finfo(reach_NS.dtype).tiny) * scored_NS
