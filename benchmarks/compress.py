# SPDX-License-Identifier: Apache-2.0
"""How long compression takes, per billion weights and by stage, on random layers of real widths; and GPTQModel on the same layers.

python benchmarks/compress.py --shape Qwen3-30B-A3B --layers 1 --work FOLDER --rows default "GPTQ alone" --peer
python benchmarks/compress.py --shape Mixtral-8x7B --layers 4 --work FOLDER --samples 8 16
python benchmarks/compress.py --docs

Every row is a process of its own. With two numbers of samples the page tells what is fixed from what grows with the tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import here
from pages import replace_part
from plans import MODELS
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from transformers_mcmoe.progress import size

RESULTS = Path(__file__).parent / "results" / "compress.jsonl"
WORDS = 1000
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "preset fast": {"preset": "fast"},
    "uniform": {"allocation": "uniform"},
    # what GPTQModel does: one width, grids by range search, error feedback, nothing after it
    "GPTQ alone": {"allocation": "uniform", "expert_bits": (2,), "bits": None, "sweeps": 0, "sequential": False},
}


def build(shape: str, layers: int, folder: Path) -> None:
    """A random checkpoint of so many layers of a model's widths, layer by layer, with a tokenizer of words and a text of them."""
    config = MODELS[shape]
    config.vocab_size, config.num_hidden_layers, config.max_position_embeddings = WORDS + 3, 1, 4096
    one = folder.with_name(folder.name + "-one")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(one)
    config.num_hidden_layers, config.dtype = layers, torch.bfloat16
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        tensors = {}
        for file in one.glob("*.safetensors"):
            with safe_open(file, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118
                    if ".layers." not in name and layer:
                        continue
                    shape_of = source.get_slice(name).get_shape()
                    wide = torch.randn(shape_of, generator=generator, dtype=torch.float32).mul_(0.02)
                    dense = wide if len(shape_of) > 1 else torch.ones(shape_of)
                    tensors[name.replace(".layers.0.", f".layers.{layer}.")] = dense.to(torch.bfloat16)
        save_file(tensors, folder / f"model-{layer}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file in one.iterdir():
        file.unlink()
    one.rmdir()
    words = [f"w{n}" for n in range(WORDS)]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: 3 + n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=1 << 17)))


def inside(options: argparse.Namespace) -> None:
    """Compress in this process; prints what it took."""
    from transformers_mcmoe import MCMoEConfig, compression_report
    from transformers_mcmoe.memory import PeakMemory, anonymous_memory

    given = dict(ROWS[options.inside])
    bits = given.pop("bits", options.bits)
    if bits is None:
        given |= {"attention_bits": 4}
        bits = average_of(options.model, given["expert_bits"][0])
    if given.get("preset") != "fast":  # which says how many itself
        given["num_samples"] = options.samples[0]
    config = MCMoEConfig(bits, dataset=str(options.model / "text.txt"), seq_len=options.seq_len, **given)
    started, before = time.monotonic(), anonymous_memory()
    with PeakMemory() as peak:
        model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config, dtype=torch.bfloat16)
    report = compression_report(model)
    weights = report["sizes"]["quantized_bytes"] * 8 / report["bits_per_weight"]
    row = {
        "tool": "transformers_mcmoe",
        "seconds": round(time.monotonic() - started, 1),
        "seconds_by_stage": {stage: round(seconds, 1) for stage, seconds in report["seconds"].items()},
        "average_bits": report["average_bits"],
        "weights": round(weights),
        "calibration_tokens": report["calibration_tokens"],
        "memory": peak.bytes - before,
    }
    print(json.dumps(row))


def average_of(model: Path, bits: int) -> float:
    """The average that gives every expert one width, with attention at 4 bits."""
    from transformers_mcmoe.models.structure import Structure
    from transformers_mcmoe.plan import ExpertWidths, Plan, average_bits

    with torch.device("meta"):
        structure = Structure(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)), 4, 4)
    widths = {path: ExpertWidths.of([bits] * e.num_experts) for path, e in structure.experts.items()}
    return average_bits(structure.matrices(Plan(widths, structure.linears)))


