"""Where a draft comes from: what its run's folder tells, and the cache that it was trained on, where that still is."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.cache import HiddenCache
from pipeline.cache.inspect import describe
from pipeline.checkpoint import RUN, find_checkpoint, open_checkpoint, read_run
from pipeline.errors import CacheError, UsageError
from pipeline.published.card import Facts
from pipeline.published.writing import Origin
from pipeline.recipe import load_recipe


@dataclass(frozen=True)
class Provenance:
    """What an export says of a draft beyond its weights."""

    cache: HiddenCache | None
    origin: Origin
    facts: Facts


def provenance(place: Path) -> Provenance:
    """Return what is known of a run, or of a checkpoint: little of one that stands alone."""
    checkpoint = find_checkpoint(place)
    folder = checkpoint.resolve().parent.parent
    if not (folder / RUN).is_file():
        return Provenance(None, Origin("float32"), Facts())
    recorded, recipe = read_run(folder), load_recipe(folder / "recipe.toml")
    held, step = recorded["cache"], open_checkpoint(checkpoint).step
    origin = Origin(
        dtype=recipe.train.dtype,
        target=recorded["target"],
        trained_on={"cache": held["digest"], "heldout": recipe.train.heldout},
    )
    begun = recorded.get("start")
    begun = begun and f"{Path(begun['place']).name}, {begun['digest']}"
    facts = Facts(
        start=begun, steps=step, recipe=recipe.toml(), cache=held["digest"], evaluations=evaluations(folder, step)
    )
    cache = _same_cache(held)
    return Provenance(cache, origin, facts) if cache is None else _with_cache(cache, origin, facts)


def _same_cache(held: dict) -> HiddenCache | None:
    try:
        found = HiddenCache.open(held["path"])
    except (UsageError, CacheError):  # moved, deleted or damaged since; the draft is none the worse for it
        return None
    return found if found.digest == held["digest"] else None


def _with_cache(cache: HiddenCache, origin: Origin, facts: Facts) -> Provenance:
    target, told = cache.identity["target"], describe(cache.path)
    origin = replace(
        origin,
        revision=target.get("revision") or None,
        architectures=tuple(cache.target_config.get("architectures") or ()),
        tokens=cache.tokens,
    )
    plan, gauge = told["plan"], told["gauge"]
    facts = replace(
        facts, sources=plan["sources"], samples=plan["samples"], gauge=gauge, target_digest=target["digest"]
    )
    return Provenance(cache, origin, facts)


def evaluations(folder: Path, step: int) -> list[dict]:
    """Return what was measured of the checkpoint after `step`: reports of `evaluate` that lie in the run's folder or
    beside it under its name, and the accept length that training measured itself."""
    found = []
    for path in sorted([*folder.glob("*.json"), folder.parent / f"{folder.name}.json"]):
        report = _json(path)
        if not ({"overall", "domains", "settings", "draft"} <= report.keys() and report["draft"].get("steps") == step):
            continue
        settings = report["settings"]
        cut = f", blocks cut at confidence {settings['threshold']:g}" if settings.get("threshold") else ""
        most = f"{settings['max_new']} tokens at most{cut}"
        found.append({"title": f"Decoded greedily with the target, {most}", "figures": _figures(report)})
        drawn = report.get("sampled")
        if drawn:
            title = f"Replies drawn from the target at T = {drawn['temperature']:g}, {most}"
            found.append({"title": title, "figures": _figures(drawn)})
    done = _json(folder / "done.json")
    if done.get("steps") == step and done.get("eval") and done["eval"]["calls"]:
        title = "On held-out replies that are the target's own, greedy, without decoding"
        found.append({"title": title, "figures": done["eval"]})
    return found


def _figures(part: dict) -> dict:
    return part["overall"] | {"domains": part["domains"]}


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
