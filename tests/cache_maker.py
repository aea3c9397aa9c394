"""Makes small caches of random states for the tests of `pipeline.cache`; no target runs."""

import json
from pathlib import Path

import numpy as np

from pipeline.cache.catalog import Catalog, has_target
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.error_certificate import calibrate
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.file_writer import create_identity, new_target, rebuild_derived
from pipeline.cache.plan import load_plan, segment_numbers
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample, ShardPlan
from pipeline.cache.writer import ShardWriter, read_calibration, store_calibration

IDENTITY = {"target": {"name": "tiny", "digest": "00ff"}, "samples": {"max_length": 600}}
COLUMNS = [
    ColumnSpec("aux.1", "bfloat16", 8),
    ColumnSpec("aux.10", "bfloat16", 8),
    ColumnSpec("final", "bfloat16", 8, keeps="needed"),
]

CAPTURE = {"layers": "1,3", "max_length": 256, "max_samples": 8}  # options of the fixture `captured`


def random_samples(count: int, longest: int = 600, seed: int = 0) -> list[PlannedSample]:
    """Samples of 2 to `longest` tokens, a third supervised, in three domains."""
    rng = np.random.default_rng(seed)
    samples = []
    for line in range(count):
        T = int(rng.integers(2, longest + 1))
        mask = rng.random(T) < 0.3
        mask[-1] = True
        ids = rng.integers(0, 1000, T).astype(np.int32)
        split = "heldout" if line % 4 == 0 else "train"
        samples.append(PlannedSample(ids, mask, f"domain {line % 3}", split, "chats.jsonl", line + 1))
    return samples


def states(shard: ShardPlan, spec: ColumnSpec) -> np.ndarray:
    """The values of a column of a shard: random, the same at every call, finite as bfloat16."""
    rng = np.random.default_rng([shard.number, *spec.name.encode()])
    values = rng.standard_normal((int(spec.bounds(shard)[-1]), spec.width)).astype(np.float32)
    return values if spec.dtype == "float32" else (values.view(np.uint32) >> 16).astype(np.uint16)


def capture(
    cache: Path, shard: ShardPlan, columns: list[ColumnSpec], refused: dict[int, str] | None = None, lost=None
) -> dict:
    """Write columns of one shard, as a capture would; returns what `commit` does."""
    with ShardWriter(Catalog(cache), shard, columns) as writer:
        for row, reason in (refused or {}).items():
            writer.refuse(row, reason)
        for spec in columns:
            values = states(shard, spec)
            for first in range(0, len(values), 100):
                writer.write(spec.name, values[first : first + 100])
        writer.seal()
        return writer.commit({spec.name: {"probe": {"error": 0.5 ** (2 + shard.number)}} for spec in columns}, lost)


def calibrate_columns(cache: Path, columns: list[ColumnSpec]) -> None:
    """Calibrate, with all their states, the columns that have to be."""
    for spec in columns:
        if CODECS[spec.codec].lossy and read_calibration(Catalog(cache), spec.name, spec.width) is None:
            every = np.concatenate([states(shard, spec) for shard in load_plan(cache).shards])
            store_calibration(Catalog(cache), spec.name, calibrate(every), len(every))


def make_cache(
    cache: Path,
    samples: list[PlannedSample] | None = None,
    columns: list[ColumnSpec] = COLUMNS,
    refused: dict[int, str] | None = None,
) -> Path:
    """A whole cache; what a killed run left is kept. `refused` maps rows of shard 0 to reasons."""
    create_identity(cache, IDENTITY)
    if not segment_numbers(cache):
        samples = random_samples(24) if samples is None else samples
        write_segment(cache, samples, row_bytes=48, sources=[{"file": "chats.jsonl", "size": 1}])
    if not has_target(Catalog(cache)):
        with new_target(Catalog(cache)) as folder:
            (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "model_type": "qwen3"}))
            (folder / "tokens.json").write_text(json.dumps({"mask": 999, "eos": [1], "length": 1000}))
    calibrate_columns(cache, columns)
    for shard in load_plan(cache).shards:
        capture(cache, shard, columns, refused if shard.number == 0 else None)
    rebuild_derived(Catalog(cache))
    return cache


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of a cache by its relative path, unfinished ones aside."""
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    named = {path.relative_to(cache).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in named.items() if not any(part.startswith("tmp-") for part in name.split("/"))}


def without_record(cache: Path) -> dict[str, bytes]:
    """The content of every file but `capture.log`, which has times and paths."""
    return {name: data for name, data in contents(cache).items() if name != "capture.log"}


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
