"""How a command ends: with an exit code and, unless it is done, one line that says what was found and what to do.

The whole trace is shown with `--debug`.
"""

import logging
import shlex
import signal
import sys
import traceback
import warnings

import click

from pipeline.errors import PipelineError, RoomError
from pipeline.os_errors import limit
from pipeline.standard_streams import lost_output, outlive_readers
from pipeline.visible_text import say, visible, visible_lines

ENDING = (signal.SIGTERM, signal.SIGHUP)  # exit codes 143, and 129 for a terminal that was closed
GOES_ON = "what is finished is kept, and the same command goes on from there"
NOTHING = "nothing was written, and the same command starts again"
INTERRUPTED = dict.fromkeys(("inspect", "export", "check-export", "report"), NOTHING)  # done or not done; others go on
INTERRUPTED["regenerate"] = "every reply so far is kept, and the same command asks for the others"
INTERRUPTED["evaluate"] = "no report was written, and the same command starts again"  # --plain may have its replies


class OnACache(click.Command):
    """Names the cache in what an error says to run: what finds damage often knows no more than a file of it.

    Refuses empty arguments: of a variable that is not set they would mean the default corpus, or this folder.
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


def _kept(arguments: list[str]) -> str:
    """Return what of a command that was stopped is there, and what the same command does then."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    return INTERRUPTED.get(command, GOES_ON)


def _stopped(number, frame):
    raise SystemExit(128 + number)


def run_and_exit(commands: click.Group, arguments: list[str]) -> None:
    """Run a command line and exit: 0 done, 1 a bug or a failed proof, 2-5 typed errors, 129 / 130 / 143 stopped."""
    debug = "--debug" in arguments
    outlive_readers()
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _stopped)
    sys.excepthook = _traced if debug else _bug
    _show_what_others_say()
    try:
        commands.main(arguments, prog_name="pipeline", standalone_mode=False)
        sys.stdout.flush()
        if why := lost_output():
            raise RoomError(f"standard output: {why}; all else is done: make room, or print it to another place")
    except (KeyboardInterrupt, click.exceptions.Abort):
        sys.exit(_complain(f"interrupted; {_kept(arguments)}", 130, debug))
    except SystemExit as stop:
        number = next((number for number in ENDING if stop.code == 128 + number), None)
        if number is None:
            raise
        sys.exit(_complain(f"stopped by {number.name}; {_kept(arguments)}", stop.code, debug))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "pipeline"
        sys.exit(_complain(f"error: {error.format_message()} (`{command} --help` lists what there is)", 2, debug))
    except PipelineError as error:
        sys.exit(_complain(f"error: {error}", error.code, debug))
    except (OSError, MemoryError, RuntimeError) as error:  # a limit of the machine is no bug
        met = limit(getattr(error, "filename", None) or "the command stopped", error)
        if met is None:
            raise
        sys.exit(_complain(f"error: {met}", met.code, debug))


def _bug(kind, error, trace):
    """What nobody foresaw, in one line; Python then exits with 1."""
    say(f"bug: {kind.__name__}: {visible(error)} (the trace: `pipeline --debug ...`)", err=True)


def _traced(kind, error, trace):
    say("".join(traceback.format_exception(kind, error, trace)), err=True)


def _show_what_others_say() -> None:
    """Have the warnings and logs of libraries, which may quote a model's config, steer no terminal either."""
    logging.setLogRecordFactory(_visible_record)
    warnings.formatwarning = _visible_warning


def _visible_record(*given, **named) -> logging.LogRecord:
    record = logging.LogRecord(*given, **named)
    record.msg, record.args = visible_lines(record.getMessage()), None
    return record


_format_warning = warnings.formatwarning


def _visible_warning(*given, **named) -> str:
    return visible_lines(_format_warning(*given, **named))


def _complain(line: str, code: int, debug: bool) -> int:
    if debug:
        say(traceback.format_exc(), err=True)
    say(visible(line), err=True)
    return code
