"""Products by oneDNN are torch's own, of whatever layout; and which CPU gets them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline import matrix_products as products
from tests.draft_cases import all_blocks, assert_near, build, cell_of, every_method, gradients, loss_of

needs_onednn = pytest.mark.skipif(not products._onednn_multiplies(), reason="torch has no oneDNN here")


def within_rounding(found, wanted_in_double):
    torch.testing.assert_close(found.double(), wanted_in_double, rtol=1e-4, atol=1e-4)


def of_layout(layout: str, rows: int, columns: int) -> torch.Tensor:
    """Return [rows, columns] of random numbers that lie in memory in this way."""
    generator = torch.Generator().manual_seed(rows)
    if layout == "rows":
        return torch.randn(rows, columns, generator=generator)
    if layout == "columns":
        return torch.randn(columns, rows, generator=generator).T
    if layout == "part of wider rows":
        return torch.randn(rows, 3 * columns, generator=generator)[:, columns : 2 * columns]
    if layout == "part of longer columns":
        return torch.randn(columns, 3 * rows, generator=generator).T[rows : 2 * rows]
    return torch.randn(rows, 1, generator=generator).expand(rows, columns)


LAYOUTS = ("rows", "columns", "part of wider rows", "part of longer columns", "one number a row")


@needs_onednn
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_a_product_does_not_depend_on_how_its_factors_lie_in_memory(monkeypatch, left, right):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    left_TI, right_IO = of_layout(left, 130, 96), of_layout(right, 96, 200)
    added_TO = torch.randn(130, 200)
    before_TO = added_TO.clone()
    assert products.by_onednn(left_TI, right_IO)
    wanted_TO = left_TI.double() @ right_IO.double()
    within_rounding(products.product(left_TI, right_IO), wanted_TO)
    monkeypatch.setattr(products, "REUSED_BYTES", 4 * 130 * 90)  # so that it is written in three parts
    out_TO = torch.empty(130, 200)
    assert products.write_product(out_TO, left_TI, right_IO) is out_TO
    within_rounding(out_TO, wanted_TO)
    products.write_product(added_TO, left_TI, right_IO, added_TO=added_TO)
    within_rounding(added_TO, before_TO.double() + wanted_TO)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_has_the_gradients_of_torchs(monkeypatch, bias):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    x = torch.randn(3, 70, 96, requires_grad=True)
    weight = torch.randn(80, 96, requires_grad=True)
    tensors = [x, weight] + [torch.randn(80, requires_grad=True)] * bias
    grad = torch.randn(3, 70, 80)
    out = products.linear(*tensors)
    assert type(out.grad_fn).__name__ != "AddmmBackward0" and out.shape == (3, 70, 80)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted = F.linear(*doubles)
    within_rounding(out.detach(), wanted.detach())
    found = torch.autograd.grad(out, tensors, grad)
    for gradient, wanted_gradient in zip(found, torch.autograd.grad(wanted, doubles, grad.double()), strict=True):
        within_rounding(gradient, wanted_gradient)


@needs_onednn
@every_method
def test_a_draft_learns_the_same_by_either_library(monkeypatch, method):
    calls, onednn_product = [], products.onednn_product
    monkeypatch.setattr(products, "SMALLEST", 0)
    monkeypatch.setattr(products, "onednn_product", lambda *factors: calls.append(1) or onednn_product(*factors))
    cell, found = cell_of(20, 30), {}
    for by_onednn in (True, False):
        monkeypatch.setattr(products, "onednn_is_faster", lambda by_onednn=by_onednn: by_onednn)
        draft = build(method)
        loss = loss_of(draft, cell, all_blocks(draft, cell)).total
        found[by_onednn] = {"loss": loss.detach(), **gradients(draft, loss)}
    for name, wanted in found[False].items():
        assert_near(found[True][name], wanted, 1e-5)
    assert len(calls) > 30  # of the layers, the head and their gradients


def test_a_models_linear_modules_keep_their_weights_and_names():
    class OtherLinear(nn.Linear):
        """As a quantised one is."""

    model = nn.Sequential(nn.Linear(4, 8), OtherLinear(8, 4))
    before, x = dict(model.state_dict()), torch.randn(3, 4)
    wanted = model(x)
    assert products.compute_by_linear(model) is model
    assert [type(module) for module in model] == [products.Linear, OtherLinear]
    assert torch.equal(model(x), wanted) and model.state_dict().keys() == before.keys()
    assert all(model.state_dict()[name].data_ptr() == weight.data_ptr() for name, weight in before.items())


@pytest.mark.parametrize(
    "maker, faster",
    [("AuthenticAMD", True), ("HygonGenuine", True), ("GenuineIntel", False)],
)
def test_only_a_cpu_that_intel_did_not_make_multiplies_by_onednn(tmp_path, monkeypatch, maker, faster):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\nmodel name\t: any\n")
    monkeypatch.setattr(products, "CPU_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(products, "_onednn_multiplies", lambda: True)
    assert products.onednn_is_faster.__wrapped__() == faster


@pytest.mark.parametrize("facts", [None, "processor: 0\nFeatures: fp asimd\n"])
def test_a_cpu_that_names_no_maker_keeps_torchs_products(tmp_path, monkeypatch, facts):
    monkeypatch.setattr(products, "CPU_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    if facts is not None:
        (tmp_path / "cpuinfo").write_text(facts)
    assert not products.onednn_is_faster.__wrapped__()


def test_a_torch_without_this_operator_keeps_its_own_products(monkeypatch):
    def missing(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(products, "onednn_product", missing)
    assert not products._onednn_multiplies()


@pytest.mark.parametrize("kind", ["small", "bfloat16", "autocast", "another device"])
def test_what_onednn_gains_nothing_for_stays_torchs_own(monkeypatch, kind):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    size = 8 if kind == "small" else 128
    device = "meta" if kind == "another device" else "cpu"
    left = torch.ones(size, size, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32, device=device)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert not products.by_onednn(left, left)
