"""Counts of a corpus's records and turns, used and left out by reason, and the checks that a sample has to pass.

T tokens of a sample
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.errors import DataError
from pipeline.visible_text import visible

REFUSED_SHARE = 0.1  # of the records; a corpus with more rejected records is refused
EXAMPLES = 3  # stored for each reason
HARMLESS = ("no prompt", "empty reply")  # unproven turns that are context only and do not count against a corpus


class Unusable(Exception):
    """Raised for a record that cannot be used. `reason`: the category it is counted under, `detail`: for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass
class Tally:
    """Counts over the records of a corpus: what was read, what was left out by reason, with some examples of each."""

    records: int = 0
    truncated: int = 0
    turns: int = 0  # supervised, in all samples
    last_turns: int = 0  # of these, in the samples of last turns
    unproven: Counter[str] = field(default_factory=Counter)  # turns left unsupervised, by reason
    kinds: dict[str, dict] = field(default_factory=dict)  # by kind of turn: how many, and the first one's file:line
    rejected: Counter[str] = field(default_factory=Counter)
    too_short: int = 0  # samples with nothing to learn within max_length; not rejected
    examples: dict[str, list[str]] = field(default_factory=dict)
    unknown_keys: dict[str, tuple[int, str]] = field(default_factory=dict)  # of messages: records, first file:line

    def reject(self, reason: str, example: str) -> None:
        self.rejected[reason] += 1
        self.add_example(reason, example)

    def add_example(self, reason: str, example: str) -> None:
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append(visible(example))

    def add_unknown_key(self, key: str, where: str) -> None:
        """Count a record that has this unknown key in its messages."""
        count, first = self.unknown_keys.get(key, (0, where))
        self.unknown_keys[key] = count + 1, first

    def count_turns(
        self, turns: int, last: int, kinds: Sequence[str], unproven: Sequence[tuple[str, str]], where: str
    ) -> None:
        """Count the turns of the record at `where`: supervised ones, those in its last turn's sample, and others.

        kinds: of the supervised turns that are planned. unproven: (reason, detail) of those that are not supervised.
        """
        self.turns += turns
        self.last_turns += last
        for kind in kinds:
            self.kinds.setdefault(kind, {"count": 0, "first": where})["count"] += 1
        for reason, detail in unproven:
            self.unproven[reason] += 1
            self.add_example(reason, f"{where}: {detail}")

    def as_notes(self) -> dict:
        """Return the counts as the plan's manifest stores them."""
        unknown_keys = {key: count for key, (count, _) in sorted(self.unknown_keys.items())}
        return {
            **({"unknown_keys": unknown_keys} if unknown_keys else {}),
            "rows": self.records,
            "truncated": self.truncated,
            "supervised_turns": self.turns,
            "rewritten_turns": self.turns - self.last_turns,
            "unproven_turns": dict(sorted(self.unproven.items())),
            "kinds": dict(sorted(self.kinds.items())),
            "too_short": self.too_short,
            "faults": dict(sorted(self.rejected.items())),
            "examples": dict(sorted(self.examples.items())),
        }

    def check_usable(self, corpus: str, usable: int) -> None:
        """Raise DataError for a corpus with no usable sample, or with too many rejected records or unproven turns."""
        rejected = sum(self.rejected.values())
        shown = "; ".join(example for examples in self.examples.values() for example in examples[:1])
        if not usable:
            why = shown or "it is empty"
            raise DataError(f"{corpus}: no usable sample in {self.records} rows ({why}); name another corpus")
        unproven = sum(count for reason, count in self.unproven.items() if reason not in HARMLESS)
        if unproven > REFUSED_SHARE * (self.turns + unproven):
            raise DataError(
                f"{corpus}: {unproven} of {self.turns + unproven} turns do not prove to be what the target would write "
                f"behind an engine's prompt, at most {REFUSED_SHARE:.0%} are let go ({shown}); repair or remove them"
            )
        if rejected > REFUSED_SHARE * self.records:
            raise DataError(
                f"{corpus}: {rejected} of {self.records} rows cannot be used, at most {REFUSED_SHARE:.0%} are let go "
                f"({shown}); repair or remove them"
            )


def report_unknown_keys(tally: Tally) -> None:
    """Print to stderr which unknown keys of messages were ignored, in how many records and where first."""
    for key, (count, first) in sorted(tally.unknown_keys.items()):
        count_text = f"`{visible(key)}`: {count:,} rows, the first {visible(first)}"
        print(f"a key of messages that no template is shown, {count_text}", file=sys.stderr)


def left_out_lines(notes: dict, duplicates: int) -> list[str]:
    """Return what planning left out or truncated, a line for each reason: the count, and an example's file and line.

    notes: `Tally.as_notes` as a plan's manifest holds them, with `turns` where a choice was made.
    """
    counts = {f"left out, {why}": (count, why) for why, count in notes["faults"].items()}
    counts["left out, too short"] = (notes["too_short"], "too short")
    counts["left out, duplicates"] = (duplicates, None)
    if (notes.get("turns") or {}).get("chosen", "last") == "last":
        counts["turns that the template rewrites later, not supervised"] = (notes["rewritten_turns"], None)
    for why, count in notes.get("unproven_turns", {}).items():
        counts[f"turns not supervised, {why}"] = (count, why)
    counts["cut at max_length"] = (notes["truncated"], None)
    examples = {why: shown[0] for why, shown in notes["examples"].items()}
    return [
        f"{what}: {count:,}" + (f", such as {examples[why]}" if why in examples else "")
        for what, (count, why) in counts.items()
        if count
    ]


def check_mask(mask_T: np.ndarray) -> None:
    """Raise Unusable for a mask that supervises no token, or every token."""
    if not mask_T.any():
        raise Unusable("nothing supervised", f"none of its {len(mask_T)} tokens is marked as the assistant's")
    if mask_T.all():
        raise Unusable(
            "all supervised", f"all of its {len(mask_T)} tokens are marked as the assistant's, the prompt too"
        )


def check_ids(ids_T: np.ndarray, vocab_size: int) -> None:
    """Raise Unusable for a token id that the target has no embedding for."""
    if (largest := int(ids_T.max())) >= vocab_size:
        raise Unusable(
            "unknown token",
            f"holds token {largest}, outside the target's {vocab_size}; is the tokenizer another one's?",
        )


def trim(ids_T: np.ndarray, mask_T: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Cut ids and mask one token after the last supervised one; None without two adjacent supervised tokens.

    The anchor of a block is a supervised token followed by another, so without such a pair there is nothing to learn.
    """
    if not (mask_T[:-1] & mask_T[1:]).any():
        return None
    end = int(np.flatnonzero(mask_T)[-1]) + 2
    return ids_T[:end], mask_T[:end]
