"""Reports on disk: of every version, to the byte, and refused where anything read is not as expected."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from reports import evaluation

from pipeline.errors import UsageError
from pipeline.evaluation.reports import Report, load_report, report_bytes

RESULTS = sorted((Path(__file__).parents[2] / "data/results").glob("*.json"))
FIRST_VERSION = {  # as 0.1.0 wrote it
    "draft": {
        "path": "run", "method": "domino", "block_size": 8, "proposals": 8, "steps": 600, "seed": 0,
        "parameters": 1000, "label": "domino, block 8, 600 steps",
    },
    "target": "tiny",
    "cache": None,
    "settings": {"prompts": "p.jsonl", "max_new": 64, "temperature": 0, "device": "cpu", "dtype": "float32"},
    "overall": {
        "prompts": 1, "accept_len": 2.0, "interval": [2.0, 2.0], "calls": 1, "tokens": 2, "per_slot": [1.0],
        "calls_saved": 0.5,
    },
    "domains": {},
    "samples": [{"domain": "sql", "lengths": [2], "matched": [1]}],
    "speed": {"plain_tokens_s": 1.0, "speculative_tokens_s": 2.0, "speedup": 2.0},
    "lossless": {"prompts": 1, "identical": 1, "near_ties": 0},
    "near_ties": [],
    "agreement": None,
    "teacher_forced": {},
}  # fmt: skip


def test_the_reports_of_version_0_5_0_are_written_again_to_the_byte_but_for_the_checksum():
    assert len(RESULTS) > 50
    for path in RESULTS:
        written = report_bytes(load_report(path).as_dict()).decode()
        assert re.sub(r',\n "xxh3": "[0-9a-f]{16}"', "", written) == path.read_text(), path


def test_a_report_of_the_first_version_is_read_and_its_keys_stay_as_they_are(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(FIRST_VERSION))

    report = load_report(path)

    assert json.dumps(report.as_dict()) == path.read_text()
    assert (report.sampled, report.confidence, report.settings.threshold) == (None, None, 0)


def leaves(value, path=()):
    """Every number and string of a JSON value, as the keys and indices that lead to it."""
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(entry, (*path, key))
    else:
        yield path


@pytest.mark.parametrize("wrong", [[], {}, True, 1 << 63])
def test_any_field_with_another_in_its_place_is_refused_in_one_line_that_names_its_part(tmp_path, wrong):
    path = evaluation(tmp_path / "x.json", samples=[("sql", [4])], sampled=([("sql", [2])], 1.0, 0.0))
    whole = path.read_text()
    for keys in leaves(json.loads(whole)):
        if wrong == 1 << 63 and keys[-1] not in ("calls", "tokens", "max_new", "parameters", "near_ties"):
            continue
        report = json.loads(whole)
        part = report
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = wrong
        path.write_text(json.dumps(report))
        says = rf"x\.json is no report .*its `{keys[0]}` is absent or not as expected"
        with pytest.raises(UsageError, match=says) as refused:
            load_report(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"domains": {str(number): 0 for number in range(1000)}},
        {"teacher_forced": {str(number): "" for number in range(1000)}},
        {"samples": [None] * 1000},
        {"samples": [{"domain": "sql", "lengths": [None] * 1000}]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_thousand_wrong_entries_are_one_error_since_a_million_would_fill_the_memory(change):
    with pytest.raises(ValidationError) as refused:
        Report.model_validate(FIRST_VERSION | change)
    assert refused.value.error_count() == 1
