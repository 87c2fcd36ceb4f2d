# SPDX-License-Identifier: Apache-2.0
"""What runs a model's decoder layers one after the other on the same tokens, and what its two kinds share."""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.calibration.sequences import Batch, Sequences
from transformers_mcmoe.distributed import World
from transformers_mcmoe.models.stream.checkpoint import Weights
from transformers_mcmoe.workdir import mapped_tensor


class LastLayer(Exception):
    """Ends a forward pass early."""


@dataclass(frozen=True)
class Norms:
    """Norms of the hidden states behind a layer: the Frobenius norm of all, and the median over tokens, which attention sinks do not move."""

    total: float
    median: float

    @classmethod
    def of(cls, squares: Sequence[Tensor]) -> Norms:
        """From the squared norm of every token [n] float64, batch by batch."""
        every = torch.cat(list(squares))
        return cls(float(sum(float(own.sum()) for own in squares)) ** 0.5, float(every.median()) ** 0.5)


class LayerRunner(ABC):
    """Runs calibration tokens through a model layer by layer.

    Use as `for i in range(len(runner.layers)): with runner.loaded(i): runner.replay(i); ...; runner.advance(i)`.

    Attributes:
        weights: the model and its checkpoint.
        world: the ranks that share the work of `advance`; all hold all hidden states.
        layers: paths of the decoder layers, in the order of execution.
        sequences: calibration sequences that are run.
        tokens: all of them.
        reason: why the whole model is held in memory, or None.
        recomputes: every run starts from the tokens, so that `advance` is not needed between layers.
        judged: leading sequences that `replay` passes over: what is fitted to the tokens is judged on these.
        spared: names of passes whose hidden states are kept when another pass begins.
        images: [tokens] bool of the batch that runs, or ran last, those that stand for parts of images; None for text.
    """

    weights: Weights
    world: World = World()
    layers: list[str]
    sequences: int
    tokens: Sequences
    reason: str | None = None
    recomputes = False
    judged = 0
    spared: frozenset[str] = frozenset()
    images: Tensor | None = None

    @property
    @abstractmethod
    def calls(self) -> int:
        """How often `replay` runs a layer."""

    @abstractmethod
    def restart(self, sequences: int | None = None, name: str = "pass", layer: int = 0) -> None:
        """Begin again with the first layer's inputs: of the first `sequences`, default all.

        Hidden states are kept under the `name` of the pass; one that was ended can go on with a later `layer`, see `reached`.
        """

    @abstractmethod
    def reached(self, name: str, most: int) -> int:
        """The last layer, up to `most`, that a pass of this name can go on with: its inputs are kept."""

    @abstractmethod
    def outputs(self, sequences: int, path: Path, done: Callable[[], None]) -> HiddenStates:
        """Hidden states behind the last layer, of the first sequences, in a file; `restart` comes next.

        `done` is called after every layer.
        """

    @abstractmethod
    def loaded(self, i: int) -> AbstractContextManager[nn.Module]:
        """Layer i with its weights."""

    @abstractmethod
    def replay(self, i: int, tokens: int | None = None) -> None:
        """Run layer i on all tokens, or on the first batches that have so many, for the sake of hooks; nothing is kept."""

    @abstractmethod
    def advance(self, i: int) -> Norms:
        """As `replay`, but the outputs become the next layer's inputs."""

    def states(self, judged: bool = False) -> list[Tensor]:
        """Copies of what enters the next layer, [B, T, H] of every batch, or of those that are judged only.

        There are none where layers do not run apart.
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


class HiddenStates:
    """The hidden states of sequences at one place of a model, in a memory-mapped file: they cost disk, not memory.

    Args:
        path: the file; one of the same size is taken as it is.
        lengths: tokens of each sequence.
        like: [.., T, H] hidden states that give the other sizes and the dtype.
    """

    def __init__(self, path: Path, lengths: Sequence[int], like: Tensor) -> None:
        self.path = path
        self._starts = [0, *itertools.accumulate(lengths)]
        self._lengths = list(lengths)
        self._data = mapped_tensor(path, (self._starts[-1], *like.shape[2:]), like.dtype)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, part: slice) -> Tensor:
        """[B, T, H] of sequences of one length."""
        start, stop, _ = part.indices(len(self))
        return self._data[self._starts[start] : self._starts[stop]].view(
            stop - start, self._lengths[start], *self._data.shape[1:]
        )

    def __setitem__(self, part: slice, value: Tensor) -> None:
        self[part].copy_(value)

    def move(self, path: Path, durable: bool = True) -> None:
        """Give the file another name, if it shall be `durable` once it is whole on the disk."""
        if durable:
            with self.path.open("r+b") as file:
                os.fsync(file.fileno())
        os.replace(self.path, path)
        self.path = path


def model_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of a forward pass over a batch, without a cache."""
    inputs = {"input_ids": batch.ids, "use_cache": False, **batch.inputs}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = batch.ids
    return inputs


def first_batches(batches: Sequence[slice], sequences: Sequences, tokens: int | None) -> Sequence[slice]:
    """The first batches that have so many tokens together, or all; one of text, which is as large as batches may be."""
    if tokens is None:
        return batches
    if sequences.are_text:
        return batches[:1]  # as many as they may have
    sizes = itertools.accumulate(sum(map(len, sequences.ids[batch])) for batch in batches)
    return batches[: next((n for n, size in enumerate(sizes, 1) if size >= tokens), len(batches))]


def squared_norms(x: Tensor) -> Tensor:
    """Squared norm [n] float64 of every token of [.., H], on CPU."""
    return x.detach().to(torch.float32).square().sum(-1, dtype=torch.float64).flatten().cpu()
