"""A trained draft wherever it lies: a run, a checkpoint, or a published folder of any form, ours or anyone's."""

from pathlib import Path

import torch

from pipeline.drafts import Draft
from pipeline.errors import UsageError
from pipeline.published import CONFIG, load_draft_folder
from pipeline.runs.checkpoint import DRAFT, find_checkpoint, load_draft
from pipeline.target.head import TargetHead


def is_published(path: Path) -> bool:
    """Return whether `path` holds a published draft: a checkpoint has a config.json, too, and its weights beside it."""
    return (path / CONFIG).is_file() and not (path / DRAFT).is_file()


def run_of(path: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to; a run's own. UsageError where neither is at `path`."""
    return find_checkpoint(path).resolve().parent.parent


def open_draft(path: Path, head: TargetHead, depth: int, device: str | torch.device) -> Draft:
    """Load the draft at `path` onto a device, in float32 and evaluation mode. Of a run, the newest checkpoint.

    head: the target's. depth: its decoder layers. Raises UsageError where no draft is there or it was made for another
    target, CacheError for a damaged checkpoint.
    """
    if is_published(path):  # some forms do not say how deep their target is
        return load_draft_folder(path, head, device, depth)
    draft = load_draft(path, head, device)
    if draft.config.num_target_layers != depth:
        raise UsageError(
            f"{path} is a draft for a target of {draft.config.num_target_layers} layers, this one has {depth}; open it "
            "with its own target (--model)"
        )
    return draft
