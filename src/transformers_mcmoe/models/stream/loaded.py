# SPDX-License-Identifier: Apache-2.0
"""A runner that holds the whole dense model, for models whose layers need each other's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from transformers_mcmoe.calibration.sequences import Sequences
from transformers_mcmoe.distributed import World
from transformers_mcmoe.models.stream.checkpoint import Weights
from transformers_mcmoe.models.stream.runner import (
    HiddenStates,
    LastLayer,
    LayerRunner,
    Norms,
    first_batches,
    model_inputs,
    squared_norms,
)


class LoadedRunner(LayerRunner):
    """Holds the whole dense model; running a layer costs a forward pass that stops behind it."""

    recomputes = True

    def __init__(
        self,
        weights: Weights,
        layers: list[str],
        tokens: Sequences,
        batch_tokens: int,
        reason: str,
        world: World = World(),  # noqa: B008  it has no state
    ) -> None:
        self.weights, self.layers, self.reason, self.sequences = weights, layers, reason, len(tokens)
        self.world = world
        self.tokens, self._batch_tokens = tokens, batch_tokens
        self._batches = tokens.splits(batch_tokens)
        weights.load(list(weights.slices), weights.model)
        weights.tie()
        weights.check_embeddings()

    @property
    def calls(self) -> int:
        return len(self._batches)

    def restart(self, sequences: int | None = None, name: str = "pass", layer: int = 0) -> None:
        self.sequences = min(sequences or len(self.tokens), len(self.tokens))
        self._batches = self.tokens[: self.sequences].splits(self._batch_tokens)

    def reached(self, name: str, most: int) -> int:
        return most  # every run starts from the tokens

    @contextmanager
    def loaded(self, i: int) -> Iterator[nn.Module]:
        yield self.weights.model.get_submodule(self.layers[i])

    def outputs(self, sequences: int, path: Path, done: Callable[[], None]) -> HiddenStates:
        self.restart(sequences)
        kept: HiddenStates | None = None
        left = iter(self._batches)

        def keep(states: Tensor) -> None:
            nonlocal kept
            if kept is None:
                temporary = path.with_name(path.name + ".tmp")
                kept = HiddenStates(temporary, [len(ids) for ids in self.tokens.ids[: self.sequences]], states)
            kept[next(left)] = states

        self._watch(len(self.layers) - 1, self._batches, keep)
        for _ in self.layers:
            done()
        assert kept is not None
        kept.move(path)
        return kept

    def replay(self, i: int, tokens: int | None = None) -> None:
        self._replay(i, first_batches(self._batches, self.tokens, tokens))

    def advance(self, i: int) -> Norms:
        return self._replay(i, self._batches)

    def _replay(self, i: int, batches: Sequence[slice]) -> Norms:
        squares: list[Tensor] = []
        self._watch(i, batches, lambda states: squares.append(squared_norms(states)))
        return Norms.of(squares)

    def _watch(self, i: int, batches: Sequence[slice], seen: Callable[[Tensor], None]) -> None:
        """Run batches up to layer i and hand on what it returns."""

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            seen(output[0] if isinstance(output, tuple) else output)
            raise LastLayer

        handle = self.weights.model.get_submodule(self.layers[i]).register_forward_hook(stop)
        try:
            for part in batches:
                batch = self.tokens.batch(part).to(self.weights.device)
                self.images = None if batch.images is None else batch.images.flatten().cpu()
                try:
                    self.weights.model(**model_inputs(self.weights.model, batch))
                except LastLayer:
                    continue
        finally:
            handle.remove()
