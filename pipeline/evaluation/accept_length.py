"""The accept length: the mean number of tokens gained per target call, the target's own token included.

Exact and without the target: the held-out replies are the target's own greedy ones, so what it would have accepted is
in the cache. The draft's proposals are rolled out at every anchor of a reply, in parallel, and decoding is replayed
over them: from anchor a to a + gained, and so on. A reply that is not greedy is followed up to its first token that
differs from the greedy one of the stored `final`.

    T rows of a sample   N blocks   S slots   P proposals   R rows that keep `final`   D hidden size
    B resamples   n prompts
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field

from pipeline.drafts import Draft, lay_blocks, pack
from pipeline.json_files import Count, Number, Numbers, Record
from pipeline.target.head import chunk_rows
from pipeline.tensors import free_cached_memory, out_of_memory

if TYPE_CHECKING:
    from pipeline.cache import HiddenCache, Sample

SLOTS_AT_ONCE = 4096  # slots of one forward: bounds memory, changes nothing
RESAMPLES = 1000


@dataclass(frozen=True)
class Span:
    """One decoded reply of a sample. The three lists have an entry for each verify step, as those of `Decoded`.

    start: index of the reply's first token; the prompt is before it. lengths: tokens gained. matched: proposals kept.
    proposed: proposals verified. complete: False where the target's own reply is not known to its end or to the limit,
    so that decoding would go on beyond `lengths`. proposals: of a whole block.
    """

    sample: int
    domain: str
    start: int
    lengths: list[int]
    matched: list[int]
    proposed: list[int]
    complete: bool
    proposals: int


def accepted_tokens(proposed: Sequence[int], chosen: Sequence[int | None]) -> list[int | None]:
    """Return the proposals before the first that the target would not have chosen, and its own token there.

    chosen: the target's token at each proposal's position and at the next one; None where it is not known.
    """
    assert len(chosen) == len(proposed) + 1, f"{len(proposed)} proposals verified by {len(chosen)} tokens"
    matched = 0
    while matched < len(proposed) and proposed[matched] == chosen[matched]:
        matched += 1
    return list(chosen[: matched + 1])


def cut_at_stop(tokens: Sequence[int | None], stop_ids: Collection[int]) -> tuple[int, int, bool]:
    """Return proposals kept, tokens gained, and whether the reply ends, for the accepted tokens of one verify step.

    tokens: the proposals kept and one of the target's own. A stop token ends the reply, also among the proposals, with
    no token after it.
    """
    for count, token in enumerate(tokens, 1):
        if token in stop_ids:
            return min(len(tokens) - 1, count), count, True
    return len(tokens) - 1, len(tokens), False


@dataclass(frozen=True)
class KnownReply:
    """The target's own greedy reply from row `start` on, as far as the cache knows it.

    tokens: its known tokens. confirmed: how many of them the sample has too; blocks can be laid from these only.
    """

    start: int
    tokens: list[int]
    confirmed: int

    def anchor_count(self, stop_ids: Collection[int], max_new: int | None) -> int:
        """How many tokens, from the first on, decoding may start a block from."""
        live = self.confirmed - (self.confirmed > 0 and self.tokens[self.confirmed - 1] in stop_ids)
        return live if max_new is None else min(live, max_new)


def known_reply(
    ids_T: Sequence[int], greedy_T: Sequence[int], start: int, stop: int, stops: Collection[int]
) -> KnownReply:
    """Follow the reply ids[start:stop] for as long as it is greedy; greedy[t] is the target's choice after row t.

    The first choice that differs, or the one after the reply's end, is known as well. A stop token ends it.
    """
    tokens = []
    for row in range(start, stop + 1):
        tokens.append(greedy_T[row - 1])
        if row == stop or tokens[-1] != ids_T[row]:
            return KnownReply(start, tokens, row - start)
        if tokens[-1] in stops:
            break
    return KnownReply(start, tokens, len(tokens))


def replay_decoding(
    reply: KnownReply, proposed_NP: Sequence[Sequence[int]], stops: Collection[int], max_new: int | None
) -> tuple[list[int], list[int], list[int], bool]:
    """Return `lengths`, `matched`, `proposed` and `complete` of the reply's span.

    proposed_NP: the proposals of the blocks at its first N tokens.
    """
    lengths, matched, proposed, at = [], [], [], 0
    ended = reply.tokens[0] in stops
    while not ended and (max_new is None or at < max_new):
        if at >= len(proposed_NP):
            return lengths, matched, proposed, False
        block = proposed_NP[at]
        known = reply.tokens[at + 1 : at + 2 + len(block)]
        unknown = len(block) + 1 - len(known)
        kept, gained, ended = cut_at_stop(accepted_tokens(block, known + [None] * unknown), stops)
        if not ended and len(known) <= kept < len(block):
            return lengths, matched, proposed, False  # whether the target accepts the next proposal is not known
        lengths.append(gained)
        matched.append(kept)
        proposed.append(len(block))
        at += gained
    return lengths, matched, proposed, True


def reply_spans(mask_T: np.ndarray) -> list[tuple[int, int]]:
    """Return the runs [start, stop) of supervised rows that have a prompt before them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask_T, np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start > 0]


