"""Quantised targets: refused when planning, with what to install, and captured where that is installed."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import config, conversations, random_model, save_target, write_jsonl

from pipeline.cli import main
from pipeline.errors import UsageError
from pipeline.target.config import PACKAGES, check_quantised, load_config, quantised_by
from pipeline.target.model import load_target
from stages.cache_hidden.run import run
from stages.cache_hidden.settings import CaptureOptions

BLOCK = 128
CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "hqq": {"quant_method": "hqq", "quant_config": {"nbits": 4}},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "torchao": {"quant_method": "torchao", "quant_type": "int8wo"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    "mxfp4": {"quant_method": "mxfp4"},
}


def quantise(folder, facts, nested=False):
    path = folder / "config.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "quantization_config": facts}))
    return folder


def missing(method):
    """The packages of a method that are not here."""
    absent = []
    for package, module in PACKAGES[method].items():
        try:
            absent += [package] * (find_spec(module) is None)
        except ModuleNotFoundError:
            absent.append(package)
    return absent


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_a_quantised_target_is_refused_at_plan_with_the_packages_to_install(method, tmp_path, capfd):
    if not missing(method):
        pytest.skip("all that it needs is here")
    folder = quantise(save_target(tmp_path / "target"), CONFIGS[method])
    corpus = write_jsonl(tmp_path / "chats.jsonl", conversations(3))
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["plan", "--model", str(folder), "--corpus", str(corpus), "--out", str(tmp_path / "c")])
    lines = capfd.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(lines) == 1, lines
    assert f"is quantised ({method}), and what loads it is not here" in lines[0]
    assert f"`pip install {' '.join(missing(method))}`" in lines[0]
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("facts", [{"quant_method": "of tomorrow"}, {"bits": 4}])
def test_an_unknown_quantisation_is_refused_in_one_line(tmp_path, facts):
    folder = quantise(save_target(tmp_path / "target"), facts)
    with pytest.raises(UsageError, match="is quantised") as found:
        load_target(str(folder))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("lm_head.qweight", torch.int32), ("lm_head.weight_packed", torch.int8), ("lm_head.weight", torch.float8_e4m3fn)],
)
def test_a_quantised_head_is_refused_as_no_draft_can_share_it(tmp_path, name, kind):
    folder = quantise(save_target(tmp_path / "target"), CONFIGS["fp8"])
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file({**tensors, name: head.to(kind)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=rf"embedding or LM head is quantised \({name}"):
        check_quantised(folder, load_config(folder))


def test_a_target_that_is_not_quantised_is_not_asked_for_packages(tiny_target):
    assert quantised_by(load_config(tiny_target)) is None
    check_quantised(tiny_target, load_config(tiny_target))


def fp8_target(folder):
    """A target whose layers are fp8 in blocks of 128, head and embedding dense; and its weights as they are meant."""
    save_target(folder)
    random_model(config(hidden_size=256, intermediate_size=256, head_dim=64)).save_pretrained(folder)
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if name.startswith("model.layers.") and name.endswith("proj.weight"):
            rows, columns = weight.shape
            blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448.0
            wide = scale[:, None, :, None]
            packed = (blocks / wide).to(torch.float8_e4m3fn)
            stored[name] = packed.reshape(rows, columns)
            stored[f"{name}_scale_inv"] = scale
            meant[name] = (packed.float() * wide).reshape(rows, columns)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return quantise(folder, CONFIGS["fp8"]), meant


@pytest.mark.skipif(bool(missing("fp8")), reason="needs accelerate")
def test_an_fp8_target_is_captured_where_its_package_is_there(tmp_path):
    folder, meant = fp8_target(tmp_path / "target")
    loaded = load_target(str(folder)).state_dict()
    for name, weight in meant.items():
        torch.testing.assert_close(loaded[name].float(), weight, rtol=1e-2, atol=1e-3)
    corpus = write_jsonl(tmp_path / "chats.jsonl", conversations(6))
    done = run(str(folder), str(corpus), tmp_path / "cache", options=CaptureOptions(layers="1,3", max_length=128))
    assert done.left == 0 and done.refused == 0
