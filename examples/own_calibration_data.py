# SPDX-License-Identifier: Apache-2.0
"""Calibrate on your own text, and see what that changes: which experts are used, and how well each domain is kept.

    python examples/own_calibration_data.py [REPORT.html]

The demo model is compressed twice, once calibrated on Python's documentation and once on Python's source code, and measured
on held-out text of both. The page shows both runs side by side.
"""

import sys
import tempfile
from pathlib import Path

import torch
from python_docs import documents, source_files, split, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe import MCMoEConfig
from transformers_mcmoe.evaluation import evaluate
from transformers_mcmoe.report.page import Run, write_page

MODEL = Path(__file__).parent / "demo-mixtral"
BITS, SEQ_LEN = 2.2, 256


def main(page: str = "calibration.html", samples: int = 64, measured: int = 32) -> dict[str, dict[str, float]]:
    """KL divergence to the dense model, by calibration text and by text that is measured on."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    sources = {"documentation": split(documents()), "code": source_files()}
    found: dict[str, dict[str, float]] = {}
    runs = []
    for name, (texts, _) in sources.items():
        # a list of strings; a .txt, .jsonl or .parquet file, a Hub id or token ids [N, T] do as well
        config = MCMoEConfig(BITS, dataset=texts, num_samples=samples, seq_len=SEQ_LEN)
        model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=torch.float32)
        found[name] = {}
        for domain, (_, unseen) in sources.items():
            tokens = windows(tokenizer, unseen, SEQ_LEN)
            found[name][domain] = evaluate(model, tokens, dense, limit=measured).kl or 0.0
        print(f"calibrated on {name}: KL " + ", ".join(f"{kl:.4f} on {domain}" for domain, kl in found[name].items()))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            runs.append(Run(name, Run.load(folder).report, {}))
    write_page(runs[:1], page, compare=(runs[0], runs[1]))
    print(f"Both runs side by side: {page}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
