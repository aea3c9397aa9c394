"""What a plan says of a capture's memory, and of a device that is too small for it."""

import json

import pytest
from click.testing import CliRunner

from pipeline.cli import commands
from stages.cache_hidden.device_memory import CaptureMemory

GIB = 1 << 30
SEVERAL = "take several, with --tensor-parallel or --device-map"


def memory(tokens: int = 4096, weights: int = 15 * GIB) -> CaptureMemory:
    return CaptureMemory(weights, tokens, a_token=1 << 20, probe=GIB, pinned_a_token=1 << 17)


@pytest.mark.parametrize(
    ("found", "longest", "said"),
    [
        (memory(), 3072, "it fits"),  # 19 GiB, of 21 that can be used
        (memory(8192), 3072, "IT DOES NOT FIT: --batch-tokens 4096 does"),
        (memory(16_384), 3072, "IT DOES NOT FIT: --batch-tokens 4096 does"),
        (memory(8192), 6000, f"IT DOES NOT FIT: {SEVERAL}"),  # a sample is not divided
        (memory(512, 21 * GIB), 128, f"IT DOES NOT FIT: {SEVERAL}"),
    ],
)
def test_what_does_not_fit_is_told_what_does(found, longest, said):
    lines = found.lines(longest, 24 * GIB)
    assert [line.replace(" a device of 24.0 GiB", "") for line in lines[1:]] == [said]
    assert len(found.lines(longest, None)) == 1


def test_a_batch_takes_no_less_than_the_probe():
    assert memory(64).device == 16 * GIB
    assert memory(2048).device == 17 * GIB


def test_plan_says_what_a_capture_takes(tiny_target, tiny_corpus, tmp_path):
    def plan(*more: str) -> str:
        arguments = ["plan", "--model", tiny_target, "--corpus", tiny_corpus, "--out", tmp_path / "cache", *more]
        done = CliRunner().invoke(commands, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    found = json.loads(plan("--json"))["memory"]
    assert found["fits"] is None
    assert found["device_bytes"] == found["weights_bytes"] + found["batch_bytes"]
    assert found["pinned_bytes"] > 0
    assert json.loads(plan("--json", "--device-memory", "1GiB"))["memory"]["fits"]
    shown = " ".join(plan("--device-memory", "100KiB").replace("│", " ").split())
    assert "memory" in shown and "IT DOES NOT FIT a device of 100.0 KiB: take several" in shown
