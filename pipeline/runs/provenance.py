"""The provenance of a draft: what its run's folder records, and the cache that it was trained on, if still there."""

from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.cache import HiddenCache
from pipeline.cache.inspect import describe
from pipeline.errors import CacheError, UsageError
from pipeline.evaluation.reports import load_report
from pipeline.published.card import Facts, Measurement, Origin
from pipeline.runs.checkpoint import find_checkpoint, open_checkpoint
from pipeline.runs.folder import DONE, RUN, CacheRecord, read_recipe, read_result, read_run


@dataclass(frozen=True)
class Provenance:
    """What an export states about a draft besides its weights."""

    cache: HiddenCache | None
    origin: Origin
    facts: Facts


def provenance(place: Path) -> Provenance:
    """Return the provenance of a run, or of a checkpoint: almost empty for a checkpoint outside a run's folder."""
    checkpoint = find_checkpoint(place)
    folder = checkpoint.resolve().parent.parent
    if not (folder / RUN).is_file():
        return Provenance(None, Origin("float32"), Facts())
    recorded, recipe = read_run(folder), read_recipe(folder)
    step, start = open_checkpoint(checkpoint, ()).step, recorded.start
    origin = Origin(
        dtype=recipe.train.dtype,
        target=recorded.target,
        trained_on={"cache": recorded.cache.digest, "heldout": recipe.train.heldout},
    )
    facts = Facts(
        start=start and f"{Path(start.place).name}, {start.digest}",
        steps=step,
        recipe=recipe.toml(),
        cache=recorded.cache.digest,
        evaluations=evaluations(folder, step),
    )
    cache = _same_cache(recorded.cache)
    return Provenance(cache, origin, facts) if cache is None else _with_cache(cache, origin, facts)


def _same_cache(recorded: CacheRecord) -> HiddenCache | None:
    try:
        found = HiddenCache.open(recorded.path)
    except (UsageError, CacheError):  # moved, deleted or damaged since; the draft is none the worse for it
        return None
    return found if found.digest == recorded.digest else None


def _with_cache(cache: HiddenCache, origin: Origin, facts: Facts) -> Provenance:
    target, description = cache.identity.target, describe(cache.path)
    origin = replace(
        origin,
        revision=target.revision or None,
        architectures=tuple(cache.target_config.get("architectures") or ()),
        tokens=cache.tokens,
    )
    plan, gauge = description["plan"], description["gauge"]
    rules = cache.identity.samples
    template = {key: getattr(rules, key) for key in ("template_kwargs", "template_date") if rules.template_kwargs}
    facts = replace(facts, sources=plan["sources"], samples=plan["samples"], gauge=gauge, template=template)
    facts = replace(facts, target_digest=target.digest)
    return Provenance(cache, origin, facts)


def evaluations(folder: Path, step: int) -> list[Measurement]:
    """Return the measurements of the checkpoint after `step`: reports of `evaluate` in the run's folder or beside it
    under its name, and the accept length that training measured. Raises CacheError for a damaged one."""
    measured = []
    own = {folder / RUN, folder / DONE}
    for path in sorted({*folder.glob("*.json"), folder.parent / f"{folder.name}.json"} - own):
        try:
            report = load_report(path)
        except UsageError:  # another file, or a report of another version
            continue
        if report.draft.steps != step:
            continue
        threshold, drawn = report.settings.threshold, report.sampled
        cut = f", blocks cut at confidence {threshold:g}" if threshold else ""
        most = f"{report.settings.max_new} tokens at most{cut}"
        title = f"Decoded greedily with the target, {most}"
        measured.append(Measurement(title, report.overall, report.domains))
        if drawn:
            title = f"Replies drawn from the target at T = {drawn.temperature:g}, {most}"
            measured.append(Measurement(title, drawn.overall, drawn.domains))
    done = read_result(folder)
    if done and done.steps == step and done.eval and done.eval.calls:
        title = "On held-out replies that are the target's own, greedy, without decoding"
        measured.append(Measurement(title, done.eval, done.eval.domains))
    return measured
