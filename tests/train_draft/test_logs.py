"""What a running training says of itself: how fast it is, how long it waits for data, and what memory it takes."""

import io
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from pipeline.drafts.step_clock import PHASES
from pipeline.runs import checkpoint
from pipeline.runs.run_logs import read_log
from stages.train_draft import logs
from stages.train_draft import run as run_module
from stages.train_draft.logs import Display, Throughput, peak_memory
from stages.train_draft.memory import Fit
from stages.train_draft.run import run

SETS = ("draft.method=dflash", "draft.block_size=4", "train.batch=4", "train.anchors=6", "train.log_every=1")
TIMING = {"step_seconds": 0.25, "tokens_s": 1234.4, "data_wait": 0.016, "peak_bytes": 3 << 30, "eta": 3725.0}
SPEED = "1,234 tokens/s  4.0 steps/s  data wait 2%  peak memory 3.0 GiB  ETA 1:02:05"
METRICS = {"loss": 1.5, "accept_len_tf": 2.0, "lr": 1e-3}


def test_every_progress_line_and_every_line_of_timing_has_speed_data_wait_and_peak_memory(
    tiny_cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(logs, "LINE_INTERVAL", 0.0)
    done = run(tiny_cache, None, (*SETS, "train.steps=3"), tmp_path / "run", "cpu")

    printed = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d/3 ", line)]
    speed = re.compile(r"[\d,]+ tokens/s  [\d.]+ (steps/s|s/step)  data wait \d+%  peak memory [\d.]+ [GM]iB  ETA ")
    assert len(printed) == 3 and all(speed.search(line) for line in printed), printed
    timed = read_log(done.run / "timing.jsonl")
    assert [line["step"] for line in timed] == [1, 2, 3]
    for line in timed:
        assert line["tokens_s"] > 0 and line["step_seconds"] > 0 and 0 <= line["data_wait"] <= 1
        assert line["peak_bytes"] > 50 << 20, "torch alone takes that much"
        check_shares(line)


def check_shares(line: dict) -> None:
    """Where the time went: every phase was met, and all of it is accounted for."""
    shares = line["time"]
    assert list(shares) == ["data", *PHASES, "other"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
    assert all(shares[name] > 0 for name in PHASES) and min(shares.values()) >= 0, shares
    assert shares["data"] <= line["data_wait"] + 1e-4


def test_a_step_in_parts_says_where_its_time_goes(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "fit_device", lambda *_: Fit(2))
    done = run(tiny_cache, None, (*SETS, "train.steps=2"), tmp_path / "run", "cpu")
    assert "blocks_per_pass" in checkpoint.latest(done.run).state.as_dict()
    for line in read_log(done.run / "timing.jsonl"):
        check_shares(line)


def test_a_share_is_never_lost_between_the_host_and_a_gpu_that_is_still_computing():
    batch = SimpleNamespace(rows=8, step=0)
    throughput = Throughput(0, 4, torch.device("cpu"))
    throughput.clock.read = lambda: dict.fromkeys(PHASES, 50.0)  # more than has passed: a tail that was left out
    assert throughput.count(batch, 10.0)["step_seconds"] < 1
    assert throughput.time_shares(10.0) == {"data": 0.0, **dict.fromkeys(PHASES, 0.25), "other": 0.0}


def test_the_seconds_of_a_run_that_takes_turns_are_its_own_and_its_time_to_go_is_that_of_all(monkeypatch):
    """Two runs: 3 s and 5 s a step, after 2 s of waiting for data that both would have done alone."""
    now = [100.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    first, second = (Throughput(0, 4, torch.device("cpu")) for _ in range(2))
    for each in (first, second):
        now[0] += 7.0  # what is prepared is nobody's step
        each.excluded = now[0] - each.began
        each.end_turn()
    for step in range(2):
        now[0] += 2.0
        for each, seconds in ((first, 3.0), (second, 5.0)):
            each.begin_turn(waited=2.0 * (step + 1))
            now[0] += seconds
            timing = each.count(SimpleNamespace(rows=50, step=step), 2.0 * (step + 1))
            each.end_turn()
            assert timing["seconds"] == (2.0 + seconds) * (step + 1)
            assert timing["tokens_s"] == round(50 / (2 + seconds), 1) and timing["data_wait"] == round(
                2 / (2 + seconds), 4
            )
    assert timing["eta"] == 2 * (2.0 + 3.0 + 5.0)


def test_the_bar_shows_the_speed_of_steps_that_log_nothing_too(monkeypatch):
    terminal = Console(width=200, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(logs, "VisibleConsole", lambda: terminal)
    with Display(5, 9) as display:
        text = display.bar.tasks[0].fields
        display.step(6, None, TIMING)
        assert text["text"] == SPEED
        display.step(7, METRICS, TIMING)
        display.step(8, None, TIMING | {"step_seconds": 2.0})
        assert (
            text["text"] == f"loss 1.500  accept_len_tf 2.00  lr 1.0e-03  {SPEED.replace('4.0 steps/s', '2.0 s/step')}"
        )


def test_a_narrow_terminal_cuts_nothing_off(monkeypatch):
    terminal = Console(width=60, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr(logs, "VisibleConsole", lambda: terminal)
    with Display(5, 9) as display:
        display.step(7, METRICS, TIMING)
    words = f"loss 1.500 {SPEED}".split()
    assert [word for word in words if word not in terminal.file.getvalue()] == []


def test_memory_that_was_taken_and_freed_counts_as_peak():
    before = peak_memory(torch.device("cpu"))
    taken = torch.ones(before // 4 + (64 << 20))
    del taken
    assert peak_memory(torch.device("cpu")) > before


def test_the_peak_of_a_gpu_is_its_tensors_and_each_run_counts_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * len(asked))
    device = torch.device("cuda:1")
    assert logs.Throughput(0, 9, device).device == device and asked == [device]
    assert peak_memory(device) == 7


@pytest.mark.parametrize("pace", [0.0, 1e-9])
def test_a_step_too_short_to_be_timed_is_no_error(pace):
    assert "steps/s" in logs.timing_text(TIMING | {"step_seconds": pace})
