"""What an engine gained, call by call, against what `evaluate` measured on the same prompts."""

from collections.abc import Sequence

from pydantic import Field

from pipeline.evaluation.accept_length import engine_accept_length, gains_within
from pipeline.evaluation.reports import Sample
from pipeline.json_files import Count, Number, Record

SHOWN = 8  # differences that a report lists


class Difference(Record):
    """A prompt whose calls gain otherwise than `evaluate`'s, from one call on."""

    prompt: Count = Field(description="its index")
    call: Count = Field(description="index of the first call that differs")
    expected: Count | None = Field(description="tokens gained by `evaluate`; null: it makes no such call")
    found: Count | None = Field(description="by the engine; null: it makes no such call")


class Comparison(Record):
    """An engine's replies and gains against our own."""

    prompts: Count
    identical: Count = Field(description="replies identical to plain decoding")
    equal: Count | None = Field(description="prompts whose every call gains the same; null: only totals are shown")
    calls: Count | None = Field(description="of the engine, after the prefills; null: not shown")
    calls_expected: Count
    tokens: Count | None = Field(description="gained in these calls")
    engine_accept_len: Number | None = Field(description="the engine's own mean; null: it shows none")
    engine_accept_len_expected: Number | None = Field(description="that mean, from `evaluate`'s calls")
    differences: list[Difference] = Field(description="the first of them")

    @property
    def gains_equal(self) -> bool:
        """Whether it gains what `evaluate` says: in every call, or where only totals are shown, in sum."""
        if self.equal is not None:
            return self.equal == self.prompts
        return self.engine_accept_len is not None and self.engine_accept_len == self.engine_accept_len_expected

    @property
    def lossless(self) -> bool:
        return self.identical == self.prompts


def compare(
    replies: Sequence[dict], totals: dict | None, samples: Sequence[Sample], plain: Sequence[list[int]], max_new: int
) -> Comparison:
    """Compare an engine's replies and totals with the samples of `evaluate`'s report and with plain decoding.

    replies: of each prompt `ids`, and `gains` or None, in the order of `samples` and `plain`.
    """
    assert len(replies) == len(samples) == len(plain), f"{len(replies)} replies to {len(samples)} prompts"
    expected = [gains_within(sample.lengths, max_new) for sample in samples]
    found = [reply["gains"] for reply in replies]
    shown = None not in found
    pairs = list(zip(expected, found, strict=True)) if shown else []
    differences = [_difference(index, *pair) for index, pair in enumerate(pairs) if pair[0] != pair[1]]
    mean = 1 + totals["accepted"] / totals["drafts"] if totals and totals["drafts"] else None
    return Comparison(
        prompts=len(replies),
        identical=sum(reply["ids"] == ids for reply, ids in zip(replies, plain, strict=True)),
        equal=len(pairs) - len(differences) if shown else None,
        calls=sum(map(len, found)) if shown else None,
        calls_expected=sum(map(len, expected)),
        tokens=sum(map(sum, found)) if shown else None,
        engine_accept_len=mean,
        engine_accept_len_expected=engine_accept_length(
            [(sample.lengths, sample.accepted) for sample in samples], max_new
        ),
        differences=differences[:SHOWN],
    )


def _difference(prompt: int, expected: list[int], found: list[int]) -> Difference:
    common = min(len(expected), len(found))
    call = next((call for call in range(common) if expected[call] != found[call]), common)
    values = [gains[call] if call < len(gains) else None for gains in (expected, found)]
    return Difference(prompt=prompt, call=call, expected=values[0], found=values[1])
