# SPDX-License-Identifier: Apache-2.0
"""Memory of this process: how much it takes, and how to give it back.

Knows the C library's allocator (glibc; elsewhere nothing is done), not what is in memory.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3
# blocks from this size on are mappings of their own: freed at once, and never in the way of others
_LARGE = 4 << 20
# the most that glibc raises its threshold to by itself, which it does as soon as a block of that size is freed
_MOST = 32 << 20


def anonymous_memory() -> int:
    """Anonymous resident memory of this process in bytes (Linux), else 0; file-backed pages are not counted."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:")), 0)


class PeakMemory:
    """The most anonymous memory of this process while the block runs, looked at every 20 ms.

    Attributes:
        bytes: the peak so far, 0 where the system does not tell.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.bytes = anonymous_memory()
        self._watcher.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._watcher.join()
        self.bytes = max(self.bytes, anonymous_memory())

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, anonymous_memory())


def return_free_memory() -> None:
    """Give the heap's free pages back to the system."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """While open, large blocks are mappings of their own.

    Left to itself, glibc soon keeps blocks of up to 32 MB in its heap, where the matrices of experts and their
    temporaries leave holes between them that differ from layer to layer.
    """
    option = _function("mallopt")
    if option is None:
        yield
        return
    option(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        option(_M_MMAP_THRESHOLD, _MOST)


@contextmanager
def quick_collections() -> Iterator[None]:
    """While open, the garbage collector passes over the objects that there are now.

    transformers alone makes half a million of them, and every layer that is unloaded is collected at once.
    """
    if gc.get_freeze_count():  # by the caller, who goes on with it
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
