# SPDX-License-Identifier: Apache-2.0
"""Speed of the compiled CPU kernels beside torch's, on one thread with cold weights.

All candidates of a shape take turns in one process; each call meets the next of several copies of its weights, together
larger than the last-level cache, so that weights come from memory. Reported are medians, 10th percentiles and ratios to
torch's bf16 linear layer and to a plain read of the packed bytes. Rows go to results/kernels.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ggml import TYPES, Ggml, find
from machine import here
from pages import replace_part
from torch.nn import functional

from transformers_mcmoe.kernels import arena, cpu
from transformers_mcmoe.quantization.grid import group_size_for, num_groups

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
# one projection of an expert: in_features, out_features
SHAPES = {
    "Mixtral-8x7B": (4096, 14336),
    "Qwen3-30B-A3B": (2048, 768),
    "DeepSeek-V2-Lite": (2048, 1408),
    "smolmoe": (576, 768),
}


class Candidate:
    """A call on each of several copies of its weights in turn."""

    def __init__(self, make: Callable[[], Callable[[torch.Tensor], object]], copy_bytes: int, cold: int) -> None:
        self.calls = [make() for _ in range(max(1, min(200, -(-cold // copy_bytes))))]
        self.turn = 0
        self.seconds: list[float] = []

    def __call__(self, x: torch.Tensor) -> None:
        call = self.calls[self.turn % len(self.calls)]
        self.turn += 1
        start = time.perf_counter()
        call(x)
        self.seconds.append(time.perf_counter() - start)


def packed(columns: int, rows: int, bits: int, mode: str) -> tuple[Callable[[], Callable], int]:
    """Our kernel on random codes."""
    group = group_size_for(columns, 128)
    groups = num_groups(columns, group)
    blocks_of_rows, record = -(-rows // arena.ROWS), arena.block_bytes(bits, group, 1)
    size = blocks_of_rows * groups * record

    def make() -> Callable[[torch.Tensor], object]:
        blocks = arena.allocate(size).random_(0, 256)
        blocks.view(-1, record)[:, -4 * arena.ROWS :] = 0x2C  # scales and zeros must be numbers

        def call(x: torch.Tensor) -> object:
            os.environ["MCMOE_MODE"] = mode
            return cpu.packed_linear(x, blocks, None, rows, bits, group, columns)

        return call

    return make, size


def read(size: int) -> tuple[Callable[[], Callable], int]:
    """A plain read of as many bytes."""

    def make() -> Callable[[torch.Tensor], object]:
        memory = arena.allocate(size - size % 64).random_(0, 256).view(torch.int64)
        return lambda x: memory.sum()

    return make, size


def bf16(columns: int, rows: int) -> tuple[Callable[[], Callable], int]:
    """torch's linear layer in bf16."""

    def make() -> Callable[[torch.Tensor], object]:
        weight = torch.randn(rows, columns, dtype=torch.bfloat16)
        return lambda x: functional.linear(x, weight)

    return make, 2 * rows * columns


