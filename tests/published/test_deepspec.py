"""The form that DeepSpec's evaluator reads: every key and every tensor of its class, and by its own loop, from the
folder alone, the accept lengths that `evaluate` measures.

    T rows   S slots   D hidden size   V vocabulary
"""

import json

import numpy as np
import pytest
import torch
from forms import SIZES
from greedy import STOP, make_greedy_cache, make_learned_draft, save_stopping_target
from safetensors.torch import load_file
from tiny import write_jsonl

from pipeline.cache import HiddenCache
from pipeline.drafts import check_servable, draft_config
from pipeline.errors import UsageError
from pipeline.evaluation.prompts import cached_prompts
from pipeline.published.card import Origin, card
from pipeline.published.check import block_states, check_export
from pipeline.published.export import _write, deepspec_copies, published_config
from pipeline.published.reading import read_description
from pipeline.target.head import TargetHead
from pipeline.target.loading import load_target
from stages.evaluate.run import run as evaluate

MAX_NEW = 12
KINDS = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated", "confidence_head_with_markov": False},
    "rnn": {"markov_head_type": "rnn"},
    "no confidence": {"enable_confidence_head": False, "confidence_head_with_markov": False, "alpha_confidence": None},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_stopping_target(tmp_path_factory.mktemp("target") / "stopping")


@pytest.fixture(scope="module")
def cache(target, tmp_path_factory):
    return HiddenCache.open(make_greedy_cache(target, tmp_path_factory.mktemp("cache") / "greedy"))


def export_of(draft, cache, folder):
    """Write a draft in DeepSpec's form."""
    origin = Origin("float32", "stopping", anchors=24)
    copies = deepspec_copies(cache.head(), cache, folder)
    _write(folder, published_config(draft.config, "deepspec", origin), draft, torch.float32, copies)
    return folder


@pytest.fixture(scope="module")
def folder(cache, tmp_path_factory):
    return export_of(make_learned_draft(cache.path, "dspark"), cache, tmp_path_factory.mktemp("drafts") / "dspark")


