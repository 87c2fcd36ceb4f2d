# SPDX-License-Identifier: Apache-2.0
"""Rounds the matrices of the decoder layer that is in memory: to nearest, or by GPTQ on the layer's Hessians.

Knows layers, Hessians and widths; it does not know how widths are chosen, nor names and files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.calibration.hessians import (
    ExpertHessians,
    Hessian,
    observe_linears,
    probe_inputs,
)
from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.memory import return_free_memory
from transformers_mcmoe.models.experts import Experts
from transformers_mcmoe.models.stream import LayerRunner
from transformers_mcmoe.plan import ROLES
from transformers_mcmoe.quantization import Factor, Grid, Quantized, gptq, group_size_for, pack, quantize
from transformers_mcmoe.quantization.gptq import REFITS
from transformers_mcmoe.quantization.grid import CHUNK

# rows that are rounded together: enough to hide the cost of a step per column
ROWS = 1 << 13
# the papers' rounding for errors: the whole range, zeros rounded to a code
PLAIN = Grid(fit="minmax", integer_zeros=True)

# projection -> packed matrix of one expert
Packed = dict[str, Tensor]
# widths of an expert's projections by role
Widths = tuple[int, int]


class ExpertRounder:
    """Rounds some experts of one module.

    Args:
        experts: the module's adapter, with dense weights.
        which: the experts.
        hessians: theirs by role, which are used up; {} rounds to nearest.
        config: group size, grids, damping.
        grid: how grids are chosen; default the config's.
        refits: of grids to codes.
        sweeps: of coordinate descent; default the config's.
    """

    def __init__(
        self,
        experts: Experts,
        which: Sequence[int],
        hessians: Mapping[str, Hessian],
        config: MCMoEConfig,
        grid: Grid | None = None,
        refits: int = REFITS,
        sweeps: int | None = None,
    ) -> None:
        self._experts, self._which, self._config = experts, list(which), config
        self._grid, self._refits = grid or grid_of(config), refits
        self._sweeps = config.sweeps if sweeps is None else sweeps
        self._factors: dict[str, Factor] = {}
        for role, hessian in hessians.items():
            self._factors[role] = _factor(hessian.total, config, f"{experts.path} ({role})")

    def round(self, which: Sequence[int], widths: Widths) -> dict[int, Packed]:
        """Packed matrices of some of the experts at one pair of widths (gate_up, down)."""
        packed: dict[int, Packed] = {expert: {} for expert in which}
        for role, bits in zip(ROLES, widths, strict=True):
            for expert, matrices in self.round_role(role, which, bits).items():
                packed[expert] |= matrices
        return packed

    def round_role(
        self, role: str, which: Sequence[int], bits: int, targets: Mapping[int, Tensor] | None = None
    ) -> dict[int, Packed]:
        """Packed matrices of one role of some of the experts; `targets` [rows, in] are rounded in place of their own."""
        packed: dict[int, Packed] = {expert: {} for expert in which}
        names = [p for p in self._experts.projections if p.role == role]
        rows = sum(p.out_features for p in names)
        # nearest rounding works row by row, GPTQ column by column: many small, or few large steps
        together = max(1, ROWS // rows if self._factors else CHUNK // (rows * names[0].in_features))
        for start in range(0, len(which), together):
            part = list(which[start : start + together])
            weight = torch.stack(
                [
                    torch.cat([self._experts.matrix(expert, p.name) for p in names])
                    if targets is None
                    else targets[expert]
                    for expert in part
                ]
            )
            matrices = pack(self._quantize(weight, role, part, bits)).cpu().unflatten(0, (len(part), rows))
            for expert, matrix in zip(part, matrices, strict=True):
                for p, own in zip(names, matrix.split([p.out_features for p in names]), strict=True):
                    packed[expert][p.name] = own.clone()
            return_free_memory()
        return packed

    def _quantize(self, weight: Tensor, role: str, part: list[int], bits: int) -> Quantized:
        if role in self._factors:
            factor = self._factors[role].take([self._which.index(expert) for expert in part])
            return gptq(weight, factor, bits, self._grid, self._refits, self._sweeps)
        size = group_size_for(weight.shape[-1], self._config.group_size)
        return quantize(weight.flatten(0, 1), bits, size, self._grid)


def grid_of(config: MCMoEConfig) -> Grid:
    """The grid options of a config."""
    return Grid(config.fit, config.symmetric, config.integer_zeros)


def _factor(hessian: Tensor, config: MCMoEConfig, name: str) -> Factor:
    size = group_size_for(hessian.shape[-1], config.group_size)
    return Factor.of(hessian, size, damping=config.damping, act_order=config.act_order, name=name)


def chunks(experts: Experts, which: Sequence[int], limit: int) -> list[list[int]]:
    """Some experts of a module in runs whose Hessians fit into `limit` bytes, one at least."""
    size = max(1, limit // ExpertHessians.bytes_per_expert(experts))
    return [list(which[start : start + size]) for start in range(0, len(which), size)]


def round_linears(
    runner: LayerRunner,
    i: int,
    widths: Mapping[str, int],
    experts: Sequence[Experts],
    config: MCMoEConfig,
    limit: int,
    unreached: Callable[[str], None],
    quick: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Packed matrices of the linear layers of decoder layer i, by path.

    Args:
        runner: holds the layer.
        i: which.
        widths: path -> the width it is rounded to.
        experts: the layer's experts; they are idle while Hessians are counted, unless a linear layer reads them.
        config: how to round.
        limit: bytes that Hessians may take at once, one at least.
        unreached: called with the path of a layer that no token reached; it is rounded to nearest.
        quick: without refitting grids and descent.
    """
    modules: dict[str, Any] = {path: runner.weights.model.get_submodule(path) for path in widths}
    groups: dict[str, list[str]] = {}
    if config.rounding == "gptq" and modules:
        groups, busy = probe_inputs(modules, experts, lambda: runner.replay(i, 1))
        for leaders in _runs(groups, modules, limit):
            hessians = _count(runner, i, {path: modules[path] for path in leaders}, [] if busy else experts)
            for leader in leaders:
                factor = _factor(hessians.pop(leader).total, config, leader)
                for path in groups[leader]:
                    weight = modules[path].weight.data[None]
                    rounds = (0, 0) if quick else (REFITS, config.sweeps)
                    yield path, pack(gptq(weight, factor, widths[path], grid_of(config), *rounds)).cpu()
                del factor
                return_free_memory()
    reached = {path for paths in groups.values() for path in paths}
    for path in (path for path in widths if path not in reached):
        if config.rounding == "gptq":
            unreached(path)
        weight = modules[path].weight.data
        size = group_size_for(weight.shape[1], config.group_size)
        yield path, pack(quantize(weight, widths[path], size, grid_of(config))).cpu()


def _count(
    runner: LayerRunner, i: int, modules: Mapping[str, nn.Module], idle: Iterable[Experts]
) -> dict[str, Hessian]:
    """Hessians of linear layers, by path, in one pass over all tokens."""
    hessians = {
        path: Hessian.zeros(1, module.weight.shape[1], module.weight.device)  # type: ignore[union-attr,index,arg-type]
        for path, module in modules.items()
    }
    with ExitStack() as stack:
        for module in idle:
            stack.enter_context(module.idle())
        stack.enter_context(observe_linears(modules, hessians))
        runner.replay(i)
    return hessians


def _runs(groups: Mapping[str, list[str]], modules: Mapping[str, Any], limit: int) -> list[list[str]]:
    """The leaders in runs whose Hessians fit into `limit` bytes."""
    runs: list[list[str]] = []
    left = 0
    for leader in groups:
        size = 4 * modules[leader].weight.shape[1] ** 2
        if not runs or size > left:
            runs.append([])
            left = limit
        runs[-1].append(leader)
        left -= size
    return runs
