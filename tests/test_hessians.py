# SPDX-License-Identifier: Apache-2.0
"""Hessians against sums over the tokens that reach each matrix, in modules of both kinds; which inputs are shared."""

from __future__ import annotations

import pytest
import torch
from tiny import save_dense, tiny_model, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from transformers_mcmoe.calibration import hessians
from transformers_mcmoe.calibration.hessians import (
    RIDGE,
    DownHessians,
    ExpertHessians,
    Hessian,
    observe_linears,
    probe_inputs,
)
from transformers_mcmoe.calibration.observing import BlockChange
from transformers_mcmoe.calibration.statistics import hessian_error
from transformers_mcmoe.models.experts import ListExperts, find_experts

IDS = tokens(4, 16)


class Expert(nn.Module):
    """A gated MLP, as remote code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.w2 = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sums_are_additive():
    x, y = _random(30, 6), _random(20, 6, seed=1)
    parts = [Hessian.zeros(2, 6, torch.device("cpu")) for _ in range(2)]
    parts[0].add(1, x)
    parts[1].add(1, y.to(torch.bfloat16))
    total = parts[0] + parts[1]
    whole = torch.cat((x, y.to(torch.bfloat16).float()))
    torch.testing.assert_close(total.total[1], whole.T @ whole)
    assert total.tokens.tolist() == [0, 50]
    assert total.total[0].abs().max() == 0
    assert parts[0].tokens.tolist() == [0, 30]  # the operands are unchanged
    assert total.traces().tolist() == pytest.approx([0.0, float(whole.square().sum() / 50)])


@pytest.mark.parametrize("size", [4, 8, 11, 16])
def test_blocks_are_mirrored(size: int, monkeypatch):
    monkeypatch.setattr(hessians, "BLOCK", 4)
    x, y = _random(30, size), _random(20, size, seed=1)
    counted = Hessian.zeros(2, size, torch.device("cpu"))
    counted.add(0, x)
    torch.testing.assert_close(counted.total[0], x.T @ x)
    counted.add(0, y)
    counted.add(1, y)
    torch.testing.assert_close(counted.total[0], x.T @ x + y.T @ y)
    torch.testing.assert_close(counted.total[1], y.T @ y)


@torch.no_grad()
def test_experts_of_one_layer():
    """Every token of an expert counts once, at its input and at what its down projection reads."""
    model = tiny_model("mixtral").eval()
    experts = find_experts(model)["model.layers.1.mlp.experts"]
    counted = ExpertHessians(experts, [1, 4])
    seen: dict[int, list[Tensor]] = {}

    def record(expert: int, x: Tensor, weights: Tensor | None, position: Tensor | None) -> None:
        seen.setdefault(expert, []).append(x)
        counted.record(expert, x, weights)

    with experts.observe(record):
        for ids in IDS:
            model(ids[None])
    module = model.model.layers[1].mlp.experts
    for n, expert in enumerate(counted.which):
        x = torch.cat(seen[expert])
        gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        inner = module.act_fn(gate) * up
        torch.testing.assert_close(counted.roles["gate_up"].total[n], x.T @ x)
        torch.testing.assert_close(counted.roles["down"].total[n], inner.T @ inner)
        assert int(counted.roles["down"].tokens[n]) == len(x)
    counted.clear(4)
    assert counted.roles["gate_up"].tokens[1] == 0
    assert counted.roles["down"].total[1].abs().max() == 0
    assert counted.roles["down"].total[0].abs().max() > 0
    assert ExpertHessians.bytes_per_expert(experts) == sum(h.total[0].nbytes for h in counted.roles.values())


@torch.no_grad()
def test_experts_in_a_list_that_are_observed_and_idle():
    """Counting runs an expert while its module has hooks and another forward; neither gets in the way."""
    torch.manual_seed(0)
    experts = ListExperts("experts", nn.ModuleList(Expert() for _ in range(3)))
    counted, x = ExpertHessians(experts, [0, 1, 2]), _random(10, 8)
    with experts.idle(), experts.observe(counted.record):
        assert experts.children[1](x).abs().max() == 0
    child = experts.children[1]
    inner = nn.functional.silu(child.w1(x)) * child.w3(x)
    torch.testing.assert_close(counted.roles["gate_up"].total[1], x.T @ x)
    torch.testing.assert_close(counted.roles["down"].total[1], inner.T @ inner)
    assert counted.roles["down"].tokens.tolist() == [0, 10, 0]
    torch.testing.assert_close(child(x), child.w2(inner))  # the forward is back


@torch.no_grad()
def test_linears_that_read_one_tensor_share_a_hessian(tmp_path):
    folder = save_dense("deepseek_v3", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layer = model.model.layers[1]
    modules = {name: m for name, m in layer.named_modules() if type(m) is nn.Linear}
    experts = [e for path, e in find_experts(model).items() if path.startswith("model.layers.1.")]
    groups, busy = probe_inputs(modules, experts, lambda: model(IDS[:1]))
    assert not busy
    assert ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"] in groups.values()
    assert ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"] in groups.values()
    assert sorted(path for paths in groups.values() for path in paths) == sorted(modules)

    leaders = {path: Hessian.zeros(1, modules[path].in_features, torch.device("cpu")) for path in groups}
    inputs: dict[str, list[Tensor]] = {path: [] for path in modules}
    for path, module in modules.items():
        module.register_forward_pre_hook(lambda m, args, path=path: inputs[path].append(args[0]))
    with observe_linears(modules, leaders):
        model(IDS)
    for leader, paths in groups.items():
        for path in paths:
            x = torch.cat(inputs[path]).flatten(0, -2)
            torch.testing.assert_close(leaders[leader].total[0], x.T @ x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_linear_behind_the_experts_is_noticed():
    model = tiny_model("mixtral").eval()
    first = {"q": model.model.layers[0].self_attn.q_proj}
    second = {"q": model.model.layers[1].self_attn.q_proj}
    experts = [find_experts(model)["model.layers.0.mlp.experts"]]
    assert not probe_inputs(first, experts, lambda: model(IDS[:1]))[1]
    assert probe_inputs(second, experts, lambda: model(IDS[:1]))[1]
    never = {"q": nn.Linear(2, 2)}
    assert probe_inputs(never, experts, lambda: model(IDS[:1])) == ({}, False)


@torch.no_grad()
def test_change_of_a_block():
    change, x = BlockChange(), _random(2, 5, 8)
    assert change.similarity == 1.0
    turned = nn.Linear(8, 8, bias=False)
    turned.weight.data = -torch.eye(8)
    with change.observe(turned):
        turned(x)
    assert (change.similarity, change.tokens) == (pytest.approx(-1.0), 10)
    turned(x)
    assert change.tokens == 10  # no longer observed


def test_hessian_error():
    experts = ListExperts("experts", nn.ModuleList(Expert() for _ in range(2)))
    matrices = {p.name: experts.matrix(0, p.name) + 0.5 for p in experts.projections}
    error = hessian_error(experts, 0, matrices, {"gate_up": 3.0, "down": 2.0})
    assert error == pytest.approx(0.25 * (3.0 * 2 * 8 * 12 + 2.0 * 8 * 12))


def test_down_projections_make_up_for_what_they_read():
    experts = ListExperts("experts", nn.ModuleList(Expert() for _ in range(2)))
    rounded = {1: {name: experts.matrix(1, name).float().mul(4).round() / 4 for name in ("w1", "w3")}}
    x = _random(200, 8)
    counted = DownHessians(experts, rounded)
    for part in x.split(50):
        counted.record(1, part)
    counted.record(0, x)  # not one of its experts
    down = experts.matrix(1, "w2").double()
    wanted = experts.inputs(1, x)["down"].double() @ down.T
    now = experts.inputs(1, x, rounded[1])["down"].double()
    torch.testing.assert_close(counted.hessian.total[0].double(), now.T @ now, rtol=1e-4, atol=1e-4)
    # ridge regression towards the dense matrix
    ridge = RIDGE * (now.T @ now).diagonal().mean() * torch.eye(12, dtype=torch.float64)
    solved = torch.linalg.solve(now.T @ now + ridge, now.T @ wanted + ridge @ down.T).T
    target = counted.targets()[1]
    torch.testing.assert_close(target.double(), solved, rtol=1e-3, atol=1e-4)
    assert (now @ target.double().T - wanted).norm() < 0.9 * (now @ down.T - wanted).norm()


def test_down_projections_of_experts_without_tokens_stay():
    experts = ListExperts("experts", nn.ModuleList(Expert() for _ in range(2)))
    counted = DownHessians(experts, {0: {name: experts.matrix(0, name) for name in ("w1", "w3")}})
    counted.record(0, _random(20, 8))
    counted.clear(0)
    assert torch.equal(counted.targets()[0], experts.matrix(0, "w2"))
