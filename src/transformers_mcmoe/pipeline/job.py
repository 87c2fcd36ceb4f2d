# SPDX-License-Identifier: Apache-2.0
"""The stages over the decoder layers of one model: measure, allocate, round, write.

Knows the order of things; how a matrix is rounded (`rounding`) or named (`writing`) is not its business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from transformers_mcmoe.calibration.hessians import ExpertHessians
from transformers_mcmoe.calibration.statistics import (
    BlockChange,
    ExpertInputs,
    LayerTokens,
    hessian_error,
    output_errors,
)
from transformers_mcmoe.config import MCMoEConfig, ODPConfig, OTPConfig
from transformers_mcmoe.memory import return_free_memory
from transformers_mcmoe.models.stream import LayerRunner
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline.allocating import MEASURED, Allocator, LayerResult
from transformers_mcmoe.pipeline.rounding import PLAIN, ExpertRounder, Packed, Widths, chunks, round_linears
from transformers_mcmoe.pipeline.writing import Writer
from transformers_mcmoe.plan import ExpertWidths, Plan
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.quantization import dequantize
from transformers_mcmoe.routing import RoutingRatios, check_top_k, record_routing
from transformers_mcmoe.workdir import WorkDir

logger = logging.getLogger(__name__)


class Job:
    """The stages over the layers of one model.

    Args:
        structure: what is quantized.
        runner: runs its layers.
        config: how.
        budgets: bits per experts module, by path; {} under a given plan.
        work: where layers are written.
        meter: shows progress.
        limit: bytes that Hessians may take at once.

    Attributes:
        layers: measurements by experts path.
        fallbacks: what was done otherwise than usual, and why.
        seconds: time per stage.
        writer: the names that packed tensors got.
    """

    def __init__(
        self,
        structure: Structure,
        runner: LayerRunner,
        config: MCMoEConfig,
        budgets: dict[str, int],
        work: WorkDir,
        meter: Meter,
        limit: int,
    ) -> None:
        self._structure, self._runner, self._config = structure, runner, config
        self._work, self._meter, self._limit = work, meter, limit
        self._allocator = Allocator(structure, config, budgets)
        self.layers: dict[str, LayerResult] = {path: LayerResult() for path in structure.experts}
        self.fallbacks = [f"The whole dense model was loaded: {runner.reason}."] if runner.reason else []
        self.seconds: dict[str, float] = {}
        self.writer = Writer(structure, runner.weights.targets)

    def run(self) -> tuple[Plan, list[Path]]:
        """All stages; returns the plan and the packed files."""
        config, plan = self._config, self._config.plan
        if plan is not None:
            plan = plan if plan.linears else Plan(plan.experts, self._structure.linears)
        elif config.allocation == "bsp":
            plan = self._timed("allocate", self._allocate_blocks)
            self._runner.restart()
        elif config.budget == "model" and config.allocation != "uniform":
            plan = self._timed("allocate", self._allocate_model)
            self._runner.restart()
        return self._timed("quantize", lambda: self._quantize(plan))

    def allocate(self) -> Plan:
        """The plan alone: widths are chosen on dense activations, nothing is written.

        With one budget for the model it is the plan that `run` rounds by; with a budget per layer `run` chooses on what the
        compressed layers before return, which may differ.
        """
        config = self._config
        if config.plan is not None:
            return config.plan
        if config.allocation == "bsp":
            return self._timed("allocate", self._allocate_blocks)
        if config.allocation == "uniform":
            widths = {path: self._allocator.layer(path, result) for path, result in self.layers.items()}
            return Plan(widths, self._structure.linears)
        return self._timed("allocate", self._allocate_model)

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        self._meter.start(stage, len(self._layers()))
        started = time.monotonic()
        result = work()
        self.seconds[stage] = time.monotonic() - started
        return result

    def _layers(self) -> range:
        """The decoder layers up to the last that holds a matrix to be quantized; nothing reads what comes behind it."""
        plan = self._config.plan
        linears = plan.linears if plan is not None and plan.linears else self._structure.linears
        paths = (*self._structure.experts, *linears)
        return range(1 + max(i for i in range(len(self._runner.layers)) if self._inside(i, paths)))

    def _inside(self, i: int, paths: Iterable[str]) -> list[str]:
        """Those of the module paths that lie in decoder layer i."""
        return [path for path in paths if path.startswith(self._runner.layers[i] + ".")]

    # ---- a pass before the one that rounds

    def _allocate_model(self) -> Plan:
        """Costs of all layers on dense activations, then one program, or one per layer."""
        norms: dict[str, float] = {}
        for i in self._layers():
            with self._runner.loaded(i):
                paths = self._inside(i, self._structure.experts)
                for path in paths:
                    if self._config.allocation in MEASURED:
                        self._measure(i, path)
                    else:
                        self._observe(i, path, None)
                norms |= dict.fromkeys(paths, self._runner.advance(i))
            self._meter.layer_done()
        if self._config.budget == "model":
            return Plan(self._allocator.model(self.layers, norms), self._structure.linears)
        widths = {path: self._allocator.layer(path, result) for path, result in self.layers.items()}
        return Plan(widths, self._structure.linears)

    def _allocate_blocks(self) -> Plan:
        """The block score: whole layers at the higher width, those first whose MoE block changes its input most."""
        similarity: dict[str, float] = {}
        for i in self._layers():
            with self._runner.loaded(i), ExitStack() as stack:
                changes = {path: BlockChange() for path in self._inside(i, self._structure.experts)}
                for path, change in changes.items():
                    block = self._structure.model.get_submodule(path.rpartition(".")[0])
                    stack.enter_context(change.observe(block))
                self._runner.advance(i)
                similarity |= {path: change.similarity for path, change in changes.items()}
            self._meter.layer_done()
        return Plan(self._allocator.blocks(similarity), self._structure.linears)

    # ---- the pass that rounds and writes

    def _quantize(self, plan: Plan | None) -> tuple[Plan, list[Path]]:
        """Every layer is rounded and written; without a plan its widths are chosen on the way.

        The next layer sees the rounded outputs of this one, or, with activations="dense", its dense ones.
        """
        linears = self._structure.linears if plan is None else plan.linears
        widths: dict[str, ExpertWidths] = {}
        files = []
        layers = self._layers()
        runs = plan is None or self._config.rounding == "gptq"
        dense = self._config.activations == "dense"
        for i in layers:
            with self._runner.loaded(i):
                tensors: dict[str, Tensor] = {}
                self._linears(i, {path: linears[path] for path in self._inside(i, linears)}, tensors, not dense)
                for path in self._inside(i, self._structure.experts):
                    chosen, packed = self._experts(i, path, None if plan is None else plan.experts[path])
                    widths[path] = chosen
                    self.writer.experts(self._structure.experts[path], chosen, packed, tensors, not dense)
                    del packed
                files.append(self._work.write_layer(i, tensors))
                del tensors
                if runs and i < layers[-1] and not self._runner.recomputes:
                    self._runner.advance(i)
            self._meter.layer_done()
        return Plan(widths, linears), files

    def _linears(self, i: int, widths: Mapping[str, int], tensors: dict[str, Tensor], replace: bool) -> None:
        experts = [self._structure.experts[path] for path in self._inside(i, self._structure.experts)]

        def unreached(path: str) -> None:
            self._fall_back(f"{path}: no calibration token reached it; it was rounded to nearest.")

        for path, packed in round_linears(self._runner, i, widths, experts, self._config, self._limit, unreached):
            self.writer.linear(path, packed, widths[path], tensors, replace)

    def _experts(self, i: int, path: str, widths: ExpertWidths | None) -> tuple[ExpertWidths, dict[int, Packed]]:
        """Widths and packed matrices of one experts module; widths that are not given are chosen."""
        if widths is None:
            if self._config.allocation in MEASURED:
                candidates = self._measure(i, path)
                widths = self._allocator.layer(path, self.layers[path])
                if candidates:
                    chosen = enumerate(widths.gate_up)
                    return widths, {expert: candidates[expert, bits] for expert, bits in chosen}
            else:
                if self._config.allocation != "uniform" or self._config.rounding == "nearest":
                    self._observe(i, path, None)
                widths = self._allocator.layer(path, self.layers[path])
        return widths, self._round(i, path, widths)

    def _measure(self, i: int, path: str) -> dict[tuple[int, int], Packed]:
        """Errors of every width of every expert of a module.

        Returns the packed matrices they were measured with, by expert and width, unless those are not the final ones:
        those of GPTQ did not see the sequences that errors are measured on.
        """
        config, experts = self._config, self._structure.experts[path]
        candidates: dict[tuple[int, int], Packed] = {}
        self.layers[path].errors = {bits: [] for bits in config.expert_bits}
        final = config.eps == "final"
        feedback = final and config.rounding == "gptq"
        traced = config.allocation == "hessian"
        every = list(range(experts.num_experts))
        for which, hessians, inputs in self._passes(i, path, every, feedback or traced, held_out=feedback):
            traces = {role: h.traces().tolist() for role, h in hessians.roles.items()} if hessians and traced else None
            grid = None if final else PLAIN
            rounder = ExpertRounder(experts, which, hessians if feedback else None, config, grid)
            del hessians
            packed = {bits: rounder.round(which, (bits, bits)) for bits in config.expert_bits}
            del rounder
            for n, expert in enumerate(which):
                own = {bits: packed[bits][expert] for bits in config.expert_bits}
                weights = None if traces is None else {role: trace[n] for role, trace in traces.items()}
                self._errors(path, expert, own, inputs, weights)
                self._meter.expert_done(expert, experts.num_experts)
                if final and not feedback:
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
        experts, result = self._structure.experts[path], self.layers[path]
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

    def _round(self, i: int, path: str, widths: ExpertWidths) -> dict[int, Packed]:
        """Packed matrices of the experts that a plan keeps."""
        experts = self._structure.experts[path]
        pairs = list(zip(widths.gate_up, widths.down, strict=True))
        kept = [expert for expert, pair in enumerate(pairs) if pair[1]]
        packed: dict[int, Packed] = {}
        if self._config.rounding == "nearest":
            passes: Iterable[Any] = [(kept, None, None)]
        else:
            passes = self._passes(i, path, kept, True)
        for which, hessians, _ in passes:
            rounder = ExpertRounder(experts, which, hessians, self._config)
            del hessians
            same: dict[Widths, list[int]] = {}
            for expert in which:
                same.setdefault(pairs[expert], []).append(expert)
            for pair, those in same.items():
                packed |= rounder.round(those, pair)
            self._meter.expert_done(which[-1], experts.num_experts)
        return packed

    def _passes(
        self, i: int, path: str, which: list[int], counting: bool, held_out: bool = False
    ) -> Iterator[tuple[list[int], ExpertHessians | None, ExpertInputs]]:
        """Runs of experts, with their Hessians if these are asked for, and the samples of all experts' inputs.

        The first pass over the tokens counts routing, too; each further run of experts costs one more pass. With
        `held_out`, some sequences are kept from the Hessians, and the samples are drawn from those alone.
        """
        experts = self._structure.experts[path]
        inputs: ExpertInputs | None = None
        for run in chunks(experts, which, self._limit) if counting else [which]:
            counted = ExpertHessians(experts, run) if counting else None
            if inputs is None:
                inputs = self._observe(i, path, counted, held_out)
            elif counted is not None:
                self._watch(i, path, counted, None, held_out)
            if counted is not None:
                for expert in (expert for expert in run if inputs.is_starved(expert)):
                    counted.clear(expert)
                    counted.record(expert, inputs.sample(expert).x)
            yield run, counted, inputs
            del counted
            return_free_memory()

    def _watch(
        self, i: int, path: str, hessians: ExpertHessians | None, inputs: ExpertInputs | None, held_out: bool
    ) -> None:
        """Run layer i with idle experts and record what reaches them."""
        experts, tokens = self._structure.experts[path], LayerTokens()

        def record(expert: int, x: Tensor, weights: Tensor | None, position: Tensor | None) -> None:
            held = tokens.held_out(expert, position, x.shape[0], self._runner.sequences) if held_out else None
            if inputs is not None:
                inputs.record(expert, x, weights, tokens.norms(position), held)
            if hessians is not None:
                hessians.record(expert, x if held is None else x[~held])

        layer = self._structure.model.get_submodule(self._runner.layers[i])
        with experts.idle(), experts.observe(record), tokens.observe(layer):
            self._runner.replay(i)

    def _observe(self, i: int, path: str, hessians: ExpertHessians | None, held_out: bool = False) -> ExpertInputs:
        """Run layer i with idle experts; count and sample what reaches them."""
        experts, result = self._structure.experts[path], self.layers[path]
        inputs = ExpertInputs(experts.num_experts, self._work.path / "expert_inputs.bin", self._config.seed)
        ratios = RoutingRatios(experts.num_experts)
        with record_routing(experts.module, experts, ratios):
            self._watch(i, path, hessians, inputs, held_out)
        if int(inputs.routing.tokens.sum()) == 0:
            raise ValueError(f"No calibration token reached the experts of '{path}'; use other calibration data.")
        known = result.routing is not None
        result.routing, result.ratios = inputs.routing, ratios
        if isinstance(self._config.odp, ODPConfig) or isinstance(self._config.otp, OTPConfig):
            check_top_k(ratios.slots, path)
        result.starved = [e for e in range(experts.num_experts) if inputs.is_starved(e)]
        if result.starved and not known and (self._config.rounding == "gptq" or self._config.allocation in MEASURED):
            self._fall_back(
                f"{path}: experts {result.starved} saw too few calibration tokens; their errors and Hessians were "
                "taken from tokens of all experts of the layer, and those that saw none count as if they had seen one."
            )
        return inputs

    def _fall_back(self, reason: str) -> None:
        logger.warning(reason)
        self.fallbacks.append(reason)
