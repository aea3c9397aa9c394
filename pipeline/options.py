"""What all commands share: their options, the order of help, exit codes, and signals.

An error becomes one line on standard error and an exit code; `--debug` also shows the traceback. What every process
that torchrun started on a machine hears, a signal or a wrong option, the first of them says.
"""

import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, MutableMapping
from functools import reduce
from pathlib import Path

import click
from click import Choice, FloatRange, IntRange, option

from pipeline import torchrun
from pipeline.errors import PipelineError, limit_error
from pipeline.standard_streams import check_standard_output, protect_standard_streams
from pipeline.visible_text import print_visible, visible, visible_lines

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # exit codes 143, and 129 for a terminal that was closed
RESUMABLE = "what is finished is kept, and the same command goes on from there"
NOTHING_WRITTEN = "nothing was written, and the same command starts again"
# Commands that write all or nothing; the others resume.
AFTER_INTERRUPT = dict.fromkeys(("inspect", "export", "check-export", "report"), NOTHING_WRITTEN)
AFTER_INTERRUPT["regenerate"] = "every reply so far is kept, and the same command asks for the others"
AFTER_INTERRUPT["evaluate"] = "no report was written, and the same command starts again"  # --plain may have its replies

# OpenMP's runtimes let a waiting thread spin for milliseconds. On a shared core it then displaces the very thread that
# it waits for: a capture on two cores beside one busy process took several times as long as with one thread. Measured
# by `tests/bench/busy.py`: on two quiet cores a spin count of 1,000 saves a few percent, beside a busy process it costs
# 10 to 20 %. GNU's runtime counts iterations, Intel's and LLVM's milliseconds.
NO_SPINNING = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
WAIT_VARIABLES = ("OMP_WAIT_POLICY", *NO_SPINNING, "KMP_LIBRARY")

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
PATH = click.Path(path_type=Path)


class FolderPath(click.Path):
    """A folder, or a path that does not exist. Refuses pipes too, on which opening would block."""

    def convert(self, value, param, ctx) -> Path:
        path = super().convert(value, param, ctx)
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            self.fail(f"Directory {str(path)!r} is no folder.", param, ctx)
        return path


FOLDER = FolderPath(file_okay=False, path_type=Path)
REPORT = click.Path(exists=True, dir_okay=False, path_type=Path)


class CodecOption(click.Option):
    """`--codec`, whose help names the codecs there are: they are imported where it is shown."""

    def get_help_record(self, ctx) -> tuple[str, str]:
        from pipeline.cache.codecs import CODECS

        *names, last = CODECS
        option, text = super().get_help_record(ctx)
        return option, f"{', '.join(names)} or {last}, {text}"


