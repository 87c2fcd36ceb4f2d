# SPDX-License-Identifier: Apache-2.0
"""Exact multiple-choice knapsack: one option per item, least total cost, total price within the budget.

It does not know what items, options, costs and prices stand for (experts, widths, losses, bits).
"""

# How it stays exact while costs span many orders of magnitude: HiGHS has absolute tolerances that scipy does not
# expose. A Lagrangian bound therefore comes first. It gives a good choice, a proven lower bound, and per option the
# least that any choice containing it lies above that bound (the reduced cost). Options whose reduced cost exceeds the
# distance between choice and bound cannot be part of anything better; the rest goes to HiGHS as reduced costs scaled
# by that distance, so its tolerances are fractions (1e-10) of the distance and not of the largest cost.

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from transformers_mcmoe.allocation.knapsack.highs import solve_with_highs
from transformers_mcmoe.allocation.knapsack.lagrangian import improve, lagrangian
from transformers_mcmoe.allocation.knapsack.program import Ints, Program, cheapest_choice, programs

logger = logging.getLogger(__name__)

# beyond this HiGHS may take hours: the best choice so far is taken instead, and its gap is logged
MAX_BINARIES = 300_000

__all__ = ["solve"]


def solve(
    cost: ArrayLike,
    price: ArrayLike,
    budget: ArrayLike,
    *,
    group: ArrayLike | None = None,
    at_least: Mapping[int, int] | None = None,
    allowed: ArrayLike | None = None,
    gap: float = 0.0,
) -> Ints:
    """Choose one option per item so that total cost is least and total price fits the budget.

    A total is the correctly rounded sum (`math.fsum`): a choice that costs exactly the budget fits, one unit more does
    not. With one budget per group the groups are solved one by one. Where HiGHS gives up, the Lagrangian choice is
    returned and a warning with its gap is logged.

    Args:
        cost: [N, J] float64, loss of item n under option j; finite, >= 0.
        price: [N, J] float64, in the unit of `budget`.
        budget: scalar, or one per group, in ascending order of the group's number.
        group: [N] int, item n's group (its layer); default one group.
        at_least: option index -> least number of items per group that take it, e.g. {2: 1, 1: 1}.
        allowed: [N, J] bool, default all.
        gap: how far the total cost may lie above the optimum, as a fraction of the total cost.

    Returns:
        [N] int64, the chosen option per item; exact unless `gap` > 0; ties go to the lower option index.

    Raises:
        ValueError: shapes differ, a value is not finite, `at_least` cannot be met, or even the cheapest choice exceeds
            `budget`.

    Source: Mixture Compressor (arXiv 2410.06270), section 3.2; with all layers under one budget it goes beyond it.
    """
    if not 0.0 <= gap < math.inf:
        raise ValueError(f"gap must be a finite fraction >= 0, but it is {gap}; use 0 for the exact optimum.")
    parts = programs(cost, price, budget, group, at_least, allowed)
    cheapest = [cheapest_choice(program) for _, program in parts]
    choice = np.zeros(np.shape(cost)[:1], np.int64)
    unproven: list[tuple[float, str]] = []
    for (items, program), start in zip(parts, cheapest, strict=True):
        choice[items], distance, reason = _solve_program(program, start, gap)
        if reason:
            unproven.append((distance, reason))
    if unproven:
        logger.warning(
            "%d of %d knapsack programs are not solved to the optimum; the relative gap is at most %.3g (%s).",
            len(unproven),
            len(parts),
            *max(unproven),
        )
    return choice


def _solve_program(program: Program, cheapest: Ints, gap: float) -> tuple[Ints, float, str]:
    """The best choice, and where it is not proven optimal its relative gap and the reason."""
    choice, bound = lagrangian(program, cheapest)
    total, distance = program.total(choice), bound.distance(program, choice)
    reach = distance + bound.rounding(program, choice)
    if distance <= max(gap * total, reach - distance) or not program.take(program.regret, choice).any():
        return choice, 0.0, ""
    keep = bound.reduced <= reach
    keep[np.arange(len(choice)), choice] = True
    if keep.sum() > MAX_BINARIES:
        return choice, distance / total, f"{keep.sum()} options are left, HiGHS gets {MAX_BINARIES} at most"
    # HiGHS minimizes the distance, while `gap` is a fraction of the total
    found, reason = solve_with_highs(program, bound, keep, reach, gap * (total - distance) / reach)
    if found is not None and program.total(found) <= total:
        choice = improve(program, found)
    return choice, bound.distance(program, choice) / total if reason else 0.0, reason
