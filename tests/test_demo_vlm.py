# SPDX-License-Identifier: Apache-2.0
"""The trained vision-language model that is shipped, and the program that trained it."""

import json
import subprocess
import sys

import pytest
import torch
from example_data import EXAMPLES
from transformers import AutoModelForImageTextToText

from transformers_mcmoe import MCMoEConfig, compression_report, expert_pruning_stats, train_expert_pruning
from transformers_mcmoe.evaluation import evaluate_samples

DEMO = EXAMPLES / "demo-vlm"


@pytest.fixture(scope="module")
def shapes():
    sys.path.insert(0, str(DEMO))
    import shapes

    yield shapes
    sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def processor(shapes):
    return shapes.ShapesProcessor.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def dense():
    return AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()


def test_what_is_shipped():
    assert sum(file.stat().st_size for file in DEMO.iterdir() if file.is_file()) < 12e6
    log = json.loads((DEMO / "training_log.json").read_text(encoding="utf-8"))
    assert 0.6 < log["held_out_accuracy"]["all"] < 0.95


def test_images_are_drawn_alike(shapes):
    one, again = shapes.draw(7), shapes.draw(7)
    assert one["questions"] == again["questions"]
    assert list(one["image"].getdata()) == list(again["image"].getdata())
    kinds = {shapes.draw(n)["kind"] for n in range(100)}
    assert kinds == set(shapes.KINDS)


@pytest.mark.slow
def test_compressed_it_answers_as_the_dense_one(shapes, processor, dense):
    """At 2.57 bits, calibrated on few images."""
    held_out = [shapes.draw(10_000_000 + n) for n in range(300)]
    rows = [shapes.row(shapes.draw(20_000_000 + n)) for n in range(128)]
    expected = shapes.predict(dense, processor, held_out)
    right = shapes.accuracy(expected, processor, held_out)["all"]
    log = json.loads((DEMO / "training_log.json").read_text(encoding="utf-8"))
    assert right == pytest.approx(log["held_out_accuracy"]["all"], abs=0.08)  # of other, and fewer, images
    config = MCMoEConfig(2.57, dataset=rows, processor=processor, num_samples=128, seq_len=64)
    model = AutoModelForImageTextToText.from_pretrained(DEMO, quantization_config=config, dtype=torch.float32).eval()
    report = compression_report(model)
    assert report["average_bits"] <= 2.57
    assert report["image_tokens"] == 128 * 16
    found = shapes.predict(model, processor, held_out)
    assert shapes.accuracy(found, processor, held_out)["all"] > right - 0.06
    scores = evaluate_samples(model, [shapes.row(sample) for sample in held_out[:50]], dense, processor=processor)
    assert 0 < scores.kl < 0.5


@pytest.mark.slow
def test_a_fifth_of_the_experts_skipped(shapes, processor, dense):
    held_out = [shapes.draw(10_000_000 + n) for n in range(300)]
    rows = [shapes.row(shapes.draw(20_000_000 + n)) for n in range(128)]
    right = shapes.accuracy(shapes.predict(dense, processor, held_out), processor, held_out)["all"]
    model = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()
    train_expert_pruning(model, rows, 0.2, processor=processor, num_samples=64, seq_len=64)
    pruned = shapes.accuracy(shapes.predict(model, processor, held_out), processor, held_out)["all"]
    assert pruned > right - 0.06
    assert 0.15 < expert_pruning_stats(model)["prefill"]["slots_skipped"] < 0.25


@pytest.mark.slow
def test_it_can_be_trained(tmp_path):
    command = [sys.executable, str(DEMO / "train.py"), "--output", str(tmp_path), "--steps", "2"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert "held-out accuracy" in done.stdout
    assert {"model.safetensors", "tokenizer.json", "training_log.json"} <= {file.name for file in tmp_path.iterdir()}
