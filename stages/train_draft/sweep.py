"""`pipeline sweep`: a grid search over recipe fields on one cache: one run after the other, or one on each device.

A sweep is a recipe with one more table, of fields and the values that each takes:

    [sweep]
    "draft.method" = ["dflash", "domino"]
    "train.seed" = [0, 1, 2]

The last list varies fastest. Every combination is an ordinary run in an ordinary folder, named by a digest of all that
decides its draft, the initial weights included. So a stopped sweep goes on where it was, a longer list adds only the
new runs, and what `train-draft` finished is not trained again.
"""

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline import torchrun
from pipeline.cache import HiddenCache
from pipeline.errors import ProofError, UsageError
from pipeline.evaluation.accept_length import bootstrap
from pipeline.runs.folder import default_folder, read_result
from pipeline.runs.recipe import Recipe, Resolved, make_recipe, read_toml, resolve
from pipeline.runs.training_data import Split, check_complete
from pipeline.tensors import find_device
from pipeline.visible_text import print_visible, visible
from stages.train_draft.run import split_for, train_resolved
from stages.train_draft.shared_read import group_runs, room_for_drafts, sharing_lines, train_together
from stages.train_draft.sweep_processes import Errors, Work, named_devices, train_on_devices

if TYPE_CHECKING:
    from pipeline.published.init_from import InitialDraft, InitialWeights

SEED = "train.seed"
EXAMPLE = '"train.lr" = [1e-3, 3e-3]'

