"""Every verify step of decoding, recorded: the draft's block, the target's logits, and the tokens that were accepted.

Shapes decide how a forward rounds, and a token sampled within rounding of a boundary then falls on either side of it:
two ways of batching need not give the same tokens, on any processor. But as long as two replies are equal, they sample
with equal random numbers, and their logits and probabilities are equal up to rounding. That is compared here, step by
step, until rounding makes the replies diverge.

    P proposals   N = P + 1 rows   V vocabulary
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluation import decode

ROUNDING = 2**10  # steps of a type at the largest logit; 8 were measured, a fault shows in millions


@dataclass(frozen=True)
class VerifyStep:
    """One verification of one reply; the first is the prefill's. generator_state: before it."""

    ids: list[int]
    q_PV: Tensor | None
    logits_NV: Tensor
    generator_state: list[int] | None
    accepted: list[int]


class StepRecorder:
    """The verify steps of all replies decoded since the last `take`, by prompt and by whether they were sampled."""

    def __init__(self, monkeypatch):
        self.replies: dict[tuple, list[VerifyStep]] = {}
        acceptance_rule = decode._acceptance_rule

        def recorded_rule(sampling, prompt_ids):
            accept, generator = acceptance_rule(sampling, prompt_ids)
            steps = self.replies[tuple(prompt_ids), sampling is not None] = []

            def record(proposal, logits_NV):
                state = None if generator is None else generator.get_state().tolist()
                q_PV, logits = proposal.q_PV, logits_NV.clone()
                accepted = accept(proposal, logits_NV)
                steps.append(VerifyStep(proposal.ids_P.tolist(), q_PV, logits, state, accepted))
                return accepted

            return record, generator

        monkeypatch.setattr(decode, "_acceptance_rule", recorded_rule)

    def take(self) -> dict[tuple, list[VerifyStep]]:
        """Return what was recorded, and forget it."""
        taken, self.replies = dict(self.replies), {}
        return taken


def diverged(first: dict[tuple, list[VerifyStep]], second: dict[tuple, list[VerifyStep]]) -> set[tuple]:
    """Return the replies that diverge by rounding; AssertionError for any other difference, or where too many do."""
    assert first.keys() == second.keys()
    keys = {key for key in first if _diverges(first[key], second[key], key)}
    assert len(keys) <= len(first) / 3, f"{len(keys)} of {len(first)} replies diverged: that is no rounding"
    return keys


def _diverges(first: list[VerifyStep], second: list[VerifyStep], key: tuple) -> bool:
    for number, (a, b) in enumerate(zip(first, second, strict=False)):
        where = f"step {number} of {key}"
        assert a.generator_state == b.generator_state, f"{where}: other random numbers are drawn"
        pairs = zip(a.ids, b.ids, strict=False)
        same = next((at for at, (x, y) in enumerate(pairs) if x != y), min(len(a.ids), len(b.ids)))
        _assert_close(a.logits_NV[: same + 1], b.logits_NV[: same + 1], where)
        assert (a.q_PV is None) == (b.q_PV is None), where
        if a.q_PV is not None:  # of the first proposal that differs, too: it was drawn after the same tokens
            _assert_close(a.q_PV[: same + 1].log(), b.q_PV[: same + 1].log(), where)
        if (a.ids, a.accepted) != (b.ids, b.accepted):
            return True
    assert len(first) == len(second), f"{key}: {len(first)} steps and {len(second)}"
    return False


def _assert_close(a: Tensor, b: Tensor, where: str) -> None:
    bound = ROUNDING * torch.finfo(a.dtype).eps * max(1.0, float(b.abs().max()))
    error = float((a - b).abs().max())
    assert error <= bound, f"{where}: off by {error:.3g}, rounding is at most {bound:.3g}"
