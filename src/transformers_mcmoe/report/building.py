# SPDX-License-Identifier: Apache-2.0
"""The report of a compression: built from what the pipeline measured, kept beside the weights, read back by name.

Knows results and files, not how anything was computed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from transformers_mcmoe.calibration.data import DEFAULT_DATASET
from transformers_mcmoe.calibration.images import sees_images
from transformers_mcmoe.calibration.rows import DEFAULT_IMAGES
from transformers_mcmoe.config import FORMAT_VERSION, MCMoEConfig, ODPConfig
from transformers_mcmoe.config.values import is_mixture
from transformers_mcmoe.integrations.card import inherited
from transformers_mcmoe.pipeline import Compressed, LayerResult
from transformers_mcmoe.plan import Matrix, average_bits, bits_per_weight
from transformers_mcmoe.report.placement import placement
from transformers_mcmoe.version import versions

logger = logging.getLogger(__name__)

REPORT_NAME = "mcmoe_report.json"


def build_report(model: nn.Module, config: MCMoEConfig, result: Compressed) -> dict[str, Any]:
    """Report of a compression as a JSON-serialisable dict.

    Args:
        model: the packed model.
        config: the config it was asked for with.
        result: what the pipeline measured.

    Returns:
        `model`, `base_model` (Hub id, None for a local one), `license` (of a local model's own card), `dtype` of what stays
        dense, `average_bits` (codes only), `bits_per_weight` (bytes x 8 / weights over the quantized matrices, scales and
        zeros included), `expert_bits` per layer (gate and up) and `down_bits`, `routing_ratios` (quantiles of smaller over largest routing weights per
        layer and slot, see `RatioTable`), `dropped_experts` (None if there are none; `_dropped`), `compared_plans` (KL divergence of two plans on sequences kept for that, or None), `activated_bytes_per_token` (bytes of
        weights read for one token, by the calibration's routing; None without calibration), `coverage`, `errors` by width, `role_errors` by
        role and width where roles have widths of their own, `fallbacks`, `sizes` in bytes,
        `seconds` by stage, `calibration_source` and `calibration_sha256` (of the token ids), `plan_given`, `versions`, `config`.
        With `expert_parallel` also that: what each rank holds and is sent, see `placement`.
        `sizes["parts"]` has the bytes of experts by width ("experts, 2 bits"), of the other packed matrices, of embeddings
        and output head, and of the rest.
    """
    matrices = result.matrices
    packed = sum(matrix.packed_bytes(config.group_size) for matrix in matrices)
    weights = sum(matrix.weights for matrix in matrices)
    total = sum(tensor.nbytes for tensor in _tensors(model).values())
    return {
        "format_version": FORMAT_VERSION,
        **_origin(str(getattr(model.config, "name_or_path", ""))),
        "dtype": str(model.dtype).removeprefix("torch."),
        "average_bits": average_bits(matrices),
        "bits_per_weight": bits_per_weight(matrices, config.group_size),
        "expert_bits": {path: "".join(map(str, widths.gate_up)) for path, widths in result.plan.experts.items()},
        "rank_bits": max((widths.rank_bits for widths in result.plan.experts.values()), default=0),
        "ranks": {path: list(widths.ranks) for path, widths in result.plan.experts.items() if any(widths.ranks)},
        "down_bits": {path: "".join(map(str, widths.down)) for path, widths in result.plan.experts.items()},
        "dropped_experts": _dropped(result),
        "compared_plans": result.compared,
        "activated_bytes_per_token": _activated_bytes(model, config, result),
        "routing_ratios": _ratios(config, result),
        "coverage": {
            path: _coverage(layer, result.image_tokens > 0)
            for path, layer in result.layers.items()
            if layer.routing is not None
        },
        "errors": {path: {str(b): e for b, e in layer.errors.items()} for path, layer in result.layers.items()},
        "role_errors": {path: _by_role(layer) for path, layer in result.layers.items() if layer.role_errors},
        "fallbacks": list(result.fallbacks),
        "sizes": {
            "quantized_weights": weights,
            "quantized_bytes": packed,
            "total_bytes": total,
            "dense_bytes": total - packed + 2 * weights,  # quantized matrices at 16 bits
            "parts": _parts(model, config, result),
        },
        "calibration_tokens": result.tokens,
        "image_tokens": result.image_tokens,
        "sees_images": sees_images(model.config),
        "calibration_source": _source(config, result),
        "calibration_sha256": result.tokens_sha256,
        "plan_given": result.plan_given,
        "seconds": result.seconds,
        "seed": config.seed,
        "versions": versions(),
        "config": config.to_dict(),
    }


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint by name, tied ones once."""
    named = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    return named | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def _origin(name: str) -> dict[str, Any]:
    """The dense model, without the folders of this machine, and its licence where it lies beside it."""
    if Path(name).exists():
        return {"model": Path(name).resolve().name, "base_model": None, "license": inherited(name)}
    return {"model": name, "base_model": name or None, "license": {}}


def _source(config: MCMoEConfig, result: Compressed) -> str | None:
    """Where the calibration text came from: a Hub id, a file's name, or "given in memory"; None without calibration."""
    dataset = config.dataset
    if not result.tokens:
        return None
    if dataset is None:
        return (DEFAULT_IMAGES if result.image_tokens else DEFAULT_DATASET)["path"]  # type: ignore[return-value]
    if is_mixture(dataset):
        return " + ".join(_named(name) for name in dataset)
    if isinstance(dataset, Mapping):
        return str(dataset["path"])
    return _named(dataset) if isinstance(dataset, str | Path) else "given in memory"


def _named(dataset: str | Path) -> str:
    return Path(dataset).name if Path(dataset).exists() else str(dataset).partition(":")[0]


def _parts(model: Any, config: MCMoEConfig, result: Compressed) -> dict[str, int]:
    """Bytes of the checkpoint by what they are for."""
    inside = tuple(path + "." for path in result.plan.experts)
    experts: dict[str, int] = {}
    others = 0
    for matrix in sorted(result.matrices, key=lambda matrix: matrix.bits):
        size = matrix.packed_bytes(config.group_size)
        if matrix.name.startswith(inside):
            name = f"experts, {_described(matrix)}"
            experts[name] = experts.get(name, 0) + size
        else:
            others += size
    tensors = _tensors(model)
    ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    embeddings = sum(t.nbytes for t in tensors.values() if id(t) in ends)
    rest = sum(t.nbytes for t in tensors.values()) - embeddings - others - sum(experts.values())
    return experts | {"attention, shared": others, "embeddings, head": embeddings, "routers, norms": rest}


def _described(matrix: Matrix) -> str:
    """How a matrix is kept: "2 bits", "low rank, 8 bits", or both."""
    parts = [f"{matrix.bits} bit{'s' if matrix.bits != 1 else ''}"] if matrix.bits or not matrix.rank else []
    return " + ".join(parts + ([f"low rank, {matrix.rank_bits} bits"] if matrix.rank else []))


def _dropped(result: Compressed) -> dict[str, Any] | None:
    """What was dropped: ids by experts path, how many of how many, their weights and bytes at 16 bits.

    Where they were searched for, also the `importance` of all experts and the `errors` of blocks, see `Dropped`.
    """
    experts = result.plan.experts
    ids = {path: [e for e in range(len(widths.gate_up)) if e not in widths.kept] for path, widths in experts.items()}
    if not any(ids.values()):
        return None
    inside = tuple(path + "." for path in experts)
    weights = sum(m.weights for m in result.matrices if m.code_bits == 0 and m.name.startswith(inside))
    found = result.dropped
    return {
        "experts": {path: dropped for path, dropped in ids.items() if dropped},
        "count": sum(map(len, ids.values())),
        "of": sum(len(widths.gate_up) for widths in experts.values()),
        "weights": weights,
        "dense_bytes": 2 * weights,
        "importance": {} if found is None else found.importance,
        "errors": {} if found is None else found.errors,
    }


def _by_role(layer: LayerResult) -> dict[str, dict[str, list[float]]]:
    return {role: {str(bits): e for bits, e in errors.items()} for role, errors in layer.role_errors.items()}


def _coverage(layer: LayerResult, images: bool) -> dict[str, Any]:
    if layer.routing is None:
        return {}
    return {
        "tokens": layer.routing.tokens.tolist(),
        **({"image_tokens": layer.routing.image_tokens.tolist()} if images else {}),
        "routing_weight": [round(weight, 4) for weight in layer.routing.weight.tolist()],
        "starved": layer.starved,
    }


def _ratios(config: MCMoEConfig, result: Compressed) -> dict[str, Any]:
    sizes = _expert_bytes(result, config.group_size)
    return {
        path: layer.ratios.table(
            [sizes[f"{path}.{e}"] for e in range(len(result.plan.experts[path].gate_up))]
        ).to_dict()
        for path, layer in result.layers.items()
        if layer.ratios is not None and layer.ratios.slots
    }


def _activated_bytes(model: Any, config: MCMoEConfig, result: Compressed) -> int | None:
    if not result.tokens:
        return None
    inside = tuple(path + "." for path in result.plan.experts)
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    read: float = sum(t.nbytes for name, t in _tensors(model).items() if not name.startswith(inside))
    if not tied:  # one row of the embedding is read; a tied one is read whole as the output head
        read -= embeddings.weight.nbytes
    sizes = _expert_bytes(result, config.group_size)
    for path, layer in result.layers.items():
        if layer.routing is not None:
            share = layer.routing.tokens.to(torch.float64) / result.tokens
            read += sum(float(s) * sizes.get(f"{path}.{e}", 0) for e, s in enumerate(share))
    return round(read)


def expert_placement(config: MCMoEConfig, result: Compressed) -> dict[str, Any]:
    """What the ranks of `expert_parallel` hold and are sent, see `placement`; under the thresholds that the config has by now."""
    known = _expert_bytes(result, config.group_size)
    sizes = {
        path: [float(known[f"{path}.{expert}"]) for expert in range(len(widths.gate_up))]
        for path, widths in result.plan.experts.items()
    }
    odp = config.odp if isinstance(config.odp, ODPConfig) else None
    images = result.image_tokens / max(1, result.tokens)
    return placement(config.expert_parallel, sizes, result.layers, odp, images)


def _expert_bytes(result: Compressed, group_size: int) -> dict[str, int]:
    """Packed bytes by "{experts path}.{expert}"."""
    sizes: dict[str, int] = {}
    for matrix in result.matrices:
        path = next((path for path in result.plan.experts if matrix.name.startswith(path + ".")), None)
        if path is not None:
            expert = f"{path}.{matrix.name.removeprefix(path + '.').partition('.')[0]}"
            sizes[expert] = sizes.get(expert, 0) + matrix.packed_bytes(group_size)
    return sizes


def compression_report(model: Any) -> dict[str, Any]:
    """The report of the compression that a packed model comes from.

    Args:
        model: a model loaded or compressed by transformers_mcmoe.

    Returns:
        The dict that `mcmoe_report.json` beside the weights holds; see `build_report`.

    Raises:
        ValueError: the model is not packed by transformers_mcmoe, or there is no report beside its weights.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if not isinstance(getattr(quantizer, "quantization_config", None), MCMoEConfig):
        raise ValueError(f"This {type(model).__name__} was not compressed by transformers_mcmoe; it has no report.")
    if quantizer.report is None:
        quantizer.report = read_report(model)
    return quantizer.report


def read_report(model: Any) -> dict[str, Any]:
    """The report beside the weights that a model was loaded from, locally or on the Hub."""
    return load_report(model.config.name_or_path, model.hf_quantizer.commit)


def load_report(name: str, revision: str | None = None) -> dict[str, Any]:
    """The report of a packed model, by its folder or Hub id.

    Raises:
        ValueError: there is none beside the weights.
        OSError: there is no such model.
    """
    path = cached_file(name, REPORT_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise ValueError(f"'{name}' has no {REPORT_NAME} beside its weights; it was saved without one.")
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_report(report: Mapping[str, Any], directory: str | Path) -> None:
    """Write a report beside saved weights."""
    text = json.dumps(report, indent=2) + "\n"
    (Path(directory) / REPORT_NAME).write_text(text, encoding="utf-8")
