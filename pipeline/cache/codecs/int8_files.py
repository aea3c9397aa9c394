"""The files of an int8 column: one zarr group, `aux.1.int8/`, of four arrays.

    values    int8    [rows, D]
    scale     uint16  [rows, G]   bits of bfloat16, for every `group_of(D)` channels
    escapes   int32   [e, 3]      outliers: row of the column, channel, bits; sorted; one chunk
    channels  float32 [2, D]      mean and std of each channel, the cache's calibration

`int8.py` defines the encoding. Nothing here needs torch.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cache.codecs.calibration import Calibration
from pipeline.cache.codecs.zarr_file import METADATA, SHARD_FILE, Grid, ShardFile, ShardFileWriter
from pipeline.cache.manifest import FileFact
from pipeline.errors import CacheError, ProofError

GROUP = 128  # channels that share a scale
OUTLIER_STDS = 16.0  # an entry is an outlier beyond so many stds of its channel's mean,
OUTLIER_RMS = 4.0  # or beyond so many times its row's rms, both in stds
OUTLIER_SHARE = 64  # at most one entry of a column in so many may be an outlier

VALUES, SCALE, OUTLIERS, CHANNELS = "values", "scale", "escapes", "channels"


def group_of(width: int) -> int:
    """Channels that share a scale: the largest divisor of `width` that is at most 128."""
    return next(size for size in range(min(GROUP, width), 0, -1) if width % size == 0)


@dataclass(frozen=True)
class Encoded:
    """int8-encoded rows: values int8 [R, D], scale uint16 [R, G], outliers int32 [e, 3] (row of these, channel, bits;
    sorted), and the calibration and dtype to decode them with. `len` is R."""

    values: np.ndarray
    scale: np.ndarray
    outliers: np.ndarray
    calibration: Calibration
    dtype: str  # of the states: bfloat16 or float32

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes + self.outliers.nbytes

    def without(self, spans: list[tuple[int, int]]) -> "Encoded":
        """A copy with the rows of these spans [first, end) zeroed."""
        values, scale, keep = self.values.copy(), self.scale.copy(), np.ones(len(self.outliers), bool)
        for first, end in spans:
            values[first:end], scale[first:end] = 0, 0
            keep &= (self.outliers[:, 0] < first) | (self.outliers[:, 0] >= end)
        return Encoded(values, scale, self.outliers[keep], self.calibration, self.dtype)

    def span(self, first: int, stop: int, origin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, scale and outliers of rows [first, stop); the outliers' rows are counted from row `origin`."""
        start, end = np.searchsorted(self.outliers[:, 0], [first, stop])
        outliers = self.outliers[start:end] - np.array([origin, 0, 0], np.int32)
        return self.values[first:stop], self.scale[first:stop], outliers


