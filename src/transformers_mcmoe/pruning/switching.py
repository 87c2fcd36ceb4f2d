# SPDX-License-Identifier: Apache-2.0
"""Expert pruning as users call it: switch it on, off or to other options on a loaded model, and have routers trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from transformers_mcmoe.calibration.sequences import Sequences as Calibration
from transformers_mcmoe.config import TARGET, MCMoEConfig, ODPConfig, OTPConfig
from transformers_mcmoe.pipeline.prepare import tokens_for
from transformers_mcmoe.progress import Progress
from transformers_mcmoe.pruning.learned import TRAINED, learned_options, start_learned_pruning, trained
from transformers_mcmoe.pruning.thresholds import (
    quantization_config_of,
    recorded_ratios,
    start_expert_pruning,
    with_thresholds,
)
from transformers_mcmoe.routing import ExpertPruning, attached, check_learnable, chosen_layers, prunable_experts

_T = TypeVar("_T", bound="ODPConfig | OTPConfig | None")


def set_expert_pruning(
    model: Any,
    odp: bool | ODPConfig | Mapping[str, Any] | None = None,
    *,
    otp: bool | float | OTPConfig | None = None,
    dataset: Any = None,
    tokenizer: Any = None,
    processor: Any = None,
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
        processor: processor object or id, for samples with images; default the model's own.
        num_samples: calibration sequences.
        seq_len: tokens per calibration sequence.
        seed: seed of the choice of text.

    Returns:
        The options with what was found, None for off.

    Raises:
        ValueError: no thresholds can be found, the model has no routers, or options do not fit the model; the model then
            keeps what it had.
    """
    before, config = attached(model), quantization_config_of(model)
    if otp is not None and otp is not False:
        if odp:
            raise ValueError("odp and otp are two rules for the same slots; give one of them.")
        learned = learned_options(model, otp)
        return _switch(model, before, config, lambda: start_learned_pruning(model, learned))
    options = ODPConfig.read(True if odp is None and otp is None else odp)
    if options is None:
        return _switch(model, before, config, lambda: None)
    chosen_layers(prunable_experts(model), options)  # refuses what does not fit before anything is run

    def start(options: ODPConfig = options) -> ODPConfig:
        if dataset is not None:
            tokens = _calibration(model, dataset, (tokenizer, processor), num_samples, seq_len, seed)
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
    processor: Any = None,
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
        processor: processor object or id, for samples with images; default the model's own.
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
    tokens = _calibration(model, dataset, (tokenizer, processor), num_samples, seq_len, seed)

    def start() -> OTPConfig:
        return start_learned_pruning(model, trained(model, otp, tokens, progress))

    return _switch(model, attached(model), quantization_config_of(model), start)


@contextmanager
def without_expert_pruning(model: Any) -> Iterator[None]:
    """While open, a model runs all experts that its router chose; what was skipped before is no longer counted."""
    pruning = attached(model)
    if pruning is not None:
        pruning.detach()
    try:
        yield
    finally:
        if pruning is not None:
            ExpertPruning(model, pruning.options)


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


def _calibration(
    model: Any, dataset: Any, readers: tuple[Any, Any], num_samples: int, seq_len: int, seed: int
) -> Calibration:
    data = {"dataset": dataset, "tokenizer": readers[0], "processor": readers[1], "seed": seed}
    return tokens_for(model, MCMoEConfig(num_samples=num_samples, seq_len=seq_len, **data))
