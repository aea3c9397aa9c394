"""The draft methods and what they share: adding one is one file and one line in `DRAFTS`. What is asked of a method by
its name: the config of its fields, and which engines can serve such a draft."""

from pipeline.drafts.backbone import DraftKV
from pipeline.drafts.block_draft import BlockDraft, init_weights
from pipeline.drafts.blocks import Blocks, Cell, eligible_anchors, lay_blocks, pack
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.dflash import DFlash
from pipeline.drafts.domino import Domino
from pipeline.drafts.draft import ENGINES, SERVING, BlockRequest, Draft, Proposal, Sampling
from pipeline.drafts.dspark import DSpark
from pipeline.drafts.objectives import metrics_of
from pipeline.errors import UsageError
from pipeline.nearest_name import did_you_mean

DRAFTS: dict[str, type[Draft]] = {"dflash": DFlash, "domino": Domino, "dspark": DSpark}


def draft_config(**fields) -> DraftConfig:
    """Return the config that flat fields describe, as recipes, checkpoints and published folders state them.

    Raises UsageError for an unknown method, another method's option (None is as good as left out), and what the
    method's `Config` refuses.
    """
    method = fields.get("method")
    if method not in DRAFTS:
        meant = did_you_mean(method, DRAFTS)
        raise UsageError(f"no method {method!r}{meant or ';'} there are {', '.join(sorted(DRAFTS))}")
    foreign = refuse_foreign_options(method, fields)
    return DRAFTS[method].Config(**{name: value for name, value in fields.items() if name not in foreign})


def refuse_foreign_options(method: str, fields: dict) -> set[str]:
    """Return the names of the options that only other methods have. Raises UsageError where one of them is stated."""
    own = DRAFTS[method].Config.model_fields.keys()
    foreign = {name for draft in DRAFTS.values() for name in draft.Config.options()} - own
    for name, value in fields.items():
        if name in foreign and value is not None:
            raise UsageError(f"{name} = {value} means nothing to {method}; leave it out or change the method")
    return foreign


def check_servable(config: DraftConfig, form: str, tokens: dict | None = None, scale: float = 1.0) -> None:
    """Refuse a draft that the engine of that form cannot serve, with the reason. UsageError.

    tokens: the target's special ids. scale: what the target multiplies its head's output by.
    """
    if form not in ENGINES:
        raise UsageError(f"unknown format {form!r}; there are {', '.join(ENGINES)}")
    tokens = tokens or {}
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
    if form == "deepspec" and config.sliding_window is not None:
        raise UsageError(
            "DeepSpec's evaluator decodes without a window, which this draft was trained with on its sliding layers; "
            "export it with --format sglang"
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
    for form in SERVING:
        try:
            check_servable(config, form, tokens, scale)
        except UsageError as error:
            reasons.append(str(error))
    return reasons[0] if len(reasons) == len(SERVING) else None
