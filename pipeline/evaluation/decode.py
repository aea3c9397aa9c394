"""Speculative decoding: the draft proposes a block of tokens, the target verifies it in one forward.

The anchor is the last known token, which the target has not processed yet. A step, from top to bottom of this file:

1. The draft proposes up to P tokens after the anchor.
2. The target runs on the anchor and the proposals: N = P + 1 rows.
3. The accepted proposals are gained, and one token of the target's own, the next anchor.
4. The target's kv cache is rolled back to the tokens before that anchor. The draft's never holds any other.

So the output is the target's, whatever the draft proposes: its greedy tokens, or samples of its own distribution.

    B sequences   K layers   N new rows   D hidden size   P proposals   V vocabulary
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.drafts import BlockRequest, Draft, DraftKV, Proposal, Sampling
from pipeline.errors import UsageError
from pipeline.evaluation.accept_length import accepted_tokens, cut_at_stop
from pipeline.target.kv_cache import BatchedKV, SingleKV, check_croppable, kv_argument, new_kv
from pipeline.target.model import tap_layers
from pipeline.tensors import draw, uniforms

PROGRESS_SECONDS = 5.0  # between lines where there is no terminal
MIN_TEMPERATURE = 1e-3  # the lowest temperature above 0
T = TypeVar("T")


@dataclass(frozen=True)
class SamplingOptions:
    """How replies are sampled: the target's temperature, the draft's temperature for proposals, and the seed.

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
            if not (MIN_TEMPERATURE <= given < float("inf") or (given == 0 and name != "temperature")):
                raise UsageError(f"{name} {given}: draws need {MIN_TEMPERATURE} or more; 0 is for greedy decoding")


@dataclass(frozen=True)
class Decoded:
    """A decoded reply and its statistics. `ids` is cut to the limit; the lists hold one entry a verification.

    lengths: tokens gained, the target's own included; the last one uncut by the limit, but never past a stop token.
    matched: proposals kept. proposed: proposals verified. accepted: proposals that the target would have said, those
    after a stop token included.
    """

    ids: list[int]
    lengths: list[int]
    matched: list[int]
    proposed: list[int]
    accepted: list[int]
    seconds: float


def speculative_decode(
    target: PreTrainedModel, draft: Draft, prompt_ids: Sequence[int], max_new: int, *args, **options
) -> Decoded:
    """Decode one prompt; arguments as of `decode_many`."""
    return next(decode_many(target, draft, [prompt_ids], max_new, *args, **options))[1]


@torch.no_grad()
def decode_calls(
    target: PreTrainedModel, draft: Draft, prompt_ids: Sequence[int], max_new: int, stop_ids: Collection[int] = ()
) -> Iterator[tuple[list[int], int, int]]:
    """Decode one prompt greedily; yield what each call of the target gained: its tokens, the proposals among them, and
    how many were proposed. Arguments and reply are those of `decode_many`; the prefill comes first and gains one token.
    """
    check_croppable(target)
    kv_cache, stops = SingleKV(target), frozenset(stop_ids)
    sequence = _Sequence(0, prompt_ids, draft.new_kv(), None)
    kv_cache.add(_prefill(target, draft, sequence, stops))
    end = sequence.prompt + max_new
    yield sequence.ids[sequence.prompt :], 0, 0
    while not sequence.ended and (known := len(sequence.ids)) < end:
        _decode_step(target, draft, kv_cache, [sequence], stops, None, None, 0.0)
        gained = sequence.ids[known:end]
        yield gained, min(sequence.matched[-1], len(gained)), sequence.proposed[-1]


@torch.no_grad()
def decode_many(
    target: PreTrainedModel,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    stop_ids: Collection[int] = (),
    *,
    proposals: int | None = None,
    sampling: SamplingOptions | None = None,
    threshold: float = 0.0,
    batch: int = 1,
) -> Iterator[tuple[int, Decoded]]:
    """Yield each prompt's index and its decoded reply, in the order they end; `batch` prompts are decoded at once.

    Each prompt has at least one token and gets at most `max_new`: the target's likeliest, or drawn as `sampling` says.
    A stop token ends the reply and belongs to it. `proposals` verifies only the first so many of each block; later ones
    never change them. `threshold` cuts each block where the draft's confidence falls below it; an empty block makes the
    verification a plain step. Target and draft are in evaluation mode on one device. A finished prompt is replaced by
    the next (continuous batching), so with `batch` > 1 the seconds of a prompt include work on others.
    """
    check_croppable(target)
    assert max_new > 0 and all(len(ids) > 0 for ids in prompts), f"{max_new} new tokens after {prompts}"
    kv_cache = SingleKV(target)
    if batch > 1:
        kv_cache = BatchedKV(target, batch, max(map(len, prompts)) + max_new + draft.config.proposals)
    waiting, live, stops = deque(enumerate(prompts)), [], frozenset(stop_ids)
    while waiting or live:
        while waiting and len(live) < batch:
            index, ids = waiting.popleft()
            sequence = _Sequence(index, ids, draft.new_kv(), sampling)
            kv = _prefill(target, draft, sequence, stops)
            if sequence.finished(max_new):
                yield index, sequence.decoded(max_new)
            else:
                kv_cache.add(kv)
                live.append(sequence)
        if live:
            _decode_step(target, draft, kv_cache, live, stops, proposals, sampling, threshold)
        for position in reversed(range(len(live))):
            if live[position].finished(max_new):
                kv_cache.remove(position)
                sequence, live[position] = live[position], live[-1]
                live.pop()
                yield sequence.index, sequence.decoded(max_new)


