# SPDX-License-Identifier: Apache-2.0
"""The C++ backend: loads the compiled library and calls it. Knows tensors, not modules.

Where the library is missing (installed without a compiler, or another platform) `library()` is None and the reference
runs. MCMOE_ISA forces an instruction set ("amx", "avx512-bf16", "avx512-vnni", "avx512", "avx-vnni", "avx2", "neon", "scalar"), or
"reference" none; MCMOE_MODE=int8 | exact sets how activations enter (docs/kernels.md).
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
MODES = ("exact", "int8")


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library with its instruction set chosen; None where there is none.

    Raises:
        ValueError: MCMOE_ISA names an instruction set that this machine or build does not have.
    """
    wanted = os.environ.get("MCMOE_ISA", "")
    if wanted == "reference":
        return None
    # an editable install keeps what was compiled apart from the sources
    folders = importlib.import_module(__package__).__path__
    path = next((path for folder in folders for path in Path(folder).glob("libmcmoe_cpu.*")), None)
    if path is None:
        logger.warning("transformers_mcmoe was installed without its CPU kernels; the slow reference runs on CPU.")
        return None
    try:
        # torch is loaded by now, so its OpenMP runtime serves here too
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("The CPU kernels could not be loaded (%s); the slow reference runs on CPU.", error)
        return None
    for function in (loaded.mcmoe_select, loaded.mcmoe_selected, loaded.mcmoe_available):
        function.restype = ctypes.c_char_p
    loaded.mcmoe_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    loaded.mcmoe_repack.argtypes = [pointer, *[integer] * 6, pointer]
    loaded.mcmoe_linear.argtypes = [
        pointer, *[integer] * 5, pointer, integer, integer, pointer, pointer, integer
    ]  # fmt: skip
    loaded.mcmoe_moe.argtypes = [
        pointer, pointer, integer, integer, pointer, integer, pointer, integer, integer, pointer, pointer, pointer,
        integer,
    ]  # fmt: skip
    routing: list[Any] = [pointer, ctypes.c_int64, pointer]
    loaded.mcmoe_keep_prefixes.argtypes = [
        *routing, pointer, pointer, integer, integer, ctypes.c_float, pointer, integer, integer
    ]  # fmt: skip
    loaded.mcmoe_skip_below.argtypes = [*routing, pointer, pointer, integer]
    loaded.mcmoe_grid_errors.argtypes = [*[pointer] * 4, integer, pointer, integer]
    loaded.mcmoe_round_columns.argtypes = [*[pointer] * 7, integer]
    loaded.mcmoe_descend_columns.argtypes = [*[pointer] * 4, integer, integer]
    if loaded.mcmoe_select(wanted.encode()) is None:
        names = loaded.mcmoe_available().decode().split()
        raise ValueError(f"MCMOE_ISA is {wanted!r}, which cannot run here; choose one of {names} or 'reference'.")
    return loaded


def instruction_set() -> str:
    """Name of the instruction set in use; "none" without the library."""
    loaded = library()
    return loaded.mcmoe_selected().decode() if loaded else "none"


@contextmanager
def using(name: str) -> Iterator[None]:
    """While open, another of `instruction_sets` runs, in the whole process: for tests and benchmarks."""
    loaded, before = library(), instruction_set()
    if loaded is None or loaded.mcmoe_select(name.encode()) is None:
        raise ValueError(f"The instruction set {name!r} cannot run here; choose one of {instruction_sets()}.")
    try:
        yield
    finally:
        loaded.mcmoe_select(before.encode())


def instruction_sets() -> list[str]:
    """All that run on this machine, best first."""
    loaded = library()
    return loaded.mcmoe_available().decode().split() if loaded else []


def mode() -> str:
    """How activations enter the products: "exact" or "int8".

    Raises:
        ValueError: MCMOE_MODE is neither.
    """
    value = os.environ.get("MCMOE_MODE", "exact")
    if value not in MODES:
        raise ValueError(f"MCMOE_MODE is {value!r}; set it to one of {MODES}.")
    return value


