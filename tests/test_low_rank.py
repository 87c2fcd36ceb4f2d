# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors: the mathematics, and compressed models that have them in the place of matrices or beside them."""

import itertools
import json

import pytest
import torch
from test_routers import spread
from tiny import compressed, families, load, load_class, quick_config, relative_rms, tiny_model, tokens

from transformers_mcmoe import (
    MCMoEConfig,
    PackedExperts,
    PackedLinear,
    PruneConfig,
    RankConfig,
    compression_report,
    unpack,
)
from transformers_mcmoe.integrations.card import build_card
from transformers_mcmoe.kernels import arena, cpu, ops
from transformers_mcmoe.plan import ExpertWidths, Plan, average_bits
from transformers_mcmoe.quantization import Grid, pack, quantize
from transformers_mcmoe.structure import break_even, factorize, fit_left, ranks_for, root_of

IDS = tokens(2, 24)
FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v2", "gpt_oss", "nemotron_h")


def activations(columns, seed=0):
    """Tokens [500, columns] some directions of which are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -3, columns)
    return torch.randn(500, columns, generator=generator) * scale


class TestFactorize:
    @pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24), (32, 32)])
    @pytest.mark.parametrize("rank", [1, 5, 24])
    def test_plain_is_the_truncated_svd(self, rows, columns, rank):
        weight = torch.randn(rows, columns)
        a, b = factorize(weight, rank)
        u, s, v = torch.linalg.svd(weight)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert torch.allclose(b @ a, best, atol=1e-4)
        assert torch.allclose(b.T @ b, torch.eye(rank), atol=1e-5)

    @pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24)])
    def test_whitened_changes_outputs_least(self, rows, columns):
        """Against the optimum: the truncated SVD of W L, in the metric of the damped Hessian."""
        weight, x = torch.randn(rows, columns), activations(columns)
        hessian = x.T @ x
        damped = hessian.double()
        damped.diagonal().add_(0.01 * float(damped.diagonal().mean()))
        lower = torch.linalg.cholesky(damped)
        tail = torch.linalg.svdvals(weight.double() @ lower)[8:].square().sum().sqrt()
        a, b = factorize(weight, 8, hessian)
        assert float(((weight - b @ a).double() @ lower).norm()) == pytest.approx(float(tail), rel=1e-4)
        plain_a, plain_b = factorize(weight, 8)
        lost = ((weight - b @ a) @ x.T).norm()
        assert lost < 0.7 * ((weight - plain_b @ plain_a) @ x.T).norm()

    def test_full_rank_loses_nothing(self):
        weight, x = torch.randn(20, 30), activations(30)
        a, b = factorize(weight, 20, x.T @ x)
        assert torch.allclose(b @ a, weight, atol=1e-4)

    def test_no_activations(self):
        weight = torch.randn(10, 12)
        a, b = factorize(weight, 3, torch.zeros(12, 12))
        plain = factorize(weight, 3)
        assert torch.allclose(b @ a, plain[1] @ plain[0], atol=1e-5)

    def test_a_matrix_of_lower_rank(self):
        weight = torch.randn(40, 3) @ torch.randn(3, 24)
        a, b = factorize(weight, 8)
        assert torch.allclose(b @ a, weight, atol=1e-4)
        assert torch.isfinite(a).all()

    @pytest.mark.parametrize("rank", [0, 13])
    def test_ranks_that_there_are_not(self, rank):
        with pytest.raises(ValueError, match=f"rank={rank} is not valid: a matrix of 12 x 20 has ranks 1 to 12"):
            factorize(torch.randn(12, 20), rank)

    def test_left_factor_is_the_regression(self):
        weight, x = torch.randn(16, 20), activations(20)
        a = factorize(weight, 6)[0] + 0.1 * torch.randn(6, 20)
        root = root_of(x.T @ x)
        b = fit_left(weight, a, root)
        lost = ((weight - b @ a).double() @ root).norm()
        for _ in range(20):
            assert lost <= ((weight - (b + 1e-2 * torch.randn_like(b)) @ a).double() @ root).norm()

    def test_few_tokens_are_not_fitted_by_large_numbers(self):
        weight, x = torch.randn(40, 64), torch.randn(8, 64)
        a = factorize(weight, 32, x.T @ x)[0] + 0.05 * torch.randn(32, 64)
        b = fit_left(weight, a, root_of(x.T @ x))
        assert ((weight - b @ a).norm() / weight.norm()) < 2


class TestRanks:
    def test_formula(self):
        """Proportional to importance ** 0.15, and the mean is met."""
        importance = [1.0, 2.0, 4.0, 8.0]
        found = ranks_for(importance, 1000, 4000, step=8)
        assert sum(found) == 4000
        shares = [value**0.15 for value in importance]
        for rank, share in zip(found, shares, strict=True):
            assert abs(rank - 4000 * share / sum(shares)) <= 8

    @pytest.mark.parametrize(("mean", "most"), list(itertools.product([32, 64, 80, 200], [96, 256])))
    def test_bounds(self, mean, most):
        found = ranks_for([1e-9, 1.0, 100.0], mean, most)
        assert all(rank % 32 == 0 and 32 <= rank <= most for rank in found)
        assert sum(found) <= max(3 * 32, round(3 * mean / 32) * 32)
        assert found == sorted(found)

    def test_alike(self):
        assert ranks_for([0.0, 0.0], 64, 128) == [64, 64]
        assert ranks_for([1.0, 9.0], 64, 128, exponent=0) == [64, 64]

    def test_break_even(self):
        assert break_even(4096, 14336) == pytest.approx(3185.8, abs=0.1)  # the paper's figures
        assert break_even(2048, 1408) == pytest.approx(834.4, abs=0.1)


def packed_pair(rows, columns, rank, bits=4, rank_bits=8):
    linear = PackedLinear(columns, rows, bits, 32, rank=rank, rank_bits=rank_bits)
    weight, a, b = torch.randn(rows, columns), torch.randn(rank, columns) * 0.1, torch.randn(rows, rank)
    if bits:
        linear.weight.data.copy_(pack(quantize(weight, bits, 32, Grid())))
    linear.low_rank_a.weight.data.copy_(pack(quantize(a, rank_bits, 32, Grid())))
    linear.low_rank_b.weight.data.copy_(pack(quantize(b, rank_bits, 32, Grid())))
    return linear


class TestPackedLinear:
    @pytest.mark.parametrize("bits", [0, 2])
    def test_computes_what_it_stands_for(self, bits):
        linear = packed_pair(48, 64, 32, bits)
        x = torch.randn(5, 64)
        dense = linear.dequantize(torch.float32)
        assert relative_rms(linear(x), x @ dense.T) < 5e-3
        product = linear.low_rank_b.dequantize(torch.float32) @ linear.low_rank_a.dequantize(torch.float32)
        base = PackedLinear.dequantize(linear.low_rank_a, torch.float32) * 0 if not bits else None
        assert dense.shape == product.shape
        assert base is None or torch.allclose(dense, product)
        assert sorted(linear.state_dict()) == ["low_rank_a.weight", "low_rank_b.weight", *["weight"] * bool(bits)]

    def test_gradients(self):
        linear, x = packed_pair(48, 64, 32, 2), torch.randn(5, 64, requires_grad=True)
        linear(x).square().sum().backward()
        dense = linear.dequantize(torch.float32)
        other = x.detach().clone().requires_grad_()
        (other @ dense.T).square().sum().backward()
        assert relative_rms(x.grad, other.grad) < 2e-2


def test_the_operator_adds_factors():
    """`moe_mlp` with factors against dense matrices that stand for the same sums."""
    generator = torch.Generator().manual_seed(0)
    matrices, a, b, dense = [], [], [], []
    sizes = [(32, 64), (32, 64), (64, 32)]
    for _ in range(2):
        for rows, columns in sizes:
            weight = quantize(torch.randn(rows, columns, generator=generator), 4, 32, Grid())
            matrices.append(pack(weight))
            factors = [
                quantize(torch.randn(n, m, generator=generator), 8, 32, Grid()) for n, m in ((8, columns), (rows, 8))
            ]
            a.append(pack(factors[0]))
            b.append(pack(factors[1]))
            dense.append(weight.dequantize() + factors[1].dequantize() @ factors[0].dequantize())
    layout, _ = arena.layout(sizes, ExpertWidths((4, 4), (4, 4), (8, 8), 8), 32)
    x, index = torch.randn(7, 64, generator=generator), torch.tensor([[0, 1]] * 7)
    weights = torch.rand(7, 2, generator=generator)
    found = ops.moe_mlp(x, index, weights, matrices, layout, None, a, b, 32, "silu", True)
    expected = torch.zeros_like(x)
    for e in range(2):
        gate, up, down = dense[3 * e : 3 * e + 3]
        y = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        expected += weights[:, e, None] * y
    assert relative_rms(found, expected) < 1e-5


@pytest.fixture(scope="module", params=families(FAMILIES, ["qwen2_moe", "gpt_oss"]))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "dense"
    inner = "intermediate_size" if request.param in ("mixtral", "gpt_oss") else "moe_intermediate_size"
    spread(tiny_model(request.param, **{"hidden_size": 128, inner: 128})).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral") / "dense"
    spread(tiny_model("mixtral", hidden_size=128, intermediate_size=256)).save_pretrained(path)
    return path


def config_for(rank, **changes):
    return quick_config(**({"rank": rank} | changes))


def alone(rank=32, **changes):
    config = {"dataset": tokens(8, 32), "num_samples": 8, "attention_bits": 8, "shared_expert_bits": 8}
    return MCMoEConfig(rank=RankConfig(rank), **(config | changes))


def plan_of(model):
    return model.hf_quantizer.quantization_config.plan


@torch.no_grad()
def test_factors_alone(folder, tmp_path):
    model = compressed(folder, alone())
    logits = model(IDS).logits
    report = compression_report(model)
    for path, widths in plan_of(model).experts.items():
        assert not any(widths.gate_up)
        assert not any(widths.down)
        assert sum(widths.ranks) == 8 * 32
        assert report["ranks"][path] == list(widths.ranks)
    assert report["dropped_experts"] is None
    assert any("low rank, 8 bits" in name for name in report["sizes"]["parts"])
    model.save_pretrained(tmp_path)
    again = load_class(tmp_path).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(IDS).logits, logits)
    stored = sum(t.nbytes for t in again.state_dict().values())
    assert stored == pytest.approx(report["sizes"]["total_bytes"], rel=0.02)
    dense = again.dequantize()
    assert relative_rms(dense(IDS).logits, logits) < 2e-2
    assert not any(isinstance(m, PackedLinear | PackedExperts) for m in dense.modules())


@torch.no_grad()
def test_factors_beside_matrices(folder, tmp_path):
    model = compressed(folder, config_for(RankConfig(32, base=True, bits=4), bits=5.0, expert_bits=(2, 4)))
    logits = model(IDS).logits
    for widths in plan_of(model).experts.values():
        assert all(widths.gate_up)
        assert all(widths.ranks)
    model.save_pretrained(tmp_path)
    again = load_class(tmp_path).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(IDS).logits, logits)


def divergence(model, folder):
    dense = load(folder)
    p, q = (m(IDS).logits.double().log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("base", [False, True])
def test_layers_are_one_operator(mixtral, base, monkeypatch):
    """With factors, too: equal to a loop over the experts, compiled, with gradients."""
    rank = RankConfig(32, base=True) if base else RankConfig(32)
    model = compressed(mixtral, config_for(rank, bits=5.0) if base else alone())
    called = []
    monkeypatch.setattr(cpu, "moe_mlp", lambda *args, own=cpu.moe_mlp: called.append(1) or own(*args))
    with torch.no_grad():
        logits = model(IDS).logits
        assert len(called) == len(plan_of(model).experts)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS, use_cache=False).logits
        assert torch.equal(compiled, logits)
    assert model.hf_quantizer.is_compileable

    def gradient():
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        found = model(inputs_embeds=x).logits
        return found.detach(), torch.autograd.grad(found.square().sum(), x)[0]

    _, ours = gradient()
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module._activation = None  # runs the experts one by one
    looped, theirs = gradient()
    assert relative_rms(logits, looped) < 1e-5
    assert relative_rms(ours, theirs) < 1e-4


@torch.no_grad()
def test_more_rank_is_nearer(mixtral):
    found = [divergence(compressed(mixtral, alone(rank)), mixtral) for rank in (32, 64)]
    assert found[0] > found[1]


@pytest.mark.slow
@torch.no_grad()
def test_factors_make_up_for_rounding(mixtral):
    plan = plan_of(compressed(mixtral, quick_config(expert_bits=(1, 2), bits=2.3, attention_bits=8)))
    base = compressed(mixtral, quick_config(plan=plan.to_dict()))
    with_ranks = {path: ExpertWidths(w.gate_up, w.down, (32,) * len(w.gate_up), 8) for path, w in plan.experts.items()}
    corrected = compressed(mixtral, quick_config(plan=Plan(with_ranks, plan.linears)))
    assert divergence(corrected, mixtral) < 0.7 * divergence(base, mixtral)


@torch.no_grad()
def test_with_dropped_experts(folder, tmp_path):
    model = compressed(folder, alone(prune=PruneConfig(0.25)))
    logits = model(IDS).logits
    for widths in plan_of(model).experts.values():
        assert all((rank > 0) == (e in widths.kept) for e, rank in enumerate(widths.ranks))
    assert compression_report(model)["dropped_experts"]["count"] == 2 * len(plan_of(model).experts)
    model.save_pretrained(tmp_path)
    again = load_class(tmp_path).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(IDS).logits, logits)


@torch.no_grad()
def test_unpacked(mixtral):
    model = compressed(mixtral, alone(prune=PruneConfig(0.25, method="naee")))
    assert relative_rms(unpack(model)(IDS).logits, model(IDS).logits) < 2e-2


def test_average_and_bytes(mixtral):
    model = compressed(mixtral, alone())
    report = compression_report(model)
    config = model.config
    weights = 16 * 3 * config.hidden_size * config.intermediate_size
    factors = 2 * 3 * (config.hidden_size + config.intermediate_size) * 8 * 32 * 8
    attention = sum(
        p.numel()
        for n, p in tiny_model("mixtral", hidden_size=128, intermediate_size=256).named_parameters()
        if "_proj.weight" in n and "attn" in n
    )
    expected = (factors + 8 * attention) / (weights + attention)
    assert report["average_bits"] == pytest.approx(expected, rel=1e-6)


def test_cards(mixtral):
    """A given plan with ranks, whose config knows none."""
    plan = plan_of(compressed(mixtral, alone()))
    report = json.loads(json.dumps(compression_report(compressed(mixtral, quick_config(plan=plan.to_dict())))))
    assert report["config"]["rank"] is None
    assert "are kept as two thin factors per matrix (ranks 32 to 32, 8 bits)" in str(
        build_card("me/packed", report, {})
    )


class TestPlan:
    PLAN = Plan({"m.0.experts": ExpertWidths((2, 0, 0), (4, 0, 0), (0, 16, 0), 8)}, {})

    def test_round_trip(self):
        data = self.PLAN.to_dict()
        assert data["version"] == 2
        assert data["experts"]["m.0.experts"] == {"gate_up": "200", "down": "400", "rank": [0, 16, 0], "rank_bits": 8}
        assert Plan.from_dict(data) == self.PLAN
        assert self.PLAN.experts["m.0.experts"].kept == (0, 1)

    def test_without_either_it_is_version_1(self):
        assert Plan({"m.0.experts": ExpertWidths.of([2, 1])}).to_dict()["version"] == 1
        assert Plan({"m.0.experts": ExpertWidths.of([2, 0])}).to_dict()["version"] == 2

    @pytest.mark.parametrize("change", [{"rank": [1, 2]}, {"rank": [0, -1, 0]}, {"rank": "160"}, {"rank_bits": 5}])
    def test_damaged(self, change):
        data = self.PLAN.to_dict()
        data["experts"]["m.0.experts"] |= change
        with pytest.raises(ValueError, match="must have one 'rank' >= 0 for each of 3 experts"):
            Plan.from_dict(data)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 0}, "rank=0 is not valid: it must be a number > 0"),
            ({"rank": 8}, "rank=8 is not valid: it must be at least step=32"),
            ({"rank": {"bits": 5}}, "bits=5 is not valid"),
            ({"rank": {"step": 8}}, "step=8 is not valid: it must be a positive multiple of 32"),
            ({"rank": {"mean": "auto", "base": True}}, "rank='auto' is not valid: it must be left without base"),
            ({"rank": 64, "bits": 3.0}, "left out with bits or target_size, or have base=True"),
            ({"rank": 64, "attention_bits": (4, 8)}, "attention_bits"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            MCMoEConfig(**options)

    def test_ranks_above_the_full_one(self, mixtral):
        with pytest.raises(ValueError, match=r"rank=160 is not valid: the matrices of '.*' have 128 at most"):
            compressed(mixtral, alone(160))

    def test_ranks_that_save_nothing(self, mixtral):
        with pytest.raises(ValueError, match=r"rank=96 saves nothing: from a rank of 86 on"):
            compressed(mixtral, alone(96))

    def test_a_plan_with_too_large_ranks(self, mixtral):
        plan = plan_of(compressed(mixtral, alone()))
        wrong = {p: ExpertWidths(w.gate_up, w.down, (129,) * 8, 8) for p, w in plan.experts.items()}
        with pytest.raises(ValueError, match="has a rank of 129, but its matrices have 128 at most"):
            compressed(mixtral, quick_config(plan=Plan(wrong, plan.linears)))


def test_average_of_matrices():
    from transformers_mcmoe.plan import Matrix

    plain = Matrix("a", 10, 20, 4)
    factored = Matrix("b", 10, 20, 0, 2, 8)
    both = Matrix("c", 10, 20, 2, 2, 8)
    assert [m.code_bits for m in (plain, factored, both)] == [800, 480, 880]
    assert average_bits([plain, factored]) == pytest.approx(1280 / 400)


class TestOnTop:
    """Adapters and learned pruning over factors, and over dropped experts."""

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
    @pytest.mark.parametrize("what", ["factors", "factors beside", "dropped"])
    def test_lora(self, mixtral, what):
        pytest.importorskip("peft")
        from peft import LoraConfig, get_peft_model

        from transformers_mcmoe.integrations.lora import prepare_for_training

        configs = {
            "factors": alone(),
            "factors beside": config_for(RankConfig(32, base=True, bits=4), bits=5.0, expert_bits=(2, 4)),
            "dropped": quick_config(bits=2.8, prune=0.25),
        }
        model = compressed(mixtral, configs[what])
        with torch.no_grad():
            before = model(IDS).logits
        prepare_for_training(model, gradient_checkpointing=False)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        assert not any("low_rank" in name for name, _ in adapted.named_parameters() if "lora_" in name)
        with torch.no_grad():
            assert torch.allclose(adapted(input_ids=IDS).logits, before, atol=1e-5)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            loss = adapted(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        if what == "factors":
            with pytest.raises(
                ValueError, match="low-rank factors and no matrix that an adapter could be rounded into"
            ):
                adapted.merge_and_unload()
        else:
            with torch.no_grad():
                expected = adapted(input_ids=IDS).logits
                merged = adapted.merge_and_unload()(IDS).logits
            assert (merged - expected).norm() < (before - expected).norm()

    @pytest.mark.parametrize("what", ["factors", "dropped"])
    def test_learned_pruning(self, mixtral, what):
        from transformers_mcmoe import expert_pruning_stats, train_expert_pruning

        model = compressed(mixtral, alone() if what == "factors" else quick_config(bits=2.8, prune=0.25))
        train_expert_pruning(model, tokens(8, 32), target=0.2)
        with torch.no_grad():
            assert torch.isfinite(model(IDS).logits).all()
        assert expert_pruning_stats(model)["prefill"]["slots_skipped"] > 0
