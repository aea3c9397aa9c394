"""What the target remembers of the texts being decoded: transformers' own cache for one, rows of a shared one for many.

Texts differ in length, so each row is written where its own text stands, and a mask says what its queries may see: the
keys at their own and at earlier positions. Rejected tokens are not taken out; the next block overwrites them, and until
then they lie at later positions.

    B texts   N new rows of each   L keys   V vocabulary   G key/value heads   E head size
"""

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from pipeline.errors import UsageError

# Layers that remember one entry a token. A linear attention's memory is a running sum, out of which rejected tokens
# cannot be taken; other kinds keep more than keys and values.
CROPPABLE = {"full_attention", "sliding_attention", "chunked_attention"}
MASKED = {"full_attention", "sliding_attention"}  # of these, those whose mask for several texts is made here
TAKES_MASKS = {"sdpa", "eager"}


def _kinds(target: PreTrainedModel) -> set[str]:
    return set(getattr(target.config.get_text_config(), "layer_types", None) or ())


def check_croppable(target: PreTrainedModel) -> None:
    """Refuse a target from whose memory rejected tokens cannot be removed. UsageError."""
    others = sorted(_kinds(target) - CROPPABLE)
    if not others and any(getattr(module, "_is_stateful", False) for module in target.modules()):
        others = ["recurrent"]  # transformers' own mark of models that cannot be rolled back
    if others:
        raise UsageError(
            f"{type(target).__name__} has {others[0]} layers, whose memory cannot be cropped after a rejected block; "
            "evaluate decodes targets with attention layers only, so judge this draft by the accept length that "
            "`pipeline train-draft` reports"
        )


def check_together(target: PreTrainedModel) -> None:
    """Refuse a target that cannot decode several texts at once. UsageError."""
    config = target.config.get_text_config()
    others, kernel = sorted(_kinds(target) - MASKED), config._attn_implementation
    why = None
    if others:
        why = f"has {others[0]} layers, for which no masks of several texts are made here"
    elif kernel not in TAKES_MASKS:
        why = f"attends by {kernel!r}, which takes no masks of several texts"
    elif getattr(config, "alibi", False) or "position_ids" not in signature(target.forward).parameters:
        why = "is not told positions, and texts stand at different ones"
    if why:
        raise UsageError(f"{type(target).__name__} {why}; leave --batch out")


def new_kv() -> DynamicCache:
    """Memory of the target that can be cropped. Made without the config: sliding layers keep every row, masks rule."""
    return DynamicCache()


