# SPDX-License-Identifier: Apache-2.0
"""What a compression will give and take, before it starts: bits per layer, sizes, memory, disk, and a guess of the time.

Knows the model's structure and the config; it reads no weights and no data. Times come from rounding random matrices of
the model's shapes on this machine for some seconds.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from transformers_mcmoe.allocation import uniform
from transformers_mcmoe.calibration.hessians import ExpertHessians
from transformers_mcmoe.calibration.statistics import SAMPLE
from transformers_mcmoe.config import MCMoEConfig, PruneConfig
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline import measuring
from transformers_mcmoe.pipeline.allocating import MEASURED
from transformers_mcmoe.pipeline.kept import kept_counts, looks, loss_sequences, planned_ranks
from transformers_mcmoe.pipeline.prepare import (
    OVERHEAD,
    budgets_of,
    hessian_memory,
    memory_parts,
    packed_disk,
    rank_disk,
    sized,
    tuning_memory,
)
from transformers_mcmoe.pipeline.rounding import Cut, grid_of
from transformers_mcmoe.plan import ExpertWidths, Plan, average_bits, bits_per_weight
from transformers_mcmoe.quantization import Factor, dequantize, gptq, group_size_for, pack, quantize
from transformers_mcmoe.quantization.gptq import factorized_at_once
from transformers_mcmoe.routing.prunable import TOP_K
from transformers_mcmoe.structure import search_is_exhaustive
from transformers_mcmoe.structure.outputs import PRODUCTS
from transformers_mcmoe.threads import each, workers
from transformers_mcmoe.tuning import sequences_for, sequences_per_step

# options with factors that are measured of every expert
_OPTIONS = 6
# a factorization costs the cube of its size; larger ones are reckoned from this one
_LARGEST = 2048
# rows of a matrix that are rounded to time it; the rest costs in proportion
_PROBE_ROWS = 2048


@dataclass(frozen=True)
class Preview:
    """What a compression will give and take; sizes in bytes.

    Attributes:
        layers: average bits of each experts module's experts, by path; with one budget for the model, of all of them alike,
            because measuring decides which layers get more.
        decided: whether `layers` is final (a budget per layer, or a given plan).
        average_bits: over all quantized weights.
        bits_per_weight: the same with scales and zeros.
        experts: how many experts there are in all.
        dropped: how many of them are dropped.
        quantized_weights: weights that are quantized.
        total_bytes: of the packed model.
        dense_bytes: of the dense one, quantized matrices at 16 bits.
        memory_bytes: bound on the memory that compressing takes beside the libraries.
        disk_bytes: most that the work folder takes, beside the output.
        network_bytes: what each process gets from the others.
        seconds: estimate per stage on this machine, "structure", "allocate", "quantize"; with several processes, on as many machines
            like this one.
    """

    layers: dict[str, float]
    decided: bool
    average_bits: float
    bits_per_weight: float
    experts: int
    dropped: int
    quantized_weights: int
    total_bytes: int
    dense_bytes: int
    memory_bytes: int
    disk_bytes: int
    network_bytes: int
    seconds: dict[str, float]


def preview(model: Any, config: MCMoEConfig, *, dtype: torch.dtype, world_size: int = 1) -> Preview:
    """Look ahead at a compression.

    Args:
        model: the dense model, on meta.
        config: what is to be done.
        dtype: floating dtype that layers will be run in.
        world_size: processes that share the work.

    Raises:
        ValueError, NotImplementedError: what `compress` would raise for this model and config.
    """
    structure = Structure(
        copy.deepcopy(model), config.attention_bits, config.shared_expert_bits, config.modules_to_not_convert
    )
    config = sized(structure, config, dtype)
    budgets = budgets_of(structure, config)
    kept = kept_counts(structure, config)
    hessian_memory(structure, config, dtype)  # refuses a max_memory that is too small
    ranks = planned_ranks(structure, config, kept)
    plan = config.plan or Plan(
        {
            path: _even(kept[path], structure.experts[path].num_experts, config, budget, ranks.get(path, ()))
            for path, budget in budgets.items()
        },
        structure.linears,
    )
    matrices = structure.matrices(plan if plan.linears else Plan(plan.experts, structure.linears))
    weights = sum(matrix.weights for matrix in matrices)
    packed = sum(matrix.packed_bytes(config.group_size) for matrix in matrices)
    parameters, _ = structure.parameters()
    _, held, rest = memory_parts(structure, dtype, config)
    tokens = config.num_samples * config.seq_len
    clock = _Clock(structure, config, dtype, world_size)
    return Preview(
        layers=per_layer(structure, plan),
        decided=config.plan is not None
        or config.only_factors
        or config.budget == "layer"
        or config.allocation == "uniform",
        average_bits=average_bits(matrices),
        bits_per_weight=bits_per_weight(matrices, config.group_size),
        experts=sum(experts.num_experts for experts in structure.experts.values()),
        dropped=sum(len(widths.gate_up) - len(widths.kept) for widths in plan.experts.values()),
        quantized_weights=weights,
        total_bytes=packed + dtype.itemsize * (parameters - weights),
        dense_bytes=2 * weights + dtype.itemsize * (parameters - weights),
        memory_bytes=max(held + rest + OVERHEAD, tuning_memory(structure, config, dtype)),
        disk_bytes=packed_disk(structure, config) + world_size * rank_disk(structure, config, tokens, dtype),
        network_bytes=clock.network(packed, tokens),
        seconds=clock.seconds(),
    )


def per_layer(structure: Structure, plan: Plan) -> dict[str, float]:
    """Average bits of each experts module's weights, by path."""
    matrices = structure.matrices(Plan(plan.experts))
    return {path: average_bits([m for m in matrices if m.name.startswith(f"{path}.")]) for path in plan.experts}


