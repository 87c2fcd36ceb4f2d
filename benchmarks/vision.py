# SPDX-License-Identifier: Apache-2.0
"""What compression costs a small vision-language model: right answers on held-out images, and divergence from the dense model.

The model of examples/demo-vlm at 2.57 bits on the average: calibrated with images, or on the same questions and answers as
text alone; every expert at the same width; and with a fifth of the routed experts skipped by learned pruning. Rows go to
results/vision.jsonl; `--docs` writes docs/vision.md's table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import here
from pages import replace_part
from transformers import AutoModelForImageTextToText

ROOT = Path(__file__).parent
DEMO = ROOT.parent / "examples" / "demo-vlm"
RESULTS = ROOT / "results" / "vision.jsonl"
sys.path.insert(0, str(DEMO))
from shapes import KINDS, ShapesProcessor, accuracy, draw, predict, row  # noqa: E402

# seeds of samples: none is trained on, and none is both calibrated and measured on
HELD_OUT, CALIBRATION = 10_000_000, 20_000_000
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, calibrated on text": {"text": True},
    "uniform": {"allocation": "uniform"},
    "uniform, calibrated on text": {"allocation": "uniform", "text": True},
    "default, 20 % fewer experts (OTP)": {"otp": {"target": 0.2}},
    "default, 20 % fewer expert bytes (ODP)": {"odp": {"rate": 0.2}},
    "preset best": {"preset": "best"},
}


def measure(options: argparse.Namespace, name: str, dense: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Compress, ask, and return the row."""
    from transformers_mcmoe import MCMoEConfig, compression_report, expert_pruning_stats
    from transformers_mcmoe.evaluation import evaluate_samples

    processor, samples = known["processor"], known["samples"]
    rows = [row(draw(CALIBRATION + options.seed * 100_000 + n)) for n in range(options.calibration)]
    given = dict(ROWS[name])
    if given.pop("text", False):
        # one text after the other, each several times, as many tokens as the samples with images have
        text = [own["text"] for own in rows] * 4
        data = {"dataset": text, "tokenizer": processor.tokenizer, "seq_len": 28, "num_samples": options.calibration}
    else:
        data = {"dataset": rows, "processor": processor, "seq_len": 64, "num_samples": options.calibration}
    started = time.monotonic()
    config = MCMoEConfig(options.bits, **data, **given, seed=options.seed)
    model = AutoModelForImageTextToText.from_pretrained(
        options.model, quantization_config=config, dtype=torch.float32
    ).eval()
    report = compression_report(model)
    result = {"row": name, "bits": options.bits, "seconds": round(time.monotonic() - started, 1)}
    result |= {
        name: report[name] for name in ("average_bits", "bits_per_weight", "calibration_tokens", "image_tokens")
    }
    result |= answers(model, known)
    stats = expert_pruning_stats(model)["prefill"] if "otp" in given or "odp" in given else None
    result["slots_skipped"] = None if stats is None else stats["slots_skipped"]
    texts = [row(sample) for sample in samples[: options.texts]]
    scores = evaluate_samples(model, texts, dense, processor=processor)
    return result | {
        "text": {key: scores.to_dict()[key] for key in ("perplexity", "reference_perplexity", "kl", "top1")}
    }


def answers(model: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Accuracy on the held-out images, and how near the answers are to the dense model's."""
    logits, dense = predict(model, known["processor"], known["samples"]), known["logits"]
    p, q = dense.log_softmax(-1), logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    right = accuracy(logits, known["processor"], known["samples"])
    return {
        "accuracy": right,
        "kl": float(kl.mean()),
        "kl_se": float(kl.std() / len(kl) ** 0.5),
        "agreement": float((logits.argmax(-1) == dense.argmax(-1)).double().mean()),
    }


def main() -> None:
    """Append the rows asked for, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--bits", type=float, default=2.57)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--images", type=int, default=2000, help="held-out images")
    parser.add_argument("--texts", type=int, default=300, help="of them, those whose text is scored")
    parser.add_argument("--calibration", type=int, default=512, help="calibration samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", action="store_true", help="write docs/vision.md's table from the rows, and stop")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    processor = ShapesProcessor.from_pretrained(options.model)
    dense = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32).eval()
    samples = [draw(HELD_OUT + n) for n in range(options.images)]
    known = {"processor": processor, "samples": samples, "logits": predict(dense, processor, samples)}
    append(options, {"row": "dense", "bits": 16.0} | answers(dense, known))
    for name in options.rows:
        append(options, measure(options, name, dense, known))


def append(options: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Add a row to the results."""
    about = {"model": options.model.name, "images": options.images, "seed": options.seed}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(about | measured | here()) + "\n")
    print(
        f"{measured['row']}: {measured.get('bits_per_weight', 16):.3f} bits per weight, accuracy "
        f"{100 * measured['accuracy']['all']:.1f} %, KL {measured['kl']:.4f}, agreement {100 * measured['agreement']:.1f} %",
        flush=True,
    )


def write_docs() -> None:
    """The newest row of each name and width."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {(own["bits"], own["row"]): own for own in rows}
    one = next(iter(newest.values()))
    lines = [
        f"{one['model']} on {one['images']:,} held-out images; KL and agreement of the answers with the dense model's:",
        "",
        f"| bits | row | bits per weight | right answers | {' | '.join(KINDS)} | KL | agreement | slots skipped |",
        "|" + "---|" * (7 + len(KINDS)),
    ]
    for (bits, name), own in sorted(newest.items(), key=lambda item: (-item[0][0], item[1]["kl"])):
        right = own["accuracy"]
        kinds = " | ".join(f"{100 * right[kind]:.0f}" for kind in KINDS)
        skipped = own.get("slots_skipped")
        lines.append(
            f"| {bits:g} | {name} | {own.get('bits_per_weight', 16):.2f} | {100 * right['all']:.1f} % | {kinds} | "
            f"{own['kl']:.4f} ± {own['kl_se']:.4f} | {100 * own['agreement']:.1f} % | "
            f"{'' if skipped is None else f'{100 * skipped:.0f} %'} |"
        )
    replace_part("vision.md", "vision", lines)


if __name__ == "__main__":
    main()
