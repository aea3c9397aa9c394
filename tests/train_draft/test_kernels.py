"""Compiled kernels are used where they are equal to the plain ones, and nowhere else."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from draft_cases import build, every_method

from pipeline.drafts import block_draft, fused
from stages.train_draft import kernels

TRAIN = SimpleNamespace(steps=100, dtype="bfloat16")
CPU = torch.device("cpu")


@pytest.fixture
def on_cpu(monkeypatch):
    """Compile for a CPU, too; flex attention, which has no gradient there, is left out."""
    monkeypatch.setattr(kernels, "Kernels", lambda: fused.Kernels("cpu", lambda function: fused.compiled(function)))
    monkeypatch.setattr(block_draft, "compiles", lambda device: False)
    yield
    fused.use_kernels(None)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_kernels_take_the_step_of_the_plain_ones(on_cpu):
    draft, train = build("domino"), SimpleNamespace(steps=100, dtype="float32")
    plain = kernels.trial_step(draft, train)
    assert kernels.compile_if_equal(draft, train).startswith("kernels: compiled")
    assert fused.kernels
    found = kernels.trial_step(draft, train)
    assert kernels.difference(found, plain, (1e-6, 1e-5)) == ""
    assert any(not torch.equal(found[name], plain[name]) for name in plain)  # they did run


@every_method
def test_kernels_that_compute_something_else_are_not_used(method, on_cpu, monkeypatch):
    def wrong(function):
        if function.__name__ != "_gated_gradients":
            return function
        return lambda *tensors: tuple(gradient * 1.3 for gradient in function(*tensors))

    monkeypatch.setattr(fused, "compiled", wrong)
    line = kernels.compile_if_equal(build(method), TRAIN)
    assert "plain" in line and "differs by" in line
    assert not fused.kernels


def test_a_compiler_that_fails_leaves_the_plain_kernels(on_cpu, monkeypatch):
    def broken(function):
        raise NotImplementedError("no such architecture\nand many lines more")

    monkeypatch.setattr(fused, "compiled", broken)
    draft = build("dflash")
    line = kernels.compile_if_equal(draft, TRAIN)
    assert "no such architecture" in line and "\n" not in line
    assert not fused.kernels and all(weight.grad is None for weight in draft.parameters())


def test_a_gradient_that_is_missing_or_not_a_number_is_a_difference():
    wanted = {kernels.LOSS: torch.tensor(1.0), "fc.weight": torch.ones(3)}
    assert kernels.difference(dict(wanted), wanted, (0.1, 0.1)) == ""
    assert "fc.weight" in kernels.difference({kernels.LOSS: torch.tensor(1.0)}, wanted, (0.1, 0.1))
    assert "fc.weight" in kernels.difference(wanted | {"fc.weight": torch.full((3,), float("nan"))}, wanted, (0.1, 0.1))
    assert "loss" in kernels.difference(wanted | {kernels.LOSS: torch.tensor(1.2)}, wanted, (0.1, 0.5))


def test_on_a_cpu_kernels_are_plain():
    assert kernels.kernels_of(CPU) == "plain"
    assert not fused.compiles(CPU)
