"""A run's folder: one process at a time, one recipe and one cache for its whole life.

run.json, recipe.toml, done.json     see pipeline/runs/folder.py
checkpoints/                         see pipeline/runs/checkpoint.py
metrics.jsonl, timing.jsonl          see journal.py
"""

import contextlib
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from pipeline import __version__
from pipeline.cache import HiddenCache
from pipeline.cache.atomic import lock, room
from pipeline.cache.layout import FINAL
from pipeline.drafts import needs_teacher
from pipeline.drafts.rope_scaling import RopeScaling
from pipeline.errors import CacheError, UsageError
from pipeline.published.init_from import InitialWeights
from pipeline.runs.folder import RECIPE, RUN, read_recipe, read_run, write_run
from pipeline.runs.recipe import Resolved
from pipeline.runs.split import Split
from pipeline.target.logit_chunks import NEWEST, RULES

OTHERS = {"config.json": "a model or a draft", "cache.json": "a cache"}  # whose folder is no place for a run
RECORDED = ("torch", "numpy", "safetensors", "pydantic")


def default_folder(resolved: Resolved, cache: HiddenCache, split: Split, start: InitialWeights | None = None) -> Path:
    """Return where a run goes when nobody says: named by method, and by what decides how the draft comes out."""
    begun = [] if start is None else [start.digest]
    digests = (resolved.recipe.digest(), cache.digest, split.digest, *_states(resolved, cache), *begun)
    return Path("runs") / f"{resolved.draft.method}-{_short(*digests)}"


def _states(resolved: Resolved, cache: HiddenCache) -> list[str]:
    """Return which of the states trained on are not as they were captured, such as "aux.9 int8"."""
    final = [FINAL] * needs_teacher(resolved.draft)
    rounded = cache.rounded([*resolved.draft.target_layer_ids, *final])
    return [f"{name} {'/'.join(codecs)}" for name, codecs in rounded.items()]


def _short(*digests: str) -> str:
    return hashlib.blake2b("".join(digests).encode(), digest_size=5).hexdigest()


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold a run's folder, made if need be. UsageError when another process trains there; RoomError."""
    with room(run, "a run"):
        run.mkdir(parents=True, exist_ok=True)
        fd = lock(run / "lock")
    if fd is None:
        raise UsageError(f"{run} is being trained by another process; wait for it, or pass another --out")
    try:
        yield
    finally:
        os.close(fd)


def enter(
    run: Path,
    resolved: Resolved,
    cache: HiddenCache,
    split: Split,
    machine: dict[str, str],
    start: InitialWeights | None = None,
) -> list[str]:
    """Write what the run is, or check that the run already there is the same.

    Returns what differs of `machine` and versions: that is no other run, but its bits are no longer promised. Raises
    UsageError naming the first difference with both values: another recipe, horizon, cache, corpus or start.
    """
    facts = {
        "cache": {
            "path": str(cache.path.resolve()),
            "digest": cache.digest,
            "rounded": _states(resolved, cache),
        },
        "split": {"train": len(split.train), "heldout": len(split.heldout), "digest": split.digest},
        "target": cache.identity["target"]["name"],
        "start": None if start is None else {"place": str(start.place), "digest": start.digest, "fresh": start.fresh},
        "versions": {"pipeline": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in RECORDED},
        "head_chunk": NEWEST,
        "rope_scaling": resolved.draft.rope_scaling and resolved.draft.rope_scaling.stated(),
        "machine": machine,
        "command": sys.argv,
    }
    if not (run / RECIPE).exists():
        taken = next((name for name in OTHERS if (run / name).is_file()), None)
        if taken:
            raise UsageError(
                f"{run} holds {OTHERS[taken]} ({taken}), and a run in it would hide it; pass another --out"
            )
        write_run(run, facts, resolved.recipe.toml())
        return []
    there = read_run(run)
    before = _flat(read_recipe(run).model_dump()) | _identity(there)
    now = _flat(resolved.recipe.model_dump()) | _identity(facts)
    for key in now:
        if before.get(key) != now[key]:
            grown = f" ({cache.path} has grown by an append since)" if there["cache"]["digest"] in cache.earlier else ""
            raise UsageError(
                f"{run} was started with {key} = {before.get(key)}, this command asks for {now[key]}{grown}; "
                "a run goes on with what it began with: pass another --out for another run"
            )
    began, here = ({**record.get("machine", {}), **record["versions"]} for record in (there, facts))
    return [f"{key} {began[key]}, now {here[key]}" for key in here if began.get(key, here[key]) != here[key]]


def chunk_rule(run: Path) -> int:
    """Return the rule of `logit_chunks.py` that a run began with, and goes on with; those of 0.5 and before state none.

    Raises UsageError for a rule of a later version, CacheError for what is no rule.
    """
    rule = read_run(run).get("head_chunk", min(RULES))
    if type(rule) is not int or rule < min(RULES):
        raise CacheError(f"{run / RUN}: damaged, head_chunk {rule!r} is no rule; put it back as it was")
    if rule not in RULES:
        raise UsageError(
            f"{run} was begun by a later version: its logits are cut by rule {rule}, this version knows "
            f"{', '.join(map(str, RULES))}; go on with that version, or pass another --out"
        )
    return rule


def as_begun(run: Path, resolved: Resolved) -> Resolved:
    """Return what a run trains, with the rotary positions that it began with: those of 0.5 and before are plain.

    Raises CacheError for a damaged record.
    """
    stated = read_run(run).get("rope_scaling")
    try:
        begun = None if stated is None else RopeScaling(**stated)
    except (TypeError, ValueError) as error:
        raise CacheError(f"{run / RUN}: damaged, no rope_scaling ({error}); put it back as it was") from None
    return replace(resolved, draft=resolved.draft.model_copy(update={"rope_scaling": begun}))


def _identity(facts: dict) -> dict:
    rounded = ", ".join(facts["cache"]["rounded"]) or "as captured"
    start = (facts.get("start") or {}).get("digest", "fresh")
    digests = {"cache digest": facts["cache"]["digest"], "split digest": facts["split"]["digest"]}
    return digests | {"states": rounded, "initial weights": start}


def _flat(recipe: dict) -> dict:
    return {f"{section}.{field}": value for section, fields in recipe.items() for field, value in fields.items()}
