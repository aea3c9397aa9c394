"""Prefetching: the same batches in the same order, within so many bytes, whatever the caller does with them; and
what a batch holds of the target's final states, which only some losses read."""

import itertools
import threading
import time
from dataclasses import replace

import fake_streams
import pytest
import torch
from cache_maker import COLUMNS, make_cache, random_samples
from toy_codec import Fixed16

from pipeline.cache import HiddenCache
from pipeline.cache import columns as in_flight
from pipeline.cache.codecs import CODECS
from pipeline.cache.layout import FINAL, shard_folder
from pipeline.drafts import Cell, draft_config
from pipeline.errors import CacheError
from pipeline.runs.recipe import TrainSection
from pipeline.runs.training_data import split_samples
from stages.train_draft import loader as loader_module
from stages.train_draft.batches import Sampler
from stages.train_draft.copy_stream import CopiedCell, CopyStream
from stages.train_draft.loader import MAX_WAITING, BatchLoader, Prefetcher

CONFIG = draft_config(
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


SOFT = CONFIG.model_copy(update={"objective": "kl"})
TRAIN = TrainSection(batch=3, context=300, anchors=5, cell_anchors=50)


def opened(folder, config=SOFT, keep_encoded=False):
    """A loader of batches of three samples of up to 600 rows, windows of 300, in cells of 300."""
    cache = HiddenCache.open(folder)
    return BatchLoader(Sampler(cache, split_samples(cache, 1001, 0.05, (1, 10)), config, TRAIN), keep_encoded)


def made(folder, columns=COLUMNS, config=SOFT, keep_encoded=False):
    """The same of a cache that is made first, unless it is there."""
    return opened(make_cache(folder, random_samples(20), columns), config, keep_encoded)


@pytest.fixture(scope="module", params=["ce", "kl"])
def loader(tmp_path_factory, request):
    """Batches for a loss that reads no final states, and for one that does."""
    return made(tmp_path_factory.mktemp("prefetch") / "cache", config=CONFIG if request.param == "ce" else SOFT)


@pytest.fixture
def small(monkeypatch):
    """Buffers of a kilobyte, so that small cells fill them."""
    monkeypatch.setattr(loader_module, "BUFFER_STEP", 1024)


def copied(batch, cells):
    """What the cells hold: what is read into memory that is used again has to be kept."""
    held = []
    for cell, blocks in zip(cells, batch.blocks, strict=True):
        final = [] if cell.final_FD is None else [cell.final_FD.clone(), cell.final_at_R]
        held.append((cell.names, cell.pos_R.clone(), cell.aux_KRD.clone(), blocks.anchors_N, *final))
    return held


def same(one, other):
    return all(
        names == names2 and len(rest) == len(rest2) and all(map(torch.equal, rest, rest2))
        for (names, *rest), (names2, *rest2) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("limit", [0, 20_000, 1 << 30])
def test_batches_are_those_of_the_loader_however_little_memory_there_is(loader, small, limit):
    found = [(batch.step, batch.names, copied(batch, cells)) for batch, cells in Prefetcher(loader, 2, 12, limit=limit)]

    assert [step for step, _, _ in found] == list(range(2, 12))
    for step, names, cells in found:
        batch = loader.sampler.batch(step)
        assert names == batch.names and same(cells, copied(batch, loader.read_all(batch)))


@pytest.mark.parametrize("limit", [0, 20_000])
def test_no_more_bytes_are_prefetched_than_allowed(loader, small, limit):
    largest = max(loader.size(windows) for step in range(12) for windows in loader.sampler.batch(step).windows)
    batches, held, buffers = Prefetcher(loader, 0, 12, limit=limit), [], set()
    for _, cells in batches:
        for cell in cells:
            buffers.add(cell.aux_KRD.data_ptr())
            held.append(batches._used_bytes + sum(map(len, batches._free_buffers)))

    assert max(held) <= max(limit, 2 * (largest + 1024)), "the one in use and one prefetched, or as many as fit"
    assert len(buffers) < len(held) / 2, "memory is used again"


def test_blocks_are_known_before_any_state_is_read(loader):
    for batch, _ in Prefetcher(loader, 0, 3):
        assert all(len(blocks.anchors_N) for blocks in batch.blocks)
        assert all(cell.aux_KRD.numel() == 0 for cell in batch.cells)


def test_cells_that_nobody_asked_for_are_dropped(loader, small):
    for batch, cells in Prefetcher(loader, 0, 8, limit=20_000):
        if batch.step % 3 == 0:
            assert same(copied(batch, cells), copied(batch, loader.read_all(batch)))
        elif batch.step % 3 == 1:
            next(cells)


class Clones:
    """Copies ahead on a CPU; every third cell has no memory there."""

    def __init__(self):
        self.asked = 0

    def copy(self, cell):
        self.asked += 1
        final = None if cell.final_FD is None else cell.final_FD.clone()
        states = {"aux_KRD": cell.aux_KRD.clone(), "final_FD": final}
        return None if self.asked % 3 == 0 else CopiedCell(replace(cell, **states), None)


@pytest.mark.parametrize(("slow", "limit"), [(False, 0), (False, 1 << 30), (True, 20_000)])
def test_cells_that_are_copied_ahead_are_those_of_the_loader(loader, small, monkeypatch, slow, limit):
    read = loader.read
    monkeypatch.setattr(loader, "read", lambda *asked: (time.sleep(0.01 * slow), read(*asked))[1])
    batches = Prefetcher(loader, 2, 12, limit=limit)
    batches._copies, ahead, steps = Clones(), 0, []
    for batch, cells in batches:
        if batch.step % 4 == 3:  # a step that leaves cells
            next(cells)
            continue
        found = []
        for cell, blocks in zip(cells, batch.blocks, strict=True):
            ahead += isinstance(cell, CopiedCell)
            found += copied(replace(batch, blocks=[blocks]), [getattr(cell, "cell", cell)])
            time.sleep(0.01)
        steps.append(batch.step)
        assert same(found, copied(batch, read_all(read, loader, batch)))
    assert steps == [2, 4, 5, 6, 8, 9, 10] and (slow or ahead > 5)


def read_all(read, loader, batch):
    return (read(batch, number) for number in loader.numbers(batch))


def test_a_device_without_memory_for_a_second_cell_is_not_asked_again(monkeypatch):
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake_streams, name))
    monkeypatch.setattr(torch.cuda, "stream", fake_streams.on_stream)
    asked = []

    def lacking(cell, device):
        asked.append(cell)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Cell, "to", lacking)
    copies, cell = CopyStream(torch.device("cpu")), empty_cell()
    assert [copies.copy(cell), copies.copy(cell)] == [None, None] and len(asked) == 1


