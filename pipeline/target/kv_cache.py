"""The target's kv cache while decoding: transformers' own for one sequence, a shared one for a batch of sequences.

Sequences of a batch differ in length, so new keys and values are written at each one's own positions, and a mask limits
its queries to keys at their own and earlier positions. Rejected tokens stay in place, at later positions, until the
next block overwrites them.

    B sequences   N new rows of each   L keys   V vocabulary   G key/value heads   E head size
"""

from collections.abc import Sequence
from functools import cache
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from pipeline.errors import UsageError

# Layers that store one entry a token. The state of linear attention is a running sum, from which rejected tokens cannot
# be removed; other kinds store more than keys and values.
CROPPABLE = {"full_attention", "sliding_attention", "chunked_attention"}
MASKED = {"full_attention", "sliding_attention"}  # of these, those whose mask for a batch is made here
TAKES_MASKS = {"sdpa", "eager"}


def kv_argument(target: nn.Module, kv: Cache | None) -> dict:
    """Return the arguments of a forward that reads and extends a kv cache; `kv_keyword` names it."""
    return {kv_keyword(target): kv, "use_cache": True}


def kv_keyword(target: nn.Module) -> str:
    """Return what a forward, and its output, call the kv cache: transformers 5.24 renamed `past_key_values`."""
    return _keyword_of(type(target))


@cache
def _keyword_of(kind: type[nn.Module]) -> str:
    return "cache" if "cache" in signature(kind.forward).parameters else "past_key_values"


def _layer_kinds(target: PreTrainedModel) -> set[str]:
    return set(getattr(target.config.get_text_config(), "layer_types", None) or ())


def check_croppable(target: PreTrainedModel) -> None:
    """Raise UsageError for a target from whose kv cache rejected tokens cannot be removed."""
    refused = sorted(_layer_kinds(target) - CROPPABLE)
    if not refused and any(getattr(module, "_is_stateful", False) for module in target.modules()):
        refused = ["recurrent"]  # transformers' own mark of models that cannot be rolled back
    if refused:
        raise UsageError(
            f"{type(target).__name__} has {refused[0]} layers, whose memory cannot be cropped after a rejected block; "
            "evaluate decodes targets with attention layers only, so judge this draft by the accept length that "
            "`pipeline train-draft` reports"
        )


def check_batchable(target: PreTrainedModel) -> None:
    """Raise UsageError for a target that cannot decode a batch of sequences of different lengths."""
    config = target.config.get_text_config()
    refused, kernel = sorted(_layer_kinds(target) - MASKED), config._attn_implementation
    why = None
    if refused:
        why = f"has {refused[0]} layers, for which no masks of several texts are made here"
    elif kernel not in TAKES_MASKS:
        why = f"attends by {kernel!r}, which takes no masks of several texts"
    elif getattr(config, "alibi", False) or "position_ids" not in signature(target.forward).parameters:
        why = "is not told positions, and texts stand at different ones"
    if why:
        raise UsageError(f"{type(target).__name__} {why}; leave --batch out")


def new_kv() -> DynamicCache:
    """Return an empty kv cache that can be cropped: made without the config, so that sliding layers keep every row."""
    return DynamicCache()


