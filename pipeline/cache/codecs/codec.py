"""Codec: how the values of a column are stored in files. This is the contract that another codec is written from.

A codec is one object in `CODECS` (`__init__.py`). Nothing else names it: `--codec` and its help, the sizes that a plan
states, the order in which a budget tries codecs, capture, probe, certificate, verify, repair, recode and reading all
ask the object. Three classes to begin with:

- `ArrayCodec`, below: lossless, one zarr array a column, from two classes that write and read one;
- `lossy.LossyCodec`: rows encoded on the device that computes them, decoded on the device that reads them, with a
  promise of how large an error is, which is checked before a shard is kept;
- `Codec` itself, for a lossless codec with files of its own.

Arrays in a form that is not written here (other chunks, codecs or stores) are read by `ForeignArray`.
"""

import contextlib
import functools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from zstandard import ZstdError, frame_content_size

from pipeline.cache.codecs.zarr_file import DTYPES, Grid, split_rows
from pipeline.errors import CacheError, check_memory, first_line, refuse_limit

CHUNK_BYTES = 64 << 20  # a foreign array with larger chunks is refused
READ_BYTES = 4 << 20  # bytes read at a time, or a chunk
PLAIN = {"bytes", "transpose", "crc32c", "sharding_indexed"}  # codecs that never decode to more than the chunk's shape
MAX_OVERHEAD = 64 << 10  # bytes that a nested compressor or a checksum may add to a chunk
BAD_BYTES = (ValueError, RuntimeError, LookupError, TypeError, OSError, ArithmeticError, AttributeError, ZstdError)
_OPENING = threading.Lock()  # zarr-python's settings are global: one thread would reset another's


@dataclass(frozen=True, eq=False)
class Calibration:
    """Mean and std of each channel, float32 [D] each; no std is zero."""

    mean: np.ndarray
    std: np.ndarray
    _on_device: dict = field(default_factory=dict, repr=False)

    def on(self, device) -> tuple:
        """Mean and std as tensors [D] on a torch device, copied there once."""
        import torch

        if device not in self._on_device:
            copies = (torch.from_numpy(values.copy()) for values in (self.mean, self.std))
            self._on_device[device] = tuple(copy.to(device, non_blocking=True) for copy in copies)
        return self._on_device[device]


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
    def writer(self, folder: Path, rows: int, width: int, dtype: str, calibration: Calibration | None):
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
        return ForeignArray(folder, rows, width, dtype, where)


class ForeignArray:
    """A column that other software wrote, in a zarr `store` (a path or any of zarr-python's), read by zarr-python.

    Slower, with the same values: every block is checked against the column's checksums. The decoded size of a chunk is
    bounded before it is decoded, so that a small file cannot exhaust the machine's memory. Thread-safe.
    """

    in_order = False  # the files' bytes are not the values in order

    def __init__(self, store, rows: int, width: int, dtype: str, where: str):
        """`where` names the column in errors. Raises CacheError for an array that is not this column's."""
        import zarr

        self.path, self.where, self.width, self.dtype = store, where, width, DTYPES[dtype]
        with _errors(where), _OPENING, zarr.config.set(_bounded_codecs()):
            self.array = array = zarr.open_array(store, mode="r")
        if array.ndim != 2 or array.shape[0] < rows or array.shape[1] != width or array.dtype != self.dtype:
            raise CacheError(
                f"{where}: an array {array.shape} of {array.dtype}, wanted {(rows, width)} of {self.dtype}; "
                "run `pipeline verify`"
            )
        self._check_codecs(array.metadata.codecs)
        # zarr-python decodes a shard chunk by chunk, unless something comes before its codec
        whole = array.chunks if len(array.metadata.codecs) == 1 or not array.shards else array.shards
        size = math.prod(whole) * array.dtype.itemsize
        if not 0 < size <= CHUNK_BYTES:
            raise CacheError(f"{where}: chunks of {size} bytes, not 1 to {CHUNK_BYTES}; write others")
        # as many whole chunks as fit, since a chunk is decoded whole
        self._step = whole[0] * max(1, READ_BYTES // (whole[0] * width * self.dtype.itemsize))

    def _check_codecs(self, codecs) -> None:
        for codec in codecs:
            name = codec.to_dict()["name"]
            bounded = _bounded_classes().get(name)
            assert bounded is None or type(codec) is bounded, f"{codec} would decode to any size"
            if name not in PLAIN and not bounded:
                raise CacheError(
                    f"{self.where}: codec {name!r} decodes to any size; write it again with one of "
                    f"{', '.join(sorted(PLAIN | {*_bounded_classes()}))}"
                )
            self._check_codecs(getattr(codec, "codecs", ()))

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Split `count` rows from `first` on at chunks' ends: zarr-python copies each piece in memory once more."""
        return split_rows(first, count, self._step)

    def read_into(self, first_row: int, out: memoryview) -> None:
        """Fill `out`, whole rows as flat bytes, from `first_row` on."""
        rows = np.frombuffer(out, self.dtype).reshape(-1, self.width)
        with _errors(self.where):
            rows[:] = self.array[first_row : first_row + len(rows)]


@contextlib.contextmanager
def _errors(where: str) -> Iterator[None]:
    """Raise CacheError for the errors of zarr-python and its codecs about bad bytes."""
    try:
        yield
    except BAD_BYTES as error:
        refuse_limit(where, error)
        if "decompress" in str(error):
            check_memory(where)
        message = first_line(error, None)
        raise CacheError(f"{where}: zarr-python cannot read it: {message}; run `pipeline verify`") from error


def _check_declared(declared: int, chunk_spec) -> None:
    allowed = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize + MAX_OVERHEAD
    if not 0 < declared <= allowed:
        raise ValueError(f"a chunk says that it decodes to {declared} bytes, and holds at most {allowed}")


@functools.cache
def blosc():
    """Return the library, imported by the first column that needs it: that takes 40 ms."""
    from numcodecs import blosc

    blosc.use_threads = False  # its pool has one lock for all callers; each reader thread decodes a chunk of its own
    return blosc


@functools.cache
def _bounded_classes() -> dict[str, type]:
    """zarr-python's compressors, each checking the decoded size a chunk declares before decoding it."""
    from zarr.codecs import BloscCodec, ZstdCodec

    blosc()

    class BoundedBlosc(BloscCodec):
        async def _decode_single(self, chunk_bytes, chunk_spec):
            header = chunk_bytes.to_bytes()[:16]
            _check_declared(int.from_bytes(header[4:8], "little") if len(header) == 16 else 0, chunk_spec)
            return await super()._decode_single(chunk_bytes, chunk_spec)

    class BoundedZstd(ZstdCodec):
        async def _decode_single(self, chunk_bytes, chunk_spec):
            _check_declared(frame_content_size(chunk_bytes.to_bytes()), chunk_spec)  # -1 where it does not say
            return await super()._decode_single(chunk_bytes, chunk_spec)

    return {"blosc": BoundedBlosc, "zstd": BoundedZstd}


@functools.cache
def _bounded_codecs() -> dict[str, str]:
    """The zarr-python setting that selects the bounded compressors."""
    from zarr.registry import register_codec

    names = {name: f"{__name__}.{bounded.__name__}" for name, bounded in _bounded_classes().items()}
    for name, bounded in _bounded_classes().items():
        register_codec(name, bounded, qualname=names[name])
    return {f"codecs.{name}": qualname for name, qualname in names.items()}
