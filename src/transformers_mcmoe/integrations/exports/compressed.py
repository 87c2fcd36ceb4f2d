# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints as compressed-tensors ("pack-quantized"), which vLLM and transformers read without this package.

Codes and scales stay what they are, to the bit; zeros must be whole numbers, as the format has them in code width.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from transformers_mcmoe.integrations.exports.stored import Matrix, Stored, check_symmetric, written_whole
from transformers_mcmoe.integrations.hub import copy_tokenizer
from transformers_mcmoe.progress import Meter, Progress
from transformers_mcmoe.quantization.grid import group_size_for

logger = logging.getLogger(__name__)

# matrices that engines join, by what they then call them
JOINT = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up",
         "q_a_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a"}  # fmt: skip


def export(name: str, output: Path, progress: Callable[[Progress], None] | None = None) -> None:
    """Write a packed checkpoint as compressed-tensors.

    Args:
        name: folder or Hub id of the packed checkpoint.
        output: new folder.
        progress: as `MCMoEConfig` takes it.

    Raises:
        ValueError: the checkpoint is not packed, or has what the format does not.
        ImportError: compressed-tensors is not installed.
    """
    stored = Stored(name)
    _check(stored)
    meter = Meter(progress)
    meter.start("export", len(stored.matrices), "matrix")
    with written_whole(output) as folder:
        index: dict[str, str] = {}
        for file in stored.files:
            tensors: dict[str, Tensor] = {}
            for key in stored.keys_of(file):
                if key in stored.matrices:
                    tensors |= _converted(stored, stored.matrices[key])
                    meter.layer_done()
                else:
                    tensors[key] = stored.tensor(key)
            save_file(tensors, folder / Path(file).name, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, Path(file).name)
        if len(stored.files) > 1:
            text = json.dumps({"metadata": {}, "weight_map": index}, indent=1)
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        if not copy_tokenizer(name, folder):
            logger.warning("No tokenizer goes with the export: '%s' has none.", name)
        with suppress(OSError):
            GenerationConfig.from_pretrained(name).save_pretrained(folder)
        config = stored.config.to_dict() | {"quantization_config": _quantization(stored)}
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    meter.close()


def _check(stored: Stored) -> None:
    """Raise ValueError for what the format, or the engines that join matrices, do not have."""
    joint: dict[str, dict[tuple[int, int], str]] = {}
    for matrix in stored.matrices.values():
        scheme = _scheme(stored, matrix)
        group = scheme[1]
        if matrix.bits == 1:
            raise ValueError(
                f"'{matrix.key}' has 1 bit, whose two values lie around zero; compressed-tensors has no such grid: use 2 bits or more."
            )
        if matrix.in_features % group:
            raise ValueError(
                f"'{matrix.key}' has {matrix.in_features} columns, no multiple of its group size {group}; compressed-tensors has no "
                "padded groups: choose a group_size that divides it."
            )
        owner, _, leaf = matrix.path.rpartition(".")
        kinds = JOINT
        place = f"{owner}.{kinds.get(leaf, leaf)}" if matrix.expert is None else f"{matrix.layer}.experts"
        joint.setdefault(place, {})[scheme] = matrix.key
    for schemes in joint.values():
        if len(schemes) > 1:
            told = ", ".join(f"'{key}' {bits} bits in groups of {group}" for (bits, group), key in schemes.items())
            raise ValueError(
                f"Engines join matrices that differ here: {told}; compress with granularity='layer', one width for attention_bits and "
                "shared_expert_bits, such as 4, and a group_size that divides all columns."
            )


def _scheme(stored: Stored, matrix: Matrix) -> tuple[int, int]:
    """Width and group size."""
    return matrix.bits, group_size_for(matrix.in_features, stored.quantization.group_size)


def _converted(stored: Stored, matrix: Matrix) -> dict[str, Tensor]:
    """The tensors of a matrix."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    quantized = stored.quantized(matrix)
    zero = quantized.zero
    if stored.quantization.symmetric:
        check_symmetric(matrix, quantized)
    if not bool((zero == zero.round()).all() and (zero >= 0).all() and (zero < 2**matrix.bits).all()):
        raise ValueError(
            f"'{matrix.key}' has zeros that are no codes, but compressed-tensors has whole ones; compress with integer_zeros=True or "
            "symmetric=True."
        )
    middle = 2 ** (matrix.bits - 1)  # its codes are signed
    codes = (quantized.codes.flatten(1).to(torch.int16) - middle).to(torch.int8)
    stem = matrix.key.removesuffix(".weight")
    found = {
        f"{stem}.weight_packed": pack_to_int32(codes, matrix.bits),
        f"{stem}.weight_scale": quantized.scale.to(torch.float16),
        f"{stem}.weight_shape": torch.tensor([matrix.out_features, matrix.in_features]),
    }
    if not stored.quantization.symmetric:
        signed = (zero.to(torch.int16) - middle).to(torch.int8)
        found[f"{stem}.weight_zero_point"] = pack_to_int32(signed, matrix.bits, packed_dim=0).contiguous()
    return found


def _quantization(stored: Stored) -> dict[str, Any]:
    """config.json's `quantization_config`."""
    # experts apart from the rest: transformers looks for one scheme of either
    schemes: dict[tuple[bool, int, int], list[Matrix]] = {}
    for matrix in stored.matrices.values():
        schemes.setdefault((matrix.expert is not None, *_scheme(stored, matrix)), []).append(matrix)
    groups = {}
    for n, ((_, bits, group), matrices) in enumerate(sorted(schemes.items(), key=lambda item: item[0])):
        groups[f"group_{n}"] = {
            "targets": _targets(matrices),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": stored.quantization.symmetric,
                "strategy": "group",
                "group_size": group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    known = {matrix.key.removesuffix(".weight") for matrix in stored.matrices.values()}
    others = {key.removesuffix(".weight") for key in stored.checkpoint.slices if key.endswith(".weight")} - known
    dense = sorted(name for name in others if len(stored.checkpoint.slices[f"{name}.weight"].get_shape()) == 2)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*dense, "lm_head"}),
    }


def _targets(matrices: Iterable[Matrix]) -> list[str]:
    """Patterns of module names; those that differ in the numbers of layers share one."""
    layers: dict[str, set[int]] = {}
    for matrix in matrices:
        stem = matrix.key.removesuffix(".weight")
        pattern = re.escape(stem)
        if matrix.expert is not None:  # engines ask about experts by the name of one
            pattern = re.sub(rf"\\\.{matrix.expert}\\\.[^.]*$", r"\\..*", pattern)
        pattern = pattern.replace(rf"\.{matrix.layer}\.", r"\.%s\.", 1)
        layers.setdefault(pattern, set()).add(matrix.layer)
    return [f"re:{pattern % _either(numbers)}$" for pattern, numbers in layers.items()]


def _either(numbers: Iterable[int]) -> str:
    return "(" + "|".join(map(str, sorted(numbers))) + ")"
