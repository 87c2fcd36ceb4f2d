# SPDX-License-Identifier: Apache-2.0
"""The subcommands beside `compress`: what they say, what they refuse in one sentence, and their options."""

import inspect
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
import yaml
from tiny import compressed, load_class, quick_config, save_dense, save_text, save_tokenizer, tokens
from typer.testing import CliRunner

from transformers_mcmoe import (
    MCMoEConfig,
    ODPConfig,
    OTPConfig,
    PruneConfig,
    RankConfig,
    compression_report,
    set_expert_pruning,
)
from transformers_mcmoe.cli import app
from transformers_mcmoe.cli.options import PANELS, config_of
from transformers_mcmoe.evaluation import load_record
from transformers_mcmoe.integrations.card import command_line

CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny dense model with a tokenizer, the packed one, and a text."""
    folder = tmp_path_factory.mktemp("commands")
    save_dense("mixtral", folder / "dense")
    save_text(folder / "text.txt")
    compressed(folder / "dense", quick_config(odp=True)).save_pretrained(folder / "packed")
    for name in ("dense", "packed"):
        save_tokenizer(folder / name, chat_template=CHAT)
    return folder


def _run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def _params(*words):
    """The parsed options of a command line."""
    command = typer.main.get_command(app).commands[words[0]]
    return command.make_context(words[0], list(words[1:])).params


def test_every_argument_of_the_config_is_an_option():
    arguments = set(inspect.signature(MCMoEConfig).parameters) - {"progress", "unknown"}
    options = {name for names in PANELS.values() for name in names}
    assert options - arguments == {"prune_options", "rank_options", "odp_rate", "odp_options", "otp_options"}
    assert arguments <= options
    params = _params("compress", "model", "--output", "out")
    config = config_of({name: params[name] for name in options})
    assert config.to_dict() == MCMoEConfig().to_dict()


@pytest.mark.parametrize(
    "config",
    [
        MCMoEConfig(3.03, expert_bits=(2, 4), allocation="bsp", seed=7),
        MCMoEConfig(2.5, preset="paper", dataset="org/texts:sub:train:body", num_samples=16),
        MCMoEConfig(
            1.8, budget="layer", act_order=False, symmetric=True, damping=0.05, modules_to_not_convert=["lm", "a.b"]
        ),
        MCMoEConfig(2.0, at_least={3: 1, 2: 2}, dataset={"path": "org/texts", "field": "it's"}, attention_bits=16),
        MCMoEConfig(odp=ODPConfig(rate=0.2, protect=0.05), rounding="nearest"),
        MCMoEConfig(otp=OTPConfig(target=0.3, steps=5)),
        MCMoEConfig(prune=0.25),
        MCMoEConfig(rank=128),
        MCMoEConfig(2.2, prune="auto", rank="auto"),
        MCMoEConfig(3.0, rank=RankConfig(32, base=True), prune=0.25),
        MCMoEConfig(prune=PruneConfig(0.4, method="reap", tokens=512)),
        MCMoEConfig(odp=True),
        MCMoEConfig(otp=True),
    ],
    ids=lambda config: config.allocation,
)
def test_the_command_of_a_report_gives_its_config(config):
    source = config.dataset["path"] if isinstance(config.dataset, dict) else config.dataset
    report = {"config": json.loads(json.dumps(config.to_dict())), "calibration_source": source, "dtype": "bfloat16"}
    words = shlex.split(command_line(report, "org/dense", "out"))
    assert words[:5] == ["mcmoe", "compress", "org/dense", "--output", "out"]
    params = _params(*words[1:])
    assert config_of({name: params[name] for names in PANELS.values() for name in names}).to_dict() == config.to_dict()
    assert params["dtype"] == "bfloat16"


@pytest.mark.parametrize("alike", [True, False])  # whether all that shares the budget has one size
@pytest.mark.parametrize("budget", ["layer", "model"])
def test_plan_says_what_compress_does(folder, budget, alike):
    options = ["--bits", "2.7", "--budget", budget, "--num-samples", "16", "--seq-len", "32", "--dtype", "float32"]
    fixed = {"granularity": "expert", "attention_bits": 4, "shared_expert_bits": 4} if alike else {}
    options += [word for name, value in fixed.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    looked = _run("plan", folder / "dense", "--json", *options)
    assert looked.exit_code == 0, looked.output
    plan = json.loads(looked.stdout)
    config = quick_config(bits=2.7, budget=budget, dataset=tokens(16, 32), num_samples=16, **fixed)
    report = compression_report(compressed(folder / "dense", config))
    # matrices of many sizes share one budget for the model, which they spend to within the smallest of them
    near = pytest.approx if budget == "layer" or alike else lambda value: pytest.approx(value, rel=0.005)
    assert near(report["sizes"]["total_bytes"]) == plan["total_bytes"]
    assert plan["dense_bytes"] - plan["total_bytes"] == near(
        report["sizes"]["dense_bytes"] - report["sizes"]["total_bytes"]
    )
    assert plan["quantized_weights"] == report["sizes"]["quantized_weights"]
    assert plan["average_bits"] == near(report["average_bits"])
    assert plan["bits_per_weight"] == near(report["bits_per_weight"])
    assert plan["decided"] == (budget == "layer")
    if budget == "layer":
        found = {path: sum(map(int, digits)) / len(digits) for path, digits in report["expert_bits"].items()}
        assert plan["layers"] == pytest.approx(found)
    assert set(plan["seconds"]) == set(report["seconds"]) - {"prepare"}
    assert all(seconds > 0 for seconds in plan["seconds"].values())
    assert plan["disk_bytes"] > 0
    assert "time" in _run("plan", folder / "dense", *options).stdout


@pytest.mark.parametrize(
    "options", [["--budget", "model"], ["--allocation", "bsp", "--expert-bits", "2,4", "--rounding", "nearest"]]
)
def test_a_plan_that_was_measured_gives_the_same_model(folder, tmp_path, options):
    data = ["--bits", "3", "--dataset", folder / "text.txt", "--num-samples", "16", "--seq-len", "32", *options]
    looked = _run("plan", folder / "dense", "--save", tmp_path / "plan.json", *data)
    assert looked.exit_code == 0, looked.output
    assert "measuring will move" not in looked.output
    assert _run("compress", folder / "dense", "--output", tmp_path / "once", *data).exit_code == 0
    again = _run("compress", folder / "dense", "--output", tmp_path / "twice", "--plan", tmp_path / "plan.json", *data)
    assert again.exit_code == 0, again.output
    once, twice = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice"))
    assert once == twice
    report = json.loads((tmp_path / "once" / "mcmoe_report.json").read_text())
    measured = json.loads(_run("plan", folder / "dense", "--measure", "--json", *data).stdout)
    assert {path: e["gate_up"] for path, e in measured["plan"]["experts"].items()} == report["expert_bits"]
    assert measured["decided"] is True


def test_options_from_yaml(folder, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(
        yaml.safe_dump({"bits": 2.4, "expert-bits": [2, 4], "odp_options": {"rate": 0.2}, "attention_bits": 8})
    )
    plan = json.loads(_run("plan", folder / "dense", "--config", file, "--bits", "3.2", "--json").stdout)
    assert plan["average_bits"] == pytest.approx(3.2, abs=0.1)
    wrong = tmp_path / "wrong.yaml"
    for text, message in (("bit: 3", "has bit"), ("- 3", "name: value"), (": [", "not YAML")):
        wrong.write_text(text)
        result = _run("plan", folder / "dense", "--config", wrong)
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", "").split())
    assert _run("plan", folder / "dense", "--config", tmp_path / "none.yaml").exit_code == 2


def test_evaluate_keeps_what_it_found(folder, tmp_path):
    shutil.copytree(folder / "packed", tmp_path / "packed")
    text = ["--text", folder / "text.txt", "--context", "64", "--dtype", "float32"]
    first = _run(
        "evaluate", tmp_path / "packed", "--reference", folder / "dense", *text, "--classes", "--layers", "--json"
    )
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    row = found["text"]["text.txt"]
    assert row["kl"] > 0
    assert row["reference_perplexity"] > 1
    assert row["protocol"]["context"] == 64
    assert row["machine"]["cpus"] >= 1
    assert len(found["classes"]["worst"]) == 20
    assert len(found["layers"]["layers"]) == 2
    assert found["pruning"]["phases"]["prefill"]["bytes_skipped"] > 0
    assert str(tmp_path) not in first.stdout
    short = ["--speed-prompt", "16", "--speed-tokens", "4"]
    second = _run(
        "evaluate", tmp_path / "packed", "--no-perplexity", "--speed", "--needle", "60", "--depths", "2", *text, *short
    )
    assert second.exit_code == 0, second.output
    record = load_record(tmp_path / "packed")
    assert record["text"]["text.txt"] == row
    assert set(record["speed"]["models"]) == {"packed"}
    assert record["needle"]["lengths"] == [60]
    assert (tmp_path / "packed" / "mcmoe_needle.png").read_bytes().startswith(b"\x89PNG")
    late = _run("evaluate", tmp_path / "packed", "--limit", "1", "--speed", "--speed-prompt", "999", *text)
    assert late.exit_code == 1
    assert (
        load_record(tmp_path / "packed")["text"]["text.txt"]["protocol"]["windows"] == 1
    )  # kept, though the rest failed
    assert _run("evaluate", tmp_path / "packed", "--reference", folder / "dense", *text).exit_code == 0
    page = _run("report", tmp_path / "packed", "--output", tmp_path / "page.html")
    assert page.exit_code == 0, page.output
    shown = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in shown for name in ("classes", "buildup", "pruning", "needle", "size", "frequency"))
    card = _run("push", tmp_path / "packed", "me/tiny", "--card-only", tmp_path / "card", "--license", "mit")
    assert card.exit_code == 0, card.output
    written = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    data = yaml.safe_load(written.split("---\n")[1])
    assert data["license"] == "mit"
    metrics = {m["type"]: m["value"] for m in data["model-index"][0]["results"][0]["metrics"]}
    expected = {"perplexity": row["perplexity"], "kl-divergence": row["kl"], "top-1-agreement": row["top1"]}
    assert metrics == pytest.approx(expected)
    assert f"{row['perplexity']:.3f}" in written


def test_figures_of_another_state_are_not_told(folder, tmp_path, caplog):
    """Of the dense model, or of the packed one before its pruning was changed."""
    shutil.copytree(folder / "dense", tmp_path / "dense")
    shutil.copytree(folder / "packed", tmp_path / "packed")
    text = ["--text", folder / "text.txt", "--context", "64", "--limit", "2"]
    for name in ("dense", "packed"):
        assert _run("evaluate", tmp_path / name, *text).exit_code == 0
        assert load_record(tmp_path / name)["text"]
    model = load_class(tmp_path / "packed").from_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "packed")
    assert load_record(tmp_path / "packed")["text"]  # it is the same
    set_expert_pruning(model, False)
    model.save_pretrained(tmp_path / "packed")
    assert load_record(tmp_path / "packed") == {}
    assert "is of another state" in caplog.text
    fresh = compressed(tmp_path / "dense")
    fresh.save_pretrained(tmp_path / "fresh")
    shutil.copy(tmp_path / "dense" / "mcmoe_evaluation.json", tmp_path / "fresh")
    assert load_record(tmp_path / "fresh") == {}


def test_generate_and_bench(folder):
    made = _run("generate", folder / "packed", "w1 w2 w3", "--max-new-tokens", "5", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["tokens"] <= 5
    shown = _run("generate", folder / "packed", "w1 w2 w3", "--max-new-tokens", "5", "--chat", "--temperature", "0.9")
    assert shown.exit_code == 0, shown.output
    assert "per second" in shown.stderr
    timed = _run(
        "bench", folder / "dense", folder / "packed", "--prompt", "8", "--new-tokens", "4", "--rounds", "1", "--json"
    )
    assert timed.exit_code == 0, timed.output
    rows = json.loads(timed.stdout)["models"]
    assert list(rows) == [str(folder / "dense"), str(folder / "packed")]
    assert "1.00x" in _run("bench", folder / "packed", "--prompt", "8", "--new-tokens", "4", "--rounds", "1").stdout


def test_inspect_as_json(folder):
    found = json.loads(_run("inspect", folder / "packed", "--json").stdout)
    assert found["report"]["average_bits"] < 3.1
    assert found["machine"]["cpu"]
    assert json.loads(_run("inspect", "--json").stdout)["report"] is None


WRONG = [
    (["plan", "NOWHERE/x/y"], "There is no folder"),
    (["plan", "DENSE/config.json"], "is a file"),
    (["plan", "PACKED"], "is packed already"),
    (["plan", "DENSE", "--expert-bits", "1,two"], "'two' where a whole number should be"),
    (["plan", "DENSE", "--odp-options", "{"], "is not JSON"),
    (["plan", "DENSE", "--odp-options", '{"speed": 1}'], "a field that does not exist"),
    (["plan", "DENSE", "--dtype", "int8"], "no floating dtype"),
    (["plan", "DENSE", "--bits", "9"], "bits=9.0 is not valid"),
    (["plan", "DENSE", "--plan", "NOWHERE"], "is not a file"),
    (["plan", "DENSE", "--save", "NOWHERE/plan.json"], "does not exist"),
    (["compress", "DENSE", "--output", "TMP/out", "--dataset", "TMP/none.txt"], "is no file"),
    (["compress", "NOWHERE/x/y", "--output", "TMP/out"], "There is no folder"),
    (["compress", "DENSE", "--output", "TEXT"], "is a file"),
    (["compress", "PACKED", "--output", "TMP/out"], "is packed already"),
    (["inspect", "NOWHERE/x/y"], "There is no folder"),
    (["inspect", "DENSE"], "has no mcmoe_report.json"),
    (["evaluate", "NOWHERE/x/y"], "There is no folder"),
    (["evaluate", "PACKED", "--text", "TMP/none.txt"], "is no file"),
    (["evaluate", "PACKED", "--text", "TEXT", "--classes"], "give --reference"),
    (["evaluate", "PACKED", "--text", "TEXT", "--context", "9999"], "lower it"),
    (["evaluate", "PACKED", "--text", "TEXT", "--output", "TMP"], "is a folder"),
    (["evaluate", "PACKED", "--text", "TEXT", "--output", "TMP/none/x.json"], "does not exist"),
    (["evaluate", "PACKED", "--no-perplexity"], "nothing to measure"),
    (["evaluate", "PACKED", "--text", "TEXT", "--needle", "long"], "must be lengths"),
    (["evaluate", "PACKED", "--no-perplexity", "--tasks", "piqa", "--task-data", "NOWHERE"], "is no folder"),
    (["report", "DENSE", "--output", "TMP/x.html"], "has no mcmoe_report.json"),
    (["report", "PACKED", "--output", "TMP/none/x.html"], "does not exist"),
    (["report", "PACKED", "--output", "TMP"], "is a folder"),
    (["report", "PACKED", "--compare", "PACKED", "DENSE", "--output", "TMP/x.html"], "has no mcmoe_report.json"),
    (["push", "NOWHERE", "a/b"], "There is no folder"),
    (["push", "DENSE", "a/b"], "holds no packed model"),
    (["serve", "NOWHERE/x/y"], "There is no folder"),
    (["serve", "BARE"], "has no tokenizer"),
    (["generate", "NOWHERE/x/y", "text"], "There is no folder"),
    (["generate", "PACKED", ""], "prompt is empty"),
    (["bench", "DENSE", "--prompt", "9999"], "positions"),
    (["bench", "NOWHERE/x/y"], "There is no folder"),
]


@pytest.mark.parametrize(
    ("words", "message"), WRONG, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else ""
)
def test_what_is_wrong_is_one_sentence(folder, tmp_path, words, message):
    if "BARE" in words:
        shutil.copytree(folder / "dense", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "chat*"))
    places = {"NOWHERE": "./nowhere", "DENSE": folder / "dense", "PACKED": folder / "packed"}
    places |= {"TEXT": folder / "text.txt", "TMP": tmp_path, "BARE": tmp_path / "bare"}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    before = sorted(path.name for path in tmp_path.iterdir())
    result = _run(*words)
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("Error: ")
    assert message in lines[-1]
    assert "Traceback" not in result.output
    assert len(lines) <= 2, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    if words[0] == "plan" and "int8" in words:
        assert "Traceback" in _run(*words, "--debug").stderr


@pytest.mark.parametrize(
    "command", ["plan", "compress", "inspect", "evaluate", "report", "generate", "bench", "serve"]
)
def test_without_a_network(command, tmp_path):
    """HF_HUB_OFFLINE is set for all tests."""
    more = {"compress": ["--output", tmp_path / "out"], "generate": ["text"]}.get(command, [])
    result = _run(command, "org/model", *more)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: 'org/model' is no folder here, and the Hub")
    assert not list(tmp_path.iterdir())


def test_wrong_command_lines_exit_with_2():
    for words in (["compres"], ["compress"], ["plan", "x", "--bit", "2"], ["plan", "x", "--bits", "two"]):
        assert _run(*words).exit_code == 2
    assert _run("--version").stdout.strip()
    assert _run().exit_code in (0, 2)
    for command in typer.main.get_command(app).commands:
        shown = _run(command, "--help")
        assert shown.exit_code == 0
        assert "--debug" in shown.stdout


@pytest.mark.parametrize("kind", ["output", "work"])
def test_full_disk(folder, tmp_path, kind):
    """On a small file system of its own; making one takes root."""
    small = tmp_path / "small"
    small.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True)
    if made.returncode:
        pytest.skip("this user cannot mount a small file system")
    try:
        options = ["--bits", "3", "--dataset", folder / "text.txt", "--num-samples", "16", "--seq-len", "32"]
        places = {
            "output": ["--output", small / "out"],
            "work": ["--output", tmp_path / "o", "--work-dir", small / "w"],
        }
        (tmp_path / "wd").mkdir()
        more = ["--work-dir", tmp_path / "wd"] if kind == "output" else []
        result = _run("compress", folder / "dense", *places[kind], *more, *options, "--rounding", "nearest")
        assert result.exit_code == 1
        last = result.stderr.splitlines()[-1]
        assert "is full" in last or "larger disk" in last
        assert "Traceback" not in result.output
        assert not (small / "out").exists()
        assert not (tmp_path / "o").exists()
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.slow
def test_interrupted(folder, tmp_path):
    """Ctrl-C leaves the old output, and layers that are finished, saying so; nothing that is written has control codes."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "mcmoe_report.json").write_text("{}")
    options = ["--bits", "3.0", "--dataset", str(folder / "text.txt"), "--num-samples", "32", "--seq-len", "64"]
    options += ["--sweeps", "400"]  # so that there is time to interrupt it
    command = [sys.executable, "-m", "transformers_mcmoe", "compress", str(folder / "dense"), "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [*command, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell's background job, as these tests may be, ignores it, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    begun = tmp_path / ".out.mcmoe-work" / "records" / "allocate-00000.safetensors"  # it stays, once it is there
    while not begun.exists() and running.poll() is None:
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err.decode()
    assert b"Interrupted" in err
    assert b"is as it was" in err
    assert b"Traceback" not in err
    assert b"\x1b" not in out + err
    kept = [".out.mcmoe-work"] if b"Finished layers are kept in" in err else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "out"]
    assert [path.name for path in output.iterdir()] == ["mcmoe_report.json"]


def test_shell_completion():
    words = {"_MCMOE_COMPLETE": "complete_bash", "COMP_WORDS": "mcmoe ev", "COMP_CWORD": "1"}
    done = CliRunner().invoke(app, [], env=words, prog_name="mcmoe")
    assert done.stdout.split() == ["evaluate"]
    words |= {"COMP_WORDS": "mcmoe evaluate --ref", "COMP_CWORD": "2"}
    assert "--reference" in CliRunner().invoke(app, [], env=words, prog_name="mcmoe").stdout


def test_a_given_plan_is_read_from_a_packed_model(folder, tmp_path):
    options = ["--dataset", folder / "text.txt", "--num-samples", "16", "--seq-len", "32", "--rounding", "nearest"]
    plan = ["--plan", folder / "packed" / "config.json"]
    result = _run("compress", folder / "dense", "--output", tmp_path / "out", *plan, *options, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    old = json.loads(Path(folder / "packed" / "mcmoe_report.json").read_text())
    assert report["expert_bits"] == old["expert_bits"]
    assert report["plan_given"] is True
    assert load_class(tmp_path / "out").from_pretrained(tmp_path / "out", dtype=torch.float32) is not None
