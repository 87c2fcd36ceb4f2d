# SPDX-License-Identifier: Apache-2.0
"""The command line: compression, errors in one sentence, and a kill that loses nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import load_class, save_dense, save_text, save_tokenizer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from transformers_mcmoe import backend_info, compression_report
from transformers_mcmoe.cli import app
from transformers_mcmoe.report import REPORT_NAME
from transformers_mcmoe.routing import attached


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny checkpoint with a tokenizer, and calibration text."""
    folder = tmp_path_factory.mktemp("cli")
    save_dense("mixtral", folder / "dense")
    save_tokenizer(folder / "dense")
    save_text(folder / "text.txt")
    return folder


def _arguments(folder, output, *more):
    options = ["--bits", "3.0", "--dataset", str(folder / "text.txt"), "--num-samples", "16", "--seq-len", "32"]
    return ["compress", str(folder / "dense"), "--output", str(output), *options, *more]


def test_compress(dense, tmp_path):
    output = tmp_path / "out"
    result = CliRunner().invoke(app, _arguments(dense, output, "--budget", "model"))
    assert result.exit_code == 0, result.output
    assert "average bits" in result.output
    model = load_class(output).from_pretrained(output)
    assert compression_report(model)["config"]["budget"] == "model"
    assert PreTrainedTokenizerFast.from_pretrained(output).eos_token == "</s>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_expert_pruning(dense, tmp_path):
    options = ["--odp-rate", "0.2", "--rounding", "nearest"]
    result = CliRunner().invoke(app, _arguments(dense, tmp_path / "out", *options))
    assert result.exit_code == 0, result.output
    assert attached(load_class(tmp_path / "out").from_pretrained(tmp_path / "out")).options.rate == 0.2
    result = CliRunner().invoke(app, _arguments(dense, tmp_path / "out", "--otp", "0.3", "--rounding", "nearest"))
    assert result.exit_code == 0, result.output
    assert attached(load_class(tmp_path / "out").from_pretrained(tmp_path / "out")).options.target == 0.3
    result = CliRunner().invoke(app, _arguments(dense, tmp_path / "none", "--odp-rate", "2", "--rounding", "nearest"))
    assert result.exit_code == 1
    assert "rate=2.0 is not valid" in result.output


def test_inspect(dense, tmp_path):
    output = tmp_path / "out"
    options = ["--expert-bits", "2,4", "--rounding", "nearest"]
    assert CliRunner().invoke(app, _arguments(dense, output, *options)).exit_code == 0
    result = CliRunner().invoke(app, ["inspect", str(output)])
    assert result.exit_code == 0, result.output
    report = compression_report(load_class(output).from_pretrained(output))
    assert set("".join(report["expert_bits"].values())) <= set("24")
    assert all(digits in result.output for digits in report["expert_bits"].values())
    assert f"{report['average_bits']:.4f}" in result.output
    assert backend_info()["instruction_set"] in result.output
    bare = CliRunner().invoke(app, ["inspect"])
    assert bare.exit_code == 0
    assert backend_info()["cpu"] in bare.output
    dense_model = CliRunner().invoke(app, ["inspect", str(dense / "dense")])
    assert dense_model.exit_code == 1
    assert "has no mcmoe_report.json" in " ".join(dense_model.output.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bits", "9"], "bits=9.0 is not valid"),
        (["--bits", "1.01"], "cannot be met"),
        (["--allocation", "best"], "allocation='best'"),
        (["--num-samples", "100000"], "lower num_samples"),
        (["--dataset", "nothing.txt"], "is no file"),
    ],
)
def test_errors_are_one_sentence_and_touch_nothing(dense, tmp_path, more, message):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    (output / "mcmoe_report.json").write_text("{}")
    result = CliRunner().invoke(app, _arguments(dense, output, *more))
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert (output / "old").read_text() == "old"


def test_folders_of_the_user_are_not_replaced(dense, tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    for output in (tmp_path, dense / "dense"):
        before = sorted(path.name for path in output.iterdir())
        result = CliRunner().invoke(app, _arguments(dense, output))
        assert result.exit_code == 1
        assert "holds no compressed model" in " ".join(result.output.split())
        assert sorted(path.name for path in output.iterdir()) == before


@pytest.mark.slow
def test_killed_run_leaves_the_old_output_and_can_be_repeated(dense, tmp_path):
    output = tmp_path / "out"
    first = CliRunner().invoke(app, _arguments(dense, output))
    assert first.exit_code == 0, first.output
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    command = [sys.executable, "-m", "transformers_mcmoe", *_arguments(dense, output, "--seed", "1")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    layer = tmp_path / ".out.mcmoe-work" / "layer-00000.safetensors"
    for _ in range(6000):  # killed once the first layer is finished
        if layer.exists() or running.poll() is not None:
            break
        time.sleep(0.01)
    assert running.poll() is None, "the run ended before it could be killed"
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert layer.exists()
    shutil.copytree(layer.parent, tmp_path / ".other.mcmoe-work")
    again = CliRunner().invoke(app, _arguments(dense, output, "--seed", "1"))
    assert again.exit_code == 0, again.output
    refused = CliRunner().invoke(app, _arguments(dense, tmp_path / "other", "--seed", "2", "--resume"))
    assert refused.exit_code == 1
    assert "holds a compression of another config" in " ".join(refused.output.split())
    resumed = CliRunner().invoke(app, _arguments(dense, tmp_path / "other", "--seed", "1", "--resume"))
    assert resumed.exit_code == 0, resumed.output
    for file in output.iterdir():
        if file.name != REPORT_NAME:  # it has times
            assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes(), file.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    model = load_class(output).from_pretrained(output, dtype=torch.float32)
    assert compression_report(model)["seed"] == 1