ROLES = option(
    "--roles",
    multiple=True,
    metavar="A=B",
    callback=lambda ctx, option, pairs: ",".join(pairs) or None,
    help="Read the role A of CORPUS as B, such as bard=assistant; may be repeated.",
)
TEMPLATE_KWARGS = option(
    "--template-kwargs", metavar="JSON", help="Arguments of the chat template, such as '{\"enable_thinking\": false}'."
)
TEMPLATE_DATE = option("--template-date", metavar="DAY", help="The day that templates are told.  [default: 2024-07-26]")
DEVICE = option("--device", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")
DEVICE_MAP = option("--device-map", metavar="MAP", help="Spread the target over devices: auto, or JSON by module.")
CACHE = click.argument("cache", type=FOLDER, default="hs_cache")


def together(*options: Callable) -> Callable:
    """Return one decorator for several options, which a command's help lists in this order."""
    return lambda command: reduce(lambda decorated, each: each(decorated), reversed(options), command)


# Of `plan` alone.
plan_options = together(
    option("--probe", is_flag=True, help="Run target and disk for a moment, to say how long a capture takes."),
    option("--train", type=PATH, metavar="RECIPE", help="Say what memory a training by this recipe needs, too."),
    option("--device-memory", metavar="SIZE", help="A device's, such as 24GiB. What fits of a capture, of a step?"),
    option("--json", "as_json", is_flag=True, help="Print the plan as JSON."),
)
# Of `plan` and `cache-hidden`: everything that decides what a cache holds.
capture_options = together(
    option("--model", required=True, help="Target: a hub name or a folder."),
    option(
        "--corpus",
        help="JSON, JSONL, Parquet or Arrow, a folder of them, or a hub data set.  "
        "[default: the chats beside a bundled target, else mlabonne/open-perfectblend]",
    ),
    ROLES,
    option("--out", type=FOLDER, default="hs_cache", help="The cache's folder."),
    option("--layers", help="Layers to keep, such as 1,9,17 (0 is the first, -1 the input)."),
    option("--taps", type=IntRange(1), help="How many layers, evenly placed.  [default: 5; fewer of a shallow target]"),
    option(
        "--final", type=Choice(["needed", "all", "none"]), help="Rows whose final state is kept.  [default: needed]"
    ),
    option(
        "--max-length", type=IntRange(2), help="Tokens a sample.  [default: 3072, or the target's positions if fewer]"
    ),
    option(
        "--turns",
        type=Choice(["last", "each"]),
        help="Samples of a conversation whose template rewrites earlier turns: one, of the last turn, or one "
        "for each turn behind the prompt it was answered to.  [default: each, where last loses over 5%]",
    ),
    TEMPLATE_KWARGS,
    TEMPLATE_DATE,
    option("--max-samples", type=IntRange(1), help="Stop reading the corpus after so many conversations."),
    option("--batch-tokens", type=IntRange(1), help="Padded tokens a forward.  [default: 4096]"),
    option("--budget", metavar="SIZE", help="Bytes the cache may take, such as 2TB or 1.5TiB."),
    option(
        "--methods", help="What will be trained, such as dflash,domino: a budget keeps what these read.  [default: all]"
    ),
    option("--seed", type=IntRange(0, 2**64 - 1), default=0, help="Decides which samples a budget takes."),
    option("--codec", cls=CodecOption, help="or such as aux=int8,final=zstd.  [default: raw]"),
    DEVICE,
    option(
        "--dtype",
        type=Choice(["bfloat16", "float32"]),
        help="Compute type.  [default: float32 on a CPU, else the target's]",
    ),
    option("--revision", help="Revision of a hub model."),
    option("--append", is_flag=True, help="Add CORPUS to the cache: the samples that are not there yet."),
)
# Of `regenerate`: prompts, engine, sampling and request limits.
regenerate_options = together(
    option("--corpus", required=True, help="Conversations or prompts: files, a folder or a data set."),
    ROLES,
    option("--out", type=PATH, required=True, help="The corpus to write; its name ends with .jsonl."),
    option("--endpoint", metavar="URL", help="An OpenAI-compatible server that runs the target."),
    option("--model", help="The target's files: decodes here; with --endpoint, compares prompts."),
    option("--served-model", help="The server's name of the target.  [default: the only one it lists]"),
    option("--engine", type=Choice(["vllm", "sglang", "openai"]), help="The server's kind.  [default: as it says]"),
    option("--api-key-env", default="OPENAI_API_KEY", help="The variable that holds the key."),
    option("--temperature", type=float, default=0.0, help="At which replies are drawn; 0 is greedy."),
    option(
        "--top-p", type=float, default=1.0, help="Draw only from the likeliest tokens, up to this share of probability."
    ),
    option("--seed", type=IntRange(0), default=0, help="Decides what is drawn."),
    option("--max-new", type=IntRange(1), default=2048, help="Tokens a reply at most."),
    TEMPLATE_KWARGS,
    TEMPLATE_DATE,
    option("--max-samples", type=IntRange(1), help="Stop reading the corpus after so many rows."),
    option("--no-token-ids", is_flag=True, help="Leave the tokens' ids out of the corpus."),
    option("--concurrency", type=IntRange(1), default=32, help="Requests at once."),
    option("--rate", type=FloatRange(0, min_open=True), help="Requests a minute at most."),
    option("--retries", type=IntRange(0), default=8, help="How often a prompt is asked again."),
    option("--timeout", type=FloatRange(0, min_open=True), default=600.0, help="Seconds to wait for a reply."),
    option("--batch", type=IntRange(1), default=64, help="Prompts decoded here at once."),
    DEVICE,
    option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)

import_options = together(
    click.argument("source", type=FOLDER),
    option("--out", type=FOLDER, default="hs_cache", help="The cache's folder."),
    option("--model", help="The target that made the states: a folder, or a hub name."),
    option("--layers", help="The layers in the files, in their order and counting, where no file names them."),
    option(
        "--count-from",
        type=Choice([0, 1]),
        help="What the first decoder layer's output is called there.  [default: as it proves]",
    ),
    option(
        "--last",
        type=Choice(["normed", "raw", "none"]),
        help="The last state in the files: after the norm, before it, or not to be kept.  [default: as it proves]",
    ),
    option("--masks", type=FOLDER, help="speculators' prepared data set, which has the loss masks."),
    option("--unproven", is_flag=True, help="Compute nothing: take what is said of the files for true."),
    DEVICE,
)

evaluate_options = together(
    option("--draft", type=PATH, required=True, help="A run's folder, a checkpoint or an exported folder."),
    option("--model", help="The target.  [default: the one the cache was made with]"),
    option("--cache", type=FOLDER, help="The cache.  [default: the one the draft was trained on]"),
    option("--prompts", type=PATH, help="JSONL of messages.  [default: the cache's held-out split]"),
    option("--count", type=IntRange(1), default=64, help="Prompts, spread over domains."),
    option("--max-new", type=IntRange(1), default=64, help="Tokens a reply at most."),
    option("--temperature", type=float, default=0.0, help="Also draw replies, at this one."),
    option("--draft-temperature", type=float, help="Of the draft; 0 is greedy.  [default: the same]"),
    option("--seed", default=0, help="Decides what is drawn."),
    option("--threshold", type=FloatRange(0, 1), default=0.0, help="Cut blocks below this confidence."),
    option("--batch", type=IntRange(1), default=1, help="Prompts decoded at once."),
    option("--plain", type=PATH, help="Keep the target's own replies here, for other drafts."),
    DEVICE,
    option("--out", type=PATH, help="Write the report here, as JSON."),
    option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)


class CacheCommand(click.Command):
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
    disable_spin_waiting()
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
        sys.exit(_print_once(f"error: {error.format_message()} (`{command} --help` lists what there is)", 2, debug))
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
        print_visible(traceback.format_exc(), err=True)
    print_visible(visible(line), err=True)
    return code


def disable_spin_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make waiting threads sleep, here and in child processes, unless the environment already sets a wait policy.

    Call it before torch is imported: the runtime reads the environment once, when it is loaded.
    """
    if not any(name in environment for name in WAIT_VARIABLES):
        environment.update(NO_SPINNING)
