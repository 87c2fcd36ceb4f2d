# SPDX-License-Identifier: Apache-2.0
"""Quality and speed with fewer parameters in the experts: dropped experts, low-rank factors, and both, at 8 bits.

Every row removes a share of the experts' weights; what is left has 8 bits, which by themselves change next to nothing (row
"8 bits"). `--save` keeps the packed models; of those that `--saved` names, `--recover` trains a LoRA on top and measures again,
and `--speed` times all in turns. `--joint` compares plans of widths alone with those of the one program. Rows go to
results/structure.jsonl; `--docs` writes docs/structure.md's tables.
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

JOINT: dict[str, dict[str, Any]] = {
    "widths": {},
    "widths, dropping": {"prune": "auto"},
    "widths, ranks, dropping": {"prune": "auto", "rank": "auto"},
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
    from transformers_mcmoe.evaluation import evaluate

    protocol: dict[str, Any] = {"context": options.context, "limit": options.windows, "batch": 1}
    started = time.monotonic()
    config = config_of(options, name, ratio)
    model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config, dtype=torch.float32)
    seconds = time.monotonic() - started
    report = compression_report(model)
    row: dict[str, Any] = {"row": name, "ratio": ratio, "removed": removed(model), "recovered": False}
    row |= {
        "calibration_tokens": report["calibration_tokens"],
        "total_bytes": report["sizes"]["total_bytes"],
        "average_bits": report["average_bits"],
    }
    row |= {"seconds": round(seconds, 1), "seconds_by_stage": {k: round(v, 1) for k, v in report["seconds"].items()}}
    row["dropped"] = report["dropped_experts"] and report["dropped_experts"]["experts"]
    if options.save is not None:
        model.save_pretrained(options.save / f"{name} {ratio}")
    row |= evaluate(model, test, dense, **protocol).to_dict()
    append(options, row)
    return row


def removed(model: Any) -> float:
    """Share of the experts' weights that is not there: of dropped experts, and what factors have fewer."""
    from transformers_mcmoe.nn import PackedExperts

    kept = total = 0
    for module in model.modules():
        if isinstance(module, PackedExperts):
            shapes = [(p.out_features, p.in_features) for p in module.adapter.projections]
            total += module.num_experts * sum(rows * columns for rows, columns in shapes)
            for expert in module.widths.kept:
                rank, base = module.widths.rank_of(expert), module.widths.gate_up[expert] > 0
                kept += sum(base * rows * columns + rank * (rows + columns) for rows, columns in shapes)
    return 1 - kept / total


def saved(folder: Path) -> tuple[str, float, Any]:
    """Row, ratio and model of a folder that `--save` wrote."""
    from transformers_mcmoe import MCMoEConfig

    name, _, ratio = folder.name.rpartition(" ")
    return (
        name,
        float(ratio),
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=MCMoEConfig(), dtype=torch.float32),
    )


def speed(options: argparse.Namespace) -> None:
    """Decode and prompts of all saved models in turns, "8 bits" among them."""
    from transformers_mcmoe.evaluation import measure_speed

    models = {(name, ratio): model for name, ratio, model in map(saved, options.saved)}
    timed = measure_speed({str(key): model for key, model in models.items()}, prompt=64, new_tokens=48, rounds=5)
    whole = timed["models"][str(("8 bits", 0.0))]
    for (name, ratio), model in models.items():
        row = {"row": name, "ratio": ratio, "removed": removed(model), "kind": "speed"}
        found = timed["models"][str((name, ratio))]
        for key in ("decode_tokens_per_second", "prefill_tokens_per_second"):
            row |= {key: found[key], key.replace("tokens_per_second", "times_8_bits"): found[key] / whole[key]}
        append(options, row)


def recover(options: argparse.Namespace, folder: Path, dense: Any, test: torch.Tensor) -> None:
    """Train a LoRA on the dense model's output, and measure with it."""
    from transformers_mcmoe.evaluation import evaluate
    from transformers_mcmoe.integrations.lora import prepare_for_training

    name, ratio, model = saved(folder)
    row = {"row": name, "ratio": ratio, "removed": removed(model), "recovered": True}
    prepare_for_training(model, gradient_checkpointing=False)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    text = tokens(options.model, options.text)
    data = text[len(text) // 2 :][: options.recover * 2 * 256].view(-1, 2, 256)
    seconds = distil(adapted, dense, data, 1e-3)
    row |= {"steps": len(data), "train_tokens": data.numel(), "train_seconds": round(seconds, 1)}
    protocol: dict[str, Any] = {"context": options.context, "limit": options.windows, "batch": 1}
    append(options, row | evaluate(adapted, test, dense, **protocol).to_dict())


def joint(options: argparse.Namespace, bits: float, dense: Any, test: torch.Tensor) -> None:
    """Widths alone, and widths, ranks and dropping in one program, at equal bytes."""
    from transformers_mcmoe import MCMoEConfig, compression_report
    from transformers_mcmoe.evaluation import evaluate

    protocol: dict[str, Any] = {"context": options.context, "limit": options.windows, "batch": 1}
    common: dict[str, Any] = {"dataset": str(options.calibration), "num_samples": options.samples}
    common |= {"seq_len": options.seq_len, "seed": options.seed}
    for name in options.joint_rows:
        started = time.monotonic()
        config = MCMoEConfig(bits, **common, **JOINT[name])
        model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config, dtype=torch.float32)
        report = compression_report(model)
        row = {"row": name, "bits": bits, "kind": "joint", "seconds": round(time.monotonic() - started, 1)}
        row |= {"bits_per_weight": report["bits_per_weight"], "compared_plans": report["compared_plans"]}
        row |= {"dropped": (report["dropped_experts"] or {"count": 0})["count"], "removed": removed(model)}
        row["factored"] = sum(rank > 0 for ranks in report["ranks"].values() for rank in ranks)
        row["total_bytes"] = report["sizes"]["total_bytes"]
        append(options, row | evaluate(model, test, dense, **protocol).to_dict())


