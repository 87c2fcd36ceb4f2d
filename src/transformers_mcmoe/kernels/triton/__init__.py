# SPDX-License-Identifier: Apache-2.0
"""The GPU backend: two Triton kernels that read the records of the checkpoint format (`quantization.packing`) as words.

One serves few rows (decode): a program adds up the columns of a few matrix rows and every code is read once. The other
serves many rows (prefill): tiles of weights are rebuilt in the activations' dtype for tl.dot. A MoE layer reads each
expert's place and widths from a table in device memory, so that no step waits for the host.

Checked by Triton's interpreter and compiled for CUDA and HIP targets; none of it has run on a GPU. It knows tensors, not
modules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from transformers_mcmoe.kernels.triton import device as kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = 32  # group sizes are multiples of it: then every plane of a record is a whole number of words
FEW = 8  # rows of x up to which columns are added up; beyond, tiles are multiplied

# rows and columns of one step of the first kernel; slots and matrix rows of a tile of the second
FEW_TILE = {"ROWS": 8, "COLUMNS": 512}
MANY_TILE = {"TOKENS": 16, "ROWS": 64}
ENTRY, ALIGNMENT = kernels.ENTRY.value, kernels.ALIGNMENT.value


def takes(x: Tensor) -> bool:
    """Whether activations are of a dtype that the kernels take."""
    return x.dtype in DTYPES


def packs(qweight: Tensor, bits: int) -> bool:
    """Whether the kernels take a packed matrix [out, n, G * bits / 8 + 4]: groups are multiples of 32."""
    return (qweight.shape[2] - 4) * 8 // bits % UNIT == 0


def packed_linear(x: Tensor, qweight: Tensor, bias: Tensor | None, bits: int, in_features: int) -> Tensor:
    """[.., in_features] -> [.., out], in the dtype of `x`; see `ops.packed_linear`."""
    flat = x.reshape(-1, in_features).contiguous()
    y = x.new_empty((len(flat), qweight.shape[0]))
    group = (qweight.shape[2] - 4) * 8 // bits
    bias = bias.contiguous() if bias is not None else None
    _launch(flat, qweight.contiguous(), y, None, bias=bias, widths=(bits,), group=group)
    return y.view(*x.shape[:-1], qweight.shape[0])


def moe_mlp(
    x: Tensor, index: Tensor, weights: Tensor, blocks: Tensor, layout: Tensor, inner: int, activation: str, gated: bool
) -> Tensor:
    """Combined output [T, H] of a MoE layer; `blocks` is of `pack_experts`, `layout` [E, 2, 4] says widths and groups."""
    tokens, slots = index.shape
    x, index = x.contiguous(), index.to(torch.int32).contiguous().flatten()
    order = _sorted(index, len(layout)) if tokens > FEW else (index, None)
    # slots without an expert are not written
    hidden = x.new_zeros((len(index), inner))
    outputs = x.new_zeros((len(index), x.shape[1]))
    (gate_up, gate_up_group), (down, down_group) = (
        (set(layout[:, kind, 1].tolist()), int(layout[0, kind, 2])) for kind in (0, 1)
    )
    table = {"experts": len(layout), "order": order}
    _launch(
        x, blocks, hidden, table, widths=gate_up, group=gate_up_group, pair=gated, activation=activation, slots=slots
    )
    _launch(
        hidden, blocks, outputs, table, widths=down, group=down_group, down=True, scale=weights.contiguous().flatten()
    )
    return outputs.view(tokens, slots, x.shape[1]).sum(1, dtype=torch.float32).to(x.dtype)


def pack_experts(qweights: Sequence[Sequence[Tensor]], layout: Tensor) -> Tensor:
    """A layer's experts and their table in one allocation, [bytes] uint8 on the device of the matrices.

    Args:
        qweights: per expert its gate (if gated), up and down, [out, n, G * bits / 8 + 4] uint8; none if it was dropped.
        layout: [E, 2, 4] int64 on CPU, of which the widths are read.
    """
    size = -(-len(qweights) * ENTRY * 4 // ALIGNMENT) * ALIGNMENT
    table = torch.full((len(qweights), ENTRY), -1, dtype=torch.int32)
    for entry, matrices, widths in zip(table, qweights, layout[:, :, 1], strict=True):
        for n, matrix in enumerate(matrices):
            entry[n if n < len(matrices) - 1 else 2] = size // ALIGNMENT
            size += -(-matrix.numel() // ALIGNMENT) * ALIGNMENT
        entry[3:] = widths
    device = next(matrix.device for matrices in qweights for matrix in matrices)
    blocks = torch.zeros(size, dtype=torch.uint8, device=device)
    blocks[: table.nbytes] = table.view(torch.uint8).flatten().to(device)
    for matrices, parts in zip(qweights, views(qweights, blocks), strict=True):
        for matrix, part in zip(matrices, parts, strict=True):
            part.copy_(matrix)
    return blocks


def views(qweights: Sequence[Sequence[Tensor]], blocks: Tensor) -> list[list[Tensor]]:
    """The matrices as parts of `pack_experts`'s allocation, so that the originals can be freed."""
    table = blocks[: len(qweights) * ENTRY * 4].view(torch.int32).view(-1, ENTRY).tolist()
    return [
        [
            blocks[ALIGNMENT * entry[n if n < len(matrices) - 1 else 2] :][: matrix.numel()].view(matrix.shape)
            for n, matrix in enumerate(matrices)
        ]
        for entry, matrices in zip(table, qweights, strict=True)
    ]


