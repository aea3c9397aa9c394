"""What a command prints to run next works as it is printed, also where a folder's name has a space in it."""

import re
import shlex
import shutil

import pytest
from foreign_maker import compute, write_specforge

from pipeline.cli import commands, main

COMMAND = re.compile(r"`(pipeline [^`\n]*)`|(?:next: |with |: )(pipeline [^;`\n]*)")
SETS = ["--set=train.batch=4", "--set=train.anchors=4", "--set=train.steps=1", "--set=draft.method=dflash"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_target, tiny_corpus, tiny_cache):
    """A folder "a b" with a target, a corpus and a cache of which one column is damaged, and another trainer's."""
    folder = tmp_path_factory.mktemp("printed") / "a b"
    shutil.copytree(tiny_target, folder / "a target")
    shutil.copy(tiny_corpus, folder / "chats.jsonl")
    for name in ("cache", "damaged"):
        shutil.copytree(tiny_cache, folder / name)
    (folder / "damaged/shards/000001/aux.3.json").write_text("{")
    write_specforge(folder / "states", compute(tiny_target, 4), [1, 3])
    return folder


PRINTED = {
    "make one": (2, "inspect NONE", "cache-hidden --model TARGET --out NONE"),
    "next after a plan": (
        0,
        "plan --model TARGET --corpus CHATS --out NEW",
        "cache-hidden --model TARGET --corpus CHATS --out NEW",
    ),
    "another codec": (
        2,
        "cache-hidden --model TARGET --corpus CHATS --out CACHE --layers 1,3,4 --max-length 256 --codec zstd",
        "recode CACHE",
    ),
    "a lacking layer": (2, "train-draft --cache CACHE --set draft.layers=[1,2]", "cache-hidden --model"),
    "damage": (4, "verify DAMAGED", "verify DAMAGED --repair --model"),
    "damage elsewhere": (4, "train-draft --cache DAMAGED --out RUN2", "verify DAMAGED"),
    "a run": (0, "train-draft --cache CACHE --device cpu --out RUN", "evaluate --draft RUN"),
    "an import": (0, "import-cache STATES --model TARGET --layers 1,3 --out IMPORTED", "train-draft --cache IMPORTED"),
}


@pytest.mark.parametrize("case", PRINTED)
def test_a_printed_command_parses_back_to_the_paths_that_were_meant(case, place, capfd):
    names = ("NONE", "NEW", "CACHE", "DAMAGED", "RUN", "RUN2", "IMPORTED", "STATES")
    paths = {name: str(place / name.lower()) for name in names}
    paths |= {"TARGET": str(place / "a target"), "CHATS": str(place / "chats.jsonl")}
    code, typed, wanted = PRINTED[case]
    capfd.readouterr()
    words = [paths.get(word, word) for word in typed.split()]
    ended = 0
    try:
        main([*words, *(SETS if words[0] == "train-draft" else [])])
    except SystemExit as stop:
        ended = stop.code
    shown = "".join(capfd.readouterr())
    found = [shlex.split("".join(each))[1:] for each in COMMAND.findall(shown)]
    if "NONE" in wanted:
        paths["TARGET"] = "TARGET"  # nobody named one
    meant = [paths.get(word, word) for word in wanted.split()]
    matching = [words for words in found if words[: len(meant)] == meant]
    assert ended == code and matching, shown
    for words in matching:
        commands.commands[words[0]].make_context(words[0], words[1:])
