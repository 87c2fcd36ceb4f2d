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
from torch.nn import functional

from transformers_mcmoe.quantization.columns import fit_columns, round_columns
from transformers_mcmoe.quantization.descent import descend, refit
from transformers_mcmoe.quantization.grid import Grid, Quantized, check_finite, inverse_of, is_finite
from transformers_mcmoe.threads import at_once, each

logger = logging.getLogger(__name__)

DAMPING = 0.01
# rounds of fitting a group's grid to its codes in the Hessian's metric
REFITS = 2
# weights whose copies (targets, codes, errors) are held at once
AT_ONCE = 1 << 25
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
        if not is_finite(hessian):
            raise ValueError(
                f"The Hessian of {name} holds values that are not finite; check the calibration data and dtype."
            )
        order = _activation_order(hessian.diagonal(dim1=-2, dim2=-1), group_size) if act_order else None

        def factorize(b: int) -> None:
            hessian[b] = _factorize(hessian[b], None if order is None else order[b], damping, name)

        list(each(factorize, range(len(hessian)), factorized_at_once(hessian.shape[-1], hessian.device)))
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
    if mean <= 0:  # no activation at all: every column counts the same
        return torch.eye(hessian.shape[0], device=hessian.device)
    share = damping
    for _ in range(_RETRIES):
        # in reverse order the lower factor becomes the upper one
        damped = hessian.flip(0, 1) if order is None else _permuted(hessian, order.flip(0))
        damped.diagonal().add_(share * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if int(info) == 0:
            return lower.flip(0, 1)
        share = max(10 * share, 1e-4)
        logger.warning("The Hessian of %s is not positive definite; damping is raised to %g of its mean.", name, share)
    logger.warning("The Hessian of %s stays indefinite; the matrix is rounded without feedback.", name)
    return torch.eye(hessian.shape[0], device=hessian.device)


def factorized_at_once(columns: int, device: torch.device) -> int:
    """How many Hessians [in, in] are factorized at once, with two copies each."""
    return at_once(2 * 4 * columns**2, device)


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    return matrix.index_select(0, order).index_select(1, order)


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
    sweeps: int = 0,
) -> Quantized:
    """Round a batch of matrices of one shape under their Hessians.

    Group by group: errors of earlier groups are fed in by one matrix product, the grid is fitted to the updated
    weights, columns are rounded with feedback; then scale and zero are solved for, given the codes, by least squares in
    the Hessian's metric, and columns rounded again, where that lowers the row's error. `sweeps` of coordinate descent
    over all columns may follow (`descent`).

    Args:
        weight: [B, out, in] any float dtype.
        factor: of the B Hessians.
        bits: 1, 2, 3, 4 or 8.
        grid: how grids are chosen.
        refits: rounds of refitting grids to codes; with 0 and an identity Hessian the result is `grid.quantize`'s.
        sweeps: of coordinate descent.

    Returns:
        `Quantized` with the batch in its rows, [B * out, ...].

    Raises:
        ValueError: a weight is not finite.
    """
    check_finite(weight)
    batch, rows, columns = weight.shape
    size = factor.group_size
    part = max(1, AT_ONCE // (batch * columns))
    done = [_round_rows(weight[:, start : start + part], factor, bits, grid, refits, sweeps)
            for start in range(0, rows, part)]  # fmt: skip
    codes, scale, zero = (torch.cat(parts, dim=1) for parts in zip(*done, strict=True))
    codes = functional.pad(codes, (0, -columns % size)).unflatten(-1, (-1, size))
    return Quantized(codes.flatten(0, 1), scale.flatten(0, 1), zero.flatten(0, 1), bits, columns)


def _round_rows(
    weight: Tensor, factor: Factor, bits: int, grid: Grid, refits: int, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [B, out, in] uint8, scale and zero [B, out, n] of some rows of the matrices."""
    batch, rows, columns = weight.shape
    size = factor.group_size
    groups = [slice(start, min(start + size, columns)) for start in range(0, columns, size)]
    # [B, in, out]: a column lies in one piece; columns turn from weights into errors as they are rounded
    work = weight.to(torch.float32).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    if factor.order is not None:
        work = _take(work, factor.order)
    codes = torch.empty_like(work)
    scale, zero = (work.new_empty(len(groups), batch, rows) for _ in range(2))
    grid = grid.fitted(weight)
    grids = [grid.of_group(place) for place in _places(factor, batch, len(groups))]
    residuals = torch.empty_like(work) if sweeps else None  # V^T times the errors
    for g, columns_of in enumerate(groups):
        group = _Group(factor, columns_of.start, columns_of.stop)
        fed = group.fed(work)
        target = group.target(work, fed)
        codes[:, columns_of], error, scale[g], zero[g] = _round_group(target, group, bits, grids[g], refits)
        # errors are those of the original weights: target - error is what was stored
        work[:, columns_of] -= target.sub_(error)
        if residuals is not None:
            own = group.unit.transpose(1, 2) @ work[:, columns_of]
            residuals[:, columns_of] = own if fed is None else own.add_(fed)
    del work
    if residuals is not None:
        descend(residuals, codes, scale, zero, factor.unit, factor.diagonal, groups, bits, grids, sweeps)
    del residuals
    scale, zero = scale.permute(1, 2, 0), zero.permute(1, 2, 0)
    if factor.order is None:
        return codes.transpose(1, 2).to(torch.uint8), scale, zero
    # every group keeps its columns, so the place of a group follows from its first column
    place = (factor.order[:, ::size] // size).unsqueeze(1).expand_as(scale)
    order = factor.order.unsqueeze(1).expand(batch, rows, columns)
    stored = torch.empty(batch, rows, columns, dtype=torch.uint8, device=codes.device)
    stored.scatter_(2, order, codes.transpose(1, 2).to(torch.uint8))
    return stored, torch.empty_like(scale).scatter_(2, place, scale), torch.empty_like(zero).scatter_(2, place, zero)


def _places(factor: Factor, batch: int, groups: int) -> Tensor:
    """[n, B], the places in their rows of the groups in the order of rounding."""
    if factor.order is None:
        return torch.arange(groups, device=factor.unit.device)[:, None].expand(-1, batch)
    return (factor.order[:, :: factor.group_size] // factor.group_size).T


def _take(work: Tensor, order: Tensor) -> Tensor:
    taken = torch.empty_like(work)
    for own, columns, out in zip(work, order, taken, strict=True):
        torch.index_select(own, 0, columns, out=out)
    return taken


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

    def fed(self, work: Tensor) -> Tensor | None:
        """[B, G, out]: what the errors of the groups before it come to in this one; None for the first."""
        return self.before.transpose(1, 2) @ work[:, : self.start] if self.start else None

    def target(self, work: Tensor, fed: Tensor | None) -> Tensor:
        """[B, G, out]: the group's weights, updated for the errors of the groups before it."""
        target = work[:, self.start : self.stop].clone()
        if fed is not None:
            target += torch.linalg.solve_triangular(self.unit.transpose(1, 2), fed, upper=False, unitriangular=True)
        return target

    def round(self, target: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Round targets [B, G, out] column by column on the grids [B, out].

        Returns:
            Codes and errors [B, G, out], and what the errors cost [B, out], relative to the group's largest D.
        """
        # in units of codes: scale and zero belong to rows, and feedback is linear in columns
        inverse = inverse_of(scale).unsqueeze(1)
        values = torch.addcmul(zero.unsqueeze(1), target, inverse)
        codes, errors, loss = round_columns(values, self.unit, self.diagonal.squeeze(-1), bits)
        loss.mul_(scale.square())
        errors = torch.sub(
            target, torch.sub(codes, zero.unsqueeze(1), out=errors).mul_(scale.unsqueeze(1)), out=errors
        )
        if bool((scale == 0).any()):  # such rows are rebuilt as zeros
            loss = torch.where(scale > 0, loss, self._loss(errors))
        return codes, errors, loss

    def _loss(self, errors: Tensor) -> Tensor:
        return ((self.unit.transpose(1, 2) @ errors).square_() * self.diagonal).sum(1)


def _round_group(
    target: Tensor, group: _Group, bits: int, grid: Grid, refits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and errors [B, G, out], scale and zero [B, out] of one group."""
    scale, zero = fit_columns(target, bits, grid)
    codes, errors, loss = group.round(target, scale, zero, bits)
    pull = group.metric @ target
    for _ in range(refits):
        new_scale, new_zero = refit(codes, pull, scale, zero, group.metric, bits, grid)
        new_codes, new_errors, new_loss = group.round(target, new_scale, new_zero, bits)
        better = new_loss < loss
        loss, scale = torch.where(better, new_loss, loss), torch.where(better, new_scale, scale)
        zero, better = torch.where(better, new_zero, zero), better.unsqueeze(1)
        codes, errors = torch.where(better, new_codes, codes), torch.where(better, new_errors, errors)
    return codes, errors, scale, zero
