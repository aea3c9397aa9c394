"""The script that runs in vLLM's Python, as far as it can be tested without vLLM: its imports, and the mend of a kernel
with the fault that vLLM's has."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import engine_process
from stages.serve_check import vllm_script
from stages.serve_check.compare import compare

SCRIPT = Path(vllm_script.__file__)


def test_the_script_imports_nothing_of_this_project():
    names = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    assert not names & {"pipeline", "stages", "tests"}
    assert names - sys.stdlib_module_names == {"torch", "vllm", "safetensors", "engine_side"}


def test_the_script_ends_when_what_started_it_is_gone():
    code = "import engine_side, time; engine_side.end_with_parent(); print('there', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=engine_process.INSIDE, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"there\n"
    assert process.poll() is None
    process.stdin.close()  # as the kernel does for a process that was killed
    assert process.wait(30) == 1
    process.stdout.close()


def norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def row_0_for_all(out, x, weight, eps):
    """vLLM's kernel for CPUs: it reads its weight from its first number on, whatever its shape."""
    out.copy_(norm(x, weight.flatten()[: x.shape[-1]], eps))


def every_row(out, x, weight, eps):
    out.copy_(norm(x, weight[:, None, None] if weight.dim() > 1 else weight, eps))


def test_a_kernel_that_takes_the_first_layers_norm_for_all_is_mended():
    ops = SimpleNamespace(rms_norm=row_0_for_all)
    assert vllm_script.cpu_rms_norm_2d(ops)
    x, weight = torch.randn(4, 3, 2, 8), torch.rand(4, 8)
    out, wanted = torch.empty_like(x), torch.empty_like(x)
    ops.rms_norm(out, x, weight, 1e-5)
    every_row(wanted, x, weight, 1e-5)
    assert torch.allclose(out, wanted)
    one = torch.empty(5, 8)
    ops.rms_norm(one, x.flatten(0, 2)[:5], weight[1], 1e-5)
    assert torch.allclose(one, norm(x.flatten(0, 2)[:5], weight[1], 1e-5))
    assert not vllm_script.cpu_rms_norm_2d(ops)  # what is right is left alone


def test_a_right_kernel_is_left_alone():
    ops = SimpleNamespace(rms_norm=every_row)
    assert not vllm_script.cpu_rms_norm_2d(ops)
    assert ops.rms_norm is every_row


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "ValueError: Model Runner V1 does not support: dspark",
            "ValueError: Model Runner V1 does not support: dspark",
        ),
        ("[rank0]: RuntimeError: it broke", "RuntimeError: it broke"),
        ("INFO 11-29 all is well", "INFO 11-29 all is well"),
        ("(pid=7) ERROR 11-29 [core.py:1] ValueError: ['A'] is not supported", "ValueError: ['A'] is not supported"),
    ],
)
def test_the_last_error_of_a_log_is_what_is_said(line, said):
    assert said in engine_process.last_words(["Traceback (most recent call last):", *line.split("\n")])


def test_what_pydantic_was_given_is_not_said():
    lines = [
        "pydantic_core.ValidationError: 1 validation error for VllmConfig",
        "  Value error, no such type [type=value_error, input_value=ArgsKwargs((), {'a': 1})]",
        "    For further information visit https://errors.pydantic.dev",
    ]
    assert engine_process.last_words(lines).endswith("1 validation error for VllmConfig / Value error, no such type")


def sample(lengths, accepted):
    return SimpleNamespace(lengths=lengths, accepted=accepted)


def test_gains_are_compared_call_by_call_and_the_means_in_the_engines_counting():
    samples = [sample([3, 2, 8], [2, 1, 7]), sample([4, 4, 1], [3, 5, 0]), sample([], [])]
    replies = [{"ids": [1], "gains": [3, 2, 6]}, {"ids": [2], "gains": [4, 3, 2]}, {"ids": [3], "gains": []}]
    found = compare(replies, {"drafts": 6, "proposed": 42, "accepted": 18}, samples, [[1], [9], [3]], 12)
    assert (found.identical, found.equal, found.calls, found.calls_expected) == (2, 2, 6, 6)
    (difference,) = found.differences
    assert (difference.prompt, difference.call, difference.expected, difference.found) == (1, 1, 4, 3)
    assert found.engine_accept_len == found.engine_accept_len_expected == 1 + 18 / 6
    assert not found.gains_equal and not found.lossless
    shorter = compare([{"ids": [1], "gains": [3]}], None, samples[:1], [[1]], 12)
    assert (shorter.differences[0].call, shorter.differences[0].found) == (1, None)
    assert shorter.engine_accept_len is None
