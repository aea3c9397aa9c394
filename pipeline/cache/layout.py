"""The layout of a cache, which README.md shows: names of its files and folders, and paths that cannot lead outside."""

import errno
import os
import re
import shlex
import stat
from functools import lru_cache
from pathlib import Path

from pipeline.errors import CacheError, UsageError, errno_of, is_present, refuse_limit

FORMAT = "1"  # of new caches
FORMATS = (FORMAT, "1-rc2")  # read; a cache keeps the one it was made in
OLDER_FORMATS = ("1-rc",)  # not read any more

IDENTITY = "cache.json"
PLAN = "plan"
INDEX = "index.arrow"
INDEX_MANIFEST = "index.json"
TARGET = "target"
TARGET_MANIFEST = "manifest.json"
CONFIG = "config.json"  # of the target, in its folder, as the next three
TOKENS = "tokens.json"  # special ids, and `length` of the tokenizer
HEAD = "head.safetensors"  # embedding and LM head
WEIGHTS = "weights.json"  # size and digest of every file of the weights, for `verify --deep`
CALIBRATION = "calibration"
SHARDS = "shards"
SAMPLES = "samples.arrow"
QUARANTINE = "quarantine"
REFUSED = "samples.json"
FOLDERS = (PLAN, TARGET, CALIBRATION, SHARDS, QUARANTINE)
LOG = "capture.log"
SCRATCH = "tmp-"
LONGEST_PATH = 1024  # characters of a path in a cache; those written here have fewer than a hundred
LONGEST_NAME = 255  # bytes of a file's name, on any disk

CHECKSUM_ROWS = 256  # rows of a sample that one checksum covers

FINAL = "final"
COLUMN = re.compile(r"aux\.(?:-1|0|[1-9][0-9]*)|final")
NUMBER = re.compile(r"[0-9]{6}")


def check_exists(cache: Path) -> None:
    """Raise UsageError unless a cache, or what is left of one, is at this path."""
    if not any(is_present(cache / name) for name in (IDENTITY, PLAN, SHARDS)):
        make = shlex.join(["pipeline", "cache-hidden", "--model", "TARGET", "--out", str(cache)])
        raise UsageError(f"{cache}: no cache there; make one with `{make}`")


def numbered(number: int) -> str:
    """The name of shard or segment `number`."""
    return f"{number:06d}"


@lru_cache(1024)  # called for every column that is opened
def shard_folder(cache: Path, shard: int) -> Path:
    return cache / SHARDS / numbered(shard)


def aux_column(layer: int) -> str:
    return f"aux.{layer}"


def column_of(layer: int | str) -> str:
    """The column of a layer, or of FINAL."""
    return FINAL if layer == FINAL else aux_column(layer)


def layer_of(column: str) -> int | None:
    """The layer an auxiliary column holds; None for `final`."""
    return int(column.removeprefix("aux.")) if column.startswith("aux.") else None


def path_inside(root: Path, relative: str) -> Path:
    """Resolve a manifest's `relative` path under `root`. CacheError when it, or a link in it, leads out of `root`."""
    return Path(checked_path(str(root), relative))


def checked_path(root: str, relative: str) -> str:
    """What `path_inside` returns, as text: quicker by far where there are many."""
    parts = relative.split("/")
    if "\0" in relative or not {"", ".", ".."}.isdisjoint(parts):
        raise CacheError(f"{root}: a manifest names {relative!r}; paths in a cache are relative and stay inside it")
    if len(relative) > LONGEST_PATH:
        raise CacheError(f"{root}: a manifest names {relative[:80]!r}, which no file can be called")
    path = f"{root}/{relative}"
    try:
        within = not _has_link(root, parts) or Path(path).resolve().is_relative_to(Path(root).resolve())
    except (OSError, RuntimeError) as error:  # too long a name; links in a circle
        ours = isinstance(error, RuntimeError) or errno_of(error) == errno.ELOOP
        if not ours and max(len(os.fsencode(part)) for part in parts) <= LONGEST_NAME:
            refuse_limit(Path(path), error)
        raise CacheError(f"{root}: a manifest names {relative[:80]!r}, which no file can be called") from error
    if not within:
        raise CacheError(f"{path}: a link that leads out of the cache; replace it by the file it points to")
    return path


def _has_link(root: str, parts: list[str]) -> bool:
    """Whether a part of the path from `root` to a file below it is a symbolic link."""
    place = root
    for part in parts:
        place = f"{place}/{part}"
        try:
            if stat.S_ISLNK(os.lstat(place).st_mode):
                return True
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # whoever opens it says so
            return False
    return False
