"""Every known form of row and message becomes the same conversation, or is rejected with what to do."""

import json

import pytest

from pipeline.corpus.messages import MAX_DEPTH
from pipeline.corpus.record_formats import Conversation, RejectedRecord, parse_record, split_of
from pipeline.corpus.sources import parse_roles
from pipeline.errors import UsageError

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
CALL = {"id": "1", "type": "function", "function": {"name": "w", "arguments": {"city": "Oslo"}}}


def read(row, **told) -> Conversation | RejectedRecord:
    return parse_record(row, "a.jsonl", 1, **told)


def said(*messages: dict, **told) -> list[dict]:
    """The messages of a usable row."""
    row = read({"messages": list(messages)}, **told)
    assert isinstance(row, Conversation), row
    return row.messages


@pytest.mark.parametrize(
    "row",
    [
        {"messages": HELLO},
        {"messages": json.dumps(HELLO)},
        {"conversation": HELLO, "id": "a"},
        {"conversations": HELLO, "messages": None},
        {"conversations": HELLO, "status": "success"},
        {"dialogue": HELLO},
        {"messages": {"role": ["user", "assistant"], "content": ["hi", "hello"]}},
        HELLO,
        {"data": ["hi", "hello"]},
        {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversations": [{"role": "human", "content": "hi"}, {"from": "GPT", "value": "hello"}]},
        {"instruction": "hi", "input": "", "output": "hello"},
        {"instruction": "hi", "context": None, "response": "hello", "category": "qa"},
        {"prompt": "hi", "completion": "hello"},
        {"prompt": HELLO[:1], "completion": HELLO[1:]},
        {"prompt": HELLO[:1], "response": "hello"},
        {"prompt": json.dumps(HELLO[:1]), "completion": HELLO[1]},
        {"question": "hi", "answer": "hello"},
        {"query": "hi", "response": "hello"},
        {"input": HELLO[:1], "output": "hello"},
        {"messages": [{"role": "user", "content": ["h", "i"]}, HELLO[1]]},
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, HELLO[1]]},
        {"messages": [HELLO[0], {"role": "assistant", "content": [{"type": "output_text", "text": "hello"}]}]},
        {"messages": [{**HELLO[0], "id": 7, "images": [], "audio": None}, {**HELLO[1], "annotations": [], "x": None}]},
    ],
)
def test_every_form_of_a_row_is_the_same_conversation(row):
    assert read(row) == Conversation(HELLO, "", "", "a.jsonl", 1)


def test_an_instructions_input_is_appended_to_it_and_history_comes_before():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["hi", "hello"]], "system": "Be kind."}
    roles = ["system", "user", "assistant", "user", "assistant"]
    texts = ["Be kind.", "hi", "hello", "Add.\n1 2", "3"]
    assert [(m["role"], m["content"]) for m in read(row).messages] == list(zip(roles, texts, strict=True))


def test_an_orca_row_has_its_system_prompt():
    row = {"system_prompt": "Be kind.", "question": "hi", "response": "hello"}
    assert read(row).messages == [{"role": "system", "content": "Be kind."}, *HELLO]


@pytest.mark.parametrize(
    ("row", "found", "remedy"),
    [
        ({"text": "<s>hi"}, "columns text", "write its `messages`"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "columns prompt, chosen, rejected", "two replies"),
        ({"prompt": "hi", "source": "x"}, "columns prompt, source", "prompt and completion"),
        ({"input_ids": [1, 2]}, "columns input_ids", "without a `loss_mask`"),
        ({"conversation": "hi there"}, "`conversation` that is one text", "wanted a list"),
        ({"messages": {"role": ["user"], "content": []}}, "role, content", "not equally many"),
    ],
)
def test_a_row_of_no_known_form_is_refused_with_its_columns(row, found, remedy):
    fault = read(row)
    assert fault.reason == "no messages"
    assert found in fault.detail and remedy in fault.detail


@pytest.mark.parametrize(
    ("role", "known"),
    [
        ("developer", "developer"),
        ("observation", "tool"),
        ("function", "tool"),
        ("Human", "user"),
        ("model", "assistant"),
    ],
)
def test_roles_by_other_names(role, known):
    assert said({"role": role, "content": "x"}, *HELLO)[0]["role"] == known


def test_roles_may_be_named_on_the_command_line():
    row = {"conversations": [{"from": "Narrator", "value": "hi"}, {"from": "bard", "value": "hello"}]}
    assert "--roles A=B" in read(row).detail
    assert read(row, roles=parse_roles("narrator=user,Bard=gpt")).messages == HELLO
    for wrong in ("bard", "bard=poet", "=user"):
        with pytest.raises(UsageError, match="wanted A=B"):
            parse_roles(wrong)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking", "thought"])
def test_reasoning_has_one_name(key):
    assert said(HELLO[0], {**HELLO[1], key: "hm"})[1] == {**HELLO[1], "reasoning_content": "hm"}


def test_reasoning_may_be_a_part_and_may_not_be_two():
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hello"}]
    assert said(HELLO[0], {"role": "assistant", "content": parts})[1] == {**HELLO[1], "reasoning_content": "hm"}
    same = {**HELLO[1], "reasoning": "hm", "reasoning_content": "hm"}
    assert said(HELLO[0], same)[1]["reasoning_content"] == "hm"
    assert "two thoughts" in read({"messages": [HELLO[0], {**same, "reasoning": "no"}]}).detail


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{**CALL, "function": {"name": "w", "arguments": '{"city": "Oslo"}'}}]},
        {"tool_calls": [{"id": "1", "name": "w", "arguments": {"city": "Oslo"}}]},
    ],
)
def test_arguments_of_a_call_become_an_object(calls):
    assert said(HELLO[0], {"role": "assistant", "content": None, **calls})[1] == {
        "role": "assistant",
        "tool_calls": [CALL],
        "content": "",
    }


