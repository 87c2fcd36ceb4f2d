# SPDX-License-Identifier: Apache-2.0
"""Rounds the matrices of the decoder layer that is in memory: to nearest, or by GPTQ on the layer's Hessians.

Knows layers, Hessians and widths; it does not know how widths are chosen, nor names and files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.calibration.hessians import (
    PROBED,
    ExpertHessians,
    Hessian,
    observe_linears,
    probe_inputs,
)
from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.memory import return_free_memory
from transformers_mcmoe.models.experts import Experts, Projection
from transformers_mcmoe.models.stream import LayerRunner
from transformers_mcmoe.plan import FACTORS, ROLES
from transformers_mcmoe.quantization import (
    Factor,
    Grid,
    dequantize,
    gptq,
    group_size_for,
    pack,
    quantize,
)
from transformers_mcmoe.quantization.gptq import AT_ONCE, REFITS
from transformers_mcmoe.quantization.k_quants import BLOCK, BYTES, GROUP, quantize_blocks, unpack_blocks
from transformers_mcmoe.structure.low_rank import factorize, fit_left, root_of
from transformers_mcmoe.threads import each

# rows that a GPU rounds together: enough to hide the cost of a step per column
ROWS = 1 << 13
# weights, and rows of one matrix, that a core rounds together: steps that stay in its cache and yet outweigh their calls
TOGETHER, LEAST_ROWS = 1 << 22, 1 << 9
# the papers' rounding for errors: the whole range, zeros rounded to a code
PLAIN = Grid(fit="minmax", integer_zeros=True)

# projection -> packed matrix of one expert; "projection.low_rank_a" and ".low_rank_b" -> those of its factors
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
        factors: keep the Hessians, which low-rank factors need.
        bits: the only width of the matrices, where it decides their groups (`in_blocks`).
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
        factors: bool = False,
        bits: int = 0,
    ) -> None:
        self._experts, self._which, self._config = experts, list(which), config
        self._grid, self._refits = grid or grid_of(config), refits
        self._sweeps = config.sweeps if sweeps is None else sweeps
        self._factors: dict[str, Factor] = {}
        self._totals = {role: hessian.total.clone() for role, hessian in hessians.items()} if factors else {}
        for role, hessian in hessians.items():
            self._factors[role] = _factor(hessian.total, config, f"{experts.path} ({role})", bits)

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
        names = [p for p in self._experts.projections if p.role == role]
        sizes = [p.out_features for p in names]

        def rounded(part: tuple[list[int], range]) -> Tensor:
            experts, rows = part
            weight = torch.stack(
                [
                    self._rows(names, n, rows) if targets is None else targets[n][rows.start : rows.stop]
                    for n in experts
                ]
            )
            return self._packed(weight, role, experts, bits).cpu().unflatten(0, (len(experts), len(rows)))

        cut = Cut.of(sum(sizes), names[0].in_features, self._experts.matrix(0, names[0].name).device)
        parts = cut.parts(which)
        found: dict[int, list[Tensor]] = {expert: [] for expert in which}
        for (experts, _), matrices in zip(parts, each(rounded, parts, cut.most), strict=True):
            for expert, matrix in zip(experts, matrices, strict=True):
                found[expert].append(matrix)
        packed: dict[int, Packed] = {}
        for expert in which:
            # whole rows, so that no part of them keeps the others' memory
            pieces = found.pop(expert)
            own = (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).split(sizes)
            packed[expert] = {p.name: matrix.clone() for p, matrix in zip(names, own, strict=True)}
        return_free_memory()
        return packed

    def _rows(self, names: Sequence[Projection], expert: int, rows: range) -> Tensor:
        """Some rows [n, in] of an expert's projections, one below the other."""
        parts, start = [], 0
        for p in names:
            own = slice(max(rows.start - start, 0), max(min(rows.stop - start, p.out_features), 0))
            parts.append(self._experts.matrix(expert, p.name)[own])
            start += p.out_features
        return torch.cat(parts)

    def factor_role(
        self,
        role: str,
        ranks: Mapping[int, int],
        bits: int,
        packed: Mapping[int, Packed],
        widths: Mapping[int, int],
        targets: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Add the factors of one role's matrices to experts' packed ones.

        They stand for the matrices, or for what rounding left of them.

        Args:
            role: which.
            ranks: by expert.
            bits: width of the factors.
            packed: by expert, with the role's matrices where there are some; changed.
            widths: of those, by expert, 0 for none.
            targets: as in `round_role`.
        """  # fmt: skip
        names = [p for p in self._experts.projections if p.role == role]
        for expert, rank in ranks.items():
            n = self._which.index(expert)
            wanted = [self._experts.matrix(expert, p.name) for p in names] if targets is None else [targets[expert]]
            whitened = role in self._totals and (self._config.rank is None or self._config.rank.whitened)
            root = root_of(self._totals[role][n]) if whitened else None
            for p, matrix in zip(names, wanted, strict=True):
                rest = matrix.to(torch.float32)
                if p.name in packed[expert]:
                    rest = rest - dequantize(packed[expert][p.name], widths[expert], p.in_features).to(rest)
                for name, factor in zip(FACTORS, self._factored(rest, rank, bits, role, n, root), strict=True):
                    packed[expert][f"{p.name}.{name}"] = factor.cpu()
        return_free_memory()

    def _factored(
        self, weight: Tensor, rank: int, bits: int, role: str, n: int, root: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Packed a [r, in] and b [out, r]; b is fitted to a as it was rounded, and rounded behind it."""
        config = self._config
        total = self._totals[role][n] if role in self._totals else None
        a, _ = factorize(weight, rank, root=root)
        size = group_size_for(weight.shape[1], config.group_size)
        inner = group_size_for(rank, config.group_size)
        if total is None:
            first = quantize(a, bits, size, self._grid)
            b = fit_left(weight, first.dequantize())
            return pack(first), pack(quantize(b, bits, inner, self._grid))
        first = gptq(a[None], self._factors[role].take([n]), bits, self._grid, self._refits, self._sweeps)
        rounded = first.dequantize()
        behind = (rounded @ total @ rounded.T)[None]
        factor = Factor.of(behind, inner, damping=config.damping, act_order=config.act_order, name="a low-rank factor")
        b = fit_left(weight, rounded, root)
        return pack(first), pack(gptq(b[None], factor, bits, self._grid, self._refits, self._sweeps))

    def _packed(self, weight: Tensor, role: str, part: list[int], bits: int) -> Tensor:
        """The bytes of matrices [B, out, in], [B * out, ..]."""
        if role in self._factors:
            factor = self._factors[role].take([self._which.index(expert) for expert in part])
            if in_blocks(self._config, weight.shape[-1], bits):
                return quantize_blocks(weight, factor, bits, self._refits, self._sweeps)
            return pack(gptq(weight, factor, bits, self._grid, self._refits, self._sweeps))
        size = group_size_for(weight.shape[-1], self._config.group_size)
        return pack(quantize(weight.flatten(0, 1), bits, size, self._grid))


def in_blocks(config: MCMoEConfig, in_features: int, bits: int) -> bool:
    """Whether matrices are quantized on the grids of llama.cpp's blocks (`quantization.k_quants`)."""
    return config.blocks and bits in BYTES and in_features % BLOCK == 0


def dense_of(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The matrix [out, in] float32 that packed bytes stand for; rows of blocks have two dimensions."""
    return unpack_blocks(packed, bits) if packed.dim() == 2 else dequantize(packed, bits, in_features)


def rebuilt(packed: Mapping[str, Tensor], projection: Projection, bits: int, rank_bits: int) -> Tensor:
    """The matrix [out, in] float32 that one expert's packed one and its factors stand for."""
    name, columns = projection.name, projection.in_features
    dense = dense_of(packed[name], bits, columns) if name in packed else None
    if f"{name}.{FACTORS[0]}" in packed:
        a = dequantize(packed[f"{name}.{FACTORS[0]}"], rank_bits, columns)
        product = dequantize(packed[f"{name}.{FACTORS[1]}"], rank_bits, len(a)) @ a
        dense = product if dense is None else dense + product
    assert dense is not None
    return dense


def grid_of(config: MCMoEConfig) -> Grid:
    """The grid options of a config."""
    return Grid(config.fit, config.symmetric, config.integer_zeros)


def _factor(hessian: Tensor, config: MCMoEConfig, name: str, bits: int = 0) -> Factor:
    columns = hessian.shape[-1]
    size = GROUP if in_blocks(config, columns, bits) else group_size_for(columns, config.group_size)
    return Factor.of(hessian, size, damping=config.damping, act_order=config.act_order, name=name)


@dataclass(frozen=True)
class Cut:
    """How matrices of experts are cut into parts that are rounded together: several matrices, or some rows of one.

    Attributes:
        rows: of a matrix.
        together: matrices of a part.
        step: rows of a part, those of the last may be fewer.
        most: parts that may be at work at once.
    """

    rows: int
    together: int
    step: int
    most: int

    @classmethod
    def of(cls, rows: int, columns: int, device: torch.device) -> Cut:
        if device.type != "cpu":
            return cls(rows, max(1, ROWS // rows), rows, 1)
        count = -(-rows // max(LEAST_ROWS, TOGETHER // columns))  # parts of a matrix, as even as can be
        step = -(-rows // count)
        together = max(1, TOGETHER // (rows * columns))
        return cls(rows, together, step, max(1, AT_ONCE // (together * step * columns)))

    def parts(self, which: Sequence[int]) -> list[tuple[list[int], range]]:
        """Some experts' parts, in their order: which, and their rows."""
        runs = [list(which[start : start + self.together]) for start in range(0, len(which), self.together)]
        starts = range(0, self.rows, self.step)
        return [(run, range(start, min(start + self.step, self.rows))) for run in runs for start in starts]


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
        groups, busy = probe_inputs(modules, experts, lambda: runner.replay(i, PROBED))
        for leaders in _runs(groups, modules, limit):
            costs = [float(sum(modules[path].weight.numel() for path in groups[leader])) for leader in leaders]
            mine = runner.world.deal(
                leaders, [c * modules[n].weight.shape[1] for c, n in zip(costs, leaders, strict=True)]
            )
            packed: dict[str, Tensor] = {}
            hessians = _count(runner, i, {path: modules[path] for path in mine}, [] if busy else experts)
            for leader in mine:
                factor = _factor(hessians.pop(leader).total, config, leader)
                for path in groups[leader]:
                    weight = modules[path].weight.data[None]
                    rounds = (0, 0) if quick else (REFITS, config.sweeps)
                    packed[path] = pack(gptq(weight, factor, widths[path], grid_of(config), *rounds)).cpu()
                del factor
                return_free_memory()
            packed = runner.world.union(packed)
            yield from ((path, packed[path]) for leader in leaders for path in groups[leader])
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
    if not modules:
        return {}
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
