# SPDX-License-Identifier: Apache-2.0
"""A transformers that does not know this package raises on packed checkpoints; it never returns random experts."""

import json
import subprocess
import sys

import pytest
from tiny import compressed, quick_config, save_dense

from transformers_mcmoe import Plan
from transformers_mcmoe.plan import ExpertWidths

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe")
PROGRAM = """
import sys, json, torch, transformers
assert "transformers_mcmoe" not in sys.modules
transformers.logging.set_verbosity_error()
result = {}
for folder in sys.argv[1:]:
    for dtype in ("auto", torch.float32):
        try:
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            result[f"{folder} {dtype}"] = "loaded"
        except Exception as error:
            result[f"{folder} {dtype}"] = type(error).__name__
print(json.dumps(result))
"""


def _plan(model_plan, widths_of):
    experts = {path: widths_of(len(w.gate_up)) for path, w in model_plan.experts.items()}
    return Plan(experts, model_plan.linears)


VARIANTS = {
    "mixed": {},
    "all equal": {"plan": lambda n: ExpertWidths.of([2] * n)},
    "all 8 bits": {"plan": lambda n: ExpertWidths.of([8] * n)},
    "dropped expert": {"plan": lambda n: ExpertWidths.of([0] + [2] * (n - 1))},
    "16-bit attention": {"attention_bits": 16, "bits": 2.0},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = []
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        dense = save_dense(family, folder / "dense")
        mixed = compressed(dense)
        plan = mixed.config.quantization_config.plan
        for name, options in VARIANTS.items():
            options = dict(options)
            if "plan" in options:
                options["plan"] = _plan(plan, options["plan"])
            model = mixed if name == "mixed" else compressed(dense, quick_config(rounding="nearest", **options))
            target = folder / name.replace(" ", "-")
            model.save_pretrained(target)
            folders.append(target)
    return folders


@pytest.mark.slow
def test_plain_transformers_raises(checkpoints):
    command = [sys.executable, "-c", PROGRAM, *map(str, checkpoints)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result) == 2 * len(FAMILIES) * len(VARIANTS)
    assert {name: what for name, what in result.items() if what == "loaded"} == {}