def int4pack(columns: int, rows: int) -> tuple[Callable[[], Callable], int]:
    """torch's weight-only 4-bit product."""

    def make() -> Callable[[torch.Tensor], object]:
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (rows, columns)).int(), 1)
        grid = torch.randn(columns // 64, rows, 2, dtype=torch.bfloat16)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, 64, grid)

    return make, rows * columns // 2


def hqq(columns: int, rows: int, bits: int) -> tuple[Callable[[], Callable], int]:
    """hqq's linear layer: it rebuilds the matrix, then multiplies. Random codes; solving for them is not timed."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    first = HQQLinear(linear, quant_config=config, compute_dtype=torch.bfloat16, device="cpu")

    def make() -> Callable[[torch.Tensor], object]:
        layer = copy.deepcopy(first)
        return lambda x: layer(x)

    return make, rows * columns * bits // 8 + rows * columns // 64 * 4


def llama_cpp(backend: Ggml, columns: int, rows: int, kind: str, layout: str) -> tuple[Callable[[], Callable], int]:
    """llama.cpp's product of float32 activations and a quantized matrix."""
    return lambda: backend.matrix(kind, columns, rows, layout), backend.bytes_of(kind, columns, rows)


def main() -> None:
    """Measure the shapes asked for and append a row per candidate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 32, 128, 512])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", type=int, default=400, help="MB of copies that a candidate goes through")
    parser.add_argument("--seconds", type=float, default=2.0, help="per candidate")
    parser.add_argument("--ggml", type=Path, default=find(), help="folder of libggml-cpu; default: llama-cpp-python's")
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4], help="widths of ours")
    parser.add_argument("--docs", action="store_true", help="write docs/kernels.md from the rows, and stop")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    torch.set_num_threads(options.threads)
    for name in options.shapes:
        columns, rows = SHAPES[name]
        made = {"torch bf16": bf16(columns, rows), "torch int4pack": int4pack(columns, rows)}
        if importlib.util.find_spec("hqq") is None:
            print("hqq is not installed: left out.")
        else:
            made |= {f"hqq {bits} bits": hqq(columns, rows, bits) for bits in (2, 3, 4) if bits in options.bits}
        if options.ggml is None:
            print("llama-cpp-python is not installed: left out.")
        elif columns % 256:
            print(f"{name}: llama.cpp has no such type for rows of {columns} columns, no multiple of 256.")
        else:
            backend = Ggml(options.ggml, options.threads)
            for kind in TYPES:
                for layout in backend.layouts(kind):
                    made[f"llama.cpp {kind} {layout}".strip()] = llama_cpp(backend, columns, rows, kind, layout)
        for bits in options.bits:
            for mode in cpu.MODES:
                made[f"ours {bits} bits {mode}"] = packed(columns, rows, bits, mode)
            made[f"read {bits} bits"] = read(made[f"ours {bits} bits exact"][1])
        candidates = {key: Candidate(make, size, options.cold << 20) for key, (make, size) in made.items()}
        for tokens in options.tokens:
            _measure(options, name, tokens, candidates, {key: size for key, (_, size) in made.items()})


def _measure(
    options: argparse.Namespace, shape: str, tokens: int, candidates: dict[str, Candidate], sizes: dict[str, int]
) -> None:
    columns, rows = SHAPES[shape]
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    # llama.cpp's tiles for AMX crash when called from outside of it (0.25.3); its vectors for single tokens do not
    candidates = {key: candidate for key, candidate in candidates.items() if tokens == 1 or not key.endswith("AMX")}
    for candidate in candidates.values():
        candidate.seconds.clear()
    started, rounds = time.monotonic(), 0
    order, chance = list(candidates.values()), random.Random(0)
    while rounds < 5 or (time.monotonic() - started < options.seconds * len(candidates) and rounds < 2000):
        chance.shuffle(order)  # what runs behind llama.cpp pays for it: not always the same one
        for candidate in order:
            candidate(x)
        rounds += 1
    base = candidates["torch bf16"].seconds
    for key, candidate in candidates.items():
        median, low = statistics.median(candidate.seconds), sorted(candidate.seconds)[len(candidate.seconds) // 10]
        row = {
            "shape": shape,
            "in_features": columns,
            "out_features": rows,
            "tokens": tokens,
            "threads": options.threads,
            "candidate": key,
            "median_us": round(median * 1e6, 1),
            "p10_us": round(low * 1e6, 1),
            "gb_per_s": round(sizes[key] / median / 1e9, 2),
            "times_torch_bf16": round(statistics.median(base) / median, 2),
            "rounds": rounds,
            "instruction_set": cpu.instruction_set(),
            "torch": torch.__version__,
            **here(),
        }
        if key.startswith("ours"):
            plain = statistics.median(candidates[f"read {key.split()[1]} bits"].seconds)
            row["share_of_read"] = round(plain / median, 3)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        share = f", {row['share_of_read']:.2f} of a plain read" if "share_of_read" in row else ""
        print(
            f"{shape} M={tokens} {key}: {row['median_us']} us (p10 {row['p10_us']}), {row['gb_per_s']} GB/s, "
            f"x{row['times_torch_bf16']} torch bf16{share}",
            flush=True,
        )


def write_docs() -> None:
    """The tables of docs/kernels.md: the newest row of each candidate on each processor."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {(r["processor"], r["shape"], r["tokens"], r["threads"], r["candidate"]): r for r in rows}
    parts: list[str] = []
    for processor in dict.fromkeys(key[0] for key in newest):
        own = {key[1:]: row for key, row in newest.items() if key[0] == processor}
        first = next(iter(own.values()))
        parts += [
            f"### {processor} ({first['instruction_set']}), {first['cpus']} cores, {first['date']}\n",
            "| shape, bits | 1 token: int8 | exact | llama.cpp | hqq | plain read | int8, share of the read "
            "| 8 tokens: int8 | exact | 512 tokens: int8 | exact | llama.cpp |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for shape in dict.fromkeys(key[0] for key in own):
            columns, width = SHAPES[shape]
            for bits in (1, 2, 3, 4):
                if (shape, 1, 1, f"ours {bits} bits int8") in own:
                    parts.append(f"| {shape} ({columns} -> {width}), {bits} | {_line(own, shape, bits)} |")
        parts.append("")
    replace_part("kernels.md", "kernel_speed", parts)


def _line(rows: dict[tuple, dict], shape: str, bits: int) -> str:
    """Cells of one shape and width on one processor, one thread."""

    def times(tokens: int, *candidates: str) -> str:
        found = [rows[key]["times_torch_bf16"] for name in candidates if (key := (shape, tokens, 1, name)) in rows]
        return f"{max(found):.2f}" if found else ""

    ours, kind = f"ours {bits} bits", {2: "Q2_K", 3: "Q3_K", 4: "Q4_K"}.get(bits, "")
    llama = [f"llama.cpp {kind}{layout}" for layout in ("", " CPU_REPACK", " AMX")]
    return " | ".join(
        [
            times(1, f"{ours} int8"), times(1, f"{ours} exact"), times(1, *llama), times(1, f"hqq {bits} bits"),
            times(1, f"read {bits} bits"), f"{rows[shape, 1, 1, f'{ours} int8']['share_of_read']:.2f}",
            times(8, f"{ours} int8"), times(8, f"{ours} exact"), times(512, f"{ours} int8"), times(512, f"{ours} exact"),
            times(512, *llama),
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
