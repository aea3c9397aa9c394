"""DFlash (arXiv:2602.06036): all slots of a block guessed at once by the backbone and the target's own head."""

from pipeline.drafts.config import OF_DOMINO, OF_DSPARK, DraftConfig, refuse_options
from pipeline.drafts.draft import Draft


class DFlash(Draft):
    """The backbone alone."""

    @staticmethod
    def check(config: DraftConfig) -> None:
        """Refuse what DFlash would not read."""
        refuse_options(config, *OF_DOMINO, *OF_DSPARK)
