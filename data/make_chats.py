"""Let the target answer the generator's prompts: `chats.jsonl`, what drafts are trained and judged on.

    python data/make_chats.py --model data/tiny-qwen3 --out data/chats.jsonl

Train prompts come from train templates and train parameters, held-out prompts from held-out ones of both. Domains
take turns, line by line, so that any first lines of a split hold all of them.

The replies are those of `pipeline regenerate`. The greedy rows of the chats that come with the target are what it
writes; those at a temperature were drawn from another stream of random numbers, so it draws others.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from answer import LONGEST, usable
from conversation import Conversation
from generate import DOMAINS, converse
from transformers import PreTrainedTokenizerBase

from pipeline.target.chat_template import load_tokenizer
from stages.regenerate.prompts import Options
from stages.regenerate.run import run

SEED = 21
WARM = 0.7  # temperature of the sampled half of the train split


def temperatures(domain: str, split: str) -> list[float]:
    """Return at which temperatures the replies are drawn, each for an equal part of the conversations."""
    if domain == "noise":
        return [1.0]
    return [0.0, WARM] if split == "train" else [0.0]


def prompts(domain: str, split: str, count: int) -> list[Conversation]:
    """Draw conversations with distinct prompts."""
    rng = Random(f"{SEED} {domain} {split}")
    drawn: dict[tuple, Conversation] = {}
    while len(drawn) < count:
        conversation = converse(domain, rng, params=split, templates=split)
        drawn.setdefault(tuple(turn.user for turn in conversation.turns), conversation)
    return list(drawn.values())


def answered(model: Path, conversations: list[Conversation], temperature: float, work: Path) -> list[list[dict] | None]:
    """Return each conversation's messages with the target's replies, None if one is unusable.

    By `pipeline regenerate`, whose journal in `work` lets the same command go on after any stop.
    """
    prompts = work.with_suffix(".prompts.jsonl")
    with open(prompts, "w") as file:
        for place, conversation in enumerate(conversations):
            turns = [({"role": "user", "content": turn.user}, {"role": "assistant"}) for turn in conversation.turns]
            file.write(json.dumps({"id": place, "messages": [message for turn in turns for message in turn]}) + "\n")
    options = Options(
        str(prompts),
        work.with_suffix(".jsonl"),
        model=str(model),
        temperature=temperature,
        seed=SEED,
        max_new=LONGEST,
        batch=256,
    )
    run(options)
    tokenizer, chats = load_tokenizer(model), [None] * len(conversations)
    for line in options.out.read_text().splitlines():
        row = json.loads(line)
        chats[row["id"]] = chat(tokenizer, row["messages"], len(conversations[row["id"]].turns))
    return chats


def chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict], turns: int) -> list[dict] | None:
    """Return messages as roles and contents, None unless every turn has a usable reply."""
    replies = [message for message in messages if message["role"] == "assistant"]
    if len(replies) < turns or any(usable(tokenizer, reply["token_ids"]) is None for reply in replies):
        return None
    return [{key: message[key] for key in ("role", "content")} for message in messages]


def rows(model: Path, work: Path, split: str, count: int) -> Iterator[dict]:
    """Yield the answered conversations of one split, the domains in turns; the unusable ones are left out."""
    by_domain = [prompts(domain, split, count) for domain in DOMAINS]
    asked = [(place, of_domain[place]) for place in range(count) for of_domain in by_domain]
    ways = [temperatures(conversation.domain, split) for _, conversation in asked]
    chosen = [way[place % len(way)] for (place, _), way in zip(asked, ways, strict=True)]
    chats: dict[int, list[dict] | None] = {}
    for temperature in sorted(set(chosen)):
        where = [n for n, t in enumerate(chosen) if t == temperature]
        played = answered(model, [asked[n][1] for n in where], temperature, work / f"{split}-at-{temperature:g}.x")
        chats |= dict(zip(where, played, strict=True))
    dropped = Counter(asked[n][1].domain for n, chat in chats.items() if chat is None)
    print(f"{split}: {len(asked) - dropped.total()} kept, dropped {dict(dropped)}", flush=True)
    for n, (place, conversation) in enumerate(asked):
        if chats[n] is not None:
            yield {
                "id": f"{conversation.domain}-{split}-{place}",
                "domain": conversation.domain,
                "split": split,
                "template": conversation.template,
                "decoding": "sampled" if chosen[n] else "greedy",
                "messages": chats[n],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("data/tiny-qwen3"))
    parser.add_argument("--out", type=Path, default=Path("data/chats.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("build/chats"), help="where replies are kept meanwhile")
    parser.add_argument("--train", type=int, default=500, help="train conversations a domain")
    parser.add_argument("--heldout", type=int, default=48, help="held-out conversations a domain")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w") as out:
        for split in ("heldout", "train"):
            for row in rows(args.model, args.work, split, getattr(args, split)):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
