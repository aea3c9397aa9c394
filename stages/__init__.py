"""Verbs: what runs. One folder for each long command."""
