"""The capture's record, `capture.log`: what was asked for, and how the files it came from looked (size and time).

Derived, for speed and for people, and no part of the cache's promise: without it, or with a damaged one, the files are
digested again. It is what lets a run with nothing to do end at once, and a stopped one go on without reading its
corpus. It says what was planned, not what was captured: that the shards themselves say.
"""

import contextlib
from dataclasses import asdict
from pathlib import Path

from pipeline.cache.columns import ColumnSpec
from pipeline.cache.layout import LOG
from pipeline.cache.manifest import read_canonical, write_canonical
from pipeline.corpus.sources import corpus_files
from pipeline.errors import CacheError, DataError, RoomError, UsageError
from pipeline.target.files import CONFIG, tokenizer_files, weight_files
from stages.cache_hidden.options import CaptureOptions
from stages.cache_hidden.settings import CaptureSettings, default_corpus


def request_of(model: str, corpus: str | None, options: CaptureOptions) -> dict:
    """Return a command as the record keeps it: without what only says who computes, or when the corpus came in."""
    here = {"model": _absolute(model), "corpus": corpus and _absolute(corpus)}
    told = {name: value for name, value in asdict(options).items() if name not in ("device", "worker", "append")}
    return {**here, "options": told}


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def looks(files: list[Path]) -> dict[str, list[int]]:
    """Return size and time of last change of every file, by absolute path."""
    return {str(file.resolve()): [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in files}


def _target_files(folder: Path) -> list[Path]:
    return [folder / CONFIG, *tokenizer_files(folder), *weight_files(folder)]


def write_record(out: Path, request: dict, settings: CaptureSettings, corpus: str) -> None:
    """Note a command whose corpus is planned. A cache that cannot be written to keeps the record it has."""
    folder = settings.folder.resolve()
    record = {
        "request": request,
        "identity": settings.identity,  # a second copy, should cache.json be lost
        "target": {"folder": str(folder), "files": looks(_target_files(folder))},
        "corpus": looks(corpus_files(corpus)),
        "columns": [spec.as_dict() for spec in settings.columns],
    }
    held = read_record(out)
    if {key: held.get(key) for key in record} == record:
        return
    with contextlib.suppress(RoomError):
        write_canonical(out / LOG, record)


def read_record(out: Path) -> dict:
    """Return the record, empty when there is none to be read."""
    try:
        return read_canonical(out / LOG)
    except CacheError:
        return {}


def unchanged(record: dict, request: dict) -> tuple[ColumnSpec, ...] | None:
    """Return the columns wanted, when the command is the recorded one and every file looks as it did; else None.

    The folders are listed again, since a file that was added changes what they mean.
    """
    if record.get("request") != request:
        return None
    try:
        folder = Path(record["target"]["folder"])
        if looks(_target_files(folder)) != record["target"]["files"]:
            return None
        if looks(corpus_files(request["corpus"] or default_corpus(folder))) != record["corpus"]:
            return None
        return tuple(ColumnSpec(**spec) for spec in record["columns"])
    except (OSError, KeyError, TypeError, DataError, UsageError):
        return None


def corpus_unchanged(record: dict, corpus: str, max_samples: int | None, roles: str | None) -> bool:
    """Return whether so much of the corpus was planned so, and its files look as they did when that was last seen."""
    told = record.get("request", {}).get("options", {})
    if told.get("max_samples", -1) != max_samples or told.get("roles") != roles:
        return False
    try:
        files = looks(corpus_files(corpus))
    except (OSError, DataError, UsageError):
        return False
    return bool(files) and files == record.get("corpus")
