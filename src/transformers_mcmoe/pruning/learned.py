# SPDX-License-Identifier: Apache-2.0
"""Pruning by trained routers on a model: trains them, attaches them, and knows which model they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers_mcmoe.calibration.sequences import Sequences as Calibration
from transformers_mcmoe.config import TARGET, OTPConfig
from transformers_mcmoe.nn import PackedExperts
from transformers_mcmoe.plan import under_prefix
from transformers_mcmoe.progress import Meter, Progress
from transformers_mcmoe.routing import ExpertPruning, PrefixRouter, prunable_experts, set_router
from transformers_mcmoe.routing.otp.training import RouterTraining

# attribute of a model: what is known of its trained routers
TRAINED = "mcmoe_trained_pruning"


def trained(
    model: Any, otp: OTPConfig, tokens: Calibration, progress: Callable[[Progress], None] | None = None
) -> OTPConfig:
    """Train the routers of a model without pruning on calibration sequences; the options with what was found."""
    otp, meter = replace(otp, target=otp.target or TARGET), Meter(progress)
    try:
        otp = RouterTraining(model, prunable_experts(model), otp, meter).run(tokens)
    finally:
        meter.close()
    return replace(otp, model=model_mark(model))


def learned_options(model: Any, otp: bool | float | OTPConfig) -> OTPConfig:
    """The options of a model's trained routers, for the share asked for."""
    known = otp if isinstance(otp, OTPConfig) and otp.trained else getattr(model, TRAINED, None)
    if known is None:
        raise ValueError(
            "This model has no pruning routers; train them with train_expert_pruning(model, dataset, target=0.2)."
        )
    asked = otp.target if isinstance(otp, OTPConfig) else None if otp is True else otp
    return replace(known, target=known.target if asked is None else asked, on=True)


def start_learned_pruning(model: Any, otp: OTPConfig) -> OTPConfig:
    """Attach pruning by the routers that the model has, if they were trained on it.

    Raises:
        ValueError: they were trained on another model.
    """
    mark = model_mark(model)
    if otp.model is not None and mark is not None and otp.model != mark:
        raise ValueError(
            f"The pruning routers were trained on another model (mark {otp.model}, this one has {mark}); train them on this "
            "one with train_expert_pruning, or load it with MCMoEConfig(otp=False)."
        )
    normalized = otp.normalized or {}
    here = under_prefix(normalized, normalized, prunable_experts(model), model.base_model_prefix)
    otp = replace(otp, normalized=here)
    setattr(model, TRAINED, otp)
    if otp.on:
        ExpertPruning(model, otp)
    return otp


def model_mark(model: Any) -> str | None:
    """Mark of a packed model's experts: their widths and some of their bytes. None without any, or while they are on disk."""
    digest, packed = hashlib.sha256(), [module for module in model.modules() if isinstance(module, PackedExperts)]
    for module in packed:
        digest.update(repr((module.widths.gate_up, module.widths.down, *filter(any, [module.widths.ranks]))).encode())
        weight = next(iter(module.parameters()))
        if weight.is_meta:
            return None
        digest.update(weight.data.flatten()[:256].to("cpu").numpy().tobytes())
    return digest.hexdigest()[:16] if packed else None


def add_routers(model: Any, otp: OTPConfig) -> None:
    """Give packed experts the empty pruning routers, on meta, that a checkpoint has tensors for."""
    normalized = otp.normalized or {}
    found = prunable_experts(model)
    for path in under_prefix(normalized, normalized, found, model.base_model_prefix):
        if path in found:
            hidden = found[path].projections[0].in_features
            set_router(model.get_submodule(path), PrefixRouter(hidden, otp.slots or 0, otp.rank, "meta"))
