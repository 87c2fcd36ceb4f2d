# SPDX-License-Identifier: Apache-2.0
"""A packed model in vLLM: compress the demo model, and answer prompts with vLLM's engine in this process.

Compress where transformers is, serve where vLLM is (`make .venv-vllm/.installed` builds such an environment for CPUs):

    python examples/serve_with_vllm.py compress packed
    .venv-vllm/bin/python examples/serve_with_vllm.py serve packed
    .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model packed --port 8000     # the same over HTTP

Two machines, each with half of every matrix; the second one says `--node-rank 1 --headless` and is given the first one's address:

    vllm serve packed --tensor-parallel-size 2 --nnodes 2 --node-rank 0 --master-addr 10.0.0.1
"""

import os
import sys
from pathlib import Path

MODEL = Path(__file__).parent / "demo-mixtral"
PROMPTS = ("The function returns", "A list of strings", "import os\n")


def compress(output: str) -> None:
    """Pack the demo model, with its tokenizer."""
    from python_docs import documents, split
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from transformers_mcmoe import MCMoEConfig

    texts, _ = split(documents())
    # vLLM does not show the attention that tokens receive: thresholds alone decide in both engines
    config = MCMoEConfig(2.54, odp={"protect": 0}, dataset=texts, num_samples=128, seq_len=256)
    AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config).save_pretrained(output)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(output)


def serve(model: str) -> list[str]:
    """Answers of vLLM to the prompts."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    from vllm import LLM, SamplingParams

    engine = LLM(model, dtype="float32", max_model_len=512, enforce_eager=True)
    outputs = engine.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=32))
    return [output.outputs[0].text for output in outputs]


if __name__ == "__main__":
    if sys.argv[1] == "compress":
        compress(sys.argv[2])
    else:
        for prompt, answer in zip(PROMPTS, serve(sys.argv[2]), strict=True):
            sys.stdout.write(f"{prompt!r} -> {answer!r}\n")
