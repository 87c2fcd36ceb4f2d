# SPDX-License-Identifier: Apache-2.0
"""What both LoRA examples need: the packed demo model, and training with transformers' Trainer."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from demo import MODEL, WINDOW
from python_docs import documents, split
from torch.nn import functional
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from transformers_mcmoe import MCMoEConfig

BITS, RANK = 2.05, 16


def packed_demo(folder: Path, samples: int = 128) -> Path:
    """The demo model at BITS, compressed unless the folder has it already."""
    if not (folder / "config.json").is_file():
        config = MCMoEConfig(BITS, dataset=split(documents())[0], num_samples=samples, seq_len=WINDOW)
        model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=torch.float32)
        model.save_pretrained(folder)
    return folder


def train(model: Any, data: torch.Tensor, steps: int, rate: float, kind: Any = Trainer, **more: Any) -> float:
    """Train the adapters on windows [N, T]; returns the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=rate, lr_scheduler_type="cosine",
            warmup_steps=steps // 20, report_to=[], save_strategy="no", logging_steps=25, use_cpu=True, seed=0,
        )  # fmt: skip
        rows = [{"input_ids": window, "labels": window} for window in data]
        started = time.monotonic()
        kind(model, arguments, train_dataset=rows, **more).train()
        return time.monotonic() - started


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
