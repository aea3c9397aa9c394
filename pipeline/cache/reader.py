"""HiddenCache: open a cache and read samples, every block of 256 rows checked before it is returned.

K layers   T rows of a sample   R rows that keep `final`   D hidden size   n samples of the cache
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.cache.codecs import DTYPES
from pipeline.cache.columns import Column, column_manifest, open_column
from pipeline.cache.index import build_index, read_index
from pipeline.cache.layout import COLUMN, IDENTITY, SAMPLES, aux_column, inside, layer_of, numbered, shard_folder
from pipeline.cache.manifest import check_file, read_canonical
from pipeline.cache.plan import load_plan, read_manifests
from pipeline.cache.samples import ShardPlan, numbers, read_batch
from pipeline.cache.target_folder import CONFIG, HEAD, TOKENS, target_file, target_json
from pipeline.capture import final_rows
from pipeline.errors import CacheError, DataError, UsageError

if TYPE_CHECKING:
    import torch

    from pipeline.target_head import TargetHead

OPEN_FILES = 128  # shard files kept open: a small cache whole, and half of what macOS grants a process


@dataclass(frozen=True)
class Sample:
    """One sample as CPU tensors: ids int64 [T], mask bool [T], aux [K, T, D] in the order of the layers asked for.

    With `final`: final [R, D] and final_rows int64 [R], the rows of the sample it is kept for, ascending.
    """

    ids: "torch.Tensor"
    mask: "torch.Tensor"
    aux: "torch.Tensor"
    final: "torch.Tensor | None" = None
    final_rows: "torch.Tensor | None" = None


class SampleTable:
    """All planned samples as numpy columns [n], mapped from the index. Order: by shard, in the order of the shard."""

    def __init__(self, index: pa.Table):
        self._index = index
        self.shard = self._numbers("shard")
        self.row = self._numbers("row")  # in the shard
        self.offset = self._numbers("offset")
        self.length = self._numbers("length")
        self.final_offset = self._numbers("final_offset")
        self.final_length = self._numbers("final_length")
        self.supervised = self._numbers("supervised")
        self.ok = np.ones(len(self.shard), bool)  # False: refused in one of its columns
        names = np.frombuffer(index.column("sample_id").combine_chunks().buffers()[1], ">u8", 2 * len(self))
        self.sample_id = names.reshape(-1, 2).astype(np.uint64)  # [n, 2] high, low; rows sort as the 16 bytes do

    def _numbers(self, name: str) -> np.ndarray:
        return numbers(self._index.column(name).combine_chunks())

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def low64(self) -> np.ndarray:
        """The low 64 bits of the sample ids, uint64 [n]."""
        return self.sample_id[:, 1]

    def hex(self, i: int) -> str:
        """The sample id in hex, 32 digits."""
        return f"{self.sample_id[i, 0]:016x}{self.sample_id[i, 1]:016x}"

    @cached_property
    def domain(self) -> list[str]:
        return self._index.column("domain").to_pylist()

    @cached_property
    def split(self) -> list[str]:
        """`train`, `heldout`, or empty where the corpus does not say."""
        return self._index.column("split").to_pylist()


class HiddenCache:
    """A cache, open for reading; safe for many threads. `HiddenCache.open(path)` makes one.

    path, identity (of cache.json), digest (of identity and plan: another corpus is another digest), samples
    """

    def __init__(self, path: Path, identity: dict, plans: list[dict], index: pa.Table):
        self.path = path
        self.identity = identity
        self.digest = _digest([identity["hash"], *(manifest["hash"] for manifest in plans)])
        self.samples = SampleTable(index)
        shards = sum(manifest["shards"] for manifest in plans)
        self._starts = np.searchsorted(self.samples.shard, np.arange(shards + 1))  # first sample of each shard
        self._manifests = [_column_manifests(path, shard, identity["hash"]) for shard in range(shards)]
        for start, columns in zip(self._starts, self._manifests, strict=False):
            refused = [int(row) for manifest in columns.values() for row in manifest["refused"]]
            self.samples.ok[start + np.array(refused, np.int64)] = False
        self._shards: dict[int, ShardPlan] = {}
        self._columns: dict[tuple[int, str], Column] = {}
        self._files: OrderedDict[tuple[int, str], object] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str) -> "HiddenCache":
        """Open a cache. UsageError when there is none; CacheError when it is damaged or of another format version."""
        path = Path(path)
        if not (path / IDENTITY).is_file():
            raise UsageError(f"{path}: no cache there; make one with `pipeline cache-hidden --out {path}`")
        identity = read_canonical(path / IDENTITY)
        plans = read_manifests(path)
        index = read_index(path, plans)
        return cls(path, identity, plans, build_index(load_plan(path)) if index is None else index)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def shards(self) -> int:
        """Planned shards."""
        return len(self._manifests)

    def columns(self, shard: int) -> dict[str, dict]:
        """Manifests of the columns that a shard has, by name."""
        return self._manifests[shard]

    @cached_property
    def whole(self) -> dict[str, dict]:
        """Columns that every planned shard has, by name, each with its spec."""
        first, *others = self._manifests
        return {name: held["spec"] for name, held in first.items() if all(name in other for other in others)}

    @cached_property
    def missing(self) -> list[tuple[int, str]]:
        """(shard, column) still to be captured: columns that only some shards have."""
        names = sorted({name for columns in self._manifests for name in columns})
        return [(n, name) for n, columns in enumerate(self._manifests) for name in names if name not in columns]

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers that are whole, ascending."""
        return tuple(sorted(layer for name in self.whole if (layer := layer_of(name)) is not None))

    @property
    def has_final(self) -> bool:
        return "final" in self.whole

    @cached_property
    def _kind(self) -> tuple[str, int]:
        """The dtype and width that all columns share."""
        kinds = {
            (manifest["spec"]["dtype"], manifest["spec"]["width"]) for c in self._manifests for manifest in c.values()
        }
        if not kinds:
            raise UsageError(f"{self.path}: nothing is captured yet; run `pipeline cache-hidden` with this --out")
        if len(kinds) > 1:
            raise CacheError(f"{self.path}: columns of several kinds, {sorted(kinds)}; run `pipeline verify`")
        return kinds.pop()

    @cached_property
    def dtype(self) -> "torch.dtype":
        """The dtype of states."""
        import torch

        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self._kind[0]]

    @property
    def hidden_size(self) -> int:
        return self._kind[1]

    @cached_property
    def target_config(self) -> dict:
        """The target's config.json."""
        return target_json(self.path, CONFIG)

    @cached_property
    def tokens(self) -> dict:
        """Special token ids and `length`, the number of tokens the tokenizer knows."""
        return target_json(self.path, TOKENS)

    @cached_property
    def _head_file(self) -> Path:
        return target_file(self.path, HEAD)

    def head(self, device: str = "cpu", dtype: "torch.dtype | None" = None) -> "TargetHead":
        """The target's frozen embedding and LM head, float32 unless `dtype` says otherwise; checked once."""
        import torch

        from pipeline.target_head import TargetHead

        return TargetHead.load(self._head_file, device, dtype or torch.float32)

    def tokens_of(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [T] and loss mask bool [T] of sample `i`, checked."""
        shard, row = self._place(i)
        plan = self._shard(shard)
        return plan.ids(row), plan.mask(row)

    def read(self, i: int, layers: Sequence[int] | None = None, final: bool = False) -> Sample:
        """Sample `i` with the states of `layers` (None: all that are whole), and of `final` if asked.

        Raises UsageError for a column the cache lacks, DataError for a refused sample, CacheError naming shard,
        column and sample for damage.
        """
        import torch

        layers = self.layers if layers is None else tuple(layers)
        self._check_wanted(layers, final)
        shard, row = self._place(i)
        if not self.samples.ok[i]:
            raise DataError(
                f"{self.path}: sample {i} was refused, see `pipeline inspect`; skip what `samples.ok` denies"
            )
        ids, mask = self.tokens_of(i)
        kind, D = self._kind
        aux = np.empty((len(layers), len(ids), D), DTYPES[kind])
        for k, layer in enumerate(layers):
            self._fill(shard, aux_column(layer), row, aux[k])
        last = rows = None
        if final:
            keeps_all = self._manifests[shard]["final"]["spec"]["keeps"] == "all"
            rows = np.arange(len(ids)) if keeps_all else np.flatnonzero(final_rows(mask))
            last = np.empty((len(rows), D), DTYPES[kind])
            self._fill(shard, "final", row, last)
            last, rows = torch.from_numpy(last).view(self.dtype), torch.from_numpy(rows)
        return Sample(
            torch.from_numpy(ids.astype(np.int64)),
            torch.from_numpy(mask),
            torch.from_numpy(aux).view(self.dtype),
            last,
            rows,
        )

    def _check_wanted(self, layers: tuple[int, ...], final: bool) -> None:
        absent = [layer for layer in layers if aux_column(layer) not in self.whole]
        if absent:
            every = ",".join(map(str, sorted({*self.layers, *layers})))
            raise UsageError(
                f"{self.path} holds layers {list(self.layers)} whole, {absent} are wanted too; "
                f"capture them with `pipeline cache-hidden --layers {every}`"
            )
        if final and not self.has_final:
            raise UsageError(
                f"{self.path} holds no `final` states; capture them: `pipeline cache-hidden --final needed`"
            )

    def _place(self, i: int) -> tuple[int, int]:
        """Shard and row of sample `i`."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(self.samples.shard[i]), int(self.samples.row[i])

    def _shard(self, number: int) -> ShardPlan:
        """Ids and masks of a shard, the whole file checked when it is first touched."""
        plan = self._shards.get(number)
        if plan is None:
            plan = self._shards[number] = self._open_shard(number)
        return plan

    def _open_shard(self, number: int) -> ShardPlan:
        columns = self._manifests[number]
        if not columns:  # planned, not captured: the plan itself knows
            return load_plan(self.path).shards[number]
        path = inside(shard_folder(self.path, number), SAMPLES)
        for manifest in columns.values():
            check_file(path, manifest["files"][SAMPLES])
            break
        plan = ShardPlan(read_batch(path), number)
        here = slice(self._starts[number], self._starts[number + 1])
        if not np.array_equal(plan.sample_ids, self.samples.sample_id[here]):
            raise CacheError(f"{path}: other samples than the plan's; run `pipeline verify`")
        return plan

    def _fill(self, shard: int, name: str, row: int, out: np.ndarray) -> None:
        """Read the rows of one sample and column into `out`, checked."""
        if not out.size:
            return
        column, file = self._open_column(shard, name)
        column.read_into(file, row, memoryview(out).cast("B"))

    def _open_column(self, shard: int, name: str) -> tuple[Column, object]:
        """A column's checksums, kept for good, and its open file, of which the last used are kept."""
        key = (shard, name)
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
                return self._columns[key], self._files[key]
        column = self._columns.get(key)
        if column is None:
            manifest, plan = self._manifests[shard][name], self._shard(shard)
            bounds = plan.bounds if manifest["spec"]["keeps"] == "all" else plan.final_bounds
            column = open_column(self.path, manifest, bounds)
        file = column.open()
        with self._lock:
            self._columns[key] = column
            self._files[key] = file
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)  # closed once no thread reads from it
        return column, file


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _column_manifests(cache: Path, shard: int, identity: str) -> dict[str, dict]:
    """Manifests of a shard's columns, by name. CacheError for one that is damaged or of another cache."""
    folder = shard_folder(cache, shard)
    try:
        names = sorted(entry.name.removesuffix(".json") for entry in os.scandir(folder) if entry.name.endswith(".json"))
    except FileNotFoundError:
        return {}
    found = {name: column_manifest(cache, shard, name) for name in names if COLUMN.fullmatch(name)}
    for name, manifest in found.items():
        if manifest["cache"] != identity:
            raise CacheError(f"{folder}, column {name}: belongs to another cache; run `pipeline verify`")
    if len({str(manifest["files"][SAMPLES]) for manifest in found.values()}) > 1:
        raise CacheError(f"{cache}, shard {numbered(shard)}: columns of different samples; run `pipeline verify`")
    return found
