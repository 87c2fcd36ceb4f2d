# SPDX-License-Identifier: Apache-2.0
"""Group grids: the scale and zero of every group of a matrix, and the codes nearest to its weights.

Knows one matrix at a time; it does not know calibration data, bytes, modules or models.

A weight is rebuilt as `w = (code - zero) * scale`. Scale and zero are rounded to fp16 before codes are chosen, so
the codes are nearest on the grid that is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_mcmoe.quantization.half_quadratic import half_quadratic

FITS = ("search", "minmax", "hqq")
# clipping factors of the range search; 1.0 is the plain min/max grid
CLIPS = tuple(round(0.30 + 0.05 * step, 2) for step in range(15))
# weights whose fp32 temporaries are held at once: they stay in a core's cache
CHUNK = 1 << 18
_FP16_MAX = 65504.0
_FP16_MIN = 2.0**-24


@dataclass(frozen=True)
class Grid:
    """How the grid of a group is chosen.

    Attributes:
        fit: "search" tries every factor of `CLIPS` and keeps the least squared error, "minmax" takes the whole range,
            "hqq" solves for the zero that suits heavy tails (`half_quadratic`).
        symmetric: the zero is the middle code 2^(bits-1), and the range is symmetric around 0.
        integer_zeros: zeros are rounded to a code.
    """

    fit: str = "search"
    symmetric: bool = False
    integer_zeros: bool = False

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"fit={self.fit!r} is not valid: it must be one of {FITS}.")
        if self.fit == "hqq" and (self.symmetric or self.integer_zeros):
            raise ValueError("fit='hqq' solves for a free zero; leave symmetric and integer_zeros out.")

    # grids of other formats are settled in blocks of groups (`k_quants`)

    def fitted(self, weight: Tensor) -> Grid:
        """The grid for matrices [B, out, in], once for all groups."""
        return self

    def of_group(self, place: Tensor) -> Grid:
        """The grid of one group of each matrix, which has the place [B] in its row."""
        return self

    def settle(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and zero [..] that are stored for given ones, which hold fp16 values."""
        return scale, zero


@dataclass(frozen=True)
class Quantized:
    """Codes and grids of one matrix.

    Attributes:
        codes: [out, n, G] uint8, padded with code 0 where the last group reaches past `in_features`.
        scale: [out, n] float32 holding fp16 values.
        zero: [out, n] float32 holding fp16 values, in units of codes (not rounded to an integer).
        bits: code width.
        in_features: columns of the matrix before padding.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    in_features: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix these codes stand for, [out, in_features]."""
        weight = (self.codes.to(torch.float32) - self.zero.unsqueeze(-1)).mul_(self.scale.unsqueeze(-1))
        return weight.flatten(1)[:, : self.in_features].to(dtype)


def group_size_for(in_features: int, group_size: int) -> int:
    """Columns that share a grid: the largest multiple of 32 <= `group_size` that divides `in_features`.

    Where none divides it, `group_size` itself; the last group is then padded. 576 -> 96, 2880 -> 96, 1407 -> 128.
    """
    for size in range(group_size - group_size % 32, 0, -32):
        if in_features % size == 0:
            return size
    return group_size


