"""The hidden-state cache on disk: plan, writer, reader, checks. `layout.py` shows what lies where."""

from pipeline.cache.reader import HiddenCache, Sample

__all__ = ["HiddenCache", "Sample"]