class OneText:
    """The memory of one text at a time."""

    def __init__(self, target: PreTrainedModel):
        self.target, self.kv, self.rows = target, None, 0

    def add(self, kv: DynamicCache) -> None:
        """Take over what a prefill remembered."""
        self.kv = kv

    def run(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Run the target on the next tokens of each text, and return its logits [B, N, V] after each."""
        self.rows = len(pieces[0])
        ids_1N = torch.tensor([list(pieces[0])], device=self.target.device)
        return self.target(input_ids=ids_1N, past_key_values=self.kv, use_cache=True).logits

    def keep(self, counts: Sequence[int]) -> None:
        """Forget all but the first so many of the tokens that each text was run on."""
        if counts[0] < self.rows:
            self.kv.crop(counts[0] - self.rows)  # negative: so many rows off the end

    def drop(self, text: int) -> None:
        """Forget a text; the last one takes its place."""
        self.kv = None


class _Rows(DynamicLayer):
    """One layer's keys and values of all texts [B, G, L, E]; a forward writes those of its tokens in place."""

    def __init__(self, owner: "ManyTexts", like: DynamicLayer):
        super().__init__()
        self.owner, self.is_initialized = owner, True
        self.dtype, self.device = like.keys.dtype, like.keys.device
        # Zeros: a masked key weighs nothing, but nothing times what uninitialised memory holds may be NaN. Values may
        # have a head size of their own.
        self.keys, self.values = (
            held.new_zeros(owner.texts, held.shape[1], owner.capacity, held.shape[3])
            for held in (like.keys, like.values)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        at_BN = self.owner.at_BN
        text_B1 = torch.arange(len(at_BN), device=at_BN.device)[:, None]
        self.keys[text_B1, :, at_BN] = key_states.transpose(1, 2)
        self.values[text_B1, :, at_BN] = value_states.transpose(1, 2)
        return tuple(held[: len(at_BN), :, : self.owner.reach] for held in (self.keys, self.values))


class ManyTexts:
    """The memory of up to `texts` texts, each in a row of its own, of `capacity` tokens to begin with; methods as
    `OneText`'s."""

    def __init__(self, target: PreTrainedModel, texts: int, capacity: int):
        check_together(target)
        self.target, self.texts, self.capacity = target, texts, capacity
        self.kinds, self.window = _kinds(target), getattr(target.config.get_text_config(), "sliding_window", None)
        self.lengths: list[int] = []
        self.cache, self.at_BN, self.reach = None, None, 0

    def add(self, kv: DynamicCache) -> None:
        self.add_row(kv, 0, kv.get_seq_length())

    def add_row(self, kv: DynamicCache, text: int, length: int) -> None:
        """Take over what a prefill of several texts remembered of one: its first `length` tokens."""
        row = len(self.lengths)
        if self.cache is None:
            self.cache = Cache(layers=[_Rows(self, layer) for layer in kv.layers])
        self._reserve(length)
        for held, fresh in zip(self.cache.layers, kv.layers, strict=True):
            held.keys[row, :, :length] = fresh.keys[text, :, :length]
            held.values[row, :, :length] = fresh.values[text, :, :length]
        self.lengths.append(length)

    def take(self, text: int, length: int) -> DynamicCache:
        """Return what is remembered of a text's first `length` tokens, as a memory of its own."""
        kv = new_kv()
        for number, layer in enumerate(self.cache.layers):
            kv.update(*(held[text : text + 1, :, :length].clone() for held in (layer.keys, layer.values)), number)
        return kv

    def _reserve(self, tokens: int) -> None:
        """Make the rows long enough for so many tokens."""
        if tokens <= self.capacity:
            return
        self.capacity = max(tokens, self.capacity + self.capacity // 2)
        for layer in self.cache.layers:
            layer.keys, layer.values = (
                torch.cat([held, held.new_zeros(*held.shape[:2], self.capacity - held.shape[2], held.shape[3])], dim=2)
                for held in (layer.keys, layer.values)
            )

    def run(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        device, width = self.target.device, max(map(len, pieces))
        filled = [[*piece, *[piece[-1]] * (width - len(piece))] for piece in pieces]  # what fills up is never kept
        self.at_BN = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(width, device=device)
        self.reach = max(self.lengths) + width
        self._reserve(self.reach)
        return self.target(
            input_ids=torch.tensor(filled, device=device),
            attention_mask=self._masks(),
            position_ids=self.at_BN,
            past_key_values=self.cache,
            use_cache=True,
        ).logits

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """What is added to scores [B, 1, N, L]; one for each kind of layer where there are several."""
        key_L, at_BN1 = torch.arange(self.reach, device=self.at_BN.device), self.at_BN[..., None]
        seen = {"full_attention": key_L <= at_BN1}
        if self.window is not None:
            seen["sliding_attention"] = seen["full_attention"] & (key_L > at_BN1 - self.window)
        kinds = self.kinds or {list(seen)[-1]}  # a window and no kinds: all layers slide
        lowest = torch.finfo(self.target.dtype).min
        masks = {
            kind: torch.zeros(seen_BNL.shape, dtype=self.target.dtype, device=key_L.device).masked_fill(
                ~seen_BNL, lowest
            )[:, None]
            for kind, seen_BNL in seen.items()
            if kind in kinds
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def keep(self, counts: Sequence[int]) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def drop(self, text: int) -> None:
        last = len(self.lengths) - 1
        for layer in self.cache.layers:
            for held in (layer.keys, layer.values):
                held[text] = held[last]
        self.lengths[text] = self.lengths[last]
        self.lengths.pop()
