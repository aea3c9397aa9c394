"""Reading a corpus: formats, rejected rows by file and line, and masks by the target's own template."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from templates import prepared_here
from tiny import CHAT_TEMPLATE, tokenizer, write_jsonl

from pipeline.corpus.rejections import Tally, Unusable, check_mask, trim
from pipeline.corpus.sources import (
    Conversation,
    RejectedRecord,
    corpus_files,
    file_sources,
    hub_dataset,
    hub_records,
    read_records,
)
from pipeline.errors import DataError, UsageError
from pipeline.target.chat_template import ChatTemplate
from stages.cache_hidden.settings import default_corpus

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
NO_MARKS = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def rows_of(corpus: Path) -> list[Conversation | RejectedRecord]:
    return list(read_records(str(corpus), corpus_files(str(corpus))))


# Formats


def test_jsonl_with_messages(tmp_path):
    rows = [{"messages": HELLO, "domain": "greetings", "split": "heldout"}, {"messages": HELLO}]
    first, second = rows_of(write_jsonl(tmp_path / "a.jsonl", rows))
    assert first == Conversation(HELLO, "greetings", "heldout", "a.jsonl", 1)
    assert (second.domain, second.split, second.line) == ("", "", 2)


def test_sharegpt_conversations(tmp_path):
    row = {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]}
    row["conversations"].append({"from": "gpt", "value": "a"})
    (found,) = rows_of(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert [(m["role"], m["content"]) for m in found.messages] == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_conversations_may_have_roles_and_contents(tmp_path):
    (found,) = rows_of(write_jsonl(tmp_path / "a.jsonl", [{"conversations": HELLO}]))
    assert found.messages == HELLO


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_system_text_of_the_row_is_the_first_message(tmp_path, suffix):
    own = {"from": "system", "value": "own"}
    chat = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    rows = [
        {"system": text, "conversations": messages}
        for text, messages in [("Be kind.", chat), ("Be kind.", [own, *chat]), ("", chat), (None, chat)]
    ]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    systems = [[m["content"] for m in row.messages if m["role"] == "system"] for row in rows_of(path)]
    assert systems == [["Be kind."], ["own"], [], []]
    assert rows_of(path)[0].messages == [{"role": "system", "content": "Be kind."}, *HELLO]


def test_parquet_gives_what_jsonl_gives(tmp_path):
    rows = [{"messages": HELLO, "domain": "d", "split": "train"}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = rows_of(tmp_path / "a.parquet")
    assert [row.line for row in found] == [1, 2, 3]
    assert found[0] == Conversation(HELLO, "d", "train", "a.parquet", 1)


def test_a_folder_is_read_in_order_of_name(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"messages": HELLO}])
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "a.jsonl", [{"messages": HELLO}])
    (tmp_path / "notes.txt").write_text("not read")
    assert [row.file for row in rows_of(tmp_path)] == ["b.jsonl", "sub/a.jsonl"]
    sources = file_sources(str(tmp_path), corpus_files(str(tmp_path)))
    assert [source["file"] for source in sources] == ["b.jsonl", "sub/a.jsonl"]
    assert sources[0]["xxh3"] == sources[1]["xxh3"]


def test_text_in_parts_is_joined_and_later_questions_are_dropped(tmp_path):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [HELLO[0], {"role": "assistant", "content": parts}, {"role": "user", "content": "unanswered"}]
    (found,) = rows_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert found.messages == HELLO


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("./nowhere.jsonl", UsageError, "no such corpus"),
        ("nowhere.parquet", UsageError, "no such corpus"),
        ("{folder}/empty", DataError, "no file in it ends with .jsonl"),
        ("{folder}/notes.txt", DataError, "rename or convert"),
    ],
)
def test_a_file_that_is_no_corpus_is_refused(tmp_path, name, error, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(error, match=says):
        corpus_files(name.format(folder=tmp_path))


def test_a_name_on_the_hub_is_left_to_the_hub():
    assert corpus_files("mlabonne/open-perfectblend") == []


def test_a_damaged_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="no readable Parquet"):
        rows_of(tmp_path / "a.parquet")


def test_the_bundled_target_takes_the_chats_beside_it(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    assert default_corpus(target) == "mlabonne/open-perfectblend"
    write_jsonl(tmp_path / "chats.jsonl", [])
    assert default_corpus(target) == str(tmp_path.resolve() / "chats.jsonl")


# Faults


@pytest.mark.parametrize(
    ("row", "reason", "says"),
    [
        ('{"messages": [', "broken line", "no JSON"),
        ("[1, 2]", "broken line", "holds a list"),
        ({"text": "hello"}, "no messages", "columns text: `text` was rendered already"),
        ({"messages": []}, "no messages", "nothing in any column"),
        ({"messages": ["hello"]}, "no messages", "message 0 is a str"),
        ({"messages": [*HELLO, {"role": "narrator", "content": "x"}]}, "unknown role", "message 2 has role 'narrator'"),
        ({"conversations": [{"from": "bard", "value": "x"}]}, "unknown role", "from 'bard'"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no reply", "no assistant message"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": " "}]}, "no reply", "no assistant message"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": 7}]}, "no text", "content that is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, HELLO[1]]}, "no text", "no text"),
        (
            {"messages": [HELLO[0], {"role": "assistant", "content": "a\ud800b"}]},
            "no text",
            r"surrogate pair ('\ud800')",
        ),
        ({"messages": [{**HELLO[1], "reasoning_content": "\udc00"}]}, "no text", "surrogate"),
        ({"messages": HELLO, "domain": "\ud800"}, "no text", "surrogate"),
        ({"messages": HELLO, "system": 3}, "no text", "`system` that is no text"),
        ({"messages": HELLO, "split": "both"}, "unknown split", "'both'"),
        ({"messages": HELLO, "domain": 3.5}, "unknown domain", "domain 3.5"),
        ({"messages": HELLO, "tools": "[{"}, "tools", "no JSON"),
        ({"messages": HELLO, "tools": ["f"]}, "tools", "no list of objects"),
        ({"messages": HELLO, "tools": {"name": "f"}}, "tools", "no list of objects (dict)"),
        ({"messages": HELLO, "tools": [{"name": "\ud800"}]}, "no text", "surrogate"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_line(tmp_path, row, reason, says):
    good, fault = rows_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": HELLO}, row]))
    assert isinstance(good, Conversation)
    assert (fault.reason, fault.file, fault.line) == (reason, "a.jsonl", 2)
    assert says in fault.detail and str(fault).startswith("a.jsonl:2: ")


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"default": None}}}}]


@pytest.mark.parametrize(
    ("given", "tools"),
    [(TOOLS, TOOLS), (json.dumps(TOOLS), TOOLS), ([], None), ("[]", None), (" ", None), (None, None)],
)
def test_tools_are_a_list_or_its_json(tmp_path, given, tools):
    (found,) = rows_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": HELLO, "tools": given}]))
    assert found.tools == tools


def test_a_table_gives_no_object_the_keys_of_others(tmp_path):
    """Arrow puts every key into every object; a template would show them to the target as null."""
    tools = [[{"name": "add", "arguments": {"a": 1}}], [{"name": "now", "arguments": {"zone": "here"}}]]
    rows = [{"messages": HELLO, "tools": own} for own in tools]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.tools for row in rows_of(tmp_path / "a.parquet")] == tools


def test_bytes_that_are_no_text_cost_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"messages": "\xff\xfe"}\n\n' + json.dumps({"messages": HELLO}).encode())
    fault, good = rows_of(path)
    assert fault.reason == "broken line" and good.line == 3, "blank lines count, but are no rows"


# Masks


@pytest.fixture
def template(tmp_path):
    """Return a function that makes a ChatTemplate from a template's text."""

    def made(text: str) -> ChatTemplate:
        tokenizer(text).save_pretrained(tmp_path / "tokenizer")
        return ChatTemplate(tmp_path / "tokenizer")

    return made


