"""The report of an evaluation, and its table.

N blocks   S slots
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from rich.console import Group
from rich.table import Table

from pipeline.accept import SLOTS_AT_ONCE, Span, accept_spans, summarise
from pipeline.cache import HiddenCache
from pipeline.drafts import Draft, Knobs, eligible_anchors, lay_blocks, metrics_of, pack
from pipeline.split import spread
from stages.evaluate.decode import Decoded
from stages.evaluate.prompts import Prompt
from stages.evaluate.proof import NearTie

TEACHER_FORCED = 16  # samples of a domain, on average


@dataclass(frozen=True)
class Outcome:
    """One prompt, decoded twice. `tie`: where the comparison of the two ended, None where they are identical."""

    prompt: Prompt
    fast: Decoded
    plain: Decoded
    tie: NearTie | None


def decoded_figures(outcomes: Sequence[Outcome], proposals: int) -> dict:
    """Return the report's parts that decoding alone decides."""
    overall, domains = accept_figures(outcomes, proposals)
    ties = [done.tie for done in outcomes if done.tie is not None]
    counts = {"prompts": len(outcomes), "identical": len(outcomes) - len(ties), "near_ties": len(ties)}
    return {
        "overall": overall,
        "domains": domains,
        "speed": speed_figures(outcomes),
        "lossless": counts,
        "near_ties": [asdict(tie) for tie in ties],
        "samples": [
            {"domain": done.prompt.domain, "lengths": done.fast.lengths, "matched": done.fast.matched}
            for done in outcomes
        ],
    }


def accept_figures(outcomes: Sequence[Outcome], proposals: int) -> tuple[dict, dict]:
    """Return overall figures and those of each domain: `summarise`'s, and the share of target calls saved.

    A plain loop needs a call for every token gained; the prefill is the same in both.
    """
    spans = [
        Span(-1, done.prompt.domain, len(done.prompt.ids), done.fast.lengths, done.fast.matched, True, proposals)
        for done in outcomes
    ]
    overall = summarise(spans)
    domains = overall.pop("domains")
    for figures in (overall, *domains.values()):
        figures["calls_saved"] = 1 - figures["calls"] / max(1, figures["tokens"]) if figures["calls"] else 0.0
    return overall, domains


def speed_figures(outcomes: Sequence[Outcome]) -> dict:
    """Return tokens a second of both loops, prompts included, on this machine."""
    plain, fast = (
        sum(len(reply.ids) for reply in replies) / sum(reply.seconds for reply in replies)
        for replies in ([done.plain for done in outcomes], [done.fast for done in outcomes])
    )
    return {"plain_tokens_s": plain, "speculative_tokens_s": fast, "speedup": fast / plain}


def agreement(outcomes: Sequence[Outcome], draft: Draft, cache: HiddenCache, max_new: int) -> dict:
    """Compare decoding with the figure that needs no target, over the same prompts and calls.

    A reply of the cache that is not the target's own, or ends before the limit, is compared as far as it is known.
    """
    spans = accept_spans(draft, cache, [done.prompt.sample for done in outcomes], max_new=max_new)
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
    sums: dict[str, dict] = {}
    domains = {cache.samples.domain[index] for index in heldout.tolist()}
    for index in spread(cache, heldout, TEACHER_FORCED * len(domains)).tolist():
        _add_sample(sums.setdefault(cache.samples.domain[index], {}), draft, cache, index)
    return {name: metrics_of(sums[name], {}, {})["accept_len_tf"] for name in sorted(sums)}


def _add_sample(sums: dict, draft: Draft, cache: HiddenCache, index: int) -> None:
    sample = cache.read(index, layers=draft.config.target_layer_ids)
    cell = pack([sample], [cache.samples.hex(index)])
    device = draft.fc.weight.device
    anchors_N = eligible_anchors(sample.mask).nonzero()[:, 0]
    for part_N in anchors_N.split(max(1, SLOTS_AT_ONCE // draft.config.block_size)) if len(anchors_N) else ():
        blocks = lay_blocks(cell, part_N, torch.ones_like(part_N, dtype=torch.bool), draft.config).to(device)
        loss = draft.loss(cell.to(device), blocks, Knobs(), draft.denominators(blocks), metrics=True)
        for name, value in loss.sums.items():
            sums[name] = sums.get(name, 0) + value


def table(report: dict) -> Group:
    """Return a report as people read it."""
    draft, settings, speed = report["draft"], report["settings"], report["speed"]
    figures = Table(box=None, header_style="bold", pad_edge=False)
    heads = ["domain", "prompts", "accept length", "95 %", "calls saved", "forced"]
    for head in [*heads, *(f"+{slot + 1}" for slot in range(draft["proposals"]))]:
        figures.add_column(head, justify="left" if head == "domain" else "right")
    for name, row in [*report["domains"].items(), ("all", report["overall"])]:
        low, high = row["interval"]
        forced = report["teacher_forced"].get(name)
        figures.add_row(
            name or "-",
            str(row["prompts"]),
            f"{row['accept_len']:.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{row['calls_saved']:.0%}",
            "" if forced is None else f"{forced:.2f}",
            *(f"{share:.0%}" for share in row["per_slot"]),
            style="bold" if name == "all" else None,
        )
    lines = [
        f"{draft['label']}, {draft['proposals']} proposals a block, for {report['target']}; {settings['prompts']}, "
        f"{settings['max_new']} tokens at most, T = 0, {settings['device']}, {settings['dtype']}",
        "accept length: tokens gained per target call, the target's own included; forced: teacher-forced, on the "
        "cache's replies; +k: share of calls that kept proposal k",
        f"tokens a second: {speed['plain_tokens_s']:.0f} plain, {speed['speculative_tokens_s']:.0f} speculative, "
        f"{speed['speedup']:.2f} times as fast",
        _lossless(report["lossless"]),
    ]
    return Group(lines[0], "", figures, "", *lines[1:], *_agreed(report["agreement"]))


def _lossless(counts: dict) -> str:
    ties = f", {counts['near_ties']} up to a near tie of the target's own" if counts["near_ties"] else ""
    return f"lossless: {counts['identical']} of {counts['prompts']} replies identical to plain decoding{ties}"


def _agreed(found: dict | None) -> list[str]:
    if found is None:
        return []
    return [
        f"without the target: {found['accept_len_target_free']:.2f} where decoding has {found['accept_len']:.2f}; "
        f"{found['equal']} of {found['prompts']} prompts agree call by call"
    ]
