# SPDX-License-Identifier: Apache-2.0
"""Windows, perplexity, KL divergence, agreement and the error of layers against direct computations in float64."""

from __future__ import annotations

import copy
import json
import math
import statistics
from typing import Any

import pytest
import torch
from tiny import TINY, compressed, quick_config, save_dense, tiny_model, tokens
from torch import Tensor
from torch.nn import functional

from transformers_mcmoe.evaluation import Evaluation, error_buildup, evaluate, predictions, windows


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model("mixtral", intermediate_size=96)  # transformers' bf16 experts want multiples of 8
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform predictions
    return model


@pytest.fixture(scope="module")
def other(model: Any) -> Any:
    other = copy.deepcopy(model)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * parameter.std() * 0.3)
    return other


@torch.no_grad()
def _direct(model: Any, ids: Tensor) -> Tensor:
    """Log probabilities [N, T - 1, V] in float64, one window at a time."""
    logits = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])
    return logits[:, :-1].double().log_softmax(-1)


def test_perplexity(model: Any):
    ids = tokens(5, 16)
    scores = _direct(model, ids)
    loss = 0.0
    for row in range(5):
        for position in range(15):
            loss -= float(scores[row, position, ids[row, position + 1]])
    result = evaluate(model, ids, batch=2)
    assert result.perplexity == pytest.approx(math.exp(loss / 75), rel=1e-5)
    assert result.perplexity != pytest.approx(320, rel=0.05)  # not a uniform guess
    assert (result.kl, result.top1, result.tokens) == (None, None, 75)


def test_kl_and_top1(model: Any, other: Any):
    ids = tokens(5, 16)
    ours, reference = _direct(other, ids), _direct(model, ids)
    result = evaluate(other, ids, reference=model, batch=2)
    kl = float((reference.exp() * (reference - ours)).sum(-1).mean())
    assert kl > 0.05
    assert result.kl == pytest.approx(kl, rel=1e-4)
    backwards = float((ours.exp() * (ours - reference)).sum(-1).mean())
    assert result.kl != pytest.approx(backwards, rel=1e-2)  # the reference's probabilities weigh
    agree = float((ours.argmax(-1) == reference.argmax(-1)).double().mean())
    assert 0.02 < agree < 0.98
    assert result.top1 == pytest.approx(agree)
    assert result.perplexity == pytest.approx(evaluate(other, ids).perplexity, rel=1e-6)


def test_reference_to_itself(model: Any):
    result = evaluate(model, tokens(3, 16), reference=model)
    assert (result.kl, result.dnll, result.dnll_se) == (0.0, 0.0, 0.0)
    assert result.top1 == 1.0


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_batches_do_not_matter(model: Any, other: Any, batch: int):
    whole, parts = (evaluate(other, tokens(5, 16), model, batch=size) for size in (5, batch))
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-4)
    assert (parts.top1, parts.tokens) == (whole.top1, whole.tokens)


def test_half_precision_logits_are_scored_in_float32(model: Any):
    ids = tokens(3, 16)
    half = copy.deepcopy(model).bfloat16()
    scores = _direct(half, ids)
    loss = -scores.gather(-1, ids[:, 1:, None]).mean()
    assert evaluate(half, ids).perplexity == pytest.approx(math.exp(float(loss)), rel=1e-5)


def test_no_gradients_are_kept(model: Any):
    result = evaluate(model, tokens(2, 8))
    assert isinstance(result, Evaluation)
    assert isinstance(result.perplexity, float)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(50, 16, 16), (50, 16, 5), (49, 16, 1), (49, 16, 16), (16, 16, 3), (48, 16, 15)]
)
def test_windows_score_no_token_twice(length: int, context: int, stride: int):
    found = windows(torch.arange(length), context, stride)
    scored: list[int] = []
    for i, (ids, given) in enumerate(found):
        assert ids[0] == i * stride
        assert len(ids) == context or i + 1 == len(found)
        new = ids[given + 1 :].tolist()
        assert new
        assert i == 0 or stride == context or new[0] - int(ids[0]) >= context - stride
        scored += new
    first = range(0, length, context) if stride == context else [0]
    assert scored == [i for i in range(length) if i not in first]


@torch.no_grad()
def _token_by_token(model: Any, text: Tensor, context: int, stride: int) -> tuple[Tensor, Tensor]:
    """Log probabilities [n, V] and ids [n]: every token of a text from the first window that has it after another."""
    scores, targets = [], []
    for token in range(1, len(text)):
        start = 0
        while start + context <= token:
            start += stride
        if start < token:
            logits = model(input_ids=text[None, start:token], use_cache=False).logits[0, -1]
            scores.append(logits.double().log_softmax(-1))
            targets.append(int(text[token]))
    return torch.stack(scores), torch.tensor(targets)


