# SPDX-License-Identifier: Apache-2.0
"""The knapsack against brute force and dynamic programming, on costs that span many orders of magnitude."""

from __future__ import annotations

import itertools
import logging
import math
from fractions import Fraction

import numpy as np
import pytest

from transformers_mcmoe.allocation import knapsack, solve
from transformers_mcmoe.allocation.knapsack import highs

BITS = np.array([1.0, 2.0, 3.0])


def _uniform(rng, n, j):
    return rng.random((n, j))


def _log_normal(rng, n, j):
    return rng.lognormal(0, 4, (n, j))


def _squared(rng, n, j):
    return rng.lognormal(0, 4, (n, j)) ** 2


def _scaled_rows(rng, n, j):
    return rng.lognormal(0, 4, (n, 1)) ** 2 * rng.random((n, j))


def _super_expert(rng, n, j):
    cost = rng.lognormal(0, 1, (n, 1)) * 4.0 ** -np.arange(j)
    cost[0] *= 122**2
    return cost


def _few_values(rng, n, j):
    return rng.integers(0, 4, (n, j)).astype(float)


COSTS = [_uniform, _log_normal, _squared, _scaled_rows, _super_expert, _few_values]


def _widths(rng, n, j):
    return np.tile(np.arange(1.0, j + 1), (n, 1))


def _bits_times_parameters(rng, n, j):
    return _widths(rng, n, j) * 176_160_768


def _large_integers(rng, n, j):
    return rng.integers(1, 10**12, (n, j)).astype(float)


def _reals(rng, n, j):
    return rng.random((n, j))


def _tenths(rng, n, j):
    return rng.integers(0, 6, (n, j)) * 0.1


PRICES = [_widths, _bits_times_parameters, _large_integers, _reals, _tenths]


def _total(table, choice):
    """Sum without rounding."""
    return sum(map(Fraction, table[np.arange(len(choice)), choice].tolist()))


def _spent(price, choice):
    return math.fsum(price[np.arange(len(choice)), choice])


def _brute_force(cost, price, budget, group=None, at_least=None, allowed=None):
    """The least total cost over all choices, without rounding; None where no choice is possible."""
    n, j = cost.shape
    rows, group = np.arange(n), np.zeros(n, int) if group is None else group
    choices = np.array(list(itertools.product(range(j), repeat=n)))
    possible = np.ones(len(choices), bool) if allowed is None else allowed[rows, choices].all(1)
    for option, least in (at_least or {}).items():
        for g in np.unique(group):
            possible &= (choices[:, group == g] == option).sum(1) >= least
    prices = price[rows, choices]
    possible &= prices.sum(1) <= budget + 1e-9 * abs(budget)  # then exactly, on the few that are left
    choices = choices[possible][[math.fsum(p) <= budget for p in prices[possible].tolist()]]
    if not len(choices):
        return None
    costs = cost[rows, choices].sum(1)
    return min(_total(cost, choice) for choice in choices[costs <= costs.min() * (1 + 1e-9)])


def _dynamic_program(cost, price, budget, group, at_least):
    """The least total cost over integer prices, by the price spent and the required options still missing."""
    options, counts = list(at_least), list(at_least.values())
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    for g in np.unique(group):
        states = {tuple(counts): best}
        for i in np.flatnonzero(group == g):
            following = {}
            for missing, spent in states.items():
                for j, p in enumerate(price[i].astype(int).tolist()):
                    left = tuple(max(m - (option == j), 0) for m, option in zip(missing, options, strict=True))
                    into = following.setdefault(left, np.full(budget + 1, np.inf))
                    np.minimum(into[p:], spent[: budget + 1 - p] + cost[i, j], out=into[p:])
            states = following
        best = states[tuple(0 for _ in counts)]
    return float(best.min())


def _falling(cost):
    """Costs that fall with the option index, as they do with bits."""
    return -np.sort(-cost, axis=1)


