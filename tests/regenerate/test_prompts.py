"""The prompts of a corpus in any of its forms: what is asked, without what anyone has replied to it."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import write_jsonl

from pipeline.corpus.rejections import Tally
from pipeline.errors import DataError
from stages.regenerate.prompts import read_prompts

SYSTEM, ASKED, MORE = (
    {"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "a?"), ("user", "b?"))
)


def prompts(corpus, **chosen) -> list[list[list[dict]]]:
    return [row.segments for row in read_prompts(str(corpus), **chosen)]


@pytest.mark.parametrize(
    ("row", "segments"),
    [
        ({"messages": [SYSTEM, ASKED, {"role": "assistant", "content": None}, MORE]}, [[SYSTEM, ASKED], [MORE]]),
        ({"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "A."}]}, [[ASKED]]),
        ({"prompt": "a?"}, [[ASKED]]),
        ({"prompt": [SYSTEM, ASKED]}, [[SYSTEM, ASKED]]),
        ({"prompt": "a?", "completion": "A.", "system": "Be brief."}, [[SYSTEM, ASKED]]),
        ({"instruction": "a?"}, [[ASKED]]),
        ({"instruction": "a?", "input": "", "output": "A."}, [[ASKED]]),
        ({"instruction": "a?", "input": "4"}, [[{"role": "user", "content": "a?\n4"}]]),
        ({"instruction": "a?", "context": "4"}, [[{"role": "user", "content": "a?\n4"}]]),
        ({"instruction": "b?", "history": [["a?", "A."]]}, [[ASKED], [MORE]]),
        ({"question": "a?", "answer": "A."}, [[ASKED]]),
        ({"data": ["a?", "A.", "b?"]}, [[ASKED], [MORE]]),
        ({"messages": json.dumps([ASKED])}, [[ASKED]]),
        ({"messages": [ASKED], "status": "error"}, [[ASKED]]),
    ],
)
def test_a_row_of_any_form_says_what_is_asked(row, segments, tmp_path):
    assert prompts(write_jsonl(tmp_path / "a.jsonl", [row])) == [segments]


def test_prompts_lie_in_files_of_any_form(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "a?"}, {"prompt": "b?"}]))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "b?"}) + "\n")
    pq.write_table(pa.table({"prompt": ["a?"], "id": [7], "split": ["test"]}), tmp_path / "c.parquet")
    (tmp_path / "readme.md").write_text("no prompts")
    assert prompts(tmp_path) == [[[ASKED]], [[MORE]], [[MORE]], [[ASKED]]]
    *_, last = read_prompts(str(tmp_path))
    assert (last.location, last.passed_on) == ("c.parquet:1", {"id": 7, "split": "heldout"})


def test_roles_of_others_are_read_as_told_and_else_refused(tmp_path):
    row = {"messages": [{"role": "asker", "content": "a?"}, {"role": "bard", "content": "A."}]}
    corpus, tally = write_jsonl(tmp_path / "a.jsonl", [row]), Tally()
    assert prompts(corpus, roles="asker=user,bard=assistant") == [[[ASKED]]]
    assert prompts(corpus, tally=tally) == [] and tally.rejected == {"unknown role": 1}


def test_a_table_without_a_question_is_refused_with_its_columns(tmp_path):
    pq.write_table(pa.table({"answer": ["A."], "score": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="columns answer, score"):
        prompts(tmp_path / "a.parquet")
