"""Codecs: how a column's values become files. One entry in CODECS each.

A codec is a pair of classes. The writer takes `(folder, rows, width, dtype)` and offers `write(values)`, `finish()`,
`facts()` (size and digest of each file, by path in the folder) and `close()`. The reader takes the same and offers
`read_into(first_row, out)` with decoded values as flat bytes; it must be safe for many threads. Checksums over
256-row blocks of decoded values are the column's (`columns.py`), so that every codec is held to them.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cache.zarr_shard import Grid, ShardFile, ShardFileWriter

# How a column's dtype lies in memory and on disk; zarr knows no bfloat16, so its bits travel as uint16.
DTYPES = {"bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}


class RawWriter(ShardFileWriter):
    """The values as they are."""

    def __init__(self, folder: Path, rows: int, width: int, dtype: str):
        super().__init__(folder, Grid.of(rows, width, DTYPES[dtype]))


class RawReader(ShardFile):
    """The values as they are: a sample is one byte range."""

    def __init__(self, folder: Path, rows: int, width: int, dtype: str):
        super().__init__(folder, Grid.of(rows, width, DTYPES[dtype]))


class Codec(NamedTuple):
    writer: type
    reader: type


CODECS = {"raw": Codec(RawWriter, RawReader)}


# What zstd leaves of the values: measured on residual states, whose mantissas hardly compress.
ZSTD_SHARE = {"bfloat16": 0.72, "float32": 0.86}


def group_of(width: int) -> int:
    """Channels that share a scale in int8: the largest divisor of `width` that is at most 128."""
    return next(size for size in range(min(128, width), 0, -1) if width % size == 0)


def stored_bytes(rows: int, width: int, dtype: str, codec: str) -> int:
    """Bytes that `rows` rows of `width` values are expected to take on disk."""
    raw = rows * width * DTYPES[dtype].itemsize
    if codec == "zstd":
        return round(raw * ZSTD_SHARE[dtype])
    if codec == "int8":
        return rows * (width + 2 * (width // group_of(width)))
    return raw
