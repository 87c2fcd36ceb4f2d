# SPDX-License-Identifier: Apache-2.0
"""Packed matrices in the layout that the CPU kernels read (csrc/layout.h): where they lie, and writing them there.

Made from the checkpoint's bytes at first use; knows widths and shapes, not modules.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transformers_mcmoe.kernels import cpu
from transformers_mcmoe.quantization.grid import group_size_for, num_groups

if TYPE_CHECKING:
    from transformers_mcmoe.plan import ExpertWidths

ROWS = 32  # of a block, as in csrc/kernels.h
_HUGE_PAGE = 2 << 20
# records are fetched ahead of use; what lies behind the last one must belong to us
_MARGIN = 16 << 10


def block_bytes(bits: int, group: int, groups: int) -> int:
    """Bytes of one block of 32 rows."""
    return (group * ROWS * bits // 8 + 4 * ROWS) * groups


def allocate(size: int) -> Tensor:
    """[size] uint8 on huge pages where the system has them."""
    alignment = _HUGE_PAGE if size >= _HUGE_PAGE else 64
    memory = torch.empty(size + alignment + _MARGIN, dtype=torch.uint8)
    start = -memory.data_ptr() % alignment
    loaded = cpu.library()
    if loaded is not None and size >= _HUGE_PAGE and sys.platform == "linux":
        loaded.mcmoe_huge_pages(memory.data_ptr() + start, size // _HUGE_PAGE * _HUGE_PAGE)
    return memory[start : start + size]


def repack(qweight: Tensor, bits: int, blocks: Tensor, *, first: int = 0, pitch: int = ROWS) -> None:
    """Write a packed matrix of the checkpoint into blocks of the kernels' layout (csrc/layout.h).

    Args:
        qweight: [out, n, G * bits / 8 + 4] uint8.
        bits: code width.
        blocks: [bytes] uint8, where the blocks go.
        first: row of a block that takes row 0: 0, or 16 for the up projection of a pair.
        pitch: rows of this matrix in a block: 32, or 16 in a pair.
    """
    loaded = cpu.library()
    assert loaded is not None
    qweight = qweight.contiguous()
    rows, groups, record = qweight.shape
    group = (record - 4) * 8 // bits
    loaded.mcmoe_repack(qweight.data_ptr(), rows, bits, group, groups, first, pitch, blocks.data_ptr())


def pack_matrix(qweight: Tensor, bits: int) -> Tensor:
    """A packed matrix [out, n, G * bits / 8 + 4] in the kernels' layout, [bytes] uint8."""
    rows, groups, record = qweight.shape
    blocks = allocate(-(-rows // ROWS) * block_bytes(bits, (record - 4) * 8 // bits, groups))
    repack(qweight, bits, blocks)
    return blocks


def layout(sizes: Sequence[tuple[int, int]], widths: ExpertWidths, group_size: int) -> tuple[Tensor, int]:
    """Where a layer's experts lie in their arena.

    Args:
        sizes: rows and columns of an expert's matrices: gate and up, or up alone, then down.
        widths: of every expert.
        group_size: the configured one.

    Returns:
        [E, P, 4] int64 on CPU, for gate_up and down of each expert, and where some have factors also for a and b of each
        of `sizes`: offset or -1, code width, group size, columns; and the arena's bytes.
    """
    pitch, size = ROWS // (len(sizes) - 1), 0

    def part(rows: int, columns: int, bits: int, step: int = ROWS) -> list[int]:
        nonlocal size
        group, start = group_size_for(columns, group_size), size
        if not (bits and columns):
            return [-1, 0, group, columns]
        size += -(-rows // step) * block_bytes(bits, group, num_groups(columns, group))
        return [start, bits, group, columns]

    table = []
    for expert, (gate_up, down) in enumerate(zip(widths.gate_up, widths.down, strict=True)):
        parts = [part(*sizes[0], gate_up, pitch), part(*sizes[-1], down)]
        if any(widths.ranks):
            rank = widths.rank_of(expert)
            for rows, columns in sizes:
                parts += [part(rank, columns, widths.rank_bits if rank else 0), part(rows, rank, widths.rank_bits)]
        table.append(parts)
    return torch.tensor(table, dtype=torch.int64, device="cpu"), size


def pack_experts(
    qweights: Sequence[Sequence[Tensor]], layout: Tensor, size: int, factors: Sequence[Sequence[Tensor]] = ()
) -> Tensor:
    """A layer's experts in the kernels' layout.

    Args:
        qweights: per expert its gate (if gated), up and down, packed; none if it was dropped. One that only has factors
            may hold anything in their place.
        layout: of `layout`.
        size: bytes of the arena.
        factors: per expert a and b of each of these, packed, where some expert has any.

    Returns:
        [size] uint8.
    """
    blocks = allocate(size)
    for matrices, ((start, bits, *_), (down_start, down_bits, *_), *_) in zip(qweights, layout.tolist(), strict=True):
        inputs = matrices[:-1] if bits else ()
        for n, matrix in enumerate(inputs):
            repack(matrix, bits, blocks[start:], first=n * ROWS // 2, pitch=ROWS // len(inputs))
        if down_bits:
            repack(matrices[-1], down_bits, blocks[down_start:])
    for own, (_, _, *parts) in zip(factors, layout.tolist(), strict=False):
        for factor, (start, bits, *_) in zip(own, parts, strict=False):
            if bits:
                repack(factor, bits, blocks[start:])
    return blocks
