"""serve-check as a user meets it, with our own decoder as the engine in its process: what it says of a sound engine, of
one with a fault, and of one that ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_engine
from greedy import make_greedy_cache, make_learned_draft, save_stopping_target
from rich.console import Console
from tiny import write_jsonl

from pipeline.cache import HiddenCache
from pipeline.cli import main
from pipeline.engine_process import check_python
from pipeline.errors import ProofError, RoomError, UsageError
from pipeline.evaluation.prompts import cached_prompts
from pipeline.json_files import parse_checksummed
from pipeline.published.card import Origin
from pipeline.published.check import write_probe
from pipeline.published.export import KEPT_BLOCKS, _write, make_probe, make_rows, published_config, shorter
from stages.evaluate.run import run as evaluate
from stages.serve_check import engine_answer as answer
from stages.serve_check import run as serve_check
from stages.serve_check.run import Options, ServeReport, check_agrees, run
from stages.serve_check.table import serve_table

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_stopping_target(tmp_path_factory.mktemp("target") / "stopping")


@pytest.fixture(scope="module")
def cache(target, tmp_path_factory):
    return HiddenCache.open(make_greedy_cache(target, tmp_path_factory.mktemp("cache") / "greedy"))


@pytest.fixture(scope="module")
def drafts(cache, tmp_path_factory):
    """Exports of a DFlash and a Domino draft that have learned the cache's replies."""
    folder = tmp_path_factory.mktemp("drafts")
    for method in ("dflash", "domino"):
        draft, out = make_learned_draft(cache.path, method), folder / method
        _write(out, published_config(draft.config, "sglang", Origin("float32", "stopping")), draft, torch.float32, {})
        rows, _, source = make_rows(draft.config, cache)
        write_probe(out, draft, *make_probe(draft.config, shorter(rows), KEPT_BLOCKS), source)
    return folder


