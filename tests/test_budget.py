# SPDX-License-Identifier: Apache-2.0
"""Budgets per layer: the paper's Mixtral-8x7B figures, exact sums, and the range that is stated when refused."""

from __future__ import annotations

import random

import pytest

from transformers_mcmoe.allocation.budget import LayerSize, expert_budgets

# Mixtral-8x7B: 32 layers of 8 experts, three matrices 4096 x 14336 each; q, o 4096 x 4096 and k, v 4096 x 1024
EXPERT = 3 * 4096 * 14336
ATTENTION = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
MIXTRAL = [LayerSize(8, EXPERT)] * 32


def _mixtral(average: float, widths: tuple[int, ...] = (1, 2, 3)) -> list[int]:
    return expert_budgets(average, MIXTRAL, widths, ATTENTION, 4 * ATTENTION)


def _spent(budgets: list[int], layers: list[LayerSize]) -> int:
    return sum(budget * layer.expert_weights for budget, layer in zip(budgets, layers, strict=True))


@pytest.mark.parametrize(
    ("label", "per_expert"),
    [
        (1.57, 1.5),
        (1.69, 1.625),
        (1.82, 1.75),
        (1.94, 1.875),
        (2.06, 2.0),
        (2.18, 2.125),
        (2.30, 2.25),
        (2.42, 2.375),
        (2.54, 2.5),
    ],
)
def test_labels_of_the_paper(label: float, per_expert: float):
    """arXiv 2410.06270: the average of an expert width k and 4-bit attention, to two decimals."""
    exact = (per_expert * 256 * EXPERT + 4 * ATTENTION) / (256 * EXPERT + ATTENTION)
    assert exact == pytest.approx(label, abs=0.0051)
    # at the exact average every layer takes k on average
    assert _mixtral(exact) == [int(8 * per_expert)] * 32
    # the label is rounded: off by what the rounding leaves, and by one bit of one expert
    budgets = _mixtral(label)
    assert abs(sum(budgets) / 256 - per_expert) <= 0.0051 * (1 + ATTENTION / (256 * EXPERT)) + 1 / 256
    assert set(budgets) <= {int(8 * per_expert) - 1, int(8 * per_expert), int(8 * per_expert) + 1}


def test_two_point_five_four():
    budgets = _mixtral(2.54)
    assert sum(budgets) == 639  # 2.49655 * 256 = 639.1
    assert sorted(budgets) == [19] + [20] * 31


@pytest.mark.parametrize("average", [1.1, 1.57, 1.9, 2.05, 2.2, 2.54, 2.77, 3.0])
def test_mixtral_total_and_spread(average: float):
    budgets = _mixtral(average)
    limit = average * (256 * EXPERT + ATTENTION) - 4 * ATTENTION
    assert limit - EXPERT < _spent(budgets, MIXTRAL) <= limit
    assert max(budgets) - min(budgets) <= 1


def test_random_models():
    """Layers of one size: never above the average, never one bit of one expert below, evenly spread."""
    rng = random.Random(0)
    for _ in range(300):
        experts, count, weights = rng.randint(1, 64), rng.randint(1, 40), rng.randint(1, 10**6)
        layers = [LayerSize(experts, weights)] * count
        fixed = rng.choice([0, rng.randint(1, 10**7)])
        bits = rng.choice([1, 2, 3, 4, 8])
        widths = rng.choice([(1, 2, 3), (2, 3), (1, 4), (2, 3, 4, 8), (3,)])
        total = experts * count * weights
        low, high = ((w * total + bits * fixed) / (total + fixed) for w in (widths[0], widths[-1]))
        average = rng.uniform(low, high)
        budgets = expert_budgets(average, layers, widths, fixed, bits * fixed)
        limit = average * (total + fixed) - bits * fixed
        slack = 1e-6 * weights + 1e-9 * abs(limit)
        assert _spent(budgets, layers) <= limit + slack
        assert _spent(budgets, layers) > limit - weights - slack
        assert max(budgets) - min(budgets) <= 1
        assert all(widths[0] * experts <= budget <= widths[-1] * experts for budget in budgets)


