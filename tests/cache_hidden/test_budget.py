"""`--budget`: what is left out, in which order, and that the plan keeps to it; also sizes and estimated times."""

import json
import os
import shlex
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import conversations, write_jsonl

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import Scratch
from pipeline.cache.catalog import Catalog
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.disk_speed import write_speed
from pipeline.cache.layout import numbered
from pipeline.cache.plan import load_plan
from pipeline.cache.plan_writer import plan_in_use
from pipeline.cli import main
from pipeline.drafts import DFlash
from pipeline.errors import UsageError
from pipeline.options import size_bytes
from stages.cache_hidden.budget import SampleSizes, choose_samples, drop_unread_columns
from stages.cache_hidden.capture import Speed, evenly_spaced_batches
from stages.cache_hidden.make_plan import missing_columns
from stages.cache_hidden.plan_report import codec_text, time_text
from stages.cache_hidden.run import plan, plan_table, run
from stages.cache_hidden.settings import CaptureOptions, resolve_settings

OPTIONS = CaptureOptions(layers="1,3,4", max_length=256)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """120 chats in three domains, a quarter held out."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "chats.jsonl", conversations(120))


@pytest.fixture
def planned(tiny_target, corpus, tmp_path):
    """Return a function that plans at tmp_path/cache, unless told otherwise, and returns the report."""

    def report(budget=None, out=tmp_path / "cache", probe=False, corpus=corpus, **options) -> dict:
        chosen = replace(OPTIONS, budget=budget, **options)
        return plan(str(tiny_target), str(corpus), out, options=chosen, probe=probe)

    return report


def names(out: Path) -> set[bytes]:
    return {name for shard in load_plan(out).shards for name in shard.batch.column("sample_id").to_pylist()}


def expected(report: dict, step: str) -> list[str]:
    return [line for line in report["budget"] if line.startswith(step)]


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2TB", 2 * 10**12), ("1.5TiB", 3 << 39), ("500G", 5 * 10**11), ("64Gi", 64 << 30), ("10 mb", 10**7),
        ("4096", 4096), ("1kB", 1000), ("3PiB", 3 << 50), ("12b", 12),
    ],
)  # fmt: skip
def test_a_size_is_read_as_it_is_meant(text, size):
    assert size_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "TB", "2XB", "-2TB", "0GB", "1e3GB", "nan", "inf", "2TBs", "1,5TB", "5i", "0.0", "9" * 400 + "TB"]
)
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match=r"wanted a size such as 500GB, 2TB or 1\.5TiB"):
        CaptureOptions(budget=text)


# The subsample


@given(st.integers(0, 2**32), st.integers(1, 120), st.floats(0, 1))
def test_every_group_keeps_the_same_share_to_within_a_sample(seed, count, share):
    rng = np.random.default_rng(seed)
    bytes_n, hashes_n = rng.integers(1, 1000, count).astype(float), rng.integers(0, 2**63, count).astype(np.uint64)
    groups = [(f"domain {group}", "train") for group in rng.integers(0, 4, count)]
    available = share * bytes_n.sum()

    kept_n = choose_samples(bytes_n, groups, hashes_n, available)

    assert bytes_n[kept_n].sum() <= available
    reached = bytes_n[kept_n].sum() / bytes_n.sum()
    for group in set(groups):
        mine_n = np.array([other == group for other in groups])
        off = bytes_n[mine_n & kept_n].sum() - reached * bytes_n[mine_n].sum()
        assert abs(off) <= 2 * bytes_n.max(), "half a sample of the group's at the cut, and the cut's own"
    assert kept_n.all() or bytes_n[kept_n].sum() + bytes_n.max() > available, "no room is left for one more"


@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_budget_keeps_fewer_of_the_same_whatever_the_order(seed, one, other):
    rng = np.random.default_rng(seed)
    bytes_n, hashes_n = rng.integers(1, 1000, 60).astype(float), rng.permutation(60).astype(np.uint64)
    groups = [("", "")] * 20 + [("a", "train")] * 30 + [("a", "heldout")] * 10
    small_n, large_n = (
        choose_samples(bytes_n, groups, hashes_n, share * bytes_n.sum()) for share in sorted((one, other))
    )
    assert not (small_n & ~large_n).any()

    order = rng.permutation(60)
    moved_n = choose_samples(bytes_n[order], [groups[at] for at in order], hashes_n[order], one * bytes_n.sum())
    assert np.array_equal(moved_n, choose_samples(bytes_n, groups, hashes_n, one * bytes_n.sum())[order])


def test_a_seed_decides_which_and_not_how_many_of_each_domain(planned, tmp_path):
    report = planned(codec="raw")
    budget = str(int(report["bytes_in_all"] * 0.7))
    first, again = (planned(budget, tmp_path / name, codec="raw") for name in ("a", "b"))
    other = planned(budget, tmp_path / "c", codec="raw", seed=1)

    assert names(tmp_path / "a") == names(tmp_path / "b") != names(tmp_path / "c")
    assert first["domains"] == again["domains"] and set(first["splits"]) == {"heldout", "train"}
    for domain, count in report["domains"].items():
        share = first["samples"] / report["samples"]
        assert abs(first["domains"][domain] - share * count) <= 2
        assert abs(other["domains"][domain] - first["domains"][domain]) <= 2


# What is decided


def test_a_budget_that_holds_everything_changes_nothing(planned, tmp_path):
    planned(out=tmp_path / "plain")
    report = planned("1TB", tmp_path / "ample")

    segments = [(tmp_path / name / "plan/000000.arrow").read_bytes() for name in ("plain", "ample")]
    assert segments[0] == segments[1]
    assert expected(report, "codec: raw, the first that holds all samples")
    assert expected(report, "samples: all 120")


def test_each_step_goes_only_as_far_as_it_has_to(planned, tmp_path):
    """Ever smaller budgets: rows of `final` go first, then exactness of the codec, then samples."""
    sizes, seen = [], []
    whole = planned(out=tmp_path / "whole", final="all")["bytes_in_all"]
    for number in range(12):
        report = planned(str(int(1.4 * whole * 0.84**number)), tmp_path / str(number), final="all")
        decided = load_plan(tmp_path / str(number)).notes["budget"]
        seen.append((decided["final"], decided["codec"], report["samples"] == 120))
        sizes.append(report["samples"])
    told = [seen[0], *(now for before, now in pairwise(seen) if now != before)]
    codecs = ("raw", "zstd", "aux=int8,final=zstd", "aux=int6,final=zstd")
    order = [("all", "raw", True), *(("needed", codec, True) for codec in codecs)]
    assert told[0] == order[0] and told[-1] == ("needed", codecs[-1], False)
    assert [state for state in order if state in told] == told[:-1], "no step is taken before the one before it"
    assert sizes == sorted(sizes, reverse=True) and len(told) >= 4


def columns_of(keeps: str) -> tuple[ColumnSpec, ...]:
    return ColumnSpec("aux.1", "bfloat16", 8), ColumnSpec("final", "bfloat16", 8, keeps=keeps)


def sizes_of(*splits: str) -> SampleSizes:
    n = len(splits)
    return SampleSizes(np.full(n, 10), np.full(n, 4), [("a", split) for split in splits], np.arange(n, dtype=np.uint64))


def test_final_stays_while_anything_is_held_out_to_measure_by_it(monkeypatch):
    both = ("dflash", "domino")
    kept, told = drop_unread_columns(columns_of("all"), sizes_of("train", "heldout"), both)
    assert kept == columns_of("needed") and "8 of 20 rows" in told
    kept, told = drop_unread_columns(columns_of("needed"), sizes_of("train", ""), both)
    assert kept == columns_of("needed"), "where the corpus does not say, training holds some out"
    assert "read by dflash, domino; final, since the accept length" in told and "--final none" in told
    kept, told = drop_unread_columns(columns_of("needed"), sizes_of("train", "train"), both)
    assert kept == columns_of("needed")[:1] and "final left out" in told
    monkeypatch.setattr(DFlash, "reads_final", True)
    kept, told = drop_unread_columns(columns_of("needed"), sizes_of("train", "train"), both)
    assert kept == columns_of("needed") and "read by dflash, domino; final, since it trains dflash" in told


def test_a_stated_codec_is_kept(planned):
    report = planned("2MB", codec="zstd")
    assert set(report["codecs"].values()) == {"zstd"} and report["samples"] < 120
    assert expected(report, "codec: zstd, as stated")


def test_a_budget_too_small_for_a_sample_says_what_would_do(planned, tmp_path):
    with pytest.raises(UsageError, match=r"hold no sample; the target's own files and one sample as .* take .*iB"):
        planned("20kB")
    assert not (tmp_path / "cache").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": "1GB", "methods": "dflash,dominoo"}, "no method `dominoo`; did you mean `domino`"),
        ({"budget": "1GB", "methods": "dflash,"}, "a comma too many. There are dflash"),
        ({"methods": "dflash"}, "give --budget too"),
        ({"seed": 3}, "give --budget too"),
        ({"max_samples": 2**64}, "no corpus has as many"),
        ({"budget": "1GB", "seed": 2**64}, "wanted 0 or more, and less than 2"),
        ({"device": "gpu"}, "--device gpu: wanted cpu, cuda, or one of several such as cuda:1"),
    ],
)
def test_invalid_options_are_refused(planned, options, says):
    with pytest.raises(UsageError, match=says):
        planned(**options)


# The plan keeps to it


@pytest.fixture
def captured(tiny_target, corpus, tmp_path):
    def done(out=tmp_path / "cache", **options):
        return run(str(tiny_target), str(corpus), out, options=replace(OPTIONS, **options))

    return done


def test_a_capture_takes_no_more_than_its_budget(captured, tmp_path):
    budget = 2_000_000
    done = captured(budget=str(budget), codec="raw")

    taken = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert 0.6 * budget < taken <= budget and done.samples < 120
    assert captured(budget=str(budget), codec="raw").new_shards == 0, "the same command has nothing to do"
    assert captured().samples == done.samples, "nor has one that leaves it to the plan"
    assert HiddenCache.open(tmp_path / "cache").samples.ok.all()


def test_the_command_that_is_printed_captures_the_plan_and_plans_nothing(planned, tmp_path, capfd):
    report = planned("2MB", codec="raw", final="all")
    segment = (tmp_path / "cache/plan/000000.arrow").read_bytes()
    words = shlex.split(report["command"])
    assert words[:2] == ["pipeline", "cache-hidden"] and "--codec" not in words and "--final" not in words

    main(words[1:])

    assert "budget is" in capfd.readouterr().err, "what was left out is said again"
    assert (tmp_path / "cache/plan/000000.arrow").read_bytes() == segment
    assert planned()["bytes_to_write"] == 0


def test_a_plan_of_which_nothing_is_captured_is_made_again_for_another_budget(planned, captured, tmp_path):
    assert planned()["samples"] == 120
    fewer = planned("2MB", codec="raw")["samples"]
    assert fewer < 120
    assert planned("1GB", codec="raw")["samples"] == 120, "a larger one has more, so the corpus is read again"
    assert planned("2MB", codec="raw")["samples"] == fewer == planned()["samples"]

    captured(budget="2MB", codec="raw")
    with pytest.raises(UsageError, match=r"budget = 2000000, this command asks for 2100000, and states are captured"):
        planned("2100kB", codec="raw")
    with pytest.raises(UsageError, match=r"seed = 0, this command asks for 1, and states are captured"):
        planned("2MB", codec="raw", seed=1)
    assert planned()["samples"] == fewer


def test_a_cache_at_work_is_not_planned_again(planned, tmp_path):
    planned()
    with Scratch(tmp_path / "cache", numbered(0)), pytest.raises(UsageError, match="captured by another process"):
        planned("2MB")
    assert planned()["samples"] == 120


def test_a_refused_budget_leaves_the_plan_that_is_there(planned, tmp_path):
    planned()
    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="hold no sample"):
        planned("20kB")
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()} == before


def test_a_worker_that_has_opened_no_shard_yet_keeps_its_plan(planned, captured, tmp_path, monkeypatch):
    """It loads its target for minutes, then captures by a plan that would be gone."""
    held = threading.Event()

    def load(*arguments, **named):
        held.set()
        with pytest.raises(UsageError, match="captured by another process"):
            planned("2MB")
        raise KeyboardInterrupt

    planned()
    monkeypatch.setattr("stages.cache_hidden.capture.capture_shards", load)
    with pytest.raises(KeyboardInterrupt):
        captured()
    assert held.is_set() and planned()["samples"] == 120


def test_a_capture_by_a_plan_that_was_replaced_meanwhile_is_refused(planned, tmp_path):
    planned()
    old = load_plan(tmp_path / "cache")
    planned("2MB")
    with (
        pytest.raises(UsageError, match="planned afresh meanwhile; run the command again"),
        plan_in_use(old),
    ):
        pass
    assert not list((tmp_path / "cache").glob("tmp-*"))


def test_a_budget_and_more_corpus_do_not_go_together(planned, tiny_target, tmp_path):
    planned()
    more = write_jsonl(tmp_path / "more.jsonl", conversations(30, seed=5))
    with pytest.raises(UsageError, match="leave it out to append"):
        planned("1GB", corpus=more, append=True)
    assert planned()["samples"] == 120, "the plan is as it was"


# Prices and times


def test_prices_are_side_by_side(planned, capsys):
    report = planned()
    raw, zstd, int8 = (report["prices"][codec] for codec in ("raw", "zstd", "int8"))
    assert raw["aux.1"] == report["bytes"]["aux.1"] == report["tokens"] * 32 * 4
    assert raw["in all"] == sum(raw[name] for name in ("aux.1", "aux.3", "aux.4", "final")) == report["bytes_to_write"]
    assert int8["in all"] < zstd["in all"] < raw["in all"]
    assert json.loads(json.dumps(report))["codecs"] == dict.fromkeys(("aux.1", "aux.3", "aux.4", "final"), "raw")

    from rich.console import Console

    Console(width=140).print(plan_table(report))
    printed = capsys.readouterr().out
    assert all(f"{codec} " in printed for codec in ("raw", "zstd", "int8"))
    assert "unknown; --probe" in printed


def test_a_codec_is_written_as_short_as_it_says_the_same():
    aux, final = columns_of("needed")
    other = replace(aux, name="aux.2", codec="zstd")
    assert codec_text((aux, final)) is None
    assert codec_text((replace(aux, codec="int8"), replace(final, codec="zstd"))) == "aux=int8,final=zstd"
    assert codec_text((other,)) == "aux=zstd"
    assert codec_text((aux, other, final)) == "aux.1=raw,aux.2=zstd,final=raw"


def test_a_probe_says_the_larger_of_computing_and_writing(planned, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.cache_hidden.run.write_speed", lambda out: write_speed(out, 1 << 20))
    report = planned(probe=True)
    time = report["time"]
    assert time["compute_s"] == pytest.approx(report["tokens"] / time["tokens_s"])
    assert time["write_s"] == pytest.approx(report["bytes_to_write"] / time["disk_bytes_s"])
    assert time["seconds"] == max(time["compute_s"], time["write_s"])
    assert not [name for name in os.listdir(tmp_path / "cache") if name.startswith("tmp-")], "nothing is left behind"
    assert planned()["time"] is None, "a plan without a probe does not know"


def test_the_times_of_a_probe_are_read_by_hand(planned, tiny_target, tmp_path):
    report = planned()
    settings = resolve_settings(str(tiny_target), Catalog(tmp_path / "cache"), OPTIONS)
    work = missing_columns(Catalog(tmp_path / "cache"), settings.columns)
    found = Speed(written=report["bytes_to_write"] / 7200, tokens=report["tokens"] / 3661).as_dict(work)
    assert time_text(found).startswith("about 2:00:00 for one worker, that of writing: computing 1:01:01 at ")
    assert time_text(None).startswith("unknown")


def test_the_batches_timed_are_from_all_over_the_work(planned, tmp_path):
    planned()
    shards = load_plan(tmp_path / "cache").shards
    chosen = evenly_spaced_batches(shards, 256, 4)
    assert len({shard.number for shard, _ in chosen}) == 4 and all(len(rows) for _, rows in chosen)
    assert len(evenly_spaced_batches(shards[:2], 256, 4)) == 2
