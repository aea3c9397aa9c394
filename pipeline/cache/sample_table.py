"""The table of all planned samples, mapped from the index.

n samples of the cache
"""

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import pyarrow as pa

from pipeline.cache.catalog import Catalog
from pipeline.cache.layout import aux_column
from pipeline.cache.samples import to_numpy
from pipeline.errors import CacheError


class SampleTable:
    """All planned samples as numpy columns [n]. Order: by shard, in the order of the shard."""

    def __init__(self, index: pa.Table, catalog: Catalog):
        self._index = index
        self._catalog = catalog
        self.shard = self._numbers("shard")
        self.row = self._numbers("row")  # in the shard
        self.offset = self._numbers("offset")
        self.length = self._numbers("length")
        self.final_offset = self._numbers("final_offset")
        self.final_length = self._numbers("final_length")
        self.supervised = self._numbers("supervised")
        self.starts = np.searchsorted(self.shard, np.arange(catalog.shards + 1))  # first sample of each shard
        self._ok: dict[tuple[str, ...], np.ndarray] = {}

    def _numbers(self, name: str) -> np.ndarray:
        return to_numpy(self._whole(name))

    def _whole(self, name: str) -> pa.Array:
        column = self._index.column(name)  # one piece where it is mapped, which pyarrow would copy
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def sample_id(self) -> np.ndarray:
        """The sample ids as numbers, uint64 [n, 2], high and low: rows sort as the 16 bytes do."""
        column = self._whole("sample_id")
        names = np.frombuffer(column.buffers()[1], ">u8", 2 * len(self), 16 * column.offset)
        return names.reshape(-1, 2).astype(np.uint64)

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

    @property
    def ok(self) -> np.ndarray:
        """Samples that no column at all refused, bool [n]."""
        return self._accepted({name for names in self._catalog.names for name in names})

    def usable(self, layers: Iterable[int], final: bool = False) -> np.ndarray:
        """Samples that none of a view's own columns refused, bool [n]: what `HiddenCache.read` gives for this view."""
        return self._accepted([aux_column(layer) for layer in layers] + ["final"] * final)

    def _accepted(self, columns: Iterable[str]) -> np.ndarray:
        key = tuple(sorted(set(columns)))
        held = self._ok.get(key)
        if held is None:
            held = np.ones(len(self), bool)
            for name in key:
                for shard, rows in self._catalog.refused(name):
                    if rows.max() >= self.starts[shard + 1] - self.starts[shard]:
                        raise CacheError(f"{name} of shard {shard}: refuses samples that are not there")
                    held[self.starts[shard] + rows] = False
            held.flags.writeable = False
            self._ok[key] = held
        return held
