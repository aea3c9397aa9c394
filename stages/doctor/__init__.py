"""`pipeline doctor`: what a machine has and will use, and what is wrong with a run."""
