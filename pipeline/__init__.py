"""What the stages share: corpora, targets, the hidden-state cache, drafts, runs, and the command line."""

__version__ = "0.11.0"
