"""The interface between decoding and a draft: the request for a block, the proposal, and the draft's kv cache.

K layers   T new rows   D hidden size   P proposals   V vocabulary   G key/value heads   E head size
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sample proposals from softmax(logits / temperature) instead of taking the most likely token."""

    temperature: float  # above 0
    generators: Sequence[torch.Generator]  # one a block, of any device: no text depends on the others in its batch


@dataclass(frozen=True)
class Proposal:
    """The proposed tokens of one block, in order. q_PV: the distribution each was sampled from, float32 or wider; None
    if greedy."""

    ids_P: Tensor  # int64; P is `config.proposals`, or fewer where the confidence head cuts; 0 is a step without draft
    q_PV: Tensor | None


class DraftKV:
    """A draft's kv cache of one text: keys and values of the context only, each computed once."""

    def __init__(self):
        self.length = 0  # positions 0 .. length - 1 are cached, in every layer
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # [G, capacity, E]

    def extend(self, layer: int, *new: Tensor) -> tuple[Tensor, Tensor]:
        """Add one layer's keys and values [G, T, E] of the next T positions; return those of all positions so far.

        `length` stays as it is: the caller raises it once every layer was extended.
        """
        stop = self.length + new[0].shape[1]
        buffers = self._layers.get(layer)
        if buffers is None or stop > buffers[0].shape[1]:
            grown = tuple(values.new_empty(values.shape[0], 2 * stop, values.shape[2]) for values in new)
            for larger, old in zip(grown, buffers or (), strict=False):
                larger[:, : self.length] = old[:, : self.length]
            buffers = self._layers[layer] = grown
        for buffer, values in zip(buffers, new, strict=True):
            buffer[:, self.length : stop] = values
        return buffers[0][:, :stop], buffers[1][:, :stop]


@dataclass(frozen=True)
class BlockRequest:
    """A request for the next block of one text: its anchor, and the target's states that the kv cache lacks."""

    features_KTD: Tensor  # the target's states at positions kv.length .. start - 1: those verified since the last block
    anchor_id: int
    start: int  # the anchor's true position
    kv: DraftKV
