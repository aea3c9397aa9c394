"""The hidden-state cache on disk: plan, writer, reader, checks. `layout.py` shows what lies where."""
