"""Limits of CPU time and memory for preparing rows: chat templates are untrusted programs, a corpus untrusted data.

A worker has ROW_SECONDS of CPU for each batch of rows, and ROW_BYTES of memory beyond what it started with. The system
ends a worker that takes more, even inside one call of C.
"""

ROW_SECONDS = 10.0  # of CPU, for the rows that a worker is sent at once: a batch, or one row on its own
ROW_BYTES = 2 << 30  # of address space
TEMPLATE_SECONDS = 120.0  # of CPU, to read a tokenizer and compile a chat template, constants and all
