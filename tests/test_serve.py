# SPDX-License-Identifier: Apache-2.0
"""`mcmoe serve`: OpenAI's client against a packed demo model, in a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe import MCMoEConfig

DEMO = Path(__file__).parent.parent / "examples" / "demo-mixtral"
OPTIONS = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "demo-packed"
    config = MCMoEConfig(rounding="nearest", allocation="uniform", dataset=[[1] * 32] * 2)
    AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(packed):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "transformers_mcmoe",
        "serve",
        str(packed),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(packed.parent / "home")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as server:
        for _ in range(600):
            try:
                with urlopen(f"http://127.0.0.1:{port}/health") as answer:
                    assert answer.status == 200
                break
            except URLError:
                assert server.poll() is None, server.stderr.read().decode()
            time.sleep(0.1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
        assert b"Traceback" not in server.stderr.read()


def _expected(packed, text):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(packed), AutoTokenizer.from_pretrained(packed)
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_completions(client, packed):
    answer = client.completions.create(model=str(packed), prompt="Return a list of", **OPTIONS)
    assert answer.choices[0].text == _expected(packed, "Return a list of")
    assert answer.usage.completion_tokens <= 12


def test_chat(client, packed):
    messages = [{"role": "user", "content": "Return a list of"}]
    answer = client.chat.completions.create(model=str(packed), messages=messages, **OPTIONS)
    expected = _expected(packed, "Return a list of\n\n")
    assert answer.choices[0].message.content.strip() == expected.strip()
    parts = client.chat.completions.create(model=str(packed), messages=messages, stream=True, **OPTIONS)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert streamed.strip() == expected.strip()


def test_models_and_errors(client):
    assert client.models.list().data == []  # the Hub's cache, which is empty here
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(model="other/model", messages=[{"role": "user", "content": "x"}], **OPTIONS)
