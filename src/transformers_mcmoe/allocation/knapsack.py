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
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp
from scipy.sparse import block_array, coo_array, csr_array, eye_array

logger = logging.getLogger(__name__)

# beyond these HiGHS may take hours: the best choice so far is taken instead, and its gap is logged
MAX_BINARIES = 300_000
MAX_NODES = 20_000
MAX_SECONDS = 120.0
# HiGHS's row tolerance lets choices a hair above the budget through; each is cut off, at most this often
MAX_CUTS = 50
# distance between choice and bound in HiGHS's units, where its absolute tolerances are 1e-6
_DISTANCE = 1e4
# largest coefficient of the budget row; integer prices below it stay integers
_LARGEST_PRICE = 1e5
_MAX_BISECTIONS = 200
_EPS = float(np.finfo(np.float64).eps)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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
    programs = _programs(cost, price, budget, group, at_least, allowed)
    cheapest = [_cheapest(program) for _, program in programs]
    choice = np.zeros(np.shape(cost)[:1], np.int64)
    unproven: list[tuple[float, str]] = []
    for (items, program), start in zip(programs, cheapest, strict=True):
        choice[items], distance, reason = _solve_program(program, start, gap)
        if reason:
            unproven.append((distance, reason))
    if unproven:
        logger.warning(
            "%d of %d knapsack programs are not solved to the optimum; the relative gap is at most %.3g (%s).",
            len(unproven),
            len(programs),
            *max(unproven),
        )
    return choice


@dataclass(frozen=True, eq=False)
class _Program:
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


def _programs(
    cost: ArrayLike,
    price: ArrayLike,
    budget: ArrayLike,
    group: ArrayLike | None,
    at_least: Mapping[int, int] | None,
    allowed: ArrayLike | None,
) -> list[tuple[Ints, _Program]]:
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
        whole = _Program(costs, prices, float(budgets), index, names, required)
        return [(np.arange(len(costs)), whole)] if len(costs) else []
    programs = []
    for g, limit in enumerate(budgets.tolist()):
        items = np.flatnonzero(index == g)
        part = _Program(costs[items], prices[items], limit, np.zeros_like(items), names[g : g + 1], required)
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


def _cheapest(program: _Program) -> Ints:
    """The choice of least price; raises where even that one is not possible."""
    for name, items in zip(program.names, program.members, strict=True):
        reachable = np.where(np.isfinite(program.cost[np.ix_(items, program.slots)].T), 0.0, 1.0)
        rows, columns = linear_sum_assignment(reachable)
        if len(rows) < len(program.slots) or reachable[rows, columns].any():
            raise ValueError(
                f"at_least {program.required} cannot be met in group {name} whatever the budget: it has {len(items)} "
                "items, and each may take its allowed options only; ask for fewer."
            )
    choice = _least(program, program.extra)
    spent, where = program.spent(choice), f"group {program.names[0]}" if len(program.names) == 1 else "all groups"
    if spent > program.budget:
        free = program.spent(program.extra.argmin(1))
        cause = f"at_least {program.required} is out of reach" if free <= program.budget else "the budget is too small"
        raise ValueError(
            f"{cause} in {where}: the cheapest possible price is {spent!r}, but the budget is {program.budget!r}; "
            f"raise the budget to {spent!r} or more."
        )
    return choice


def _least(program: _Program, table: Floats) -> Ints:
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


def _bonuses(program: _Program, table: Floats) -> Floats:
    """[G, J] what each required option must be discounted by so that items take it of their own accord under `table`.

    These are the optimal dual values of the assignment in `_least`, found as shortest paths between slots.
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
class _Bound:
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
    def at(cls, program: _Program, multiplier: float) -> _Bound:
        """The bound for a multiplier of the budget, with the best discounts."""
        table = program.priced(multiplier)
        bonus = _bonuses(program, table)
        table = table - bonus[program.group]
        return cls(multiplier, bonus, table - table.min(1, keepdims=True))

    def distance(self, program: _Program, choice: Ints) -> float:
        """Total cost of a choice minus the bound, as a sum of terms >= 0 (nothing cancels)."""
        surplus = program.counts(choice).astype(np.float64)
        for option, least in program.required.items():
            surplus[:, option] -= least
        unspent = self.multiplier * max(program.budget - program.spent(choice), 0.0)
        return math.fsum((*program.take(self.reduced, choice), *(self.bonus * surplus).flat, unspent))

    def rounding(self, program: _Program, choice: Ints) -> float:
        """Rounding error of `distance`: differences below it are not visible in float64."""
        sizes = program.priced(self.multiplier) + self.bonus[program.group]
        return 16 * _EPS * float(program.take(sizes, choice).sum())


def _lagrangian(program: _Program, cheapest: Ints) -> tuple[Ints, _Bound]:
    """A good choice and the best Lagrangian bound, by bisection on the price of the budget and a greedy fill."""
    low, high = 0.0, 0.0
    choice = _least(program, program.regret)
    if not program.accepts(choice):
        usable = np.isfinite(program.cost)
        high = float((program.regret[usable].max() or 1.0) / (program.extra[usable].max() or 1.0))
        for _ in range(_MAX_BISECTIONS):
            choice = _least(program, program.priced(high))
            if program.accepts(choice):
                break
            low, high, choice = high, 4.0 * high, cheapest
    for _ in range(_MAX_BISECTIONS):
        if high - low <= 2 * _EPS * high:
            break
        middle = (low + high) / 2
        trial = _least(program, program.priced(middle))
        if program.accepts(trial):
            high, choice = middle, trial
        else:
            low = middle
    return _improve(program, choice), _Bound.at(program, high)


def _improve(program: _Program, choice: Ints) -> Ints:
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


def _solve_program(program: _Program, cheapest: Ints, gap: float) -> tuple[Ints, float, str]:
    """The best choice, and where it is not proven optimal its relative gap and the reason."""
    choice, bound = _lagrangian(program, cheapest)
    total, distance = program.total(choice), bound.distance(program, choice)
    reach = distance + bound.rounding(program, choice)
    if distance <= max(gap * total, reach - distance) or not program.take(program.regret, choice).any():
        return choice, 0.0, ""
    keep = bound.reduced <= reach
    keep[np.arange(len(choice)), choice] = True
    if keep.sum() > MAX_BINARIES:
        return choice, distance / total, f"{keep.sum()} options are left, HiGHS gets {MAX_BINARIES} at most"
    # HiGHS minimizes the distance, while `gap` is a fraction of the total
    found, reason = _highs(program, bound, keep, reach, gap * (total - distance) / reach)
    if found is not None and program.total(found) <= total:
        choice = _improve(program, found)
    return choice, bound.distance(program, choice) / total if reason else 0.0, reason


def _highs(
    program: _Program, bound: _Bound, keep: NDArray[np.bool_], reach: float, gap: float
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
    program: _Program, bound: _Bound, item: Ints, option: Ints, least: Floats, reach: float
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
