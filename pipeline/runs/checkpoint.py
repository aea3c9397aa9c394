"""Checkpoints of a run: written atomically, verified before use, pruned only after the next one is on disk.

    RUN/checkpoints/step-00000500/   after 500 optimiser steps
        draft.safetensors            weights, named as published checkpoints name them
        config.json                  DraftConfig
        optimizer.safetensors        float32 state of the optimiser, absent when none was given
        state.json                   step, what the caller adds, and the size and xxh3-128 of the other files; it
                                     ends with a checksum of itself

Only safetensors and JSON: loading one runs no code. A folder appears by rename after every byte is synced, so a kill at
any moment leaves the previous checkpoint. A checkpoint has these files and no others; other paths in state.json, and
symbolic links, are refused.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from pipeline.cache.atomic import check_free_space, sync_file, sync_folder, write_errors, write_file
from pipeline.cache.manifest import FileFact
from pipeline.drafts import DRAFTS, Draft, DraftConfig, draft_config
from pipeline.errors import CacheError, UsageError, is_present
from pipeline.json_files import (
    Count,
    Record,
    damage_error,
    parse_json,
    read_file,
    read_record,
    record_bytes,
)
from pipeline.target.head import TargetHead
from pipeline.tensors import save_tensors

FOLDER = "checkpoints"
DRAFT, CONFIG, OPTIMIZER, STATE = "draft.safetensors", "config.json", "optimizer.safetensors", "state.json"
REQUIRED = {CONFIG, DRAFT}
MAX_LAYERS = 1024
MAX_JSON = 4 << 20  # bytes of config.json and of state.json, which have 1 KiB
UNFINISHED = "tmp-"
_NAME = re.compile(r"step-([0-9]{8,})")


class CheckpointState(Record):
    """state.json: the step, the other files, and the digests of what the run must be to go on from here."""

    step: Count
    files: dict[str, FileFact]
    recipe: str | None = None
    cache: str | None = None
    split: str | None = None
    blocks_per_pass: int | None = None  # blocks of a cell computed together, after the device had no memory for all
    moments_on_host: bool = False  # and what else was done for want of memory: see `train_draft/memory.py`
    recomputes_layers: bool = False
    embedding_on_host: bool = False
    metrics: str = ""  # the checksum of the last line of metrics.jsonl


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk. `state` is what state.json says."""

    path: Path
    state: CheckpointState

    @property
    def step(self) -> int:
        return self.state.step


