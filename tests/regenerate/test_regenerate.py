"""`pipeline regenerate` with a server: every prompt answered once, in the corpus' order, whatever the server does."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from chat_server import FAULTS, ChatServer, digest, reply_to
from tiny import conversations, corpus_of, tokenizer

from pipeline.cli import main
from pipeline.errors import DataError, RoomError, UsageError
from stages.regenerate.prompts import Options
from stages.regenerate.run import check_failed, run

TOKENIZER = tokenizer()
TURNS = 33  # of tiny's conversations


def encode(messages, reply):
    prompt = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return prompt, [*TOKENIZER.encode(reply), 258]


@pytest.fixture
def server():
    with ChatServer(encode=encode) as one:
        yield one


@pytest.fixture
def asked(tmp_path, server):
    """Options to ask the server for 24 chats, of 1 or 2 turns."""
    corpus = corpus_of(tmp_path / "prompts.jsonl", conversations())
    return Options(corpus, tmp_path / "chats.jsonl", server.url, concurrency=4, backoff_s=0.01, timeout=5.0)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def replies(row) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == "assistant"]


def said_to(row) -> list[str]:
    """What the server says to a row's user, turn by turn, each after its own earlier replies."""
    messages, found = [], []
    for message in row["messages"]:
        if message["role"] == "assistant":
            found.append(reply_to(messages))
            message = {"role": "assistant", "content": found[-1]}
        messages.append(message)
    return found


def test_every_reply_is_replaced_turn_by_turn_and_the_rest_passed_on(asked, server):
    report = run(asked)

    given, made = rows_of(asked.corpus), rows_of(asked.out)
    assert [replies(row) for row in made] == [said_to(row) for row in given]
    for row, was in zip(made, given, strict=True):
        assert [m["content"] for m in row["messages"] if m["role"] == "user"] == [
            m["content"] for m in was["messages"] if m["role"] == "user"
        ]
        assert (row["domain"], row["split"]) == (was["domain"], was["split"])
        assert row["regenerated"]["stops"] == ["stop"] * len(replies(row))
        assert row["regenerated"]["model"] == "tiny" and row["regenerated"]["engine"] == "vllm"
    turns = sum(len(replies(row)) for row in given)
    assert max(server.asked.values()) == 1 and len(server.asked) == len(server.requests) == turns == TURNS
    assert report["replies"] == {"all": turns, "asked_now": turns, "kept": 0}
    assert report["share"] == {"cut": 0, "empty": 0} and report["failed"]["prompts"] == 0


def test_the_tokens_are_kept_as_the_server_returned_them(asked):
    run(asked)
    for row in rows_of(asked.out):
        for at, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                plain = [{"role": one["role"], "content": one["content"]} for one in row["messages"][:at]]
                assert (message["prompt_token_ids"], message["token_ids"]) == encode(plain, message["content"])


def test_sglang_s_form_of_token_ids_is_read_too(asked, server):
    server.owner = "sglang"
    run(asked)
    row = rows_of(asked.out)[0]
    assert row["regenerated"]["engine"] == "sglang"
    assert (row["messages"][1]["prompt_token_ids"], row["messages"][1]["token_ids"]) == encode(
        row["messages"][:1], row["messages"][1]["content"]
    )


def test_without_token_ids_messages_are_role_and_content(asked):
    run(replace(asked, token_ids=False))
    assert all(message.keys() == {"role", "content"} for row in rows_of(asked.out) for message in row["messages"])


def test_a_second_run_asks_nothing_and_writes_the_same(asked, server):
    run(asked)
    before, count = asked.out.read_bytes(), len(server.requests)
    report = run(asked)
    assert asked.out.read_bytes() == before and len(server.requests) == count
    assert report["replies"] == {"all": TURNS, "asked_now": 0, "kept": TURNS}


def test_the_order_of_the_answers_does_not_show(asked, server, tmp_path):
    run(asked)
    server.faults = ("slow", None, None, "500", "reset")
    run(replace(asked, out=tmp_path / "again.jsonl", concurrency=13, timeout=0.3, retries=50, backoff_s=0.001))
    assert (tmp_path / "again.jsonl").read_bytes() == asked.out.read_bytes()


