# SPDX-License-Identifier: Apache-2.0
"""What is checked and read before any weight is: budgets, calibration tokens, memory, disk, the run's fingerprint.

Knows the model's structure and the config; it does not know weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from transformers_mcmoe.allocation.budget import LayerSize, expert_budgets
from transformers_mcmoe.calibration.hessians import ExpertHessians
from transformers_mcmoe.calibration.images import calibration_sequences
from transformers_mcmoe.calibration.sequences import Sequences
from transformers_mcmoe.calibration.statistics import SAMPLE
from transformers_mcmoe.config import FORMAT_VERSION, MCMoEConfig, ODPConfig, OTPConfig
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline.kept import (
    check_plan,
    check_rank,
    kept_counts,
    looks,
    loss_sequences,
    planned_ranks,
    routers_for,
)
from transformers_mcmoe.plan import ExpertWidths, Plan, average_bits
from transformers_mcmoe.progress import size
from transformers_mcmoe.quantization.packing import GRID_BYTES, packed_shape
from transformers_mcmoe.routing import check_learnable, check_prunable
from transformers_mcmoe.version import __version__
from transformers_mcmoe.workdir import fingerprint

# memory beside weights: activations of one batch, what threads take (`threads.COPIES`), libraries' buffers (docs/streaming.md)
OVERHEAD = 512 << 20
# Hessians of small models are held together up to this size, which is part of OVERHEAD
_LEAST_HESSIANS = 128 << 20
# bytes that a group's scale and zero take while they are trained: values, factors, gradients, two moments each
_TUNED_GROUP = 40
# float32 copies of a sequence's logits that are held at once while its divergence is differentiated
_LOGITS = 10
# fields of a model's config that say nothing of the model
_NOT_THE_MODEL = ("quantization_config", "_name_or_path")
# bytes of a tensor's entry in the header of a safetensors file
_HEADER = 160


def prepare(structure: Structure, config: MCMoEConfig) -> tuple[dict[str, int], Sequences | None]:
    """Budget of every experts module, {} under a given plan, and calibration sequences, None where none are needed.

    Raises:
        ValueError: the budget or the plan does not fit the model, or the data cannot be used.
    """
    if isinstance(config.odp, ODPConfig):
        check_prunable(structure.model, config.odp)
        if config.plan is not None and config.rounding == "nearest" and config.odp.threshold is None:
            raise ValueError(
                "odp finds its thresholds by calibration, but a given plan with rounding='nearest' needs none; "
                "give ODPConfig(threshold=...), or rounding='gptq'."
            )
    if isinstance(config.otp, OTPConfig):
        check_learnable(structure.model, config.otp)
    budgets = budgets_of(structure, config)
    needed = config.plan is None or config.rounding != "nearest" or config.tuning_steps > 0
    learns = isinstance(config.otp, OTPConfig)
    tokens = tokens_for(structure.model, config) if needed or learns else None
    if learns and tokens is not None and len(tokens) < 2:
        raise ValueError("otp needs two calibration sequences or more, one of them to stop its training by.")
    if config.joint and config.plan is None and tokens is not None and len(tokens) < 2:
        raise ValueError("'auto' needs two calibration sequences or more, one of them to compare plans on.")
    if config.tuning_steps and tokens is not None and len(tokens) < 2:
        raise ValueError("tuning_steps needs two calibration sequences or more, one of them to judge it by.")
    return budgets, tokens if needed else None


def sized(structure: Structure, config: MCMoEConfig, dtype: torch.dtype) -> MCMoEConfig:
    """The config with the average that its `target_size` comes to.

    Args:
        structure: the model's.
        config: what is asked for.
        dtype: of the weights that are not quantized, in the output.

    Raises:
        ValueError: no widths are that small.
    """
    if config.target_size is None or config.plan is not None:
        return config
    low, high = (
        structure.matrices(same_widths(structure, config, bits))
        for bits in (config.expert_bits[0], config.expert_bits[-1])
    )
    least = sum(matrix.packed_bytes(config.group_size) for matrix in low)
    weights = sum(matrix.weights for matrix in low)
    parameters, tensors = structure.parameters()
    # an entry of a tensor in a file's header holds its name, shape and place
    fixed = (parameters - weights) * dtype.itemsize + _HEADER * (
        tensors + len(low) + 2 * sum(matrix.rank > 0 for matrix in low)
    )
    # scales and zeros do not depend on widths, so that bytes grow with the average, padding with the weights
    most = sum(matrix.packed_bytes(config.group_size) for matrix in high)
    per_byte = (average_bits(high) - average_bits(low)) / max(most - least, 1)
    average = average_bits(low) + per_byte * (config.target_bytes - fixed - least)
    if average < average_bits(low):
        raise ValueError(
            f"target_size={config.target_size!r} cannot be met: at the lowest widths the weights take "
            f"{size(fixed + least)}, {size(fixed)} of it not quantized; raise target_size, or add a lower width."
        )
    config = copy.copy(config)
    config.bits = min(average, average_bits(high))
    return config


def same_widths(structure: Structure, config: MCMoEConfig, bits: int) -> Plan:
    """A plan that gives all kept experts one width, with as many dropped and the ranks that the config comes to."""
    kept = kept_counts(structure, config)
    ranks = planned_ranks(structure, config, kept)
    experts = {}
    for path, module in structure.experts.items():
        widths = (bits,) * kept[path] + (0,) * (module.num_experts - kept[path])
        own = ranks.get(path, ())
        experts[path] = ExpertWidths(widths, widths, own, config.factors.bits if config.factors is not None else 0)
    return Plan(experts, structure.linears)


def budgets_of(structure: Structure, config: MCMoEConfig) -> dict[str, int]:
    """Sum of expert widths that every experts module may take, {} under a given plan.

    Raises:
        ValueError: the budget or the plan does not fit the model.
    """
    for path, experts in structure.experts.items():
        if experts.num_experts % config.expert_parallel:
            raise ValueError(
                f"expert_parallel={config.expert_parallel} does not divide the {experts.num_experts} experts of '{path}'; give a divisor of it."
            )
    if config.plan is not None:
        structure.check(config.plan)
        check_plan(structure, config.plan)
        return {}
    linears = structure.linear_weights()
    kept = kept_counts(structure, config)
    if config.factors is not None:
        check_rank(structure, config.factors)
    if looks(config):
        routers_for(structure, config.drops)
    if config.only_factors:
        return dict.fromkeys(structure.experts, 0)
    sizes = [LayerSize(kept[path], structure.expert_weights(path)) for path in structure.experts]
    fixed = sum(linears[path] * bits for path, bits in structure.linears.items())
    if config.factors is not None:
        ranks = planned_ranks(structure, config, kept)
        per_rank = {
            p: config.factors.bits * sum(m.out_features + m.in_features for m in e.projections)
            for p, e in structure.experts.items()
        }
        fixed += sum(per_rank[path] * sum(own) for path, own in ranks.items())
    dropped = sum(
        (e.num_experts - kept[path]) * structure.expert_weights(path) for path, e in structure.experts.items()
    )
    found = expert_budgets(config.bits, sizes, config.expert_bits, sum(linears.values()), fixed, dropped)
    _check_at_least(config, sizes, found)
    return dict(zip(structure.experts, found, strict=True))


def tokens_for(model: Any, config: MCMoEConfig) -> Sequences:
    """Calibration sequences that a config asks for.

    Raises:
        ValueError: the data cannot be used, or not with this model.
    """
    tokens = calibration_sequences(
        model,
        config.dataset,
        config.tokenizer,
        processor=config.processor,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        seed=config.seed,
        model_name=getattr(model.config, "name_or_path", ""),
    )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and tokens.longest > limit:
        raise ValueError(f"seq_len={tokens.longest} is longer than the {limit} positions of this model; lower it.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    highest = max(int(ids.max()) for ids in tokens.ids)
    if highest >= vocabulary or min(int(ids.min()) for ids in tokens.ids) < 0:
        raise ValueError(
            f"The calibration tokens reach id {highest}, but the model has {vocabulary} embeddings; "
            "give the model's own tokenizer."
        )
    return tokens


def _check_at_least(config: MCMoEConfig, sizes: Iterable[LayerSize], budgets: Iterable[int]) -> None:
    """Raise ValueError if a layer's budget cannot give `at_least` experts their widths."""
    asked = sum(config.at_least.values())
    for layer, budget in zip(sizes, budgets, strict=True):
        least = sum(bits * count for bits, count in config.at_least.items())
        least += config.expert_bits[0] * (layer.num_experts - asked)
        if asked > layer.num_experts or least > budget:
            raise ValueError(
                f"at_least={config.at_least} cannot be met: a layer of {layer.num_experts} experts has {budget} bits at "
                f"bits={config.bits}, but that takes {least}; ask for fewer, or raise bits."
            )


