"""vLLM as the engine of a capture, with our own decoder in its place: the same states, nothing wrong is ever kept, and
nothing is left of a process that ended, or whose capture did."""

import os
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import fake_vllm
import pytest
import torch
from kill_capture import contents
from tiny import conversations, write_jsonl

from pipeline import engine_process
from pipeline.cache import HiddenCache
from pipeline.cache.manifest import read_canonical
from pipeline.cache.verify import verify
from pipeline.cli import main
from pipeline.errors import ProofError, RoomError, UsageError
from stages.cache_hidden import states_folder, vllm_engine
from stages.cache_hidden.repair import verify_and_repair
from stages.cache_hidden.run import plan, run
from stages.cache_hidden.settings import CaptureOptions
from stages.cache_hidden.states_folder import LABEL
from stages.cache_hidden.vllm_engine import other_tokens, visible_device

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CHOSEN = {"layers": "-1,1,3", "max_length": 256, "batch_tokens": 512, "device": "cpu"}
BY_VLLM = {"engine": "vllm", "python": Path(sys.executable)}


@pytest.fixture
def states(tmp_path, monkeypatch):
    """The folder where states are on their way."""
    folder = tmp_path / "states"
    folder.mkdir()
    monkeypatch.setattr(states_folder, "SHARED_MEMORY", folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(engine_process, "MODULES", {"vllm": "json"})  # what this Python has
    return folder


@pytest.fixture
def capture(tiny_target, tiny_corpus, tmp_path, monkeypatch, states):
    """Return a function that captures by the fake engine, in this process, and returns the cache's folder."""

    def captured(name: str, fault: str = "", corpus=tiny_corpus, **options) -> Path:
        def start(*given):
            made.append(fake_vllm.InThisProcess(*given, fault=fault))
            return made[-1]

        monkeypatch.setattr(vllm_engine, "EngineProcess", start)
        run(str(tiny_target), str(corpus), tmp_path / name, options=CaptureOptions(**CHOSEN | BY_VLLM | options))
        return tmp_path / name

    made = captured.made = []
    return captured


def columns_of(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("shards/*/*.json"))


def assert_equal_states(found: Path, wanted: Path, bound: float) -> None:
    found, wanted = HiddenCache.open(found), HiddenCache.open(wanted)
    assert len(found) == len(wanted) > 20
    for index in range(len(wanted)):
        ours, theirs = (cache.read(index, final=True) for cache in (wanted, found))
        assert torch.equal(ours.ids, theirs.ids)
        for a, b in ((ours.aux, theirs.aux), (ours.final, theirs.final)):
            assert (a - b).norm() <= bound * a.norm()


def test_the_states_are_those_of_our_own_engine(tiny_target, tiny_corpus, tmp_path, capture, states):
    by_vllm = capture("vllm")
    run(str(tiny_target), str(tiny_corpus), tmp_path / "own", options=CaptureOptions(**CHOSEN))
    assert_equal_states(by_vllm, tmp_path / "own", 1e-5)
    assert not verify(by_vllm).damaged
    facts = read_canonical(by_vllm / "shards/000000/final.json")["facts"]
    assert (facts["engine"], facts["vllm"], facts["device"]) == ("vllm", "fake-vllm 1.0", "cpu")
    assert read_canonical(by_vllm / "cache.json")["capture"]["engine"] == "vllm"
    (engine,) = capture.made
    assert engine.ended and not [*states.iterdir()]
    assert engine.fake.request["layers"] == [0, 2, 4, 6]  # -1, 1 and 3, and the last


@pytest.fixture(scope="module")
def undisturbed():
    """Contents of the cache that an engine without a fault gives, made once."""
    return {}


@pytest.fixture(scope="module")
def many_chats(tmp_path_factory):
    """So many that a micro-batch has several samples, and int8 learns how far states vary."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "chats.jsonl", conversations(96))


def test_a_micro_batch_of_more_samples_than_a_step_takes_is_computed_in_several(capture, many_chats, monkeypatch):
    """In a lossy codec, too, whose calibration is the engine's own."""
    whole = capture("whole", corpus=many_chats, codec="aux.1=int8")
    monkeypatch.setattr(vllm_engine, "SEQUENCES", 2)
    parts = capture("parts", corpus=many_chats, codec="aux.1=int8")
    assert max(map(len, capture.made[1].fake.compositions)) == 2 < max(map(len, capture.made[0].fake.compositions))
    assert contents(parts) == contents(whole)  # the fake computes them one by one


def test_an_engine_that_has_no_embedding_is_not_asked_for_it(capture, undisturbed):
    if not undisturbed:
        undisturbed.update(contents(capture("sound")))
    without = capture("without", "no embedding", layers="1,3")
    assert capture.made[-1].fake.request["layers"] == [2, 4, 6]
    found = contents(without)
    values = [name for name in found if name.startswith("shards/") and "/c/" in name]
    assert len(values) > 20 and all(found[name] == undisturbed[name] for name in values)


LOST = {
    "lost": "cannot be read",
    "null": "no file came of a sample",
    "late": "cannot be read",
    "torn": "cannot be read",
    "shortened": r"wanted torch.float32 \[",
    "shortened with its ids": r"wanted torch.float32 \[",
    "other ids": "other tokens",
    "stale": "1 of .* rows of a sample are not of their tokens",
    "half precision": "torch.float16",
}


@pytest.mark.parametrize("fault", LOST)
def test_what_vllm_loses_is_asked_for_again_and_the_cache_is_the_same(capture, undisturbed, fault, states):
    if not undisturbed:
        undisturbed.update(contents(capture("sound")))
    assert contents(capture("disturbed", fault)) == undisturbed
    first, again = capture.made[-1].fake.compositions[:2]
    assert first == again  # with the same samples beside it
    assert not [*states.iterdir()]


@pytest.mark.parametrize("fault", ["lost", "shortened with its ids", "other ids", "stale"])
def test_what_vllm_always_gets_wrong_is_never_kept(capture, fault, tmp_path, states):
    with pytest.raises(ProofError, match=f"wrong states 3 times.*{LOST[fault]}.*whole log is .*cache-hidden-vllm"):
        capture("cache", f"always {fault}")
    assert columns_of(tmp_path / "cache") == []
    assert not [*states.iterdir()] and capture.made[0].ended


@pytest.mark.parametrize(
    ("fault", "found"),
    [("one layer late", "stored as layer 1 .*layer 2 fits better"), ("normed", "the last norm is applied twice")],
)
def test_an_engine_that_counts_or_norms_otherwise_is_refused_by_the_probe(capture, fault, found, tmp_path):
    with pytest.raises(ProofError, match=found):
        capture("cache", fault)
    assert columns_of(tmp_path / "cache") == []


def test_another_engine_is_another_cache(tiny_target, tiny_corpus, tmp_path, capture):
    capture("cache")
    with pytest.raises(UsageError, match=r"made with capture.engine = 'vllm', this command asks for 'transformers'"):
        capture("cache", engine="transformers", python=None)
    (tmp_path / "cache/shards/000000/final.json").unlink()
    before = len(capture.made)
    capture("cache", engine=None)  # as in the cache
    assert len(capture.made) == before + 1 and not verify(tmp_path / "cache").damaged


def test_what_the_engine_is_told_is_part_of_the_cache_where_states_depend_on_it(capture, capsys):
    told = "tensor_parallel_size=2\nquantization=fp8"
    folder = capture("cache", engine_options=told)
    assert capture.made[0].fake.request["options"] == {"tensor_parallel_size": 2, "quantization": "fp8"}
    assert read_canonical(folder / "cache.json")["capture"]["engine_options"] == {"quantization": "fp8"}
    facts = read_canonical(folder / "shards/000000/final.json")["facts"]
    assert facts["options"] == "quantization=fp8, tensor_parallel_size=2"
    main(["inspect", str(folder)])
    assert "run by vllm, quantization=fp8" in " ".join(capsys.readouterr().out.split())
    (folder / "shards/000000/final.json").unlink()
    capture("cache", engine_options="tensor_parallel_size=1")
    assert capture.made[1].fake.request["options"] == {"tensor_parallel_size": 1, "quantization": "fp8"}
    with pytest.raises(UsageError, match=r"capture.engine_options.quantization = 'fp8'.*asks for 'awq'"):
        capture("cache", engine_options="quantization=awq")


def test_a_repair_asks_the_engine_that_made_the_cache(tiny_target, capture):
    folder = capture("cache")
    before = contents(folder)
    next(folder.glob("shards/000000/aux.1/**/c/0/0")).write_bytes(b"gone")
    verify_and_repair(folder, True, False, str(tiny_target), "cpu", python=Path(sys.executable))
    assert len(capture.made) == 2 and contents(folder) == before


def test_a_plan_names_the_engine_and_the_command_that_captures_with_it(
    tiny_target, tiny_corpus, tmp_path, states, capsys
):
    out = tmp_path / "cache"
    told = ["--engine", "vllm", "--python", sys.executable, "--engine-option", "tensor_parallel_size=2"]
    main(
        ["plan", "--model", str(tiny_target), "--corpus", str(tiny_corpus), "--out", str(out), "--device", "cpu", *told]
    )
    said = capsys.readouterr().out
    assert "run by vllm with tensor_parallel_size=2" in " ".join(said.split())
    assert "vllm holds the weights once more" in " ".join(said.split())
    command = shlex.split(said.rpartition("next: ")[2])
    assert command[:2] == ["pipeline", "cache-hidden"]
    pairs = [*pairwise(command)]
    for pair in zip(told[::2], told[1::2], strict=True):
        assert pair in pairs


def test_the_time_of_a_capture_is_estimated_by_the_engine(tiny_target, tiny_corpus, tmp_path, capture):
    capture("other")
    options = CaptureOptions(**CHOSEN | BY_VLLM)
    report = plan(str(tiny_target), str(tiny_corpus), tmp_path / "cache", options=options, probe=True)
    assert report["time"]["tokens_s"] > 0 and len(capture.made) == 2 and capture.made[1].ended


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (["--engine", "vllm", "--python", "/nowhere"], "--python /nowhere cannot be run"),
        (["--engine", "vllm", "--python", sys.executable], "has no module vllm: an engine lives in an environment"),
        (["--python", sys.executable], "--python is for an engine in a process of its own; pass --engine vllm"),
        (["--engine-option", "quantization=fp8"], "--engine-option is for an engine in a process of its own"),
        (["--engine", "vllm", "--engine-option", "quantization"], "wanted KEY=VALUE"),
        (["--engine", "vllm", "--engine-option", "dtype=half"], "dtype is not passed on; pass --dtype"),
        (["--engine", "vllm", "--engine-option", "tensor_paralel_size=2"], "did you mean tensor_parallel_size?"),
        (["--engine", "vllm", "--engine-option", "trust_remote_code=true"], "is not passed on; these are: tensor_par"),
        (["--engine", "vllm", "--tensor-parallel", "2"], "with --engine-option tensor_parallel_size=2"),
        (["--engine", "vllm", "--layers", "9"], "9"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    tiny_target, tiny_corpus, tmp_path, capsys, told, words
):
    command = ["cache-hidden", "--model", str(tiny_target), "--corpus", str(tiny_corpus), "--out", str(tmp_path / "c")]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--device", "cpu", *told])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(said) == 1 and words in said[0]


def test_rows_of_other_tokens_are_told_whatever_the_embedding_is_scaled_by():
    embedded_TD = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    rows_TD = 14.5 * embedded_TD + 0.01
    assert other_tokens(rows_TD.bfloat16(), embedded_TD) == []
    rows_TD[2], rows_TD[4] = rows_TD[3], float("nan")
    assert other_tokens(rows_TD, embedded_TD) == [2, 4]
    assert other_tokens(torch.zeros(2, 16), embedded_TD[:2]) == [0, 1]
    assert other_tokens(torch.zeros(1, 16), torch.zeros(1, 16)) == []  # of padding, whose embedding is zero
    assert other_tokens(rows_TD[4:5], rows_TD[4:5]) == []  # of a damaged embedding: its sample is refused, not lost


def test_what_a_killed_capture_left_is_removed_where_nothing_is_left_to_do_too(capture, states):
    capture("cache")
    (states / f"tmp-{LABEL}-{'0' * 32}").mkdir()
    capture("cache")
    assert len(capture.made) == 1 and not [*states.iterdir()]


def test_states_that_shared_memory_has_no_room_for_go_to_the_disk(states, tmp_path, monkeypatch):
    assert states_folder.states_folder(1) == states
    with monkeypatch.context() as small:
        small.setattr(states_folder, "free_bytes", lambda folder: 100)
        assert states_folder.states_folder(60) == tmp_path
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert states_folder.states_folder(1) == tmp_path
    with pytest.raises(RoomError, match="states on their way from the engine"):
        states_folder.states_folder(1 << 60)


def test_a_worker_shows_vllm_its_own_gpu_alone():
    second = torch.device("cuda:1")
    assert visible_device(second, {}, {}) == "1"
    assert visible_device(second, {}, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}) == "GPU-b"
    assert visible_device(second, {"tensor_parallel_size": 2}, {}) is None
    assert visible_device(torch.device("cpu"), {}, {}) is None


