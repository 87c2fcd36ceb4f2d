# SPDX-License-Identifier: Apache-2.0
"""Streaming: a layer's outputs equal those of a full forward pass, and models that cannot be streamed fall back."""

import logging

import pytest
import torch
from tiny import TINY, load_class, save_dense, tokens
from transformers import AutoConfig

from transformers_mcmoe.calibration.sequences import Sequences
from transformers_mcmoe.models.names import CheckpointNames
from transformers_mcmoe.models.stream import Checkpoint, LayerStream, LoadedRunner, computing, open_runner
from transformers_mcmoe.models.structure import Structure

STREAMED = sorted(TINY)


def _open(folder, tmp_path, batch=2, ids=None):
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = load_class(folder)._from_config(config, dtype=torch.float32)
    names = CheckpointNames(model)
    files = sorted(folder.glob("*.safetensors"))
    paths = list(Structure(model).experts)
    ids = Sequences.of(tokens(4, 24) if ids is None else ids)
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    device = torch.device("cpu")
    with computing():
        return open_runner(
            model,
            Checkpoint(files),
            names,
            paths,
            ids,
            work,
            dtype=torch.float32,
            device=device,
            batch_tokens=batch * ids.longest,
        )


@pytest.mark.parametrize("family", STREAMED)
def test_outputs_equal_full_forward(family, tmp_path):
    folder = save_dense(family, tmp_path / "dense")
    model = load_class(folder).from_pretrained(folder, dtype=torch.float32)
    runner = _open(folder, tmp_path)
    with computing():
        assert isinstance(runner, LayerStream)
        expected: dict[str, list[torch.Tensor]] = {path: [] for path in runner.layers}

        def keep(path):
            return lambda m, a, out: expected[path].append(out[0] if isinstance(out, tuple) else out)

        for path in runner.layers:
            model.get_submodule(path).register_forward_hook(keep(path))
        for ids in tokens(4, 24).split(2):
            model(ids, use_cache=False)
        for i, path in enumerate(runner.layers):
            with runner.loaded(i):
                norms = runner.advance(i)
            full = torch.cat(expected[path])
            assert torch.equal(runner._hidden[slice(0, 4)], full), path
            assert norms.total == pytest.approx(float(full.norm()), rel=1e-4)
            assert norms.median == pytest.approx(float(full.norm(dim=-1).flatten().median()), rel=1e-4)


def test_only_one_layer_is_in_memory(tmp_path):
    runner = _open(save_dense("mixtral", tmp_path / "dense"), tmp_path)
    with computing():
        assert all(p.is_meta for layer in runner._modules for p in layer.parameters())
        assert runner.weights.model.lm_head.weight.is_meta  # the head is never needed
        with runner.loaded(1):
            assert all(p.is_meta for p in runner._modules[0].parameters())
            assert not any(p.is_meta for p in runner._modules[1].parameters())
        assert all(p.is_meta for layer in runner._modules for p in layer.parameters())


def test_sharded_checkpoint(tmp_path):
    one = save_dense("mixtral", tmp_path / "one")
    model = load_class(one).from_pretrained(one, dtype=torch.float32)
    model.save_pretrained(tmp_path / "many", max_shard_size="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    hidden = []
    for folder in (one, tmp_path / "many"):
        runner = _open(folder, tmp_path / folder.name)
        with computing():
            with runner.loaded(0):
                runner.advance(0)
            hidden.append(runner._hidden[slice(0, 4)].clone())
    assert torch.equal(*hidden)


def test_layers_that_need_each_other_fall_back(tmp_path, caplog):
    """A model that hands a layer something an earlier one computed is loaded whole, with the reason logged."""
    folder = save_dense("mixtral", tmp_path / "dense")
    import transformers.models.mixtral.modeling_mixtral as mixtral

    original = mixtral.MixtralModel.forward

    def forward(self, *args, **kwargs):
        def pre(module, args, kwargs):
            return (args[0] * 1.5, *args[1:]), kwargs  # hidden states are changed between layers

        handles = [layer.register_forward_pre_hook(pre, with_kwargs=True) for layer in self.layers]
        try:
            return original(self, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    mixtral.MixtralModel.forward = forward
    try:
        with caplog.at_level(logging.WARNING):
            runner = _open(folder, tmp_path)
            assert isinstance(runner, LoadedRunner)
            assert "changes hidden states" in runner.reason
            assert "whole dense model is loaded" in caplog.text
            runner.replay(1)
    finally:
        mixtral.MixtralModel.forward = original


def test_places_are_those_of_the_tensors(tmp_path):
    folder = save_dense("mixtral", tmp_path / "dense")
    files = sorted(folder.glob("*.safetensors"))
    checkpoint = Checkpoint(files)
    for key, part in checkpoint.slices.items():
        ((file, start, stop),) = checkpoint.places([key])
        assert file.read_bytes()[start:stop] == part[:].contiguous().view(torch.uint8).numpy().tobytes()
    ((_, start, stop),) = checkpoint.places(list(checkpoint.slices))  # all of them lie beside each other
    assert stop == files[0].stat().st_size
    thread = checkpoint.read_ahead(list(checkpoint.slices))
    if thread is not None:
        thread.join(60)
        assert not thread.is_alive()
    assert checkpoint.places([]) == []


def test_truncated_file_is_named(tmp_path):
    folder = save_dense("mixtral", tmp_path / "dense")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors' cannot be read"):
        Checkpoint([file])


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_writing_to_a_layer_does_not_reach_the_mapped_file(family, tmp_path):
    """Written pages of a mapped file would stay in memory, and be read again in a second pass."""
    runner = _open(save_dense(family, tmp_path / "dense"), tmp_path)
    with computing():
        with runner.loaded(0) as layer:
            original = {name: parameter.clone() for name, parameter in layer.named_parameters()}
            for parameter in layer.parameters():
                parameter.fill_(7.0)
        with runner.loaded(0) as layer:
            assert all(torch.equal(parameter, original[name]) for name, parameter in layer.named_parameters())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # one has masks for every sequence of a batch
def test_a_pass_over_some_of_the_sequences(family, tmp_path):
    folder = save_dense(family, tmp_path / "dense")
    runner = _open(folder, tmp_path, batch=2)
    seen = []
    with computing():
        for sequences, expected in ((3, [2, 1]), (None, [2, 2]), (9, [2, 2])):
            runner.restart(sequences)
            assert runner.sequences == sum(expected)
            with runner.loaded(0) as layer:
                handle = layer.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
                runner.replay(0)
                handle.remove()
            assert seen == expected
            seen.clear()
