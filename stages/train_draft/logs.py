"""What a run writes and prints: its logs, JSON lines that a resumed run truncates to its checkpoint, so that a kill
leaves no trace in them; its progress, a bar on a terminal and a line every few seconds elsewhere; the lines around it.

    metrics.jsonl    one line for each logged step and each evaluation; the same bytes however often a run was killed
    timing.jsonl     what differs between runs of one recipe: seconds, where they go, tokens a second, peak memory

Each line ends with a checksum of itself and of the line before (see pipeline/json_files.py), and a checkpoint
records that of the last line before it. So a line that is changed, missing or from another run is found before its
figures are used.
"""

import json
import os
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import size_text, write_errors, write_file
from pipeline.drafts import unservable
from pipeline.drafts.rope import draft_rope_scaling
from pipeline.drafts.step_clock import StepClock
from pipeline.duration_text import clock_text, pace_text
from pipeline.errors import CacheError
from pipeline.json_files import Count, Record, damage_error, parse_checksummed, parse_journal, read_file, with_checksum
from pipeline.runs.folder import Evaluation, Result
from pipeline.runs.recipe import Resolved, TrainSection
from pipeline.runs.run_logs import MAX_BYTES, REMOVE
from pipeline.runs.training_data import Split, how_to_add, partial_text, training_config
from pipeline.target.head import logit_scale
from pipeline.visible_tables import VisibleConsole
from pipeline.visible_text import visible
from stages.train_draft.batches import Batch

LINE_INTERVAL = 5.0  # seconds


class Line(Record):
    """What a resumed run reads of a line; a logged step has its metrics besides."""

    step: Count
    eval: Evaluation | None = None  # where the held-out samples were measured after the step
    removed: str | None = None  # the checksum of a line in a log that the user removed


