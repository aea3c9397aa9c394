"""Secrets: masked in command lines and messages, and in nothing that a command leaves or prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cache import HiddenCache
from pipeline.cache.schema import read_log
from pipeline.runs.folder import read_run
from pipeline.runs.training_data import recapture_command
from pipeline.secret_masking import masked, masked_command
from stages.cache_hidden.capture_log import request_of, unchanged_columns
from stages.cache_hidden.repair import suggest_repair
from stages.cache_hidden.run import plan
from stages.cache_hidden.run import run as capture
from stages.cache_hidden.settings import CaptureOptions
from stages.doctor.acceptance import off_policy_of

ROOT = Path(__file__).parents[1]
# In the environment, and on a command line in every form.
VARIABLES = {
    "WANDB_API_KEY": f"{'0' * 26}c4n4ryWandb999",
    "HF_TOKEN": "hf_c4n4ryHubHubHubHubHub",
    "OPENAI_API_KEY": "c4n4ryOpenAi",
    "MY_PASSWORD": "c4n4ryWord",
}
TYPED = [
    *("--api-key", "c4n4ryTyped"),
    "--hf-token=c4n4ryAssigned",
    "https://me:c4n4ryUser@host/v1",
    *("--engine-option", "hf_token=c4n4ryOption"),
    "c4n4ryOpenAi",
]


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (["x", "--api-key", "abc", "--out", "y"], ["x", "--api-key", "***", "--out", "y"]),
        (["--api-key=abc", "--token", "--token"], ["--api-key=***", "--token", "***"]),
        (["https://me:pw@host:80/v1?a=1"], ["https://***@host:80/v1?a=1"]),
        (["--set", "train.lr=1", "--set", "hf_token=abc"], ["--set", "train.lr=1", "--set", "hf_token=***"]),
        (["--template-kwargs", '{"api_key": "abc", "n": 1}'], ["--template-kwargs", '{"api_key": ***, "n": 1}']),
        (["out/of-the-v4riable", "of-the-v4riable"], ["out/***", "***"]),
        ([f"hf_{'aBc' * 12}", f"sk-{'a1b' * 12}"], ["***", "***"]),
        (["X-Api-Key: abc", "Authorization: Basic YTpi"], ["X-Api-Key: ***", "Authorization: Basic ***"]),
    ],
)  # fmt: skip
def test_secrets_of_a_command_line(typed, shown):
    assert masked_command(typed, {"SOME_TOKEN": "of-the-v4riable"}) == shown


def test_what_is_no_secret_stays():
    words = ["--batch-tokens", "4096", "--api-key-env", "OPENAI_API_KEY", "--set", "draft.mask_token_id=260", "--no-token-ids"]  # fmt: skip  # noqa: E501
    assert masked_command(words, {"X_TOKEN": "4096"}) == words, "a short value is no secret"
    words = ["hf_hidden_states_8b", "data/hf_ultrachat_200k.jsonl", "--engine-option", "eos_token=</s>", "--eos-token", "</s>"]  # fmt: skip  # noqa: E501
    words += ["--out", "runs/research/one", "Basic settings"]
    variables = {"PROJECT_KEY": "research", "CACHE_KEY": "ultrachat_200k", "MY_TOKEN": "research"}
    assert masked_command(words, variables) == words, "words in the environment are no secrets"
    assert (
        masked('"eos_token": "<|im_end|>", pad-token: <pad12345>', {})
        == '"eos_token": "<|im_end|>", pad-token: <pad12345>'
    )
    lines = ["no mask token: pass one, such as --set draft.mask_token_id=3", "the first token: 5", "http://a/b@c"]
    lines += ["https://host:80/v1/a@b", "https://host/?mail=me@x.y", "https://host:80, me@x.y", "http://[::1]:80/a@b"]
    assert [masked(line, {"A_KEY": ""}) for line in lines] == lines


def test_secrets_in_messages():
    assert masked("GET https://u:p@h failed: token=abc, then Bearer xyz.", {}) == (
        "GET https://***@h failed: token=***, then Bearer ***"
    )
    assert masked("a" * 100_000, {}) == "a" * 100_000


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("https://me:p@ss@host/x 'http://u:p/w@h' a@b", "https://***@host/x 'http://***@h' a@b"),
        ("https://me:p/w@host", "https://***@host"),
        ("the token password: hunter2", "the token password: ***"),
        ("  api_key: abc\n  secret: 'aBcDefGhi'", "  api_key: ***\n  secret: ***"),
        ('{"Authorization": "Basic YTpi"}, Basic dXNlcjpwYXNz', '{"Authorization": "Basic ***"}, Basic ***'),
        ("hunter2X9", "***"),
    ],
)
def test_secrets_of_logs(line, shown):
    assert masked(line, {"PGPASSWORD": "hunter2X9"}) == shown


def test_a_log_of_a_capture_holds_none():
    request = request_of("https://me:c4n4ry@hub/model", "https://me:c4n4ry@hub/set", CaptureOptions())
    assert "c4n4ry" not in request.model_dump_json()
    assert request.model == "https://***@hub/model"


def test_a_capture_is_found_again_whatever_its_paths_are_called(tiny_target, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "Set200k-of-all")
    corpus = tmp_path / "Set200k-of-all" / f"hf_{'aBc' * 12}.jsonl"
    corpus.parent.mkdir()
    corpus.write_bytes(tiny_corpus.read_bytes())
    out, options = tmp_path / "cache", CaptureOptions(layers="1,3", max_length=256, max_samples=8)
    plan(str(tiny_target), str(corpus), out, options=options)
    request, record = request_of(str(tiny_target), str(corpus), options), read_log(out)
    assert record.request.corpus == str(corpus) and unchanged_columns(record, request)
    assert str(tiny_target) in suggest_repair(out, None, False)
    capture(str(tiny_target), str(corpus), out, options=options)
    assert str(corpus) in recapture_command(HiddenCache.open(out))
    assert str(corpus) in off_policy_of(HiddenCache.open(out), 0, 9, "").remedy


def ran(*words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | VARIABLES | variables | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=300)


def leaks(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and b"c4n4ry" in path.read_bytes()]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_nothing_that_a_training_writes_or_prints_holds_a_secret(tiny_cache, tmp_path, tracker):
    pytest.importorskip(tracker)
    sets = ("draft.method=dflash", "draft.block_size=4", "train.batch=4", "train.anchors=6", "train.log_every=1")
    sets += ("train.steps=2", f'train.track=["{tracker}"]')
    code = (
        "from pathlib import Path; from stages.train_draft.run import run; "
        f"run(Path({str(tiny_cache)!r}), None, {sets!r}, Path({str(tmp_path / 'run')!r}), 'cpu')"
    )
    done = ran("-c", code, *TYPED, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    command = read_run(tmp_path / "run").command
    assert len(command) == 1 + len(TYPED) and "https://***@host/v1" in command
    assert leaks(tmp_path) == [] and list((tmp_path / "run" / tracker).iterdir())
    assert "c4n4ry" not in done.stdout + done.stderr


def test_nothing_that_a_capture_writes_or_prints_holds_a_secret(tiny_target, tiny_corpus, tmp_path):
    code = (
        "from pathlib import Path; from stages.cache_hidden.run import run; "
        "from stages.cache_hidden.settings import CaptureOptions; "
        f"run({str(tiny_target)!r}, {str(tiny_corpus)!r}, Path({str(tmp_path / 'cache')!r}), "
        "options=CaptureOptions(layers='1,3', max_length=256, max_samples=8))"
    )
    done = ran("-c", code, *TYPED)
    assert done.returncode == 0, done.stderr
    assert leaks(tmp_path) == [] and "c4n4ry" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["train-draft", "--init-from", "https://me:c4n4ryUser@host/draft"],
        ["train-draft", "--cache", "hf_c4n4ryHubHubHubHubHub", "--debug"],
        ["--debug", "train-draft", "--cache", "c4n4ryOpenAi"],
        ["regenerate", "--corpus", "x", "--out", "x.jsonl", "--endpoint", "ftp://me:c4n4ryUser@host"],
        ["cache-hidden", "--model", "c4n4ryOpenAi/x", "--corpus", "https://me:c4n4ryUser@host/x"],
        ["inspect", "c4n4ryOpenAi"],
    ],
)
def test_no_error_line_holds_a_secret(words, tmp_path):
    done = ran("-m", "pipeline", *words, HF_HUB_OFFLINE="1")
    assert done.returncode != 0 and done.stderr
    assert "c4n4ry" not in done.stdout + done.stderr, done.stderr