@pytest.mark.parametrize("fault", FAULTS)
def test_every_prompt_is_answered_once_whatever_the_server_does(asked, server, fault):
    server.faults = (None, fault, fault, None, None)
    assert run(replace(asked, timeout=0.4))["failed"] == {"prompts": 0, "examples": []}
    assert [replies(row) for row in rows_of(asked.out)] == [said_to(row) for row in rows_of(asked.corpus)]
    assert set(server.answered.values()) == {1}
    assert server.faulted[fault] == len(server.requests) - TURNS > 10


def test_two_faults_to_an_answer_are_lived_through(asked, server, tmp_path):
    mixed = [fault for fault in FAULTS if fault != "slow"]
    server.faults = tuple(one for pair in zip(mixed, mixed[::-1], strict=True) for one in (*pair, None))
    corpus = corpus_of(tmp_path / "more.jsonl", conversations(48))
    run(replace(asked, corpus=corpus, retries=50, concurrency=8, backoff_s=0.0001))
    assert [replies(row) for row in rows_of(asked.out)] == [said_to(row) for row in rows_of(corpus)]
    assert server.answered.total() == sum(len(replies(row)) for row in rows_of(corpus))  # some prompts are twice there
    assert server.faulted.total() >= 100


def test_all_wait_as_long_as_the_server_asks(asked, server):
    server.faults = ("429", *[None] * 99)
    run(asked)
    meanwhile = [moment for moment in server.times if moment - server.times[0] < 0.05]
    assert len(meanwhile) <= 2 * asked.concurrency < len(server.times) // 2  # those beside it were on their way


def test_no_more_requests_at_once_than_stated(asked, server):
    server.answer = lambda request: time.sleep(0.02) or {}
    run(replace(asked, concurrency=3))
    assert server.most_open == 3


def test_no_more_requests_a_minute_than_stated(asked, server):
    run(replace(asked, rate=3000.0, max_samples=10))
    apart = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert server.times[-1] - server.times[0] >= 0.02 * len(apart) * 0.9


def test_what_cannot_be_answered_is_listed_and_asked_again_by_the_same_command(asked, server):
    third = rows_of(asked.corpus)[2]["messages"][:1]
    server.answer = lambda request: {"finish_reason": None} if request["messages"] == third else {}
    report = run(replace(asked, retries=1))

    with pytest.raises(DataError, match=r"1 prompts have no reply, prompts.jsonl:3, turn 0: 2 times: a choice"):
        check_failed(report, asked.out)
    (failed,) = rows_of(asked.out.with_name("chats.failed.jsonl"))
    assert failed["messages"] == third and len(rows_of(asked.out)) == 23
    server.answer, count = None, len(server.requests)
    run(asked)
    assert [replies(row) for row in rows_of(asked.out)] == [said_to(row) for row in rows_of(asked.corpus)]
    assert not asked.out.with_name("chats.failed.jsonl").exists()
    assert {digest(request["messages"]) for request in server.requests[count:]} >= {digest(third)}
    assert len(server.requests) - count == len(replies(rows_of(asked.corpus)[2]))


def test_a_prompt_the_server_refuses_is_not_asked_again(asked, server):
    server.faults = ("400", *[None] * 99)
    report = run(replace(asked, concurrency=1))
    assert report["failed"]["prompts"] == 1 and server.faulted["400"] == 1
    assert max(server.asked.values()) == 1


def test_a_server_that_is_gone_ends_the_run(asked, server):
    server.faults = (*[None] * 5, *["503"] * 500)
    with pytest.raises(UsageError, match="has not answered 9 prompts in a row, the last one 2 times: 503"):
        run(replace(asked, retries=1))
    server.faults = (None,)
    assert run(asked)["replies"]["kept"] == 5
    assert set(server.answered.values()) == {1}


def test_prompts_that_differ_from_our_rendering_are_shown_token_by_token(asked, server, tiny_target):
    run(replace(asked, model=str(tiny_target), out=asked.out.with_name("good.jsonl")))
    server.encode = lambda messages, reply: encode([{"role": "system", "content": "x"}, *messages], reply)
    with pytest.raises(UsageError) as refused:
        run(replace(asked, model=str(tiny_target)))
    assert "from token 1 on" in str(refused.value)
    assert "0: 257 '<|im_start|>' is 257 '<|im_start|>'; 1: 82 's' for 84 'u'" in str(refused.value)
    assert not asked.out.exists()


