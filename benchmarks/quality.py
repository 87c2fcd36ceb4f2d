# SPDX-License-Identifier: Apache-2.0
"""Quality at equal average bits: allocations and presets on one dense checkpoint, against the dense model.

Calibrates on one text and measures perplexity, KL divergence and top-1 agreement on another. Every row goes to
results/quality.jsonl; `--docs` writes docs/quality.md from all rows there are.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from machine import here
from quality_page import RESULTS, write_page
from released import OPTIONS, as_released
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

GENERATED = Path("generated")
# what a row's name says of a calibration on more than one text
SOURCES = {"mixed": ", mixed calibration", "generated": ", calibrated on its own text"}
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
    "MC as released": OPTIONS,
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
    from transformers_mcmoe.config import PRESETS
    from transformers_mcmoe.evaluation import evaluate
    from transformers_mcmoe.memory import PeakMemory, anonymous_memory

    row: dict[str, Any] = {
        "row": name + SOURCES.get(source(options), ""),
        "bits": bits,
        "seed": options.seed,
        "layers": options.layers,
    }
    common = {"dataset": calibration(options, dense), "num_samples": options.samples, "seq_len": options.seq_len}
    if options.layers:
        last = AutoConfig.from_pretrained(options.model).num_hidden_layers
        common["modules_to_not_convert"] = [f"model.layers.{i}" for i in range(options.layers, last)]
    # a preset may say how many sequences are read
    common = {key: value for key, value in common.items() if key not in PRESETS.get(ROWS[name].get("preset"), {})}
    config = MCMoEConfig(bits, **common, group_size=options.group_size, seed=options.seed, **ROWS[name])
    started, before = time.monotonic(), anonymous_memory()
    with PeakMemory() as peak, as_released() if ROWS[name] is OPTIONS else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config, dtype=torch.float32)
    row |= told(compression_report(model)) | {"seconds": round(time.monotonic() - started, 1)}
    row["memory"] = peak.bytes - before  # without the dense model, which is there to be compared with
    if options.save is not None:
        model.save_pretrained(options.save / f"{row['row']} {bits}")
    scores = evaluate(model.dequantize(), test, dense, context=options.context, limit=options.windows, batch=1)
    return row | scores.to_dict()


def source(options: argparse.Namespace) -> str:
    """What is calibrated on: "text", "mixed" texts, or "generated"."""
    if options.calibration == [GENERATED]:
        return "generated"
    return "mixed" if len(options.calibration) > 1 else "text"


def calibration(options: argparse.Namespace, dense: Any) -> Any:
    """The `dataset` of a row: a text, several in equal shares, or what the dense model writes."""
    from transformers_mcmoe.calibration.generated import generated_tokens

    if source(options) == "generated":
        return generated_tokens(dense, options.samples, options.seq_len, seed=options.seed)
    texts = [str(text) for text in options.calibration]
    return texts[0] if len(texts) == 1 else dict.fromkeys(texts, 1.0)


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
    row = {"row": told["peer"], "bits": None, "layers": told["layers"], "peer": told}
    row |= {name: told[name] for name in ("bits_per_weight", "seconds")}
    scores = evaluate(model, test, dense, context=options.context, limit=options.windows, batch=1)
    return row | scores.to_dict()


def remember(model: Any) -> None:
    """Keep what the dense model returns for each window: every row asks for the same ones."""
    forward, known = model.forward, dict[bytes, Any]()

    @wraps(forward)
    def run(*, input_ids: torch.Tensor, **options: Any) -> Any:
        if options.get("use_cache") is not False:  # it writes a text
            return forward(input_ids=input_ids, **options)
        key = input_ids.numpy().tobytes()
        if key not in known:
            known[key] = forward(input_ids=input_ids, **options)
        return known[key]

    model.forward = run


def tokens(model: Path, text: Path) -> torch.Tensor:
    """Token ids of a text, [n]."""
    return AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]


def main() -> None:
    """Append the rows asked for, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the dense checkpoint")
    parser.add_argument(
        "--calibration", type=Path, nargs="+", help="texts to calibrate on, in equal shares; or: generated"
    )
    parser.add_argument("--test", type=Path, help="text to measure on")
    parser.add_argument("--bits", type=float, nargs="*", default=[3.03, 2.54, 2.05])
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
    parser.add_argument(
        "--docs", action="store_true", help="write docs/quality.md and its figures from the committed rows, and stop"
    )
    options = parser.parse_args()
    if options.docs:
        write_page()
        return
    test = tokens(options.model, options.test)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    remember(dense)
    for folder in options.saved:
        _append(options, measure_saved(options, folder, dense, test))
    for folder in options.peers:
        _append(options, measure_peer(options, folder, dense, test))
    for bits in options.bits:
        for name in options.rows:
            _append(options, measure(options, name, bits, dense, test))


def _append(options: argparse.Namespace, measured: dict[str, Any]) -> None:
    row = {
        "model": options.model.name,
        "test": options.test.name,
        "calibration": " + ".join(text.name for text in options.calibration),
    }
    row |= {"group_size": options.group_size} | measured | here()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(
        f"{row['bits']} {row['row']}: {row['bits_per_weight']:.3f} bits per weight, perplexity {row['perplexity']:.2f}, KL {row['kl']:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