def _even(kept: int, count: int, config: MCMoEConfig, budget: int, ranks: tuple[int, ...]) -> ExpertWidths:
    """Widths of a layer's experts that spend its budget; which expert has which does not change what they cost."""
    if config.only_factors:
        widths = (0,) * count
    else:
        choice = uniform(kept, config.expert_bits, budget, np.random.default_rng(config.seed))
        widths = (*(config.expert_bits[index] for index in choice), *[0] * (count - kept))
    return ExpertWidths(widths, widths, ranks, config.factors.bits if config.factors is not None else 0)


class _Clock:
    """Reckons the time of the stages from a few timings.

    Of several processes each has the experts that are dealt to it, and a share of the sequences that run through a finished
    layer; attention in front of the experts is run by all of them on all tokens.
    """

    def __init__(self, structure: Structure, config: MCMoEConfig, dtype: torch.dtype, world_size: int = 1) -> None:
        self._structure, self._config, self._dtype, self._size = structure, config, dtype, world_size
        self._device = config.device or torch.device("cpu")
        self._tokens = config.num_samples * config.seq_len
        # of the tokens that errors are measured on, where that is a pass of its own
        chosen = config.plan is None and not config.only_factors
        self._apart = chosen and config.budget == "model" and config.allocation != "uniform"
        share = measuring.measured_sequences(config.num_samples, config.seq_len) / config.num_samples
        self._share = share if self._apart else 1.0
        self._limit = hessian_memory(structure, config, dtype)
        self._known: dict[Any, float] = {}
        text = structure.model.config.get_text_config()
        found = (getattr(text, name, None) for name in TOP_K)
        self._top_k = next((k for k in found if isinstance(k, int)), 2)
        self._rate, self._single = self._flops(dtype), self._flops(torch.float32)

    def _flops(self, dtype: torch.dtype) -> float:
        """Operations per second of a matrix product."""
        size = 1024
        x = torch.randn(size, size, device=self._device).to(dtype)
        return 2 * size**3 / self._time(lambda: x @ x.T)

    def network(self, packed: int, tokens: int) -> int:
        """Bytes that a process gets: packed matrices of the others, and hidden states of their sequences behind every layer."""
        hidden = next(iter(self._structure.experts.values())).projections[0].in_features
        states = (
            tokens * (1 + self._share * self._apart) * hidden * self._dtype.itemsize * len(self._structure.experts)
        )
        return round((packed + states) * (self._size - 1) / self._size)

    def _mine(self, count: int) -> int:
        """Most experts, sequences or layers of so many that one process has."""
        return -(-count // self._size)

    @property
    def _part(self) -> float:
        """Share of the sequences that one process runs through a finished layer."""
        return self._mine(self._config.num_samples) / self._config.num_samples

    def seconds(self) -> dict[str, float]:
        """By stage."""
        config = self._config
        measured = config.plan is None and not config.only_factors and config.allocation in MEASURED
        errors = self._measuring() if measured else 0.0
        found = {}
        if looks(config) and not config.joint and config.plan is None:
            found["structure"] = self._dropping(config.drops or PruneConfig(method="reap"))
        if config.tuning_steps:
            taught = sequences_for(config.tuning_steps, config.seq_len) / config.num_samples
            found["teach"] = self._forward() * min(1.0, taught) * self._part
        if self._apart:
            found["allocate"] = errors + self._forward() * self._share * self._part
        rounding = sum(self._rounding(path, 1, config.sweeps) for path in self._structure.experts) + self._linears()
        counting = self._counting() if config.rounding == "gptq" else 0.0
        if config.rounding == "gptq" and config.sequential:
            counting += 2 * self._forward() * self._part  # gate and up twice, down once, attention
        found["quantize"] = rounding + counting + self._forward() * self._part + (0.0 if self._apart else errors)
        if config.factored:
            found["quantize"] += self._factorizing()
        if config.joint and config.plan is None:
            looked = (
                0.0 if config.prune is None else self._dropping(PruneConfig(method="reap", tokens=config.prune.tokens))
            )
            found["allocate"] += looked + (0.0 if config.rank is None else errors + _OPTIONS * self._factorizing())
            found["quantize the joint plan"] = found["quantize"]
        if config.tuning_steps:
            found["tune"] = self._tuning()
        return found

    def _factorizing(self) -> float:
        """Eigenvectors of every expert's matrices, once."""
        seconds = 0.0
        for path, experts in self._structure.experts.items():
            for p in experts.projections:
                size = min(p.out_features, p.in_features)
                probe = min(size, _LARGEST // 4)
                matrix = torch.randn(probe, probe, dtype=torch.float64, device=self._device)
                each = self._once(("eigenvectors", probe), lambda m=matrix: torch.linalg.eigh(m @ m.T))  # type: ignore[misc]
                seconds += self._mine(len(self._structure.kept_of(path))) * each * (size / probe) ** 3
        return seconds

    def _dropping(self, prune: PruneConfig) -> float:
        """Every expert on the recorded tokens, evaluations of sets, and passes through the layers."""
        tokens = min(prune.tokens, self._tokens)
        passes = 3.0 if prune.even else 3 + sum(prune.candidates**n for n in range(1, prune.field + 1)) / prune.field
        if prune.importance == "loss":  # every expert's absence runs through the later layers
            shares = loss_sequences(self._config.seq_len) * self._config.seq_len / tokens
            passes += shares * sum(e.num_experts for e in self._structure.experts.values()) / 2
        seconds = passes * self._forward() * tokens / self._tokens
        for path, experts in self._structure.experts.items():
            count = experts.num_experts
            used = min(tokens, PRODUCTS // (4 * count**2 * (1 if prune.even else prune.field)))
            hidden = experts.projections[0].in_features
            each = 2 * used * (self._structure.expert_weights(path) + count * hidden)
            seconds += (1 if prune.even else 2) * count * each / self._rate
            dropped = round(prune.share * count)
            few = search_is_exhaustive(count, dropped)
            sets = math.comb(count, dropped) if few else prune.population * prune.generations
            sets = count + sets if prune.method in ("moe_i2", "naee") else 0
            seconds += 2 * sets * used * count * (hidden + count) / self._single
        return seconds

    def _tuning(self) -> float:
        """Steps: layers are run twice forward and once backward, and their matrices rebuilt each time."""
        size = 512
        bits = self._config.expert_bits[len(self._config.expert_bits) // 2]
        packed = pack(quantize(torch.randn(size, size, device=self._device), bits, 128))
        each = self._once("rebuilt", lambda: dequantize(packed, bits, size)) / size**2
        experts = self._structure.experts
        weights = sum(self._structure.linear_weights().values())
        weights += sum(self._structure.expert_weights(path) * e.num_experts for path, e in experts.items())
        one = 4 * self._forward() / self._config.num_samples + 3 * each * weights
        return self._config.tuning_steps * sequences_per_step(self._config.seq_len) * one

    def _measuring(self) -> float:
        """Rounding at every width, and running the samples."""
        config = self._config
        seconds = self._counting() * self._share if config.eps == "final" and config.rounding == "gptq" else 0.0
        for path, experts in self._structure.experts.items():
            seconds += self._rounding(path, len(config.expert_bits), 0)
            sampled = min(SAMPLE, self._tokens * self._top_k // experts.num_experts)
            runs = self._mine(experts.num_experts) * (1 + len(config.expert_bits)) * sampled
            seconds += 2 * runs * self._structure.expert_weights(path) / self._rate
        return seconds

    def _forward(self) -> float:
        """One pass of all tokens through the layers."""
        weights = sum(self._structure.linear_weights().values())
        weights += sum(self._top_k * self._structure.expert_weights(path) for path in self._structure.experts)
        return 2 * self._tokens * weights / self._rate

    def _counting(self) -> float:
        """Hessians of experts and linear layers, with the passes that reach them."""
        sums = forward = 0.0
        linears = sum(self._structure.linear_weights().values()) / max(1, len(self._structure.experts))
        for path, experts in self._structure.experts.items():
            sizes = {p.role: p.in_features for p in experts.projections}
            share = self._mine(experts.num_experts) / experts.num_experts
            sums += 2 * share * self._tokens * self._top_k * sum(size**2 for size in sizes.values())
            forward += 2 * share * self._tokens * self._top_k * self._structure.expert_weights(path)
            passes = math.ceil(
                self._mine(experts.num_experts) * ExpertHessians.bytes_per_expert(experts) / self._limit
            )
            forward += 2 * self._tokens * linears * passes
        for path in self._structure.linears:
            sums += self._tokens * self._structure.model.get_submodule(path).in_features ** 2
        return sums / self._single + forward / self._rate

    def _rounding(self, path: str, widths: int, sweeps: int) -> float:
        """All experts of a module at so many widths."""
        experts = self._structure.experts[path]
        roles: dict[str, tuple[int, int]] = {}
        for p in experts.projections:
            rows, _ = roles.get(p.role, (0, 0))
            roles[p.role] = rows + p.out_features, p.in_features
        each = (self._matrix(rows, columns, widths, sweeps, experts.num_experts) for rows, columns in roles.values())
        return self._mine(experts.num_experts) * sum(each)

    def _linears(self) -> float:
        modules = [self._structure.model.get_submodule(path) for path in self._structure.linears]
        # those that read the same are one process's: query, key and value, and the output
        dealt = min(self._size, 2)
        return sum(self._matrix(m.out_features, m.in_features, 1, self._config.sweeps) for m in modules) / dealt

    def _matrix(self, rows: int, columns: int, widths: int, sweeps: int, count: int = 1) -> float:
        """One matrix of `count` alike, at so many widths, with its factorization."""
        bits = self._config.expert_bits[len(self._config.expert_bits) // 2]
        grid = grid_of(self._config)
        if self._config.rounding == "nearest":
            size = group_size_for(columns, self._config.group_size)
            taken = min(rows, _PROBE_ROWS)
            weight = torch.randn(taken, columns)
            seconds = self._once(("nearest", taken, columns), lambda: quantize(weight, bits, size, grid))
            return widths * seconds * rows / taken
        probe = min(columns, _LARGEST)
        size = group_size_for(probe, self._config.group_size)
        factor = Factor.of(torch.eye(probe, device=self._device)[None], size, damping=0.01)

        cut = Cut.of(rows, columns, self._device)
        at_once, _ = workers(cut.most)

        def rounding(taken: int) -> float:
            part = torch.randn(1, taken, probe, device=self._device)

            def run() -> None:
                list(each(lambda _: gptq(part, factor, bits, grid, sweeps=sweeps), range(at_once), cut.most))

            return self._once(("gptq", taken, probe, sweeps, at_once), run) / at_once

        # a part takes a time of its own, and one per row; several are at work at once
        few, many = rounding(_PROBE_ROWS // 2), rounding(_PROBE_ROWS)
        height = min(count, cut.together) * cut.step
        part = max(few / 2, few + (many - few) * (height - _PROBE_ROWS // 2) / (_PROBE_ROWS // 2))
        return self._factor(columns) + widths * part * rows / height * columns / probe

    def _factor(self, columns: int) -> float:
        """One factorization of many; its cost grows by a power of the size between two and three."""

        def factorizing(n: int) -> float:
            at_once, _ = workers(factorized_at_once(n, self._device))
            size = group_size_for(n, self._config.group_size)

            def run() -> None:
                Factor.of(torch.eye(n, device=self._device).repeat(at_once, 1, 1), size, damping=0.01)

            return self._once(("factor", n), run) / at_once

        probe = min(columns, _LARGEST)
        large, small = factorizing(probe), factorizing(max(32, probe // 2))
        power = min(3.0, max(2.0, math.log2(large / small)))
        return large * (columns / probe) ** power

    def _once(self, key: Any, run: Any) -> float:
        if key not in self._known:
            self._known[key] = self._time(run)
        return self._known[key]

    def _time(self, run: Any) -> float:
        """Seconds of a run, the best of two, and of all that end within a fifth of a second."""
        best, begun, runs = math.inf, time.perf_counter(), 0
        while runs < 2 or time.perf_counter() - begun < 0.2:
            started = time.perf_counter()
            run()
            best, runs = min(best, time.perf_counter() - started), runs + 1
        return best
