"""config.json of a draft as its engine reads it, every key written out: SGLang, and speculators (vLLM).

Readers fall back on defaults of their own for what is left out, and one that guesses the label convention or counts
the layers from the embedding serves a draft that accepts nothing. So nothing is left to them, keys that they seek in
two places stand in both, and what an engine cannot serve is refused, with the reason.
"""

from dataclasses import dataclass

from pipeline.drafts import DRAFTS, DraftConfig
from pipeline.published.reading import SHARED, TRAINED_ON


@dataclass(frozen=True)
class Origin:
    """What is known of a draft besides its config and weights."""

    dtype: str  # of the stored weights, "float32" or "bfloat16"
    target: str | None = None
    revision: str | None = None
    architectures: tuple[str, ...] = ()  # the target's
    tokens: dict | None = None  # the target's special ids: bos, pad, a list of eos
    trained_on: dict | None = None  # the cache's digest and the share of prompts held out, which `evaluate` reads


def published_config(config: DraftConfig, form: str, origin: Origin) -> dict:
    """Return config.json for that form."""
    common = _qwen3(config, origin)
    flat = DRAFTS[config.method].own_config(config, form, common)
    if flat is None:
        flat = _speculators(config, origin, common) if form == "speculators" else _sglang(config, common)
    if origin.trained_on is not None:
        flat[TRAINED_ON] = origin.trained_on
    return flat


def _sglang(config: DraftConfig, common: dict) -> dict:
    """Return a Qwen3 config with `dflash_config`, as z-lab and SpecForge publish it."""
    nested = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        "shift_label": config.shift_label,
    }
    top = {
        "architectures": [DRAFTS[config.method].architectures[0]],
        "num_target_layers": config.num_target_layers,
        "block_size": config.block_size,
        "sample_from_anchor": config.shift_label,
        "shift_label": config.shift_label,
    }
    own, own_nested = DRAFTS[config.method].write_options(config, "sglang")
    return common | top | own | {"dflash_config": nested | own_nested}


def _speculators(config: DraftConfig, origin: Origin, common: dict) -> dict:
    """Return the form of the speculators library, which vLLM reads: layer ids count from the embedding, 0."""
    draft = DRAFTS[config.method]
    flat = {
        "architectures": [f"{draft.title}Speculator"],
        "speculators_model_type": config.method,
        "dtype": origin.dtype,
        "tie_word_embeddings": False,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": [index + 1 for index in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "draft_vocab_size": config.vocab_size,
        "target_hidden_size": config.hidden_size,
        "num_target_layers": config.num_target_layers,  # ours: the form has no place for it
        "sample_from_anchor": config.shift_label,
        # speculators reads it for sliding layers only, but vLLM makes every layer causal where it is false.
        "sliding_window_non_causal": "sliding_attention" not in config.layer_types,
        "transformer_layer_config": common,
        "speculators_config": {
            "algorithm": config.method,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.proposals}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": origin.target, "architectures": list(origin.architectures)},
        },
    }
    return flat | draft.write_options(config, "speculators")[0]


def _qwen3(config: DraftConfig, origin: Origin) -> dict:
    """Return what both forms state about the decoder layers."""
    sliding, tokens = "sliding_attention" in config.layer_types, origin.tokens or {}
    scaling = config.rope_scaling.as_config() if config.rope_scaling else {}
    flat = {name: getattr(config, name) for name in (*SHARED, "head_dim", "rope_theta")} | {
        "model_type": "qwen3",
        "dtype": origin.dtype,
        "layer_types": list(config.layer_types),
        "sliding_window": config.sliding_window,
        "use_sliding_window": sliding,
        "max_window_layers": config.num_hidden_layers,
        # Twice: transformers 5, and the engines with it, read the one, older versions the other.
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"} | scaling,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": tokens.get("bos"),
        "eos_token_id": next(iter(tokens.get("eos") or ()), None),
    }
    if not sliding:
        # Left out of a sliding draft: engines then take sliding layers as causal and the others as not, as trained.
        flat["is_causal"] = False
    return flat
