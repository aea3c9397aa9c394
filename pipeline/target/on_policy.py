"""How on-policy a corpus is (the "on-policy gauge" of reports): how often its tokens are the target's greedy choice.

A draft learns to imitate the target. Replies of another model are the largest loss of quality there is, and nothing
else shows it before a draft is served, so it is measured on about 1 % of the supervised rows of every cache. No torch
is imported at module level: a run with nothing to do prints the figures, too.

    R rows   D hidden size
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.samples import ShardPlan
from pipeline.cache.schema import ColumnSpec, GaugeFacts

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.target.head import TargetHead

SHARE = 0.01  # of the supervised rows that are measured
LEAST_ROWS = 256  # so that a small cache, too, gets a figure
WARN_BELOW = 0.6  # share of greedy tokens


@dataclass(frozen=True)
class OnPolicyStats:
    """Sums over the measured rows: how many, how many tokens are the target's greedy choice, their log-probability."""

    rows: int = 0
    agree: int = 0
    logprob: float = 0.0

    def __add__(self, other: "OnPolicyStats") -> "OnPolicyStats":
        return OnPolicyStats(self.rows + other.rows, self.agree + other.agree, self.logprob + other.logprob)

    def as_facts(self) -> dict:
        """Return the entry `gauge` of a column's manifest."""
        return {"rows": self.rows, "agree": self.agree, "logprob": round(self.logprob, 4)}

    @classmethod
    def from_facts(cls, facts: GaugeFacts) -> "OnPolicyStats":
        return cls(facts.rows, facts.agree, facts.logprob)

    def report(self) -> None:
        """Print the figures, if rows were measured, and to stderr a warning where too few tokens are greedy choices."""
        if not self.rows:
            return
        print(
            f"on-policy gauge: {self.agree / self.rows:.1%} of the replies' tokens are the target's own greedy ones, "
            f"mean log-probability {self.logprob / self.rows:.2f} ({self.rows} tokens looked at)"
        )
        if self.agree < WARN_BELOW * self.rows:
            print(
                f"warning: below {WARN_BELOW:.0%}, the corpus holds other words than the target's; "
                "a draft trained on it accepts less: let the target itself write the replies",
                file=sys.stderr,
            )


def on_policy_column(columns: Sequence[ColumnSpec]) -> str:
    """Return the column whose manifests hold the figures: `final`, else the first layer."""
    names = [spec.name for spec in columns]
    return "final" if "final" in names else names[0]


def on_policy_share(supervised: int) -> float:
    """Return the share of supervised rows to measure, given their number in the plan segment."""
    least = 1.25 * LEAST_ROWS / max(1, supervised)  # a random draw may give fewer rows than its mean
    return min(1.0, max(SHARE, least))


def on_policy_rows(shard: ShardPlan, sample: int, share: float) -> np.ndarray:
    """Return which supervised rows of a sample are measured: a random draw seeded by the sample's id alone."""
    supervised = np.flatnonzero(shard.mask(sample))
    supervised = supervised[supervised > 0]  # nothing predicts the first token
    draw = np.random.Generator(np.random.PCG64(shard.sample_ids[sample].tolist()))
    return supervised[draw.random(len(supervised)) < share]


def score_tokens(head: "TargetHead", states_RD: "Tensor", tokens_R: "Tensor") -> "Tensor":
    """Return float32 [2, R]: whether each token is the greedy choice after the state before it, its log-probability."""
    from pipeline.target.head import chunk_rows

    found = states_RD.new_zeros(2, len(tokens_R)).float()
    step = chunk_rows(head.vocab_size, states_RD.device.type)
    for at in range(0, len(tokens_R), step):
        part = slice(at, at + step)
        logits_RV = head.logits(states_RD[part])
        found[0, part] = (logits_RV.argmax(-1) == tokens_R[part]).float()
        found[1, part] = logits_RV.log_softmax(-1).gather(-1, tokens_R[part, None])[:, 0]
    return found


def sum_scores(scores_2R: "Tensor") -> OnPolicyStats:
    """Sum the result of `score_tokens` over its rows, leaving out those that are not finite."""
    usable = scores_2R[:, scores_2R[1].isfinite()].double()
    agree, logprob = usable.sum(-1).tolist()
    return OnPolicyStats(usable.shape[-1], int(agree), logprob)
