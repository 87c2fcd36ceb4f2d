# SPDX-License-Identifier: Apache-2.0
"""Which experts of a model can be pruned, and whether options fit it.

Knows modules and configs; nothing is run or changed, but that experts get their trained router.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from transformers_mcmoe.config import ODPConfig, OTPConfig
from transformers_mcmoe.models.experts import (
    Experts,
    FusedExperts,
    find_experts,
    is_attention,
    layer_of,
    routes_outside,
    stacks_of,
)
from transformers_mcmoe.nn import PackedExperts
from transformers_mcmoe.routing.importance import IMPLEMENTATIONS
from transformers_mcmoe.routing.otp import PrefixRouter

# attribute of an experts module: its trained `PrefixRouter`
ROUTER = "otp"
# names that model configs have for K
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")


def prunable_experts(model: nn.Module) -> dict[str, FusedExperts]:
    """Adapters of all experts modules, packed ones included, by path.

    Raises:
        ValueError: the model has no experts, or their routing cannot be changed: it is applied outside of them, or
            each token has a single expert.
    """
    packed = {path: module.adapter for path, module in model.named_modules() if isinstance(module, PackedExperts)}
    found: dict[str, Experts] = {**packed, **find_experts(model, skip=PackedExperts, required=not packed)}
    for path, experts in found.items():
        if routes_outside(experts):
            raise ValueError(
                f"The experts of class {type(experts.module).__name__} at '{path}' are not handed their routing weights; "
                "expert pruning is not available for this model."
            )
    return dict(sorted(found.items(), key=lambda item: layer_of(item[0])))  # type: ignore[arg-type]


def slots_of(model: Any) -> int | None:
    """K, the experts per token, as the model's config says; None if it does not say so by one of the usual names."""
    config = model.config.get_text_config()
    return next((slots for name in TOP_K if isinstance(slots := getattr(config, name, None), int)), None)


def check_top_k(slots: int, path: str) -> None:
    """Raise ValueError where a token has one expert only."""
    if slots < 2:
        raise ValueError(
            f"The router of '{path}' sends each token to one expert, and one is always kept; "
            "expert pruning needs a model with two experts per token or more, leave odp out."
        )


def check_learnable(model: Any, otp: OTPConfig) -> None:
    """Raise ValueError if a model cannot be pruned by routers that skip the wanted share, before anything is run."""
    found = prunable_experts(model)
    if (slots := slots_of(model)) is not None:
        check_top_k(slots, next(iter(found)))
        if otp.target is not None and otp.target > (slots - 1) / slots:
            raise ValueError(
                f"target={otp.target} cannot be met: a token keeps one of its {slots} experts at least, so at most "
                f"{(slots - 1) / slots:.2f} of the routed slots can be skipped; lower it."
            )


def check_prunable(model: Any, odp: ODPConfig) -> None:
    """Raise ValueError if a model cannot be pruned with these options, before anything is run.

    Whether a token has one expert only is read from the model's config, where it has one of the usual names.
    """
    found = prunable_experts(model)
    chosen_layers(found, odp)
    if (slots := slots_of(model)) is not None:
        check_top_k(slots, next(iter(found)))
        least = min(odp.protected(0.0), odp.protected(1.0))  # how many tokens are of images is not known yet
        most = (1 - least) * (slots - 1) / slots
        if odp.rate is not None and odp.rate > most + odp.drop_all:
            raise ValueError(
                f"rate={odp.rate} cannot be met: with {slots} experts per token and protect={least:g} about "
                f"{most:.2f} of the routed bytes can be skipped; lower it."
            )
    if odp.needs_attention:
        check_attention(model, found)


def check_attention(model: Any, paths: Iterable[str]) -> None:
    """Raise ValueError where tokens cannot be ranked by attention."""
    modules = [module for stack in stacks_of(paths) for module in model.get_submodule(stack).modules()]
    attentions = [module for module in modules if is_attention(module)]
    if not attentions:
        raise ValueError(f"{type(model).__name__} has no attention to rank tokens by; set protect=0 and drop_all=0.")
    for module in attentions:
        if hasattr(module, "config") and (current := base_implementation(module.config)) not in IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation={current!r} does not give the attention that tokens receive; load the model "
                f"with one of {tuple(IMPLEMENTATIONS)}, or set protect=0."
            )


def base_implementation(config: Any) -> str:
    """What a model computes attention with, without what is put around it here."""
    current = config._attn_implementation or "eager"
    return next((name for name, ours in IMPLEMENTATIONS.items() if ours == current), current)


def chosen_layers(found: Mapping[str, Any], odp: ODPConfig) -> list[str]:
    """Experts paths in the decoder layers that the options name; all for "auto".

    Raises:
        ValueError: a layer has no experts.
    """
    if isinstance(odp.layers, str):
        return list(found)
    numbers = {layer_of(path)[1] for path in found}
    unknown = [number for number in odp.layers if number not in numbers]
    if unknown:
        raise ValueError(f"layers={list(odp.layers)} is not valid: layer {unknown[0]} has no experts.")
    return [path for path in found if layer_of(path)[1] in odp.layers]


def routers_of(model: Any, found: Mapping[str, FusedExperts]) -> dict[str, PrefixRouter]:
    """The trained routers of a model, by experts path; experts that were not compressed may have none.

    Raises:
        ValueError: no experts module has one.
    """
    known = {path: getattr(model.get_submodule(path), ROUTER, None) for path in found}
    routers = {path: router for path, router in known.items() if isinstance(router, PrefixRouter)}
    if not routers:
        raise ValueError(
            "This model has no pruning routers; train them with train_expert_pruning(model, dataset, target=0.2)."
        )
    return routers


def set_router(module: nn.Module, router: PrefixRouter | None) -> None:
    """Give an experts module its router, or take it away. It is saved with packed experts, and with no others."""
    if not isinstance(module, PackedExperts):
        module.__dict__[ROUTER] = router  # no submodule: plain transformers would save it
    elif router is not None:
        module.add_module(ROUTER, router)
    else:
        module._modules.pop(ROUTER, None)


def expert_bytes(model: nn.Module) -> dict[str, list[float]]:
    """Bytes of every expert, by experts path."""
    return {path: bytes_of(model.get_submodule(path), experts) for path, experts in prunable_experts(model).items()}


def bytes_of(module: nn.Module, experts: FusedExperts) -> list[float]:
    """Bytes of every expert of a module, packed or not."""
    if isinstance(module, PackedExperts):
        return module.expert_bytes()
    size = sum(p.out_features * p.in_features for p in experts.projections)
    itemsize = next(experts.module.parameters()).element_size()
    return [float(size * itemsize)] * experts.num_experts
