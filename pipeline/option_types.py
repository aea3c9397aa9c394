"""The types of options' values. What has to be there and is not is told at once: to import a stage takes seconds."""

import os
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from pipeline.bundled_files import bundled_recipes, no_recipe
from pipeline.completion import complete_codecs
from pipeline.errors import UsageError, is_present
from pipeline.nearest_name import did_you_mean

PATH = click.Path(path_type=Path)


class NotThere(click.UsageError):
    """An error of a path that has to be there: it says all, and the command's help would not."""


def _refuse_alone(message: str, ctx) -> None:
    """Tell what is not there, but in a rank of several, which may be the only one to miss it: the stage tells all."""
    if "RANK" not in os.environ:
        raise NotThere(message, ctx)


class FolderPath(click.Path):
    """A folder, or a path that does not exist. Refuses pipes too, on which opening would block."""

    def convert(self, value, param, ctx) -> Path:
        path = super().convert(value, param, ctx)
        if (is_present(path) or path.is_symlink()) and not path.is_dir():
            self.fail(f"Directory {str(path)!r} is no folder.", param, ctx)
        return path


FOLDER = FolderPath(file_okay=False, path_type=Path)


class CacheFolder(FolderPath):
    """The folder of a cache that is there."""

    def convert(self, value, param, ctx) -> Path:
        from pipeline.cache.layout import check_exists

        path = super().convert(value, param, ctx)
        try:
            check_exists(path)
        except UsageError as error:
            _refuse_alone(str(error), ctx)
        return path


CACHE_FOLDER = CacheFolder(file_okay=False, path_type=Path)


class PresentPath(click.Path):
    """A path that is there. remedy: what to name, where it is not."""

    def __init__(self, remedy: str):
        super().__init__(path_type=Path)
        self.remedy = remedy

    def convert(self, value, param, ctx) -> Path:
        path = super().convert(value, param, ctx)
        if not is_present(path):
            _refuse_alone(f"nothing is at {path}; {self.remedy}", ctx)
        return path


DRAFT = PresentPath("name a run, or train one with `pipeline train-draft`")
EXPORTED = PresentPath("name a folder that `pipeline export` wrote")
PUBLISHED = PresentPath("name a folder that holds a published draft")
EXAMINED = PresentPath("name a run, a report of `pipeline evaluate --out` or a cache")


class RecipePath(click.Path):
    """A recipe's file, or the name of a bundled recipe by itself, such as `domino`."""

    def convert(self, value, param, ctx) -> Path:
        path = super().convert(value, param, ctx)
        found = path if is_present(path) else bundled_recipes().get(str(path))
        if found is None:
            _refuse_alone(no_recipe(path), ctx)
        return found or path

    def shell_complete(self, ctx, param, incomplete) -> list:
        names = [CompletionItem(name) for name in bundled_recipes() if name.startswith(incomplete)]
        return names + super().shell_complete(ctx, param, incomplete)


RECIPE = RecipePath(path_type=Path)
REPORT = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)


class Choice(click.Choice):
    """One of a few words. An error also says which of them may have been meant."""

    def get_invalid_choice_message(self, value, ctx):
        said = super().get_invalid_choice_message(value, ctx)
        return said.rstrip(".") + did_you_mean(value, map(str, self.choices))


class CodecOption(click.Option):
    """`--codec`, whose help names the codecs there are: they are imported where it is shown."""

    def get_help_record(self, ctx) -> tuple[str, str]:
        from pipeline.cache.codecs import CODECS

        *names, last = CODECS
        option, text = super().get_help_record(ctx)
        return option, f"{', '.join(names)} or {last}, {text}"

    def shell_complete(self, ctx, incomplete) -> list:
        return complete_codecs(incomplete)
