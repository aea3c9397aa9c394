"""`recode`: columns in another codec, from the states that are there; whatever stops it, every shard stays readable."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from cache_maker import COLUMNS, contents, make_cache, random_samples, without_record

import pipeline.cache.atomic as disk
from pipeline.cache import HiddenCache
from pipeline.cache.codecs import CODECS
from pipeline.cache.schema import read_log
from pipeline.cache.verify import verify
from pipeline.errors import DataError, UsageError
from stages.recode.run import run as recode


def test_a_recoded_cache_is_the_one_captured_in_that_codec(captured, tmp_path):
    for codec, other in (("zstd", "raw"), ("raw", "zstd")):
        cache = shutil.copytree(captured(other), tmp_path / codec)
        done = recode(cache, codec).columns
        assert done == 3 * HiddenCache.open(cache).shards
        assert without_record(cache) == without_record(captured(codec))
        assert recode(cache, codec).columns == 0


def test_a_recoded_cache_still_knows_where_its_target_and_corpus_lie(captured, tmp_path, tiny_target, capsys):
    cache = shutil.copytree(captured("raw"), tmp_path / "cache")
    before = read_log(cache)
    recode(cache, "zstd")
    left = read_log(cache)
    assert before.columns and left.target.folder == str(tiny_target.resolve())
    assert left.as_dict() == {key: value for key, value in before.as_dict().items() if key != "columns"}
    capsys.readouterr()
    recode(cache, "zstd")
    assert "nothing to do" in capsys.readouterr().out


def test_a_cache_recoded_to_int8_keeps_its_promise_and_says_so(captured, tmp_path):
    cache = shutil.copytree(captured("raw"), tmp_path / "cache")
    recode(cache, "aux=int8")
    assert not verify(cache).damaged and not verify(cache).foreign
    raw, coarse = HiddenCache.open(captured("raw")), HiddenCache.open(cache)
    for i in range(len(raw)):
        right, found = raw.read(i, final=True), coarse.read(i, final=True)
        assert ((found.aux - right.aux).norm() / right.aux.norm()) < 0.008
        assert torch.equal(found.final, right.final)
    facts = coarse.columns(0)["aux.1"].facts.as_dict()
    assert facts["certificate"]["of_token"] < CODECS["int8"].max_of_token and "probe" in facts
    with pytest.raises(UsageError, match=r"holds aux.1 in int8, and what that has rounded stays so"):
        recode(cache, "raw")


class Killed(BaseException):
    pass


def test_a_recode_killed_at_any_step_leaves_every_shard_readable_and_goes_on(tmp_path, monkeypatch):
    whole = make_cache(tmp_path / "raw", random_samples(2, longest=8), COLUMNS[1:])
    right = [HiddenCache.open(whole).read(i, final=True).aux for i in range(2)]
    expected = contents(
        make_cache(
            tmp_path / "zstd", random_samples(2, longest=8), [replace(spec, codec="zstd") for spec in COLUMNS[1:]]
        )
    )
    for step in range(0, 1000, 7):
        cache = shutil.copytree(whole, tmp_path / f"killed-{step}")
        with monkeypatch.context() as patch:
            patch.setattr(disk, "_remove_folder", lambda *_: None)  # a killed process cleans nothing up
            left = [step]

            def dying(call, left=left):
                def before(*arguments, **named):
                    left[0] -= 1
                    if left[0] < 0:
                        raise Killed
                    return call(*arguments, **named)

                return before

            for name in ("rename", "replace", "write", "mkdir"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                recode(cache, "zstd")
                break
            except Killed:
                pass
        held = HiddenCache.open(cache)
        assert all(torch.equal(held.read(i, final=True).aux, right[i]) for i in range(2))
        assert not verify(cache).damaged
        recode(cache, "zstd")
        assert contents(cache) == expected, step
    assert step > 14


def test_states_that_are_all_refused_cannot_be_measured_in(tmp_path):
    (sample,) = random_samples(1, longest=9)
    cache = make_cache(tmp_path / "cache", [sample], COLUMNS[:1], refused={0: "not finite"})
    with pytest.raises(DataError, match=r"every sample of aux\.1 was refused"):
        recode(cache, "int8")
    assert not verify(cache).damaged and not list(cache.glob("calibration/*"))


def test_a_recode_loads_the_head_once(captured, tmp_path, monkeypatch):
    cache, loaded, load = shutil.copytree(captured("raw"), tmp_path / "cache"), [], HiddenCache.head
    monkeypatch.setattr(HiddenCache, "head", lambda self: loaded.append(1) or load(self))
    assert recode(cache, "final=int8").columns > 1 and len(loaded) == 1
    assert "top1" in HiddenCache.open(cache).columns(0)["final"].facts.certificate.as_dict()


def test_what_cannot_be_recoded_is_said(tmp_path):
    cache = make_cache(tmp_path / "cache", random_samples(2, longest=9), COLUMNS[:2])
    for codec, says in (
        ("gzip", "wanted one of raw, zstd, int8, int6 for all"),
        ("aux.7=zstd", "holds aux.1, aux.10"),
        ("a=raw", "wanted"),
    ):
        with pytest.raises(UsageError, match=says):
            recode(cache, codec)
