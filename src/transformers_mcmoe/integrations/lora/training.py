# SPDX-License-Identifier: Apache-2.0
"""Getting a packed model ready to be trained with adapters, and what merging them lost.

Knows models, not trainers.
"""

from __future__ import annotations

import math
from typing import Any

from transformers_mcmoe.config import ODPConfig
from transformers_mcmoe.integrations.lora.registration import register
from transformers_mcmoe.integrations.lora.targets import is_packed
from transformers_mcmoe.routing import attached


def prepare_for_training(model: Any, gradient_checkpointing: bool = True) -> Any:
    """Freeze a packed model and switch gradient checkpointing on, before `get_peft_model`.

    PEFT's `prepare_model_for_kbit_training` would cast all that is not packed to fp32 and leave checkpointing off. Here
    dtypes stay: adapters themselves are held in fp32 by PEFT (`autocast_adapter_dtype`).

    Args:
        model: a packed model; changed in place.
        gradient_checkpointing: run each decoder layer again in the backward pass instead of keeping its activations.

    Returns:
        The model.

    Raises:
        ValueError: the model is not packed, or has adapters already; or its expert pruning ranks tokens, which checkpointing cannot repeat.
        ImportError: PEFT is missing or does not fit.
    """
    register()
    if not is_packed(model):
        raise ValueError(
            f"This {type(model).__name__} has no packed modules; it needs no preparation by this package."
        )
    if getattr(model, "peft_config", None):
        raise ValueError(
            "This model has adapters, which would be frozen; call prepare_for_training before get_peft_model."
        )
    pruning = attached(model)
    options = pruning.options if pruning is not None else None
    if gradient_checkpointing and isinstance(options, ODPConfig) and options.needs_attention:
        raise ValueError(
            "Expert pruning ranks tokens, which gradient checkpointing cannot repeat; call "
            "set_expert_pruning(model, False) or ODPConfig(protect=0) first, or pass gradient_checkpointing=False."
        )
    model.requires_grad_(False)
    if gradient_checkpointing:
        # older releases have it under the name that newer ones deprecate
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.config.use_cache = False
    return model


def merge_errors(model: Any) -> dict[str, float]:
    """What was lost where adapters were merged into packed matrices, by module path.

    Returns:
        |merged - (Q(W) + s B A)| / |s B A| in Frobenius norms, per linear layer and per role of an experts module (all
        experts together). 0 is exact; above 1 more is lost to rounding than the adapter had changed, so that the
        adapter is better kept beside the packed model, unmerged. inf is never given; a zero adapter loses 0.
    """
    errors = {path: getattr(module, "merge_error", None) for path, module in model.named_modules()}
    return {
        path.removesuffix(".base_layer"): error
        for path, error in errors.items()
        if isinstance(error, float) and math.isfinite(error)
    }