@pytest.mark.parametrize("stride", [16, 6, 1])
def test_strided_text(model: Any, other: Any, stride: int):
    text = tokens(1, 53)[0]
    ours, targets = _token_by_token(other, text, 16, stride)
    dense, _ = _token_by_token(model, text, 16, stride)
    result = evaluate(other, text, model, context=16, stride=stride, batch=3)
    nll, expected = (-x.gather(-1, targets[:, None]).mean() for x in (ours, dense))
    assert result.tokens == len(targets) == (49 if stride == 16 else 52)
    assert result.nll == pytest.approx(float(nll), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-5)
    assert result.reference_perplexity == pytest.approx(math.exp(float(expected)), rel=1e-5)
    assert result.dnll == pytest.approx(float(nll - expected), abs=1e-5)
    assert result.kl == pytest.approx(float((dense.exp() * (dense - ours)).sum(-1).mean()), rel=1e-4)
    assert result.top1 == pytest.approx(float((ours.argmax(-1) == dense.argmax(-1)).double().mean()))


def test_text_without_overlap_is_its_windows(model: Any):
    text = tokens(1, 64)[0]
    text, cut = (evaluate(model, ids, **options) for ids, options in ((text, {"context": 16}), (text.view(4, 16), {})))
    assert text == cut


def test_logits_in_chunks_and_small_batches(model: Any, other: Any, monkeypatch: pytest.MonkeyPatch):
    text = tokens(1, 60)[0]
    whole = evaluate(other, text, model, context=16, stride=6)
    seen = []
    handle = other.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((*kwargs["input_ids"].shape, output.logits.shape[1])),
        with_kwargs=True,
    )
    monkeypatch.setattr(predictions, "CHUNK", 320 * 4)
    monkeypatch.setattr(predictions, "LOGITS", 2 * 16 * 320)
    with handle:
        parts = evaluate(other, text, model, context=16, stride=6)
    assert parts.dnll == pytest.approx(whole.dnll, rel=1e-5)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-5)
    assert parts.top1 == whole.top1
    # the second and later batches score nothing in a window's first 9 predictions, and ask for no logits there
    assert seen[:2] == [(2, 16, 16), (2, 16, 7)]


def test_standard_error_over_windows(model: Any, other: Any):
    ids = tokens(6, 16)
    result = evaluate(other, ids, model)
    single = [evaluate(other, row[None], model) for row in ids]
    for name in ("dnll", "kl"):
        values = [getattr(one, name) for one in single]
        assert getattr(result, name) == pytest.approx(statistics.mean(values), rel=1e-5)
        expected = statistics.stdev(values) / math.sqrt(6)
        assert getattr(result, f"{name}_se") == pytest.approx(expected, rel=1e-4)
    assert single[0].dnll_se is None


def test_standard_error_weighs_windows_by_their_tokens():
    sums, counts = torch.tensor([3.0, 8.0, 1.0]).double(), torch.tensor([2.0, 4.0, 1.0]).double()
    mean, error = predictions._mean(sums, counts)
    assert mean == pytest.approx(12 / 7)
    squares = sum((s - 12 / 7 * c) ** 2 for s, c in zip([3, 8, 1], [2, 4, 1], strict=True))
    assert error == pytest.approx(math.sqrt(3 / 2 * squares) / 7)


def test_limit_spreads_windows(model: Any):
    ids = tokens(8, 16)
    result = evaluate(model, ids, limit=3)
    assert result.nll == pytest.approx(evaluate(model, ids[[0, 2, 5]]).nll)
    assert (result.protocol.windows, result.protocol.of_windows, result.tokens) == (3, 8, 45)


def test_models_are_evaluated_in_eval_mode(model: Any):
    live = copy.deepcopy(model)
    live.model.layers[0].self_attn.attention_dropout = 0.9
    live.train()
    live.lm_head.eval()
    before = [module.training for module in live.modules()]
    assert evaluate(live, tokens(2, 16)).nll == evaluate(model, tokens(2, 16)).nll
    assert [module.training for module in live.modules()] == before


