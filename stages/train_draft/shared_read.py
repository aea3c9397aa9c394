"""Several runs trained in one process from one read of the cache: `pipeline sweep --shared-read`.

Runs share where they learn from the same windows of the same samples in the same order. What else their recipes say may
differ, the layers that they read too: what is read is all that any of them reads. They take each step in turn, each on
its own cells, packed and anchored as it packs them alone, so each ends with the bytes that it has when trained alone
(on a device with memory for all; parts of a step that are smaller for want of it change last digits).

A batch is in memory whole while the runs use it, and the next is read meanwhile. On the device are the weights and
moments of all drafts, the target's head once for each dtype, and the states, gradients and activations of the run whose
turn it is.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import size_text
from pipeline.drafts import DRAFTS, Cell
from pipeline.drafts.fused import use_kernels
from pipeline.errors import DiskError
from pipeline.runs.folder import run_lock
from pipeline.runs.recipe import Resolved
from pipeline.runs.training_data import Split
from pipeline.target.head import TargetHead
from pipeline.tensors import device_bytes
from pipeline.visible_text import print_visible, visible
from stages.train_draft.batches import READING, Batch, Sampler, SampleWindow
from stages.train_draft.loader import BatchLoader, Prefetcher
from stages.train_draft.logs import Display, summary, two_batches_text
from stages.train_draft.ranks import Ranks
from stages.train_draft.run import TrainingRun, load_head, open_run
from stages.train_draft.states import StatesInPieces
from stages.train_draft.stop import GracefulStop
from stages.train_draft.sweep_processes import ends_all, failure

if TYPE_CHECKING:
    from stages.train_draft.sweep_plan import PlannedRun

BYTES_A_PARAMETER = 12  # a float32 weight and two moments: at most what a run has on the device between its turns
SHARE = 0.5  # of the memory, for the weights and moments of all runs that share

States = Tensor | StatesInPieces


def reading_of(resolved: Resolved, split: Split) -> dict[str, object]:
    """Return what has to be the same in runs that share what they read, by its name in messages."""
    train = resolved.recipe.train
    samples = hashlib.blake2b(split.train.tobytes(), digest_size=8).hexdigest()
    return {f"train.{name}": getattr(train, name) for name in READING} | {"training samples": samples}


def resident_bytes(resolved: Resolved) -> int:
    """Return what a run has on the device between its turns, but for the target's head."""
    shapes = DRAFTS[resolved.draft.method].tensors(resolved.draft).values()
    return BYTES_A_PARAMETER * sum(map(math.prod, shapes))


def room_for_drafts(device: torch.device) -> int:
    """Return the bytes that the weights and moments of runs that share may take of a device's memory."""
    whole = device_bytes(device) or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(SHARE * whole)


@dataclass(frozen=True)
class SharedBatch(Batch):
    """A batch as it is read, and as each run lays it out."""

    of_runs: tuple[Batch, ...] = ()


class SharedSampler:
    """Lays out the batches of several runs, which have the same windows. Read is the layout of one whose loss needs all
    that any of them needs."""

    def __init__(self, samplers: Sequence[Sampler]):
        self.samplers = samplers
        self.read = max(samplers, key=lambda sampler: sampler.config.needs_final_states)
        self.cache, self.config, self.train = self.read.cache, self.read.config, self.read.train

    def batch(self, step: int) -> SharedBatch:
        batches = tuple(sampler.batch(step) for sampler in self.samplers)
        read = batches[self.samplers.index(self.read)]
        return SharedBatch(**{field.name: getattr(read, field.name) for field in fields(read)}, of_runs=batches)


class SharedStates:
    """The states of a batch that was read, by their windows. layers: those read. cells: all that were read."""

    def __init__(self, layers: Sequence[int], batch: Batch, cells: Sequence[Cell]):
        self.layers, self.windows, self.cells = list(layers), batch.windows, cells
        self.places: dict[tuple, tuple[int, int, int]] = {}  # of a window: its cell, first row, and first row of final
        for number, windows in enumerate(batch.windows):
            row = final_row = 0
            for window in windows:
                self.places[window.part] = number, row, final_row
                row += len(window.ids)
                final_row += 0 if window.final_rows is None else len(window.final_rows)

    def fill(self, cell: Cell, windows: Sequence[SampleWindow], layers: Sequence[int]) -> Cell:
        """Return a run's cell of these windows with its states: those that were read where they are the same, else put
        together from them."""
        places = [self.places[window.part] for window in windows]
        read = self.cells[number := places[0][0]]
        same = [window.part for window in windows] == [window.part for window in self.windows[number]]
        columns, rows = [self.layers.index(layer) for layer in layers], [len(window.ids) for window in windows]
        if same and columns == list(range(len(self.layers))):
            states = {"aux_KRD": read.aux_KRD}
        else:
            found = [(self.cells[n].aux_KRD, row) for n, row, _ in places]
            states = {"aux_KRD": put_together(found, columns, rows, final=False)}
        if windows[0].final_rows is None:  # the run's loss reads none
            return replace(cell, **states)
        if same:
            return replace(cell, final_FD=read.final_FD, **states)
        found = [(self.cells[n].final_FD, row) for n, _, row in places]
        rows = [len(window.final_rows) for window in windows]
        return replace(cell, final_FD=put_together(found, [0], rows, final=True), **states)


