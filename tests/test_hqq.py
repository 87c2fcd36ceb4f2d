# SPDX-License-Identifier: Apache-2.0
"""HQQ modules, state dicts and checkpoints to packed records and back, with modules of the real hqq package."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_moe import RemoteMoeConfig, RemoteMoeForCausalLM
from safetensors.torch import load_file, save_file
from tiny import compressed, load_class, relative_rms, save_dense, tiny_model, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from transformers_mcmoe import PackedLinear
from transformers_mcmoe.integrations.hqq import PackedTensors, convert_hqq, from_hqq, read_hqq, to_hqq
from transformers_mcmoe.quantization import WIDTHS, dequantize, pack, quantize

hqq = pytest.importorskip("hqq.core.quantize", reason="needs the hqq package: pip install 'transformers_mcmoe[hqq]'")

IDS = tokens(2, 16, seed=1)


def _hqq(
    out_features: int = 48,
    in_features: int = 128,
    bits: float = 4,
    group_size: int | None = 64,
    bias: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A random HQQLinear on CPU."""
    torch.manual_seed(seed)
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    config["weight_quant_params"] |= options
    return hqq.HQQLinear(nn.Linear(in_features, out_features, bias), config, compute_dtype=dtype, device="cpu")


def _dense(module: Any) -> Tensor:
    """What an HQQLinear stands for, computed in float32 by the package from its fields."""
    meta = {**module.meta, "compute_dtype": torch.float32}
    meta |= {key: meta[key].float() for key in ("scale", "zero")}
    return hqq.Quantizer.dequantize(module.W_q, meta)


def _same(linear: PackedLinear, module: Any, tolerance: float = 0.0) -> bool:
    """Same dequantized values; to the bit where grids are fp16 already."""
    return torch.allclose(linear.dequantize(torch.float32), _dense(module), rtol=0, atol=tolerance)


class TestModules:
    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize(
        ("in_features", "group_size", "expected"),
        [
            (128, 64, 64),
            (128, 128, 128),
            (96, 32, 32),
            (192, 96, 96),
            (128, None, 128),
            (100, None, 128),
            (40, 40, 64),
        ],
    )
    def test_values_are_kept(self, bits: int, in_features: int, group_size: int | None, expected: int):
        module = _hqq(in_features=in_features, bits=bits, group_size=group_size)
        linear = from_hqq(module)
        assert isinstance(linear, PackedLinear)
        assert (linear.bits, linear.weight.dtype) == (bits, torch.uint8)
        assert linear.weight.shape[-1] == expected * bits // 8 + 4
        assert not linear.weight.is_inference()
        assert _same(linear, module)

    @pytest.mark.parametrize(("bits", "stored"), [(1.58, 2), (5, 8), (6, 8)])
    def test_widths_between(self, bits: float, stored: int):
        module = _hqq(bits=bits)
        linear = from_hqq(module)
        assert linear.bits == stored
        assert _same(linear, module)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("bits", [2, 3, 8])
    def test_compute_dtypes(self, bits: int, dtype: torch.dtype):
        module = _hqq(bits=bits, dtype=dtype)
        if dtype == torch.float32:  # fp16 rounds what is half a step of a code's grid at most
            assert relative_rms(from_hqq(module).dequantize(torch.float32), _dense(module)) < 2**-10 * 2**bits
            return
        assert _same(from_hqq(module), module)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_view_as_float(self, bits: int):
        module = _hqq(bits=bits, view_as_float=True)
        assert module.W_q.is_floating_point()
        plain = _hqq(bits=bits)
        assert torch.equal(from_hqq(module).weight, from_hqq(plain).weight)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_codes_that_are_not_packed(self, bits: int):
        assert torch.equal(from_hqq(_hqq(bits=bits, bitpack=False)).weight, from_hqq(_hqq(bits=bits)).weight)

    def test_one_scale_for_the_matrix(self):
        module = _hqq(bits=4, channel_wise=False)
        assert module.meta["scale"].numel() == 1
        assert _same(from_hqq(module), module)

    def test_groups_that_cross_rows(self):
        module = _hqq(in_features=96, group_size=64)
        linear = from_hqq(module)
        assert linear.group_size == 32
        assert _same(linear, module)

    def test_group_size_of_the_result(self):
        module = _hqq(group_size=128)
        assert [from_hqq(module, size).weight.shape[1] for size in (32, 64, 128, 256)] == [4, 2, 1, 1]
        assert all(_same(from_hqq(module, size), module) for size in (32, 64, 128, 256))

    def test_common_group_size(self):
        linears = from_hqq({"a": _hqq(group_size=64), "b": _hqq(group_size=128, bits=2)})
        assert {linear.group_size for linear in linears.values()} == {64}

    def test_bias_and_output(self):
        module = _hqq(bias=True, dtype=torch.float32)
        x = torch.randn(5, 128)
        assert relative_rms(from_hqq(module)(x), module(x)) < 1e-2
        assert torch.equal(from_hqq(module).bias, module.bias)

    def test_the_package_computes_the_same(self):
        module = _hqq(bits=3, dtype=torch.float32)
        module.meta |= {key: module.meta[key].half().float() for key in ("scale", "zero")}
        assert torch.equal(from_hqq(module).dequantize(torch.float32), module.dequantize())

    @pytest.mark.parametrize("offloaded", [False, True])
    def test_quantized_grids_of_older_releases(self, offloaded: bool):
        module = _hqq(out_features=64, bits=2)
        for kind in ("scale", "zero"):
            words, meta = hqq.Quantizer.quantize(
                module.meta.pop(kind).float(), nbits=8, group_size=32, optimize=False, axis=0, device="cpu"
            )
            module.meta |= {f"{kind}_q": words, f"meta_{kind}": meta | {"compute_dtype": torch.float32}}
            module.meta[f"quant_{kind}"] = True
        module.meta["compute_dtype"] = module.compute_dtype = torch.float32
        expected = module.dequantize()
        if offloaded:
            module.meta["zero_scale"] = torch.stack((module.meta.pop("zero_q"), module.meta.pop("scale_q")))
        assert relative_rms(from_hqq(module).dequantize(torch.float32), expected) < 1e-3

    def test_grids_that_are_stacked(self):
        module = _hqq()
        expected = _dense(module)
        module.meta["zero_scale"] = torch.stack((module.meta.pop("zero"), module.meta.pop("scale")))
        assert torch.equal(from_hqq(module).dequantize(torch.float32), expected)


