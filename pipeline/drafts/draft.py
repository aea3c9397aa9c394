"""What every method is: a backbone, the target's frozen head, and the two ways to run them, training and decoding.

N blocks   S slots   K layers   T new rows   R context rows   D hidden size   P proposals   V vocabulary
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.drafts.attention import Decode, Dense, Grouped
from pipeline.drafts.backbone import Backbone
from pipeline.drafts.blocks import Blocks, Cell
from pipeline.drafts.config import DraftConfig
from pipeline.errors import UsageError
from pipeline.target_head import TargetHead


@dataclass(frozen=True)
class Knobs:
    """What a schedule turns from step to step."""

    lambda_base: float = 0.0  # weight of the base logits' loss


@dataclass(frozen=True)
class Loss:
    """One cell's share of a global batch's loss.

    total: sum over terms of coefficient * numerator / global denominator; shares of cells add up. terms: the
    numerators, detached. sums: additive metric sums (`metrics.py`), empty unless asked for.
    """

    total: Tensor
    terms: dict[str, Tensor]
    sums: dict[str, Tensor] = field(default_factory=dict)


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


class Draft(Backbone):
    """A backbone with the target's head. A method adds `check`, `schedule`, `denominators`, `loss` and `rollout`.

    The head is no part of the state_dict, whose keys are exactly those of published checkpoints. `reads_final` says
    whether the loss reads the target's final state; the accept length always does.
    """

    reads_final = False

    def __init__(self, config: DraftConfig, head: TargetHead):
        if (config.vocab_size, config.hidden_size) != (head.vocab_size, head.hidden_size):
            raise UsageError(
                f"the draft has vocabulary {config.vocab_size} and width {config.hidden_size}, the target's head "
                f"{head.vocab_size} and {head.hidden_size}; take both from the cache the draft is trained on"
            )
        super().__init__(config)
        self.target = head

    def hidden(self, cell: Cell, blocks: Blocks, dense: bool = False) -> Tensor:
        """States [N, S, D] of every slot in the training layout, final norm applied.

        `dense` takes the reference path, one mask over all keys; it is quadratic in the cell.
        """
        if dense:
            attention = Dense(blocks, len(cell.ids_R), self.windows)
        else:
            attention = Grouped(blocks, self.windows)
        memory = self.context_keys_values(cell.aux_KRD, cell.pos_R)
        noise_QD = self._noise(blocks.noise_ids_NS.flatten())
        out_QD = self.slots(noise_QD, blocks.positions_NS.flatten(), memory, attention)
        return out_QD.unflatten(0, blocks.noise_ids_NS.shape)

    def _noise(self, ids: Tensor) -> Tensor:
        return self.target.embed(ids).to(self.fc.weight.dtype)

    def new_kv(self) -> DraftKV:
        return DraftKV()

    @torch.no_grad()
    def block_hidden(self, features_KTD: Tensor, anchor_id: int, start: int, kv: DraftKV) -> Tensor:
        """States [S, D] of one block at decode time (batch 1).

        features_KTD: the target's states at positions kv.length .. start - 1, those verified since the last call.
        start: the anchor's true position. Slot k sits at start + k; the block's own keys are dropped afterwards.
        """
        K, T, _ = features_KTD.shape
        assert kv.length + T == start, f"kv holds {kv.length} positions and {T} came, for an anchor at {start}"
        assert len(self.config.target_layer_ids) == K, f"{K} layers for {self.config.target_layer_ids}"
        device, S = self.fc.weight.device, self.config.block_size
        if T:
            positions_T = torch.arange(kv.length, start, device=device)
            kv.append(self.context_keys_values(features_KTD.to(device), positions_T))
        ids_S = torch.full((S,), self.config.mask_token_id, device=device)
        ids_S[0] = anchor_id
        positions_S = torch.arange(start, start + S, device=device)
        return self.slots(self._noise(ids_S), positions_S, kv.layers(), Decode(S, start, device))

    @torch.no_grad()
    def propose(self, features_KTD: Tensor, anchor_id: int, start: int, kv: DraftKV) -> Tensor:
        """Guess the tokens [P] at positions start + 1 .. start + P, greedily. Arguments as of `block_hidden`."""
        hidden_1SD = self.block_hidden(features_KTD, anchor_id, start, kv)[None]
        return self.rollout(hidden_1SD, torch.tensor([anchor_id], device=hidden_1SD.device))[0]


def init_weights(draft: Draft, seed: int) -> None:
    """Fill all parameters as Hugging Face would: N(0, initializer_range), biases 0, norms 1; a GRU as PyTorch does.

    Drawn on the CPU in the order of the parameters' names, so that every device starts alike.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in sorted(draft.named_modules(), key=lambda named: named[0]):
            for kind, weight in module.named_parameters(recurse=False):
                weight.copy_(_fresh(module, kind, weight.shape, draft.config.initializer_range, generator))


def _fresh(module: nn.Module, kind: str, shape: torch.Size, spread: float, generator: torch.Generator) -> Tensor:
    if isinstance(module, nn.GRU):
        bound = 1 / math.sqrt(module.hidden_size)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if isinstance(module, nn.Linear) and kind == "weight":
        return torch.empty(shape).normal_(0, spread, generator=generator)
    return torch.zeros(shape) if kind == "bias" else torch.ones(shape)
