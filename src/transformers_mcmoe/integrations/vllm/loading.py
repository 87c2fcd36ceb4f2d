# SPDX-License-Identifier: Apache-2.0
"""Packed matrices on their way from a checkpoint into vLLM's layers: which part of one a rank takes, and whether all have come.

A rank's matrices of a layer lie in one flat parameter, as their widths differ. Knows bytes and shapes, no layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from transformers_mcmoe.quantization.grid import group_size_for
from transformers_mcmoe.quantization.packing import packed_shape

Key = TypeVar("Key")


@dataclass(frozen=True)
class Part:
    """One packed matrix, of which a rank holds some rows or some columns.

    Attributes:
        name: in the checkpoint.
        bits: code width.
        whole: rows and columns of the whole matrix.
        rows: of the rank, and the first of them.
        columns: likewise.
        group_size: the configured one.

    Raises:
        ValueError: columns are cut inside a group.
    """

    name: str
    bits: int
    whole: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    group_size: int

    def __post_init__(self) -> None:
        count, first = self.columns
        if count != self.whole[1] and (count % self.group or first % self.group):
            raise ValueError(
                f"Tensor parallelism gives a rank {count} of the {self.whole[1]} columns of '{self.name}', which must be a "
                f"multiple of the group size {self.group}; use fewer ranks, or expert parallelism for experts."
            )

    @property
    def group(self) -> int:
        """Columns per group."""
        return group_size_for(self.whole[1], self.group_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the rank's packed tensor; the last group may be padded."""
        groups = -(-self.columns[0] // self.group)
        return self.rows[0], groups, packed_shape(*self.whole, self.bits, self.group_size)[2]

    @property
    def size(self) -> int:
        """Bytes."""
        rows, groups, record = self.shape
        return rows * groups * record

    def cut(self, tensor: Tensor) -> Tensor:
        """The rank's part of the whole packed tensor.

        Raises:
            ValueError: the tensor is not the one that the plan says.
        """
        wanted = packed_shape(*self.whole, self.bits, self.group_size)
        if tensor.dtype != torch.uint8 or tuple(tensor.shape) != wanted:
            raise ValueError(
                f"The packed tensor '{self.name}' is {tensor.dtype} of shape {tuple(tensor.shape)}, but the plan says torch.uint8 of "
                f"shape {wanted}; the checkpoint is damaged or its config.json belongs to another one."
            )
        rows, groups, _ = self.shape
        first = self.columns[1] // self.group
        return tensor[self.rows[1] : self.rows[1] + rows, first : first + groups]


class Packed(Generic[Key]):
    """The matrices of one flat parameter.

    Args:
        parts: by any key.
    """

    def __init__(self, parts: Mapping[Key, Part]) -> None:
        self.parts = dict(parts)
        self._begin: dict[Key, int] = {}
        self.bytes = 0
        for key, part in self.parts.items():
            self._begin[key] = self.bytes
            self.bytes += part.size
        self._loaded: set[Key] = set()

    def parameter(self) -> nn.Parameter:
        """The empty parameter, on the current device."""
        return nn.Parameter(torch.empty(self.bytes, dtype=torch.uint8), requires_grad=False)

    def view(self, parameter: Tensor, key: Key) -> Tensor:
        """A matrix [out, n, G * bits / 8 + 4] inside the parameter."""
        begin, part = self._begin[key], self.parts[key]
        return parameter.data[begin : begin + part.size].view(part.shape)

    def load(self, parameter: Tensor, key: Key, tensor: Tensor) -> None:
        """Take the rank's part of a whole matrix."""
        self.view(parameter, key).copy_(self.parts[key].cut(tensor))
        self._loaded.add(key)

    def check(self) -> None:
        """Raise ValueError, naming the first, if a matrix has not come: vLLM does not ask."""
        lacking = [part.name for key, part in self.parts.items() if key not in self._loaded]
        if lacking:
            raise ValueError(f"The checkpoint lacks the packed tensor '{lacking[0]}'; it is damaged or was renamed.")


def check_grids(name: str, packed: Tensor) -> None:
    """Raise ValueError if a scale or zero of a packed matrix is not finite."""
    if not bool(torch.isfinite(packed[..., -4:].contiguous().view(torch.float16)).all()):
        raise ValueError(f"The packed tensor '{name}' holds scales that are not finite; it is damaged.")
