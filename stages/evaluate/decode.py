"""Speculative decoding: the draft guesses a block, the target checks it in one forward. One prompt at a time.

The anchor is the last known token, which the target has not processed yet. A verification runs the target on the
anchor and the draft's proposals; those it keeps are gained, and one token of its own after them. So the output is the
target's, whatever the draft says: its likeliest tokens, or as likely as its own when they are drawn (`rejection.py`).

    K layers   N new rows   D hidden size   P proposals   V vocabulary
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.accept import cut
from pipeline.drafts import Draft, Proposal, Sampling
from pipeline.errors import UsageError
from pipeline.sampling import prompt_generator
from pipeline.target import tap_layers
from stages.evaluate.rejection import keep_by_chance, keep_equal

# Layers that remember one entry a token. A linear attention's memory is a running sum, out of which rejected tokens
# cannot be taken; other kinds keep more than keys and values.
CROPPABLE = {"full_attention", "sliding_attention", "chunked_attention"}


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


def check_croppable(target: PreTrainedModel) -> None:
    """Refuse a target from whose memory rejected tokens cannot be removed. UsageError."""
    others = sorted(set(getattr(target.config.get_text_config(), "layer_types", None) or ()) - CROPPABLE)
    if not others and any(getattr(module, "_is_stateful", False) for module in target.modules()):
        others = ["recurrent"]  # transformers' own mark of models that cannot be rolled back
    if others:
        raise UsageError(
            f"{type(target).__name__} has {others[0]} layers, whose memory cannot be cropped after a rejected block; "
            "evaluate decodes targets with attention layers only, so judge this draft by the accept length that "
            "`pipeline train-draft` reports"
        )


def new_kv() -> DynamicCache:
    """Memory of the target that can be cropped. Made without the config: sliding layers keep every row, masks rule."""
    return DynamicCache()


@torch.no_grad()
def speculative_decode(
    target: PreTrainedModel,
    draft: Draft,
    prompt_ids: Sequence[int],
    max_new: int,
    stop_ids: Collection[int] = (),
    *,
    proposals: int | None = None,
    dice: Dice | None = None,
    threshold: float = 0.0,
) -> Decoded:
    """Decode with target and draft, at most `max_new` tokens after a prompt of at least one: greedily, or with `dice`.

    A stop token ends the reply and belongs to it. `proposals` verifies only the first so many of each block; later
    ones never change them. `threshold` cuts each block where the draft's confidence falls below it; where nothing is
    left, a verification is a plain step. Target and draft are in evaluation mode on one device.
    """
    check_croppable(target)
    assert len(prompt_ids) > 0 and max_new > 0, f"{len(prompt_ids)} prompt tokens, {max_new} new ones"
    layers, stops = draft.config.target_layer_ids, frozenset(stop_ids)
    keep, sampling = _rules(dice, prompt_ids)
    began = time.perf_counter()
    ids, lengths, kept, proposed = list(prompt_ids), [], [], []
    kv, draft_kv = new_kv(), draft.new_kv()
    with tap_layers(target, layers) as taken:
        logits_NV = _run(target, ids, kv, last=True)
        ids += keep(nothing(logits_NV.device), logits_NV)
        features_KND = torch.cat([taken[layer] for layer in layers])
        start, ended = len(prompt_ids), ids[-1] in stops
        while start < len(prompt_ids) + max_new and not ended:
            block = _first(draft.propose(features_KND, ids[start], start, draft_kv, sampling, threshold), proposals)
            logits_NV = _run(target, [ids[start], *block.ids_P.tolist()], kv)
            tokens, count = keep(block, logits_NV), len(block.ids_P)
            matched, gained, ended = cut(tokens, stops)
            ids += tokens[:gained]
            lengths.append(gained)
            kept.append(matched)
            proposed.append(count)
            features_KND = torch.cat([taken[layer][:, :gained] for layer in layers])
            if gained <= count:
                kv.crop(gained - count - 1)  # negative: so many rows off the end
            start += gained
    new = ids[len(prompt_ids) : len(prompt_ids) + max_new]
    return Decoded(new, lengths, kept, proposed, 1 + len(lengths), time.perf_counter() - began)


def _rules(dice: Dice | None, prompt_ids: Sequence[int]) -> tuple[Callable, Sampling | None]:
    """Return how the target keeps proposals, and how the draft makes them; both draw from one generator."""
    if dice is None:
        return keep_equal, None
    generator = prompt_generator(dice.seed, prompt_ids)
    keep = partial(keep_by_chance, temperature=dice.temperature, generator=generator)
    return keep, Sampling(dice.draft_temperature, generator) if dice.draft_temperature else None


def nothing(device: torch.device) -> Proposal:
    """What the prefill verifies."""
    return Proposal(torch.zeros(0, dtype=torch.long, device=device), None)


def _first(block: Proposal, count: int | None) -> Proposal:
    return Proposal(block.ids_P[:count], None if block.q_PV is None else block.q_PV[:count])


def _run(target: PreTrainedModel, ids: list[int], kv: DynamicCache, last: bool = False) -> Tensor:
    """Run the target on the next tokens and return its logits [N, V] after each, or after the last."""
    input_1N = torch.tensor([ids], device=target.device)
    kept = 1 if last else 0
    return target(input_ids=input_1N, past_key_values=kv, use_cache=True, logits_to_keep=kept).logits[0]
