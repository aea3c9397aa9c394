"""DFlash (arXiv:2602.06036): all slots of a block guessed at once by the backbone and the target's own head.

N blocks   S slots   D hidden size   V vocabulary
"""

import torch
from torch import Tensor

from pipeline.drafts.blocks import Blocks, Cell
from pipeline.drafts.config import OF_DOMINO, OF_DSPARK, DraftConfig, refuse_options
from pipeline.drafts.draft import Draft, Knobs, Loss
from pipeline.drafts.losses import CrossEntropies, dpace_weights, head_loss
from pipeline.drafts.metrics import slot_sums


class DFlash(Draft):
    """The backbone alone."""

    @staticmethod
    def check(config: DraftConfig) -> None:
        """Refuse what DFlash would not read."""
        refuse_options(config, *OF_DOMINO, *OF_DSPARK)

    def schedule(self, step: int, horizon: int) -> Knobs:
        """Nothing changes over a run."""
        return Knobs()

    def denominators(self, blocks: Blocks) -> dict[str, Tensor]:
        """This cell's share of each term's global denominator: the weights' sum, or the samples for D-PACE."""
        if self.config.weighting == "decay":
            return {"final": blocks.weights_NS.double().sum()}
        return {"final": torch.tensor(len(blocks.lengths), dtype=torch.float64, device=blocks.weights_NS.device)}

    def loss(self, cell: Cell, blocks: Blocks, knobs: Knobs, dens: dict, metrics: bool = False) -> Loss:
        """Weighted cross-entropy of every scored slot over the global denominator `dens["final"]`."""
        scales = {"final": 1 / dens["final"]}
        objective = CrossEntropies(blocks.labels_NS, self._weigh(blocks), scales, metrics)
        total = head_loss(self.hidden(cell, blocks), self.target, objective)
        correct = {kind: torch.cat(parts) for kind, parts in objective.correct.items()}
        return Loss(total, objective.numerators, slot_sums(correct, blocks.scored_NS) if metrics else {})

    def _weigh(self, blocks: Blocks):
        kind, alpha = self.config.weighting, self.config.dpace_alpha
        if kind == "decay":
            return lambda part, ce_NS: blocks.weights_NS[part]
        return lambda part, ce_NS: dpace_weights(ce_NS, blocks.scored_NS[part], alpha, kind)

    def logits(self, hidden_NSD: Tensor, prev_NS: Tensor) -> dict[str, Tensor]:
        """All logits [N, S, V] at once: for probes and tests of a few blocks."""
        return {"final": self.target.logits(hidden_NSD)}
