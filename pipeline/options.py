"""What commands share of their options: kinds of paths, and everything that decides what a cache holds."""

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


class FolderPath(click.Path):
    """A path at which nothing lies, or a folder: a pipe is neither, and waits for whoever opens it."""

    def convert(self, value, param, ctx) -> Path:
        path = super().convert(value, param, ctx)
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            self.fail(f"Directory {str(path)!r} is no folder.", param, ctx)
        return path


FOLDER = FolderPath(file_okay=False, path_type=Path)
REPORT = click.Path(exists=True, dir_okay=False, path_type=Path)


def capture_options(command):
    """The options that `plan` and `cache-hidden` share: everything that decides what a cache holds."""
    for option in reversed(
        [
            click.option("--model", required=True, help="Target: a hub name or a folder."),
            click.option(
                "--corpus",
                help="JSONL or Parquet, a folder of them, or a hub data set.  "
                "[default: the chats beside a bundled target, else mlabonne/open-perfectblend]",
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
            click.option("--max-samples", type=click.IntRange(1), help="Stop reading the corpus there."),
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
