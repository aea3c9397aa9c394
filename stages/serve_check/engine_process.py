"""The engine as a process of its own, in a Python of its own; nothing of it is left when this one ends.

The protocol, which `vllm_script.py` speaks: `PYTHON SCRIPT REQUEST.json`. The request has `target`, `draft` (a folder,
or null for plain decoding), `method`, `proposals`, `prompts` (lists of token ids), `max_new`, `stops`, `dtype`,
`positions` (the target's longest text, or null), `mend`, `states` (of how many prompts the draft's states are
recorded) and `out`, a folder. On standard output a line that begins with MARK is a JSON object of progress; all other
output is the log. The process ends with 0 and leaves in `out`:

- `result.json`: `engine`; `replies`, of each prompt its `ids` and `gains`, the tokens gained in each call of the target
  after the prefill, or null; `totals` ({"drafts", "proposed", "accepted"}) or null; `mends`; `states_missing`, why no
  states were recorded; `recorded`, replies as above of the prompts whose states were, decoded one at a time;
- `states.safetensors`, where states were to be had: for prompt i `states.i` [C, P, D], the draft's normed states of the
  proposals of C calls, `drafts.i` [C, P], the proposals, and `features.i` [T, K * D], what the draft reads of the
  prompt.

When its standard input is closed, the process ends.

    C calls   P proposals   D hidden size   T rows of a prompt   K layers
"""

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import PipelineError, ProofError, RoomError, UsageError
from pipeline.json_files import parse_strict_json, read_file
from pipeline.visible_text import visible

MARK = "@serve-check "
RESULT, STATES, LOG = "result.json", "states.safetensors", "engine.log"
MOST_RESULT = 1 << 30
LAST_LINES = 400  # of the log, in which the cause of a crash is sought
GRACE_S = 5.0  # between being asked to end and being killed
PROGRESS_S = 5.0
MODULES = {"vllm": "vllm"}  # what an engine's Python has to have
ERROR_LINE = re.compile(r"^(?:\S.*?\s)?(?:[a-zA-Z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Interrupt)): (.*\S)")
ADVICE = (
    (("Address already in use", "EADDRINUSE", "address already in use"), "port"),
    (("MemoryError", "allocate memory", "out of memory", "No available memory"), "room"),
)


@dataclass(frozen=True)
class Answer:
    """What an engine's process left: see the protocol. states: the file, None where it recorded none."""

    engine: str
    replies: list[dict]
    totals: dict | None
    mends: list[str]
    states: Path | None
    states_missing: str
    recorded: list[dict]


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
    """Return the variables of this process but for those that would lead the engine's Python to our modules."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def run_engine(python: Path, script: Path, request: dict, folder: Path, timeout: float, title: str) -> Answer:
    """Run an engine's script on a request in `folder`, which gets its log, and return what it left.

    timeout: seconds without progress after which it is ended. title: for lines of progress.
    UsageError, RoomError or ProofError for an engine that ends otherwise, with the last thing it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in (RESULT, STATES):  # of an earlier check that kept its logs here
        (folder / left).unlink(missing_ok=True)
    path = folder / "request.json"
    path.write_text(json.dumps(request | {"out": str(folder)}))
    process = subprocess.Popen(
        [python, script, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        start_new_session=True,  # Ctrl-C is ours, and the whole group ends at once
    )
    try:
        stage, said = _follow(process, folder / LOG, timeout, title)
    finally:
        end_group(process)
    if process.returncode:
        raise _failure(process.returncode, stage, said, folder / LOG)
    return _read_answer(folder)


def _follow(process: subprocess.Popen, log: Path, timeout: float, title: str) -> tuple[dict, Sequence[str]]:
    """Write the log and tell the progress until the process ends; return its last stage and its last lines."""
    stage, said, rest = {"stage": "starting"}, deque(maxlen=LAST_LINES), b""
    moved = told = time.monotonic()
    with selectors.DefaultSelector() as waiting, open(log, "wb") as file:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not waiting.select(timeout=1.0):
                if time.monotonic() - moved > timeout:
                    end_group(process)
                    raise ProofError(
                        f"the engine made no progress for {timeout:g} s while {stage['stage']}; pass a larger "
                        f"--timeout, or see its log, {log}{_last_words(said)}"
                    )
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                process.wait()
                return stage, said
            file.write(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                text = line.decode("utf-8", "replace").rstrip()
                output, mark, told_of = text.partition(MARK)  # libraries may have left a line unfinished
                if output:
                    said.append(output)
                if not mark:
                    continue
                before, stage = stage, json.loads(told_of)
                moved = time.monotonic()
                if stage["stage"] != before["stage"] or moved - told > PROGRESS_S:
                    told = moved
                    print(f"{title}: {_progress(stage)}", file=sys.stderr)
            file.flush()


def _progress(stage: dict) -> str:
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


def _failure(code: int, stage: dict, said: Sequence[str], log: Path) -> PipelineError:
    """Return the error for an engine that did not end with 0: what it said, where the log lies, what to do."""
    where = f"the whole log is {log}"
    if stage["stage"] == "failed" and stage.get("kind") == "absent":
        return UsageError(f"the engine cannot be imported ({stage['what']}); install it anew, or pass another --python")
    text = "\n".join(said)
    kind = next((kind for words, kind in ADVICE if any(word in text for word in words)), "")
    doing = f"while {_progress(stage | {'engine': ''})}"
    if kind == "port":
        return UsageError(
            f"the engine found a port in use {doing}; end what listens there, or set VLLM_PORT to one that is free; "
            f"{where}"
        )
    if kind == "room" or code == -signal.SIGKILL:
        killed = " (killed)" if code == -signal.SIGKILL else ""
        return RoomError(
            f"the engine ran out of memory {doing}{killed}; free some, lower --count and --max-new, or set "
            f"VLLM_CPU_KVCACHE_SPACE; {where}"
        )
    ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return ProofError(f"the engine crashed {doing} ({ended}){_last_words(said)}; {where}")


def _last_words(said: Sequence[str]) -> str:
    """Return the last error in a log and what is below it, or its last lines."""
    lines = [line.split("] ")[-1].strip() for line in said if line.strip()]
    last = next((at for at in reversed(range(len(lines))) if ERROR_LINE.match(lines[at])), len(lines) - 3)
    words = lines[max(last, 0) :][:3]  # what a checker of options found stands below its name
    return f": {visible(' / '.join(words))[:600]}" if words else ""


def _read_answer(folder: Path) -> Answer:
    path = folder / RESULT
    try:
        found = parse_strict_json(read_file(path, MOST_RESULT))
        states = folder / STATES
        return Answer(
            engine=found["engine"],
            replies=found["replies"],
            totals=found["totals"],
            mends=found["mends"],
            states=states if states.is_file() else None,
            states_missing=found["states_missing"],
            recorded=found["recorded"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProofError(f"the engine left no result ({error}); its whole log is {folder / LOG}") from error
