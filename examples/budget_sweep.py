# SPDX-License-Identifier: Apache-2.0
"""How small can it be? Compress to several sizes and draw perplexity and KL divergence against bits per weight.

python examples/budget_sweep.py [SWEEP.png]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from python_docs import documents, split, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe import MCMoEConfig, compression_report
from transformers_mcmoe.evaluation import evaluate

MODEL = Path(__file__).parent / "demo-mixtral"
SEQ_LEN = 256


def sweep(budgets: Sequence[float], samples: int = 64, limit: int | None = None) -> list[dict[str, float]]:
    """Bits per weight, perplexity and KL divergence at each budget of average bits, on text that calibration never saw."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train, held_out = split(documents())
    test = windows(tokenizer, held_out, SEQ_LEN)
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    rows = []
    for bits in budgets:
        config = MCMoEConfig(bits, dataset=train, num_samples=samples, seq_len=SEQ_LEN)
        model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=torch.float32)
        score = evaluate(model, test, dense, limit=limit)
        rows.append(
            {
                "bits_per_weight": compression_report(model)["bits_per_weight"],
                "perplexity": score.perplexity,
                "dense": score.reference_perplexity or 0.0,
                "kl": score.kl or 0.0,
            }
        )
        print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()))
    return rows


def draw(rows: Sequence[dict[str, float]], path: str) -> None:
    """Both curves into one file."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    bits = [row["bits_per_weight"] for row in rows]
    left.plot(bits, [row["perplexity"] for row in rows], marker="o", label="packed")
    left.axhline(rows[0]["dense"], linestyle="--", color="gray", label="dense")
    left.set(xlabel="bits per weight", ylabel="perplexity")
    left.legend()
    right.plot(bits, [row["kl"] for row in rows], marker="o")
    right.set(xlabel="bits per weight", ylabel="KL to dense, nats per token", yscale="log")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(sweep((1.6, 2.0, 2.54, 3.0)), sys.argv[1] if len(sys.argv) > 1 else "sweep.png")
