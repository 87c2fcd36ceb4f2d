# SPDX-License-Identifier: Apache-2.0
"""Hessians of a layer's matrices: sums of x^T x over the tokens that each of them reads.

Every token counts once, sums are float32 and additive, and matrices that read the same input share one. It knows
modules and tokens, not widths, layers or what a Hessian is used for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.models.experts import Experts


@dataclass
class Hessian:
    """Sums over the tokens of B matrices that have an input each.

    Attributes:
        total: [B, in, in] float32, sums of x^T x.
        tokens: [B] int64, tokens counted.
    """

    total: Tensor
    tokens: Tensor

    @classmethod
    def zeros(cls, batch: int, in_features: int, device: torch.device) -> Hessian:
        return cls(torch.zeros(batch, in_features, in_features, device=device), torch.zeros(batch, dtype=torch.int64))

    def add(self, index: int, x: Tensor) -> None:
        """Count tokens `x` [n, in] of matrix `index`."""
        x = x.detach().to(self.total.device, torch.float32)
        self.total[index].addmm_(x.T, x)
        self.tokens[index] += x.shape[0]

    def __add__(self, other: Hessian) -> Hessian:
        return Hessian(self.total + other.total, self.tokens + other.tokens)

    def traces(self) -> Tensor:
        """[B] float64, mean of |x|^2 per token: the trace of E[x^T x]."""
        traces = self.total.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64).cpu()
        return traces / self.tokens.clamp(min=1)


class ExpertHessians:
    """Hessians of some experts of a module, one per expert and role.

    Args:
        experts: the module's adapter, with its dense weights.
        which: the experts counted here; tokens of others are passed over.

    Attributes:
        which: those experts.
        roles: "gate_up" -> Hessian over inputs of the expert, "down" -> over what its down projection reads.
    """

    def __init__(self, experts: Experts, which: Sequence[int]) -> None:
        self._experts, self.which = experts, list(which)
        self._index = {expert: i for i, expert in enumerate(self.which)}
        device = experts.matrix(0, experts.projections[0].name).device
        sizes = {p.role: p.in_features for p in experts.projections}
        self.roles = {role: Hessian.zeros(len(self.which), size, device) for role, size in sizes.items()}

    def record(self, expert: int, x: Tensor, weights: Tensor | None = None, position: Tensor | None = None) -> None:
        """Count tokens `x` [n, H] that are routed to an expert."""
        index = self._index.get(expert)
        if index is None or x.shape[0] == 0:
            return
        for role, value in self._experts.inputs(expert, x.to(torch.float32)).items():
            self.roles[role].add(index, value)

    def clear(self, expert: int) -> None:
        """Forget the tokens of an expert."""
        for hessian in self.roles.values():
            hessian.total[self._index[expert]].zero_()
            hessian.tokens[self._index[expert]] = 0

    @staticmethod
    def bytes_per_expert(experts: Experts) -> int:
        """Memory of one expert's Hessians."""
        return 4 * sum(size**2 for size in {p.role: p.in_features for p in experts.projections}.values())


def probe_inputs(
    modules: Mapping[str, nn.Module], experts: Sequence[Experts], run: Callable[[], Any]
) -> tuple[dict[str, list[str]], bool]:
    """Which linear layers read the very same tensor, and whether any of them reads what experts return.

    Args:
        modules: linear layers by path.
        experts: the experts in the same pass; they are idle meanwhile.
        run: one short forward pass through all of them.

    Returns:
        The first path of each group (q of q, k and v; gate of gate and up) -> all of its paths; layers that the pass
        does not reach are in no group. And the answer to the second question.
    """
    passes = []
    for value in (0.0, 1.0):
        with ExitStack() as stack:
            for module in experts:
                stack.enter_context(module.idle(value))
            passes.append(_first_inputs(modules, run))
    groups: dict[str, list[str]] = {}
    for path, x in passes[0].items():
        leader = next((other for other in groups if _is_same(passes[0][other], x)), path)
        groups.setdefault(leader, []).append(path)
    return groups, any(not torch.equal(x, passes[1][path]) for path, x in passes[0].items())


def _first_inputs(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(path, args[0])

        return keep

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(hook(path)))
        run()
    return seen


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


@contextmanager
def observe_linears(modules: Mapping[str, nn.Module], hessians: Mapping[str, Hessian]) -> Iterator[None]:
    """While open, the inputs of linear layers are counted, each in the Hessian of its path."""

    def hook(path: str) -> Any:
        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            hessians[path].add(0, args[0].reshape(-1, args[0].shape[-1]))

        return count

    with ExitStack() as stack:
        for path in hessians:
            stack.enter_context(modules[path].register_forward_pre_hook(hook(path)))
        yield
