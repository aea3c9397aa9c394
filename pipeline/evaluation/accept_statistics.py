"""The accept length's figures: tokens a target call, acceptance by slot, and a bootstrap interval over prompts.

NumPy only, so that reports are read and compared without torch.

    B resamples   n prompts
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from pipeline.json_files import Count, Number, Numbers, Record

if TYPE_CHECKING:
    from pipeline.evaluation.accept_length import Span

RESAMPLES = 1000


class Figures(Record):
    """What replies to some prompts say of a draft, pooled over their target calls (prefills left out); without calls 0.

    Figures without a default are in the records of every version.
    """

    prompts: Count = Field(description="prompts with at least one call")
    accept_len: Number = Field(description="tokens / calls")
    interval: Numbers = Field(description="95 % bootstrap interval of accept_len over prompts, low and high")
    calls: Count = Field(description="target calls: verifications of a block")
    tokens: Count | None = Field(None, description="tokens gained, the target's own included")
    per_slot: Numbers = Field(description="acceptance by slot: share of calls that kept proposal 1, 2, ...")
    verified: Number | None = Field(None, description="proposals verified a call")
    verify_rate: Number | None = Field(None, description="share of the verified proposals that were kept")


def summarise(spans: Sequence["Span"], seed: int = 0) -> dict:
    """Return `Figures` of decoded replies as JSON values, and those of each of `domains`."""
    names = sorted({span.domain for span in spans})
    domains = {name: _figures([span for span in spans if span.domain == name], seed) for name in names}
    return _figures(spans, seed) | {"domains": domains}


def _figures(spans: Sequence["Span"], seed: int) -> dict:
    spans = [span for span in spans if span.lengths]
    tokens_n = np.array([sum(span.lengths) for span in spans], float)
    calls_n = np.array([len(span.lengths) for span in spans], float)
    matched = np.array([count for span in spans for count in span.matched])
    proposed = sum(sum(span.proposed) for span in spans)
    slots = max((span.proposals for span in spans), default=0)
    calls = int(calls_n.sum())
    return {
        "prompts": len(spans),
        "accept_len": float(tokens_n.sum() / max(calls, 1)),
        "interval": bootstrap(tokens_n, calls_n, seed),
        "calls": calls,
        "tokens": int(tokens_n.sum()),
        "per_slot": [float((matched > slot).mean()) for slot in range(slots)],
        "verified": proposed / max(calls, 1),
        "verify_rate": float(matched.sum() / max(proposed, 1)),
    }


def resamples(count: int, seed: int) -> np.ndarray:
    """Return how often each of `count` prompts, at least one, is in each resample of as many [B, n]."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def bootstrap(tokens_n: np.ndarray, calls_n: np.ndarray, seed: int) -> list[float]:
    """Return the 95 % interval of sum(tokens) / sum(calls) over resampled prompts; [0, 0] without any.

    The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) of a ratio.
    """
    if not len(calls_n):
        return [0.0, 0.0]
    drawn_Bn = resamples(len(calls_n), seed)
    return [float(edge) for edge in np.quantile((drawn_Bn @ tokens_n) / (drawn_Bn @ calls_n), [0.025, 0.975])]
