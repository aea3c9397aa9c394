"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases, trackio.

    [train]
    track = ["tensorboard"]

decides nothing of the draft, so it is no part of a recipe's digest. A tracker holds a copy of what metrics.jsonl and
timing.jsonl say, each step once. When a run goes on after a kill, those two were cut to its checkpoint; a tracker that
keeps files of its own (TensorBoard, W&B offline) gets them anew, one that only grows goes on behind its last step: the
steps are the same however often they are taken. A step is handed on once a later one is there, so that its evaluation
goes with it.

The first rank alone tracks. A tracker that fails is left out for the rest of the process, which says so in one line.
Trackers are told figures and the recipe, never the command line or the environment.
"""

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pipeline.cache.atomic import write_file
from pipeline.errors import UsageError, first_line
from pipeline.runs.run_logs import METRICS, TIMING, read_log
from pipeline.secret_masking import masked
from pipeline.visible_text import visible

PROJECT = "draft-pipeline"
IDENTITY = "tracker-id"  # a file in a run's folder: what the run is called by trackers that are no part of it
TIMED = ("tokens_s", "step_seconds", "data_wait", "peak_bytes")

Values = dict[str, float]


class TensorBoard:
    """Event files in RUN/tensorboard, written one by one: torch's writer hangs once its thread has met a full disk."""

    package: ClassVar[str] = "tensorboard"
    last = -1  # the highest step it has: none, since it begins anew

    def __init__(self, run: Path, config: dict):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self.place = folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        before = list(folder.glob("events.out.tfevents.*"))
        name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}"
        self._file = open(folder / name, "wb")  # noqa: SIM115 - until `close`
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        # Has a TensorBoard that is open forget all steps of the files before.
        self._write(step=0, session_log=SessionLog(status=SessionLog.START))
        for path in before:
            path.unlink()

    def log(self, step: int, values: Values) -> None:
        named = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summary(value=named))
        self._file.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, **fields) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


class WandB:
    """Weights & Biases, in the project of WANDB_PROJECT. With WANDB_MODE=offline it needs no network: its files in
    RUN/wandb wait for `wandb sync`. Neither command line nor environment, code or console goes there."""

    package: ClassVar[str] = "wandb"

    def __init__(self, run: Path, config: dict):
        import wandb

        name = tracker_id(run)
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_save_requirements=False,
            finish_timeout=60.0,  # seconds; without a network it would wait for ever
        )
        offline = os.environ.get("WANDB_MODE") == "offline"
        if offline:  # it cannot go on with a run; the new files have all of it
            for folder in (run / "wandb").glob(f"offline-run-*-{name}"):
                shutil.rmtree(folder)
        self._run = wandb.init(
            project=None if os.environ.get("WANDB_PROJECT") else PROJECT,
            id=name,
            name=run.name,
            dir=str(run),
            config=config,
            resume=None if offline else "allow",
            reinit="create_new",
            settings=settings,
        )
        self.last = self._run.step - 1
        self.place = run / "wandb" if offline else self._run.url

    def log(self, step: int, values: Values) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio, whose own variables say where: TRACKIO_DIR, by default in the hub's cache, or TRACKIO_SPACE_ID."""

    package: ClassVar[str] = "trackio"

    def __init__(self, run: Path, config: dict):
        import trackio

        self._run = trackio.init(project=PROJECT, name=tracker_id(run), config=config, resume="allow")
        self.last = self._run._next_step - 1  # what trackio itself goes on from
        self.place = f"trackio show --project {PROJECT}"

    def log(self, step: int, values: Values) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = {tracker.package: tracker for tracker in (TensorBoard, WandB, Trackio)}


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError for a tracker whose package is not installed, with the command that installs it."""
    for name in names:
        if importlib.util.find_spec(TRACKERS[name].package) is None:
            raise UsageError(
                f'train.track = ["{name}"]: the package {name} is not installed; '
                f"`pip install 'draft-pipeline[{name}]'` installs it, or leave it out"
            )


def tracker_id(run: Path) -> str:
    """Return what a run is called by trackers, for its whole life; another one once its folder was made anew."""
    path = run / IDENTITY
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    write_file(path, f"{run.name[:60]}-{secrets.token_hex(4)}\n".encode())
    return path.read_text().strip()


class Tracking:
    """The trackers of one run, from its newest checkpoint on. say: prints a line."""

    def __init__(self, run: Path, names: Sequence[str], config: dict, say: Callable[[str], None]):
        self.say, self._trackers = say, {}
        self._step, self._values = 0, {}  # of the newest step, which is not handed on yet
        for name in names:
            with self._surviving(name):
                self._trackers[name] = TRACKERS[name](run, config)
                say(f"tracked by {name}: {visible(masked(self._trackers[name].place))}")
        if self._trackers:
            for record in in_step_order(read_log(run / METRICS), read_log(run / TIMING)):
                self.add(record)

    def add(self, record: dict) -> None:
        """Take a line of metrics.jsonl or timing.jsonl."""
        if record["step"] != self._step:
            self._hand_on()
            self._step = record["step"]
        self._values |= values_of(record)

    def close(self) -> None:
        """Hand on the newest step, and end. Calling it again does nothing."""
        self._hand_on()
        for name, tracker in list(self._trackers.items()):
            with self._surviving(name):
                tracker.close()
        self._trackers.clear()

    def _hand_on(self) -> None:
        values, self._values = self._values, {}
        for name, tracker in list(self._trackers.items()):
            if values and self._step > tracker.last:
                with self._surviving(name):
                    tracker.log(self._step, values)

    @contextlib.contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Leave a tracker out that fails, whatever it raises, and say so: it may not end a training."""
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            cause = visible(masked(first_line(f"{type(error).__name__}: {error}")))
            self.say(f"{name} failed ({cause}): the training goes on without it; {METRICS} has every step")


def in_step_order(metrics: Sequence[dict], timing: Sequence[dict]) -> list[dict]:
    """Return the lines of both logs by step, those of one step in their order."""
    return sorted([*metrics, *timing], key=lambda record: record["step"])


def values_of(record: dict) -> Values:
    """Return the figures of a line of metrics.jsonl or timing.jsonl by the names that trackers show."""
    if "eval" in record:
        figures = record["eval"]
        if not figures["calls"]:
            return {}
        domains = {
            f"domain/{name}": of["accept_len"] for name, of in figures["domains"].items() if name and of["calls"]
        }
        low, high = figures["interval"]
        values = {"accept_len": figures["accept_len"], "accept_len_low": low, "accept_len_high": high}
        return {f"eval/{name}": value for name, value in (values | domains).items()}
    if "tokens_s" in record:
        shares = {f"time/{name}": share for name, share in record.get("time", {}).items()}
        return {f"speed/{name}": record[name] for name in TIMED if name in record} | shares
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
    return {f"train/{name}": float(value) for name, value in numbers.items()}