def num_groups(in_features: int, group_size: int) -> int:
    """Groups along in_features, the padded one included."""
    return -(-in_features // group_size)


def quantize(weight: Tensor, bits: int, group_size: int, grid: Grid = Grid()) -> Quantized:
    """Round a matrix to the nearest codes of its group grids (data-free).

    Widths above 1 use an asymmetric grid over [min(w, 0), max(w, 0)], shrunk by the factor of `CLIPS` that leaves the
    least squared error in the group. 1 bit uses the symmetric grid {-m, +m}, m = mean |w|, which is the least-squares
    binary grid (XNOR-Net, arXiv 1603.05279).

    Args:
        weight: [out, in] any float dtype.
        bits: 1, 2, 3, 4 or 8.
        group_size: columns per group, as given by `group_size_for`.
        grid: how grids are chosen.

    Returns:
        `Quantized` on the weight's device.

    Raises:
        ValueError: a weight is not finite.
    """
    check_finite(weight)
    out_features, in_features = weight.shape
    groups = num_groups(in_features, group_size)
    whole = in_features // group_size
    codes = torch.zeros(out_features, groups, group_size, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(out_features, groups, device=weight.device)
    zero = torch.empty(out_features, groups, device=weight.device)
    rows = max(1, CHUNK // max(in_features, 1))
    for start in range(0, out_features, rows):
        block = slice(start, start + rows)
        chunk = weight[block].to(torch.float32)
        if whole:
            x = chunk[:, : whole * group_size].reshape(-1, whole, group_size)
            scale[block, :whole], zero[block, :whole] = fit(x, bits, grid)
            codes[block, :whole] = nearest(x, scale[block, :whole], zero[block, :whole], bits)
        if whole < groups:  # the tail is fitted without its padding
            x = chunk[:, whole * group_size :].unsqueeze(1)
            scale[block, whole:], zero[block, whole:] = fit(x, bits, grid)
            codes[block, whole:, : x.shape[-1]] = nearest(x, scale[block, whole:], zero[block, whole:], bits)
    return Quantized(codes, scale, zero, bits, in_features)


def check_finite(weight: Tensor) -> None:
    """Raise ValueError if a matrix holds a value that is not finite."""
    if not is_finite(weight):
        raise ValueError(
            f"The matrix of shape {tuple(weight.shape)} to be quantized holds values that are not finite; "
            "check the checkpoint it comes from."
        )


def is_finite(x: Tensor) -> bool:
    """Whether all values of a tensor [..] are; without a tensor of answers, as `torch.isfinite` makes."""
    return x.numel() == 0 or all(math.isfinite(end) for end in x.aminmax())


def fit(x: Tensor, bits: int, grid: Grid = Grid()) -> tuple[Tensor, Tensor]:
    """Scale and zero [..] float32 holding fp16 values, for groups `x` [.., G] float32."""
    if bits == 1:
        return binary(x, -1)
    if grid.fit == "hqq":
        return half_quadratic(x, bits)

    def distance(inverse: Tensor, zero: Tensor) -> Tensor:
        y = torch.addcmul(zero.unsqueeze(-1), x, inverse.unsqueeze(-1))
        return torch.linalg.vector_norm(y.sub_(y.round().clamp_(0, 2**bits - 1)), dim=-1)

    scale, zero = candidates(x.amin(-1), x.amax(-1), bits, grid)
    distances = torch.stack([distance(*own) for own in zip(inverse_of(scale), zero, strict=True)])
    return best(torch.linalg.vector_norm(x, dim=-1), scale, zero, distances)


def binary(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of the 1-bit grid of groups that lie along a dimension."""
    scale = to_fp16(2 * x.abs().mean(dim))
    return scale, torch.full_like(scale, 0.5)


def candidates(low: Tensor, high: Tensor, bits: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """The grids, scale and zero [C, ..], that a group's least and largest weight [..] allow: one per clipping factor."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    clips = torch.tensor(CLIPS if grid.fit == "search" else (1.0,), dtype=low.dtype, device=low.device)
    clips = clips.view(-1, *[1] * low.dim())
    return grid.settle(*_range(low * clips, high * clips, bits, grid))


def best(length: Tensor, scale: Tensor, zero: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero [..] of least error out of grids [C, ..], given each one's distance from the weights in units of codes.

    `length` [..] is the weights' norm, the error of scale 0, which rebuilds zeros: the only grid for weights below fp16's range.
    """
    errors, index = torch.where(scale > 0, distances * scale, torch.inf).min(0, keepdim=True)
    better = errors < length
    scale, zero = (torch.where(better, x.gather(0, index), 0.0).squeeze(0) for x in (scale, zero))
    return scale, zero


def nearest(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes [.., G] uint8 of groups `x` [.., G] on given grids [..]."""
    return round_codes(_to_codes(x, scale, zero), bits).to(torch.uint8)


def round_codes(y: Tensor, bits: int) -> Tensor:
    """Values in units of codes, rounded in place to codes; at 1 bit the middle goes up, as sign(0) = +1."""
    return y.ge_(0.5) if bits == 1 else y.round_().clamp_(0, 2**bits - 1)


def _range(low: Tensor, high: Tensor, bits: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """fp16-rounded scale and zero of the grid with 2^bits points from `low` to `high` (low <= 0 <= high)."""
    span = high - low
    exact = span / (2**bits - 1)
    scale = to_fp16(exact.clamp(min=_FP16_MIN))
    if grid.symmetric:
        return scale, torch.full_like(scale, 2.0 ** (bits - 1))
    # a scale beyond fp16 covers a part of the range: the part around its middle
    zero = torch.where(exact > _FP16_MAX, -low / span * (2**bits - 1), -low / scale)
    return scale, zero.round() if grid.integer_zeros else to_fp16(zero)


def _to_codes(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Weights in units of codes, before rounding; a group whose scale is 0 becomes 0."""
    return torch.addcmul(zero.unsqueeze(-1), x, inverse_of(scale).unsqueeze(-1))


def inverse_of(scale: Tensor) -> Tensor:
    """One over scales, 0 where they are 0."""
    return torch.where(scale > 0, scale.reciprocal(), 0.0)


def to_fp16(x: Tensor) -> Tensor:
    """Values [..] float32 rounded to what fp16 can hold."""
    return x.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16).to(torch.float32)
