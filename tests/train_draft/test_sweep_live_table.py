"""The table of a sweep in progress: one line a run, from the logs that the runs write."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from stages.train_draft.sweep_live_table import LiveTable, Row, States


def lines_of(path: Path, *records: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def rows(tmp_path):
    """A run of each state, the second at step 20 of 300."""
    running = tmp_path / "running"
    figures = {"calls": 9, "accept_len": 1.75}
    lines_of(
        running / "metrics.jsonl", {"step": 10, "loss": 3.5}, {"step": 10, "eval": figures}, {"step": 20, "loss": 2.25}
    )
    lines_of(running / "timing.jsonl", {"step": 20, "eta": 3725.0})
    lines_of(tmp_path / "done" / "metrics.jsonl", {"step": 300, "loss": 1.5})
    lines_of(tmp_path / "done" / "done.json", {})
    setting = {"draft.layers": [1, 3, 5], "train.lr": 0.0012}
    found = [Row(str(n), setting, tmp_path / f"none{n}", 300) for n in range(3, 40)]
    first = [Row("1", setting, tmp_path / "done", 300), Row("2", setting, running, 300, "running")]
    return [*first, *found, Row("40", setting, tmp_path / "failed", 300, "failed")]


def drawn(rows: list[Row], height: int, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(LiveTable(lambda: rows).render(height))
    return console.file.getvalue().rstrip().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_each_run_has_one_line_with_its_newest_figures(rows, width):
    text = drawn(rows[:4], 24, width)
    assert text[0].split() == ["run", "layers", "lr", "state", "step", "loss", "accept", "ETA"]
    assert text[1].split() == ["1", "[1,", "3,", "5]", "0.0012", "finished", "300/300", "1.500"]
    assert text[2].split()[5:] == ["running", "20/300", "2.250", "1.75", "1:02:05"]
    assert text[3].split()[5:] == ["waiting", "0/300"]
    assert text[-1] == "1 running, 2 waiting, 1 finished"


def test_a_low_terminal_keeps_what_runs_and_what_failed(rows):
    text = drawn(rows, 8, 80)
    assert len(text) <= 8 and [line.split()[0] for line in text[1:5]] == ["2", "3", "4", "40"]
    assert text[-1] == "1 running, 1 failed, 37 waiting, 1 finished; 36 lines not shown"


@pytest.mark.parametrize(
    "line",
    [
        "[]", "null", "7", '"step"', "no json", '{"step": "x"}', '{"step": 5, "eval": []}', "[" * 100_000,
        '{"step": 5, "loss": "low", "eta": "soon"}', '{"step": 5, "loss": 1e999, "eta": 1e999}',
        '{"step": 5, "eval": {"accept_len": "a", "calls": {}, "step": "y"}}', '{"step": 5, "loss": NaN, "eta": NaN}',
    ],
)  # fmt: skip
def test_no_line_of_a_log_ends_the_table(rows, line):
    for name in ("metrics.jsonl", "timing.jsonl"):
        with open(rows[1].path / name, "a") as log:
            log.write(f"{line}\n")
    assert drawn(rows[:4], 24, 80)[-1] == "1 running, 2 waiting, 1 finished"


def test_the_runs_are_looked_up_once_a_frame(rows):
    asked = []
    LiveTable(lambda: asked.append(1) or rows).render(24)
    assert len(asked) == 1


def test_states_are_those_of_the_newest_news():
    states, (one, two) = States(), (Path("one"), Path("two"))
    states.begin([one, two])
    states.end([one, two], [two])
    assert states.of == {two: "failed"}
