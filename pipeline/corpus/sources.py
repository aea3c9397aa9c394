"""The sources of a corpus: a file, a folder of files, a saved data set, or a data set of the hub.

File names are in `file_formats.SUFFIXES`, forms of records in `record_formats.py` and `messages.py`. Hidden files and
folders are not read, and what is skipped is reported. Records are streamed, so a corpus may be larger than memory.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path, PurePath

from pipeline.cache.manifest import FileFact
from pipeline.corpus.file_formats import SUFFIXES, Chunk, read_chunks, without_nulls
from pipeline.corpus.messages import ROLES
from pipeline.corpus.record_formats import Conversation, RejectedRecord, parse_record, split_of
from pipeline.errors import DataError, UsageError, first_line, is_present
from pipeline.nearest_name import did_you_mean
from pipeline.visible_text import visible

METADATA_FILES = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # no records in these
SHOWN = 3  # names reported of each kind of skipped file
Record = Conversation | RejectedRecord
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\..+")  # train-00000-of-00004.parquet, the hub's naming


def corpus_files(corpus: str) -> list[Path]:
    """Return the files of a corpus sorted by name, none for a data set of the hub.

    Raises UsageError when there is no such file, DataError when it is of a kind that is not read.
    """
    path = Path(corpus).expanduser()
    present = is_present(path)
    if path.is_dir():
        files = _list_folder(path)[0]
        if not files:
            raise DataError(f"{corpus}: no file in it ends with {', '.join(SUFFIXES)}; name a folder of conversations")
        return files
    known = path.name.lower().endswith(SUFFIXES)
    if path.is_file():
        if not known:
            raise DataError(f"{corpus}: its name ends with none of {', '.join(SUFFIXES)}; rename or convert it")
        return [path]
    if present:
        raise UsageError(f"{corpus}: a pipe or a device, and a corpus is read twice; write it to a file first")
    looks_like_a_path = path.is_absolute() or corpus.startswith((".", "~")) or known
    if looks_like_a_path or corpus.count("/") > 1:
        raise UsageError(f"{corpus}: no such corpus; name a file, a folder, or a data set of the hub like org/name")
    return []


def skipped_files(corpus: str) -> list[str]:
    """Return what is not read of a corpus folder, as names relative to it; a folder's name ends with a slash."""
    path = Path(corpus).expanduser()
    return _list_folder(path)[1] if path.is_dir() else []


def report_skipped_files(corpus: str) -> None:
    """Print to stderr what is not read of a corpus folder: counts by file suffix, and some names of each."""
    names: dict[str, list[str]] = {}
    for name in skipped_files(corpus):
        kind = "folders" if name.endswith("/") else PurePath(name).suffix.lower() or "without an ending"
        names.setdefault(kind, []).append(visible(name))
    kinds = "; ".join(f"{len(found):,} {kind} ({', '.join(found[:SHOWN])})" for kind, found in sorted(names.items()))
    if kinds:
        print(f"not read in {visible(corpus)}: {kinds}", file=sys.stderr)


def _list_folder(root: Path) -> tuple[list[Path], list[str]]:
    """Return the files of a folder that are read, sorted, and the names of those that are skipped, sorted."""
    files, skipped = [], []
    for directory, folders, names in os.walk(root, onerror=_cannot_list):
        directory_path = Path(directory)
        skipped_folders = [name for name in folders if name.startswith(".") or (directory_path / name).is_symlink()]
        folders[:] = sorted(set(folders) - set(skipped_folders))
        skipped += [f"{(directory_path / name).relative_to(root).as_posix()}/" for name in skipped_folders]
        saved = _saved_parts(directory_path)
        for name in names:
            file = directory_path / name
            known = name.lower().endswith(SUFFIXES) and not name.startswith(".") and name not in METADATA_FILES
            if not known or (saved and name not in saved):
                skipped.append(file.relative_to(root).as_posix())
                continue
            if not file.is_file():
                raise DataError(
                    f"{file}: a pipe, or a link to a file that is not there; put the file there or remove it"
                )
            files.append(file)
        if absent := sorted(saved - set(names)):
            raise DataError(
                f"{directory_path}: its state.json names {visible(absent[0])}, which is not there; copy it again"
            )
    return sorted(files), sorted(skipped)


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename}: it cannot be listed ({error.strerror}); see to its rights") from error


