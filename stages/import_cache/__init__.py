"""`pipeline import-cache`: convert a cache of another trainer into one of this project."""
