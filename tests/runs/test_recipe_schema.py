"""The schema of recipes: what an editor flags by it is what `train-draft` refuses."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs.test_recipe import CONFIGS, cache_of

from pipeline.cli import main
from pipeline.drafts import DRAFTS
from pipeline.drafts.objectives import OBJECTIVES
from pipeline.errors import UsageError
from pipeline.runs.recipe import DraftSection, TrainSection, make_recipe, resolve
from pipeline.runs.recipe_schema import recipe_schema, sweep_schema

SCHEMA, SWEEP = recipe_schema(), sweep_schema()
FOLDER = Path(__file__).parents[2] / "configs"
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
SAYS_NOTHING = {"$schema", "title", "description", "default", "definitions"}


def fits(value, schema) -> bool:
    """Whether a value is as a schema says, of the keywords that ours have."""
    if isinstance(schema, bool):
        return schema
    return all(KEYWORDS[word](value, said, schema) for word, said in schema.items() if word not in SAYS_NOTHING)


def fits_type(value, said, schema) -> bool:
    return isinstance(value, KINDS[said]) and (said == "boolean" or not isinstance(value, bool))


def fits_condition(value, said, schema) -> bool:
    return not fits(value, said) or fits(value, schema["then"])


KEYWORDS = {
    "$ref": lambda value, said, _: fits(value, SWEEP["definitions"][said.removeprefix("#/definitions/")]),
    "type": fits_type,
    "enum": lambda value, said, _: value in said,
    "const": lambda value, said, _: value == said,
    "minimum": lambda value, said, _: not isinstance(value, int | float) or value >= said,
    "exclusiveMinimum": lambda value, said, _: not isinstance(value, int | float) or value > said,
    "maximum": lambda value, said, _: not isinstance(value, int | float) or value <= said,
    "exclusiveMaximum": lambda value, said, _: not isinstance(value, int | float) or value < said,
    "minItems": lambda value, said, _: not isinstance(value, list) or len(value) >= said,
    "minProperties": lambda value, said, _: not isinstance(value, dict) or len(value) >= said,
    "uniqueItems": lambda value, said, _: not isinstance(value, list) or len(set(map(str, value))) == len(value),
    "items": lambda value, said, _: not isinstance(value, list) or all(fits(item, said) for item in value),
    "required": lambda value, said, _: not isinstance(value, dict) or all(name in value for name in said),
    "properties": lambda value, said, _: (
        not isinstance(value, dict) or all(fits(value[name], of) for name, of in said.items() if name in value)
    ),
    "additionalProperties": lambda value, said, schema: (
        not isinstance(value, dict) or value.keys() <= schema["properties"].keys()
    ),
    "dependencies": lambda value, said, _: (
        not isinstance(value, dict) or all(set(said[name]) <= value.keys() for name in said if name in value)
    ),
    "allOf": lambda value, said, _: all(fits(value, each) for each in said),
    "anyOf": lambda value, said, _: any(fits(value, each) for each in said),
    "not": lambda value, said, _: not fits(value, said),
    "if": fits_condition,
    "then": lambda value, said, _: True,
}


def refused(stated: dict) -> str | None:
    try:
        resolve(make_recipe(json.loads(json.dumps(stated)), (), "it"), cache_of())
    except UsageError as error:
        return str(error)


@pytest.mark.parametrize(("name", "options"), [("recipe", ()), ("sweep", ("--sweep",))])
def test_the_schema_beside_the_recipes_is_the_one_the_command_prints(name, options, capsys):
    main(["recipe", "schema", *options])
    again = f"pipeline recipe schema {' '.join(options)} > configs/{name}.schema.json"
    assert capsys.readouterr().out == (FOLDER / f"{name}.schema.json").read_text(), again


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_of_ours_names_its_schema_and_fits_it(path):
    text = path.read_text()
    directive, _, name = text.splitlines()[0].partition(" ./")
    schema = json.loads((FOLDER / name).read_text())
    assert directive == "#:schema" and fits(tomllib.loads(text), schema)


@pytest.mark.parametrize(
    "stated",
    [
        {"trian": {}},
        {"train": {"stepps": 3}},
        {"train": {"steps": 3.5}},
        {"train": {"steps": 3, "epochs": 1}},
        {"train": {"warmup": 1}},
        {"train": {"seed": True}},
        {"train": {"schedule": "linear"}},
        {"draft": {"method": "eagle"}},
        {"draft": {"objective": "mse"}},
        {"draft": {"weighting": "none"}},
        {"draft": {"layers": []}},
        {"draft": {"layer_types": ["wide"]}},
        {"draft": {"sliding_window": 64}},
        {"draft": {"block_size": 1}},
    ],
    ids=json.dumps,
)
def test_a_mistake_is_flagged_in_the_editor_and_refused_by_the_training(stated):
    assert not fits(stated, SCHEMA) and refused(stated)


@pytest.mark.parametrize("method", DRAFTS)
def test_another_methods_option_is_flagged_and_each_of_its_own_is_not(method):
    own = DRAFTS[method].Config.options()
    for name in {name for draft in DRAFTS.values() for name in draft.Config.options()}:
        field = SCHEMA["properties"]["draft"]["properties"][name]
        value = field.get("enum", [{"boolean": False}.get(field["type"], 1)])[0]
        stated = {"draft": {"method": method, name: value}}
        assert fits(stated, SCHEMA) == (name in own), name
        assert name in own or "means nothing" in refused(stated)


VALUES = st.one_of(
    st.sampled_from([*DRAFTS, *OBJECTIVES, "decay", "dpace", "adamw", "wsd", "float32", "vanilla", "no such"]),
    st.sampled_from([-1, 0, 1, 2, 4, 64, 2**64, 0.5, 1.0, 1.5, -0.5, True, False]),
    st.lists(st.sampled_from([1, 9, 17, "full_attention", "sliding_attention"]), max_size=5),
)


def section(names) -> st.SearchStrategy[dict]:
    return st.dictionaries(st.sampled_from([*names, "unknown"]), VALUES, max_size=3)


@given(
    draft=section(DraftSection.keys()),
    method=st.sampled_from([*DRAFTS, None]),
    train=section(TrainSection.model_fields),
)
@settings(max_examples=60, deadline=None)
def test_whatever_an_editor_flags_is_refused(draft, method, train):
    stated = {"draft": ({"method": method} if method else {}) | draft, "train": train}
    if not fits(stated, SCHEMA):
        assert refused(stated), stated


def test_a_sweep_lists_values_of_fields_by_either_form_of_their_name():
    lr, search = {"low": 1e-4, "high": 1e-2, "log": True}, {"search": "optuna", "trials": 3}
    for table in (
        {"train.lr": [1e-3, 2e-3]},
        {"train": {"lr": [1e-3, 2e-3]}, "draft": {"block_size": [8]}},
        {"draft.layers": [[1, 3], [5]]},
        {"train.seed": [0, 1], "paired": {"draft.method": ["dflash", "domino"], "train.lr": [1e-3, 1e-3]}},
        {"paired": {"draft": {"method": ["dflash", "domino"]}}},
        search | {"train.lr": lr, "draft": {"num_hidden_layers": {"low": 1, "high": 3}}, "seed": 1, "prune": False},
    ):
        assert fits({"sweep": table}, SWEEP), table
    for table in (
        {},
        {"train.lr": []},
        {"train.lr": 1e-3},
        {"train.rl": [1e-3]},
        {"train.lr": [1e-3, 1e-3]},
        {"paired": {"train.rl": [1e-3]}},
        {"paired": {}},
        {"search": "grid", "trials": 3},
        {"search": "optuna", "train.lr": lr},
        {"trials": 3, "train.lr": [1e-3]},
        search | {"train.lr": {"low": 1e-4}},
        search | {"train.lr": lr | {"steps": 3}},
        search | {"draft.method": lr},
    ):
        assert not fits({"sweep": table}, SWEEP), table
    assert not fits({"train": {"steps": 3}}, SWEEP)
