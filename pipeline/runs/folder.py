"""What the folder of a run says: what the run is, its recipe, its result. Read by training, `evaluate` and `export`.

    RUN/run.json       cache, target, versions, command line, and size and digest of recipe.toml; a record
        recipe.toml    the resolved recipe
        done.json      the result, and the checkpoint it is the result of; a record
        checkpoints/   see pipeline/runs/checkpoint.py

Each is checked before it is believed. Those of version 0.5.0 and earlier have nothing to be checked by.
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
FACT = {"size": int, "xxh3": str}
FORM = {"cache": {"path": str, "digest": str, "rounded": [str]}, "split": {"digest": str}, "target": str}
FORM |= {"versions": {str: str}, "machine?": {str: str}, "recipe?": FACT}
FIGURES = {"prompts": int, "accept_len": float, "interval": [float], "calls": int, "per_slot": [float]}
RESULT = {"steps": int, "parameters": int, "accept_len": object, "eval": object, "state?": FACT}
MOST_RECIPE = 1 << 20  # bytes
PUT_BACK = "put it back as it was, or train into another --out"
MAKE_AGAIN = "remove it: the same `pipeline train-draft` makes it again from the newest checkpoint"


def write_run(run: Path, facts: dict, recipe: str) -> None:
    """Write what a run is. The recipe comes last: with it the folder is a run's."""
    write_file(run / RUN, record_bytes(facts | {"recipe": FileFact.of_bytes(recipe.encode()).as_dict()}))
    write_file(run / RECIPE, recipe.encode())


def read_run(run: Path) -> dict:
    """Return what a run's folder says the run is. CacheError when that is damaged."""
    return read_record(run / RUN, FORM, PUT_BACK)


def read_recipe(run: Path) -> Recipe:
    """Return a run's recipe. CacheError when it is not the one that the run began with."""
    path, wanted = run / RECIPE, read_run(run).get("recipe")
    try:
        found = FileFact.of_bytes(read_file(path, MOST_RECIPE)).as_dict()
    except (OSError, ValueError) as error:
        raise damage_error(path, error, PUT_BACK) from None
    if wanted not in (None, found):
        raise CacheError(f"{path}: damaged, it is not what {RUN} says; {PUT_BACK}")
    try:
        return load_recipe(path)
    except UsageError as error:
        raise CacheError(f"{error}, and a run's own recipe is as it was written; {PUT_BACK}") from None


def write_result(run: Path, result: dict) -> None:
    """Write the result of a run, whose last checkpoint is there: with it the run is finished."""
    state = FileFact.of_file(checkpoint_folder(run, result["steps"]) / STATE).as_dict()
    write_file(run / DONE, record_bytes(result | {"state": state}))


def read_result(run: Path) -> dict | None:
    """Return the result of a finished run; None while it is not finished, or without the checkpoint it is a result of.

    CacheError when the result or the draft in that checkpoint is damaged.
    """
    path = run / DONE
    if not path.exists():
        return None
    result = read_record(path, RESULT, MAKE_AGAIN)
    figures = result["eval"]
    if figures is not None and not has_form(figures, FIGURES | {"domains": {str: FIGURES}, "replies?": [[int]]}):
        raise CacheError(f"{path}: damaged, its figures are none; {MAKE_AGAIN}")
    folder = checkpoint_folder(run, result["steps"])
    if not folder.exists():
        return None
    open_checkpoint(folder, (CONFIG, DRAFT))
    if result.pop("state", None) not in (None, FileFact.of_file(folder / STATE).as_dict()):
        raise CacheError(f"{path}: the result of another checkpoint than {folder.name}; {MAKE_AGAIN}")
    return result
