# SPDX-License-Identifier: Apache-2.0
"""The kernels themselves, in Triton's language; `kernels.triton` launches them. They know words, rows and a table."""

from __future__ import annotations

import triton
import triton.language as tl

# words of an expert in the table: gate (or up), up and down as offsets in units of ALIGNMENT, -1 if it was dropped; widths
ENTRY = tl.constexpr(5)
ALIGNMENT = tl.constexpr(16)  # bytes that matrices start at in an allocation of experts


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
def _matrices(q, expert, num_experts, TABLE: tl.constexpr, PAIR: tl.constexpr, DOWN: tl.constexpr, BITS: tl.constexpr):
    """Whether there is anything to multiply with, the first and (where PAIR) the second matrix, and their width.

    With TABLE those of the expert whose id is at `expert`; else the one matrix at `q`.
    """
    there = True
    first = q
    second = q
    bits = BITS
    if TABLE:
        own = tl.load(expert).to(tl.int32)
        known = (own >= 0) & (own < num_experts)
        entry = q + own * ENTRY
        start = tl.load(entry + (2 if DOWN else 0), mask=known, other=-1)
        bits = tl.load(entry + (4 if DOWN else 3), mask=known, other=0)
        there = start >= 0
        first = q + start.to(tl.int64) * (ALIGNMENT // 4)
        if PAIR:
            second = q + tl.load(entry + 1, mask=known, other=-1).to(tl.int64) * (ALIGNMENT // 4)
    return there, first, second, bits


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
    there, first, second, bits = _matrices(q, index + slot, num_experts, TABLE, PAIR, DOWN, BITS)
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
    if TABLE:
        slot = tl.load(order + slot).to(tl.int64)
    there, first, second, bits = _matrices(q, experts + block, num_experts, TABLE, PAIR, DOWN, BITS)
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
