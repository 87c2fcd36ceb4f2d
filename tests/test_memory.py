# SPDX-License-Identifier: Apache-2.0
"""Memory goes up with what is allocated and comes back; large blocks are mappings while asked for."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref

import pytest
import torch

from transformers_mcmoe.memory import anonymous_memory, large_blocks_apart, quick_collections, return_free_memory

glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's"
)


@glibc
def test_anonymous_memory_counts_what_is_written():
    before = anonymous_memory()
    block = torch.ones(16 << 20)  # 64 MB
    assert anonymous_memory() - before > 60e6
    del block
    return_free_memory()
    assert anonymous_memory() - before < 30e6


# In a process of its own: a block goes into a hole of the heap, where one is left, rather than into a mapping.
_LARGE_BLOCKS = """
import ctypes
import torch
from transformers_mcmoe.memory import large_blocks_apart

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()


class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def mapped():
    function = ctypes.CDLL(None).mallinfo2
    function.restype = Info
    return function().hblkhd


MB = 1 << 20
torch.ones(31 * MB // 4)  # freed at once: glibc now keeps blocks of this size in its heap
before = mapped()
with large_blocks_apart():
    large = torch.ones(24 * MB // 4)
    assert mapped() - before >= 24 * MB, "a large block is a mapping"
    small = torch.ones(MB // 4)
    assert mapped() - before < 25 * MB, "a small one is not"
del large
assert mapped() - before < MB, "freed at once"
after = torch.ones(24 * MB // 4)
assert mapped() - before < MB, "back in the heap"
"""


@glibc
def test_large_blocks_are_apart():
    done = subprocess.run([sys.executable, "-c", _LARGE_BLOCKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    return_free_memory()
    with large_blocks_apart():
        assert torch.ones(3).sum() == 3


def test_collections_pass_over_old_objects():
    class Node:
        """Held by itself alone."""

    gc.unfreeze()  # conftest freezes
    old, new = Node(), None
    old.own = old
    watched = weakref.ref(old)
    with quick_collections():
        with quick_collections():  # inside another one nothing changes
            assert gc.get_freeze_count()
        assert gc.get_freeze_count()
        del old
        new = Node()
        new.own, fresh = new, weakref.ref(new)
        del new
        gc.collect()
        assert fresh() is None
        assert watched() is not None
    assert not gc.get_freeze_count()
    gc.collect()
    assert watched() is None
    gc.freeze()
