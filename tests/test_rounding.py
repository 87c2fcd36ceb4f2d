# SPDX-License-Identifier: Apache-2.0
"""Experts are rounded in parts, on several threads, and come out as if they had been rounded whole."""

import os

import pytest
import torch
from tiny import quick_config, tiny_model

from transformers_mcmoe.calibration.hessians import ExpertHessians, Hessian
from transformers_mcmoe.models.experts import find_experts
from transformers_mcmoe.pipeline import rounding
from transformers_mcmoe.pipeline.rounding import ExpertRounder
from transformers_mcmoe.plan import ROLES


@pytest.fixture(scope="module")
def experts():
    return next(iter(find_experts(tiny_model("mixtral")).values()))


def _counted(experts):
    """Hessians of four experts, of 64 random tokens each."""
    hidden = experts.projections[0].in_features
    counted = ExpertHessians(experts, range(4))
    for expert in range(4):
        counted.record(expert, torch.randn(64, hidden, generator=torch.Generator().manual_seed(expert)))
    return counted


def _flipped(experts):
    """Targets: the experts' own matrices with their rows the other way round."""
    own = {role: [p for p in experts.projections if p.role == role] for role in ROLES}
    return {
        role: {n: torch.cat([experts.matrix(n, p.name) for p in names]).float().flip(0) for n in range(4)}
        for role, names in own.items()
    }


def _rounded(experts, counted, method, targets=None):
    """Packed matrices of both roles, experts 2 and 3 bits wide by turns."""
    hessians = {role: Hessian(h.total.clone(), h.tokens) for role, h in counted.roles.items()}  # they are used up
    rounder = ExpertRounder(experts, range(4), hessians if method == "gptq" else {}, quick_config(rounding=method))
    found = {}
    for role in ROLES:
        for bits in (2, 3):
            own = [n for n in range(4) if n % 2 == bits - 2]
            given = None if targets is None else targets[role]
            for expert, packed in rounder.round_role(role, own, bits, given).items():
                found |= {(expert, name): matrix for name, matrix in packed.items()}
    return found


@pytest.fixture
def on_threads(monkeypatch):
    """Sets the number of threads, with cores for them; the caller's is back in the end."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _differing(a, b):
    """The share of bytes that differ."""
    assert a.keys() == b.keys()
    assert all(a[name].shape == b[name].shape for name in a)
    return sum(int((a[name] != b[name]).sum()) for name in a) / sum(matrix.numel() for matrix in a.values())


@pytest.mark.parametrize("method", ["gptq", "nearest"])
@pytest.mark.parametrize(("together", "rows"), [(1, 24), (1 << 13, 512)])
def test_threads_change_nothing(experts, monkeypatch, on_threads, method, together, rows):
    monkeypatch.setattr(rounding, "TOGETHER", together)
    monkeypatch.setattr(rounding, "LEAST_ROWS", rows)
    hessians, found = _counted(experts), []
    for threads in (1, 3):
        on_threads(threads)
        found.append(_rounded(experts, hessians, method))
    assert len({expert for expert, _ in found[0]}) == 4
    assert _differing(*found) == 0


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("method", ["gptq", "nearest"])
def test_rows_of_parts_come_together_in_their_order(experts, monkeypatch, on_threads, method, given):
    on_threads(2)
    targets = _flipped(experts) if given else None
    hessians = _counted(experts)
    whole = _rounded(experts, hessians, method, targets)
    monkeypatch.setattr(rounding, "TOGETHER", 1)
    monkeypatch.setattr(rounding, "LEAST_ROWS", 10)
    # products of fewer rows may be summed in another order
    assert _differing(_rounded(experts, hessians, method, targets), whole) < (0.02 if method == "gptq" else 1e-9)
    assert _differing(_rounded(experts, hessians, method, None if given else _flipped(experts)), whole) > 0.02