def empty_cell() -> Cell:
    rows = torch.zeros(2, dtype=torch.long)
    return Cell(rows, rows.bool(), rows, rows, rows[:1], rows[:1] + 2, torch.zeros(2, 2, 8), ("s",))


def test_closing_stops_the_thread(loader):
    before = {*threading.enumerate()}
    batches = Prefetcher(loader, 0, 12, limit=0)
    next(next(iter(batches))[1])
    batches.close()

    left = {*threading.enumerate()} - before
    assert not [thread for thread in left if not thread.name.startswith("read")], "the cache's own readers stay"


def test_a_rank_without_cells_is_no_further_ahead_than_others_and_closes_at_once(loader):
    idle = BatchLoader(loader.sampler, rank=7, ranks=8)
    batches, steps = Prefetcher(idle, 0, 5000), []
    for batch, cells in batches:
        time.sleep(0.01)
        assert not list(cells) and len(batches._ready) <= MAX_WAITING
        steps.append(batch.step)
        if batch.step == 20:
            break
    batches.close()
    assert steps == list(range(21)) and len(batches._ready) <= MAX_WAITING
    assert [batch.step for batch, _ in Prefetcher(idle, 3, 30)] == list(range(3, 30))


def test_an_error_comes_at_the_cell_it_is_about(loader, monkeypatch):
    fill = loader.cache.fill

    def first_of(windows):
        return windows[0].index

    wanted = first_of(loader.sampler.batch(2).windows[0])

    def failing(out, parts, layers):
        if parts[0][0] == wanted and layers != (FINAL,):
            raise CacheError("damaged")
        fill(out, parts, layers)

    monkeypatch.setattr(loader.cache, "fill", failing)
    seen = []
    with pytest.raises(CacheError, match="damaged"):
        for batch, cells in Prefetcher(loader, 0, 8):
            seen.append(batch.step)
            list(cells)
    first = next(step for step in range(8) if wanted in map(first_of, loader.sampler.batch(step).windows))
    assert seen == list(range(first + 1))


