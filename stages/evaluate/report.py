"""The report of an evaluation, and its table.

N blocks   S slots
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from rich.console import Group

from pipeline.cache import HiddenCache
from pipeline.console import Grid, grid
from pipeline.drafts import Draft, ScheduleValues, eligible_anchors, lay_blocks, metrics_of, needs_final_states, pack
from pipeline.evaluation.accept_length import SLOTS_AT_ONCE, Span, accept_spans, cut_spans, summarise
from pipeline.runs.split import stratified_subset
from pipeline.visible_text import visible
from stages.evaluate.decode import Decoded, SamplingOptions
from stages.evaluate.losslessness import BEYOND, NearTie, check_quantiles
from stages.evaluate.plain_replies import digest_of
from stages.evaluate.prompts import Prompt

TEACHER_FORCED = 16  # samples of a domain, on average
THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.8)  # of confidence, where blocks are cut


@dataclass(frozen=True)
class Outcome:
    """One prompt, decoded twice. `tie`: where the comparison of the two ended, None where they are identical.

    stored: the plain reply was not decoded now, but taken from a file.
    """

    prompt: Prompt
    fast: Decoded
    plain: Decoded
    tie: NearTie | None
    stored: bool = False


def decoded_figures(outcomes: Sequence[Outcome], proposals: int, batch: int) -> dict:
    """Return the report's parts that greedy decoding alone decides. Speeds only of prompts decoded one at a time."""
    ties = [done.tie for done in outcomes if done.tie is not None]
    counts = {"prompts": len(outcomes), "identical": len(outcomes) - len(ties), "near_ties": len(ties)}
    counts["from_file"] = sum(done.stored for done in outcomes)
    return {
        **accept_figures([(done.prompt, done.fast) for done in outcomes], proposals),
        "speed": speed_figures(outcomes) if batch == 1 else {},
        "lossless": counts,
        "near_ties": [asdict(tie) for tie in ties],
    }


def drawn_figures(
    drawn: Sequence[tuple[Prompt, Decoded]], found: Sequence[float], sampling: SamplingOptions, proposals: int
) -> dict:
    """Return the report's part on sampled replies. `found`: their tokens' quantiles. ProofError where biased."""
    return {**asdict(sampling), **accept_figures(drawn, proposals), "lossless": check_quantiles(found)}


def accept_figures(decoded: Sequence[tuple[Prompt, Decoded]], proposals: int) -> dict:
    """Return `overall` figures, those of each of `domains`, and the `samples` they are made of.

    Besides `summarise`'s: calls_saved; a plain loop needs a call for every token gained, and the prefill is the same.
    """
    spans = [
        Span(-1, prompt.domain, len(prompt.ids), fast.lengths, fast.matched, fast.proposed, True, proposals)
        for prompt, fast in decoded
    ]
    overall = summarise(spans)
    domains = overall.pop("domains")
    for figures in (overall, *domains.values()):
        figures["calls_saved"] = _saved(figures)
    samples = [
        {"domain": prompt.domain, "prompt": digest_of(prompt.ids)}
        | {"lengths": fast.lengths, "matched": fast.matched, "proposed": fast.proposed}
        for prompt, fast in decoded
    ]
    return {"overall": overall, "domains": domains, "samples": samples}


def _saved(figures: dict) -> float:
    return 1 - figures["calls"] / max(1, figures["tokens"]) if figures["calls"] else 0.0


def speed_figures(outcomes: Sequence[Outcome]) -> dict:
    """Return tokens a second of both loops, prompts included, on this machine.

    Of the speculative one alone where plain replies are from a file: only what ran side by side is compared.
    """
    plain, fast = (
        sum(len(reply.ids) for reply in replies) / sum(reply.seconds for reply in replies)
        for replies in ([done.plain for done in outcomes], [done.fast for done in outcomes])
    )
    if any(done.stored for done in outcomes):
        return {"speculative_tokens_s": fast}
    return {"plain_tokens_s": plain, "speculative_tokens_s": fast, "speedup": fast / plain}