def with_progress(ended: Iterable[T], count: int, doing: str) -> Iterator[T]:
    """Yield finished items and report progress: a bar on a terminal, a line every few seconds elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(ended, doing, total=count, console=console, transient=True)
        return
    last_report = time.monotonic()
    for number, item in enumerate(ended, 1):
        yield item
        if time.monotonic() - last_report > PROGRESS_SECONDS:
            last_report = time.monotonic()
            print(f"{doing}: {number} of {count} prompts", file=sys.stderr)


def _prefill(target: PreTrainedModel, draft: Draft, sequence: "_Sequence", stops: Collection[int]) -> DynamicCache:
    """Run the target over a prompt, append its first token, and return the target's kv cache."""
    layers, count = draft.config.target_layer_ids, len(sequence.ids)
    input_1N = torch.tensor([sequence.ids], device=target.device)
    for wanted in (1, 0):  # 0: all. Where layers share keys, one row of logits may be one row of their states as well
        kv = new_kv()
        with tap_layers(target, layers) as taken:
            output = target(input_ids=input_1N, **kv_argument(target, kv), logits_to_keep=wanted)
        if all(taken[layer].shape[1] == count for layer in layers):
            break
    logits_1V = output.logits[0, -1:]
    nothing = Proposal(torch.zeros(0, dtype=torch.long, device=logits_1V.device), None)
    sequence.ids += sequence.accept_rule(nothing, logits_1V)
    sequence.ended = sequence.ids[-1] in stops
    sequence.features_KTD = torch.cat([taken[layer] for layer in layers])
    return kv


def _decode_step(
    target: PreTrainedModel,
    draft: Draft,
    kv_cache: SingleKV | BatchedKV,
    live: Sequence["_Sequence"],
    stops: Collection[int],
    proposals: int | None,
    sampling: SamplingOptions | None,
    threshold: float,
) -> None:
    """Propose a block for every sequence, verify all in one forward, append what is accepted, roll the rest back."""
    layers, draft_sampling = draft.config.target_layer_ids, None
    if sampling is not None and sampling.draft_temperature:
        draft_sampling = Sampling(sampling.draft_temperature, [sequence.generator for sequence in live])
    requests = [
        BlockRequest(sequence.features_KTD, sequence.ids[sequence.start], sequence.start, sequence.kv)
        for sequence in live
    ]
    blocks = [_first(block, proposals) for block in draft.propose(requests, draft_sampling, threshold)]
    inputs = [
        [sequence.ids[sequence.start], *block.ids_P.tolist()] for sequence, block in zip(live, blocks, strict=True)
    ]
    with tap_layers(target, layers) as taken:
        logits_BNV = kv_cache.run(inputs)
    features_BKND = torch.stack([taken[layer] for layer in layers], dim=1)
    gained = [
        sequence.accept(block, logits_NV[: len(ids)], features_KND, stops)
        for sequence, block, ids, logits_NV, features_KND in zip(
            live, blocks, inputs, logits_BNV, features_BKND, strict=True
        )
    ]
    kv_cache.crop(gained)


def _first(block: Proposal, count: int | None) -> Proposal:
    return Proposal(block.ids_P[:count], None if block.q_PV is None else block.q_PV[:count])


