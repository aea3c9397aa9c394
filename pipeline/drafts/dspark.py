"""DSpark (arXiv:2607.05147): DFlash's parallel backbone with next-position labels, corrected by a Markov head that
reads the previous token, and a confidence head that predicts how likely each proposal is to be accepted. A rank of 0
leaves the Markov head out.

e is the embedding of the previous token, h the backbone's state; the corrected logits are head(h) + W2 z with

    vanilla   z = e
    gated     z = sigmoid(G [h ; e]) * e
    rnn       z = tanh(o), (a, c, o) = J [s ; e ; h], s' = sigmoid(a) s + (1 - sigmoid(a)) tanh(c), s = 0 at first

The confidence head learns `accept`, the probability that rejection sampling accepts a token sampled at the slot, as a
constant; its own gradient reaches the backbone and the embedding (DeepSpec's `loss.py`). Parameter names as published.

    N blocks   S slots   P proposals   D hidden size   U rank   V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.drafts.blocks import Blocks, Cell
from pipeline.drafts.config import DOMINO_OPTIONS, DraftConfig, refuse_options
from pipeline.drafts.draft import Draft, Loss, ScheduleValues
from pipeline.drafts.losses import HeadLoss
from pipeline.drafts.metrics import confidence_sums, slot_sums
from pipeline.drafts.norm_and_rope import at_least_float32
from pipeline.errors import UsageError
from pipeline.target.head import TargetHead


class MarkovHead(nn.Module):
    """The correction of a slot's logits by the previous token: W2 z."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.kind, rank, width = config.markov_head_type, config.markov_rank, config.hidden_size
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(width + rank, rank)
        if self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + width, 3 * rank)

    def forward(self, hidden_NSD: Tensor, prev_NS: Tensor, state_NU: Tensor | None = None):
        """Return z [N, S, U] of consecutive slots and the state [N, U] after them (rnn only, else None)."""
        e_NSU = self.markov_w1(prev_NS)
        if self.kind == "vanilla":
            return e_NSU, None
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat([hidden_NSD, e_NSU], dim=-1))) * e_NSU, None
        return self._recur(hidden_NSD, e_NSU, state_NU)

    def _recur(self, hidden_NSD: Tensor, e_NSU: Tensor, state_NU: Tensor | None) -> tuple[Tensor, Tensor]:
        # The part that does not depend on the state is one matrix product for all slots.
        of_state, of_inputs = self.joint_proj.weight.split([e_NSU.shape[-1], e_NSU.shape[-1] + hidden_NSD.shape[-1]], 1)
        joint_NSJ = F.linear(torch.cat([e_NSU, hidden_NSD], dim=-1), of_inputs, self.joint_proj.bias)
        state_NU = torch.zeros_like(e_NSU[:, 0]) if state_NU is None else state_NU
        z = []
        for slot_NJ in joint_NSJ.unbind(1):
            keep_NU, new_NU, out_NU = (slot_NJ + F.linear(state_NU, of_state)).chunk(3, dim=-1)
            z.append(torch.tanh(out_NU))
            keep_NU = torch.sigmoid(keep_NU)
            state_NU = keep_NU * state_NU + (1 - keep_NU) * torch.tanh(new_NU)
        return torch.stack(z, dim=1), state_NU


