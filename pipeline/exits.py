"""How a command ends: with an exit code and, unless it is done, one line that says what was found and what to do.

The whole trace is shown with `--debug`.
"""

import os
import shlex
import signal
import sys
import traceback

import click

from pipeline.errors import PipelineError
from pipeline.visible import visible

TERMINATED = 128 + signal.SIGTERM
GOES_ON = "what is finished is kept, and the same command goes on from there"
NOTHING = "nothing was written, and the same command starts again"
INTERRUPTED = dict.fromkeys(("inspect", "export", "check-export", "report"), NOTHING)  # done or not done; others go on
INTERRUPTED["evaluate"] = "no report was written, and the same command starts again"  # --plain may have its replies


class OnACache(click.Command):
    """Names the cache in what an error says to run: what finds damage often knows no more than a file of it."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except PipelineError as error:
            cache = ctx.params.get("out" if {"corpus", "source"} & ctx.params.keys() else "cache")
            named = f"`{shlex.join(['pipeline', 'verify', str(cache)])}`"
            error.args = (str(error).replace("`pipeline verify`", named) if cache else str(error),)
            raise


def _stopped(signum, frame):
    raise SystemExit(TERMINATED)


def run_and_exit(commands: click.Group, arguments: list[str]) -> None:
    """Run a command line and exit: 0 done, 1 a bug or a failed proof, 2-5 typed errors, 130 / 143 interrupted."""
    debug = "--debug" in arguments
    signal.signal(signal.SIGTERM, _stopped)
    sys.excepthook = sys.__excepthook__ if debug else _bug
    try:
        commands.main(arguments, prog_name="pipeline", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.exceptions.Abort):
        command = next((argument for argument in arguments if not argument.startswith("-")), "")
        sys.exit(_complain(f"interrupted; {INTERRUPTED.get(command, GOES_ON)}", 130, debug))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "pipeline"
        sys.exit(_complain(f"error: {error.format_message()} (`{command} --help` lists what there is)", 2, debug))
    except PipelineError as error:
        sys.exit(_complain(f"error: {error}", error.code, debug))
    except BrokenPipeError:  # the reader of our output, `head` say, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _bug(kind, error, trace):
    """What nobody foresaw, in one line; Python then exits with 1."""
    click.echo(f"bug: {kind.__name__}: {visible(str(error))} (the trace: `pipeline --debug ...`)", err=True)


def _complain(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(visible(line), err=True)
    return code
