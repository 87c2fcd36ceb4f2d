# SPDX-License-Identifier: Apache-2.0
"""Benchmark tasks on a packed model through lm-eval's own `HFLM`.

    python examples/lm_eval_tasks.py [TASK ...] [--data FOLDER]

Tasks are lm-eval's names and groups, and the groups "paper" and "hard"; their data come from the Hub, or from FOLDER with
local copies as FOLDER/org/name.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from python_docs import documents, split
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe import MCMoEConfig
from transformers_mcmoe.evaluation import run_benchmarks

MODEL = Path(__file__).parent / "demo-mixtral"


def main(tasks: Sequence[str], data: str | None = None, limit: int | None = None, samples: int = 64) -> dict[str, Any]:
    """Metrics by model and task."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = MCMoEConfig(2.54, dataset=split(documents())[0], num_samples=samples, seq_len=256)
    models = {
        "dense": AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        "packed": AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=torch.float32),
    }
    found = {}
    for name, model in models.items():
        found[name] = run_benchmarks(model, tokenizer, tasks, data=data, limit=limit)
        for task, row in found[name].items():
            metrics = ", ".join(f"{metric} {value['value']:.3f}" for metric, value in row["metrics"].items())
            print(f"{name:7} {task}: {metrics} ({row['questions']} questions)")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["piqa", "arc_easy"])
    parser.add_argument("--data", help="folder with local data sets")
    parser.add_argument("--limit", type=int, help="questions per task")
    options = parser.parse_args()
    main(options.tasks, options.data, options.limit)
