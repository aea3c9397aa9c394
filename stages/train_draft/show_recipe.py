"""`pipeline recipe show`: a recipe as `train-draft` completes it, and where each value comes from."""

from pathlib import Path

from pipeline.cache import HiddenCache
from pipeline.runs.recipe import load_recipe
from pipeline.runs.recipe_origins import origins, without_cache
from stages.train_draft.run import complete_recipe


def show_recipe(path: Path | None, sets: tuple[str, ...] = (), cache: Path | None = None) -> dict:
    """Return a recipe with every value's source, completed from a cache, or without one as far as it is known.

    Raises UsageError, DataError and CacheError where `train-draft` would.
    """
    recipe = load_recipe(path, sets)
    completed = without_cache(recipe)
    if cache is not None:
        resolved, _ = complete_recipe(HiddenCache.open(cache), recipe)
        completed = resolved.recipe
    return origins(path, sets, completed, cache)