def fingerprint_of(
    structure: Structure, config: MCMoEConfig, files: Iterable[str | Path], tokens: Sequences, dtype: torch.dtype
) -> dict[str, str]:
    """Marks of a run in its work folder: of everything that its result depends on."""
    parts = {
        "version": f"{__version__}, format {FORMAT_VERSION}",
        # where a dataset lies does not matter, what is in it does
        "config": {
            **config.to_dict(),
            "dataset": None,
            "device": str(config.device),
            "dtype": str(dtype),
            "max_memory": config.max_memory,
        },
        "model": {
            name: value for name, value in structure.model.config.to_dict().items() if name not in _NOT_THE_MODEL
        },
        "dataset": tokens.fingerprint(),
    }
    return fingerprint(parts, list(files))


def hessian_memory(structure: Structure, config: MCMoEConfig, dtype: torch.dtype) -> int:
    """Bytes that Hessians may take at once; `max_memory` above the bound on the peak (docs/streaming.md) goes to them.

    Raises:
        ValueError: `max_memory` is below the bound.
    """
    layer, held, rest = memory_parts(structure, dtype, config)
    least = max(3 * layer // 4, _LEAST_HESSIANS)
    if config.max_memory is None:
        return least
    need = held + rest + OVERHEAD
    if need > config.max_memory_bytes:
        raise ValueError(
            f"max_memory={config.max_memory!r} is too little: a decoder layer of {layer / 1e9:.2f} GB takes up to "
            f"{held / 1e9:.2f} GB while it is rounded, embeddings {rest / 1e9:.2f} GB and what is beside them "
            f"{OVERHEAD / 1e9:.2f} GB, together {need / 1e9:.2f} GB; raise max_memory."
        )
    tuning = tuning_memory(structure, config, dtype)
    if tuning > config.max_memory_bytes:
        raise ValueError(
            f"max_memory={config.max_memory!r} is too little for tuning_steps={config.tuning_steps}: the packed model, its "
            f"grids and the logits of {config.seq_len} tokens take {tuning / 1e9:.2f} GB; raise max_memory, lower "
            "seq_len, or leave tuning_steps out."
        )
    more = config.max_memory_bytes - need
    return least + (more // 2 if config.factored else more)  # factors need the Hessians' copies, too


def tuning_memory(structure: Structure, config: MCMoEConfig, dtype: torch.dtype) -> int:
    """Bytes that tuning takes: the whole packed model, its grids in training, and a sequence's logits; 0 without."""
    head = structure.model.get_output_embeddings()
    if not config.tuning_steps or head is None:
        return 0
    widths = {path: ExpertWidths.of([1] * e.num_experts) for path, e in structure.experts.items()}
    matrices = structure.matrices(Plan(widths, structure.linears))
    weights = sum(matrix.weights for matrix in matrices)
    shapes = [packed_shape(m.out_features, m.in_features, m.bits, config.group_size) for m in matrices]
    groups = sum(rows * count for rows, count, _ in shapes)
    parameters, _ = structure.parameters()
    packed = int(weights * config.bits / 8) + GRID_BYTES * groups
    logits = _LOGITS * 4 * config.seq_len * head.weight.shape[0]
    return packed + _TUNED_GROUP * groups + (parameters - weights) * dtype.itemsize + logits + OVERHEAD


def memory_parts(structure: Structure, dtype: torch.dtype, config: MCMoEConfig) -> tuple[int, int, int]:
    """Bytes of a dense decoder layer, of what is held while one is rounded, and of what lies outside the layers."""
    layer, rest = (weights * dtype.itemsize for weights in structure.layer_sizes())
    # the Hessians of one expert or linear layer are held whatever they take, with three copies while one is factorized
    modules = [structure.model.get_submodule(path) for path in structure.linears]
    sizes = [ExpertHessians.bytes_per_expert(experts) for experts in structure.experts.values()]
    single = max(sizes + [4 * module.in_features**2 for module in modules])
    # Hessians are copied for factors, and rooted in float64
    held = max(4 * layer, 2 * layer + (9 if config.factored else 4) * single)
    if config.drops is not None and config.plan is None and not config.drops.even:
        held = max(held, (1 + config.drops.field) * layer)
    return layer, held, rest


def image_need(structure: Structure, tokens: Sequences, dtype: torch.dtype) -> int:
    """Bytes that embedded sequences and what layers are given with each take beside `rank_disk`, where there are images."""
    if tokens.are_text:
        return 0
    hidden = next(iter(structure.experts.values())).projections[0].in_features
    masks = 2 * sum(len(ids) ** 2 for ids in tokens.ids)  # of full and of local attention
    return (tokens.numel() * hidden + masks) * dtype.itemsize


def packed_disk(structure: Structure, config: MCMoEConfig) -> int:
    """Bytes that packed layers take at most."""
    weights = sum(structure.linear_weights().values())
    weights += sum(structure.expert_weights(path) * e.num_experts for path, e in structure.experts.items())
    packed = weights * (max(4, *config.expert_bits) + (8 if config.factored else 0)) // 8
    return packed * (2 if config.joint and config.plan is None else 1)  # two plans are rounded


def rank_disk(structure: Structure, config: MCMoEConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that hidden states and samples of experts' inputs take at most, of one process."""
    joint = config.joint and config.plan is None
    # hidden states before and behind a layer; those behind the dense model are kept for tuning, and to compare two plans with
    tokens *= 2 + (config.tuning_steps > 0) + 2 * joint
    hidden = next(iter(structure.experts.values())).projections[0].in_features
    samples = SAMPLE * max(experts.num_experts for experts in structure.experts.values())
    if config.drops is not None and config.drops.importance == "loss" and config.plan is None:
        every = sum(experts.num_experts for experts in structure.experts.values())
        samples += every * loss_sequences(config.seq_len) * config.seq_len
    return (tokens + samples) * hidden * dtype.itemsize
