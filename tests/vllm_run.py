# SPDX-License-Identifier: Apache-2.0
"""Generates greedily with vLLM, in vLLM's own environment: `python vllm_run.py '{"model": .., "prompts": [[ids]], ..}'`.

Prints one line, RESULT and the new token ids as JSON. A script and no test: test_vllm starts it.
"""

import json
import sys


def main() -> None:
    """Run one job."""
    from vllm import LLM, SamplingParams

    job = json.loads(sys.argv[1])
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
    } | job.get("options", {})
    if options.get("tensor_parallel_size", 1) == 1:
        options["distributed_executor_backend"] = "uni"
    model = LLM(model=job["model"], **options)
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    sys.stdout.write(f"RESULT {json.dumps(tokens)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
