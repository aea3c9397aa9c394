"""Whether a process of this machine holds the lock on a file, asked of the system: no lock is taken, not even for a
moment, in which its real owner would fail to get it."""

import os
from pathlib import Path

LOCKS = Path("/proc/locks")


def is_held(path: Path, table: Path = LOCKS) -> bool | None:
    """Return whether a lock is held, as far as this machine knows; None where it does not say (no Linux)."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return None
    try:
        found = os.stat(path)
    except OSError:
        return False
    return any(_names(line.split(), found) for line in lines)


def _names(words: list[str], found: os.stat_result) -> bool:
    """Return whether a line such as `1: FLOCK ADVISORY WRITE 2302 08:01:131 0 EOF` is of a file. A waiting one has
    `->` behind its number. Disks without a device of their own (overlays, network disks) have number 0 there, and
    another one in the file's status."""
    if len(words) < 6 or "->" in words or "WRITE" not in words:
        return False
    major, _, rest = words[5].partition(":")
    minor, _, inode = rest.partition(":")
    if inode != str(found.st_ino):
        return False
    device = int(major, 16), int(minor, 16)
    return device == (os.major(found.st_dev), os.minor(found.st_dev)) or device[0] == 0
