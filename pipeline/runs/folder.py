"""The files in a run's folder: what the run is, its recipe, its result. Read by training, `evaluate` and `export`.

    RUN/run.json       cache, target, versions, command line, and size and checksum of recipe.toml
        recipe.toml    the resolved recipe
        done.json      the result, and the checksum of the checkpoint it belongs to
        checkpoints/   see pipeline/runs/checkpoint.py

The JSON files hold a checksum of themselves (checksummed_json.py), which is verified before use; those of version 0.5.0
and earlier have none.
"""

from pathlib import Path

from pipeline.cache.atomic import write_file
from pipeline.cache.manifest import FileFact, has_form
from pipeline.checksummed_json import damage_error, read_record, record_bytes
from pipeline.errors import CacheError, UsageError
from pipeline.runs.checkpoint import CONFIG, DRAFT, STATE, checkpoint_folder, open_checkpoint
from pipeline.runs.recipe import Recipe, load_recipe
from pipeline.untrusted import read_file

RUN, RECIPE, DONE = "run.json", "recipe.toml", "done.json"
FILE_SCHEMA = {"size": int, "xxh3": str}
RUN_SCHEMA = {"cache": {"path": str, "digest": str, "rounded": [str]}, "split": {"digest": str}, "target": str}
RUN_SCHEMA |= {"versions": {str: str}, "machine?": {str: str}, "recipe?": FILE_SCHEMA}
FIGURES_SCHEMA = {"prompts": int, "accept_len": float, "interval": [float], "calls": int, "per_slot": [float]}
RESULT_SCHEMA = {"steps": int, "parameters": int, "accept_len": object, "eval": object, "state?": FILE_SCHEMA}
MAX_RECIPE = 1 << 20  # bytes
PUT_BACK = "put it back as it was, or train into another --out"
MAKE_AGAIN = "remove it: the same `pipeline train-draft` makes it again from the newest checkpoint"


def write_run(run: Path, facts: dict, recipe: str) -> None:
    """Write run.json, then recipe.toml: a folder with a recipe.toml is a run's."""
    write_file(run / RUN, record_bytes(facts | {"recipe": FileFact.of_bytes(recipe.encode()).as_dict()}))
    write_file(run / RECIPE, recipe.encode())


def read_run(run: Path) -> dict:
    """Return the contents of a run's run.json. Raises CacheError when it is damaged."""
    return read_record(run / RUN, RUN_SCHEMA, PUT_BACK)


def read_recipe(run: Path) -> Recipe:
    """Return a run's recipe. Raises CacheError when recipe.toml differs from what run.json records."""
    path, wanted = run / RECIPE, read_run(run).get("recipe")
    try:
        found = FileFact.of_bytes(read_file(path, MAX_RECIPE)).as_dict()
    except (OSError, ValueError) as error:
        raise damage_error(path, error, PUT_BACK) from None
    if wanted not in (None, found):
        raise CacheError(f"{path}: damaged, it is not what {RUN} says; {PUT_BACK}")
    try:
        return load_recipe(path)
    except UsageError as error:
        raise CacheError(f"{error}, and a run's own recipe is as it was written; {PUT_BACK}") from None


def write_result(run: Path, result: dict) -> None:
    """Write done.json, which marks a run as finished. Its last checkpoint must be on disk."""
    state = FileFact.of_file(checkpoint_folder(run, result["steps"]) / STATE).as_dict()
    write_file(run / DONE, record_bytes(result | {"state": state}))


def read_result(run: Path) -> dict | None:
    """Return the result of a finished run; None while it is unfinished, or when the result's checkpoint is missing.

    Raises CacheError when the result or the draft in that checkpoint is damaged.
    """
    path = run / DONE
    if not path.exists():
        return None
    result = read_record(path, RESULT_SCHEMA, MAKE_AGAIN)
    figures = result["eval"]
    schema = FIGURES_SCHEMA | {"domains": {str: FIGURES_SCHEMA}, "replies?": [[int]]}
    if figures is not None and not has_form(figures, schema):
        raise CacheError(f"{path}: damaged, its figures are none; {MAKE_AGAIN}")
    folder = checkpoint_folder(run, result["steps"])
    if not folder.exists():
        return None
    open_checkpoint(folder, (CONFIG, DRAFT))
    if result.pop("state", None) not in (None, FileFact.of_file(folder / STATE).as_dict()):
        raise CacheError(f"{path}: the result of another checkpoint than {folder.name}; {MAKE_AGAIN}")
    return result
