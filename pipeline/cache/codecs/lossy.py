"""LossyCodec: rows of states encoded as rows of a few arrays, and the files of a column encoded so.

A column is a zarr group, such as `aux.1.int8/`: the codec's own arrays, a row for each row of states, and of every
lossy codec

    escapes   int32   [e, 3]   outliers: row of the column, channel, bits; sorted; one chunk. None where e is 0
    channels  float32 [2, D]   mean and std of each channel, the cache's calibration

Rows are read, verified and moved to another device while they are still encoded. Nothing here needs torch until rows
are encoded or decoded.

    R rows   D channels   K columns   e outliers
"""

import json
import os
from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.atomic import sync_file
from pipeline.cache.codecs.codec import Calibration, Codec
from pipeline.cache.codecs.zarr_file import METADATA, SHARD_FILE, Grid, ShardFileWriter, open_shard_file
from pipeline.cache.manifest import FileFact
from pipeline.errors import CacheError, ProofError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OUTLIERS, CHANNELS = "escapes", "channels"
OUTLIER_SHARE = 64  # at most one entry of a column in so many may be an outlier


class LossyCodec(Codec):
    """What a lossy codec answers beyond `Codec`. Its promise: `error_bound`, `max_of_...` and `probe_allowance`.

    Before a shard is kept, its certificate (`error_certificate.py`) is checked against the promise, and against limits
    that all codecs share. max_of_token: the largest rms error of a row, relative to the row's rms deviation, both in
    stds of the channels. max_of_channels: the same of a channel over rows, for nine tenths of the channels: three times
    what the codec does over many rows, since rows of one sample show twice that.

    Every column in a lossy codec is calibrated first: the certificate measures errors in its channels' stds, and an
    encoder may normalise by them.
    """

    lossy = True
    max_of_token: float
    max_of_channels = 0.03

    @abstractmethod
    def arrays(self, width: int) -> dict[str, tuple[int, np.dtype]]:
        """The arrays that states of so many channels become: name -> (values a row, dtype of at most 4 bytes)."""

    @abstractmethod
    def encode(self, states_RD: "Tensor", calibration: Calibration) -> tuple["Tensor", ...]:
        """Encode states on their device: one tensor [R, values a row] for each of `arrays`, of as many bytes a value.

        A further one, int32 [e, 3], names outliers (row, channel, bits; sorted): `decode` need not care for these
        entries, which come back exactly. The same states give the same bytes on every device.
        """

    @abstractmethod
    def decode(self, arrays: tuple["Tensor", ...], calibration: Calibration, out_RD: "Tensor") -> None:
        """Fill `out_RD` with states, rounded to its dtype, from the arrays on its device: uint16 there is int16."""

    @abstractmethod
    def error_bound(self, states_RD: "Tensor", calibration: Calibration) -> "Tensor":
        """The largest error of each entry, as [R, D], [R, 1] or [D], but for the last rounding to the states' dtype."""

    @abstractmethod
    def formula(self, width: int, dtype: str) -> str:
        """How a value is decoded, for people who read the files."""

    def row_bytes(self, width: int, dtype: str) -> int:
        return self.buffer_bytes((1, 1, width))

    def pack(self, parts: "tuple[Tensor, ...]", calibration: Calibration, dtype: str) -> "Encoded":
        """Wrap what `encode` returned, copied to the host, as it is stored. dtype: of the states."""
        kinds = [kind for _, kind in self.arrays(len(calibration.mean)).values()]
        arrays = tuple(part.numpy().view(kind) for part, kind in zip(parts, kinds, strict=False))
        outliers = parts[len(kinds)].numpy() if len(parts) > len(kinds) else np.empty((0, 3), np.int32)
        return Encoded(self, arrays, outliers, calibration, dtype)

    def encode_to_host(self, states_RD: "Tensor", calibration: Calibration) -> "Encoded":
        """Encode states on their device and copy the result to the host, as it is stored."""
        parts = tuple(part.cpu() for part in self.encode(states_RD, calibration))
        return self.pack(parts, calibration, str(states_RD.dtype).removeprefix("torch."))

    def buffer_bytes(self, shape: tuple[int, int, int]) -> int:
        """The bytes of a buffer for `views` of this shape."""
        K, R, D = shape
        return K * R * sum(count * kind.itemsize for count, kind in self.arrays(D).values())

    def views(self, memory: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
        """View the start of a buffer as the arrays of K columns of R rows, those with larger items first in memory."""
        K, R, D = shape
        arrays, views, at = self.arrays(D), {}, 0
        for name, (count, kind) in sorted(arrays.items(), key=lambda item: -item[1][1].itemsize):
            end = at + K * R * count * kind.itemsize
            views[name], at = memory[at:end].view(kind).reshape(K, R, count), end
        return tuple(views[name] for name in arrays)

    def writer(self, folder: Path, rows: int, width: int, dtype: str, calibration: Calibration) -> "EncodedWriter":
        return EncodedWriter(self, folder, rows, width, dtype, calibration)

    def reader(self, folder: Path, rows: int, width: int, dtype: str, where: str = "") -> "EncodedReader":
        return EncodedReader(self, folder, rows, width, dtype)


@dataclass(frozen=True)
class Encoded:
    """Encoded rows: the codec's arrays, R rows each; outliers int32 [e, 3] (row of these, channel, bits; sorted); and
    the calibration and dtype to decode them with. `len` is R."""

    codec: LossyCodec
    arrays: tuple[np.ndarray, ...]
    outliers: np.ndarray
    calibration: Calibration
    dtype: str  # of the states: bfloat16 or float32

    def __len__(self) -> int:
        return len(self.arrays[0])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.arrays, self.outliers))

    @property
    def width(self) -> int:
        """D, the channels of a row."""
        return len(self.calibration.mean)

    def without(self, spans: list[tuple[int, int]]) -> "Encoded":
        """A copy with the rows of these spans [first, end) zeroed."""
        arrays, keep = tuple(array.copy() for array in self.arrays), np.ones(len(self.outliers), bool)
        for first, end in spans:
            for array in arrays:
                array[first:end] = 0
            keep &= (self.outliers[:, 0] < first) | (self.outliers[:, 0] >= end)
        return replace(self, arrays=arrays, outliers=self.outliers[keep])

    def span(self, first: int, stop: int, origin: int) -> list[np.ndarray]:
        """The arrays and the outliers of rows [first, stop); the outliers' rows are counted from row `origin`."""
        start, end = np.searchsorted(self.outliers[:, 0], [first, stop])
        outliers = self.outliers[start:end] - np.array([origin, 0, 0], np.int32)
        return [*(array[first:stop] for array in self.arrays), outliers]

    def to(self, device: "torch.device | str", non_blocking: bool = True) -> "EncodedOnDevice":
        """Copy the rows to a device, still encoded."""
        outliers = ()
        if len(self.outliers):
            kinds = (np.int64, np.int64, np.int16 if self.dtype == "bfloat16" else np.int32)
            outliers = tuple(self.outliers[:, k].astype(kind) for k, kind in enumerate(kinds))
        arrays, outliers = (
            tuple(_to_device(values, device, non_blocking) for values in group) for group in (self.arrays, outliers)
        )
        return EncodedOnDevice(self.codec, arrays, outliers, self.calibration, self.dtype)

    def decode(self, device: "torch.device | str" = "cpu", out: "Tensor | None" = None) -> "Tensor":
        """Decode to states [R, D] on `device`, in the column's dtype; into `out` if given."""
        import torch

        if out is None:
            out = torch.empty(len(self), self.width, dtype=getattr(torch, self.dtype), device=device)
        self.to(device).decode(out)
        return out

    def decode_bytes(self, out: memoryview) -> None:
        """Decode into flat bytes."""
        import torch

        self.decode(out=torch.frombuffer(out, dtype=getattr(torch, self.dtype)).view(len(self), self.width))


