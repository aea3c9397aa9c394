"""The record of a regenerated corpus, and what a capture refuses because of it, with both values."""

import pytest

from pipeline.corpus.regenerated import Regenerated, check_regenerated, read_regenerated
from pipeline.errors import DataError, UsageError

IDENTITY = {
    "target": {"name": "Org/Tiny", "revision": "", "digest": "t" * 32},
    "tokenizer": {"digest": "k" * 32, "chat_template": "c" * 32},
}
RECORD = Regenerated(
    model="tiny",
    target="t" * 32,
    tokenizer="k" * 32,
    chat_template="c" * 32,
    engine="vllm",
    temperature=0.7,
    top_p=0.9,
    seed=3,
    template_kwargs={"enable_thinking": False},
    max_tokens=100,
    stops=["stop"],
).model_dump()
MODE = {"enable_thinking": False}


def test_what_was_made_here_is_let_in():
    check_regenerated(RECORD, IDENTITY, MODE)
    check_regenerated(
        {**RECORD, "target": None, "tokenizer": None, "chat_template": None}, IDENTITY, MODE
    )  # the same by its name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": "x" * 32}, ("target " + "x" * 32, "is " + "t" * 32)),
        ({"tokenizer": "x" * 32}, ("tokenizer " + "x" * 32, "is " + "k" * 32)),
        ({"chat_template": "x" * 32}, ("chat template " + "x" * 32, "is " + "c" * 32)),
        ({"target": None, "model": "other/Huge"}, ("'other/Huge'", "'Org/Tiny'")),
        ({"template_kwargs": {"enable_thinking": True}}, ('{"enable_thinking": true}', '{"enable_thinking": false}')),
        ({"template_kwargs": {}}, ("arguments {}", '{"enable_thinking": false}')),
    ],
)
def test_every_difference_is_refused_with_both_values(change, said):
    with pytest.raises(UsageError) as refused:
        check_regenerated({**RECORD, **change}, IDENTITY, MODE)
    assert all(part in str(refused.value) for part in said)


def test_another_mode_of_the_capture_is_refused_with_what_to_pass():
    with pytest.raises(UsageError, match=r"pass `--template-kwargs '.\"enable_thinking\": false.'`"):
        check_regenerated(RECORD, IDENTITY, None)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**RECORD, "version": 2}, "version 2, and this release reads 1"),
        ("yes", "version None"),
        ({**RECORD, "seed": "three"}, "damaged at seed"),
        ({**RECORD, "surprise": 1}, "damaged at surprise"),
        ({key: value for key, value in RECORD.items() if key != "engine"}, "damaged at engine"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(record, said):
    with pytest.raises(DataError, match=said):
        read_regenerated(record)
