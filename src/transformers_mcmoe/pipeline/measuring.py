# SPDX-License-Identifier: Apache-2.0
"""The pass before the one that rounds: what every width of every expert costs, and how much a layer matters to the output.

Knows layers and widths on dense activations; it does not choose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.calibration.observing import Outputs, carried
from transformers_mcmoe.calibration.statistics import SAMPLE, ExpertInputs, hessian_error, output_errors
from transformers_mcmoe.models.experts import Experts
from transformers_mcmoe.pipeline.allocating import MEASURED, pairs
from transformers_mcmoe.pipeline.joint import JointProgram
from transformers_mcmoe.pipeline.journal import Record
from transformers_mcmoe.pipeline.rounding import PLAIN, ExpertRounder, Packed
from transformers_mcmoe.pipeline.watching import Watcher
from transformers_mcmoe.plan import ROLES
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.quantization import dequantize
from transformers_mcmoe.threads import at_once, each

# the pass runs one calibration sequence in so many, but so many tokens at least
SHARE, LEAST_TOKENS = 4, 8192
# tokens that a layer is run on, at least, with one of its linear layers rounded
LINEAR_TOKENS = 2048
# a width is not measured beside both of its neighbours: its error is about their geometric mean (docs/quantization.md)
BETWEEN = {3: (2, 4)}


def measured_sequences(sequences: int, length: int) -> int:
    """How many of so many calibration sequences the pass runs."""
    return min(sequences, max(-(-LEAST_TOKENS // length), sequences // SHARE))


@dataclass
class _Errors:
    """What was measured of one expert, by width: errors of its output, those by role, distances under the Hessians' traces."""

    outputs: dict[int, float]
    distances: dict[int, float] = field(default_factory=dict)
    roles: dict[str, dict[int, float]] = field(default_factory=dict)


