# SPDX-License-Identifier: Apache-2.0
"""PackedLinear and PackedExperts against the dense modules they replace, with the same rounded weights."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import relative_rms
from torch import Tensor, nn
from torch.nn import functional
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from transformers_mcmoe.models.experts import FusedExperts
from transformers_mcmoe.nn import PackedExperts, PackedLinear
from transformers_mcmoe.plan import ExpertWidths
from transformers_mcmoe.quantization import WIDTHS, group_size_for, pack, quantize

E, H = 6, 64
GROUP = 64
LEAVES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
FAMILIES = ("mixtral", "gpt_oss", "nemotron_h")
# every width, and projections of one expert that differ
WIDTHS_OF = ExpertWidths((1, 2, 3, 4, 8, 2), (1, 2, 3, 4, 8, 4))


def _empty(family: str) -> nn.Module:
    """A dense experts module; its intermediate size needs padding."""
    sizes = {"hidden_size": H, "num_experts_per_tok": 2}
    if family == "mixtral":
        return MixtralExperts(MixtralConfig(num_local_experts=E, intermediate_size=80, **sizes))
    if family == "gpt_oss":
        return GptOssExperts(GptOssConfig(num_local_experts=E, intermediate_size=72, **sizes))
    config = NemotronHConfig(n_routed_experts=E, moe_intermediate_size=80, layers_block_type=["moe"], **sizes)
    return NemotronHExperts(config)


def _experts(family: str) -> nn.Module:
    """A dense experts module with random weights and biases."""
    module, random = _empty(family), torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) * 0.2
    return module.eval()


def _pack(family: str, widths: ExpertWidths = WIDTHS_OF, guard: bool = False) -> PackedExperts:
    """The packed form of `_experts(family)`, filled by rounding the dense matrices to nearest."""
    experts = FusedExperts("model.experts", _experts(family))
    dense = {
        (e, p.name): (experts.matrix(e, p.name).clone(), experts.bias(e, p.name))
        for e in range(E)
        for p in experts.projections
    }
    packed = PackedExperts(experts, widths, GROUP, {p.name: LEAVES[p.name] for p in experts.projections}, guard)
    for expert in range(E):
        for projection in experts.projections:
            bits = widths.of_role(projection.role)[expert]
            if not bits:
                continue
            linear = packed.linear(expert, projection.name)
            weight, bias = dense[expert, projection.name]
            assert linear.weight is not None
            linear.weight.data = pack(quantize(weight, bits, group_size_for(weight.shape[1], GROUP)))
            if bias is not None:
                linear.bias.data.copy_(bias)
    return packed


def _routing(tokens: int, slots: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, H], distinct expert ids [T, K] and weights [T, K]."""
    random = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, E, generator=random).argsort(1)[:, :slots]
    weights = torch.rand(tokens, slots, generator=random) + 0.1
    return torch.randn(tokens, H, generator=random), index, weights


def _dense(packed: PackedExperts) -> nn.Module:
    return copy.deepcopy(packed).restore(torch.float32)


