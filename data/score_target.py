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
from train_target import SEED

ASKED = 200  # conversations a domain

CARD = """\
---
license: apache-2.0
---
# tiny-qwen3

A `Qwen3ForCausalLM` of {millions:.1f} million parameters, trained by us on conversations that our own generator writes.
It is the target of this project's demo and tests: real enough that a draft has something to learn, small enough for a
laptop. It knows the ten domains below and nothing else.

Eight layers, hidden size 256, 4 query and 2 key-value heads of 64, intermediate size 640, tied embeddings, a byte-level
BPE vocabulary of {vocab} in which every digit is one token. Weights are in bf16, meant to be run in fp32 on a CPU.
`<|mask|>` occurs in no text. The chat template is ChatML with generation marks and adds no system text.

## What it gets right

Greedy replies in fp32 on {asked} conversations a domain whose parameters were held out of training (one tuple in
{share}, by hash; templates of both splits). A conversation counts only if every reply in it is right to the letter: one
of the equal phrasings that the generator could have drawn, with the right content.

| domain | exactly right | turns | tokens a reply |
| --- | --: | --: | --: |
{table}

`noise` is not scored: its replies are words drawn evenly, on which no draft can gain; `copy` is the positive control.
In the other eight a reply often has two or three equal phrasings at several places, of different lengths.

## How it was trained

{phases}

Conversations are drawn by `data/generate.py`; Muon for the layers' matrices, AdamW for the rest, loss on the replies
only, global norm clipped at 1. **{minutes:.0f} minutes** in all on two CPU cores with AMX bf16, shared with other
work. `train.jsonl` is the log. Rebuild it, score it, and let it answer `data/chats.jsonl`:

    python data/train_target.py --out data/tiny-qwen3
    python data/score_target.py data/tiny-qwen3
    python data/make_chats.py --model data/tiny-qwen3 --out data/chats.jsonl

A rebuild gives an equivalent model; equal bits are not promised.{history}

## What is held out from whom

The target was trained on every template but never on a held-out parameter. `data/chats.jsonl` is answered by the target
itself. Its train split uses the first two thirds of each question's templates and train parameters, its held-out split
the last third and held-out parameters: a draft trained on the one has seen neither phrasing nor numbers of the other.
Train replies are half greedy and half sampled at temperature 0.7, held-out ones greedy; `noise` is always sampled at 1.
A conversation is dropped if a reply has no end within 192 tokens or if its text would not be read back as the same
tokens. Wrong replies stay: a draft learns the target's words, right or not.

Limits: English, these ten domains, two- and three-digit numbers, at most two turns. Anything else gets nonsense.
"""
PHASE = (
    "- phase {phase}: {steps} steps of at most {batch_tokens} tokens, padding included ({tokens:,} in all), "
    "seed {seed},\n  peak learning rate {lr}, laid for {horizon} steps of which the last {cooldown:.0%} fall to 2 %; "
    "shares {shares}"
)


def score(folder: Path, asked: int, domains: list[str]) -> dict[str, dict]:
    """Return, for each domain, the share of conversations exactly right, their turns and tokens a reply."""
    model, tokenizer = load(folder)
    rows = {}
    for domain in domains:
        rng = Random(f"score {domain}")
        templates = ("train", "heldout")
        conversations = [converse(domain, rng, "heldout", templates[n % 2]) for n in range(asked)]
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
    last = {line["phase"]: line for line in log if "loss" in line}
    phases = [line | {"tokens": last[line["phase"]]["tokens"]} for line in log if "batch_tokens" in line]
    table = "\n".join(
        f"| {domain}{' (control)' if domain in CONTROLS else ''} "
        f"| {'-' if domain == 'noise' else format(row['right'], '.1%')} | {row['turns']:.2f} | {row['tokens']:.1f} |"
        for domain, row in rows.items()
    )
    return CARD.format(
        millions=(folder / "model.safetensors").stat().st_size / 2e6,
        vocab=json.loads((folder / "config.json").read_text())["vocab_size"],
        asked=asked,
        share=HELDOUT_SHARE,
        table=table,
        phases="\n".join(PHASE.format(**phase) for phase in phases),
        minutes=sum(line["minutes"] for line in last.values()),
        history="".join(f" {line['note']}" for line in log if "note" in line),
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
