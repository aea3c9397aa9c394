"""Domino (arXiv:2605.29707): DFlash's parallel backbone, corrected by a small causal head that reads the tokens
already chosen inside the block.

A GRU reads the target's embeddings of the tokens from the anchor on; from its state g and the backbone's h, a
bottleneck of rank U gives z = SiLU(W1 [h ; g]), and the corrected logits are head(h) + W2 z. The first
`pure_draft_prefix_len` proposals are not corrected.

    N blocks   S slots   D hidden size   H width of the GRU   U rank   V vocabulary
"""

import torch
from torch import Tensor, nn

from pipeline.drafts.config import DSPARK_OPTIONS, DraftConfig, refuse_options
from pipeline.drafts.draft import Draft, ScheduleValues
from pipeline.errors import UsageError
from pipeline.target.head import TargetHead


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
        """Raise UsageError for a causal head without sizes, or one with no proposal to correct."""
        refuse_options(config, *DSPARK_OPTIONS)
        for name in ("emb_dim", "gru_hidden_dim", "pure_draft_prefix_len"):
            if getattr(config, name) is None:
                raise UsageError(f"domino needs {name}; published recipes use 256, 1024 and 1 for rank, GRU and prefix")
        most = config.proposals - 1
        if config.pure_draft_prefix_len > most:
            raise UsageError(
                f"pure_draft_prefix_len {config.pure_draft_prefix_len} leaves the causal head nothing to correct; "
                f"use 0..{most} with blocks of {config.block_size} and shift_label {config.shift_label}"
            )

    @property
    def suffix_start(self) -> int:
        """The first slot whose logits are corrected."""
        return self.config.first_slot + self.config.pure_draft_prefix_len

    def schedule(self, step: int, total_steps: int) -> ScheduleValues:
        """Return lambda, which decays linearly from its start to 0 over `lambda_decay` of the run's steps.

        step: optimizer steps completed. Raises UsageError without `total_steps`, where lambda would silently be 0.
        """
        if not total_steps or total_steps < 1:
            raise UsageError(f"lambda needs the number of steps of the whole run, found {total_steps}; set train.steps")
        span = max(1, int(total_steps * self.config.lambda_decay))
        value = self.config.lambda_start * (1 - min(step / span, 1))
        return ScheduleValues(lambda_base=min(max(value, 0.0), 1.0))

    def logit_kinds(self, scheduled: ScheduleValues) -> dict[str, float]:
        """Return the weights of the corrected and the base logits: 1 - lambda and lambda."""
        return {"final": 1 - scheduled.lambda_base, "base": scheduled.lambda_base}

    def correction(self, hidden_NSD: Tensor, prev_NS: Tensor) -> tuple[Tensor, Tensor]:
        """As `Draft.correction`; 0 on the slots that are not corrected."""
        return self._bottleneck(hidden_NSD, prev_NS), self.embed_proj[2].weight

    def _bottleneck(self, hidden_NSD: Tensor, prev_NS: Tensor) -> Tensor:
        """Return z [N, S, U] from the true tokens before each label, 0 on the slots that are not corrected.

        The GRU's state for slot k has read the tokens from the anchor to the one before slot k's label.
        """
        states_NPH, _ = self.prefix_gru(self._embed(prev_NS[:, : self.config.proposals]))
        z_NSU = self._mix(hidden_NSD[:, self.suffix_start :], states_NPH[:, self.config.pure_draft_prefix_len :])
        return nn.functional.pad(z_NSU, (0, 0, self.suffix_start, 0))

    def _mix(self, hidden: Tensor, state: Tensor) -> Tensor:
        """Return the bottleneck of [backbone state ; GRU state], in the published order."""
        return self.embed_proj[1](self.embed_proj[0](torch.cat([hidden, state], dim=-1)))

    def correction_step(self, k: int, hidden_ND: Tensor, last_N: Tensor, state_1NH: Tensor | None):
        """As `Draft.correction_step`; the state is the GRU's, and the first proposals are not corrected."""
        states_N1H, state_1NH = self.prefix_gru(self._embed(last_N)[:, None], state_1NH)
        if k < self.config.pure_draft_prefix_len:
            return None, state_1NH
        return (self._mix(hidden_ND, states_N1H[:, 0]), self.embed_proj[2].weight), state_1NH
