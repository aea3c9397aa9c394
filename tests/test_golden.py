"""Numbers of public reference implementations, matched within the tolerances stated beside them.

Runs every case and every `decode-*` folder of the folder named by GOLDEN_DIR (by default `golden/reference`); methods
that do not exist here are skipped by name. A case is a JSON with a `.safetensors` beside it.

    B batch rows   T positions   N blocks   S slots   D hidden size   V vocabulary
"""

import json
import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from draft_cases import dense_hidden
from safetensors import safe_open

from pipeline.drafts import (
    DRAFTS,
    Blocks,
    Cell,
    Draft,
    DraftConfig,
    draft_config,
    lay_blocks,
    metrics_of,
    pack,
)
from pipeline.drafts.draft import Loss
from pipeline.evaluation.decode import speculative_decode
from pipeline.published import load_draft_folder
from pipeline.target.head import TargetHead
from pipeline.target.loading import load_target
from pipeline.target.model import head_of

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden" / "reference"))
CASES = sorted(path.stem for path in GOLDEN.glob("*.json") if path.with_suffix(".safetensors").exists())
DECODES = sorted(path.name for path in GOLDEN.glob("decode-*") if path.is_dir())
SCALAR, LOGITS, GRADIENT, GRADIENT_NORM = 1e-5, 1e-5, 1e-5, 1e-4


@dataclass(frozen=True)
class Rows:
    """One batch row, as `pack` reads samples."""

    ids: torch.Tensor
    mask: torch.Tensor
    aux: torch.Tensor
    final: torch.Tensor | None
    final_rows: torch.Tensor


@dataclass(frozen=True)
class Case:
    """A reference case, and our draft with its parameters on its blocks."""

    facts: dict
    tensors: dict[str, torch.Tensor]
    draft: Draft
    cell: Cell
    blocks: Blocks

    @property
    def kept(self) -> torch.Tensor:
        """Which of the reference's blocks are no padding, which is not laid here."""
        return self.tensors["block_keep_mask"].flatten().bool()

    def by_block(self, name: str) -> torch.Tensor:
        """A reference tensor as [B * N, S, ...], whether it came with blocks and slots in one axis or two."""
        return self.tensors[name].reshape(len(self.kept), self.draft.config.block_size, *self.trailing(name))

    def trailing(self, name: str) -> tuple[int, ...]:
        wide = dict.fromkeys(["draft_hidden", "aligned_target_hidden"], self.draft.config.hidden_size)
        if name.endswith("_logits"):
            return (self.draft.config.vocab_size,)
        return (wide[name],) if name in wide else ()

    @property
    def grad_lambda(self) -> float:
        """The lambda that gradients and single scalars are of."""
        return number(self.facts["scalars"].get("grad_lambda", 0.0))

    def lambdas(self) -> dict[float, float]:
        """Expected loss for each lambda."""
        scalars = self.facts["scalars"]
        losses = scalars.get("losses_by_lambda", {self.grad_lambda: scalars["loss"]})
        return {float(key): number(value) for key, value in losses.items()}

    def loss(self, lambda_base: float, metrics: bool = False) -> Loss:
        dens = self.draft.denominators(self.blocks)  # SpecForge's DSpark divides by the bare sum
        if self.facts["method"] == "domino":
            dens = {name: den + 1e-6 for name, den in dens.items()}
        return self.draft.loss(self.cell, self.blocks, {"lambda_base": lambda_base}, dens, metrics)