def _program(draw_cost, draw_price, seed):
    """A random program with groups, requirements and forbidden options; about one in five is infeasible."""
    rng = np.random.default_rng(seed)
    j = int(rng.integers(2, 5))
    n = int(rng.integers(1, {2: 10, 3: 8, 4: 6}[j]))
    cost, price = draw_cost(rng, n, j), draw_price(rng, n, j)
    cost = _falling(cost) if rng.random() < 0.6 else cost
    group = rng.integers(0, 3, n) if rng.random() < 0.5 else np.zeros(n, int)
    required = rng.choice(j, int(rng.integers(0, min(j, 3))), replace=False)
    allowed = None
    if rng.random() < 0.3:
        allowed = rng.random((n, j)) < 0.8
        allowed[np.arange(n), rng.integers(0, j, n)] = True
    # mostly budgets that some choice costs exactly
    low, high = price.min(1).sum(), price.max(1).sum()
    exact = rng.random() < 0.7
    budget = _spent(price, rng.integers(0, j, n)) if exact else low + (high - low) * rng.random()
    return cost, price, budget, group, {int(k): int(rng.integers(0, 3)) for k in required}, allowed


@pytest.mark.parametrize("draw_price", PRICES)
@pytest.mark.parametrize("draw_cost", COSTS)
def test_equals_brute_force(draw_cost, draw_price):
    feasible = 0
    for seed in range(14):
        cost, price, budget, group, at_least, allowed = _program(draw_cost, draw_price, seed)
        best = _brute_force(cost, price, budget, group, at_least, allowed)
        if best is None:
            with pytest.raises(ValueError, match=r"raise the budget|ask for fewer"):
                solve(cost, price, budget, group=group, at_least=at_least, allowed=allowed)
            continue
        feasible += 1
        choice = solve(cost, price, budget, group=group, at_least=at_least, allowed=allowed)
        assert choice.dtype == np.int64
        assert choice.shape == cost.shape[:1]
        assert _spent(price, choice) <= budget
        assert allowed is None or allowed[np.arange(len(choice)), choice].all()
        for option, least in at_least.items():
            assert all((choice[group == g] == option).sum() >= least for g in np.unique(group))
        assert _total(cost, choice) - best <= best * Fraction(1, 10**15), seed
    assert feasible >= 7


@pytest.mark.parametrize("draw_cost", COSTS)
def test_equals_dynamic_program_where_brute_force_cannot_reach(draw_cost):
    rng = np.random.default_rng(0)
    for groups, size in ((1, 40), (4, 16), (12, 8)):
        n, at_least = groups * size, {2: 1, 1: 2}
        group = np.repeat(np.arange(groups), size)
        cost, price = _falling(draw_cost(rng, n, 3)), rng.integers(1, 9, (n, 3)).cumsum(1).astype(float)
        budget = int(price[:, 1].sum() * 1.1)
        best = _dynamic_program(cost, price, budget, group, at_least)
        choice = solve(cost, price, budget, group=group, at_least=at_least)
        assert _spent(price, choice) <= budget
        assert float(_total(cost, choice)) == pytest.approx(best, rel=1e-13)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_unit_of_cost_does_not_matter(scale):
    rng = np.random.default_rng(3)
    cost, price = _falling(_squared(rng, 40, 3)), np.tile(BITS, (40, 1))
    np.testing.assert_array_equal(solve(cost * scale, price, 71), solve(cost, price, 71))


def test_one_budget_per_group_solves_each_group_alone():
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([7, -2, 4], 6))  # numbers need not be consecutive, nor items sorted
    cost, price = _falling(_log_normal(rng, 18, 3)), np.tile(BITS, (18, 1))
    budgets = {-2: 9.0, 4: 12.0, 7: 14.0}
    choice = solve(cost, price, list(budgets.values()), group=group, at_least={2: 1, 1: 1})
    for number, budget in budgets.items():
        alone = solve(cost[group == number], price[group == number], budget, at_least={2: 1, 1: 1})
        np.testing.assert_array_equal(choice[group == number], alone)


