"""Manifests: small canonical JSON files, each ending with its own hash.

Sorted keys, one-space indent, no NaN, and nothing that changes from run to run (no times, paths, hosts). The hash is
blake2b-128 of the file as it would be without its hash line, so every flipped bit shows. Larger files are named in a
manifest by size and xxh3-128.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Strict, ValidationError

from pipeline.cache.atomic import read_errors, write_file
from pipeline.cache.layout import FORMAT, FORMATS, IDENTITY, OLDER_FORMATS
from pipeline.errors import UPGRADE, CacheError, VersionError, read_error
from pipeline.json_files import MAX_BYTES, MAX_DEPTH, Count, check_regular, parse_strict_json, read_file

Model = TypeVar("Model", bound=BaseModel)

PIECE = 4 << 20
MAX_FAULTS = 100  # of a record that may be of a later version; one with more is damaged
NAMED = 80  # characters of a strange name that a message repeats

_FORMAT = re.compile(rb'(\n "format": )"[^"\n]*"')
_TAIL = re.compile(rb',\n "hash": "([0-9a-f]{32})"\n}\n\Z')


def canonical(facts: dict, version: str = FORMAT) -> bytes:
    """The bytes of a manifest holding `facts`, with the format version (unless stated) and its own hash added."""
    assert "hash" not in facts, "the hash is computed, not given"
    text = json.dumps({"format": version, **facts}, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    body = text.removesuffix("\n}").encode()
    return body + b',\n "hash": "' + _own_hash(body).encode() + b'"\n}\n'


def _ends_with_own_hash(data: bytes) -> bool:
    tail = _TAIL.search(data)
    return tail is not None and tail[1].decode() == _own_hash(data[: tail.start()])


def _own_hash(body: bytes) -> str:
    return hashlib.blake2b(body + b"\n}", digest_size=16).hexdigest()


def write_canonical(path: Path, facts: dict, version: str = FORMAT) -> None:
    """Write `facts` as a manifest, atomically."""
    write_file(path, canonical(facts, version))


def format_of(cache: Path) -> str:
    """The format version of the cache at this path, which all of its manifests have: that of its cache.json.

    FORMAT where there is none yet. Raises what `read_canonical` raises.
    """
    path = cache / IDENTITY
    return read_canonical(path)["format"] if path.exists() else FORMAT


def read_record(path: Path | str, model: type[Model]) -> Model:
    """Read a manifest as the record it must be.

    Raises what `read_canonical` raises, CacheError for any other record, and VersionError for one that is right but for
    a key or value of a later version where those may not be passed over.
    """
    return parse_record(_read_manifest(path), path, model)


def parse_record(data: bytes, path: Path | str, model: type[Model]) -> Model:
    """What `read_record` returns, from the file's bytes; `path` is for messages.

    Parsed and validated in one step where nothing is unusual; else `parse_canonical` says what is wrong.
    """
    try:
        record = model.model_validate_json(data)
    except ValidationError as error:
        record, invalid = None, error
    plain = b"\\u" not in data and data.count(b"{") + data.count(b"[") < MAX_DEPTH
    if record is None or not plain or not _ends_with_own_hash(data):
        parse_canonical(data, path)
        if record is None:
            _refuse_later(invalid, path)
            raise CacheError(f"{path}: the manifest of something else; run `pipeline verify`")
    return record


def _refuse_later(invalid: ValidationError, path: Path | str) -> None:
    """Raise VersionError where nothing is wrong with a record but keys or choices that this version does not know."""
    faults = invalid.errors(include_url=False) if invalid.error_count() <= MAX_FAULTS else []
    added = [fault for fault in faults if fault["type"] == "unexpected_keyword_argument"]
    chosen = [fault for fault in faults if fault["type"] == "literal_error" and isinstance(fault["input"], str)]
    if not faults or len(added) + len(chosen) < len(faults):
        return
    fault = faults[0]
    name = ".".join(map(str, fault["loc"]))[:NAMED]
    what = f"the field {name!r}" if fault in added else f"{name} {fault['input'][:NAMED]!r}"
    raise VersionError(f"{path}: {what} is unknown to this version; {UPGRADE}")


def read_canonical(path: Path) -> dict:
    """Read a manifest written by `write_canonical`, its hash under `hash`.

    Raises VersionError for another format version, CacheError for a missing or oversized file and any damage.
    """
    return parse_canonical(_read_manifest(path), path)


def _read_manifest(path: Path | str) -> bytes:
    try:
        return read_file(path, MAX_BYTES)
    except OSError as error:
        raise read_error(path, error) from error
    except ValueError as error:
        raise CacheError(f"{path}: damaged, {error}; run `pipeline verify`") from None


def parse_canonical(data: bytes, path: Path | str) -> dict:
    """What `read_canonical` returns, from the file's bytes; `path` is for messages."""
    try:
        facts = parse_strict_json(data)
        named = {k: v for k, v in facts.items() if k != "hash"} if isinstance(facts, dict) else {}
        # Half a surrogate pair can only be escaped, and of escapes we write few: then all of it is compared, slowly.
        whole = _ends_with_own_hash(data) and (b"\\u" not in data or data == canonical(named))
    except ValueError:
        raise CacheError(f"{path}: damaged, it is no JSON any more; run `pipeline verify`") from None
    found = named.get("format")
    if isinstance(found, str) and found not in FORMATS and (whole or not _is_damaged_format(data)):
        raise VersionError(_other_format(found, path))
    if not whole:
        raise CacheError(f"{path}: damaged, its own hash does not match; run `pipeline verify`")
    return facts