class _Sequence:
    """A prompt being decoded: its reply so far and the target features that the next block is drafted from."""

    def __init__(self, index: int, prompt_ids: Sequence[int], kv: DraftKV, sampling: SamplingOptions | None):
        self.index, self.prompt, self.ids, self.kv = index, len(prompt_ids), list(prompt_ids), kv
        self.accept_rule, self.generator = _acceptance_rule(sampling, prompt_ids)
        self.lengths, self.matched, self.proposed, self.accepted = [], [], [], []
        self.features_KTD: Tensor | None = None
        self.start, self.ended, self.start_time = self.prompt, False, time.perf_counter()

    def accept(self, block: Proposal, logits_NV: Tensor, features_KND: Tensor, stops: Collection[int]) -> int:
        """Append the accepted tokens of a verified block; return how many tokens were gained."""
        tokens = self.accept_rule(block, logits_NV)
        matched, gained, self.ended = cut_at_stop(tokens, stops)
        self.ids += tokens[:gained]
        self.start += gained
        self.features_KTD = features_KND[:, :gained]
        self.lengths.append(gained)
        self.matched.append(matched)
        self.proposed.append(len(block.ids_P))
        self.accepted.append(len(tokens) - 1)
        return gained

    def finished(self, max_new: int) -> bool:
        return self.ended or self.start >= self.prompt + max_new

    def decoded(self, max_new: int) -> Decoded:
        new, seconds = self.ids[self.prompt : self.prompt + max_new], time.perf_counter() - self.start_time
        return Decoded(new, self.lengths, self.matched, self.proposed, self.accepted, seconds)


def _acceptance_rule(
    sampling: SamplingOptions | None, prompt_ids: Sequence[int]
) -> tuple[Callable, torch.Generator | None]:
    """Return the acceptance rule of a sequence, and the generator that both it and the draft sample from."""
    if sampling is None:
        return accept_greedy, None
    generator = prompt_generator(sampling.seed, prompt_ids)
    return partial(rejection_sample, temperature=sampling.temperature, generator=generator), generator


def prompt_generator(seed: int, prompt_ids: list[int]) -> torch.Generator:
    """Return a generator seeded by the seed and the prompt's tokens only, not by order, count or device."""
    digest = blake2b(np.array([seed, *prompt_ids], "<i8").tobytes(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def accept_greedy(proposal: Proposal, logits_NV: Tensor) -> list[int]:
    """Return the proposals before the first that is not the target's likeliest token, and that token."""
    return accepted_tokens(proposal.ids_P.tolist(), logits_NV.argmax(-1).tolist())


def rejection_sample(
    proposal: Proposal, logits_NV: Tensor, temperature: float, generator: torch.Generator
) -> list[int]:
    """Return the proposals kept and one token of the target's own, together distributed as softmax(logits / T) says.

    Lossless rejection sampling (Leviathan et al., arXiv:2211.17192, algorithm 1 and appendix A.1) keeps proposal x of a
    slot with probability min(1, p(x) / q(x)), p being the target's distribution there and q the one that x was drawn
    from. The first one rejected is replaced by a draw from max(p - q, 0), normalised; after a block kept whole comes a
    draw from p. That holds for any q, on two conditions: x was drawn from this very q, and whether a slot proposes
    anything at all depends on the tokens before it only, never on x.

    A proposal without q is that of a greedy draft: one-hot, so it is kept with probability p(x), and a replacement is
    drawn from p without x. Takes P + 1 numbers off the generator, whatever is kept: the last one is for the draw, since
    a number that has refused a proposal is no longer uniform.
    """
    p_NV = (logits_NV.double() / temperature).softmax(-1)
    count, uniform_N = len(proposal.ids_P), uniforms(len(p_NV), generator)
    q_PV = one_hot(proposal.ids_P, p_NV) if proposal.q_PV is None else proposal.q_PV.to(p_NV)
    p_P, q_P = (rows_PV.gather(-1, proposal.ids_P[:, None])[:, 0] for rows_PV in (p_NV[:count], q_PV))
    kept_P = uniform_N[:count].to(p_P) * q_P < p_P  # without a division: q may be next to 0, and p exactly 0
    kept = int(kept_P.long().cumprod(0).sum())
    weights_V = p_NV[kept] if kept == count else residual(p_NV[kept], q_PV[kept])
    return [*proposal.ids_P[:kept].tolist(), int(draw(weights_V[None], uniform_N[-1:]))]


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """Return the weights [V] that a replacement is drawn from: what p has over q.

    Where rounding leaves nothing, p and q are equal but for it, and p itself serves: a refusal there has a chance of
    about 1e-16, or 1e-7 where q is float32.
    """
    left_V = (p_V - q_V).clamp(min=0)
    return left_V if left_V.any() else p_V


def one_hot(ids_P: Tensor, p_NV: Tensor) -> Tensor:
    """Return the distribution [P, V] that a greedy draft's proposals are drawn from."""
    return torch.zeros_like(p_NV[: len(ids_P)]).scatter_(-1, ids_P[:, None], 1.0)