def test_one_budget_for_all_is_at_least_as_good_as_one_per_group():
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(8), 8)
    cost, price = _falling(_log_normal(rng, 64, 3)), np.tile(BITS, (64, 1))
    each = solve(cost, price, np.full(8, 16), group=group, at_least={2: 1, 1: 1})
    together = solve(cost, price, 128, group=group, at_least={2: 1, 1: 1})
    assert _total(cost, together) < _total(cost, each)
    assert np.bincount(group[together == 2], minlength=8).min() >= 1
    assert np.bincount(group[together == 1], minlength=8).min() >= 1


def test_ties_go_to_the_lower_option():
    price = np.tile(BITS, (6, 1))
    np.testing.assert_array_equal(solve(np.ones((6, 3)), price, 18), np.zeros(6))
    np.testing.assert_array_equal(solve(np.zeros((6, 3)), price, 18), np.zeros(6))
    # the two dearer options cost the same
    np.testing.assert_array_equal(solve(np.tile([2.0, 1.0, 1.0], (6, 1)), price, 18), np.ones(6))
    # also where the lower option has the higher price, as long as it fits
    falling = price[:, ::-1].copy()
    np.testing.assert_array_equal(solve(np.ones((6, 3)), falling, 18), np.zeros(6))
    assert sorted(solve(np.ones((6, 3)), falling, 16).tolist()) == [0, 0, 0, 0, 0, 2]
    # an item takes a higher option for `at_least` only
    assert np.bincount(solve(np.ones((6, 3)), price, 18, at_least={2: 1, 1: 2})).tolist() == [3, 2, 1]


def test_no_item_could_move_to_a_lower_option_for_the_same_cost():
    for seed in range(40):
        cost, price, budget, group, at_least, allowed = _program(_few_values, _widths, seed)
        try:
            choice = solve(cost, price, budget, group=group, at_least=at_least, allowed=allowed)
        except ValueError:
            continue
        for i, option in enumerate(choice):
            for lower in range(option):
                moved = choice.copy()
                moved[i] = lower
                keeps = (choice[group == group[i]] == option).sum() > at_least.get(int(option), 0)
                permitted = allowed is None or allowed[i, lower]
                if permitted and keeps and _spent(price, moved) <= budget:
                    assert cost[i, lower] > cost[i, option]


