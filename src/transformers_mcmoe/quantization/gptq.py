# SPDX-License-Identifier: Apache-2.0
"""GPTQ: codes chosen column by column, each column making up for the errors of those before it.

Knows matrices and their Hessians; it does not know calibration, experts, or where a Hessian comes from.

The error of a row is e H e^T with e = w - w' and H = sum over tokens of x^T x. With H = V D V^T, V unit upper
triangular, it is the sum of D_k * (e V)_k^2, so column k is rounded to the value nearest to w_k + sum_{j<k} e_j V_jk:
GPTQ (Frantar et al., arXiv 2210.17323) in the form of Chee et al. (QuIP, arXiv 2307.13304, theorem 6), which needs one
Cholesky factorization and no inverse.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_mcmoe.quantization.grid import (
    CHUNK,
    Grid,
    Quantized,
    check_finite,
    fit,
    num_groups,
    round_codes,
    to_fp16,
)

logger = logging.getLogger(__name__)

DAMPING = 0.01
# rounds of fitting a group's grid to its codes in the Hessian's metric
REFITS = 2
# columns rounded before their errors are spread to the rest of the group by one matrix product
PANEL = 32
_RETRIES = 6


@dataclass(frozen=True)
class Factor:
    """Factorization of a batch of damped Hessians, H = V D V^T, shared by all widths and by gate and up.

    Attributes:
        unit: [B, in, in] float32, V: unit upper triangular.
        diagonal: [B, in] float32, D > 0.
        order: [B, in] int64, the order in which columns are rounded (V and D are in this order), or None.
        group_size: columns per group.
    """

    unit: Tensor
    diagonal: Tensor
    order: Tensor | None
    group_size: int

    @classmethod
    def of(
        cls,
        hessian: Tensor,
        group_size: int,
        *,
        damping: float = DAMPING,
        act_order: bool = False,
        name: str = "a matrix",
    ) -> Factor:
        """Factorize Hessians.

        Args:
            hessian: [B, in, in] float32 sums of x^T x; symmetric, positive semi-definite. Overwritten: its memory
                becomes the factor's.
            group_size: columns per group, as given by `group_size_for`.
            damping: added to the diagonal, as a share of its mean; raised tenfold, and logged, while the Hessian is not
                positive definite.
            act_order: groups with large activations come first, and in a group columns with large activations.
            name: what the log calls the matrix.

        Raises:
            ValueError: a Hessian holds a value that is not finite.
        """
        if not bool(torch.isfinite(hessian).all()):
            raise ValueError(
                f"The Hessian of {name} holds values that are not finite; check the calibration data and dtype."
            )
        order = _activation_order(hessian.diagonal(dim1=-2, dim2=-1), group_size) if act_order else None
        for b, matrix in enumerate(hessian):
            matrix.copy_(_factorize(matrix, None if order is None else order[b], damping, name))
        root = hessian.diagonal(dim1=-2, dim2=-1).clone()
        hessian.div_(root.unsqueeze(-2))
        return cls(hessian, root.square_(), order, group_size)

    def take(self, which: list[int]) -> Factor:
        """The factor of some matrices of the batch; a run of neighbours shares memory."""
        pick = slice(which[0], which[-1] + 1) if which == list(range(which[0], which[-1] + 1)) else torch.tensor(which)
        order = None if self.order is None else self.order[pick]
        return Factor(self.unit[pick], self.diagonal[pick], order, self.group_size)


def _factorize(hessian: Tensor, order: Tensor | None, damping: float, name: str) -> Tensor:
    """The upper triangular R with H + damping * I = R R^T, [in, in] float32, rows and columns in the given order."""
    mean = float(hessian.diagonal().mean())
    identity = torch.eye(hessian.shape[0], device=hessian.device)
    if mean <= 0:  # no activation at all: every column counts the same
        return identity
    share = damping
    for _ in range(_RETRIES):
        # in reverse order the lower factor becomes the upper one
        damped = hessian.flip(0, 1) if order is None else hessian[order.flip(0).unsqueeze(1), order.flip(0)]
        damped.diagonal().add_(share * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if int(info) == 0:
            return lower.flip(0, 1)
        share = max(10 * share, 1e-4)
        logger.warning("The Hessian of %s is not positive definite; damping is raised to %g of its mean.", name, share)
    logger.warning("The Hessian of %s stays indefinite; the matrix is rounded without feedback.", name)
    return identity


def _activation_order(diagonal: Tensor, group_size: int) -> Tensor:
    """[B, in] columns by falling activation, groups kept together; a padded last group stays last."""
    count = diagonal.shape[1]
    whole = count // group_size
    parts = []
    if whole:
        groups = diagonal[:, : whole * group_size].unflatten(1, (whole, group_size))
        columns = (
            groups.argsort(-1, descending=True) + torch.arange(whole, device=diagonal.device)[:, None] * group_size
        )
        first = groups.mean(-1).argsort(-1, descending=True)
        parts.append(columns.gather(1, first.unsqueeze(-1).expand_as(columns)).flatten(1))
    if whole * group_size < count:
        tail = diagonal[:, whole * group_size :]
        parts.append(tail.argsort(-1, descending=True) + whole * group_size)
    return torch.cat(parts, dim=1)


def gptq(
    weight: Tensor,
    factor: Factor,
    bits: int,
    grid: Grid = Grid(),  # noqa: B008  frozen
    refits: int = REFITS,
) -> Quantized:
    """Round a batch of matrices of one shape under their Hessians.

    Group by group: errors of earlier groups are fed in by one matrix product, the grid is fitted to the updated
    weights, columns are rounded with feedback; then scale and zero are solved for, given the codes, by least squares in
    the Hessian's metric, and columns rounded again, where that lowers the row's error.

    Args:
        weight: [B, out, in] any float dtype.
        factor: of the B Hessians.
        bits: 1, 2, 3, 4 or 8.
        grid: how grids are chosen.
        refits: rounds of refitting grids to codes; with 0 and an identity Hessian the result is `grid.quantize`'s.

    Returns:
        `Quantized` with the batch in its rows, [B * out, ...].

    Raises:
        ValueError: a weight is not finite.
    """
    check_finite(weight)
    batch, rows, columns = weight.shape
    size = factor.group_size
    groups = num_groups(columns, size)
    # [B, in, out]: a column lies in one piece; columns turn from weights into errors as they are rounded
    work = weight.to(torch.float32).transpose(1, 2)
    work = work.contiguous() if factor.order is None else _take(work, factor.order)
    codes = torch.zeros(batch, rows, groups, size, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(batch, rows, groups, device=weight.device)
    zero = torch.empty(batch, rows, groups, device=weight.device)
    for g in range(groups):
        start, stop = g * size, min((g + 1) * size, columns)
        group = _Group(factor, start, stop)
        target = group.target(work)
        chosen, error, s, z = _round_group(target, group, bits, grid, refits)
        # errors are those of the original weights: target - error is what was stored
        work[:, start:stop] -= target.sub_(error)
        place = torch.full((batch,), g, device=weight.device)
        within = None
        if factor.order is not None:
            place = factor.order[:, start] // size
            within = factor.order[:, start:stop] - place.unsqueeze(1) * size
        for b in range(batch):
            at = int(place[b])
            columns_of = slice(0, stop - start) if within is None else within[b]
            codes[b, :, at, columns_of] = chosen[b].T.to(torch.uint8)
            scale[b, :, at], zero[b, :, at] = s[b], z[b]
    return Quantized(codes.flatten(0, 1), scale.flatten(0, 1), zero.flatten(0, 1), bits, columns)


def _take(work: Tensor, order: Tensor) -> Tensor:
    return work.gather(1, order.unsqueeze(-1).expand_as(work))


class _Group:
    """One group's part of a factor: how errors move inside it, and what they cost."""

    def __init__(self, factor: Factor, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.before = factor.unit[:, :start, start:stop]
        self.unit = factor.unit[:, start:stop, start:stop].contiguous()
        diagonal = factor.diagonal[:, start:stop]
        self.diagonal = (diagonal / diagonal.amax(-1, keepdim=True)).unsqueeze(-1)
        # [B, G, G], the Hessian as this group sees it once all later columns have made up for its errors
        self.metric = (self.unit * self.diagonal.transpose(1, 2)) @ self.unit.transpose(1, 2)

    def target(self, work: Tensor) -> Tensor:
        """[B, G, out]: the group's weights, updated for the errors of the groups before it."""
        target = work[:, self.start : self.stop].clone()
        if self.start:
            fed = self.before.transpose(1, 2) @ work[:, : self.start]
            target += torch.linalg.solve_triangular(self.unit.transpose(1, 2), fed, upper=False, unitriangular=True)
        return target

    def round(self, target: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Round targets [B, G, out] column by column on the grids [B, out].

        Returns:
            Codes and errors [B, G, out], and what the errors cost [B, out], relative to the group's largest D.
        """
        # in units of codes: scale and zero belong to rows, and feedback is linear in columns
        inverse = torch.where(scale > 0, scale.reciprocal(), 0.0).unsqueeze(1)
        values = torch.addcmul(zero.unsqueeze(1), target, inverse)
        codes, errors, residuals = (torch.empty_like(target) for _ in range(3))
        for start in range(0, target.shape[1], PANEL):
            stop = min(start + PANEL, target.shape[1])
            panel = values[:, start:stop]
            if start:
                panel = torch.baddbmm(panel, self.unit[:, :start, start:stop].transpose(1, 2), errors[:, :start])
            for k in range(start, stop):
                value = panel[:, k - start : k - start + 1]
                if k > start:
                    value = torch.baddbmm(value, self.unit[:, start:k, k : k + 1].transpose(1, 2), errors[:, start:k])
                code = codes[:, k : k + 1]
                round_codes(code.copy_(value), bits)
                torch.sub(value, code, out=residuals[:, k : k + 1])
                torch.sub(values[:, k : k + 1], code, out=errors[:, k : k + 1])
        loss = residuals.square_().mul_(self.diagonal).sum(1).mul_(scale.square())
        errors = target - (codes - zero.unsqueeze(1)).mul_(scale.unsqueeze(1))
        if bool((scale == 0).any()):  # such rows are rebuilt as zeros
            loss = torch.where(scale > 0, loss, self._loss(errors))
        return codes, errors, loss

    def _loss(self, errors: Tensor) -> Tensor:
        return ((self.unit.transpose(1, 2) @ errors).square_() * self.diagonal).sum(1)


def _round_group(
    target: Tensor, group: _Group, bits: int, grid: Grid, refits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and errors [B, G, out], scale and zero [B, out] of one group."""
    scale, zero = _fit_columns(target, bits, grid)
    codes, errors, loss = group.round(target, scale, zero, bits)
    for _ in range(refits):
        new_scale, new_zero = _refit(target, codes, scale, zero, group.metric, bits, grid)
        new_codes, new_errors, new_loss = group.round(target, new_scale, new_zero, bits)
        better = new_loss < loss
        loss, scale = torch.where(better, new_loss, loss), torch.where(better, new_scale, scale)
        zero, better = torch.where(better, new_zero, zero), better.unsqueeze(1)
        codes, errors = torch.where(better, new_codes, codes), torch.where(better, new_errors, errors)
    return codes, errors, scale, zero


def _fit_columns(target: Tensor, bits: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """`fit` for targets [B, G, out]; returns [B, out] each."""
    batch, size, rows = target.shape
    part = max(1, CHUNK // (batch * size))
    fitted = [
        fit(target[:, :, start : start + part].transpose(1, 2).contiguous(), bits, grid)
        for start in range(0, rows, part)
    ]
    return torch.cat([scale for scale, _ in fitted], dim=1), torch.cat([zero for _, zero in fitted], dim=1)


def _refit(
    target: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, metric: Tensor, bits: int, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Scale and zero [B, out] that rebuild `target` best from `codes`, both [B, G, out], in the metric [B, G, G].

    w' = a * codes - b is linear in a = scale and b = scale * zero; rows whose codes are all equal keep their grid.
    """
    weighted = metric @ codes
    ones = metric.sum(-1, keepdim=True)
    cc, c1 = (weighted * codes).sum(1), weighted.sum(1)
    ct, t1, total = (weighted * target).sum(1), (ones * target).sum(1), ones.sum(1)
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
        return new, zero
    return new, torch.where(sound, to_fp16(b / new), zero)
