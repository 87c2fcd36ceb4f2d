# SPDX-License-Identifier: Apache-2.0
"""Every example runs on the demo model, with little data, and shows what it is to show.

push_to_hub is tested by hub_scenes, lm_eval_tasks by test_benchmarks, demo by `make demo`.
"""

import importlib

import pytest
from example_data import EXAMPLES, take_few_documents


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    take_few_documents(monkeypatch)


def _run(name, *arguments, **options):
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(module), function or "main")(*arguments, **options)


def test_they_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name


@pytest.mark.slow
def test_one_liner(tmp_path, capsys):
    _run("one_liner", output=str(tmp_path / "packed"))
    assert (tmp_path / "packed" / "mcmoe_report.json").is_file()
    assert "Return a list of" in capsys.readouterr().out


@pytest.mark.slow
def test_own_calibration_data(tmp_path):
    found = _run("own_calibration_data", page=str(tmp_path / "page.html"), samples=16, measured=8)
    # a domain is kept better by calibration on it
    assert found["code"]["code"] < found["documentation"]["code"]
    assert 'id="compare-frequency"' in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_budget_sweep(tmp_path):
    rows = _run("budget_sweep.sweep", (1.6, 2.54), samples=8, limit=8)
    assert rows[0]["bits_per_weight"] < rows[1]["bits_per_weight"] - 0.8
    assert rows[0]["kl"] > 2 * rows[1]["kl"]
    assert rows[0]["perplexity"] > rows[1]["perplexity"] > rows[1]["dense"]
    _run("budget_sweep.draw", rows, str(tmp_path / "sweep.png"))
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_prune_at_run_time():
    found = _run("prune_at_run_time", samples=8, steps=2, limit=8)
    assert found["all experts"]["skipped"] == 0
    assert found["ODP, 10%"]["skipped"] == pytest.approx(0.1, abs=0.05)
    assert found["ODP, 20%"]["skipped"] == pytest.approx(0.2, abs=0.05)
    assert found["OTP, 20%"]["skipped"] > found["OTP, 10%"]["skipped"] > 0.03
    assert found["ODP, 20%"]["kl"] > found["ODP, 10%"]["kl"] > found["all experts"]["kl"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora(tmp_path):
    packed = _run("lora_training.packed_demo", tmp_path, samples=16)
    found = _run("finetune_lora.finetune", packed, steps=4, limit=16)
    assert found["adapted"] < found["packed"]
    assert found["reloaded"] == pytest.approx(found["adapted"], rel=1e-3)
    found = _run("recover_with_lora.recover", packed, steps=2, distill=True, few=True)
    assert found["dense"] < found["recovered"] < found["packed"]
    assert found["recovered_kl"] < found["packed_kl"]