def confidence_figures(draft: Draft, cache: HiddenCache, asked: Sequence[Prompt], max_new: int) -> list[dict]:
    """Return, for each of `THRESHOLDS`, what greedy decoding gains with blocks cut there; no target runs.

    The replies are the cache's to these prompts, as far as they are the target's own.
    """
    found, places = [], {(prompt.sample, len(prompt.ids)) for prompt in asked}
    samples = [prompt.sample for prompt in asked]
    cuts = cut_spans(draft, cache, samples, THRESHOLDS, max_new=max_new)
    for threshold, spans in zip(THRESHOLDS, cuts, strict=True):
        figures = summarise([span for span in spans if (span.sample, span.start) in places])
        kept = ("accept_len", "interval", "calls", "verified", "verify_rate")
        found.append({"threshold": threshold, "calls_saved": _saved(figures)} | {key: figures[key] for key in kept})
    return found


def agreement(
    outcomes: Sequence[Outcome], draft: Draft, cache: HiddenCache, max_new: int, threshold: float = 0.0
) -> dict:
    """Compare decoding with the figure that needs no target, over the same prompts and calls.

    A reply of the cache that is not the target's own, or ends before the limit, is compared as far as it is known.
    """
    spans = accept_spans(draft, cache, [done.prompt.sample for done in outcomes], max_new=max_new, threshold=threshold)
    by_place = {(span.sample, span.start): span for span in spans}
    pairs = [(done.fast, by_place[done.prompt.sample, len(done.prompt.ids)]) for done in outcomes]
    pairs = [(fast, span) for fast, span in pairs if span.lengths or (span.complete and not fast.lengths)]
    decoded = [fast.lengths if span.complete else fast.lengths[: len(span.lengths)] for fast, span in pairs]
    free = [span.lengths for _, span in pairs]
    return {
        "prompts": len(pairs),
        "equal": sum(one == other for one, other in zip(decoded, free, strict=True)),
        "accept_len": _mean(decoded),
        "accept_len_target_free": _mean(free),
    }


def _mean(lists: Sequence[Sequence[int]]) -> float:
    return sum(map(sum, lists)) / max(1, sum(map(len, lists)))


@torch.no_grad()
def teacher_forced(draft: Draft, cache: HiddenCache, heldout: np.ndarray) -> dict[str, float]:
    """Return accept_len_tf of each domain over held-out samples, whoever wrote their replies; no target runs."""
    if needs_final_states(draft.config) and not cache.has_final:
        return {}  # its metrics come with its loss, which reads them
    sums: dict[str, dict] = {}
    domains = {cache.samples.domain[index] for index in heldout.tolist()}
    for index in stratified_subset(cache, heldout, TEACHER_FORCED * len(domains)).tolist():
        _add_sample(sums.setdefault(cache.samples.domain[index], {}), draft, cache, index)
    return {name: metrics_of(sums[name], {}, {})["accept_len_tf"] for name in sorted(sums)}


