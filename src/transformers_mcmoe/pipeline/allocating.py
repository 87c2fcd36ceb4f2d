# SPDX-License-Identifier: Apache-2.0
"""From what was measured of the experts to a width for each of them, per layer or over the whole model.

Knows measurements, budgets and the solver; it does not know how anything was measured, nor weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from torch import Tensor

from transformers_mcmoe.allocation import SCORES, solve, uniform
from transformers_mcmoe.allocation.significance import ExpertStatistics, layers_by_change
from transformers_mcmoe.calibration.statistics import RoutingStatistics
from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.plan import ROLES, ExpertWidths, Plan
from transformers_mcmoe.routing import RoutingRatios

# allocations that need the errors of every width
MEASURED = ("pmq", "f_norm", "hessian")


@dataclass
class LayerResult:
    """What was measured of one experts module.

    Attributes:
        routing: token counts and routing weights, None if no tokens were run.
        ratios: how much smaller than its largest a token's routing weights are.
        errors: width -> eps of every expert, 0 for dropped ones.
        role_errors: role -> width -> eps of every expert when only its matrices of that role are rounded.
        hessian_errors: width -> sum of Tr(H) / tokens * |W' - W|^2 over the matrices of every expert.
        starved: experts that saw too few tokens to be measured on their own.
    """

    routing: RoutingStatistics | None = None
    ratios: RoutingRatios | None = None
    errors: dict[int, list[float]] = field(default_factory=dict)
    role_errors: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    hessian_errors: dict[int, list[float]] = field(default_factory=dict)
    starved: list[int] = field(default_factory=list)

    def to_record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON form, and tensors by name."""
        tensors = {} if self.routing is None else dict(vars(self.routing))
        data: dict[str, Any] = {
            "errors": pairs(self.errors),
            "role_errors": {role: pairs(errors) for role, errors in self.role_errors.items()},
            "hessian_errors": pairs(self.hessian_errors),
            "starved": self.starved,
            "ratios": None,
        }
        if self.ratios is not None:
            data["ratios"], counts = self.ratios.to_record()
            tensors |= counts
        return data, tensors

    @classmethod
    def from_record(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerResult:
        """Inverse of `to_record`."""
        names = [part.name for part in fields(RoutingStatistics)]
        return cls(
            RoutingStatistics(*(tensors[name] for name in names)) if names[0] in tensors else None,
            None if data["ratios"] is None else RoutingRatios.from_record(data["ratios"], tensors),
            dict(data["errors"]),
            {role: dict(errors) for role, errors in data["role_errors"].items()},
            dict(data["hessian_errors"]),
            list(data["starved"]),
        )


def pairs(table: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """A mapping whose keys JSON has not, as it has it."""
    return list(table.items())


class Allocator:
    """Chooses widths under the config's budget.

    Args:
        structure: the model's experts.
        config: allocation, exponents, candidate widths, seed.
        budgets: sum of expert widths that each experts module may take, by path; {} where nothing is chosen.
    """

    def __init__(self, structure: Structure, config: MCMoEConfig, budgets: Mapping[str, int]) -> None:
        self._structure, self._config, self._budgets = structure, config, budgets
        self._index = {path: index for index, path in enumerate(structure.experts)}
        self._bits = np.asarray(config.expert_bits)

    def layer(self, path: str, result: LayerResult) -> ExpertWidths:
        """Widths of one experts module under its own budget."""
        count, budgets = len(self._structure.kept_of(path)), self._shares(path)
        if self._config.allocation == "uniform":
            random, each = self._random(path), count // len(budgets)
            choice = np.concatenate([uniform(each, self._config.expert_bits, budget, random) for budget in budgets])
        else:
            weights = self._structure.expert_weights(path)
            choice = solve(
                self._cost(path, result),
                self._price(path),
                [budget * weights for budget in budgets],
                group=np.arange(count) * len(budgets) // count,
                at_least=self._at_least(),
            )
        widths = self._spread(path, self._bits[choice])
        return ExpertWidths(widths, widths, *self._factors(path))

    def _shares(self, path: str) -> list[int]:
        """Sum of widths of a module's experts on each rank; steps that cannot be shared evenly go to one rank after the other."""
        ranks, lowest = self._config.expert_parallel, self._config.expert_bits[0]
        if ranks == 1:
            return [self._budgets[path]]
        step = math.gcd(*(bits - lowest for bits in self._config.expert_bits)) or 1
        counts = {own: len(self._structure.kept_of(own)) for own in self._budgets}
        steps = {own: (budget - lowest * counts[own]) // step for own, budget in self._budgets.items()}
        paths = list(self._budgets)
        first = sum(steps[own] for own in paths[: paths.index(path)])  # steps that modules before it have dealt out
        mine = [
            (first + steps[path] + ranks - 1 - rank) // ranks - (first + ranks - 1 - rank) // ranks
            for rank in range(ranks)
        ]
        return [lowest * counts[path] // ranks + step * own for own in mine]

    def model(
        self,
        results: Mapping[str, LayerResult],
        linears: Mapping[str, Mapping[int, float]],
        scales: Mapping[str, float],
    ) -> Plan:
        """Widths of all experts modules, and of linear layers that have a choice, under one budget.

        Args:
            results: measurements of experts modules by path.
            linears: width -> eps of the linear layers that have a choice, by path.
            scales: by path, what errors are multiplied by, so that those of different layers compare.
        """
        roles, layers = (self._config.granularity == kind for kind in ("projection", "layer"))
        # what shares a width: an expert, its matrices of one role, or all of a layer
        kinds = [(path, role) for path in results for role in (ROLES if roles else (None,))]
        options = max(len(self._bits), *map(len, self._structure.choices.values()), 0)
        rows = [
            pad((self._cost(path, results[path], scales[path], role), self._price(path, role)), options)
            for path, role in kinds
        ]
        if layers:
            rows = [(cost.sum(0)[None], price.sum(0)[None], allowed[:1]) for cost, price, allowed in rows]
        counts = [len(own[0]) for own in rows]
        rows += [pad(self._linear(path, errors, scales[path]), options) for path, errors in linears.items()]
        columns = [np.concatenate(tables) for tables in zip(*rows, strict=True)]
        group = np.repeat(np.arange(len(rows)), [*counts, *[1] * len(linears)])
        choice = solve(
            columns[0],
            columns[1],
            self._budget() + self._lowest(linears),
            group=group if self._at_least() else None,  # with `at_least` linear layers have no choice
            at_least=self._at_least(),
            allowed=columns[2],
        )
        if self._config.expert_parallel > 1 and not layers:  # there all ranks hold the same
            experts = sum(counts)
            left = (
                self._budget()
                + self._lowest(linears)
                - float(columns[1][np.arange(len(choice)), choice][experts:].sum())
            )
            choice[:experts] = self._by_rank([column[:experts] for column in columns], counts, left)
        widths = {kind: self._bits[choice[group == n]].tolist() for n, kind in enumerate(kinds)}
        if layers:
            widths = {kind: own * len(self._structure.kept_of(kind[0])) for kind, own in widths.items()}
        found = {}
        for path in results:
            gate_up, down = (self._spread(path, widths[path, role if roles else None]) for role in ROLES)
            found[path] = ExpertWidths(gate_up, down, *self._factors(path))
        chosen = {
            path: self._structure.choices[path][option]
            for path, option in zip(linears, choice[sum(counts) :], strict=True)
        }
        return Plan(found, self._structure.linears | chosen)

    def _by_rank(self, columns: list[np.ndarray], counts: list[int], budget: float) -> np.ndarray:
        """Options of all experts where every rank of expert parallelism has the same share of a budget.

        Args:
            columns: cost, price and what is allowed, [N, J].
            counts: experts of each module, or of each of its roles, in their order.
            budget: bits of all of them.
        """
        ranks = self._config.expert_parallel
        group = np.concatenate([np.arange(count) * ranks // count for count in counts])
        return solve(columns[0], columns[1], [budget / ranks] * ranks, group=group, allowed=columns[2])

    def _linear(self, path: str, errors: Mapping[int, float], scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Cost and price [1, J] of the widths of a linear layer."""
        widths = self._structure.choices[path]
        cost = [(errors[bits] * scale) ** self._config.gamma for bits in widths]
        price = np.asarray([widths], np.float64) * self._structure.linear_weights()[path]
        return np.asarray([cost]), price

    def _lowest(self, linears: Iterable[str]) -> int:
        """Bits of linear layers at their lowest widths, which the experts' budget leaves out."""
        weights = self._structure.linear_weights()
        return sum(weights[path] * self._structure.choices[path][0] for path in linears)

    def blocks(self, similarity: Mapping[str, float]) -> dict[str, ExpertWidths]:
        """One width per experts module by the block score, under one budget; see `layers_by_change`."""
        counts = {path: len(self._structure.kept_of(path)) for path in similarity}
        sizes = {path: self._structure.expert_weights(path) * count for path, count in counts.items()}
        widths = layers_by_change(similarity, sizes, self._config.expert_bits, self._budget())
        spread = {path: self._spread(path, [bits] * counts[path]) for path, bits in widths.items()}
        return {path: ExpertWidths(own, own, *self._factors(path)) for path, own in spread.items()}

    def _factors(self, path: str) -> tuple[tuple[int, ...], int]:
        """Ranks and width of the factors that experts have beside their matrices."""
        ranks = self._structure.ranks.get(path, ())
        return ranks, self._structure.rank_bits if ranks else 0

    def _spread(self, path: str, widths: Iterable[int]) -> tuple[int, ...]:
        """Widths of all experts of a module, 0 for dropped ones, from those of the kept ones."""
        found = dict(zip(self._structure.kept_of(path), widths, strict=True))
        return tuple(int(found.get(expert, 0)) for expert in range(self._structure.experts[path].num_experts))

    def _budget(self) -> int:
        """Bits of all experts together."""
        return sum(bits * self._structure.expert_weights(path) for path, bits in self._budgets.items())

    def _cost(self, path: str, result: LayerResult, scale: float = 1.0, role: str | None = None) -> np.ndarray:
        """Cost [kept, J] of every width for every kept expert of a module, or its matrices of a role.

        Errors are multiplied by `scale`.
        """
        config = self._config
        errors = result.errors if role is None else result.role_errors[role]
        routing = result.routing or RoutingStatistics.zeros(self._structure.experts[path].num_experts)
        nothing = [0.0] * len(routing.tokens)
        kept = list(self._structure.kept_of(path))
        # an expert without tokens is of little significance, not of none
        tokens, weight = (part.numpy() for part in routing.weighted(config.image_weight))
        statistics = ExpertStatistics(
            np.maximum(tokens, 1.0)[kept],
            np.where(tokens > 0, weight, weight.sum() / tokens.sum())[kept],
            np.asarray([errors.get(bits) or nothing for bits in config.expert_bits]).T[kept] * scale,
            np.asarray([result.hessian_errors.get(bits) or nothing for bits in config.expert_bits]).T[kept] * scale**2,
        )
        return SCORES[config.allocation](
            statistics,
            config.expert_bits,
            alpha=config.alpha,
            beta=config.beta,
            gamma=config.gamma,
            rng=self._random(path),
        )

    def _price(self, path: str, role: str | None = None) -> np.ndarray:
        """Bits [kept, J] of every width for every kept expert of a module, or its matrices of a role."""
        widths = self._bits.astype(np.float64)
        weights = self._structure.expert_weights(path, role)
        return np.tile(widths * weights, (len(self._structure.kept_of(path)), 1))

    def _at_least(self) -> dict[int, int] | None:
        return {self._config.expert_bits.index(bits): n for bits, n in self._config.at_least.items()} or None

    def _random(self, path: str) -> np.random.Generator:
        return np.random.default_rng([self._config.seed, self._index[path]])


def pad(table: tuple[np.ndarray, np.ndarray], options: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cost and price [N, J] with further columns that are not allowed, up to `options`, and what is allowed."""
    items, given = table[0].shape
    widths = ((0, 0), (0, options - given))
    return np.pad(table[0], widths), np.pad(table[1], widths), np.pad(np.ones((items, given), bool), widths)