def class_tensors(flat: dict) -> dict[str, tuple]:
    """Name and shape of every parameter of DeepSpec's Qwen3DSparkModel; what a file lacks of it is drawn at random."""
    D, V, E = flat["hidden_size"], flat["vocab_size"], flat["head_dim"]
    q, kv, inner = flat["num_attention_heads"] * E, flat["num_key_value_heads"] * E, flat["intermediate_size"]
    shapes = {"embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "norm.weight": (D,), "hidden_norm.weight": (D,)}
    shapes["fc.weight"] = (D, len(flat["target_layer_ids"]) * D)
    for layer in range(flat["num_hidden_layers"]):
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        shapes |= {f"{attention}.{name}_proj.weight": shape for name, shape in {"q": (q, D), "o": (D, q)}.items()}
        shapes |= {f"{attention}.{name}_proj.weight": (kv, D) for name in "kv"}
        shapes |= {f"{attention}.{name}_norm.weight": (E,) for name in "qk"}
        shapes |= {f"{mlp}.{name}_proj.weight": (inner, D) for name in ("gate", "up")}
        shapes |= {f"{mlp}.down_proj.weight": (D, inner)}
        shapes |= {f"layers.{layer}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    rank, kind = flat["markov_rank"], flat.get("markov_head_type")
    if rank:
        shapes |= {f"markov_head.markov_w{which}.weight": (V, rank) for which in (1, 2)}
    if rank and kind == "gated":
        shapes |= {"markov_head.gate_proj.weight": (rank, D + rank), "markov_head.gate_proj.bias": (rank,)}
    if rank and kind == "rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + D)
        shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    if flat["enable_confidence_head"]:
        width = D + rank * flat["confidence_head_with_markov"]
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    return shapes


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_and_tensor_that_the_class_demands_is_there_and_no_other(kind, cache, tmp_path):
    draft = make_learned_draft(cache.path, "dspark", steps=0, **KINDS[kind])
    out = export_of(draft, cache, tmp_path / "out")
    flat = json.loads((out / "config.json").read_text())
    demanded = {"target_layer_ids", "mask_token_id", "num_anchors", "enable_confidence_head", "markov_rank"}
    assert demanded | {"markov_head_type", "confidence_head_with_markov", "block_size"} <= flat.keys()
    assert flat["architectures"] == ["Qwen3DSparkModel"] and flat["num_anchors"] == 24
    assert flat["tie_word_embeddings"] is False and flat["model_type"] == "qwen3" and "dflash_config" not in flat
    tensors = load_file(out / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == class_tensors(flat)
    assert torch.equal(tensors["embed_tokens.weight"], cache.head().embed_VD)
    assert torch.equal(tensors["lm_head.weight"], cache.head().head_VD)
    assert check_export(out)["method"] == "dspark"


def test_its_baseline_is_dflash_with_next_position_labels(cache, tmp_path):
    draft = make_learned_draft(cache.path, "dflash", steps=0, shift_label=True)
    out = export_of(draft, cache, tmp_path / "out")
    flat = json.loads((out / "config.json").read_text())
    assert flat["markov_rank"] == 0 and flat["enable_confidence_head"] is False and "vocabulary" not in flat
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(out / "model.safetensors").items()}
    assert shapes == class_tensors(flat)
    facts = check_export(out)
    assert (facts["method"], facts["proposals"]) == ("dflash", 4)


def deepspec_lengths(folder, target, prompt_ids) -> list[int]:
    """DeepSpec's greedy decoding of one prompt, nothing of the draft from elsewhere than its folder.

    The features are entries id + 1 of Hugging Face's hidden states. The block is the anchor and b - 1 mask tokens, and
    proposes b tokens from slot 0 on, each with the Markov head's bias of the token before.
    """
    flat, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    config = make_config(folder)
    ids, lengths = list(prompt_ids), []
    ids.append(int(target(torch.tensor([ids])).logits[0, -1].argmax()))
    start = len(prompt_ids)
    while start < len(prompt_ids) + MAX_NEW and ids[-1] != STOP:
        hidden = target(torch.tensor([ids[:start]]), output_hidden_states=True).hidden_states
        features_KTD = torch.stack([hidden[layer + 1][0] for layer in flat["target_layer_ids"]])
        block = [ids[start]] + [flat["mask_token_id"]] * (flat["block_size"] - 1)
        slots_SD = tensors["embed_tokens.weight"][block]
        states_SD = block_states(tensors.__getitem__, config, features_KTD, slots_SD)
        base_SV, prev, proposed = states_SD @ tensors["lm_head.weight"].T, ids[start], []
        for base_V in base_SV:
            read_U = tensors["markov_head.markov_w1.weight"][prev]
            prev = int((base_V + tensors["markov_head.markov_w2.weight"] @ read_U).argmax())
            proposed.append(prev)
        chosen = target(torch.tensor([[*ids, *proposed]])).logits[0, start:].argmax(-1).tolist()
        accepted = next((k for k in range(len(proposed)) if proposed[k] != chosen[k]), len(proposed))
        if STOP in proposed[:accepted]:
            accepted = proposed.index(STOP) + 1
            ids += proposed[:accepted]
            lengths.append(accepted)
            break
        ids += [*proposed[:accepted], chosen[accepted]]
        lengths.append(accepted + 1)
        start += accepted + 1
    return lengths


def make_config(folder):
    return read_description(folder).config


@torch.no_grad()
def test_its_loop_on_the_folder_alone_gains_what_evaluate_measures(folder, cache, target, tmp_path):
    prompts = cached_prompts(cache, np.arange(len(cache)), len(cache))
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"input_ids": prompt.ids} for prompt in prompts])
    report = evaluate(folder, model=str(target), prompts=data, max_new=MAX_NEW, device="cpu")
    live = load_target(str(target))
    lengths = [deepspec_lengths(folder, live, prompt.ids) for prompt in prompts]
    assert lengths == [sample.lengths for sample in report.samples]
    assert report.overall.accept_len > 1.2  # or a head drawn at random would do as well


def test_what_it_would_decode_otherwise_is_refused(cache, tmp_path):
    head = cache.head()
    for other, words in (
        ((head, None), "the cache that holds them is gone"),
        ((replace_head(head, embed_scale=2.0), cache), "neither scales embeddings nor caps logits"),
        ((replace_head(head, logit_softcap=30.0), cache), "neither scales embeddings nor caps logits"),
    ):
        with pytest.raises(UsageError, match=words):
            deepspec_copies(*other, tmp_path)


def replace_head(head, **changed):
    return TargetHead(head.embed_VD, head.head_VD, **changed)


def test_drafts_that_its_class_does_not_compute_are_refused():
    dspark = {"shift_label": True, "markov_rank": 4}
    domino = {"shift_label": True, "pure_draft_prefix_len": 1, "emb_dim": 4, "gru_hidden_dim": 8}
    sliding = {"layer_types": ("sliding_attention",) * 2, "sliding_window": 8}
    for method, options, words in (
        ("domino", domino, "DeepSpec's evaluator has no Domino"),
        ("dflash", {"shift_label": False}, "next-position labels only"),
        ("dspark", dspark | sliding, "decodes without a window"),
    ):
        with pytest.raises(UsageError, match=words):
            check_servable(draft_config(method=method, **SIZES, **options), "deepspec")
    check_servable(draft_config(method="dspark", **SIZES, **dspark), "deepspec")
    check_servable(draft_config(method="dflash", **SIZES, shift_label=True), "deepspec")


def test_the_card_names_its_evaluator(folder):
    text = card(make_config(folder), "deepspec", Origin("float32", "org/target"), 10, "draft")
    assert "python eval.py --target_name_or_path org/target --draft_name_or_path ./draft" in text
