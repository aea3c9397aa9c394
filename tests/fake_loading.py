"""States on their way from a cache to a fake GPU: `python tests/fake_accelerator.py load[:,codec=int8]`.

The cache is a real one, small; the loader's thread reads it into what is taken for pinned memory.
"""

import tempfile
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from cache_maker import COLUMNS, make_cache, random_samples
from fake_device import Meter, events, is_pinned, is_pinned_at, journal
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.cache import HiddenCache
from pipeline.drafts import Cell, draft_config
from pipeline.runs.recipe import TrainSection
from pipeline.runs.training_data import split_samples
from stages.train_draft import loader as loader_module
from stages.train_draft.batches import Sampler
from stages.train_draft.loader import BatchLoader, Prefetcher, StatesInPieces

CELLS_AHEAD = 2  # fewer buffers than cells, so that each is used again


def load(codec: str) -> dict:
    """Move every cell of a few batches to the device as a training does; return what that waits for."""
    settings = dict(method="dflash", objective="kl", hidden_size=8, vocab_size=1100, rope_theta=1e4, head_dim=8)
    settings |= dict(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, intermediate_size=8)
    settings |= dict(block_size=4, mask_token_id=1001, target_layer_ids=(1, 10), num_target_layers=12)
    config = draft_config(**settings, shift_label=False, max_position_embeddings=4096)
    train = TrainSection(batch=3, context=300, anchors=5, cell_anchors=50)
    loader_module.BUFFER_STEP, loader_module.MAX_WAITING = 1024, CELLS_AHEAD
    columns = [replace(spec, codec=codec) for spec in COLUMNS]
    with tempfile.TemporaryDirectory() as folder:
        cache = HiddenCache.open(make_cache(Path(folder) / "cache", random_samples(20), columns))
        sampler = Sampler(cache, split_samples(cache, 1001, 0.05, (1, 10)), config, train)
        loader = BatchLoader(sampler, keep_encoded=True)
        batches = Prefetcher(loader, 0, 6, torch.device("cuda"))
        first = next(iter(batches))  # calibrations are copied to the device once
        with FakeTensorMode(allow_non_fake_inputs=True), Meter("cuda") as meter:
            cells, pinned, places = 0, set(), set()
            for number, (_, of_batch) in enumerate(chain([first], batches)):
                for cell in of_batch:
                    pinned.add(_is_pinned(cell))
                    moved = cell.to(torch.device("cuda"))
                    places |= {value.device.type for value in vars(moved).values() if torch.is_tensor(value)}
                    cells += number > 0
                if number == 0:
                    meter.reset(), events.clear(), journal.clear()
            batches.close()
        recorded = sum(entry == "event after computing" for entry in journal)
        receipt = {"waits": meter.receipt()["waits"], "events": dict(events), "places": sorted(places)}
        return receipt | {"codec": codec, "cells": cells, "recorded": recorded, "pinned": sorted(pinned)}


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