class TestRefused:
    def test_axis_0(self):
        with pytest.raises(ValueError, match=r"The HQQ matrix is grouped along out_features \(axis=0\)"):
            from_hqq(_hqq(out_features=64, axis=0))

    @pytest.mark.parametrize(("in_features", "group_size"), [(128, 16), (80, 40), (200, 40), (96, 48)])
    def test_groups_that_records_would_cut(self, in_features: int, group_size: int):
        with pytest.raises(ValueError, match=rf"'a' .* has HQQ groups of {group_size} weights, which cannot be kept"):
            from_hqq({"a": _hqq(in_features=in_features, group_size=group_size)})

    def test_a_given_group_size_that_does_not_fit(self):
        with pytest.raises(ValueError, match="cannot be kept with group_size=128"):
            from_hqq(_hqq(group_size=64), 128)

    @pytest.mark.parametrize("size", [0, -32, 48])
    def test_a_given_group_size_that_is_none(self, size: int):
        with pytest.raises(ValueError, match=f"group_size={size} is not valid"):
            from_hqq(_hqq(), size)

    @pytest.mark.parametrize(
        ("kind", "value"), [("scale", 1e-7), ("scale", 1e6), ("zero", 1e6), ("zero", float("nan"))]
    )
    def test_grids_beyond_fp16(self, kind: str, value: float):
        module = _hqq(dtype=torch.float32)
        module.meta[kind] = module.meta[kind].clone()  # the package leaves an inference tensor
        module.meta[kind][3] = value
        with pytest.raises(ValueError, match=f"The HQQ matrix has the {kind} .*, which fp16 cannot hold"):
            from_hqq(module)

    def test_nothing_to_convert(self):
        with pytest.raises(ValueError, match="Linear has no HQQLinear module"):
            from_hqq(nn.Linear(4, 4))
        with pytest.raises(ValueError, match="holds no HQQ matrix"):
            read_hqq({"weight": torch.zeros(4)})
        with pytest.raises(ValueError, match="'a' is a Linear, not an HQQLinear"):
            from_hqq({"a": nn.Linear(4, 4)})
        with pytest.raises(ValueError, match="Linear has no PackedLinear module"):
            to_hqq(nn.Linear(4, 4))

    def test_a_module_without_weights(self):
        with pytest.raises(ValueError, match="not a quantized HQQ matrix"):
            from_hqq(hqq.HQQLinear(None, None, device="cpu"))

    def test_damaged_fields(self):
        state = dict(_hqq().state_dict())
        for key, change, message in (
            ("packing", torch.tensor([120, 121], dtype=torch.uint8), "packing 'xy'"),
            ("scale", None, "has no scale"),
            ("scale", torch.ones(7), "7 scales, which do not divide"),
            ("W_q", torch.zeros(2, 64, dtype=torch.uint8), "codes for 6144 weights"),
        ):
            with pytest.raises(ValueError, match=message):
                read_hqq({**state, key: change})

    def test_a_model_is_left_alone_when_one_module_is_refused(self):
        model = nn.ModuleList([_hqq(), _hqq(group_size=16)])
        with pytest.raises(ValueError, match="cannot be kept"):
            from_hqq(model)
        assert all(isinstance(module, hqq.HQQLinear) for module in model)


