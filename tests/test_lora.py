# SPDX-License-Identifier: Apache-2.0
"""LoRA on packed models through PEFT's own calls: names, gradients, saving, several adapters, merging, trainers, the start."""

import contextlib
import copy
import logging
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from tiny import compressed, load, quick_config, relative_rms, save_dense, tokens

peft = pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from transformers_mcmoe import ODPConfig, PackedExperts, expert_pruning_stats, set_expert_pruning  # noqa: E402
from transformers_mcmoe.integrations import lora  # noqa: E402
from transformers_mcmoe.integrations.lora import initialization, registration, rounding, targets  # noqa: E402
from transformers_mcmoe.kernels import reference  # noqa: E402
from transformers_mcmoe.quantization import dequantize, group_size_for, pack, quantize  # noqa: E402

# PEFT and TRL call transformers' checkpointing by its old names
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing:FutureWarning")

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text")
IDS = tokens(2, 12, seed=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Packed checkpoints by family, made when they are asked for."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            config = quick_config(rounding="nearest", allocation="uniform", num_samples=1)
            compressed(save_dense(family, folder / "dense"), config).save_pretrained(folder / "packed")
            made[family] = folder
        return made[family]

    return make


@pytest.fixture
def packed(folders):
    """A packed Mixtral."""
    return load(folders("mixtral") / "packed")


def randomize(model, seed=0):
    """Adapters that change something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model, **options):
    return get_peft_model(model, LoraConfig(**({"r": 4, "target_modules": "all-linear"} | options)))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def factors(model):
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


# ---- the whole way, six families


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, folders, tmp_path):
    model = load(folders(family) / "packed")
    base = logits(model)
    packed_bytes = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    model = adapted(model)
    assert relative_rms(logits(model), base) <= 1e-6
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(3):
        with _routed(model) as routed:
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(float(loss.detach()))
        if len(losses) < 3:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    _check_gradients(model, routed)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load(folders(family) / "packed"), tmp_path)
    before, after = factors(model), factors(reloaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(reloaded), logits(model))
    now = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(now[name], value) for name, value in packed_bytes.items())


@contextlib.contextmanager
def _routed(model):
    """Experts with tokens in the calls meanwhile, by experts path; a sequence's last token predicts nothing."""
    found, handles = {}, []
    for path, module in model.named_modules():
        if isinstance(module, PackedExperts):

            def hook(module, args, kwargs, path=path):
                index = module.adapter.route(*args, *kwargs.values())[1]
                seen = index.view(-1, *IDS.shape, index.shape[-1])[:, :, :-1].unique()
                found[path] = {int(e) for e in seen if e < module.num_experts}

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    yield found
    for handle in handles:
        handle.remove()


def _check_gradients(model, routed):
    """A and B of every expert that saw tokens have gradients (A once B has left zero), those of others none, nothing else any."""
    state, seen = model.state_dict(), 0
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert parameter.grad is None
            assert not parameter.requires_grad
            continue
        assert parameter.grad is not None
        if parameter.dim() == 2:
            assert parameter.grad.any()
            continue
        path = name.partition(".gate_up.")[0].partition(".down.")[0]
        other = state[name.replace("lora_A", "lora_B")]
        for expert, gradient in enumerate(parameter.grad):
            moved = bool(other[expert].any()) or "lora_B" in name
            assert bool(gradient.any()) == (expert in routed[path] and moved), (name, expert)
            seen += expert in routed[path] and moved
    assert seen > 16


def test_gradients_equal_the_dense_models(packed):
    """Stacked factors get what autograd gives for dense weights W + s B A."""
    model = randomize(adapted(packed, target_modules=["experts"]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    name = "base_model.model.model.layers.0.mlp.experts.down.lora_A.default.weight"
    gradient = dict(model.named_parameters())[name].grad
    dense = copy.deepcopy(model.get_base_model())
    module = dense.model.layers[0].mlp.experts.down
    a, b = (factor["default"].weight.detach() for factor in (module.lora_A, module.lora_B))
    shift = a.clone().requires_grad_()
    module.lora_A["default"].weight.requires_grad_(False)
    plain = dense.model.layers[0].mlp.experts

    def forward(hidden_states, index, weights):
        output = torch.zeros_like(hidden_states)
        for e in range(8):
            w = {p: plain.linear(e, p).dequantize(torch.float32) for p in ("gate_proj", "up_proj", "down_proj")}
            up = plain.gate_up
            change = up.get_delta_weight("default")[e].detach()
            w["gate_proj"], w["up_proj"] = w["gate_proj"] + change[:100], w["up_proj"] + change[100:]
            w["down_proj"] = w["down_proj"] + module.scaling["default"] * b[e] @ shift[e]
            token, slot = torch.where(index == e)
            x = hidden_states[token]
            y = (torch.nn.functional.silu(x @ w["gate_proj"].T) * (x @ w["up_proj"].T)) @ w["down_proj"].T
            output = output.index_add(0, token, y * weights[token, slot, None])
        return output

    plain.forward = forward
    dense(input_ids=IDS, labels=IDS).loss.backward()
    assert relative_rms(gradient, shift.grad) <= 1e-4


def test_one_matrix_is_dequantized_at_a_time(packed, monkeypatch):
    """In forward and backward passes, reference path included."""
    alive, calls = [], []

    def watched(*args):
        assert not any(other() is not None for other in alive)
        weight = dequantize(*args)
        alive[:] = [weakref.ref(weight)]
        calls.append(weight.shape)
        return weight

    monkeypatch.setattr(reference, "dequantize", watched)
    model = randomize(adapted(packed))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(calls) >= 16


# ---- names

ROLES = {"gate_up", "down"}


def _adapted_names(model):
    return {name.rpartition(".lora_A")[0].rpartition(".")[2] for name in factors(model) if ".lora_A." in name}


@pytest.mark.parametrize(
    ("family", "names", "found"),
    [
        ("mixtral", ["q_proj", "experts"], {"q_proj"} | ROLES),
        ("mixtral", ["gate_proj", "up_proj", "down_proj"], ROLES),
        ("mixtral", ["w1", "w2", "w3"], ROLES),
        ("mixtral", ["w2"], {"down"}),
        ("mixtral", r".*\.experts\.\d+\.w[13]", {"gate_up"}),
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj", "q_proj"], {"q_proj"} | ROLES),
        ("qwen3_moe", ["gate_up_proj"], {"gate_up"}),
        ("granitemoe", "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj"} | ROLES),
        # a shared expert that was not packed is no router, whatever its size; the gates are
        (
            "qwen2_moe",
            "all-linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} | ROLES,
        ),
        # a dense first layer and a shared expert have the same names as the experts' projections
        ("deepseek_v3", ["gate_proj", "up_proj"], {"gate_proj", "up_proj", "gate_up"}),
    ],
)
def test_names(family, names, found, folders):
    assert _adapted_names(adapted(load(folders(family) / "packed"), target_modules=names)) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["w1"]}, "without up_proj"),
        ({"target_modules": ["q_proj", "wq"]}, "'wq', which is no module"),
        ({"target_modules": r".*experts\.[01]\.w2"}, "2 of 8 experts"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 0, "target_modules": ["experts"]}, "r=0"),
    ],
)
def test_what_cannot_be_adapted_raises(options, message, packed):
    with pytest.raises(ValueError, match=message):
        adapted(packed, **options)


