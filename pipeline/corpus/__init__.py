"""Reading a corpus: its files and their formats, its rows and messages in any known form, and counts of both."""
