"""`python -m pipeline`, the same entry point as the console script."""

from pipeline.cli import main

main()
