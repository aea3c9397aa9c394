"""Wrong input, as a user meets it: one line with the remedy on standard error, and the exit code of its kind."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from disks import mounted
from tiny import conversations, write_jsonl

from pipeline.cache.manifest import read_canonical, write_canonical
from pipeline.cli import main


@pytest.fixture
def ends(capfd):
    """Run a command line; return its exit code and its one complaint on standard error."""

    def run(*arguments) -> tuple[int, str]:
        capfd.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code
        complaints = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error:", "bug:"))]
        assert len(complaints) == (code != 0), complaints
        return code or 0, complaints[0] if complaints else ""

    return run


@pytest.fixture
def cache(tiny_cache, tmp_path):
    """A copy of the tiny cache, to damage."""
    return shutil.copytree(tiny_cache, tmp_path / "hs_cache")


def test_every_command_says_in_its_line_what_it_does(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["--help"])
    shown = capfd.readouterr().out
    assert shown.count("\n  ") > 12 and "..." not in shown.partition("Commands:")[2]


def test_a_model_that_does_not_exist(ends, tiny_corpus, tmp_path):
    code, line = ends("cache-hidden", "--model", tmp_path / "no-such", "--corpus", tiny_corpus, "--out", tmp_path / "c")
    assert code == 2
    assert "no-such" in line


@pytest.mark.parametrize("empty", ["--corpus", "--out", "--model"])
def test_an_empty_value_is_neither_the_default_corpus_nor_this_folder(ends, tmp_path, monkeypatch, empty):
    monkeypatch.chdir(tmp_path)
    told = {"--model": "m", "--corpus": "c", "--out": "o", empty: ""}
    apart, joined = [word for pair in told.items() for word in pair], [f"{name}={told[name]}" for name in told]
    for words in (apart, joined):
        code, line = ends("plan", *words)
        assert code == 2 and f"the value of {empty} is empty" in line
    code, line = ends("inspect", "")
    assert code == 2 and "the value is empty" in line
    assert not list(tmp_path.iterdir())


def test_a_corpus_that_does_not_exist(ends, tiny_target, tmp_path):
    code, line = ends("plan", "--model", tiny_target, "--corpus", tmp_path / "no.jsonl", "--out", tmp_path / "c")
    assert code == 2
    assert "no.jsonl" in line


def test_a_file_where_a_folder_is_meant(ends, tiny_target, tiny_corpus):
    for command in (("plan", "--model", tiny_target, "--out", tiny_corpus), ("verify", tiny_corpus)):
        code, line = ends(*command)
        assert code == 2 and f"'{tiny_corpus}' is a file" in line
    code, line = ends("plan", "--model", tiny_target, "--corpus", tiny_corpus, "--out", tiny_corpus / "c")
    assert code == 5 and "a file stands where a folder on the way should; pass another --out" in line


def test_a_corpus_without_a_usable_sample(ends, tiny_target, tmp_path):
    only_users = [{"messages": [{"role": "user", "content": "hello"}]}] * 3
    corpus = write_jsonl(tmp_path / "users.jsonl", only_users)
    code, line = ends("cache-hidden", "--model", tiny_target, "--corpus", corpus, "--out", tmp_path / "c")
    assert code == 3
    assert "users.jsonl" in line


def test_a_cache_of_another_format_version(ends, cache):
    identity = {key: value for key, value in read_canonical(cache / "cache.json").items() if key != "hash"}
    identity["format"] = "99"
    (cache / "cache.json").unlink()
    write_canonical(cache / "cache.json", identity)
    for command in (("inspect", cache), ("verify", cache), ("train-draft", "--cache", cache)):
        code, line = ends(*command)
        assert code == 4
        assert "'99'" in line and "'1' and '1-rc2'" in line and "upgrade draft-pipeline" in line


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_is_found_by_verify_and_by_training(ends, cache, tmp_path):
    for states in cache.glob("shards/*/aux.3/c/0/0"):
        flip(states, 40)
    code, line = ends("verify", cache)
    assert code == 4
    code, line = ends("train-draft", "--cache", cache, "--out", tmp_path / "run", "--set", "train.steps=2")
    assert code == 4
    assert "aux.3" in line


def test_the_command_that_repairs_works_as_it_is_printed(ends, cache):
    flip(cache / "shards/000001/aux.3.arrow", 900)
    code, line = ends("verify", cache)
    words = shlex.split(line.split("`")[1])
    assert code == 4 and words[:2] == ["pipeline", "verify"]
    assert ends(*words[1:]) == (0, "")


def test_what_an_error_says_to_run_names_the_cache(ends, cache, tiny_target, tiny_corpus):
    flip(cache / "cache.json", 80)
    capture = ("cache-hidden", "--model", tiny_target, "--corpus", tiny_corpus, "--out", cache, "--layers", "1")
    for command in (capture, ("inspect", cache), ("train-draft", "--cache", cache)):
        code, line = ends(*command)
        assert code == 4 and f"run `pipeline verify {cache}`" in line, line
    (cache / "cache.json").unlink()
    code, line = ends("inspect", cache)
    assert code == 4 and f"cache.json: missing; run `pipeline verify {cache}`" in line


def test_damage_that_no_repair_makes_right_is_not_sent_round_again(ends, cache):
    shutil.copytree(cache / "shards/000001", cache / "shards/000099")
    code, line = ends("verify", cache, "--repair")
    assert code == 4 and "shards/000099 (not in the plan); no repair makes it right; move it out" in line


def test_what_a_corpus_says_is_shown_as_it_stands(tiny_target, tmp_path, capfd):
    """Were it read as markup, `[/b]` would end the command with a trace and `[red]` would not be seen."""
    rows = conversations(24)
    rows[0]["messages"][0]["role"] = "[/b]"
    rows[1]["domain"], rows[2]["domain"] = "[red]", ":smile:"
    corpus = write_jsonl(tmp_path / "[bold]chats.jsonl", rows)
    main(["plan", "--model", str(tiny_target), "--corpus", str(corpus), "--out", str(tmp_path / "[c]")])
    shown = capfd.readouterr().out
    for text in ("[/b]", "[red] 1", ":smile: 1", "[bold]chats.jsonl", "plan of", "[c]"):
        assert text in shown, text


def test_a_recipe_with_a_misspelt_key(ends, cache, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[draft]\nblok_size = 8\n")
    code, line = ends("train-draft", recipe, "--cache", cache, "--out", tmp_path / "run")
    assert code == 2
    assert "block_size" in line


def test_a_misspelt_setting(ends, cache, tmp_path):
    code, line = ends("train-draft", "--cache", cache, "--out", tmp_path / "run", "--set", "train.stepps=2")
    assert code == 2
    assert "steps" in line


def test_layers_that_the_cache_lacks(ends, cache, tmp_path):
    code, line = ends("train-draft", "--cache", cache, "--out", tmp_path / "run", "--set", "draft.layers=[1,2]")
    assert code == 2
    assert "--layers 1,2,3,4" in line


def test_a_cache_that_is_not_there(ends, tmp_path):
    for command in (("inspect", tmp_path / "none"), ("train-draft", "--cache", tmp_path / "none")):
        code, line = ends(*command)
        assert code == 2
        assert "cache-hidden" in line


NOT_THERE = [
    ["evaluate", "--draft", "none"],
    ["export", "--draft", "none", "--out", "x"],
    ["check-export", "none"],
    ["serve-check", "none"],
    ["doctor", "none"],
    ["train-draft", "--cache", "none"],
    ["train-draft", "none.toml"],
    ["sweep", "none.toml"],
    ["recode", "none", "--codec", "int8"],
]


def test_what_is_not_there_is_told_before_torch_is_imported(tmp_path):
    """One line with the remedy, and no hint at a help that would not say more."""
    code = (
        "import json, sys, pipeline.cli as cli\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(NOT_THERE)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.stdout == "2 False\n" * len(NOT_THERE), done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == len(NOT_THERE), done.stderr
    assert all("none" in line and "; " in line and "--help" not in line for line in lines), lines


def test_a_full_disk_while_capturing_loses_nothing(ends, tiny_target, tiny_corpus, tmp_path):
    arguments = ("--model", tiny_target, "--corpus", tiny_corpus, "--max-length", 256, "--layers", "1,3,4")
    with mounted(tmp_path / "small", "size=400k") as small:
        code, line = ends("cache-hidden", *arguments, "--out", small / "c")
        assert code == 5
        assert str(small) in line
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        assert ends("cache-hidden", *arguments, "--out", small / "c") == (0, "")
        assert ends("verify", small / "c") == (0, "")


def test_a_read_only_folder(ends, tiny_target, tiny_corpus, tiny_cache, tmp_path):
    with mounted(tmp_path / "fixed", "size=1m,ro") as fixed:
        arguments = ("--model", tiny_target, "--corpus", tiny_corpus)
        for command in (
            ("cache-hidden", *arguments, "--out", fixed / "c"),
            ("train-draft", "--cache", tiny_cache, "--out", fixed / "run"),
        ):
            code, line = ends(*command)
            assert code == 5, line
            assert "read-only" in line.lower()


def test_a_read_only_cache_can_be_read(ends, cache):
    subprocess.run(["chmod", "-R", "a-w", cache], check=True)
    try:
        assert ends("inspect", cache) == (0, "")
        assert ends("verify", cache) == (0, "")
    finally:
        subprocess.run(["chmod", "-R", "u+w", cache], check=True)


@pytest.mark.parametrize(
    ("line", "module", "said"),
    [
        (
            "check-export draft",
            "pipeline.published.check.check_export",
            "nothing was written, and the same command start",
        ),
        ("evaluate --draft draft", "stages.evaluate.run.run", "no report was written, and the same command starts"),
        ("train-draft recipe", "stages.train_draft.run.run", "what is finished is kept, and the same command goes on"),
        ("--debug cache-hidden --model m --out report", "stages.cache_hidden.run.run", "what is finished is kept, and"),
    ],
)
def test_an_interrupted_command_says_what_is_kept(line, module, said, monkeypatch, capfd, tmp_path):
    for path in ("draft/config.json", "hs_cache/cache.json"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text("{}")
    (tmp_path / "recipe").touch()
    monkeypatch.chdir(tmp_path)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, interrupted)
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 130 and f"interrupted; {said}" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_command_that_a_signal_stops_says_which_and_what_is_kept(number, code, tiny_cache, monkeypatch, capfd):
    before = signal.getsignal(number)
    monkeypatch.setattr("pipeline.cache.inspect.describe", lambda _: os.kill(os.getpid(), number))
    try:
        with pytest.raises(SystemExit) as stop:
            main(["inspect", str(tiny_cache)])
    finally:
        signal.signal(number, before)
    assert stop.value.code == code
    said = "nothing was written, and the same command starts again"
    assert capfd.readouterr().err == f"stopped by {number.name}; {said}\n"


def test_no_command_at_all_shows_what_there_is(capfd):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and capfd.readouterr().err.startswith("Usage: pipeline")


def test_a_command_line_that_does_not_parse(ends):
    assert ends("trein")[0] == 2
    code, line = ends("train-draft", "--cach", "x")
    assert code == 2
    assert "--cache" in line


def test_json_output_is_json(cache, capfd):
    main(["inspect", str(cache), "--json"])
    assert json.loads(capfd.readouterr().out)["plan"]["samples"] > 0


@pytest.mark.parametrize("sample", [0, 5])
def test_a_sample_is_shown_with_its_supervised_tokens_marked(cache, capfd, sample, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["inspect", str(cache), "--sample", str(sample)])
    shown = capfd.readouterr().out
    assert "\x1b[" in shown
    assert "<|im_end|>" in shown


def test_a_bug_is_one_line_and_exit_code_1(tiny_cache):
    code = (
        "import sys, pipeline.cli as cli\n"
        "cli.commands.commands['inspect'].callback = lambda **_: 1 / 0\n"
        "cli.main(['inspect', sys.argv[1]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_cache)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("bug: ZeroDivisionError") and done.stderr.count("\n") == 1
