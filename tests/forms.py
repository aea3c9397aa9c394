"""Small published drafts in every form that is read, written out from the descriptions of each: names, prefixes, keys.

Nothing here asks the code under test what a folder looks like.

    D 16   I 24   heads 2 / 1 of 12   K 2 layers of 6   V 40   block 4   Domino G 8, r 4   DSpark rank 6
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

D, INNER, E, V, GRU, BOTTLENECK, RANK = 16, 24, 12, 40, 8, 4, 6
LAYERS = [1, 3]
SIZES = {  # the same, as a DraftConfig names them
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "vocab_size": 40,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "num_target_layers": 6,
    "target_layer_ids": (1, 3),
    "block_size": 4,
    "mask_token_id": 39,
}
QWEN3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": E,
    "hidden_act": "silu",
    "hidden_size": D,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 64,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": V,
}
PLACED = {"mask_token_id": 39, "target_layer_ids": LAYERS}
DOMINO = {
    "projector_type": "domino",
    "pure_draft_prefix_len": 1,
    "emb_dim": 4,
    "gru_hidden_dim": 8,
    "shift_label": True,
}
DSPARK = {"markov_rank": RANK, "enable_confidence_head": True, "confidence_head_with_markov": True}


def backbone() -> dict[str, Tensor]:
    """The tensors of a DFlash draft, norms away from 1."""
    shapes = {"fc.weight": (D, 2 * D), "hidden_norm.weight": (D,), "norm.weight": (D,)}
    for layer in (0, 1):
        shapes |= {
            f"layers.{layer}.input_layernorm.weight": (D,),
            f"layers.{layer}.self_attn.q_proj.weight": (2 * E, D),
            f"layers.{layer}.self_attn.k_proj.weight": (E, D),
            f"layers.{layer}.self_attn.v_proj.weight": (E, D),
            f"layers.{layer}.self_attn.o_proj.weight": (D, 2 * E),
            f"layers.{layer}.self_attn.q_norm.weight": (E,),
            f"layers.{layer}.self_attn.k_norm.weight": (E,),
            f"layers.{layer}.post_attention_layernorm.weight": (D,),
            f"layers.{layer}.mlp.gate_proj.weight": (INNER, D),
            f"layers.{layer}.mlp.up_proj.weight": (INNER, D),
            f"layers.{layer}.mlp.down_proj.weight": (D, INNER),
        }
    return values(shapes)


def domino() -> dict[str, Tensor]:
    return values(
        {
            "prefix_gru.weight_ih_l0": (3 * GRU, D),
            "prefix_gru.weight_hh_l0": (3 * GRU, GRU),
            "embed_proj.0.weight": (BOTTLENECK, D + GRU),
            "embed_proj.2.weight": (V, BOTTLENECK),
        }
    )


def dspark(kind: str = "vanilla") -> dict[str, Tensor]:
    shapes = {
        "markov_head.markov_w1.weight": (V, RANK),
        "markov_head.markov_w2.weight": (V, RANK),
        "confidence_head.proj.weight": (1, D + RANK),
        "confidence_head.proj.bias": (1,),
    }
    if kind == "gated":
        shapes |= {"markov_head.gate_proj.weight": (RANK, D + RANK), "markov_head.gate_proj.bias": (RANK,)}
    if kind == "rnn":
        shapes |= {
            "markov_head.joint_proj.weight": (3 * RANK, 2 * RANK + D),
            "markov_head.joint_proj.bias": (3 * RANK,),
        }
    return values(shapes)


def values(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random values, the same at every call; of a norm's weight about 1."""
    found = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        found[name] = torch.randn(shape, generator=generator) * 0.3 + ("norm" in name)
    return found


def target() -> Tensor:
    """The target's embedding, and its head."""
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0))


