"""Where each value of a recipe comes from: the file, `--set`, a default, or the cache."""

import json
from pathlib import Path

from pipeline.drafts import refuse_foreign_options
from pipeline.runs.recipe import (
    DraftSection,
    Recipe,
    check_method,
    draft_defaults,
    load_recipe,
    read_toml,
    train_defaults,
    with_schedule,
)
from pipeline.visible_text import visible

OF_TARGET = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "layer_types")
OF_CACHE = {
    "draft": ("layers", "num_hidden_layers", "mask_token_id", *OF_TARGET),
    "train": ("steps", "optimizer", "lr", "dtype", "eval_every", "save_every"),
}
SMALLEST, LARGEST = 1, 1 << 30  # hidden sizes: what is the same for both depends on none


def without_cache(recipe: Recipe) -> Recipe:
    """Return a recipe with all that no cache decides. Raises UsageError for a wrong method or option."""
    check_method(recipe.draft)
    stated = recipe.draft.model_dump(exclude_none=True)
    refuse_foreign_options(recipe.draft.method, stated)
    small, large = (draft_defaults(recipe.draft, size) for size in (SMALLEST, LARGEST))
    known = {name: value for name, value in small.items() if large[name] == value}
    train = recipe.train.model_copy(update=train_defaults(recipe.train))
    return Recipe(
        draft=recipe.draft.model_copy(update=known | stated), train=with_schedule(train, 0) if train.steps else train
    )


def of_the_cache(recipe: Recipe) -> dict[str, list[str]]:
    """Return by section the fields of a recipe that only a cache decides."""
    known = without_cache(recipe).model_dump(exclude_none=True)
    fields = {name: list(names) for name, names in OF_CACHE.items()}
    fields["draft"] += [name for name in draft_defaults(recipe.draft, SMALLEST) if name not in fields["draft"]]
    order = {"draft": DraftSection.keys().index, "train": fields["train"].index}
    return {
        section: sorted((name for name in names if name not in known[section]), key=order[section])
        for section, names in fields.items()
    }


def origins(path: Path | None, sets: tuple[str, ...], completed: Recipe, cache: Path | None) -> dict:
    """Return the completed recipe with where each value comes from, as `recipe show --json` prints it.

    cache: None where it was completed without one; then `decided_by_cache` names the fields that are still open.
    """
    stated, recipe = read_toml(path) if path else {}, load_recipe(path, sets)
    changed = {entry.partition("=")[0].strip() for entry in sets}
    known, shown = without_cache(recipe).model_dump(exclude_none=True), {}
    for section, fields in completed.model_dump(exclude_none=True).items():
        shown[section] = {}
        for name, value in fields.items():
            if f"{section}.{name}" in changed:
                source = "--set"
            elif name in stated.get(section, {}):
                source = "recipe"
            else:
                source = "default" if known[section].get(name, ...) == value else "cache"
            shown[section][name] = {"value": value, "from": source}
    still_open = {} if cache else {"decided_by_cache": of_the_cache(recipe)}
    return {"recipe": path and str(path), "cache": cache and str(cache), **shown, **still_open}


def origins_toml(shown: dict) -> str:
    """Return what `origins` found as TOML, each value with its source in a comment; it loads as that recipe.

    These types are written alike in TOML and JSON.
    """
    tables = []
    for section in OF_CACHE:
        lines = [f"{name} = {json.dumps(field['value'])}" for name, field in shown[section].items()]
        still_open = [f"# {name}" for name in shown.get("decided_by_cache", {}).get(section, ())]
        sources = [field["from"] for field in shown[section].values()] + ["the cache decides"] * len(still_open)
        width = max(map(len, lines + still_open))
        rows = zip(lines + still_open, sources, strict=True)
        tables.append("\n".join([f"[{section}]", *(f"{line:{width}}  # {source}" for line, source in rows)]))
    by, of = shown["cache"] or "no cache", shown["recipe"] or "the default recipe"
    return f"# {visible(of)}, completed from {visible(by)}\n" + "\n\n".join(tables) + "\n"
