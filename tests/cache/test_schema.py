"""What the JSON files of a cache say: read strictly, written as it was read, and described from the same source."""

import json
from pathlib import Path

import pytest
from cache_maker import COLUMNS, make_cache, random_samples
from schema_tables import README, tables

from pipeline.cache.manifest import FileFact, canonical, parse_record, read_record
from pipeline.cache.schema import (
    ColumnManifest,
    Identity,
    IndexManifest,
    SegmentManifest,
    TargetManifest,
    read_log,
)
from pipeline.errors import CacheError, VersionError

FACTS = {
    "cache": "00",
    "shard": 3,
    "spec": COLUMNS[0].as_dict(),
    "rows": 5,
    "samples": 2,
    "files": {"samples.arrow": {"size": 9, "xxh3": "ff"}},
    "refused": {"1": "not finite"},
    "facts": {"engine": "x", "new": [1], "probe": {"error": 0.5, "samples": [0]}},
}


def parsed(facts: dict, model=ColumnManifest):
    return parse_record(canonical(facts), Path("here"), model)


def test_the_tables_of_the_format_are_those_of_the_records():
    printed = README.read_text().partition("<!-- records -->\n")[2].partition("<!-- end of records -->\n")[0]
    assert printed == tables(), "run `make tables`"
    assert "object |  |" not in printed and "| None |" not in printed


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("cache.json", Identity),
        ("plan/000000.json", SegmentManifest),
        ("index.json", IndexManifest),
        ("target/manifest.json", TargetManifest),
        ("shards/000000/final.json", ColumnManifest),
    ],
)
def test_a_record_is_written_as_it_was_read(tmp_path, file, model):
    path = make_cache(tmp_path / "cache", random_samples(3, longest=9), refused={0: "odd"}) / file
    record = read_record(path, model)
    assert canonical(record.as_dict()) == path.read_bytes()
    assert record.hash == json.loads(path.read_bytes())["hash"]


def test_what_is_known_has_its_type_and_what_facts_say_beyond_is_kept():
    manifest = parsed(FACTS)
    assert manifest.spec == COLUMNS[0] and manifest.files["samples.arrow"] == FileFact(9, "ff")
    assert manifest.facts.probe.error == 0.5 and manifest.facts.gauge is None and manifest.facts.new == [1]
    assert canonical(manifest.as_dict()) == canonical(FACTS)


def test_what_a_later_version_says_beyond_is_no_damage_and_is_kept():
    later = {**FACTS, "more": 1}
    assert canonical(parsed(later).as_dict()) == canonical(later)


def without(facts: dict, *keys: str) -> dict:
    return {key: value for key, value in facts.items() if key not in keys}


@pytest.mark.parametrize(
    "facts",
    [
        {**FACTS, "shard": "3"},
        {**FACTS, "shard": True},
        {**FACTS, "shard": -1},
        {**FACTS, "rows": 2**63},
        {**FACTS, "rows": 5.0},
        {**FACTS, "files": {"samples.arrow": {"size": 9}}},
        {**FACTS, "files": []},
        {**FACTS, "spec": {**COLUMNS[0].as_dict(), "width": 0}},
        {**FACTS, "spec": {**COLUMNS[0].as_dict(), "dtype": 16}},
        {**FACTS, "spec": {**COLUMNS[0].as_dict(), "dtype": "float16", "width": 0}},
        {**FACTS, "refused": {"1": None}},
        {**FACTS, "facts": {"probe": {"error": 10**400}}},
        {**FACTS, "facts": {"gauge": {"rows": 1, "agree": 1}}},
        without(FACTS, "samples"),
        {},
    ],
)
def test_any_other_form_is_refused_in_one_line_that_names_the_file(facts):
    with pytest.raises(CacheError, match=r"^here: the manifest of something else; run `pipeline verify`$"):
        parsed(facts)


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({**FACTS, "files": {"samples.arrow": {"size": 9, "xxh3": "ff", "more": 1}}}, "the field 'files.samples.arrow"),
        ({**FACTS, "spec": {**COLUMNS[0].as_dict(), "more": 1}}, "the field 'spec.more' is"),
        ({**FACTS, "spec": {**COLUMNS[0].as_dict(), "dtype": "float16"}}, "spec.dtype 'float16' is"),
        ({**FACTS, "spec": {**COLUMNS[0].as_dict(), "keeps": "few\n"}}, r"spec.keeps 'few\\n' is"),
        ({**FACTS, "spec": {**COLUMNS[0].as_dict(), "dtype": "x", "m": 1}}, "spec.dtype .x. is"),
    ],
)
def test_what_a_later_version_says_where_nothing_may_be_passed_over_is_refused_by_name(facts, what):
    with pytest.raises(VersionError, match=rf"^here: {what}.* unknown to this version; upgrade draft-pipeline$"):
        parsed(facts)


NESTED = b"[" * 99 + b"]" * 99


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.replace(b'"rows": 5', b'"rows": 6'), "its own hash does not match"),
        (lambda data: data.replace(b'"rows": 5', b'"rows": NaN'), "no JSON any more"),
        (lambda data: data.replace(b'"rows": 5', b'"rows": 5, "rows": 5'), "its own hash does not match"),
        (lambda data: data.replace(b'"new": [', b'"new": [' + NESTED + b","), "no JSON any more"),
        (lambda data: data.replace(b'"engine": "x"', b'"engine": "\\ud800"'), "its own hash does not match"),
        (lambda data: data.replace(b'"x"', b'"\xff"'), "no JSON any more"),
        (lambda data: data.replace(b'"format": "1"', b'"format": "3"'), "its own hash does not match"),
        (lambda data: data[:-2], "no JSON any more"),
        (lambda data: data + b" ", "its own hash does not match"),
        (lambda data: b"[]", "its own hash does not match"),
        (lambda data: b"[" * 10**6, "no JSON any more"),
        (lambda data: b"", "no JSON any more"),
    ],
)
def test_damage_is_named_as_what_it_is_in_one_line(change, says):
    with pytest.raises(CacheError, match=says) as refused:
        parse_record(change(canonical(FACTS)), Path("here"), ColumnManifest)
    assert str(refused.value).startswith("here: ") and "\n" not in str(refused.value)


def hashed(body: bytes) -> bytes:
    """A file of this text, which ends before its hash, with the right hash: whoever forges one can compute it."""
    from pipeline.cache.manifest import _own_hash

    return body + b',\n "hash": "' + _own_hash(body).encode() + b'"\n}\n'


def test_a_right_hash_makes_neither_depth_nor_half_a_character_acceptable():
    body = canonical(FACTS).partition(b',\n "hash"')[0]
    parse_record(hashed(body), Path("here"), ColumnManifest)
    for forged in (body.replace(b'"new": [', b'"new": [' + NESTED + b","), body.replace(b'"x"', b'"\\ud800"')):
        with pytest.raises(CacheError, match="no JSON any more"):
            parse_record(hashed(forged), Path("here"), ColumnManifest)


def test_a_log_that_cannot_be_read_states_nothing(tmp_path):
    assert read_log(tmp_path).request is None
    (tmp_path / "capture.log").write_bytes(canonical({"columns": "none"}))
    assert read_log(tmp_path).columns is None
    (tmp_path / "capture.log").write_bytes(canonical({"identity": {"target": {"name": "a"}}, "of": "a later version"}))
    assert read_log(tmp_path).identity.as_dict() == {"target": {"name": "a"}}
