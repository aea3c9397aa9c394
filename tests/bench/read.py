"""How fast a raw cache is read, against plain `preadv` of the same bytes in the same run: `python tests/bench/read.py`.

The workload is a target of width 4096: five layers and `final`, bfloat16, lengths log-normal, samples in shuffled order
and whole. What is compared takes turns, several rounds of it, and the medians are shown. CPU seconds count all threads
of the process; a ratio is the CPU time of plain `preadv` over the row's, unless the row says otherwise. The folder is
made and removed; nothing else should run meanwhile.

    K layers   T rows of a sample   D width
"""

import argparse
import gc
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from pipeline.cache import HiddenCache, plan_writer
from pipeline.cache.catalog import Catalog
from pipeline.cache.columns import READ_THREADS, ColumnSpec
from pipeline.cache.file_writer import create_identity, rebuild_derived
from pipeline.cache.plan import load_plan
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample
from pipeline.cache.writer import ShardWriter

WIDTH = 4096
LAYERS = (1, 9, 17, 25, 33)
FEWER = (1, 17, 33)
EPOCHS = 6  # of a run by default
MIB = 1 << 20
SYNC = os.fsync  # the real one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=1.0, help="states to write and read")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=100_000, help="of the cache that is only opened")
    parser.add_argument("--shards", type=int, default=1000, help="of that cache, about")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; on the disk to be measured")
    parser.add_argument("--memory", type=Path, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.memory:
        print(memory_beyond_buffers(asked.memory))
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-read-", dir=asked.folder))
    os.fsync = lambda fd: None  # making the caches is not what is measured
    try:
        plan_writer.MIN_SHARDS = 1  # shards as large as those of a cache that is worth its disk
        states = make_cache(folder / "cache", asked.gib, asked.width)
        size = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
        report(Reading(folder, asked.rounds).rows(), asked)
        print(
            f"\nformat: {size / states - 1:.2%} beyond its {states / 2**30:.2f} GiB of states (must <= 1 %, aim 0.5 %)"
        )
        done = subprocess.run([sys.executable, __file__, "--memory", folder / "cache"], capture_output=True, text=True)
        print(f"memory beyond the buffers: {done.stdout.strip() or done.stderr} MiB (must <= 64, aim 32)")
        opening(folder / "many", asked.samples, asked.shards, asked.rounds)
    finally:
        shutil.rmtree(folder)


# The caches


def accept_lengths_of(tokens: int, rng: np.random.Generator) -> list[int]:
    lengths = []
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(rng.lognormal(np.log(600), 0.8), 32, 8192)))
    return lengths


