"""Codecs: how a column's values are stored in files. `codec.py` says what one has to have."""

from pipeline.cache.codecs.codec import Codec
from pipeline.cache.codecs.int6 import Int6
from pipeline.cache.codecs.int8 import Int8
from pipeline.cache.codecs.lossless import Raw, Zstd
from pipeline.cache.layout import COLUMN
from pipeline.errors import UsageError
from pipeline.nearest_name import did_you_mean

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Raw(), Zstd(), Int8(), Int6())}


def column_of_files(stem: str) -> str | None:
    """The column that has files of this name in some codec, `aux.1` of `aux.1.zstd`; None for other names."""
    columns = (stem.removesuffix(codec.suffix) for codec in CODECS.values())
    return next((column for column in columns if COLUMN.fullmatch(column)), None)


def parse_codecs(text: str) -> dict[str, str]:
    """Parse `--codec`: one name for all columns (key ""), or `aux=int8,final=raw`, where `aux.9=` names one layer.

    Raises UsageError for an unknown codec or column.
    """
    chosen: dict[str, str] = {}
    for part in text.split(","):
        columns, _, codec = part.strip().rpartition("=")
        known = not columns or columns == "aux" or COLUMN.fullmatch(columns)
        if codec not in CODECS or not known or columns in chosen:
            names = ", ".join(CODECS)
            meant = did_you_mean(codec, CODECS) if codec not in CODECS else did_you_mean(columns, ("aux", "final"))
            raise UsageError(
                f"--codec {text}: wanted one of {names} for all columns, or such as aux=int8,final=raw{meant}"
            )
        chosen[columns] = codec
    return chosen


def codec_of(chosen: dict[str, str], column: str) -> str | None:
    """The codec chosen for a column, by the most specific name; None when the option does not name it."""
    names = [column, *(["aux"] if column.startswith("aux.") else []), ""]
    return next((chosen[name] for name in names if name in chosen), None)
