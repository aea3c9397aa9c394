"""The files of an int8 column: one zarr group, `aux.1.int8/`, of four arrays.

    values    int8    [rows, D]
    scale     uint16  [rows, G]   bits of bfloat16, for every `group_of(D)` channels
    escapes   int32   [e, 3]      row of the column, channel, bits; sorted; one chunk
    channels  float32 [2, D]      mean and spread of each channel, the cache's calibration

`int8.py` says what they mean. Nothing here needs torch.
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
ESCAPE_SPREADS = 16.0  # what lies further from its channel's mean escapes,
ESCAPE_RMS = 4.0  # and what lies further than so many times its row's rms, in spreads
ESCAPES_SHARE = 64  # at most one channel in so many escapes, over a column

VALUES, SCALE, ESCAPES, CHANNELS = "values", "scale", "escapes", "channels"


def group_of(width: int) -> int:
    """Channels that share a scale: the largest divisor of `width` that is at most 128."""
    return next(size for size in range(min(GROUP, width), 0, -1) if width % size == 0)


@dataclass(frozen=True)
class Encoded:
    """Rows as int8 keeps them: values int8 [R, D], scale uint16 [R, G], escapes int32 [e, 3] (row of these, channel,
    bits; sorted), with what decoding needs beside them. `len` is R."""

    values: np.ndarray
    scale: np.ndarray
    escapes: np.ndarray
    calibration: Calibration
    dtype: str  # of the states: bfloat16 or float32

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes + self.escapes.nbytes

    def without(self, spans: list[tuple[int, int]]) -> "Encoded":
        """These rows, with nothing left in some spans of them."""
        values, scale, keep = self.values.copy(), self.scale.copy(), np.ones(len(self.escapes), bool)
        for first, end in spans:
            values[first:end], scale[first:end] = 0, 0
            keep &= (self.escapes[:, 0] < first) | (self.escapes[:, 0] >= end)
        return Encoded(values, scale, self.escapes[keep], self.calibration, self.dtype)

    def span(self, first: int, stop: int, origin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, scale and escapes of rows `first` to `stop`; the escapes' rows are counted from row `origin`."""
        start, end = np.searchsorted(self.escapes[:, 0], [first, stop])
        escapes = self.escapes[start:end] - np.array([origin, 0, 0], np.int32)
        return self.values[first:stop], self.scale[first:stop], escapes


