"""Quantised targets: refused when planning, with what to install, and captured where that is installed."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import config, conversations, random_model, save_target, write_jsonl

from pipeline.cache import HiddenCache
from pipeline.cache.catalog import Catalog
from pipeline.cache.schema import TargetName
from pipeline.cache.verify import verify
from pipeline.cli import main
from pipeline.errors import UsageError
from pipeline.target.config import PACKAGES, check_quantised, load_config, quantised_by
from pipeline.target.loading import load_target
from pipeline.target.model import run_decoder, tap_layers
from pipeline.target.probe import relative_error
from pipeline.target.weights import named_target
from stages.cache_hidden.run import run
from stages.cache_hidden.settings import CaptureOptions, resolve_settings
from stages.cache_hidden.shard_assignment import Worker

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


def float_blocks(weight):
    """Quantise a weight [O, I] to fp8 in blocks of 128 x 128: the tensors of its file, and what they mean."""
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448.0
    wide = scale[:, None, :, None]
    packed = (blocks / wide).to(torch.float8_e4m3fn)
    stored = {"weight": packed.reshape(rows, columns), "weight_scale_inv": scale}
    return stored, (packed.float() * wide).reshape(rows, columns)


def int8_rows(weight):
    """Likewise to int8 with one scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    whole = (weight / scale).round()
    return {"weight": whole.to(torch.int8), "weight_scale": scale}, whole * scale


