"""Prompts, decoded with the draft and without, and the parts of a report that their replies make.

N blocks   S slots
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.cache import HiddenCache
from pipeline.drafts import Draft, metrics_of
from pipeline.errors import ProofError, RoomError, UsageError
from pipeline.evaluation.accept_length import (
    Span,
    accept_spans,
    engine_accept_length,
    summarise,
)
from pipeline.evaluation.decode import Decoded, SamplingOptions, with_progress
from pipeline.evaluation.prompts import Prompt
from pipeline.evaluation.reply_text import ReplyText, reply_text, spread_over_domains
from pipeline.evaluation.reports import (
    Agreement,
    ConfidenceCut,
    DecodedFigures,
    Lossless,
    NearTie,
    Sample,
    SampledReplies,
    Speed,
)
from pipeline.evaluation.teacher_forced import add_metric_sums
from pipeline.runs.training_data import stratified_subset
from pipeline.target.chat_template import load_tokenizer
from stages.evaluate.lossless import (
    LosslessCheck,
    PlainReplies,
    check_quantiles,
    digest_of,
    plain_decode,
    token_quantiles,
)

TEACHER_FORCED = 16  # samples of a domain, on average
THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.8)  # of confidence, where blocks are cut
DecodeAll = Callable[..., Iterator[tuple[int, Decoded]]]  # `decode_many` of all prompts: yields them as they end


@dataclass(frozen=True)
class Outcome:
    """One prompt decoded with the draft and without. near_tie: where the comparison ended; None: identical replies.

    stored: the plain reply was not decoded now, but read from a file.
    """

    prompt: Prompt
    fast: Decoded
    plain: Decoded
    near_tie: NearTie | None
    stored: bool = False


def decode_greedily(
    check: LosslessCheck,
    prompts: Sequence[Prompt],
    decode: DecodeAll,
    max_new: int,
    stops: frozenset[int],
    replies: PlainReplies,
) -> list[Outcome]:
    """Decode every prompt greedily with and without the draft. ProofError where the replies differ beyond a near tie.

    Only prompts without a plain reply among `replies` are decoded without the draft; these are added to the file, also
    when an error or a signal ends the decoding.
    """
    outcomes: list[Outcome | None] = [None] * len(prompts)
    stored_replies = [replies.find(prompt.ids) for prompt in prompts]
    try:
        for index, fast in with_progress(decode(), len(prompts), "decoding"):
            prompt, plain = prompts[index], stored_replies[index]
            if plain is None:
                plain = plain_decode(check.target, prompt.ids, max_new, stops)
                replies.add(prompt.ids, plain)
            try:
                near_tie = check.compare(prompt.name, prompt.ids, fast, plain)
            except ProofError as error:
                stored = None if stored_replies[index] is None else replies.path
                raise ProofError(f"{error}{_rule_out(stored, check.batch)}") from error
            outcomes[index] = Outcome(prompt, fast, plain, near_tie, stored_replies[index] is not None)
    except BaseException:
        with contextlib.suppress(RoomError, UsageError):  # the first error is the one to report
            replies.write()
        raise
    replies.write()
    return outcomes


def _rule_out(stored: Path | None, batch: int) -> str:
    """What to rule out before a difference is reported as a bug."""
    without = [f"--plain (the plain reply is from {stored})"] * bool(stored) + ["--batch"] * (batch > 1)
    return f"; first evaluate without {' and without '.join(without)}" if without else ""


def decode_sampled(
    target: PreTrainedModel,
    prompts: Sequence[Prompt],
    decode: DecodeAll,
    sampling: SamplingOptions,
    proposals: int,
    max_new: int,
) -> SampledReplies:
    """Sample a reply to every prompt with target and draft. ProofError where they are not distributed as the target's.

    proposals: of a whole block. max_new: the limit of a reply's tokens.
    """
    replies: list[Decoded | None] = [None] * len(prompts)
    quantiles: list[list[float]] = [[] for _ in prompts]  # in the order of the prompts, not that in which they end
    for index, fast in with_progress(decode(sampling=sampling), len(prompts), "drawing"):
        replies[index] = fast
        quantiles[index] = token_quantiles(target, prompts[index].ids, fast.ids, sampling.temperature)
    return SampledReplies(
        temperature=sampling.temperature,
        draft_temperature=sampling.draft_temperature,
        seed=sampling.seed,
        **accept_figures(list(zip(prompts, replies, strict=True)), proposals, max_new),
        lossless=check_quantiles([*chain(*quantiles)]),
    )


def accept_figures(decoded: Sequence[tuple[Prompt, Decoded]], proposals: int, max_new: int) -> dict:
    """Return a report's `overall` figures, those of each of `domains`, and the `samples` they are made of."""
    spans = [
        Span(-1, prompt.domain, len(prompt.ids), fast.lengths, fast.matched, fast.proposed, True, proposals)
        for prompt, fast in decoded
    ]
    overall = summarise(spans)

    def complete(figures: dict, domain: str | None = None) -> DecodedFigures:
        replies = [(fast.lengths, fast.accepted) for prompt, fast in decoded if domain in (None, prompt.domain)]
        return with_calls_saved(figures | {"engine_accept_len": engine_accept_length(replies, max_new)})

    domains = {name: complete(figures, name) for name, figures in overall.pop("domains").items()}
    samples = [
        Sample(
            domain=prompt.domain,
            prompt=digest_of(prompt.ids),
            lengths=fast.lengths,
            matched=fast.matched,
            proposed=fast.proposed,
            accepted=fast.accepted,
        )
        for prompt, fast in decoded
    ]
    return {"overall": complete(overall), "domains": domains, "samples": samples}