def put_together(
    found: Sequence[tuple[States, int]], columns: Sequence[int], rows: Sequence[int], final: bool
) -> StatesInPieces:
    """Return the states of windows end to end. found: of each window the states that hold it, [K, R, D] or of `final`
    [F, D], and its first row there. columns: which of the K. rows: of each window."""
    pieces, at = [], 0
    for (states, first), count in zip(found, rows, strict=True):
        for k, column in enumerate(columns if count else ()):
            if isinstance(states, StatesInPieces):  # a piece is a window's
                piece = next(piece for index, row, piece in states.pieces if (index, row) == (column, first))
            else:
                piece = (states if final else states[column])[first : first + count]
            pieces.append((k, at, piece))
        at += count
    return StatesInPieces((len(columns), at, found[0][0].shape[-1]), final, pieces)


# Which runs share


def group_runs(runs: Sequence["PlannedRun"], room: int, most: int) -> list[list["PlannedRun"]]:
    """Return the runs in groups that share what they read, in their order. At most `most` are in one, and their weights
    and moments take at most `room` bytes."""
    groups: dict[tuple, list[list[PlannedRun]]] = {}
    for run in runs:
        of_reading = groups.setdefault(tuple(reading_of(run.resolved, run.split).values()), [[]])
        resident = sum(resident_bytes(other.resolved) for other in [*of_reading[-1], run])
        if of_reading[-1] and (len(of_reading[-1]) == most or resident > room):
            of_reading.append([])
        of_reading[-1].append(run)
    return [group for of_reading in groups.values() for group in of_reading]


def sharing_lines(groups: Sequence[Sequence["PlannedRun"]], names: Mapping[Path, str]) -> Iterator[str]:
    """Yield in words which runs share, with what is read and held, and why others do not."""
    for group in groups:
        others = [other for other in groups if other is not group]
        why = _difference(group[0], others[0][0], names) if others else "there is no other run to train"
        if len(group) == 1:
            yield f"{names[group[0].path]} reads alone: {why}"
            continue
        final = ", final states" * any(run.resolved.draft.needs_final_states for run in group)
        held = size_text(sum(resident_bytes(run.resolved) for run in group))
        apart = f"; apart from {names[others[0][0].path]}: {why}" if others else ""
        together = ", ".join(names[run.path] for run in group)
        yield (
            f"{together} share one read of the cache: layers {_layers(group)}{final}; "
            f"their weights and moments take {held}{apart}"
        )


def _difference(run: "PlannedRun", other: "PlannedRun", names: Mapping[Path, str]) -> str:
    mine, others = (reading_of(each.resolved, each.split) for each in (run, other))
    differing = [name for name in mine if mine[name] != others[name]]
    if not differing:
        return "no more fit on the device, or the other devices would have none"
    if differing == ["training samples"]:
        return f"it trains on other samples than {names[other.path]}"
    stated = [name for name in differing if name.startswith("train.")]
    return ", ".join(f"{name} = {mine[name]}, {names[other.path]} has {others[name]}" for name in stated)


def _layers(runs: Sequence["PlannedRun"]) -> list[int]:
    return sorted({layer for run in runs for layer in run.resolved.draft.target_layer_ids})


# Training


@dataclass(eq=False)
class Member:
    """A run in a group, while it trains. display: its own lines."""

    training: TrainingRun
    display: Display

    @property
    def left(self) -> bool:
        return self.training.step < self.training.train.steps