def test_the_server_is_told_how_to_draw_and_not_left_to_its_defaults(asked, server):
    run(replace(asked, temperature=0.7, top_p=0.9, seed=3, max_new=50, template_kwargs={"enable_thinking": False}))
    first = server.requests[0]
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (0.7, 0.9, 50)
    assert (first["top_k"], first["repetition_penalty"], first["min_p"]) == (-1, 1.0, 0.0)
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    seeds = [request["seed"] for request in server.requests]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    record = rows_of(asked.out)[0]["regenerated"]
    assert (record["temperature"], record["top_p"], record["seed"], record["max_tokens"]) == (0.7, 0.9, 3, 50)
    assert record["template_kwargs"] == {"enable_thinking": False}


def test_a_plain_server_is_sent_nothing_it_may_not_know(asked, server):
    server.owner = "someone"
    run(asked)
    assert server.requests[0].keys() == {"model", "messages", "temperature", "top_p", "max_tokens"}


def test_equal_rows_are_asked_and_drawn_each(asked, server, tmp_path):
    corpus = corpus_of(tmp_path / "twice.jsonl", [conversations(1)[0]] * 3)
    run(replace(asked, corpus=corpus, temperature=1.0))
    assert len(rows_of(asked.out)) == 3
    assert len({request["seed"] for request in server.requests}) == 3 * len(replies(conversations(1)[0]))


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"temperature": 0.5}, "temperature 0.0, and here it is 0.5"),
        ({"seed": 4}, "seed 0, and here it is 4"),
        ({"max_new": 9}, "max_tokens 2048, and here it is 9"),
        ({"template_kwargs": {"a": 1}}, 'template_kwargs {}, and here it is {"a": 1}'),
        ({"engine": "openai"}, 'engine "vllm", and here it is "openai"'),
    ],
)
def test_another_mode_in_the_same_place_is_refused_with_both_values(asked, change, both):
    run(asked)
    with pytest.raises(UsageError, match="holds replies with") as refused:
        run(replace(asked, **change))
    assert both in str(refused.value)


def test_another_corpus_in_the_same_place_is_refused(asked, tmp_path):
    run(asked)
    with pytest.raises(UsageError, match=r'with corpus .*"prompts.jsonl".*, and here it is .*"other.jsonl"'):
        run(replace(asked, corpus=corpus_of(tmp_path / "other.jsonl", conversations(25))))


def test_a_file_that_is_not_ours_is_not_written_over(asked):
    asked.out.write_text("mine\n")
    with pytest.raises(UsageError, match="knows nothing of it"):
        run(asked)
    assert asked.out.read_text() == "mine\n"


def journal(asked) -> Path:
    return asked.out.with_name("chats.journal")


def test_a_torn_last_line_is_asked_again_and_nothing_else(asked, server):
    run(asked)
    whole, good = asked.out.read_bytes(), journal(asked).read_bytes()
    for cut in (1, 40):
        journal(asked).write_bytes(good[:-cut])
        asked.out.unlink()
        count = len(server.requests)
        run(asked)
        assert asked.out.read_bytes() == whole and len(server.requests) == count + 1


