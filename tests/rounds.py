"""Every round of decoding, listened to: what the target and the draft said in it, and what was kept.

Shapes decide how a forward rounds, and a number drawn within rounding of a boundary then falls on either side of it:
no two ways of decoding owe each other the same tokens, on no processor. What they do owe each other: as long as two
texts are the same, so are the numbers drawn, and the logits and chances but for rounding. That is compared here, round
by round, until rounding parts them.

    P proposals   N = P + 1 rows   V vocabulary
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.evaluate import decode

ROUNDING = 2**10  # steps of a type at the largest logit; 8 were measured, a fault shows in millions


@dataclass(frozen=True)
class Round:
    """One verification of one text; the first is the prefill's. generator_state: before it."""

    ids: list[int]
    q_PV: Tensor | None
    logits_NV: Tensor
    generator_state: list[int] | None
    kept: list[int]


class Rounds:
    """The rounds of all texts decoded since the last `take`, by prompt and by whether they were drawn."""

    def __init__(self, monkeypatch):
        self.texts: dict[tuple, list[Round]] = {}
        rule = decode._acceptance_rule

        def heard(sampling, prompt_ids):
            keep, generator = rule(sampling, prompt_ids)
            rounds = self.texts[tuple(prompt_ids), sampling is not None] = []

            def listen(proposal, logits_NV):
                state = None if generator is None else generator.get_state().tolist()
                q_PV, logits = proposal.q_PV, logits_NV.clone()
                kept = keep(proposal, logits_NV)
                rounds.append(Round(proposal.ids_P.tolist(), q_PV, logits, state, kept))
                return kept

            return listen, generator

        monkeypatch.setattr(decode, "_acceptance_rule", heard)

    def take(self) -> dict[tuple, list[Round]]:
        """Return what was heard, and forget it."""
        taken, self.texts = dict(self.texts), {}
        return taken


def parted(one: dict[tuple, list[Round]], other: dict[tuple, list[Round]]) -> set[tuple]:
    """Return the texts that rounding parted; AssertionError for any other difference, or where they are too many."""
    assert one.keys() == other.keys()
    found = {text for text in one if _parted(one[text], other[text], text)}
    assert len(found) <= len(one) / 3, f"{len(found)} of {len(one)} texts parted: that is no rounding"
    return found


def _parted(one: list[Round], other: list[Round], text: tuple) -> bool:
    for number, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        where = f"round {number} of {text}"
        assert mine.generator_state == theirs.generator_state, f"{where}: other numbers are drawn"
        pairs = zip(mine.ids, theirs.ids, strict=False)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(mine.ids), len(theirs.ids)))
        _assert_near(mine.logits_NV[: same + 1], theirs.logits_NV[: same + 1], where)
        assert (mine.q_PV is None) == (theirs.q_PV is None), where
        if mine.q_PV is not None:  # of the first proposal that differs, too: it was drawn after the same tokens
            _assert_near(mine.q_PV[: same + 1].log(), theirs.q_PV[: same + 1].log(), where)
        if (mine.ids, mine.kept) != (theirs.ids, theirs.kept):
            return True
    assert len(one) == len(other), f"{text}: {len(one)} rounds and {len(other)}"
    return False


def _assert_near(mine: Tensor, theirs: Tensor, where: str) -> None:
    bound = ROUNDING * torch.finfo(mine.dtype).eps * max(1.0, float(theirs.abs().max()))
    error = float((mine - theirs).abs().max())
    assert error <= bound, f"{where}: off by {error:.3g}, rounding is at most {bound:.3g}"