def int8_views(memory: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """View the first K R (D + 2 G) bytes of a buffer as values int8 [K, R, D] and scale uint16 [K, R, G]."""
    K, R, D = shape
    G = D // group_of(D)
    end = 2 * K * R * G  # the scale first, since its numbers have two bytes
    return memory[end : end + K * R * D].view(np.int8).reshape(shape), memory[:end].view(np.uint16).reshape(K, R, G)


def _grids(rows: int, width: int, outliers: int) -> dict[str, Grid]:
    kept = max(1, outliers)
    return {
        VALUES: Grid.of(rows, width, np.dtype("i1")),
        SCALE: Grid.of(rows, width // group_of(width), np.dtype("<u2")),
        OUTLIERS: Grid(outliers, 3, np.dtype("<i4"), kept),
        CHANNELS: Grid(2, width, np.dtype("<f4"), 2),
    }


def _max_outliers(rows: int, width: int) -> int:
    return rows * width // OUTLIER_SHARE


class Int8Writer:
    """Streams encoded rows into `folder`. Outliers stay in memory until `finish`: too many of them raise ProofError."""

    def __init__(self, folder: Path, rows: int, width: int, dtype: str, calibration: Calibration):
        self.folder = folder
        self.outliers = 0
        self._rows, self._width, self._calibration = rows, width, calibration
        self._written = 0
        self._outliers: list[np.ndarray] = []
        self._streams = {}
        self._dtype, self._metadata = dtype, b""
        folder.mkdir(parents=True)
        for name in (VALUES, SCALE):
            self._streams[name] = ShardFileWriter(folder / name, _grids(rows, width, 0)[name])

    def write(self, rows: Encoded) -> None:
        """Append rows. ProofError when the column has more outliers than it may."""
        self._streams[VALUES].write(rows.values)
        self._streams[SCALE].write(rows.scale)
        self._outliers.append(rows.outliers + np.array([self._written, 0, 0], np.int32))
        self._written += len(rows)
        self.outliers += len(rows.outliers)
        if self.outliers > (most := _max_outliers(self._rows, self._width)):
            column = self.folder.name.removesuffix(".int8")
            raise ProofError(
                f"{column}: more than {most} values in {self._rows} rows lie too far from their channel's mean for "
                f"int8; keep this column whole: --codec {column}=zstd"
            )

    def finish(self) -> None:
        """Write the outliers and the calibration, and sync every file."""
        outliers = np.concatenate(self._outliers) if self._outliers else np.empty((0, 3), np.int32)
        channels = np.stack([self._calibration.mean, self._calibration.std])
        grids = _grids(self._rows, self._width, len(outliers))
        for name, values in ((OUTLIERS, outliers.astype("<i4")), (CHANNELS, channels.astype("<f4"))):
            self._streams[name] = ShardFileWriter(self.folder / name, grids[name])
            self._streams[name].write(np.ascontiguousarray(values))
        for stream in self._streams.values():
            stream.finish()
        self._metadata = group_metadata(self._dtype, group_of(self._width), self._rows, self.outliers)
        (self.folder / METADATA).write_bytes(self._metadata)
        fd = os.open(self.folder / METADATA, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def facts(self) -> dict[str, dict]:
        """Size and digest of each file, by its path in the column's folder."""
        facts = {METADATA: FileFact.of_bytes(self._metadata).as_dict()}
        for name, stream in self._streams.items():
            facts |= {f"{name}/{file}": fact for file, fact in stream.facts().items()}
        return facts

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


def group_metadata(dtype: str, group: int, rows: int, outliers: int) -> bytes:
    """The group's `zarr.json`: how to decode, and how many rows and outliers there are: arrays have whole chunks."""
    decode = (
        f"{dtype}(((values * scale[:, channel // {group}]) * channels[1]) + channels[0]), float32; then the escapes"
    )
    attributes = {"codec": "int8", "dtype": dtype, "rows": rows, "escapes": outliers, "decode": decode}
    facts = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return (json.dumps(facts, indent=1) + "\n").encode()


class Int8Reader:
    """An open int8 column. Thread-safe."""

    in_order = False  # the file's bytes are not the values in order

    def __init__(self, folder: Path, rows: int, width: int, dtype: str):
        self.path = folder / VALUES / SHARD_FILE
        self.dtype = dtype
        index = _grids(rows, width, 0)[OUTLIERS].index_bytes
        size = os.stat(folder / OUTLIERS / SHARD_FILE).st_size
        self._outlier_count = (size - index) // 12
        if self._outlier_count > max(1, _max_outliers(rows, width)):
            raise CacheError(
                f"{folder}: {self._outlier_count} escapes are more than there may be; run `pipeline verify`"
            )
        grids = _grids(rows, width, self._outlier_count)
        self._files = {name: ShardFile(folder / name, grid) for name, grid in grids.items()}
        self.calibration = Calibration(*self._read(CHANNELS, 0, 2))

    def _read(self, name: str, first: int, count: int) -> np.ndarray:
        file = self._files[name]
        return self._fill(name, first, np.empty((count, file.grid.width), file.grid.dtype))

    def _fill(self, name: str, first: int, out: np.ndarray) -> np.ndarray:
        if out.size:
            self._files[name].read_into(first, memoryview(out).cast("B"))
        return out

    def buffers(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Allocate values int8 [rows, D] and scale uint16 [rows, G]."""
        grids = self._files[VALUES].grid, self._files[SCALE].grid
        return tuple(np.empty((rows, grid.width), grid.dtype) for grid in grids)

    def outliers(self, kept: range) -> np.ndarray:
        """Outliers `kept` of the column, [e, 3], rows counted in the column. CacheError where they cannot be valid."""
        if kept.stop > self._outlier_count:
            raise CacheError(f"{self.path.parents[3]}: has fewer escapes than are counted; run `pipeline verify`")
        outliers = self._read(OUTLIERS, kept.start, len(kept))
        width = self._files[VALUES].grid.width
        if ((outliers[:, 1] < 0) | (outliers[:, 1] >= width)).any() or (outliers[1:, 0] < outliers[:-1, 0]).any():
            raise CacheError(f"{self.path.parents[3]}: its escapes are damaged; run `pipeline verify`")
        return outliers

    def read(self, first: int, values: np.ndarray, scale: np.ndarray) -> None:
        """Fill `values` and `scale` with the rows from `first` on."""
        self._fill(VALUES, first, values)
        self._fill(SCALE, first, scale)

    def encoded(self, first: int, outliers: np.ndarray, values: np.ndarray, scale: np.ndarray) -> Encoded:
        """Join rows read from `first` on with their own among `outliers`, which are sorted by row of the column."""
        start, end = np.searchsorted(outliers[:, 0], [first, first + len(values)])
        own = outliers[start:end] - np.array([first, 0, 0], np.int32)
        return Encoded(values, scale, own, self.calibration, self.dtype)
