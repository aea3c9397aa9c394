"""Every command line in README.md and docs/ is run, on the bundled target: what the documentation says can be typed.

`documented_table.py` says what stands for what, and what is only parsed. A command that is new in a page runs here or
fails here. The code blocks of a section run in one folder, each part of a command in the text in its own; what a
command reads and nobody made there is put there.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import documented_table as table
import pytest
from chat_server import ChatServer
from documented_lines import PAGES, ROOT, Shown, shown_in
from documented_runs import add_part, ended, newest, with_sets
from torch.distributed.run import get_args_parser

from pipeline import engine_process
from pipeline.cli import commands
from pipeline.target.chat_template import load_tokenizer
from stages.cache_hidden import vllm_engine
from stages.serve_check import engine_answer
from stages.serve_check import run as serve_check

sys.path[:0] = [str(ROOT / "tests/cache_hidden"), str(ROOT / "tests/serve_check")]
import fake_vllm  # noqa: E402
import toy_engine  # noqa: E402

TARGET = "data/tiny-qwen3"
SHOWN = {path.relative_to(ROOT).as_posix(): shown_in(path) for path in PAGES}
SECTIONS = [(page, name) for page, lines in SHOWN.items() for name in dict.fromkeys(line.section for line in lines)]


def command_of(words: list[str]) -> tuple[str, click.Command, list[str]]:
    """Return a command's name as it is typed, the command, and the words behind the name. KeyError for none."""
    command, name, rest = commands.commands[words[0]], words[0], words[1:]
    if isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command, name, rest = command.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    return name, command, rest


@pytest.fixture(scope="session")
def server():
    """A server that speaks OpenAI's protocol, and knows the bundled target's tokens."""
    tokenizer = load_tokenizer(ROOT / TARGET)

    def encode(messages, reply):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return prompt, [*tokenizer.encode(reply), tokenizer.eos_token_id]

    with ChatServer(encode=encode) as one:
        yield one


@pytest.fixture
def place(tmp_path, monkeypatch, made):
    """A function that makes a folder of its own for commands; engines are the tests' own, in this process."""

    def making(name: str):
        (tmp_path / name).mkdir(exist_ok=True)
        for linked in ("configs", "data"):
            if not (tmp_path / name / linked).exists():
                (tmp_path / name / linked).symlink_to(ROOT / linked)
        monkeypatch.chdir(tmp_path / name)

    monkeypatch.setattr(engine_process, "MODULES", {"vllm": "json"})  # what this Python has
    monkeypatch.setattr(vllm_engine, "EngineProcess", fake_vllm.InThisProcess)
    monkeypatch.setattr(serve_check, "run_engine", served_here)
    return making


def served_here(python, script, request, folder, timeout, title):
    folder.mkdir(parents=True)
    (folder / "request.json").write_text(json.dumps(request | {"out": str(folder)}))
    toy_engine.main(folder / "request.json")
    return engine_answer._read_answer(folder)


def test_every_page_shows_commands_that_are_found():
    assert len(SHOWN["README.md"]) > 60
    assert {name for name in table.PARSED} <= {line.words[0] for line in everything() if line.words}


def everything() -> list[Shown]:
    return [line for lines in SHOWN.values() for line in lines]


@pytest.mark.parametrize(("page", "section"), SECTIONS)
def test_the_commands_of_a_section_run_as_shown(page, section, place, made, server, pytestconfig, capfd, monkeypatch):
    add_part(page, monkeypatch)
    for number, line in enumerate(SHOWN[page]):
        if line.section == section:
            place(f"text {number}" if line.in_text else "blocks")
            run_shown(line, made, server.url, pytestconfig)
            capfd.readouterr()


def run_shown(line: Shown, made: Path, url: str, config) -> None:
    """Run what a line shows, or parse it where the table says so. What is no command is passed over, in text only."""
    words = line.words if not line.in_text or looks_like_a_command(line.text) else []
    if not words:
        return
    if words[0] in table.PARSED:
        return parsed_only(words, config)
    if words[0] == "source":
        words = ["pipeline", *re.search(r"<\(pipeline ([^)]*)\)", line.text)[1].split()]
    if words[0] == "torchrun":
        return run_by_torchrun(line, words, made)
    if words[0].startswith("--"):
        return check_option(line, words, config)
    words = words[words[0] == "pipeline" :]
    if words and not words[0].startswith("--"):
        name, command, rest = command_of(words)
        if line.in_text and not rest:
            return  # it is mentioned
        if line.in_text and lacks_a_value(command, rest):
            return check_option(line, rest, config)
        run_command(line, completed(line, name, command, rest, made, url), made)
        return
    commands.make_context("pipeline", words or ["--help"], resilient_parsing=True)


def looks_like_a_command(text: str) -> bool:
    first, _, rest = text.partition(" ")
    if first.startswith("--"):
        return re.fullmatch(r"--[a-z][a-z-]*", first) is not None
    is_part = first in commands.commands and rest.startswith(("-", "…", "show", "schema"))
    return is_part or (first in ("pipeline", "make", "torchrun", "pip", "pytest", "source") and bool(rest))