def test_layers_with_different_numbers_of_experts():
    layers = [LayerSize(8, 100), LayerSize(16, 100), LayerSize(3, 100), LayerSize(5, 100)]
    budgets = expert_budgets(2.3, layers, (1, 2, 3), 0, 0)
    # 18.4, 55.2, 62.1, 73.6 cumulated
    assert budgets == [18, 37, 7, 11]


@pytest.mark.parametrize(
    "layers",
    [
        [LayerSize(1, 1), LayerSize(1, 1000)],
        [LayerSize(3, 100), LayerSize(3, 1000), LayerSize(3, 100), LayerSize(3, 10**5)],
    ],
)
def test_layers_with_experts_of_different_sizes(layers: list[LayerSize]):
    """A fraction left in small experts must not buy a bit of a large one."""
    weights = sum(layer.num_experts * layer.expert_weights for layer in layers)
    budgets = expert_budgets(1.5, layers, (1, 2, 3), 0, 0)
    assert _spent(budgets, layers) <= 1.5 * weights


def test_carry():
    assert expert_budgets(2.5, [LayerSize(1, 10)] * 6, (1, 2, 3), 0, 0) == [2, 3, 2, 3, 2, 3]
    assert expert_budgets(2.25, [LayerSize(1, 10)] * 8, (1, 2, 3), 0, 0) == [2, 2, 2, 3, 2, 2, 2, 3]
    assert expert_budgets(1.4, [LayerSize(2, 10)] * 5, (1, 2), 0, 0) == [2, 3, 3, 3, 3]


def test_fixed_layers_take_their_share():
    # 100 weights in experts, 100 fixed at 4 bits: an average of 3 leaves 2 for the experts
    assert expert_budgets(3.0, [LayerSize(10, 10)], (1, 2, 3), 100, 400) == [20]


def test_range_is_stated():
    for average in (1.0, 3.5):
        with pytest.raises(ValueError, match=r"bits=.* cannot be met") as error:
            _mixtral(average)
        message = str(error.value)
        assert f"bits={average}" in message
        assert "expert_bits=(1, 2, 3)" in message
        assert "between 1.09 and 3.03" in message


def test_labels_at_the_limits():
    """3.03 is how 3.0289, all experts at 3 bits, is written; the lower limit is 1.0867."""
    assert _mixtral(3.03) == [24] * 32
    assert _mixtral(1.085) == [8] * 32
    with pytest.raises(ValueError, match="cannot be met"):
        _mixtral(3.035)
    with pytest.raises(ValueError, match="cannot be met"):
        _mixtral(1.08)
    assert expert_budgets(3, MIXTRAL, (3,), 0, 0) == [24] * 32
    assert expert_budgets(3, MIXTRAL, (1, 2, 3), 0, 0) == [24] * 32
    assert expert_budgets(1, MIXTRAL, (1, 2, 3), 0, 0) == [8] * 32


@pytest.mark.parametrize("experts", [6, 8, 10, 60, 64, 128, 256])
def test_whole_numbers_are_not_lost(experts: int):
    """k / E is no binary fraction; k bits per layer are meant all the same, also after many layers."""
    layers = [LayerSize(experts, 3 * 2048 * 768)] * 94
    weights, fixed = 94 * experts * 3 * 2048 * 768, 94 * 123457
    for budget in range(experts, 3 * experts + 1, max(1, experts // 20)):
        assert expert_budgets(budget / experts, layers, (1, 2, 3), 0, 0) == [budget] * 94
        average = (budget / experts * weights + 4 * fixed) / (weights + fixed)
        assert expert_budgets(average, layers, (1, 2, 3), fixed, 4 * fixed) == [budget] * 94