class SingleKV:
    """The kv cache of one sequence at a time."""

    def __init__(self, target: PreTrainedModel):
        self.target, self.kv, self.rows = target, None, 0

    def add(self, kv: DynamicCache) -> None:
        """Take over the kv cache of a prefill."""
        self.kv = kv

    def run(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Run the target on the next tokens of each sequence; return the logits [B, N, V] after each token."""
        self.rows = len(pieces[0])
        ids_1N = torch.tensor([list(pieces[0])], device=self.target.device)
        return self.target(input_ids=ids_1N, **kv_argument(self.target, self.kv)).logits

    def crop(self, counts: Sequence[int]) -> None:
        """Keep the first `counts` of the tokens that each sequence was last run on, and drop the rest."""
        if counts[0] < self.rows:
            self.kv.crop(counts[0] - self.rows)  # negative: so many rows off the end

    def remove(self, sequence: int) -> None:
        """Remove a sequence; the last one takes its place."""
        self.kv = None


class _BatchedLayer(DynamicLayer):
    """One layer's keys and values of all sequences [B, G, L, E]; a forward writes its tokens' in place."""

    def __init__(self, batched: "BatchedKV", prefilled_layer: DynamicLayer):
        super().__init__()
        self.batched, self.is_initialized = batched, True
        self.dtype, self.device = prefilled_layer.keys.dtype, prefilled_layer.keys.device
        # Zeros: a masked key has weight 0, but 0 times uninitialised memory may be NaN. Values may have another head
        # size than keys.
        self.keys, self.values = (
            tensor.new_zeros(batched.max_sequences, tensor.shape[1], batched.capacity, tensor.shape[3])
            for tensor in (prefilled_layer.keys, prefilled_layer.values)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        at_BN = self.batched.at_BN
        sequence_B1 = torch.arange(len(at_BN), device=at_BN.device)[:, None]
        self.keys[sequence_B1, :, at_BN] = key_states.transpose(1, 2)
        self.values[sequence_B1, :, at_BN] = value_states.transpose(1, 2)
        return tuple(tensor[: len(at_BN), :, : self.batched.key_count] for tensor in (self.keys, self.values))


class BatchedKV:
    """The kv cache of up to `max_sequences` sequences, with `capacity` tokens each at first; methods as `SingleKV`."""

    def __init__(self, target: PreTrainedModel, max_sequences: int, capacity: int):
        check_batchable(target)
        self.target, self.max_sequences, self.capacity = target, max_sequences, capacity
        self.kinds, self.window = _layer_kinds(target), getattr(target.config.get_text_config(), "sliding_window", None)
        self.lengths: list[int] = []
        self.cache, self.at_BN, self.key_count = None, None, 0

    def add(self, kv: DynamicCache) -> None:
        self.add_from_batch(kv, 0, kv.get_seq_length())

    def add_from_batch(self, kv: DynamicCache, sequence: int, length: int) -> None:
        """Take over the first `length` tokens of one sequence from the kv cache of a batched prefill."""
        row = len(self.lengths)
        if self.cache is None:
            self.cache = Cache(layers=[_BatchedLayer(self, layer) for layer in kv.layers])
        self._reserve(length)
        for layer, prefilled in zip(self.cache.layers, kv.layers, strict=True):
            layer.keys[row, :, :length] = prefilled.keys[sequence, :, :length]
            layer.values[row, :, :length] = prefilled.values[sequence, :, :length]
        self.lengths.append(length)

    def extract(self, sequence: int, length: int) -> DynamicCache:
        """Return a copy of a sequence's first `length` tokens as a kv cache of its own."""
        kv = new_kv()
        for number, layer in enumerate(self.cache.layers):
            kv.update(
                *(tensor[sequence : sequence + 1, :, :length].clone() for tensor in (layer.keys, layer.values)), number
            )
        return kv

    def _reserve(self, tokens: int) -> None:
        """Grow the capacity to at least so many tokens."""
        if tokens <= self.capacity:
            return
        self.capacity = max(tokens, self.capacity + self.capacity // 2)
        for layer in self.cache.layers:
            layer.keys, layer.values = (
                F.pad(tensor, (0, 0, 0, self.capacity - tensor.shape[2])) for tensor in (layer.keys, layer.values)
            )

    def run(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        device, width = self.target.device, max(map(len, pieces))
        padded = [[*piece, *[piece[-1]] * (width - len(piece))] for piece in pieces]  # padding is never kept
        self.at_BN = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(width, device=device)
        self.key_count = max(self.lengths) + width
        self._reserve(self.key_count)
        return self.target(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=self._masks(),
            position_ids=self.at_BN,
            **kv_argument(self.target, self.cache),
        ).logits

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """Return the additive attention mask [B, 1, N, L]; a dict by kind of layer where there are several."""
        key_L, at_BN1 = torch.arange(self.key_count, device=self.at_BN.device), self.at_BN[..., None]
        seen = {"full_attention": key_L <= at_BN1}
        if self.window is not None:
            seen["sliding_attention"] = seen["full_attention"] & (key_L > at_BN1 - self.window)
        kinds = self.kinds or {list(seen)[-1]}  # a window and no kinds: all layers slide
        zero = torch.zeros((), dtype=self.target.dtype, device=key_L.device)
        lowest = torch.full_like(zero, torch.finfo(self.target.dtype).min)
        masks = {kind: torch.where(seen[kind], zero, lowest)[:, None] for kind in seen if kind in kinds}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def crop(self, counts: Sequence[int]) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def remove(self, sequence: int) -> None:
        last = len(self.lengths) - 1
        for layer in self.cache.layers:
            for tensor in (layer.keys, layer.values):
                tensor[sequence] = tensor[last]
        self.lengths[sequence] = self.lengths[last]
        self.lengths.pop()
