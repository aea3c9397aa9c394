"""Micro-batches: which samples of a shard the target computes together. Part of what a cache is (`batch_tokens`)."""

from collections.abc import Sequence

import numpy as np

FORWARD_TOKENS = 128  # what a forward costs besides its tokens: about what an H100 computes while it reads the weights


def micro_batches(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[range]:
    """Cut a shard's samples, in their order, into batches of at most `batch_tokens` padded tokens (at least a sample).

    Of all cuts the cheapest, padding and forwards counted in tokens. A pure function of the lengths, so that a capture
    computes the same batches whoever runs it and however often it was stopped.
    """
    lengths = [int(length) for length in lengths]
    least, begins = [0], [0]  # for the samples before each end: what they cost, where their last batch begins
    for end in range(1, len(lengths) + 1):
        longest = tokens = 0
        found = None
        for first in range(end - 1, -1, -1):
            longest, tokens = max(longest, lengths[first]), tokens + lengths[first]
            padded = longest * (end - first)
            cost = padded - tokens + FORWARD_TOKENS
            if found and (padded > batch_tokens or cost > found[0]):  # and every longer batch costs more still
                break
            found = min(found or (least[first] + cost, first), (least[first] + cost, first))
        least.append(found[0])
        begins.append(found[1])
    batches, end = [], len(lengths)
    while end:
        batches.append(range(begins[end], end))
        end = begins[end]
    return batches[::-1]
