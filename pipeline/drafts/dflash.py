"""DFlash (arXiv:2602.06036): all slots of a block predicted at once by the backbone and the target's own head."""

from typing import ClassVar

from pipeline.drafts.block_draft import BlockDraft
from pipeline.drafts.draft import PublishedKeys
from pipeline.drafts.vocabulary import ReducesVocabulary, VocabularyConfig


class DFlash(ReducesVocabulary, BlockDraft):
    """The backbone without a correction."""

    Config = VocabularyConfig
    title = "DFlash"
    paper = "2602.06036"
    published_fields: ClassVar = {"shift_label": False}
    architectures = ("DFlashDraftModel", "DFlashSpeculator", "Qwen3DSparkModel")  # the last: DeepSpec's, without heads
    forms = ("sglang", "speculators", "deepspec")
    sglang = ("DFLASH", 0)
    only_backbone = True

    @classmethod
    def absent(cls, keys: PublishedKeys) -> dict:
        """As `Draft.absent`: only same-position labels are left out; DeepSpec's baseline has next-position ones."""
        return super().absent(keys) | {"shift_label": keys.deepspec}

    @classmethod
    def refusal(cls, config: VocabularyConfig, form: str) -> str | None:
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
        return super().refusal(config, form)
