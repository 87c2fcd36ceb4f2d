# SPDX-License-Identifier: Apache-2.0
"""Scores against their formulas, the uniform baseline to the bit, and the bit maps that the authors of MC released."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from transformers_mcmoe.allocation import SCORES, ExpertStatistics, solve, uniform
from transformers_mcmoe.allocation.significance import layers_by_change

BITS = (1, 2, 3)
RELEASED = Path(__file__).parents[2] / "shared" / "data" / "mc_mixtral_8x7b.json"


def _statistics(experts=5, widths=3, seed=0):
    rng = np.random.default_rng(seed)
    return ExpertStatistics(
        rng.integers(0, 1000, experts).astype(float),
        rng.random(experts) * 100,
        rng.random((experts, widths)),
        rng.random((experts, widths)),
    )


def _score(name, stats, bits=BITS, alpha=1.0, beta=1.5, gamma=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return SCORES[name](stats, bits, alpha=alpha, beta=beta, gamma=gamma, rng=rng)


def test_names():
    assert list(SCORES) == ["pmq", "f_norm", "hessian", "frequency", "routing_weight", "random"]


@pytest.mark.parametrize("name", SCORES)
def test_every_score_takes_the_same_arguments(name):
    parameters = inspect.signature(SCORES[name]).parameters
    assert list(parameters) == ["stats", "bits", "alpha", "beta", "gamma", "rng"]
    stats = _statistics(7, 4)
    kept = stats.frequency.copy(), stats.routing_weight.copy(), stats.error.copy()
    cost = _score(name, stats, (1, 2, 3, 8))
    assert cost.shape == (7, 4)
    assert cost.dtype == np.float64
    assert np.isfinite(cost).all()
    assert (cost >= 0).all()
    cost += 1.0  # not a view of the statistics
    for values, before in zip((stats.frequency, stats.routing_weight, stats.error), kept, strict=True):
        np.testing.assert_array_equal(values, before)


def test_pmq_is_the_formula_of_the_paper():
    stats = ExpertStatistics(np.array([1.0, 3.0]), np.array([2.0, 6.0]), np.array([[4.0, 2.0], [3.0, 1.0]]))
    expected = [[0.25 * 0.25**1.5 * 16, 0.25 * 0.25**1.5 * 4], [0.75 * 0.75**1.5 * 9, 0.75 * 0.75**1.5 * 1]]
    np.testing.assert_allclose(_score("pmq", stats, (1, 2), gamma=2.0), expected, rtol=1e-15)
    # the unit of the counts does not matter, nor does what an exponent of 0 leaves out
    scaled = ExpertStatistics(stats.frequency * 7, stats.routing_weight / 3, stats.error)
    np.testing.assert_allclose(_score("pmq", scaled, (1, 2), gamma=2.0), expected, rtol=1e-14)
    np.testing.assert_array_equal(_score("pmq", stats, (1, 2), alpha=0.0, beta=0.0), stats.error)


def test_baselines_are_their_formulas():
    stats = ExpertStatistics(np.array([1.0, 3.0]), np.array([4.0, 1.0]), np.zeros((2, 2)))
    np.testing.assert_array_equal(_score("f_norm", stats, (1, 3)), stats.error)
    np.testing.assert_allclose(_score("frequency", stats, (1, 3)), [[0.25 / 4, 0.25 / 64], [0.75 / 4, 0.75 / 64]])
    np.testing.assert_allclose(_score("routing_weight", stats, (1, 3)), [[0.8 / 4, 0.8 / 64], [0.2 / 4, 0.2 / 64]])
    importance = np.random.default_rng(4).random(2)
    np.testing.assert_array_equal(_score("random", stats, (1, 3), seed=4), np.outer(importance, [1 / 4, 1 / 64]))
    assert (_score("random", stats, (1, 3), seed=5) != _score("random", stats, (1, 3), seed=4)).all()


@pytest.mark.parametrize("name", ["pmq", "frequency", "routing_weight"])
def test_layer_without_tokens_costs_nothing(name):
    stats = ExpertStatistics(np.zeros(3), np.zeros(3), np.ones((3, 3)))
    np.testing.assert_array_equal(_score(name, stats), np.zeros((3, 3)))


@pytest.mark.parametrize("name", SCORES)
def test_widths_must_match_the_errors(name):
    with pytest.raises(ValueError, match=r"bits \(1, 2\) are 2 widths, but error has 3 columns"):
        _score(name, _statistics(), (1, 2))


def test_statistics_are_checked():
    ones = np.ones(3)
    with pytest.raises(ValueError, match=r"shapes \(3,\), \(3,\) and \(2, 3\)"):
        ExpertStatistics(ones, ones, np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"shapes \(2,\), \(3,\) and \(3, 3\)"):
        ExpertStatistics(np.ones(2), ones, np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"routing_weight is -1\.0 at \[1\]"):
        ExpertStatistics(ones, np.array([0.0, -1.0, 2.0]), np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"error is nan at \[2, 0\]"):
        ExpertStatistics(ones, ones, np.array([[1.0], [1.0], [np.nan]]))


@pytest.mark.parametrize("bits", [(1, 2, 3), (2, 4), (3, 1, 8), (2,)])
@pytest.mark.parametrize("experts", [1, 8, 13])
def test_uniform_spends_the_budget_to_the_bit(bits, experts):
    widths, ordered = np.array(bits), sorted(bits)
    for budget in range(min(bits) * experts, max(bits) * experts + 3):
        choice = uniform(experts, bits, budget, np.random.default_rng(budget))
        assert choice.dtype == np.int64
        assert choice.shape == (experts,)
        taken = np.unique(widths[choice]).tolist()
        spent = int(widths[choice].sum())
        assert spent <= budget
        if budget >= max(bits) * experts:
            assert taken == [max(bits)]
            continue
        low = max(width for width in ordered if width * experts <= budget)
        step = ordered[ordered.index(low) + 1] - low
        assert set(taken) <= {low, low + step}
        assert budget - spent < step


def test_uniform_is_random_and_seeded():
    first, again, other = (uniform(64, BITS, 160, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert sorted(first) == sorted(other) == [1] * 32 + [2] * 32
    # fractions of a bit are not spent
    assert (uniform(8, BITS, 16.99, np.random.default_rng(0)) == 1).all()


@pytest.mark.parametrize(
    ("experts", "bits", "budget", "message"),
    [
        (8, (2, 3), 15, "budget_bits is 15, but 8 experts need 16 at the lowest width 2"),
        (8, (2, 3), float("nan"), "budget_bits is nan"),
        (8, (2, 2), 16, r"8 experts cannot share the widths \(2, 2\)"),
        (8, (), 16, r"8 experts cannot share the widths \(\)"),
        (0, (2, 3), 16, "0 experts cannot share"),
    ],
)
def test_uniform_names_bad_input(experts, bits, budget, message):
    with pytest.raises(ValueError, match=message):
        uniform(experts, bits, budget, np.random.default_rng(0))


@pytest.mark.skipif(not RELEASED.is_file(), reason=f"the released statistics of Mixtral-8x7B are not at {RELEASED}")
def test_released_bit_maps_of_mixtral_are_reproduced():
    """Nine budgets (1.5 to 2.5 bits), 32 layers each: equal to the maps that the authors of MC released."""
    data = json.loads(RELEASED.read_text(encoding="utf-8"))
    bits = data["candidate_bits"]
    layers = [
        ExpertStatistics(np.array(counts), np.array(weights), np.array(errors))
        for counts, weights, errors in zip(
            data["frequency"], data["routing_weight"], data["quantization_loss"], strict=True
        )
    ]
    cost = np.concatenate([_score("pmq", layer, bits, alpha=1.0, beta=1.5, gamma=1.0) for layer in layers])
    group, price = np.repeat(np.arange(32), 8), np.tile(np.array(bits, float), (256, 1))
    at_least = {bits.index(3): 1, bits.index(2): 1}
    assert sorted(data["expected_bits"], key=int) == [str(total) for total in range(12, 21)]
    for total, expected in data["expected_bits"].items():
        choice = solve(cost, price, np.full(32, int(total)), group=group, at_least=at_least)
        np.testing.assert_array_equal(np.array(bits)[choice].reshape(32, 8), expected)


def test_hessian_is_what_was_measured():
    stats = _statistics(5, 3)
    np.testing.assert_array_equal(_score("hessian", stats, (1, 2, 3)), stats.hessian_error)
    bare = ExpertStatistics(stats.frequency, stats.routing_weight, stats.error)
    with pytest.raises(ValueError, match="needs hessian_error"):
        _score("hessian", bare, (1, 2, 3))


def test_block_score_lifts_the_layers_that_change_most():
    similarity = {"a": 0.9, "b": 0.1, "c": 0.5, "d": 0.7}
    weights = dict.fromkeys(similarity, 100)
    quarter = layers_by_change(similarity, weights, (2, 4), 2.5 * 400)
    assert quarter == {"a": 2, "b": 4, "c": 2, "d": 2}
    assert layers_by_change(similarity, weights, (2, 4), 3 * 400) == {"a": 2, "b": 4, "c": 4, "d": 2}
    assert set(layers_by_change(similarity, weights, (2, 4), 2.4 * 400).values()) == {2}
    # a layer that is too large for what is left is passed over
    assert layers_by_change(similarity, weights | {"b": 1000}, (2, 4), 2 * 1300 + 200) == {
        "a": 2,
        "b": 2,
        "c": 4,
        "d": 2,
    }
