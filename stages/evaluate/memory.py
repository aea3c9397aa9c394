"""What the target remembers of the texts being decoded: transformers' own cache for one, rows of a shared one for many.

Texts differ in length, so each row is written where its own text stands, and a mask says what its queries may see: the
keys at their own and at earlier positions. Rejected tokens are not taken out; the next block overwrites them, and until
then they lie at later positions.

    B texts   N new rows of each   L keys   V vocabulary   G key/value heads   E head size
"""

from collections.abc import Sequence

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
    others, kernel = sorted(_kinds(target) - MASKED), target.config._attn_implementation
    why = f"has {others[0]} layers" if others else f"attends by {kernel!r}" if kernel not in TAKES_MASKS else None
    if why:
        raise UsageError(
            f"{type(target).__name__} {why}, for which no masks of several texts are made here; leave --batch out"
        )


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
    """One layer's keys and values of all texts [B, G, capacity, E]; a forward writes those of its tokens in place."""

    def __init__(self, owner: "ManyTexts", like: Tensor):
        super().__init__()
        self.owner = owner
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        self.keys, self.values = (like.new_zeros(0, like.shape[1], 0, like.shape[3]) for _ in range(2))

    def resize(self, texts: int, capacity: int) -> None:
        # Zeros: a masked key weighs nothing, but nothing times what uninitialised memory holds may be NaN.
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(texts, old.shape[1], capacity, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        at_BN = self.owner.at_BN
        text_B1 = torch.arange(len(at_BN), device=at_BN.device)[:, None]
        self.keys[text_B1, :, at_BN] = key_states.transpose(1, 2)
        self.values[text_B1, :, at_BN] = value_states.transpose(1, 2)
        return tuple(held[: len(at_BN), :, : self.owner.reach] for held in (self.keys, self.values))


class ManyTexts:
    """The memory of several texts, each in a row of its own. Methods as those of `OneText`."""

    def __init__(self, target: PreTrainedModel):
        check_together(target)
        config = target.config.get_text_config()
        self.target, self.kinds, self.window = target, _kinds(target), getattr(config, "sliding_window", None)
        self.lengths: list[int] = []
        self.cache, self.at_BN, self.reach = None, None, 0

    def add(self, kv: DynamicCache) -> None:
        length = kv.get_seq_length()
        if self.cache is None:
            self.cache = Cache(layers=[_Rows(self, layer.keys) for layer in kv.layers])
        self._make_room(len(self.lengths) + 1, length)
        for held, fresh in zip(self.cache.layers, kv.layers, strict=True):
            held.keys[len(self.lengths), :, :length] = fresh.keys[0]
            held.values[len(self.lengths), :, :length] = fresh.values[0]
        self.lengths.append(length)

    def _make_room(self, texts: int, length: int) -> None:
        """Grow by doubling: what is held is copied a few times in all."""
        has_texts, _, has_length, _ = self.cache.layers[0].keys.shape
        if texts > has_texts or length > has_length:
            texts = has_texts if texts <= has_texts else max(texts, 2 * has_texts)
            length = has_length if length <= has_length else max(length, 2 * has_length)
            for layer in self.cache.layers:
                layer.resize(texts, length)

    def run(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        device, width = self.target.device, max(map(len, pieces))
        filled = [[*piece, *[piece[-1]] * (width - len(piece))] for piece in pieces]  # what fills up is never kept
        self.at_BN = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(width, device=device)
        self.reach = max(self.lengths) + width
        self._make_room(len(self.lengths), self.reach)
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
