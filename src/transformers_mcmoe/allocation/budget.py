# SPDX-License-Identifier: Apache-2.0
"""From the average that the user asks for to the bits that each layer's experts may take. Knows sizes only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# averages are read as rounded to two decimals: 3.03 may mean 3.0288
ROUNDING = 0.005


@dataclass(frozen=True)
class LayerSize:
    """One experts module: how many experts, and how many weights each has."""

    num_experts: int
    expert_weights: int


def expert_budgets(
    average: float,
    layers: Sequence[LayerSize],
    widths: Sequence[int],
    fixed_weights: int,
    fixed_bits: int,
    dropped_weights: int = 0,
) -> list[int]:
    """Sum of expert widths that each layer may take (an expert at 3 bits takes 3).

    What the average leaves after the linear layers goes to the layers in equal parts per expert weight; fractions
    are carried on, so that the whole model meets the average and two layers differ by one bit of one expert at most.

    Args:
        average: bits per weight over experts, dropped ones too, and linear layers.
        layers: the experts modules, in order, with the experts that were not dropped.
        widths: candidate widths, ascending.
        fixed_weights: weights of the quantized linear layers.
        fixed_bits: their bits in total.
        dropped_weights: weights of dropped experts, which take no bits.

    Raises:
        ValueError: the average cannot be reached; the message states the feasible range.
    """
    weights = sum(layer.num_experts * layer.expert_weights for layer in layers)
    total = weights + fixed_weights + dropped_weights
    low, high = ((width * weights + fixed_bits) / total for width in (widths[0], widths[-1]))
    if not low - ROUNDING <= average <= high + ROUNDING:
        raise ValueError(
            f"bits={average} cannot be met: with expert_bits={tuple(widths)} and the widths of attention and shared "
            f"experts, the average of this model{_beside(dropped_weights)} lies between {low:.2f} and {high:.2f}; choose "
            "bits in that range."
        )
    per_weight = (min(max(average, low), high) * total - fixed_bits) / weights
    budgets: list[int] = []
    spare = 0.0  # bits that earlier layers could not spend on a whole width
    for layer in layers:
        spare += per_weight * layer.num_experts * layer.expert_weights
        # the tolerance keeps a whole number that floating point made a trifle too small
        budgets.append(int(spare / layer.expert_weights + 1e-6))
        spare -= budgets[-1] * layer.expert_weights
    return budgets


def _beside(dropped_weights: int) -> str:
    return " without its dropped experts" if dropped_weights else ""
