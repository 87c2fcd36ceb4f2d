# SPDX-License-Identifier: Apache-2.0
"""What rounding leaves behind is lowered further: grids solved for given codes, and codes improved one by one.

GPTQ decides each column once, before it knows how later ones are rounded. Here every group is visited again under the
whole matrix's Hessian: its grid is refitted in closed form, and each code takes the value that is best given all
others (coordinate descent; Behdin et al., QuantEase, arXiv 2309.01885). The error e H e^T of a row never grows. It
knows errors, codes, grids and a factor of the Hessian.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformers_mcmoe.quantization.columns import descend_columns
from transformers_mcmoe.quantization.grid import Grid, inverse_of, to_fp16

# rounds over a group's columns before the next group is visited
INNER = 2


def descend(
    residuals: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    unit: Tensor,
    diagonal: Tensor,
    groups: Sequence[slice],
    bits: int,
    grids: Sequence[Grid],
    sweeps: int,
) -> None:
    """Lower the error of rounded matrices; residuals, codes and grids are changed in place.

    Args:
        residuals: [B, in, out] float32, V^T times the errors: weights minus what codes stand for.
        codes: [B, in, out] float32.
        scale: [n, B, out] float32 holding fp16 values.
        zero: [n, B, out] float32 holding fp16 values.
        unit: [B, in, in] float32, V of the Hessians V D V^T, unit upper triangular.
        diagonal: [B, in] float32, D.
        groups: columns of every group, in the order of `scale`.
        bits: code width.
        grids: which zeros, or grids, are allowed, by group.
        sweeps: rounds over the groups.
    """
    for _ in range(sweeps):
        for g, group in enumerate(groups):
            rows = unit[:, group, group.start :]
            weighted = rows * diagonal[:, None, group.start :]
            metric = weighted @ rows.transpose(1, 2)
            gradient = weighted @ residuals[:, group.start :]
            change = _improve(codes[:, group], gradient, scale[g], zero[g], metric, bits, grids[g])
            residuals[:, group.start :].baddbmm_(rows.transpose(1, 2), change)


def _improve(
    codes: Tensor, gradient: Tensor, scale: Tensor, zero: Tensor, metric: Tensor, bits: int, grid: Grid
) -> Tensor:
    """The change [B, G, out] of one group's errors; codes [B, G, out] and its grid [B, out] are changed in place.

    `gradient` [B, G, out] is half the derivative of the rows' errors by those of the group.
    """
    own = codes.contiguous()
    stored = (own - zero.unsqueeze(1)).mul_(scale.unsqueeze(1))
    new_scale, new_zero = refit(own, metric @ stored + gradient, scale, zero, metric, bits, grid)
    change = stored - (own - new_zero.unsqueeze(1)).mul_(new_scale.unsqueeze(1))
    # what the error of a row gains by its new grid
    moved = metric @ change
    better = ((2 * gradient + moved) * change).sum(1) < 0
    scale.copy_(torch.where(better, new_scale, scale))
    zero.copy_(torch.where(better, new_zero, zero))
    gradient = torch.where(better.unsqueeze(1), gradient + moved, gradient)
    inverse = inverse_of(scale).unsqueeze(1)
    descend_columns(metric, own, gradient.mul_(inverse), bits, INNER)
    codes.copy_(own)
    return stored.sub_((own - zero.unsqueeze(1)).mul_(scale.unsqueeze(1)))


def refit(
    codes: Tensor, pull: Tensor, scale: Tensor, zero: Tensor, metric: Tensor, bits: int, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Scale and zero [B, out] that rebuild a target best from `codes` [B, G, out] in the metric [B, G, G].

    w' = a * codes - b is linear in a = scale and b = scale * zero; rows whose codes are all equal keep their grid.

    Args:
        codes: [B, G, out] float32.
        pull: [B, G, out] float32, metric @ target.
        scale: [B, out], kept where no better one can be solved for.
        zero: [B, out], likewise.
        metric: [B, G, G] float32.
        bits: code width.
        grid: which zeros are allowed.
    """
    weighted = metric @ codes
    cc, c1 = (weighted * codes).sum(1), weighted.sum(1)
    ct, t1 = (pull * codes).sum(1), pull.sum(1)
    total = metric.sum((-2, -1)).unsqueeze(-1)
    determinant = cc * total - c1.square()
    sound = determinant > 1e-6 * cc * total
    a = torch.where(sound, (ct * total - t1 * c1) / determinant, scale)
    b = torch.where(sound, (ct * c1 - cc * t1) / determinant, scale * zero)
    fixed = grid.symmetric or grid.integer_zeros
    if fixed:
        if not grid.symmetric and bits > 1:
            zero = torch.where(sound & (a > 0), (b / a).round_().clamp_(0, 2**bits - 1), zero)
        # the best scale under a fixed zero
        a = (ct - zero * t1) / (cc - 2 * zero * c1 + zero.square() * total)
        sound = sound & torch.isfinite(a)
    new = to_fp16(a)
    sound &= new > 0
    new = torch.where(sound, new, scale)
    if fixed:
        return grid.settle(new, zero)
    return grid.settle(new, torch.where(sound, to_fp16(b / new), zero))