def int4_groups(weight):
    """Quantise to int4 in groups of 128 inputs; return whole numbers [O, I] from 0, float16 scales [O, I / 128]."""
    rows, columns = weight.shape
    scale = (weight.view(rows, columns // BLOCK, BLOCK).abs().amax(2) / 7).half()
    wide = scale.float().repeat_interleave(BLOCK, 1)
    whole = (weight / wide).round().clamp(-8, 7)
    return whole.long() + 8, scale, whole * wide


def packed_int4(whole, order=range(8)):
    """Pack the last dimension, eight numbers in an int32; the first of `order` takes the lowest bits."""
    eights = whole.unflatten(-1, (-1, 8))[..., list(order)]
    return (eights << (4 * torch.arange(8))).sum(-1).to(torch.uint32).view(torch.int32)


def gptq(weight):
    whole, scale, meant = int4_groups(weight)
    rows, columns = weight.shape
    stored = {
        "qweight": packed_int4(whole).t(),
        "qzeros": packed_int4(torch.full((columns // BLOCK, rows), 7)),  # one less, by the format
        "scales": scale.t(),
        "g_idx": (torch.arange(columns) // BLOCK).int(),
    }
    return stored, meant


def awq(weight):
    whole, scale, meant = int4_groups(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    zeros = torch.full((weight.shape[1] // BLOCK, weight.shape[0]), 8)
    stored = {
        "qweight": packed_int4(whole.t(), order),
        "qzeros": packed_int4(zeros, order),
        "scales": scale.t(),
    }
    return stored, meant


INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
INT8_ROWS = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}
# By method: how a weight is quantised here, by the form of its files alone; the config; the error of the method's own
# arithmetic against the weights as they are meant, activations and sums included.
BY_HAND = {
    "fp8": (float_blocks, CONFIGS["fp8"], 0.06),
    "compressed-tensors": (int8_rows, INT8_ROWS, 0.06),
    "gptq": (gptq, CONFIGS["gptq"], 0.01),
    "awq": (awq, CONFIGS["awq"], 0.01),
}


def target_quantised(method, folder):
    """Save a target whose layers are quantised, head and embedding dense; return the model as its weights are meant."""
    quantised, facts, _ = BY_HAND[method]
    save_target(folder)
    model = random_model(config(hidden_size=256, intermediate_size=256, head_dim=64))
    model.save_pretrained(folder)
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if name.startswith("model.layers.") and name.endswith("proj.weight"):
            tensors, meant[name] = quantised(stored.pop(name))
            stored |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    quantise(folder, facts)
    model.load_state_dict(meant)
    return model


def check_captured(folder, tmp_path, **options):
    """Capture a target, which probes it; return the cache, verified."""
    corpus = write_jsonl(tmp_path / "chats.jsonl", conversations(6))
    done = run(
        str(folder), str(corpus), tmp_path / "cache", options=CaptureOptions(layers="1,3", max_length=128, **options)
    )
    assert done.left == 0 and done.refused == 0 and not verify(tmp_path / "cache").damaged
    return HiddenCache.open(tmp_path / "cache")


@pytest.mark.parametrize("method", BY_HAND)
def test_a_quantised_target_is_captured_where_its_package_is_there(method, tmp_path, capsys):
    if missing(method):
        pytest.skip(f"needs {', '.join(missing(method))}")
    model = target_quantised(method, tmp_path / "target")
    cache = check_captured(tmp_path / "target", tmp_path)
    assert cache.catalog.identity.target.quantisation == BY_HAND[method][1]
    ids_T = torch.from_numpy(cache.tokens_of(0)[0]).long()
    with torch.no_grad(), tap_layers(model, (1, 3)) as states:
        run_decoder(model, ids_T[None])
    for state_TD, layer in zip(cache.read(0).aux, (1, 3), strict=True):
        assert relative_error(state_TD, states[layer][0]) < BY_HAND[method][2]
    assert torch.equal(cache.head().head_VD, model.lm_head.weight)
    assert torch.equal(cache.head().embed_VD, model.model.embed_tokens.weight)
    main(["inspect", str(tmp_path / "cache")])
    assert f"quant_method {method}" in capsys.readouterr().out


@pytest.mark.skipif(bool(missing("bitsandbytes")), reason="needs bitsandbytes and accelerate")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_target_of_bitsandbytes_is_captured(tmp_path, bits):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shape = config(hidden_size=256, intermediate_size=256, head_dim=64)
    plain, folder = (save_target(tmp_path / name, shape) for name in ("plain", "target"))
    (folder / "model.safetensors").unlink()
    facts = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=facts, device_map="cpu").save_pretrained(folder)
    cache = check_captured(folder, tmp_path)
    assert cache.catalog.identity.target.quantisation["quant_method"] == "bitsandbytes"
    assert cache.catalog.identity.target.quantisation[f"load_in_{bits}bit"] is True


def test_the_identity_records_how_a_target_is_quantised(tmp_path):
    plain = save_target(tmp_path / "target")
    assert "quantisation" not in named_target(str(plain), plain, TargetName())
    folder = quantise(plain, CONFIGS["gptq"])
    found = named_target(str(folder), folder, TargetName())
    assert found["quantisation"] == CONFIGS["gptq"]
    without = {key: value for key, value in found.items() if key != "quantisation"}
    assert named_target(str(folder), folder, TargetName(**without)) == without  # of a cache from before it was recorded
    rows = quantise(plain, {**CONFIGS["gptq"], "bits": 8})
    assert named_target(str(rows), rows, TargetName(**found))["quantisation"]["bits"] == 8


def test_a_float16_target_that_is_quantised_runs_in_bfloat16(tmp_path, monkeypatch, capsys):
    folder = save_target(tmp_path / "target")
    config_json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config_json, "dtype": "float16"}))
    monkeypatch.setattr(Worker, "device", lambda self, named: "cuda")
    with pytest.raises(UsageError, match="names the type float16; choose one with --dtype"):
        resolve_settings(str(folder), Catalog(tmp_path / "c"), CaptureOptions())
    quantise(folder, CONFIGS["awq"])
    assert resolve_settings(str(folder), Catalog(tmp_path / "c"), CaptureOptions()).dtype == "bfloat16"
    assert "float16 is run as bfloat16; --dtype float32 is exact" in capsys.readouterr().err
