# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints in vLLM, on CPU and in an environment of its own (`make test-vllm`): the same tokens as in transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import compressed, load, quick_config, save_dense, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_mcmoe import MCMoEConfig, ODPConfig, OTPConfig, PruneConfig, RankConfig, set_expert_pruning, unpack
from transformers_mcmoe.integrations.exports import compressed as compressed_tensors
from transformers_mcmoe.integrations.vllm.loading import Packed, Part
from transformers_mcmoe.quantization import Grid, pack, quantize

ROOT = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm")) / "bin" / "python"
DEMO = ROOT / "examples" / "demo-mixtral"
RUN = Path(__file__).parent / "vllm_run.py"
NEW = 32
PROMPTS = [row.tolist() for row in tokens(3, 12, seed=5)]
# sizes that vLLM's attention on CPU takes, and groups that two ranks can share
SIZES = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.1}
NARROW = {"moe_intermediate_size": 64}
MIXED = {"group_size": 32, "attention_bits": (2, 3, 4, 8), "shared_expert_bits": (2, 3, 4, 8)}
FAMILIES = {
    "mixtral": SIZES | {"head_dim": 32},
    "qwen3_moe": SIZES | NARROW | {"head_dim": 32, "tie_word_embeddings": False},
    "qwen2_moe": SIZES | NARROW | {"shared_expert_intermediate_size": 128},
    # of real models: the only latent size that vLLM's attention takes
    "deepseek_v2": SIZES
    | NARROW
    | {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "num_key_value_heads": 4,
        "topk_method": "group_limited_greedy",
    },
}
# averages that let the program mix widths of linear layers
BITS = {"mixtral": 3.0, "qwen3_moe": 3.0, "qwen2_moe": 3.0, "deepseek_v2": 2.2}
vllm = pytest.mark.vllm


def started(job, **environment):
    """Process of a job in vLLM's environment."""
    if not PYTHON.exists():
        pytest.skip(f"vLLM's environment {PYTHON.parent.parent} is not there; make test-vllm builds it")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
    if job.get("options", {}).get("tensor_parallel_size", 1) == 1:
        settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(PYTHON), str(RUN), json.dumps(job)],
        env=clean | settings | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280,
        check=False,
    )  # fmt: skip


def served(folder, **options):
    """New tokens of PROMPTS in vLLM."""
    return result(started({"model": str(folder), "prompts": PROMPTS, "tokens": NEW, "options": options}))


