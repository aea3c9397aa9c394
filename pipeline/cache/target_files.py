"""The `target/` folder: what training needs of the target, so that it never needs the target.

config.json, the tokenizer's files, tokens.json (special ids, `length` of the tokenizer), head.safetensors (embedding
and LM head), weights.json (size and digest of every file of weights, for `verify --deep`). Written once, whole or not
at all; `manifest.json` names every file's size and digest.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from pipeline.cache.atomic import Scratch, commit_lock, read_errors, sync_file, sync_folder, write_errors
from pipeline.cache.catalog import Catalog
from pipeline.cache.layout import TARGET, TARGET_MANIFEST, path_inside
from pipeline.cache.manifest import FileFact, canonical, check_file, check_size, read_record
from pipeline.cache.schema import TargetManifest
from pipeline.errors import CacheError
from pipeline.json_files import MAX_BYTES, parse_json, read_file

CONFIG = "config.json"
TOKENS = "tokens.json"
HEAD = "head.safetensors"
WEIGHTS = "weights.json"


@contextlib.contextmanager
def new_target(catalog: Catalog) -> Iterator[Path]:
    """Yield an empty folder; the plain files put there become the cache's `target/` when the block ends well.

    If the cache has one already, that one stays; of one that lacks files, what is right stays. Raises RoomError.
    """
    cache = catalog.path
    with Scratch(cache, TARGET) as scratch, write_errors(cache, "the target's files"):
        folder = scratch.path / TARGET
        folder.mkdir()
        yield folder
        paths = sorted(folder.iterdir())
        assert all(path.is_file() and not path.is_symlink() for path in paths), f"not all plain files: {paths}"
        files = {path.name: FileFact.of_file(path) for path in paths}
        (folder / TARGET_MANIFEST).write_bytes(canonical(TargetManifest(cache=catalog.hash, files=files).as_dict()))
        for path in (*paths, folder / TARGET_MANIFEST):
            sync_file(path)
        sync_folder(folder)
        with commit_lock(cache):
            if has_target(catalog):
                return
            _put(folder, cache / TARGET, scratch.path / "old")
            sync_folder(cache)


def _put(folder: Path, place: Path, aside: Path) -> None:
    """Make `place` hold the files of `folder`, the manifest last. Those it has already, and others, are not touched."""
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        place.rename(aside)
    if not place.exists():
        try:
            folder.rename(place)
            return
        except OSError as error:  # another process was quicker: we had been stopped, and somebody removed our lock
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    for path in sorted(folder.iterdir(), key=lambda path: path.name == TARGET_MANIFEST):
        there = place / path.name
        if there.is_symlink() or not there.is_file() or FileFact.of_file(there) != FileFact.of_file(path):
            path.replace(there)
    sync_folder(place)


def has_target(catalog: Catalog) -> bool:
    """Whether `target/` is there, as far as its manifest and sizes tell."""
    try:
        for name, fact in target_manifest(catalog).files.items():
            check_size(path_inside(catalog.path / TARGET, name), fact)
    except CacheError:
        return False
    return True


def target_manifest(catalog: Catalog) -> TargetManifest:
    """The folder's manifest. CacheError when it is absent, damaged or of another cache."""
    path = catalog.path / TARGET / TARGET_MANIFEST
    manifest = read_record(path, TargetManifest)
    if manifest.cache != catalog.hash:
        raise CacheError(f"{path}: belongs to another cache; run `pipeline verify`")
    return manifest


def target_file(catalog: Catalog, name: str) -> Path:
    """The path of a file of the folder, its size and digest checked now. CacheError when it is absent or damaged."""
    files = target_manifest(catalog).files
    path = path_inside(catalog.path / TARGET, name)
    if name not in files:
        raise CacheError(f"{path}: not in the cache; run `pipeline cache-hidden` again with the same arguments")
    check_file(path, files[name])
    return path


def target_json(catalog: Catalog, name: str) -> dict:
    """What a JSON file of the folder holds, checked: a dict."""
    path = target_file(catalog, name)
    try:
        with read_errors(path):
            facts = parse_json(read_file(path, MAX_BYTES))
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise CacheError(f"{path}: damaged, it is no JSON object; run `pipeline verify`")
    return facts
