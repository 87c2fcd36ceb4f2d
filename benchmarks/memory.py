# SPDX-License-Identifier: Apache-2.0
"""Peak memory of streamed compression: a random Mixtral of 10 and of 30 layers, more than 2 GB in bf16.

Anonymous resident memory above what importing the libraries takes, sampled in the compressing process, against the
bound of docs/streaming.md: 4 decoder layers + embeddings + the documented constant. Rows go to results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from machine import here

RESULTS = Path(__file__).parent / "results" / "memory.jsonl"
SHAPE = {
    "vocab_size": 48000,
    "hidden_size": 1024,
    "intermediate_size": 3584,  # Mixtral's ratio of 3.5
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}


def build(layers: int, folder: Path) -> None:
    """Write a random checkpoint, one layer a shard, without ever holding more than a layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(num_hidden_layers=layers, dtype="bfloat16", **SHAPE)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    small = MixtralConfig(num_hidden_layers=1, dtype="bfloat16", **SHAPE)
    template = AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16)
    template.save_pretrained(folder / "template")
    from safetensors.torch import load_file

    tensors = load_file(folder / "template" / "model.safetensors")
    weight_map = {}
    for index in range(layers):
        layer = {k.replace("layers.0.", f"layers.{index}."): v for k, v in tensors.items() if ".layers.0." in k}
        if index == 0:
            layer |= {k: v for k, v in tensors.items() if ".layers." not in k}
        file = f"model-{index + 1:05d}-of-{layers:05d}.safetensors"
        save_file(layer, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(layer, file)
    index_file = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def measure(folder: Path, samples: int, seq_len: int, allocation: str) -> dict[str, Any]:
    """Compress in this process; returns bytes and seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    from transformers_mcmoe import MCMoEConfig, compression_report
    from transformers_mcmoe.memory import anonymous_memory
    from transformers_mcmoe.pipeline import OVERHEAD

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, SHAPE["vocab_size"], (samples, seq_len), generator=generator)
    AutoModelForCausalLM  # noqa: B018  loads the module before the baseline is taken
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    baseline = peak = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_memory())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    config = MCMoEConfig(2.54, dataset=tokens, num_samples=samples, allocation=allocation)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    seconds = time.monotonic() - started
    after = anonymous_memory()
    done.set()
    watcher.join()
    report = compression_report(model)
    layer = model.config.hidden_size * (4 * model.config.hidden_size + 3 * 8 * model.config.intermediate_size + 8 + 2)
    embeddings = 2 * model.config.hidden_size * model.config.vocab_size
    return {
        "baseline": baseline,
        "peak_above_baseline": peak - baseline,
        "after_load_above_baseline": after - baseline,
        "layer_bytes": 2 * layer,
        "embedding_bytes": 2 * embeddings,
        "constant_bytes": OVERHEAD,
        "bound": 4 * 2 * layer + 2 * embeddings + OVERHEAD,
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "seconds": round(seconds, 1),
        "seconds_by_stage": {stage: round(s, 1) for stage, s in report["seconds"].items()},
        "average_bits": round(report["average_bits"], 4),
    }


def main() -> None:
    """Run each depth in a process of its own, append a row each, and check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 30])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--allocation", default="pmq", help="uniform is quicker: it rounds at one width, not at three")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.samples, options.seq_len, options.allocation)))
        return
    rows = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            build(layers, Path(folder))
            command = [sys.executable, __file__, "--measure", folder]
            command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
            command += ["--allocation", options.allocation]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        row |= {
            "layers": layers,
            "allocation": options.allocation,
            "tokens": options.samples * options.seq_len,
            **here(),
        }
        rows.append(row)
        print(
            f"{layers} layers, {row['checkpoint_bytes'] / 1e9:.2f} GB: peak {row['peak_above_baseline'] / 1e6:.0f} MB, "
            f"bound {row['bound'] / 1e6:.0f} MB, {row['seconds']:.0f} s"
        )
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    growth = rows[-1]["peak_above_baseline"] / rows[0]["peak_above_baseline"] - 1
    print(f"growth from {rows[0]['layers']} to {rows[-1]['layers']} layers: {100 * growth:.1f} %")
    if any(row["peak_above_baseline"] > row["bound"] for row in rows) or (len(rows) > 1 and growth >= 0.1):
        raise SystemExit("the memory bound does not hold")


if __name__ == "__main__":
    main()
