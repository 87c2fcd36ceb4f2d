# SPDX-License-Identifier: Apache-2.0
"""The stage before all others: which experts are dropped, and what ranks the others get, on the tokens of a few sequences.

Knows layers, and what is kept of them; how a set is searched for (`structure`) is not its business.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transformers_mcmoe.calibration.observing import carried
from transformers_mcmoe.config import MCMoEConfig, PruneConfig, RankConfig
from transformers_mcmoe.models.experts import FusedExperts
from transformers_mcmoe.pipeline.kept import drops, looks, loss_sequences, most_rank, routers_for
from transformers_mcmoe.pipeline.watching import Watcher
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.structure import (
    BlockOutputs,
    BlockRecorder,
    leave_one_out,
    ranks_for,
    reception_field,
    search,
)
from transformers_mcmoe.workdir import WorkDir, mapped_tensor


@dataclass
class Dropped:
    """What the stage found.

    Attributes:
        importance: by experts path, of every expert; {} where the method needs none.
        errors: by experts path, norm of the change of the block's output by what was dropped, relative to the hidden states.
    """

    importance: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


class Dropper:
    """Drops experts of one model, and gives ranks to those that are kept.

    Args:
        watcher: looks at its layers.
        config: of the compression.
        work: where hidden states lie.
        meter: shows progress.
        least: experts that a layer keeps in any case.

    Attributes:
        routers: by experts path.
        found: what was measured.
    """

    def __init__(self, watcher: Watcher, config: MCMoEConfig, work: WorkDir, meter: Meter, least: int = 1) -> None:
        self._watcher, self._meter, self._work = watcher, meter, work
        self._structure, self._runner = watcher.structure, watcher.runner
        self._relative = config.eps == "final"  # as errors of widths are
        self._compressed = config.activations == "compressed"
        self._seed, self._rank, self._prunes = config.seed, config.factors, config.drops is not None
        self._config = config.prune or PruneConfig()
        self._looks = looks(config)
        self._least = least
        self._together = 1  # layers whose inner products are in memory at once
        self.routers = routers_for(self._structure, config.drops) if self._looks else {}
        length = self._runner.tokens.length
        self._sequences = min(len(self._runner.tokens), -(-self._config.tokens // length))
        self.found = Dropped()

    @property
    def _measures(self) -> bool:
        """Whether importance is needed."""
        ranks = self._rank is not None and self._rank.exponent > 0
        return ranks or (self._prunes and not self._config.even)

    def passes(self) -> int:
        """How often layers are run."""
        return self._measures + self._prunes

    def run(self, layers: range) -> Dropped:
        """Drop experts of all layers: the structure says which are kept, and routers choose among those from now on."""
        if self._measures:
            self._runner.restart(self._sequences)
            measure = self._measure_loss if self._config.importance == "loss" else self._measure
            measure(layers)
        if self._prunes:
            self._drop_all(layers)
        if self._rank is not None:
            self._give_ranks(self._rank)
        self._runner.restart()
        return self.found

    def _give_ranks(self, config: RankConfig) -> None:
        self._structure.rank_bits = config.bits
        for path, experts in self._structure.experts.items():
            kept, known = self._structure.kept_of(path), self.found.importance.get(path)
            importance = [1.0 if known is None else known[expert] for expert in kept]
            most = most_rank(experts, config.base)
            own = ranks_for(importance, config.given, most, exponent=config.exponent, step=config.step)
            ranks = dict(zip(kept, own, strict=True))
            self._structure.ranks[path] = tuple(ranks.get(expert, 0) for expert in range(experts.num_experts))

    def _drop_all(self, layers: range) -> None:
        numbers = drops(self._structure, self._config, self.routers, self.found.importance, self._least)
        self._runner.restart(self._sequences)
        states = self._runner.states()
        self._together = self._config.field if states and not self._config.even else 1
        for group in self._groups(layers, bool(states)):
            states = self._drop(group, states, numbers)
            for _ in group:
                self._meter.layer_done()

    def _groups(self, layers: range, apart: bool) -> Iterator[list[int]]:
        """Layers whose sets are chosen together, with those between that have no experts."""
        most = self._config.field if apart and not self._config.even else 1
        group: list[int] = []
        for i in layers:
            group.append(i)
            if sum(bool(self._inside(n)) for n in group) == most:
                yield group
                group = []
        if group:
            yield group

    def _inside(self, i: int) -> list[str]:
        return self._watcher.inside(i, self._structure.experts)

    # ---- importance

    def _measure(self, layers: range) -> None:
        """Leave-one-out errors of all blocks, on dense activations; relative ones are carried on to the later layers."""
        medians = []
        for i in layers:
            with self._runner.loaded(i):
                for path, outputs in self.look(i, self._inside(i)).items():
                    self.found.importance[path] = leave_one_out(outputs)
                    del outputs
                medians.append(self._runner.advance(i).median)
            self._meter.layer_done()
        if self._relative:
            for i, factor in zip(layers, carried(medians), strict=True):
                for path in self._inside(i):
                    self.found.importance[path] = [factor * value for value in self.found.importance[path]]

    def _measure_loss(self, layers: range) -> None:
        """How much the model's loss rises without an expert: what a layer returns without it runs through the later layers."""
        length = self._runner.tokens.length
        self._runner.restart(loss_sequences(length))
        states = self._runner.states()
        everything = range(len(self._runner.layers))
        total = sum(experts.num_experts for experts in self._structure.experts.values())
        shapes = [state.shape for state in states]
        rows = sum(shape[0] * shape[1] for shape in shapes)
        path = self._work.scratch / "without_experts.bin"
        kept = mapped_tensor(path, (total, rows, *states[0].shape[2:]), states[0].dtype)

        def put(n: int, found: Sequence[Tensor]) -> None:
            kept[n] = torch.cat([own.flatten(0, 1) for own in found])

        def get(n: int) -> list[Tensor]:
            parts = kept[n].split([shape[0] * shape[1] for shape in shapes])
            return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

        names: list[tuple[str, int]] = []
        for i in everything:
            with self._runner.loaded(i):
                for n in range(len(names)):
                    put(n, self._runner.through(i, get(n)))
                for module in self._inside(i):
                    count = self._structure.experts[module].num_experts
                    for expert in range(count):
                        with self.routers[module].keeping([e for e in range(count) if e != expert]):
                            put(len(names), self._runner.through(i, states))
                        names.append((module, expert))
                states = self._runner.through(i, states)
            if i in layers:
                self._meter.layer_done()
        (dense,) = self._runner.losses([states])
        losses = self._runner.losses(get(n) for n in range(len(names)))
        for (module, _), loss in zip(names, losses, strict=True):
            # an expert without which the loss falls matters least, but a layer's share must stay finite
            self.found.importance.setdefault(module, []).append(max(loss - dense, 1e-6))
        path.unlink()

    def look(self, i: int, paths: Sequence[str], states: Sequence[Tensor] | None = None) -> dict[str, BlockOutputs]:
        """The blocks of a layer on the tokens that enter it; `states` are run through it in the place of its own inputs."""
        with self._recording(i, paths) as recorders:
            if states is None:
                with ExitStack() as stack:
                    for path in paths:
                        stack.enter_context(self._structure.experts[path].idle())
                    self._runner.replay(i)
            else:
                states[:] = self._runner.through(i, states)  # type: ignore[index]
        for path, recorder in recorders.items():
            if recorder.empty:
                raise ValueError(self._watcher.unreached(path))
        return {path: BlockOutputs(recorder) for path, recorder in recorders.items()}

    @contextmanager
    def _recording(self, i: int, paths: Sequence[str]) -> Iterator[dict[str, BlockRecorder]]:
        model = self._structure.model
        layer = model.get_submodule(self._runner.layers[i])
        recorders = {}
        with ExitStack() as stack:
            for path in paths:
                experts = self._structure.experts[path]
                assert isinstance(experts, FusedExperts)
                block = model.get_submodule(path.rpartition(".")[0])
                recorders[path] = BlockRecorder(
                    layer,
                    block,
                    experts,
                    self.routers[path],
                    self._relative,
                    self._config.tokens,
                    self._runner.calls,
                    self._together,
                    self._watcher.tokens_of_layer(),
                )
                stack.enter_context(recorders[path].observe())
            yield recorders

    # ---- sets

    def _drop(self, group: Sequence[int], states: list[Tensor], numbers: dict[str, int]) -> list[Tensor]:
        """Drop experts of the layers of a group; returns what enters the next one."""
        with ExitStack() as stack:
            for i in group:
                stack.enter_context(self._runner.loaded(i))
            entered, dense = states, [state.clone() for state in states]
            chosen: dict[int, list[dict[str, tuple[int, ...]]]] = {}
            outputs: dict[str, BlockOutputs] = {}
            for i in group:
                found = self.look(i, self._inside(i), dense if states else None)
                chosen[i] = self._candidates(found, numbers)
                outputs |= found
            best = [own[0] for own in chosen.values()]
            if states and any(len(own) > 1 for own in chosen.values()):
                best = self._combined(group, chosen, entered, dense)
            for own in best:
                for path, dropped in own.items():
                    self.found.errors[path] = outputs[path].error(dropped)
            del outputs
            for own in best:
                for path, dropped in own.items():
                    count = self._structure.experts[path].num_experts
                    if dropped:
                        self._structure.keep(path, (expert for expert in range(count) if expert not in dropped))
            if not states or not self._compressed:
                return dense
            for i in group:
                entered = self._runner.through(i, entered)
            return entered

    def _candidates(self, found: dict[str, BlockOutputs], numbers: dict[str, int]) -> list[dict[str, tuple[int, ...]]]:
        """The best sets of a layer's blocks, the n-th of each together."""
        ranked = {path: self._ranked(path, outputs, numbers[path]) for path, outputs in found.items()}
        depth = max([1, *map(len, ranked.values())])
        return [{path: sets[min(n, len(sets) - 1)] for path, sets in ranked.items()} for n in range(depth)]

    def _ranked(self, path: str, outputs: BlockOutputs, count: int) -> list[tuple[int, ...]]:
        config, groups = self._config, self.routers[path].groups
        if count == 0:
            return [()]
        if config.method in ("moe_i2", "naee"):
            return search(
                outputs,
                count,
                best=1 if config.even else config.candidates,
                groups=groups,
                seed=self._seed,
                population=config.population,
                generations=config.generations,
            )
        if config.method == "random":
            scores = random.Random(f"{self._seed} {path}").sample(range(outputs.num_experts), outputs.num_experts)
        else:
            scores = (outputs.tokens() if config.method == "frequency" else outputs.saliency()).tolist()
        return [_lowest(scores, count, groups)]

    def _combined(
        self,
        group: Sequence[int],
        chosen: dict[int, list[dict[str, tuple[int, ...]]]],
        entered: list[Tensor],
        dense: list[Tensor],
    ) -> list[dict[str, tuple[int, ...]]]:
        """The combination of the layers' candidates whose joint output is nearest to that of the dense layers."""
        counted = {path: self._structure.experts[path].num_experts for i in group for path in self._inside(i)}

        def run(states: list[Tensor], n: int, candidate: dict[str, tuple[int, ...]]) -> list[Tensor]:
            with ExitStack() as stack:
                for path, dropped in candidate.items():
                    kept = [expert for expert in range(counted[path]) if expert not in dropped]
                    stack.enter_context(self.routers[path].keeping(kept))
                return self._runner.through(group[n], states)

        def error(states: list[Tensor]) -> float:
            return sum(_change(a, b, self._relative) for a, b in zip(states, dense, strict=True))

        return reception_field([chosen[i] for i in group], entered, run, error)


def _lowest(scores: Sequence[float], count: int, groups: int) -> tuple[int, ...]:
    """The experts with the lowest scores, as many of each group."""
    size = len(scores) // groups
    members: Iterable[range] = (range(start, start + size) for start in range(0, len(scores), size))
    return tuple(sorted(e for own in members for e in sorted(own, key=lambda e: scores[e])[: count // groups]))


def _change(states: Tensor, dense: Tensor, relative: bool) -> float:
    """Squared norm of the change of hidden states; `relative` as in `output_errors`."""
    squared = (states - dense).to(torch.float32).square().sum(-1).to(torch.float64)
    if relative:
        norm = dense.to(torch.float32).norm(dim=-1).to(torch.float64).clamp(min=1e-15)
        squared = squared / (norm * norm.median())
    return float(squared.sum())
