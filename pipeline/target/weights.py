"""The files of a target's weights: which are loaded, their digest, and whether a cache was captured with them.

A target's digest, in a cache's identity, distinguishes targets. Reading 16 GB for it would take minutes, so it covers
the config, and of each safetensors file the header, the size, the first and the last MiB. A cache's
`target/weights.json` has the size and xxh3-128 of every file; every command that computes for a cache compares them
first. That costs little, since loading the weights then reads the same bytes from the page cache. Imports no torch.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from pipeline.cache.catalog import Catalog, has_target, target_file, target_json, target_manifest
from pipeline.cache.layout import WEIGHTS
from pipeline.cache.manifest import FileFact
from pipeline.cache.schema import TargetName, WeightsRecord
from pipeline.errors import CacheError, UsageError, refuse_limit
from pipeline.target.files import CONFIG, WEIGHTS_INDEX, check_config, quantisation, read_json, target_name

SINGLE_FILE = "model.safetensors"  # where an index names no others
PLAIN_WEIGHTS = re.compile(r"[\w.\-][\w.\- ]*\.safetensors")  # no path, which could lead to files that are not digested
ADAPTER = "adapter_config.json"
MIB = 1 << 20
READERS = 4  # files digested at once; a large target has several


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads from this folder, sorted by name.

    So the digest covers what is loaded. UsageError where a file is absent, and where it is ambiguous which ones are
    loaded: two sets of weights, an index that leads out of the folder, an adapter beside them.
    """
    check_config(folder)
    if (folder / ADAPTER).exists():
        raise UsageError(
            f"{folder} holds an adapter beside the weights ({ADAPTER}), and only some loaders add it to them; merge it "
            "into the weights (`merge_and_unload` of PEFT) and save those, or move the adapter away"
        )
    single, index = folder / SINGLE_FILE, folder / WEIGHTS_INDEX
    names = _files_in_index(index) if index.is_file() else [SINGLE_FILE]
    if single.is_file() and names != [SINGLE_FILE]:
        raise UsageError(
            f"{folder} holds two sets of weights, {SINGLE_FILE} and what {WEIGHTS_INDEX} names; move away the one that "
            "is not the target's"
        )
    files = [folder / name for name in names]
    missing_files = [path.name for path in files if not path.is_file()]
    if missing_files or not files:
        raise UsageError(
            f"{folder} lacks {', '.join(missing_files) or 'weights'}; only safetensors weights are read, "
            "fetch them or save the model with `save_pretrained`"
        )
    return files


def _files_in_index(index: Path) -> list[str]:
    """Return the names of the files in an index, sorted. UsageError where one is no safetensors file of its folder."""
    found = read_json(index).get("weight_map")
    names = [*found.values()] if isinstance(found, dict) else [None]
    bad = [name for name in names if not (isinstance(name, str) and PLAIN_WEIGHTS.fullmatch(name))]
    if bad:
        raise UsageError(
            f"{index} names {str(bad[0])[:80]!r}, wanted safetensors files beside it; fetch the target's files again"
        )
    return sorted(set(names))


def safetensors_header(path: Path) -> bytes:
    """Return a safetensors file's header. UsageError when the file is cut short or none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= size - 8 else b""
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged or no safetensors file; fetch it again") from error
    wanted = 8 + length + max(ends, default=0)
    if wanted != size:
        raise UsageError(f"{path} is damaged: {size} bytes where its header promises {wanted}; fetch it again")
    return header


def weight_shapes(path: Path) -> list[list[int]]:
    tensors = json.loads(safetensors_header(path))
    return [entry["shape"] for name, entry in tensors.items() if name != "__metadata__"]


def target_digest(folder: Path) -> str:
    """Return the target's digest: config, and of each weight file header, size, first and last MiB. 32 hex digits."""
    digest = hashlib.blake2b((folder / CONFIG).read_bytes(), digest_size=16)
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        digest.update(safetensors_header(path))
        with path.open("rb") as file:
            digest.update(file.read(MIB))
            file.seek(max(0, size - MIB))
            digest.update(file.read(MIB))
    return digest.hexdigest()


def named_target(model: str, folder: Path, cached: TargetName) -> dict:
    """Return name, revision, digest, and how it is quantised, if so.

    As the cache has it where the digest is equal: a folder that was only moved keeps its name.
    """
    digest = target_digest(folder)
    if cached.digest == digest:
        return cached.as_dict()
    revision = folder.name if folder.parent.name == "snapshots" else ""
    found = {"name": target_name(model), "revision": revision, "digest": digest}
    stated = quantisation(folder)
    return found | {"quantisation": stated} if stated else found


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
