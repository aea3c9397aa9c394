"""Faults around a cache: full and failing disks, too few file descriptors, states that cannot be kept. What was
committed stays, one line says cause and remedy, and the rerun ends with the same bytes.

Kills, stopped writers and disks that fail while writing are in `test_writer.py`; damage is in `test_damage.py`.
"""

import itertools
import os
import resource
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import killed_writer
import numpy as np
import pytest
import torch
from cache_maker import COLUMNS, contents, make_cache, random_samples
from disks import mounted
from tiny import config as tiny_config
from tiny import conversations, random_model, save_model, tokenizer, write_jsonl

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import clean_scratch
from pipeline.cache.codecs import CODECS
from pipeline.cache.manifest import read_canonical
from pipeline.cache.verify import verify
from pipeline.errors import DataError, PipelineError, RoomError
from stages.cache_hidden.repair import repair
from stages.cache_hidden.run import run
from stages.cache_hidden.settings import CaptureOptions

LEVELS = 20
COLUMN_CODECS = ("int8", "raw", "zstd")


@pytest.fixture(scope="module")
def columns():
    return [replace(spec, codec=codec, width=128) for spec, codec in zip(COLUMNS, COLUMN_CODECS, strict=True)]


# Disks


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", "size=8m") as disk:
        yield disk


def fill(disk: Path, leave: int) -> Path:
    """Take all of a disk but `leave` bytes; returns the file that takes it."""
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(0, free - leave)))
    return disk / "ballast"