def write_cache(path: Path, lengths: list[int], columns: list[ColumnSpec], row_bytes: int, seed: int) -> None:
    """A cache of random states, each column a window of the same few random rows."""
    rng = np.random.default_rng(seed)
    samples = []
    for T in lengths:
        mask = np.zeros(T, bool)
        mask[T // 2 :] = True
        samples.append(PlannedSample(rng.integers(0, 150_000, T).astype(np.int32), mask))
    create_identity(path, {"target": {"name": "bench"}})
    write_segment(path, samples, row_bytes=row_bytes, sources=[])
    width = columns[0].width
    pool = (rng.standard_normal((4096, width), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    for shard in load_plan(path).shards:
        with ShardWriter(Catalog(path), shard, columns) as writer:
            for number, spec in enumerate(columns):
                rest = int(spec.bounds(shard)[-1])
                while rest:
                    part = pool[number : number + rest]
                    writer.write(spec.name, part)
                    rest -= len(part)
            writer.seal()
            writer.commit({})
    rebuild_derived(Catalog(path))


def make_cache(path: Path, gib: float, width: int) -> int:
    """The cache that is read; returns the bytes of its states."""
    columns = [ColumnSpec(f"aux.{layer}", "bfloat16", width) for layer in LAYERS]
    columns.append(ColumnSpec("final", "bfloat16", width, keeps="needed"))
    row_bytes = 2 * width * len(columns)
    write_cache(
        path, accept_lengths_of(int(gib * 2**30 / (5.5 * 2 * width)), np.random.default_rng(0)), columns, row_bytes, 1
    )
    return sum(int(spec.bounds(shard)[-1]) * spec.row_bytes for shard in load_plan(path).shards for spec in columns)


# Reading


class Reading:
    """The ways to read all samples, each a function that reads them once."""

    def __init__(self, folder: Path, rounds: int):
        self.path, self.rounds = folder / "cache", rounds
        self.cache = HiddenCache.open(self.path)
        self.order = np.random.default_rng(2).permutation(len(self.cache)).tolist()
        longest, width = int(self.cache.samples.length.max()), self.cache.hidden_size
        self.buffer = torch.zeros(len(LAYERS), longest, width, dtype=torch.bfloat16)  # touched: its pages are there
        self.bytes_KTB = self.buffer.view(torch.uint8).numpy()
        self.bytes = int(self.cache.samples.length.sum()) * width * 2 * len(LAYERS)
        table, plans = self.cache.samples, load_plan(self.path).shards
        self.files = {
            (shard.number, layer): os.open(self.path / f"shards/{shard.number:06d}/aux.{layer}/c/0/0", os.O_RDONLY)
            for shard in plans
            for layer in LAYERS
        }
        row = width * 2
        self.ranges = {
            i: (int(table.shard[i]), int(plans[table.shard[i]].bounds[table.row[i]]) * row, int(table.length[i]) * row)
            for i in self.order
        }
        self.tensors = folder / "tensors"
        self.tensors.mkdir()
        for i in self.order:
            torch.save({"ids": self.cache.read(i).ids, "aux": self.cache.read(i).aux}, self.tensors / f"{i}.pt")

    def raw(self, i: int) -> None:
        shard, start, size = self.ranges[i]
        for k, layer in enumerate(LAYERS):
            out = memoryview(self.bytes_KTB[k]).cast("B")[:size]
            assert os.preadv(self.files[shard, layer], [out], start) == size

    def raw_pass(self) -> None:
        for i in self.order:
            self.raw(i)

    def fill_pass(self, cache: HiddenCache, layers=LAYERS) -> None:
        for i in self.order:
            T = int(cache.samples.length[i])
            cache.fill(self.buffer[: len(layers), :T], [(i, 0, T)], layers)

    def torch_pass(self) -> None:
        for i in self.order:
            torch.load(self.tensors / f"{i}.pt")

    def rows(self) -> list[tuple]:
        """(what, seconds a round, bytes, must, aim) of each way; `raw` first."""
        warm = HiddenCache.open(self.path)
        ways: dict[str, Callable[[], None]] = {
            "plain preadv": self.raw_pass,
            "reader, first pass (every block hashed)": lambda: self.fill_pass(HiddenCache.open(self.path)),
            "reader, later passes": lambda: self.fill_pass(warm),
            "reader, later passes, 3 of 5 layers": lambda: self.fill_pass(warm, FEWER),
            "torch.load, one file a sample": self.torch_pass,
        }
        cold = {
            f"cold, plain preadv, {READ_THREADS} in flight": self.cold_raw,
            "cold, reader, first pass": self.cold_reader,
        }
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in [*ways, *cold]}
        for _ in range(self.rounds):
            for name, way in cold.items():
                self.forget()
                took[name].append(timed(way))
        for way in ways.values():  # all is warm, all is checked once
            way()
        for _ in range(self.rounds):
            for name, way in ways.items():
                took[name].append(timed(way))
        return [(name, self.bytes, times) for name, times in took.items()]

    def forget(self) -> None:
        """Have the kernel drop the files' pages, which it does not as long as they are to be written."""
        gc.collect()
        for fd in self.files.values():
            SYNC(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def cold_raw(self) -> None:
        """As many plain reads in flight as the reader has, each a sample's layer, into memory of the thread's own."""
        longest = int(self.cache.samples.length.max()) * self.cache.hidden_size * 2
        buffers = [memoryview(bytearray(longest)) for _ in range(READ_THREADS)]
        jobs = iter(
            [(self.files[self.ranges[i][0], layer], *self.ranges[i][1:]) for i in self.order for layer in LAYERS]
        )

        def work(buffer: memoryview) -> None:
            for fd, start, size in jobs:
                done = 0
                while done < size:
                    done += os.preadv(fd, [buffer[done:size]], start + done)

        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(work, buffers))

    def cold_reader(self) -> None:
        """Cells of several samples, as training reads them."""
        cache, cell = HiddenCache.open(self.path), []
        room = self.buffer.shape[1]
        for i in self.order:
            T = int(cache.samples.length[i])
            if sum(stop for _, _, stop in cell) + T > room:
                cache.fill(self.buffer[:, : sum(stop for _, _, stop in cell)], cell, LAYERS)
                cell = []
            cell.append((i, 0, T))
        cache.fill(self.buffer[:, : sum(stop for _, _, stop in cell)], cell, LAYERS)


def timed(way: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    way()
    return time.process_time() - cpu, time.perf_counter() - wall


def report(rows: list[tuple], asked: argparse.Namespace) -> None:
    found = {}
    print(f"{asked.gib} GiB, width {asked.width}, {asked.rounds} rounds, medians\n")
    print(f"{'':44}{'CPU s/GB':>9}{'GB/s':>8}{'ratio':>8}")
    for name, size, times in rows:
        size = size * len(FEWER) / len(LAYERS) if "3 of 5" in name else size
        cpu, wall = median(cpu for cpu, _ in times), median(wall for _, wall in times)
        found[name] = cpu, wall
        plain = found["plain preadv"][0]
        ratio = plain / cpu if "3 of 5" not in name and "cold" not in name else None
        print(f"{name:44}{cpu / size * 1e9:9.3f}{size / wall / 1e9:8.2f}" + (f"{ratio:8.2f}" if ratio else ""))
    cpu = {name: figures[0] for name, figures in found.items()}
    plain, first, later = (
        cpu["plain preadv"],
        cpu["reader, first pass (every block hashed)"],
        cpu["reader, later passes"],
    )
    cold_plain, cold = (found[name][1] for name in found if "cold" in name)
    loaded = cpu["torch.load, one file a sample"]
    run = (first + (EPOCHS - 1) * later) / EPOCHS
    judged = [
        ("reader, a run of six epochs, against preadv", plain / run, "0.85", "0.95"),
        ("cold, wall, against preadv", cold_plain / cold, "0.85", "0.95"),
        ("3 of 5 layers, time of 5", cpu["reader, later passes, 3 of 5 layers"] / later, "<= 0.65", "0.60"),
        ("reader, six epochs, against torch.load", loaded / run, "", ""),
        ("plain preadv, against torch.load", loaded / plain, "", ""),
    ]
    print(f"\n{'':44}{'found':>9}{'must':>8}{'aim':>8}")
    for name, value, must, aim in judged:
        print(f"{name:44}{value:9.2f}{must:>8}{aim:>8}")


# Memory and opening


def anonymous() -> float:
    """Memory of the process that is no file's, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_beyond_buffers(path: Path) -> float:
    """MiB that reading every sample, twice, adds to a process that holds torch and one buffer."""
    cache = HiddenCache.open(path)
    width, longest = cache.hidden_size, int(cache.samples.length.max())
    buffer = torch.zeros(len(LAYERS), longest, width, dtype=torch.bfloat16)
    del cache
    before, most = anonymous(), 0.0
    cache = HiddenCache.open(path)
    for i in [*range(len(cache))] * 2:
        T = int(cache.samples.length[i])
        cache.fill(buffer[:, :T], [(i, 0, T)], LAYERS)
        most = max(most, anonymous())
    return round(most - before, 1)


def opening(path: Path, samples: int, shards: int, rounds: int) -> None:
    columns = [ColumnSpec(f"aux.{layer}", "bfloat16", 8) for layer in LAYERS]
    columns.append(ColumnSpec("final", "bfloat16", 8, keeps="needed"))
    lengths = [8] * samples
    write_cache(path, lengths, columns, row_bytes=-(-shards * (4 << 30) // sum(lengths)), seed=3)

    def first_read() -> None:
        cache = HiddenCache.open(path)
        cache.read(len(cache) // 2)

    HiddenCache.open(path)
    opened = median(timed(lambda: HiddenCache.open(path))[1] for _ in range(max(rounds, 5)))
    read = median(timed(first_read)[1] for _ in range(max(rounds, 5)))
    judged = median(timed(lambda: HiddenCache.open(path).samples.usable(LAYERS))[1] for _ in range(3))
    held = HiddenCache.open(path)
    print(
        f"open {len(held):,} samples in {held.shards:,} shards: {opened * 1e3:.1f} ms (must <= 50, aim 10); with the "
        f"first sample read {read * 1e3:.1f} ms; with every manifest of the five layers {judged * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main()
