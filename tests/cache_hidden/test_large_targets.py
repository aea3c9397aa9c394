"""Targets larger than one device: ranks that share one, or a device map, make the cache that one device makes."""

import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import config, random_model, save_target, write_jsonl
from transformers import GPT2Config

from pipeline.cache import HiddenCache
from pipeline.cache.catalog import Catalog
from pipeline.cache.manifest import read_canonical
from pipeline.cache.verify import verify
from pipeline.errors import UsageError
from pipeline.target.config import load_config, loader_class
from pipeline.target.loading import load_target
from pipeline.target.probe import NOISE_FACTOR, ReferenceTarget, relative_error
from pipeline.target.several_devices import check_ranks, parse_device_map
from stages.cache_hidden.repair import verify_and_repair
from stages.cache_hidden.run import run
from stages.cache_hidden.settings import CaptureOptions
from stages.cache_hidden.shard_assignment import Worker
from stages.cache_hidden.tensor_parallel import Group

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "data/tiny-qwen3"
LAYERS = (-1, 1, 3)
CODECS = "aux.-1=raw,aux.1=raw,aux.3=int8,final=raw"

# Run by torchrun in place of `-m pipeline`, each with the command's arguments after it.
KILLED = """
import os, signal
from pipeline.cli import main
from stages.cache_hidden.tensor_parallel import Group

forward, count = Group._together, 0

def killed(self, *args, **kwargs):
    global count
    count += 1
    if count == 25 and self._worker.rank == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *args, **kwargs)

Group._together = killed
main()
"""
WITHOUT_MEMORY = """
import torch
from pipeline.cli import main
from stages.cache_hidden.tensor_parallel import Group

together, count = Group._together, 0

def full(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")

def run(self, forward, *args, **kwargs):
    global count
    count += 1
    return together(self, full if count == 25 and self._worker.rank == 1 else forward, *args, **kwargs)

Group._together = run
main()
"""
NOT_LOADED = """
import os
from pipeline.cli import main
from pipeline.errors import RoomError
from stages.cache_hidden import tensor_parallel

def full(*args, **kwargs):
    raise RoomError("the first rank has no memory to load its part")

if os.environ["RANK"] == "0":
    tensor_parallel.load_target = full
main()
"""
# Prints, of every rank, the MiB of its part, and by how much its memory grew at most, mapped files included.
GROWTH = """
import threading, time
import torch.distributed as dist
from pipeline.target.loading import load_target

def resident():
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon", "RssFile"))) / 1024

def watch():
    while True:
        sizes.append(resident())
        time.sleep(0.002)

dist.init_process_group("gloo")
load_target("{small}", ranks=2)  # imports what it needs
sizes = [resident()]
threading.Thread(target=watch, daemon=True).start()
model = load_target("{large}", ranks=2)
part = sum(weight.to_local().nbytes if hasattr(weight, "to_local") else weight.nbytes for weight in model.parameters())
print("grew", part / 2**20, max(sizes) - sizes[0], flush=True)
dist.destroy_process_group()
"""
ONE_LAYER_LATE = """
from pipeline.cli import main
from stages.cache_hidden.engine import ENGINES, HfEngine

class OneLayerLate(HfEngine):
    def forward(self, ids_BT, lengths_B, layers):
        states, final_BTD = super().forward(ids_BT, lengths_B, [layer + 1 for layer in layers])
        return {layer: states[layer + 1] for layer in layers}, final_BTD

ENGINES["transformers"] = lambda settings, target: OneLayerLate(target)
main()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The first of the bundled chats; of fewer, int8 does not learn how far a layer varies."""
    with (ROOT / "data/chats.jsonl").open() as file:
        chats = [json.loads(line) for line in islice(file, 60)]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "chats.jsonl", chats)


