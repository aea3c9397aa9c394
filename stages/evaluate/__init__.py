"""Decode with target and draft, and prove that nothing is lost."""
