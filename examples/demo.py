# SPDX-License-Identifier: Apache-2.0
"""The whole way on the embedded demo model: compress, measure, save, reload, generate.

`make demo` runs this. The model is a 4.4 M-parameter Mixtral trained on the Python standard library's documentation; it is
calibrated on the part of that documentation it was trained on and measured on the part that it never saw.
"""

import tempfile
import time
from pathlib import Path

import torch
import transformers
from python_docs import documents, split, windows
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe import MCMoEConfig, compression_report
from transformers_mcmoe.evaluation import evaluate

MODEL = Path(__file__).parent / "demo-mixtral"
BITS, WINDOW, SAMPLES = 2.54, 256, 128
# the default comes last: it is the one that is saved and reloaded
ROWS = {
    "uniform, nearest": {"allocation": "uniform", "rounding": "nearest"},
    "PMQ, nearest": {"rounding": "nearest"},
    "uniform, GPTQ": {"allocation": "uniform"},
    "PMQ, GPTQ": {},
}
console = Console(width=110)


def main() -> None:
    """Print the table, the check of the reloaded copy, and a sample."""
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train, held_out = split(documents())
    test = windows(tokenizer, held_out, WINDOW)
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    console.print(
        f"{MODEL.name} at {BITS} bits: {SAMPLES * WINDOW} tokens to calibrate, {test.numel()} others to measure"
    )
    table = Table("", "perplexity", "KL to dense", "average bits", "bits per weight", "bytes", "seconds")
    size = 2 * sum(p.numel() for p in dense.parameters())  # in bf16, as all sizes here
    score = evaluate(dense, test)
    table.add_row("dense", f"{score.perplexity:.2f}", "0", "16", "16", f"{size:,}", "")
    for name, options in ROWS.items():
        begin = time.monotonic()
        config = MCMoEConfig(BITS, dataset=train, num_samples=SAMPLES, seq_len=WINDOW, **options)
        model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=torch.float32)
        seconds = time.monotonic() - begin
        report = compression_report(model)
        kept = sum(p.numel() for p in model.parameters() if p.dtype != torch.uint8)
        size = report["sizes"]["quantized_bytes"] + 2 * kept
        bits = (f"{report[name]:.3f}" for name in ("average_bits", "bits_per_weight"))
        score = evaluate(model, test, dense)
        console.print(f"{name}: perplexity {score.perplexity:.2f}")
        table.add_row(name, f"{score.perplexity:.2f}", f"{score.kl:.4f}", *bits, f"{size:,}", f"{seconds:.1f}")
    console.print(table)
    _reload(model, tokenizer, test[:4])


def _reload(model, tokenizer, tokens: torch.Tensor) -> None:
    """Save the model, load it again, compare the logits, generate a sample."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        same = torch.equal(model(tokens).logits, reloaded(tokens).logits)
        console.print(f"Reloaded copy: {'identical' if same else 'OTHER'} logits.")
        inputs = tokenizer("Return a list of", return_tensors="pt")
        output = reloaded.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
        console.print(f"Sample: {tokenizer.decode(output[0], skip_special_tokens=True)!r}", highlight=False)
        if not same:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