def test_evaluation_as_json(model: Any, other: Any):
    result = evaluate(other, tokens(1, 40)[0], model, context=16, stride=8)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["protocol"] == {
        "context": 16,
        "stride": 8,
        "windows": 4,
        "of_windows": 4,
        "tokens": 39,
        "dtypes": {"model": "float32", "reference": "float32", "log_softmax": "float32", "sums": "float64"},
    }
    libraries = {"torch", "transformers", "accelerate", "safetensors", "numpy", "scipy"}
    assert set(data["versions"]) == {"transformers_mcmoe", "python", *libraries}
    assert data["seed"] is None
    names = ("perplexity", "nll", "reference_perplexity", "dnll", "dnll_se", "kl", "kl_se", "top1", "tokens")
    assert {name: data[name] for name in names} == {name: getattr(result, name) for name in names}


def test_broken_model_is_reported(model: Any):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.mul_(1e6)
    result = evaluate(broken, tokens(2, 16))
    assert result.perplexity == math.inf
    assert math.isfinite(result.nll)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    data = evaluate(broken, tokens(2, 16), model).to_dict()
    assert (data["perplexity"], data["nll"], data["kl"]) == (None, None, None)
    assert data["reference_perplexity"] == evaluate(model, tokens(2, 16)).perplexity


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((10,), {"context": 16}, "The text has 10 tokens, too few for context=16"),
        ((0,), {"context": 16}, "The text has 0 tokens"),
        ((4, 1), {}, r"\(4, 1\)"),
        ((0, 16), {}, r"\(0, 16\)"),
        ((2, 3, 4), {}, r"\(2, 3, 4\)"),
        ((40,), {}, "give context="),
        ((40,), {"context": 1}, "context=1 leaves nothing"),
        ((40,), {"context": 16, "stride": 17}, "stride=17 is not between 1 and context=16"),
        ((40,), {"context": 16, "stride": 0}, "stride=0 is not between"),
        ((1, 40), {"context": 16}, r"\(1, 40\) are windows already"),
        ((200,), {"context": 129}, "129 tokens exceed the 128 positions"),
        ((40,), {"context": 16, "limit": 0}, "limit=0"),
        ((40,), {"context": 16, "batch": 0}, "batch=0"),
    ],
)
def test_errors(model: Any, shape: tuple[int, ...], options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        evaluate(model, torch.ones(shape, dtype=torch.int64), **options)


def test_errors_of_vocabularies(model: Any):
    smaller = tiny_model("mixtral", vocab_size=256)
    for function in (evaluate, error_buildup):
        with pytest.raises(ValueError, match="vocabulary of 256 and the reference one of 320"):
            function(smaller, tokens=tokens(2, 16), reference=model)
    with pytest.raises(ValueError, match="ids from 5 to 320, but the model knows 0 to 319"):
        evaluate(model, torch.tensor([[5, 320]]))
    with pytest.raises(ValueError, match=r"dtype is torch\.float32"):
        evaluate(model, torch.ones(2, 16))


def _hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", sorted(TINY))
def test_no_error_without_compression(family: str):
    dense = tiny_model(family)
    before = _hooks(dense)
    result = error_buildup(copy.deepcopy(dense), dense, tokens(3, 16), batch=2)
    assert len(result.layers) == len(dense.get_submodule(result.layers[0].path.rpartition(".")[0]))
    for distance in (*(d for layer in result.layers for d in (layer.entering, layer.alone)), result.leaving):
        assert distance.relative_error == 0.0
        assert distance.cosine == pytest.approx(1.0)
    assert _hooks(dense) == before


@pytest.fixture(scope="module")
def four_layers() -> Any:
    return tiny_model("mixtral", num_hidden_layers=4)


@torch.no_grad()
def _perturb(model: Any, layer: int) -> Any:
    other = copy.deepcopy(model)
    for parameter in other.model.layers[layer].mlp.experts.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return other


def test_one_perturbed_layer(four_layers: Any):
    result = error_buildup(_perturb(four_layers, 1), four_layers, tokens(2, 16))
    assert [layer.path for layer in result.layers] == [f"model.layers.{i}" for i in range(4)]
    entering = [layer.entering.relative_error for layer in result.layers]
    alone = [layer.alone.relative_error for layer in result.layers]
    assert entering[:2] == [0.0, 0.0]
    assert min(entering[2], entering[3], result.leaving.relative_error) > 1e-3
    assert [error > 0 for error in alone] == [False, True, False, False]
    # nothing before layer 1 differs, so that its own error is the whole error behind it
    assert result.layers[1].alone.relative_error == pytest.approx(entering[2], rel=1e-6)
    assert result.layers[1].alone.cosine == pytest.approx(result.layers[2].entering.cosine, rel=1e-9)
    assert result.layers[2].entering.cosine < 1 - 1e-6


@torch.no_grad()
def test_distances_are_those_of_hidden_states(four_layers: Any):
    ids = tokens(5, 16)
    other = _perturb(_perturb(four_layers, 0), 2)
    result = error_buildup(other, four_layers, ids, batch=2)
    # transformers' own hidden states: what enters each layer (the last one is behind the final norm)
    ours, dense = (
        model(ids, use_cache=False, output_hidden_states=True).hidden_states for model in (other, four_layers)
    )
    for i, layer in enumerate(result.layers):
        a, b = ours[i].double(), dense[i].double()
        assert layer.entering.relative_error == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-4, abs=1e-12)
        cosine = float(functional.cosine_similarity(a, b, dim=-1).mean())
        assert layer.entering.cosine == pytest.approx(cosine, rel=1e-7)
    # single layer: a model whose other layers are dense
    single = error_buildup(_perturb(four_layers, 2), four_layers, ids)
    assert result.layers[2].alone.relative_error == pytest.approx(single.layers[2].alone.relative_error, rel=1e-4)
    assert result.layers[3].entering.relative_error > single.layers[3].entering.relative_error


