# SPDX-License-Identifier: Apache-2.0
"""Group grids: sizes, error bounds and range search against a NumPy oracle, and odd inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from transformers_mcmoe.quantization import grid
from transformers_mcmoe.quantization.grid import CLIPS, group_size_for, num_groups, quantize

WIDTHS = (1, 2, 3, 4, 8)


def _weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _relative_error(weight: Tensor, bits: int, group_size: int = 128) -> float:
    error = quantize(weight, bits, group_size).dequantize().double() - weight.double()
    return float(error.square().sum() / weight.double().square().sum())


def _oracle(group: Tensor, bits: int) -> tuple[np.ndarray, float, float]:
    """Codes, scale and zero of one group [n], by trying every clip factor in NumPy float32 and fp16."""
    x = group.numpy().astype(np.float32)
    if bits == 1:
        scale = np.float32(np.float16(2 * np.abs(x).mean()))
        return (x >= 0).astype(np.uint8), float(scale), 0.5
    best = (np.inf, np.zeros(x.shape, np.uint8), 0.0, 0.0)
    for clip in CLIPS:
        low, high = np.float32(min(x.min(), 0) * clip), np.float32(max(x.max(), 0) * clip)
        scale = np.float32(np.float16((high - low) / np.float32(2**bits - 1)))
        zero = np.float32(np.float16(-low / scale))
        codes = np.clip(np.rint(x / scale + zero), 0, 2**bits - 1)
        error = float((((codes - zero) * scale - x).astype(np.float64) ** 2).sum())
        if error < best[0]:
            best = (error, codes.astype(np.uint8), float(scale), float(zero))
    return best[1], best[2], best[3]


@pytest.mark.parametrize(
    ("in_features", "group_size", "expected"),
    [
        (576, 128, 96),
        (2880, 128, 96),
        (1407, 128, 128),
        (64, 64, 64),
        (64, 128, 64),
        (48, 128, 128),
        (100, 128, 128),
        (4096, 128, 128),
        (14336, 128, 128),
        (4096, 32, 32),
        (96, 64, 32),
        (32, 128, 32),
        (160, 128, 32),
        (768, 256, 256),
        (1280, 512, 320),
        (33, 32, 32),
    ],
)
def test_group_size_for(in_features: int, group_size: int, expected: int):
    assert group_size_for(in_features, group_size) == expected


def test_group_size_for_is_the_largest_divisor():
    for in_features in range(1, 700):
        for group_size in (32, 64, 96, 128):
            divisors = [g for g in range(32, group_size + 1, 32) if in_features % g == 0]
            assert group_size_for(in_features, group_size) == max(divisors, default=group_size)


def test_num_groups_counts_the_padded_one():
    assert [num_groups(n, 128) for n in (1, 127, 128, 129, 1407)] == [1, 1, 1, 2, 11]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("columns", "group_size"), [(256, 128), (192, 96), (1407, 128), (48, 128)])
def test_shapes_and_stored_values(bits: int, columns: int, group_size: int):
    quantized = quantize(_weights(7, columns), bits, group_size)
    groups = num_groups(columns, group_size)
    assert quantized.codes.shape == (7, groups, group_size)
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) == 2**bits - 1  # the full range is used and never left
    assert quantized.scale.shape == quantized.zero.shape == (7, groups)
    for values in (quantized.scale, quantized.zero):
        assert values.dtype == torch.float32
        assert torch.equal(values.half().float(), values)
    assert (quantized.scale > 0).all()
    assert quantized.bits == bits
    assert quantized.in_features == columns
    assert quantized.dequantize().shape == (7, columns)
    assert quantized.dequantize().dtype == torch.float32


@pytest.mark.parametrize("bits", WIDTHS)
def test_dequantize_is_code_minus_zero_times_scale(bits: int):
    quantized = quantize(_weights(3, 100), bits, 128)
    expected = (quantized.codes[:, 0].float() - quantized.zero) * quantized.scale
    assert torch.equal(quantized.dequantize(), expected[:, :100])
    assert torch.equal(quantized.dequantize(torch.bfloat16), expected[:, :100].bfloat16())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("columns", "group_size"), [(256, 128), (96, 32), (1407, 128)])
def test_idempotent(bits: int, columns: int, group_size: int):
    once = quantize(_weights(9, columns), bits, group_size)
    twice = quantize(once.dequantize(), bits, group_size)
    assert torch.equal(twice.dequantize(), once.dequantize())
    assert torch.equal(twice.codes, once.codes)
    assert torch.equal(twice.scale, once.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0])
def test_error_is_half_a_step_without_clipping(bits: int, offset: float, monkeypatch):
    monkeypatch.setattr(grid, "CLIPS", (1.0,))
    weight = _weights(16, 256) + offset
    quantized = quantize(weight, bits, 128)
    error = (quantized.dequantize() - weight).unflatten(1, (2, 128)).abs().amax(-1)
    assert (error <= quantized.scale / 2 * 1.0001).all()


def test_eight_bits_keep_half_a_step():
    """At 8 bits clipping a uniform group never pays, so the bound holds with the range search."""
    weight = torch.rand(16, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    quantized = quantize(weight, 8, 128)
    error = (quantized.dequantize() - weight).unflatten(1, (2, 128)).abs().amax(-1)
    assert (error <= quantized.scale / 2 * 1.0001).all()
    assert (quantized.scale <= 2 / 255 * 1.001).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [128, 127, 48])
def test_equals_oracle(bits: int, columns: int):
    """Also where the group is padded: 127 and 48 columns are fitted without the padding."""
    weight = _weights(24, columns, seed=bits) + 0.3
    quantized = quantize(weight, bits, 128)
    for row in range(24):
        codes, scale, zero = _oracle(weight[row], bits)
        rebuilt = torch.from_numpy((codes.astype(np.float32) - np.float32(zero)) * np.float32(scale))
        expected = float((rebuilt - weight[row]).double().square().sum())
        error = float((quantized.dequantize()[row] - weight[row]).double().square().sum())
        assert error == pytest.approx(expected, rel=1e-5)
        assert float(quantized.scale[row, 0]) == pytest.approx(scale, rel=1e-3)
        assert (quantized.codes[row, 0, columns:] == 0).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("columns", "start"), [(1407, 1280), (48, 0)])
def test_padding_does_not_influence_the_tail(bits: int, columns: int, start: int):
    weight = _weights(5, columns) - 2.0
    quantized = quantize(weight, bits, 128)
    tail = quantize(weight[:, start:], bits, 128)
    assert torch.equal(quantized.codes[:, -1:], tail.codes)
    assert torch.equal(quantized.scale[:, -1:], tail.scale)
    assert torch.equal(quantized.zero[:, -1:], tail.zero)
    assert (quantized.codes[:, -1, columns - start :] == 0).all()
    mean = weight[:, start:].abs().mean(1)
    if bits == 1:  # padding in the mean would shrink the grid
        assert torch.equal(quantized.scale[:, -1], (2 * mean).half().float())


@pytest.mark.parametrize("bits", WIDTHS)
def test_groups_do_not_influence_each_other(bits: int):
    weight = _weights(4, 256)
    other = weight.clone()
    other[:, :128] *= 100
    assert torch.equal(quantize(weight, bits, 128).codes[:, 1], quantize(other, bits, 128).codes[:, 1])
    assert torch.equal(quantize(weight, bits, 128).scale[:, 1], quantize(other, bits, 128).scale[:, 1])


@pytest.mark.parametrize("bits", WIDTHS)
def test_zero_groups_stay_zero(bits: int):
    weight = _weights(3, 256)
    weight[:, :128] = 0
    quantized = quantize(weight, bits, 128)
    assert (quantized.dequantize()[:, :128] == 0).all()
    assert (quantized.scale[:, 0] == 0).all()
    assert torch.isfinite(quantized.zero).all()
    assert (quantized.dequantize()[:, 128:] != 0).any()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [0.7, -0.7, 1.0, -123.4, 3e-4])
def test_constant_groups_are_exact_to_fp16(bits: int, value: float):
    weight = torch.full((2, 200), value)  # two groups, one of them padded
    rebuilt = quantize(weight, bits, 128).dequantize()
    # scales below 2^-14 are subnormal: they are off by 2^-25 at most
    assert float((rebuilt - value).abs().max()) <= 2**-10 * abs(value) + 2**-25 * (2**bits - 1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6])
def test_tiny_and_huge_weights_are_no_worse_than_zeros(bits: int, scale: float):
    weight = _weights(8, 256) * scale
    quantized = quantize(weight, bits, 128)
    assert torch.isfinite(quantized.scale).all()
    assert torch.isfinite(quantized.zero).all()
    assert torch.isfinite(quantized.dequantize()).all()
    assert _relative_error(weight, bits) <= 1.0


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e5, 1e6])
def test_more_bits_are_never_worse(scale: float):
    weight = _weights(8, 256) * scale
    errors = [_relative_error(weight, bits) for bits in WIDTHS]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("rows", [1, 3, 13])
def test_rows_are_independent(rows: int):
    weight = _weights(rows, 160)
    whole = quantize(weight, 3, 32)
    for row in range(rows):
        one = quantize(weight[row : row + 1], 3, 32)
        assert torch.equal(one.codes[0], whole.codes[row])
        assert torch.equal(one.scale[0], whole.scale[row])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [256, 300])
@pytest.mark.parametrize("chunk", [1, 300 * 3, 300 * 7 + 1])
def test_chunks_of_rows_do_not_change_the_result(bits: int, columns: int, chunk: int, monkeypatch):
    weight = _weights(11, columns)
    whole = quantize(weight, bits, 128)
    monkeypatch.setattr(grid, "CHUNK", chunk)
    parts = quantize(weight, bits, 128)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scale, whole.scale)
    assert torch.equal(parts.zero, whole.zero)


def test_one_bit_is_symmetric():
    weight = _weights(6, 256)
    quantized = quantize(weight, 1, 128)
    assert (quantized.zero == 0.5).all()
    mean = weight.unflatten(1, (2, 128)).abs().mean(-1, keepdim=True)
    expected = (weight.unflatten(1, (2, 128)).sign() * mean).flatten(1)
    assert torch.allclose(quantized.dequantize(), expected, rtol=2**-10, atol=0)
    assert set(quantized.codes.unique().tolist()) == {0, 1}


@pytest.mark.parametrize(("bits", "most"), [(2, 0.125), (3, 0.036)])
def test_range_search_on_gaussian_weights(bits: int, most: float):
    assert _relative_error(_weights(512, 128), bits) <= most


@pytest.mark.parametrize(("bits", "plain"), [(2, 0.25), (3, 0.047)])
def test_min_max_grid_is_worse(bits: int, plain: float, monkeypatch):
    """The figures of the plain grid (a range of 5.3 sigma): the bounds above cannot be met without the search."""
    weight = _weights(512, 128)
    searched = _relative_error(weight, bits)
    monkeypatch.setattr(grid, "CLIPS", (1.0,))
    assert _relative_error(weight, bits) == pytest.approx(plain, rel=0.05)
    assert searched < _relative_error(weight, bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_raises(bits: int, value: float):
    weight = _weights(3, 64)
    weight[2, 63] = value
    with pytest.raises(ValueError, match=r"shape \(3, 64\).* not finite"):
        quantize(weight, bits, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", WIDTHS)
def test_other_dtypes(bits: int, dtype: torch.dtype):
    weight = _weights(5, 160).to(dtype)
    before = weight.clone()
    quantized, expected = quantize(weight, bits, 128), quantize(weight.float(), bits, 128)
    assert torch.equal(quantized.codes, expected.codes)
    assert torch.equal(quantized.scale, expected.scale)
    assert torch.equal(quantized.zero, expected.zero)
    assert torch.equal(weight, before)


def test_views_are_read_in_order():
    """Experts are views: transposed, or every second row."""
    stack = _weights(128, 20)
    quantized = quantize(stack.T[::2], 4, 128)
    assert torch.equal(quantized.codes, quantize(stack.T[::2].contiguous(), 4, 128).codes)
