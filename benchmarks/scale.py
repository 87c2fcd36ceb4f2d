# SPDX-License-Identifier: Apache-2.0
"""Compressions by several processes: do they write what one writes, and what does it take? And what larger models would take.

python benchmarks/scale.py --model FOLDER --calibration TEXT --work FOLDER   # runs, into results/scale.jsonl
python benchmarks/scale.py --predict                                         # predictions on this machine, some minutes
python benchmarks/scale.py --docs                                            # the tables of docs/scale.md
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import here
from pages import replace_part
from plans import MODELS
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

from transformers_mcmoe import MCMoEConfig
from transformers_mcmoe.models.structure import Structure
from transformers_mcmoe.pipeline.preview import preview
from transformers_mcmoe.plan import Plan
from transformers_mcmoe.progress import duration, size
from transformers_mcmoe.quantization.packing import WIDTHS, packed_shape, unpack

RESULTS = Path(__file__).parent / "results" / "scale.jsonl"
# processes and threads of each; the first is what the others are compared with
RUNS = ((1, 1), (2, 1), (1, 2))
LARGE: dict[str, Any] = {
    "Mixtral-8x22B": MODELS["Mixtral-8x22B"],
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=4096,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=1536,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    "DeepSeek-V3": DeepseekV3Config(),
}
PROCESSES = (1, 8, 64)
GROUP_SIZE = 128


def run(options: argparse.Namespace, processes: int, threads: int) -> Path:
    """Compress by so many processes; appends the row and returns the output."""
    output = options.work / f"{processes} x {threads}"
    shutil.rmtree(output, ignore_errors=True)
    told = ["-m", "transformers_mcmoe", "compress", str(options.model), "--output", str(output)]
    told += ["--dataset", str(options.calibration), "--bits", str(options.bits), "--world-size", str(processes)]
    told += ["--num-samples", str(options.samples), "--seq-len", str(options.seq_len), "--dtype", "float32"]
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launch += ["--no-python", sys.executable]
    started = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([*launch, *told, *options.options], check=True, env=environment, stdout=subprocess.DEVNULL)
    report = json.loads((output / "mcmoe_report.json").read_text(encoding="utf-8"))
    row = {
        "kind": "run",
        "model": options.model.name,
        "processes": processes,
        "threads": threads,
        "options": options.options,
        "calibration_tokens": report["calibration_tokens"],
        "average_bits": report["average_bits"],
        "seconds": round(time.monotonic() - started, 1),
        "seconds_by_stage": {stage: round(seconds, 1) for stage, seconds in report["seconds"].items()},
    }
    first = options.work / "{} x {}".format(*RUNS[0])
    if first.is_dir():
        row |= compared(first, output)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model), dtype=torch.float32)
    torch.set_num_threads(threads)
    config = MCMoEConfig(options.bits, num_samples=options.samples, seq_len=options.seq_len)
    looked = preview(empty, config, dtype=torch.float32, world_size=processes)
    row |= {"guessed": looked.seconds, "network_bytes": looked.network_bytes} | here()
    append(row)
    return output


def compared(first: Path, output: Path) -> dict[str, Any]:
    """How many codes differ between two outputs, and whether their plans do."""
    plans = [
        json.loads((folder / "config.json").read_text())["quantization_config"]["plan"] for folder in (first, output)
    ]
    found: dict[str, Any] = {
        "same_plan": plans[0] == plans[1],
        "codes": 0,
        "differing_codes": None,
        "same_bytes": True,
    }
    tensors = [
        {key: x for file in sorted(folder.glob("*.safetensors")) for key, x in load_file(file).items()}
        for folder in (first, output)
    ]
    found["same_bytes"] = all(torch.equal(x, tensors[1][key]) for key, x in tensors[0].items())
    if not found["same_plan"]:
        return found
    with torch.device("meta"):
        structure = Structure(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(first)))
    differing = 0
    shapes = {(m.out_features, m.in_features) for m in structure.matrices(Plan.from_dict(plans[0]))}
    for key, x in tensors[0].items():
        if x.dtype != torch.uint8 or x.dim() != 3:
            continue
        columns, bits = next(
            (columns, bits)
            for rows, columns in shapes
            for bits in WIDTHS
            if packed_shape(rows, columns, bits, GROUP_SIZE) == tuple(x.shape)
        )
        differing += int((unpack(x, bits, columns).codes != unpack(tensors[1][key], bits, columns).codes).sum())
        found["codes"] += x.shape[0] * columns
    return found | {"differing_codes": differing}


def predict() -> None:
    """What large models would take, by the rates of this machine."""
    for name, config in LARGE.items():
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for processes in PROCESSES:
            found = preview(empty, MCMoEConfig(2.54), dtype=torch.bfloat16, world_size=processes)
            kept = (
                "average_bits",
                "total_bytes",
                "dense_bytes",
                "memory_bytes",
                "disk_bytes",
                "network_bytes",
                "seconds",
            )
            row = {"kind": "prediction", "model": name, "processes": processes, "threads": torch.get_num_threads()}
            append(row | {key: vars(found)[key] for key in kept} | here())


def append(row: dict[str, Any]) -> None:
    """Keep a row."""
    print(json.dumps(row), flush=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_docs() -> None:
    """The newest rows of each kind."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    runs = {(r["model"], r["processes"], r["threads"]): r for r in rows if r["kind"] == "run"}
    lines: list[str] = []
    for model in dict.fromkeys(key[0] for key in runs):
        own = [row for key, row in runs.items() if key[0] == model]
        base = own[0]
        lines += [
            f"{model}, {base['average_bits']:.2f} average bits, {base['calibration_tokens']:,} calibration tokens, float32; {base['processor']}, "
            f"{base['cpus']} cores, {base['date']}. Codes are compared with those of the first row.",
            "",
            "| processes x threads | allocate | guessed | quantize | guessed | all | of the first | same plan | codes that differ | same bytes |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in own:
            took, guessed = row["seconds_by_stage"], row["guessed"]
            stages = [f"{part[stage]:.0f} s" for stage in ("allocate", "quantize") for part in (took, guessed)]
            codes = "" if row.get("differing_codes") is None else f"{row['differing_codes']:,} of {row['codes']:,}"
            cells = [f"{row['processes']} x {row['threads']}", *stages, f"{row['seconds']:.0f} s"]
            cells += [
                f"{row['seconds'] / base['seconds']:.2f}",
                *(["yes" if row["same_plan"] else "no"] if row is not base else [""]),
            ]
            cells += ["" if row is base else codes, "" if row is base else "yes" if row["same_bytes"] else "no"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    replace_part("scale.md", "runs", lines[:-1])
    large = {(r["model"], r["processes"]): r for r in rows if r["kind"] == "prediction"}
    one = next(iter(large.values()))
    lines = [
        f"`--bits 2.54`, 128 x 2,048 calibration tokens, bfloat16, every process on a machine like this one ({one['processor']}, {one['cpus']} cores, "
        f"{one['date']}).",
        "",
        "| model | dense | packed | processes | time | memory, each | work folders, all | network, to each |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, processes), row in large.items():
        sizes = [size(row[key]) for key in ("dense_bytes", "total_bytes")]
        rest = [size(row[key]) for key in ("memory_bytes", "disk_bytes")]
        network = size(row["network_bytes"]) if processes > 1 else ""
        cells = [model, *sizes, str(processes), duration(sum(row["seconds"].values())), *rest, network]
        lines.append(f"| {' | '.join(cells)} |")
    replace_part("scale.md", "predictions", lines)


def main() -> None:
    """Run, predict, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the dense checkpoint")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on")
    parser.add_argument("--work", type=Path, help="folder for outputs")
    parser.add_argument("--bits", type=float, default=2.54)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--runs", nargs="*", default=[f"{p}x{t}" for p, t in RUNS], help="processes x threads of each")
    parser.add_argument("--predict", action="store_true", help="predict what large models take, and stop")
    parser.add_argument("--docs", action="store_true", help="write docs/scale.md's tables from the rows, and stop")
    parser.add_argument("options", nargs="*", help="further options of `mcmoe compress`, behind --")
    options = parser.parse_args()
    if options.docs:
        write_docs()
    elif options.predict:
        predict()
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        for name in options.runs:
            run(options, *map(int, name.split("x")))


if __name__ == "__main__":
    main()
