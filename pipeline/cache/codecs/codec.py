"""Codec: how the values of a column are stored in files. This is the contract that another codec is written from.

A codec is one object in `CODECS` (`__init__.py`). Nothing else names it: `--codec` and its help, the sizes that a plan
states, the order in which a budget tries codecs, capture, probe, certificate, verify, repair, recode and reading all
ask the object. Three classes to begin with:

- `ArrayCodec`, below: lossless, one zarr array a column, from two classes that write and read one;
- `lossy.LossyCodec`: rows encoded on the device that computes them, decoded on the device that reads them, with a
  promise of how large an error is, which is checked before a shard is kept;
- `Codec` itself, for a lossless codec with files of its own.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.codecs.zarr_file import DTYPES, Grid

if TYPE_CHECKING:
    from pipeline.cache.codecs.calibration import Calibration


class Codec(ABC):
    """What every codec answers. `dtype` is a column's, a key of DTYPES, and `width` its number of channels.

    name: in `--codec`, in manifests and in the name of a column's folder, so never to be changed once caches have it.
    lossy: whether values come back rounded. probe_allowance: the relative error of a sample's states that the probe
    allows beyond that of a forward; 0 for a lossless codec.
    """

    name: str
    lossy = False
    probe_allowance = 0.0

    @property
    def suffix(self) -> str:
        """What the name of a column's folder and of its `.arrow` has behind the column's: `aux.1.zstd`."""
        return f".{self.name}"

    @abstractmethod
    def row_bytes(self, width: int, dtype: str) -> float:
        """The expected size of a row on disk, in bytes: plans, budgets and the check of free space count with it."""

    def stored_bytes(self, rows: int, width: int, dtype: str) -> int:
        """The expected size of so many rows on disk, in bytes."""
        return round(rows * self.row_bytes(width, dtype))

    @abstractmethod
    def writer(self, folder: Path, rows: int, width: int, dtype: str, calibration: "Calibration | None"):
        """Open a writer of `rows` rows into `folder`, which it makes; `calibration` is given to lossy codecs.

        It has `write(rows)`, [n, D] as DTYPES has them, some at a time; `finish()`, after the last, which syncs;
        `facts()`, the size and digest of every file by its path in the folder, `zarr.json` among them; and `close()`.
        The same rows give the same bytes, however they are cut.
        """

    @abstractmethod
    def reader(self, folder: Path, rows: int, width: int, dtype: str, where: str):
        """Open a thread-safe reader of what `writer` wrote; `where` names the column in errors. CacheError for damage.

        It has `pieces(first, count)`, the ranges (first, stop) best read at a time; `read_into(first_row, out)`, which
        fills `out` with whole rows as flat bytes; `path`, the file of the values; and `in_order`, whether that file
        begins with all values in order. Checksums of the values are not its concern: see `columns.py`.
        """

    def direct(self, column):
        """A reader straight from the file of an open column, for values stored as they are; None for any other."""
        return None


class ArrayCodec(Codec):
    """A lossless codec with one zarr array a column, whose chunks may be compressed each.

    array_writer, array_reader: classes that take a folder and a grid.
    """

    array_writer: type
    array_reader: type

    @abstractmethod
    def grid(self, rows: int, width: int, dtype: np.dtype) -> Grid:
        """The chunking of a column as it is written, with the compressor that tells its files from other forms."""

    def row_bytes(self, width: int, dtype: str) -> float:
        """The size of the values themselves; with a compressor, to be overridden."""
        return width * DTYPES[dtype].itemsize

    def writer(self, folder: Path, rows: int, width: int, dtype: str, calibration: None = None):
        return self.array_writer(folder, self.grid(rows, width, DTYPES[dtype]))

    def reader(self, folder: Path, rows: int, width: int, dtype: str, where: str):
        """Open a reader: our own, or zarr-python's for an array in a form that this program does not write."""
        grid = Grid.on_disk(folder, rows, width, DTYPES[dtype])
        if grid is not None and grid.compressor == self.grid(rows, width, DTYPES[dtype]).compressor:
            return self.array_reader(folder, grid)
        from pipeline.cache.codecs.foreign_zarr import ForeignArray  # imports zarr-python

        return ForeignArray(folder, rows, width, dtype, where)
