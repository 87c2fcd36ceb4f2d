# SPDX-License-Identifier: Apache-2.0
"""Compress, measure, and push with a model card that states what was measured.

HF_TOKEN=... python examples/push_to_hub.py REPOSITORY
"""

import sys
import tempfile
from pathlib import Path

import torch
from python_docs import documents, split, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe import MCMoEConfig
from transformers_mcmoe.evaluation import evaluate, write_record
from transformers_mcmoe.evaluation.record import EVALUATION_NAME, machine, merged
from transformers_mcmoe.integrations.hub import push_folder

MODEL = Path(__file__).parent / "demo-mixtral"
SEQ_LEN = 256


def main(repository: str, samples: int = 64) -> str:
    """Returns the address of the commit."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train, held_out = split(documents())
    config = MCMoEConfig(2.54, dataset=train, num_samples=samples, seq_len=SEQ_LEN)
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    score = evaluate(model, windows(tokenizer, held_out, SEQ_LEN), dense)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # from a shell, `mcmoe evaluate FOLDER --reference MODEL --text FILE` writes this file
        text = {"Python documentation, held out": score.to_dict() | {"machine": machine()}}
        write_record(merged({}, {"text": text}), Path(folder) / EVALUATION_NAME)
        # and `mcmoe push FOLDER REPOSITORY` does this; without figures to state, model.push_to_hub(REPOSITORY) will do
        return push_folder(folder, repository).commit_url


if __name__ == "__main__":
    print(main(sys.argv[1]))
