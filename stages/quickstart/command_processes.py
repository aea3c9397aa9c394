"""Our own commands, run in processes of their own: one with the terminal to itself, or several side by side.

They hear no signal but from here, so that Ctrl-C reaches each exactly once, and each saves what it has.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.cache.atomic import write_errors
from pipeline.visible_text import print_visible, visible

PROGRESS_SECONDS = 15.0  # between two lines of one draft's progress
SHOWN = re.compile(r"accept length|^(error|warning|bug):|^stopped at step")  # of a training, whatever the time
PROGRESS = re.compile(r"^(step \d+/\d+|decoding: \d+)")
LAST_LINES = 8  # shown of a log whose command failed


class Command:
    """One of our commands: its words."""

    def __init__(self, *words: object):
        self.words = [*map(str, words)]

    @property
    def typed(self) -> str:
        """The line that a user would type."""
        return shlex.join(["pipeline", *self.words])

    def start(self, threads: int | None = None, **streams) -> subprocess.Popen:
        """Start it. threads: of torch, None for its own choice."""
        environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
        program = [sys.executable, "-P", "-m", "pipeline"]  # -P: a folder `pipeline` here is not the program
        return subprocess.Popen(
            [*program, *self.words], start_new_session=True, stdin=subprocess.DEVNULL, env=environment, **streams
        )


def run_command(command: Command, aside: bool = False, as_json: bool = False) -> None:
    """Print and run one command. SystemExit with its exit code where it fails.

    aside: its output goes to standard error. as_json: with --json, which has standard output for itself.
    """
    print_visible(f"\n$ {visible(command.typed)}", aside or as_json)
    command = Command(*command.words, "--json") if as_json else command
    process = command.start(stdout=sys.stderr.fileno() if aside else None)
    with stopped_with_us([process]):
        code = process.wait()
    if code:
        raise SystemExit(exit_code(code))


def exit_code(code: int) -> int:
    """Return the exit code of a process as a shell has it: a signal's number and 128."""
    return 128 - code if code < 0 else code


@contextmanager
def stopped_with_us(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Pass on what stops the block, to the processes that run by then, and wait for them to end."""
    try:
        yield
    except BaseException as stop:
        number = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
        for process in [*processes]:
            if process.poll() is None:
                process.send_signal(number)
        for process in [*processes]:
            process.wait()
        raise


def run_side_by_side(works: Mapping[str, Sequence[Command]], logs: Mapping[str, Path], aside: bool = False) -> None:
    """Run several lists of commands at once, those of each in turn and with one thread, each to its log.

    Drafts this small gain nothing from a second thread. Accept lengths are shown as they come, of the rest a line now
    and then. SystemExit with the exit code of the first that failed, once the others have ended.
    """
    followed = [Followed(name, commands, logs[name], aside) for name, commands in works.items() if commands]
    try:
        for each in followed:
            each.thread.start()
        for each in followed:
            each.thread.join()
    except BaseException as stop:
        for each in followed:
            each.stop(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
        for each in followed:
            each.thread.join()
        raise
    for each in followed:
        if each.error is not None:
            raise each.error
    for each in followed:
        if each.code:
            print_visible(f"{each.name} failed; the end of {visible(each.log)}:", err=True)
            print_visible("".join(f"  {line}" for line in each.last).rstrip(), err=True)
            raise SystemExit(exit_code(each.code))


class Followed:
    """A list of commands being run: what they print goes to a log, and the lines worth it to the screen."""

    def __init__(self, name: str, commands: Sequence[Command], log: Path, aside: bool):
        self.name, self.commands, self.log, self.aside = name, commands, log, aside
        self.thread = threading.Thread(target=self._run, name=name)
        self.lock, self.process, self.stopped = threading.Lock(), None, False
        self.last, self.shown_at, self.code, self.error = deque(maxlen=LAST_LINES), 0.0, 0, None

    def stop(self, number: int) -> None:
        """Start nothing more, and send a signal to what runs."""
        with self.lock:
            self.stopped = True
            if self.process is not None and self.process.poll() is None:
                self.process.send_signal(number)

    def _run(self) -> None:
        try:
            with write_errors(self.log, "a log"):
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with open(self.log, "a", encoding="utf-8") as log:
                    for command in self.commands:
                        if not self.code:
                            self._follow(command, log)
        except Exception as error:  # raised where the thread is waited for
            self.error = error
            self.stop(signal.SIGTERM)

    def _follow(self, command: Command, log) -> None:
        with self.lock:
            if self.stopped:
                return
            self._show(f"$ {visible(command.typed)}")
            self.process = command.start(
                1, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
        log.write(f"$ {command.typed}\n")
        self.last.clear()
        for line in self.process.stdout:
            log.write(line)
            log.flush()
            self.last.append(line)
            now = time.monotonic()
            evaluated = command.words[0] == "train-draft" and SHOWN.search(line)
            if evaluated or (PROGRESS.match(line) and now - self.shown_at > PROGRESS_SECONDS):
                self.shown_at = now
                self._show(line.rstrip("\n"))
        self.code = self.process.wait()

    def _show(self, line: str) -> None:
        print_visible(f"{self.name}: {line}", self.aside)