@pytest.mark.parametrize("config", [CONFIG, SOFT], ids=["ce", "kl"])
@pytest.mark.parametrize("coded", [*itertools.product(("raw", "int8"), repeat=2), ("fixed16", "int8")], ids="-".join)
def test_states_left_encoded_are_the_same_once_they_are_moved(tmp_path, small, monkeypatch, coded, config):
    monkeypatch.setattr(in_flight, "INLINE_BYTES", 0)
    monkeypatch.setitem(CODECS, "fixed16", Fixed16())
    columns = [replace(spec, codec=coded[spec.name == FINAL]) for spec in COLUMNS]
    plain, kept = made(tmp_path / "cache", columns, config), opened(tmp_path / "cache", config, keep_encoded=True)

    for batch, cells in Prefetcher(kept, 0, 12, limit=20_000):
        right = plain.read_all(plain.sampler.batch(batch.step))
        for cell, wanted, windows in zip(cells, right, batch.windows, strict=True):
            found = cell.to("cpu")
            assert torch.equal(found.aux_KRD.view(torch.int16), wanted.aux_KRD.view(torch.int16))
            assert found.names == wanted.names and torch.equal(found.pos_R, wanted.pos_R)
            assert (found.final_FD is None) == (config is CONFIG)
            if found.final_FD is not None:
                assert torch.equal(found.final_FD.view(torch.int16), wanted.final_FD.view(torch.int16))
            # of eight values two bytes each as they are; in int8 one, and two of a scale; in fixed16 two, and four
            bytes_a_row = {"raw": 16, "int8": 10, "fixed16": 20}
            rows = 2 * len(wanted.pos_R), 0 if wanted.final_FD is None else len(wanted.final_FD)
            size = sum(-(-bytes_a_row[how] * count // 4) * 4 for how, count in zip(coded, rows, strict=True))
            assert kept.size(windows) == size
    windows = [window for step in range(12) for of_cell in kept.sampler.batch(step).windows for window in of_cell]
    starts = {window.first for window in windows}
    assert any(start % 256 for start in starts), "windows begin inside of a block, too"


def test_states_are_left_in_int8_only_where_all_are(tmp_path):
    columns = [replace(COLUMNS[0], codec="int8"), *COLUMNS[1:]]
    cache = HiddenCache.open(make_cache(tmp_path / "cache", random_samples(9), columns))
    found = [cache.lossy_codec(layers) for layers in ([1], [1, 10], [10], [], [FINAL])]
    assert found == [CODECS["int8"], *[None] * 4]


def test_a_batch_is_read_a_cell_at_a_time(loader, monkeypatch):
    read, held = [], loader.read
    monkeypatch.setattr(loader, "read", lambda batch, number: read.append(number) or held(batch, number))
    batch = loader.sampler.batch(0, alone=True)
    assert len(batch.cells) == 3 and not read
    for number, _ in enumerate(loader.read_all(batch), 1):
        assert len(read) == number


def test_waiting_for_data_is_measured_and_nothing_else(loader, monkeypatch):
    fill = loader.cache.fill

    def slow(*wanted):
        time.sleep(0.05)
        fill(*wanted)

    monkeypatch.setattr(loader.cache, "fill", slow)
    batches, began = Prefetcher(loader, 0, 3), time.perf_counter()
    read = sum(1 for _, cells in batches for _ in cells)
    took = time.perf_counter() - began
    assert 0.05 * read * 0.9 <= batches.waited <= took

    patient = Prefetcher(loader, 0, 1)
    list(next(iter(patient))[1])
    waited = patient.waited
    time.sleep(0.1)
    patient.close()
    assert patient.waited == waited


def test_batches_cut_the_order_of_an_epoch_end_to_end(loader):
    sampler, cache = loader.sampler, loader.cache
    order = [cache.samples.hex(int(sampler.indices[number])) for number in sampler._order(0)[1]]
    batches = [sampler.batch(step).names for step in range(sampler.per_epoch)]
    assert [len(names) for names in batches] == [3] * (len(order) // 3)
    assert [*itertools.chain(*batches)] == order[: 3 * len(batches)]

    large = Sampler(cache, split_samples(cache, 1001, 0.05, (1, 10)), CONFIG, TRAIN.model_copy(update={"batch": 64}))
    assert large.batch(0).names == order


# The target's final states


@pytest.mark.parametrize("keeps", ["needed", "all"])
def test_the_final_states_of_a_cell_are_those_of_its_rows(tmp_path, keeps):
    columns = [replace(spec, keeps=keeps if spec.name == FINAL else "all") for spec in COLUMNS]
    loader, cut, rows = made(tmp_path / "cache", columns), 0, 0
    cache = loader.cache
    place = {cache.samples.hex(i): i for i in range(len(cache))}
    for step in range(20 * loader.sampler.per_epoch):
        batch = loader.sampler.batch(step)
        for cell, blocks in zip(loader.read_all(batch), batch.blocks, strict=True):
            assert cell.final_FD.shape == ((cell.final_at_R >= 0).sum(), 8)
            for name, start, length in zip(cell.names, cell.starts_M.tolist(), cell.lengths_M.tolist(), strict=True):
                here = slice(start, start + length)
                whole = cache.read(place[name], final=True)
                at_T = torch.full((len(whole.ids),), -1)
                at_T[whole.final_rows] = torch.arange(len(whole.final_rows))
                kept_T = at_T[cell.pos_R[here]]
                assert torch.equal(cell.final_at_R[here] >= 0, kept_T >= 0)
                found = cell.final_FD[cell.final_at_R[here][kept_T >= 0]]
                assert torch.equal(found, whole.final[kept_T[kept_T >= 0]])
                last = int(cell.pos_R[start + length - 1])
                cut += last + 1 < len(whole.ids) and bool(whole.mask[last + 1])
            teachers = cell.final_at_R[blocks.final_row_NS[blocks.scored_NS]]
            assert (teachers >= 0).all()
            rows += len(teachers)
    assert rows and cut, "windows end before a token that is to be learned, too"


def test_a_loss_of_tokens_alone_opens_no_byte_of_the_final_states(tmp_path):
    hard = made(tmp_path / "cache", config=CONFIG)
    wanted = [copied(batch, hard.read_all(batch)) for batch in map(hard.sampler.batch, range(hard.sampler.per_epoch))]
    for shard in range(hard.cache.shards):
        for file in shard_folder(hard.cache.path, shard).glob("final*/**/*"):
            if file.is_file():
                file.write_bytes(b"")
        (shard_folder(hard.cache.path, shard) / "final.arrow").unlink()

    hard, soft = (opened(tmp_path / "cache", config) for config in (CONFIG, SOFT))
    assert all(
        same(copied(batch, cells), wanted[batch.step]) for batch, cells in Prefetcher(hard, 0, hard.sampler.per_epoch)
    )
    with pytest.raises(CacheError, match="final"):
        soft.read(soft.sampler.batch(0), 0)


def test_samples_whose_final_states_were_refused_teach_no_loss_that_reads_them(tmp_path):
    samples = [replace(sample, split="heldout" if at == 1 else "train") for at, sample in enumerate(random_samples(20))]
    make_cache(tmp_path / "cache", samples, COLUMNS[:2])
    cache = HiddenCache.open(make_cache(tmp_path / "cache", columns=COLUMNS[2:], refused={0: "not finite"}))
    hard, soft = (split_samples(cache, 1001, 0.05, (1, 10), final) for final in (False, True))

    assert set(hard.train) - set(soft.train) == {0} and set(soft.train) < set(hard.train)
    assert hard.heldout.tolist() == soft.heldout.tolist()
    assert hard.digest != soft.digest