@torch.no_grad()
def accept_spans(
    draft: Draft,
    cache: "HiddenCache",
    indices: Iterable[int],
    thresholds: Sequence[float] = (0.0,),
    *,
    max_new: int | None = None,
    context: int = 3072,
) -> list[list[Span]]:
    """Measure every reply of the samples `indices`, at most `max_new` tokens of each; return a list for each threshold.

    A threshold cuts blocks as in decoding; the blocks are computed once. Samples are packed into micro-batches of about
    `context` rows. The draft is in evaluation mode, and computes on its own device. UsageError when the cache lacks the
    draft's layers or `final`.
    """
    stops = frozenset(cache.tokens["eos"])
    layers, spans = draft.config.target_layer_ids, [[] for _ in thresholds]
    for cell in _packed_samples(cache, indices, layers, context):
        samples = [sample for _, sample in cell]
        replies = [
            [known_reply(sample.ids.tolist(), greedy, *span, stops) for span in reply_spans(sample.mask.numpy())]
            for sample, greedy in ((sample, greedy_tokens(draft, sample)) for sample in samples)
        ]
        proposed = _propose_all(draft, samples, replies, stops, max_new, thresholds)
        for (index, _), of_sample in zip(cell, replies, strict=True):
            for reply in of_sample:
                where = index, cache.samples.domain[index], reply.start
                for of_threshold, blocks in zip(spans, next(proposed), strict=True):
                    of_threshold.append(
                        Span(*where, *replay_decoding(reply, blocks, stops, max_new), draft.config.proposals)
                    )
    return spans


def _packed_samples(
    cache: "HiddenCache", indices: Iterable[int], layers: Sequence[int], context: int
) -> Iterator[list[tuple[int, "Sample"]]]:
    """Read samples and group consecutive ones into micro-batches of at most `context` rows, or of one longer sample."""
    cell, rows = [], 0
    for index in map(int, indices):
        sample = cache.read(index, layers=layers, final=True)
        if cell and rows + len(sample.ids) > context:
            yield cell
            cell, rows = [], 0
        cell.append((index, sample))
        rows += len(sample.ids)
    if cell:
        yield cell


def greedy_tokens(draft: Draft, sample: "Sample") -> list[int]:
    """Return the target's greedy token after each row [T], -1 after rows that keep no `final`.

    Logits are rounded to the target's compute type, as the target's own are: in bfloat16 that decides ties.
    """
    head, device = draft.target, draft.device
    greedy_T = torch.full((len(sample.ids),), -1)
    step = chunk_rows(head.vocab_size, device.type, draft.chunk_rule, greedy=True)
    for rows, final_RD in zip(sample.final_rows.split(step), sample.final.split(step), strict=True):
        greedy_T[rows] = head.raw_logits(final_RD.to(device)).to(final_RD.dtype).argmax(-1).cpu()
    return greedy_T.tolist()


