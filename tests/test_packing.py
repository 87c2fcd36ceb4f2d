# SPDX-License-Identifier: Apache-2.0
"""The packed record: round trips, and bytes computed by hand from the words of the format."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import torch

from transformers_mcmoe.quantization.grid import Quantized
from transformers_mcmoe.quantization.packing import WIDTHS, dequantize, pack, packed_shape, planes, unpack

# low bits first
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
# 32 codes (7 i + 3) mod 2^b, scale 0.5 (0x3800), zero 1.5 (0x3e00); checked by hand:
# 2 bits: 3 2 1 0 -> 0b00_01_10_11 = 1b. 3 bits: low planes 3 2 1 0 3 2 1 0, high bits 0 0 0 0 1 1 1 1 = f0.
GOLDEN = {
    1: "555555550038003e",
    2: "1b1b1b1b1b1b1b1b0038003e",
    3: "1b1b1b1b1b1b1b1bf0f0f0f00038003e",
    4: "a3816f4d2b09e7c5a3816f4d2b09e7c50038003e",
    8: "030a11181f262d343b424950575e656c737a81888f969da4abb2b9c0c7ced5dc0038003e",
}


def _record(codes: Sequence[int], scale: float, zero: float, bits: int) -> bytes:
    """One record in Python integers: every plane is one little-endian integer with column i at bit i * width."""
    record, shift = b"", 0
    for width in PLANES[bits]:
        plane = sum(((code >> shift) & ((1 << width) - 1)) << (i * width) for i, code in enumerate(codes))
        record += plane.to_bytes(len(codes) * width // 8, "little")
        shift += width
    return record + struct.pack("<ee", scale, zero)


def _random(bits: int, group_size: int, rows: int, groups: int, in_features: int | None = None) -> Quantized:
    random = torch.Generator().manual_seed(bits * 1000 + group_size + rows)
    codes = torch.randint(0, 2**bits, (rows, groups, group_size), dtype=torch.uint8, generator=random)
    scale = torch.rand(rows, groups, generator=random).half().float()
    zero = (torch.rand(rows, groups, generator=random) * 2**bits).half().float()
    return Quantized(codes, scale, zero, bits, in_features or groups * group_size)


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip(bits: int, group_size: int, rows: int):
    quantized = _random(bits, group_size, rows, 3)
    packed = pack(quantized)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, 3, group_size * bits // 8 + 4)
    assert packed.shape == packed_shape(rows, 3 * group_size, bits, group_size)
    assert packed.is_contiguous()
    back = unpack(packed, bits, 3 * group_size)
    assert back.codes.dtype == torch.uint8
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scale, quantized.scale)
    assert torch.equal(back.zero, quantized.zero)
    assert (back.bits, back.in_features) == (bits, 3 * group_size)


@pytest.mark.parametrize("group_size", [32, 96])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_equal_python_integers(bits: int, group_size: int):
    quantized = _random(bits, group_size, 3, 2)
    packed = pack(quantized)
    for row in range(3):
        for group in range(2):
            scale, zero = float(quantized.scale[row, group]), float(quantized.zero[row, group])
            expected = _record(quantized.codes[row, group].tolist(), scale, zero, bits)
            assert bytes(packed[row, group].tolist()) == expected


@pytest.mark.parametrize("bits", WIDTHS)
def test_golden_bytes(bits: int):
    codes = [(7 * i + 3) % 2**bits for i in range(32)]
    grid = torch.tensor([[0.5]]), torch.tensor([[1.5]])
    packed = pack(Quantized(torch.tensor([[codes]], dtype=torch.uint8), *grid, bits, 32))
    assert bytes(packed.flatten().tolist()).hex() == GOLDEN[bits]
    assert _record(codes, 0.5, 1.5, bits).hex() == GOLDEN[bits]
    golden = torch.tensor([[list(bytes.fromhex(GOLDEN[bits]))]], dtype=torch.uint8)
    back = unpack(golden, bits, 32)
    assert back.codes.flatten().tolist() == codes
    assert (float(back.scale), float(back.zero)) == (0.5, 1.5)


def test_first_column_is_in_the_lowest_bits():
    codes = torch.zeros(1, 1, 32, dtype=torch.uint8)
    codes[0, 0, 0] = 1
    packed = pack(Quantized(codes, torch.ones(1, 1), torch.zeros(1, 1), 4, 32))
    assert packed.flatten().tolist() == [1] + [0] * 15 + [0x00, 0x3C, 0, 0]  # fp16 1.0 is 0x3c00


@pytest.mark.parametrize(("bits", "expected"), [(b, tuple(p)) for b, p in PLANES.items()])
def test_planes(bits: int, expected: tuple[int, ...]):
    assert planes(bits) == expected


@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_unsupported_width_raises(bits: int):
    message = f"A code width of {bits} bits cannot be packed; choose one of"
    with pytest.raises(ValueError, match=message):
        planes(bits)
    with pytest.raises(ValueError, match=message):
        pack(Quantized(torch.zeros(1, 1, 32, dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1), bits, 32))
    with pytest.raises(ValueError, match=message):
        unpack(torch.zeros(1, 1, 20, dtype=torch.uint8), bits, 32)


@pytest.mark.parametrize(
    ("out_features", "in_features", "bits", "group_size", "expected"),
    [
        (5, 576, 3, 128, (5, 6, 96 * 3 // 8 + 4)),
        (7, 1407, 2, 128, (7, 11, 36)),
        (1, 48, 8, 128, (1, 1, 132)),
        (3, 4096, 1, 128, (3, 32, 20)),
        (2, 2880, 4, 128, (2, 30, 52)),
        (2, 96, 4, 64, (2, 3, 20)),
    ],
)
def test_packed_shape(out_features: int, in_features: int, bits: int, group_size: int, expected: tuple[int, ...]):
    assert packed_shape(out_features, in_features, bits, group_size) == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("in_features", [256, 200])
def test_dequantize_is_code_minus_zero_times_scale(bits: int, in_features: int):
    quantized = _random(bits, 128, 5, 2, in_features)
    expected = (quantized.codes.float() - quantized.zero[..., None]) * quantized.scale[..., None]
    expected = expected.reshape(5, 256)[:, :in_features]
    assert torch.equal(dequantize(pack(quantized), bits, in_features), expected)
    assert torch.equal(dequantize(pack(quantized), bits, in_features, torch.bfloat16), expected.bfloat16())
    assert dequantize(pack(quantized), bits, in_features).dtype == torch.float32


def test_slices_are_whole_matrices():
    """Tensor parallelism slices rows anywhere and columns at group borders."""
    packed = pack(_random(3, 64, 6, 4))
    whole = dequantize(packed, 3, 256)
    assert torch.equal(dequantize(packed[2:5], 3, 256), whole[2:5])
    assert torch.equal(dequantize(packed[:, 1:3], 3, 128), whole[:, 64:192])
