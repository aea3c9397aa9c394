"""Running commands of ours in this process, small."""

import re
import shlex
from pathlib import Path

import documented_table as table
import torch
from documented_lines import Shown

from pipeline.cli import main


def with_sets(line: str) -> str:
    stated = set(re.findall(r"train\.\w+", line))
    few = {key: value for key, value in table.SMALL_SETS.items() if key not in stated}
    if "train.epochs" in stated:
        few.pop("train.steps")
    return line + "".join(f" --set {key}={value}" for key, value in few.items())


def newest(beginning: str) -> str:
    return str(max(Path().glob(f"{beginning}*"), key=lambda path: path.stat().st_mtime))


def ended(typed: str, codes: tuple[int, ...] = (0,), line: Shown | None = None) -> None:
    torch.manual_seed(0)
    code = 0
    try:
        main(shlex.split(typed))
    except SystemExit as stop:
        code = stop.code or 0
    shown = f"{line.page}, {line.section!r} shows: {line.text}\n" if line else ""
    assert code in codes, (
        f"{shown}run was: pipeline {typed}\nit ended with {code}; its message is in the captured stderr"
    )
