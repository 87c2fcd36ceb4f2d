# SPDX-License-Identifier: Apache-2.0
"""Puts packed modules into a model in the place of dense ones, and back.

Knows modules, plans and the structure of models; it loads and saves nothing, and does not know transformers' hooks (`quantizer`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from transformers_mcmoe.config import MCMoEConfig, OTPConfig
from transformers_mcmoe.models.experts import FusedExperts, ListExperts
from transformers_mcmoe.models.structure import Structure, model_class
from transformers_mcmoe.nn import PackedExperts, PackedLinear
from transformers_mcmoe.plan import FACTORS, Plan
from transformers_mcmoe.pruning import add_routers
from transformers_mcmoe.routing import ROUTER, set_router


def pack_modules(model: Any, quantization: MCMoEConfig) -> tuple[Structure, Plan, list[str]]:
    """Put empty packed modules into a model by the plan of a config.

    Returns:
        What is known of the packed experts, the plan with the model's own paths, and the paths of experts that stay dense.

    Raises:
        ValueError: the plan is missing or does not fit the model.
    """
    if quantization.plan is None:
        raise ValueError("The checkpoint's quantization_config has no plan; it was not written by this package.")
    structure = Structure(model)
    plan = quantization.plan.under(structure.experts, model.base_model_prefix)
    dense = [path for path in structure.experts if path not in plan.experts]
    structure.experts = {path: experts for path, experts in structure.experts.items() if path in plan.experts}
    structure.check(plan)
    structure.follow(plan)
    _replace_modules(model, structure, plan, quantization.group_size)
    if isinstance(quantization.otp, OTPConfig) and quantization.otp.trained:
        add_routers(model, quantization.otp)
    return structure, plan, dense


def packed_model(config: Any, quantization: MCMoEConfig) -> tuple[Any, Structure, Plan]:
    """A packed model on meta with what is known of it, from its config alone; its plan has the model's own paths.

    Raises:
        ValueError: the plan is missing or does not fit the model.
    """
    plain = type(config).from_dict(config.to_dict())
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    built = model_class(config)
    with torch.device("meta"):
        model = built._from_config(plain) if hasattr(built, "_from_config") else built.from_config(plain)
    structure, plan, _ = pack_modules(model, quantization)
    return model, structure, plan


def _replace_modules(model: Any, structure: Structure, plan: Plan, group_size: int) -> None:
    """Put empty packed modules, on meta, in the place of every matrix of a plan."""
    with torch.device("meta"):
        for path, experts in structure.experts.items():
            widths = plan.experts[path]
            if isinstance(experts, FusedExperts):
                guard = structure.names.is_fused_on_disk(experts)
                packed = PackedExperts(experts, widths, group_size, structure.names.leaves(experts), guard, "meta")
                model.set_submodule(path, packed)
            elif isinstance(experts, ListExperts):
                for expert in range(experts.num_experts):
                    for p in experts.projections:
                        name = experts.tensor(expert, p.name)
                        factors = (widths.rank_of(expert), widths.rank_bits)
                        _pack_linear(model, name, widths.of_role(p.role)[expert], group_size, factors)
        for path, bits in plan.linears.items():
            _pack_linear(model, path, bits, group_size)


def _pack_linear(model: Any, path: str, bits: int, group_size: int, factors: tuple[int, int] = (0, 0)) -> None:
    linear = model.get_submodule(path)
    bias = linear.bias.dtype if linear.bias is not None else None
    packed = PackedLinear(linear.in_features, linear.out_features, bits, group_size, bias, "meta", *factors)
    model.set_submodule(path, packed)


def unpack_modules(model: Any, dtype: torch.dtype) -> None:
    """Put dense modules into a model in the place of all packed ones; pruning routers stay with their experts."""
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            dense = module.restore(dtype)
            set_router(dense, module._modules.get(ROUTER))  # type: ignore[arg-type]
            model.set_submodule(path, dense)
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear) and not path.endswith(FACTORS):  # those go with their matrix
            model.set_submodule(path, _dense_linear(module, dtype))


def _dense_linear(packed: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None, device="meta")
    linear.weight = nn.Parameter(packed.dequantize(dtype))
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.data.to(dtype))
    return linear
