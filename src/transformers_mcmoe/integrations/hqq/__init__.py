# SPDX-License-Identifier: Apache-2.0
"""HQQ matrices to packed records and back: modules, models and checkpoints, with the same codes and grids.

Reading needs nothing of the hqq package; `to_hqq` makes its modules, and only here it is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from transformers_mcmoe.integrations.hqq.checkpoint import convert_hqq
from transformers_mcmoe.integrations.hqq.matrix import HQQMatrix, common_group_size, open_source, read
from transformers_mcmoe.nn import PackedLinear
from transformers_mcmoe.plan import Matrix
from transformers_mcmoe.quantization import unpack

__all__ = ["PackedTensors", "convert_hqq", "from_hqq", "read_hqq", "to_hqq"]

# width -> HQQ's packing and the number of groups that must be full; 3 bits are padded by HQQ itself
_PACKINGS = {1: ("1bit_u8", 8), 2: ("2bit_u8", 4), 3: ("3bit_32", 1), 4: ("4bit_u8", 2), 8: ("8bit_u8", 1)}


@dataclass(frozen=True)
class PackedTensors:
    """What a checkpoint of format version 1 holds.

    Attributes:
        matrices: packed matrices by module name.
        group_size: the configured group size that all of them have.
        tensors: `{name}.weight` [out, n, G * bits / 8 + 4] uint8 for every matrix, `{name}.bias` where it has one, and
            all other tensors as they were.
    """

    matrices: Mapping[str, Matrix]
    group_size: int
    tensors: Mapping[str, Tensor] = field(repr=False)


@overload
def from_hqq(source: Mapping[str, Any], group_size: int | None = None) -> dict[str, PackedLinear]: ...
@overload
def from_hqq(source: nn.Module, group_size: int | None = None) -> Any: ...
def from_hqq(source: Any, group_size: int | None = None) -> Any:
    """Turn HQQLinear modules into PackedLinear.

    Codes are kept, grids are rounded to fp16. Widths of 5 and 6 bits, which HQQ stores as bytes, become 8 bits, and
    1.58 bits become 2. Quantized scales and zeros, which older releases of HQQ made, are dequantized first.

    Args:
        source: an HQQLinear; a dict of them; or a model, whose HQQLinear modules are replaced in place.
        group_size: the configured group size of the result, a multiple of 32; by default, of those that keep all
            groups, the one with the fewest bytes.

    Returns:
        A PackedLinear, a dict of them, or the model.

    Raises:
        ValueError: there is no HQQLinear, or one cannot be carried over exactly: it is grouped along out_features
            (axis 0), its groups would be cut by records (their size is no multiple of 32, or they cross rows), or
            fp16 cannot hold a scale. Nothing is replaced then.
    """
    if isinstance(source, nn.Module) and not _is_hqq(source):
        named = {name: module for name, module in source.named_modules() if _is_hqq(module)}
        if not named:
            raise ValueError(f"{type(source).__name__} has no HQQLinear module; quantize it with HQQ first.")
        for name, linear in from_hqq(named, group_size).items():
            source.set_submodule(name, linear)
        return source
    if isinstance(source, nn.Module):
        return from_hqq({"": source}, group_size)[""]
    for name, module in source.items():
        if not _is_hqq(module):
            raise ValueError(f"'{name}' is a {type(module).__name__}, not an HQQLinear; for tensors call read_hqq.")
    found = [HQQMatrix(n, {**(m.meta or {}), "W_q": m.W_q, "bias": m.bias}) for n, m in source.items()]
    size = common_group_size(found, group_size)
    return {m.name: _packed_linear(m.matrix, m.tensors(size), size) for m in found}


def read_hqq(source: Mapping[str, Any] | str | Path, group_size: int | None = None) -> PackedTensors:
    """Turn a saved HQQ state into packed tensors.

    Args:
        source: the state dict of an HQQLinear or of a model with such modules, encoded for safetensors or not; or a
            safetensors file, hqq's own `qmodel.pt`, or a folder with either. Python objects are never unpickled.
        group_size: see `from_hqq`.

    Raises:
        ValueError: the source is none of these or holds no HQQ matrix, or one cannot be carried over, see `from_hqq`.
    """
    matrices, rest = open_source(source)
    size = common_group_size(matrices, group_size)
    tensors = {name: read(value) for name, value in rest.items()}
    for matrix in matrices:
        tensors |= matrix.tensors(size)
    return PackedTensors({matrix.name: matrix.matrix for matrix in matrices}, size, tensors)


@overload
def to_hqq(
    source: Mapping[str, PackedLinear] | PackedTensors, compute_dtype: torch.dtype = torch.float16
) -> dict[str, Any]: ...
@overload
def to_hqq(source: nn.Module, compute_dtype: torch.dtype = torch.float16) -> Any: ...
def to_hqq(source: Any, compute_dtype: torch.dtype = torch.float16) -> Any:
    """Turn packed matrices into HQQLinear modules with the same codes, scales and zeros, on the same device.

    Args:
        source: a PackedLinear; a dict of them; `PackedTensors`; or a model, whose PackedLinear modules are replaced in
            place, those of experts included. A model from `from_pretrained` keeps its quantization_config: it is to be
            run then, not to be saved by `save_pretrained`.
        compute_dtype: dtype of the modules' inputs, scales and zeros; fp16 and fp32 hold grids exactly, bf16 rounds.

    Returns:
        An HQQLinear, a dict of them by module name, or the model.

    Raises:
        ImportError: the hqq package is not installed.
        ValueError: there is nothing packed, a matrix was dropped, or its padded groups are none that HQQ can have.
            Nothing is replaced then.
    """
    if isinstance(source, PackedLinear):
        return to_hqq({"": source}, compute_dtype)[""]
    if isinstance(source, PackedTensors):
        source = {n: _packed_linear(m, source.tensors, source.group_size) for n, m in source.matrices.items()}
    if isinstance(source, Mapping):
        return {name: _hqq_linear(name, linear, compute_dtype) for name, linear in source.items()}
    # a dropped projection of a module list stays as it is
    named = {n: m for n, m in source.named_modules() if isinstance(m, PackedLinear) and m.weight is not None}
    if not named:
        raise ValueError(f"{type(source).__name__} has no PackedLinear module; load a packed model first.")
    for name, module in to_hqq(named, compute_dtype).items():
        source.set_submodule(name, module)
    return source


def _is_hqq(module: Any) -> bool:
    """Whether this is an HQQLinear, without importing the package that it would come from."""
    return type(module).__module__.startswith("hqq.") and hasattr(module, "W_q") and hasattr(module, "meta")


def _packed_linear(matrix: Matrix, tensors: Mapping[str, Tensor], group_size: int) -> PackedLinear:
    prefix = f"{matrix.name}." if matrix.name else ""
    bias = tensors.get(f"{prefix}bias")
    dtype = bias.dtype if bias is not None else None
    linear = PackedLinear(matrix.in_features, matrix.out_features, matrix.bits, group_size, dtype, "meta")
    linear.weight = nn.Parameter(tensors[f"{prefix}weight"], requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def _hqq_linear(name: str, linear: PackedLinear, compute_dtype: torch.dtype) -> nn.Module:
    try:
        from hqq.core.quantize import HQQLinear, Quantizer
    except ImportError as error:
        raise ImportError(
            f"HQQ modules need the hqq package ({error}): pip install 'transformers_mcmoe[hqq]'."
        ) from error
    if linear.rank:
        raise ValueError(f"The matrix '{name}' has low-rank factors, for which an HQQLinear has no place.")
    if linear.weight is None:
        raise ValueError(f"The matrix '{name}' was dropped; an HQQLinear cannot stand for it.")
    quantized = unpack(linear.weight.data, linear.bits, linear.in_features)
    shape = torch.Size((linear.out_features, linear.in_features))
    size = _hqq_group_size(name, quantized.codes.shape, linear.in_features, linear.bits)
    packing = _PACKINGS[linear.bits][0]
    codes = quantized.codes.flatten(1)[:, : linear.in_features].reshape(-1, size)
    # the record of every HQQ group's first column
    record = torch.arange(0, linear.in_features, size, device=codes.device) // quantized.codes.shape[-1]
    bias = linear.bias.data.to(compute_dtype) if linear.bias is not None else None
    settings = {
        "nbits": linear.bits,
        "channel_wise": True,
        "group_size": size,
        "optimize": True,
        "round_zero": False,
        "axis": 1,
        "view_as_float": False,
    }
    module = HQQLinear(None, None, compute_dtype=compute_dtype, device=str(codes.device))
    module.load_state_dict(
        {
            **settings,
            "W_q": Quantizer.pack[packing](codes),
            "scale": quantized.scale[:, record].reshape(-1, 1).to(compute_dtype),
            "zero": quantized.zero[:, record].reshape(-1, 1).to(compute_dtype),
            "bias": bias,
            "shape": shape,
            "packing": packing,
            "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": compute_dtype,
            "offload_meta": False,
            "stores_quant_config": True,
        }
    )
    return module


def _hqq_group_size(name: str, shape: torch.Size, in_features: int, bits: int) -> int:
    """The largest group size of HQQ that keeps the records [out, n, G]: equal groups, a full last word."""
    rows, records, length = shape
    longest = in_features if records == 1 else math.gcd(in_features, length)
    full = _PACKINGS[bits][1]
    for size in range(longest, 7, -1):
        if longest % size == 0 and rows * in_features // size % full == 0:
            return size
    raise ValueError(
        f"The matrix '{name}' [{rows}, {in_features}] in groups of {length} at {bits} bits has no equal groups that "
        "HQQ could hold; dequantize it instead."
    )
