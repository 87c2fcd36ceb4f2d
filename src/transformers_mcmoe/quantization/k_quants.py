# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's Q2_K and Q3_K: matrices quantized by GPTQ on those grids, and their bytes.

A block has 256 weights of a row, in 16 groups of 16. Q2_K: w = d * s * q - e * m, with codes q of 2 bits, s and m of 4 bits for
every group, d and e in fp16 for the block. Q3_K: w = d * s * (q - 4), codes of 3 bits, s of 6 bits and signed, of which only the
positive half is used here. Layouts as in ggml's `block_q2_K` and `block_q3_K`.

Knows matrices and factors of their Hessians; it does not know models or files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transformers_mcmoe.quantization.gptq import REFITS, Factor, gptq
from transformers_mcmoe.quantization.grid import Grid, Quantized, fit, inverse_of, to_fp16

BLOCK, GROUP = 256, 16
GROUPS = BLOCK // GROUP
# bytes of a block by code width
BYTES = {2: 84, 3: 110}
# largest whole number that a group's scale is of the block's
_LEVELS = {2: 15, 3: 31}


@dataclass(frozen=True)
class BlockGrid(Grid):
    """The grids of groups, which are whole multiples of their block's scales.

    Attributes:
        bits: 2 for Q2_K, 3 for Q3_K.
        scales: [2, B, out, blocks] float32 holding fp16 values, d and e of every block; None before `fitted`. Of one group, as
            `of_group` gives it, [2, B, out].
    """

    bits: int = 2
    scales: Tensor | None = None

    def fitted(self, weight: Tensor) -> BlockGrid:
        """The grid with the scales of the blocks of matrices [B, out, in]."""
        return replace(self, scales=block_scales(weight, self.bits))

    def of_group(self, place: Tensor) -> BlockGrid:
        """The grid of one group of each matrix; `place` [B] is its place in the row."""
        assert self.scales is not None
        block = (place // GROUPS)[None, :, None, None].expand(2, -1, self.scales.shape[2], 1)
        return replace(self, scales=self.scales.gather(3, block).squeeze(3))

    def settle(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest scale and zero [B, out] that can be stored."""
        assert self.scales is not None
        d, e = self.scales
        own = (scale * inverse_of(d)).round_().clamp_(0, _LEVELS[self.bits]) * d
        if self.bits == 3:
            return own, zero
        offset = (zero * scale * inverse_of(e)).round_().clamp_(0, _LEVELS[2]) * e
        return own, offset * inverse_of(own)


def block_scales(weight: Tensor, bits: int) -> Tensor:
    """d and e [2, B, out, blocks] float32 holding fp16 values: the largest scale and offset of a block's groups take the last level.

    Args:
        weight: [B, out, in] any float dtype, `in` a multiple of 256.
        bits: 2 or 3.
    """
    found = []
    for matrix in weight:
        groups = matrix.to(torch.float32).unflatten(1, (-1, GROUP))
        parts = [
            fit(rows, bits, Grid(symmetric=bits == 3)) for rows in groups.split(max(1, (1 << 20) // groups[0].numel()))
        ]
        scale, zero = (torch.cat(column) for column in zip(*parts, strict=True))
        largest = [part.unflatten(1, (-1, GROUPS)).amax(-1) / _LEVELS[bits] for part in (scale, scale * zero)]
        found.append(torch.stack(largest))
    return to_fp16(torch.stack(found, dim=1))


def quantize_blocks(weight: Tensor, factor: Factor, bits: int, refits: int = REFITS, sweeps: int = 0) -> Tensor:
    """Round matrices under their Hessians onto Q2_K or Q3_K.

    Args:
        weight: [B, out, in] any float dtype, `in` a multiple of 256.
        factor: of the B Hessians, in groups of 16.
        bits: 2 or 3.
        refits: rounds of refitting grids to codes.
        sweeps: of coordinate descent.

    Returns:
        The rows' bytes, [B * out, in / 256 * 84 or 110] uint8.
    """
    grid = BlockGrid(symmetric=bits == 3, bits=bits)
    quantized = gptq(weight, factor, bits, grid, refits, sweeps)
    return pack_blocks(quantized, block_scales(weight, bits).flatten(1, 2))


def pack_blocks(quantized: Quantized, scales: Tensor) -> Tensor:
    """Bytes [out, blocks * 84 or 110] of codes on the grids of blocks.

    Args:
        quantized: codes [out, n, 16] and grids of 2 or 3 bits.
        scales: [2, out, blocks], d and e.
    """
    bits = quantized.bits
    codes = quantized.codes.unflatten(1, (-1, GROUPS)).flatten(2)  # [out, blocks, 256]
    scale, zero = (part.unflatten(1, (-1, GROUPS)) for part in (quantized.scale, quantized.zero))
    d, e = scales.unsqueeze(-1)
    level = (scale * inverse_of(d)).round().to(torch.uint8)
    low = codes & 3
    # four quarters of each half share bytes: columns l, l + 32, l + 64 and l + 96
    quarters = low.unflatten(2, (2, 4, 32))
    planes = sum(quarters[..., j, :] << (2 * j) for j in range(4)).flatten(2)  # type: ignore[union-attr]
    if bits == 2:
        offset = (scale * zero * inverse_of(e)).round().to(torch.uint8)
        parts = [level | (offset << 4), planes, _half(d), _half(e)]
    else:
        eighths = (codes >> 2).unflatten(2, (8, 32))
        mask = sum(eighths[..., j, :] << j for j in range(8))
        parts = [mask, planes, _six_bits(level + 32), _half(d)]  # type: ignore[list-item]
    return torch.cat(parts, dim=-1).flatten(1)


def unpack_blocks(packed: Tensor, bits: int) -> Tensor:
    """The matrix [out, in] float32 that rows of blocks stand for; the inverse of `pack_blocks`."""
    blocks = packed.unflatten(1, (-1, BYTES[bits]))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)[:, None]
    if bits == 2:
        grids, planes, d, e = blocks.split([16, 64, 2, 2], dim=-1)
    else:
        mask, planes, grids, d = blocks.split([32, 64, 12, 2], dim=-1)
    codes = ((planes.unflatten(2, (2, 1, 32)) >> shifts) & 3).flatten(2)  # [out, blocks, 256]
    d = _float(d)
    if bits == 2:
        step, offset = d * (grids & 15), _float(e) * (grids >> 4)
    else:
        bit = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
        codes = codes | (((mask.unsqueeze(2) >> bit) & 1) << 2).flatten(2)
        step = d * (_from_six_bits(grids).to(torch.float32) - 32)
        offset = 4 * step
    values = codes.unflatten(2, (GROUPS, GROUP)) * step.unsqueeze(-1) - offset.unsqueeze(-1)
    return values.flatten(1)


def _six_bits(values: Tensor) -> Tensor:
    """16 numbers of 6 bits as 12 bytes: the low 4 bits of two in each of 8, the high 2 of four in each of 4."""
    low = (values[..., :8] & 15) | ((values[..., 8:] & 15) << 4)
    quarters = (values >> 4).unflatten(-1, (4, 4))
    high = sum(quarters[..., j, :] << (2 * j) for j in range(4))
    return torch.cat([low, high], dim=-1)  # type: ignore[list-item]


def _from_six_bits(packed: Tensor) -> Tensor:
    low = torch.cat([packed[..., :8] & 15, packed[..., :8] >> 4], dim=-1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)[:, None]
    return low | (((packed[..., None, 8:] >> shifts) & 3) << 4).flatten(-2)


def _half(values: Tensor) -> Tensor:
    """[.., 1] as the two bytes of fp16."""
    return values.to(torch.float16).contiguous().view(torch.uint8)


def _float(packed: Tensor) -> Tensor:
    return packed.contiguous().view(torch.float16).to(torch.float32)
