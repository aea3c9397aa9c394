"""Reads of a cache, one after the other where they lie in memory, and several at a time where a disk is waited for."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property

READ_THREADS = 8  # reads at a time: what a disk of many queues wants, and threads that mostly wait
INLINE_BYTES = 1 << 20  # less is read by the thread that asks: handing it to others takes longer

Read = Callable[[bool], bool]  # told not to wait, False where it would have to


class ReadPool:
    """Threads that read. Safe for many callers at once."""

    def do(self, reads: list[Read], size: int, in_page_cache: Callable[[], bool]) -> None:
        """Do all reads, of `size` bytes together: in this thread while they are `near`, in memory; the rest in several.

        One thread copies from memory for less than several spend on taking turns. What a read raises, this does, when
        no thread reads any more.
        """
        todo, few = iter(reads), size < INLINE_BYTES
        if few or in_page_cache():
            wait_here = few or len(reads) == 1
            first = next((read for read in todo if not read(wait_here)), None)
            if first is None:
                return
            todo = iter([first, *todo])

        def work() -> None:
            for read in todo:  # each takes the next one that nobody has
                read(True)

        done = [self._threads.submit(work) for _ in range(min(READ_THREADS, len(reads)))]
        wait(done)
        for future in done:
            future.result()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
