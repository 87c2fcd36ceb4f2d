# SPDX-License-Identifier: Apache-2.0
"""Skip experts while the model runs: by thresholds (ODP) and by trained routers (OTP), switched on a loaded model.

python examples/prune_at_run_time.py
"""

from pathlib import Path
from typing import Any

import torch
from python_docs import documents, split, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe import (
    MCMoEConfig,
    ODPConfig,
    OTPConfig,
    expert_pruning_stats,
    set_expert_pruning,
    train_expert_pruning,
)
from transformers_mcmoe.evaluation import evaluate

MODEL = Path(__file__).parent / "demo-mixtral"
SEQ_LEN = 256


def main(samples: int = 64, steps: int = 60, limit: int | None = None) -> dict[str, dict[str, float]]:
    """Perplexity, KL divergence and share of expert bytes skipped, by rule."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train, held_out = split(documents())
    test = windows(tokenizer, held_out, SEQ_LEN)
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    config = MCMoEConfig(2.54, dataset=train, num_samples=samples, seq_len=SEQ_LEN)
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=torch.float32)

    def measure() -> dict[str, float]:
        score = evaluate(model, test, dense, limit=limit)
        return {"perplexity": score.perplexity, "kl": score.kl or 0.0}

    def skipped() -> dict[str, float]:
        return {"skipped": expert_pruning_stats(model, reset=True)["prefill"]["bytes_skipped"] or 0.0}

    found: dict[str, Any] = {"all experts": measure() | {"skipped": 0.0}}

    # a packed model knows its routing weights from calibration: no data is needed
    for rate in (0.1, 0.2):
        set_expert_pruning(model, ODPConfig(rate=rate))
        found[f"ODP, {rate:.0%}"] = measure() | skipped()

    # routers that learn how many of its experts a token needs; they are saved with the model
    train_expert_pruning(
        model, train, options=OTPConfig(target=0.2, steps=steps), num_samples=samples, seq_len=SEQ_LEN
    )
    found["OTP, 20%"] = measure() | skipped()
    set_expert_pruning(model, otp=0.1)  # trained once, any share afterwards
    found["OTP, 10%"] = measure() | skipped()

    set_expert_pruning(model, False)  # off again
    for name, row in found.items():
        print(f"{name:12} perplexity {row['perplexity']:6.2f}  KL {row['kl']:.4f}  skipped {row['skipped']:.1%}")
    return found


if __name__ == "__main__":
    main()
