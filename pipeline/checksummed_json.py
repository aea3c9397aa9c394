"""Checksummed JSON records: objects whose last key is a checksum, alone in a file or one a line.

    {"step": 10, "loss": 2.5, "xxh3": "0123456789abcdef"}

The checksum is the xxh3-64 of the bytes before its comma; in a log of lines, of the previous line's checksum and those
bytes, so that a missing line shows too. Any JSON or JSON Lines reader reads them. Records of versions up to 0.5.0 have
no checksum and are accepted without.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, WrapValidator

from pipeline.cache.atomic import read_error
from pipeline.errors import CacheError, PipelineError, cause_of
from pipeline.untrusted import parse_strict_json, read_file

MAX_BYTES = 64 << 20
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


class FileRecord(Record):
    """What a record says of another file: its size in bytes and its xxh3-128, in hex."""

    size: Count
    xxh3: str


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
        raise CacheError(f"{path}: damaged, or no record of a run; {remedy}") from None
    except (OSError, ValueError) as error:
        raise damage_error(path, error, remedy) from None


def damage_error(path: Path, error: Exception, remedy: str) -> PipelineError:
    """Return the error to raise for an unreadable file of a run: limits and permissions are no damage."""
    known = read_error(path, error) if isinstance(error, OSError) else None
    if known is not None and not isinstance(known, CacheError):
        return known
    return CacheError(f"{path}: damaged ({cause_of(error)}); {remedy}")
