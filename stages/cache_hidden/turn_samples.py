"""Which samples of a conversation are planned: the one of its last turn, or one for every turn.

A template that rewrites earlier turns (Qwen3 drops their thoughts, gpt-oss their analyses) leaves one sample with its
last turn only. Each turn behind the prompt it was answered to is worth more for every byte, since prompts are shorter
then, but takes more bytes in all.

    n samples
"""

from collections.abc import Sequence

import numpy as np

from pipeline.cache.samples import ShardPlan

LOST_SHARE = 0.05  # of the supervised tokens; above it `each` is taken unless told otherwise


def choose_turns(parts: Sequence[ShardPlan], asked: str | None) -> tuple[np.ndarray, dict]:
    """Return which samples are planned, bool [n], and both prices with the choice and its reason, as notes have them.

    The samples of one row follow each other, the one of its last turn first. `asked` is `last`, `each`, or None.
    """
    first_n = np.concatenate([*_first_of_row(parts)])
    lengths_n = np.concatenate([part.lengths for part in parts])
    supervised_n = np.concatenate([part.supervised for part in parts])
    priced = {
        name: {
            "samples": int(kept.sum()),
            "tokens": int(lengths_n[kept].sum()),
            "supervised": int(supervised_n[kept].sum()),
        }
        for name, kept in (("last", first_n), ("each", np.ones_like(first_n)))
    }
    lost = 1 - priced["last"]["supervised"] / priced["each"]["supervised"]
    chosen = asked or ("each" if lost > LOST_SHARE else "last")
    why = f"`last` supervises {1 - lost:.1%} of the tokens that `each` does"
    if not lost:
        why = "one sample holds every turn of its conversation, so both are the same"
    elif asked:
        why = f"asked for; {why}"
    return (first_n if chosen == "last" else np.ones_like(first_n)), {"chosen": chosen, "why": why, **priced}


def _first_of_row(parts: Sequence[ShardPlan]):
    """Yield for each part which of its samples is its row's first, bool [n]."""
    before = None
    for part in parts:
        rows = list(zip(part.text("source"), part.batch.column("line").to_pylist(), strict=True))
        yield np.array([row != previous for previous, row in zip([before, *rows], rows, strict=False)], bool)
        before = rows[-1]


def kept_parts(parts: Sequence[ShardPlan], kept_n: np.ndarray) -> list[ShardPlan]:
    """Return the parts with their kept samples only, none without any."""
    import pyarrow as pa

    ends = np.cumsum([len(part) for part in parts])[:-1]
    masks = np.split(kept_n, ends)
    found = [ShardPlan(part.batch.filter(pa.array(mask)), part.number) for part, mask in zip(parts, masks, strict=True)]
    return [part for part in found if len(part)]