def write(folder: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def zlab_dflash(folder: Path) -> Path:
    """z-lab: remote code named in auto_map, the block's size inside `dflash_config`, no word of labels."""
    config = {"architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}}
    nested = {"block_size": 4, **PLACED}
    return write(folder, QWEN3 | config | {"num_target_layers": 6, "dflash_config": nested}, backbone())


def specforge_domino(folder: Path) -> Path:
    """SpecForge's own class for Domino; the block's size at the top level, as its config files have it."""
    config = {"architectures": ["DominoDraftModel"], "auto_map": {"AutoModel": "domino.DominoDraftModel"}}
    config |= {"num_target_layers": 6, "block_size": 4, "dflash_config": DOMINO | PLACED}
    return write(folder, QWEN3 | config, backbone() | domino())


def published_domino(folder: Path) -> Path:
    """Domino as released: DFlash's architecture, `emb_dim` twice."""
    config = {"architectures": ["DFlashDraftModel"], "num_target_layers": 6, "block_size": 4, "emb_dim": 4}
    return write(folder, QWEN3 | config | {"dflash_config": DOMINO | PLACED}, backbone() | domino())


def specforge_dspark(folder: Path, kind: str = "vanilla") -> Path:
    """SpecForge's own class for DSpark, the head's keys nested."""
    nested = DSPARK | PLACED | {"projector_type": "dspark", "markov_head_type": kind, "attention_mode": "gqa"}
    config = {"architectures": ["DSparkDraftModel"], "num_target_layers": 6, "block_size": 4}
    config |= {"dflash_config": nested | {"confidence_head_alpha": 1.0}}
    return write(folder, QWEN3 | config, backbone() | dspark(kind))


def sglang_dspark(folder: Path, kind: str = "vanilla") -> Path:
    """The same after SpecForge's script for SGLang: its architecture, the head's keys lifted to the top level."""
    lifted = DSPARK | {"markov_head_type": kind}
    nested = lifted | PLACED | {"projector_type": "dspark", "attention_mode": "gqa"}
    config = {"architectures": ["Qwen3DSparkModel"], "num_target_layers": 6, "block_size": 4, **lifted}
    return write(folder, QWEN3 | config | {"dflash_config": nested}, backbone() | dspark(kind))


def deepspec_dspark(folder: Path, kind: str = "vanilla") -> Path:
    """DeepSpec: everything at the top level, with frozen copies of the target's embedding and head."""
    config = DSPARK | PLACED | {"markov_head_type": kind, "num_anchors": 512, "block_size": 4, "num_target_layers": 6}
    copies = {"embed_tokens.weight": target(), "lm_head.weight": target()}
    return write(folder, QWEN3 | config | {"architectures": ["Qwen3DSparkModel"]}, backbone() | dspark(kind) | copies)


def deepspec_dflash(folder: Path) -> Path:
    """DeepSpec's baseline: the same class without heads, so DFlash with next-position labels."""
    config = PLACED | {"markov_rank": 0, "markov_head_type": "vanilla", "enable_confidence_head": False}
    config |= {"architectures": ["Qwen3DSparkModel"], "block_size": 4, "num_target_layers": 6}
    copies = {"embed_tokens.weight": target(), "lm_head.weight": target()}
    return write(folder, QWEN3 | config, backbone() | copies)


def model_optimizer_dspark(folder: Path, kind: str = "vanilla") -> Path:
    """Model-Optimizer: the head's parts without `markov_head.`, and its own key for the confidence head."""
    nested = PLACED | {"projector_type": "dspark", "markov_rank": RANK, "markov_head_type": kind}
    config = {"architectures": ["DFlashDraftModel"], "num_target_layers": 6, "block_size": 4}
    config |= {"dflash_config": nested | {"use_confidence_head": True}}
    renamed = {"confidence_head.proj.": "confidence_proj.", "markov_head.": ""}
    tensors = {}
    for name, tensor in dspark(kind).items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    return write(folder, QWEN3 | config, backbone() | tensors)


def speculators(folder: Path, kind: str, own: dict, tensors: dict[str, Tensor]) -> Path:
    """The form of speculators: layers counted from the embedding, Qwen3's keys inside, no depth of the target."""
    names = {"dflash": "DFlashSpeculator", "dspark": "DSparkSpeculator"}
    proposals = 4 if kind == "dspark" else 3
    config = {
        "architectures": [names[kind]],
        "speculators_model_type": kind,
        "speculators_version": "0.6.0",
        "aux_hidden_state_layer_ids": [2, 4],
        "block_size": 4,
        "draft_vocab_size": V,
        "mask_token_id": 39,
        "sample_from_anchor": kind == "dspark",
        "sliding_window_non_causal": False,
        "target_hidden_size": D,
        "tie_word_embeddings": False,
        "transformer_layer_config": QWEN3,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": proposals}],
            "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": "org/target"},
        },
    }
    return write(folder, config | own, backbone() | tensors)


def speculators_dflash(folder: Path) -> Path:
    return speculators(folder, "dflash", {}, {})


def speculators_dspark(folder: Path) -> Path:
    return speculators(folder, "dspark", DSPARK | {"markov_head_type": "vanilla"}, dspark())


def speculators_reduced(folder: Path, kind: str = "dflash") -> Path:
    """A draft that proposes every third id only, by a head of its own rows and both maps."""
    may_V = torch.arange(V) % 3 == 0
    ids_W = may_V.nonzero()[:, 0]
    maps = {"t2d": may_V, "d2t": ids_W - torch.arange(len(ids_W)), "lm_head.weight": target()[ids_W]}
    own, head = {"draft_vocab_size": len(ids_W)}, {}
    if kind == "dspark":
        own, head = own | DSPARK | {"markov_head_type": "vanilla"}, dspark()
        head["markov_head.markov_w2.weight"] = head["markov_head.markov_w2.weight"][ids_W]
    return speculators(folder, kind, own, head | maps | {"embed_tokens.weight": target()})


def specforge_training(folder: Path) -> Path:
    """SpecForge's training checkpoint: a pickle of its whole state, the draft under `draft_model.`, its head nested as
    older versions did; the draft's config.json put beside it."""
    folder = specforge_domino(folder)
    (folder / "model.safetensors").unlink()
    state = {f"draft_model.{name}": tensor for name, tensor in backbone().items()}
    state |= {f"draft_model.logit_head.{name}": tensor for name, tensor in domino().items()}
    state["target_lm_head.weight"] = target()
    whole = {"draft_state_dict": state, "global_step": 70, "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}}}
    torch.save(whole, folder / "training_state.pt")
    return folder


# Form -> whether it is DSpark with a kind of Markov head to choose; every one holds the same weights.
FORMS = {
    "z-lab dflash": zlab_dflash,
    "specforge domino": specforge_domino,
    "published domino": published_domino,
    "specforge dspark": specforge_dspark,
    "sglang dspark": sglang_dspark,
    "deepspec dspark": deepspec_dspark,
    "deepspec dflash": deepspec_dflash,
    "model-optimizer dspark": model_optimizer_dspark,
    "speculators dflash": speculators_dflash,
    "speculators dspark": speculators_dspark,
    "specforge training": specforge_training,
}
