# SPDX-License-Identifier: Apache-2.0
"""LoRA on packed models: speed and memory beside dense bf16 LoRA, a fine-tune on a new domain, recovery after compression.

`speed` runs both models in one process, in turns; `memory` each in a process of its own; `demo` the two examples;
`recover` any packed model with its dense checkpoint. Rows go to results/lora.jsonl; `--docs` writes docs/lora.md's tables.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from machine import here
from pages import replace_part
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_mcmoe
from transformers_mcmoe.evaluation import evaluate
from transformers_mcmoe.integrations.lora import initialize_lora, prepare_for_training
from transformers_mcmoe.memory import anonymous_memory, return_free_memory

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "lora.jsonl"
RANK = 16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# torch keeps what it compiled for products in bf16, by shape: with experts a shape for each number of tokens
NO_CACHES = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
# the dense model's experts as PEFT itself names them
EXPERTS = {"packed": ["experts"], "dense bf16": ["w1", "w2", "w3"]}


def adapted(folder: Path, kind: str, layers: int | None, checkpointing: bool = False) -> Any:
    """A model with LoRA on attention and experts; with `layers`, its first ones only."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if layers:
        del model.model.layers[layers:]
        model.config.num_hidden_layers = layers
    if kind == "packed":
        prepare_for_training(model, checkpointing)
    elif checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    # PEFT doubles the rank where it stacks gate and up
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION + EXPERTS[kind]))


