"""What decoding hands to a draft, keeps of it and gets back.

K layers   T new rows   D hidden size   P proposals   V vocabulary   G key/value heads   E head size
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Draw proposals from softmax(logits / temperature) instead of taking the likeliest."""

    temperature: float  # above 0
    generators: Sequence[torch.Generator]  # one a block, of any device: what one text draws is its own affair


@dataclass(frozen=True)
class Proposal:
    """The tokens of one block, in order. q_PV: what each was drawn from, float32 at least; None if greedy."""

    ids_P: Tensor  # int64; P is `config.proposals`, or fewer where the confidence head cuts: 0 is a plain step
    q_PV: Tensor | None


class DraftKV:
    """The decoder's memory of a draft: keys and values of the context only, each computed once."""

    def __init__(self):
        self.length = 0  # positions 0 .. length - 1 are held
        self._layers: list[tuple[Tensor, Tensor]] = []  # [G, capacity, E]

    def append(self, fresh: list[tuple[Tensor, Tensor]]) -> None:
        """Add the keys and values [G, T, E] of the next T positions, for each layer."""
        start, stop = self.length, self.length + fresh[0][0].shape[1]
        if not self._layers or stop > self._layers[0][0].shape[1]:
            self._layers = [self._grown(index, pair, 2 * stop) for index, pair in enumerate(fresh)]
        for held, new in zip(self._layers, fresh, strict=True):
            for kept, values in zip(held, new, strict=True):
                kept[:, start:stop] = values
        self.length = stop

    def _grown(self, index: int, pair: tuple[Tensor, Tensor], capacity: int) -> tuple[Tensor, Tensor]:
        roomy = tuple(values.new_empty(values.shape[0], capacity, values.shape[2]) for values in pair)
        if self._layers:
            for kept, old in zip(roomy, self._layers[index], strict=True):
                kept[:, : self.length] = old[:, : self.length]
        return roomy

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [G, length, E] of each layer."""
        return [(k[:, : self.length], v[:, : self.length]) for k, v in self._layers]


@dataclass(frozen=True)
class Ask:
    """Where one text stands when its next block is asked for."""

    features_KTD: Tensor  # the target's states at positions kv.length .. start - 1: those verified since the last block
    anchor_id: int
    start: int  # the anchor's true position
    kv: DraftKV
