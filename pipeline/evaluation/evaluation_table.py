"""One evaluation as people see it: figures by domain, greedy and sampled, speed, and what proves it lossless."""

from collections.abc import Sequence

from rich.console import Group

from pipeline.evaluation.reports import (
    MAX_SPREADS,
    ConfidenceCut,
    DecodedFigures,
    Lossless,
    Report,
    SampledReplies,
    Speed,
)
from pipeline.visible_tables import Grid, grid
from pipeline.visible_text import visible


def evaluation_table(report: Report) -> Group:
    """Return one evaluation: its figures by domain, greedy and sampled, its speed, and what proves it lossless."""
    draft, settings = report.draft, report.settings
    cut = f", blocks cut at confidence {settings.threshold:g}" if settings.threshold else ""
    agreement = report.agreement
    lines = [
        "accept length: tokens gained per target call, the target's own included; forced: teacher-forced, on the "
        "cache's replies; +k: share of calls that kept proposal k",
        _verify_rate_text("T = 0", report.overall),
        *_engine_lines(report.overall),
        _speed_text(report.speed),
        _lossless_text(report.lossless),
    ]
    if agreement is not None:
        lines.append(
            f"without the target: {agreement.accept_len_target_free:.2f} where decoding has "
            f"{agreement.accept_len:.2f}; {agreement.equal} of {agreement.prompts} prompts agree call by call"
        )
    head = (
        f"{visible(draft.label)}, {proposals_text(report)}{cut}, for {visible(report.target)}; "
        f"{visible(settings.prompts)}, {settings.max_new} tokens at most, {settings.device}, {settings.dtype}"
    )
    verified = report.verified_proposals
    greedy = _figures_grid("T = 0", report, verified, report.teacher_forced)
    sampled = _sampled_parts(report.sampled, verified) if report.sampled else ()
    return Group(head, "", greedy, *sampled, "", *lines, *_confidence_parts(report.confidence or ()))


def proposals_text(report: Report) -> str:
    """Return how many proposals of a block are verified, and whose convention that is where it is not all of them."""
    whole, verified = report.draft.proposals, report.settings.proposals
    if verified in (None, whole):
        return f"{whole} proposals a block"
    like = " (b - 1 of a block of b, as SpecForge and SGLang draft)" if verified == report.draft.block_size - 1 else ""
    return f"{verified} of {whole} proposals a block{like}"


def _engine_lines(overall: DecodedFigures) -> list[str]:
    """The accept length in the other convention, where the report has it."""
    if overall.engine_accept_len is None:
        return []
    return [
        f"as vLLM counts: {overall.engine_accept_len:.3f} where we say {overall.accept_len:.3f}; it counts accepted "
        "proposals beyond the end of a reply, and makes no call once a reply has all the tokens of its limit"
    ]


def _figures_grid(title: str, part: Report | SampledReplies, proposals: int, forced: dict[str, float]) -> Grid:
    """Accept lengths of each domain and of all, greedy or sampled."""
    figures = grid()
    heads = [title, "prompts", "accept length", "95 %", "calls saved", *["forced"] * bool(forced)]
    for head in [*heads, *(f"+{slot + 1}" for slot in range(proposals))]:
        figures.add_column(head, justify="left" if head == title else "right")
    for name, row in [*part.domains.items(), ("all", part.overall)]:
        figures.add_row(
            name or "-",
            str(row.prompts),
            *_accept_length_cells(row),
            *[f"{forced[name]:.2f}" if name in forced else ""] * bool(forced),
            *(f"{share:.0%}" for share in row.per_slot),
            style="bold" if name == "all" else None,
        )
    return figures


def _accept_length_cells(row: DecodedFigures | ConfidenceCut) -> tuple[str, str, str]:
    low, high = row.interval
    return f"{row.accept_len:.2f}", f"{low:.2f} - {high:.2f}", f"{row.calls_saved:.0%}"


def _verify_rate_text(title: str, overall: DecodedFigures) -> str:
    return f"{title}: {overall.verify_rate:.0%} of {overall.verified:.2f} proposals a call kept"


def _sampled_parts(sampled: SampledReplies, proposals: int) -> list:
    """The same for replies sampled at a temperature, and what shows that they are the target's."""
    lossless, draft = sampled.lossless, sampled.draft_temperature
    drawn = f"drawn at T = {draft:g}" if draft else "the draft's likeliest tokens"
    title = f"T = {sampled.temperature:g}"
    note = (
        f"{_verify_rate_text(title, sampled.overall)}; replies drawn from the target with seed {sampled.seed}, "
        f"proposals {drawn}; the {lossless.tokens:,} tokens' mean place in the target's distribution is "
        f"{lossless.place:.3f}, {abs(lossless.spreads):.1f} spreads off 1/2 (lossless: beyond {MAX_SPREADS:g} is an "
        "error)"
    )
    return ["", _figures_grid(title, sampled, proposals, {}), "", note]


def _confidence_parts(cuts: Sequence[ConfidenceCut]) -> list:
    """What blocks cut by confidence gain, as a table."""
    if not cuts:
        return []
    table = grid("T = 0, cut below", ">verified a call", ">kept", ">accept length", ">95 %", ">calls saved")
    for cut in cuts:
        threshold = f"{cut.threshold:g}" if cut.threshold else "uncut"
        table.add_row(threshold, f"{cut.verified:.2f}", f"{cut.verify_rate:.0%}", *_accept_length_cells(cut))
    note = "cut below: a block ends before a proposal of less confidence; on the cache's replies, without the target"
    return ["", table, "", note]


def _speed_text(speed: Speed) -> str:
    if speed.speculative_tokens_s is None:
        return "tokens a second: only measured with one prompt at a time"
    if speed.speedup is None:
        return f"tokens a second: {speed.speculative_tokens_s:.0f} speculative"
    return (
        f"tokens a second: {speed.plain_tokens_s:.0f} plain, {speed.speculative_tokens_s:.0f} speculative, "
        f"{speed.speedup:.2f} times as fast"
    )


def _lossless_text(counts: Lossless) -> str:
    ties = f", {counts.near_ties} up to a near tie of the target's own" if counts.near_ties else ""
    stored = f"; {counts.from_file} plain replies from a file" if counts.from_file else ""
    return f"lossless: {counts.identical} of {counts.prompts} replies identical to plain decoding{ties}{stored}"