def test_packed_model(tmp_path: Any):
    folder = save_dense("mixtral", tmp_path)
    packed = compressed(folder, quick_config(seed=3))
    dense = tiny_model("mixtral")
    text = tokens(1, 70)[0]
    result = error_buildup(packed, dense, text, context=16, limit=3)
    assert result.layers[0].entering.relative_error == 0.0  # embeddings are not quantized
    assert all(0 < layer.alone.relative_error < 1 for layer in result.layers)
    assert 0 < result.leaving.relative_error < 1
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["seed"] == 3
    assert data["protocol"]["dtypes"] == {"model": "float32", "reference": "float32", "sums": "float64"}
    assert (data["protocol"]["tokens"], data["protocol"]["of_windows"]) == (48, 5)
    assert data["layers"][1]["alone"]["cosine"] == result.layers[1].alone.cosine
    assert evaluate(packed, text, dense, context=16).to_dict()["seed"] == 3
    # two packed models, as for runtime pruning on and off
    same = error_buildup(copy.deepcopy(packed), packed, text, context=16)
    assert same.leaving.relative_error == 0.0


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_models_of_two_dtypes(family: str):
    dense = tiny_model(family, **({"intermediate_size": 96} if family == "mixtral" else {}))
    dense.set_attn_implementation("eager")  # a float mask, which must have the dtype of the layer that it is given to
    half = copy.deepcopy(dense).bfloat16()
    for model, reference in ((half, dense), (dense, half)):
        result = error_buildup(model, reference, tokens(2, 16))
        errors = [e for layer in result.layers for e in (layer.entering, layer.alone)]
        assert all(0 < error.relative_error < 0.05 for error in [*errors[1:], result.leaving])
        assert result.protocol.dtypes["model"] != result.protocol.dtypes["reference"]


def test_zero_rows_have_no_angle():
    dense = tiny_model("mixtral")
    with torch.no_grad():
        dense.model.embed_tokens.weight[5] = 0
    other = copy.deepcopy(dense)
    ids = torch.tensor([[5, 5, 7, 8]])
    assert error_buildup(other, dense, ids).layers[0].entering.cosine == pytest.approx(1.0)
    with torch.no_grad():
        other.model.embed_tokens.weight[5] = 1
    assert error_buildup(other, dense, ids).layers[0].entering.cosine == pytest.approx(0.5)


def test_errors_of_error_buildup(four_layers: Any):
    ids = tokens(2, 16)
    with pytest.raises(ValueError, match="one object"):
        error_buildup(four_layers, four_layers, ids)
    with pytest.raises(ValueError, match=r"4 decoder layers at 'model\.layers', but the model has 2"):
        error_buildup(tiny_model("mixtral"), four_layers, ids)
    with pytest.raises(ValueError, match="too few for context=32"):
        error_buildup(copy.deepcopy(four_layers), four_layers, ids[0], context=32)
    short = copy.deepcopy(four_layers)
    before = _hooks(four_layers)
    short.model.config.num_hidden_layers = 3
    for models in ((four_layers, short), (short, four_layers)):
        with pytest.raises(NotImplementedError, match=r"in the order \[0, 1, 2\]"):
            error_buildup(*models, ids)
    assert _hooks(four_layers) == before
