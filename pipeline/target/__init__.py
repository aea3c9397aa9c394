"""The target: its files, the loaded model, its frozen head, the layer convention, and the probe of stored states."""
