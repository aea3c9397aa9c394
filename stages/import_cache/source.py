"""The source of an import: another trainer's cache of any form, its samples, and the checks before a state is read.

The files are untrusted: cut short, of another kind, or malicious. Sizes are compared with the file's own before
anything is allocated, and states are memory-mapped, so that only rows in use are read.

    T tokens   R rows of a chunk   K layers   D hidden size
"""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.layout import aux_column
from pipeline.cache.samples import ShardPlan
from pipeline.errors import DataError, first_line, refuse_limit
from pipeline.pickles import RefusedPickle, check_pickle

STORED_DTYPE = {torch.bfloat16: "bfloat16", torch.float16: "float32", torch.float32: "float32"}  # exact in either
REMEDY = "make that file again, or move it out of the folder and import into a fresh --out"
CHUNK_ROWS = 1024  # rows of a sample in memory at a time
MAX_PICKLE = 1 << 20  # bytes outside of tensors; a sample has a few hundred
# What torch's restricted unpickler raises on bytes that torch.save did not write.
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    OSError,
)

Norm = Callable[[Tensor], Tensor]
SampleLocation = tuple[str, int]  # file, relative to the source, and line from 1


@dataclass(frozen=True)
class ForeignSample:
    """One sample of a file: ids int32 [T], loss mask bool [T], and its states, which are read on demand.

    `where` is the file, for messages; `rows(first, end)` gives layers [R, K, D] and the last state [R, D], or None
    where there is none; valid until the next sample is opened.
    """

    where: str
    ids_T: np.ndarray
    mask_T: np.ndarray
    dtype: torch.dtype
    has_last: bool
    rows: Callable[[int, int], tuple[Tensor, Tensor | None]]


def mapped_sample(
    where: str, ids_T: np.ndarray, mask_T: np.ndarray, layers_TKD: Tensor, last_TD: Tensor | None
) -> ForeignSample:
    """Return the sample of a file whose states are memory-mapped. DataError where shapes or types disagree."""
    T, dtype = len(ids_T), layers_TKD.dtype
    for name, array in (("loss mask", mask_T), ("layers", layers_TKD), ("last state", last_TD)):
        if array is not None and len(array) != T:
            raise bad_file(where, f"has {T} tokens, and {len(array)} rows in its {name}")
    if last_TD is not None and (last_TD.dtype != dtype or last_TD.shape[1] != layers_TKD.shape[2]):
        raise bad_file(where, f"its last state is {last_TD.dtype} {list(last_TD.shape)}, its layers {dtype}")

    def rows(first: int, end: int) -> tuple[Tensor, Tensor | None]:
        return layers_TKD[first:end], None if last_TD is None else last_TD[first:end]

    return ForeignSample(where, ids_T, mask_T, dtype, last_TD is not None, rows)


@dataclass(frozen=True)
class PartialConvention:
    """What a form's files, or the command line, state of the layer convention; None where they do not."""

    layers: tuple[int, ...] | None = None  # in the source's numbering
    count_from: int | None = None  # the number of the first decoder layer's output: 0 or 1
    last: str | None = None  # "normed" or "raw"; on the command line also "none"


@dataclass(frozen=True)
class Convention:
    """`count_from`: the number of the first decoder layer's output, 0 or 1. `last`: "normed", "raw", or "none" kept."""

    count_from: int
    last: str


class Source(ABC):
    """A folder of another trainer's files, of one form; `width` is the hidden size D."""

    form: str
    folder: Path
    width: int
    stated: PartialConvention
    files: list[Path]
    locations: list[SampleLocation]

    @abstractmethod
    def open(self, file: str, line: int) -> ForeignSample:
        """Read one sample's tokens and mask; its states on demand. DataError for a damaged or hostile file."""

    def source_facts(self) -> dict:
        """Return this source's entry in the plan: its number of files, their bytes, a digest of names and sizes."""
        count, size, digest = digest_listing(self.folder, self.files)
        return {"file": self.folder.resolve().name, "form": self.form, "files": count, "size": size, "xxh3": digest}


