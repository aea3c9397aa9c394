"""Where a step's time goes: phases that nest, on the host and in a GPU's stream."""

import time

import fake_streams
import pytest
import torch

from pipeline.drafts import step_clock
from pipeline.drafts.step_clock import PHASES, StepClock, StoppedClock


@pytest.fixture(params=["cpu", "cuda"])
def clock(request, monkeypatch):
    """A clock of either device; the GPU's events are of a fake one."""
    if request.param == "cuda":
        monkeypatch.setattr(torch.cuda, "Event", fake_streams.Event)
        monkeypatch.setattr(torch.cuda, "current_stream", fake_streams.current_stream)
    return StepClock(torch.device(request.param))


def take_step(clock: StoppedClock) -> None:
    with clock.phase("forward"):
        with clock.phase("head"):
            time.sleep(0.02)
        time.sleep(0.001)
    time.sleep(0.05)  # of no phase
    with clock.phase("backward"):
        time.sleep(0.005)


def test_an_inner_phase_is_not_counted_in_the_outer_one_nor_what_lies_between(clock):
    began = time.perf_counter()
    for _ in range(2):
        take_step(clock)
    whole, seconds = time.perf_counter() - began, clock.read()
    assert list(seconds) == list(PHASES)
    assert seconds["head"] >= 0.04 and seconds["forward"] >= 0.002 and seconds["backward"] >= 0.01
    assert seconds["optimizer"] == 0
    assert sum(seconds.values()) <= whole - 0.1, "what is of no phase was counted"


def test_reading_twice_counts_nothing_twice_and_goes_on(clock):
    take_step(clock)
    first = clock.read()
    assert clock.read() == first
    take_step(clock)
    assert clock.read()["head"] >= first["head"] + 0.02


def test_a_phase_that_fails_ends(clock):
    with pytest.raises(MemoryError), clock.phase("forward"), clock.phase("head"):
        raise MemoryError
    before = clock.read()
    time.sleep(0.002)
    with clock.phase("backward"):
        pass
    after = clock.read()
    assert (after["forward"], after["head"]) == (before["forward"], before["head"])


def test_a_gpu_that_nobody_asks_keeps_few_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", fake_streams.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", fake_streams.current_stream)
    monkeypatch.setattr(step_clock, "MOST_MARKS", 10)
    clock = StepClock(torch.device("cuda"))
    for _ in range(20):
        with clock.phase("forward"):
            time.sleep(0.001)
    assert len(clock._marks) <= 10
    assert clock.read()["forward"] >= 0.02


def test_the_device_is_waited_for_at_no_phase_but_when_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", fake_streams.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", fake_streams.current_stream)
    clock = StepClock(torch.device("cuda"))
    fake_streams.journal.clear()
    take_step(clock)
    assert [entry for entry in fake_streams.journal if "waits for" in entry] == []
    clock.read()
    assert len([entry for entry in fake_streams.journal if "waits for" in entry]) == 1
