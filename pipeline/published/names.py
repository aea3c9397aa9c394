"""A draft's tensors by name and shape, as published, and what other trainers call the same tensors.

Written out from the publications, not asked of our modules: a module that grew a parameter by mistake would else be
checked against itself.

    D hidden size   K captured layers   V vocabulary   W ids that may be proposed
"""

import re
from collections.abc import Iterable

from pipeline.drafts import DraftConfig
from pipeline.errors import UsageError

Shapes = dict[str, tuple[int, ...]]

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
# Model-Optimizer's DSpark has the head's parts at the top level; SpecForge's training checkpoints once nested them.
_RENAMED = (
    (re.compile(r"^logit_head\.(?=(prefix_gru|embed_proj|markov_head|confidence_head)\.)"), ""),
    (re.compile(r"^(?=(markov_w1|markov_w2|gate_proj|joint_proj)\.)"), "markov_head."),
    (re.compile(r"^confidence_proj\."), "confidence_head.proj."),
)
# A trainer's whole state: only what is below this is the draft.
_WRAPPERS = ("draft_model.", "dflash_module.")


def draft_tensors(config: DraftConfig, proposed: int | None = None) -> Shapes:
    """Return the name and shape of each of a draft's tensors. `proposed`: W, where it is not the whole vocabulary."""
    return backbone_tensors(config) | head_tensors(config, proposed)


def backbone_tensors(config: DraftConfig) -> Shapes:
    """The part that all methods share (DFlash, arXiv:2602.06036)."""
    D, inner = config.hidden_size, config.intermediate_size
    wide, narrow = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    layer = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (wide, D),
        "self_attn.k_proj.weight": (narrow, D),
        "self_attn.v_proj.weight": (narrow, D),
        "self_attn.o_proj.weight": (D, wide),
        "self_attn.q_norm.weight": (config.head_dim,),
        "self_attn.k_norm.weight": (config.head_dim,),
        "mlp.gate_proj.weight": (inner, D),
        "mlp.up_proj.weight": (inner, D),
        "mlp.down_proj.weight": (D, inner),
    }
    if config.attention_bias:
        sizes = {"q": wide, "k": narrow, "v": narrow, "o": D}
        layer |= {f"self_attn.{part}_proj.bias": (size,) for part, size in sizes.items()}
    shapes = {"fc.weight": (D, len(config.target_layer_ids) * D), "hidden_norm.weight": (D,), "norm.weight": (D,)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def head_tensors(config: DraftConfig, proposed: int | None = None) -> Shapes:
    """What the method adds to the backbone: nothing (DFlash), Domino's causal head, DSpark's two heads."""
    D, V, W = config.hidden_size, config.vocab_size, proposed or config.vocab_size
    if config.method == "domino":
        gru, rank = config.gru_hidden_dim, config.emb_dim
        return {
            "prefix_gru.weight_ih_l0": (3 * gru, D),
            "prefix_gru.weight_hh_l0": (3 * gru, gru),
            "embed_proj.0.weight": (rank, D + gru),
            "embed_proj.2.weight": (W, rank),
        }
    if config.method != "dspark":
        return {}
    rank, kind, shapes = config.markov_rank, config.markov_head_type, {}
    if rank:
        shapes |= {"markov_head.markov_w1.weight": (V, rank), "markov_head.markov_w2.weight": (W, rank)}
    if kind == "gated":
        shapes |= {"markov_head.gate_proj.weight": (rank, D + rank), "markov_head.gate_proj.bias": (rank,)}
    if kind == "rnn":
        shapes |= {
            "markov_head.joint_proj.weight": (3 * rank, 2 * rank + D),
            "markov_head.joint_proj.bias": (3 * rank,),
        }
    if config.enable_confidence_head:
        width = D + rank if config.confidence_head_with_markov else D
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    return shapes


def target_copies(config: DraftConfig, proposed: int, speculators: bool) -> Shapes:
    """Copies of the target's own tensors that some projects publish with a draft, and their maps of reduced ids."""
    D, V = config.hidden_size, config.vocab_size
    copies = {EMBEDDING: (V, D), HEAD: (proposed, D)}
    if not speculators:
        return copies
    # d2t: id of the target minus id of the draft, for each id that may be proposed; t2d: whether an id may be.
    maps = {"d2t": (proposed,), "t2d": (V,)}
    return copies | maps | {"verifier_norm.weight": (D,), "verifier_lm_head.weight": (proposed, D)}


def published_names(stored: Iterable[str]) -> dict[str, str]:
    """Map published names to the names that a file has them under; what is no draft's own is left out.

    Other people's prefixes and names are undone, rotary buffers dropped. UsageError for two of one name.
    """
    stored = list(stored)
    wrapper = next((prefix for prefix in _WRAPPERS if any(prefix in name for name in stored)), "")
    names: dict[str, str] = {}
    for held in stored:
        if wrapper not in held or held.endswith("rotary_emb.inv_freq"):
            continue
        name = held.partition(wrapper)[2] if wrapper else held
        for pattern, prefix in _RENAMED:
            name = pattern.sub(prefix, name)
        if name in names:
            raise UsageError(f"{names[name]} and {held} are both {name}; remove the one that is not the draft's")
        names[name] = held
    return names
