"""What `serve-check` asks of an engine's process, and what that leaves.

The request has `target`, `draft` (a folder, or null for plain decoding), `method`, `proposals`, `prompts` (lists of
token ids), `max_new`, `stops`, `dtype`, `positions` (the target's longest text, or null), `mend`, `states` (of how many
prompts the draft's states are recorded) and `out`, a folder. The process leaves in `out`:

- `result.json`: `engine`; `replies`, of each prompt its `ids` and `gains`, the tokens gained in each call of the target
  after the prefill, or null; `totals` ({"drafts", "proposed", "accepted"}) or null; `mends`; `states_missing`, why no
  states were recorded; `recorded`, replies as above of the prompts whose states were, decoded one at a time;
- `states.safetensors`, where states were to be had: for prompt i `states.i` [C, P, D], the draft's normed states of the
  proposals of C calls, `drafts.i` [C, P], the proposals, and `features.i` [T, K * D], what the draft reads of the
  prompt.

    C calls   P proposals   D hidden size   T rows of a prompt   K layers
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.engine_process import EngineProcess, Remedies, progress_text
from pipeline.errors import ProofError
from pipeline.json_files import parse_strict_json, read_file

RESULT, STATES, LOG = "result.json", "states.safetensors", "engine.log"
MOST_RESULT = 1 << 30
PROGRESS_S = 5.0
REMEDIES = Remedies(
    room="free some, lower --count and --max-new, or set VLLM_CPU_KVCACHE_SPACE", silence="pass a larger --timeout"
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
    with EngineProcess(python, script, path, folder / LOG, REMEDIES) as process:
        before, told = process.stage, time.monotonic()
        while (stage := process.next_stage(timeout)) is not None:
            if stage["stage"] != before["stage"] or time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                print(f"{title}: {progress_text(stage)}", file=sys.stderr)
            before = stage
    return _read_answer(folder)


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