def test_same_input_same_choice_and_input_untouched():
    rng = np.random.default_rng(5)
    cost, price = rng.integers(0, 3, (60, 3)).astype(float), np.tile(BITS, (60, 1))
    kept = cost.copy(), price.copy()
    first = solve(cost, price, 111, group=np.arange(60) // 10, at_least={2: 1})
    np.testing.assert_array_equal(solve(cost, price, 111, group=np.arange(60) // 10, at_least={2: 1}), first)
    np.testing.assert_array_equal(cost, kept[0])
    np.testing.assert_array_equal(price, kept[1])


@pytest.mark.parametrize("unit", [1.0, 0.25, 176_160_768.0, 1e12, 1e12 + 1])
def test_budget_is_exact_to_the_unit(unit):
    price = np.tile(BITS * unit, (8, 1))
    cost = _falling(np.random.default_rng(0).random((8, 3)))
    best = solve(cost, price, 16 * unit)
    assert _spent(price, best) == 16 * unit
    np.testing.assert_array_equal(solve(cost, price, np.nextafter(17 * unit, 0)), best)
    assert _spent(price, solve(cost, price, np.nextafter(16 * unit, 0))) == 15 * unit


def test_one_unit_of_a_trillion_decides(monkeypatch):
    """HiGHS's own tolerance lets a choice through that is one unit dearer than the budget; it is cut off."""
    calls, most = [], 0
    monkeypatch.setattr(highs, "milp", lambda milp=highs.milp, **model: calls.append(0) or milp(**model))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cost, price = _falling(rng.random((7, 3))), rng.integers(10**11, 10**12, (7, 3)).cumsum(1).astype(float)
        wanted = rng.integers(0, 3, 7)
        cost[np.arange(7), wanted] *= 1e-3
        budget = _spent(price, wanted)
        assert _total(cost, solve(cost, price, budget)) <= _total(cost, wanted)
        calls.clear()
        short = solve(cost, price, budget - 1)
        assert _spent(price, short) <= budget - 1
        assert _total(cost, short) == _brute_force(cost, price, budget - 1)
        most = max(most, len(calls))
    assert 1 < most < highs.MAX_CUTS


def test_a_total_price_is_the_correctly_rounded_sum():
    price = np.full((10, 2), 0.1)
    price[:, 0] = 0.0
    assert solve(np.tile([1.0, 0.0], (10, 1)), price, 1.0).sum() == 10
    assert solve(np.tile([1.0, 0.0], (10, 1)), price, np.nextafter(1.0, 0)).sum() == 9


def test_gap_bounds_the_cost():
    rng = np.random.default_rng(2)
    for _ in range(10):
        cost, price = _falling(rng.random((12, 3))), rng.integers(1, 100, (12, 3)).cumsum(1).astype(float)
        budget = float(int(price[:, 1].sum()))
        best = _total(cost, solve(cost, price, budget))
        for gap in (1e-6, 1e-2, 0.5):
            assert _total(cost, solve(cost, price, budget, gap=gap)) * Fraction(1 - gap) <= best


def test_no_items():
    empty = np.zeros((0, 3))
    assert solve(empty, empty, 1.0).shape == (0,)
    assert solve(empty, empty, [], group=np.zeros(0, int)).dtype == np.int64


def test_whole_program_of_48_layers_is_fast_and_reaches_its_bound():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(48), 128)
    cost, price = _falling(rng.lognormal(0, 1, (6144, 3))), np.tile(BITS, (6144, 1))
    choice = solve(cost, price, 14336, group=group, at_least={2: 1, 1: 1})
    assert _spent(price, choice) == 14336
    rough = solve(cost, price, 14336, group=group, at_least={2: 1, 1: 1}, gap=1e-6)
    assert _total(cost, choice) <= _total(cost, rough) <= _total(cost, choice) * Fraction(1 + 2e-6)


def _reported_gap(caplog):
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    return record.args[2]


@pytest.mark.parametrize("draw_cost", COSTS)
def test_lagrangian_choice_is_within_the_gap_it_reports(draw_cost, monkeypatch, caplog):
    monkeypatch.setattr(knapsack, "MAX_BINARIES", 0)
    reported = 0
    for seed in range(40):
        cost, price, budget, group, at_least, allowed = _program(draw_cost, _large_integers, seed)
        best = _brute_force(cost, price, budget, group, at_least, allowed)
        if best is None:
            continue
        caplog.clear()
        choice = solve(cost, price, budget, group=group, at_least=at_least, allowed=allowed)
        assert _spent(price, choice) <= budget
        total = _total(cost, choice)
        if not caplog.records:  # the bound itself proved it
            assert total - best <= best * Fraction(1, 10**14)
            continue
        reported += 1
        gap = _reported_gap(caplog)
        assert 0 < gap <= 1 + 1e-12
        assert total - best <= total * Fraction(gap) * (1 + Fraction(1, 10**9))
    assert reported >= 4


def test_lagrangian_choice_of_a_large_program_is_close(monkeypatch, caplog):
    monkeypatch.setattr(knapsack, "MAX_BINARIES", 0)
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(16), 64)
    cost, price = _falling(rng.lognormal(0, 1, (1024, 3))), rng.integers(1, 40, (1024, 3)).cumsum(1).astype(float)
    solve(cost, price, float(price[:, 1].sum()), group=group, at_least={2: 3, 1: 2})
    assert _reported_gap(caplog) < 1e-3


def test_failure_of_the_solver_is_logged_once_with_its_reason(monkeypatch, caplog):
    class Failed:
        x, status, message = None, 4, "numerical trouble"

    cost, price = _falling(_uniform(np.random.default_rng(0), 24, 3)), np.tile(BITS, (24, 1))
    price[:, 2] = 3.5
    group = np.repeat(np.arange(3), 8)
    exact = solve(cost, price, [14, 15, 16], group=group)
    assert not caplog.records
    monkeypatch.setattr(highs, "milp", lambda **model: Failed)
    choice = solve(cost, price, [14, 15, 16], group=group)
    gap = _reported_gap(caplog)
    assert "of 3 knapsack programs" in caplog.text
    assert "numerical trouble" in caplog.text
    assert _total(cost, exact) <= _total(cost, choice) <= _total(cost, exact) / Fraction(1 - gap)


SQUARE = np.ones((4, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cost": np.ones(3)}, r"cost must be \[items, options\], but its shape is \(3,\)"),
        ({"price": np.ones((4, 2))}, r"price has shape \(4, 2\), but cost \(4, 3\) asks for \(4, 3\)"),
        ({"allowed": np.ones((3, 3), bool)}, r"allowed has shape \(3, 3\)"),
        ({"group": np.zeros(3, int)}, r"group has shape \(3,\), but cost \(4, 3\) asks for \(4,\)"),
        ({"group": np.zeros(4)}, "group must hold integers, but its dtype is float64"),
        ({"budget": [1, 2, 3], "group": [0, 0, 1, 1]}, r"budget has shape \(3,\), but there are 2 groups"),
        ({"cost": np.where(np.eye(4, 3) > 0, np.nan, 1.0)}, r"cost is nan at \[0, 0\]"),
        ({"price": np.where(np.eye(4, 3) > 0, np.inf, 1.0)}, r"price is inf at \[0, 0\]"),
        ({"budget": np.nan}, r"budget is nan at \[\]"),
        ({"cost": SQUARE - 2}, r"cost is -1\.0 at \[0, 0\]; shift the costs"),
        ({"allowed": np.eye(4, 3) > 0}, "allowed leaves no option for item 3"),
        ({"at_least": {3: 1}}, r"at_least names option 3, but options are 0\.\.2"),
        ({"at_least": {-1: 1}}, "at_least names option -1"),
        ({"at_least": {1: -2}}, "at_least asks for -2 items of option 1"),
        ({"at_least": {1: 1.5}}, r"at_least asks for 1\.5 items"),
        ({"gap": -1.0}, r"gap must be a finite fraction >= 0, but it is -1\.0"),
        ({"at_least": {1: 3, 2: 2}}, r"at_least \{1: 3, 2: 2\} cannot be met in group 0 .* it has 4 items"),
        ({"at_least": {2: 3}, "group": [5, 5, 5, 9]}, r"at_least \{2: 3\} cannot be met in group 9 .* it has 1 items"),
        (
            {"at_least": {2: 2}, "allowed": np.array([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]], bool)},
            r"at_least \{2: 2\} cannot be met in group 0",
        ),
        ({"budget": 3.0}, r"the budget is too small in group 0: the cheapest possible price is 4\.0, but .* 3\.0;"),
        (
            {"budget": 3.0, "group": [0, 0, 1, 1]},
            r"the budget is too small in all groups: the cheapest possible price is 4\.0, but the budget is 3\.0",
        ),
        (
            {"budget": [2, 1], "group": [4, 4, 6, 6]},
            r"the budget is too small in group 6: the cheapest possible price is 2\.0, but the budget is 1\.0",
        ),
        (
            {"budget": [9, 3], "group": [4, 4, 6, 6], "at_least": {2: 1}},
            r"at_least \{2: 1\} is out of reach in group 6: .* 4\.0, .* is 3\.0; raise the budget to 4\.0 or more",
        ),
    ],
)
def test_bad_input_is_named(arguments, message):
    valid = {"cost": SQUARE, "price": np.tile(BITS, (4, 1)), "budget": 8.0}
    solve(**valid)
    with pytest.raises(ValueError, match=message):
        solve(**(valid | arguments))


def test_least_budget_of_the_message_is_enough():
    rng = np.random.default_rng(0)
    price = rng.integers(1, 100, (8, 3)).astype(float)
    with pytest.raises(ValueError, match="out of reach") as error:
        solve(rng.random((8, 3)), price, price.min(1).sum(), at_least={0: 3, 1: 3, 2: 2})
    least = float(str(error.value).split("raise the budget to ")[1].split()[0])
    assert _spent(price, solve(rng.random((8, 3)), price, least, at_least={0: 3, 1: 3, 2: 2})) == least
