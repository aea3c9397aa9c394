"""What a served export shows: whether the engine serves what `evaluate` measured, and whose fault it is if not."""

from pydantic import Field

from pipeline.json_files import Count, Record
from stages.serve_check.compare import Comparison
from stages.serve_check.draft_states import DraftStates


class Served(Record):
    """One start of the engine: what it gained, and what that means."""

    title: str = Field(description='"as it is", or "mended"')
    engine: str = Field("", description="its name and version")
    mends: list[str] = Field(default_factory=list, description="what was mended in its process, its files untouched")
    comparison: Comparison | None = Field(None, description="null: it did not serve the draft")
    plain_identical: Count | None = Field(
        None, description="replies identical to the engine's own plain decoding, asked where they are not to ours"
    )
    states: DraftStates | None = None
    states_missing: str = Field("", description="why the draft's states were not compared")
    failure: str = Field("", description="why it did not serve the draft")
    agrees: bool = Field(description="lossless, and every call gains what `evaluate` says")
    verdict: str


def failed(title: str, failure: str) -> Served:
    """Return what is said of an engine that did not serve the draft."""
    return Served(title=title, failure=failure, agrees=False, verdict="the engine does not serve this draft")


def judge(
    comparison: Comparison, states: DraftStates | None, states_missing: str, plain_identical: int | None
) -> tuple[bool, str]:
    """Return whether the engine serves what `evaluate` measured, and what its figures mean.

    The export's files are proven before: `check-export`.
    """
    own = comparison.prompts if plain_identical is None else plain_identical
    if not comparison.lossless and own < comparison.prompts:
        return False, "the engine is not lossless: with the draft it says something else than without; its fault"
    wrong_draft = states is not None and not states.draft_equal
    if comparison.gains_equal:
        if not wrong_draft:
            return True, "the engine gains what `evaluate` says, in every call"
        return False, f"no call gains otherwise, but {_kernel(states)}"
    if not comparison.lossless:
        return False, (
            "the engine's own plain replies differ from ours, so its target rounds otherwise (another type or kernel) "
            "and its gains cannot be compared call by call; compare its mean"
        )
    if states is None:
        why = states_missing or "no block was recorded"
        return False, f"it gains otherwise, and whether its kernels or the export cause it cannot be told: {why}"
    if not states.features_equal:
        return False, (
            f"the engine gives the draft other states of the target ({states.features:.1e} off): other layers, or a "
            "wrong kernel of the target; the export's files are proven"
        )
    if wrong_draft:
        return False, _kernel(states)
    return False, (
        f"the draft's states are ours within {states.states:.1e}, and {states.equal_proposals} of {states.blocks} "
        "blocks propose the same: the engine reads proposals off them, or verifies them, otherwise; a few such blocks "
        "are near ties"
    )


def _kernel(states: DraftStates) -> str:
    return (
        f"the engine computes the draft otherwise than its files say: states {states.states:.1e} off where right ones "
        f"differ by {states.tolerance:.0e} at most; the export's files are proven, so a kernel of the engine is wrong"
    )
