"""What the tests of the documentation share."""

import json
import re

import pytest
from documented_lines import ROOT
from documented_runs import ended, newest, with_sets
from foreign_maker import compute, write_specforge
from tiny import write_jsonl

TARGET = "data/tiny-qwen3"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with what a section may read: corpora, a cache, a run, reports, an export, another trainer's states."""
    folder = tmp_path_factory.mktemp("documented")
    for name in ("configs", "data"):
        (folder / name).symlink_to(ROOT / name)
    chats = (folder / "data/chats.jsonl").read_text().splitlines()
    for name, first in (("few.jsonl", 0), ("chats.jsonl", 0), ("more.jsonl", 1), ("prompts.jsonl", 2)):
        few = [
            *chats[first:480:96],
            *chats[480 + first :: 250],
        ]  # held-out chats come first, 48 a domain, then 500 each
        write_jsonl(folder / name, few)
    sweep = (ROOT / "configs/sweep.toml").read_text()
    (folder / "small-sweep.toml").write_text(re.sub(r'("train\.\w+" = \[[^,\]]+)[^\]]*', r"\1", sweep))
    write_specforge(folder / "states", compute(ROOT / TARGET, 6), [1, 3, 5])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended(f"cache-hidden --model {TARGET} --corpus chats.jsonl --out hs_cache")
        ended(with_sets("train-draft configs/domino.toml --cache hs_cache"))
        ended(f"evaluate --draft {newest('runs/domino-')} --count 2 --max-new 8 --out a.json --plain plain.json")
        ended(f"export --draft {newest('runs/domino-')} --out my-draft")
        ended(with_sets("train-draft configs/dflash.toml --cache hs_cache"))
        ended(f"export --draft {newest('runs/dflash-')} --out my-dflash")
    report = json.loads((folder / "a.json").read_text())
    report.pop("xxh3")
    for name, seed in (("b.json", 1), ("c.json", 2)):
        report["draft"] |= {"method": "dflash", "seed": seed, "path": f"runs/{seed}"}
        (folder / name).write_text(json.dumps(report))
    return folder
