# SPDX-License-Identifier: Apache-2.0
"""The stages over the decoder layers of one model: measure, allocate, round, write.

Knows the order of things and what of them is finished; what is done to a layer (`measuring`, `quantizing`) is not its business.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from transformers_mcmoe.calibration.observing import BlockChange
from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.models.stream import LayerRunner
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline.allocating import Allocator
from transformers_mcmoe.pipeline.dropping import Dropped, Dropper
from transformers_mcmoe.pipeline.joint import JointProgram, Measured
from transformers_mcmoe.pipeline.journal import Journal, Record
from transformers_mcmoe.pipeline.kept import kept_counts, least_paying
from transformers_mcmoe.pipeline.measuring import Measurer
from transformers_mcmoe.pipeline.prepare import budgets_of
from transformers_mcmoe.pipeline.quantizing import LayerQuantizer
from transformers_mcmoe.pipeline.watching import Watcher
from transformers_mcmoe.pipeline.writing import Writer
from transformers_mcmoe.plan import ExpertWidths, Plan
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.tuning import Teacher, sequences_for
from transformers_mcmoe.workdir import WorkDir

# how often what a plan drops is tried on the dense model
CORRECTIONS = 3
# name of the record that both plans are compared, and of the pass that measures
COMPARED = "compared"
ALLOCATE = "allocate"


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
        scratch: where this process puts what others do not read.
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
        self._work, self._meter, self.scratch = work, meter, work.scratch
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
            runner.spared = frozenset({ALLOCATE, "layers", "joints"})  # what lies behind the last layer is compared
        self._measurer = Measurer(self._watcher, meter, self._joint)
        self._quantizer = LayerQuantizer(self._watcher, self._measurer, config, work, meter)
        self._journal = Journal(work, runner.world)
        # whether hidden states behind the last layer are still needed
        self._comparing = self._joint is not None and not self._journal.knows(COMPARED)
        self.layers, self.fallbacks = self._watcher.layers, self._watcher.fallbacks
        self.seconds: dict[str, float] = {}
        self._earlier = 0.0  # seconds of the stage's layers that a run before this one has finished
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
        elif config.budget == "model" and config.allocation != "uniform":
            plan = self._timed("allocate", self._allocate_model)
            if self._joint is not None:
                return self._better(plan)
        return self._timed("quantize", lambda: self._quantize(plan))

    def _better(self, widths: Plan) -> tuple[Plan, list[Path]]:
        """Widths alone, or the plan of the joint program: whichever is nearer to the dense model on the judged sequences."""
        assert self._joint is not None
        errors = {path: {None: result.errors, **result.role_errors} for path, result in self.layers.items()}
        measured = Measured(errors, self._measurer.linears, self._measurer.scales())
        if self._planned(widths, measured) is None:
            return self._timed("quantize", lambda: self._quantize(widths))
        start = len(self.fallbacks)
        plan, files = self._timed("quantize", lambda: self._quantize(widths, judged=True))
        found = {"widths": self._journal.once("divergence of widths", self._divergence)}
        joint = self._corrected(widths, measured, found["widths"])
        if joint is None:
            self._journal.once(COMPARED, lambda: None)
            return plan, files
        before, known, middle = self.writer, copy.deepcopy(self.layers), len(self.fallbacks)
        self.writer = Writer(self._structure, self._runner.weights.targets)
        self._structure.follow(joint)
        chosen, others = self._timed("quantize the joint plan", lambda: self._quantize(joint, "joint", judged=True))
        found["joint"] = self._journal.once("divergence of the joint plan", self._divergence)
        self.compared = self._journal.once(COMPARED, lambda: found)
        if found["joint"] < found["widths"]:
            plan, files = chosen, others
            del self.fallbacks[start:middle]  # notes of the plan that is not taken
        else:
            self._structure.keep_all()
            self.writer = before
            self.layers.update(known)
            del self.fallbacks[middle:]
        return plan, files

    def _corrected(self, widths: Plan, measured: Measured, divergence: float) -> Plan | None:
        """The joint plan, after what it drops has been tried on the dense model; None if it is the plan of widths.

        Absent experts can cost the output more than rounding errors of the same norm do: a pass of the judged sequences
        without them says how much more, in units of what the plan of widths costs, and the program is solved again.
        """
        assert self._joint is not None
        unit = divergence / self._joint.costs(widths, measured)[0]
        absence = 1.0
        for turn in range(CORRECTIONS):
            joint = self._planned(widths, measured, absence)
            if joint is None:
                return None
            _, dropped = self._joint.costs(joint, measured)
            if not dropped:
                return joint
            self._structure.follow(joint)
            tried = self._journal.once(f"without them, {turn}", lambda: self._timed("try without them", self._judge))
            ratio = tried / (unit * dropped * absence)
            self._structure.keep_all()
            if ratio < 1.1:
                return joint
            absence *= ratio
        return self._planned(widths, measured, absence)

    def _planned(self, widths: Plan, measured: Measured, absence: float = 1.0) -> Plan | None:
        """What the joint program chooses, on all ranks: a solver that is stopped by the clock may choose otherwise on each."""
        joint = self._joint
        assert joint is not None
        return self._runner.world.first(lambda: joint.plan(widths, measured, absence))

    def _judge(self) -> float:
        """KL divergence of the dense layers, with their routers as they are now, from the dense model on the judged sequences."""
        self._runner.restart(self._runner.judged)
        for i in range(len(self._runner.layers)):
            with self._runner.loaded(i):
                self._runner.advance(i)
            self._meter.layer_done()
        return self._divergence()

    def _divergence(self) -> float:
        """KL divergence of what lies behind the last layer now from the dense model, on the judged sequences."""
        return self._runner.divergence(self._runner.states(judged=True), self._dense)

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
            known = self._journal.once(
                "structure",
                lambda: {
                    "found": asdict(self._timed("structure", run, steps) if steps else run()),
                    "seconds": self.seconds.get("structure"),
                    "kept": self._structure.kept,
                    "ranks": self._structure.ranks,
                },
            )
            self.dropped = Dropped(**known["found"])
            if known["seconds"] is not None:
                self.seconds["structure"] = known["seconds"]
            if not (self._structure.kept or self._structure.ranks):  # a run before this one has found them
                for path, kept in known["kept"].items():
                    self._structure.keep(path, kept)
                self._structure.ranks |= {path: tuple(ranks) for path, ranks in known["ranks"].items()}
                self._structure.rank_bits = config.factors.bits if config.factors is not None else 0
            self._allocator = Allocator(self._structure, config, budgets_of(self._structure, config))

    def _timed(self, stage: str, work: Callable[[], Any], layers: int | None = None) -> Any:
        self._meter.start(stage, layers or len(self._layers()))
        started = time.monotonic()
        result = work()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._earlier + time.monotonic() - started
        self._earlier = 0.0
        return result

    def _layers(self) -> range:
        """The decoder layers up to the last that holds a matrix to be quantized; nothing reads what comes behind it."""
        plan = self._config.plan
        linears = plan.linears if plan is not None and plan.linears else self._structure.linears
        paths = (*self._structure.experts, *linears)
        return range(1 + max(i for i in range(len(self._runner.layers)) if self._watcher.inside(i, paths)))

    def _pass(
        self,
        name: str,
        layers: range,
        work: Callable[[int], Record],
        recall: Callable[[int, Record], None],
        *,
        sequences: int | None = None,
        advances: bool = True,
        stays: bool = False,
    ) -> list[Record]:
        """Do the work on every layer in its turn, but for those that a run before this one has finished.

        Args:
            name: of the pass, for its records.
            layers: which.
            work: on a layer that is loaded.
            recall: takes what it came to, in its place.
            sequences: how many are run, default all.
            advances: whether the work on a layer makes the next one's inputs.
            stays: whether what lies behind the last layer is needed.
        """
        records = self._journal.records(name, len(layers))
        whole = len(records) == len(layers)
        if advances and (stays or not whole):
            records = records[: self._runner.reached(name, len(records))]
        for i, record in zip(layers, records, strict=False):
            self.fallbacks += record.fallbacks
            recall(i, record)
        self._meter.known(len(records))
        self._earlier += sum(record.seconds for record in records)
        if not whole or stays:
            self._runner.restart(sequences, name, len(records) if advances else 0)
        for i in layers[len(records) :]:
            started, before = time.monotonic(), len(self.fallbacks)
            with self._runner.loaded(i):
                record = work(i)
            record.seconds, record.fallbacks = time.monotonic() - started, self.fallbacks[before:]
            self._journal.write(name, i, record)
            records.append(record)
            self._meter.layer_done()
        return records

    # ---- a pass before the one that rounds

    def _allocate_model(self) -> Plan:
        """Costs of all layers on dense activations, then one program, or one per layer."""
        layers, judged = self._layers(), self._joint is not None
        stays = self._comparing
        everything = range(len(self._runner.layers)) if judged else layers

        def work(i: int) -> Record:
            return self._measurer.layer(i) if i in layers else self._pass_over(i)

        def recall(i: int, record: Record) -> None:
            if i in layers:
                self._measurer.recall(i, record)

        self._pass(ALLOCATE, everything, work, recall, sequences=self._measurer.sequences, stays=stays)
        if stays:
            self._dense = self._runner.states(judged=True)
        if self._config.budget == "model":
            return self._kept(
                lambda: self._allocator.model(self.layers, self._measurer.linears, self._measurer.scales())
            )
        widths = {path: self._allocator.layer(path, result) for path, result in self.layers.items()}
        return Plan(widths, self._structure.linears)

    def _kept(self, choose: Callable[[], Plan]) -> Plan:
        """A plan that is chosen once, by one rank: a run that goes on keeps to it."""
        plan = Plan.from_dict(self._journal.once("plan", lambda: choose().to_dict()))
        return Plan(plan.experts, {path: plan.linears[path] for path in self._structure.linears})

    def _pass_over(self, i: int) -> Record:
        """Go on behind a layer that holds nothing to be quantized."""
        self._runner.advance(i)
        return Record()

    def _allocate_blocks(self) -> Plan:
        """The block score: whole layers at the higher width, those first whose MoE block changes its input most."""
        similarity: dict[str, float] = {}

        def work(i: int) -> Record:
            with ExitStack() as stack:
                changes = {path: BlockChange() for path in self._watcher.inside(i, self._structure.experts)}
                for path, change in changes.items():
                    block = self._structure.model.get_submodule(path.rpartition(".")[0])
                    stack.enter_context(change.observe(block))
                self._runner.advance(i)
            similarity.update({path: change.similarity for path, change in changes.items()})
            return Record({path: similarity[path] for path in changes})

        self._pass(ALLOCATE, self._layers(), work, lambda i, record: similarity.update(record.data))
        return self._kept(lambda: Plan(self._allocator.blocks(similarity), self._structure.linears))

    # ---- the pass that rounds and writes

    def _quantize(self, plan: Plan | None, name: str = "layer", judged: bool = False) -> tuple[Plan, list[Path]]:
        """Every layer is rounded and written; without a plan its widths are chosen on the way.

        The next layer sees the rounded outputs of this one, or, with activations="dense", its dense ones. Files begin with
        `name`; for what is to be judged, tokens run through the last layer, too.
        """
        config, layers, writer = self._config, self._layers(), self.writer
        everything = range(len(self._runner.layers)) if judged else layers
        runs = judged or plan is None or config.rounding == "gptq"
        replace = judged or config.activations == "compressed"

        def work(i: int) -> Record:
            if i not in layers:
                return self._pass_over(i)
            record = self._quantizer.layer(i, plan, self._allocator, writer, name, replace)
            if runs and (judged or i < layers[-1]) and not self._runner.recomputes:
                self._runner.advance(i)
            return record

        def recall(i: int, record: Record) -> None:
            if i in layers:
                self._quantizer.recall(record, writer, replace and self._runner.recomputes)

        records = self._pass(f"{name}s", everything, work, recall, advances=runs, stays=judged and self._comparing)[
            : len(layers)
        ]
        known = [Plan.from_dict(record.data["plan"]) for record in records]
        experts = {path: widths for own in known for path, widths in own.experts.items()}
        linears = self._structure.linears if plan is None else plan.linears
        return Plan(experts, linears), [file for record in records for file in self._quantizer.files(record)]
