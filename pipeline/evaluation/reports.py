"""What evaluations say: reading their reports, pooling seeds, accept lengths with their intervals."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.cache.manifest import has_form
from pipeline.checksummed_json import MAX_BYTES, damage_error, ends_with_checksum, parse_checksummed
from pipeline.errors import UsageError
from pipeline.untrusted import read_file

DECODED = {"domains": {str: {"accept_len": float, "calls": int}}, "samples": [{"domain": str, "lengths": [int]}]}
EVALUATION = {  # what is read of a report; more is in it
    "target": str,
    "draft": {"method": str, "block_size": int, "proposals": int, "parameters": int},
    "settings": {"max_new": int},
    **DECODED,
    "overall": {"calls_saved": float},
    "teacher_forced": {str: float},
    "speed": {str: float},
    "lossless": {"prompts": int, "identical": int, "near_ties": int},
}
DRAWN = {"temperature": float, "draft_temperature": float, **DECODED}


def load_reports(paths: Sequence[Path]) -> list[dict]:
    """Read what `pipeline evaluate --out` wrote, of one target and limit. UsageError for anything else."""
    reports = [load_report(Path(path)) for path in paths]
    targets = {report["target"] for report in reports}
    limits = {report["settings"]["max_new"] for report in reports}
    for what, found in (("targets", targets), ("limits of a reply's tokens", limits)):
        if len(found) > 1:  # a table and a plot state one
            raise UsageError(f"the reports are of several {what}, {sorted(found)}; compare those of one")
    return reports


def load_report(path: Path) -> dict:
    """Read what `pipeline evaluate --out` wrote. UsageError for what is no report, CacheError for a damaged one."""
    try:
        data = read_file(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no report of `pipeline evaluate --out FILE` ({_said(error)})") from None
    try:
        report, _ = parse_checksummed(data)
    except ValueError as error:
        if ends_with_checksum(data):
            raise damage_error(path, error, "put it back as it was, or evaluate that draft again") from None
        raise UsageError(f"{path} is no report of `pipeline evaluate --out FILE` ({error})") from None
    wrong = [key for key in EVALUATION if not has_form(report, {key: EVALUATION[key]})]
    if not wrong and report.get("sampled") is not None and not has_form(report["sampled"], DRAWN):
        wrong = ["sampled"]
    if wrong:
        raise UsageError(
            f"{path} is no report of `pipeline evaluate --out FILE`, or one of another version: its `{wrong[0]}` is "
            "absent or not as expected; evaluate that draft again"
        )
    return report


def _said(error: Exception) -> object:
    return getattr(error, "strerror", None) or error


def columns_of(reports: list[dict]) -> dict[str, list[dict]]:
    """Pool the reports of drafts that differ only in their seed. Others of one name are told apart by a folder's."""
    pooled = defaultdict(list)
    for report in reports:
        draft = report["draft"]
        conventions = draft.get("block_size"), draft.get("proposals"), draft.get("parameters")
        pooled[name_of(report), draft.get("recipe"), report.get("cache"), *conventions].append(report)
    names, columns = Counter(name for name, *_ in pooled), {}
    for (name, *_), members in pooled.items():
        head = name if names[name] == 1 else f"{name} ({Path(members[0]['draft'].get('path', '')).name})"
        columns[head if head not in columns else f"{head} {len(columns) + 1}"] = members
    return columns


def name_of(report: dict) -> str:
    """What a column is called: what is most compared of a draft, and how its blocks were cut."""
    draft = report["draft"]
    steps = [f"{draft['steps']:,} steps"] if draft.get("steps") else []
    return ", ".join([draft["method"], *variants(report), *steps])


def variants(report: dict) -> list[str]:
    """What sets a draft apart from others of its method: what it learned from, where that is not as published, and
    where its blocks were cut."""
    draft, threshold = report["draft"], report["settings"].get("threshold")
    published = {"objective": _published_objective(draft["method"]), "weighting": "decay"}
    parts = [draft.get(key) for key, value in published.items() if draft.get(key) != value]
    parts.append(f"cut at {threshold:g}" if threshold else None)
    return [part for part in parts if part]


def _published_objective(method: str) -> str:
    from pipeline.drafts import DRAFTS  # here, not above: it brings torch

    return DRAFTS[method].Config.defaults({}).get("objective", "ce") if method in DRAFTS else "ce"


def sampling_temperatures(report: dict) -> tuple[float, float] | None:
    """The temperatures of target and draft that replies were drawn at."""
    sampled = report.get("sampled")
    return (sampled["temperature"], sampled["draft_temperature"]) if sampled else None


def temperatures(temperature: float, of_draft: float) -> str:
    """Return how a row names them: the draft's only where it is another."""
    drafts = "" if of_draft == temperature else f", drafts at {of_draft:g}" if of_draft else ", greedy drafts"
    return f"{temperature:g}{drafts}"


def cell(reports: list[dict], domain: str | None) -> str:
    """Return one figure of the table, over one domain or all: the accept length and its interval."""
    found = accept_length(reports, domain)
    return "{:.2f} [{:.2f}, {:.2f}]".format(*found) if found else "-"


def accept_length(reports: list[dict], domain: str | None = None) -> tuple[float, float, float] | None:
    """Return the accept length over all prompts of all seeds, and the ends of its 95 % interval; None without calls.

    A prompt that several seeds decoded is drawn as one: its replies are no independent ones. UsageError where seeds
    decoded other prompts.
    """
    from pipeline.evaluation.accept_length import (
        bootstrap,  # here, not above: torch takes seconds that not every table needs
    )

    if len(set(map(prompt_set, reports))) > 1:
        counts = ", ".join(str(len(report["samples"])) for report in reports)
        raise UsageError(
            f"seeds of one recipe were evaluated on other prompts ({counts} of them), which cannot be "
            "pooled; evaluate each with the same --count, --prompts and cache"
        )
    prompts = prompts_of(reports, domain)
    if not prompts:
        return None
    tokens_n, calls_n = np.stack(list(prompts.values())).T
    return (tokens_n.sum() / calls_n.sum(), *bootstrap(tokens_n, calls_n, seed=0))


def prompt_set(report: dict) -> tuple:
    """Return what tells its prompts from another report's. Reports of earlier versions name domains and cache only."""
    known = report.get("cache")
    return tuple((sample["domain"], sample.get("prompt", known)) for sample in report["samples"])


def prompts_of(reports: list[dict], domain: str | None = None) -> dict[tuple[int, str], np.ndarray]:
    """Return tokens and calls of every prompt that took a call, by its place and domain, seeds added up."""
    prompts = defaultdict(lambda: np.zeros(2))
    for report in reports:
        for number, sample in enumerate(report["samples"]):
            if sample["lengths"] and domain in (None, sample["domain"]):
                prompts[number, sample["domain"]] += (sum(sample["lengths"]), len(sample["lengths"]))
    return prompts