def _is_damaged_format(data: bytes) -> bool:
    """Whether a manifest's hash matches once its format version is one that is read: then it was that one."""
    return any(_ends_with_own_hash(_FORMAT.sub(b'\\1"%s"' % known.encode(), data)) for known in FORMATS)


def _other_format(found: str, path: Path | str) -> str:
    """The error message for a format version that is not read."""
    known = " and ".join(map(repr, FORMATS))
    if found in OLDER_FORMATS:
        return (
            f"{path}: format version {found!r}, older than those this version reads, {known}; use the program that "
            "wrote it, or make the cache again"
        )
    return f"{path}: format version {found[:NAMED]!r} is unknown to this version, which reads {known}; {UPGRADE}"


@dataclass(frozen=True, slots=True)
class FileFact:
    """What a JSON file says of another file: its size in bytes and its xxh3-128, in hex."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    size: Annotated[Count, Strict()]
    xxh3: Annotated[str, Strict()]

    def as_dict(self) -> dict:
        return {"size": self.size, "xxh3": self.xxh3}

    @staticmethod
    def of_bytes(data: bytes) -> "FileFact":
        return FileFact(len(data), xxhash.xxh3_128_hexdigest(data))

    @staticmethod
    def of_file(path: Path) -> "FileFact":
        """Read the whole file, a piece at a time."""
        digest, size = xxhash.xxh3_128(), 0
        with read_errors(path), open(path, "rb", buffering=0) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                size += len(piece)
        return FileFact(size, digest.hexdigest())


def file_size(path: Path | str) -> int:
    """The size of a file. CacheError when it is missing or no plain file: reading a pipe might never end."""
    try:
        return check_regular(path)
    except OSError as error:
        raise read_error(Path(path), error) from error
    except ValueError as error:
        raise CacheError(f"{path}: missing, {error}; run `pipeline verify`") from None


def check_size(path: Path | str, fact: FileFact) -> None:
    """Refuse a file whose size is not the manifest's, before a byte of it is read or anything allocated for it."""
    size = file_size(path)
    if size != fact.size:
        raise CacheError(f"{path}: {size} bytes, its manifest says {fact.size}; run `pipeline verify`")


def check_file(path: Path, fact: FileFact) -> None:
    """Refuse a file whose size or digest is not the manifest's."""
    check_size(path, fact)
    if FileFact.of_file(path) != fact:
        raise CacheError(f"{path}: damaged, its digest is not its manifest's; run `pipeline verify`")