@dataclass(frozen=True)
class EncodedOnDevice:
    """`Encoded` rows on a device. outliers: their rows, channels and bits, [e] each; empty where there are none."""

    codec: LossyCodec
    arrays: "tuple[Tensor, ...]"
    outliers: "tuple[Tensor, ...]"
    calibration: Calibration
    dtype: str

    def __len__(self) -> int:
        return len(self.arrays[0])

    def to(self, device: "torch.device | str", non_blocking: bool = True) -> "EncodedOnDevice":
        """Return the rows, which are on the device already."""
        return self

    def decode(self, out_RD: "Tensor") -> None:
        """Decode into states on the same device."""
        self.codec.decode(self.arrays, self.calibration, out_RD)
        if self.outliers:
            rows_e, channels_e, bits_e = self.outliers
            out_RD.view(bits_e.dtype)[rows_e, channels_e] = bits_e


def _to_device(values: np.ndarray, device: "torch.device | str", non_blocking: bool) -> "Tensor":
    import torch

    from pipeline.tensors import copied_without_wait

    values = np.ascontiguousarray(values)
    signed = values.view(np.int16) if values.dtype == np.uint16 else values  # not every device has uint16
    return copied_without_wait(torch.from_numpy(signed), device).to(device, non_blocking=non_blocking)