def reply_texts(folder: Path, outcomes: Sequence[Outcome], most: int) -> list[ReplyText]:
    """Return at most so many replies as text, of every domain; none without a fast tokenizer. folder: the target's."""
    try:
        tokenizer = load_tokenizer(folder)
    except UsageError:  # prompts may be token ids, for which no tokenizer is needed
        return []
    if not tokenizer.is_fast:
        return []
    shown = spread_over_domains([outcome.prompt.domain for outcome in outcomes], most)
    return [reply_text(index, tokenizer, outcomes[index].prompt.ids, outcomes[index].fast.ids) for index in shown]


def with_calls_saved(figures: dict) -> DecodedFigures:
    """Return `summarise`'s figures as a report has them.

    A plain loop needs a call for every token gained, and its prefill is the same, so both prefills are left out.
    """
    return DecodedFigures(
        **figures, calls_saved=1 - figures["calls"] / max(1, figures["tokens"]) if figures["calls"] else 0.0
    )


def lossless_counts(outcomes: Sequence[Outcome]) -> Lossless:
    """Count the replies that are identical to plain decoding, and those that are up to a near tie."""
    ties = sum(outcome.near_tie is not None for outcome in outcomes)
    stored = sum(outcome.stored for outcome in outcomes)
    return Lossless(prompts=len(outcomes), identical=len(outcomes) - ties, near_ties=ties, from_file=stored)


def speeds(outcomes: Sequence[Outcome]) -> Speed:
    """Return tokens a second of both loops, prompts included, on this machine.

    Of the speculative one alone where plain replies are from a file: only what ran side by side is compared.
    """
    plain, fast = (
        sum(len(reply.ids) for reply in replies) / sum(reply.seconds for reply in replies)
        for replies in ([outcome.plain for outcome in outcomes], [outcome.fast for outcome in outcomes])
    )
    if any(outcome.stored for outcome in outcomes):
        return Speed(speculative_tokens_s=fast)
    return Speed(plain_tokens_s=plain, speculative_tokens_s=fast, speedup=fast / plain)


def confidence_cuts(draft: Draft, cache: HiddenCache, prompts: Sequence[Prompt], max_new: int) -> list[ConfidenceCut]:
    """Return, for each of `THRESHOLDS`, what greedy decoding gains with blocks cut there; no target runs.

    The replies are the cache's to these prompts, as far as they are the target's own.
    """
    starts = {(prompt.sample, len(prompt.ids)) for prompt in prompts}
    samples = [prompt.sample for prompt in prompts]
    cuts = []
    by_threshold = accept_spans(draft, cache, samples, THRESHOLDS, max_new=max_new)
    for threshold, spans in zip(THRESHOLDS, by_threshold, strict=True):
        figures = summarise([span for span in spans if (span.sample, span.start) in starts])
        figures.pop("domains")
        shown = with_calls_saved(figures).model_dump(include=set(ConfidenceCut.model_fields))
        cuts.append(ConfidenceCut(threshold=threshold, **shown))
    return cuts


def target_free_agreement(
    outcomes: Sequence[Outcome], draft: Draft, cache: HiddenCache, max_new: int, threshold: float = 0.0
) -> Agreement:
    """Compare decoding with the accept length that needs no target, over the same prompts and calls.

    A reply of the cache that is not the target's own, or ends before the limit, is compared as far as it is known.
    """
    samples = [outcome.prompt.sample for outcome in outcomes]
    (spans,) = accept_spans(draft, cache, samples, (threshold,), max_new=max_new)
    by_start = {(span.sample, span.start): span for span in spans}
    pairs = [(outcome.fast, by_start[outcome.prompt.sample, len(outcome.prompt.ids)]) for outcome in outcomes]
    pairs = [(fast, span) for fast, span in pairs if span.lengths or (span.complete and not fast.lengths)]
    decoded = [fast.lengths if span.complete else fast.lengths[: len(span.lengths)] for fast, span in pairs]
    target_free = [span.lengths for _, span in pairs]
    return Agreement(
        prompts=len(pairs),
        equal=sum(map(list.__eq__, decoded, target_free)),
        accept_len=_mean(decoded),
        accept_len_target_free=_mean(target_free),
    )


def _mean(lists: Sequence[Sequence[int]]) -> float:
    return sum(map(sum, lists)) / max(1, sum(map(len, lists)))


@torch.no_grad()
def teacher_forced(draft: Draft, cache: HiddenCache, heldout: np.ndarray) -> dict[str, float]:
    """Return accept_len_tf of each domain over held-out samples, whoever wrote their replies; no target runs."""
    if draft.config.needs_final_states and not cache.has_final:
        return {}  # its metrics come with its loss, which reads them
    sums: dict[str, dict] = {}
    domains = {cache.samples.domain[index] for index in heldout.tolist()}
    for index in stratified_subset(cache, heldout, TEACHER_FORCED * len(domains)).tolist():
        add_metric_sums(sums.setdefault(cache.samples.domain[index], {}), draft, cache, [index])
    return {name: metrics_of(sums[name], {}, {})["accept_len_tf"] for name in sorted(sums)}
