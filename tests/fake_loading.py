"""States on their way from a cache to a fake GPU: `python tests/fake_accelerator.py load[:,codec=int8]`.

The cache is a real one, small; the loader's thread reads it into what is taken for pinned memory. `without=NAME` leaves
a wait out, so that tests see that its lack is found.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from cache_maker import COLUMNS, make_cache, random_samples
from fake_device import Meter, events, is_pinned, is_pinned_at, memory_of
from fake_streams import Event, Stream, journal, order
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.cache import HiddenCache
from pipeline.drafts import Cell, draft_config
from pipeline.runs.recipe import TrainSection
from pipeline.runs.training_data import split_samples
from stages.train_draft import loader as loader_module
from stages.train_draft.batches import Batch, Sampler
from stages.train_draft.copy_stream import CopiedCell
from stages.train_draft.loader import BatchLoader, Prefetcher
from stages.train_draft.states import StatesInPieces

CELLS_AHEAD = 2  # fewer buffers than cells, so that each is used again


WAITS = {  # who waits for what
    "copies-for-compute": (Stream, "wait_stream"),
    "compute-for-copies": (Stream, "wait_event"),
    "thread-for-copies": (Event, "synchronize"),
}


def load(codec: str, without: str | None = None) -> dict:
    """Move every cell of a few batches to the device as a training does; return what that waits for, and whether
    anything is read or written too early. without: a key of WAITS, which is left out."""
    settings = dict(method="dflash", objective="kl", hidden_size=8, vocab_size=1100, rope_theta=1e4, head_dim=8)
    settings |= dict(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, intermediate_size=8)
    settings |= dict(block_size=4, mask_token_id=1001, target_layer_ids=(1, 10), num_target_layers=12)
    config = draft_config(**settings, shift_label=False, max_position_embeddings=4096)
    train = TrainSection(batch=3, context=300, anchors=5, cell_anchors=50)
    order.reset()
    loader_module.BUFFER_STEP, loader_module.MAX_WAITING = 1024, CELLS_AHEAD
    columns = [replace(spec, codec=codec) for spec in COLUMNS]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as changed:
        if without is not None:
            owner, name = WAITS[without]
            changed.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, lambda *_: None)
        cache = HiddenCache.open(make_cache(Path(folder) / "cache", random_samples(20), columns))
        sampler = Sampler(cache, split_samples(cache, 1001, 0.05, (1, 10)), config, train)
        batches = Prefetcher(WatchedLoader(sampler, keep_encoded=True), 0, 6, torch.device("cuda"))
        with FakeTensorMode(allow_non_fake_inputs=True), Meter("cuda") as meter:
            cells, ahead, pinned, places = 0, 0, set(), set()
            for number, (_, of_batch) in enumerate(batches):
                for cell in each_once_the_next_is_read(of_batch, batches):
                    copied = isinstance(cell, CopiedCell)
                    pinned |= set() if copied else {_is_pinned(cell)}
                    moved = cell.to(torch.device("cuda"))
                    states = [moved.aux_KRD * 2, moved.final_FD * 2, moved.ids_R * 2]
                    places |= {value.device.type for value in states}
                    cells, ahead = cells + (number > 0), ahead + (copied and number > 0)
                if number == 0:  # it has copied calibrations to the device
                    meter.reset(), events.clear(), journal.clear()
            waited, asked = (
                dict(events),
                [entry for number, entry in enumerate(journal) if entry not in journal[:number]],
            )
            batches.close()
        receipt = {"waits": meter.receipt()["waits"], "events": waited, "places": sorted(places)}
        receipt |= {"codec": codec, "cells": cells, "ahead": ahead, "pinned": sorted(pinned)}
        return receipt | {"races": dict(+order.races), "order": asked}


class WatchedLoader(BatchLoader):
    """A loader that notes when it writes to a buffer."""

    def read(self, batch: Batch, number: int, memory_B: torch.Tensor | None = None) -> Cell:
        order.host_wrote(memory_of(memory_B))
        return super().read(batch, number, memory_B)


def each_once_the_next_is_read(cells: Iterator[Cell], batches: Prefetcher) -> Iterator[Cell]:
    """Yield cells, as a training gets them from a disk that is fast enough."""

    def next_is_read() -> bool:
        there = [*batches._ahead, *batches._ready]
        return sum(isinstance(found, tuple) for found in there) > 1 or None in there

    while True:
        with batches._changed:
            assert batches._changed.wait_for(next_is_read, timeout=60)
        try:
            yield next(cells)
        except StopIteration:
            return


def _is_pinned(cell: Cell) -> bool:
    """Whether all states of a cell, encoded or not, lie in pinned memory."""
    for states in (cell.aux_KRD, cell.final_FD):
        if isinstance(states, StatesInPieces):
            arrays = [array for *_, encoded in states.pieces for array in encoded.arrays if array.nbytes]
            if not all(is_pinned_at(array.ctypes.data) for array in arrays):
                return False
        elif not is_pinned(states):
            return False
    return True
