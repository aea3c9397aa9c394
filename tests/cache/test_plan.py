"""The plan: every sample has one place, the same bytes come out every time, and memory stays bounded."""

import hashlib
import tracemalloc
from itertools import combinations, pairwise

import numpy as np
import pytest
from cache_maker import contents, flip, random_samples
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.layout import PLAN
from pipeline.cache.plan import load_plan
from pipeline.cache.plan_writer import SampleIdSet, micro_batches, write_segment
from pipeline.cache.samples import PlannedSample, sample_id
from pipeline.errors import CacheError, DataError, UsageError


def planned(cache, samples, row_bytes=48):
    return write_segment(cache, samples, row_bytes=row_bytes, sources=[{"file": "chats.jsonl"}])


def test_a_sample_is_named_by_its_ids_and_its_mask():
    ids, mask = np.array([1, 2, 3], np.int32), np.array([False, True, False])

    spelt_out = bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0b010])
    assert sample_id(ids, mask) == hashlib.blake2b(spelt_out, digest_size=16).digest()
    assert sample_id(ids, mask) != sample_id(ids, ~mask)
    assert sample_id(ids, mask) != sample_id(ids[::-1], mask)


def test_of_notes_of_two_kinds_the_newer_counts(tmp_path):
    notes = [{"turns": {"lost": 2}, "cut": 1}, {"turns": ["each"], "cut": 2}, {"turns": None, "cut": 4}]
    for number, of_segment in enumerate(notes, 1):
        samples = random_samples(2 * number, longest=9)
        plan = write_segment(tmp_path, samples, row_bytes=48, sources=[], notes=of_segment)
    assert plan.notes == {"turns": None, "cut": 7}


def test_every_sample_is_in_the_plan_once_and_unchanged(tmp_path):
    samples = random_samples(50)

    plan = planned(tmp_path, samples)

    found = {}
    for shard in plan.shards:
        lines = shard.batch.column("line").to_pylist()
        for row in range(len(shard)):
            found[lines[row]] = (shard.ids(row), shard.mask(row), shard.text("domain")[row], shard.text("split")[row])
    assert sorted(found) == [sample.line for sample in samples]
    for sample in samples:
        ids, mask, domain, split = found[sample.line]
        assert np.array_equal(ids, sample.ids) and np.array_equal(mask, sample.mask)
        assert (domain, split) == (sample.domain, sample.split)
    assert plan.samples == 50 and plan.tokens == sum(len(sample.ids) for sample in samples)
    assert plan.supervised == sum(int(sample.mask.sum()) for sample in samples)
    assert plan.supervised == sum(int(shard.supervised.sum()) for shard in plan.shards)


def test_shards_are_ranges_of_the_corpus_and_longest_first_inside(tmp_path):
    plan = planned(tmp_path, random_samples(100))

    assert 14 <= len(plan.shards) <= 16  # a sixteenth of the plan each; a long sample may leave one empty
    assert [shard.number for shard in plan.shards] == list(range(len(plan.shards)))
    lines = [line for shard in plan.shards for line in sorted(shard.batch.column("line").to_pylist())]
    assert lines == list(range(1, 101))
    for shard in plan.shards:
        keys = [(-len(shard.ids(row)), sample_id(shard.ids(row), shard.mask(row))) for row in range(len(shard))]
        assert keys == sorted(keys)


def test_a_shard_holds_about_four_gibibytes_of_states(tmp_path):
    plan = planned(tmp_path, random_samples(100, longest=50), row_bytes=64 << 20)

    rows = [shard.rows for shard in plan.shards]
    assert sum(rows) > 2000 and max(rows) < 64 + 50


def test_offsets_count_the_rows_before_a_sample(tmp_path):
    for shard in planned(tmp_path, random_samples(60)).shards:
        rows = final = 0
        for row in range(len(shard)):
            mask = np.concatenate([[False], shard.mask(row), [False]])
            assert shard.bounds[row] == rows and shard.final_bounds[row] == final
            rows += len(mask) - 2
            final += sum(mask[r - 1] or mask[r] or mask[r + 1] for r in range(1, len(mask) - 1))
        assert (shard.rows, shard.final_count) == (rows, final)


