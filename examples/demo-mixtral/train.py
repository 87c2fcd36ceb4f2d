# SPDX-License-Identifier: Apache-2.0
"""Train a small Mixtral on Python's own documentation, such as the one in this folder, in minutes and without a GPU.

    python examples/demo-mixtral/train.py --output my-mixtral      # 14 minutes; --steps 50 for a quick look

Writes a bfloat16 checkpoint, its tokenizer and training_log.json; neither model nor tokenizer sees the held-out part.
How far a run gets in its minutes depends on the machine.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
from python_docs import documents, split, windows

END = "<|endoftext|>"
VOCABULARY = 4096
WINDOW = 256
BATCH = 8
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1  # of matrices, not of norms
WARM_UP = 0.04  # as a part of the training
# the model knows documents, not roles: messages are paragraphs, and the answer is the next one
CHAT = """{% for message in messages %}{{ message['content'] }}

{% endfor %}"""


def train_tokenizer(docs: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; token 0 ends a document, begins one and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(docs, trainer)
    ends = {"bos_token": END, "eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **ends)


def new_model() -> MixtralForCausalLM:
    """4.4 M parameters: 4 layers of 8 experts, 2 per token."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        initializer_range=0.03,
        router_aux_loss_coef=0.01,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config)


def batches(data: torch.Tensor) -> Iterator[torch.Tensor]:
    """Batches of windows without end, in a new order in each epoch."""
    while True:
        yield from data[torch.randperm(len(data))[: len(data) // BATCH * BATCH]].split(BATCH)


@torch.no_grad()
def held_out_loss(model: MixtralForCausalLM, data: torch.Tensor) -> float:
    """Mean negative log-likelihood of the predicted tokens, all but the first of each window, in nats."""
    return sum(model(rows, labels=rows).loss.item() * len(rows) for rows in data.split(BATCH)) / len(data)


def train(model: MixtralForCausalLM, data: torch.Tensor, steps: int | None, minutes: float) -> list[dict]:
    """AdamW with warm-up and cosine decay to 2 %, for `steps` or else `minutes`. Returns a log entry a minute."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    log: list[dict] = []
    losses: list[float] = []
    lr, start = 0.0, time.monotonic()
    for step, rows in enumerate(batches(data)):
        seconds = time.monotonic() - start
        done = step / steps if steps else seconds / (60 * minutes)
        if losses and (done >= 1 or seconds >= 60 * (len(log) + 1)):
            log.append({"seconds": round(seconds), "step": step, "lr": lr, "loss": sum(losses) / len(losses)})
            print("  ".join(f"{key} {value:.4g}" for key, value in log[-1].items()), flush=True)
            losses.clear()
        if done >= 1:
            break
        decay = 0.5 * (1 + math.cos(math.pi * max(0.0, done - WARM_UP) / (1 - WARM_UP)))
        lr = LEARNING_RATE * min((done + 1e-3) / WARM_UP, 0.02 + 0.98 * decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        output = model(rows, labels=rows, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # `output.loss` includes the load-balancing loss, which the log leaves out.
        losses.append(output.loss.item() - model.config.router_aux_loss_coef * output.aux_loss.item())
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=14.0, help="length of the training (default %(default)s)")
    parser.add_argument("--steps", type=int, help="length of the training in steps, instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train_docs, held_out_docs = split(documents())
    tokenizer = train_tokenizer(train_docs)
    data, held_out = windows(tokenizer, train_docs, WINDOW), windows(tokenizer, held_out_docs, WINDOW)
    print(f"{len(train_docs)} documents, {data.numel()} tokens; held out {len(held_out_docs)}, {held_out.numel()}")
    model = new_model()
    log = train(model, data, args.steps, args.minutes)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    # What counts is the checkpoint as others will load it: rounded to bfloat16, computed in float32.
    loss = held_out_loss(AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32), held_out)
    record = {
        "python": platform.python_version(),
        "args": {"minutes": args.minutes, "steps": args.steps, "seed": args.seed},
        "parameters": model.num_parameters(),
        "epochs": log[-1]["step"] * BATCH / len(data),
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        "log": log,
    }
    (args.output / "training_log.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f} (window {WINDOW}); saved to {args.output}")


if __name__ == "__main__":
    main()
