"""Domino (arXiv:2605.29707): DFlash's parallel backbone, corrected by a small causal head that reads the tokens
already chosen inside the block.

A GRU reads the target's embeddings of the tokens from the anchor on; from its state g and the backbone's h, a
bottleneck of rank U gives z = SiLU(W1 [h ; g]), and the corrected logits are head(h) + W2 z. The first
`pure_draft_prefix_len` proposals are left to the backbone.

    N blocks   S slots   D hidden size   H width of the GRU   U rank   V vocabulary
"""

import torch
from torch import Tensor, nn

from pipeline.drafts.blocks import Blocks, Cell
from pipeline.drafts.config import OF_DSPARK, DraftConfig, refuse_options
from pipeline.drafts.draft import Draft, Knobs, Loss
from pipeline.drafts.elementwise import wide
from pipeline.drafts.losses import CrossEntropies, head_loss
from pipeline.drafts.metrics import slot_sums
from pipeline.errors import UsageError
from pipeline.target_head import TargetHead


class Domino(Draft):
    """The backbone and its causal correction."""

    def __init__(self, config: DraftConfig, head: TargetHead):
        super().__init__(config, head)
        width, gru, rank = config.hidden_size, config.gru_hidden_dim, config.emb_dim
        self.prefix_gru = nn.GRU(width, gru, bias=False, batch_first=True)
        self.embed_proj = nn.Sequential(
            nn.Linear(width + gru, rank, bias=False), nn.SiLU(), nn.Linear(rank, config.vocab_size, bias=False)
        )

    @staticmethod
    def check(config: DraftConfig) -> None:
        """Refuse a head without sizes and an empty suffix."""
        refuse_options(config, *OF_DSPARK)
        for name in ("emb_dim", "gru_hidden_dim", "pure_draft_prefix_len"):
            if getattr(config, name) is None:
                raise UsageError(f"domino needs {name}; published recipes use 256, 1024 and 1 for rank, GRU and prefix")
        most = config.proposals - 1
        if config.pure_draft_prefix_len > most:
            raise UsageError(
                f"pure_draft_prefix_len {config.pure_draft_prefix_len} leaves the causal head nothing to correct; "
                f"use 0..{most} with blocks of {config.block_size} and shift_label {config.shift_label}"
            )
        if config.weighting != "decay":
            raise UsageError(f'weighting {config.weighting!r} is defined for dflash only; use "decay" with domino')

    @property
    def suffix_start(self) -> int:
        """The first slot whose logits are corrected."""
        return self.config.first_slot + self.config.pure_draft_prefix_len

    def schedule(self, step: int, horizon: int) -> Knobs:
        """Lambda falls linearly from its start to 0 over its share of the horizon.

        step: optimizer steps completed. UsageError without a horizon: others then silently train with lambda 0.
        """
        if not horizon or horizon < 1:
            raise UsageError(f"lambda needs the number of steps of the whole run, found {horizon}; set train.steps")
        span = max(1, int(horizon * self.config.lambda_decay))
        value = self.config.lambda_start * (1 - min(step / span, 1))
        return Knobs(lambda_base=min(max(value, 0.0), 1.0))

    def denominators(self, blocks: Blocks) -> dict[str, Tensor]:
        """This cell's share of each term's global denominator: the weights' sum, for both."""
        weight = blocks.weights_NS.double().sum()
        return {"final": weight, "base": weight}

    def loss(self, cell: Cell, blocks: Blocks, knobs: Knobs, dens: dict, metrics: bool = False) -> Loss:
        """(1 - lambda) * corrected + lambda * base cross-entropy. At lambda 1 the GRU gets zero gradients, not None."""
        hidden_NSD = self.hidden(cell, blocks)
        scales = {"final": (1 - knobs.lambda_base) / dens["final"], "base": knobs.lambda_base / dens["base"]}
        objective = CrossEntropies(blocks.labels_NS, lambda part, ce_NS: blocks.weights_NS[part], scales, metrics)
        correction = self._bottleneck(hidden_NSD, blocks.prev_NS), self.embed_proj[2].weight
        total = head_loss(hidden_NSD, self.target, objective, correction)
        correct = {kind: torch.cat(parts) for kind, parts in objective.correct.items()}
        return Loss(total, objective.numerators, slot_sums(correct, blocks.scored_NS) if metrics else {})

    def _bottleneck(self, hidden_NSD: Tensor, prev_NS: Tensor) -> Tensor:
        """z [N, S, U] from the true tokens before each label, 0 on the slots left to the backbone.

        The state for slot k has consumed the tokens from the anchor to the one before slot k's label.
        """
        first, prefix = self.config.first_slot, self.config.pure_draft_prefix_len
        states_NPH, _ = self.prefix_gru(self._noise(prev_NS[:, : self.config.proposals]))
        z_NSU = self._mix(hidden_NSD[:, first + prefix :], states_NPH[:, prefix:])
        return nn.functional.pad(z_NSU, (0, 0, first + prefix, 0))

    def _mix(self, hidden: Tensor, state: Tensor) -> Tensor:
        """The backbone's state first, the GRU's second, as published."""
        return self.embed_proj[1](self.embed_proj[0](torch.cat([hidden, state], dim=-1)))

    def logits(self, hidden_NSD: Tensor, prev_NS: Tensor) -> dict[str, Tensor]:
        """All teacher-forced logits [N, S, V] at once, "base" and "final": for probes and tests of a few blocks."""
        raw_NSV = self.target.raw_logits(hidden_NSD)
        base_NSV = raw_NSV.to(wide(raw_NSV.dtype))
        correction_NSV = self.embed_proj[2](self._bottleneck(hidden_NSD, prev_NS)).to(base_NSV.dtype)
        return {"base": self.target.cap(base_NSV), "final": self.target.cap(base_NSV + correction_NSV)}

    def advance(self, k: int, hidden_ND: Tensor, last_N: Tensor, state_1NH: Tensor | None):
        """As `Draft.advance`; the state is the GRU's, and the first proposals are left to the backbone."""
        states_N1H, state_1NH = self.prefix_gru(self._noise(last_N)[:, None], state_1NH)
        if k < self.config.pure_draft_prefix_len:
            return None, state_1NH
        return (self._mix(hidden_ND, states_N1H[:, 0]), self.embed_proj[2].weight), state_1NH
