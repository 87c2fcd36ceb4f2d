# SPDX-License-Identifier: Apache-2.0
"""What a change inside one decoder layer does to the model's output: short sequences that are run to the end.

A probe is dense up to layer i, goes through layer i as it is then, and through the dense layers behind it. Streamed,
all probes advance together, layer by layer, so that the model is read once for all of them. Knows layers and tokens;
what was changed in a layer is its caller's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transformers_mcmoe.models.stream.runner import model_inputs
from transformers_mcmoe.workdir import mapped_tensor

if TYPE_CHECKING:
    from transformers_mcmoe.models.stream.loaded import LoadedRunner
    from transformers_mcmoe.models.stream.streamed import LayerStream


class Probes(ABC):
    """Probe sequences, dense and with changed layers.

    Use as `probes.advance(i)` with the dense layer i, then `probes.branch(i, name)` for every change made to it; the
    layer's changes are not seen by other probes.
    """

    @abstractmethod
    def advance(self, i: int) -> None:
        """Run all probes through layer i, which is dense."""

    @abstractmethod
    def branch(self, i: int, name: str) -> None:
        """A further probe, which goes through layer i as it is now."""

    @abstractmethod
    def divergences(self) -> dict[str, float]:
        """KL divergence, in nats per token, of each probe's predictions from the dense model's; once, at the end."""


class StreamedProbes(Probes):
    """Probes of a model whose layers are in memory one at a time; hidden states lie in a mapped file.

    Args:
        stream: the model's runner.
        tokens: [N, T] token ids.
        path: file for the hidden states.
        most: probes that there may be, the dense one not counted.
    """

    def __init__(self, stream: LayerStream, tokens: Tensor, path: Path, most: int) -> None:
        self._stream, self._tokens = stream, tokens
        hidden, self._arguments = stream.arguments(tokens)
        self._states = mapped_tensor(path, (1 + most, *hidden.shape), hidden.dtype)
        self._states[0] = hidden
        self._before = hidden
        self._names: list[str] = []

    def advance(self, i: int) -> None:
        self._before = self._states[0].clone()
        for n in range(1 + len(self._names)):
            self._states[n] = self._stream.call(i, self._states[n], self._arguments[i])

    def branch(self, i: int, name: str) -> None:
        self._names.append(name)
        self._states[len(self._names)] = self._stream.call(i, self._before, self._arguments[i])

    def divergences(self) -> dict[str, float]:
        found = dict.fromkeys(self._names, 0.0)
        with self._stream.with_head():
            for row in range(len(self._tokens)):
                part = slice(row, row + 1)
                dense = _log_probabilities(self._stream.finish(self._tokens[part], self._states[0, part]))
                for n, name in enumerate(self._names, start=1):
                    logits = self._stream.finish(self._tokens[part], self._states[n, part])
                    found[name] += _divergence(dense, logits) / len(self._tokens)
        return found


class LoadedProbes(Probes):
    """Probes of a model that is in memory as a whole: each is a forward pass of it."""

    def __init__(self, runner: LoadedRunner, tokens: Tensor) -> None:
        self._model = runner.weights.model
        self._inputs = [model_inputs(self._model, row[None].to(runner.weights.device)) for row in tokens]
        self._dense = [_log_probabilities(self._logits(inputs)) for inputs in self._inputs]
        self._found: dict[str, float] = {}

    def advance(self, i: int) -> None:
        """Nothing: every pass starts from the tokens."""

    def branch(self, i: int, name: str) -> None:
        parts = zip(self._dense, self._inputs, strict=True)
        self._found[name] = sum(_divergence(dense, self._logits(inputs)) for dense, inputs in parts) / len(self._dense)

    def divergences(self) -> dict[str, float]:
        return self._found

    def _logits(self, inputs: dict[str, Any]) -> Tensor:
        return self._model(**inputs).logits


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.float32), dim=-1)


def _divergence(dense: Tensor, logits: Tensor) -> float:
    """Mean over tokens of KL(dense || other), from log-probabilities and logits [1, T, V]."""
    other = _log_probabilities(logits)
    return max(0.0, float((dense.exp() * (dense - other)).sum(-1).mean()))