def result(done):
    """What a job found."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@torch.no_grad()
def expected(model):
    """New tokens of PROMPTS in transformers."""
    own = [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None) for ids in PROMPTS
    ]
    found = [new[0, len(ids) :].tolist() for new, ids in zip(own, PROMPTS, strict=True)]
    assert max(len(set(new)) for new in found) > 3, found  # one repeated token would show little
    return found


def packed(family, folder, changes=None, **options):
    """A tiny packed model and its folder."""
    dense = save_dense(family, folder / "dense", **(FAMILIES[family] | (changes or {})))
    model = compressed(dense, quick_config(**(MIXED | {"bits": BITS[family]} | options)))
    model.save_pretrained(folder / "packed")
    return model, folder / "packed"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return packed("mixtral", tmp_path_factory.mktemp("vllm"), odp=ODPConfig(protect=0))


@vllm
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_the_same_tokens(family, tmp_path):
    model, folder = packed(family, tmp_path)
    # joint layers have matrices of different widths
    assert len(set(model.config.quantization_config.plan.linears.values())) > 1
    assert served(folder) == expected(model)


@vllm
@pytest.mark.parametrize(
    "prune",
    [None, pytest.param(PruneConfig(0.25, method="naee"), marks=pytest.mark.slow)],
    ids=["all", "dropped"],
)
def test_deepseek(prune, tmp_path):
    # vLLM's latent attention on CPU generates other tokens than transformers, from dense weights too: so both are vLLM's here
    model, folder = packed("deepseek_v2", tmp_path, prune=prune, bits=2.0)
    unpack(model).save_pretrained(tmp_path / "plain")
    plain = served(tmp_path / "plain")
    assert served(folder) == plain
    if prune is not None:  # latents are computed by both ranks, and either lacks experts
        both = served(folder, tensor_parallel_size=2, enable_expert_parallel=True)
        # the dense model's own tokens change with the number of ranks there: the first ones are compared
        assert [new[:3] for new in both] == [new[:3] for new in plain]


@vllm
def test_expert_pruning(mixtral, tmp_path):
    model, folder = mixtral
    pruned, odp = expected(model), model.config.quantization_config.odp
    set_expert_pruning(model, odp=False)
    whole = expected(model)
    model.save_pretrained(tmp_path / "whole")
    set_expert_pruning(model, odp=odp)  # the model is shared
    assert pruned != whole  # else nothing is shown
    assert served(folder) == pruned
    assert served(tmp_path / "whole") == whole


@vllm
@pytest.mark.parametrize("parallel", [{}, {"enable_expert_parallel": True}], ids=["tensor", "expert"])
def test_two_ranks(parallel, mixtral):
    model, folder = mixtral
    assert served(folder, tensor_parallel_size=2, **parallel) == expected(model)


@vllm
@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"enable_expert_parallel": True}], ids=["tensor", "expert"])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_two_ranks_of_other_families(family, parallel, tmp_path):
    model, folder = packed(family, tmp_path, odp=ODPConfig(protect=0))
    assert served(folder, tensor_parallel_size=2, **parallel) == expected(model)


@vllm
@pytest.mark.slow
def test_more_ranks_than_key_heads(tmp_path):
    model, folder = packed("mixtral", tmp_path, changes={"num_key_value_heads": 1})
    assert served(folder, tensor_parallel_size=2) == expected(model)


@vllm
def test_compiled(tmp_path):
    # top-3, so that thresholds of slots differ
    model, folder = packed("qwen3_moe", tmp_path, changes={"num_experts_per_tok": 3}, odp=ODPConfig(protect=0))
    assert len(set(next(iter(model.config.quantization_config.odp.thresholds.values())))) > 1
    assert served(folder, enforce_eager=False) == expected(model)


@vllm
@pytest.mark.slow
def test_learned_pruning(tmp_path):
    otp = OTPConfig(target=0.3, steps=2, tokens=512, batch_tokens=128)
    model, folder = packed("qwen3_moe", tmp_path, otp=otp, dataset=tokens(16, 32), num_samples=16)
    pruned = expected(model)
    assert served(folder) == pruned
    assert served(folder, enforce_eager=False) == pruned
    set_expert_pruning(model, otp=False)
    assert expected(model) != pruned


@vllm
def test_dropped_experts(tmp_path):
    model, folder = packed("mixtral", tmp_path, prune=PruneConfig(ratio=0.25), bits=2.0)
    assert any(len(w.kept) < 8 for w in model.config.quantization_config.plan.experts.values())
    assert served(folder) == expected(model)


@vllm
@pytest.mark.parametrize(
    "kind",
    [
        "missing expert",
        "truncated",
        "missing norm",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("missing linear", "misnamed", "missing router")),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(kind, mixtral, tmp_path):
    _, folder = mixtral
    tensors = load_file(folder / "model.safetensors")
    expert = next(name for name in tensors if ".experts.3.w2" in name)
    linear = "model.layers.1.self_attn.k_proj.weight"
    name = {
        "missing linear": linear,
        "missing router": "model.layers.0.block_sparse_moe.gate.weight",
        "missing norm": "model.layers.1.input_layernorm.weight",
    }.get(kind, expert)
    tensor = tensors.pop(name)
    if kind == "misnamed":
        tensors[name.replace("w2", "w4")] = tensor
    if kind == "truncated":
        tensors[name] = tensor[:-1].clone()
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = started({"model": str(tmp_path), "prompts": PROMPTS, "tokens": 1})
    assert done.returncode != 0
    assert f"'{name}'" in done.stdout, done.stdout[-3000:]


@vllm
def test_an_export_needs_no_plugin(tmp_path):
    four = {"bits": 4.0, "expert_bits": (4,), "attention_bits": 4, "shared_expert_bits": 4, "granularity": "layer"}
    model, folder = packed("mixtral", tmp_path, symmetric=True, **four)
    compressed_tensors.export(str(folder), tmp_path / "out")
    # another engine's kernels, which round otherwise: the first tokens are the same
    done = started({"model": str(tmp_path / "out"), "prompts": PROMPTS, "tokens": 3, "options": {"dtype": "bfloat16"}})
    if "No WNA16 MoE backend" in done.stdout:
        pytest.skip("vLLM's 4-bit experts run on processors with AMX or of Arm, which this is not")
    found, wanted = result(done), expected(model)
    assert [new[:3] for new in found] == [new[:3] for new in wanted]


@vllm
def test_low_rank_factors_are_refused(tmp_path):
    _, folder = packed(
        "mixtral", tmp_path, rank=RankConfig(32, base=True), attention_bits=4, shared_expert_bits=4, bits=5.0
    )
    done = started({"model": str(folder), "prompts": PROMPTS, "tokens": 1})
    assert done.returncode != 0
    assert "low-rank factors, which the vLLM plugin does not serve" in done.stdout, done.stdout[-3000:]


def matrix(rows=6, columns=96, bits=3, group_size=32):
    weight = torch.randn(rows, columns)
    return pack(quantize(weight, bits, group_size, Grid()))


def test_ranks_take_their_rows_and_columns():
    whole = matrix()
    left = Part("a", 3, (6, 96), (6, 0), (32, 0), 32)
    right = Part("a", 3, (6, 96), (6, 0), (64, 32), 32)
    upper = Part("b", 3, (6, 96), (2, 4), (96, 0), 32)
    held = Packed({0: left, 1: right, "b": upper})
    parameter = held.parameter()
    for key in (0, 1, "b"):
        held.load(parameter, key, whole)
    held.check()
    assert torch.equal(torch.cat([held.view(parameter, 0), held.view(parameter, 1)], dim=1), whole)
    assert torch.equal(held.view(parameter, "b"), whole[4:])


def test_columns_are_cut_between_groups():
    with pytest.raises(ValueError, match=r"48 of the 96 columns of 'a.weight'.*multiple of the group size 32"):
        Part("a.weight", 3, (6, 96), (6, 0), (48, 0), 32)


def test_what_is_missing_or_wrong_is_named():
    held = Packed({0: Part("a.weight", 3, (6, 96), (6, 0), (96, 0), 32)})
    parameter = held.parameter()
    with pytest.raises(ValueError, match=r"lacks the packed tensor 'a.weight'"):
        held.check()
    for wrong in (matrix(rows=5), matrix(bits=2), torch.zeros(6, 96)):
        with pytest.raises(ValueError, match=r"'a.weight' is torch\.\w+ of shape .* the plan says"):
            held.load(parameter, 0, wrong)


@pytest.mark.slow
def test_vllm_is_not_imported_with_the_package():
    code = (
        "import sys, transformers_mcmoe.integrations.vllm as plugin; plugin.register(); print('vllm' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout == "False\n"
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model, packed, with its tokenizer."""
    folder = tmp_path_factory.mktemp("demo") / "packed"
    # groups of 64, as two ranks share rows of 128
    config = MCMoEConfig(2.54, group_size=64, odp=ODPConfig(protect=0), dataset=tokens(16, 64) * 12, num_samples=16)
    AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def server(folder, port, *options):
    """Command of vLLM's HTTP server."""
    if not PYTHON.exists():
        pytest.skip(f"vLLM's environment {PYTHON.parent.parent} is not there; make test-vllm builds it")
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    return [*command, "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", *options]


