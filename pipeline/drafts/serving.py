"""Which engines can serve a draft, and what to do where none can."""

from pipeline.drafts import DRAFTS, DraftConfig
from pipeline.drafts.draft import ENGINES
from pipeline.errors import UsageError


def check_servable(config: DraftConfig, form: str, tokens: dict | None = None, scale: float = 1.0) -> None:
    """Refuse a draft that the engine of that form cannot serve, with the reason. UsageError.

    tokens: the target's special ids. scale: what the target multiplies its head's output by.
    """
    if form not in ENGINES:
        raise UsageError(f"unknown format {form!r}; there are {', '.join(ENGINES)}")
    _check_everywhere(config, tokens or {})
    backbone = [name for name, draft in DRAFTS.items() if draft.only_backbone]
    if scale != 1.0 and config.method not in backbone:
        raise UsageError(
            f"engines add {config.method}'s correction to the target's head without the target's factor of {scale:g}, "
            f"which was trained with it, so it would outweigh or drown; train a {backbone[0]} draft for this target"
        )
    if form == "sglang" and config.target_layer_ids[0] < 0:
        raise UsageError(
            f"SGLang reads outputs of decoder layers only, this draft reads {list(config.target_layer_ids)} (-1 is the "
            "embedding); train one with other draft.layers, or export it with --format speculators"
        )
    reason = DRAFTS[config.method].refusal(config, form)
    if reason is not None:
        raise UsageError(reason)
    if form == "speculators" and len(set(config.layer_types)) > 1:
        raise UsageError(
            "vLLM takes one flag for all layers of a draft in this form, and this one is causal inside a block on its "
            "sliding layers only; export it with --format sglang, which vLLM reads, too"
        )


def unservable(config: DraftConfig, tokens: dict | None = None, scale: float = 1.0) -> str | None:
    """Return why no engine serves such a draft, None where one does. Arguments as of `check_servable`."""
    reasons = []
    for form in ENGINES:
        try:
            check_servable(config, form, tokens, scale)
        except UsageError as error:
            reasons.append(str(error))
    return reasons[0] if len(reasons) == len(ENGINES) else None


def _check_everywhere(config: DraftConfig, tokens: dict) -> None:
    if config.sliding_window is not None and config.sliding_window < config.block_size:
        raise UsageError(
            f"sliding_window {config.sliding_window} is below block_size {config.block_size}: engines hide the block's "
            "first slots from its last ones then, training does not; train one with a window of a block at least"
        )
    reserved = {"bos": [tokens.get("bos")], "pad": [tokens.get("pad")], "eos": tokens.get("eos") or []}
    taken = [name for name, ids in reserved.items() if config.mask_token_id in ids]
    if taken:
        raise UsageError(
            f"mask_token_id {config.mask_token_id} is the target's {taken[0]} token, which real text holds; train a "
            "draft with another draft.mask_token_id"
        )
