"""Opening the folder of a training run: one process at a time, one recipe and one cache for its whole life.

run.json, recipe.toml, done.json     see pipeline/runs/folder.py
checkpoints/                         see pipeline/runs/checkpoint.py
metrics.jsonl, timing.jsonl          see metrics_log.py
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
from pipeline.cache.atomic import try_lock, write_errors
from pipeline.cache.layout import FINAL
from pipeline.drafts import needs_final_states
from pipeline.drafts.rope_scaling import RopeScaling
from pipeline.errors import CacheError, UsageError
from pipeline.published.init_from import InitialWeights
from pipeline.runs.folder import RECIPE, RUN, read_recipe, read_run, write_run
from pipeline.runs.recipe import Resolved
from pipeline.runs.split import Split
from pipeline.target.logit_chunks import NEWEST, RULES

OTHER_FOLDERS = {
    "config.json": "a model or a draft",
    "cache.json": "a cache",
}  # files of other kinds of folder
RECORDED = ("torch", "numpy", "safetensors", "pydantic")


def default_folder(resolved: Resolved, cache: HiddenCache, split: Split, start: InitialWeights | None = None) -> Path:
    """Return the folder of a run without --out: named by method and a digest of all that decides the draft."""
    initial = [] if start is None else [start.digest]
    digests = (resolved.recipe.digest(), cache.digest, split.digest, *_lossy_states(resolved, cache), *initial)
    return Path("runs") / f"{resolved.draft.method}-{_short_digest(*digests)}"


def _lossy_states(resolved: Resolved, cache: HiddenCache) -> list[str]:
    """Return the columns trained on whose codec is lossy, with the codec: "aux.9 int8"."""
    final = [FINAL] * needs_final_states(resolved.draft)
    rounded = cache.rounded([*resolved.draft.target_layer_ids, *final])
    return [f"{name} {'/'.join(codecs)}" for name, codecs in rounded.items()]


def _short_digest(*digests: str) -> str:
    return hashlib.blake2b("".join(digests).encode(), digest_size=5).hexdigest()


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Lock a run's folder, which is made if need be. Raises UsageError when another process trains there; RoomError."""
    with write_errors(run, "a run"):
        run.mkdir(parents=True, exist_ok=True)
        fd = try_lock(run / "lock")
    if fd is None:
        raise UsageError(f"{run} is being trained by another process; wait for it, or pass another --out")
    try:
        yield
    finally:
        os.close(fd)


def create_or_check(
    run: Path,
    resolved: Resolved,
    cache: HiddenCache,
    split: Split,
    machine: dict[str, str],
    start: InitialWeights | None = None,
) -> list[str]:
    """Write run.json and recipe.toml of a new run, or check that the run already there is the same.

    Returns the differences in `machine` and package versions as text: the run may go on, but its exact bits are no
    longer promised. Raises UsageError naming the first difference with both values: another recipe, number of steps,
    cache, corpus or initial weights.
    """
    facts = {
        "cache": {
            "path": str(cache.path.resolve()),
            "digest": cache.digest,
            "rounded": _lossy_states(resolved, cache),
        },
        "split": {"train": len(split.train), "heldout": len(split.heldout), "digest": split.digest},
        "target": cache.identity.target.name,
        "start": None if start is None else {"place": str(start.place), "digest": start.digest, "fresh": start.fresh},
        "versions": {"pipeline": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in RECORDED},
        "head_chunk": NEWEST,
        "rope_scaling": resolved.draft.rope_scaling and resolved.draft.rope_scaling.as_config(),
        "machine": machine,
        "command": sys.argv,
    }
    if not (run / RECIPE).exists():
        marker = next((name for name in OTHER_FOLDERS if (run / name).is_file()), None)
        if marker:
            raise UsageError(
                f"{run} holds {OTHER_FOLDERS[marker]} ({marker}), and a run in it would hide it; pass another --out"
            )
        write_run(run, facts, resolved.recipe.toml())
        return []
    record = read_run(run)
    recorded = _flat(read_recipe(run).model_dump()) | _identity(record)
    current = _flat(resolved.recipe.model_dump()) | _identity(facts)
    for key in current:
        if recorded.get(key) != current[key]:
            appended = record["cache"]["digest"] in cache.earlier_digests
            grown = f" ({cache.path} has grown by an append since)" if appended else ""
            raise UsageError(
                f"{run} was started with {key} = {recorded.get(key)}, this command asks for {current[key]}{grown}; "
                "a run goes on with what it began with: pass another --out for another run"
            )
    before, now = ({**each.get("machine", {}), **each["versions"]} for each in (record, facts))
    return [f"{key} {before[key]}, now {now[key]}" for key in now if before.get(key, now[key]) != now[key]]


def recorded_chunk_rule(run: Path) -> int:
    """Return the rule of `logit_chunks.py` that run.json records; runs of version 0.5 and before record none.

    Raises UsageError for a rule of a later version, CacheError for a value that is no rule.
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


def with_recorded_rope(run: Path, resolved: Resolved) -> Resolved:
    """Return `resolved` with the rotary scaling that run.json records; runs of version 0.5 and before have none.

    Raises CacheError for a damaged record.
    """
    recorded = read_run(run).get("rope_scaling")
    try:
        scaling = None if recorded is None else RopeScaling(**recorded)
    except (TypeError, ValueError) as error:
        raise CacheError(f"{run / RUN}: damaged, no rope_scaling ({error}); put it back as it was") from None
    return replace(resolved, draft=resolved.draft.model_copy(update={"rope_scaling": scaling}))


def _identity(facts: dict) -> dict:
    rounded = ", ".join(facts["cache"]["rounded"]) or "as captured"
    start = (facts.get("start") or {}).get("digest", "fresh")
    digests = {"cache digest": facts["cache"]["digest"], "split digest": facts["split"]["digest"]}
    return digests | {"states": rounded, "initial weights": start}


def _flat(recipe: dict) -> dict:
    return {f"{section}.{field}": value for section, fields in recipe.items() for field, value in fields.items()}
