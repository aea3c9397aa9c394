"""A codec that this program does not have, from its own file and one entry in CODECS: every command knows it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cache_maker import CAPTURE, COLUMNS, flip, make_cache, random_samples, without_record
from toy_codec import LEVELS, Fixed16

from pipeline.cache import HiddenCache
from pipeline.cache.catalog import Catalog
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.lossless import Zstd
from pipeline.cache.layout import FINAL
from pipeline.cache.plan import load_plan
from pipeline.cache.verify import verify
from pipeline.cli import commands, main
from pipeline.errors import CacheError, ProofError, UsageError
from pipeline.runs import checkpoint
from stages.cache_hidden.budget import BudgetRequest, SampleSizes, decide_within_budget
from stages.cache_hidden.repair import repair
from stages.cache_hidden.run import plan
from stages.cache_hidden.run import run as capture
from stages.cache_hidden.settings import CaptureOptions, resolve_settings
from stages.recode.run import run as recode
from stages.train_draft.run import run as train

RECIPE = ("train.batch=4", "train.anchors=6", "draft.block_size=4", "train.steps=6", "train.save_every=3")


@pytest.fixture(autouse=True, scope="module")
def fixed16():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CODECS, "fixed16", Fixed16())
        yield


# Planned


@pytest.mark.parametrize("command", ["plan", "cache-hidden", "recode"])
def test_the_help_names_it(command, capsys):
    with pytest.raises(SystemExit):
        commands([command, "--help"])
    assert "raw, zstd, int8, int6 or fixed16, or such as aux=int8,final=zstd." in re.sub(
        r"\s+", " ", capsys.readouterr().out
    )


def test_a_plan_prices_it_beside_the_others(tiny_target, tiny_corpus, tmp_path):
    report = plan(str(tiny_target), str(tiny_corpus), tmp_path / "cache", options=CaptureOptions(**CAPTURE))
    width, price = 32, report["prices"]["fixed16"]
    assert price["aux.1"] == report["tokens"] * (2 * width + 4) and [*report["prices"]] == [*CODECS]
    assert report["prices"]["int8"]["in all"] < price["in all"] < report["prices"]["zstd"]["in all"]


def test_a_budget_tries_it_before_a_smaller_lossy_codec_and_after_every_lossless_one(captured, tiny_target):
    corpus = SampleSizes.of(load_plan(captured("raw")).shards)
    settings = resolve_settings(str(tiny_target), Catalog(captured("raw")), CaptureOptions(**CAPTURE))
    steps = {}
    for budget in range(700_000, 1_000_000, 1000):
        request = BudgetRequest.of(CaptureOptions(budget=str(budget), methods="dflash"))
        decision = decide_within_budget(corpus, settings, request)[1]
        steps[decision["codec"]] = next(step for step in decision["steps"] if step.startswith("codec: "))
    assert [*steps] == ["aux=int6,final=zstd", "aux=int8,final=zstd", "aux=fixed16,final=zstd", "zstd", "raw"]
    tried = (
        r"\(raw [^,]*, zstd [^,]*, aux=fixed16,final=zstd [^,]*, aux=int8,final=zstd [^,]*, aux=int6,final=zstd [^,]*\)"
    )
    warning = "; fixed16 is lossy, within bounds the capture certifies: --codec zstd stays exact"
    assert re.search(f"the first that holds all samples {tried}{warning}$", steps["aux=fixed16,final=zstd"])


def test_an_unknown_codec_is_answered_with_its_name_among_the_others(captured):
    with pytest.raises(UsageError, match="wanted one of raw, zstd, int8, int6, fixed16 for all columns"):
        recode(captured("raw"), "gzip")


# Captured


def test_a_capture_is_certified_by_its_own_promise(captured):
    raw, rounded = HiddenCache.open(captured("raw")), HiddenCache.open(captured("fixed16"))
    for i in range(len(raw)):
        right, found = raw.read(i, final=True), rounded.read(i, final=True)
        for truth_RD, found_RD in ((right.aux, found.aux), (right.final, found.final)):
            assert ((found_RD - truth_RD).abs() <= truth_RD.abs().amax(-1, keepdim=True) / LEVELS).all()
            assert not torch.equal(found_RD, truth_RD)
    for name, manifest in rounded.columns(0).items():
        says = manifest.facts.certificate.as_dict()
        assert 0 < says["of_promise"] <= 1 and 0 < says["of_token"] < Fixed16.max_of_token
        assert ("kl" in says) == (name == FINAL) and manifest.facts.probe.error < 1e-3
    assert raw.digest == rounded.digest and rounded.rounded([1, FINAL]) == {
        "aux.1": ["fixed16"],
        "final": ["fixed16"],
    }


class Boaster(Fixed16):
    """Promises a hundredth of the error that it makes."""

    name = "boaster"

    def error_bound(self, states_RD, calibration):
        return super().error_bound(states_RD, calibration) / 100


class Truncated(Fixed16):
    """Loses eight of sixteen bits and promises no more of an entry, but as much of a token as before."""

    name = "truncated"

    def encode(self, states_RD, calibration):
        steps_RD, largest_R1 = super().encode(states_RD, calibration)
        return steps_RD // 256 * 256, largest_R1

    def error_bound(self, states_RD, calibration):
        return 1000 * super().error_bound(states_RD, calibration)


@pytest.mark.parametrize(("codec", "broken"), [(Boaster(), "an entry is off by"), (Truncated(), "a token by")])
def test_a_codec_whose_promise_does_not_hold_is_refused_before_anything_is_kept(
    tiny_target, tiny_corpus, tmp_path, monkeypatch, codec, broken
):
    monkeypatch.setitem(CODECS, codec.name, codec)
    options = CaptureOptions(codec=codec.name, **CAPTURE)
    with pytest.raises(ProofError, match=rf"aux\.1 does not fit {codec.name}: {broken} .* --codec aux\.1=zstd"):
        capture(str(tiny_target), str(tiny_corpus), tmp_path / "cache", options=options)
    assert not list(tmp_path.glob("cache/shards/*")) and not list(tmp_path.glob("cache/calibration/*"))


def test_the_same_capture_gives_the_same_bytes_also_when_it_goes_on(captured, tiny_target, tiny_corpus, tmp_path):
    cache = shutil.copytree(captured("fixed16"), tmp_path / "cache")
    for path in cache.glob("shards/000001/aux.1*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert capture(str(tiny_target), str(tiny_corpus), cache, options=CaptureOptions(**CAPTURE)).new_shards == 1
    assert without_record(cache) == without_record(captured("fixed16"))


# Verified


@pytest.mark.parametrize("codec", ["fixed16", "zstd-b"])
def test_a_column_without_its_manifest_is_not_captured_yet_and_nothing_is_foreign(tmp_path, monkeypatch, codec):
    monkeypatch.setitem(CODECS, "zstd-b", type("ZstdB", (Zstd,), {"name": "zstd-b"})())
    columns = [type(spec)(spec.name, spec.dtype, spec.width, codec, spec.keeps) for spec in COLUMNS]
    cache = make_cache(tmp_path / "cache", random_samples(3), columns)
    whole = verify(cache)
    assert not (whole.damaged or whole.missing or whole.foreign)
    assert (cache / f"shards/000000/aux.1.{codec}/zarr.json").is_file()

    (cache / "shards/000000/aux.1.json").unlink()

    report = verify(cache)
    missing = {found.file: found.what for found in report.missing if found.shard == 0}
    assert missing == {
        f"shards/000000/aux.1.{codec}": "without a manifest, so not captured yet",
        "shards/000000/aux.1.json": "not captured yet",
    }
    assert not report.damaged and not report.foreign
    assert HiddenCache.open(cache).catalog.partial["aux.1"] == load_plan(cache).shards[-1].number


def test_a_lossless_codec_is_priced_and_read_as_its_class_says(tmp_path, monkeypatch):
    class HalfPrice(Zstd):
        name = "half-price"

        def row_bytes(self, width, dtype):
            return width

    monkeypatch.setitem(CODECS, "half-price", HalfPrice())
    columns = [type(spec)(spec.name, spec.dtype, spec.width, "half-price", spec.keeps) for spec in COLUMNS]
    there = HiddenCache.open(make_cache(tmp_path / "there", random_samples(3), columns))
    raw = HiddenCache.open(make_cache(tmp_path / "raw", random_samples(3), COLUMNS))
    assert all(torch.equal(there.read(i).aux, raw.read(i).aux) for i in range(3)) and not there.rounded([1, 10])
    assert CODECS["half-price"].stored_bytes(1000, 8, "bfloat16") == 8000


def test_every_flipped_bit_is_found_and_repaired_to_the_same_bytes(captured, tiny_target, tmp_path):
    cache = shutil.copytree(captured("fixed16"), tmp_path / "cache")
    folder = cache / "shards/000000/aux.3.fixed16"
    for file in ("steps/c/0/0", "largest/c/0/0", "channels/c/0/0", "escapes/c/0/0", "zarr.json"):
        flip(folder / file, 5)
        assert {(found.shard, found.column) for found in verify(cache).damaged} == {(0, "aux.3")}
    with pytest.raises(CacheError, match="damaged"):
        [HiddenCache.open(cache).read(i) for i in range(8)]
    assert not repair(cache, str(tiny_target), "cpu").damaged
    assert without_record(cache) == without_record(captured("fixed16"))


def test_inspect_shows_it(captured, capsys):
    cache = str(captured("fixed16"))
    capsys.readouterr()  # what the capture printed, where this test is the first to ask for it
    main(["inspect", cache, "--json"])
    columns = json.loads(capsys.readouterr().out)["columns"]
    assert {column["codec"] for column in columns} == {"fixed16"}


# Recoded


def test_states_are_recoded_into_it_and_never_out_of_it(captured, tmp_path):
    cache = shutil.copytree(captured("raw"), tmp_path / "cache")
    recode(cache, "aux=fixed16")
    assert not verify(cache).damaged and not verify(cache).foreign and not verify(cache).missing
    raw, rounded = HiddenCache.open(captured("raw")), HiddenCache.open(cache)
    for i in range(len(raw)):
        right, found = raw.read(i, final=True), rounded.read(i, final=True)
        assert ((found.aux - right.aux).abs() <= right.aux.abs().amax(-1, keepdim=True) / LEVELS).all()
        assert torch.equal(found.final, right.final)
    assert 0 < rounded.columns(0)["aux.1"].facts.certificate.of_promise <= 1
    for other in ("raw", "int8"):
        with pytest.raises(UsageError, match=r"holds aux\.1 in fixed16, and what that has rounded stays so"):
            recode(cache, f"aux={other}")
    with pytest.raises(UsageError, match=r"holds aux\.1 in int8, and what that has rounded stays so"):
        recode(captured("int8"), "fixed16")


def test_what_a_stopped_recode_left_is_known_and_removed(captured, tmp_path):
    cache = shutil.copytree(captured("raw"), tmp_path / "cache")
    for end in ("", ".arrow"):
        left = f"shards/000000/aux.1.fixed16{end}"
        (shutil.copytree if not end else shutil.copy)(captured("fixed16") / left, cache / left)
    report = verify(cache)
    assert [found.what for found in report.missing] == ["left from a recode that was stopped; run it again"]
    assert not report.foreign and not report.damaged
    recode(cache, "aux=raw")
    assert not list(cache.glob("shards/*/aux.1.fixed16*"))


# Read and trained from


def test_states_left_encoded_are_the_same_once_they_are_decoded(captured):
    cache = HiddenCache.open(captured("fixed16"))
    parts = [(0, 3, 50), (2, 0, 30), (3, 40, 40)]
    codec = cache.lossy_codec([1, 3])
    right_KRD, memory_B = torch.empty(2, 77, 32), torch.empty(codec.buffer_bytes((2, 77, 32)), dtype=torch.uint8)
    cache.fill(right_KRD, parts, [1, 3])
    found_KRD = torch.zeros_like(right_KRD)
    for k, first, rows in cache.read_encoded(memory_B, parts, [1, 3], codec):
        rows.decode("cpu", found_KRD[k, first : first + len(rows)])
    assert torch.equal(found_KRD, right_KRD) and len(memory_B) == 2 * 77 * (2 * 32 + 4)


def test_columns_of_two_lossy_codecs_are_decoded_one_by_one(captured, tiny_target, tiny_corpus, tmp_path):
    options = CaptureOptions(codec="aux.1=int8,aux.3=fixed16,final=zstd", **CAPTURE)
    capture(str(tiny_target), str(tiny_corpus), tmp_path / "cache", options=options)
    mixed = HiddenCache.open(tmp_path / "cache")
    found = [mixed.lossy_codec(layers) for layers in ([1], [3], [1, 3], [FINAL])]
    assert found == [CODECS["int8"], CODECS["fixed16"], None, None]
    ones = [HiddenCache.open(captured(codec)).read(0, [layer]).aux for codec, layer in (("int8", 1), ("fixed16", 3))]
    assert torch.equal(mixed.read(0, [1, 3]).aux, torch.cat(ones))


class Killed(BaseException):
    pass


def test_a_draft_is_trained_from_it_and_a_killed_training_ends_the_same(captured, tmp_path, monkeypatch):
    def trained(name: str, cache: str = "fixed16") -> Path:
        return train(captured(cache), None, RECIPE, tmp_path / name, "cpu").run

    whole, save = trained("whole"), checkpoint.save

    def killed_after(run, step, *rest):
        save(run, step, *rest)
        if step == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", killed_after)
        trained("killed")
    assert checkpoint.steps(tmp_path / "killed") == [3]

    killed = trained("killed")

    for name in ("metrics.jsonl", "checkpoints/step-00000006/draft.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    facts = json.loads((whole / "run.json").read_text())
    assert facts["cache"]["rounded"] == ["aux.1 fixed16", "aux.3 fixed16"]
    with pytest.raises(UsageError, match=r"states = aux\.1 fixed16, .*pass another --out"):
        trained("whole", cache="raw")
