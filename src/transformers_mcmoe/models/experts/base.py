# SPDX-License-Identifier: Apache-2.0
"""What the pipeline needs of an experts module, and how its forward is exchanged for a while."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# called with (expert, its tokens [n, H], their routing weights [n] or None where the block applies them outside, their
# positions [n] among the tokens that the module was called with or None where a child is called with its own only)
# and gives what is left to do with them, which may be done beside that of other experts, or None
Record = Callable[[int, Tensor, Tensor | None, Tensor | None], Callable[[], None] | None]
# rows of a half-precision matrix product on CPU, see `Experts.in_blocks`
BLOCK = 128


@dataclass(frozen=True)
class Projection:
    """One matrix that every expert of a module has; `role` is "gate_up" (reads the hidden state) or "down"."""

    name: str
    role: str
    out_features: int
    in_features: int


class Experts(ABC):
    """What the pipeline needs of an experts module; the subclasses know where its matrices lie.

    Attributes:
        path: module path in the model.
        module: the module itself.
        num_experts: E.
        projections: the matrices of one expert, inputs first.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        self.module: Any = module  # its attributes are the model's own
        self.num_experts = 0
        self.projections: tuple[Projection, ...] = ()

    @abstractmethod
    def matrix(self, expert: int, projection: str) -> Tensor:
        """View [out, in] of an expert's matrix; writing to it writes to the module."""

    @abstractmethod
    def bias(self, expert: int, projection: str) -> Tensor | None:
        """View [out] of the bias that belongs to a matrix."""

    @abstractmethod
    def run(
        self, expert: int, x: Tensor, matrices: Mapping[str, Tensor] | None = None, inner: Tensor | None = None
    ) -> Tensor:
        """Output [n, H] of one expert for tokens [n, H], with its own or the given matrices [out, in].

        `inner` [n, I] may be what its down projection reads, where that is known.
        """

    @abstractmethod
    def inputs(self, expert: int, x: Tensor, matrices: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the matrices of each role read for tokens `x` [n, H]: "gate_up" -> [n, H], "down" -> [n, I].

        `matrices` [out, in] replace the expert's own; they hold its input projections at least.
        """

    def tensor(self, expert: int, leaf: str) -> str:
        """Module path of an expert's packed matrix."""
        return f"{self.path}.{expert}.{leaf}"

    def drop(self, expert: int) -> None:
        """Make an expert return zeros (for the pass that propagates a plan that drops it)."""
        last = self.projections[-1].name
        self.matrix(expert, last).zero_()
        if (bias := self.bias(expert, last)) is not None:
            bias.zero_()

    @abstractmethod
    def observe(self, record: Record) -> AbstractContextManager[None]:
        """While open, every call of the module hands each routed expert's tokens to `record`."""

    @abstractmethod
    def idle(self, value: float = 0.0) -> AbstractContextManager[None]:
        """While open, experts are not run: each returns `value` in all places."""

    @abstractmethod
    def in_blocks(self) -> AbstractContextManager[None]:
        """While open, the module runs its experts on padded blocks of BLOCK tokens, with the same results but rounding.

        On CPU, torch multiplies half-precision matrices with oneDNN, which keeps a buffer of the weights' size for
        every number of rows it meets, up to 1024 of them; with one number there is one.
        """


@contextmanager
def forward_as(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While open, a module runs another forward; whatever it ran before comes back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def in_blocks(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`run` on blocks of BLOCK rows of `x` [n, H], the last one padded with zeros."""
    rows = x.shape[0]
    if rows == 0 or x.dim() != 2:
        return run(x)
    padded = functional.pad(x, (0, 0, 0, -rows % BLOCK))
    return torch.cat([run(block) for block in padded.split(BLOCK)])[:rows]
