"""The figures of several evaluations as JSON values: what the tables of `report` show, as numbers."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from pipeline.errors import UsageError
from pipeline.evaluation.reports import Report, accept_length, load_reports, pool_seeds
from pipeline.evaluation.tables import paired_ratio, sampled_at, temperatures_of


def report_figures(paths: Sequence[Path], baseline: Sequence[Path] = ()) -> dict:
    """Return an entry for each draft, its seeds pooled; with a baseline also its ratio to that, paired by prompt.

    UsageError for several baselines, or replies to other prompts.
    """
    loaded = load_reports([*paths, *baseline])
    reports, base = loaded[: len(paths)], loaded[len(paths) :]
    baselines = pool_seeds(base) if base else {}
    if len(baselines) > 1:
        raise UsageError(f"--against: {' and '.join(baselines)} are several drafts; name the seeds of one")
    drafts = [_draft(name, members, base) for name, members in pool_seeds(reports).items()]
    first = reports[0]
    against = {"against": next(iter(baselines))} if base else {}
    return {"target": first.target, "max_new": first.settings.max_new, **against, "drafts": drafts}


def _draft(name: str, members: list[Report], base: list[Report]) -> dict:
    first = members[0]
    speedups = [report.speed.speedup for report in members]
    counts = ("prompts", "identical", "near_ties")
    return {
        "draft": name,
        "seeds": sorted({report.draft.seed for report in members}, key=str),
        "block_size": first.draft.block_size,
        "proposals": first.verified_proposals,
        "parameters": first.draft.parameters,
        "greedy": _lengths(members, base),
        "sampled": [
            {"temperature": of_target, "draft_temperature": of_draft}
            | _lengths(sampled_at(members, (of_target, of_draft)), sampled_at(base, (of_target, of_draft)))
            for of_target, of_draft in temperatures_of(members)
        ],
        "calls_saved": fmean(report.overall.calls_saved for report in members),
        "speedup": None if None in speedups else fmean(speedups),
        "lossless": {count: sum(getattr(report.lossless, count) for report in members) for count in counts},
    }


def _lengths(members: list[Report], base: list[Report]) -> dict:
    """Return the accept length over all prompts, by domain, and the ratio to a baseline where there is one."""
    domains = sorted({domain for report in members for domain in report.domains})
    ratio = {"ratio": paired_ratio(members, base)} if base else {}
    return _length(members) | {"domains": {domain: _length(members, domain) for domain in domains}} | ratio


def _length(members: list[Report], domain: str | None = None) -> dict:
    found = accept_length(members, domain)
    value, *interval = map(float, found) if found else (None,)
    return {"accept_length": value, "interval": interval or None}
