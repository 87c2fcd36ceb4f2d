# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint has what a model's packed modules need, and whether what was read is sound."""

from __future__ import annotations

import re
from typing import Any

import torch

from transformers_mcmoe.models.stream import Checkpoint
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.nn.experts import PackedExperts
from transformers_mcmoe.nn.linear import PackedLinear


def check_tensors(model: Any, structure: Structure, files: list[str]) -> None:
    """Compare the headers of a checkpoint with the packed modules, before anything is loaded.

    Raises:
        ValueError: a packed tensor is missing, has another shape or dtype than the plan says, or is unknown; names it.
    """
    state = model.state_dict()
    wanted = {
        name: (tuple(parameter.shape), parameter.dtype == torch.uint8)
        for path, module in model.named_modules()
        if isinstance(module, PackedExperts | PackedLinear)
        for name, parameter in module.named_parameters(path)
    }
    modules = tuple(f"{path}." for path, m in model.named_modules() if isinstance(m, PackedExperts | PackedLinear))
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unknown: list[str] = []
    for key, tensor in Checkpoint(files).slices.items():
        name = structure.names.packed_name(key, state)
        if any(_matches(pattern, name) for pattern in ignored):
            continue
        if name not in state:  # the guard of a family whose fused weight passes a converter
            name = structure.names.target(key)[0] if structure.names.target(key)[0] in wanted else name
        if name in wanted:
            shape, (want, is_packed) = tuple(tensor.get_shape()), wanted.pop(name)
            if shape != want or (tensor.get_dtype() == "U8") != is_packed:
                raise ValueError(
                    f"The packed tensor '{key}' is {tensor.get_dtype()} of shape {shape}, but the plan says "
                    f"{'U8' if is_packed else 'a float'} of shape {want}; the checkpoint is damaged or its config.json "
                    "belongs to another one."
                )
        elif name.startswith(modules) and name not in state:
            unknown.append(key)
    hint = f"; it has the unknown tensor '{unknown[0]}'" if unknown else ""
    if wanted:
        name = next(iter(wanted))
        raise ValueError(
            f"The checkpoint lacks the packed tensor '{structure.names.published(name)}'{hint}; it is damaged or was "
            "renamed."
        )
    if unknown:
        raise ValueError(f"The tensor '{unknown[0]}' is not part of the plan; the checkpoint is damaged or newer.")


def check_complete(model: Any, structure: Structure, files: list[str]) -> None:
    """Compare the headers of a checkpoint with what of the model is not packed: engines other than transformers do not.

    Raises:
        ValueError: a tensor of the model is in no file; names it.
    """
    state = model.state_dict()
    found: set[str] = set()
    for key in Checkpoint(files).slices:
        found |= {structure.names.packed_name(key, state), structure.names.target(key)[0]}
    tied = getattr(model, "_tied_weights_keys", None) or {}
    shared = {*tied} if model.config.get_text_config().tie_word_embeddings else set()
    ignored = model._keys_to_ignore_on_load_missing or ()
    for name in state:
        if name not in found and name not in shared and not any(_matches(pattern, name) for pattern in ignored):
            raise ValueError(
                f"The checkpoint lacks the tensor '{structure.names.published(name)}'; it is damaged or was renamed."
            )


def _matches(pattern: str, name: str) -> bool:
    return re.search(pattern, name) is not None


def check_grids(model: Any) -> None:
    """Raise ValueError, naming the tensor, if a scale or zero of a packed matrix is not finite."""
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.weight is not None and not module.weight.is_meta:
            grids = module.weight.data[..., -4:].contiguous().view(torch.float16)
            if not bool(torch.isfinite(grids).all()):
                raise ValueError(f"The packed tensor '{path}.weight' holds scales that are not finite; it is damaged.")
