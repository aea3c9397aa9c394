"""Every kind of corpus file, and which files of a folder are read."""

import gzip
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict
from tiny import write_jsonl

import pipeline.corpus.file_formats as corpus_files_module
from pipeline.corpus.file_formats import read_chunks
from pipeline.corpus.sources import corpus_files, file_sources, read_records, skipped_files, split_records
from pipeline.errors import DataError, UsageError

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS = [{"messages": [HELLO[0], {"role": "assistant", "content": f"hello {at}"}]} for at in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PRETTY = "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()


def replies(corpus: Path) -> list[str]:
    """The replies of a corpus, all of whose rows are usable."""
    return [row.messages[-1]["content"] for row in read_records(str(corpus), corpus_files(str(corpus)))]


def faults(corpus: Path) -> list[tuple[str, str]]:
    rows = read_records(str(corpus), corpus_files(str(corpus)))
    return [(row.reason, row.detail) for row in rows if not hasattr(row, "messages")]


def stream(rows: list[dict]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def footed(rows: list[dict]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


FRAMES = zstandard.compress(LINES[:100]) + zstandard.compress(LINES[100:])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("A.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode()),
        ("a.json", PRETTY),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl", LINES.rstrip(b"\n")),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("a.jsonl.gz", gzip.compress(LINES[:100]) + gzip.compress(LINES[100:])),
        ("a.ndjson.zst", zstandard.compress(LINES)),
        ("a.jsonl.zst", FRAMES),
        ("a.arrow", stream(ROWS)),
        ("a.Arrow", footed(ROWS)),
    ],
)
def test_every_kind_of_file_holds_the_same_rows(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert replies(tmp_path / name) == [f"hello {at}" for at in range(5)]


def test_messages_in_a_table_may_be_maps_or_text(tmp_path):
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    maps = pa.array([[list(message.items()) for message in row["messages"]] for row in ROWS], kind)
    texts = pa.array([json.dumps(row["messages"]) for row in ROWS])
    for number, column in enumerate((maps, texts)):
        pq.write_table(pa.table({"messages": column}), tmp_path / f"{number}.parquet")
        assert replies(tmp_path / f"{number}.parquet") == [f"hello {at}" for at in range(5)]


@pytest.mark.parametrize("read", [1, 7, 64])
def test_an_array_is_cut_at_its_rows_however_it_is_read(tmp_path, monkeypatch, read):
    """Texts hold brackets, quotes and backslashes, and end where a piece of the file does."""
    monkeypatch.setattr(corpus_files_module, "_READ", read)
    texts = ['a]},"', "\\", '\\"[{', "é\u2028"]
    rows = [{"messages": [HELLO[0], {"role": "assistant", "content": text}]} for text in texts]
    for spelt in (json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=2)):
        (tmp_path / "a.json").write_text(spelt)
        assert replies(tmp_path / "a.json") == texts


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (json.dumps(ROWS)[:-60], "the file is cut off"),
        (json.dumps(ROWS) + "more", "behind the end of the array"),
        (json.dumps([*ROWS, 7]), "holds a int"),
        ("[1, 2]", "holds a int"),
        (PRETTY[:-3].decode(), "the file is cut off"),
    ],
)
def test_what_is_wrong_with_an_array_is_a_row_of_it(tmp_path, data, says):
    (tmp_path / "a.json").write_text(data)
    assert says in faults(tmp_path / "a.json")[-1][1]


def test_a_line_of_lists_is_a_line_of_messages(tmp_path):
    assert replies(write_jsonl(tmp_path / "a.jsonl", [row["messages"] for row in ROWS])) == [
        f"hello {at}" for at in range(5)
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [], "score": NaN}', "NaN is no number of JSON"),
        ('{"messages": [], "messages": []}', "the key 'messages' stands twice"),
        ("[" * 100_000, "nested too deep"),
        ('{"messages": "[{]"}', "`messages` that is no JSON"),
    ],
)
def test_a_line_that_is_no_json_says_why_and_the_others_are_read(tmp_path, line, says):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], line, ROWS[1]])
    rows = list(read_records(str(path), [path]))
    assert rows[1].line == 2 and says in rows[1].detail
    assert [row.messages[-1]["content"] for row in rows[::2]] == ["hello 0", "hello 1"]


