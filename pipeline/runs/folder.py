"""A run's folder: its records, read strictly, and one recipe and one cache for its whole life.

    RUN/run.json       `RunRecord`: cache, target, versions, command line, and size and checksum of recipe.toml
        recipe.toml    the resolved recipe
        done.json      `Result`, with the checksum of the checkpoint that it belongs to
        lock           locked by the process that trains
        checkpoints/   see pipeline/runs/checkpoint.py
        metrics.jsonl, timing.jsonl    see stages/train_draft/logs.py

The JSON files end with a checksum of themselves, which is verified before use; those of version 0.5.0 and earlier have
none. Read by training, `evaluate` and `export`.
"""

import contextlib
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import FailFast, Field

from pipeline import __version__
from pipeline.cache import HiddenCache
from pipeline.cache.atomic import try_lock, write_errors, write_file
from pipeline.cache.layout import FINAL
from pipeline.cache.manifest import FileFact
from pipeline.drafts.rope import RopeScaling
from pipeline.errors import CacheError, UsageError
from pipeline.evaluation.accept_length import Figures
from pipeline.json_files import (
    Count,
    Counts,
    FailFastDict,
    Number,
    Record,
    damage_error,
    read_file,
    read_record,
    record_bytes,
)
from pipeline.runs.checkpoint import CONFIG, DRAFT, STATE, checkpoint_folder, open_checkpoint
from pipeline.runs.recipe import MAX_BYTES, Recipe, Resolved, load_recipe
from pipeline.runs.training_data import Split
from pipeline.secret_masking import masked_command
from pipeline.target.head import NEWEST, RULES

if TYPE_CHECKING:
    from pipeline.published.init_from import InitialWeights

RUN, RECIPE, DONE = "run.json", "recipe.toml", "done.json"
OTHER_FOLDERS = {"config.json": "a model or a draft", "cache.json": "a cache"}  # files of other kinds of folder
ONE_RANK = {"ranks": "1"}  # what runs of versions that knew no others do not record
PACKAGES = ("torch", "numpy", "safetensors", "pydantic")  # whose versions are recorded
PUT_BACK = "put it back as it was, or train into another --out"
MAKE_AGAIN = "remove it: the same `pipeline train-draft` makes it again from the newest checkpoint"


class CacheRecord(Record):
    path: str
    digest: str
    rounded: list[str]  # columns read whose codec is lossy, such as "aux.9 int8"


class SplitRecord(Record):
    """How many samples train and are held out, and a digest of which."""

    train: Count = 0
    heldout: Count = 0
    digest: str


class StartRecord(Record):
    """The initial weights: where they were, a digest of them, and the tensors that were random instead."""

    place: str = ""
    digest: str = ""
    fresh: list[str] = Field(default_factory=list)


class RunRecord(Record):
    """run.json: what a run is."""

    cache: CacheRecord
    split: SplitRecord
    target: str  # its name
    start: StartRecord | None = None  # None: random weights
    versions: dict[str, str]  # of this program, Python and PACKAGES
    head_chunk: int = Field(min(RULES), ge=min(RULES))  # see `chunk_rule`; version 0.5 and before record none
    rope_scaling: RopeScaling | None = None
    machine: dict[str, str] = Field(default_factory=dict)  # what a run's exact bits depend on besides versions
    command: list[str] = Field(default_factory=list)
    recipe: FileFact | None = None

    def identity(self) -> dict[str, str]:
        """Return what must stay the same for the run to go on, by its name in messages."""
        return {
            "cache digest": self.cache.digest,
            "split digest": self.split.digest,
            "states": ", ".join(self.cache.rounded) or "as captured",
            "initial weights": "fresh" if self.start is None else self.start.digest,
        }


class Evaluation(Figures):
    """The accept length on held-out replies, of each domain, and of each reply: sample, first row, tokens, calls."""

    domains: Annotated[dict[str, Figures], FailFastDict]
    replies: Annotated[list[Counts], FailFast()] = Field(default_factory=list)


class Result(Record):
    """done.json: a finished run."""

    steps: Count
    parameters: Count
    accept_len: Number | None = None
    eval: Evaluation | None = None  # of the last step; None where nothing can be measured
    state: FileFact | None = None  # of the last checkpoint's state.json


def default_folder(resolved: Resolved, cache: HiddenCache, split: Split, start: "InitialWeights | None" = None) -> Path:
    """Return the folder of a run without --out: named by method and a digest of all that decides the draft."""
    initial = [] if start is None else [start.digest]
    digests = (resolved.recipe.digest(), cache.digest, split.digest, *_lossy_states(resolved, cache), *initial)
    name = hashlib.blake2b("".join(digests).encode(), digest_size=5).hexdigest()
    return Path("runs") / f"{resolved.draft.method}-{name}"


