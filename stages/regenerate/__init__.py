"""`pipeline regenerate`: rewrite a corpus with the target's own replies."""
