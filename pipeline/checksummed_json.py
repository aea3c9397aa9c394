"""Records: JSON objects that end with a checksum of themselves, alone in a file or one a line.

    {"step": 10, "loss": 2.5, "xxh3": "0123456789abcdef"}

The last key is the xxh3-64 of the bytes before its comma; in a journal it is of the line before's checksum and those,
so that a missing line shows, too. Every reader of JSON or of JSON lines reads them. What versions up to 0.5.0 wrote has
no checksum, and is taken as it stands.
"""

import json
import re
from pathlib import Path

import xxhash

from pipeline.cache.atomic import read_error
from pipeline.cache.manifest import has_form
from pipeline.errors import CacheError, PipelineError
from pipeline.untrusted import parse_strict_json, read_file

MOST_BYTES = 64 << 20
_TAIL = re.compile(rb',\n? ?"xxh3": "([0-9a-f]{16})"\n?}\n?\Z')
# What is left of that tail where one bit of it, anywhere, is another.
_SCARRED = re.compile(rb'xxh3|"[0-9a-f]{16}"\n?}\n?\Z')
_LONGEST_TAIL = 40


def sealed(text: str, before: str = "") -> bytes:
    """Return an object's JSON text with its checksum added, and a line end. `before`: the line before's checksum."""
    assert text.endswith("}") and text != "{}", f"no JSON object with anything in it: {text[-20:]}"
    end, gap = ("\n}", "\n ") if text.endswith("\n}") else ("}", " ")
    body = text.removesuffix(end)
    return f'{body},{gap}"xxh3": "{_checksum(body.encode(), before)}"{end}\n'.encode()


def unsealed(data: bytes, before: str = "") -> tuple[dict, str]:
    """Return the object, without its checksum, and that: "" where there is none. ValueError for damage."""
    tail = _TAIL.search(data, max(0, len(data) - _LONGEST_TAIL))
    if tail and _checksum(data[: tail.start()], before) != tail[1].decode():
        raise ValueError("its checksum does not match")
    if not tail and scarred(data):
        raise ValueError("its checksum is damaged")
    record = parse_strict_json(data)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    if not tail:
        return record, ""
    return {key: value for key, value in record.items() if key != "xxh3"}, tail[1].decode()


def scarred(data: bytes) -> bool:
    """Whether bytes end with a checksum, or with what damage has left of one."""
    return _SCARRED.search(data[-_LONGEST_TAIL:]) is not None


def _checksum(body: bytes, before: str) -> str:
    return xxhash.xxh3_64_hexdigest(before.encode() + body)


def as_record(facts: dict) -> bytes:
    """Return what a file of a record holds."""
    return sealed(json.dumps(facts, indent=1, allow_nan=False))


def read_record(path: Path, form: dict, remedy: str, most: int = MOST_BYTES) -> dict:
    """Return the record in a file, of a form (see `has_form`). CacheError, ending with the remedy, for damage."""
    try:
        record, _ = unsealed(read_file(path, most))
    except (OSError, ValueError) as error:
        raise damaged(path, error, remedy) from None
    if not has_form(record, form):
        raise CacheError(f"{path}: damaged, or no record of a run; {remedy}")
    return record


def damaged(path: Path, error: Exception, remedy: str) -> PipelineError:
    """Return what to raise for a file of a run that cannot be read: limits and missing rights are no damage."""
    found = read_error(path, error) if isinstance(error, OSError) else None
    if found is not None and not isinstance(found, CacheError):
        return found
    said = error.strerror if isinstance(error, OSError) and error.strerror else error
    return CacheError(f"{path}: damaged ({said}); {remedy}")
