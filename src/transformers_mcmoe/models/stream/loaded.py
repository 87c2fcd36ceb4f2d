# SPDX-License-Identifier: Apache-2.0
"""A runner that holds the whole dense model, for models whose layers need each other's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from transformers_mcmoe.models.stream.checkpoint import Weights
from transformers_mcmoe.models.stream.runner import LastLayer, LayerRunner, model_inputs, squared_norm
from transformers_mcmoe.workdir import mapped_tensor


class LoadedRunner(LayerRunner):
    """Holds the whole dense model; running a layer costs a forward pass that stops behind it."""

    recomputes = True

    def __init__(self, weights: Weights, layers: list[str], tokens: Tensor, batch: int, reason: str) -> None:
        self.weights, self.layers, self.reason, self.sequences = weights, layers, reason, len(tokens)
        self.tokens, self._batch = tokens, batch
        self._batches = list(tokens.split(batch))
        weights.load(list(weights.slices), weights.model)
        weights.tie()
        weights.check_embeddings()

    @property
    def calls(self) -> int:
        return len(self._batches)

    def restart(self, sequences: int | None = None) -> None:
        self.sequences = min(sequences or len(self.tokens), len(self.tokens))
        self._batches = list(self.tokens[: self.sequences].split(self._batch))

    @contextmanager
    def loaded(self, i: int) -> Iterator[nn.Module]:
        yield self.weights.model.get_submodule(self.layers[i])

    def outputs(self, sequences: int, path: Path, done: Callable[[], None]) -> Tensor:
        self.restart(sequences)
        kept: Tensor | None = None
        start = 0

        def keep(states: Tensor) -> None:
            nonlocal kept, start
            if kept is None:
                kept = mapped_tensor(path, (self.sequences, *states.shape[1:]), states.dtype)
            kept[start : start + len(states)] = states
            start += len(states)

        self._watch(len(self.layers) - 1, self._batches, keep)
        for _ in self.layers:
            done()
        assert kept is not None
        return kept

    def replay(self, i: int, batches: int | None = None) -> None:
        self._replay(i, self._batches[:batches])

    def advance(self, i: int) -> float:
        return self._replay(i, self._batches)

    def _replay(self, i: int, batches: Sequence[Tensor]) -> float:
        squared = 0.0

        def add(states: Tensor) -> None:
            nonlocal squared
            squared += squared_norm(states)

        self._watch(i, batches, add)
        return squared**0.5

    def _watch(self, i: int, batches: Sequence[Tensor], seen: Callable[[Tensor], None]) -> None:
        """Run batches up to layer i and hand on what it returns."""

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            seen(output[0] if isinstance(output, tuple) else output)
            raise LastLayer

        handle = self.weights.model.get_submodule(self.layers[i]).register_forward_hook(stop)
        try:
            for tokens in batches:
                try:
                    self.weights.model(**model_inputs(self.weights.model, tokens.to(self.weights.device)))
                except LastLayer:
                    continue
        finally:
            handle.remove()
