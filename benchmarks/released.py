# SPDX-License-Identifier: Apache-2.0
"""MC's rounding as its authors released it, for a row of `quality`: what the library does otherwise, undone.

Their code differs from GPTQ as published, and from this library's, in three ways: up to 3 bits no column makes up for those before it in
its group, only later groups do; ranges are searched within 10 % of the whole range; and groups are rounded in their order. It knows
matrices and factors of their Hessians.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.config import PRESETS
from transformers_mcmoe.pipeline import rounding
from transformers_mcmoe.quantization import Factor, Quantized
from transformers_mcmoe.quantization.grid import fit, nearest, to_fp16

# the paper's settings, but for what their code computes: eps has the exponent 1, and columns keep their order
OPTIONS: dict[str, Any] = PRESETS["paper"] | {"gamma": 1.0, "act_order": False}
RANGES = torch.cat((torch.linspace(1.0, 1.1, 51), torch.linspace(1.0, 0.9, 51)[1:])).tolist()
NORM = 2.4


@contextmanager
def as_released() -> Iterator[None]:
    """While open, the pipeline rounds like the authors' code."""
    ours = rounding.gptq
    rounding.gptq = gptq
    try:
        yield
    finally:
        rounding.gptq = ours


def gptq(weight: Tensor, factor: Factor, bits: int, *_: Any) -> Quantized:
    """Round matrices [B, out, in] as they do, in place of `quantization.gptq`."""
    columns, size = weight.shape[-1], factor.group_size
    if columns % size:
        raise ValueError(f"{columns} columns are no multiple of the group size {size}, which the authors' code needs.")
    work = weight.to(torch.float32).clone()
    # the upper Cholesky factor of the inverse Hessian, from H = V D V^T
    identity = torch.eye(columns).expand_as(factor.unit)
    inverse = torch.linalg.solve_triangular(factor.unit, identity, upper=True, unitriangular=True)
    upper = inverse / factor.diagonal.sqrt().unsqueeze(-1)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    codes, scales, zeros = [], [], []
    for start in range(0, columns, size):
        stop = start + size
        block = work[:, :, start:stop]
        scale, zero = search(block, bits)
        own, errors = torch.empty_like(block), torch.empty_like(block)
        for k in range(size):
            column = block[:, :, k : k + 1]
            own[:, :, k : k + 1] = nearest(column, scale, zero, bits)
            rebuilt = (own[:, :, k] - zero) * scale
            errors[:, :, k] = (block[:, :, k] - rebuilt) / diagonal[:, start + k, None]
            if bits > 3:
                block[:, :, k + 1 :] -= errors[:, :, k, None] * upper[:, None, start + k, start + k + 1 : stop]
        work[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
        codes.append(own.to(torch.uint8))
        scales.append(scale)
        zeros.append(zero)
    return Quantized(
        torch.stack(codes, dim=2).flatten(0, 1),
        torch.stack(scales, dim=2).flatten(0, 1),
        torch.stack(zeros, dim=2).flatten(0, 1),
        bits,
        columns,
    )


def search(block: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero [B, out] of a group [B, out, G]: the range of least error to the power 2.4."""
    if bits == 1:
        return fit(block, bits)
    low, high = block.amin(-1).clamp(max=0), block.amax(-1).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.zeros_like(low), torch.zeros_like(low)
    for share in RANGES:
        scale = to_fp16((high - low) * share / (2**bits - 1)).clamp(min=2.0**-24)
        zero = to_fp16(-low * share / scale)
        codes = nearest(block, scale, zero, bits)
        distance = (block - (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).abs_().pow_(NORM).sum(-1)
        better = distance < best
        best, best_scale = torch.where(better, distance, best), torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
