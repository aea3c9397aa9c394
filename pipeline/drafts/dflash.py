"""DFlash (arXiv:2602.06036): all slots of a block predicted at once by the backbone and the target's own head."""

from pipeline.drafts.block_draft import BlockDraft
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.protocol import PublishedKeys


class DFlash(BlockDraft):
    """The backbone without a correction."""

    title = "DFlash"
    paper = "2602.06036"
    architectures = ("DFlashDraftModel", "DFlashSpeculator", "Qwen3DSparkModel")  # the last: DeepSpec's, without heads
    forms = ("sglang", "speculators")
    only_backbone = True

    @classmethod
    def recipe_defaults(cls, stated: dict, hidden_size: int) -> dict:
        return super().recipe_defaults(stated, hidden_size) | {"shift_label": False}

    @classmethod
    def absent_shift_label(cls, keys: PublishedKeys) -> bool:
        """Same-position labels, which alone may be left unsaid; DeepSpec's baseline has next-position ones."""
        return keys.deepspec

    @classmethod
    def write_options(cls, config: DraftConfig, form: str) -> tuple[dict, dict]:
        return {}, {}

    @classmethod
    def refusal(cls, config: DraftConfig, form: str) -> str | None:
        if config.shift_label:
            return (
                "engines read DFlash with same-position labels only and would accept nothing from this draft, whose "
                "shift_label is true; train one with draft.shift_label = false"
            )
        return super().refusal(config, form)

    @classmethod
    def sglang_serving(cls, config: DraftConfig) -> tuple[str, int]:
        return "DFLASH", config.block_size  # the anchor is counted among the tokens to verify
