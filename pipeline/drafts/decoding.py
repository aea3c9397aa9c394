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
        self.length = 0  # positions 0 .. length - 1 are cached
        self._layers: list[tuple[Tensor, Tensor]] = []  # [G, capacity, E]

    def append(self, fresh: list[tuple[Tensor, Tensor]]) -> None:
        """Add the keys and values [G, T, E] of the next T positions, for each layer."""
        start, stop = self.length, self.length + fresh[0][0].shape[1]
        if not self._layers or stop > self._layers[0][0].shape[1]:
            self._layers = [self._grown(index, pair, 2 * stop) for index, pair in enumerate(fresh)]
        for layer, new in zip(self._layers, fresh, strict=True):
            for buffer, values in zip(layer, new, strict=True):
                buffer[:, start:stop] = values
        self.length = stop

    def _grown(self, index: int, pair: tuple[Tensor, Tensor], capacity: int) -> tuple[Tensor, Tensor]:
        grown = tuple(values.new_empty(values.shape[0], capacity, values.shape[2]) for values in pair)
        if self._layers:
            for buffer, old in zip(grown, self._layers[index], strict=True):
                buffer[:, : self.length] = old[:, : self.length]
        return grown

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values [G, length, E] of each layer."""
        return [(k[:, : self.length], v[:, : self.length]) for k, v in self._layers]


@dataclass(frozen=True)
class BlockRequest:
    """A request for the next block of one text: its anchor, and the target's states that the kv cache lacks."""

    features_KTD: Tensor  # the target's states at positions kv.length .. start - 1: those verified since the last block
    anchor_id: int
    start: int  # the anchor's true position
    kv: DraftKV
