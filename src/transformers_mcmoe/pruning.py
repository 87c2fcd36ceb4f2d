# SPDX-License-Identifier: Apache-2.0
"""Expert pruning as users call it: switch it on, off or to other options on a loaded model, and see what it saves.

Finds thresholds, in what a compression recorded or by running text through the model, and has routers trained; `routing`
applies them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from transformers_mcmoe.config import TARGET, MCMoEConfig, ODPConfig, OTPConfig
from transformers_mcmoe.models.experts import layer_of
from transformers_mcmoe.nn import PackedExperts
from transformers_mcmoe.pipeline.prepare import tokens_for
from transformers_mcmoe.plan import under_prefix
from transformers_mcmoe.progress import Meter, Progress
from transformers_mcmoe.report import compression_report
from transformers_mcmoe.routing import (
    ExpertPruning,
    RatioTable,
    attached,
    check_learnable,
    check_top_k,
    chosen_layers,
    expert_bytes,
    observe_routing,
    prunable_experts,
)
from transformers_mcmoe.routing.otp.training import RouterTraining

logger = logging.getLogger(__name__)

_T = TypeVar("_T", bound="ODPConfig | OTPConfig | None")
# attribute of a model: what is known of its trained routers
TRAINED = "mcmoe_trained_pruning"
# tokens per forward pass while thresholds are measured
BATCH_TOKENS = 2048
# calibration tokens that layers="auto" compares outputs on: their logits are held
KL_TOKENS = 2048


def set_expert_pruning(
    model: Any,
    odp: bool | ODPConfig | Mapping[str, Any] | None = None,
    *,
    otp: bool | float | OTPConfig | None = None,
    dataset: Any = None,
    tokenizer: Any = None,
    num_samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
) -> ODPConfig | OTPConfig | None:
    """Switch dynamic expert pruning of a loaded model on, off, or to other options.

    A packed model needs no data: its compression recorded what thresholds are read from. A model that was not compressed
    runs calibration text first, unless `threshold` is given; skipped slots get the weight 0 there, which gives the
    results of pruning and saves no time.

    Args:
        model: a transformers model, packed or not; changed in place. A packed one is saved with it.
        odp: True for the defaults, options, or False for off. Default True, if no `otp` is given.
        otp: prune by the routers that `train_expert_pruning` gave the model instead: True as they were trained, or a
            number for another share of routed slots.
        dataset: calibration text, as in `MCMoEConfig`; for packed models, measure again on this.
        tokenizer: tokenizer object or id; default the model's own.
        num_samples: calibration sequences.
        seq_len: tokens per calibration sequence.
        seed: seed of the choice of text.

    Returns:
        The options with what was found, None for off.

    Raises:
        ValueError: no thresholds can be found, the model has no routers, or options do not fit the model; the model then
            keeps what it had.
    """
    before, config = attached(model), _quantization_config(model)
    if otp is not None and otp is not False:
        if odp:
            raise ValueError("odp and otp are two rules for the same slots; give one of them.")
        learned = _learned(model, otp)
        return _switch(model, before, config, lambda: start_learned_pruning(model, learned))
    options = ODPConfig.read(True if odp is None and otp is None else odp)
    if options is None:
        return _switch(model, before, config, lambda: None)
    chosen_layers(prunable_experts(model), options)  # refuses what does not fit before anything is run

    def start(options: ODPConfig = options) -> ODPConfig:
        if dataset is not None:
            tokens = _calibration(model, dataset, tokenizer, num_samples, seq_len, seed)
            options = with_thresholds(model, options, None, tokens)
        elif not options.calibrated:
            options = with_thresholds(model, options, recorded_ratios(model), None)
        return start_expert_pruning(model, options)

    return _switch(model, before, config, start)


def train_expert_pruning(
    model: Any,
    dataset: Any,
    target: float | None = None,
    *,
    options: OTPConfig | None = None,
    tokenizer: Any = None,
    num_samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> OTPConfig:
    """Train the routers of learned expert pruning on a loaded model, and switch it on ("OTP" of MC#, arXiv 2510.10962).

    Args:
        model: a transformers model, packed or not; changed in place. A packed one is saved with its routers.
        dataset: calibration text, as in `MCMoEConfig`.
        target: share of the routed slots to skip; default that of `options`.
        options: how to train; default `OTPConfig()`.
        tokenizer: tokenizer object or id; default the model's own.
        num_samples: calibration sequences; `OTPConfig.tokens` bounds what is used of them.
        seq_len: tokens per calibration sequence.
        seed: seed of the choice of text.
        progress: called with a `Progress`; None shows a bar.

    Returns:
        The options with what training found.

    Raises:
        ValueError: the model cannot be pruned, or the data not be used; the model then keeps what it had.
    """
    otp = options or OTPConfig()
    otp = replace(otp, target=otp.target or TARGET if target is None else target)
    check_learnable(model, otp)  # before anything is read
    tokens = _calibration(model, dataset, tokenizer, num_samples, seq_len, seed)

    def start() -> OTPConfig:
        return start_learned_pruning(model, trained(model, otp, tokens, progress))

    return _switch(model, attached(model), _quantization_config(model), start)


def trained(
    model: Any, otp: OTPConfig, tokens: Tensor, progress: Callable[[Progress], None] | None = None
) -> OTPConfig:
    """Train the routers of a model without pruning on tokens [N, T]; the options with what was found."""
    otp, meter = replace(otp, target=otp.target or TARGET), Meter(progress)
    try:
        otp = RouterTraining(model, prunable_experts(model), otp, meter).run(tokens)
    finally:
        meter.close()
    return replace(otp, model=model_mark(model))


def _switch(model: Any, before: ExpertPruning | None, config: MCMoEConfig | None, start: Callable[[], _T]) -> _T:
    """Put new pruning in the place of what there was, and that back if it cannot be."""
    if before is not None:
        before.detach()
    try:
        options = start()
    except BaseException:
        if before is not None:
            ExpertPruning(model, before.options)
        raise
    if config is not None:
        config.odp = options if isinstance(options, ODPConfig) else None
        learned = getattr(model, TRAINED, None)
        config.otp = learned and replace(learned, on=isinstance(options, OTPConfig))
    return options


def _learned(model: Any, otp: bool | float | OTPConfig) -> OTPConfig:
    """The options of a model's trained routers, for the share asked for."""
    known = otp if isinstance(otp, OTPConfig) and otp.trained else getattr(model, TRAINED, None)
    if known is None:
        raise ValueError(
            "This model has no pruning routers; train them with train_expert_pruning(model, dataset, target=0.2)."
        )
    asked = otp.target if isinstance(otp, OTPConfig) else None if otp is True else otp
    return replace(known, target=known.target if asked is None else asked, on=True)


def _calibration(model: Any, dataset: Any, tokenizer: Any, num_samples: int, seq_len: int, seed: int) -> Tensor:
    data = {"dataset": dataset, "tokenizer": tokenizer, "seed": seed}
    return tokens_for(model, MCMoEConfig(num_samples=num_samples, seq_len=seq_len, **data))


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
        digest.update(repr((module.widths.gate_up, module.widths.down)).encode())
        weight = next(iter(module.parameters()))
        if weight.is_meta:
            return None
        digest.update(weight.data.flatten()[:256].to("cpu").numpy().tobytes())
    return digest.hexdigest()[:16] if packed else None


def with_thresholds(
    model: Any, odp: ODPConfig, recorded: Mapping[str, Any] | None, tokens: Tensor | None
) -> ODPConfig:
    """The options with thresholds, and with the layers that `layers="auto"` finds.

    Args:
        model: the model, without pruning.
        odp: the options.
        recorded: the `routing_ratios` of its compression's report, if there is one: what thresholds are read from.
        tokens: calibration tokens [N, T], where there is no record or layers are to be chosen.
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
    thresholds = {path: [round(level, 6) for level in table.levels(odp)] for path, table in tables.items()}
    normalized = {path: table.normalized for path, table in tables.items()}
    odp = replace(odp, thresholds=thresholds, normalized=normalized, found_for=odp.decisive)
    if odp.layers != "auto":
        return odp
    assert tokens is not None
    return replace(odp, layers=_choose_layers(model, odp, tokens), max_kl=None)


def expert_pruning_stats(model: Any, reset: bool = False) -> dict[str, Any]:
    """What expert pruning skipped since it was switched on, or since the last reset.

    Args:
        model: a model with expert pruning.
        reset: start counting again afterwards.

    Returns:
        "prefill" (calls with several tokens a sequence) and "decode" (with one), each with `tokens`; `slots` and `bytes`, the
        routed (token, expert) pairs and the bytes of their experts; `slots_skipped` and `bytes_skipped`, shares of
        these; `bytes_per_token`, the bytes of experts that a token ran, over all layers; and `layers`, the same per
        experts module. Shares are None where nothing was routed. Padding is not counted.

    Raises:
        ValueError: the model has no expert pruning.
    """
    pruning = attached(model)
    if pruning is None:
        raise ValueError("This model has no expert pruning; switch it on with set_expert_pruning(model).")
    report: dict[str, Any] = {}
    for phase, name in enumerate(("prefill", "decode")):
        layers = {path: layer.counts.read(phase) for path, layer in pruning.layers.items()}
        total = {key: sum(layer[key] for layer in layers.values()) for key in next(iter(layers.values()))}
        total["tokens"] = max(layer["tokens"] for layer in layers.values())
        report[name] = _shares(total) | {"layers": {path: _shares(layer) for path, layer in layers.items()}}
    if reset:
        for layer in pruning.layers.values():
            layer.counts.reset()
    return report


def _shares(sums: Mapping[str, float]) -> dict[str, Any]:
    return {
        "tokens": int(sums["tokens"]),
        "slots": int(sums["slots"]),
        "bytes": int(sums["bytes"]),
        "slots_skipped": sums["slots_skipped"] / sums["slots"] if sums["slots"] else None,
        "bytes_skipped": sums["bytes_skipped"] / sums["bytes"] if sums["bytes"] else None,
        "bytes_per_token": (sums["bytes"] - sums["bytes_skipped"]) / sums["tokens"] if sums["tokens"] else None,
    }


def recorded_ratios(model: Any) -> Mapping[str, Any] | None:
    """What a packed model's report knows of its routing; None if it is not packed or has no report."""
    if _quantization_config(model) is None:
        return None
    try:
        return compression_report(model).get("routing_ratios")
    except (OSError, ValueError) as error:
        logger.warning("Thresholds are not read from the compression's report: %s", error)
        return None


def _measure(model: Any, odp: ODPConfig, tokens: Tensor | None) -> dict[str, RatioTable]:
    """What is known of the routing of every experts module: measured on tokens, or on a few random ones."""
    if tokens is None:
        if odp.threshold is None:
            raise ValueError(
                "Nothing is known of this model's routing weights, which thresholds are read from; give dataset=, or "
                "ODPConfig(threshold=...)."
            )
        # how many slots there are and whether their weights have a fixed sum: a few tokens show it
        vocabulary = model.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(0, vocabulary, (1, 64), generator=torch.Generator().manual_seed(0))
    device = model.get_input_embeddings().weight.device
    with observe_routing(model) as ratios, torch.no_grad(), _evaluating(model):
        for batch in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])):
            model(input_ids=batch.to(device), use_cache=False)
    sizes = expert_bytes(model)
    return {path: own.table(sizes[path]) for path, own in ratios.items()}


