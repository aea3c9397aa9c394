"""Nouns: what the stages share. Caches, drafts, recipes, and the command line that opens the stages."""

__version__ = "0.6.0"
