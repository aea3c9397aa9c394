"""The machine: Python and packages, memory, processors, limits of processes."""

import contextlib
import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.cache.atomic import size_text
from stages.doctor.finding import NOTE, OK, PROBLEM, Finding

PACKAGE = "draft-pipeline"
LEAST_MEMORY = 2 << 30  # importing torch and transformers takes about 1 GiB of it
LEAST_FILES = 1024
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # what cgroups of version 1 say for no limit is above it


def python() -> Finding:
    """Python's version against what this program asks for."""
    wanted, version = _metadata().get("Requires-Python") or ">=3.11", platform.python_version()
    facts = {"version": version, "wanted": wanted, "executable": sys.executable}
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(
            "Python", PROBLEM, f"{version}, wanted {wanted}", remedy="make a venv by another Python", facts=facts
        )
    return Finding("Python", OK, f"{version} (wanted {wanted}), {sys.executable}", facts=facts)


def _metadata() -> dict:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return dict(metadata.metadata(PACKAGE).items())
    return {}


def packages() -> list[Finding]:
    """The packages that this program asks for, and the optional ones, against their bounds."""
    try:
        stated = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return [
            Finding("packages", NOTE, f"{PACKAGE} is not installed, so no bounds are known", remedy="pip install -e .")
        ]
    wanted = [Requirement(line) for line in stated]
    found = {each.name: _version(each.name) for each in wanted}
    needed = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    bad = [_text(each, found) for each in needed if not _meets(each, found[each.name])]
    facts = {"versions": {name: version for name, version in found.items() if version}, "wrong": bad}
    shown = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "numpy") if found.get(name))
    remedy = "pip install --upgrade " + " ".join(
        f"'{each.name}{each.specifier}'" for each in needed if not _meets(each, found[each.name])
    )
    line = (
        Finding("packages", PROBLEM, "; ".join(bad), "what needs them fails or computes something else", remedy, facts)
        if bad
        else Finding("packages", OK, f"{shown}; all {len(needed)} within their bounds", facts=facts)
    )
    return [line, *_extras(wanted, found)]


def _extras(wanted: list[Requirement], found: dict[str, str | None]) -> list[Finding]:
    """What optional packages are missing, and what that costs."""
    costs = {"matplotlib": "`report --plot`", "openai": "`regenerate --endpoint`"}
    absent = {each.name: each for each in wanted if each.name in costs and not _meets(each, found[each.name])}
    if not absent:
        return []
    text = ", ".join(f"{name} ({costs[name]})" for name in absent)
    remedy = "pip install " + " ".join(f"'{each.name}{each.specifier}'" for each in absent.values())
    return [Finding("extras", NOTE, f"not there: {text}", "nothing else needs them", remedy, {"absent": list(absent)})]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _meets(wanted: Requirement, version: str | None) -> bool:
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def _text(wanted: Requirement, found: dict[str, str | None]) -> str:
    version = found[wanted.name]
    return f"{wanted.name} {version or 'is missing'}, wanted {wanted.specifier}"


def memory() -> Finding:
    """The memory that this process may take: the machine's, or less where a cgroup limits it."""
    total, available = _meminfo()
    limit, used = _cgroup_memory()
    usable = min(available, limit - used) if limit else available
    facts = {"total_bytes": total, "available_bytes": available, "cgroup_bytes": limit, "usable_bytes": usable}
    capped = f", this cgroup's limit is {size_text(limit)}" if limit and limit < total else ""
    found = f"{size_text(usable)} can be taken of {size_text(total)}{capped}"
    if usable < LEAST_MEMORY:
        remedy = f"give it at least {size_text(LEAST_MEMORY)}, or end what takes it"
        return Finding("memory", PROBLEM, found, "importing torch and a target's weights need more", remedy, facts)
    return Finding("memory", OK, found, facts=facts)


def _meminfo() -> tuple[int, int]:
    """Return total and available bytes."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
        return total, available
    except (OSError, KeyError, ValueError, IndexError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total


def _cgroup_files(name: str, old: str) -> list[str]:
    """Return what the files of this name say in this process's cgroup and in those above; `old`: of version 1."""
    own = ""
    with contextlib.suppress(OSError):
        own = next(
            (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), ""
        )
    folder, found = CGROUP / own.lstrip("/"), []
    for place in [*(each / name for each in (folder, *folder.parents) if each.is_relative_to(CGROUP)), CGROUP / old]:
        with contextlib.suppress(OSError):
            found.append(place.read_text().strip())
    return found


def _cgroup_memory() -> tuple[int | None, int]:
    """Return the smallest limit in bytes, None without one, and what of it is taken, the page cache aside."""
    limits = [int(text) for text in _cgroup_files("memory.max", "memory/memory.limit_in_bytes") if text.isdigit()]
    limits = [limit for limit in limits if limit < UNLIMITED]
    taken = [
        int(text) for text in _cgroup_files("memory.current", "memory/memory.usage_in_bytes")[:1] if text.isdigit()
    ]
    stat = "\n".join(_cgroup_files("memory.stat", "memory/memory.stat")[:1])
    cached = sum(
        int(line.split()[1]) for line in stat.splitlines() if line.startswith(("inactive_file ", "active_file "))
    )
    return min(limits, default=None), max(0, sum(taken) - cached)


def processors() -> Finding:
    """The processors that this process may use, what of them a cgroup grants, and OpenMP's settings."""
    there = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    granted = _cgroup_processors()
    set_by_user = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("OMP_", "MKL_NUM", "GOMP_", "KMP_"))
    }
    ours = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}.items()
    settings = {name: value for name, value in set_by_user.items() if (name, value) not in ours}
    facts = {"processors": there, "allowed": allowed, "granted": granted, "settings": set_by_user}
    words = f"{allowed} of {there} may be used" + (f", a cgroup grants {granted:.1f}" if granted else "")
    words += "".join(f", {name}={value}" for name, value in settings.items())
    threads = int(settings["OMP_NUM_THREADS"]) if settings.get("OMP_NUM_THREADS", "").isdigit() else allowed
    if granted and threads > granted + 0.5:
        remedy = f"OMP_NUM_THREADS={max(1, int(granted))}"
        return Finding(
            "processors", NOTE, words, f"{threads} threads share them and wait for one another", remedy, facts
        )
    return Finding("processors", OK, words, facts=facts)


def _cgroup_processors() -> float | None:
    """Return how many processors' time is granted, None without a limit."""
    shares = []
    for text in _cgroup_files("cpu.max", "cpu/cpu.cfs_quota_us"):
        quota, *period = text.split()
        if quota.isdigit():
            shares.append(int(quota) / int(period[0] if period else 100_000))
    return min(shares, default=None)


def limits() -> Finding:
    """Open files and address space of a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    space = None if space == resource.RLIM_INFINITY else space
    facts = {"open_files": soft, "open_files_hard": hard, "address_space_bytes": space}
    found = f"{_count(soft)} open files, address space {size_text(space) if space else 'without limit'}"
    if space is not None and space < 16 << 30:
        cost = "memory-mapped shards and a GPU's driver take address space beyond what they use"
        return Finding("ulimits", PROBLEM, found, cost, "ulimit -v unlimited", facts)
    if 0 <= soft < LEAST_FILES:
        cost = "a cache keeps a file open for each column of the shards it reads"
        remedy = f"ulimit -n {min(hard, 65_536) if hard > 0 else 65_536}"
        return Finding("ulimits", PROBLEM, found, cost, remedy, facts)
    return Finding("ulimits", OK, found, facts=facts)


def _count(limit: int) -> str:
    return "unlimited" if limit < 0 else f"{limit:,}"
