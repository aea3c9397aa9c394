"""Chooses which samples of a conversation are planned: the one of its last turn, or one for every turn.

Where a template rewrites earlier turns (Qwen3 drops their reasoning, gpt-oss their analyses), one sample supervises the
last turn only. A sample for each turn, after its own prompt, supervises more tokens for every byte, since prompts are
shorter then, but takes more bytes in all.

    n samples
"""

from collections.abc import Sequence

import numpy as np

from pipeline.cache.samples import ShardPlan

LOST_SHARE = 0.05  # of the supervised tokens; `each` is the default where `last` loses more


def choose_turns(parts: Sequence[ShardPlan], requested: str | None) -> tuple[np.ndarray, dict]:
    """Return which samples are planned, bool [n], and the plan's note: the choice, its reason, the sizes of both.

    The samples of one row follow each other, the one of its last turn first. requested: `last`, `each`, or None.
    """
    first_n = np.concatenate([*_first_of_row(parts)])
    lengths_n = np.concatenate([part.lengths for part in parts])
    supervised_n = np.concatenate([part.supervised for part in parts])
    priced = {
        name: {
            "samples": int(chosen_samples.sum()),
            "tokens": int(lengths_n[chosen_samples].sum()),
            "supervised": int(supervised_n[chosen_samples].sum()),
        }
        for name, chosen_samples in (("last", first_n), ("each", np.ones_like(first_n)))
    }
    lost = 1 - priced["last"]["supervised"] / priced["each"]["supervised"]
    chosen = requested or ("each" if lost > LOST_SHARE else "last")
    why = f"`last` supervises {1 - lost:.1%} of the tokens that `each` does"
    if not lost:
        why = "one sample holds every turn of its conversation, so both are the same"
    elif requested:
        why = f"asked for; {why}"
    return (first_n if chosen == "last" else np.ones_like(first_n)), {"chosen": chosen, "why": why, **priced}


def _first_of_row(parts: Sequence[ShardPlan]):
    """Yield for each part which of its samples are the first of their row, bool [n]."""
    before = None
    for part in parts:
        rows = list(zip(part.text("source"), part.batch.column("line").to_pylist(), strict=True))
        yield np.array([row != previous for previous, row in zip([before, *rows], rows, strict=False)], bool)
        before = rows[-1]


def chosen_parts(parts: Sequence[ShardPlan], chosen_n: np.ndarray) -> list[ShardPlan]:
    """Return the parts with only their chosen samples; a part without any is left out."""
    import pyarrow as pa

    ends = np.cumsum([len(part) for part in parts])[:-1]
    masks = np.split(chosen_n, ends)
    found = [ShardPlan(part.batch.filter(pa.array(mask)), part.number) for part, mask in zip(parts, masks, strict=True)]
    return [part for part in found if len(part)]