def _lossy_states(resolved: Resolved, cache: HiddenCache) -> list[str]:
    """Return the columns trained on whose codec is lossy, with the codec: "aux.9 int8"."""
    final = [FINAL] * resolved.draft.needs_final_states
    rounded = cache.rounded([*resolved.draft.target_layer_ids, *final])
    return [f"{name} {'/'.join(codecs)}" for name, codecs in rounded.items()]


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
    start: "InitialWeights | None" = None,
) -> list[str]:
    """Write run.json and recipe.toml of a new run, or check that the run already there is the same.

    Returns the differences in `machine` and package versions as text: the run may go on, but its exact bits are no
    longer promised. Raises UsageError naming the first difference with both values: another recipe, number of steps,
    cache, corpus or initial weights.
    """
    initial = start and StartRecord(place=str(start.path), digest=start.digest, fresh=list(start.fresh))
    scaling = resolved.draft.rope_scaling
    versions = {"pipeline": __version__, "python": platform.python_version()}
    now = RunRecord(
        cache=CacheRecord(path=str(cache.path.resolve()), digest=cache.digest, rounded=_lossy_states(resolved, cache)),
        split=SplitRecord(train=len(split.train), heldout=len(split.heldout), digest=split.digest),
        target=cache.identity.target.name,
        start=initial,
        versions=versions | {name: metadata.version(name) for name in PACKAGES},
        head_chunk=NEWEST,
        rope_scaling=scaling and RopeScaling(**scaling.as_config()),
        machine=machine,
        command=masked_command(sys.argv),
    )
    if not (run / RECIPE).exists():
        marker = next((name for name in OTHER_FOLDERS if (run / name).is_file()), None)
        if marker:
            raise UsageError(
                f"{run} holds {OTHER_FOLDERS[marker]} ({marker}), and a run in it would hide it; pass another --out"
            )
        write_run(run, now, resolved.recipe.toml())
        return []
    then = read_run(run)
    recorded = _flat(read_recipe(run).model_dump()) | then.identity()
    current = _flat(resolved.recipe.model_dump()) | now.identity()
    for key in current:
        if recorded.get(key) != current[key]:
            appended = then.cache.digest in cache.earlier_digests
            grown = f" ({cache.path} has grown by an append since)" if appended else ""
            raise UsageError(
                f"{run} was started with {key} = {recorded.get(key)}, this command asks for {current[key]}{grown}; "
                "a run goes on with what it began with: pass another --out for another run"
            )
    before, after = (ONE_RANK | record.machine | record.versions for record in (then, now))
    return [f"{key} {before[key]}, now {after[key]}" for key in after if before.get(key, after[key]) != after[key]]


def chunk_rule(run: Path) -> int:
    """Return the rule of `target/head.py` that run.json records. Raises UsageError for a rule of a later version."""
    rule = read_run(run).head_chunk
    if rule not in RULES:
        raise UsageError(
            f"{run} was begun by a later version: its logits are cut by rule {rule}, this version knows "
            f"{', '.join(map(str, RULES))}; go on with that version, or pass another --out"
        )
    return rule


def _flat(recipe: dict) -> dict:
    """Return the fields of a recipe by "section.field", without the trackers, which may differ from start to start."""
    flat = {f"{section}.{field}": value for section, fields in recipe.items() for field, value in fields.items()}
    return {name: value for name, value in flat.items() if name != "train.track"}


def write_run(run: Path, record: RunRecord, recipe: str) -> None:
    """Write run.json, then recipe.toml: a folder with a recipe.toml is a run's."""
    facts = record.as_dict() | {"recipe": FileFact.of_bytes(recipe.encode()).as_dict()}
    write_file(run / RUN, record_bytes(facts))
    write_file(run / RECIPE, recipe.encode())


def read_run(run: Path) -> RunRecord:
    """Return the contents of a run's run.json. Raises CacheError when it is damaged."""
    return read_record(run / RUN, RunRecord, PUT_BACK)


def read_recipe(run: Path) -> Recipe:
    """Return a run's recipe. Raises CacheError when recipe.toml differs from what run.json records."""
    path, wanted = run / RECIPE, read_run(run).recipe
    try:
        found = FileFact.of_bytes(read_file(path, MAX_BYTES))
    except (OSError, ValueError) as error:
        raise damage_error(path, error, PUT_BACK) from None
    if wanted not in (None, found):
        raise CacheError(f"{path}: damaged, it is not what {RUN} says; {PUT_BACK}")
    try:
        return load_recipe(path)
    except UsageError as error:
        raise CacheError(f"{error}, and a run's own recipe is as it was written; {PUT_BACK}") from None


def write_result(run: Path, result: Result) -> None:
    """Write done.json, which marks a run as finished. Its last checkpoint must be on disk."""
    state = FileFact.of_file(checkpoint_folder(run, result.steps) / STATE)
    write_file(run / DONE, record_bytes(result.model_copy(update={"state": state}).as_dict()))


def read_result(run: Path) -> Result | None:
    """Return the result of a finished run; None while it is unfinished, or when the result's checkpoint is missing.

    Raises CacheError when the result or the draft in that checkpoint is damaged.
    """
    path = run / DONE
    if not path.exists():
        return None
    result = read_record(path, Result, MAKE_AGAIN)
    folder = checkpoint_folder(run, result.steps)
    if not folder.exists():
        return None
    open_checkpoint(folder, (CONFIG, DRAFT))
    if result.state not in (None, FileFact.of_file(folder / STATE)):
        raise CacheError(f"{path}: the result of another checkpoint than {folder.name}; {MAKE_AGAIN}")
    return result
