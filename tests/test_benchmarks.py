# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval on a packed model, with local data; the rest of "paper" and "hard" takes minutes and is not run here."""

import sys
from pathlib import Path

import pytest
import torch
from example_data import EXAMPLES, take_few_documents
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe.evaluation import run_benchmarks
from transformers_mcmoe.evaluation.benchmarks import GROUPS
from transformers_mcmoe.evaluation.tasks.run_programs import build_programs, estimate, pass_at_10, passes

DEMO = EXAMPLES / "demo-mixtral"


def test_programs():
    assert passes("assert 1 + 1 == 2")
    assert not passes("assert 1 + 1 == 3")
    assert not passes("while True: pass")
    assert not passes("x = bytearray(1 << 34)")
    assert not passes("a\0b")
    programs = build_programs([["  return 1\n", "  return 2\n"]], [{"prompt": "def f():\n"}])
    assert programs == [["def f():\n  return 1\n", "def f():\n  return 2\n"]]
    assert pass_at_10(["assert f() == 2"], programs) == 1.0
    assert pass_at_10(["assert f() == 3"], programs) == 0.0


def test_estimate():
    # the share of subsets of k samples that hold one that passed, counted
    from itertools import combinations

    for samples, passed, k in ((6, 2, 3), (5, 0, 2), (5, 5, 1), (7, 4, 4)):
        subsets = list(combinations(range(samples), k))
        counted = sum(any(i < passed for i in subset) for subset in subsets) / len(subsets)
        assert estimate(samples, passed, k) == pytest.approx(counted)


def test_groups():
    assert [shots for _, shots in GROUPS["paper"]] == [0] * 8 + [5]
    assert [task for task, _ in GROUPS["hard"]] == ["gsm8k", "humaneval_pass_at_10", "longbench"]


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"transformers-mcmoe\[eval\]"):
        run_benchmarks(None, None, ["piqa"])


@pytest.mark.slow
def test_tasks_on_a_packed_model(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    import datasets
    import task_data

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task_data.write_paper(tmp_path)
    task_data.write_hard(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    with pytest.raises(ValueError, match="runs programs"):
        run_benchmarks(model, tokenizer, ["hard"])
    with pytest.raises(ValueError, match="'nothing'"):
        run_benchmarks(model, tokenizer, ["nothing"])
    with pytest.raises(ValueError, match="is no folder"):
        run_benchmarks(model, tokenizer, ["piqa"], data=tmp_path / "none")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    take_few_documents(monkeypatch)
    import lm_eval_tasks

    before = Path.cwd()
    found = lm_eval_tasks.main(["piqa", "arc_easy"], data=str(tmp_path), limit=4, samples=4)
    assert Path.cwd() == before
    assert set(found) == {"dense", "packed"}
    assert set(found["packed"]) == {"piqa, 0-shot", "arc_easy, 0-shot"}
    for row in found["packed"].values():
        assert row["questions"] == 4
        assert 0 <= row["metrics"]["acc"]["value"] <= 1
        assert row["seed"] == 0
        assert row["versions"]["lm_eval"]
        assert row["protocol"]["limit"] == 4
