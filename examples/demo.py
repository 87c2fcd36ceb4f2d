# SPDX-License-Identifier: Apache-2.0
"""The whole way on the embedded demo model: compress, measure, save, reload, generate.

`make demo` runs this. The model is a 4.4 M-parameter Mixtral trained on the Python standard library's documentation
(train_demo_model.py); it is calibrated on the part of that documentation it was trained on and measured on the part
that it never saw.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import transformers
from python_docs import documents, split
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe import MCMoEConfig, compression_report
from transformers_mcmoe.evaluation import Evaluation, evaluate

MODEL = Path(__file__).parent / "demo-mixtral"
BITS = 2.54
WINDOW = 256
SAMPLES = 128
PROMPT = "Return a list of"
# the default comes last: it is the one that is saved and reloaded
ROWS = {
    "uniform, nearest": {"allocation": "uniform", "rounding": "nearest"},
    "PMQ, nearest": {"rounding": "nearest"},
    "uniform, GPTQ": {"allocation": "uniform"},
    "PMQ, GPTQ": {},
}

console = Console(width=110)


def windows(tokenizer, texts: list[str]) -> torch.Tensor:
    """All whole windows of the joined texts, [N, WINDOW]."""
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


def main() -> None:
    """Print the table, the check of the reloaded copy, and a sample."""
    transformers.logging.disable_progress_bar()
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train, held_out = split(documents())
    test = windows(tokenizer, held_out)
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    console.print(
        f"Compressing {MODEL.name} to {BITS} average bits: calibration on {SAMPLES} x {WINDOW} tokens, "
        f"measured on {test.numel()} held-out tokens."
    )
    table = Table()
    for name in ("", "perplexity", "KL to dense", "average bits", "bits per weight", "bytes", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    size = sum(p.numel() for p in dense.parameters()) * 2  # bytes in bf16, as all sizes here
    _row(table, "dense", evaluate(dense, test, dense), "16", "16", size, 0.0)
    for name, options in ROWS.items():
        begin = time.monotonic()
        config = MCMoEConfig(BITS, dataset=train, num_samples=SAMPLES, seq_len=WINDOW, **options)
        model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=torch.float32)
        seconds = time.monotonic() - begin
        report = compression_report(model)
        average, per_weight = f"{report['average_bits']:.3f}", f"{report['bits_per_weight']:.3f}"
        # counted with 2 bytes for what stays dense, as it is saved in bf16
        rest = sum(p.numel() for p in model.parameters() if p.dtype != torch.uint8)
        size = report["sizes"]["quantized_bytes"] + 2 * rest
        _row(table, name, evaluate(model, test, dense), average, per_weight, size, seconds)
    console.print(table)
    _reload(model, tokenizer, test[:4])
    console.print(f"Done in {time.monotonic() - started:.0f} s.")


def _row(table: Table, name: str, score: Evaluation, average: str, per_weight: str, size: int, seconds: float) -> None:
    kl = f"{score.kl:.4f}"
    console.print(f"{name}: perplexity {score.perplexity:.2f}, {seconds:.0f} s")
    table.add_row(name, f"{score.perplexity:.2f}", kl, average, per_weight, f"{size:,}", f"{seconds:.1f}")


def _reload(model, tokenizer, tokens: torch.Tensor) -> None:
    """Save the model, load it again, compare the logits, generate a sample."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        same = torch.equal(model(tokens).logits, reloaded(tokens).logits)
        console.print(f"Reloaded copy: {'identical logits' if same else 'LOGITS DIFFER'}.")
        if not same:
            raise SystemExit(1)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        output = reloaded.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
        console.print(f"Sample: {tokenizer.decode(output[0], skip_special_tokens=True)!r}", highlight=False)


if __name__ == "__main__":
    main()
