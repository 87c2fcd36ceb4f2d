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
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = 32  # group sizes are multiples of it: then every plane of a record is a whole number of words
FEW = 8  # rows of x up to which columns are added up; beyond, tiles are multiplied
# words of an expert in the table: gate (or up), up and down as offsets in units of ALIGNMENT, -1 if it was dropped; widths
ENTRY = 5

ALIGNMENT = 16  # bytes that matrices start at in an allocation of experts
# rows and columns of one step of the first kernel; slots and matrix rows of a tile of the second
FEW_TILE = {"ROWS": 8, "COLUMNS": 512}
MANY_TILE = {"TOKENS": 16, "ROWS": 64}


@triton.jit
def _grid(word):
    """Scale and zero, float32, from the last word of a record."""
    scale = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def _plane_sum(
    x, q, rows, inside, column, in_features,
    PLANE: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Part [N] of rows times x over the columns [column, column + COLUMNS) that one plane of PLANE bits holds.

    The plane holds the code's bits from SHIFT on; the lowest plane also takes off the zero.
    """
    PER: tl.constexpr = 32 // PLANE
    RECORD: tl.constexpr = GROUP * BITS // 32 + 1
    first = column + tl.arange(0, COLUMNS // PER) * PER  # column of each word's lowest code
    record = rows[:, None] * (tl.cdiv(in_features, GROUP) * RECORD) + (first // GROUP * RECORD)[None, :]
    mask = inside[:, None] & (first < in_features)[None, :]
    words = tl.load(q + record + (GROUP * SHIFT // 32 + first % GROUP // PER)[None, :], mask=mask, other=0)
    scale, zero = _grid(tl.load(q + record + (RECORD - 1), mask=mask, other=0))
    place = tl.arange(0, PER)
    columns = first[:, None] + place[None, :]
    values = tl.load(x + columns, mask=columns < in_features, other=0.0).to(tl.float32)
    codes = (words[:, :, None] >> (place * PLANE)[None, None, :]) & ((1 << PLANE) - 1)
    weights = (codes << SHIFT).to(tl.float32)
    if SHIFT == 0:
        weights -= zero[:, :, None]
    return tl.sum(tl.sum(weights * values[None, :, :], axis=2) * scale, axis=1)


@triton.jit
def _row_sums(x, q, rows, inside, in_features, BITS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows [N] of a matrix times one vector, [N] float32."""
    total = tl.zeros([rows.shape[0]], tl.float32)
    for column in range(0, in_features, COLUMNS):
        if BITS == 3:
            total += _plane_sum(x, q, rows, inside, column, in_features, 2, 0, BITS, GROUP, COLUMNS)
            total += _plane_sum(x, q, rows, inside, column, in_features, 1, 2, BITS, GROUP, COLUMNS)
        else:
            total += _plane_sum(x, q, rows, inside, column, in_features, BITS, 0, BITS, GROUP, COLUMNS)
    return total


@triton.jit
def _sums_at(x, q, bits, rows, inside, in_features, WIDTHS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """`_row_sums` at a width known at run time, one of those whose bit is set in WIDTHS."""
    total = tl.zeros([rows.shape[0]], tl.float32)
    for width in tl.static_range(1, 9):
        if (WIDTHS >> width) & 1:  # noqa: SIM102  known when compiled, unlike the next
            if bits == width:
                total += _row_sums(x, q, rows, inside, in_features, width, GROUP, COLUMNS)
    return total


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu2":
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x


@triton.jit
def _entry(q, expert, num_experts, SECOND: tl.constexpr, DOWN: tl.constexpr):
    """Of an expert's table entry: whether it is there, at which words its matrices begin, and how wide its codes are.

    The second matrix is read where SECOND.
    """
    known = (expert >= 0) & (expert < num_experts)
    at = q + expert * 5
    start = tl.load(at + (2 if DOWN else 0), mask=known, other=-1)
    second = start
    if SECOND:
        second = tl.load(at + 1, mask=known, other=-1)
    bits = tl.load(at + (4 if DOWN else 3), mask=known, other=0)
    return start >= 0, start.to(tl.int64) * 4, second.to(tl.int64) * 4, bits


@triton.jit
def few_rows(
    x, q, index, scale, bias, y, in_features, out_features, num_experts,
    TABLE: tl.constexpr, PAIR: tl.constexpr, DOWN: tl.constexpr, ACTIVATION: tl.constexpr, SLOTS: tl.constexpr,
    WIDTHS: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[slot, rows] = act(q_1 x) * (q_2 x), or act(q_1 x); grid (slots, blocks of rows)."""
    slot = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    bits = BITS
    first = q
    second = q
    there = True
    if TABLE:
        there, start, other, bits = _entry(q, tl.load(index + slot).to(tl.int32), num_experts, PAIR, DOWN)
        first = q + start
        second = q + other
    if there:
        own = x + slot // SLOTS * in_features
        total = _activate(_sums_at(own, first, bits, rows, inside, in_features, WIDTHS, GROUP, COLUMNS), ACTIVATION)
        if PAIR:
            total *= _sums_at(own, second, bits, rows, inside, in_features, WIDTHS, GROUP, COLUMNS)
        if BIASED:
            total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            total *= tl.load(scale + slot).to(tl.float32)
        tl.store(y + slot * out_features + rows, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _codes(q, record, inside, START: tl.constexpr, PLANE: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes [N, COLUMNS] int32 of a plane from word START of the records at `record` [N] on."""
    PER: tl.constexpr = 32 // PLANE
    at = record[:, None] + START + tl.arange(0, COLUMNS // PER)[None, :]
    words = tl.load(q + at, mask=inside[:, None], other=0)
    codes = (words[:, :, None] >> (tl.arange(0, PER) * PLANE)[None, None, :]) & ((1 << PLANE) - 1)
    return tl.reshape(codes, [record.shape[0], COLUMNS])


@triton.jit
def _tile(q, rows, inside, column, in_features, BITS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """Weights [N, COLUMNS] float32 of some rows from `column` on; COLUMNS divides GROUP, so they share a grid."""
    RECORD: tl.constexpr = GROUP * BITS // 32 + 1
    record = rows * (tl.cdiv(in_features, GROUP) * RECORD) + column // GROUP * RECORD
    part = record + column % GROUP // 32 * (2 if BITS == 3 else BITS)
    if BITS == 3:
        codes = _codes(q, part, inside, 0, 2, COLUMNS)
        high = record + column % GROUP // 32
        codes |= _codes(q, high, inside, GROUP * 2 // 32, 1, COLUMNS) << 2
    else:
        codes = _codes(q, part, inside, 0, BITS, COLUMNS)
    scale, zero = _grid(tl.load(q + record + (RECORD - 1), mask=inside, other=0))
    return (codes.to(tl.float32) - zero[:, None]) * scale[:, None]


@triton.jit
def _product(
    x, q, own, known, rows, inside, in_features, BITS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows `own` [T] of x times rows [N] of a matrix, [T, N] float32."""
    total = tl.zeros([own.shape[0], rows.shape[0]], tl.float32)
    for column in range(0, in_features, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        mask = known[:, None] & (columns < in_features)[None, :]
        values = tl.load(x + own[:, None] * in_features + columns[None, :], mask=mask, other=0.0)
        weights = _tile(q, rows, inside, column, in_features, BITS, GROUP, COLUMNS).to(values.dtype)
        total = tl.dot(values, tl.trans(weights), total, input_precision="ieee")
    return total


@triton.jit
def _product_at(
    x, q, bits, own, known, rows, inside, in_features,
    WIDTHS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`_product` at a width known at run time, one of those whose bit is set in WIDTHS."""
    total = tl.zeros([own.shape[0], rows.shape[0]], tl.float32)
    for width in tl.static_range(1, 9):
        if (WIDTHS >> width) & 1:  # noqa: SIM102  known when compiled, unlike the next
            if bits == width:
                total += _product(x, q, own, known, rows, inside, in_features, width, GROUP, COLUMNS)
    return total


@triton.jit
def many_rows(
    x, q, order, experts, scale, bias, y, slots, in_features, out_features, num_experts,
    TABLE: tl.constexpr, PAIR: tl.constexpr, DOWN: tl.constexpr, ACTIVATION: tl.constexpr, SLOTS: tl.constexpr,
    WIDTHS: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As `few_rows`, for blocks of TOKENS slots of one expert; grid (blocks of slots, blocks of rows).

    order: [blocks * TOKENS] int32, slots sorted by expert, each expert's padded to whole blocks with `slots`.
    experts: [blocks] int32, the expert of each block.
    """
    block = tl.program_id(0).to(tl.int64)
    slot = block * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    bits = BITS
    first = q
    second = q
    there = True
    if TABLE:
        slot = tl.load(order + slot).to(tl.int64)
        there, start, other, bits = _entry(q, tl.load(experts + block), num_experts, PAIR, DOWN)
        first = q + start
        second = q + other
    if there:
        known = slot < slots
        own = slot // SLOTS
        total = _product_at(x, first, bits, own, known, rows, inside, in_features, WIDTHS, GROUP, COLUMNS)
        total = _activate(total, ACTIVATION)
        if PAIR:
            total *= _product_at(x, second, bits, own, known, rows, inside, in_features, WIDTHS, GROUP, COLUMNS)
        if BIASED:
            total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SCALED:
            total *= tl.load(scale + slot, mask=known, other=0.0).to(tl.float32)[:, None]
        place = y + slot[:, None] * out_features + rows[None, :]
        tl.store(place, total.to(y.dtype.element_ty), mask=known[:, None] & inside[None, :])


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
    """Combined output [T, H] of a MoE layer; `blocks` is of `pack_experts`, `layout` [E, 2, 3] says widths and groups."""
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
        layout: [E, 2, 3] int64 on CPU, of which the widths are read.
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
    for entry, matrices in zip(table.tolist(), qweights, strict=True):
        for n, matrix in enumerate(matrices):
            start = ALIGNMENT * entry[n if n < len(matrices) - 1 else 2]
            blocks[start : start + matrix.numel()] = matrix.flatten()
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
            few_rows[len(y), rows](x, q, order, scale, bias, y, *sizes, **options)
        else:
            parts = len(experts) if table is not None else triton.cdiv(len(y), options["TOKENS"])
            options["COLUMNS"] = columns(group)
            many_rows[parts, rows](x, q, order, experts, scale, bias, y, len(y), *sizes, **options)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def columns(group: int) -> int:
    """Columns of a step of `many_rows`: a power of two that divides the group size."""
    return min(64, group & -group)
