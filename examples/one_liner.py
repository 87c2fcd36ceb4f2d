# SPDX-License-Identifier: Apache-2.0
"""Compress a model in one call, save it, load it again and generate.

    python examples/one_liner.py [MODEL] [OUTPUT]

MODEL is a Hub id or a folder; default the embedded demo model.
"""

import sys
from pathlib import Path

from python_docs import documents, split
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe import MCMoEConfig

DEMO = Path(__file__).parent / "demo-mixtral"


def main(model: str | Path = DEMO, output: str = "packed-model") -> None:
    """Compress, save, reload, generate."""
    # without dataset= the calibration text is C4 from the Hub; the demo model knows Python's documentation
    data = {"dataset": split(documents())[0], "num_samples": 32, "seq_len": 256} if model == DEMO else {}

    packed = AutoModelForCausalLM.from_pretrained(model, quantization_config=MCMoEConfig(bits=2.54, **data))

    packed.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(output)

    again = AutoModelForCausalLM.from_pretrained(output)  # packed already: no calibration
    inputs = tokenizer("Return a list of", return_tensors="pt")
    print(tokenizer.decode(again.generate(**inputs, max_new_tokens=30, do_sample=False)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