def turns(*texts: str) -> list[dict]:
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


TWO_TURNS = turns("one?", "One.", "two?", "Two, zwei, 二.")


@pytest.mark.parametrize("value", [False, True])
def test_a_mask_that_says_nothing_is_refused(value):
    with pytest.raises(Unusable):
        check_mask(np.full(5, value))
    check_mask(np.array([False, True]))


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        ([0, 1, 1, 0, 0, 0], 4),  # one row behind the last supervised one, which is the next row's teacher
        ([0, 1, 1], 3),
        ([0, 1, 0, 1, 1, 0], 6),
        ([0, 1, 0, 1, 0], None),
        ([1], None),
    ],
)
def test_tokens_after_the_last_supervised_one_are_trimmed(mask, kept):
    ids = np.arange(len(mask), dtype=np.int32)
    cut = trim(ids, np.array(mask, bool))
    assert (cut is None) if kept is None else (cut[0].tolist() == ids[:kept].tolist() and len(cut[1]) == kept)


def test_planning_counts_everything_it_leaves_out(template, tmp_path):
    rows = [
        {"messages": TWO_TURNS},
        "no JSON",
        {"messages": turns("a long question " * 20, "Yes.")},
        {"messages": HELLO},
        {"messages": [*turns("x", "y"), {"role": "narrator", "content": "z"}]},
    ]
    corpus, tally = write_jsonl(tmp_path / "a.jsonl", rows), Tally()
    samples = list(prepared_here(read_records(str(corpus), [corpus]), template(CHAT_TEMPLATE).folder, 80, tally, 264))
    assert [sample.line for sample in samples] == [1, 4]
    assert tally.records == 5 and tally.rejected == {"broken line": 1, "unknown role": 1}
    assert (tally.too_short, tally.truncated) == (1, 1), "the long question left nothing to learn within 80 tokens"
    assert tally.examples["unknown role"][0].startswith("a.jsonl:5: ")
    assert all(len(sample.ids) <= 80 for sample in samples)