def test_a_disk_full_at_any_level_stops_in_one_line_and_more_room_lets_it_go_on(small_disk, columns, monkeypatch):
    """From no room at all to almost enough; what is known beforehand is not asked, as when others fill the disk."""
    monkeypatch.setattr("pipeline.cache.writer.check_free_space", lambda *_: None)
    samples, before = random_samples(3, longest=60), shutil.disk_usage(small_disk).used
    whole = contents(make_cache(small_disk / "whole", samples, columns))
    needed = shutil.disk_usage(small_disk).used - before
    stages = set()
    for level in range(LEVELS):
        cache = small_disk / "cache"
        cache.mkdir()
        ballast = fill(small_disk, needed * level // LEVELS)
        with pytest.raises(RoomError, match=r"No space left on device; free at least .* or pass --out on another disk"):
            make_cache(cache, samples, columns)
        ballast.unlink()
        kept = contents(cache)
        if (cache / "cache.json").exists():
            report = verify(cache)
            assert not report.damaged or {finding.file for finding in report.damaged} == {"target/manifest.json"}
        stages.add(len(kept))
        make_cache(cache, samples, columns)
        assert {name: contents(cache)[name] for name in kept if name.startswith("shards")}.items() <= whole.items()
        assert contents(cache) == whole and not list(cache.rglob("tmp-*")), level
        shutil.rmtree(cache)
    assert len(stages) > 5, "the levels reached different stages"


@contextmanager
def few_files(more: int):
    """Let this process open only so many files more than it has open: the limit is on their numbers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    listed = {int(name) for name in os.listdir("/proc/self/fd")}
    taken = {fd for fd in listed if os.path.exists(f"/proc/self/fd/{fd}")}  # one was for listing them
    free = itertools.islice((fd for fd in itertools.count() if fd not in taken), more, None)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(free), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="counts what is open in /proc")
def test_too_few_files_stop_a_writer_in_one_line_and_more_let_it_go_on(tmp_path, columns):
    samples = random_samples(3, longest=60)
    whole = contents(make_cache(tmp_path / "whole", samples, columns))
    stopped = 0
    for more in range(12):
        cache = tmp_path / f"cache-{more}"
        try:
            with few_files(more):
                make_cache(cache, samples, columns)
        except RoomError as error:
            stopped += 1
            assert "Too many open files; raise `ulimit -n`" in str(error) and "\n" not in str(error)
        clean_scratch(cache)  # as every command does first: to remove a folder takes a file descriptor
        make_cache(cache, samples, columns)
        assert contents(cache) == whole and not list(cache.rglob("tmp-*")), more
    assert stopped > 3


def read_all(cache: Path) -> list[np.ndarray]:
    held = HiddenCache.open(cache)
    samples = [held.read(i, final=True) for i in range(len(held))]
    return [part.float().numpy() for sample in samples for part in (sample.aux, sample.final)]


@pytest.mark.skipif(sys.platform != "linux", reason="counts what is open in /proc")
def test_too_few_files_are_no_damage(tmp_path, columns):
    """A reader and `verify` say so, and `verify --repair` takes nothing for lost that it cannot open."""
    cache = make_cache(tmp_path / "cache", random_samples(3, longest=60), columns)
    right, before = read_all(cache), contents(cache)
    for use in (read_all, verify, lambda cache: repair(cache, None, None)):
        stopped = 0
        for more in range(10):
            try:
                with few_files(more):
                    found = use(cache)
            except RoomError as error:
                stopped += 1
                assert "Too many open files; raise `ulimit -n`" in str(error)
            else:
                assert use is read_all or (not found.damaged and not found.missing)
            assert contents(cache) == before
        assert stopped
    assert all(map(np.array_equal, read_all(cache), right))


def in_child(work) -> str:
    """What a child says of `work`: its typed error, or what it returned."""
    here, there = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(there, 2)  # the one place to which a failing child may write
        try:
            said = str(work())
        except PipelineError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException as error:
            said = f"bug: {error!r}"
        os.write(2, said.encode())
        os._exit(0)
    os.close(there)
    with open(here, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(not killed_writer.CAN_FAIL, reason="only Linux on x86-64 can be told to fail a call")
@pytest.mark.parametrize("codec", COLUMN_CODECS)
def test_a_disk_that_fails_to_read_is_a_typed_error(tmp_path, codec):
    """The kernel answers with EIO, whichever library asks."""
    columns = [replace(COLUMNS[0], codec=codec, width=128)]
    cache = make_cache(tmp_path / "cache", random_samples(1, longest=60), columns)
    held = HiddenCache.open(cache)
    held.tokens_of(0)

    def failing(work):
        def failed():
            killed_writer.fail(killed_writer.READS)
            return work()

        return in_child(failed)

    for work in (lambda: held.read(0), lambda: HiddenCache.open(cache), lambda: held.tokens):
        said = failing(work)
        assert said.startswith(f"CacheError: {cache}") and "Input/output error; the disk or the way to it is" in said
    assert "Input/output error" in failing(lambda: verify(cache).damaged)
    assert not verify(cache).damaged and held.read(0).aux.shape[0] == 1


# States


def strange_target(folder: Path, kind: str) -> Path:
    """A random target: where `~` stands its input is not finite or zero; or it gives every token the same states; or
    its layers pass on what comes in."""
    model = random_model(tiny_config())
    embedding, strange = model.model.embed_tokens.weight, tokenizer().encode("~")[0]
    with torch.no_grad():
        if kind == "passing":
            for layer in model.model.layers[2:4]:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        elif kind == "constant":
            embedding[:] = embedding[0].clone()
        else:
            embedding[strange] = {"NaN": float("nan"), "Inf": float("inf"), "zero": 0.0}[kind]
    return save_model(folder, model)


REFUSED = {"NaN": "is not finite", "Inf": "is not finite", "zero": "has a row of zeros"}


@pytest.mark.parametrize(
    ("kind", "codec"), [("NaN", "int8"), ("Inf", "zstd"), ("zero", "int8"), ("passing", "raw"), ("constant", "int8")]
)
def test_states_that_cannot_be_kept_are_refused_by_name_and_all_others_kept(tmp_path, monkeypatch, kind, codec):
    encode, finite = CODECS["int8"].encode, []
    monkeypatch.setattr(
        CODECS["int8"], "encode", lambda rows, *rest: finite.append(rows.isfinite().all()) or encode(rows, *rest)
    )
    chats = conversations(8)
    chats[3]["messages"][-1]["content"] += " ~"
    target, corpus = strange_target(tmp_path / "target", kind), write_jsonl(tmp_path / "chats.jsonl", chats)
    options = CaptureOptions(layers="-1,1,3", max_length=256, codec=codec)

    done = run(str(target), str(corpus), tmp_path / "cache", options=options)

    cache = HiddenCache.open(tmp_path / "cache")
    assert done.refused == (kind in REFUSED)
    assert all(finite) and bool(finite) == (codec == "int8"), "what is not finite would all escape"
    refused = [i for i in range(len(cache)) if tokenizer().encode("~")[0] in cache.tokens_of(i)[0]]
    assert np.flatnonzero(~cache.samples.ok).tolist() == (refused if kind in REFUSED else [])
    assert not verify(tmp_path / "cache").damaged and not verify(tmp_path / "cache").missing
    for i in np.flatnonzero(cache.samples.ok):
        sample = cache.read(int(i), final=True)
        assert sample.aux.isfinite().all() and sample.final.isfinite().all() and sample.aux.abs().amax(-1).min() > 0
    if kind in REFUSED:
        reasons = read_canonical(tmp_path / "cache/quarantine/samples.json")["samples"]
        assert [REFUSED[kind] in entry["reason"] for entry in reasons] == [True]
        with pytest.raises(DataError, match="was refused"):
            cache.read(refused[0])
    before = contents(tmp_path / "cache")
    assert run(str(target), str(corpus), tmp_path / "cache", options=options).new_shards == 0
    assert contents(tmp_path / "cache") == before


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_a_target_that_gives_nothing_but_nan_is_refused_in_one_line(tmp_path, codec):
    model = random_model(tiny_config())
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    target = save_model(tmp_path / "target", model)
    corpus = write_jsonl(tmp_path / "chats.jsonl", conversations(8))
    options = CaptureOptions(layers="1", max_length=256, codec=codec)
    with pytest.raises(DataError, match=r"be kept.*the target's weights are damaged, or its type is too narrow"):
        run(str(target), str(corpus), tmp_path / "cache", options=options)
    assert len(list(tmp_path.glob("cache/shards/*"))) <= 1, "one sample may be bad luck"
    assert not list(tmp_path.glob("cache/tmp-*")) and not verify(tmp_path / "cache").damaged
