# SPDX-License-Identifier: Apache-2.0
"""What runs a model's decoder layers one after the other on the same tokens, and what its two kinds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.models.stream.checkpoint import Weights


class LastLayer(Exception):
    """Ends a forward pass early."""


class LayerRunner(ABC):
    """Runs calibration tokens through a model layer by layer.

    Use as `for i in range(len(runner.layers)): with runner.loaded(i): runner.replay(i); ...; runner.advance(i)`.

    Attributes:
        weights: the model and its checkpoint.
        layers: paths of the decoder layers, in the order of execution.
        sequences: calibration sequences that are run.
        tokens: [N, T] all of them.
        reason: why the whole model is held in memory, or None.
        recomputes: every run starts from the tokens, so that `advance` is not needed between layers.
        judged: leading sequences that `replay` passes over: what is fitted to the tokens is judged on these.
    """

    weights: Weights
    layers: list[str]
    sequences: int
    tokens: Tensor
    reason: str | None = None
    recomputes = False
    judged = 0

    @property
    @abstractmethod
    def calls(self) -> int:
        """How often `replay` runs a layer."""

    @abstractmethod
    def restart(self, sequences: int | None = None) -> None:
        """Begin again with the first layer's inputs: of the first `sequences`, default all."""

    @abstractmethod
    def outputs(self, sequences: int, path: Path, done: Callable[[], None]) -> Tensor:
        """Hidden states [n, T, H] behind the last layer, of the first sequences, in a file; `restart` comes next.

        `done` is called after every layer.
        """

    @abstractmethod
    def loaded(self, i: int) -> AbstractContextManager[nn.Module]:
        """Layer i with its weights."""

    @abstractmethod
    def replay(self, i: int, batches: int | None = None) -> None:
        """Run layer i on all tokens, or on the first batches of them, for the sake of hooks; nothing is kept."""

    @abstractmethod
    def advance(self, i: int) -> float:
        """As `replay`, but the outputs become the next layer's inputs; returns their Frobenius norm."""

    def states(self, judged: bool = False) -> list[Tensor]:
        """Copies of what enters the next layer, [B, T, H] of every batch, or of those that are judged only.

        None where layers do not run apart.
        """
        return []

    def through(self, i: int, states: Sequence[Tensor]) -> list[Tensor]:
        """What layer i returns for these states of all batches, in the place of its own inputs."""
        raise NotImplementedError("The layers of this model do not run one by one.")

    def divergence(self, states: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
        """Mean KL divergence in nats of the next token's distribution for states behind the last layer, from that for others."""
        raise NotImplementedError("The layers of this model do not run one by one.")

    def losses(self, states: Iterable[Sequence[Tensor]]) -> list[float]:
        """Mean cross entropy in nats of the next token, for states behind the last layer as `through` takes them."""
        raise NotImplementedError("The layers of this model do not run one by one.")


def model_inputs(model: Any, tokens: Tensor) -> dict[str, Any]:
    """Keyword arguments of a forward pass over tokens [N, T]."""
    inputs = {"input_ids": tokens, "use_cache": False}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    return inputs


def squared_norm(x: Tensor) -> float:
    """Sum of squares of a tensor, in float64."""
    return float(x.to(torch.float32).square().sum(dtype=torch.float64))
