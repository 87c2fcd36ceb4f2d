# SPDX-License-Identifier: Apache-2.0
"""Which experts a layer can do without: their importance, how many each layer drops, and which set of them.

The search of MoE-I2 (arXiv 2411.01016, stage 1): layers that matter less drop more; in a layer the set whose removal changes the
block's output least is searched for, exhaustively or by a genetic algorithm; of the best sets of neighbouring layers
the combination is chosen that changes their joint output least. Knows sets and errors that it is given, not models.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

# sets that are all tried; also the evaluations of the genetic search, 50 generations of 100
EXHAUSTIVE = 5000
POPULATION, GENERATIONS = 100, 50
# share of a generation that has children
PARENTS = 0.2
State = TypeVar("State")
Choice = TypeVar("Choice")


class Outputs(Protocol):
    """What a block returns without some of its experts."""

    @property
    def num_experts(self) -> int: ...

    def error(self, dropped: Sequence[int]) -> float: ...


def leave_one_out(outputs: Outputs) -> list[float]:
    """Importance of every expert of a layer: the error of the block's output when it alone is gone."""
    return [outputs.error((expert,)) for expert in range(outputs.num_experts)]


def drop_counts(
    importance: Sequence[float], sizes: Sequence[int], ratio: float, least: Sequence[int], steps: Sequence[int]
) -> list[int]:
    """How many experts each layer drops.

    A layer's share is inverse to its importance (largest remainder), bounded by what it must keep; what a bounded layer
    cannot drop goes to the others.

    Args:
        importance: of each layer, >= 0; all alike for the same share everywhere.
        sizes: experts of each layer.
        ratio: share of all experts that is dropped, in (0, 1).
        least: experts that each layer keeps at least.
        steps: what each layer's count must be a multiple of: its groups.

    Raises:
        ValueError: more are to be dropped than the layers can spare.
    """
    most = [(size - kept) // step * step for size, kept, step in zip(sizes, least, steps, strict=True)]
    wanted = round(ratio * sum(sizes))
    if not wanted:
        raise ValueError(
            f"prune={ratio} drops none of {sum(sizes)} experts; give {1 / sum(sizes):.4f} at least, or leave it out."
        )
    if wanted > sum(most):
        raise ValueError(
            f"prune={ratio} cannot be met: each layer keeps as many experts as a token is sent to, so that at most {sum(most)} of "
            f"{sum(sizes)} experts ({sum(most) / sum(sizes):.2f}) can be dropped; lower it."
        )
    weights = [size / max(value, 1e-30) for value, size in zip(importance, sizes, strict=True)]
    ideal = _shared(wanted, weights, most)
    counts = [int(share // step) * step for share, step in zip(ideal, steps, strict=True)]
    # the largest remainders, in units of a layer's step, take what is left
    order = sorted(range(len(sizes)), key=lambda n: (counts[n] - ideal[n]) / steps[n])
    for n in itertools.chain(order, order):
        if sum(counts) >= wanted:
            break
        if counts[n] < most[n]:
            counts[n] += steps[n]
    return counts


def _shared(total: float, weights: Sequence[float], most: Sequence[int]) -> list[float]:
    """`total` in proportion to the weights, no share above its bound."""
    shares = [0.0] * len(weights)
    free = set(range(len(weights)))
    left = float(total)
    while free:
        scale = left / sum(weights[n] for n in free)
        bounded = {n for n in free if weights[n] * scale >= most[n]}
        if not bounded:
            for n in free:
                shares[n] = weights[n] * scale
            break
        for n in bounded:
            shares[n] = float(most[n])
            left -= most[n]
        free -= bounded
    return shares


def search_is_exhaustive(experts: int, count: int, groups: int = 1) -> bool:
    """Whether all sets of `count` dropped experts, as many of each group, are few enough to try."""
    return math.comb(experts // groups, count // groups) ** groups <= EXHAUSTIVE


def search(
    outputs: Outputs,
    count: int,
    *,
    best: int = 1,
    groups: int = 1,
    seed: int = 0,
    population: int = POPULATION,
    generations: int = GENERATIONS,
) -> list[tuple[int, ...]]:
    """The sets of `count` experts whose removal changes a block's output least.

    All sets are tried where they are few (`EXHAUSTIVE`); else a genetic search runs: the best fifth of a generation has
    children, each a sample of the union of two parents with a swap or more; the best sets stay. At the end the best one
    is improved by single swaps while that helps.

    Args:
        outputs: of the block.
        count: experts to drop, a multiple of `groups`.
        best: how many sets to return.
        groups: experts form so many groups of neighbours, which drop equally many.
        seed: of the search.
        population: sets of a generation.
        generations: how many.

    Returns:
        Up to `best` sets of expert ids in ascending order, the best set first.

    Raises:
        ValueError: `count` is no multiple of `groups`, or leaves no expert.
    """
    experts = outputs.num_experts
    if count % groups or not 0 <= count < experts:
        raise ValueError(f"count={count} is not valid: it must be a multiple of {groups} below {experts} experts.")
    if search_is_exhaustive(experts, count, groups):
        found: Iterable[tuple[int, ...]] = _all_sets(experts, count, groups)
    else:
        found = _Genetic(outputs, count, groups, random.Random(seed)).run(population, generations)
    return sorted(found, key=lambda dropped: (outputs.error(dropped), dropped))[:best]


def _members(experts: int, groups: int) -> list[list[int]]:
    size = experts // groups
    return [list(range(start, start + size)) for start in range(0, experts, size)]


def _all_sets(experts: int, count: int, groups: int) -> Iterable[tuple[int, ...]]:
    parts = [itertools.combinations(members, count // groups) for members in _members(experts, groups)]
    return (tuple(itertools.chain(*chosen)) for chosen in itertools.product(*parts))


class _Genetic:
    """The genetic search for one layer."""

    def __init__(self, outputs: Outputs, count: int, groups: int, rng: random.Random) -> None:
        self._outputs, self._rng = outputs, rng
        self._members = _members(outputs.num_experts, groups)
        self._each = count // groups

    def run(self, population: int, generations: int) -> set[tuple[int, ...]]:
        """The last generation."""
        current = {self._first()} | {self._random() for _ in range(population - 1)}
        for _ in range(generations):
            ranked = sorted(current, key=lambda dropped: (self._outputs.error(dropped), dropped))
            parents = ranked[: max(2, round(PARENTS * population))]
            current = set(parents)
            for _ in range(4 * population):  # some children exist already
                if len(current) >= population:
                    break
                current.add(self._child(*self._rng.sample(parents, 2)) if len(parents) > 1 else self._random())
        return current | {self._improved(min(current, key=self._outputs.error))}

    def _first(self) -> tuple[int, ...]:
        """The experts that matter least by themselves."""
        alone = leave_one_out(self._outputs)
        return self._joined(sorted(members, key=alone.__getitem__)[: self._each] for members in self._members)

    def _random(self) -> tuple[int, ...]:
        return self._joined(self._rng.sample(members, self._each) for members in self._members)

    def _child(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        """A sample of the union of two sets, of which some experts are exchanged for others."""
        parts = []
        swapped = self._rng.randrange(len(self._members))
        for group, members in enumerate(self._members):
            union = sorted({*a, *b} & set(members))
            part = set(self._rng.sample(union, self._each))
            swaps = 1 if group == swapped else 0
            while swaps and part and len(part) < len(members):
                part.remove(self._rng.choice(sorted(part)))
                part.add(self._rng.choice(sorted(set(members) - part)))
                swaps = int(self._rng.random() < 0.25)
            parts.append(sorted(part))
        return self._joined(parts)

    def _improved(self, dropped: tuple[int, ...]) -> tuple[int, ...]:
        """A set that no exchange of one expert makes better."""
        while True:
            swaps = [
                tuple(sorted({*dropped} - {out} | {new}))
                for members in self._members
                for out in set(members) & {*dropped}
                for new in set(members) - {*dropped}
            ]
            better = min(swaps, key=self._outputs.error, default=dropped)
            if self._outputs.error(better) >= self._outputs.error(dropped):
                return dropped
            dropped = better

    @staticmethod
    def _joined(parts: Iterable[Iterable[int]]) -> tuple[int, ...]:
        return tuple(sorted(itertools.chain(*parts)))


def reception_field(
    candidates: Sequence[Sequence[Choice]],
    start: State,
    run: Callable[[State, int, Choice], State],
    error: Callable[[State], float],
) -> list[Choice]:
    """The choice of one candidate per layer, of several layers in a row, whose joint output changes least.

    All combinations are tried (MoE-I2's block-wise KT reception field: K candidates in each of T layers); layers that
    two combinations have in common run once.

    Args:
        candidates: what each layer may drop.
        start: what enters the first layer.
        run: what a layer returns for what enters it, given its number here and what it drops.
        error: of what the last layer returns.
    """
    best: tuple[float, list[Choice]] = (math.inf, [])

    def descend(state: State, chosen: list[Choice]) -> None:
        nonlocal best
        if len(chosen) == len(candidates):
            own = error(state)
            if own < best[0]:
                best = (own, chosen)
            return
        for dropped in candidates[len(chosen)]:
            descend(run(state, len(chosen), dropped), [*chosen, dropped])

    descend(start, [])
    return best[1]