def train_together(
    runs: Sequence["PlannedRun"], names: Mapping[Path, str], store: HiddenCache, device: torch.device
) -> dict[Path, Exception]:
    """Train runs of one group; return what ended some of them early: they leave the group, and the others go on.

    Runs that were stopped at different steps train alone up to the farthest one's, then together. Raises CacheError
    where reading fails, and what a signal raises, after a checkpoint of every run is saved.
    """
    errors: dict[Path, Exception] = {}
    with contextlib.ExitStack() as held:
        trainings = []
        heads: dict[str, TargetHead] = {}
        for run in runs:
            others = sum(resident_bytes(other.resolved) for other in runs if other is not run)
            print_visible(f"\n{visible(names[run.path])}:")
            try:
                held.enter_context(run_lock(run.path))
                dtype = run.resolved.recipe.train.dtype
                if dtype not in heads:
                    heads[dtype] = load_head(run.resolved, store, device)
                opened = open_run(
                    run.path, store, run.split, run.resolved, Ranks(device), run.start, heads[dtype], others
                )
            except Exception as error:
                if ends_all(error):
                    raise
                errors[run.path] = failure(error, run.path)
                continue
            if isinstance(opened, TrainingRun):
                trainings.append(held.enter_context(contextlib.closing(opened)))
            else:
                print_visible(summary(run.path, store, opened))
        if trainings:
            first, final = trainings[0], any(run.resolved.draft.needs_final_states for run in runs)
            print_visible(two_batches_text(first.train, store, runs[0].split, len(_layers(runs)) + final))
            stop = held.enter_context(GracefulStop())
            lines = held.enter_context(Display(first.step, first.train.steps, names[first.path]))
            beside = [Display(each.step, each.train.steps, names[each.path], lines) for each in trainings[1:]]
            members = [Member(*pair) for pair in zip(trainings, [lines, *beside], strict=True)]
            Group(members, store, device, stop, errors).train()
    return errors


class Group:
    """Runs that take their steps in turn. errors: gets what ends one of them early."""

    def __init__(
        self,
        members: list[Member],
        store: HiddenCache,
        device: torch.device,
        stop: GracefulStop,
        errors: dict[Path, Exception],
    ):
        self.members, self.store, self.device, self.stop, self.errors = members, store, device, stop, errors

    def train(self) -> None:
        """Train every member to its last step."""
        try:
            self._train()
        except BaseException:
            if self.stop.received:
                self._save()
            raise

    def _train(self) -> None:
        for member in self.members:
            member.training.ranks.stop = self.stop
            member.display.print_line(member.training.description)
        level = max(member.training.step for member in self.members)
        for member in list(self.members):
            with self._turn_of(member):
                until = min(level, member.training.train.steps)
                if member.training.step < until:
                    member.display.print_line(f"alone up to step {until}, where another run is")
                    member.training.fit(member.display, until)
        for member in list(self.members):
            with self._turn_of(member):
                member.training.begin(member.display)
                member.training.throughput.end_turn()
                self._finish_if_done(member)
        members = [member for member in self.members if member.left]
        if members:
            self._train_shared(members, level)

    def _train_shared(self, members: list[Member], start: int) -> None:
        """Take all further steps. members: all that go on."""
        layers = sorted({layer for each in members for layer in each.training.draft.config.target_layer_ids})
        sampler = SharedSampler([member.training.loader.sampler for member in members])
        loader = BatchLoader(sampler, self.device.type != "cpu", layers=layers)
        last = max(member.training.train.steps for member in members)
        batches = Prefetcher(loader, start, last, self.device, keep=True)
        try:
            for batch, cells in batches:
                states = SharedStates(layers, batch, list(cells))
                for member, own in zip(members, batch.of_runs, strict=True):
                    if member in self.members and member.left:
                        self._advance(member, own, states, batches.waited)
                if not any(member.left for member in self.members):
                    return
        finally:
            batches.close()

    def _advance(self, member: Member, batch: Batch, states: SharedStates, waited: float) -> None:
        """Have one run take the step of `batch`, its own layout of what was read."""
        training, layers = member.training, member.training.draft.config.target_layer_ids
        filled = (states.fill(*of_cell, layers) for of_cell in zip(batch.cells, batch.windows, strict=True))
        with self._turn_of(member):
            training.throughput.begin_turn(waited)
            training.note(batch, training.trainer.step(batch, filled), waited, member.display)
            training.draft.zero_grad()  # the memory is the next run's
            training.throughput.end_turn()
            self._finish_if_done(member)

    @contextlib.contextmanager
    def _turn_of(self, member: Member) -> Iterator[None]:
        """Let a run take its turn, with its own kernels, and leave the group where that fails."""
        use_kernels(member.training.kernels)
        try:
            yield
        except Exception as error:
            path = member.training.path
            self.errors[path] = failure(error, path, member.display.print_line)
            self.members.remove(member)
            if ends_all(error):
                raise

    def _finish_if_done(self, member: Member) -> None:
        if not member.left:
            result = member.training.finish()
            member.display.print_line(summary(member.training.path, self.store, result))

    def _save(self) -> None:
        """Save all runs that go on: only the one whose turn it was has done so. One that fails keeps none from it."""
        for member in list(self.members):
            if member.left:
                with contextlib.suppress(DiskError, OSError), self._turn_of(member):
                    member.training.save()
                    member.display.print_line(f"saved at step {member.training.step}")