# With a process


def script(folder: Path, fault: str) -> Path:
    path = folder / "engine.py"
    lines = ("import sys", f"sys.path[:0] = {[str(HERE), str(ROOT)]}", "import fake_vllm")
    path.write_text("\n".join((*lines, f"if __name__ == '__main__': fake_vllm.main(sys.argv[1], {fault!r})")))
    return path


def test_an_engine_that_is_killed_is_told_from_one_that_fails_and_the_capture_goes_on(
    tiny_target, tiny_corpus, tmp_path, monkeypatch, states, capture
):
    monkeypatch.setattr(vllm_engine, "SCRIPT", script(tmp_path, "killed"))
    options = CaptureOptions(**CHOSEN | BY_VLLM | {"batch_tokens": 64})
    words = r"out of memory while computing \(killed\); free some, .*gpu_memory_utilization.*log is"
    with pytest.raises(RoomError, match=words):
        run(str(tiny_target), str(tiny_corpus), tmp_path / "cache", options=options)
    assert not [*states.iterdir()] and columns_of(tmp_path / "cache")
    assert contents(capture("cache", batch_tokens=64)) == contents(capture("whole", batch_tokens=64))


READY = "report(stage='ready', engine='e', torch='t', device='cpu', model_class='c', layers=[0, 2, 4, 6]); "
ASKED = READY + "import os; os.read(0, 1); report(stage='computing'); "
ENDS = {
    "fail('absent', 'No module named vllm._C')": (
        UsageError,
        r"be imported \(No module named vllm._C\); install it anew",
    ),
    "fail('usage', 'it cannot')": (UsageError, r"^it cannot$"),
    "import torchvision_": (
        ProofError,
        r"crashed while starting .* no module torchvision_; .* without --engine .*log is",
    ),
    "raise ValueError('no [such] class')": (
        ProofError,
        r"while starting .*: ValueError: no \[such\] class; what it does",
    ),
    ASKED + "raise RuntimeError('odd shape')": (
        ProofError,
        r"crashed while computing .*RuntimeError: odd shape.*log is",
    ),
    READY + "sys.exit(0)": (ProofError, r"the engine ended by itself; the whole log is"),
    ASKED + "import time; time.sleep(600)": (ProofError, r"no progress for 2 s while computing; run the same command"),
}