def takes(x: Tensor) -> bool:
    """Whether activations are of a device and dtype that the library takes."""
    return x.device.type == "cpu" and x.dtype in DTYPES


def packs(qweight: Tensor, bits: int) -> bool:
    """Whether the library is there and takes a packed matrix [out, n, G * bits / 8 + 4]: groups are multiples of 32."""
    return library() is not None and (qweight.shape[2] - 4) * 8 // bits % 32 == 0


def packed_linear(
    x: Tensor, blocks: Tensor, bias: Tensor | None, rows: int, bits: int, group: int, in_features: int
) -> Tensor:
    """[.., in_features] -> [.., rows] over repacked blocks, in the dtype of `x`."""
    loaded = library()
    assert loaded is not None
    x = x.contiguous()
    tokens = x.numel() // in_features
    y = x.new_empty((*x.shape[:-1], rows))
    if tokens == 0 or rows == 0:
        return y
    bias = bias.to(torch.float32).contiguous() if bias is not None else None
    loaded.mcmoe_linear(
        blocks.data_ptr(), rows, in_features, bits, group, mode() == "int8", x.data_ptr(), DTYPES[x.dtype], tokens,
        bias.data_ptr() if bias is not None else None, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def moe_mlp(
    x: Tensor, index: Tensor, weights: Tensor, blocks: Tensor, layout: Tensor, inner: int, activation: str, gated: bool
) -> Tensor:
    """Combined output [T, H] of a MoE layer; `layout` and `blocks` as `arena.layout` and `arena.pack_experts` return them."""
    loaded = library()
    assert loaded is not None
    x, index = x.contiguous(), index.to(torch.int64).contiguous()
    weights = weights.to(torch.float32).contiguous()
    out = torch.empty_like(x)
    tokens, hidden = x.shape
    if tokens == 0:
        return out
    shape = (ctypes.c_int * 5)(hidden, inner, index.shape[1], ACTIVATIONS.index(activation), gated)
    loaded.mcmoe_moe(
        blocks.data_ptr(), layout.data_ptr(), *layout.shape[:2], shape, mode() == "int8", x.data_ptr(),
        DTYPES[x.dtype], tokens, index.data_ptr(), weights.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def grid_errors(values: Tensor, inverse: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Squared distances of groups from candidate grids, as `quantization.columns.grid_errors` defines them.

    Args:
        values: [B, G, out] float32 on CPU, weights.
        inverse: [C, B, out] float32, one over the scales.
        zero: [C, B, out] float32.
        bits: code width.

    Returns:
        [C, B, out], in units of codes.
    """
    values, inverse, zero = values.contiguous(), inverse.contiguous(), zero.contiguous()
    batch, columns, rows = values.shape
    errors = torch.empty_like(inverse)
    sizes = (ctypes.c_int * 4)(batch, columns, rows, bits)
    pointers = [tensor.data_ptr() for tensor in (values, inverse, zero)]
    loaded = library()
    assert loaded is not None
    loaded.mcmoe_grid_errors(sizes, *pointers, len(inverse), errors.data_ptr(), torch.get_num_threads())
    return errors


def round_columns(values: Tensor, feedback: Tensor, diagonal: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round the columns of groups one by one with feedback, as `quantization.columns.round_columns` defines it.

    Args:
        values: [B, G, out] float32 on CPU, in units of codes.
        feedback: [B, G, G] float32, row k holds what errors of columns j < k add to column k.
        diagonal: [B, G] float32, what a squared residual of a column costs.
        bits: code width.

    Returns:
        Codes and errors [B, G, out], loss [B, out].
    """
    values, feedback, diagonal = values.contiguous(), feedback.contiguous(), diagonal.contiguous()
    batch, columns, rows = values.shape
    codes, errors, loss = torch.empty_like(values), torch.empty_like(values), values.new_empty(batch, rows)
    tensors = (values, feedback, diagonal, codes, errors, loss)
    sizes = (ctypes.c_int * 4)(batch, columns, rows, bits)
    pointers = [tensor.data_ptr() for tensor in tensors]
    loaded = library()
    assert loaded is not None
    loaded.mcmoe_round_columns(sizes, *pointers, torch.get_num_threads())
    return codes, errors, loss


def descend_columns(metric: Tensor, codes: Tensor, gradients: Tensor, bits: int, sweeps: int) -> None:
    """Coordinate descent over the codes of groups, as `quantization.columns.descend_columns` defines it.

    Args:
        metric: [B, G, G] float32 on CPU.
        codes: [B, G, out] float32, contiguous, changed in place.
        gradients: [B, G, out] float32, contiguous, metric @ errors in units of codes; changed in place.
        bits: code width.
        sweeps: rounds over the columns.
    """
    metric = metric.contiguous()
    batch, columns, rows = codes.shape
    sizes = (ctypes.c_int * 4)(batch, columns, rows, bits)
    pointers = [tensor.data_ptr() for tensor in (metric, codes, gradients)]
    loaded = library()
    assert loaded is not None
    loaded.mcmoe_descend_columns(sizes, *pointers, sweeps, torch.get_num_threads())


@dataclass
class Pruned:
    """A call's routing, what expert pruning leaves of it, and how it is counted.

    Args:
        index: [T, K] expert ids, from 0 on; those from E on are no expert's and never skipped.
        weights: [T, K] routing weights, in any order.
        none: id that skipped slots get, E or more.
        renormalize: scale kept weights to the sum that all had.
        counts: [2 * (E + 1)] int64, contiguous; grow by the kept, then the skipped slots of each expert and of other ids.
        valid: [T] bool, False for tokens that do not count; None for none.
    """

    index: Tensor
    weights: Tensor
    none: int
    renormalize: bool
    counts: Tensor
    valid: Tensor | None

    def keep_prefixes(self, x: Tensor, matrices: tuple[Tensor, Tensor], shift: float) -> tuple[Tensor, Tensor]:
        """Ids [T, K] int64 and weights [T, K] after learned pruning, as `routing.otp` defines it.

        Args:
            x: [T, H] tokens.
            matrices: the router's, float32 and contiguous.
            shift: subtracted from scores.
        """
        hidden, scores = matrices
        x = x.contiguous()
        rule = (
            hidden.data_ptr(),
            scores.data_ptr(),
            x.shape[1],
            hidden.shape[0],
            shift,
            x.data_ptr(),
            DTYPES[x.dtype],
        )
        return self._run("mcmoe_keep_prefixes", *rule)

    def skip_below(self, levels: Sequence[float], whole: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids [T, K] int64 and weights [T, K] after pruning by thresholds, as `routing.odp` defines it.

        Args:
            levels: K - 1 shares of a token's largest weight, for its second largest and so on, or one for all.
            whole: [T] bool, tokens that skip nothing; None for none.
        """
        if len(levels) == 1:
            levels = [*levels] * (self.index.shape[1] - 1)
        whole = whole.contiguous() if whole is not None else None
        rule = ((ctypes.c_float * len(levels))(*levels), whole.data_ptr() if whole is not None else None)
        return self._run("mcmoe_skip_below", *rule)

    def _run(self, name: str, *rule: Any) -> tuple[Tensor, Tensor]:
        index = self.index.to(torch.int64).contiguous()
        weights = self.weights.to(torch.float32).contiguous()
        valid = self.valid.contiguous() if self.valid is not None else None
        kept, left = torch.empty_like(index), torch.empty_like(weights)
        sizes = (ctypes.c_int * 4)(*index.shape, len(self.counts) // 2 - 1, self.renormalize)
        tensors = (index, weights, valid, kept, left, self.counts)
        pointers = (ctypes.c_void_p * 6)(*(tensor.data_ptr() if tensor is not None else None for tensor in tensors))
        getattr(library(), name)(sizes, self.none, pointers, *rule, torch.get_num_threads())
        return kept, left.to(self.weights.dtype)
