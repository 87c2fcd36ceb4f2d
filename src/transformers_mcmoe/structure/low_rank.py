# SPDX-License-Identifier: Apache-2.0
"""Matrices as products of two thin ones, and how thin: MoE-I2's stage 2 (arXiv 2411.01016), and its whitened form.

The best rank-r stand-in for W [out, in] is U_r U_r^T W with U_r the first r left singular vectors of W L: L = I for the smallest
change of the matrix, L L^T = H for the smallest change of its outputs on the tokens whose sum of x^T x is H. Knows
matrices and importance, not experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# share of its mean that is added to a Hessian's diagonal before it is factorized
DAMPING = 0.01
# added to importance, relative to its mean: an expert without any still gets a rank
EPSILON = 1e-6


def factorize(
    weight: Tensor, rank: int, hessian: Tensor | None = None, root: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best product of two matrices of a rank.

    Args:
        weight: [out, in] any float dtype.
        rank: r, at most min(out, in).
        hessian: [in, in] float32, sum of x^T x; None for plain singular values.
        root: `root_of(hessian)`, where several matrices share one.

    Returns:
        a [r, in] and b [out, r], float32; b has orthonormal columns, the most important first.

    Raises:
        ValueError: the rank is not between 1 and the full one.
    """
    rows, columns = weight.shape
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(
            f"rank={rank} is not valid: a matrix of {rows} x {columns} has ranks 1 to {min(rows, columns)}."
        )
    weight = weight.to(torch.float32)
    seen = weight.to(torch.float64)
    if root is None and hessian is not None:
        root = root_of(hessian)
    if root is not None:
        seen = seen @ root
    if rows <= columns:
        _, vectors = torch.linalg.eigh(seen @ seen.T)
        b = vectors[:, -rank:].flip(1)
    else:
        values, vectors = torch.linalg.eigh(seen.T @ seen)
        # directions without any energy may be anything orthonormal; a tiny one would be noise divided by itself
        b = seen @ vectors[:, -rank:].flip(1)
        b = b / values[-rank:].flip(0).clamp(min=float(values[-1]) * 1e-14 + 1e-300).sqrt()
        b, _ = torch.linalg.qr(b)
    b = b.to(torch.float32)
    return b.T @ weight, b


def root_of(hessian: Tensor) -> Tensor:
    """L [in, in] float64 with L L^T = H, damped until it is positive definite."""
    mean = float(hessian.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    share = DAMPING
    while True:
        damped = hessian.to(torch.float64, copy=True)
        damped.diagonal().add_(share * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return lower
        share *= 10


def fit_left(weight: Tensor, a: Tensor, root: Tensor | None = None) -> Tensor:
    """The b [out, r] for which b a is nearest to a matrix, given a: a regression, which makes up for the rounding of a.

    Args:
        weight: [out, in].
        a: [r, in] float32.
        root: as in `factorize`; the damping in it keeps few tokens from being fitted by large numbers.
    """
    weight, seen = weight.to(torch.float64), a.to(torch.float64)
    if root is not None:
        weight, seen = weight @ root, seen @ root
    gram = seen @ seen.T
    gram.diagonal().add_(1e-8 * float(gram.diagonal().mean()) + 1e-30)
    return torch.linalg.solve(gram, seen @ weight.T).T.to(torch.float32)


def break_even(out_features: int, in_features: int) -> float:
    """The rank at which two factors have as many weights as the matrix."""
    return out_features * in_features / (out_features + in_features)


def ranks_for(
    importance: Sequence[float], mean: float, most: int, *, exponent: float = 0.15, step: int = 32
) -> list[int]:
    """Ranks of a layer's kept experts under their mean.

    An expert's share grows with a power of its importance, as in the paper; ranks are multiples of `step`, as groups of columns are, `step` at
    least, and what one cannot take goes to the next most important.

    Args:
        importance: of each expert, >= 0.
        mean: rank, over these experts.
        most: of a matrix.
        exponent: 0 for the same rank for all.
        step: ranks are multiples of it.
    """
    count = len(importance)
    scale = sum(importance) / count or 1.0
    weights = [(value / scale + EPSILON) ** exponent for value in importance]
    units, limit = round(mean * count / step), most // step
    shares = [weight / sum(weights) * units for weight in weights]
    found = [min(limit, max(1, int(share))) for share in shares]
    order = sorted(range(count), key=lambda n: found[n] - shares[n])
    while sum(found) < min(units, limit * count):
        for n in order:
            if found[n] < limit and sum(found) < units:
                found[n] += 1
    for n in reversed(order):  # one unit each may be more than there is
        while sum(found) > max(units, count) and found[n] > 1:
            found[n] -= 1
    return [step * value for value in found]
