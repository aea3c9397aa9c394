"""Everything about a cache's format that a program can compare: the fields of its files, their types, its constants.

    python tests/format_schemas.py

writes it to `golden/1/schemas.json`. What pipeline/cache/README.md allows within version 1 may be added there; anything
else is version 2.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pyarrow as pa
from schema_tables import MANIFESTS

from pipeline.cache import checksums, layout, samples
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.lossy import CHANNELS, OUTLIER_SHARE, OUTLIERS
from pipeline.cache.codecs.zarr_file import DTYPES
from pipeline.cache.schema import MAX_WIDTH
from pipeline.target.head import EMBEDDING, HEAD, KNOWN_FACTS

NAMES = (
    "IDENTITY", "PLAN", "TARGET", "TARGET_MANIFEST", "CONFIG", "TOKENS", "HEAD", "WEIGHTS", "CALIBRATION", "SHARDS",
    "SAMPLES", "QUARANTINE", "REFUSED", "LOG", "SCRATCH",
)  # fmt: skip
STORED = Path(__file__).parent / "golden" / layout.FORMAT / "schemas.json"


def schemas() -> dict:
    """Return the format as JSON values."""
    arrays = {name: codec.arrays(256) for name, codec in CODECS.items() if codec.lossy}
    return {
        "manifests": {model.FILE: _without_text(model.model_json_schema()) for model in MANIFESTS},
        "arrow": {"samples": _fields(samples.SCHEMA), "checksums": _fields(checksums.SCHEMA)},
        "dtypes": {name: dtype.str for name, dtype in DTYPES.items()},
        "codecs": {name: [codec.suffix, codec.lossy] for name, codec in CODECS.items()},
        "arrays": {
            name: {part: [count, kind.str] for part, (count, kind) in parts.items()} for name, parts in arrays.items()
        },
        "lossy": {"outliers": OUTLIERS, "channels": CHANNELS, "outlier_share": OUTLIER_SHARE},
        "groups": {
            name: {str(width): codec.group_of(width) for width in (8, 130, 640, 4096)}
            for name, codec in CODECS.items()
            if codec.lossy
        },
        "head": [EMBEDDING, HEAD, *sorted(KNOWN_FACTS)],
        "checksum_rows": layout.CHECKSUM_ROWS,
        "column": layout.COLUMN.pattern,
        "max_width": MAX_WIDTH,
        "formats": list(layout.FORMATS),
        "names": {name: getattr(layout, name) for name in NAMES},
    }


def _without_text(schema):
    """Return a JSON schema without titles and descriptions, which may be reworded."""
    if isinstance(schema, list):
        return [_without_text(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for name, part in schema.items():
        if name in ("properties", "$defs"):  # their keys are names of fields and records
            kept[name] = {field: _without_text(value) for field, value in part.items()}
        elif name not in ("title", "description"):
            kept[name] = _without_text(part)
    return kept


def _fields(schema: pa.Schema) -> list:
    return [[field.name, str(field.type), field.nullable] for field in schema]


if __name__ == "__main__":
    STORED.write_text(json.dumps(schemas(), indent=1, sort_keys=True) + "\n")