class TestBack:
    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize(("in_features", "group_size"), [(128, 64), (100, 128), (96, 128), (200, 128), (64, 32)])
    def test_codes_and_grids_are_kept(self, bits: int, in_features: int, group_size: int):
        size = {128: 64, 100: 128, 96: 96, 200: 128, 64: 32}[in_features]
        linear = PackedLinear(in_features, 24, bits, group_size, torch.float16)
        weight = torch.randn(24, in_features)
        linear.weight.data = pack(quantize(weight, bits, size))
        linear.bias.data = torch.randn(24).half()
        module = to_hqq(linear, torch.float32)
        assert isinstance(module, hqq.HQQLinear)
        assert torch.equal(module.dequantize(), linear.dequantize(torch.float32))
        x = torch.randn(3, in_features)
        assert relative_rms(module(x), linear(x)) < 1e-5
        if module.meta["group_size"] >= 32:
            assert torch.equal(from_hqq(module).dequantize(torch.float32), linear.dequantize(torch.float32))

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_round_trip_of_modules(self, bits: int):
        module = _hqq(bits=bits, bias=True)
        again = to_hqq(from_hqq(module))
        assert torch.equal(again.W_q, module.W_q)
        for key in ("scale", "zero", "group_size", "shape", "packing", "axis"):
            same = again.meta[key] == module.meta[key]
            assert bool(same.all()) if isinstance(same, Tensor) else same
        x = torch.randn(3, 128).half()
        assert torch.equal(again(x), module(x))

    def test_its_state_dict_is_one_of_the_package(self):
        module = to_hqq(from_hqq(_hqq(bits=3, bias=True)))
        other = hqq.HQQLinear(None, None, device="cpu")
        other.load_state_dict(dict(module.state_dict()))
        assert torch.equal(other.dequantize(), module.dequantize())

    def test_few_groups_are_split_to_fill_words(self):
        linear = PackedLinear(32, 3, 4, 32)
        linear.weight.data = pack(quantize(torch.randn(3, 32), 4, 32))
        module = to_hqq(linear, torch.float32)
        assert module.meta["group_size"] == 16
        assert torch.equal(module.dequantize(), linear.dequantize(torch.float32))

    def test_padded_groups_that_hqq_has_not(self):
        linear = PackedLinear(131, 4, 4, 128)
        linear.weight.data = pack(quantize(torch.randn(4, 131), 4, 128))
        with pytest.raises(ValueError, match="no equal groups that HQQ could hold"):
            to_hqq(linear)

    def test_a_dropped_matrix(self):
        with pytest.raises(ValueError, match="The matrix 'a' was dropped"):
            to_hqq({"a": PackedLinear(32, 8, 0, 32)})

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch):
        linear = from_hqq(_hqq())
        monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
        with pytest.raises(ImportError, match=r"pip install 'transformers_mcmoe\[hqq\]'"):
            to_hqq(linear)


def _remote(bits: int = 2) -> Any:
    """A model whose experts are lists of linears, all of them but the routers in HQQ."""
    torch.manual_seed(0)
    model = RemoteMoeForCausalLM(RemoteMoeConfig()).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".experts." in name:
            config = hqq.BaseQuantizeConfig(nbits=bits, group_size=32)
            module = hqq.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            # what fp16 cannot hold is no matter here
            module.meta |= {key: module.meta[key].half().float() for key in ("scale", "zero")}
            model.set_submodule(name, module)
    return model