def test_other_tuners_are_refused(packed):
    with pytest.raises(NotImplementedError, match="IA3Config"):
        get_peft_model(packed, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


def test_router_only_when_asked_for(packed):
    model = adapted(packed, target_modules=["gate", "down_proj"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(".gate." in name for name in trained) == 4
    assert _adapted_names(model) >= {"down"}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".gate.lora_B" in name)


def test_patterns_and_layers(packed):
    options = {"rank_pattern": {"down_proj": 2, "q_proj": 3}, "target_modules": ["experts", "q_proj"]}
    model = adapted(packed, layers_to_transform=[1], **options)
    shapes = {name.partition("layers.")[2]: v.shape for name, v in factors(model).items() if "lora_A" in name}
    assert shapes["1.mlp.experts.down.lora_A.default.weight"] == (8, 2, 100)
    assert shapes["1.mlp.experts.gate_up.lora_A.default.weight"] == (8, 4, 64)
    assert shapes["1.self_attn.q_proj.lora_A.default.weight"] == (3, 64)
    assert len(shapes) == 3


def test_counts_are_logged(packed, caplog):
    with caplog.at_level(logging.INFO, logger="transformers_mcmoe"):
        adapted(packed)
    assert (
        "8 linear layers, down and gate_up of 16 experts in 2 layers, 0 routers, 0 stacks of dense experts"
        in caplog.text
    )


def test_experts_that_were_not_packed(tmp_path):
    config = quick_config(
        rounding="nearest", allocation="uniform", num_samples=1, modules_to_not_convert=["model.layers.1.mlp.experts"]
    )
    model = compressed(save_dense("mixtral", tmp_path / "dense"), config)
    model = adapted(model, target_modules=["gate_proj", "up_proj", "down_proj"])
    assert model.peft_config["default"].target_parameters == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    model(input_ids=IDS, labels=IDS).loss.backward()
    layers = {name.partition("layers.")[2][0] for name, p in model.named_parameters() if p.grad is not None}
    assert layers == {"0", "1"}


def test_transformers_own_calls(packed, folders, tmp_path):
    """model.add_adapter, save_pretrained and load_adapter, without a PeftModel."""
    base = logits(packed)
    packed.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "experts"]))
    before = logits(randomize(packed))
    assert not torch.equal(before, base)
    packed.disable_adapters()
    assert torch.equal(logits(packed), base)
    packed.enable_adapters()
    packed.save_pretrained(tmp_path)
    again = load(folders("mixtral") / "packed")
    again.load_adapter(tmp_path)
    ours, theirs = factors(packed), factors(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # it computes on the mapped file, whose tensors are aligned otherwise: sums are rounded otherwise
    assert relative_rms(logits(again), before) <= 1e-6


def test_merged_models_are_saved_as_packed_ones(packed, tmp_path):
    plain = randomize(adapted(packed)).merge_and_unload()
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(plain))