def _add_sample(sums: dict, draft: Draft, cache: HiddenCache, index: int) -> None:
    final = needs_final_states(draft.config)
    sample = cache.read(index, layers=draft.config.target_layer_ids, final=final)
    cell = pack([sample], [cache.samples.hex(index)], final=final)
    device = draft.fc.weight.device
    anchors_N = eligible_anchors(sample.mask).nonzero()[:, 0]
    for part_N in anchors_N.split(max(1, SLOTS_AT_ONCE // draft.config.block_size)) if len(anchors_N) else ():
        blocks = lay_blocks(cell, part_N, torch.ones_like(part_N, dtype=torch.bool), draft.config).to(device)
        loss = draft.loss(cell.to(device), blocks, ScheduleValues(), draft.denominators(blocks), metrics=True)
        for name, value in loss.sums.items():
            sums[name] = sums.get(name, 0) + value


def table(report: dict) -> Group:
    """Return a report as people read it."""
    draft, settings = report["draft"], report["settings"]
    cut = f", blocks cut at confidence {settings['threshold']:g}" if settings["threshold"] else ""
    lines = [
        f"{visible(draft['label'])}, {draft['proposals']} proposals a block{cut}, for {visible(report['target'])}; "
        f"{visible(settings['prompts'])}, {settings['max_new']} tokens at most, {settings['device']}, "
        f"{settings['dtype']}",
        "accept length: tokens gained per target call, the target's own included; forced: teacher-forced, on the "
        "cache's replies; +k: share of calls that kept proposal k",
        _kept("T = 0", report),
        _speed(report["speed"]),
        _lossless(report["lossless"]),
    ]
    greedy = _figures("T = 0", report, draft["proposals"], report["teacher_forced"])
    return Group(
        lines[0], "", greedy, *_drawn(report["sampled"], draft["proposals"]), "", *lines[1:],
        *_agreed(report["agreement"]), *_cuts(report["confidence"]),
    )  # fmt: skip


def _figures(title: str, part: dict, proposals: int, forced: dict[str, float]) -> Grid:
    """Accept lengths of each domain and of all, decoded one way."""
    figures = grid()
    heads = [title, "prompts", "accept length", "95 %", "calls saved", *["forced"] * bool(forced)]
    for head in [*heads, *(f"+{slot + 1}" for slot in range(proposals))]:
        figures.add_column(head, justify="left" if head == title else "right")
    for name, row in [*part["domains"].items(), ("all", part["overall"])]:
        low, high = row["interval"]
        figures.add_row(
            name or "-",
            str(row["prompts"]),
            f"{row['accept_len']:.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{row['calls_saved']:.0%}",
            *[f"{forced[name]:.2f}" if name in forced else ""] * bool(forced),
            *(f"{share:.0%}" for share in row["per_slot"]),
            style="bold" if name == "all" else None,
        )
    return figures


def _kept(title: str, part: dict) -> str:
    of = part["overall"]
    return f"{title}: {of['verify_rate']:.0%} of {of['verified']:.2f} proposals a call kept"


def _drawn(sampled: dict | None, proposals: int) -> list:
    """The same for replies drawn at a temperature, and what shows that they are the target's."""
    if sampled is None:
        return []
    found, draft = sampled["lossless"], sampled["draft_temperature"]
    said = f"drawn at T = {draft:g}" if draft else "the draft's likeliest tokens"
    title = f"T = {sampled['temperature']:g}"
    note = (
        f"{_kept(title, sampled)}; replies drawn from the target with seed {sampled['seed']}, proposals {said}; "
        f"the {found['tokens']:,} tokens' mean place in the target's distribution is {found['place']:.3f}, "
        f"{abs(found['spreads']):.1f} spreads off 1/2 (lossless: beyond {BEYOND:g} is an error)"
    )
    return ["", _figures(title, sampled, proposals, {}), "", note]


def _cuts(found: list[dict] | None) -> list:
    """What blocks cut by confidence gain, as a table."""
    if not found:
        return []
    cuts = grid("T = 0, cut below", ">verified a call", ">kept", ">accept length", ">95 %", ">calls saved")
    for of in found:
        low, high = of["interval"]
        cuts.add_row(
            f"{of['threshold']:g}" if of["threshold"] else "uncut",
            f"{of['verified']:.2f}",
            f"{of['verify_rate']:.0%}",
            f"{of['accept_len']:.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{of['calls_saved']:.0%}",
        )
    note = "cut below: a block ends before a proposal of less confidence; on the cache's replies, without the target"
    return ["", cuts, "", note]


def _speed(of: dict) -> str:
    if not of:
        return "tokens a second: only measured with one prompt at a time"
    if "speedup" not in of:
        return f"tokens a second: {of['speculative_tokens_s']:.0f} speculative"
    return (
        f"tokens a second: {of['plain_tokens_s']:.0f} plain, {of['speculative_tokens_s']:.0f} speculative, "
        f"{of['speedup']:.2f} times as fast"
    )


def _lossless(counts: dict) -> str:
    ties = f", {counts['near_ties']} up to a near tie of the target's own" if counts["near_ties"] else ""
    stored = f"; {counts['from_file']} plain replies from a file" if counts["from_file"] else ""
    return f"lossless: {counts['identical']} of {counts['prompts']} replies identical to plain decoding{ties}{stored}"


def _agreed(found: dict | None) -> list[str]:
    if found is None:
        return []
    return [
        f"without the target: {found['accept_len_target_free']:.2f} where decoding has {found['accept_len']:.2f}; "
        f"{found['equal']} of {found['prompts']} prompts agree call by call"
    ]
