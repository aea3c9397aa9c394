"""ForeignArray: reads columns that other software wrote (other chunks, codecs or stores) through zarr-python.

Slower, with the same values: every block is checked against the column's checksums. The decoded size of a chunk is
bounded before it is decoded, so that a small file cannot exhaust the machine's memory.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Iterator

import numpy as np

from pipeline.cache.codecs.zarr_file import DTYPES, split_rows
from pipeline.errors import CacheError, check_memory, first_line, refuse_limit

CHUNK_BYTES = 64 << 20  # an array with larger chunks is refused
READ_BYTES = 4 << 20  # bytes read at a time, or a chunk
PLAIN = {"bytes", "transpose", "crc32c", "sharding_indexed"}  # codecs that never decode to more than the chunk's shape
MAX_OVERHEAD = 64 << 10  # bytes that a nested compressor or a checksum may add to a chunk
BAD_BYTES = (ValueError, RuntimeError, LookupError, TypeError, OSError, ArithmeticError, AttributeError)
_OPENING = threading.Lock()  # zarr-python's settings are global: one thread would reset another's


class ForeignArray:
    """The values of a column as an array in a zarr `store` (a path or any of zarr-python's). Thread-safe."""

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


def _check_declared(declared: int | None, chunk_spec) -> None:
    allowed = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize + MAX_OVERHEAD
    if declared is None or declared > allowed:
        raise ValueError(f"a chunk says that it decodes to {declared} bytes, and holds at most {allowed}")


def _blosc_size(data: bytes) -> int | None:
    """Bytes a blosc buffer decodes to, from its 16-byte header."""
    return int.from_bytes(data[4:8], "little") if len(data) >= 16 else None


def _zstd_size(data: bytes) -> int | None:
    """Bytes a zstd frame decodes to, from its header (RFC 8878, 3.1.1.1); None where it does not say."""
    if len(data) < 6 or data[:4] != b"\x28\xb5\x2f\xfd":
        return None
    single, flag = data[4] >> 5 & 1, data[4] >> 6
    width = (single, 2, 4, 8)[flag]
    at = 5 + (1 - single) + (0, 1, 2, 4)[data[4] & 3]
    field = data[at : at + width]
    return int.from_bytes(field, "little") + 256 * (flag == 1) if width and len(field) == width else None


@functools.cache
def _bounded_classes() -> dict[str, type]:
    """zarr-python's compressors, each checking the decoded size a chunk declares before decoding it."""
    from zarr.codecs import BloscCodec, ZstdCodec

    class BoundedBlosc(BloscCodec):
        async def _decode_single(self, chunk_bytes, chunk_spec):
            _check_declared(_blosc_size(chunk_bytes.to_bytes()), chunk_spec)
            return await super()._decode_single(chunk_bytes, chunk_spec)

    class BoundedZstd(ZstdCodec):
        async def _decode_single(self, chunk_bytes, chunk_spec):
            _check_declared(_zstd_size(chunk_bytes.to_bytes()), chunk_spec)
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
