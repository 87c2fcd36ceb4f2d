# SPDX-License-Identifier: Apache-2.0
"""Train a small vision-language MoE on drawn images and questions, such as the one in this folder, in minutes and without a GPU.

    python examples/demo-vlm/train.py --output my-vlm      # 15 minutes; --steps 50 for a quick look

A GLM-4.5V of 2 M parameters: 16 experts, of which a token takes 4, a shared expert, and a vision tower of 3 blocks. Writes a
bfloat16 checkpoint, tokenizer, image processor and training_log.json. No held-out image is drawn from a seed of the training.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from shapes import (
    END,
    IMAGE,
    PAD,
    START,
    STOP,
    VIDEO,
    VOCABULARY,
    ShapesProcessor,
    accuracy,
    draw,
    predict,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

BATCH = 64
LEARNING_RATE = 1.5e-3
WARM_UP = 0.04
# how fast the correction biases of the router follow the load
BALANCE = 2e-3
# seeds of samples that are not trained on begin here
HELD_OUT = 10_000_000


def new_processor() -> ShapesProcessor:
    """Words are tokens; patches of 4 x 4 pixels, 2 x 2 of which become a token."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [IMAGE, VIDEO, START, END]
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=STOP,
        padding_side="right",
        additional_special_tokens=special,
    )
    size = {"shortest_edge": 1024, "longest_edge": 1024}
    return ShapesProcessor(Glm4vImageProcessorPil(patch_size=4, temporal_patch_size=1, merge_size=2, size=size), words)


def new_model() -> Glm4vMoeForConditionalGeneration:
    ids = {word: n for n, word in enumerate(VOCABULARY)}
    text = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 512,
        "initializer_range": 0.03,
        "pad_token_id": ids[PAD],
        "eos_token_id": ids[STOP],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "partial_rotary_factor": 0.5,
        },
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "patch_size": 4,
        "image_size": 32,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": 128,
        "initializer_range": 0.03,
    }
    config = Glm4vMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        image_start_token_id=ids[START],
        image_end_token_id=ids[END],
    )
    return Glm4vMoeForConditionalGeneration(config)


def balance(model: torch.nn.Module) -> list:
    """Correction biases follow the load: experts that got fewer tokens than the mean are chosen more often from then on."""
    handles = []
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):

            def count(router, args, output):
                if router.training:
                    scores = next(
                        out for out in (output if isinstance(output, tuple) else (output,)) if out.dim() == 2
                    )
                    top = (scores.sigmoid() + router.e_score_correction_bias).topk(4, dim=-1).indices
                    load = torch.bincount(top.flatten(), minlength=16).float()
                    router.e_score_correction_bias += BALANCE * torch.sign(load.mean() - load)

            handles.append(module.register_forward_hook(count))
    return handles


def batches(processor: ShapesProcessor, seed: int):
    """Batches of fresh samples without end, each with all of its questions and answers.

    Inputs, the rows and places of the words before answers, and the answers' ids.
    """
    mark = processor.tokenizer.convert_tokens_to_ids("?")
    start = seed * 1_000_000
    while True:
        samples = [draw(n) for n in range(start, start + BATCH)]
        start += BATCH
        texts = [" ".join(f"{question} ? {answer}" for _, question, answer in s["questions"]) for s in samples]
        inputs = processor([s["image"] for s in samples], [f"{IMAGE} {text}" for text in texts])
        row, place = torch.where(inputs["input_ids"] == mark)
        yield inputs, (row, place), inputs["input_ids"][row, place + 1]


def train(model, processor: ShapesProcessor, steps: int | None, minutes: float, seed: int) -> list[dict]:
    """AdamW with warm-up and cosine decay, for `steps` or else `minutes`, on the answers alone. Returns a log entry a minute."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    log: list[dict] = []
    losses: list[float] = []
    right: list[float] = []
    handles, begin = balance(model), time.monotonic()
    model.train()
    for step, (inputs, places, wanted) in enumerate(batches(processor, seed)):
        seconds = time.monotonic() - begin
        done = step / steps if steps else seconds / (60 * minutes)
        if losses and (done >= 1 or seconds >= 60 * (len(log) + 1)):
            mean = {"loss": sum(losses) / len(losses), "right": sum(right) / len(right)}
            log.append({"seconds": round(seconds), "step": step} | mean)
            print("  ".join(f"{key} {value:.4g}" for key, value in log[-1].items()), flush=True)
            losses.clear()
            right.clear()
        if done >= 1:
            break
        decay = 0.5 * (1 + math.cos(math.pi * max(0.0, done - WARM_UP) / (1 - WARM_UP)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((done + 1e-3) / WARM_UP, 0.02 + 0.98 * decay)
        logits = model(**inputs, use_cache=False).logits[places]
        loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        right.append(float((logits.argmax(-1) == wanted).float().mean()))
    for handle in handles:
        handle.remove()
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=15.0, help="length of the training (default %(default)s)")
    parser.add_argument("--steps", type=int, help="length of the training in steps, instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (default %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    processor, model = new_processor(), new_model()
    log = train(model, processor, args.steps, args.minutes, args.seed)
    model.to(torch.bfloat16).save_pretrained(args.output)
    processor.save_pretrained(args.output)
    # what counts is the checkpoint as others will load it: rounded to bfloat16, computed in float32
    model = Glm4vMoeForConditionalGeneration.from_pretrained(args.output, dtype=torch.float32).eval()
    held_out = [draw(HELD_OUT + n) for n in range(1000)]
    right = accuracy(predict(model, processor, held_out), processor, held_out)
    record = {
        "python": platform.python_version(),
        "args": {"minutes": args.minutes, "steps": args.steps, "seed": args.seed},
        "parameters": model.num_parameters(),
        "held_out_accuracy": right,
        "log": log,
    }
    (args.output / "training_log.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{record['parameters']} parameters, held-out accuracy {right}")


if __name__ == "__main__":
    main()
