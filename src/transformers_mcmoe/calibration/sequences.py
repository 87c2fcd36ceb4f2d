# SPDX-License-Identifier: Apache-2.0
"""Calibration sequences: token ids, and, for vision-language models, what else the model is given with them.

Text gives sequences of one length, samples with images each have their own: they are never padded, so that every token
that a layer sees is one. Knows neither texts nor models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# inputs of an image processor are kept up to so many bytes; beyond, they are made again when they are needed
KEPT = 64 << 20


@dataclass(frozen=True)
class Batch:
    """Sequences of one length that a model is run on together.

    Attributes:
        ids: [B, T] int64.
        inputs: what the model is given beside them, such as pixel values, by name of the argument; {} for text.
        images: [B, T] bool, tokens that stand for parts of an image; None for text.
    """

    ids: Tensor
    inputs: Mapping[str, Any]
    images: Tensor | None = None

    def numel(self) -> int:
        """Its tokens."""
        return self.ids.numel()

    def predictions(self, logits: Tensor) -> Tensor:
        """[n, V] of logits [B, T, V]: without those of positions before a part of an image, which no model writes."""
        if self.images is None:
            return logits.flatten(0, 1)
        ends = torch.ones_like(self.images[:, :1])
        return logits[torch.cat([~self.images[:, 1:], ends], dim=1)]

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.inputs.items()}
        return Batch(self.ids.to(device), inputs, None if self.images is None else self.images.to(device))


class Sequences:
    """Token sequences of a calibration.

    Args:
        ids: [N, T] int64, or with `inputs` one [T] for each sequence, which may differ in length.
        inputs: called with the number of a sequence, returns what the model is given beside its ids; None for text. A
            sequence that gets something is run alone.
        images: [T] bool for each sequence, as in `Batch`; None for text.
        mark: what tells the images from others that give the same ids.
    """

    def __init__(
        self,
        ids: Tensor | Sequence[Tensor],
        inputs: Callable[[int], Mapping[str, Any]] | None = None,
        images: Sequence[Tensor] | None = None,
        mark: str = "",
    ) -> None:
        self.ids = list(ids)
        self.mark = mark
        self._inputs = inputs
        self._images = list(images) if images is not None else None

    @classmethod
    def of(cls, given: Sequences | Tensor) -> Sequences:
        """Token ids [N, T] as sequences; sequences as they are."""
        return given if isinstance(given, Sequences) else cls(given)

    @classmethod
    def joined(cls, parts: Sequence[Sequences], order: Sequence[int]) -> Sequences:
        """All sequences of several, in an order of their numbers in the whole."""
        ids = [row for part in parts for row in part.ids]
        places = [(part, n) for part in parts for n in range(len(part))]
        if all(part._inputs is None for part in parts):
            return cls([ids[n] for n in order])

        def inputs(n: int) -> Mapping[str, Any]:
            part, own = places[order[n]]
            return part.inputs(own)

        images = [places[n][0].images(places[n][1]) for n in order]
        return cls([ids[n] for n in order], inputs, images, "".join(part.mark for part in parts))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Sequences:
        numbers = range(len(self))[part]
        inputs = self._inputs
        own = None if inputs is None else (lambda n: inputs(numbers[n]))
        return Sequences(self.ids[part], own, None if self._images is None else self._images[part], self.mark)

    def cut(self, tokens: int) -> Sequences:
        """The first sequences, about so many tokens together, one at least; a longer text is cut, one with images is not."""
        own = self[: max(1, tokens // self.length)]
        return Sequences([row[:tokens] for row in own.ids]) if own.are_text else own

    def scored(self, n: int) -> Tensor:
        """[T] bool, positions of a sequence that predict: not those before a part of an image, which no model writes."""
        return torch.cat([~self.images(n)[1:], torch.ones(1, dtype=torch.bool)])

    @property
    def are_text(self) -> bool:
        """Whether no sequence has anything but token ids."""
        return self._inputs is None

    @property
    def length(self) -> int:
        """Tokens of a sequence, on the average where they differ."""
        return max(1, self.numel() // max(1, len(self)))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.ids), default=0)

    def numel(self, sequences: int | None = None) -> int:
        """Tokens of the first sequences, default of all."""
        return sum(map(len, self.ids[:sequences]))

    def image_tokens(self) -> int:
        """Tokens that stand for parts of images."""
        return 0 if self._images is None else sum(int(own.sum()) for own in self._images)

    def inputs(self, n: int) -> Mapping[str, Any]:
        """What the model is given beside the ids of a sequence."""
        return {} if self._inputs is None else self._inputs(n)

    def images(self, n: int) -> Tensor:
        """[T] bool, the tokens of a sequence that stand for parts of images."""
        return torch.zeros(len(self.ids[n]), dtype=torch.bool) if self._images is None else self._images[n]

    def splits(self, tokens: int) -> list[slice]:
        """Runs of text sequences of up to so many tokens, in their order; where there are images, every sequence alone."""
        most = max(1, tokens // max(1, self.longest)) if self.are_text else 1
        return [slice(start, min(start + most, len(self))) for start in range(0, len(self), most)]

    def batch(self, part: slice) -> Batch:
        """Some sequences, as `splits` gives them."""
        ids = torch.stack(self.ids[part])
        return Batch(ids, {}) if self.are_text else Batch(ids, self.inputs(part.start), self.images(part.start)[None])

    def batches(self, tokens: int) -> Iterator[Batch]:
        """All sequences in batches of up to so many tokens; a longer sequence is one."""
        return (self.batch(part) for part in self.splits(tokens))

    def fingerprint(self) -> str:
        """SHA-256 of token ids and images: tells whether two figures, or two compressions, are of the same data."""
        digest = hashlib.sha256(self.mark.encode())
        for row in self.ids:
            digest.update(row.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Kept:
    """Inputs of sequences, kept while they are few; others are made again whenever they are asked for."""

    def __init__(self, make: Callable[[int], Mapping[str, Any]]) -> None:
        self._make, self._known, self._bytes = make, dict[int, Mapping[str, Any]](), 0

    def __call__(self, n: int) -> Mapping[str, Any]:
        return self._known[n] if n in self._known else self._make(n)

    def put(self, n: int, made: Mapping[str, Any]) -> None:
        """Keep inputs, if there is room."""
        size = sum(x.nbytes for x in made.values() if isinstance(x, Tensor))
        if self._bytes + size <= KEPT:
            self._known[n] = made
            self._bytes += size
