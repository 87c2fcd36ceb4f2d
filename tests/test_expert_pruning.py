# SPDX-License-Identifier: Apache-2.0
"""Dropping experts: importance, counts, search and combination against brute force."""

import itertools
import random

import pytest
import torch
from test_routers import block_path, spread
from tiny import tiny_model, tokens

from transformers_mcmoe.models.experts import find_experts
from transformers_mcmoe.models.routers import Router
from transformers_mcmoe.structure import (
    BlockOutputs,
    BlockRecorder,
    drop_counts,
    expert_pruning,
    leave_one_out,
    reception_field,
    search,
    search_is_exhaustive,
)


class Quadratic:
    """An error with interactions: x^T A x for the indicator x of the dropped set, A positive definite."""

    def __init__(self, num_experts, seed):
        generator = torch.Generator().manual_seed(seed)
        factor = torch.randn(num_experts, num_experts, generator=generator, dtype=torch.float64)
        self.matrix = factor @ factor.T
        self.num_experts, self.asked = num_experts, 0

    def error(self, dropped):
        self.asked += 1
        index = list(dropped)
        return float(self.matrix[index][:, index].sum().clamp(min=0).sqrt())


def best_sets(outputs, count, groups=1):
    size = outputs.num_experts // groups
    sets = [
        chosen
        for chosen in itertools.combinations(range(outputs.num_experts), count)
        if all(sum(e // size == g for e in chosen) == count // groups for g in range(groups))
    ]
    return sorted(sets, key=lambda dropped: (outputs.error(dropped), dropped))


def optima_found():
    """In how many of ten random instances the search for 8 of 16 experts ends at the best set."""
    instances = ((Quadratic(16, seed), seed) for seed in range(10))
    return sum(search(outputs, 8, seed=seed) == best_sets(outputs, 8)[:1] for outputs, seed in instances)


class TestSearch:
    @pytest.mark.parametrize(("experts", "count", "groups"), [(6, 2, 1), (8, 4, 1), (8, 4, 2), (12, 6, 3)])
    def test_all_sets_where_they_are_few(self, experts, count, groups):
        outputs = Quadratic(experts, seed=count)
        assert search_is_exhaustive(experts, count, groups)
        assert search(outputs, count, best=3, groups=groups) == best_sets(outputs, count, groups)[:3]

    def test_genetic_search_finds_the_optimum(self):
        """16 experts, half of them dropped: 12,870 sets, of which the search looks at no more than 5,000 and some swaps."""
        assert not search_is_exhaustive(16, 8)
        assert optima_found() >= 9

    def test_without_the_swaps_at_the_end(self, monkeypatch):
        """The genetic search itself finds most optima."""
        monkeypatch.setattr(expert_pruning._Genetic, "_improved", lambda self, dropped: dropped)
        assert optima_found() >= 8

    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_genetic_sets_are_valid_and_reproducible(self, groups, monkeypatch):
        monkeypatch.setattr(expert_pruning, "EXHAUSTIVE", 10)
        outputs = Quadratic(16, seed=3)
        first = search(outputs, 8, best=5, groups=groups, seed=1, population=12, generations=4)
        again = search(outputs, 8, best=5, groups=groups, seed=1, population=12, generations=4)
        assert first == again
        assert len(set(first)) == 5
        size = 16 // groups
        for dropped in first:
            assert len(set(dropped)) == 8
            assert list(dropped) == sorted(dropped)
            assert {sum(e // size == g for e in dropped) for g in range(groups)} == {8 // groups}
        assert [outputs.error(d) for d in first] == sorted(outputs.error(d) for d in first)

    @pytest.mark.parametrize(("count", "groups"), [(8, 1), (3, 2), (-1, 1)])
    def test_counts_that_make_no_sense(self, count, groups):
        with pytest.raises(ValueError, match=f"count={count} is not valid"):
            search(Quadratic(8, 0), count, groups=groups)


class TestCounts:
    def test_important_layers_drop_less(self):
        assert drop_counts([1.0, 2.0, 4.0], [8, 8, 8], 7 / 24, [2] * 3, [1] * 3) == [4, 2, 1]

    def test_alike(self):
        assert drop_counts([1.0] * 4, [8] * 4, 0.25, [2] * 4, [1] * 4) == [2] * 4

    def test_bounds_and_what_they_leave_over(self):
        counts = drop_counts([1e-9, 1.0, 1.0], [8, 8, 8], 0.5, [2] * 3, [1] * 3)
        assert counts == [6, 3, 3]

    def test_groups(self):
        counts = drop_counts([1.0, 3.0], [16, 16], 0.375, [4, 4], [4, 4])
        assert sum(counts) == 12
        assert all(count % 4 == 0 for count in counts)
        assert counts[0] > counts[1]

    def test_against_brute_force(self):
        """No other counts of the same sum and bounds are nearer to the ideal shares."""
        rng = random.Random(0)
        for _ in range(20):
            importance = [rng.uniform(0.5, 2.0) for _ in range(4)]
            ideal = [1 / value for value in importance]
            counts = drop_counts(importance, [8] * 4, 0.25, [2] * 4, [1] * 4)
            shares = [8 * value / sum(ideal) for value in ideal]
            if max(shares) > 6:
                continue
            distance = sum(abs(a - b) for a, b in zip(counts, shares, strict=True))
            others = (c for c in itertools.product(range(7), repeat=4) if sum(c) == 8)
            assert distance <= min(sum(abs(a - b) for a, b in zip(c, shares, strict=True)) for c in others) + 1e-9

    def test_too_many(self):
        with pytest.raises(ValueError, match=r"prune=0\.9 cannot be met: .* at most 12 of 16 experts \(0\.75\)"):
            drop_counts([1.0, 1.0], [8, 8], 0.9, [2, 2], [1, 1])


def test_reception_field_tries_all_combinations():
    """Against the minimum over the product; a prefix runs once."""
    candidates = [[(0,), (1,), (2,)], [(0,), (1,)], [(3,), (4,), (5,)]]
    generator = random.Random(0)
    table = {combination: generator.random() for combination in itertools.product(*candidates)}
    runs = []

    def run(state, layer, dropped):
        runs.append((*state, dropped))
        return (*state, dropped)

    chosen = reception_field(candidates, (), run, table.__getitem__)
    assert tuple(chosen) == min(table, key=table.__getitem__)
    assert len(runs) == len(set(runs)) == 3 + 6 + 18


def record(model, relative=False, most=10**6, rows=3, calls=1):
    experts = next(iter(find_experts(model).values()))
    path = block_path(experts)
    layer = model.get_submodule(path if path.rpartition(".")[2].isdigit() else path.rpartition(".")[0])
    recorder = BlockRecorder(layer, model.get_submodule(path), experts, Router(model, experts), relative, most, calls)
    with torch.no_grad(), recorder.observe():
        for row in tokens(rows, 20):
            model(row[None], use_cache=False)
    return experts, recorder


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "dbrx", "gemma4_text",
                                    "gpt_oss", "hunyuan_v1_moe", "longcat_flash", "lfm2_moe"])  # fmt: skip
class TestBlockOutputs:
    def test_errors_are_those_of_the_block(self, family):
        """Against running the experts with the sliced router, for every expert alone and for some pairs."""
        model = spread(tiny_model(family))
        experts, recorder = record(model)
        with torch.no_grad():
            outputs = BlockOutputs(recorder)
            router = Router(model, experts)
            whole = returned(model, experts)
            for dropped in [(0,), (3,), (7,), (1, 6), (0, 5), (2, 7)]:
                with router.keeping([e for e in range(8) if e not in dropped]):
                    change = returned(model, experts) - whole
                assert outputs.error(dropped) == pytest.approx(float(change.norm()), rel=2e-4, abs=1e-6)

    def test_importance_is_the_error_alone(self, family):
        model = spread(tiny_model(family))
        _, recorder = record(model)
        with torch.no_grad():
            outputs = BlockOutputs(recorder)
            assert leave_one_out(outputs) == [outputs.error((e,)) for e in range(8)]


def returned(model, experts):
    """What the first experts module returns for the recorded tokens, whatever later layers do."""
    found = []
    handle = experts.module.register_forward_hook(lambda module, args, output: found.append(output.detach()))
    for row in tokens(3, 20):
        model(row[None], use_cache=False)
    handle.remove()
    return torch.cat([output.flatten(0, -2) for output in found]).double()


def test_saliency_and_tokens():
    """REAP's mean of weight times norm over an expert's own tokens."""
    model = spread(tiny_model("mixtral"))
    experts, recorder = record(model)
    with torch.no_grad():
        outputs = BlockOutputs(recorder)
        seen = {}
        with experts.observe(lambda e, x, w, p: seen.setdefault(e, []).append((x, w))):
            for row in tokens(3, 20):
                model(row[None], use_cache=False)
        for expert in range(8):
            x, w = (torch.cat(parts) for parts in zip(*seen[expert], strict=True))
            assert int(outputs.tokens()[expert]) == len(x)
            own = float((w * experts.run(expert, x).norm(dim=-1)).mean())
            assert float(outputs.saliency()[expert]) == pytest.approx(own, rel=1e-4)


def test_relative_errors_weigh_tokens_by_their_norm():
    model = spread(tiny_model("mixtral"))
    _, plain = record(model)
    _, relative = record(model, relative=True)
    with torch.no_grad():
        a, b = BlockOutputs(plain), BlockOutputs(relative)
    assert torch.equal(a.products, b.products)
    assert (a.factor == 1).all()
    assert b.factor.shape == (60,)
    assert b.error((1,)) != a.error((1,))


def test_tokens_are_bounded():
    """As many of every call, spread over it."""
    model = spread(tiny_model("mixtral"))
    _, every = record(model)
    _, some = record(model, most=24, calls=3)
    with torch.no_grad():
        few, whole = BlockOutputs(some), BlockOutputs(every)
        assert len(few.products) == 24
        rows = [20 * call + (n * 20) // 8 for call in range(3) for n in range(8)]
        assert torch.allclose(few.products, whole.products[rows])
        assert torch.equal(few.weights, whole.weights[rows])
        part = BlockOutputs(record(model, most=60, calls=3)[1])
        assert part.error((1, 4)) == pytest.approx(whole.error((1, 4)))
