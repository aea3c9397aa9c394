"""A sweep's runs before they are trained: each setting resolved against the cache, with its samples and its folder."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cache import HiddenCache
from pipeline.errors import UsageError
from pipeline.runs.folder import default_folder
from pipeline.runs.recipe import Resolved, resolve
from pipeline.runs.sweep_record import setting_text
from pipeline.runs.training_data import Split, check_complete, stratified_subset
from stages.train_draft.batches import READING, epoch_keys, epoch_order
from stages.train_draft.run import split_for
from stages.train_draft.sweep_settings import Setting, SweepFile

if TYPE_CHECKING:
    from pipeline.published.init_from import InitialDraft, InitialWeights


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep, fully resolved before it starts. data, heldout: see `data_digest` and `heldout_digest`."""

    setting: Setting
    path: Path
    resolved: Resolved
    split: Split
    start: "InitialWeights | None"
    data: str
    heldout: str

    @property
    def steps(self) -> int:
        return self.resolved.recipe.train.steps


class Planner:
    """Plans the runs of one sweep: called with a setting, returns its run, in the folder `out`, else in `runs`."""

    def __init__(self, store: HiddenCache, file: SweepFile, out: Path | None, init_from: "InitialDraft | None" = None):
        self.store, self.file, self.out, self.init_from = store, file, out, init_from
        self.head = None if init_from is None else store.head(dtype=store.dtype)
        self.weights: dict[str, dict] = {}
        self.splits: dict[tuple, Split] = {}

    def __call__(self, setting: Setting) -> PlannedRun:
        """Raises UsageError naming the setting that does not fit the cache, a method or the initial weights."""
        store, recipe = self.store, self.file.recipe(setting)
        try:
            check_complete(store, recipe.draft.layers)
            resolved = resolve(recipe, store)
            draft = resolved.draft
            key = draft.mask_token_id, resolved.recipe.train.heldout, draft.target_layer_ids, draft.needs_final_states
            if key not in self.splits:
                self.splits[key] = split_for(resolved, store)
            start = self.init_from and self.init_from.weights_for(draft, self.head)
        except UsageError as error:
            raise UsageError(f"with {setting_text(setting)}: {error}") from None
        split = self.splits[key]
        resolved = resolved.with_steps(len(split.train))
        if start is not None:  # keep equal weights in memory once, however many runs begin with them
            start = replace(start, tensors=self.weights.setdefault(start.digest, start.tensors))
            resolved = resolved.with_rope_scaling(start.rope_scaling)
        path = default_folder(resolved, store, split, start)
        path = path if self.out is None else self.out / path.name
        data, heldout = data_digest(store, split, resolved), heldout_digest(store, split, resolved)
        return PlannedRun(setting, path, resolved, split, start, data, heldout)


def plan_grid(planner: Planner, settings: Sequence[Setting]) -> list[PlannedRun]:
    """Return the runs of all settings. Raises UsageError as `Planner` does, and for two that are the same recipe."""
    runs: dict[Path, PlannedRun] = {}
    for run in map(planner, settings):
        if run.path in runs:
            first, second = setting_text(runs[run.path].setting), setting_text(run.setting)
            raise UsageError(f"{first} and {second} are the same recipe in the end; leave one out")
        runs[run.path] = run
    return list(runs.values())


def data_digest(store: HiddenCache, split: Split, resolved: Resolved) -> str:
    """Return a hash of what a run learns from: its cache, the training samples in the order of their first epoch, and
    the fields of [train] that decide all further ones, windows and batches.

    Runs with equal digests see the same samples in the same order, as far as each one's steps go. Two of one recipe
    but for method or layers may differ: a sample is left out where a column that is read was refused.
    """
    samples, train = store.samples, resolved.recipe.train
    keys_n = epoch_keys(samples.low64[split.train], train.seed, 0)
    order_n = split.train[epoch_order(keys_n, samples.sample_id[split.train])]
    settings = {name: getattr(train, name) for name in READING}
    digest = hashlib.blake2b(f"{store.digest} {settings}".encode(), digest_size=8)
    digest.update(samples.sample_id[order_n].astype(">u8").tobytes())
    return digest.hexdigest()


def heldout_digest(store: HiddenCache, split: Split, resolved: Resolved) -> str:
    """Return a hash of the samples that a run's accept length is measured on."""
    measured = stratified_subset(store, split.heldout, resolved.recipe.train.eval_samples)
    digest = hashlib.blake2b(store.digest.encode(), digest_size=8)
    digest.update(store.samples.sample_id[measured].astype(">u8").tobytes())
    return digest.hexdigest()
