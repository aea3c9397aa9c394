"""A corpus, whoever wrote it: where its rows are, what files they stand in, and what a row says."""