@dataclass(frozen=True)
class ImportJob:
    """The source, and how to read it. `named_layers` are numbered as its trainer does, see `convention`."""

    source: Source
    named_layers: tuple[int, ...]
    convention: Convention
    dtype: torch.dtype  # of the states in the files

    @property
    def layers(self) -> list[int]:
        """The layers in this project's numbering, see `pipeline/target/layers.py`."""
        return [layer - self.convention.count_from for layer in self.named_layers]

    @property
    def columns(self) -> list[ColumnSpec]:
        """The columns of the cache to write, in order."""
        dtype, width = STORED_DTYPE[self.dtype], self.source.width
        aux = [ColumnSpec(aux_column(layer), dtype, width) for layer in self.layers]
        return aux + [ColumnSpec("final", dtype, width, keeps="needed")] * (self.convention.last != "none")

    def check(self, sample: ForeignSample) -> ForeignSample:
        """Return the sample. DataError for another dtype than the first sample's, or without its last state."""
        if sample.dtype != self.dtype or (self.convention.last != "none" and not sample.has_last):
            content = f"{sample.dtype} states, {'with' if sample.has_last else 'without'} the last one"
            raise bad_file(sample.where, f"has {content}, the first file {self.dtype}: they are not of one run")
        return sample

    def reopen(self, shard: ShardPlan, row: int) -> ForeignSample:
        """Open a planned sample. DataError where the file now holds another one."""
        sample, T = self.check(self.source.open(*location_of(shard, row))), shard.lengths[row]
        same = np.array_equal(sample.ids_T[:T], shard.ids(row)) and np.array_equal(sample.mask_T[:T], shard.mask(row))
        if not same:
            raise bad_file(sample.where, "holds other tokens than when it was planned")
        return sample

    def column_chunks(
        self, sample: ForeignSample, shard: ShardPlan, row: int, norm: Norm | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (column, states [R, D]) of a sample in chunks, each column's in order of rows."""
        final, dtype = stored_rows(shard, row, "needed"), getattr(torch, STORED_DTYPE[self.dtype])
        for first in range(0, int(shard.lengths[row]), CHUNK_ROWS):
            end = min(first + CHUNK_ROWS, int(shard.lengths[row]))
            layers_RKD, last_RD = sample.rows(first, end)
            for spec, states_RD in zip(self.columns, layers_RKD.unbind(1), strict=False):
                yield spec.name, states_RD.to(dtype)
            if self.convention.last != "none":
                inside = final[(final >= first) & (final < end)] - first
                kept_RD = last_RD[torch.from_numpy(inside)]
                yield "final", (norm(kept_RD) if self.convention.last == "raw" else kept_RD).to(dtype)


def location_of(shard: ShardPlan, row: int) -> SampleLocation:
    return shard.batch.column("source")[row].as_py(), shard.line(row)


def bad_file(where: Path | str, what: str) -> DataError:
    """Return the error for a damaged or unexpected file."""
    return DataError(f"{where}: {what}; {REMEDY}")


def load(path: Path) -> dict:
    """Memory-map the tensors of a file of torch.save; no code in it is ever run. DataError for anything else.

    `pipeline/pickles.py` checks it before torch opens it.
    """
    try:
        check_pickle(path, MAX_PICKLE)
    except RefusedPickle as refused:
        what = {
            "layout": f"not as torch.save writes: {refused}",
            "names": f"holds more than tensors (it names {refused}); nothing in it was run",
            "tensor": f"holds a tensor that is no plain tensor ({refused})",
            "damaged": f"cut short, or nothing that torch.save wrote ({refused})",
        }
        raise bad_file(path, what[refused.kind]) from refused
    except OSError as error:
        refuse_limit(path, error)
        raise bad_file(path, f"cannot be read ({error})") from error
    try:
        record = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        refuse_limit(path, error)
        cause = first_line(error, 120)
        raise bad_file(path, f"damaged ({cause})") from error
    if not isinstance(record, dict):
        raise bad_file(path, f"holds a {type(record).__name__}, wanted a dict of tensors")
    return record


def check_token_ids(ids: np.ndarray, where: str) -> np.ndarray:
    """Return token ids, integers [T], as int32. DataError for anything else."""
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise bad_file(where, f"its token ids are {ids.dtype} {list(ids.shape)}, wanted whole numbers [tokens]")
    if int(ids.min()) < 0 or int(ids.max()) > np.iinfo(np.int32).max:
        raise bad_file(where, f"holds the token ids {int(ids.min())} to {int(ids.max())}, which no vocabulary has")
    return ids.astype(np.int32)


def check_loss_mask(mask: np.ndarray, where: str) -> np.ndarray:
    """Return a loss mask as bool [T]. DataError for anything but zeros and ones."""
    if mask.ndim != 1 or mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise bad_file(where, f"its loss mask ({mask.dtype} {list(mask.shape)}) is not of zeros and ones [tokens]")
    return mask.astype(bool)


def check_plain(tensor: object, name: str, where: str, limit: int) -> Tensor:
    """Return a dense CPU tensor that claims no more than the `limit` bytes of its file. DataError for any other.

    A tensor may claim any shape over a few bytes (a stride of 0, no storage); copying it would exhaust the memory.
    """
    kind = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not kind or tensor.is_quantized:
        raise bad_file(where, f"its {name} is no plain tensor")
    claimed = tensor.numel() * tensor.element_size()
    if claimed > limit:
        raise bad_file(where, f"its {name} {list(tensor.shape)} claims {claimed:,} bytes, the file has {limit:,}")
    return tensor.detach()


def check_states(tensor: object, name: str, where: str, limit: int) -> Tensor:
    """Return a plain tensor of states. DataError for a dtype that is not supported."""
    checked = check_plain(tensor, name, where, limit)
    if checked.dtype not in STORED_DTYPE:
        kind = str(checked.dtype).removeprefix("torch.")
        raise DataError(
            f"{where}: its {name} is {kind}; only bfloat16, float16 and float32 are read (fp8 has lost 2.5 % already): "
            "capture again with `pipeline cache-hidden`"
        )
    return checked


def digest_listing(folder: Path, files: Iterable[Path]) -> tuple[int, int, str]:
    """Return the number of files, their bytes in total, and a digest of their names and sizes."""
    digest, count, size = xxhash.xxh3_128(), 0, 0
    for file in files:
        file_size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file_size}\n".encode())
        count, size = count + 1, size + file_size
    return count, size, digest.hexdigest()
