# SPDX-License-Identifier: Apache-2.0
"""The pass before the one that rounds: what every width of every expert costs, and how much a layer matters to the output.

Knows layers and widths on dense activations; it does not choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from transformers_mcmoe.calibration.statistics import HELD_OUT, ExpertInputs, OutputNorms, hessian_error, output_errors
from transformers_mcmoe.models.stream import Probes
from transformers_mcmoe.pipeline.allocating import MEASURED, PartResult
from transformers_mcmoe.pipeline.rounding import PLAIN, ExpertRounder, Packed
from transformers_mcmoe.pipeline.watching import Watcher
from transformers_mcmoe.plan import ROLES
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.quantization import dequantize

# the pass runs one calibration sequence in so many, but so many at least
SHARE, LEAST_SEQUENCES = 4, 32
# sequences, and their tokens in all, that are run to the model's output with a part of it rounded
PROBES, PROBE_TOKENS = 2, 512


class Measurer:
    """Measures the experts of one model, and the parts that have a choice of widths.

    Args:
        watcher: looks at its layers.
        reference: width that a layer's experts have while the model's output is compared.
        meter: shows progress.

    Attributes:
        norms: by experts path, the norm of the hidden states behind its layer.
        places: by experts path, the number of its layer.
        medians: by layer, the median norm of the hidden states behind it.
        parts: by path, what was measured of attentions and MLPs that have a choice.
    """

    def __init__(self, watcher: Watcher, reference: int, meter: Meter) -> None:
        self._watcher, self._reference, self._meter = watcher, reference, meter
        self._structure, self._runner, self._config = watcher.structure, watcher.runner, watcher.config
        self.norms: dict[str, float] = {}
        self.places: dict[str, int] = {}
        self.medians: list[float] = []
        self.parts: dict[str, PartResult] = {}

    def run(self, layers: range) -> None:
        """Measure all layers."""
        self._runner.restart(max(LEAST_SEQUENCES, len(self._runner.tokens) // SHARE))
        probes = self._probes()
        for i in layers:
            with self._runner.loaded(i):
                paths = self._watcher.inside(i, self._structure.experts)
                references: dict[str, Any] = {path: self._cost(i, path) for path in paths}
                lowest = self._measure_parts(i) if probes else {}
                returned = OutputNorms()
                with returned.observe(self._structure.model.get_submodule(self._runner.layers[i])):
                    self.norms |= dict.fromkeys(paths, self._runner.advance(i))
                self.medians.append(returned.median)
                self.places |= dict.fromkeys(paths, i)
                if probes is not None:
                    self._branch(probes, i, lowest, references)
                del references
            self._meter.layer_done()
        if probes is not None:
            self._finish(probes, layers.stop)

    def scales(self) -> dict[str, float]:
        """By experts path, what the layer's errors are multiplied by, so that those of different layers compare.

        A change stays in the residual stream: every later layer reads it relative to the hidden states there, and so does
        the head. Errors that are relative already, to the layer's own hidden states, are carried on to those; the head
        counts as half of the layers (docs/quantization.md). Absolute errors are divided by the norm behind their layer.
        """
        if not self._config.relative_errors:
            return {path: 1 / max(norm, 1e-30) for path, norm in self.norms.items()}
        reads = [1 / max(norm, 1e-30) ** 2 for norm in self.medians]
        head = len(reads) / 2 * reads[-1]
        return {path: ((sum(reads[i:-1]) + head) / reads[i]) ** 0.5 for path, i in self.places.items()}

    def _finish(self, probes: Probes, first: int) -> None:
        """Run the probes through the layers from `first` on, in which nothing is quantized, to the output."""
        for i in range(first, len(self._runner.layers)):
            with self._runner.loaded(i):
                probes.advance(i)
        for name, divergence in probes.divergences().items():
            if name in self.parts:
                self.parts[name].divergence = divergence
            else:
                self._watcher.layers[name].divergence = divergence

    def _cost(self, i: int, path: str) -> Mapping[tuple[int, int], Packed]:
        """Measure what the allocation reads of one experts module; see `measure`."""
        if self._config.allocation in MEASURED:
            return self.measure(i, path)
        self._watcher.observe(i, path, None)
        return {}

    def _probes(self) -> Probes | None:
        """Probes for every layer's experts and every part that has a choice, over sequences kept from the Hessians."""
        if self._config.sensitivity != "kl" or self._config.plan is not None:
            return None
        if self._structure.model.get_output_embeddings() is None:
            self._watcher.fall_back(
                f"{type(self._structure.model).__name__} has no output head, so that layers are compared by their hidden "
                "states instead of the model's output (sensitivity='hidden')."
            )
            return None
        step = min(HELD_OUT, self._runner.sequences)
        kept = self._runner.tokens[step - 1 : self._runner.sequences : step]
        tokens = kept[:PROBES, : max(PROBE_TOKENS // min(PROBES, len(kept)), 1)]
        return self._runner.probes(tokens, len(self._structure.experts) + len(self._structure.choices))

    def _measure_parts(self, i: int) -> dict[str, dict[str, Tensor]]:
        """Errors of every width of the layer's attention and MLPs that have a choice; packed matrices at the lowest."""
        choices = {path: self._structure.choices[path] for path in self._watcher.inside(i, self._structure.choices)}
        widths = {linear: choices[path] for path in choices for linear in self._structure.part(path)}
        packed: dict[str, dict[str, Tensor]] = {path: {} for path in choices}
        for path in choices:
            self.parts[path] = PartResult(dict.fromkeys(choices[path], 0.0))
        for linear, bits, matrix, error in self._watcher.linears(i, widths):
            path = linear.rpartition(".")[0]
            self.parts[path].errors[bits] += error
            if bits == choices[path][0]:
                packed[path][linear] = matrix
        return packed

    def _branch(
        self,
        probes: Probes,
        i: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        references: Mapping[str, Mapping[tuple[int, int], Packed]],
    ) -> None:
        """Advance the probes, and branch off one for every part and for the layer's experts, rounded."""
        probes.advance(i)
        for path, matrices in parts.items():
            modules = {linear: self._structure.model.get_submodule(linear) for linear in matrices}
            dense = {linear: module.weight.data for linear, module in modules.items()}
            for linear, matrix in matrices.items():
                bits, columns = self._structure.linears[linear], dense[linear].shape[1]
                modules[linear].weight.data = dequantize(matrix, bits, columns).to(dense[linear])
            probes.branch(i, path)
            for linear, module in modules.items():
                module.weight.data = dense[linear]
        bits = self._reference
        for path, packed in references.items():
            experts = self._structure.experts[path]
            # a streamed layer is unloaded next; a model that stays needs its weights back
            kept = self._runner.recomputes or len(references) > 1
            weights: dict[tuple[int, str], Tensor] = {}
            for (expert, _), matrices in packed.items():
                for p in experts.projections:
                    matrix = experts.matrix(expert, p.name)
                    if kept:
                        weights[expert, p.name] = matrix.clone()
                    matrix.copy_(dequantize(matrices[p.name], bits, p.in_features))
            probes.branch(i, path)
            for (expert, name), own in weights.items():
                experts.matrix(expert, name).copy_(own)

    def measure(self, i: int, path: str) -> dict[tuple[int, int], Packed]:
        """Errors of every width of every expert of a module.

        Returns packed matrices they were measured with, by expert and width: all, where they are the final ones; those of
        the reference width, where the model's output is measured next; else none, as GPTQ did not see the sequences that
        errors are measured on.
        """
        config, experts = self._config, self._structure.experts[path]
        candidates: dict[tuple[int, int], Packed] = {}
        result = self._watcher.layers[path]
        result.errors = {bits: [] for bits in config.expert_bits}
        result.role_errors = {role: {bits: [] for bits in config.expert_bits} for role in ROLES}
        final = config.eps == "final"
        feedback = final and config.rounding == "gptq"
        traced = config.allocation == "hessian"
        every = list(range(experts.num_experts))
        for which, hessians, inputs in self._watcher.passes(
            i, path, every, ROLES if feedback or traced else (), held_out=feedback
        ):
            traces = {role: h.traces().tolist() for role, h in hessians.roles.items()} if hessians and traced else None
            grid = None if final else PLAIN
            # coordinate descent lowers all widths' errors alike, and takes its time
            used = hessians.roles if hessians is not None and feedback else {}
            rounder = ExpertRounder(experts, which, used, config, grid, sweeps=0)
            del hessians, used
            packed = {bits: rounder.round(which, (bits, bits)) for bits in config.expert_bits}
            del rounder
            for n, expert in enumerate(which):
                own = {bits: packed[bits][expert] for bits in config.expert_bits}
                weights = None if traces is None else {role: trace[n] for role, trace in traces.items()}
                self._errors(path, expert, own, inputs, weights)
                self._meter.expert_done(expert, experts.num_experts)
                if config.sensitivity == "kl":
                    candidates[expert, self._reference] = own[self._reference]
                elif final and not feedback:
                    candidates |= {(expert, bits): matrices for bits, matrices in own.items()}
        return candidates

    def _errors(
        self,
        path: str,
        expert: int,
        packed: Mapping[int, Packed],
        inputs: ExpertInputs,
        traces: Mapping[str, float] | None,
    ) -> None:
        """Append one expert's errors under every width to the layer's result."""
        experts, result = self._structure.experts[path], self._watcher.layers[path]
        projections = {p.name: p for p in experts.projections}
        distances = []

        def rebuilt() -> Iterable[dict[str, Tensor]]:
            for bits, matrices in packed.items():
                rebuilt = {name: dequantize(m, bits, projections[name].in_features) for name, m in matrices.items()}
                if traces is not None:
                    distances.append(hessian_error(experts, expert, rebuilt, traces))
                yield rebuilt

        errors = output_errors(experts, expert, inputs.sample(expert), rebuilt(), self._config.relative_errors)
        for bits, error in zip(packed, errors, strict=True):
            result.errors[bits].append(error)
        for bits, distance in zip(packed, distances, strict=False):
            result.hessian_errors.setdefault(bits, []).append(distance)
        if self._config.granularity == "projection":
            self._role_errors(path, expert, packed, inputs)

    def _role_errors(self, path: str, expert: int, packed: Mapping[int, Packed], inputs: ExpertInputs) -> None:
        """Append one expert's errors with only its matrices of a role rounded."""
        experts, sample = self._structure.experts[path], inputs.sample(expert)
        dense = {p.name: experts.matrix(expert, p.name).to(torch.float32) for p in experts.projections}
        for role in ROLES:
            names = {p.name: p.in_features for p in experts.projections if p.role == role}
            candidates = (
                dense | {name: dequantize(matrices[name], bits, columns) for name, columns in names.items()}
                for bits, matrices in packed.items()
            )
            errors = output_errors(experts, expert, sample, candidates, self._config.relative_errors)
            for bits, error in zip(packed, errors, strict=True):
                self._watcher.layers[path].role_errors[role][bits].append(error)
