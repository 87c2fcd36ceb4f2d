# SPDX-License-Identifier: Apache-2.0
"""Quality at equal average bits: allocations and presets on one dense checkpoint, against the dense model.

Calibrates on one text and measures perplexity, KL divergence and top-1 agreement on another. Every row goes to
results/quality.jsonl; `--docs` writes docs/quality.md from all rows there are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
DOCS = Path(__file__).parent.parent / "docs" / "quality.md"
BASE: dict[str, Any] = {"expert_bits": (1, 2, 3, 4)}
ROWS: dict[str, dict[str, Any]] = {
    "PMQ": BASE,
    "PMQ, one budget for the model": BASE | {"budget": "model"},
    "uniform": BASE | {"allocation": "uniform"},
    "paper preset": {"preset": "paper"},
    "f_norm": BASE | {"allocation": "f_norm"},
    "hessian": BASE | {"allocation": "hessian"},
    "frequency": BASE | {"allocation": "frequency"},
    "routing_weight": BASE | {"allocation": "routing_weight"},
    "random": BASE | {"allocation": "random"},
    "bsp": {"allocation": "bsp", "expert_bits": (2, 4), "budget": "model"},
    "PMQ, rounded to nearest": BASE | {"rounding": "nearest"},
    "uniform, rounded to nearest": BASE | {"allocation": "uniform", "rounding": "nearest"},
}


def measure(options: argparse.Namespace, name: str, bits: float, dense: Any, test: torch.Tensor) -> dict[str, Any]:
    """Compress, evaluate, and return the row."""
    from transformers_mcmoe import MCMoEConfig, compression_report
    from transformers_mcmoe.evaluation import evaluate

    row: dict[str, Any] = {"row": name, "bits": bits, "seed": options.seed}
    common = {"dataset": str(options.calibration), "num_samples": options.samples, "seq_len": options.seq_len}
    config = MCMoEConfig(bits, **common, group_size=options.group_size, seed=options.seed, **ROWS[name])
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config, dtype=torch.float32)
    report = compression_report(model)
    row |= {
        "average_bits": report["average_bits"],
        "bits_per_weight": report["bits_per_weight"],
        "quantized_bytes": report["sizes"]["quantized_bytes"],
        "calibration_tokens": report["calibration_tokens"],
        "seconds": round(time.monotonic() - started, 1),
        "seconds_by_stage": {stage: round(s, 1) for stage, s in report["seconds"].items()},
        "expert_bits": report["expert_bits"],
    }
    scores = evaluate(model.dequantize(), test, dense, context=options.context, limit=options.windows, batch=1)
    return row | scores.to_dict()


def tokens(model: Path, text: Path) -> torch.Tensor:
    """Token ids of a text, [n]."""
    return AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]


def main() -> None:
    """Append the rows asked for, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the dense checkpoint")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on")
    parser.add_argument("--test", type=Path, help="text to measure on")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.03, 2.54, 2.05])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12, help="windows measured, spread over the test text")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", action="store_true", help="write docs/quality.md from the committed rows, and stop")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    test = tokens(options.model, options.test)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    for bits in options.bits:
        for name in options.rows:
            row = {"model": options.model.name, "test": options.test.name, "calibration": options.calibration.name}
            row |= {"group_size": options.group_size} | measure(options, name, bits, dense, test)
            row |= {
                "load": round(os.getloadavg()[0], 1),
                "cpus": os.cpu_count(),
                "machine": platform.machine(),
                "date": datetime.date.today().isoformat(),
            }
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{bits} {name}: perplexity {row['perplexity']:.2f}, KL {row['kl']:.4f}, {row['seconds']:.0f} s",
                flush=True,
            )


def write_docs() -> None:
    """docs/quality.md: one table per model and budget, the newest row of each name."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {(row["model"], row["bits"], row["row"]): row for row in rows}
    parts = [HEAD]
    for model, bits in dict.fromkeys((model, bits) for model, bits, _ in newest):
        table = [row for (m, b, _), row in newest.items() if (m, b) == (model, bits)]
        table.sort(key=lambda row: row["kl"])
        first = table[0]
        protocol = first["protocol"]
        parts.append(f"## {model}, {bits} average bits\n")
        parts.append(
            f"Calibration: {first['calibration_tokens']:,} tokens of {first['calibration']}. Measured: "
            f"{protocol['windows']} windows of {protocol['context']} tokens spread over {first['test']}, "
            f"{protocol['tokens']:,} predictions, fp32, on {first['cpus']} CPU cores. Dense perplexity "
            f"{first['reference_perplexity']:.2f}. Groups of {first['group_size']} or the largest divisor below. "
            "s.e. is over windows.\n"
        )
        parts.append("| row | average bits | bits per weight | perplexity | dNLL | KL | top-1 | seconds |")
        parts.append("|---|---|---|---|---|---|---|---|")
        for row in table:
            parts.append(
                f"| {row['row']} | {row['average_bits']:.3f} | {row['bits_per_weight']:.3f} | {row['perplexity']:.2f} "
                f"| {row['dnll']:.3f} ± {row['dnll_se']:.3f} | {row['kl']:.4f} ± {row['kl_se']:.4f} "
                f"| {100 * row['top1']:.1f} % | {row['seconds']:.0f} |"
            )
        parts.append("")
    DOCS.write_text("\n".join(parts), encoding="utf-8")


HEAD = """# Quality, measured

Written by `python benchmarks/quality.py --docs` from `benchmarks/results/quality.jsonl`; rows are ordered by KL divergence to
the dense model. smolmoe is a 373 M-parameter Mixtral built from SmolLM2-135M by layer-wise distillation; it is far more
sensitive than large models. All rows quantize attention to 4 bits and, unless they say otherwise, round with GPTQ.
"""

if __name__ == "__main__":
    main()
