# SPDX-License-Identifier: Apache-2.0
"""Scores: what it costs to give an expert a width, from what calibration saw of one layer.

It does not know how the statistics were collected, nor how a budget is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# f(stats, bits, *, alpha, beta, gamma, rng) -> cost [E, J]
Score = Callable[..., Floats]


@dataclass(frozen=True, eq=False)
class ExpertStatistics:
    """What calibration saw of the E experts of one layer.

    Attributes:
        frequency: [E] float64, tokens routed to each expert.
        routing_weight: [E] float64, sum of the top-k routing weights of those tokens.
        error: [E, J] float64, eps: Frobenius norm of the change in the MoE block's output when only expert i is
            quantized to the j-th width; zeros where the score does not read it.
        hessian_error: [E, J] float64, sum of Tr(H) / tokens * |W' - W|^2 over the matrices of expert i at the j-th
            width, H the sum of x^T x over a matrix's inputs; None or zeros where the score does not read it.

    Raises:
        ValueError: shapes differ, or a value is negative or not finite.
    """

    frequency: Floats
    routing_weight: Floats
    error: Floats
    hessian_error: Floats | None = None

    def __post_init__(self) -> None:
        shapes = [np.shape(values) for values in (self.frequency, self.routing_weight, self.error)]
        if len(shapes[2]) != 2 or shapes[0] != shapes[2][:1] or shapes[1] != shapes[2][:1]:
            raise ValueError(
                f"frequency, routing_weight and error have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}; "
                "give [E], [E] and [E, J] of the same experts."
            )
        for name in ("frequency", "routing_weight", "error"):
            values = np.asarray(getattr(self, name))
            bad = ~(np.isfinite(values) & (values >= 0))
            if bad.any():
                where = np.argwhere(bad)[0].tolist()
                raise ValueError(
                    f"{name} is {values[tuple(where)]} at {where} (expert first); it must be finite and >= 0: check "
                    "the calibration run."
                )


def pmq(
    stats: ExpertStatistics, bits: Sequence[int], *, alpha: float, beta: float, gamma: float, rng: np.random.Generator
) -> Floats:
    """Significance times error, phi^alpha * w^beta * eps^gamma, [E, J] float64.

    phi and w are the layer's frequencies and routing weights, each normalised to sum 1; an all-zero vector stays zero.

    Source: Mixture Compressor (arXiv 2410.06270), section 3.2, which states gamma = 2. The authors' code takes the
    error to the power 1: alpha = 1, beta = 1.5, gamma = 1 with at least one 3-bit and one 2-bit expert a layer
    (at_least={2: 1, 1: 1} for the widths 1, 2, 3) reproduces the bit maps they released for Mixtral-8x7B.

    Raises:
        ValueError: `bits` and the columns of `error` differ in number.
    """
    _widths(stats, bits)
    significance = _share(stats.frequency) ** alpha * _share(stats.routing_weight) ** beta
    return significance[:, None] * np.asarray(stats.error, np.float64) ** gamma


def f_norm(
    stats: ExpertStatistics, bits: Sequence[int], *, alpha: float, beta: float, gamma: float, rng: np.random.Generator
) -> Floats:
    """The error alone, eps [E, J] float64: the paper's F-norm baseline (arXiv 2410.06270).

    Raises:
        ValueError: `bits` and the columns of `error` differ in number.
    """
    _widths(stats, bits)
    return np.array(stats.error, np.float64)


def hessian(
    stats: ExpertStatistics, bits: Sequence[int], *, alpha: float, beta: float, gamma: float, rng: np.random.Generator
) -> Floats:
    """The trace of the Hessian times the squared weight error, [E, J] float64.

    The HAWQ baseline of Mixture Compressor (arXiv 2410.06270), which does not state its form; this one follows HAWQ-V2
    (arXiv 1911.03852): the mean trace of a matrix's Hessian times |W' - W|^2, summed over the expert's matrices.

    Raises:
        ValueError: `bits` and the columns of `error` differ in number, or there are no such errors.
    """
    _widths(stats, bits)
    if stats.hessian_error is None or np.shape(stats.hessian_error) != np.shape(stats.error):
        raise ValueError("allocation='hessian' needs hessian_error of the shape of error; measure Hessians first.")
    return np.array(stats.hessian_error, np.float64)


def frequency(
    stats: ExpertStatistics, bits: Sequence[int], *, alpha: float, beta: float, gamma: float, rng: np.random.Generator
) -> Floats:
    """Routing frequency alone, phi_i * 4^-b_j [E, J] float64, phi normalised to sum 1.

    A baseline of Mixture Compressor (arXiv 2410.06270). The paper does not state how a frequency becomes a width; the
    factor is ours: the squared error of a b-bit code falls by 4 per bit.

    Raises:
        ValueError: `bits` and the columns of `error` differ in number.
    """
    return _share(stats.frequency)[:, None] * 4.0 ** -_widths(stats, bits)


def routing_weight(
    stats: ExpertStatistics, bits: Sequence[int], *, alpha: float, beta: float, gamma: float, rng: np.random.Generator
) -> Floats:
    """Routing weight alone, w_i * 4^-b_j [E, J] float64, w normalised to sum 1.

    A baseline of Mixture Compressor (arXiv 2410.06270); the factor 4^-b is ours, see `frequency`.

    Raises:
        ValueError: `bits` and the columns of `error` differ in number.
    """
    return _share(stats.routing_weight)[:, None] * 4.0 ** -_widths(stats, bits)


def random(
    stats: ExpertStatistics, bits: Sequence[int], *, alpha: float, beta: float, gamma: float, rng: np.random.Generator
) -> Floats:
    """Random importance, u_i * 4^-b_j [E, J] float64, u_i uniform in [0, 1) from `rng`.

    A baseline of Mixture Compressor (arXiv 2410.06270), whose code gives 3 bits to two random experts of a layer and
    1 bit to two; this form, which serves any budget, is ours.

    Raises:
        ValueError: `bits` and the columns of `error` differ in number.
    """
    return rng.random(len(stats.frequency))[:, None] * 4.0 ** -_widths(stats, bits)


def uniform(num_experts: int, bits: Sequence[int], budget_bits: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """The two neighbouring widths around the average, the higher one for as many random experts as the budget allows.

    Args:
        num_experts: E.
        bits: [J] candidate widths, in any order.
        budget_bits: sum of the widths that the layer's experts may take; not exceeded, to the bit.
        rng: chooses the experts that take the higher width.

    Returns:
        [E] int64, each expert's index in `bits`; all take the highest width where the budget allows it.

    Raises:
        ValueError: no experts or widths, a width twice, or the budget is below the lowest width for every expert.
    """
    widths = np.asarray(bits)
    order = np.argsort(widths)
    if num_experts < 1 or widths.ndim != 1 or len(widths) == 0 or len(set(widths.tolist())) < len(widths):
        raise ValueError(f"{num_experts} experts cannot share the widths {bits}; give experts and distinct widths.")
    fits = widths[order] * num_experts <= budget_bits
    if not fits[0]:
        raise ValueError(
            f"budget_bits is {budget_bits}, but {num_experts} experts need {widths[order[0]] * num_experts} at the "
            f"lowest width {widths[order[0]]}; raise the budget or add a lower width."
        )
    low = int(fits.sum()) - 1
    choice = np.full(num_experts, order[low], np.int64)
    if not fits[-1]:
        lower, higher = widths[order[low : low + 2]].tolist()
        count = int((budget_bits - lower * num_experts) // (higher - lower))
        choice[rng.permutation(num_experts)[:count]] = order[low + 1]
    return choice


def layers_by_change(
    similarity: Mapping[str, float], weights: Mapping[str, int], bits: Sequence[int], budget_bits: float
) -> dict[str, int]:
    """Whole layers at one of two widths: the higher one for those that change their input most, while the budget lasts.

    The block-score baseline (BSP) of Mixture Compressor (arXiv 2410.06270), after Li et al. (arXiv 2406.08155): there a
    small network predicts the cosine between a MoE block's input and output; here it is measured. At an average of 2.5
    bits and the widths 2 and 4 a quarter of the layers takes 4.

    Args:
        similarity: layer -> mean cosine between its MoE block's input and output.
        weights: layer -> weights of its experts.
        bits: the two widths, ascending.
        budget_bits: bits of all experts together.

    Returns:
        layer -> width.
    """
    low, high = bits
    widths = dict.fromkeys(similarity, low)
    left = budget_bits - sum(low * weights[layer] for layer in similarity)
    for layer in sorted(similarity, key=lambda name: similarity[name]):
        price = (high - low) * weights[layer]
        if price <= left:
            widths[layer] = high
            left -= price
    return widths


def _share(values: Floats) -> Floats:
    """[E] values divided by their sum; all zero stays all zero."""
    values = np.asarray(values, np.float64)
    total = values.sum()
    return values / total if total > 0 else np.zeros_like(values)


def _widths(stats: ExpertStatistics, bits: Sequence[int]) -> Floats:
    """[J] the widths; raises where the statistics are of other ones."""
    columns = np.shape(stats.error)[1]
    if len(bits) != columns:
        raise ValueError(f"bits {tuple(bits)} are {len(bits)} widths, but error has {columns} columns; align them.")
    return np.asarray(bits, np.float64)


SCORES: dict[str, Score] = {
    "pmq": pmq,
    "f_norm": f_norm,
    "hessian": hessian,
    "frequency": frequency,
    "routing_weight": routing_weight,
    "random": random,
}
