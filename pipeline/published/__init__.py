"""Published drafts: folders of config.json and weights, in the forms that engines and other trainers write and read."""

from pipeline.published.reading import CONFIG, recorded_share
from pipeline.published.weights import WEIGHTS, load_draft_folder

__all__ = ["CONFIG", "WEIGHTS", "load_draft_folder", "recorded_share"]
