"""Copies of a cache that hold other samples or states, as a capture of them would."""

import json
import shutil

import numpy as np
import torch

from pipeline.cache import HiddenCache
from pipeline.cache.catalog import Catalog
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.file_writer import create_identity, new_target
from pipeline.cache.layout import layer_of
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample
from pipeline.cache.writer import ShardWriter
from pipeline.target.layers import final_rows
from pipeline.target.loading import load_target
from pipeline.target.model import lm_logits, run_decoder, tap_layers


def rewrite(cache, out, *, samples=None, states=None, final=True, config=None):
    """Copy a cache with other samples (index, sample) -> sample, or other states (index, sample, column) -> rows.

    config: what is changed in the target's config.json.
    """
    store = HiddenCache.open(cache)
    create_identity(out, store.identity.as_dict())
    with new_target(Catalog(out)) as folder:
        for file in (store.path / "target").iterdir():
            if file.name != "manifest.json":
                shutil.copy(file, folder)
        if config:
            stated = json.loads((folder / "config.json").read_text()) | config
            (folder / "config.json").write_text(json.dumps(stated))
    planned = [
        PlannedSample(*store.tokens_of(i), store.samples.domain[i], store.samples.split[i]) for i in range(len(store))
    ]
    if samples:
        planned = [samples(index, sample) for index, sample in enumerate(planned)]
    read = {i: store.read(i, final=True) for i in range(len(store))}
    by_ids = {planned[i].ids.tobytes() + planned[i].mask.tobytes(): i for i in range(len(store))}
    columns = [ColumnSpec(f"aux.{layer}", "float32", store.hidden_size) for layer in store.layers]
    columns += [ColumnSpec("final", "float32", store.hidden_size, keeps="needed")] * final
    for shard in write_segment(out, planned, row_bytes=4 * store.hidden_size * len(columns), sources=[]).shards:
        with ShardWriter(Catalog(out), shard, columns) as writer:
            for row in range(len(shard)):
                index = by_ids[shard.ids(row).tobytes() + shard.mask(row).tobytes()]
                held = dict(zip(store.layers, read[index].aux, strict=True)) | {None: read[index].final}
                for column in columns:
                    other = states and states(index, planned[index], column.name)
                    rows = held[layer_of(column.name)].numpy() if other is None else other
                    writer.write(column.name, rows)
            writer.seal()
            writer.commit({column.name: {} for column in columns})
    return out


def with_most_held_out(cache, out):
    """Copy a cache with two of three samples held out: 16 of 24, more than an evaluation measures at once."""

    def split(index, sample):
        return PlannedSample(sample.ids, sample.mask, sample.domain, "heldout" if index % 3 else "train")

    return rewrite(cache, out, samples=split)


def with_greedy_replies(cache, target_folder, out):
    """Copy a cache with one greedy reply of 12 tokens a sample, the target's own, and the states that go with it."""
    target = load_target(str(target_folder))

    @torch.no_grad()
    def greedy(index, sample):
        start = int(np.argmax(sample.mask))
        ids = torch.from_numpy(sample.ids[:start].astype(np.int64))
        for _ in range(12):
            last = run_decoder(target, ids[None]).last_hidden_state[0, -1:]
            ids = torch.cat([ids, lm_logits(target, last).argmax(-1)])
        mask = np.arange(len(ids)) >= start
        return PlannedSample(ids.numpy().astype(np.int32), mask, sample.domain, sample.split)

    @torch.no_grad()
    def live(index, sample, column):
        layer = layer_of(column)
        with tap_layers(target, [] if layer is None else [layer]) as taps:
            last = run_decoder(target, torch.from_numpy(sample.ids.astype(np.int64))[None]).last_hidden_state[0]
        return last[final_rows(sample.mask)].numpy() if layer is None else taps[layer][0].numpy()

    return rewrite(cache, out, samples=greedy, states=live)
