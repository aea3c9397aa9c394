"""A corpus whose words are escape sequences, markup and forged lines: wherever they are shown, they are only shown."""

import re
from xml.etree import ElementTree

import pytest
from rich.text import Text
from tiny import conversations, save_target, write_jsonl

from pipeline.cli import main
from pipeline.visible_tables import VisibleConsole, grid
from pipeline.visible_text import escape_markdown, markdown_code

ESCAPES = "\x1b]0;pwned\x07\x1b[31m"
DOMAINS = [
    f"{ESCAPES}red",
    "[red]x[/red] [link=https://evil.example]y[/link]",
    "a\nerror: forged\r\x9b2J",
    "<script>alert(1)</script> | <!-- -- --> [a](https://evil.example) `b` **c** \u202egnp",
]
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SETS = ("train.batch=4", "train.anchors=6", "draft.block_size=4", "train.steps=2", "draft.method=dflash")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target and a corpus of hostile names, a cache of it, a trained draft, its evaluation and its export."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = conversations()
    for at, row in enumerate(rows):
        row["domain"] = DOMAINS[at % len(DOMAINS)]
        row["split"] = "heldout" if at % 5 == 0 else "train"
        row["messages"][0]["content"] += f" {ESCAPES} [bold]hi[/bold]\r"
    rows.append({"messages": [{"role": f"{ESCAPES}\n", "content": "x"}], "domain": "x"})
    save_target(folder / "tar\x1b[31mget|<b>`x`")
    write_jsonl(folder / "ch\x1b[31mats.jsonl", rows)
    return folder


def commands(folder) -> list[list]:
    target, corpus, cache, run = (
        folder / "tar\x1b[31mget|<b>`x`",
        folder / "ch\x1b[31mats.jsonl",
        folder / "ca\x1b[31mche",
        folder / "r\x1b[31mun",
    )
    capture = ["--model", target, "--corpus", corpus, "--out", cache, "--layers", "1,3", "--max-length", "256"]
    report = folder / "r\x1b[31mun.json"  # beside the run and under its name, so the card has it
    sets = [word for entry in SETS for word in ("--set", entry)]
    return [
        ["plan", *capture],
        ["cache-hidden", *capture],
        ["inspect", cache],
        ["inspect", cache, "--json"],
        ["inspect", cache, "--sample", "0"],
        ["verify", cache],
        ["train-draft", "--cache", cache, "--out", run, "--device", "cpu", *sets],
        ["evaluate", "--draft", run, "--count", "8", "--max-new", "4", "--out", report, "--temperature", "1"],
        ["report", report],
        ["report", report, "--markdown", "--forced"],
        ["report", report, "--against", report],
        ["report", report, "--plot", folder / "plot.svg"],
        ["export", "--draft", run, "--out", folder / "dr`aft <b>\n"],
        ["check-export", folder / "dr`aft <b>\n"],
        ["recode", cache, "--codec", "zstd"],
        *refused(folder),
    ]


def refused(folder) -> list[list]:
    return [
        ["inspect", folder / "no\x1b[31mne\nerror: forged"],
        ["train-draft", folder / "no\x1b[31mne.toml", "--cache", folder / "ca\x1b[31mche"],
        ["report", folder / "no\x1b[31mne.json"],
        ["cache-hidden", "--model", "no\x1b[31mne", "--out", folder / "none"],
        ["recode", folder / "ca\x1b[31mche", "--codec", "\x1b[31m"],
        ["sweep", "--no\x1b[31mne"],
    ]


def test_no_command_obeys_what_a_corpus_says(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    shown = dict.fromkeys((arguments[0] for arguments in commands(folder)), "")
    for arguments in commands(folder):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        assert code == (2 if arguments in refused(folder) else 0), (arguments, code, out, err)
        assert not STEERS.search(out.replace("\x1b[A", "") + err.replace("\r", "")), (arguments, out, err)
        assert not any(line.startswith("error: forged") for line in (out + err).splitlines()), (arguments, out, err)
        shown[arguments[0]] += out + err
    assert "\\x1b[31m" in shown["inspect"] and "[red]x[/red]" in shown["report"]
    assert "bug" not in "".join(shown.values())


def test_a_card_and_a_plot_of_it_hold_no_markup_of_its_names(folder, capfd):
    card = (folder / "dr`aft <b>\n" / "README.md").read_text()
    prose = re.sub(r"^    .*$|`[^`\n]*`", "", card, flags=re.MULTILINE)
    assert not STEERS.search(card) and not re.search(r"<\w|<!--", prose)
    assert "](https://evil" not in card and "https://evil" not in card and "\nerror: forged" not in card
    edges = {line.count(" | ") for line in card.splitlines() if line.startswith("| ")}
    assert len(edges) <= 3, "no name makes another column"
    plot = (folder / "plot.svg").read_text()
    ElementTree.fromstring(plot)
    assert not STEERS.search(plot)


def test_markdown_of_names_shows_them_and_nothing_else():
    assert escape_markdown("open_perfectblend-1.5 (a, b)") == "open_perfectblend-1.5 (a, b)"
    assert not re.search(r"[<>|`*\[\]\n]|://|www\.", escape_markdown("<a>|`b` *c* [d](https://e) www.f \n _g_"))
    assert markdown_code("a`b\n|") == "`a'b\\n|`"


def test_a_console_shows_markup_emoji_and_control_characters_as_they_are(capsys):
    console = VisibleConsole()
    table = grid("[red]head", ">:smile:", title="ti\x1b[31mtle")
    table.add_row("a\nb", "c\x1b[31md")
    console.print(table, "[bold]e[/bold]\x9b", Text("f\x1bg"))
    shown = capsys.readouterr().out
    assert not STEERS.search(shown)
    for text in ("[red]head", ":smile:", "ti\\x1b[31mtle", "a\\nb", "c\\x1b[31md", "[bold]e[/bold]\\x9b", "f\\x1bg"):
        assert text in shown, shown
