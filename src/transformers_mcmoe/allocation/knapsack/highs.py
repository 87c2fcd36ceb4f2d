# SPDX-License-Identifier: Apache-2.0
"""The exact solver, HiGHS through scipy, on what a bound leaves open. Knows programs and bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_array, coo_array, csr_array, eye_array

from transformers_mcmoe.allocation.knapsack.lagrangian import Bound
from transformers_mcmoe.allocation.knapsack.program import Floats, Ints, Program

# beyond these the best choice so far is taken
MAX_NODES = 20_000
MAX_SECONDS = 120.0
# HiGHS's row tolerance lets choices a hair above the budget through; each is cut off, at most this often
MAX_CUTS = 50
# distance between choice and bound in HiGHS's units, where its absolute tolerances are 1e-6
_DISTANCE = 1e4
# largest coefficient of the budget row; integer prices below it stay integers
_LARGEST_PRICE = 1e5


def solve_with_highs(
    program: Program, bound: Bound, keep: NDArray[np.bool_], reach: float, gap: float
) -> tuple[Ints | None, str]:
    """The best choice among the kept options and ""; else the best one HiGHS has, if any, and why it is not proven."""
    item, option = np.nonzero(keep)
    least = np.where(keep, program.price, np.inf).min(1)
    model, rows = _model(program, bound, item, option, least, reach)
    options = {"mip_rel_gap": gap, "node_limit": MAX_NODES, "time_limit": MAX_SECONDS}
    for _ in range(MAX_CUTS):
        result = milp(constraints=rows, options=options, **model)
        if result.x is None:
            return None, result.message
        taken = np.full(keep.shape, -1.0)
        taken[item, option] = result.x[: len(item)]
        choice = taken.argmax(1)
        if result.status != 0 or program.spent(choice) <= program.budget:
            sound = program.accepts(choice)
            return choice if sound else None, "" if sound and result.status == 0 else result.message
        # the items of this choice that are not at their least price may not all cost that much
        paid = program.take(program.price, choice)
        dear = paid > least
        cover = np.zeros((1, len(result.x)))
        cover[0, : len(item)] = dear[item] & (program.price[item, option] >= paid[item])
        rows.append(LinearConstraint(csr_array(cover), -np.inf, dear.sum() - 1))
    return None, f"HiGHS's row tolerance let {MAX_CUTS} choices above the budget through"


def _model(
    program: Program, bound: Bound, item: Ints, option: Ints, least: Floats, reach: float
) -> tuple[dict[str, Any], list[LinearConstraint]]:
    """Arguments of milp: minimize the distance to the bound over the options `option` of the items `item`.

    Variables: a binary per option, the unspent budget, and each group's surplus of every required option. A surplus
    that costs more than `reach` is out of the question.
    """
    size, groups = len(item), len(program.names)
    weight = program.price[item, option] - least[item]
    step, room = _row_units(weight, program.budget - math.fsum(least))
    need = np.repeat(np.arange(groups), len(program.required)), np.tile(np.array([*program.required], int), groups)
    bonus, surplus = bound.bonus[need], np.arange(len(need[0]))
    number = np.full(bound.bonus.shape, -1)
    number[need] = surplus
    number = number[program.group[item], option]
    taker = np.flatnonzero(number >= 0)
    picks = coo_array((np.ones(size), (item, np.arange(size))), shape=(len(least), size))
    takes = coo_array((np.ones(len(taker)), (number[taker], taker)), shape=(len(surplus), size))
    spends = coo_array([weight / step])
    rows = [[picks, None, None], [spends, eye_array(1), None], [takes, None, -eye_array(len(surplus))]]
    equal = np.concatenate([np.ones(len(least)), [room], np.tile([*program.required.values()], groups)])
    worth = np.array([bound.multiplier * step, *np.where(bonus > reach, 0.0, bonus)])
    upper = np.concatenate([np.ones(size), [np.inf], np.where(bonus > reach, 0.0, np.inf)])
    model = {
        "c": np.concatenate([bound.reduced[item, option], worth]) * (_DISTANCE / reach),
        "integrality": np.arange(len(upper)) < size,
        "bounds": Bounds(0.0, upper),
    }
    return model, [LinearConstraint(block_array(rows, format="csr"), equal, equal)]


def _row_units(weight: Floats, room: float) -> tuple[float, float]:
    """The unit of the budget row, and the room in it, widened by less than it takes to let a dearer choice through.

    Prices on a grid (whole numbers, multiples of 2^-20) are divided by their greatest common divisor and the room ends
    halfway between two grid points; others are scaled to what HiGHS's tolerance of 1e-6 can tell apart.
    """
    grid = weight * 2.0**20
    largest = float(weight.max())
    if largest == 0.0:
        return 1.0, 0.5
    if grid.max() < 2.0**62 and (grid == np.rint(grid)).all():
        step = float(np.gcd.reduce(grid.astype(np.int64))) / 2.0**20
        if largest <= _LARGEST_PRICE * step:
            return step, math.floor(room / step) + 0.5
    step = largest / _LARGEST_PRICE
    return step, room / step + 1e-8
