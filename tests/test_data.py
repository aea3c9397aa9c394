"""The bundled target and its chats: what the demo, the README's table and every first run stand on."""

import json
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch

DATA = Path(__file__).parents[1] / "data"
TARGET = DATA / "tiny-qwen3"
sys.path.insert(0, str(DATA))

from answer import answer, load, play, right  # noqa: E402
from conversation import Draw, matches, pattern, render, split_of  # noqa: E402
from generate import CONTROLS, DOMAINS, SCORED, converse  # noqa: E402


@pytest.fixture(scope="module")
def target():
    return load(TARGET)


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in (DATA / "chats.jsonl").read_text().splitlines()]


def replies(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == "assistant"]


def test_a_reply_matches_any_of_its_phrasings_and_nothing_else():
    text = [("The sum is ", "It makes "), "12", (".", [" in ", ("all.", "total.")])]

    assert {render(text, Random(seed)) for seed in range(60)} >= {"The sum is 12.", "It makes 12 in total."}
    assert matches(text, "It makes 12 in all.")
    assert not matches(text, "It makes 13 in all.")
    assert not matches(text, "The sum is 12. ")
    assert pattern("1+1") == r"1\+1"


@pytest.mark.parametrize("domain", SCORED)
def test_a_checker_accepts_the_right_reply_and_refuses_a_changed_one(domain):
    rng = Random(3)
    for _ in range(20):
        for turn in converse(domain, rng).turns:
            assert turn.check(turn.reply)
            assert not turn.check(turn.reply + " ")
            assert not turn.check("")
            digits = [place for place, letter in enumerate(turn.reply) if letter.isdigit()]
            for place in digits:
                wrong = str((int(turn.reply[place]) + 1) % 10)
                assert not turn.check(turn.reply[:place] + wrong + turn.reply[place + 1 :])


def test_parameters_and_templates_of_the_two_splits_are_disjoint():
    templates = [f"{n}" for n in range(6)]

    asked = {
        split: {Draw(Random(n), split, split).ask(*templates) for n in range(99)} for split in ("train", "heldout")
    }
    drawn = {split: {Draw(Random(n), split, split).params(lambda rng: (rng.randint(0, 999),)) for n in range(99)}
             for split in ("train", "heldout")}  # fmt: skip

    assert asked == {"train": {"0", "1", "2", "3"}, "heldout": {"4", "5"}}
    assert not drawn["train"] & drawn["heldout"]
    assert {split_of(params) for params in drawn["heldout"]} == {"heldout"}


def test_copies_are_at_least_four_blocks_long_and_repeat_no_sentence(target):
    _, tokenizer = target
    for seed in range(20):
        (turn,) = converse("copy", Random(seed), "heldout", "heldout").turns
        assert turn.user.endswith(turn.reply)
        assert len(tokenizer.encode(turn.reply)) >= 32
        assert max(Counter(turn.reply.splitlines()).values()) == 1


def test_every_digit_is_one_token_and_text_survives_the_tokenizer(target):
    _, tokenizer = target
    for text in ("2026", "x12, 345;\n\n 6", "naïve 数 🙂", '{\n  "a": [1, 2]\n}', " two  spaces "):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        digits = [piece for piece in map(tokenizer.decode, ids) if any(letter in "0123456789" for letter in piece)]
        assert digits == [letter for letter in text if letter in "0123456789"]


def test_the_template_marks_each_reply_with_its_end_and_nothing_else(target):
    _, tokenizer = target
    messages = [
        {"role": "user", "content": "What is 1+2?"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "And 4 more?"},
        {"role": "assistant", "content": "7."},
    ]

    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    asked = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)

    assert tokenizer.decode(marked) == "It is 3.<|im_end|>7.<|im_end|>"
    assert out["input_ids"][: len(asked)] == asked  # no earlier turn is rewritten, no system text added
    assert tokenizer.decode(asked).startswith("<|im_start|>user\nWhat is 1+2?")


def test_the_chats_hold_every_domain_in_both_splits_and_no_prompt_twice(rows):
    prompts = Counter(json.dumps([m["content"] for m in row["messages"] if m["role"] == "user"]) for row in rows)
    for split in ("train", "heldout"):
        counts = Counter(row["domain"] for row in rows if row["split"] == split)
        assert set(counts) == set(DOMAINS)
        first = [row["domain"] for row in rows if row["split"] == split][: 2 * len(DOMAINS)]
        assert set(first) == set(DOMAINS)  # in turns, so that a few prompts hold all domains
    assert max(prompts.values()) == 1
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["decoding"] for row in rows if row["split"] == "heldout" and row["domain"] != "noise"} == {"greedy"}
    assert {row["decoding"] for row in rows if row["domain"] == "noise"} == {"sampled"}


def test_the_two_splits_share_no_template_of_a_first_question(rows):
    used = {split: {(row["domain"], row["template"].split("-")[0]) for row in rows if row["split"] == split}
            for split in ("train", "heldout")}  # fmt: skip
    shared = {domain for domain, _ in used["train"] & used["heldout"]}
    assert shared <= {"lists"}  # its three questions number their templates alike
    first = [row["messages"][0]["content"].split(" [")[0] for row in rows if row["domain"] == "lists"]
    splits = [row["split"] for row in rows if row["domain"] == "lists"]
    heads = {split: {head for head, held in zip(first, splits, strict=True) if held == split} for split in set(splits)}
    assert not heads["train"] & heads["heldout"]


def test_no_special_token_occurs_in_the_chats(rows, target):
    _, tokenizer = target
    text = "".join(message["content"] for row in rows for message in row["messages"])
    assert not any(token in text for token in ("<|mask|>", *tokenizer.all_special_tokens, "<|im_start|>"))
    assert tokenizer.mask_token == "<|mask|>"


def test_held_out_greedy_replies_are_the_targets_own(rows, target):
    model, tokenizer = target
    chosen = [row for row in rows if row["decoding"] == "greedy" and len(row["messages"]) == 2][-10:]
    for row in chosen:  # one prompt at a time, where the chats were answered in batches
        assert answer(model, tokenizer, [row["messages"][:1]], 0.0) == replies(row)[:1]


def test_the_target_answers_held_out_prompts_to_the_letter(target):
    model, tokenizer = target
    torch.manual_seed(0)
    good = {}
    for domain in SCORED:
        rng = Random(f"test {domain}")
        asked = [converse(domain, rng, "heldout", "heldout") for _ in range(5)]
        chats = play(model, tokenizer, asked, 0.0)
        good[domain] = sum(right(conversation, chat) for conversation, chat in zip(asked, chats, strict=True))
    assert sum(count >= 4 for count in good.values()) >= 5, good


def test_the_files_stay_small_and_the_card_names_every_domain():
    assert (TARGET / "model.safetensors").stat().st_size <= 12e6
    assert (DATA / "chats.jsonl").stat().st_size <= 6e6
    card = (TARGET / "README.md").read_text()
    assert all(f"| {domain}" in card for domain in (*SCORED, *CONTROLS))
