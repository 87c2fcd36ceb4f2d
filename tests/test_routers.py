# SPDX-License-Identifier: Apache-2.0
"""Sliced routers: they choose as the router of a model that never had the dropped experts, in every family."""

import copy

import pytest
import torch
from tiny import TINY, relative_rms, tiny_model, tokens

from transformers_mcmoe.models.experts import find_experts, routes_outside
from transformers_mcmoe.models.routers import Router, SlicedRouter

REFUSED = {"llama4_text"}
FAMILIES = sorted(set(TINY) - REFUSED)
UNGROUPED, GROUPED = (0, 2, 3, 5, 7), (0, 1, 3, 4, 5, 7)


def spread(model):
    """Router weights and correction biases that send tokens everywhere; many families begin with zeros."""
    generator = torch.Generator().manual_seed(0)
    for experts in find_experts(model).values():
        if routes_outside(experts):
            continue
        block = model.get_submodule(experts.path.rpartition(".")[0])
        total = experts.num_experts + experts.identity_experts
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            inside = f"{block_path(experts)}.{name}".startswith(experts.path + ".")
            if not inside and total in tensor.shape and tensor.is_floating_point() and "scale" not in name:
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * (0.1 if "bias" in name else 1.0))
    return model


def block_path(experts):
    return experts.path.rpartition(".")[0]


def kept_of(router):
    return GROUPED if router.groups > 1 else UNGROUPED


def smaller(family, kept):
    """The same model as if it had been built with the kept experts only."""
    whole = spread(tiny_model(family))
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    changes = {}
    for name in names:
        if TINY[family].get(name) == 8:
            changes[name] = len(kept)
    if family == "dbrx":
        changes["ffn_config"] = TINY[family]["ffn_config"] | {"moe_num_experts": len(kept)}
    small = tiny_model(family, **changes)
    sources = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    adapters = find_experts(whole)
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        source = sources[name]
        if tensor.shape == source.shape:
            tensor.data.copy_(source)
            continue
        (dim,) = [n for n, (a, b) in enumerate(zip(source.shape, tensor.shape, strict=True)) if a != b]
        size = source.shape[dim]
        if size % 8 == 0 and size > 10:  # DBRX: experts follow each other in one dimension
            part = source.unflatten(dim, (8, -1)).index_select(dim, torch.tensor(kept)).flatten(dim, dim + 1)
        else:
            part = source.index_select(dim, torch.tensor([*kept, *range(8, size)]))
        tensor.data.copy_(part)
    return whole, small, adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_like_a_model_without_the_dropped_experts(family):
    probe = Router(*first(tiny_model(family)))
    kept = kept_of(probe)
    whole, small, adapters = smaller(family, kept)
    names = list(whole.state_dict())
    ids = tokens(2, 24)
    with torch.no_grad():
        before = whole(ids).logits
        for experts in adapters.values():
            Router(whole, experts).keep(kept)
        sliced = whole(ids).logits
        expected = small(ids).logits
        assert relative_rms(sliced, expected) < 1e-5
        assert relative_rms(before, expected) > 1e-3  # the experts were used
        assert list(whole.state_dict()) == names
        for experts in adapters.values():
            Router(whole, experts).release()
        assert torch.equal(whole(ids).logits, before)


def first(model):
    return model, next(iter(find_experts(model).values()))


def test_scores_and_ids_are_those_of_all_experts():
    model, experts = first(spread(tiny_model("mixtral")))
    router = Router(model, experts)
    x = torch.randn(50, 64)
    logits = router.module(x)[0]
    router.keep([1, 4, 6])
    sliced, weights, index = router.module(x)
    assert set(index.unique().tolist()) == {1, 4, 6}
    assert torch.allclose(sliced[:, [1, 4, 6]], logits[:, [1, 4, 6]], atol=1e-5)
    assert torch.isneginf(sliced[:, [0, 2, 3, 5, 7]]).all()
    best = sliced[:, [1, 4, 6]].softmax(-1).topk(2)
    assert torch.equal(index, torch.tensor([1, 4, 6])[best.indices])
    assert torch.allclose(weights, best.values / best.values.sum(-1, keepdim=True))


