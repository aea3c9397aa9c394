"""Run the target over a corpus once and keep its hidden states."""
