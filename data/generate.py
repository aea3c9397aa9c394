"""The generator: conversations of ten domains, with prompts split by template and by parameters.

python data/generate.py arithmetic      # a look at a few conversations
"""

import sys
from random import Random

from conversation import Conversation, Draw
from domains.numbers import arithmetic, sequence, units
from domains.structures import as_json, lists, python, sql, table
from domains.words import copy, noise

SCORED = {
    "arithmetic": arithmetic,
    "sequence": sequence,
    "units": units,
    "json": as_json,
    "sql": sql,
    "table": table,
    "python": python,
    "lists": lists,
}
CONTROLS = {"copy": copy, "noise": noise}  # a draft must gain a lot on the first and nothing on the second
DOMAINS = SCORED | CONTROLS


def converse(domain: str, rng: Random, params: str = "train", templates: str = "any") -> Conversation:
    """Draw one conversation of DOMAIN from a split of the parameters and one of the templates."""
    draw = Draw(rng, params, templates)
    turns = DOMAINS[domain](draw)
    return Conversation(domain, params, "-".join(map(str, draw.asked)), turns)


def draw_turns(rng: Random, shares: dict[str, float]) -> list[tuple[str, str]]:
    """Draw what the user and the target say in one training conversation: any template, training parameters."""
    domain = rng.choices(list(DOMAINS), [shares.get(name, 1.0) for name in DOMAINS])[0]
    return [(turn.user, turn.reply) for turn in converse(domain, rng).turns]


if __name__ == "__main__":
    rng = Random(0)
    for _ in range(4):
        for turn in converse(sys.argv[1], rng).turns:
            print(f"user: {turn.user}\nassistant: {turn.reply}\n")
