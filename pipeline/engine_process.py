"""An engine as a process of its own, in a Python of its own; nothing of it is left when this one ends.

`PYTHON SCRIPT REQUEST.json`. On its standard output a line that begins with MARK is a JSON object that tells how far
it is, `stage` being the least of it; all other output is the log. Lines of JSON may be sent to its standard input; when
that is closed, the process ends. What a request asks for, and what is left of it, is between a stage and its script.
A script finds `pipeline/inside_engine/` beside its own folder on its path, and nothing else of ours.
"""

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.atomic import write_all
from pipeline.errors import PipelineError, ProofError, RoomError, UsageError
from pipeline.inside_engine.engine_side import MARK
from pipeline.visible_text import visible

INSIDE = Path(__file__).with_name("inside_engine")
MADE = Path("build/vllm/bin/python")  # by `make engines`
LAST_LINES = 400  # of the log, in which the cause of a crash is sought
GRACE_S = 5.0  # between being asked to end and being killed
LEAVING_S = 15.0  # for a process that is told to end by itself
MODULES = {"vllm": "vllm"}  # what an engine's Python has to have
ERROR_LINE = re.compile(r"^(?:\S.*?\s)?(?:[a-zA-Z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Interrupt)): (.*\S)")
MISSING = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")
LOGGED_BY = re.compile(r"^.*?\[\S+\.py:\d+\] ")
ADVICE = (
    (("Address already in use", "EADDRINUSE", "address already in use"), "port"),
    (("MemoryError", "allocate memory", "out of memory", "No available memory", "Available memory on node"), "room"),
    (("Free memory on device",), "room"),
)


def find_python(named: Path | None) -> Path:
    """Return the engine's Python: the one named, else that of `make engines`, else this one."""
    return named or (MADE if MADE.is_file() else Path(sys.executable))


def check_python(python: Path, engine: str) -> None:
    """Refuse a Python that is not there, or has no such engine. UsageError."""
    module = MODULES[engine]
    remedy = "make one with `make engines`, or a venv by the engine's own instructions, and pass --python V/bin/python"
    code = f"import importlib.util, sys; sys.exit(3 * (importlib.util.find_spec({module!r}) is None))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "it does not answer"
        raise UsageError(f"--python {python} cannot be run ({reason}); {remedy}") from error
    if done.returncode == 3:
        raise UsageError(f"{python} has no module {module}: an engine lives in an environment of its own; {remedy}")
    if done.returncode:
        said = (done.stderr.strip() or "nothing said").splitlines()[-1]
        raise UsageError(f"--python {python} is no Python that runs ({visible(said)[:200]}); {remedy}")


