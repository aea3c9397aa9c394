"""Reading a corpus: its files and their formats, its records and messages in any known form, and counts of both."""
