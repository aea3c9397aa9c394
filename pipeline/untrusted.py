"""Files that anyone may have written: only regular ones are read, up to a size, and JSON up to a depth.

A pipe never ends, nor does /dev/zero; a file may be larger than memory, and JSON nested deeper than Python follows it.
Whoever reads catches OSError and ValueError and says what to do.
"""

import json
import os
import stat
from pathlib import Path

DEEPEST = 64  # levels of JSON; ours has 8
_DEEP = f"JSON nested deeper than {DEEPEST} levels"
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON")


_DECODER, _STRICT = json.JSONDecoder(), json.JSONDecoder(parse_constant=_no_number)


def read_file(path: Path, most: int) -> bytes:
    """Return the bytes of a regular file. OSError as the system says it; ValueError for one of another kind, or of more
    than `most` bytes."""
    check_regular(path)  # before it is opened: a device may do something then
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > most else file.readall() if size else file.read(most + 1)  # size 0: of /proc, say
    if max(size, len(data)) > most:
        raise ValueError(f"it has {max(size, len(data)):,} bytes, and at most {most:,} are read of such a file")
    return data


def check_regular(path: Path) -> int:
    """Return the size of a regular file, or of what a link leads to. OSError; ValueError for what is no such file."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'a device')} and no file")
    return found.st_size


def parse_json(text: bytes | str, decoder: json.JSONDecoder = _DECODER):
    """Return what JSON in UTF-8 says. ValueError, in one line, for anything else and for more than DEEPEST levels."""
    try:
        found = decoder.decode(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(_DEEP) from None
    if deeper(found):
        raise ValueError(_DEEP)
    return found


def parse_strict_json(text: bytes | str):
    """The same of files that we write: NaN and Infinity, which Python's JSON has and which configs hold, are none."""
    return parse_json(text, _STRICT)


def deeper(value, levels: int = DEEPEST) -> bool:
    """Whether a value of JSON is nested deeper than that many levels."""
    nodes = [value]
    for _ in range(levels):
        nodes = [child for node in nodes if isinstance(node, dict | list) for child in _children(node)]
        if not nodes:
            return False
    return any(isinstance(node, dict | list) for node in nodes)


def _children(node: dict | list):
    return node.values() if isinstance(node, dict) else node
