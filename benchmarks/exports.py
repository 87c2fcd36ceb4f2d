# SPDX-License-Identifier: Apache-2.0
"""Perplexity of exports in llama.cpp beside that of the packed model here, on the same tokens.

python benchmarks/exports.py --model MODEL --calibration TEXT --test TEXT --row "4 bits"
python benchmarks/exports.py --wide --row "2 and 3 bits"       # a model with rows of 256, trained here for some minutes
python benchmarks/exports.py --docs

llama.cpp comes with llama-cpp-python, which this project does not install. For experts of 2 and 3 bits, which the export quantizes anew,
"here" is the dense model with the weights that the gguf package reads from the file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import here
from pages import replace_part
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from python_docs import documents, split

from transformers_mcmoe import MCMoEConfig
from transformers_mcmoe.integrations.exports import gguf as export

RESULTS = Path(__file__).parent / "results" / "exports.jsonl"
DEMO = Path(__file__).parent.parent / "examples" / "demo-mixtral"
FIXED: dict[str, Any] = {"attention_bits": 4, "shared_expert_bits": 4, "granularity": "layer"}
ROWS: dict[str, dict[str, Any]] = {
    "4 bits": FIXED | {"bits": 4.0, "expert_bits": (4,)},
    "4 bits, symmetric": FIXED | {"bits": 4.0, "expert_bits": (4,), "symmetric": True},
    "2 and 3 bits": FIXED | {"bits": 2.6, "expert_bits": (2, 3)},
}


def train(folder: Path, steps: int) -> None:
    """A Mixtral of 11 M parameters with rows of 256 and 512, on the documentation that the demo model was trained on."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=2048, rope_theta=10000.0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.tensor(tokenizer("\n".join(split(documents())[0]))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(ids) - 257, (8,)).tolist()
        batch = torch.stack([ids[start : start + 256] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: {float(loss):.3f}", flush=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def perplexity(logits_of: Any, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of every token after the first of its window."""
    total = 0.0
    for window in windows:
        logits = torch.as_tensor(logits_of(window)).float()
        total += float(F.cross_entropy(logits[:-1], window[1:], reduction="sum"))
    return math.exp(total / (windows.numel() - len(windows)))


def outputs_of(model: Any) -> Any:
    """What gives a model's logits [T, V] of a window [T]."""
    return lambda window: model(window[None]).logits[0]


def in_llama_cpp(file: Path, windows: torch.Tensor) -> float:
    """Perplexity in llama.cpp."""
    import llama_cpp

    engine = llama_cpp.Llama(
        str(file), n_ctx=windows.shape[1], n_batch=windows.shape[1], logits_all=True, verbose=False
    )

    def logits_of(window: torch.Tensor) -> Any:
        engine.reset()
        engine.eval(window.tolist())
        return engine.scores[: len(window)].copy()

    return perplexity(logits_of, windows)


def with_weights_of(file: Path, dense: str) -> Any:
    """The dense model with all matrices of a GGUF file, as the gguf package reads them."""
    import gguf
    from gguf.quants import dequantize

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    names = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
    for tensor in gguf.GGUFReader(file).tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blk" or parts[-1] != "weight":
            continue
        layer = model.model.layers[int(parts[1])]
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        experts = layer.mlp.experts
        if parts[2] in names:
            own = getattr(layer.self_attn, names[parts[2]]).weight
            if parts[2] in ("attn_q", "attn_k"):  # neighbours are rotated together in the file
                heads = model.config.num_attention_heads if parts[2] == "attn_q" else model.config.num_key_value_heads
                weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            own.data.copy_(weight)
        elif parts[2] == "ffn_down_exps":
            experts.down_proj.data.copy_(weight)
        elif parts[2] in ("ffn_gate_exps", "ffn_up_exps"):
            inner = experts.down_proj.shape[2]
            rows = slice(0, inner) if parts[2] == "ffn_gate_exps" else slice(inner, None)
            experts.gate_up_proj.data[:, rows] = weight
    return model


def measure(options: argparse.Namespace, model: str, calibration: Any, test: str) -> dict[str, Any]:
    """Compress, export, and run both."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor(tokenizer(test)["input_ids"])
    count, step = options.windows, len(ids) // options.windows
    windows = torch.stack([ids[n * step : n * step + options.length] for n in range(count)])
    config = MCMoEConfig(dataset=calibration, num_samples=options.samples, seq_len=options.length, **ROWS[options.row])
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    row: dict[str, Any] = {"dense": perplexity(outputs_of(dense), windows)}
    del dense
    with tempfile.TemporaryDirectory() as folder:
        packed = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32).eval()
        packed.save_pretrained(f"{folder}/packed")
        tokenizer.save_pretrained(f"{folder}/packed")
        row["packed"] = perplexity(outputs_of(packed), windows)
        del packed
        file = Path(folder) / "model.gguf"
        anew = options.row == "2 and 3 bits"
        given = {"dense": model, "dataset": calibration} if anew else {}
        export.export(f"{folder}/packed", file, "smollm" if "smol" in model else None, **given)
        row["bytes"] = file.stat().st_size
        row["here"] = row["packed"]
        if anew:
            read = with_weights_of(file, model)
            row["here"] = perplexity(outputs_of(read), windows)
        row["llama.cpp"] = in_llama_cpp(file, windows)
    return row


def write_docs() -> None:
    """The newest row of each kind."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {(r["model"], r["row"]): r for r in rows}
    lines = [
        "| model | export | dense | packed | weights of the file, here | in llama.cpp | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, name), row in newest.items():
        figures = " | ".join(f"{row[key]:.3f}" for key in ("dense", "packed", "here", "llama.cpp"))
        lines.append(f"| {model} | {name} | {figures} | {100 * (row['llama.cpp'] / row['here'] - 1):+.2f} % |")
    one, texts = next(iter(newest.values())), dict.fromkeys(row["windows"] for row in newest.values())
    lines += [
        "",
        f"Perplexity, {' and '.join(texts)}; {one['processor']}, {one['date']}; float32 here, llama.cpp's own precision there.",
    ]
    replace_part("serving.md", "exports", lines)


def main() -> None:
    """Append the row asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--wide", action="store_true", help="train a small model with rows of 256 first")
    parser.add_argument("--steps", type=int, default=400, help="of that training")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--row", choices=ROWS, default="4 bits")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--docs", action="store_true", help="write docs/serving.md's table from the rows, and stop")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.wide:
            train(Path(folder), options.steps)
            texts, held_out = split(documents())
            row = measure(options, folder, texts, "\n".join(held_out))
            name, source = "Mixtral, 3 layers of 256", "Python's documentation, held out"
        else:
            test = options.test.read_text(encoding="utf-8")
            row = measure(options, options.model, str(options.calibration), test)
            name, source = Path(options.model).name, options.test.name
    row = {
        "model": name,
        "row": options.row,
        "windows": f"{options.windows} windows of {options.length} tokens of {source}",
    } | row
    row |= here()
    print(json.dumps(row))
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
