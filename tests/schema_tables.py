"""Prints the tables of a cache's format, which stand in pipeline/cache/README.md, from the records that it describes.

Usage: python tests/schema_tables.py, which writes them there.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.cache.manifest import FileFact
from pipeline.cache.schema import (
    CalibrationManifest,
    CaptureRecord,
    ColumnManifest,
    ColumnSpec,
    Identity,
    IndexManifest,
    Manifest,
    OpenRecord,
    RefusedList,
    SegmentManifest,
    TargetManifest,
)

README = Path(__file__).parent.parent / "pipeline/cache/README.md"
MANIFESTS = (
    Identity,
    SegmentManifest,
    ColumnManifest,
    CalibrationManifest,
    TargetManifest,
    IndexManifest,
    RefusedList,
    CaptureRecord,
)

NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything", NoneType: "null"}


def tables() -> str:
    """The tables of README.md: every manifest's fields, parts of parts by dotted names."""
    shown = []
    for model in MANIFESTS:
        rows = [f"| `{name}` | {kind} | {description} |" for name, kind, description in _fields(model)]
        shown.append("\n".join([f"`{model.FILE}`: {model.__doc__}", "", "| field | type | |", "|---|---|---|", *rows]))
    return "\n\n".join(shown) + "\n"


def _fields(kind: type, before: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield name, type and description of a record's fields, and of the records in them."""
    hints = get_type_hints(kind, include_extras=True) if kind is ColumnSpec else kind.model_fields
    for name, stated in hints.items():
        if name in ("format", "hash"):
            continue
        kind_of, described = (
            (stated.__origin__, stated.__metadata__[0]) if kind is ColumnSpec else (stated.annotation, stated)
        )
        yield f"{before}{name}", _type_text(kind_of), described.description
        parts = [part for part in (kind_of, *get_args(kind_of)) if isinstance(part, type)]
        for part in parts:
            if part is ColumnSpec or (issubclass(part, OpenRecord) and not issubclass(part, Manifest)):
                yield from _fields(part, f"{before}{name}.")


def _type_text(kind: Any) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_text(inside[0])
    if origin is Literal:
        return " or ".join(map(json.dumps, inside))
    if origin in (Union, UnionType):
        return " or ".join(map(_type_text, inside))
    if origin is list:
        return f"list of {_type_text(inside[0])}"
    if origin is dict:
        return f"{_type_text(inside[1])} by name"
    if kind is FileFact:
        return "`size` and `xxh3`"
    return NAMES.get(kind, "object")


def write_tables() -> None:
    """Put the tables into README.md, between their two comments."""
    before, begin, rest = README.read_text().partition("<!-- records -->\n")
    _, end, after = rest.partition("<!-- end of records -->\n")
    README.write_text(before + begin + tables() + end + after)


if __name__ == "__main__":
    write_tables()
