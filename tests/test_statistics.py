# SPDX-License-Identifier: Apache-2.0
"""What calibration measures: additive counts, uniform samples, and errors equal to those of the whole MoE block."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from transformers_mcmoe.calibration import statistics
from transformers_mcmoe.calibration.observing import LayerTokens, Outputs
from transformers_mcmoe.calibration.statistics import (
    FEW_TOKENS,
    SAMPLE,
    ExpertInputs,
    RoutingStatistics,
    Sample,
    output_errors,
)
from transformers_mcmoe.models.experts import FusedExperts, find_experts
from transformers_mcmoe.quantization import quantize

H = 8


def output_error(experts, expert, sample, matrices):
    return output_errors(experts, expert, sample, [matrices])[0]


def _numbered(start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Tokens [n, H] whose first column is their number, and weights that tell the number, too."""
    number = torch.arange(start, stop, dtype=torch.float32)
    return number[:, None].expand(-1, H).contiguous(), 0.5 + number / 2


class TestRouting:
    def test_zeros(self):
        routing = RoutingStatistics.zeros(3)
        assert routing.tokens.tolist() == [0, 0, 0]
        assert routing.tokens.dtype == torch.int64
        assert routing.weight.dtype == torch.float64

    def test_additive(self, tmp_path: Path):
        """Parts counted apart give the counts of the whole."""
        random = torch.Generator().manual_seed(0)
        calls = [
            (int(torch.randint(0, 4, (), generator=random)), torch.randn(n, H), torch.rand(n, generator=random))
            for n in (3, 50, 1, 20, 7, 0, 11)
        ]
        whole = ExpertInputs(4, tmp_path / "whole", 0)
        parts = [ExpertInputs(4, tmp_path / f"part{i}", 0) for i in range(2)]
        for i, call in enumerate(calls):
            whole.record(*call)
            parts[i % 2].record(*call)
        total = parts[0].routing + parts[1].routing
        assert torch.equal(total.tokens, whole.routing.tokens)
        assert torch.allclose(total.weight, whole.routing.weight, rtol=1e-12)
        assert int(total.tokens.sum()) == sum(len(x) for _, x, _ in calls)
        for expert in range(4):
            expected = sum(w.double().sum() for e, _, w in calls if e == expert)
            assert float(total.weight[expert]) == pytest.approx(float(expected))
        assert int(parts[0].routing.tokens.sum()) < int(total.tokens.sum())  # the operands are unchanged

    def test_weights_applied_outside_count_as_one(self, tmp_path: Path):
        inputs = ExpertInputs(2, tmp_path / "x", 0)
        inputs.record(1, torch.randn(40, H), None)
        assert inputs.routing.weight.tolist() == [0.0, 40.0]
        assert (inputs.sample(1).weight == 1).all()


