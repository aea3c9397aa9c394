"""DFlash (arXiv:2602.06036): all slots of a block predicted at once by the backbone and the target's own head."""

from pipeline.drafts.config import DOMINO_OPTIONS, DSPARK_OPTIONS, DraftConfig, refuse_options
from pipeline.drafts.draft import Draft


class DFlash(Draft):
    """The backbone without a correction."""

    @staticmethod
    def check(config: DraftConfig) -> None:
        """Raise UsageError for options of other methods."""
        refuse_options(config, *DOMINO_OPTIONS, *DSPARK_OPTIONS)