def peer(options: argparse.Namespace, samples: int) -> dict[str, Any]:
    """GPTQModel at 2 bits on the same layers, in its own environment; its seconds are those of `quantize` alone."""
    output = options.work / "peer"
    script = Path(__file__).parent / "peers" / "with_gptqmodel.py"
    command = [sys.executable, str(script), str(options.model), str(options.model / "text.txt"), str(output)]
    command += ["--samples", str(samples), "--seq-len", str(options.seq_len), "--bits", "2", "--group-size", "128"]
    command += ["--dtype", "bfloat16", "--threads", str(os.cpu_count())]
    if options.venv is not None:
        command += ["--venv", str(options.venv)]
    subprocess.run(command, check=True)
    told = json.loads((output / "peer.json").read_text(encoding="utf-8"))
    return {
        "tool": told["peer"],
        "seconds": told["seconds"],
        "seconds_by_stage": {"quantize": told["seconds"]},
        "weights": round(told["packed_bytes"] * 8 / told["bits_per_weight"]),
        "calibration_tokens": samples * options.seq_len,
    }


def write_docs() -> None:
    """The newest row of each kind."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {(r["shape"], r["layers"], r["row"], r["calibration_tokens"]): r for r in rows}
    lines: list[str] = []
    for shape, layers in dict.fromkeys(key[:2] for key in newest):
        own = [row for key, row in newest.items() if key[:2] == (shape, layers)]
        lines += [
            f"{layers} random layer{'s' * (layers > 1)} of {shape}'s widths ({own[0]['weights'] / 1e9:.2f} B quantized weights), bfloat16; {own[0]['processor']}, "
            f"{own[0]['cpus']} cores, {own[0]['date']}.",
            "",
            "| | tokens | seconds | per billion weights | of GPTQModel's | by stage | memory |",
            "|---|---|---|---|---|---|---|",
        ]
        peers = {row["calibration_tokens"]: row["seconds"] for row in own if row["row"] == "peer"}
        for row in own:
            stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in row["seconds_by_stage"].items())
            memory = size(row["memory"]) if "memory" in row else ""
            name = row["row"] if row["tool"] == "transformers_mcmoe" else row["tool"]
            each = row["seconds"] / row["weights"] * 1e9
            rival = peers.get(row["calibration_tokens"])
            ratio = "" if rival is None else f"{row['seconds'] / rival:.2f}"
            lines.append(
                f"| {name} | {row['calibration_tokens']:,} | {row['seconds']:,.0f} | {each:,.0f} s | {ratio} | {stages} | {memory} |"
            )
        lines += ["", *_parts(own)]
    replace_part("scale.md", "compress", lines[:-1])


def _parts(rows: list[dict[str, Any]]) -> list[str]:
    """What is fixed and what grows with the tokens, of rows that were measured with two numbers of them."""
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        own = sorted((r for r in rows if r["row"] == name), key=lambda r: r["calibration_tokens"])
        if len(own) < 2:
            continue
        few, many = own[0], own[-1]
        parts = []
        for stage in many["seconds_by_stage"]:
            low, high = (r["seconds_by_stage"].get(stage, 0.0) for r in (few, many))
            each = (high - low) / (many["calibration_tokens"] - few["calibration_tokens"])
            parts.append(f"{stage} {low - each * few['calibration_tokens']:.0f} s + {1000 * each:.2f} ms per token")
        lines += [f"{name}: {'; '.join(parts)}.", ""]
    return lines


def main() -> None:
    """Append the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["Mixtral-8x7B", "Qwen3-30B-A3B"], default="Qwen3-30B-A3B")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for the random checkpoint and outputs")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--bits", type=float, default=2.54)
    parser.add_argument("--samples", type=int, nargs="*", default=[16])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--peer", action="store_true", help="also time GPTQModel")
    parser.add_argument("--venv", type=Path, help="where its virtual environment is, or is made")
    parser.add_argument("--docs", action="store_true", help="write docs/scale.md's table from the rows, and stop")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    options.model = options.work / f"{options.shape}-{options.layers}"
    if options.inside:
        inside(options)
        return
    if not options.model.is_dir():
        build(options.shape, options.layers, options.model)
    for samples in options.samples:
        for name in options.rows:
            command = [sys.executable, __file__, "--shape", options.shape, "--layers", str(options.layers)]
            command += ["--work", str(options.work), "--bits", str(options.bits), "--samples", str(samples)]
            command += ["--seq-len", str(options.seq_len), "--inside", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            append(options, name, json.loads(done.stdout.splitlines()[-1]))
        if options.peer:
            append(options, "peer", peer(options, samples))


def append(options: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Keep a row."""
    row = {"shape": options.shape, "layers": options.layers, "row": name} | found | here()
    print(json.dumps(row), flush=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
