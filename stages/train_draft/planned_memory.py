"""What a training takes of a device, planned with the cache that it will read: `pipeline plan --train RECIPE`."""

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from pipeline.cache import HiddenCache
from pipeline.cache.catalog import Catalog
from pipeline.cache.layout import CONFIG
from pipeline.target.files import find_target, read_json
from pipeline.target.layers import text_config


class PlannedCache(HiddenCache):
    """A cache that is planned and not captured yet, as a recipe asks about it. folder: of the target's files."""

    def __init__(self, report: dict, folder: Path):
        super().__init__(Catalog(report["cache"]))
        self.report, self.folder = report, folder

    @property
    def whole(self) -> dict[str, str]:
        return self.report["codecs"]

    @property
    def dtype(self):
        import torch

        return getattr(torch, self.report["dtype"])

    @cached_property
    def target_config(self) -> dict:
        return read_json(self.folder / CONFIG)

    @cached_property
    def tokens(self) -> dict:
        from pipeline.target.model import special_tokens

        return json.loads(special_tokens(self.folder, ()))


class PlannedTraining:
    """A training of which a plan is to say whether a device has memory for it.

    recipe: its path, None for no training. Raises UsageError.
    """

    def __init__(self, recipe: Path | None, device_bytes: int | None):
        self.device_bytes, self.recipe = device_bytes, None
        if recipe is not None:
            from pipeline.runs.recipe import load_recipe  # brings torch, which a plan without a training needs not

            self.recipe = load_recipe(recipe)

    def of(self, report: dict, model: str, revision: str | None) -> dict:
        """Return what the training takes, as `training` of the plan's report; nothing where there is none.

        Of a device also what `memory.Fit` says. lines: all in words.
        """
        if self.recipe is None:
            return {}
        import torch

        from pipeline.runs.recipe import resolve
        from stages.train_draft.memory import Fit, memory_lines, step_memory

        cache, size = PlannedCache(report, find_target(model, revision)), self.device_bytes
        resolved = resolve(self.recipe, cache)
        train, whole = resolved.recipe.train, cache.target_config
        tied = text_config(whole).get("tie_word_embeddings", whole.get("tie_word_embeddings", False))
        memory = step_memory(resolved.draft, train, getattr(torch, train.dtype), tied)
        return {
            "training": {
                "rows": train.context,
                "blocks": memory.blocks,
                "parameters": memory.parameters,
                "static_bytes": memory.static,
                "gradient_bytes": memory.gradients,
                "step_bytes": memory.peak(Fit(memory.blocks)),
                "device_bytes": size,
                **(asdict(memory.fit(size)) if size else {}),
                "lines": memory_lines(memory, train.context, size),
            }
        }


def fit_on(resolved, tied: bool, size: int) -> tuple[bool, bool, list[str]]:
    """Return whether a step of a resolved recipe fits a GPU of `size` bytes, whether it does so whole, and lines of
    words. tied: whether the target's embedding is its head."""
    import torch

    from stages.train_draft.memory import Fit, memory_lines, step_memory

    train = resolved.recipe.train
    memory = step_memory(resolved.draft, train, getattr(torch, train.dtype), tied)
    fit = memory.fit(size)
    return bool(fit.at_once), fit == Fit(memory.blocks), memory_lines(memory, train.context, size)
