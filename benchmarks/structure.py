# SPDX-License-Identifier: Apache-2.0
"""Quality and speed with fewer parameters in the experts: dropped experts, low-rank factors, and both, at 8 bits.

Every row removes a share of the experts' weights; what is left has 8 bits, which by themselves change next to nothing (row
"8 bits"). `--recover` trains a LoRA on top of a row and measures again. Rows go to results/structure.jsonl; `--docs`
writes docs/structure.md's table.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from lora import RANK, distil
from machine import here
from pages import replace_part
from peft import LoraConfig, get_peft_model
from quality import remember, tokens
from transformers import AutoModelForCausalLM

RESULTS = Path(__file__).parent / "results" / "structure.jsonl"
METHODS = ("moe_i2", "naee", "reap", "frequency", "random")
# row -> share of what is removed that is removed by dropping, method, and options of the ranks
ROWS: dict[str, tuple[float, str, dict[str, Any]]] = {
    **{f"drop: {method}": (1.0, method, {}) for method in METHODS},
    "drop: moe_i2 by the loss": (1.0, "moe_i2 loss", {}),
    "low rank: whitened": (0.0, "", {}),
    "low rank: plain": (0.0, "", {"whitened": False}),
    "drop and low rank": (0.5, "moe_i2", {}),
    "drop and low rank: plain": (0.5, "moe_i2", {"whitened": False}),
}


def config_of(options: argparse.Namespace, name: str, ratio: float) -> Any:
    """The config of a row."""
    from transformers_mcmoe import MCMoEConfig, PruneConfig, RankConfig

    common = {
        "dataset": str(options.calibration),
        "num_samples": options.samples,
        "seq_len": options.seq_len,
        "seed": options.seed,
        "attention_bits": 8,
        "shared_expert_bits": 8,
    }
    shapes = sizes(options.model)
    # rounding to nearest reads no text, and blocks are looked at on 4,096 tokens
    few = common | {"num_samples": min(options.samples, max(1, 4096 // options.seq_len))}
    if name == "8 bits":
        return MCMoEConfig(8.0, expert_bits=(8,), allocation="uniform", rounding="nearest", fit="minmax", **few)
    share, method, rank = ROWS[name]
    kind, _, importance = method.partition(" ")
    dropped = share * ratio
    prune = PruneConfig(dropped, kind, importance or "local") if dropped else None
    if share == 1.0:
        kept = 1 - round(dropped * shapes["experts"]) / shapes["experts"]
        bits = 8 * (kept * shapes["expert"] + shapes["linear"]) / (shapes["expert"] + shapes["linear"])
        return MCMoEConfig(
            bits, expert_bits=(8,), allocation="uniform", rounding="nearest", fit="minmax", prune=prune, **few
        )
    # of what is kept, so much is left by the factors
    left = (1 - ratio) / (1 - dropped)
    mean = left * shapes["break_even"]
    return MCMoEConfig(rank=RankConfig(mean, **rank), prune=prune, **common)


def sizes(folder: Path) -> dict[str, float]:
    """Weights of all experts and of other linear layers, number of experts, and the rank that saves nothing."""
    from transformers import AutoConfig

    from transformers_mcmoe.models.structure import Structure
    from transformers_mcmoe.structure import break_even

    with torch.device("meta"):
        structure = Structure(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)), 8, 8)
    first = next(iter(structure.experts.values())).projections[0]
    return {
        "expert": sum(structure.expert_weights(path) * e.num_experts for path, e in structure.experts.items()),
        "linear": sum(structure.linear_weights().values()),
        "experts": sum(e.num_experts for e in structure.experts.values()),
        "break_even": break_even(first.out_features, first.in_features),
    }


def measure(options: argparse.Namespace, name: str, ratio: float, dense: Any, test: torch.Tensor) -> dict[str, Any]:
    """Compress, evaluate, time, and return the row."""
    from transformers_mcmoe import compression_report
    from transformers_mcmoe.evaluation import evaluate, measure_speed

    protocol: dict[str, Any] = {"context": options.context, "limit": options.windows, "batch": 1}
    started = time.monotonic()
    config = config_of(options, name, ratio)
    model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config, dtype=torch.float32)
    seconds = time.monotonic() - started
    report = compression_report(model)
    removed = 1 - sum(kept_weights(report)) / sizes(options.model)["expert"] if name != "8 bits" else 0.0
    row: dict[str, Any] = {"row": name, "ratio": ratio, "removed": removed, "recovered": False}
    row |= {
        "calibration_tokens": report["calibration_tokens"],
        "total_bytes": report["sizes"]["total_bytes"],
        "average_bits": report["average_bits"],
    }
    row |= {"seconds": round(seconds, 1), "seconds_by_stage": {k: round(v, 1) for k, v in report["seconds"].items()}}
    row["dropped"] = report["dropped_experts"] and report["dropped_experts"]["experts"]
    speed = measure_speed({name: model}, prompt=64, new_tokens=48, rounds=3)["models"][name]
    row["decode_tokens_per_second"] = speed["decode_tokens_per_second"]
    row["prefill_tokens_per_second"] = speed["prefill_tokens_per_second"]
    row |= evaluate(model, test, dense, **protocol).to_dict()
    append(options, row)
    if options.recover:
        row = dict(row) | recover(options, model, dense, test, protocol)
        append(options, row)
    return row


def kept_weights(report: dict[str, Any]) -> list[float]:
    """Weights of experts that are stored, as matrices or as factors."""
    found = []
    config = report["config"]
    parts = report["sizes"]["parts"]
    for name, size in parts.items():
        if name.startswith("experts"):
            # a byte a weight, four bytes a group
            found.append(size / (1 + 4 / 96) if "low rank" not in name else size / (1 + 4 / config["group_size"]))
    return found


def recover(
    options: argparse.Namespace, model: Any, dense: Any, test: torch.Tensor, protocol: dict[str, Any]
) -> dict[str, Any]:
    """Train a LoRA on the dense model's output, and measure with it."""
    from transformers_mcmoe.evaluation import evaluate
    from transformers_mcmoe.integrations.lora import prepare_for_training

    prepare_for_training(model, gradient_checkpointing=False)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    text = tokens(options.model, options.text)
    data = text[len(text) // 2 :][: options.recover * 2 * 256].view(-1, 2, 256)
    seconds = distil(adapted, dense, data, 1e-3)
    row = {"recovered": True, "steps": len(data), "train_tokens": data.numel(), "train_seconds": round(seconds, 1)}
    return row | evaluate(adapted, test, dense, **protocol).to_dict()


def append(options: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Add a row to the results."""
    row = {"model": options.model.name, "test": options.test.name, "calibration": options.calibration.name}
    row |= measured | here()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(
        f"{row['ratio']} {row['row']}{' + LoRA' if row['recovered'] else ''}: perplexity {row['perplexity']:.2f}, KL {row['kl']:.4f}, "
        f"{row['total_bytes'] / 1e6:.0f} MB, {row['decode_tokens_per_second']:.1f} tokens/s",
        flush=True,
    )


def main() -> None:
    """Append the rows asked for, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the dense checkpoint")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on")
    parser.add_argument("--test", type=Path, help="text to measure on")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.25, 0.5])
    parser.add_argument("--rows", nargs="*", default=["8 bits", *ROWS], choices=["8 bits", *ROWS])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--recover", type=int, default=0, help="also train a LoRA for so many steps of 512 tokens")
    parser.add_argument("--text", type=Path, help="text to train that on; its second half is used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", action="store_true", help="write docs/structure.md's tables from the rows, and stop")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    test = tokens(options.model, options.test)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    remember(dense)
    for ratio in options.ratios:
        for name in options.rows:
            measure(options, name, 0.0 if name == "8 bits" else ratio, dense, test)


