# SPDX-License-Identifier: Apache-2.0
"""Generation end to end: a packed MoE beside the dense one, and beside dense models of equal bytes and of equal activity.

Random weights in a real architecture: speed does not depend on their values. Every candidate runs in a process of its own,
in turns, with transformers' `generate` (greedy, dynamic cache); reported are medians over rounds of the time to the first
token, the seconds per further token, tokens per second, and anonymous memory after loading and at its peak. Rows go to
results/decode.jsonl. Load, machine and instruction set are in each row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from machine import here
from pages import replace_part

RESULTS = Path(__file__).parent / "results" / "decode.jsonl"
# hidden size, inner size, experts, experts per token, attention heads, key and value heads
SHAPES = {
    "Mixtral-8x7B": (4096, 14336, 8, 2, 32, 8),
    "smolmoe": (576, 1536, 8, 2, 9, 3),
}
VOCABULARY = 8192
NEW_TOKENS = 128
CANDIDATES = ["dense bf16", "packed", "dense, equal bytes", "dense, equal active"]


def config_of(shape: str, layers: int, inner: int | None = None) -> Any:
    """A Mixtral of that shape, or with `inner` a dense Mistral."""
    from transformers import MistralConfig, MixtralConfig

    hidden, own, experts, top_k, heads, kv_heads = SHAPES[shape]
    common = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": VOCABULARY, "max_position_embeddings": 8192, "dtype": "bfloat16",
        "sliding_window": None,
    }  # fmt: skip
    if inner is not None:
        return MistralConfig(intermediate_size=inner, **common)
    return MixtralConfig(intermediate_size=own, num_local_experts=experts, num_experts_per_tok=top_k, **common)


def build(folder: Path, shape: str, layers: int, bits: float) -> None:
    """Write the checkpoints of all candidates; parameters of the dense twins follow from the packed one."""
    import torch
    from transformers import AutoModelForCausalLM

    from transformers_mcmoe import MCMoEConfig, compression_report

    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config_of(shape, layers), dtype=torch.bfloat16)
    dense.save_pretrained(folder / "dense bf16")
    del dense
    text = torch.randint(0, VOCABULARY, (4, 64))
    config = MCMoEConfig(
        bits, dataset=text, num_samples=4, seq_len=64, allocation="uniform", rounding="nearest", fit="minmax"
    )
    packed = AutoModelForCausalLM.from_pretrained(folder / "dense bf16", quantization_config=config)
    packed.save_pretrained(folder / "packed")
    size = compression_report(packed)["sizes"]["quantized_bytes"]
    del packed
    hidden, inner, _, top_k, heads, kv_heads = SHAPES[shape]
    attention = layers * hidden * (2 * hidden + 2 * hidden * kv_heads // heads)
    equal_bytes = int((size / 2 - attention) / (3 * layers * hidden)) // 32 * 32
    for name, inner_size in (("dense, equal bytes", max(32, equal_bytes)), ("dense, equal active", top_k * inner)):
        twin = AutoModelForCausalLM.from_config(config_of(shape, layers, inner_size), dtype=torch.bfloat16)
        twin.save_pretrained(folder / name)


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def run(folder: str, cases: list[list[int]], threads: int) -> None:
    """One candidate: generate for every (prompt length, batch), and print a JSON line each."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    import transformers_mcmoe

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.randint(0, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(0))
    model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)  # matrices are repacked at first use
    loaded, peak, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    for length, batch in cases:
        ids = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
        times: list[float] = []

        class Clock(StoppingCriteria):
            """Is asked after each token, and never stops."""

            def __call__(self, ids: Any, scores: Any, times: list[float] = times, **kwargs: Any) -> Any:
                times.append(time.perf_counter())
                return torch.zeros(len(ids), dtype=torch.bool)

        peak[0] = 0
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, stopping_criteria=[Clock()])
        first, last = times[0] - started, times[-1] - times[0]
        row = {"first_token_s": first, "token_s": last / (NEW_TOKENS - 1)}
        row |= {"tokens_per_s": batch * (NEW_TOKENS - 1) / last, "load_bytes": loaded, "peak_bytes": peak[0]}
        row["backend"] = transformers_mcmoe.backend_info()["instruction_set"]
        print(json.dumps({"prompt": length, "batch": batch} | row), flush=True)
    stop.set()


