"""Read untrusted files: only regular ones, up to a maximum size, and JSON up to a maximum depth.

A pipe or /dev/zero never ends, a file may be larger than memory, and JSON nested deeper than Python can recurse.
Callers catch OSError and ValueError and say what to do.
"""

import json
import os
import stat
from pathlib import Path

MAX_DEPTH = 64  # levels of JSON; ours has 8
_TOO_DEEP = f"JSON nested deeper than {MAX_DEPTH} levels"
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def refuse_constant(name: str):
    """Refuse NaN and Infinity, which Python's JSON reads and writes: `parse_constant` of a decoder. ValueError."""
    raise ValueError(f"{name} is no number of JSON; write null")


_DECODER, _STRICT = json.JSONDecoder(), json.JSONDecoder(parse_constant=refuse_constant)


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a regular file. Raises the system's OSError; ValueError for another kind of file, or for more
    than `max_bytes`."""
    check_regular(path)  # before opening: to open a device may have effects
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = (
            b"" if size > max_bytes else file.readall() if size else file.read(max_bytes + 1)
        )  # size 0: of /proc, say
    if max(size, len(data)) > max_bytes:
        raise ValueError(f"it has {max(size, len(data)):,} bytes, and at most {max_bytes:,} are read of such a file")
    return data


def check_regular(path: Path) -> int:
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
    if is_deeper(value):
        raise ValueError(_TOO_DEEP)
    return value


def parse_strict_json(text: bytes | str):
    """As `parse_json`, for files we write: refuses NaN and Infinity, which Python's JSON and some configs allow."""
    return parse_json(text, _STRICT)


def is_deeper(value, levels: int = MAX_DEPTH) -> bool:
    """Return whether a JSON value is nested deeper than `levels`."""
    nodes = [value]
    for _ in range(levels):
        nodes = [child for node in nodes if isinstance(node, dict | list) for child in _children(node)]
        if not nodes:
            return False
    return any(isinstance(node, dict | list) for node in nodes)


def _children(node: dict | list):
    return node.values() if isinstance(node, dict) else node
