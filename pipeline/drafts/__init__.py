"""The draft methods and what they share. Adding one is one file and one line in `DRAFTS`."""

from pipeline.drafts.backbone import DraftKV
from pipeline.drafts.block_draft import BlockDraft, init_weights
from pipeline.drafts.blocks import Blocks, Cell, eligible_anchors, lay_blocks, pack
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.dflash import DFlash
from pipeline.drafts.domino import Domino
from pipeline.drafts.draft import BlockRequest, Draft, Proposal, Sampling
from pipeline.drafts.dspark import DSpark
from pipeline.drafts.metrics import metrics_of
from pipeline.errors import UsageError

DRAFTS: dict[str, type[Draft]] = {"dflash": DFlash, "domino": Domino, "dspark": DSpark}


def draft_config(**fields) -> DraftConfig:
    """Return the config that flat fields describe, as recipes, checkpoints and published folders state them.

    Raises UsageError for an unknown method, another method's option (None is as good as left out), and what the
    method's `Config` refuses.
    """
    method = fields.get("method")
    if method not in DRAFTS:
        raise UsageError(f"no method {method!r}; there are {', '.join(sorted(DRAFTS))}")
    Config = DRAFTS[method].Config
    foreign = {name for draft in DRAFTS.values() for name in draft.Config.options()} - Config.model_fields.keys()
    for name, value in fields.items():
        if name in foreign and value is not None:
            raise UsageError(f"{name} = {value} means nothing to {method}; leave it out or change the method")
    return Config(**{name: value for name, value in fields.items() if name not in foreign})


__all__ = [
    "DRAFTS",
    "BlockDraft",
    "BlockRequest",
    "Blocks",
    "Cell",
    "Draft",
    "DraftConfig",
    "DraftKV",
    "Proposal",
    "Sampling",
    "draft_config",
    "eligible_anchors",
    "init_weights",
    "lay_blocks",
    "metrics_of",
    "pack",
]
