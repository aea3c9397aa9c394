"""The JSON schema of recipes, for editors: from the models that check a recipe, so that both refuse the same.

Draft 7, which Taplo reads. A schema cannot say everything that is checked (sums, the cache's layers, the target's
sizes): what it flags is refused, and what it accepts may still be refused.
"""

import inspect
import re
from collections.abc import Iterable

from pydantic import BaseModel

from pipeline.drafts import DRAFTS
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.objectives import OBJECTIVES
from pipeline.runs.recipe import DraftSection, TrainSection, options_model

COMMENTED = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)


def recipe_schema() -> dict:
    """Return the schema of a recipe."""
    sections = {"draft": _draft_section(), "train": _train_section()}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Recipe",
        "description": "What differs from the defaults in how a draft is trained: pipeline train-draft RECIPE.",
        "type": "object",
        "properties": sections,
        "additionalProperties": False,
    }


def sweep_schema() -> dict:
    """Return the schema of a sweep: a recipe, and lists of values of its fields, by "section.field" or by section; of
    fields that change together; and what a search chooses, which may be a range."""
    schema = recipe_schema()
    fields = {
        f"{section}.{name}": field
        for section, of_section in schema["properties"].items()
        for name, field in of_section["properties"].items()
    }
    paired = {
        "description": "Lists of one length: entry i of each together.",
        "type": "object",
        "properties": _by_either_name(fields, "list of {}"),
        "additionalProperties": False,
        "minProperties": 1,
    }
    choices = _by_either_name(fields, "values of {}")
    schema["properties"]["sweep"] = {
        "description": "A list of values for each field that varies; the last varies fastest.",
        "type": "object",
        "properties": SEARCH | {"paired": paired} | choices,
        "additionalProperties": False,
        "minProperties": 1,
        "dependencies": {"search": ["trials"], "trials": ["search"], "seed": ["search"], "prune": ["search"]},
    }
    of_draft = schema["properties"]["draft"]  # a list may give what its rules ask of, or another method
    for rules in ("allOf", "dependencies"):
        del of_draft[rules]
    return schema | {
        "title": "Sweep",
        "description": "A recipe and the lists of its fields' values: pipeline sweep RECIPE.",
        "required": ["sweep"],
        "definitions": {f"list of {name}": _list(field) for name, field in fields.items()}
        | {f"values of {name}": _list_or_range(name, field) for name, field in fields.items()},
    }


SEARCH = {
    "search": {"description": "Choose settings by what those before gained; left out: a grid.", "enum": ["optuna"]},
    "trials": {"description": "Settings that a search tries.", "type": "integer", "exclusiveMinimum": 0},
    "seed": {"description": "Of a search's sampler.", "type": "integer", "minimum": 0, "default": 0},
    "prune": {
        "description": "Give up a run whose accept length is below the median of the finished runs' at the same step; "
        "none before five are finished.",
        "type": "boolean",
        "default": True,
    },
}


def _by_either_name(fields: Iterable[str], definition: str) -> dict:
    """Return a reference to each field's definition, by "section.field" and by section."""
    by_name = {name: {"$ref": f"#/definitions/{definition.format(name)}"} for name in fields}
    nested: dict[str, dict] = {}
    for name, reference in by_name.items():
        section, _, field = name.partition(".")
        of_section = {"type": "object", "properties": {}, "additionalProperties": False}
        nested.setdefault(section, of_section)["properties"][field] = reference
    return by_name | nested


def _list(field: dict) -> dict:
    return {"type": "array", "items": field, "minItems": 1}


def _list_or_range(name: str, field: dict) -> dict:
    distinct = {"allOf": [{"$ref": f"#/definitions/list of {name}"}], "uniqueItems": True}
    if field.get("type") not in ("integer", "number"):
        return distinct
    bound = {key: value for key, value in field.items() if key not in ("description", "default")}
    in_range = {
        "description": "Of a search.",
        "type": "object",
        "properties": {"low": bound, "high": bound, "log": {"type": "boolean", "default": False}},
        "required": ["low", "high"],
        "additionalProperties": False,
    }
    return {"anyOf": [distinct, in_range]}


