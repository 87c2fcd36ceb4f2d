# SPDX-License-Identifier: Apache-2.0
"""A multiple-choice knapsack as checked arrays, and its cheapest choice. Knows nothing of how it is solved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Program:
    """Items under one budget.

    Attributes:
        cost: [N, J] as given, infinite where an option is not allowed.
        price: [N, J] as given.
        budget: in the unit of `price`.
        group: [N] 0..G-1.
        names: [G] the caller's numbers of the groups.
        required: option index -> least number of items per group that take it.
    """

    cost: Floats
    price: Floats
    budget: float
    group: Ints
    names: Ints
    required: dict[int, int]

    @cached_property
    def regret(self) -> Floats:
        """[N, J] cost above the item's least."""
        return self.cost - self.cost.min(1, keepdims=True)

    @cached_property
    def extra(self) -> Floats:
        """[N, J] price above the item's least allowed one; infinite where an option is not allowed."""
        price = np.where(np.isfinite(self.cost), self.price, np.inf)
        return price - price.min(1, keepdims=True)

    def priced(self, multiplier: float) -> Floats:
        """[N, J] regret plus the price at `multiplier` > 0 per unit."""
        return self.regret + multiplier * self.extra if multiplier else self.regret

    @cached_property
    def members(self) -> list[Ints]:
        """[G] the items of each group."""
        return np.split(np.argsort(self.group, kind="stable"), np.cumsum(np.bincount(self.group))[:-1])

    @cached_property
    def slots(self) -> Ints:
        """[S] the options that a group must take, repeated as often as it must."""
        return np.repeat(*(np.array(list(part), np.int64) for part in (self.required, self.required.values())))

    def take(self, table: Floats, choice: Ints) -> Floats:
        """[N] a table's value at each item's choice."""
        return table[np.arange(len(choice)), choice]

    def total(self, choice: Ints) -> float:
        """Total cost."""
        return math.fsum(self.take(self.cost, choice))

    def spent(self, choice: Ints) -> float:
        """Total price."""
        return math.fsum(self.take(self.price, choice))

    def counts(self, choice: Ints) -> Ints:
        """[G, J] how many items of a group take an option."""
        shape = (len(self.names), self.cost.shape[1])
        return np.bincount(self.group * shape[1] + choice, minlength=shape[0] * shape[1]).reshape(shape)

    def accepts(self, choice: Ints) -> bool:
        """Whether a choice fits the budget and takes the required options."""
        counts = self.counts(choice)
        return self.spent(choice) <= self.budget and all((counts[:, j] >= n).all() for j, n in self.required.items())


def programs(
    cost: ArrayLike,
    price: ArrayLike,
    budget: ArrayLike,
    group: ArrayLike | None,
    at_least: Mapping[int, int] | None,
    allowed: ArrayLike | None,
) -> list[tuple[Ints, Program]]:
    """The checked input as programs with their items: one for a scalar budget, else one per group."""
    costs, prices, budgets = (np.asarray(values, np.float64) for values in (cost, price, budget))
    if costs.ndim != 2 or costs.shape[1] == 0:
        raise ValueError(f"cost must be [items, options], but its shape is {costs.shape}; give one row per item.")
    usable = np.ones(costs.shape, bool) if allowed is None else np.asarray(allowed, bool)
    numbers = np.zeros(len(costs), np.int64) if group is None else np.asarray(group)
    names, index = _checked(costs, prices, budgets, usable, numbers)
    required = _checked_requirement(at_least, costs.shape[1])
    costs = np.where(usable, costs, np.inf)
    if budgets.ndim == 0:
        whole = Program(costs, prices, float(budgets), index, names, required)
        return [(np.arange(len(costs)), whole)] if len(costs) else []
    programs = []
    for g, limit in enumerate(budgets.tolist()):
        items = np.flatnonzero(index == g)
        part = Program(costs[items], prices[items], limit, np.zeros_like(items), names[g : g + 1], required)
        programs.append((items, part))
    return programs