def append(options: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Add a row to the results."""
    row = {"model": options.model.name, "test": options.test.name, "calibration": options.calibration.name}
    row |= {"kind": "quality", "threads": torch.get_num_threads()} | measured | here()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    told = ("row", "ratio", "bits", "recovered", "perplexity", "kl", "decode_tokens_per_second", "compared_plans")
    print({key: row[key] for key in told if key in row}, flush=True)


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
    parser.add_argument("--save", type=Path, help="keep the packed models in folders in here")
    parser.add_argument("--saved", type=Path, nargs="*", default=[], help="such folders, for --recover or --speed")
    parser.add_argument("--speed", action="store_true", help="time the saved models, and stop")
    parser.add_argument("--recover", type=int, default=0, help="train a LoRA on each for so many steps of 512 tokens")
    parser.add_argument("--joint", type=float, nargs="*", default=[], help="bits to compare the one program at")
    parser.add_argument("--joint-rows", nargs="*", default=list(JOINT), choices=list(JOINT))
    parser.add_argument("--text", type=Path, help="text to train that on; its second half is used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", action="store_true", help="write docs/structure.md's tables from the rows, and stop")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    if options.speed:
        speed(options)
        return
    test = tokens(options.model, options.test)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    if options.recover:
        for folder in options.saved:
            recover(options, folder, dense, test)
        return
    remember(dense)
    for bits in options.joint:
        joint(options, bits, dense, test)
    for ratio in options.ratios:
        for name in options.rows:
            measure(options, name, 0.0 if name == "8 bits" else ratio, dense, test)


def write_docs() -> None:
    """The newest row of each name, by dense model and text."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    lines: list[str] = []
    for model, test in dict.fromkeys((row["model"], row["test"]) for row in rows):
        own = [row for row in rows if (row["model"], row["test"]) == (model, test)]
        lines += _removed(model, test, own) + _joint([row for row in own if row.get("kind") == "joint"])
    replace_part("structure.md", "structure", lines[:-1])


def _removed(model: str, test: str, rows: list[dict[str, Any]]) -> list[str]:
    """One line for each share and way of removing weights."""

    def newest(kind: str, recovered: bool = False) -> dict[tuple[str, float], dict[str, Any]]:
        found = (
            row for row in rows if row.get("kind", "quality") == kind and row.get("recovered", False) == recovered
        )
        return {(row["row"], row["ratio"]): row for row in found}

    plain, trained, timed = newest("quality"), newest("quality", True), newest("speed")
    if not plain:
        return []
    one = next(iter(plain.values()))
    steps = "".join(f", {row['train_tokens']:,} tokens for LoRA" for row in list(trained.values())[:1])
    lines = [
        f"{model} (dense perplexity {one['reference_perplexity']:.2f} on {test}), calibrated on {one['calibration']} "
        f"(what is dropped on 4,096 tokens, factors on {max(row['calibration_tokens'] for row in plain.values()):,}{steps}); "
        "2 CPU cores, float32; generation in turns, as a multiple of that at 8 bits:",
        "",
        "| of the experts' weights | how | perplexity | KL | with LoRA | KL | size | generation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, row in sorted(plain.items(), key=lambda item: (item[1]["ratio"], item[1]["kl"])):
        lora, speed = trained.get(key), timed.get(key)
        cells = [f"{100 * row['removed']:.0f} % less", row["row"], f"{row['perplexity']:.2f}", _kl(row)]
        cells += ["", ""] if lora is None else [f"{lora['perplexity']:.2f}", _kl(lora)]
        cells += [
            f"{row['total_bytes'] / 1e6:.0f} MB",
            "" if speed is None else f"{speed['decode_times_8_bits']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _joint(rows: list[dict[str, Any]]) -> list[str]:
    """Plans of widths alone beside those of the one program."""
    if not rows:
        return []
    lines = [
        "One program, at equal bytes (kept: the plan with the lower KL on the kept sequences, which both figures are of):",
        "",
        "| bits | chosen among | bits per weight | perplexity | KL | widths alone, joint | dropped | with factors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    newest = {(row["bits"], row["row"]): row for row in rows}
    for (bits, name), row in sorted(newest.items(), key=lambda item: -item[0][0]):
        compared = row["compared_plans"]
        told = (
            "" if compared is None else ", ".join(f"{value:.4f}" for value in compared.values() if value is not None)
        )
        lines.append(
            f"| {bits} | {name} | {row['bits_per_weight']:.3f} | {row['perplexity']:.2f} | {_kl(row)} | {told} | "
            f"{row['dropped']} | {row['factored']} |"
        )
    return [*lines, ""]


def _kl(row: dict[str, Any]) -> str:
    error = row.get("kl_stderr")
    return f"{row['kl']:.4f}" + ("" if error is None else f" ± {error:.4f}")


if __name__ == "__main__":
    main()
