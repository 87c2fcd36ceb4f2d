# SPDX-License-Identifier: Apache-2.0
"""One exact program over what may become of every expert: a width per role, low-rank factors, both, or nothing at all.

Costs are errors as for widths, prices are bytes with scales and zeros. Knows measurements and sizes; which of two plans is
better in the end is measured elsewhere (`job`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformers_mcmoe.allocation import solve
from transformers_mcmoe.calibration.statistics import output_errors
from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.pipeline.allocating import pad
from transformers_mcmoe.pipeline.dropping import Dropper
from transformers_mcmoe.pipeline.kept import least_kept, most_rank
from transformers_mcmoe.pipeline.rounding import ExpertRounder
from transformers_mcmoe.pipeline.watching import Watcher
from transformers_mcmoe.plan import ROLES, ExpertWidths, Matrix, Plan
from transformers_mcmoe.quantization import dequantize, group_size_for, quantize
from transformers_mcmoe.structure import factorize, fit_left, root_of

# ranks of factors alone, as shares of the one that saves nothing
SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Option:
    """What becomes of an expert."""

    gate_up: int
    down: int
    rank: int = 0

    @property
    def drops(self) -> bool:
        """Whether nothing is left of it."""
        return not (self.gate_up or self.down or self.rank)


@dataclass(frozen=True)
class Measured:
    """Errors of widths.

    Attributes:
        errors: by experts path, role (None for all matrices together) and width, of every expert.
        linears: width -> error of linear layers that have a choice, by path.
        scales: what errors of a path are multiplied by.
    """

    errors: Mapping[str, Mapping[str | None, Mapping[int, list[float]]]]
    linears: Mapping[str, Mapping[int, float]]
    scales: Mapping[str, float]


class JointProgram:
    """Measures what widths alone do not tell, and chooses.

    Args:
        watcher: looks at the layers.
        config: of the compression.
        dropper: looks at blocks without some of their experts; its routers say how many a layer must keep.
    """

    def __init__(self, watcher: Watcher, config: MCMoEConfig, dropper: Dropper) -> None:
        self._watcher, self._config, self._dropper = watcher, config, dropper
        self._structure, self._runner = watcher.structure, watcher.runner
        self._drops = config.prune is not None and config.prune.auto
        self._ranks = config.rank is not None and config.rank.auto
        self._dropped: dict[str, list[float]] = {}  # by experts path, error of each expert's absence
        self._factored: dict[str, dict[Option, list[float]]] = {}  # by path and option, error of each expert

    def remember(self, path: str) -> dict[str, Any]:
        """What was measured of an experts module, in JSON form."""
        factored = self._factored.get(path, {})
        return {"dropped": self._dropped.get(path), "factored": [(astuple(o), own) for o, own in factored.items()]}

    def recall(self, path: str, known: Mapping[str, Any]) -> None:
        """Inverse of `remember`."""
        if known["dropped"] is not None:
            self._dropped[path] = known["dropped"]
        if known["factored"]:
            self._factored[path] = {Option(*option): own for option, own in known["factored"]}

    def measure(self, i: int, path: str) -> None:
        """Errors of an experts module, on the tokens that its widths were measured on."""
        if self._drops and self._dropper.routers[path].groups == 1:
            outputs = self._dropper.look(i, [path])[path]
            # errors of widths are sums over all tokens, these over those that were looked at
            known = self._runner.tokens
            tokens = known.numel(self._runner.sequences) - known.numel(self._runner.judged)
            more = (max(tokens, 1) / len(outputs.factor)) ** 0.5
            self._dropped[path] = [more * outputs.error((e,)) for e in range(outputs.num_experts)]
        if self._ranks:
            self._measure_factors(i, path)

    def _measure_factors(self, i: int, path: str) -> None:
        experts, config = self._structure.experts[path], self._config
        assert config.rank is not None
        options = list(self._rank_options(path))
        found: dict[int, list[float]] = {}  # by expert, error of each option
        mine = self._watcher.deal(path, range(experts.num_experts))
        for which, hessians, inputs in self._watcher.passes(i, path, mine, ROLES, held_out=True):
            assert hessians is not None
            totals = {role: hessian.total.clone() for role, hessian in hessians.roles.items()}
            rounder = ExpertRounder(experts, which, hessians.roles, config, refits=0, sweeps=0)
            bases = {bits: rounder.round(which, (bits, bits)) for bits in {o.gate_up for o in options} - {0}}
            for n, expert in enumerate(which):
                roots = {role: root_of(total[n]) for role, total in totals.items()} if config.rank.whitened else {}
                candidates = (self._stand_in(path, expert, option, bases, roots) for option in options)
                sample = inputs.sample(expert)
                found[expert] = output_errors(experts, expert, sample, candidates, config.relative_errors)
        found = self._runner.world.merge(found)
        self._factored[path] = {
            option: [found[expert][n] for expert in range(experts.num_experts)] for n, option in enumerate(options)
        }

    def _stand_in(
        self,
        path: str,
        expert: int,
        option: Option,
        bases: Mapping[int, Mapping[int, Mapping[str, Tensor]]],
        roots: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Matrices of an expert under an option, with factors rounded to nearest."""
        experts, found = self._structure.experts[path], {}
        assert self._config.rank is not None
        bits, most = self._config.rank.bits, self._config.group_size
        for p in experts.projections:
            dense = experts.matrix(expert, p.name).to(torch.float32)
            base = torch.zeros_like(dense)
            if option.gate_up:
                base = dequantize(bases[option.gate_up][expert][p.name], option.gate_up, p.in_features).to(dense)
            a, _ = factorize(dense - base, option.rank, root=roots.get(p.role))
            a = quantize(a, bits, group_size_for(p.in_features, most)).dequantize()
            b = fit_left(dense - base, a, roots.get(p.role))
            found[p.name] = base + quantize(b, bits, group_size_for(option.rank, most)).dequantize() @ a
        return found

    def _rank_options(self, path: str) -> Iterator[Option]:
        """Factors alone at several ranks, and thin ones beside low widths."""
        assert self._config.rank is not None
        step, experts = self._config.rank.step, self._structure.experts[path]
        most = most_rank(experts, False)
        ranks = dict.fromkeys(max(step, int(share * most) // step * step) for share in SHARES)
        yield from (Option(0, 0, rank) for rank in ranks if rank <= most)
        if step <= most_rank(experts, True):
            yield from (Option(bits, bits, step) for bits in self._config.expert_bits[:3])

    def costs(self, plan: Plan, measured: Measured) -> tuple[float, float]:
        """What a plan costs by what was measured: all of it, and its dropped experts alone."""
        total = dropped = 0.0
        for path, widths in plan.experts.items():
            for expert, pair in enumerate(zip(widths.gate_up, widths.down, strict=True)):
                option = Option(*pair, widths.rank_of(expert))
                error = self._error(path, option, measured.errors[path], expert) * measured.scales[path]
                total += error**self._config.gamma
                dropped += error**self._config.gamma if option.drops else 0.0
        for path, errors in measured.linears.items():
            total += (errors[plan.linears[path]] * measured.scales[path]) ** self._config.gamma
        return total, dropped

    def plan(self, widths: Plan, measured: Measured, absence: float = 1.0) -> Plan | None:
        """The best plan of as many bytes as a plan of widths alone; None if that is the best.

        Args:
            widths: the plan of widths.
            measured: errors of widths.
            absence: what the cost of dropping an expert is multiplied by.
        """
        errors, linears, scales = measured.errors, measured.linears, measured.scales
        structure, gamma = self._structure, self._config.gamma
        options = {path: list(self._options(path)) for path in structure.experts}
        most = max(
            [*map(len, options.values()), *(len(structure.choices[path]) for path in linears)],
        )
        rows = [pad(self._table(path, options[path], errors[path], scales[path], absence), most) for path in options]
        counts = [len(row[0]) for row in rows]
        for path, row in zip(options, rows, strict=True):
            self._forbid(path, options[path], row[2])
        for path, of_widths in linears.items():
            own = structure.choices[path]
            cost = np.asarray([[(of_widths[bits] * scales[path]) ** gamma for bits in own]])
            price = np.asarray([[float(self._linear_bytes(path, bits)) for bits in own]])
            rows.append(pad((cost, price), most))
        cost, price, allowed = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        fixed = [path for path in widths.linears if path not in linears]
        budget = sum(m.packed_bytes(self._config.group_size) for m in structure.matrices(widths))
        budget -= sum(self._linear_bytes(path, widths.linears[path]) for path in fixed)
        choice = solve(cost, price, budget, allowed=allowed)
        return self._plan(choice, counts, options, list(linears), widths)

    def _plan(
        self,
        choice: np.ndarray,
        counts: list[int],
        options: Mapping[str, list[Option]],
        linears: list[str],
        widths: Plan,
    ) -> Plan | None:
        starts = np.cumsum([0, *counts])
        experts: dict[str, ExpertWidths] = {}
        changed = False
        for n, (path, own) in enumerate(options.items()):
            chosen = [own[index] for index in choice[starts[n] : starts[n + 1]]]
            changed = changed or any(option.drops or option.rank for option in chosen)
            ranks = tuple(option.rank for option in chosen)
            bits = self._config.rank.bits if self._config.rank is not None and any(ranks) else 0
            experts[path] = ExpertWidths(
                tuple(option.gate_up for option in chosen),
                tuple(option.down for option in chosen),
                ranks if any(ranks) else (),
                bits,
            )
        if not changed:
            return None
        own_linears = {
            path: self._structure.choices[path][option]
            for path, option in zip(linears, choice[starts[-1] :], strict=True)
        }
        return Plan(experts, {**widths.linears, **own_linears})

    def _options(self, path: str) -> Iterator[Option]:
        bits = self._config.expert_bits
        if self._config.granularity == "projection":
            yield from (Option(*pair) for pair in itertools.product(bits, bits))
        else:
            yield from (Option(width, width) for width in bits)
        if path in self._dropped:
            yield Option(0, 0)
        yield from self._factored.get(path, ())

    def _table(
        self,
        path: str,
        options: list[Option],
        errors: Mapping[str | None, Mapping[int, list[float]]],
        scale: float,
        absence: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cost and price [E, J] of the options of a module's experts."""
        count = self._structure.experts[path].num_experts
        cost, price = np.empty((count, len(options))), np.empty((count, len(options)))
        for j, option in enumerate(options):
            price[:, j] = self._bytes(path, option)
            for expert in range(count):
                cost[expert, j] = (self._error(path, option, errors, expert) * scale) ** self._config.gamma
            if option.drops:
                cost[:, j] *= absence
        return cost, price

    def _error(
        self, path: str, option: Option, errors: Mapping[str | None, Mapping[int, list[float]]], expert: int
    ) -> float:
        if option.drops:
            return self._dropped[path][
                expert
            ]  # with the others as they are: what a layer loses together is tried in the end
        if option.rank:
            return self._factored[path][option][expert]
        if self._config.granularity == "projection":
            parts = zip(ROLES, (option.gate_up, option.down), strict=True)
            return math.hypot(*(errors[role][bits][expert] for role, bits in parts))
        return errors[None][option.gate_up][expert]

    def _forbid(self, path: str, options: list[Option], allowed: np.ndarray) -> None:
        """A layer may drop those experts that matter least, and keeps as many as a token is sent to."""
        if path not in self._dropped:
            return
        errors = self._dropped[path]
        order = sorted(range(len(errors)), key=errors.__getitem__)
        spared = order[len(errors) - least_kept(self._structure, self._dropper.routers[path], len(errors)) :]
        allowed[np.ix_(spared, [j for j, option in enumerate(options) if option.drops])] = False

    def _bytes(self, path: str, option: Option) -> int:
        rank_bits = self._config.rank.bits if self._config.rank is not None else 0
        return sum(
            Matrix(
                p.name,
                p.out_features,
                p.in_features,
                option.down if p.role == "down" else option.gate_up,
                option.rank,
                rank_bits if option.rank else 0,
            ).packed_bytes(self._config.group_size)
            for p in self._structure.experts[path].projections
        )

    def _linear_bytes(self, path: str, bits: int) -> int:
        module = self._structure.model.get_submodule(path)
        return Matrix(path, module.out_features, module.in_features, bits).packed_bytes(self._config.group_size)
