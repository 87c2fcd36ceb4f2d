# SPDX-License-Identifier: Apache-2.0
"""Experts that are modules of their own, in a list or a dict: NLLB, remote code."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.models.experts.base import Experts, Projection, Record, forward_as, in_blocks


class ListExperts(Experts):
    """A ModuleList or ModuleDict with one dense MLP per expert (NLLB, remote code): its linears are packed in place."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path, module)
        named = _expert_children(module)
        self.keys, self.children = list(named), list(named.values())
        self.num_experts = len(self.children)
        # without the hooks and forwards that the children get while the model runs; parameters are shared
        self._bare: list[Any] = [
            copy.deepcopy(child, {id(parameter): parameter for parameter in child.parameters()})
            for child in self.children
        ]
        linears = {name: m for name, m in self.children[0].named_modules() if isinstance(m, nn.Linear)}
        hidden = next(iter(linears.values())).in_features
        roles = {name: "gate_up" if m.in_features == hidden else "down" for name, m in linears.items()}
        if "down" not in roles.values():  # square: the registered order decides, except for the usual w1, w2, w3
            roles["w2" if "w2" in roles and "w3" in roles else list(roles)[-1]] = "down"
        self.projections = tuple(
            Projection(name, roles[name], linears[name].out_features, linears[name].in_features)
            for name in sorted(linears, key=lambda name: roles[name] == "down")
        )

    def tensor(self, expert: int, leaf: str) -> str:
        return f"{self.path}.{self.keys[expert]}.{leaf}"

    def linear(self, expert: int, projection: str) -> nn.Linear:
        """The linear layer of an expert."""
        linear: Any = self.children[expert].get_submodule(projection)
        return linear

    def matrix(self, expert: int, projection: str) -> Tensor:
        return self.linear(expert, projection).weight.data

    def bias(self, expert: int, projection: str) -> Tensor | None:
        bias = self.linear(expert, projection).bias
        return bias.data if bias is not None else None

    def run(
        self, expert: int, x: Tensor, matrices: Mapping[str, Tensor] | None = None, inner: Tensor | None = None
    ) -> Tensor:
        child = self.children[expert]
        state = {name: parameter.to(x.dtype) for name, parameter in child.named_parameters()}
        state |= dict(child.named_buffers())
        state |= {f"{name}.weight": matrix for name, matrix in (matrices or {}).items()}
        return torch.func.functional_call(self._bare[expert], state, (x,))

    def inputs(self, expert: int, x: Tensor, matrices: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def hook(role: str) -> Any:
            def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen.setdefault(role, args[0])

            return keep

        with ExitStack() as stack:
            for p in self.projections:
                linear = self._bare[expert].get_submodule(p.name)
                stack.enter_context(linear.register_forward_pre_hook(hook(p.role)))
            self.run(expert, x, matrices)
        return {role: value.reshape(-1, value.shape[-1]) for role, value in seen.items()}

    @contextmanager
    def observe(self, record: Record) -> Iterator[None]:
        def hook(expert: int) -> Any:
            def hand(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                rest = record(expert, args[0].reshape(-1, args[0].shape[-1]), None, None)
                if rest is not None:
                    rest()

            return hand

        with ExitStack() as stack:
            for expert, child in enumerate(self.children):
                stack.enter_context(child.register_forward_pre_hook(hook(expert)))
            yield

    @contextmanager
    def in_blocks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for child in self.children:
                stack.enter_context(forward_as(child, partial(in_blocks, child.forward)))
            yield

    @contextmanager
    def idle(self, value: float = 0.0) -> Iterator[None]:
        with ExitStack() as stack:
            for child in self.children:
                stack.enter_context(forward_as(child, lambda x: torch.full_like(x, value)))
            yield


def is_expert_list(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or "expert" not in name or "shared" in name:
        return False
    children = list(_expert_children(module).values())
    shapes = [[tuple(m.weight.shape) for m in c.modules() if isinstance(m, nn.Linear)] for c in children]
    return len(children) > 1 and len(shapes[0]) > 1 and all(shape == shapes[0] for shape in shapes)


def _expert_children(module: nn.Module) -> dict[str, nn.Module]:
    """The children that hold linear layers; a container may have others, such as a dropout."""
    named = module.named_children()
    return {name: c for name, c in named if any(isinstance(m, nn.Linear) for m in c.modules())}