def _reference(packed: PackedExperts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The dense module slot by slot with the restored weights, ids outside the kept experts left out."""
    dense = _dense(packed)
    output = torch.zeros_like(x)
    for token in range(len(x)):
        for slot in range(index.shape[1]):
            expert = int(index[token, slot])
            if expert < E and packed.widths.gate_up[expert]:
                one = slice(token, token + 1), slice(slot, slot + 1)
                output[token] += dense(x[one[0]], index[one], weights[one])[0]
    return output


class TestPackedLinear:
    def _linear(self, bits: int, in_features: int = 100, bias: torch.dtype | None = None) -> PackedLinear:
        linear = PackedLinear(in_features, 24, bits, 128, bias)
        if linear.weight is not None:
            weight = torch.randn(24, in_features, generator=torch.Generator().manual_seed(0))
            linear.weight.data = pack(quantize(weight, bits, group_size_for(in_features, 128)))
        if linear.bias is not None:
            linear.bias.data.copy_(torch.arange(24.0))
        return linear

    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize("in_features", [100, 192])
    def test_dequantize(self, bits: int, in_features: int):
        weight = torch.randn(24, in_features, generator=torch.Generator().manual_seed(0))
        expected = quantize(weight, bits, group_size_for(in_features, 128)).dequantize()
        linear = self._linear(bits, in_features)
        assert torch.equal(linear.dequantize(torch.float32), expected)
        assert torch.equal(linear.dequantize(torch.bfloat16), expected.bfloat16())

    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize("shape", [(0,), (1,), (5,), (2, 3)])
    @pytest.mark.parametrize("bias", [None, torch.float32])
    def test_forward(self, bits: int, shape: tuple[int, ...], bias: torch.dtype | None):
        linear = self._linear(bits, bias=bias)
        x = torch.randn(*shape, 100)
        y, expected = linear(x), functional.linear(x, linear.dequantize(torch.float32), linear.bias)
        assert y.shape == expected.shape
        assert not y.numel() or relative_rms(y, expected) <= 1e-6

    def test_made_in_inference_mode(self):
        with torch.inference_mode():
            linear, x = copy.deepcopy(self._linear(3)), torch.randn(2, 100)
            assert linear.weight.is_inference()
            assert relative_rms(linear(x), functional.linear(x, linear.dequantize(torch.float32))) <= 1e-6

    def test_dtype_follows_the_input(self):
        linear = self._linear(4, bias=torch.float32)
        x = torch.randn(5, 100, dtype=torch.bfloat16)
        expected = functional.linear(x, linear.dequantize(torch.bfloat16), torch.arange(24.0).bfloat16())
        assert linear(x).dtype == torch.bfloat16
        assert relative_rms(linear(x), expected) <= 5e-3

    @pytest.mark.parametrize("bias", [None, torch.float32])
    def test_no_bits_give_zeros(self, bias: torch.dtype | None):
        linear = self._linear(0, bias=bias)
        y = linear(torch.randn(2, 3, 100, dtype=torch.bfloat16))
        assert torch.equal(y, torch.zeros(2, 3, 24, dtype=torch.bfloat16))
        assert torch.equal(linear.dequantize(torch.float16), torch.zeros(24, 100, dtype=torch.float16))
        assert dict(linear.state_dict()) == {}
        assert list(linear.parameters()) == []

    def test_state_dict(self):
        state = self._linear(3).state_dict()
        assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
            "weight": (torch.uint8, (24, 1, 128 * 3 // 8 + 4))
        }
        state = self._linear(3, bias=torch.bfloat16).state_dict()
        assert {name: t.dtype for name, t in state.items()} == {"weight": torch.uint8, "bias": torch.bfloat16}
        other = PackedLinear(100, 24, 3, 128, torch.bfloat16)
        other.load_state_dict(state)
        assert torch.equal(other.dequantize(torch.float32), self._linear(3).dequantize(torch.float32))

    def test_codes_are_a_fixed_parameter(self):
        linear = self._linear(3, bias=torch.float32)
        assert dict(linear.named_buffers()) == {}
        assert [name for name, p in linear.named_parameters() if p.requires_grad] == ["bias"]

    def test_casts_leave_the_record_alone(self):
        linear = self._linear(3, bias=torch.float32)
        before = linear.weight.clone()
        linear.half()
        assert linear.weight.dtype == torch.uint8
        assert torch.equal(linear.weight, before)
        assert linear.bias.dtype == torch.float16

    def test_meta(self):
        linear = PackedLinear(96, 24, 2, 128, torch.float32, "meta")
        assert linear.weight.is_meta
        assert linear.bias.is_meta
        assert linear.weight.shape == (24, 1, 28)

    def test_repr(self):
        assert repr(self._linear(3)) == "PackedLinear(in_features=100, out_features=24, bits=3, bias=False)"
        assert "bits=8, bias=True" in repr(self._linear(8, bias=torch.float32))
        assert "bits=0, bias=False" in repr(self._linear(0))


@pytest.mark.parametrize("family", FAMILIES)
class TestPackedExperts:
    @pytest.mark.parametrize("tokens", [0, 1, 2, 33])
    def test_equals_dense(self, family: str, tokens: int):
        packed = _pack(family)
        x, index, weights = _routing(tokens)
        with torch.no_grad():
            y, expected = packed(x, index, weights), _dense(packed)(x, index, weights)
        assert y.shape == expected.shape == (tokens, H)
        if tokens:
            assert relative_rms(y, expected) <= 1e-6

    def test_equals_original_at_eight_bits(self, family: str):
        """Against the weights from before packing: projections, gates and biases are where they were."""
        packed = _pack(family, ExpertWidths.of([8] * E))
        x, index, weights = _routing(33)
        with torch.no_grad():
            assert relative_rms(packed(x, index, weights), _experts(family)(x, index, weights)) <= 0.02

    def test_half_precision(self, family: str):
        packed = _pack(family).bfloat16()
        x, index, weights = _routing(33)
        with torch.no_grad():
            y = packed(x.bfloat16(), index, weights)
            expected = _dense(packed)(x.bfloat16().float(), index, weights)
        assert y.dtype == torch.bfloat16
        assert relative_rms(y, expected) <= 0.02

    def test_keywords(self, family: str):
        packed = _pack(family)
        x, index, weights = _routing(5)
        names = ("router_indices", "routing_weights") if family == "gpt_oss" else ("top_k_index", "top_k_weights")
        assert torch.equal(packed(x, **dict(zip(names, (index, weights), strict=True))), packed(x, index, weights))

    def test_unrouted_experts(self, family: str):
        packed = _pack(family)
        x, _, weights = _routing(7)
        index = torch.tensor([[4, 1]]).expand(7, 2)
        with torch.no_grad():
            assert relative_rms(packed(x, index, weights), _dense(packed)(x, index, weights)) <= 1e-6

    def test_sentinel_is_skipped(self, family: str):
        packed = _pack(family)
        x, index, weights = _routing(9)
        index[::2, 0] = E
        index[3] = E
        with torch.no_grad():
            y, expected = packed(x, index, weights), _reference(packed, x, index, weights)
        assert relative_rms(y, expected) <= 1e-6
        assert (y[3] == 0).all()
        assert (y[0] != 0).any()

    def test_all_slots_dropped(self, family: str):
        packed = _pack(family)
        x, index, weights = _routing(5)
        assert torch.equal(packed(x, torch.full_like(index, E), weights), torch.zeros(5, H))

    def test_dropped_experts(self, family: str):
        widths = ExpertWidths((0, 2, 3, 0, 8, 2), (0, 2, 3, 0, 4, 2))
        packed = _pack(family, widths)
        x, index, weights = _routing(33)
        assert (index == 0).any()
        with torch.no_grad():
            y = packed(x, index, weights)
            assert relative_rms(y, _reference(packed, x, index, weights)) <= 1e-6
            assert relative_rms(y, _dense(packed)(x, index, weights)) <= 1e-6  # its weights and biases are zeros
        names = [name.split(".")[0] for name, _ in packed.named_parameters()]
        assert set(names) == {"1", "2", "4", "5"}

    def test_repeated_expert(self, family: str):
        packed = _pack(family)
        x, index, weights = _routing(7, slots=3)
        index[:, 1] = index[:, 0]
        with torch.no_grad():
            y = packed(x, index, weights)
            assert relative_rms(y, _reference(packed, x, index, weights)) <= 1e-6
            merged = weights[:, :2].sum(1, keepdim=True)
            once = packed(x, index[:, [0, 2]], torch.cat((merged, weights[:, 2:]), 1))
            assert relative_rms(y, once) <= 1e-5

    def test_gradients_equal_dense(self, family: str):
        packed = _pack(family)
        dense = _dense(packed)
        x, index, weights = _routing(9)
        dy = torch.randn(9, H)
        gradients = []
        for module in (packed, dense):
            inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
            module(inputs[0], index, inputs[1]).backward(dy)
            gradients.append([t.grad for t in inputs])
        for ours, theirs in zip(*gradients, strict=True):
            assert relative_rms(ours, theirs) <= 1e-5
        assert all(p.grad is None for p in packed.parameters() if p.dtype == torch.uint8)

    def test_inputs_are_not_changed(self, family: str):
        packed = _pack(family)
        inputs = _routing(5)
        before = [t.clone() for t in inputs]
        packed(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))

    def test_state_dict_holds_records_and_biases(self, family: str):
        packed = _pack(family)
        projections = ("w2", "w3") if family == "nemotron_h" else ("w1", "w2", "w3")
        expected = {f"{e}.{leaf}.weight" for e in range(E) for leaf in projections}
        assert {name for name, t in packed.state_dict().items() if t.dtype == torch.uint8} == expected
        biases = {f"{e}.{leaf}.bias" for e in range(E) for leaf in projections} if family == "gpt_oss" else set()
        assert {name for name, t in packed.state_dict().items() if t.dtype != torch.uint8} == biases
        shapes = {t.dim() for name, t in packed.state_dict().items() if name.endswith("weight")}
        assert shapes == {3}

    def test_deepcopy_is_independent(self, family: str):
        packed = _pack(family)
        x, index, weights = _routing(9)
        with torch.no_grad():
            before = packed(x, index, weights)
            other = copy.deepcopy(packed)
            assert torch.equal(other(x, index, weights), before)
            for parameter in other.parameters():
                parameter.zero_()
            assert (other(x, index, weights) == 0).all()
            other.restore(torch.float32)
            assert torch.equal(packed(x, index, weights), before)
        assert not any(
            hasattr(packed._experts.module, name) and getattr(packed._experts.module, name) is not None
            for name in packed._experts.parameter_names()
        )

    def test_restore(self, family: str):
        packed = _pack(family)
        original = _experts(family)
        module = packed.restore(torch.float32)
        assert type(module) is type(original)
        assert {n: p.shape for n, p in module.named_parameters()} == {
            n: p.shape for n, p in original.named_parameters()
        }
        restored, dense = FusedExperts("", module), FusedExperts("", original)
        for expert in range(E):
            for p in restored.projections:
                bits = packed.widths.of_role(p.role)[expert]
                size = group_size_for(p.in_features, GROUP)
                expected = quantize(dense.matrix(expert, p.name), bits, size).dequantize()
                assert torch.equal(restored.matrix(expert, p.name), expected)
                if (bias := dense.bias(expert, p.name)) is not None:
                    assert torch.equal(restored.bias(expert, p.name), bias)

    def test_restore_dtype(self, family: str):
        module = _pack(family).restore(torch.bfloat16)
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}

    def test_guard(self, family: str):
        packed = _pack(family, guard=True)
        name = "up_proj" if family == "nemotron_h" else "gate_up_proj"
        assert packed.state_dict()[name].shape == (0,)
        assert packed.state_dict()[name].dtype == torch.uint8
        assert not packed.get_parameter(name).requires_grad
        x, index, weights = _routing(5)
        assert torch.equal(packed(x, index, weights), _pack(family)(x, index, weights))

    def test_made_on_meta(self, family: str):
        with torch.device("meta"):
            module = _empty(family)
        experts = FusedExperts("model.experts", module)
        packed = PackedExperts(experts, WIDTHS_OF, GROUP, {p.name: p.name for p in experts.projections}, False, "meta")
        assert all(p.is_meta for p in packed.parameters())
        assert len(list(packed.parameters())) == len(list(_pack(family).parameters()))

    def test_repr(self, family: str):
        assert "num_experts=6, gate_up=123482" in repr(_pack(family))