def answers_of(folder, prompts, new):
    """Greedy answers in transformers."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


QUESTIONS = ["The function returns a", "Return True if the", "class collections.deque(", "Changed in version 3.", "import os\n",
             "A string is", "The module defines", "Raises ValueError if"]  # fmt: skip


@vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sixteen_clients_for_two_minutes(demo, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from http_load import ask, free_port, running

    port = free_port()
    with running(server(demo, port), port, tmp_path / "log"):
        load = ask(port, str(demo), QUESTIONS, clients=16, seconds=120, new_tokens=24)
    assert not load.errors, load.errors[:3]
    wanted = answers_of(demo, QUESTIONS, 24)
    assert len(load.answers) > 100
    assert {text for which, text in load.answers if text != wanted[which]} == set()


@vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_launchers(demo, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from http_load import ask, free_port, running

    port, meeting = free_port(), free_port()
    options = [
        "--tensor-parallel-size",
        "2",
        "--nnodes",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(meeting),
    ]
    other = [str(PYTHON), str(Path(__file__).parent / "vllm_headless.py"), *server(demo, port)[3:]]
    with (
        running([*other, *options, "--node-rank", "1", "--headless"], port, tmp_path / "log1", health=False),
        running([*server(demo, port), *options, "--node-rank", "0"], port, tmp_path / "log0", timeout=400),
    ):
        load = ask(port, str(demo), QUESTIONS, clients=2, seconds=10, new_tokens=24)
    assert not load.errors, load.errors[:3]
    wanted = answers_of(demo, QUESTIONS, 24)
    assert load.answers
    assert {text for which, text in load.answers if text != wanted[which]} == set()
