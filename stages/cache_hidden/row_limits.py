"""What a row may take. Chat templates are programs from strangers, and a corpus may hold anything.

A worker has ROW_SECONDS of CPU for what it is sent, and ROW_BYTES of memory beyond what it began with; whoever takes
more, even inside one call of C, is ended by the system, not by its own will.
"""

ROW_SECONDS = 10.0  # of CPU, for the rows that a worker is sent at once: some, then each alone
ROW_BYTES = 2 << 30  # of address space
TEMPLATE_SECONDS = 120.0  # of CPU, to read a tokenizer and compile a chat template, constants and all