def laid_out(memory: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Values int8 [K, R, D] and scale uint16 [K, R, G] in the first K R (D + 2 G) bytes of some memory."""
    K, R, D = shape
    G = D // group_of(D)
    end = 2 * K * R * G  # the scale first, since its numbers have two bytes
    return memory[end : end + K * R * D].view(np.int8).reshape(shape), memory[:end].view(np.uint16).reshape(K, R, G)


def _grids(rows: int, width: int, escapes: int) -> dict[str, Grid]:
    kept = max(1, escapes)
    return {
        VALUES: Grid.of(rows, width, np.dtype("i1")),
        SCALE: Grid.of(rows, width // group_of(width), np.dtype("<u2")),
        ESCAPES: Grid(escapes, 3, np.dtype("<i4"), kept),
        CHANNELS: Grid(2, width, np.dtype("<f4"), 2),
    }


def _most_escapes(rows: int, width: int) -> int:
    return rows * width // ESCAPES_SHARE


class Int8Writer:
    """Streams encoded rows into `folder`. The escapes stay in memory until `finish`: they are few, or refused."""

    def __init__(self, folder: Path, rows: int, width: int, dtype: str, calibration: Calibration):
        self.folder = folder
        self.escapes = 0
        self._rows, self._width, self._calibration = rows, width, calibration
        self._written = 0
        self._held: list[np.ndarray] = []
        self._streams = {}
        self._dtype, self._metadata = dtype, b""
        folder.mkdir(parents=True)
        for name in (VALUES, SCALE):
            self._streams[name] = ShardFileWriter(folder / name, _grids(rows, width, 0)[name])

    def write(self, rows: Encoded) -> None:
        """Append rows. ProofError when more escape than the column may hold."""
        self._streams[VALUES].write(rows.values)
        self._streams[SCALE].write(rows.scale)
        self._held.append(rows.escapes + np.array([self._written, 0, 0], np.int32))
        self._written += len(rows)
        self.escapes += len(rows.escapes)
        if self.escapes > (most := _most_escapes(self._rows, self._width)):
            column = self.folder.name.removesuffix(".int8")
            raise ProofError(
                f"{column}: more than {most} values in {self._rows} rows lie too far from their channel's mean for "
                f"int8; keep this column whole: --codec {column}=zstd"
            )

    def finish(self) -> None:
        """Write the escapes and the calibration, and sync."""
        escapes = np.concatenate(self._held) if self._held else np.empty((0, 3), np.int32)
        channels = np.stack([self._calibration.mean, self._calibration.spread])
        grids = _grids(self._rows, self._width, len(escapes))
        for name, values in ((ESCAPES, escapes.astype("<i4")), (CHANNELS, channels.astype("<f4"))):
            self._streams[name] = ShardFileWriter(self.folder / name, grids[name])
            self._streams[name].write(np.ascontiguousarray(values))
        for stream in self._streams.values():
            stream.finish()
        self._metadata = group_metadata(self._dtype, group_of(self._width), self._rows, self.escapes)
        (self.folder / METADATA).write_bytes(self._metadata)
        fd = os.open(self.folder / METADATA, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def facts(self) -> dict[str, dict]:
        """Size and digest of each file, by its path in the column's folder."""
        found = {METADATA: FileFact.of_bytes(self._metadata).as_dict()}
        for name, stream in self._streams.items():
            found |= {f"{name}/{file}": fact for file, fact in stream.facts().items()}
        return found

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


def group_metadata(dtype: str, group: int, rows: int, escapes: int) -> bytes:
    """The group's `zarr.json`, which says how to decode, and how many rows and escapes count: chunks are whole."""
    says = f"{dtype}(((values * scale[:, channel // {group}]) * channels[1]) + channels[0]), float32; then the escapes"
    attributes = {"codec": "int8", "dtype": dtype, "rows": rows, "escapes": escapes, "decode": says}
    facts = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return (json.dumps(facts, indent=1) + "\n").encode()


class Int8Reader:
    """An open int8 column. Safe for many threads at once."""

    in_order = False  # its file's bytes are not the values

    def __init__(self, folder: Path, rows: int, width: int, dtype: str):
        self.path = folder / VALUES / SHARD_FILE
        self.dtype = dtype
        index = _grids(rows, width, 0)[ESCAPES].index_bytes
        size = os.stat(folder / ESCAPES / SHARD_FILE).st_size
        self._escapes_held = (size - index) // 12
        if self._escapes_held > max(1, _most_escapes(rows, width)):
            raise CacheError(
                f"{folder}: {self._escapes_held} escapes are more than there may be; run `pipeline verify`"
            )
        grids = _grids(rows, width, self._escapes_held)
        self._files = {name: ShardFile(folder / name, grid) for name, grid in grids.items()}
        self.calibration = Calibration(*self._read(CHANNELS, 0, 2))

    def _read(self, name: str, first: int, count: int) -> np.ndarray:
        file = self._files[name]
        return self._fill(name, first, np.empty((count, file.grid.width), file.grid.dtype))

    def _fill(self, name: str, first: int, out: np.ndarray) -> np.ndarray:
        if out.size:
            self._files[name].read_into(first, memoryview(out).cast("B"))
        return out

    def room(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Memory for values int8 [rows, D] and scale uint16 [rows, G]."""
        grids = self._files[VALUES].grid, self._files[SCALE].grid
        return tuple(np.empty((rows, grid.width), grid.dtype) for grid in grids)

    def escapes(self, kept: range) -> np.ndarray:
        """These of the column's escapes, [e, 3], the row being the column's. CacheError where none can be like that."""
        if kept.stop > self._escapes_held:
            raise CacheError(f"{self.path.parents[3]}: has fewer escapes than are counted; run `pipeline verify`")
        found = self._read(ESCAPES, kept.start, len(kept))
        width = self._files[VALUES].grid.width
        if ((found[:, 1] < 0) | (found[:, 1] >= width)).any() or (found[1:, 0] < found[:-1, 0]).any():
            raise CacheError(f"{self.path.parents[3]}: its escapes are damaged; run `pipeline verify`")
        return found

    def read(self, first: int, values: np.ndarray, scale: np.ndarray) -> None:
        """Fill `values` and `scale` with rows from `first` on."""
        self._fill(VALUES, first, values)
        self._fill(SCALE, first, scale)

    def encoded(self, first: int, escapes: np.ndarray, values: np.ndarray, scale: np.ndarray) -> Encoded:
        """What was read from row `first` on, with theirs among `escapes`, which are sorted by row of the column."""
        start, end = np.searchsorted(escapes[:, 0], [first, first + len(values)])
        own = escapes[start:end] - np.array([first, 0, 0], np.int32)
        return Encoded(values, scale, own, self.calibration, self.dtype)