def step(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward pass."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


def speed(options: argparse.Namespace) -> None:
    """Tokens per second while training, and while decoding with an adapter, in turns."""
    folders = {"packed": options.packed, "dense bf16": options.dense}
    models = {kind: adapted(folder, kind, options.layers) for kind, folder in folders.items()}
    ids = torch.randint(3, 20000, (options.tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    ways: dict[str, Any] = {
        "training": lambda kind: (ids.numel(), lambda: step(models[kind].train(), ids)),
        "decode, adapter on": lambda kind: (options.new, lambda: decode(models[kind], ids[:1, :16], options.new)),
    }
    found: dict[tuple[str, str], list[float]] = {}
    for way, make in ways.items():
        for turn in range(options.rounds + 1):
            for kind in models:
                count, run = make(kind)
                started = time.perf_counter()
                run()
                if turn:  # the first turn repacks and fills caches
                    found.setdefault((way, kind), []).append(count / (time.perf_counter() - started))
    base = []
    for _ in range(options.rounds + 1):
        with models["packed"].disable_adapter():
            decode(models["packed"], ids[:1, :16], 2)  # the experts are repacked as one
            started = time.perf_counter()
            decode(models["packed"], ids[:1, :16], options.new)
            base.append(options.new / (time.perf_counter() - started))
    found["decode, adapter off", "packed"] = base[1:]
    for (way, kind), values in found.items():
        own = statistics.median(values)
        row = {"row": "speed", "way": way, "kind": kind, "tokens_per_s": round(own, 2), "rounds": len(values)}
        if (way, "dense bf16") in found:
            row["times_dense"] = round(own / statistics.median(found[way, "dense bf16"]), 3)
        write(options, row | {"layers": options.layers, "tokens": ids.numel(), "rank": RANK})


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, new: int) -> None:
    """Greedy generation of one sequence."""
    model.eval().generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def memory(options: argparse.Namespace) -> None:
    """Anonymous memory above what the libraries take: resident beside activations, and the peak of two steps."""
    if options.kind is None:
        for kind, caches in itertools.product(EXPERTS, (True, False)):
            command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
            env = os.environ | ({} if caches else NO_CACHES)
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            write(options, json.loads(done.stdout.splitlines()[-1]) | {"caches": caches})
        return
    before = anonymous_memory()
    folder = options.packed if options.kind == "packed" else options.dense
    model = adapted(folder, options.kind, options.layers, checkpointing=True).train()
    ids = torch.randint(3, 20000, (options.tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    step(model, ids[:1])
    step(model, ids)
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.003):
            peak[0] = max(peak[0], anonymous_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    step(model, ids)
    stop.set()
    thread.join()
    gc.collect()
    return_free_memory()
    sizes = {"packed": 0, "adapters": 0, "other": 0}
    for name, parameter in model.named_parameters():
        part = "adapters" if "lora_" in name else "packed" if parameter.dtype == torch.uint8 else "other"
        sizes[part] += parameter.nbytes
    blocks = sum(b.nbytes for m in model.modules() if isinstance(b := getattr(m, "_blocks", None), torch.Tensor))
    row = {"row": "memory", "kind": options.kind, "resident": anonymous_memory() - before, "peak": peak[0] - before}
    row |= {f"{part}_bytes": size for part, size in sizes.items()} | {"kernel_copy_bytes": blocks}
    print(json.dumps(row | {"layers": options.layers, "tokens": ids.numel(), "rank": RANK}))


def demo(options: argparse.Namespace) -> None:
    """The examples on the embedded demo model."""
    sys.path.insert(0, str(ROOT.parent / "examples"))
    from finetune_lora import finetune
    from lora_training import BITS, packed_demo
    from recover_with_lora import recover

    packed = packed_demo(options.packed)
    common = {"bits": BITS, "rank": RANK, "steps": options.steps}
    write(options, {"row": "new domain"} | common | finetune(packed, options.steps))
    for distill, start in ((False, True), (True, True), (False, False)):
        row = recover(packed, options.steps, distill, start)
        write(options, {"row": "recovery", "model": "demo", "distill": distill, "mcmoe": start} | common | row)


def recover_any(options: argparse.Namespace) -> None:
    """Initialisation from the quantization error, then training on general text, measured on another."""
    tokenizer = AutoTokenizer.from_pretrained(options.dense)

    def ids(path: Path) -> torch.Tensor:
        return tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]

    test, text = ids(options.test), ids(options.text)
    dense = AutoModelForCausalLM.from_pretrained(options.dense, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(options.packed, dtype=torch.bfloat16)
    protocol: dict[str, Any] = {"context": options.context, "limit": options.windows, "batch": 1}
    bits = round(transformers_mcmoe.compression_report(model)["config"]["average_bits"], 2)
    scores = {"packed": evaluate(model, test, dense, **protocol)}
    prepare_for_training(model, gradient_checkpointing=False)
    if options.adapter is not None and (options.adapter / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    else:
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights="mcmoe")
        model = get_peft_model(model, config)
        initialize_lora(model, options.dense, str(options.text), num_samples=16, seq_len=1024)
        if options.adapter is not None:
            model.save_pretrained(options.adapter)
    scores["started"] = evaluate(model, test, dense, **protocol)
    # the training text begins where the calibration samples of the start cannot reach: its second half
    data = text[len(text) // 2 :][: options.steps * options.batch * 256].view(-1, options.batch, 256)
    seconds = distil(model, dense, data, options.rate)
    scores["recovered"] = evaluate(model, test, dense, **protocol)
    row: dict[str, Any] = {
        "row": "recovery",
        "model": options.dense.name,
        "distill": True,
        "mcmoe": True,
        "rank": RANK,
    }
    row |= {"bits": bits, "steps": len(data)}
    row |= {"train_tokens": data.numel(), "test_tokens": scores["packed"].tokens, "seconds": round(seconds, 1)}
    row |= {"dense": scores["packed"].reference_perplexity}
    for name, score in scores.items():
        row |= {name: score.perplexity, f"{name}_kl": score.kl}
    row["gap_closed"] = (row["packed"] - row["recovered"]) / (row["packed"] - row["dense"])
    write(options, row)


def distil(model: Any, dense: Any, data: torch.Tensor, rate: float) -> float:
    """AdamW on the KL divergence to the dense model, a batch [B, T] a step; returns seconds."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(data), pct_start=0.1)
    started = time.monotonic()
    for i, ids in enumerate(data):
        with torch.no_grad():
            target = functional.log_softmax(dense(ids, use_cache=False).logits.float(), -1)
        own = functional.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)
        loss = functional.kl_div(own, target, reduction="none", log_target=True).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {i + 1} of {len(data)}: KL {loss.item():.4f}", flush=True)
    return time.monotonic() - started


def write(options: argparse.Namespace, row: dict[str, Any]) -> None:
    """Append a row with what it was measured on."""
    info = transformers_mcmoe.backend_info()
    row |= {"threads": torch.get_num_threads(), "backend": info["instruction_set"]} | here()
    row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def write_docs() -> None:
    """Write the tables of docs/lora.md: the last row of each kind."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]

    def last(*keys: str, **wanted: Any) -> list[dict[str, Any]]:
        picked = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
        return list({tuple(row.get(key) for key in keys): row for row in picked}.values())

    domains = last("bits", row="new domain")
    recoveries = last("model", "bits", "distill", "mcmoe", row="recovery")
    speeds, memory = last("way", "kind", row="speed"), last("kind", "caches", row="memory")
    lines = _domain_table(domains) + _recovery_table(recoveries) + _speed_table(speeds) + _memory_table(memory)
    replace_part("lora.md", "benchmarks/lora.py", lines)


def _measured_on(rows: list[dict[str, Any]]) -> str:
    """Machines of the rows, and how busy they were."""
    processors = sorted(
        {f"{r['processor']}, {r['cpus']} cores, {r['threads']} thread, kernels {r['backend']}" for r in rows}
    )
    loads = [r["load"] for r in rows]
    return f"{'; '.join(processors)}; load {min(loads)} to {max(loads)}, {max(r['date'] for r in rows)}."


def _domain_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## A new domain", "", f"The demo model knows Python's documentation; LoRA of rank {RANK} on all linear layers and experts learns Python's code "
             f"(`examples/finetune_lora.py`). Perplexity on files that training never saw. {_measured_on(rows)}", ""]  # fmt: skip
    lines += [
        "| packed at | trained on | measured on | dense | packed | packed + LoRA | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = " | ".join(f"{r[name]:.2f}" for name in ("dense", "packed", "adapted"))
        lines.append(
            f"| {r['bits']} bits | {r['train_tokens']:,} tokens | {r['test_tokens']:,} tokens | {cells} | {r['seconds'] / 60:.1f} min |"
        )
    return [*lines, ""]


def _recovery_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Recovery after compression", "", f"LoRA of rank {RANK} on all linear layers and experts, then trained on general text. Perplexity / KL divergence to the dense "
             "model on text that neither calibration nor training saw: the demo model on Python's documentation, smolmoe (373 M, Mixtral's "
             f"architecture) on WikiText-2's test set in windows of 1,024 tokens. {_measured_on(rows)}", ""]  # fmt: skip
    lines += [
        "| model, bits | start | loss | trained on | dense | packed | started | trained | gap closed | training |"
    ]
    lines.append("|---" * 10 + "|")
    for r in rows:
        cells = [f"{r[n]:.2f} / {r[n + '_kl']:.4f}" if n in r else "" for n in ("packed", "started", "recovered")]
        how = ["quantization error" if r["mcmoe"] else "zero", "KL to dense" if r["distill"] else "text"]
        lines.append(f"| {r['model']}, {r['bits']} | {how[0]} | {how[1]} | {r['train_tokens']:,} tokens | {r['dense']:.2f} | "
                     f"{' | '.join(cells)} | {100 * r['gap_closed']:.0f} % | {r['seconds'] / 60:.1f} min |")  # fmt: skip
    return [*lines, "", "Gap closed: of the perplexity that compression cost.", ""]


def _speed_table(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]
    lines = ["## Speed", "", f"The first {first['layers']} layers of smolmoe at 2.54 bits, LoRA of rank {first['rank']} on attention and experts, beside the dense "
             f"model in bf16 with the same adapters, in turns, medians of {first['rounds']} rounds. Training: forward and backward pass of "
             f"{first['tokens']:,} tokens in sequences of 256; decoding: one sequence. {_measured_on(rows)}", ""]  # fmt: skip
    lines += ["| | packed, tokens/s | dense bf16, tokens/s | packed / dense |", "|---|---|---|---|"]
    ways: dict[str, dict[str, float]] = {}
    for r in rows:
        ways.setdefault(r["way"], {})[r["kind"]] = r["tokens_per_s"]
    for way, of in ways.items():
        dense = of.get("dense bf16")
        cells = (f"{dense:.1f}", f"{of['packed'] / dense:.2f}") if dense else ("", "")
        lines.append(f"| {way} | {of['packed']:.1f} | {cells[0]} | {cells[1]} |")
    return [*lines, ""]


def _memory_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Memory", "", f"All of smolmoe, training with gradient checkpointing, {rows[0]['tokens']:,} tokens a step, each model in a process of its own. Anonymous "
             "memory above that of the imported libraries, MB: after a step, and the most during one. The sizes on the right count what is "
             "mapped from the file, too, and so is not anonymous: packed bytes, and weights that loading does not convert. The rest: all that "
             "is not packed. oneDNN, which multiplies in bf16 for torch, keeps "
             "up to 1,024 compiled products, and experts meet a new number of tokens in each call; "
             f"`{' '.join(f'{k}={v}' for k, v in NO_CACHES.items())}` in the environment switches that off. {_measured_on(rows)}", ""]  # fmt: skip
    lines += [
        "| | oneDNN's caches | resident | peak | packed bytes | kernels' copy | adapters | the rest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        names = ("resident", "peak", "packed_bytes", "kernel_copy_bytes", "adapters_bytes", "other_bytes")
        cells = " | ".join(f"{r[name] / 1e6:.0f}" for name in names)
        lines.append(f"| {r['kind']} | {'on' if r['caches'] else 'off'} | {cells} |")
    return [*lines, ""]


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["speed", "memory", "demo", "recover"])
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--layers", type=int, help="the first layers only")
    parser.add_argument("--tokens", type=int, default=2048, help="of a training step")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--text", type=Path, help="general text to calibrate the start and to train on")
    parser.add_argument("--test", type=Path, help="text to measure on")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--adapter", type=Path, help="keep the started adapter here; used again if it is there")
    parser.add_argument("--kind", choices=list(EXPERTS), help=argparse.SUPPRESS)
    parser.add_argument("--docs", action="store_true", help="write docs/lora.md from the rows, and stop")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    if options.part is None:
        parser.error("say which part to run, or --docs")
    torch.set_num_threads(options.threads)
    parts = {"speed": speed, "memory": memory, "demo": demo, "recover": recover_any}
    parts[options.part](options)


if __name__ == "__main__":
    main()