@pytest.mark.parametrize("line", ENDS)
def test_an_engine_that_ends_says_why(line, tiny_target, tiny_corpus, tmp_path, monkeypatch, states):
    kind, words = ENDS[line]
    engine = tmp_path / "engine.py"
    engine.write_text(
        f"import os, sys\nfrom engine_side import fail, report\nprint('pid', os.getpid(), flush=True)\n{line}"
    )
    monkeypatch.setattr(vllm_engine, "SCRIPT", engine)
    monkeypatch.setattr(vllm_engine, "ANSWER_S", 2.0)
    with pytest.raises(kind, match=words) as error:
        run(str(tiny_target), str(tiny_corpus), tmp_path / "cache", options=CaptureOptions(**CHOSEN | BY_VLLM))
    assert "\n" not in str(error.value) and columns_of(tmp_path / "cache") == []
    assert not [*states.iterdir()]
    log = tmp_path / f"cache-hidden-vllm-{os.getpid()}.log"
    assert log.is_file() == (kind is ProofError)
    assert kind is UsageError or not running(int(log.read_text().partition("pid ")[2].split()[0]))


DRIVER = """
import sys; sys.path[:0] = [{root!r}, {inside!r}]
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from pipeline import engine_process
from stages.cache_hidden import states_folder, vllm_engine
engine_process.MODULES = {{"vllm": "json"}}
states_folder.SHARED_MEMORY, vllm_engine.SCRIPT = Path({states!r}), Path({script!r})
from pipeline.cli import main
main({command!r})
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_capture_that_is_stopped_leaves_no_engine_and_goes_on(
    number, tiny_target, tiny_corpus, tmp_path, states, capture
):
    out = tmp_path / "cache"
    command = ["cache-hidden", "--model", tiny_target, "--corpus", tiny_corpus, "--out", out, "--layers=-1,1,3"]
    command += ["--max-length", 256, "--batch-tokens", 512, "--device", "cpu", "--engine", "vllm", "--python"]
    inside, command = str(engine_process.INSIDE), [*map(str, command), sys.executable]
    where = {"root": str(ROOT), "inside": inside, "states": str(states), "script": str(script(tmp_path, "silent"))}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(**where, command=command)],
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TMPDIR"},
    )
    until = time.monotonic() + 120
    while not columns_of(out) and time.monotonic() < until:
        time.sleep(0.05)
    pid = int(next(states.glob("*/engine.log")).read_text().partition("pid ")[2].split()[0])
    assert running(pid)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    for _ in range(100):
        if not running(pid):
            break
        time.sleep(0.1)
    assert not running(pid)
    if number != signal.SIGKILL:
        assert not [*states.iterdir()] and "the same command goes on" in said
    assert 0 < len(columns_of(out)) < 16 * 4
    assert contents(capture("cache")) == contents(capture("whole"))
    assert not [*states.glob(f"tmp-{LABEL}-*")]  # what the killed one left, too


def running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.is_file() and state.read_text().rpartition(")")[2].split()[0] != "Z"
