"""Score the bundled target on parameters it never saw, and write its model card.

python data/score_target.py data/tiny-qwen3
"""

import argparse
import json
from pathlib import Path
from random import Random

import torch
from answer import load, play, right
from conversation import HELDOUT_SHARE
from generate import CONTROLS, SCORED, converse
from train_target import COOLDOWN, PROCESSES, SEED, STEP_TOKENS

ASKED = 200  # conversations a domain

CARD = """\
---
license: apache-2.0
---
# tiny-qwen3

A `Qwen3ForCausalLM` of {millions:.1f} million parameters, trained by us on conversations that our own generator writes.
It is the target of this project's demo and tests: real enough that a draft has something to learn, small enough for a
laptop. It knows the domains below and nothing else.

Eight layers, hidden size 256, 4 query and 2 key-value heads of 64, intermediate size 512, tied embeddings, a
byte-level BPE vocabulary of {vocab} in which every digit is one token. Weights are in bf16, meant to be run in fp32 on a CPU.
`<|mask|>` occurs in no text. The chat template is ChatML with generation marks, and adds no system text.

## What it gets right

Greedy replies in fp32 on {asked} conversations a domain whose parameters were held out of training (one parameter tuple
in {share}, by hash; templates of both splits). A conversation counts only if every reply is right to the letter: it
has to be one of the equal phrasings the generator could have drawn, with the right content.

| domain | exactly right | turns | tokens a reply |
| --- | --: | --: | --: |
{table}

`noise` is not scored: its replies are words drawn evenly, on which no draft can gain. `copy` is the positive control.

## How it was trained

Seed {seed}, {steps} steps of {processes} x at most {step_tokens} tokens, padding included, drawn afresh by `data/generate.py`; Muon for the matrices,
AdamW for the rest, loss on the replies only; the learning rate is constant, then falls to zero over the last {cooldown:.0%} of the steps.
**{minutes:.0f} minutes** on two CPU cores with AMX bf16, shared with other work. `train.jsonl` is the log: mean loss
and tokens of each 25 steps. Rebuild it, score it and let it answer `data/chats.jsonl` with

    python data/train_target.py --out data/tiny-qwen3
    python data/score_target.py data/tiny-qwen3
    python data/make_chats.py --model data/tiny-qwen3 --out data/chats.jsonl

A rebuild gives an equivalent model; equal bits are not promised, not even on the same machine.{resumed}

## What is held out from whom

The target was trained on every template, but never on a held-out parameter. `data/chats.jsonl` is answered by the
target itself. Its train split uses the first two thirds of each domain's templates and train parameters; its held-out
split the last third and held-out parameters, so a draft trained on the one has seen neither phrasing nor numbers of
the other. Train replies are half greedy and half sampled at temperature 0.7, held-out ones greedy, `noise` always
sampled at 1. A conversation is dropped if a reply has no end within 192 tokens, or if its text would not be read back
as the same tokens. Wrong replies stay: a draft learns the target's words, right or not.

Limits: English, these ten domains, two- and three-digit numbers, two turns. Anything else gets nonsense.
"""


def score(folder: Path, asked: int, domains: list[str]) -> dict[str, dict]:
    """Return, for each domain, the share of conversations exactly right, their turns and tokens a reply."""
    model, tokenizer = load(folder)
    rows = {}
    for domain in domains:
        rng = Random(f"score {domain}")
        conversations = [converse(domain, rng, params="heldout") for _ in range(asked)]
        torch.manual_seed(SEED)
        chats = play(model, tokenizer, conversations, 1.0 if domain == "noise" else 0.0)
        replies = [m["content"] for chat in chats if chat for m in chat if m["role"] == "assistant"]
        tokens = [len(tokenizer.encode(reply)) + 1 for reply in replies]
        good = sum(right(conversation, chat) for conversation, chat in zip(conversations, chats, strict=True))
        turns = sum(len(conversation.turns) for conversation in conversations)
        rows[domain] = {"right": good / asked, "turns": turns / asked, "tokens": sum(tokens) / max(1, len(tokens))}
        print(domain, rows[domain], flush=True)
    return rows


def card(folder: Path, asked: int, rows: dict[str, dict]) -> str:
    """Return the model card, from the scores, the log and the config."""
    log = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    stops = sum(later["minutes"] < line["minutes"] for line, later in zip(log, log[1:], strict=False))
    kind = {"copy": " (control)", "noise": " (control)"}
    table = "\n".join(
        f"| {domain}{kind.get(domain, '')} | {'-' if domain == 'noise' else format(row['right'], '.1%')} "
        f"| {row['turns']:.2f} | {row['tokens']:.1f} |"
        for domain, row in rows.items()
    )
    return CARD.format(
        millions=(folder / "model.safetensors").stat().st_size / 2e6,
        vocab=json.loads((folder / "config.json").read_text())["vocab_size"],
        asked=asked,
        share=HELDOUT_SHARE,
        table=table,
        seed=SEED,
        steps=log[-1]["step"],
        processes=PROCESSES,
        step_tokens=STEP_TOKENS,
        cooldown=COOLDOWN,
        minutes=log[-1]["minutes"],
        resumed=f" This run was stopped and resumed {stops} times." if stops else "",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--asked", type=int, default=ASKED)
    args = parser.parse_args()
    rows = score(args.folder, args.asked, [*SCORED, *CONTROLS])
    (args.folder / "README.md").write_text(card(args.folder, args.asked, rows))


if __name__ == "__main__":
    main()
