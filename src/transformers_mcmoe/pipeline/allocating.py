# SPDX-License-Identifier: Apache-2.0
"""From what was measured of the experts to a width for each of them, per layer or over the whole model.

Knows measurements, budgets and the solver; it does not know how anything was measured, nor weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

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
        errors: width -> eps of every expert.
        role_errors: role -> width -> eps of every expert when only its matrices of that role are rounded.
        hessian_errors: width -> sum of Tr(H) / tokens * |W' - W|^2 over the matrices of every expert.
        starved: experts that saw too few tokens to be measured on their own.
        divergence: KL divergence of the model's output, in nats per token, when all experts have the reference width.
    """

    routing: RoutingStatistics | None = None
    ratios: RoutingRatios | None = None
    errors: dict[int, list[float]] = field(default_factory=dict)
    role_errors: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    hessian_errors: dict[int, list[float]] = field(default_factory=dict)
    starved: list[int] = field(default_factory=list)
    divergence: float | None = None


@dataclass
class PartResult:
    """What was measured of an attention or MLP that has a choice of widths.

    Attributes:
        errors: width -> sum over its linear layers of the squared error of their outputs.
        divergence: KL divergence of the model's output, in nats per token, when it has its lowest width.
    """

    errors: dict[int, float] = field(default_factory=dict)
    divergence: float = 0.0


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
        if self._config.allocation == "uniform":
            count = self._structure.experts[path].num_experts
            choice = uniform(count, self._config.expert_bits, self._budgets[path], self._random(path))
        else:
            budget = self._budgets[path] * self._structure.expert_weights(path)
            choice = solve(self._cost(path, result), self._price(path), budget, at_least=self._at_least())
        return ExpertWidths.of(self._bits[choice])

    def model(
        self, results: Mapping[str, LayerResult], scales: Mapping[str, float], parts: Mapping[str, PartResult]
    ) -> Plan:
        """Widths of all experts modules, and of attentions and MLPs that have a choice, under one budget.

        Args:
            results: measurements by path.
            scales: by path, what the layer's errors are multiplied by, unless its effect on the model's output is known.
            parts: measurements of attentions and MLPs that have a choice, by path.
        """
        roles = self._config.granularity == "projection"
        # what shares a width: an expert, or its matrices of one role
        kinds = [(path, role) for path in results for role in (ROLES if roles else (None,))]
        options = max(len(self._bits), *map(len, self._structure.choices.values()), 0)
        rows = []
        for path, role in kinds:
            cost = self._cost(path, results[path], self._scale(results[path], scales[path]), role)
            rows.append(pad((cost, self._price(path, role)), options))
        counts = [len(own[0]) for own in rows]
        for path, part in parts.items():
            rows.append(pad(self._part(path, part), options))
        columns = [np.concatenate(tables) for tables in zip(*rows, strict=True)]
        group = np.repeat(np.arange(len(rows)), [*counts, *[1] * len(parts)])
        choice = solve(
            columns[0],
            columns[1],
            self._budget() + self._lowest(parts),
            group=group if self._at_least() else None,  # with `at_least` there are no parts
            at_least=self._at_least(),
            allowed=columns[2],
        )
        widths = {kind: self._bits[choice[group == n]].tolist() for n, kind in enumerate(kinds)}
        experts = {
            path: ExpertWidths(*(tuple(widths[path, role if roles else None]) for role in ROLES)) for path in results
        }
        linears = dict(self._structure.linears)
        for path, option in zip(parts, choice[sum(counts) :], strict=True):
            linears |= dict.fromkeys(self._structure.part(path), self._structure.choices[path][option])
        return Plan(experts, linears)

    def reference(self) -> int:
        """The width that experts have while a layer's sensitivity is measured: the one nearest to their average."""
        weights = sum(
            self._structure.expert_weights(path) * e.num_experts for path, e in self._structure.experts.items()
        )
        return min(self._config.expert_bits, key=lambda bits: abs(bits - self._budget() / weights))

    def _scale(self, result: LayerResult, scale: float) -> float:
        """What a layer's errors are multiplied by, so that those of different layers compare."""
        if result.divergence is not None:
            squared = sum(error**2 for error in result.errors[self.reference()])
            return (max(result.divergence, 1e-12) / max(squared, 1e-30)) ** 0.5
        return scale

    def _part(self, path: str, part: PartResult) -> tuple[np.ndarray, np.ndarray]:
        """Cost and price [1, J] of the widths of an attention or MLP."""
        widths = self._structure.choices[path]
        lowest = max(part.errors[widths[0]], 1e-30)
        cost = [max(part.divergence, 1e-12) * part.errors[bits] / lowest for bits in widths]
        weights = sum(self._structure.linear_weights()[linear] for linear in self._structure.part(path))
        return np.asarray([cost]), np.asarray([widths], np.float64) * weights

    def _lowest(self, parts: Mapping[str, PartResult]) -> int:
        """Bits of attentions and MLPs at their lowest widths, which the experts' budget leaves out."""
        weights = self._structure.linear_weights()
        return sum(
            weights[linear] * self._structure.choices[path][0]
            for path in parts
            for linear in self._structure.part(path)
        )

    def blocks(self, similarity: Mapping[str, float]) -> dict[str, ExpertWidths]:
        """One width per experts module by the block score, under one budget; see `layers_by_change`."""
        counts = {path: self._structure.experts[path].num_experts for path in similarity}
        sizes = {path: self._structure.expert_weights(path) * count for path, count in counts.items()}
        widths = layers_by_change(similarity, sizes, self._config.expert_bits, self._budget())
        return {path: ExpertWidths.of([bits] * counts[path]) for path, bits in widths.items()}

    def _budget(self) -> int:
        """Bits of all experts together."""
        return sum(bits * self._structure.expert_weights(path) for path, bits in self._budgets.items())

    def _cost(self, path: str, result: LayerResult, scale: float = 1.0, role: str | None = None) -> np.ndarray:
        """Cost [E, J] of every width for every expert of a module, or its matrices of a role; errors are multiplied by `scale`."""
        config = self._config
        errors = result.errors if role is None else result.role_errors[role]
        routing = result.routing or RoutingStatistics.zeros(self._structure.experts[path].num_experts)
        nothing = [0.0] * len(routing.tokens)
        # an expert without tokens is of little significance, not of none
        tokens, weight = routing.tokens.to(torch.float64).numpy(), routing.weight.numpy()
        statistics = ExpertStatistics(
            np.maximum(tokens, 1.0),
            np.where(tokens > 0, weight, weight.sum() / tokens.sum()),
            np.asarray([errors.get(bits) or nothing for bits in config.expert_bits]).T * scale,
            np.asarray([result.hessian_errors.get(bits) or nothing for bits in config.expert_bits]).T * scale**2,
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
        """Bits [E, J] of every width for every expert of a module, or its matrices of a role."""
        widths = self._bits.astype(np.float64)
        weights = self._structure.expert_weights(path, role)
        return np.tile(widths * weights, (self._structure.experts[path].num_experts, 1))

    def _at_least(self) -> dict[int, int] | None:
        return {self._config.expert_bits.index(bits): n for bits, n in self._config.at_least.items()} or None

    def _random(self, path: str) -> np.random.Generator:
        return np.random.default_rng([self._config.seed, self._index[path]])


def pad(table: tuple[np.ndarray, np.ndarray], options: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cost and price [N, J] with further columns that are not allowed, up to `options`, and what is allowed."""
    items, given = table[0].shape
    widths = ((0, 0), (0, options - given))
    return np.pad(table[0], widths), np.pad(table[1], widths), np.pad(np.ones((items, given), bool), widths)