def _choose_layers(model: Any, odp: ODPConfig, tokens: Tensor) -> list[int]:
    """The most layers whose pruning together stays within `max_kl`, those first that cost least for a byte."""
    tokens = tokens[: max(1, KL_TOKENS // tokens.shape[1]), :KL_TOKENS]
    everywhere = replace(odp, layers="all", max_kl=None)
    base = functional.log_softmax(_logits(model, tokens), dim=-1)

    def measure(layers: Sequence[int]) -> tuple[float, float]:
        """KL in nats per token, and bytes skipped."""
        pruning = ExpertPruning(model, replace(everywhere, layers=layers))
        try:
            pruned = functional.log_softmax(_logits(model, tokens), dim=-1)
            skipped = expert_pruning_stats(model)["prefill"]
        finally:
            pruning.detach()
        kl = functional.kl_div(pruned, base, reduction="sum", log_target=True) / tokens.numel()
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
def _logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits [N, T, V] float32 of a model in evaluation mode."""
    with _evaluating(model):
        device = model.get_input_embeddings().weight.device
        output = model(input_ids=tokens.to(device), use_cache=False)
    if getattr(output, "logits", None) is None:
        raise ValueError(
            f"layers='auto' compares logits, which {type(model).__name__} has none of; load it with its head."
        )
    return output.logits.to("cpu", torch.float32)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _quantization_config(model: Any) -> MCMoEConfig | None:
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    return config if isinstance(config, MCMoEConfig) else None
