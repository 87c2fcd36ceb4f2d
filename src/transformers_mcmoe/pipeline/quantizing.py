# SPDX-License-Identifier: Apache-2.0
"""Rounds the decoder layer that is in memory and writes it: its linear layers first, then its experts.

Knows the order of things inside a layer; how a matrix is rounded (`rounding`) or named (`writing`) is not its business, nor
which layer comes when (`job`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from transformers_mcmoe.calibration.hessians import ExpertHessians
from transformers_mcmoe.calibration.statistics import ExpertInputs
from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.pipeline.allocating import MEASURED, Allocator
from transformers_mcmoe.pipeline.journal import Record
from transformers_mcmoe.pipeline.measuring import Measurer
from transformers_mcmoe.pipeline.rounding import ExpertRounder, Packed, rebuilt
from transformers_mcmoe.pipeline.watching import Watcher
from transformers_mcmoe.pipeline.writing import Writer
from transformers_mcmoe.plan import ROLES, ExpertWidths, Plan
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.workdir import WorkDir


class LayerQuantizer:
    """Rounds and writes layers.

    Args:
        watcher: looks at them.
        measurer: measures experts whose widths are not chosen yet.
        config: of the compression.
        work: where they are written.
        meter: shows progress.
    """

    def __init__(self, watcher: Watcher, measurer: Measurer, config: MCMoEConfig, work: WorkDir, meter: Meter) -> None:
        self._watcher, self._measurer, self._config = watcher, measurer, config
        self._structure, self._work, self._meter = watcher.structure, work, meter

    def layer(
        self, i: int, plan: Plan | None, allocator: Allocator, writer: Writer, name: str, replace: bool
    ) -> Record:
        """Round and write layer i.

        Args:
            i: the layer, which is loaded.
            plan: its widths; None chooses them on the way.
            allocator: does that.
            writer: knows names.
            name: that the file begins with.
            replace: whether the layer in memory gets the rounded weights.
        """
        record = Record()
        tensors: dict[str, Tensor] = {}
        widths: dict[str, ExpertWidths] = {}
        linears = self._structure.linears if plan is None else plan.linears
        own = {path: linears[path] for path in self._watcher.inside(i, linears)}
        for path, packed in self._watcher.linears(i, own):
            writer.linear(path, packed, own[path], tensors, replace)
        for path in self._watcher.inside(i, self._structure.experts):
            widths[path], matrices = self._experts(i, path, None if plan is None else plan.experts[path], allocator)
            writer.experts(self._structure.experts[path], widths[path], matrices, tensors, replace)
            del matrices
        record.data |= {"files": self._write(i, tensors, name), "plan": Plan(widths, own).to_dict()}
        self._watcher.remember(i, record)
        return record

    def _write(self, i: int, tensors: dict[str, Tensor], name: str) -> list[str]:
        """Write a layer, every rank its part; returns the names of all parts."""
        world = self._watcher.runner.world
        if world.size == 1:
            return [self._work.write_layer(i, tensors, name).name]
        mine = set(world.deal(list(tensors), [float(x.numel()) for x in tensors.values()]))
        part = {key: x for key, x in tensors.items() if key in mine}
        return world.gather(self._work.write_layer(i, part, name, f"-{world.rank:05d}").name)

    def recall(self, record: Record, writer: Writer, replace: bool) -> None:
        """What `layer` did, in a run before this one."""
        self._watcher.recall(record)
        plan = Plan.from_dict(record.data["plan"])
        tensors = {key: x for file in self.files(record) for key, x in load_file(file).items()}
        rewritten: dict[str, Tensor] = {}
        for path, bits in plan.linears.items():
            writer.linear(path, tensors[writer.published(f"{path}.weight")], bits, rewritten, replace)
        for path, widths in plan.experts.items():
            experts = self._structure.experts[path]
            writer.experts(experts, widths, writer.packed(experts, tensors), rewritten, replace)

    def files(self, record: Record) -> list[Path]:
        """The files that a layer was written to."""
        return [self._work.path / file for file in record.data["files"]]

    def _experts(
        self, i: int, path: str, widths: ExpertWidths | None, allocator: Allocator
    ) -> tuple[ExpertWidths, dict[int, Packed]]:
        """Widths and packed matrices of one experts module; widths that are not given are chosen."""
        if widths is None:
            if self._config.allocation in MEASURED:
                candidates = self._measurer.measure(i, path)
                widths = self._chosen(path, allocator)
                if candidates is not None:
                    chosen = ((expert, widths.gate_up[expert]) for expert in widths.kept)
                    return widths, self._union({own[0]: candidates[own] for own in chosen if own in candidates})
            else:
                if self._config.allocation != "uniform" or self._config.rounding == "nearest":
                    self._watcher.observe(i, path, None)
                widths = self._chosen(path, allocator)
        return widths, self._round(i, path, widths)

    def _chosen(self, path: str, allocator: Allocator) -> ExpertWidths:
        """Widths of a module under its own budget, the same on all ranks."""
        return self._watcher.runner.world.first(lambda: allocator.layer(path, self._watcher.layers[path]))

    def _round(self, i: int, path: str, widths: ExpertWidths) -> dict[int, Packed]:
        """Packed matrices of the experts that a plan keeps."""
        experts = self._structure.experts[path]
        kept = list(widths.kept)
        mine = self._watcher.deal(path, kept)
        packed: dict[int, Packed] = {}
        if self._config.rounding == "nearest":
            passes: Iterable[Any] = [(mine, None, None)] if mine else []
        else:
            passes = self._watcher.passes(i, path, mine, ROLES[:1] if self._config.sequential else ROLES)
        for which, hessians, inputs in passes:
            packed |= self._round_run(i, path, widths, which, hessians, inputs)
            self._meter.expert_done(which[-1], experts.num_experts)
        packed = self._union(packed)
        if missing := [expert for expert in kept if expert not in packed]:
            raise RuntimeError(
                f"No rank has rounded the experts {missing} of '{path}'; start all ranks on equal machines."
            )
        return packed

    def _union(self, packed: Mapping[int, Packed]) -> dict[int, Packed]:
        """The packed matrices of all ranks."""
        flat = {(expert, name): matrix for expert, own in packed.items() for name, matrix in own.items()}
        found: dict[int, Packed] = {}
        for (expert, name), matrix in self._watcher.runner.world.union(flat).items():
            found.setdefault(expert, {})[name] = matrix
        return found

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
        bits = max(widths.gate_up)  # of all, where it matters
        rounder = ExpertRounder(experts, which, counted, self._config, factors=bool(ranks), bits=bits)
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
                hessian = {role: behind.hessian}
                rounder = ExpertRounder(experts, which, hessian, self._config, factors=bool(ranks), bits=bits)
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
