"""The loaded target: any decoder read by the layer convention, and a one-line error for damaged files."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import config, random_model, save_target
from transformers import CohereConfig, FalconConfig, Gemma2Config, GraniteConfig, LlamaConfig, Phi3Config

from pipeline.errors import UsageError
from pipeline.target.files import find_target, read_text_config, target_name, template_digest, tokenizer_digest
from pipeline.target.loading import load_target
from pipeline.target.model import decoder_layers, float32_by_layer, head_of, lm_logits, run_decoder, tap_layers
from pipeline.target.weights import target_digest, weight_files

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "qwen3": config(vocab_size=48, num_hidden_layers=4, pad_token_id=0, eos_token_id=2),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2: embedding scale, soft-cap": Gemma2Config(**SIZES, head_dim=8, sliding_window=4),
    "granite: both scales": GraniteConfig(**SIZES, embedding_multiplier=3.0, logits_scaling=8.0),
    "cohere: logit scale, tied": CohereConfig(**SIZES, logit_scale=0.25),
    "phi3": Phi3Config(**SIZES),
    "falcon: layers that return tuples": FalconConfig(**SIZES, alibi=False, new_decoder_architecture=True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_any_decoder_is_read_by_the_convention(name):
    """Layer i is entry i + 1 of `hidden_states`, -1 what enters layer 0; final and head give the target's logits."""
    model = random_model(FAMILIES[name])
    ids = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(0))
    layers = [-1, 0, 1, 2]
    with torch.no_grad():
        truth = model(ids, output_hidden_states=True)
        with tap_layers(model, layers) as taken:
            output = run_decoder(model, ids)
        again = run_decoder(model, ids)

    assert sorted(taken) == layers
    for layer in layers:
        torch.testing.assert_close(taken[layer], truth.hidden_states[layer + 1])
    torch.testing.assert_close(output.last_hidden_state, truth.hidden_states[-1])
    torch.testing.assert_close(again.last_hidden_state, output.last_hidden_state)
    head = head_of(model)
    torch.testing.assert_close(head.embed(ids), truth.hidden_states[0])
    torch.testing.assert_close(head.logits(output.last_hidden_state), truth.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lm_logits(model, output.last_hidden_state), truth.logits, rtol=1e-5, atol=1e-5)


def test_hooks_go_with_the_block_that_set_them(tiny_target):
    model = load_target(str(tiny_target))
    with tap_layers(model, [1]) as taken:
        pass
    with torch.no_grad():
        run_decoder(model, torch.tensor([[1, 2, 3]]))
    assert taken == {}


def test_a_tied_head_is_one_tensor():
    head = head_of(random_model(config(tie_word_embeddings=True)))
    assert head.tied and head.head_VD is head.embed_VD
    assert not head_of(random_model(config())).tied


def test_a_target_loads_frozen_in_the_type_asked_for(tiny_target):
    model = load_target(str(tiny_target), dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    assert load_target(str(tiny_target)).dtype == torch.float32


@pytest.fixture
def copy(tiny_target, tmp_path):
    return shutil.copytree(tiny_target, tmp_path / "copy")


def damage(folder, kind):
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif kind == "not a decoder":
        (folder / "config.json").write_text(json.dumps({"model_type": "of our own"}))
    elif kind == "the sizes of its class":
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    elif kind == "no weights":
        weights.unlink()
    elif kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "header damaged":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    elif kind == "a weight is missing":
        tensors = load_file(weights)
        del tensors["model.layers.2.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "a file of the index is missing":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no config", "without config.json; name the folder"),
        ("config is no JSON", "cannot be read"),
        ("the sizes of its class", r"describes a model of [\d,]{14} parameters, its files hold [\d,]{6};"),
        ("not a decoder", "names no num_hidden_layers"),
        ("no weights", "lacks model.safetensors"),
        ("cut short", "promises .* fetch it again"),
        ("header damaged", "damaged or no safetensors file; fetch it again"),
        ("a weight is missing", r"1 weights are missing .*layers\.2\.mlp\.up_proj"),
        ("a file of the index is missing", "lacks model-1.safetensors"),
    ],
)
def test_a_damaged_target_is_refused_in_one_line(copy, kind, says):
    damage(copy, kind)
    with pytest.raises(UsageError, match=says) as found:
        read_text_config(find_target(str(copy)))
        target_digest(copy)
        load_target(str(copy))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere", "no such folder; name a folder"),
        ("/nowhere/at/all", "no such folder"),
        ("some-org/no-such-model", "no such folder here, and the hub gave no such model .*name a folder"),
        ("not a name!", "the hub gave no such model"),
    ],
)
def test_a_target_that_does_not_exist_is_refused(name, says):
    with pytest.raises(UsageError, match=says) as found:
        load_target(name)
    assert "\n" not in str(found.value)


