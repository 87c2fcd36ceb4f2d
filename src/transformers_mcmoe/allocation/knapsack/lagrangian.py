# SPDX-License-Identifier: Apache-2.0
"""A good choice and a proven lower bound, by a price on the budget. Knows programs, not the exact solver."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from transformers_mcmoe.allocation.knapsack.program import Floats, Ints, Program, least_choice

EPS = float(np.finfo(np.float64).eps)
_MAX_BISECTIONS = 200


def _bonuses(program: Program, table: Floats) -> Floats:
    """[G, J] what each required option must be discounted by so that items take it of their own accord under `table`.

    These are the optimal dual values of the assignment in `least_choice`, found as shortest paths between slots.
    """
    bonus = np.zeros((len(program.names), table.shape[1]))
    above = table - table.min(1, keepdims=True)
    for g, items in enumerate(program.members if program.required else []):
        offers = above[np.ix_(items, program.slots)].T
        _, taken = linear_sum_assignment(offers)
        swap = offers[:, taken] - offers[np.arange(len(taken)), taken]
        enough = (len(taken) + 1) * np.max(offers, where=np.isfinite(offers), initial=0.0)
        worth = np.delete(offers, taken, axis=1).min(1, initial=enough)
        for _ in taken:
            worth = np.minimum(worth, (swap + worth).min(1))
        bonus[g, program.slots] = np.maximum(worth, 0.0)
    return bonus


@dataclass(frozen=True, eq=False)
class Bound:
    """A lower bound of a program's total cost, from any multipliers >= 0 for the budget and the required options.

    Attributes:
        multiplier: cost per unit of price.
        bonus: [G, J] discount of a required option.
        reduced: [N, J] >= 0, how far above the bound a choice lies at least if it contains the option.
    """

    multiplier: float
    bonus: Floats
    reduced: Floats

    @classmethod
    def at(cls, program: Program, multiplier: float) -> Bound:
        """The bound for a multiplier of the budget, with the best discounts."""
        table = program.priced(multiplier)
        bonus = _bonuses(program, table)
        table = table - bonus[program.group]
        return cls(multiplier, bonus, table - table.min(1, keepdims=True))

    def distance(self, program: Program, choice: Ints) -> float:
        """Total cost of a choice minus the bound, as a sum of terms >= 0 (nothing cancels)."""
        surplus = program.counts(choice).astype(np.float64)
        for option, least in program.required.items():
            surplus[:, option] -= least
        unspent = self.multiplier * max(program.budget - program.spent(choice), 0.0)
        return math.fsum((*program.take(self.reduced, choice), *(self.bonus * surplus).flat, unspent))

    def rounding(self, program: Program, choice: Ints) -> float:
        """Rounding error of `distance`: differences below it are not visible in float64."""
        sizes = program.priced(self.multiplier) + self.bonus[program.group]
        return 16 * EPS * float(program.take(sizes, choice).sum())


def lagrangian(program: Program, cheapest: Ints) -> tuple[Ints, Bound]:
    """A good choice and the best Lagrangian bound, by bisection on the price of the budget and a greedy fill."""
    low, high = 0.0, 0.0
    choice = least_choice(program, program.regret)
    if not program.accepts(choice):
        usable = np.isfinite(program.cost)
        high = float((program.regret[usable].max() or 1.0) / (program.extra[usable].max() or 1.0))
        for _ in range(_MAX_BISECTIONS):
            choice = least_choice(program, program.priced(high))
            if program.accepts(choice):
                break
            low, high, choice = high, 4.0 * high, cheapest
    for _ in range(_MAX_BISECTIONS):
        if high - low <= 2 * EPS * high:
            break
        middle = (low + high) / 2
        trial = least_choice(program, program.priced(middle))
        if program.accepts(trial):
            high, choice = middle, trial
        else:
            low = middle
    return improve(program, choice), Bound.at(program, high)


def improve(program: Program, choice: Ints) -> Ints:
    """Move single items to cheaper options, and to lower ones that cost no more, while the choice stays acceptable.

    Moves that save most cost per price come first (the greedy fill), moves that save none last.
    """
    choice, least = choice.copy(), np.zeros(program.cost.shape[1], np.int64)
    least[list(program.required)] = list(program.required.values())
    unsure = 1e-9 * float(np.abs(program.price).max(1).sum())
    moved = True
    while moved:
        moved = False
        counts, spent = program.counts(choice), program.spent(choice)
        saved = program.take(program.cost, choice)[:, None] - program.cost
        paid = program.price - program.take(program.price, choice)[:, None]
        better = (saved > 0) | ((saved == 0) & (np.arange(saved.shape[1]) < choice[:, None]))
        refunds = -np.min(paid, axis=1, where=better, initial=0.0).sum()
        items, options = np.nonzero(better & (paid <= program.budget - spent + refunds + unsure))
        gain, more = saved[items, options], paid[items, options]
        rate = np.divide(gain, more, out=np.full(len(gain), np.inf), where=more > 0)
        for move in np.lexsort((options, items, -rate, gain == 0)):
            i, j = items[move], options[move]
            now, g = choice[i], program.group[i]
            after = spent + program.price[i, j] - program.price[i, now]
            if (program.cost[i, j], j) >= (program.cost[i, now], now) or counts[g, now] <= least[now]:
                continue
            if after > program.budget + unsure:
                continue
            choice[i] = j
            if after > program.budget - unsure and program.spent(choice) > program.budget:
                choice[i] = now
                continue
            counts[g, now] -= 1
            counts[g, j] += 1
            spent, moved = after, True
    return choice