def test_a_flipped_bit_in_the_journal_is_seen_and_asked_again(asked, server, capfd):
    run(asked)
    whole, damaged = asked.out.read_bytes(), bytearray(journal(asked).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    journal(asked).write_bytes(damaged)
    count = len(server.requests)
    run(asked)
    assert asked.out.read_bytes() == whole and count < len(server.requests) <= count + 2  # its row's next turn as well
    assert "1 damaged lines" in capfd.readouterr().err


def test_two_processes_do_not_write_one_journal(asked, server):
    from stages.regenerate.replies import Journal

    with Journal(journal(asked), {}), pytest.raises(UsageError, match="another process"):
        run(asked)


def test_unknown_roles_are_refused_by_us(asked, server, tmp_path):
    rows = [*conversations(20), {"messages": [{"role": "alien", "content": "x"}, {"role": "user", "content": "y"}]}]
    report = run(replace(asked, corpus=corpus_of(tmp_path / "roles.jsonl", rows)))
    assert report["rows"]["left_out"] == {"unknown role": 1} and len(rows_of(asked.out)) == 20
    assert "roles.jsonl:21: message 0 has role 'alien'" in report["examples"]["unknown role"][0]
    assert not any("alien" in json.dumps(request) for request in server.requests)
    with pytest.raises(DataError, match="1 of 2 rows cannot be used"):
        run(replace(asked, out=tmp_path / "b.jsonl", corpus=corpus_of(tmp_path / "two.jsonl", rows[-2:])))


def test_a_cut_reply_is_kept_counted_and_not_gone_on_from(asked, server):
    server.answer = lambda request: {"finish_reason": "length"}
    report = run(asked)
    assert report["share"]["cut"] == 1.0 and report["stops"] == {"length": 24}
    assert all(len(replies(row)) == 1 and row["regenerated"]["stops"] == ["length"] for row in rows_of(asked.out))


def test_empty_replies_are_counted(asked, server):
    server.answer = lambda request: {"message": {"role": "assistant", "content": None}}
    assert run(asked)["share"]["empty"] == 1.0


def test_reasoning_is_kept_where_the_server_separates_it_and_asked_with(asked, server):
    server.answer = lambda request: {"message": {"content": "b", "reasoning": "a"}}
    run(asked)
    assert rows_of(asked.out)[0]["messages"][1]["reasoning_content"] == "a"
    later = [request["messages"] for request in server.requests if len(request["messages"]) > 1]
    assert all(messages[1] == {"role": "assistant", "content": "b", "reasoning_content": "a"} for messages in later)


def test_a_row_is_cut_where_a_tool_answered(asked, server, tmp_path):
    called = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sky", "arguments": "{}"}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    row = {"messages": called, "tools": [{"type": "function", "function": {"name": "sky"}}]}
    report = run(replace(asked, corpus=corpus_of(tmp_path / "tools.jsonl", [row])))
    assert report["cut_at_a_tool"] == 1 and len(server.requests) == 1
    assert server.requests[0]["tools"] == row["tools"] == rows_of(asked.out)[0]["tools"]
    assert [message["role"] for message in rows_of(asked.out)[0]["messages"]] == ["user", "assistant"]


def test_a_call_of_the_target_s_own_ends_the_row(asked, server):
    call = {"id": "1", "type": "function", "function": {"name": "sky", "arguments": '{"where": "here"}'}}
    server.answer = lambda request: {
        "message": {"role": "assistant", "content": None, "tool_calls": [call]},
        "finish_reason": "tool_calls",
    }
    run(asked)
    (turn,) = [m for m in rows_of(asked.out)[0]["messages"] if m["role"] == "assistant"]
    assert turn["content"] == "" and turn["tool_calls"][0]["function"]["arguments"] == {"where": "here"}


def test_the_corpus_reader_takes_what_is_written(asked):
    from pipeline.corpus.sources import Conversation, read_records

    run(asked)
    found = list(read_records(str(asked.out), [asked.out]))
    assert len(found) == 24 and all(isinstance(one, Conversation) for one in found)


def test_the_key_is_used_and_shown_nowhere(asked, server, monkeypatch):
    server.key = "sk-secret-1"
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    run(replace(asked, api_key_env="MY_KEY"))
    assert b"sk-secret" not in journal(asked).read_bytes() + asked.out.read_bytes()
    monkeypatch.setenv("MY_KEY", "sk-secret-2")
    with pytest.raises(UsageError, match="wrong key: Bearer \\*\\*\\*") as refused:
        run(replace(asked, api_key_env="MY_KEY", out=asked.out.with_name("b.jsonl")))
    assert "sk-secret" not in str(refused.value)


def test_a_server_that_is_not_there(asked):
    with pytest.raises(UsageError, match="does not list its models"):
        run(replace(asked, endpoint="http://127.0.0.1:9/v1"))
    with pytest.raises(UsageError, match="no address of a server"):
        run(replace(asked, endpoint="localhost:8000"))


def test_a_model_that_the_server_does_not_have(asked):
    with pytest.raises(UsageError, match="has no model 'huge'; pass --served-model with one of tiny"):
        run(replace(asked, served_model="huge"))


def test_without_the_client_the_command_says_how_to_install_it(asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match=r"pip install 'draft-pipeline\[endpoint\]'"):
        run(asked)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_at_once_with_everything_kept(asked, server, number, code):
    server.answer = lambda request: time.sleep(0.05 if len(server.requests) < 9 else 30) or {}
    command = [sys.executable, "-m", "pipeline", "regenerate", "--corpus", asked.corpus, "--out", asked.out]
    child = subprocess.Popen(
        [*map(str, command), "--endpoint", server.url, "--concurrency", "2"], stderr=subprocess.PIPE, text=True
    )
    while len(server.requests) < 10:
        time.sleep(0.01)
    sent = time.monotonic()
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code and time.monotonic() - sent < 20  # an answer takes 30
    assert "Traceback" not in said
    answered, server.answer = dict(server.answered), None
    report = run(asked)
    assert report["replies"]["kept"] >= 7 and max(server.answered.values()) == 1
    assert all(server.asked[one] <= 2 for one in server.asked) and set(answered) <= set(server.answered)


def test_a_full_disk_loses_nothing_that_was_written(asked, server, tmp_path):
    from stages.regenerate import replies as module

    written = []

    def full_after_ten(fd, data):
        written.append(data)
        if len(written) == 11:
            os.write(fd, bytes(data)[:20])
            raise OSError(28, "No space left on device")
        os.write(fd, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_all", full_after_ten)
        with pytest.raises(RoomError, match="cannot write a reply"):
            run(replace(asked, concurrency=1))
    assert run(asked)["replies"]["kept"] == 9  # the first line is the head
    assert [replies(row) for row in rows_of(asked.out)] == [said_to(row) for row in rows_of(asked.corpus)]


def test_the_command_prints_a_table_and_json_and_ends_with_3_for_failures(asked, server, capfd):
    command = ["regenerate", "--corpus", str(asked.corpus), "--out", str(asked.out), "--endpoint", server.url]
    main(command)
    assert f"{TURNS}: {TURNS} asked, 0 from earlier runs" in capfd.readouterr().out
    main([*command, "--json"])
    assert json.loads(capfd.readouterr().out)["replies"]["kept"] == TURNS
    server.faults = ("400",)
    with pytest.raises(SystemExit) as end:
        main([*command[:4], str(asked.out.with_name("b.jsonl")), *command[5:]])
    assert end.value.code == 3


def test_kills_and_faults_in_a_short_form(tmp_path):
    from kill_regenerate import kill_regenerations

    killed, failed, prompts, rounds = kill_regenerations(3, 40, 0, tmp_path)
    assert killed >= 3 and failed >= 40 and prompts >= 60 * rounds


def test_what_a_server_says_of_a_failure_colours_no_terminal(asked, server):
    server.faults = ("\x1b[31m", *[None] * 99)
    assert run(asked)["failed"]["prompts"] == 1
    assert "\x1b" not in asked.out.with_name("chats.failed.jsonl").read_text()


def test_numbers_that_json_does_not_have_are_no_row(asked, server, tmp_path):
    rows = [*conversations(20), '{"messages": [{"role": "user", "content": "a"}], "id": NaN}']
    report = run(replace(asked, corpus=corpus_of(tmp_path / "nan.jsonl", rows)))
    assert report["rows"]["left_out"] == {"broken line": 1} and "NaN" not in asked.out.read_text()


def test_what_failed_is_a_corpus_itself(asked, server, tmp_path):
    server.answer = lambda request: {"finish_reason": None} if len(request["messages"]) > 1 else {}
    assert run(replace(asked, retries=0, concurrency=40))["failed"]["prompts"] == TURNS - 24
    server.answer = None
    again = replace(asked, corpus=asked.out.with_name("chats.failed.jsonl"), out=tmp_path / "again.jsonl")
    run(again)
    rows = [row for row in rows_of(asked.corpus) if len(row["messages"]) > 2]
    assert [replies(row) for row in rows_of(again.out)] == [said_to(row) for row in rows]
