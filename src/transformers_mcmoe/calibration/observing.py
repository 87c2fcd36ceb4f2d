# SPDX-License-Identifier: Apache-2.0
"""What is seen of a decoder layer while it runs: norms and kinds of its tokens, what it returns, what its block changes.

Knows modules and hooks, not experts or widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformers_mcmoe.calibration.statistics import HELD_OUT


class LayerTokens:
    """What is known of the tokens of a decoder layer's latest call: their hidden states' norms, their sequences.

    Tokens are asked for by their positions among those that the experts were called with: the layer's, several copies of them,
    or those of images, or of text, alone.

    Args:
        images: called during a call of the layer, returns which of its tokens stand for parts of images, [tokens] bool, or None.
        image: what such a token counts relative to one of text.
        share: the share of them in all calibration tokens: counts are 1 on the average over these.
    """

    def __init__(
        self, images: Callable[[], Tensor | None] | None = None, image: float = 1.0, share: float = 0.0
    ) -> None:
        mean = 1 + (image - 1) * share
        self._counts_of = 1 / mean, image / mean  # a token of text, and one of an image
        self._find = images
        self._images: Tensor | None = None
        self._kind: bool | None = None  # what the experts get, if they get one kind of tokens alone
        self._norms: Tensor | None = None
        self._called = 0  # tokens that the experts were called with
        self._rows: tuple[Tensor, Tensor] | None = (
            None  # marks of the tokens that the block got, ascending, and their places
        )
        self._sequences = self._first = self._next = 0
        self._counts: dict[int, int] = {}

    @contextmanager
    def observe(self, layer: nn.Module, experts: nn.Module, block: nn.Module | None = None) -> Iterator[None]:
        """While open, every call of the layer, and of experts in it, is looked at; their first arguments are [.., H].

        With the `block` that calls experts one by one, tokens are found again by their values (`find`).
        """
        self._next = 0
        self._counts.clear()

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
            self._called = x.numel() // x.shape[-1]

        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
            self._norms = x.detach().to(torch.float32).norm(dim=-1).flatten()
            self._images = None if self._find is None else self._find()
            self._sequences = x.shape[0] if x.dim() > 2 else 1
            self._first, self._next = self._next, self._next + self._sequences

        def mark(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
            self._rows = _marks(x).sort(stable=True)

        with ExitStack() as stack:
            stack.enter_context(layer.register_forward_pre_hook(measure, with_kwargs=True))
            stack.enter_context(experts.register_forward_pre_hook(count, with_kwargs=True, prepend=True))
            if block is not None:
                stack.enter_context(block.register_forward_pre_hook(mark, with_kwargs=True))
            yield

    def find(self, x: Tensor) -> Tensor | None:
        """Positions [n] of tokens [n, H] among those that the block got; None where one of them is none of these."""
        if self._rows is None:
            return None
        (known, places), own = self._rows, _marks(x)
        at = torch.searchsorted(known, own).clamp(max=len(known) - 1)
        return places[at] if torch.equal(known[at], own) else None

    def places(self, position: Tensor | None) -> Tensor | None:
        """Where in the layer's tokens those at positions [n] of the experts' are; None where that is not known."""
        if position is None or self._norms is None:
            return None
        if self._called % len(self._norms) == 0:
            return position % len(self._norms)
        if self._images is None:
            return None
        fits = [kind for kind in (True, False) if int((self._images == kind).sum()) == self._called]
        if len(fits) == 1:
            self._kind = fits[0]
        if self._kind not in fits:
            return None
        return (self._images == self._kind).to(position.device).nonzero().flatten()[position]

    def norms(self, position: Tensor | None) -> Tensor | None:
        """Norms [n] of the hidden states; None where positions are not known."""
        places = self.places(position)
        return None if places is None or self._norms is None else self._norms[places]

    def of_images(self, position: Tensor | None) -> Tensor | None:
        """[n] bool on CPU, which tokens are of images; None where none is, or positions are not known."""
        places = None if self._images is None else self.places(position)
        return None if places is None or self._images is None else self._images[places.cpu()]

    def counts(self, position: Tensor | None, n: int) -> Tensor:
        """[n] float32 on CPU, what tokens count in errors."""
        images = self.of_images(position)
        text, image = self._counts_of
        return torch.full((n,), text) if images is None else torch.where(images, image, text)

    def held_out(self, expert: int, position: Tensor | None, n: int, total: int) -> Tensor | None:
        """[n] bool, the next tokens of an expert that are of every HELD_OUT-th of `total` sequences.

        Of the last one where there are fewer; None where there is a single one. Where positions are not known, each
        four tokens of the expert count as a sequence.
        """
        step = min(HELD_OUT, total)
        if step < 2:
            return None
        places = self.places(position)
        if places is None or self._norms is None:
            start = self._counts.get(expert, 0)
            self._counts[expert] = start + n
            sequence = torch.arange(start, start + n) // 4
        else:
            length = len(self._norms) // self._sequences
            sequence = self._first + places // length
        return sequence % step == step - 1


def _marks(x: Tensor) -> Tensor:
    """[n] int64 of tokens [.., H]: equal for equal tokens, else different but for chance."""
    bits = x.detach().reshape(-1, x.shape[-1]).contiguous()
    bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(1 << 62), 1 << 62, (x.shape[-1],), generator=generator).to(x.device)
    return (bits * factors).sum(-1)


def carried(medians: Sequence[float]) -> list[float]:
    """What the relative error of each layer is multiplied by, so that those of different layers compare.

    A change stays in the residual stream: every later layer reads it relative to the hidden states there, and so does the
    head, which counts as half of the layers (docs/quantization.md).

    Args:
        medians: norm of the hidden states behind each layer.
    """
    reads = [1 / max(norm, 1e-30) ** 2 for norm in medians]
    head = len(reads) / 2 * reads[-1]
    return [((sum(reads[i:-1]) + head) / reads[i]) ** 0.5 for i in range(len(reads))]


class Outputs:
    """What a decoder layer returns, against what it returned for the same tokens before it was changed."""

    def __init__(self) -> None:
        self._known: list[Tensor] = []
        self._new: list[Tensor] = []

    @contextmanager
    def observe(self, layer: nn.Module) -> Iterator[None]:
        """While open, every call of the layer is looked at; its first output is [.., H]."""
        self._new = []

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            self._new.append(y.detach().flatten(0, -2).to("cpu", torch.float32))

        with layer.register_forward_hook(keep):
            yield

    def change(self) -> float:
        """Norm of the latest outputs' change from the first ones, 0 for those themselves.

        Relative, as `output_errors` has it: a token's squared change is divided by its norm and by the median norm.
        """
        self._known = self._known or self._new
        before, after = torch.cat(self._known), torch.cat(self._new)
        norm = before.norm(dim=-1).to(torch.float64).clamp(min=1e-15)
        squared = (after - before).square().sum(-1).to(torch.float64)
        return float((squared / (norm * norm.median())).mean().sqrt())


@dataclass
class BlockChange:
    """How much a MoE block changes its input: sums of the cosine between a token's input and output.

    Attributes:
        total: sum of the cosines.
        tokens: tokens counted.
    """

    total: float = 0.0
    tokens: int = 0

    @property
    def similarity(self) -> float:
        """Mean cosine over the tokens, 1 if there were none: nothing is changed."""
        return self.total / self.tokens if self.tokens else 1.0

    @contextmanager
    def observe(self, block: nn.Module) -> Iterator[None]:
        """While open, every call of the block is counted; its first argument and first output are [..., H]."""

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
            y = output[0] if isinstance(output, tuple) else output
            cosine = functional.cosine_similarity(x.to(torch.float32), y.to(torch.float32).view_as(x), dim=-1)
            self.total += float(cosine.sum(dtype=torch.float64))
            self.tokens += cosine.numel()

        with block.register_forward_hook(count, with_kwargs=True):
            yield
