# SPDX-License-Identifier: Apache-2.0
"""Packed linear layers in vLLM. Knows one layer, which may stand for several matrices; not the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, ReplicatedLinear
from vllm.model_executor.utils import set_weight_attrs

from transformers_mcmoe.integrations.vllm.loading import Packed, Part, check_grids
from transformers_mcmoe.kernels import arena, cpu, gpu, ops

# what vLLM's loaders call the matrices of a joint q, k and v
_SHARDS = {"q": 0, "k": 1, "v": 2}


class PackedLinearMethod(LinearMethodBase):
    """Loads and runs one layer.

    Args:
        names: in the checkpoint, of the matrices that the layer stands for.
        widths: theirs.
        group_size: the configured one.
    """

    def __init__(self, names: Sequence[str], widths: Sequence[int], group_size: int) -> None:
        self._names, self._widths, self._group_size = list(names), list(widths), group_size

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Give the layer its empty parameter; see vLLM for the arguments.

        Raises:
            ValueError: the layer stands for other matrices than the checkpoint has, or a rank's columns end inside a group.
        """
        if len(output_partition_sizes) != len(self._names):
            raise ValueError(
                f"vLLM's layer of {self._names} has {len(output_partition_sizes)} parts, the checkpoint {len(self._names)}; this "
                "model is not served."
            )
        whole_rows = isinstance(layer, ReplicatedLinear)  # every rank has them, and still a rank
        rank, size = (0, 1) if whole_rows else (getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1))
        columns = (input_size_per_partition, 0)
        if input_size_per_partition != input_size:
            columns = (input_size_per_partition, rank * input_size_per_partition)
            rank, size = 0, 1  # rows are whole
        parts = {}
        replicas = getattr(layer, "num_kv_head_replicas", 1)
        for n, (name, bits, rows) in enumerate(zip(self._names, self._widths, output_partition_sizes, strict=True)):
            copies = replicas if n else 1  # of k and v
            whole = (rows * size // copies, input_size)
            own = (rows, rank // copies * rows)
            parts[n] = Part(f"{name}.weight", bits, whole, own, columns, self._group_size)
        self._packed = Packed(parts)
        self._columns = input_size_per_partition
        weight = self._packed.parameter()
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, {"weight_loader": self._load})

    def _load(self, parameter: Tensor, tensor: Tensor, shard: str | int | None = None) -> None:
        """Take one matrix from the checkpoint."""
        key = _SHARDS.get(shard, -1) if isinstance(shard, str) else shard or 0
        if key not in self._packed.parts or (shard is None and len(self._names) > 1):
            raise ValueError(
                f"The checkpoint has one tensor where {self._names} are expected; this model is not served."
            )
        self._packed.load(parameter, key, tensor)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all came, and make the kernels' copy.

        Raises:
            ValueError: a matrix is missing or damaged.
        """
        self._packed.check()
        layer.mcmoe_parts, kept = [], False
        for n, part in self._packed.parts.items():
            view = self._packed.view(layer.weight, n)
            check_grids(part.name, view)
            blocks = None
            if gpu.backend(view.device) is None and view.device.type == "cpu" and cpu.packs(view, part.bits):
                blocks = arena.pack_matrix(view, part.bits)
                view = view.new_empty(1).expand(part.shape)  # of the bytes only their shape is read from now on
            kept |= blocks is None
            layer.mcmoe_parts.append((view, part.bits, blocks))
        if not kept:
            layer.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[.., in] -> [.., out], of all matrices side by side."""
        outputs, at = [], 0
        for view, bits, blocks in layer.mcmoe_parts:
            rows = view.shape[0]
            own = None if bias is None else bias[at : at + rows].to(x.dtype)
            outputs.append(ops.packed_linear(x, view, own, bits, self._columns, blocks))
            at += rows
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
