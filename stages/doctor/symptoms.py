"""`pipeline doctor RUN`: the likely causes in order, each checked on that run and its cache; the first is named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Group
from rich.text import Text

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import in_use, is_locked
from pipeline.cache.layout import IDENTITY
from pipeline.errors import PipelineError, UsageError
from pipeline.evaluation.reports import load_report
from pipeline.published.reading import CONFIG, read_json
from pipeline.runs.folder import RUN
from pipeline.runs.training_data import partial_text
from pipeline.target.files import find_target, template_digest
from pipeline.visible_text import visible
from stages.doctor import acceptance, mismatch, reading_and_memory
from stages.doctor.examined_run import Case, greedy_share
from stages.doctor.finding import NOTE, OK, PROBLEM, Finding, findings_table, within
from stages.doctor.reading_and_memory import FitOn

CHECK_S = 120.0  # of one check
VERDICTS = {OK: "not it", NOTE: "perhaps", PROBLEM: "this is it"}


def examine(
    place: Path,
    *,
    cache: Path | None = None,
    target: Path | None = None,
    export: Path | None = None,
    memory: int | None = None,
    fit_on: FitOn,
) -> dict:
    """Return what is wrong with a run, an evaluation's run, or a cache, as JSON values.

    UsageError for a place that is none of these, and for folders that are not what they are named for.

    cache: in place of the run's own. target, export: folders to compare with it. memory: a device's, in bytes. fit_on:
    see `reading_and_memory.FitOn`.
    """
    if (place / IDENTITY).is_file():
        return _report(place, "cache", _checked(_of_cache(HiddenCache.open(place))), {})
    case = find_case(place, cache)
    if cache is not None:
        HiddenCache.open(cache)
    if target is not None:
        if not target.is_dir():
            raise UsageError(f"--target {target} is no folder; pass that of the target's files")
        template_digest(find_target(str(target)))
    if export is not None:
        read_json(export / CONFIG)
    checks = _of_run(case, target, export, memory, fit_on)
    findings = _checked(checks)
    return _report(case.path, "run", findings, _seen(case))


def find_case(place: Path, cache: Path | None) -> Case:
    """Return the run in a folder, or that of an evaluation's report. UsageError."""
    if place.is_file():
        report = load_report(place)
        run = Path(report.draft.path)
        run = run if (run / RUN).is_file() else place.parent / run.name
        if not (run / RUN).is_file():
            raise UsageError(
                f"{place} is of the draft in {report.draft.path}, which is not there; pass that run's folder"
            )
        return Case(run, report, cache)
    if not (place / RUN).is_file():
        raise UsageError(f"{place} is no run, no report of `pipeline evaluate --out` and no cache; pass one of them")
    return Case(place, None, cache)


# Why an accept length is low; where it is not, what these find is worth a note.
LOW_ACCEPTANCE = {
    "loss mask": acceptance.few_supervised,
    "off-policy corpus": acceptance.off_policy,
    "draft vocabulary": acceptance.vocabulary,
    "other domains": acceptance.other_domains,
    "learned by heart": acceptance.overfitted,
    "too little training": acceptance.untrained,
}
Checks = list[tuple[str, Callable[[], Finding]]]


def _of_run(case: Case, target: Path | None, export: Path | None, memory: int | None, fit_on) -> Checks:
    """The checks in order: first what makes all others vain, then what brings about others, slowness last."""
    named = [("target", lambda: mismatch.other_target(case, target))] * (target is not None)
    named += [("export", lambda: mismatch.other_export(case, export))] * (export is not None)
    return [
        ("records and cache", lambda: damage(case)),
        ("cache, norm, codec", lambda: mismatch.other_cache(case)),
        ("out of memory", lambda: reading_and_memory.out_of_memory(case, fit_on, memory)),
        ("divergence", lambda: acceptance.diverged(case)),
        ("unfinished", lambda: mismatch.unfinished(case)),
        ("labels, layers, config", lambda: mismatch.other_draft(case)),
        *named,
        *[(name, lambda check=check: of_low(case, check(case))) for name, check in LOW_ACCEPTANCE.items()],
        ("teacher forcing", lambda: acceptance.exposure(case)),
        ("slow reading", lambda: reading_and_memory.slow_reading(case)),
    ]


def of_low(case: Case, found: Finding) -> Finding:
    """Return a finding; a NOTE in place of a PROBLEM where the accept length is not low."""
    return found if case.is_low or found.state != PROBLEM else replace(found, state=NOTE)


def _of_cache(cache: HiddenCache) -> Checks:
    return [
        ("unfinished", lambda: captured(cache)),
        ("loss mask", lambda: cache_mask(cache)),
        ("off-policy corpus", lambda: cache_off_policy(cache)),
    ]


