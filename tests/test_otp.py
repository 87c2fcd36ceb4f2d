# SPDX-License-Identifier: Apache-2.0
"""Learned expert pruning: the router and its masks, the fit to costs, training on tiny models, checkpoints with routers."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import compressed, load, quick_config, relative_rms, save_dense, tokens
from torch.nn import functional

from transformers_mcmoe import (
    MCMoEConfig,
    ODPConfig,
    OTPConfig,
    expert_pruning_stats,
    set_expert_pruning,
    train_expert_pruning,
)
from transformers_mcmoe.calibration.sequences import Batch, Sequences
from transformers_mcmoe.kernels import cpu
from transformers_mcmoe.models.training import frozen
from transformers_mcmoe.progress import Meter
from transformers_mcmoe.routing import (
    PrefixRouter,
    attached,
    dropping_points,
    kept_slots,
    prefix_scores,
    prunable_experts,
    sampled_mask,
)
from transformers_mcmoe.routing.call import Call
from transformers_mcmoe.routing.otp import LearnedPruning
from transformers_mcmoe.routing.otp.costs import CostMeter, Trace
from transformers_mcmoe.routing.otp.fitting import fit_router
from transformers_mcmoe.routing.otp.joint import shift_curve, shift_for
from transformers_mcmoe.routing.otp.training import RouterTraining

IDS = tokens(2, 24, seed=1)
TEXT = tokens(16, 32, seed=5)
QUICK = OTPConfig(steps=2, tokens=512, batch_tokens=128)


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _weights(tokens, slots, seed=0):
    return _random(tokens, slots, seed=seed).softmax(-1).sort(-1, descending=True).values


def _router(hidden, slots, rank=3, seed=0):
    router = PrefixRouter(hidden, slots, rank)
    router.store(
        _random(rank, hidden + slots + 2, seed=seed) / hidden**0.5, _random(slots - 1, rank + slots + 2, seed=seed + 1)
    )
    return router


class TestRouter:
    def test_scores_are_those_of_two_layers(self):
        router, x, weights = _router(16, 4), _random(9, 16, seed=3) * 3, _weights(9, 4)
        hidden, scores = router.matrices()
        ratios = (weights[:, 1:] / weights[:, :1]).log()
        features = torch.cat([weights[:, :1].log(), ratios, x.square().mean(-1, keepdim=True).sqrt().log()], -1)
        one = torch.ones(9, 1)
        units = functional.silu(torch.cat([x, features, one], -1) @ hidden.T)
        expected = torch.cat([units, features, one], -1) @ scores.T
        assert torch.allclose(router(x, weights), expected, atol=1e-5)

    def test_casts_do_not_change_it(self):
        router, x, weights = _router(16, 3), _random(5, 16), _weights(5, 3)
        before = router(x, weights)
        assert torch.equal(router.to(torch.bfloat16)(x, weights), before)
        assert {p.dtype for p in router.parameters()} == {torch.uint8}

    def test_the_likeliest_prefix_is_kept(self):
        scores = _random(200, 3)
        sums = [torch.zeros(200), scores[:, 0], scores[:, :2].sum(-1), scores.sum(-1)]
        assert torch.equal(kept_slots(scores), torch.stack(sums, -1).argmax(-1) + 1)

    def test_masks_are_hard_prefixes_with_the_gradient_of_the_softmax(self):
        scores = _random(6, 3).double().requires_grad_()
        generator = torch.Generator().manual_seed(1)
        mask = sampled_mask(scores, 0.7, generator)
        assert set(mask.detach().unique().tolist()) <= {0.0, 1.0}
        assert (mask[:, 0] == 1).all()
        assert (mask[:, 1:] <= mask[:, :-1]).all()

        def soft(scores):
            # what is sampled from, with the noise of the same generator
            noise = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)).clamp(1e-9, 1 - 1e-7)
            logits = functional.pad(scores.cumsum(-1), (1, 0)) - (-noise.log()).log()
            chosen = (logits / 0.7).softmax(-1)
            return torch.stack([chosen[:, j:].sum(-1) for j in range(4)], -1)

        assert torch.autograd.gradcheck(soft, (scores,))
        direction = _random(6, 4, seed=2).double()
        (gradient,) = torch.autograd.grad((mask * direction).sum(), scores)
        (expected,) = torch.autograd.grad((soft(scores) * direction).sum(), scores)
        assert torch.allclose(gradient, expected)

    def test_scores_have_gradients(self):
        x, weights = _random(4, 8).double(), _weights(4, 3).double()
        hidden, scores = _random(2, 13).double().requires_grad_(), _random(2, 7).double().requires_grad_()
        # the product runs in float32
        assert torch.autograd.gradcheck(
            lambda h, s: prefix_scores(x, weights, h.float(), s.float()).double(),
            (hidden, scores),
            eps=1e-2,
            atol=1e-2,
        )

    def test_slots_of_any_order(self):
        router, x, weights = _router(16, 4), _random(50, 16), _weights(50, 4)
        order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(50)])
        index = torch.arange(4).expand(50, 4)
        pruning = LearnedPruning(router, 0.1, "x", True, Call(), [1.0] * 4, 4)
        straight = pruning.skipped(x, index, weights)
        mixed = pruning.skipped(x, index.gather(1, order), weights.gather(1, order))
        assert torch.equal(mixed, straight.gather(1, order))
        assert 0 < straight.sum() < straight.numel()
        assert not straight[:, 0].any()


class TestShifts:
    @pytest.mark.parametrize("slots", [2, 5, 8])
    def test_slots_are_dropped_at_their_points(self, slots):
        scores = _random(500, slots - 1)
        points = dropping_points(scores)
        assert (points[:, 1:] <= points[:, :-1] + 1e-5).all()
        for shift in (-2.0, -0.3, 0.0, 0.4, 2.0):
            assert torch.equal(1 + (points > shift).sum(-1), kept_slots(scores - shift))

    def test_share_is_met(self):
        scores = [_random(1000, 3, seed=i) * (1 + i) for i in range(3)]
        points = [dropping_points(own).flatten() for own in scores]
        curve = shift_curve(points)
        assert curve == sorted(curve)
        for share in (0.0, 0.13, 0.5, 1.0):
            for shift in (shift_for(points, share), curve[round(100 * share)]):
                kept = sum(int((kept_slots(own - shift) - 1).sum()) for own in scores)
                assert kept / 9000 == pytest.approx(1 - share, abs=2e-3)


class TestFit:
    def test_expected_costs_are_found(self):
        """Single costs are squares of normal numbers; their expectation depends on the token and on the weights."""
        x, weights = _random(6000, 12), _weights(6000, 3)
        size = torch.stack([2 * x[:, 0] - x[:, 3], (weights[:, 2] / weights[:, 0]).log()], -1)
        costs = size.exp() * _random(6000, 2, seed=9).square() * 1e-6
        costs[::7, 1] = torch.nan
        parts = [Trace([x[rows]], [weights[rows]], [costs[rows]]) for rows in (slice(0, 5000), slice(5000, None))]
        hidden, scores = fit_router(*parts, OTPConfig(), torch.Generator().manual_seed(0))
        found = prefix_scores(x[5000:], weights[5000:], hidden, scores)
        for slot in range(2):
            both = torch.stack([found[:, slot], size[5000:, slot]])
            assert torch.corrcoef(both)[0, 1] > 0.95
            assert abs(float((found[:, slot] - size[5000:, slot]).mean()) - float(torch.tensor(1e-6).log())) < 0.3

    def test_cost_is_the_second_order_divergence(self, dense):
        """Dropping a small slot raises the KL divergence by about what is measured, in the mean over labels."""
        model = load(dense)
        found = prunable_experts(model)
        path = list(found)[-1]
        generator, batch = torch.Generator().manual_seed(0), TEXT[:8]
        meter = CostMeter(model, found, OTPConfig(renormalize=False), generator, Meter(lambda step: None))
        with frozen(model):
            trace = meter.measure([Batch(batch, {})] * 40, "measure")[path]
        predicted = float(torch.stack(trace.costs).sum() / 40)
        with torch.no_grad():
            full = model(batch).logits.log_softmax(-1)
            set_expert_pruning(
                model,
                ODPConfig(
                    threshold=1.0,
                    protect=0,
                    renormalize=False,
                    layers=[1],
                    thresholds={path: [1.0]},
                    normalized={path: True},
                ),
            )
            pruned = model(batch).logits.log_softmax(-1)
        actual = float((full.exp() * (full - pruned)).sum())
        assert predicted == pytest.approx(actual, rel=0.25)


@pytest.fixture(scope="module")
def trained(dense, tmp_path_factory):
    """A packed checkpoint with routers."""
    folder = tmp_path_factory.mktemp("otp")
    model = compressed(dense, quick_config(otp=QUICK, dataset=TEXT, num_samples=16))
    model.save_pretrained(folder)
    return model, folder


class TestCheckpoints:
    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    def test_reload(self, trained):
        model, folder = trained
        with torch.no_grad():
            expected = model(IDS).logits
            again = load(folder)
            assert torch.equal(again(IDS).logits, expected)
            assert again.config.quantization_config.otp == model.config.quantization_config.otp
            off = load(folder, quantization_config=MCMoEConfig(otp=False))
            assert attached(off) is None
            plain = off(IDS).logits
            assert not torch.equal(plain, expected)
            assert set_expert_pruning(off, otp=True).target == 0.2
            assert torch.equal(off(IDS).logits, expected)
            assert set_expert_pruning(off, False) is None
            assert torch.equal(off(IDS).logits, plain)
            more = load(folder, quantization_config=MCMoEConfig(otp=OTPConfig(target=0.4)))
            more(TEXT)
            assert expert_pruning_stats(more)["prefill"]["slots_skipped"] == pytest.approx(0.4, abs=0.04)
            other = load(folder, quantization_config=MCMoEConfig(odp=True))
            assert isinstance(attached(other).options, ODPConfig)

    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    def test_saved_while_off(self, trained, tmp_path):
        _, folder = trained
        load(folder, quantization_config=MCMoEConfig(otp=False)).save_pretrained(tmp_path)
        again = load(tmp_path)
        assert attached(again) is None
        set_expert_pruning(again, otp=0.3)
        with torch.no_grad():
            again(TEXT)
        assert expert_pruning_stats(again)["prefill"]["slots_skipped"] == pytest.approx(0.3, abs=0.04)

    def test_on_disk(self, trained, tmp_path):
        model, folder = trained
        places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
        places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
        again = load(folder, device_map=places, offload_folder=tmp_path)
        with torch.no_grad():
            for ids in (IDS, IDS[:, :1]):
                assert relative_rms(again(ids).logits, model(ids).logits) < 1e-5

    def test_dequantized_model_skips_the_same(self, trained):
        _, folder = trained
        model = load(folder)
        with torch.no_grad():
            expected = model(IDS).logits
            skipped = expert_pruning_stats(model)["prefill"]["slots_skipped"]
            dense = model.dequantize()
            assert relative_rms(dense(IDS).logits, expected) < 1e-5
        assert expert_pruning_stats(dense)["prefill"]["slots_skipped"] == skipped

    def test_routers_are_a_few_bytes_beside_the_experts(self, trained):
        model, folder = trained
        names = [name for name in load_file(folder / "model.safetensors") if ".otp." in name]
        assert len(names) == 2 * 2
        assert all(p.dtype == torch.uint8 for name, p in model.named_parameters() if ".otp." in name)

    def test_of_another_model(self, dense, trained, tmp_path):
        _, folder = trained
        other = tmp_path / "other"
        compressed(dense, quick_config(dataset=tokens(8, 32, seed=9))).save_pretrained(other)
        tensors, routers = load_file(other / "model.safetensors"), load_file(folder / "model.safetensors")
        tensors |= {name: tensor for name, tensor in routers.items() if ".otp." in name}
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        config = json.loads((other / "config.json").read_text())
        own = json.loads((folder / "config.json").read_text())["quantization_config"]["otp"]
        config["quantization_config"]["otp"] = own
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="trained on another model"):
            load(other)
        config["quantization_config"]["otp"] = own | {"rank": 3}
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"experts\.otp\.hidden"):
            load(other)

    def test_generation(self, trained):
        model, _ = trained
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        with torch.no_grad():
            expected = model.generate(IDS, **options)
            static = model.generate(IDS, cache_implementation="static", disable_compile=True, **options)
            assert torch.equal(static, expected)
            assert torch.equal(model.generate(IDS, prefill_chunk_size=7, **options), expected)
            # alone, and padded beside another: the same
            for row in IDS:
                assert torch.equal(model.generate(row[None], **options)[0], expected[IDS.tolist().index(row.tolist())])
            padded = functional.pad(IDS[:1, 8:], (8, 0))
            mask = torch.ones(2, 24, dtype=torch.long)
            mask[0, :8] = 0
            both = model(torch.cat([padded, IDS[1:]]), attention_mask=mask).logits
            alone = model(IDS[:1, 8:]).logits
        assert torch.allclose(both[0, 8:], alone[0], atol=1e-4)
        stats = expert_pruning_stats(model, reset=True)
        assert 0 < stats["decode"]["slots_skipped"] < 0.5


class TestTraining:
    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("qwen3_moe", {"num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 1}),
            ("deepseek_v3", {"n_routed_experts": 16, "num_experts_per_tok": 4, "topk_group": 2}),
            ("olmoe", {"num_experts_per_tok": 4}),
            ("gpt_oss", {}),
        ],
    )
    def test_families(self, tmp_path, family, changes):
        """Softmax, sigmoid and grouped routers, with and without normalised weights; packed as its dense twin."""
        model = compressed(save_dense(family, tmp_path / "dense", **changes))
        otp = train_expert_pruning(model, TEXT, 0.25, options=QUICK, num_samples=16, seq_len=32, progress=print)
        with torch.no_grad():
            model(TEXT[:12])
            assert expert_pruning_stats(model)["prefill"]["slots_skipped"] == pytest.approx(0.25, abs=0.03)
            assert otp.droppable == pytest.approx(1 - 1 / otp.slots)
            packed = model(IDS).logits
            model.save_pretrained(tmp_path / "packed")
            assert torch.equal(load(tmp_path / "packed")(IDS).logits, packed)

    def test_same_seed_same_routers(self, trained):
        _, folder = trained
        again = load(folder)
        set_expert_pruning(again, False)
        before = [p.clone() for name, p in again.named_parameters() if ".otp." in name]
        for seed, same in ((0, True), (1, False)):
            otp = OTPConfig(**(QUICK.to_dict() | {"seed": seed}))
            train_expert_pruning(again, TEXT, options=otp, num_samples=16, seq_len=32, progress=lambda step: None)
            now = [p for name, p in again.named_parameters() if ".otp." in name]
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True)) == same

    def test_dense_model_by_size_of_its_hidden_states(self, dense):
        model, steps = load(dense), []
        full = model(IDS).logits
        otp = OTPConfig(objective="layers", tokens=512, batch_tokens=128)
        train_expert_pruning(model, TEXT, 0.3, options=otp, num_samples=16, seq_len=32, progress=steps.append)
        assert {step.stage for step in steps} == {"measure", "measure held-out"}
        with torch.no_grad():
            model(TEXT)
        assert expert_pruning_stats(model)["prefill"]["slots_skipped"] == pytest.approx(0.3, abs=0.03)
        assert set_expert_pruning(model, otp=0.1).target == 0.1
        set_expert_pruning(model, False)
        assert torch.equal(model(IDS).logits, full)
        assert all(p.requires_grad for p in model.parameters())

    def test_training_on_the_output_lowers_the_divergence(self, dense, caplog):
        model = load(dense)
        otp = OTPConfig(target=0.3, steps=16, batch_tokens=256, learning_rate=2e-2)
        with caplog.at_level(logging.INFO, logger="transformers_mcmoe.routing.otp.training"):
            RouterTraining(model, prunable_experts(model), otp, Meter(lambda step: None)).run(Sequences(TEXT))
        # of the routers as they were fitted, then after some steps each
        losses = [record.args[0 if len(record.args) == 1 else 1] for record in caplog.records]
        assert len(losses) > 2
        assert min(losses[1:]) < losses[0]

    def test_refused(self, dense, trained, tmp_path):
        model = load(dense)
        with pytest.raises(ValueError, match="train_expert_pruning"):
            set_expert_pruning(model, otp=True)
        with pytest.raises(ValueError, match=r"target=0\.7 cannot be met"):
            train_expert_pruning(model, TEXT, 0.7)
        with pytest.raises(ValueError, match="two calibration sequences"):
            train_expert_pruning(model, TEXT[:1], num_samples=1, seq_len=32)
        with pytest.raises(ValueError, match="give one of them"):
            set_expert_pruning(trained[0], True, otp=True)
        with pytest.raises(ValueError, match="left out with odp"):
            MCMoEConfig(odp=True, otp=True)
        single = load(save_dense("mixtral", tmp_path / "single", num_experts_per_tok=1))
        with pytest.raises(ValueError, match="sends each token to one expert"):
            train_expert_pruning(single, TEXT)
        assert attached(model) is None

    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    def test_checkpoint_without_routers(self, dense, tmp_path):
        compressed(dense).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has no pruning routers"):
            load(tmp_path, quantization_config=MCMoEConfig(otp=True))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"target": 1.0}, "target"),
        ({"objective": "none"}, "objective"),
        ({"rank": 0}, "rank"),
        ({"objective": "layers", "steps": 3}, "steps"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"temperatures": (0.1, 1.0)}, "temperatures"),
    ],
)
def test_options_are_checked(options, name):
    with pytest.raises(ValueError, match=f"{name}="):
        OTPConfig(**options)


def test_options_in_json():
    otp = OTPConfig(target=0.3, shifts=[-1.0, 0.5, 2.0], droppable=0.5, normalized={"a": True}, slots=2)
    assert OTPConfig.read(json.loads(json.dumps(otp.to_dict()))) == OTPConfig(**otp.to_dict())
    assert otp.shift == pytest.approx(0.5 + 0.2 * 1.5)
    assert OTPConfig.read(True) == OTPConfig()
    assert OTPConfig.read(False) is None
    with pytest.raises(ValueError, match="no option 'targets'"):
        OTPConfig.read({"targets": 0.1})
    assert MCMoEConfig(otp={"target": 0.3}).otp == OTPConfig(target=0.3)


@pytest.mark.skipif(cpu.library() is None, reason="installed without the CPU kernels (no C++ compiler)")
class TestCompiled:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("slots", "renormalize"), [(2, True), (8, False)])
    def test_equals_the_reference(self, slots, renormalize, dtype):
        experts, count, none = 12, 200, 13
        router, x = _router(40, slots), _random(count, 40).to(dtype)
        generator = torch.Generator().manual_seed(0)
        index = torch.stack([torch.randperm(13, generator=generator)[:slots] for _ in range(count)])  # 12: no expert
        weights = _random(count, slots, seed=4).softmax(-1)
        call = Call()
        call.shape, call.valid = (2, count // 2), torch.arange(count).view(2, -1) % 7 > 0
        expected, fused = (
            LearnedPruning(router, 0.2, "x", renormalize, call, [1.0] * experts, none) for _ in range(2)
        )
        expected.compiled = lambda x, index: None
        kept, left = expected(x, index, weights)
        found = fused(x, index, weights)
        assert torch.equal(found[0], kept)
        assert torch.allclose(found[1], left, atol=1e-6)
        assert fused.counts.read(0) == expected.counts.read(0)
        assert 0 < expected.counts.read(0)["slots_skipped"] < count * (slots - 1)

    def test_tokens_alone_and_together(self):
        router, x, weights = _router(40, 4), _random(50, 40), _random(50, 4, seed=4).softmax(-1)
        index = torch.arange(4).expand(50, 4)
        pruning = LearnedPruning(router, 0.0, "x", True, Call(), [1.0] * 4, 4)
        together = pruning(x, index, weights)
        for t in range(50):
            alone = pruning(x[t : t + 1], index[t : t + 1], weights[t : t + 1])
            assert torch.equal(alone[0], together[0][t : t + 1])
            assert torch.equal(alone[1], together[1][t : t + 1])
