"""Manifests tell every change, name other versions, and never lead out of the cache."""

import errno
import os

import numpy as np
import pytest

from pipeline.cache.file_writer import create_identity
from pipeline.cache.layout import FORMATS, IDENTITY, path_inside
from pipeline.cache.manifest import canonical, parse_canonical, read_canonical, write_canonical
from pipeline.errors import CacheError, UsageError, VersionError


def test_a_manifest_comes_back_and_its_bytes_are_canonical(tmp_path):
    facts = {"b": [1, 2.5, None], "a": {"ü": True}}
    write_canonical(tmp_path / "x.json", facts)

    held = read_canonical(tmp_path / "x.json")

    assert held.pop("hash") and held == {**facts, "format": "1"}
    assert canonical({"a": {"ü": True}, "b": [1, 2.5, None]}) == (tmp_path / "x.json").read_bytes()
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("version", FORMATS)
def test_every_flipped_bit_and_every_cut_is_refused_as_damage(version, tmp_path):
    data = canonical({"layer": 3, "name": "aux.3", "of": {"format": "x"}}, version)

    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CacheError):
            parse_canonical(bytes(changed), tmp_path)
    for length in range(len(data)):
        with pytest.raises(CacheError):
            parse_canonical(data[:length], tmp_path)


@pytest.mark.parametrize("data", [canonical({}, "2"), canonical({}, "2").replace(b'"hash": "', b'"hash": "sha')])
def test_a_later_format_version_is_named_with_ours_and_is_no_damage(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)

    wanted = "format version '2' is unknown to this version, which reads '1' and '1-rc2'; upgrade draft-pipeline"
    with pytest.raises(VersionError, match=wanted) as refused:
        read_canonical(tmp_path / "x.json")
    assert refused.value.code == 4 and not isinstance(refused.value, CacheError)


def test_an_older_format_version_is_told_from_a_later_one(tmp_path):
    (tmp_path / "x.json").write_bytes(canonical({}, "1-rc"))

    with pytest.raises(VersionError, match=r"'1-rc', older .*; use the program that wrote it, or make the cache again"):
        read_canonical(tmp_path / "x.json")


def test_a_manifest_of_ten_gigabytes_is_refused_unread(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(10 << 30)

    with pytest.raises(CacheError, match="and at most 67,108,864 are read of such a file"):
        read_canonical(tmp_path / "x.json")


def test_numbers_that_json_does_not_know_are_refused():
    with pytest.raises(ValueError):
        canonical({"loss": float(np.nan)})


@pytest.mark.parametrize("taken", ["run.json", "config.json"])
def test_no_cache_is_made_of_a_folder_that_is_something_else(tmp_path, taken):
    (tmp_path / taken).write_text("{}")
    with pytest.raises(UsageError, match=rf"holds a .* \({taken}\), which is no place for a cache; pass another --out"):
        create_identity(tmp_path, {"max_length": 8})
    assert os.listdir(tmp_path) == [taken]


def test_an_imported_cache_and_a_capture_differ_first_in_their_engine(tmp_path):
    create_identity(tmp_path, {"capture": {"engine": "imported"}})
    with pytest.raises(UsageError, match=r"capture.engine = 'imported'.*asks for 'transformers'"):
        create_identity(tmp_path, {"capture": {"engine": "transformers", "batch_tokens": 4096}})


def test_a_cache_of_another_identity_is_refused_with_both_values(tmp_path):
    create_identity(tmp_path, {"target": {"name": "a", "revision": None}, "max_length": 8})
    before = (tmp_path / IDENTITY).read_bytes()

    held = create_identity(tmp_path, {"max_length": 8, "target": {"revision": None, "name": "a"}})
    with pytest.raises(UsageError, match=r"target.name = 'a'.*asks for 'b'.*--out"):
        create_identity(tmp_path, {"target": {"name": "b", "revision": None}, "max_length": 8})
    with pytest.raises(UsageError, match=r"max_length = 8.*asks for None"):
        create_identity(tmp_path, {"target": {"name": "a", "revision": None}})

    assert held["target"]["name"] == "a"
    assert (tmp_path / IDENTITY).read_bytes() == before and os.listdir(tmp_path) == [IDENTITY]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "", "a/."])
def test_a_name_that_could_lead_out_is_refused(tmp_path, name):
    with pytest.raises(CacheError, match="relative and stay inside"):
        path_inside(tmp_path, name)


@pytest.mark.parametrize("at", ["aux.1", "aux.1/c", "aux.1/c/0"])
def test_a_link_that_leads_out_is_refused_wherever_it_is_on_the_way(tmp_path, at):
    cache = tmp_path / "cache"
    (cache / at).parent.mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (cache / "aux.3").mkdir()
    (cache / at).symlink_to(tmp_path / "out")
    (cache / "aux.2").symlink_to(cache / "aux.3")

    with pytest.raises(CacheError, match="leads out"):
        path_inside(cache, "aux.1/c/0")
    assert path_inside(cache, "aux.2/zarr.json") == cache / "aux.2" / "zarr.json"


def test_a_folder_that_may_not_be_read_is_no_fault_of_the_name(tmp_path, monkeypatch):
    def denied(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "lstat", denied)
    assert path_inside(tmp_path, "aux.2/zarr.json") == tmp_path / "aux.2" / "zarr.json"
