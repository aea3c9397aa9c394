"""JSON files: any, read with limits of size and depth, and our own records, which end with a checksum.

    {"step": 10, "loss": 2.5, "xxh3": "0123456789abcdef"}

A file may be of a stranger: a pipe or /dev/zero never ends, a file may be larger than memory, and JSON nested deeper
than Python can recurse. `read_file` and `parse_json` raise OSError and ValueError; callers say what to do.

The checksum is the xxh3-64 of the bytes before its comma; in a log of lines, of the previous line's checksum and those
bytes, so that a missing line shows too. Any JSON or JSON Lines reader reads them. Records of versions up to 0.5.0 have
no checksum and are accepted without.
"""

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, WrapValidator

from pipeline.errors import CacheError, PipelineError, cause_of, read_error

MAX_BYTES = 64 << 20
MAX_DEPTH = 64  # levels of JSON; ours has 8
_TOO_DEEP = f"JSON nested deeper than {MAX_DEPTH} levels"
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def refuse_constant(name: str):
    """Refuse NaN and Infinity, which Python's JSON reads and writes: `parse_constant` of a decoder. ValueError."""
    raise ValueError(f"{name} is no number of JSON; write null")


_DECODER, _STRICT = json.JSONDecoder(), json.JSONDecoder(parse_constant=refuse_constant)


def read_file(path: Path | str, max_bytes: int) -> bytes:
    """Return the bytes of a regular file. Raises the system's OSError; ValueError for another kind of file, or for more
    than `max_bytes`."""
    check_regular(path)  # before opening: to open a device may have effects
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:  # by descriptor: of small files a file object takes twice as long
        size = os.fstat(file).st_size
        data = b"" if size > max_bytes else os.read(file, (size or max_bytes) + 1)  # a file of /proc has size 0
        while len(data) < size <= max_bytes and (more := os.read(file, size - len(data))):
            data += more
    finally:
        os.close(file)
    if max(size, len(data)) > max_bytes:
        raise ValueError(f"it has {max(size, len(data)):,} bytes, and at most {max_bytes:,} are read of such a file")
    return data


def check_regular(path: Path | str) -> int:
    """Return the size in bytes of a regular file, following links. OSError; ValueError for another kind of file."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a device')} and no file")
    return status.st_size


def parse_json(text: bytes | str, decoder: json.JSONDecoder = _DECODER):
    """Parse JSON in UTF-8. ValueError, with a message of one line, for bad JSON and for more than MAX_DEPTH levels."""
    try:
        value = decoder.decode(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    nodes = [value]
    for _ in range(MAX_DEPTH + 1):
        nodes = [node for node in nodes if isinstance(node, dict | list)]
        if not nodes:
            return value
        nodes = [child for node in nodes for child in (node.values() if isinstance(node, dict) else node)]
    raise ValueError(_TOO_DEEP)


def parse_strict_json(text: bytes | str):
    """As `parse_json`, for files we write: refuses NaN and Infinity, which Python's JSON and some configs allow."""
    return parse_json(text, _STRICT)


_TAIL = re.compile(rb',\n? ?"xxh3": "([0-9a-f]{16})"\n?}\n?\Z')
# Matches what is left of that tail after any one bit of it was flipped.
_TAIL_REMAINS = re.compile(rb'xxh3|"[0-9a-f]{16}"\n?}\n?\Z')
_MAX_TAIL = 40

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Counts = Annotated[list[Count], FailFast()]
Numbers = Annotated[list[Number], FailFast()]


def _validate_one_by_one(values: object, validate: Callable[[object], dict]) -> dict:
    if not isinstance(values, dict):
        return validate(values)
    return {name: entry for item in values.items() for name, entry in validate(dict([item])).items()}


FailFastDict = WrapValidator(_validate_one_by_one)  # what FailFast is for lists: a million wrong entries are one error


class Record(BaseModel):
    """A typed record: its fields are the JSON's keys, in the order they are written. Keys of later versions are
    ignored; fields that have a default are absent from records of earlier ones."""

    model_config = ConfigDict(strict=True, frozen=True)

    def as_dict(self) -> dict:
        """Return the record as JSON values, without what was never set."""
        return self.model_dump(exclude_unset=True)


Kind = TypeVar("Kind", bound=Record)


def with_checksum(text: str, before: str = "") -> bytes:
    """Return an object's JSON text with its checksum and a line end. `before`: the previous line's checksum."""
    assert text.endswith("}") and text != "{}", f"no JSON object with anything in it: {text[-20:]}"
    end, gap = ("\n}", "\n ") if text.endswith("\n}") else ("}", " ")
    body = text.removesuffix(end)
    return f'{body},{gap}"xxh3": "{_checksum(body.encode(), before)}"{end}\n'.encode()


def parse_checksummed(data: bytes, before: str = "") -> tuple[dict, str]:
    """Return the object without its checksum, and the checksum, "" where there is none. ValueError for damage."""
    tail = _TAIL.search(data, max(0, len(data) - _MAX_TAIL))
    if tail and _checksum(data[: tail.start()], before) != tail[1].decode():
        raise ValueError("its checksum does not match")
    if not tail and ends_with_checksum(data):
        raise ValueError("its checksum is damaged")
    record = parse_strict_json(data)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    if not tail:
        return record, ""
    return {key: value for key, value in record.items() if key != "xxh3"}, tail[1].decode()


def parse_journal(data: bytes) -> tuple[list[tuple[bytes, dict, str]], str]:
    """Return the valid lines of a journal, each of which continues the checksum of the one before, as (bytes, record,
    checksum), and what is wrong with the line after them, "" for nothing; an incomplete one is wrong, too."""
    valid, last = [], ""
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        try:
            record, checksum = parse_checksummed(line, last)
            if not line.endswith(b"\n") or (last and not checksum):
                raise ValueError("no line of a journal")
        except ValueError as error:
            return valid, f"line {number}: {error}"
        valid.append((line, record, checksum))
        last = checksum
    return valid, ""


def ends_with_checksum(data: bytes) -> bool:
    """Return whether bytes end with a checksum, intact or damaged."""
    return _TAIL_REMAINS.search(data[-_MAX_TAIL:]) is not None


def _checksum(body: bytes, before: str) -> str:
    return xxhash.xxh3_64_hexdigest(before.encode() + body)


def record_bytes(facts: dict) -> bytes:
    """Return the bytes of a record's file."""
    return with_checksum(json.dumps(facts, indent=1, allow_nan=False))


def read_record(path: Path, kind: type[Kind], remedy: str, max_bytes: int = MAX_BYTES) -> Kind:
    """Read a record of a kind. CacheError, ending with the remedy, for damage."""
    try:
        record, _ = parse_checksummed(read_file(path, max_bytes))
        return kind.model_validate(record)
    except ValidationError:
        raise CacheError(f"{path}: damaged, or another file than its name says; {remedy}") from None
    except (OSError, ValueError) as error:
        raise damage_error(path, error, remedy) from None


def damage_error(path: Path, error: Exception, remedy: str) -> PipelineError:
    """Return the error to raise for an unreadable file of a run: limits and permissions are no damage."""
    known = read_error(path, error) if isinstance(error, OSError) else None
    if known is not None and not isinstance(known, CacheError):
        return known
    return CacheError(f"{path}: damaged ({cause_of(error)}); {remedy}")
