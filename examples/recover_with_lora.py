# SPDX-License-Identifier: Apache-2.0
"""Win back what compression lost: MoE-I2's recovery (arXiv 2411.01016), a LoRA fine-tune after compression.

The adapter starts from the quantization error (`initialize_lora`), then is trained on general text: what the demo model
was trained on, never what it is measured on. With "distill" the loss is the KL divergence to the dense model's predictions
instead of the text alone.

    python examples/recover_with_lora.py [STEPS] [distill]
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from demo import MODEL, WINDOW
from lora_training import BITS, RANK, Distillation, packed_demo, train
from peft import LoraConfig, get_peft_model
from python_docs import documents, split, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe.evaluation import evaluate
from transformers_mcmoe.integrations.lora import initialize_lora, prepare_for_training


def recover(packed: Path, steps: int, distill: bool, start: bool = True, few: bool = False) -> dict[str, float]:
    """Perplexity and KL to the dense model on held-out text: packed, with the adapter's start, and trained."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts, held_out = split(documents())
    data, test = windows(tokenizer, texts, WINDOW), windows(tokenizer, held_out, WINDOW)
    test = test[::8] if few else test
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = prepare_for_training(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32), False)
    scores = {"packed": evaluate(model, test, dense)}
    result: dict[str, float] = {"train_tokens": steps * 8 * WINDOW, "test_tokens": test.numel()}
    result["dense"] = scores["packed"].reference_perplexity or 0.0
    weights: Any = "mcmoe" if start else True
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=weights)
    model = get_peft_model(model, config)
    if start:
        initialize_lora(model, MODEL, texts, num_samples=16 if few else 128, seq_len=WINDOW)
        scores["started"] = evaluate(model, test, dense)
    how: dict[str, Any] = {"kind": Distillation, "teacher": dense} if distill else {}
    result["seconds"] = train(model, data, steps, 1e-3, **how)
    scores["recovered"] = evaluate(model, test, dense)
    for name, score in scores.items():
        result[name], result[f"{name}_kl"] = score.perplexity, score.kl or 0.0
    result["gap_closed"] = (result["packed"] - result["recovered"]) / (result["packed"] - result["dense"])
    return result


def main(steps: int = 300, distill: bool = False) -> dict[str, float]:
    """Print the table."""
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        result = recover(packed_demo(Path(folder)), steps, distill)
    print(f"{BITS} bits, {result['test_tokens']:,} held-out tokens; dense perplexity {result['dense']:.2f}")
    for name in ("packed", "started", "recovered"):
        print(f"  {name:12} perplexity {result[name]:8.2f}  KL {result[name + '_kl']:8.4f}")
    return result


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300, "distill" in sys.argv[2:])
