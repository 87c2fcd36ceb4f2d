# SPDX-License-Identifier: Apache-2.0
"""Hessians of a layer's matrices: sums of x^T x over the tokens that each of them reads.

Every token counts once, sums are float32 and additive, and matrices that read the same input share one. It knows
modules and tokens, not widths, layers or what a Hessian is used for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.models.experts import Experts
from transformers_mcmoe.plan import ROLES
from transformers_mcmoe.threads import at_once, each

# tokens, at least, by which it is found out which linear layers are reached and read the same
PROBED = 2048
# rows of a Hessian that are summed by one product
BLOCK = 512
# share of its mean that is added to the diagonal where a down projection is fitted anew (docs/quantization.md)
RIDGE = 0.1


class Hessian:
    """Sums over the tokens of B matrices that have an input each.

    Sums of large matrices are taken block row by block row from the diagonal on, which is half of the products; `total` is mirrored
    when it is asked for.

    Args:
        total: [B, in, in] float32, sums of x^T x.
        tokens: [B] int64, tokens counted.

    Attributes:
        tokens: as given.
    """

    def __init__(self, total: Tensor, tokens: Tensor) -> None:
        self._total, self.tokens = total, tokens
        self._whole = True

    @classmethod
    def zeros(cls, batch: int, in_features: int, device: torch.device) -> Hessian:
        return cls(torch.zeros(batch, in_features, in_features, device=device), torch.zeros(batch, dtype=torch.int64))

    @property
    def total(self) -> Tensor:
        """[B, in, in] float32, symmetric; not a copy."""
        if not self._whole:
            for _, rows, rest in _blocks(self._total.shape[-1]):
                self._total[:, rest, rows] = self._total[:, rows, rest].transpose(1, 2)
            self._whole = True
        return self._total

    def add(self, index: int, x: Tensor) -> None:
        """Count tokens `x` [n, in] of matrix `index`."""
        x = x.detach().to(self._total.device, torch.float32)
        for start, rows, _ in _blocks(x.shape[1]):
            self._total[index, rows, start:].addmm_(x[:, rows].T, x[:, start:])
        self._whole = self._whole and x.shape[1] <= BLOCK
        self.tokens[index] += x.shape[0]

    def __add__(self, other: Hessian) -> Hessian:
        return Hessian(self.total + other.total, self.tokens + other.tokens)

    def traces(self) -> Tensor:
        """[B] float64, mean of |x|^2 per token: the trace of E[x^T x]."""
        traces = self._total.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64).cpu()
        return traces / self.tokens.clamp(min=1)


def _blocks(columns: int) -> Iterator[tuple[int, slice, slice]]:
    """Block rows of a square matrix: the first, all, and the columns behind the diagonal block."""
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        yield start, slice(start, stop), slice(stop, columns)


class ExpertHessians:
    """Hessians of some experts of a module, one per expert and role.

    Args:
        experts: the module's adapter, with its dense weights.
        which: the experts counted here; tokens of others are passed over.
        counted: the roles that are counted, default all.

    Attributes:
        which: those experts.
        roles: "gate_up" -> Hessian over inputs of the expert, "down" -> over what its down projection reads.
    """

    def __init__(self, experts: Experts, which: Sequence[int], counted: Sequence[str] = ROLES) -> None:
        self._experts, self.which = experts, list(which)
        self._index = {expert: i for i, expert in enumerate(self.which)}
        device = experts.matrix(0, experts.projections[0].name).device
        sizes = {p.role: p.in_features for p in experts.projections if p.role in counted}
        self.roles = {role: Hessian.zeros(len(self.which), size, device) for role, size in sizes.items()}

    def record(self, expert: int, x: Tensor, weights: Tensor | None = None, position: Tensor | None = None) -> None:
        """Count tokens `x` [n, H] that are routed to an expert."""
        index = self._index.get(expert)
        if index is None or x.shape[0] == 0:
            return
        x = x.to(torch.float32)
        read = {"gate_up": x} if "down" not in self.roles else self._experts.inputs(expert, x)
        for role, hessian in self.roles.items():
            hessian.add(index, read[role])

    def __contains__(self, expert: int) -> bool:
        return expert in self._index

    def clear(self, expert: int) -> None:
        """Forget the tokens of an expert."""
        for hessian in self.roles.values():
            hessian.total[self._index[expert]].zero_()
            hessian.tokens[self._index[expert]] = 0

    @staticmethod
    def bytes_per_expert(experts: Experts) -> int:
        """Memory of one expert's Hessians."""
        return 4 * sum(size**2 for size in {p.role: p.in_features for p in experts.projections}.values())


