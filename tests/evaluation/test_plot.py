"""The plot of evaluations: what it shows, what it says of itself, and what it cannot show."""

import json
import sys
from xml.etree import ElementTree

import pytest
from reports import evaluation

from pipeline.cli import commands
from pipeline.errors import RoomError, UsageError
from pipeline.evaluation.plot import mark_positions, plot, plot_lines, space_labels
from pipeline.evaluation.reports import accept_length, load_reports

SAMPLES = [("sql", [8, 8]), ("sql", [2, 2]), ("copy", [4])]
DRAFT = {"method": "domino", "block_size": 8, "proposals": 8, "parameters": 1000}


def reports(folder, method="domino", budgets=(600, 6000), seeds=(0, 1), **draft):
    """One evaluation for each budget and seed; those of one budget are of one recipe."""
    return [
        evaluation(
            folder / f"{method}-{steps}-{seed}.json", method, seed, steps, SAMPLES, recipe=f"{method} {steps}", **draft
        )
        for steps in budgets
        for seed in seeds
    ]


def changed(path, **more):
    """A copy of a report in which some of its parts are others."""
    other = path.with_name("changed.json")
    other.write_text(json.dumps(json.loads(path.read_text()) | more))
    return other


def test_a_line_holds_every_budget_of_a_kind_and_a_mark_every_seed(tmp_path):
    paths = [
        *reports(tmp_path, "dflash"),
        *reports(tmp_path, "dspark", objective="dspark", block_size=7, proposals=7, parameters=2_361_088),
        *reports(tmp_path, "domino", budgets=(600,), objective="tv", weighting="dpace"),
    ]
    lines = plot_lines(load_reports(paths))

    assert [(line.name, line.conventions) for line in lines] == [
        ("DFlash", "block 8, 8 proposals, 1,000 parameters"),
        ("DSpark", "block 7, 7 proposals, 2.4 M parameters"),
        ("Domino, tv, dpace", "block 8, 8 proposals, 1,000 parameters"),
    ]
    assert [[(steps, len(seeds)) for steps, seeds in line.reports.items()] for line in lines] == [
        [(600, 2), (6000, 2)], [(600, 2), (6000, 2)], [(600, 2)],
    ]  # fmt: skip
    assert accept_length(lines[0].reports[600])[0] == 24 / 5


def test_plot_lines_several_caches_are_told_space_labels(tmp_path):
    paths = reports(tmp_path, seeds=(0,))
    lines = plot_lines(load_reports([paths[0], changed(paths[0], cache="0123456789")]))
    assert [line.conventions.partition("parameters, ")[2] for line in lines] == ["cache unknown", "cache 01234567"]


def test_a_plot_says_its_conventions_and_comes_out_the_same_twice(tmp_path, monkeypatch):
    import matplotlib

    paths = [changed(reports(tmp_path)[0], target="a$b$c_d")]
    plot(paths, tmp_path / "made" / "first.svg")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 31)  # somebody's own style
    plot(paths, tmp_path / "second.svg")

    drawn = (tmp_path / "made" / "first.svg").read_bytes()
    assert drawn == (tmp_path / "second.svg").read_bytes()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    for text in (b"a$b$c_d: accept length", b"greedy, replies of 64 tokens at most", b"block 8, 8 proposals"):
        assert text in drawn, "texts are outlines, each with its words in a comment"


def test_the_command_draws_a_png_beside_its_table(tmp_path, capsys):
    drawing = tmp_path / "plot.PNG"
    commands.main(["report", *map(str, reports(tmp_path)), "--plot", str(drawing)], standalone_mode=False)
    assert drawing.read_bytes().startswith(b"\x89PNG")
    assert "domino, 600 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"draft": {**DRAFT, "steps": None}}, r"exported folder; evaluate the run itself .*--draft RUN"),
        ({"samples": [{"domain": "sql", "lengths": []}]}, "no reply took a target call"),
    ],
)
def test_what_a_plot_cannot_show_is_refused_with_a_remedy(tmp_path, change, says):
    first = reports(tmp_path, budgets=(600,), seeds=(0,))[0]
    with pytest.raises(UsageError, match=says):
        plot([first, changed(first, **change)], tmp_path / "plot.svg")
    assert not (tmp_path / "plot.svg").exists()


def test_two_recipes_of_equal_length_have_no_one_place_in_a_line(tmp_path):
    paths = [evaluation(tmp_path / f"{n}.json", samples=SAMPLES, recipe=n, path=f"runs/{n}") for n in ("lr", "wd")]
    with pytest.raises(UsageError, match=r"Domino of 700 steps was trained by several recipes \(runs/lr and runs/wd\)"):
        plot(paths, tmp_path / "plot.svg")


@pytest.mark.parametrize("name", ["plot.pdf", "plot", ".svg"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"wanted a file that ends in \.svg or \.png"):
        plot(reports(tmp_path), tmp_path / name)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.svg").mkdir()
    for out in (tmp_path / "file" / "plot.svg", tmp_path / "folder.svg"):
        with pytest.raises(RoomError, match=r"--plot .*svg: cannot be written \(.*\); name another file"):
            plot(reports(tmp_path), out)


def test_without_matplotlib_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"needs matplotlib; install it with `pip install 'draft-pipeline\[plot\]'`"):
        plot(reports(tmp_path), tmp_path / "plot.svg")


def test_labels_keep_their_distance_and_stay_close_to_their_lines():
    assert space_labels([0.9, 0.1, 0.5], gap=0.2) == [0.9, 0.1, 0.5]
    assert space_labels([0.5, 0.5], gap=0.2) == pytest.approx([0.4, 0.6])
    assert space_labels([1.0, 0.99, 0.0, 0.01], gap=0.25) == pytest.approx([1.0, 0.75, 0.0, 0.25])


def test_marks_of_one_budget_stand_beside_one_another_and_nearer_than_the_next_budgets():
    places = mark_positions([600, 640, 6000], lines=3)
    assert all(marks == sorted(set(marks)) for marks in places.values())
    assert places[600][1] == pytest.approx(600) and places[600][-1] < places[640][0]
    assert mark_positions([600], lines=1) == {600: [pytest.approx(600)]}
