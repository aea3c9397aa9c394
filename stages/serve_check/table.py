"""The text that `serve-check` prints."""

from rich.console import Group
from rich.text import Text

from pipeline.visible_tables import grid
from pipeline.visible_text import visible
from stages.serve_check.run import ServeReport
from stages.serve_check.verdict import Served


def serve_table(report: ServeReport) -> Group:
    """Return what was served and how it compares with `evaluate`."""
    evaluated = report.evaluated
    head = (
        f"{visible(report.draft)}: a {report.method} draft in the form of {report.form}, for {visible(report.target)}; "
        f"{report.prompts} prompts, {visible(report.source)}, {report.max_new} tokens at most"
    )
    table = grid("", ">identical", ">calls equal", ">calls", ">engine's mean", ">by `evaluate`", ">draft states off")
    for served in report.served:
        table.add_row(*_row(served))
    lines = [
        f"evaluate: accept length {evaluated.accept_len:.3f}, {evaluated.tokens} tokens in {evaluated.calls} calls, "
        f"{evaluated.identical} of {report.prompts} replies identical to plain decoding",
        "engine's mean: in its own counting, and what `evaluate`'s calls give so counted; an engine makes no call once "
        "a reply has all its tokens",
    ]
    if report.as_trained is not None:
        trained = report.as_trained
        lines.append(
            f"the exported run: {trained.equal} of {trained.prompts} shared prompts gain the same in every call, "
            f"accept length {trained.accept_len:.3f} for {trained.accept_len_run:.3f}"
        )
    for served in report.served:
        name = f"{served.engine or 'the engine'}, {served.title}"
        lines += [f"{name}: mended {visible(mend)}" for mend in served.mends]
        lines.append(f"{name}: {visible(served.verdict)}{served.failure and ': ' + visible(served.failure)}")
        lines += _details(served)
    return Group(head, "", table, "", *(Text(line) for line in lines))


def _row(served: Served) -> list[str]:
    comparison, states = served.comparison, served.states
    if comparison is None:
        return [served.title, *["-"] * 6]
    equal = "not shown" if comparison.equal is None else f"{comparison.equal} of {comparison.prompts} prompts"
    return [
        served.title,
        f"{comparison.identical} of {comparison.prompts}",
        equal,
        f"{'-' if comparison.calls is None else comparison.calls} of {comparison.calls_expected}",
        _mean(comparison.engine_accept_len),
        _mean(comparison.engine_accept_len_expected),
        "-" if states is None else f"{states.states:.1e}",
    ]


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _details(served: Served) -> list[str]:
    """The first prompts that gain otherwise, and where replies differ."""
    comparison, lines = served.comparison, []
    if comparison is None:
        return lines
    if served.plain_identical is not None:
        lines.append(
            f"  {served.plain_identical} of {comparison.prompts} replies are the engine's own plain ones, where "
            f"{comparison.identical} are ours"
        )
    if comparison.differences:
        shown = ", ".join(
            f"prompt {each.prompt}, call {each.call}: {_gain(each.found)} for {_gain(each.expected)}"
            for each in comparison.differences[:3]
        )
        lines.append(f"  gains otherwise: {shown}{', ...' if comparison.equal + 3 < comparison.prompts else ''}")
    return lines


def _gain(value: int | None) -> str:
    return "none" if value is None else str(value)