def _checked(checks: Checks) -> list[Finding]:
    """Run checks until one finds what makes the others vain: damage, another cache, or that nothing is saved yet."""
    findings = []
    for name, check in checks:
        findings += within(CHECK_S, name, check, failed=NOTE)
        if name in ("records and cache", "cache, norm, codec") and findings[-1].state == PROBLEM:
            break
        if name == "unfinished" and findings[-1].facts.get("step") == 0:
            break
    return findings


def damage(case: Case) -> Finding:
    """Every byte of the run's records, logs and newest checkpoint, and whether its cache opens."""
    read = case.record, case.recipe, case.result, case.state, case.config, case.steps, case.timing
    samples = len(case.split.train)
    assert len(read) == 7, "each is read strictly; the errors say what is damaged"
    return Finding(
        "records and cache", OK, f"records, logs, newest checkpoint and {samples:,} samples' tokens are sound"
    )


def captured(cache: HiddenCache) -> Finding:
    """Whether every shard has every column."""
    facts = {"shards": cache.shards, "partial": dict(cache.catalog.partial), "in_use": in_use(cache.path)}
    if not cache.whole or cache.catalog.partial:
        words = partial_text(cache) or "nothing is captured yet"
        if facts["in_use"]:
            return Finding("unfinished", NOTE, f"being captured: {words}", facts=facts)
        return Finding("unfinished", PROBLEM, words, "", "the same `pipeline cache-hidden` goes on", facts)
    words = f"{cache.shards} shards are whole; every byte: `pipeline verify {cache.path}`"
    return Finding("unfinished", OK, words, facts=facts)


def cache_off_policy(cache: HiddenCache) -> Finding:
    agree, rows = mismatch.gauge(cache)
    if not rows:
        usable = cache.samples.usable(cache.layers, cache.has_final).nonzero()[0]
        agree, rows = greedy_share(cache, usable[:16].tolist())
    return acceptance.off_policy_of(cache, agree, rows, "at capture")


def cache_mask(cache: HiddenCache) -> Finding:
    table = cache.samples
    return acceptance.mask_of(cache, table.supervised, table.length, 0)


def _seen(case: Case) -> dict:
    """The figures that people come with."""
    seen: dict = {"trained_now": is_locked(case.path / "lock")}
    try:
        seen |= {
            "steps": case.steps[-1]["step"] if case.steps else 0,
            "of_steps": case.recipe.train.steps,
            "accuracy": case.steps[-1].get("accuracy") if case.steps else None,
            "accept_len": case.accept_len,
            "reported": case.report.overall.accept_len if case.report else None,
            "data_wait": case.timing["data_wait"] if case.timing else None,
        }
    except (PipelineError, RuntimeError):
        seen["accept_len"] = None  # its check says why
    return seen


def _report(path: Path, kind: str, findings: list[Finding], seen: dict) -> dict:
    causes = [found for found in findings if found.state == PROBLEM]
    return {
        "path": str(path),
        "kind": kind,
        "state": "problem" if causes else "ok",
        "seen": seen,
        "cause": causes[0].as_dict() if causes else None,
        "findings": [found.as_dict() for found in findings],
    }


def symptoms_table(report: dict) -> Group:
    """Return the verdict, the most likely cause first, and below it every check."""
    cause, findings = report["cause"], [Finding(**each) for each in report["findings"]]
    if cause:
        lines = [f"most likely: {cause['check']}: {cause['found']}"]
        lines += [cause["used"]] * bool(cause["used"]) + [f"what mends it: {cause['remedy']}"] * bool(cause["remedy"])
        verdict = Text("\n".join(visible(line) for line in lines), style="bold red")
    else:
        verdict = Text(f"healthy: none of the likely causes was found{_engines_hint(report)}", style="green")
    return Group(Text(visible(_head(report)), style="bold"), verdict, "", findings_table(findings, VERDICTS))


def _engines_hint(report: dict) -> str:
    if report["kind"] == "cache":
        return ""
    return "; if an engine accepts less than this, compare it with `pipeline serve-check` and --export here"


def _head(report: dict) -> str:
    seen, parts = report["seen"], [report["path"]]
    if seen.get("steps") is not None:
        parts.append(f"step {seen['steps']:,} of {seen['of_steps'] or 0:,}")
    names = {"accept_len": "accept length", "reported": "in the report", "accuracy": "training accuracy"}
    names["data_wait"] = "data wait"
    for key, words in names.items():
        if seen.get(key) is not None:
            value = f"{seen[key]:.2f}" if key in ("accept_len", "reported") else f"{seen[key]:.0%}"
            parts.append(f"{words} {value}")
    return ", ".join(parts)
