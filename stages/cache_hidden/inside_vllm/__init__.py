"""What runs in vLLM's own Python for a capture. Alone in a folder, which is on that Python's path."""
