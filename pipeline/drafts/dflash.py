"""DFlash (arXiv:2602.06036): all slots of a block predicted at once by the backbone and the target's own head."""

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from pipeline.drafts.block_draft import BlockDraft
from pipeline.drafts.blocks import Blocks
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.draft import PublishedKeys, Shapes
from pipeline.drafts.vocabulary import HeadRows, ids_of, most_frequent, within, write_maps
from pipeline.errors import UsageError
from pipeline.target.head import TargetHead


class DFlashConfig(DraftConfig):
    """The option of DFlash. Raises UsageError for a draft vocabulary that is no smaller than the target's."""

    vocabulary: PositiveInt | None = None  # ids that may be proposed; None: all

    @model_validator(mode="after")
    def _check_vocabulary(self):
        if self.vocabulary is not None and self.vocabulary >= self.vocab_size:
            raise UsageError(
                f"draft.vocabulary = {self.vocabulary} is no less than the target's {self.vocab_size} ids; leave it "
                "out to propose all"
            )
        return self

    @property
    def proposable(self) -> int:
        return self.vocabulary or self.vocab_size


class DFlash(BlockDraft):
    """The backbone without a correction; over fewer ids than the target's, where `vocabulary` says so."""

    Config = DFlashConfig
    title = "DFlash"
    paper = "2602.06036"
    published_fields: ClassVar = {"shift_label": False}
    architectures = ("DFlashDraftModel", "DFlashSpeculator", "Qwen3DSparkModel")  # the last: DeepSpec's, without heads
    forms = ("sglang", "speculators", "deepspec")
    sglang = ("DFLASH", 0)
    only_backbone = True
    reduces_vocabulary = True

    def __init__(self, config: DFlashConfig, head: TargetHead):
        super().__init__(config, head)
        self.reduced, self.rows = config.vocabulary is not None, HeadRows()
        if self.reduced:
            self.register_buffer("d2t", torch.zeros(config.vocabulary, dtype=torch.int64))
            self.register_buffer("t2d", torch.arange(config.vocab_size) < config.vocabulary)

    def before_training(self, samples: Iterable[np.ndarray]) -> None:
        if self.reduced:
            write_maps(most_frequent(samples, self.config.vocab_size, self.config.vocabulary), self.d2t, self.t2d)

    @property
    def head(self) -> TargetHead:
        return self.rows.head(self.target, self.d2t) if self.reduced else self.target

    def learned(self, blocks: Blocks) -> Blocks:
        return within(blocks, self.t2d) if self.reduced else blocks

    def target_ids(self, ids: Tensor) -> Tensor:
        return ids_of(self.d2t)[ids] if self.reduced else ids

    def over_vocabulary(self, values: Tensor, rest: float) -> Tensor:
        if not self.reduced:
            return values
        full = values.new_full((*values.shape[:-1], self.config.vocab_size), rest)
        return full.index_copy_(-1, ids_of(self.d2t), values)

    @classmethod
    def head_tensors(cls, config: DFlashConfig, proposed: int | None = None) -> Shapes:
        if config.vocabulary is None:
            return {}
        return {"d2t": (config.vocabulary,), "t2d": (config.vocab_size,)}

    def published_copies(self) -> dict[str, Tensor]:
        return {"lm_head.weight": self.head.head_VD} if self.reduced else {}

    @classmethod
    def absent(cls, keys: PublishedKeys) -> dict:
        """As `Draft.absent`: only same-position labels are left out; DeepSpec's baseline has next-position ones."""
        return {"shift_label": keys.deepspec, "vocabulary": None}

    @classmethod
    def write_options(cls, config: DFlashConfig, form: str) -> tuple[dict, dict]:
        """As `Draft.write_options`: the one option has a key that every draft of a form has."""
        return {}, {}

    @classmethod
    def refusal(cls, config: DFlashConfig, form: str) -> str | None:
        if form == "deepspec" and not config.shift_label:
            return (
                "DeepSpec's class guesses from the anchor on: it reads DFlash with next-position labels only, and this "
                "draft's shift_label is false; export it with --format sglang"
            )
        if form != "deepspec" and config.shift_label:
            return (
                "engines read DFlash with same-position labels only and would accept nothing from this draft, whose "
                "shift_label is true; train one with draft.shift_label = false, or export it with --format deepspec, "
                "which DeepSpec's evaluator reads"
            )
        if config.vocabulary is not None and form != "speculators":
            return (
                f"{form} has no place for the maps d2t and t2d of a draft vocabulary, and this DFlash draft proposes "
                f"{config.vocabulary:,} of {config.vocab_size:,} ids; export it with --format speculators, which vLLM "
                "reads, or train one without draft.vocabulary"
            )
        return super().refusal(config, form)

    @classmethod
    def card_rows(cls, config: DFlashConfig) -> list[tuple[str, str]]:
        if config.vocabulary is None:
            return []
        return [("ids that may be proposed", f"{config.vocabulary:,} of {config.vocab_size:,}, by d2t and t2d")]
