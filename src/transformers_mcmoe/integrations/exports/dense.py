# SPDX-License-Identifier: Apache-2.0
"""A packed model as a dense one of plain transformers, with the experts that were kept and no others.

Knows models and configs; files are `save_pretrained`'s business.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transformers_mcmoe.config import MCMoEConfig
from transformers_mcmoe.models.experts import find_experts
from transformers_mcmoe.models.routers import Router
from transformers_mcmoe.nn import PackedExperts, PackedLinear
from transformers_mcmoe.plan import Plan
from transformers_mcmoe.routing.prunable import base_implementation

# names that model configs have for E
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@torch.no_grad()
def unpack(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A dense model that plain transformers runs, saves and loads: matrices rebuilt, dropped experts gone, the others renumbered.

    Args:
        model: a packed model; it is not changed.
        dtype: floating dtype of the result, default the model's.

    Returns:
        A model of the same class, whose config has the new number of experts, on CPU.

    Raises:
        ValueError: the model is not packed, has adapters or offloaded weights, or its layers keep different numbers of
            experts, for which configs of transformers have no place.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if not isinstance(getattr(quantizer, "quantization_config", None), MCMoEConfig):
        raise ValueError(f"This {type(model).__name__} was not compressed by transformers_mcmoe.")
    plan = quantizer.quantization_config.plan
    _check(model, plan)
    dtype = dtype or model.dtype
    with torch.device("meta"):
        plain = type(model)._from_config(_config(model, plan), dtype=dtype)
    _fill(plain, model, plan, dtype)
    plain.generation_config = copy.deepcopy(model.generation_config)
    plain.tie_weights()
    return plain.eval()


def _config(model: Any, plan: Plan) -> Any:
    """The model's config with as many experts as are kept."""
    config = copy.deepcopy(model.config)
    for part in _parts(config):  # run-time pruning computes attention by a function of its own
        if getattr(part, "_attn_implementation", None) is not None:
            part._attn_implementation = base_implementation(part)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    others = find_experts(model, skip=PackedExperts, required=False)
    found = {len(widths.kept) for widths in plan.experts.values()}
    found |= {experts.num_experts for path, experts in others.items() if path not in plan.experts}
    if len(found) > 1:
        raise ValueError(
            f"The layers keep between {min(found)} and {max(found)} experts, but a model's config in transformers has one number for "
            "all of them; prune with a method that drops equally many everywhere (PruneConfig(method='naee')), or keep "
            "the packed model."
        )
    (count,) = found
    experts = len(next(iter(plan.experts.values())).gate_up)
    if count == experts:
        return config
    changed = False
    for part in _parts(config):
        for name in COUNTS:
            if getattr(part, name, None) == experts:
                setattr(part, name, count)
                changed = True
    if not changed:
        raise ValueError(f"The config of {type(model).__name__} has its number of experts under none of {COUNTS}.")
    return config


def _parts(config: Any) -> Iterator[Any]:
    """A config and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value)


def _check(model: Any, plan: Plan) -> None:
    """Raise ValueError if a part of the model has no place in a plain one."""
    for path, module in model.named_modules():
        if isinstance(module, PackedExperts | PackedLinear) and any(p.is_meta for p in module.parameters()):
            raise ValueError(f"'{path}' is offloaded; load the model without disk offload to unpack it.")
        if (isinstance(module, PackedExperts) and not module.is_plain) or hasattr(module, "base_layer"):
            raise ValueError(f"'{path}' has adapters; call merge_and_unload() or unload() before unpacking.")
    for path, widths in plan.experts.items():
        if len(widths.kept) < len(widths.gate_up) and not isinstance(model.get_submodule(path), PackedExperts):
            raise ValueError(
                f"The experts at '{path}' are modules in a list, which cannot be renumbered; keep the packed model."
            )


def _rows_of(model: Any, plan: Plan) -> dict[str, list[int]]:
    """Rows that are kept of what has one for each expert, by the beginning of its name: the router, and the block around it."""
    rows = {}
    for path, widths in plan.experts.items():
        if len(widths.kept) == len(widths.gate_up):
            continue
        experts = model.get_submodule(path).adapter
        identity = range(experts.num_experts, experts.num_experts + experts.identity_experts)
        for prefix in (Router(model, experts).path, path.rpartition(".")[0]):
            rows[prefix + "."] = [*widths.kept, *identity]
    return rows


def _fill(plain: Any, model: Any, plan: Plan, dtype: torch.dtype) -> None:
    """Give a model on meta its weights."""
    rows = _rows_of(model, plan)
    sources = dict(model.named_parameters()) | dict(model.named_buffers())
    own = find_experts(plain)
    wide: tuple[str, ...] = ()  # what transformers keeps in float32 beside weights of 16 bits
    if dtype.itemsize == 2:
        wide = (*(plain._keep_in_fp32_modules_strict or ()),)
    if dtype == torch.float16:
        wide += (*(plain._keep_in_fp32_modules or ()),)
    inside = tuple(path + "." for path in own if path in plan.experts)
    for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
        source = sources.get(name)
        owner, _, leaf = name.rpartition(".")
        packed = _submodule(model, owner)
        if isinstance(packed, PackedLinear):
            value = packed.dequantize(dtype) if leaf == "weight" else packed.bias.data.to(dtype)  # type: ignore[union-attr]
        elif source is not None and source.dtype != torch.uint8:
            kept = next((kept for prefix, kept in rows.items() if name.startswith(prefix)), [])
            value = _rows(source.data, tensor.shape, kept)
            if value.is_floating_point():
                value = value.to(torch.float32 if any(part in name for part in wide) else dtype)
        elif name.startswith(inside):
            value = torch.zeros(tensor.shape, dtype=dtype)  # of experts, which follow
        else:
            raise ValueError(f"The packed model has nothing that could become '{name}'; it cannot be unpacked.")
        _put(plain, name, value.to("cpu", copy=True))
    for path, experts in own.items():
        if path not in plan.experts:
            continue
        for new, old in enumerate(plan.experts[path].kept):
            for p in experts.projections:
                source_linear: Any = _packed(model, path, old, p.name)
                experts.matrix(new, p.name).copy_(source_linear.dequantize(dtype))
                bias = experts.bias(new, p.name)
                if bias is not None:
                    bias.copy_(source_linear.bias.data)


def _packed(model: Any, path: str, expert: int, projection: str) -> PackedLinear:
    module = model.get_submodule(path)
    if isinstance(module, PackedExperts):
        return module.linear(expert, projection)
    linear: PackedLinear = list(module.children())[expert].get_submodule(projection)  # type: ignore[assignment]
    return linear


def _rows(tensor: Tensor, shape: torch.Size, rows: list[int]) -> Tensor:
    """A router's tensor with the rows of kept experts, along the dimension that shrank."""
    shrunk = [n for n, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)) if old != new]
    return tensor.index_select(shrunk[0], torch.tensor(rows, device=tensor.device)) if shrunk else tensor


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=value.is_floating_point())
    else:
        module._buffers[leaf] = value


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
