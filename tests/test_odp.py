# SPDX-License-Identifier: Apache-2.0
"""The rule of dynamic expert pruning in one layer, and the thresholds it goes by."""

import pytest
import torch

from transformers_mcmoe import ODPConfig
from transformers_mcmoe.kernels import cpu
from transformers_mcmoe.routing import RatioTable, RoutingRatios, ThresholdPruning
from transformers_mcmoe.routing.call import Call

E, K, T = 8, 4, 3000


def _routing(seed=0, normalize=True, slots=K):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(T, E, generator=generator).softmax(-1)
    index = torch.stack([torch.randperm(E, generator=generator)[:slots] for _ in range(T)])  # in no order
    weights = scores.gather(-1, index)
    return index, weights / weights.sum(-1, keepdim=True) if normalize else weights


def _pruning(odp, levels, renormalize=True, sizes=None, skip=E):
    return ThresholdPruning(odp, "x", levels, renormalize, Call(), None, sizes or [1.0] * E, skip)


class TestRule:
    def test_brute_force(self):
        index, weights = _routing()
        levels = [0.8, 0.5, 0.3]
        new_index, new_weights = _pruning(ODPConfig(threshold=0.5, protect=0), levels)(
            torch.zeros(T, 8), index, weights
        )
        for t in range(T):
            order = sorted(range(K), key=lambda k, t=t: -float(weights[t, k]))
            first = float(weights[t, order[0]])
            kept = [k for rank, k in enumerate(order) if rank == 0 or float(weights[t, k]) >= levels[rank - 1] * first]
            assert [k for k in range(K) if new_index[t, k] != E] == sorted(kept)
            total = float(weights[t, kept].sum())
            for k in range(K):
                expected = float(weights[t, k]) / total if k in kept else 0.0
                assert abs(float(new_weights[t, k]) - expected) < 1e-5

    @pytest.mark.skipif(cpu.library() is None, reason="installed without the CPU kernels (no C++ compiler)")
    @pytest.mark.parametrize("levels", [[0.8, 0.5, 0.3], [0.5, 0.5, 0.5]])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiled_equals_the_reference(self, levels, dtype):
        index, weights = _routing()
        index[index == 5] = E + 1  # no expert: never skipped
        weights = weights.to(dtype)
        levels[0] = float(weights[0, 1] / weights[0].max()) if levels[0] != levels[1] else levels[0]  # at the edge
        call, whole = Call(), torch.arange(T) % 5 == 0
        call.shape, call.valid = (2, T // 2), torch.arange(T).view(2, -1) % 7 > 0
        expected, compiled = (
            ThresholdPruning(ODPConfig(threshold=0.5), "x", levels, True, call, None, [1.0] * E, E + 2)
            for _ in range(2)
        )
        for pruning in (expected, compiled):
            pruning._tokens = lambda share, index: whole
        expected.compiled = lambda x, index: None
        (kept, left), (ids, found) = (pruning(torch.zeros(T, 8), index, weights) for pruning in (expected, compiled))
        assert torch.equal(ids, kept)
        assert found.dtype == dtype
        assert torch.allclose(found, left, rtol=1e-6 if dtype == torch.float32 else 2e-2)  # bf16 is rounded thrice
        assert compiled.counts.read(0) == expected.counts.read(0)
        assert 0 < expected.counts.read(0)["slots_skipped"] < T * (K - 1)
        assert torch.equal(ids[whole], index[whole])

    def test_nothing_is_skipped_at_zero(self):
        index, weights = _routing()
        new_index, new_weights = _pruning(ODPConfig(threshold=0, protect=0), [0.0] * 3)(
            torch.zeros(T, 8), index, weights
        )
        assert torch.equal(new_index, index)
        assert torch.equal(new_weights, weights)

    def test_one_expert_is_kept_at_one(self):
        index, weights = _routing()
        new_index, new_weights = _pruning(ODPConfig(threshold=1, protect=0), [1.0] * 3)(
            torch.zeros(T, 8), index, weights
        )
        assert ((new_index != E).sum(-1) == 1).all()
        assert torch.equal(index.gather(-1, weights.argmax(-1, keepdim=True)).squeeze(), new_index.min(-1).values)
        assert torch.allclose(new_weights.max(-1).values, torch.ones(T))

    def test_weights_are_left_where_routers_do_not_normalise(self):
        index, weights = _routing(normalize=False)
        _, new_weights = _pruning(ODPConfig(threshold=0.5, protect=0), [0.5] * 3, renormalize=False)(
            torch.zeros(T, 8), index, weights
        )
        assert torch.equal(new_weights[new_weights > 0], weights[new_weights > 0])
        assert (new_weights == 0).any()

    def test_ids_that_are_no_experts_are_not_touched(self):
        index, weights = _routing()
        index[:, 2] = E + 1
        new_index, _ = _pruning(ODPConfig(threshold=1, protect=0), [1.0] * 3, skip=E + 5)(
            torch.zeros(T, 8), index, weights
        )
        assert (new_index[:, 2] == E + 1).all()
        assert (new_index == E + 5).any()

    def test_without_an_id_for_none_weights_alone_change(self):
        index, weights = _routing()
        new_index, new_weights = _pruning(ODPConfig(threshold=1, protect=0), [1.0] * 3, skip=None)(
            torch.zeros(T, 8), index, weights
        )
        assert torch.equal(new_index, index)
        assert ((new_weights != 0).sum(-1) == 1).all()

    def test_gradients_reach_kept_weights(self):
        index, weights = _routing()
        weights = weights[:5].double().requires_grad_()
        pruning = _pruning(ODPConfig(threshold=0.6, protect=0), [0.6] * 3)
        assert torch.autograd.gradcheck(lambda w: pruning(torch.zeros(5, 8), index[:5], w)[1], weights)

    @pytest.mark.parametrize("method", ["random", "mean", "variance", "kurtosis"])
    def test_comparators_meet_their_rate(self, method):
        index, weights = _routing()
        ratios = RoutingRatios(E)
        ratios.add(index, weights)
        odp = ODPConfig(method=method, rate=0.3)
        pruning = _pruning(odp, ratios.table([1.0] * E).levels(odp))
        pruning(torch.randn(T, 16), index, weights)
        counts = pruning.counts.read(0)
        assert abs(counts["slots_skipped"] / counts["slots"] - 0.3) < 0.01

    def test_layers_draw_apart(self):
        index, weights = _routing()
        odp = ODPConfig(method="random", rate=0.3)
        first, second = (ThresholdPruning(odp, name, [0.5], True, Call(), None, [1.0] * E, E) for name in "ab")
        x = torch.zeros(T, 8)
        assert not torch.equal(first(x, index, weights)[0], second(x, index, weights)[0])

    def test_token_statistics_reduce_the_lowest_tokens(self):
        index, weights = _routing()
        x = torch.randn(T, 16) + torch.arange(T)[:, None]
        new_index, _ = _pruning(ODPConfig(method="mean", rate=0.3), [0.4])(x, index, weights)
        reduced = (new_index == E).any(-1)
        assert reduced.sum() == T * 0.4
        assert x.mean(-1)[reduced].max() < x.mean(-1)[~reduced].min()


class TestThresholds:
    def test_quantiles_are_those_of_the_ratios(self):
        index, weights = _routing(slots=3)
        ratios = RoutingRatios(E)
        for start in range(0, T, 700):
            ratios.add(index[start : start + 700], weights[start : start + 700])
        table = ratios.table([1.0] * E)
        ordered = weights.sort(-1, descending=True).values
        for quantile in (0.25, 0.5, 0.75):
            expected = (ordered[:, 1:] / ordered[:, :1]).double().quantile(quantile, dim=0)
            assert torch.allclose(
                torch.tensor(table.levels(ODPConfig(quantile=quantile))).double(), expected, atol=1e-3
            )
        assert table.levels(ODPConfig()) == table.levels(ODPConfig(quantile=0.5))
        assert table.levels(ODPConfig(threshold=0.4)) == [0.4, 0.4]
        assert table.normalized
        assert RatioTable.from_dict(table.to_dict()).normalized

    def test_sums_of_parts(self):
        index, weights = _routing()
        whole, first, second = RoutingRatios(E), RoutingRatios(E), RoutingRatios(E)
        whole.add(index, weights)
        first.add(index[:1000], weights[:1000])
        second.add(index[1000:], weights[1000:])
        sizes = list(range(1, E + 1))
        assert (first + second).table(sizes) == whole.table(sizes) == (RoutingRatios(E) + whole).table(sizes)

    def test_routers_that_do_not_normalise_are_seen(self):
        ratios = RoutingRatios(E)
        ratios.add(*_routing(normalize=False))
        assert not ratios.table([1.0] * E).normalized

    @pytest.mark.parametrize("rate", [0.15, 0.25, 0.5])
    def test_rate_counts_bytes(self, rate):
        index, weights = _routing()
        sizes = [float(1 + e) for e in range(E)]
        ratios = RoutingRatios(E)
        ratios.add(index, weights)
        odp = ODPConfig(rate=rate, protect=0)
        pruning = _pruning(odp, RatioTable.from_dict(ratios.table(sizes).to_dict()).levels(odp), sizes=sizes)
        pruning(torch.zeros(T, 8), index, weights)
        counts = pruning.counts.read(0)
        assert abs(counts["bytes_skipped"] / counts["bytes"] - rate) < 0.01

    def test_rate_with_tokens_that_skip_everything(self):
        ratios = RoutingRatios(E)
        ratios.add(*_routing())
        table = ratios.table([1.0] * E)
        odp = ODPConfig(rate=0.3, protect=0.1, drop_all=0.05)
        share = (0.3 - 0.05) / (0.85 * 0.75)
        assert table.levels(odp) == pytest.approx(
            table.levels(ODPConfig(rate=share * table.droppable, protect=0)), abs=1e-3
        )
        with pytest.raises(ValueError, match=r"rate=0\.04 cannot be met"):
            table.levels(ODPConfig(rate=0.04, drop_all=0.05))

    def test_rate_that_cannot_be_met(self):
        ratios = RoutingRatios(E)
        ratios.add(*_routing(slots=2))
        with pytest.raises(ValueError, match=r"rate=0\.6 cannot be met"):
            ratios.table([1.0] * E).levels(ODPConfig(rate=0.6))


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": 0.5, "rate": 0.1}, "contradict"),
            ({"threshold": 1.5}, "threshold=1.5"),
            ({"quantile": -0.1}, "quantile=-0.1"),
            ({"protect": 1.0}, "protect=1.0"),
            ({"protect": 0.7, "drop_all": 0.5}, "drop_all=0.5"),
            ({"layers": "some"}, "layers='some'"),
            ({"layers": []}, "layers="),
            ({"layers": "auto"}, "max_kl=None"),
            ({"max_kl": 0.1}, "max_kl=0.1"),
            ({"method": "best"}, "method='best'"),
            ({"method": "random"}, "rate=None"),
            ({"causal": 1}, "causal=1"),
            ({"seed": -1}, "seed=-1"),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            ODPConfig(**options)

    def test_json(self):
        odp = ODPConfig(rate=0.2, layers=[3, 1], thresholds={"a": [0.5]}, normalized={"a": True})
        assert ODPConfig.read(odp.to_dict()) == odp
        assert odp.layers == (1, 3)
        assert ODPConfig.read(True) == ODPConfig()
        assert ODPConfig.read(False) is ODPConfig.read(None) is None
        with pytest.raises(ValueError, match="no option 'speed'"):
            ODPConfig.read({"speed": 1})
        with pytest.raises(ValueError, match="odp=3"):
            ODPConfig.read(3)
