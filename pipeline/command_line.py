"""How a command line runs and ends: help in workflow order, exit codes, signals.

An error becomes one line on standard error and an exit code; `--debug` also shows the traceback. What every process
that torchrun started on a machine hears, a signal or a wrong option, the first of them says.
"""

import atexit
import contextlib
import gc
import json
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import MutableMapping

import click

from pipeline import torchrun
from pipeline.errors import PipelineError, limit_error
from pipeline.examples import example_of
from pipeline.nearest_name import did_you_mean
from pipeline.option_types import NotThere
from pipeline.secret_masking import masked
from pipeline.standard_streams import check_standard_output, protect_standard_streams
from pipeline.visible_text import print_visible, visible, visible_lines

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # exit codes 143, and 129 for a terminal that was closed
RESUMABLE = "what is finished is kept, and the same command goes on from there"
NOTHING_WRITTEN = "nothing was written, and the same command starts again"
# Commands that write all or nothing; the others resume.
AFTER_INTERRUPT = dict.fromkeys(("inspect", "recipe", "export", "check-export", "report"), NOTHING_WRITTEN)
AFTER_INTERRUPT["regenerate"] = "every reply so far is kept, and the same command asks for the others"
AFTER_INTERRUPT["serve-check"] = "the engine is ended, no report was written, and the same command starts again"
AFTER_INTERRUPT["watch"] = "what was watched goes on"
AFTER_INTERRUPT["doctor"] = "nothing is left of its checks, and the same command starts again"
AFTER_INTERRUPT["evaluate"] = "no report was written, and the same command starts again"  # --plain may have its replies

# OpenMP's runtimes let a waiting thread spin for milliseconds. On a shared core it then displaces the very thread that
# it waits for: a capture on two cores beside one busy process took several times as long as with one thread. Measured
# by `tests/bench/busy.py`: on two quiet cores a spin count of 1,000 saves a few percent, beside a busy process it costs
# 10 to 20 %. GNU's runtime counts iterations, Intel's and LLVM's milliseconds.
NO_SPINNING = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
WAIT_VARIABLES = ("OMP_WAIT_POLICY", *NO_SPINNING, "KMP_LIBRARY")


class EndsWithExample(click.Command):
    """A command whose help ends with an example."""

    def format_epilog(self, ctx, formatter):
        example = example_of(ctx.command_path.partition(" ")[2])
        if example:
            with formatter.section("Example"):
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")  # unwrapped, to be pasted


class CacheCommand(EndsWithExample):
    """A command whose errors name the cache in the `pipeline verify` they suggest: the code within knows only a file.

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


class InWorkflowOrder(EndsWithExample, click.Group):
    """A group that lists its commands in workflow order, not alphabetically."""

    command_class, group_class = CacheCommand, type

    def list_commands(self, ctx):
        return list(self.commands)

    def resolve_command(self, ctx, args):
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise click.UsageError(f"No such command {name!r}{did_you_mean(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def _said_of(error: click.UsageError) -> str:
    """Return a usage error's text; of an unknown option with the nearest one there is, by our own rule."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return error.format_message().rstrip(".")
    there = [name for each in error.ctx.command.get_params(error.ctx) for name in (*each.opts, *each.secondary_opts)]
    named = [name for name in there if name.startswith("--")]  # an argument's name is no option
    return f"No such option {error.option_name!r}{did_you_mean(error.option_name, named)}"


def _after_interrupt(arguments: list[str]) -> str:
    """Return what an interrupted command has left, and what running it again does."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    return AFTER_INTERRUPT.get(command, RESUMABLE)


def _exit_on_signal(number, frame):
    raise SystemExit(128 + number)


def run_and_exit(commands: click.Group, arguments: list[str]) -> None:
    """Run a command line and exit: 0 done, 1 a bug or a failed proof, 2-5 typed errors, 129 / 130 / 143 stopped."""
    debug = "--debug" in arguments
    disable_spin_waiting()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # to look for them opens a file of every package
    atexit.register(gc.freeze)  # else the interpreter, as it ends, goes once more through all objects there are
    protect_standard_streams()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _exit_on_signal)
    sys.excepthook = _print_traceback if debug else _print_bug
    _escape_library_output()
    try:
        commands.main(arguments, prog_name="pipeline", standalone_mode=False)
        check_standard_output()
    except (KeyboardInterrupt, click.exceptions.Abort):
        sys.exit(_print_once(f"interrupted; {_after_interrupt(arguments)}", 130, debug))
    except SystemExit as stop:
        number = next((number for number in STOP_SIGNALS if stop.code == 128 + number), None)
        if number is None:
            raise
        sys.exit(_print_once(f"stopped by {number.name}; {_after_interrupt(arguments)}", stop.code, debug))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "pipeline"
        hint = "" if isinstance(error, NotThere) else f" (`{command} --help` lists what there is)"
        sys.exit(_print_once(f"error: {_said_of(error)}{hint}", 2, debug))
    except PipelineError as error:
        sys.exit(_print_error(f"error: {error}", error.code, debug))
    except (OSError, MemoryError, RuntimeError) as error:  # a limit of the machine is not a bug
        known = limit_error(getattr(error, "filename", None) or "the command stopped", error)
        if known is None:
            raise
        sys.exit(_print_error(f"error: {known}", known.code, debug))


def _print_bug(kind, error, trace):
    """Print an unexpected error as one line; Python then exits with 1."""
    print_visible(f"bug: {kind.__name__}: {visible(masked(error))} (the trace: `pipeline --debug ...`)", err=True)


def _print_traceback(kind, error, trace):
    print_visible(masked("".join(traceback.format_exception(kind, error, trace))), err=True)


_format_warning = warnings.formatwarning


def _escape_library_output() -> None:
    """Escape control characters in warnings and logs of libraries too: they may quote a model's config."""
    logging.setLogRecordFactory(_visible_record)
    warnings.formatwarning = lambda *given, **named: visible_lines(_format_warning(*given, **named))


def _visible_record(*given, **named) -> logging.LogRecord:
    record = logging.LogRecord(*given, **named)
    record.msg, record.args = visible_lines(record.getMessage()), None
    return record


def _print_once(line: str, code: int, debug: bool) -> int:
    """As `_print_error`, of what all ranks of a machine hear."""
    return _print_error(line, code, debug) if torchrun.speaks() else code


def _print_error(line: str, code: int, debug: bool) -> int:
    if debug:
        print_visible(masked(traceback.format_exc()), err=True)
    print_visible(visible(masked(line)), err=True)
    return code


def disable_spin_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make waiting threads sleep, here and in child processes, unless the environment already sets a wait policy.

    Call it before torch is imported: the runtime reads the environment once, when it is loaded.
    """
    if not any(name in environment for name in WAIT_VARIABLES):
        environment.update(NO_SPINNING)


def only_json(as_json: bool):
    """Send what a command says of its progress to standard error, where standard output is for JSON."""
    return contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout)


def show(report: dict, as_json: bool, table) -> None:
    """Print a report as JSON, or as the table that `table(report)` returns."""
    if as_json:
        print_visible(json.dumps(report, indent=2, default=str).replace("\x7f", "\\u007f"))  # JSON does not escape DEL
    else:
        from pipeline.visible_tables import VisibleConsole  # brings rich, which no help needs

        VisibleConsole().print(table(report))
