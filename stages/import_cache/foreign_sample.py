"""A sample of another trainer's cache, and what the files of every form are held to before a state is read.

Nothing of such a file is believed: it may be cut short, of another kind, or made to harm. Sizes are compared with the
file's own before anything is allocated, and states are mapped, so that only what is looked at is read.

    T tokens   K layers   D hidden size
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from pipeline.errors import DataError

STORED = {torch.bfloat16: "bfloat16", torch.float16: "float32", torch.float32: "float32"}  # exact in either
REMEDY = "make that file again, or move it out of the folder and import into a fresh --out"

Place = tuple[str, int]  # file, relative to the source, and line from 1


@dataclass(frozen=True)
class Foreign:
    """One sample as its file holds it: ids int32 [T], mask bool [T], and its states, which are read when asked for.

    `where` is the file, for messages; `rows(first, end)` gives layers [R, K, D] and the last state [R, D], or None
    where there is none, good until the next sample is opened.
    """

    where: str
    ids_T: np.ndarray
    mask_T: np.ndarray
    dtype: torch.dtype
    has_last: bool
    rows: Callable[[int, int], tuple[Tensor, Tensor | None]]


def mapped(where: str, ids_T: np.ndarray, mask_T: np.ndarray, layers_TKD: Tensor, last_TD: Tensor | None) -> Foreign:
    """Return the sample of a file whose states are mapped. DataError where shapes or types disagree."""
    T, dtype = len(ids_T), layers_TKD.dtype
    for name, held in (("loss mask", mask_T), ("layers", layers_TKD), ("last state", last_TD)):
        if held is not None and len(held) != T:
            raise broken(where, f"has {T} tokens, and {len(held)} rows in its {name}")
    if last_TD is not None and (last_TD.dtype != dtype or last_TD.shape[1] != layers_TKD.shape[2]):
        raise broken(where, f"its last state is {last_TD.dtype} {list(last_TD.shape)}, its layers {dtype}")

    def rows(first: int, end: int) -> tuple[Tensor, Tensor | None]:
        return layers_TKD[first:end], None if last_TD is None else last_TD[first:end]

    return Foreign(where, ids_T, mask_T, dtype, last_TD is not None, rows)


@dataclass(frozen=True)
class Stated:
    """What a form says of itself; None where its files leave it open."""

    layers: tuple[int, ...] | None = None  # in the counting of whoever made it
    count_from: int | None = None  # what the first decoder layer's output is called: 0 or 1
    last: str | None = None  # "normed" or "raw"


def broken(where: Path | str, what: str) -> DataError:
    """What to say of a file that is not what it should be."""
    return DataError(f"{where}: {what}; {REMEDY}")


def tokens(ids: np.ndarray, where: str) -> np.ndarray:
    """Return token ids, whole numbers [T], as int32. DataError for what are none."""
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise broken(where, f"its token ids are {ids.dtype} {list(ids.shape)}, wanted whole numbers [tokens]")
    if int(ids.min()) < 0 or int(ids.max()) > np.iinfo(np.int32).max:
        raise broken(where, f"holds the token ids {int(ids.min())} to {int(ids.max())}, which no vocabulary has")
    return ids.astype(np.int32)


def loss_mask(mask: np.ndarray, where: str) -> np.ndarray:
    """Return a loss mask as bool [T]. DataError for anything but zeros and ones."""
    if mask.ndim != 1 or mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise broken(where, f"its loss mask ({mask.dtype} {list(mask.shape)}) is not of zeros and ones [tokens]")
    return mask.astype(bool)


def plain(tensor: object, name: str, where: str, limit: int) -> Tensor:
    """Return a tensor of memory that is there: dense, on the CPU, no larger than the `limit` bytes of its file.

    A tensor may claim any shape over a few bytes (a stride of 0, or no memory at all); copying it would fill a machine.
    """
    kind = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not kind or tensor.is_quantized:
        raise broken(where, f"its {name} is no plain tensor")
    claimed = tensor.numel() * tensor.element_size()
    if claimed > limit:
        raise broken(where, f"its {name} {list(tensor.shape)} claims {claimed:,} bytes, the file has {limit:,}")
    return tensor.detach()


def states(tensor: object, name: str, where: str, limit: int) -> Tensor:
    """Return a plain tensor of states. DataError for a type that is not read."""
    held = plain(tensor, name, where, limit)
    if held.dtype not in STORED:
        kind = str(held.dtype).removeprefix("torch.")
        raise DataError(
            f"{where}: its {name} is {kind}; only bfloat16, float16 and float32 are read (fp8 has lost 2.5 % already): "
            "capture again with `pipeline cache-hidden`"
        )
    return held


def listing(folder: Path, form: str, files: Iterable[Path]) -> dict:
    """Return what a plan says of its source: how many files, their bytes, and a digest of their names and sizes."""
    digest, count, size = xxhash.xxh3_128(), 0, 0
    for file in files:
        held = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}\0{held}\n".encode())
        count, size = count + 1, size + held
    return {"file": folder.resolve().name, "form": form, "files": count, "size": size, "xxh3": digest.hexdigest()}
