"""Compares every byte of the target's weights with those that a cache was captured with. Imports no torch.

The digest in a cache's identity distinguishes targets, but skips the middle of the files. `target/weights.json` has
each file's size and xxh3-128; every command that computes for a cache compares them first. That costs little, since
loading the weights then reads the same bytes from the page cache.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from pipeline.cache.catalog import Catalog
from pipeline.cache.manifest import FileFact
from pipeline.cache.records import WeightsRecord
from pipeline.cache.target_files import WEIGHTS, has_target, target_file, target_json, target_manifest
from pipeline.errors import CacheError, UsageError
from pipeline.os_errors import refuse_limit
from pipeline.target.files import CONFIG, weight_files

READERS = 4  # files digested at once; a large target has several


def weight_facts(folder: Path) -> dict[str, dict]:
    """Read every byte of the target's weights; return size and xxh3-128 of each file, by name.

    UsageError where a file cannot be read, or `weight_files` refuses the folder.
    """
    files = weight_files(folder)
    try:
        stats = [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]
        with ThreadPoolExecutor(min(READERS, len(files))) as pool:
            facts = list(pool.map(_fact, files, stats))
    except (CacheError, OSError) as error:  # a file of the target, not of a cache
        refuse_limit(folder, error)
        raise UsageError(f"{str(error).split('; ', 1)[0]}; fetch the target's files again") from error
    return {path.name: fact.as_dict() for path, fact in zip(files, facts, strict=True)}


@lru_cache(maxsize=1024)
def _fact(path: Path, stat: tuple) -> FileFact:
    """Return a file's size and checksum; read again only when `stat` (device, inode, size, mtime) has changed."""
    return FileFact.of_file(path)


def weights_digest(folder: Path) -> str:
    """Return a digest of the target's config and of every byte of its weights, 32 hex digits."""
    facts = json.dumps(weight_facts(folder), sort_keys=True).encode()
    return hashlib.blake2b((folder / CONFIG).read_bytes() + facts, digest_size=16).hexdigest()


def check_weights(catalog: Catalog, folder: Path) -> None:
    """Read every byte of the target's weights; raise UsageError when the cache was captured with others."""
    recorded = target_json(catalog, WEIGHTS)
    try:
        WeightsRecord.model_validate(recorded)
    except ValidationError:
        raise CacheError(f"{catalog.path}: {WEIGHTS} of its target lists no files; run `pipeline verify`") from None
    found = weight_facts(folder)
    for name in sorted({*recorded, *found}):
        if recorded.get(name) != found.get(name):
            raise UsageError(
                f"{folder / name} is not the file that {catalog.path} was captured with "
                f"({_difference(recorded, found, name)}); fetch the target again, or pass another --out "
                "for a cache of this one"
            )


def check_weights_if_recorded(catalog: Catalog, folder: Path) -> None:
    """Call `check_weights` if the cache has recorded the target's checksums; before a first capture it has not."""
    try:
        is_recorded = WEIGHTS in target_manifest(catalog).files and target_file(catalog, WEIGHTS).is_file()
    except CacheError:
        if has_target(catalog):
            raise
        return  # `target/` is lost, at least in part, and will be stored again
    if is_recorded:
        check_weights(catalog, folder)


def _difference(recorded: dict, found: dict, name: str) -> str:
    there, here = recorded.get(name), found.get(name)
    if there is None or here is None:
        return "the cache knows no such file" if there is None else "it is not among the target's weights"
    if there["size"] != here["size"]:
        return f"{here['size']} bytes where the cache's had {there['size']}"
    return f"xxh3 {here['xxh3']} where the cache's had {there['xxh3']}"
