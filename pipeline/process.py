"""The process of a command: its standard streams, signals, exit codes, and how waiting threads wait.

An error becomes one line on standard error and an exit code; `--debug` also shows the traceback.

Standard output and error survive a closed reader, so that a command finishes with its own exit code: otherwise `head`,
a closed terminal or a full disk under a log would end a training, or hide that a cache is damaged.
"""

import errno
import io
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import MutableMapping

import click

from pipeline.errors import PipelineError, RoomError, limit_error
from pipeline.visible_text import print_visible, visible, visible_lines

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # exit codes 143, and 129 for a terminal that was closed
RESUMABLE = "what is finished is kept, and the same command goes on from there"
NOTHING_WRITTEN = "nothing was written, and the same command starts again"
# Commands that write all or nothing; the others resume.
AFTER_INTERRUPT = dict.fromkeys(("inspect", "export", "check-export", "report"), NOTHING_WRITTEN)
AFTER_INTERRUPT["regenerate"] = "every reply so far is kept, and the same command asks for the others"
AFTER_INTERRUPT["evaluate"] = "no report was written, and the same command starts again"  # --plain may have its replies
READER_GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe has left, or a terminal was closed

# OpenMP's runtimes let a waiting thread spin for milliseconds. On a shared core it then displaces the very thread that
# it waits for: a capture on two cores beside one busy process took several times as long as with one thread. Measured
# by `tests/bench/busy.py`: on two quiet cores a spin count of 1,000 saves a few percent, beside a busy process it costs
# 10 to 20 %. GNU's runtime counts iterations, Intel's and LLVM's milliseconds.
NO_SPINNING = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
WAIT_VARIABLES = ("OMP_WAIT_POLICY", *NO_SPINNING, "KMP_LIBRARY")


class CacheCommand(click.Command):
    """A command whose errors name the cache in the `pipeline verify` they suggest: code below knows only a file of it.

    Refuses empty arguments, as an unset shell variable gives: they would select the default corpus or this folder.
    """

    def parse_args(self, ctx, args):
        before = ""
        for argument in args:
            name, is_empty, rest = argument.partition("=")
            if not argument or (is_empty and not rest and name.startswith("--")):
                named = name if argument else before
                of_option = f" of {named}" if named.startswith("-") else ""
                raise click.UsageError(f"the value{of_option} is empty; is the variable set that it comes from?", ctx)
            before = argument
        return super().parse_args(ctx, args)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except PipelineError as error:
            cache = ctx.params.get("out" if {"corpus", "source"} & ctx.params.keys() else "cache")
            named = f"`{shlex.join(['pipeline', 'verify', str(cache)])}`"
            error.args = (str(error).replace("`pipeline verify`", named) if cache else str(error),)
            raise


class InWorkflowOrder(click.Group):
    """A group that lists its commands in workflow order, not alphabetically."""

    command_class = CacheCommand

    def list_commands(self, ctx):
        return list(self.commands)


def _after_interrupt(arguments: list[str]) -> str:
    """Return what an interrupted command has left, and what running it again does."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    return AFTER_INTERRUPT.get(command, RESUMABLE)


def _exit_on_signal(number, frame):
    raise SystemExit(128 + number)


def run_and_exit(commands: click.Group, arguments: list[str]) -> None:
    """Run a command line and exit: 0 done, 1 a bug or a failed proof, 2-5 typed errors, 129 / 130 / 143 stopped."""
    debug = "--debug" in arguments
    protect_standard_streams()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _exit_on_signal)
    sys.excepthook = _print_traceback if debug else _print_bug
    _escape_library_output()
    try:
        commands.main(arguments, prog_name="pipeline", standalone_mode=False)
        sys.stdout.flush()
        if why := output_error():
            raise RoomError(f"standard output: {why}; all else is done: make room, or print it to another place")
    except (KeyboardInterrupt, click.exceptions.Abort):
        sys.exit(_print_error(f"interrupted; {_after_interrupt(arguments)}", 130, debug))
    except SystemExit as stop:
        number = next((number for number in STOP_SIGNALS if stop.code == 128 + number), None)
        if number is None:
            raise
        sys.exit(_print_error(f"stopped by {number.name}; {_after_interrupt(arguments)}", stop.code, debug))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "pipeline"
        sys.exit(_print_error(f"error: {error.format_message()} (`{command} --help` lists what there is)", 2, debug))
    except PipelineError as error:
        sys.exit(_print_error(f"error: {error}", error.code, debug))
    except (OSError, MemoryError, RuntimeError) as error:  # a limit of the machine is not a bug
        known = limit_error(getattr(error, "filename", None) or "the command stopped", error)
        if known is None:
            raise
        sys.exit(_print_error(f"error: {known}", known.code, debug))


def _print_bug(kind, error, trace):
    """Print an unexpected error as one line; Python then exits with 1."""
    print_visible(f"bug: {kind.__name__}: {visible(error)} (the trace: `pipeline --debug ...`)", err=True)


def _print_traceback(kind, error, trace):
    print_visible("".join(traceback.format_exception(kind, error, trace)), err=True)


def _escape_library_output() -> None:
    """Escape control characters in warnings and logs of libraries too: they may quote a model's config."""
    logging.setLogRecordFactory(_visible_record)
    warnings.formatwarning = _visible_warning


def _visible_record(*given, **named) -> logging.LogRecord:
    record = logging.LogRecord(*given, **named)
    record.msg, record.args = visible_lines(record.getMessage()), None
    return record


_format_warning = warnings.formatwarning


def _visible_warning(*given, **named) -> str:
    return visible_lines(_format_warning(*given, **named))


def _print_error(line: str, code: int, debug: bool) -> int:
    if debug:
        print_visible(traceback.format_exc(), err=True)
    print_visible(visible(line), err=True)
    return code


class _DroppingFile(io.FileIO):
    """The raw file of a standard stream. After a failed write output is dropped; `failed` is the first error."""

    failed: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = self.failed or error
            _open_devnull(self.fileno(), os.O_WRONLY)
            return len(data)


def protect_standard_streams() -> None:
    """Protect the standard streams; point closed ones at /dev/null, or other files would get their descriptors.

    Streams that were replaced, as tests do, stay.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        current, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if current is None and not _is_open(number):
            _open_devnull(number, os.O_WRONLY if number else os.O_RDONLY)
        if number and current is original:
            setattr(sys, name, _protected_stream(number, current))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _open_devnull(number: int, flags: int) -> None:
    """Point a descriptor at /dev/null."""
    null = os.open(os.devnull, flags)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    os.set_inheritable(number, True)


def _protected_stream(number: int, stream) -> io.TextIOWrapper:
    """Return a text stream on a descriptor, buffered as the stream that it replaces."""
    if stream is not None:
        stream.flush()
    raw = _DroppingFile(number, "w", closefd=False)
    # Escape what the encoding lacks: a lone surrogate of a file name, a letter on an ASCII terminal.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    lines = raw.isatty() or number == 2
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)


def output_error() -> str | None:
    """Return why standard output could not be written, None where it was or where its reader had closed it."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    failed = raw.failed if isinstance(raw, _DroppingFile) else None
    return None if failed is None or failed.errno in READER_GONE else failed.strerror


def disable_spin_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make waiting threads sleep, here and in child processes, unless the environment already sets a wait policy.

    Call it before torch is imported: the runtime reads the environment once, when it is loaded.
    """
    if not any(name in environment for name in WAIT_VARIABLES):
        environment.update(NO_SPINNING)
