# SPDX-License-Identifier: Apache-2.0
"""What `mcmoe plan` says of well-known models on this machine, into docs/memory_and_time.md.

python benchmarks/plans.py          # some minutes; only configs are needed, no weights
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import here
from pages import replace_part
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from transformers_mcmoe import MCMoEConfig, compression_report
from transformers_mcmoe.pipeline.preview import preview
from transformers_mcmoe.progress import duration, size

RESULTS = Path(__file__).parent / "results" / "plans.jsonl"
MODELS: dict[str, Any] = {
    "OLMoE-1B-7B": OlmoeConfig(intermediate_size=1024),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    "Mixtral-8x7B": MixtralConfig(),
    "Mixtral-8x22B": MixtralConfig(
        vocab_size=32768,
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=56,
        num_attention_heads=48,
        num_key_value_heads=8,
    ),
}


def main() -> None:
    """Plan each model, keep the rows, write the table."""
    rows = []
    for name, config in MODELS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        found = preview(model, MCMoEConfig(2.54), dtype=torch.bfloat16)
        rows.append({"model": name, **vars(found), "layers": len(found.layers), **here()})
        print(json.dumps(rows[-1]))
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = [
        f"`--bits 2.54`, 128 x 2,048 calibration tokens, bf16; {rows[0]['processor']}, {rows[0]['cpus']} cores, {rows[0]['date']}.",
        "",
        "| model | experts | dense | packed | memory to compress | work folder | estimated time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = [size(row[key]) for key in ("dense_bytes", "total_bytes", "memory_bytes", "disk_bytes")]
        lines.append(
            f"| {row['model']} | {row['experts']:,} | {' | '.join(sizes)} | {duration(sum(row['seconds'].values()))} |"
        )
    lines += ["", _check()]
    replace_part("memory_and_time.md", "plans", lines)
    replace_part("memory_and_time.md", "measured", _measured())


def _check() -> str:
    """The estimate of the time of one layer of a quarter of Mixtral-8x7B's width beside what it took."""
    shape = MixtralConfig(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    config = MCMoEConfig(2.54, dataset=torch.randint(0, 2000, (32, 512)), num_samples=32, seq_len=512)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    guessed = preview(empty, config, dtype=torch.bfloat16).seconds
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
        took = compression_report(model)["seconds"]
        del model
    stages = "; ".join(f"{stage} {guessed[stage]:.0f} s guessed, {took[stage]:.0f} s taken" for stage in guessed)
    return (
        "How good the guess is: for one random layer of Mixtral's kind (hidden size 1,024, 8 experts of 3,584; 32 x 512 tokens) on this machine, "
        f"{stages}."
    )


def _measured() -> list[str]:
    """Rows of benchmarks/memory.py, the newest of each kind."""
    file = RESULTS.with_name("memory.jsonl")
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["layers"], row["allocation"], row["tokens"]] = row
    lines = [
        "`benchmarks/memory.py`: peak anonymous memory above the libraries' while random Mixtral checkpoints of growing depth are",
        "compressed; the peak hardly grows with depth.",
        "",
        "| layers | checkpoint | allocation | tokens | peak | bound | time | machine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        sizes = [size(row[key]) for key in ("peak_above_baseline", "bound")]
        where = f"{row['cpus']} cores, load {row['load']}, {row['date']}"
        cells = (row["layers"], size(row["checkpoint_bytes"]), row["allocation"], f"{row['tokens']:,}", *sizes)
        lines.append(f"| {' | '.join(map(str, cells))} | {duration(row['seconds'])} | {where} |")
    return lines


if __name__ == "__main__":
    main()
