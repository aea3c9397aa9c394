"""`pipeline cache-hidden`: correct states, nothing captured twice, and recovery from every interruption."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_capture import contents
from tiny import CHAT_TEMPLATE, conversations, other_weights, tokenizer, write_jsonl

import stages.cache_hidden.capture as capture_module
import stages.cache_hidden.engine as engine_module
from pipeline.cache import HiddenCache
from pipeline.cache.atomic import write_errors
from pipeline.cache.manifest import read_canonical
from pipeline.cache.plan import load_plan
from pipeline.cache.plan_writer import micro_batches
from pipeline.cache.schema import GaugeFacts
from pipeline.cache.verify import verify
from pipeline.corpus.sources import parse_record
from pipeline.errors import DataError, RoomError, UsageError
from pipeline.target.head import TargetHead
from pipeline.target.layers import final_rows
from pipeline.target.loading import load_target
from pipeline.target.on_policy import OnPolicyStats, on_policy_rows, on_policy_share
from stages.cache_hidden.capture import BackgroundWriter, Progress
from stages.cache_hidden.pack import Packer, largest_magnitude
from stages.cache_hidden.run import plan, plan_table, run
from stages.cache_hidden.settings import HUB_CORPUS, CaptureOptions

ROOT = Path(__file__).parents[2]
OPTIONS = CaptureOptions(layers="1,3,4", max_length=256)


@pytest.fixture
def capture(tiny_target, tiny_corpus, tmp_path):
    """Return a function that captures into tmp_path/cache, with the tiny target and corpus unless told otherwise."""

    def captured(model=tiny_target, corpus=tiny_corpus, out=tmp_path / "cache", **options):
        chosen = {"layers": "1,3", "max_length": 256, **options}
        return run(str(model), corpus and str(corpus), out, options=CaptureOptions(**chosen))

    return captured


@pytest.fixture
def cache_copy(tiny_cache, tmp_path):
    return shutil.copytree(tiny_cache, tmp_path / "copy")


def manifests(cache: Path, column: str = "*") -> list[dict]:
    return [read_canonical(path) for path in sorted(cache.glob(f"shards/*/{column}.json"))]


# What is stored


def test_states_are_those_of_the_sample_computed_alone(tiny_target, tiny_cache):
    model, cache = load_target(str(tiny_target)), HiddenCache.open(tiny_cache)
    assert cache.layers == (1, 3, 4) and cache.has_final and cache.samples.ok.all()
    for i in range(len(cache)):
        sample = cache.read(i, final=True)
        with torch.no_grad():
            alone = model(sample.ids[None], output_hidden_states=True).hidden_states
        for k, layer in enumerate(cache.layers):
            torch.testing.assert_close(sample.aux[k], alone[layer + 1][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sample.final, alone[-1][0][sample.final_rows], rtol=1e-4, atol=1e-4)
        assert sample.final_rows.tolist() == np.flatnonzero(final_rows(sample.mask.numpy())).tolist()


def test_every_conversation_is_there_once_as_the_template_has_it(tiny_target, tiny_cache):
    cache, made = HiddenCache.open(tiny_cache), tokenizer()
    wanted = set()
    for chat in conversations():
        encoded = made.apply_chat_template(chat["messages"], return_dict=True, return_assistant_tokens_mask=True)
        keep = int(np.flatnonzero(encoded["assistant_masks"])[-1]) + 2
        wanted.add((tuple(encoded["input_ids"][:keep]), chat["domain"], chat["split"]))
    found = {
        (tuple(cache.tokens_of(i)[0].tolist()), cache.samples.domain[i], cache.samples.split[i]) for i in range(24)
    }
    assert found == wanted


def test_the_cache_holds_all_that_training_needs_of_the_target(tiny_target, tiny_cache):
    cache = HiddenCache.open(tiny_cache)
    assert cache.tokens == {"bos": None, "eos": [258], "length": 260, "mask": 259, "pad": 256}
    assert cache.target_config["num_hidden_layers"] == 6
    model = load_target(str(tiny_target))
    assert torch.equal(cache.head().head_VD, model.lm_head.weight)
    assert torch.equal(cache.head().embed_VD, model.model.embed_tokens.weight)
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in (tiny_cache / "target").iterdir()}
    assert not verify(tiny_cache).damaged


def test_the_head_of_a_capture_is_the_target_s_own_and_no_second_copy(capture, monkeypatch):
    targets, heads = [], []

    def watched_load(*args, **options):
        targets.append(load_target(*args, **options))
        return targets[-1]

    def watched_packer(engine, shard, columns, head, *more):
        heads.append(head)
        return Packer(engine, shard, columns, head, *more)

    monkeypatch.setattr(capture_module, "load_target", watched_load)
    monkeypatch.setattr(capture_module, "Packer", watched_packer)
    capture()

    (target,) = targets
    places = target.get_input_embeddings().weight.data_ptr(), target.get_output_embeddings().weight.data_ptr()
    assert heads and all((head.embed_VD.data_ptr(), head.head_VD.data_ptr()) == places for head in heads)


def test_final_on_all_rows_or_none(capture, tmp_path):
    capture(final="all", out=tmp_path / "all")
    sample = HiddenCache.open(tmp_path / "all").read(0, final=True)
    assert len(sample.final) == len(sample.ids)
    with pytest.raises(UsageError, match="on all rows, this command asks for needed; pass --final all"):
        capture(out=tmp_path / "all")
    done = capture(final="none", out=tmp_path / "none")
    cache = HiddenCache.open(tmp_path / "none")
    assert cache.layers == (1, 3) and not cache.has_final
    assert done.on_policy.rows >= 256, "the on-policy figures need no stored final"


def test_bfloat16_is_kept_as_its_bits(capture, tmp_path, tiny_target):
    capture(dtype="bfloat16")
    cache = HiddenCache.open(tmp_path / "cache")
    sample = cache.read(0)
    assert cache.dtype == sample.aux.dtype == torch.bfloat16
    with torch.no_grad():
        alone = load_target(str(tiny_target), dtype="bfloat16")(sample.ids[None], output_hidden_states=True)
    error = (sample.aux[0] - alone.hidden_states[2][0]).float().norm() / sample.aux[0].float().norm()
    assert error < 2e-2


# Determinism, batches, memory


def test_the_same_capture_gives_the_same_bytes(capture, tiny_cache, tmp_path):
    capture(layers="1,3,4")
    assert contents(tmp_path / "cache") == contents(tiny_cache)


def test_batch_tokens_change_batches_and_hardly_the_states(capture, tiny_cache, tmp_path):
    capture(layers="1,3,4", batch_tokens=1)
    one, many = HiddenCache.open(tmp_path / "cache"), HiddenCache.open(tiny_cache)
    assert one.identity.capture.batch_tokens == 1
    for i in range(len(many)):
        torch.testing.assert_close(one.read(i).aux, many.read(i).aux, rtol=1e-4, atol=1e-4)


def few_shards(out: Path, target: Path, corpus: Path):
    """Plan a cache so that its first shard has several samples of about the same length; return the whole plan."""
    plan(str(target), str(corpus), out, options=CaptureOptions(layers="1,3", max_length=256))
    return load_plan(out)


def test_out_of_memory_continues_in_smaller_groups_at_the_same_padded_length(
    capture, tiny_target, tmp_path, monkeypatch
):
    corpus = write_jsonl(tmp_path / "many.jsonl", conversations(40))
    planned = few_shards(tmp_path / "cache", tiny_target, corpus)
    shapes, right = [], engine_module.run_decoder

    def small(model, ids):
        shapes.append(tuple(ids.shape))
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 TiB")
        return right(model, ids)

    monkeypatch.setattr(engine_module, "run_decoder", small)
    capture(corpus=corpus)
    monkeypatch.undo()
    longest = {
        int(shard.lengths[rows].max()) for shard in planned.shards for rows in micro_batches(shard.lengths, 4096)
    }
    assert {length for _, length in shapes} == longest and max(count for count, _ in shapes) > 2
    assert all(manifest["facts"]["split"] == (manifest["samples"] > 1) for manifest in manifests(tmp_path / "cache"))

    capture(corpus=corpus, out=tmp_path / "whole")
    split, whole = HiddenCache.open(tmp_path / "cache"), HiddenCache.open(tmp_path / "whole")
    for i in range(len(whole)):
        torch.testing.assert_close(
            split.read(i, final=True).final, whole.read(i, final=True).final, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("text", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_a_sample_that_alone_does_not_fit_is_an_error_of_room(capture, tmp_path, monkeypatch, text):
    def never(model, ids):
        raise (torch.OutOfMemoryError if "CUDA" in text else RuntimeError)(text)

    monkeypatch.setattr(engine_module, "run_decoder", never)
    with pytest.raises(RoomError, match=r"no memory for one sample of \d+ tokens .*--max-length"):
        capture()
    assert not list(tmp_path.glob("cache/tmp-*"))


def test_other_errors_of_the_target_are_not_taken_for_memory(capture, monkeypatch):
    def broken(model, ids):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(engine_module, "run_decoder", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        capture()


def test_writing_in_the_background_is_bounded_and_keeps_order():
    put, written, go = [], [], threading.Event()
    with BackgroundWriter(lambda item: (go.wait(5), written.append(item)), depth=2) as writer:
        feeder = threading.Thread(target=lambda: [(writer.put(item), put.append(item)) for item in range(6)])
        feeder.start()
        time.sleep(0.1)
        assert (put, written) == ([0, 1, 2], []), "one is being written, two wait"
        go.set()
        feeder.join()
    assert written == list(range(6))


def test_nothing_is_written_behind_what_cannot_be():
    begun = []

    def fails(item):
        begun.append(item)
        raise RoomError(f"no space for {item}")

    with pytest.raises(RoomError, match="no space for first"), BackgroundWriter(fails, depth=2) as writer:
        for item in ("first", "second", "third"):
            writer.put(item)
    assert begun == ["first"]


def test_what_waits_to_be_written_is_dropped_where_the_computing_fails():
    written, begun, go = [], threading.Event(), threading.Event()

    def write(item):
        begun.set()
        go.wait(5)
        written.append(item)

    with pytest.raises(KeyboardInterrupt), BackgroundWriter(write, depth=2) as writer:
        for item in ("first", "second", "third"):
            writer.put(item)
        begun.wait(5)
        threading.Timer(0.1, go.set).start()
        raise KeyboardInterrupt
    assert written == ["first"]


def test_an_error_while_writing_ends_the_capture(capture, tmp_path, monkeypatch):
    from pipeline.cache.writer import ShardWriter

    def full(self, column, rows):
        raise RoomError("the disk is full")

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(RoomError, match="the disk is full"):
        capture()
    assert not list(tmp_path.glob("cache/tmp-*"))


# Refusals


@pytest.fixture
def nan_target(tiny_target, tmp_path):
    """A target whose state is not finite at every `~`."""
    folder = shutil.copytree(tiny_target, tmp_path / "nan")
    model = load_target(str(folder))
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer().encode("~")[0]] = float("nan")
    model.save_pretrained(folder)
    return folder


def with_tildes(count: int) -> list[dict]:
    chats = conversations()
    for chat in chats[:count]:
        chat["messages"][-1]["content"] += " ~"
    return chats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_is_not_finite_or_all_zero_shows_in_the_largest_of_a_row(dtype):
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[1, -3], [-2, -1], [0, -0.0], [-inf, 5], [inf, nan], [nan, 0]], dtype=dtype)
    assert str(largest_magnitude(rows).tolist()) == "[3.0, 2.0, 0.0, inf, nan, nan]"
    assert largest_magnitude(rows[:0]).tolist() == []


def test_a_sample_whose_states_are_not_finite_is_refused(capture, nan_target, tmp_path):
    corpus = write_jsonl(tmp_path / "tilde.jsonl", with_tildes(1))
    done = capture(nan_target, corpus)
    assert done.refused == 1
    cache = HiddenCache.open(tmp_path / "cache")
    (bad,) = np.flatnonzero(~cache.samples.ok)
    assert tokenizer().encode("~")[0] in cache.tokens_of(bad)[0]
    assert np.isfinite(done.on_policy.logprob)
    reason = json.loads((tmp_path / "cache/quarantine/samples.json").read_text())
    assert "aux.1 is not finite" in json.dumps(reason)
    assert not verify(tmp_path / "cache").damaged


def test_too_many_refused_samples_stop_the_capture(capture, nan_target, tmp_path):
    with pytest.raises(DataError, match=r"2 of 24 samples .*not finite"):
        capture(nan_target, write_jsonl(tmp_path / "tilde.jsonl", with_tildes(2)))


def test_a_commit_cut_short_ends_as_if_it_had_not_been(capture, nan_target, tmp_path):
    """Also where a sample was refused: the columns captured later say the same reason."""
    corpus = write_jsonl(tmp_path / "tilde.jsonl", with_tildes(1))
    capture(nan_target, corpus)
    whole = contents(tmp_path / "cache")
    for path in tmp_path.glob("cache/shards/*/final.json"):
        path.unlink()
    done = capture(nan_target, corpus)
    assert done.new_shards == done.shards
    assert contents(tmp_path / "cache") == whole


def test_what_was_killed_after_its_last_commit_is_cleaned_by_the_next_run(capture, tmp_path):
    capture()
    whole = contents(tmp_path / "cache")
    for name in ("tmp-working-dead", "shards/000000/tmp-dead"):
        (tmp_path / "cache" / name).mkdir()
        (tmp_path / "cache" / name / "lock").touch()

    assert capture().new_shards == 0
    assert contents(tmp_path / "cache") == whole and not list(tmp_path.glob("cache/**/tmp-*"))


def test_an_unusable_corpus_leaves_nothing_behind(capture, tmp_path):
    corpus = write_jsonl(tmp_path / "broken.jsonl", ["{", "nothing", {"messages": []}])
    with pytest.raises(DataError, match=r"no usable sample in 3 rows .*broken\.jsonl:1"):
        capture(corpus=corpus)
    assert not (tmp_path / "cache").exists()


def test_what_does_not_fit_the_disk_is_refused_before_the_target_runs(capture, tmp_path, monkeypatch):
    import pipeline.cache.atomic as disk

    monkeypatch.setattr(disk, "free_bytes", lambda where: 1 << 18)
    monkeypatch.setattr(engine_module, "run_decoder", None)
    with pytest.raises(RoomError, match=r"a cache of 24 samples.*free"):
        capture()


def test_a_limit_met_while_writing_the_head_is_an_error_of_room(tmp_path):
    """A limit on file sizes is the one disk a test can fill; safetensors reports it as it does a full one."""
    head = TargetHead(torch.zeros(1000, 64), torch.zeros(1000, 64))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(RoomError, match="cannot write a head: File too large; raise"), write_errors(tmp_path, "a head"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            head.save(tmp_path / "head.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Identity and resuming


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("user", "human") + " ")


def other_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(text + " ")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"max_length": 200}, "samples.max_length = 256, .* 200"),
        ({"batch_tokens": 512}, "capture.batch_tokens = 4096, .* 512"),
        ({"dtype": "bfloat16"}, "capture.dtype = 'float32', .* 'bfloat16'"),
        ({"max_samples": 5}, "max_samples = all, .* 5"),
        (other_template, "tokenizer.chat_template = "),
        (other_weights, "target.digest = "),
        (other_tokenizer, "tokenizer.digest = "),
    ],
)
def test_whatever_changes_the_identity_is_refused_with_both_values(
    tiny_target, tiny_corpus, cache_copy, tmp_path, change, key
):
    before, target = contents(cache_copy), tiny_target
    options = {"layers": "1,3,4", "max_length": 256}
    if callable(change):
        target = shutil.copytree(tiny_target, tmp_path / "target")
        change(target)
    else:
        options |= change
    with pytest.raises(UsageError, match=f"{key}.*another --out"):
        run(str(target), str(tiny_corpus), cache_copy, options=CaptureOptions(**options))
    assert contents(cache_copy) == before


def test_another_corpus_is_refused_and_a_moved_one_is_not(tiny_target, tiny_corpus, cache_copy, tmp_path):
    moved = shutil.copytree(tiny_target, tmp_path / "moved target")
    (tmp_path / "moved").mkdir()
    corpus = Path(shutil.copy(tiny_corpus, tmp_path / "moved"))
    assert run(str(moved), str(corpus), cache_copy, options=OPTIONS).new_shards == 0
    corpus.write_text(corpus.read_text().replace("red", "RED"))
    with pytest.raises(UsageError, match=r"was planned from chats.jsonl \(\d+ bytes, xxh3 .*another --out"):
        run(str(moved), str(corpus), cache_copy, options=OPTIONS)


def test_new_chats_beside_a_bundled_target_are_not_taken_for_the_old(tiny_target, tmp_path):
    target = shutil.copytree(tiny_target, tmp_path / "data/target")
    chats = write_jsonl(tmp_path / "data/chats.jsonl", conversations(6))
    assert run(str(target), None, tmp_path / "cache", options=OPTIONS).samples == 6
    assert run(str(target), None, tmp_path / "cache", options=OPTIONS).new_shards == 0
    write_jsonl(chats, conversations(7))
    with pytest.raises(UsageError, match=r"was planned from chats\.jsonl .*another --out"):
        run(str(target), None, tmp_path / "cache", options=OPTIONS)


def test_a_file_added_to_a_folder_is_seen_by_the_same_command(tiny_target, tmp_path):
    target = shutil.copytree(tiny_target, tmp_path / "target")
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus/a.jsonl", conversations(6))
    command = (str(target), str(tmp_path / "corpus"), tmp_path / "cache")
    run(*command, options=OPTIONS)
    assert run(*command, options=OPTIONS).new_shards == 0
    added = write_jsonl(tmp_path / "corpus/b.jsonl", conversations(6, seed=1))
    with pytest.raises(UsageError, match=r"was planned from a\.jsonl .* names a\.jsonl .* b\.jsonl"):
        run(*command, options=OPTIONS)
    added.unlink()
    (target / "added_tokens.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.digest = "):
        run(*command, options=OPTIONS)


def test_a_layer_added_later_is_one_more_pass_that_touches_nothing_else(tiny_target, tiny_corpus, cache_copy):
    before = contents(cache_copy)
    options = CaptureOptions(layers="-1,1,2,3,4", max_length=256)
    done = run(str(tiny_target), str(tiny_corpus), cache_copy, options=options)
    after = contents(cache_copy)
    assert done.new_shards == done.shards
    assert {name: after[name] for name in before} == before
    assert all("/aux.2" in name or "/aux.-1" in name for name in after.keys() - before.keys())
    assert HiddenCache.open(cache_copy).layers == (-1, 1, 2, 3, 4)
    assert not verify(cache_copy).damaged


def test_only_what_is_missing_is_captured_again(tiny_target, tiny_corpus, cache_copy):
    before = contents(cache_copy)
    shutil.rmtree(cache_copy / "shards/000003/aux.3")
    shutil.rmtree(cache_copy / "shards/000005")
    assert run(str(tiny_target), str(tiny_corpus), cache_copy, options=OPTIONS).new_shards == 2
    assert contents(cache_copy) == before
    shutil.rmtree(cache_copy / "target")
    run(str(tiny_target), str(tiny_corpus), cache_copy, options=OPTIONS)
    assert contents(cache_copy) == before


NOTHING_TO_DO = """
import sys, time
from stages.cache_hidden.settings import CaptureOptions
from stages.cache_hidden.run import run
run(*sys.argv[1:3], __import__("pathlib").Path(sys.argv[3]), options=CaptureOptions(layers="1,3,4", max_length=256))
heavy = {"torch", "transformers", "datasets"} & set(sys.modules)
assert not heavy, heavy
print(time.process_time())  # of the whole process: a busy machine stretches any other clock
"""


@pytest.mark.parametrize("record", [True, False], ids=["with its record", "without"])
def test_nothing_to_do_ends_at_once_without_torch(tiny_target, tiny_corpus, cache_copy, record):
    if not record:
        (cache_copy / "capture.log").unlink()
    before = contents(cache_copy)
    command = [sys.executable, "-c", NOTHING_TO_DO, str(tiny_target), str(tiny_corpus), str(cache_copy)]
    seconds = []
    while len(seconds) < 8 and min(seconds, default=1) >= 1:  # processor time, too, is longer on a busy machine
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        assert "nothing to do" in done.stdout
        seconds.append(float(done.stdout.splitlines()[-1]))
    assert min(seconds) < 1
    assert contents(cache_copy) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_cleanly_and_the_same_command_continues(tiny_target, tmp_path, number, code):
    corpus = write_jsonl(tmp_path / "chats.jsonl", conversations(64))
    out = tmp_path / "cache"
    command = [sys.executable, "-m", "pipeline", "cache-hidden", "--model", str(tiny_target), "--corpus", str(corpus)]
    command += ["--out", str(out), "--layers", "1", "--max-length", "256", "--batch-tokens", "1", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("shards/*/final.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == code, complaint
    planned = len(load_plan(out).shards)
    assert 0 < len(list(out.glob("shards/*/final.json"))) < planned
    done = run(str(tiny_target), str(corpus), out, options=CaptureOptions(layers="1", max_length=256))
    assert 0 < done.new_shards < planned
    assert not list(out.glob("tmp-*")), "a signal may catch the clean-up itself; the next run removes what is left"
    assert not verify(out).damaged and not verify(out).missing


def test_killed_at_random_moments_it_ends_with_the_same_bytes():
    """The short version of `python tests/kill_capture.py --kills 50`."""
    script = [sys.executable, str(ROOT / "tests/kill_capture.py"), "--kills", "4", "--seed", "3"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "4 kills" in done.stdout


# Plan and on-policy figures


def test_a_plan_says_what_a_capture_will_hold(tiny_target, tmp_path):
    rows = [*conversations(), conversations()[0], "{", *conversations(30, seed=1)]
    corpus = write_jsonl(tmp_path / "chats.jsonl", rows)
    report = plan(str(tiny_target), str(corpus), tmp_path / "cache", options=OPTIONS)
    assert (report["rows"], report["samples"], report["duplicates"]) == (56, 54, 1)
    assert report["dropped"]["broken line"]["count"] == 1
    assert report["dropped"]["broken line"]["examples"][0].startswith("chats.jsonl:26: ")
    assert report["domains"] == {"colours": 18, "numbers": 18, "places": 18}
    assert report["splits"]["heldout"] + report["splits"]["train"] == 54
    assert report["bytes"]["aux.1"] == report["tokens"] * 32 * 4
    assert report["bytes"]["target"] == 2 * 264 * 32 * 4
    assert report["fits"] and report["shards_done"] == 0
    assert not (tmp_path / "cache/shards").exists(), "the target has not run"
    assert "26" in "".join(str(cell) for column in plan_table(report).columns for cell in column._cells)

    done = run(str(tiny_target), str(corpus), tmp_path / "cache", options=OPTIONS)
    assert (done.samples, done.tokens, done.shards) == (54, report["tokens"], report["shards"])
    cache = HiddenCache.open(tmp_path / "cache")
    assert report["supervised"] == cache.samples.supervised.sum()
    assert report["bytes"]["final"] == cache.samples.final_length.sum() * 32 * 4
    after = plan(str(tiny_target), None, tmp_path / "cache", options=OPTIONS)
    assert after["bytes_to_write"] == 0 and after["shards_done"] == after["shards"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the target's own type is taken")
@pytest.mark.parametrize(
    ("named", "options", "bundled", "warned"),
    [
        ("bfloat16", {}, False, True),
        ("float16", {}, False, True),
        ("float32", {}, False, False),
        ("bfloat16", {"dtype": "float32"}, False, False),
        ("bfloat16", {"device": "cpu"}, False, False),
        ("bfloat16", {}, True, False),
    ],
)
def test_a_plan_without_a_gpu_warns_that_it_fixes_float32(
    tiny_target, tiny_corpus, tmp_path, capsys, named, options, bundled, warned
):
    target = shutil.copytree(tiny_target, tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "dtype": named}))
    if bundled:
        shutil.copy(tiny_corpus, tmp_path / "chats.jsonl")
    wanted = CaptureOptions(layers="1", max_length=256, **options)
    assert plan(str(target), str(tiny_corpus), tmp_path / "cache", options=wanted)["dtype"] == "float32"
    assert ("plan with --dtype bfloat16" in capsys.readouterr().err) == warned
    plan(str(target), str(tiny_corpus), tmp_path / "cache", options=wanted)
    assert not capsys.readouterr().err, "what is settled is not warned about"


def test_a_capture_says_what_planning_left_out(capture, capsys, tmp_path):
    long = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "word " * 80}]
    late = [{"role": "user", "content": "word " * 80}, {"role": "assistant", "content": "hi"}]
    rows = [*conversations(), conversations()[0], "{", {"messages": long}, {"messages": late}]
    capture(corpus=write_jsonl(tmp_path / "chats.jsonl", rows))
    said = capsys.readouterr().err
    assert "left out, broken line: 1, such as chats.jsonl:26: no JSON" in said
    assert "left out, too short: 1, such as chats.jsonl:28: " in said
    assert "left out, duplicates: 1\n" in said and "cut at max_length: 2\n" in said
    assert "rewrites" not in said, "nothing of the kind was found"


def test_max_samples_stops_reading(capture):
    assert capture(max_samples=7).samples == 7


def test_a_trial_of_few_samples_is_not_taken_for_the_whole(capture, tiny_corpus):
    assert capture(max_samples=7).samples == 7
    for corpus in (tiny_corpus, None):
        with pytest.raises(UsageError, match=r"max_samples = 7, .* max_samples = all; .*another --out"):
            capture(corpus=corpus)
    assert capture(max_samples=7).new_shards == 0


@pytest.mark.parametrize("named", [True, False])
def test_only_the_default_data_set_is_capped(tiny_target, tmp_path, monkeypatch, named):
    """The hub cannot be reached from a test, so its rows come from here."""
    rows = [parse_record(row, HUB_CORPUS, line) for line, row in enumerate(conversations(), 1)]
    source = {"dataset": HUB_CORPUS, "revision": "1"}
    monkeypatch.setattr("stages.cache_hidden.make_plan.hub_dataset", lambda corpus, roles: (iter(rows), source))
    monkeypatch.setattr("stages.cache_hidden.run.HUB_SAMPLES", 5)
    corpora = [HUB_CORPUS, None] if named else [None, HUB_CORPUS]
    out, samples = tmp_path / "cache", 24 if named else 5
    for _ in range(2):
        assert plan(str(tiny_target), corpora[0], out, options=OPTIONS)["samples"] == samples
    with pytest.raises(UsageError, match="max_samples"):
        plan(str(tiny_target), corpora[1], out, options=OPTIONS)


def test_the_default_layers_follow_the_targets_depth(capture, tmp_path):
    capture(layers=None)
    assert HiddenCache.open(tmp_path / "cache").layers == (1, 3)


def test_options_that_contradict_each_other():
    with pytest.raises(UsageError, match="say two things"):
        CaptureOptions(layers="1,2", taps=2)
    with pytest.raises(UsageError, match="wanted numbers"):
        CaptureOptions(layers="one").layer_list()


def test_the_on_policy_figures_count_the_targets_greedy_tokens(tiny_target, tiny_cache):
    """By hand, from stored final states: the row before a token predicts it."""
    cache, planned = HiddenCache.open(tiny_cache), load_plan(tiny_cache)
    head, share, wanted = cache.head(), on_policy_share(planned.supervised), OnPolicyStats()
    for shard in planned.shards:
        for row in range(len(shard)):
            i = int(np.flatnonzero((cache.samples.shard == shard.number) & (cache.samples.row == row))[0])
            sample = cache.read(i, final=True)
            for at in on_policy_rows(shard, row, share).tolist():
                assert sample.mask[at]
                state = sample.final[sample.final_rows.tolist().index(at - 1)]
                logits, token = head.logits(state), int(sample.ids[at])
                wanted += OnPolicyStats(1, int(logits.argmax() == token), float(logits.log_softmax(-1)[token]))
    found = OnPolicyStats()
    for manifest in manifests(tiny_cache, "final"):
        found += OnPolicyStats.from_facts(GaugeFacts.model_validate(manifest["facts"]["gauge"]))
    assert (found.rows, found.agree) == (wanted.rows, wanted.agree)
    assert found.rows >= 256
    assert found.logprob == pytest.approx(wanted.logprob, rel=1e-4)


def test_a_corpus_in_other_words_than_the_targets_is_warned_about(capture, capsys):
    capture()
    printed = capsys.readouterr()
    assert "on-policy gauge" in printed.out and "below 60%" in printed.err


def test_progress_says_how_fast_and_how_long(monkeypatch):
    clock = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr("stages.cache_hidden.capture.time.monotonic", lambda: next(clock))
    progress = Progress(tokens=40_000, shards=4)
    assert progress.line().endswith("ETA unknown")
    progress.done_tokens, progress.done_bytes = 1000, 5_000_000
    wanted = "shard 0/4 · 1,000 of 40,000 tokens · 100 tokens/s · 0.5 MB/s written · ETA 0:06:30"
    assert progress.line() == wanted