def _saved_parts(folder: Path) -> set[str]:
    """Return the file names of a data set that `datasets` saved in this folder; none where it is no such folder."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        return {part["filename"] for part in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def file_split(corpus: str, file: Path) -> str:
    """Return the split ("train" or "heldout") that a file's path names, else "".

    Such as test/data-00000-of-00001.arrow beside dataset_dict.json, and test-00000-of-00001.parquet.
    """
    root = Path(corpus).expanduser()
    inside = file.relative_to(root).parts if root.is_dir() else (file.name,)
    if len(inside) > 1 and (root / "dataset_dict.json").is_file():
        return split_of(inside[0]) or ""
    part = _PART.fullmatch(file.name)
    return split_of(part[1]) or "" if part else ""


def file_sources(corpus: str, files: list[Path], roles: str | None = None) -> list[dict]:
    """Return the plan's source entry of every file: name inside the corpus, size, checksum. Reads every byte.

    roles: the text of `--roles`, part of the entry, since the same files with other roles are another corpus.
    """
    roles_entry = source_roles(roles)
    return [{"file": relative_name(corpus, file), **FileFact.of_file(file).as_dict(), **roles_entry} for file in files]


def source_roles(roles: str | None) -> dict[str, str]:
    """Return the part of a source entry for the text of `--roles`: empty where none were given."""
    return {"roles": ",".join(sorted(roles.split(",")))} if roles else {}


def relative_name(corpus: str, file: Path) -> str:
    """Return a file's name for reports and the plan: relative to the corpus, since a cache holds no absolute paths."""
    root = Path(corpus).expanduser()
    return file.relative_to(root).as_posix() if root.is_dir() else file.name


def parse_roles(text: str | None) -> dict[str, str]:
    """Return ROLES plus those of a `--roles` text ("A=B,..."): A is a name for role B. UsageError for an unknown B."""
    roles = dict(ROLES)
    for pair in text.split(",") if text else []:
        name, equals, role = (part.strip().lower() for part in pair.partition("="))
        if not name or not equals or role not in roles:
            meant = did_you_mean(role, ROLES) if equals else ""
            raise UsageError(
                f"--roles {pair}: wanted A=B, such as bard=assistant; B is one of {', '.join(sorted(ROLES))}{meant}"
            )
        roles[name] = roles[role]
    return roles


def corpus_chunks(corpus: str, files: list[Path], *, prompts: bool = False) -> Iterator[Chunk]:
    """Yield the records of the files in order, unparsed, in chunks."""
    return chain.from_iterable(
        read_chunks(file, relative_name(corpus, file), file_split(corpus, file), prompts=prompts) for file in files
    )


def chunk_records(chunk: Chunk, roles: dict[str, str] | None = None, prompts: bool = False) -> Iterator[Record]:
    """Yield the records of a chunk, parsed."""
    for line, record in chunk.records():
        yield parse_record(record, chunk.file, line, split=chunk.split, roles=roles, prompts=prompts)


def read_records(
    corpus: str, files: list[Path], roles: dict[str, str] | None = None, prompts: bool = False
) -> Iterator[Record]:
    """Yield every record of the files, in order. roles: see `parse_roles`. prompts: replies are not read."""
    chunks = corpus_chunks(corpus, files, prompts=prompts)
    return chain.from_iterable(chunk_records(chunk, roles, prompts) for chunk in chunks)


def hub_dataset(
    corpus: str, roles: dict[str, str] | None = None, prompts: bool = False
) -> tuple[Iterator[Record], dict]:
    """Return the records of a hub data set, streamed, and its source entry (name, revision).

    Its train splits come first, then those that are held out; a split by another name is skipped unless there is no
    other. Raises UsageError when there is no such data set; the records raise DataError when they end early.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(corpus).sha
        splits = load_dataset(corpus, streaming=True, revision=revision, trust_remote_code=False)
    except _hub_errors() as error:
        raise UsageError(
            f"{corpus}: no such file or folder here, and the hub gave no such data set ({first_line(error)}); "
            "check the name and the network, or pass --corpus with a file of conversations"
        ) from error
    return split_records(corpus, splits, roles, prompts), {"dataset": corpus, "revision": revision}


def split_records(
    corpus: str, splits: dict[str, Iterable[dict]], roles: dict[str, str] | None = None, prompts: bool = False
) -> Iterator[Record]:
    """Yield the records of a data set's splits, by name: train first, then heldout."""
    kinds = {name: split_of(name) for name in splits}
    chosen = sorted((name for name in splits if kinds[name]), key=lambda name: (kinds[name] != "train", name))
    for name in chosen or sorted(splits):
        alone = len(splits) == 1
        split = "" if alone and kinds[name] == "train" else kinds[name] or ""
        yield from hub_records(corpus if alone else f"{corpus}/{name}", splits[name], split, roles, prompts)


def hub_records(
    corpus: str, records: Iterable[dict], split: str = "", roles: dict[str, str] | None = None, prompts: bool = False
) -> Iterator[Record]:
    """Yield the records of a hub stream. DataError when the hub stops sending, or sends something that is no record."""
    line = 0
    try:
        for line, record in enumerate(records, 1):
            yield parse_record(without_nulls(record), corpus, line, split=split, roles=roles, prompts=prompts)
    except _hub_errors() as error:
        raise DataError(
            f"{corpus}: the hub's rows end after {line:,} ({first_line(error)}); run the same command again, or "
            "download the data set and pass --corpus with its files"
        ) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that reading a hub data set may raise: network, disk, its own files, its name."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError: of whichever client the hub uses

    return (OSError, HTTPError, DatasetsError, HFValidationError, ValueError)  # ValueError: pyarrow's, too
