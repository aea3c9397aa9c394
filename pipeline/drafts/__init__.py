"""The draft methods and what they share. Adding one is one file and one line in `DRAFTS`."""

from pipeline.drafts.blocks import Blocks, Cell, eligible_anchors, lay_blocks, pack
from pipeline.drafts.config import DraftConfig, default_gamma, needs_final_states
from pipeline.drafts.decoding import BlockRequest, DraftKV, Proposal, Sampling
from pipeline.drafts.dflash import DFlash
from pipeline.drafts.domino import Domino
from pipeline.drafts.draft import Draft, Loss, ScheduleValues, init_weights
from pipeline.drafts.dspark import DSpark
from pipeline.drafts.metrics import metrics_of

DRAFTS: dict[str, type[Draft]] = {"dflash": DFlash, "domino": Domino, "dspark": DSpark}

__all__ = [
    "DRAFTS",
    "BlockRequest",
    "Blocks",
    "Cell",
    "Draft",
    "DraftConfig",
    "DraftKV",
    "Loss",
    "Proposal",
    "Sampling",
    "ScheduleValues",
    "default_gamma",
    "eligible_anchors",
    "init_weights",
    "lay_blocks",
    "metrics_of",
    "needs_final_states",
    "pack",
]