def test_a_line_longer_than_any_row_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_files_module, "LONGEST_RECORD", 1 << 20)
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], "x" * (3 << 20), ROWS[1]])
    assert faults(path) == [("too long", "is a line of more than 1 MiB")]
    assert [line for chunk in read_chunks(path, "a") for line in chunk.lines] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", LINES.decode().encode("utf-16"), "UTF-16"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "UTF-16"),
        ("a.jsonl.gz", gzip.compress(LINES.decode().encode("utf-16")), "UTF-16"),
        ("a.jsonl", gzip.compress(LINES, mtime=0), "gzip by its content"),
        ("a.json", zstandard.compress(LINES), "zstd by its content"),
        ("a.jsonl", b"PAR1xxxx", "Parquet by its content"),
        ("a.jsonl.gz", LINES, "no whole .gz file"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], "no whole .gz file"),
        ("a.jsonl.zst", LINES, "no whole .zst file"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-5], "no whole .zst file"),
        ("a.jsonl.zst", FRAMES[:-5], "no whole .zst file"),
        ("a.parquet", LINES, "no readable Parquet"),
        ("a.arrow", LINES, "no readable Arrow file"),
        ("a.arrow", stream(ROWS)[:400], "no readable Arrow file"),
        ("a.arrow", stream([{"text": "hi", "n": 1}]), "columns text, n"),
    ],
)
def test_a_file_that_is_not_what_it_is_called_is_refused_by_name(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says) as found:
        list(read_records(str(tmp_path), [tmp_path / name]))
    assert name in str(found.value) and "\n" not in str(found.value)


def test_an_empty_file_has_no_rows(tmp_path):
    for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
    assert replies(tmp_path) == []


def test_in_a_folder_whatever_is_passed_over_is_named(tmp_path):
    for folder in (".git", "sub/.cache", "sub"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / folder / "x.jsonl", ROWS[:1])
    for name in ("notes.TXT", ".y.jsonl", "README.md", "dataset_infos.json"):
        (tmp_path / name).write_text("no row")
    write_jsonl(tmp_path / "Z.JSONL", ROWS[:1])
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert [file.name for file in corpus_files(str(tmp_path))] == ["Z.JSONL", "x.jsonl"]
    others = [".git/", ".y.jsonl", "README.md", "dataset_infos.json", "loop/", "notes.TXT", "sub/.cache/"]
    assert skipped_files(str(tmp_path)) == others


def test_a_part_of_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl: a pipe, or a link"):
        corpus_files(str(tmp_path))


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="read twice"):
        corpus_files(str(tmp_path / "a.jsonl"))


@pytest.mark.filterwarnings("ignore")
def test_a_saved_data_set_is_read_split_by_split(tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS[:3]), "test": Dataset.from_list(ROWS[3:])}).save_to_disk(
        tmp_path / "d"
    )
    (tmp_path / "d" / "train" / "cache-1234.arrow").write_bytes(stream(ROWS))  # left by datasets' own map
    rows = list(read_records(str(tmp_path / "d"), corpus_files(str(tmp_path / "d"))))
    assert [(row.split, row.line, row.messages[-1]["content"][-1]) for row in rows] == [
        *(("heldout", 1, "3"), ("heldout", 2, "4")),
        *(("train", 1, "0"), ("train", 2, "1"), ("train", 3, "2")),
    ]
    assert "train/cache-1234.arrow" in skipped_files(str(tmp_path / "d"))
    (tmp_path / "d" / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"names data-00000-of-00001\.arrow, which is not there"):
        corpus_files(str(tmp_path / "d"))


def test_files_named_as_the_hub_names_them_say_their_split(tmp_path):
    for name in ("test-00000-of-00001.parquet", "train-00000-of-00001.parquet", "test.parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS[:1]), tmp_path / name)
    rows = list(read_records(str(tmp_path), corpus_files(str(tmp_path))))
    assert [(row.file, row.split) for row in rows] == [
        ("test-00000-of-00001.parquet", "heldout"),
        ("test.parquet", ""),
        ("train-00000-of-00001.parquet", "train"),
    ]


def test_of_a_data_set_of_the_hub_train_comes_first_and_other_splits_not_at_all():
    rows = split_records("org/name", {"test_gen": ROWS[:1], "extra": ROWS[1:2], "train_sft": ROWS[2:3]})
    assert [(row.file, row.split) for row in rows] == [
        ("org/name/train_sft", "train"),
        ("org/name/test_gen", "heldout"),
    ]
    assert [(row.file, row.split) for row in split_records("org/name", {"default": ROWS[:1]})] == [("org/name", "")]


def test_roles_are_part_of_what_a_corpus_is(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    (plain,), (told,) = (file_sources(str(path), [path], roles) for roles in (None, "b=user,a=gpt"))
    assert told == {**plain, "roles": "a=gpt,b=user"}