def case_config(facts: dict, parameters: set[str]) -> DraftConfig:
    """Every `config` there carries all methods' keys: only those of the case's method are taken."""
    given, method = facts["config"], facts["method"]
    fields = {
        "method": method,
        "hidden_size": given["hidden"],
        "intermediate_size": given["inter"],
        "num_hidden_layers": given["draft_layers"],
        "num_attention_heads": given["heads"],
        "num_key_value_heads": given["kv"],
        "head_dim": given["head_dim"],
        "vocab_size": given["vocab"],
        "rms_norm_eps": given.get("rms_norm_eps", 1e-6),
        "rope_theta": given["rope_theta"],
        "max_position_embeddings": given.get("max_position_embeddings", 4096),
        "attention_bias": any(name.endswith("q_proj.bias") for name in parameters),
        "layer_types": tuple(given.get("layer_types") or ()),
        "num_target_layers": given["num_target_layers"],
        "target_layer_ids": tuple(facts["target_layer_ids"]),
        "block_size": given["block"],
        "mask_token_id": given["mask_token_id"],
        "shift_label": method == "dspark" or (method == "domino" and given["shift_label"]),
        "gamma": given["gamma"],
    }
    if "sliding_attention" in fields["layer_types"]:
        fields["sliding_window"] = given["sliding_window"]
    if method == "domino":
        fields |= {
            "emb_dim": given["emb"],
            "gru_hidden_dim": given["gru"],
            "pure_draft_prefix_len": given["pure"],
        }
    if method == "dspark":
        fields |= {
            "markov_rank": given["markov_rank"],
            "markov_head_type": given["markov_type"],
            "enable_confidence_head": given["confidence"],
            "confidence_head_with_markov": given["confidence_with_markov"],
            "alpha_ce": given["ce"],
            "alpha_l1": given["l1"],
            "alpha_confidence": given["conf_alpha"],
        }
    kind = facts["scalars"].get("loss_type", "")
    if kind.startswith("dpace"):
        fields |= {"weighting": kind, "dpace_alpha": 0.5}
    return draft_config(**fields)


@cache
def load(name: str) -> Case:
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    if facts["method"] not in DRAFTS:
        pytest.skip(f"no method {facts['method']} yet")
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
    parameters = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
    config = case_config(facts, set(parameters))
    draft = DRAFTS[config.method](config, TargetHead(tensors["embed_tokens.weight"], tensors["lm_head.weight"]))
    draft.load_state_dict(parameters, strict=True)

    states_BTKD = tensors["hidden_states"].unflatten(-1, (-1, config.hidden_size))
    final_BTD = tensors.get("target_last_hidden_states", [None] * len(states_BTKD))
    batch = zip(tensors["input_ids"], tensors["loss_mask"] > 0.5, states_BTKD, final_BTD, strict=True)
    samples = [
        Rows(ids_T, mask_T, aux_TKD.transpose(0, 1), final_TD, torch.arange(len(ids_T)))
        for ids_T, mask_T, aux_TKD, final_TD in batch
    ]
    names = [f"row {row}" for row in range(len(samples))]
    cell = pack(samples, names, final="target_last_hidden_states" in tensors)
    anchors_BN = tensors["anchor_positions"] + cell.starts_M[:, None]
    blocks = lay_blocks(cell, anchors_BN.flatten()[tensors["block_keep_mask"].flatten().bool()], config)
    return Case(facts, tensors, draft, cell, blocks)


def numbers(value) -> list[float]:
    """The numbers of a scalar: one, or a list of them (of lists), as references write tensors of any shape."""
    return [one for part in value for one in numbers(part)] if isinstance(value, list) else [float(value)]


def number(value) -> float:
    """A scalar that is one number, bare or in a list."""
    (one,) = numbers(value)
    return one


def pairs(found: float | list[float], wanted, key: str) -> list[tuple[float, float]]:
    """Return what is to be compared: number by number, or the sums where only one side tells positions apart."""
    ours, theirs = numbers(found), numbers(wanted)
    if len(ours) != len(theirs) and 1 in (len(ours), len(theirs)) and key.endswith(("num", "den", "denom")):
        ours, theirs = [math.fsum(ours)], [math.fsum(theirs)]
    return list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else []


def assert_scalar(found: float | torch.Tensor, wanted: float, what: str) -> None:
    found = float(torch.as_tensor(found).detach())
    assert abs(found - wanted) <= SCALAR * abs(wanted), f"{what}: {found}, reference {wanted}"


def assert_close(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)}, reference {tuple(wanted.shape)}"
    error, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    assert error <= LOGITS * size, f"{what}: off by {error:.3g}, largest {size:.3g}"


