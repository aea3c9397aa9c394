"""Speculative decoding: the draft guesses a block, the target checks it in one forward. Greedy, one prompt at a time.

The anchor is the last known token, which the target has not processed yet. A verification runs the target on the
anchor and the draft's proposals; those that equal the target's own choice are kept, and the target's choice after
them is gained too. So the output is the target's, whatever the draft says.

    K layers   T new rows   D hidden size   P proposals
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.accept import gain
from pipeline.drafts import Draft
from pipeline.errors import UsageError
from pipeline.target import tap_layers

# Layers that remember one entry a token. A linear attention's memory is a running sum, out of which rejected tokens
# cannot be taken; other kinds keep more than keys and values.
CROPPABLE = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Decoded:
    """A reply and what it took. `ids` is cut to the limit; `lengths` and `matched` hold one entry a verification.

    lengths: tokens gained, the target's own included; the last one uncut by the limit, but never past a stop token.
    matched: proposals kept. target_calls: the prefill and every verification.
    """

    ids: list[int]
    lengths: list[int]
    matched: list[int]
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
    proposals: int | None = None,
) -> Decoded:
    """Decode greedily with target and draft, at most `max_new` tokens after a prompt of at least one.

    A stop token ends the reply and belongs to it. `proposals` verifies only the first so many of each block; later
    ones never change them. Target and draft are in evaluation mode on one device.
    """
    check_croppable(target)
    assert len(prompt_ids) > 0 and max_new > 0, f"{len(prompt_ids)} prompt tokens, {max_new} new ones"
    layers, stops = draft.config.target_layer_ids, frozenset(stop_ids)
    began = time.perf_counter()
    ids, lengths, kept = list(prompt_ids), [], []
    kv, draft_kv = new_kv(), draft.new_kv()
    with tap_layers(target, layers) as taken:
        chosen = _run(target, ids, kv, last=True)
        features_KTD = torch.cat([taken[layer] for layer in layers])
        ids += chosen
        start, ended = len(prompt_ids), chosen[0] in stops
        while start < len(prompt_ids) + max_new and not ended:
            proposed = draft.propose(features_KTD, ids[start], start, draft_kv).ids_P[:proposals].tolist()
            chosen = _run(target, [ids[start], *proposed], kv)
            matched, gained, ended = gain(proposed, chosen, stops)
            ids += chosen[:gained]
            lengths.append(gained)
            kept.append(matched)
            features_KTD = torch.cat([taken[layer][:, :gained] for layer in layers])
            if gained <= len(proposed):
                kv.crop(gained - len(proposed) - 1)  # negative: so many rows off the end
            start += gained
    new = ids[len(prompt_ids) : len(prompt_ids) + max_new]
    return Decoded(new, lengths, kept, 1 + len(lengths), time.perf_counter() - began)


def _run(target: PreTrainedModel, ids: list[int], kv: DynamicCache, last: bool = False) -> list[int]:
    """Run the target on the next tokens and return its choice after each, or after the last."""
    input_1T = torch.tensor([ids], device=target.device)
    logits_1TV: Tensor = target(
        input_ids=input_1T, past_key_values=kv, use_cache=True, logits_to_keep=1 if last else 0
    ).logits
    return logits_1TV[0].argmax(-1).tolist()
