# SPDX-License-Identifier: Apache-2.0
"""MCMoEConfig: what is refused and how, JSON round trips, and plans and memory limits in all their forms."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_mcmoe import MCMoEConfig, Plan
from transformers_mcmoe.config import ODPConfig, OTPConfig, PruneConfig, RankConfig
from transformers_mcmoe.plan import ExpertWidths

PLAN = Plan({"model.layers.0.mlp.experts": ExpertWidths((1, 2), (1, 3))}, {"model.layers.0.self_attn.q_proj": 4})
# every option that is stored, none at its default
OPTIONS: dict[str, Any] = {
    "bits": 2.05,
    "expert_bits": (1, 2, 4),
    "attention_bits": 8,
    "shared_expert_bits": 16,
    "group_size": 64,
    "budget": "layer",
    "allocation": "frequency",
    "alpha": 0.5,
    "beta": 2,
    "gamma": 0.0,
    "eps": "nearest",
    "at_least": {4: 1, 2: 2},
    "rounding": "nearest",
    "fit": "minmax",
    "symmetric": True,
    "integer_zeros": True,
    "act_order": False,
    "image_weight": 2.0,
    "damping": 0.1,
    "sequential": False,
    "sweeps": 5,
    "activations": "dense",
    "granularity": "expert",
    "tuning_steps": 9,
    "tuning_rate": 0.01,
    "dataset": "org/name:subset",
    "num_samples": 7,
    "seq_len": 77,
    "modules_to_not_convert": ["model.layers.0"],
    "seed": 5,
    "plan": PLAN,
    "prune": PruneConfig(0.3, method="reap"),
    "rank": RankConfig(64, base=True),
    "odp": ODPConfig(rate=0.2),
    "otp": OTPConfig(target=0.3, on=False),
}


def test_defaults():
    data = MCMoEConfig().to_dict()
    assert data == {
        "quant_method": "mcmoe",
        "format_version": 1,
        "average_bits": 2.54,
        "expert_bits": [1, 2, 3, 4],
        "attention_bits": [4, 8],
        "shared_expert_bits": [4, 8],
        "group_size": 128,
        "budget": "model",
        "allocation": "pmq",
        "alpha": 0.0,
        "beta": 0.0,
        "gamma": 2.0,
        "eps": "final",
        "granularity": "projection",
        "expert_parallel": 1,
        "at_least": {},
        "preset": None,
        "rounding": "gptq",
        "fit": "search",
        "symmetric": False,
        "integer_zeros": False,
        "act_order": True,
        "image_weight": 1.0,
        "damping": 0.01,
        "sequential": True,
        "sweeps": 2,
        "activations": "compressed",
        "tuning_steps": 0,
        "tuning_rate": 2e-3,
        "dataset": None,
        "num_samples": 128,
        "seq_len": 2048,
        "modules_to_not_convert": [],
        "seed": 0,
        "plan": None,
        "prune": None,
        "rank": None,
        "odp": None,
        "otp": None,
    }


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({}, "model"),
        ({"rounding": "nearest"}, "model"),
        ({"allocation": "bsp", "expert_bits": (2, 4)}, "model"),
        ({"allocation": "uniform"}, "layer"),
        ({"allocation": "f_norm"}, "layer"),
        ({"eps": "nearest"}, "layer"),
        ({"preset": "paper"}, "layer"),
        ({"budget": "layer"}, "layer"),
        ({"allocation": "frequency", "budget": "model"}, "model"),
    ],
)
def test_budget(options: dict[str, Any], budget: str):
    config = MCMoEConfig(**options)
    assert config.budget == budget
    assert MCMoEConfig.from_dict(config.to_dict()).budget == budget


@pytest.mark.parametrize("options", [{}, OPTIONS, {"bits": 3, "dataset": {"path": "org/name", "field": "content"}}])
def test_json_round_trip(options: dict[str, Any]):
    config = MCMoEConfig(**options)
    back = MCMoEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back.to_dict() == config.to_dict()
    for name, value in options.items():
        assert getattr(back, name) == value, name
    assert json.loads(config.to_json_string()) == json.loads(back.to_json_string())


def test_every_option_is_in_the_round_trip():
    assert set(OPTIONS) == set(MCMoEConfig().to_dict()) - {
        "quant_method",
        "format_version",
        "average_bits",
        "preset",
        "expert_parallel",  # does not go with prune; see below
    } | {"bits"}
    assert MCMoEConfig.from_dict(MCMoEConfig(expert_parallel=4).to_dict()).expert_parallel == 4
    defaults = MCMoEConfig()
    assert all(getattr(defaults, name) != value for name, value in OPTIONS.items())


def test_average_has_a_name_that_the_hub_accepts():
    for data in (MCMoEConfig(bits=2.3).to_dict(), dict(MCMoEConfig(bits=2.3)), MCMoEConfig(bits=2.3).to_diff_dict()):
        assert data["average_bits"] == 2.3
        assert "bits" not in data


def test_to_dict_is_a_copy():
    config = MCMoEConfig(at_least={3: 1})
    data = config.to_dict()
    data["expert_bits"].append(8)
    data["at_least"].clear()
    assert config.to_dict()["expert_bits"] == [1, 2, 3, 4]
    assert config.to_dict()["at_least"] == {"3": 1}


@pytest.mark.parametrize(
    ("dataset", "stored"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), None),
        (["a text"], None),
        ([[1, 2], [3, 4]], None),
        (Path("some") / "calib.txt", "calib.txt"),  # no folder of this machine
        (__file__, "test_config.py"),
        ("org/name", "org/name"),
        ({"path": "org/name"}, {"path": "org/name"}),
    ],
)
def test_only_json_is_stored(dataset: Any, stored: Any, tmp_path: Path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(PLAN.to_dict()), encoding="utf-8")
    config = MCMoEConfig(
        dataset=dataset,
        tokenizer=object(),
        work_dir=tmp_path,
        max_memory="12GB",
        device="cpu",
        progress=print,
        plan=file,
        at_least={3: 1},
        modules_to_not_convert=("lm_head",),
    )
    data = json.loads(json.dumps(config.to_dict()))
    assert data["dataset"] == stored
    assert not {"tokenizer", "work_dir", "max_memory", "device", "progress"} & set(data)
    assert data["plan"] == PLAN.to_dict()
    assert isinstance(json.loads(config.to_json_string()), dict)


def test_runtime_options_are_kept_in_memory(tmp_path: Path):
    config = MCMoEConfig(work_dir=str(tmp_path), device="cpu", progress=print, tokenizer="name")
    assert config.work_dir == tmp_path
    assert config.device == torch.device("cpu")
    assert config.progress is print
    assert config.tokenizer == "name"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, r"bits=0 is not valid: it must be a number in \(0, 8\]"),
        ({"bits": -1.0}, r"bits=-1\.0 is not valid"),
        ({"bits": 8.01}, r"bits=8\.01 is not valid"),
        ({"bits": float("nan")}, "bits=nan is not valid"),
        ({"bits": "2.5"}, r"bits='2\.5' is not valid"),
        ({"bits": None}, "bits=None is not valid"),
        ({"expert_bits": ()}, r"expert_bits=\(\) is not valid: .* distinct ascending widths out of \(1, 2, 3, 4, 8\)"),
        ({"expert_bits": (1, 5)}, r"expert_bits=\(1, 5\) is not valid"),
        ({"expert_bits": (0, 1)}, r"expert_bits=\(0, 1\) is not valid"),
        ({"expert_bits": (2, 1)}, r"expert_bits=\(2, 1\) is not valid"),
        ({"expert_bits": [1, 1, 2]}, r"expert_bits=\(1, 1, 2\) is not valid"),
        ({"expert_bits": "123"}, "expert_bits=.* is not valid"),
        ({"attention_bits": 5}, r"attention_bits=5 is not valid: it must be one of \(1, 2, 3, 4, 8, 16\)"),
        ({"attention_bits": 0}, "attention_bits=0 is not valid"),
        ({"shared_expert_bits": 32}, r"shared_expert_bits=32 is not valid: it must be one of \(1, 2, 3, 4, 8, 16\)"),
        ({"group_size": 100}, "group_size=100 is not valid: it must be a positive multiple of 32"),
        ({"group_size": 0}, "group_size=0 is not valid"),
        ({"group_size": -32}, "group_size=-32 is not valid"),
        ({"group_size": 64.0}, r"group_size=64\.0 is not valid"),
        ({"budget": "expert"}, r"budget='expert' is not valid: it must be one of \('layer', 'model'\)"),
        ({"allocation": "best"}, r"allocation='best' is not valid: it must be one of \('pmq', 'uniform'"),
        ({"allocation": "bsp"}, "allocation='bsp' is not valid: it must be used with budget='model', two expert_bits"),
        ({"allocation": "bsp", "budget": "model"}, "two expert_bits such as"),
        ({"eps": "gptq"}, r"eps='gptq' is not valid: it must be one of \('final', 'nearest'\)"),
        ({"rounding": "rtn"}, r"rounding='rtn' is not valid: it must be one of \('gptq', 'nearest'\)"),
        ({"fit": "mse"}, r"fit='mse' is not valid: it must be one of \('search', 'minmax', 'hqq'\)"),
        ({"fit": "hqq", "symmetric": True}, "fit='hqq' solves for a free zero; leave symmetric and integer_zeros out"),
        ({"symmetric": 1}, "symmetric=1 is not valid: it must be True or False"),
        ({"act_order": None}, "act_order=None is not valid"),
        ({"damping": 1.5}, r"damping=1\.5 is not valid: it must be in \[0, 1\)"),
        ({"activations": "raw"}, r"activations='raw' is not valid: it must be one of \('compressed', 'dense'\)"),
        (
            {"preset": "quick"},
            r"preset='quick' is not valid: it must be one of \('fast', 'default', 'best', 'paper'\)",
        ),
        ({"attention_bits": (4, 8), "budget": "layer"}, "must be one width, or used with allocation='pmq'"),
        ({"shared_expert_bits": (4, 8), "at_least": {3: 1}}, "must be one width, or used with allocation='pmq'"),
        ({"attention_bits": (8, 4)}, "must be distinct ascending widths"),
        ({"target_size": "big"}, "target_size='big' is not valid: it must be bytes, or a string like '12GB'"),
        ({"target_size": "16GB", "bits": 2.0}, r"left out with bits=2\.0: both set the size"),
        ({"sweeps": -1}, "sweeps=-1 is not valid: it must be an integer >= 0"),
        ({"tuning_steps": 1.5}, r"tuning_steps=1\.5 is not valid: it must be an integer >= 0"),
        ({"tuning_rate": 0}, r"tuning_rate=0 is not valid: it must be in \(0, 1\)"),
        ({"granularity": "projection", "alpha": 1}, "granularity='projection' is not valid: it must be used with"),
        ({"preset": "paper", "gamma": 1.0}, r"preset='paper' sets gamma=2\.0, but gamma=1\.0 is given; drop one"),
        ({"preset": "paper", "budget": "model"}, "preset='paper' sets budget='layer', but budget='model' is given"),
        ({"alpha": -1}, "alpha=-1 is not valid: it must be a number >= 0"),
        ({"beta": float("nan")}, "beta=nan is not valid"),
        ({"gamma": "2"}, "gamma='2' is not valid"),
        (
            {"at_least": {8: 1}},
            r"at_least=\{8: 1\} is not valid: .* from widths of expert_bits \(1, 2, 3, 4\) to counts",
        ),
        ({"at_least": {3: -1}}, r"at_least=\{3: -1\} is not valid"),
        ({"num_samples": 0}, "num_samples=0 is not valid: it must be a positive integer"),
        ({"num_samples": 1.5}, r"num_samples=1\.5 is not valid"),
        ({"seq_len": -1}, "seq_len=-1 is not valid: it must be a positive integer"),
        ({"max_memory": "lots"}, "max_memory='lots' is not valid: it must be bytes, or a string like '12GB'"),
        ({"max_memory": 0}, "max_memory=0 is not valid"),
        ({"max_memory": -5}, "max_memory=-5 is not valid"),
        ({"max_memory": "12"}, "max_memory='12' is not valid"),
        ({"max_memory": "GB"}, "max_memory='GB' is not valid"),
        ({"max_memory": "-1GB"}, "max_memory='-1GB' is not valid"),
        ({"max_memory": "0GB"}, "max_memory='0GB' is not valid"),
        ({"max_memory": "12XB"}, "max_memory='12XB' is not valid"),
        ({"plan": "missing.json"}, r"plan='missing\.json' is not a file; give the path of a plan in JSON, or a dict"),
        ({"plan": {"linears": {}}}, "this one has no 'experts'"),
    ],
)
def test_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MCMoEConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"expert_bits": 3},
        {"expert_bits": (1.0, 2.0)},
        {"attention_bits": 4.0},
        {"at_least": {"three": 1}},
        {"at_least": {3: 0.5}},
        {"modules_to_not_convert": "lm_head"},
        {"max_memory": "1.2.3GB"},
        {"seed": -1},
        {"seed": "0"},
    ],
    ids=str,
)
def test_refused_by_name_before_work_starts(options: dict[str, Any]):
    """Values that would fail deep inside a compression, or be taken for something else."""
    (name,) = options
    with pytest.raises(ValueError, match=rf"{name}=.* is not valid"):
        MCMoEConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 1},
        {"expert_bits": [8]},
        {"attention_bits": 16, "shared_expert_bits": 1},
        {"group_size": 32},
        {"at_least": {3: 0}},
        {"at_least": {"3": 1, "2": 1}},
        {"alpha": 0, "beta": 0, "gamma": 0},
        {"num_samples": 1, "seq_len": 1},
    ],
    ids=str,
)
def test_limits_are_accepted(options: dict[str, Any]):
    MCMoEConfig(**options)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("12GB", 12 * 10**9),
        ("8GiB", 8 * 2**30),
        ("1.5TB", 15 * 10**11),
        ("512 MiB", 512 * 2**20),
        (" 3kb ", 3000),
        ("100B", 100),
        ("2kib", 2048),
        (123456789, 123456789),
    ],
)
def test_max_memory(value: Any, expected: int):
    assert MCMoEConfig(max_memory=value).max_memory_bytes == expected


def test_unknown_option():
    with pytest.raises(TypeError, match="MCMoEConfig has no option 'bit'"):
        MCMoEConfig(bit=2)
    with pytest.raises(TypeError):
        MCMoEConfig(2.0, (1, 2))  # options are given by name


def test_from_dict_ignores_unknown_keys(caplog):
    data = MCMoEConfig(bits=2.3).to_dict() | {"zeta": 1, "odp": None, "a_future_key": {}}
    before = copy.deepcopy(data)
    with caplog.at_level(logging.WARNING, "transformers_mcmoe"):
        config = MCMoEConfig.from_dict(data)
    assert config.to_dict() == MCMoEConfig(bits=2.3).to_dict()
    assert "Ignoring unknown keys of quantization_config: a_future_key, zeta." in caplog.text
    assert data == before


def test_from_dict_is_quiet_about_known_keys(caplog):
    with caplog.at_level(logging.WARNING, "transformers_mcmoe"):
        MCMoEConfig.from_dict(MCMoEConfig(**OPTIONS).to_dict())
    assert caplog.text == ""


def test_from_dict_refuses_newer_formats():
    data = MCMoEConfig().to_dict() | {"format_version": 2}
    with pytest.raises(ValueError, match=r"mcmoe format version 2, this release reads up to 1; update"):
        MCMoEConfig.from_dict(data)


def test_from_dict_validates():
    with pytest.raises(ValueError, match="bits=99 is not valid"):
        MCMoEConfig.from_dict({"quant_method": "mcmoe", "average_bits": 99})
    with pytest.raises(ValueError, match="PruneConfig has no option 'rate'"):
        MCMoEConfig.from_dict({"quant_method": "mcmoe", "prune": {"rate": 0.5}})


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (1.0, r"prune=1\.0 is not valid: it must be a share in \(0, 1\)"),
        (0, r"prune=0 is not valid"),
        ("half", r"prune='half' is not valid: it must be True, False or a PruneConfig"),
        ({"method": "best"}, r"method='best' is not valid: it must be one of \('moe_i2'"),
        ({"importance": "global"}, r"importance='global' is not valid"),
        ({"importance": "loss", "method": "reap"}, r"importance='loss' is not valid: it must be 'local' with another"),
        ({"candidates": 0}, r"candidates=0 is not valid: it must be an integer >= 1"),
        ({"population": 3}, r"population=3 is not valid"),
        ({"tokens": 1.5}, r"tokens=1\.5 is not valid"),
    ],
)
def test_prune_options(prune, message):
    with pytest.raises(ValueError, match=message):
        MCMoEConfig(prune=prune)


def test_prune_shorthand():
    assert MCMoEConfig(prune=0.4).prune == PruneConfig(0.4)
    assert MCMoEConfig(prune=True).prune == PruneConfig()
    assert MCMoEConfig(prune={"ratio": 0.4, "method": "naee"}).prune == PruneConfig(0.4, "naee")
    assert MCMoEConfig(prune=False).prune is None


def test_from_dict_returns_unused_kwargs():
    config, unused = MCMoEConfig.from_dict({"average_bits": 2.3}, return_unused_kwargs=True, seed=3, other=1)
    assert (config.bits, config.seed, unused) == (2.3, 3, {"other": 1})


def test_plan_forms(tmp_path: Path):
    plain, report = tmp_path / "plan.json", tmp_path / "report.json"
    plain.write_text(json.dumps(PLAN.to_dict()), encoding="utf-8")
    report.write_text(json.dumps({"plan": PLAN.to_dict(), "seconds": 1}), encoding="utf-8")
    for plan in (PLAN, PLAN.to_dict(), plain, str(plain), report):
        assert MCMoEConfig(plan=plan).plan == PLAN
    assert MCMoEConfig().plan is None


def test_broken_plan_file_is_named(tmp_path: Path):
    file = tmp_path / "plan.json"
    for text in ("{", "[1]"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"plan"):
            MCMoEConfig(plan=file)


def test_transformers_knows_the_method():
    from transformers.quantizers.auto import AutoQuantizationConfig

    config = AutoQuantizationConfig.from_dict(MCMoEConfig(bits=2.3).to_dict())
    assert isinstance(config, MCMoEConfig)
    assert config.bits == 2.3


def test_preset_of_the_paper():
    config = MCMoEConfig(preset="paper", alpha=1.0)
    assert (config.alpha, config.beta, config.gamma, config.eps) == (1.0, 1.5, 2.0, "nearest")
    assert config.at_least == {3: 1, 2: 1}
    assert MCMoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


def test_expert_pruning():
    config = MCMoEConfig(odp=True)
    assert config.odp == ODPConfig()
    assert MCMoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))).odp == config.odp
    assert MCMoEConfig(odp={"rate": 0.2}).odp == ODPConfig(rate=0.2)
    # beside a packed checkpoint, None keeps what it was saved with
    assert MCMoEConfig().get_loading_attributes() == {"asked": {}}
    assert MCMoEConfig(odp=False).get_loading_attributes() == {"asked": {"odp": False}}
    assert MCMoEConfig(odp=False).to_dict() == MCMoEConfig().to_dict()
    with pytest.raises(ValueError, match="odp='fast'"):
        MCMoEConfig(odp="fast")
