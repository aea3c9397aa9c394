"""ReadPool: runs reads in the calling thread when they are in the page cache, and in several threads otherwise."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property

READ_THREADS = 8  # parallel reads: enough for an NVMe disk, in threads that mostly wait
INLINE_BYTES = 1 << 20  # less is read by the calling thread: handing it over takes longer

Read = Callable[[bool], bool]  # takes `wait`; without it, returns False where it would wait for the disk


class ReadPool:
    """A pool of reader threads. Thread-safe."""

    def do(self, reads: list[Read], size: int, in_page_cache: Callable[[], bool]) -> None:
        """Run all reads, of `size` bytes in total: in this thread while `in_page_cache`, the rest in several threads.

        From memory, one thread copies faster than several that contend for the GIL. Raises what a read raises, once no
        thread is reading.
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
