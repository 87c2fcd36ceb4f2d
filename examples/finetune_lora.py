# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a packed model on a new domain: the demo model knows Python's documentation, here it learns Python's code.

Compresses the embedded demo model to 2.05 bits, puts LoRA on attention and experts, trains with transformers' Trainer on
source files of the standard library, and measures on files that training never saw. Takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from demo import MODEL, WINDOW, windows
from peft import LoraConfig, PeftModel, get_peft_model
from python_docs import SKIPPED_FOLDERS, documents, split
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from transformers_mcmoe import MCMoEConfig
from transformers_mcmoe.evaluation import evaluate
from transformers_mcmoe.integrations.lora import prepare_for_training

BITS = 2.05
RANK = 16
MAX_CHARACTERS = 20_000  # of one file, so that no file is most of the text


def source_files() -> tuple[list[str], list[str]]:
    """The standard library's code, every tenth file of it held out."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not SKIPPED_FOLDERS & set(parts) and "test" not in parts[0] and path.stat().st_size > 2000:
            texts.append(path.read_text(encoding="utf-8", errors="ignore")[:MAX_CHARACTERS])
    return [text for i, text in enumerate(texts) if i % 10], texts[::10]


def packed_demo(folder: Path) -> Path:
    """The demo model at BITS, compressed unless the folder has it already."""
    if not (folder / "config.json").is_file():
        config = MCMoEConfig(BITS, dataset=split(documents())[0], num_samples=128, seq_len=WINDOW)
        model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=torch.float32)
        model.save_pretrained(folder)
    return folder


def train(
    model: Any, data: torch.Tensor, steps: int, rate: float, kind: type[Trainer] = Trainer, **more: Any
) -> float:
    """Train the adapters on windows [N, T]; returns the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=rate, warmup_steps=steps // 20,
            lr_scheduler_type="cosine", report_to=[], save_strategy="no", logging_steps=25, use_cpu=True, seed=0,
        )  # fmt: skip
        rows = [{"input_ids": window, "labels": window} for window in data]
        started = time.monotonic()
        kind(model, arguments, train_dataset=rows, **more).train()
        return time.monotonic() - started


def finetune(packed: Path, steps: int, save: Path | None = None) -> dict[str, float]:
    """Perplexities on held-out code: of the dense model, the packed one, and the packed one with its adapter."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    seen, unseen = (windows(tokenizer, texts) for texts in source_files())
    unseen = unseen[:: max(1, len(unseen) // 128)][:128]
    result = {"train_tokens": steps * 8 * WINDOW, "test_tokens": unseen.numel()}
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    result["dense"] = evaluate(dense, unseen).perplexity
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    result["packed"] = evaluate(model, unseen).perplexity

    # from here on it is what any PEFT user writes
    model = prepare_for_training(model, gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    model.print_trainable_parameters()
    result["seconds"] = train(model, seen, steps, 2e-3)
    result["adapted"] = evaluate(model, unseen).perplexity
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(save or folder)
        again = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
        again = PeftModel.from_pretrained(again, save or folder)
    result["reloaded"] = evaluate(again, unseen).perplexity
    return result


def main() -> None:
    """Print the perplexities."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--packed", type=Path, help="folder for the packed model, used again if it is there")
    parser.add_argument("--save", type=Path, help="folder for the adapter")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        result = finetune(packed_demo(options.packed or Path(folder)), options.steps, options.save)
    print(f"Perplexity on {result['test_tokens']:,} tokens of code that training never saw:")
    for name in ("dense", "packed", "adapted", "reloaded"):
        print(f"  {name:10}{result[name]:8.2f}")


if __name__ == "__main__":
    main()