def test_there_is_something_to_run():
    assert CASES or DECODES, f"{GOLDEN} holds no case and no decode-* folder"


@pytest.mark.parametrize("name", CASES)
def test_blocks(name):
    case = load(name)
    ours = {
        "target_ids": case.blocks.labels_NS,
        "eval_mask": case.blocks.scored_NS,
        "prev_ids": case.blocks.prev_NS,
        "noise_ids": case.blocks.input_ids_NS,
    }
    for key in ours.keys() & case.tensors.keys():
        wanted = case.by_block(key)
        assert torch.equal(ours[key].to(wanted.dtype), wanted[case.kept]), key
    if "weight_mask" in case.tensors and case.draft.config.weighting == "decay":
        assert_close(case.blocks.weights_NS, case.by_block("weight_mask")[case.kept], "weight_mask")
    if "aligned_target_hidden" in case.tensors:
        scored = case.blocks.scored_NS
        ours = case.cell.final_FD[case.cell.final_at_R[case.blocks.final_row_NS]]
        assert torch.equal(ours[scored], case.by_block("aligned_target_hidden")[case.kept][scored])


@pytest.mark.parametrize("dense", [False, True], ids=["grouped", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_hidden_and_logits(name, dense):
    case = load(name)
    with torch.no_grad():
        hidden = dense_hidden if dense else type(case.draft).hidden
        hidden_NSD = hidden(case.draft, case.cell, case.blocks)
        logits = case.draft.logits(hidden_NSD, case.blocks.prev_NS)
        sure = case.draft.confidence(hidden_NSD, case.blocks.prev_NS) if "confidence" in case.tensors else None
    ours = {"draft_hidden": hidden_NSD, "final_logits": logits["final"], "base_logits": logits.get("base")}
    ours |= {"confidence": sure}
    if ours["base_logits"] is None:  # one kind of logits, which the reference calls base
        ours["base_logits"] = logits["final"]
    for key in ours.keys() & case.tensors.keys():
        assert_close(ours[key], case.by_block(key)[case.kept], key)


@pytest.mark.parametrize("name", CASES)
def test_losses(name):
    case = load(name)
    scalars = case.facts["scalars"]
    for lambda_base, wanted in case.lambdas().items():
        assert_scalar(case.loss(lambda_base).total, wanted, f"loss at lambda {lambda_base}")
    for key in ("loss", "loss_chunk2", "loss_nochunk"):
        if key in scalars:
            assert_scalar(case.loss(case.grad_lambda).total, number(scalars[key]), key)


@pytest.mark.parametrize("name", CASES)
def test_every_scalar_we_recognise(name):
    case = load(name)
    scalars = case.facts["scalars"]
    ours = recognised(case, case.loss(case.grad_lambda, metrics=True))
    compared = {key: pairs(ours[key], scalars[key], key) for key in ours.keys() & scalars.keys()}
    assert any(compared.values()), "no scalar of the case has a name that we know"
    for key, each in compared.items():
        for found, wanted in each:
            assert_scalar(found, wanted, key)


def of_dspark(case: Case, loss: Loss) -> dict[str, float | list[float]]:
    """Our figures of DSpark under the reference's names."""
    sums, terms = loss.sums, loss.terms
    figures = metrics_of(sums, terms, case.draft.denominators(case.blocks))
    return {
        "loss": float(loss.total.detach()),
        "loss_den": float(case.draft.denominators(case.blocks)["ce"]),
        "ce_num": float(terms["ce"]),
        "l1_num": float(terms["l1"]),
        "confidence_num": float(terms["confidence"]),
        "confidence_error_num": float(sums["confidence_error"]),
        "accuracy": figures["accuracy"],
        "correct_num": float(sums["correct_S"].sum()),
        "eval_den": float(sums["scored_S"].sum()),
        "ce_position_num": sums["ce_S"].tolist(),
        "correct_position_num": sums["correct_S"].tolist(),
        "position_den": sums["scored_S"].tolist(),
        "teacher_agreement_num": float(sums["teacher_agreement"]),
        "teacher_top1_num": float(sums["teacher_top1"]),
        "draft_top1_num": float(sums["draft_top1"]),
        "tau_num": float(sums["tau"]),
        "tau_den": float(sums["blocks"]),
    }


def recognised(case: Case, loss: Loss) -> dict[str, float | list[float]]:
    """Our figures under the reference's names; its ratios are num / (den + 1e-6), a plain DFlash loss num / den."""
    if case.facts["method"] == "dspark":
        return of_dspark(case, loss)
    sums, terms, plain = loss.sums, loss.terms, case.facts["method"] == "dflash"
    den = float(case.draft.denominators(case.blocks)["final"])
    scored, blocks = float(sums["scored_S"].sum()), float(sums["blocks"])
    correct, accept = float(sums["correct_S"].sum()), float(sums["accept"])
    ours = {
        "loss_num": float(terms["final"]),
        "final_num": float(terms["final"]),
        "final_loss": float(terms["final"]) / (den + 1e-6),
        "correct_num": correct,
        "accuracy_den": scored,
        "accuracy_denom": scored,
        "accuracy": correct / (scored + 1e-6),
        "accept_num": accept,
        "accept_den": blocks,
        "accept_len": accept / (blocks + 1e-6),
    }
    if case.draft.config.weighting == "decay":
        ours["loss_den"] = den
    if not plain:
        base_correct, base_accept = float(sums["base_correct_S"].sum()), float(sums["base_accept"])
        ours |= {
            "base_num": float(terms["base"]),
            "base_loss": float(terms["base"]) / (den + 1e-6),
            "base_correct_num": base_correct,
            "base_accuracy": base_correct / (scored + 1e-6),
            "base_accept_num": base_accept,
            "base_accept_len": base_accept / (blocks + 1e-6),
        }
    return ours


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    case = load(name)
    if "grad_norm" not in case.facts and not any(key.startswith("grad.") for key in case.tensors):
        pytest.skip(f"{name} holds no gradients")
    case.draft.zero_grad(set_to_none=True)
    case.loss(case.grad_lambda).total.backward()
    for key, parameter in case.draft.named_parameters():
        full = case.tensors.get(f"grad.{key}")
        if full is not None:
            error = float((parameter.grad - full).norm())
            assert error <= GRADIENT * float(full.norm()), f"{key}: off by {error:.3g} of {float(full.norm()):.3g}"
        norm, total = (case.facts.get(name, {}).get(key) for name in ("grad_norm", "grad_sum"))
        norm, total = (None if value is None else number(value) for value in (norm, total))
        if norm is not None:
            found = float(parameter.grad.double().norm())
            assert abs(found - norm) <= GRADIENT_NORM * norm, f"norm of {key}: {found}, reference {norm}"
        if norm is not None and total is not None:
            found, slack = float(parameter.grad.double().sum()), GRADIENT * norm * math.sqrt(parameter.numel())
            assert abs(found - total) <= slack, f"sum of {key}: {found}, reference {total}"


@pytest.mark.parametrize("name", DECODES)
def test_decoding(name):
    check_decoding(GOLDEN / name)


def check_decoding(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    if expected["method"] not in DRAFTS:
        pytest.skip(f"no method {expected['method']} yet")
    target = load_target(str(folder / "target"), device="cpu", dtype="float32")
    draft = load_draft_folder(folder / "draft", head_of(target))
    assert draft.config.method == expected["method"]
    # There a block of b drafts b - 1 tokens, under either label convention; only DSpark's decoding drafts all b.
    limit = draft.config.block_size - (expected["method"] != "dspark")
    prompts = [json.loads(line)["input_ids"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    for prompt, row in zip(prompts, expected["rows"], strict=True):
        decoded = speculative_decode(target, draft, prompt, expected["max_new"], proposals=limit)
        assert decoded.lengths == row["acc"]
        assert prompt + decoded.ids == row["output_ids"]