def test_a_token_the_target_has_no_embedding_for_is_a_fault(template, tmp_path):
    corpus, tally = write_jsonl(tmp_path / "a.jsonl", [{"messages": HELLO}]), Tally()
    rows, made = list(read_records(str(corpus), [corpus])), template(CHAT_TEMPLATE).folder
    assert len(list(prepared_here(rows, made, 80, tally, 259))) == 1 and not tally.rejected
    assert list(prepared_here(rows, made, 80, tally, 258)) == []
    assert tally.rejected == {"unknown token": 1}
    assert "a.jsonl:1: holds token 258, outside the target's 258" in tally.examples["unknown token"][0]


def test_a_corpus_with_too_much_left_out_is_refused():
    tally = Tally(records=20, rejected={"broken line": 3}, examples={"broken line": ["a.jsonl:2: no JSON"]})
    with pytest.raises(DataError, match=r"3 of 20 rows .*a\.jsonl:2"):
        tally.check_usable("a.jsonl", usable=17)
    Tally(records=20, rejected={"broken line": 2}).check_usable("a.jsonl", usable=18)
    with pytest.raises(DataError, match="no usable sample"):
        Tally(records=20).check_usable("a.jsonl", usable=0)


def test_a_hub_data_set_without_a_hub_is_refused_in_one_line():
    with pytest.raises(UsageError, match=r"hub gave no such data set \(.*pass --corpus with a file") as found:
        hub_dataset("mlabonne/open-perfectblend")
    assert "\n" not in str(found.value)


def test_an_unreachable_hub_is_reported_in_one_line(monkeypatch):
    """Not an OSError: the hub's client has errors of its own."""

    def refused(self, name):
        raise HTTPError("Connection refused")

    monkeypatch.setattr(HfApi, "dataset_info", refused)
    with pytest.raises(UsageError, match=r"no such data set \(Connection refused\); check the name and the network"):
        hub_dataset("org/name")


@pytest.mark.parametrize(
    "error", [ConnectionError("Server disconnected"), HTTPError("timed out"), pa.ArrowInvalid("x")]
)
def test_a_hub_that_stops_sending_says_where_and_what_to_do(error):
    def rows():
        yield {"messages": HELLO, "domain": None}
        raise error

    stream = hub_records("org/name", rows())
    assert next(stream) == Conversation(HELLO, "", "", "org/name", 1)
    with pytest.raises(
        DataError, match=r"org/name: the hub's rows end after 1 .*same command again, or download"
    ) as found:
        next(stream)
    assert "\n" not in str(found.value)
