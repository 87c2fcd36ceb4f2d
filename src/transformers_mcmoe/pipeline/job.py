# SPDX-License-Identifier: Apache-2.0
"""The stages over the decoder layers of one model: measure, allocate, round, write.

Knows the order of things; how a matrix is rounded (`rounding`) or named (`writing`) is not its business.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from transformers_mcmoe.calibration.hessians import ExpertHessians
from transformers_mcmoe.calibration.observing import BlockChange
from transformers_mcmoe.calibration.statistics import ExpertInputs
from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.models.stream import LayerRunner
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline.allocating import MEASURED, Allocator
from transformers_mcmoe.pipeline.dropping import Dropped, Dropper
from transformers_mcmoe.pipeline.joint import JointProgram, Measured
from transformers_mcmoe.pipeline.kept import kept_counts, least_paying
from transformers_mcmoe.pipeline.measuring import Measurer
from transformers_mcmoe.pipeline.prepare import budgets_of
from transformers_mcmoe.pipeline.rounding import ExpertRounder, Packed, rebuilt
from transformers_mcmoe.pipeline.watching import Watcher
from transformers_mcmoe.pipeline.writing import Writer
from transformers_mcmoe.plan import ROLES, ExpertWidths, Plan
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.tuning import Teacher, sequences_for
from transformers_mcmoe.workdir import WorkDir

# how often what a plan drops is tried on the dense model
CORRECTIONS = 3


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
        dropped: what was found about experts that are dropped, None if none were to be.
        compared: KL divergence from the dense model of the plan of "widths" alone and of the "joint" one, where both were tried.
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
        self._structure, self._runner, self._config, self._budgets = structure, runner, config, budgets
        self._work, self._meter = work, meter
        self._allocator = Allocator(structure, config, budgets)
        self._watcher = Watcher(structure, runner, config, work, limit)
        self._joint: JointProgram | None = None
        by_loss = config.drops is not None and config.drops.importance == "loss"
        if runner.recomputes and config.plan is None and (config.joint or by_loss):
            raise NotImplementedError(
                f"{'importance=loss' if by_loss else 'auto'} runs hidden states through single layers, which this model's cannot "
                f"({runner.reason}); use importance='local', and numbers for prune and rank."
            )
        if config.joint and config.plan is None:
            self._joint = JointProgram(self._watcher, config, Dropper(self._watcher, config, work, meter))
        self._measurer = Measurer(self._watcher, meter, self._joint.measure if self._joint is not None else None)
        self.layers, self.fallbacks = self._watcher.layers, self._watcher.fallbacks
        self.seconds: dict[str, float] = {}
        self.dropped: Dropped | None = None
        self.compared: dict[str, float] | None = None
        self._dense: list[Tensor] = []
        self.writer = Writer(structure, runner.weights.targets)

    def teach(self, path: Path) -> Teacher | None:
        """What the dense model returns for the sequences that a tuning will train on, in a file; None without a tuning."""
        if not self._config.tuning_steps:
            return None
        tokens = self._runner.tokens
        count = min(len(tokens), sequences_for(self._config.tuning_steps, tokens.length))
        stages = len(self._runner.layers)
        hidden = self._timed("teach", lambda: self._runner.outputs(count, path, self._meter.layer_done), stages)
        self._runner.restart()
        return Teacher(tokens[: len(hidden)], hidden, self._runner.layers)

    def run(self) -> tuple[Plan, list[Path]]:
        """All stages; returns the plan and the packed files."""
        config, plan = self._config, self._config.plan
        self._drop()
        if config.only_factors and plan is None:
            plan = self._factors_alone()
        elif plan is not None:
            plan = plan if plan.linears else Plan(plan.experts, self._structure.linears)
        elif config.allocation == "bsp":
            plan = self._timed("allocate", self._allocate_blocks)
            self._runner.restart()
        elif config.budget == "model" and config.allocation != "uniform":
            plan = self._timed("allocate", self._allocate_model)
            self._runner.restart()
            if self._joint is not None:
                return self._better(plan)
        return self._timed("quantize", lambda: self._quantize(plan))

    def _better(self, widths: Plan) -> tuple[Plan, list[Path]]:
        """Widths alone, or the plan of the joint program: whichever is nearer to the dense model on the judged sequences."""
        assert self._joint is not None
        errors = {path: {None: result.errors, **result.role_errors} for path, result in self.layers.items()}
        measured = Measured(errors, self._measurer.linears, self._measurer.scales())
        if self._joint.plan(widths, measured) is None:
            return self._timed("quantize", lambda: self._quantize(widths))
        start = len(self.fallbacks)
        plan, files = self._timed("quantize", lambda: self._quantize(widths, judged=True))
        found = {"widths": self._runner.divergence(self._runner.states(judged=True), self._dense)}
        joint = self._corrected(widths, measured, found["widths"])
        if joint is None:
            return plan, files
        before, known, middle = self.writer, copy.deepcopy(self.layers), len(self.fallbacks)
        self.writer = Writer(self._structure, self._runner.weights.targets)
        self._structure.follow(joint)
        self._runner.restart()
        chosen, others = self._timed("quantize the joint plan", lambda: self._quantize(joint, "joint", judged=True))
        found["joint"] = self._runner.divergence(self._runner.states(judged=True), self._dense)
        self.compared = found
        if found["joint"] < found["widths"]:
            plan, files, others = chosen, others, files
            del self.fallbacks[start:middle]  # notes of the plan that is not taken
        else:
            self._structure.keep_all()
            self.writer = before
            self.layers.update(known)
            del self.fallbacks[middle:]
        for file in others:
            file.unlink()
        return plan, files

    def _corrected(self, widths: Plan, measured: Measured, divergence: float) -> Plan | None:
        """The joint plan, after what it drops has been tried on the dense model; None if it is the plan of widths.

        Absent experts can cost the output more than rounding errors of the same norm do: a pass of the judged sequences
        without them says how much more, in units of what the plan of widths costs, and the program is solved again.
        """
        assert self._joint is not None
        unit = divergence / self._joint.costs(widths, measured)[0]
        absence = 1.0
        for _ in range(CORRECTIONS):
            joint = self._joint.plan(widths, measured, absence)
            if joint is None:
                return None
            _, dropped = self._joint.costs(joint, measured)
            if not dropped:
                return joint
            self._structure.follow(joint)
            ratio = self._timed("try without them", self._judge) / (unit * dropped * absence)
            self._structure.keep_all()
            if ratio < 1.1:
                return joint
            absence *= ratio
        return self._joint.plan(widths, measured, absence)

    def _judge(self) -> float:
        """KL divergence of the dense layers, with their routers as they are now, from the dense model on the judged sequences."""
        self._runner.restart(self._runner.judged)
        for i in range(len(self._runner.layers)):
            with self._runner.loaded(i):
                self._runner.advance(i)
            self._meter.layer_done()
        found = self._runner.divergence(self._runner.states(judged=True), self._dense)
        self._runner.restart()
        return found

    def allocate(self) -> Plan:
        """The plan alone: widths are chosen on dense activations, nothing is written.

        With one budget for the model it is the plan that `run` rounds by; with a budget per layer `run` chooses on what the
        compressed layers before return, which may differ.
        """
        config = self._config
        if config.plan is not None:
            return config.plan
        if config.joint:
            raise ValueError(
                "'auto' chooses between two plans once both are rounded; compress the model to see which."
            )
        self._drop()
        if config.only_factors:
            return self._factors_alone()
        if config.allocation == "bsp":
            return self._timed("allocate", self._allocate_blocks)
        if config.allocation == "uniform":
            widths = {path: self._allocator.layer(path, result) for path, result in self.layers.items()}
            return Plan(widths, self._structure.linears)
        return self._timed("allocate", self._allocate_model)

    def _factors_alone(self) -> Plan:
        """Factors in the place of all experts' matrices."""
        structure = self._structure
        none = {path: (0,) * experts.num_experts for path, experts in structure.experts.items()}
        experts = {
            path: ExpertWidths(own, own, structure.ranks[path], structure.rank_bits) for path, own in none.items()
        }
        return Plan(experts, structure.linears)

    def _drop(self) -> None:
        """Drop the experts that the given plan drops, or those that calibration says the model can do without."""
        config = self._config
        if config.plan is not None:
            self._structure.follow(config.plan)
        elif config.drops is not None or config.factors is not None:
            least = least_paying(config, kept_counts(self._structure, config), self._budgets)
            dropper = Dropper(self._watcher, config, self._work, self._meter, least)
            steps = dropper.passes() * len(self._layers())
            run = lambda: dropper.run(self._layers())  # noqa: E731
            self.dropped = self._timed("structure", run, steps) if steps else run()
            self._allocator = Allocator(self._structure, config, budgets_of(self._structure, config))

    def _timed(self, stage: str, work: Callable[[], Any], layers: int | None = None) -> Any:
        self._meter.start(stage, layers or len(self._layers()))
        started = time.monotonic()
        result = work()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started
        return result

    def _layers(self) -> range:
        """The decoder layers up to the last that holds a matrix to be quantized; nothing reads what comes behind it."""
        plan = self._config.plan
        linears = plan.linears if plan is not None and plan.linears else self._structure.linears
        paths = (*self._structure.experts, *linears)
        return range(1 + max(i for i in range(len(self._runner.layers)) if self._watcher.inside(i, paths)))

    # ---- a pass before the one that rounds

    def _allocate_model(self) -> Plan:
        """Costs of all layers on dense activations, then one program, or one per layer."""
        self._measurer.run(self._layers())
        if self._joint is not None:
            self._finish()
            self._dense = self._runner.states(judged=True)
        if self._config.budget == "model":
            return self._allocator.model(self.layers, self._measurer.linears, self._measurer.scales())
        widths = {path: self._allocator.layer(path, result) for path, result in self.layers.items()}
        return Plan(widths, self._structure.linears)

    def _allocate_blocks(self) -> Plan:
        """The block score: whole layers at the higher width, those first whose MoE block changes its input most."""
        similarity: dict[str, float] = {}
        for i in self._layers():
            with self._runner.loaded(i), ExitStack() as stack:
                changes = {path: BlockChange() for path in self._watcher.inside(i, self._structure.experts)}
                for path, change in changes.items():
                    block = self._structure.model.get_submodule(path.rpartition(".")[0])
                    stack.enter_context(change.observe(block))
                self._runner.advance(i)
                similarity |= {path: change.similarity for path, change in changes.items()}
            self._meter.layer_done()
        return Plan(self._allocator.blocks(similarity), self._structure.linears)

    # ---- the pass that rounds and writes

    def _finish(self) -> None:
        """Run the layers that hold nothing to be quantized, behind those that do."""
        for i in range(len(self._runner.layers))[len(self._layers()) :]:
            with self._runner.loaded(i):
                self._runner.advance(i)

    def _quantize(self, plan: Plan | None, name: str = "layer", judged: bool = False) -> tuple[Plan, list[Path]]:
        """Every layer is rounded and written; without a plan its widths are chosen on the way.

        The next layer sees the rounded outputs of this one, or, with activations="dense", its dense ones. Files begin with
        `name`; for what is to be judged, tokens run through the last layer, too.
        """
        linears = self._structure.linears if plan is None else plan.linears
        widths: dict[str, ExpertWidths] = {}
        files = []
        layers = self._layers()
        runs = judged or plan is None or self._config.rounding == "gptq"
        dense = self._config.activations == "dense" and not judged
        for i in layers:
            with self._runner.loaded(i):
                tensors: dict[str, Tensor] = {}
                self._linears(
                    i, {path: linears[path] for path in self._watcher.inside(i, linears)}, tensors, not dense
                )
                for path in self._watcher.inside(i, self._structure.experts):
                    chosen, packed = self._experts(i, path, None if plan is None else plan.experts[path])
                    widths[path] = chosen
                    self.writer.experts(self._structure.experts[path], chosen, packed, tensors, not dense)
                    del packed
                files.append(self._work.write_layer(i, tensors, name))
                del tensors
                if runs and (judged or i < layers[-1]) and not self._runner.recomputes:
                    self._runner.advance(i)
            self._meter.layer_done()
        if judged:
            self._finish()
        return Plan(widths, linears), files

    def _linears(self, i: int, widths: Mapping[str, int], tensors: dict[str, Tensor], replace: bool) -> None:
        for path, packed in self._watcher.linears(i, widths):
            self.writer.linear(path, packed, widths[path], tensors, replace)

    def _experts(self, i: int, path: str, widths: ExpertWidths | None) -> tuple[ExpertWidths, dict[int, Packed]]:
        """Widths and packed matrices of one experts module; widths that are not given are chosen."""
        if widths is None:
            if self._config.allocation in MEASURED:
                candidates = self._measurer.measure(i, path)
                widths = self._allocator.layer(path, self.layers[path])
                if candidates:
                    return widths, {expert: candidates[expert, widths.gate_up[expert]] for expert in widths.kept}
            else:
                if self._config.allocation != "uniform" or self._config.rounding == "nearest":
                    self._watcher.observe(i, path, None)
                widths = self._allocator.layer(path, self.layers[path])
        return widths, self._round(i, path, widths)

    def _round(self, i: int, path: str, widths: ExpertWidths) -> dict[int, Packed]:
        """Packed matrices of the experts that a plan keeps."""
        experts = self._structure.experts[path]
        kept = list(widths.kept)
        packed: dict[int, Packed] = {}
        if self._config.rounding == "nearest":
            passes: Iterable[Any] = [(kept, None, None)]
        else:
            passes = self._watcher.passes(i, path, kept, ROLES[:1] if self._config.sequential else ROLES)
        for which, hessians, inputs in passes:
            packed |= self._round_run(i, path, widths, which, hessians, inputs)
            self._meter.expert_done(which[-1], experts.num_experts)
        return packed

    def _round_run(
        self,
        i: int,
        path: str,
        widths: ExpertWidths,
        which: list[int],
        hessians: ExpertHessians | None,
        inputs: ExpertInputs,
    ) -> dict[int, Packed]:
        """Packed matrices of some experts at their widths; down projections make up for the rounding of what they read."""
        experts = self._structure.experts[path]
        ranks = {expert: widths.rank_of(expert) for expert in which if widths.rank_of(expert)}
        counted = hessians.roles if hessians is not None else {}
        rounder = ExpertRounder(experts, which, counted, self._config, factors=bool(ranks))
        packed: dict[int, Packed] = {expert: {} for expert in which}
        targets: dict[int, Tensor] | None = None
        for role in ROLES:
            if role == "down" and hessians is not None and self._config.sequential:
                del rounder
                device = experts.matrix(0, experts.projections[0].name).device
                inputs_of = [p for p in experts.projections if p.role != "down"]
                rounded = {
                    expert: {
                        p.name: rebuilt(matrices, p, widths.gate_up[expert], widths.rank_bits).to(device)
                        for p in inputs_of
                    }
                    for expert, matrices in packed.items()
                }
                behind = self._watcher.behind(i, path, rounded, inputs)
                targets = behind.targets()
                rounder = ExpertRounder(experts, which, {role: behind.hessian}, self._config, factors=bool(ranks))
                del rounded, behind
            same: dict[int, list[int]] = {}
            own = widths.of_role(role)
            for expert in which:
                same.setdefault(own[expert], []).append(expert)
            same.pop(0, None)
            for bits, those in same.items():
                for expert, matrices in rounder.round_role(role, those, bits, targets).items():
                    packed[expert] |= matrices
            rounder.factor_role(role, ranks, widths.rank_bits, packed, dict(enumerate(own)), targets)
        return packed
