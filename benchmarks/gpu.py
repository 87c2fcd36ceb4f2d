# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command: checks the Triton kernels on it, then times them.

Candidates of a shape take turns; Triton's do_bench empties the L2 cache before each call. Beside ours: torch's linear
layer in bf16, a copy of the packed bytes, and for whole MoE layers the dense experts in a loop and in torch's grouped
product. Rows go to results/gpu.jsonl. Nobody has run it on a GPU yet: please send the rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn import functional

from transformers_mcmoe.kernels import arena
from transformers_mcmoe.kernels import triton as kernels
from transformers_mcmoe.plan import ExpertWidths

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
# hidden size, inner size, experts, experts per token
LAYERS = {
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "DeepSeek-V2-Lite": (2048, 1408, 64, 6),
}
GROUP = 128


def matrix(rows: int, columns: int, bits: int, device: str) -> torch.Tensor:
    """Random codes [out, n, G * bits / 8 + 4] with a scale and zero that are numbers."""
    made = torch.randint(0, 256, (rows, columns // GROUP, GROUP * bits // 8 + 4), dtype=torch.uint8, device=device)
    made[..., -4:] = 0x2C
    return made


def linear(columns: int, rows: int, tokens: int, device: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Candidates for one projection, and the bytes of their weights."""
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device=device)
    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=device)
    made: dict[str, tuple[Callable[[], Any], int]] = {
        "torch bf16": (lambda: functional.linear(x, weight), weight.nbytes)
    }
    for bits in (1, 2, 3, 4, 8):
        packed = matrix(rows, columns, bits, device)
        made[f"ours {bits} bits"] = (
            lambda packed=packed, bits=bits: kernels.packed_linear(x, packed, None, bits, columns),
            packed.nbytes,
        )
        made[f"copy {bits} bits"] = (packed.clone, packed.nbytes)
    return made


def layer(sizes: tuple[int, int, int, int], tokens: int, device: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Candidates for a MoE layer; ours has experts of 2 and 3 bits in turn."""
    hidden, inner, experts, slots = sizes
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=device)
    index = torch.rand(tokens, experts, device=device).argsort(-1)[:, :slots]
    weights = torch.full((tokens, slots), 1 / slots, dtype=torch.bfloat16, device=device)
    widths = [2 + e % 2 for e in range(experts)]
    table, _ = arena.layout([(inner, hidden), (inner, hidden), (hidden, inner)], ExpertWidths.of(widths), GROUP)
    qweights = [
        [matrix(inner, hidden, b, device), matrix(inner, hidden, b, device), matrix(hidden, inner, b, device)]
        for b in widths
    ]
    blocks = kernels.pack_experts(qweights, table)
    used = len(index.unique()) / experts
    gate_up = torch.randn(experts, hidden, 2 * inner, dtype=torch.bfloat16, device=device)
    down = torch.randn(experts, inner, hidden, dtype=torch.bfloat16, device=device)

    def dense() -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in index.unique().tolist():
            token, slot = torch.where(index == expert)
            gate, up = (x[token] @ gate_up[expert]).chunk(2, -1)
            y = (functional.silu(gate) * up) @ down[expert]
            out.index_add_(0, token, y * weights[token, slot, None])
        return out

    def grouped() -> torch.Tensor:
        order = index.flatten().argsort()
        ends = torch.bincount(index.flatten(), minlength=experts).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(x[order // slots], gate_up, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(functional.silu(gate) * up, down, offs=ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, order // slots, y)

    dense_bytes = int((gate_up.nbytes + down.nbytes) * used)
    return {
        "torch bf16, loop": (dense, dense_bytes),
        "torch bf16, grouped": (grouped, dense_bytes),
        "ours 2.5 bits": (
            lambda: kernels.moe_mlp(x, index, weights, blocks, table, inner, "silu", True),
            int(blocks.nbytes * used),
        ),
    }


def measure(
    what: str, name: str, tokens: int, made: dict[str, tuple[Callable[[], Any], int]], rounds: int, device: str
) -> None:
    """Time candidates in turns and append a row for each."""
    seconds: dict[str, list[float]] = {key: [] for key in made}
    for _ in range(rounds):
        for key, (call, _) in made.items():
            seconds[key].append(triton.testing.do_bench(call, return_mode="median") / 1e3)
    base = statistics.median(next(iter(seconds.values())))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        for key, (_, size) in made.items():
            median = statistics.median(seconds[key])
            row = {
                "what": what, "shape": name, "tokens": tokens, "candidate": key, "median_us": round(median * 1e6, 1),
                "gb_per_s": round(size / median / 1e9, 1), "times_first": round(base / median, 2), "rounds": rounds,
                "device": torch.cuda.get_device_name(device) if device == "cuda" else device,
                "torch": torch.__version__, "triton": triton.__version__, "date": datetime.date.today().isoformat(),
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
            print(
                f"{what} {name} M={tokens} {key}: {row['median_us']} us, {row['gb_per_s']} GB/s, x{row['times_first']}"
            )


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 32, 128, 512, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-checks", action="store_true", help="only time")
    options = parser.parse_args()
    if not options.no_checks:
        command = [sys.executable, "-m", "pytest", "-q", "gpu_kernels.py"]
        env = os.environ | {"MCMOE_TEST_DEVICE": options.device}
        if subprocess.run(command, cwd=ROOT / "tests", env=env, check=False).returncode:
            sys.exit("The kernels are wrong on this device (above); timing them would mean nothing.")
    for name in options.shapes:
        hidden, inner, *_ = LAYERS[name]
        for tokens in options.tokens:
            measure(
                "linear", name, tokens, linear(hidden, inner, tokens, options.device), options.rounds, options.device
            )
            measure("layer", name, tokens, layer(LAYERS[name], tokens, options.device), options.rounds, options.device)


if __name__ == "__main__":
    main()
