# SPDX-License-Identifier: Apache-2.0
"""Quality at equal average bits: allocations and presets on one dense checkpoint, against the dense model.

Calibrates on one text and measures perplexity, KL divergence and top-1 agreement on another. Every row goes to
results/quality.jsonl; `--docs` writes docs/quality.md from all rows there are.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from machine import here
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
DOCS = Path(__file__).parent.parent / "docs" / "quality.md"
# one width of attention for all layers, as the baselines have it
FIXED: dict[str, Any] = {"attention_bits": 4, "shared_expert_bits": 4}
UNIFORM: dict[str, Any] = {"allocation": "uniform"}
TWO: dict[str, Any] = {"allocation": "uniform", "expert_bits": (2,)}
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "preset best": {"preset": "best"},
    "default, 64 tuning steps": {"tuning_steps": 64},
    "preset fast": {"preset": "fast"},
    "preset paper": {"preset": "paper"},
    "uniform": UNIFORM,
    "uniform, attention 8 bits": UNIFORM | {"attention_bits": 8, "shared_expert_bits": 8},
    "default, a width per expert": {"granularity": "expert"},
    "default, attention 4 bits": FIXED,
    "default, attention 4 bits, a width per expert": FIXED | {"granularity": "expert"},
    "default, attention 3, 4 or 8 bits": {"attention_bits": (3, 4, 8), "shared_expert_bits": (3, 4, 8)},
    "default, experts 1 to 3 bits": {"expert_bits": (1, 2, 3)},
    "default, a budget per layer": {"budget": "layer"},
    "default, no descent": {"sweeps": 0},
    "default, matrices by themselves": {"sequential": False},
    "default, both left out": {"sweeps": 0, "sequential": False},
    "default, exponents 1, 1.5, 2": FIXED | {"alpha": 1.0, "beta": 1.5},
    "default, rounded to nearest": {"rounding": "nearest"},
    "uniform, rounded to nearest": UNIFORM | {"rounding": "nearest"},
    "f_norm": {"allocation": "f_norm"},
    "hessian": {"allocation": "hessian"},
    "frequency": {"allocation": "frequency"},
    "routing_weight": {"allocation": "routing_weight"},
    "random": {"allocation": "random"},
    "bsp": {"allocation": "bsp", "expert_bits": (2, 4)},
    "bsp, 1 and 2 bits": {"allocation": "bsp", "expert_bits": (1, 2)},
    "all experts at 2 bits": TWO,
    "all experts at 2 bits, no descent": TWO | {"sweeps": 0},
    "all experts at 2 bits, matrices by themselves": TWO | {"sequential": False},
    "all experts at 2 bits, both left out": TWO | {"sweeps": 0, "sequential": False},
    "all experts at 2 bits, act_order off": TWO | {"act_order": False},
}


def measure(options: argparse.Namespace, name: str, bits: float, dense: Any, test: torch.Tensor) -> dict[str, Any]:
    """Compress, evaluate, and return the row."""
    from transformers_mcmoe import MCMoEConfig, compression_report
    from transformers_mcmoe.evaluation import evaluate

    row: dict[str, Any] = {"row": name, "bits": bits, "seed": options.seed, "layers": options.layers}
    common = {"dataset": str(options.calibration), "num_samples": options.samples, "seq_len": options.seq_len}
    if options.layers:
        last = AutoConfig.from_pretrained(options.model).num_hidden_layers
        common["modules_to_not_convert"] = [f"model.layers.{i}" for i in range(options.layers, last)]
    config = MCMoEConfig(bits, **common, group_size=options.group_size, seed=options.seed, **ROWS[name])
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config, dtype=torch.float32)
    row |= told(compression_report(model)) | {"seconds": round(time.monotonic() - started, 1)}
    if options.save is not None:
        model.save_pretrained(options.save / f"{name} {bits}")
    scores = evaluate(model.dequantize(), test, dense, context=options.context, limit=options.windows, batch=1)
    return row | scores.to_dict()


def told(report: dict[str, Any]) -> dict[str, Any]:
    """What a row takes from the report of a compression."""
    return {
        "average_bits": report["average_bits"],
        "bits_per_weight": report["bits_per_weight"],
        "quantized_bytes": report["sizes"]["quantized_bytes"],
        "calibration_tokens": report["calibration_tokens"],
        "seconds_by_stage": {stage: round(s, 1) for stage, s in report["seconds"].items()},
        "expert_bits": report["expert_bits"],
        "down_bits": report["down_bits"],
        "tuning": report.get("tuning"),
    }


def measure_saved(options: argparse.Namespace, folder: Path, dense: Any, test: torch.Tensor) -> dict[str, Any]:
    """The row of a model that `--save` kept, on another text."""
    from transformers_mcmoe import MCMoEConfig
    from transformers_mcmoe.evaluation import evaluate

    name, _, bits = folder.name.rpartition(" ")
    report = json.loads((folder / "mcmoe_report.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=MCMoEConfig(), dtype=torch.float32)
    scores = evaluate(model.dequantize(), test, dense, context=options.context, limit=options.windows, batch=1)
    row = {"row": name, "bits": float(bits), "seed": report["seed"], "layers": 0}
    return row | told(report) | scores.to_dict()


def measure_peer(options: argparse.Namespace, folder: Path, dense: Any, test: torch.Tensor) -> dict[str, Any]:
    """The row of a checkpoint that another tool rounded and wrote back as dense weights."""
    from transformers_mcmoe.evaluation import evaluate

    told = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    row = {"row": told["peer"], "bits": options.bits[0], "layers": told["layers"], "peer": told}
    row |= {name: told[name] for name in ("bits_per_weight", "seconds")}
    scores = evaluate(model, test, dense, context=options.context, limit=options.windows, batch=1)
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
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12, help="windows measured, spread over the test text")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=0, help="quantize only the first layers; 0: all")
    parser.add_argument("--peers", type=Path, nargs="*", default=[], help="also measure these outputs of peers/")
    parser.add_argument("--saved", type=Path, nargs="*", default=[], help="measure these, which --save kept, again")
    parser.add_argument("--save", type=Path, help="keep the packed models in folders in here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", action="store_true", help="write docs/quality.md from the committed rows, and stop")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    test = tokens(options.model, options.test)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    for folder in options.saved:
        _append(options, measure_saved(options, folder, dense, test))
    for folder in options.peers:
        _append(options, measure_peer(options, folder, dense, test))
    for bits in options.bits:
        for name in options.rows:
            _append(options, measure(options, name, bits, dense, test))


def _append(options: argparse.Namespace, measured: dict[str, Any]) -> None:
    row = {"model": options.model.name, "test": options.test.name, "calibration": options.calibration.name}
    row |= {"group_size": options.group_size} | measured | here()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{row['bits']} {row['row']}: perplexity {row['perplexity']:.2f}, KL {row['kl']:.4f}", flush=True)


def write_docs() -> None:
    """docs/quality.md: one table per model, layers and budget, the newest row of each name; the newest models first."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {(_build(row), row["test"], row["layers"], row["bits"], row["row"]): row for row in rows}
    builds = list(dict.fromkeys(_build(row) for row in reversed(rows)))
    parts = [HEAD]
    for key in sorted(dict.fromkeys(key[:4] for key in newest), key=lambda key: builds.index(key[0])):
        (model, _), _, layers, bits = key
        table = sorted((row for k, row in newest.items() if k[:4] == key), key=lambda row: row["kl"])
        first = next(row for row in table if "calibration_tokens" in row)
        protocol = first["protocol"]
        parts.append(
            f"## {model}, {bits:.4g} average bits{f', only layers 0-{layers - 1} quantized' if layers else ''}\n"
        )
        parts.append(
            f"Calibration: {first['calibration_tokens']:,} tokens of {first['calibration']}. Measured: "
            f"{protocol['windows']} windows of {protocol['context']} tokens spread over {first['test']}, "
            f"{first['tokens']:,} predictions, fp32, on {first['cpus']} CPU cores. Dense perplexity "
            f"{first['reference_perplexity']:.2f}. Groups of {first['group_size']} or the largest divisor below. "
            "± is a standard error over windows.\n"
        )
        parts.append("| row | average bits | bits per weight | perplexity | dNLL | KL | top-1 | seconds |")
        parts.append("|---|---|---|---|---|---|---|---|")
        parts += [_line(row) for row in table]
        parts.append("")
    DOCS.write_text("\n".join(parts), encoding="utf-8")


