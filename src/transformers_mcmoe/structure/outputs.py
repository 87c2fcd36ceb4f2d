# SPDX-License-Identifier: Apache-2.0
"""What a MoE block would return if some of its experts were gone, for tokens that were recorded once.

The change of a block's output is a combination of its experts' outputs, so that its norm needs only their inner
products: they are kept per token, [T, E, E], and an evaluation costs a pass of the router over T tokens. Knows one block at
a time; which sets of experts are asked for is its caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.calibration.observing import LayerTokens
from transformers_mcmoe.models.experts import FusedExperts, forward_as
from transformers_mcmoe.models.routers import Router

# bytes of all experts' outputs for the tokens that are multiplied at once, and of the inner products of all blocks that
# are looked at together
CHUNK, PRODUCTS = 64 << 20, 192 << 20


class _Routed(Exception):
    """Ends a block's forward pass where its experts begin."""


class BlockOutputs:
    """A MoE block's experts on recorded tokens.

    Attributes:
        products: [T, E', E'] float32, inner products of the outputs of two experts for a token; E' counts one more
            for the input itself where some ids stand for it (Longcat).
        factor: [T] float64, what a token's squared change is multiplied by.
        weights: [T, E'] float32, routing weights of the whole block.

    Args:
        recorder: what was recorded.
    """

    def __init__(self, recorder: BlockRecorder) -> None:
        self._recorder = recorder
        self.products, self.factor = recorder.products(), recorder.factor()
        self.weights = recorder.route(range(recorder.num_experts))
        self._known: dict[tuple[int, ...], float] = {}

    @property
    def num_experts(self) -> int:
        """E."""
        return self._recorder.num_experts

    def error(self, dropped: Sequence[int]) -> float:
        """Norm of the change of the block's output over all tokens when these experts are gone and tokens are routed anew."""
        key = tuple(sorted(dropped))
        if key not in self._known:
            kept = [expert for expert in range(self.num_experts) if expert not in set(key)]
            change = self._recorder.route(kept) - self.weights
            squared = torch.einsum("te,tef,tf->t", change, self.products, change).clamp(min=0).to(torch.float64)
            self._known[key] = float((squared * self.factor).sum().sqrt())
        return self._known[key]

    def tokens(self) -> Tensor:
        """[E] int64, tokens that are routed to each expert."""
        return (self.weights[:, : self.num_experts] != 0).sum(0)

    def saliency(self) -> Tensor:
        """[E] float64: mean over an expert's tokens of routing weight times output norm (REAP, arXiv 2510.13999); 0 if it has none."""
        norms = self.products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().to(torch.float64)
        total = (self.weights.to(torch.float64) * norms).sum(0)[: self.num_experts]
        return total / self.tokens().clamp(min=1)