class ConfidenceHead(nn.Module):
    """One logit a slot, from the backbone's state and, where configured, the embedding of the previous token."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, features_NSF: Tensor) -> Tensor:
        logits_NS = self.proj(features_NSF)[..., 0]
        return logits_NS.to(at_least_float32(logits_NS.dtype))


class DSpark(Draft):
    """The backbone, its Markov correction and, where configured, its confidence head."""

    reads_final = True

    def __init__(self, config: DraftConfig, head: TargetHead):
        super().__init__(config, head)
        if config.markov_rank:
            self.markov_head = MarkovHead(config)
        if config.enable_confidence_head:
            rank = config.markov_rank if config.confidence_head_with_markov else 0
            self.confidence_head = ConfidenceHead(config.hidden_size + rank)

    @staticmethod
    def check(config: DraftConfig) -> None:
        """Raise UsageError for same-position labels, a confidence head without a loss, or a loss without the head."""
        refuse_options(config, *DOMINO_OPTIONS)
        if not config.shift_label:
            raise UsageError("dspark guesses from the anchor on: its labels are next-position; set shift_label = true")
        if not config.markov_rank and config.markov_head_type != "vanilla":
            raise UsageError(
                f'markov_head_type "{config.markov_head_type}" means nothing with markov_rank 0, which leaves the head '
                "out; leave one of the two out"
            )
        if not config.markov_rank and config.confidence_head_with_markov:
            raise UsageError(
                "a confidence head with markov_rank 0 has no table to read; set confidence_head_with_markov = false, "
                "or a rank above 0"
            )
        if not config.enable_confidence_head:
            for name in ("alpha_confidence", "confidence_head_with_markov"):
                if getattr(config, name):
                    raise UsageError(
                        f"{name} = {getattr(config, name)} means nothing without a confidence head; "
                        "leave it out or set enable_confidence_head = true"
                    )
        elif not config.alpha_confidence or config.alpha_confidence < 0:
            raise UsageError(
                f"alpha_confidence {config.alpha_confidence} would leave the confidence head untrained; "
                "published is 1.0, or set enable_confidence_head = false"
            )

    def correction(self, hidden_NSD: Tensor, prev_NS: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `Draft.correction`, on every slot."""
        if not self.config.markov_rank:
            return None
        return self.markov_head(hidden_NSD, prev_NS)[0], self.markov_head.markov_w2.weight

    def correction_step(self, k: int, hidden_ND: Tensor, last_N: Tensor, state_NU: Tensor | None):
        """As `Draft.correction_step`; only the rnn has a state."""
        if not self.config.markov_rank:
            return None, None
        z_N1U, state_NU = self.markov_head(hidden_ND[:, None], last_N[:, None], state_NU)
        return (z_N1U[:, 0], self.markov_head.markov_w2.weight), state_NU

    def confidence(self, hidden_NSD: Tensor, prev_NS: Tensor) -> Tensor:
        """Return the confidence head's logits [N, S], in float32 or wider."""
        if self.config.confidence_head_with_markov:
            hidden_NSD = torch.cat([hidden_NSD, self.markov_head.markov_w1(prev_NS)], dim=-1)
        return self.confidence_head(hidden_NSD)

    def confident_count(self, hidden_NSD: Tensor, anchor_ids_N: Tensor, ids_NP: Tensor, threshold: float) -> Tensor:
        """As `Draft.confident_count`."""
        if not self.config.enable_confidence_head:
            return super().confident_count(hidden_NSD, anchor_ids_N, ids_NP, threshold)
        prev_NP = torch.cat([anchor_ids_N[:, None], ids_NP[:, :-1]], dim=1)
        confident_NP = self.confidence(hidden_NSD, prev_NP).sigmoid() >= threshold
        return confident_NP.long().cumprod(-1).sum(-1)

    def denominators(self, blocks: Blocks) -> dict[str, Tensor]:
        """As `Draft.denominators`, and the confidence loss's, which is the same."""
        dens = super().denominators(blocks)
        return dens | ({"confidence": next(iter(dens.values()))} if self.config.enable_confidence_head else {})

    def loss(self, cell: Cell, blocks: Blocks, scheduled: ScheduleValues, dens: dict, metrics: bool = False) -> Loss:
        """As `Draft.loss`, plus the confidence head's cross-entropy against `accept`, with the other terms' weights."""
        if not self.config.enable_confidence_head:
            return super().loss(cell, blocks, scheduled, dens, metrics)
        objective = self.objective(cell, blocks, scheduled, dens, metrics)
        hidden_NSD = self.hidden(cell, blocks)
        z_NSU, out_VU = self.correction(hidden_NSD, blocks.prev_NS) or (None, None)
        chunk = self.blocks_per_chunk(hidden_NSD)
        total = HeadLoss.apply(hidden_NSD, z_NSU, out_VU, self.target, objective, chunk)
        per_slot = objective.slot_values()
        logits_NS = self.confidence(hidden_NSD, blocks.prev_NS)
        bce_NS = F.binary_cross_entropy_with_logits(logits_NS, per_slot["accept"], reduction="none")
        numerator = (per_slot["weights"] * bce_NS).sum()
        total = total + self.config.alpha_confidence / dens["confidence"] * numerator
        terms, sums = objective.numerators | {"confidence": numerator.detach()}, {}
        if metrics:
            sums = slot_sums(per_slot, blocks.scored_NS)
            sums |= confidence_sums(logits_NS.detach(), per_slot["accept"], per_slot["weights"])
        return Loss(total, terms, sums)
