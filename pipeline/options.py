"""Command-line options: path types, the capture options that commands share, and those of `regenerate`."""

from collections.abc import Callable
from pathlib import Path

import click
from click import Choice, FloatRange, IntRange, option

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
DEVICE = option("--device", help="cpu, cuda ...  [default: cuda if there is one]")
CACHE = click.argument("cache", type=FOLDER, default="hs_cache")


def together(*options: Callable) -> Callable:
    """Return one decorator for several options, which a command's help lists in this order."""

    def decorate(command):
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


# Of `plan` and `cache-hidden`: everything that decides what a cache holds.
capture_options = together(
    option("--model", required=True, help="Target: a hub name or a folder."),
    option(
        "--corpus",
        help="JSON, JSONL, Parquet or Arrow, a folder of them, or a hub data set.  "
        "[default: the chats beside a bundled target, else mlabonne/open-perfectblend]",
    ),
    ROLES,
    option("--out", type=FOLDER, default="hs_cache", show_default=True, help="The cache's folder."),
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
    option("--template-date", metavar="DAY", help="The day that templates are told.  [default: 2024-07-26]"),
    option("--max-samples", type=IntRange(1), help="Stop reading the corpus after so many conversations."),
    option("--batch-tokens", type=IntRange(1), help="Padded tokens a forward.  [default: 4096]"),
    option("--budget", metavar="SIZE", help="Bytes the cache may take, such as 2TB or 1.5TiB."),
    option(
        "--methods", help="What will be trained, such as dflash,domino: a budget keeps what these read.  [default: all]"
    ),
    option(
        "--seed",
        type=IntRange(0, 2**64 - 1),
        default=0,
        show_default=True,
        help="Decides which samples a budget takes.",
    ),
    option("--codec", cls=CodecOption, help="or such as aux=int8,final=zstd.  [default: raw]"),
    option("--device", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]"),
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
    option("--api-key-env", default="OPENAI_API_KEY", show_default=True, help="The variable that holds the key."),
    option(
        "--temperature", type=float, default=0.0, show_default=True, help="At which replies are drawn; 0 is greedy."
    ),
    option(
        "--top-p",
        type=float,
        default=1.0,
        show_default=True,
        help="Draw only from the likeliest tokens, up to this share of probability.",
    ),
    option("--seed", type=IntRange(0), default=0, show_default=True, help="Decides what is drawn."),
    option("--max-new", type=IntRange(1), default=2048, show_default=True, help="Tokens a reply at most."),
    TEMPLATE_KWARGS,
    option("--template-date", metavar="DAY", help="The day that the template is told.  [default: 2024-07-26]"),
    option("--max-samples", type=IntRange(1), help="Stop reading the corpus after so many rows."),
    option("--no-token-ids", is_flag=True, help="Leave the tokens' ids out of the corpus."),
    option("--concurrency", type=IntRange(1), default=32, show_default=True, help="Requests at once."),
    option("--rate", type=FloatRange(0, min_open=True), help="Requests a minute at most."),
    option("--retries", type=IntRange(0), default=8, show_default=True, help="How often a prompt is asked again."),
    option(
        "--timeout",
        type=FloatRange(0, min_open=True),
        default=600.0,
        show_default=True,
        help="Seconds to wait for a reply.",
    ),
    option("--batch", type=IntRange(1), default=64, show_default=True, help="Prompts decoded here at once."),
    DEVICE,
    option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)