class DownHessians:
    """Hessians of down projections behind rounded input projections, and what these took from the experts' outputs.

    With h what a down projection W read before rounding and h' what it reads now, the output W h is best rebuilt by the
    matrix W + W sum (h - h')^T h' * (sum h'^T h')^-1, a regression on the tokens.

    Args:
        experts: the module's adapter, with its dense weights.
        rounded: expert -> its rounded input projections [out, in] float32 by name.

    Attributes:
        hessian: sums of h'^T h'.
        missing: [B, in, in] float32, sums of (h - h')^T h'; where W has far fewer rows, of (W (h - h'))^T h', [B, out, in].
    """

    def __init__(self, experts: Experts, rounded: Mapping[int, Mapping[str, Tensor]]) -> None:
        self._experts, self._rounded = experts, rounded
        self._index = {expert: i for i, expert in enumerate(rounded)}
        self._down = experts.projections[-1]
        device = experts.matrix(0, self._down.name).device
        self.hessian = Hessian.zeros(len(rounded), self._down.in_features, device)
        # per token, products with W take twice its rows
        self._projected = 2 * self._down.out_features < self._down.in_features
        rows = self._down.out_features if self._projected else self._down.in_features
        self.missing = torch.zeros(len(rounded), rows, self._down.in_features, device=device)

    def record(self, expert: int, x: Tensor, weights: Tensor | None = None, position: Tensor | None = None) -> None:
        """Count tokens `x` [n, H] that are routed to an expert."""
        index = self._index.get(expert)
        if index is None or x.shape[0] == 0:
            return
        x = x.to(torch.float32)
        now = self._experts.inputs(expert, x, self._rounded[expert])["down"]
        lost = self._experts.inputs(expert, x)["down"] - now
        self.hessian.add(index, now)
        if self._projected:
            lost = lost @ self._dense(expert).T
        self.missing[index].addmm_(lost.T, now)

    def __contains__(self, expert: int) -> bool:
        return expert in self._index

    def clear(self, expert: int) -> None:
        """Forget the tokens of an expert."""
        self.hessian.total[self._index[expert]].zero_()
        self.hessian.tokens[self._index[expert]] = 0
        self.missing[self._index[expert]].zero_()

    def targets(self) -> dict[int, Tensor]:
        """The matrices [out, in] float32 that rebuild the experts' outputs best.

        The regression is damped by RIDGE of the mean diagonal: with less it fits the calibration tokens alone.
        """
        total = self.hessian.total  # mirrored once, before threads read it
        # a Hessian, its factor, copies that solving takes, and the matrix twice
        size = 4 * self._down.in_features
        most = at_once(4 * size * self._down.in_features + 2 * size * self._down.out_features, total.device)
        found = each(lambda expert: self._target(expert, total[self._index[expert]]), [*self._index], most)
        return dict(zip(self._index, found, strict=True))

    def _target(self, expert: int, total: Tensor) -> Tensor:
        dense = self._dense(expert)
        damped = total.clone()
        mean = float(damped.diagonal().mean())
        damped.diagonal().add_(RIDGE * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if mean <= 0 or int(info) != 0:
            return dense
        change = torch.cholesky_solve(self.missing[self._index[expert]].T, lower).T
        return dense + (change if self._projected else dense @ change)

    def _dense(self, expert: int) -> Tensor:
        return self._experts.matrix(expert, self._down.name).to(torch.float32)


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