def test_dense_models_are_left_to_peft(folders):
    model = load(folders("mixtral") / "dense")
    model = adapted(model, target_modules=["w1", "w2", "w3"])
    assert model.peft_config["default"].target_parameters == {"gate_up_proj", "down_proj"}


def test_registration(monkeypatch):
    from peft.utils import transformers_weight_conversion as module

    before = module.convert_peft_config_for_transformers
    registration.register()
    assert module.convert_peft_config_for_transformers is before  # loading a packed model has done it
    monkeypatch.setattr(module, "convert_peft_config_for_transformers", lambda config: None)
    with pytest.raises(ImportError, match=r"PEFT .* has no convert_peft_config"):
        registration.register()


@pytest.mark.slow
def test_fresh_process(folders):
    program = (
        "import sys, transformers_mcmoe; from peft import LoraConfig, get_peft_model\n"
        "from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "m = get_peft_model(m, LoraConfig(target_modules=['w1', 'w2', 'w3']))\n"
        "print(sum('experts' in n for n, p in m.named_parameters() if p.requires_grad))"
    )
    command = [sys.executable, "-c", program, str(folders("mixtral") / "packed")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "8"


# ---- several adapters, merging


def test_several_adapters(packed):
    base = logits(packed)
    model = randomize(adapted(packed), 1)
    one = logits(model)
    model.add_adapter("two", LoraConfig(r=2, target_modules=["experts"]))
    assert torch.equal(logits(model), one)
    model.set_adapter("two")
    assert relative_rms(logits(model), base) <= 1e-6
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.two" in name:
                parameter.normal_(std=0.05)
    two = logits(model)
    model.base_model.set_adapter(["default", "two"])
    both = logits(model)
    assert all(relative_rms(both, other) > 1e-3 for other in (one, two, base))
    model.delete_adapter("two")
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    with pytest.raises(NotImplementedError, match="set_adapter"):
        model.eval()(input_ids=IDS, adapter_names=["default", "__base__"])
    assert torch.equal(logits(model.unload()), base)


def test_merge_and_unmerge(packed):
    base, model = logits(packed), randomize(adapted(packed))
    before = logits(model)
    model.merge_adapter()
    errors = lora.merge_errors(model)
    assert len(errors) == 12
    assert all(0 < error < 1 for error in errors.values())
    merged = logits(model)
    assert relative_rms(merged, before) < relative_rms(base, before)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert lora.merge_errors(model) == {}
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    plain = model.merge_and_unload()
    assert relative_rms(logits(plain), merged) <= 1e-5
    assert len(lora.merge_errors(plain)) == 12


def test_merging_what_is_not_finite_changes_nothing(packed):
    base, model = logits(packed), randomize(adapted(packed, target_modules=["experts"]))
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.experts.down.lora_B["default"].weight[5, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.get_base_model().model.layers[1].mlp.experts.down.merge()
    assert torch.equal(logits(model.unload()), base)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_requantized(bits):
    weight, change = torch.randn(6, 100), 0.3 * torch.randn(6, 100)
    packed = pack(quantize(weight, bits, group_size_for(100, 128)))
    same, error = rounding.requantized(packed, bits, 100, torch.zeros(6, 100))
    assert torch.equal(same, packed)
    assert error < 1e-6
    new, error = rounding.requantized(packed, bits, 100, change)
    target = dequantize(packed, bits, 100) + change
    assert float((dequantize(new, bits, 100) - target).square().sum()) == pytest.approx(error, rel=1e-4)
    again = pack(quantize(target, bits, group_size_for(100, 128)))
    assert error <= float((dequantize(again, bits, 100) - target).square().sum()) * (1 + 1e-5)


# ---- training with trainers, pruning


def test_trainer_with_checkpointing_in_bf16(folders, tmp_path):
    model = load(folders("qwen3_moe") / "packed", dtype=torch.bfloat16)
    model = adapted(lora.prepare_for_training(model), lora_dropout=0.1)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "norm" in name} == {torch.bfloat16}
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    common = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "report_to": [], "bf16": True}
    arguments = TrainingArguments(
        tmp_path,
        use_cpu=True,
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **common,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0])