@pytest.fixture(scope="module")
def data(cache, tmp_path_factory):
    """The prompts of the cache's replies."""
    prompts = cached_prompts(cache, np.arange(len(cache)), len(cache))
    rows = [{"input_ids": prompt.ids, "domain": prompt.domain} for prompt in prompts]
    return write_jsonl(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def evaluated():
    """`evaluate`, which the engine's faults do not concern: once for the same settings."""
    known = {}

    def evaluating(folder, *, plain, max_new, count, **named):
        if (max_new, count) not in known:
            report = evaluate(folder, plain=plain, max_new=max_new, count=count, **named)
            known[max_new, count] = report, plain.read_bytes()
        report, replies = known[max_new, count]
        plain.write_bytes(replies)
        return report

    return evaluating


@pytest.fixture
def served(drafts, target, data, tmp_path, evaluated):
    """Return a function that serves the DFlash draft with a fault, in a process, and returns the report."""

    def serving(fault: str = "", **options) -> ServeReport:
        given = {"model": str(target), "data": data, "max_new": 12, "python": Path(sys.executable), "device": "cpu"}
        return run(drafts / "dflash", evaluated, Options(**given | options), engine_script(tmp_path, fault))

    return serving


@pytest.fixture
def served_here(served, monkeypatch):
    """The same, the engine in this process: for what it says, where how it ends is not in question."""

    def serving(fault: str = "", **options) -> ServeReport:
        def run_here(python, script, request, folder, timeout, title):
            folder.mkdir(parents=True)
            (folder / "request.json").write_text(json.dumps(request | {"out": str(folder)}))
            toy_engine.main(folder / "request.json", fault)
            return answer._read_answer(folder)

        monkeypatch.setattr(serve_check, "run_engine", run_here)
        return served(fault, **options)

    return serving


def engine_script(folder: Path, fault: str) -> Path:
    script = folder / "engine.py"
    lines = ("import sys", f"sys.path[:0] = {[str(HERE), str(ROOT)]}", "import toy_engine")
    script.write_text("\n".join((*lines, f"toy_engine.main(sys.argv[1], {fault!r})")))
    return script


def shown(report: ServeReport) -> str:
    console = Console(width=200)
    with console.capture() as printed:
        console.print(serve_table(report))
    return " ".join(printed.get().split())


def test_an_engine_that_serves_what_was_evaluated_agrees(served, tmp_path):
    report = served(out=tmp_path / "report.json")
    (only,) = report.served
    assert only.agrees and only.title == "as it is" and only.engine == "toy 1.0"
    found = only.comparison
    assert (found.prompts, found.identical, found.equal, found.differences) == (12, 12, 12, [])
    assert found.calls == found.calls_expected > 12
    assert found.engine_accept_len == found.engine_accept_len_expected == report.evaluated.engine_accept_len
    assert only.states.prompts <= 8 < only.states.blocks == only.states.equal_proposals
    assert only.states.states < 1e-4 and only.states.features < 1e-4
    check_agrees(report)
    record, checksum = parse_checksummed((tmp_path / "report.json").read_bytes())
    assert checksum and record == report.model_dump()
    assert "in every call" in shown(report) and "12 of 12 prompts" in shown(report)


def test_a_wrong_kernel_is_told_from_a_wrong_export_by_the_states(served_here):
    report = served_here("kernel")
    (only,) = report.served
    assert only.comparison.lossless and not only.agrees  # the replies are the target's all the same
    assert only.states.features_equal and not only.states.draft_equal
    assert "the export's files are proven, so a kernel of the engine is wrong" in only.verdict
    with pytest.raises(ProofError, match="a kernel of the engine is wrong"):
        check_agrees(report)


def test_a_wrong_kernel_is_seen_where_no_call_gains_otherwise(served_here):
    report = served_here("kernel", max_new=2, count=1)
    (only,) = report.served
    if only.comparison.gains_equal:  # one call, of one token
        assert "no call gains otherwise, but the engine computes the draft otherwise" in only.verdict
    assert not only.agrees


def test_an_export_that_is_not_what_was_trained_is_told_without_an_engine(
    drafts, cache, target, data, tmp_path, evaluated, served_here
):
    trained = tmp_path / "trained.json"
    evaluate(drafts / "dflash", model=str(target), prompts=data, max_new=12, device="cpu", out=trained)
    as_trained = served_here(report=trained).as_trained
    assert as_trained.prompts == as_trained.equal > 6
    assert as_trained.accept_len == as_trained.accept_len_run

    # Sound files, nothing to compare them with, and layers that count from 1 where they should from 0.
    wrong = Path(shutil.copytree(drafts / "dflash", tmp_path / "wrong"))
    (wrong / "probe.tensors").unlink()
    flat = json.loads((wrong / "config.json").read_text())
    flat["dflash_config"]["target_layer_ids"] = [layer - 1 for layer in flat["dflash_config"]["target_layer_ids"]]
    (wrong / "config.json").write_text(json.dumps(flat))
    options = {"python": Path(sys.executable), "model": str(target), "data": data, "device": "cpu", "report": trained}
    script = engine_script(tmp_path, "crash")  # it is not started
    with pytest.raises(ProofError, match=r"the export is wrong, whatever serves it: over \d+ prompts its accept"):
        run(wrong, evaluate, Options(max_new=12, **options), script)
    with pytest.raises(UsageError, match="is of 12 tokens a reply, this check of 9; pass --max-new 12"):
        run(drafts / "dflash", evaluate, Options(max_new=9, **options), script)


def test_an_engine_that_reads_other_layers_is_told_by_them(served_here):
    (only,) = served_here("layers").served
    assert not only.states.features_equal
    assert "other states of the target" in only.verdict and not only.agrees


def test_an_engine_that_loses_proposals_with_the_right_states_is_told(served_here):
    (only,) = served_here("other proposals").served
    assert only.states.draft_equal and not only.agrees
    assert "reads proposals off them, or verifies them, otherwise" in only.verdict
    first = only.comparison.differences[0]
    assert first.expected != first.found


def test_what_cannot_be_told_without_states_is_said(served_here):
    (only,) = served_here("kernel, no states").served
    assert not only.comparison.gains_equal
    assert "whether its kernels or the export cause it cannot be told: it shows none" in only.verdict


def test_an_engine_that_says_something_else_with_the_draft_is_not_lossless(served_here):
    report = served_here("other replies")
    (only,) = report.served
    assert only.comparison.identical < 12 and only.plain_identical < 12
    assert "not lossless" in only.verdict and "are the engine's own plain ones" in shown(report)


def test_an_engine_that_shows_totals_is_compared_in_its_own_counting(served_here):
    report = served_here("totals")
    (only,) = report.served
    found = only.comparison
    assert found.equal is None and found.calls is None
    assert found.engine_accept_len == found.engine_accept_len_expected and only.agrees
    assert "not shown" in shown(report)


def test_the_engine_is_reported_as_it_is_and_mended(served):
    report = served("kernel", mend=True)
    as_it_is, mended = report.served
    assert not as_it_is.agrees and mended.agrees
    assert mended.mends == ["kernel: the norm of every layer"] and as_it_is.mends == []
    check_agrees(report)
    assert "mended kernel: the norm of every layer" in shown(report)


ENDS = {
    "crash": (ProofError, r"the engine crashed while starting .*RuntimeError: shape '\[3, 4\]' is invalid"),
    "port": (UsageError, r"a port in use while starting.*set VLLM_PORT"),
    "memory": (RoomError, r"ran out of memory while starting \(killed\); free some"),
    "absent": (UsageError, r"cannot be imported \(No module named 'engine'\); install it anew"),
    "nothing": (ProofError, r"the engine left no result"),
}


@pytest.mark.parametrize("fault", ENDS)
def test_an_engine_that_ends_says_why_and_where_its_log_is(fault, served, tmp_path):
    kind, words = ENDS[fault]
    with pytest.raises(kind, match=words) as error:
        served(fault, count=1, logs=tmp_path / "logs")
    log = tmp_path / "logs" / "as-it-is" / "engine.log"
    assert log.is_file() and (fault == "absent" or str(log) in str(error.value))
    assert "\n" not in str(error.value)


def test_a_log_that_an_error_names_is_kept_and_others_are_not(served, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ProofError, match="the whole log is") as error:
        served("crash", count=1)
    log = Path(str(error.value).rpartition("the whole log is ")[2])
    assert "RuntimeError" in log.read_text() and tmp_path in log.parents
    served(count=1)
    assert len([*tmp_path.glob("serve-check-*")]) == 1


def test_an_engine_that_makes_no_progress_is_ended_with_all_it_started(served, tmp_path):
    with pytest.raises(ProofError, match="no progress for 8 s while starting"):
        served("silent", count=1, timeout=8.0, logs=tmp_path / "logs")
    check_gone((tmp_path / "logs" / "as-it-is" / "pids").read_text())


def test_ctrl_c_leaves_no_process(drafts, target, data, tmp_path):
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from stages.evaluate.run import run as evaluate\n"
        "from stages.serve_check.run import Options, run\n"
        f"options = Options(python=Path(sys.executable), model={str(target)!r}, data=Path({str(data)!r}), count=1,\n"
        f"    max_new=4, device='cpu', logs=Path({str(tmp_path / 'logs')!r}))\n"
        f"run(Path({str(drafts / 'dflash')!r}), evaluate, options, Path({str(engine_script(tmp_path, 'silent'))!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    pids, until = tmp_path / "logs" / "as-it-is" / "pids", time.monotonic() + 120
    while not (pids.is_file() and pids.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said.rstrip().endswith("KeyboardInterrupt")
    check_gone(pids.read_text())


def check_gone(pids: str) -> None:
    for pid in map(int, pids.split()):
        for _ in range(50):
            if not running(pid):
                break
            time.sleep(0.1)
        assert not running(pid), f"process {pid} is left"


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.is_file() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_python_without_the_engine_and_what_is_none_are_refused(tmp_path):
    for python, words in (
        (Path(sys.executable), r"has no module vllm: an engine lives in an environment of its own; make one with"),
        (tmp_path / "none", r"cannot be run \(No such file or directory\)"),
        (Path("/bin/false"), r"is no Python that runs"),
    ):
        with pytest.raises(UsageError, match=words):
            check_python(python, "vllm")


def test_what_is_no_export_and_a_draft_without_an_engine_are_refused(drafts, target, data, tmp_path, capsys):
    cases = {
        str(tmp_path): "is no export: it has no config.json",
        str(drafts / "domino"): "is a domino draft, and vllm has a method for DFlash and DSpark only",
        str(drafts / "dflash"): "has no module vllm",
    }
    for folder, words in cases.items():
        assert words in ends(capsys, folder, "--model", target, "--data", data, "--python", sys.executable)
    assert "no such folder" in ends(capsys, drafts / "dflash", "--model", "/nowhere/at/all")
    assert "does not name the draft's target; pass --model" in ends(capsys, drafts / "dflash", "--data", data)


def ends(capsys, *arguments) -> str:
    """Run serve-check, which ends with 2, and return its one line."""
    with pytest.raises(SystemExit) as stop:
        main(["serve-check", *map(str, arguments)])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(said) == 1
    return said[0]


def test_a_damaged_export_is_no_fault_of_an_engine(drafts, target, data, tmp_path):
    folder = Path(shutil.copytree(drafts / "dflash", tmp_path / "copy"))
    flat = json.loads((folder / "config.json").read_text())
    flat["rope_theta"] = flat["rope_parameters"]["rope_theta"] = 123.0
    (folder / "config.json").write_text(json.dumps(flat))
    with pytest.raises(ProofError, match="is not what was exported"):
        run(folder, evaluate, Options(model=str(target), data=data))
