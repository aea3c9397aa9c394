"""Training runs: recipes, checkpoints, which samples train, and where a draft comes from."""