def environment() -> dict[str, str]:
    """Return the variables of this process, but with the engine's Python led to `INSIDE` alone of our modules."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    return kept | {"PYTHONPATH": str(INSIDE)}


@dataclass(frozen=True)
class Remedies:
    """What to do, in words. room: where the engine lacks memory. silence: where it makes no progress. crash: where it
    ends for a reason of its own."""

    room: str
    silence: str
    crash: str = ""


class EngineProcess:
    """An engine's process. A context manager, on leaving which it has ended, and all that it started.

    stage: what it told last.
    """

    def __init__(
        self, python: Path, script: Path, request: Path, log: Path, remedies: Remedies, kept: Path | None = None
    ):
        """Start it. request: a file that is there. log: a file to write. kept: where the log is copied to when an error
        names it; None: it stays where it is."""
        self.log, self.stage, self._remedies, self._kept = log, {"stage": "starting"}, remedies, kept
        self._said, self._rest, self._told = deque(maxlen=LAST_LINES), b"", deque()
        log.write_bytes(b"")
        self._process = subprocess.Popen(
            [python, script, request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,  # Ctrl-C is ours, and the whole group ends at once
        )
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(self._process.stdout, selectors.EVENT_READ)

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def send(self, request: dict) -> None:
        """Send a line. Does nothing where the process has ended, which `next_stage` then tells."""
        with contextlib.suppress(BrokenPipeError):
            write_all(self._process.stdin.fileno(), json.dumps(request).encode() + b"\n")  # no buffer to flush again

    def next_stage(self, timeout: float) -> dict | None:
        """Wait for what the process tells next, writing its log; None when it has ended well.

        timeout: seconds of silence, the log aside, after which it is ended. UsageError, RoomError or ProofError for one
        that ends otherwise, with the last thing it said.
        """
        since = time.monotonic()
        while not self._told:
            if self._waiting.select(timeout=1.0) and not self._read():
                self._process.wait()
                self.end()
                if self._process.returncode:
                    raise self._failure()
                return None
            if not self._told and time.monotonic() - since > timeout:
                self.end()
                raise ProofError(
                    f"the engine made no progress for {timeout:g} s while {self.stage['stage']}; "
                    f"{self._remedies.silence}, or see its log, {self.keep_log()}{last_words(self._said)}"
                )
        self.stage = self._told.popleft()
        return self.stage

    def _read(self) -> bool:
        """Read what there is into the log, and take what is told from it. Returns False at the end."""
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        with open(self.log, "ab") as log:
            log.write(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines if data else [self._rest]:
            text = line.decode("utf-8", "replace").rstrip()
            output, mark, told = text.partition(MARK)  # libraries may have left a line unfinished
            if output:
                self._said.append(output)
            if mark:
                self._told.append(json.loads(told))
        return bool(data)

    def keep_log(self) -> Path:
        """Return where the log is to be found, for an error, also once this process has ended."""
        if self._kept is None:
            return self.log
        shutil.copyfile(self.log, self._kept)
        return self._kept

    def leave(self, request: dict) -> None:
        """Send a last line, on which the process ends by itself and tidies up; end it where it does not in time."""
        if self._process.poll() is None:
            self.send(request)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LEAVING_S)
            until = time.monotonic() + GRACE_S
            with contextlib.suppress(ProcessLookupError):
                while time.monotonic() < until:  # what tracks shared memory removes it last
                    os.killpg(self._process.pid, 0)
                    time.sleep(0.02)
        self.end()

    def end(self) -> None:
        """End the process and all that it started, by force where it does not end by itself."""
        self._waiting.close()
        end_group(self._process)

    def _failure(self) -> PipelineError:
        """Return the error for a process that did not end with 0: what it said, where the log lies, what to do."""
        code, stage = self._process.returncode, self.stage
        if stage["stage"] == "failed" and stage.get("kind") == "absent":
            return UsageError(
                f"the engine cannot be imported ({visible(stage['what'])}); install it anew, or pass another --python"
            )
        if stage["stage"] == "failed":
            return UsageError(visible(stage["what"]))
        where = f"the whole log is {self.keep_log()}"
        text = "\n".join(self._said)
        kind = next((kind for words, kind in ADVICE if any(word in text for word in words)), "")
        doing = f"while {progress_text(stage | {'engine': ''})}"
        if kind == "port":
            return UsageError(
                f"the engine found a port in use {doing}; end what listens there, or set VLLM_PORT to one that is "
                f"free; {where}"
            )
        if kind == "room" or code == -signal.SIGKILL:
            killed = " (killed)" if code == -signal.SIGKILL else ""
            return RoomError(f"the engine ran out of memory {doing}{killed}; {self._remedies.room}; {where}")
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        lacking = [found[1] for line in self._said if (found := MISSING.search(line))]
        missing = f"; its Python has no module {visible(lacking[-1])}" if lacking else ""
        remedy = self._remedies.crash and f"; {self._remedies.crash}"
        return ProofError(f"the engine crashed {doing} ({ended}){last_words(self._said)}{missing}{remedy}; {where}")


def progress_text(stage: dict) -> str:
    """Return what a process told as words: its version, what it does, and how much of it is done."""
    count = f" {stage['done']} of {stage['of']} prompts" if "of" in stage else ""
    engine = f"{stage['engine']}, " if stage.get("engine") else ""
    return visible(f"{engine}{stage['stage']}{count}")


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started, by force where it does not end by itself."""
    if process.stdin and not process.stdin.closed:
        process.stdin.close()
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if process.poll() is None:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        # The leader is gone; what it started may still be there.
    process.wait()
    if process.stdout:
        process.stdout.close()


def last_words(said: Sequence[str]) -> str:
    """Return the last error in a log and what is below it, or its last lines."""
    lines = [LOGGED_BY.sub("", line).strip() for line in said if line.strip()]
    last = next((at for at in reversed(range(len(lines))) if ERROR_LINE.match(lines[at])), len(lines) - 3)
    found = (line.split(" [type=")[0] for line in lines[max(last, 0) :])  # of what pydantic says, not what it was given
    words = [line for line in found if not line.startswith("For further information")][:3]
    return f": {visible(' / '.join(words))[:600]}" if words else ""