def save(
    run: Path,
    step: int,
    draft: Draft,
    optimizer: Mapping[str, torch.Tensor],
    digests: dict[str, str],
    keep: int,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write the checkpoint of `step`, then remove all but the `keep` newest. Does nothing if it is there already.

    optimizer: tensors by name. digests: those of `CheckpointState`. weights: the draft's, where it is sharded over
    several processes and these were gathered. Raises RoomError when the disk is full or read-only; the checkpoint
    before stays as it was.
    """
    folder, path = run / FOLDER, checkpoint_folder(run, step)
    if path.exists():
        return path
    weights = draft.state_dict() if weights is None else weights
    check_free_space(run, "a checkpoint", sum(tensor.nbytes for tensor in [*weights.values(), *optimizer.values()]))
    unfinished = folder / f"{UNFINISHED}{path.name}"
    with write_errors(folder, "a checkpoint"):
        shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process: the run is locked, nobody writes here
        unfinished.mkdir(parents=True)
        try:
            (unfinished / CONFIG).write_text(draft.config.model_dump_json(indent=1) + "\n")
            save_tensors(weights, unfinished / DRAFT)
            if optimizer:
                save_tensors(optimizer, unfinished / OPTIMIZER)
            files = {file.name: FileFact.of_file(file) for file in sorted(unfinished.iterdir())}
            for name in files:
                sync_file(unfinished / name)
            facts = CheckpointState(step=step, files=files, **digests).as_dict()
            write_file(unfinished / STATE, record_bytes(dict(sorted(facts.items()))))
            os.rename(unfinished, path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        sync_folder(folder)
        for old in steps(run)[:-keep]:
            shutil.rmtree(folder / f"step-{old:08d}")
    return path


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """Return the steps that have a checkpoint, ascending."""
    folder = run / FOLDER
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name[1]) for name in names if name)


def latest(run: Path, saved: list[int] | None = None) -> Checkpoint | None:
    """Return the newest checkpoint of a run, every byte checked; None when it has none. CacheError when damaged.

    saved: the steps that have one, where another process has listed them for all.
    """
    saved = steps(run) if saved is None else saved
    return open_checkpoint(checkpoint_folder(run, saved[-1])) if saved else None


def open_checkpoint(path: Path, checked: Iterable[str] = (CONFIG, DRAFT, OPTIMIZER)) -> Checkpoint:
    """Read state.json and check the files it names: all by size, those in `checked` by checksum.

    Raises CacheError naming the file that is damaged, missing or no regular file.
    """
    remedy = f"remove {path} to go on from the checkpoint before"
    state = read_record(path / STATE, CheckpointState, remedy, MAX_JSON)
    if not REQUIRED <= state.files.keys() <= {*REQUIRED, OPTIMIZER}:
        named = ", ".join(sorted(state.files)) or "no files"
        raise CacheError(f"{path / STATE}: it names {named} and a checkpoint has {CONFIG} and {DRAFT}; {remedy}")
    if path.name.startswith("step-") and path.name != f"step-{state.step:08d}":
        raise CacheError(f"{path / STATE}: damaged, it is of step {state.step}; {remedy}")
    for name, record in state.files.items():
        _check_file(path / name, record, name in checked, remedy)
    return Checkpoint(path, state)


def _check_file(path: Path, record: FileFact, every_byte: bool, remedy: str) -> None:
    """Raise CacheError for a file that differs from what state.json records; its size is checked before opening it."""
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            raise CacheError(f"{path}: a link or no file, and a checkpoint holds its own files; {remedy}")
        same = found.st_size == record.size and (not every_byte or FileFact.of_file(path) == record)
    except OSError as error:
        raise damage_error(path, error, remedy) from None
    if not same:
        raise CacheError(f"{path}: damaged, it is not what {STATE} says; {remedy}")


def load_tensors(path: Path, into: Mapping[str, torch.Tensor]) -> None:
    """Copy a safetensors file's tensors into those of the same names, one after the other; into one that is sharded
    over several processes, this one's part.

    Raises KeyError for other names, RuntimeError for another shape.
    """
    with safe_open(path, framework="pt") as file, torch.no_grad():
        if into.keys() != set(file.keys()):
            raise KeyError(f"names that only one of both has: {sorted(into.keys() ^ set(file.keys()))}")
        for name, tensor in into.items():
            found = file.get_tensor(name)
            if found.shape != tensor.shape:
                raise RuntimeError(f"{name} has shape {tuple(found.shape)}, wanted {tuple(tensor.shape)}")
            if hasattr(tensor, "placements"):
                from torch.distributed.tensor import distribute_tensor  # half a second, which other runs need not wait

                found = distribute_tensor(found, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(found)


def find_checkpoint(place: Path) -> Path:
    """Return a checkpoint's folder: `place` itself, or the newest one of the run in `place`. UsageError for neither."""
    if is_present(place / DRAFT) and is_present(place / CONFIG):
        return place
    saved = steps(place)
    if not saved:
        raise UsageError(
            f"{place} is no run with a checkpoint and no checkpoint; train one with `pipeline train-draft`"
        )
    return checkpoint_folder(place, saved[-1])


def load_config(place: Path) -> DraftConfig:
    """Return the DraftConfig of a run's newest checkpoint, or of the checkpoint `place`. CacheError for damage."""
    path = find_checkpoint(Path(place))
    open_checkpoint(path, (CONFIG,))
    return _config(path)


def _config(path: Path) -> DraftConfig:
    file, remedy = path / CONFIG, "use another checkpoint"
    try:
        fields = parse_json(read_file(file, MAX_JSON))
        if fields["num_hidden_layers"] > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers is {fields['num_hidden_layers']}")
        return draft_config(**fields)
    except (OSError, ValueError, TypeError, KeyError, UsageError) as error:
        raise damage_error(file, error, remedy) from None


def load_draft(place: Path, head: TargetHead, device: str | torch.device = "cpu") -> Draft:
    """Return the draft of a run's newest checkpoint, or of the checkpoint `place`, in float32 and evaluation mode.

    Every byte of it is checked. Raises UsageError when there is none, CacheError when it is damaged.
    """
    path = find_checkpoint(Path(place))
    open_checkpoint(path, (CONFIG, DRAFT))
    config = _config(path)
    if _shapes(path / DRAFT) != DRAFTS[config.method].tensors(config):  # before anything of that size is made
        raise CacheError(f"{path / DRAFT}: not the weights of the draft in its {CONFIG}; use another checkpoint")
    draft = DRAFTS[config.method](config, head).to(device)
    draft.load_state_dict(load_file(path / DRAFT, device=str(device)))
    return draft.eval()


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a safetensors file, reading its header only. CacheError for damage."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise damage_error(path, error, "use another checkpoint") from None