@pytest.fixture(scope="module")
def torchrun(corpus):
    """Return a function that captures into `out` with so many ranks, and returns their exit code, output and errors."""

    def running(out, processes, *options, script=None):
        what = ["-m", "pipeline"] if script is None else [str(script)]
        command = ["cache-hidden", "--model", str(TARGET), "--corpus", str(corpus), "--out", str(out)]
        command += ["--layers=-1,1,3", "--codec", CODECS, "--device", "cpu", *options]
        launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            launched + what + command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
        )
        return done.returncode, done.stdout, done.stderr

    return running


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The cache that one device makes."""
    return captured(corpus, tmp_path_factory.mktemp("alone") / "cache")


@pytest.fixture(scope="module")
def by_two(torchrun, tmp_path_factory):
    """The cache that two ranks make, and what they printed."""
    out = tmp_path_factory.mktemp("two") / "cache"
    code, printed, errors = torchrun(out, 2, "--tensor-parallel=2")
    assert code == 0, errors
    return out, printed, errors


def captured(corpus, out, **options):
    run(
        str(TARGET),
        str(corpus),
        out,
        options=CaptureOptions(layers="-1,1,3", codec=CODECS, **{"device": "cpu", **options}),
    )
    return out


def files_of(cache, *patterns):
    """The content of a cache's files that match a pattern, by path."""
    found = [path for pattern in patterns for path in cache.glob(pattern) if path.is_file()]
    return {path.relative_to(cache): path.read_bytes() for path in found}


def says(errors):
    """The lines of a run's errors that the command wrote, without those of torchrun."""
    return [line for line in errors.splitlines() if line.startswith(("error:", "bug:", "stopped", "interrupted"))]


def check_equal_within_noise(cache, other):
    """Raw columns differ by no more than two right forwards do, an int8 one from its truth by no more than before."""
    one, two = HiddenCache.open(cache), HiddenCache.open(other)
    assert len(one) == len(two) and one.whole == two.whole
    reference = ReferenceTarget(load_target(str(TARGET), dtype=one.dtype))
    differences = 0.0
    for i in range(0, len(one), 6):
        ids_P = torch.from_numpy(one.tokens_of(i)[0]).long()
        entries, _ = reference.run(ids_P)
        noise = reference.noise(ids_P, entries)
        ours, theirs = one.read(i, LAYERS, final=True), two.read(i, LAYERS, final=True)
        truth_RD = entries[-1][ours.final_rows]
        for layer, state_TD, other_TD in zip(LAYERS[:2], ours.aux, theirs.aux, strict=False):
            assert relative_error(other_TD, state_TD) <= NOISE_FACTOR * noise[layer + 1]
        assert relative_error(theirs.final, ours.final) <= NOISE_FACTOR * noise[-1]
        differences += relative_error(theirs.final, truth_RD)
        by_one, by_other = (relative_error(sample.aux[2], entries[4]) for sample in (ours, theirs))
        assert by_other <= 1.01 * by_one + NOISE_FACTOR * noise[4]
    return differences


def test_two_ranks_make_the_cache_of_one_within_the_probes_noise(alone, by_two):
    out, printed, errors = by_two
    assert Catalog(out).hash == Catalog(alone).hash
    same = (
        "plan/*",
        "target/*.json",
        "target/*.safetensors",
        "index.*",
        "shards/*/samples.arrow",
        "shards/*/aux.-1/c/*",
    )
    assert files_of(out, *same) == files_of(alone, *same)
    assert check_equal_within_noise(alone, out) > 0  # else nothing was shared
    assert not verify(out).damaged
    probes = [read_canonical(path)["facts"]["probe"]["error"] for path in out.glob("shards/*/final.json")]
    assert len(probes) == Catalog(out).shards and max(probes) < 1e-4
    assert printed.count("captured now") == 1 and errors.count("to write in") == 1  # one rank speaks