class TestSample:
    @pytest.mark.parametrize("count", [FEW_TOKENS, 100, SAMPLE])
    @pytest.mark.parametrize("chunk", [1, 7, 10**6])
    def test_all_are_kept_up_to_the_size(self, tmp_path: Path, count: int, chunk: int):
        inputs = ExpertInputs(3, tmp_path / "x", 0)
        x, weights = _numbered(0, count)
        for part in range(0, count, chunk):
            inputs.record(1, x[part : part + chunk], weights[part : part + chunk])
        sample = inputs.sample(1)
        assert torch.equal(sample.x, x)
        assert torch.equal(sample.weight, weights)
        assert sample.scale == 1.0
        assert inputs.routing.tokens.tolist() == [0, count, 0]

    def test_empty_calls(self, tmp_path: Path):
        inputs = ExpertInputs(3, tmp_path / "x", 0)
        inputs.record(0, torch.empty(0, H), torch.empty(0))
        inputs.record(0, torch.empty(0, H), None)
        assert int(inputs.routing.tokens.sum()) == 0

    @pytest.mark.parametrize("chunk", [100, 1024, 5000])
    def test_above_the_size(self, tmp_path: Path, chunk: int):
        inputs = ExpertInputs(2, tmp_path / "x", 0)
        x, weights = _numbered(0, 5000)
        for part in range(0, 5000, chunk):
            inputs.record(1, x[part : part + chunk], weights[part : part + chunk])
        sample = inputs.sample(1)
        number = sample.x[:, 0]
        assert sample.x.shape == (SAMPLE, H)
        assert sample.scale == 5000 / SAMPLE
        assert len(number.unique()) == SAMPLE  # without repetition
        assert (sample.x == number[:, None]).all()
        assert torch.equal(sample.weight, 0.5 + number / 2)  # every token keeps its own weight
        assert inputs.routing.tokens.tolist() == [0, 5000]
        assert float(inputs.routing.weight[1]) == pytest.approx(float(weights.double().sum()))
        # the mean number of a uniform sample: 2499.5, standard deviation 1443 sqrt((1 - 1024 / 5000) / 1024) = 40
        assert abs(float(number.mean()) - 2499.5) < 5 * 40

    @pytest.mark.parametrize("chunk", [5, 13, 160])
    def test_uniform(self, tmp_path: Path, chunk: int, monkeypatch):
        """Every one of 160 tokens is in a sample of 16 equally often, whatever its place and the size of a call."""
        monkeypatch.setattr(statistics, "SAMPLE", 16)
        monkeypatch.setattr(statistics, "FEW_TOKENS", 1)
        x, weights = _numbered(0, 160)
        hits, runs = torch.zeros(160), 200
        for seed in range(runs):
            inputs = ExpertInputs(1, tmp_path / "x", seed)
            for part in range(0, 160, chunk):
                inputs.record(0, x[part : part + chunk], weights[part : part + chunk])
            hits[inputs.sample(0).x[:, 0].long()] += 1
        assert int(hits.sum()) == 16 * runs
        expected, variance = runs / 10, runs * 0.1 * 0.9
        chi2 = float(((hits - expected) ** 2 / variance).sum())
        # chi-squared with 159 degrees of freedom: mean 159, standard deviation 17.8
        assert 159 - 5 * 17.8 < chi2 < 159 + 5 * 17.8
        for part in hits.split(16):  # no place in the stream is favoured: 320 expected, standard deviation <= 17
            assert abs(float(part.sum()) - 16 * expected) < 5 * math.sqrt(16 * variance)

    def test_seed(self, tmp_path: Path):
        numbers = []
        for i, seed in enumerate((0, 0, 1)):
            inputs = ExpertInputs(1, tmp_path / str(i), seed)
            inputs.record(0, *_numbered(0, 3000))
            numbers.append(inputs.sample(0).x[:, 0].clone())
        assert torch.equal(numbers[0], numbers[1])
        assert not torch.equal(numbers[0], numbers[2])

    def test_experts_do_not_mix(self, tmp_path: Path):
        inputs = ExpertInputs(2, tmp_path / "x", 0)
        for _ in range(3):
            inputs.record(0, *_numbered(0, 700))
            inputs.record(1, *_numbered(1000, 1700))
        assert (inputs.sample(0).x < 700).all()
        assert (inputs.sample(1).x >= 1000).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, tmp_path: Path, dtype: torch.dtype):
        inputs = ExpertInputs(1, tmp_path / "x", 0)
        x = torch.randn(50, H).to(dtype)
        inputs.record(0, x, torch.rand(50).to(dtype))
        assert inputs.sample(0).x.dtype == dtype
        assert torch.equal(inputs.sample(0).x, x)
        assert inputs.sample(0).weight.dtype == torch.float32

    def test_inputs_lie_in_a_file(self, tmp_path: Path):
        inputs = ExpertInputs(4, tmp_path / "x.bin", 0)
        inputs.record(2, torch.randn(40, H), None)
        assert (tmp_path / "x.bin").stat().st_size == 4 * SAMPLE * H * 4

    def test_starved(self, tmp_path: Path):
        inputs = ExpertInputs(4, tmp_path / "x", 0)
        for expert, count in enumerate((500, FEW_TOKENS - 1, FEW_TOKENS, 0)):
            x, _ = _numbered(1000 * expert, 1000 * expert + count)
            inputs.record(expert, x, torch.full((count,), 0.25 * (expert + 1)))
        assert [inputs.is_starved(expert) for expert in range(4)] == [False, True, False, True]
        routing = inputs.routing
        mean = float(routing.weight.sum() / routing.tokens.sum())
        for expert in (1, 3):
            sample = inputs.sample(expert)
            # SAMPLE / (4 E) = 64 tokens of each expert at most, or all that it has
            assert [int((sample.x[:, 0] // 1000 == e).sum()) for e in range(4)] == [64, FEW_TOKENS - 1, FEW_TOKENS, 0]
            assert sample.weight.tolist() == pytest.approx([mean] * len(sample.x))
            assert sample.scale == pytest.approx(max(int(routing.tokens[expert]), 1) / len(sample.x))
        assert inputs.sample(2).x.shape == (FEW_TOKENS, H)

    def test_many_starved_experts(self, tmp_path: Path):
        """More experts than a quarter of a sample: one token of each; an expert without tokens counts as one."""
        inputs = ExpertInputs(2 * SAMPLE, tmp_path / "x", 0)
        for expert in range(0, 2 * SAMPLE, 64):
            inputs.record(expert, torch.full((2, 1), float(expert)), None)
        assert inputs.sample(1).x.shape == (2 * SAMPLE // 64, 1)
        assert inputs.sample(1).scale == 64 / (2 * SAMPLE)

    def test_no_token_at_all(self, tmp_path: Path):
        inputs = ExpertInputs(4, tmp_path / "x", 0)
        with pytest.raises(ValueError, match="No calibration token reached any expert of this layer; use other"):
            inputs.sample(0)
        inputs.record(0, torch.empty(0, H), None)
        with pytest.raises(ValueError, match="No calibration token reached"):
            inputs.sample(0)


def _block() -> MixtralSparseMoeBlock:
    config = MixtralConfig(hidden_size=32, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2)
    block = MixtralSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


class TestOutputError:
    def _observed(self, block: MixtralSparseMoeBlock, x: Tensor, path: Path) -> tuple[FusedExperts, ExpertInputs]:
        experts = FusedExperts("experts", block.experts)
        inputs = ExpertInputs(4, path, 0)
        with torch.no_grad(), experts.observe(inputs.record):
            for part in x.split(64, dim=1):
                block(part.contiguous())
        return experts, inputs

    def _replacement(self, experts: FusedExperts, expert: int) -> dict[str, Tensor]:
        return {p.name: quantize(experts.matrix(expert, p.name), 2, 32).dequantize() for p in experts.projections}

    @torch.no_grad()
    def test_equals_the_block(self, tmp_path: Path):
        block, x = _block(), torch.randn(2, 200, 32)
        experts, inputs = self._observed(block, x, tmp_path / "x")
        assert isinstance(block.experts, MixtralExperts)
        assert int(inputs.routing.tokens.sum()) == 800  # T * K
        for expert in range(4):
            assert not inputs.is_starved(expert)
            matrices = self._replacement(experts, expert)
            error = output_error(experts, expert, inputs.sample(expert), matrices)
            before = block(x)
            dense = {name: experts.matrix(expert, name).clone() for name in matrices}
            for name, matrix in matrices.items():
                experts.matrix(expert, name).copy_(matrix)
            after = block(x)
            for name, matrix in dense.items():
                experts.matrix(expert, name).copy_(matrix)
            assert error == pytest.approx(float((after - before).double().norm()), rel=1e-5)
            assert error > 0.1

    @torch.no_grad()
    def test_estimate_from_a_sample(self, tmp_path: Path, monkeypatch):
        """A quarter of the tokens, scaled up, gives the error of all within a few per cent."""
        block, x = _block(), torch.randn(2, 900, 32)
        experts, every = self._observed(block, x, tmp_path / "every")
        replaced = [self._replacement(experts, expert) for expert in range(4)]
        exact = [output_error(experts, expert, every.sample(expert), replaced[expert]) for expert in range(4)]
        monkeypatch.setattr(statistics, "SAMPLE", 256)
        _, some = self._observed(block, x, tmp_path / "some")
        assert torch.equal(every.routing.tokens, some.routing.tokens)
        for expert in range(4):
            sample = some.sample(expert)
            assert len(sample.x) == 256 < int(every.routing.tokens[expert]) <= 1024
            assert output_error(experts, expert, sample, replaced[expert]) == pytest.approx(exact[expert], rel=0.1)

    @torch.no_grad()
    def test_own_matrices_have_no_error(self, tmp_path: Path):
        block, x = _block(), torch.randn(2, 200, 32)
        experts, inputs = self._observed(block, x, tmp_path / "x")
        own = {p.name: experts.matrix(0, p.name).clone() for p in experts.projections}
        assert output_error(experts, 0, inputs.sample(0), own) == 0.0

    @torch.no_grad()
    def test_never_routed_expert_is_measured_as_if_one_token_had_reached_it(self, tmp_path: Path):
        block, x = _block(), torch.randn(2, 100, 32)
        experts = FusedExperts("experts", block.experts)
        inputs = ExpertInputs(4, tmp_path / "x", 0)
        with experts.observe(inputs.record):
            block.experts(x[0], torch.tensor([[0, 1]]).expand(100, 2), torch.full((100, 2), 0.5))
        assert inputs.is_starved(3)
        replaced, sample = self._replacement(experts, 3), inputs.sample(3)
        change = experts.run(3, sample.x, replaced) - experts.run(3, sample.x)
        expected = 0.5 * float(change.square().sum(-1).mean().sqrt())
        assert output_error(experts, 3, sample, replaced) == pytest.approx(expected, rel=1e-5)


class TestHeldOut:
    def test_only_held_out_tokens_are_sampled_and_all_are_counted(self, tmp_path: Path):
        inputs = ExpertInputs(2, tmp_path / "x", 0)
        x, weights = _numbered(0, 400)
        norms, sampled = torch.arange(400.0) + 1, torch.arange(400) % 8 == 7
        for part in range(0, 400, 100):
            rows = slice(part, part + 100)
            inputs.record(0, x[rows], weights[rows], norms[rows], sampled[rows])
        sample = inputs.sample(0)
        assert torch.equal(sample.x, x[sampled])
        assert torch.equal(sample.norm, norms[sampled])
        assert sample.scale == 8.0
        assert inputs.routing.tokens.tolist() == [400, 0]
        assert float(inputs.routing.weight[0]) == pytest.approx(float(weights.double().sum()))

    def test_too_few_of_them_are_starved(self, tmp_path: Path):
        inputs = ExpertInputs(2, tmp_path / "x", 0)
        for expert, few in ((0, 7), (1, 8)):
            inputs.record(expert, *_numbered(0, 100), None, torch.arange(100) < few)
        assert inputs.is_starved(0)
        assert not inputs.is_starved(1)

    @pytest.mark.parametrize(("total", "held"), [(16, [3, 7, 11, 15]), (8, [3, 7]), (3, [2]), (2, [1])])
    def test_every_fourth_sequence(self, total: int, held: list[int]):
        layer, experts, tokens, seen = torch.nn.Identity(), torch.nn.Identity(), LayerTokens(), []
        with tokens.observe(layer, experts):
            for start in range(0, total, 2):  # batches of two sequences of five tokens
                batch = torch.randn(min(2, total - start), 5, H)
                layer(batch)
                experts(batch)
                position = torch.arange(len(batch) * 5)
                mask = tokens.held_out(0, position, len(position), total)
                seen += (start + position[mask] // 5).tolist()
                assert torch.equal(tokens.norms(position), batch.norm(dim=-1).flatten())
                copies = tokens.held_out(1, torch.cat((position, position + len(position))), 2 * len(position), total)
                assert torch.equal(copies, mask.repeat(2))  # a block that hands every expert its own copy
        assert seen == [sequence for sequence in held for _ in range(5)]

    def test_experts_of_images_see_a_part_of_the_tokens(self):
        images = torch.tensor([False, True, True, False, False])
        layer, experts = torch.nn.Identity(), torch.nn.Identity()
        tokens = LayerTokens(lambda: images, image=3.0, share=0.5)
        with tokens.observe(layer, experts):
            x = torch.randn(1, 5, H)
            layer(x)
            norms = x.norm(dim=-1).flatten()
            for kind, places in ((True, [1, 2]), (False, [0, 3, 4])):
                experts(x[:, images == kind])
                position = torch.arange(len(places))
                assert torch.equal(tokens.norms(position), norms[places])
                assert tokens.of_images(position).tolist() == [kind] * len(places)
                assert tokens.counts(position, len(places)).tolist() == [1.5 if kind else 0.5] * len(places)
            experts(x[:, :4])  # which four is not known
            assert tokens.norms(torch.arange(4)) is None
            assert tokens.of_images(torch.arange(4)) is None
            # as many of either kind: those that the module got before
            images = torch.tensor([False, True, True, False])
            layer(x[:, :4])
            experts(x[:, :2])
            assert tokens.of_images(torch.arange(2)).tolist() == [False, False]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_tokens_of_experts_in_a_list_are_found(self, dtype: torch.dtype):
        layer, experts, block = (torch.nn.Identity() for _ in range(3))
        tokens, x = LayerTokens(), torch.randn(2, 7, H).to(dtype)
        with tokens.observe(layer, experts, block):
            layer(x)
            block(x)
            chosen = torch.tensor([11, 3, 3, 0])
            assert torch.equal(tokens.find(x.flatten(0, 1)[chosen]), chosen)
            assert tokens.find(x.flatten(0, 1)[chosen] * 2) is None
        assert LayerTokens().find(x[0]) is None

    def test_one_sequence_is_not_split(self):
        assert LayerTokens().held_out(0, None, 5, 1) is None

    def test_unknown_positions_are_split_in_runs(self):
        tokens = LayerTokens()
        masks = [tokens.held_out(3, None, n, 100) for n in (30, 1, 33)]
        assert tokens.held_out(4, None, 8, 100).sum() == 0  # every expert is counted apart
        assert torch.cat(masks).nonzero().flatten().tolist() == [
            *range(12, 16),
            *range(28, 32),
            *range(44, 48),
            *range(60, 64),
        ]
        assert tokens.norms(None) is None


@torch.no_grad()
def test_relative_errors_weigh_a_token_by_what_it_enters(tmp_path: Path):
    experts = find_experts(tiny_model("mixtral"))["model.layers.0.mlp.experts"]
    x, weight = torch.randn(6, 64), torch.rand(6) + 0.5
    norm = torch.tensor([0.0, 1.0, 2.0, 5.0, 10.0, 1e4])
    matrices = {p.name: experts.matrix(2, p.name) * 0.9 for p in experts.projections}
    own, change = experts.run(2, x), experts.run(2, x, matrices) - experts.run(2, x)
    entered = ((weight[:, None] * own).square().sum(-1) + norm.square()).sqrt()
    expected = (3.0 * ((weight[:, None] * change).square().sum(-1) / (entered * entered.median())).sum()).sqrt()
    (error,) = output_errors(experts, 2, Sample(x, weight, norm, 3.0, torch.ones(len(x))), [matrices], relative=True)
    assert error == pytest.approx(float(expected), rel=1e-4)


def test_outputs_are_compared_relative_to_their_norms():
    layer, outputs = torch.nn.Linear(3, 3, bias=False), Outputs()
    weight = layer.weight.data.clone()

    def run() -> float:
        with outputs.observe(layer), torch.no_grad():
            for x in batches:
                layer(x)
        return outputs.change()

    batches = [torch.randn(2, 4, 3), torch.randn(1, 4, 3)]
    assert run() == 0
    layer.weight.data = weight + 0.1
    x = torch.cat([batch.flatten(0, 1) for batch in batches])
    norm, change = (x @ weight.T).norm(dim=-1), (x @ torch.full((3, 3), 0.1)).norm(dim=-1)
    assert run() == pytest.approx(float((change.square() / (norm * norm.median())).mean().sqrt()), rel=1e-4)
    assert run() == pytest.approx(run())  # always against the first