class MetricsLog:
    """One append-only file of checksummed JSON lines. `last_checksum` is that of the newest line, "" without one."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[Line] = []
        self.last_checksum = ""

    def truncate(self, step: int, expected_checksum: str = "") -> None:
        """Keep the lines up to `step`; later ones will be written again, and an incomplete last line is dropped.

        expected_checksum: of a line that must be among them, as the checkpoint recorded it. Raises CacheError where it
        is not, since then the lines before it are not those that were written. A log that the user removed starts
        again with a line that records this.
        """
        self.lines, self.last_checksum = [], ""
        if expected_checksum and not self.path.exists():
            return self.write({"step": step, "removed": expected_checksum})
        valid, reason = self._read(step)
        checksums = [word for _, line, checksum in valid for word in (checksum, line.removed)]
        if expected_checksum and expected_checksum not in checksums:
            reason = reason or f"the lines up to step {step} are not all there"
            raise CacheError(f"{self.path}: damaged ({reason}); {REMOVE}")
        self.lines = [line for _, line, _ in valid]
        self.last_checksum = valid[-1][2] if valid else ""
        write_file(self.path, b"".join(data for data, _, _ in valid))

    def _read(self, step: int) -> tuple[list[tuple[bytes, Line, str]], str]:
        """Return the valid lines up to `step` as (bytes, line, checksum), and what is wrong with the line after
        them ("" for nothing)."""
        try:
            data = read_file(self.path, MAX_BYTES) if self.path.exists() else b""
        except (OSError, ValueError) as error:
            raise damage_error(self.path, error, REMOVE) from None
        parsed, reason = parse_journal(data)
        valid = []
        for number, (text, record, checksum) in enumerate(parsed, 1):
            try:
                line = Line.model_validate(record)
            except ValidationError:
                return valid, f"line {number}: no line of a journal"
            if line.step > step:
                return valid, ""
            valid.append((text, line, checksum))
        return valid, reason

    def write(self, record: dict) -> None:
        """Append one line and fsync it. Raises RoomError when the disk is full."""
        line = with_checksum(json.dumps(record, allow_nan=False), self.last_checksum)
        self.lines.append(Line.model_validate(record))
        self.last_checksum = parse_checksummed(line, self.last_checksum)[1]
        with write_errors(self.path, "a line of metrics"), open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


class Throughput:
    """The speed of a run since it (re)started: context rows and steps over seconds spent training; and its memory.

    excluded: seconds of evaluating and saving, which are left out. others: seconds in which other runs of the process
    had their turn, which only the time still to go is reckoned with. clock: to be told the phases of a step.
    """

    def __init__(self, start: int, total_steps: int, device: torch.device):
        self.start, self.total_steps, self.device = start, total_steps, device
        self.began, self.clock = time.perf_counter(), StepClock(device)
        self.rows, self.excluded, self.others = 0, 0.0, 0.0
        self.turn_ended, self.waited = self.began, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # of a run before this one in the same process

    def count(self, batch: Batch, waited: float) -> dict[str, float]:
        """Add a batch that was trained on; return the step that all counts from, seconds, seconds a step, context rows
        a second, the fraction of time spent waiting for data, the peak memory and the seconds still to go. `waited`:
        seconds waited for data in all.
        """
        self.rows += batch.rows
        seconds = self.seconds()
        steps = batch.step + 1 - self.start
        step_seconds = seconds / steps
        return {
            "since": self.start,
            "seconds": round(seconds, 3),
            "step_seconds": round(step_seconds, 5),
            "tokens_s": round(self.rows / seconds, 1),
            "data_wait": round(waited / seconds, 4),
            "peak_bytes": peak_memory(self.device),
            "eta": round((step_seconds + self.others / steps) * (self.total_steps - batch.step - 1), 1),
        }

    def begin_turn(self, waited: float) -> None:
        """Count the time since `end_turn` as that of others, but for waiting for data, which each run would have done.
        waited: seconds waited for data in all."""
        self.others += max(0.0, time.perf_counter() - self.turn_ended - (waited - self.waited))
        self.waited = waited

    def end_turn(self) -> None:
        self.turn_ended = time.perf_counter()

    def seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self.began - self.excluded - self.others)

    def time_shares(self, waited: float) -> dict[str, float]:
        """Return where the time since the (re)start went, as shares that sum to 1: `data` (waiting for it), the phases
        of pipeline/drafts/step_clock.py, and `other`.

        other: copies to the device, laying out, sums over ranks, logs.
        What a GPU computes while the host waits for data counts as computing. Of several ranks these are one's own.
        """
        phases = self.clock.read()  # before the seconds, of which they are a part
        whole = max(self.seconds(), sum(phases.values()))
        shares = {"data": min(waited, whole - sum(phases.values()))} | phases
        shares = {name: int(10_000 * of / whole) / 10_000 for name, of in shares.items()}  # never rounded up
        return shares | {"other": max(0.0, round(1 - sum(shares.values()), 4))}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that tensors took of a GPU at once in this run; on a CPU the most memory that the process
    has had, since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Display:
    """Prints the newest metrics of a run. A context manager, but for a run that is shown `beside` another one's.

    name: what the run's lines begin with, where several are shown.
    """

    def __init__(self, start: int, total_steps: int, name: str = "", beside: "Display | None" = None):
        self.out, self.last = beside.out if beside else VisibleConsole(), 0.0
        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(overflow="fold")),  # cut off nothing
            TimeElapsedColumn(),
        )
        if beside:
            self.bar = beside.bar
        else:
            self.bar = Progress(*columns, console=self.out, transient=True) if self.out.is_terminal else None
        self.task = self.bar.add_task("", total=total_steps, completed=start, text=name) if self.bar else None
        self.total_steps, self.metrics, self.prefix = total_steps, "", f"{name}: " if name else ""

    def __enter__(self) -> "Display":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, step: int, metrics: dict | None, timing: dict) -> None:
        """Show that `step` is done, how fast it goes, and the metrics of the last step that logged any."""
        self.metrics = metrics_text(metrics) if metrics else self.metrics
        text = f"{self.metrics}{timing_text(timing)}"
        if self.bar:
            self.bar.update(self.task, completed=step, text=f"{self.prefix}{text}")
        elif metrics and time.perf_counter() - self.last >= LINE_INTERVAL:
            self.last = time.perf_counter()
            self.print_line(f"step {step}/{self.total_steps}  {text}")

    def print_line(self, text: str) -> None:
        """Print a line above the bar, which stays."""
        self.out.print(f"{self.prefix}{text}", soft_wrap=True)


def metrics_text(metrics: dict) -> str:
    """Return the metrics of one step as text, followed by a gap."""
    lambda_text = f"lambda {metrics['lambda_base']:.2f}  " if "lambda_base" in metrics else ""
    return (
        f"loss {metrics['loss']:.3f}  accept_len_tf {metrics['accept_len_tf']:.2f}  {lambda_text}"
        f"lr {metrics['lr']:.1e}  "
    )


def timing_text(timing: dict) -> str:
    """Return the speed, the share of time spent waiting for data, the peak memory and the time to go as text."""
    return (
        f"{timing['tokens_s']:,.0f} tokens/s  {pace_text(timing['step_seconds'])}  "
        f"data wait {timing['data_wait']:.0%}  "
        f"peak memory {size_text(timing['peak_bytes'])}  ETA {clock_text(timing['eta'])}"
    )


def run_description(
    path: Path, store: HiddenCache, split: Split, resolved: Resolved, device: torch.device
) -> Iterator[str]:
    """Yield the lines printed before a run starts, the whole recipe first."""
    yield resolved.recipe.toml()
    yield (
        f"{len(split.train)} samples to train on, {len(split.heldout)} held out, {split.unusable} unusable; "
        f"target {visible(store.identity.target.name)}, on {device}; run {visible(path)}"
    )
    context = resolved.recipe.train.context
    longer = int((store.samples.length[split.train] > context).sum())
    if longer:
        yield f"{longer} samples are longer than train.context = {context} rows: each gives one window an epoch"
    if resolved.recipe.train.echo > 1:
        yield echo_text(resolved, store, split)
    if store.catalog.partial:
        yield f"the cache is incomplete: {partial_text(store)}; layers {list(resolved.draft.target_layer_ids)} are read"
    if resolved.draft.gamma is None and resolved.draft.weighting == "decay":
        yield "gamma is 0, so late slots weigh as much as early ones; published recipes let the weight decay"
    yield from rope_messages(resolved, store)
    reason = unservable(resolved.draft, store.tokens, logit_scale(training_config(store.target_config)))
    if reason is not None:
        yield f"no engine will serve this draft, `pipeline export` refuses it: {reason}"


def echo_text(resolved: Resolved, store: HiddenCache, split: Split) -> str:
    """Return in words what `train.echo` does to this run, and the memory it takes of the host."""
    train, draft = resolved.recipe.train, resolved.draft
    held = two_batches_text(train, store, split, len(draft.target_layer_ids) + draft.needs_final_states)
    return (
        f"echo: each batch is read once for {train.echo} steps, which draw other anchors in it; equal to reading the "
        f"samples {train.echo} times only in expectation. {held}"
    )


def two_batches_text(train: TrainSection, store: HiddenCache, split: Split, columns: int) -> str:
    """Return in words what memory of the host two batches take, where a batch is read whole. columns: of states."""
    rows = store.samples.length[split.train].clip(max=train.context).mean() * min(train.batch, len(split.train))
    size = int(2 * rows * columns * store.hidden_size * store.dtype.itemsize)
    return f"Two batches are held in memory, about {size_text(size)}; of lossy codecs on a GPU less"


def rope_messages(resolved: Resolved, store: HiddenCache) -> Iterator[str]:
    """Yield how the draft's rotary positions relate to the target's scaled ones; nothing where both are plain."""
    scaling, reason = draft_rope_scaling(training_config(store.target_config))
    trained = resolved.draft.rope_scaling
    if trained is not None and trained == scaling:
        yield f"rotary positions are scaled as the target scales them: {trained}"
    elif trained != scaling:
        yield (
            f"the target scales its rotary positions ({scaling or 'not at all'}), the draft goes on as it began: "
            f"{trained or 'plain ones'}"
        )
    elif reason is not None:
        yield f"the target scales its rotary positions by {reason}: the draft is trained, and served, with plain ones"


def evaluation_text(figures: Evaluation) -> str:
    """Return an evaluation as one line of text: accept length, its 95 % interval and that of each domain."""
    if not figures.calls:
        return "no accept length: no held-out reply is the target's own"
    named = [f"{visible(name)} {of.accept_len:.2f}" for name, of in figures.domains.items() if of.calls and name]
    domains = f" ({', '.join(named)})" if named else ""
    low, high = figures.interval
    return f"accept length {figures.accept_len:.2f} [{low:.2f}, {high:.2f}] on held-out samples{domains}"


def summary(path: Path, store: HiddenCache, result: Result) -> str:
    """Return the closing lines: where the run is, its accept length, and the command to run next."""
    if not store.has_final:
        measured = f"no accept length: the cache holds no final states; {how_to_add(store, store.layers, 'needed')}"
    elif result.eval is None:
        measured = "no accept length: the corpus holds nothing out"
    else:
        measured = evaluation_text(result.eval)
    command = visible(shlex.join(["pipeline", "evaluate", "--draft", str(path)]))
    return f"{visible(path)}: {result.steps} steps, {measured}\nnext: {command}"