def test_class_stays_what_it_was():
    model, experts = first(tiny_model("mixtral"))
    router = Router(model, experts)
    kind = type(router.module)
    router.keep([0, 1, 2])
    assert isinstance(router.module, kind)
    assert isinstance(router.module, SlicedRouter)
    router.release()
    assert type(router.module) is kind


def test_another_set_for_a_while():
    model, experts = first(spread(tiny_model("qwen3_moe")))
    router = Router(model, experts)
    x = torch.randn(50, 64)
    with router.keeping([0, 1, 2]):
        assert set(router.module(x)[2].unique().tolist()) <= {0, 1, 2}
        with router.keeping([5, 6, 7]):
            assert set(router.module(x)[2].unique().tolist()) <= {5, 6, 7}
        assert set(router.module(x)[2].unique().tolist()) <= {0, 1, 2}
    assert not router.is_sliced


def test_copies_and_later_weights():
    """A copy of a model has its own router, and weights that change later count."""
    model, experts = first(spread(tiny_model("mixtral")))
    Router(model, experts).keep([0, 3, 5])
    twin = copy.deepcopy(model)
    ids = tokens(1, 16)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(twin(ids).logits, expected)
        Router(*first(twin)).module.weight.mul_(-1)
        assert not torch.equal(twin(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


def test_pickled(tmp_path):
    model, experts = first(spread(tiny_model("mixtral")))
    Router(model, experts).keep([0, 3, 5])
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(tokens(1, 16)).logits, model(tokens(1, 16)).logits)


def test_mode_follows():
    """PhiMoE's router samples while it trains, and only then."""
    model, experts = first(spread(tiny_model("phimoe")))
    router = Router(model.train(), experts)
    router.module.router_jitter_noise = 0.5  # all experts come near enough to the best one to be drawn
    router.keep(range(6))
    x = torch.randn(64, 64)
    with torch.no_grad():
        assert not torch.equal(router.module(x)[2], router.module(x)[2])
        model.eval()
        assert torch.equal(router.module(x)[2], router.module(x)[2])


def test_gradients_reach_the_kept_rows():
    model, experts = first(spread(tiny_model("mixtral")))
    router = Router(model, experts)
    router.keep([1, 4, 6])
    router.module(torch.randn(20, 64))[1][:, 0].sum().backward()
    rows = router.module.weight.grad.abs().sum(-1)
    assert (rows[[1, 4, 6]] > 0).all()
    assert (rows[[0, 2, 3, 5, 7]] == 0).all()


def test_compiles():
    model, experts = first(spread(tiny_model("mixtral")))
    router = Router(model, experts).module
    Router(model, experts).keep([1, 4, 6])
    x = torch.randn(20, 64)
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    for a, b in zip(compiled(x), router(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_groups_of_different_sizes_for_a_while(family):
    """Masked rows choose as sliced ones, and never a dropped expert."""
    model, experts = first(spread(tiny_model(family)))
    router = Router(model, experts)
    x = torch.randn(1, 200, 64)
    with torch.no_grad(), router.keeping(GROUPED):
        sliced = router.module(x)
        own = router.module.__dict__["mcmoe_slice"]
        own._masks = True
        for part, name, value in own._counts:
            setattr(part, name, value)
        for part, name in own._widths:
            setattr(part, name, 65)
        masked = router.module(x)
        assert torch.equal(sliced[2].sort().values, masked[2].sort().values)
        assert torch.allclose(sliced[1].sort().values, masked[1].sort().values, atol=1e-6)
    with torch.no_grad(), router.keeping(range(1, 8)):
        index = router.module(x)[2]
        assert set(index.unique().tolist()) == set(range(1, 8))


def test_groups_keep_equally_many():
    model, experts = first(tiny_model("deepseek_v3"))
    with pytest.raises(ValueError, match=r"must keep equally many, but the groups keep \[4, 3\]"):
        Router(model, experts).keep(range(7))


def test_routers_that_cannot_be_sliced():
    with pytest.raises(NotImplementedError, match="class Llama4Router cannot be sliced: it hands its routing weights"):
        Router(*first(tiny_model("llama4_text")))


def test_no_router():
    model, experts = first(tiny_model("mixtral"))
    block = model.get_submodule(block_path(experts))
    block.gate = torch.nn.Linear(64, 7)
    with pytest.raises(NotImplementedError, match=r"No router of the experts at 'model\.layers\.0\.mlp\.experts'"):
        Router(model, experts)