def test_two_groups_of_two_ranks_capture_every_shard_once(alone, torchrun, by_two, tmp_path):
    code, printed, errors = torchrun(tmp_path / "cache", 4, "--tensor-parallel=2")
    assert code == 0, errors
    shards = Catalog(tmp_path / "cache").shards
    assert f"{len(range(0, shards, 2))} captured now by worker 0/2" in printed
    assert f"{len(range(1, shards, 2))} captured now by worker 1/2" in printed
    states = ("shards/**/*", "target/**/*", "cache.json", "plan/*")
    assert files_of(tmp_path / "cache", *states) == files_of(by_two[0], *states)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_its_group_in_one_line_and_one_device_goes_on(alone, corpus, torchrun, tmp_path, rank):
    script, out = tmp_path / "killed.py", tmp_path / "cache"
    script.write_text(KILLED.format(rank=rank))
    code, _, errors = torchrun(out, 2, "--tensor-parallel=2", script=script)
    assert code == 1 and len(says(errors)) == 1, errors
    gone = ("error: worker 0/1: one of its 2 ranks has gone", "stopped by SIGTERM; what is finished is kept")
    assert says(errors)[0].startswith(gone)  # the second where torchrun sees it first
    assert f"-{signal.SIGKILL}" in errors

    done = {path.name for path in out.glob("shards/*/") if (path / "final.json").exists()}
    assert 0 < len(done) < Catalog(out).shards
    kept = files_of(out, *(f"shards/{name}/**/*" for name in done))
    captured(corpus, out)
    assert kept.items() <= files_of(out, "shards/**/*").items()  # by two ranks, and the rest by one
    assert not verify(out).damaged and Catalog(out).hash == Catalog(alone).hash
    check_equal_within_noise(alone, out)


def test_a_rank_without_memory_says_so_for_its_group(torchrun, tmp_path):
    script, out = tmp_path / "full.py", tmp_path / "cache"
    script.write_text(WITHOUT_MEMORY)
    code, _, errors = torchrun(out, 2, "--tensor-parallel=2", script=script)
    assert code == 1 and len(says(errors)) == 1, errors
    assert "error: rank 1 of worker 0/1's 2 has no memory for a micro-batch (CUDA out of memory)" in says(errors)[0]
    assert any(out.glob("shards/*/final.json")) and not list(out.glob("tmp-*")) and not verify(out).damaged