def test_sft_trainer(folders, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = lora.prepare_for_training(load(folders("mixtral") / "packed", dtype=torch.bfloat16))
    rows = Dataset.from_dict({"input_ids": tokens(8, 12).tolist()})
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=2e-2, report_to=[], use_cpu=True, bf16=True,
        gradient_checkpointing=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    config = LoraConfig(r=4, target_modules=["q_proj", "w1", "w2", "w3"], task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=rows, peft_config=config, processing_class=_Tokenizer.make()
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0])
    assert _adapted_names(trainer.model) == {"q_proj"} | ROLES


class _Tokenizer:
    """The least tokenizer that TRL takes."""

    @staticmethod
    def make():
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        inner = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
        return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_preparing_refuses(packed, folders):
    set_expert_pruning(packed, ODPConfig(threshold=0.5))
    with pytest.raises(ValueError, match="protect=0"):
        lora.prepare_for_training(packed)
    with pytest.raises(ValueError, match="no packed modules"):
        lora.prepare_for_training(load(folders("mixtral") / "dense"))
    set_expert_pruning(packed, False)
    model = adapted(packed)
    with pytest.raises(ValueError, match="before get_peft_model"):
        lora.prepare_for_training(model)
    with pytest.raises(ValueError, match="has adapters"):
        packed.dequantize()


def test_expert_pruning_with_an_adapter(packed):
    model = randomize(adapted(packed))
    full = logits(model)
    set_expert_pruning(model.get_base_model(), ODPConfig(threshold=0.9, protect=0))
    pruned = logits(model)
    assert expert_pruning_stats(model.get_base_model())["prefill"]["slots_skipped"] > 0
    assert not torch.equal(pruned, full)
    model(input_ids=IDS, labels=IDS).loss.backward()
    set_expert_pruning(model.get_base_model(), False)
    assert torch.equal(logits(model), full)


# ---- the start from the quantization error


def test_low_rank_is_the_best_in_its_metric():
    error, x = torch.randn(12, 20), torch.randn(200, 20) * torch.linspace(0.1, 3, 20)
    hessian = x.T @ x

    def loss(change):
        return float((x @ (error - change).T).square().sum())

    b, a = initialization.low_rank(error, hessian, 4, damping=0.0)
    s = torch.linalg.svdvals(x @ error.T)
    assert loss(b @ a) == pytest.approx(float(s[4:].square().sum()), rel=1e-3)
    plain = torch.linalg.svd(error)
    assert loss(b @ a) < loss(plain[0][:, :4] * plain[1][:4] @ plain[2][:4])
    b, a = initialization.low_rank(error, hessian, 16)
    assert relative_rms(b @ a, error) < 1e-3
    b, a = initialization.low_rank(error, torch.zeros(20, 20), 2)  # an expert without tokens
    assert torch.isfinite(b @ a).all()


def test_initialize_lora(folders, caplog):
    folder = folders("mixtral")
    dense = logits(load(folder / "dense"))
    model = load(folder / "packed")
    before = relative_rms(logits(model), dense)
    model = adapted(model, r=16, lora_alpha=8, init_lora_weights="mcmoe")
    assert "initialize_lora" in caplog.text
    gained = lora.initialize_lora(model, folder / "dense", tokens(8, 32), num_samples=8)
    assert len(gained) == 12
    assert all(0 < share < 1 for share in gained.values())
    assert relative_rms(logits(model), dense) < 0.9 * before


def test_initialize_lora_reads_text_with_the_dense_models_tokenizer(folders, tmp_path):
    folder = folders("mixtral")
    shutil.copytree(folder / "dense", tmp_path / "dense")
    _Tokenizer.make().save_pretrained(tmp_path / "dense")
    text, options = ["</s>" * 40], {"num_samples": 2, "seq_len": 16}
    gained = [
        lora.initialize_lora(adapted(load(folder / "packed")), tmp_path / "dense", text, **options),
        lora.initialize_lora(adapted(load(folder / "packed")), folder / "dense", torch.full((2, 16), 2), **options),
    ]
    assert gained[0] == gained[1]


def test_initialize_lora_refuses(folders, packed):
    with pytest.raises(ValueError, match="No packed module has an adapter"):
        lora.initialize_lora(packed, folders("mixtral") / "dense", tokens(8, 32), num_samples=8)
    model = adapted(packed)
    with pytest.raises(ValueError, match="does not fit"):
        lora.initialize_lora(model, folders("qwen3_moe") / "dense", tokens(8, 32), num_samples=8)


def test_is_packed(packed, folders):
    assert targets.is_packed(packed)
    assert not targets.is_packed(load(folders("mixtral") / "dense"))