def _propose_all(
    draft: Draft,
    samples: Sequence["Sample"],
    replies: list[list[KnownReply]],
    stops: Collection[int],
    max_new: int | None,
    thresholds: Sequence[float],
) -> Iterator[list[list[list[int]]]]:
    """Yield, for each reply in order and each threshold, the proposals [a][P] of the blocks at its first tokens."""
    device, config = draft.device, draft.config
    cell = pack(samples, [""] * len(samples))
    counts = [[reply.anchor_count(stops, max_new) for reply in of_sample] for of_sample in replies]
    rows = [
        torch.arange(count) + first + reply.start
        for first, of_sample, of_counts in zip(cell.starts_M.tolist(), replies, counts, strict=True)
        for reply, count in zip(of_sample, of_counts, strict=True)
    ]
    anchors_N = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
    on_device, proposed = cell.to(device), [[] for _ in thresholds]
    first, count = 0, max(1, SLOTS_AT_ONCE // config.block_size)
    while first < len(anchors_N):
        blocks, cuts = lay_blocks(cell, anchors_N[first : first + count], draft.config).to(device), None
        try:
            cuts = draft.greedy_proposals(on_device, blocks, thresholds)
        except RuntimeError as error:
            out_of_memory(error)
            if count == 1:
                raise
        if cuts is None:  # outside the except clause: the exception keeps the failed forward's tensors alive
            count = -(-count // 2)
            free_cached_memory(device)
            continue
        proposed = [earlier + new for earlier, new in zip(proposed, cuts, strict=True)]
        first += count
    at = 0
    for part in rows:
        yield [of_threshold[at : at + len(part)] for of_threshold in proposed]
        at += len(part)


class Figures(Record):
    """What replies to some prompts say of a draft, pooled over their target calls (prefills left out); without calls 0.

    Figures without a default are in the records of every version.
    """

    prompts: Count = Field(description="prompts with at least one call")
    accept_len: Number = Field(description="tokens / calls")
    interval: Numbers = Field(description="95 % bootstrap interval of accept_len over prompts, low and high")
    calls: Count = Field(description="target calls: verifications of a block")
    tokens: Count | None = Field(None, description="tokens gained, the target's own included")
    per_slot: Numbers = Field(description="acceptance by slot: share of calls that kept proposal 1, 2, ...")
    verified: Number | None = Field(None, description="proposals verified a call")
    verify_rate: Number | None = Field(None, description="share of the verified proposals that were kept")


def summarise(spans: Sequence[Span], seed: int = 0) -> dict:
    """Return `Figures` of decoded replies as JSON values, and those of each of `domains`."""
    names = sorted({span.domain for span in spans})
    domains = {name: _figures([span for span in spans if span.domain == name], seed) for name in names}
    return _figures(spans, seed) | {"domains": domains}


def _figures(spans: Sequence[Span], seed: int) -> dict:
    spans = [span for span in spans if span.lengths]
    tokens_n = np.array([sum(span.lengths) for span in spans], float)
    calls_n = np.array([len(span.lengths) for span in spans], float)
    matched = np.array([count for span in spans for count in span.matched])
    proposed = sum(sum(span.proposed) for span in spans)
    slots = max((span.proposals for span in spans), default=0)
    calls = int(calls_n.sum())
    return {
        "prompts": len(spans),
        "accept_len": float(tokens_n.sum() / max(calls, 1)),
        "interval": bootstrap(tokens_n, calls_n, seed),
        "calls": calls,
        "tokens": int(tokens_n.sum()),
        "per_slot": [float((matched > slot).mean()) for slot in range(slots)],
        "verified": proposed / max(calls, 1),
        "verify_rate": float(matched.sum() / max(proposed, 1)),
    }


def replies_of(spans: Iterable[Span]) -> list[list[int]]:
    """Return each reply's sample, first row, tokens and calls, so that drafts can be compared on the same replies."""
    return [[span.sample, span.start, sum(span.lengths), len(span.lengths)] for span in spans if span.lengths]


def gains_within(lengths: Sequence[int], max_new: int) -> list[int]:
    """Return what an engine gains in the calls of a reply, given what `Decoded.lengths` says of them.

    Ours counts `max_new` tokens after the prefill's own one, and the last call uncut. An engine's reply ends at
    `max_new` tokens: it makes no call once it has them, and cuts what the last one gained.
    """
    gains, left = [], max_new - 1
    for gained in lengths:
        if left > 0:
            gains.append(min(gained, left))
            left -= gained
    return gains


def engine_accept_length(replies: Iterable[tuple[Sequence[int], Sequence[int]]], max_new: int) -> float | None:
    """Return the mean that vLLM reports for replies, each the tokens gained and the proposals accepted in its calls.

    It counts 1 and every accepted proposal of each call, those beyond the reply's end included, in the calls of
    `gains_within`. None without calls, or where what was accepted is not known.
    """
    calls = accepted = 0
    for lengths, of_reply in replies:
        if len(of_reply) != len(lengths):
            return None
        count = len(gains_within(lengths, max_new))
        calls += count
        accepted += sum(of_reply[:count])
    return 1 + accepted / calls if calls else None


@lru_cache(maxsize=8)  # a report draws the same ones for every domain, slot and draft
def resamples(count: int, seed: int) -> np.ndarray:
    """Return how often each of `count` prompts, at least one, is in each resample of as many [B, n]; read-only."""
    drawn_Bn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    drawn_Bn.setflags(write=False)
    return drawn_Bn


def bootstrap(tokens_n: np.ndarray, calls_n: np.ndarray, seed: int) -> list[float]:
    """Return the 95 % interval of sum(tokens) / sum(calls) over resampled prompts; [0, 0] without any.

    The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) of a ratio.
    """
    if not len(calls_n):
        return [0.0, 0.0]
    drawn_Bn = resamples(len(calls_n), seed)
    return [float(edge) for edge in np.quantile((drawn_Bn @ tokens_n) / (drawn_Bn @ calls_n), [0.025, 0.975])]
