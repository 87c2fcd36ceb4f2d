# SPDX-License-Identifier: Apache-2.0
"""Independent pieces of work on the threads of one process.

torch splits every operation over its threads, which pays for large matrices alone: steps of GPTQ are small, and there are thousands of
experts. Knows threads, not what they do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

# bytes that items which are worked on at once take beside what is held anyhow; one takes what it takes
COPIES = 1 << 28

T = TypeVar("T")
R = TypeVar("R")


def at_once(each_bytes: int, device: torch.device) -> int:
    """How many items that take so many bytes each may be worked on at once: 1 on a GPU, which gains nothing by it."""
    return max(1, COPIES // each_bytes) if device.type == "cpu" else 1


def workers(most: int) -> tuple[int, int]:
    """How many items are at work at once where `most` may be, and the threads of each.

    No more than torch has threads, nor than this thread's cores: where threads are bound to cores (OMP_PROC_BIND), it and all that
    it starts have one.
    """
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
    share = -(-threads // max(1, min(threads, cores, most)))
    return threads // share, share


def each(work: Callable[[T], R], items: Sequence[T], most: int) -> Iterator[R]:
    """What `work` returns for every item, in their order, as they are done.

    At most `most` items are at work at once. An item has its share of torch's threads, however many items there are: sums
    are rounded alike for an item alone and for one of many. The first error ends it, once the items at work are done.
    """
    count, share = workers(most)
    if count <= 1:
        yield from map(work, items)
        return
    threads, grad, inference = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(item: T) -> R:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):  # a thread has its own modes
            return work(item)

    pool = ThreadPoolExecutor(count, "mcmoe", torch.set_num_threads, (share,))
    try:
        yield from pool.map(run, items)
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(threads)  # what threads that begin later have
