"""`capture.log`: the last command, and size and modification time of the files that it read.

With it the same command, or a continued one, does not read its corpus again. It records what was planned, not what was
captured, which the shards themselves do; without it, or with a damaged one, the files are digested again.
"""

import contextlib
from dataclasses import asdict
from pathlib import Path

from pipeline.cache.layout import LOG
from pipeline.cache.manifest import format_of, write_canonical
from pipeline.cache.schema import CaptureRecord, CaptureRequest, ColumnSpec, TargetFiles, read_log
from pipeline.corpus.sources import corpus_files
from pipeline.errors import DataError, RoomError, UsageError
from pipeline.secret_masking import without_url_users
from pipeline.target.files import CONFIG, tokenizer_files
from pipeline.target.weights import weight_files
from stages.cache_hidden.settings import CaptureOptions, CaptureSettings, default_corpus

NOT_LOGGED = ("device", "worker", "append", "tensor_parallel", "device_map", "python")


def request_of(model: str, corpus: str | None, options: CaptureOptions) -> CaptureRequest:
    """Return a command as the log stores it, without what does not change what is planned.

    Of names only the users of URLs are masked: a path is compared, and pasted again.
    """
    stated = {name: value for name, value in asdict(options).items() if name not in NOT_LOGGED}
    named = {"model": _absolute(model), "corpus": corpus and _absolute(corpus)}
    return CaptureRequest(**{key: name and without_url_users(name) for key, name in named.items()}, options=stated)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def file_stats(files: list[Path]) -> dict[str, list[int]]:
    """Return [size, mtime in ns] of every file, by absolute path."""
    return {str(file.resolve()): [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in files}


def _target_files(folder: Path) -> list[Path]:
    return [folder / CONFIG, *tokenizer_files(folder), *weight_files(folder)]


def write_record(out: Path, request: CaptureRequest, settings: CaptureSettings, corpus: str) -> None:
    """Log a command whose corpus is planned; does nothing where the cache cannot be written to."""
    folder = settings.folder.resolve()
    record = CaptureRecord(
        request=request,
        identity=settings.identity,
        target=TargetFiles(folder=str(folder), files=file_stats(_target_files(folder))),
        corpus=file_stats(corpus_files(corpus)),
        columns=[*settings.columns],
    )
    if read_log(out).as_dict() == record.as_dict():
        return
    with contextlib.suppress(RoomError):
        write_canonical(out / LOG, record.as_dict(), format_of(out))


def unchanged_columns(record: CaptureRecord, request: CaptureRequest) -> tuple[ColumnSpec, ...] | None:
    """Return the command's columns if it is the logged one and no file of target or corpus has changed; else None.

    The folders are listed again, so that an added file counts as a change.
    """
    if record.request != request or record.target is None or record.columns is None:
        return None
    try:
        folder = Path(record.target.folder)
        if file_stats(_target_files(folder)) != record.target.files:
            return None
        if file_stats(corpus_files(request.corpus or default_corpus(folder))) != record.corpus:
            return None
        return tuple(record.columns)
    except (OSError, DataError, UsageError):
        return None


def corpus_unchanged(record: CaptureRecord, corpus: str, max_samples: int | None, roles: str | None) -> bool:
    """Return whether the corpus was planned with these two options and its files have not changed since."""
    options = record.request.options if record.request else {}
    if options.get("max_samples", -1) != max_samples or options.get("roles") != roles:
        return False
    try:
        files = file_stats(corpus_files(corpus))
    except (OSError, DataError, UsageError):
        return False
    return bool(files) and files == record.corpus