@pytest.mark.parametrize(
    ("given", "kept"), [("Oslo", "Oslo"), ("[1]", "[1]"), ("", {}), (None, {}), ('{"a":1,"a":2}',) * 2]
)
def test_arguments_that_are_no_object_stay_as_they_were_written(given, kept):
    message = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "w", "arguments": given}}]}
    assert said(HELLO[0], message)[1]["tool_calls"][0]["function"]["arguments"] == kept


def test_a_call_may_be_the_text_of_its_own_role_or_stand_under_its_old_key():
    call = {"name": "w", "arguments": {"city": "Oslo"}}
    function = [{"type": "function", "function": call}]
    spoken = {"from": "function_call", "value": json.dumps(call)}
    for message in (spoken, {"role": "assistant", "content": None, "function_call": call}):
        assert said(HELLO[0], message)[1] == {"role": "assistant", "tool_calls": function, "content": ""}
    assert said(HELLO[0], {"from": "function_call", "value": "f"})[1] == {"role": "assistant", "content": "f"}


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"weight": 0.0}]
)
def test_a_reply_that_is_not_to_be_learned_is_marked(mark):
    replies = said(HELLO[0], {**HELLO[1], **mark}, HELLO[0], {**HELLO[1], "weight": 1})
    assert [message.get("supervise") for message in replies] == [None, False, None, None]
    assert read({"messages": [HELLO[0], {**HELLO[1], **mark}]}).reason == "nothing supervised"


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"train": "no"}, {"weight": 0, "train": True}])
def test_a_weight_that_has_to_be_guessed_at_is_refused(mark):
    assert read({"messages": [HELLO[0], {**HELLO[1], **mark}]}).reason == "unknown weight"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"refusal": "I cannot."}, "`refusal`"),
        ({"audio": {"id": "x"}}, "`audio`"),
        ({"images": ["a.png"]}, "`images`"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "type 'image_url'"),
        ({"content": [{"type": "text", "text": None}]}, "type 'text'"),
        ({"content": "a", "value": "b"}, "two texts"),
    ],
)
def test_what_a_text_model_cannot_read_is_refused_by_name(message, says):
    fault = read({"messages": [{**HELLO[0], **message}, HELLO[1]]})
    assert fault.reason == "no text" and says in fault.detail


def test_unknown_keys_are_named_unless_they_have_no_value():
    row = read({"messages": [{**HELLO[0], "mood": "glad", "x": None, "y": []}, {**HELLO[1], "voice": 3}]})
    assert row.unknown == ("mood", "voice") and row.messages == HELLO


def test_tokens_are_taken_as_they_are():
    ids, mask = [5, 6, 7], [False, True, True]
    for stated in ({"loss_mask": [0, 1, 1]}, {"assistant_masks": mask}, {"labels": [-100, 6, 7]}):
        row = read({"input_ids": ids, "conversations": HELLO, **stated})
        assert (row.tokens, row.messages) == ((ids, mask), [])


@pytest.mark.parametrize(
    "stated", [{"loss_mask": [0, 1]}, {"loss_mask": [0, 1, 2]}, {"labels": [-100, 6, 8]}, {"loss_mask": "011"}]
)
def test_tokens_with_another_mask_are_refused(stated):
    assert read({"input_ids": [5, 6, 7], **stated}).reason == "no tokens"
    assert read({"input_ids": [5, -6, 7], "loss_mask": [0, 1, 1]}).reason == "no tokens"


def test_what_an_engine_wrote_is_kept():
    note = {"version": 1, "model": "m"}
    message = {**HELLO[1], "token_ids": [1, 2], "prompt_token_ids": [3]}
    row = read({"messages": [HELLO[0], message], "regenerated": note, "chat_template_kwargs": '{"a": true}'})
    assert (row.messages[1], row.regenerated, row.template_kwargs) == (message, note, {"a": True})
    assert read({"messages": HELLO, "chat_template_kwargs": [1]}).detail.startswith("has `chat_template_kwargs`")


def test_a_row_whose_regeneration_failed_is_left_out():
    assert read({"conversations": HELLO, "status": "error", "error": "timeout"}).reason == "failed reply"


@pytest.mark.parametrize("place", ["tool_calls", "tools", "chat_template_kwargs"])
def test_a_value_nested_too_deep_rejects_its_row(place):
    deep = []
    for _ in range(500):
        deep = [deep]
    nested = {"function": {"name": "w", "arguments": {"a": deep}}}
    row = (
        {"messages": [HELLO[0], {**HELLO[1], "tool_calls": [nested]}]} if place == "tool_calls" else {"messages": HELLO}
    )
    row |= {"tools": [nested]} if place == "tools" else {}
    row |= {"chat_template_kwargs": nested} if place == "chat_template_kwargs" else {}
    fault = read(row)
    assert fault.reason == "too deep" and f"more than {MAX_DEPTH} deep" in fault.detail


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train_sft", "train"), ("training", "train"), ("", ""), ("trainer", None), ("both", None)),
        *((name, "heldout") for name in ("test_sft", "validation", "held-out", "Dev")),
    ],
)
def test_splits_by_other_names(name, split):
    assert split_of(name) == split


def test_domains_may_be_numbers_and_the_files_split_is_the_rows():
    row = read({"messages": HELLO, "domain": 3}, split="heldout")
    assert (row.domain, row.split) == ("3", "heldout")
    assert read({"messages": HELLO, "split": "train"}, split="heldout").split == "train"