def _build(row: dict[str, Any]) -> tuple[str, float]:
    """A dense model: its name, and its perplexity, as what a builder gives depends on the machine's arithmetic."""
    return row["model"], round(row["reference_perplexity"], 2)


def _line(row: dict[str, Any]) -> str:
    average, per_weight = (f"{row[name]:.3f}" if name in row else "" for name in ("average_bits", "bits_per_weight"))
    seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
    return (
        f"| {row['row']} | {average} | {per_weight} | {row['perplexity']:.2f} | {row['dnll']:.3f} ± {row['dnll_se']:.3f} "
        f"| {row['kl']:.4f} ± {row['kl_se']:.4f} | {100 * row['top1']:.1f} % | {seconds} |"
    )


HEAD = """# Quality, measured

Written by `python benchmarks/quality.py --docs` from `benchmarks/results/quality.jsonl`; rows are ordered by KL divergence to
the dense model. smolmoe is a 373 M-parameter Mixtral built from SmolLM2-135M by layer-wise distillation; it is far more
sensitive than large models. What its builder gives depends on the machine's arithmetic: rows compare inside a table, and tables of one
dense perplexity are of one build. Attention has 4 bits, but for the default, which chooses 4 or 8 per projection within the same average. Rows round
with GPTQ unless they say otherwise.

The tables of dense perplexity 36.04 (smolmoe) and 53.32 (demo-mixtral) are of the present release; those of 36.79 were measured before coordinate
descent, down projections fitted behind gate and up, and errors carried on to later layers, and their rows "PMQ" had attention at 4 bits. uniform on smolmoe at 3.03 and demo-mixtral's baselines but uniform are of the release
before, which rounded alike.

* At 3.03 bits the default is ahead of uniform GPTQ by 26 % of KL and 13 % of perplexity (smolmoe); at 2.54 by 15 % and 11 %, on demo-mixtral by 45 % of KL. Of smolmoe's 15, 4
  come from widths of experts over the whole model, 9 from attention in the same program (v at 8 bits in most layers), 3 from a width per projection.
  On the demo model attention stays at 4 bits; `uniform` with attention at 8 bits and the same average is worse there.
* AutoRound with 20 iterations per block, a tenth of its own default, equals our rounding on the first 6 layers at 2 bits (KL 0.3846 and 0.3905 with a standard
  error of 0.01), at 3.4 times the time. It has not been run with 200 iterations, nor on all layers.
* On text of another domain than the calibration's (Python's documentation instead of web text) the default at 2.54 bits is ahead of uniform by 22 % of KL and 19 % of
  perplexity, with tuning by 32 and 29 %.
* What is not reached: the default at 2.54 bits against uniform at 3.03 (KL 0.522). With 64 `tuning_steps` perplexity is the same (54.91 and 54.85), KL is 0.562. Tuning is
  not part of the default, as it takes longer than all else and gives the demo model nothing.
* The default takes 1.8 times uniform's time at 16 calibration sequences. The pass that measures errors reads a quarter of the sequences, but rounds
  experts at every width whatever their number, so that the share falls with more of them.

GPTQModel is run by `benchmarks/peers/with_gptqmodel.py` (asymmetric, mse 2.4, group-aware act order, damping 0.05; its own defaults,
symmetric without a range search, are worse), on windows of the same calibration text. Its format spends about 0.2 bits per
weight less at groups of 64, as its zeros are codes and ours are fp16. Where a standard error is large, one window whose
attention sink broke dominates the mean. Seconds are of a shared machine; each row of the JSON has its load.

(Measured on the earlier build:) a budget per layer has little to move here: experts of one layer differ by a factor of 3 in error, which is what a bit is worth;
layers differ by 10. That is why one budget for the model is the default.

Errors are divided by a token's norm times the median norm. Divided by the squared norm, an attention sink counts as one token of 1,024,
although all others attend to it: on the earlier build at 2.05 bits one window of twelve then lost its sink (KL 6.93, the others 1.28 on the
mean) and PMQ with it, 200.29 / 1.752; now no window breaks.

bsp has widths 1 and 2 at 2.05, as whole layers at 2 and 4 bits cannot go that low.
"""

if __name__ == "__main__":
    main()
