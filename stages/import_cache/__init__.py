"""`pipeline import-cache`: caches that other trainers made, as ours."""
