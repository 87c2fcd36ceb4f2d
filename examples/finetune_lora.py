# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a packed model on a new domain: the demo model knows Python's documentation, here it learns Python's code.

Compresses the embedded demo model to 2.05 bits, puts LoRA on attention and experts, trains with transformers' Trainer on
source files of the standard library, and measures on files that training never saw.

    python examples/finetune_lora.py [STEPS]      # 300 steps take a few minutes on two cores
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from demo import MODEL, WINDOW
from lora_training import RANK, packed_demo, train
from peft import LoraConfig, PeftModel, get_peft_model
from python_docs import source_files, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe.evaluation import evaluate
from transformers_mcmoe.integrations.lora import prepare_for_training


def finetune(packed: Path, steps: int, limit: int = 128) -> dict[str, float]:
    """Perplexities on held-out code: of the dense model, the packed one, and the packed one with its adapter."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    seen, unseen = (windows(tokenizer, texts, WINDOW) for texts in source_files())
    unseen = unseen[:: max(1, len(unseen) // limit)][:limit]
    result = {"train_tokens": steps * 8 * WINDOW, "test_tokens": unseen.numel()}
    result["dense"] = evaluate(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), unseen).perplexity
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    result["packed"] = evaluate(model, unseen).perplexity

    model = prepare_for_training(model, gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    result["seconds"] = train(model, seen, steps, 2e-3)
    result["adapted"] = evaluate(model, unseen).perplexity
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32), folder)
    result["reloaded"] = evaluate(again, unseen).perplexity
    return result


def main(steps: int = 300) -> dict[str, float]:
    """Print the perplexities."""
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        result = finetune(packed_demo(Path(folder)), steps)
    print(f"Perplexity on {result['test_tokens']:,} tokens of code that training never saw:")
    for name in ("dense", "packed", "adapted", "reloaded"):
        print(f"  {name:10}{result[name]:8.2f}")
    return result


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
