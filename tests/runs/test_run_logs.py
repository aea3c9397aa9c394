"""A run's logs, as others than the training read them."""

import json

import pytest

from pipeline.runs.run_logs import LogTail, cumulative_seconds


def timing(step: int, seconds: float, since: int, old: bool = False) -> dict:
    line = {"step": step, "since": since, "seconds": seconds, "step_seconds": round(seconds / (step - since), 5)}
    return {key: value for key, value in line.items() if not (old and key == "since")}


@pytest.mark.parametrize("old", [False, True])
def test_seconds_of_equal_starts_add_up(old):
    lines = [timing(10, 10.0, 0, old), timing(20, 10.2, 10, old), timing(30, 10.3, 20, old), timing(40, 10.1, 30, old)]
    assert [step for step, _ in cumulative_seconds(lines)] == [10, 20, 30, 40]
    assert [seconds for _, seconds in cumulative_seconds(lines)] == pytest.approx([10.0, 20.2, 30.5, 40.6])


@pytest.mark.parametrize("old", [False, True])
def test_the_lines_of_one_start_are_no_sum_and_a_later_start_goes_on(old):
    lines = [timing(1, 0.02, 0, old), timing(10, 0.0201, 0, old), timing(30, 0.0605, 0, old), timing(40, 9.0, 30, old)]
    assert [seconds for _, seconds in cumulative_seconds(lines)] == pytest.approx([0.02, 0.0201, 0.0605, 9.0605])


@pytest.mark.parametrize("old", [False, True])
def test_steps_between_the_last_line_and_the_checkpoint_count_like_those_before(old):
    lines = [timing(10, 20.0, 0, old), timing(20, 15.0, 15, old), timing(30, 45.0, 15, old)]
    assert cumulative_seconds(lines) == [(10, 20.0), (20, 20.0 + 5 * 2.0 + 15.0), (30, 20.0 + 5 * 2.0 + 45.0)]
    assert cumulative_seconds([{"step": 8, "removed": "0a"}, *lines[1:]])[0] == (20, 15 * 3.0 + 15.0)


def test_a_log_that_says_nothing_has_no_seconds():
    assert cumulative_seconds([]) == cumulative_seconds([{"step": 8, "removed": "0a"}]) == []
    assert cumulative_seconds([json.loads('{"step": 2, "seconds": 3.0}'), {"step": 3, "seconds": 1.0}])[1][1] == 4.0


def test_a_growing_log_is_read_anew_where_it_was_replaced(tmp_path):
    path, log = tmp_path / "log", LogTail(tmp_path / "log")
    log.refresh()
    assert (log.last, log.step, log.written) == ({}, 0, 0.0)
    path.write_bytes(b'{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    log.refresh()
    assert log.last == {"step": 1, "loss": 9.0}, "a line that is not whole waits"
    with open(path, "ab") as file:
        file.write(b'ss": 8.0}\nno json\n[]\n{"step": 4, "eval": {"accept_len": 2.0, "replies": [[1, 2, 3, 4]]}}\n')
    log.refresh()
    assert log.last == {"step": 2, "loss": 8.0} and log.step == 4
    assert log.evaluations == [{"accept_len": 2.0, "step": 4}]
    other = tmp_path / "other"
    other.write_bytes(b'{"step": 1, "loss": 7.0}\n' + b'{"step": 2, "loss": 7.5}\n' * 9)  # longer than the one before
    other.rename(path)
    log.refresh()
    assert log.last == {"step": 2, "loss": 7.5} and log.evaluations == []
    path.unlink()
    path.mkdir()
    log.refresh()