def test_a_sample_seen_before_is_counted_and_not_planned_again(tmp_path):
    first, second = random_samples(2)
    again = PlannedSample(first.ids, first.mask, "other", "train", "more.jsonl", 7)

    plan = planned(tmp_path, [first, second, again, again])

    assert (plan.samples, plan.duplicates) == (2, 2)
    assert sorted(text for shard in plan.shards for text in shard.text("domain")) == ["domain 0", "domain 1"]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    planned(tmp_path / "a", random_samples(40))
    planned(tmp_path / "b", iter(random_samples(40)))

    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_planning_a_corpus_needs_memory_for_a_shard_of_it(tmp_path):
    def corpus():
        for line in range(3000):
            ids = np.random.default_rng(line).integers(0, 1000, 4000).astype(np.int32)
            yield PlannedSample(ids, ids % 3 == 0, "", "", "big.jsonl", line)

    tracemalloc.start()
    planned(tmp_path, corpus(), row_bytes=40_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert (tmp_path / PLAN / "000000.arrow").stat().st_size > 48_000_000
    assert peak < 24_000_000


def test_names_are_told_apart_as_a_set_does(tmp_path):
    names = [np.random.default_rng(at % 5000).bytes(16) for at in range(7000)]
    seen, known = SampleIdSet(), set()
    for name in names:
        assert seen.add(name) == (name not in known)
        known.add(name)
    assert len(seen) == len(known) == 5000


def test_a_planned_sample_takes_less_than_a_hundred_bytes_of_memory(tmp_path):
    """Also while the table grows, when the old one is there beside the new."""

    def corpus(count):
        for line in range(count):
            ids = np.array([line, 1, 2], np.int32)
            yield PlannedSample(ids, ids > 0, "d", "train", "big.jsonl", line)

    planned(tmp_path / "first", corpus(10), row_bytes=1 << 20)  # what it imports is no sample's
    peaks = []
    for count in (20_000, 70_000):
        tracemalloc.start()
        planned(tmp_path / str(count), corpus(count), row_bytes=1 << 20)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 100 * 50_000


def test_a_corpus_without_a_sample_is_refused_and_leaves_no_plan(tmp_path):
    with pytest.raises(DataError, match="no usable sample"):
        planned(tmp_path, [])

    with pytest.raises(UsageError, match="no plan yet"):
        load_plan(tmp_path)
    assert contents(tmp_path) == {} and list(tmp_path.iterdir()) == []


def test_more_corpus_is_one_more_segment_and_moves_nothing(tmp_path):
    samples = random_samples(60)
    first = planned(tmp_path, samples[:40])
    before = (tmp_path / PLAN / "000000.arrow").read_bytes()

    plan = planned(tmp_path, samples[20:])

    assert (tmp_path / PLAN / "000000.arrow").read_bytes() == before
    assert [len(plan.manifests), plan.samples, plan.duplicates] == [2, 60, 20]
    assert [shard.number for shard in plan.shards] == list(range(len(plan.shards)))
    assert all(old.batch.equals(new.batch) for old, new in zip(first.shards, plan.shards, strict=False))


def test_two_planners_at_once_do_not_mix(tmp_path):
    def corpus():
        yield from random_samples(3)
        planned(tmp_path, random_samples(5))

    with pytest.raises(UsageError, match="another process planned"):
        planned(tmp_path, corpus())

    assert load_plan(tmp_path).samples == 5


def test_every_flipped_bit_of_the_plan_is_found(tmp_path):
    planned(tmp_path, random_samples(3, longest=5))
    rng = np.random.default_rng(0)
    for name in ("000000.arrow", "000000.json"):
        path = tmp_path / PLAN / name
        for bit in rng.choice(8 * path.stat().st_size, 100, replace=False):
            flip(path, int(bit))
            with pytest.raises(CacheError):
                load_plan(tmp_path)
            flip(path, int(bit))
    assert load_plan(tmp_path).samples == 3


@given(lengths=st.lists(st.integers(1, 50), max_size=40), batch_tokens=st.integers(1, 200))
def test_micro_batches_cover_a_shard_in_order_within_the_limit(lengths, batch_tokens):
    lengths = sorted(lengths, reverse=True)

    batches = micro_batches(lengths, batch_tokens)

    assert [row for batch in batches for row in batch] == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= batch_tokens


def padding(lengths, batches) -> int:
    return sum(int(lengths[batch.start]) * len(batch) for batch in batches) - int(sum(lengths))


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=7), batch_tokens=st.integers(1, 2000))
def test_no_other_micro_batches_pad_less_for_their_number(lengths, batch_tokens):
    lengths = sorted(lengths, reverse=True)
    costs = []
    for inner in (cuts for count in range(len(lengths)) for cuts in combinations(range(1, len(lengths)), count)):
        cut = [range(first, stop) for first, stop in pairwise([0, *inner, len(lengths)])]
        if all(len(batch) == 1 or len(batch) * lengths[batch.start] <= batch_tokens for batch in cut):
            costs.append(padding(lengths, cut) + 128 * len(cut))

    batches = micro_batches(lengths, batch_tokens)

    assert padding(lengths, batches) + 128 * len(batches) == min(costs)


@pytest.mark.parametrize(("median", "sigma"), [(700, 0.6), (700, 1.0), (300, 0.8), (1500, 0.7)])
def test_shards_of_an_8b_target_pad_less_than_3_percent(median, sigma):
    """4 GiB of five layers and half of `final` in bfloat16: 95,325 tokens."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(median), sigma, 4000), 16, 3072).astype(int)
    shards = np.split(lengths, np.flatnonzero(np.diff(np.cumsum(lengths) // 95_325)) + 1)
    shards = [sorted(shard.tolist(), reverse=True) for shard in shards]
    padded = sum(padding(shard, micro_batches(shard, 4096)) for shard in shards)
    assert padded / (padded + lengths.sum()) < 0.03