class BlockRecorder:
    """Records the tokens that enter a MoE block, and how they are routed, while its layer runs.

    Args:
        layer: the decoder layer.
        block: the module that calls the experts.
        experts: adapter of the experts, with their dense weights.
        router: their router.
        relative: divide a token's squared change by its norm and by the median norm, as `output_errors` does.
        most: tokens that are kept at most, as many of each call.
        calls: how often the layer will be run.
        together: blocks that are looked at together, which share the memory for inner products.
        tokens: what will be known of the layer's tokens.
    """

    def __init__(
        self,
        layer: nn.Module,
        block: nn.Module,
        experts: FusedExperts,
        router: Router,
        relative: bool,
        most: int,
        calls: int = 1,
        together: int = 1,
        tokens: LayerTokens | None = None,
    ) -> None:
        self._layer, self._block, self._experts, self._router = layer, block, experts, router
        self._relative = relative
        self.num_experts = experts.num_experts
        self._columns = self.num_experts + (1 if experts.identity_experts else 0)
        self._most = min(most, max(1, PRODUCTS // (4 * self._columns**2 * together)))
        self._each = -(-self._most // calls)
        self._rows: list[Tensor] = []  # of the tokens of each call that are kept
        self._tokens = tokens or LayerTokens()
        self._counts: list[Tensor] = []
        self._x: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._given: list[Tensor] = []  # routing weights as the experts were given them
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # of the router
        self._blocks: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # of the block
        self._direct: bool | None = None

    @property
    def full(self) -> bool:
        """Whether enough tokens are recorded."""
        return sum(map(len, self._x)) >= self._most

    @property
    def empty(self) -> bool:
        """Whether no token reached the experts."""
        return not self._x

    @contextmanager
    def observe(self) -> Iterator[None]:
        """While open, calls are recorded, some tokens of each evenly spread over it."""

        def reach(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not self.full:
                x, index, weights = self._experts.route(*args)
                norms = self._tokens.norms(torch.arange(len(x), device=x.device))
                count = min(len(x), self._each, self._most - sum(map(len, self._x)))
                taken = torch.arange(count, device=x.device) * len(x) // count
                self._rows.append(taken)
                self._x.append(x[taken].detach())
                self._norms.append(torch.zeros_like(x[taken, 0]) if norms is None else norms[taken])
                self._counts.append(self._tokens.counts(torch.arange(len(x)), len(x))[taken.cpu()])
                self._given.append(self._dense(index, weights)[taken])
                # both were called with these tokens a moment ago
                self._calls.append(last["router"])
                self._blocks.append(last["block"])

        last: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if not self.full:
                    last[name] = _copied(args, kwargs)

            return hook

        with ExitStack() as stack:
            stack.enter_context(self._tokens.observe(self._layer, self._experts.module))
            stack.enter_context(self._block.register_forward_pre_hook(keep("block"), with_kwargs=True))
            stack.enter_context(self._router.module.register_forward_pre_hook(keep("router"), with_kwargs=True))
            stack.enter_context(self._experts.module.register_forward_pre_hook(reach))
            yield

    def route(self, kept: Sequence[int]) -> Tensor:
        """[T, E'] float32, the routing weights of every recorded token when only these experts take part."""
        kept = list(kept)
        if len(kept) == self.num_experts and not self._router.is_sliced:
            return torch.cat(self._given)
        with self._router.keeping(kept):
            if self._direct is None:
                self._direct = self._is_direct(kept)
            ask = self._ask_router if self._direct else self._ask_block
            return torch.cat([ask(call)[rows] for call, rows in enumerate(self._rows)])

    def _is_direct(self, kept: Sequence[int]) -> bool:
        """Whether the router returns what the experts are given, so that the rest of the block need not run."""
        try:
            asked = self._ask_router(0)
        except ValueError:
            return False
        return torch.allclose(asked, self._ask_block(0), rtol=1e-3, atol=1e-6)

    def _ask_router(self, call: int) -> Tensor:
        args, kwargs = self._calls[call]
        output = self._router.module(*args, **kwargs)
        found = [n for n, v in enumerate(output) if isinstance(v, Tensor) and not v.is_floating_point()]
        if isinstance(output, Tensor) or len(found) != 1 or output[found[0]].shape != output[found[0] - 1].shape:
            raise ValueError("The router returns scores only.")
        return self._dense(output[found[0]], output[found[0] - 1])

    def _ask_block(self, call: int) -> Tensor:
        args, kwargs = self._blocks[call]
        seen: list[Tensor] = []

        def reach(*given: Tensor) -> Tensor:
            _, index, weights = self._experts.route(*given)
            seen.append(self._dense(index, weights))
            raise _Routed

        with forward_as(self._experts.module, reach), suppress(_Routed):
            self._block(*args, **kwargs)
        return seen[0]

    def _dense(self, index: Tensor, weights: Tensor) -> Tensor:
        """[n, E'] from ids and weights [n, K]; ids of no expert count nowhere."""
        known = self.num_experts + self._experts.identity_experts
        # ids of all experts that return their input share a column; those of none have one that is cut off
        column = torch.where(index < known, index, self._columns).clamp(max=self._columns)
        column = torch.where((index >= self.num_experts) & (index < known), self.num_experts, column)
        dense = torch.zeros(len(index), self._columns + 1, dtype=torch.float32, device=index.device)
        return dense.scatter_add_(1, column.long(), weights.detach().to(torch.float32))[:, : self._columns]

    def products(self) -> Tensor:
        """[T, E', E'] float32, inner products of the experts' outputs for every recorded token."""
        every = torch.cat(self._x)
        found = torch.empty(len(every), self._columns, self._columns, device=every.device)
        step = max(1, CHUNK // (4 * self._columns * every.shape[1]))
        for start in range(0, len(every), step):
            x = every[start : start + step]
            outputs = [self._experts.run(expert, x).to(torch.float32) for expert in range(self.num_experts)]
            if self._experts.identity_experts:
                outputs.append(x.to(torch.float32))
            stacked = torch.stack(outputs, 1)
            torch.bmm(stacked, stacked.transpose(1, 2), out=found[start : start + step])
        return found

    def factor(self) -> Tensor:
        """[T] float64, see `BlockOutputs`."""
        device = self._x[0].device
        norms = torch.cat([own.to(device) for own in self._norms]).to(torch.float64)
        counts = torch.cat(self._counts).to(device, torch.float64)
        known = norms > 0  # others are of tokens whose places in the layer are not known
        if not self._relative or not bool(known.any()):
            return counts
        median = norms[known].median()
        return counts / (torch.where(known, norms, median) * median)


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments, with tensors that a module could write to copied."""

    def copy(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    return tuple(map(copy, args)), {name: copy(value) for name, value in kwargs.items()}
