"""Train a draft from a cache, with no target in memory."""
