"""HiddenCache: opens a cache and reads samples, verifying the checksum of every 256 rows it returns.

K layers   T rows read of a sample   R rows among them that keep `final`   D hidden size   n samples of the cache
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache import layout
from pipeline.cache.catalog import Catalog, target_file, target_json
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.lossy import Encoded, LossyCodec
from pipeline.cache.columns import OpenColumns
from pipeline.cache.layout import FINAL, aux_column, check_exists, column_of, layer_of, path_inside, shard_folder
from pipeline.cache.manifest import check_file
from pipeline.cache.samples import ShardPlan, read_batch
from pipeline.cache.schema import ColumnManifest, ColumnSpec
from pipeline.errors import CacheError, DataError, UsageError
from pipeline.target.layers import final_rows

if TYPE_CHECKING:
    import torch

    from pipeline.target.head import TargetHead

Part = tuple[int, int, int]  # sample, first row, stop
Layer = int | str  # a layer's number, or FINAL, whose rows are counted among those stored: `final_rows`


@dataclass(frozen=True)
class Sample:
    """One sample, or rows of it, as CPU tensors: ids int64 [T], mask bool [T], aux [K, T, D] in the order of the layers
    asked for.

    With `final`: final [R, D] and final_rows int64 [R], which of these T rows it is kept for, ascending.
    """

    ids: "torch.Tensor"
    mask: "torch.Tensor"
    aux: "torch.Tensor"
    final: "torch.Tensor | None" = None
    final_rows: "torch.Tensor | None" = None


class HiddenCache:
    """A cache open for reading, by `HiddenCache.open(path)`. Thread-safe.

    catalog; path; identity: the content of cache.json; digest: of identity and plan, so another corpus is another
    digest; samples: the SampleTable
    """

    def __init__(self, catalog: Catalog):
        self.catalog, self.path, self.identity = catalog, catalog.path, catalog.identity
        hashes = [catalog.hash, *(manifest.hash for manifest in catalog.segments)]
        self.digest = _digest(hashes)
        # What it was before each append.
        self.earlier_digests = [_digest(hashes[:end]) for end in range(2, len(hashes))]
        self.samples = catalog.samples
        self._shards: dict[int, ShardPlan] = {}
        self._columns = OpenColumns(catalog, self._shard)

    @classmethod
    def open(cls, path: Path | str) -> "HiddenCache":
        """Open a cache. UsageError when there is none; CacheError when it is damaged; VersionError, see README.md."""
        check_exists(Path(path))
        return cls(Catalog(path))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def shards(self) -> int:
        """Planned shards."""
        return self.catalog.shards

    def columns(self, shard: int) -> dict[str, ColumnManifest]:
        """Manifests of the columns that a shard has, by name."""
        return self.catalog.columns(shard)

    @property
    def whole(self) -> dict[str, ColumnSpec]:
        """Columns that every planned shard has, by name, each with its spec."""
        return self.catalog.whole

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers that every planned shard has, ascending."""
        return tuple(sorted(layer for name in self.whole if (layer := layer_of(name)) is not None))

    @property
    def has_final(self) -> bool:
        return FINAL in self.whole

    def rounded(self, layers: Iterable[Layer]) -> dict[str, list[str]]:
        """The columns of these layers that a lossy codec has rounded, with their codecs.

        Their states differ slightly from those that a cache of the same digest has in a lossless codec.
        """
        codecs = {name: self.catalog.codecs(name) for name in map(column_of, layers)}
        return {name: sorted(used) for name, used in codecs.items() if any(CODECS[codec].lossy for codec in used)}

    @property
    def _kind(self) -> tuple[str, int]:
        """The dtype and width that all columns share."""
        if self.catalog.kind is None:
            raise UsageError(f"{self.path}: nothing is captured yet; run `pipeline cache-hidden` with this --out")
        return self.catalog.kind

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
        return target_json(self.catalog, layout.CONFIG)

    @cached_property
    def tokens(self) -> dict:
        """Special token ids and `length`, the number of tokens the tokenizer knows."""
        return target_json(self.catalog, layout.TOKENS)

    @cached_property
    def _head_file(self) -> Path:
        return target_file(self.catalog, layout.HEAD)

    def head(self, device: str = "cpu", dtype: "torch.dtype | None" = None) -> "TargetHead":
        """The target's frozen embedding and LM head, float32 unless `dtype` says otherwise; checked once."""
        import torch

        from pipeline.target.head import TargetHead

        return TargetHead.load(self._head_file, device, dtype or torch.float32)

    def tokens_of(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [T] and loss mask bool [T] of sample `i`, verified."""
        shard, row = self._locate(i)
        plan = self._shard(shard)
        return plan.ids(row), plan.mask(row)

    def read(
        self, i: int, layers: Sequence[int] | None = None, final: bool = False, rows: tuple[int, int] | None = None
    ) -> Sample:
        """Read sample `i` with the states of `layers` (None: all of `self.layers`), and those of `final` if asked.

        `rows` = (start, stop) limits it to these rows; only their blocks are read and verified. Raises UsageError for a
        column the cache lacks, DataError for a refused sample, CacheError naming shard, column and sample for damage.
        """
        import torch

        layers = self.layers if layers is None else tuple(layers)
        self._check_available([i], layers, final)
        ids, mask = self.tokens_of(i)
        start, stop = rows or (0, len(ids))
        assert 0 <= start <= stop <= len(ids), f"rows {rows} of a sample of {len(ids)}"
        final_RD = final_rows_R = None
        if final:
            stored, at = self.final_rows(i, mask, start, stop)
            final_RD = self._states(i, (FINAL,), at, at + len(stored))[0]
            final_rows_R = torch.from_numpy(stored - start)
        return Sample(
            torch.from_numpy(ids[start:stop].astype(np.int64)),
            torch.from_numpy(mask[start:stop]),
            self._states(i, tuple(map(aux_column, layers)), start, stop),
            final_RD,
            final_rows_R,
        )

    def final_rows(self, i: int, mask_T: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, int]:
        """The rows of [start, stop) of sample `i` with a `final` state, and how many before `start` have one.

        mask_T: the sample's loss mask"""
        if self._keeps_all(i):
            return np.arange(start, stop), start
        stored = np.flatnonzero(final_rows(mask_T))
        first, end = np.searchsorted(stored, [start, stop])
        return stored[first:end], int(first)

    def fill(self, out_KRD: "torch.Tensor", parts: Sequence[Part], layers: Sequence[Layer]) -> None:
        """Fill `out`, a CPU tensor of `dtype`, with the rows of the parts (sample, first row, stop), end to end.

        Reads several parts at a time, straight into `out`. Raises what `read` raises, once all its threads are done.
        """
        self._check_parts(parts, layers)
        self._fill(out_KRD, parts, tuple(map(column_of, layers)))

    def lossy_codec(self, layers: Sequence[Layer]) -> LossyCodec | None:
        """The one lossy codec that all states of these layers are stored in, as `read_encoded` needs; else None."""
        used = set().union(*(self.catalog.codecs(column_of(layer)) for layer in layers))
        codec = CODECS[used.pop()] if len(used) == 1 else None
        return codec if codec and codec.lossy else None

    def read_encoded(
        self, memory_B: "torch.Tensor", parts: Sequence[Part], layers: Sequence[Layer], codec: LossyCodec
    ) -> list[tuple[int, int, Encoded]]:
        """Read what `fill` would, but still encoded, into the buffer `memory`, to be decoded on another device.

        codec: the layers' `lossy_codec`, by whose `buffer_bytes` the buffer is sized. Returns, in any order, (index
        into `layers`, first row in the buffer, encoded rows); raises what `fill` raises.
        """
        self._check_parts(parts, layers)
        shape = len(layers), sum(stop - start for _, start, stop in parts), self.hidden_size
        arrays = codec.views(memory_B.numpy(), shape)
        found: list[tuple[int, int, Encoded]] = []

        def read(k: int, at: int, shard: int, name: str, row: int, first: int, count: int, wait: bool) -> bool:
            to = k, slice(at, at + count)
            if wait:
                part = tuple(array_KRw[to] for array_KRw in arrays)
                found.append((k, at, self._columns.read_encoded(shard, name, row, first, part)))
            return wait

        jobs, at = [], 0
        for i, start, stop in parts:
            shard, row = self._locate(i)
            for k, layer in enumerate(layers if stop > start else ()):
                jobs.append(partial(read, k, at, shard, column_of(layer), row, start, stop - start))
            at += stop - start
        self._columns.do(jobs, arrays[0].nbytes, in_page_cache=lambda: False)
        return found

    def _check_parts(self, parts: Sequence[Part], layers: Sequence[Layer]) -> None:
        final = FINAL in layers
        assert not final or len(layers) == 1, f"{layers}: other rows of `final` than of the layers"
        self._check_available([i for i, _, _ in parts], () if final else layers, final)
        table = self.samples
        ends = [(table.final_length if final and not self._keeps_all(i) else table.length)[i] for i, _, _ in parts]
        within = all(0 <= start <= stop <= end for (_, start, stop), end in zip(parts, ends, strict=True))
        assert within, f"rows beyond their samples: {parts}"

    def _keeps_all(self, i: int) -> bool:
        """Whether all rows of sample `i` have a `final` state."""
        return self.catalog.manifest(self._locate(i)[0], FINAL).spec.keeps == "all"

    def _fill(self, out_KRD: "torch.Tensor", parts: Sequence[Part], names: tuple[str, ...]) -> None:
        import torch

        K, R, D = out_KRD.shape
        assert (K, D, out_KRD.dtype) == (len(names), self.hidden_size, self.dtype), f"{out_KRD.shape} {out_KRD.dtype}"
        assert sum(stop - start for _, start, stop in parts) == R, f"{R} rows for {parts}"
        if not out_KRD.numel():
            return
        out = out_KRD.view(torch.uint8).numpy()
        places = [(*self._locate(i), start, stop) for i, start, stop in parts if stop > start]
        jobs, at = [], 0
        for shard, row, start, stop in places:
            for k, name in enumerate(names):
                rows = memoryview(out[k, at : at + stop - start]).cast("B")
                jobs.append(partial(self._columns.read, shard, name, row, start, rows))
            at += stop - start
        self._columns.do(jobs, out.nbytes, in_page_cache=lambda: self._columns.all_in_page_cache(places, names))

    def _states(self, i: int, names: tuple[str, ...], start: int, stop: int) -> "torch.Tensor":
        """Read stored rows [start, stop) of sample `i` from these columns, [K, stop - start, D]."""
        import torch

        shard, _ = self._locate(i)
        self._columns.check(shard, names)  # before memory is allocated for the size they declare
        out = torch.empty(len(names), stop - start, self.hidden_size, dtype=self.dtype)
        self._fill(out, [(i, start, stop)], names)
        return out

    def _check_available(self, indices: Iterable[int], layers: Sequence[int], final: bool) -> None:
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
        names = [*map(aux_column, layers), *([FINAL] if final else [])]
        for i in indices:
            shard, row = self._locate(i)
            if any(str(row) in self.catalog.manifest(shard, name).refused for name in names):
                raise DataError(
                    f"{self.path}: sample {i} was refused, see `pipeline inspect`; skip what `samples.usable` denies"
                )

    def _locate(self, i: int) -> tuple[int, int]:
        """Shard and row of sample `i`."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(self.samples.shard[i]), int(self.samples.row[i])

    def _shard(self, number: int) -> ShardPlan:
        """Ids and masks of a shard; its `samples.arrow` is verified when it is first used."""
        if number in self._shards:
            return self._shards[number]
        manifest = next(iter(self.columns(number).values()), None)
        if manifest is None:  # planned, not captured: only the plan has its samples
            return self._shards.setdefault(number, self.catalog.plan.shards[number])
        path = path_inside(shard_folder(self.path, number), layout.SAMPLES)
        check_file(path, manifest.files[layout.SAMPLES])
        plan = ShardPlan(read_batch(path), number)
        here = slice(self.samples.starts[number], self.samples.starts[number + 1])
        same = np.array_equal(plan.sample_ids, self.samples.sample_id[here])
        if not same or not np.array_equal(plan.lengths, self.samples.length[here]):
            raise CacheError(f"{path}: other samples than the plan's; run `pipeline verify`")
        return self._shards.setdefault(number, plan)


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
