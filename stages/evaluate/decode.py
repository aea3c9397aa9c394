"""Speculative decoding: the draft guesses a block, the target checks it in one forward.

The anchor is the last known token, which the target has not processed yet. A verification runs the target on the
anchor and the draft's proposals; those it keeps are gained, and one token of its own after them. So the output is the
target's, whatever the draft says: its likeliest tokens, or as likely as its own when they are drawn (`rejection.py`).

    B texts   K layers   N new rows   D hidden size   P proposals   V vocabulary
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.drafts import BlockRequest, Draft, DraftKV, Proposal, Sampling
from pipeline.errors import UsageError
from pipeline.evaluation.accept_length import cut
from pipeline.sampling import prompt_generator
from pipeline.target.kv_cache import BatchedKV, SingleKV, check_croppable, new_kv
from pipeline.target.model import tap_layers
from stages.evaluate.rejection import keep_by_chance, keep_equal

LOWEST = 1e-3  # the lowest temperature above 0


@dataclass(frozen=True)
class Dice:
    """What a reply is drawn with: from the target at one temperature, proposals from the draft at another, its own.

    draft_temperature: 0 for the draft's likeliest tokens. seed: with the prompt's tokens, decides every draw.
    """

    temperature: float
    draft_temperature: float
    seed: int = 0

    def __post_init__(self):
        if self.temperature == 0 < self.draft_temperature:
            raise UsageError(
                f"a draft temperature of {self.draft_temperature:g} is for drawn replies; add --temperature"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed}: wanted one of 64 bits, such as 0")
        for name, given in (("temperature", self.temperature), ("draft temperature", self.draft_temperature)):
            if not (LOWEST <= given < float("inf") or (given == 0 and name != "temperature")):
                raise UsageError(f"{name} {given}: draws need {LOWEST} or more; 0 is for greedy decoding")


@dataclass(frozen=True)
class Decoded:
    """A reply and what it took. `ids` is cut to the limit; the lists hold one entry a verification.

    lengths: tokens gained, the target's own included; the last one uncut by the limit, but never past a stop token.
    matched: proposals kept. proposed: proposals verified. target_calls: the prefill and every verification.
    """

    ids: list[int]
    lengths: list[int]
    matched: list[int]
    proposed: list[int]
    target_calls: int
    seconds: float


class _Text:
    """A prompt, its reply so far, and what its next block is made from."""

    def __init__(self, index: int, prompt_ids: Sequence[int], kv: DraftKV, dice: Dice | None):
        self.index, self.prompt, self.ids, self.kv = index, len(prompt_ids), list(prompt_ids), kv
        self.keep, self.generator = _rule(dice, prompt_ids)
        self.lengths, self.matched, self.proposed = [], [], []
        self.features_KTD: Tensor | None = None
        self.start, self.ended, self.began = self.prompt, False, time.perf_counter()

    def block_request(self) -> BlockRequest:
        return BlockRequest(self.features_KTD, self.ids[self.start], self.start, self.kv)

    def take(self, block: Proposal, logits_NV: Tensor, features_KND: Tensor, stops: Collection[int]) -> int:
        """Keep of a verified block what the target keeps, and return how many tokens were gained."""
        tokens = self.keep(block, logits_NV)
        matched, gained, self.ended = cut(tokens, stops)
        self.ids += tokens[:gained]
        self.start += gained
        self.features_KTD = features_KND[:, :gained]
        self.lengths.append(gained)
        self.matched.append(matched)
        self.proposed.append(len(block.ids_P))
        return gained

    def done(self, max_new: int) -> bool:
        return self.ended or self.start >= self.prompt + max_new

    def decoded(self, max_new: int) -> Decoded:
        new, seconds = self.ids[self.prompt : self.prompt + max_new], time.perf_counter() - self.began
        return Decoded(new, self.lengths, self.matched, self.proposed, 1 + len(self.lengths), seconds)


def speculative_decode(
    target: PreTrainedModel, draft: Draft, prompt_ids: Sequence[int], max_new: int, *args, **options
) -> Decoded:
    """Decode one prompt; arguments as of `decode_many`."""
    return next(decode_many(target, draft, [prompt_ids], max_new, *args, **options))[1]


@torch.no_grad()
def decode_many(
    target: PreTrainedModel,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    stop_ids: Collection[int] = (),
    *,
    proposals: int | None = None,
    dice: Dice | None = None,
    threshold: float = 0.0,
    batch: int = 1,
) -> Iterator[tuple[int, Decoded]]:
    """Yield each prompt's index and its decoded reply, in the order they end; `batch` prompts are decoded at once.

    At most `max_new` tokens after a prompt of at least one: the target's likeliest, or drawn with `dice`. A stop token
    ends the reply and belongs to it. `proposals` verifies only the first so many of each block; later ones never change
    them. `threshold` cuts each block where the draft's confidence falls below it; where nothing is left, a verification
    is a plain step. Target and draft are in evaluation mode on one device. Where a prompt ends the next one begins, so
    one round's forwards serve prompts at different places; with several at once, the seconds of each are not its own.
    """
    check_croppable(target)
    assert max_new > 0 and all(len(ids) > 0 for ids in prompts), f"{max_new} new tokens after {prompts}"
    memory = SingleKV(target)
    if batch > 1:
        memory = BatchedKV(target, batch, max(map(len, prompts)) + max_new + draft.config.proposals)
    waiting, live, stops = deque(enumerate(prompts)), [], frozenset(stop_ids)
    while waiting or live:
        while waiting and len(live) < batch:
            index, ids = waiting.popleft()
            text = _Text(index, ids, draft.new_kv(), dice)
            kv = _prefill(target, draft, text, stops)
            if text.done(max_new):
                yield index, text.decoded(max_new)
            else:
                memory.add(kv)
                live.append(text)
        if live:
            _round(target, draft, memory, live, stops, proposals, dice, threshold)
        for place in reversed(range(len(live))):
            if live[place].done(max_new):
                memory.remove(place)
                text, live[place] = live[place], live[-1]
                live.pop()
                yield text.index, text.decoded(max_new)


def _prefill(target: PreTrainedModel, draft: Draft, text: _Text, stops: Collection[int]) -> DynamicCache:
    """Run the target over a prompt, take its first token, and return what the target remembers."""
    layers, count = draft.config.target_layer_ids, len(text.ids)
    input_1N = torch.tensor([text.ids], device=target.device)
    for wanted in (1, 0):  # 0: all. Where layers share keys, one row of logits may be one row of their states as well
        kv = new_kv()
        with tap_layers(target, layers) as taken:
            output = target(input_ids=input_1N, past_key_values=kv, use_cache=True, logits_to_keep=wanted)
        if all(taken[layer].shape[1] == count for layer in layers):
            break
    logits_1V = output.logits[0, -1:]
    text.ids += text.keep(nothing(logits_1V.device), logits_1V)
    text.ended = text.ids[-1] in stops
    text.features_KTD = torch.cat([taken[layer] for layer in layers])
    return kv


def _round(
    target: PreTrainedModel,
    draft: Draft,
    memory: SingleKV | BatchedKV,
    live: Sequence[_Text],
    stops: Collection[int],
    proposals: int | None,
    dice: Dice | None,
    threshold: float,
) -> None:
    """Propose a block for every text, verify them in one forward, and keep what the target keeps."""
    layers, sampling = draft.config.target_layer_ids, None
    if dice is not None and dice.draft_temperature:
        sampling = Sampling(dice.draft_temperature, [text.generator for text in live])
    blocks = [
        _first(block, proposals)
        for block in draft.propose([text.block_request() for text in live], sampling, threshold)
    ]
    pieces = [[text.ids[text.start], *block.ids_P.tolist()] for text, block in zip(live, blocks, strict=True)]
    with tap_layers(target, layers) as taken:
        logits_BNV = memory.run(pieces)
    features_BKND = torch.stack([taken[layer] for layer in layers], dim=1)
    memory.crop(
        [
            text.take(block, logits_NV[: len(piece)], features_KND, stops)
            for text, block, piece, logits_NV, features_KND in zip(
                live, blocks, pieces, logits_BNV, features_BKND, strict=True
            )
        ]
    )


def _rule(dice: Dice | None, prompt_ids: Sequence[int]) -> tuple[Callable, torch.Generator | None]:
    """Return how the target keeps proposals of a text, and the generator that both it and the draft draw from."""
    if dice is None:
        return keep_equal, None
    generator = prompt_generator(dice.seed, prompt_ids)
    return partial(keep_by_chance, temperature=dice.temperature, generator=generator), generator


def nothing(device: torch.device) -> Proposal:
    """What the prefill verifies."""
    return Proposal(torch.zeros(0, dtype=torch.long, device=device), None)


def _first(block: Proposal, count: int | None) -> Proposal:
    return Proposal(block.ids_P[:count], None if block.q_PV is None else block.q_PV[:count])