def write_docs() -> None:
    """One table per dense model and text; the newest row of each name."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {(r["model"], r["test"], r["ratio"], r["row"], r["recovered"]): r for r in rows}
    lines: list[str] = []
    for model, test in dict.fromkeys(key[:2] for key in newest):
        own = [row for key, row in newest.items() if key[:2] == (model, test)]
        one = own[0]
        lines += [
            f"{model} (dense perplexity {one['reference_perplexity']:.2f} on {test}), calibrated on {one['calibration']} (what is dropped on 4,096 tokens, factors on {max(row['calibration_tokens'] for row in own):,}); 2 CPU cores, float32, "
            "tokens per second of greedy generation after 64 tokens:",
            "",
            "| fewer bytes in experts, about | how | perplexity | KL | size | tokens/s | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in sorted(own, key=lambda row: (row["ratio"], row["kl"])):
            name = row["row"] + (" + LoRA" if row["recovered"] else "")
            error = f" ± {row['kl_stderr']:.4f}" if row.get("kl_stderr") is not None else ""
            lines.append(
                f"| {100 * row['removed']:.0f} % | {name} | {row['perplexity']:.2f} | {row['kl']:.4f}{error} | "
                f"{row['total_bytes'] / 1e6:.0f} MB | {row['decode_tokens_per_second']:.1f} | {row['seconds']:.0f} |"
            )
        lines.append("")
    replace_part("structure.md", "structure", lines[:-1])


if __name__ == "__main__":
    main()
