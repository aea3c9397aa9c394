"""Codecs: how a column's values are stored in files. Each has an entry in CODECS; all but int8 are lossless.

A codec is a pair of classes. The writer has `write(rows)`, `finish()`, `facts()` (size and digest of each file, by
path in the folder) and `close()`. The reader of a lossless codec has `pieces(first, count)`, the ranges best read at a
time, and `read_into(first_row, out)`, which gives values as flat bytes; int8's gives rows still `Encoded`, to be
decoded where they are needed. Readers are thread-safe. Checksums are the column's concern (`columns.py`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cache.codecs.int8_files import Int8Reader, Int8Writer, group_of
from pipeline.cache.codecs.zarr_file import DTYPES, Grid, ShardFile, ShardFileWriter
from pipeline.cache.codecs.zstd import ZstdReader, ZstdWriter, zstd_grid
from pipeline.cache.layout import COLUMN
from pipeline.errors import UsageError


def _raw_writer(folder: Path, rows: int, width: int, dtype: str) -> ShardFileWriter:
    return ShardFileWriter(folder, Grid.of(rows, width, DTYPES[dtype]))


def _zstd_writer(folder: Path, rows: int, width: int, dtype: str) -> ZstdWriter:
    return ZstdWriter(folder, rows, width, DTYPES[dtype])


class Codec(NamedTuple):
    """writer takes (folder, rows, width, dtype), and for int8 also a calibration.

    grid gives the chunking of a codec with a single array; its reader then takes (folder, grid on disk).
    """

    writer: Callable
    reader: Callable
    grid: Callable[[int, int, np.dtype], Grid] | None = None


CODECS = {
    "raw": Codec(_raw_writer, ShardFile, Grid.of),  # the values as they are: a sample is one byte range
    "zstd": Codec(_zstd_writer, ZstdReader, zstd_grid),
    "int8": Codec(Int8Writer, Int8Reader),
}


def open_values(codec: str, folder: Path, rows: int, width: int, dtype: str, where: str):
    """Open a reader of a column's values: the codec's own, or zarr-python's for a form this program does not write.

    `where` names the column in errors.
    """
    reader, make_grid = CODECS[codec].reader, CODECS[codec].grid
    if make_grid is None:
        return reader(folder, rows, width, dtype)
    grid = Grid.on_disk(folder, rows, width, DTYPES[dtype])
    if grid is not None and grid.compressor == make_grid(rows, width, DTYPES[dtype]).compressor:
        return reader(folder, grid)
    from pipeline.cache.codecs.foreign_zarr import ForeignArray  # imports zarr-python

    return ForeignArray(folder, rows, width, dtype, where)


LOSSY = {"int8"}
PROBE_ALLOWANCE = {"int8": 0.012}  # of a sample: the relative error the probe allows beyond a forward's own

# Compressed size over raw size, measured on residual-stream states, whose mantissas hardly compress.
ZSTD_SHARE = {"bfloat16": 0.72, "float32": 0.86}


def stored_bytes(rows: int, width: int, dtype: str, codec: str) -> int:
    """The expected size on disk, in bytes, of `rows` rows of `width` values."""
    raw = rows * width * DTYPES[dtype].itemsize
    if codec == "zstd":
        return round(raw * ZSTD_SHARE[dtype])
    if codec == "int8":
        return rows * (width + 2 * (width // group_of(width)))
    return raw


def parse_codecs(text: str) -> dict[str, str]:
    """Parse `--codec`: one name for all columns (key ""), or `aux=int8,final=raw`, where `aux.9=` names one layer.

    Raises UsageError for an unknown codec or column.
    """
    chosen: dict[str, str] = {}
    for part in text.split(","):
        columns, _, codec = part.strip().rpartition("=")
        known = not columns or columns == "aux" or COLUMN.fullmatch(columns)
        if codec not in CODECS or not known or columns in chosen:
            names = ", ".join(CODECS)
            raise UsageError(f"--codec {text}: wanted one of {names} for all columns, or such as aux=int8,final=raw")
        chosen[columns] = codec
    return chosen


def codec_of(chosen: dict[str, str], column: str) -> str | None:
    """The codec chosen for a column, by the most specific name; None when the option does not name it."""
    names = [column, *(["aux"] if column.startswith("aux.") else []), ""]
    return next((chosen[name] for name in names if name in chosen), None)
