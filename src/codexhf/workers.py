"""Work on batches in several processes, whose results come back in order: the same for any number.

Processes are forked, so that what a function holds (a tokenizer, a table mapped into memory) is not
copied, and at most two batches a process are on their way, so that memory does not grow with the
data.
"""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any

num_proc: int | None = None
"""Processes of this run's data; None: the cores that each process of training may use."""

PR_SET_PDEATHSIG = 1

_function: Callable | None = None


def process_count() -> int:
    """Return how many processes work on data."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return num_proc or max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def in_order(function: Callable[[Any], Any], items: Iterable) -> Iterator:
    """Yield `function(item)` for each item, in order; what a process raises is raised here.

    Args:
        function: may be a closure; its results are pickled.
    """
    items, count = iter(items), process_count()
    first = list(islice(items, 2))
    if count == 1 or len(first) < 2:  # one batch is not worth a process
        yield from map(function, chain(first, items))
        return
    pool = ProcessPoolExecutor(count, get_context("fork"), _adopt, (function,))
    try:
        waiting: deque = deque()
        for item in chain(first, items):
            waiting.append(pool.submit(_call, item))
            if len(waiting) >= 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def progress(items: Iterable, what: str, total: int | None = None, **kwargs: Any) -> Iterable:
    """Show a bar on the first process of what takes more than two seconds."""
    from datasets.utils.tqdm import tqdm  # datasets switches bars off for all

    silent = int(os.environ.get("RANK", "0")) > 0
    return tqdm(items, desc=what, total=total, delay=2, leave=False, disable=silent, **kwargs)


def _adopt(function: Callable) -> None:
    global _function
    _function = function
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent decides
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # ... but nobody outlives it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _call(item: Any) -> Any:
    return _function(item)
