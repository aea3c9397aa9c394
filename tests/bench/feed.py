"""How long training waits for 32k-token int8 samples that are in the page cache: `python tests/bench/feed.py`.

The consumer stands for a GPU: it takes each cell from the prefetcher that training uses, as it is read for a GPU (still
encoded), and sleeps as long as a device that trains at so many bytes a second would compute. The bytes are those of the
bfloat16 states [K, T, D] that it trains on; the harder meaning, the encoded bytes that are read, is shown beside. The
wait counts from the start, with the first cell, which nothing can be read ahead of, and is shown without that, too. The
last row, decoded on the host, is for comparison. Medians of several rounds, in which the rows take turns. The folder is
made and removed, about 0.7 GB a sample; nothing else should run meanwhile.

    K layers   T rows of a sample   D width
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from pipeline.cache import HiddenCache
from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.error_certificate import calibrate
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.file_writer import create_identity, rebuild_derived
from pipeline.cache.plan import load_plan
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample
from pipeline.cache.writer import ShardWriter, store_calibration
from pipeline.drafts import draft_config
from pipeline.runs.recipe import TrainSection
from pipeline.runs.training_data import Split
from pipeline.tensors import as_states
from stages.train_draft.batches import Sampler
from stages.train_draft.loader import BatchLoader, Prefetcher

LAYERS = (1, 9, 17, 25, 33)
VOCABULARY = 151_936
POOL = 4096  # rows of states that are encoded once and written again and again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32_768, help="of a sample; a multiple of 4096")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=2.8, help="GB/s that the consumer trains on")
    parser.add_argument("--seconds", type=float, default=40, help="of a row and round, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch, which decodes on the host")
    parser.add_argument("--folder", type=Path, default=None, help="where to work")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    folder = Path(tempfile.mkdtemp(prefix="bench-feed-", dir=asked.folder))
    sync, os.fsync = os.fsync, lambda fd: None  # making the cache is not what is measured
    try:
        make_cache(folder / "cache", asked)
        os.fsync = sync
        report(folder / "cache", asked)
    finally:
        shutil.rmtree(folder)


def make_cache(path: Path, asked: argparse.Namespace) -> None:
    """A cache of samples of equal length, five layers in int8."""
    rng = np.random.default_rng(0)
    columns = [ColumnSpec(f"aux.{layer}", "bfloat16", asked.width, codec="int8") for layer in LAYERS]
    mask = np.arange(asked.tokens) >= asked.tokens // 2
    samples = [
        PlannedSample(rng.integers(0, 150_000, asked.tokens).astype(np.int32), mask) for _ in range(asked.samples)
    ]
    create_identity(path, {"target": {"name": "bench"}})
    write_segment(path, samples, row_bytes=len(LAYERS) * asked.width, sources=[])
    states = (rng.standard_normal((POOL, asked.width), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    calibration = calibrate(states)
    encoded = CODECS["int8"].encode_to_host(as_states(states), calibration)
    for spec in columns:
        store_calibration(Catalog(path), spec.name, calibration, POOL)
    for shard in load_plan(path).shards:
        with ShardWriter(Catalog(path), shard, columns) as writer:
            for spec in columns:
                for _ in range(int(spec.bounds(shard)[-1]) // POOL):
                    writer.write(spec.name, encoded)
            writer.seal()
            writer.commit({})
    rebuild_derived(Catalog(path))


def loader_of(path: Path, asked: argparse.Namespace, keep_encoded: bool) -> BatchLoader:
    """A loader of one whole sample a step, as a draft of a target of width D reads it."""
    cache = HiddenCache.open(path)
    config = draft_config(
        method="dflash",
        hidden_size=asked.width,
        vocab_size=VOCABULARY,
        rope_theta=1e6,
        shift_label=False,
        num_hidden_layers=5,
        num_attention_heads=asked.width // 128,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3 * asked.width,
        block_size=16,
        mask_token_id=VOCABULARY - 1,
        target_layer_ids=LAYERS,
        num_target_layers=36,
        max_position_embeddings=asked.tokens,
    )
    train = TrainSection(batch=1, context=asked.tokens, anchors=512, cell_anchors=512)
    everyone = np.arange(len(cache))
    return BatchLoader(Sampler(cache, Split(everyone, everyone[:0], 0, ""), config, train), keep_encoded)


def report(path: Path, asked: argparse.Namespace) -> None:
    states = len(LAYERS) * asked.tokens * asked.width * 2
    stored = CODECS["int8"].buffer_bytes((len(LAYERS), asked.tokens, asked.width))
    print(
        f"{asked.samples} samples of {asked.tokens} tokens, {len(LAYERS)} layers, width {asked.width}: "
        f"{states / 1e9:.2f} GB of bfloat16 states each, {stored / 1e9:.2f} GB in int8; {os.cpu_count()} cores\n"
    )
    loader = loader_of(path, asked, keep_encoded=True)
    batches = [loader.sampler.batch(step) for step in range(asked.samples)]
    memory_B = torch.zeros(loader.size(batches[0].windows[0]), dtype=torch.uint8)
    for batch in batches:  # all in the page cache
        loader.read(batch, 0, memory_B)
    began, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        loader.read(batch, 0, memory_B)
    took, cpu = (seconds / len(batches) for seconds in (time.perf_counter() - began, time.process_time() - cpu))
    print(f"reading alone: {took:.3f} s a sample, {states / took / 1e9:.2f} GB/s of states, {cpu:.3f} s of CPU\n")
    rows = {
        f"{asked.rate} GB/s of bfloat16 states": (True, states),
        f"{asked.rate} GB/s of encoded bytes": (True, stored),
        f"{asked.rate} GB/s of states, decoded on the host": (False, states),
    }
    found: dict[str, list[tuple]] = {name: [] for name in rows}
    for _ in range(asked.rounds):
        for name, (keep_encoded, size) in rows.items():
            pace = size / (asked.rate * 1e9)
            steps = max(4, round(asked.seconds / pace / (1 if keep_encoded else 4)))
            took, waited, first = consume(loader_of(path, asked, keep_encoded), steps, pace)
            found[name].append((size * steps / took / 1e9, first, waited / took, (waited - first) / (took - first)))
    print(f"{'consumer':46}{'GB/s':>7}{'first cell':>12}{'data wait':>11}{'after that':>12}{'must':>8}")
    for name, figures in found.items():
        speed, first, wait, after = map(median, zip(*figures, strict=True))
        must = "<= 2 %" if name == next(iter(rows)) else ""
        print(f"{name:46}{speed:7.2f}{first:10.2f} s{wait:11.2%}{after:12.2%}{must:>8}")


def consume(loader: BatchLoader, steps: int, pace: float) -> tuple[float, float, float]:
    """Take the cells of so many steps, `pace` seconds each; return the seconds in all, those waited for data, and those
    waited for the first cell."""
    began, first = time.perf_counter(), None
    batches = Prefetcher(loader, 0, steps)
    for _, cells in batches:
        for _ in cells:
            first = batches.waited if first is None else first
            time.sleep(pace)
    batches.close()
    return time.perf_counter() - began, batches.waited, first


if __name__ == "__main__":
    main()
