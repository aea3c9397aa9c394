"""The target: its files, the live model, its frozen head, THE layer convention, and what proves stored states."""
