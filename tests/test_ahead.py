"""Reading ahead: the same batches in the same order, within so many bytes, whatever the caller does with them."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from cache_maker import COLUMNS, make_cache, random_samples

from pipeline.cache import HiddenCache, in_flight
from pipeline.drafts import DraftConfig
from pipeline.errors import CacheError
from pipeline.recipe import TrainSection
from pipeline.split import split_samples
from stages.train_draft import ahead
from stages.train_draft.ahead import Ahead
from stages.train_draft.batches import Stream

CONFIG = DraftConfig(
    method="dflash",
    hidden_size=8,
    vocab_size=1100,
    rope_theta=1e4,
    shift_label=False,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=8,
    block_size=4,
    mask_token_id=1001,
    target_layer_ids=(1, 10),
    num_target_layers=12,
    max_position_embeddings=4096,
)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Batches of three samples of up to 600 rows, windows of 300, in cells of 300."""
    cache = HiddenCache.open(make_cache(tmp_path_factory.mktemp("ahead") / "cache", random_samples(20)))
    split = split_samples(cache, 1001, 0.05, (1, 10))
    return Stream(cache, split, CONFIG, TrainSection(batch=3, context=300, anchors=5, cell_anchors=50))


@pytest.fixture
def small(monkeypatch):
    """Buffers of a kilobyte, so that small cells fill them."""
    monkeypatch.setattr(ahead, "GRAIN", 1024)


def copied(batch):
    return [(cell.names, cell.pos_R.clone(), cell.aux_KRD.clone(), blocks.anchors_N) for cell, blocks in batch.cells]


def same(one, other):
    return all(
        names == names2 and all(map(torch.equal, rest, rest2))
        for (names, *rest), (names2, *rest2) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("limit", [0, 20_000, 1 << 30])
def test_batches_are_those_of_the_stream_however_little_memory_there_is(stream, small, limit):
    found = [(batch.step, batch.names, copied(batch)) for batch in Ahead(stream, 2, 12, limit=limit)]

    assert [step for step, _, _ in found] == list(range(2, 12))
    for step, names, cells in found:
        batch = stream.batch(step)
        assert names == batch.names and same(cells, copied(batch))


@pytest.mark.parametrize("limit", [0, 20_000])
def test_no_more_bytes_are_read_ahead_than_allowed(stream, small, limit):
    largest = max(stream.size(laid) for step in range(12) for laid in stream.plan(step).cells)
    batches, held, buffers = Ahead(stream, 0, 12, limit=limit), [], set()
    for batch in batches:
        for cell, _ in batch.cells:
            buffers.add(cell.aux_KRD.data_ptr())
            held.append(batches._held + sum(map(len, batches._free)))

    assert max(held) <= max(limit, 2 * (largest + 1024)), "the one in use and one ahead, or as many as fit"
    assert len(buffers) < len(held) / 2, "memory is used again"


def test_blocks_are_known_before_any_state_is_read(stream):
    for batch in Ahead(stream, 0, 3):
        known = [blocks.anchors_N.tolist() for blocks in batch.blocks]
        assert known == [blocks.anchors_N.tolist() for _, blocks in batch.cells]


def test_cells_that_nobody_asked_for_are_passed_over(stream, small):
    for batch in Ahead(stream, 0, 8, limit=20_000):
        if batch.step % 3 == 0:
            assert same(copied(batch), copied(stream.batch(batch.step)))
        elif batch.step % 3 == 1:
            next(iter(batch.cells))


def test_closing_stops_the_thread(stream):
    before = {*threading.enumerate()}
    batches = Ahead(stream, 0, 12, limit=0)
    next(iter(next(iter(batches)).cells))
    batches.close()

    left = {*threading.enumerate()} - before
    assert not [thread for thread in left if not thread.name.startswith("read")], "the cache's own readers stay"


def test_an_error_comes_at_the_cell_it_is_about(stream, monkeypatch):
    fill = stream.cache.fill
    wanted = stream.plan(2).cells[0].parts[0][0]

    def failing(out, parts, layers):
        if parts[0][0] == wanted:
            raise CacheError("damaged")
        fill(out, parts, layers)

    monkeypatch.setattr(stream.cache, "fill", failing)
    seen = []
    with pytest.raises(CacheError, match="damaged"):
        for batch in Ahead(stream, 0, 8):
            seen.append(batch.step)
            list(batch.cells)
    first = next(step for step in range(8) if wanted in [laid.parts[0][0] for laid in stream.plan(step).cells])
    assert seen == list(range(first + 1))


def test_states_left_in_int8_are_the_same_once_they_are_moved(tmp_path, small, monkeypatch):
    monkeypatch.setattr(in_flight, "INLINE_BYTES", 0)
    columns = [replace(spec, codec="int8") for spec in COLUMNS]
    cache = HiddenCache.open(make_cache(tmp_path / "cache", random_samples(20), columns))
    split = split_samples(cache, 1001, 0.05, (1, 10))
    train = TrainSection(batch=3, context=300, anchors=5, cell_anchors=50)
    plain, coded = (Stream(cache, split, CONFIG, train, coded=kept) for kept in (False, True))

    for batch in Ahead(coded, 0, 12, limit=20_000):
        right = plain.batch(batch.step)
        for (cell, _), (wanted, _) in zip(batch.cells, right.cells, strict=True):
            found = cell.to("cpu")
            assert torch.equal(found.aux_KRD.view(torch.int16), wanted.aux_KRD.view(torch.int16))
            assert found.names == wanted.names and torch.equal(found.pos_R, wanted.pos_R)
            laid = next(laid for laid in coded.plan(batch.step).cells if laid.cell.names == wanted.names)
            assert coded.size(laid) == plain.size(laid) * (8 + 2) / 16, "of eight values one byte each, and a scale"
    starts = {start for step in range(12) for laid in coded.plan(step).cells for _, start, _ in laid.parts}
    assert any(start % 256 for start in starts), "windows begin inside of a block, too"


def test_states_are_left_in_int8_only_where_all_are(tmp_path):
    columns = [replace(COLUMNS[0], codec="int8"), *COLUMNS[1:]]
    cache = HiddenCache.open(make_cache(tmp_path / "cache", random_samples(9), columns))
    assert [cache.is_encoded(layers) for layers in ([1], [1, 10], [10], [])] == [True, False, False, False]


def test_a_batch_is_read_a_cell_at_a_time(stream, monkeypatch):
    read, held = [], stream.read
    monkeypatch.setattr(stream, "read", lambda laid: read.append(laid) or held(laid))
    batch = stream.batch(0, alone=True)
    assert len(batch.cells) == 3 and not read
    for number, _ in enumerate(batch.cells, 1):
        assert len(read) == number


def test_waiting_for_data_is_measured_and_nothing_else(stream, monkeypatch):
    fill = stream.cache.fill

    def slow(*wanted):
        time.sleep(0.05)
        fill(*wanted)

    monkeypatch.setattr(stream.cache, "fill", slow)
    cells, batches = 0, Ahead(stream, 0, 3)
    began = time.perf_counter()
    for batch in batches:
        for _ in batch.cells:
            cells += 1
    took = time.perf_counter() - began
    assert 0.05 * cells * 0.9 <= batches.waited <= took

    patient = Ahead(stream, 0, 1)
    batch = next(iter(patient))
    list(batch.cells)
    waited = patient.waited
    time.sleep(0.1)
    patient.close()
    assert patient.waited == waited
