# SPDX-License-Identifier: Apache-2.0
"""Figures are drawn from what was measured."""

import sys

import pytest
import torch
from tiny import save_dense, tokens
from transformers import AutoModelForCausalLM

from transformers_mcmoe import ODPConfig, set_expert_pruning
from transformers_mcmoe.integrations.plots import plot_expert_pruning, plot_quality_against_rate


@pytest.fixture
def model(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_dense("mixtral", tmp_path / "dense"), dtype=torch.float32)
    set_expert_pruning(model, ODPConfig(threshold=0.9))
    return model


def test_expert_pruning(model, tmp_path):
    with pytest.raises(ValueError, match="Nothing has been pruned"):
        plot_expert_pruning(model, tmp_path / "none.png")
    with torch.no_grad():
        model(tokens(1, 16))
    plot_expert_pruning(model, tmp_path / "layers.svg")
    drawn = (tmp_path / "layers.svg").read_text()
    assert "</svg>" in drawn
    assert drawn.count('<g id="line2d_') > 4


def test_quality_against_rate(tmp_path):
    rows = [{"row": name, "skipped_share": share, "kl": share**2} for name in "ab" for share in (0.2, 0.1, 0.3)]
    plot_quality_against_rate(rows, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"transformers-mcmoe\[plots\]"):
        plot_quality_against_rate([{"row": "a", "skipped_share": 0.1, "kl": 1.0}], tmp_path / "x.png")
