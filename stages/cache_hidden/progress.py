"""The progress of a capture, on stderr: a live line on a terminal, else a line every few seconds."""

import sys
import threading
import time

EVERY_S = 5.0


class Progress:
    """Counts tokens and bytes, from any thread, and shows them while it is open."""

    def __init__(self, tokens: int, shards: int):
        self.tokens, self.shards = tokens, shards
        self.done_tokens = self.done_bytes = self.done_shards = 0
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._shown = self._start
        self._live = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), get_renderable=self.line, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, tokens: int, written: int) -> None:
        """Count tokens computed and bytes written."""
        with self._lock:
            self.done_tokens += tokens
            self.done_bytes += written
            now = time.monotonic()
            if self._live is None and now - self._shown >= EVERY_S:
                self._shown = now
                print(self.line(), file=sys.stderr, flush=True)

    def add_shard(self) -> None:
        """Count a committed shard."""
        self.done_shards += 1

    def line(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = self.done_tokens / seconds
        left = int((self.tokens - self.done_tokens) / rate) if rate else None
        eta = "unknown" if left is None else f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return (
            f"shard {self.done_shards}/{self.shards} · {self.done_tokens:,} of {self.tokens:,} tokens · "
            f"{rate:,.0f} tokens/s · {self.done_bytes / seconds / 1e6:,.1f} MB/s written · "
            f"ETA {eta}"
        )