def test_a_file_is_no_target(tiny_corpus):
    with pytest.raises(UsageError, match="is a file"):
        load_target(str(tiny_corpus))


def test_cuda_is_refused_where_there_is_none(tiny_target):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match="--device cpu"):
        load_target(str(tiny_target), device="cuda")
    with pytest.raises(UsageError, match=r"device gpu: .*--device cpu"):
        load_target(str(tiny_target), device="gpu")


def test_the_digest_tells_targets_apart_and_knows_a_moved_one(tiny_target, copy):
    assert target_digest(copy) == target_digest(tiny_target)
    assert tokenizer_digest(copy) == tokenizer_digest(tiny_target)
    assert target_name(str(copy)) == "copy"

    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert target_digest(copy) != target_digest(tiny_target)

    template = template_digest(copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert template_digest(copy) != template
    assert tokenizer_digest(copy) == tokenizer_digest(tiny_target)


def test_the_digest_covers_every_file_of_a_sharded_target(tmp_path):
    folder = save_target(tmp_path / "sharded")
    random_model(config()).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    files = weight_files(folder)
    assert len(files) > 1
    before = target_digest(folder)
    tensors = load_file(files[-1])
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, files[-1], metadata={"format": "pt"})
    assert target_digest(folder) != before


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "described",
    [
        config(tie_word_embeddings=True),
        Gemma2Config(**SMALL, **HEADS, head_dim=8),
        CohereConfig(**SMALL, **HEADS),
        GraniteConfig(**SMALL, **HEADS, logits_scaling=4.0),
        FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0),
    ],
    ids=lambda described: described.model_type,
)
def test_layer_by_layer_a_target_computes_what_its_float32_copy_does(described):
    target = random_model(described).to(torch.bfloat16).eval()
    whole, ids_BT = deepcopy(target).float(), torch.arange(2, 22)[None]
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in target.state_dict().items()}
    wide = []
    decoder_layers(target)[1].register_forward_hook(
        lambda *_: wide.append(sum(w.numel() for w in target.parameters() if w.dtype == torch.float32))
    )

    with torch.no_grad(), float32_by_layer(target):
        found = target(input_ids=ids_BT, use_cache=False).logits
    with torch.no_grad():
        wanted = whole(input_ids=ids_BT, use_cache=False).logits

    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    assert wide == [sum(weight.numel() for weight in decoder_layers(target)[1].parameters())]
    for name, weight in target.state_dict().items():
        assert (weight.dtype, weight.data_ptr()) == (torch.bfloat16, before[name][0]), name
        assert torch.equal(weight, before[name][1])


def test_a_target_that_fails_layer_by_layer_is_as_it_was():
    target = random_model(config()).to(torch.bfloat16)
    with pytest.raises(IndexError), torch.no_grad(), float32_by_layer(target):
        target(input_ids=torch.tensor([[10**6]]))
    assert {weight.dtype for weight in target.parameters()} == {torch.bfloat16}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in target.modules())
