# SPDX-License-Identifier: Apache-2.0
"""push_to_hub and from_pretrained by repository name, against a local stand-in for the Hub."""

import json
import os
import subprocess
import sys

import mini_hub
from tiny import save_dense

PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from tiny import compressed, tokens
from transformers import AutoModelForCausalLM
from transformers_mcmoe import compression_report
model = compressed(sys.argv[1])
model.push_to_hub("packed", token="hf_test")
model.save_pretrained(sys.argv[3], push_to_hub=True, repo_id="tester/saved", token="hf_test")
for name in ("tester/packed", "tester/saved"):
    again = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    ids = tokens(2, 16, seed=1)
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert compression_report(again) == compression_report(model)
    again.save_pretrained(sys.argv[3] + "-again")
print("done")
"""


def test_push_and_load(tmp_path):
    save_dense("mixtral", tmp_path / "dense")
    tests = os.path.dirname(__file__)
    with mini_hub.running() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "dense"), tests, str(tmp_path / "saved")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for name in ("tester/packed", "tester/saved"):
            files = hub.files(name)
            assert {"config.json", "model.safetensors", "mcmoe_report.json"} <= set(files)
            assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "mcmoe"
    report = json.loads((tmp_path / "saved-again" / "mcmoe_report.json").read_text())
    assert report == json.loads(files["mcmoe_report.json"])
