# SPDX-License-Identifier: Apache-2.0
"""The loops over a group's columns: the search of a grid, rounding with feedback, and coordinate descent over codes.

On CPU they run compiled (kernels/csrc/columns.h), elsewhere in torch, which defines what they mean. They know values,
codes and matrices of one group; what these stand for is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_mcmoe.kernels import cpu
from transformers_mcmoe.quantization.grid import (
    CHUNK,
    Grid,
    best,
    binary,
    candidates,
    fit,
    inverse_of,
    round_codes,
)

# columns rounded before their errors are spread to the rest of the group by one matrix product
PANEL = 32


def fit_columns(target: Tensor, bits: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero [B, out] float32 holding fp16 values, as `grid.fit` chooses them, for groups [B, G, out]."""
    if bits == 1:
        return binary(target, 1)
    if grid.fit != "hqq" and target.device.type == "cpu" and cpu.library() is not None:
        scale, zero = candidates(target.amin(1), target.amax(1), bits, grid)
        squared = cpu.grid_errors(target, inverse_of(scale), zero, bits)
        return best(torch.linalg.vector_norm(target, dim=1), scale, zero, squared.sqrt_())
    batch, size, rows = target.shape
    part = max(1, CHUNK // (batch * size))
    fitted = [
        fit(target[:, :, start : start + part].transpose(1, 2).contiguous(), bits, grid)
        for start in range(0, rows, part)
    ]
    return torch.cat([scale for scale, _ in fitted], dim=1), torch.cat([zero for _, zero in fitted], dim=1)


def round_columns(values: Tensor, unit: Tensor, diagonal: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round column k to the code nearest to values_k + sum_{j<k} errors_j * unit_jk, errors = values - codes.

    Args:
        values: [B, G, out] float32, in units of codes.
        unit: [B, G, G] float32, unit upper triangular.
        diagonal: [B, G] float32, what a squared residual of a column costs.
        bits: code width.

    Returns:
        Codes [B, G, out] and errors [B, G, out] float32, and the loss [B, out]: the sum over columns of diagonal times the
        squared distance between the code and what was rounded to it.
    """
    if values.device.type == "cpu" and cpu.library() is not None:
        return cpu.round_columns(values, unit.transpose(1, 2), diagonal, bits)
    codes, errors, residuals = (torch.empty_like(values) for _ in range(3))
    for start in range(0, values.shape[1], PANEL):
        stop = min(start + PANEL, values.shape[1])
        panel = values[:, start:stop]
        if start:
            panel = torch.baddbmm(panel, unit[:, :start, start:stop].transpose(1, 2), errors[:, :start])
        for k in range(start, stop):
            value = panel[:, k - start : k - start + 1]
            if k > start:
                value = torch.baddbmm(value, unit[:, start:k, k : k + 1].transpose(1, 2), errors[:, start:k])
            code = codes[:, k : k + 1]
            round_codes(code.copy_(value), bits)
            torch.sub(value, code, out=residuals[:, k : k + 1])
            torch.sub(values[:, k : k + 1], code, out=errors[:, k : k + 1])
    return codes, errors, residuals.square_().mul_(diagonal.unsqueeze(-1)).sum(1)


def descend_columns(metric: Tensor, codes: Tensor, gradients: Tensor, bits: int, sweeps: int) -> None:
    """Give each code in turn the value that is best given all others.

    Args:
        metric: [B, G, G] float32, the Hessian of the group's columns.
        codes: [B, G, out] float32, changed in place.
        gradients: [B, G, out] float32, the Hessian times the errors of all columns, in units of codes; changed in place.
        bits: code width.
        sweeps: rounds over the columns; it ends sooner where nothing changes.
    """
    if codes.device.type == "cpu" and cpu.library() is not None:
        cpu.descend_columns(metric, codes, gradients, bits, sweeps)
        return
    diagonal = metric.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(diagonal > 0, diagonal.reciprocal(), 0.0)
    for _ in range(sweeps):
        for k in range(codes.shape[1]):
            code = codes[:, k : k + 1]
            best = round_codes(torch.addcmul(code, gradients[:, k : k + 1], inverse[:, k, None, None]), bits)
            gradients.baddbmm_(metric[:, :, k : k + 1], best - code, alpha=-1)
            code.copy_(best)
