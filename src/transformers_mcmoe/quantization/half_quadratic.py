# SPDX-License-Identifier: Apache-2.0
"""The half-quadratic fit of HQQ: a grid per group whose zero suits weights with heavy tails, found without data.

Knows groups of weights only; it needs nothing of the hqq package and does not choose codes.

The scale covers the range of a group and stays. The zero is to minimise sum |w - (code - zero) * scale|^p with p < 1,
which forgives a few large errors for the sake of the many. An auxiliary error e splits that into two steps with closed
forms: e is the present error shrunk by |error|^(p - 1) / beta, and the zero becomes the mean of code - (w - e) / scale.
beta grows by kappa with every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FP16_MAX = 65504.0
_FP16_MIN = 2.0**-24
_FP16_NORMAL = 2.0**-14  # below it fp16 has fewer digits
_ZERO_MAX = 32752.0  # of the first zero; half of what fp16 holds leaves room to move


def half_quadratic(
    x: Tensor,
    bits: int,
    *,
    lp_norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    round_zero: bool = False,
    early_stop: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of groups of weights by half-quadratic splitting.

    With `kappa=1` and `early_stop` it gives the grids of the hqq package 0.2.8, rounded to fp16; only that scales under
    the package's floor of 5e-5 are kept, so that groups of small weights survive. By default beta grows as the source
    says (0.2.8 takes a kappa and does not use it) and all steps are taken, so that a group's grid does not depend on
    the groups beside it; both change the error of usual weights by less than 1 %.

    As in the package `beta` is not relative to the weights: below an error of beta^(1 / (p - 2)) (0.17 by default) e
    is 0 and a step minimises the squared error. At 1 bit the two points are a range apart, of little use for weights
    around 0 (relative error near 1, as in the package); `grid.quantize` has a better grid.

    Args:
        x: [.., G] float32, finite; groups along the last dimension.
        bits: code width, 1 to 8.
        lp_norm: p, above 0 and at most 1.
        beta: strength of the coupling of e to the error at the first step, above 0.
        kappa: growth of beta per step, at least 1.
        iterations: steps, at least 1.
        round_zero: begin with an integer zero; the package's usual configuration does at 4 bits. The result is not
            rounded to an integer.
        early_stop: end as the package does, when the mean |error| over the whole of `x` has not fallen.

    Returns:
        scale, zero: [..] float32 holding fp16 values; the scale is positive.

    Raises:
        ValueError: an option is out of its range.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023),
    https://mobiusml.github.io/hqq_blog/.
    """
    _check(bits in range(1, 9), "bits", bits, "a whole number from 1 to 8")
    _check(0 < lp_norm <= 1, "lp_norm", lp_norm, "above 0 and at most 1")
    _check(beta > 0, "beta", beta, "above 0")
    _check(kappa >= 1, "kappa", kappa, "at least 1")
    _check(iterations >= 1, "iterations", iterations, "at least 1")
    scale, zero = _range_grid(x, bits)
    zero = zero.round() if round_zero else zero
    inverse, least = scale.reciprocal(), torch.inf
    for _ in range(iterations):
        error = torch.addcmul(zero, x, inverse)  # weights in units of codes
        error.sub_(error.round().clamp_(0, 2**bits - 1))
        shrunk = _shrink(error * scale, beta, lp_norm).mul_(inverse)
        # code - (w - e) / scale = zero - error + e / scale
        zero = zero - error.sub(shrunk).mean(-1, keepdim=True)
        beta *= kappa
        if early_stop:
            mean = float(error.mul_(scale).abs_().mean())
            if not mean < least:
                break
            least = mean
    return _to_fp16(scale).squeeze(-1), _to_fp16(zero).squeeze(-1)


def _range_grid(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero [.., 1] of the grid from the least to the largest weight; the zero is not rounded.

    A range that is narrow beside its distance from 0 gets a larger scale, so that fp16 can hold the zero.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    farthest = torch.maximum(low.abs(), high.abs())
    scale = torch.maximum((high - low) / (2**bits - 1), farthest / _ZERO_MAX)
    scale.clamp_(_FP16_MIN, _FP16_MAX)
    # fp16 is coarse down there: the zero must belong to the scale that is stored
    scale = torch.where(scale < _FP16_NORMAL, _to_fp16(scale), scale)
    return scale, -low / scale


def _shrink(error: Tensor, beta: float, lp_norm: float) -> Tensor:
    """The e that is cheapest in |e|^p and near the error [..]: generalised soft thresholding."""
    size = error.abs()
    return size.sub_(size.pow(lp_norm - 1).div_(beta)).clamp_(min=0).copysign_(error)


def _to_fp16(x: Tensor) -> Tensor:
    return x.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16).to(torch.float32)


def _check(ok: bool, name: str, value: float, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is not valid: it must be {expected}.")
