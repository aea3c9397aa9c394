"""The hidden-state cache on disk: plan, writer, reader, checks. README.md shows what lies where."""

from pipeline.cache.reader import HiddenCache, Sample

__all__ = ["HiddenCache", "Sample"]
