"""SGLang's loaders, rule by rule, against what we export for it.

The rules are those of 0.5.23, in `models/dflash.py` and `speculative/dspark_components/dspark_config.py`. They need no
CUDA, as the engine itself does. A broken one is an error there at best, else a draft that accepts nothing.
"""

import json
from pathlib import Path

import pytest
import torch
from greedy import make_learned_draft
from safetensors.torch import load_file

from pipeline.cache import HiddenCache
from pipeline.drafts import DRAFTS
from pipeline.published.card import Origin, serve_command
from pipeline.published.export import _write, published_config

DOMINO_TENSORS = {"prefix_gru.weight_ih_l0", "prefix_gru.weight_hh_l0", "embed_proj.0.weight", "embed_proj.2.weight"}
VARIANTS = {
    "dflash": {},
    "domino": {},
    "dspark": {},
    "dspark gated": {"markov_head_type": "gated"},
    "dspark rnn": {"markov_head_type": "rnn", "confidence_head_with_markov": False},
    "dspark without confidence": {
        "enable_confidence_head": False,
        "confidence_head_with_markov": False,
        "alpha_confidence": None,
    },
}


@pytest.fixture(params=VARIANTS)
def exported(request, greedy_cache, tmp_path):
    """The draft, its config.json, and its tensors."""
    method = request.param.split()[0]
    draft = make_learned_draft(greedy_cache, method, steps=0, **VARIANTS[request.param])
    flat = published_config(draft.config, "sglang", Origin("bfloat16", "org/target", tokens={"eos": [258]}))
    _write(tmp_path / "draft", flat, draft, torch.bfloat16, {})
    read = json.loads((tmp_path / "draft" / "config.json").read_text())
    return draft, read, load_file(tmp_path / "draft" / "model.safetensors")


def backbone_rules(flat: dict, tensors: dict, target: HiddenCache) -> None:
    nested = flat["dflash_config"]
    assert nested["block_size"] == flat["block_size"] >= 2  # sought in the one, then in the other
    assert nested["target_layer_ids"] == sorted(set(nested["target_layer_ids"]))
    assert nested["target_layer_ids"][0] >= 0 and nested["target_layer_ids"][-1] <= flat["num_target_layers"] - 2
    assert 0 <= nested["mask_token_id"] < flat["vocab_size"]
    assert flat["vocab_size"] == target.target_config["vocab_size"]
    assert flat["hidden_size"] == target.target_config["hidden_size"]
    # The one shape that is checked: of the fused features.
    width = len(nested["target_layer_ids"]) * flat["hidden_size"]
    assert tuple(tensors["fc.weight"].shape) == (flat["hidden_size"], width)
    # No embedding or head: both are the target's, and an unknown name is passed over without a word.
    assert not {"embed_tokens.weight", "lm_head.weight"} & tensors.keys()
    assert all(type(flat[key]) is int for key in ("head_dim", "num_attention_heads", "num_key_value_heads"))
    assert flat["rope_theta"] == flat["rope_parameters"]["rope_theta"]


def domino_rules(flat: dict, tensors: dict) -> None:
    nested = flat["dflash_config"]
    assert flat["architectures"] == ["DFlashDraftModel"]  # the only class it registers; the projector_type decides
    assert nested["projector_type"] == "domino" and tensors.keys() >= DOMINO_TENSORS
    assert nested["pure_draft_prefix_len"] == 1
    assert nested["shift_label"] is True and flat["shift_label"] is True
    assert nested["emb_dim"] == flat["emb_dim"] > 0
    gru, rank, D, V = nested["gru_hidden_dim"], nested["emb_dim"], flat["hidden_size"], flat["vocab_size"]
    shapes = {name: tuple(tensors[name].shape) for name in DOMINO_TENSORS}
    assert shapes == {
        "prefix_gru.weight_ih_l0": (3 * gru, D),
        "prefix_gru.weight_hh_l0": (3 * gru, gru),
        "embed_proj.0.weight": (rank, D + gru),
        "embed_proj.2.weight": (V, rank),  # equal vocabularies
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def dspark_rules(flat: dict, tensors: dict) -> None:
    nested, keys = flat["dflash_config"], ("markov_rank", "markov_head_type", "enable_confidence_head")
    keys = (*keys, "confidence_head_with_markov", "mask_token_id", "target_layer_ids")
    assert flat["architectures"] == ["Qwen3DSparkModel"] and flat["model_type"] == "qwen3"
    for key in keys:  # read at the top level by every release, by newer ones inside, too
        assert flat[key] == nested[key], key
    assert type(flat["markov_rank"]) is int and flat["markov_rank"] > 0
    assert flat["markov_head_type"] in ("vanilla", "gated", "rnn")
    assert ("confidence_head.proj.weight" in tensors) == flat["enable_confidence_head"]
    own = {"vanilla": set(), "gated": {"gate_proj.weight", "gate_proj.bias"}}
    own["rnn"] = {"joint_proj.weight", "joint_proj.bias"}
    names = {"markov_w1.weight", "markov_w2.weight", *own[flat["markov_head_type"]]}
    assert {name for name in tensors if name.startswith("markov_head.")} == {f"markov_head.{name}" for name in names}


def test_an_export_obeys_every_rule_of_its_loader(exported, greedy_cache):
    draft, flat, tensors = exported
    method = draft.config.method
    backbone_rules(flat, tensors, HiddenCache.open(greedy_cache))
    projector = flat["dflash_config"].get("projector_type")
    assert projector in {"dflash": (None, "dflash"), "domino": ("domino",), "dspark": ("dspark",)}[method]
    # Domino's tensors under another projector_type are refused.
    assert bool(DOMINO_TENSORS & tensors.keys()) == (projector == "domino")
    if method == "dflash":
        assert flat["architectures"] == ["DFlashDraftModel"]
        assert flat["shift_label"] is flat["dflash_config"]["shift_label"] is False
    if method == "domino":
        domino_rules(flat, tensors)
    if method == "dspark":
        dspark_rules(flat, tensors)


def test_as_many_tokens_are_asked_for_as_its_worker_verifies(exported):
    """num_draft_tokens is what is verified: a block's slots, the anchor's among them, and for DSpark, whose slots all
    propose, the anchor beside them."""
    draft, flat, _ = exported
    words = serve_command(draft.config, "sglang", Origin("bfloat16", "org/target"), "draft").split()
    asked = int(words[words.index("--speculative-num-draft-tokens") + 1])
    algorithm = words[words.index("--speculative-algorithm") + 1]
    dspark = draft.config.method == "dspark"
    assert asked == flat["block_size"] + dspark and algorithm == ("DSPARK" if dspark else "DFLASH")
    assert Path(words[words.index("--speculative-draft-model-path") + 1]).name == "draft"
    assert DRAFTS[draft.config.method].sglang == (algorithm, int(dspark))
