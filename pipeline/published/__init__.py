"""Published drafts: folders of config.json and weights, in the forms that engines and other trainers write and read."""

from pipeline.published.reading import CONFIG, read_published, recorded_share
from pipeline.published.weights import WEIGHTS, Opened, load_draft_folder, open_folder

__all__ = ["CONFIG", "WEIGHTS", "Opened", "load_draft_folder", "open_folder", "read_published", "recorded_share"]