Setting = dict[str, object]  # one combination: "section.field" -> value


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep, fully resolved before the first one starts."""

    setting: Setting
    path: Path
    resolved: Resolved
    split: Split
    start: "InitialWeights | None"


def sweep(
    cache: Path,
    recipe: Path,
    sets: tuple[str, ...] = (),
    out: Path | None = None,
    device: str | None = None,
    init_from: "InitialDraft | None" = None,
    devices: str | None = None,
    jobs: int = 1,
    shared_read: bool = False,
) -> dict:
    """Train every combination that is not finished yet; return all figures, best first, as --json prints them.

    init_from: a checkpoint, run or published draft whose weights are the initial ones of every run. device, devices,
    jobs: see `named_devices`; where they name several, as many processes share the runs. shared_read: read the cache
    once for all runs that learn from the same samples, see shared_read.py.

    A run whose loss is not finite is recorded under `failed` and the others go on. Raises what a run raises, of several
    processes once all other runs are done; and UsageError, before the first run, for an invalid combination.
    """
    if torchrun.several():
        raise UsageError("a sweep gives its runs to the devices itself; start it without torchrun, see --devices")
    planned = Planned(cache, recipe, sets, out, init_from)
    places, runs = named_devices(device, devices, jobs), planned.runs
    todo = [run for run in runs.values() if read_result(run.path) is None]
    print_visible(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before")
    groups = planned.share(todo, places) if shared_read else [[run] for run in todo]
    work = [planned.work([run.path for run in group]) for group in groups]
    if min(len(places), len(work)) > 1:
        prepare = partial(prepare_training, cache, recipe, sets, out, init_from)
        errors = train_on_devices(places, work, prepare)
    else:
        errors = {}
        train = Training(planned, find_device(devices or device))
        for each in work:
            print_visible(f"\n{visible(each.title)}")
            errors |= train(each)
    failed = {path: str(error) for path, error in errors.items() if isinstance(error, ProofError)}
    for path in runs:
        if path in errors and path not in failed:
            raise errors[path]
    facts = [run_facts(run, failed.get(run.path)) for run in runs.values()]
    public = [{key: fact[key] for key in fact if key != "replies"} for fact in rank_by_accept_length(facts)]
    made_of = {"cache": str(cache), "recipe": str(recipe), "init_from": init_from and str(init_from.path)}
    return made_of | {"runs": public, "pooled": rank_by_accept_length(pool_seeds(facts))}


class Planned:
    """A sweep's runs, by their folders, in grid order. The same in every process. Raises UsageError."""

    def __init__(
        self,
        cache: Path,
        recipe: Path,
        sets: tuple[str, ...] = (),
        out: Path | None = None,
        init_from: "InitialDraft | None" = None,
    ):
        self.store = HiddenCache.open(cache)
        runs = plan_runs(self.store, load_sweep(recipe, sets), out, init_from)
        self.runs = {run.path: run for run in runs}
        self.names = {path: f"run {number}" for number, path in enumerate(self.runs, 1)}

    def work(self, paths: Sequence[Path]) -> Work:
        """Return runs that are trained together as a piece of work."""
        names = [self.names[path].removeprefix("run ") for path in paths]
        name = f"{'runs' if len(paths) > 1 else 'run'} {', '.join(names)}"
        settings = "; ".join(setting_text(self.runs[path].setting) for path in paths)
        return Work(f"{name} of {len(self.runs)}: {settings}", name, tuple(paths))

    def share(self, runs: Sequence[PlannedRun], places: Sequence[str]) -> list[list[PlannedRun]]:
        """Return the runs in groups that are trained from one read, and print them. No device is left without work."""
        room = room_for_drafts(torch.device(places[0]))
        groups = group_runs(runs, room, most=-(-len(runs) // len(places)))
        for line in sharing_lines(groups, self.names):
            print_visible(visible(line))
        return groups


class Training:
    """Trains pieces of a sweep's work on one device: called with one, returns what ended its runs early."""

    def __init__(self, planned: Planned, device: torch.device):
        self.planned, self.device = planned, device

    def __call__(self, work: Work) -> Errors:
        store, runs = self.planned.store, [self.planned.runs[path] for path in work.runs]
        if len(runs) > 1:
            return train_together(runs, self.planned.names, store, self.device)
        (run,) = runs
        try:
            train_resolved(run.path, store, run.split, run.resolved, self.device, run.start)
        except ProofError as error:  # a learning rate too high, for example: a result, too
            print_visible(f"failed: {visible(error)}")
            return {run.path: error}
        return {}


def prepare_training(
    cache: Path, recipe: Path, sets: tuple[str, ...], out: Path | None, init_from: "InitialDraft | None", device: str
) -> Training:
    """Plan a sweep in one of the processes that train it."""
    return Training(Planned(cache, recipe, sets, out, init_from), find_device(device))


def load_sweep(path: Path, sets: tuple[str, ...] = ()) -> list[tuple[Setting, Recipe]]:
    """Read a sweep and return its combinations in grid order, each with a valid recipe; `sets` change the base recipe.

    Raises UsageError for a table that is no grid, and for a recipe that `load_recipe` refuses, naming the combination.
    """
    base = read_toml(Path(path))
    lists = _grid(base.pop("sweep", None), path)
    make_recipe(copy.deepcopy(base), sets, str(path))
    for key in lists:
        if any(entry.partition("=")[0].strip() == key for entry in sets):
            raise UsageError(f"{path} sweeps over {key} and --set states it; leave one out")
    combinations = []
    for values in itertools.product(*lists.values()):
        setting = dict(zip(lists, values, strict=True))
        stated = copy.deepcopy(base)
        for key, value in setting.items():
            section, _, field = key.partition(".")
            stated.setdefault(section, {})[field] = value
        combinations.append((setting, make_recipe(stated, sets, f"{path} with {setting_text(setting)}")))
    return combinations


def _grid(table: object, path: Path) -> dict[str, list]:
    """Return the lists of a [sweep] table by "section.field", a key that may be written with or without quotes."""
    lists = {}
    for key, value in table.items() if isinstance(table, dict) else ():
        unquoted = isinstance(value, dict)  # TOML reads train.lr without quotes as a table in a table
        lists |= {f"{key}.{field}": values for field, values in value.items()} if unquoted else {key: value}
    if not lists:
        raise UsageError(f"{path} has no [sweep] table; add one with lists such as {EXAMPLE}, or use `train-draft`")
    for key, values in lists.items():
        if key.count(".") != 1:
            raise UsageError(f"{path}: `{key}` in [sweep] is no field; write section.field, such as {EXAMPLE}")
        if not isinstance(values, list) or not values:
            raise UsageError(f"{path}: `{key}` = {values!r} in [sweep]; wanted a list of values, such as {EXAMPLE}")
        if any(value in values[:at] for at, value in enumerate(values)):
            raise UsageError(f"{path}: `{key}` = {values!r} in [sweep] holds a value twice; leave one out")
    return lists


def plan_runs(
    store: HiddenCache,
    combinations: list[tuple[Setting, Recipe]],
    out: Path | None,
    init_from: "InitialDraft | None" = None,
) -> list[PlannedRun]:
    """Resolve every combination against the cache: recipe, samples, initial weights and folder (in `out`, else `runs`).

    Raises UsageError naming the combination that does not fit the cache, a method or those weights, or two that
    resolve to the same recipe.
    """
    head = None if init_from is None else store.head(dtype=store.dtype)
    weights: dict[str, dict] = {}
    splits: dict[tuple, Split] = {}
    runs: dict[Path, PlannedRun] = {}
    for setting, recipe in combinations:
        try:
            check_complete(store, recipe.draft.layers)
            resolved = resolve(recipe, store)
            draft = resolved.draft
            key = draft.mask_token_id, resolved.recipe.train.heldout, draft.target_layer_ids, draft.needs_final_states
            if key not in splits:
                splits[key] = split_for(resolved, store)
            start = init_from and init_from.weights_for(draft, head)
        except UsageError as error:
            raise UsageError(f"with {setting_text(setting)}: {error}") from None
        resolved = resolved.with_steps(len(splits[key].train))
        if start is not None:  # keep equal weights in memory once, however many runs begin with them
            start = replace(start, tensors=weights.setdefault(start.digest, start.tensors))
            resolved = resolved.with_rope_scaling(start.rope_scaling)
        path = default_folder(resolved, store, splits[key], start)
        path = path if out is None else out / path.name
        if path in runs:
            first, second = setting_text(runs[path].setting), setting_text(setting)
            raise UsageError(f"{first} and {second} are the same recipe in the end; leave one out")
        runs[path] = PlannedRun(setting, path, resolved, splits[key], start)
    return list(runs.values())


def setting_text(setting: Setting) -> str:
    """Return a combination as text: "method = domino, lr = 0.003"."""
    return ", ".join(f"{key.partition('.')[2]} = {value}" for key, value in setting.items())


def run_facts(run: PlannedRun, failed: str | None) -> dict:
    """Return the result of one run; `accept_len` is None where it failed or nothing could be measured."""
    result = read_result(run.path)
    figures = result and result.eval
    measured = bool(figures and figures.calls)
    return {
        "setting": run.setting,
        "run": str(run.path),
        "steps": run.resolved.recipe.train.steps,
        "parameters": result and result.parameters,
        "accept_len": figures.accept_len if measured else None,
        "interval": figures.interval if measured else None,
        "calls": figures.calls if figures else 0,
        "replies": figures.replies if figures else [],
        "failed": failed,
    }


def pool_seeds(facts: list[dict]) -> list[dict]:
    """Return one entry for runs that differ only in their seed: accept length over all seeds, and that of each seed.

    The 95 % interval is a bootstrap over replies. The seeds' decodings of one reply are resampled together, since they
    are not independent: the interval is that of these seeds' mean, and `seeds` shows how far seeds differ.
    """
    groups = defaultdict(list)
    for fact in facts:
        groups[setting_text({key: value for key, value in fact["setting"].items() if key != SEED})].append(fact)
    return [_pool(members) for members in groups.values()]


def _pool(members: list[dict]) -> dict:
    replies = defaultdict(lambda: np.zeros(2))
    for sample, start, tokens, calls in itertools.chain.from_iterable(fact["replies"] for fact in members):
        replies[sample, start] += tokens, calls
    tokens_n, calls_n = np.stack(list(replies.values())).T if replies else np.zeros((2, 0))
    measured = [fact for fact in members if fact["accept_len"] is not None]
    return {
        "setting": {key: value for key, value in members[0]["setting"].items() if key != SEED},
        "accept_len": float(tokens_n.sum() / calls_n.sum()) if measured else None,
        "interval": bootstrap(tokens_n, calls_n, seed=0) if measured else None,
        "runs": len(members),
        "measured": len(measured),
        "seeds": [fact["accept_len"] for fact in measured],
    }


def rank_by_accept_length(facts: list[dict]) -> list[dict]:
    """Return runs by accept length, best first; those without one come last. Ties keep the grid's order."""
    return sorted(facts, key=lambda fact: math.inf if fact["accept_len"] is None else -fact["accept_len"])
