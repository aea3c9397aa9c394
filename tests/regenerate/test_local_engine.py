"""`pipeline regenerate` without a server: the target's own words, however they are batched."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import conversations, corpus_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import UsageError
from stages.regenerate.local_engine import nucleus
from stages.regenerate.prompts import Job, Options, PromptRow
from stages.regenerate.run import run

DATA = Path(__file__).parents[2] / "data"
BUNDLED = DATA / "tiny-qwen3"
TIE = 1e-3  # between logits that batches of another shape may swap in float32


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def turns_of(path) -> list[dict]:
    return [message for row in rows_of(path) for message in row["messages"] if message["role"] == "assistant"]


@pytest.fixture(scope="module")
def bundled():
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    """Options of a finished run over the bundled chats' first 64 rows."""
    out = tmp_path_factory.mktemp("regenerated") / "chats.jsonl"
    options = Options(DATA / "chats.jsonl", out, model=str(BUNDLED), max_new=192, max_samples=64, batch=16)
    run(options)
    return options


@pytest.fixture
def tiny(tiny_target, tmp_path):
    corpus = corpus_of(tmp_path / "prompts.jsonl", conversations(12))
    return Options(corpus, tmp_path / "chats.jsonl", model=str(tiny_target), max_new=24, batch=5)


def generated(model, prompt: list[int], most: int) -> list[int]:
    """What transformers' own loop writes after one prompt."""
    ids_1T = torch.tensor([prompt])
    out = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=most, do_sample=False)
    return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def is_tie(model, ids: list[int], one: int, other: int) -> bool:
    logits_V = model(torch.tensor([ids])).logits[0, -1]
    return bool((logits_V[one] - logits_V[other]).abs() < TIE)


def test_batches_write_what_generate_writes_one_by_one(greedy, bundled):
    turns = turns_of(greedy.out)
    assert len(rows_of(greedy.out)) == 64 and len(turns) > 64
    for turn in turns:
        prompt, ids = turn["prompt_token_ids"], turn["token_ids"]
        alone = generated(bundled, prompt, 192)
        if ids != alone:
            at = next(at for at, pair in enumerate(zip(ids, alone, strict=False)) if pair[0] != pair[1])
            assert is_tie(bundled, [*prompt, *ids[:at]], ids[at], alone[at])


def test_the_bundled_chats_are_what_the_command_writes(greedy):
    held = [json.loads(line) for line in (DATA / "chats.jsonl").read_text().splitlines()[:64]]
    made = [{**row, "messages": [{k: m[k] for k in ("role", "content")} for m in row["messages"]]}
            for row in rows_of(greedy.out)]  # fmt: skip
    pairs = [(one, other) for one, other in zip(made, held, strict=True) if other["decoding"] == "greedy"]
    assert len(pairs) > 50 and all(one["messages"] == other["messages"] for one, other in pairs)


def test_the_prompt_of_a_later_turn_holds_the_target_s_own_words(greedy):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED, local_files_only=True)
    row = next(row for row in rows_of(greedy.out) if len(row["messages"]) > 2)
    plain = [{"role": one["role"], "content": one["content"]} for one in row["messages"][:3]]
    asked = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert row["messages"][3]["prompt_token_ids"] == asked
    assert row["messages"][1]["token_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_what_is_drawn_depends_on_seed_and_prompt_and_not_on_the_batch(tiny, batch, tmp_path):
    drawn = replace(tiny, temperature=0.8, top_p=0.9)
    run(drawn)
    run(replace(drawn, out=tmp_path / "other.jsonl", batch=batch))
    assert (tmp_path / "other.jsonl").read_bytes() == drawn.out.read_bytes()
    run(replace(drawn, out=tmp_path / "seed.jsonl", seed=1))
    one, other = ([turn["content"] for turn in turns_of(out)] for out in (drawn.out, tmp_path / "seed.jsonl"))
    assert one != other


def test_a_run_that_was_cut_off_goes_on_to_the_same_file(tiny, tmp_path):
    drawn = replace(tiny, temperature=1.0)
    run(drawn)
    whole = drawn.out.read_bytes()
    journal = tiny.out.with_name("chats.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:30])
    tiny.out.unlink()
    report = run(drawn)
    assert drawn.out.read_bytes() == whole
    assert report["replies"]["kept"] == len(lines) // 2 - 1


def test_a_run_with_nothing_to_ask_loads_neither_torch_nor_the_target(tiny):
    run(tiny)
    written, stated = tiny.out.read_bytes(), ("--max-new", "24", "--batch", "5")
    command = ["regenerate", "--corpus", str(tiny.corpus), "--out", str(tiny.out), "--model", tiny.model, *stated]
    again = f"import sys; from pipeline.cli import main; main({command}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "12: 0 asked, 12 from earlier runs" in done.stdout
    assert tiny.out.read_bytes() == written


def test_a_corpus_that_is_not_there_and_one_that_would_be_written_over(tiny):
    with pytest.raises(UsageError, match="no such corpus; name a file, a folder"):
        run(replace(tiny, corpus=str(tiny.out)))
    with pytest.raises(UsageError, match="is the corpus itself, or a file of it"):
        run(replace(tiny, out=Path(tiny.corpus)))
    with pytest.raises(UsageError, match=r"lies in the corpus .* name a place outside"):
        run(replace(tiny, corpus=str(tiny.out.parent)))
    assert not tiny.out.exists()


def test_a_target_that_cannot_decode_several_at_once_decodes_one(tiny, monkeypatch, tmp_path, capfd):
    from stages.regenerate import local_engine as local

    run(tiny)

    def refuse(target):
        raise UsageError("Odd has linear layers; leave --batch out")

    monkeypatch.setattr(local, "check_batchable", refuse)
    run(replace(tiny, out=tmp_path / "alone.jsonl"))
    assert "Odd has linear layers: prompts are decoded one at a time" in capfd.readouterr().err
    assert (tmp_path / "alone.jsonl").read_bytes() == tiny.out.read_bytes()


def test_a_prompt_longer_than_the_target_s_positions_is_listed(tiny, tmp_path):
    rows = [*conversations(3), {"messages": [{"role": "user", "content": "x" * 600}]}]
    report = run(replace(tiny, corpus=corpus_of(tmp_path / "long.jsonl", rows)))
    assert report["failed"]["prompts"] == 1 and "and the target has 512 positions" in report["failed"]["examples"][0]


def test_the_likeliest_tokens_of_a_share_stay_and_no_others():
    weights = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.1, 0.1, 0.7]])
    assert nucleus(weights, 0.65).tolist() == [[*weights[0, :2].tolist(), 0, 0], [0, 0, 0, weights[1, 3].item()]]
    assert nucleus(weights, 1.0) is weights
    assert (nucleus(weights, 1e-9) > 0).sum(-1).tolist() == [1, 1]


def test_a_reply_s_seed_is_its_own():
    def seed_of(seed: int, key: str, turn: int) -> int:
        return Job(PromptRow(key, "", [], None, None, {}), [None] * turn).seed(seed)

    seeds = {seed_of(seed, key, turn) for seed in (0, 1) for key in ("ab", "cd") for turn in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "ab", 1) == seed_of(0, "ab", 1) == 4571872852904468931