def completed(line: Shown, name: str, command: click.Command, rest: list[str], made: Path, url: str) -> list[str]:
    """Return the words of a command as it is run: each stands for what the table says, and what lacks is added."""
    given = [*rest]
    if "…" in given:
        at = given.index("…")
        given = with_options([*given[:at], *given[at + 1 :]], table.REST[name])
    for key, more in table.NEEDED.items() if line.in_text else ():
        if f"{name} {' '.join(rest)} ".startswith(f"{key} "):
            given = with_options(given, more)
    given = with_options(given, table.SMALL.get(name, ""))
    if name in ("train-draft", "sweep"):
        given = shlex.split(with_sets(shlex.join(given)))
    meant = []
    for before, word in zip(["", *given], given, strict=False):
        meant.append(stands_for(name, word, url))
        if before != "--out":
            put(meant[-1], made)
    return [*name.split(), *(newest(word[:-1]) if word.endswith("…") else word for word in meant)]


def with_options(words: list[str], more: str) -> list[str]:
    """Add an option with its value, or an argument, where the words have no such one."""
    added = shlex.split(more)
    if added and not added[0].startswith("-"):
        return words if any(not word.startswith("-") for word in words[:1]) else [*words, *added]
    pairs = [added[at : at + 2] for at in range(0, len(added), 2)]
    return [*words, *(word for pair in pairs if pair[0] not in words for word in pair)]


def stands_for(name: str, word: str, url: str) -> str:
    """Return what a word of a command stands for."""
    word = table.WORDS_OF.get((name.split()[0], word), table.WORDS.get(word, word))
    word = re.sub(r"^(runs/\S*-)[0-9a-f]{10}$", r"\1…", word)  # a run of other settings has another digest
    return {"SERVER": url, "PYTHON": sys.executable}.get(word, word)


def put(word: str, made: Path) -> None:
    """Copy what a word names out of the folder that was made, unless the section made it itself."""
    pattern = word.replace("…", "*")
    if not word.strip("./") or word.startswith("/") or [*Path().glob(pattern)]:
        return
    for path in made.glob(pattern):
        target = Path(path.relative_to(made))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)


def run_command(line: Shown, words: list[str], made: Path) -> None:
    """Run a command of ours in this process; it ends as it should."""
    name, command, rest = command_of(words)
    context = command.make_context(name, [*rest], resilient_parsing=True)
    writes = name in ("plan", "cache-hidden", "import-cache") and "--append" not in rest
    if "cache" in context.params or (name == "cache-hidden" and not writes):
        put("hs_cache", made)
    ended(shlex.join(words), table.ENDS.get(name, (0,)), line)


def run_by_torchrun(line: Shown, words: list[str], made: Path) -> None:
    """Run a line of torchrun's with one rank: README's by torchrun, others in this process, once it parses them."""
    at = words.index("pipeline")
    name, command, rest = command_of(words[at + 1 :])
    ours = completed(line, name, command, rest, made, "")
    theirs = words[1 : at + 1]
    for option in table.RANKS:
        for typed in (ours, theirs):
            if option in typed:
                typed[typed.index(option) + 1] = "1"
    if line.page != "README.md":
        assert get_args_parser().parse_args(theirs).training_script == "pipeline"
        return run_command(line, ours, made)
    put("hs_cache", made)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *theirs, *ours], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{line}\n{theirs} {ours}\n{done.stderr}"


def lacks_a_value(command: click.Command, words: list[str]) -> bool:
    """Return whether words end with an option without its value, as a text may name one."""
    last = [param for param in command.params if words[-1] in param.opts]
    return bool(last) and not last[0].is_flag


def check_option(line: Shown, words: list[str], config) -> None:
    """Some command has the option, and takes the value."""
    option, values = words[0].partition("=")[0], words[1:2]
    params = [param for command in all_commands() for param in command.params]
    having = [param for param in params if option in (*param.opts, *param.secondary_opts)]
    of_pytest = hasattr(config.option, option.removeprefix("--").replace("-", "_"))
    assert having or of_pytest, f"{line}: no command has {option}"
    takers = [param for param in having if not getattr(param, "is_flag", False)]
    if values and takers and values[0] not in table.WORDS:
        takers[0].type.convert(values[0], takers[0], None)


def all_commands(group: click.Group = commands) -> list[click.Command]:
    inner = [all_commands(each) if isinstance(each, click.Group) else [each] for each in group.commands.values()]
    return [group, *(command for each in inner for command in each)]


def parsed_only(words: list[str], config) -> None:
    """Check what a line of another program names, without running it."""
    program, rest = words[0], words[1:]
    if program == "make":
        environment = ["PYTHON=python3"]
        done = subprocess.run(["make", "--dry-run", *rest, *environment], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"make {rest}: {done.stderr}"
        for typed in re.findall(r"\.venv/bin/pipeline ([^|;&\n]*)", done.stdout.replace("\\\n", " ")):
            name, command, given = command_of(shlex.split(typed.rstrip(" }")))
            command.make_parser(click.Context(command, info_name=name)).parse_args([w for w in given if "2>" not in w])
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[([\w,]+)\]", " ".join(rest))[0].split(",")) <= extras.keys(), words
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if "/" in word), words
        options = [word[2:].replace("-", "_") for word in rest if word.startswith("--")]
        assert all(hasattr(config.option, option) for option in options), words
    elif program == "python" and rest[0] != "-m":
        script = (ROOT / rest[0]).read_text()
        assert all(f'"{word}"' in script for word in rest if word.startswith("--")), words