class TestModels:
    def test_in_place_and_back(self):
        model = _remote()
        with torch.no_grad():
            expected = model(IDS).logits
            assert from_hqq(model) is model
            assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 2 * 4 * 3
            assert relative_rms(model(IDS).logits, expected) < 1e-5
            assert to_hqq(model, torch.float32) is model
            assert sum(isinstance(m, hqq.HQQLinear) for m in model.modules()) == 2 * 4 * 3
            assert relative_rms(model(IDS).logits, expected) < 1e-5

    def test_packed_experts_run_in_hqq(self, tmp_path: Path):
        model = compressed(save_dense("mixtral", tmp_path))
        with torch.no_grad():
            expected = model(IDS).logits
            count = sum(isinstance(m, PackedLinear) for m in model.modules())
            to_hqq(model, torch.float32)
            assert sum(isinstance(m, hqq.HQQLinear) for m in model.modules()) == count
            assert relative_rms(model(IDS).logits, expected) < 1e-5


class TestStates:
    @pytest.mark.parametrize("bits", WIDTHS)
    def test_state_dict_of_a_module(self, bits: int):
        module = _hqq(bits=bits, bias=True)
        found = read_hqq(module.state_dict())
        assert set(found.tensors) == {"weight", "bias"}
        assert (found.matrices[""].bits, found.group_size) == (bits, 64)
        assert torch.equal(found.tensors["weight"], from_hqq(module).weight)

    def test_state_dict_of_a_model_and_its_file(self, tmp_path: Path):
        model = _remote(3)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        for source in (model.state_dict(), tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
            found = read_hqq(source)
            assert isinstance(found, PackedTensors)
            for name, matrix in found.matrices.items():
                weight = dequantize(found.tensors[f"{name}.weight"], matrix.bits, matrix.in_features)
                assert torch.equal(weight, _dense(model.get_submodule(name)))
            assert torch.equal(found.tensors["embed.weight"], model.embed.weight)
            assert not any("W_q" in name for name in found.tensors)

    def test_packed_tensors_to_modules(self):
        found = read_hqq(nn.ModuleDict({"a": _hqq(bias=True), "b": _hqq(bits=2)}).state_dict())
        modules = to_hqq(found)
        assert set(modules) == {"a", "b"}
        assert torch.equal(modules["b"].W_q, _hqq(bits=2).W_q)
        assert torch.equal(modules["a"].bias, _hqq(bias=True).bias)

    @pytest.mark.parametrize("nested", [False, True])  # older releases keep the fields in a dict "meta"
    def test_qmodel_pt(self, tmp_path: Path, nested: bool):
        module, norm = _hqq(bits=3, bias=True), nn.LayerNorm(8)
        module.encoded_state_dict = False
        state = dict(module.state_dict())
        if nested:
            state = {"W_q": state["W_q"], "bias": state["bias"], "meta": module.meta}
        torch.save({"model.a": state, "model.norm": dict(norm.state_dict())}, tmp_path / "qmodel.pt")
        found = read_hqq(tmp_path)
        assert torch.equal(found.tensors["model.a.weight"], from_hqq(module).weight)
        assert torch.equal(found.tensors["model.norm.weight"], norm.weight)

    def test_python_objects_are_not_unpickled(self, tmp_path: Path):
        file, mark = tmp_path / "qmodel.pt", tmp_path / "mark"

        class Trap:
            def __reduce__(self):
                return Path.touch, (mark,)

        torch.save({"a": Trap()}, file)
        with pytest.raises(ValueError, match="never unpickled here"):
            read_hqq(file)
        file.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(ValueError, match="never unpickled here"):
            read_hqq(file)
        assert not mark.exists()

    def test_no_checkpoint(self, tmp_path: Path):
        with pytest.raises(ValueError, match="neither an HQQ checkpoint's file nor a folder with one"):
            read_hqq(tmp_path / "missing")
        with pytest.raises(ValueError, match="neither an HQQ checkpoint's file nor a folder with one"):
            read_hqq(tmp_path)


def _hqq_checkpoint(folder: Path, family: str, keep: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """Writes a tiny model as HQQ does, under published names; returns the HQQLinear modules by name."""
    dense = save_dense(family, folder, **changes)
    tensors, modules = {}, {}
    for i, (name, tensor) in enumerate(sorted(load_file(dense / "model.safetensors").items())):
        quantized = tensor.dim() == 2 and "embed" not in name and "lm_head" not in name
        if not quantized or any(part in name for part in keep):
            tensors[name] = tensor
            continue
        path = name.removesuffix(".weight")
        linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        linear.weight.data = tensor
        # w1 and w3 must agree
        bits = (2, 3, 4)[i % 3] if "attn" in name else 3 if "w2" in name else 2
        config = hqq.BaseQuantizeConfig(nbits=bits, group_size=32)
        modules[path] = hqq.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
        tensors |= {f"{path}.{key}": value for key, value in modules[path].state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    (folder / "tokenizer.json").write_text("{}")
    return modules


class TestCheckpoints:
    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
    def test_loads_packed(self, tmp_path: Path, family: str):
        changes = {"intermediate_size": 96} if family == "mixtral" else {}
        modules = _hqq_checkpoint(tmp_path / "hqq", family, **changes)
        plan = convert_hqq(tmp_path / "hqq", tmp_path / "packed")
        model = load_class(tmp_path / "packed").from_pretrained(tmp_path / "packed", dtype=torch.float32)
        assert model.config.quantization_config.plan.to_dict() == plan.to_dict()
        packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
        routers = [name for name in modules if name.endswith("gate")]
        assert len(packed) == len(modules) - len(routers)
        assert (tmp_path / "packed" / "tokenizer.json").exists()

        dense = tiny_model(family, **changes)
        folder = save_dense(family, tmp_path / "dense", **changes)
        tensors = load_file(folder / "model.safetensors")
        tensors |= {f"{name}.weight": _dense(module) for name, module in modules.items()}
        tensors |= {f"{name}.weight": _dense(modules[name]).half().float() for name in routers}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            assert relative_rms(model(IDS).logits, dense(IDS).logits) < 1e-4

    def test_shards(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        _hqq_checkpoint(tmp_path / "hqq", "mixtral", intermediate_size=96)
        convert_hqq(tmp_path / "hqq", tmp_path / "one")
        monkeypatch.setattr("transformers_mcmoe.integrations.hqq.checkpoint._SHARD_BYTES", 20_000)
        convert_hqq(tmp_path / "hqq", tmp_path / "many")
        assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
        one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))

    def test_dense_layers_stay_dense(self, tmp_path: Path):
        _hqq_checkpoint(tmp_path / "hqq", "mixtral", keep=("layers.0.block_sparse_moe",), intermediate_size=96)
        plan = convert_hqq(tmp_path / "hqq", tmp_path / "packed")
        assert list(plan.experts) == ["model.layers.1.mlp.experts"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
        assert torch.isfinite(model(IDS).logits).all()

    @pytest.mark.parametrize(
        ("keep", "message"),
        [(("experts.3.w1",), "Some but not all experts"), (("block_sparse_moe",), "no routed experts in HQQ")],
    )
    def test_refused(self, tmp_path: Path, keep: tuple[str, ...], message: str):
        _hqq_checkpoint(tmp_path / "hqq", "mixtral", keep=keep, intermediate_size=96)
        with pytest.raises(ValueError, match=message):
            convert_hqq(tmp_path / "hqq", tmp_path / "packed")
        assert not (tmp_path / "packed").exists()

    def test_folders_of_the_user_are_not_touched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        _hqq_checkpoint(tmp_path / "hqq", "mixtral", intermediate_size=96)
        before = sorted(file.name for file in (tmp_path / "hqq").iterdir())
        with pytest.raises(ValueError, match="is not empty and holds no compressed model"):
            convert_hqq(tmp_path / "hqq", tmp_path / "hqq")

        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("transformers_mcmoe.integrations.hqq.checkpoint.save_file", fail)
        with pytest.raises(OSError, match="no space left"):
            convert_hqq(tmp_path / "hqq", tmp_path / "packed")
        assert [path.name for path in tmp_path.iterdir()] == ["hqq"]
        assert sorted(file.name for file in (tmp_path / "hqq").iterdir()) == before