class Measurer:
    """Measures the experts of one model, and the linear layers that have a choice of widths.

    Args:
        watcher: looks at its layers.
        meter: shows progress.
        joint: measures every experts module, too, while its layer is loaded.

    Attributes:
        norms: by experts path, the norm of the hidden states behind its layer.
        places: by path of experts and linear layers that were measured, the number of their layer.
        medians: by layer, the median norm of the hidden states behind it.
        linears: width -> eps of every linear layer that has a choice, by path.
    """

    def __init__(self, watcher: Watcher, meter: Meter, joint: JointProgram | None = None) -> None:
        self._watcher, self._meter, self._joint = watcher, meter, joint
        self._structure, self._runner, self._config = watcher.structure, watcher.runner, watcher.config
        self.norms: dict[str, float] = {}
        self.places: dict[str, int] = {}
        self.medians: list[float] = []
        self.linears: dict[str, dict[int, float]] = {}

    @property
    def sequences(self) -> int:
        """How many sequences the pass runs."""
        judged = self._runner.judged
        return judged + measured_sequences(len(self._runner.tokens) - judged, self._runner.tokens.length)

    def layer(self, i: int) -> Record:
        """Measure layer i, which is loaded, and go on behind it."""
        paths = self._watcher.inside(i, self._structure.experts)
        record = Record()
        for path in paths:
            self._cost(i, path)
            if self._joint is not None:
                self._joint.measure(i, path)
                record.data.setdefault("joint", {})[path] = self._joint.remember(path)
        chosen = self._measure_linears(i)
        norms = self._runner.advance(i)
        record.data |= {"norm": norms.total, "median": norms.median}
        record.data["linears"] = {path: pairs(self.linears[path]) for path in chosen}
        self._watcher.remember(i, record)
        self._note(i, record)
        return record

    def recall(self, i: int, record: Record) -> None:
        """What `layer` found."""
        self._watcher.recall(record)
        self.linears |= {path: dict(errors) for path, errors in record.data["linears"].items()}
        if self._joint is not None:
            for path, known in record.data.get("joint", {}).items():
                self._joint.recall(path, known)
        self._note(i, record)

    def _note(self, i: int, record: Record) -> None:
        paths = self._watcher.inside(i, self._structure.experts)
        self.norms |= dict.fromkeys(paths, record.data["norm"])
        self.medians.append(record.data["median"])
        self.places |= dict.fromkeys([*paths, *record.data["linears"]], i)

    def scales(self) -> dict[str, float]:
        """By path of what was measured, what its errors are multiplied by, so that those of different layers compare.

        Errors that are relative already are carried on to the later layers; absolute errors are divided by the norm behind
        their layer.
        """
        if not self._config.relative_errors:
            return {path: 1 / max(norm, 1e-30) for path, norm in self.norms.items()}
        found = carried(self.medians)
        return {path: found[i] for path, i in self.places.items()}

    def _cost(self, i: int, path: str) -> None:
        """Measure what the allocation reads of one experts module."""
        if self._config.allocation in MEASURED:
            self.measure(i, path)
        else:
            self._watcher.observe(i, path, None)

    def _measure_linears(self, i: int) -> list[str]:
        """Errors of every width of the layer's linear layers that have a choice: what they change behind the layer.

        The layer is run with its experts idle and one linear layer at its lowest width; a further bit halves the error.
        """
        paths = self._watcher.inside(i, self._structure.choices)
        if not paths:
            return []
        outputs = Outputs()
        layer = self._structure.model.get_submodule(self._runner.layers[i])

        def run() -> float:
            with ExitStack() as stack:
                for path in self._watcher.inside(i, self._structure.experts):
                    stack.enter_context(self._structure.experts[path].idle())
                stack.enter_context(outputs.observe(layer))
                self._runner.replay(i, LINEAR_TOKENS)
            return outputs.change()

        run()
        world, found = self._runner.world, dict[str, float]()
        mine = set(world.deal(paths))
        tokens = self._runner.tokens.numel(self._runner.sequences)
        lowest = {path: self._structure.choices[path][0] for path in paths}
        for path, matrix in self._watcher.linears(i, lowest, quick=True):
            if path not in mine:
                continue
            module: Any = self._structure.model.get_submodule(path)
            dense = module.weight.data
            module.weight.data = dequantize(matrix, lowest[path], dense.shape[1]).to(dense)
            found[path] = run() * tokens**0.5
            module.weight.data = dense
        found = world.merge(found)
        for path in paths:
            self.linears[path] = {
                bits: found[path] * 2.0 ** (lowest[path] - bits) for bits in self._structure.choices[path]
            }
        return paths

    def measure(self, i: int, path: str) -> dict[tuple[int, int], Packed] | None:
        """Errors of every width of every expert of a module.

        Returns packed matrices they were measured with, by expert and width, of the experts of this rank, where they are the final
        ones; else None, as GPTQ did not see the sequences that errors are measured on.
        """
        config, experts = self._config, self._structure.experts[path]
        candidates: dict[tuple[int, int], Packed] = {}
        result = self._watcher.layers[path]
        result.errors = {bits: [] for bits in config.expert_bits}
        if config.granularity == "projection":
            result.role_errors = {role: {bits: [] for bits in config.expert_bits} for role in ROLES}
        final = config.eps == "final"
        feedback = final and config.rounding == "gptq"
        traced = config.allocation == "hessian"
        skips = feedback and config.relative_errors
        between = {b: pair for b, pair in BETWEEN.items() if skips and {b, *pair} <= {*config.expert_bits}}
        widths = [bits for bits in config.expert_bits if bits not in between]
        mine = self._watcher.deal(path, self._structure.kept_of(path))
        for which, hessians, inputs in self._watcher.passes(
            i, path, mine, ROLES if feedback or traced else (), held_out=feedback
        ):
            traces = {role: h.traces().tolist() for role, h in hessians.roles.items()} if hessians and traced else None
            grid = None if final else PLAIN
            # better grids and coordinate descent lower all widths' errors alike, and take their time
            used = hessians.roles if hessians is not None and feedback else {}
            rounder = ExpertRounder(experts, which, used, config, grid, refits=0, sweeps=0)
            del hessians, used
            packed = {bits: rounder.round(which, (bits, bits)) for bits in widths}
            del rounder
            own = [{bits: packed[bits][expert] for bits in widths} for expert in which]
            self._note_errors(path, which, own, inputs, traces)
            if final and not feedback:
                candidates |= {(expert, bits): packed[bits][expert] for expert in which for bits in widths}
        if traced:
            result.hessian_errors = {bits: result.hessian_errors.get(bits, []) for bits in widths}
        for errors in (result.errors, result.hessian_errors, *result.role_errors.values()):
            for bits, measured in self._gathered(errors, mine).items():
                errors[bits] = [measured.get(expert, 0.0) for expert in range(experts.num_experts)]
        for errors in (result.errors, *result.role_errors.values()):
            for bits, (low, high) in between.items():
                errors[bits] = [math.sqrt(a * b) for a, b in zip(errors[low], errors[high], strict=True)]
        return candidates if final and not feedback else None

    def _gathered(self, errors: Mapping[int, list[float]], mine: Sequence[int]) -> dict[int, dict[int, float]]:
        """By width, the errors of the experts of all ranks; those of this one's are in their order."""
        own = {bits: dict(zip(mine, measured, strict=True)) if measured else {} for bits, measured in errors.items()}
        parts = self._runner.world.gather(own)
        return {bits: {expert: error for part in parts for expert, error in part[bits].items()} for bits in own}

    def _note_errors(
        self,
        path: str,
        which: Sequence[int],
        packed: Sequence[Mapping[int, Packed]],
        inputs: ExpertInputs,
        traces: Mapping[str, Sequence[float]] | None,
    ) -> None:
        """Append the errors of experts under every width, [experts][width], to the layer's result."""
        experts, result = self._structure.experts[path], self._watcher.layers[path]
        by_role = self._config.granularity == "projection"

        def measured(n: int) -> _Errors:
            if by_role:
                return self._role_errors(experts, which[n], packed[n], inputs)
            own = None if traces is None else {role: trace[n] for role, trace in traces.items()}
            return self._errors(experts, which[n], packed[n], inputs, own)

        # one expert in float32, dense and rebuilt, and a sample on its way through both
        device = experts.matrix(0, experts.projections[0].name).device
        most = at_once(
            sum(
                12 * p.out_features * p.in_features + 12 * SAMPLE * (p.out_features + p.in_features)
                for p in experts.projections
            ),
            device,
        )
        for expert, found in zip(which, each(measured, range(len(which)), most), strict=True):
            for bits, error in found.outputs.items():
                result.errors[bits].append(error)
            for bits, distance in found.distances.items():
                result.hessian_errors.setdefault(bits, []).append(distance)
            for role, errors in found.roles.items():
                for bits, error in errors.items():
                    result.role_errors[role][bits].append(error)
            self._meter.expert_done(expert, experts.num_experts)

    def _errors(
        self,
        experts: Experts,
        expert: int,
        packed: Mapping[int, Packed],
        inputs: ExpertInputs,
        traces: Mapping[str, float] | None,
    ) -> _Errors:
        """One expert's errors under every width."""
        columns = {p.name: p.in_features for p in experts.projections}
        distances: list[float] = []

        def rebuilt() -> Iterable[dict[str, Tensor]]:
            for bits, matrices in packed.items():
                rebuilt = {name: dequantize(m, bits, columns[name]) for name, m in matrices.items()}
                if traces is not None:
                    distances.append(hessian_error(experts, expert, rebuilt, traces))
                yield rebuilt

        errors = output_errors(experts, expert, inputs.sample(expert), rebuilt(), self._config.relative_errors)
        return _Errors(dict(zip(packed, errors, strict=True)), dict(zip(packed, distances, strict=False)))

    def _role_errors(
        self, experts: Experts, expert: int, packed: Mapping[int, Packed], inputs: ExpertInputs
    ) -> _Errors:
        """One expert's errors with only its matrices of a role rounded; that of all is the root of the sum of squares."""
        sample = inputs.sample(expert)
        dense = {p.name: experts.matrix(expert, p.name).to(torch.float32) for p in experts.projections}
        found = _Errors(dict.fromkeys(packed, 0.0))
        for role in ROLES:
            names = {p.name: p.in_features for p in experts.projections if p.role == role}
            candidates = (
                dense | {name: dequantize(matrices[name], bits, columns) for name, columns in names.items()}
                for bits, matrices in packed.items()
            )
            relative = self._config.relative_errors
            errors = output_errors(experts, expert, sample, candidates, relative, down=role == "down")
            found.roles[role] = dict(zip(packed, errors, strict=True))
            for bits, error in found.roles[role].items():
                found.outputs[bits] = math.hypot(found.outputs[bits], error)
        return found
