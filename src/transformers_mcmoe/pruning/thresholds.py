# SPDX-License-Identifier: Apache-2.0
"""Thresholds of `ODPConfig` for a model: read from what its compression recorded, or from text that is run through it.

Finds them; `routing` applies them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transformers_mcmoe.calibration.sequences import Sequences as Calibration
from transformers_mcmoe.config import MCMoEConfig, ODPConfig
from transformers_mcmoe.models.experts import layer_of
from transformers_mcmoe.models.stream import model_inputs
from transformers_mcmoe.plan import under_prefix
from transformers_mcmoe.pruning.stats import expert_pruning_stats
from transformers_mcmoe.report import compression_report
from transformers_mcmoe.routing import (
    ExpertPruning,
    RatioTable,
    check_top_k,
    expert_bytes,
    observe_routing,
    prunable_experts,
)

logger = logging.getLogger(__name__)

# tokens per forward pass while thresholds are measured
BATCH_TOKENS = 2048
# calibration tokens that layers="auto" compares outputs on: their logits are held
KL_TOKENS = 2048


def start_expert_pruning(model: Any, odp: ODPConfig) -> ODPConfig:
    """Attach pruning with thresholds that were saved from this model, with or without its head; returns them by its paths."""
    thresholds, normalized = odp.thresholds or {}, odp.normalized or {}
    found = prunable_experts(model)
    odp = replace(
        odp,
        thresholds=under_prefix(thresholds, thresholds, found, model.base_model_prefix),
        normalized=under_prefix(normalized, thresholds, found, model.base_model_prefix),
    )
    ExpertPruning(model, odp)
    return odp


def with_thresholds(
    model: Any, odp: ODPConfig, recorded: Mapping[str, Any] | None, tokens: Calibration | None
) -> ODPConfig:
    """The options with thresholds, and with the layers that `layers="auto"` finds.

    Args:
        model: the model, without pruning.
        odp: the options.
        recorded: the `routing_ratios` of its compression's report, if there is one: what thresholds are read from.
        tokens: calibration sequences, where there is no record or layers are to be chosen.
    """
    if odp.layers == "auto" and tokens is None:
        raise ValueError("layers='auto' compares outputs on calibration text; call set_expert_pruning with dataset=.")
    if recorded:
        here = under_prefix(recorded, recorded, prunable_experts(model), model.base_model_prefix)
        tables = {path: RatioTable.from_dict(table) for path, table in here.items()}
    else:
        tables = _measure(model, odp, tokens)
    for path, table in tables.items():
        check_top_k(table.slots, path)
    images = image_share(model) if recorded or tokens is None else tokens.image_tokens() / max(1, tokens.numel())
    thresholds = {path: [round(level, 6) for level in table.levels(odp, images)] for path, table in tables.items()}
    normalized = {path: table.normalized for path, table in tables.items()}
    odp = replace(odp, thresholds=thresholds, normalized=normalized, found_for=odp.decisive)
    if odp.layers != "auto":
        return odp
    assert tokens is not None
    return replace(odp, layers=_choose_layers(model, odp, tokens), max_kl=None)


def recorded_ratios(model: Any) -> Mapping[str, Any] | None:
    """What a packed model's report knows of its routing; None if it is not packed or has no report."""
    if quantization_config_of(model) is None:
        return None
    try:
        return compression_report(model).get("routing_ratios")
    except (OSError, ValueError) as error:
        logger.warning("Thresholds are not read from the compression's report: %s", error)
        return None


def image_share(model: Any) -> float:
    """Share of image tokens in the data that a packed model was calibrated on; 0 where that is not known."""
    if quantization_config_of(model) is None:
        return 0.0
    try:
        report = compression_report(model)
    except (OSError, ValueError):
        return 0.0
    return report.get("image_tokens", 0) / max(1, report.get("calibration_tokens", 1))  # type: ignore[no-any-return]


def _measure(model: Any, odp: ODPConfig, tokens: Calibration | None) -> dict[str, RatioTable]:
    """What is known of the routing of every experts module: measured on tokens, or on a few random ones."""
    if tokens is None:
        if odp.threshold is None:
            raise ValueError(
                "Nothing is known of this model's routing weights, which thresholds are read from; give dataset=, or "
                "ODPConfig(threshold=...)."
            )
        # how many slots there are and whether their weights have a fixed sum: a few tokens show it
        vocabulary = model.get_input_embeddings().weight.shape[0]
        tokens = Calibration(torch.randint(0, vocabulary, (1, 64), generator=torch.Generator().manual_seed(0)))
    device = model.get_input_embeddings().weight.device
    with observe_routing(model) as ratios, torch.no_grad(), _evaluating(model):
        for batch in tokens.batches(BATCH_TOKENS):
            model(**model_inputs(model, batch.to(device)))
    sizes = expert_bytes(model)
    return {path: own.table(sizes[path]) for path, own in ratios.items()}


def _choose_layers(model: Any, odp: ODPConfig, tokens: Calibration) -> list[int]:
    """The most layers whose pruning together stays within `max_kl`, those first that cost least for a byte."""
    tokens = tokens.cut(KL_TOKENS)
    everywhere = replace(odp, layers="all", max_kl=None)
    base = _chances(model, tokens)

    def measure(layers: Sequence[int]) -> tuple[float, float]:
        """KL in nats per token, and bytes skipped."""
        pruning = ExpertPruning(model, replace(everywhere, layers=layers))
        try:
            pruned = _chances(model, tokens)
            skipped = expert_pruning_stats(model)["prefill"]
        finally:
            pruning.detach()
        kl = functional.kl_div(pruned, base, reduction="batchmean", log_target=True)
        return float(kl), (skipped["bytes_skipped"] or 0.0) * skipped["bytes"]

    numbers = sorted({layer_of(path)[1] for path in odp.thresholds or ()})
    cost = {}
    for number in numbers:
        kl, saved = measure([number])
        cost[number] = kl / saved if saved else float("inf")
        logger.info("Pruning layer %d alone: KL %.5f.", number, kl)
    order = sorted(numbers, key=lambda number: cost[number])
    low, high = 0, len(order)  # the first `low` fit, more than `high` do not
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(sorted(order[:middle]))[0] <= odp.max_kl else (low, middle - 1)  # type: ignore[operator]
    if not low:
        raise ValueError(f"max_kl={odp.max_kl} allows no layer to be pruned; raise it or lower the rate.")
    return sorted(order[:low])


@torch.no_grad()
def _chances(model: Any, tokens: Calibration) -> Tensor:
    """Logarithms of the next tokens' probabilities [n, V] float32 of a model in evaluation mode."""
    found = []
    with _evaluating(model):
        device = model.get_input_embeddings().weight.device
        for batch in tokens.batches(KL_TOKENS):
            output = model(**model_inputs(model, batch.to(device)))
            if getattr(output, "logits", None) is None:
                raise ValueError(
                    f"layers='auto' compares logits, which {type(model).__name__} has none of; load it with its head."
                )
            found.append(functional.log_softmax(batch.predictions(output.logits.cpu()).to(torch.float32), dim=-1))
    return torch.cat(found)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def quantization_config_of(model: Any) -> MCMoEConfig | None:
    """The config that a packed model was loaded or compressed with; None for other models."""
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    return config if isinstance(config, MCMoEConfig) else None
