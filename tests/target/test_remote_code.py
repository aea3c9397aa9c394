"""Code that comes with a model or a data set is never run, whatever standard input says."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_target, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("pipeline", "stages", "data") for path in (ROOT / folder).rglob("*.py")]
MAY_RUN_CODE = ("from_pretrained", "from_config", "load_dataset")

CODE = """open('-ran', 'w').write('code ran')
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
class OwnConfig(Qwen3Config):
    model_type = 'own'
class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def calls(path: Path):
    """Every call in a file of something that may run code from a hub or a folder: (where, name, keywords)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in MAY_RUN_CODE:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", name, {word.arg: word.value for word in node.keywords}


def test_every_call_that_may_run_code_says_that_it_must_not():
    found = [call for path in SOURCES for call in calls(path)]
    assert {name for _, name, _ in found} == {*MAY_RUN_CODE} and len(found) >= 8
    lax = [where for where, _, words in found if getattr(words.get("trust_remote_code"), "value", None) is not False]
    assert not lax


def test_nobody_says_that_code_is_trusted():
    trusting = [path for path in SOURCES if "trust_remote_code=True" in path.read_text(encoding="utf-8")]
    assert not trusting


def with_code(folder: Path, *, config: bool, tokenizer: bool) -> Path:
    """A target whose config, tokenizer or both name classes in a file beside them."""
    save_target(folder)
    (folder / "own.py").write_text(CODE)
    if config:
        change(folder / "config.json", model_type="own", architectures=["OwnModel"])
        change(
            folder / "config.json",
            auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        )
    if tokenizer:
        change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
        change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer"] * 2})
    return folder


def change(path: Path, **facts) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


COMMANDS = {
    "plan": ["plan", "--corpus", "chats.jsonl", "--out", "c"],
    "cache-hidden": ["cache-hidden", "--corpus", "chats.jsonl", "--out", "c", "--device", "cpu"],
    "import-cache": ["import-cache", "empty", "--out", "c", "--device", "cpu"],
}


BOTH, CONFIG, TOKENIZER = (True, True), (True, False), (False, True)


@pytest.mark.parametrize(
    ("command", "what"),
    [("plan", CONFIG), ("cache-hidden", BOTH), ("cache-hidden", TOKENIZER), ("import-cache", BOTH)],
)
def test_code_beside_a_target_does_not_run_though_stdin_says_yes(tmp_path, command, what):
    folder = with_code(tmp_path / "target", config=what[0], tokenizer=what[1])
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat}])
    (tmp_path / "empty").mkdir()
    arguments = [sys.executable, "-m", "pipeline", *COMMANDS[command], "--model", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(arguments, input="y\n" * 1000, capture_output=True, text=True, cwd=tmp_path, env=env)

    assert not [*tmp_path.rglob("-ran")]
    assert "Do you wish" not in done.stdout + done.stderr
    if what == TOKENIZER:  # its tokenizer.json says all that the code would
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr and "bug:" not in done.stderr


def test_a_known_model_with_code_beside_it_is_loaded_without_the_code(tmp_path, monkeypatch):
    from pipeline.target.loading import load_target

    monkeypatch.chdir(tmp_path)
    folder = save_target(tmp_path / "target")
    (folder / "own.py").write_text(CODE)
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.OwnModel", "AutoConfig": "own.OwnConfig"})
    assert type(load_target(str(folder))).__module__.startswith("transformers.")
    assert not [*tmp_path.rglob("-ran")]


@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_names_a_kernel_on_a_hub_is_refused(tmp_path, nested):
    from pipeline.errors import UsageError
    from pipeline.target.loading import load_target

    folder = save_target(tmp_path / "target")
    facts = {"attn_implementation": "someone/kernel"}
    change(folder / "config.json", **({"text_config": facts} if nested else facts))
    with pytest.raises(UsageError, match=r"names code on a hub \(attn_implementation = 'someone/kernel'\)"):
        load_target(str(folder))