def main() -> None:
    """Build the candidates, run them in turns, append a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="Mixtral-8x7B", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bits", type=float, default=2.54)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompt-tokens", type=int, default=65536, help="leave out cases of more, prompt times batch")
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES, choices=CANDIDATES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", default="exact", choices=["exact", "int8"])
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here; used again if they are there")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--docs", action="store_true", help="write docs/kernels.md from the rows, and stop")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    cases = [[length, batch] for length in options.prompts for batch in options.batches]
    cases = [case for case in cases if case[0] * case[1] <= options.prompt_tokens]
    if options.run:
        run(options.run, cases, options.threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "dense, equal active").is_dir():
            build(folder, options.shape, options.layers, options.bits)
        measured: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
        for _ in range(options.rounds):
            for name in options.candidates:
                command = [sys.executable, __file__, *sys.argv[1:], "--run", str(folder / name)]
                env = os.environ | {"MCMOE_MODE": options.mode, "OMP_NUM_THREADS": str(options.threads)}
                done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
                for line in done.stdout.splitlines():
                    row = json.loads(line)
                    measured.setdefault((name, row["prompt"], row["batch"]), []).append(row)
        _write(options, measured)


def _write(options: argparse.Namespace, measured: dict[tuple[str, int, int], list[dict[str, Any]]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        for (name, prompt, batch), rows in measured.items():
            median = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "backend"}
            row = {
                "shape": options.shape, "layers": options.layers, "candidate": name, "bits": options.bits,
                "mode": options.mode, "prompt": prompt, "batch": batch, "new_tokens": NEW_TOKENS,
                "threads": options.threads, "rounds": len(rows), **{k: round(v, 5) for k, v in median.items()},
                "backend": rows[0]["backend"], **here(),
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
            print(
                f"{options.shape} x{options.layers}, prompt {prompt}, batch {batch}, {name}: first token "
                f"{row['first_token_s']:.2f} s, {row['tokens_per_s']:.2f} tokens/s, {row['load_bytes'] / 1e9:.2f} GB "
                f"loaded, {row['peak_bytes'] / 1e9:.2f} GB peak",
                flush=True,
            )


def write_docs() -> None:
    """The tables of docs/kernels.md: the newest row of each candidate, prompt and batch, a table for each processor and model."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    tables: dict[tuple[Any, ...], dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in rows:
        table = tables.setdefault((row.get("processor", "Xeon"), row["shape"], row["layers"]), {})
        table[row["prompt"], row["batch"], row["candidate"], row["mode"]] = row
    parts: list[str] = []
    for (processor, _, _), newest in tables.items():
        own = list(newest.values())
        first = own[0]
        parts += [
            f"### {processor} ({first['backend']}), {first['threads']} threads: {first['shape']}, {first['layers']} layers, "
            f"{first['bits']} bits, {first['new_tokens']} new tokens, {first['rounds']} rounds, {first['date']}\n",
            "| prompt, batch | | first token, s | s/token | tokens/s | times dense | loaded, GB | peak, GB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        # dense models ran beside the packed one in either mode: each is compared with its own, one is shown
        shown = [row for row in own if row["candidate"] == "packed" or row["mode"] == "exact"]
        for row in sorted(shown, key=lambda r: (r["batch"], r["prompt"])):
            same = [
                r for r in own
                if (r["prompt"], r["batch"], r["mode"], r["candidate"]) == (row["prompt"], row["batch"], row["mode"], "dense bf16")
            ]  # fmt: skip
            times = f"{row['tokens_per_s'] / same[0]['tokens_per_s']:.2f}" if same else ""
            name = f"packed, {row['mode']}" if row["candidate"] == "packed" else row["candidate"]
            parts.append(
                f"| {row['prompt']:.0f}, {row['batch']:.0f} | {name} | {row['first_token_s']:.2f} | {row['token_s']:.3f} "
                f"| {row['tokens_per_s']:.1f} | {times} | {row['load_bytes'] / 1e9:.1f} | {row['peak_bytes'] / 1e9:.1f} |"
            )
        parts.append("")
    replace_part("kernels.md", "decode", parts)


if __name__ == "__main__":
    main()
