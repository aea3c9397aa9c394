"""Makes the small caches of the present format, one for each codec, that every later version must still read.

    python tests/golden/make_caches.py

Makes what is missing: of a codec that is new, or of a new version of the format. A cache that is there stays for good.
Today's writer still writes its bytes, given its values and calibrations: `cache/test_formats.py`.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

# ruff: noqa: E402  the path first
from cache_maker import IDENTITY

from pipeline.cache import HiddenCache
from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.codecs.error_certificate import calibrate
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.file_writer import create_identity, new_target, rebuild_derived
from pipeline.cache.layout import FORMAT
from pipeline.cache.plan import load_plan
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample, ShardPlan
from pipeline.cache.writer import ShardWriter, store_calibration
from pipeline.tensors import as_stored

COLUMNS = [ColumnSpec("aux.1", "bfloat16", 130), ColumnSpec("final", "bfloat16", 130, keeps="needed")]
SEGMENTS = [[260, 6, 5, 4], [9]]  # tokens of the samples: two blocks; three samples in a shard; an appended corpus
REFUSED = {1: {1: "aux.1 is not finite"}}  # shard -> row -> why
FACTS = {"engine": "none", "probe": {"error": 0.5}}
WRITERS = ("pyarrow", "zstandard")  # another version of these may write other bytes

States = Callable[[ShardPlan, ColumnSpec], np.ndarray]  # uint16 [R, D], the bits of a shard's column


def corpora() -> list[list[PlannedSample]]:
    """The samples of each segment: a third supervised, in two domains."""
    rng, made = np.random.default_rng(5), []
    for segment, lengths in enumerate(SEGMENTS):
        samples = []
        for line, T in enumerate(lengths, 1):
            ids, mask = rng.integers(0, 1000, T).astype(np.int32), rng.random(T) < 0.3
            mask[-1] = True
            split = "heldout" if line == 3 else "train"
            samples.append(PlannedSample(ids, mask, f"domain {line % 2}", split, f"chats{segment}.jsonl", line))
        made.append(samples)
    return made


def random_states(shard: ShardPlan, spec: ColumnSpec) -> np.ndarray:
    """Random states, two in every thousand so large that int8 keeps them apart."""
    rng = np.random.default_rng([shard.number, *spec.name.encode()])
    values = rng.standard_normal((int(spec.bounds(shard)[-1]), spec.width)).astype(np.float32)
    values[rng.random(values.shape) < 0.002] *= 100
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_cache(
    cache: Path,
    codec: str,
    corpora: list[list[PlannedSample]],
    states: States,
    calibrations: dict[str, tuple[Calibration, int]] | None = None,
) -> Path:
    """Write a cache of these samples and states, captured after each corpus; calibrations are made unless given."""
    columns = [replace(spec, codec=codec) for spec in COLUMNS]
    create_identity(cache, IDENTITY)
    for segment, samples in enumerate(corpora):
        sources = [{"file": f"chats{segment}.jsonl", "size": 1}]
        plan = write_segment(cache, samples, row_bytes=520, sources=sources)
        if segment == 0:
            with new_target(Catalog(cache)) as folder:
                (folder / "config.json").write_text(json.dumps({"hidden_size": 130, "model_type": "qwen3"}))
                (folder / "tokens.json").write_text(json.dumps({"mask": 999, "eos": [1], "length": 1000}))
            for spec in columns if CODECS[codec].lossy else []:
                every = np.concatenate([states(shard, spec) for shard in plan.shards])
                made = (calibrations or {}).get(spec.name) or (calibrate(every), len(every))
                store_calibration(Catalog(cache), spec.name, *made)
        capture_missing(cache, columns, states)
    return cache


def capture_missing(cache: Path, columns: list[ColumnSpec], states: States, like: Catalog | None = None) -> int:
    """Write what a cache lacks of these columns, as a capture would. Returns how many shards lacked some.

    like: a cache from which the refused samples and the facts are taken
    """
    work = Catalog(cache).missing(columns)
    for shard, wanted in work:
        refused, facts = REFUSED.get(shard.number, {}), dict.fromkeys((spec.name for spec in wanted), FACTS)
        if like:
            former = {spec.name: like.manifest(shard.number, spec.name) for spec in wanted}
            refused = {int(row): reason for manifest in former.values() for row, reason in manifest.refused.items()}
            facts = {name: manifest.facts.as_dict() for name, manifest in former.items()}
        with ShardWriter(Catalog(cache), shard, wanted) as writer:
            for row, reason in refused.items():
                writer.refuse(row, reason)
            for spec in wanted:
                writer.write(spec.name, states(shard, spec))
            writer.seal()
            writer.commit(facts)
    rebuild_derived(Catalog(cache))
    return len(work)


def digest(states) -> str:
    """The digest of the bits of states."""
    return hashlib.blake2b(as_stored(states).tobytes(), digest_size=16).hexdigest()


def main() -> None:
    for codec in CODECS:
        folder = HERE / FORMAT / codec
        if folder.exists():
            continue
        cache = HiddenCache.open(write_cache(folder / "cache", codec, corpora(), random_states))
        expected = []
        for i in np.flatnonzero(cache.samples.ok).tolist():
            sample = cache.read(i, final=True)
            rows = {"ids": sample.ids.tolist(), "final_rows": sample.final_rows.tolist()}
            expected.append({"sample": i, **rows, "aux": digest(sample.aux), "final": digest(sample.final)})
        facts = {"versions": {name: version(name) for name in WRITERS}, "samples": expected}
        (folder / "expected.json").write_text(json.dumps(facts) + "\n")
        print(folder, len(load_plan(folder / "cache").shards), "shards")


if __name__ == "__main__":
    main()
