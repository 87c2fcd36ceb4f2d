# SPDX-License-Identifier: Apache-2.0
"""Experts whose weights are stacked in a few tensors: the classes that follow transformers' experts contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations import moe

from transformers_mcmoe.kernels.reference import ACTIVATIONS
from transformers_mcmoe.models.experts.base import Experts, Projection, Record, forward_as, in_blocks
from transformers_mcmoe.threads import at_once, each

FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


class FusedExperts(Experts):
    """Modules called as `experts(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K])` with stacked weights.

    Covers every class decorated with transformers' `use_experts_implementation`, whose five flags it reads.
    """

    identity_experts = 0  # ids from E on that return their input (Longcat); all others from E on are skipped

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, module)
        for flag, default in zip(FLAGS, (True, False, False, False, True), strict=True):
            setattr(self, flag, bool(getattr(module, flag, default)))
        self._read_shapes()

    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool

    def _read_shapes(self) -> None:
        down = self._stack("down_proj")
        self.num_experts = down.shape[0]
        hidden, inner = (down.shape[2], down.shape[1]) if self.is_transposed else (down.shape[1], down.shape[2])
        inputs = ("gate_proj", "up_proj") if self.has_gate else ("up_proj",)
        self.projections = (
            *(Projection(name, "gate_up", inner, hidden) for name in inputs),
            Projection("down_proj", "down", hidden, inner),
        )

    def _stack(self, name: str) -> Tensor:
        return getattr(self.module, name).data

    def parameter_names(self) -> tuple[str, ...]:
        """Names, relative to the module, of every parameter that packed matrices replace; the guard's name first."""
        names = ["gate_up_proj" if self.has_gate else "up_proj", "down_proj"]
        return tuple(names + [f"{name}_bias" for name in names if self.has_bias])

    def _rows(self, projection: str) -> slice:
        """Rows of gate or up in the stacked gate_up matrix."""
        inner = self.projections[-1].in_features
        if self.is_concatenated:
            return slice(0, inner) if projection == "gate_proj" else slice(inner, 2 * inner)
        return slice(0, None, 2) if projection == "gate_proj" else slice(1, None, 2)

    def matrix(self, expert: int, projection: str) -> Tensor:
        fused = self.has_gate and projection != "down_proj"
        stack = self._stack("gate_up_proj" if fused else projection)[expert]
        stack = stack.T if self.is_transposed else stack
        return stack[self._rows(projection)] if fused else stack

    def bias(self, expert: int, projection: str) -> Tensor | None:
        if not self.has_bias:
            return None
        fused = self.has_gate and projection != "down_proj"
        stack = self._stack(f"{'gate_up_proj' if fused else projection}_bias")[expert]
        return stack[self._rows(projection)] if fused else stack

    def run(
        self, expert: int, x: Tensor, matrices: Mapping[str, Tensor] | None = None, inner: Tensor | None = None
    ) -> Tensor:
        linear = partial(self._linear, expert, matrices)
        return self.combine(x, linear) if inner is None else self._outer(inner, linear)

    def inputs(self, expert: int, x: Tensor, matrices: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {"gate_up": x, "down": self.inner(x, partial(self._linear, expert, matrices))}

    def _linear(self, expert: int, matrices: Mapping[str, Tensor] | None, x: Tensor, projection: str) -> Tensor:
        weight = matrices[projection] if matrices is not None else self.matrix(expert, projection).to(x.dtype)
        bias = self.bias(expert, projection)
        return functional.linear(x, weight, bias.to(x.dtype) if bias is not None else None)

    def combine(self, x: Tensor, linear: Callable[[Tensor, str], Tensor]) -> Tensor:
        """One expert's output [n, H], given how to apply its projections by name."""
        return self._outer(self.inner(x, linear), linear)

    def _outer(self, inner: Tensor, linear: Callable[[Tensor, str], Tensor]) -> Tensor:
        """Output of an expert, given what its down projection reads."""
        output = linear(inner, "down_proj")
        return self.module.post_expert_norm(output) if self.has_post_expert_norm else output

    def inner(self, x: Tensor, linear: Callable[[Tensor, str], Tensor]) -> Tensor:
        """What one expert's down projection reads, [n, I]."""
        if not self.has_gate:
            return self.module.act_fn(linear(x, "up_proj"))
        gate, up = linear(x, "gate_proj"), linear(x, "up_proj")
        if self.is_concatenated:
            return self._apply_gate(torch.cat((gate, up), dim=-1))
        return self._apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if hasattr(self.module, "_apply_gate"):
            return self.module._apply_gate(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.module.act_fn(gate) * up

    def plain_activation(self) -> str | None:
        """Name in `kernels.reference.ACTIVATIONS` if an expert is down(act(gate(x)) * up(x)) or down(act(up(x))).

        None where it is not: biases, a norm behind it, identity experts, or a gate of the model's own.
        """
        special = self.has_bias or self.has_post_expert_norm or self.identity_experts or not self._has_plain_gate()
        return None if special else _name_of(self._activation())

    def _has_plain_gate(self) -> bool:
        if not self.has_gate:
            return True
        own = getattr(type(self.module), "_apply_gate", None)
        return self.is_concatenated and (own is None or own is getattr(moe, "_default_apply_gate", None))

    def _activation(self) -> Callable[[Tensor], Tensor]:
        return self.module.act_fn

    def route(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The module's call as tokens [T, H], expert ids [T, K] and routing weights [T, K]."""
        hidden_states, top_k_index, top_k_weights = args
        return hidden_states.reshape(-1, hidden_states.shape[-1]), top_k_index, top_k_weights

    def finish(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """Gives the combined output [T, H] the shape that the original module returns."""
        return output

    @contextmanager
    def observe(self, record: Record) -> Iterator[None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, index, weights = self.route(*args)
            # what an expert reads of its weights in float32, one projection at a time
            most = at_once(8 * max(p.out_features * p.in_features for p in self.projections), x.device)
            rest = []
            for expert in index.unique().tolist():
                if expert < self.num_experts:
                    token, slot = torch.where(index == expert)
                    work = record(expert, x[token], weights[token, slot], token)
                    if work is not None and most == 1:
                        work()  # and its tokens are let go
                    elif work is not None:
                        rest.append(work)
            list(each(lambda work: work(), rest, most))

        with self.module.register_forward_pre_hook(hook):
            yield

    @contextmanager
    def in_blocks(self) -> Iterator[None]:
        def forward(hidden_states: Tensor, *args: Tensor) -> Tensor:
            return self.dispatch(
                hidden_states, *args, run=lambda expert, x: in_blocks(lambda block: self.run(expert, block), x)
            )

        with forward_as(self.module, forward):
            yield

    @contextmanager
    def idle(self, value: float = 0.0) -> Iterator[None]:
        def forward(hidden_states: Tensor, *args: Tensor) -> Tensor:
            x = self.route(hidden_states, *args)[0]
            return self.finish(torch.full_like(x, value), hidden_states)

        with forward_as(self.module, forward):
            yield

    def dispatch(self, hidden_states: Tensor, *args: Tensor, run: Callable[[int, Tensor], Tensor | None]) -> Tensor:
        """The module's output for its arguments, given how to run one expert on its tokens [n, H].

        Sums are taken in float32 and rounded to the dtype of `hidden_states`. Slots whose id is no expert's, and
        experts for which `run` gives None, add nothing.
        """
        x, index, weights = self.route(hidden_states, *args)
        output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in index.unique().tolist():
            token, slot = torch.where(index == expert)
            if expert < self.num_experts:
                y = run(expert, x[token])
            else:
                y = x[token] if expert < self.num_experts + self.identity_experts else None
            if y is not None:
                output = output.index_add(0, token, (y * weights[token, slot, None]).to(torch.float32))
        return self.finish(output.to(hidden_states.dtype), hidden_states)


def _name_of(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Which of ACTIVATIONS a function is, by its values: models wrap the same function in many classes."""
    points = torch.linspace(-6, 6, 97, device="cpu")
    with torch.no_grad():
        values = activation(points)
    return next(
        (name for name, known in ACTIVATIONS.items() if torch.allclose(values, known(points), atol=1e-6)), None
    )


def is_fused(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    # older releases set fewer of the flags; those two have always been there
    flagged = hasattr(module, "is_transposed") and hasattr(module, "has_bias")
    return flagged and isinstance(down, nn.Parameter) and down.dim() == 3
