"""Checkpoints of a run: complete or not there, checked before use, pruned only after the next one is safe.

    RUN/checkpoints/step-00000500/   after 500 optimiser steps
        draft.safetensors            weights, named as published checkpoints name them
        config.json                  DraftConfig
        optimizer.safetensors        float32 state of the optimiser, absent when none was given
        state.json                   step, what the caller adds, and the size and xxh3-128 of the other files

Only safetensors and JSON; nothing that runs when it is read. A folder appears by rename after every byte is synced,
so a kill at any moment leaves the checkpoint before.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.cache.disk import need_room, room, sync_file, sync_folder, write_file
from pipeline.cache.manifest import FileFact, has_form
from pipeline.drafts import DRAFTS, Draft, DraftConfig
from pipeline.errors import CacheError, UsageError
from pipeline.target_head import TargetHead
from pipeline.tensors import save_tensors

FOLDER, RUN = "checkpoints", "run.json"
DRAFT, CONFIG, OPTIMIZER, STATE = "draft.safetensors", "config.json", "optimizer.safetensors", "state.json"
UNFINISHED = "tmp-"
_NAME = re.compile(r"step-([0-9]{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk. `state` is what state.json says."""

    path: Path
    step: int
    state: dict


def save(run: Path, step: int, draft: Draft, optimizer: dict[str, torch.Tensor], state: dict, keep: int) -> Path:
    """Write the checkpoint of `step`, then remove all but the `keep` newest. Does nothing if it is there already.

    `optimizer` maps names to tensors. Raises RoomError when the disk is full or read-only; the checkpoint before
    stays as it was.
    """
    folder = run / FOLDER
    path = folder / f"step-{step:08d}"
    if path.exists():
        return path
    weights = draft.state_dict()
    need_room(run, "a checkpoint", sum(map(_size, [*weights.values(), *optimizer.values()])))
    unfinished = folder / f"{UNFINISHED}{path.name}"
    with room(folder, "a checkpoint"):
        shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process: the run is locked, so nobody writes here
        unfinished.mkdir(parents=True)
        try:
            _write_files(unfinished, weights, draft.config, optimizer, {**state, "step": step})
            os.rename(unfinished, path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        sync_folder(folder)
        for old in steps(run)[:-keep]:
            shutil.rmtree(folder / f"step-{old:08d}")
    return path


def _write_files(folder: Path, weights: dict, config: DraftConfig, optimizer: dict, state: dict) -> None:
    (folder / CONFIG).write_text(config.model_dump_json(indent=1) + "\n")
    save_tensors(weights, folder / DRAFT)
    if optimizer:
        save_tensors(optimizer, folder / OPTIMIZER)
    files = sorted(folder.iterdir())
    for file in files:
        sync_file(file)
    facts = {file.name: FileFact.of_file(file).as_dict() for file in files}
    write_file(folder / STATE, (json.dumps({**state, "files": facts}, indent=1, sort_keys=True) + "\n").encode())


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def steps(run: Path) -> list[int]:
    """Return the steps that have a checkpoint, ascending."""
    folder = run / FOLDER
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name[1]) for name in names if name)


def latest(run: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a run, every byte checked; None when it has none. CacheError when damaged."""
    held = steps(run)
    return open_checkpoint(run / FOLDER / f"step-{held[-1]:08d}") if held else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Read state.json and check the files it names. Raises CacheError naming the one that is damaged."""
    remedy = f"remove {path} to go on from the checkpoint before"
    try:
        state = json.loads((path / STATE).read_text("utf-8"))
        step, facts = state["step"], state["files"]
        wrong = [name for name, fact in facts.items() if FileFact.of_file(path / name).as_dict() != fact]
        if path.name.startswith("step-") and path.name != f"step-{step:08d}":
            wrong.append(STATE)
    except (OSError, CacheError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = str(error).removesuffix("; run `pipeline verify`")  # which is for caches
        raise CacheError(f"{path}: damaged checkpoint ({said}); {remedy}") from None
    if wrong:
        raise CacheError(f"{path / wrong[0]}: damaged, it is not what {STATE} says; {remedy}")
    return Checkpoint(path, step, state)


def find_checkpoint(place: Path) -> Path:
    """Return the checkpoint's folder that `place` names: itself, or the newest one of a run. UsageError for neither."""
    if (place / DRAFT).is_file() and (place / CONFIG).is_file():
        return place
    held = steps(place)
    if not held:
        raise UsageError(
            f"{place} is no run with a checkpoint and no checkpoint; train one with `pipeline train-draft`"
        )
    return place / FOLDER / f"step-{held[-1]:08d}"


def read_run(run: Path) -> dict:
    """Return what a run's folder says the run is. CacheError when that is damaged."""
    form = {"cache": {"path": str, "digest": str, "rounded": [str]}, "split": {"digest": str}, "target": str}
    form["versions"] = {str: str}
    return read_record(run / RUN, form, "put it back as it was, or train into another --out")


def read_record(path: Path, form: dict, remedy: str) -> dict:
    """Return JSON of this form that a run's folder keeps beside its checkpoints. CacheError when it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: damaged ({error}); {remedy}") from None
    if not has_form(found, form):
        raise CacheError(f"{path}: damaged, or no record of a run; {remedy}")
    return found


def load_config(place: Path) -> DraftConfig:
    """Return the DraftConfig of a run's newest checkpoint, or of the checkpoint `place`."""
    path = find_checkpoint(Path(place)) / CONFIG
    try:
        return DraftConfig(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: damaged ({error}); use another checkpoint") from None


def load_draft(place: Path, head: TargetHead, device: str | torch.device = "cpu") -> Draft:
    """Return the draft of a run's newest checkpoint, or of the checkpoint `place`, in float32 and evaluation mode.

    Every byte is checked. Raises UsageError when there is none, CacheError when it is damaged.
    """
    path = find_checkpoint(Path(place))
    open_checkpoint(path)
    config = load_config(path)
    draft = DRAFTS[config.method](config, head).to(device)
    draft.load_state_dict(load_file(path / DRAFT, device=str(device)))
    return draft.eval()
