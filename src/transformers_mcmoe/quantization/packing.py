# SPDX-License-Identifier: Apache-2.0
"""The packed record of checkpoint format version 1: codes and grids to bytes and back (docs/format.md).

Knows bytes only; how codes were chosen is `grid`'s business, where tensors live is the model's.

One matrix is one uint8 tensor [out, n, G * bits / 8 + 4]: n groups along in_features, each a record of G codes, then
the fp16 scale, then the fp16 zero, little-endian. Codes lie in planes of 4, 2 and 1 bits, low bits first (3 bits are a
2-bit plane and a 1-bit plane); 8-bit codes are one byte each. In a plane the first column sits in the lowest bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_mcmoe.quantization.grid import CHUNK, Quantized, group_size_for, num_groups

WIDTHS = (1, 2, 3, 4, 8)
GRID_BYTES = 4  # fp16 scale + fp16 zero
# an integer as wide as all codes of a byte, one byte each
_TOGETHER = {1: torch.int64, 2: torch.int32, 4: torch.int16}


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes that hold a code, low bits first: 3 -> (2, 1), 5 -> (4, 1), 8 -> (8,).

    Raises:
        ValueError: `bits` is outside 1..8.
    """
    if bits not in range(1, 9):
        raise ValueError(f"A code width of {bits} bits cannot be packed; choose one of {WIDTHS}.")
    return (8,) if bits == 8 else tuple(width for width in (4, 2, 1) if bits & width)


def packed_shape(out_features: int, in_features: int, bits: int, group_size: int) -> tuple[int, int, int]:
    """Shape of the packed tensor of a matrix; `group_size` is the configured one, before `group_size_for`."""
    size = group_size_for(in_features, group_size)
    return out_features, num_groups(in_features, size), size * bits // 8 + GRID_BYTES


def pack(quantized: Quantized) -> Tensor:
    """Bytes of a quantized matrix.

    Args:
        quantized: codes [out, n, G] with G a multiple of 8, scale and zero [out, n].

    Returns:
        [out, n, G * bits / 8 + 4] uint8.
    """
    codes, parts, shift = quantized.codes, [], 0
    for width in planes(quantized.bits):
        per_byte = 8 // width
        plane = (codes >> shift) & ((1 << width) - 1)
        plane = plane.unflatten(-1, (-1, per_byte))  # [out, n, bytes, codes per byte]
        packed = plane[..., 0].clone()
        for position in range(1, per_byte):
            packed |= plane[..., position] << (position * width)
        parts.append(packed)
        shift += width
    grid = torch.stack((quantized.scale, quantized.zero), dim=-1).to(torch.float16)
    return torch.cat((*parts, grid.view(torch.uint8)), dim=-1)


def unpack(packed: Tensor, bits: int, in_features: int) -> Quantized:
    """Inverse of `pack`.

    Args:
        packed: [out, n, G * bits / 8 + 4] uint8.
        bits: code width.
        in_features: columns of the matrix before padding.

    Returns:
        `Quantized`; the group size follows from the record's length.
    """
    widths = planes(bits)
    code_bytes = packed.shape[-1] - GRID_BYTES
    group_size = code_bytes * 8 // bits
    codes: Tensor | None = None
    start, shift = 0, 0
    for width in widths:
        stop = start + group_size * width // 8
        part = _codes_of(packed[..., start:stop], width, shift)
        codes = part if codes is None else codes.bitwise_or_(part)
        start, shift = stop, shift + width
    assert codes is not None
    grid = packed[..., code_bytes:].contiguous().view(torch.float16).to(torch.float32)
    return Quantized(codes, grid[..., 0], grid[..., 1], bits, in_features)


def _codes_of(plane: Tensor, width: int, shift: int) -> Tensor:
    """Codes [.., n * 8 / width] of a plane's bytes [.., n], moved up by `shift` bits: all codes of a byte are looked up at once."""
    if width == 8:
        return plane.clone()
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
    every = torch.arange(256, dtype=torch.uint8, device=plane.device).unsqueeze(-1)
    table = (((every >> shifts) & ((1 << width) - 1)) << shift).view(_TOGETHER[width]).squeeze(-1)
    codes = torch.index_select(table, 0, plane.reshape(-1).to(torch.int32)).view(torch.uint8)
    return codes.view(*plane.shape[:-1], plane.shape[-1] * 8 // width)


def dequantize(packed: Tensor, bits: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out, in_features] a packed tensor stands for, computed in fp32 and rounded to `dtype`.

    On CPU it is done a few rows at a time: fp32 values of a large matrix would go through memory.
    """
    rows = max(1, CHUNK // max(in_features, 1))
    if packed.device.type != "cpu" or packed.shape[0] <= rows:
        return unpack(packed, bits, in_features).dequantize(dtype)
    weight = torch.empty(packed.shape[0], in_features, dtype=dtype)
    for start in range(0, packed.shape[0], rows):
        weight[start : start + rows] = unpack(packed[start : start + rows], bits, in_features).dequantize(dtype)
    return weight
