# SPDX-License-Identifier: Apache-2.0
"""Training of packed matrices' grids: gradients against autograd, and tuning of whole models on the dense model's output."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tiny import compressed, load_class, save_dense, tokens
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import AutoModel

from transformers_mcmoe import MCMoEConfig, compression_report
from transformers_mcmoe.kernels import cpu
from transformers_mcmoe.models.stream import LoadedRunner, computing
from transformers_mcmoe.nn import PackedLinear
from transformers_mcmoe.quantization import group_size_for, pack, quantize, unpack
from transformers_mcmoe.tuning import TunedLinear, training

DEMO = Path(__file__).parent.parent / "examples" / "demo-mixtral"
OPTIONS = {"bits": 3.0, "dataset": tokens(8, 64), "num_samples": 8, "progress": lambda _: None}


def _packed(bits: int, columns: int, rows: int = 24) -> PackedLinear:
    linear = PackedLinear(columns, rows, bits, 64)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    linear.weight.data = pack(quantize(weight, bits, group_size_for(columns, 64)))
    return linear


@pytest.mark.parametrize("columns", [128, 80])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_gradients_are_those_of_the_rebuilt_matrix(bits: int, columns: int):
    base = _packed(bits, columns)
    tuned = TunedLinear(base)
    x = torch.randn(5, 3, columns, requires_grad=True)
    torch.testing.assert_close(tuned(x), functional.linear(x, base.dequantize(torch.float32)))
    with torch.no_grad():
        tuned.factor.mul_(torch.rand_like(tuned.factor) + 0.5)
        tuned.shift.add_(torch.randn_like(tuned.shift))
    factor, shift, y = (t.detach().clone().requires_grad_() for t in (tuned.factor, tuned.shift, x))
    own = unpack(base.weight.data, bits, columns)
    scale, zero = own.scale * factor, own.zero + shift
    weight = ((own.codes - zero[..., None]) * scale[..., None]).flatten(1)[:, :columns]
    wanted, found = functional.linear(y, weight), tuned(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    pull = torch.randn_like(wanted)
    wanted.backward(pull)
    found.backward(pull)
    for a, b in ((x, y), (tuned.factor, factor), (tuned.shift, shift)):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3)
    tuned.store()
    assert torch.equal(unpack(base.weight.data, bits, columns).codes, own.codes)
    torch.testing.assert_close(base.dequantize(torch.float32), weight.detach(), rtol=2e-3, atol=2e-3)


def test_products_follow_autocast():
    tuned, x = TunedLinear(_packed(3, 128)), torch.randn(40, 128, requires_grad=True)
    tuned(x).square().sum().backward()
    wanted = [t.grad.clone() for t in (x, tuned.factor, tuned.shift)]
    for t in (x, tuned.factor, tuned.shift):
        t.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = tuned(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for t, grad in zip((x, tuned.factor, tuned.shift), wanted, strict=True):
        assert t.grad.dtype == torch.float32
        assert float((t.grad - grad).norm() / grad.norm()) < 0.02


def test_zeros_can_be_kept():
    base = _packed(3, 64)
    tuned = TunedLinear(base, zeros=False)
    zero = unpack(base.weight.data, 3, 64).zero
    tuned(torch.randn(2, 64)).sum().backward()
    assert tuned.shift.grad is None
    tuned.store()
    assert torch.equal(unpack(base.weight.data, 3, 64).zero, zero)


def _codes(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: unpack(m.weight.data, m.bits, m.in_features).codes
        for name, m in model.named_modules()
        if isinstance(m, PackedLinear)
    }


# shared experts, biases, layer norms; after steps as large as the values themselves nothing can be better
@pytest.mark.parametrize(("family", "rate"), [("qwen2_moe", 2e-3), ("gpt_oss", 2e-3), ("phimoe", 0.9)])
def test_only_what_is_real_valued_moves(family: str, rate: float, tmp_path, monkeypatch):
    """Random models have next to nothing to win; what does not help on other sequences is left out."""
    # products in bfloat16 whatever the machine is good at
    monkeypatch.setattr(training, "BF16", cpu.instruction_sets()[0] if cpu.instruction_sets() else "")
    dense = save_dense(family, tmp_path / "dense")
    plain = compressed(dense, MCMoEConfig(**OPTIONS))
    tuned = compressed(dense, MCMoEConfig(**OPTIONS, tuning_steps=2, tuning_rate=rate))
    told = compression_report(tuned)["tuning"]
    assert told["steps"] == 2
    assert told["kept"] == (told["after"] < told["before"])
    assert not (told["kept"] and rate > 0.5)
    before, after = _codes(plain), _codes(tuned)
    assert all(torch.equal(before[name], after[name]) for name in before)
    same = [torch.equal(a, b) for a, b in zip(plain.parameters(), tuned.parameters(), strict=True)]
    assert all(same) != told["kept"]
    assert not any(parametrize.is_parametrized(module) for module in tuned.modules())
    assert {type(m) for m in plain.modules()} == {type(m) for m in tuned.modules()}
    tuned.save_pretrained(tmp_path / "packed")
    again = load_class(dense).from_pretrained(tmp_path / "packed", dtype=torch.float32)
    ids = tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, tuned(ids).logits)


@pytest.mark.slow
def test_a_trained_model_comes_closer_to_the_dense_one():
    options = {"dataset": list(topics.values()), "num_samples": 24, "seq_len": 256, "progress": lambda _: None}
    config = MCMoEConfig(2.2, **options, allocation="uniform", sweeps=0, sequential=False, tuning_steps=10)
    told = compression_report(compressed(DEMO, config))["tuning"]
    assert told["kept"]
    assert told["after"] < told["before"]


def test_models_without_a_head_are_refused_before_anything_is_read(tmp_path):
    dense = save_dense("mixtral", tmp_path / "dense")
    config = MCMoEConfig(**OPTIONS, tuning_steps=2)
    with pytest.raises(ValueError, match="has no output head, which tuning_steps, 'auto' and"):
        AutoModel.from_pretrained(dense, quantization_config=config)


def test_one_sequence_is_refused_and_a_given_plan_still_needs_data(tmp_path):
    dense = save_dense("mixtral", tmp_path / "dense")
    with pytest.raises(ValueError, match="tuning_steps needs two calibration sequences or more"):
        compressed(dense, MCMoEConfig(bits=3.0, dataset=tokens(1, 64), num_samples=1, tuning_steps=2))
    plan = compressed(dense, MCMoEConfig(**OPTIONS)).config.quantization_config.plan
    options = OPTIONS | {"plan": plan, "rounding": "nearest", "tuning_steps": 2}
    report = compression_report(compressed(dense, MCMoEConfig(**options)))
    assert report["tuning"]["steps"] == 2
    assert report["calibration_tokens"] == 8 * 64


@pytest.mark.parametrize("loaded", [False, True])
def test_the_teachers_states_are_the_dense_models(loaded: bool, tmp_path):
    from test_stream import _open

    dense = save_dense("qwen3_moe", tmp_path / "dense")
    runner = _open(dense, tmp_path)
    if loaded:
        runner = LoadedRunner(runner.weights, runner.layers, runner.tokens, 48, "a test")
    done: list[int] = []
    with computing():
        found = runner.outputs(3, tmp_path / "states", lambda: done.append(1))
    model = load_class(dense).from_pretrained(dense, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    last = model.get_submodule(runner.layers[-1])
    last.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(torch.stack(runner.tokens.ids[:3]))
    torch.testing.assert_close(found[:], seen[0], rtol=1e-4, atol=1e-5)
    assert len(done) == len(runner.layers)
