"""What commands share of their options: kinds of paths, and everything that decides what a cache holds."""

import json
from pathlib import Path

import click

from pipeline.errors import UsageError

PATH = click.Path(path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
REPORT = click.Path(exists=True, dir_okay=False, path_type=Path)


def json_object(option: str, given: str | None) -> dict:
    """Return the object that an option states as JSON, an empty one where it is left out. UsageError for others."""
    try:
        found = json.loads(given) if given else {}
    except ValueError as error:
        raise UsageError(f"{option} {given}: no JSON ({error}); wanted an object, such as {{}}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{option} {given}: no JSON object; wanted one such as {{}}")
    return found


def capture_options(command):
    """The options that `plan` and `cache-hidden` share: everything that decides what a cache holds."""
    for option in reversed(
        [
            click.option("--model", required=True, help="Target: a hub name or a folder."),
            click.option(
                "--corpus",
                help="JSON, JSONL, Parquet or Arrow, a folder of them, or a hub data set.  "
                "[default: the chats beside a bundled target, else mlabonne/open-perfectblend]",
            ),
            click.option(
                "--roles",
                multiple=True,
                metavar="A=B",
                callback=lambda ctx, option, pairs: ",".join(pairs) or None,
                help="Who is called A in CORPUS speaks as B, such as bard=assistant. May be given again.",
            ),
            click.option("--out", type=FOLDER, default="hs_cache", show_default=True, help="The cache's folder."),
            click.option("--layers", help="Layers to keep, such as 1,9,17 (0 is the first, -1 the input)."),
            click.option(
                "--taps",
                type=click.IntRange(1),
                help="How many layers, evenly placed.  [default: 5; fewer of a shallow target]",
            ),
            click.option(
                "--final",
                type=click.Choice(["needed", "all", "none"]),
                help="Rows whose final state is kept.  [default: needed]",
            ),
            click.option(
                "--max-length",
                type=click.IntRange(2),
                help="Tokens a sample.  [default: 3072, or the target's positions if fewer]",
            ),
            click.option(
                "--turns",
                type=click.Choice(["last", "each"]),
                help="Samples of a conversation whose template rewrites earlier turns: one, of the last turn, or one "
                "for each turn behind the prompt it was answered to.  [default: each, where last loses over 5%]",
            ),
            click.option(
                "--template-kwargs",
                metavar="JSON",
                help="Arguments of the chat template, such as '{\"enable_thinking\": false}'.",
            ),
            click.option(
                "--template-date", metavar="DAY", help="The day that templates are told.  [default: 2024-07-26]"
            ),
            click.option(
                "--max-samples", type=click.IntRange(1), help="Stop reading the corpus after so many conversations."
            ),
            click.option("--batch-tokens", type=click.IntRange(1), help="Padded tokens a forward.  [default: 4096]"),
            click.option("--budget", metavar="SIZE", help="Bytes it may take, such as 2TB or 1.5TiB."),
            click.option("--methods", help="Whose drafts will be trained, for the budget.  [default: all]"),
            click.option(
                "--seed",
                type=click.IntRange(0, 2**64 - 1),
                default=0,
                show_default=True,
                help="Which samples a budget takes.",
            ),
            click.option("--codec", help="raw, zstd or int8, or such as aux=int8,final=zstd.  [default: raw]"),
            click.option("--device", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]"),
            click.option(
                "--dtype",
                type=click.Choice(["bfloat16", "float32"]),
                help="Compute type.  [default: float32 on a CPU, else the target's]",
            ),
            click.option("--revision", help="Revision of a hub model."),
            click.option("--append", is_flag=True, help="Add CORPUS to the cache: the samples that are not there yet."),
        ]
    ):
        command = option(command)
    return command