def _draft_section() -> dict:
    fields = options_model().model_json_schema()["properties"] | DraftSection.model_json_schema()["properties"]
    in_order = DraftSection.keys()
    fields = {name: fields[name] for name in in_order}
    known = {"method": list(DRAFTS), "objective": list(OBJECTIVES)}
    known |= _choices(DraftConfig.model_json_schema()["properties"])
    described = _comments(*(draft.Config for draft in DRAFTS.values())) | _comments(DraftSection)
    properties = {name: _property(field, described.get(name)) for name, field in fields.items()}
    for name, choices in known.items():
        place = properties[name]
        (place["items"] if place["type"] == "array" else place)["enum"] = choices
    return {
        "description": "The draft's architecture and loss.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "allOf": [*_rules_of_methods(), *_rules_of_objectives()],
        "dependencies": {"sliding_window": ["layer_types"]},
    }


def _train_section() -> dict:
    described = _comments(TrainSection)
    fields = TrainSection.model_json_schema()["properties"]
    return {
        "description": "Training length, batch and optimiser.",
        "type": "object",
        "properties": {name: _property(field, described.get(name)) for name, field in fields.items()},
        "additionalProperties": False,
        "not": {"required": ["steps", "epochs"]},
    }


def _rules_of_methods() -> list[dict]:
    """Return for each method that other methods' options mean nothing to it."""
    options = options_model().model_fields
    rules = []
    for method, draft in DRAFTS.items():
        foreign = [name for name in options if name not in draft.Config.model_fields]
        if foreign:
            rules.append({"if": _is_method(method), "then": {"properties": dict.fromkeys(foreign, False)}})
    return rules


def _rules_of_objectives() -> list[dict]:
    """Return for each objective that the weights of terms which it does not have mean nothing to it."""
    rules = []
    for objective, terms in OBJECTIVES.items():
        stated = {"properties": {"objective": {"const": objective}}, "required": ["objective"]}
        left_out = [
            _is_method(method) | {"not": {"required": ["objective"]}}
            for method, draft in DRAFTS.items()
            if draft.recipe_defaults({}, 1)["objective"] == objective
        ]
        foreign = [name for name in ("alpha_ce", "alpha_l1") if name.removeprefix("alpha_") not in terms]
        if foreign:
            rules.append({"if": {"anyOf": [stated, *left_out]}, "then": {"properties": dict.fromkeys(foreign, False)}})
    return rules


def _is_method(method: str) -> dict:
    """Return the schema of a [draft] of that method, which the default one need not name."""
    required = {} if DraftSection().method == method else {"required": ["method"]}
    return {"properties": {"method": {"const": method}}} | required


def _choices(properties: dict) -> dict[str, list]:
    """Return the values of [draft]'s fields of which DraftConfig has a list, and a recipe only the type."""
    found = {name: field.get("enum") or field.get("items", {}).get("enum") for name, field in properties.items()}
    return {name: choices for name, choices in found.items() if choices and name in DraftSection.model_fields}


def _property(field: dict, description: str | None) -> dict:
    """Return a field's schema without null and titles, which no TOML has, and with its description."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    assert len(kinds) == 1, f"{field}: TOML would need a choice of types"
    stated = {key: value for key, value in field.items() if key not in ("anyOf", "title", "default")}
    default = {} if field.get("default") is None else {"default": field["default"]}
    kept = {key: value for key, value in kinds[0].items() if key not in ("title", "default")}
    return ({"description": description} if description else {}) | stated | kept | default


def _comments(*models: type[BaseModel]) -> dict[str, str]:
    """Return what the code says behind each field of the models."""
    classes = {each: None for model in models for each in reversed(model.__mro__) if issubclass(each, BaseModel)}
    classes.pop(BaseModel), classes.pop(DraftConfig, None)
    return {name: text for each in classes for name, text in COMMENTED.findall(inspect.getsource(each))}
