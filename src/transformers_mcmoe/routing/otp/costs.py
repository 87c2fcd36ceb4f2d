# SPDX-License-Identifier: Apache-2.0
"""What the routed slots of calibration tokens cost to skip, measured on the unpruned model.

Knows models and hooks; what is learned from the costs is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.calibration.sequences import Batch
from transformers_mcmoe.config import OTPConfig
from transformers_mcmoe.models.experts import FusedExperts, layer_of
from transformers_mcmoe.models.stream import model_inputs
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.routing import routing_arguments, sort_slots
from transformers_mcmoe.routing.ratios import SAME_SUM


@dataclass
class Trace:
    """What the slots of one layer were measured to cost, a part per batch.

    Attributes:
        x: [n, H] tokens, in the model's dtype.
        weights: [n, K] float32 routing weights, the largest first.
        costs: [n, K - 1] float32, what dropping each slot after the first costs; NaN where it leads to no expert.
        normalized: whether the routing weights of every token had the same sum.
    """

    x: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    costs: list[Tensor] = field(default_factory=list)
    normalized: bool = True

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, weights and costs of all batches."""
        return torch.cat(self.x), torch.cat(self.weights), torch.cat(self.costs)


class CostMeter:
    """Measures costs of slots.

    Args:
        model: the model, without pruning, with frozen parameters.
        found: adapters of its experts modules, by path.
        otp: the options.
        generator: draws labels.
        meter: shows how far it is.
    """

    def __init__(
        self,
        model: Any,
        found: Mapping[str, FusedExperts],
        otp: OTPConfig,
        generator: torch.Generator,
        meter: Meter,
    ) -> None:
        self._model, self._found, self._otp = model, found, otp
        self._generator, self._meter = generator, meter

    def measure(self, batches: list[Batch], stage: str) -> dict[str, Trace]:
        """Traces by experts path."""
        traces = {path: Trace() for path in self._found}
        self._meter.start(stage, len(batches), "batch")
        for batch in batches:
            if self._otp.objective == "logits":
                self._by_output(batch, traces)
            else:
                self._by_size(batch, traces)
            self._meter.layer_done()
        return traces

    def _by_output(self, batch: Batch, traces: Mapping[str, Trace]) -> None:
        """Half the square of the change's product with the gradient of the log-likelihood of labels drawn by the model.

        Its mean over such labels is the second-order KL divergence from the unpruned model, over all later tokens.
        """
        with ExitStack() as stack:
            for path in self._found:
                stack.enter_context(self._watched(path, traces[path], None))
            embeddings = self._model.get_input_embeddings()
            # parameters are frozen: the graph begins here
            begin = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
            stack.callback(begin.remove)
            with torch.enable_grad():
                logits = self._model(**model_inputs(self._model, batch)).logits.to(torch.float32)
                logits = batch.predictions(logits)
                chances = logits.detach().softmax(-1).to("cpu")
                labels = torch.multinomial(chances, 1, generator=self._generator).to(logits.device)
                logits.log_softmax(-1).gather(-1, labels).sum().backward()

    def _by_size(self, batch: Batch, traces: Mapping[str, Trace]) -> None:
        """The square of the change over the norm of the token's hidden state and that of the median token's."""
        with ExitStack() as stack, torch.no_grad():
            for path in self._found:
                norms: list[Tensor] = []
                layer = self._model.get_submodule(".".join(map(str, layer_of(path))))
                stack.callback(layer.register_forward_pre_hook(_keep_norms(norms), with_kwargs=True).remove)
                stack.enter_context(self._watched(path, traces[path], norms))
            self._model(**model_inputs(self._model, batch))

    @contextmanager
    def _watched(self, path: str, trace: Trace, norms: list[Tensor] | None) -> Iterator[None]:
        """While open, calls of an experts module are traced: with norms [T] at once, else when their gradient is known."""
        experts = self._found[path]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            call = [part.detach() for part in experts.route(*routing_arguments(experts, args, kwargs))]
            if norms is not None:
                norm = norms.pop()
                self._add(path, trace, call, lambda d: d.square().sum(-1) / (norm * norm.median()))
                return

            def learn(gradient: Tensor) -> None:
                g = gradient.detach().reshape(call[0].shape).to(torch.float32)
                self._add(path, trace, call, lambda d: (d * g).sum(-1).square() / 2)

            output.register_hook(learn)

        with self._model.get_submodule(path).register_forward_hook(hook, with_kwargs=True):
            yield

    @torch.no_grad()
    def _add(self, path: str, trace: Trace, call: Sequence[Tensor], cost: Callable[[Tensor], Tensor]) -> None:
        """Trace one call, tokens, ids and weights: slot j costs what keeping j - 1 slots instead of j changes."""
        x, index, weights = call
        module, experts = self._model.get_submodule(path), self._found[path]
        sums = weights.to(torch.float32).sum(-1)
        trace.normalized &= bool(sums.max() - sums.min() <= SAME_SUM * sums.max())
        renormalize = self._otp.renormalize if self._otp.renormalize is not None else trace.normalized
        ordered, _, _, order = sort_slots(index, weights)
        index = index.gather(-1, order)
        ones = torch.ones_like(weights[:, :1])
        prefix, before, costs = torch.zeros_like(x, dtype=torch.float32), None, []
        for slot in range(index.shape[1]):
            y = module.forward(x, index[:, slot : slot + 1], ones).reshape(x.shape)
            prefix = prefix + ordered[:, slot : slot + 1] * y.to(torch.float32)
            left = ordered[:, : slot + 1].sum(-1, keepdim=True).clamp(min=1e-30)
            now = prefix * (ordered.sum(-1, keepdim=True) / left) if renormalize else prefix
            if before is not None:
                costs.append(cost(now - before).masked_fill(index[:, slot] >= experts.num_experts, torch.nan))
            before = now
        trace.x.append(x.to("cpu"))
        trace.weights.append(ordered.to("cpu"))
        trace.costs.append(torch.stack(costs, dim=-1).to("cpu") if costs else ordered[:, :0].to("cpu"))


def _keep_norms(norms: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        norms.append(x.detach().to(torch.float32).flatten(0, -2).norm(dim=-1).clamp(min=1e-6))

    return hook
