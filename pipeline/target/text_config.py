"""The decoder's part of a target's config.json, and what captures and drafts read of it. Imports nothing heavy."""

from pipeline.errors import UsageError


def text_config(config: dict) -> dict:
    """Return the part of a target's config that describes the decoder, which multimodal targets nest."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and nested else config


def rope_theta(target: dict) -> float:
    """Return the target's RoPE base, from `rope_parameters` (transformers 5, maybe for each kind of layer) or, before,
    `rope_theta`.

    Raises UsageError where both are stated and differ: of a draft trained with one and served with the other, no
    proposal would be accepted.
    """
    parameters = target.get("rope_parameters") or {}
    new = parameters.get("rope_theta", (parameters.get("full_attention") or {}).get("rope_theta"))
    legacy = target.get("rope_theta")
    if new is not None and legacy is not None and float(new) != float(legacy):
        raise UsageError(
            f"the target's config states rope_theta {legacy:g} and rope_parameters.rope_theta {new:g}; "
            "correct the target's config.json and capture again"
        )
    return float(next((theta for theta in (new, legacy) if theta is not None), 10_000.0))


def logit_scale(target: dict) -> float:
    """Return the factor of the LM head's output: Granite states a divisor, Cohere and Falcon-H1 a multiplier."""
    if target.get("logits_scaling"):
        return 1.0 / target["logits_scaling"]
    return float(target.get("logit_scale") or target.get("lm_head_multiplier") or 1.0)


def max_positions(text: dict) -> tuple[int | None, str]:
    """Return (the longest sequence that a decoder's config allows, None where it does not say; a reason or "")."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    short = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
    if short and rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
        return short, ", beyond which its rotary scaling follows the longest sample of a batch"
    limit = text.get("max_position_embeddings")
    return (limit if isinstance(limit, int) else None), ""