def _grids(codec: LossyCodec, rows: int, width: int, outliers: int) -> dict[str, Grid]:
    return {
        **{name: Grid.of(rows, count, kind) for name, (count, kind) in codec.arrays(width).items()},
        OUTLIERS: Grid(outliers, 3, np.dtype("<i4"), max(1, outliers)),
        CHANNELS: Grid(2, width, np.dtype("<f4"), 2),
    }


def _max_outliers(rows: int, width: int) -> int:
    return rows * width // OUTLIER_SHARE


class EncodedWriter:
    """Streams encoded rows into `folder`. Outliers stay in memory until `finish`: too many of them raise ProofError."""

    def __init__(self, codec: LossyCodec, folder: Path, rows: int, width: int, dtype: str, calibration: Calibration):
        self.codec, self.folder = codec, folder
        self._rows, self._width, self._dtype, self._calibration = rows, width, dtype, calibration
        self._written = self._outlier_count = 0
        self._outliers: list[np.ndarray] = []
        grids = _grids(codec, rows, width, 0)
        folder.mkdir(parents=True)
        self._streams = {name: ShardFileWriter(folder / name, grids[name]) for name in codec.arrays(width)}

    def write(self, rows: Encoded) -> None:
        """Append rows. ProofError when the column has more outliers than it may."""
        for stream, array in zip(self._streams.values(), rows.arrays, strict=True):
            stream.write(array)
        self._outliers.append(rows.outliers + np.array([self._written, 0, 0], np.int32))
        self._written += len(rows)
        self._outlier_count += len(rows.outliers)
        if self._outlier_count > (most := _max_outliers(self._rows, self._width)):
            column = self.folder.name.removesuffix(self.codec.suffix)
            raise ProofError(
                f"{column}: more than {most} values in {self._rows} rows lie too far from their channel's mean for "
                f"{self.codec.name}; keep this column whole: --codec {column}=zstd"
            )

    def finish(self) -> None:
        """Write the outliers and the calibration, and sync every file."""
        outliers = np.concatenate(self._outliers) if self._outliers else np.empty((0, 3), np.int32)
        channels = np.stack([self._calibration.mean, self._calibration.std])
        grids = _grids(self.codec, self._rows, self._width, len(outliers))
        for name, values in ((OUTLIERS, outliers.astype("<i4")), (CHANNELS, channels.astype("<f4"))):
            self._streams[name] = ShardFileWriter(self.folder / name, grids[name])
            self._streams[name].write(np.ascontiguousarray(values))
        for stream in self._streams.values():
            stream.finish()
        (self.folder / METADATA).write_bytes(self._group_metadata())
        sync_file(self.folder / METADATA)

    def _group_metadata(self) -> bytes:
        """The group's `zarr.json`: how to decode, and how many rows and outliers there are in the whole chunks."""
        attributes = {
            "codec": self.codec.name,
            "dtype": self._dtype,
            "rows": self._rows,
            "escapes": self._outlier_count,
            "decode": self.codec.formula(self._width, self._dtype),
        }
        facts = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        return (json.dumps(facts, indent=1) + "\n").encode()

    def facts(self) -> dict[str, dict]:
        """Size and digest of each file, by its path in the column's folder."""
        facts = {METADATA: FileFact.of_bytes(self._group_metadata()).as_dict()}
        for name, stream in self._streams.items():
            facts |= {f"{name}/{file}": fact for file, fact in stream.facts().items()}
        return facts

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