def test_a_rank_that_cannot_load_ends_the_others_that_wait_for_it(torchrun, tmp_path):
    script, out = tmp_path / "full.py", tmp_path / "cache"
    script.write_text(NOT_LOADED)
    code, _, errors = torchrun(out, 2, "--tensor-parallel=2", script=script)
    assert code == 1 and "error: the first rank has no memory to load its part" in says(errors), errors
    assert not (out / "shards").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_rank_holds_its_part_and_at_most_a_file_more_while_it_loads(torchrun, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    random_model(config(**sizes)).save_pretrained(tmp_path / "large", max_shard_size="20MB")
    files = [path.stat().st_size / 2**20 for path in (tmp_path / "large").glob("*.safetensors")]
    script = tmp_path / "growth.py"
    script.write_text(GROWTH.format(small=TARGET, large=tmp_path / "large"))
    code, printed, errors = torchrun(tmp_path, 2, script=script)
    assert code == 0, errors
    grown = [line.split()[1:] for line in printed.splitlines() if line.startswith("grew")]
    assert len(grown) == 2 and len(files) > 5
    for part, growth in grown:
        assert float(part) < 0.6 * sum(files)
        assert float(growth) < float(part) + max(files) + 16 < 0.8 * sum(files)


def test_the_probe_refuses_a_wrong_layer_of_a_shared_target(torchrun, tmp_path):
    script, out = tmp_path / "late.py", tmp_path / "cache"
    script.write_text(ONE_LAYER_LATE)
    code, _, errors = torchrun(out, 2, "--tensor-parallel=2", script=script)
    assert code == 1 and len(says(errors)) == 1, errors
    assert "is stored as layer -1 differs" in says(errors)[0] and "layer 0 fits better" in says(errors)[0]
    assert not list(out.glob("shards/*/*.json")) and not list(out.glob("tmp-*"))


def test_a_finished_cache_ends_all_ranks(by_two, torchrun):
    code, printed, errors = torchrun(by_two[0], 2, "--tensor-parallel=2")
    assert code == 0 and "nothing to do" in printed and not says(errors)


def test_layers_in_host_memory_and_on_disk_give_the_very_bytes(alone, corpus, tmp_path):
    spread = {"model.embed_tokens": "disk", "lm_head": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    spread |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(8)}
    out = captured(corpus, tmp_path / "cache", device=None, device_map=json.dumps(spread))
    states = ("shards/**/*", "target/**/*", "cache.json", "plan/*")
    assert files_of(out, *states) == files_of(alone, *states)

    (out / "shards/000002/aux.3.json").unlink()
    assert not verify_and_repair(out, True, False, str(TARGET), None, json.dumps(spread)).damaged
    assert files_of(out, *states) == files_of(alone, *states)


def test_a_device_map_by_name_needs_nothing_else(alone, corpus, tmp_path):
    out = captured(corpus, tmp_path / "cache", device=None, device_map="auto")
    assert files_of(out, "shards/**/*") == files_of(alone, "shards/**/*")


@pytest.mark.parametrize("spread", [{"model.layers.0": "disk"}, {"": 99}])
def test_a_device_map_without_a_device_for_every_module_is_refused(spread):
    with pytest.raises(UsageError, match=r"cannot be loaded .*; name a device that is there for every module"):
        load_target(str(TARGET), device_map=spread)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"device_map": "auto", "tensor_parallel": 2}, "--device-map and --tensor-parallel both say where"),
        ({"device_map": "auto", "device": "cpu"}, "--device-map and --device both say where"),
        ({"tensor_parallel": 2, "device": "cuda:1"}, "--device cuda:1: each of 2 ranks takes a GPU"),
    ],
)
def test_two_places_for_one_target_are_refused(options, found):
    with pytest.raises(UsageError, match=found):
        CaptureOptions(**options)


@pytest.mark.parametrize("text", ["aut", "[1]", "{", '{"": null}', '{"lm_head": []}'])
def test_what_is_no_device_map_is_refused(text):
    with pytest.raises(UsageError, match=r"wanted auto, balanced, .* or a JSON object of devices"):
        parse_device_map(text)
    assert parse_device_map('{"": 0, "lm_head": "cpu"}') == {"": 0, "lm_head": "cpu"}


def test_a_device_map_is_not_for_several_processes():
    options = CaptureOptions(device_map="auto")
    with pytest.raises(UsageError, match=r"torchrun started 4 here; .* --tensor-parallel 4"):
        options.checked_device_map({"LOCAL_WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("device", "gpus", "found"),
    [
        ("cpu", 2, r"--tensor-parallel on cpu: .* the cuda devices that torch sees; leave out --device"),
        ("cuda", 1, r"torchrun started 2 ranks here, on 1 GPUs; .* a smaller --nproc-per-node"),
    ],
)
def test_ranks_without_a_gpu_each_are_refused(monkeypatch, device, gpus, found):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=found):
        Group(Worker(ranks=2), str(TARGET), None, device).check()


@pytest.mark.parametrize(
    ("shape", "ranks", "found"),
    [
        (None, 3, r"4 and 2 attention and key-value heads are not shared evenly by 3 ranks; pass 2, or --device-map"),
        (None, 4, r"not shared evenly by 4 ranks; pass 2, or"),
        (
            GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=264),
            2,
            r"no plan to share GPT2LMHeadModel .*--device-map",
        ),
    ],
)
def test_a_target_that_ranks_cannot_share_is_refused_before_any_work(tmp_path, shape, ranks, found):
    folder = save_target(tmp_path / "target", shape)
    with pytest.raises(UsageError, match=found):
        check_ranks(folder, loader_class(load_config(folder), ""), load_config(folder), ranks)
    check_ranks(TARGET, loader_class(load_config(TARGET), ""), load_config(TARGET), 2)
