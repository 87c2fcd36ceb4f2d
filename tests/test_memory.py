# SPDX-License-Identifier: Apache-2.0
"""Memory goes up with what is allocated and comes back; large blocks are mappings while asked for."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest
import torch

from transformers_mcmoe.memory import anonymous_memory, large_blocks_apart, return_free_memory

glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's"
)


class _Info(ctypes.Structure):
    """struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def _mapped() -> int:
    """Bytes of blocks that are mappings of their own."""
    function = ctypes.CDLL(None).mallinfo2
    function.restype = _Info
    return function().hblkhd


@glibc
def test_anonymous_memory_counts_what_is_written():
    before = anonymous_memory()
    block = torch.ones(16 << 20)  # 64 MB
    assert anonymous_memory() - before > 60e6
    del block
    return_free_memory()
    assert anonymous_memory() - before < 30e6


@glibc
def test_large_blocks_are_apart():
    torch.ones(4 << 20)  # freed at once: glibc now keeps blocks of this size in its heap
    before = _mapped()
    with large_blocks_apart():
        large = torch.ones(2 << 20)  # 8 MB
        assert _mapped() - before >= 8 << 20
        small = torch.ones(1 << 18)  # 1 MB
        assert _mapped() - before < 9 << 20
    del large
    assert _mapped() - before < 1 << 20
    after = torch.ones(2 << 20)
    assert _mapped() - before < 1 << 20  # back in the heap
    del small, after


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    return_free_memory()
    with large_blocks_apart():
        assert torch.ones(3).sum() == 3
