# SPDX-License-Identifier: Apache-2.0
"""Counts the routing of a model while it runs. Knows hooks; what is read from the counts is in `ratios`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from transformers_mcmoe.models.experts import (
    Experts,
    routes_outside,
)
from transformers_mcmoe.routing.prunable import prunable_experts
from transformers_mcmoe.routing.ratios import RoutingRatios


@contextmanager
def observe_routing(model: Any) -> Iterator[dict[str, RoutingRatios]]:
    """While open, every call of the model adds to what is known of its routing, by experts path."""
    found = prunable_experts(model)
    ratios = {path: RoutingRatios(experts.num_experts) for path, experts in found.items()}
    with ExitStack() as stack:
        for path, experts in found.items():
            stack.enter_context(record_routing(model.get_submodule(path), experts, ratios[path]))
        yield ratios


@contextmanager
def record_routing(module: nn.Module, experts: Experts, ratios: RoutingRatios) -> Iterator[None]:
    """While open, every call of an experts module is counted; nothing is where it is not handed its routing."""
    if routes_outside(experts):
        yield
        return

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, index, weights = experts.route(*routing_arguments(experts, args, kwargs))  # type: ignore[attr-defined]
        ratios.add(index, weights)

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield


def routing_arguments(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """A call's arguments in their order."""
    signature = inspect.signature(type(experts.module).forward)
    return signature.bind(experts.module, *args, **kwargs).args[1:]
