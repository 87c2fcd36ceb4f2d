# SPDX-License-Identifier: Apache-2.0
"""Win back what compression lost: MoE-I2's recovery (arXiv 2411.01016), a LoRA fine-tune after compression.

The adapter starts from the quantization error (`initialize_lora`), then is trained on general text: what the demo model
was trained on, never what it is measured on. With --distill the loss is the KL divergence to the dense model's predictions
instead of the text alone, which also works where the text is not what the model was trained on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from demo import MODEL, WINDOW, windows
from finetune_lora import BITS, RANK, packed_demo, train
from peft import LoraConfig, get_peft_model
from python_docs import documents, split
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from transformers_mcmoe.evaluation import evaluate
from transformers_mcmoe.integrations.lora import initialize_lora, prepare_for_training


class Distillation(Trainer):
    """Trains towards a dense model's predictions."""

    def __init__(self, *args: Any, teacher: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._teacher = teacher.eval()

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """KL divergence from the teacher to the student, in nats per token."""
        outputs = model(input_ids=inputs["input_ids"])
        with torch.no_grad():
            target = functional.log_softmax(self._teacher(input_ids=inputs["input_ids"]).logits.float(), -1)
        own = functional.log_softmax(outputs.logits.float(), -1)
        loss = functional.kl_div(own, target, reduction="none", log_target=True).sum(-1).mean()
        return (loss, outputs) if return_outputs else loss


def recover(packed: Path, steps: int, distill: bool, start: bool = True) -> dict[str, float]:
    """Perplexity and KL to the dense model on held-out text: packed, with the adapter's start, and trained."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts, held_out = split(documents())
    data, test = windows(tokenizer, texts), windows(tokenizer, held_out)
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = prepare_for_training(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32), False)
    scores = {"packed": evaluate(model, test, dense)}
    result: dict[str, float] = {"train_tokens": steps * 8 * WINDOW, "test_tokens": test.numel()}
    result["dense"] = scores["packed"].reference_perplexity or 0.0
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights="mcmoe" if start else True
    )
    model = get_peft_model(model, config)
    if start:
        initialize_lora(model, MODEL, texts, num_samples=128, seq_len=WINDOW)
        scores["started"] = evaluate(model, test, dense)
    if distill:
        result["seconds"] = train(model, data, steps, 1e-3, Distillation, teacher=dense)
    else:
        result["seconds"] = train(model, data, steps, 1e-3)
    scores["recovered"] = evaluate(model, test, dense)
    for name, score in scores.items():
        result[name], result[f"{name}_kl"] = score.perplexity, score.kl or 0.0
    result["gap_closed"] = (result["packed"] - result["recovered"]) / (result["packed"] - result["dense"])
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--distill", action="store_true", help="learn the dense model's predictions")
    parser.add_argument("--packed", type=Path, help="folder for the packed model, used again if it is there")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        result = recover(packed_demo(options.packed or Path(folder)), options.steps, options.distill)
    print(f"{BITS} bits, {result['test_tokens']:,} held-out tokens   perplexity   KL to dense")
    print(f"  dense        {result['dense']:8.2f}")
    for name in ("packed", "started", "recovered"):
        print(f"  {name:12} {result[name]:8.2f}   {result[name + '_kl']:8.4f}")
    print(f"Of the gap to the dense model, {100 * result['gap_closed']:.0f} % is closed.")


if __name__ == "__main__":
    main()
