"""A sweep's result as people see it on a terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.text import Text

from pipeline.visible_tables import grid
from pipeline.visible_text import visible

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NOTE = (
    "accept length on held-out samples, without the target: tokens gained per target call, the target's own included; "
    "95 % intervals over replies, which say nothing of how far seeds differ"
)
RATIO_NOTE = "; to the best: ratio over the same replies and seeds; the best of many is so by luck, too"
DATA_NOTE = "; data: runs with one letter learned from the same samples in the same order"


def sweep_table(report: dict) -> Group:
    """Return a sweep's report, as `SweepRecord` has it, best first: its settings pooled over seeds, where there are
    several, then its runs."""
    runs, pooled = report["runs"], report["pooled"]
    parts = [_settings(report), ""] if len(pooled) < len(runs) else []
    lines = [Text(visible(f"{run['run']}: {run['failed']}"), style="red") for run in runs if run["failed"]]
    lines += [Text(visible(f"warning: {line}"), style="yellow") for line in report["warnings"]]
    note = NOTE + RATIO_NOTE * bool(report["ratios"]) + DATA_NOTE * (len(runs) > 1)
    return Group(*parts, _runs(report, bool(parts)), "", *lines, Text(note, style="dim"))


def _settings(report: dict):
    pooled = report["pooled"]
    table = grid(*_swept(pooled), ">accept length", ">95 %", ">to the best", ">seeds", ">lowest - highest")
    for fact in pooled:
        lengths, of = fact["seeds"], "" if fact["measured"] == fact["runs"] else f" of {fact['runs']}"
        spread = f"{min(lengths):.2f} - {max(lengths):.2f}" if lengths else "-"
        ratio = _to_best(fact["setting"], report)
        table.add_row(*_values(fact), *_measured(fact), ratio, f"{fact['measured']}{of}", spread)
    return table


def _runs(report: dict, has_settings: bool):
    runs = report["runs"]
    letters = letters_of([run["data"] for run in runs])
    ratio = [] if has_settings else [">to the best"]
    table = grid(*_swept(runs), ">accept length", ">95 %", *ratio, ">steps", ">parameters", "data", "run")
    for run in runs:
        parameters = "-" if run["parameters"] is None else f"{run['parameters']:,}"
        of_best = [] if has_settings else [_to_best(run["setting"], report)]
        steps = f"{run['pruned']['step']:,} of {run['steps']:,}" if run["pruned"] else f"{run['steps']:,}"
        data, folder = letters[run["data"]], Path(run["run"]).name
        table.add_row(*_values(run), *_measured(run), *of_best, steps, parameters, data, folder)
    return table


def letters_of(digests: Sequence[str]) -> dict[str, str]:
    """Return a letter for each digest, in the order of their first; a number after the alphabet's end."""
    distinct = dict.fromkeys(digests)
    return {digest: LETTERS[n] if n < len(LETTERS) else str(n + 1) for n, digest in enumerate(distinct)}


def _to_best(setting: dict, report: dict) -> str:
    """The ratio of a setting to the best one, whose own is 1; "-" where one of them has no accept length."""
    first = report["pooled"][0]
    best = first["setting"]
    setting = {key: value for key, value in setting.items() if key in best}
    if setting == best and first["accept_len"] is not None:
        return "1"
    found = next((each for each in report["ratios"] if (each["setting"], each["to"]) == (setting, best)), None)
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{found['value']:.3f} [{low:.3f}, {high:.3f}]"


def _swept(facts: Sequence[dict]) -> list[str]:
    """The heads of a sweep's own columns: its fields, without their sections."""
    return [key.partition(".")[2] for key in facts[0]["setting"]] if facts else []


def _values(fact: dict) -> list[str]:
    return [f"{value:.6g}" if isinstance(value, float) else str(value) for value in fact["setting"].values()]


def _measured(fact: dict) -> tuple[str, str]:
    if fact.get("pruned"):
        return f"pruned at {fact['pruned']['accept_len']:.2f}", "-"
    if fact["accept_len"] is None:
        return fact.get("state", "-").replace("finished", "-"), "-"
    low, high = fact["interval"]
    return f"{fact['accept_len']:.2f}", f"{low:.2f} - {high:.2f}"