def _sorted(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Slots in blocks of one expert each.

    Args:
        index: [S] int32 expert ids; others than 0 .. E - 1 stand for no expert.
        num_experts: E.

    Returns:
        Slots [blocks * TOKENS] int32, S where a block is not full, and each block's expert [blocks] int32, E for a
        block that is not used. There are as many blocks as any routing of S slots can need: their number depends on no
        data, so that the host does not wait.
    """
    size, count, device = MANY_TILE["TOKENS"], len(index), index.device
    expert = torch.where((index < 0) | (index >= num_experts), num_experts, index).long()
    blocks = -(-count // size) + num_experts
    tokens = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    tokens.scatter_add_(0, expert, torch.ones_like(expert))
    whole = (tokens + size - 1) // size  # blocks of each expert
    last = whole[:num_experts].cumsum(0)
    experts = torch.searchsorted(last, torch.arange(blocks, device=device), right=True).to(torch.int32)
    slot = expert.argsort(stable=True)
    own = expert[slot]
    rank = torch.arange(count, device=device) - (tokens.cumsum(0) - tokens)[own]
    begin = torch.cat((last.new_zeros(1), last))
    place = torch.where(own < num_experts, begin[own] * size + rank, blocks * size)
    order = torch.full((blocks * size + 1,), count, dtype=torch.int32, device=device)
    order[place] = slot.to(torch.int32)
    order[-1] = count
    return order[:-1], experts


def _launch(
    x: Tensor,
    blocks: Tensor,
    y: Tensor,
    table: dict[str, Any] | None,
    *,
    widths: Collection[int],
    group: int,
    pair: bool = False,
    down: bool = False,
    activation: str = "none",
    slots: int = 1,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Run the kernel that fits the number of rows; `y` [S, out] is written for every slot that has an expert."""
    order, experts = table["order"] if table is not None else (None, None)
    few = experts is None if table is not None else len(y) <= FEW
    if not len(y):
        return
    q = blocks.view(-1).view(torch.int32)
    options: dict[str, Any] = {
        "TABLE": table is not None, "PAIR": pair, "DOWN": down, "ACTIVATION": activation, "SLOTS": slots,
        "WIDTHS": sum(1 << bits for bits in widths if bits), "BITS": min(widths), "SCALED": scale is not None,
        "BIASED": bias is not None, "GROUP": group, **(FEW_TILE if few else MANY_TILE),
    }  # fmt: skip
    count = table["experts"] if table is not None else 1
    rows = triton.cdiv(y.shape[1], options["ROWS"])
    # an argument that is not read still needs a pointer
    order, experts, scale, bias = (y if value is None else value for value in (order, experts, scale, bias))
    sizes = x.shape[-1], y.shape[1], count
    with _on(x.device):
        if few:
            kernels.few_rows[len(y), rows](x, q, order, scale, bias, y, *sizes, **options)
        else:
            parts = len(experts) if table is not None else triton.cdiv(len(y), options["TOKENS"])
            options["COLUMNS"] = columns(group)
            kernels.many_rows[parts, rows](x, q, order, experts, scale, bias, y, len(y), *sizes, **options)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def columns(group: int) -> int:
    """Columns of a step of `many_rows`: a power of two that divides the group size."""
    return min(64, group & -group)
