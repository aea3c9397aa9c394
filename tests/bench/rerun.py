"""The CPU time of a `pipeline cache-hidden` with nothing to do, of many shards: `python tests/bench/rerun.py`.

One shard is written; all others are hard links to its columns, with samples and manifests of their own, so that a cache
of ten thousand shards takes a minute and no states. Imports are not counted. The folder is made and removed.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from pipeline.cache import plan_writer
from pipeline.cache.catalog import Catalog
from pipeline.cache.file_writer import create_identity, new_target, rebuild_derived
from pipeline.cache.layout import SAMPLES, numbered, shard_folder
from pipeline.cache.manifest import FileFact, canonical, read_canonical
from pipeline.cache.plan import load_plan
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample, batch_bytes
from pipeline.cache.writer import ShardWriter
from stages.cache_hidden.capture_log import request_of, write_record
from stages.cache_hidden.run import run
from stages.cache_hidden.settings import CaptureOptions, resolve_settings

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "data" / "tiny-qwen3"
LAYERS = "0,1,2,3,4"  # and `final`: six columns
ROWS = 4  # of the one sample of a shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work")
    parser.add_argument("--rerun", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="show what the rerun calls")
    asked = parser.parse_args()
    if asked.rerun:
        rerun(asked.rerun, asked.profile)
        return
    os.fsync = lambda fd: None
    folder = Path(tempfile.mkdtemp(prefix="bench-rerun-", dir=asked.folder))
    try:
        for shards in asked.shards:
            cache = make_cache(folder / str(shards), shards)
            command = [sys.executable, __file__, "--rerun", str(cache), *["--profile"] * asked.profile]
            shown = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(asked.rounds)]
            print("".join(shown[0].stdout.splitlines(keepends=True)[:-1]), end="")
            seconds = sorted(float(done.stdout.split()[-1]) for done in shown)
            print(f"{shards:,} shards x 6 columns: {' '.join(f'{each:.2f}' for each in seconds)} s of CPU", flush=True)
    finally:
        shutil.rmtree(folder)


def options() -> CaptureOptions:
    return CaptureOptions(layers=LAYERS, max_length=256, dtype="bfloat16")


def rerun(cache: Path, profile: bool) -> None:
    """Run the command once, after its imports, and print its CPU seconds last."""
    arguments = str(TARGET), str(cache.parent / "chats.jsonl"), cache
    if profile:
        import cProfile

        cProfile.runctx("run(*arguments, options=options())", globals(), locals(), sort="tottime")
    before = resource.getrusage(resource.RUSAGE_SELF)
    done = run(*arguments, options=options())
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert done.new_shards == done.left == 0
    print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def make_cache(folder: Path, shards: int) -> Path:
    """A finished cache of so many shards, each of one sample, as a capture of `chats.jsonl` would have left it."""
    since = time.monotonic()
    cache, corpus = folder / "cache", folder / "chats.jsonl"
    folder.mkdir()
    corpus.write_text("{}\n")
    settings = resolve_settings(str(TARGET), Catalog(cache), options())
    create_identity(cache, settings.identity.as_dict())
    plan_writer.MIN_SHARDS = shards
    write_segment(cache, samples(shards), row_bytes=settings.row_bytes, sources=[])
    with new_target(Catalog(cache)) as target:
        (target / "config.json").write_bytes((TARGET / "config.json").read_bytes())
    write_record(cache, request_of(str(TARGET), str(corpus), options()), settings, str(corpus))
    first, *others = load_plan(cache).shards
    assert len(others) == shards - 1
    with ShardWriter(Catalog(cache), first, list(settings.columns)) as writer:
        for spec in settings.columns:
            writer.write(spec.name, np.ones((int(spec.bounds(first)[-1]), spec.width), np.uint16))
        writer.seal()
        writer.commit({spec.name: facts() for spec in settings.columns})
    manifests = {spec.name: read_canonical(shard_folder(cache, 0) / f"{spec.name}.json") for spec in settings.columns}
    for shard in others:
        link_shard(cache, shard, manifests)
    rebuild_derived(Catalog(cache))
    print(f"made {cache} in {time.monotonic() - since:.0f} s", file=sys.stderr)
    return cache


def samples(count: int):
    mask = np.array([False, False, True, True])
    for line in range(count):
        yield PlannedSample(np.arange(4, dtype=np.int32) + line, mask, "chat", "train", "chats.jsonl", line)


def facts() -> dict:
    """Facts as a capture states them."""
    gauge = {"rows": 2, "agree": 1, "logprob": -1.5}
    made_by = {
        "engine": "transformers",
        "attention": "sdpa",
        "device": "cpu",
        "torch": "2.9.1",
        "transformers": "5.0.0",
    }
    return {**made_by, "split": False, "probe": {"error": 1e-6, "samples": [0]}, "gauge": gauge}


def link_shard(cache: Path, shard, manifests: dict[str, dict]) -> None:
    """Make a shard whose columns are the files of shard 0, with its own samples and manifests."""
    first, folder = shard_folder(cache, 0), cache / "shards" / numbered(shard.number)
    data = batch_bytes(shard.batch)
    folder.mkdir()
    (folder / SAMPLES).write_bytes(data)
    for name, manifest in manifests.items():
        files = {**manifest["files"], SAMPLES: FileFact.of_bytes(data).as_dict()}
        for file in files:
            if file != SAMPLES:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.link(first / file, folder / file)
        facts = {key: value for key, value in manifest.items() if key not in ("format", "hash")}
        (folder / f"{name}.json").write_bytes(canonical({**facts, "shard": shard.number, "files": files}))


if __name__ == "__main__":
    main()