class EncodedReader:
    """An open column of a lossy codec. Thread-safe."""

    in_order = False  # the file's bytes are not the values in order

    def __init__(self, codec: LossyCodec, folder: Path, rows: int, width: int, dtype: str):
        self.codec, self.folder, self.dtype, self._width = codec, folder, dtype, width
        self._arrays = [*codec.arrays(width)]
        self.path = folder / self._arrays[0] / SHARD_FILE
        index = _grids(codec, rows, width, 0)[OUTLIERS].index_bytes
        size = os.stat(folder / OUTLIERS / SHARD_FILE).st_size
        self._outlier_count = (size - index) // 12
        if self._outlier_count > max(1, _max_outliers(rows, width)):
            raise CacheError(
                f"{folder}: {self._outlier_count} escapes are more than there may be; run `pipeline verify`"
            )
        grids = _grids(codec, rows, width, self._outlier_count)
        self._files = {name: open_shard_file(folder / name, grid) for name, grid in grids.items()}
        self.calibration = Calibration(*self._read(CHANNELS, 0, 2))

    def _read(self, name: str, first: int, count: int) -> np.ndarray:
        grid = self._files[name].grid
        return self._fill(name, first, np.empty((count, grid.width), grid.dtype))

    def _fill(self, name: str, first: int, out: np.ndarray) -> np.ndarray:
        if out.size:
            self._files[name].read_into(first, memoryview(out).cast("B"))
        return out

    def buffers(self, rows: int) -> tuple[np.ndarray, ...]:
        """Allocate the codec's arrays for so many rows."""
        return tuple(np.empty((rows, count), kind) for count, kind in self.codec.arrays(self._width).values())

    def outliers(self, kept: range) -> np.ndarray:
        """Outliers `kept` of the column, [e, 3], rows counted in the column. CacheError where they cannot be valid."""
        if kept.stop > self._outlier_count:
            raise CacheError(f"{self.folder}: has fewer escapes than are counted; run `pipeline verify`")
        outliers = self._read(OUTLIERS, kept.start, len(kept))
        channels, rows = outliers[:, 1], outliers[:, 0]
        if ((channels < 0) | (channels >= self._width)).any() or (rows[1:] < rows[:-1]).any():
            raise CacheError(f"{self.folder}: its escapes are damaged; run `pipeline verify`")
        return outliers

    def read(self, first: int, arrays: tuple[np.ndarray, ...]) -> None:
        """Fill the codec's arrays with the rows from `first` on."""
        for name, array in zip(self._arrays, arrays, strict=True):
            self._fill(name, first, array)

    def encoded(self, first: int, outliers: np.ndarray, arrays: tuple[np.ndarray, ...]) -> Encoded:
        """Join rows read from `first` on with their own among `outliers`, which are sorted by row of the column."""
        start, end = np.searchsorted(outliers[:, 0], [first, first + len(arrays[0])])
        own = outliers[start:end] - np.array([first, 0, 0], np.int32)
        return Encoded(self.codec, arrays, own, self.calibration, self.dtype)
