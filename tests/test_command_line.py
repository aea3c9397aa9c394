"""Threads that wait sleep, in every command that computes, unless the user would have them wait otherwise."""

import os
import re
import subprocess
import sys

import pytest

from pipeline.command_line import NO_SPINNING, WAIT_VARIABLES, disable_spin_waiting

COMMANDS = [
    "train-draft --cache EMPTY",
    "sweep configs/sweep.toml --cache EMPTY",
    "evaluate --draft EMPTY",
    "export --draft EMPTY --out elsewhere",
    "check-export EMPTY",
    "import-cache nowhere",
    "recode EMPTY --codec zstd",
]


def policy(arguments: list[str], **chosen: str) -> dict[str, str]:
    """Run a command, and return what the OpenMP runtime says of itself when it is loaded."""
    inherited = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        env=inherited | chosen | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = dict(re.findall(r"(\w+) *= *'(.*)'", done.stderr))
    assert "OMP_WAIT_POLICY" in said, done.stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("torch brings another runtime than GNU's here")
    return said


@pytest.fixture
def empty(tmp_path):
    """A folder that is there, and neither a cache nor a draft."""
    (tmp_path / "cache.json").write_text("{}")
    return str(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_runtime_hears_of_it_before_torch_loads_it(command, empty):
    assert policy(command.replace("EMPTY", empty).split())["GOMP_SPINCOUNT"] == "0"


def test_a_capture_hears_of_it_too(tiny_target, tiny_corpus, tmp_path):
    command = ["cache-hidden", "--model", str(tiny_target), "--corpus", str(tiny_corpus), "--out", str(tmp_path / "c")]
    assert policy(command)["GOMP_SPINCOUNT"] == "0"


def test_what_the_user_chose_stands(empty):
    command = COMMANDS[0].replace("EMPTY", empty).split()
    assert policy(command, GOMP_SPINCOUNT="77")["GOMP_SPINCOUNT"] == "77"
    found = policy(command, OMP_WAIT_POLICY="active")
    assert found["OMP_WAIT_POLICY"] == "ACTIVE" and int(found["GOMP_SPINCOUNT"]) > 10**6


@pytest.mark.parametrize("name", WAIT_VARIABLES)
def test_any_choice_of_the_user_s_is_left_alone_and_none_is_made_up_for(name):
    chosen = {name: "what they say"}
    disable_spin_waiting(chosen)
    assert chosen == {name: "what they say"}


def test_both_kinds_of_runtime_are_told():
    environment = {"OMP_NUM_THREADS": "2"}
    disable_spin_waiting(environment)
    assert environment == {"OMP_NUM_THREADS": "2", **NO_SPINNING} and {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"} == set(
        NO_SPINNING
    )