def _checked(
    costs: Floats, prices: Floats, budgets: Floats, usable: NDArray[np.bool_], numbers: NDArray[Any]
) -> tuple[NDArray[Any], Ints]:
    """The group numbers in ascending order and each item's place in them; raises on everything solve() refuses."""
    expected = {"price": (prices, costs.shape), "allowed": (usable, costs.shape), "group": (numbers, costs.shape[:1])}
    for name, (values, shape) in expected.items():
        if values.shape != shape:
            raise ValueError(f"{name} has shape {values.shape}, but cost {costs.shape} asks for {shape}; align them.")
    if not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"group must hold integers, but its dtype is {numbers.dtype}; number the groups.")
    names, index = np.unique(numbers, return_inverse=True)
    if budgets.ndim > 1 or (budgets.ndim == 1 and len(budgets) != len(names)):
        raise ValueError(f"budget has shape {budgets.shape}, but there are {len(names)} groups; give one per group.")
    for name, values in (("cost", costs), ("price", prices), ("budget", budgets)):
        if not np.isfinite(values).all():
            where = np.argwhere(~np.isfinite(values))[0].tolist()
            raise ValueError(f"{name} is {values[tuple(where)]} at {where}; use `allowed` to forbid an option.")
    if costs.min(initial=0.0) < 0:
        where = np.argwhere(costs < 0)[0].tolist()
        raise ValueError(f"cost is {costs[tuple(where)]} at {where}; shift the costs so that all are >= 0.")
    if not usable.any(1).all():
        raise ValueError(f"allowed leaves no option for item {int(usable.any(1).argmin())}; allow at least one.")
    return names, index


def _checked_requirement(at_least: Mapping[int, int] | None, options: int) -> dict[int, int]:
    for option, least in (at_least or {}).items():
        if option not in range(options):
            raise ValueError(f"at_least names option {option!r}, but options are 0..{options - 1}; use their indices.")
        if least != int(least) or least < 0:
            raise ValueError(f"at_least asks for {least!r} items of option {option}; give a whole number >= 0.")
    return {int(option): int(least) for option, least in (at_least or {}).items() if least}


def cheapest_choice(program: Program) -> Ints:
    """The choice of least price; raises where even that one is not possible."""
    for name, items in zip(program.names, program.members, strict=True):
        reachable = np.where(np.isfinite(program.cost[np.ix_(items, program.slots)].T), 0.0, 1.0)
        rows, columns = linear_sum_assignment(reachable)
        if len(rows) < len(program.slots) or reachable[rows, columns].any():
            raise ValueError(
                f"at_least {program.required} cannot be met in group {name} whatever the budget: it has {len(items)} "
                "items, and each may take its allowed options only; ask for fewer."
            )
    choice = least_choice(program, program.extra)
    spent, where = program.spent(choice), f"group {program.names[0]}" if len(program.names) == 1 else "all groups"
    if spent > program.budget:
        free = program.spent(program.extra.argmin(1))
        cause = f"at_least {program.required} is out of reach" if free <= program.budget else "the budget is too small"
        raise ValueError(
            f"{cause} in {where}: the cheapest possible price is {spent!r}, but the budget is {program.budget!r}; "
            f"raise the budget to {spent!r} or more."
        )
    return choice


def least_choice(program: Program, table: Floats) -> Ints:
    """The choice of least total `table` [N, J] that takes the required options; the budget is not looked at.

    Each required option is a slot that one item must fill; the rest take their least. Which items fill the slots is an
    assignment problem, solved exactly.
    """
    choice = table.argmin(1)
    if program.required:
        above = table - table.min(1, keepdims=True)
        for items in program.members:
            slot, item = linear_sum_assignment(above[np.ix_(items, program.slots)].T)
            choice[items[item]] = program.slots[slot]
    return choice
